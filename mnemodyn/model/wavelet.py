r"""Periodized orthogonal wavelet transform along the last axis, differentiable, on any device.

With the analysis filters :math:`h, g` of length F of an orthogonal wavelet and a signal of even length N,

.. math:: a_k = \sum_j h_j\, x_{(2k + F/2 - j) \bmod N}, \qquad d_k = \sum_j g_j\, x_{(2k + F/2 - j) \bmod N},

and the inverse is the transpose. A signal of odd length is first extended by its last sample, so an approximation
and a detail have ``ceil(N / 2)`` samples each, and the inverse is cut on the right: exact. This is the convention
of PyWavelets' ``mode="periodization"``, odd lengths included. In place of a name, a filter h may be given as a tensor,
such as :func:`lattice` makes from angles that are learned.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pywt
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["DB2", "dwt", "idwt", "lattice", "level_lengths", "wavedec"]

Filter = Sequence[float] | Tensor

# Angles whose lattice is the filter of db2 with two zeros on either side.
DB2 = (2 * math.pi / 3, -5 * math.pi / 12, math.pi / 2, -math.pi / 2)


def lattice(angles: Tensor) -> Tensor:
    r"""Analysis filter h of an orthogonal wavelet, from any angles: rotations with delays between them.

    .. math:: R(\theta_n)\, \mathrm{diag}(1, z^{-2})\, R(\theta_{n-1}) \cdots \mathrm{diag}(1, z^{-2})\, R(\theta_1)
              \begin{pmatrix} 1 \\ z^{-1} \end{pmatrix}

    is h and a second filter, orthogonal as every factor is: n angles in radians to the 2n taps of h, of unit norm and
    orthogonal to itself shifted by 2, 4, ... samples. Source: Vaidyanathan and Hoang 1988, IEEE Trans. Acoust. Speech
    Signal Process. 36, 81-94.
    """
    low, high = angles.new_tensor([1.0, 0.0]), angles.new_tensor([0.0, 1.0])
    for i, (c, s) in enumerate(zip(angles.cos(), angles.sin(), strict=True)):
        if i:
            low, high = pad(low, (0, 2)), pad(high, (2, 0))
        low, high = c * low + s * high, c * high - s * low
    return low


@lru_cache(maxsize=64)
def _named(wavelet: str) -> tuple[list[float], list[float]]:
    """Analysis filters h and g."""
    if wavelet == "lazy":
        return [0.0, 1.0], [1.0, 0.0]
    try:
        bank = pywt.Wavelet(wavelet)
    except (ValueError, TypeError) as error:
        raise ValueError(f"wavelet must be a name from pywt.wavelist(), got {wavelet!r}") from error
    low = np.array(bank.dec_lo)
    overlaps = [low[2 * k :] @ low[: len(low) - 2 * k] - (k == 0) for k in range(len(low) // 2)]
    # dmey calls itself orthogonal, but its filters are so only to 2e-3: the inverse would not be exact.
    if not bank.orthogonal or np.abs(overlaps).max() > 1e-6:
        raise ValueError(f"wavelet must have orthogonal filters (such as db2), got {wavelet!r}")
    return bank.dec_lo, bank.dec_hi


def _alternating(h: Tensor) -> tuple[Tensor, Tensor]:
    """h and g, its alternating flip."""
    return h, h.flip(0) * h.new_tensor([-1.0, 1.0]).repeat(len(h) // 2)


def _wrap(x: Tensor, left: int, right: int) -> Tensor:
    """Extend the last axis periodically, more than once round where the signal is shorter than the reach."""
    n = x.shape[-1]
    if 0 <= left <= n and 0 <= right <= n:
        return torch.cat([x[..., n - left :], x, x[..., :right]], dim=-1)
    return x[..., torch.arange(-left, n + right, device=x.device) % n]


def _combine(parts: Sequence[Tensor], weights: Filter) -> Tensor:
    """Weighted sum."""
    if isinstance(weights[0], Tensor):
        return torch.stack(
            [part * weight for part, weight in zip(parts, weights, strict=True)]
        ).sum(0)
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def _analyse(x: Tensor, low: Filter, high: Filter) -> tuple[Tensor, Tensor]:
    size, n = len(low), x.shape[-1] // 2
    # First sample read by coefficient 0 is F/2 - (F - 1); the last one, by the last coefficient, 2n - 2 + F/2.
    x = _wrap(x, size // 2 - 1, size // 2 - 1)
    phases = x[..., 0::2], x[..., 1::2]
    parts = [phases[i % 2][..., i // 2 : i // 2 + n] for i in reversed(range(size))]
    return _combine(parts, low), _combine(parts, high)


def _synthesise(approximation: Tensor, detail: Tensor, low: Filter, high: Filter) -> Tensor:
    half, n = len(low) // 2, approximation.shape[-1]
    # Sample 2m + p of the signal is sum_i h[2i + q] a[m + i + start], with q = (F/2 - p) mod 2.
    parity = [(half - p) % 2 for p in (0, 1)]
    start = [(p + q - half) // 2 for p, q in zip((0, 1), parity, strict=True)]
    left, right = -min(start), max(start) + half - 1
    approximation, detail = _wrap(approximation, left, right), _wrap(detail, left, right)
    phases = []
    for first, q in zip(start, parity, strict=True):
        parts = [
            c[..., left + first + i :][..., :n]
            for c in (approximation, detail)
            for i in range(half)
        ]
        phases.append(_combine(parts, [*low[q::2], *high[q::2]]))
    return torch.stack(phases, dim=-1).flatten(-2)


# Each transform's gradient is the other one, for the filters are orthogonal. A few scaled additions of slices are
# faster than a convolution with one channel, and leave nothing for autograd to keep. Learned filters do without.


class _Transform(torch.autograd.Function):
    """Analysis of one signal of even length, or synthesis of a pair of coefficients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(wavelet: str, *given: Tensor):
        transform: Callable = _analyse if len(given) == 1 else _synthesise
        return transform(*given, *_named(wavelet))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.wavelet = inputs[0]

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        back = _Transform.apply(ctx.wavelet, *gradients)
        return None, *(back if isinstance(back, tuple) else (back,))


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
    return (
        _Transform.apply(wavelet, x)
        if isinstance(wavelet, str)
        else _analyse(x, *_alternating(wavelet))
    )


