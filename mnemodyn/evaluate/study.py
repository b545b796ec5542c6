"""Targets predicted from scans: every method on the same folds, with intervals, comparisons and controls."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import joblib
import numpy as np
import pandas as pd

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.evaluate.methods import (
    METHODS,
    Features,
    KernelMethod,
    Method,
    Split,
    compute_features,
    confounds,
)
from mnemodyn.evaluate.scores import (
    CHANCE,
    SCORES,
    corrected_t,
    interval,
    measure,
    resamples,
)
from mnemodyn.files import Kept, remove_left_over
from mnemodyn.splits import Folds, families_of, inner_splits, leave_one_site_out, repeated_folds

LOW_MOTION = 0.2  # mm
N_INNER = 3  # folds within the training folds, by which everything is chosen


@dataclass(frozen=True)
class Task:
    """A target and the scans that have it.

    Attributes
    ----------
    table : DataFrame
        A row a scan that has the target: ``participant_id`` and, as far as they are known,
        ``family, site, age, sex, mean_fd, n_frames``.
    target : str
    kind : str
        ``classification`` or ``regression``.
    y : ndarray, shape (scan,)
        1 for the second of the sorted `classes` and 0 for the first; or the target.
    classes : tuple of str
        Two, or none for a regression.
    rows : ndarray of int
        Rows of the cohort's table that have the target.
    """

    table: pd.DataFrame = field(repr=False)
    target: str
    kind: str
    y: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    rows: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, table: pd.DataFrame, target: str, kind: str) -> "Task":
        """The task of one column of a cohort's table.

        A DataError if there is no such column, or it does not have two classes or different numbers.
        """
        if target not in table:
            raise DataError(
                f"target must be a column of the cohort's table, got {target!r}; it has {list(table)}"
            )
        known = table[target].notna().to_numpy()
        part = table[known].reset_index(drop=True)
        for column in {"site", "family"} & set(part):
            part[column] = part[column].replace("", None)
        values = part[target]
        n_values = values.nunique()
        if n_values < 2 or (kind == "classification" and n_values > 2):
            raise DataError(
                f"{target}: two classes (or different numbers) are needed, got "
                f"{sorted(values.unique())[:5]}; `mnemodyn index` says who has a value, and the "
                "cohort's YAML can map or exclude some"
            )
        classes: tuple[str, ...] = ()
        y = values
        if kind == "classification":
            # In the order of the alphabet, so that who is class 1 does not depend on the scans' order.
            classes = tuple(sorted(values.astype(str).unique()))
            y = values.astype(str) == classes[1]
        return cls(part, target, kind, y.to_numpy(float), classes, np.flatnonzero(known))

    @property
    def people(self) -> pd.Series:
        """Participant of every scan."""
        return self.table["participant_id"]

    @property
    def families(self) -> np.ndarray:
        """Family of every scan, the participant where none is known."""
        return families_of(self.table)

    @property
    def sites(self) -> np.ndarray | None:
        """Site of every scan; None where one is unknown, or there is one only."""
        sites = self.table.get("site")
        # With unknown sites nobody could be sure that a site that is left out was not trained on.
        if sites is None or sites.isna().any() or sites.nunique() < 2:
            return None
        return sites.to_numpy(str)

    @property
    def metric(self) -> str:
        """The score that methods are compared by."""
        return SCORES[self.kind][0]

    def select(self, scans: Any) -> Sequence[Scan]:
        """Those scans of a cohort's Collection that have the target."""
        return scans.select(self.rows)


class Predictor(Protocol):
    """What `evaluate` asks of a method: a fit and a prediction a fold, and what they depend on."""

    depends_on: Any  # besides the labels and the split; text, numbers and arrays

    def fit_predict(self, split: Split) -> tuple[np.ndarray, str]:
        """Predictions of the test scans as of `KernelMethod.fit_predict`, and what was chosen."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions of every method.

    Attributes
    ----------
    predictions : dict of str to ndarray, shape (repeat, scan)
        NaN where a fold failed.
    failed : list of dict
        ``method, repeat, fold, error`` of every fold that failed.
    """

    task: Task
    folds: Folds
    predictions: dict[str, np.ndarray]
    failed: list[dict]

    def complete(self) -> list[str]:
        """Methods without a failed fold: a score of those who are left would flatter a method."""
        return [name for name, p in self.predictions.items() if not np.isnan(p).any()]


