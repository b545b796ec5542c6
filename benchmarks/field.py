"""The field's drive, eager against lean, side by side: prints JSON.

    python benchmarks/field.py [--published] [--threads 1] [--repeats 7] [--activation tanh] [--device cpu]

Times are seconds, each the median over repeats that alternate between the two; `ratio` is the median of eager / lean
within a repeat. Memory is what forward and backward add at their peak to what was held before, in MB: of a process of
its own on the CPU (Linux), of the allocator on a GPU.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from mnemodyn.model.kernels import field_drive, field_drive_eager

SMALL = {"batch": 2, "time": 240, "parcels": 100, "channels": 64, "rank": 4}
PUBLISHED = {"batch": 2, "time": 490, "parcels": 450, "channels": 300, "rank": 3}
PATHS = {"eager": field_drive_eager, "lean": field_drive}
ACTIVATIONS = {"tanh": torch.tanh, "gelu": functional.gelu, "silu": functional.silu}


def inputs(size: dict, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    entries = size["parcels"] * size["channels"]
    scans = size["batch"], size["time"]
    shapes = [(*scans, size["rank"]), (*scans, size["parcels"]), (entries, size["rank"]), (entries,)]
    return [torch.randn(s, device=device, requires_grad=True) for s in shapes]


def run(path: str, tensors: list[torch.Tensor], activation: str, backward: bool) -> float:
    """Seconds of one pass."""
    wait = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        v = PATHS[path](*tensors, ACTIVATIONS[activation])
    if backward:
        torch.autograd.grad(v, tensors, torch.ones_like(v))
    wait()
    return time.perf_counter() - start


def high_water() -> float:
    """MB this process ever held. Linux only; getrusage would begin at the parent's."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def peak(path: str, size: dict, activation: str, device: str) -> float:
    """MB that a forward and backward pass adds. On the CPU, for a fresh process: its high water never falls."""
    small = inputs({**size, "time": 2}, device)
    run(path, small, activation, backward=True)
    tensors = inputs(size, device)
    if device == "cpu":
        before = high_water()
        run(path, tensors, activation, backward=True)
        return high_water() - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(path, tensors, activation, backward=True)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="450 parcels, 490 frames, 300 channels, batch 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="tanh")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak-of", choices=PATHS, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    size = PUBLISHED if settings.published else SMALL
    if settings.peak_of:
        print(peak(settings.peak_of, size, settings.activation, settings.device))
        return

    tensors = inputs(size, settings.device)
    entries = size["batch"] * size["time"] * size["parcels"] * size["channels"]
    result = {
        "size": size,
        "activation": settings.activation,
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "threads": settings.threads,
        "repeats": settings.repeats,
        "h_MB": 4 * entries / 1e6,
    }
    for name, backward in {"forward": False, "forward_backward": True}.items():
        seconds = {path: [] for path in PATHS}
        for repeat in range(settings.repeats + 1):
            for path, taken in seconds.items():
                took = run(path, tensors, settings.activation, backward)
                if repeat:  # the first pass warms up
                    taken.append(took)
        ratios = sorted(e / f for e, f in zip(*seconds.values(), strict=True))
        result[name] = {
            **{f"{path}_s": round(statistics.median(taken), 5) for path, taken in seconds.items()},
            "ratio": round(statistics.median(ratios), 2),
            "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        }
    again = [sys.executable, __file__, *sys.argv[1:], "--peak-of"]
    result["peak_MB"] = {
        path: round(float(subprocess.run([*again, path], check=True, capture_output=True, text=True).stdout), 1)
        for path in PATHS
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
