r"""Periodized orthogonal wavelet transform along the last axis, differentiable, on any device.

With the analysis filters :math:`h, g` of length F of an orthogonal wavelet and a signal of even length N,

.. math:: a_k = \sum_j h_j\, x_{(2k + F/2 - j) \bmod N}, \qquad d_k = \sum_j g_j\, x_{(2k + F/2 - j) \bmod N},

and the inverse is the transpose. A signal of odd length is first extended by its last sample, so an approximation
and a detail have ``ceil(N / 2)`` samples each, and the inverse is cut on the right: exact. This is the convention
of PyWavelets' ``mode="periodization"``, odd lengths included.
"""

from functools import lru_cache

import pywt
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["dwt", "idwt", "level_lengths", "wavedec", "waverec"]


@lru_cache(maxsize=64)
def _filters(wavelet: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Analysis kernel (2, 1, F), polyphase synthesis kernel (2, 2, taps), and its left reach in coefficients."""
    try:
        bank = pywt.Wavelet(wavelet)
    except (ValueError, TypeError) as error:
        raise ValueError(f"wavelet must be a name from pywt.wavelist(), got {wavelet!r}") from error
    low, high = (torch.tensor(f, dtype=torch.float64) for f in (bank.dec_lo, bank.dec_hi))
    size = len(low)
    overlaps = torch.stack([low[2 * k :] @ low[: size - 2 * k] for k in range(size // 2)])
    overlaps[0] -= 1
    # dmey calls itself orthogonal, but its filters are so only to 2e-3: the inverse would not be exact.
    if not bank.orthogonal or overlaps.abs().max() > 1e-6:
        raise ValueError(f"wavelet must have orthogonal filters (such as db2), got {wavelet!r}")
    analysis = torch.stack([low, high])[:, None].flip(-1)
    # Sample 2m + p of the inverse is sum_i h[2i + q] a[m + i + offset], with q = (F/2 - p) mod 2. The two phases
    # may differ by one in their offset, so they share a kernel one tap longer than F/2.
    half = size // 2
    parity = [(half - p) % 2 for p in (0, 1)]
    offset = [(p + q - half) // 2 for p, q in zip((0, 1), parity, strict=True)]
    synthesis = torch.zeros(2, 2, half + 1, dtype=torch.float64)
    for p in (0, 1):
        start = offset[p] - min(offset)
        synthesis[p, :, start : start + half] = torch.stack([low, high])[:, parity[p] :: 2]
    return analysis.to(device, dtype), synthesis.to(device, dtype), -min(offset)


def _wrap(x: Tensor, left: int, right: int) -> Tensor:
    """Extend the last axis periodically, more than once round where the signal is shorter than the reach."""
    n = x.shape[-1]
    if 0 <= left <= n and 0 <= right <= n:
        return torch.cat([x[..., n - left :], x, x[..., :right]], dim=-1)
    index = torch.arange(-left, n + right, device=x.device) % n
    return x[..., index]


def dwt(x: Tensor, wavelet: str) -> tuple[Tensor, Tensor]:
    """One level of the transform.

    Parameters
    ----------
    x : Tensor, shape (batch, channel, time), floating
    wavelet : str
        Name of a PyWavelets wavelet with orthogonal filters.

    Returns
    -------
    approximation, detail : Tensor, shape (batch, channel, ceil(time / 2))

    Raises
    ------
    ValueError
        If `x` is not three-dimensional and floating, is empty in time, or `wavelet` is not orthogonal.
    """
    if x.ndim != 3 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating with shape (batch, channel, time >= 1), got {x.dtype} {tuple(x.shape)}")
    batch, channel, n = x.shape
    if n % 2:
        x = torch.cat([x, x[..., -1:]], dim=-1)
    analysis, _, _ = _filters(wavelet, x.dtype, x.device)
    half = analysis.shape[-1] // 2
    # First sample read by coefficient 0 is F/2 - (F - 1); the last one, by the last coefficient, N - 2 + F/2.
    padded = _wrap(x, half - 1, half - 1)
    pair = functional.conv1d(padded.reshape(batch * channel, 1, -1), analysis, stride=2)
    pair = pair.view(batch, channel, 2, -1)
    return pair[:, :, 0], pair[:, :, 1]


def idwt(approximation: Tensor, detail: Tensor, wavelet: str, length: int | None = None) -> Tensor:
    """Inverse of :func:`dwt`.

    Parameters
    ----------
    approximation, detail : Tensor, shape (batch, channel, n)
    wavelet : str
    length : int, optional
        Length of the signal, ``2 n`` (default) or ``2 n - 1``.

    Returns
    -------
    Tensor, shape (batch, channel, length)

    Raises
    ------
    ValueError
        If the two shapes differ or `length` fits neither.
    """
    if approximation.ndim != 3 or approximation.shape != detail.shape:
        raise ValueError(
            "approximation and detail must have one shape (batch, channel, n), got "
            f"{tuple(approximation.shape)} and {tuple(detail.shape)}"
        )
    batch, channel, n = approximation.shape
    length = 2 * n if length is None else length
    if length not in (2 * n, 2 * n - 1):
        raise ValueError(f"length must be {2 * n} or {2 * n - 1} for {n} coefficients, got {length}")
    _, synthesis, left = _filters(wavelet, approximation.dtype, approximation.device)
    pair = torch.stack([approximation, detail], dim=2).reshape(batch * channel, 2, n)
    padded = _wrap(pair, left, synthesis.shape[-1] - 1 - left)
    phases = functional.conv1d(padded, synthesis)
    return phases.transpose(1, 2).reshape(batch, channel, 2 * n)[..., :length]


def level_lengths(n_timepoints: int, n_levels: int) -> list[int]:
    """Length of the signal and of each level's coefficients: ``[T, ceil(T/2), ...]``, n_levels + 1 entries."""
    lengths = [n_timepoints]
    for _ in range(n_levels):
        lengths.append((lengths[-1] + 1) // 2)
    return lengths


def wavedec(x: Tensor, wavelet: str, n_levels: int) -> list[Tensor]:
    """Multi-level transform, coefficients in the order of ``pywt.wavedec``.

    Parameters
    ----------
    x : Tensor, shape (batch, channel, time), floating
    wavelet : str
    n_levels : int
        At least 1.

    Returns
    -------
    list of Tensor
        ``[a_J, d_J, ..., d_1]``, coarsest first; ``d_j`` has ``ceil(time / 2**j)`` samples.
    """
    if n_levels < 1:
        raise ValueError(f"n_levels must be >= 1, got {n_levels}")
    details = []
    for _ in range(n_levels):
        x, detail = dwt(x, wavelet)
        details.append(detail)
    return [x, *details[::-1]]


def waverec(coefficients: list[Tensor], wavelet: str, length: int | None = None) -> Tensor:
    """Inverse of :func:`wavedec`; `length` is the signal's length in samples (default: twice the finest detail's)."""
    x, details = coefficients[0], coefficients[1:]
    lengths = [d.shape[-1] for d in details[1:]] + [length]
    for detail, n in zip(details, lengths, strict=True):
        x = idwt(x, detail, wavelet, n)
    return x
