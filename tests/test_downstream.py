"""Scores against scikit-learn, heads against the models they stand for, evaluations of planted effects."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.collection import Collection
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.evaluate import methods, scores
from mnemodyn.evaluate.methods import (
    METHODS,
    Features,
    KernelMethod,
    Method,
    Split,
    TangentSpace,
    compute_features,
    confounds,
    connectivity,
    covariances,
    frames,
    residual_kernel,
)
from mnemodyn.evaluate.study import Task, evaluate, fold_scores, report, study
from mnemodyn.model.network import MnemoDyn
from mnemodyn.results import write_results
from mnemodyn.settings import ModelConfig
from mnemodyn.splits import inner_splits, repeated_folds

PARCELS = tuple(f"p{i}" for i in range(8))


def cohort(n=80, effect=0.0, seed=0, frames=60):
    """Scans whose first two parcels share more signal in one class, and with age; tables with every column."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "participant_id": [f"sub-{i:03d}" for i in range(n)],
            "site": rng.choice(["A", "B"], n),
            "age": rng.uniform(20, 60, n),
            "mean_fd": rng.uniform(0.05, 0.35, n),
            "n_frames": frames,
        }
    )
    table["diagnosis"] = np.where(rng.random(n) < 0.4, "patients", "controls")
    scans = []
    for row in table.itertuples():
        x = rng.standard_normal((frames, 8))
        common = rng.standard_normal(frames)
        x[:, :2] += effect * (row.diagnosis == "patients") * common[:, None]
        x[:, 2:4] += effect * (row.age - 20) / 40 * rng.standard_normal(frames)[:, None]
        scans.append(
            Scan(row.participant_id, x.astype(np.float32), 2.0, PARCELS, source=row.participant_id)
        )
    return scans, table


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=8, n_timepoints=32, n_blocks=1, n_channels=6, input_width=6, n_levels=2
    )
    return Checkpoint(MnemoDyn(config).eval(), PARCELS, 2.0, Scaling(), "none", {})


# Scores


def test_scores_of_classes_are_scikit_learns():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 50), rng.standard_normal(50).round(1)
    weights = np.vstack([np.ones(50), rng.integers(0, 3, 50)])
    found = scores.measure("classification", y, p, weights, fold=np.zeros(50))
    for i, w in enumerate(weights):
        said = p > 0
        expected = {
            "balanced_accuracy": balanced_accuracy_score(y, said, sample_weight=w),
            "auc": roc_auc_score(y, p, sample_weight=w),
            "macro_f1": f1_score(y, said, average="macro", sample_weight=w),
            "accuracy": accuracy_score(y, said, sample_weight=w),
        }
        assert {k: v[i] for k, v in found.items()} == pytest.approx(expected)


def test_scores_of_numbers_are_those_of_repeated_people():
    rng = np.random.default_rng(0)
    y = rng.normal(40, 10, 50)
    p, site = y + rng.normal(0, 10, 50), rng.integers(0, 3, 50)
    weights = np.vstack([np.ones(50), rng.integers(0, 3, 50)]).astype(int)
    found = scores.measure("regression", y, p, weights, fold=np.zeros(50), group=site)
    for i, w in enumerate(weights):
        a, b, s = (np.repeat(v, w) for v in (y, p, site))
        onehot = np.eye(3)[s]
        within = [
            v - LinearRegression(fit_intercept=False).fit(onehot, v).predict(onehot) for v in (a, b)
        ]
        expected = {
            "r": stats.pearsonr(a, b)[0],
            "r_plain": stats.pearsonr(a, b)[0],
            "r2": r2_score(a, b),
            "mae": mean_absolute_error(a, b),
            "mse_z": ((a - b) ** 2).mean() / y.var(),
            "r_within_site": stats.pearsonr(*within)[0],
        }
        assert {k: v[i] for k, v in found.items()} == pytest.approx(expected)


def test_the_area_under_the_curve_compares_within_folds_only():
    y, fold = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    p = np.array(
        [5.0, 6.0, -6.0, -5.0]
    )  # in order in each fold; across folds two of the four pairs are
    ones = np.ones((1, 4))
    assert scores.measure("classification", y, p, ones, fold=fold)["auc"][0] == 1.0
    assert scores.measure("classification", y, p, ones, fold=np.zeros(4))["auc"][0] == 0.75


