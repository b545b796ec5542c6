"""What pretraining objectives have taught a network: the same hidden entries, whatever it was trained for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Self

import numpy as np
import pandas as pd
import torch

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.pretrain.objectives import Masked

DIGITS = 10  # two equal runs differ in the sixteenth


class LatentReadout:
    """Fill hidden entries by a linear map from a frozen network's latents, one a parcel, fitted to hidden entries.

    So an objective that trains no output (``latent``), or none for what is hidden, is asked what its latents know.
    Of `ridges`, shares of the latents' mean variance, the one is taken that predicts the last fifth of the windows
    it is fitted to best from the others. `t_r` in seconds.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        t_r: float,
        ridges: Sequence[float] = (1e-3, 1e-2, 0.1, 1.0, 10.0),
    ):
        self.model, self.t_r, self.ridges = checkpoint.model, t_r, ridges

    @torch.no_grad()
    def _latents(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Latents and a one, (batch * time, channel + 1)."""
        parts = []
        for values, mask in zip(x, hidden, strict=True):
            given = torch.as_tensor(np.where(mask, 0, values)[None], dtype=torch.float32)
            parts.append(
                self.model(given, self.t_r, hidden=torch.as_tensor(mask[None]))
                .latents[0]
                .double()
                .numpy()
            )
        z = np.concatenate(parts)
        return np.concatenate([z, np.ones((len(z), 1))], axis=1)

    def fit(self, x: np.ndarray, hidden: np.ndarray) -> Self:
        """Fit to windows (batch, time, parcel) of participants the network may know; returns itself."""
        z, x, hidden = (
            self._latents(x, hidden),
            x.reshape(-1, x.shape[-1]),
            hidden.reshape(-1, x.shape[-1]),
        )
        first = len(z) * 4 // 5

        def error(ridge: float) -> float:
            maps = _ridge(z[:first], x[:first], hidden[:first], ridge)
            return ((z[first:] @ maps - x[first:]) ** 2)[hidden[first:]].sum()

        self.ridge = min(self.ridges, key=error)
        self.maps = _ridge(z, x, hidden, self.ridge)
        return self

    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """(batch, time, parcel) with hidden entries as the map has them, visible ones as given."""
        return np.where(hidden, (self._latents(x, hidden) @ self.maps).reshape(x.shape), x)


def _ridge(z: np.ndarray, x: np.ndarray, hidden: np.ndarray, ridge: float) -> np.ndarray:
    """Maps (channel + 1, parcel), each fitted to its parcel's hidden frames; the constant is not penalised."""
    penalty = ridge * np.r_[np.full(z.shape[1] - 1, z[:, :-1].var(0).mean()), 0]
    maps = []
    for values, mask in zip(x.T, hidden.T, strict=True):
        seen = z[mask]
        maps.append(
            np.linalg.solve(
                seen.T @ seen + np.diag(penalty * len(seen) + 1e-9), seen.T @ values[mask]
            )
        )
    return np.stack(maps, axis=1)


def by_setting(
    methods: Mapping,
    windows: np.ndarray,
    *,
    shares: Sequence[float],
    mask_windows: Sequence[int],
    t_r: float,
    seed: int,
) -> pd.DataFrame:
    """R2 on hidden entries: ``method, hidden_share, mask_window`` (frames), its ``seconds``, ``r2``."""
    rows = []
    for share, window in product(shares, mask_windows):
        hidden = Masked(share, window).hide(windows.shape, seed).numpy()
        for name, method in methods.items():
            truth = windows[hidden].astype(np.float64)
            residual = ((truth - method.fill(windows, hidden)[hidden]) ** 2).sum()
            r2 = 1 - residual / (truth**2).sum()
            rows.append((name, share, window, window * t_r, round(r2, DIGITS)))
    return pd.DataFrame(rows, columns=["method", "hidden_share", "mask_window", "seconds", "r2"])


def since_visible(hidden: np.ndarray) -> np.ndarray:
    """Frames since the parcel was last visible, 0 where it is, -1 where it has not been; (batch, time, parcel)."""
    frames = np.arange(hidden.shape[1])[:, None]
    last = np.maximum.accumulate(np.where(hidden, -1, frames), axis=1)
    return np.where(last < 0, -1, frames - last)


def r2_by(
    x: np.ndarray, fills: Mapping[str, np.ndarray], hidden: np.ndarray, labels: np.ndarray
) -> pd.DataFrame:
    """R2 on hidden entries apart for each label, such as a parcel's number or a distance in frames.

    `x`, `hidden` and each of `fills` are (batch, time, parcel), and integer `labels` broadcast to it; negative ones are
    left out. Columns are ``method, label, r2, n`` (entries).
    """
    labels = np.broadcast_to(labels, x.shape)
    kept = hidden & (labels >= 0)
    label, truth = labels[kept], x[kept].astype(np.float64)
    n, total = np.bincount(label), np.bincount(label, truth**2)
    found = np.flatnonzero(total)
    rows = []
    for name, fill in fills.items():
        error = np.bincount(label, (truth - fill[kept]) ** 2)
        rows += [(name, int(i), round(1 - error[i] / total[i], DIGITS), int(n[i])) for i in found]
    return pd.DataFrame(rows, columns=["method", "label", "r2", "n"])


def r2_by_band(
    x: np.ndarray,
    fills: Mapping[str, np.ndarray],
    hidden: np.ndarray,
    t_r: float,
    edges: Sequence[float],
) -> pd.DataFrame:
    """R2 by frequency: 1 - the power of the error over that of the error of predicting zero, both on hidden entries.

    `edges` of the bands are in Hz. Columns are ``method, low, high`` (Hz), ``r2``.
    """
    frequency = np.fft.rfftfreq(x.shape[1], t_r)

    def power(error: np.ndarray) -> np.ndarray:
        return (np.abs(np.fft.rfft(np.where(hidden, error, 0), axis=1)) ** 2).sum((0, 2))

    zero, rows = power(x), []
    for name, fill in fills.items():
        error = power(x - fill)
        for low, high in pairwise(edges):
            band = (frequency >= low) & (frequency < high)
            if band.any():
                rows.append(
                    (name, low, high, round(1 - error[band].sum() / zero[band].sum(), DIGITS))
                )
    return pd.DataFrame(rows, columns=["method", "low", "high", "r2"])
