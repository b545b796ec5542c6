"""Numbers of the runs in the pages: roles for one number, directives for tables of many.

``{result}`PAGE:TASK:METHOD:SCORE` `` inserts a value of the page's table of results. Further parts,
in any order: ``low``, ``high``, ``n``, ``p`` or ``interval`` in place of the value,
``against=METHOD`` for the difference from another method, ``data=NAME`` where a page has several
data sets, and a format such as ``.2f``. ``{verdict}`...` `` says what a difference's interval means,
``{method}`...` `` what was computed: a network that training left at step 0 is named the front end alone.
A row that a table lacks ends the build of the book; a table that this copy lacks is said.
"""

import difflib
from pathlib import Path

import pandas as pd
from docutils import nodes
from registry import between, command, pages, show, table_of, write
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from mnemodyn.results import label, literal, name_network, verdict

logger = logging.getLogger(__name__)
PUBLISHED = "book/data/published.csv"
BELOW = '{}<br><span class="interval">{}</span>'
SCRIPT = (Path(__file__).parent / "sort.js").read_text(encoding="utf-8")
FIELDS = ("value", "low", "high", "n", "p", "interval")


def key_of(row):
    """What a role writes to get a row."""
    key = f"{row.task}:{row.method}:{row.score}"
    return f"{key}:against={row.against}" if row.against else key


def parse(text):
    """Page, key, field, data set and format of a role's text."""
    page, task, method, score, *rest = text.split(":")
    key, field, data, form = f"{task}:{method}:{score}", "value", None, ""
    for part in rest:
        if part in FIELDS:
            field = part
        elif part.startswith("against="):
            key += f":{part}"
        elif part.startswith("data="):
            data = part.removeprefix("data=")
        else:
            form = part
    return page, key, field, data, form


def find(env, page, key, data):
    """The row of a key; None where this copy lacks the table. A LookupError names the nearest keys."""
    found = table_of(env, page)
    if found is None:
        return None
    named = found.assign(shown=name_network(found)["method"])
    rows = [row for row in named.itertuples() if data in (None, row.data)]
    matching = [row for row in rows if key_of(row) == key]
    if len(matching) > 1:
        raise LookupError(f"several rows {key}; say data= of {[row.data for row in matching]}")
    if not matching:
        near = difflib.get_close_matches(key, map(key_of, rows), n=3, cutoff=0.3)
        raise LookupError(f"{page} has no row {key}; nearest: {near}")
    return matching[0]


def said(row, field, form):
    """The text of a row's field."""
    form = form or ("+.3f" if row.against else ".3f")
    if row.against and verdict(row.low, row.high) == "identical":
        form = ".0f"
    if field == "interval":
        return between(row, form) or "no interval"
    if field == "n":
        return f"{row.n:,}"
    return write(getattr(row, field), ".2g" if field == "p" else form)


class Result(SphinxRole):
    """One number; its source stands in the tooltip."""

    def run(self):
        try:
            page, key, field, data, form = parse(self.text)
            row = find(self.env, page, key, data)
            text = "(not in this copy)" if row is None else self.say(row, field, form)
        except (LookupError, ValueError, TypeError) as error:
            logger.warning(f"{self.text}: {error}", location=self.get_location())
            return [], []
        source = f"{page}.csv: {key}"
        # check_pages.py reads the kind: a SIMULATED number must be called so where it stands.
        classes = ["result"] if row is None else ["result", row.kind]
        return [nodes.abbreviation("", text, explanation=source, classes=classes)], []

    def say(self, row, field, form):
        return said(row, field, form)


class Verdict(Result):
    """What the interval of a difference says of the first method."""

    def say(self, row, field, form):
        return verdict(row.low, row.high)


class MethodName(Result):
    """What was computed, by the name that tables give it."""

    def say(self, row, field, form):
        return label(row.shown)


class AllResults(SphinxDirective):
    """A row a number of every page; searching and sorting need a script, on this page only."""

    def run(self):
        rows = []
        for _, _, document, found in pages(self.env):
            for row in [] if found is None else name_network(found).itertuples():
                method = label(row.method)
                if row.against:
                    method += f" \N{MINUS SIGN} {label(row.against)}"
                n = "" if pd.isna(row.n) else row.n
                first = [
                    f"[{literal(row.data)}](/{document})",
                    *map(literal, (row.task, method, row.score)),
                ]
                rows.append([*first, write(row.value, ".3f"), between(row), n, literal(row.kind)])
        for row in pd.read_csv(Path(self.env.srcdir, PUBLISHED)).itertuples():
            method = f"{row.method} ({row.source})"
            rows.append(
                [row.cohort, row.target, method, row.metric, row.value, "", "", "published"]
            )
        head = ["Data", "Task", "Method", "Score", "Value", "95 % interval", "n", "Kind"]
        script = nodes.raw("", f"<script>{SCRIPT}</script>", format="html")
        return [show(self, head, rows, "all-results", numeric=(4, 5, 6)), script]


class Status(SphinxDirective):
    """A row a page: what its numbers are, whether this copy has it, what it needs, what makes it."""

    def run(self):
        rows = []
        for _, study, document, found in pages(self.env):
            cells = [study["data"], study["kind"], "no"]
            if found is not None:
                # What the rows say of themselves wins: the data may be somebody's own.
                whose = {
                    kind: ", ".join(part["data"].unique()) for kind, part in found.groupby("kind")
                }
                kinds = ", ".join(whose)
                if len(whose) > 1:
                    kinds = "; ".join(f"{data}: {kind}" for kind, data in whose.items())
                cells = [literal(", ".join(found["data"].unique())), literal(kinds), "yes"]
            title = f"[{study['title']}](/{document})"
            rows.append([title, *cells, study.get("needs", ""), f"`{command(study)}`"])
        return [show(self, ["Page", "Data", "Kind", "Here", "Needs", "Command"], rows, "status")]


class Scores(SphinxDirective):
    """``PAGE ...``, a line ``METHOD HEADING`` a column: the scores of people, a row a task."""

    required_arguments = 1
    optional_arguments = 9
    has_content = True

    def run(self):
        methods = dict(line.split(maxsplit=1) for line in self.content)
        rows = []
        for page, _, document, found in pages(self.env):
            if page not in self.arguments or found is None:
                continue
            condition = found["task"].str.partition(", ")[2]
            shown = found["method"].isin(methods) & found["score"].isin(["balanced_accuracy", "r"])
            shown &= (found["against"] == "") & condition.isin(["", "one site left out"])
            found = found[shown]
            for (data, task), group in found.groupby(["data", "task"], sort=False):
                cells = dict.fromkeys(methods, "")
                for row in group.itertuples():
                    value = ("r " if row.score == "r" else "") + write(row.value, ".3f")
                    cells[row.method] = BELOW.format(value, between(row))
                whose = f"[{literal(data)}, {literal(task)}](/{document})"
                if row.kind == "SIMULATED":
                    whose = f"SIMULATED {whose}"
                first = BELOW.format(whose, f"n {row.n}")
                rows.append([first, *cells.values()])
        head = ["Cohort and target", *methods.values()]
        return [show(self, head, rows, "people", numeric=range(1, len(head)))]


def setup(app):
    """Register the roles and directives with Sphinx."""
    app.add_role("result", Result())
    app.add_role("verdict", Verdict())
    app.add_role("method", MethodName())
    app.add_directive("all-results", AllResults)
    app.add_directive("status", Status)
    app.add_directive("scores", Scores)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
