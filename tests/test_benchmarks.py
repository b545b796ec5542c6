"""The plain form against the package, the counters against counts by hand, and the command."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import speed
from benchmarks.measure import Count
from benchmarks.plain import PlainForm
from benchmarks.transformer import PatchTransformer
from lib.speed import sizes
from mnemodyn.model.network import MnemoDyn
from mnemodyn.results import read_results, write_results

CONFIG = replace(speed.SMALL, n_timepoints=61, n_parcels=7, n_channels=8, input_width=5, n_levels=3)
TINY = speed.Case("batch", CONFIG, 2, 61)
MOST = {"products": 1e11, "copies": 1e10, "activations": 1e9}


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
def test_plain_and_eager_form_equal_the_package(settings):
    network = shaken(MnemoDyn(replace(CONFIG, **settings)))
    x = torch.randn(2, 61, 7, dtype=torch.float64)
    ours = gradients(speed.Package(network), network, x)
    for model in (PlainForm(network), speed.Eager(network)):
        torch.testing.assert_close(gradients(model, network, x), ours, rtol=1e-6, atol=1e-8)


def test_the_plain_form_refuses():
    with pytest.raises(ValueError, match="61 frames, got 60"):
        PlainForm(MnemoDyn(CONFIG))(torch.zeros(1, 60, 7), 1.0)
    with pytest.raises(ValueError, match="banded must be full"):
        PlainForm(MnemoDyn(replace(CONFIG, banded="depthwise")))


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


def test_grids_hold_the_published_size():
    for quick, published in ((True, False), (False, True), (True, True), (False, False)):
        grid = speed.cases(quick=quick, published=published)
        assert len({case.task for case in grid}) == len(grid)
    published = next(case for case in speed.cases(published=True) if case.section == "published")
    with torch.device("meta"):
        ours = sum(p.numel() for p in MnemoDyn(published.config).parameters())
    assert ours == 148_237_012


def test_a_case_makes_rows_of_a_table_that_the_page_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "measure_peak", lambda *_: 2**20)
    monkeypatch.setattr(speed, "ceilings", lambda _: MOST)
    case = replace(TINY, section="published")
    write_results(tmp_path / "speed.csv", speed.measure_all([case], repeats=1))
    table = read_results(tmp_path / "speed.csv")
    assert set(table["kind"]) == {"timing"}
    assert (table["value"] > 0).all()
    found = sizes(table[table["task"] != "ceiling"])
    assert list(found["method"].unique()) == list(speed.METHODS)
    assert set(found["score"]) == {"seconds", "MiB", "products", "copies", "activations"}
    assert (found[["scans", "frames", "parcels"]] == [2, 61, 7]).all(axis=None)
    assert (found["step"] == "training").all()
    monkeypatch.setattr(speed, "memory_of", lambda _: 1000)
    rows = speed.measure(case, MOST, device="cpu", repeats=1)
    assert {row["method"] for row in rows} == {"this package", "transformer"}
    assert "left out" in capsys.readouterr().out


@pytest.mark.skipif(
    sys.platform != "linux", reason="the peak of resident memory can be reset on Linux only"
)
def test_peak_memory_is_of_the_size_of_what_is_kept():
    config = replace(
        CONFIG, n_timepoints=512, n_parcels=64, n_channels=32, n_blocks=1, n_dense_layers=1
    )
    got = speed.measure_peak(speed.Case("batch", config, 4, 512), speed.PLAIN, "cpu")
    h = 4 * 4 * 512 * 64 * 32
    assert 1.5 * h < got < 6 * h