def test_a_fold_s_own_mean_is_no_evidence_against_it():
    y, fold = np.random.default_rng(0).normal(40, 10, 60), np.arange(60) % 5
    learned_nothing = np.array([y[fold != f].mean() for f in fold])
    assert stats.pearsonr(y, learned_nothing)[0] < -0.1
    found = scores.measure("regression", y, learned_nothing, np.ones((1, 60)), fold=fold)
    assert found["r"][0] == 0.0
    assert found["r_plain"][0] == pytest.approx(stats.pearsonr(y, learned_nothing)[0])
    assert found["r2"][0] < 0


def test_resamples_draw_participants_with_all_their_scans():
    people = ["a", "a", "b", "c"]
    w = scores.resamples(people, 500, 0)
    assert (w[0] == 1).all()
    assert (w[:, 0] == w[:, 1]).all()
    assert (w[1:, 1:].sum(1) == 3).all()


def test_the_interval_covers_the_truth():
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, 100)
        p = np.where(rng.random(100) < 0.7, 2 * y - 1, 1 - 2 * y)
        w = scores.resamples(range(100), 300, seed)
        found = scores.interval(
            scores.measure("classification", y, p, w, fold=np.zeros(100))["accuracy"]
        )
        hits += found["low"] <= 0.7 <= found["high"]
    assert 88 <= hits <= 99


def test_the_corrected_test_is_the_published_formula():
    d = np.array([0.02, 0.05, -0.01, 0.03, 0.04])
    t = d.mean() / np.sqrt((1 / 5 + 0.25) * d.var(ddof=1))
    assert scores.corrected_t(d, 0.25) == pytest.approx(2 * stats.t.sf(t, 4))
    assert scores.corrected_t(d, 0.25) > stats.ttest_1samp(d, 0).pvalue
    assert scores.corrected_t(np.ones(5), 0.25) is None


# Features and heads


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_head_on_the_kernel_predicts_what_the_same_model_on_all_features_does(kind):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((60, 300)) + 3).astype(np.float32)
    y = rng.integers(0, 2, 60).astype(float) if kind == "classification" else x[:, :5].sum(1)
    train, test = np.arange(45), np.arange(45, 60)
    inner = inner_splits(y[train], np.arange(45), 3, 0)
    method = KernelMethod(Method("unmoved", ("x",)), {"x": Features(x)})
    found, chosen = method.fit_predict(Split(train, test, y[train], kind, inner))
    penalty = float(chosen.split("=")[1])
    centred = x.astype(float) - x[train].mean(0, dtype=float)
    centred /= np.sqrt((centred[train] ** 2).sum(1).mean())
    if kind == "classification":
        model = LogisticRegression(C=penalty, class_weight="balanced", tol=1e-8, max_iter=9999)
        expected = model.fit(centred[train], y[train]).decision_function(centred[test])
    else:
        expected = Ridge(alpha=penalty).fit(centred[train], y[train]).predict(centred[test])
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_components_of_the_kernel_are_principal_components():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 300)) + 3
    train, test = np.arange(30), np.arange(30, 40)
    kernel = residual_kernel(x @ x.T, train)
    values, vectors = np.linalg.eigh(kernel[np.ix_(train, train)])
    found = kernel[np.ix_(test, train)] @ (vectors / np.sqrt(values.clip(1e-9)))[:, ::-1][:, :5]
    centred = x - x[train].mean(0)
    centred /= np.sqrt((centred[train] ** 2).sum(1).mean())
    expected = PCA(5).fit(centred[train]).transform(centred[test])
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)


def test_the_penalty_that_does_best_in_the_inner_folds_is_chosen():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 20)).astype(np.float32)
    y = x @ rng.standard_normal(20) + rng.standard_normal(50)
    train, test = np.arange(40), np.arange(40, 50)
    inner = inner_splits(y[train], np.arange(40), 3, 0)
    split = Split(train, test, y[train], "regression", inner)
    method = KernelMethod(Method("linear", ("x",)), {"x": Features(x)})
    _, chosen = method.fit_predict(split)
    unit = (x - x[train].mean(0)) / np.sqrt(((x - x[train].mean(0))[train] ** 2).sum(1).mean())
    errors = []
    for alpha in methods.RIDGE_PENALTIES:
        predicted = np.zeros(40)
        for fit, rest in inner:
            predicted[rest] = Ridge(alpha=alpha).fit(unit[fit], y[fit]).predict(unit[rest])
        errors.append(((predicted - y[train]) ** 2).mean())
    assert chosen.endswith(f"alpha={methods.RIDGE_PENALTIES[int(np.argmin(errors))]:.3g}")
    # Picking finds the features that hold the target, and joining gives them the larger share.
    noise = Features(rng.standard_normal((50, 30)).astype(np.float32))
    both = {"noise": noise, "x": Features(x)}
    pick = KernelMethod(Method("pick", ("noise", "x")), both)
    assert pick.fit_predict(split)[1].startswith("x ")
    join = KernelMethod(Method("join", ("noise", "x")), both)
    assert join.fit_predict(split)[1].startswith("0.5 x")


