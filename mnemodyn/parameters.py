"""Parameters of a notebook: read from its tagged cell, and checked before anything runs."""

import ast
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

__all__ = [
    "ParameterError",
    "build",
    "check_parameters",
    "check_settings",
    "read_parameters",
    "read_yaml",
    "refuse_unknown",
    "unknown",
]

_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text (in YAML, quote what reads as a number or as true/false: off, on, yes, no)",
    list: "a list such as [1, 2]",
    dict: "a mapping such as {a: 1}",
}


class ParameterError(ValueError):
    """A notebook's parameters, or those passed to it, cannot be used."""


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


def read_yaml(text: str) -> Any:
    """Read YAML with the scalars of YAML 1.2: ``off`` is text and ``1e-3`` is a number.

    PyYAML follows YAML 1.1, where ``off``, ``no`` and ``on`` are booleans, ``1e-3`` is text, ``010`` is 8 and ``12:30``
    is 750. A ValueError where ``text`` is not YAML says at which line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own name and form)

    for tag, pattern in (
        ("null", r"null|Null|NULL|~|"),
        ("bool", r"true|True|TRUE|false|False|FALSE"),
        ("int", r"[-+]?(0|[1-9][0-9]*)"),
        ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    ):
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), None
        )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def read_parameters(notebook: Any) -> dict[str, Any]:
    """Return the names and default values of a notebook's (a NotebookNode's) cell tagged ``parameters``.

    `papermill.inspect_notebook` works line by line and misses a list written over several. A ParameterError where not
    exactly one code cell is tagged, or it does more than give names to literals.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell.source for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"needs exactly one code cell tagged 'parameters', has {len(tagged)}")
    found = {}
    try:
        for line in ast.parse(tagged[0]).body:
            targets: list = line.targets if isinstance(line, ast.Assign) else [line.target]
            value = ast.literal_eval(line.value)
            if value is not None and type(value) not in _EXPECTED:
                raise ValueError
            found.update({target.id: value for target in targets})
    except (AttributeError, TypeError, ValueError, SyntaxError):
        kinds = "text, numbers, true/false, None, lists, dicts"
        raise ParameterError(
            f"its cell tagged 'parameters' must only give names to literal values ({kinds})"
        ) from None
    return found


def check_parameters(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``given`` against the defaults ``known``, and return it converted to their types.

    Text is kept as it is for a text default and read as YAML for every other; a default of None takes anything. A whole
    number will do for a float. Elements of a list are checked against those of the default where these are of one type.
    A ParameterError for an unknown name, a value of another type or one that JSON cannot hold (NaN, infinities).
    """
    refuse_unknown("parameter", given, known)
    return {name: _convert(name, known[name], value) for name, value in given.items()}


def _convert(name: str, default: Any, value: Any) -> Any:
    kind, given = type(default), value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and kind is not str:
        try:
            value = read_yaml(value)
        except ValueError:
            kind = kind if default is not None else str  # not YAML: plain text is the only reading
    if kind is float and type(value) is int:
        value = float(value)
    try:
        json.dumps(value, allow_nan=False)
        fits = default is None or type(value) is kind
    except (TypeError, ValueError):
        fits = False
    if not fits:
        expected = _EXPECTED.get(kind, "a value that JSON can hold")
        got = f"got {given!r} ({type(given).__name__}); its default is {default!r}"
        raise ParameterError(f"parameter {name} must be {expected}, {got}")
    if kind is list and default and len({type(item) for item in default}) == 1:
        return [_convert(f"{name}[{i}]", default[0], item) for i, item in enumerate(value)]
    return value
