r"""From features to predictions: linear heads, a multilayer perceptron, and what is chosen in training folds.

A linear model with an L2 penalty depends on its features only through their products :math:`K = X X^T`: with
:math:`K = U \Lambda U^T` on the training scans, the same model fitted on the :math:`n` columns of
:math:`U \Lambda^{1/2}` gives the same predictions as on all features (the representer theorem). So scikit-learn's
estimators fit 19,900 edges at the price of as many columns as there are scans, and nothing is approximated.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.neural_network import MLPClassifier, MLPRegressor

__all__ = ["Features", "Standardised", "Tangent", "predict", "rotate"]

INVERSE_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of rows with mean square norm 1
RIDGE_PENALTIES = tuple(np.logspace(-3, 3, 13))
COMPONENTS = (10, 30, 100)
DECAYS = (0.01, 1.0, 30.0)
SHARES = (0.0, 0.2, 0.5)  # of the variance, for what is joined


@dataclass
class Features:
    """Features of one unit, such as connectivity, taken as they are: their products serve every fold."""

    values: np.ndarray = field(repr=False)
    _products: np.ndarray | None = field(default=None, repr=False)

    def products(self, train: np.ndarray) -> np.ndarray:
        """Products of all scans' features, (scan, scan)."""
        if self._products is None:
            values = self.values - self.values[:1]  # any origin will do, and a near one keeps the digits
            self._products = np.asarray(values @ values.T, float)
        return self._products

    def __getstate__(self) -> dict:
        self.products(np.arange(0))
        return {"values": np.empty((len(self.values), 0), np.float32), "_products": self._products}


@dataclass
class Standardised(Features):
    """Features of unequal units: missing values filled by the mean, SD 1, both of the training scans."""

    def products(self, train: np.ndarray) -> np.ndarray:
        values = np.asarray(self.values, float)
        known = np.isfinite(values[train])
        n = np.maximum(known.sum(0), 1)
        mean = np.where(known, values[train], 0).sum(0) / n
        values = np.where(np.isfinite(values), values - mean, 0)
        sd = np.sqrt((values[train] ** 2).sum(0) / n)
        values = values / np.where(sd > 1e-12, sd, np.inf)
        return values @ values.T

    def __getstate__(self) -> dict:
        return self.__dict__


@dataclass
class Tangent(Features):
    """Connectivity as a step from the training scans' mean covariance, in its tangent space (nilearn).

    Attributes
    ----------
    values : list of ndarray, shape (time, parcel)
        Z-scored frames of every scan. The covariances are shrunk as Ledoit and Wolf do.
    n_reference : int
        The mean is taken over as many training scans at most, evenly spaced.
    """

    n_reference: int = 60

    def products(self, train: np.ndarray) -> np.ndarray:
        from nilearn.connectome import ConnectivityMeasure
        from sklearn.covariance import LedoitWolf

        measure = ConnectivityMeasure(
            LedoitWolf(store_precision=False), kind="tangent", vectorize=True, standardize=False
        )
        chosen = train[np.linspace(0, len(train) - 1, min(self.n_reference, len(train))).astype(int)]
        measure.fit([self.values[i].astype(float) for i in chosen])
        steps = np.array([measure.transform([x.astype(float)])[0] for x in self.values], np.float32)
        return np.asarray(steps @ steps.T, float)

    def __getstate__(self) -> dict:
        return self.__dict__


