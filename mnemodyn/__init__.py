"""MnemoDyn: operator learning for resting-state fMRI.

The public names below are imported on first use, so that ``import mnemodyn`` is quick and needs neither torch nor
lightning.
"""

from importlib import import_module
from typing import Any

_OFFERED = {
    "mnemodyn.checkpoint": ("Checkpoint", "from_pretrained", "save_checkpoint"),
    "mnemodyn.data.scaling": ("Scaling",),
    "mnemodyn.data.scans": ("Scan", "load_scan", "load_scans", "save_scan"),
    "mnemodyn.data.store": ("Store",),
    "mnemodyn.hub": ("publish",),
    "mnemodyn.model.config": ("ModelConfig",),
    "mnemodyn.model.network": ("MnemoDyn",),
    "mnemodyn.readout": ("MnemoDynEncoder",),
    "mnemodyn.run": ("run_notebook",),
}
_HOME = {name: module for module, names in _OFFERED.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'mnemodyn' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
