"""Windows of scans for training and validation. Every draw is a function of its number alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mnemodyn.pretrain.objective import Masked

__all__ = ["Draws", "FixedWindows", "RandomWindows", "cut_windows"]


def cut_windows(values: np.ndarray, n_timepoints: int) -> np.ndarray:
    """Consecutive windows of a scan, those that fit whole.

    Parameters
    ----------
    values : ndarray, shape (time, parcel)
    n_timepoints : int
        Window length in frames.

    Returns
    -------
    ndarray, shape (window, n_timepoints, parcel)

    Raises
    ------
    ValueError
        If the scan is shorter than a window.
    """
    n = len(values) // n_timepoints
    if n == 0:
        raise ValueError(f"a window of {n_timepoints} frames does not fit into a scan of {len(values)}")
    return values[: n * n_timepoints].reshape(n, n_timepoints, values.shape[1])


class RandomWindows(Dataset):
    """Draw i is a window of a scan, and a mask, chosen by a generator seeded with (seed, i).

    So a resumed run sees what it would have seen, whatever the number of workers.

    Parameters
    ----------
    scans : sequence of (ndarray of shape (time, parcel), float)
        Scaled values and t_r in seconds.
    n_timepoints : int
        Window length in frames.
    objective : Masked
    seed : int
    """

    def __init__(self, scans: Sequence[tuple[np.ndarray, float]], n_timepoints: int, objective: Masked, seed: int):
        self.scans, self.n_timepoints, self.objective, self.seed = scans, n_timepoints, objective, seed
        for values, _ in scans:
            cut_windows(values, n_timepoints)  # refuses a scan that is too short
        self.starts = np.array([len(values) - n_timepoints + 1 for values, _ in scans])

    def __getitem__(self, draw: int) -> dict:
        rng = np.random.default_rng([self.seed, draw])
        # Every possible window of the whole data set is as likely as any other.
        which = rng.choice(len(self.scans), p=self.starts / self.starts.sum())
        start = rng.integers(self.starts[which])
        values, t_r = self.scans[which]
        x = torch.from_numpy(values[start : start + self.n_timepoints])
        hidden = self.objective.hide((1, *x.shape), seed=int(rng.integers(2**62)), training=True)[0]
        return {"x": x, "hidden": hidden, "t_r": torch.tensor(t_r)}


class Draws(Sampler):
    """Numbers of the draws of an epoch: epoch e takes ``e n ... (e + 1) n - 1``."""

    def __init__(self, n: int):
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.n, (self.epoch + 1) * self.n))


class FixedWindows(Dataset):
    """The consecutive windows of every scan, each with one mask that never changes."""

    def __init__(self, scans: Sequence[tuple[np.ndarray, float]], n_timepoints: int, objective: Masked, seed: int):
        self.items = []
        for values, t_r in scans:
            for x in torch.from_numpy(cut_windows(values, n_timepoints)):
                hidden = objective.hide((1, *x.shape), seed=seed + len(self.items))[0]
                self.items.append({"x": x, "hidden": hidden, "t_r": torch.tensor(t_r)})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]
