r"""Periodized orthogonal wavelet transform along the last axis, differentiable, on any device.

With the analysis filters :math:`h, g` of length F of an orthogonal wavelet and a signal of even length N,

.. math:: a_k = \sum_j h_j\, x_{(2k + F/2 - j) \bmod N}, \qquad d_k = \sum_j g_j\, x_{(2k + F/2 - j) \bmod N},

and the inverse is the transpose. A signal of odd length is first extended by its last sample, so that an approximation
and a detail have ``ceil(N / 2)`` samples each. The inverse is cut on the right, which is exact. This is the convention
of PyWavelets' ``mode="periodization"``, odd lengths included. Instead of a name, a filter h may be given as a tensor,
such as :func:`lattice` makes from learned angles.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pywt
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["DB2", "dwt", "filters_of", "idwt", "lattice", "level_lengths", "wavedec"]

Filter = Sequence[float] | Tensor

# Angles whose lattice is the filter of db2 with two zeros on either side.
DB2 = (2 * math.pi / 3, -5 * math.pi / 12, math.pi / 2, -math.pi / 2)


def lattice(angles: Tensor) -> Tensor:
    r"""Analysis filter h of an orthogonal wavelet from any angles: rotations with delays between them.

    .. math:: R(\theta_n)\, \mathrm{diag}(1, z^{-2})\, R(\theta_{n-1}) \cdots \mathrm{diag}(1, z^{-2})\, R(\theta_1)
              \begin{pmatrix} 1 \\ z^{-1} \end{pmatrix}

    has h as its first row. Every factor is orthogonal, so h has unit norm and is orthogonal to itself shifted by 2, 4,
    ... samples. From n angles in radians come 2n taps. Source: Vaidyanathan and Hoang 1988, IEEE Trans. Acoust. Speech
    Signal Process. 36, 81-94.
    """
    low = angles.new_tensor([1.0, 0.0])
    high = angles.new_tensor([0.0, 1.0])
    for i, (cos, sin) in enumerate(zip(angles.cos(), angles.sin(), strict=True)):
        if i > 0:
            low = pad(low, (0, 2))
            high = pad(high, (2, 0))
        low, high = cos * low + sin * high, cos * high - sin * low
    return low


@lru_cache(maxsize=64)
def filters_of(wavelet: str) -> tuple[list[float], list[float]]:
    """Analysis filters h and g of a named wavelet."""
    if wavelet == "lazy":  # even and odd samples, no filter
        return [0.0, 1.0], [1.0, 0.0]
    try:
        bank = pywt.Wavelet(wavelet)
    except (ValueError, TypeError) as error:
        raise ValueError(f"wavelet must be a name from pywt.wavelist(), got {wavelet!r}") from error
    # PyWavelets calls dmey orthogonal, but its filters are so only to 2e-3: its inverse would not
    # be exact. So the overlaps of h with its own even shifts are computed here.
    low = np.array(bank.dec_lo)
    overlaps = np.correlate(low, low, "full")[len(low) - 1 :: 2]
    overlaps[0] -= 1
    if not bank.orthogonal or np.abs(overlaps).max() > 1e-6:
        raise ValueError(f"wavelet must have orthogonal filters (such as db2), got {wavelet!r}")
    return bank.dec_lo, bank.dec_hi


def _with_flip(h: Tensor) -> tuple[Tensor, Tensor]:
    """Filters h and g of a learned wavelet; g is the alternating flip of h."""
    signs = h.new_tensor([-1.0, 1.0]).repeat(len(h) // 2)
    return h, h.flip(0) * signs


def _wrap(x: Tensor, reach: int) -> Tensor:
    """Extend the last axis periodically by `reach` samples on either side."""
    n = x.shape[-1]
    if reach > n:  # more than once round
        return x[..., torch.arange(-reach, n + reach, device=x.device) % n]
    return torch.cat([x[..., n - reach :], x, x[..., :reach]], dim=-1)


def _combine(parts: Sequence[Tensor], weights: Filter) -> Tensor:
    """Weighted sum of slices; a gradient reaches the weights where they are tensors."""
    if isinstance(weights[0], Tensor):
        weighted = [part * weight for part, weight in zip(parts, weights, strict=True)]
        return torch.stack(weighted).sum(0)
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        # In place: autograd keeps nothing here, see _Transform.
        total.add_(part, alpha=weight)
    return total


def _analyse(x: Tensor, low: Filter, high: Filter) -> tuple[Tensor, Tensor]:
    """Approximation and detail of a signal of even length."""
    size = len(low)
    n = x.shape[-1] // 2
    # Coefficient 0 reads from sample F/2 - (F - 1) on; the last one up to sample 2n - 2 + F/2.
    x = _wrap(x, size // 2 - 1)
    phases = [x[..., 0::2], x[..., 1::2]]
    parts = [phases[i % 2][..., i // 2 : i // 2 + n] for i in reversed(range(size))]
    return _combine(parts, low), _combine(parts, high)


def _synthesise(approximation: Tensor, detail: Tensor, low: Filter, high: Filter) -> Tensor:
    """Signal of even length of an approximation and a detail."""
    half = len(low) // 2
    n = approximation.shape[-1]
    reach = half // 2
    approximation = _wrap(approximation, reach)
    detail = _wrap(detail, reach)
    phases = []
    for phase in (0, 1):
        # Sample 2m + phase is sum_i h[2i + q] a[m + i - s] + g[2i + q] d[m + i - s], where s and q
        # are the quotient and the remainder of F/2 - phase by 2.
        s, q = divmod(half - phase, 2)
        first = reach - s
        parts = [approximation[..., first + i : first + i + n] for i in range(half)]
        parts += [detail[..., first + i : first + i + n] for i in range(half)]
        phases.append(_combine(parts, [*low[q::2], *high[q::2]]))
    return torch.stack(phases, dim=-1).flatten(-2)


class _Transform(torch.autograd.Function):
    """Analysis of one signal of even length, or synthesis of a pair of coefficients.

    Filters are orthogonal, so the gradient of each is the other. A few scaled additions of slices are faster than a
    convolution with one channel, and autograd keeps nothing for them. Learned filters need a gradient of their own and
    go through autograd instead.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(wavelet: str, *given: Tensor):
        transform: Callable = _analyse if len(given) == 1 else _synthesise
        return transform(*given, *filters_of(wavelet))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.wavelet = inputs[0]

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        back = _Transform.apply(ctx.wavelet, *gradients)
        if isinstance(back, Tensor):
            return None, back
        return None, *back


