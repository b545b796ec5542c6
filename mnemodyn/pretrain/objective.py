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
    share_spread : float
        In training the share of each window is drawn evenly from ``hidden_share - share_spread`` to
        ``hidden_share + share_spread``, so that the network learns to use what it is given. Validation and
        evaluation hide `hidden_share`.
    multiresolution_weight : float
        Weight of the multi-resolution loss, where the network computes it.
    """

    hidden_share: float = 0.55
    mask_window: int = 15
    share_spread: float = 0.0
    multiresolution_weight: float = 1.0

    def __post_init__(self):
        if not 0 < self.hidden_share - self.share_spread <= self.hidden_share + self.share_spread < 1:
            raise ValueError(
                "hidden_share must lie between 0 and 1, share_spread (>= 0) included; got "
                f"{self.hidden_share} and {self.share_spread}"
            )

    def hide(self, shape: tuple[int, int, int], seed: int, *, training: bool = False) -> Tensor:
        """The mask of one seed: bool, shape (batch, time, parcel), True where hidden."""
        generator = torch.Generator().manual_seed(seed)
        share = self.hidden_share
        if training:
            share += self.share_spread * (2 * torch.rand((), generator=generator).item() - 1)
        return hide_stretches(shape, share=share, window=self.mask_window, generator=generator)

    def loss(self, output: Output, x: Tensor, hidden: Tensor) -> Tensor:
        """Scalar loss of an output for scaled scans `x` (batch, time, parcel), of which `hidden` was not seen."""
        loss = functional.mse_loss(output.reconstruction[hidden], x[hidden])
        if output.multiresolution_loss is not None:
            loss = loss + self.multiresolution_weight * output.multiresolution_loss
        return loss

    def to_dict(self) -> dict:
        return asdict(self)
