"""From a folder of simulated scans to scores, by the command; and effects that were planted, found."""

import json

import pytest

from mnemodyn.cli import main
from mnemodyn.data.simulate import simulate_cohort
from mnemodyn.results import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "abide"
    simulate_cohort("abide", folder, n_participants=50, n_frames=80, effects={"diagnosis": 6.0})
    return folder


def evaluate(folder, output, *more):
    return main(["evaluate", "abide", str(folder), "-o", str(output), *more])


def test_from_scans_to_scores(folder, tmp_path, capsys):
    out = tmp_path / "out.csv"
    more = ["--target", "diagnosis", "--repeats", "1", "--methods", "fc", "confounds"]
    assert evaluate(folder, out, *more) == 0
    table = read_results(out)
    assert set(table["kind"]) == {"SIMULATED"}
    plain = (table["task"] == "diagnosis") & (table["against"] == "")
    scores = table[plain].set_index(["method", "score"]).sort_index()
    assert scores.loc[("fc", "balanced_accuracy"), "low"] > 0.5
    assert scores.loc[("fc", "auc"), "high"] <= 1
    assert scores.loc[("fc", "auc"), "n"] == scores.loc[("confounds", "auc"), "n"]
    printed = capsys.readouterr()
    assert "diagnosis, fc: balanced_accuracy 0." in printed.out
    assert "fold 5 of 5" in printed.err
    # The same as JSON.
    assert evaluate(folder, out, *more, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == []
    assert len(found["rows"]) == len(table)


def test_a_folder_in_place_of_the_scores_is_refused_before_the_work(folder, tmp_path, capsys):
    assert evaluate(folder, tmp_path, "--target", "sex") == 2
    assert f"{tmp_path} is a folder; name the file to write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message", "status"),
    [
        (["--target", "iq"], "--target must be one of diagnosis, sex, age", 2),
        (["--target", "sex", "--methods", "magic"], "magic", 1),
        (["--target", "sex", "--methods", "model"], "need its checkpoint", 1),
    ],
)
def test_what_cannot_be_done_is_said(folder, tmp_path, capsys, more, message, status):
    assert evaluate(folder, tmp_path / "o.csv", *more) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_why_folds_failed_is_said_once_for_each_method(folder, tmp_path, capsys, monkeypatch):
    fold = {"task": "sex", "repeat": 0, "error": "ValueError: one class"}
    failed = [{**fold, "method": "fc", "fold": i} for i in (2, 3)]
    failed += [{**fold, "method": "confounds", "fold": 1, "error": "other"}]
    monkeypatch.setattr("mnemodyn.evaluate.study.study", lambda *_, **__: ([], failed))
    monkeypatch.setattr("mnemodyn.results.write_results", lambda *_: None)
    assert evaluate(folder, tmp_path / "o.csv", "--target", "sex") == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "FAILED" in line] == [
        "mnemodyn: sex, fc: FAILED in 2 folds, first in fold 2 of repeat 0: ValueError: one class",
        "mnemodyn: sex, confounds: FAILED in 1 folds, first in fold 1 of repeat 0: other",
    ]
