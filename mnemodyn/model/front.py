r"""A front end in closed form: the conditional mean of what is hidden under a Gaussian that adapts to the scan.

The group's scans are taken as draws of one stationary Gaussian process with lag covariances

.. math:: C(\tau) = w(\tau)\,\big[(1 - a)\,\hat C(\tau) + a\,\tfrac1P \mathrm{tr}\,\hat C(\tau)\, I\big],
          \qquad w(\tau) = 1 - |\tau| / (L + 1), \quad |\tau| \le L,

where :math:`\hat C(\tau)` are products over the number of all frames. That divisor and Bartlett's window w keep the
process positive definite (Priestley 1981, Spectral Analysis and Time Series, section 6.2); what is shrunk towards is
noise that knows nothing of other parcels, but has the parcels' own mean autocovariance.

A scan departs from its group. Its covariance is found by expectation maximisation over its frames, the group's
:math:`C(0)` counting as much as `weight` frames (the mode under an inverse Wishart prior; Dempster, Laird and Rubin
1977, Schafer 1997):

.. math:: C_s \leftarrow \frac{n_0\,C(0) + \sum_t E[x_t x_t^\top \mid \mathrm{visible}_t;\, C_s]}{n_0 + T}.

People differ more in some directions than in others. In deviations :math:`D = C(0)^{-1/2} (C_s - C(0))\, C(0)^{-1/2}`
the group's weight keeps the share :math:`\alpha = T / (n_0 + T)` of each. Along `modes`, the principal components
:math:`B_k` of the training scans' deviations, what is kept is :math:`\beta_k = s_k / (s_k + v_k / T)` where that is
more: :math:`s_k` is what the two halves of a scan share (their covariance), :math:`v_k / T` what they do not, both
measured on people that the components were not computed from.

The scan's process is the group's, mixed: :math:`C_s(\tau) = M C(\tau) M^\top` with
:math:`M = C_s^{1/2} C(0)^{-1/2}`, so that its covariance is :math:`C_s` and its dynamics are the group's.
"""

from collections.abc import Sequence

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
    "power",
]

# Entries of the largest tensor held while covariances are adapted.
_HELD_ENTRIES = 2**24
MODE_SCANS = (
    1000  # from how many scans modes are computed at most: two covariances of each are held
)


