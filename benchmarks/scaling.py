"""How R2 on hidden entries of held-out people grows with training people, steps and parameters; and what transfers.

``make scaling ABIDE=FOLDER`` runs this in about forty minutes of one CPU core. People, masks and windows
are those of `benchmarks.reconstruct` on ABIDE; finished stages are kept in ``runs/scaling``. What is trained are the
operator blocks without a front end: behind one they change nothing, see ``book/data/reconstruction_abide.json``.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.reconstruct import (
    SETTINGS,
    Hidden,
    Series,
    Setting,
    Stages,
    _network_fill,
    config_of,
    fit,
    fresh,
    front_fill,
    linear,
    make_front,
    options_of,
    read,
    split,
    stamp,
    table,
)
from mnemodyn.evaluate.baselines import SpatialGaussian, SpatiotemporalGaussian
from mnemodyn.files import resolve, write_json
from mnemodyn.model.network import MnemoDyn

PEOPLE, STEPS, CHANNELS, SEEDS = (8, 40, 200, None), (100, 300, 1000), (8, 32, 64), (0, 1, 2)
BUDGET, RATE, ADAPTING = 1000, 3e-3, 300
# Those maps that know the parcels: a network of another atlas has its own.
MAPS = ("field.input", "field.expansion", "lift", "output")


def blocks(
    setting: Setting, sides: dict, steps: int, seed: int, log, **changes
) -> tuple[MnemoDyn, dict]:
    """Operator blocks trained for `steps` on fresh windows of the training people."""
    config = replace(config_of(setting, sides["train"][0].values.shape[1], None), **changes)
    torch.manual_seed(seed)
    network = MnemoDyn(config)
    validation = next(fresh(sides["validation"], setting, 200, 64))
    curve = fit(network, fresh(sides["train"], setting, 1000 + seed), validation, steps, RATE, log)
    return network.eval(), curve


def scores(held: Hidden, fills: dict[str, Callable]) -> dict:
    """R2 of every method with its interval over people."""
    sums = {name: held.sums(held.fill(fill)) for name, fill in fills.items()}
    total = next(iter(sums.values()))[1]
    return table(
        {n: s[0][None] for n, s in sums.items()}, total, held.people, ours=next(iter(fills))
    )


def by_people(n: int | None, setting: Setting, sides: dict, held: Hidden, log) -> dict:
    """All methods on the first `n` training people of one fixed order; all of them where `n` is None."""
    people = np.random.default_rng(0).permutation(sorted({s.participant for s in sides["train"]}))[
        :n
    ]
    some = sides | {"train": [s for s in sides["train"] if s.participant in set(people)]}
    train = [s.values for s in some["train"]]
    validation = Hidden.of(sides["validation"], setting, seed=100)

    def best(make: Callable, shrinkages: tuple[float, ...]):
        made = {a: make(a).fit(train) for a in shrinkages}
        return max(made.items(), key=lambda item: validation.r2(linear(item[1])))

    shrinkage, process = best(partial(SpatiotemporalGaussian, n_lags=8), (0.03, 0.2))
    chosen = {
        "n_lags": 8,
        "shrinkage": shrinkage,
        "weight": 100.0,
        "n_modes": min(200, len(train) // 2),
    }
    fills = {
        "blocks_alone": partial(_network_fill, blocks(setting, some, BUDGET, 0, log)[0], None),
        "spatial_gaussian": linear(best(SpatialGaussian, (0.03, 0.2))[1]),
        "spatiotemporal_gaussian": linear(process),
        "front_end": front_fill(make_front(chosen, some["train"])),
    }
    return {"n_people": len(people), "r2_hidden": scores(held, fills)}


def transfer(setting: Setting, source: dict[str, torch.Tensor], seed: int, log) -> dict:
    """Blocks of another atlas, repetition time and scanner on HCP: only the maps to and from parcels are trained."""
    series, _ = read("hcp7", setting, None)
    sides: dict[str, list[Series]] = {"train": series[:4], "validation": series[4:5]}
    held = Hidden.of(series[5:], setting, seed=10_000)
    config = config_of(setting, series[0].values.shape[1], None)
    fills = {}
    for name in ("transferred", "random_operators", "from_scratch"):
        torch.manual_seed(seed)
        network = MnemoDyn(config)
        for key, value in network.named_parameters():
            inner = not any(part in key for part in MAPS)
            if inner and name == "transferred":
                value.data.copy_(source[key])
            value.requires_grad_(not inner or name == "from_scratch")
        validation = next(fresh(sides["validation"], setting, 200, 64))
        log(f"seed {seed}: {name}")
        fit(network, fresh(sides["train"], setting, 1000 + seed), validation, ADAPTING, RATE, log)
        fills[name] = partial(_network_fill, network.eval(), None)
    return scores(held, fills)


def run(folder: Path, source: Path | None) -> dict:
    """All stages; returns the report."""
    folder.mkdir(parents=True, exist_ok=True)
    stage, setting = Stages(folder), SETTINGS["abide"]
    series, _ = read("abide", setting, source)
    sides = split(series)
    held = Hidden.of(sides["test"], setting, seed=10_000)
    found: dict[str, list] = {"people": [], "steps": [], "parameters": [], "transfer": []}

    def keep(kind: str, label, make: Callable) -> None:
        path = stage(f"{kind}-{label}.json", lambda path: write_json(path, make()))
        found[kind].append(json.loads(path.read_text()))

    def trained(steps: int, weights: Path | None = None, **changes) -> dict:
        network, curve = blocks(setting, sides, steps, 0, stage.log, **changes)
        if weights:
            torch.save(network.state_dict(), weights)
        facts = {"steps": steps, "n_parameters": sum(p.numel() for p in network.parameters())}
        fills = {"blocks_alone": partial(_network_fill, network, None)}
        return facts | {"validation": curve, "r2_hidden": scores(held, fills)}

    for n in PEOPLE:
        keep("people", n, lambda n=n: by_people(n, setting, sides, held, stage.log))
    for steps in STEPS:
        keep("steps", steps, lambda steps=steps: trained(steps, folder / "longest.pt"))
    for k in CHANNELS:
        keep(
            "parameters",
            k,
            lambda k=k: {"n_channels": k} | trained(BUDGET, n_channels=k, input_width=k),
        )
    longest = torch.load(folder / "longest.pt")
    for seed in SEEDS:
        keep("transfer", seed, lambda seed=seed: transfer(setting, longest, seed, stage.log))
    return found | {
        "n_test_people": len(set(held.people)),
        "steps_of_people_and_parameters": BUDGET,
        "adapting_steps": ADAPTING,
        "interval": "95 %, bootstrap over people and stretches of their scans",
        "cpu_minutes": stage.cpu_minutes,
        **stamp(),
        "device": f"CPU, {torch.get_num_threads()} thread",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options = options_of(parser)
    try:
        found = run(options.work or resolve("runs/scaling"), options.folder)
        print(write_json(options.out or resolve("book/data/scaling.json"), found))
    except (FileNotFoundError, ValueError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
