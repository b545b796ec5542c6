"""What pretraining objectives have taught a network: the same hidden entries, whatever it was trained for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import nn

from mnemodyn.data.scans import Scan
from mnemodyn.pretrain.windows import cut_windows

# Windows that go through a network together.
BATCH = 4


def first_windows(
    scans: Sequence[Scan], scaled: Sequence[np.ndarray], n_timepoints: int, most: int
) -> tuple[np.ndarray, list[str]]:
    """The first windows of every scan, (window, time, parcel), and whose they are."""
    windows = []
    people = []
    for scan, values in zip(scans, scaled, strict=True):
        cut = cut_windows(values, n_timepoints)[:most]
        windows.append(cut)
        people += [scan.participant_id] * len(cut)
    return np.concatenate(windows), people


@torch.no_grad()
def respond(
    network: nn.Module, x: np.ndarray, hidden: np.ndarray, t_r: float
) -> tuple[np.ndarray, np.ndarray]:
    """The scaled windows as a network fills them, (window, time, parcel), and its latents, (window, time, channel)."""
    given = torch.from_numpy(np.where(hidden, 0, x).astype(np.float32))
    mask = torch.from_numpy(hidden)
    filled = []
    latents = []
    for part, where in zip(given.split(BATCH), mask.split(BATCH), strict=True):
        output = network(part, t_r, hidden=where)
        filled.append(torch.where(where, output.reconstruction, part))
        latents.append(output.latents)
    return torch.cat(filled).numpy(), torch.cat(latents).numpy()


class LatentReadout:
    """Fill hidden entries by a linear map from a frozen network's latents, one for each parcel.

    So an objective that trains no output (``latent``), or none for what is hidden, can be asked what its
    latents know. Of `ridges`, shares of the latents' mean variance, the one is taken that predicts the last
    fifth of the windows best from the others.
    """

    def __init__(self, ridges: Sequence[float] = (1e-3, 1e-2, 0.1, 1.0, 10.0)):
        self.ridges = ridges

    def fit(self, latents: np.ndarray, x: np.ndarray, hidden: np.ndarray) -> Self:
        """Fit to windows of participants the network may know; returns itself."""
        z = _with_constant(latents)
        x = x.reshape(-1, x.shape[-1])
        hidden = hidden.reshape(-1, x.shape[-1])
        first = len(z) * 4 // 5
        errors = []
        for ridge in self.ridges:
            maps = _ridge(z[:first], x[:first], hidden[:first], ridge)
            residual = z[first:] @ maps - x[first:]
            errors.append((residual**2)[hidden[first:]].sum())
        self.ridge = self.ridges[int(np.argmin(errors))]
        self.maps = _ridge(z, x, hidden, self.ridge)
        return self

    def fill(self, latents: np.ndarray, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Windows with hidden entries as the map has them, visible ones as given."""
        found = _with_constant(latents) @ self.maps
        return np.where(hidden, found.reshape(x.shape), x)


def _with_constant(latents: np.ndarray) -> np.ndarray:
    """Latents and a one, (window * time, channel + 1), float64."""
    z = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    return np.concatenate([z, np.ones((len(z), 1))], axis=1)


def _ridge(z: np.ndarray, x: np.ndarray, hidden: np.ndarray, ridge: float) -> np.ndarray:
    """Maps (channel + 1, parcel), each fitted to its parcel's hidden frames; the constant is not penalised."""
    penalty = np.full(z.shape[1], ridge * z[:, :-1].var(0).mean())
    penalty[-1] = 0
    maps = []
    for values, mask in zip(x.T, hidden.T, strict=True):
        seen = z[mask]
        gram = seen.T @ seen + np.diag(penalty * len(seen) + 1e-9)
        maps.append(np.linalg.solve(gram, seen.T @ values[mask]))
    return np.stack(maps, axis=1)


def since_visible(hidden: np.ndarray) -> np.ndarray:
    """Frames since the parcel was last visible, 0 where it is, -1 where it has not been; (window, time, parcel)."""
    frames = np.arange(hidden.shape[1])[:, None]
    last = np.maximum.accumulate(np.where(hidden, -1, frames), axis=1)
    return np.where(last < 0, -1, frames - last)


def r2_by(
    x: np.ndarray, fills: Mapping[str, np.ndarray], hidden: np.ndarray, labels: np.ndarray
) -> pd.DataFrame:
    """R2 on hidden entries apart for each label, such as a distance in frames.

    Parameters
    ----------
    x, hidden : ndarray, shape (window, time, parcel)
    fills : mapping of str to ndarray
        By method, of the same shape.
    labels : ndarray of int
        Broadcast to the shape; negative ones are left out.

    Returns
    -------
    DataFrame
        ``method, label, value, n`` (entries).
    """
    labels = np.broadcast_to(labels, x.shape)
    kept = hidden & (labels >= 0)
    label = labels[kept]
    truth = x[kept].astype(np.float64)
    n = np.bincount(label)
    total = np.bincount(label, truth**2)
    rows = []
    for name, fill in fills.items():
        error = np.bincount(label, (truth - fill[kept]) ** 2)
        for i in np.flatnonzero(total):
            rows.append((name, int(i), 1 - error[i] / total[i], int(n[i])))
    return pd.DataFrame(rows, columns=["method", "label", "value", "n"])


def r2_by_band(
    x: np.ndarray,
    fills: Mapping[str, np.ndarray],
    hidden: np.ndarray,
    t_r: float,
    edges: Sequence[float],
) -> pd.DataFrame:
    """R2 by frequency: 1 - power of the error / power of the error of predicting zero, both on hidden entries.

    `edges` of the bands are in Hz. Columns are ``method, low, high`` (Hz), ``value``.
    """
    frequency = np.fft.rfftfreq(x.shape[1], t_r)
    zero = _power(x, hidden)
    rows = []
    for name, fill in fills.items():
        error = _power(x - fill, hidden)
        for low, high in pairwise(edges):
            band = (frequency >= low) & (frequency < high)
            if band.any():
                rows.append((name, low, high, 1 - error[band].sum() / zero[band].sum()))
    return pd.DataFrame(rows, columns=["method", "low", "high", "value"])


def _power(error: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Power by frequency of what was hidden, summed over windows and parcels."""
    spectrum = np.fft.rfft(np.where(hidden, error, 0), axis=1)
    return (np.abs(spectrum) ** 2).sum((0, 2))
