"""Every setting of a training, checked: one nested description, the same wherever it is written down.

A profile, the command line (``-s training.epochs 5``), a notebook's parameters and a checkpoint all
hold the parts of :class:`Settings` under the same names.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, field
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass

__all__ = [
    "OBJECTIVE_SETTINGS",
    "AutoencodeSettings",
    "ConnectomeSettings",
    "DataConfig",
    "DenoiseSettings",
    "ForecastSettings",
    "GroupsSettings",
    "LatentSettings",
    "Machine",
    "MaskedSettings",
    "MixedSettings",
    "ModelConfig",
    "ModelSettings",
    "ObjectiveSettings",
    "Settings",
    "SettingsError",
    "TrainingConfig",
    "checked",
    "nearest",
]

Class = TypeVar("Class", bound=type)
AtLeastZero = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# A share that may be 0, and one that may not.
Share = Annotated[float, Field(ge=0, lt=1)]
ProperShare = Annotated[float, Field(gt=0, lt=1)]


class SettingsError(ValueError):
    """A setting is unknown, or its value is not allowed. The message begins with the setting's name."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error adds for an unknown name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(known)}"


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def checked(cls: Class) -> Class:
    """Make a frozen dataclass whose values are checked against their annotations.

    No value is converted (only a whole number is taken for a float), unknown names, NaN and
    infinities are refused, and every refusal is a :class:`SettingsError`.
    """
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    # Strict, because True for 1 or "3" for 3 is more often a mistake than meant.
    made: Any = dataclass(cls, frozen=True, config=config)
    original = made.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        try:
            original(self, *args, **kwargs)
        except ValidationError as error:
            # Several lines, with an address of its documentation: too much for a mistyped name.
            known = list(made.__dataclass_fields__)
            raise SettingsError(_explain(error, known)) from None

    made.__init__ = __init__
    return made


