"""One operator block: field, wavelet pyramid, coarse operator, banded operators, output."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.model.control import path_derivative
from mnemodyn.model.kernels import ACTIVATIONS, field_drive
from mnemodyn.model.wavelet import DB2, dwt, filters_of, idwt, lattice, level_lengths
from mnemodyn.settings import ModelConfig

__all__ = ["BandedOperator", "CoarseOperator", "Field", "OperatorBlock"]


class Field(nn.Module):
    r"""The low-rank vector field, contracted with the control.

    .. math:: z = \sigma(W_2 \sigma(W_1 x_t + b_1) + b_2), \quad H_t = \sigma(W_3 z + b_3), \quad
              v_t[k] = P^{-1/2} \sum_p H_t[p, k]\, \dot X_t[p].

    The factor keeps the drive at unit scale whatever the number of parcels. The published draft has none. Where the
    control is derivative and value, the field has 2P rows, those of the derivative first.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        # The kernels know activations by name.
        self.activation_name = config.activation
        rows = config.n_parcels
        if config.control == "both":
            rows = 2 * config.n_parcels
        self.factor = rows**-0.5 if config.compat == "none" else 1.0
        bias = config.linear_bias
        self.input = nn.Linear(config.n_parcels, config.input_width, bias=bias)
        self.bottleneck = nn.Linear(config.input_width, config.field_rank, bias=bias)
        self.expansion = nn.Linear(config.field_rank, rows * config.n_channels, bias=bias)
        for layer in (self.input, self.bottleneck, self.expansion):
            if config.activation == "relu":
                # As the draft initialises: ReLU halves the second moment, a gain of 2 restores it.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.xavier_normal_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)
        if config.activation != "relu":
            # The variance depends on the inputs alone. Xavier would also count the P * K outputs,
            # and the field would all but vanish.
            nn.init.normal_(self.expansion.weight, std=config.field_rank**-0.5)

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        """Drive v (batch, time, channel) from x (batch, time, parcel) and the control (batch, time, row)."""
        z = self.activation(self.bottleneck(self.activation(self.input(x))))
        weight, bias = self.expansion.weight, self.expansion.bias
        return field_drive(z, control, weight, bias, self.activation_name) * self.factor


class CoarseOperator(nn.Module):
    """Dense operators on the coarsest approximation: ``c[k] = act(c[k] @ M_i[k] + m_i[k])``, one matrix a channel.

    The matrices join `n` coarse samples, as many as a scan of ``n_timepoints`` has. A longer scan is treated in
    consecutive stretches of `n`, the last one aligned with the end. A shorter one is treated as if zeros followed it,
    which is the leading part of the matrix.
    """

    def __init__(self, n: int, config: ModelConfig):
        super().__init__()
        self.n = n
        self.activation = ACTIVATIONS[config.activation]
        shape = (config.n_dense_layers, config.n_channels, n, n)
        # Close to the identity: a fresh operator passes the approximation on.
        self.weight = nn.Parameter(torch.eye(n).expand(shape) + 0.1 * torch.randn(shape) * n**-0.5)
        self.bias = nn.Parameter(torch.zeros(shape[:-1]))

    def _stretch(self, c: Tensor) -> Tensor:
        """One stretch (channel, batch, m <= n) through all layers."""
        m = c.shape[-1]
        for weight, bias in zip(self.weight, self.bias, strict=True):
            # (channel, batch, m) @ (channel, m, m): one batched product for all channels.
            c = self.activation(torch.baddbmm(bias[:, None, :m], c, weight[:, :m, :m]))
        return c

    def forward(self, c: Tensor) -> Tensor:
        """Coefficients (batch, channel, m) to the same shape."""
        c = c.transpose(0, 1)
        m = c.shape[-1]
        if m <= self.n:
            return self._stretch(c).transpose(0, 1)
        # Stretches of n, and the last n samples for what remains.
        whole = m // self.n * self.n
        parts = [self._stretch(part) for part in c[..., :whole].split(self.n, dim=-1)]
        if whole < m:
            last = self._stretch(c[..., m - self.n :])
            parts.append(last[..., whole - m :])
        return torch.cat(parts, dim=-1).transpose(0, 1)


