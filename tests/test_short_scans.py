"""Prediction from cut scans: features against the front end, what test people may not teach, and the page."""

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from test_downstream import cohort

from lib import short_scans
from mnemodyn.data.scans import Collection
from mnemodyn.evaluate.methods import Features, connectivity, frames, residual_kernel
from mnemodyn.evaluate.study import Task
from mnemodyn.model.front import Front
from mnemodyn.results import read_results, write_results
from mnemodyn.splits import repeated_folds


@pytest.fixture(scope="module")
def scans():
    found, table = cohort(60, effect=1.2, frames=80)
    return Collection(found, table, name="MINE", simulated=True)


def test_scans_are_cut_to_their_first_frames(scans):
    cut = short_scans.CutScans(scans, 30)
    assert len(cut) == 60
    np.testing.assert_array_equal(cut[3].values, scans[3].values[:30])
    assert cut[3].participant_id == scans[3].participant_id
    for more in (0, 500):
        np.testing.assert_array_equal(short_scans.CutScans(scans, more)[3].values, scans[3].values)


def test_adapted_features_are_those_of_the_front_end(scans):
    cut = short_scans.CutScans(scans, 40)
    train = np.arange(50)
    windows = [frames(scan) for scan in cut]
    front = Front(8, lags=0, shrinkage=0.05, weight=200.0, steps=1).fit([windows[i] for i in train])
    x = torch.tensor(np.array(windows))
    expected = front.connectivity(x, torch.zeros_like(x, dtype=torch.bool)).flatten(1).numpy()
    rows = short_scans.products(cut)
    found = short_scans.AdaptedTangent().fit(rows[train]).transform(rows)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_group_is_weighted_by_frames():
    found, _ = cohort(4)
    short = short_scans.CutScans(found[:2], 20)
    rows = short_scans.products([*short, *found[2:]])
    together = np.concatenate([frames(scan) for scan in (*short, *found[2:])]).astype(float)
    fitted = short_scans.AdaptedTangent(shrinkage=0.0).fit(rows)
    np.testing.assert_allclose(fitted.group_, together.T @ together / len(together), atol=1e-5)


@pytest.mark.parametrize("name", short_scans.FEATURES)
def test_a_test_scan_changes_no_other_one_s_kernel(scans, name):
    cut = list(short_scans.CutScans(scans, 30))
    train = np.arange(10, 60)
    first = residual_kernel(short_scans.FEATURES[name](cut).kernel(train), train)
    cut[0] = cut[1]
    second = residual_kernel(short_scans.FEATURES[name](cut).kernel(train), train)
    np.testing.assert_allclose(first[1:, 1:], second[1:, 1:], rtol=1e-3, atol=1e-5)
    assert not np.allclose(first[0], second[0], rtol=1e-2)


def test_a_kernel_is_computed_once_a_fold_and_is_that_of_features(scans, monkeypatch):
    values = connectivity(scans)
    shared = short_scans.Shared(values)
    train = np.arange(40)
    first = shared.kernel(train)
    np.testing.assert_array_equal(first, Features(values).kernel(train))
    monkeypatch.setattr(Features, "kernel", lambda *_: pytest.fail("computed again"))
    assert shared.kernel(train) is first


def test_more_frames_predict_better_and_lengths_share_people(scans, tmp_path):
    folds = repeated_folds(scans.table, "age", n_repeats=1)
    rows = short_scans.predictions(scans, {"age": "regression"}, [8, 0], folds, n_boot=50)
    write_results(tmp_path / "results.csv", rows)
    assert {row["n"] for row in rows if "mean FD" not in row["task"]} == {60}
    shown = short_scans.by_length(rows, "age", "r")
    assert list(shown["frames"]) == ["8"] * 3 + ["whole"] * 3
    value = shown.set_index(["method", "frames"])["value"]
    for method in short_scans.FEATURES:
        assert value[method, "whole"] > value[method, "8"]


def test_confounds_that_do_not_vary_are_not_tried(scans):
    folds = repeated_folds(scans.table, "age", n_repeats=1)
    table = scans.table.assign(n_frames=(200 - scans.table["age"]).round())
    known = ["participant_id", "age", "n_frames"]
    for columns, methods, r in ((known, 2, 0.99), (known[:2], 0, 0.0)):
        some = Collection(
            list(scans), table[columns].assign(n_frames=table["n_frames"] if r else 80)
        )
        rows = short_scans.confounds_alone(some, {"age": "regression"}, folds, n_boot=20)
        found = [row["value"] for row in rows if row["score"] == "r"]
        assert len(found) == methods
        assert all(value > r for value in found)


def test_people_without_a_target_are_left_out_of_all(scans):
    table = scans.table.assign(diagnosis=scans.table["diagnosis"].where(scans.table.index > 4))
    some = short_scans.with_all(Collection(list(scans), table), ["diagnosis", "age"])
    assert len(some) == 55
    for target, kind in (("diagnosis", "classification"), ("age", "regression")):
        assert len(Task.of(some.table, target, kind).y) == 55


def test_the_page_runs(tmp_path, scans, capsys):
    """A SIMULATED cohort on disk, described by a YAML file, with its repetition time given by hand."""
    data = tmp_path / "data"
    for i, scan in enumerate(scans):
        place = data / f"{scan.participant_id}_timeseries.tsv"
        place.parent.mkdir(exist_ok=True)
        values = scan.values[: 60 + i % 20]
        pd.DataFrame(values, columns=scan.parcels).to_csv(place, sep="\t", index=False)
    scans.table[["participant_id", "age"]].to_csv(data / "participants.tsv", sep="\t", index=False)
    (data / "simulated.json").write_text("{}")
    given = {
        "data": str(data),
        "cohort": "notebooks/lifespan.yaml",
        "t_r": 3.0,
        "lengths": [20, 0],
        "n_boot": 20,
        "results": str(tmp_path / "page.csv"),
    }
    found = {}
    for cell in nbformat.read("notebooks/short_scans.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, found)
        if "parameters" in cell.metadata.get("tags", []):
            assert set(given) <= set(found)
            found.update(given)
    table = read_results(tmp_path / "page.csv")
    assert set(table["kind"]) == {"SIMULATED"}
    assert {"age, 20 frames", "age, whole scans", "age, no frame read"} <= set(table["task"])
    assert "SIMULATED" in found["shown_name"]
    assert "folds" in capsys.readouterr().out
