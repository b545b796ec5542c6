"""Features of scans, and the scikit-learn models that predict from them.

A linear model with an L2 penalty depends on its features only through their products (the
representer theorem). Features therefore enter as a kernel, the matrix of products between scans.
Kernel PCA turns that of the training scans into as many columns as there are scans, and a
penalised regression on these columns gives the predictions it would give on all 19,900 edges.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import sklearn
from scipy.special import logit
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import KernelPCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import mean_squared_error, roc_auc_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.files import digest
from mnemodyn.readout import READOUTS, MnemoDynEncoder

CONFOUNDS = ("age", "sex", "site", "mean_fd", "n_frames")
POOLED = tuple(name for name in READOUTS if name != "last_frame")
ONE_UNIT = ("latent_correlation", "response", "adapted")  # read-outs that need no standardising

INVERSE_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of rows with mean square norm 1
RIDGE_PENALTIES = tuple(np.logspace(-3, 3, 13))
COMPONENTS = (10, 30, 100)
DECAYS = (0.01, 1.0, 30.0)
SHARES = (0.0, 0.2, 0.5)  # of the variance, for the features that are joined


@dataclass(frozen=True)
class Method:
    """A way from scans to predictions.

    Attributes
    ----------
    head : str
        What is fitted; everything is chosen by inner folds of the training scans.

        - ``linear``: logistic or ridge regression, its penalty chosen; features with equal variance.
        - ``unmoved``: the same, with the threshold where balanced class weights put it.
        - ``pca``: linear on the first principal components, their number chosen.
        - ``mlp``: a perceptron with one hidden layer, its weight decay chosen.
        - ``pick``: linear on the one feature set that does best.
        - ``join``: linear on the first feature set and the best of the others, its share chosen.
    features : tuple of str
        ``fc``, ``combat`` (FC harmonised between sites), ``tangent``, ``confounds``, ``site``,
        ``model:READOUT`` or ``untrained:READOUT``.
    remove : tuple of str
        Confounds that are regressed out of the features, with the training scans' coefficients.
    """

    head: str
    features: tuple[str, ...]
    remove: tuple[str, ...] = ()

    @property
    def needs_checkpoint(self) -> bool:
        return any(":" in name for name in self.features)


METHODS = {
    "confounds": Method("linear", ("confounds",)),
    "site": Method("linear", ("site",)),
    "fc": Method("linear", ("fc",)),
    "fc_unmoved": Method("unmoved", ("fc",)),
    "fc_harmonised": Method("linear", ("fc",), remove=CONFOUNDS[:-1]),
    "fc_combat": Method("linear", ("combat",)),
    "fc_pca": Method("pca", ("fc",)),
    "fc_mlp": Method("mlp", ("fc",)),
    "tangent": Method("linear", ("tangent",)),
    "model": Method("pick", tuple(f"model:{name}" for name in POOLED)),
    "model+fc": Method("join", ("fc", *(f"model:{name}" for name in POOLED))),
    "untrained": Method("pick", tuple(f"untrained:{name}" for name in POOLED)),
    "last_frame": Method("linear", ("model:last_frame",)),
    **{name: Method("linear", (f"model:{name}",)) for name in POOLED},
    "adapted": Method("linear", ("model:adapted",)),
    "adapted+fc": Method("join", ("fc", "model:adapted")),
}


def frames(scan: Scan) -> np.ndarray:
    """Z-scored frames that are not censored, (time, parcel), float32; a constant parcel is 0."""
    x = Scaling()(scan)
    if scan.censored is None:
        return x
    return x[~scan.censored]


def connectivity(scans: Iterable[Scan]) -> np.ndarray:
    """Fisher-z Pearson connectivity, (scan, edge), float32; scans are read one at a time.

    Edges are those of the lower triangle, row by row. A constant parcel's correlations are 0; those
    of copies are cut off at 0.999999.
    """
    rows = []
    for scan in scans:
        x = frames(scan).astype(float)
        # A constant parcel divides zero by zero.
        with np.errstate(divide="ignore", invalid="ignore"):
            r = np.corrcoef(x, rowvar=False)
        r = np.nan_to_num(r[np.tril_indices(len(r), -1)])
        z = np.arctanh(np.clip(r, -0.999999, 0.999999))
        rows.append(z.astype(np.float32))
    return np.array(rows)


def covariances(scans: Iterable[Scan]) -> np.ndarray:
    """Covariance of every scan's z-scored frames, shrunk as Ledoit and Wolf do, (scan, parcel, parcel)."""
    return np.array([ledoit_wolf(frames(scan).astype(float))[0] for scan in scans])


