"""How long must a scan be? A person's connectivity from the first frames of one day, tested on another day.

An estimate is a matrix a person, correlation or covariance. Whatever is fitted is fitted on training people: from
short windows of their scans to what the same people show on their other day.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol, Self

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf, oas
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict

from mnemodyn.data.scans import Collection
from mnemodyn.evaluate.scores import interval, resamples
from mnemodyn.files import Kept, digest
from mnemodyn.model.connectome import Connectome, from_tangent, to_matrix, to_tangent, to_vector
from mnemodyn.model.front import Front, adapted_covariance

LARGEST_R = 0.999999  # Fisher's z of 1 is infinite
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of ridge, as multiples of the mean square norm
SPACES = ("edges", "tangent")
#: What a reader is told of a score.
SCORES = {
    "identified": "identified",
    "r2_edges": "R², edges",
    "r2_tangent": "R², tangent space",
    "r_edges": "r, edges",
    "r_tangent": "r, tangent space",
}
View = Callable[
    [np.ndarray], np.ndarray
]  # matrices (..., parcel, parcel) to vectors (..., feature)

# Matrices


def standardised(window: np.ndarray) -> np.ndarray:
    """Frames (..., time, parcel) with mean 0 and SD 1 within the window, as somebody with no more frames has them."""
    centred = window - window.mean(-2, keepdims=True)
    return centred / centred.std(-2, keepdims=True)


def covariance(window: np.ndarray) -> np.ndarray:
    """Covariance (..., parcel, parcel) of standardised frames (..., time, parcel): Pearson correlation."""
    return np.swapaxes(window, -1, -2) @ window / window.shape[-2]


def edges(matrix: np.ndarray) -> np.ndarray:
    """Fisher's z of the correlations in covariances (..., parcel, parcel), (..., edge)."""
    scale = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
    correlation = matrix / scale[..., None, :] / scale[..., :, None]
    rows, columns = np.triu_indices(matrix.shape[-1], 1)
    return np.arctanh(correlation[..., rows, columns].clip(-LARGEST_R, LARGEST_R))


def from_edges(z: np.ndarray, n_parcels: int) -> np.ndarray:
    """The correlation matrices (..., parcel, parcel) of Fisher's z (..., edge)."""
    matrix = np.zeros((*z.shape[:-1], n_parcels, n_parcels))
    rows, columns = np.triu_indices(n_parcels, 1)
    matrix[..., rows, columns] = np.tanh(z)
    return matrix + np.swapaxes(matrix, -1, -2) + np.eye(n_parcels)


def geometric_mean(
    matrices: np.ndarray, *, n_steps: int = 30, tolerance: float = 1e-6
) -> np.ndarray:
    """The covariance at which tangent vectors of `matrices` (matrix, parcel, parcel) have mean zero."""
    found = torch.from_numpy(matrices)
    mean = found.mean(0)
    for _ in range(n_steps):
        step = to_tangent(found, mean).mean(0)
        mean = from_tangent(step, mean)
        if torch.linalg.norm(step) < tolerance:
            break
    return mean.numpy()


class Tangent:
    """The tangent space at a mean covariance, where differences between people are straight.

    Source: Varoquaux et al. (2010), MICCAI 6361, 200-208.
    """

    def __init__(self, mean: np.ndarray):
        self.mean = torch.from_numpy(mean)

    def vector(self, matrix: np.ndarray) -> np.ndarray:
        """Vectors (..., P (P + 1) / 2) of covariances; their distances are those of the matrices."""
        return to_vector(to_tangent(torch.from_numpy(matrix).double(), self.mean)).numpy()

    def matrix(self, vector: np.ndarray) -> np.ndarray:
        """The covariances of vectors."""
        return from_tangent(to_matrix(torch.from_numpy(vector)), self.mean).numpy()


# Estimators


