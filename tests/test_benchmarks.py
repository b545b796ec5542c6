"""The plain form against the package, the counters against counts by hand, and the command."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks.banded import Grouped

from benchmarks import speed
from benchmarks.draft import Draft
from benchmarks.measure import Count
from benchmarks.transformer import PatchTransformer
from mnemodyn.model.network import MnemoDyn
from mnemodyn.model.operator import BandedOperator
from mnemodyn.settings import ModelConfig

TINY = speed.Case(
    section="batch", batch=2, n_timepoints=61, n_parcels=7, n_channels=8, input_width=5, n_levels=3
)


def shaken(module):
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module.double()


def gradients(model, network, x):
    network.zero_grad()
    y = model(x, 0.72)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in network.parameters())]


@pytest.mark.parametrize(
    "settings", [{}, {"lift": True, "parcel_scale": True, "residual": False, "wavelet": "sym4"}]
)
def test_draft_and_eager_form_equal_the_package(settings):
    network = shaken(MnemoDyn(replace(TINY.config(), **settings)))
    x = torch.randn(2, 61, 7, dtype=torch.float64)
    ours = gradients(speed.Lean(network), network, x)
    for model in (Draft(network), speed.Eager(network)):
        torch.testing.assert_close(gradients(model, network, x), ours, rtol=1e-6, atol=1e-8)


def test_draft_refuses():
    with pytest.raises(ValueError, match="61 frames, got 60"):
        Draft(MnemoDyn(TINY.config()))(torch.zeros(1, 60, 7), 1.0)
    with pytest.raises(ValueError, match="banded must be full"):
        Draft(MnemoDyn(replace(TINY.config(), banded="depthwise")))


def test_grouped_convolution_equals_the_product():
    config = ModelConfig(n_parcels=1, n_timepoints=64, n_channels=5, n_segments=3)
    product, grouped = shaken(BandedOperator(31, config)), Grouped(31, config).double()
    grouped.load_state_dict(product.state_dict())
    u = torch.randn(2, 10, 70, dtype=torch.float64)
    torch.testing.assert_close(grouped(u), product(u))


@pytest.mark.parametrize(("n_parcels", "n_timepoints"), [(20, 32), (23, 50)])
def test_transformer_keeps_shape_and_joins_distant_entries(n_parcels, n_timepoints):
    model = PatchTransformer(n_parcels, n_timepoints, width=8, n_layers=1)
    x = torch.randn(2, n_timepoints, n_parcels, requires_grad=True)
    y = model(x, 1.0)
    assert y.shape == x.shape
    y[0, 0, 0].backward()
    assert x.grad[0, -1, -1] != 0
    assert (x.grad[1] == 0).all()


def test_counts():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with Count() as count:
        c = torch.tanh(a @ b)
        c.T.unsqueeze(0)  # views move nothing
    assert (count.flops, count.activations) == (2 * 3 * 4 * 5, 15)
    assert count.bytes == 4 * (12 + 20 + 15) + 4 * 2 * 15


@pytest.mark.parametrize("groups", [1, 2])
def test_counts_a_convolution_and_its_gradients(groups):
    x, weight = (
        torch.randn(3, 4, 9, requires_grad=True),
        torch.randn(6, 4 // groups, 5, requires_grad=True),
    )
    with Count() as count:
        torch.nn.functional.conv1d(x, weight, padding=2, groups=groups).sum().backward()
    assert count.flops == 3 * 2 * (3 * 6 * 9) * (4 // groups * 5)


def test_grids_name_known_methods_and_hold_the_published_size():
    for quick, published in ((True, False), (False, True), (True, True), (False, False)):
        grid = speed.cases(quick=quick, published=published)
        assert all(set(case.methods) <= set(speed.METHODS) for case in grid)
        assert len(set(grid)) == len(grid)
    published = next(case for case in speed.cases(published=True) if case.section == "published")
    with torch.device("meta"):
        ours = sum(p.numel() for p in MnemoDyn(published.config()).parameters())
    assert ours == 148_237_012


def test_rows_and_ratios(monkeypatch):
    monkeypatch.setattr(
        speed, "measure_peak", lambda case, method, *_: 3000 if method == "draft" else 1000
    )
    most = {"matmul_flops": 1e11, "copy_bytes": 1e10, "activations": 1e9, "memory": 1e10}
    case = replace(TINY, section="published")
    rows, skipped = speed.measure(
        case, device="cpu", threads=torch.get_num_threads(), repeats=1, most=most
    )
    assert [row["method"] for row in rows] == list(case.methods)
    assert not skipped
    assert all(row["seconds"] > 0 and row["flops"] > 0 and row["activations"] > 0 for row in rows)
    found = speed.ratios(rows)["published_train"]
    assert found["memory"] == 3
    assert found["time"] == rows[0]["seconds"] / rows[2]["seconds"]
    json.dumps(rows, allow_nan=False)
    _, skipped = speed.measure(
        replace(case, methods=("draft", "lean")),
        device="cpu",
        threads=1,
        repeats=1,
        most={**most, "memory": 1e3},
    )
    assert [s["method"] for s in skipped] == ["draft"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="the peak of resident memory can be reset on Linux only"
)
def test_peak_memory_is_of_the_size_of_what_is_kept():
    case = replace(
        TINY, batch=4, n_timepoints=512, n_parcels=64, n_channels=32, n_blocks=1, n_dense_layers=1
    )
    got = speed.measure_peak(case, "draft", "cpu", 1)
    h = 4 * 4 * 512 * 64 * 32
    assert 1.5 * h < got < 6 * h
