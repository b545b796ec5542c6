"""The network computed the plain way, with the weights of a `MnemoDyn`: what the package is measured against.

Spline coefficients come from torchcde on the host, the field's matrix H exists for every frame, segments are a
`vmap` over convolutions, the wavelets are strided convolutions, and autograd keeps everything it needs. The numbers
are those of the package (tests/test_benchmarks.py), for scans of the length that the network was made for.
"""

import pywt
import torch
import torchcde
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.model.control import path_derivative
from mnemodyn.model.network import MnemoDyn
from mnemodyn.model.operator import BandedOperator, OperatorBlock


def spline_derivative(x: Tensor, t_r: float) -> Tensor:
    """Derivative of the Hermite spline through x (batch, time, parcel) at its frames, fitted on the host."""
    times = t_r * torch.arange(x.shape[1], dtype=x.dtype)
    fit = torchcde.hermite_cubic_coefficients_with_backward_differences
    coefficients = fit(x.detach().cpu(), times).to(x.device)
    times = times.to(x.device)
    return torchcde.CubicSpline(coefficients, times).derivative(times)


class Wavelet:
    """Periodized transform as strided convolutions, all channels with the same two filters."""

    def __init__(self, name: str, like: Tensor):
        bank = pywt.Wavelet(name)
        filters = torch.tensor([bank.dec_lo, bank.dec_hi], dtype=like.dtype, device=like.device)
        self.kernel = filters.flip(-1)[:, None]
        self.reach = self.kernel.shape[-1] // 2 - 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Approximation and detail of x (batch, channel, time)."""
        batch, channel, n = x.shape
        if n % 2:
            x = torch.cat([x, x[..., -1:]], dim=-1)
        x = functional.pad(x, (self.reach, self.reach), mode="circular").flatten(0, 1)[:, None]
        pair = functional.conv1d(x, self.kernel, stride=2).view(batch, channel, 2, -1)
        return pair[:, :, 0], pair[:, :, 1]

    def inverse(self, approximation: Tensor, detail: Tensor, length: int) -> Tensor:
        """Signal of `length` samples."""
        around = (self.kernel.shape[-1] + 3) // 4
        pair = torch.stack([approximation, detail], dim=2).flatten(0, 1)
        pair = functional.pad(pair, (around, around), mode="circular")
        x = functional.conv_transpose1d(pair, self.kernel, stride=2)
        x = x.view(*approximation.shape[:2], -1)
        return x[..., 2 * around + self.reach :][..., :length]


def banded(operator: BandedOperator, u: Tensor) -> Tensor:
    """Each segment of u (batch, 2K, time) through its own convolution."""
    n = u.shape[-1]
    u = functional.pad(u, (0, operator.n_segments * operator.segment - n))
    segments = torch.stack(u.split(operator.segment, dim=-1))
    half = operator.weight.shape[-1] // 2

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv1d(x, weight, bias, padding=half)

    parts = torch.func.vmap(convolve)(segments, operator.weight, operator.bias)
    return operator.activation(torch.cat(list(parts), dim=-1)[..., :n])


class PlainForm(nn.Module):
    """`network` the plain way; its weights are shared and not copied, its banded operators must be full ones."""

    def __init__(self, network: MnemoDyn):
        super().__init__()
        if network.config.banded != "full":
            raise ValueError(f"banded must be full, got {network.config.banded!r}")
        self.network = network

    def forward(self, x: Tensor, t_r: float) -> Tensor:
        """Reconstruction (batch, time, parcel) of fully visible scans x, one frame every `t_r` seconds."""
        config = self.network.config
        if x.shape[1] != config.n_timepoints:
            raise ValueError(f"x must have {config.n_timepoints} frames, got {x.shape[1]}")
        for i, block in enumerate(self.network.blocks):
            derivative = path_derivative(x, t_r) if i > 0 else spline_derivative(x, t_r)
            y = self.block(block, x, derivative)
            x = x + y if config.residual else y
        return x

    def block(self, block: OperatorBlock, x: Tensor, derivative: Tensor) -> Tensor:
        """One block."""
        config = block.config
        field = block.field
        activation = field.activation
        z = activation(field.bottleneck(activation(field.input(x))))
        h = activation(field.expansion(z)).view(*x.shape, config.n_channels)
        v = torch.einsum("btpk,btp->btk", h, derivative) / config.n_parcels**0.5
        if block.lift is not None:
            v = v + block.lift(torch.cat([x, torch.ones_like(x)], dim=-1))
        wavelet = Wavelet(config.wavelet, x)
        approximations = [v.transpose(1, 2).contiguous()]
        details = []
        for _ in range(config.n_levels):
            approximation, detail = wavelet.forward(approximations[-1])
            approximations.append(approximation)
            details.append(detail)
        c = approximations[-1]
        for weight, bias in zip(block.coarse.weight, block.coarse.bias, strict=True):
            c = activation(torch.einsum("bkm,kmn->bkn", c, weight) + bias)
        for level in reversed(range(config.n_levels)):
            u = torch.cat([details[level], approximations[level + 1]], dim=1)
            u = banded(block.banded[level], u) + torch.cat([torch.zeros_like(c), c], dim=1)
            detail, approximation = u.chunk(2, dim=1)
            c = wavelet.inverse(approximation, detail, approximations[level].shape[-1])
        y = block.output(c.transpose(1, 2))
        return y if block.parcel_scale is None else y * block.parcel_scale
