"""Targets predicted from scans that are cut short: features of the first frames, on the same people and folds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.base import BaseEstimator, TransformerMixin

from lib import figures
from lib.plots_people import NAMES
from mnemodyn.data.scans import Collection, Scan
from mnemodyn.evaluate.methods import (
    METHODS,
    Features,
    Method,
    TangentSpace,
    confounds,
    connectivity,
    covariances,
    frames,
)
from mnemodyn.evaluate.scores import CHANCE, SCORES
from mnemodyn.evaluate.study import Task, evaluate, report
from mnemodyn.results import label
from mnemodyn.splits import Folds

N_FRAMES = "number of frames only"


class CutScans(Sequence):
    """Scans of at most `n_frames` frames, their first ones; 0 stands for all. A shorter scan stays as it is."""

    def __init__(self, scans: Sequence[Scan], n_frames: int):
        self.scans = scans
        self.n_frames = n_frames or None

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, i: int) -> Scan:
        scan = self.scans[i]
        censored = scan.censored
        if censored is not None:
            censored = censored[: self.n_frames]
        return replace(scan, values=scan.values[: self.n_frames], censored=censored)


class AdaptedTangent(TransformerMixin, BaseEstimator):
    """Covariances to which the network's front end adapts, in the tangent space at the group's covariance.

    As of :class:`~mnemodyn.model.front.Front` without modes where nothing is hidden: the shrunk covariance of the
    training scans counts as `weight` frames. Rows are those of :func:`products`.
    """

    def __init__(self, weight: float = 200.0, shrinkage: float = 0.05):
        self.weight = weight
        self.shrinkage = shrinkage

    def fit(self, rows: np.ndarray, y: Any = None) -> "AdaptedTangent":
        """Find the group's covariance, over all frames of the training scans."""
        n_frames, found = _unpacked(rows)
        mean = np.average(found, axis=0, weights=n_frames)
        noise = np.trace(mean) / len(mean) * np.eye(len(mean))
        self.group_ = (1 - self.shrinkage) * mean + self.shrinkage * noise
        self.space_ = TangentSpace().fit(self.group_[None])
        return self

    def transform(self, rows: np.ndarray) -> np.ndarray:
        """Steps from the group's covariance, (scan, parcel * parcel)."""
        n_frames, found = _unpacked(rows)
        share = n_frames / (n_frames + self.weight)
        return self.space_.transform(self.group_ + share[:, None, None] * (found - self.group_))


def products(scans: Sequence[Scan]) -> np.ndarray:
    """Number of frames and plain covariance of every scan's z-scored frames, (scan, 1 + parcel * parcel)."""
    rows = []
    for scan in scans:
        x = frames(scan).astype(float)
        rows.append(np.append(len(x), (x.T @ x / len(x)).ravel()).astype(np.float32))
    return np.array(rows)


