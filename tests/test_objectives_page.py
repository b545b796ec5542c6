"""R2 by distance and band against loops and sums; a read-out of latents that hold the answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.objectives import LatentReadout, first_windows, r2_by, r2_by_band, respond, since_visible
from mnemodyn.data.scans import Scan
from mnemodyn.pretrain.objectives import Masked


def r2_hidden(x, prediction, hidden):
    return 1 - ((x - prediction)[hidden] ** 2).sum() / (x[hidden] ** 2).sum()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 50, 4)).astype(np.float32)
    hidden = Masked(0.4, 6).hide(x.shape, 0).numpy()
    fills = {"half": np.where(hidden, 0.5 * x, x), "zero": np.where(hidden, 0, x)}
    return x, hidden, fills


def test_since_visible_against_a_loop(data):
    _, hidden, _ = data
    found = since_visible(hidden)
    for b, p in np.ndindex(3, 4):
        last = None
        for t in range(50):
            last = t if not hidden[b, t, p] else last
            assert found[b, t, p] == (-1 if last is None else t - last)


def test_r2_by_label_against_r2_of_its_entries(data):
    x, hidden, fills = data
    labels = since_visible(hidden)
    rows = r2_by(x, fills, hidden, labels)
    for row in rows.itertuples():
        these = hidden & (labels == row.label)
        assert row.n == these.sum()
        assert row.value == pytest.approx(r2_hidden(x, fills[row.method], these), abs=1e-6)
    assert set(rows["label"]) == set(labels[hidden & (labels >= 0)].tolist())
    whole = r2_by(x, fills, hidden, np.zeros(1, int)).set_index("method")["value"]
    assert whole.tolist() == pytest.approx([0.75, 0.0])


def test_bands_find_the_frequency_that_is_missing():
    t = np.arange(200) * 0.5
    slow, fast = np.sin(2 * np.pi * 0.05 * t), np.sin(2 * np.pi * 0.5 * t)
    x = np.tile((slow + fast)[None, :, None], (2, 1, 3))
    hidden = np.ones(x.shape, dtype=bool)
    fills = {"slow": x - fast[:, None], "zero": 0 * x}
    rows = r2_by_band(x, fills, hidden, 0.5, [0.0, 0.2, 1.01])
    assert rows["value"].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)
    whole = r2_by_band(x, {"a": 0.9 * x}, hidden, 0.5, [0.0, 1.01])["value"].item()
    assert whole == pytest.approx(r2_hidden(x, 0.9 * x, hidden), abs=1e-6)


def test_readout_finds_what_latents_hold(data):
    x, hidden, _ = data
    latents = x @ np.random.default_rng(1).standard_normal((4, 4))
    readout = LatentReadout(ridges=(10.0, 1e-9)).fit(latents, x, hidden)
    assert readout.ridge == 1e-9
    filled = readout.fill(latents, x, hidden)
    assert np.array_equal(filled[~hidden], x[~hidden])
    np.testing.assert_allclose(filled, x, atol=1e-5)


def test_a_network_sees_nothing_that_is_hidden(data):
    x, hidden, _ = data

    def network(given, t_r, hidden):
        assert not given[hidden].any()
        return SimpleNamespace(reconstruction=torch.full_like(given, 7), latents=2 * given)

    filled, latents = respond(network, x, hidden, 2.0)
    assert (filled[hidden] == 7).all()
    assert np.array_equal(filled[~hidden], x[~hidden])
    np.testing.assert_allclose(latents, 2 * np.where(hidden, 0, x))


def test_the_first_windows_of_every_scan():
    values = np.arange(70.0)[:, None].repeat(2, 1)
    scans = [Scan(name, values.astype(np.float32), 1.0, ("a", "b")) for name in ("one", "two")]
    windows, people = first_windows(scans, [values, 2 * values], 20, 2)
    assert windows.shape == (4, 20, 2)
    assert people == ["one", "one", "two", "two"]
    assert windows[3, 0, 0] == 40
