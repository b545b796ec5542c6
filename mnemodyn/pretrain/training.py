"""The one trainer: resumable after every epoch, on one device or many.

:func:`pretrain` trains the network, :func:`pretrain_rival` another module on the same windows, and
:func:`pretrain_several` compares seeds and learning rates. All end in :func:`fit`, which is the only
training loop and takes any module with a loss.
"""

import copy
import io
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
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
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from mnemodyn.checkpoint import Checkpoint, from_pretrained, save_checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan, fingerprint
from mnemodyn.files import digest, write_bytes, write_json, write_text
from mnemodyn.model.front import Front
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.objectives import Objective, make_objective
from mnemodyn.pretrain.windows import (
    Draws,
    FixedWindows,
    RandomWindows,
    censored_frames,
    collate,
)
from mnemodyn.provenance import surroundings
from mnemodyn.settings import Machine, ModelConfig, Settings, TrainingConfig

__all__ = [
    "Fronts",
    "Learner",
    "ResumeError",
    "TrainingError",
    "fit",
    "pretrain",
    "pretrain_rival",
    "pretrain_several",
]

History = list[dict[str, Any]]

# Windows whose fills are kept in memory, at most: of 490 frames and 450 parcels, 3.5 GB.
FILLS_KEPT = 4096


class TrainingError(RuntimeError):
    """Training cannot go on; what it has reached is kept."""


class ResumeError(RuntimeError):
    """A folder holds an unfinished run of another configuration."""


def pretrain(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    settings: Settings | None = None,
    *,
    restart: bool = False,
    fronts: "Fronts | None" = None,
) -> tuple[Checkpoint, History]:
    """Pretrain a network on scans without labels.

    The network before its first step counts as epoch 0 and may be the one that is kept.

    Parameters
    ----------
    train, validation : sequence of Scan
        Of different participants; the validation scans choose the epoch. They may be read lazily, and
        differ in length and repetition time.
    folder : str or Path
        Gets the network as ``best/``, ``history.csv`` and ``run.json`` (settings, data, machine). Until
        the run is finished its files lie in ``unfinished/``; a finished run of other settings stays
        until then.
    settings : Settings, optional
        ``data`` is not read here: the scans are given.
    restart : bool
        Give up an unfinished run of other settings. Without it that is an error.
    fronts : Fronts, optional
        Front ends of the training scans, where they are fitted already.

    Returns
    -------
    checkpoint : Checkpoint
    history : list of dict
        One for each epoch: ``epoch``, ``train_loss`` (None in epoch 0), and the objective's scores, whose
        names begin with ``val_``.

    Raises
    ------
    DataError
        If a participant is in both sets, scans do not fit the settings, or a window holds NaN.
    ResumeError
        If `folder` holds an unfinished run of other settings or data.
    TrainingError
        If the loss is NaN or infinite, or a checkpoint cannot be written; earlier ones stay as they are.
    """
    run = _Run(folder, train, validation, settings or Settings())
    if run.finished():
        run.show()
    else:
        network = MnemoDyn(run.config())
        if network.front is None:
            fronts = None
        else:
            fronts = fronts or Fronts(train, run.scaling, run.settings.training)
            fronts.fit(network.front)
        history = run.fit(network, restart, fronts)
        record = {
            "objective": run.settings.objective.to_dict(),
            "settings": run.settings.to_dict(),
            **run.people,
            run.objective.monitor: max(row[run.objective.monitor] for row in history),
        }
        checkpoint = Checkpoint(
            network,
            train[0].parcels,
            float(train[0].t_r),
            run.scaling,
            run.identity["data"]["train"],
            record,
        )
        run.finish(history, lambda work: save_checkpoint(work / "best", checkpoint))
    return from_pretrained(run.folder / "best"), run.history()


