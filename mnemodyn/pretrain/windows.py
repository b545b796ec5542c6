"""Windows of scans for training and validation. Every draw is a function of its number alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.data.store import Store
from mnemodyn.pretrain.objectives import Objective
from mnemodyn.settings import TrainingConfig

__all__ = ["Draws", "FixedWindows", "RandomWindows", "Windows", "collate", "cut_windows"]

# Scaled scans that are kept in memory: 256 of 1,200 frames and 400 parcels are half a gigabyte.
SCANS_KEPT = 256
# Series of one recording agree by more than this correlation, however they were cleaned.
SAME = 0.5


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


def _window_frames(scan: Scan, n_timepoints: int, seconds: float | None) -> int:
    """Frames of a window of a scan; a DataError if the scan is too short."""
    frames = n_timepoints
    least = n_timepoints
    if seconds is not None:
        frames = round(seconds / scan.t_r)
        # A scan that is shorter than a window, but not by more than half, is one window.
        least = max(2, -(-frames // 2))
    if scan.n_frames < least:
        raise DataError(
            f"{scan.source}: expected at least {least} frames of {len(scan.parcels)} parcels, got "
            f"({scan.n_frames}, {len(scan.parcels)}); take shorter windows "
            "(-s model.n_timepoints N), or leave shorter scans out by a cohort's min_frames"
        )
    return min(frames, scan.n_frames)


class Windows(Dataset):
    """Windows of scans, which are scaled when they are needed.

    An item is a dict: ``x`` (time, parcel), ``t_r`` (seconds), ``scan`` (where it is from), the
    objective's view of it, ``censored`` (time,) where any scan has censored frames, whose values are set
    to zero, ``folds`` where the scans have them, and ``rest`` (parcel, parcel) where the objective asks
    for it: see :meth:`rest`.

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
        lengths = []
        self.censored = []
        names = []
        # One pass, as a scan of a collection may be read from a file each time it is asked for.
        for scan in scans:
            lengths.append((scan.n_frames, _window_frames(scan, n_timepoints, seconds)))
            self.censored.append(censored_frames(scan))
            names.append((scan.participant_id, scan.session))
        self.n_frames, self.frames = np.array(lengths).T
        self.participants, self.sessions = np.array(names).T
        self.n_usable = np.array([np.sum(~censored) for censored in self.censored])
        # If any has censored frames, all windows say which: they must agree to be a batch.
        self.any_censored = any(censored.any() for censored in self.censored)
        self.scaled = lru_cache(SCANS_KEPT)(self._read)
        self._whole = lru_cache(SCANS_KEPT)(self._covariance)
        self._same = lru_cache(None)(self._same_recording)
        if objective.needs_rest:
            # Now, and not when such a window is drawn.
            for which, frames in enumerate(self.frames):
                inside = np.convolve(~self.censored[which], np.ones(frames, int), "valid")
                self._elsewhere(which, int(inside.max()))

    def _read(self, which: int) -> np.ndarray:
        """A scaled scan."""
        return self.scaling(self.scans[which])

    def _covariance(self, which: int, left_out: slice = slice(0)) -> np.ndarray:
        """Covariance of a scan's frames that are neither censored nor `left_out`."""
        kept = ~self.censored[which]
        kept[left_out] = False
        x = self.scaled(which)[kept]
        x = x - x.mean(0)
        return x.T @ x / len(x)

    def _same_recording(self, one: int, other: int) -> bool:
        """Whether two scans are one recording, cleaned in two ways: between recordings series hardly correlate."""
        n = min(self.n_frames[one], self.n_frames[other])
        kept = ~self.censored[one][:n] & ~self.censored[other][:n]
        products = self.scaled(one)[:n][kept] * self.scaled(other)[:n][kept]
        return bool(products.sum() > SAME * products.size)

    def _elsewhere(self, which: int, n_frames: int) -> np.ndarray:
        """Scans with the rest of a person's data; none where it is the rest of scan `which`. See :meth:`rest`."""
        own = self.participants == self.participants[which]
        others = np.flatnonzero(own & (self.sessions != self.sessions[which]))
        if self.n_usable[others].sum() >= n_frames:
            return others
        runs = np.flatnonzero(own & (self.sessions == self.sessions[which]))
        more = [i for i in runs if i != which and not self._same(which, i)]
        others = np.append(others, more).astype(int)
        if self.n_usable[others].sum() >= n_frames:
            return others
        left = self.n_usable[which] - n_frames
        if left < n_frames:
            raise DataError(
                f"{self.scans[which].source}: beside a window of {n_frames} usable frames its participant has "
                f"{left} in this scan and {self.n_usable[others].sum()} in others, but as many are needed; "
                "take shorter windows, at most half of an only scan (-s model.n_timepoints N, or "
                "training.window_seconds)",
                "too-short",
            )
        return others[:0]

    def rest(self, which: int, start: int, stop: int) -> np.ndarray:
        """Covariance (parcel, parcel) of what else there is of the person of a window.

        That is their other sessions, or else their other runs too, or else the frames outside the window: the first
        that has as many usable frames as the window. A DataError where none has. Of fewer frames than twice the
        parcels it is shrunk (``shrunk``).
        """
        n_inside = int(np.sum(~self.censored[which][start:stop]))
        others = self._elsewhere(which, n_inside)
        if not len(others):
            return shrunk(
                self._covariance(which, slice(start, stop)), self.n_usable[which] - n_inside
            )
        found = [self._whole(i) for i in others]
        covariance = np.average(found, axis=0, weights=self.n_usable[others])
        return shrunk(covariance, self.n_usable[others].sum())

    def usable(self, which: int, start: int) -> bool:
        """Whether at least two frames of a window are not censored: a path needs as many."""
        censored = self.censored[which][start : start + self.frames[which]]
        return np.sum(~censored) >= 2

    def cut(self, which: int, start: int, seed: int, *, training: bool) -> dict:
        """The window of scan `which` that begins at frame `start`, and its view."""
        scan = self.scans[which]
        stop = start + int(self.frames[which])
        if isinstance(self.scans, Store):
            values = self.scans.read(which, start, stop, self.scaling)
        else:
            values = self.scaled(which)[start:stop]
        censored = self.censored[which][start:stop]
        x = torch.from_numpy(np.where(censored[:, None], np.float32(0), values))
        view = self.objective.view(
            x, t_r=scan.t_r, parcels=scan.parcels, seed=seed, training=training
        )
        name = scan.source or scan.participant_id
        item = {"x": x, "t_r": torch.tensor(scan.t_r), "scan": name, **view}
        if self.any_censored:
            item["censored"] = torch.from_numpy(censored.copy())
        if self.objective.needs_rest:
            item["rest"] = torch.from_numpy(self.rest(which, start, stop)).float()
        if self.folds is not None:
            item["folds"] = torch.tensor(self.folds[which])
        return item


