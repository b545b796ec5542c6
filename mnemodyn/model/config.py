"""Moved to :mod:`mnemodyn.settings`."""

from mnemodyn.settings import ModelConfig

__all__ = ["ModelConfig"]
