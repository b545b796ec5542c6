"""Does the network fill hidden entries of new people better than linear statistics? From scratch, with seeds.

``make reconstruct DATA=hcp7`` and ``DATA=abide`` run this; every finished stage is kept in ``runs/reconstruct``, so
that an interrupted run goes on. Everything is chosen on validation participants; nothing is chosen on test ones.
Scans are hidden and filled whole, as a user has them; what windows alone give stands beside it.
"""

import argparse
import copy
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks.transformer import PatchTransformer
from mnemodyn.checkpoint import Checkpoint, save_checkpoint
from mnemodyn.data.cohorts import load_cohort
from mnemodyn.data.collection import open_scans as open_source
from mnemodyn.data.scaling import Scaling
from mnemodyn.evaluate.baselines import (
    VAR,
    Interpolation,
    LowRank,
    SpatialGaussian,
    SpatiotemporalGaussian,
    Zero,
)
from mnemodyn.evaluate.downstream import open_scans
from mnemodyn.files import resolve, write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.front import Front
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.objective import Masked
from mnemodyn.provenance import surroundings

LINEAR = ("zero", "interpolation", "spatial_gaussian", "low_rank", "var", "spatiotemporal_gaussian")
FRONT_STEPS = 6  # of expectation maximisation, whose cost grows with them


@dataclass(frozen=True)
class Setting:
    """What is asked, and how it is answered. ``front_*``, `shrinkages`, `ranks`, `rates`: tried on validation people.

    Networks are trained on windows of `n_timepoints` frames, those without a front end on fresh ones with fresh masks
    for `steps` steps; the blocks behind the front end on `draws` windows that it filled once, for `epochs` of them.
    """

    n_timepoints: int
    hidden_share: float
    mask_window: int
    front_weights: tuple[float, ...]
    front_modes: tuple[int, ...]
    shrinkages: tuple[float, ...]
    ranks: tuple[int, ...]
    steps: int
    draws: int
    epochs: int
    seeds: tuple[int, ...] = (0, 1, 2)
    preset: str = "mnemodyn-small"
    rates: tuple[float, ...] = (1e-3, 3e-3)
    front_rates: tuple[float, ...] = (
        1e-4,
        1e-3,
    )  # of blocks that begin as no change to the front end
    batch_size: int = 8


SETTINGS = {
    "hcp7": Setting(
        240,
        0.55,
        15,
        (100.0, 200.0, 400.0),
        (0,),
        (0.03, 0.1, 0.2),
        (8, 16, 32),
        steps=600,
        draws=320,
        epochs=6,
    ),
    "abide": Setting(
        112,
        0.6,
        5,
        (50.0, 100.0, 200.0),
        (0, 200),
        (0.01, 0.03, 0.1),
        (24, 48, 96),
        steps=1500,
        draws=800,
        epochs=6,
    ),
}


@dataclass(frozen=True)
class Series:
    """A scaled scan: values (time, parcel), t_r in seconds, which parcels are constant, and what it is split by."""

    participant: str
    values: np.ndarray
    t_r: float
    constant: np.ndarray
    stratum: str = ""


def read(data: str, setting: Setting, folder: Path | None) -> tuple[list[Series], dict]:
    """The usable scans, and how many were left out for what."""
    if data != "abide":
        return [
            Series(s.participant_id, Scaling()(s), s.t_r, s.constant) for s in open_source(data)
        ], {}
    if folder is None:
        raise FileNotFoundError("ABIDE: name its folder with ABIDE=FOLDER or MNEMODYN_DATA")
    scans = open_scans(load_cohort("abide"), folder)
    series = [
        Series(
            row.family,
            Scaling()(scans[i]),
            row.t_r,
            scans[i].constant,
            f"{row.site} {row.diagnosis}",
        )
        for i, row in enumerate(scans.table.itertuples())
        if row.n_frames >= setting.n_timepoints
    ]
    left_out = scans.excluded["problem"].value_counts().to_dict()
    left_out.pop("no-phenotype", None)  # these are filled like any other
    return series, {str(k): int(v) for k, v in left_out.items()} | {
        "too-short": len(scans.table) - len(series)
    }


