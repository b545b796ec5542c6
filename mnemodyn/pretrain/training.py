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
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, field
from functools import cached_property, partial
from operator import itemgetter
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
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Subset

from mnemodyn.checkpoint import (
    Checkpoint,
    CheckpointError,
    from_pretrained,
    read_tensors,
    save_checkpoint,
)
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan, fingerprint
from mnemodyn.files import digest, locked, remove, write_bytes, write_json, write_text
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
from mnemodyn.settings import Machine, ModelConfig, Settings, TrainingConfig, checked

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

DEFAULTS = Settings()

# Windows whose fills are kept in memory, at most: of 490 frames and 450 parcels, 3.5 GB.
FILLS_KEPT = 4096


class TrainingError(RuntimeError):
    """Training cannot go on; what it has reached is kept."""


class ResumeError(RuntimeError):
    """A folder holds a run that is damaged, or an unfinished one of another configuration."""


def pretrain(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    settings: Settings = DEFAULTS,
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
        If `folder` holds an unfinished run of other settings or data, or what it holds is damaged.
    CheckpointError
        If `folder` holds this run, finished, and its network is damaged.
    TrainingError
        If the loss or a validation score is NaN or infinite.
    RuntimeError
        If another training writes into `folder`.
    OSError
        If a checkpoint cannot be written. The one before it stays whole, and the same call goes on from it.
    """
    run = _Run(folder, train, validation, settings)
    if not run.finished():
        with run.alone():
            _pretrain(run, restart, fronts)
    try:
        return from_pretrained(run.folder / "best"), run.history()
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {run.again}") from error


def _pretrain(run: "_Run", restart: bool, fronts: "Fronts | None") -> None:
    """Train a network, and save it with what it was trained on."""
    network = MnemoDyn(run.config())
    if network.front is None or not run.objective.fills:
        fronts = None
    else:
        fronts = fronts or Fronts(run.train, run.scaling, run.settings.training)
        fronts.fit(network.front)
    history = run.fit(network, restart, fronts)
    record = {
        "objective": run.settings.objective.to_dict(),
        "settings": run.settings.to_dict(),
        **run.people,
        run.objective.monitor: max(row[run.objective.monitor] for row in history),
    }
    scan = run.train[0]
    content = run.identity["data"]["train"]
    checkpoint = Checkpoint(network, scan.parcels, float(scan.t_r), run.scaling, content, record)
    run.finish(history, lambda work: save_checkpoint(work / "best", checkpoint))


def pretrain_rival(
    make: Callable[[], nn.Module],
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    settings: Settings = DEFAULTS,
    *,
    restart: bool = False,
) -> tuple[nn.Module, History]:
    """Train another network on the windows, masks and schedule that :func:`pretrain` would use.

    Parameters
    ----------
    make : callable
        Returns the network, untrained; called after the seed is set. Its ``forward(x, t_r, *, hidden)``,
        with ``censored`` and ``lengths`` where scans have them, returns a reconstruction (batch, time,
        parcel), or an object that has one as ``reconstruction``.
    train, validation, folder, settings, restart
        See :func:`pretrain`; ``settings.model`` gives no more than the frames of a window.

    Returns
    -------
    network : Module
        In evaluation mode, on the CPU.
    history : list of dict
    """
    run = _Run(folder, train, validation, settings)
    network = make()
    run.identity["network"] = digest(repr(network), dict(network.state_dict()))
    if not run.finished():
        with run.alone():
            history = run.fit(network, restart, None)
            weights = network.state_dict()
            run.finish(history, lambda work: _save(weights, work / "best" / "weights.pt"))
    _load(run.folder / "best" / "weights.pt", run.again, network.load_state_dict)
    return network.eval(), run.history()


def pretrain_several(
    train: Sequence[Scan],
    validation: Sequence[Scan],
    folder: str | Path,
    settings: Settings = DEFAULTS,
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

    A front end fills people whom it has not seen less well, and new people are what the blocks will meet.
    A training window is therefore filled by one that has not seen its participant. Validation, and the
    network that is saved, have the one fitted to all training scans.
    """

    # The number of the front end that is fitted to all training scans.
    ALL = -1

    def __init__(self, scans: Sequence[Scan], scaling: Scaling, training: TrainingConfig):
        """Nothing is fitted before :meth:`fit`."""
        self.scans = scans
        self.scaling = scaling
        self.kept: dict[str, Tensor] = {}
        self.fronts: dict[int, Front] = {}
        people, number = np.unique([scan.participant_id for scan in scans], return_inverse=True)
        n_folds = min(training.cross_fit, len(people))
        self.folds = [self.ALL] * len(scans)
        if n_folds > 1:
            self.folds = (number % n_folds).tolist()

    def fit(self, front: Front) -> None:
        """Fit all front ends like `front`, if that is not done yet, and `front` itself to all scans."""
        if not self.fronts:
            for fold in {*self.folds, self.ALL}:
                rows = [i for i, of in enumerate(self.folds) if of != fold or fold == self.ALL]
                scaled = _Scaled(self.scans, self.scaling, rows)
                self.fronts[fold] = copy.deepcopy(front).fit(scaled)
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
        unseen = torch.zeros_like(x, dtype=torch.bool)
        if hidden is not None:
            unseen |= hidden
        if censored is not None:
            unseen |= censored[..., None]
        n_frames = torch.full_like(folds, x.shape[1]) if lengths is None else lengths
        groups = torch.stack([folds, n_frames], dim=1)
        filled = x.clone()
        for group in groups.unique(dim=0):
            rows = (groups == group).all(1)
            fold, n = group.tolist()
            filled[rows, :n] = self._fill(fold, x[rows, :n], unseen[rows, :n], keep)
        return network(x, t_r, hidden=hidden, censored=censored, lengths=lengths, filled=filled)

    @torch.no_grad()
    def _fill(self, fold: int, x: Tensor, unseen: Tensor, keep: bool) -> Tensor:
        """What the front end of a fold makes of windows."""
        front = self.fronts[fold].to(x.device)
        if not keep or not unseen.any():
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

    def __init__(self, scans: Sequence[Scan], scaling: Scaling, rows: Sequence[int]):
        self.scans = scans
        self.scaling = scaling
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        scan = self.scans[self.rows[i]]
        return np.where(censored_frames(scan)[:, None], np.nan, self.scaling(scan))


@checked
class _Record:
    """What ``run.json`` holds; of an unfinished run no more than the identity."""

    identity: dict
    history: list[dict] = field(default_factory=list)
    machine: dict = field(default_factory=dict)
    ran_on: dict = field(default_factory=dict)


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
        # What decides the result: not the machine, but the version of torch, which may draw otherwise.
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
        # The network itself refuses scans of another number, where the settings state one.
        n_parcels = len(self.train[0].parcels)
        return ModelConfig(**{"n_parcels": n_parcels, **self.settings.model.to_dict()})

    @property
    def again(self) -> str:
        """What to do where the files of a finished run are damaged."""
        return f"To train it again, delete {self.folder / 'run.json'}, or name another folder"

    def alone(self) -> AbstractContextManager:
        """Hold the folder, so that no other training writes into it."""
        if not _is_first():
            return nullcontext()
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder, "mnemodyn pretrain")

    def finished(self) -> bool:
        """Whether the folder holds this very run, finished; its lines are then printed again."""
        if self._differences(self.folder, self.again):
            return False
        history = self.history()
        for row in history:
            print(_line(row, self.objective, self.settings.training))
        written = self.folder / "history.csv"
        if not written.is_file() or written.read_bytes() != _table(history).encode():
            warnings.warn(f"{written} was damaged; it is written again", stacklevel=3)
            write_text(written, _table(history))
        return True

    def _record(self, folder: Path, remedy: str) -> _Record:
        """What ``run.json`` in a folder says; a ResumeError where it is damaged."""
        path = folder / "run.json"
        try:
            return _Record(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, RecursionError) as error:
            reason = f"{path} is damaged and does not say what was trained: {error}"
            raise ResumeError(f"{reason}. {remedy}") from None

    def _differences(self, folder: Path, remedy: str) -> list[str]:
        """What tells the run in a folder from this one; empty where they are the same."""
        if not (folder / "run.json").is_file():
            return ["it does not say of which"]
        return _differences(self._record(folder, remedy).identity, self.identity)

    def fit(self, network: nn.Module, restart: bool, fronts: Fronts | None) -> History:
        """Train, or go on; a ResumeError if the folder holds an unfinished run that is another."""
        different = self._differences(self.work, _anew(self.work))
        if different and (self.work / "last.ckpt").is_file() and not restart:
            raise ResumeError(
                f"{self.folder} holds an unfinished run of another configuration: "
                f"{'; '.join(different[:6])}. Go on with that one, name another folder, or give it "
                "up with --restart (restart=True)."
            )
        if _is_first():
            if (self.folder / "run.json").is_file():
                others = "; ".join(self._differences(self.folder, self.again)[:6])
                what = f"{self.folder} holds a finished run ({others or 'the same settings'})"
                print(f"{what}; it stays until this one is whole")
            # What an unfinished run of the same settings has left is gone on with.
            if different:
                remove(self.work)
            write_json(self.work / "run.json", {"identity": self.identity})
        windows, validation = self.windows(fronts)
        if not self.objective.fills:
            scans = _Scaled(self.train, self.scaling, range(len(self.train)))
            cast(MnemoDyn, network).fit_front(scans)
        self.objective.prepare(network, windows)
        return fit(
            network,
            self.objective,
            windows,
            validation,
            self.settings.training,
            self.settings.machine,
            folder=self.work,
            fronts=fronts,
        )

    def windows(self, fronts: Fronts | None) -> tuple[RandomWindows, FixedWindows]:
        """Training and validation windows."""
        training = self.settings.training
        n_frames = self.settings.model.n_timepoints
        shared = (self.scaling, self.objective, n_frames)
        known = None
        everybody = None
        if fronts is not None:
            known = fronts.folds
            everybody = [Fronts.ALL] * len(self.validation)
        seed = training.seed if training.fresh_windows else 0
        seconds = training.window_seconds
        # The views of validation must not follow the seed of a run, or runs could not be compared.
        return (
            RandomWindows(self.train, *shared, seed, seconds=seconds, folds=known),
            FixedWindows(self.validation, *shared, 0, seconds=seconds, folds=everybody),
        )

    def finish(self, history: History, save: Callable[[Path], object]) -> None:
        """Save the network by ``save(folder)``, and put this run in the place of the one before."""
        if _is_first():
            # What killed runs have left is not part of it.
            for name in ("best", "replaced"):
                remove(self.work / name)
            save(self.work)
            write_text(self.work / "history.csv", _table(history))
            about = {
                "identity": self.identity,
                "history": history,
                "machine": asdict(self.settings.machine),  # type: ignore[call-overload]
                "ran_on": surroundings(),
            }
            write_json(self.work / "run.json", about)
            # The record goes first and comes last: it says that the rest is there.
            (self.folder / "run.json").unlink(missing_ok=True)
            if os.path.lexists(self.folder / "best"):
                os.replace(self.folder / "best", self.work / "replaced")
            for name in ("best", "history.csv", "run.json"):
                os.replace(self.work / name, self.folder / name)
            remove(self.work)
        if torch.distributed.is_initialized():
            # The other processes read the files next.
            torch.distributed.barrier()

    def history(self) -> History:
        """Rows of the finished run, as fit returned them."""
        return self._record(self.folder, self.again).history


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
    table = pd.json_normalize([there, here]).map(str).T
    differing = table[table[0] != table[1]]
    return [
        f"{name} is {old[:16]} there, {new[:16]} here" for name, old, new in differing.itertuples()
    ]


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
    machine: Machine = DEFAULTS.machine,
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
        Anything with its methods other than ``view``.
    windows : Dataset
        Item i is draw i: a dict of tensors and text, with ``scan`` for messages and ``x`` (time, parcel).
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
    """
    if machine.recompute:
        _recompute(network)
    last = None if folder is None else Path(folder) / "last.ckpt"
    learner = Learner(network, objective, training, fronts, last)
    resumed = last is not None and last.is_file()
    if resumed:
        learner.resume()
    if not learner.is_over():
        batches = Batches(windows, validation, training, machine.workers)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            trainer = _trainer(training, machine)
            with _interruptible():
                trainer.fit(
                    learner, batches, ckpt_path=last if resumed else None, weights_only=True
                )
        if last is not None:
            # From the file: where training ran in other processes, their rows are not these.
            learner.resume()
    network.load_state_dict(cast(dict, learner.best)["weights"])
    network.cpu().eval()
    return learner.rows


def _load(path: Path, remedy: str, use: Callable[[dict], Any]) -> None:
    """Read tensors for `use`; a ResumeError where the file is damaged or another's."""
    try:
        use(read_tensors(path))
    except CheckpointError as error:
        raise ResumeError(f"{error}. {remedy}") from None
    except (AttributeError, LookupError, TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ResumeError(f"{path} is not of this training: {reason}. {remedy}") from None


def _anew(folder: Path) -> str:
    """What to do where the files of an unfinished run are damaged."""
    return f"To train anew, delete {folder}, or name another folder"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM in a training be what they are elsewhere: Lightning makes them an orderly exit."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        # Lightning has switched the signal off, which would leave a notebook that cannot be interrupted.
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


def _recompute(network: nn.Module) -> None:
    """Make the blocks of a network compute again in the backward pass instead of keeping what is inside."""
    for block in cast(Any, network).blocks:
        block.forward = partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
        )