def evaluate(
    scans: Sequence[Scan],
    task: Task,
    folds: Folds,
    methods: Iterable[str] | Mapping[str, Method | Predictor] = ("confounds", "fc"),
    *,
    checkpoint: Checkpoint | None = None,
    cache: str | Path | None = None,
    n_jobs: int = 1,
    seed: int = 0,
    features: dict[str, Features] | None = None,
    say: Callable[[str], None] | None = None,
) -> Evaluation:
    """Predict every participant from the others, by every method, on the same folds.

    Parameters
    ----------
    scans : sequence of Scan
        Those of `task.table`, in its order (`task.select` gives them); read one at a time.
    methods : iterable of str, or dict
        Names in `METHODS`; or by name a :class:`~mnemodyn.evaluate.methods.Method`, or any other
        object with ``fit_predict``.
    checkpoint : Checkpoint, optional
        The network, for methods that read one.
    cache : str or Path, optional
        Folder that keeps read-outs and predictions, so that an interrupted evaluation goes on.
    n_jobs : int
        Processes; each takes a fold.
    seed : int
        Of inner folds, perceptrons and untrained networks.
    features : dict of str to Features, optional
        Features computed before; those that are missing are computed and added.
    say : callable, optional
        Is given a line a fold.

    Raises
    ------
    DataError
        If a method is unknown, scans do not fit the table, or a method needs a checkpoint.
    """
    if len(scans) != len(task.table):
        raise DataError(f"{len(task.table)} scans of the task's table expected, got {len(scans)}")
    features = {} if features is None else features
    predictors = _predictors(scans, task, methods, features, checkpoint, cache, seed)
    # A fold is the unit of work and of resumption: it takes seconds to minutes.
    kept = Kept(cache)
    if cache is not None:
        # Other evaluations, maybe on other machines, keep theirs here at the same time.
        remove_left_over(Path(cache), held=False)
    work = list(folds.split(task.people))
    run = joblib.delayed(_run_fold)
    results = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(
        run(predictors, task, train, test, kept, seed) for _, _, train, test in work
    )
    shape = (len(folds.test_fold), len(task.y))
    predictions = {name: np.full(shape, np.nan) for name in predictors}
    failed = []
    for done, (repeat, fold, _, test) in enumerate(work, 1):
        for name, result in next(results).items():
            if "error" in result:
                where = {"method": name, "repeat": repeat, "fold": folds.names[fold]}
                failed.append({**where, "error": result["error"]})
            else:
                predictions[name][repeat, test] = result["prediction"]
        if say is not None:
            say(f"{task.target}: fold {done} of {len(work)}, {len(failed)} failures")
    return Evaluation(task, folds, predictions, failed)


def _predictors(
    scans: Sequence[Scan],
    task: Task,
    methods: Iterable[str] | Mapping[str, Method | Predictor],
    features: dict[str, Features],
    checkpoint: Checkpoint | None,
    cache: str | Path | None,
    seed: int,
) -> dict[str, Predictor]:
    """Every method with its features, which are computed where they are missing."""
    if not isinstance(methods, Mapping):
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise DataError(f"method must be one of {', '.join(METHODS)}, got {unknown[0]!r}")
        methods = {name: METHODS[name] for name in methods}
    kernel_methods = [method for method in methods.values() if isinstance(method, Method)]
    missing = [n for method in kernel_methods for n in method.features if n not in features]
    settings: dict[str, Any] = {"checkpoint": checkpoint, "cache": cache, "seed": seed}
    features.update(compute_features(missing, scans, task.table, task.target, **settings))
    predictors: dict[str, Predictor] = {}
    for name, method in methods.items():
        if isinstance(method, Method):
            remove = confounds(task.table, task.target, method.remove) if method.remove else None
            predictors[name] = KernelMethod(method, features, remove)
        else:
            predictors[name] = method
    return predictors


