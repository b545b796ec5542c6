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
from mnemodyn.pretrain.objective import Objective

__all__ = [
    "Draws",
    "FixedWindows",
    "RandomWindows",
    "Windows",
    "collate",
    "cut_windows",
    "window_frames",
]


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


def window_frames(scan: Scan, n_timepoints: int, seconds: float) -> int:
    """Frames of a window of a scan: `n_timepoints`, or as many as `seconds` have where that is not 0.

    A scan that is shorter than `seconds`, but not by more than half, is one window. DataError if it is too short.
    """
    frames = round(seconds / scan.t_r) if seconds else n_timepoints
    least = max(2, -(-frames // 2)) if seconds else frames
    if scan.n_frames < least:
        found = f"({scan.n_frames}, {len(scan.parcels)})"
        raise DataError(
            f"{scan.source}: expected at least {least} frames of {len(scan.parcels)} parcels, got {found}; leave "
            "shorter scans out by a cohort's min_frames or Store.select"
        )
    return min(frames, scan.n_frames)


class Windows(Dataset):
    """Windows of scans, which are scaled when they are needed.

    An item is a dict: ``x`` (time, parcel), ``t_r`` (seconds), ``scan`` (where it is from), the objective's view of
    it, and ``censored`` (time,) where any scan has censored frames, whose values are set to zero.

    Scans are of one atlas and may be read lazily; of a store, windows are read alone. Windows have `n_timepoints`
    frames, or as many as `seconds` have where that is not 0. At most 256 scaled scans are kept in memory.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        scaling: Scaling,
        objective: Objective,
        n_timepoints: int,
        seed: int,
        *,
        seconds: float = 0.0,
    ):
        self.scans, self.scaling, self.objective, self.seed = scans, scaling, objective, seed
        sizes = [
            (scan.n_frames, window_frames(scan, n_timepoints, seconds), censored_frames(scan).any())
            for scan in scans
        ]
        self.n_frames, self.frames, censored = (
            np.array(column) for column in zip(*sizes, strict=True)
        )
        self.any_censored = bool(censored.any())
        self._scaled = lru_cache(256)(
            lambda which: (scaling(self.scans[which]), censored_frames(self.scans[which]))
        )

    def usable(self, which: int, start: int) -> bool:
        """Whether at least two frames of a window are not censored: a path needs as many."""
        if not self.any_censored:
            return True
        stop = start + int(self.frames[which])
        if isinstance(self.scans, Store):
            censored = self.scans.censored(which, start, stop)
        else:
            censored = self._scaled(which)[1][start:stop]
        return censored is None or int((~censored).sum()) >= 2

    def cut(self, which: int, start: int, seed: int, *, training: bool) -> dict:
        """The window of scan `which` that begins at frame `start`, and its view.

        DataError if a value is NaN or infinite in a frame that is not censored.
        """
        scan = self.scans[which]
        frames = slice(start, start + int(self.frames[which]))
        if isinstance(self.scans, Store):  # reads these frames alone
            values = self.scans.read(which, frames.start, frames.stop, self.scaling)
            censored = self.scans.censored(which, frames.start, frames.stop)
            censored = np.zeros(len(values), dtype=bool) if censored is None else np.array(censored)
        else:
            values, censored = (part[frames] for part in self._scaled(which))
        wrong = ~np.isfinite(values) & ~censored[:, None]
        if wrong.any():
            frame, parcel = np.argwhere(wrong)[0]
            raise DataError(
                f"{scan.source or scan.participant_id}: {int(wrong.sum())} values are NaN or infinite, first in frame "
                f"{start + frame}, parcel {scan.parcels[parcel]!r}; censor the frame or leave the scan out"
            )
        x = torch.from_numpy(np.where(censored[:, None], np.float32(0), values))
        view = self.objective.view(
            x, t_r=scan.t_r, parcels=scan.parcels, seed=seed, training=training
        )
        item = {
            "x": x,
            "t_r": torch.tensor(scan.t_r),
            "scan": scan.source or scan.participant_id,
            **view,
        }
        return item | ({"censored": torch.from_numpy(censored.copy())} if self.any_censored else {})


def censored_frames(scan: Scan) -> np.ndarray:
    censored = getattr(scan, "censored", None)
    return np.zeros(scan.n_frames, dtype=bool) if censored is None else censored


def collate(items: Sequence[dict]) -> dict:
    """A batch of windows: padded with zeros at their ends where they differ in length, which ``lengths`` then tells."""
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    for key, values in batch.items():
        if isinstance(values[0], Tensor):
            batch[key] = (
                pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
            )
    lengths = torch.tensor([len(item["x"]) for item in items])
    return batch if bool((lengths == lengths[0]).all()) else batch | {"lengths": lengths}


class RandomWindows(Windows):
    """Draw i is a window of a scan, and a view of it, chosen by a generator seeded with (seed, i).

    So a resumed run sees what it would have seen, whatever the number of workers and processes.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        # Every possible window of the whole data set is as likely as any other.
        self.starts = self.n_frames - self.frames + 1
        self.share = (self.starts / self.starts.sum()).cumsum()
        self.share /= self.share[-1]

    def __getitem__(self, draw: int) -> dict:
        rng = np.random.default_rng([self.seed, draw])
        for _ in range(1000):  # until a window is usable: all but always the first
            which = int(
                self.share.searchsorted(rng.random(), side="right")
            )  # as rng.choice, without a pass over all
            start = int(rng.integers(self.starts[which]))
            if self.usable(which, start):
                break
        return self.cut(which, start, int(rng.integers(2**62)), training=True)


class Draws(Sampler):
    """The draws of every batch, from the step that training has come to until the end of its epoch.

    Step s of an epoch of n draws takes `batch_size` draws in their order. They are dealt to the processes in turn, so
    that the batches of all of them, joined, are the batch that one process would have. A step of several `parts`
    (gradient accumulation) deals them to the parts in the same way. `step` returns the steps done so far, and is asked
    when an epoch, or the rest of one, begins; `rank` is this process of `world`.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        step: Callable[[], int],
        *,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ):
        rest = n % batch_size or batch_size
        if rest < world * parts:
            raise ValueError(
                f"every step needs a window for each process and part: {world} processes and {parts} parts, but "
                f"batch_size {batch_size} and windows_per_epoch {n} give a step of {rest}"
            )
        self.n, self.batch_size, self.step, self.steps = n, batch_size, step, -(-n // batch_size)
        self.rank, self.world, self.parts = rank, world, parts

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = divmod(self.step(), self.steps)
        for first in range(done * self.batch_size, self.n, self.batch_size):
            draws = range(
                epoch * self.n + first, epoch * self.n + min(first + self.batch_size, self.n)
            )
            for part in range(self.parts):
                yield list(draws[part * self.world + self.rank :: self.parts * self.world])


class FixedWindows(Windows):
    """The consecutive windows of every scan, each with one view that never changes."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.items = [
            (which, start)
            for which, (n, frames) in enumerate(zip(self.n_frames, self.frames, strict=True))
            for start in range(0, n - frames + 1, frames)
            if self.usable(which, start)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        which, start = self.items[index]
        return self.cut(which, start, self.seed + index, training=False)