def split(series: list[Series], seed: int = 1) -> dict[str, list[Series]]:
    """A tenth of the people of every stratum to the test, a twentieth to validation; who is who is drawn once."""
    strata: dict[str, str] = {}
    for s in series:
        strata.setdefault(s.participant, s.stratum)
    people = list(np.random.default_rng(seed).permutation(sorted(strata)))
    people.sort(key=lambda p: strata[p])  # stable: drawn order within a stratum
    side = {
        p: "test" if i % 10 == 3 else "validation" if i % 20 == 8 else "train"
        for i, p in enumerate(people)
    }
    return {
        name: [s for s in series if side[s.participant] == name]
        for name in ("train", "validation", "test")
    }


@dataclass(frozen=True)
class Hidden:
    """Scans (time, parcel) with entries hidden. A constant parcel is hidden throughout, and never scored."""

    series: list[Series]
    masks: list[np.ndarray]
    n_timepoints: int

    @classmethod
    def of(cls, series: list[Series], setting: Setting, seed: int) -> "Hidden":
        hide = Masked(setting.hidden_share, setting.mask_window).hide
        masks = [hide((1, *s.values.shape), seed + i).numpy()[0] for i, s in enumerate(series)]
        return cls(series, masks, setting.n_timepoints)

    def fill(self, fill: Callable, *, whole: bool = True) -> list[np.ndarray]:
        """What ``fill(x, hidden, t_r)`` makes of (1, time, parcel), of whole scans or window by window."""
        out = []
        for s, mask in zip(self.series, self.masks, strict=True):
            time, n = len(s.values), self.n_timepoints
            x, hidden = s.values[None], (mask | s.constant)[None]
            filled = np.empty_like(x)
            # The last window ends with the scan, so that every frame is in one.
            for a in [0] if whole else [*range(0, time - n, n), time - n]:
                part = slice(a, time if whole else a + n)
                filled[:, part] = fill(x[:, part], hidden[:, part], s.t_r)
            out.append(filled[0])
        return out

    def sums(self, filled: list[np.ndarray]) -> np.ndarray:
        """(2, stretch): residual and total sums of squares over scored entries, by stretches of each scan."""
        rows = []
        for s, mask, values in zip(self.series, self.masks, filled, strict=True):
            scored = mask & ~s.constant
            squares = np.stack([(s.values - values) ** 2, s.values**2]) * scored
            rows += [
                part.sum((1, 2), dtype=np.float64)
                for part in np.array_split(squares, self._parts(s), axis=1)
            ]
        return np.stack(rows, 1)

    def _parts(self, s: Series) -> int:
        return len(s.values) // self.n_timepoints

    @property
    def people(self) -> np.ndarray:
        """(stretch,)"""
        return np.array([s.participant for s in self.series for _ in range(self._parts(s))])

    def r2(self, fill: Callable, **reading) -> float:
        residual, total = self.sums(self.fill(fill, **reading)).sum(1)
        return float(1 - residual / total)


def linear(method) -> Callable:
    return lambda x, hidden, t_r: method.fill(x, hidden)


def front_fill(front: Front) -> Callable:
    return lambda x, hidden, t_r: front(torch.from_numpy(x), torch.from_numpy(hidden)).numpy()


def _filled(output) -> torch.Tensor:
    return getattr(output, "reconstruction", output)


@torch.no_grad()
def _network_fill(network, front, x, hidden, t_r) -> np.ndarray:
    x, hidden = torch.from_numpy(x), torch.from_numpy(hidden)
    given = {} if front is None else {"filled": front(x, hidden)}
    return _filled(network(x, float(t_r), hidden=hidden, **given)).numpy()


def make_front(chosen: dict, series: list[Series]) -> Front:
    front = Front(series[0].values.shape[1], **{"weight": 1.0, "steps": FRONT_STEPS} | chosen)
    return front.fit([s.values for s in series])