def confounds(table: pd.DataFrame, target: str, only: Sequence[str] = CONFOUNDS) -> np.ndarray:
    """Age, sex, site, mean framewise displacement and number of frames, without the target.

    A row a scan of `table`; a column a number, and one a category of sex and site, (scan, column).
    Missing numbers are NaN. What a cohort does not know is left out; where it knows nothing there is
    one column of zeros.
    """
    columns = []
    for name in only:
        if name == target or name not in table or table[name].isna().all():
            continue
        values = table[[name]]
        if name in ("sex", "site"):
            values = pd.get_dummies(table[name].astype(object))
        columns.append(values.to_numpy(float))
    if not columns:
        columns = [np.zeros((len(table), 1))]
    return np.hstack(columns)


class TangentSpace(TransformerMixin, BaseEstimator):
    r"""Covariances as steps from the training scans' mean, in the space tangent to it there.

    .. math:: \log(M^{-1/2} C_i M^{-1/2})

    M is the arithmetic mean of the training scans' covariances. nilearn takes their geometric mean,
    which has to be iterated; on 456 ABIDE scans the areas under the curve differ by 0.003.
    Source: Varoquaux et al. (2010), MICCAI 6361, 200-208.
    """

    def fit(self, covariances: np.ndarray, y: Any = None) -> "TangentSpace":
        """Find the mean of covariances, (scan, parcel, parcel)."""
        values, vectors = np.linalg.eigh(covariances.mean(0))
        self.whitening_ = (vectors / np.sqrt(values)) @ vectors.T
        return self

    def transform(self, covariances: np.ndarray) -> np.ndarray:
        """Steps, (scan, parcel * parcel); their distances are those of the symmetric matrices."""
        values, vectors = np.linalg.eigh(self.whitening_ @ covariances @ self.whitening_)
        steps = (vectors * np.log(values)[:, None, :]) @ vectors.swapaxes(1, 2)
        return steps.reshape(len(steps), -1).astype(np.float32)


class Harmonised(TransformerMixin, BaseEstimator):
    """Features harmonised between sites by ComBat, without covariates.

    The last column of the features is the site's number; a site that was not fitted is an error.
    combatlearn comes with ``pip install 'mnemodyn[harmonise]'``.
    """

    def fit(self, features: np.ndarray, y: Any = None) -> "Harmonised":
        self.features_ = features
        return self

    def transform(self, features: np.ndarray) -> np.ndarray:
        from combatlearn import ComBat

        # ComBat takes the sites of all scans at once, and finds each scan's by the index.
        # Never a frame that has lost its column of sites: ComBat is very slow on one.
        stacked = np.vstack([self.features_, features])
        scans = pd.DataFrame(stacked[:, :-1])
        sites = pd.Series(stacked[:, -1].astype(int))
        n_fitted = len(self.features_)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of sites with few scans
            model = ComBat(sites).fit(scans.iloc[:n_fitted])
            return model.transform(scans.iloc[n_fitted:]).to_numpy()


class Features:
    """One set of features of all scans; as a kernel, once the training scans are known.

    Parameters
    ----------
    values : ndarray, shape (scan, ...)
    transformer : transformer of scikit-learn, optional
        What is fitted to the training scans before the products are taken. Without one the products
        are the same in every fold, and are computed once.
    """

    def __init__(self, values: np.ndarray, transformer: Any = None):
        self.transformer = transformer
        if transformer is None:
            # Any origin will do for a kernel that is centred later, and a near one keeps the digits.
            values = (values - values[:1]).astype(np.float32)
            values = np.asarray(values @ values.T, float)
        self.values = values
        # Not its repr, in which a function has an address that is another in every process.
        self.digest = digest(self.values, joblib.hash(transformer))

    def kernel(self, train: np.ndarray) -> np.ndarray:
        """Products of all scans' features, (scan, scan), scaled to variance 1 over the training scans."""
        kernel = self.values
        if self.transformer is not None:
            fitted = clone(self.transformer).fit(self.values[train])
            values = fitted.transform(self.values)
            values = values - values[train].mean(0)
            kernel = np.asarray(values @ values.T, float)
        # The mean square distance of the training scans from their mean, all features together.
        # With variance 1 each, no set of features outweighs another by its number or unit.
        inner = kernel[np.ix_(train, train)]
        variance = np.trace(inner) / len(train) - inner.mean()
        return kernel / max(variance, 1e-12)