def _explain(error: ValidationError, known: Sequence[str]) -> str:
    """The first thing that pydantic found wrong, in a line that begins with the setting's name."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "value_error":
        # Raised by one of the classes below, whose messages begin with a name already.
        return str(problem["ctx"]["error"])
    if problem["type"] == "unexpected_keyword_argument":
        return f"{name} is not a setting{nearest(name, known)}"
    if problem["type"] == "missing":
        return f"{name} must be given"
    allowed = problem["msg"].replace("Input should be", "must be")
    return f"{name} {allowed}, got {problem['input']!r}"


@checked
class ModelSettings:
    """Structure of a network, for scans of any number of parcels.

    Attributes
    ----------
    n_timepoints : int
        Frames of the windows it is trained on, T. Other lengths are accepted: see ``MnemoDyn``.
    n_blocks : int
        Operator blocks in the stack.
    n_channels : int
        Channels of the pyramid, K.
    input_width : int
        Width d of the field's first layer.
    field_rank : int
        Rank r of the field.
    n_levels : int
        Levels J of the wavelet pyramid. With 0 the coarse operator acts on all frames.
    kernel_size : int
        Samples a banded operator joins, odd.
    n_segments : int
        Segments S of time with operators of their own.
    banded : str
        Banded operators: ``full`` kernels 2K -> 2K, as published, or ``depthwise``, a kernel a
        channel and then one matrix 2K -> 2K, with about `kernel_size` times fewer weights.
    n_dense_layers : int
        Dense operators on the coarsest approximation.
    wavelet : str
        A PyWavelets wavelet with orthogonal filters; ``lazy``: even and odd samples apart, no
        filter; or ``learned``: orthogonal filters of eight samples, a pair a block, which start as
        db2's and are trained.
    activation : str
        ``gelu``, ``silu``, ``tanh`` or ``relu``.
    control : str
        What the field is contracted with: the path's ``derivative``, as published; its ``value``;
        ``both``, each with a field of its own; or ``none``, which leaves the drive to the lift.
    lift : bool
        Add a linear map of (values, what is visible) to the drive. Not in the published block.
    residual : bool
        Each block adds to the stream instead of replacing it.
    parcel_scale : bool
        A learned factor for each parcel on the output.
    multiresolution : bool
        Compute the multi-resolution loss.
    front : str
        ``none``: hidden entries start as zero. ``gaussian``: they start as their conditional mean
        under the group's Gaussian process, adapted to the scan
        (:class:`~mnemodyn.model.front.Front`), and the blocks start as no change to it. Not in the
        published network; nor are the settings of the front end that follow.
    front_lags : int
        Largest lag of the process in frames.
    front_shrinkage : float
        Weight of noise in the process, in (0, 1].
    front_weight : float
        Frames, > 0, that the group's covariance counts for in a scan's own.
    front_steps : int
        Steps of the adaptation to the scan; 0 for none.
    front_modes : int
        Directions in which people's covariances differ, learned from at least twice as many
        training scans.
    connectome : str
        ``none``; ``covariance``: the network also estimates a person's connectivity from a short scan
        (:class:`~mnemodyn.model.connectome.Connectome`), starting from the front end's; ``operator``:
        the blocks' latents too. Not in the published network.
    connectome_maps : int
        Pairs of matrices by which that estimate is changed.
    compat : str
        ``none``, or ``reference``: compute as the published draft does, for weights that it has
        trained; see ``mnemodyn.model.reference``. The settings below belong to it.
    interpolation : str
        ``spline`` or ``linear``: how the draft fits the path of its first block. ``none`` without
        `compat`.
    linear_bias : bool
        Biases in the linear layers.
    n_classes : int
        Outputs of a head on the last frame; 0 for no head.
    """

    n_timepoints: Annotated[int, Field(ge=2)] = 240
    n_blocks: AtLeastOne = 2
    n_channels: AtLeastOne = 64
    input_width: AtLeastOne = 64
    field_rank: AtLeastOne = 4
    n_levels: AtLeastZero = 4
    kernel_size: AtLeastOne = 5
    n_segments: AtLeastOne = 1
    banded: Literal["full", "depthwise"] = "full"
    n_dense_layers: AtLeastZero = 1
    wavelet: str = "db2"
    activation: Literal["gelu", "silu", "tanh", "relu"] = "gelu"
    control: Literal["derivative", "value", "both", "none"] = "derivative"
    lift: bool = True
    residual: bool = True
    parcel_scale: bool = False
    multiresolution: bool = False
    front: Literal["none", "gaussian"] = "none"
    front_lags: AtLeastZero = 8
    front_shrinkage: Annotated[float, Field(gt=0, le=1)] = 0.1
    front_weight: Positive = 200.0
    front_steps: AtLeastZero = 4
    front_modes: AtLeastZero = 0
    connectome: Literal["none", "covariance", "operator"] = "none"
    connectome_maps: AtLeastOne = 16
    compat: Literal["none", "reference"] = "none"
    interpolation: Literal["none", "spline", "linear"] = "none"
    linear_bias: bool = True
    n_classes: AtLeastZero = 0

    def __post_init__(self):
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        # That is 2 ** n_levels > n_timepoints, without a power that could fill the memory.
        if self.n_levels >= self.n_timepoints.bit_length():
            raise ValueError(
                f"n_levels {self.n_levels} halves a scan of n_timepoints {self.n_timepoints} "
                "below one sample"
            )
        # Without a residual the first block would throw away what the front end has filled in.
        if self.front != "none" and not self.residual:
            raise ValueError("front needs residual=True: the blocks change what it filled in")
        if self.connectome != "none" and self.front == "none":
            raise ValueError("connectome needs front='gaussian', from whose estimate it starts")
        if self.compat == "reference":
            self._check_reference()
            return
        for name, value in (("interpolation", "none"), ("linear_bias", True), ("n_classes", 0)):
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} needs compat='reference'")

    def _check_reference(self) -> None:
        """Refuse what the published draft cannot compute."""
        needed = {"lift": False, "banded": "full", "control": "derivative", "front": "none"}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value} with compat='reference': the draft knows no other"
                )
        if self.wavelet == "learned":
            raise ValueError("wavelet must be fixed with compat='reference', got 'learned'")
        if self.interpolation == "none":
            raise ValueError("interpolation must be spline or linear with compat='reference'")
        if self.n_timepoints % 2 and (self.n_blocks > 1 or self.residual):
            raise ValueError(
                f"n_timepoints must be even with compat='reference', got {self.n_timepoints}: the "
                "draft returns one frame more, which neither a residual nor a further block takes"
            )

    def to_dict(self) -> dict:
        return asdict(self)


@checked
class ModelConfig(ModelSettings):
    """Structure of one :class:`~mnemodyn.model.network.MnemoDyn`: :class:`ModelSettings` and its parcels.

    Attributes
    ----------
    n_parcels : int
        Parcels of a scan, P.
    """

    n_parcels: AtLeastOne = field(kw_only=True)


@checked
class TrainingConfig:
    """How a network is trained. Another value of any of these is another result.

    Attributes
    ----------
    epochs : int
        At most; early stopping may end sooner.
    windows_per_epoch : int
        Random windows drawn in an epoch.
    window_seconds : float or None
        Length of a window in seconds, for scans that differ in repetition time; None for windows of
        the model's ``n_timepoints`` frames.
    batch_size : int
        Windows in a step of the optimiser, over all processes and parts.
    accumulate : int
        Parts that a step is computed in, to save memory. Each part's loss is a mean of its own.
    learning_rate : float
        Peak of the schedule.
    schedule : str
        ``cosine`` once over all epochs, or ``restarts``: cosine cycles of `restart_epochs`, each
        `restart_factor` times as long as the one before. Both fall to 1 % of the peak.
    restart_epochs, restart_factor : int
        As published 10 and 2.
    warmup_share : float
        Share of all steps over which the rate rises to its peak.
    weight_decay : float
        AdamW's, on matrices and kernels only: not on biases, norms and scales.
    clip : float
        Largest norm of the gradient.
    ema_decay : float
        Of the averaged weights, which are validated and kept; 0 for no average.
    patience : int
        Epochs without a better validation score before training stops.
    precision : str
        ``32-true`` or ``bf16-mixed``.
    cross_fit : int
        Folds of training participants for the front end: the blocks learn from what a front end
        fitted to the other folds fills in, since they will meet new people. 0 or 1 for one front
        end fitted to all of them.
    fresh_windows : bool
        Every epoch has windows and masks of its own. False: all epochs and seeds share the first
        `windows_per_epoch`, whose hidden entries the front end then fills in once only, which is its
        cost in training.
    seed : int
        Of the initial weights, windows and masks.
    """

    epochs: AtLeastOne = 10
    windows_per_epoch: AtLeastOne = 240
    window_seconds: Positive | None = None
    batch_size: AtLeastOne = 8
    accumulate: AtLeastOne = 1
    learning_rate: NotNegative = 2e-3
    schedule: Literal["cosine", "restarts"] = "cosine"
    restart_epochs: AtLeastOne = 10
    restart_factor: AtLeastOne = 2
    warmup_share: Share = 0.1
    weight_decay: NotNegative = 0.05
    clip: Positive = 1.0
    ema_decay: Share = 0.98
    patience: AtLeastZero = 10
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    cross_fit: AtLeastZero = 5
    fresh_windows: bool = True
    seed: AtLeastZero = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the optimiser; the last may have fewer windows."""
        return math.ceil(self.windows_per_epoch / self.batch_size)


