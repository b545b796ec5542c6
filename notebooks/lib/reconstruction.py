"""The study of reconstruction: methods at their best settings, and every method on the same scans."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mnemodyn.checkpoint import Checkpoint, save_checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Collection, Scan
from mnemodyn.evaluate.baselines import Gaussian, Interpolation, Zero
from mnemodyn.evaluate.reconstruction import (
    FrontEnd,
    HiddenScan,
    Network,
    fill,
    hide,
    r2,
    sums,
)
from mnemodyn.files import Kept, digest
from mnemodyn.model.front import Front
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.training import pretrain_several
from mnemodyn.results import COLUMNS
from mnemodyn.settings import ModelConfig, Settings
from mnemodyn.splits import families_of, hold_out

# Methods without an adaptation to the scan: linear in what is visible.
LINEAR = (
    "zero",
    "interpolation",
    "spatial_gaussian",
    "low_rank",
    "var",
    "spatiotemporal_gaussian",
)
WINDOWS_TOO = ("spatiotemporal_gaussian", "front_end", "model", "transformer")
FRONT_STEPS = 6  # of expectation maximisation; each costs as much as the one before


class Scaled(Sequence):
    """Scans (time, parcel), scaled when they are asked for, so that a cohort need not lie in memory."""

    def __init__(self, scans: Sequence[Scan], scale: Callable[[Scan], np.ndarray]):
        self.scans = scans
        self.scale = scale

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.scale(self.scans[i])


def fitted(
    chosen: Mapping[str, Mapping[str, Any]], train: Sequence[np.ndarray]
) -> Iterable[tuple[str, Any]]:
    """The methods of `choose` by name, each fitted to scaled scans when its turn comes."""
    plain = {"zero": Zero(), "interpolation": Interpolation()}
    for name, settings in chosen.items():
        if name == "front_end":
            yield name, fit_front(settings, train)
        else:
            method = plain.get(name) or Gaussian(**settings)
            yield name, method.fit(train)


def fit_front(settings: Mapping[str, Any], train: Sequence[np.ndarray]) -> FrontEnd:
    """The front end with settings of `choose`, fitted to scaled scans."""
    front = Front(train[0].shape[1], steps=FRONT_STEPS, **settings)
    return FrontEnd(front.fit(train))


def choose(
    train: Sequence[np.ndarray], held: Sequence[HiddenScan], options: Mapping[str, Sequence]
) -> dict[str, dict[str, Any]]:
    """Choose the settings of every baseline and of the front end by R2 in validation people.

    `train` are scaled scans, `held` those of validation people with entries hidden, and `options`
    what is tried: ``shrinkages``, ``ranks``, ``n_lags``, ``own``, ``front_weights`` and
    ``front_modes``. The lags are chosen with the shrinkage found before, and the weight of the
    scan's own covariance and the front end's settings with both. Returns settings by method.
    """

    def best(name: str, candidates: list[dict[str, Any]]) -> dict[str, Any]:
        if len(candidates) == 1:
            return candidates[0]
        scores = []
        for settings in candidates:
            # Solved less exactly than in the test, which changes R2 by less than 1e-4.
            scores.append(r2(Gaussian(**settings, tolerance=1e-3).fit(train), held))
            print(f"{name} {settings}: {scores[-1]:.4f}")
        return candidates[int(np.argmax(scores))]

    def with_shrinkage(**settings: Any) -> list[dict[str, Any]]:
        return [{**settings, "shrinkage": value} for value in options["shrinkages"]]

    chosen: dict[str, dict[str, Any]] = {"zero": {}, "interpolation": {}}
    chosen["spatial_gaussian"] = best("spatial", with_shrinkage(covariance="spatial"))
    ranks = [{"covariance": "low_rank", "rank": rank} for rank in options["ranks"]]
    chosen["low_rank"] = best("low rank", ranks)
    chosen["var"] = best("VAR", with_shrinkage(covariance="var"))
    process = best("process", with_shrinkage(n_lags=max(options["n_lags"])))
    process = best("process", [{**process, "n_lags": n} for n in options["n_lags"]])
    chosen["spatiotemporal_gaussian"] = process
    chosen["own_covariance"] = best("own", [{**process, "own": w} for w in options["own"]])
    chosen["front_end"] = _choose_front(train, held, process, options)
    return chosen


def _choose_front(
    train: Sequence[np.ndarray],
    held: Sequence[HiddenScan],
    process: Mapping[str, Any],
    options: Mapping[str, Sequence],
) -> dict[str, Any]:
    """The front end's settings, by the names that it has for them."""
    same = {"lags": process["n_lags"], "shrinkage": process["shrinkage"]}
    candidates = []
    scores = []
    several = len(options["front_modes"]) * len(options["front_weights"]) > 1
    for n_modes in options["front_modes"]:
        settings = {**same, "modes": n_modes}
        method = fit_front(settings, train) if several else None
        for weight in options["front_weights"]:
            candidates.append({**settings, "weight": weight})
            if method is None:
                return candidates[0]
            # The weight is no part of the fit, which the modes make slow.
            method.front.weight = weight
            scores.append(r2(method, held))
            print(f"front end, {n_modes} modes, weight {weight}: {scores[-1]:.4f}")
    return candidates[int(np.argmax(scores))]


