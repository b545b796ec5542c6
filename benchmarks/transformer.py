"""A transformer over patches of parcels and frames, the design of other models of such scans."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class PatchTransformer(nn.Module):
    """Tokens are patches of neighbouring parcels and frames, and of what is visible; every token attends to all.

    A scan is padded with zeros to whole patches of `parcel_patch` parcels and `time_patch` frames; `n_heads` divides
    the `width` of a token.
    """

    def __init__(
        self,
        n_parcels: int,
        n_timepoints: int,
        *,
        width: int,
        n_layers: int,
        n_heads: int = 4,
        parcel_patch: int = 10,
        time_patch: int = 16,
    ):
        super().__init__()
        self.patch = (time_patch, parcel_patch)
        self.grid = (-(-n_timepoints // time_patch), -(-n_parcels // parcel_patch))
        entries = time_patch * parcel_patch
        self.embedding = nn.Linear(2 * entries, width)
        self.position = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], width))
        layer = nn.TransformerEncoderLayer(
            width,
            n_heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, entries)

    def forward(self, x: Tensor, t_r: float, *, hidden: Tensor | None = None) -> Tensor:
        """Scans (batch, time, parcel), and where not to read them, to the same shape; `t_r` is not used."""
        batch, time, parcel = x.shape
        n, m = self.grid
        a, b = self.patch
        visible = torch.ones_like(x)
        if hidden is not None:
            visible = (~hidden).to(x.dtype)
            x = x.masked_fill(hidden, 0)
        seen = functional.pad(torch.stack([x, visible]), (0, m * b - parcel, 0, n * a - time))
        patches = seen.view(2, batch, n, a, m, b).permute(1, 2, 4, 0, 3, 5)
        tokens = self.embedding(patches.reshape(batch, n * m, 2 * a * b)) + self.position
        values = self.output(self.encoder(tokens))
        x = values.view(batch, n, m, a, b).transpose(2, 3).reshape(batch, n * a, m * b)
        return x[:, :time, :parcel]
