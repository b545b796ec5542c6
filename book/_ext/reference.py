"""Reference pages made from the package itself.

A line ``[modules PACKAGE]`` in a page stands for a section a module of that package, from its docstrings;
``settings MODULE:CLASS`` is a table of a dataclass's settings: default, allowed values and meaning.
"""

import importlib
import inspect
import pkgutil
import re
from dataclasses import MISSING, fields
from typing import get_args

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

MODULES = re.compile(r"^\[modules ([\w.]+)\]$", re.MULTILINE)
SETTING = re.compile(r"^(\w+(?:, \w+)*) : (.+)$")


def module_sections(match):
    """MyST text: a heading and automodule for each module of a package, or for the module itself."""
    home = importlib.import_module(match[1])
    found = pkgutil.iter_modules(getattr(home, "__path__", []), f"{match[1]}.")
    # Without the kernels for a GPU: what a copy shows must not depend on triton being installed.
    names = sorted(
        part.name
        for part in found
        if not part.ispkg and not part.name.endswith(("__main__", "_triton"))
    )
    text = []
    for name in names or [match[1]]:
        try:
            importlib.import_module(name)
            body = f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```"
        except ImportError as error:
            if (error.name or "mnemodyn").startswith("mnemodyn"):
                raise
            body = (
                f"Needs the package {error.name}, which is not installed where this copy was built."
            )
        text.append(f"## {name.removeprefix('mnemodyn.')}\n\n{body}")
    return "\n\n".join(text)


def expand_modules(app, docname, source):
    """Put the sections in place of the line that stands for them."""
    source[0] = MODULES.sub(module_sections, source[0])


def meanings(cls):
    """What a class's docstrings, its ancestors' included, say of each attribute."""
    found = {}
    for base in reversed(cls.__mro__):
        names = []
        for line in (
            inspect.cleandoc(base.__dict__.get("__doc__") or "")
            .partition("Attributes\n----------\n")[2]
            .split("\n")
        ):
            if head := SETTING.match(line):
                names = head[1].split(", ")
                found.update(dict.fromkeys(names, ""))
            elif line and not line.startswith(" "):
                break
            else:
                found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
    return found


def settings(cls):
    """Rows of name, default, type and meaning; the meaning is the docstring's."""
    said = meanings(cls)
    for f in fields(cls):
        if f.init:
            default = (
                f.default
                if f.default is not MISSING
                else MISSING
                if f.default_factory is MISSING
                else f.default_factory()
            )
            kind = (
                " or ".join(map(str, get_args(f.type)))
                if get_args(f.type)
                else getattr(f.type, "__name__", str(f.type))
            )
            yield (
                f.name,
                "required" if default is MISSING else f"{default!r}".strip("'"),
                kind,
                said.get(f.name, ""),
            )


def skip_borrowed(app, what, name, obj, skip, options):
    """Document a name where it is defined, not where another module offers it too."""
    home = getattr(obj, "__module__", None)
    return (
        True
        if what == "module" and home not in (None, app.env.temp_data.get("autodoc:module"))
        else None
    )


def plain_references(app, what, name, obj, options, lines):
    """Reword what would be read wrongly: numbers of references that share a page, a colon that would end a type."""
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", " \N{EN DASH} ")
    lines[:] = [
        re.sub(r"^(\s*)\.\. (?=\[\d\] )", r"\1* ", re.sub(r"(\[\d\])_", r"\1", line))
        for line in lines
    ]


def leave_types(app, env, node, contnode):
    """Types in numpydoc sections are words, "array, shape (time, parcel)"; only a role must lead somewhere."""
    return contnode if node.get("refdomain") == "py" and "refwarn" not in node else None


class Settings(SphinxDirective):
    """``MODULE:CLASS``: a paragraph of what the class is, and a table of its settings."""

    required_arguments = 1

    def run(self):
        module, name = self.arguments[0].split(":")
        cls = getattr(importlib.import_module(module), name)
        first = inspect.cleandoc(cls.__doc__).split("\n\n")[0]
        lines = [
            strip_roles(first),
            "",
            "| setting | default | type | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for row in settings(cls):
            cells = [f"`{row[0]}`", f"`{row[1]}`", row[2], strip_roles(row[3])]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        box = nodes.container(classes=["scroll", "settings"])
        self.state.nested_parse(
            StringList(lines, source=self.arguments[0]), self.content_offset, box
        )
        return [box]


def strip_roles(text):
    """Docstring markup as MyST: roles and double backticks become code."""
    return re.sub(r"\s+", " ", re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`"))


def setup(app):
    """Register the steps with Sphinx."""
    app.connect("source-read", expand_modules)
    app.connect("autodoc-skip-member", skip_borrowed)
    app.connect("autodoc-process-docstring", plain_references, priority=400)  # before napoleon
    app.connect("missing-reference", leave_types)
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
