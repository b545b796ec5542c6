"""Windows of scans for training and validation. Every draw is a function of its number alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.data.store import Store
from mnemodyn.pretrain.objectives import Objective

__all__ = [
    "Draws",
    "FixedWindows",
    "RandomWindows",
    "Windows",
    "collate",
    "cut_windows",
    "window_frames",
]

# Scaled scans that are kept in memory: 256 of 1,200 frames and 400 parcels are half a gigabyte.
SCANS_KEPT = 256


def cut_windows(values: np.ndarray, n_timepoints: int) -> np.ndarray:
    """Consecutive windows of a scan (time, parcel), those that fit whole: (window, n_timepoints, parcel).

    ValueError if the scan is shorter than a window.
    """
    n = len(values) // n_timepoints
    if n == 0:
        raise ValueError(
            f"a window of {n_timepoints} frames does not fit into a scan of {len(values)}"
        )
    return values[: n * n_timepoints].reshape(n, n_timepoints, values.shape[1])


def window_frames(scan: Scan, n_timepoints: int, seconds: float | None = None) -> int:
    """Frames of a window of a scan: `n_timepoints`, or as many as `seconds` have.

    A scan that is shorter than `seconds`, but not by more than half, is one window. DataError if it is
    too short.
    """
    if seconds is None:
        frames = n_timepoints
        least = frames
    else:
        frames = round(seconds / scan.t_r)
        least = max(2, -(-frames // 2))
    if scan.n_frames < least:
        raise DataError(
            f"{scan.source}: expected at least {least} frames of {len(scan.parcels)} parcels, got "
            f"({scan.n_frames}, {len(scan.parcels)}); leave shorter scans out by a cohort's "
            "min_frames or Store.select"
        )
    return min(frames, scan.n_frames)


class Windows(Dataset):
    """Windows of scans, which are scaled when they are needed.

    An item is a dict: ``x`` (time, parcel), ``t_r`` (seconds), ``scan`` (where it is from), the
    objective's view of it, ``censored`` (time,) where any scan has censored frames, whose values are set
    to zero, and ``folds`` where the scans have them.

    Parameters
    ----------
    scans : sequence of Scan
        Of one atlas. They may be read lazily; of a store, windows are read alone.
    scaling : Scaling
        Fitted.
    objective : Objective
        Makes the view.
    n_timepoints : int
        Frames of a window.
    seed : int
    seconds : float, optional
        Length of a window, in place of `n_timepoints`.
    folds : sequence of int, optional
        The number of the front end that fills the windows of each scan.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        scaling: Scaling,
        objective: Objective,
        n_timepoints: int,
        seed: int,
        *,
        seconds: float | None = None,
        folds: Sequence[int] | None = None,
    ):
        self.scans = scans
        self.scaling = scaling
        self.objective = objective
        self.seed = seed
        self.folds = folds
        n_frames = []
        frames = []
        self.any_censored = False
        # One pass, as a scan of a collection may be read from a file each time it is asked for.
        for scan in scans:
            n_frames.append(scan.n_frames)
            frames.append(window_frames(scan, n_timepoints, seconds))
            self.any_censored |= bool(censored_frames(scan).any())
        self.n_frames = np.array(n_frames)
        self.frames = np.array(frames)
        self._scaled = lru_cache(SCANS_KEPT)(self._read)

    def _read(self, which: int) -> tuple[np.ndarray, np.ndarray]:
        """Scaled values and censored frames of a scan."""
        scan = self.scans[which]
        return self.scaling(scan), censored_frames(scan)

    def _censored(self, which: int, start: int, stop: int) -> np.ndarray:
        """Censored frames of a part of a scan."""
        if not isinstance(self.scans, Store):
            return self._scaled(which)[1][start:stop]
        censored = self.scans.censored(which, start, stop)
        if censored is None:
            return np.zeros(stop - start, dtype=bool)
        return np.array(censored)

    def usable(self, which: int, start: int) -> bool:
        """Whether at least two frames of a window are not censored: a path needs as many."""
        if not self.any_censored:
            return True
        censored = self._censored(which, start, start + int(self.frames[which]))
        return int((~censored).sum()) >= 2

    def cut(self, which: int, start: int, seed: int, *, training: bool) -> dict:
        """The window of scan `which` that begins at frame `start`, and its view.

        DataError if a value is NaN or infinite in a frame that is not censored.
        """
        scan = self.scans[which]
        stop = start + int(self.frames[which])
        if isinstance(self.scans, Store):
            values = self.scans.read(which, start, stop, self.scaling)
        else:
            values = self._scaled(which)[0][start:stop]
        censored = self._censored(which, start, stop)
        name = scan.source or scan.participant_id
        wrong = ~np.isfinite(values) & ~censored[:, None]
        if wrong.any():
            frame, parcel = np.argwhere(wrong)[0]
            raise DataError(
                f"{name}: {int(wrong.sum())} values are NaN or infinite, first in frame "
                f"{start + frame}, parcel {scan.parcels[parcel]!r}; censor the frame or leave the "
                "scan out"
            )
        x = torch.from_numpy(np.where(censored[:, None], np.float32(0), values))
        view = self.objective.view(
            x, t_r=scan.t_r, parcels=scan.parcels, seed=seed, training=training
        )
        item = {"x": x, "t_r": torch.tensor(scan.t_r), "scan": name, **view}
        if self.any_censored:
            item["censored"] = torch.from_numpy(censored.copy())
        if self.folds is not None:
            item["folds"] = torch.tensor(self.folds[which])
        return item


