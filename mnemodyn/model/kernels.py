r"""The drive of the field without its tensor H: every entry of H is a function of r numbers, so it is made when needed.

.. math:: v[b, t, k] = \sum_p \sigma\Big(\sum_j W[pK + k, j]\, z[b, t, j] + \beta[pK + k]\Big)\, \dot X[b, t, p]

Forward and backward go through tiles of a megabyte that stay in the cache, the backward computing each tile again.
With a bias, z carries a last column of ones and W a last column holding the bias: one product makes a tile of either.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["field_drive", "field_drive_eager"]

NAMES: dict[Callable[[Tensor], Tensor], str] = {
    torch.tanh: "tanh",
    functional.gelu: "gelu",
    functional.silu: "silu",
}

# Bytes and rows of a tile. Measured on one thread at 450 parcels, 300 channels, rank 3: 0.5 to 4 MiB are alike, 16 MiB
# slower. On a GPU without Triton each operation on a tile is a launch, so that there it is larger.
TILE_BYTES, OTHER_TILE_BYTES, TILE_ROWS = {"cpu": 1 << 20}, 64 << 20, 16
LOCK = threading.Lock()


def field_drive(
    z: Tensor,
    derivative: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Contract the field with the control. What computes it follows from the tensors: there is nothing to set.

    Float64 inputs are computed in float64, all others in float32, also inside autocast. On CUDA, with triton at hand,
    float32 work is done by the kernels of ``field_triton``; all the rest tile by tile in PyTorch.

    Parameters
    ----------
    z, derivative : Tensor, shape (batch, time, rank) and (batch, time, parcel)
        Latent of the field, and derivative of the path.
    weight, bias : Tensor, shape (parcel * channel, rank) and (parcel * channel,)
        The parcel index slow and the channel index fast. The bias may be None.
    activation : callable
        ``torch.tanh``, ``functional.gelu`` or ``functional.silu``; ValueError for others, and on shapes that disagree.

    Returns
    -------
    Tensor, shape (batch, time, channel)
        In the dtype that those of z, derivative and weight promote to. It can be differentiated once: a backward pass
        with ``create_graph=True`` raises RuntimeError. The recomputation of tiles is that of Dao et al.,
        *FlashAttention*, NeurIPS 2022, section 3.1.
    """
    if activation not in NAMES:
        raise ValueError(
            f"activation must be one of {sorted(NAMES.values())} of PyTorch, got {activation!r}"
        )
    if z.ndim != 3 or derivative.ndim != 3 or z.shape[:2] != derivative.shape[:2]:
        raise ValueError(
            "z must be (batch, time, rank) and derivative (batch, time, parcel), "
            f"got {tuple(z.shape)} and {tuple(derivative.shape)}"
        )
    parcels, rank = derivative.shape[-1], z.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != rank or parcels == 0 or len(weight) % parcels:
        raise ValueError(
            f"weight must be (parcel * channel, rank) with {parcels} parcels and rank {rank}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be ({len(weight)},) as weight has rows, got {tuple(bias.shape)}"
        )
    for name, value in {"z": z, "derivative": derivative, "weight": weight, "bias": bias}.items():
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} must be floating, got {value.dtype}")
    if torch.compiler.is_exporting():  # tiles and threads do not make a program
        return field_drive_eager(z, derivative, weight, bias, activation)
    return FieldDrive.apply(z, derivative, weight, bias, NAMES[activation])


def field_drive_eager(
    z: Tensor,
    derivative: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """The same as the equation reads, H in full: the oracle :func:`field_drive` is held against."""
    h = activation(functional.linear(z, weight, bias)).unflatten(-1, (derivative.shape[-1], -1))
    return torch.einsum("btp,btpk->btk", derivative, h)


class FieldDrive(torch.autograd.Function):
    """Keeps its inputs only."""

    @staticmethod
    def forward(ctx, z, derivative, weight, bias, name):
        ctx.save_for_backward(z, derivative, weight, bias)
        ctx.name = name
        z1, dx, w1 = _prepare(z, derivative, weight, bias)
        core = _core(z1)
        v = torch.cat(_shared(lambda rows: core.drive(z1[rows], dx[rows], w1, name), core, z1, w1))
        dtype = torch.promote_types(torch.promote_types(z.dtype, derivative.dtype), weight.dtype)
        return v.to(dtype).view(*z.shape[:2], v.shape[1])

    @staticmethod
    def backward(ctx, grad):
        # once_differentiable would hand back constants here wherever `grad` is one: wrong, without a word.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "field_drive can be differentiated once: create_graph=True has to stay off"
            )
        z, derivative, weight, bias = ctx.saved_tensors
        z1, dx, w1 = _prepare(z, derivative, weight, bias)
        g = grad.flatten(0, 1).to(z1.dtype).contiguous()
        need_dx, core = ctx.needs_input_grad[1], _core(z1)
        parts = _shared(
            lambda rows: core.drive_backward(z1[rows], dx[rows], w1, g[rows], ctx.name, need_dx),
            core,
            z1,
            w1,
        )
        dz, ddx, dw = zip(*parts, strict=True)
        dz, ddx, dw, rank = (
            torch.cat(dz),
            torch.cat(ddx) if need_dx else None,
            sum(dw[1:], dw[0]),
            z.shape[-1],
        )
        return (
            dz[:, :rank].reshape(z.shape).to(z.dtype),
            None if ddx is None else ddx.view(derivative.shape).to(derivative.dtype),
            dw[:rank].T.to(weight.dtype),
            None if bias is None else dw[rank].to(bias.dtype),
            None,
        )


