r"""The drive of the field without its tensor H: every entry of H is a function of r numbers, so it is made when needed.

.. math:: v[b, t, k] = \sum_p \sigma\Big(\sum_j W[pK + k, j]\, z[b, t, j] + \beta[pK + k]\Big)\, \dot X[b, t, p]

Forward and backward go through tiles of a megabyte that stay in the cache. The backward computes each tile again, as
Dao et al., *FlashAttention*, NeurIPS 2022, section 3.1, do. With a bias, z carries a last column of ones and W a last
column with the bias, so that one product makes a tile with or without it.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "field_drive", "field_drive_eager"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "relu": functional.relu,
}

# Bytes and rows of a tile. Measured on one thread at 450 parcels, 300 channels and rank 3: 0.5 to 4 MiB are alike,
# 16 MiB is slower. On a GPU without Triton every operation on a tile is a launch, so tiles are larger there.
CPU_TILE_BYTES = 2**20
OTHER_TILE_BYTES = 2**26
TILE_ROWS = 16
LOCK = threading.Lock()


def field_drive(
    z: Tensor, derivative: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Contract the field with the control.

    Float64 inputs are computed in float64, all others in float32, also inside autocast. On CUDA with triton installed,
    float32 work is done by the kernels of ``field_triton``; everything else tile by tile in PyTorch.

    Parameters
    ----------
    z, derivative : Tensor, shape (batch, time, rank) and (batch, time, parcel)
        Latent of the field, and derivative of the path.
    weight, bias : Tensor, shape (parcel * channel, rank) and (parcel * channel,)
        The parcel index slow and the channel index fast. The bias may be None.
    activation : str
        A name of ACTIVATIONS. Shapes are those of :class:`~mnemodyn.model.operator.Field` and are not checked again.

    Returns
    -------
    Tensor, shape (batch, time, channel)
        In the dtype that those of z, derivative and weight promote to. It can be differentiated once: a backward pass
        with ``create_graph=True`` raises RuntimeError.
    """
    return FieldDrive.apply(z, derivative, weight, bias, activation)