def choose(setting: Setting, sides: dict, log) -> dict:
    """Every setting of a baseline and of the front end by R2 on hidden entries of validation people."""
    train = [s.values for s in sides["train"]]
    held = Hidden.of(sides["validation"], setting, seed=100)
    r2: dict[str, dict[str, float]] = {}

    def best(name: str, options: dict):
        r2[name] = {
            str(label): held.r2(linear(method.fit(train))) for label, method in options.items()
        }
        log(f"{name}: {r2[name]}")
        return max(options, key=lambda label: r2[name][str(label)])

    found = {
        "spatial_gaussian": best(
            "spatial_gaussian", {a: SpatialGaussian(a) for a in setting.shrinkages}
        ),
        "var": best("var", {a: VAR(a) for a in setting.shrinkages}),
        "low_rank": best("low_rank", {r: LowRank(r) for r in setting.ranks}),
    }
    shrinkage = best("shrinkage", {a: SpatiotemporalGaussian(a, 8) for a in setting.shrinkages})
    n_lags = best("n_lags", {n: SpatiotemporalGaussian(shrinkage, n) for n in (2, 4, 8)})
    own = {w: SpatiotemporalGaussian(shrinkage, n_lags, own=w) for w in (0.02, 0.05, 0.1, 0.2)}
    found |= {
        "spatiotemporal_gaussian": [shrinkage, n_lags],
        "own_covariance": best("own_covariance", own),
    }
    tried = {}
    for n_modes in setting.front_modes:
        front = make_front(
            {"n_lags": n_lags, "shrinkage": shrinkage, "n_modes": n_modes}, sides["train"]
        )
        for weight in setting.front_weights:
            front.weight = weight
            tried[n_modes, weight] = held.r2(front_fill(front))
            log(f"front end with {n_modes} modes and weight {weight}: {tried[n_modes, weight]:.4f}")
    n_modes, weight = max(tried, key=tried.__getitem__)
    r2["front_end"] = {f"{n} modes, weight {w}": value for (n, w), value in tried.items()}
    found["front_end"] = {
        "n_lags": n_lags,
        "shrinkage": shrinkage,
        "weight": weight,
        "n_modes": n_modes,
    }
    return {"chosen": found, "validation_r2": r2}


def methods(chosen: dict) -> dict:
    """The baselines with their chosen settings, not fitted."""
    shrinkage, n_lags = chosen["spatiotemporal_gaussian"]
    return {
        "zero": Zero(),
        "interpolation": Interpolation(),
        "spatial_gaussian": SpatialGaussian(chosen["spatial_gaussian"]),
        "low_rank": LowRank(chosen["low_rank"]),
        "var": VAR(chosen["var"]),
        "spatiotemporal_gaussian": SpatiotemporalGaussian(shrinkage, n_lags),
        "own_covariance": SpatiotemporalGaussian(shrinkage, n_lags, own=chosen["own_covariance"]),
    }


def closed_form(chosen: dict, known: list[Series], held: Hidden, log) -> dict[str, np.ndarray]:
    """Residual sums of squares (stretch,) of every method without a network; ``/windows`` where it reads windows."""
    sums = {}
    for name, method in methods(chosen).items():
        fitted = method.fit([s.values for s in known])
        sums[name], sums["total"] = held.sums(held.fill(linear(fitted)))
        log(f"{name}: {1 - sums[name].sum() / sums['total'].sum():.4f}")
        if name in ("spatiotemporal_gaussian", "own_covariance"):
            sums[name + "/windows"] = held.sums(held.fill(linear(fitted), whole=False))[0]
    front = front_fill(make_front(chosen["front_end"], known))
    sums["front_end"] = held.sums(held.fill(front))[0]
    sums["front_end/windows"] = held.sums(held.fill(front, whole=False))[0]
    log(f"front end: {1 - sums['front_end'].sum() / sums['total'].sum():.4f}")
    return sums


def fresh(
    series: list[Series], setting: Setting, seed: int, size: int | None = None
) -> Iterator[dict]:
    """Batches of random windows of random scans, with random masks, without end."""
    rng, n = np.random.default_rng(seed), setting.n_timepoints
    hide = Masked(setting.hidden_share, setting.mask_window).hide
    while True:
        chosen = [series[i] for i in rng.integers(len(series), size=size or setting.batch_size)]
        starts = [int(rng.integers(len(s.values) - n + 1)) for s in chosen]
        x = np.stack([s.values[a : a + n] for s, a in zip(chosen, starts, strict=True)])
        mask, constant = (
            hide(x.shape, int(rng.integers(2**31))),
            np.stack([s.constant for s in chosen])[:, None],
        )
        yield {
            "x": torch.from_numpy(x),
            "hidden": mask | torch.from_numpy(constant),
            "scored": mask & ~torch.from_numpy(constant),
            "t_r": torch.tensor([s.t_r for s in chosen], dtype=torch.float32),
        }


