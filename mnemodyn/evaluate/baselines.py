"""Baselines that reconstruct the hidden entries of a scan.

Each has ``fit(scans)``, returning a fitted copy of itself, and ``fill(x, hidden)``, returning `x` in float64 with its
hidden entries predicted. None reads a hidden entry: these may hold anything, NaN included. `scans` are (time, parcel),
the scaled scans of training participants; `x` is (batch, time, parcel), in SD; `hidden` is boolean with the shape of
`x`. A ``fill`` raises ValueError on a shape or a visible NaN, and RuntimeError before a fit that it needs.

Both Gaussian baselines use one fact: if ``z ~ N(0, K^-1)``, the mean of the hidden entries given the visible ones
solves ``K_hh z_h = -K_hv z_v``. For single frames ``K`` is the inverse covariance. For a first-order autoregression it
is block-tridiagonal in time; eliminating forwards and substituting backwards are then the Kalman filter and the
Rauch-Tung-Striebel smoother in information form, where an exact observation deletes a row and a column: no jitter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch

from mnemodyn.model.front import conditional_mean, lag_covariances, moments, power

# Matrix entries held at once while solving a batch: 2**25 in float64 are 256 MiB.
_HELD_ENTRIES = 2**25


def _unknown() -> np.ndarray:
    return np.empty(0)


def _visible(
    x: np.ndarray, hidden: np.ndarray, mean: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Check a batch, and that a method is fitted to its parcels; return it in float64, zeros where it is hidden."""
    if mean is not None and not len(mean):
        raise RuntimeError("not fitted: call `fit(scans)` and use what it returns")
    x, hidden = np.asarray(x), np.asarray(hidden)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be (batch, time, parcel) and not empty, got shape {x.shape}")
    if hidden.dtype != bool or hidden.shape != x.shape:
        got = f"{hidden.dtype} {hidden.shape}"
        raise ValueError(f"hidden must be boolean with the shape of x, {x.shape}, got {got}")
    x = np.where(hidden, 0.0, x).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("x must be finite where visible, got NaN or infinity")
    if mean is not None and x.shape[2] != len(mean):
        raise ValueError(f"x must have the {len(mean)} fitted parcels, got {x.shape[2]}")
    return x, hidden


class Zero:
    """Predict zero, which is each parcel's mean in a scaled scan."""

    def fit(self, scans: Sequence[np.ndarray]) -> Self:
        """Return itself: nothing is learned."""
        return self

    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Return `x` with zeros where `hidden`."""
        return _visible(x, hidden)[0]


class Interpolation(Zero):
    """Interpolate each parcel linearly in time between its visible frames.

    Outside the first and the last of them the nearest visible value is held; a parcel with no visible frame in the
    window is zero.
    """

    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Return `x` with `hidden` interpolated."""
        filled, hidden = _visible(x, hidden)
        frames = np.arange(filled.shape[1])
        for item, parcel in np.argwhere(hidden.any(1) & ~hidden.all(1)):
            gap, series = hidden[item, :, parcel], filled[item, :, parcel]
            series[gap] = np.interp(frames[gap], frames[~gap], series[~gap])  # a view: in place
        return filled


