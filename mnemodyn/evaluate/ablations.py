"""What each part is worth: a grid of changed settings, every cell trained and scored beside the unchanged default.

The grid is a YAML file: ``cells``, a changed setting or a few each, and ``sizes``, which say with what settings, on
how many folds and with which cells it is run. A fold is another person to score, another to choose the epoch, and
another seed; the held-out people of the book are never read. Windows, masks and seeds of a fold are the same for all
cells, so that differences are paired. Where people of a cohort have a label, a second outcome is how well the frozen
network's read-out tells the people of the fold apart that it was not trained on.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import FeatureAgglomeration
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnemodyn.checkpoint import Checkpoint, from_pretrained
from mnemodyn.data.scaling import Scaling, moments
from mnemodyn.data.scans import DataError, Scan, fingerprint, split_participants
from mnemodyn.evaluate.features import connectivity
from mnemodyn.evaluate.metrics import hidden_sums
from mnemodyn.evaluate.scores import t_interval
from mnemodyn.files import write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn
from mnemodyn.parameters import ParameterError, build, check_settings, read_yaml, unknown
from mnemodyn.pretrain.config import Machine, configure
from mnemodyn.pretrain.objective import Masked
from mnemodyn.pretrain.windows import cut_windows
from mnemodyn.provenance import surroundings
from mnemodyn.readout import MnemoDynEncoder
from mnemodyn.splits import repeated_folds

DEFAULT = "default"
READOUT = "latent_correlation"  # what the second outcome is read from


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a trained network is given in the test; the defaults are the plain test.

    `window` is how many frames it is given at a time, 0 for the grid's; only one of `every` frames is kept, which is
    another repetition time; a share of frames is `censored`, that is missing.
    """

    window: int = 0
    every: int = 1
    censored: float = 0.0

    def __post_init__(self):
        check_settings(self)
        if self.every < 1 or self.censored >= 1:
            raise ValueError(
                f"every must be >= 1 and censored < 1, got {self.every} and {self.censored}"
            )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: what it is called, and what is changed in training or in the test.

    `settings` are those of pretraining, by name; ``n_train``, how many of the training scans are used; and ``merge``,
    how many times fewer parcels are left when similar ones are averaged. `test` are those of a :class:`Condition`,
    `against` is the cell that it is compared with.
    """

    name: str
    group: str
    label: str
    settings: Mapping[str, Any]
    test: Mapping[str, Any]
    against: str = DEFAULT


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid at one size: masks as `Masked`, windows of `n_timepoints` frames given to the network `window` at a time.

    The first of `cells` is the default, whose settings are `settings`. `n_test` people are held out from all `folds`;
    in each, `n_score` people are scored, and a tenth as many others, at least one, choose the epoch. `target`, of the
    cohort and of two classes, is the second outcome.
    """

    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]
    folds: int
    n_test: int = 2
    n_timepoints: int = 240
    window: int = 120
    hidden_share: float = 0.55
    mask_window: int = 15
    n_score: int = 1
    target: str = ""

    def training(self, cell: Cell) -> dict:
        """Settings that the cell's network is trained with."""
        return {**self.settings, **cell.settings}


def read_grid(path: str | Path, size: str) -> Grid:
    """A grid at one of its sizes; ParameterError for a name that is unknown, or a value that is refused."""
    content = read_yaml(Path(path).read_text(encoding="utf-8"))
    if size not in content["sizes"]:
        raise unknown("size", size, content["sizes"])
    chosen, cells = dict(content["sizes"][size]), []
    names = chosen.pop("cells", "all")
    for name in content["cells"] if names == "all" else [DEFAULT, *names]:
        if name not in content["cells"]:
            raise unknown("cell", name, content["cells"])
        given = {"label": name, "settings": {}, "test": {}, **content["cells"][name]}
        cells.append(build(Cell, {"name": name, **given}, f"entry of cell {name}:"))
    grid = build(Grid, {"cells": tuple(cells), **chosen}, f"entry of size {size}:")
    for cell in grid.cells:
        _configure(grid.training(cell))
        condition = build(Condition, cell.test, f"test of cell {cell.name}:")
        for frames in (condition.window or grid.window, condition.every):
            if grid.n_timepoints % frames:
                raise ParameterError(
                    f"cell {cell.name}: {frames} frames do not divide a window of {grid.n_timepoints}"
                )
        if cell.against not in [c.name for c in grid.cells]:
            raise unknown("cell", cell.against, [c.name for c in grid.cells])
    return grid


