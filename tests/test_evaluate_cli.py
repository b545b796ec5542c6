"""From a folder of simulated scans to scores, by the command."""

import json

import pytest

from mnemodyn.cli import main
from mnemodyn.data.simulate import simulate_cohort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "abide"
    simulate_cohort("abide", folder, n_participants=50, n_parcels=30, n_frames=80, effects={"diagnosis": 6.0})
    return folder


def test_a_command_from_scans_to_scores(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    settings = ["--target", "diagnosis", "--json", str(out), "--repeats", "1", "--method", "fc", "confounds"]
    assert main(["evaluate", "abide", str(folder), *settings]) == 0
    found = json.loads(out.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert found["simulated"] is True
    assert rows["fc"]["balanced_accuracy"]["low"] > 0.5
    assert {"value", "low", "high"} == set(rows["fc"]["auc"])
    assert rows["fc"]["n"] == rows["confounds"]["n"] == found["n"]
    table = out.with_suffix(".folds.csv").read_text().splitlines()
    assert len(table) == 1 + found["n"]
    assert capsys.readouterr().out.startswith("fc: balanced_accuracy 0.")


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
    assert main(["evaluate", "abide", str(folder), "--json", str(tmp_path / "o.json"), *more]) == status
    assert message in capsys.readouterr().err
