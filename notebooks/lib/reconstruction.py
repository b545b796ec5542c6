"""The study of reconstruction: methods at their best settings, and every method on the same scans."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.transformer import PatchTransformer
from mnemodyn.data.scans import Scan
from mnemodyn.evaluate.baselines import Gaussian, Interpolation, Zero
from mnemodyn.evaluate.reconstruction import FrontEnd, HiddenScan, Method, fill, r2, sums
from mnemodyn.model.front import Front
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig, Settings

# Methods without an adaptation to the scan: linear in what is visible.
LINEAR = (
    "zero",
    "interpolation",
    "spatial_gaussian",
    "low_rank",
    "var",
    "spatiotemporal_gaussian",
)
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


def front_settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings by the names that a network has for them."""
    named = {f"front_{name}": value for name, value in chosen.items()}
    return {"front": "gaussian", "front_steps": FRONT_STEPS, **named}


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


def residuals(
    method: Method, scans: Sequence[HiddenScan], n_timepoints: int, *, window: int = 0
) -> np.ndarray:
    """Residual sums of squares by stretch of `n_timepoints` frames, filled whole or by windows."""
    residual, _, _ = sums(scans, fill(method, scans, window=window), n_timepoints)
    return residual


def rival_makers(settings: Settings, n_parcels: int) -> dict[str, Callable[[], torch.nn.Module]]:
    """What makes each rival: the operator blocks alone, and the widest transformer of no more parameters."""
    model = {**settings.model.to_dict(), "n_parcels": n_parcels, "front": "none"}
    blocks = partial(MnemoDyn, ModelConfig(**model))
    n_timepoints = settings.model.n_timepoints
    patch = settings.objective.mask_window
    if n_timepoints % patch:
        patch = 8
    transformer = partial(
        PatchTransformer, n_parcels, n_timepoints, n_layers=4, time_patch=patch
    )
    width = 16
    while n_parameters(transformer(width=width + 8)) <= n_parameters(blocks()):
        width += 8
    return {"blocks_alone": blocks, "transformer": partial(transformer, width=width)}


def n_parameters(network: torch.nn.Module) -> int:
    """Trained parameters of a network."""
    return sum(p.numel() for p in network.parameters())
