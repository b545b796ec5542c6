"""Roles and directives that bring what the runs wrote in ``book/runs`` into the pages.

``{result}`reconstruction:r2_hidden.model:.2f` `` inserts one value, ``{compare}`NAME:KEY:KEY` ``
says how two of them stand, ``results-table`` lists methods, ``people-table`` what was predicted
about people, and ``run-table`` reads the manifests.
A missing file or key is a warning that names both, which ends the build of the book.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)
RUNS = "book/runs"
MAY_BE_NULL = ("commit", "dirty")  # outside a git clone


def lookup(place, name, key):
    """Value at the dotted ``key`` of ``book/runs/NAME.json``; None after a warning if absent."""
    path = f"{RUNS}/{name}.json"
    place.env.note_dependency(path)
    try:
        value = json.loads(Path(place.env.srcdir, path).read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value[int(part) if isinstance(value, list) else part]
        if value != value or (value is None and key not in MAY_BE_NULL):
            raise ValueError(f"it is {value}")
    except (OSError, LookupError, TypeError, ValueError) as error:
        text = f"cannot take '{key}' from {path}: {error!r}"
        logger.warning(text, location=place.get_location())
        return None
    return value


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


class Result(SphinxRole):
    """``NAME:KEY`` or ``NAME:KEY:FORMAT``; the source stands in the value's tooltip."""

    def run(self):
        name, key, form = [*self.text.split(":", 2), "", ""][:3]
        text, source = write(lookup(self, name, key), form), f"{RUNS}/{name}.json: {key}"
        return [nodes.abbreviation("", text, explanation=source, classes=["result"])], []


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
    app.add_role("compare", Compare())
    app.add_directive("results-table", ResultsTable)
    app.add_directive("people-table", PeopleTable)
    app.add_directive("run-table", RunTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