def draw(setting: Setting, sides: dict, chosen: dict, log) -> dict:
    """Training and validation windows with what the front end makes of them.

    A front end has seen the people it was fitted to, and fills new ones less well. So that the blocks learn to correct
    what they will meet, the front end of each fold of people is fitted to the others.
    """
    people = sorted({s.participant for s in sides["train"]})
    fold = {p: i % min(5, len(people)) for i, p in enumerate(people)}
    parts = {"train": [], "validation": []}
    for k in [*sorted(set(fold.values())), None]:
        inside = (
            sides["validation"]
            if k is None
            else [s for s in sides["train"] if fold[s.participant] == k]
        )
        front = make_front(chosen, [s for s in sides["train"] if fold[s.participant] != k])
        size = 64 if k is None else round(setting.draws * len(inside) / len(sides["train"]))
        batch = next(fresh(inside, setting, 200 if k is None else 201 + k, size))
        pairs = zip(batch["x"].split(8), batch["hidden"].split(8), strict=True)
        batch["filled"] = torch.cat([front(x, hidden) for x, hidden in pairs])
        parts["validation" if k is None else "train"].append(batch)
        log(
            f"front end of fold {k}: R2 {1 - _errors(batch['filled'], batch) / _errors(0, batch):.4f}"
        )
    return {
        side: {name: torch.cat([b[name] for b in found]) for name in found[0]}
        for side, found in parts.items()
    }


def _errors(values, batch: dict) -> float:
    return float((values - batch["x"])[batch["scored"]].square().sum())


