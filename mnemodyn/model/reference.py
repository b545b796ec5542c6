r"""Weights trained by the published draft: its names, its files, and what it computes differently.

A network with ``compat="reference"`` keeps these habits, because its weights were fitted to them; no other does.

- The scan lies on [0, 1) whatever its duration, one frame every 1 / T; the repetition time is not used.
- The first block's path, where it is a spline, is fitted at unit spacing and read on that finer grid: frame i sees
  the piece that ends in it a fraction 1 / T after its start, hence about the difference one frame earlier.
- The drive has no factor :math:`P^{-1/2}`.
- A path one sample longer than the next level loses its first sample; after the finest level nothing is cut.
- A level of odd length repeats its last sample, as everywhere, but no gradient flows through the repetition.

With T frames, :math:`\delta_i = x_i - x_{i-1}` and :math:`\delta_0 = \delta_1`, the control is

.. math:: \text{linear: } T \delta_i, \qquad
          \text{spline: } \delta_{i-1} + (4 / T - 3 / T^2)\,(\delta_i - \delta_{i-1}).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pywt
import torch
from torch import Tensor, nn

from mnemodyn.model.config import ModelConfig
from mnemodyn.model.operator import OperatorBlock
from mnemodyn.model.wavelet import dwt, idwt
from mnemodyn.parameters import read_yaml

__all__ = [
    "ReferenceBlock",
    "misfits",
    "prediction_head",
    "read_lightning",
    "read_settings",
    "read_weights",
]

REQUIRED = {
    "D": "n_parcels",
    "original_length": "n_timepoints",
    "dim_k": "n_channels",
    "dim_d": "input_width",
}
REQUIRED |= {
    "h_rank": "field_rank",
    "n_levels": "n_levels",
    "nb": "kernel_size",
    "num_sparse_LC": "n_segments",
}
REQUIRED |= {
    "K_dense": "n_dense_layers",
    "wave": "wavelet",
    "nonlinearity": "activation",
    "interpol": "interpolation",
}
SWITCHES = {"use_residual": "residual", "scale": "parcel_scale", "use_mRLoss": "multiresolution"}
SWITCHES |= {"linear_bias": "linear_bias"}
OTHERS = {"D_out", "num_layers", "predict", "num_classes", "duration"}
# Stored by the draft, and without influence on what a network computes from a scaled scan.
WITHOUT_EFFECT = {
    *("K_LC", "dense_rank", "LC_rank", "conv_bias", "masked_modelling", "use_mixed_precision"),
    *(
        "dataset_type",
        "storage",
        "seed",
        "exp",
        "subset",
        "one_channel",
        "normalize",
        "loss_type",
        "huber_delta",
    ),
    *("train_bs", "valid_bs", "test_bs", "epoch", "lr", "model_pred_save_freq", "profile"),
}
ACTIVATIONS = {"tanh": "tanh", "gelu": "gelu", "swish": "silu"}


def read_settings(draft: Mapping) -> ModelConfig:
    """The configuration that settings under the draft's own names describe, with ``compat="reference"``.

    ``D``, ``dim_d``, ``dim_k`` and so on; those that a Lightning checkpoint keeps for its trainer may be among them.
    The number of blocks is ``num_layers`` or the length of ``D_out``. ValueError if a setting is unknown, missing or
    contradicts another, or asks for what is not supported here.
    """
    known = {*REQUIRED, *SWITCHES, *OTHERS, *WITHOUT_EFFECT}
    if unknown := sorted(set(draft) - known, key=str):
        raise ValueError(f"unknown draft settings {unknown}; known are {sorted(known)}")
    outputs, n_blocks, predict = (
        draft.get("D_out"),
        draft.get("num_layers"),
        draft.get("predict", False),
    )
    if isinstance(outputs, (list, tuple)):
        if n_blocks not in (None, len(outputs)):
            raise ValueError(f"num_layers is {n_blocks}, but D_out has {len(outputs)} entries")
        n_blocks = len(outputs)
    missing = sorted(set(REQUIRED) - set(draft)) + ["num_layers"] * (n_blocks is None)
    if missing := missing + ["num_classes"] * bool(predict and "num_classes" not in draft):
        raise ValueError(f"draft settings lack {missing}")
    if not {None, draft["D"]}.issuperset(
        outputs if isinstance(outputs, (list, tuple)) else [outputs]
    ):
        raise ValueError(
            f"D_out must repeat D = {draft['D']}, got {outputs}; other outputs are not supported"
        )
    allowed: dict[str, tuple] = {
        "duration": (1,),
        "nonlinearity": tuple(ACTIVATIONS),
        "interpol": ("spline", "linear"),
    }
    for name, options in allowed.items():
        if (given := draft.get(name, 1)) not in options:
            listed = (
                " or ".join(map(str, options))
                if len(options) < 3
                else f"one of {', '.join(options)}"
            )
            raise ValueError(f"{name} must be {listed}, got {given!r}")
    settings = {ours: draft[theirs] for theirs, ours in REQUIRED.items()}
    settings |= {
        ours: draft.get(theirs, theirs == "linear_bias") for theirs, ours in SWITCHES.items()
    }
    settings |= {"activation": ACTIVATIONS[draft["nonlinearity"]], "n_blocks": n_blocks}
    return ModelConfig(
        compat="reference", lift=False, n_classes=draft["num_classes"] if predict else 0, **settings
    )


def _names(config: ModelConfig) -> Iterator[tuple[str, str, int | None]]:
    """Name in the draft, name here, and the entry of the tensor here where the draft keeps several."""
    linear = {"input_projection": "field.input", "bottleneck": "field.bottleneck"}
    linear |= {"feature_expansion": "field.expansion", "output_projection": "output"}
    both = ("weight", "bias")
    for b in range(config.n_blocks):
        there, here = f"layers.{b}", f"blocks.{b}"
        for theirs, ours in linear.items():
            for part in both[: 1 + config.linear_bias]:
                yield f"{there}.{theirs}.{part}", f"{here}.{ours}.{part}", None
        for part in both:
            for i in range(config.n_dense_layers):
                yield f"{there}.dense_layers.{i}.{part}", f"{here}.coarse.{part}", i
            for level in range(config.n_levels):
                yield f"{there}.conv_layers.{level}.0.{part}", f"{here}.banded.{level}.{part}", None
            for i in (0, 3) if config.n_classes else ():
                yield f"{there}.prediction_head.{i}.{part}", f"head.{i}.{part}", None
        if config.parcel_scale:
            yield f"{there}.channel_scales", f"{here}.parcel_scale", None


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being loaded, by name: missing, unknown, both shapes where they differ; else empty."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = (
            tuple(part[name].shape) if name in part else None for part in (expected, found)
        )
        if ours is None or theirs is None:
            lines.append(
                f"{name}: unknown, got {theirs}"
                if ours is None
                else f"{name}: missing, expected {ours}"
            )
        elif ours != theirs:
            lines.append(f"{name}: expected {ours}, got {theirs}")
    more = f"; and {len(lines) - 20} more" if len(lines) > 20 else ""
    return "; ".join(lines[:20]) + more


def read_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for `model`, a MnemoDyn with ``compat="reference"``, from one under the draft's names.

    With or without the prefix ``model.`` of a Lightning checkpoint. ValueError naming every weight that is missing,
    unknown or of another shape, or if the wavelet filters stored beside the weights are not those of the settings.
    """
    state = {name.removeprefix("model."): value for name, value in state.items()}
    filters = {name: state.pop(name) for name in list(state) if ".wavelet_processor." in name}
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    config = cast(ModelConfig, model.config)
    places = {
        theirs: (weights[ours] if i is None else weights[ours][i])
        for theirs, ours, i in _names(config)
    }
    if wrong := misfits(places, state):
        raise ValueError(f"draft weights do not fit their settings: {wrong}")
    low = np.array(pywt.Wavelet(config.wavelet).dec_lo)
    for name, value in filters.items():
        stored = value.detach().flatten().double().cpu().numpy()
        if name.endswith("h0") and not any(
            stored.shape == low.shape and np.allclose(stored, way, atol=1e-5)
            for way in (low, low[::-1])
        ):
            raise ValueError(f"{name}: the stored filter is not that of wave {config.wavelet!r}")
    for name, place in places.items():
        place.copy_(state[name])
    return weights