def shrunk(covariance: np.ndarray, n_frames: int) -> np.ndarray:
    """A covariance whose logarithm says something: that of few frames is singular, or nearly so.

    From fewer frames than twice the parcels it is shrunk by the oracle-approximating weight, which depends on the
    covariance and the number of frames alone (Chen et al. 2010, IEEE Trans. Signal Process. 58, 5016-5029).
    """
    n_parcels = len(covariance)
    if n_frames >= 2 * n_parcels:
        return covariance
    scale = np.trace(covariance) / n_parcels
    mean_square = np.square(covariance).mean()
    spread = (n_frames + 1) * (mean_square - scale**2 / n_parcels)
    weight = min(1.0, (mean_square + scale**2) / spread)
    return (1 - weight) * covariance + weight * scale * np.eye(n_parcels)


def censored_frames(scan: Scan) -> np.ndarray:
    """True at the frames of a scan that are censored, (time,)."""
    if scan.censored is None:
        return np.zeros(scan.n_frames, dtype=bool)
    return scan.censored


def collate(items: list[dict]) -> dict:
    """A batch of windows.

    Where they differ in length they are padded with zeros at their ends, and ``lengths`` is added.
    """
    lengths = torch.tensor([len(item["x"]) for item in items])
    if (lengths == lengths[0]).all():
        return default_collate(items)
    batch: dict[str, Any] = {"lengths": lengths}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if torch.is_tensor(first) and first.ndim:
            batch[key] = pad_sequence(values, batch_first=True)
        else:
            batch[key] = default_collate(values)
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


@dataclass
class Draws:
    """The numbers of the windows of every batch of an epoch.

    Each step takes the next `batch_size` numbers. They are dealt to the processes in turn, so that the
    batches of all of them, joined, are the batch that one process would have. A step of several parts
    (gradient accumulation) deals them to the parts in the same way.

    Parameters
    ----------
    training : TrainingConfig
    epoch : callable
        Returns the epoch, from 0; asked when an epoch begins.
    rank, world : int
        This process, and how many there are.
    """

    training: TrainingConfig
    epoch: Callable[[], int]
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        n = self.training.windows_per_epoch
        least = n % self.training.batch_size or self.training.batch_size
        if least < self.world * self.training.accumulate:
            raise ValueError(
                f"every step needs a window for each process and part: {self.world} processes and "
                f"{self.training.accumulate} parts, but batch_size {self.training.batch_size} and "
                f"windows_per_epoch {n} give a step of {least}"
            )

    def __len__(self) -> int:
        return self.training.steps_per_epoch * self.training.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        n = self.training.windows_per_epoch
        epoch = self.epoch()
        if self.training.fresh_windows:
            numbers = list(range(epoch * n, (epoch + 1) * n))
        else:
            # All epochs have the first windows, each in an order of its own.
            numbers = np.random.default_rng([self.training.seed, epoch]).permutation(n).tolist()
        parts = self.training.accumulate
        for first in range(0, n, self.training.batch_size):
            step = numbers[first : first + self.training.batch_size]
            for part in range(parts):
                yield step[part * self.world + self.rank :: parts * self.world]
