"""The stack of operator blocks."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnemodyn.model.config import ModelConfig
from mnemodyn.model.operator import OperatorBlock

__all__ = ["MnemoDyn", "Output"]


class Output(NamedTuple):
    """What a network returns.

    Attributes
    ----------
    reconstruction : Tensor, shape (batch, time, parcel)
        The scan as the network has it, hidden entries filled, in the units of its input.
    latents : Tensor, shape (batch, time, channel)
        The last block's path after its operators, before the read-out to parcels.
    multiresolution_loss : Tensor or None
        Sum over levels and blocks, where the configuration asks for it.
    """

    reconstruction: Tensor
    latents: Tensor
    multiresolution_loss: Tensor | None


class MnemoDyn(nn.Module):
    r"""Wavelet operator driven by the scan's own path.

    The stream starts as the visible scan, zero where it is hidden. Each block reads the stream, its derivative per
    second and what was visible, and (``residual``) adds its output to the stream; the stream after the last block
    is the reconstruction. Source: Pal et al., ICLR 2026.

    Notes
    -----
    **Other lengths.** A network takes any number of frames >= 2, though some of its weights belong to the
    ``n_timepoints`` it was trained on. The field, the lift, the wavelets and the output act frame by frame or by
    convolution and do not know T. The coarse operator joins ``ceil(n_timepoints / 2**n_levels)`` coarse samples: a
    longer scan is treated in consecutive stretches of that many, a shorter one by the leading part of the matrix.
    Segments keep their length in frames, and their kernels repeat in turn. So the work grows linearly with T, and
    a long scan is treated as its windows are, but for what the transform carries across their edges.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(OperatorBlock(config) for _ in range(config.n_blocks))

    def forward(self, x: Tensor, t_r: float | Tensor, *, hidden: Tensor | None = None) -> Output:
        """Reconstruct scans.

        Parameters
        ----------
        x : Tensor, shape (batch, time, parcel)
            Scaled scans.
        t_r : float or Tensor of shape (batch,)
            Repetition time in seconds.
        hidden : Tensor of bool, shape (batch, time, parcel), optional
            True where the value must not be read; whatever stands there (NaN too) has no influence.

        Returns
        -------
        Output

        Raises
        ------
        ValueError
            If shapes do not fit the configuration or each other.
        """
        if x.ndim != 3 or x.shape[-1] != self.config.n_parcels:
            raise ValueError(f"x must have shape (batch, time, {self.config.n_parcels} parcels), got {tuple(x.shape)}")
        if hidden is None:
            visible = torch.ones_like(x)
        elif hidden.shape != x.shape or hidden.dtype != torch.bool:
            raise ValueError(
                f"hidden must be bool with the shape of x {tuple(x.shape)}, got {hidden.dtype} {tuple(hidden.shape)}"
            )
        else:
            x = x.masked_fill(hidden, 0)
            visible = (~hidden).to(x.dtype)
        total = x.new_zeros(()) if self.config.multiresolution else None
        latents = x
        for block in self.blocks:
            y, latents, loss = block(x, t_r, visible)
            x = x + y if self.config.residual else y
            if total is not None:
                total = total + loss
        return Output(x, latents, total)
