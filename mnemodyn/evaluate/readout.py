"""Frozen read-outs: one vector a scan (or window) from what the network computes on it."""

from collections.abc import Callable

import numpy as np
import torch

from mnemodyn.model.network import MnemoDyn
from mnemodyn.model.wavelet import wavedec

__all__ = ["READOUTS", "readout"]


def _scale_energy(latents: torch.Tensor, model: MnemoDyn) -> torch.Tensor:
    coefficients = wavedec(latents.T[None], model.config.wavelet, model.config.n_levels)
    return torch.stack([c[0].square().mean(-1).clamp_min(1e-12).log() for c in coefficients]).flatten()


def _correlation(latents: torch.Tensor, _: MnemoDyn) -> torch.Tensor:
    channels = torch.triu_indices(latents.shape[1], latents.shape[1], 1)
    r = torch.corrcoef(latents.T)[channels[0], channels[1]]
    return torch.atanh(torch.nan_to_num(r).clamp(-0.999999, 0.999999))


READOUTS: dict[str, Callable[[torch.Tensor, MnemoDyn], torch.Tensor]] = {
    "latent_mean": lambda latents, _: latents.mean(0),
    "latent_sd": lambda latents, _: latents.std(0),
    "latent_max": lambda latents, _: latents.amax(0),
    "scale_energy": _scale_energy,
    "latent_correlation": _correlation,
}


@torch.no_grad()
def readout(model: MnemoDyn, x: np.ndarray, t_r: float, name: str) -> np.ndarray:
    """Read one vector out of a frozen network.

    Parameters
    ----------
    model : MnemoDyn
        In evaluation mode.
    x : ndarray, shape (time, parcel)
        Scaled values; nothing is hidden.
    t_r : float
        Repetition time in seconds.
    name : str
        ``latent_mean``, ``latent_sd``, ``latent_max``: over time, one value a channel of the last block's latents.
        ``scale_energy``: log mean square of their wavelet coefficients, one a level and channel.
        ``latent_correlation``: Fisher-z correlations between channels.

    Returns
    -------
    ndarray, shape (feature,), float64
    """
    if name not in READOUTS:
        raise ValueError(f"read-out must be one of {tuple(READOUTS)}, got {name!r}")
    parameter = next(model.parameters())
    latents = model(torch.as_tensor(x[None]).to(parameter), t_r).latents[0]
    return READOUTS[name](latents.double(), model).cpu().numpy()