def _prepare(
    z: Tensor, derivative: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (row, rank [+ 1 with a bias]), derivative (row, parcel), weights (rank, parcel * channel), contiguous."""
    double = any(a is not None and a.dtype == torch.float64 for a in (z, derivative, weight, bias))
    dtype = torch.float64 if double else torch.float32
    z1, w1 = z.reshape(-1, z.shape[-1]).to(dtype), weight.T.to(dtype)
    if bias is not None:
        z1 = torch.cat([z1, z1.new_ones(len(z1), 1)], dim=1)
        w1 = torch.cat([w1, bias.to(dtype)[None]])
    return (
        z1.contiguous(),
        derivative.reshape(-1, derivative.shape[-1]).to(dtype).contiguous(),
        w1.contiguous(),
    )


_find_spec = functools.cache(importlib.util.find_spec)


def _core(z1: Tensor):
    """What computes: the Triton kernels, or the tiles below."""
    if z1.is_cuda and z1.dtype == torch.float32 and z1.numel() and _find_spec("triton"):
        from mnemodyn.model import field_triton  # imports triton, which takes a second

        return field_triton
    return Tiles


def _shared(work: Callable[[slice], object], core, z: Tensor, w: Tensor) -> list:
    """What `work` returns for each share of the rows, in order: on the CPU, one share for each of PyTorch's threads.

    Left to itself PyTorch has its threads meet after every operation. There are thousands of them on tiles, and one
    busy core held up each.
    """
    n, threads = len(z), torch.get_num_threads()
    tiles = n * w.shape[1] * z.element_size() // TILE_BYTES["cpu"]
    shares = (
        min(n, threads, tiles // 4) if core is Tiles and z.device.type == "cpu" else 1
    )  # worth a thread's start
    if shares < 2:
        return [work(slice(None))]
    rows = [slice(n * i // shares, n * (i + 1) // shares) for i in range(shares)]

    run: Callable[[slice], object] = torch.no_grad()(work)  # a thread begins with gradients on
    # New threads take over this setting, which for the matrix products is one of the whole process.
    with LOCK:
        try:
            torch.set_num_threads(1)
            with ThreadPoolExecutor(shares) as pool:
                return list(pool.map(run, rows))
        finally:
            torch.set_num_threads(threads)


class Tiles:
    """Tile by tile in PyTorch, on any device. Every product is in place, which autocast leaves alone."""

    @staticmethod
    def drive(z: Tensor, dx: Tensor, w: Tensor, name: str) -> Tensor:
        """v (row, channel) from prepared inputs."""
        parcels = dx.shape[1]
        v = z.new_zeros(len(z), 1, w.shape[1] // parcels)
        for rows, some, columns, (a,) in _tiles(z, parcels, w.shape[1], buffers=1):
            h = _activate(_preactivation(z[rows], w[:, columns], name, a), name)
            v[rows].baddbmm_(dx[rows, None, some], h.unflatten(1, (-1, v.shape[2])))
        return v[:, 0]

    @staticmethod
    def drive_backward(
        z: Tensor, dx: Tensor, w: Tensor, g: Tensor, name: str, need_dx: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of z, dx (None where not needed) and w from g (row, channel), the gradient of v."""
        parcels = dx.shape[1]
        dz, dw, ddx = (
            torch.zeros_like(z),
            torch.zeros_like(w),
            torch.empty_like(dx) if need_dx else None,
        )
        for rows, some, columns, (a, q) in _tiles(z, parcels, w.shape[1], buffers=2):
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
            # From here q is the gradient of the pre-activation.
            if name == "tanh":
                torch.addcmul(g3, a3, q3, value=-1, out=q3)  # (1 - h^2) g
            elif name == "gelu":
                torch.ops.aten.gelu_backward.grad_input(g3.expand_as(a3), a3, grad_input=q3)
            else:
                torch.ops.aten.silu_backward.grad_input(g3.expand_as(a3), a3, grad_input=q3)
            q3.mul_(dx[rows, some, None])
            dz[rows].addmm_(q, w[:, columns].T)
            dw[:, columns].addmm_(z[rows].T, q)
        return dz, ddx, dw


def _tiles(
    z: Tensor, parcels: int, columns: int, buffers: int
) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """Rows, parcels and columns of each tile, and buffers (row, column) of its size that hold anything."""
    channels, n, most = columns // parcels, len(z), TILE_BYTES.get(z.device.type, OTHER_TILE_BYTES)
    if not n or not channels:
        return
    entries = most // z.element_size()
    wide = max(1, min(parcels, entries // (TILE_ROWS * channels)))
    tall = max(1, min(n, entries // (wide * channels)))
    store = [z.new_empty(tall * wide * channels) for _ in range(buffers)]
    for row in range(0, n, tall):
        for parcel in range(0, parcels, wide):
            rows, some = slice(row, min(row + tall, n)), slice(parcel, min(parcel + wide, parcels))
            shape = rows.stop - rows.start, (some.stop - some.start) * channels
            held = [b[: shape[0] * shape[1]].view(shape) for b in store]
            yield rows, some, slice(some.start * channels, some.stop * channels), held


def _preactivation(z: Tensor, w: Tensor, name: str, out: Tensor) -> Tensor:
    """Pre-activations of a tile; twice them for tanh, as :func:`_activate` wants."""
    return torch.mm(z * 2 if name == "tanh" else z, w, out=out)


def _activate(a: Tensor, name: str) -> Tensor:
    """In place. tanh(x) = 2 sigmoid(2x) - 1: PyTorch's sigmoid took a sixth of the time of its tanh on the CPU."""
    if name == "tanh":
        return a.sigmoid_().mul_(2).sub_(1)
    return functional.silu(a, inplace=True) if name == "silu" else torch.ops.aten.gelu_(a)
