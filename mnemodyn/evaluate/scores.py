"""Scores of predictions about people, with bootstrap intervals over participants and paired comparisons.

Every score is a function of weights a scan, so that one pass gives the value (all weights one) and its bootstrap
(how often a resample of participants holds each).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

SCORES = {
    "classification": ("balanced_accuracy", "auc", "macro_f1", "accuracy"),
    "regression": ("r", "r_plain", "r2", "mae", "mse_z"),
}


def chance(metric: str) -> float | None:
    """What a guess scores, where that does not depend on the data."""
    return {"balanced_accuracy": 0.5, "auc": 0.5, "r": 0.0}.get(metric)


def resamples(participants: Sequence[str], n_boot: int, seed: int) -> np.ndarray:
    """Weights (1 + n_boot, scan): ones, then how often each scan's participant is drawn."""
    _, index = np.unique(np.asarray(participants, dtype=str), return_inverse=True)
    n = index.max() + 1
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    return np.vstack([np.ones(len(index)), draws[:, index]])


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b > 0, a / b, np.nan)


def _auc(
    positive: np.ndarray, score: np.ndarray, weights: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Share of pairs in order, among pairs tested by the same trained model; ties count half."""
    right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for f in np.unique(fold):
        rows = np.flatnonzero(fold == f)
        rows = rows[np.argsort(score[rows], kind="stable")]
        values = score[rows]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
        w, up = weights[:, rows], positive[rows]
        p, n = (np.add.reduceat(w * side, starts, axis=1) for side in (up, ~up))
        right += (p * (n.cumsum(1) - n / 2)).sum(1)
        pairs += p.sum(1) * n.sum(1)
    return _ratio(right, pairs)


def _correlation(
    y: np.ndarray, p: np.ndarray, weights: np.ndarray, group: np.ndarray | None = None
) -> np.ndarray:
    """Weighted Pearson correlation, of what differs within groups where there are any."""
    onehot = (
        np.ones((len(y), 1))
        if group is None
        else (group[:, None] == np.unique(group)).astype(float)
    )
    total = np.maximum(weights @ onehot, 1e-12)

    def moment(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        means = ((weights * a) @ onehot) * ((weights * b) @ onehot) / total
        return weights @ (a * b) - means.sum(1)

    y, p = y - y.mean(), p - p.mean()
    spread = moment(y, y) * moment(p, p)
    return np.where(spread > 1e-20, moment(y, p) / np.sqrt(np.maximum(spread, 1e-20)), 0.0)


def measure(
    kind: str,
    y: np.ndarray,
    prediction: np.ndarray,
    weights: np.ndarray,
    *,
    fold: np.ndarray,
    group: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Scores of the predictions of one repeat, (resample,) each.

    `y` is 1 for the second class and 0 for the first, or the target in its unit; `prediction` is evidence for the
    second class, positive where it is predicted, or the predicted target (both (scan,); ValueError where not finite).
    `weights` are (resample, scan). `fold` is the test fold of each scan: the area under the curve compares within folds
    only, since scores of two models have no common scale. `group`, such as its site, adds ``r_within_site``, the
    correlation of deviations from the groups' means.

    Returns
    -------
    dict
        ``balanced_accuracy, auc, macro_f1, accuracy``; or ``r, r_plain, r2, mae`` (unit of the target) and ``mse_z``
        (mean squared error over the variance of the target in everybody, as the published tables have it). NaN where a
        class is absent. For ``r`` and ``r_within_site`` each prediction is taken relative to the mean of the other
        folds, which is what a model says that has learned nothing; ``r_plain`` takes them as they are.
    """
    y, prediction = np.asarray(y, float), np.asarray(prediction, float)
    if not np.isfinite(prediction).all():
        raise ValueError(
            f"predictions must be finite, got {np.count_nonzero(~np.isfinite(prediction))} that are not"
        )
    if kind == "classification":
        up, said = y == 1, prediction > 0
        tp, fn = weights @ (up & said), weights @ (up & ~said)
        tn, fp = weights @ (~up & ~said), weights @ (~up & said)
        f1 = [_ratio(2 * t, 2 * t + fp + fn) for t in (tp, tn)]
        return {
            "balanced_accuracy": (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2,
            "auc": _auc(up, prediction, weights, fold),
            "macro_f1": (f1[0] + f1[1]) / 2,
            "accuracy": (tp + tn) / weights.sum(1),
        }
    if kind != "regression":
        raise ValueError(f"kind must be classification or regression, got {kind!r}")
    total = weights.sum(1)
    mse = weights @ (y - prediction) ** 2 / total
    spread = weights @ y**2 / total - (weights @ y / total) ** 2
    # Chance would be below zero otherwise: where a fold's own people are high, those it was trained on are low.
    outside = {f: y[fold != f].mean() if (fold != f).any() else 0.0 for f in np.unique(fold)}
    moved = prediction - np.array([outside[f] for f in fold])
    found = {
        "r": _correlation(y, moved, weights),
        "r_plain": _correlation(y, prediction, weights),
        "r2": 1 - _ratio(mse, spread),
        "mae": weights @ np.abs(y - prediction) / total,
        "mse_z": mse / y.var(),
    }
    return (
        found
        if group is None
        else found | {"r_within_site": _correlation(y, moved, weights, group)}
    )


def interval(values: np.ndarray) -> dict[str, float | None]:
    """``value``, ``low`` and ``high`` (95 %, percentiles) of what `resamples` weighted; None where undefined."""
    values = np.asarray(values, float)
    rest = values[1:][np.isfinite(values[1:])]
    value = float(values[0]) if np.isfinite(values[0]) else None
    low, high = (
        np.quantile(rest, [0.025, 0.975]).tolist()
        if value is not None and len(rest)
        else (None, None)
    )
    return {"value": value, "low": low, "high": high}


def t_interval(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """``value``, the mean of one number or more, with ``low`` and ``high`` (95 %, t) where there are two or more."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"value": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return {"value": mean, "low": mean - half, "high": mean + half}


def draw_p(value: float, chance: float, draws: dict) -> float:
    """Two-sided p of a control that scores `value` by luck, from the ``n`` and ``sd`` of draws known to be luck.

    An interval over participants takes the trained models as given. A shuffle of the labels trains others, and so tells
    how far luck goes: t with ``n - 1`` degrees, as the mean of such draws is `chance`.
    """
    return float(2 * stats.t.sf(abs(value - chance) / draws["sd"], draws["n"] - 1))


def corrected_t(differences: np.ndarray, test_share: float) -> float | None:
    """Two-sided p of the corrected resampled t-test for differences a fold; None where there are none, or one fold.

    .. math:: t = \\bar d \\,/ \\sqrt{(1/J + n_\\text{test} / n_\\text{train})\\, s^2}, \\quad J - 1 \\text{ degrees}

    Folds share training people, which the plain test takes for independent; `test_share` is ``n_test / n_train``.
    Source: Nadeau and Bengio (2003), Machine Learning 52, 239-281, section 4.
    """
    d = np.asarray(differences, float)
    d = d[np.isfinite(d)]
    if len(d) < 2 or np.ptp(d) < 1e-12:
        return None
    t = d.mean() / np.sqrt((1 / len(d) + test_share) * d.var(ddof=1))
    return float(2 * stats.t.sf(abs(t), len(d) - 1))


def smallest_sd(accuracy: float, n: int) -> float:
    """SD that the draw of `n` test people alone gives an accuracy in [0, 1]: :math:`\\sqrt{a (1 - a) / n}`."""
    if not 0 <= accuracy <= 1 or n < 1:
        raise ValueError(f"accuracy must be in [0, 1] and n >= 1, got {accuracy} and {n}")
    return float(np.sqrt(accuracy * (1 - accuracy) / n))
