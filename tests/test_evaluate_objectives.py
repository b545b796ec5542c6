"""R2 by parcel, distance and band against loops and sums; a read-out of latents that hold the answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mnemodyn.pretrain.objective import Masked

from mnemodyn.evaluate.objectives import LatentReadout, by_setting, r2_by, r2_by_band, since_visible


def r2_hidden(x, prediction, hidden):
    truth = np.where(hidden, x, 0).astype(float)
    return 1 - (np.where(hidden, prediction - truth, 0) ** 2).sum() / (truth**2).sum()


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
        assert row.r2 == pytest.approx(r2_hidden(x, fills[row.method], these), abs=1e-6)
    assert set(rows["label"]) == set(labels[hidden & (labels >= 0)].tolist())
    parcels = r2_by(x, fills, hidden, np.arange(4))
    assert parcels[parcels["method"] == "half"]["r2"].to_numpy() == pytest.approx(0.75)


def test_bands_find_the_frequency_that_is_missing():
    t = np.arange(200) * 0.5
    slow, fast = np.sin(2 * np.pi * 0.05 * t), np.sin(2 * np.pi * 0.5 * t)
    x = np.tile((slow + fast)[None, :, None], (2, 1, 3))
    hidden = np.ones(x.shape, dtype=bool)
    rows = r2_by_band(x, {"slow": x - fast[:, None], "zero": 0 * x}, hidden, 0.5, [0.0, 0.2, 1.01])
    assert rows["r2"].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)
    whole = r2_by_band(x, {"a": 0.9 * x}, hidden, 0.5, [0.0, 1.01])["r2"].item()
    assert whole == pytest.approx(r2_hidden(x, 0.9 * x, hidden), abs=1e-6)


def test_readout_finds_what_latents_hold(data):
    x, hidden, _ = data
    mixing = np.random.default_rng(1).standard_normal((4, 4))

    def network(given, t_r, hidden):  # latents that know everything, though they are given nothing
        return SimpleNamespace(latents=torch.as_tensor(next(truth) @ mixing)[None])

    readout = LatentReadout(SimpleNamespace(model=network), 2.0, ridges=(10.0, 1e-9))
    truth = iter(x)
    readout.fit(x, hidden)
    truth = iter(x)
    assert readout.ridge == 1e-9
    filled = readout.fill(x, hidden)
    assert np.array_equal(filled[~hidden], x[~hidden])
    np.testing.assert_allclose(filled, x, atol=1e-5)


def test_settings_are_scored_on_their_own_masks(data):
    x, _, _ = data
    half = SimpleNamespace(fill=lambda x, hidden: np.where(hidden, x / 2, x))
    rows = by_setting({"half": half}, x, shares=[0.2, 0.6], mask_windows=[3, 5], t_r=2.0, seed=0)
    assert rows["r2"].tolist() == pytest.approx([0.75] * 4)
    assert rows["seconds"].tolist() == [6.0, 10.0, 6.0, 10.0]