def censored_frames(scan: Scan) -> np.ndarray:
    """True at the frames of a scan that are censored, (time,)."""
    if scan.censored is None:
        return np.zeros(scan.n_frames, dtype=bool)
    return scan.censored


def collate(items: Sequence[dict]) -> dict:
    """A batch of windows.

    Where they differ in length they are padded with zeros at their ends, and ``lengths`` is added.
    """
    batch: dict[str, Any] = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if isinstance(values[0], Tensor) and values[0].ndim:
            batch[key] = pad_sequence(values, batch_first=True)
        elif isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values
    lengths = torch.tensor([len(item["x"]) for item in items])
    if (lengths != lengths[0]).any():
        batch["lengths"] = lengths
    return batch


class RandomWindows(Windows):
    """Draw i is a window of a scan, and a view of it, chosen by a generator seeded with (seed, i).

    A resumed run sees what it would have seen, whatever the number of workers and processes.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        # Every possible window of the whole data set is as likely as any other.
        self.starts = self.n_frames - self.frames + 1
        self.share = (self.starts / self.starts.sum()).cumsum()
        self.share /= self.share[-1]

    def __getitem__(self, draw: int) -> dict:
        rng = np.random.default_rng([self.seed, draw])
        # Until a window is usable, which all but always is the first.
        for _ in range(1000):
            # The draw of numpy's choice, without a pass over all scans.
            which = int(self.share.searchsorted(rng.random(), side="right"))
            start = int(rng.integers(self.starts[which]))
            if self.usable(which, start):
                break
        return self.cut(which, start, int(rng.integers(2**62)), training=True)


class FixedWindows(Windows):
    """The consecutive windows of every scan, each with one view that never changes."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.items = []
        for which, (n, frames) in enumerate(zip(self.n_frames, self.frames, strict=True)):
            for start in range(0, n - frames + 1, frames):
                if self.usable(which, start):
                    self.items.append((which, start))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        which, start = self.items[index]
        return self.cut(which, start, self.seed + index, training=False)


class Draws(Sampler):
    """The numbers of the windows of every batch of an epoch.

    Each step takes the next `batch_size` numbers. They are dealt to the processes in turn, so that the
    batches of all of them, joined, are the batch that one process would have. A step of several parts
    (gradient accumulation) deals them to the parts in the same way.

    Parameters
    ----------
    n : int
        Windows of an epoch.
    batch_size : int
    epoch : callable
        Returns the epoch, from 0; asked when an epoch begins.
    fresh : bool
        Every epoch has windows of its own. Otherwise all epochs have the first `n`, each in its order.
    seed : int
        Of that order.
    rank, world : int
        This process, and how many there are.
    parts : int
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        epoch: Callable[[], int],
        *,
        fresh: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ):
        rest = n % batch_size or batch_size
        if rest < world * parts:
            raise ValueError(
                f"every step needs a window for each process and part: {world} processes and {parts} "
                f"parts, but batch_size {batch_size} and windows_per_epoch {n} give a step of {rest}"
            )
        self.n = n
        self.batch_size = batch_size
        self.epoch = epoch
        self.fresh = fresh
        self.seed = seed
        self.rank = rank
        self.world = world
        self.parts = parts

    def __len__(self) -> int:
        return -(-self.n // self.batch_size) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch()
        if self.fresh:
            numbers = list(range(epoch * self.n, (epoch + 1) * self.n))
        else:
            numbers = np.random.default_rng([self.seed, epoch]).permutation(self.n).tolist()
        for first in range(0, self.n, self.batch_size):
            step = numbers[first : first + self.batch_size]
            for part in range(self.parts):
                yield step[part * self.world + self.rank :: self.parts * self.world]
