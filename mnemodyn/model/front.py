r"""A front end in closed form: the conditional mean of what is hidden under a Gaussian that adapts to the scan.

The group's scans are taken as draws of one stationary Gaussian process with lag covariances

.. math:: C(\tau) = w(\tau)\,\big[(1 - a)\,\hat C(\tau) + a\,\tfrac1P \mathrm{tr}\,\hat C(\tau)\, I\big],
          \qquad w(\tau) = 1 - |\tau| / (L + 1), \quad |\tau| \le L,

where :math:`\hat C(\tau)` are sums of products, divided by the number of all frames. That divisor and Bartlett's window
w keep the process positive definite (Priestley 1981, Spectral Analysis and Time Series, section 6.2). Shrinkage is
towards noise that is independent between parcels and has the parcels' mean autocovariance.

The covariance of a scan differs from its group's. It is found by expectation maximisation over the scan's frames, where
the group's :math:`C(0)` counts as much as `weight` frames (the mode under an inverse Wishart prior; Dempster, Laird and
Rubin 1977, Schafer 1997):

.. math:: C_s \leftarrow \frac{n_0\,C(0) + \sum_t E[x_t x_t^\top \mid \mathrm{visible}_t;\, C_s]}{n_0 + T}.

People differ more in some directions than in others. In deviations :math:`D = C(0)^{-1/2} (C_s - C(0))\, C(0)^{-1/2}`
this keeps the share :math:`\alpha = T / (n_0 + T)` of each. Along the principal components :math:`B_k` of the training
scans' deviations (`modes`), the share kept is :math:`\beta_k = s_k / (s_k + v_k / T)` where that is larger. Here
:math:`s_k` is the covariance between the deviations of the two halves of a scan and :math:`v_k / T` the variance of
their difference, both measured on scans from which the components were not computed.

The scan's process is the group's, mixed: :math:`C_s(\tau) = M C(\tau) M^\top` with
:math:`M = C_s^{1/2} C(0)^{-1/2}`, so that its covariance is :math:`C_s` and its dynamics are the group's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn

__all__ = [
    "Front",
    "adapted_covariance",
    "conditional_mean",
    "covariance_modes",
    "lag_covariances",
    "moments",
    "power",
    "to_tangent",
]

# Entries of the largest tensor held while covariances are adapted.
HELD_ENTRIES = 2**24
# Steps of conjugate gradients, at most.
SOLVER_STEPS = 500
# Modes are computed from at most so many scans: two covariances of each are in memory at a time.
MODE_SCANS = 1000


def moments(scans: Sequence[np.ndarray], n_lags: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (parcel,) and raw lag covariances (L + 1, parcel, parcel), divided by the number of all frames.

    A sum over fewer products at longer lags is divided by the same number: only so are the covariances positive
    definite together. Frames that are all NaN are censored: they are left out, and the others keep their distance in
    time. `scans` is gone through twice, one scan at a time, so that it may read each from a file. Errors are those of
    `lag_covariances`.
    """
    if not len(scans):
        raise ValueError("fit needs a scan, got none")
    n_frames = 0
    total: Any = 0
    for index, scan in enumerate(scans):
        kept = scan[~np.isnan(scan).all(1)]
        n_wrong = np.sum(~np.isfinite(kept))
        if len(scan) <= n_lags or n_wrong:
            raise ValueError(
                f"scans[{index}] must be finite and have more than {n_lags} frames, got {len(scan)} with {n_wrong} "
                "entries that are not finite"
            )
        n_frames += len(kept)
        total = total + np.nan_to_num(scan).sum(0, dtype=np.float64)
    mean = total / n_frames
    lags = np.zeros((n_lags + 1, len(mean), len(mean)))
    for scan in scans:
        # Censored frames become zero, the mean, and add nothing to the products.
        centred = np.nan_to_num(np.asarray(scan, dtype=np.float64) - mean)
        for lag in range(n_lags + 1):
            lags[lag] += centred[lag:].T @ centred[: len(centred) - lag] / n_frames
    if not lags[0].trace() > 0:
        raise ValueError("scans must vary over time, got constant ones")
    return mean, lags


def lag_covariances(
    scans: Sequence[np.ndarray], n_lags: int, shrinkage: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (parcel,) and shrunk, windowed lag covariances (L + 1, parcel, parcel) of scaled scans (time, parcel).

    Covariances are of frame t + lag (rows) with frame t (columns), in float64, for lags up to `n_lags` frames, L;
    `shrinkage` is the weight a, in (0, 1]. Frames that are all NaN are left out. ValueError if there is no scan,
    another entry is not finite, a scan has fewer than ``n_lags + 1`` frames, nothing varies, or `shrinkage` is not in
    (0, 1].
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}")
    mean, lags = moments(scans, n_lags)
    noise = lags.trace(axis1=1, axis2=2)[:, None, None] / len(mean)
    window = 1 - np.arange(n_lags + 1)[:, None, None] / (n_lags + 1)
    return mean, window * ((1 - shrinkage) * lags + shrinkage * noise * np.eye(len(mean)))


