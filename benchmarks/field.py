"""The field's drive, eager against lean, side by side: prints JSON.

    python -m benchmarks.field [--published] [--threads 1] [--repeats 7] [--activation tanh] [--device cpu]

Times are seconds, each the median over repeats that alternate between the two; `ratio` is the median of eager / lean
within a repeat. Memory is what forward and backward add at their peak to what was held before, in MB: of a process of
its own on the CPU (Linux), of the allocator on a GPU.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from benchmarks.measure import apart, device_name, interleaved, peak
from mnemodyn.model.kernels import field_drive, field_drive_eager

SMALL = {"batch": 2, "time": 240, "parcels": 100, "channels": 64, "rank": 4}
PUBLISHED = {"batch": 2, "time": 490, "parcels": 450, "channels": 300, "rank": 3}
PATHS = {"eager": field_drive_eager, "lean": field_drive}
ACTIVATIONS = {"tanh": torch.tanh, "gelu": functional.gelu, "silu": functional.silu}


def inputs(size: dict, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    entries = size["parcels"] * size["channels"]
    scans = size["batch"], size["time"]
    shapes = [
        (*scans, size["rank"]),
        (*scans, size["parcels"]),
        (entries, size["rank"]),
        (entries,),
    ]
    return [torch.randn(s, device=device, requires_grad=True) for s in shapes]


def run(
    drive: Callable, tensors: list[torch.Tensor], activation: Callable, backward: bool = True
) -> None:
    with torch.set_grad_enabled(backward):
        v = drive(*tensors, activation)
    if backward:
        torch.autograd.grad(v, tensors, torch.ones_like(v))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--published", action="store_true", help="450 parcels, 490 frames, 300 channels, batch 2"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="tanh")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak-of", choices=PATHS, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    size, activation = PUBLISHED if settings.published else SMALL, ACTIVATIONS[settings.activation]
    tensors = inputs(size, settings.device)
    if settings.peak_of:
        print(
            json.dumps(
                peak(partial(run, PATHS[settings.peak_of], tensors, activation), settings.device)
            )
        )
        return
    result = {
        "size": size,
        "activation": settings.activation,
        "device": device_name(settings.device),
        "torch": torch.__version__,
        "threads": settings.threads,
        "repeats": settings.repeats,
        "h_MB": 4 * size["batch"] * size["time"] * size["parcels"] * size["channels"] / 1e6,
    }
    for name, backward in {"forward": False, "forward_backward": True}.items():
        steps = {
            path: partial(run, drive, tensors, activation, backward)
            for path, drive in PATHS.items()
        }
        seconds = interleaved(steps, settings.repeats, settings.device)
        ratios = sorted(e / f for e, f in zip(*seconds.values(), strict=True))
        result[name] = {
            **{f"{path}_s": round(statistics.median(taken), 5) for path, taken in seconds.items()},
            "ratio": round(statistics.median(ratios), 2),
            "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        }
    peaks = {path: apart("benchmarks.field", *sys.argv[1:], "--peak-of", path) for path in PATHS}
    result["peak_MB"] = {path: p and round(p / 1e6, 1) for path, p in peaks.items()}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