def residual_kernel(
    kernel: np.ndarray, train: np.ndarray, remove: np.ndarray | None = None
) -> np.ndarray:
    """The kernel of what is left of the features when their mean and confounds are regressed out.

    Coefficients are those of the training scans. `remove` is (scan, column), a missing number of it
    counts as the mean. Rows of the training scans then have a mean square norm of 1.
    """
    design = np.ones((len(kernel), 1))
    if remove is not None:
        centred = remove - np.nanmean(remove[train], axis=0)
        design = np.hstack([design, np.nan_to_num(centred)])
    # Residuals are (I - D pinv(D_train)) X; the kernel's rows and columns are X X^T.
    residuals = np.eye(len(kernel))
    residuals[:, train] -= design @ np.linalg.pinv(design[train])
    kernel = residuals @ kernel @ residuals.T
    # One grid of penalties then suits features of any number.
    mean_square = np.diag(kernel)[train].mean()
    return kernel / max(mean_square, 1e-12)


@dataclass(frozen=True)
class Split:
    """What a method is told about one fold: nothing of the labels that it has to predict.

    Attributes
    ----------
    train, test : ndarray of int
        Rows of scans.
    y : ndarray, shape (len(train),)
        1 for the second class and 0 for the first, or the target.
    kind : str
        ``classification`` or ``regression``.
    inner : list of (ndarray, ndarray)
        Inner folds, positions in `train`, by which everything is chosen.
    seed : int
        Seed for what is random in a method.
    """

    train: np.ndarray
    test: np.ndarray
    y: np.ndarray
    kind: str
    inner: list[tuple[np.ndarray, np.ndarray]]
    seed: int = 0


class Perceptron(MLPClassifier):
    """scikit-learn's perceptron with log odds as its evidence."""

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        return logit(self.predict_proba(x)[:, 1].clip(1e-9, 1 - 1e-9))


def _model(head: str, kind: str, seed: int) -> tuple[Any, str, Sequence[float]]:
    """A head's model before it is fitted, the setting to choose, and its values."""
    if head == "mlp":
        # A tolerance of zero: every perceptron is trained for all epochs.
        settings: dict[str, Any] = {"max_iter": 60, "tol": 0.0, "random_state": seed}
        if kind == "classification":
            return Perceptron((64,), **settings), "alpha", DECAYS
        network = MLPRegressor(hidden_layer_sizes=(64,), **settings)
        # Initial weights suit a target with mean 0 and SD 1.
        model = TransformedTargetRegressor(network, transformer=StandardScaler())
        return model, "regressor__alpha", DECAYS
    if kind == "classification":
        # From one penalty to the next the solver goes on from where it was.
        model = LogisticRegression(class_weight="balanced", max_iter=2000, warm_start=True)
        return model, "C", INVERSE_PENALTIES
    return Ridge(solver="cholesky"), "alpha", RIDGE_PENALTIES


@dataclass(frozen=True)
class _Choice:
    """What did best in the inner folds: its score and evidence there, and what it says of the test scans."""

    name: str
    score: float
    inner: np.ndarray
    model: Any
    columns: np.ndarray
    test_columns: np.ndarray


