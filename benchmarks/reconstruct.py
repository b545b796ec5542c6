"""Does the network fill hidden entries of new people better than linear statistics? From scratch, with seeds.

``make reconstruct DATA=hcp7`` and ``DATA=abide`` run this; every finished stage is kept in ``runs/reconstruct``, so
that an interrupted run goes on. Everything is chosen on validation participants; test participants are read once a
seed.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from benchmarks.transformer import PatchTransformer
from mnemodyn.checkpoint import Checkpoint, save_checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import load_scans
from mnemodyn.evaluate.baselines import VAR, Interpolation, LowRank, SpatialGaussian, SpatiotemporalGaussian, Zero
from mnemodyn.evaluate.metrics import hidden_sums
from mnemodyn.files import resolve, write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.front import Front
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.objective import Masked
from mnemodyn.pretrain.windows import cut_windows
from mnemodyn.provenance import surroundings

# Rows of methods that read all windows of a scan at once.
WHOLE = "_whole_scan"
LINEAR = ("zero", "interpolation", "spatial_gaussian", "low_rank", "var", "spatiotemporal_gaussian")
# ABIDE site descriptions, seconds; Leuven's and UCLA's two samples are alike.
ABIDE_T_R = {"KKI": 2.5, "LEUVEN": 1.66, "MAXMUN": 3.0, "OHSU": 2.5, "OLIN": 1.5, "PITT": 1.5, "SBL": 2.2, "UCLA": 3.0}
ABIDE_T_R |= dict.fromkeys(["CALTECH", "CMU", "NYU", "SDSU", "STANFORD", "TRINITY", "UM", "USM", "YALE"], 2.0)
# Scans so alike that they look like one person's: they stay on one side of every split.
SAME_PERSON = {"Yale_0050578": "Yale_0050602", "KKI_0050808": "KKI_0050805"}
MAX_CONSTANT = 10
# Of expectation maximisation, whose cost grows with them.
FRONT_STEPS = 6


@dataclass(frozen=True)
class Setting:
    """What is asked, and how it is answered. ``front_*``, `shrinkages` and `ranks` are tried on validation people."""

    n_timepoints: int
    hidden_share: float
    mask_window: int
    front_weights: tuple[float, ...]
    front_modes: tuple[int, ...]
    shrinkages: tuple[float, ...]
    ranks: tuple[int, ...]
    draws: int
    epochs: int
    seeds: tuple[int, ...] = (0, 1, 2)
    preset: str = "mnemodyn-small"
    learning_rate: float = 2e-3
    front_learning_rate: float = 3e-4  # of blocks that begin as no change to the front end
    batch_size: int = 8
    tried: int = 24


SETTINGS = {
    "hcp7": Setting(240, 0.55, 15, (100.0, 200.0, 400.0), (0,), (0.03, 0.1, 0.2), (8, 16, 32), draws=160, epochs=6),
    "abide": Setting(112, 0.6, 5, (100.0, 200.0), (0, 200), (0.01, 0.03, 0.1), (24, 48, 96), draws=240, epochs=4),
}


@dataclass(frozen=True)
class Series:
    """A scaled scan: values (time, parcel), t_r in seconds, which parcels are constant, and what it is split by."""

    participant: str
    values: np.ndarray
    t_r: float
    constant: np.ndarray
    stratum: str = ""


def read_abide(folder: Path, n_timepoints: int) -> tuple[list[Series], dict]:
    """The usable scans of an ABIDE release folder, and how many were left out for what."""
    tables, files = sorted(folder.glob("*henotypic*.csv")), sorted(folder.rglob("*_rois_cc200.1D"))
    if not tables or not files:
        raise FileNotFoundError(
            f"ABIDE: expected *_rois_cc200.1D files and a phenotypic CSV table in {folder}, found {len(files)} and "
            f"{len(tables)}; name the folder with ABIDE=FOLDER or MNEMODYN_DATA"
        )
    diagnosis = pd.read_csv(tables[0]).set_index("FILE_ID")["DX_GROUP"].to_dict()
    left_out, series = {"constant-parcels": 0, "too-short": 0}, []
    for path in files:
        values = pd.read_csv(path, sep="\t").to_numpy(np.float64)
        name = path.name.removesuffix("_rois_cc200.1D")
        constant = values.std(0) <= 1e-6 * np.abs(values).max()
        if len(values) < n_timepoints or constant.sum() > MAX_CONSTANT:
            left_out["too-short" if len(values) < n_timepoints else "constant-parcels"] += 1
            continue
        scaled = np.where(constant, 0, (values - values.mean(0)) / np.where(constant, 1, values.std(0)))
        site = re.sub(r"_\d+$", "", name)
        t_r = ABIDE_T_R[re.sub(r"_.*", "", site).upper()]
        series.append(
            Series(
                SAME_PERSON.get(name, name), scaled.astype(np.float32), t_r, constant, f"{site} {diagnosis.get(name)}"
            )
        )
    return series, left_out


def split(series: list[Series]) -> dict[str, list[Series]]:
    """A tenth of the people of every stratum to the test, a twentieth to validation; who is who is drawn once."""
    strata: dict[str, str] = {}
    for s in series:
        strata.setdefault(s.participant, s.stratum)
    people = list(np.random.default_rng(0).permutation(sorted(strata)))
    people.sort(key=lambda p: strata[p])  # stable: drawn order within a stratum
    side = {p: "test" if i % 10 == 3 else "validation" if i % 20 == 8 else "train" for i, p in enumerate(people)}
    return {name: [s for s in series if side[s.participant] == name] for name in ("train", "validation", "test")}


def read(data: str, setting: Setting, folder: Path | None) -> tuple[dict[str, list[Series]], dict]:
    """The three sides, and what was left out."""
    if data == "abide":
        if folder is None:
            raise FileNotFoundError("ABIDE: name its folder with ABIDE=FOLDER or MNEMODYN_DATA")
        series, left_out = read_abide(folder, setting.n_timepoints)
        return split(series), left_out
    series = [Series(s.participant_id, Scaling()(s), s.t_r, np.zeros(len(s.parcels), bool)) for s in load_scans("hcp7")]
    return {"train": series[:4], "validation": series[4:5], "test": series[5:]}, {}


@dataclass(frozen=True)
class Windows:
    """Windows x (window, time, parcel), what is `hidden` from a method, what is `scored`, t_r and whose they are.

    A constant parcel is hidden throughout, and never scored.
    """

    x: np.ndarray
    hidden: np.ndarray
    scored: np.ndarray
    t_r: np.ndarray
    people: np.ndarray

    @classmethod
    def of(cls, series: list[Series], starts: list[list[int]], setting: Setting, seed: int) -> "Windows":
        n = setting.n_timepoints
        x = np.stack([s.values[a : a + n] for s, at in zip(series, starts, strict=True) for a in at])
        rows = [s for s, at in zip(series, starts, strict=True) for _ in at]
        hidden = Masked(setting.hidden_share, setting.mask_window).hide(x.shape, seed).numpy()
        constant = np.stack([s.constant for s in rows])[:, None]
        t_r, people = np.array([s.t_r for s in rows], np.float32), np.array([s.participant for s in rows])
        return cls(x, hidden | constant, hidden & ~constant, t_r, people)

    @classmethod
    def consecutive(cls, series: list[Series], setting: Setting, seed: int) -> "Windows":
        n = setting.n_timepoints
        return cls.of(series, [[i * n for i in range(len(cut_windows(s.values, n)))] for s in series], setting, seed)

    def some(self, n: int) -> "Windows":
        """At most `n` of them, evenly spread."""
        rows = np.unique(np.linspace(0, len(self.x) - 1, n).round().astype(int))
        return Windows(self.x[rows], self.hidden[rows], self.scored[rows], self.t_r[rows], self.people[rows])

    def joined(self) -> list[tuple[np.ndarray, "Windows"]]:
        """Rows and windows of every participant, these joined end to end to one long window."""
        groups = [np.flatnonzero(self.people == p) for p in dict.fromkeys(self.people)]
        return [
            (r, Windows(*(a[r].reshape(1, -1, a.shape[-1]) for a in (self.x, self.hidden, self.scored)), *self._of(r)))
            for r in groups
        ]

    def _of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.t_r[rows[:1]], self.people[rows[:1]]

    def whole(self, fill) -> np.ndarray:
        """What ``fill(windows)`` makes of every participant's windows joined, cut into windows again."""
        out = np.empty_like(self.x)
        for rows, windows in self.joined():
            out[rows] = fill(windows).reshape(out[rows].shape)
        return out

    def sums(self, filled: np.ndarray) -> np.ndarray:
        """(2, window): residual and total sums of squares over scored entries."""
        return np.stack(hidden_sums(self.x, filled, self.scored))

    def r2(self, filled: np.ndarray) -> float:
        residual, total = self.sums(filled).sum(1)
        return float(1 - residual / total)