@checked
class Machine:
    """Where and how a training runs. It changes no more of the result than the last digits.

    Attributes
    ----------
    accelerator : str
        Lightning's: ``auto``, ``cpu``, ``gpu``.
    devices, nodes : int
        Processes on each machine, and machines. Under SLURM as many as the job has tasks and nodes.
    strategy : str
        Lightning's: ``auto``, ``ddp``, ``ddp_fork``.
    workers : int
        Processes that read windows, for each device.
    recompute : bool
        Compute each block again in the backward pass instead of keeping what is inside it: less
        memory, more time.
    """

    accelerator: str = "auto"
    devices: AtLeastOne = 1
    nodes: AtLeastOne = 1
    strategy: str = "auto"
    workers: AtLeastZero = 0
    recompute: bool = False


@checked
class DataConfig:
    """What is read, and who is held out.

    Attributes
    ----------
    t_r : float or None
        Repetition time in seconds, for files that do not state it.
    n_test, n_validation : int or float
        Participants held out, and those who choose the epoch: a number, or a share of all. See
        :func:`mnemodyn.splits.hold_out`.
    """

    t_r: Positive | None = None
    n_test: AtLeastZero | Share = 2
    n_validation: AtLeastOne | ProperShare = 1


@checked
class ObjectiveSettings:
    """What the settings of all objectives share. Their behaviour is in ``mnemodyn.pretrain.objectives``."""

    name: ClassVar[str]
    # Settings of the network that the objective brings, where no others are given.
    model: ClassVar[Mapping[str, Any]] = {}

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}