def _unpacked(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n_parcels = int(np.sqrt(rows.shape[1] - 1))
    return rows[:, 0], rows[:, 1:].reshape(-1, n_parcels, n_parcels)


class Shared(Features):
    """Features whose kernel of a fold is computed once, for all targets."""

    def __init__(self, values: np.ndarray, transformer: Any = None):
        super().__init__(values, transformer)
        self.kernels: dict[bytes, np.ndarray] = {}

    def kernel(self, train: np.ndarray) -> np.ndarray:
        key = train.tobytes()
        if key not in self.kernels:
            self.kernels[key] = super().kernel(train)
        return self.kernels[key]


#: Name of a method, and its features of cut scans. Its head is the linear one.
FEATURES: dict[str, Callable[[Sequence[Scan]], Features]] = {
    "fc": lambda scans: Shared(connectivity(scans)),
    "tangent": lambda scans: Shared(covariances(scans).astype(np.float32), TangentSpace()),
    "adapted": lambda scans: Shared(products(scans), AdaptedTangent()),
}


def with_all(scans: Collection, targets: Sequence[str]) -> Collection:
    """The scans of those who have every target, so that all targets have the same people and folds."""
    known = scans.table[list(targets)].notna().all(axis=1)
    return scans.select(np.flatnonzero(known))


def predictions(
    scans: Collection,
    targets: Mapping[str, str],
    lengths: Sequence[int],
    folds: Folds,
    *,
    n_boot: int = 1000,
    **settings: Any,
) -> list[dict]:
    """Every target from the first frames of scans, as rows of results; a length of 0 stands for whole scans.

    `settings` are those of :func:`mnemodyn.evaluate.study.evaluate`.
    """
    about = {"data": scans.name, "kind": "SIMULATED" if scans.simulated else "real"}
    tasks = [Task.of(scans.table, target, kind) for target, kind in targets.items()]
    rows: list[dict] = []
    for length in lengths:
        cut = CutScans(scans, length)
        features = {name: make(cut) for name, make in FEATURES.items()}
        methods = {name: Method("linear", (name,)) for name in FEATURES}
        for task in tasks:
            found = evaluate(cut, task, folds, methods, features=features, **settings)
            words = f"{length} frames" if length else "whole scans"
            rows += report(found, condition=words, n_boot=n_boot, **about)
    return rows


def confounds_alone(
    scans: Collection,
    targets: Mapping[str, str],
    folds: Folds,
    *,
    n_boot: int = 1000,
    **settings: Any,
) -> list[dict]:
    """Every target from the confounds, and from the number of frames of whole scans alone, as far as they vary."""
    about = {"data": scans.name, "kind": "SIMULATED" if scans.simulated else "real"}
    rows = []
    for target, kind in targets.items():
        task = Task.of(scans.table, target, kind)
        n_frames = task.table[["n_frames"]].to_numpy(float)
        tried = {}
        if np.ptp(n_frames) > 0:
            tried[N_FRAMES] = Method("linear", ("frames",))
        # Whether a column has two different values; a missing number is none.
        if (np.nanstd(confounds(task.table, target), axis=0) > 0).any():
            tried["confounds"] = METHODS["confounds"]
        features = {"frames": Features(n_frames)}
        found = evaluate(scans, task, folds, tried, features=features, **settings)
        rows += report(found, condition="no frame read", n_boot=n_boot, **about)
    return rows


def by_length(rows: Sequence[Mapping[str, Any]], target: str, score: str) -> pd.DataFrame:
    """A target's rows of one score by length of scan, the whole ones last, without differences and conditions."""
    table = pd.DataFrame(list(rows))
    if "against" in table:
        table = table[table["against"].fillna("") == ""]
    words = table["task"].str.extract(rf"^{target}, (?:([0-9]+) frames|(whole) scans)$")
    table = table.assign(frames=words[0].fillna(words[1]))
    table = table[table["frames"].notna() & (table["score"] == score)]
    order = table["frames"].replace("whole", "inf").astype(float)
    return table.assign(order=order).sort_values("order", kind="stable")


def figure(rows: Sequence[Mapping[str, Any]], targets: Mapping[str, str]) -> Figure:
    """The first score of each target by length of scan, a panel a target and a line a method; chance is dotted."""
    drawn, axes = figures.panels(len(targets), 3.2)
    for ax, (target, kind) in zip(axes, targets.items(), strict=True):
        score = SCORES[kind][0]
        shown = by_length(rows, target, score)
        places = list(dict.fromkeys(shown["frames"]))
        for number, (method, part) in enumerate(shown.groupby("method", sort=False)):
            # Set a little apart, so that the intervals do not hide one another.
            x = [places.index(frames) + 0.12 * (number - 1) for frames in part["frames"]]
            style = {"fmt": f"{figures.MARKERS[number]}-", "color": figures.COLOURS[number]}
            ax.errorbar(
                x, part["value"], figures.errors(part), label=label(method), ms=4, lw=1, **style
            )
        ax.axhline(CHANCE[score], color="black", lw=0.8, ls=":")
        ax.set_xticks(range(len(places)), places)
        ax.set(xlabel="frames", ylabel=f"{target}: {NAMES[score]}")
    figures.legend_above(drawn, axes[0])
    return drawn
