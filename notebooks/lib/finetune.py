"""Fine-tuning of a pretrained network on a target, and the published draft's head on a frozen one."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scans import Scan, fingerprint
from mnemodyn.evaluate.methods import Split
from mnemodyn.files import digest
from mnemodyn.pretrain.objectives import Objective
from mnemodyn.pretrain.training import fit
from mnemodyn.pretrain.windows import FixedWindows, RandomWindows
from mnemodyn.settings import Machine, TrainingConfig

EPOCHS = {"draft": 20, "last": 5, "all": 5}


class Tuned(nn.Module):
    """A network with a head that gives one value a window.

    `what` is trained: ``last``, the last block, or ``all``, under a linear head on the latents' mean,
    SD and maximum over time; or ``draft``, the published draft's head on the frozen network's last
    frame.
    """

    def __init__(self, network: nn.Module, what: str):
        super().__init__()
        self.what = what
        self.network = copy.deepcopy(network)
        self.network.requires_grad_(what == "all")
        if what == "draft":
            self.head = draft_head(network.config.n_parcels)
            return
        self.network.blocks[-1].requires_grad_(True)
        n_features = 3 * network.config.n_channels
        last = nn.Linear(n_features, 1)
        nn.init.zeros_(last.weight)
        self.head = nn.Sequential(nn.BatchNorm1d(n_features), last)

    def forward(self, x: Tensor, t_r: Tensor) -> Tensor:
        """Log odds of class 1 or the standardised number, (window,)."""
        output = self.network(x, t_r)
        if self.what == "draft":
            read = output.reconstruction[:, -1]
        else:
            z = output.latents
            read = torch.cat([z.mean(1), z.std(1), z.amax(1)], dim=1)
        return self.head(read)[:, 0]


def draft_head(n_features: int) -> nn.Sequential:
    """The published draft's head: 512, 1024 and 256 units, and one output."""
    layers: list[nn.Module] = []
    n_inputs = n_features
    for n_outputs in (512, 1024, 256):
        layers += [nn.Linear(n_inputs, n_outputs), nn.ReLU(), nn.Dropout(0.1)]
        n_inputs = n_outputs
    return nn.Sequential(*layers, nn.Linear(n_inputs, 1))


class Labels(Objective):
    """The cross-entropy of balanced classes, or the squared error of a standardised number."""

    name = "labels"
    metric = "minus_loss"

    def __init__(self, kind: str, odds: float):
        self.kind = kind
        self.odds = torch.tensor(odds)

    def view(self, x: Tensor, **_: object) -> dict[str, Tensor]:
        return {}

    def loss(self, network, batch, parts):
        found = network(batch["x"], batch["t_r"])
        if self.kind == "regression":
            total = functional.mse_loss(found, batch["y"], reduction="sum")
        else:
            total = functional.binary_cross_entropy_with_logits(
                found, batch["y"], pos_weight=self.odds, reduction="sum"
            )
        return {"loss": (total, torch.tensor(len(found)))}

    def sums(self, network, batch, parts) -> dict[str, Tensor]:
        total, n = self.loss(network, batch, parts)["loss"]
        return {"loss": total.double(), "n": n.double()}

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {self.metric: float(-sums["loss"] / sums["n"])}


class LabelledWindows(RandomWindows):
    """Random windows with the label of their scan."""

    y: np.ndarray

    def cut(self, which: int, start: int, seed: int, *, training: bool) -> dict:
        item = super().cut(which, start, seed, training=training)
        return {**item, "y": torch.tensor(self.y[which], dtype=torch.float32)}


class LabelledFixedWindows(FixedWindows):
    """All windows of the scans, with the label of their scan."""

    y: np.ndarray

    def cut(self, which: int, start: int, seed: int, *, training: bool) -> dict:
        item = super().cut(which, start, seed, training=training)
        return {**item, "y": torch.tensor(self.y[which], dtype=torch.float32)}


class FineTuning:
    """A method for :func:`mnemodyn.evaluate.study.evaluate`: a network trained on the training folds' labels.

    The epoch that does best on a part of the training scans is kept. `what` is as of `Tuned`.
    """

    def __init__(self, checkpoint: Checkpoint, scans: Sequence[Scan], what: str):
        for scan in scans:
            checkpoint.check(scan)
        self.checkpoint = checkpoint
        self.scans = scans
        self.what = what
        self.n_frames = min(checkpoint.model.config.n_timepoints, *(s.n_frames for s in scans))
        weights = [value.numpy() for value in checkpoint.model.state_dict().values()]
        self.depends_on = [what, EPOCHS[what], digest(weights), fingerprint(scans)]

    def fit_predict(self, split: Split) -> tuple[np.ndarray, str]:
        """Mean over a test scan's windows of the log odds or the number; and the epoch that was kept."""
        fitted, rest = split.inner[0]
        mean, sd, odds = 0.0, 1.0, 1.0
        if split.kind == "regression":
            mean = split.y[fitted].mean()
            sd = split.y[fitted].std()
        else:
            odds = (1 - split.y[fitted].mean()) / split.y[fitted].mean()
        y = (split.y - mean) / sd
        objective = Labels(split.kind, odds)
        windows = self._windows(LabelledWindows, objective, split.train[fitted], y[fitted], split)
        validation = self._windows(
            LabelledFixedWindows, objective, split.train[rest], y[rest], split
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(split.seed)
            network = Tuned(self.checkpoint.model, self.what)
            training = TrainingConfig(
                epochs=EPOCHS[self.what],
                windows_per_epoch=len(fitted),
                batch_size=16,
                learning_rate=1e-3,
                weight_decay=0.05,
                ema_decay=0.0,
                seed=split.seed,
            )
            history = fit(network, objective, windows, validation, training, Machine("cpu"))
        best = max(history, key=lambda row: row[objective.monitor])
        prediction = self._predict(network, objective, split)
        return prediction * sd + mean, f"epoch {best['epoch']} of {EPOCHS[self.what]}"

    def _windows(
        self, kind: type, objective: Objective, rows: np.ndarray, y: np.ndarray, split: Split
    ):
        scans = [self.scans[row] for row in rows]
        windows = kind(scans, self.checkpoint.scaling, objective, self.n_frames, split.seed)
        windows.y = y
        return windows

    @torch.no_grad()
    def _predict(self, network: Tuned, objective: Objective, split: Split) -> np.ndarray:
        found = []
        for row in split.test:
            windows = FixedWindows(
                [self.scans[row]], self.checkpoint.scaling, objective, self.n_frames, 0
            )
            items = [windows[i] for i in range(len(windows))]
            x = torch.stack([item["x"] for item in items])
            t_r = torch.stack([item["t_r"] for item in items])
            found.append(float(network(x, t_r).mean()))
        return np.array(found)