def fill_front(front: Front, windows: Windows) -> np.ndarray:
    x, hidden = torch.from_numpy(windows.x), torch.from_numpy(windows.hidden)
    return torch.cat([front(a, b) for a, b in zip(x.split(8), hidden.split(8), strict=True)]).numpy()


def make_front(setting: Setting, chosen: dict, series: list[Series]) -> Front:
    front = Front(series[0].values.shape[1], **{"weight": 1.0, "steps": FRONT_STEPS} | chosen)
    return front.fit([s.values for s in series])


def choose(setting: Setting, sides: dict, log) -> dict:
    """Every setting of a baseline by R2 on hidden entries of validation people."""
    train = [s.values for s in sides["train"]]
    windows = Windows.consecutive(sides["validation"], setting, seed=100).some(setting.tried)
    r2: dict[str, dict] = defaultdict(dict)

    def best(name: str, options: dict):
        for label, method in options.items():
            r2[name][str(label)] = windows.r2(method.fit(train).fill(windows.x, windows.hidden))
        log(f"{name}: {r2[name]}")
        return max(options, key=lambda label: r2[name][str(label)])

    found = {
        "spatial_gaussian": best("spatial_gaussian", {a: SpatialGaussian(a) for a in setting.shrinkages}),
        "var": best("var", {a: VAR(a) for a in setting.shrinkages}),
        "low_rank": best("low_rank", {r: LowRank(r) for r in setting.ranks}),
    }
    options = {(a, 8): SpatiotemporalGaussian(a, 8) for a in setting.shrinkages}
    shrinkage, _ = best("spatiotemporal_gaussian", options)
    options = {(shrinkage, n): SpatiotemporalGaussian(shrinkage, n) for n in (2, 4)}
    best("spatiotemporal_gaussian", options)
    tried = r2["spatiotemporal_gaussian"]
    n_lags = next(n for n in (8, 4, 2) if tried[str((shrinkage, n))] == max(tried.values()))
    found["spatiotemporal_gaussian"] = [shrinkage, n_lags]
    own = {w: SpatiotemporalGaussian(shrinkage, n_lags, own=w) for w in (0.02, 0.05, 0.1, 0.2)}
    found["own_covariance"] = best("own_covariance", own)
    return {"chosen": found, "validation_r2": r2, "windows": len(windows.x)}