def test_confounds_are_regressed_out_with_coefficients_of_the_training_scans():
    rng = np.random.default_rng(0)
    c = rng.standard_normal((50, 2))
    x = rng.standard_normal((50, 20)) + c @ rng.standard_normal((2, 20)) * 3
    train, test = np.arange(40), np.arange(40, 50)
    residual = x - LinearRegression().fit(c[train], x[train]).predict(c)
    unit = np.sqrt((residual[train] ** 2).sum(1).mean())
    found = residual_kernel(x @ x.T, train, c)[np.ix_(test, train)]
    expected = residual[test] @ residual[train].T / unit**2
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_standardised_features_use_the_training_scans_alone():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 4)) * [1, 10, 100, 0] + 5
    x[3, 1] = np.nan
    train = np.arange(20)
    other = x.copy()
    other[20:] *= 7
    one, two = (Features(v, methods._standardised()).kernel(train) for v in (x, other))
    np.testing.assert_allclose(one[:20, :20], two[:20, :20])
    sd = np.nanstd(x[:20], 0)
    z = np.nan_to_num((x[:20] - np.nanmean(x[:20], 0)) / np.where(sd > 0, sd, np.inf))
    z -= z.mean(0)
    np.testing.assert_allclose(one[:20, :20], z @ z.T / (z**2).sum(1).mean(), atol=1e-8)


def test_the_tangent_space_is_nilearns_for_the_same_reference():
    from nilearn.connectome import ConnectivityMeasure
    from sklearn.covariance import LedoitWolf

    scans, _ = cohort(20, effect=1.0)
    series = [frames(scan).astype(float) for scan in scans]
    train = np.arange(15)
    ours = TangentSpace().fit(covariances(scans)[train])
    estimator = LedoitWolf(store_precision=False)
    theirs = ConnectivityMeasure(estimator, kind="tangent", vectorize=True, standardize=False)
    theirs.fit([series[i] for i in train])

    def products(steps):
        steps = steps.reshape(len(steps), -1).astype(float)
        return steps @ steps.T

    # nilearn's reference is the geometric mean, ours the arithmetic one: close, and not the same.
    geometric = products(theirs.transform(series))
    found = products(ours.transform(covariances(scans)))
    assert np.corrcoef(geometric.ravel(), found.ravel())[0, 1] > 0.999
    assert not np.allclose(geometric, found, rtol=1e-3)
    theirs.whitening_ = ours.whitening_
    # nilearn's vectors are shorter by the square root of two.
    same = 2 * products(theirs.transform(series))
    np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-6)


def test_combat_takes_out_what_sites_add_with_the_training_scans_alone():
    pytest.importorskip("combatlearn", reason="ComBat comes with the extra `harmonise`")
    rng = np.random.default_rng(0)
    sites = np.arange(80) % 2
    shifted = rng.standard_normal((80, 30)) + 5 * sites[:, None]
    train, test = np.arange(60), np.arange(60, 80)

    def apart(features):
        """Squared distance between the means of the sites' test scans."""
        return (
            (features[sites[test] == 0].mean(0) - features[sites[test] == 1].mean(0)) ** 2
        ).sum()

    values = np.column_stack([shifted, sites])
    harmonised = methods.Harmonised().fit(values[train])
    assert apart(shifted[test]) > 30 * 20
    assert apart(harmonised.transform(values)[test]) < 30
    other = values.copy()
    other[test[1:], :30] *= 9
    np.testing.assert_allclose(
        harmonised.transform(other)[:61], harmonised.transform(values)[:61], atol=1e-4
    )
    values[79, -1] = 2
    with pytest.raises(ValueError, match="2"):
        harmonised.transform(values)


