"""Time, memory and operations of the network, its plain form and a transformer, on this machine.

    python -m benchmarks.speed --out FILE.json               sweeps, scaling with T, and the published size
    python -m benchmarks.speed --quick --out FILE.json       small ones: a minute or two on two cores
    python -m benchmarks.speed --published --out FILE.json   scaling with T and the published size alone

`--quick --published` has the small sweeps and the published size.

Every method of a case gets the same scans and, but for the transformer, the same weights. A training step is forward,
mean squared error and backward, without the optimiser's own step, which is the same for all.
"""

import argparse
import gc
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.draft import Draft
from benchmarks.measure import Count, about, apart, ceilings, interleaved, peak
from benchmarks.transformer import PatchTransformer
from mnemodyn import files
from mnemodyn.model.network import MnemoDyn
from mnemodyn.model.operator import Field
from mnemodyn.settings import ModelConfig

METHODS = ("draft", "eager", "lean", "compiled", "transformer")
T_R = 0.72  # seconds


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size, measured with several methods; the network's settings as in ``ModelConfig``.

    `section` is ``batch``, ``length`` or ``parcels`` (a sweep), ``profile``, ``scaling`` or ``published``; `kind` is
    ``train`` (forward, loss, backward) or ``infer``; `made_for` are the frames of the scans that the network's weights
    are for, 0 for `n_timepoints`.
    """

    section: str
    kind: str = "train"
    batch: int = 8
    n_timepoints: int = 480
    n_parcels: int = 200
    made_for: int = 0
    n_channels: int = 64
    input_width: int = 100
    field_rank: int = 3
    n_levels: int = 5
    kernel_size: int = 5
    n_segments: int = 4
    n_dense_layers: int = 4
    n_blocks: int = 2
    methods: tuple[str, ...] = ("draft", "eager", "lean", "transformer")

    def config(self) -> ModelConfig:
        """The published block at this size: no lift, tanh, residual."""
        settings = {
            f: getattr(self, f)
            for f in ModelConfig.__dataclass_fields__
            if f in self.__dataclass_fields__
        }
        settings["n_timepoints"] = self.made_for or self.n_timepoints
        return ModelConfig(**settings, activation="tanh", lift=False)

    def field_bytes(self) -> int:
        """Bytes that the matrices H take in memory: one a block where they are kept, and two at work."""
        once = 4 * self.batch * self.n_timepoints * self.n_parcels * self.n_channels
        return once * ((self.n_blocks if self.kind == "train" else 0) + 2)


def cases(*, quick: bool = False, published: bool = False) -> list[Case]:
    """The grid.

    `quick` has small sweeps, `published` no sweeps but the published size and the scaling at that size; together they
    are small sweeps and the published size. With neither, all of it, at length.
    """
    large = Case(
        section="published", batch=2, n_timepoints=490, n_parcels=450, n_channels=300, n_blocks=4
    )
    grid = []
    if quick:
        base = Case(section="", batch=4, n_timepoints=240, n_parcels=94, n_channels=32)
        batches, lengths, parcels = (1, 16), (120, 480, 1200), (94, 200)
    else:
        base = Case(section="")
        batches, lengths, parcels = (
            (1, 4, 16, 64),
            (120, 240, 480, 1200, 2400, 4800),
            (94, 200, 450),
        )
    if quick or not published:
        for kind in ("train", "infer"):
            grid += [replace(base, section="batch", kind=kind, batch=b) for b in batches]
            grid += [
                replace(base, section="length", kind=kind, batch=1, n_timepoints=t) for t in lengths
            ]
            grid += [replace(base, section="parcels", kind=kind, n_parcels=p) for p in parcels]
    # The network of the quick profile: the defaults of notebooks/pretrain.ipynb, but for the lift and the activation.
    small = Case(
        section="profile",
        n_timepoints=240,
        n_parcels=94,
        n_channels=48,
        input_width=48,
        field_rank=4,
    )
    grid.append(
        replace(small, n_levels=4, n_segments=1, n_dense_layers=1, methods=("draft", "lean"))
    )
    # One set of weights, made for the shorter scans: what a user with longer scans has.
    scaling = base if quick and not published else replace(large, n_blocks=1)
    scaling = replace(scaling, section="scaling", batch=1, made_for=480, methods=("lean",))
    grid += [
        replace(scaling, kind=kind, n_timepoints=t)
        for kind in ("train", "infer")
        for t in (480, 4800)
    ]
    if published or not quick:
        grid += [replace(large, kind=kind) for kind in ("train", "infer")]
    return grid


class Lean(nn.Module):
    """The network as the package computes it."""

    def __init__(self, network: MnemoDyn):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t_r: float) -> Tensor:
        return self.network(x, t_r).reconstruction


class Eager(Lean):
    """The network with the field's matrix H in memory, whatever the package does by default."""

    @staticmethod
    def field(field: Field, x: Tensor, derivative: Tensor) -> Tensor:
        z = field.activation(field.bottleneck(field.activation(field.input(x))))
        h = field.activation(field.expansion(z)).unflatten(-1, (x.shape[-1], field.n_channels))
        return torch.einsum("btp,btpk->btk", derivative, h) * x.shape[-1] ** -0.5

    def forward(self, x: Tensor, t_r: float) -> Tensor:
        with patch.object(Field, "forward", self.field):
            return super().forward(x, t_r)


