"""Time, memory and operations of the network, its plain form and a transformer, on this machine.

    python -m benchmarks.speed --quick --published --out FILE.csv

`--quick` takes small sweeps, a minute or two on two cores; `--published` adds the published size. Written is one table
(see ``mnemodyn.results``), in which the interval of a time runs from the fastest to the slowest repeat and `n` is the
number of repeats.

Every method of a case gets the same scans and, except for the transformer, the same weights. A training step is
forward, mean squared error and backward, without the optimiser's own step, which is the same for all.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.measure import Count, apart, ceilings, device_name, interleaved, peak
from benchmarks.plain import PlainForm
from benchmarks.transformer import PatchTransformer
from mnemodyn.model.kernels import field_drive_eager
from mnemodyn.model.network import MnemoDyn
from mnemodyn.results import write_results
from mnemodyn.settings import ModelConfig

# Names as a reader sees them: they belong to this measurement only.
PLAIN = "plain form"
EAGER = "field in memory"
PACKAGE = "this package"
TRANSFORMER = "transformer"
METHODS = (PLAIN, EAGER, PACKAGE, TRANSFORMER)
T_R = 0.72  # seconds

PUBLISHED = ModelConfig(
    n_parcels=450,
    n_timepoints=490,
    n_blocks=4,
    n_channels=300,
    input_width=100,
    field_rank=3,
    n_levels=5,
    n_segments=4,
    n_dense_layers=4,
    activation="tanh",
    lift=False,
)
MEDIUM = replace(PUBLISHED, n_blocks=2, n_parcels=200, n_timepoints=480, n_channels=64)
SMALL = replace(PUBLISHED, n_blocks=2, n_parcels=94, n_timepoints=240, n_channels=32)
# The network that pretrain.ipynb trains by default, but for the lift and the activation.
PROFILE = replace(SMALL, n_channels=48, input_width=48, field_rank=4, n_levels=4)
PROFILE = replace(PROFILE, n_segments=1, n_dense_layers=1)


@dataclass(frozen=True)
class Case:
    """One size, measured with several methods.

    `frames` are those of the scans; the network's weights may be made for another number. `section` is ``batch``,
    ``length`` or ``parcels`` (a sweep), ``profile``, ``scaling`` or ``published``.
    """

    section: str
    config: ModelConfig
    batch: int
    frames: int
    training: bool = True
    methods: tuple[str, ...] = METHODS

    @property
    def task(self) -> str:
        """What stands in the table, read again by `notebooks/lib/speed.py`."""
        kind = "training" if self.training else "inference"
        return (
            f"{self.section}, {kind}, {self.batch} scans, {self.frames} frames, "
            f"{self.config.n_parcels} parcels"
        )

    def field_bytes(self) -> int:
        """Bytes of the matrices H where they exist: one a block where they are kept, and two at work."""
        held = 2
        if self.training:
            held += self.config.n_blocks
        entries = self.batch * self.frames * self.config.n_parcels * self.config.n_channels
        return 4 * held * entries


def cases(*, quick: bool = False, published: bool = False) -> list[Case]:
    """The sizes to measure: sweeps, small ones with `quick`; the profile; longer scans; and the published size."""
    base = SMALL if quick else MEDIUM
    batch = 4 if quick else 8
    batches = [1, 16] if quick else [1, 4, 16, 64]
    lengths = [120, 480, 1200] if quick else [120, 240, 480, 1200, 2400, 4800]
    parcels = [94, 200] if quick else [94, 200, 450]
    grid = [Case("batch", base, n, base.n_timepoints) for n in batches]
    grid += [Case("length", replace(base, n_timepoints=n), 1, n) for n in lengths]
    grid += [Case("parcels", replace(base, n_parcels=n), batch, base.n_timepoints) for n in parcels]
    grid.append(Case("profile", PROFILE, 8, 240, methods=(PLAIN, PACKAGE)))
    # One set of weights, made for the shorter scans, as it is for a user who has longer ones.
    scaled = replace(base, n_timepoints=480)
    if published:
        scaled = replace(PUBLISHED, n_timepoints=480, n_blocks=1)
    for training in (True, False):
        for frames in (480, 4800):
            grid.append(Case("scaling", scaled, 1, frames, training, (PACKAGE,)))
        if published:
            grid.append(Case("published", PUBLISHED, 2, 490, training))
    return grid


class Package(nn.Module):
    """The network as the package computes it."""

    def __init__(self, network: MnemoDyn):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t_r: float) -> Tensor:
        """Reconstruction of scans x (batch, time, parcel)."""
        return self.network(x, t_r).reconstruction


class Eager(Package):
    """The network with the field's matrix H in memory."""

    def forward(self, x: Tensor, t_r: float) -> Tensor:
        """Reconstruction of scans x (batch, time, parcel)."""
        with patch("mnemodyn.model.operator.field_drive", field_drive_eager):
            return super().forward(x, t_r)


