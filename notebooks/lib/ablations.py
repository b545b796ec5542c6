"""The ablations: cells that change a setting or the test, each trained and scored beside the default.

A fold is another participant to score, another to choose the epoch, and another seed. Windows, masks
and seeds of a fold are the same for all cells, so that differences are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.figures import COLOURS, MARKERS, errors
from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Collection, DataError
from mnemodyn.evaluate.reconstruction import HiddenScan, Network, fill, hide, sums
from mnemodyn.evaluate.scores import t_interval
from mnemodyn.files import Kept, digest, load_yaml
from mnemodyn.pretrain.training import pretrain
from mnemodyn.settings import Settings

DEFAULT = "default"


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: what it changes, and what it is compared with.

    Attributes
    ----------
    name, group, label : str
        How it is called, what it belongs to, and what a reader sees.
    settings : mapping
        Changed settings, as :meth:`mnemodyn.settings.Settings.updated` takes them.
    n_train : int
        Training scans that are used; 0 for all.
    window, every, censored : int, int, float
        The test: frames filled at a time (0 for the grid's), one of how many frames is given, and
        the share of frames that is missing.
    against : str
        Name of the cell that it is compared with.
    """

    name: str
    group: str
    label: str
    settings: Mapping[str, Any]
    n_train: int = 0
    window: int = 0
    every: int = 1
    censored: float = 0.0
    against: str = DEFAULT

    @property
    def tests_otherwise(self) -> bool:
        """Whether the cell changes the test of the network that it is compared with."""
        return bool(self.window or self.every > 1 or self.censored)


@dataclass(frozen=True)
class Grid:
    """The cells of one size, the default first.

    `settings` are those of the default. `folds` are run; `n_test` participants, the last of the
    sorted identifiers, are never read. Networks fill `window` frames at a time.
    """

    cells: tuple[Cell, ...]
    settings: Settings
    folds: int
    n_test: int
    window: int


def read_grid(path: str | Path, size: str) -> Grid:
    """The grid of a YAML file at one of its sizes.

    Raises
    ------
    ValueError
        If the size or a cell is unknown, or a setting is refused.
    """
    content = load_yaml(path)
    if size not in content["sizes"]:
        raise ValueError(f"{path}: no size {size!r}; known are {', '.join(content['sizes'])}")
    chosen = content["sizes"][size]
    settings = Settings.from_mapping(chosen["settings"])
    cells = []
    for name in [DEFAULT, *chosen["cells"]]:
        if name not in content["cells"]:
            raise ValueError(f"{path}: size {size} names a cell {name!r} that is not described")
        cell = Cell(**{"name": name, "settings": {}, **content["cells"][name]})
        settings.updated(cell.settings)
        cells.append(cell)
    names = [cell.name for cell in cells]
    for cell in cells:
        if cell.against not in names:
            raise ValueError(f"{path}: cell {cell.name} needs the cell {cell.against}")
    return Grid(tuple(cells), settings, chosen["folds"], chosen["n_test"], chosen["window"])


def divide(scans: Collection, grid: Grid, fold: int) -> dict[str, Collection]:
    """Scans of a fold: of one participant to score, of another to choose the epoch, and the others."""
    participants = scans.table["participant_id"]
    people = sorted(set(participants))
    people = people[: len(people) - grid.n_test]
    if len(people) < 3:
        raise DataError(f"ablations need 3 participants beside {grid.n_test}, got {len(people)}")
    people = people[fold:] + people[:fold]
    roles = {"score": people[:1], "choose": people[1:2], "train": people[2:]}
    return {role: scans.select(participants.isin(some)) for role, some in roles.items()}