@checked
class MaskedSettings(ObjectiveSettings):
    """Hide stretches of each parcel, and fill them in.

    Attributes
    ----------
    hidden_share : float
        Share of each parcel's frames that is hidden, between 0 and 1.
    mask_window : int
        Length of a hidden stretch in frames.
    share_spread : float
        In training the share of each window is drawn evenly from ``hidden_share - share_spread`` to
        ``hidden_share + share_spread``, so that the network learns to use what it is given.
        Validation and evaluation hide `hidden_share`.
    mask_seconds : float or None
        Length of a hidden stretch in seconds, in place of `mask_window`.
    """

    hidden_share: float = 0.55
    mask_window: AtLeastOne = 15
    share_spread: NotNegative = 0.0
    mask_seconds: Positive | None = None
    name: ClassVar[str] = "masked"

    def __post_init__(self):
        least = self.hidden_share - self.share_spread
        most = self.hidden_share + self.share_spread
        if least <= 0 or most >= 1:
            raise ValueError(
                "hidden_share must lie between 0 and 1, share_spread included; got "
                f"{self.hidden_share} and {self.share_spread}"
            )


@checked
class DenoiseSettings(ObjectiveSettings):
    """Find the clean window in x + sigma N(0, 1).

    Attributes
    ----------
    sigma : float
        Noise in standard deviations of a scaled parcel.
    """

    sigma: Positive = 0.1
    name: ClassVar[str] = "denoise"


@checked
class AutoencodeSettings(ObjectiveSettings):
    """Return what was shown; no settings."""

    name: ClassVar[str] = "autoencode"


@checked
class LatentSettings(ObjectiveSettings):
    """Predict a teacher's embedding of blocks that the student does not see.

    Attributes
    ----------
    observed_share, target_share : float
        Frames of the observed block and of an earlier one, as a share of the window.
    parcel_share : float
        Parcels of the observed block, as a share of all.
    teacher_decay : float
        Of the teacher's average.
    variance_weight, covariance_weight : float
        Weights of the guard against collapse: the mean over channels of (SD - 1)**2, and of the
        squared correlations with all other channels. After VICReg, Bardes et al., ICLR 2022.
    """

    observed_share: ProperShare = 0.5
    target_share: ProperShare = 0.25
    parcel_share: ProperShare = 0.5
    teacher_decay: Share = 0.99
    variance_weight: NotNegative = 0.2
    covariance_weight: NotNegative = 0.04
    name: ClassVar[str] = "latent"

    def __post_init__(self):
        if self.observed_share + self.target_share > 1:
            raise ValueError(
                "observed_share and target_share must together be at most 1, got "
                f"{self.observed_share} and {self.target_share}"
            )


@checked
class ForecastSettings(ObjectiveSettings):
    """Hide the last seconds of a window in all parcels.

    Attributes
    ----------
    horizon : float
        Seconds that are hidden.
    """

    horizon: Positive = 10.0
    name: ClassVar[str] = "forecast"