def make_model(case: Case, method: str, network: MnemoDyn) -> nn.Module:
    """The model of a method; all except the transformer compute with the weights of `network`."""
    if method == TRANSFORMER:
        config = case.config
        return PatchTransformer(
            config.n_parcels, case.frames, width=config.n_channels, n_layers=config.n_blocks
        )
    forms = {PLAIN: PlainForm, EAGER: Eager, PACKAGE: Package}
    return forms[method](network)


def make_step(case: Case, method: str, network: MnemoDyn, device: str) -> Callable[[], None]:
    """What is measured, on one batch of noise. In training, gradients exist beforehand and are added to."""
    model = make_model(case, method, network).to(device).train(case.training)
    x = torch.randn(case.batch, case.frames, case.config.n_parcels, device=device)

    def infer() -> None:
        with torch.no_grad():  # inference_mode hides products from the count
            model(x, T_R)

    def train() -> None:
        (model(x, T_R) - x).square().mean().backward()

    if not case.training:
        return infer
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return train


def peak_of(case: Case, method: str, device: str, threads: int) -> int | None:
    """Peak memory of one method in bytes, in this process."""
    torch.set_num_threads(threads)
    return peak(make_step(case, method, MnemoDyn(case.config), device), device)


def measure_peak(case: Case, method: str, device: str) -> int | None:
    """Peak memory of one method in bytes; on a CPU, in a process of its own."""
    threads = torch.get_num_threads()
    if device == "cuda":
        torch.cuda.empty_cache()
        return peak_of(case, method, device, threads)
    return apart(peak_of, case, method, device, threads)


def memory_of(device: str) -> int:
    """Bytes of memory that the device has."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(case: Case, most: dict[str, float], *, device: str, repeats: int) -> list[dict]:
    """Rows of a case: seconds and MiB, and at the published size the share of the ceilings `most` that is reached."""
    methods = list(case.methods)
    for method in (PLAIN, EAGER):
        if method in methods and case.field_bytes() > 0.6 * memory_of(device):
            methods.remove(method)
            print(f"{case.task}: {method} left out, its field needs more memory than there is")
    network = MnemoDyn(case.config)
    steps = {method: make_step(case, method, network, device) for method in methods}
    seconds = interleaved(steps, repeats, device)
    rows: list[dict] = []

    def add(method: str, score: str, value: float, **interval: float) -> None:
        rows.append(
            {"task": case.task, "method": method, "score": score, "value": value, **interval}
        )

    for method in methods:
        taken = seconds[method]
        median = statistics.median(taken)
        add(method, "seconds", median, low=min(taken), high=max(taken), n=repeats)
        if case.section == "published":
            with Count() as count:
                steps[method]()
            add(method, "products", count.flops / median / most["products"])
            add(method, "copies", count.bytes / median / most["copies"])
            add(method, "activations", count.activations / median / most["activations"])
    del network, steps
    gc.collect()
    for method in methods:
        found = measure_peak(case, method, device)
        if found is not None:
            add(method, "MiB", found / 2**20)
    return rows


def measure_all(grid: list[Case], *, device: str = "cpu", repeats: int = 5) -> list[dict]:
    """Rows of a table of results for all cases, and for what the device does at most."""
    torch.backends.mha.set_fastpath_enabled(False)  # the same form of attention, counted or not
    most = ceilings(device)
    rows = []
    for name, amount in most.items():
        score = f"{name} a second"
        rows.append({"task": "ceiling", "method": "device", "score": score, "value": amount})
    for case in grid:
        new = measure(case, most, device=device, repeats=repeats)
        rows += new
        for row in new:
            if row["score"] in ("seconds", "MiB"):
                print(f"{row['task']}, {row['method']}: {row['value']:.4g} {row['score']}")
    threads = torch.get_num_threads()
    machine = f"noise, on {device_name(device)}, threads: {threads}, torch {torch.__version__}"
    return [{"data": machine, "against": "", "kind": "timing", **row} for row in rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", required=True, help="CSV file to write")
    parser.add_argument("--quick", action="store_true", help="small sweeps, one or two minutes")
    parser.add_argument("--published", action="store_true", help="the published size too")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed of each method")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = cases(quick=options.quick, published=options.published)
    write_results(options.out, measure_all(grid, device=options.device, repeats=options.repeats))


if __name__ == "__main__":
    main()
