"""The study of reconstruction: its split, its windows and its intervals."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.reconstruct import SAME_PERSON, SETTINGS, Series, Windows, interval, read, read_abide, split

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
    windows = Windows.consecutive([scan("a"), scan("b", constant=3)], SETTING, seed=0)
    assert windows.x.shape == (4, 16, 6)
    assert windows.people.tolist() == ["a", "a", "b", "b"]
    assert windows.hidden[2:, :, 3].all()
    assert not windows.scored[2:, :, 3].any()
    assert np.array_equal(windows.hidden[:2], windows.scored[:2])
    assert windows.r2(np.where(windows.scored, windows.x, 99)) == 1


def test_whole_scans_are_joined_and_cut_again():
    windows = Windows.consecutive([scan("a"), scan("b")], SETTING, seed=0)
    seen = []
    back = windows.whole(lambda long: seen.append(long) or long.x)
    assert [w.x.shape for w in seen] == [(1, 32, 6)] * 2
    np.testing.assert_array_equal(seen[1].x[0], scan("b").values[:32])
    np.testing.assert_array_equal(back, windows.x)


def test_interval_resamples_people_windows_and_seeds():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(30), 2)
    total = np.full(60, 10.0)
    person = np.repeat(rng.normal(0, 1, 30), 2)
    model, other = 4 + rng.normal(0, 0.1, (3, 60)) + person, np.full((1, 60), 5.0)
    found = interval(model, other, total, people)
    assert found["value"] == pytest.approx((5 - model.mean()) / 10, abs=1e-5)
    # Almost all of the spread is between people: the textbook's standard error of their mean.
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * person[::2].std() / 10 / 30**0.5, rel=0.15)
    assert interval(model, model, total, people) == {"value": 0.0, "low": 0.0, "high": 0.0}
    seeds = np.repeat(np.array([[3.0], [4.0], [5.0]]), 60, axis=1)
    spread = interval(seeds, other, total, people)
    assert spread["value"] == 0.1
    assert spread["low"] < 0.05
    assert spread["high"] > 0.15


def test_abide_is_read_with_its_faults(tmp_path):
    rng = np.random.default_rng(0)
    names = ["NYU_0050001", "MaxMun_a_0050002", *SAME_PERSON, *SAME_PERSON.values(), "Leuven_1_0050003", "USM_0050004"]
    for i, name in enumerate(names):
        values = rng.standard_normal((8 if i == 0 else 20, 30))
        values[:, : {6: 3, 7: 11}.get(i, 0)] = 5.0
        np.savetxt(tmp_path / f"{name}_rois_cc200.1D", values, delimiter="\t", header="\t".join("p" * 30))
    (tmp_path / "Phenotypic.csv").write_text("FILE_ID,DX_GROUP\nMaxMun_a_0050002,1\n")
    series, left_out = read_abide(tmp_path, 16)
    assert left_out == {"constant-parcels": 1, "too-short": 1}
    found = {s.participant: s for s in series}
    assert len(series) == 6
    assert len(found) == 4
    assert found["MaxMun_a_0050002"].t_r == 3.0
    assert found["MaxMun_a_0050002"].stratum == "MaxMun_a 1"
    flat = found["Leuven_1_0050003"]
    assert flat.t_r == 1.66
    assert flat.constant.sum() == 3
    assert not flat.values[:, :3].any()
    assert flat.values[:, 3:].std(0) == pytest.approx(1, abs=1e-5)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="ABIDE=FOLDER or MNEMODYN_DATA"):
        read("abide", SETTING, None)
    with pytest.raises(FileNotFoundError, match="found 0 and 0"):
        read_abide(tmp_path, 16)