def choose_front(setting: Setting, sides: dict, chosen: dict, log) -> dict:
    """The front end on the chosen spatio-temporal Gaussian: its weight and modes, by R2 on validation people."""
    windows = Windows.consecutive(sides["validation"], setting, seed=100).some(setting.tried)
    shrinkage, n_lags = chosen["spatiotemporal_gaussian"]
    r2, best = [], None
    for n_modes in setting.front_modes:
        front = make_front(setting, {"n_lags": n_lags, "shrinkage": shrinkage, "n_modes": n_modes}, sides["train"])
        for weight in setting.front_weights:
            front.weight = weight
            r2.append({"n_modes": n_modes, "weight": weight, "r2": windows.r2(fill_front(front, windows))})
            log(f"front end: {r2[-1]}")
    best = max(r2, key=lambda row: row["r2"])
    return {
        "chosen": {"n_lags": n_lags, "shrinkage": shrinkage, "weight": best["weight"], "n_modes": best["n_modes"]},
        "validation_r2": r2,
    }


def draw(setting: Setting, sides: dict, chosen: dict, log) -> dict:
    """Training and validation windows with what the front end makes of them.

    A front end has seen the people it was fitted to, and fills new ones less well. So that the blocks learn to correct
    what they will meet, the front end of each fold of people is fitted to the others.
    """
    rng, n = np.random.default_rng(1), setting.n_timepoints
    everyone = [*sides["train"], *sides["validation"]]
    people = sorted({s.participant for s in sides["train"]})
    fold = {p: i % min(5, len(people)) for i, p in enumerate(people)} | {s.participant: -1 for s in sides["validation"]}
    parts: dict[str, list] = defaultdict(list)
    for k in sorted(set(fold.values())):
        inside = [s for s in everyone if fold[s.participant] == k]
        front = make_front(setting, chosen, [s for s in everyone if fold[s.participant] != k])
        if k < 0:
            windows = Windows.consecutive(inside, setting, seed=100)
        else:
            count = np.bincount(
                np.arange(round(setting.draws * len(inside) / len(sides["train"]))) % len(inside), minlength=len(inside)
            )
            starts = [rng.integers(0, len(s.values) - n + 1, c).tolist() for s, c in zip(inside, count, strict=True)]
            kept = [(s, at) for s, at in zip(inside, starts, strict=True) if at]
            windows = Windows.of([s for s, _ in kept], [at for _, at in kept], setting, seed=200 + k)
        parts["validation" if k < 0 else "train"].append((windows, fill_front(front, windows)))
        log(f"front end of fold {k}: R2 {windows.r2(parts['validation' if k < 0 else 'train'][-1][1]):.4f}")
    out = {}
    for side, found in parts.items():
        for name in ("x", "hidden", "scored", "t_r"):
            out[f"{side}_{name}"] = torch.from_numpy(np.concatenate([getattr(w, name) for w, _ in found]))
        out[f"{side}_filled"] = torch.from_numpy(np.concatenate([f for _, f in found]))
    return out