def _configure(settings: Mapping[str, Any]):
    """Settings of pretraining; those of the grid's own are checked."""
    own = {"n_train": "a number of scans", "merge": "a number of parcels in one"}
    for name, what in own.items():
        value = settings.get(name, 0)
        if type(value) is not int or value < 0:
            raise ParameterError(f"{name} must be {what}, 0 for all, got {value!r}")
    return configure(
        "masked", {}, {name: value for name, value in settings.items() if name not in own}
    )


def score(
    model: MnemoDyn,
    scan: Scan,
    scaling: Scaling,
    grid: Grid,
    condition: Condition,
    seed: int,
    finer: tuple[MnemoDyn, Scaling, Scan, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared errors over hidden entries of one scan, in SD of its parcels whatever the network reads.

    `seed` is that of masks and censored frames. `finer` are network, scaling and scan before parcels were merged, and
    the merged parcel (parcel,) of each of its own.

    Returns
    -------
    error, total : ndarray, shape (window,)
        Sums over the hidden entries that this condition leaves.
    plain : ndarray, shape (window,)
        The error over the same entries in the plain test; with `finer`, of that network's fill, its parcels averaged.
        Of a merged parcel that is hidden it sees nothing.
    """
    truth = cut_windows(Scaling()(scan), grid.n_timepoints)
    hidden = Masked(grid.hidden_share, grid.mask_window).hide(truth.shape, seed).numpy()
    mean, sd = Scaling().affine(moments(scan.values))

    def fill(model, scaling, scan, hidden, censored, condition) -> np.ndarray:
        """In the units of the scan."""
        offset, scale = scaling.affine(moments(scan.values))
        window = (condition.window or grid.window) // condition.every
        given = cut_windows(scaling(scan), grid.n_timepoints)
        parts = [np.ascontiguousarray(a[:, :: condition.every]) for a in (given, hidden, censored)]
        x, mask, gone = (torch.from_numpy(a.reshape(-1, window, *a.shape[2:])) for a in parts)
        with torch.no_grad():
            missing = gone if bool(gone.any()) else None
            filled = model(
                x, scan.t_r * condition.every, hidden=mask, censored=missing
            ).reconstruction
        return filled.numpy().reshape(parts[0].shape) * scale + offset

    censored = np.random.default_rng(seed).random(truth.shape[:2]) < condition.censored
    kept = (slice(None), slice(None, None, condition.every))
    scored = (hidden & ~censored[..., None])[kept]
    out = (fill(model, scaling, scan, hidden, censored, condition) - mean) / sd
    error, total = hidden_sums(truth[kept], out, scored)
    plain, none = error, np.zeros_like(censored)
    if finer is not None:
        other, its_scaling, whole, groups = finer
        fine = fill(other, its_scaling, whole, hidden[..., groups], none, Condition()) @ _averaging(
            groups
        )
        plain, _ = hidden_sums(truth, (fine - mean) / sd, hidden)
    elif condition != Condition():
        fine = fill(model, scaling, scan, hidden, none, Condition())
        plain, _ = hidden_sums(truth[kept], ((fine - mean) / sd)[kept], scored)
    return error, total, plain


def _averaging(groups: np.ndarray) -> np.ndarray:
    """Parcels to the means of their groups, (parcel, group)."""
    member = np.eye(groups.max() + 1)[groups]
    return member / member.sum(0)


def merged_parcels(scans: Sequence[Scan], times: int) -> np.ndarray:
    """The merged parcel of each, so many times fewer: Ward's clusters of the scans' z-scored series, (parcel,)."""
    series = np.concatenate([Scaling()(scan) for scan in scans])
    return FeatureAgglomeration(max(2, series.shape[1] // times)).fit(series).labels_


def _merge(scan: Scan, groups: np.ndarray) -> Scan:
    values = (scan.values @ _averaging(groups)).astype(np.float32)
    return replace(
        scan, values=values, parcels=tuple(f"merged {i}" for i in range(values.shape[1]))
    )


def diagnose(features: np.ndarray, table: pd.DataFrame, target: str) -> dict[str, float]:
    """``auc`` and ``balanced_accuracy`` of a logistic regression on features (scan, feature), two classes of a target.

    Means over five repeats of five folds over people and families. Features are standardised by the training scans of
    each fold; the penalty is fixed. `table` has a row a scan, with ``participant_id``, ``family`` where known, and the
    target.
    """
    y = pd.factorize(table[target], sort=True)[0]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    splits = [
        (train, test)
        for _, _, train, test in repeated_folds(table, target).split(table["participant_id"])
    ]
    metrics = {"auc": "roc_auc", "balanced_accuracy": "balanced_accuracy"}
    found = cross_validate(classifier, features, y, cv=splits, scoring=metrics)
    return {name: float(found[f"test_{name}"].mean()) for name in metrics}


class _Fold:
    """People of one fold by role, and the networks trained on them, kept by what they were trained with.

    Raises
    ------
    DataError
        If nobody would be left to train on, or the grid has a target and `table` is not given.
    """

    def __init__(
        self,
        grid: Grid,
        number: int,
        scans: Sequence[Scan],
        folder: Path,
        table: pd.DataFrame | None,
    ):
        train, validation, _ = split_participants(scans, n_test=grid.n_test, n_validation=1)
        known, size = [*train, *validation], grid.n_score
        end = size + max(1, size // 10)
        people = sorted({scan.participant_id for scan in known})
        if len(people) <= end:
            raise DataError(
                f"expected {end + 1} people or more beside the {grid.n_test} held out, got {len(people)}"
            )
        if size > 1:  # sorted identifiers are sorted by site
            people = np.random.default_rng(0).permutation(people).tolist()
        people = np.roll(people, -number * size).tolist()
        self.grid, self.number, self.folder, self.people = grid, number, folder, people[:size]
        sides = {"score": people[:size], "choose": people[size:end], "train": people[end:]}
        of = {
            person: [scan for scan in known if scan.participant_id == person] for person in people
        }
        self.sides = {
            side: [scan for person in some for scan in of[person]] for side, some in sides.items()
        }
        self.table = None
        if grid.target:
            if table is None:
                raise DataError(f"target {grid.target} needs a cohort: name it with --cohort")
            table = (
                table[table[grid.target].notna()]
                .drop_duplicates("participant_id")
                .set_index("participant_id")
            )
            labelled = [person for person in self.people if person in table.index]
            self.table = table.loc[labelled].reset_index()

    def training_scans(self, cell: Cell) -> list[Scan]:
        return self.sides["train"][: self.grid.training(cell).get("n_train") or None]

    def identity(self, cell: Cell) -> dict:
        """What decides the weights of the cell's network."""
        sides = self.sides | {"train": self.training_scans(cell)}
        data = {name: fingerprint(side) for name, side in sides.items()}
        return {"settings": self.grid.training(cell), "fold": self.number, "data": data}

    def groups(self, cell: Cell) -> np.ndarray | None:
        """Merged parcel of each parcel, where the cell merges them."""
        times = self.grid.training(cell).get("merge", 0)
        return merged_parcels(self.sides["train"], times) if times > 1 else None

    def trained(self, cell: Cell) -> Checkpoint:
        """The cell's network, from the folder or trained now."""
        from mnemodyn.pretrain.training import pretrain  # imports Lightning, which takes seconds

        digest = hashlib.sha256(
            json.dumps(self.identity(cell), sort_keys=True).encode()
        ).hexdigest()[:16]
        network, unfinished = self.folder / "networks" / digest, self.folder / "unfinished"
        if not network.is_dir():
            settings = self.grid.training(cell) | {"seed": self.number}
            objective, model, training, _, machine = _configure(settings)
            train, choose = self.training_scans(cell), self.sides["choose"]
            if (groups := self.groups(cell)) is not None:
                train, choose = (
                    [_merge(scan, groups) for scan in side] for side in (train, choose)
                )
            with redirect_stdout(io.StringIO()):
                pretrain(
                    train,
                    choose,
                    unfinished,
                    model=ModelConfig.from_dict({"n_parcels": len(train[0].parcels), **model}),
                    objective=objective,
                    training=training,
                    scaling=Scaling(machine.scaling),
                    restart=True,
                    machine=Machine(),
                )
            network.parent.mkdir(exist_ok=True)
            (unfinished / "best").rename(network)
            shutil.rmtree(unfinished)
        return from_pretrained(network)

    def run(self, cell: Cell) -> dict:
        """The cell's record, from the folder where it was finished before, otherwise trained and scored."""
        grid, path = self.grid, self.folder / f"{cell.name}-{self.number}.json"
        about = {f.name: getattr(grid, f.name) for f in fields(grid)[4:]}
        identity = self.identity(cell) | {"test": dict(cell.test), **about}
        if path.is_file() and (found := json.loads(path.read_text())).get("identity") == identity:
            return found
        start, checkpoint, groups = process_time(), self.trained(cell), self.groups(cell)
        scaling, scans = checkpoint.scaling or Scaling(), self.sides["score"]
        finer: list[Any] = [None] * len(scans)
        if groups is not None:
            other = self.trained(next(c for c in grid.cells if c.name == cell.against))
            finer = [(other.model, other.scaling or Scaling(), scan, groups) for scan in scans]
            scans = [_merge(scan, groups) for scan in scans]
        condition, seed = Condition(**cell.test), 1000 * self.number
        parts = [
            score(checkpoint.model, scan, scaling, grid, condition, seed + i, before)
            for i, (scan, before) in enumerate(zip(scans, finer, strict=True))
        ]
        error, total, plain = (
            float(sum(part.sum() for part in column)) for column in zip(*parts, strict=True)
        )
        found = {
            "identity": identity,
            "people": self.people[0] if len(self.people) == 1 else f"{len(self.people)} people",
            "error": error,
            "total": total,
            "plain": plain,
            "n_parameters": sum(p.numel() for p in checkpoint.model.parameters()),
            "commit": surroundings()["commit"],
        }
        if self.table is not None:
            by_person = {scan.participant_id: scan for scan in scans}
            scans = [by_person[person] for person in self.table["participant_id"]]
            found["n_labelled"] = len(scans)
            features = MnemoDynEncoder(checkpoint, (READOUT,)).fit(scans).transform(scans)
            found["outcome"] = diagnose(features, self.table, grid.target)
            if cell.name == DEFAULT:
                found["connectivity"] = diagnose(connectivity(scans), self.table, grid.target)
        found["cpu_seconds"] = round(process_time() - start, 1)
        write_json(path, found)
        return found


def run_grid(
    grid: Grid,
    scans: Sequence[Scan],
    folder: str | Path,
    *,
    table: pd.DataFrame | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, list[dict]]:
    """Records of every cell on every fold, fold by fold, so that what is finished is always comparable.

    `table` has a row a scan, with ``participant_id`` and the grid's target.
    """
    records: dict[str, list[dict]] = {cell.name: [] for cell in grid.cells}
    for number in range(grid.folds):
        fold = _Fold(grid, number, scans, Path(folder), table)
        for cell in grid.cells:
            found = fold.run(cell)
            records[cell.name].append(found)
            outcome = f", {grid.target} AUC {found['outcome']['auc']:.3f}" if grid.target else ""
            log(
                f"fold {number + 1}/{grid.folds}, {cell.name}: R2 {1 - found['error'] / found['total']:.4f}{outcome}"
            )
    return records


def _interval(values: Sequence[float] | np.ndarray) -> dict:
    return {name: None if v is None else round(v, 6) for name, v in t_interval(values).items()}


def collect(grid: Grid, records: Mapping[str, Sequence[Mapping]], **facts) -> dict:
    """The grid's result: R2 of every cell, and its paired difference to the cell it is compared with.

    Both are means over folds with a t interval. A cell that changes the test alone is compared with the same network
    in the plain test, on the entries that its own test leaves; one that merges parcels, with the fill of the network
    it is compared with, its parcels averaged. Where the grid has a target, AUC and balanced accuracy likewise.
    """
    rows = []
    for cell in grid.cells:
        mine = records[cell.name]
        against = records[cell.against][: len(mine)]
        beside = (
            [a["plain"] for a in mine]
            if cell.test or "merge" in cell.settings
            else [b["error"] for b in against]
        )
        differences = [(b - a["error"]) / a["total"] for a, b in zip(mine, beside, strict=True)]
        row = {
            **{f.name: getattr(cell, f.name) for f in fields(cell)},
            "r2": _interval([1 - a["error"] / a["total"] for a in mine]),
            "difference": None if cell.name == DEFAULT else _interval(differences),
            "by_fold": [round(1 - a["error"] / a["total"], 6) for a in mine],
            "n_parameters": mine[0]["n_parameters"],
        }
        for metric in ("auc", "balanced_accuracy") if grid.target else ():
            values, others = ([r["outcome"][metric] for r in some] for some in (mine, against))
            change = None if cell.name == DEFAULT else _interval(np.subtract(values, others))
            row |= {metric: _interval(values), f"{metric}_difference": change}
        rows.append(row)
    if grid.target:
        facts["connectivity"] = {
            metric: _interval([r["connectivity"][metric] for r in records[DEFAULT]])
            for metric in ("auc", "balanced_accuracy")
        }
        facts["n_labelled"] = [r["n_labelled"] for r in records[DEFAULT]]
    found = surroundings()
    return {
        "cells": rows,
        "settings": dict(grid.settings),
        "n_folds": len(records[DEFAULT]),
        "people": [record["people"] for record in records[DEFAULT]],
        "interval": "95 %, t over folds: each another person, other training people and another seed",
        **{f.name: getattr(grid, f.name) for f in fields(grid)[3:]},
        "commits": sorted(
            {record["commit"] or "unknown" for mine in records.values() for record in mine}
        ),
        "versions": {name: found["versions"][name] for name in ("torch", "lightning", "numpy")},
        **facts,
    }


def table(found: Mapping, outcome: str = "r2") -> pd.DataFrame:
    """A row a cell of what `collect` gives: name, group, label, n_parameters, outcome; value, low, high of its difference.

    The outcome is ``r2``, or with a target ``auc`` or ``balanced_accuracy``.
    """  # noqa: E501
    rows = []
    for cell in found["cells"]:
        difference = cell["difference" if outcome == "r2" else f"{outcome}_difference"]
        kept = {key: cell[key] for key in ("name", "group", "label", "n_parameters")}
        rows.append(
            {
                **kept,
                outcome: cell[outcome]["value"],
                **(difference or dict.fromkeys(("value", "low", "high"))),
            }
        )
    return pd.DataFrame(rows).astype(dict.fromkeys(("value", "low", "high"), float))
