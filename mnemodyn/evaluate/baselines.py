"""Baselines that fill the hidden entries of a scan.

Every baseline has ``fit(scans)``, which returns a fitted copy, and ``fill(x, hidden)``, which
returns `x` in float64 with its hidden entries predicted. `scans` are the scaled scans (time, parcel)
of the training participants. `x` is (batch, time, parcel) in SD, and `hidden` is boolean with its
shape. No baseline reads a hidden entry, which may hold anything, NaN included. The repetition time
is accepted so that baselines and networks are called alike; no baseline uses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from mnemodyn.model.front import conditional_mean, lag_covariances, moments, power

__all__ = ["COVARIANCES", "Gaussian", "Interpolation", "Zero"]

COVARIANCES = ("spatial", "low_rank", "var", "spatiotemporal")
# Lag covariances of the autoregression below this share of lag zero are left out: what is filled
# then changes by about 1e-5 SD.
NEGLIGIBLE = 1e-6


def _visible(x: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check a batch; return it in float64 with zeros where it is hidden, and the mask."""
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, time, parcel), got shape {x.shape}")
    if hidden.dtype != bool or hidden.shape != x.shape:
        raise ValueError(
            f"hidden must be boolean with the shape of x, {x.shape}, "
            f"got {hidden.dtype} {hidden.shape}"
        )
    x = np.where(hidden, 0.0, x).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("x must be finite where it is visible, got NaN or infinity")
    return x, hidden


class Zero:
    """Predict zero, which is each parcel's mean in a scaled scan."""

    def fit(self, scans: Sequence[np.ndarray]) -> Self:
        """Return itself: nothing is learned."""
        return self

    def fill(self, x: np.ndarray, hidden: np.ndarray, t_r: float | None = None) -> np.ndarray:
        """Return `x` with zeros where it is hidden."""
        filled, _ = _visible(x, hidden)
        return filled


class Interpolation(Zero):
    """Interpolate each parcel linearly in time between its visible frames.

    Before the first and after the last visible frame the nearest visible value is held. A parcel
    without any visible frame is zero.
    """

    def fill(self, x: np.ndarray, hidden: np.ndarray, t_r: float | None = None) -> np.ndarray:
        """Return `x` with its hidden entries interpolated."""
        filled, hidden = _visible(x, hidden)
        frames = np.arange(filled.shape[1])
        to_fill = hidden.any(1) & ~hidden.all(1)
        for item, parcel in np.argwhere(to_fill):
            gap = hidden[item, :, parcel]
            series = filled[item, :, parcel]
            filled[item, gap, parcel] = np.interp(frames[gap], frames[~gap], series[~gap])
        return filled


