"""Targets predicted from scans: every method on the same folds, with intervals, controls and comparisons."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.cohorts import Cohort, Index, index
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.data.store import Store
from mnemodyn.evaluate.features import CONFOUNDS, confounds, connectivity, frames
from mnemodyn.evaluate.heads import Combat, Features, Fold, Standardised, Tangent, rotate
from mnemodyn.evaluate.scores import (
    SCORES,
    chance,
    corrected_t,
    interval,
    measure,
    resamples,
    t_interval,
)
from mnemodyn.files import write_json
from mnemodyn.readout import READOUTS, MnemoDynEncoder
from mnemodyn.splits import Folds, inner_splits, leave_one_site_out, repeated_folds


def open_scans(cohort: Cohort, source: str | Path, *, workers: int = 1) -> Index | Store:
    """Scans of a cohort's folder or of a store, with their ``table``, the ``excluded`` and whether ``simulated``."""
    return (
        Store(source)
        if (Path(source) / "store.json").is_file()
        else index(cohort, source, workers=workers)
    )


class Rows(Sequence):
    """Some of the scans of a sequence."""

    def __init__(self, scans: Sequence[Scan], rows: Iterable[int]):
        self.scans, self.rows = scans, [int(i) for i in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return self.scans[self.rows[i]]


POOLED = tuple(name for name in READOUTS if name != "last_frame")
ONE_UNIT = ("latent_correlation", "response", "adapted")  # read-outs of one unit throughout
LOW_MOTION = 0.2  # mm
N_INNER = 3  # folds within the training folds, by which everything is chosen


@dataclass(frozen=True)
class Method:
    """A way from scans to predictions.

    `head` is one of :class:`mnemodyn.evaluate.heads.Fold`, or ``finetune``. `blocks` are its features: ``fc``,
    ``combat`` (FC harmonised between sites), ``tangent``, ``confounds``, ``site``, ``model:READOUT``,
    ``untrained:READOUT``; for ``finetune``, what is trained: ``draft``, ``last`` or ``all``. Only so many `repeats` of
    the folds are run for a method that costs much. Confounds to `remove` are regressed out in the training folds.
    """

    head: str
    blocks: tuple[str, ...]
    repeats: int | None = None
    remove: tuple[str, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        return ("scans",) if self.head == "finetune" else self.blocks

    @property
    def needs_checkpoint(self) -> bool:
        return any(":" in block or block == "scans" for block in self.features)


METHODS = {
    "confounds": Method("linear", ("confounds",)),
    "site": Method("linear", ("site",)),
    "fc": Method("linear", ("fc",)),
    "fc_unmoved": Method("unmoved", ("fc",)),
    "fc_harmonised": Method("linear", ("fc",), 1, CONFOUNDS[:-1]),
    "fc_combat": Method("linear", ("combat",), 1),
    "fc_pca": Method("pca", ("fc",), 1),
    "fc_mlp": Method("mlp", ("fc",), 1),
    "tangent": Method("linear", ("tangent",), 1),
    "model": Method("pick", tuple(f"model:{name}" for name in POOLED), 2),
    "model+fc": Method("join", ("fc", *(f"model:{name}" for name in POOLED)), 2),
    "untrained": Method("pick", tuple(f"untrained:{name}" for name in POOLED), 1),
    "last_frame": Method("linear", ("model:last_frame",), 1),
    "draft_head": Method("finetune", ("draft",), 1),
    "finetune_last": Method("finetune", ("last",), 1),
    "finetune_all": Method("finetune", ("all",), 1),
    **{name: Method("linear", (f"model:{name}",), 1) for name in POOLED},
    "adapted": Method("linear", ("model:adapted",)),
    "adapted+fc": Method("join", ("fc", "model:adapted")),
}


@dataclass(frozen=True)
class Task:
    """A target and the scans that have it.

    `table` has a row a scan that has the target: ``participant_id`` and what else is known (``family, site, age, sex,
    mean_fd, n_frames``); `rows` are those of the original table, which has `n_missing` others. `kind` is
    ``classification`` or ``regression``; `y` (scan,) is 1 for the second of the sorted `classes` and 0 for the first,
    or the target.
    """

    table: pd.DataFrame = field(repr=False)
    target: str
    kind: str
    y: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    rows: np.ndarray = field(repr=False)
    n_missing: int

    @classmethod
    def of(cls, table: pd.DataFrame, target: str, kind: str) -> "Task":
        """The task of one column; DataError without it, for classes that are not two, or numbers that are all equal."""
        if target not in table:
            raise DataError(
                f"target must be a column of the cohort's table, got {target!r}; it has {list(table)}"
            )
        if kind not in SCORES:
            raise DataError(f"kind must be one of {tuple(SCORES)}, got {kind!r}")
        known = table[target].notna()
        part = table[known].reset_index(drop=True)
        part = part.assign(
            **{c: part[c].replace("", None) for c in ("site", "family") if c in part}
        )
        values = part[target]
        classes = tuple(sorted(map(str, values.unique()))) if kind == "classification" else ()
        if values.nunique() < 2:
            got = (
                f"only {values.iloc[0]!r}"
                if len(values)
                else "no value at all (`mnemodyn index` says why)"
            )
            raise DataError(f"{target}: two classes (or different numbers) are needed, got {got}")
        if len(classes) > 2:
            raise DataError(
                f"{target}: two classes are expected, got {classes}; map or exclude some in the cohort"
            )
        y = (
            (values.astype(str) == classes[1]).to_numpy(float)
            if classes
            else values.to_numpy(float)
        )
        return cls(part, target, kind, y, classes, np.flatnonzero(known), int((~known).sum()))

    @property
    def people(self) -> pd.Series:
        """Participant of every scan."""
        return self.table["participant_id"]

    @property
    def families(self) -> np.ndarray:
        """Family of every scan, the participant where none is known."""
        return (
            self.table["family"].fillna(self.people) if "family" in self.table else self.people
        ).to_numpy()

    @property
    def sites(self) -> np.ndarray | None:
        """Site of every scan; None where one is unknown, or there is one only."""
        sites = self.table.get("site")
        return (
            None
            if sites is None or sites.isna().any() or sites.nunique() < 2
            else sites.to_numpy(str)
        )

    @property
    def metric(self) -> str:
        """The metric that comes first."""
        return SCORES[self.kind][0]


def permuted(task: Task, seed: int) -> Task:
    """The task with its labels shuffled over participants: what a pipeline finds in nothing."""
    _, first, person = np.unique(task.people, return_index=True, return_inverse=True)
    return replace(task, y=np.random.default_rng(seed).permutation(task.y[first])[person])


class noise_scans(Rows):
    """Scans of white noise in the shape of others: whatever is predicted from them, the pipeline made up.

    Length, repetition time and censoring stay, and may tell sites apart. With `equal` they are those of the shortest
    scan, of the most frequent repetition time and of nobody: then the noise is all that there is.
    """

    def __init__(self, scans: Sequence[Scan], seed: int, *, equal: bool = False):
        super().__init__(scans, range(len(scans)))
        self.seed, self.equal = seed, equal
        if equal:
            shapes = [(len(scan.values), scan.t_r) for scan in scans]
            self.n_frames = min(n for n, _ in shapes)
            self.t_r = Counter(t_r for _, t_r in shapes).most_common(1)[0][0]

    def __getitem__(self, i):
        scan = super().__getitem__(i)
        values = (
            np.random.default_rng([self.seed, i])
            .standard_normal(scan.values.shape)
            .astype(np.float32)
        )
        if self.equal:
            return replace(scan, values=values[: self.n_frames], censored=None, t_r=self.t_r)
        return replace(scan, values=values)


@dataclass(frozen=True)
class Evaluation:
    """Predictions of every method, (repeat, scan), NaN where a fold failed; what was `chosen` in every fold; and the
    ``repeat, fold, error`` of those that `failed`."""

    task: Task
    folds: Folds
    predictions: dict[str, np.ndarray]
    chosen: dict[str, list[str]]
    failed: dict[str, list[dict]]


def blocks_of(
    scans: Sequence[Scan],
    task: Task,
    names: Sequence[str],
    checkpoint: Checkpoint | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Features]:
    """Features by name, see :class:`Method`; DataError for an unknown one, or where a checkpoint is needed."""
    found: dict[str, Features] = {}
    for kind, untrained in (("model", None), ("untrained", seed)):
        wanted = tuple(dict.fromkeys(n.split(":", 1)[1] for n in names if n.startswith(f"{kind}:")))
        if not wanted:
            continue
        if checkpoint is None:
            raise DataError(
                f"read-outs {wanted} need a checkpoint; name one, or leave the method out"
            )
        encoder = MnemoDynEncoder(checkpoint, wanted, untrained=untrained, cache=cache)
        for name, values in encoder.blocks(scans).items():
            alike = name in ONE_UNIT
            found[f"{kind}:{name}"] = (
                Features(values.astype(np.float32)) if alike else Standardised(values)
            )
    for name in [name for name in names if name not in found]:
        if name == "fc":
            found[name] = Features(connectivity(scans))
        elif name == "combat":
            if task.sites is None:
                raise DataError(
                    "ComBat needs sites, and the site of every participant; leave fc_combat out"
                )
            found[name] = Combat(
                found["fc"].values if "fc" in found else connectivity(scans), sites=task.sites
            )
        elif name == "tangent":
            found[name] = Tangent([frames(scan) for scan in scans])
        elif name in ("confounds", "site"):
            which = CONFOUNDS if name == "confounds" else (name,)
            found[name] = Standardised(confounds(task.table, task.target, which))
        else:
            known = f"fc, combat, tangent, confounds, site, model:... of {POOLED}"
            raise DataError(f"unknown features {name!r}; known are {known}")
    return found


def _one_fold(
    methods: dict[str, Method], fold: Fold, task: Task, paths: dict[str, Path]
) -> dict[str, tuple]:
    """Prediction of the test scans and what was chosen, by method; or None and the error."""
    found: dict[str, tuple] = {}
    for name, method in methods.items():
        path = paths.get(name)
        if path is not None and path.is_file():
            kept = json.loads(path.read_text())
            found[name] = np.array(kept["prediction"]), kept["chosen"]
            continue
        try:
            if not fold.splits:
                if task.kind == "classification" and len(np.unique(task.y[fold.train])) < 2:
                    raise DataError("the training scans are of one class")
                fold.splits = inner_splits(
                    task.y[fold.train], task.families[fold.train], N_INNER, fold.seed
                )
            if method.head == "finetune":
                from mnemodyn.evaluate.finetune import finetune

                series, rows = fold.blocks["scans"], (task.y, fold.train, fold.test)
                how: dict[str, Any] = {
                    "kind": task.kind,
                    "split": fold.splits[0],
                    "seed": fold.seed,
                }
                prediction, chosen = finetune(series, *rows, what=method.blocks[0], **how)
            else:
                remove = (
                    confounds(task.table, task.target, method.remove) if method.remove else None
                )
                prediction, chosen = fold.predict(method.head, method.blocks, remove=remove)
        except (
            Exception
        ) as error:  # of whatever kind: it is reported with the fold, and the others go on
            found[name] = None, f"{type(error).__name__}: {error}"
            continue
        found[name] = prediction, chosen
        if path is not None:
            write_json(path, {"prediction": prediction, "chosen": chosen})
    return found


def evaluate(
    scans: Sequence[Scan],
    task: Task,
    folds: Folds,
    methods: Sequence[str] | dict[str, Method] = ("confounds", "fc"),
    *,
    checkpoint: Checkpoint | None = None,
    cache: str | Path | None = None,
    n_jobs: int = 1,
    seed: int = 0,
    blocks: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Predict every participant from the others, by every method, on the same folds.

    Parameters
    ----------
    scans : sequence of Scan
        Those of `task.table`, in its order; read one at a time.
    methods : sequence of str, or dict of str to Method
        Names in `METHODS`, or methods of one's own; `checkpoint` is for those that read a network.
    cache : str or Path, optional
        Folder that keeps read-outs and each fold's predictions, so that an interrupted evaluation goes on.
    n_jobs : int
        Processes; each takes a fold.
    blocks : dict, optional
        Features computed before, see ``blocks_of``; those that are missing are computed and added. Fine-tuning keeps
        its `Series` there, as ``scans``.
    say : callable
        Is given a line a fold.

    Raises
    ------
    DataError
        For an unknown method, scans that do not fit the table, or a method that needs a checkpoint without one.
    """
    if not isinstance(methods, dict):
        if unknown := [name for name in methods if name not in METHODS]:
            raise DataError(f"method must be one of {', '.join(METHODS)}, got {unknown[0]!r}")
        methods = {name: METHODS[name] for name in methods}
    if len(scans) != len(task.table):
        raise DataError(
            f"scans must be those of the task's table, {len(task.table)}, got {len(scans)}"
        )
    blocks = {} if blocks is None else blocks
    tuned = {m.blocks for m in methods.values() if m.head == "finetune"}
    missing = dict.fromkeys(
        b for m in methods.values() for b in m.features if b not in blocks and b != "scans"
    )
    blocks |= blocks_of(scans, task, list(missing), checkpoint, cache, seed)
    if tuned and "scans" not in blocks:
        from mnemodyn.evaluate.finetune import Series

        if checkpoint is None:
            raise DataError("fine-tuning needs a checkpoint; name one, or leave the method out")
        blocks["scans"] = Series.of(checkpoint, scans)
    if ("draft",) in tuned:
        blocks["scans"].freeze(task.kind)  # before the processes part
    people = task.people
    work = list(folds.split(people))
    keys = {}
    if cache is not None:
        code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        about = (code, task.y, task.target, folds.digest, list(people), N_INNER, seed)
        for name, method in methods.items():
            read = [
                blocks[b].digest() if b == "scans" else blocks[b].values for b in method.features
            ]
            keys[name] = Path(cache) / "folds" / joblib.hash((about, method, read))

    def jobs() -> Iterator:
        for repeat, number, train, test in work:
            these = {
                name: m for name, m in methods.items() if m.repeats is None or repeat < m.repeats
            }
            used = {b: blocks[b] for m in these.values() for b in m.features}
            paths = {name: keys[name] / f"{repeat}-{number}.json" for name in these if name in keys}
            fold = Fold(used, task.y, train, test, task.kind, [], seed)
            yield joblib.delayed(_one_fold)(these, fold, task, paths)

    repeats = {n: min(folds.n_repeats, m.repeats or folds.n_repeats) for n, m in methods.items()}
    predictions = {name: np.full((n, len(people)), np.nan) for name, n in repeats.items()}
    found = Evaluation(
        task, folds, predictions, {name: [] for name in methods}, {name: [] for name in methods}
    )
    results = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(jobs())
    for done, ((repeat, number, _, test), answers) in enumerate(zip(work, results, strict=True), 1):
        for name, (prediction, note) in answers.items():
            if prediction is None:
                found.failed[name].append(
                    {"repeat": repeat, "fold": folds.names[number], "error": note}
                )
            else:
                found.predictions[name][repeat, test] = prediction
                found.chosen[name].append(note)
        n_failed = sum(map(len, found.failed.values()))
        say(f"fold {done} of {len(work)}" + (f", {n_failed} FAILED so far" if n_failed else ""))
    return found


def _scores(
    evaluation: Evaluation,
    name: str,
    weights: np.ndarray,
    rows: np.ndarray | slice = slice(None),
    repeats: int = 99,
) -> dict[str, np.ndarray]:
    """Scores averaged over repeats, each (resample,)."""
    task, sites = evaluation.task, evaluation.task.sites
    group = None if sites is None else sites[rows]
    found = [
        measure(task.kind, task.y[rows], p[rows], weights[:, rows], fold=fold[rows], group=group)
        for fold, p in zip(
            evaluation.folds.of(task.people), evaluation.predictions[name][:repeats], strict=False
        )
    ]
    return {metric: np.mean([f[metric] for f in found], axis=0) for metric in found[0]}


def _by_fold(evaluation: Evaluation, name: str, repeats: int = 99) -> np.ndarray:
    """The first metric in every fold."""
    task, found = evaluation.task, []
    for fold, p in zip(
        evaluation.folds.of(task.people), evaluation.predictions[name][:repeats], strict=False
    ):
        one = (fold == np.unique(fold)[:, None]).astype(float)
        found.append(measure(task.kind, task.y, p, one, fold=fold)[task.metric])
    return np.concatenate(found)


def report(
    evaluation: Evaluation, *, n_boot: int = 1000, seed: int = 0, baseline: str = "fc"
) -> dict:
    """Scores, intervals and comparisons of an evaluation, fit for JSON.

    Returns
    -------
    dict
        ``target``, ``kind``, ``classes``, ``n`` (participants), ``n_scans``, ``n_missing`` (scans without the
        target), ``folds`` (``digest``, ``n_folds``, ``n_repeats``).

        ``rows``, one a method: ``method``, ``n``, ``n_folds``, ``failed``, each metric as ``{value, low, high}`` (from
        `n_boot` resamples of participants), ``fold_mean`` and ``fold_sd`` (of the first metric over folds, such as
        sites), ``p`` (of the first metric against chance, corrected resampled t-test), ``fd_r`` (correlation of
        predictions with mean FD), ``site_share`` (of their variance), ``low_motion`` (the scores at mean FD < 0.2 mm),
        ``chosen`` (the most frequent choice).

        ``comparisons`` of every method with the `baseline`, on the folds that both have: ``method, baseline, metric,
        difference`` (paired bootstrap) and ``p`` (corrected t-test).
    """
    task, folds, people = evaluation.task, evaluation.folds, evaluation.task.people
    weights = resamples(people, n_boot, seed)
    rows, comparisons = [], []
    fd = (
        task.table["mean_fd"].to_numpy(float)
        if "mean_fd" in task.table
        else np.full(len(people), np.nan)
    )
    known, calm = np.isfinite(fd), np.flatnonzero(fd < LOW_MOTION)
    share = float(np.mean([len(test) / len(train) for _, _, train, test in folds.split(people)]))
    whole = {name: p for name, p in evaluation.predictions.items() if not np.isnan(p).any()}
    for name in evaluation.predictions:
        row: dict[str, Any] = {"method": name, "n": int(people.nunique())}
        row |= {"n_folds": len(evaluation.chosen[name]), "failed": evaluation.failed[name]}
        rows.append(row)
        if name not in whole:
            row |= dict.fromkeys(SCORES[task.kind], interval(np.full(2, np.nan)))
            continue
        row |= {metric: interval(v) for metric, v in _scores(evaluation, name, weights).items()}
        by_fold = _by_fold(evaluation, name)
        row["fold_mean"] = float(np.nanmean(by_fold)) if np.isfinite(by_fold).any() else None
        row["fold_sd"] = (
            float(np.nanstd(by_fold, ddof=1)) if np.isfinite(by_fold).sum() > 1 else None
        )
        row["p"] = corrected_t(by_fold - chance(task.metric), share)
        mean = whole[name].mean(0)
        varies = known.sum() > 2 and np.ptp(fd[known]) > 0 and np.ptp(mean[known]) > 0
        row["fd_r"] = float(np.corrcoef(mean[known], fd[known])[0, 1]) if varies else None
        if "site" in task.table and task.table["site"].nunique() > 1:
            between = (
                pd.Series(mean).groupby(task.table["site"].fillna("").to_numpy()).transform("mean")
            )
            row["site_share"] = (
                float(between.var() / mean.var(ddof=1)) if np.ptp(mean) else 0.0
            )  # eta squared
        if 10 <= len(calm) < len(fd) and len(np.unique(task.y[calm])) > 1:
            low_motion = {
                m: interval(v) for m, v in _scores(evaluation, name, weights, calm).items()
            }
            row["low_motion"] = {"n": int(people.iloc[calm].nunique())} | low_motion
        names = pd.Series(evaluation.chosen[name]).value_counts()
        row["chosen"] = f"{names.index[0]} ({names.iloc[0]} of {names.sum()})"
    for name in [name for name in whole if baseline in whole and name != baseline]:
        repeats = min(len(whole[name]), len(whole[baseline]))
        ours, theirs = (_scores(evaluation, m, weights, repeats=repeats) for m in (name, baseline))
        by_fold = _by_fold(evaluation, name, repeats) - _by_fold(evaluation, baseline, repeats)
        for metric in ours:
            comparisons.append(
                {"method": name, "baseline": baseline, "metric": metric, "repeats": repeats}
                | {"difference": interval(ours[metric] - theirs[metric])}
                | ({"p": corrected_t(by_fold, share)} if metric == task.metric else {})
            )
    return {
        "target": task.target,
        "kind": task.kind,
        "classes": list(task.classes),
        "n": int(people.nunique()),
        "n_scans": len(people),
        "n_missing": task.n_missing,
        "folds": {
            "digest": folds.digest,
            "n_folds": len(folds.names),
            "n_repeats": folds.n_repeats,
        },
        "rows": rows,
        "comparisons": comparisons,
    }


def draws(
    draw: Callable[[int], tuple[Sequence[Scan], Task]],
    folds: Folds,
    times: dict[str, int],
    *,
    blocks: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, dict]:
    """The first score where nothing can be known, many times: one draw may be lucky, their mean belongs at chance.

    The spread over draws is wider than an interval over participants, which knows one training only. ``draw(i)`` gives
    scans and task, such as with labels shuffled by seed i; `times` are how often for each method. Settings are those of
    :func:`evaluate`, on the first repeat of the folds.

    Returns
    -------
    dict of str to dict
        Method -> ``n``, ``mean``, ``low``, ``high`` (95 % t interval of the mean), ``sd`` (over draws) and ``p`` of the
        mean against chance (t-test). Of many such intervals one in twenty misses.
    """
    once = replace(folds, test_fold=folds.test_fold[:1])
    values: dict[str, list[float]] = {name: [] for name in times}
    for i in range(max(times.values(), default=0)):
        these = [name for name, n in times.items() if i < n]
        scans, task = draw(i)
        found = evaluate(
            scans, task, once, these, blocks={} if blocks is None else blocks, **settings
        )
        for name in these:
            if not np.isnan(found.predictions[name]).any():
                values[name].append(float(np.nanmean(_by_fold(found, name))))
    results = {}
    for name, v in values.items():
        if len(v) > 1:
            mean = t_interval(v)
            p = float(stats.ttest_1samp(v, chance(task.metric)).pvalue) if np.ptp(v) else None
            results[name] = {
                "n": len(v),
                "mean": mean.pop("value"),
                **mean,
                "sd": float(np.std(v, ddof=1)),
                "p": p,
            }
    return results


def study(
    scans: Sequence[Scan],
    table: pd.DataFrame,
    targets: dict[str, str],
    methods: Sequence[str],
    *,
    n_repeats: int = 5,
    control: Sequence[str] = (),
    shuffles: dict[str, int] | None = None,
    noises: dict[str, int] | None = None,
    by_site: Sequence[str] = (),
    shots: Sequence[str] = (),
    only: Sequence[str] = (),
    n_boot: int = 1000,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> dict[str, dict]:
    """Every target of a cohort, by every method, with controls.

    Parameters
    ----------
    table : DataFrame
        A row a scan.
    targets : dict of str to str
        Name -> ``classification`` or ``regression``.
    methods, by_site : sequence of str
        Those that are tested in `n_repeats` of five folds, and with sites left out where there are two or more.
    control : sequence of str
        Methods that are also run with shuffled labels and, for the first target, on scans of white noise (fine-tuning
        but on those as long as theirs).
    shuffles, noises : dict of str to int
        Method -> how often it is run with shuffled labels, and on noise and nothing else, for :func:`draws`.
    shots : sequence of str
        Features for :func:`few_shot`.
    only : sequence of str
        Parts of the answer to compute; all of them where empty.
    say : callable
        Is given a line a fold.
    **settings
        Of :func:`evaluate`.

    Returns
    -------
    dict of str to dict
        Target -> ``kfold``, ``leave_one_site_out``, ``permuted``, ``noise``, ``noise_equal`` (each a
        :func:`report`), ``permutations`` and ``noises`` (each of :func:`draws`), ``few_shot``.
    """
    found: dict[str, dict] = {}
    shared: dict[tuple, dict[str, Any]] = {}
    for number, (target, kind) in enumerate(targets.items()):
        task = Task.of(table, target, kind)
        some = Rows(scans, task.rows)
        folds = repeated_folds(task.table, target, n_repeats=n_repeats, seed=seed)
        once = replace(folds, test_fold=folds.test_fold[:1])
        # Features other than the confounds do not depend on the target, where the same scans have it.
        key = tuple(task.rows)
        blocks = {k: v for k, v in shared.get(key, {}).items() if k not in ("confounds", "site")}
        plans: dict[str, tuple] = {"kfold": (some, task, folds, methods)}
        if by_site and task.sites is not None:
            plans["leave_one_site_out"] = (some, task, leave_one_site_out(task.table), by_site)
        if control:
            plans["permuted"] = (some, permuted(task, seed), once, control)
        if control and number == 0:
            plans["noise"] = (noise_scans(some, seed), task, once, control)
            cheap = [name for name in control if METHODS[name].head != "finetune"]
            plans["noise_equal"] = (noise_scans(some, seed, equal=True), task, once, cheap)
        found[target] = {}
        for plan in [plan for plan in plans if not only or plan in only]:
            done = evaluate(
                *plans[plan],
                blocks={} if plan.startswith("noise") else blocks,
                seed=seed,
                say=partial(lambda where, line: say(f"{where}: {line}"), f"{target}, {plan}"),
                **settings,
            )
            found[target][plan] = report(done, n_boot=n_boot, seed=seed)
        quiet = {k: v for k, v in settings.items() if k != "cache"} | {"seed": seed}
        if shuffles and (not only or "permutations" in only):
            shuffled = partial(lambda some, task, i: (some, permuted(task, seed + i)), some, task)
            found[target]["permutations"] = draws(shuffled, folds, shuffles, blocks=blocks, **quiet)
            say(f"{target}: labels shuffled {shuffles} times")
        if noises and (not only or "noises" in only):
            noise = partial(
                lambda some, task, i: (noise_scans(some, seed + i, equal=True), task), some, task
            )
            found[target]["noises"] = draws(
                noise, folds, noises, cache=settings.get("cache"), **quiet
            )
            say(f"{target}: noise drawn {noises} times")
        shared[key] = blocks
        if shots and (not only or "few_shot" in only):
            found[target]["few_shot"] = few_shot(
                {name: blocks[name] for name in shots}, task, once, seed=seed
            )
    return found


def planted(
    scans: Sequence[Scan], task: Task, truth: dict, *, n_boot: int = 1000, seed: int = 0
) -> dict:
    """The effect planted in a SIMULATED cohort, and what connectivity of the task's scans shows of it.

    ``planted`` and ``found`` (``value``, ``low``, ``high``) are the difference of the target's own edges between the
    classes, or for one SD of the target, in SDs of the variation between people. `truth` is what ``simulate_cohort``
    returned.
    """
    effect = truth["effects"][task.target]
    inside = np.isin(np.arange(len(scans[0].parcels)), effect["block"])
    edges = np.outer(inside, inside)[np.tril_indices(len(inside), -1)]
    strength = np.tanh(connectivity(scans)[:, edges]).mean(1) / truth["edge_sd"]
    z = task.y - 0.5 if task.classes else (task.y - task.y.mean()) / float(effect["per"].split()[0])
    weights = resamples(task.people, n_boot, seed)
    total = weights.sum(1)
    means = [weights @ v / total for v in (z, strength)]
    slopes = (weights @ (z * strength) / total - means[0] * means[1]) / (
        weights @ z**2 / total - means[0] ** 2
    )
    return {"planted": effect["d"], "found": interval(slopes)}


def published(path: str | Path, cohort: str, target: str) -> pd.DataFrame:
    """Rows of a table of published results (``study, method, cohort, target, metric, value, sd, source``) for a target.

    Names are compared by their letters and digits alone.
    """
    table = pd.read_csv(path)
    plain = {
        c: table[c].str.lower().str.replace(r"[^a-z0-9]", "", regex=True)
        for c in ("cohort", "target")
    }
    wanted = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in (cohort, target)]
    return table[(plain["cohort"] == wanted[0]) & (plain["target"] == wanted[1])].reset_index(
        drop=True
    )


def few_shot(
    blocks: dict[str, Features],
    task: Task,
    folds: Folds,
    shots: Sequence[int] = (1, 2, 5, 10, 20, 50),
    *,
    seed: int = 0,
) -> list[dict]:
    """How the first metric grows with labelled participants: `shots` of each class, drawn from the training folds.

    The penalty cannot be chosen with so few: it is 1 throughout. Rows are ``features``, ``shots``, ``value`` (mean over
    folds), ``sd`` (over folds), ``n_folds``.
    """
    people, rows = task.people.to_numpy(), []
    for name, block in blocks.items():
        for k in shots:
            found = []
            for number, (_, _, train, test) in enumerate(folds.split(people)):
                rng = np.random.default_rng([seed, k, number])
                first = train[np.unique(people[train], return_index=True)[1]]
                sides = [first[task.y[first] == c] for c in (0, 1)] if task.classes else [first]
                if min(map(len, sides)) < k or k * len(sides) < 2:
                    continue
                few = np.concatenate([rng.choice(side, k, replace=False) for side in sides])
                a, b = rotate(block.products(few), few, test)
                model = (LogisticRegression if task.classes else Ridge)().fit(a, task.y[few])
                p = model.decision_function(b) if task.classes else model.predict(b)
                ones, one = np.ones((1, len(test))), np.zeros(len(test))
                found.append(measure(task.kind, task.y[test], p, ones, fold=one)[task.metric][0])
            if found:
                score = {
                    "value": float(np.nanmean(found)),
                    "sd": float(np.nanstd(found)),
                    "n_folds": len(found),
                }
                rows.append({"features": name, "shots": k} | score)
    return rows


def transfer(
    features: tuple[np.ndarray, np.ndarray],
    source: Task,
    target: Task,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict:
    """Zero-shot: a head fitted on one cohort, tested on another that it knows nothing of.

    `features` of the source's and the target's scans, (scan, feature) each, are of one unit: connectivity in one atlas,
    or that of one network. Tasks are of one kind, with the same classes.

    Returns
    -------
    dict
        ``n_source``, ``n``, ``chosen``, and each metric as ``{value, low, high}``, from `n_boot` resamples of the
        target's participants.

    Raises
    ------
    DataError
        If the tasks differ in kind or classes, or the features in number.
    """
    tasks = [(task.kind, task.classes) for task in (source, target)]
    if tasks[0] != tasks[1]:
        raise DataError(f"source and target must be one task, got {tasks[0]} and {tasks[1]}")
    if features[0].shape[1] != features[1].shape[1]:
        raise DataError(
            f"features must be the same, got {features[0].shape[1]} and {features[1].shape[1]} of them"
        )
    train, test = np.split(np.arange(len(source.y) + len(target.y)), [len(source.y)])
    splits = inner_splits(source.y, source.families, N_INNER, seed)
    y = np.concatenate([source.y, np.zeros(len(test))])
    fold = Fold({"x": Features(np.vstack(features))}, y, train, test, source.kind, splits)
    p, chosen = fold.predict("linear", ["x"])
    scores = measure(
        target.kind, target.y, p, resamples(target.people, n_boot, seed), fold=np.zeros(len(test))
    )
    counts = {
        "n_source": int(source.people.nunique()),
        "n": int(target.people.nunique()),
        "chosen": chosen,
    }
    return counts | {metric: interval(values) for metric, values in scores.items()}
