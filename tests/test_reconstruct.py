"""Reconstruction: what is hidden and scored, how scans are filled, and the intervals."""

import numpy as np
import pytest
import torch

from benchmarks.transformer import PatchTransformer
from mnemodyn.checkpoint import Checkpoint, CheckpointError
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.evaluate.baselines import Zero
from mnemodyn.evaluate.reconstruction import (
    FrontEnd,
    HiddenScan,
    Network,
    compare,
    fill,
    held_out,
    hide,
    r2,
    squares,
    sums,
)
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig

PARCELS = tuple("abcdef")
MASKS = {"hidden_share": 0.5, "mask_window": 4, "seed": 3}
CONFIG = ModelConfig(
    n_parcels=6, n_timepoints=16, n_channels=6, input_width=4, field_rank=2, n_levels=2
)


def scan(person, n_frames=40, constant=None, censored=None):
    rng = np.random.default_rng(sum(map(ord, person)))
    values = rng.standard_normal((n_frames, 6)).cumsum(0).astype(np.float32)
    if constant is not None:
        values[:, constant] = 1
    if censored is not None:
        censored = np.isin(np.arange(n_frames), censored)
    return Scan(person, values, 2.0, PARCELS, source=person, censored=censored)


class Recorded(Zero):
    """Fills in a number, and remembers what it was given."""

    def __init__(self, number):
        self.number, self.given = number, []

    def fill(self, x, hidden, t_r=None):
        self.given.append((x, hidden, t_r))
        return np.where(hidden, self.number, x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MnemoDyn(CONFIG).eval()


def test_constant_parcels_and_censored_frames_are_hidden_and_not_scored():
    scans = [scan("a"), scan("b", constant=3), scan("c", censored=[0, 1, 30])]
    plain, constant, censored = hide(scans, Scaling(), **MASKS)
    np.testing.assert_array_equal(plain.hidden, plain.scored)
    assert (plain.hidden.sum(0) == 20).all()
    assert constant.hidden[:, 3].all()
    assert not constant.scored[:, 3].any()
    assert censored.hidden[[0, 1, 30]].all()
    assert not censored.scored[[0, 1, 30]].any()
    # The mask of a scan follows from the seed and its number alone.
    again = hide(scans[1:2], Scaling(), **{**MASKS, "seed": 4}, people=["family"])[0]
    np.testing.assert_array_equal(again.scored, constant.scored)
    assert (constant.person, again.person) == ("b", "family")


def test_whole_scans_and_windows_are_filled_everywhere():
    scans = hide([scan("a"), scan("b", 40), scan("c", 10)], Scaling(), **MASKS)
    method = Recorded(9)
    whole = fill(method, scans)
    assert sorted(x.shape for x, _, _ in method.given) == [(1, 10, 6), (2, 40, 6)]
    assert {t_r for _, _, t_r in method.given} == {2.0}
    method.given.clear()
    pieces = fill(method, scans, window=16)
    # Frames 0 to 15, 16 to 31 and 24 to 39 of either long scan; the short one as it is.
    assert sorted(x.shape for x, _, _ in method.given) == [(1, 10, 6), (6, 16, 6)]
    x = next(x for x, _, _ in method.given if len(x) == 6)
    np.testing.assert_array_equal(x[2], scans[0].values[24:])
    for one, by_windows, by_scan in zip(scans, pieces, whole, strict=True):
        expected = np.where(one.hidden, 9, one.values)
        np.testing.assert_array_equal(by_windows, expected)
        np.testing.assert_array_equal(by_scan, expected)


def test_sums_follow_their_definition_stretch_by_stretch():
    scans = hide([scan("a"), scan("b", constant=3)], Scaling(), **MASKS)
    residual, total, people = sums(scans, fill(Recorded(9), scans), 16)
    assert people.tolist() == ["a", "a", "b", "b"]
    for row, (one, half) in enumerate((s, half) for s in scans for half in (0, 1)):
        frames = slice(20 * half, 20 * half + 20)
        values = one.values[frames][one.scored[frames]].astype(float)
        assert total[row] == pytest.approx((values**2).sum())
        assert residual[row] == pytest.approx(((values - 9) ** 2).sum())
    assert r2(Recorded(9), scans) == pytest.approx(1 - residual.sum() / total.sum())
    assert r2(Zero(), scans) == 0


def test_what_stands_at_entries_that_are_not_scored_counts_for_nothing():
    (one,) = hide([scan("a")], Scaling(), **MASKS)
    spoilt = np.where(one.scored, 1.0, np.nan)
    error, power = squares(one, spoilt)
    assert np.isfinite(error).all()
    assert not power[~one.scored].any()


def test_windows_and_whole_scans_are_what_the_network_makes_of_them(model):
    scans = hide([scan("a", 64), scan("b", 64)], Scaling(), **MASKS)
    whole, pieces = (fill(Network(model), scans, window=window) for window in (0, 16))
    for one, by_scan, by_windows in zip(scans, whole, pieces, strict=True):
        x, hidden = torch.from_numpy(one.values), torch.from_numpy(one.hidden)
        with torch.no_grad():
            once = model(x[None], 2.0, hidden=hidden[None]).reconstruction[0]
            cut = model(x.view(4, 16, 6), 2.0, hidden=hidden.view(4, 16, 6)).reconstruction
        for found, made in ((by_scan, once), (by_windows, cut.view(64, 6))):
            expected = torch.where(hidden, made, x)
            torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


def test_networks_read_what_is_visible_only(model):
    (one,) = hide([scan("a", 16)], Scaling(), **MASKS)
    spoilt = HiddenScan(
        one.person, np.where(one.hidden, np.float32(1e6), one.values), 2.0, one.hidden, one.scored
    )
    rival = PatchTransformer(6, 16, width=16, n_layers=1).eval()
    with_front = MnemoDyn(ModelConfig(**{**CONFIG.to_dict(), "front": "gaussian"}))
    front = with_front.fit_front([one.values]).front
    for method in (Network(model), Network(rival), FrontEnd(front)):
        filled, again = fill(method, [one])[0], fill(method, [spoilt])[0]
        assert np.isfinite(again).all()
        np.testing.assert_allclose(again, filled, atol=1e-6)
        np.testing.assert_array_equal(filled[~one.hidden], one.values[~one.hidden])


def test_a_network_is_told_which_frames_are_missing(model):
    (one,) = hide([scan("a", 32, censored=[4, 5, 20])], Scaling(), **MASKS)
    assert np.isnan(one.values[[4, 5, 20]]).all()
    x, hidden = torch.from_numpy(one.values)[None], torch.from_numpy(one.scored)[None]
    with torch.no_grad():
        expected = model(x, 2.0, hidden=hidden).reconstruction[0].numpy()
    filled = fill(Network(model), [one])[0]
    np.testing.assert_allclose(filled[one.hidden], expected[one.hidden], atol=1e-6)
    assert np.isfinite(filled).all()
    assert np.isfinite(fill(Zero(), [one])[0]).all()


def row_of(rows, method, against=None):
    return next(r for r in rows if (r["method"], r.get("against")) == (method, against))


def test_intervals_resample_people_stretches_and_seeds():
    rng = np.random.default_rng(0)
    people = np.repeat([f"{i:02}" for i in range(30)], 2)
    total = np.full(60, 10.0)
    person = np.repeat(rng.normal(0, 1, 30), 2)
    model, other = 4 + rng.normal(0, 0.1, (3, 60)) + person, np.full(60, 5.0)
    rows = compare({"model": model, "other": other}, total, people, data="test")
    found = row_of(rows, "model", "other")
    assert found["n"] == 30
    assert found["value"] == pytest.approx((5 - model.mean()) / 10)
    # Almost all of the spread is between people: the textbook's standard error of their mean.
    width = 2 * 1.96 * person[::2].std() / 10 / 30**0.5
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.15)
    assert row_of(rows, "model")["value"] == pytest.approx(1 - model.mean() / 10)
    # Nothing but the seeds differs.
    seeds = np.repeat(np.array([[3.0], [4.0], [5.0]]), 60, axis=1)
    rows = compare({"model": seeds, "other": other}, total, people, data="test")
    spread = row_of(rows, "model", "other")
    assert spread["value"] == pytest.approx(0.1)
    assert spread["low"] < 0.05
    assert spread["high"] > 0.15


