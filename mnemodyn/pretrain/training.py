"""Training with Lightning: resumable, validated by participant, the two best checkpoints kept."""

import csv
import hashlib
import io
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from torch.utils.data import DataLoader

import mnemodyn
from mnemodyn.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan, fingerprint
from mnemodyn.files import write_json, write_text
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.objective import Masked
from mnemodyn.pretrain.windows import Draws, FixedWindows, RandomWindows

__all__ = ["Pretraining", "ResumeError", "TrainingConfig", "pretrain"]

METRIC = "val_r2_hidden"


class ResumeError(RuntimeError):
    """A folder holds an unfinished run of another configuration."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained.

    Attributes
    ----------
    epochs : int
        At most; early stopping may end sooner.
    windows_per_epoch : int
        Random windows drawn in an epoch.
    batch_size : int
    learning_rate : float
        Peak of a cosine schedule.
    warmup_share : float
        Share of all steps over which the rate rises to its peak.
    weight_decay : float
        AdamW's, on matrices and kernels only.
    clip : float
        Largest norm of the gradient.
    ema_decay : float
        Of the averaged weights, which are the ones validated and kept.
    patience : int
        Epochs without a better validation result before training stops.
    seed : int
        Of the initial weights, windows and masks.
    """

    epochs: int = 10
    windows_per_epoch: int = 240
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    ema_decay: float = 0.98
    patience: int = 10
    seed: int = 0

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (f.type, int)):
                raise ValueError(f"{f.name} must be {f.type.__name__}, got {value!r}")
            if value < 0 or (value == 0 and f.name in ("epochs", "windows_per_epoch", "batch_size", "clip")):
                raise ValueError(f"{f.name} must be positive, got {value}")
        if self.ema_decay >= 1 or self.warmup_share >= 1:
            raise ValueError(
                f"ema_decay and warmup_share must be below 1, got {self.ema_decay} and {self.warmup_share}"
            )

    def to_dict(self) -> dict:
        return asdict(self)