def _trainer(training: TrainingConfig, machine: Machine) -> Trainer:
    """Lightning's trainer: the loop over epochs and steps, devices and processes, and precision."""
    return lightning.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.nodes,
        strategy=machine.strategy,
        precision=training.precision,
        accumulate_grad_batches=training.accumulate,
        max_epochs=training.epochs,
        plugins=[WholeFiles()],
        logger=False,
        gradient_clip_val=training.clip,
        # So that a resumed run ends in the same bytes.
        deterministic=True,
        # The batches are dealt to the processes already, and the learner saves its own checkpoints.
        use_distributed_sampler=False,
        enable_checkpointing=False,
        # All of validation before the first step: that is epoch 0.
        num_sanity_val_steps=-1,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )


class Learner(lightning.LightningModule):
    """A network, an objective and an optimiser; and a row for each epoch, with the best weights so far.

    Rows and weights are kept in the checkpoint `last`, with ``history.csv`` beside it.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        training: TrainingConfig,
        fronts: Fronts | None = None,
        last: Path | None = None,
    ):
        super().__init__()
        self.objective = objective
        self.training_config = training
        self.fronts = fronts
        self.last = last
        self.core: Any = nn.ModuleDict({"network": network, "parts": objective.parts(network)})
        self.averaged: Any = None
        if training.ema_decay:
            average = partial(_average, decay=training.ema_decay)
            self.averaged = AveragedModel(self.core, avg_fn=average)
            self.averaged.requires_grad_(False)
        self.rows: History = []
        self.best: dict[str, Any] | None = None
        self._sums: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["record"] = {"rows": self.rows, "best": self.best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rows = checkpoint["record"]["rows"]
        self.best = checkpoint["record"]["best"]

    def resume(self) -> None:
        """Take rows and best weights from the checkpoint; a ResumeError where it is damaged or another's."""
        path = cast(Path, self.last)
        _load(path, _anew(path.parent), self._take)

    def _take(self, checkpoint: dict[str, Any]) -> None:
        self.on_load_checkpoint(checkpoint)
        # The training needs neither before its end; what is damaged is found now.
        self.core["network"].load_state_dict(cast(dict, self.best)["weights"])
        self.is_over()
        self.load_state_dict(checkpoint["state_dict"])
        optimizer = self.configure_optimizers()["optimizer"]
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        # Without these Lightning would begin again at the first epoch, or not at all.
        others = ("lr_schedulers", "loops", "epoch", "global_step", "pytorch-lightning_version")
        itemgetter(*others)(checkpoint)

    def is_over(self) -> bool:
        """Whether all epochs are done, or too many without a better score."""
        if self.best is None:
            return False
        epoch = self.rows[-1]["epoch"]
        waited = epoch - self.best["epoch"]
        return epoch >= self.training_config.epochs or 0 < waited >= self.training_config.patience

    @property
    def validated(self) -> Any:
        """Network and parts as they are validated and kept."""
        return self.core if self.averaged is None else self.averaged.module

    def _reader(self, core: Any, *, keep: bool) -> Any:
        """The network as the objective calls it, its hidden entries filled by the front end of each fold."""
        if self.fronts is None:
            return core["network"]
        return partial(self.fronts.run, core["network"], keep=keep)

    def on_fit_start(self) -> None:
        # So that the output of a resumed run is that of a run never interrupted.
        for row in self.rows:
            self._say(row)

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
            raise TrainingError(
                f"the loss is {value.item()} at step {self.global_step}, in a batch of "
                f"{', '.join(sorted(set(batch['scan'])))}. Look at these scans; where they are "
                f"sound, {self._slower()}"
            )
        self._losses.append(value)
        # Gradients are averaged over the processes.
        return (totals * (self.trainer.world_size / counts)).sum()

    def _slower(self) -> str:
        """What to do where a training diverges."""
        rate = self.training_config.learning_rate
        slower = min(rate / 10, DEFAULTS.training.learning_rate)
        option = f"-s learning_rate {slower:g} --restart"
        return (
            f"take a smaller learning_rate than {rate:g}, and give up this run (such as {option})"
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

    def on_validation_end(self) -> None:
        if self.trainer.world_size > 1:
            for value in self._sums.values():
                torch.distributed.all_reduce(value)
        first = self.trainer.sanity_checking
        row: dict[str, Any] = {"epoch": 0 if first else self.current_epoch + 1, "train_loss": None}
        if self._losses:
            # Read once an epoch: each read waits for the device.
            row["train_loss"] = float(torch.stack(self._losses).cpu().mean())
        for name, score in self.objective.scores(self._sums).items():
            row[f"val_{name}"] = score
        self._sums.clear()
        self._losses.clear()
        for name, value in row.items():
            # Such a row would be neither compared nor written.
            if value is not None and not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} after epoch {row['epoch']}: the training has diverged, or the validation scans "
                    f"are unsound. Look at these scans; where they are sound, {self._slower()}"
                )
        self._add(row)
        if not first:
            if self.last is not None:
                self.trainer.save_checkpoint(self.last)
            self.trainer.should_stop = self.is_over()

    def _add(self, row: dict[str, Any]) -> None:
        """Record an epoch, with its weights if it is the best so far."""
        self.rows.append(row)
        score = row[self.objective.monitor]
        if self.best is None or score > self.best["score"]:
            state = self.validated["network"].state_dict()
            weights = {name: value.detach().cpu().clone() for name, value in state.items()}
            self.best = {"epoch": row["epoch"], "score": score, "weights": weights}
        if self.last is not None and self.trainer.is_global_zero:
            write_text(self.last.with_name("history.csv"), _table(self.rows))
        self._say(row)

    def _say(self, row: dict[str, Any]) -> None:
        # Of the first process, and above the bar where there is one.
        self.print(_line(row, self.objective, self.training_config))
        sys.stdout.flush()

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
            # The second as for masked autoencoders (He et al. 2022).
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
    steps = training.steps_per_epoch
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
        self.how: dict[str, Any] = {"collate_fn": collate, "num_workers": workers}

    def train_dataloader(self) -> DataLoader:
        trainer = cast(Trainer, self.trainer)
        draws = Draws(
            self.training,
            lambda: trainer.global_step // self.training.steps_per_epoch,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return DataLoader(self.train, batch_sampler=draws, **self.how)

    def val_dataloader(self) -> DataLoader:
        trainer = cast(Trainer, self.trainer)
        world = trainer.world_size
        n = len(self.validation)  # type: ignore[arg-type]
        if n < world:
            raise DataError(f"each process must have a validation window, got {n} for {world}")
        # Batches are as large as this process's part of a step, for which memory was enough.
        mine = range(trainer.global_rank, n, world)
        size = math.ceil(self.training.batch_size / (world * self.training.accumulate))
        return DataLoader(Subset(self.validation, mine), size, **self.how)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints are written whole or not at all, so that a full disk or a kill costs no earlier one.

    Lightning's own way writes elsewhere and moves, which is not atomic from one file system to another.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        _save(checkpoint, Path(path))


def _table(history: History) -> str:
    """What ``history.csv`` holds."""
    return pd.DataFrame(history).to_csv(index=False, lineterminator="\n")


def _line(row: dict, objective: Objective, training: TrainingConfig) -> str:
    """What is shown of an epoch."""
    known = {k.removeprefix("val_"): v for k, v in row.items() if k.startswith("val_")}
    loss = "     -" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
    scores = "  ".join(f"{name} {value:.4f}" for name, value in known.items())
    line = f"epoch {row['epoch']:3d}/{training.epochs}  train loss {loss}  validation {scores}"
    warning = objective.warning(known)
    return f"{line}\n  warning: {warning}" if warning else line