def rotate(
    products: np.ndarray, train: np.ndarray, test: np.ndarray, remove: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Columns that stand for the features: as many as the training scans need, of mean square norm 1 a row.

    Parameters
    ----------
    products : ndarray, shape (scan, scan)
    train, test : ndarray of int
        Rows.
    remove : ndarray, shape (scan, column), optional
        What is regressed out of every feature, with the training scans' coefficients; their mean always is.

    Returns
    -------
    train, test : ndarray, shape (scan, column)
        Principal components of the training scans, the widest first.
    """
    columns = np.ones((len(products), 1))
    if remove is not None:
        centre = np.nanmean(remove[train], axis=0)
        columns = np.hstack([columns, np.where(np.isfinite(remove), remove - centre, 0)])
    # Residuals of all scans, (I - C pinv(C_train)) X, written as products.
    solver = np.linalg.pinv(columns[train])
    fitted = solver @ products[train]
    k = products - columns @ fitted - fitted.T @ columns.T
    k += columns @ (solver @ products[np.ix_(train, train)] @ solver.T) @ columns.T
    k /= max(np.trace(k[np.ix_(train, train)]) / len(train), 1e-12)
    values, vectors = np.linalg.eigh(k[np.ix_(train, train)])
    keep = np.flatnonzero(values > 1e-9 * max(values[-1], 1e-9))[::-1]
    root = np.sqrt(values[keep])
    return vectors[:, keep] * root, k[np.ix_(test, train)] @ (vectors[:, keep] / root)


@dataclass(frozen=True)
class _Choice:
    """A candidate, its score in the inner folds, its evidence there, and how to fit it."""

    name: str
    score: float
    inner: np.ndarray
    fit: Callable


def _linear(x: np.ndarray, y: np.ndarray, splits: list, kind: str, name: str = "") -> _Choice:
    """The penalty that does best in the inner folds; all its models are linear, so their products are enough."""
    penalties = RIDGE_PENALTIES if kind == "regression" else INVERSE_PENALTIES
    inner = np.empty((len(penalties), len(y)))
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):  # half of the time otherwise
        for a, b in splits:
            if kind == "regression":
                many = Ridge(alpha=np.array(penalties), solver="svd").fit(x[a], np.tile(y[a, None], len(penalties)))
                inner[:, b] = (x[b] @ many.coef_.T + many.intercept_).T
                continue
            model = _logistic(penalties[0], warm_start=True)
            for i, c in enumerate(penalties):
                model.C = c
                model.fit(x[a], y[a])
                inner[i, b] = x[b] @ model.coef_[0] + model.intercept_[0]
    if kind == "regression":
        found = -((inner - y) ** 2).mean(1)
        model, setting = Ridge(alpha=penalties[found.argmax()], solver="svd"), "alpha"
    else:
        found = np.array([roc_auc_score(y, row) for row in inner])
        model, setting = _logistic(penalties[found.argmax()]), "C"
    best = int(found.argmax())
    label = f"{name} {setting}={penalties[best]:.3g}".strip()
    return _Choice(label, float(found[best]), inner[best], lambda: model.fit(x, y))


def _logistic(c: float, **settings) -> LogisticRegression:
    return LogisticRegression(C=c, class_weight="balanced", max_iter=2000, **settings)


class _Evidence:
    """A fitted perceptron with ``decision_function``."""

    def __init__(self, model):
        self.model = model

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        p = self.model.predict_proba(x)[:, 1].clip(1e-9, 1 - 1e-9)
        return np.log(p / (1 - p))


def _perceptron(x: np.ndarray, y: np.ndarray, splits: list, kind: str, seed: int) -> _Choice:
    x = x * np.sqrt(len(x[0]))  # a mean square of 1 a column suits the initial weights
    shared = {"hidden_layer_sizes": (64,), "early_stopping": False, "max_iter": 60, "tol": 0.0, "random_state": seed}
    found = []
    for decay in DECAYS:
        name = f"decay={decay:g}"
        if kind == "regression":
            model = MLPRegressor(alpha=decay, **shared)
            scale = (y.mean(), y.std())
            z = (y - scale[0]) / scale[1]
            inner = cross_val_predict(model, x, z, cv=splits) * scale[1] + scale[0]
            found.append(_Choice(name, -((inner - y) ** 2).mean(), inner, lambda m=model, z=z: m.fit(x, z)))
        else:
            model = MLPClassifier(alpha=decay, **shared)
            weights = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
            p = cross_val_predict(model, x, y, cv=splits, method="predict_proba", params={"sample_weight": weights})[
                :, 1
            ].clip(1e-9, 1 - 1e-9)
            inner = np.log(p / (1 - p))
            found.append(
                _Choice(name, roc_auc_score(y, inner), inner, lambda m=model, w=weights: _Evidence(m.fit(x, y, w)))
            )
    return max(found, key=lambda choice: choice.score)


def predict(
    head: str,
    blocks: dict[str, Features],
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    *,
    kind: str,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    shares: Sequence[dict[str, float]] = (),
    remove: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, str]:
    """Fit on training scans, choose by inner folds among them, predict the test scans.

    Parameters
    ----------
    head : {"linear", "pca", "mlp", "pick", "join"}
        ``linear``: penalised regression, its penalty chosen. ``pca``: the same on the first components, their number
        chosen too. ``mlp``: a perceptron with one hidden layer, its weight decay chosen. ``pick``: linear, on the one
        block that did best in the inner folds. ``join``: the first block together with the one picked among the
        others, their shares chosen, none at all among them.
    blocks : dict of str to Features
        Taken together with equal variance, but for ``pick`` and ``join``.
    y : ndarray, shape (scan,)
        0 and 1, or numbers; those of test scans are not read.
    train, test : ndarray of int
    kind : {"classification", "regression"}
    splits : sequence of (train, test)
        Inner folds, as positions in `train`.
    remove : ndarray, shape (scan, column), optional
        Regressed out of the features, with coefficients of the training scans.
    seed : int
        Of the perceptron.

    Returns
    -------
    prediction : ndarray, shape (len(test),)
        Evidence for class 1, positive where it is predicted: the threshold is half-way between the classes' mean
        evidence in the inner folds, since in many dimensions the larger class would be favoured by it. Or the number.
    chosen : str
    """
    target = y[train]
    splits = list(splits)

    def columns(share: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
        total = 0
        for name, weight in share.items():
            k = blocks[name].products(train)
            inner = k[np.ix_(train, train)]
            spread = np.trace(inner) / len(train) - inner.mean()
            total = total + weight * k / max(spread, 1e-12)
        return rotate(total, train, test, remove)

    if head in ("pick", "join"):
        names = list(blocks)[1:] if head == "join" else list(blocks)
        found = {}
        for name in names:
            a, b = columns({name: 1.0})
            found[name] = (_linear(a, target, splits, kind, name), a, b)
        best = max(found, key=lambda name: found[name][0].score)
        choice, a, b = found[best]
        if head == "join":
            first = next(iter(blocks))
            tried = []
            for share in SHARES:
                a, b = columns({first: 1 - share, best: share} if share else {first: 1.0})
                tried.append((_linear(a, target, splits, kind, f"{share:g} {best}"), a, b))
            choice, a, b = max(tried, key=lambda item: item[0].score)
    else:
        a, b = columns(dict.fromkeys(blocks, 1.0))
        if head == "pca":
            tried = [
                (_linear(a[:, :n], target, splits, kind, f"{n} components"), a[:, :n], b[:, :n])
                for n in sorted({min(n, a.shape[1]) for n in COMPONENTS})
            ]
            choice, a, b = max(tried, key=lambda item: item[0].score)
        elif head == "mlp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # its epochs are a setting
                choice = _perceptron(a, target, splits, kind, seed)
            b = b * np.sqrt(a.shape[1])
        elif head == "linear":
            choice = _linear(a, target, splits, kind)
        else:
            raise ValueError(f"head must be linear, pca, mlp, pick or join, got {head!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = choice.fit()
    if kind == "regression":
        found = model.predict(b)
        return (found * target.std() + target.mean() if head == "mlp" else found), choice.name
    middle = (choice.inner[target == 1].mean() + choice.inner[target == 0].mean()) / 2
    return model.decision_function(b) - middle, choice.name
