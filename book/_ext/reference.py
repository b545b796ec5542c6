"""Reference pages made from docstrings.

A line ``[modules PACKAGE]`` in a page stands for a section a module of that package;
``settings MODULE:CLASS`` is a table of a dataclass's settings: default and meaning. The rest
adapts autodoc to numpydoc sections whose types are words.
"""

import importlib
import inspect
import pkgutil
import re
from dataclasses import MISSING, fields

from registry import show
from sphinx.util.docutils import SphinxDirective

MODULES = re.compile(r"^\[modules ([\w.]+)\]$", re.MULTILINE)
HEAD = re.compile(r"^(\w+(?:, \w+)*) : ")


def list_modules(app, docname, source):
    """Put a heading and an automodule for each module of a package in place of the line for it."""

    def sections(match):
        package = importlib.import_module(match[1])
        text = ""
        for module in pkgutil.iter_modules(package.__path__, f"{match[1]}."):
            # The kernels for a GPU need triton, which a copy may not have.
            if not module.ispkg and not module.name.endswith("_triton"):
                body = f"```{{eval-rst}}\n.. automodule:: {module.name}\n   :members:\n```"
                text += f"## {module.name.removeprefix('mnemodyn.')}\n\n{body}\n\n"
        return text

    source[0] = MODULES.sub(sections, source[0])


def meanings(cls):
    """What the docstrings of a class and its ancestors say of each attribute."""
    found = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        names = []
        for line in text.partition("Attributes\n----------\n")[2].split("\n"):
            head = HEAD.match(line)
            if head:
                names = head[1].split(", ")
                found.update(dict.fromkeys(names, ""))
            elif line and not line.startswith(" "):
                break
            for name in names if not head else ():
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def as_myst(text):
    """Docstring markup as MyST: roles and double backticks become code."""
    return re.sub(r"\s+", " ", re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`"))


class Settings(SphinxDirective):
    """``MODULE:CLASS``: a table of its settings."""

    required_arguments = 1

    def run(self):
        module, name = self.arguments[0].split(":")
        cls = getattr(importlib.import_module(module), name)
        said = meanings(cls)
        rows = []
        for field in fields(cls):
            default = "required" if field.default is MISSING else field.default
            rows.append([f"`{field.name}`", f"`{default}`", as_myst(said[field.name])])
        return [show(self, ["setting", "default", "meaning"], rows, "settings")]


def skip_borrowed(app, what, name, obj, skip, options):
    """Document a name where it is defined; not where a module or a class has it from elsewhere."""
    home = getattr(obj, "__module__", None) or "mnemodyn"
    if what == "module":
        return home not in ("mnemodyn", app.env.temp_data["autodoc:module"]) or None
    return not home.startswith("mnemodyn") or None


def plain_lines(app, what, name, obj, options, lines):
    """Reword what would be read wrongly: several docstrings' [1]_ on a page, a colon in a first line."""
    for index, line in enumerate(lines):
        lines[index] = re.sub(r"(\[\d\])_", r"\1", line).replace(".. [", "* [")
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", " \N{EN DASH} ")  # it would end a type


def find_target(app, env, node, contnode):
    """Types in numpydoc sections are words; only a role must lead somewhere.

    A committed page of a notebook has its neighbours in ``book/runs``.
    """
    if node.get("refdomain") == "py" and "refwarn" not in node:
        return contnode
    if node["reftype"] == "doc" and node["refdoc"].startswith("book/committed/"):
        # Sphinx reads the target from the node, whatever else it is given.
        node["reftarget"] = f"/book/runs/{node['reftarget']}"
        asked = (env, node["refdoc"], app.builder, "doc", node["reftarget"], node, contnode)
        return env.get_domain("std").resolve_xref(*asked)
    return None


def setup(app):
    """Register the steps with Sphinx."""
    app.connect("source-read", list_modules)
    app.connect("autodoc-skip-member", skip_borrowed)
    app.connect("autodoc-process-docstring", plain_lines, priority=400)  # before napoleon
    app.connect("missing-reference", find_target)
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
