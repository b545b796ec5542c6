"""The study of scaling: methods on some of the people, and blocks moved to another atlas."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib import reconstruction as study
from lib.figures import errors, legend_above, panels
from mnemodyn.checkpoint import from_pretrained
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Collection
from mnemodyn.evaluate.baselines import Gaussian
from mnemodyn.evaluate.reconstruction import HiddenScan, Network, r2
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.training import pretrain, pretrain_several
from mnemodyn.results import label
from mnemodyn.settings import ModelConfig, Settings

# The maps that know the parcels: a network for another atlas has its own.
MAPS = ("field.input", "field.expansion", "lift", "output")
# Networks of the transfer: name -> what is trained.
TRANSFER = {
    "transferred": "operators from the first cohort, maps trained",
    "random_operators": "random operators, maps trained",
    "from_scratch": "trained whole",
}


def first_people(scans: Collection, n: int) -> Collection:
    """Scans of the first `n` participants of a fixed random order; all of them where `n` is 0."""
    people = sorted(set(scans.table["participant_id"]))
    order = np.random.default_rng(0).permutation(people)
    return scans.select(scans.table["participant_id"].isin(order[: n or None]))


def settings_for(
    model: Mapping[str, Any], masks: Mapping[str, Any], n_timepoints: int, steps: int, rate: float
) -> Settings:
    """Settings of blocks without a front end that are trained for so many steps of eight windows."""
    epochs = 5
    training = {
        "epochs": epochs,
        "windows_per_epoch": 8 * max(1, steps // epochs),
        "learning_rate": rate,
    }
    return study.settings_of(model, masks, training, n_timepoints, None)


def name_of(train: Collection, steps: int, n_channels: int) -> str:
    """The folder of blocks by what they were trained with."""
    people = train.table["participant_id"].nunique()
    return f"{people}-people-{steps}-steps-{n_channels}-channels"


def blocks(
    train: Collection, validation: Collection, folder: Path, settings: Settings
) -> dict[str, Network]:
    """Operator blocks without a front end, trained on windows of these scans."""
    checkpoint, _ = pretrain(train, validation, folder, settings)
    return {"blocks_alone": Network(checkpoint.model)}


def covariances(
    train: Collection, held: Sequence[HiddenScan], shrinkages: Sequence[float]
) -> dict[str, Any]:
    """Two Gaussians, their shrinkage chosen on validation people, and the front end, fitted to scans."""
    scaled = study.Scaled(train, Scaling())
    found: dict[str, Any] = {}
    for name, covariance in (
        ("spatial_gaussian", "spatial"),
        ("spatiotemporal_gaussian", "spatiotemporal"),
    ):
        tried = [Gaussian(covariance, shrinkage=a, tolerance=1e-4).fit(scaled) for a in shrinkages]
        scores = [r2(method, held) for method in tried]
        found[name] = tried[int(np.argmax(scores))]
    front = {
        "lags": 8,
        "shrinkage": found["spatiotemporal_gaussian"].shrinkage,
        "weight": 100.0,
        "modes": min(200, len(train) // 2),
    }
    found["front_end"] = study.fit_front(front, scaled)
    return found


def blocks_of(folder: Path) -> MnemoDyn:
    """The blocks that `blocks` has trained in a folder."""
    return from_pretrained(folder).model


def transfer(
    source: MnemoDyn,
    sides: Mapping[str, Collection],
    folder: Path,
    settings: Settings,
    seeds: Sequence[int],
) -> dict[str, list]:
    """The three networks of the transfer, trained with every seed on scans of another atlas."""
    train = sides["train"]
    config = ModelConfig(**settings.model.to_dict(), n_parcels=len(train[0].parcels))
    networks: dict[str, list] = {}
    for name in TRANSFER:
        make = partial(_with_operators, name, source, config)
        networks[name], _ = pretrain_several(
            train, sides["validation"], folder / name, settings, seeds=seeds, make=make
        )
    return networks


def _with_operators(name: str, source: MnemoDyn, config: ModelConfig) -> MnemoDyn:
    """A fresh network; its operators are frozen, and those of `source` where they are transferred."""
    network = MnemoDyn(config)
    weights = dict(source.named_parameters())
    for key, value in network.named_parameters():
        operator = not any(part in key for part in MAPS)
        if operator and name == "transferred":
            if weights[key].shape != value.shape:
                raise ValueError(
                    f"{key} has shape {tuple(weights[key].shape)} in the first cohort's network and "
                    f"{tuple(value.shape)} here; give transfer_timepoints the length of its windows, "
                    f"{source.config.n_timepoints} frames"
                )
            value.data.copy_(weights[key].data)
        value.requires_grad_(not operator or name == "from_scratch")
    return network


def figure(parts: Mapping[str, pd.DataFrame], bar: float) -> Figure:
    """R2 against a number, a panel each (axis name -> rows with ``x``), and a bar to reach."""
    drawn, axes = panels(len(parts), 2.8, sharey=True)
    for ax, (name, rows) in zip(axes, parts.items(), strict=True):
        for method, group in rows.groupby("method", sort=False):
            ax.errorbar(
                group["x"], group["value"], errors(group), marker="o", ms=4, label=label(method)
            )
        ax.axhline(bar, color="black", lw=0.8, ls=":")
        ax.set_xscale("log")
        ax.set_xlabel(name)
    axes[0].set_ylabel("R², hidden entries")
    legend_above(drawn, axes[0], ncols=2)
    plt.close(drawn)
    return drawn
