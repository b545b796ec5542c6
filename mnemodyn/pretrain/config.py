"""Settings of a training: what decides its result, and what only decides where and how it runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mnemodyn.model.config import ModelConfig
from mnemodyn.parameters import ParameterError, build, check_settings, unknown
from mnemodyn.pretrain.objective import OBJECTIVES, Objective, make_objective

__all__ = ["DataConfig", "Machine", "TrainingConfig", "configure"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained. Another value of any of these is another result.

    Attributes
    ----------
    epochs : int
        At most; early stopping may end sooner.
    windows_per_epoch : int
        Random windows drawn in an epoch.
    window_seconds : float
        Length of a window in seconds, where scans differ in repetition time; 0 for the model's ``n_timepoints``.
    batch_size : int
        Windows in a step of the optimiser, over all processes and parts.
    accumulate : int
        Parts that a step is computed in, for a smaller memory. Each part's loss is a mean of its own.
    learning_rate : float
        Peak of the schedule.
    schedule : str
        ``cosine`` once over all epochs, or ``restarts``: cosine cycles of `restart_epochs`, each `restart_factor` times
        as long as the one before. Both fall to 1 % of the peak.
    restart_epochs, restart_factor : int
        As published 10 and 2.
    warmup_share : float
        Share of all steps over which the rate rises to its peak.
    weight_decay : float
        AdamW's, on matrices and kernels only: not on biases, norms and scales.
    clip : float
        Largest norm of the gradient.
    ema_decay : float
        Of the averaged weights, which are the ones validated and kept; 0 for none.
    patience : int
        Epochs without a better validation result before training stops.
    precision : str
        ``32-true`` or ``bf16-mixed``.
    seed : int
        Of the initial weights, windows and masks.
    """

    epochs: int = 10
    windows_per_epoch: int = 240
    window_seconds: float = 0.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-3
    schedule: Literal["cosine", "restarts"] = "cosine"
    restart_epochs: int = 10
    restart_factor: int = 2
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    ema_decay: float = 0.98
    patience: int = 10
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seed: int = 0

    def __post_init__(self):
        check_settings(self)
        positive = (
            "epochs",
            "windows_per_epoch",
            "batch_size",
            "accumulate",
            "clip",
            "restart_epochs",
            "restart_factor",
        )
        for name in positive:
            if not getattr(self, name):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if max(self.ema_decay, self.warmup_share) >= 1:
            raise ValueError(
                f"ema_decay {self.ema_decay} and warmup_share {self.warmup_share} must be below 1"
            )

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a training runs; none of it is part of what is computed, but for the last digits.

    Attributes
    ----------
    accelerator : str
        Lightning's: ``auto``, ``cpu``, ``gpu``.
    devices, nodes : int
        Processes on each machine, and machines. Under SLURM as many as the job has tasks and nodes.
    strategy : str
        Lightning's: ``auto``, ``ddp``, ``ddp_fork``.
    workers : int
        Processes that read windows, a device.
    recompute : bool
        Compute each block again in the backward pass instead of keeping what is inside it: less memory, more time.
    deterministic : bool
        Refuse operations whose result may differ between equal runs.
    checkpoint_every : int
        Steps between checkpoints within an epoch, beside the one at its end; 0 for none.
    tensorboard : bool
        Write TensorBoard's logs too; needs ``pip install tensorboard``.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    workers: int = 0
    recompute: bool = False
    deterministic: bool = True
    checkpoint_every: int = 0
    tensorboard: bool = False

    def __post_init__(self):
        check_settings(self)
        if not self.devices or not self.nodes:
            raise ValueError(f"devices and nodes must be >= 1, got {self.devices} and {self.nodes}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and who is held out.

    Attributes
    ----------
    t_r : float
        Seconds, for files that do not state their repetition time; 0 where they do.
    n_test, n_validation : int
        Participants held out, the last of the sorted identifiers, and those before them that choose the checkpoint.
    scaling : str
        A method of :class:`~mnemodyn.data.scaling.Scaling`.
    """

    t_r: float = 0.0
    n_test: int = 2
    n_validation: int = 1
    scaling: str = "zscore_per_parcel"

    def __post_init__(self):
        check_settings(self)


def configure(
    name: str, sections: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> tuple[Objective, dict[str, dict], TrainingConfig, Machine, DataConfig]:
    """Check the settings of a training with the objective `name`.

    `sections` are ``model``, ``objective``, ``training``, ``machine`` and ``data``, each a mapping of settings; all
    optional. Single `settings` without their section win. The settings of the model that are returned lack the number
    of parcels, which the scans know. ParameterError if a section or a setting is unknown; the message has the known
    ones and the nearest.
    """
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    classes: dict[str, Any] = {
        "model": ModelConfig,
        "objective": OBJECTIVES[name],
        "training": TrainingConfig,
    }
    classes |= {"machine": Machine, "data": DataConfig}
    known = {part: [f.name for f in fields(cls) if f.init] for part, cls in classes.items()}
    known["model"].remove("n_parcels")
    given: dict[str, dict] = {part: {} for part in classes}
    for part, content in sections.items():
        if part not in classes:
            raise unknown("section", part, classes)
        if not isinstance(content, Mapping):
            raise ParameterError(f"section {part} must be a mapping 'name: value', got {content!r}")
        for key in content:
            if key not in known[part]:
                raise unknown(f"{part} setting", key, known[part])
        given[part] |= content
    for key, value in (settings or {}).items():
        home = next((part for part, names in known.items() if key in names), None)
        if home is None:
            raise unknown("setting", key, [key for names in known.values() for key in names])
        given[home][key] = value
    model = {"n_timepoints": 240, **given.pop("model")}
    build(ModelConfig, {"n_parcels": 2, **model}, "model setting")
    objective = make_objective(name, given.pop("objective"))
    return (
        objective,
        model,
        *(build(classes[part], content, f"{part} setting") for part, content in given.items()),
    )
