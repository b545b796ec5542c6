"""Roles and directives that bring what the runs wrote in ``book/runs`` into the pages.

``{result}`reconstruction:r2_hidden.model:.2f` `` inserts one value, ``{compare}`NAME:KEY:KEY` ``
says how two of them stand, ``{interval}`NAME:KEY:FORMAT` `` gives the ends of an interval;
``results-table`` lists methods, and ``people-table`` what was predicted about people.
A missing file or key is a warning that names both, which ends the build of the book.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
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
    known = {"refdomain": "std", "reftype": "doc", "refdoc": env.docname, "refexplicit": True, "refwarn": True}
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
        return [nodes.abbreviation("", text, explanation=f"{source(name)}: {key}", classes=["result"])], []


class Compare(SphinxRole):
    """``NAME:KEY:KEY``: the first is above, below or, to three decimals, level with the second."""

    def run(self):
        name, *keys = self.text.split(":")
        first, second = (round(lookup(self, name, key) or 0, 3) for key in keys)
        word = ("level with", "above", "below")[(first > second) - (first < second)]
        return [nodes.Text(word)], []


class ResultsTable(SphinxDirective):
    """``NAME VALUES [INTERVALS]``; a line ``METHOD LABEL`` a row, ``:head:`` over the values."""

    required_arguments, optional_arguments, has_content = 2, 1, True
    option_spec = dict.fromkeys(("name", "caption", "head"), directives.unchanged)

    def run(self):
        name, values, *intervals = self.arguments
        rows = []
        for method, label in (line.split(maxsplit=1) for line in self.content):
            value = write(lookup(self, name, f"{values}.{method}"), ".3f")
            ends = [lookup(self, name, f"{key}.{method}") or () for key in intervals]
            rows.append([label, value, *(" to ".join(write(e, ".3f") for e in p) for p in ends)])
        heads = ["Method", self.options.get("head", values), "95 % interval"][: 2 + len(intervals)]
        result = table(heads, rows, range(1, len(heads)))
        result.insert(0, nodes.title("", self.options.get("caption", "")))
        self.add_name(result)
        return [result]


class PeopleTable(SphinxDirective):
    """``METHOD ...``: those methods' first scores for every target of every ``book/runs/downstream_*.json``."""

    required_arguments, optional_arguments = 1, 9
    option_spec = dict.fromkeys(("caption",), directives.unchanged)

    def run(self):
        heads = ["Cohort", "Target", "n", "Folds", "Method", "Score (95 % interval)", "p"]
        lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        for path in sorted(Path(self.env.srcdir, RUNS).glob("downstream_*.json")):
            if path.name.endswith(".manifest.json"):
                continue
            found = lookup(self, path.stem, "targets") or {}
            name = f"[{lookup(self, path.stem, 'cohort')}](runs/{path.stem}.ipynb)"
            name += " SIMULATED" if lookup(self, path.stem, "simulated") else ""
            for target, plans in found.items():
                for plan, report in plans.items():
                    lines += self.rows(name, target, plan, report)
        box = nodes.container(classes=["wide"])
        self.state.nested_parse(StringList(lines, source=RUNS), 0, box)
        return [box]

    def rows(self, name, target, plan, report):
        metric = "balanced_accuracy" if report["kind"] == "classification" else "r"
        for row in report["rows"]:
            if row["method"] not in self.arguments or row[metric]["value"] is None:
                continue
            p = "" if row.get("p") is None else "< 0.001" if row["p"] < 0.001 else write(row["p"], ".3f")
            folds = {"kfold": f"{row['n_folds']}", "leave_one_site_out": f"{row['n_folds']} sites"}[plan]
            ends = " to ".join(write(row[metric][end], ".3f") for end in ("low", "high"))
            score = ("r " if metric == "r" else "") + f"{write(row[metric]['value'], '.3f')} ({ends})"
            texts = [name, target.replace("_", " "), str(row["n"]), folds, row["method"], score, p]
            yield "| " + " | ".join(texts) + " |"


class RunTable(SphinxDirective):
    """Two tables for the runs named: how each one went, and the versions it used."""

    required_arguments, optional_arguments = 1, 30

    def run(self):
        keys, rows, used = ["status", "started", "seconds", "cpus", "commit", "dirty"], [], {}
        for run in self.arguments:
            facts = [lookup(self, f"{run}.manifest", key) for key in keys]
            ended, start, seconds, cpus, commit, dirty = facts
            commit = (commit or "none")[:7] + (", changed" if dirty else "")
            texts = [write(ended), write(start)[:16].replace("T", " "), write(seconds, ".0f")]
            rows.append([run, *texts, write(cpus), commit])
            versions = lookup(self, f"{run}.manifest", "versions") or {}
            versions["python"] = lookup(self, f"{run}.manifest", "python")
            for package, version in versions.items():
                used.setdefault(package, {})[version or "not installed"] = True
        heads = ["Run", "Ended", "Started", "Seconds", "Cores", "Commit"]
        versions = [[package, ", ".join(found)] for package, found in used.items()]
        return [table(heads, rows, (3, 4), ["runs"]), table(["Package", "Version"], versions)]


def setup(app):
    """Register the roles and directives with Sphinx."""
    app.add_role("result", Result())
    app.add_role("interval", Interval())
    app.add_role("compare", Compare())
    app.add_directive("results-table", ResultsTable)
    app.add_directive("people-table", PeopleTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