def pretrain_rival(
    make: Callable[[], nn.Module],
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    settings: Settings | None = None,
    *,
    restart: bool = False,
) -> tuple[nn.Module, History]:
    """Train another network on the windows, masks and schedule that :func:`pretrain` would use.

    Parameters
    ----------
    make : callable
        Returns the network, untrained; it is called after the seed is set. Its ``forward(x, t_r, *,
        hidden)`` returns a reconstruction (batch, time, parcel), or an object that has one as
        ``reconstruction``. It must take ``censored`` and ``lengths`` where the scans have them.
    train, validation, folder, settings, restart
        See :func:`pretrain`; ``settings.model`` gives no more than the frames of a window.

    Returns
    -------
    network : Module
        In evaluation mode, on the CPU.
    history : list of dict

    Examples
    --------
    ::

        make = functools.partial(PatchTransformer, n_parcels, n_timepoints, width=64, n_layers=4)
        network, history = pretrain_rival(make, train, validation, folder, settings)
    """
    run = _Run(folder, train, validation, settings or Settings())
    network = make()
    run.identity["network"] = digest(repr(network), dict(network.state_dict()))
    if run.finished():
        run.show()
    else:
        history = run.fit(network, restart, None)
        weights = network.state_dict()
        run.finish(history, lambda work: _save(weights, work / "best" / "weights.pt"))
    network.load_state_dict(torch.load(run.folder / "best" / "weights.pt", weights_only=True))
    return network.eval(), run.history()


def pretrain_several(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    settings: Settings | None = None,
    *,
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = (),
    make: Callable[[], nn.Module] | None = None,
) -> tuple[list, pd.DataFrame]:
    """Train one network for each seed and learning rate, and keep the rate that is best on validation people.

    Parameters
    ----------
    train, validation, folder, settings
        See :func:`pretrain`; each run has a folder of its own in `folder`.
    seeds : sequence of int
    rates : sequence of float, optional
        Learning rates to try, in place of that of the settings.
    make : callable, optional
        Makes a rival: see :func:`pretrain_rival`.

    Returns
    -------
    networks : list of Checkpoint, or of Module for a rival
        Those of the best rate, in the order of the seeds.
    table : DataFrame
        A row for each run: ``rate``, ``seed``, ``epoch`` (the one kept), ``score`` (validation), ``kept``.
    """
    settings = settings or Settings()
    monitor = make_objective(settings.objective).monitor
    # All runs share the front ends, which do not depend on the seed.
    fronts = Fronts(train, Scaling(settings.scaling).fit(train), settings.training)
    networks: dict[float, list] = {}
    rows = []
    for rate in rates or (settings.training.learning_rate,):
        for seed in seeds:
            one = settings.updated({"training.learning_rate": rate, "training.seed": seed})
            place = Path(folder) / f"rate-{rate:g}-seed-{seed}"
            trained: Any
            if make is None:
                trained, history = pretrain(train, validation, place, one, fronts=fronts)
            else:
                trained, history = pretrain_rival(make, train, validation, place, one)
            networks.setdefault(rate, []).append(trained)
            best = max(history, key=lambda row: row[monitor])
            rows.append(
                {"rate": rate, "seed": seed, "epoch": best["epoch"], "score": best[monitor]}
            )
    table = pd.DataFrame(rows)
    kept = table.groupby("rate")["score"].mean().idxmax()
    table["kept"] = table["rate"] == kept
    return networks[kept], table