def train(
    network: torch.nn.Module, predict, draws: dict, setting: Setting, rate: float, seed: int, log
) -> tuple[dict, list]:
    """AdamW with a cosine schedule; the averaged weights of the epoch that is best on the validation windows."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    per_epoch = math.ceil(len(draws["train_x"]) / setting.batch_size)
    total = setting.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / (0.1 * total)) * max(0.01, 0.5 * (1 + math.cos(math.pi * i / total)))
    )
    averaged, best, history, step = copy.deepcopy(network), (-math.inf, None), [], 0

    def score() -> float:
        residual = power = 0.0
        with torch.no_grad():
            for rows in torch.arange(len(draws["validation_x"])).split(16):
                x, scored = draws["validation_x"][rows], draws["validation_scored"][rows]
                error = (predict(averaged, draws, "validation", rows) - x)[scored]
                residual, power = residual + error.square().sum().item(), power + x[scored].square().sum().item()
        return 1 - residual / power

    for epoch in range(setting.epochs + 1):
        if epoch:
            for rows in torch.randperm(len(draws["train_x"]), generator=generator).split(setting.batch_size):
                scored = draws["train_scored"][rows]
                out = predict(network, draws, "train", rows)
                loss = functional.mse_loss(out[scored], draws["train_x"][rows][scored])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                step += 1
                decay = min(0.98, (1 + step) / (10 + step))
                with torch.no_grad():
                    for a, b in zip(averaged.parameters(), network.parameters(), strict=True):
                        a.lerp_(b, 1 - decay)
        history.append(score())
        log(f"seed {seed} epoch {epoch}: validation R2 {history[-1]:.4f}")
        if history[-1] > best[0]:
            best = (history[-1], copy.deepcopy(averaged.state_dict()))
    return best[1], history


def _network_predict(network, draws, side, rows):
    part = {name: draws[f"{side}_{name}"][rows] for name in ("x", "hidden", "filled", "t_r")}
    filled = None if network.front is None else part["filled"]
    return network(part["x"], part["t_r"], hidden=part["hidden"], filled=filled).reconstruction


def _transformer_predict(network, draws, side, rows):
    return network(draws[f"{side}_x"][rows].masked_fill(draws[f"{side}_hidden"][rows], 0), 1.0)


def transformer_like(setting: Setting, n_parcels: int, n_parameters: int) -> PatchTransformer:
    """The widest transformer of four layers with at most `n_parameters`."""
    time_patch = setting.mask_window if setting.n_timepoints % setting.mask_window == 0 else 8
    make = partial(PatchTransformer, n_parcels, setting.n_timepoints, n_layers=4, time_patch=time_patch)
    width = 16
    while sum(p.numel() for p in make(width=width + 8).parameters()) <= n_parameters:
        width += 8
    return make(width=width)


@torch.no_grad()
def predictions(network, predict, windows: Windows, filled: np.ndarray) -> np.ndarray:
    parts = {"x": windows.x, "hidden": windows.hidden, "filled": filled, "t_r": windows.t_r}
    held = {f"test_{name}": torch.from_numpy(value) for name, value in parts.items()}
    rows = torch.arange(len(windows.x)).split(16)
    return torch.cat([predict(network, held, "test", r) for r in rows]).numpy()


def interval(model: np.ndarray, other: np.ndarray, total: np.ndarray, people: np.ndarray, n_boot: int = 2000) -> dict:
    """R2 of `model` minus R2 of `other` (seed, window), and its 95 % bootstrap interval.

    A resample draws people, of each of them windows, and training seeds, all with replacement; both methods get the
    same draw. With `other` all `total`, whose R2 is zero, it is the R2 of `model`.
    """
    rng = np.random.default_rng(0)
    groups = [np.flatnonzero(people == p) for p in np.unique(people)]
    n_seeds, values = len(model), []
    difference = np.broadcast_to(other, model.shape) - model
    for _ in range(n_boot):
        rows = np.concatenate(
            [rng.choice(groups[g], len(groups[g])) for g in rng.integers(0, len(groups), len(groups))]
        )
        seeds = rng.integers(0, n_seeds, n_seeds)
        values.append(difference[seeds][:, rows].sum() / (n_seeds * total[rows].sum()))
    low, high = np.quantile(values, [0.025, 0.975])
    value = difference.sum() / (n_seeds * total.sum())
    return {"value": round(float(value), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def report(data: str, setting: Setting, folder: Path, windows: Windows, facts: dict) -> dict:
    """The JSON of the book: every method's R2 with its interval, and the network minus each of them."""
    stored = np.load(folder / "baselines.npz")
    linear_whole = np.load(folder / "whole.npz")
    seeds = [json.loads((folder / f"seed-{s}.json").read_text()) for s in setting.seeds]
    every = {name: stored[name][None] for name in stored.files if name != "total"}
    every |= {name: linear_whole[name][None] for name in linear_whole.files}
    fills = np.load(folder / "front.npz")
    every |= {"front_end": windows.sums(fills["plain"])[:1], "front_end" + WHOLE: windows.sums(fills["whole"])[:1]}
    every |= {name: np.array([s["residual"][name] for s in seeds]) for name in seeds[0]["residual"]}
    total, people = stored["total"], windows.people

    def table(sums: dict) -> dict:
        rows = {name: interval(residual, total, total, people) for name, residual in sums.items()}
        for name, residual in sums.items():
            if name != "model":
                rows[name]["difference"] = interval(sums["model"], residual, total, people)
        return {name: rows[name] for name in sorted(rows, key=lambda n: -rows[n]["value"])}

    sums = {name: residual for name, residual in every.items() if not name.endswith(WHOLE)}
    rows = table(sums)
    best = next(name for name in rows if name in LINEAR)
    settings = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("choice", "front")}
    return {
        "data": data,
        "r2_hidden": rows,
        "best_linear": best,
        "above_best_linear": rows[best]["difference"],
        "whole_scan": table({n.removesuffix(WHOLE): r for n, r in every.items() if n.endswith(WHOLE)}),
        "linear": list(LINEAR),
        "interval": "95 %, bootstrap over people, their windows and training seeds",
        "by_seed": {n: (1 - r.sum(1) / total.sum()).round(5).tolist() for n, r in sums.items() if len(r) > 1},
        "validation": {
            "settings": settings,
            "front_end": float(np.mean([s["history"]["model"][0] for s in seeds])),
            "by_epoch": {name: [s["history"][name] for s in seeds] for name in seeds[0]["history"]},
        },
        "n_parameters": seeds[0]["n_parameters"],
        "preset": setting.preset,
        "n_people": len(set(people)),
        "n_windows": len(people),
        "n_hidden_entries": int(windows.scored.sum()),
        "hidden_share": setting.hidden_share,
        "mask_window": setting.mask_window,
        "n_timepoints": setting.n_timepoints,
        "seeds": list(setting.seeds),
        **facts,
        "cpu_minutes": round(sum(s["cpu_minutes"] for s in json.loads((folder / "times.json").read_text())), 1),
        "commit": seeds[0]["commit"],
        "date": seeds[-1]["date"],
        "device": f"CPU, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
    }


