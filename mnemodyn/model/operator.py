"""One operator block: field, pyramid, coarse operator, banded operators, output."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.model.config import ModelConfig
from mnemodyn.model.control import control
from mnemodyn.model.kernels import NAMES, field_drive
from mnemodyn.model.wavelet import DB2, dwt, idwt, lattice, level_lengths

__all__ = ["ACTIVATIONS", "BandedOperator", "CoarseOperator", "Field", "OperatorBlock"]

ACTIVATIONS = {name: function for function, name in NAMES.items()}


class Field(nn.Module):
    r"""The low-rank vector field, contracted with the control.

    .. math:: z = \sigma(W_2 \sigma(W_1 x_t + b_1) + b_2), \quad H_t = \sigma(W_3 z + b_3), \quad
              v_t[k] = P^{-1/2} \sum_p H_t[p, k]\, \dot X_t[p].

    The factor keeps the drive at unit scale whatever the number of parcels. The published draft has none. Contracted
    with derivative and value, the field has 2P rows, those of the derivative first.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.n_channels = config.n_channels
        rows = config.n_parcels * (2 if config.control == "both" else 1)
        self.factor = rows**-0.5 if config.compat == "none" else 1.0
        bias = config.linear_bias
        self.input = nn.Linear(config.n_parcels, config.input_width, bias=bias)
        self.bottleneck = nn.Linear(config.input_width, config.field_rank, bias=bias)
        self.expansion = nn.Linear(config.field_rank, rows * config.n_channels, bias=bias)
        for layer in (self.input, self.bottleneck, self.expansion):
            nn.init.xavier_normal_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)
        # Uncorrelated entries of H: xavier would count P * K outputs and make the field all but vanish.
        nn.init.normal_(self.expansion.weight, std=config.field_rank**-0.5)

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        """Drive v (batch, time, channel) from x (batch, time, parcel) and the control (batch, time, row)."""
        z = self.activation(self.bottleneck(self.activation(self.input(x))))
        return (
            field_drive(z, control, self.expansion.weight, self.expansion.bias, self.activation)
            * self.factor
        )


class CoarseOperator(nn.Module):
    """Dense operators on the coarsest approximation: ``c[k] = act(c[k] @ M_i[k] + m_i[k])``, one matrix a channel.

    The matrices join `n` coarse samples, as many as a scan of ``n_timepoints`` has. A longer scan is treated in
    consecutive stretches of `n`, the last one aligned with the end; a shorter one as if it were followed by
    silence (the leading part of the matrix).
    """

    def __init__(self, n: int, config: ModelConfig):
        super().__init__()
        self.n = n
        self.activation = ACTIVATIONS[config.activation]
        shape = (config.n_dense_layers, config.n_channels, n, n)
        self.weight = nn.Parameter(torch.eye(n).expand(shape) + 0.1 * torch.randn(shape) * n**-0.5)
        self.bias = nn.Parameter(torch.zeros(shape[:-1]))

    def _stretch(self, c: Tensor) -> Tensor:
        m = c.shape[-1]
        for weight, bias in zip(self.weight, self.bias, strict=True):
            # (channel, batch, m) @ (channel, m, n): one batched product for all channels.
            c = self.activation(torch.baddbmm(bias[:, None, :m], c, weight[:, :m, :m]))
        return c

    def forward(self, c: Tensor) -> Tensor:
        """Coefficients (batch, channel, m) to the same shape."""
        m, n, c = c.shape[-1], self.n, c.transpose(0, 1)
        if m <= n:
            return self._stretch(c).transpose(0, 1)
        whole = m // n * n
        parts = [self._stretch(part) for part in c[..., :whole].split(n, dim=-1)]
        if whole < m:
            parts.append(self._stretch(c[..., m - n :])[..., whole - m :])
        return torch.cat(parts, dim=-1).transpose(0, 1)