@dataclass(frozen=True)
class Training:
    """What estimators are fitted on: people who came on two days.

    Attributes
    ----------
    windows : ndarray, shape (window, time, parcel)
        Standardised frames, as many as the scan to be estimated from has.
    people, days : ndarray, shape (window,)
        Whose they are, and of which day.
    runs : ndarray, shape (person, day, run, time, parcel)
        All frames of these people.
    of_runs : ndarray, shape (person, day, run, parcel, parcel)
        Covariances of all frames of each run.
    tangent : Tangent
        At their geometric mean, so that the mean of their vectors is zero.
    """

    windows: np.ndarray = field(repr=False)
    people: np.ndarray
    days: np.ndarray
    runs: np.ndarray = field(repr=False)
    of_runs: np.ndarray = field(repr=False)
    tangent: Tangent = field(repr=False)

    def mean(self, view: View) -> np.ndarray:
        """Mean of the runs in a view: the estimate that knows nothing of the person."""
        return view(self.of_runs).mean((0, 1, 2))

    def other_day(self, view: View) -> np.ndarray:
        """For each window the other day of its person, mean over runs."""
        by_day = view(self.of_runs).mean(2)
        return by_day[self.people, 1 - self.days]


class Estimator(Protocol):
    """From short windows (person, time, parcel) to matrices (person, parcel, parcel)."""

    def fit(self, training: Training) -> Self: ...

    def estimate(self, windows: np.ndarray) -> np.ndarray: ...


class Plain:
    """A covariance of each window by itself, such as Pearson's or a shrunk one."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]):
        self.function = function

    def fit(self, training: Training) -> Self:
        return self

    def estimate(self, windows: np.ndarray) -> np.ndarray:
        return np.array([self.function(window) for window in windows])


class Mixed:
    """Pearson FC mixed with the group's mean: one weight, least squares to the other day of training people."""

    def fit(self, training: Training) -> Self:
        self.mean = training.mean(edges)
        own = edges(covariance(training.windows)) - self.mean
        other = training.other_day(edges) - self.mean
        self.weight = (own * other).sum() / np.square(own).sum()
        return self

    def estimate(self, windows: np.ndarray) -> np.ndarray:
        z = edges(covariance(windows))
        return from_edges(self.mean + self.weight * (z - self.mean), windows.shape[-1])


class EdgeWeights(Mixed):
    """Pearson FC shrunk to the mean edge by edge, by the variance within people over that of everybody.

    Source: Mejia et al. (2018), NeuroImage 172, 478-491.
    """

    def fit(self, training: Training) -> Self:
        z = edges(covariance(training.windows))
        self.mean = z.mean(0)
        self.weight = edge_weights(z, training.people)
        return self


