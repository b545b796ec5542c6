"""Roles and directives that bring what the runs wrote in ``book/runs`` into the pages.

``{result}`reconstruction:r2_hidden.model:.2f` `` inserts one value, ``{compare}`NAME:KEY:KEY` ``
says how two of them stand, ``{interval}`NAME:KEY:FORMAT` `` gives the ends of an interval, ``{verdict}`NAME:KEY` ``
what those of a difference say; ``people-table`` lists what was predicted about people.
A missing file or key is a warning that names both, which ends the build of the book.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)
RUNS = "book/runs"
MAY_BE_NULL = ("commit", "dirty")  # outside a git clone


def source(name):
    """Path of a result file: of a run by its name, of a committed one as ``data/NAME``."""
    return f"book/{name}.json" if name.startswith("data/") else f"{RUNS}/{name}.json"


def lookup(place, name, key):
    """Value at the dotted ``key`` of ``book/runs/NAME.json``, or ``book/data/...``; None after a warning if absent."""
    path = source(name)
    place.env.note_dependency(path)
    try:
        value = json.loads(Path(place.env.srcdir, path).read_text(encoding="utf-8"))
        for part in key.split("."):
            value = step(value, part)
        if value != value or (value is None and key not in MAY_BE_NULL):
            raise ValueError(f"it is {value}")
    except (OSError, LookupError, TypeError, ValueError) as error:
        text = f"cannot take '{key}' from {path}: {error!r}"
        logger.warning(text, location=place.get_location())
        return None
    return value


def step(value, part):
    """What stands at one part of a key; in a list a number, or ``NAME=TEXT`` for the first element that has it."""
    if not isinstance(value, list):
        return value[part]
    if "=" not in part:
        return value[int(part)]
    name, text = part.split("=", 1)
    for item in value:
        if str(item.get(name)) == text:
            return item
    raise KeyError(part)


def write(value, form=""):
    """Text of a value, with a true minus sign, a space before % and no negative zero."""
    if value is None or isinstance(value, str):
        return value or "?"
    text = format(value, form or ("," if isinstance(value, int) else ".3g"))
    text = text.lstrip("-") if not text.strip("-0.%") else text
    return text.replace("-", "\N{MINUS SIGN}").replace("%", "\N{NO-BREAK SPACE}%")


def judge(low, high):
    """What a difference with this interval is called."""
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def table(head, rows, numeric=(), classes=()):
    """Docutils table of texts; the columns whose index is in ``numeric`` are set to the right."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    for part, lines in ((nodes.thead(), [head]), (nodes.tbody(), rows)):
        for line in lines:
            cells = [nodes.entry("", nodes.paragraph("", text)) for text in line]
            for index in numeric:
                cells[index]["classes"] = ["number"]
            part += nodes.row("", *cells)
        group += part
    return nodes.table("", group, classes=["results", *classes])


def link(env, docname, text):
    """A link to a page; only its text where this copy lacks the page."""
    if docname not in env.found_docs:
        return nodes.Text(text)
    known = {
        "refdomain": "std",
        "reftype": "doc",
        "refdoc": env.docname,
        "refexplicit": True,
        "refwarn": True,
    }
    return addnodes.pending_xref("", nodes.inline("", text), reftarget=f"/{docname}", **known)


class Result(SphinxRole):
    """``NAME:KEY`` or ``NAME:KEY:FORMAT``; the source stands in the value's tooltip."""

    def run(self):
        name, key, form = [*self.text.split(":", 2), "", ""][:3]
        text, said = write(lookup(self, name, key), form), f"{source(name)}: {key}"
        return [nodes.abbreviation("", text, explanation=said, classes=["result"])], []


class Interval(SphinxRole):
    """``NAME:KEY:FORMAT`` of a mapping with low and high: "LOW to HIGH", or that there is none, as from one fold."""

    def run(self):
        name, key, form = [*self.text.split(":", 2), "", ""][:3]
        found = lookup(self, name, key) or {}
        ends = [found.get(end) for end in ("low", "high")]
        text = "no interval" if None in ends else " to ".join(write(end, form) for end in ends)
        return [
            nodes.abbreviation("", text, explanation=f"{source(name)}: {key}", classes=["result"])
        ], []


class Compare(SphinxRole):
    """``NAME:KEY:KEY``: the first is above, below or, to three decimals, level with the second."""

    def run(self):
        name, *keys = self.text.split(":")
        first, second = (round(lookup(self, name, key) or 0, 3) for key in keys)
        word = ("level with", "above", "below")[(first > second) - (first < second)]
        return [nodes.Text(word)], []


class Verdict(SphinxRole):
    """``NAME:KEY`` of a difference with low and high: what its interval says of the first against the second."""

    def run(self):
        name, key = self.text.split(":")
        found = lookup(self, name, key) or {}
        low, high = found.get("low"), found.get("high")
        text = "no interval" if None in (low, high) else judge(low, high)
        return [
            nodes.abbreviation("", text, explanation=f"{source(name)}: {key}", classes=["result"])
        ], []


class PeopleTable(SphinxDirective):
    """``real`` or ``SIMULATED``; a line ``METHOD LABEL`` a column: the first scores in every downstream result."""

    required_arguments, has_content = 1, True

    def run(self):
        methods = dict(line.split(maxsplit=1) for line in self.content)
        rows, pages = [], []
        for name in [
            doc.removeprefix(f"{RUNS}/")
            for doc in self.config.external_site_map
            if "/downstream_" in doc
        ]:
            if lookup(self, name, "simulated") != (self.arguments[0] == "SIMULATED"):
                continue
            for target, plans in lookup(self, name, "targets").items():
                for plan, report in plans.items():
                    rows.append(self.row(name, target, plan, report, methods))
                    pages.append(name)
        heads = ["Cohort and target", *methods.values()]
        result = table(heads, rows, range(1, len(heads)), ["people"])
        for line, name in zip(result.findall(nodes.tbody).__next__().children, pages, strict=True):
            cells = [cell.astext().partition("|") for cell in line]
            for cell, (value, _, below) in zip(line, cells, strict=True):
                cell.clear()
                cell += [
                    nodes.paragraph("", value),
                    nodes.paragraph("", below, classes=["interval"]),
                ]
            line[0][0].clear()
            line[0][0] += link(self.env, f"{RUNS}/{name}", cells[0][0])
        return [nodes.container("", result, classes=["scroll"])]

    def row(self, name, target, plan, report, methods):
        metric = "balanced_accuracy" if report["kind"] == "classification" else "r"
        found = {row["method"]: row for row in report["rows"]}
        cohort, held = (
            self.config.external_site_map[f"{RUNS}/{name}"].title,
            "people" if plan == "kfold" else "a site",
        )
        texts = [
            f"{cohort}, {target.replace('_', ' ')}|{held} held out, n\N{NO-BREAK SPACE}{write(report['n'])}"
        ]
        for method in methods:
            score = found.get(method, {}).get(metric) or {"value": None}
            if score["value"] is None:
                texts.append("")
                continue
            ends = [] if score["low"] is None else [score["low"], score["high"]]
            between = "\N{EN DASH}" if min(ends, default=0) >= 0 else " to "
            ends = between.join(write(end, ".3f") for end in ends)
            texts.append(
                ("r " if metric == "r" else "") + write(score["value"], ".3f") + f"|{ends}"
            )
        return texts


def setup(app):
    """Register the roles and directives with Sphinx."""
    app.add_role("result", Result())
    app.add_role("interval", Interval())
    app.add_role("compare", Compare())
    app.add_role("verdict", Verdict())
    app.add_directive("people-table", PeopleTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