class BandedOperator(nn.Module):
    """Convolution 2K -> 2K at one level of the pyramid, with its own kernel in each segment of time.

    A segment has ``ceil(n / n_segments)`` samples, n the level's length in a scan of ``n_timepoints``, and zeros beyond
    its edges. In a scan of another length segments keep their length, and the operators repeat in turn.

    With ``banded="depthwise"`` the kernel has two factors: each channel's own over time, then one matrix 2K -> 2K.
    About `kernel_size` times fewer weights and operations. Not in the published network.
    """

    def __init__(self, n: int, config: ModelConfig):
        super().__init__()
        self.n_segments = s = config.n_segments
        self.segment = math.ceil(n / s)
        self.activation = ACTIVATIONS[config.activation]
        k2, width, pass_on = (
            2 * config.n_channels,
            config.kernel_size,
            torch.arange(config.n_channels),
        )
        # Details pass, approximations are left to c, which carries them already: the fresh pyramid inverts itself.
        if config.banded == "full":
            weight = torch.randn(s, k2, k2, width) * (0.1 / math.sqrt(k2 * width))
            weight[:, pass_on, pass_on, width // 2] += 1
            self.weight = nn.Parameter(weight)
        else:
            kernel = torch.randn(s, k2, width) * (0.1 / math.sqrt(width))
            kernel[..., width // 2] += 1
            mixing = torch.randn(s, k2, k2) * (0.1 / math.sqrt(k2))
            mixing[:, pass_on, pass_on] += 1
            self.kernel, self.mixing = nn.Parameter(kernel), nn.Parameter(mixing)
        self.bias = nn.Parameter(torch.zeros(s, k2))

    def _within(self, u: Tensor) -> Tensor:
        """Each segment's operator on (segment, 2K, run, sample)."""
        if hasattr(self, "kernel"):
            width, length = self.kernel.shape[-1], u.shape[-1]
            u = functional.pad(u, (width // 2, width // 2))
            first, *others = (
                u[..., i : i + length] * self.kernel[..., i, None, None] for i in range(width)
            )
            u = sum(others, first)
            return torch.baddbmm(self.bias[..., None], self.mixing, u.flatten(2)).view(u.shape)
        half = self.weight.shape[-1] // 2
        if self.n_segments == 1:
            u = functional.conv1d(u[0].transpose(0, 1), self.weight[0], self.bias[0], padding=half)
            return u.transpose(0, 1)[None]
        # A grouped convolution is up to twice as slow as one batched product where 2K is no multiple of 16, as in
        # the published 600, and about as fast elsewhere: see benchmarks/banded.py.
        taps = functional.pad(u, (half, half)).unfold(-1, 2 * half + 1, 1)
        taps = taps.permute(0, 1, 4, 2, 3).reshape(self.n_segments, self.weight[0, 0].numel(), -1)
        return torch.baddbmm(self.bias[..., None], self.weight.flatten(2), taps).view(u.shape)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, 2K, n) to the same shape."""
        batch, k2, n = u.shape
        s = self.n_segments
        length = min(self.segment, n) if s == 1 else self.segment
        turns = math.ceil(n / (s * length))
        u = functional.pad(u, (0, turns * s * length - n)).view(batch, k2, turns, s, length)
        u = self._within(u.permute(3, 1, 0, 2, 4).reshape(s, k2, batch * turns, length))
        u = u.reshape(s, k2, batch, turns, length).permute(2, 1, 3, 0, 4).reshape(batch, k2, -1)
        return self.activation(u[..., :n])


class OperatorBlock(nn.Module):
    """Path in, path out: the drive goes through the operators on its wavelet pyramid and is read out per parcel."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        k, p = config.n_channels, config.n_parcels
        lengths = level_lengths(config.n_timepoints, config.n_levels)
        self.field = Field(config)
        self.lift = nn.Linear(2 * p, k) if config.lift else None
        self.coarse = CoarseOperator(lengths[-1], config)
        self.banded = nn.ModuleList(BandedOperator(n, config) for n in lengths[1:])
        self.output = nn.Linear(k, p, bias=config.linear_bias)
        if self.lift is not None:
            # The mask's half starts at zero: at first nothing is said about what is hidden.
            nn.init.normal_(self.lift.weight[:, :p], std=p**-0.5)
            nn.init.zeros_(self.lift.weight[:, p:])
            nn.init.zeros_(self.lift.bias)
        # Behind a front end a fresh block changes nothing.
        nn.init.normal_(self.output.weight, std=0.1 * k**-0.5 if config.front == "none" else 0.0)
        if config.linear_bias:
            nn.init.zeros_(self.output.bias)
        self.parcel_scale = nn.Parameter(torch.ones(p)) if config.parcel_scale else None
        self.angles = nn.Parameter(torch.tensor(DB2)) if config.wavelet == "learned" else None

    @property
    def wavelet(self) -> str | Tensor:
        """Name of the wavelet, or its filter h where that is learned."""
        return self.config.wavelet if self.angles is None else lattice(self.angles)

    def derivative(self, x: Tensor, t_r: float | Tensor) -> Tensor:
        """Derivative (batch, time, parcel) of the block's own input."""
        return control(x, t_r)

    def control(self, x: Tensor, t_r: float | Tensor, derivative: Tensor | None = None) -> Tensor:
        """What the field is contracted with, (batch, time, row); `derivative` where it is known already."""
        kind = self.config.control
        if kind in ("value", "none"):
            return x if kind == "value" else torch.zeros_like(x)
        if derivative is None:
            derivative = self.derivative(x, t_r)
        return derivative if kind == "derivative" else torch.cat([derivative, x], dim=-1)

    def analysis(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """One level down: approximation and detail."""
        return dwt(a, self.wavelet)

    def synthesis(self, approximation: Tensor, detail: Tensor, length: int) -> Tensor:
        """One level up: c at the next finer level, of `length` samples."""
        return idwt(approximation, detail, self.wavelet, length)

    def forward(
        self, x: Tensor, t_r: float | Tensor, visible: Tensor, derivative: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output (batch, time, parcel), latents (batch, time, channel), and the multi-resolution loss.

        `x` is the block's input and `visible` 1.0 where the scan was seen, both (batch, time, parcel); `t_r` is in
        seconds, and `derivative` given where the path was fitted around censored frames.
        """
        v = self.field(x, self.control(x, t_r, derivative))
        if self.lift is not None:
            v = v + self.lift(torch.cat([x, visible], dim=-1))
        c, loss = self.pyramid(v.transpose(1, 2))
        latents = c.transpose(1, 2)
        y = self.output(latents)
        return y if self.parcel_scale is None else y * self.parcel_scale, latents, loss

    def pyramid(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """The operators between the transform of v (batch, channel, time) and its inverse."""
        a, levels, loss = v, [], v.new_zeros(()) if self.config.multiresolution else None
        for banded in self.banded:
            n, (a, d) = a.shape[-1], self.analysis(a)
            levels.append((banded, n, a, d))
        c = self.coarse(a)
        for banded, n, a, d in reversed(levels):
            if loss is not None:
                loss = loss + functional.mse_loss(c, a)
            detail, approximation = banded(torch.cat([d, a], dim=1)).chunk(2, dim=1)
            c = self.synthesis(approximation + c, detail, n)
        return c, loss
