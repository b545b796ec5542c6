r"""From features to predictions: linear heads, a multilayer perceptron, and what is chosen in training folds.

A linear model with an L2 penalty depends on its features only through their products :math:`K = X X^T`: with
:math:`K = U \Lambda U^T` on the training scans, the same model fitted on the :math:`n` columns of
:math:`U \Lambda^{1/2}` gives the same predictions as on all features (the representer theorem). So scikit-learn's
estimators fit 19,900 edges at the price of as many columns as there are scans, and nothing is approximated.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import sklearn
from scipy.special import logit
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from sklearn.utils import compute_sample_weight

from mnemodyn.data.scans import DataError

INVERSE_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of rows with mean square norm 1
RIDGE_PENALTIES = tuple(np.logspace(-3, 3, 13))
COMPONENTS = (10, 30, 100)
DECAYS = (0.01, 1.0, 30.0)
SHARES = (0.0, 0.2, 0.5)  # of the variance, for what is joined


@dataclass
class Features:
    """Features of one unit, such as connectivity, taken as they are: their products serve every fold."""

    values: Any = field(repr=False)
    _products: np.ndarray | None = field(default=None, repr=False)

    def products(self, train: np.ndarray) -> np.ndarray:
        """Products of all scans' features, (scan, scan)."""
        if self._products is None:
            values = (
                self.values - self.values[:1]
            )  # any origin will do, and a near one keeps the digits
            self._products = np.asarray(values @ values.T, float)
        return self._products

    def __getstate__(self) -> dict:
        if type(self) is not Features:
            return self.__dict__
        self.products(np.arange(0))  # which is all that another process needs
        return {"values": np.empty((len(self.values), 0), np.float32), "_products": self._products}


@dataclass
class Standardised(Features):
    """Features of unequal units: missing values filled by the mean, SD 1, both of the training scans."""

    def products(self, train: np.ndarray) -> np.ndarray:
        values = np.asarray(self.values, float)
        values = np.nan_to_num(StandardScaler().fit(values[train]).transform(values))
        return values @ values.T


@dataclass
class Tangent(Features):
    """Connectivity as a step from the training scans' mean covariance, in its tangent space (nilearn).

    ``values`` are the z-scored frames of every scan, (time, parcel). The covariances are shrunk as Ledoit and Wolf do;
    their mean is taken over `n_reference` training scans at most, evenly spaced.
    """

    n_reference: int = 60

    def products(self, train: np.ndarray) -> np.ndarray:
        from nilearn.connectome import ConnectivityMeasure
        from sklearn.covariance import LedoitWolf

        measure = ConnectivityMeasure(
            LedoitWolf(store_precision=False), kind="tangent", vectorize=True, standardize=False
        )
        chosen = train[
            np.linspace(0, len(train) - 1, min(self.n_reference, len(train))).astype(int)
        ]
        measure.fit([self.values[i].astype(float) for i in chosen])
        steps = np.array([measure.transform([x.astype(float)])[0] for x in self.values], np.float32)
        return np.asarray(steps @ steps.T, float)