class Fronts:
    """The front ends of a training: one for each fold of participants, fitted to the others.

    A front end has seen the people it was fitted to, and fills new ones less well. So that the blocks
    learn to correct what they will meet, a training window is filled by a front end that has not seen its
    participant. Validation, and the network that is saved, have the one fitted to all training scans.
    """

    # The number of the front end that is fitted to all training scans.
    ALL = -1

    def __init__(self, scans: Sequence[Scan], scaling: Scaling, training: TrainingConfig):
        """Nothing is fitted before :meth:`fit`."""
        self.scaled = _Scaled(scans, scaling)
        self.kept: dict[str, Tensor] = {}
        self.fronts: list[Front] = []
        people = [scan.participant_id for scan in scans]
        names = sorted(set(people))
        self.n_folds = min(training.cross_fit, len(names))
        if self.n_folds < 2:
            self.n_folds = 0
            self.folds = [self.ALL] * len(people)
        else:
            number = {name: i % self.n_folds for i, name in enumerate(names)}
            self.folds = [number[name] for name in people]

    def fit(self, front: Front) -> None:
        """Fit all front ends like `front`, if that is not done yet, and `front` itself to all scans."""
        if not self.fronts:
            for fold in [*range(self.n_folds), self.ALL]:
                rows = [i for i, of in enumerate(self.folds) if of != fold or fold == self.ALL]
                fitted = copy.deepcopy(front)
                fitted.fit(_Scaled(self.scaled.scans, self.scaled.scaling, rows))
                self.fronts.append(fitted)
        front.load_state_dict(self.fronts[self.ALL].state_dict())

    def run(
        self,
        network: nn.Module,
        x: Tensor,
        t_r: Tensor,
        *,
        folds: Tensor,
        keep: bool,
        hidden: Tensor | None = None,
        censored: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Any:
        """The network's output for a batch whose windows belong to `folds`; with `keep` fills are remembered."""
        known = {"hidden": hidden, "censored": censored, "lengths": lengths}
        unseen = hidden
        if censored is not None:
            lost = censored[..., None].expand_as(x)
            unseen = lost if hidden is None else hidden | lost
        if unseen is None:
            return network(x, t_r, **known)
        x = x.masked_fill(unseen, 0)
        filled = x.clone()
        n_frames = torch.full_like(folds, x.shape[1]) if lengths is None else lengths
        for fold, n in sorted(set(zip(folds.tolist(), n_frames.tolist(), strict=True))):
            rows = ((folds == fold) & (n_frames == n)).nonzero()[:, 0]
            filled[rows, :n] = self._fill(fold, x[rows, :n], unseen[rows, :n], keep)
        return network(x, t_r, filled=filled, **known)

    @torch.no_grad()
    def _fill(self, fold: int, x: Tensor, unseen: Tensor, keep: bool) -> Tensor:
        """What the front end of a fold makes of windows."""
        front = self.fronts[fold].to(x.device)
        if not keep:
            return front(x, unseen)
        filled = []
        # One by one, so that a fill does not depend on which others were kept before it.
        for one, where in zip(x, unseen, strict=True):
            key = digest(fold, one, where)
            found = self.kept.get(key)
            if found is None:
                found = front(one[None], where[None])[0]
                if len(self.kept) < FILLS_KEPT:
                    self.kept[key] = found.cpu()
            filled.append(found.to(x.device))
        return torch.stack(filled)


class _Scaled(Sequence):
    """Scaled scans (time, parcel) with NaN in censored frames, each made when it is asked for."""

    def __init__(self, scans: Sequence[Scan], scaling: Scaling, rows: Sequence[int] | None = None):
        self.scans = scans
        self.scaling = scaling
        self.rows = range(len(scans)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        scan = self.scans[self.rows[i]]
        return np.where(censored_frames(scan)[:, None], np.nan, self.scaling(scan))


class _Run:
    """A run and its files. Those of a finished one are replaced when the next is finished, not before."""

    def __init__(
        self,
        folder: str | Path,
        train: Sequence[Scan],
        validation: Sequence[Scan],
        settings: Settings,
    ):
        """Check the scans, and set the seed for what is made next."""
        self.folder = Path(folder)
        self.work = self.folder / "unfinished"
        self.settings = settings
        self.objective = make_objective(settings.objective)
        self.train = train
        self.validation = validation
        self.people = {
            "train_participants": _people(train, train[0]),
            "validation_participants": _people(validation, train[0]),
        }
        both = set.intersection(*(set(people) for people in self.people.values()))
        if both:
            raise DataError(f"participants in both training and validation: {sorted(both)}")
        described = settings.to_dict()
        del described["machine"], described["data"]
        self.identity: dict[str, Any] = {
            "settings": described,
            "data": {"train": _fingerprint(train), "validation": _fingerprint(validation)},
            "torch": torch.__version__,
        }
        torch.manual_seed(settings.training.seed)

    @cached_property
    def scaling(self) -> Scaling:
        return Scaling(self.settings.scaling).fit(self.train)

    def config(self) -> ModelConfig:
        """The settings of the network, with the number of parcels that the scans have."""
        n_parcels = len(self.train[0].parcels)
        asked = asdict(self.settings.model)  # type: ignore[call-overload]
        if asked.setdefault("n_parcels", n_parcels) != n_parcels:
            raise DataError(
                f"{self.train[0].source}: expected {asked['n_parcels']} parcels, got {n_parcels}"
            )
        return ModelConfig(**asked)

    def finished(self) -> bool:
        """Whether the folder holds this very run, finished."""
        return not self._differences(self.folder) and (self.folder / "best").is_dir()

    def _differences(self, folder: Path) -> list[str]:
        """What tells the run in a folder from this one; empty where they are the same."""
        record = folder / "run.json"
        if not record.is_file():
            return ["there is none"]
        try:
            there = json.loads(record.read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError) as error:
            raise ResumeError(f"{record}: damaged ({error}); delete {folder}") from error
        return _differences(there, self.identity)

    def fit(self, network: nn.Module, restart: bool, fronts: Fronts | None) -> History:
        """Train, or go on; a ResumeError if the folder holds an unfinished run that is another."""
        different = self._differences(self.work)
        if different and (self.work / "last.ckpt").is_file() and not restart:
            raise ResumeError(
                f"{self.folder} holds an unfinished run of another configuration: "
                f"{'; '.join(different[:6])}. Go on with that one, name another folder, or give it "
                "up with --restart (restart=True)."
            )
        if _is_first():
            if different:
                shutil.rmtree(self.work, ignore_errors=True)
            for path in self.work.glob(".*.tmp"):
                path.unlink()
            write_json(self.work / "run.json", {"identity": self.identity})
        return fit(
            network,
            self.objective,
            *self.windows(fronts),
            self.settings.training,
            self.settings.machine,
            folder=self.work,
            fronts=fronts,
        )

    def windows(self, fronts: Fronts | None) -> tuple[RandomWindows, FixedWindows]:
        """Training and validation windows."""
        training = self.settings.training
        shared = (self.scaling, self.objective, self.settings.model.n_timepoints)
        seed = training.seed if training.fresh_windows else 0
        known = everybody = None
        if fronts is not None:
            known = fronts.folds
            everybody = [Fronts.ALL] * len(self.validation)
        seconds = training.window_seconds
        # The views of validation must not follow the seed of a run, or runs could not be compared.
        return (
            RandomWindows(self.train, *shared, seed, seconds=seconds, folds=known),
            FixedWindows(self.validation, *shared, 0, seconds=seconds, folds=everybody),
        )

    def finish(self, history: History, save: Callable[[Path], object]) -> None:
        """Save the network by ``save(folder)``, and put this run in the place of the one before."""
        if _is_first():
            save(self.work)
            about = {
                "identity": self.identity,
                "history": history,
                "machine": asdict(self.settings.machine),  # type: ignore[call-overload]
                "ran_on": surroundings(),
            }
            write_json(self.work / "run.json", about)
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            # The record last: it says that the rest is there.
            for name in ("best", "history.csv", "run.json"):
                os.replace(self.work / name, self.folder / name)
            shutil.rmtree(self.work)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def history(self) -> History:
        """Rows of the finished run, as fit returned them."""
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["history"]

    def show(self) -> None:
        """Print the lines of the finished run, as they were when it ran."""
        for row in self.history():
            print(_line(row, self.objective, self.settings.training))


def _people(scans: Sequence[Scan], first: Scan) -> list[str]:
    """The participants of scans; a DataError where a scan has other parcels than the first."""
    found = set()
    for scan in scans:
        found.add(scan.participant_id)
        if scan.parcels != first.parcels:
            raise DataError(f"{scan.source}: parcels differ from those of {first.source}")
    return sorted(found)


def _fingerprint(scans: Sequence[Scan]) -> str:
    """Digest of the content of scans, which a collection knows."""
    return getattr(scans, "fingerprint", None) or fingerprint(scans)


def _differences(there: dict, here: dict) -> list[str]:
    """What differs between two nested mappings, by dotted name."""
    old, new = (pd.json_normalize(one).iloc[0].to_dict() for one in (there, here))
    found = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            found.append(
                f"{name} is {str(old.get(name))[:16]} there, {str(new.get(name))[:16]} here"
            )
    return found


def _is_first() -> bool:
    """Whether this process is the first of those that train together, which writes the files."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _save(content: Any, path: Path) -> None:
    """Write tensors whole."""
    stream = io.BytesIO()
    torch.save(content, stream)
    write_bytes(path, stream.getbuffer())


def fit(
    network: nn.Module,
    objective: Objective,
    windows: Dataset,
    validation: Dataset,
    training: TrainingConfig,
    machine: Machine | None = None,
    *,
    folder: str | Path | None = None,
    fronts: Fronts | None = None,
) -> History:
    """Train a module, and leave it with the averaged weights that are best on validation: the one loop.

    Parameters
    ----------
    network : Module
        Called by the objective alone; trained in place, and left on the CPU in evaluation mode.
    objective : Objective
        Anything with the methods of :class:`~mnemodyn.pretrain.objectives.Objective` that need no
        view: ``loss``, ``sums``, ``scores`` and ``monitor``.
    windows : Dataset
        Item i is draw i: a dict of tensors and text, with ``scan`` for messages and ``x`` (time, parcel).
        Needs no length.
    validation : Dataset
        With a length.
    training : TrainingConfig
    machine : Machine, optional
    folder : str or Path, optional
        Gets ``history.csv`` and ``last.ckpt`` after every epoch; training goes on from that one. None
        for short trainings that need not resume.
    fronts : Fronts, optional
        See :func:`pretrain`.

    Returns
    -------
    list of dict
        A row for each epoch, with 0 for the module as it was given.

    Examples
    --------
    Fine-tuning: an objective whose ``loss`` compares ``network(batch["x"], batch["t_r"])`` with
    ``batch["y"]``, and windows that add ``y``::

        class Labelled(RandomWindows):
            def cut(self, which, start, seed, *, training):
                item = super().cut(which, start, seed, training=training)
                return {**item, "y": self.y[which]}

        history = fit(network, objective, windows, validation, TrainingConfig(epochs=5))
    """
    machine = machine or Machine()
    last = None if folder is None else Path(folder) / "last.ckpt"
    record = Record(objective, training, last)
    resumed = last is not None and last.is_file()
    if resumed:
        record.load_state_dict(_callback_state(last, record))
    if not (resumed and record.is_over()):
        if machine.recompute:
            _recompute(network)
        learner = Learner(network, objective, training, fronts)
        batches = Batches(windows, validation, training, machine.workers)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            trainer = _trainer(training, machine, record)
            start = last if resumed else None
            trainer.fit(learner, batches, ckpt_path=start, weights_only=True)
        if last is not None:
            # From the file: where training ran in other processes, their callbacks are not this one.
            record.load_state_dict(_callback_state(last, record))
    assert record.best is not None
    network.load_state_dict(record.best["weights"])
    network.cpu().eval()
    return record.rows


def _callback_state(path: Path | None, record: "Record") -> dict:
    """What the record of a run has written into a checkpoint."""
    content = torch.load(cast(Path, path), map_location="cpu", weights_only=True)
    return content["callbacks"][record.state_key]


def _recompute(network: nn.Module) -> None:
    """Make the blocks of a network compute again in the backward pass instead of keeping what is inside."""
    for block in cast(Any, network).blocks:
        block.forward = partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
        )


def _trainer(training: TrainingConfig, machine: Machine, record: "Record") -> Trainer:
    """Lightning's trainer: the loop over epochs and steps, devices and processes, and precision."""
    return lightning.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.nodes,
        strategy=machine.strategy,
        precision=training.precision,
        accumulate_grad_batches=training.accumulate,
        max_epochs=training.epochs,
        callbacks=[record],
        plugins=[WholeFiles()],
        logger=False,
        gradient_clip_val=training.clip,
        deterministic=True,
        use_distributed_sampler=False,
        # All of validation before the first step: that is epoch 0.
        num_sanity_val_steps=-1,
        enable_checkpointing=False,
        enable_progress_bar=_someone_is_watching(),
        enable_model_summary=False,
    )


class Learner(lightning.LightningModule):
    """A network, an objective and an optimiser."""

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        training: TrainingConfig,
        fronts: Fronts | None = None,
    ):
        super().__init__()
        self.objective = objective
        self.training_config = training
        self.fronts = fronts
        self.core: Any = nn.ModuleDict({"network": network, "parts": objective.parts(network)})
        self.averaged: Any = None
        if training.ema_decay:
            average = partial(_average, decay=training.ema_decay)
            self.averaged = AveragedModel(self.core, avg_fn=average)
            self.averaged.requires_grad_(False)
        self.scores: dict[str, float] = {}
        self.train_loss: float | None = None
        self._sums: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []

    @property
    def validated(self) -> Any:
        """Network and parts as they are validated and kept."""
        return self.core if self.averaged is None else self.averaged.module

    def _reader(self, core: Any, *, keep: bool) -> Any:
        """The network as the objective calls it, its hidden entries filled by the front end of each fold."""
        if self.fronts is None:
            return core["network"]
        return partial(self.fronts.run, core["network"], keep=keep)

    def on_train_epoch_start(self) -> None:
        self._losses.clear()

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Whatever is random in a step depends on the step alone, so that a resumed run draws what it
        # would have drawn.
        place = [self.training_config.seed, self.global_step, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: dict, _: int) -> Tensor:
        keep = not self.training_config.fresh_windows
        network = self._reader(self.core, keep=keep)
        terms = self.objective.loss(network, batch, self.core["parts"])
        totals = torch.stack([total for total, _ in terms.values()])
        counts = torch.stack([count.to(totals) for _, count in terms.values()])
        # Means over the joined batch, though the processes may count unequally many entries.
        joined = torch.cat([counts, totals.detach()])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(joined)
        counts, sums = joined.chunk(2)
        counts = counts.clamp_min(1)
        value = (sums / counts).sum()
        if not value.isfinite():
            self._refuse(value, batch)
        self._losses.append(value)
        # Gradients are averaged over the processes.
        return (totals * (self.trainer.world_size / counts)).sum()

    def _refuse(self, value: Tensor, batch: dict) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        raise TrainingError(
            f"the loss is {value.item()} at step {self.global_step} (learning rate {rate:.2g}), in a "
            f"batch of {', '.join(sorted(set(batch['scan'])))}. Look at these scans; where they are "
            "sound, take a smaller learning_rate"
        )

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        self.objective.after_step(self.core["network"], self.core["parts"])
        if self.averaged is not None:
            self.averaged.update_parameters(self.core)

    def validation_step(self, batch: dict, _: int) -> None:
        network = self._reader(self.validated, keep=True)
        sums = self.objective.sums(network, batch, self.validated["parts"])
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            for value in self._sums.values():
                torch.distributed.all_reduce(value)
        self.train_loss = None
        if self._losses:
            self.train_loss = float(torch.stack(self._losses).cpu().mean())
        self.scores = {}
        for name, score in self.objective.scores(self._sums).items():
            self.scores[f"val_{name}"] = score
        self._sums.clear()

    def configure_optimizers(self) -> Any:
        training = self.training_config
        groups: dict[bool, list] = {True: [], False: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and not name.endswith("bias")
                groups[decays].append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": training.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=training.learning_rate,
            betas=(0.9, 0.95),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of(training))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _average(averaged, current, n_averaged, decay: float):
    """The moving average of weights, whose decay rises to its value: a short run forgets where it began."""
    weight = torch.clamp((1 + n_averaged) / (10 + n_averaged), max=decay)
    return averaged * weight.to(averaged) + current * (1 - weight).to(averaged)


