"""Checks of settings."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from mnemodyn.files import read_yaml
from mnemodyn.run import ParameterError

__all__ = ["ParameterError", "build", "check_settings", "read_yaml", "refuse_unknown", "unknown"]


def unknown(kind: str, name: object, known: Iterable[str]) -> ParameterError:
    """The error for a name that is not among the known ones: it lists them, and says which is nearest."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ParameterError(f"unknown {kind} {name}{hint} (known: {', '.join(known) or 'none'})")


def refuse_unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise the error for the first of the names that is not among the known ones."""
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)


def build(cls: type, settings: Mapping[str, Any], kind: str) -> Any:
    """A dataclass from a mapping; a ParameterError if a setting is unknown or missing, or the class refuses a value."""
    refuse_unknown(kind, settings, [f.name for f in fields(cls) if f.init])
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise ParameterError(str(error)) from error


def check_settings(config: Any) -> None:
    """Check the values of a dataclass of settings against its annotations: int, float, bool, str, Literal.

    A ValueError for a value of another type or not among a Literal's, or a number that is negative or not finite.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), f.type
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(
                f"{f.name} must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}"
            )
        if kind not in (int, float, bool, str):
            continue
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)  # type: ignore[arg-type]
        if not fits or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{f.name} must be {kind.__name__}, got {value!r}")  # type: ignore[union-attr]
        if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
            raise ValueError(f"{f.name} must be positive or 0, and finite, got {value}")
