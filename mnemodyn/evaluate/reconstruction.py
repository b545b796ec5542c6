"""How well hidden entries of held-out people are filled.

There is one way to fill scans (`fill`) and one way to score them (`sums` and `compare`), so that
every method is scored on the same entries. A method is an object with ``fill(x, hidden, t_r)``: a
network (`Network`), its front end alone (`FrontEnd`), or a baseline of
:mod:`mnemodyn.evaluate.baselines`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.evaluate.scores import interval, resamples
from mnemodyn.model.front import Front
from mnemodyn.pretrain.objectives import Masked

BATCH = 8  # scans or windows filled together


class Method(Protocol):
    """Something that fills hidden entries."""

    def fill(self, x: np.ndarray, hidden: np.ndarray, t_r: float) -> np.ndarray:
        """Fill `hidden` of scaled scans, all (batch, time, parcel); `t_r` is in seconds."""
        ...


class Network:
    """A network as a method: a MnemoDyn, or a module that is called alike and returns a tensor."""

    def __init__(self, network: nn.Module):
        self.network = network

    @torch.no_grad()
    def fill(self, x: np.ndarray, hidden: np.ndarray, t_r: float) -> np.ndarray:
        """Return `x` in float32 with hidden entries as the network reconstructs them."""
        device = next(self.network.parameters()).device
        given = torch.as_tensor(x, dtype=torch.float32, device=device)
        mask = torch.as_tensor(hidden, device=device)
        known = {"hidden": mask}
        # A frame that is NaN throughout is missing: the path goes on at its true time. Other networks
        # than MnemoDyn know no missing frames.
        missing = given.isnan().all(-1)
        if missing.any():
            known["censored"] = missing
        output = self.network(given, float(t_r), **known)
        if not isinstance(output, Tensor):
            output = output.reconstruction
        return torch.where(mask, output, given).cpu().numpy()


class FrontEnd:
    """The front end of a network as a method of its own, without operator blocks."""

    def __init__(self, front: Front):
        self.front = front

    def fill(self, x: np.ndarray, hidden: np.ndarray, t_r: float | None = None) -> np.ndarray:
        """Return `x` in float32 with hidden entries at their conditional mean."""
        given = torch.as_tensor(x, dtype=torch.float32)
        return self.front(given, torch.as_tensor(hidden)).numpy()


@dataclass(frozen=True)
class HiddenScan:
    """A scaled scan with entries hidden.

    Attributes
    ----------
    person : str
        Whom a bootstrap resamples: the participant, or the family.
    values : ndarray, shape (time, parcel)
        In SD of the parcel; NaN in censored frames.
    t_r : float
        Repetition time in seconds.
    hidden : ndarray of bool, shape (time, parcel)
        What no method reads: the drawn mask, constant parcels and censored frames.
    scored : ndarray of bool, shape (time, parcel)
        The drawn mask without constant parcels and censored frames.
    """

    person: str
    values: np.ndarray
    t_r: float
    hidden: np.ndarray
    scored: np.ndarray


def hide(
    scans: Sequence[Scan],
    scale: Callable[[Scan], np.ndarray],
    *,
    hidden_share: float,
    mask_window: int,
    seed: int,
    people: Sequence[str] | None = None,
) -> list[HiddenScan]:
    """Scale scans and hide entries of them.

    In every parcel a share `hidden_share` of the frames is hidden, in stretches of `mask_window`
    frames; scan i gets the mask of ``seed + i``. `scale` is a fitted scaling. `people` are whom a
    bootstrap resamples, one a scan; the participants where it is not given.
    """
    masks = Masked(hidden_share=hidden_share, mask_window=mask_window)
    found = []
    for i, scan in enumerate(scans):
        values = scale(scan)
        # A mask that depends on nothing but its number is the same for every method and network.
        drawn = masks.hide((1, *values.shape), seed + i).numpy()[0]
        # What nobody knows cannot be scored, and what says nothing must not be read.
        unknown = np.broadcast_to(scan.constant, drawn.shape)
        if scan.censored is not None:
            censored = scan.censored[:, None]
            values = np.where(censored, np.float32(np.nan), values)
            unknown = unknown | censored
        person = scan.participant_id
        if people is not None:
            person = people[i]
        found.append(HiddenScan(person, values, scan.t_r, drawn | unknown, drawn & ~unknown))
    return found


def fill(method: Method, scans: Sequence[HiddenScan], *, window: int = 0) -> list[np.ndarray]:
    """Fill every scan, (time, parcel) each.

    Scans are filled whole, or with `window` frames at a time where that is not 0. The last window
    ends with the scan and overlaps the one before it.
    """
    filled = [scan.values.copy() for scan in scans]
    # Pieces of one length and repetition time are filled together, which is faster.
    pieces: dict[tuple[int, float], list[tuple[int, slice]]] = {}
    for i, scan in enumerate(scans):
        for part in _windows(len(scan.values), window):
            key = (part.stop - part.start, scan.t_r)
            pieces.setdefault(key, []).append((i, part))
    for (_, t_r), places in pieces.items():
        for start in range(0, len(places), BATCH):
            batch = places[start : start + BATCH]
            x = np.stack([scans[i].values[part] for i, part in batch])
            hidden = np.stack([scans[i].hidden[part] for i, part in batch])
            # In order, so that where the last window overlaps the one before, the last one counts.
            for (i, part), values in zip(batch, method.fill(x, hidden, t_r), strict=True):
                filled[i][part] = values
    return filled


def _windows(n_frames: int, window: int) -> Iterator[slice]:
    """The windows of a scan, the last one ending with it."""
    if not window or n_frames <= window:
        yield slice(0, n_frames)
        return
    for start in range(0, n_frames - window, window):
        yield slice(start, start + window)
    yield slice(n_frames - window, n_frames)


def squares(scan: HiddenScan, filled: np.ndarray) -> np.ndarray:
    """Squared errors and squares of the scored entries, zero elsewhere: (2, time, parcel)."""
    # Zero, not times zero: what stands at other entries may be NaN.
    truth = np.where(scan.scored, scan.values, 0).astype(np.float64)
    error = truth - np.where(scan.scored, filled, 0)
    return np.stack([error**2, truth**2])


def sums(
    scans: Sequence[HiddenScan], filled: Sequence[np.ndarray], stretch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residual and total sums of squares over scored entries, and the person, of every stretch.

    A scan is cut into as many equal stretches as `stretch` frames fit into it, at least one. R2 of
    any stretches is ``1 - residual.sum() / total.sum()``. Its reference is zero, the parcel's mean
    over its own scan, because no method could know the mean of the hidden entries.
    """
    rows = []
    people = []
    for scan, values in zip(scans, filled, strict=True):
        n_stretches = max(1, len(scan.values) // stretch)
        for part in np.array_split(squares(scan, values), n_stretches, axis=1):
            rows.append(part.sum((1, 2)))
            people.append(scan.person)
    residual, total = np.transpose(rows)
    return residual, total, np.array(people)


def r2(method: Method, scans: Sequence[HiddenScan], *, window: int = 0) -> float:
    """R2 of a method over all scored entries of the scans."""
    longest = max(len(scan.values) for scan in scans)
    residual, total, _ = sums(scans, fill(method, scans, window=window), longest)
    return float(1 - residual.sum() / total.sum())


def _weights(people: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """How often each stretch counts, (1 + n_boot, stretch): people are drawn, then their stretches."""
    weights = resamples(people.tolist(), n_boot, seed)
    rng = np.random.default_rng(seed)
    # Stretches of one person resemble each other, so that drawing them all alike would give
    # intervals that are too narrow.
    for person in np.unique(people):
        rows = np.flatnonzero(people == person)
        # As many stretches as the person has, for each time that the person was drawn.
        times = weights[1:, rows[0]].astype(int)
        share = np.full(len(rows), 1 / len(rows))
        weights[1:, rows] = rng.multinomial(times * len(rows), share)
    return weights


def compare(
    residuals: Mapping[str, np.ndarray],
    total: np.ndarray,
    people: np.ndarray,
    *,
    data: str,
    task: str = "hidden entries",
    ours: str = "model",
    kind: str = "real",
    n_boot: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """R2 of every method, and R2 of `ours` minus that of every other one, with 95 % intervals.

    A resample draws people, stretches of each of them, and training seeds, all with replacement.
    Every method gets the same draws, so that the intervals of differences are paired.

    Parameters
    ----------
    residuals : mapping of str to ndarray, shape (stretch,) or (seed, stretch)
        Residual sums of squares by method, from `sums`; several training seeds are averaged.
    total : ndarray, shape (stretch,)
        Total sums of squares.
    people : ndarray of str, shape (stretch,)
        Whose stretch it is, from `sums`.
    data, task, kind : str
        Columns of :mod:`mnemodyn.results`.

    Returns
    -------
    list of dict
        Rows for :func:`mnemodyn.results.write_results`.
    """
    weights = _weights(people, n_boot, seed)
    totals = weights @ total
    scores = {}
    for name, residual in residuals.items():
        # One row for a method without training seeds.
        by_seed = np.atleast_2d(residual)
        shares = resamples(range(len(by_seed)), n_boot, seed) / len(by_seed)
        drawn = (weights @ by_seed.T * shares).sum(1)
        scores[name] = 1 - drawn / totals
    n_people = len(np.unique(people))
    about = {"data": data, "task": task, "score": "r2", "n": n_people, "kind": kind}
    rows = []
    for name, values in scores.items():
        rows.append({**about, "method": name, **interval(values)})
    for name, values in scores.items():
        if name != ours and ours in scores:
            difference = interval(scores[ours] - values)
            rows.append({**about, "method": ours, "against": name, **difference})
    return rows


def held_out(checkpoint: Checkpoint, scans: Sequence[Scan]) -> tuple[list[Scan], list[Scan]]:
    """Scans of the participants that a checkpoint was trained and validated on, and of all others.

    Raises
    ------
    DataError
        If there are none of either: nothing to fit baselines to, or nobody to test on.
    CheckpointError
        If a scan's parcels are not the checkpoint's.
    """
    training = checkpoint.training
    people = {*training["train_participants"], *training["validation_participants"]}
    known: list[Scan] = []
    test: list[Scan] = []
    for scan in scans:
        checkpoint.check(scan)
        side = known if scan.participant_id in people else test
        side.append(scan)
    if not known or not test:
        raise DataError(
            f"expected scans of the checkpoint's {len(people)} participants and of others, "
            f"got {len(known)} and {len(test)}"
        )
    return known, test
