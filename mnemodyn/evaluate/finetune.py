"""Fine-tuning of a pretrained network on a target, and the published draft's head on a frozen one."""

import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scans import Scan
from mnemodyn.model.network import MnemoDyn

__all__ = ["Series", "draft_head", "finetune"]

EPOCHS = {"draft": 20, "last": 5, "all": 5}
BATCH = 16


@dataclass
class Series:
    """Scaled scans in memory, and the network they go through.

    Attributes
    ----------
    model : MnemoDyn
    x : list of Tensor, shape (time, parcel)
    t_r : ndarray, shape (scan,)
    window : int
        Frames of a training window: those of pretraining, or of the shortest scan.
    frozen : dict of str to list of Tensor
        What the draft's head reads of every scan's consecutive windows, by kind; see :meth:`freeze`.
    """

    model: MnemoDyn
    x: list[Tensor] = field(repr=False)
    t_r: np.ndarray
    window: int
    frozen: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, scans: Sequence[Scan]) -> "Series":
        x, t_r = [], []
        for scan in scans:
            checkpoint.check(scan)
            x.append(torch.from_numpy(checkpoint.scaling(scan)))
            t_r.append(scan.t_r)
        window = min(checkpoint.model.config.n_timepoints, *(len(values) for values in x))
        return cls(checkpoint.model, x, np.array(t_r, np.float32), window)

    def digest(self) -> str:
        digest = hashlib.sha256(repr(self.model.config).encode())
        for value in (*self.model.state_dict().values(), *self.x):
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def freeze(self, kind: str) -> list[Tensor]:
        """The frozen network's last frame of every window (its whole output for numbers), computed once."""
        if kind not in self.frozen:
            outputs = (self.model(*self.consecutive(i)).reconstruction for i in range(len(self.x)))
            self.frozen[kind] = [o.flatten(1) if kind == "regression" else o[:, -1] for o in outputs]
        return self.frozen[kind]

    def windows(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random window of each of some scans, and their t_r."""
        starts = [int(rng.integers(len(self.x[i]) - self.window + 1)) for i in rows]
        x = torch.stack([self.x[i][s : s + self.window] for i, s in zip(rows, starts, strict=True)])
        return x, torch.from_numpy(self.t_r[rows])

    def consecutive(self, row: int) -> tuple[Tensor, Tensor]:
        """The windows that cover a scan, the last one aligned with its end."""
        x, n = self.x[row], self.window
        starts = sorted({*range(0, len(x) - n + 1, n), len(x) - n})
        return torch.stack([x[s : s + n] for s in starts]), torch.full((len(starts),), float(self.t_r[row]))


def draft_head(n_features: int) -> nn.Sequential:
    """The published draft's head: 512, 1024 and 256 units, and one output."""
    sizes = (n_features, 512, 1024, 256)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(256, 1))


class _Tuned(nn.Module):
    """A network with a head on its latents' mean, SD and maximum over time, or with the draft's."""

    def __init__(self, series: Series, what: str, kind: str):
        super().__init__()
        self.network = copy.deepcopy(series.model)
        self.what = what
        config = series.model.config
        self.network.requires_grad_(what == "all")
        if what == "last":
            self.network.blocks[-1].requires_grad_(True)
        if what == "draft":
            self.head = draft_head(series.freeze(kind)[0].shape[1])
        else:
            self.norm = nn.BatchNorm1d(3 * config.n_channels)
            self.head = nn.Linear(3 * config.n_channels, 1)
            nn.init.zeros_(self.head.weight)

    def read(self, x: Tensor, t_r: Tensor) -> Tensor:
        """What the head reads of windows (batch, time, parcel)."""
        output = self.network(x, t_r)
        z = output.latents
        return torch.cat([z.mean(1), z.std(1), z.amax(1)], dim=1)

    def forward(self, read: Tensor) -> Tensor:
        """One value a window, (batch,)."""
        return self.head(read if self.what == "draft" else self.norm(read))[:, 0]


def finetune(
    series: Series,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    *,
    what: str,
    kind: str,
    split: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> tuple[np.ndarray, str]:
    """Train on the training scans, keep the epoch that is best on a part of them set apart, predict the test scans.

    Parameters
    ----------
    series : Series
    y : ndarray, shape (scan,)
        0 and 1, or numbers; those of test scans are not read.
    train, test : ndarray of int
    what : {"draft", "last", "all"}
        ``draft``: the draft's head on the frozen network's last frame (the whole window for numbers). ``last``,
        ``all``: the last block, or everything, under a linear head on pooled latents.
    kind : {"classification", "regression"}
    split : (ndarray, ndarray)
        Positions in `train` to fit on and to choose the epoch by.
    seed : int

    Returns
    -------
    prediction : ndarray, shape (len(test),)
        Mean over the windows of a scan; of log odds with balanced classes, or of the number.
    chosen : str
    """
    if what not in EPOCHS:
        raise ValueError(f"what must be one of {tuple(EPOCHS)}, got {what!r}")
    fit, validation = train[split[0]], train[split[1]]
    binary = kind == "classification"
    mean, sd = (0.0, 1.0) if binary else (y[fit].mean(), y[fit].std())
    goal = torch.tensor((y - mean) / sd, dtype=torch.float32)
    odds = torch.tensor((1 - y[fit].mean()) / y[fit].mean() if binary else 1.0, dtype=torch.float32)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = _Tuned(series, what, kind)

        def loss(found: Tensor, rows: np.ndarray) -> Tensor:
            if binary:
                return functional.binary_cross_entropy_with_logits(found, goal[rows], pos_weight=odds)
            return functional.mse_loss(found, goal[rows])

        frozen = series.freeze(kind) if what == "draft" else None

        def covering(row: int) -> Tensor:
            return frozen[row] if frozen else tuned.read(*series.consecutive(row))

        def some(rows: np.ndarray) -> Tensor:
            if frozen:
                return torch.stack([frozen[i][rng.integers(len(frozen[i]))] for i in rows])
            return tuned.read(*series.windows(rows, rng))

        @torch.no_grad()
        def predict(rows: np.ndarray) -> Tensor:
            tuned.eval()
            return torch.stack([tuned(covering(int(i))).mean() for i in rows])

        inner = [p for p in tuned.network.parameters() if p.requires_grad]
        outer = [p for n, p in tuned.named_parameters() if not n.startswith("network.")]
        groups = [{"params": outer, "lr": 1e-3}, *([{"params": inner, "lr": 3e-4}] if inner else [])]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
        best, state, epoch_of = np.inf, None, 0
        for epoch in range(EPOCHS[what]):
            tuned.train()
            order = rng.permutation(fit)
            for batch in np.array_split(order, max(1, len(order) // BATCH)):
                optimizer.zero_grad()
                loss(tuned(some(batch)), batch).backward()
                nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
                optimizer.step()
            found = float(loss(predict(validation), validation))
            if found < best:
                best, epoch_of = found, epoch + 1
                state = {k: v.clone() for k, v in tuned.state_dict().items()}
        tuned.load_state_dict(state)
        prediction = predict(test).double().numpy() * sd + mean
    return prediction, f"epoch {epoch_of} of {EPOCHS[what]}"