def _run_fold(
    predictors: dict[str, Predictor],
    task: Task,
    train: np.ndarray,
    test: np.ndarray,
    kept: Kept,
    seed: int,
) -> dict[str, dict]:
    """``prediction`` and ``chosen`` of every method in one fold, or ``error``."""
    # The labels of the training scans are all that a method is given of them.
    y = task.y[train]
    try:
        inner = inner_splits(y, task.families[train], N_INNER, seed)
    except DataError as error:
        return {name: {"error": str(error)} for name in predictors}
    # The same inner folds for every method, so that all choose by the same people.
    split = Split(train, test, y, task.kind, inner, seed)
    # Everything that decides a prediction, by content, so that nothing outdated is found again.
    pairs = [[list(fit), list(rest)] for fit, rest in inner]
    of_fold = [y, task.kind, train, test, pairs, seed]
    results = {}
    for name, predictor in predictors.items():
        make = partial(_predict, predictor, split)
        try:
            results[name] = kept(name, [predictor.depends_on, of_fold], make)
        except Exception as error:  # of whatever kind: it is reported, and the others go on
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    return results


def _predict(predictor: Predictor, split: Split) -> dict:
    prediction, chosen = predictor.fit_predict(split)
    return {"prediction": prediction, "chosen": chosen}


def _scores(
    evaluation: Evaluation, method: str, weights: np.ndarray, rows: np.ndarray | slice = slice(None)
) -> dict[str, np.ndarray]:
    """Scores averaged over repeats, each (resample,)."""
    task = evaluation.task
    group = None if task.sites is None else task.sites[rows]
    test_folds = evaluation.folds.of(task.people)
    found = []
    for fold, prediction in zip(test_folds, evaluation.predictions[method], strict=True):
        scores = measure(
            task.kind,
            task.y[rows],
            prediction[rows],
            weights[:, rows],
            fold=fold[rows],
            group=group,
        )
        found.append(scores)
    # Scores are averaged and not predictions, which would be those of an ensemble.
    return {name: np.mean([scores[name] for scores in found], axis=0) for name in found[0]}


def fold_scores(evaluation: Evaluation, method: str) -> np.ndarray:
    """The first score in every fold of every repeat, such as at every site."""
    task = evaluation.task
    test_folds = evaluation.folds.of(task.people)
    found = []
    for fold, prediction in zip(test_folds, evaluation.predictions[method], strict=True):
        # Weights 1 for the scans of one fold and 0 for the others, a row a fold.
        one_fold = (fold == np.unique(fold)[:, None]).astype(float)
        scores = measure(task.kind, task.y, prediction, one_fold, fold=fold)
        found.append(scores[task.metric])
    return np.concatenate(found)


def report(
    evaluation: Evaluation,
    *,
    data: str,
    kind: str = "real",
    condition: str = "",
    baseline: str = "fc",
    n_boot: int = 1000,
    seed: int = 0,
) -> list[dict]:
    """Scores and comparisons of an evaluation as rows of :data:`mnemodyn.results.COLUMNS`.

    A method with a failed fold has no rows.

    Parameters
    ----------
    data, kind : str
        Columns of the rows: whose scans, and ``real`` or ``SIMULATED``.
    condition : str
        Words that follow the target in the column ``task``.
    baseline : str
        The method that the others are compared with.
    n_boot, seed : int
        Resamples of participants.

    Returns
    -------
    list of dict
        Every score with its interval; ``p`` of the first is that against chance, or against the
        baseline, by the corrected resampled t-test. Besides the scores of
        :func:`~mnemodyn.evaluate.scores.measure` there are the first score's mean over folds
        (``..._fold_mean``), ``fd_r``, the correlation of predictions with mean framewise
        displacement, ``site_share``, the share of their variance between sites, and under the
        condition "mean FD < 0.2 mm" the scores of those who moved less.
    """
    task = evaluation.task
    words = [word for word in (task.target, condition) if word]
    n_people = int(task.people.nunique())
    base = {"data": data, "task": ", ".join(words), "kind": kind, "n": n_people}
    # The same resamples for every method, so that intervals of differences are paired.
    weights = resamples(task.people, n_boot, seed)
    splits = evaluation.folds.split(task.people)
    test_share = float(np.mean([len(test) / len(train) for _, _, train, test in splits]))
    methods = evaluation.complete()
    scores = {method: _scores(evaluation, method, weights) for method in methods}
    by_fold = {method: fold_scores(evaluation, method) for method in methods}
    rows: list[dict] = []
    for method in methods:
        above_chance = by_fold[method] - CHANCE[task.metric]
        p = corrected_t(above_chance, test_share)
        rows += _score_rows({**base, "method": method}, scores[method], task.metric, p)
        rows += _motion_and_site(evaluation, method, base, weights)
        mean = float(np.nanmean(by_fold[method]))
        rows.append({**base, "method": method, "score": f"{task.metric}_fold_mean", "value": mean})
    for method in methods:
        if method == baseline or baseline not in methods:
            continue
        p = corrected_t(by_fold[method] - by_fold[baseline], test_share)
        differences = {}
        for name, values in scores[method].items():
            differences[name] = values - scores[baseline][name]
        compared = {**base, "method": method, "against": baseline}
        rows += _score_rows(compared, differences, task.metric, p)
    # A score may be undefined, as the area under the curve is where a site has one class.
    return [row for row in rows if pd.notna(row["value"])]