@dataclass
class Combat(Features):
    """Features harmonised between sites by ComBat (combatlearn), fitted on training scans and without covariates.

    `sites` (scan,): one that no training scan comes from is an error.
    """

    sites: np.ndarray | None = None

    def products(self, train: np.ndarray) -> np.ndarray:
        try:
            from combatlearn import ComBat
        except ImportError as error:
            raise DataError(
                "ComBat needs combatlearn: pip install 'mnemodyn[harmonise]'"
            ) from error
        frame = pd.DataFrame(self.values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of sites with few scans
            found = ComBat(pd.Series(self.sites)).fit(frame.iloc[train]).transform(frame).to_numpy()
        found = found - found[:1]
        return found @ found.T


def rotate(
    products: np.ndarray, train: np.ndarray, test: np.ndarray, remove: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Columns that stand for the features: as many as the training scans need, of mean square norm 1 a row.

    Rows `train` and `test` of `products` (scan, scan) give (row, column) each: principal components of the training
    scans, the widest first. `remove` (scan, column) is regressed out of every feature, with the training scans'
    coefficients; their mean always is.
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
    """A candidate: its score and its evidence in the inner folds, and what it says of the test scans."""

    name: str
    score: float
    inner: np.ndarray
    say: Callable[[], np.ndarray]


def _score(kind: str, y: np.ndarray, inner: np.ndarray) -> float:
    return float(-((inner - y) ** 2).mean() if kind == "regression" else roc_auc_score(y, inner))


def _linear(
    a: np.ndarray, b: np.ndarray, y: np.ndarray, splits: list, kind: str, name: str = ""
) -> _Choice:
    """The penalty that does best in the inner folds of training rows `a`; `b` are the test rows."""
    numbers = kind == "regression"
    penalties, setting = (RIDGE_PENALTIES, "alpha") if numbers else (INVERSE_PENALTIES, "C")
    inner = np.empty((len(penalties), len(y)))
    model: Any
    with sklearn.config_context(
        skip_parameter_validation=True, assume_finite=True
    ):  # half of the time otherwise
        for fit, rest in splits:
            if numbers:
                many = Ridge(alpha=np.array(penalties), solver="svd").fit(
                    a[fit], np.tile(y[fit, None], len(penalties))
                )
                inner[:, rest] = (a[rest] @ many.coef_.T + many.intercept_).T
                continue
            model = _logistic(penalties[0], warm_start=True)
            for i, c in enumerate(penalties):
                model.C = c
                inner[i, rest] = model.fit(a[fit], y[fit]).decision_function(a[rest])
    found = [_score(kind, y, row) for row in inner]
    best = int(np.argmax(found))
    model = Ridge(alpha=penalties[best], solver="svd") if numbers else _logistic(penalties[best])
    says = model.predict if numbers else model.decision_function
    label = f"{name} {setting}={penalties[best]:.3g}".strip()
    return _Choice(label, found[best], inner[best], lambda: (model.fit(a, y), says(b))[1])


def _logistic(c: float, **settings: Any) -> LogisticRegression:
    return LogisticRegression(C=c, class_weight="balanced", max_iter=2000, **settings)


def _perceptron(
    a: np.ndarray, b: np.ndarray, y: np.ndarray, splits: list, kind: str, seed: int
) -> _Choice:
    """The weight decay that does best; a mean square of 1 a column suits the initial weights."""
    a, b = (x * np.sqrt(a.shape[1]) for x in (a, b))
    shared = {
        "hidden_layer_sizes": (64,),
        "early_stopping": False,
        "max_iter": 60,
        "tol": 0.0,
        "random_state": seed,
    }
    numbers = kind == "regression"
    mean, sd = (y.mean(), y.std()) if numbers else (0.0, 1.0)
    goal = (y - mean) / sd
    weights = None if numbers else compute_sample_weight("balanced", y)

    def says(model: MLPRegressor | MLPClassifier, x: np.ndarray) -> np.ndarray:
        return (
            model.predict(x) * sd + mean
            if numbers
            else logit(model.predict_proba(x)[:, 1].clip(1e-9, 1 - 1e-9))
        )

    found = []
    for decay in DECAYS:
        model = (MLPRegressor if numbers else MLPClassifier)(alpha=decay, **shared)
        inner = np.empty(len(y))
        for fit, rest in splits:
            part = None if weights is None else weights[fit]
            inner[rest] = says(clone(model).fit(a[fit], goal[fit], part), a[rest])
        say = partial(lambda m: says(m.fit(a, goal, weights), b), model)
        found.append(_Choice(f"decay={decay:g}", _score(kind, y, inner), inner, say))
    return max(found, key=lambda choice: choice.score)


@dataclass
class Fold:
    """Training scans, test scans, and what is fitted to the one and said of the other; nothing is fitted twice.

    `y` (scan,) is 0 and 1, or numbers; those of test scans are not read. `splits` are inner folds, positions in
    `train`, by which everything is chosen; `seed` is the perceptron's.
    """

    blocks: dict[str, Any]
    y: np.ndarray
    train: np.ndarray
    test: np.ndarray
    kind: str
    splits: Sequence[tuple[np.ndarray, np.ndarray]]
    seed: int = 0
    _kept: dict = field(default_factory=dict, repr=False)

    def _products(self, name: str) -> np.ndarray:
        """Products of a block's features, of variance 1 over the training scans."""
        if name not in self._kept:
            k = self.blocks[name].products(self.train)
            inner = k[np.ix_(self.train, self.train)]
            self._kept[name] = k / max(np.trace(inner) / len(self.train) - inner.mean(), 1e-12)
        return self._kept[name]

    def _columns(
        self, shares: dict[str, float], remove: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        total = np.sum([weight * self._products(name) for name, weight in shares.items()], axis=0)
        return rotate(total, self.train, self.test, remove)

    def _fit(
        self, shares: dict[str, float], name: str, remove: np.ndarray | None = None
    ) -> _Choice:
        key = None if remove is not None else tuple(shares.items())
        if key is None or key not in self._kept:
            self._kept[key] = _linear(
                *self._columns(shares, remove), self.y[self.train], list(self.splits), self.kind
            )
        return replace(self._kept[key], name=f"{name} {self._kept[key].name}".strip())

    def predict(
        self, head: str, names: Sequence[str], *, remove: np.ndarray | None = None
    ) -> tuple[np.ndarray, str]:
        """Fit on training scans, choose by inner folds among them, predict the test scans.

        `head` is one of

        - ``linear``: penalised regression, its penalty chosen; ``unmoved``: with its threshold where balanced class
          weights put it;
        - ``pca``: linear on the first components, their number chosen too;
        - ``mlp``: a perceptron with one hidden layer, its weight decay chosen;
        - ``pick``: linear, on the one block that did best in the inner folds;
        - ``join``: the first block together with the one picked among the others, their shares chosen, none at all
          among them.

        Other blocks of `names` are taken together with equal variance. What to `remove` (scan, column) is regressed out
        of the features with coefficients of the training scans, but for ``pick`` and ``join``.

        Returns
        -------
        prediction : ndarray, shape (len(test),)
            Evidence for class 1, positive where it is predicted: the threshold is half-way between the classes' mean
            evidence in the inner folds, since in many dimensions the larger class would be favoured by it. Or the
            number.
        chosen : str
        """
        target, splits = self.y[self.train], list(self.splits)
        equal = dict.fromkeys(names, 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # a perceptron's epochs are a setting
            if head in ("linear", "unmoved"):
                choices = [self._fit(equal, "", remove)]
            elif head == "pca":
                a, b = self._columns(equal, remove)
                choices = [
                    _linear(a[:, :n], b[:, :n], target, splits, self.kind, f"{n} components")
                    for n in sorted({min(n, a.shape[1]) for n in COMPONENTS})
                ]
            elif head == "mlp":
                choices = [
                    _perceptron(*self._columns(equal, remove), target, splits, self.kind, self.seed)
                ]
            elif head in ("pick", "join"):
                rest = names[1:] if head == "join" else names
                choices = [self._fit({name: 1.0}, name) for name in rest]
                if head == "join":
                    best = rest[int(np.argmax([choice.score for choice in choices]))]
                    shares = {
                        share: {names[0]: 1 - share} | ({best: share} if share else {})
                        for share in SHARES
                    }
                    choices = [
                        self._fit(each, f"{share:g} {best}") for share, each in shares.items()
                    ]
            else:
                raise ValueError(
                    f"head must be linear, unmoved, pca, mlp, pick or join, got {head!r}"
                )
            choice = max(choices, key=lambda choice: choice.score)
            found = choice.say()
        if self.kind == "regression" or head == "unmoved":
            return found, choice.name
        return found - (
            choice.inner[target == 1].mean() + choice.inner[target == 0].mean()
        ) / 2, choice.name
