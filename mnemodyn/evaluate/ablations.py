"""What each part is worth: a grid of changed settings, every cell trained and scored beside the unchanged default.

The grid is a YAML file: ``cells``, a changed setting or a few each, and ``sizes``, which say with what settings, on
how many folds and with which cells it is run. A fold is another person to score, another to choose the epoch, and
another seed; the held-out people of the book are never read. Windows, masks and seeds of a fold are the same for all
cells, so that differences are paired.
"""

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from mnemodyn.checkpoint import load_checkpoint
from mnemodyn.data.scaling import Scaling, moments
from mnemodyn.data.scans import DataError, Scan, fingerprint, split_participants
from mnemodyn.evaluate.metrics import hidden_sums
from mnemodyn.files import write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.parameters import ParameterError, build, check_settings, read_yaml, unknown
from mnemodyn.pretrain.config import Machine, configure
from mnemodyn.pretrain.objective import Masked
from mnemodyn.pretrain.windows import cut_windows
from mnemodyn.provenance import surroundings

__all__ = ["DEFAULT", "Cell", "Condition", "Grid", "collect", "read_grid", "run_cell", "run_grid", "score", "table"]

DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a trained network is given in the test; the defaults are the plain test.

    Attributes
    ----------
    window : int
        Frames it is given at a time; 0 for the grid's.
    every : int
        Only every so many frames are kept, which is another repetition time.
    censored : float
        Share of frames that are missing.
    """

    window: int = 0
    every: int = 1
    censored: float = 0.0

    def __post_init__(self):
        check_settings(self)
        if self.every < 1 or self.censored >= 1:
            raise ValueError(f"every must be >= 1 and censored < 1, got {self.every} and {self.censored}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: what it is called, and what is changed in training or in the test.

    Attributes
    ----------
    name, group, label : str
    settings : mapping
        Of pretraining, by name; and ``n_train``, how many of the training scans are used.
    test : mapping
        Of a :class:`Condition`.
    against : str
        The cell that it is compared with.
    """

    name: str
    group: str
    label: str
    settings: Mapping[str, Any]
    test: Mapping[str, Any]
    against: str = DEFAULT


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid at one size. Masks as `Masked` in windows of `n_timepoints` frames, given to the network `window` at a time.

    Attributes
    ----------
    cells : tuple of Cell
        The default first.
    settings : mapping
        Of the default cell.
    folds, n_test : int
        Folds that are run; people held out from all of them.
    n_timepoints, window, mask_window : int
        Frames.
    hidden_share : float
    """  # noqa: E501

    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]
    folds: int
    n_test: int = 2
    n_timepoints: int = 240
    window: int = 120
    hidden_share: float = 0.55
    mask_window: int = 15

    def training(self, cell: Cell) -> dict:
        """Settings that the cell's network is trained with."""
        return {**self.settings, **cell.settings}


def read_grid(path: str | Path, size: str) -> Grid:
    """A grid at one of its sizes.

    Raises
    ------
    ParameterError
        If the size, a cell, a section or a setting is unknown, or a value is refused.
    """
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
                raise ParameterError(f"cell {cell.name}: {frames} frames do not divide a window of {grid.n_timepoints}")
        if cell.against not in [c.name for c in grid.cells]:
            raise unknown("cell", cell.against, [c.name for c in grid.cells])
    return grid