def run_grid(grid: Grid, scans: Collection, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Train and score every cell on every fold; what is finished in `folder` is found again.

    Returns
    -------
    dict
        By cell, one record a fold: ``error`` and ``total``, sums over hidden entries; ``plain``, the
        error of the same network on the same entries in the plain test; and ``n_parameters``.
    """
    kept = Kept(folder / "records")
    records: dict[str, list[dict[str, float]]] = {cell.name: [] for cell in grid.cells}
    for fold in range(grid.folds):
        sides = divide(scans, grid, fold)
        for cell in grid.cells:
            settings = grid.settings.updated(cell.settings)
            settings = settings.updated({"training.seed": fold})
            fold_sides = dict(sides)
            if cell.n_train:
                fold_sides["train"] = sides["train"][: cell.n_train]
            identity = [settings.to_dict(), *(side.fingerprint for side in fold_sides.values())]
            test = [cell.window, cell.every, cell.censored, grid.window]
            # Cells that differ in the test alone share a network.
            place = folder / "networks" / digest(identity)[:16]

            def run(cell=cell, settings=settings, sides=fold_sides, place=place, seed=1000 * fold):
                checkpoint, _ = pretrain(sides["train"], sides["choose"], place, settings)
                return score(checkpoint, sides["score"], grid, cell, seed)

            record = kept(f"{cell.name}-{fold}", [identity, test], run)
            records[cell.name].append(record)
            print(f"fold {fold + 1}, {cell.name}: R2 {1 - record['error'] / record['total']:.4f}")
    return records


def score(
    checkpoint: Checkpoint, scans: Collection, grid: Grid, cell: Cell, seed: int
) -> dict[str, float]:
    """Errors over hidden entries of scans, in SD of their parcels whatever the network reads."""
    masks = {
        "hidden_share": grid.settings.objective.hidden_share,
        "mask_window": grid.settings.objective.mask_window,
        "seed": seed,
    }
    truth = hide(scans, Scaling(), **masks)
    given = hide(scans, checkpoint.require_scaling(), **masks)
    method = Network(checkpoint.model)
    window = (cell.window or grid.window) // cell.every
    under_test = [condition(one, cell, seed + i) for i, one in enumerate(given)]
    filled = fill(method, under_test, window=window)
    plain = [one[:: cell.every] for one in fill(method, given, window=grid.window)]
    scored = [condition(one, cell, seed + i) for i, one in enumerate(truth)]
    found = {}
    for name, values in (("error", filled), ("plain", plain)):
        in_sd = [to_sd(v, g, t) for v, g, t in zip(values, under_test, scored, strict=True)]
        residual, total, _ = sums(scored, in_sd, grid.window)
        found[name] = float(residual.sum())
        found["total"] = float(total.sum())
    found["n_parameters"] = sum(p.numel() for p in checkpoint.model.parameters())
    return found


def condition(scan: HiddenScan, cell: Cell, seed: int) -> HiddenScan:
    """The scan as the test of a cell gives it: frames left out, or missing."""
    missing = np.random.default_rng(seed).random(len(scan.values)) < cell.censored
    kept = slice(None, None, cell.every)
    values = np.where(missing[:, None], np.float32(np.nan), scan.values)
    return replace(
        scan,
        values=values[kept],
        t_r=scan.t_r * cell.every,
        hidden=(scan.hidden | missing[:, None])[kept],
        scored=(scan.scored & ~missing[:, None])[kept],
    )


def to_sd(filled: np.ndarray, given: HiddenScan, truth: HiddenScan) -> np.ndarray:
    """Filled values in the units of `given` to those of `truth`: both scale each parcel linearly."""
    spread = np.nanstd(given.values, axis=0)
    slope = np.nanstd(truth.values, axis=0) / np.where(spread > 0, spread, 1)
    centred = filled - np.nanmean(given.values, axis=0)
    return centred * slope + np.nanmean(truth.values, axis=0)


def table(grid: Grid, records: Mapping[str, Sequence[Mapping[str, float]]]) -> pd.DataFrame:
    """A row a cell: what it is, ``r2``, and ``value, low, high`` of its paired difference over folds.

    A cell that changes the test alone is compared with the same network in the plain test, on the
    entries that its own test leaves.
    """
    labels = {cell.name: cell.label for cell in grid.cells}
    rows = []
    for cell in grid.cells:
        mine = pd.DataFrame(records[cell.name])
        other = mine["plain"]
        if not cell.tests_otherwise:
            other = pd.DataFrame(records[cell.against])["error"]
        row = {
            "name": cell.name,
            "group": cell.group,
            "label": cell.label,
            "against": labels[cell.against],
            "n_parameters": int(mine["n_parameters"].iloc[0]),
            "r2": t_interval(1 - mine["error"] / mine["total"]),
        }
        if cell.name != DEFAULT:
            row |= t_interval((other - mine["error"]) / mine["total"])
        rows.append(row)
    return pd.DataFrame(rows)


def result_rows(cells: pd.DataFrame, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of results from `table`: the R2 of every cell, and its difference."""
    rows = []
    for cell in cells.to_dict("records"):
        shared = {**about, "task": "hidden entries", "score": "r2", "method": cell["label"]}
        rows.append({**shared, **cell["r2"]})
        if cell["name"] != DEFAULT:
            difference = {end: cell[end] for end in ("value", "low", "high")}
            rows.append({**shared, "against": cell["against"], **difference})
    return rows


def figure(cells: pd.DataFrame) -> Figure:
    """Differences by cell with their intervals, sorted, a colour a group; filled where zero is outside."""
    cells = cells.sort_values("value").reset_index(drop=True)
    drawn, ax = plt.subplots(figsize=(7, 1 + 0.22 * len(cells)))
    for number, (group, rows) in enumerate(cells.groupby("group", sort=False)):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        ax.errorbar(rows["value"], rows.index, xerr=errors(rows), fmt="none", color=colour, lw=1)
        outside = (rows["low"] > 0) | (rows["high"] < 0)
        for part, face in ((outside, colour), (~outside, "white")):
            ax.plot(rows["value"][part], rows.index[part], marker, ms=4, mec=colour, mfc=face)
        ax.plot([], [], marker, ms=4, color=colour, label=group)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xscale("symlog", linthresh=0.01)
    ax.set_yticks(range(len(cells)), cells["label"])
    ax.set_xlabel("change of R² on hidden entries")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn
