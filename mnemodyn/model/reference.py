r"""Weights trained by the published draft: its names, and what it computes differently.

A network with ``compat="reference"`` computes as follows, because its weights were fitted so; no other network does.

- The scan lies on [0, 1) whatever its duration, one frame every 1 / T; the repetition time is not used.
- The first block's path, where it is a spline, is fitted at unit spacing but read on that finer grid: frame i reads
  the piece that ends in it, a fraction 1 / T after the start of the piece, so about the difference one frame earlier.
- The drive has no factor :math:`P^{-1/2}`.
- A path one sample longer than the next level loses its first sample; after the finest level nothing is cut.
- A level of odd length repeats its last sample, as elsewhere, but no gradient flows through the repetition.

With T frames, :math:`\delta_i = x_i - x_{i-1}` and :math:`\delta_0 = \delta_1`, the control is

.. math:: \text{linear: } T \delta_i, \qquad
          \text{spline: } \delta_{i-1} + (4 / T - 3 / T^2)\,(\delta_i - \delta_{i-1}).
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mnemodyn.model.operator import OperatorBlock
from mnemodyn.model.wavelet import dwt, idwt
from mnemodyn.settings import ModelConfig

__all__ = ["ReferenceBlock", "prediction_head", "read_settings", "read_weights"]

# The draft's names of settings, and ours.
REQUIRED = {
    "D": "n_parcels",
    "original_length": "n_timepoints",
    "dim_k": "n_channels",
    "dim_d": "input_width",
    "h_rank": "field_rank",
    "n_levels": "n_levels",
    "nb": "kernel_size",
    "num_sparse_LC": "n_segments",
    "K_dense": "n_dense_layers",
    "wave": "wavelet",
    "nonlinearity": "activation",
    "interpol": "interpolation",
}
# Off where they are not given, but for the biases.
SWITCHES = {
    "use_residual": "residual",
    "scale": "parcel_scale",
    "use_mRLoss": "multiresolution",
    "linear_bias": "linear_bias",
}
OTHERS = ("D_out", "num_layers", "predict", "num_classes", "duration")
# Stored by the draft, and without influence on what a network computes from a scaled scan.
WITHOUT_EFFECT: tuple[str, ...] = ("K_LC", "dense_rank", "LC_rank", "conv_bias", "masked_modelling")
WITHOUT_EFFECT += ("use_mixed_precision", "dataset_type", "storage", "seed", "exp", "subset")
WITHOUT_EFFECT += ("one_channel", "normalize", "loss_type", "huber_delta", "train_bs", "valid_bs")
WITHOUT_EFFECT += ("test_bs", "epoch", "lr", "model_pred_save_freq", "profile")
ACTIVATIONS = {"tanh": "tanh", "gelu": "gelu", "swish": "silu", "relu": "relu"}
LAYERS = {"tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


def read_settings(draft: Mapping) -> ModelConfig:
    """The configuration that settings under the draft's own names describe, with ``compat="reference"``.

    ``D``, ``dim_d``, ``dim_k`` and so on; those that a Lightning checkpoint keeps for its trainer may be among them.
    The number of blocks is ``num_layers`` or the length of ``D_out``. ValueError if a setting is unknown, missing or
    contradicts another, or asks for what is not supported here.
    """
    known = {*REQUIRED, *SWITCHES, *OTHERS, *WITHOUT_EFFECT}
    unknown = sorted(set(draft) - known, key=str)
    if unknown:
        raise ValueError(f"unknown draft settings {unknown}; known are {sorted(known)}")
    needed = set(REQUIRED)
    if draft.get("predict"):
        needed.add("num_classes")
    outputs = draft.get("D_out")
    n_blocks: Any = draft.get("num_layers")
    widths = [outputs]
    if isinstance(outputs, (list, tuple)):
        n_blocks = len(outputs)
        widths = list(outputs)
    if n_blocks is None:
        needed.add("num_layers")
    missing = sorted(needed - set(draft))
    if missing:
        raise ValueError(f"draft settings lack {missing}")
    if draft.get("num_layers", n_blocks) not in (None, n_blocks):
        raise ValueError(f"num_layers is {draft['num_layers']}, but D_out has {n_blocks} entries")
    if not set(widths) <= {None, draft["D"]}:
        raise ValueError(
            f"D_out must repeat D = {draft['D']}, got {outputs}; other outputs are not supported"
        )
    if draft.get("duration", 1) != 1:
        raise ValueError(f"duration must be 1, got {draft['duration']}")
    if draft["nonlinearity"] not in ACTIVATIONS:
        raise ValueError(
            f"nonlinearity must be one of {', '.join(ACTIVATIONS)}, got {draft['nonlinearity']!r}"
        )
    settings = {ours: draft[theirs] for theirs, ours in REQUIRED.items()}
    for theirs, ours in SWITCHES.items():
        settings[ours] = draft.get(theirs, theirs == "linear_bias")
    settings["activation"] = ACTIVATIONS[draft["nonlinearity"]]
    settings["n_classes"] = draft["num_classes"] if draft.get("predict") else 0
    return ModelConfig(compat="reference", lift=False, n_blocks=n_blocks, **settings)


def _names(config: ModelConfig) -> Iterator[tuple[str, str, int | None]]:
    """Name in the draft, name here, and the entry of the tensor here where the draft keeps several."""
    linear = {
        "input_projection": "field.input",
        "bottleneck": "field.bottleneck",
        "feature_expansion": "field.expansion",
        "output_projection": "output",
    }
    for block in range(config.n_blocks):
        there = f"layers.{block}"
        here = f"blocks.{block}"
        for part in ("weight", "bias"):
            if part == "weight" or config.linear_bias:
                for theirs, ours in linear.items():
                    yield f"{there}.{theirs}.{part}", f"{here}.{ours}.{part}", None
            for i in range(config.n_dense_layers):
                yield f"{there}.dense_layers.{i}.{part}", f"{here}.coarse.{part}", i
            for level in range(config.n_levels):
                yield f"{there}.conv_layers.{level}.0.{part}", f"{here}.banded.{level}.{part}", None
            if config.n_classes:
                for i in (0, 3):  # between them, the activation and the dropout
                    yield f"{there}.prediction_head.{i}.{part}", f"head.{i}.{part}", None
        if config.parcel_scale:
            yield f"{there}.channel_scales", f"{here}.parcel_scale", None


def read_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for `model`, a MnemoDyn with ``compat="reference"``, from one under the draft's names.

    With or without the prefix ``model.`` of a Lightning checkpoint. The draft stores its wavelet filters beside the
    weights; they follow from the settings and are left out. ValueError naming every weight that is missing, unknown or
    of another shape.
    """
    state = {
        name.removeprefix("model."): value
        for name, value in state.items()
        if ".wavelet_processor." not in name
    }
    config = cast(ModelConfig, model.config)
    shapes = model.state_dict()
    places = {}
    for theirs, ours, i in _names(config):
        places[theirs] = shapes[ours] if i is None else shapes[ours][i]
    wrong = []
    for name in sorted(places.keys() | state.keys()):
        expected, found = (
            tuple(part[name].shape) if name in part else "none" for part in (places, state)
        )
        if expected != found:
            wrong.append(f"{name}: expected {expected}, got {found}")
    if wrong:
        raise ValueError(f"draft weights do not fit their settings: {'; '.join(wrong)}")
    # Memory is taken only now that the shapes are known to be those of `state`.
    weights = {name: torch.zeros(value.shape) for name, value in shapes.items()}
    for theirs, ours, i in _names(config):
        place = weights[ours] if i is None else weights[ours][i]
        place.copy_(state[theirs])
    return weights


