"""The field's drive as Triton kernels. Importing it imports triton: ``kernels`` does so for CUDA tensors only.

All tensors are float32 and prepared as in ``kernels``. Each entry of a result is summed by one program in a fixed
order, or by a fixed number of them whose sums are then added. There are no atomics, so that a step repeats to the bit.
The kernels take the latents and the derivative transposed: neighbouring rows are then neighbours in memory.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["drive", "drive_backward"]

# Sizes of a tile, rows by channels, and the programs that share the parcels of a tile of rows in the backward.
# Compiled for an H100 at rank 3 and a bias, every kernel keeps a tile of 32 x 32 in registers, but not one of 32 x 64.
# Which size is fastest has not been measured.
ROWS = 32
CHANNELS = 32
SHARES = 8

# Products and sums of a tile become fused multiply-adds. This is triton's default, but it warns where it is not stated.
FUSED = {"enable_fp_fusion": True}


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _value(x, NAME: tl.constexpr):
    """The activation."""
    if NAME == "tanh":
        y = 2 * _sigmoid(2 * x) - 1
    elif NAME == "silu":
        y = x * _sigmoid(x)
    elif NAME == "relu":
        y = tl.maximum(x, 0.0)
    else:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def _slope(x, NAME: tl.constexpr):
    """Derivative of the activation."""
    if NAME == "tanh":
        s = _sigmoid(2 * x)
        y = 4 * s * (1 - s)
    elif NAME == "silu":
        s = _sigmoid(x)
        y = s * (1 + x * (1 - s))
    elif NAME == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    return y


@triton.jit
def _load(matrix, row, i, n):
    """Entries i of one row of a matrix with n columns, zero beyond the last."""
    return tl.load(matrix + row * n + i, mask=i < n, other=0.0)


@triton.jit
def _load_tile(matrix, i, k, N, K):
    """Rows i and columns k of a matrix (N, K), zero outside."""
    inside = (i < N)[:, None] & (k < K)[None, :]
    return tl.load(matrix + i[:, None] * K + k[None, :], mask=inside, other=0.0)


@triton.jit
def _preactivation(z, w, n, k, p, N, P, K, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Pre-activations of rows n and channels k at parcel p."""
    # The rank is small, so products of a column and a row are unrolled: tensor cores would be empty.
    a = tl.zeros((BN, BK), tl.float32)
    for j in tl.static_range(R):
        a += _load(z, j, n, N)[:, None] * _load(w, j * P + p, k, K)[None, :]
    return a


@triton.jit
def _drive(
    z, dx, w, v, N, P, K, R: tl.constexpr, NAME: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """The drive v of BN rows and BK channels."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    for p in range(P):
        a = _preactivation(z, w, n, k, p, N, P, K, R, BN, BK)
        total += _value(a, NAME) * _load(dx, p, n, N)[:, None]
    tl.store(v + n[:, None] * K + k[None, :], total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _drive_rows(
    z, dx, w, g, dz, ddx, N, P, K, SHARE,
    R: tl.constexpr, RR: tl.constexpr, NAME: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of dx, and of z one share of the parcels at a time: dz (share, row, R). RR is the power of two >= R."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    columns = tl.arange(0, RR)
    total = tl.zeros((BN, RR), tl.float32)
    first = tl.program_id(1) * SHARE
    for p in range(first, tl.minimum(first + SHARE, P)):
        x = _load(dx, p, n, N)
        drive = tl.zeros((BN,), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            gk = _load_tile(g, n, k, N, K)
            a = _preactivation(z, w, n, k, p, N, P, K, R, BN, BK)
            drive += tl.sum(_value(a, NAME) * gk, axis=1)
            q = _slope(a, NAME) * gk * x[:, None]
            for j in tl.static_range(R):
                along = tl.sum(q * _load(w, j * P + p, k, K)[None, :], axis=1)
                # Registers have no index: column j is selected by a comparison.
                total += along[:, None] * (columns == j).to(tl.float32)[None, :]
        tl.store(ddx + p * N + n, drive, mask=n < N)
    place = dz + (tl.program_id(1) * N + n[:, None]) * R + columns[None, :]
    tl.store(place, total, mask=(n < N)[:, None] & (columns < R)[None, :])


@triton.jit
def _drive_weights(
    z, dx, w, g, dw, N, P, K,
    R: tl.constexpr, RR: tl.constexpr, NAME: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradient of w at one parcel and BK channels, over all rows."""
    p = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    columns = tl.arange(0, RR)
    total = tl.zeros((RR, BK), tl.float32)
    for start in range(0, N, BN):
        n = tl.cast(start, tl.int64) + tl.arange(0, BN)
        a = _preactivation(z, w, n, k, p, N, P, K, R, BN, BK)
        q = _slope(a, NAME) * _load_tile(g, n, k, N, K) * _load(dx, p, n, N)[:, None]
        for j in tl.static_range(R):
            along = tl.sum(q * _load(z, j, n, N)[:, None], axis=0)
            total += along[None, :] * (columns == j).to(tl.float32)[:, None]
    place = dw + (columns[:, None] * P + p) * K + k[None, :]
    tl.store(place, total, mask=(columns < R)[:, None] & (k < K)[None, :])


def _on_device(z: Tensor):
    """Launch where the tensors are: triton takes the current device. The interpreter takes CPU tensors."""
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


def drive(z: Tensor, dx: Tensor, w: Tensor, name: str) -> Tensor:
    """v (row, channel) from prepared z (row, rank), dx (row, parcel) and w (rank, parcel * channel)."""
    n, rank = z.shape
    parcels = dx.shape[1]
    channels = w.shape[1] // parcels
    zt = z.T.contiguous()
    dxt = dx.T.contiguous()
    v = z.new_empty(n, channels)
    grid = (triton.cdiv(n, ROWS), triton.cdiv(channels, CHANNELS))
    sizes = {"R": rank, "NAME": name, "BN": ROWS, "BK": CHANNELS}
    with _on_device(z):
        _drive[grid](zt, dxt, w, v, n, parcels, channels, **sizes, **FUSED)
    return v


def drive_backward(
    z: Tensor, dx: Tensor, w: Tensor, g: Tensor, name: str, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, dx and w from g (row, channel), the gradient of v. `need_dx` would save nothing here."""
    n, rank = z.shape
    parcels = dx.shape[1]
    channels = g.shape[1]
    shares = min(SHARES, parcels)
    zt = z.T.contiguous()
    dxt = dx.T.contiguous()
    dz = z.new_empty(shares, n, rank)
    ddx = torch.empty_like(dxt)
    dw = torch.empty_like(w)
    share = triton.cdiv(parcels, shares)
    counts = (n, parcels, channels)
    sizes = {"R": rank, "RR": triton.next_power_of_2(rank), "NAME": name}
    sizes |= {"BN": ROWS, "BK": CHANNELS, **FUSED}
    with _on_device(z):
        by_rows = _drive_rows[triton.cdiv(n, ROWS), shares]
        by_rows(zt, dxt, w, g, dz, ddx, *counts, share, **sizes)
        by_weights = _drive_weights[parcels, triton.cdiv(channels, CHANNELS)]
        by_weights(zt, dxt, w, g, dw, *counts, **sizes)
    return dz.sum(0), ddx.T.contiguous(), dw