@dataclass(frozen=True, eq=False)
class SpatialGaussian:
    """Mean of a frame's hidden parcels given its visible ones, under one Gaussian.

    `shrinkage` is the weight in (0, 1] of white noise, of the same mean variance, in the training moments. The default
    is chosen on training participants: of 0.01 to 0.2, it predicts each of five HCP participants best from the other
    four (for `VAR` within 0.001 of R2 of the best). With hundreds of training scans less is needed, and 0.1 then costs
    about 0.001. `fit` sets the moments: mean (parcel,), covariance (parcel, parcel), and `lagged`, that of a frame
    (rows) with the one before it (columns).
    """

    shrinkage: float = 0.1
    mean: np.ndarray = field(default_factory=_unknown)
    covariance: np.ndarray = field(default_factory=_unknown)
    lagged: np.ndarray = field(default_factory=_unknown)

    def fit(self, scans: Sequence[np.ndarray]) -> Self:
        """Return a copy with the shrunk moments of `scans`; errors as of `lag_covariances`, with one lag."""
        mean, (covariance, lagged) = moments(scans, 1, self.shrinkage)
        white = self.shrinkage * covariance.trace() / len(mean) * np.eye(len(mean))
        a = 1 - self.shrinkage
        return replace(self, mean=mean, covariance=a * covariance + white, lagged=a * lagged)

    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Return `x` with `hidden` predicted frame by frame."""
        x, hidden = _visible(x, hidden, self.mean)
        frames = (-1, 1, x.shape[2])
        diagonal = [_inverse(self.covariance)]
        filled = _fill(x.reshape(frames), hidden.reshape(frames), self.mean, diagonal, diagonal[0])
        return filled.reshape(x.shape)


class VAR(SpatialGaussian):
    """Mean of the hidden entries given all visible ones of a window, under an autoregression.

    ``x_t - mean = transition (x_{t-1} - mean) + e_t``, ``e_t ~ N(0, noise)``, starting from the stationary
    `covariance`. The transition is ridge least squares in its Yule-Walker form [1]_: with training covariances ``C0``
    and ``C1`` (lag one), ``a`` the shrinkage and ``s`` the mean variance, ``covariance = (1 - a) C0 + a s I`` and
    ``transition = (1 - a) C1 covariance^-1``. It is stable whatever the data, with `covariance` its stationary one.

    The prediction is that of a Kalman filter with exact observations and a Rauch-Tung-Striebel smoother [2]_: nothing
    gets a smaller expected squared error out of this autoregression. Time grows with batch x time x parcel^3.
    Parameters are those of `SpatialGaussian`.

    References
    ----------
    .. [1] Lütkepohl (2005), New Introduction to Multiple Time Series Analysis, section 3.3.
    .. [2] Rauch, Tung and Striebel (1965), AIAA Journal 3(8), 1445-1450.
    """

    @property
    def transition(self) -> np.ndarray:
        """(parcel, parcel): from one frame to the expectation of the next."""
        return np.linalg.solve(self.covariance, self.lagged.T).T

    @property
    def noise(self) -> np.ndarray:
        """(parcel, parcel): covariance of the one-step prediction error."""
        noise = self.covariance - self.transition @ self.lagged.T
        return (noise + noise.T) / 2

    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Return `x` with `hidden` predicted from every visible entry of its window."""
        x, hidden = _visible(x, hidden, self.mean)
        n_steps = x.shape[1] - 1
        transition, noise = torch.from_numpy(self.transition), _inverse(self.noise)
        # The density: N(x_0; 0, covariance), then N(x_{t+1} - transition x_t; 0, noise) a step.
        arriving = [_inverse(self.covariance)] + [noise] * n_steps
        leaving = [transition.T @ noise @ transition] * n_steps + [torch.zeros_like(noise)]
        diagonal = [a + b for a, b in zip(arriving, leaving, strict=True)]
        return _fill(x, hidden, self.mean, diagonal, -noise @ transition)


@dataclass(frozen=True, eq=False)
class LowRank:
    """Probabilistic PCA: a frame is `rank` factors and white noise, hidden parcels follow from visible ones [1]_.

    The covariance is the maximum-likelihood one: the leading eigenvectors and the mean of the other eigenvalues.

    References
    ----------
    .. [1] Tipping and Bishop (1999), Journal of the Royal Statistical Society B 61(3), 611-622.
    """

    rank: int
    model: SpatialGaussian = field(default_factory=SpatialGaussian)

    def fit(self, scans: Sequence[np.ndarray]) -> Self:
        """As `SpatialGaussian`; ValueError too if `rank` leaves no eigenvalue for the noise."""
        full = SpatialGaussian(shrinkage=1e-6).fit(scans)
        n = len(full.mean)
        if not 0 < self.rank < n:
            raise ValueError(f"rank must be between 1 and {n - 1}, got {self.rank}")
        values, vectors = np.linalg.eigh(full.covariance)
        noise, vectors = values[: n - self.rank].mean(), vectors[:, n - self.rank :]
        factors = (vectors * (values[n - self.rank :] - noise)) @ vectors.T
        return replace(self, model=replace(full, covariance=factors + noise * np.eye(n)))

    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """As `SpatialGaussian.fill`."""
        return self.model.fill(x, hidden)