def prediction_head(config: ModelConfig) -> nn.Sequential:
    """The draft's head (batch, parcel) to (batch, class), read at the last frame."""
    return nn.Sequential(
        nn.Linear(config.n_parcels, 64),
        LAYERS[config.activation](),
        nn.Dropout(0.1),
        nn.Linear(64, config.n_classes),
    )


class ReferenceBlock(OperatorBlock):
    """An operator block with the draft's control and its way of bringing paths to the length of a level."""

    def __init__(self, config: ModelConfig, first: bool):
        super().__init__(config)
        self.interpolation = config.interpolation if first else "linear"

    def derivative(self, x: Tensor, t_r: object = None) -> Tensor:
        """Control (batch, time, parcel) of the path on [0, 1); `t_r` is not used."""
        n = x.shape[1]
        difference = x.diff(dim=1)
        if self.interpolation == "linear":
            return n * torch.cat([difference[:, :1], difference], dim=1)
        # The spline at unit spacing, read a fraction 1 / T into the piece before each frame.
        earlier = torch.cat([difference[:, :1], difference[:, :-1]], dim=1)
        later = earlier + (4 / n - 3 / n**2) * (difference - earlier)
        return torch.cat([difference[:, :1], later], dim=1)

    def analysis(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """One level down; no gradient flows through the repetition of the last sample."""
        if a.shape[-1] % 2:
            a = torch.cat([a, a[..., -1:].detach()], dim=-1)
        return dwt(a, self.config.wavelet)

    def synthesis(self, approximation: Tensor, detail: Tensor, length: int) -> Tensor:
        """One level up; a sample too many is cut on the left, and not at all after the finest level."""
        c = idwt(approximation, detail, self.config.wavelet)
        if length == self.config.n_timepoints:
            return c
        return c[..., c.shape[-1] - length :]