def divide(
    scans: Collection,
    checkpoint: Checkpoint | None,
    strata: Sequence[str],
    division: dict[str, Any],
) -> dict[str, Collection]:
    """Training, validation and test scans: those that a checkpoint knows, or a new division."""
    people = scans.table["participant_id"]
    if checkpoint is None:
        labels = None
        if strata:
            labels = [" ".join(map(str, row)) for row in scans.table[list(strata)].to_numpy()]
        families = families_of(scans.table)
        rows = hold_out(people.tolist(), strata=labels, families=families, **division)
        return {side: scans.select(rows[side]) for side in rows}
    sides = {}
    for side in ("train", "validation"):
        sides[side] = people.isin(checkpoint.training[f"{side}_participants"])
    sides["test"] = ~(sides["train"] | sides["validation"])
    return {side: scans.select(rows.to_numpy()) for side, rows in sides.items()}


def settings_of(
    model: Mapping[str, Any],
    masks: Mapping[str, Any],
    training: Mapping[str, Any],
    n_timepoints: int,
    front: Mapping[str, Any] | None,
) -> Settings:
    """Settings of a training; `front` are those of `choose`, None for no front end."""
    structure = {"n_timepoints": n_timepoints, **model}
    if front is not None:
        structure["front"] = "gaussian"
        structure["front_steps"] = FRONT_STEPS
        structure.update({f"front_{name}": value for name, value in front.items()})
    content = {"model": structure, "objective": {"name": "masked", **masks}, "training": training}
    return Settings.from_mapping(content)


def train_all(
    sides: Mapping[str, Collection],
    folder: Path,
    settings: Settings,
    rival_settings: Settings,
    *,
    seeds: Sequence[int],
    rates: Mapping[str, Sequence[float]],
) -> tuple[dict[str, list[Any]], pd.DataFrame]:
    """Train the network (a checkpoint for each seed) and its rivals (a module for the first seed).

    `rates` are the learning rates tried by name, ``model`` and the rivals. Also returned is a row
    for each run: ``method, rate, seed, epoch`` (the one kept),
    ``score`` (validation), ``kept`` and ``n_parameters``.
    """
    makers = rival_makers(settings, len(sides["train"][0].parcels))
    networks = {}
    tables = []
    for name, tried in rates.items():
        asked, some_seeds = settings, seeds
        if name != "model":
            asked, some_seeds = rival_settings, seeds[:1]
        networks[name], table = pretrain_several(
            sides["train"],
            sides["validation"],
            folder / name,
            asked,
            seeds=some_seeds,
            rates=tried,
            make=makers.get(name),
        )
        size = n_parameters(getattr(networks[name][0], "model", networks[name][0]))
        tables.append(table.assign(method=name, n_parameters=size))
    return networks, pd.concat(tables, ignore_index=True)


class Remembering(torch.nn.Module):
    """A front end that remembers what it filled, because all training seeds have the same one."""

    def __init__(self, front: Front):
        super().__init__()
        self.front = front
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = x.masked_fill(hidden, 0)
        key = digest(x, hidden)
        if key not in self.kept:
            self.kept[key] = self.front(x, hidden)
        return self.kept[key]


def refit_fronts(
    checkpoints: Sequence[Checkpoint], known: Sequence[np.ndarray], folder: Path
) -> None:
    """Fit the front end of every network to scaled scans `known`, and save the first network.

    The baselines are tested with what the validation participants add, and so is the front end.
    """
    checkpoints[0].model.fit_front(known)
    save_checkpoint(folder, checkpoints[0])
    shared = Remembering(checkpoints[0].model.front)
    for checkpoint in checkpoints:
        checkpoint.model.front = shared