def idwt(
    approximation: Tensor, detail: Tensor, wavelet: str | Tensor, length: int | None = None
) -> Tensor:
    """Inverse of :func:`dwt`: the signal, (batch, channel, length).

    Of coefficients (batch, channel, n) its `length` is ``2 n`` (default) or ``2 n - 1``. ValueError on other lengths,
    or if the two shapes differ.
    """
    if approximation.ndim != 3 or approximation.shape != detail.shape:
        raise ValueError(
            "approximation and detail must have one shape (batch, channel, n), got "
            f"{tuple(approximation.shape)} and {tuple(detail.shape)}"
        )
    n = approximation.shape[-1]
    length = 2 * n if length is None else length
    if length not in (2 * n, 2 * n - 1):
        raise ValueError(
            f"length must be {2 * n} or {2 * n - 1} for {n} coefficients, got {length}"
        )
    if isinstance(wavelet, str):
        return _Transform.apply(wavelet, approximation, detail)[..., :length]
    return _synthesise(approximation, detail, *_alternating(wavelet))[..., :length]


def level_lengths(n_timepoints: int, n_levels: int) -> list[int]:
    """Length of the signal and of each level's coefficients: ``[T, ceil(T/2), ...]``, n_levels + 1 entries."""
    return [-(-n_timepoints // 2**level) for level in range(n_levels + 1)]


def wavedec(x: Tensor, wavelet: str | Tensor, n_levels: int) -> list[Tensor]:
    """Coefficients of x (batch, channel, time) over `n_levels`, as `dwt` makes them, coarsest first.

    In the order of ``pywt.wavedec``: ``[a_J, d_J, ..., d_1]``; ``d_j`` has ``ceil(time / 2**j)`` samples.
    """
    details = []
    for _ in range(n_levels):
        x, detail = dwt(x, wavelet)
        details.append(detail)
    return [x, *details[::-1]]