def shuffled(batch: dict, setting: Setting, seed: int) -> Iterator[dict]:
    """Batches of the windows of one large batch, in a new order every time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(batch["x"]), generator=generator).split(setting.batch_size):
            yield {name: value[rows] for name, value in batch.items()}


def _reconstruct(network, batch: dict) -> torch.Tensor:
    given = {"filled": batch["filled"]} if "filled" in batch else {}
    return _filled(network(batch["x"], batch["t_r"], hidden=batch["hidden"], **given))


@torch.no_grad()
def validate(network, batch: dict) -> float:
    """R2 on the scored entries of a large batch."""
    error = 0.0
    for rows in torch.arange(len(batch["x"])).split(16):
        part = {name: value[rows] for name, value in batch.items()}
        error += _errors(_reconstruct(network, part), part)
    return 1 - error / _errors(0, batch)


def fit(
    network, batches: Iterator[dict], validation: dict, steps: int, rate: float, log
) -> dict[int, float]:
    """AdamW with a cosine schedule; leaves the network with the averaged weights that are best on validation windows.

    Returns their R2 by step; step 0 is the network before training.
    """
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            min(1, (i + 1) / (0.1 * steps)) * max(0.01, 0.5 * (1 + math.cos(math.pi * i / steps)))
        ),
    )
    averaged = copy.deepcopy(network)
    best, curve = copy.deepcopy(network.state_dict()), {0: validate(network, validation)}
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        out, scored = _reconstruct(network, batch), batch["scored"]
        loss = functional.mse_loss(out[scored], batch["x"][scored])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for a, b in zip(averaged.parameters(), network.parameters(), strict=True):
                a.lerp_(b, 1 - min(0.98, (1 + step) / (10 + step)))
        if step % max(1, steps // 10) == 0:
            curve[step] = validate(averaged, validation)
            log(f"step {step}: validation R2 {curve[step]:.4f}")
            if curve[step] == max(curve.values()):
                best = copy.deepcopy(averaged.state_dict())
    network.load_state_dict(best)
    return curve


def transformer_like(setting: Setting, n_parcels: int, n_parameters: int) -> PatchTransformer:
    """The widest transformer of four layers with at most `n_parameters`."""
    time_patch = setting.mask_window if setting.n_timepoints % setting.mask_window == 0 else 8
    make = partial(
        PatchTransformer, n_parcels, setting.n_timepoints, n_layers=4, time_patch=time_patch
    )
    width = 16
    while sum(p.numel() for p in make(width=width + 8).parameters()) <= n_parameters:
        width += 8
    return make(width=width)


def config_of(setting: Setting, n_parcels: int, chosen: dict | None) -> ModelConfig:
    """Of the network behind the front end with its `chosen` settings, or without one."""
    front: dict = {"front": "none"}
    if chosen is not None:
        front = {f"front_{name.removeprefix('n_')}": value for name, value in chosen.items()}
        front["front_steps"] = FRONT_STEPS
    return ModelConfig.preset(
        setting.preset, n_parcels=n_parcels, n_timepoints=setting.n_timepoints, **front
    )


def train_seed(
    setting: Setting, seed: int, sides: dict, draws: dict, chosen: dict, rates: dict, log
) -> dict:
    """Every network of one seed, trained: name to (network, validation curves by rate, rate kept).

    `rates` are those to try; a later seed keeps what the first one found best on validation people.
    """
    config, alone = (
        config_of(setting, sides["train"][0].values.shape[1], c) for c in (chosen, None)
    )
    size = sum(p.numel() for p in MnemoDyn(alone).parameters())
    makers = {
        "model": lambda: MnemoDyn(config),
        "blocks_alone": lambda: MnemoDyn(alone),
        "transformer": lambda: transformer_like(setting, alone.n_parcels, size),
    }
    trained = {}
    for name, make in makers.items():
        tried = {}
        for rate in rates[name]:
            torch.manual_seed(seed)
            network = make()
            log(f"seed {seed}: {name} at {rate}")
            if name == "model":
                batches, side, steps = (
                    shuffled(draws["train"], setting, seed),
                    draws["validation"],
                    None,
                )
            else:
                batches = fresh(sides["train"], setting, 1000 + seed)
                side, steps = next(fresh(sides["validation"], setting, 200, 64)), setting.steps
            steps = steps or setting.epochs * math.ceil(setting.draws / setting.batch_size)
            tried[rate] = (network, fit(network, batches, side, steps, rate, log))
        rate = max(tried, key=lambda r: max(tried[r][1].values()))
        trained[name] = (tried[rate][0].eval(), {r: curve for r, (_, curve) in tried.items()}, rate)
    return trained


def interval(
    model: np.ndarray, other: np.ndarray, total: np.ndarray, people: np.ndarray, n_boot: int = 2000
) -> dict:
    """R2 of `model` minus R2 of `other` (seed, stretch), and its 95 % bootstrap interval.

    A resample draws people, of each of them stretches, and training seeds, all with replacement; both methods get the
    same draw. With `other` all `total`, whose R2 is zero, it is the R2 of `model`.
    """
    rng, difference = np.random.default_rng(0), np.broadcast_to(other, model.shape) - model
    groups = [np.flatnonzero(people == p) for p in np.unique(people)]
    times = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=n_boot)
    rows = np.zeros((n_boot, len(people)))
    for group, drawn in zip(groups, times.T, strict=True):
        rows[:, group] = rng.multinomial(drawn * len(group), np.full(len(group), 1 / len(group)))
    n_seeds = len(model)
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_boot)
    values = (seeds * (rows @ difference.T)).sum(1) / (n_seeds * (rows @ total))
    low, high = np.quantile(values, [0.025, 0.975])
    value = difference.sum() / (n_seeds * total.sum())
    return {
        "value": round(float(value), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
    }


def table(
    sums: dict[str, np.ndarray], total: np.ndarray, people: np.ndarray, ours: str = "model"
) -> dict:
    """R2 of every method from its residual sums (seed, stretch), best first, and `ours` minus each."""
    rows = {name: interval(residual, total, total, people) for name, residual in sums.items()}
    for name, residual in sums.items():
        if name != ours:
            rows[name]["difference"] = interval(sums[ours], residual, total, people)
    return {name: rows[name] for name in sorted(rows, key=lambda n: -rows[n]["value"])}


def report(data: str, setting: Setting, folder: Path, held: Hidden, facts: dict) -> dict:
    """The JSON of the book: every method's R2 with its interval, and the network minus each of them."""
    sums = {name: value[None] for name, value in np.load(folder / "closed_form.npz").items()}
    seeds = [json.loads((folder / f"seed-{s}.json").read_text()) for s in setting.seeds]
    sums |= {name: np.array([s["residual"][name] for s in seeds]) for name in seeds[0]["residual"]}
    total, people = sums.pop("total")[0], held.people
    rows = table({name: r for name, r in sums.items() if "/" not in name}, total, people)
    best = next(name for name in rows if name in LINEAR)
    found = {
        "data": data,
        "r2_hidden": rows,
        "best_linear": best,
        "above_best_linear": rows[best]["difference"],
        "windows": table(
            {
                name.removesuffix("/windows"): r
                for name, r in sums.items()
                if name.endswith("/windows")
            },
            total,
            people,
        ),
        "linear": list(LINEAR),
        "interval": "95 %, bootstrap over people, stretches of their scans and training seeds",
        "by_seed": {
            n: (1 - r.sum(1) / total.sum()).round(5).tolist() for n, r in sums.items() if len(r) > 1
        },
        "validation": json.loads((folder / "choice.json").read_text())
        | {"by_step": [s["curves"] for s in seeds]},
        "n_parameters": seeds[0]["n_parameters"],
        "steps": {"blocks_alone": setting.steps, "transformer": setting.steps}
        | {"model": setting.epochs * math.ceil(setting.draws / setting.batch_size)},
        "preset": setting.preset,
        "n_people": len(set(people)),
        "n_stretches": len(people),
        "n_hidden_entries": int(
            sum((m & ~s.constant).sum() for s, m in zip(held.series, held.masks, strict=True))
        ),
        **{
            name: getattr(setting, name)
            for name in ("hidden_share", "mask_window", "n_timepoints", "seeds")
        },
        **facts,
        "cpu_minutes": Stages(folder).cpu_minutes,
        "commit": seeds[0]["commit"],
        "date": seeds[-1]["date"],
        "device": f"CPU, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
    }
    turns = sorted(folder.glob("turn-*.npz"))
    if turns:
        loaded = [dict(np.load(path)) for path in turns]
        every = {name: np.concatenate([one[name] for one in loaded])[None] for name in loaded[0]}
        total, people = (
            every.pop("total")[0],
            np.repeat(np.arange(len(loaded)), [len(o["total"]) for o in loaded]),
        )
        every = {name: r for name, r in every.items() if "/" not in name}
        found["every_person_held_out"] = {
            "n_people": len(loaded),
            "r2_hidden": table(every, total, people, "front_end"),
        }
    return found