def field_drive_eager(
    z: Tensor, derivative: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The same as the equation reads, with H in memory: the oracle of :func:`field_drive`."""
    h = ACTIVATIONS[activation](functional.linear(z, weight, bias))
    h = h.unflatten(-1, (derivative.shape[-1], -1))
    return torch.einsum("btp,btpk->btk", derivative, h)


class FieldDrive(torch.autograd.Function):
    """Drive and gradients, tile by tile; only the inputs are kept for the backward."""

    @staticmethod
    def forward(ctx, z, derivative, weight, bias, name):
        ctx.save_for_backward(z, derivative, weight, bias)
        ctx.name = name
        z1, dx, w1 = _prepare(z, derivative, weight, bias)
        core = _core(z1)

        def work(rows: slice) -> Tensor:
            return core.drive(z1[rows], dx[rows], w1, name)

        v = torch.cat(_in_threads(work, z1, w1))
        dtype = torch.promote_types(torch.promote_types(z.dtype, derivative.dtype), weight.dtype)
        return v.to(dtype).view(*z.shape[:2], v.shape[1])

    @staticmethod
    def backward(ctx, grad):
        # PyTorch's once_differentiable misses the case in which `grad` itself needs no gradient: the second
        # derivative would then be zero without an error.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "field_drive can be differentiated once: create_graph=True has to stay off"
            )
        z, derivative, weight, bias = ctx.saved_tensors
        z1, dx, w1 = _prepare(z, derivative, weight, bias)
        g = grad.flatten(0, 1).to(z1.dtype).contiguous()
        core = _core(z1)
        need_dx = ctx.needs_input_grad[1]

        def work(rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
            return core.drive_backward(z1[rows], dx[rows], w1, g[rows], ctx.name, need_dx)

        dz_parts, ddx_parts, dw_parts = zip(*_in_threads(work, z1, w1), strict=True)
        rank = z.shape[-1]
        dz = torch.cat(dz_parts)[:, :rank].reshape(z.shape).to(z.dtype)
        dw = sum(dw_parts[1:], dw_parts[0])
        dweight = dw[:rank].T.to(weight.dtype)
        ddx = None
        if need_dx:
            ddx = torch.cat(ddx_parts).view(derivative.shape).to(derivative.dtype)
        dbias = None
        if bias is not None:
            dbias = dw[rank].to(bias.dtype)
        return dz, ddx, dweight, dbias, None


def _prepare(
    z: Tensor, derivative: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (row, rank [+ 1 with a bias]), derivative (row, parcel), weights (rank, parcel * channel), contiguous."""
    given = [tensor for tensor in (z, derivative, weight, bias) if tensor is not None]
    double = any(tensor.dtype == torch.float64 for tensor in given)
    dtype = torch.float64 if double else torch.float32
    z1 = z.flatten(0, 1).to(dtype)
    w1 = weight.T.to(dtype)
    if bias is not None:
        # A column of ones, so that the bias is a row of the weights.
        z1 = torch.cat([z1, z1.new_ones(len(z1), 1)], dim=1)
        w1 = torch.cat([w1, bias.to(dtype)[None]])
    dx = derivative.flatten(0, 1).to(dtype)
    return z1.contiguous(), dx.contiguous(), w1.contiguous()


_find_spec = functools.cache(importlib.util.find_spec)


def _core(z1: Tensor):
    """What computes: the Triton kernels, or the tiles below."""
    if z1.is_cuda and z1.dtype == torch.float32 and z1.numel() and _find_spec("triton"):
        from mnemodyn.model import field_triton  # imports triton, which takes a second

        return field_triton
    return Tiles


def _in_threads(work: Callable[[slice], object], z1: Tensor, w1: Tensor) -> list:
    """Results of `work` for each share of the rows, in order: on the CPU, one share for each of PyTorch's threads.

    By default PyTorch's threads wait for each other after every operation. Tiles take thousands of operations, and one
    busy core would hold up each.
    """
    threads = torch.get_num_threads()
    shares = 1
    if z1.device.type == "cpu":
        tiles = len(z1) * w1.shape[1] * z1.element_size() // CPU_TILE_BYTES
        shares = min(len(z1), threads, tiles // 4)  # fewer tiles are not worth starting a thread
    if shares < 2:
        return [work(slice(None))]
    bounds = [len(z1) * i // shares for i in range(shares + 1)]
    rows = [slice(bounds[i], bounds[i + 1]) for i in range(shares)]
    run: Callable[[slice], object] = torch.no_grad()(work)  # a new thread has gradients on
    # New threads inherit the number of threads, which is one setting of the whole process.
    with LOCK:
        try:
            torch.set_num_threads(1)
            with ThreadPoolExecutor(shares) as pool:
                return list(pool.map(run, rows))
        finally:
            torch.set_num_threads(threads)


class Tiles:
    """Tile by tile in PyTorch, on any device. All products are in place, which autocast leaves alone."""

    @staticmethod
    def drive(z: Tensor, dx: Tensor, w: Tensor, name: str) -> Tensor:
        """v (row, channel) from prepared inputs."""
        parcels = dx.shape[1]
        v = z.new_zeros(len(z), 1, w.shape[1] // parcels)
        for rows, some, columns, (a,) in _tiles(z, w, parcels, n_buffers=1):
            _preactivation(z[rows], w[:, columns], name, a)
            _activate(a, name)
            v[rows].baddbmm_(dx[rows, None, some], a.unflatten(1, (-1, v.shape[2])))
        return v[:, 0]

    @staticmethod
    def drive_backward(
        z: Tensor, dx: Tensor, w: Tensor, g: Tensor, name: str, need_dx: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of z, dx (None where not needed) and w from g (row, channel), the gradient of v."""
        dz = torch.zeros_like(z)
        dw = torch.zeros_like(w)
        ddx = torch.empty_like(dx) if need_dx else None
        for rows, some, columns, (a, q) in _tiles(z, w, dx.shape[1], n_buffers=2):
            _preactivation(z[rows], w[:, columns], name, a)
            a3, q3, g3 = (t.unflatten(1, (-1, g.shape[1])) for t in (a, q, g[rows]))
            if name == "tanh":
                _activate(a, name)
                torch.mul(a3, g3, out=q3)
            elif need_dx:
                _activate(q.copy_(a), name)
                q3.mul_(g3)
            if ddx is not None:
                torch.sum(q3, -1, out=ddx[rows, some])
            _slope(a3, q3, g3, name)
            q3.mul_(dx[rows, some, None])
            dz[rows].addmm_(q, w[:, columns].T)
            dw[:, columns].addmm_(z[rows].T, q)
        return dz, ddx, dw


def _tiles(
    z: Tensor, w: Tensor, parcels: int, n_buffers: int
) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """Rows, parcels and columns of each tile, and buffers (row, column) of its size, not initialised."""
    n = len(z)
    channels = w.shape[1] // parcels
    if n == 0 or channels == 0:
        return
    tile_bytes = CPU_TILE_BYTES if z.device.type == "cpu" else OTHER_TILE_BYTES
    entries = tile_bytes // z.element_size()
    # As many parcels as fit beside a few rows, then as many rows as fit.
    wide = max(1, min(parcels, entries // (TILE_ROWS * channels)))
    tall = max(1, min(n, entries // (wide * channels)))
    buffers = [z.new_empty(tall * wide * channels) for _ in range(n_buffers)]
    for row in range(0, n, tall):
        rows = slice(row, min(row + tall, n))
        for parcel in range(0, parcels, wide):
            some = slice(parcel, min(parcel + wide, parcels))
            columns = slice(some.start * channels, some.stop * channels)
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            yield rows, some, columns, [b[: shape[0] * shape[1]].view(shape) for b in buffers]


def _preactivation(z: Tensor, w: Tensor, name: str, out: Tensor) -> None:
    """Pre-activations of a tile; twice them for tanh, as :func:`_activate` expects."""
    if name == "tanh":
        z = z * 2
    torch.mm(z, w, out=out)


def _activate(a: Tensor, name: str) -> None:
    """Activate a tile in place."""
    if name == "tanh":
        # tanh(x) = 2 sigmoid(2x) - 1: PyTorch's sigmoid took a sixth of the time of its tanh on the CPU.
        a.sigmoid_().mul_(2).sub_(1)
    elif name == "gelu":
        torch.ops.aten.gelu_(a)
    elif name == "silu":
        functional.silu(a, inplace=True)
    else:
        a.relu_()


def _slope(a: Tensor, q: Tensor, g: Tensor, name: str) -> None:
    """Write the gradient of the pre-activation, slope times g, into q (row, parcel, channel).

    `a` is the pre-activation; for tanh, it is the activation and `q` its product with g.
    """
    if name == "tanh":
        torch.addcmul(g, a, q, value=-1, out=q)  # (1 - h^2) g
    elif name == "gelu":
        torch.ops.aten.gelu_backward.grad_input(g.expand_as(a), a, grad_input=q)
    elif name == "silu":
        torch.ops.aten.silu_backward.grad_input(g.expand_as(a), a, grad_input=q)
    else:
        torch.ops.aten.threshold_backward.grad_input(g.expand_as(a), a, 0, grad_input=q)