@dataclass(frozen=True, eq=False)
class SpatiotemporalGaussian:
    """Mean of the hidden entries given all visible ones of a window, under a stationary Gaussian process.

    Every pair of frames up to `n_lags` apart is correlated as in the training scans, see
    `mnemodyn.model.front.lag_covariances`, where `shrinkage` is explained.

    `own` is the weight in [0, 1) of the scan's own covariance, from products of visible pairs, beside the group's. Then
    the process is the group's, mixed so that it has this covariance. Such a prediction is not linear in the scan.
    """

    shrinkage: float = 0.1
    n_lags: int = 8
    own: float = 0.0
    mean: np.ndarray = field(default_factory=_unknown)
    lags: np.ndarray = field(default_factory=_unknown)

    def fit(self, scans: Sequence[np.ndarray]) -> Self:
        """Return a fitted copy; errors as of `lag_covariances`."""
        mean, lags = lag_covariances(scans, self.n_lags, self.shrinkage)
        return replace(self, mean=mean, lags=lags)

    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Return `x` with `hidden` predicted."""
        x, hidden = _visible(x, hidden, self.mean)
        centred, mask = (
            torch.from_numpy(np.where(hidden, 0.0, x - self.mean)),
            torch.from_numpy(hidden),
        )
        lags = torch.from_numpy(self.lags)
        filled = [
            conditional_mean(c, m, lags, self._mixing(c, m) if self.own else None, tolerance=1e-5)
            for c, m in zip(centred.split(8), mask.split(8), strict=True)
        ]
        return np.where(hidden, torch.cat(filled).numpy() + self.mean, x)

    def _mixing(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        seen, group = (~hidden).to(x.dtype), torch.from_numpy(self.lags[0])
        pairs = seen.mT @ seen
        own = torch.where(pairs > 0, (x.mT @ x) / pairs.clamp_min(1), group)
        # A covariance from unequal pairs need not be one: its negative eigenvalues are cut off.
        mixed = (1 - self.own) * group + self.own * own
        return power(mixed, 0.5, least=1e-3) @ power(group, -0.5)


def _inverse(matrix: np.ndarray) -> torch.Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(matrix)))


def _fill(
    x: np.ndarray,
    hidden: np.ndarray,
    mean: np.ndarray,
    diagonal: list[torch.Tensor],
    coupling: torch.Tensor,
) -> np.ndarray:
    """Fill a checked batch with `_hidden_mean`, as many items at a time as memory is set aside."""
    centred, mask = torch.from_numpy(np.where(hidden, 0.0, x - mean)), torch.from_numpy(hidden)
    # A factor a frame, and about four temporaries of the size of a frame's block.
    n_items = max(1, _HELD_ENTRIES // ((x.shape[1] + 4) * x.shape[2] ** 2))
    parts = zip(centred.split(n_items), mask.split(n_items), strict=True)
    solved = torch.cat([_hidden_mean(*part, diagonal, coupling) for part in parts]).numpy()
    return np.where(hidden, solved + mean, x)


def _hidden_mean(
    x: torch.Tensor,
    hidden: torch.Tensor,
    diagonal: list[torch.Tensor],
    coupling: torch.Tensor,
) -> torch.Tensor:
    """Mean of the hidden entries given the visible under a block-tridiagonal precision matrix; zero where visible.

    `x` (batch, time, parcel) is float64, its mean removed, and zero where `hidden`. `diagonal` has a (parcel, parcel)
    precision block a frame; `coupling` is the one between frame t + 1 (rows) and t (columns).
    """
    n_frames, mask = x.shape[1], hidden.to(x.dtype)
    right = torch.stack([x[:, t] @ diagonal[t] for t in range(n_frames)], 1)
    if n_frames > 1:
        right[:, 1:] += x[:, :-1] @ coupling.T
        right[:, :-1] += x[:, 1:] @ coupling
    right = (-right * mask)[..., None]
    factors: list[torch.Tensor] = []
    for t in range(n_frames):
        # Visible rows and columns become the identity's: one shape for every mask, so one batch.
        block = diagonal[t] * mask[:, t, :, None] * mask[:, t, None]
        block.diagonal(dim1=1, dim2=2).add_(1 - mask[:, t])
        if t > 0:
            link = coupling.T * mask[:, t - 1, :, None] * mask[:, t, None]
            link = torch.linalg.solve_triangular(factors[-1], link, upper=False)
            past = torch.linalg.solve_triangular(factors[-1], right[:, t - 1], upper=False)
            block -= link.mT @ link
            right[:, t] -= link.mT @ past
        # Cholesky: on the CPU a batched `torch.linalg.solve` can fail at 200 x 200 (pivot error).
        factors.append(torch.linalg.cholesky(block))
    for t in reversed(range(n_frames)):
        if t + 1 < n_frames:
            right[:, t] -= mask[:, t, :, None] * (coupling.T @ right[:, t + 1])
        right[:, t] = torch.cholesky_solve(right[:, t], factors[t])
    return right[..., 0]