def rate_of(training: TrainingConfig) -> Callable[[int], float]:
    """The learning rate at a step, as a share of its peak."""
    steps = math.ceil(training.windows_per_epoch / training.batch_size)
    total = training.epochs * steps
    warmup = max(1, round(training.warmup_share * total))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        step -= warmup
        cycle = total - warmup
        if training.schedule == "restarts":
            cycle = training.restart_epochs * steps
            while step >= cycle:
                step -= cycle
                cycle *= training.restart_factor
        return max(0.01, 0.5 * (1 + math.cos(math.pi * step / max(1, cycle))))

    return rate


class Batches(lightning.LightningDataModule):
    """Batches of windows: those of this process, from the epoch that training has come to."""

    def __init__(self, train: Dataset, validation: Dataset, training: TrainingConfig, workers: int):
        super().__init__()
        self.train = train
        self.validation = validation
        self.training = training
        self.workers = workers

    def train_dataloader(self) -> DataLoader:
        trainer = cast(Trainer, self.trainer)
        n = self.training.windows_per_epoch
        steps = math.ceil(n / self.training.batch_size)
        draws = Draws(
            n,
            self.training.batch_size,
            lambda: trainer.global_step // steps,
            fresh=self.training.fresh_windows,
            seed=self.training.seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
            parts=self.training.accumulate,
        )
        return self._loader(self.train, draws)

    def val_dataloader(self) -> DataLoader:
        trainer = cast(Trainer, self.trainer)
        world = trainer.world_size
        n = len(self.validation)  # type: ignore[arg-type]
        mine = range(trainer.global_rank, n, world)
        if not mine:
            raise DataError(f"each process must have a validation window, got {n} for {world}")
        size = -(-self.training.batch_size // (world * self.training.accumulate))
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        return self._loader(self.validation, batches)

    def _loader(self, windows: Dataset, batches: Any) -> DataLoader:
        return DataLoader(
            windows, batch_sampler=batches, collate_fn=collate, num_workers=self.workers
        )


class WholeFiles(TorchCheckpointIO):
    """Checkpoints are written whole or not at all, so that a full disk or a kill costs no earlier one.

    Lightning's own way writes elsewhere and moves, which is not atomic from one file system to another.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        try:
            _save(checkpoint, Path(path))
        except OSError as error:
            if Path(path).is_file():
                remedy = "The one before it is whole: make room, and the same call goes on from it"
            else:
                remedy = "There is none before it: make room, and start again"
            raise TrainingError(
                f"{path}: this checkpoint could not be written ({error.strerror or error}). {remedy}"
            ) from error


class Record(Callback):
    """A row for each epoch, and the best weights so far; kept in the checkpoint, with ``history.csv`` beside it.

    A resumed run shows the lines it resumes from first, so its output is that of a run never interrupted.
    """

    def __init__(self, objective: Objective, training: TrainingConfig, last: Path | None):
        self.objective = objective
        self.training = training
        self.last = last
        self.rows: History = []
        self.best: dict[str, Any] | None = None

    def state_dict(self) -> dict:
        return {"rows": self.rows, "best": self.best}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = list(state_dict["rows"])
        self.best = state_dict["best"]

    def is_over(self) -> bool:
        """Whether all epochs are done, or too many without a better score."""
        epoch = self.rows[-1]["epoch"]
        waited = epoch - cast(dict, self.best)["epoch"]
        return epoch >= self.training.epochs or 0 < waited >= self.training.patience

    def on_fit_start(self, trainer, pl_module) -> None:
        for row in self.rows:
            self._say(row, pl_module)

    def on_sanity_check_end(self, trainer, pl_module) -> None:
        self._add(0, trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking:
            return
        self._add(trainer.current_epoch + 1, trainer, pl_module)
        if self.last is not None:
            trainer.save_checkpoint(self.last)
        trainer.should_stop = self.is_over()

    def _add(self, epoch: int, trainer, pl_module) -> None:
        row = {"epoch": epoch, "train_loss": pl_module.train_loss, **pl_module.scores}
        self.rows.append(row)
        score = row[self.objective.monitor]
        if self.best is None or score > self.best["score"]:
            state = pl_module.validated["network"].state_dict()
            weights = {name: value.detach().cpu().clone() for name, value in state.items()}
            self.best = {"epoch": epoch, "score": score, "weights": weights}
        if trainer.is_global_zero and self.last is not None:
            table = pd.DataFrame(self.rows)
            write_text(
                self.last.with_name("history.csv"), table.to_csv(index=False, lineterminator="\n")
            )
        self._say(row, pl_module)

    def _say(self, row: dict, pl_module) -> None:
        # Of the first process, and above the bar where there is one.
        pl_module.print(_line(row, self.objective, self.training))
        sys.stdout.flush()


def _line(row: dict, objective: Objective, training: TrainingConfig) -> str:
    """What is shown of an epoch."""
    known = {k.removeprefix("val_"): v for k, v in row.items() if k.startswith("val_")}
    loss = "     -" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
    scores = "  ".join(f"{name} {value:.4f}" for name, value in known.items())
    line = f"epoch {row['epoch']:3d}/{training.epochs}  train loss {loss}  validation {scores}"
    warning = objective.warning(known)
    return f"{line}\n  warning: {warning}" if warning else line


def _someone_is_watching() -> bool:
    """Whether to show a bar: at a terminal and in a notebook opened by a person, not in an executed one or a log."""
    if os.environ.get("MNEMODYN_HEADLESS"):
        return False
    # Jupyter servers and VS Code name the document they started a kernel for; papermill does not.
    in_notebook = "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ
    return sys.stdout.isatty() or ("ipykernel" in sys.modules and in_notebook)
