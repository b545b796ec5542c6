"""The study of reconstruction: its split, its windows and its intervals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.reconstruct import (
    SETTINGS,
    Hidden,
    Series,
    _filled,
    config_of,
    fit,
    fresh,
    interval,
    read,
    split,
    transformer_like,
    validate,
)
from mnemodyn.data.simulate import simulate_cohort
from mnemodyn.model.network import MnemoDyn

SETTING = replace(SETTINGS["abide"], n_timepoints=16)


def scan(person: str, stratum: str = "", n_frames: int = 40, constant: int | None = None) -> Series:
    rng = np.random.default_rng(sum(map(ord, person)))
    values = rng.standard_normal((n_frames, 6)).astype(np.float32)
    flat = np.zeros(6, bool)
    if constant is not None:
        values[:, constant], flat[constant] = 0, True
    return Series(person, values, 2.0, flat, stratum)


def test_split_takes_a_tenth_of_every_stratum_and_keeps_people_whole():
    series = [scan(f"{s}{i:03}", s) for s in "abc" for i in range(40)] + [scan("a000", "a")]
    sides = split(series)
    people = {name: {s.participant for s in side} for name, side in sides.items()}
    assert sum(map(len, sides.values())) == len(series)
    assert not people["train"] & people["test"]
    assert not people["validation"] & (people["train"] | people["test"])
    for stratum in "abc":
        assert [sum(p[0] == stratum for p in people[n]) for n in ("test", "validation")] == [4, 2]
    again = split(series[::-1])
    assert {s.participant for s in again["test"]} == people["test"]


def test_constant_parcels_are_hidden_and_not_scored():
    held = Hidden.of([scan("a"), scan("b", constant=3)], SETTING, seed=0)
    given = []

    def fill(x, hidden, t_r):
        given.append(hidden)
        assert t_r == 2.0
        return np.where(hidden, 99, x)

    filled = held.fill(fill)
    assert [h.shape for h in given] == [(1, 40, 6)] * 2
    assert given[1][..., 3].all()
    assert held.people.tolist() == ["a", "a", "b", "b"]
    residual, total = held.sums(filled)
    hidden = [mask & ~s.constant for s, mask in zip(held.series, held.masks, strict=True)]
    for row, (s, h, half) in enumerate(
        (s, h, half) for s, h in zip(held.series, hidden, strict=True) for half in (0, 1)
    ):
        part = h.copy()
        part[20:] &= half == 1
        part[:20] &= half == 0
        np.testing.assert_allclose(total[row], (s.values[part].astype(float) ** 2).sum(), rtol=1e-5)
        np.testing.assert_allclose(
            residual[row], ((s.values[part].astype(float) - 99) ** 2).sum(), rtol=1e-5
        )
    truth = iter([s.values for s in held.series])
    assert held.r2(lambda x, hidden, t_r: next(truth)[None]) == 1


def test_windows_cover_every_frame_and_the_last_ends_with_the_scan():
    held, given = Hidden.of([scan("a", n_frames=40)], SETTING, seed=0), []
    filled = held.fill(lambda x, hidden, t_r: given.append(x) or x, whole=False)
    assert [x.shape for x in given] == [(1, 16, 6)] * 3
    np.testing.assert_array_equal(given[2][0], scan("a").values[24:])
    np.testing.assert_array_equal(filled[0], scan("a").values)


def test_networks_read_what_is_visible_only():
    """Where all parcels are one signal, training beats zero; what stands at hidden entries, NaN too, is not read."""
    setting = replace(SETTING, steps=200, batch_size=8)
    values = np.repeat(np.random.default_rng(0).standard_normal((60, 1)), 6, axis=1).astype(
        np.float32
    )
    series = [Series("a", values, 2.0, np.zeros(6, bool))]
    validation = next(fresh(series, setting, 1, 8))
    for network in (MnemoDyn(config_of(setting, 6, None)), transformer_like(setting, 6, 20_000)):
        curve = fit(network, fresh(series, setting, 0), validation, 200, 1e-2, lambda text: None)
        assert list(curve) == list(range(0, 201, 20))
        assert max(curve.values()) > 0.1
        assert validate(network, validation) == pytest.approx(max(curve.values()))
        x = torch.where(validation["hidden"], torch.nan, validation["x"])
        assert torch.isfinite(_filled(network(x, 2.0, hidden=validation["hidden"]))).all()


def test_interval_resamples_people_windows_and_seeds():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(30), 2)
    total = np.full(60, 10.0)
    person = np.repeat(rng.normal(0, 1, 30), 2)
    model, other = 4 + rng.normal(0, 0.1, (3, 60)) + person, np.full((1, 60), 5.0)
    found = interval(model, other, total, people)
    assert found["value"] == pytest.approx((5 - model.mean()) / 10, abs=1e-5)
    # Almost all of the spread is between people: the textbook's standard error of their mean.
    assert found["high"] - found["low"] == pytest.approx(
        2 * 1.96 * person[::2].std() / 10 / 30**0.5, rel=0.15
    )
    assert interval(model, model, total, people) == {"value": 0.0, "low": 0.0, "high": 0.0}
    seeds = np.repeat(np.array([[3.0], [4.0], [5.0]]), 60, axis=1)
    spread = interval(seeds, other, total, people)
    assert spread["value"] == 0.1
    assert spread["low"] < 0.05
    assert spread["high"] > 0.15


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="ABIDE=FOLDER or MNEMODYN_DATA"):
        read("abide", SETTING, None)


def test_abide_is_read_with_its_faults(tmp_path):
    simulate_cohort("abide", tmp_path, n_participants=8, seed=0, n_parcels=30)
    series, left_out = read("abide", SETTING, tmp_path)
    assert len(series) + sum(left_out.values()) >= 8
    for s in series:
        assert s.values.std(0)[~s.constant] == pytest.approx(1, abs=1e-4)
        assert not s.values[:, s.constant].any()
        assert 1 < s.t_r <= 3
        assert len(s.stratum.split()) == 2