@checked
class GroupsSettings(ObjectiveSettings):
    """Hide one whole group of parcels for the whole window.

    Attributes
    ----------
    pattern : str
        Regular expression. Parcels whose names agree in its first bracket are a group. The default
        parts the hemispheres; ``"(Vis|SomMot|DorsAttn|SalVentAttn|Limbic|Cont|Default)"`` the
        networks of Schaefer's atlas.
    """

    pattern: str = r"(?:^|_)([LR])H?(?:_|$)"
    name: ClassVar[str] = "groups"


@checked
class ConnectomeSettings(ObjectiveSettings):
    """Estimate from a short scan what the rest of the person's data show.

    Attributes
    ----------
    shortest : int
        Frames. Each window is cut to this number, or twice, four times it and so on, drawn anew each time.
    fit_scans : int
        Short scans of each length from which the closed form is fitted.
    """

    shortest: Annotated[int, Field(ge=2)] = 30
    fit_scans: AtLeastOne = 2048
    name: ClassVar[str] = "connectome"
    model: ClassVar = {"front": "gaussian", "connectome": "covariance"}


@checked
class MixedSettings(ObjectiveSettings):
    """Several objectives at once, on the same windows.

    Attributes
    ----------
    mix : list of dict
        One for each objective: its ``name``, ``weight`` (1 by default) and settings.
    """

    mix: list[dict] = field(default_factory=lambda: [{"name": "masked"}, {"name": "denoise"}])
    name: ClassVar[str] = "mixed"

    @field_validator("mix", mode="before")
    @classmethod
    def _complete(cls, mix: Any) -> list[dict]:
        """Check the objectives and write out all their settings."""
        whole = []
        for one in mix:
            one = dict(one)
            weight = one.pop("weight", 1.0)
            # A weight is no setting of an objective, so it is checked here.
            if type(weight) not in (int, float) or not 0 < weight < float("inf"):
                raise ValueError(f"mix must have weights > 0, got {weight!r}")
            try:
                whole.append({**_objective(**one).to_dict(), "weight": float(weight)})
            except SettingsError as error:
                raise ValueError(f"mix: {error}") from None
        return whole

    def __post_init__(self):
        # The names of scores and masks begin with their objective's.
        names = [one["name"] for one in self.mix]
        if len(set(names)) < max(2, len(names)) or self.name in names:
            raise ValueError(f"mix must list two or more different objectives, got {names}")
        if ConnectomeSettings.name in names:
            # It hides nothing, and its front end is fitted to everybody.
            raise ValueError("mix cannot hold connectome; train it by itself")


OBJECTIVE_SETTINGS: dict[str, type[ObjectiveSettings]] = {
    cls.name: cls
    for cls in (
        MaskedSettings,
        DenoiseSettings,
        AutoencodeSettings,
        LatentSettings,
        ForecastSettings,
        GroupsSettings,
        ConnectomeSettings,
        MixedSettings,
    )
}


def _objective(name: str = "masked", **settings: Any) -> ObjectiveSettings:
    """The settings of the objective of a name."""
    if name not in OBJECTIVE_SETTINGS:
        raise SettingsError(f"name {name!r} is no objective{nearest(name, OBJECTIVE_SETTINGS)}")
    return OBJECTIVE_SETTINGS[name](**settings)


def _model(**settings: Any) -> ModelSettings:
    """The settings of a network, which may state its parcels."""
    return ModelConfig(**settings) if "n_parcels" in settings else ModelSettings(**settings)


# What makes each section of the settings.
SECTIONS: dict[str, Callable[..., Any]] = {
    "data": DataConfig,
    "model": _model,
    "objective": _objective,
    "training": TrainingConfig,
    "machine": Machine,
}