def totals(scans: Sequence[HiddenScan], n_timepoints: int) -> tuple[np.ndarray, np.ndarray]:
    """Total sums of squares by stretch of `n_timepoints` frames, and the person of each."""
    _, total, people = sums(scans, [scan.values for scan in scans], n_timepoints)
    return total, people


def residuals(
    methods: Iterable[tuple[str, Any]],
    scans: Sequence[HiddenScan],
    n_timepoints: int,
    by_windows: Container[str] = WINDOWS_TOO,
) -> dict[str, np.ndarray]:
    """Residual sums of squares (stretch,) of every method.

    Scans are filled whole. The methods in `by_windows` fill them with `n_timepoints` frames at a time
    too, under their name and ``, windows``; a transformer has positions for its windows only.
    """
    total, _ = totals(scans, n_timepoints)
    found = {}
    for name, method in methods:
        at_a_time = 0
        if name == "transformer":
            at_a_time = n_timepoints
        found[name], _, _ = sums(scans, fill(method, scans, window=at_a_time), n_timepoints)
        print(f"{name}: R2 {1 - found[name].sum() / total.sum():.4f}")
        if name in by_windows:
            filled = fill(method, scans, window=n_timepoints)
            found[f"{name}, windows"], _, _ = sums(scans, filled, n_timepoints)
    return found


def network_residuals(
    networks: Mapping[str, Sequence[Any]],
    scans: Sequence[HiddenScan],
    n_timepoints: int,
    kept: Kept,
    identity: Any,
) -> dict[str, np.ndarray]:
    """Residual sums of squares of the networks, (seed, stretch), and of their front end."""
    found: dict[str, list] = {}
    for name, trained in networks.items():
        for seed, one in enumerate(trained):
            network = getattr(one, "model", one)
            methods: dict[str, Any] = {name: Network(network)}
            front = getattr(network, "front", None)
            if front is not None and seed == 0:
                # The network and its front end alone fill the same scans.
                if not isinstance(front, Remembering):
                    network.front = front = Remembering(front)
                methods["front_end"] = FrontEnd(front)
            scored = kept(
                f"{name}-{seed}",
                [identity, dict(network.state_dict())],
                partial(residuals, methods.items(), scans, n_timepoints),
            )
            for method, values in scored.items():
                found.setdefault(method, []).append(values)
    return {name: np.array(values) for name, values in found.items()}


def as_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of results as a table with every column."""
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS)).fillna({"against": ""})


def each_held_out(
    scans: Collection,
    chosen: Mapping[str, Mapping[str, Any]],
    masks: Mapping[str, Any],
    n_timepoints: int,
) -> dict[str, Any]:
    """Hold out every participant once: residual sums of squares of the methods fitted to all others.

    Also returned are ``total`` and ``people``, by stretch like the sums.
    """
    participants = scans.table["participant_id"]
    found: dict[str, list] = {}
    for i, one in enumerate(sorted(set(participants))):
        out = (participants == one).to_numpy()
        rest = Scaled(scans.select(~out), Scaling())
        test = hide(scans.select(out), Scaling(), **masks, seed=20_000 + i)
        scored: dict[str, Any] = residuals(fitted(chosen, rest), test, n_timepoints, by_windows=())
        scored["total"], scored["people"] = totals(test, n_timepoints)
        for name, values in scored.items():
            found.setdefault(name, []).extend(values.tolist())
    return found


def rival_makers(settings: Settings, n_parcels: int) -> dict[str, Callable[[], torch.nn.Module]]:
    """What makes each rival: the operator blocks alone, and the widest transformer of no more parameters."""
    # Not installed with the package: only a page that trains rivals needs it.
    from benchmarks.transformer import PatchTransformer

    model = {**settings.model.to_dict(), "n_parcels": n_parcels, "front": "none"}
    blocks = partial(MnemoDyn, ModelConfig(**model))
    n_timepoints = settings.model.n_timepoints
    patch = settings.objective.mask_window
    if n_timepoints % patch:
        patch = 8
    transformer = partial(PatchTransformer, n_parcels, n_timepoints, n_layers=4, time_patch=patch)
    width = 16
    while n_parameters(transformer(width=width + 8)) <= n_parameters(blocks()):
        width += 8
    return {"blocks_alone": blocks, "transformer": partial(transformer, width=width)}


def n_parameters(network: torch.nn.Module) -> int:
    """Trained parameters of a network."""
    return sum(p.numel() for p in network.parameters())
