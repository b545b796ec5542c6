"""What a network is made of."""

from dataclasses import asdict, dataclass, fields
from typing import Literal

from mnemodyn.parameters import check_settings

__all__ = ["PRESETS", "ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Structure of a :class:`~mnemodyn.model.network.MnemoDyn`. An unknown or contradictory setting is an error.

    Attributes
    ----------
    n_parcels : int
        Parcels of a scan, P.
    n_timepoints : int
        Frames of the scans or windows it is trained on, T. Other lengths are accepted: see ``MnemoDyn``.
    n_blocks : int
        Operator blocks in the stack.
    n_channels : int
        Channels of the pyramid, K.
    input_width : int
        Width d of the field's first layer.
    field_rank : int
        Rank r of the field.
    n_levels : int
        Levels J of the wavelet pyramid; 0 for none, which leaves the coarse operator to act on all frames.
    kernel_size : int
        Samples a banded operator joins, odd.
    n_segments : int
        Segments S of time with operators of their own.
    banded : str
        Banded operators: ``full`` kernels 2K -> 2K, as published, or ``depthwise``, a kernel a channel and then one
        matrix 2K -> 2K, with about `kernel_size` times fewer weights.
    n_dense_layers : int
        Dense operators on the coarsest approximation.
    wavelet : str
        A PyWavelets wavelet with orthogonal filters; ``lazy``: even and odd samples apart, no filter; or ``learned``:
        orthogonal filters of eight samples, a pair a block, which start as db2's and are trained.
    activation : str
        ``gelu``, ``silu``, ``tanh`` or ``relu``.
    control : str
        What the field is contracted with: the path's ``derivative``, as published; its ``value``; ``both``, each
        with a field of its own; or ``none``, which leaves the drive to the lift.
    lift : bool
        Add a linear map of (values, what is visible) to the drive. Not in the published block.
    residual : bool
        Each block adds to the stream instead of replacing it.
    parcel_scale : bool
        A learned factor a parcel on the output.
    multiresolution : bool
        Compute the multi-resolution loss.
    front : str
        ``none``: hidden entries start as zero. ``gaussian``: they start as their conditional mean under the group's
        Gaussian process, adapted to the scan (:class:`~mnemodyn.model.front.Front`), and the blocks start as no
        change to it. Not in the published network; neither are the settings of the front end that follow.
    front_lags : int
        Largest lag in frames of the process.
    front_shrinkage : float
        Weight in (0, 1] of noise in the process.
    front_weight : float
        Frames, > 0, that the group's covariance counts for in a scan's own.
    front_steps : int
        Of the adaptation to the scan; 0 for none.
    front_modes : int
        Directions in which people's covariances differ, learned from at least twice as many training scans.
    compat : str
        ``none``, or ``reference``: compute as the published draft does, for weights it has trained; see
        ``mnemodyn.model.reference``. The settings below belong to it.
    interpolation : str
        ``spline`` or ``linear``: how the draft fits the path of its first block. ``none`` without `compat`.
    linear_bias : bool
        Biases in the linear layers.
    n_classes : int
        Outputs of a head on the last frame; 0 for no head.
    """

    n_parcels: int
    n_timepoints: int
    n_blocks: int = 2
    n_channels: int = 64
    input_width: int = 64
    field_rank: int = 4
    n_levels: int = 4
    kernel_size: int = 5
    n_segments: int = 1
    banded: str = "full"
    n_dense_layers: int = 1
    wavelet: str = "db2"
    activation: Literal["gelu", "silu", "tanh", "relu"] = "gelu"
    control: Literal["derivative", "value", "both", "none"] = "derivative"
    lift: bool = True
    residual: bool = True
    parcel_scale: bool = False
    multiresolution: bool = False
    front: Literal["none", "gaussian"] = "none"
    front_lags: int = 8
    front_shrinkage: float = 0.1
    front_weight: float = 200.0
    front_steps: int = 4
    front_modes: int = 0
    compat: Literal["none", "reference"] = "none"
    interpolation: Literal["none", "spline", "linear"] = "none"
    linear_bias: bool = True
    n_classes: int = 0

    def __post_init__(self):
        check_settings(self)
        zero = (
            "n_dense_layers",
            "n_classes",
            "n_levels",
            "front_lags",
            "front_steps",
            "front_modes",
        )
        for f in fields(self):
            least = 2 if f.name == "n_timepoints" else int(f.name not in zero)
            if f.type is int and getattr(self, f.name) < least:
                raise ValueError(f"{f.name} must be >= {least}, got {getattr(self, f.name)}")
        draft = self.compat == "reference"
        alone = {"interpolation": "none", "linear_bias": True, "n_classes": 0}
        shared = {"lift": False, "banded": "full", "control": "derivative", "front": "none"}
        for name, value in (shared if draft else alone).items():
            if (given := getattr(self, name)) != value:
                reason = f"must be {value} with compat='reference': the draft knows no other"
                raise ValueError(
                    f"{name} {reason}" if draft else f"{name}={given!r} needs compat='reference'"
                )
        for wrong, message in (
            (self.kernel_size % 2 == 0, f"kernel_size must be odd, got {self.kernel_size}"),
            (
                self.banded not in ("full", "depthwise"),
                f"banded must be full or depthwise, got {self.banded!r}",
            ),
            (
                2**self.n_levels > self.n_timepoints,
                f"n_levels {self.n_levels} halves a scan of n_timepoints {self.n_timepoints} below one sample",
            ),
            (
                not 0 < self.front_shrinkage <= 1,
                f"front_shrinkage must be in (0, 1], got {self.front_shrinkage}",
            ),
            (
                not self.front_weight,
                f"front needs front_weight > 0 frames, got {self.front_weight}",
            ),
            (
                self.front != "none" and not self.residual,
                "front needs residual=True: blocks change what it filled in",
            ),
            (
                draft and self.wavelet == "learned",
                "wavelet must be fixed with compat='reference', got 'learned'",
            ),
            (
                draft and self.interpolation == "none",
                "interpolation must be spline or linear with compat='reference'",
            ),
            (
                draft and self.n_timepoints % 2 and (self.n_blocks > 1 or self.residual),
                f"n_timepoints must be even with compat='reference', got {self.n_timepoints}: the draft returns one "
                "frame more, which neither a residual nor a further block takes",
            ),
            (
                self.n_classes and (self.n_blocks > 1 or self.residual or self.multiresolution),
                "n_classes needs n_blocks=1, residual=False and multiresolution=False: the draft fails on others",
            ),
        ):
            if wrong:
                raise ValueError(message)

    @classmethod
    def preset(cls, name: str, *, n_parcels: int, n_timepoints: int, **changes) -> "ModelConfig":
        """A named variant, ``mnemodyn-small``, ``mnemodyn-base``, ``mnemodyn-large`` or ``reference``, with `changes`.

        ``reference`` has the published settings and computes as the published draft does.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(
            **{"n_parcels": n_parcels, "n_timepoints": n_timepoints, **PRESETS[name], **changes}
        )

    @classmethod
    def from_dict(cls, settings: dict) -> "ModelConfig":
        """From a mapping, as read from a file or a notebook's parameters."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(f"unknown model settings {unknown}; known are {known}")
        if missing := sorted({"n_parcels", "n_timepoints"} - set(settings)):
            raise ValueError(f"model settings lack {missing}")
        return cls(**settings)

    def to_dict(self) -> dict:
        return asdict(self)


PRESETS: dict[str, dict] = {
    "mnemodyn-small": {"front": "gaussian", "n_channels": 32, "input_width": 32},
    "mnemodyn-base": {"front": "gaussian", "n_channels": 96, "input_width": 96},
    "mnemodyn-large": {
        "front": "gaussian",
        "n_blocks": 4,
        "n_channels": 256,
        "input_width": 128,
        "field_rank": 8,
    }
    | {"banded": "depthwise"},
    "reference": {
        "n_blocks": 4,
        "n_channels": 300,
        "input_width": 100,
        "field_rank": 3,
        "n_levels": 5,
        "n_segments": 4,
    }
    | {
        "n_dense_layers": 4,
        "activation": "tanh",
        "lift": False,
        "compat": "reference",
        "interpolation": "spline",
    },
}