def _score_rows(
    base: dict, scores: dict[str, np.ndarray], first: str, p: float | None
) -> Iterator[dict]:
    """Rows of the scores; `p` is that of the first score."""
    for name, values in scores.items():
        row = {**base, "score": name, **interval(values)}
        if name == first:
            row["p"] = p
        yield row


def _motion_and_site(
    evaluation: Evaluation, method: str, base: dict, weights: np.ndarray
) -> Iterator[dict]:
    """What the predictions have to do with motion and site; see `report`."""
    task = evaluation.task
    base = {**base, "method": method}
    prediction = pd.Series(evaluation.predictions[method].mean(0))
    if task.sites is not None and prediction.nunique() > 1:
        between = prediction.groupby(task.sites).transform("mean")
        yield {**base, "score": "site_share", "value": float(between.var() / prediction.var())}
    if "mean_fd" not in task.table:
        return
    fd = task.table["mean_fd"]
    if fd.nunique() > 1 and prediction.nunique() > 1:
        yield {**base, "score": "fd_r", "value": float(prediction.corr(fd))}
    # Fewer than ten scans, or all of them, would say nothing new.
    still = np.flatnonzero(fd < LOW_MOTION)
    if 10 <= len(still) < len(fd) and len(np.unique(task.y[still])) > 1:
        base["task"] += f", mean FD < {LOW_MOTION} mm"
        base["n"] = int(task.people.iloc[still].nunique())
        yield from _score_rows(base, _scores(evaluation, method, weights, still), "", None)


def study(
    scans: Any,
    targets: Mapping[str, str],
    methods: Iterable[str],
    *,
    n_repeats: int = 5,
    by_site: Iterable[str] = (),
    n_boot: int = 1000,
    seed: int = 0,
    **settings: Any,
) -> tuple[list[dict], list[dict]]:
    """Every target of a cohort by every method, in repeated folds and with each site left out.

    Parameters
    ----------
    scans : Collection
        A cohort's scans with their ``table``, the cohort's ``name``, and whether ``simulated``.
    targets : dict of str to str
        Columns of the table -> ``classification`` or ``regression``.
    methods, by_site : iterable of str
        Methods that are tested in `n_repeats` of five folds, and with each site left out in turn
        (where the cohort has two sites or more).
    **settings
        Of :func:`evaluate`: ``checkpoint``, ``cache``, ``n_jobs``, ``say``.

    Returns
    -------
    rows : list of dict
        Rows of :data:`mnemodyn.results.COLUMNS`; see :func:`report`.
    failed : list of dict
        ``task, method, repeat, fold, error`` of folds that failed.
    """
    about = {"data": scans.name, "kind": "SIMULATED" if scans.simulated else "real"}
    shared: dict[tuple, dict[str, Features]] = {}
    rows: list[dict] = []
    failed: list[dict] = []
    for target, kind in targets.items():
        task = Task.of(scans.table, target, kind)
        folds = repeated_folds(task.table, target, n_repeats=n_repeats, seed=seed)
        plans = {"": (folds, methods)}
        if by_site and task.sites is not None:
            plans["one site left out"] = (leave_one_site_out(task.table), by_site)
        # Features of the same scans serve several targets, except for the confounds.
        features = dict(shared.get(tuple(task.rows), {}))
        selected = task.select(scans)
        for condition, (plan_folds, plan_methods) in plans.items():
            done = evaluate(
                selected,
                task,
                plan_folds,
                plan_methods,
                features=features,
                seed=seed,
                **settings,
            )
            rows += report(done, condition=condition, n_boot=n_boot, seed=seed, **about)
            failed += [{"task": target, **fold} for fold in done.failed]
        for name in ("confounds", "site"):
            features.pop(name, None)
        shared[tuple(task.rows)] = features
    return rows, failed
