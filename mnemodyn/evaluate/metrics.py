"""Reconstruction of hidden entries, scored: R2, bootstrap intervals of it and of a difference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hidden_sums(x: np.ndarray, prediction: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residual and total sums of squares over the hidden entries of each item.

    Parameters
    ----------
    x, prediction
        (batch, time, parcel), or (time, parcel) for a batch of one; scaled scans, in SD.
    hidden
        Boolean, the same shape; True where the method did not see `x`.

    Returns
    -------
    residual, total
        (batch,) each, float64: sums of ``(x - prediction)**2`` and ``x**2`` where hidden. R2 of any
        set of items is ``1 - residual.sum() / total.sum()``.

    Raises
    ------
    ValueError
        If shapes disagree, `hidden` is not boolean or hides nothing, or a hidden entry of `x` or
        `prediction` is not finite.
    """
    x, prediction, hidden = np.asarray(x), np.asarray(prediction), np.asarray(hidden)
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be ([batch,] time, parcel), got shape {x.shape}")
    for name, array in (("prediction", prediction), ("hidden", hidden)):
        if array.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {x.shape}, got {array.shape}")
    if hidden.dtype != bool or not hidden.any():
        got = f"{hidden.dtype} with {np.count_nonzero(hidden)} hidden"
        raise ValueError(f"hidden must be boolean and hide at least one entry, got {got}")
    for name, array in (("x", x), ("prediction", prediction)):
        if not np.isfinite(array[hidden]).all():
            raise ValueError(f"{name} must be finite where hidden, got NaN or infinity")
    truth = np.where(hidden, x, 0).astype(np.float64)
    error = truth - np.where(hidden, prediction, 0)
    residual, total = (np.atleast_1d((a**2).sum((-2, -1))) for a in (error, truth))
    return residual, total


def r2_hidden(x: np.ndarray, prediction: np.ndarray, hidden: np.ndarray) -> float:
    """R2 over the hidden entries: ``1 - sum (x - prediction)**2 / sum x**2``.

    The reference is each parcel's mean over its own scan, which is zero because scans come scaled:
    predicting zero scores exactly 0. It is not the mean of the hidden entries, which no method
    could know. Parameters and errors are those of `hidden_sums`, and ValueError if `x` is zero
    wherever it is hidden.
    """
    residual, total = hidden_sums(x, prediction, hidden)
    if total.sum() == 0:
        raise ValueError("x must vary where hidden, got only zeros there")
    return float(1 - residual.sum() / total.sum())


def bootstrap_r2(
    residual: np.ndarray,
    total: np.ndarray,
    *,
    groups: Sequence | None = None,
    n_boot: int = 2000,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval ``(low, high)`` of the pooled R2.

    Parameters
    ----------
    residual, total
        (batch,) each, from `hidden_sums`; every resample forms the ratio of sums anew.
    groups
        One label an item, such as ``participant_id``: whole groups are then resampled. Windows of
        one participant are alike, so resampling items (None) gives too narrow an interval.
    n_boot
        Number of resamples.
    seed
        Seed of the resampling.
    level
        Coverage, in (0, 1).

    Raises
    ------
    ValueError
        If shapes disagree, a sum is negative or not finite, there are fewer than two items (or
        groups) or one has a total of zero, or `n_boot` or `level` is out of range.
    """
    residual = _checked(residual, total)
    return _interval(1.0, residual, total, groups, n_boot, seed, level)


def bootstrap_difference(
    residual_model: np.ndarray,
    residual_baseline: np.ndarray,
    total: np.ndarray,
    *,
    groups: Sequence | None = None,
    n_boot: int = 2000,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a model's R2 minus a baseline's.

    Both are scored on the same hidden entries of the same items, in one order, and a resample draws
    the same items for both. The other parameters and the errors are those of `bootstrap_r2`.
    """
    residual = _checked(residual_model, total) - _checked(residual_baseline, total)
    return _interval(0.0, residual, total, groups, n_boot, seed, level)


def _checked(residual: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Check one array of residual sums against the totals."""
    residual, total = np.asarray(residual, np.float64), np.asarray(total, np.float64)
    if total.ndim != 1 or residual.shape != total.shape:
        got = f"{residual.shape} and {total.shape}"
        raise ValueError(f"residual and total must be (batch,) of one length, got {got}")
    for name, values in (("residual", residual), ("total", total)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"{name} must be finite and >= 0, got {values.min()} as its minimum")
    return residual


def _interval(offset, residual, total, groups, n_boot, seed, level) -> tuple[float, float]:
    """Interval of ``offset - sum(residual) / sum(total)``."""
    total = np.asarray(total, np.float64)
    if n_boot < 1 or not 0 < level < 1:
        raise ValueError(f"n_boot must be >= 1, level in (0, 1), got {n_boot} and {level}")
    if groups is not None:
        if len(groups) != len(total):
            raise ValueError(f"groups must label {len(total)} items, got {len(groups)} labels")
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        residual, total = np.bincount(index, residual), np.bincount(index, total)
    n = len(total)
    if n < 2 or not total.all():
        got = f"{n}, {np.count_nonzero(total == 0)} of them with a total of 0"
        raise ValueError(f"a bootstrap needs >= 2 items (or groups), each with a total, got {got}")
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    values = offset - (draws @ residual) / (draws @ total)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
