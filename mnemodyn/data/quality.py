"""What a scan of a resting brain should look like: autocorrelation, spectrum, homotopic connectivity."""

import re

import numpy as np
import pandas as pd
from scipy.signal import welch

from mnemodyn.data.scans import Scan

__all__ = ["homotopic_pairs", "quality", "spectrum"]

SLOW = 0.1  # Hz: haemodynamic fluctuations lie below


def homotopic_pairs(parcels: tuple[str, ...]) -> list[tuple[int, int]]:
    """Columns (left, right) of parcels whose names differ only in a trailing or embedded L/R or LH/RH."""
    place = {name: i for i, name in enumerate(parcels)}
    pairs = []
    for name, i in place.items():
        twin = re.sub(r"(?<![A-Za-z])L(H?)(?![A-Za-z])", r"R\1", name)
        if twin != name and twin in place:
            pairs.append((i, place[twin]))
    return pairs


def _varying(scan: Scan) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values and names of the parcels that are not constant; censored frames without a value get the parcel's mean."""
    keep = ~scan.constant
    values = scan.values[:, keep]
    if scan.censored is not None and np.isnan(values).any():
        values = np.where(np.isnan(values), np.nanmean(values, axis=0), values)
    return values, tuple(p for p, k in zip(scan.parcels, keep, strict=True) if k)


def spectrum(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Welch's estimate of the power spectrum, mean over the parcels that vary, scaled to unit variance.

    Returns
    -------
    frequency : ndarray, shape (n,), Hz
    power : ndarray, shape (n,), per Hz
        Windows of 256 frames, or the whole scan where it is shorter.
    """
    values, _ = _varying(scan)
    z = (values - values.mean(0)) / values.std(0)
    frequency, power = welch(z, fs=1 / scan.t_r, nperseg=min(256, scan.n_frames), axis=0)
    return frequency, power.mean(1)


def quality(scans: list[Scan]) -> pd.DataFrame:
    """A row a scan, over the parcels that are not constant.

    Returns
    -------
    DataFrame
        ``participant``, ``frames``, ``minutes``, ``lag1`` (mean lag-1 autocorrelation over parcels), ``slow``
        (share of power below 0.1 Hz), ``slow_white`` (the same for white noise at this t_r) and ``homotopic``
        (mean Pearson correlation of left and right twins; NaN where the names tell of none).
    """
    rows = []
    for scan in scans:
        values, parcels = _varying(scan)
        z = (values - values.mean(0, dtype=float)) / values.std(0, dtype=float)
        frequency, power = spectrum(scan)
        pairs = homotopic_pairs(parcels)
        rows.append(
            {
                "participant": scan.participant_id,
                "frames": scan.n_frames,
                "minutes": scan.n_frames * scan.t_r / 60,
                "lag1": float((z[1:] * z[:-1]).mean()),
                "slow": float(power[frequency < SLOW].sum() / power.sum()),
                "slow_white": float(np.mean(frequency < SLOW)),
                "homotopic": float(np.mean([(z[:, i] * z[:, j]).mean() for i, j in pairs])) if pairs else np.nan,
            }
        )
    return pd.DataFrame(rows)
