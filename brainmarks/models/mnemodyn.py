"""MnemoDyn for Brainmarks, which finds this file through its namespace package ``brainmarks.models``.

    MNEMODYN_CHECKPOINT=NAME/MODEL python -m brainmarks.main_logistic mnemodyn patch abide_dx --overrides device=cpu

or ``--overrides model_kwargs.checkpoint=FOLDER``. The space follows from the checkpoint's number of parcels. Brainmarks
names no parcels, so that their order is taken to be that of its space: train on that order.
"""

import os

import torch
from brainmarks.models.base import Embeddings
from brainmarks.models.registry import register_model
from torch import Tensor, nn

from mnemodyn.checkpoint import Checkpoint, from_pretrained
from mnemodyn.data.scans import Scan

SPACES = {
    400: "schaefer400",
    424: "a424",
    450: "schaefer400_tians3",
    457: "schaefer400_tians3_buckner7",
}


class MnemoDynTransform:
    """From Brainmarks' z-scores back to the units of the scan, then the checkpoint's scaling."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.parcels = checkpoint.parcels or tuple(
            map(str, range(checkpoint.model.config.n_parcels))
        )

    def __call__(self, sample: dict) -> dict:
        values = (sample["bold"].float() * sample["std"] + sample["mean"]).numpy()
        scan = Scan("sub-brainmarks", values, float(sample["tr"]), self.parcels)
        return {**sample, "bold": torch.from_numpy(self.checkpoint.scaling(scan))}


class MnemoDynWrapper(nn.Module):
    """``patch``: the latents of every frame. ``cls``: their mean and standard deviation over time, one vector."""

    def __init__(self, checkpoint: Checkpoint, space: str | None):
        super().__init__()
        n_parcels = checkpoint.model.config.n_parcels
        if space is None and n_parcels not in SPACES:
            raise ValueError(
                f"the checkpoint reads {n_parcels} parcels, and Brainmarks has spaces of {sorted(SPACES)}; "
                "take a checkpoint of one of them, or name its space with model_kwargs.space"
            )
        self.__space__ = space or SPACES[n_parcels]
        self.model = checkpoint.model

    def forward(self, batch: dict[str, Tensor]) -> Embeddings:
        x = batch["bold"].float()
        with torch.autocast(x.device.type, enabled=False):
            latents = self.model(
                x, torch.as_tensor(batch["tr"], dtype=x.dtype, device=x.device)
            ).latents
        summary = torch.cat([latents.mean(1), latents.std(1)], dim=-1)
        return Embeddings(cls_embeds=summary[:, None], reg_embeds=None, patch_embeds=latents)


@register_model
def mnemodyn(
    checkpoint: str | None = None, space: str | None = None, **settings
) -> tuple[MnemoDynTransform, MnemoDynWrapper]:
    """The network of a checkpoint: a folder or ``NAME/MODEL``, by default that of ``MNEMODYN_CHECKPOINT``."""
    checkpoint = checkpoint or os.environ.get("MNEMODYN_CHECKPOINT")
    if not checkpoint:
        raise ValueError(
            "name a checkpoint: --overrides model_kwargs.checkpoint=FOLDER, or set MNEMODYN_CHECKPOINT"
        )
    loaded = from_pretrained(checkpoint, **settings)
    if loaded.scaling is None:
        raise ValueError(
            f"{checkpoint} does not know its scaling; publish it from a run of this package"
        )
    return MnemoDynTransform(loaded), MnemoDynWrapper(loaded, space)
