"""The block against the equations written out in plain float64 NumPy, its gradients, and other lengths."""

import math

import numpy as np
import pytest
import pywt
import torch
import torchcde

from mnemodyn.model.control import path_derivative
from mnemodyn.model.network import MnemoDyn
from mnemodyn.model.operator import BandedOperator, OperatorBlock
from mnemodyn.settings import ModelConfig


def config(**settings) -> ModelConfig:
    small = {
        "n_parcels": 5,
        "n_timepoints": 32,
        "n_blocks": 1,
        "n_channels": 3,
        "input_width": 4,
        "field_rank": 2,
        "n_levels": 3,
        "kernel_size": 3,
    }
    return ModelConfig(**{**small, **settings})


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """All parameters random: fresh ones hide mistakes behind zeros and identities."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module.double()


ACT = {
    "tanh": np.tanh,
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu": lambda a: 0.5 * a * (1 + np.vectorize(math.erf)(a / math.sqrt(2))),
    "relu": lambda a: np.maximum(a, 0),
}


def double_of_block(weights: dict, x: np.ndarray, visible: np.ndarray, t_r: float, c: ModelConfig):
    """One scan (time, parcel) through one block, as the equations read."""
    act, k = ACT[c.activation], c.n_channels
    time = len(x)
    dx = np.array([(x[max(i, 1)] - x[max(i, 1) - 1]) / t_r for i in range(time)])
    v = np.zeros((time, k))
    for i in range(time):
        z = act(weights["field.input.weight"] @ x[i] + weights["field.input.bias"])
        z = act(weights["field.bottleneck.weight"] @ z + weights["field.bottleneck.bias"])
        h = act(weights["field.expansion.weight"] @ z + weights["field.expansion.bias"]).reshape(
            -1, k
        )
        driver = {"derivative": dx[i], "value": x[i], "both": np.concatenate([dx[i], x[i]])}[
            c.control
        ]
        v[i] = driver @ h / math.sqrt(len(driver))
        if c.lift:
            v[i] += (
                weights["lift.weight"] @ np.concatenate([x[i], visible[i]]) + weights["lift.bias"]
            )
    a, approximations, details = v.T, [v.T], []
    for _ in range(c.n_levels):
        a, d = pywt.dwt(a, c.wavelet, mode="periodization", axis=-1)
        approximations.append(a)
        details.append(d)
    coarse = a.copy()
    for m, b in zip(weights["coarse.weight"], weights["coarse.bias"], strict=True):
        coarse = act(np.stack([coarse[ch] @ m[ch] + b[ch] for ch in range(k)]))
    loss = 0.0
    for j in reversed(range(c.n_levels)):
        a, d = approximations[j + 1], details[j]
        loss += np.mean((coarse - a) ** 2)
        u = np.concatenate([d, a])
        n, half = u.shape[1], c.kernel_size // 2
        biases = weights[f"banded.{j}.bias"]
        if c.banded == "depthwise":
            kernels = np.einsum(
                "soi,siw->soiw", weights[f"banded.{j}.mixing"], weights[f"banded.{j}.kernel"]
            )
        else:
            kernels = weights[f"banded.{j}.weight"]
        segment = math.ceil(n / c.n_segments)
        out = np.zeros_like(u)
        for s in range(c.n_segments):
            piece = np.zeros((2 * k, segment + 2 * half))
            held = u[:, s * segment : (s + 1) * segment]
            piece[:, half : half + held.shape[1]] = held
            for i in range(held.shape[1]):
                window = piece[:, i : i + c.kernel_size]
                out[:, s * segment + i] = np.einsum("oiw,iw->o", kernels[s], window) + biases[s]
        out = act(out)
        low = out[k:] + coarse
        coarse = pywt.idwt(low, out[:k], c.wavelet, mode="periodization", axis=-1)
        coarse = coarse[:, : approximations[j].shape[1]]
    y = coarse.T @ weights["output.weight"].T + weights["output.bias"]
    if c.parcel_scale:
        y = y * weights["parcel_scale"]
    return y, coarse.T, loss


CASES = [
    {},
    {"lift": False, "activation": "tanh"},
    {
        "n_timepoints": 61,
        "wavelet": "sym4",
        "n_segments": 4,
        "parcel_scale": True,
        "n_dense_layers": 3,
    },
    {"n_timepoints": 50, "activation": "silu", "n_segments": 2, "wavelet": "coif1"},
    {"n_dense_layers": 0, "n_levels": 1, "kernel_size": 1},
    {"n_timepoints": 61, "banded": "depthwise", "n_segments": 3},
    {"banded": "depthwise", "kernel_size": 5},
    {"control": "both", "lift": False},
    {"control": "value"},
    {"activation": "relu", "n_segments": 2},
]


@pytest.mark.parametrize("settings", CASES)
def test_block_is_its_equations(settings):
    c = config(multiresolution=True, **settings)
    block = shaken(OperatorBlock(c))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, c.n_timepoints, 5))
    visible = (rng.random(x.shape) > 0.4).astype(float)
    y, latents, loss = block(torch.from_numpy(x), 0.8, torch.from_numpy(visible))
    weights = {n: p.detach().numpy() for n, p in block.named_parameters()}
    doubles = [double_of_block(weights, a, b, 0.8, c) for a, b in zip(x, visible, strict=True)]
    np.testing.assert_allclose(y.detach(), np.stack([d[0] for d in doubles]), atol=1e-10)
    np.testing.assert_allclose(latents.detach(), np.stack([d[1] for d in doubles]), atol=1e-10)
    assert loss.item() == pytest.approx(np.mean([d[2] for d in doubles]), abs=1e-10)


@pytest.mark.parametrize("banded", ["full", "depthwise"])
def test_gradients(banded):
    c = config(
        banded=banded,
        n_parcels=2,
        n_timepoints=9,
        n_channels=2,
        n_levels=2,
        n_segments=2,
        activation="tanh",
        multiresolution=True,
    )
    block = shaken(OperatorBlock(c))
    x = torch.randn(1, 9, 2, dtype=torch.float64, requires_grad=True)
    visible = torch.ones_like(x)
    names = [n for n, _ in block.named_parameters()]

    def f(x, *values):
        named = dict(zip(names, values, strict=True))
        y, latents, loss = torch.func.functional_call(block, named, (x, 1.5, visible))
        return y, latents, loss

    values = [p.detach().clone().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(f, (x, *values))


@pytest.mark.parametrize("n", [2, 61, 240])
def test_control_equals_torchcde(n):
    x = torch.randn(2, n, 3, dtype=torch.float64)
    t = 0.72 * torch.arange(n, dtype=torch.float64)
    hermite = torchcde.hermite_cubic_coefficients_with_backward_differences(x, t)
    linear = torchcde.linear_interpolation_coeffs(x, t)
    for path in (torchcde.CubicSpline(hermite, t), torchcde.LinearInterpolation(linear, t)):
        oracle = torch.stack([path.derivative(s) for s in t], dim=1)
        torch.testing.assert_close(path_derivative(x, 0.72), oracle)
    torch.testing.assert_close(
        path_derivative(x, torch.tensor([0.72, 1.44]))[1], path_derivative(x, 1.44)[1]
    )


def test_control_refuses():
    with pytest.raises(ValueError, match=r"t_r must be > 0 seconds, got -2\.0"):
        path_derivative(torch.zeros(1, 4, 2), -2.0)
    with pytest.raises(ValueError, match="one a scan"):
        path_derivative(torch.zeros(1, 4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="time >= 2"):
        path_derivative(torch.zeros(1, 1, 2), 1.0)


@pytest.mark.parametrize(
    ("banded", "expected"), [("full", 2 * (36 * 5 + 6)), ("depthwise", 2 * (36 + 6 * 5 + 6))]
)
def test_parameters_of_a_banded_operator(banded, expected):
    operator = BandedOperator(16, config(n_segments=2, kernel_size=5, banded=banded))
    assert sum(p.numel() for p in operator.parameters()) == expected


@pytest.mark.parametrize("banded", ["full", "depthwise"])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "relu"])
def test_fresh_network_keeps_unit_scale_and_is_close_to_the_identity(activation, banded):
    torch.manual_seed(0)
    c = config(
        n_parcels=90,
        n_timepoints=240,
        n_blocks=4,
        n_channels=32,
        input_width=32,
        n_levels=5,
        n_dense_layers=4,
        n_segments=4,
        activation=activation,
        banded=banded,
    )
    x = torch.randn(4, 240, 90).cumsum(1)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    net = MnemoDyn(c)
    with torch.no_grad():
        output = net(x, 0.72)
    assert (output.reconstruction - x).square().mean() < 0.2
    assert 0.1 < output.latents.std() < 4


def test_hidden_entries_have_no_influence():
    torch.manual_seed(0)
    net = MnemoDyn(config(n_blocks=2))
    x, hidden = torch.randn(2, 32, 5), torch.rand(2, 32, 5) < 0.5
    expected = net(x, 2.0, hidden=hidden)
    got = net(x.masked_fill(hidden, torch.nan), 2.0, hidden=hidden)
    assert torch.equal(expected.reconstruction, got.reconstruction)
    assert expected.latents.shape == (2, 32, 3)
    assert expected.multiresolution_loss is None
    assert not torch.equal(net(x, 2.0).reconstruction, expected.reconstruction)


@pytest.mark.parametrize("length", [2, 3, 17, 31, 32, 33, 61, 200])
@pytest.mark.parametrize("n_segments", [1, 3])
def test_any_length(length, n_segments):
    net = MnemoDyn(
        config(n_segments=n_segments, n_blocks=2, n_dense_layers=2, multiresolution=True)
    )
    x = torch.randn(2, length, 5, requires_grad=True)
    output = net(x, 2.0)
    assert output.reconstruction.shape == x.shape
    output.reconstruction.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_operators_repeat_over_a_longer_scan():
    """Two periods of a signal give two periods of output: a long scan is treated as its windows are."""
    block = shaken(OperatorBlock(config(n_segments=2, n_dense_layers=2)))
    v = torch.randn(1, 3, 32, dtype=torch.float64)
    once, _ = block.pyramid(v)
    twice, _ = block.pyramid(torch.cat([v, v], dim=-1))
    torch.testing.assert_close(twice, torch.cat([once, once], dim=-1))


def test_network_refuses_what_does_not_fit():
    net = MnemoDyn(config())
    with pytest.raises(ValueError, match=r"time, 5 parcels\), got \(2, 32, 6\)"):
        net(torch.zeros(2, 32, 6), 1.0)
    with pytest.raises(ValueError, match="hidden must be bool"):
        net(torch.zeros(2, 32, 5), 1.0, hidden=torch.zeros(2, 32, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"activation": "elu"}, "got 'elu'"),
        ({"banded": "thin"}, "banded must be 'full' or 'depthwise', got 'thin'"),
        ({"n_channels": 0}, "n_channels must be greater than or equal to 1, got 0"),
        ({"lift": 1}, "lift must be a valid boolean, got 1"),
        ({"n_levels": 6}, "n_levels 6 halves"),
        ({"n_blocks": 2.0}, "n_blocks must be a valid integer"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_config_refuses_unknown_settings():
    with pytest.raises(ValueError, match=r"K_LC is not a setting"):
        ModelConfig(n_parcels=3, n_timepoints=8, K_LC=2)
    with pytest.raises(ValueError, match=r"n_parcels must be given"):
        ModelConfig(n_timepoints=8)