@pytest.mark.parametrize("target", ["diagnosis", "age"])
@pytest.mark.parametrize(
    "name", ["fc", "fc_harmonised", "fc_pca", "fc_mlp", "tangent", "model", "model+fc"]
)
def test_no_method_reads_the_test_people_before_it_predicts_them(name, target, checkpoint):
    """Labels are not handed over; other scans of one test person change nothing for the others."""
    scans, table = cohort(30, effect=1.0)
    task = Task.of(table, target, "classification" if target == "diagnosis" else "regression")
    folds = repeated_folds(task.table, target, n_folds=2, n_repeats=1)
    _, _, train, test = next(folds.split(task.people))
    inner = inner_splits(task.y[train], task.families[train], 3, 0)
    split = Split(train, test, task.y[train], task.kind, inner)
    method = replace(METHODS[name], features=METHODS[name].features[:3])
    remove = confounds(task.table, target, method.remove) if method.remove else None
    loud = replace(scans[test[0]], values=scans[test[0]].values[:, ::-1] ** 3)
    answers = []
    for first in (scans[test[0]], loud):
        changed = list(scans)
        changed[test[0]] = first
        features = compute_features(
            method.features, changed, task.table, target, checkpoint=checkpoint
        )
        answers.append(KernelMethod(method, features, remove).fit_predict(split)[0])
    np.testing.assert_allclose(answers[0][1:], answers[1][1:], rtol=1e-3, atol=1e-4)


# Evaluations


def select(rows, method, score, task=None, against=""):
    """The one row of a report for a method and a score."""
    found = [
        row
        for row in rows
        if (row["method"], row["score"], row.get("against", "")) == (method, score, against)
        and (task is None or row["task"] == task)
    ]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("target", "kind", "metric", "guess"),
    [("diagnosis", "classification", "balanced_accuracy", 0.5), ("age", "regression", "r", 0.0)],
)
def test_a_planted_effect_is_found(target, kind, metric, guess, checkpoint, tmp_path):
    scans, table = cohort(80, effect=0.9)
    task = Task.of(table, target, kind)
    folds = repeated_folds(task.table, target, n_repeats=2)
    chosen = {
        "confounds": METHODS["confounds"],
        "fc": METHODS["fc"],
        "model+fc": Method("join", ("fc", "model:latent_correlation")),
    }
    found = evaluate(scans, task, folds, chosen, checkpoint=checkpoint)
    rows = report(found, data="mine", n_boot=300)
    fc = select(rows, "fc", metric, target)
    assert fc["low"] > guess + 0.1
    assert fc["p"] < 0.01
    assert fc["n"] == 80
    assert select(rows, "model+fc", metric, target)["low"] > guess + 0.1
    assert select(rows, "confounds", metric, target)["low"] < guess + 0.05
    assert select(rows, "confounds", metric, target, against="fc")["high"] < 0
    mean = select(rows, "fc", f"{metric}_fold_mean", target)["value"]
    assert mean == pytest.approx(np.nanmean(fold_scores(found, "fc")))
    write_results(tmp_path / "results.csv", rows)  # every row is a row of the tidy table


def test_a_method_of_one_s_own_is_evaluated_on_the_same_folds():
    class LastFrame:
        depends_on = "nothing"

        def fit_predict(self, split):
            assert len(split.y) == len(split.train)
            return np.full(len(split.test), split.y.mean() - 0.5), "nothing"

    scans, table = cohort(40)
    task = Task.of(table, "diagnosis", "classification")
    folds = repeated_folds(task.table, "diagnosis", n_repeats=1)
    found = evaluate(scans, task, folds, {"mine": LastFrame(), "fc": METHODS["fc"]})
    assert np.isfinite(found.predictions["mine"]).all()


def test_a_fold_that_fails_is_reported(monkeypatch):
    scans, table = cohort(40)
    task = Task.of(table, "diagnosis", "classification")
    folds = repeated_folds(task.table, "diagnosis", n_repeats=1)
    real, calls, lines = KernelMethod.fit_predict, [], []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory left")
        return real(*arguments)

    monkeypatch.setattr(KernelMethod, "fit_predict", sometimes)
    found = evaluate(scans, task, folds, ["fc"], say=lines.append)
    error = "RuntimeError: no memory left"
    assert found.failed == [{"method": "fc", "repeat": 0, "fold": "1", "error": error}]
    assert np.isfinite(found.predictions["fc"]).mean() == pytest.approx(0.8, abs=0.02)
    assert lines[0] == "diagnosis: fold 1 of 5, 0 failures"
    assert lines[-1] == "diagnosis: fold 5 of 5, 1 failures"
    assert report(found, data="mine") == []


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch):
    scans, table = cohort(40)
    task = Task.of(table, "diagnosis", "classification")
    folds = repeated_folds(task.table, "diagnosis", n_repeats=1)
    chosen = {"fc": METHODS["fc"], "clean": METHODS["fc_harmonised"]}
    first = evaluate(scans, task, folds, chosen, cache=tmp_path)
    monkeypatch.setattr(KernelMethod, "fit_predict", lambda *_: pytest.fail("computed again"))
    again = evaluate(scans, task, folds, chosen, cache=tmp_path)
    for name in chosen:
        np.testing.assert_array_equal(first.predictions[name], again.predictions[name])
    monkeypatch.undo()
    # Whatever a result depends on is part of what it is found by.
    moved = replace(task, table=task.table.assign(mean_fd=task.table["mean_fd"][::-1].to_numpy()))
    louder = [replace(scan, values=scan.values**3) for scan in scans]
    for changed in (
        evaluate(scans, replace(task, y=task.y[::-1].copy()), folds, chosen, cache=tmp_path),
        evaluate(louder, task, folds, chosen, cache=tmp_path),
        evaluate(scans, moved, folds, chosen, cache=tmp_path),
    ):
        assert not np.array_equal(first.predictions["clean"], changed.predictions["clean"])


