"""The field's drive as Triton kernels. Importing it imports triton: ``kernels`` does so for CUDA tensors only.

All tensors are float32 and prepared as in ``kernels``. Each entry of a result is summed by one program in a fixed
order, or by a fixed number of them and then once more: no atomics, so that a step is repeatable to the bit.
The kernels take the latents and the derivative transposed: neighbouring rows are then neighbours in memory.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["drive", "drive_backward"]

# Sizes of a tile, rows by channels, and the programs that share the parcels of a tile of rows in the backward.
# Compiled for an H100 at rank 3 and a bias, every kernel keeps a tile of 32 x 32 in registers, not one of 32 x 64.
# Which is fastest is to be measured on a GPU.
ROWS, CHANNELS, SHARES = 32, 32, 8

# Products and sums of a tile become fused multiply-adds. Said aloud, as triton warns where it is left to its default.
FUSED = {"enable_fp_fusion": True}


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _value(x, NAME: tl.constexpr):
    if NAME == "tanh":
        y = 2 * _sigmoid(2 * x) - 1
    elif NAME == "silu":
        y = x * _sigmoid(x)
    else:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def _slope(x, NAME: tl.constexpr):
    if NAME == "tanh":
        s = _sigmoid(2 * x)
        y = 4 * s * (1 - s)
    elif NAME == "silu":
        s = _sigmoid(x)
        y = s * (1 + x * (1 - s))
    else:
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + 0.3989422804014327 * x * tl.exp(
            -0.5 * x * x
        )
    return y


@triton.jit
def _preactivation(z, w, n, k, p, N, P, K, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    # The rank is a few: unrolled products of a column and a row, nothing for a tensor core.
    a = tl.zeros((BN, BK), tl.float32)
    for j in tl.static_range(R):
        zj = tl.load(z + j * N + n, mask=n < N, other=0.0)
        wj = tl.load(w + (j * P + p) * K + k, mask=k < K, other=0.0)
        a += zj[:, None] * wj[None, :]
    return a


@triton.jit
def _drive(
    z, dx, w, v, N, P, K, R: tl.constexpr, NAME: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    for p in range(P):
        x = tl.load(dx + p * N + n, mask=n < N, other=0.0)
        a = _preactivation(z, w, n, k, p, N, P, K, R, BN, BK)
        total += _value(a, NAME) * x[:, None]
    tl.store(v + n[:, None] * K + k[None, :], total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _drive_rows(
    z, dx, w, g, dz, ddx, N, P, K, SHARE,
    R: tl.constexpr, RR: tl.constexpr, NAME: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of dx, and of z one share of the parcels at a time: dz (share, row, R). RR is the power of two >= R."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    j_all = tl.arange(0, RR)
    total = tl.zeros((BN, RR), tl.float32)
    first = tl.program_id(1) * SHARE
    for p in range(first, tl.minimum(first + SHARE, P)):
        x = tl.load(dx + p * N + n, mask=n < N, other=0.0)
        drive = tl.zeros((BN,), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            inside = (n < N)[:, None] & (k < K)[None, :]
            gk = tl.load(g + n[:, None] * K + k[None, :], mask=inside, other=0.0)
            a = _preactivation(z, w, n, k, p, N, P, K, R, BN, BK)
            drive += tl.sum(_value(a, NAME) * gk, axis=1)
            q = _slope(a, NAME) * gk * x[:, None]
            for j in tl.static_range(R):
                wj = tl.load(w + (j * P + p) * K + k, mask=k < K, other=0.0)
                # Registers have no index: column j is reached through a comparison.
                total += (
                    tl.sum(q * wj[None, :], axis=1)[:, None] * (j_all == j).to(tl.float32)[None, :]
                )
        tl.store(ddx + p * N + n, drive, mask=n < N)
    at = dz + (tl.program_id(1) * N + n[:, None]) * R + j_all[None, :]
    tl.store(at, total, mask=(n < N)[:, None] & (j_all < R)[None, :])


@triton.jit
def _drive_weights(
    z, dx, w, g, dw, N, P, K,
    R: tl.constexpr, RR: tl.constexpr, NAME: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradient of w at one parcel and BK channels, over all rows."""
    p = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    j_all = tl.arange(0, RR)
    total = tl.zeros((RR, BK), tl.float32)
    for start in range(0, N, BN):
        n = tl.cast(start, tl.int64) + tl.arange(0, BN)
        x = tl.load(dx + p * N + n, mask=n < N, other=0.0)
        inside = (n < N)[:, None] & (k < K)[None, :]
        gk = tl.load(g + n[:, None] * K + k[None, :], mask=inside, other=0.0)
        q = _slope(_preactivation(z, w, n, k, p, N, P, K, R, BN, BK), NAME) * gk * x[:, None]
        for j in tl.static_range(R):
            zj = tl.load(z + j * N + n, mask=n < N, other=0.0)
            total += tl.sum(q * zj[:, None], axis=0)[None, :] * (j_all == j).to(tl.float32)[:, None]
    at = dw + (j_all[:, None] * P + p) * K + k[None, :]
    tl.store(at, total, mask=(j_all < R)[:, None] & (k < K)[None, :])


def _device(z: Tensor):
    """Triton launches on the current device, which need not be the tensors'. The interpreter takes CPU tensors."""
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


def drive(z: Tensor, dx: Tensor, w: Tensor, name: str) -> Tensor:
    """v (row, channel) from prepared z (row, rank), dx (row, parcel) and w (rank, parcel * channel)."""
    (n, rank), parcels = z.shape, dx.shape[1]
    channels = w.shape[1] // parcels
    v = z.new_empty(n, channels)
    grid = triton.cdiv(n, ROWS), triton.cdiv(channels, CHANNELS)
    with _device(z):
        _drive[grid](
            *(z.T.contiguous(), dx.T.contiguous(), w, v, n, parcels, channels),
            **{"R": rank, "NAME": name, "BN": ROWS, "BK": CHANNELS, **FUSED},
        )
    return v


def drive_backward(
    z: Tensor, dx: Tensor, w: Tensor, g: Tensor, name: str, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, dx and w from g (row, channel), the gradient of v. `need_dx` saves nothing here."""
    (n, rank), parcels, channels = z.shape, dx.shape[1], g.shape[1]
    shares = min(SHARES, parcels)
    zt, dxt = z.T.contiguous(), dx.T.contiguous()
    dz, ddx, dw = z.new_empty(shares, n, rank), torch.empty_like(dxt), torch.empty_like(w)
    sizes = {
        "R": rank,
        "RR": triton.next_power_of_2(rank),
        "NAME": name,
        "BN": ROWS,
        "BK": CHANNELS,
        **FUSED,
    }
    with _device(z):
        _drive_rows[triton.cdiv(n, ROWS), shares](
            zt, dxt, w, g, dz, ddx, n, parcels, channels, triton.cdiv(parcels, shares), **sizes
        )
        _drive_weights[parcels, triton.cdiv(channels, CHANNELS)](
            zt, dxt, w, g, dw, n, parcels, channels, **sizes
        )
    return dz.sum(0), ddx.T.contiguous(), dw
