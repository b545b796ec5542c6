"""Reconstruction of hidden entries, scored: R2, bootstrap intervals of it and of a difference."""

import numpy as np


def hidden_sums(
    x: np.ndarray, prediction: np.ndarray, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Residual and total sums of squares over the hidden entries of each item, (batch,) each, float64.

    R2 of any items is ``1 - residual.sum() / total.sum()``. Its reference is zero, which is each parcel's mean over its
    own scan since scans come scaled, and not the mean of the hidden entries, which no method could know.

    `x`, `prediction` and `hidden` are ([batch,] time, parcel), in SD; `hidden` is True where the method saw nothing.

    Raises
    ------
    ValueError
        If shapes disagree, nothing is hidden, or a hidden entry of `x` or `prediction` is not finite.
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


def bootstrap_r2(
    residual: np.ndarray,
    total: np.ndarray,
    baseline: np.ndarray | None = None,
    *,
    n_boot: int = 2000,
    seed: int,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the pooled R2, or of how much it is above that of a baseline.

    All are (batch,), from `hidden_sums` of the same items and hidden entries; a resample draws the same items from
    each.

    Raises
    ------
    ValueError
        If shapes disagree, a sum is negative or not finite, or there are fewer than two items or one with a total of 0.
    """
    sums = {
        "residual": residual,
        "total": total,
        "baseline": total if baseline is None else baseline,
    }
    sums = {name: np.asarray(values, np.float64) for name, values in sums.items()}
    shapes = {values.shape for values in sums.values()}
    if len(shapes) > 1 or sums["total"].ndim != 1:
        raise ValueError(f"sums must be (batch,) of one length, got shapes {sorted(shapes)}")
    for name, values in sums.items():
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"{name} must be finite and >= 0, got {values.min()} as its minimum")
    residual, total, _ = sums.values()
    n = len(total)
    if n < 2 or not total.all():
        got = f"{n}, {np.count_nonzero(total == 0)} of them with a total of 0"
        raise ValueError(f"a bootstrap needs >= 2 items, each with a total, got {got}")
    offset, less = (1.0, residual) if baseline is None else (0.0, residual - sums["baseline"])
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    low, high = np.quantile(offset - (draws @ less) / (draws @ total), [0.025, 0.975])
    return float(low), float(high)
