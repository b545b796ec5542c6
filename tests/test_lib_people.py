"""What the pages about people compute: controls at chance, few labels, other cohorts, planted effects, habits."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_downstream import cohort

from lib import protocol
from lib.cohorts import (
    NoiseScans,
    control,
    controls,
    few_shot,
    files_of,
    permuted,
    planned,
    planted,
    published,
    transfer,
)
from lib.finetune import FineTuning
from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.cohorts import load_cohort
from mnemodyn.data.collection import Collection, open_scans
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.data.simulate import simulate_cohort
from mnemodyn.evaluate.methods import METHODS, Features, Split, connectivity
from mnemodyn.evaluate.study import Task, evaluate, fold_scores, report
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig
from mnemodyn.splits import inner_splits, repeated_folds


@pytest.mark.parametrize(
    ("condition", "target", "kind", "guess"),
    [
        ("permuted", "diagnosis", "classification", 0.5),
        ("noise", "age", "regression", 0.0),
        ("noise_equal", "age", "regression", 0.0),
    ],
)
def test_controls_are_at_chance_on_average(condition, target, kind, guess):
    scans, table = cohort(60, effect=1.5)
    task = Task.of(table, target, kind)
    folds = repeated_folds(task.table, target, n_repeats=1)
    (found,) = control(condition, scans, task, folds, {"fc": 5})
    assert found["n"] == 5
    assert found["low"] < guess < found["high"] or found["p"] < 0.05
    assert abs(found["value"] - guess) < 0.2
    if condition == "permuted":
        # The mean over draws is the mean over folds of each.
        first = evaluate(scans, permuted(task, 0), folds, ["fc"])
        (one,) = control(condition, scans, task, folds, {"fc": 1})
        assert one["value"] == pytest.approx(np.nanmean(fold_scores(first, "fc")))


def test_controls_do_not_depend_on_what_else_is_asked():
    scans, table = cohort(40)
    collection = Collection(scans, table, name="MINE", simulated=True)
    draws = {"permuted": {"fc": 2}, "noise_equal": {"fc": 2}}
    both = controls(collection, {"diagnosis": "classification", "age": "regression"}, draws)
    alone = controls(collection, {"age": "regression"}, draws)
    assert both[2:] == alone
    assert both[0]["task"] == "diagnosis, labels shuffled"
    assert both[0]["kind"] == "SIMULATED"


def test_equal_noise_hides_the_length_and_the_repetition_time():
    scans, _ = cohort(4)
    scans[0] = Scan(
        "sub-0", scans[0].values[:30], 3.0, scans[0].parcels, censored=np.arange(30) < 5
    )
    plain = NoiseScans(scans, 0)
    equal = NoiseScans(scans, 0, equal=True)
    assert [(s.n_frames, s.t_r) for s in plain] == [(30, 3.0), *[(60, 2.0)] * 3]
    assert {(s.n_frames, s.t_r, s.censored is None) for s in equal} == {(30, 2.0, True)}
    np.testing.assert_array_equal(equal[3].values, plain[3].values[:30])
    assert not np.array_equal(equal[3].values, scans[3].values[:30])


def test_more_labels_and_other_cohorts():
    scans, table = cohort(120, effect=1.5)
    others, other_table = cohort(80, effect=1.5, seed=1)
    source = Task.of(table, "diagnosis", "classification")
    target = Task.of(other_table, "diagnosis", "classification")
    folds = repeated_folds(source.table, "diagnosis", n_repeats=1)
    rows = few_shot({"fc": Features(connectivity(scans))}, source, folds, (1, 20, 500))
    assert rows["shots"].tolist() == [1, 20]
    assert rows["value"][1] > rows["value"][0]
    found = transfer(scans, source, others, target)
    assert found["balanced_accuracy"]["low"] > 0.6


@pytest.mark.parametrize("name", ["adni", "ukb"])
def test_planted_effects_are_found(name, tmp_path):
    n_frames = max(80, load_cohort(name).reader.min_frames)
    truth = simulate_cohort(
        name,
        tmp_path / name,
        n_participants=50,
        n_frames=n_frames,
        effects={"sex": 2.0},
        broken=False,
    )
    scans = open_scans(tmp_path / name, cohort=name)
    for target in load_cohort(name).targets:
        task = Task.of(scans.table, target.name, target.kind)
        effect = planted(task.select(scans), task, truth)
        width = effect["high"] - effect["low"]
        assert effect["low"] - width / 2 <= effect["planted"] <= effect["high"] + width / 2


def test_the_plan_of_a_cohort_has_its_targets_classes_sites_and_confounds():
    table = pd.DataFrame(
        {
            "participant_id": list("abcdefgh"),
            "site": ["NYU", "KKI"] * 4,
            "age": np.arange(8.0),
            "sex": ["male", "female"] * 4,
            "diagnosis": ["autism", "control"] * 4,
            "mean_fd": np.nan,
            "n_frames": 176,
        }
    )
    abide = load_cohort("abide")
    plan = {row["target"]: row for row in planned(abide, table)}
    assert list(plan) == ["diagnosis", "sex", "age"]
    assert plan["diagnosis"]["kind"] == "autism or control"
    assert plan["age"]["kind"] == "a number, years"
    assert plan["diagnosis"]["confounds"] == "age, sex, site, length"
    assert plan["sex"]["confounds"] == "age, site, length"
    assert plan["age"]["tested on"] == "five folds of people; each site left out"
    one_site = {row["target"]: row for row in planned(abide, table.assign(site="NYU"))}
    assert one_site["age"]["tested on"] == "five folds of people"
    assert one_site["age"]["confounds"] == "sex, length"
    in_months = load_cohort("hcp_aging")
    in_months = in_months.model_copy(update={"targets": in_months.targets[:1]})
    (months,) = planned(in_months, table)
    assert months["kind"] == "a number, years", "the index has converted them"


def test_the_files_of_a_cohort_are_its_patterns_its_table_and_the_command():
    adni = load_cohort("adni")
    said = files_of(adni)
    assert said.startswith("**ADNI.** ADNI, several scans a participant.")
    assert "The table `adni.csv` is matched by `subjectIdentifier` and `imageUID`" in said
    block = said.split("```text\n")[1].split("\n```")[0].split("\n")
    assert block == [*adni.scans, "adni.csv"]
    assert "make book DATA=FOLDER COHORT=adni" in said


def test_published_rows_are_found_by_name(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(
        "study,method,cohort,target,metric,value,sd,source\n"
        "a,X,ADNI,NC vs MCI,accuracy,60.0,3.5,there\n"
        "a,X,HCP-Aging,age,mse (z-scored),0.9,0.1,there\n"
    )
    assert published(path, "adni", "nc_vs_mci")["value"].tolist() == [60.0]
    assert published(path, "hcp_aging", "age")["sd"].tolist() == [0.1]
    assert published(path, "hbn", "age").empty


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=8, n_timepoints=32, n_blocks=1, n_channels=6, input_width=6, n_levels=2
    )
    parcels = tuple(f"p{i}" for i in range(8))
    return Checkpoint(MnemoDyn(config).eval(), parcels, 2.0, Scaling(), "none", {})


def test_fine_tuning_learns_and_makes_nothing_of_noise(checkpoint):
    scans, table = cohort(120, frames=64)
    y = (table["diagnosis"] == "patients").to_numpy(float)
    train, test = np.arange(80), np.arange(80, 120)
    people = table["participant_id"].to_numpy()
    inner = inner_splits(y[train], people[train], 3, 0)
    split = Split(train, test, y[train], "classification", inner, seed=1)
    # Every other frame of a patient is louder.
    louder = []
    for scan, label in zip(scans, y, strict=True):
        gain = np.where(np.arange(64) % 2, 1 + 3 * label, 1)[:, None].astype(np.float32)
        louder.append(Scan(scan.participant_id, scan.values * gain, 2.0, scan.parcels))
    weights = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    for data, low, high in ((louder, 0.75, 1.0), (scans, 0.3, 0.7)):
        prediction, chosen = FineTuning(checkpoint, data, "all").fit_predict(split)
        assert low <= roc_auc_score(y[test], prediction) <= high
        assert chosen.endswith("of 5")
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(value, weights[name]), "the checkpoint itself stays as it is"


@pytest.mark.parametrize("what", ["draft", "last"])
def test_fine_tuning_is_a_method_of_the_evaluation(what, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("lib.finetune.EPOCHS", {"draft": 1, "last": 1})
    scans, table = cohort(30)
    task = Task.of(table, "diagnosis", "classification")
    if what == "last":
        task = Task.of(table, "age", "regression")
    folds = repeated_folds(task.table, task.target, n_folds=2, n_repeats=1)
    methods = {"fc": METHODS["fc"], "finetune_last": FineTuning(checkpoint, scans, what)}
    found = evaluate(scans, task, folds, methods, cache=tmp_path)
    assert found.failed == []
    rows = report(found, data="MINE", n_boot=20)
    assert {row["method"] for row in rows} == {"fc", "finetune_last"}
    again = evaluate(scans, task, folds, methods, cache=tmp_path)
    np.testing.assert_array_equal(
        found.predictions["finetune_last"], again.predictions["finetune_last"]
    )


def test_habits_make_accuracy_from_noise_and_the_protocol_does_not():
    values, task = protocol.noise_task(120, 2, 60, share=0.25, seed=0)
    rows = protocol.habits(values, task, n_splits=5, epochs=8, seed=0).set_index("protocol")
    ours = rows.loc[protocol.OURS]
    assert abs(ours["balanced_accuracy"] - 0.5) < 0.1
    assert ours["known"] == 0
    by_file = rows.loc["split by file"]
    assert by_file["balanced_accuracy"] > ours["balanced_accuracy"] + 0.05
    assert by_file["known"] > 0.8
    oversampled = rows.loc["oversampled before the split"]
    assert oversampled["accuracy"] > 0.7
    assert rows.loc["best epoch on the test set", "accuracy"] > ours["accuracy"]
    assert rows.loc["all three", "accuracy"] >= oversampled["accuracy"] - 0.02


def test_noise_has_no_more_in_it_than_is_said():
    values, task = protocol.noise_task(400, 2, 50, share=0.3, seed=1)
    assert task.y.mean() == pytest.approx(0.7)
    assert values.var() == pytest.approx(1, abs=0.05)
    halves = [values[i::2].ravel() for i in (0, 1)]
    assert np.corrcoef(halves)[0, 1] == pytest.approx(0.5, abs=0.03)


def test_the_smallest_sd_is_that_of_drawing_people():
    draws = np.random.default_rng(0).binomial(200, 0.8, 20000) / 200
    assert protocol.smallest_sd(0.8, 200) == pytest.approx(draws.std(), rel=0.02)
    assert protocol.people_for_sd(0.8, protocol.smallest_sd(0.8, 200)) == pytest.approx(200)
