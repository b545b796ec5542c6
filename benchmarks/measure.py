"""Time, memory, operations, and what the device can do at most."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# PyTorch's operators that evaluate an activation or its derivative.
ACTIVATIONS = {
    f"{name}{ending}"
    for name in ("tanh", "sigmoid", "gelu", "silu")
    for ending in ("", "_", "_backward")
}
aten = torch.ops.aten


def _convolution_backward(gradient, x, weight, *others, out_val) -> int:
    """Operations of at most two gradients of a convolution; PyTorch's own formula forgets the groups."""
    transposed = others[4]
    wanted = sum(others[-1][:2])
    outputs = x if transposed else gradient
    return 2 * outputs.numel() * weight[0].numel() * wanted


# PyTorch has no formula for attention on a CPU.
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
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown CPU"


def apart(function: Callable, *arguments: Any) -> Any:
    """Call a function in a new process of its own, so that no other memory is counted."""
    # Freed blocks go back to the system at once, or they would hide what the next step takes.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, at_once), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def interleaved(
    steps: dict[str, Callable[[], None]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times in turn after one that is not counted.

    In turn, so that other work on the machine slows all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _status(field: str) -> int:
    """Bytes of one entry of Linux's description of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak(step: Callable[[], None], device: str) -> int | None:
    """Bytes that a step needs at its peak beyond what is there before it, after a step that is not counted.

    On a CPU, the peak of the process's resident memory, which Linux can reset; None on other systems. It means
    something only in a process that does nothing else.
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
        Read and written by every operation that is not a mere view, each operation on its own.
    activations : int
        Evaluations of tanh, sigmoid, GELU or SiLU, or of their derivatives.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.bytes = 0
        self.activations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = func.overloadpacket
        formula = FORMULAS.get(operator) or flop_registry.get(operator)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        if not func.is_view and "empty" not in operator.__name__:
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, torch.Tensor):
                    self.bytes += leaf.numel() * leaf.element_size()
        if operator.__name__ in ACTIVATIONS:
            self.activations += out.numel()
        return out


def ceilings(device: str) -> dict[str, float]:
    """What the device does a second at best: FLOP of products, bytes copied, evaluations of tanh; in float32."""
    # On a CPU, the values of tanh fit its caches: else the copy would be the limit.
    n, copied, evaluated = 2048, 2**25, 2**17
    if device == "cuda":
        n, copied, evaluated = 8192, 2**28, 2**26
    a, b = torch.randn(2, n, n, device=device)
    source = torch.randn(copied, device=device)
    target = torch.empty_like(source)
    values = torch.randn(evaluated, device=device)
    result = torch.empty_like(values)

    def activate() -> None:
        for _ in range(100):
            torch.tanh(values, out=result)

    steps = {
        "products": lambda: a @ b,
        "copies": lambda: target.copy_(source),
        "activations": activate,
    }
    amounts = {"products": 2 * n**3, "copies": 8 * copied, "activations": 100 * evaluated}
    seconds = interleaved(steps, 15, device)
    return {name: amounts[name] / min(seconds[name]) for name in steps}
