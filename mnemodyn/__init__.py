"""MnemoDyn: operator learning for resting-state fMRI.

The public names below are imported on first use, so that ``import mnemodyn`` is quick and needs neither torch nor
lightning.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Checkpoint": "mnemodyn.checkpoint",
    "load_checkpoint": "mnemodyn.checkpoint",
    "save_checkpoint": "mnemodyn.checkpoint",
    "Scan": "mnemodyn.data.scans",
    "load_scan": "mnemodyn.data.scans",
    "load_scans": "mnemodyn.data.scans",
    "save_scan": "mnemodyn.data.scans",
    "Scaling": "mnemodyn.data.scaling",
    "Store": "mnemodyn.data.store",
    "ModelConfig": "mnemodyn.model.config",
    "MnemoDyn": "mnemodyn.model.network",
    "MnemoDynEncoder": "mnemodyn.evaluate.readout",
    "from_pretrained": "mnemodyn.hub",
    "publish": "mnemodyn.hub",
    "run_notebook": "mnemodyn.running",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mnemodyn' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