@checked
class Settings:
    """All settings of a training.

    Attributes
    ----------
    data : DataConfig
    scaling : str
        A method of :class:`~mnemodyn.data.scaling.Scaling`.
    model : ModelSettings
    objective : ObjectiveSettings
        One of the eight, told apart by ``name``.
    training : TrainingConfig
    machine : Machine

    Examples
    --------
    >>> settings = Settings.from_mapping({"objective": "denoise", "training": {"epochs": 3}})
    >>> settings.updated({"objective.sigma": 0.2, "n_blocks": 1}).objective.sigma
    0.2
    """

    data: DataConfig = DataConfig()
    scaling: str = "zscore_per_parcel"
    model: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = MaskedSettings()
    training: TrainingConfig = TrainingConfig()
    machine: Machine = Machine()

    def __post_init__(self):
        if self.objective.name == ConnectomeSettings.name:
            if self.model.connectome == "none":
                raise ValueError(
                    "the objective connectome needs model.connectome covariance or operator"
                )
            if self.scaling != "zscore_per_parcel":
                raise ValueError(
                    f"the objective connectome needs scaling zscore_per_parcel, got {self.scaling}"
                )

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Self:
        """Read a nested mapping, such as a YAML file holds: section, then setting.

        What is not given has its default. ``objective`` may be a name alone, and brings the settings
        of the network without which it cannot be trained.

        Raises
        ------
        SettingsError
            For an unknown section or setting, or a value that is not allowed.
        """
        # YAML has names that are numbers, which are no setting's.
        content = {str(name): value for name, value in content.items()}
        if isinstance(content.get("objective"), str):
            content["objective"] = {"name": content["objective"]}
        given = content.get("objective")
        name = given.get("name") if isinstance(given, Mapping) else None
        model = content.get("model") or {}
        if name in OBJECTIVE_SETTINGS and isinstance(model, Mapping):
            content["model"] = {**OBJECTIVE_SETTINGS[name].model, **model}
        for section, make in SECTIONS.items():
            # A section of a YAML file that holds comments alone is None.
            given = content.pop(section, None) or {}
            if not isinstance(given, Mapping):
                raise SettingsError(f"{section} must be a mapping of settings, got {given!r}")
            try:
                content[section] = make(**{str(name): value for name, value in given.items()})
            except SettingsError as error:
                raise SettingsError(f"{section}.{error}") from None
        return cls(**content)

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """Settings with some changed, checked again.

        Parameters
        ----------
        changes : mapping
            By dotted name, ``{"training.epochs": 5}``, by a name that is in one section only,
            ``{"epochs": 5}``, or nested, ``{"training": {"epochs": 5}}``. Another
            ``objective.name`` brings that objective's own settings.

        Raises
        ------
        SettingsError
            For an unknown name, or a value that is not allowed.
        """
        nested = self.to_dict()
        changes = _by_dotted_name(changes)
        name = changes.get("objective.name", self.objective.name)
        if name != self.objective.name:
            brought = self.from_mapping({"objective": name}).objective
            nested["objective"] = brought.to_dict()
            nested["model"] |= brought.model
        # No two sections share the name of a setting, so that a name alone is enough.
        sections = {}
        for section, content in nested.items():
            if isinstance(content, Mapping):
                sections.update(dict.fromkeys(content, section))
        for name, value in changes.items():
            section, _, leaf = name.rpartition(".")
            if name == "scaling":
                nested["scaling"] = value
            elif leaf in sections and section in ("", sections[leaf]):
                nested[sections[leaf]][leaf] = value
            else:
                raise SettingsError(f"{name} is not a setting{nearest(leaf, sections)}")
        return self.from_mapping(nested)

    def to_dict(self) -> dict:
        """The nested mapping that `from_mapping` reads, of values that JSON can hold."""
        return {**asdict(self), "objective": self.objective.to_dict()}


def _by_dotted_name(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes with whole sections taken apart."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, Mapping):
            found.update({f"{name}.{leaf}": content for leaf, content in value.items()})
        elif name == "objective":
            found["objective.name"] = value
        else:
            found[name] = value
    return found