def edge_weights(z: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Share of the variance of edges (window, edge) that lies between people, (edge,), in 0 to 1."""
    return (1 - within_people(z, people) / z.var(0)).clip(0, 1)


def within_people(values: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Variance within people of values (window, feature), (feature,)."""
    names, index = np.unique(people, return_inverse=True)
    means = np.array([values[people == name].mean(0) for name in names])
    return np.square(values - means[index]).sum(0) / (len(values) - len(names))


class Posterior:
    """PoSCE: the mean of a Gaussian posterior in tangent space, its prior the training people's mean and dispersion.

    The prior is that of whole runs. The noise, alike in all directions, is what windows differ by from the person's
    other day. The mean of such windows stands for the mean of the runs.
    Source: Rahim, Thirion and Varoquaux (2019), Medical Image Analysis 54, 138-148.
    """

    def fit(self, training: Training) -> Self:
        self.space = training.tangent
        short = self.space.vector(Plain(_ledoit_wolf).estimate(training.windows))
        long = training.other_day(self.space.vector)
        self.short_mean = short.mean(0)
        self.mean = training.mean(self.space.vector)
        noise = np.square((short - self.short_mean) - (long - self.mean)).mean()
        people = self.space.vector(training.of_runs).mean((1, 2))
        prior, _ = ledoit_wolf(people - self.mean, assume_centered=True)
        self.gain = gain(prior, noise)
        return self

    def estimate(self, windows: np.ndarray) -> np.ndarray:
        short = self.space.vector(Plain(_ledoit_wolf).estimate(windows))
        return self.space.matrix(self.mean + (short - self.short_mean) @ self.gain)


def gain(prior: np.ndarray, noise: float) -> np.ndarray:
    """What deviations (row, feature) are multiplied by for their posterior means, under white noise of a variance."""
    return np.linalg.solve(prior + noise * np.eye(len(prior)), prior)


class Adapted:
    """The covariance to which the network's front end adapts: the group's counts as 200 frames.

    `n_modes` directions in which people differ are followed further; no more than parcels, or a quarter of the training
    runs.
    """

    def __init__(self, n_modes: int = 0):
        self.n_modes = n_modes

    def fit(self, training: Training) -> Self:
        n_frames, n_parcels = training.runs.shape[-2:]
        runs = list(training.runs.reshape(-1, n_frames, n_parcels))
        n_modes = min(self.n_modes, len(runs) // 4, n_parcels)
        front = Front(n_parcels, lags=0, shrinkage=0.05, weight=200.0, steps=1, modes=n_modes)
        self.front = front.fit(runs)
        return self

    def estimate(self, windows: np.ndarray) -> np.ndarray:
        front = self.front
        modes = (front.modes, front.signal, front.noise) if len(front.modes) else None
        x = torch.as_tensor(windows, dtype=torch.float32)
        found = adapted_covariance(
            x,
            torch.zeros_like(x, dtype=torch.bool),
            front.lags[0],
            weight=front.weight,
            steps=front.steps,
            modes=modes,
        )
        return found.double().numpy()


class Directions:
    """The closed form of the objective `connectome`: entries shrunk in the directions of parcels that scans share.

    This is what a network of that objective is before it is trained, see :mod:`mnemodyn.model.connectome`.
    """

    def fit(self, training: Training) -> Self:
        self.adapted = Adapted().fit(training)
        self.space = Tangent(self.adapted.front.lags[0].double().numpy())
        x = self._short(training.windows)
        y = to_matrix(torch.from_numpy(training.other_day(self.space.vector)))
        self.connectome = Connectome(x.shape[-1], n_maps=0).double()
        # Windows have one length only, the one that is asked for.
        self.connectome.fit(lambda n_frames: (x, y))
        return self

    def _short(self, windows: np.ndarray) -> torch.Tensor:
        return to_matrix(torch.from_numpy(self.space.vector(self.adapted.estimate(windows))))

    @torch.no_grad()
    def estimate(self, windows: np.ndarray) -> np.ndarray:
        found = self.connectome(self._short(windows), windows.shape[1])
        return self.space.matrix(to_vector(found).numpy())


class Learned:
    """From the front end's covariance to the other day's, in tangent space, as training people show it.

    With `ridge`, by ridge regression, which sees nobody but through the training people's differences; with `own`, by
    the deviation itself. Weights of both are least squares in inner folds of people.
    """

    def __init__(self, *, ridge: bool, own: bool):
        self.with_ridge = ridge
        self.own = own

    def fit(self, training: Training) -> Self:
        self.space = training.tangent
        self.adapted = Adapted().fit(training)
        x = self.space.vector(self.adapted.estimate(training.windows))
        y = training.other_day(self.space.vector)
        # The mean of such windows stands for the mean of the other day.
        self.x_mean = x.mean(0)
        self.y_mean = y.mean(0)
        x = x - self.x_mean
        y = y - self.y_mean
        parts = [x] if self.own else []
        if self.with_ridge:
            inner = GroupKFold(3)
            unit = np.square(x).sum(1).mean()
            search = GridSearchCV(
                KernelRidge(),
                {"alpha": [unit * penalty for penalty in PENALTIES]},
                cv=inner,
                scoring="neg_mean_squared_error",
            )
            self.ridge = search.fit(x, y, groups=training.people).best_estimator_
            parts.append(cross_val_predict(self.ridge, x, y, groups=training.people, cv=inner))
        columns = np.stack([part.ravel() for part in parts], axis=1)
        self.weights = np.linalg.lstsq(columns, y.ravel(), rcond=None)[0]
        return self

    def estimate(self, windows: np.ndarray) -> np.ndarray:
        x = self.space.vector(self.adapted.estimate(windows)) - self.x_mean
        parts = [x] if self.own else []
        if self.with_ridge:
            parts.append(self.ridge.predict(x))
        found = sum(weight * part for weight, part in zip(self.weights, parts, strict=True))
        return self.space.matrix(self.y_mean + found)


def _ledoit_wolf(window: np.ndarray) -> np.ndarray:
    return ledoit_wolf(window, assume_centered=True)[0]


def _oas(window: np.ndarray) -> np.ndarray:
    return oas(window, assume_centered=True)[0]


#: Name of a method, what makes its estimator, and in which space its people are told apart.
ESTIMATORS: dict[str, tuple[Callable[[], Estimator], str]] = {
    "fc": (partial(Plain, covariance), "edges"),
    "Ledoit-Wolf": (partial(Plain, _ledoit_wolf), "tangent"),
    "oracle-approximating shrinkage": (partial(Plain, _oas), "tangent"),
    "FC mixed with the group's mean": (Mixed, "edges"),
    "FC, weights by edge": (EdgeWeights, "edges"),
    "PoSCE": (Posterior, "tangent"),
    "adapted": (Adapted, "tangent"),
    "front end's covariance, 60 modes": (partial(Adapted, 60), "tangent"),
    "front end's covariance, scaled": (partial(Learned, ridge=False, own=True), "tangent"),
    "shrunk in shared directions": (Directions, "tangent"),
    "ridge to the other day": (partial(Learned, ridge=True, own=False), "tangent"),
    "ridge and the front end's covariance": (partial(Learned, ridge=True, own=True), "tangent"),
}

# The study


@dataclass(frozen=True, eq=False)
class People:
    """Runs of people who were scanned on two days.

    Attributes
    ----------
    names : list of str
    runs : ndarray, shape (person, day, run, time, parcel)
        Standardised; runs are those that everybody has, in the order of their files, cut to one length.
    t_r : float
        Seconds.
    """

    names: list[str]
    runs: np.ndarray = field(repr=False)
    t_r: float

    @classmethod
    def of(cls, scans: Collection) -> "People":
        """Everybody who has as many runs on each of two days as most have. ValueError if there are not ten."""
        rows: dict[str, dict[str, list[np.ndarray]]] = {}
        for scan in scans:
            days = rows.setdefault(scan.participant_id, {})
            days.setdefault(scan.session, []).append(scan.values)
        shapes = [tuple(len(runs) for runs in days.values()) for days in rows.values()]
        usual = max(sorted(set(shapes)), key=shapes.count)
        names = [name for name, shape in zip(rows, shapes, strict=True) if shape == usual]
        if len(usual) != 2 or len(set(usual)) != 1 or len(names) < 10:
            raise ValueError(
                "at least ten people with equally many runs on each of two days (ses-) are needed, "
                f"got {len(names)} with {usual} runs a day"
            )
        length = min(len(run) for name in names for day in rows[name].values() for run in day)
        runs = [[[run[:length] for run in day] for day in rows[name].values()] for name in names]
        return cls(names, standardised(np.array(runs, np.float32)), scans[0].t_r)

    @cached_property
    def of_runs(self) -> np.ndarray:
        """Covariances of whole runs, (person, day, run, parcel, parcel)."""
        return covariance(self.runs).astype(float)

    def minutes(self, n_frames: int) -> float:
        return n_frames * self.t_r / 60


@dataclass(frozen=True)
class Test:
    """Which run is estimated from, which one is tested on, and what is done to them.

    ``query`` and ``truth`` are (day, run); without a run the truth is the mean of the day's runs. ``noise`` replaces
    the query's frames by white noise, ``shuffled`` the truth by that of somebody else.
    """

    query: tuple[int, int] = (0, 0)
    truth: tuple[int, int | None] = (1, None)
    noise: bool = False
    shuffled: bool = False


#: Conditions under which the study is made, besides the plain one. A day's second run has the other phase encoding.
CONTROLS = {
    "people shuffled": Test(shuffled=True),
    "white noise": Test(noise=True),
    "same day, other direction": Test(truth=(0, 1)),
    "other day, its run of the same direction": Test(truth=(1, 0)),
    "other day, its run of the other direction": Test(truth=(1, 1)),
    "other day, second direction both times": Test(query=(0, 1), truth=(1, 1)),
}


def folds_of(n_people: int, n_folds: int, seed: int) -> np.ndarray:
    """The fold in which each person is tested, (person,)."""
    folds = np.empty(n_people, int)
    folds[np.random.default_rng(seed).permutation(n_people)] = np.arange(n_people) % n_folds
    return folds


@lru_cache(maxsize=10)
def tangent_of(people: People, rows: tuple[int, ...]) -> Tangent:
    """The tangent space at the geometric mean of all runs of some people."""
    n_parcels = people.runs.shape[-1]
    return Tangent(geometric_mean(people.of_runs[list(rows)].reshape(-1, n_parcels, n_parcels)))


@lru_cache(maxsize=5)  # the folds of one length: all methods share them
def training_of(people: People, rows: tuple[int, ...], length: int, n_windows: int) -> Training:
    """Windows of the people in `rows`: `n_windows` of each run, evenly spread."""
    chosen = list(rows)
    runs = people.runs[chosen]
    n_people, n_days, n_runs, time, n_parcels = runs.shape
    starts = np.unique(np.linspace(0, time - length, n_windows).round().astype(int))
    windows = np.stack([runs[..., start : start + length, :] for start in starts], axis=3)
    of_people, of_days, _, _ = np.indices((n_people, n_days, n_runs, len(starts)))
    return Training(
        windows=standardised(windows.reshape(-1, length, n_parcels)),
        people=of_people.ravel(),
        days=of_days.ravel(),
        runs=runs,
        of_runs=people.of_runs[chosen],
        tangent=tangent_of(people, rows),
    )


@dataclass(frozen=True)
class Agreement:
    """How well estimates agree with the other day, a value a person.

    Attributes
    ----------
    residual, total : dict of str to ndarray, shape (person,)
        Sums of squares about the other day, of the estimate and of the training people's mean, by space.
    r : dict of str to ndarray, shape (person,)
        Correlation of both deviations from that mean.
    hit : ndarray, shape (person,)
        1 where the most similar other day among those of the fold's people is the person's own.
    """

    residual: dict[str, np.ndarray]
    total: dict[str, np.ndarray]
    r: dict[str, np.ndarray]
    hit: np.ndarray

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Scores by name for weights (resample, person), each (resample,)."""
        found = {"identified": weights @ self.hit / weights.sum(1)}
        for space in SPACES:
            error = weights @ self.residual[space]
            found[f"r2_{space}"] = 1 - error / (weights @ self.total[space])
            found[f"r_{space}"] = weights @ self.r[space] / weights.sum(1)
        return found


def scans_of(people: People, length: int, test: Test, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What everybody is estimated from, (person, time, parcel), and tested on, (person, parcel, parcel)."""
    query = people.runs[:, *test.query][:, :length]
    if test.noise:
        query = np.random.default_rng(seed).standard_normal(query.shape).astype(np.float32)
    day, run = test.truth
    truth = people.of_runs[:, day].mean(1) if run is None else people.of_runs[:, day, run]
    if test.shuffled:
        truth = np.roll(truth, 1, axis=0)
    return standardised(query), truth


def agreement(
    people: People,
    length: int,
    method: str,
    folds: np.ndarray,
    tests: Mapping[str, Test],
    *,
    n_windows: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Everybody estimated by what was fitted on the other folds: for each test the fields of :class:`Agreement`."""
    estimated = {name: _Estimated(people, length, test, seed) for name, test in tests.items()}
    make, space = ESTIMATORS[method]
    for fold in np.unique(folds):
        inside = folds == fold
        training = training_of(people, tuple(np.flatnonzero(~inside)), length, n_windows)
        estimator = make().fit(training)
        for one in estimated.values():
            one.add(inside, estimator, training, space)
    return {name: one.found for name, one in estimated.items()}


class _Estimated:
    """What is collected over the folds of one test, as the fields of :class:`Agreement`."""

    def __init__(self, people: People, length: int, test: Test, seed: int):
        self.query, self.truth = scans_of(people, length, test, seed)
        n = len(self.query)
        self.found: dict[str, Any] = {
            key: {space: np.empty(n) for space in SPACES} for key in ("residual", "total", "r")
        }
        self.found["hit"] = np.empty(n)

    def add(self, inside: np.ndarray, estimator: Estimator, training: Training, space: str) -> None:
        """Estimate the people of one fold, who are told apart in `space`."""
        estimates = estimator.estimate(self.query).astype(float)
        for name, view in {"edges": edges, "tangent": training.tangent.vector}.items():
            own = deviations(view(estimates), inside)
            other = deviations(view(self.truth), inside)
            self.found["residual"][name][inside] = np.square(other - own).sum(1)
            self.found["total"][name][inside] = np.square(other).sum(1)
            self.found["r"][name][inside] = _row_correlation(own, other)
            if name == space:
                # Only unseen people are candidates: what was fitted resembles those it was fitted on.
                self.found["hit"][inside] = hits(own, other)


def deviations(vectors: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Vectors of the people `inside`, less the mean of the others, who are those trained on.

    What an estimator makes of the same frames of training people on average is its bias, and that of these frames. It
    says nothing of a person. Their mean on the other day is the estimate that knows nobody.
    """
    return vectors[inside] - vectors[~inside].mean(0)


def hits(shown: np.ndarray, looked_for: np.ndarray) -> np.ndarray:
    """1 where a row's most similar row of `looked_for` is the one at its own place, else 0."""
    n = len(shown)
    similarity = np.corrcoef(shown, looked_for)[:n, n:]
    return (similarity.argmax(1) == np.arange(n)).astype(float)


def with_and_without_centring(
    people: People, length: int, methods: Sequence[str], n_trained: int, n_windows: int
) -> list[dict[str, Any]]:
    """Identification in one division, the first `n_trained` people trained on, of vectors as they are and less a mean.

    The tangent space is that at the front end's covariance of the group.
    """
    training = training_of(people, tuple(range(n_trained)), length, n_windows)
    query, truth = scans_of(people, length, Test(truth=(1, 0)), 0)
    inside = np.arange(len(query)) >= n_trained
    group = Adapted().fit(training).front.lags[0].double().numpy()
    views = {"edges": edges, "tangent": Tangent(group).vector}
    rows = []
    for method in methods:
        make, space = ESTIMATORS[method]
        estimator = make().fit(training)
        view = views[space]
        shown = view(estimator.estimate(query).astype(float))
        looked_for = view(truth)
        plain = hits(shown[inside], looked_for[inside]).mean()
        centred = hits(deviations(shown, inside), deviations(looked_for, inside)).mean()
        rows.append({"method": method, "as they are": plain, "less the mean": centred})
    return rows


def _row_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of `a` with that of `b`."""
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))


def curves(
    people: People,
    lengths: Sequence[int],
    methods: Sequence[str],
    folds: np.ndarray,
    *,
    tests: Mapping[str, Test] | None = None,
    kept: Kept | None = None,
    n_boot: int = 1000,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """By test, method and score, (length, 1 + n_boot): the score, then that of each resample of people.

    Without `tests` there is one, named "". `kept` keeps what is computed for a method and a length, `say` is told of
    each; `settings` are those of `agreement`.
    """
    tests = tests or {"": Test()}
    kept = kept or Kept(None)
    weights = resamples(people.names, n_boot, 0)
    data = digest(people.runs)
    asked = {name: asdict(test) for name, test in tests.items()}
    found: dict[str, dict[str, dict[str, list[np.ndarray]]]] = {
        name: {method: {} for method in methods} for name in tests
    }
    for length in lengths:
        for method in methods:
            make = partial(agreement, people, length, method, folds, tests, **settings)
            depends_on = [method, data, length, folds, asked, settings]
            for name, compared in kept("agreement", depends_on, make).items():
                for score, values in Agreement(**compared).scores(weights).items():
                    found[name][method].setdefault(score, []).append(values)
            if say is not None:
                say(f"{length} frames: {method}")
    return {
        name: {
            method: {score: np.array(values) for score, values in scores.items()}
            for method, scores in by_method.items()
        }
        for name, by_method in found.items()
    }


# Which method is compared with which, where both are there.
COMPARISONS = {
    "adapted": ("fc", "Ledoit-Wolf", "PoSCE"),
    "shrunk in shared directions": ("fc", "PoSCE", "ridge and the front end's covariance"),
    # That of the closed form is fitted to other windows than the network's own start.
    "network": ("fc", "PoSCE", "shrunk in shared directions", "network before training"),
    "network with the operator's latents": ("network",),
}


def differences(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    lengths: Sequence[int],
    place: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Rows of results: the scores of methods less those of others, with intervals over the same resamples of people."""
    rows = []
    for method, others in COMPARISONS.items():
        for other in others:
            if not {method, other} <= set(curves):
                continue
            for score, values in curves[method].items():
                for i, length in enumerate(lengths):
                    task = f"the other day from {length} frames"
                    about = {**place, "task": task, "method": method, "against": other}
                    found = interval(values[i] - curves[other][score][i])
                    rows.append({**about, "score": score, **found})
    return rows


def controls_of(n_runs: int) -> dict[str, Test]:
    """Those of `CONTROLS` whose runs there are."""
    return {
        name: test
        for name, test in CONTROLS.items()
        if max(test.query[1], test.truth[1] or 0) < n_runs
    }


def minutes_needed(
    curve: np.ndarray, threshold: np.ndarray, minutes: Sequence[float]
) -> np.ndarray:
    """Minutes at which a curve (length, resample) first reaches a threshold (resample,); infinite where it never does.

    Between two lengths the score is taken to grow linearly with the logarithm of time.
    """
    log = np.log(minutes)
    found = np.full(curve.shape[1], np.inf)
    for column, (scores, least) in enumerate(zip(curve.T, threshold, strict=True)):
        reached = np.flatnonzero(scores >= least)
        if not len(reached):
            continue
        i = reached[0]
        at = log[i]
        if i > 0:
            step = (least - scores[i - 1]) / (scores[i] - scores[i - 1])
            at = log[i - 1] + step * (log[i] - log[i - 1])
        found[column] = np.exp(at)
    return found


def capped(values: np.ndarray, longest: float) -> Mapping[str, float | None]:
    """Value and interval of minutes; an end at `longest` means that it was not reached within a run."""
    return interval(np.minimum(values, longest))


def words(row: Mapping[str, Any], shortest: float, longest: float) -> str:
    """Minutes and their interval in words; nothing was tried outside of `shortest` to `longest`."""

    def bound(value: float) -> str:
        if value >= longest:
            return f"≥ {longest:.1f}"
        if value <= shortest:
            return f"≤ {shortest:.1f}"
        return f"{value:.1f}"

    if row["value"] >= longest and row["high"] >= longest:
        return (
            bound(longest) if row["low"] >= longest else f"{bound(longest)} (from {row['low']:.1f})"
        )
    return f"{bound(row['value'])} ({bound(row['low'])} to {bound(row['high'])})"


def first(
    rows: Sequence[Mapping[str, Any]], method: str, score: str, length: int
) -> Mapping[str, Any]:
    """The row of a method, score and length without a control."""
    task = f"the other day from {length} frames"
    asked = (task, method, score)
    return next(row for row in rows if (row["task"], row["method"], row["score"]) == asked)