def _covariance_of_windows(
    lags: Tensor, time: int, mixing: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The process's covariance over (time, parcel), as a function of vectors y (batch, time, parcel).

    It is block Toeplitz in time, so that it is applied in frequency, and no matrix of its size is formed.
    """
    n = next_fast_len(time + len(lags) - 1, real=True)
    series = lags.new_zeros(n, *lags.shape[1:])
    series[: len(lags)] = lags
    for lag in range(1, len(lags)):
        series[n - lag] = lags[lag].mT
    # (frequency, parcel of the input, parcel of the output)
    spectrum = torch.fft.rfft(series, dim=0).mT.contiguous()

    def covariance(y: Tensor) -> Tensor:
        if mixing is not None:
            y = y @ mixing
        y = torch.fft.rfft(y, n=n, dim=1).transpose(0, 1) @ spectrum
        y = torch.fft.irfft(y.transpose(0, 1), n=n, dim=1)[:, :time]
        if mixing is not None:
            y = y @ mixing.mT
        return y

    return covariance


def conditional_mean(
    x: Tensor,
    hidden: Tensor,
    lags: Tensor,
    mixing: Tensor | None = None,
    *,
    tolerance: float = 1e-3,
) -> Tensor:
    """Mean of the hidden entries given every visible one of the window, under a stationary Gaussian process.

    Solved by conjugate gradients on the visible entries (Hestenes and Stiefel 1952).

    Parameters
    ----------
    x : Tensor, shape (batch, time, parcel)
        Mean removed; hidden entries are not read.
    hidden : Tensor of bool, shape (batch, time, parcel)
    lags : Tensor, shape (L + 1, parcel, parcel)
        Covariances of the process, of one dtype with `x`; lags beyond L are uncorrelated.
    mixing : Tensor, shape (batch, parcel, parcel), optional
        M, where each scan's covariances are ``M C(lag) M^T``.
    tolerance : float
        Largest residual, relative to the visible values.

    Returns
    -------
    Tensor, shape (batch, time, parcel)
        The conditional mean where hidden, `x` elsewhere.
    """
    covariance = _covariance_of_windows(lags, x.shape[1], mixing)
    # A scan that has converged divides by `tiny` instead of zero.
    tiny = torch.finfo(x.dtype).tiny
    seen = (~hidden).to(x.dtype)
    residual = torch.where(hidden, 0, x)
    weights = torch.zeros_like(x)
    direction = residual
    square = residual.square().sum((1, 2), keepdim=True)
    enough = tolerance**2 * square
    for _ in range(SOLVER_STEPS):
        # Each scan stops for itself, so that the others of its batch have no influence on it.
        active = square > enough
        if not bool(active.any()):
            break
        product = covariance(direction) * seen
        curvature = (direction * product).sum((1, 2), keepdim=True).clamp_min(tiny)
        step = active * square / curvature
        weights = weights + step * direction
        residual = residual - step * product
        new_square = residual.square().sum((1, 2), keepdim=True)
        direction = residual + new_square / square.clamp_min(tiny) * direction
        square = torch.where(active, new_square, square)
    return torch.where(hidden, covariance(weights), x)


def _expected_products(x: Tensor, hidden: Tensor, covariance: Tensor) -> Tensor:
    """Sum over frames of E[x x^T | visible] for one scan: x, hidden (time, parcel), covariance (parcel, parcel)."""
    time, n_parcels = x.shape
    n_visible = (~hidden).sum(-1)
    # Every frame has its own visible parcels. They are gathered in front, as many columns as the fullest frame needs,
    # so that all frames have one shape and are solved in batches; `valid` is False in columns to spare.
    width = max(1, int(n_visible.max()))
    index = (~hidden).to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :width]
    valid = torch.arange(width, device=x.device) < n_visible[:, None]
    frames = max(1, HELD_ENTRIES // (width * n_parcels))
    total = time * covariance
    for start in range(0, time, frames):
        part = slice(start, start + frames)
        columns = index[part]
        ok = valid[part]
        rows = covariance[columns] * ok[..., None]
        among = columns[:, None].expand(-1, width, -1)
        block = rows.gather(2, among) * ok[:, None]
        block.diagonal(dim1=1, dim2=2).add_((~ok).to(x.dtype))  # ones, so that it can be inverted
        values = x[part].gather(1, columns) * ok
        right = torch.cat([rows, values[..., None]], -1)
        solved = torch.linalg.solve_triangular(torch.linalg.cholesky(block), right, upper=False)
        rows = solved[..., :-1]
        weights = solved[..., -1:]
        filled = torch.where(hidden[part], (rows * weights).sum(1), x[part])
        explained = rows.flatten(0, 1)
        total = total + filled.mT @ filled - explained.mT @ explained
    return total


def _components(rows: np.ndarray, n: int) -> np.ndarray:
    """The leading n principal components, orthonormal, of centred rows (scan, entry)."""
    values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
    leading = np.argsort(values)[::-1][:n]
    weights = (vectors[:, leading] / np.sqrt(values[leading])).T
    return weights.astype(np.float32) @ rows


def covariance_modes(
    scans: Sequence[np.ndarray], mean: np.ndarray, covariance: np.ndarray, n_modes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions in which covariances of scans (time, parcel) differ from the group's `mean` and `covariance`.

    From at most `MODE_SCANS` of them, evenly spread. Frames that are all NaN are left out. ValueError if there are
    fewer than ``2 n_modes`` scans.

    Returns
    -------
    modes : ndarray, shape (n_modes, parcel, parcel)
        Symmetric, orthonormal.
    signal, noise : ndarray, shape (n_modes,)
        Variance of the deviation along each, and variance of its estimate from one frame.
    """
    if len(scans) < 2 * n_modes:
        raise ValueError(f"{n_modes} modes need at least {2 * n_modes} scans, got {len(scans)}")
    # Deviations are measured where the group's covariance is the identity.
    values, vectors = np.linalg.eigh(covariance)
    whiten = (vectors * values**-0.5) @ vectors.T
    chosen = np.linspace(0, len(scans) - 1, min(len(scans), MODE_SCANS)).round().astype(int)
    deviations = []
    n_frames = []
    for i in chosen:
        scan = scans[i]
        kept = scan[~np.isnan(scan).all(1)]
        n_frames.append(len(kept) / 2)
        pair = []
        for part in np.array_split(kept, 2):
            whitened = (part - mean) @ whiten
            deviation = whitened.T @ whitened / len(part) - np.eye(len(mean))
            pair.append(deviation.astype(np.float32).ravel())
        deviations.append(pair)
    # (half, scan, entry)
    halves = np.stack(deviations, axis=1)
    average = halves.mean((0, 1))
    whole = halves.mean(0) - average
    # Signal and noise are measured on every other scan, along components of those between.
    first = np.arange(len(chosen)) % 2 == 0
    a, b = (halves[:, ~first] - average) @ _components(whole[first], n_modes).T
    signal = (a * b).mean(0).clip(0)
    noise = ((a - b) ** 2).mean(0) / 2 * np.mean(n_frames)
    modes = _components(whole, n_modes).reshape(n_modes, *covariance.shape)
    return modes, signal, noise


def adapted_covariance(
    x: Tensor,
    hidden: Tensor,
    covariance: Tensor,
    *,
    weight: float,
    steps: int,
    modes: Sequence[Tensor] | None = None,
) -> Tensor:
    """The covariance (batch, parcel, parcel) of each scan from its visible entries, with the group's as its prior.

    Parameters
    ----------
    x, hidden : Tensor, shape (batch, time, parcel)
        Mean removed; entries that are hidden (bool) are not read.
    covariance : Tensor, shape (parcel, parcel)
        The group's.
    weight, steps : float, int
        Frames that it counts for; and steps of expectation maximisation.
    modes : (modes, signal, noise), optional
        See :func:`covariance_modes`.
    """
    x = torch.where(hidden, 0, x)
    time = x.shape[1]
    adapted = covariance.expand(len(x), -1, -1)
    kept = time / (weight + time)
    if modes is not None:
        directions, signal, noise = modes
        root = power(covariance, 0.5)
        whiten = power(covariance, -0.5)
        more = (signal / (signal + noise / time) - kept).clamp_min(0)
    complete = not bool(hidden.any())
    if complete:  # there is no expectation to repeat
        steps = min(steps, 1)
    for _ in range(steps):
        if complete:
            products = x.mT @ x
        else:
            products = torch.stack(
                [_expected_products(*scan) for scan in zip(x, hidden, adapted, strict=True)]
            )
        deviation = (products + products.mT) / (2 * time) - covariance
        adapted = covariance + kept * deviation
        if modes is not None:
            deviation = whiten @ deviation @ whiten
            along = torch.einsum("bpq,kpq->bk", deviation, directions) * more
            adapted = adapted + root @ torch.einsum("bk,kpq->bpq", along, directions) @ root
            # What is added along the modes can make the matrix indefinite.
            adapted = power((adapted + adapted.mT) / 2, 1.0, least=1e-4)
    return adapted


def power(covariance: Tensor, exponent: float, *, least: float = 1e-6) -> Tensor:
    """Symmetric power of (..., parcel, parcel), its eigenvalues raised to at least `least` of the largest."""
    values, vectors = torch.linalg.eigh(covariance)
    # By rounding, small eigenvalues can be zero or negative.
    values = values.clamp_min(least * values.amax(-1, keepdim=True))
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT


def to_tangent(covariance: Tensor, mean: Tensor) -> Tensor:
    """Logarithm of covariances (..., parcel, parcel) after whitening by `mean`, which itself becomes zero."""
    whiten = power(mean, -0.5)
    values, vectors = torch.linalg.eigh(whiten @ covariance @ whiten)
    return (vectors * values.clamp_min(1e-6).log()[..., None, :]) @ vectors.mT


class Front(nn.Module):
    """Conditional mean of hidden entries under the group's Gaussian process, adapted to each scan.

    The group's mean, lag covariances and modes are buffers, which :meth:`fit` computes in closed form and which are
    saved with the weights. Before that the group is white noise. No gradient passes the front end.

    The settings are those of :class:`~mnemodyn.settings.ModelConfig` whose names begin with ``front_``.
    """

    def __init__(
        self,
        n_parcels: int,
        *,
        lags: int = 8,
        shrinkage: float = 0.1,
        weight: float = 200.0,
        steps: int = 4,
        modes: int = 0,
    ):
        super().__init__()
        self.shrinkage = shrinkage
        self.weight = weight
        self.steps = steps
        self.mean = nn.Buffer(torch.zeros(n_parcels))
        self.lags = nn.Buffer(torch.zeros(lags + 1, n_parcels, n_parcels))
        self.lags[0] = torch.eye(n_parcels)
        self.modes = nn.Buffer(torch.zeros(modes, n_parcels, n_parcels))
        self.signal = nn.Buffer(torch.zeros(modes))
        self.noise = nn.Buffer(torch.ones(modes))

    def fit(self, scans: Sequence[np.ndarray]) -> "Front":
        """Set the buffers from scaled training scans; errors as of `lag_covariances` and `covariance_modes`."""
        mean, lags = lag_covariances(scans, len(self.lags) - 1, self.shrinkage)
        found = {"mean": mean, "lags": lags}
        if len(self.modes):
            modes = covariance_modes(scans, mean, lags[0], len(self.modes))
            found.update(zip(("modes", "signal", "noise"), modes, strict=True))
        for name, value in found.items():
            getattr(self, name).copy_(torch.from_numpy(value))
        return self

    def _adapted(self, centred: Tensor, hidden: Tensor, steps: int) -> Tensor:
        """Covariance of each scan."""
        modes = (self.modes, self.signal, self.noise) if len(self.modes) else None
        return adapted_covariance(
            centred, hidden, self.lags[0], weight=self.weight, steps=steps, modes=modes
        )

    @torch.no_grad()
    def mixing(self, centred: Tensor, hidden: Tensor) -> Tensor | None:
        """M of each scan, from its visible entries, mean removed; None without adaptation."""
        if self.steps == 0:
            return None
        adapted = self._adapted(centred, hidden, self.steps)
        return power(adapted, 0.5) @ power(self.lags[0], -0.5)

    @torch.no_grad()
    def connectivity(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Matrix logarithm of each scan's covariance, after whitening by the group's.

        x, hidden (batch, time, parcel), scaled, to (batch, parcel, parcel). In these coordinates, the tangent space at
        the group's covariance, differences between scans are straight (Varoquaux et al. 2010, MICCAI).
        """
        adapted = self._adapted(x.float() - self.mean, hidden, max(1, self.steps))
        return to_tangent(adapted, self.lags[0])

    @torch.no_grad()
    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Fill `hidden` (bool) of scaled scans x, both (batch, time, parcel); visible entries stay as they are."""
        if not bool(hidden.any()):
            return x
        # Cholesky factors and conjugate gradients need float32, also inside autocast.
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - self.mean
            mixing = self.mixing(centred, hidden)
            filled = conditional_mean(centred, hidden, self.lags, mixing) + self.mean
        return torch.where(hidden, filled.to(x.dtype), x)