def dwt(x: Tensor, wavelet: str | Tensor) -> tuple[Tensor, Tensor]:
    """One level of the transform: approximation and detail, (batch, channel, ceil(time / 2)) each.

    Parameters
    ----------
    x : Tensor, shape (batch, channel, time), floating
    wavelet : str or Tensor of shape (F,)
        Name of a PyWavelets wavelet with orthogonal filters, or a filter h, orthogonal to its own even shifts.

    Raises
    ------
    ValueError
        If `x` is not three-dimensional and floating, is empty in time, or `wavelet` is not orthogonal.
    """
    if x.ndim != 3 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating with shape (batch, channel, time >= 1), got {x.dtype} {tuple(x.shape)}"
        )
    if x.shape[-1] % 2:
        x = torch.cat([x, x[..., -1:]], dim=-1)
    if isinstance(wavelet, str):
        return _Transform.apply(wavelet, x)
    return _analyse(x, *_with_flip(wavelet))


def idwt(
    approximation: Tensor, detail: Tensor, wavelet: str | Tensor, length: int | None = None
) -> Tensor:
    """Inverse of :func:`dwt`: the signal, (batch, channel, length).

    From coefficients (batch, channel, n) each, `length` is ``2 n`` (default) or ``2 n - 1``.
    """
    if isinstance(wavelet, str):
        signal = _Transform.apply(wavelet, approximation, detail)
    else:
        signal = _synthesise(approximation, detail, *_with_flip(wavelet))
    return signal[..., :length]


def level_lengths(n_timepoints: int, n_levels: int) -> list[int]:
    """Length of the signal and of each level's coefficients: ``[T, ceil(T/2), ...]``, n_levels + 1 entries."""
    return [math.ceil(n_timepoints / 2**level) for level in range(n_levels + 1)]


def wavedec(x: Tensor, wavelet: str | Tensor, n_levels: int) -> list[Tensor]:
    """Coefficients of x (batch, channel, time) over `n_levels`, as `dwt` makes them, coarsest first.

    In the order of ``pywt.wavedec``: ``[a_J, d_J, ..., d_1]``; ``d_j`` has ``ceil(time / 2**j)`` samples.
    """
    coefficients = []
    for _ in range(n_levels):
        x, detail = dwt(x, wavelet)
        coefficients.append(detail)
    return [x, *reversed(coefficients)]
