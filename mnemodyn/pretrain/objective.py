"""The masked objective: fill what was hidden, and be judged on that alone."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mnemodyn.model.network import Output
from mnemodyn.pretrain.masking import hide_stretches

__all__ = ["Masked"]


@dataclass(frozen=True)
class Masked:
    """Hide stretches of each parcel; the loss is the mean squared error over hidden entries only.

    Attributes
    ----------
    hidden_share : float
        Share of each parcel's frames that is hidden, between 0 and 1.
    mask_window : int
        Length of a hidden window in frames.
    multiresolution_weight : float
        Weight of the multi-resolution loss, where the network computes it.
    """

    hidden_share: float = 0.55
    mask_window: int = 15
    multiresolution_weight: float = 1.0

    def hide(self, shape: tuple[int, int, int], seed: int) -> Tensor:
        """The mask of one seed: bool, shape (batch, time, parcel), True where hidden."""
        generator = torch.Generator().manual_seed(seed)
        return hide_stretches(shape, share=self.hidden_share, window=self.mask_window, generator=generator)

    def loss(self, output: Output, x: Tensor, hidden: Tensor) -> Tensor:
        """Scalar loss of an output for scaled scans `x` (batch, time, parcel), of which `hidden` was not seen."""
        loss = functional.mse_loss(output.reconstruction[hidden], x[hidden])
        if output.multiresolution_loss is not None:
            loss = loss + self.multiresolution_weight * output.multiresolution_loss
        return loss

    def to_dict(self) -> dict:
        return asdict(self)