class Pretraining(lightning.LightningModule):
    """A network, an objective and an optimiser.

    Logs the training loss, and on the validation scans the R2 of hidden and (apart) of visible entries.
    """

    def __init__(self, model: MnemoDyn, objective: Masked, config: TrainingConfig):
        super().__init__()
        self.model, self.objective, self.config = model, objective, config
        self._sums: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        output = self.model(batch["x"], batch["t_r"], hidden=batch["hidden"])
        loss = self.objective.loss(output, batch["x"], batch["hidden"])
        self._losses.append(loss.detach())
        return loss

    def on_train_epoch_start(self) -> None:
        self._losses.clear()

    def validation_step(self, batch: dict, _: int) -> None:
        x, hidden = batch["x"], batch["hidden"]
        error = (self.model(x, batch["t_r"], hidden=hidden).reconstruction - x).square().double()
        power = x.square().double()
        self._sums.append(
            torch.stack([error[hidden].sum(), power[hidden].sum(), error[~hidden].sum(), power[~hidden].sum()])
        )

    def on_validation_epoch_end(self) -> None:
        hidden_error, hidden_power, error, power = torch.stack(self._sums).sum(0)
        self._sums.clear()
        self.log(METRIC, 1 - hidden_error / hidden_power)
        self.log("val_r2_visible", 1 - error / power)
        if self._losses:
            self.log("train_loss", torch.stack(self._losses).mean())

    def configure_optimizers(self) -> dict:
        config = self.config
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )
        total = config.epochs * math.ceil(config.windows_per_epoch / config.batch_size)
        warmup = max(1, round(config.warmup_share * total))

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return max(0.01, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class History(Callback):
    """A row an epoch, kept in the checkpoint, written to ``history.csv``, and shown.

    A person at a terminal or in an open notebook gets a bar; an executed notebook, a pipe or a log one line an epoch.
    A resumed run shows the lines it resumes from first, so its output is that of a run never interrupted.
    """

    def __init__(self, path: Path, *, epochs: int, bar: bool):
        self.path, self.epochs, self.bar = path, epochs, bar
        self.rows: list[dict] = []
        self._progress = None

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = list(state_dict["rows"])

    def on_fit_start(self, trainer, pl_module) -> None:
        for row in self.rows:
            self._say(row)

    def on_train_start(self, trainer, pl_module) -> None:
        if self.bar:
            from tqdm.std import tqdm

            steps = int(trainer.estimated_stepping_batches)
            self._progress = tqdm(total=steps, initial=trainer.global_step, unit="step", file=sys.stdout)

    def on_train_batch_end(self, *_) -> None:
        if self._progress is not None:
            self._progress.update()

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking:
            return
        row = {"epoch": trainer.current_epoch + 1}
        for name in ("train_loss", METRIC, "val_r2_visible"):
            row[name] = float(trainer.callback_metrics[name])
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
        self._say(row)

    def _say(self, row: dict) -> None:
        line = (
            f"epoch {row['epoch']:3d}/{self.epochs}  train loss {row['train_loss']:.4f}  "
            f"validation R2 hidden {row[METRIC]:.4f}  visible {row['val_r2_visible']:.4f}"
        )
        if self._progress is not None:
            self._progress.set_postfix_str(f"validation R2 {row[METRIC]:.3f}")
        else:
            print(line, flush=True)

    def on_train_end(self, trainer, pl_module) -> None:
        if self._progress is not None:
            self._progress.close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.on_train_end(trainer, pl_module)


def _someone_is_watching() -> bool:
    """True at a terminal and in a notebook opened by a person, not in an executed one, a pipe or a log."""
    if os.environ.get("MNEMODYN_HEADLESS"):
        return False
    # Jupyter servers and VS Code name the document they started a kernel for; papermill and nbconvert do not.
    in_notebook = "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ
    return sys.stdout.isatty() or ("ipykernel" in sys.modules and in_notebook)


def _code_digest() -> str:
    """SHA-256 over the source that decides what training computes."""
    root = Path(mnemodyn.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for part in ("data", "model", "pretrain") for p in (root / part).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _ema(decay: float):
    def average(averaged, current, n_averaged):
        # The average of a short run must not remember the initial weights: the decay rises to its value.
        weight = torch.clamp((1 + n_averaged) / (10 + n_averaged), max=decay)
        return averaged * weight.to(averaged) + current * (1 - weight).to(averaged)

    return average


def _differences(there: dict, here: dict, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {str(a)[:16]} there, {str(b)[:16]} here")
    return found


def _prepare(folder: Path, identity: dict, restart: bool) -> Path | None:
    """The Lightning checkpoint to go on from, if any; the folder emptied of another run's files."""
    record, last = folder / "run.json", folder / "last.ckpt"
    if record.is_file() and not restart:
        try:
            there = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResumeError(f"{record}: damaged ({error}); delete {folder} or pass restart=True") from error
        different = _differences(there["identity"], identity)
        if not different and last.is_file():
            return last
        if different and last.is_file() and not there["finished"]:
            raise ResumeError(
                f"{folder} holds an unfinished run of another configuration: {'; '.join(different[:6])}. "
                "Go on with that one, name another folder, or pass restart=True to give it up."
            )
    if folder.is_dir():
        for path in [*folder.glob("*.ckpt"), folder / "history.csv", record]:
            path.unlink(missing_ok=True)
        for name in ("best", "second"):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_json(record, {"identity": identity, "finished": False})
    return None


def pretrain(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    *,
    model: ModelConfig,
    objective: Masked,
    training: TrainingConfig,
    scaling: Scaling | None = None,
    restart: bool = False,
    accelerator: str = "auto",
) -> tuple[Checkpoint, list[dict]]:
    """Pretrain a network on scans without labels.

    Parameters
    ----------
    train, validation : sequence of Scan
        Of different participants; the validation scans choose the checkpoint.
    folder : str or Path
        Gets ``history.csv``, the Lightning checkpoints, and the two best as ``best/`` and ``second/``. An
        interrupted run of the same configuration, data and code goes on from its last epoch.
    model : ModelConfig
    objective : Masked
    training : TrainingConfig
    scaling : Scaling, optional
        Fitted here, on the training scans.
    restart : bool
        Give up an unfinished run in `folder`.
    accelerator : str
        Lightning's: ``auto``, ``cpu``, ``gpu``.

    Returns
    -------
    checkpoint : Checkpoint
        The best by validation R2 on hidden entries.
    history : list of dict
        A row an epoch: ``epoch, train_loss, val_r2_hidden, val_r2_visible``.

    Raises
    ------
    DataError
        If a participant is in both sets, or scans do not fit the configuration.
    ResumeError
        If `folder` holds an unfinished run of another configuration.
    """
    folder = Path(folder)
    both = {s.participant_id for s in train} & {s.participant_id for s in validation}
    if both:
        raise DataError(f"participants in both training and validation: {sorted(both)}")
    for scan in (*train, *validation):
        if scan.parcels != train[0].parcels:
            raise DataError(f"{scan.source}: parcels differ from those of {train[0].source}")
        if scan.n_frames < model.n_timepoints or len(scan.parcels) != model.n_parcels:
            raise DataError(
                f"{scan.source}: expected at least {model.n_timepoints} frames of {model.n_parcels} "
                f"parcels, got {scan.values.shape}"
            )
    scaling = (scaling or Scaling()).fit(train)
    identity = {
        "model": model.to_dict(),
        "objective": objective.to_dict(),
        "training": training.to_dict(),
        "scaling": scaling.to_dict(),
        "data": {"train": fingerprint(train), "validation": fingerprint(validation)},
        "code": _code_digest(),
        "torch": torch.__version__,
    }
    last = _prepare(folder, identity, restart)

    torch.manual_seed(training.seed)
    scaled = [[(scaling(s), s.t_r) for s in scans] for scans in (train, validation)]
    module = Pretraining(MnemoDyn(model).fit_front([x for x, _ in scaled[0]]), objective, training)
    random = RandomWindows(scaled[0], model.n_timepoints, objective, training.seed)
    # The masks of validation must not follow the seed of a run, or runs could not be compared.
    fixed = FixedWindows(scaled[1], model.n_timepoints, objective, seed=0)
    history = History(folder / "history.csv", epochs=training.epochs, bar=_someone_is_watching())
    best = ModelCheckpoint(
        folder,
        "{epoch:03d}-{" + METRIC + ":.4f}",
        monitor=METRIC,
        mode="max",
        save_top_k=2,
        enable_version_counter=False,
    )
    callbacks = [
        WeightAveraging(avg_fn=_ema(training.ema_decay)),
        history,
        EarlyStopping(METRIC, mode="max", patience=training.patience),
        best,
        # Comes after the best list, so that the state it saves holds it.
        ModelCheckpoint(folder, "last", save_top_k=1, enable_version_counter=False),
    ]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=training.epochs,
            callbacks=callbacks,
            logger=False,
            gradient_clip_val=training.clip,
            deterministic=True,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            module,
            DataLoader(random, training.batch_size, sampler=Draws(training.windows_per_epoch)),
            DataLoader(fixed, training.batch_size),
            ckpt_path=last,
            weights_only=True,
        )
    ranked = sorted(best.best_k_models.items(), key=lambda item: -float(item[1]))
    for name, (path, score) in zip(("best", "second"), ranked, strict=False):
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network = MnemoDyn(model)
        network.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
        record = {
            "objective": objective.to_dict(),
            "settings": training.to_dict(),
            "train_participants": sorted({s.participant_id for s in train}),
            "validation_participants": sorted({s.participant_id for s in validation}),
            METRIC: float(score),
        }
        save_checkpoint(
            folder / name,
            Checkpoint(network, train[0].parcels, train[0].t_r, scaling, identity["data"]["train"], record),
        )
    write_json(folder / "run.json", {"identity": identity, "finished": True})
    return load_checkpoint(folder / "best"), history.rows
