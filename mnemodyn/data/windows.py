"""Windows of a length in seconds, drawn from scans of any length and repetition time without loading them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.data.store import Store

__all__ = ["SecondsWindows", "collate"]


class SecondsWindows(Dataset):
    """Draw i is a window of a scan, chosen by a generator seeded with (seed, i): of scans short and long, every
    possible window is as likely as any other.

    Parameters
    ----------
    scans : Store or sequence of Scan
        From a store a draw reads the window's frames alone; other scans are scaled and held in memory.
    seconds : float
        Length of a window: ``round(seconds / t_r)`` frames of each scan.
    scaling : Scaling, optional
        Fitted, where it has a state; the z-score of each parcel by default.
    seed : int
    short : {"drop", "pad"}
        Scans that are shorter than a window are left out and counted in ``n_dropped``, or are drawn whole, and
        :func:`collate` pads them. They are never repeated.

    Attributes
    ----------
    n_frames : ndarray of int, shape (scan,)
        Frames of a window of each scan.
    n_dropped : int

    Raises
    ------
    ValueError
        For another `short`, or a length that is no whole number >= 2 of frames.
    DataError
        If every scan is shorter than a window.
    """

    def __init__(
        self,
        scans: Store | Sequence[Scan],
        seconds: float,
        *,
        scaling: Scaling | None = None,
        seed: int = 0,
        short: str = "drop",
    ):
        if short not in ("drop", "pad"):
            raise ValueError(f"short must be 'drop' or 'pad', got {short!r}")
        self.scaling, self.seed = scaling or Scaling(), seed
        if isinstance(scans, Store):
            self.scans = scans
            lengths, self.t_r = scans.table["n_frames"].to_numpy(), scans.table["t_r"].to_numpy(float)
        else:
            self.scans = [(self.scaling(scan), scan.censored) for scan in scans]
            lengths, self.t_r = np.array([s.n_frames for s in scans]), np.array([s.t_r for s in scans])
        wanted = np.round(seconds / self.t_r).astype(int)
        if (wanted < 2).any():
            raise ValueError(f"a window of {seconds} s has fewer than 2 frames at t_r {self.t_r.max()} s")
        starts = lengths - wanted + 1
        self.n_dropped = int((starts < 1).sum()) if short == "drop" else 0
        self.n_frames = np.minimum(wanted, lengths)
        self._ends = np.maximum(starts, 0 if short == "drop" else 1).cumsum()
        if not len(lengths) or self._ends[-1] == 0:
            raise DataError(
                f"none of {len(lengths)} scans holds a window of {seconds} s; take a shorter one or short='pad'",
                problem="too-short",
            )

    def __getitem__(self, draw: int) -> dict:
        """``x`` (time, parcel), ``censored`` (time,), ``t_r`` (s) and ``scan``, the scan's number."""
        at = int(np.random.default_rng([self.seed, draw]).integers(self._ends[-1]))
        i = int(np.searchsorted(self._ends, at, side="right"))
        n = int(self.n_frames[i])
        stop = int(self._ends[i]) - at - 1 + n  # the last possible window comes last
        if isinstance(self.scans, Store):
            start = stop - n
            x, censored = self.scans.read(i, start, stop, self.scaling), self.scans.censored(i, start, stop)
        else:
            x, censored = self.scans[i]
            x, censored = x[stop - n : stop], None if censored is None else censored[stop - n : stop]
        censored = torch.zeros(n, dtype=torch.bool) if censored is None else torch.from_numpy(np.array(censored))
        return {
            "x": torch.from_numpy(x),
            "censored": censored,
            "t_r": torch.tensor(self.t_r[i], dtype=torch.float32),
            "scan": i,
        }


def collate(items: Sequence[dict]) -> dict[str, Tensor]:
    """A batch of windows of unequal length, padded at their end.

    Returns
    -------
    dict
        ``x`` (batch, time, parcel), 0 where padded; ``lengths`` (batch,), frames that are not padding; ``censored``
        (batch, time), True where censored or padded; ``t_r`` (batch,), seconds; ``scan`` (batch,).
    """

    def padded(name: str, value: float) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([item[name] for item in items], batch_first=True, padding_value=value)

    return {
        "x": padded("x", 0.0),
        "lengths": torch.tensor([len(item["x"]) for item in items]),
        "censored": padded("censored", True),
        "t_r": torch.stack([item["t_r"] for item in items]),
        "scan": torch.tensor([item["scan"] for item in items]),
    }