def _configure(settings: Mapping[str, Any]):
    settings = dict(settings)
    n_train = settings.pop("n_train", 0)
    if type(n_train) is not int or n_train < 0:
        raise ParameterError(f"n_train must be a number of scans, 0 for all, got {n_train!r}")
    return n_train, configure("masked", {}, settings)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def score(model, scan: Scan, scaling: Scaling, grid: Grid, condition: Condition, seed: int) -> tuple[np.ndarray, ...]:
    """Squared errors over hidden entries of one scan, in SD of its parcels whatever the network reads.

    Parameters
    ----------
    model : MnemoDyn
    scan : Scan
    scaling : Scaling
        Of the network.
    grid : Grid
    condition : Condition
    seed : int
        Of masks and censored frames.

    Returns
    -------
    error, total : ndarray, shape (window,)
        Sums over the hidden entries that this condition leaves.
    plain : ndarray, shape (window,)
        The error over the same entries in the plain test.
    """
    truth = cut_windows(Scaling()(scan), grid.n_timepoints)
    hidden = Masked(grid.hidden_share, grid.mask_window).hide(truth.shape, seed).numpy()
    offset, scale = scaling.affine(m := moments(scan.values))
    mean, sd = Scaling().affine(m)
    given = cut_windows(scaling(scan), grid.n_timepoints)

    def predicted(condition: Condition, censored: np.ndarray) -> np.ndarray:
        window = (condition.window or grid.window) // condition.every
        parts = [np.ascontiguousarray(a[:, :: condition.every]) for a in (given, hidden, censored)]
        x, mask, gone = (torch.from_numpy(a.reshape(-1, window, *a.shape[2:])) for a in parts)
        with torch.no_grad():
            missing = gone if bool(gone.any()) else None
            filled = model(x, scan.t_r * condition.every, hidden=mask, censored=missing).reconstruction
        return (filled.numpy().reshape(parts[0].shape) * scale + offset - mean) / sd

    censored = np.random.default_rng(seed).random(truth.shape[:2]) < condition.censored
    kept = (slice(None), slice(None, None, condition.every))
    scored = (hidden & ~censored[..., None])[kept]
    error, total = hidden_sums(truth[kept], predicted(condition, censored), scored)
    plain = error
    if condition != Condition():
        plain, _ = hidden_sums(truth[kept], predicted(Condition(), np.zeros_like(censored))[kept], scored)
    return error, total, plain


def run_cell(grid: Grid, cell: Cell, fold: int, scans: Sequence[Scan], folder: Path) -> dict:
    """One cell on one fold: its record, from `folder` where it was finished before, otherwise trained and scored.

    Networks are kept by what they were trained with, so that cells that differ in the test alone share one.

    Raises
    ------
    DataError
        If fewer than three people are left to divide.
    """
    from mnemodyn.pretrain.training import pretrain  # imports Lightning, which takes seconds

    train, validation, _ = split_participants(scans, n_test=grid.n_test, n_validation=1)
    known = [*train, *validation]
    people = sorted({scan.participant_id for scan in known})
    if len(people) < 3:
        raise DataError(f"expected three people or more beside the {grid.n_test} held out, got {len(people)}")
    roles = {people[fold % len(people)]: "score", people[(fold + 1) % len(people)]: "choose"}
    sides = {
        role: [s for s in known if roles.get(s.participant_id, "train") == role]
        for role in ("train", "choose", "score")
    }
    settings = grid.training(cell)
    n_train, (objective, model, training, _, data) = _configure(settings | {"seed": fold})
    sides["train"] = sides["train"][: n_train or None]
    identity = {
        "settings": settings,
        "fold": fold,
        "data": {side: fingerprint(found) for side, found in sides.items()},
    }
    network, unfinished = folder / "networks" / _digest(identity), folder / "unfinished"
    identity |= {"test": dict(cell.test), **{f.name: getattr(grid, f.name) for f in fields(grid)[4:]}}
    path = folder / f"{cell.name}-{fold}.json"
    if path.is_file() and (found := json.loads(path.read_text())).get("identity") == identity:
        return found
    start = process_time()
    if not network.is_dir():
        with redirect_stdout(io.StringIO()):
            pretrain(
                sides["train"],
                sides["choose"],
                unfinished,
                model=ModelConfig.from_dict({"n_parcels": len(scans[0].parcels), **model}),
                objective=objective,
                training=training,
                scaling=Scaling(data.scaling),
                restart=True,
                machine=Machine(),
            )
        network.parent.mkdir(exist_ok=True)
        (unfinished / "best").rename(network)
        shutil.rmtree(unfinished)
    checkpoint = load_checkpoint(network)
    condition = Condition(**cell.test)
    parts = [
        score(checkpoint.model, scan, checkpoint.scaling or Scaling(), grid, condition, 1000 * fold + i)
        for i, scan in enumerate(sides["score"])
    ]
    error, total, plain = (float(sum(part.sum() for part in column)) for column in zip(*parts, strict=True))
    found = {
        "identity": identity,
        "person": people[fold % len(people)],
        "error": error,
        "total": total,
        "plain": plain,
        "n_parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "cpu_seconds": round(process_time() - start, 1),
    }
    write_json(path, found)
    return found


