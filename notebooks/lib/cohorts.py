"""What the pages about people show beside the evaluation: plans, controls, few labels, planted effects."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.decomposition import KernelPCA
from sklearn.linear_model import LogisticRegression, Ridge

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.cohorts import Cohort
from mnemodyn.data.scans import Scan, data_name
from mnemodyn.evaluate.methods import (
    CONFOUNDS,
    METHODS,
    Features,
    KernelMethod,
    Split,
    connectivity,
    residual_kernel,
)
from mnemodyn.evaluate.scores import CHANCE, interval, measure, resamples, t_interval
from mnemodyn.evaluate.study import N_INNER, Task, evaluate, fold_scores
from mnemodyn.model.network import MnemoDyn
from mnemodyn.splits import Folds, inner_splits, repeated_folds

CONDITIONS = {
    "permuted": "labels shuffled",
    "noise": "white noise",
    "noise_equal": "white noise of equal length",
}

PUBLISHED = ("abide", "adhd200", "adni", "hbn", "nkir", "ukb", "hcp_aging")  # in the publication
IN_WORDS = {"mean_fd": "motion", "n_frames": "length"}  # of confounds


def files_of(cohort: Cohort) -> str:
    """Markdown: where the files of a cohort are looked for in its folder, and the command for them."""
    table = cohort.phenotype
    matched = " and ".join(f"`{column}`" for column in table.match)
    lines = [f"**{data_name(cohort.name)}.** {cohort.description}"]
    lines += [f"The table `{table.file}` is matched by {matched}."]
    lines += [f"Command: `make book DATA=FOLDER COHORT={cohort.name}`", ""]
    lines += ["```text", *cohort.scans, table.file, "```"]
    return "\n".join(lines)


def planned(cohort: Cohort, table: pd.DataFrame) -> list[dict]:
    """What the page of a cohort computes, a row a target.

    Confounds and sites are those that `table`, a row a scan, knows.
    """
    rows = []
    for target in cohort.targets:
        unit = "years" if target.unit == "months" else target.unit  # as the index converts them
        what = f"a number, {unit}"
        if target.kind == "classification":
            what = " or ".join(sorted(set(target.mapping.values())))
        tested = "five folds of people"
        unknown = {target.name}
        if Task.of(table, target.name, target.kind).sites is None:
            unknown.add("site")
        else:
            tested += "; each site left out"
        known = [name for name in CONFOUNDS if name in table and table[name].notna().any()]
        names = [IN_WORDS.get(name, name) for name in known if name not in unknown]
        row = {"cohort": data_name(cohort.name), "target": target.name, "kind": what}
        rows.append({**row, "tested on": tested, "confounds": ", ".join(names)})
    return rows


def permuted(task: Task, seed: int) -> Task:
    """The task with its labels shuffled over participants, so that nothing can be predicted."""
    _, first, person = np.unique(task.people, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(task.y[first])
    return replace(task, y=shuffled[person])


def with_front(
    checkpoint: Checkpoint, scans: Sequence[Scan], settings: Mapping[str, Any]
) -> Checkpoint:
    """The network of a checkpoint behind a front end, which is fitted in closed form and without labels.

    `settings` are those of :class:`~mnemodyn.settings.ModelConfig` whose names begin with ``front_``.
    Where nothing is hidden a front end does nothing: what is read out of the blocks stays the same.
    """
    config = replace(checkpoint.model.config, front="gaussian", **settings)
    network = MnemoDyn(config)
    network.load_state_dict(checkpoint.model.state_dict(), strict=False)
    scaling = checkpoint.require_scaling()
    network.fit_front([scaling(scan) for scan in scans])
    return replace(checkpoint, model=network.eval())


class NoiseScans(Sequence):
    """White noise in the shape of scans: whatever is predicted from it, the pipeline made up.

    Length, repetition time and censoring stay those of each scan, and may tell sites apart. With
    `equal` all have the length of the shortest scan, the most frequent repetition time and no
    censored frame, so that there is nothing but noise.
    """

    def __init__(self, scans: Sequence[Scan], seed: int, *, equal: bool = False):
        self.scans = scans
        self.seed = seed
        self.equal = equal
        if equal:
            self.n_frames = min(scan.n_frames for scan in scans)
            self.t_r = Counter(scan.t_r for scan in scans).most_common(1)[0][0]

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, i):
        scan = self.scans[i]
        rng = np.random.default_rng([self.seed, i])
        values = rng.standard_normal(scan.values.shape).astype(np.float32)
        if self.equal:
            return replace(scan, values=values[: self.n_frames], censored=None, t_r=self.t_r)
        return replace(scan, values=values)


def control(
    condition: str,
    scans: Sequence[Scan],
    task: Task,
    folds: Folds,
    n_draws: Mapping[str, int],
    *,
    seed: int = 0,
    **settings: Any,
) -> list[dict]:
    """The first score where nothing can be predicted, drawn many times; its mean belongs at chance.

    One draw may be lucky, and an interval over participants does not know that, since it takes the
    trained models as given.

    Parameters
    ----------
    condition : {"permuted", "noise", "noise_equal"}
        Labels shuffled, or white noise in place of the scans, see `NoiseScans`.
    n_draws : dict of str to int
        Method -> number of draws, each on the first repeat of the folds.
    **settings
        Of :func:`mnemodyn.evaluate.study.evaluate`.

    Returns
    -------
    list of dict
        ``method, score, value, low, high, p, n``: mean over `n` draws, its 95 % t interval, and p of
        the mean against chance.
    """
    features: dict[str, Features] = {}
    values: dict[str, list[float]] = {method: [] for method in n_draws}
    for draw in range(max(n_draws.values(), default=0)):
        drawn, labels = scans, task
        if condition == "permuted":
            labels = permuted(task, seed + draw)
        else:
            drawn = NoiseScans(scans, seed + draw, equal=condition == "noise_equal")
            features = {}
        methods = [method for method, n in n_draws.items() if draw < n]
        found = evaluate(
            drawn, labels, folds.first_repeat(), methods, features=features, seed=seed, **settings
        )
        for method in found.complete():
            values[method].append(float(np.nanmean(fold_scores(found, method))))
    rows = []
    for method, scores in values.items():
        if scores:
            row = {"method": method, "score": task.metric, "n": len(scores), **t_interval(scores)}
            if np.ptp(scores) > 0:
                row["p"] = float(stats.ttest_1samp(scores, CHANCE[task.metric]).pvalue)
            rows.append(row)
    return rows


def controls(
    scans: Any,
    targets: Mapping[str, str],
    n_draws: Mapping[str, Mapping[str, int]],
    *,
    seed: int = 0,
    **settings: Any,
) -> list[dict]:
    """Every condition of `n_draws` (condition -> method -> draws) for every target, as rows of results."""
    about = {"data": scans.name, "kind": "SIMULATED" if scans.simulated else "real"}
    rows = []
    for target, kind in targets.items():
        task = Task.of(scans.table, target, kind)
        folds = repeated_folds(task.table, target, n_repeats=1, seed=seed)
        for condition, times in n_draws.items():
            words = {"task": f"{target}, {CONDITIONS[condition]}"}
            selected = task.select(scans)
            for row in control(condition, selected, task, folds, times, seed=seed, **settings):
                rows.append({**about, **words, **row})
    return rows


def few_shot(
    features: Mapping[str, Features],
    task: Task,
    folds: Folds,
    shots: Sequence[int] = (1, 2, 5, 10, 20, 50),
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """How the first score grows with labelled participants, `shots` of each class.

    They are drawn from the training folds. The penalty is 1 throughout, since with so few nothing
    can be chosen. Columns are ``features``, ``shots``, ``value`` (mean over folds), ``sd`` (over
    folds).
    """
    people = task.people.to_numpy()
    rows = []
    for name, block in features.items():
        for n_shots in shots:
            scores = []
            for number, (_, _, train, test) in enumerate(folds.split(people)):
                rng = np.random.default_rng([seed, n_shots, number])
                few = _draw_people(people, task, train, n_shots, rng)
                if few is not None:
                    scores.append(_score_with(block, task, few, test))
            if scores:
                row = {"features": name, "shots": n_shots, "value": float(np.mean(scores))}
                rows.append({**row, "sd": float(np.std(scores))})
    return pd.DataFrame(rows)


def _draw_people(
    people: np.ndarray, task: Task, train: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray | None:
    """A scan of each of `n` participants of each class (in all for numbers); None if there are fewer."""
    first = train[np.unique(people[train], return_index=True)[1]]
    sides = [first]
    if task.classes:
        sides = [first[task.y[first] == label] for label in (0, 1)]
    if min(len(side) for side in sides) < n or n * len(sides) < 2:
        return None
    return np.concatenate([rng.choice(side, n, replace=False) for side in sides])


def _score_with(block: Features, task: Task, few: np.ndarray, test: np.ndarray) -> float:
    kernel = residual_kernel(block.kernel(few), few)
    components = KernelPCA(kernel="precomputed")
    columns = components.fit_transform(kernel[np.ix_(few, few)])
    test_columns = components.transform(kernel[np.ix_(test, few)])
    if task.classes:
        model = LogisticRegression().fit(columns, task.y[few])
        prediction = model.decision_function(test_columns)
    else:
        prediction = Ridge().fit(columns, task.y[few]).predict(test_columns)
    one_fold = np.zeros(len(test))
    weights = np.ones((1, len(test)))
    scores = measure(task.kind, task.y[test], prediction, weights, fold=one_fold)
    return float(scores[task.metric][0])


def transfer(
    source_scans: Sequence[Scan], source: Task, target_scans: Sequence[Scan], target: Task
) -> dict[str, dict]:
    """Scores of connectivity's head when it is fitted on one cohort and tested on another.

    Both tasks are of one kind with the same classes, and both cohorts of one atlas. Scores have
    intervals over the target's participants.
    """
    values = np.vstack([connectivity(source_scans), connectivity(target_scans)])
    train = np.arange(len(source.y))
    test = np.arange(len(source.y), len(values))
    inner = inner_splits(source.y, source.families, N_INNER, 0)
    method = KernelMethod(METHODS["fc"], {"fc": Features(values)})
    prediction, _ = method.fit_predict(Split(train, test, source.y, source.kind, inner))
    weights = resamples(target.people, 1000, 0)
    scores = measure(target.kind, target.y, prediction, weights, fold=np.zeros(len(test)))
    return {score: interval(values) for score, values in scores.items()}


def planted(scans: Sequence[Scan], task: Task, truth: Mapping[str, Any]) -> dict:
    """The effect planted in a SIMULATED cohort, and what connectivity shows of it.

    `truth` is what ``simulate_cohort`` returned. ``planted``, and ``value`` with ``low`` and
    ``high``, are the difference of the target's own edges between the classes, or for one SD of the
    target, in SDs of the variation between people.
    """
    effect = truth["effects"][task.target]
    inside = np.isin(np.arange(len(scans[0].parcels)), effect["block"])
    edges = np.outer(inside, inside)[np.tril_indices(len(inside), -1)]
    strength = np.tanh(connectivity(scans)[:, edges]).mean(1) / truth["edge_sd"]
    z = task.y - task.y.mean()
    if not task.classes:
        # Such as "12.5 years": the SD that was planted.
        z = z / float(effect["per"].split()[0])
    weights = resamples(task.people, 1000, 0)
    weights = weights / weights.sum(1, keepdims=True)
    mean = weights @ z
    slope = weights @ (z * strength) - mean * (weights @ strength)
    slope /= weights @ z**2 - mean**2
    return {"planted": float(effect["d"]), **interval(slope)}


def published(path: str | Path, cohort: str, target: str) -> pd.DataFrame:
    """Rows of a table of published results for a cohort's target; only letters and digits are compared."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    table = pd.read_csv(path)
    of_cohort = table["cohort"].map(plain) == plain(cohort)
    of_target = table["target"].map(plain) == plain(target)
    return table[of_cohort & of_target].reset_index(drop=True)
