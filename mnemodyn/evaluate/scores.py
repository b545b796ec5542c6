"""Scores of predictions about people, with bootstrap intervals over participants and paired comparisons.

Every score is a function of weights, one a scan. One call therefore gives the value (all weights 1)
and its bootstrap (how often each resample of participants holds a scan).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

# The first of each kind is the one that methods are compared by.
SCORES = {
    "classification": ("balanced_accuracy", "auc", "macro_f1", "accuracy"),
    "regression": ("r", "r_plain", "r2", "mae", "mse_z"),
}
CHANCE = {"balanced_accuracy": 0.5, "auc": 0.5, "r": 0.0}  # what a guess scores, whatever the data


def resamples(groups: Sequence, n_boot: int, seed: int) -> np.ndarray:
    """Weights of items for a bootstrap over groups, such as the participants of scans.

    Parameters
    ----------
    groups : sequence, shape (item,)
        The group of every item; all items of a group are drawn together.
    n_boot : int
        Number of resamples, as many groups each as there are.
    seed : int

    Returns
    -------
    ndarray, shape (1 + n_boot, item)
        Ones, then how often each resample holds the item. Any score that is a function of weights,
        such as ``1 - (weights @ residual) / (weights @ total)``, gives what `interval` takes.
    """
    names, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    n = len(names)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=n_boot)
    return np.vstack([np.ones(len(index)), draws[:, index]])


def interval(values: np.ndarray) -> dict[str, float | None]:
    """``value``, and ``low`` and ``high`` of its 95 % percentile interval; None where undefined.

    `values` has shape (1 + n_boot,): the score for each row of `resamples`.
    """
    found: dict[str, float | None] = {"value": None, "low": None, "high": None}
    values = np.asarray(values, float)
    if np.isfinite(values[0]):
        found["value"] = float(values[0])
        # A resample may have one class only, and then no score.
        draws = values[1:][np.isfinite(values[1:])]
        if len(draws):
            low, high = np.quantile(draws, [0.025, 0.975])
            found["low"] = float(low)
            found["high"] = float(high)
    return found


def t_interval(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """``value``, the mean, with ``low`` and ``high`` (95 %, t) where there are two values or more."""
    mean = float(np.mean(values))
    n = len(values)
    if n < 2:
        return {"value": mean, "low": None, "high": None}
    factor = stats.t.ppf(0.975, n - 1)
    half = float(factor * np.std(values, ddof=1) / np.sqrt(n))
    return {"value": mean, "low": mean - half, "high": mean + half}


def corrected_t(differences: np.ndarray, test_share: float) -> float | None:
    r"""Two-sided p of the corrected resampled t-test; None for fewer than two different values.

    .. math:: t = \bar d \,/ \sqrt{(1/J + n_\text{test} / n_\text{train})\, s^2}, \quad J - 1 \text{ degrees}

    `differences` are one a fold, (J,); `test_share` is ``n_test / n_train``. Folds share training
    people, which the plain test takes for independent.
    Source: Nadeau and Bengio (2003), Machine Learning 52, 239-281, section 4.
    """
    d = np.asarray(differences, float)
    d = d[np.isfinite(d)]
    n = len(d)
    if n < 2 or np.ptp(d) < 1e-12:
        return None
    variance = (1 / n + test_share) * d.var(ddof=1)
    t = d.mean() / np.sqrt(variance)
    return float(2 * stats.t.sf(abs(t), n - 1))


def measure(
    kind: str,
    y: np.ndarray,
    prediction: np.ndarray,
    weights: np.ndarray,
    *,
    fold: np.ndarray,
    group: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Scores of the predictions of one repeat.

    Parameters
    ----------
    kind : {"classification", "regression"}
    y : ndarray, shape (scan,)
        1 for the second class and 0 for the first, or the target in its unit.
    prediction : ndarray, shape (scan,)
        Evidence for the second class, positive where it is predicted; or the predicted target.
    weights : ndarray, shape (resample, scan)
        See `resamples`.
    fold : ndarray, shape (scan,)
        Test fold of each scan. The area under the curve compares scans within a fold only, since
        evidence of two trained models has no common scale.
    group : ndarray, shape (scan,), optional
        Such as its site; adds ``r_within_site``, the correlation of deviations from group means.

    Returns
    -------
    dict of str to ndarray, shape (resample,)
        ``balanced_accuracy, auc, macro_f1, accuracy``; or ``r, r_plain, r2, mae`` (in the target's
        unit) and ``mse_z`` (of the target in SD). ``r`` is the correlation with predictions relative
        to the mean of the people trained on: otherwise a prediction of that mean alone would
        correlate negatively, since where a fold's own people are high the others are low.

    Raises
    ------
    ValueError
        If a prediction is not finite.
    """
    n_bad = np.count_nonzero(~np.isfinite(prediction))
    if n_bad:
        raise ValueError(f"predictions must be finite, got {n_bad} that are not")
    if kind == "classification":
        return _classes(y == 1, prediction, weights, fold)
    return _numbers(y, prediction, weights, fold, group)