class KernelMethod:
    """A method's head on its features.

    Parameters
    ----------
    method : Method
    features : dict of str to Features
        At least those that the method names.
    remove : ndarray, shape (scan, column), optional
        Confounds to regress out.
    """

    def __init__(
        self, method: Method, features: dict[str, Features], remove: np.ndarray | None = None
    ):
        self.method = method
        self.features = {name: features[name] for name in method.features}
        self.remove = remove
        blocks = [block.digest for block in self.features.values()]
        self.depends_on = digest([method.head, blocks, remove])

    def fit_predict(self, split: Split) -> tuple[np.ndarray, str]:
        """Fit on the training scans and predict the test scans.

        Returns
        -------
        prediction : ndarray, shape (len(split.test),)
            The number; or evidence for class 1, positive where it is predicted. The threshold lies
            half-way between the classes' mean evidence in the inner folds, since balanced weights
            alone favour the larger class where there are more features than scans.
        chosen : str
            What was chosen.
        """
        # Without scikit-learn's checks of each array a fit takes half of the time.
        unchecked = sklearn.config_context(assume_finite=True, skip_parameter_validation=True)
        with warnings.catch_warnings(), unchecked:
            warnings.simplefilter("ignore", ConvergenceWarning)  # a perceptron's epochs are set
            choice = self._choose(split)
            model = clone(choice.model).fit(choice.columns, split.y)
        evidence = _evidence(model, choice.test_columns)
        if split.kind == "classification" and self.method.head != "unmoved":
            means = [choice.inner[split.y == label].mean() for label in (0, 1)]
            evidence = evidence - np.mean(means)
        return evidence, choice.name

    def _choose(self, split: Split) -> _Choice:
        """The best of what the head may choose from."""
        kernels = {name: block.kernel(split.train) for name, block in self.features.items()}
        head = self.method.head
        if head == "pick":
            choices = [self._tune(kernel, split, name) for name, kernel in kernels.items()]
        elif head == "join":
            first, *names = kernels
            # First which of the others is best, and then how large its share should be.
            alone = [self._tune(kernels[name], split, name) for name in names]
            best = names[np.argmax([choice.score for choice in alone])]
            choices = []
            for share in SHARES:
                kernel = (1 - share) * kernels[first] + share * kernels[best]
                choices.append(self._tune(kernel, split, f"{share:g} {best}"))
        else:
            kernel = np.sum(list(kernels.values()), axis=0)
            # None stands for all components.
            numbers = COMPONENTS if head == "pca" else (None,)
            choices = [self._tune(kernel, split, head, n_components=n) for n in numbers]
        return max(choices, key=lambda choice: choice.score)

    def _tune(
        self, kernel: np.ndarray, split: Split, name: str, n_components: int | None = None
    ) -> _Choice:
        """The setting that does best in the inner folds, on one kernel."""
        kernel = residual_kernel(kernel, split.train, self.remove)
        components = KernelPCA(kernel="precomputed")
        # As many columns as there are training scans, those with most variance first.
        columns = components.fit_transform(kernel[np.ix_(split.train, split.train)])
        test_columns = components.transform(kernel[np.ix_(split.test, split.train)])
        columns = columns[:, :n_components]
        test_columns = test_columns[:, :n_components]
        if self.method.head == "mlp":
            # A mean square of 1 a column suits the initial weights.
            test_columns = test_columns * np.sqrt(columns.shape[1])
            columns = columns * np.sqrt(columns.shape[1])

        model, setting, values = _model(self.method.head, split.kind, split.seed)
        inner = np.empty((len(values), len(split.y)))
        for fit, rest in split.inner:
            tried = clone(model)
            for i, value in enumerate(values):
                tried.set_params(**{setting: value})
                tried.fit(columns[fit], split.y[fit])
                inner[i, rest] = _evidence(tried, columns[rest])
        # The area under the curve needs no threshold, which is set once the choice is made.
        if split.kind == "regression":
            scores = [-mean_squared_error(split.y, evidence) for evidence in inner]
        else:
            scores = [roc_auc_score(split.y, evidence) for evidence in inner]
        best = int(np.argmax(scores))
        label = f"{name} {columns.shape[1]} columns {setting}={values[best]:.3g}"
        model.set_params(**{setting: values[best]})
        return _Choice(label, scores[best], inner[best], model, columns, test_columns)


def _evidence(model: Any, columns: np.ndarray) -> np.ndarray:
    """What a fitted model says: log odds of class 1, or the number."""
    if hasattr(model, "decision_function"):
        return model.decision_function(columns)
    return model.predict(columns)


def compute_features(
    names: Iterable[str],
    scans: Sequence[Scan],
    table: pd.DataFrame,
    target: str,
    *,
    checkpoint: Checkpoint | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Features]:
    """Features by their names in :class:`Method`.

    `table` has a row a scan; `cache` keeps the read-outs; `seed` is that of the random weights of
    ``untrained`` networks. A DataError for an unknown name, read-outs without a checkpoint, or sites
    that are not known.
    """
    names = list(dict.fromkeys(names))
    found: dict[str, Features] = {}
    for kind, untrained in (("model", None), ("untrained", seed)):
        asked = [name.removeprefix(f"{kind}:") for name in names if name.startswith(f"{kind}:")]
        if not asked:
            continue
        if checkpoint is None:
            raise DataError(
                f"methods that read a network ({', '.join(asked)}) need its checkpoint "
                "(--checkpoint); give it, or leave these methods out"
            )
        encoder = MnemoDynEncoder(checkpoint, tuple(asked), untrained=untrained, cache=cache)
        for name, values in encoder.blocks(scans).items():
            transformer = None if name in ONE_UNIT else _standardised()
            found[f"{kind}:{name}"] = Features(values, transformer)
    for name in names:
        if name == "fc":
            found[name] = Features(connectivity(scans))
        elif name == "tangent":
            found[name] = Features(covariances(scans), TangentSpace())
        elif name == "combat":
            if "site" not in table or table["site"].isna().any():
                raise DataError("ComBat needs the site of every scan; leave fc_combat out")
            sites = pd.factorize(table["site"])[0]
            found[name] = Features(np.column_stack([connectivity(scans), sites]), Harmonised())
        elif name == "confounds":
            found[name] = Features(confounds(table, target), _standardised())
        elif name == "site":
            found[name] = Features(confounds(table, target, ("site",)), _standardised())
        elif name not in found:
            known = f"fc, combat, tangent, confounds, site, model:... of {POOLED}"
            raise DataError(f"unknown features {name!r}; known are {known}")
    return found


def _standardised() -> Any:
    """Standard deviation 1 over the training scans; missing values are the mean."""
    return make_pipeline(StandardScaler(), FunctionTransformer(np.nan_to_num))
