"""Time, memory, operations, and what the device can do at most."""

import gc
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mnemodyn.provenance import surroundings

ACTIVATIONS = {
    f"{name}{ending}"
    for name in ("tanh", "sigmoid", "gelu", "silu")
    for ending in ("", "_", "_backward")
}

aten = torch.ops.aten


def _convolution_backward(gradient, x, weight, *others, out_val) -> int:
    """Two gradients at most, each for what the convolution takes; torch's own formula forgets the groups."""
    transposed, wanted = others[4], sum(others[-1][:2])
    return 2 * (x if transposed else gradient).numel() * weight[0].numel() * wanted


# torch has none for attention on a CPU.
FORMULAS = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown CPU",
    )


def about(module: str, device: str = "cpu", threads: int = 1) -> dict:
    """What a result file says of the run: device, date, command (folders by their last name) and surroundings."""
    command = ["python", "-m", module, *(a.rsplit("/", 1)[-1] for a in sys.argv[1:])]
    return {
        "device": device_name(device),
        "kind": device,
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(command),
        "surroundings": surroundings(),
    }


def apart(module: str, *arguments: str) -> Any:
    """The JSON that a module prints last, in a process of its own.

    Freed blocks go back to the system at once there, or they would hide what the next step takes.
    """
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def interleaved(
    steps: dict[str, Callable[[], None]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times in turn, after one that does not count: all share the machine's moods."""
    seconds = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _status(field: str) -> int:
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024


def peak(step: Callable[[], None], device: str) -> int | None:
    """Bytes a step needs at its peak beyond what is there before it, after a step that does not count.

    On a CPU, the peak of the process's resident memory, which Linux lets us reset; None elsewhere. Only of use in a
    process that does nothing else.
    """
    step()
    gc.collect()
    if device == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    before = _status("VmRSS")
    step()
    return max(_status("VmHWM") - before, 0)


class Count(TorchDispatchMode):
    """Counts the operations that are carried out within it.

    Attributes
    ----------
    flops : int
        Of products and convolutions, two for a multiplication with an addition.
    bytes : int
        Read and written by every operation that is no mere view, each operation on its own.
    activations : int
        Evaluations of tanh, sigmoid, GELU or SiLU, or of their derivatives.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.activations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        if not func.is_view and "empty" not in func.overloadpacket.__name__:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        if func.overloadpacket.__name__ in ACTIVATIONS:
            self.activations += out.numel()
        return out


def ceilings(device: str, activation: str = "tanh") -> dict[str, float]:
    """What the device does a second, at best of several: matrix products, copies, activations; all in float32."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    # Small enough for the caches of a CPU, where the copy's ceiling would come first.
    values = torch.randn(2**26 if device == "cuda" else 2**17, device=device)
    result, function = torch.empty_like(values), getattr(torch, activation)
    steps = {
        "matmul": (lambda: a @ b, 2 * n**3),
        "copy": (lambda: target.copy_(source), 2 * source.numel() * source.element_size()),
        "activation": (
            lambda: [function(values, out=result) for _ in range(100)],
            100 * values.numel(),
        ),
    }
    seconds = interleaved({name: step for name, (step, _) in steps.items()}, 15, device)
    units = {"matmul": "matmul_flops", "copy": "copy_bytes", "activation": "activations"}
    return {units[name]: amount / min(seconds[name]) for name, (_, amount) in steps.items()}
