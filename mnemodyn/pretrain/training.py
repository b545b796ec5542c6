"""Training with Lightning: resumable at any step, on one device or many, the two best checkpoints kept."""

import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import pandas as pd
import torch
import torch.distributed
import torch.utils.checkpoint
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

import mnemodyn
from mnemodyn.checkpoint import Checkpoint, from_pretrained, save_checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan, fingerprint
from mnemodyn.files import write_bytes, write_json, write_text
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.config import Machine, TrainingConfig
from mnemodyn.pretrain.objective import Objective
from mnemodyn.pretrain.windows import (
    Draws,
    FixedWindows,
    RandomWindows,
    Windows,
    censored_frames,
    collate,
)
from mnemodyn.provenance import surroundings

__all__ = ["Machine", "Pretraining", "ResumeError", "TrainingConfig", "TrainingError", "pretrain"]


class TrainingError(RuntimeError):
    """Training cannot go on; what it has reached is kept."""


class ResumeError(RuntimeError):
    """A folder holds an unfinished run of another configuration."""


class Pretraining(lightning.LightningModule):
    """A network, an objective and an optimiser. Logs the training loss and the objective's validation scores."""

    def __init__(self, model: MnemoDyn, objective: Objective, config: TrainingConfig):
        super().__init__()
        self.model, self.objective, self.config = model, objective, config
        self.parts = objective.parts(model)
        self.scores: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Whatever is random in a step depends on the step alone, so that a resumed run draws what it would have drawn.
        place = [self.config.seed, self.global_step, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        terms = self.objective.loss(self.model, batch, self.parts)
        totals = torch.stack([total for total, _ in terms.values()])
        counts = torch.stack([count.to(totals) for _, count in terms.values()])
        joined = torch.cat([counts, totals.detach()])
        if (
            self.trainer.world_size > 1
        ):  # means over the joined batch, though its parts may count unequally many
            torch.distributed.all_reduce(joined)
        counts, sums = joined.chunk(2)
        counts = counts.clamp_min(1)
        value = (sums / counts).sum()
        if not value.isfinite():
            rate, scans = (
                self.trainer.optimizers[0].param_groups[0]["lr"],
                ", ".join(sorted(set(batch["scan"]))),
            )
            raise TrainingError(
                f"the loss is {value.item()} at step {self.global_step} (learning rate {rate:.2g}), in a batch of "
                f"{scans}. Look at these scans; where they are sound, take a smaller learning_rate"
            )
        self._losses.append(value)
        # Gradients are averaged over the processes.
        return (totals * (self.trainer.world_size / counts)).sum()

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.objective.after_step(self.model, self.parts)

    def on_train_epoch_start(self) -> None:
        self._losses.clear()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["losses"] = [float(loss) for loss in self._losses]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._losses = [torch.tensor(loss) for loss in checkpoint["losses"]]

    def validation_step(self, batch: dict, _: int) -> None:
        for name, value in self.objective.sums(self.model, batch, self.parts).items():
            self._sums[name] = self._sums.get(name, 0) + value

    def on_validation_epoch_end(self) -> None:
        joined = torch.cat([value.reshape(-1) for value in self._sums.values()])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(joined)
        parts = joined.split([value.numel() for value in self._sums.values()])
        sums = {
            k: part[0] if len(part) == 1 else part
            for k, part in zip(self._sums, parts, strict=True)
        }
        self._sums.clear()
        self.scores = {f"val_{name}": value for name, value in self.objective.scores(sums).items()}
        if self._losses:
            self.scores = {
                "train_loss": float(torch.stack([x.cpu() for x in self._losses]).mean()),
                **self.scores,
            }
        self.log_dict(self.scores)

    def configure_optimizers(self) -> Any:
        config = self.config
        decays = {
            n: p.ndim > 1 and not n.endswith("bias")
            for n, p in self.named_parameters()
            if p.requires_grad
        }
        groups: list[dict] = [
            {
                "params": [self.get_parameter(n) for n, yes in decays.items() if yes == decay],
                "weight_decay": weight,
            }
            for decay, weight in ((True, config.weight_decay), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of(config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate_of(config: TrainingConfig) -> Callable[[int], float]:
    """The learning rate at a step, as a share of its peak."""
    steps = math.ceil(config.windows_per_epoch / config.batch_size)
    total = config.epochs * steps
    warmup = max(1, round(config.warmup_share * total))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        step, cycle = step - warmup, total - warmup
        if config.schedule == "restarts":
            cycle = config.restart_epochs * steps
            while step >= cycle:
                step, cycle = step - cycle, cycle * config.restart_factor
        return max(0.01, 0.5 * (1 + math.cos(math.pi * step / max(1, cycle))))

    return rate


class Batches(lightning.LightningDataModule):
    """Batches of windows: those of this process, from the step that training has come to."""

    def __init__(
        self, train: RandomWindows, validation: FixedWindows, config: TrainingConfig, workers: int
    ):
        super().__init__()
        self.train, self.validation, self.config, self.workers = train, validation, config, workers

    def train_dataloader(self) -> DataLoader:
        trainer, config = cast(Trainer, self.trainer), self.config
        place = {
            "rank": trainer.global_rank,
            "world": trainer.world_size,
            "parts": config.accumulate,
        }
        draws = Draws(
            config.windows_per_epoch, config.batch_size, lambda: trainer.global_step, **place
        )
        return self._loader(self.train, draws)

    def val_dataloader(self) -> DataLoader:
        trainer = cast(Trainer, self.trainer)
        mine, world = (
            range(trainer.global_rank, len(self.validation), trainer.world_size),
            trainer.world_size,
        )
        if not mine:
            raise DataError(
                f"each process must have a validation window, got {len(self.validation)} for {world}"
            )
        size = -(-self.config.batch_size // (world * self.config.accumulate))
        return self._loader(
            self.validation, [mine[i : i + size] for i in range(0, len(mine), size)]
        )

    def _loader(self, windows: Windows, batches) -> DataLoader:
        return DataLoader(
            windows, batch_sampler=batches, collate_fn=collate, num_workers=self.workers
        )


class WholeFiles(TorchCheckpointIO):
    """Checkpoints are written whole or not at all, so that a full disk or a kill costs no earlier one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        content, last = io.BytesIO(), Path(path).with_name("last.ckpt")
        torch.save(checkpoint, content)
        try:
            write_bytes(path, content.getbuffer())
        except OSError as error:
            kept = (
                f"{last} is whole: make room, and the same call goes on from it"
                if last.is_file()
                else "none is kept"
            )
            raise TrainingError(
                f"{path}: this checkpoint of {content.tell() / 2**20:.1f} MiB could not be written "
                f"({error.strerror or error}). Of the earlier ones {kept}"
            ) from error


class Last(ModelCheckpoint):
    """``last.ckpt``, at the end of every epoch and every so many steps within it.

    Comes after the best list among the callbacks, so that the state it saves holds it.
    """

    def __init__(self, folder: Path, every: int):
        super().__init__(folder, "last", save_top_k=1, enable_version_counter=False)
        self.every = every

    def on_train_batch_end(self, trainer, *_) -> None:
        step = trainer.global_step
        ends = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if (
            self.every
            and step % self.every == 0
            and step != self._last_global_step_saved
            and not ends
        ):
            self._last_global_step_saved = step
            trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt")


class History(Callback):
    """A row an epoch, kept in the checkpoint, written to ``history.csv``, and shown in a line of its own.

    A resumed run shows the lines it resumes from first, so its output is that of a run never interrupted.
    """

    def __init__(self, path: Path, objective: Objective, epochs: int):
        self.path, self.objective, self.epochs = path, objective, epochs
        self.rows: list[dict] = []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = list(state_dict["rows"])

    def on_fit_start(self, trainer, pl_module) -> None:
        for row in self.rows:
            self._say(row, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        row = {"epoch": trainer.current_epoch + 1, **pl_module.scores}
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        if trainer.is_global_zero:
            write_text(self.path, pd.DataFrame(self.rows).to_csv(index=False, lineterminator="\n"))
        self._say(row, pl_module)

    def _say(self, row: dict, pl_module) -> None:
        known = {k.removeprefix("val_"): v for k, v in row.items() if k.startswith("val_")}
        scores = "  ".join(f"{name} {value:.4f}" for name, value in known.items())
        line = f"epoch {row['epoch']:3d}/{self.epochs}  train loss {row['train_loss']:.4f}  validation {scores}"
        if warning := self.objective.warning(known):
            line += f"\n  warning: {warning}"
        pl_module.print(line)  # of the first process, and above the bar where there is one
        sys.stdout.flush()


def _someone_is_watching() -> bool:
    """Whether to show a bar: at a terminal and in a notebook opened by a person, not in an executed one or a log."""
    if os.environ.get("MNEMODYN_HEADLESS"):
        return False
    # Jupyter servers and VS Code name the document they started a kernel for; papermill and nbconvert do not.
    in_notebook = "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ
    return sys.stdout.isatty() or ("ipykernel" in sys.modules and in_notebook)


def _code_digest() -> str:
    """SHA-256 over the source that decides what training computes."""
    root = Path(mnemodyn.__file__).parent
    paths = sorted(p for part in ("data", "model", "pretrain") for p in (root / part).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _average(averaged, current, n_averaged, decay: float):
    # The average of a short run must not remember the initial weights: the decay rises to its value.
    weight = torch.clamp((1 + n_averaged) / (10 + n_averaged), max=decay)
    return averaged * weight.to(averaged) + current * (1 - weight).to(averaged)


def _differences(there: dict, here: dict, prefix: str = "") -> Iterator[str]:
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} is {str(a)[:16]} there, {str(b)[:16]} here"


def _prepare(folder: Path, identity: dict, facts: dict, restart: bool) -> Path | None:
    """The Lightning checkpoint to go on from, if any; the folder emptied of another run's files.

    Every process comes to the same answer, whether it looks before or after the first one has emptied the folder.
    """
    record, last = folder / "run.json", folder / "last.ckpt"
    found = None
    if record.is_file() and not restart:
        try:
            there = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            mend = f"delete {folder}, or give --restart (restart=True)"
            raise ResumeError(f"{record}: damaged ({error}); {mend}") from error
        different = list(_differences(there["identity"], identity))
        if not different and last.is_file():
            found = last
        elif different and last.is_file() and not there["finished"]:
            raise ResumeError(
                f"{folder} holds an unfinished run of another configuration: {'; '.join(different[:6])}. "
                "Go on with that one, name another folder, or give it up with --restart (restart=True)."
            )
    if getattr(rank_zero_only, "rank", 0) == 0:
        another = () if found else (*folder.glob("*.ckpt"), folder / "history.csv", record)
        for path in (*folder.glob(".*.tmp"), *another):
            path.unlink(missing_ok=True)
        for name in () if found else ("best", "second"):
            shutil.rmtree(folder / name, ignore_errors=True)
        write_json(record, {"identity": identity, "finished": False, **facts})
    return found


def pretrain(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    *,
    model: ModelConfig,
    objective: Objective,
    training: TrainingConfig,
    scaling: Scaling | None = None,
    restart: bool = False,
    machine: Machine | None = None,
) -> tuple[Checkpoint, list[dict]]:
    """Pretrain a network on scans without labels.

    Returns the best checkpoint by the objective's validation metric, and the history: a row an epoch, with ``epoch``,
    ``train_loss``, and the objective's scores, their names beginning with ``val_``.

    Parameters
    ----------
    train, validation : sequence of Scan
        Of different participants; the validation scans choose the checkpoint. They may be read lazily, and differ in
        length and repetition time.
    folder : str or Path
        Gets ``history.csv``, ``run.json`` (configuration, data, commit), the Lightning checkpoints, and the two best
        as ``best/`` and ``second/``. An interrupted run of the same configuration, data and code goes on from its last
        checkpoint, to the same weights; with `restart` an unfinished one is given up.
    model, objective, training, machine
        What is trained for what, how, and where.
    scaling : Scaling, optional
        Fitted here, on the training scans.

    Raises
    ------
    DataError
        If a participant is in both sets, scans do not fit the configuration, or a window holds NaN.
    ResumeError
        If `folder` holds an unfinished run of another configuration.
    TrainingError
        If the loss is NaN or infinite, or a checkpoint cannot be written; earlier checkpoints stay as they are.
    """
    folder, machine = Path(folder), machine or Machine()
    sides = {"train": train, "validation": validation}
    people = {name: {s.participant_id for s in scans} for name, scans in sides.items()}
    if both := people["train"] & people["validation"]:
        raise DataError(f"participants in both training and validation: {sorted(both)}")
    parcels = train[0].parcels
    for scan in itertools.chain(train, validation):
        if scan.parcels != parcels:
            raise DataError(f"{scan.source}: parcels differ from those of {train[0].source}")
    if len(parcels) != model.n_parcels:
        raise DataError(
            f"{train[0].source}: expected {model.n_parcels} parcels, got {len(parcels)}"
        )
    scaling = (scaling or Scaling()).fit(train)
    settings = (scaling, objective, model.n_timepoints)
    windows = RandomWindows(train, *settings, training.seed, seconds=training.window_seconds)
    # The views of validation must not follow the seed of a run, or runs could not be compared.
    fixed = FixedWindows(validation, *settings, 0, seconds=training.window_seconds)
    parts: dict[str, Any] = {
        "model": model,
        "objective": objective,
        "training": training,
        "scaling": scaling,
    }
    identity: dict[str, Any] = {name: part.to_dict() for name, part in parts.items()}
    identity["data"] = {
        name: getattr(s, "fingerprint", None) or fingerprint(s) for name, s in sides.items()
    }
    identity = json.loads(
        json.dumps(identity | {"code": _code_digest(), "torch": torch.__version__})
    )
    facts = {"machine": asdict(machine), "ran_on": surroundings()}
    last = _prepare(folder, identity, facts, restart)

    torch.manual_seed(training.seed)
    network = MnemoDyn(model)
    if network.front is not None:
        network.fit_front(_Scaled(train, scaling))
    if machine.recompute:
        for block in network.blocks:
            block.forward = partial(
                torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
            )
    module = Pretraining(network, objective, training)
    history = History(folder / "history.csv", objective, training.epochs)
    chosen: dict[str, Any] = {"monitor": objective.monitor, "mode": "max"}
    name = "{epoch:03d}-{" + objective.monitor + ":.4f}"
    best = ModelCheckpoint(folder, name, save_top_k=2, enable_version_counter=False, **chosen)
    average = (
        [WeightAveraging(avg_fn=partial(_average, decay=training.ema_decay))]
        if training.ema_decay
        else []
    )
    stop = EarlyStopping(patience=training.patience, **chosen)
    callbacks: list[Callback] = [
        *average,
        history,
        stop,
        best,
        Last(folder, machine.checkpoint_every),
    ]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.nodes,
            strategy=machine.strategy,
            precision=training.precision,
            accumulate_grad_batches=training.accumulate,
            max_epochs=training.epochs,
            callbacks=callbacks,
            plugins=[WholeFiles()],
            logger=_tensorboard(folder) if machine.tensorboard else False,
            gradient_clip_val=training.clip,
            deterministic=machine.deterministic,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=_someone_is_watching(),
            enable_model_summary=False,
        )
        trainer.fit(
            module,
            Batches(windows, fixed, training, machine.workers),
            ckpt_path=last,
            weights_only=True,
        )
    # From the file: where training ran in other processes, their callbacks are not these.
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["callbacks"]
    if trainer.is_global_zero:
        ranked = sorted(
            state[best.state_key]["best_k_models"].items(), key=lambda item: -float(item[1])
        )
        for name, (path, score) in zip(("best", "second"), ranked, strict=False):
            weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            network = MnemoDyn(model)
            network.load_state_dict(
                {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
            )
            record: dict[str, Any] = {
                "objective": objective.to_dict(),
                "settings": training.to_dict(),
            }
            record |= {f"{side}_participants": sorted(ids) for side, ids in people.items()}
            record |= {objective.monitor: float(score)}
            known = (parcels, train[0].t_r, scaling, identity["data"]["train"], record)
            save_checkpoint(folder / name, Checkpoint(network, *known))
        write_json(folder / "run.json", {"identity": identity, "finished": True, **facts})
    trainer.strategy.barrier()
    return from_pretrained(folder / "best"), state[history.state_key]["rows"]


class _Scaled(Sequence):
    """Scaled scans (time, parcel) with NaN in censored frames, each made when it is asked for."""

    def __init__(self, scans: Sequence[Scan], scaling: Scaling):
        self.scans, self.scaling = scans, scaling

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, i):
        scan = self.scans[i]
        return np.where(censored_frames(scan)[:, None], np.nan, self.scaling(scan))


def _tensorboard(folder: Path):
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ImportError as error:
        raise ImportError(
            "tensorboard=True needs TensorBoard: pip install 'mnemodyn[tensorboard]'"
        ) from error