def stamp() -> dict[str, str]:
    """Commit and date."""
    around = surroundings()
    commit = around["commit"] + (" with changes" if around["dirty"] else "")
    return {"commit": commit, "date": datetime.now(UTC).date().isoformat()}


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command's options, with those that studies share; sets the number of threads."""
    parser.add_argument(
        "--folder", type=Path, default=os.environ.get("MNEMODYN_DATA"), help="of the ABIDE release"
    )
    parser.add_argument("--work", type=Path, help="where stages are kept; in runs otherwise")
    parser.add_argument("--out", type=Path, help="the JSON; in book/data otherwise")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    return parser.parse_args()


class Stages:
    """Stages whose results are kept: each runs once, and its processor time is written down."""

    def __init__(self, folder: Path):
        self.folder = folder

    def log(self, text: str) -> None:
        print(f"[{time.process_time() / 60:6.1f} CPU min] {text}", flush=True)

    @property
    def cpu_minutes(self) -> float:
        return round(
            sum(s["cpu_minutes"] for s in json.loads((self.folder / "times.json").read_text())), 1
        )

    def __call__(self, name: str, make) -> Path:
        path, start = self.folder / name, time.process_time()
        if not path.is_file():
            self.log(f"-> {name}")
            make(path)
            times = self.folder / "times.json"
            done = json.loads(times.read_text()) if times.is_file() else []
            minutes = (time.process_time() - start) / 60
            write_json(
                times,
                [d for d in done if d["stage"] != name] + [{"stage": name, "cpu_minutes": minutes}],
            )
        return path