def run_grid(
    grid: Grid, scans: Sequence[Scan], folder: str | Path, *, log: Callable[[str], None] = print
) -> dict[str, list[dict]]:
    """Every cell on every fold, fold by fold, so that what is finished is always comparable; returns the records."""
    records: dict[str, list[dict]] = {cell.name: [] for cell in grid.cells}
    for fold in range(grid.folds):
        for cell in grid.cells:
            found = run_cell(grid, cell, fold, scans, Path(folder))
            records[cell.name].append(found)
            log(f"fold {fold + 1}/{grid.folds}, {cell.name}: R2 {1 - found['error'] / found['total']:.4f}")
    return records


def _interval(values: Sequence[float]) -> dict:
    """Mean and 95 % t interval over folds; without one where there is a single fold."""
    mean, n = float(np.mean(values)), len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    low, high = (None, None) if half is None else (round(mean - half, 6), round(mean + half, 6))
    return {"value": round(mean, 6), "low": low, "high": high}


def collect(grid: Grid, records: Mapping[str, Sequence[Mapping]], **facts) -> dict:
    """The grid's result: R2 of every cell, and its paired difference to the cell it is compared with.

    Both are means over folds with a t interval. A cell that changes the test alone is compared with the same network
    in the plain test, on the entries that its own test leaves.
    """
    rows = []
    for cell in grid.cells:
        mine = records[cell.name]
        other = mine if cell.test else records[cell.against][: len(mine)]
        key = "plain" if cell.test else "error"
        differences = [(b[key] - a["error"]) / a["total"] for a, b in zip(mine, other, strict=True)]
        rows.append(
            {
                **{
                    k: v
                    for k, v in asdict(cell).items()
                    if k in ("name", "group", "label", "settings", "test", "against")
                },
                "r2": _interval([1 - a["error"] / a["total"] for a in mine]),
                "difference": None if cell.name == DEFAULT else _interval(differences),
                "by_fold": [round(1 - a["error"] / a["total"], 6) for a in mine],
                "n_parameters": mine[0]["n_parameters"],
            }
        )
    found = surroundings()
    return {
        "cells": rows,
        "settings": dict(grid.settings),
        "n_folds": len(records[DEFAULT]),
        "people": [record["person"] for record in records[DEFAULT]],
        "interval": "95 %, t over folds: each another person, other training people and another seed",
        **{f.name: getattr(grid, f.name) for f in fields(grid)[3:]},
        "commit": found["commit"],
        "dirty": found["dirty"],
        "versions": {name: found["versions"][name] for name in ("torch", "lightning", "numpy")},
        **facts,
    }


def table(found: Mapping) -> pd.DataFrame:
    """What `collect` gives, a row a cell: name, group, label, n_parameters, r2; value, low, high of the difference."""
    rows = []
    for cell in found["cells"]:
        difference = cell["difference"] or dict.fromkeys(("value", "low", "high"))
        kept = {key: cell[key] for key in ("name", "group", "label", "n_parameters")}
        rows.append({**kept, "r2": cell["r2"]["value"], **difference})
    return pd.DataFrame(rows).astype(dict.fromkeys(("value", "low", "high"), float))
