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

EPOCHS = {"draft": 20, "last": 5, "all": 5}
BATCH, PREDICTED = 16, 64  # windows in a step, and at once without gradients


@dataclass
class Series:
    """Scaled scans in memory (time, parcel), the network they go through, and the frames of a training window.

    ``frozen`` keeps by kind what the draft's head reads of every scan's windows, (window, feature), see `freeze`.
    """

    model: MnemoDyn
    x: list[np.ndarray] = field(repr=False)
    t_r: np.ndarray
    window: int
    frozen: dict[str, list[np.ndarray]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, scans: Sequence[Scan]) -> "Series":
        scaling, x, t_r = checkpoint.scale, [], []
        for scan in scans:
            checkpoint.check(scan)
            x.append(scaling(scan))
            t_r.append(scan.t_r)
        window = min(checkpoint.model.config.n_timepoints, *(len(values) for values in x))
        return cls(checkpoint.model, x, np.array(t_r, np.float32), window)

    def digest(self) -> str:
        digest = hashlib.sha256(repr(self.model.config).encode())
        for value in (*(v.cpu().numpy() for v in self.model.state_dict().values()), *self.x):
            digest.update(value.tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def freeze(self, kind: str) -> list[np.ndarray]:
        """The frozen network's last frame of every window (its whole output for numbers), computed once."""
        if kind not in self.frozen:
            outputs = (
                self.model(*self.windows([i] * len(s), s)).reconstruction
                for i, s in enumerate(self.starts())
            )
            self.frozen[kind] = [
                (o.flatten(1) if kind == "regression" else o[:, -1]).numpy() for o in outputs
            ]
        return self.frozen[kind]

    def starts(self) -> list[list[int]]:
        """Where the windows begin that cover each scan, the last one aligned with its end."""
        n = self.window
        return [sorted({*range(0, len(x) - n + 1, n), len(x) - n}) for x in self.x]

    def windows(
        self, rows: Sequence[int] | np.ndarray, starts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """A window of each of some scans, and their t_r."""
        x = np.stack([self.x[i][s : s + self.window] for i, s in zip(rows, starts, strict=True)])
        return torch.from_numpy(x), torch.from_numpy(self.t_r[list(rows)])


def draft_head(n_features: int) -> nn.Sequential:
    """The published draft's head: 512, 1024 and 256 units, and one output."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((n_features, 512, 1024, 256)):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(256, 1))


class _Tuned(nn.Module):
    """A network with a head on its latents' mean, SD and maximum over time; or the draft's head alone."""

    def __init__(self, series: Series, what: str, kind: str):
        super().__init__()
        self.series, self.starts = series, series.starts()
        self.frozen = series.freeze(kind) if what == "draft" else None
        if self.frozen is not None:
            self.head: nn.Module = draft_head(self.frozen[0].shape[1])
            return
        self.network = copy.deepcopy(series.model)
        self.network.requires_grad_(what == "all")
        self.network.blocks[-1].requires_grad_(True)
        n_features = 3 * series.model.config.n_channels
        last = nn.Linear(n_features, 1)
        nn.init.zeros_(last.weight)
        self.head = nn.Sequential(nn.BatchNorm1d(n_features), last)

    def forward(self, rows: Sequence[int] | np.ndarray, numbers: Sequence[int]) -> Tensor:
        """One value a window, (batch,), of windows `numbers` of scans `rows`."""
        if self.frozen is not None:
            read = torch.from_numpy(
                np.stack([self.frozen[i][n] for i, n in zip(rows, numbers, strict=True)])
            )
        else:
            z = self.network(*self.series.windows(rows, numbers)).latents
            read = torch.cat([z.mean(1), z.std(1), z.amax(1)], dim=1)
        return self.head(read)[:, 0]

    def drawn(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Of a random window of each scan: any, or of a frozen network one of the consecutive ones."""
        series, frozen = self.series, self.frozen
        possible = [
            len(series.x[i]) - series.window + 1 if frozen is None else len(frozen[i]) for i in rows
        ]
        return self(rows, [int(rng.integers(n)) for n in possible])

    @torch.no_grad()
    def predict(self, rows: np.ndarray) -> Tensor:
        """Mean over the windows that cover each scan."""
        self.eval()
        windows = [
            (place, row, number if self.frozen is not None else start)
            for place, row in enumerate(rows)
            for number, start in enumerate(self.starts[row])
        ]
        place, row, number = (np.array(column) for column in zip(*windows, strict=True))
        parts = range(0, len(place), PREDICTED)
        found = torch.cat([self(row[i : i + PREDICTED], number[i : i + PREDICTED]) for i in parts])
        total = torch.zeros(len(rows)).index_add_(0, torch.from_numpy(place), found)
        return total / torch.from_numpy(np.bincount(place))


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

    `y` (scan,) is 0 and 1, or numbers; those of test scans are not read. `what` is ``draft``, the draft's head on the
    frozen network's last frame (the whole window for numbers), or ``last`` or ``all``: the last block, or everything,
    under a linear head on pooled latents. `kind` is as of a task; `split` are positions in `train` to fit on and to
    choose the epoch by.

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
                return functional.binary_cross_entropy_with_logits(
                    found, goal[rows], pos_weight=odds
                )
            return functional.mse_loss(found, goal[rows])

        inner = [
            p for n, p in tuned.named_parameters() if n.startswith("network.") and p.requires_grad
        ]
        groups = [
            {"params": tuned.head.parameters(), "lr": 1e-3},
            *([{"params": inner, "lr": 3e-4}] if inner else []),
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
        best, epoch_of = np.inf, 0
        state: dict[str, Tensor] = {}
        for epoch in range(EPOCHS[what]):
            tuned.train()
            order = rng.permutation(fit)
            for batch in np.array_split(order, max(1, len(order) // BATCH)):
                optimizer.zero_grad()
                loss(tuned.drawn(batch, rng), batch).backward()
                nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
                optimizer.step()
            found = float(loss(tuned.predict(validation), validation))
            if found < best:
                best, epoch_of = found, epoch + 1
                state = {k: v.clone() for k, v in tuned.state_dict().items()}
        tuned.load_state_dict(state)
        prediction = tuned.predict(test).double().numpy() * sd + mean
    return prediction, f"epoch {epoch_of} of {EPOCHS[what]}"
