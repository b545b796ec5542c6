"""The network trained for connectivity from short scans, as estimators of the chapter "How long must a scan be?"."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from lib.duration import Estimator, Training
from mnemodyn.checkpoint import Checkpoint
from mnemodyn.connectivity import estimate_connectivity
from mnemodyn.data.scans import Scan
from mnemodyn.files import digest
from mnemodyn.model.connectome import from_tangent, to_tangent, to_vector
from mnemodyn.pretrain.objectives import Connectome
from mnemodyn.pretrain.training import pretrain
from mnemodyn.pretrain.windows import FixedWindows
from mnemodyn.settings import Settings

# Of training people, every eighth chooses the epoch.
CHOOSES = 8


def scans_of(training: Training, t_r: float) -> list[Scan]:
    """The training people's runs as scans; `t_r` in seconds."""
    parcels = tuple(f"parcel {i}" for i in range(training.runs.shape[-1]))
    scans = []
    for person, day, run in np.ndindex(training.runs.shape[:3]):
        values = training.runs[person, day, run]
        name = f"sub-{person:03d}"
        named = {"session": str(day), "run": str(run), "source": f"{name}_ses-{day}_run-{run}"}
        scans.append(Scan(name, values, t_r, parcels, **named))
    return scans


class Network:
    """Trained by the objective ``connectome`` on training people.

    Parameters
    ----------
    settings : Settings
    folder : Path
        Where trainings are kept, each by the content of its runs and settings.
    t_r : float
        Seconds.
    begun : bool
        True for the same network before its first step, which is its closed form.
    """

    # One training serves all lengths and controls.
    trained: ClassVar[dict[str, Checkpoint]] = {}

    def __init__(self, settings: Settings, folder: Path, t_r: float, *, begun: bool = False):
        self.settings = settings
        self.folder = folder
        self.t_r = t_r
        self.begun = begun

    def fit(self, training: Training) -> Self:
        name = digest(training.runs, self.settings.to_dict(), self.t_r)[:12]
        if name not in self.trained:
            self.trained[name] = self._train(training, self.folder / name)
        checkpoint = self.trained[name]
        if self.begun:
            checkpoint = untrained(checkpoint)
        self.model: Any = checkpoint.model
        return self

    def _train(self, training: Training, folder: Path) -> Checkpoint:
        scans = scans_of(training, self.t_r)
        names = sorted({scan.participant_id for scan in scans})
        choosing = names[::CHOOSES]
        train = [scan for scan in scans if scan.participant_id not in choosing]
        validation = [scan for scan in scans if scan.participant_id in choosing]
        # The lines of the epochs go to the terminal, and not to the page.
        with redirect_stdout(sys.__stderr__):
            return pretrain(train, validation, folder, self.settings)[0]

    @torch.no_grad()
    def estimate(self, windows: np.ndarray) -> np.ndarray:
        group = self.model.front.lags[0].double()
        found = []
        for some in torch.as_tensor(windows, dtype=torch.float32).split(64):
            tangent = self.model.estimate_connectivity(some, self.t_r, "connectome")
            found.append(from_tangent(tangent.double(), group))
        return torch.cat(found).numpy()


def first_frames(scan: Scan, length: int) -> Scan:
    """The first `length` frames of a scan."""
    censored = None if scan.censored is None else scan.censored[:length]
    return replace(scan, values=scan.values[:length], censored=censored)


def agreement(checkpoint: Checkpoint, scans: Sequence[Scan], length: int) -> dict[str, float]:
    """R2 by kind of estimate, from the first `length` frames of scans, of the rest of the people's data.

    In tangent space at the group's covariance, about the mean of the training people.
    """
    model: Any = checkpoint.model
    windows = FixedWindows(scans, checkpoint.require_scaling(), Connectome(), length, 0)
    rest = np.stack([windows.rest(which, 0, length) for which in range(len(scans))])
    truth = to_vector(to_tangent(torch.from_numpy(rest).float(), model.front.lags[0])).numpy()
    mean = to_vector(model.connectome.target).numpy()
    short = [first_frames(scan, length) for scan in scans]
    asked = {
        "adapted": (checkpoint, "adapted"),
        "shrunk in shared directions": (untrained(checkpoint), "connectome"),
        "network": (checkpoint, "connectome"),
    }
    found = {}
    for name, (network, kind) in asked.items():
        estimate = estimate_connectivity(short, network, kind)
        error = np.square(estimate - truth).sum() / np.square(truth - mean).sum()
        found[name] = float(1 - error)
    return found


def untrained(checkpoint: Checkpoint) -> Checkpoint:
    """The closed form with which a network's training begins."""
    model: Any = deepcopy(checkpoint.model)
    for parameter in model.connectome.parameters():
        parameter.data.zero_()
    return replace(checkpoint, model=model)


def estimators(
    settings: Mapping[str, Any], folder: Path, t_r: float
) -> dict[str, tuple[Callable[[], Estimator], str]]:
    """Entries for ``lib.duration.ESTIMATORS``, with the folder where trainings are kept.

    `settings` are those of :class:`~mnemodyn.settings.Settings`, of the objective connectome.
    """
    base = Settings().updated({"objective": "connectome"}).updated(settings)
    operator = base.updated({"model.connectome": "operator"})
    return {
        "network before training": (partial(Network, base, folder, t_r, begun=True), "tangent"),
        "network": (partial(Network, base, folder, t_r), "tangent"),
        "network with the operator's latents": (partial(Network, operator, folder, t_r), "tangent"),
    }