class BandedOperator(nn.Module):
    """Convolution 2K -> 2K at one level of the pyramid, with its own kernel in each segment of time.

    A segment has ``ceil(n / n_segments)`` samples, n the level's length in a scan of ``n_timepoints``, and zeros beyond
    its edges. In a scan of another length the segments keep their length, and the operators repeat in turn.

    With ``banded="depthwise"`` the kernel has two factors: a kernel over time for each channel, then one matrix
    2K -> 2K. It has about `kernel_size` times fewer weights and operations. Not in the published network.
    """

    def __init__(self, n: int, config: ModelConfig):
        super().__init__()
        self.n_segments = config.n_segments
        self.segment = math.ceil(n / config.n_segments)
        self.activation = ACTIVATIONS[config.activation]
        self.depthwise = config.banded == "depthwise"
        s = config.n_segments
        k2 = 2 * config.n_channels
        width = config.kernel_size
        # A fresh operator passes on the details, its first K channels, and not the approximations:
        # those are added by c, so that the fresh pyramid is close to the identity.
        details = torch.arange(config.n_channels)
        if self.depthwise:
            kernel = torch.randn(s, k2, width) * (0.1 / math.sqrt(width))
            kernel[..., width // 2] += 1
            mixing = torch.randn(s, k2, k2) * (0.1 / math.sqrt(k2))
            mixing[:, details, details] += 1
            self.kernel = nn.Parameter(kernel)
            self.mixing = nn.Parameter(mixing)
        else:
            weight = torch.randn(s, k2, k2, width) * (0.1 / math.sqrt(k2 * width))
            weight[:, details, details, width // 2] += 1
            self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(s, k2))

    def _depthwise(self, u: Tensor) -> Tensor:
        """Each segment's two factors on (segment, 2K, run, sample)."""
        width = self.kernel.shape[-1]
        length = u.shape[-1]
        padded = functional.pad(u, (width // 2, width // 2))
        total = padded[..., :length] * self.kernel[..., 0, None, None]
        for i in range(1, width):
            total = total + padded[..., i : i + length] * self.kernel[..., i, None, None]
        return torch.baddbmm(self.bias[..., None], self.mixing, total.flatten(2)).view(u.shape)

    def _full(self, u: Tensor) -> Tensor:
        """Each segment's convolution on (segment, 2K, run, sample)."""
        width = self.weight.shape[-1]
        half = width // 2
        if self.n_segments == 1:
            u = functional.conv1d(u[0].transpose(0, 1), self.weight[0], self.bias[0], padding=half)
            return u.transpose(0, 1)[None]
        # Every sample beside its neighbours, so that one batched product treats all segments.
        taps = functional.pad(u, (half, half)).unfold(-1, width, 1)
        taps = taps.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
        return torch.baddbmm(self.bias[..., None], self.weight.flatten(2), taps).view(u.shape)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, 2K, n) to the same shape."""
        batch, k2, n = u.shape
        s = self.n_segments
        length = self.segment
        if s == 1:  # no zeros where a scan is shorter than the only segment
            length = min(self.segment, n)
        # Segments of one turn through the operators, and turns, are axes of their own.
        turns = math.ceil(n / (s * length))
        u = functional.pad(u, (0, turns * s * length - n)).view(batch, k2, turns, s, length)
        u = u.permute(3, 1, 0, 2, 4).reshape(s, k2, batch * turns, length)
        u = self._depthwise(u) if self.depthwise else self._full(u)
        u = u.reshape(s, k2, batch, turns, length).permute(2, 1, 3, 0, 4).reshape(batch, k2, -1)
        return self.activation(u[..., :n])


class OperatorBlock(nn.Module):
    """Path in, path out: the drive goes through the operators on its wavelet pyramid and is read out per parcel."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        k = config.n_channels
        p = config.n_parcels
        lengths = level_lengths(config.n_timepoints, config.n_levels)
        self.field = Field(config)
        self.lift = nn.Linear(2 * p, k) if config.lift else None
        self.coarse = CoarseOperator(lengths[-1], config)
        self.banded = nn.ModuleList(BandedOperator(n, config) for n in lengths[1:])
        self.output = nn.Linear(k, p, bias=config.linear_bias)
        if self.lift is not None:
            # The half that reads the mask starts at zero: at first a mask has no effect.
            nn.init.normal_(self.lift.weight[:, :p], std=p**-0.5)
            nn.init.zeros_(self.lift.weight[:, p:])
            nn.init.zeros_(self.lift.bias)
        # Behind a front end a fresh block changes nothing.
        output_sd = 0.1 * k**-0.5 if config.front == "none" else 0.0
        nn.init.normal_(self.output.weight, std=output_sd)
        if config.linear_bias:
            nn.init.zeros_(self.output.bias)
        self.parcel_scale = nn.Parameter(torch.ones(p)) if config.parcel_scale else None
        self.angles = None
        if config.wavelet == "learned":
            self.angles = nn.Parameter(torch.tensor(DB2))
        else:
            filters_of(config.wavelet)  # an unknown name is refused at once

    @property
    def wavelet(self) -> str | Tensor:
        """Name of the wavelet, or its filter h where that is learned."""
        if self.angles is None:
            return self.config.wavelet
        return lattice(self.angles)

    def derivative(self, x: Tensor, t_r: float | Tensor) -> Tensor:
        """Derivative (batch, time, parcel) of the block's own input."""
        return path_derivative(x, t_r)

    def control(self, x: Tensor, t_r: float | Tensor, derivative: Tensor | None = None) -> Tensor:
        """What the field is contracted with, (batch, time, row); `derivative` where it is known already."""
        kind = self.config.control
        if kind == "none":
            return torch.zeros_like(x)
        if kind == "value":
            return x
        if derivative is None:
            derivative = self.derivative(x, t_r)
        if kind == "both":
            return torch.cat([derivative, x], dim=-1)
        return derivative

    def analysis(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """One level down: approximation and detail."""
        return dwt(a, self.wavelet)

    def synthesis(self, approximation: Tensor, detail: Tensor, length: int) -> Tensor:
        """One level up: the path c at the next finer level, of `length` samples."""
        return idwt(approximation, detail, self.wavelet, length)

    def forward(
        self, x: Tensor, t_r: float | Tensor, visible: Tensor, derivative: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output (batch, time, parcel), latents (batch, time, channel), and the multi-resolution loss.

        `x` is the block's input and `visible` 1.0 where the scan was seen, both (batch, time, parcel); `t_r` is in
        seconds. `derivative` is given where the path was fitted around censored frames.
        """
        v = self.field(x, self.control(x, t_r, derivative))
        if self.lift is not None:
            v = v + self.lift(torch.cat([x, visible], dim=-1))
        c, loss = self.pyramid(v.transpose(1, 2))
        latents = c.transpose(1, 2)
        y = self.output(latents)
        if self.parcel_scale is not None:
            y = y * self.parcel_scale
        return y, latents, loss

    def pyramid(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """The operators between the transform of v (batch, channel, time) and its inverse."""
        lengths = []
        approximations = []
        details = []
        a = v
        for _ in self.banded:
            lengths.append(a.shape[-1])
            a, d = self.analysis(a)
            approximations.append(a)
            details.append(d)
        loss = v.new_zeros(()) if self.config.multiresolution else None
        c = self.coarse(a)
        for level in reversed(range(len(self.banded))):
            a = approximations[level]
            if loss is not None:
                # At every level the path should be the drive's own approximation.
                loss = loss + functional.mse_loss(c, a)
            u = self.banded[level](torch.cat([details[level], a], dim=1))
            detail, approximation = u.chunk(2, dim=1)
            c = self.synthesis(approximation + c, detail, lengths[level])
        return c, loss