def test_stretches_of_one_person_are_resampled():
    residual = np.array([1.0, 9.0, 5.0, 5.0, 2.0, 8.0])
    people = np.array(["a"] * 6)
    total = np.full(6, 10.0)
    (row,) = compare({"model": residual}, total, people, data="test", n_boot=5000)
    rng = np.random.default_rng(1)
    looped = [1 - residual[rng.integers(0, 6, 6)].sum() / 60 for _ in range(5000)]
    low, high = np.quantile(looped, [0.025, 0.975])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.02)


def test_differences_are_paired():
    rng = np.random.default_rng(7)
    total = rng.uniform(50, 150, 20)
    other = total * rng.uniform(0.1, 0.9, 20)
    people = np.array([str(i) for i in range(20)])
    rows = compare({"model": other - 0.05 * total, "other": other}, total, people, data="test")
    found = row_of(rows, "model", "other")
    for end in ("value", "low", "high"):
        assert found[end] == pytest.approx(0.05)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    people = np.array([str(i) for i in range(40)])
    covered = 0
    for seed in range(200):
        total = rng.uniform(80, 120, 40)
        residual = total * rng.uniform(0.2, 0.8, 40)
        settings = {"data": "test", "n_boot": 300, "seed": seed}
        (row,) = compare({"model": residual}, total, people, **settings)
        covered += row["low"] < 0.5 < row["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_scans_of_people_that_a_checkpoint_knows_are_told_from_others(model):
    training = {"train_participants": ["a", "b"], "validation_participants": ["c"]}
    checkpoint = Checkpoint(model, PARCELS, 2.0, Scaling(), None, training)
    scans = [scan(person) for person in "dacb"]
    known, test = held_out(checkpoint, scans)
    assert [s.participant_id for s in known] == ["a", "c", "b"]
    assert [s.participant_id for s in test] == ["d"]
    with pytest.raises(DataError, match="3 participants and of others, got 3 and 0"):
        held_out(checkpoint, scans[1:])
    other = Scan("e", scans[0].values[:, ::-1].copy(), 2.0, PARCELS[::-1])
    with pytest.raises(CheckpointError):
        held_out(checkpoint, [other])