def moments(
    scans: Sequence[np.ndarray], n_lags: int, shrinkage: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (parcel,) and raw lag covariances (L + 1, parcel, parcel), divided by the number of all frames.

    Only with that divisor, one a scan and lag more than there are products, are they positive definite together.
    Frames that are all NaN are censored: they count for nothing, and those beside them keep their distance in time.
    `scans` is gone through twice and held one at a time, so that it may read each scan anew. `shrinkage` is checked for
    those who use it. Errors are those of `lag_covariances`.
    """
    if not len(scans) or not 0 < shrinkage <= 1:
        raise ValueError(
            f"fit needs a scan and a shrinkage in (0, 1], got {len(scans)} scans and {shrinkage}"
        )
    n_frames, n_parcels = 0, scans[0].shape[-1]
    total = np.zeros(n_parcels)
    for index, scan in enumerate(scans):
        finite, censored = np.isfinite(scan), np.isnan(scan).all(-1, keepdims=True)
        if finite.any():
            finite |= censored
        if scan.ndim != 2 or len(scan) <= n_lags or scan.shape[1] != n_parcels or not finite.all():
            raise ValueError(
                f"scans[{index}] must be finite and (time > {n_lags}, parcel = {n_parcels}), got shape {scan.shape} "
                f"with {np.sum(~finite)} entries that are not finite"
            )
        n_frames += np.sum(~censored)
        total += np.nan_to_num(scan).sum(0, dtype=np.float64)
    mean = total / n_frames
    lags = np.zeros((n_lags + 1, n_parcels, n_parcels))
    for scan in scans:
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

    Of frame t + lag (rows) with frame t (columns), in float64, for lags up to `n_lags` frames, L; `shrinkage` is the
    weight a, in (0, 1]. ValueError if there is no scan, parcels disagree, an entry is not finite, a scan has fewer than
    ``n_lags + 1`` frames, nothing varies, or `shrinkage` is not in (0, 1]. Frames that are all NaN are left out.
    """
    mean, lags = moments(scans, n_lags, shrinkage)
    own = lags.trace(axis1=1, axis2=2)[:, None, None] / len(mean)
    window = 1 - np.arange(n_lags + 1)[:, None, None] / (n_lags + 1)
    return mean, window * ((1 - shrinkage) * lags + shrinkage * own * np.eye(len(mean)))


def conditional_mean(
    x: Tensor,
    hidden: Tensor,
    lags: Tensor,
    mixing: Tensor | None = None,
    *,
    tolerance: float = 1e-3,
    steps: int = 500,
) -> Tensor:
    """Mean of the hidden entries given every visible one of the window, under a stationary Gaussian process.

    Solved by conjugate gradients on the visible entries (Hestenes and Stiefel 1952); the covariance, block Toeplitz
    in time, is applied in frequency, so that no matrix of the size of a window is formed.

    Parameters
    ----------
    x : Tensor, shape (batch, time, parcel)
        Mean removed; hidden entries are not read.
    hidden : Tensor of bool, shape (batch, time, parcel)
    lags : Tensor, shape (L + 1, parcel, parcel)
        Covariances of the process, of one dtype with `x`; lags beyond L are uncorrelated.
    mixing : Tensor, shape (batch, parcel, parcel), optional
        M, where each scan's covariances are ``M C(lag) M^T``.
    tolerance, steps : float, int
        Largest residual, relative to the visible values; and how many steps to take at most.

    Returns
    -------
    Tensor, shape (batch, time, parcel)
        The conditional mean where hidden, `x` elsewhere.
    """
    time, n = x.shape[1], next_fast_len(x.shape[1] + len(lags) - 1, real=True)
    series = lags.new_zeros(n, *lags.shape[1:])
    series[: len(lags)] = lags
    for lag in range(1, len(lags)):
        series[n - lag] = lags[lag].mT
    spectrum = torch.fft.rfft(
        series, dim=0
    ).mT.contiguous()  # (frequency, parcel of the input, of the output)

    def covariance(y: Tensor) -> Tensor:
        y = y if mixing is None else y @ mixing
        y = torch.fft.rfft(y, n=n, dim=1).transpose(0, 1) @ spectrum
        y = torch.fft.irfft(y.transpose(0, 1), n=n, dim=1)[:, :time]
        return y if mixing is None else y @ mixing.mT

    seen = (~hidden).to(x.dtype)
    residual = torch.where(hidden, 0, x)
    weights, direction = torch.zeros_like(x), residual
    square = residual.square().sum((1, 2), keepdim=True)
    enough = tolerance**2 * square
    for _ in range(steps):
        # Each scan stops for itself, so that what is in its batch has no influence.
        active = square > enough
        if not bool(active.any()):
            break
        product = covariance(direction) * seen
        step = (
            active
            * square
            / (direction * product).sum((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        )
        weights, residual = weights + step * direction, residual - step * product
        new = residual.square().sum((1, 2), keepdim=True)
        direction = residual + new / square.clamp_min(torch.finfo(x.dtype).tiny) * direction
        square = torch.where(active, new, square)
    return torch.where(hidden, covariance(weights), x)


def _expected_products(x: Tensor, hidden: Tensor, covariance: Tensor) -> Tensor:
    """Sum over frames of E[x x^T | visible] for one scan: x, hidden (time, parcel), covariance (parcel, parcel)."""
    seen, time = ~hidden, len(x)
    count = seen.sum(-1)
    # The visible parcels of every frame first, as many columns as the fullest frame needs: one shape, one batch.
    index = (
        seen.to(torch.uint8)
        .sort(dim=-1, descending=True, stable=True)
        .indices[:, : max(1, int(count.max()))]
    )
    valid = torch.arange(index.shape[1], device=x.device) < count[:, None]
    total = time * covariance
    for part in range(0, time, n := max(1, _HELD_ENTRIES // (index.shape[1] * x.shape[1]))):
        columns, ok, values = index[part : part + n], valid[part : part + n], x[part : part + n]
        rows = covariance[columns] * ok[..., None]
        block = (
            rows.gather(2, columns[:, None].expand(*columns.shape, columns.shape[1])) * ok[:, None]
        )
        block.diagonal(dim1=1, dim2=2).add_((~ok).to(x.dtype))
        right = torch.cat([rows, (values.gather(1, columns) * ok)[..., None]], -1)
        solved = torch.linalg.solve_triangular(torch.linalg.cholesky(block), right, upper=False)
        rows, weights = solved[..., :-1], solved[..., -1:]
        filled = torch.where(hidden[part : part + n], (rows * weights).sum(1), values)
        rows = rows.flatten(0, 1)
        total = total + filled.mT @ filled - rows.mT @ rows
    return total


def covariance_modes(
    scans: Sequence[np.ndarray], mean: np.ndarray, covariance: np.ndarray, n_modes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions in which covariances of scans (time, parcel) depart from the group's `mean` and `covariance`.

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
    values, vectors = np.linalg.eigh(covariance)
    whiten = (vectors * values**-0.5) @ vectors.T

    def deviations(scan: np.ndarray) -> list[np.ndarray]:
        whitened = [(part - mean) @ whiten for part in np.array_split(scan, 2)]
        return [(w.T @ w / len(w) - np.eye(len(mean))).astype(np.float32).ravel() for w in whitened]

    spread = np.linspace(0, len(scans) - 1, min(len(scans), MODE_SCANS)).round().astype(int)
    pairs, n_frames = [], []
    for scan in (scans[i] for i in spread):
        kept = scan[~np.isnan(scan).all(1)]
        pairs.append(deviations(kept))
        n_frames.append(len(kept) / 2)
    halves, frames = np.stack(pairs, 1), np.mean(n_frames)

    def components(rows: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
        leading = np.argsort(values)[::-1][:n_modes]
        return (vectors[:, leading] / np.sqrt(values[leading])).T.astype(np.float32) @ rows

    centred = halves.mean(0) - halves.mean((0, 1))
    first = np.arange(len(pairs)) % 2 == 0
    a, b = (halves[:, ~first] - halves.mean((0, 1))) @ components(centred[first]).T
    signal, noise = (a * b).mean(0), ((a - b) ** 2).mean(0) / 2 * frames
    return components(centred).reshape(n_modes, *covariance.shape), signal.clip(0), noise


def adapted_covariance(
    x: Tensor,
    hidden: Tensor,
    covariance: Tensor,
    *,
    weight: float,
    steps: int,
    modes: Sequence[Tensor] | None = None,
) -> Tensor:
    """The covariance (batch, parcel, parcel) of each scan, from its visible entries and with the group's as its prior.

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
    x, time = torch.where(hidden, 0, x), x.shape[1]
    adapted, kept = covariance.expand(len(x), -1, -1), time / (weight + time)
    if modes is not None:
        directions, signal, noise = modes
        root, whiten = power(covariance, 0.5), power(covariance, -0.5)
        more = (signal / (signal + noise / time) - kept).clamp_min(0)
    whole = not bool(hidden.any())  # then nothing is expected, and the first step is the last
    for _ in range(min(steps, 1) if whole else steps):
        if whole:
            products = x.mT @ x
        else:
            products = torch.stack(
                [_expected_products(*item) for item in zip(x, hidden, adapted, strict=True)]
            )
        deviation = (products + products.mT) / (2 * time) - covariance
        adapted = covariance + kept * deviation
        if modes is not None:
            deviation = whiten @ deviation @ whiten
            along = torch.einsum("bpq,kpq->bk", deviation, directions) * more
            adapted = adapted + root @ torch.einsum("bk,kpq->bpq", along, directions) @ root
            adapted = power((adapted + adapted.mT) / 2, 1.0, least=1e-4)
    return adapted


def power(covariance: Tensor, exponent: float, *, least: float = 1e-6) -> Tensor:
    """Symmetric power of (..., parcel, parcel), its eigenvalues raised to `least` of the largest."""
    values, vectors = torch.linalg.eigh(covariance)
    return (
        vectors * values.clamp_min(least * values.amax(-1, keepdim=True))[..., None, :] ** exponent
    ) @ vectors.mT


class Front(nn.Module):
    """Conditional mean of hidden entries under the group's Gaussian process, adapted to each scan.

    What it knows of the group are buffers, fitted in closed form by :meth:`fit` and saved with the weights. Not
    fitted, the group is white noise, of which only the adaptation to the scan makes more. No gradient passes it.

    The settings are those of :class:`~mnemodyn.model.config.ModelConfig` whose names begin with ``front_``.
    """

    def __init__(
        self,
        n_parcels: int,
        *,
        n_lags: int,
        shrinkage: float,
        weight: float,
        steps: int,
        n_modes: int = 0,
    ):
        super().__init__()
        self.shrinkage, self.weight, self.steps = shrinkage, weight, steps
        self.mean = nn.Buffer(torch.zeros(n_parcels))
        self.lags = nn.Buffer(torch.zeros(n_lags + 1, n_parcels, n_parcels))
        self.lags[0] = torch.eye(n_parcels)
        self.modes = nn.Buffer(torch.zeros(n_modes, n_parcels, n_parcels))
        self.signal, self.noise = nn.Buffer(torch.zeros(n_modes)), nn.Buffer(torch.ones(n_modes))

    def fit(self, scans: Sequence[np.ndarray]) -> "Front":
        """Set the buffers from scaled training scans; errors as of `lag_covariances` and `covariance_modes`."""
        found: tuple[np.ndarray, ...] = lag_covariances(scans, len(self.lags) - 1, self.shrinkage)
        if len(self.modes):
            found += covariance_modes(scans, found[0], found[1][0], len(self.modes))
        for buffer, value in zip(
            (self.mean, self.lags, self.modes, self.signal, self.noise), found, strict=False
        ):
            buffer.copy_(torch.from_numpy(value))
        return self

    def _adapted(self, centred: Tensor, hidden: Tensor, steps: int) -> Tensor:
        modes = (self.modes, self.signal, self.noise) if len(self.modes) else None
        return adapted_covariance(
            centred, hidden, self.lags[0], weight=self.weight, steps=steps, modes=modes
        )

    @torch.no_grad()
    def mixing(self, centred: Tensor, hidden: Tensor) -> Tensor | None:
        """M of each scan, from its visible entries, mean removed; None without adaptation."""
        if not self.steps:
            return None
        return power(self._adapted(centred, hidden, self.steps), 0.5) @ power(self.lags[0], -0.5)

    @torch.no_grad()
    def connectivity(self, x: Tensor, hidden: Tensor) -> Tensor:
        """How the covariance of each scan departs from the group's: its logarithm where the group's is the identity.

        x, hidden (batch, time, parcel), scaled, to (batch, parcel, parcel). In these coordinates, the tangent space
        of covariances at the group's, differences are straight (Varoquaux et al. 2010, MICCAI).
        """
        whiten = power(self.lags[0], -0.5)
        adapted = self._adapted(x.float() - self.mean, hidden, max(1, self.steps))
        values, vectors = torch.linalg.eigh(whiten @ adapted @ whiten)
        return (vectors * values.clamp_min(1e-6).log()[..., None, :]) @ vectors.mT

    @torch.no_grad()
    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Fill `hidden` (bool) of scaled scans x, both (batch, time, parcel); visible entries stay as they are."""
        if not bool(hidden.any()):
            return x
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - self.mean
            filled = (
                conditional_mean(centred, hidden, self.lags, self.mixing(centred, hidden))
                + self.mean
            )
        return torch.where(hidden, filled.to(x.dtype), x)