def test_sites_and_motion_are_reported():
    scans, table = cohort(80, effect=1.0)
    collection = Collection(scans, table, name="MINE", simulated=True)
    targets = {"age": "regression"}
    rows, failed = study(
        collection, targets, ["fc"], n_repeats=1, by_site=["fc", "fc_harmonised"], n_boot=50
    )
    assert failed == []
    assert {(row["data"], row["kind"]) for row in rows} == {("MINE", "SIMULATED")}
    held_out = "age, one site left out"
    assert select(rows, "fc", "r_within_site", held_out)["low"] is not None
    assert 0 <= select(rows, "fc", "site_share", held_out)["value"] <= 1
    assert abs(select(rows, "fc", "fd_r", "age")["value"]) < 0.5
    still = select(rows, "fc", "r", "age, mean FD < 0.2 mm")
    assert still["n"] == (table["mean_fd"] < 0.2).sum()
    # What is reported of folds does not depend on what else is asked for.
    alone, _ = study(collection, targets, ["fc"], n_repeats=1, n_boot=50)
    assert alone == [row for row in rows if "one site" not in row["task"]]


def test_connectivity_is_pearson_and_a_constant_parcel_has_none():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    x[:, 2] = 3.0
    found = connectivity([Scan("sub-1", x, 2.0, PARCELS[:4])])[0]
    # Lower triangle, row by row.
    expected = [
        np.arctanh(np.corrcoef(x[:, 0], x[:, 1])[0, 1]),
        0,
        0,
        *(np.arctanh(np.corrcoef(x[:, i], x[:, 3])[0, 1]) for i in (0, 1)),
        0,
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_confounds_leave_the_target_out():
    _, table = cohort(20)
    table = table.assign(sex=["female", "male"] * 10)
    assert confounds(table, "age").shape == (20, 2 + 2 + 1 + 1)
    assert confounds(table, "sex").shape == (20, 1 + 2 + 1 + 1)
    assert confounds(table[["participant_id"]], "age").shape == (20, 1)


@pytest.mark.parametrize(
    ("change", "target", "kind", "message"),
    [
        ({}, "iq", "classification", "target must be a column"),
        (
            {"diagnosis": "controls"},
            "diagnosis",
            "classification",
            r"two classes .* got \['controls'\]",
        ),
        ({"diagnosis": None}, "diagnosis", "classification", r"two classes .* got \[\]"),
        (
            {"diagnosis": list("abc" * 27)[:80]},
            "diagnosis",
            "classification",
            r"two classes .* got \['a', 'b', 'c'\]",
        ),
    ],
)
def test_a_target_that_is_none_is_refused(change, target, kind, message):
    _, table = cohort()
    with pytest.raises(DataError, match=message):
        Task.of(table.assign(**change), target, kind)


def test_scans_without_the_target_are_left_out():
    _, table = cohort()
    task = Task.of(
        table.assign(diagnosis=table["diagnosis"].where(table.index > 4)),
        "diagnosis",
        "classification",
    )
    assert len(task.y) == 75
    assert task.rows.tolist() == list(range(5, 80))


def test_features_are_known_in_another_process():
    made = (
        "import numpy as np; from mnemodyn.evaluate.methods import Features, _standardised; "
        "print(Features(np.arange(6.0).reshape(3, 2), _standardised()).digest)"
    )
    # A function stands among the steps, and its address is another in every process.
    found = {
        subprocess.run([sys.executable, "-c", made], capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1
    assert len(found.pop()) == 65