def run(data: str, setting: Setting, folder: Path, source: Path | None) -> dict:
    """All stages; returns the report."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stages(folder)
    settings = json.loads(json.dumps(setting.__dict__))
    stage("setting.json", lambda path: write_json(path, settings))
    if json.loads((folder / "setting.json").read_text()) != settings:
        raise ValueError(f"{folder} holds a run of other settings; delete it to start again")
    series, left_out = read(data, setting, source)
    sides = (
        split(series)
        if data == "abide"
        else {"train": series[:4], "validation": series[4:5], "test": series[5:]}
    )
    facts = {"left_out": left_out} | {
        f"n_{k}": len({s.participant for s in v}) for k, v in sides.items() if k != "test"
    }
    stage("choice.json", lambda path: write_json(path, choose(setting, sides, stage.log)))
    chosen = json.loads((folder / "choice.json").read_text())["chosen"]
    held, known = (
        Hidden.of(sides["test"], setting, seed=10_000),
        [*sides["train"], *sides["validation"]],
    )
    stage(
        "closed_form.npz",
        lambda path: np.savez(path, **closed_form(chosen, known, held, stage.log)),
    )
    if data != "abide":  # few people: each is held out once, the next one chooses, the others train
        for i in range(len(series)):
            one = {"validation": [series[i - 1]], "test": [series[i]]}
            one["train"] = [s for s in series if s not in (series[i], series[i - 1])]
            turn = Hidden.of(one["test"], setting, seed=20_000 + i)

            def whole_turn(path: Path, one=one, turn=turn) -> None:
                found = choose(setting, one, stage.log)["chosen"]
                np.savez(
                    path, **closed_form(found, [*one["train"], *one["validation"]], turn, stage.log)
                )

            stage(f"turn-{i}.npz", whole_turn)
    stage(
        "draws.pt",
        lambda path: torch.save(draw(setting, sides, chosen["front_end"], stage.log), path),
    )
    draws, front = torch.load(folder / "draws.pt"), make_front(chosen["front_end"], known)
    # The front end fills each test scan once for all seeds.
    kept: dict[bytes, torch.Tensor] = {}

    def front_once(x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        key = x.numpy().tobytes() + hidden.numpy().tobytes()
        if key not in kept:
            kept[key] = front(x, hidden)
        return kept[key]

    rates = {
        "model": setting.front_rates,
        "blocks_alone": setting.rates,
        "transformer": setting.rates,
    }

    def one_seed(seed: int, path: Path) -> None:
        known_rates = rates
        if seed != setting.seeds[0]:
            first = json.loads((folder / f"seed-{setting.seeds[0]}.json").read_text())
            known_rates = {name: [rate] for name, rate in first["rates"].items()}
        trained = train_seed(
            setting, seed, sides, draws, chosen["front_end"], known_rates, stage.log
        )
        residual = {}
        for name, (network, _, _) in trained.items():
            fill = partial(_network_fill, network, front_once if name == "model" else None)
            windows = held.sums(held.fill(fill, whole=False))[0].tolist()
            residual[name + "/windows"] = windows
            # A transformer has positions for its windows only.
            residual[name] = (
                windows if name == "transformer" else held.sums(held.fill(fill))[0].tolist()
            )
            torch.save(network.state_dict(), folder / f"{name}-{seed}.pt")
        network = trained["model"][0].fit_front([s.values for s in known])
        record = {
            "objective": {"hidden_share": setting.hidden_share, "mask_window": setting.mask_window},
            "seed": seed,
            "train_participants": sorted({s.participant for s in sides["train"]}),
            "validation_participants": sorted({s.participant for s in sides["validation"]}),
            "validation_r2_hidden": max(
                max(curve.values()) for curve in trained["model"][1].values()
            ),
        }
        parcels = tuple(f"{data}-{i + 1}" for i in range(network.config.n_parcels))
        checkpoint = Checkpoint(network, parcels, float(known[0].t_r), Scaling(), None, record)
        save_checkpoint(folder / f"checkpoint-{seed}", checkpoint)
        found = {
            "residual": residual,
            "curves": {name: curves for name, (_, curves, _) in trained.items()},
            "rates": {name: rate for name, (_, _, rate) in trained.items()},
            "n_parameters": {
                n: sum(p.numel() for p in net.parameters()) for n, (net, _, _) in trained.items()
            },
        }
        write_json(path, found | stamp())

    for seed in setting.seeds:
        stage(f"seed-{seed}.json", partial(one_seed, seed))
    return report(data, setting, folder, held, facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=sorted(SETTINGS))
    options = options_of(parser)
    work = options.work or resolve(f"runs/reconstruct/{options.data}")
    try:
        found = run(options.data, SETTINGS[options.data], work, options.folder)
    except (FileNotFoundError, ValueError) as error:
        print(f"reconstruct: {error}", file=sys.stderr)
        return 2
    out = write_json(options.out or resolve(f"book/data/reconstruction_{options.data}.json"), found)
    print(
        f"{out}: "
        + ", ".join(f"{name} {row['value']:.3f}" for name, row in found["r2_hidden"].items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