def make_models(case: Case, methods: tuple[str, ...], device: str) -> dict[str, nn.Module]:
    """The models of a case; all but the transformer hold one set of weights."""
    torch.manual_seed(0)
    network = MnemoDyn(case.config()).to(device) if set(methods) - {"transformer"} else None
    models = {}
    for name in methods:
        if name == "transformer":
            models[name] = PatchTransformer(
                case.n_parcels, case.n_timepoints, width=case.n_channels, n_layers=case.n_blocks
            ).to(device)
        elif name == "compiled":
            models[name] = torch.compile(Lean(network))
        else:
            models[name] = {"draft": Draft, "eager": Eager, "lean": Lean}[name](network)
    return models


def make_step(model: nn.Module, case: Case, device: str) -> Callable[[], None]:
    """What is measured, on one batch. In training, gradients are there beforehand and are added to."""
    x = torch.randn(case.batch, case.n_timepoints, case.n_parcels, device=device)

    def infer():
        with torch.no_grad():  # inference_mode hides products from the count
            model(x, T_R)

    def train():
        (model(x, T_R) - x).square().mean().backward()

    model.train(case.kind == "train")
    if case.kind == "train":
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return train if case.kind == "train" else infer


def measure_peak(case: Case, method: str, device: str, threads: int) -> int | None:
    """Peak memory of one method, on a CPU in a process of its own."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return peak(make_step(make_models(case, (method,), device)[method], case, device), device)
    return apart("benchmarks.speed", "--peak-of", json.dumps([asdict(case), method, threads]))


def measure(
    case: Case, *, device: str, threads: int, repeats: int, most: dict[str, float]
) -> tuple[list, list]:
    """Rows of a case, and what was left out and why; `repeats` steps are timed of each method, in turn.

    `most` is what the device does a second, from :func:`benchmarks.measure.ceilings`, and ``memory``, its bytes.
    """
    size = {name: value for name, value in asdict(case).items() if name != "methods"}
    skipped = []
    methods = list(case.methods)
    for method in ("draft", "eager"):
        if method in methods and case.field_bytes() > 0.6 * most["memory"]:
            methods.remove(method)
            skipped.append(
                {**size, "method": method, "reason": "its field needs more memory than there is"}
            )
    models = make_models(case, tuple(methods), device)
    steps = {name: make_step(model, case, device) for name, model in models.items()}
    seconds = interleaved(steps, repeats, device)
    rows = []
    for name in methods:
        row = {
            **size,
            "method": name,
            "n_parameters": sum(p.numel() for p in models[name].parameters()),
        }
        row["seconds"] = statistics.median(seconds[name])
        row["seconds_range"] = [min(seconds[name]), max(seconds[name])]
        row["repeats"] = repeats
        row["samples_per_second"] = case.batch / row["seconds"]
        if name != "compiled":  # what it carries out is not seen from here
            with Count() as count:
                steps[name]()
            for key, ceiling in (
                ("flops", "matmul_flops"),
                ("bytes", "copy_bytes"),
                ("activations", "activations"),
            ):
                row[key] = getattr(count, key)
                row[f"{key}_share"] = row[key] / row["seconds"] / most[ceiling]
        rows.append(row)
    del models, steps
    gc.collect()
    for row in rows:
        row["peak_bytes"] = measure_peak(case, row["method"], device, threads)
    return rows, skipped


def ratios(rows: list[dict]) -> dict[str, dict]:
    """Draft over lean at the published size and the quick profile's, and the longer scan over the shorter one."""
    found = {}
    for section, pick in (
        ("published", "method"),
        ("profile", "method"),
        ("scaling", "n_timepoints"),
    ):
        for kind in ("train", "infer"):
            group = {r[pick]: r for r in rows if r["section"] == section and r["kind"] == kind}
            above, below = (
                ("draft", "lean")
                if pick == "method"
                else (max(group, default=0), min(group, default=0))
            )
            if above in group and below in group and above != below:
                a, b = group[above], group[below]
                known = a["peak_bytes"] and b["peak_bytes"]
                found[f"{section}_{kind}"] = {
                    "over": [above, below],
                    "time": a["seconds"] / b["seconds"],
                    "memory": a["peak_bytes"] / b["peak_bytes"] if known else None,
                }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="small sizes, one or two minutes")
    parser.add_argument(
        "--published", action="store_true", help="scaling with T and the published size alone"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed of each method")
    parser.add_argument(
        "--compile", action="store_true", help="measure torch.compile too; needs a compiler"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.mha.set_fastpath_enabled(False)  # one form of attention, counted and not
    if arguments.peak_of:
        settings, method, threads = json.loads(arguments.peak_of)
        torch.set_num_threads(threads)
        case = Case(**{**settings, "methods": (method,)})
        print(
            json.dumps(
                peak(make_step(make_models(case, (method,), "cpu")[method], case, "cpu"), "cpu")
            )
        )
        return
    if not arguments.out:
        parser.error("--out is needed")
    device, threads = arguments.device, arguments.threads
    torch.set_num_threads(threads)
    memory = (
        torch.cuda.get_device_properties(0).total_memory
        if device == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    most = {**ceilings(device), "memory": memory}
    rows, skipped = [], []
    for case in cases(quick=arguments.quick, published=arguments.published):
        if arguments.compile and "lean" in case.methods:
            case = replace(case, methods=(*case.methods, "compiled"))
        new, left = measure(
            case, device=device, threads=threads, repeats=arguments.repeats, most=most
        )
        rows += new
        skipped += left
        for row in new:
            needed = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            print(
                f"{case.section} {case.kind} batch {case.batch} T {case.n_timepoints} P {case.n_parcels} "
                f"{row['method']}: {row['seconds']:.4f} s, {needed} MiB",
                flush=True,
            )
    result = {
        **about("benchmarks.speed", device, threads),
        "ceilings": most,
        "ratios": ratios(rows),
        "rows": rows,
        "skipped": skipped,
    }
    files.write_json(arguments.out, result)


if __name__ == "__main__":
    main()