def read_lightning(path: Path) -> tuple[dict, dict[str, Tensor], dict]:
    """Settings, weights, and the epoch and step of a Lightning checkpoint of the draft; nothing in it is executed.

    Where the file holds no settings they come from ``hparams.yaml`` beside it or, as Lightning's logger lays out its
    folders, one folder up. ValueError if the file cannot be read as tensors and plain values, is no Lightning
    checkpoint, or has no settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file fails in any way it likes
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path}: not a file of tensors and plain values, so it was not read and nothing in it was executed "
            f"({type(error).__name__}: {reason})"
        ) from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(v, Tensor) for v in state.values())
    ):
        raise ValueError(f"{path}: not a Lightning checkpoint: expected a state_dict of tensors")
    settings = content.get("hyper_parameters")
    if not settings:
        beside = [folder / "hparams.yaml" for folder in (path.parent, path.parent.parent)]
        file = next((f for f in beside if f.is_file()), None)
        if file is None:
            raise ValueError(
                f"{path}: holds no hyper_parameters, and there is no hparams.yaml beside it"
            )
        settings = read_yaml(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: its settings must be a mapping, got {type(settings).__name__}")
    return (
        dict(settings),
        state,
        {name: content[name] for name in ("epoch", "global_step") if name in content},
    )


def prediction_head(config: ModelConfig) -> nn.Sequential:
    """The draft's head (batch, parcel) to (batch, class), read at the last frame."""
    activation = {"tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}[config.activation]()
    return nn.Sequential(
        nn.Linear(config.n_parcels, 64),
        activation,
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
        n, difference = x.shape[1], x.diff(dim=1)
        if self.interpolation == "linear":
            return n * torch.cat([difference[:, :1], difference], dim=1)
        earlier = torch.cat([difference[:, :1], difference[:, :-1]], dim=1)
        later = earlier + (4 / n - 3 / n**2) * (difference - earlier)
        return torch.cat([difference[:, :1], later], dim=1)

    def analysis(self, a: Tensor) -> tuple[Tensor, Tensor]:
        if a.shape[-1] % 2:
            a = torch.cat([a, a[..., -1:].detach()], dim=-1)
        return dwt(a, self.config.wavelet)

    def synthesis(self, approximation: Tensor, detail: Tensor, length: int) -> Tensor:
        c = idwt(approximation, detail, self.config.wavelet)
        return c if length == self.config.n_timepoints else c[..., c.shape[-1] - length :]