@dataclass(frozen=True, eq=False)
class Gaussian:
    r"""Mean of the hidden entries given every visible one, under a stationary Gaussian process.

    The process is given by its covariances :math:`C(\tau)` of a frame with the frame :math:`\tau`
    before it, and :func:`~mnemodyn.model.front.conditional_mean` solves for the mean. With training
    moments :math:`\hat C(\tau)`, shrinkage a and mean variance s:

    ``spatial``
        :math:`C(0) = (1 - a) \hat C(0) + a s I`; frames are independent.
    ``low_rank``
        Probabilistic PCA: :math:`\hat C(0)` with all but its `rank` leading eigenvalues replaced
        by their mean [1]_. Frames are independent.
    ``var``
        First-order autoregression: the ``spatial`` :math:`C(0)` and :math:`C(\tau) = A^\tau C(0)`
        with :math:`A = (1 - a) \hat C(1)\, C(0)^{-1}`, which is ridge least squares in its
        Yule-Walker form [2]_ and stable whatever the data. The mean is that of a Kalman filter with
        the Rauch-Tung-Striebel smoother.
    ``spatiotemporal``
        Every pair of frames up to `n_lags` apart, as in
        :func:`~mnemodyn.model.front.lag_covariances`.

    Attributes
    ----------
    covariance : str
        One of the four.
    shrinkage : float
        Weight in (0, 1] of white noise in the training moments.
    n_lags : int
        Largest lag in frames of ``spatiotemporal``.
    rank : int
        Factors of ``low_rank``.
    own : float
        Weight in [0, 1) of the scan's own covariance, from its visible pairs, beside the group's.
        The process is then the group's, mixed so that it has this covariance, and the prediction
        is no longer linear in the scan.
    tolerance : float
        Residual at which the linear system counts as solved, relative to the visible values. With
        the default, filled values agree with the dense solution to about 1e-4 SD.
    mean : ndarray, shape (parcel,)
        Set by `fit`.
    lags : ndarray, shape (lag, parcel, parcel)
        Covariances from lag zero on, set by `fit`; of ``var`` the first two.

    References
    ----------
    .. [1] Tipping and Bishop (1999), Journal of the Royal Statistical Society B 61(3), 611-622.
    .. [2] Lütkepohl (2005), New Introduction to Multiple Time Series Analysis, section 3.3.
    """

    covariance: str = "spatiotemporal"
    shrinkage: float = 0.1
    n_lags: int = 8
    rank: int = 16
    own: float = 0.0
    tolerance: float = 1e-5
    mean: np.ndarray | None = None
    lags: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.covariance not in COVARIANCES:
            raise ValueError(
                f"covariance must be one of {', '.join(COVARIANCES)}, got {self.covariance!r}"
            )

    def fit(self, scans: Sequence[np.ndarray]) -> Self:
        """Return a fitted copy.

        Raises
        ------
        ValueError
            If there is no scan, parcels disagree, an entry is not finite, a scan has no more frames
            than there are lags, nothing varies, or `shrinkage` or `rank` is out of its range.
        """
        if self.covariance == "spatiotemporal":
            mean, lags = lag_covariances(scans, self.n_lags, self.shrinkage)
        elif self.covariance == "low_rank":
            # Shrunk just enough that the covariance of few frames has an inverse.
            mean, lags = lag_covariances(scans, 0, 1e-6)
            lags = _probabilistic_pca(lags[0], self.rank)[None]
        else:
            mean, lags = lag_covariances(scans, 0, self.shrinkage)
            if self.covariance == "var":
                # The process without Bartlett's window, which would change its dynamics.
                _, raw = moments(scans, 1)
                lags = np.stack([lags[0], (1 - self.shrinkage) * raw[1]])
        return replace(self, mean=mean, lags=lags)

    def fill(self, x: np.ndarray, hidden: np.ndarray, t_r: float | None = None) -> np.ndarray:
        """Return `x` with its hidden entries predicted.

        Raises
        ------
        RuntimeError
            If it is not fitted.
        ValueError
            If shapes do not fit each other or a visible entry is not finite.
        """
        if self.mean is None or self.lags is None:
            raise RuntimeError("not fitted: call fit(scans) and use what it returns")
        x, hidden = _visible(x, hidden)
        lags = self.lags
        if self.covariance == "var":
            lags = _autoregression(lags[0], lags[1], x.shape[1])
        process = torch.from_numpy(lags)
        mask = torch.from_numpy(hidden)
        centred = torch.from_numpy(np.where(hidden, 0.0, x - self.mean))
        mixing = None
        if self.own:
            mixing = self._mixing(centred, mask, process[0])
        solved = conditional_mean(centred, mask, process, mixing, tolerance=self.tolerance)
        return np.where(hidden, solved.numpy() + self.mean, x)

    def _mixing(self, x: torch.Tensor, hidden: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """The matrix (batch, parcel, parcel) that gives the process the mixed covariance."""
        seen = (~hidden).to(x.dtype)
        pairs = seen.mT @ seen
        # A pair of parcels that is never seen together keeps the group's covariance.
        own = torch.where(pairs > 0, (x.mT @ x) / pairs.clamp_min(1), group)
        mixed = (1 - self.own) * group + self.own * own
        # Products over unequal pairs need not be a covariance: negative eigenvalues are raised.
        return power(mixed, 0.5, least=1e-3) @ power(group, -0.5)


def _probabilistic_pca(covariance: np.ndarray, rank: int) -> np.ndarray:
    """The maximum-likelihood covariance of `rank` factors and white noise."""
    n = len(covariance)
    if not 0 < rank < n:
        raise ValueError(f"rank must be between 1 and {n - 1}, got {rank}")
    # Eigenvalues ascend: those of the noise come first.
    values, vectors = np.linalg.eigh(covariance)
    noise = slice(n - rank)
    values[noise] = values[noise].mean()
    return (vectors * values) @ vectors.T


def _autoregression(covariance: np.ndarray, lagged: np.ndarray, n_frames: int) -> np.ndarray:
    """Covariances of a first-order autoregression at the lags that a window of frames has."""
    transition = np.linalg.solve(covariance, lagged.T).T
    least = NEGLIGIBLE * np.linalg.norm(covariance)
    lags = [covariance]
    # Lags beyond the window are never needed.
    while len(lags) < n_frames and np.linalg.norm(lags[-1]) > least:
        lags.append(transition @ lags[-1])
    return np.stack(lags)
