"""MnemoDyn: operator learning for resting-state fMRI.

The names below are imported when they are first used, so that ``import mnemodyn`` is quick and
needs neither torch nor lightning.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Checkpoint": "mnemodyn.checkpoint",
    "MnemoDyn": "mnemodyn.model.network",
    "MnemoDynEncoder": "mnemodyn.readout",
    "ModelConfig": "mnemodyn.settings",
    "Scaling": "mnemodyn.data.scaling",
    "Scan": "mnemodyn.data.scans",
    "Settings": "mnemodyn.settings",
    "Store": "mnemodyn.data.store",
    "estimate_connectivity": "mnemodyn.connectivity",
    "from_pretrained": "mnemodyn.checkpoint",
    "load_scan": "mnemodyn.data.scans",
    "open_scans": "mnemodyn.data.collection",
    "publish": "mnemodyn.hub",
    "run_notebook": "mnemodyn.run",
    "save_checkpoint": "mnemodyn.checkpoint",
    "save_scan": "mnemodyn.data.scans",
}
# The function `pretrain` is not among them, because the package mnemodyn.pretrain has its name.

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mnemodyn' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