class Stages:
    """Stages whose results are kept: each runs once, and its processor time is written down."""

    def __init__(self, folder: Path):
        self.folder = folder

    def log(self, text: str) -> None:
        print(f"[{time.process_time() / 60:6.1f} CPU min] {text}", flush=True)

    def __call__(self, name: str, make) -> Path:
        path, start = self.folder / name, time.process_time()
        if not path.is_file():
            self.log(f"-> {name}")
            make(path)
            times = self.folder / "times.json"
            done = json.loads(times.read_text()) if times.is_file() else []
            minutes = (time.process_time() - start) / 60
            write_json(times, [d for d in done if d["stage"] != name] + [{"stage": name, "cpu_minutes": minutes}])
        return path


def run(data: str, setting: Setting, folder: Path, source: Path | None) -> dict:
    """All stages; returns the report."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stages(folder)
    settings = json.loads(json.dumps(setting.__dict__))
    stage("setting.json", lambda path: write_json(path, settings))
    if json.loads((folder / "setting.json").read_text()) != settings:
        raise ValueError(f"{folder} holds a run of other settings; delete it to start again")
    sides, left_out = read(data, setting, source)
    facts = {"left_out": left_out} | {
        f"n_{k}": len({s.participant for s in v}) for k, v in sides.items() if k != "test"
    }
    stage("choice.json", lambda path: write_json(path, choose(setting, sides, stage.log)))
    chosen = json.loads((folder / "choice.json").read_text())["chosen"]
    stage("front.json", lambda path: write_json(path, choose_front(setting, sides, chosen, stage.log)))
    front = json.loads((folder / "front.json").read_text())["chosen"]
    windows = Windows.consecutive(sides["test"], setting, seed=300)
    known = [*sides["train"], *sides["validation"]]

    def fill_test(path: Path) -> None:
        a, n = chosen["spatiotemporal_gaussian"]
        methods = {
            "zero": Zero(),
            "interpolation": Interpolation(),
            "spatial_gaussian": SpatialGaussian(chosen["spatial_gaussian"]),
            "low_rank": LowRank(chosen["low_rank"]),
            "var": VAR(chosen["var"]),
            "spatiotemporal_gaussian": SpatiotemporalGaussian(a, n),
            "own_covariance": SpatiotemporalGaussian(a, n, own=chosen["own_covariance"]),
        }
        sums = {}
        for name, method in methods.items():
            filled = method.fit([s.values for s in known]).fill(windows.x, windows.hidden)
            sums[name], sums["total"] = windows.sums(filled)
            stage.log(f"{name}: {1 - sums[name].sum() / sums['total'].sum():.4f}")
        np.savez(path, **sums)

    def fill_test_whole(path: Path) -> None:
        linear = SpatiotemporalGaussian(*chosen["spatiotemporal_gaussian"]).fit([s.values for s in known])
        filled = windows.whole(lambda long: linear.fill(long.x, long.hidden))
        np.savez(path, **{"spatiotemporal_gaussian" + WHOLE: windows.sums(filled)[0]})

    def fill_test_front(path: Path) -> None:
        fitted = make_front(setting, front, known)
        np.savez(path, plain=fill_front(fitted, windows), whole=windows.whole(lambda long: fill_front(fitted, long)))

    stage("draws.pt", lambda path: torch.save(draw(setting, sides, front, stage.log), path))
    stage("baselines.npz", fill_test)
    stage("whole.npz", fill_test_whole)
    stage("front.npz", fill_test_front)
    draws, fills = torch.load(folder / "draws.pt"), np.load(folder / "front.npz")
    filled, whole = fills["plain"], fills["whole"]
    filled_whole = {w.people[0]: whole[rows].reshape(w.x.shape) for rows, w in windows.joined()}
    n_parcels = windows.x.shape[-1]

    def train_seed(seed: int, path: Path) -> None:
        config = ModelConfig.preset(
            setting.preset,
            n_parcels=n_parcels,
            n_timepoints=setting.n_timepoints,
            front_lags=front["n_lags"],
            front_shrinkage=front["shrinkage"],
            front_weight=front["weight"],
            front_modes=front["n_modes"],
            front_steps=FRONT_STEPS,
        )
        torch.manual_seed(seed)
        network = MnemoDyn(config).fit_front([s.values for s in known])
        size = sum(p.numel() for p in network.parameters())
        torch.manual_seed(seed)
        rivals = {
            "model": (network, _network_predict),
            "blocks_alone": (MnemoDyn(dataclasses.replace(config, front="none")), _network_predict),
            "transformer": (transformer_like(setting, n_parcels, size), _transformer_predict),
        }
        residual, history = {}, {}
        for name, (net, predict) in rivals.items():
            stage.log(f"seed {seed}: {name}")
            rate = setting.front_learning_rate if net is network else setting.learning_rate
            state, history[name] = train(net, predict, draws, setting, rate, seed, stage.log)
            net.load_state_dict(state)
            residual[name] = windows.sums(predictions(net, predict, windows, filled))[0].tolist()
        whole = windows.whole(lambda long: predictions(network, _network_predict, long, filled_whole[long.people[0]]))
        residual["model" + WHOLE] = windows.sums(whole)[0].tolist()
        record = {
            "objective": {"hidden_share": setting.hidden_share, "mask_window": setting.mask_window},
            "seed": seed,
            "train_participants": sorted({s.participant for s in sides["train"]}),
            "validation_participants": sorted({s.participant for s in sides["validation"]}),
            "validation_r2_hidden": max(history["model"]),
        }
        parcels = tuple(f"{data}-{i + 1}" for i in range(n_parcels))
        save_checkpoint(
            folder / f"checkpoint-{seed}", Checkpoint(network, parcels, known[0].t_r, Scaling(), None, record)
        )
        around = surroundings()
        found = {
            "residual": residual,
            "history": history,
            "n_parameters": {name: sum(p.numel() for p in net.parameters()) for name, (net, _) in rivals.items()},
            "commit": around["commit"] + (" with changes" if around["dirty"] else ""),
            "date": datetime.now(UTC).date().isoformat(),
        }
        write_json(path, found)

    for seed in setting.seeds:
        stage(f"seed-{seed}.json", partial(train_seed, seed))
    return report(data, setting, folder, windows, facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=sorted(SETTINGS))
    parser.add_argument("--folder", type=Path, help="of the ABIDE release; otherwise MNEMODYN_DATA")
    parser.add_argument("--work", type=Path, help="where stages are kept; runs/reconstruct/DATA otherwise")
    parser.add_argument("--out", type=Path, help="the JSON; book/data/reconstruction_DATA.json otherwise")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    source = options.folder or (Path(os.environ["MNEMODYN_DATA"]) if os.environ.get("MNEMODYN_DATA") else None)
    work = options.work or resolve(f"runs/reconstruct/{options.data}")
    try:
        found = run(options.data, SETTINGS[options.data], work, source)
    except (FileNotFoundError, ValueError) as error:
        print(f"reconstruct: {error}", file=sys.stderr)
        return 2
    out = write_json(options.out or resolve(f"book/data/reconstruction_{options.data}.json"), found)
    print(f"{out}: " + ", ".join(f"{name} {row['value']:.3f}" for name, row in found["r2_hidden"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
