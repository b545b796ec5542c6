"""From a folder of simulated scans to scores, by the command; and what was planted, found in every cohort."""

import json

import pytest

from mnemodyn.cli import main
from mnemodyn.data.cohorts import load_cohort, shipped
from mnemodyn.data.simulate import simulate_cohort
from mnemodyn.evaluate.downstream import Rows, Task, open_scans, planted, published


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "abide"
    simulate_cohort(
        "abide", folder, n_participants=50, n_parcels=30, n_frames=80, effects={"diagnosis": 6.0}
    )
    return folder


def test_a_command_from_scans_to_scores(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    settings = [
        "--target",
        "diagnosis",
        "--json",
        str(out),
        "--repeats",
        "1",
        "--method",
        "fc",
        "confounds",
    ]
    assert main(["evaluate", "abide", str(folder), *settings]) == 0
    found = json.loads(out.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert found["simulated"] is True
    assert rows["fc"]["balanced_accuracy"]["low"] > 0.5
    assert {"value", "low", "high"} == set(rows["fc"]["auc"])
    assert rows["fc"]["n"] == rows["confounds"]["n"] == found["n"]
    table = out.with_suffix(".folds.csv").read_text().splitlines()
    assert len(table) == 1 + found["n"]
    printed = capsys.readouterr()
    assert printed.out.startswith("fc: balanced_accuracy 0.")
    assert "fold 1" not in printed.err, "progress is for a terminal"


def test_a_folder_in_place_of_the_scores_is_refused_before_the_work(folder, tmp_path, capsys):
    assert main(["evaluate", "abide", str(folder), "--target", "sex", "--json", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder; name the file to write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message", "status"),
    [
        (["--target", "iq"], "--target must be one of diagnosis, sex, age", 2),
        (["--target", "sex", "--method", "magic"], "--method must be among", 2),
        (["--target", "sex", "--method", "model"], "need a checkpoint", 1),
        (["--target", "sex", "--folds", "50"], "fewer than 50 folds", 1),
    ],
)
def test_what_cannot_be_done_is_said(folder, tmp_path, capsys, more, message, status):
    assert (
        main(["evaluate", "abide", str(folder), "--json", str(tmp_path / "o.json"), *more])
        == status
    )
    assert message in capsys.readouterr().err


def test_planted_effects_are_found_in_every_cohort(tmp_path):
    found = {}
    for name in sorted(set(shipped()) - {"bids"}):
        cohort, folder = load_cohort(name), tmp_path / name
        n_frames = max(80, cohort.reader.min_frames)
        truth = simulate_cohort(
            name,
            folder,
            n_participants=50,
            n_parcels=30,
            n_frames=n_frames,
            effects={"sex": 2.0},
            broken=False,
        )
        scans = open_scans(cohort, folder)
        for target in cohort.targets:
            task = Task.of(scans.table, target.name, target.kind)
            effect = planted(Rows(scans, task.rows), task, truth, n_boot=300)
            found[name, target.name] = (
                effect["found"]["low"] <= effect["planted"] <= effect["found"]["high"]
            )
    assert len(found) >= 14
    assert sum(found.values()) >= len(found) - 3, found  # of 95 % intervals, one in twenty misses


def test_published_rows_are_found_by_name(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(
        "study,method,cohort,target,metric,value,sd,source\n"
        "a,X,ADNI,NC vs MCI,accuracy,60.0,3.5,there\na,X,HCP-Aging,age,mse (z-scored),0.9,0.1,there\n"
    )
    assert published(path, "adni", "nc_vs_mci")["value"].tolist() == [60.0]
    assert published(path, "hcp_aging", "age")["sd"].tolist() == [0.1]
    assert published(path, "hbn", "age").empty