def _classes(
    positive: np.ndarray, evidence: np.ndarray, weights: np.ndarray, fold: np.ndarray
) -> dict[str, np.ndarray]:
    # Every count is a sum of weights, one a resample.
    said = evidence > 0
    true_positive = weights @ (positive & said)
    true_negative = weights @ (~positive & ~said)
    n_positive = weights @ positive
    n_negative = weights @ ~positive
    wrong = n_positive + n_negative - true_positive - true_negative
    sensitivity = _ratio(true_positive, n_positive)
    specificity = _ratio(true_negative, n_negative)
    f1 = _ratio(2 * true_positive, 2 * true_positive + wrong)
    f1_negative = _ratio(2 * true_negative, 2 * true_negative + wrong)
    return {
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "auc": _auc(positive, evidence, weights, fold),
        "macro_f1": (f1 + f1_negative) / 2,
        "accuracy": (true_positive + true_negative) / weights.sum(1),
    }


def _numbers(
    y: np.ndarray,
    prediction: np.ndarray,
    weights: np.ndarray,
    fold: np.ndarray,
    group: np.ndarray | None,
) -> dict[str, np.ndarray]:
    total = weights.sum(1)
    mse = weights @ (y - prediction) ** 2 / total
    spread = weights @ y**2 / total - (weights @ y / total) ** 2
    # Each fold's predictions relative to the mean that its model was trained on; see `measure`.
    relative = prediction.astype(float)
    for f in np.unique(fold):
        trained_on = y[fold != f]
        if len(trained_on):
            relative[fold == f] -= trained_on.mean()
    everybody = np.zeros(len(y))
    scores = {
        "r": _correlation(y, relative, weights, everybody),
        "r_plain": _correlation(y, prediction, weights, everybody),
        "r2": 1 - _ratio(mse, spread),
        "mae": weights @ np.abs(y - prediction) / total,
        # Of the sample's variance, not the resample's: a unit, and no denominator that varies.
        "mse_z": mse / y.var(),
    }
    if group is not None:
        scores["r_within_site"] = _correlation(y, relative, weights, group)
    return scores


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where b is 0, as where a resample has one class only."""
    return np.divide(a, b, out=np.full(len(b), np.nan), where=b > 0)


def _auc(
    positive: np.ndarray, evidence: np.ndarray, weights: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Share of pairs in order, among pairs tested by the same trained model; ties count half."""
    right = np.zeros(len(weights))
    n_pairs = np.zeros(len(weights))
    for f in np.unique(fold):
        rows = np.flatnonzero(fold == f)
        rows = rows[np.argsort(evidence[rows], kind="stable")]
        # Weights of either class, summed over scans with the same evidence.
        changes = np.diff(evidence[rows], prepend=np.nan) != 0
        starts = np.flatnonzero(changes)
        w = weights[:, rows]
        up = np.add.reduceat(w * positive[rows], starts, axis=1)
        down = np.add.reduceat(w * ~positive[rows], starts, axis=1)
        # A positive scan is right of all negative ones below it, and of half of those beside it.
        below = down.cumsum(1) - down / 2
        right += (up * below).sum(1)
        n_pairs += up.sum(1) * down.sum(1)
    return _ratio(right, n_pairs)


def _correlation(
    y: np.ndarray, p: np.ndarray, weights: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """Weighted Pearson correlation of deviations from the means of groups; 0 where nothing varies."""
    member = (group[:, None] == np.unique(group)).astype(float)
    n = np.maximum(weights @ member, 1e-12)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Sums of products of deviations from the means of groups, one a resample."""
        sum_a = (weights * a) @ member
        sum_b = (weights * b) @ member
        return weights @ (a * b) - (sum_a * sum_b / n).sum(1)

    # Moments of numbers far from zero would lose digits.
    y = y - y.mean()
    p = p - p.mean()
    spread = product(y, y) * product(p, p)
    return np.where(spread > 1e-20, product(y, p) / np.sqrt(np.maximum(spread, 1e-20)), 0.0)
