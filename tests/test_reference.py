"""Networks of the published draft give the draft's own numbers, and its files are read without running them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchcde
from safetensors.torch import load_file

from mnemodyn import MnemoDyn, ModelConfig
from mnemodyn.model.operator import Field
from mnemodyn.model.reference import ReferenceBlock, read_settings

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["linear_first", "odd_scales", "residual_spline"]


def golden(name: str) -> tuple[dict, dict, dict]:
    record = json.loads((GOLDEN / f"{name}.json").read_text())
    return (
        record,
        load_file(GOLDEN / f"{name}.weights.safetensors"),
        load_file(GOLDEN / f"{name}.tensors.safetensors"),
    )


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    record, weights, tensors = golden(name)
    network = MnemoDyn.from_reference(record["config"], weights).double()
    x = tensors["x"]
    output = network(x)
    assert error(network.blocks[0].derivative(x), tensors["dX_first"]) < 1e-8
    assert error(output.reconstruction, tensors["output"]) < 1e-8
    loss = (output.reconstruction - x).square().mean()
    if record["config"]["use_mRLoss"]:
        assert error(output.multiresolution_loss[None], tensors["multiresolution_loss"]) < 1e-8
        loss = loss + output.multiresolution_loss
    assert loss.item() == pytest.approx(record["loss"], rel=1e-8)
    loss.backward()
    gradients = gradients_under_draft_names(network)
    assert gradients.keys() == record["grad_norms"].keys()
    for parameter, norm in record["grad_norms"].items():
        assert gradients[parameter] == pytest.approx(norm, rel=1e-8), parameter


def gradients_under_draft_names(network: MnemoDyn) -> dict[str, float]:
    """Written apart from the table in the package, which must not be its own oracle."""
    replaced = [
        ("blocks.", "layers."),
        ("field.input", "input_projection"),
        ("field.bottleneck", "bottleneck"),
        ("field.expansion", "feature_expansion"),
        ("output", "output_projection"),
        ("parcel_scale", "channel_scales"),
    ]
    norms = {}
    for name, parameter in network.named_parameters():
        for ours, theirs in replaced:
            name = name.replace(ours, theirs)
        start, _, part = name.rpartition(".")
        if ".coarse" in name:
            dense = {
                f"{start.replace('coarse', 'dense_layers')}.{i}.{part}": g
                for i, g in enumerate(parameter.grad)
            }
            norms |= {key: g.norm().item() for key, g in dense.items()}
            continue
        if ".banded" in name:
            name = f"{start.replace('banded', 'conv_layers')}.0.{part}"
        norms[name] = parameter.grad.norm().item()
    return norms


@pytest.mark.parametrize("n", [2, 64])
def test_spline_control_is_the_drafts_use_of_torchcde(n):
    """Coefficients at unit spacing, read on the grid i / T."""
    x = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.arange(n, dtype=torch.float64) / n
    coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(x)
    config = ModelConfig(
        n_parcels=3,
        n_timepoints=n,
        n_levels=1,
        lift=False,
        compat="reference",
        interpolation="spline",
    )
    expected = torchcde.CubicSpline(coefficients, t).derivative(t)
    torch.testing.assert_close(ReferenceBlock(config, first=True).derivative(x), expected)
    torch.testing.assert_close(
        ReferenceBlock(config, first=False).derivative(x)[:, 1:], n * x.diff(dim=1)
    )


def test_no_linear_bias_is_a_bias_of_zero():
    record, weights, tensors = golden("residual_spline")
    linear = ("input_projection", "bottleneck", "feature_expansion", "output_projection")
    biases = [name for name in weights if name.endswith(".bias") and name.split(".")[2] in linear]
    assert len(biases) == 8
    zero = {name: torch.zeros_like(w) if name in biases else w for name, w in weights.items()}
    without = {name: w for name, w in weights.items() if name not in biases}
    expected = MnemoDyn.from_reference(record["config"], zero)(tensors["x"].float())
    got = MnemoDyn.from_reference({**record["config"], "linear_bias": False}, without)(
        tensors["x"].float()
    )
    torch.testing.assert_close(got.reconstruction, expected.reconstruction)


def test_head_reads_the_last_frame():
    record, weights, tensors = golden("linear_first")
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (64, 5), "0.bias": (64,), "3.weight": (3, 64), "3.bias": (3,)}
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {f"layers.0.prediction_head.{name}": w for name, w in head.items()}
    settings = {
        **record["config"],
        "predict": True,
        "num_classes": 3,
        "use_residual": False,
        "use_mRLoss": False,
    }
    network = MnemoDyn.from_reference(settings, weights).double()
    output = network(tensors["x"])
    head = {name: w.double() for name, w in head.items()}
    last = output.reconstruction[:, -1] @ head["0.weight"].T + head["0.bias"]
    expected = (last / (1 + torch.exp(-last))) @ head["3.weight"].T + head["3.bias"]
    torch.testing.assert_close(output.prediction, expected)


def test_relu_is_a_choice_of_the_draft():
    """It loads, has the equation of the field, gradients, and initial weights of its own."""
    torch.manual_seed(0)
    record, _, _ = golden("residual_spline")
    settings = {**record["config"], "nonlinearity": "relu", "n_levels": 1, "interpol": "linear"}
    network = MnemoDyn(read_settings(settings)).double()
    block, x = network.blocks[0], torch.randn(2, 64, 6, dtype=torch.float64)
    field = block.field
    z = field.input(x).relu()
    h = field.expansion(field.bottleneck(z).relu()).relu().unflatten(-1, (6, -1))
    drive = torch.einsum("btp,btpk->btk", block.derivative(x), h)
    torch.testing.assert_close(field(x, block.derivative(x)), drive)
    network(x).reconstruction.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    # The draft draws linear layers with a gain of 2 (Kaiming), so that ReLU keeps the second moment.
    wide = Field(replace(network.config, n_parcels=400, input_width=300))
    assert wide.input.weight.square().mean().item() == pytest.approx(2 / 400, rel=0.05)


def test_one_block_of_odd_length_returns_one_frame_more():
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=3,
        n_timepoints=13,
        n_blocks=1,
        n_channels=4,
        n_levels=2,
        lift=False,
        residual=False,
        compat="reference",
        interpolation="linear",
    )
    assert MnemoDyn(config)(torch.randn(2, 13, 3)).reconstruction.shape == (2, 14, 3)


def test_repetition_time_is_not_used_and_hidden_entries_are_zero():
    record, weights, tensors = golden("residual_spline")
    network, x = MnemoDyn.from_reference(record["config"], weights), tensors["x"].float()
    assert torch.equal(network(x).reconstruction, network(x, 0.72).reconstruction)
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = network(x.masked_fill(hidden, 0)).reconstruction
    assert torch.equal(
        network(x.masked_fill(hidden, torch.nan), hidden=hidden).reconstruction, expected
    )


def test_network_refuses_what_the_draft_does_not_know():
    record, weights, tensors = golden("residual_spline")
    network, x = MnemoDyn.from_reference(record["config"], weights), tensors["x"].float()
    with pytest.raises(ValueError, match="x must have 64 frames with compat='reference', got 62"):
        network(x[:, :62])
    with pytest.raises(ValueError, match="censored frames are not known to the draft"):
        network(x, censored=torch.arange(64).expand(2, 64) == 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 2}, r"unknown draft settings \['heads'\]"),
        ({"D_out": [6, 5]}, "D_out must repeat D = 6"),
        ({"num_layers": 3}, "num_layers is 3, but D_out has 2 entries"),
        ({"nonlinearity": "elu"}, "nonlinearity must be one of tanh, gelu, swish, relu, got 'elu'"),
        ({"interpol": "none"}, "interpolation must be spline or linear"),
        ({"duration": 2}, "duration must be 1, got 2"),
        ({"predict": True}, r"lack \['num_classes'\]"),
        ({"original_length": 63}, "n_timepoints must be even"),
        ({"D": 5.0, "D_out": None}, "n_parcels must be a valid integer"),
    ],
)
def test_settings_refused(settings, message):
    record, weights, _ = golden("residual_spline")
    with pytest.raises(ValueError, match=message):
        MnemoDyn.from_reference({**record["config"], **settings}, weights)


def test_settings_missing_or_without_effect():
    record, weights, _ = golden("residual_spline")
    settings = record["config"]
    with pytest.raises(ValueError, match=r"draft settings lack \['D', 'wave'\]"):
        MnemoDyn.from_reference(
            {k: v for k, v in settings.items() if k not in ("D", "wave")}, weights
        )
    unused = {
        "K_LC": [2],
        "dense_rank": 8,
        "LC_rank": 4,
        "conv_bias": True,
        "masked_modelling": False,
        "lr": 1e-3,
    }
    expected = MnemoDyn.from_reference(settings, weights).config
    assert MnemoDyn.from_reference({**settings, **unused}, weights).config == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "lift must be False"),
        ({"lift": False, "banded": "depthwise"}, "banded must be full"),
        ({"lift": False}, "interpolation must be spline or linear"),
        (
            {"compat": "none", "interpolation": "spline"},
            "interpolation='spline' needs compat='reference'",
        ),
        ({"compat": "none", "linear_bias": False}, "linear_bias=False needs compat='reference'"),
        ({"compat": "none", "n_classes": 2}, "n_classes=2 needs compat='reference'"),
        ({"compat": "draft"}, "compat must be 'none' or 'reference', got 'draft'"),
        (
            {"lift": False, "interpolation": "linear", "n_timepoints": 33},
            "n_timepoints must be even",
        ),
    ],
)
def test_config_refuses_contradictions(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"n_parcels": 3, "n_timepoints": 32, "compat": "reference", **settings})


def test_weights_that_do_not_fit_are_named_with_both_shapes():
    record, weights, _ = golden("residual_spline")
    weights["layers.0.conv_layers.1.0.weight"] = torch.zeros(2, 8, 8, 5)
    weights["layers.1.dense_layers.1.bias"] = torch.zeros(4, 9)
    weights["layers.2.bottleneck.bias"] = torch.zeros(3)
    del weights["layers.0.output_projection.bias"]
    with pytest.raises(ValueError, match="draft weights do not fit") as raised:
        MnemoDyn.from_reference(record["config"], weights)
    for line in (
        "layers.0.conv_layers.1.0.weight: expected (2, 8, 8, 3), got (2, 8, 8, 5)",
        "layers.1.dense_layers.1.bias: expected (4, 8), got (4, 9)",
        "layers.2.bottleneck.bias: expected none, got (3,)",
        "layers.0.output_projection.bias: expected (6,), got none",
    ):
        assert line in str(raised.value)
