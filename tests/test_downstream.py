"""Scores against scikit-learn, heads against the models they stand for, controls at chance, planted effects found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from mnemodyn.evaluate.downstream import (
    METHODS,
    Method,
    Task,
    evaluate,
    few_shot,
    noise_scans,
    permuted,
    report,
    transfer,
)
from mnemodyn.evaluate.features import confounds, connectivity
from mnemodyn.evaluate.finetune import Series, finetune
from scipy import stats
from sklearn.base import clone
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

from mnemodyn.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.evaluate import downstream, heads, scores
from mnemodyn.settings import ModelConfig
from mnemodyn.model.network import MnemoDyn
from mnemodyn.readout import READOUTS, MnemoDynEncoder, readouts
from mnemodyn.splits import inner_splits, leave_one_site_out, repeated_folds

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


# Heads


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_rotated_features_give_the_predictions_of_all_features(kind):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 300)) + 3).astype(np.float32)
    y = rng.integers(0, 2, 40) if kind == "classification" else rng.standard_normal(40)
    train, test = np.arange(30), np.arange(30, 40)
    a, b = heads.rotate(heads.Features(x).products(train), train, test)
    assert a.shape == (30, 29)
    centred = x.astype(float) - x[train].mean(0, dtype=float)
    unit = np.sqrt((centred[train] ** 2).sum(1).mean())
    make = (
        (lambda: LogisticRegression(C=3.0, tol=1e-8, max_iter=9999))
        if kind == "classification"
        else Ridge
    )
    method = "decision_function" if kind == "classification" else "predict"
    whole = getattr(make().fit(centred[train] / unit, y[train]), method)(centred[test] / unit)
    np.testing.assert_allclose(getattr(make().fit(a, y[train]), method)(b), whole, atol=1e-4)
    # Its columns are principal components.
    expected = PCA(5).fit(centred[train] / unit).transform(centred[test] / unit)
    np.testing.assert_allclose(np.abs(b[:, :5]), np.abs(expected), atol=1e-4)


def test_confounds_are_regressed_out_with_coefficients_of_the_training_scans():
    rng = np.random.default_rng(0)
    c = rng.standard_normal((50, 2))
    x = rng.standard_normal((50, 20)) + c @ rng.standard_normal((2, 20)) * 3
    train, test = np.arange(40), np.arange(40, 50)
    model = LinearRegression().fit(c[train], x[train])
    residual = x - model.predict(c)
    a, b = heads.rotate(heads.Features(x).products(train), train, test, c)
    unit = np.sqrt((residual[train] ** 2).sum(1).mean())
    np.testing.assert_allclose(b @ a.T, residual[test] @ residual[train].T / unit**2, atol=1e-8)


def test_standardised_features_use_the_training_scans_alone():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 4)) * [1, 10, 100, 0] + 5
    x[3, 1] = np.nan
    train = np.arange(20)
    other = x.copy()
    other[20:] *= 7
    one, two = (heads.Standardised(v).products(train) for v in (x, other))
    np.testing.assert_allclose(one[:20, :20], two[:20, :20])
    z = (x[:20] - np.nanmean(x[:20], 0)) / np.where(
        np.nanstd(x[:20], 0) > 0, np.nanstd(x[:20], 0), np.inf
    )
    np.testing.assert_allclose(one[:20, :20], np.nan_to_num(z) @ np.nan_to_num(z).T, atol=1e-8)


def test_combat_takes_out_what_sites_add_with_the_training_scans_alone():
    pytest.importorskip("combatlearn", reason="ComBat comes with the extra `harmonise`")
    rng = np.random.default_rng(0)
    sites = np.array(["a", "b"] * 40)
    clean = rng.standard_normal((80, 30)).astype(np.float32)
    shifted = clean + 5 * (sites == "b")[:, None]
    train, test = np.arange(60), np.arange(60, 80)

    def apart(k):  # squared distance between the means of the test scans of the sites
        w = np.where(sites[test] == "a", 0.1, -0.1)
        return w @ k[np.ix_(test, test)] @ w

    k = heads.Combat(shifted, sites=sites).products(train)
    assert apart(heads.Features(shifted).products(train)) > 30 * 20
    assert apart(k) < 30
    other = shifted.copy()
    other[test[1:]] *= 9
    same = heads.Combat(other, sites=sites).products(train)
    np.testing.assert_allclose(same[:61, :61], k[:61, :61], atol=1e-4)
    elsewhere = np.where(np.arange(80) == 79, "c", sites)
    with pytest.raises(ValueError, match="c"):
        heads.Combat(shifted, sites=elsewhere).products(train)


@pytest.mark.parametrize("target", ["diagnosis", "age"])
@pytest.mark.parametrize(
    "name", ["fc", "fc_pca", "fc_mlp", "tangent", "model", "model+fc", "draft_head", "finetune_all"]
)
def test_no_method_reads_the_labels_of_test_people(name, target, checkpoint, monkeypatch):
    """Another answer for the people tested changes nothing that is said of them."""
    monkeypatch.setattr("mnemodyn.evaluate.finetune.EPOCHS", {"draft": 1, "all": 1})
    scans, table = cohort(30, effect=1.0)
    task = Task.of(table, target, "classification" if target == "diagnosis" else "regression")
    folds = repeated_folds(task.table, target, n_folds=2, n_repeats=1)
    _, _, train, test = next(folds.split(task.table["participant_id"]))
    method = METHODS[name]
    method = replace(method, blocks=method.blocks[:3])  # as good as all, and quicker
    blocks = (
        {"scans": Series.of(checkpoint, scans)}
        if method.head == "finetune"
        else downstream.blocks_of(scans, task, method.blocks, checkpoint)
    )
    answers = []
    for flipped in (False, True):
        y = task.y.copy()
        if flipped:
            y[test] = (1 - y[test]) if task.classes else -y[test]
        fold = heads.Fold(blocks, y, train, test, task.kind, [])
        answers.append(downstream._one_fold({name: method}, fold, replace(task, y=y), {})[name])
    assert answers[0][0] is not None, answers[0][1]
    np.testing.assert_array_equal(answers[0][0], answers[1][0])


# Evaluations


def test_a_planted_effect_is_found_and_noise_is_not(checkpoint):
    scans, table = cohort(80, effect=0.9)
    for target, kind in (("diagnosis", "classification"), ("age", "regression")):
        task = Task.of(table, target, kind)
        folds = repeated_folds(task.table, target, n_repeats=2)
        methods = {
            "confounds": METHODS["confounds"],
            "fc": METHODS["fc"],
            "model+fc": Method("join", ("fc", "model:latent_correlation"), 1),
        }
        found = report(evaluate(scans, task, folds, methods, checkpoint=checkpoint))
        rows = {row["method"]: row for row in found["rows"]}
        metric, guess = ("balanced_accuracy", 0.5) if kind == "classification" else ("r", 0.0)
        assert rows["fc"][metric]["low"] > guess + 0.1
        assert rows["model+fc"][metric]["low"] > guess + 0.1
        assert rows["confounds"][metric]["low"] < guess + 0.05
        assert rows["fc"]["p"] < 0.01
        assert rows["fc"]["n"] == 80
        better = [
            c for c in found["comparisons"] if c["method"] == "confounds" and c["metric"] == metric
        ]
        assert better[0]["difference"]["high"] < 0
        once = replace(folds, test_fold=folds.test_fold[:1])
        for control in (
            evaluate(noise_scans(scans, 0), task, once, methods, checkpoint=checkpoint),
            evaluate(scans, permuted(task, 3), once, methods, checkpoint=checkpoint),
        ):
            # Nothing is made up: no interval lies above chance, and none lies so far below that labels leak in reverse.
            for row in report(control)["rows"]:
                assert row[metric]["low"] <= guess, row
                assert row[metric]["value"] > guess - 0.35, row


def test_equal_noise_does_not_tell_who_was_scanned_longer_or_with_what(checkpoint):
    scans, table = cohort(60)
    old = table["age"] > 40
    scans = [
        replace(
            s,
            values=s.values[: 30 + 30 * a],
            t_r=1.0 + 2 * a,
            censored=np.arange(30 + 30 * a) < 5 * a,
        )
        for s, a in zip(scans, old, strict=True)
    ]
    plain, equal = noise_scans(scans, 0), noise_scans(scans, 0, equal=True)
    assert [(len(s.values), s.t_r, s.n_usable) for s in plain] == [
        (60, 3.0, 55) if a else (30, 1.0, 30) for a in old
    ]
    most = 1.0 + 2 * (old.mean() > 0.5)
    assert {(len(s.values), s.t_r, s.n_usable, s.values.std() > 0.8) for s in equal} == {
        (30, most, 30, True)
    }
    np.testing.assert_array_equal(equal[3].values, plain[3].values[:30])
    # Frames are few, so that the lengths and the repetition times that the network is told are all that there is.
    task = Task.of(table, "age", "regression")
    folds = repeated_folds(table, "age", n_repeats=1)
    found = [evaluate(s, task, folds, ["latent_sd"], checkpoint=checkpoint) for s in (plain, equal)]
    r = [report(each)["rows"][0]["r"] for each in found]
    assert r[0]["low"] > 0.1
    assert r[1]["low"] < 0


def test_luck_has_a_p_that_is_uniform():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.5, 0.03, (2000, 9))
    p = [
        scores.draw_p(d[0], 0.5, {"n": 8, "mean": d[1:].mean(), "sd": d[1:].std(ddof=1)})
        for d in draws
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert scores.draw_p(0.6, 0.5, {"n": 8, "sd": 0.03}) < 0.02


def test_shuffled_labels_are_at_chance_on_average():
    scans, table = cohort(60, effect=1.5)
    for target, kind, guess in (("diagnosis", "classification", 0.5), ("age", "regression", 0.0)):
        task = Task.of(table, target, kind)
        folds = repeated_folds(task.table, target, n_repeats=1)
        found = downstream.draws(lambda i, task=task: (scans, permuted(task, i)), folds, {"fc": 8})[
            "fc"
        ]
        assert found["n"] == 8
        assert abs(found["mean"] - guess) < 4 * found["sd"] / np.sqrt(8)
        assert found["sd"] < 0.2
        assert found["low"] < guess < found["high"] or found["p"] < 0.05


def test_parts_of_a_study_are_measured_alone():
    scans, table = cohort(60, effect=1.5)
    plan = {
        "control": ["fc"],
        "shuffles": {"fc": 2},
        "noises": {"fc": 3},
        "shots": ["fc"],
        "n_boot": 50,
    }
    found = downstream.study(
        scans, table, {"diagnosis": "classification"}, ["fc"], only=["noises", "noise"], **plan
    )
    assert set(found["diagnosis"]) == {"noise", "noises"}
    noises = found["diagnosis"]["noises"]["fc"]
    assert noises["n"] == 3
    assert 0 < noises["sd"] < 0.2
    task, folds = (
        Task.of(table, "diagnosis", "classification"),
        repeated_folds(table, "diagnosis", n_repeats=1),
    )
    each = [evaluate(noise_scans(scans, i, equal=True), task, folds, ["fc"]) for i in range(3)]
    assert noises["mean"] == pytest.approx(
        np.mean([report(one)["rows"][0]["fold_mean"] for one in each])
    )


def test_fine_tuning_learns_and_makes_nothing_of_noise(checkpoint):
    scans, table = cohort(120, frames=64)
    y = (table["diagnosis"] == "patients").to_numpy(float)
    train, test = np.arange(80), np.arange(80, 120)
    split = inner_splits(y[train], table["participant_id"].to_numpy()[train], 3, 0)[0]
    louder = [
        Scan(
            s.participant_id,
            s.values * np.where(np.arange(64) % 2, 1 + 3 * v, 1)[:, None].astype(np.float32),
            2.0,
            PARCELS,
        )
        for s, v in zip(scans, y, strict=True)
    ]
    for data, low, high in ((louder, 0.75, 1.0), (scans, 0.3, 0.7)):
        p, chosen = finetune(
            Series.of(checkpoint, data),
            y,
            train,
            test,
            what="all",
            kind="classification",
            split=split,
            seed=0,
        )
        assert low <= roc_auc_score(y[test], p) <= high
        assert chosen.startswith("epoch ")


def test_a_fold_that_fails_is_reported(checkpoint, monkeypatch):
    scans, table = cohort(40)
    task = Task.of(table, "diagnosis", "classification")
    folds = repeated_folds(task.table, "diagnosis", n_repeats=1)
    real, calls = heads.Fold.predict, []

    def sometimes(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory left")
        return real(*arguments, **settings)

    monkeypatch.setattr(heads.Fold, "predict", sometimes)
    row = report(evaluate(scans, task, folds, ["fc"]))["rows"][0]
    assert row["failed"] == [{"repeat": 0, "fold": "1", "error": "RuntimeError: no memory left"}]
    assert row["n_folds"] == 4
    assert row["balanced_accuracy"]["value"] is None


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch):
    scans, table = cohort(40)
    task = Task.of(table, "diagnosis", "classification")
    folds = repeated_folds(task.table, "diagnosis", n_repeats=1)
    first = evaluate(scans, task, folds, ["fc"], cache=tmp_path)
    monkeypatch.setattr(heads.Fold, "predict", lambda *_, **__: pytest.fail("computed again"))
    again = evaluate(scans, task, folds, ["fc"], cache=tmp_path)
    np.testing.assert_array_equal(first.predictions["fc"], again.predictions["fc"])
    monkeypatch.undo()
    other = evaluate(
        scans, permuted(task, 0), folds, ["fc"], cache=tmp_path
    )  # not from the cache of other labels
    assert not np.array_equal(first.predictions["fc"], other.predictions["fc"])


def test_sites_and_motion_are_reported():
    scans, table = cohort(80, effect=1.0)
    task = Task.of(table, "age", "regression")
    found = report(evaluate(scans, task, leave_one_site_out(task.table), ["fc", "fc_harmonised"]))
    row = found["rows"][0]
    assert found["folds"]["n_folds"] == 2
    assert {"r_within_site", "fd_r", "site_share", "low_motion"} <= set(row)
    assert row["low_motion"]["n"] == (table["mean_fd"] < 0.2).sum()


def test_more_labels_and_other_cohorts():
    scans, table = cohort(120, effect=1.5)
    others, other_table = cohort(80, effect=1.5, seed=1)
    source, target = (Task.of(t, "diagnosis", "classification") for t in (table, other_table))
    folds = repeated_folds(source.table, "diagnosis", n_repeats=1)
    fc, other_fc = connectivity(scans), connectivity(others)
    rows = few_shot({"fc": heads.Features(fc)}, source, folds, (1, 20, 500))
    assert [row["shots"] for row in rows] == [1, 20]
    assert rows[1]["value"] > rows[0]["value"]
    found = transfer((fc, other_fc), source, target)
    assert found["balanced_accuracy"]["low"] > 0.6
    assert (found["n_source"], found["n"]) == (120, 80)
    with pytest.raises(DataError, match="one task"):
        transfer((fc, other_fc), source, Task.of(other_table, "site", "classification"))


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
            "two classes .* got only 'controls'",
        ),
        ({"diagnosis": None}, "diagnosis", "classification", "no value at all"),
        (
            {"diagnosis": list("abc" * 27)[:80]},
            "diagnosis",
            "classification",
            "two classes are expected",
        ),
    ],
)
def test_a_target_that_is_none_is_refused(change, target, kind, message):
    _, table = cohort()
    with pytest.raises(DataError, match=message):
        Task.of(table.assign(**change), target, kind)


def test_scans_without_the_target_are_counted():
    _, table = cohort()
    task = Task.of(
        table.assign(diagnosis=table["diagnosis"].where(table.index > 4)),
        "diagnosis",
        "classification",
    )
    assert (task.n_missing, len(task.y)) == (5, 75)


# The encoder


def test_the_encoder_is_a_transformer_of_scikit_learn(checkpoint, tmp_path):
    import pickle

    scans, _ = cohort(6)
    encoder = MnemoDynEncoder(checkpoint, ("latent_sd", "response"), cache=tmp_path)
    found = encoder.fit_transform(scans)
    expected = [
        np.concatenate(
            list(readouts(checkpoint.model, Scaling()(s), 2.0, ("latent_sd", "response")).values())
        )
        for s in scans
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert clone(encoder).get_params()["readouts"] == ("latent_sd", "response")
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(again.transform(scans[::-1]), found[::-1])  # now from the cache
    assert len(list(tmp_path.rglob("*.npz"))) == 6
    save_checkpoint(
        tmp_path / "run" / "best", checkpoint
    )  # what from_pretrained takes, the encoder takes
    of_a_run = MnemoDynEncoder(str(tmp_path / "run"), ("latent_sd", "response"))
    np.testing.assert_array_equal(of_a_run.fit_transform(scans), found)
    fresh = (
        MnemoDynEncoder(checkpoint, ("latent_sd",), untrained=5, cache=tmp_path)
        .fit(scans)
        .transform(scans)
    )
    assert not np.allclose(fresh, found[:, :6])


def test_scikit_learns_checks_that_apply_to_scans_pass(checkpoint):
    from sklearn.utils import estimator_checks

    encoder = MnemoDynEncoder(checkpoint)
    for check in (
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_do_not_raise_errors_in_init_or_set_params",
    ):
        getattr(estimator_checks, check)("MnemoDynEncoder", encoder)


def test_other_parcels_are_refused(checkpoint):
    scans, _ = cohort(2)
    other = [Scan(s.participant_id, s.values, 2.0, PARCELS[::-1]) for s in scans]
    with pytest.raises(CheckpointError, match="another order"):
        MnemoDynEncoder(checkpoint).fit(other)


def test_readouts_are_all_there(checkpoint):
    scans, _ = cohort(1)
    found = readouts(checkpoint.model, Scaling()(scans[0]), 2.0)
    assert {k: v.shape for k, v in found.items()} == {
        "latent_mean": (6,),
        "latent_sd": (6,),
        "latent_max": (6,),
        "scale_energy": (18,),
        "latent_correlation": (15,),
        "response": (28,),
        "last_frame": (8,),
    }
    assert set(found) == set(READOUTS)
