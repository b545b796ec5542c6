"""Numbers of the runs in the pages: roles for one number, directives for tables of many.

``{result}`PAGE:TASK:METHOD:SCORE` `` inserts a value of the page's table of results. Further parts,
in any order: ``low``, ``high``, ``n``, ``p`` or ``interval`` in place of the value,
``against=METHOD`` for the difference from another method, ``data=NAME`` where a page has several
data sets, and a format such as ``.2f``. ``{verdict}`...` `` says what a difference's interval means.
A row that a table lacks ends the build of the book; a table that this copy lacks is said.
"""

import csv
import difflib
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from registry import between, command, docname, link, read_studies, table, table_of, write
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from mnemodyn.results import label, verdict

logger = logging.getLogger(__name__)
PUBLISHED = "book/data/published.csv"
HEADS = ["Data", "Task", "Method", "Score", "Value", "95 % interval", "n", "Kind"]
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
    rows = [row for row in found.itertuples() if data in (None, row.data)]
    matching = [row for row in rows if key_of(row) == key]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise LookupError(
            f"{key} stands for several; say data= of {[row.data for row in matching]}"
        )
    near = difflib.get_close_matches(key, [key_of(row) for row in rows], n=3, cutoff=0.3)
    raise LookupError(f"{page} has no row {key}; nearest: {near}")


def said(row, field, form):
    """The text of a row's field."""
    form = form or ("+.3f" if row.against else ".3f")
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
        return [nodes.abbreviation("", text, explanation=source, classes=["result"])], []

    def say(self, row, field, form):
        return said(row, field, form)


class Verdict(Result):
    """What the interval of a difference says of the first method."""

    def say(self, row, field, form):
        return verdict(row.low, row.high)


class AllResults(SphinxDirective):
    """A row a number of every page; searching and sorting need a script, on this page only."""

    def run(self):
        rows = []
        for page, study in read_studies(self.env.srcdir).items():
            found = table_of(self.env, page)
            for row in [] if found is None else found.itertuples():
                method = label(row.method)
                if row.against:
                    method += f" \N{MINUS SIGN} {label(row.against)}"
                n = "" if row.n != row.n else str(row.n)
                cells = [row.task, method, row.score, write(row.value, ".3f"), between(row), n]
                where = [link(self.env, docname(page, study), row.data)]
                rows.append([where, *cells, row.kind])
        with open(Path(self.env.srcdir, PUBLISHED), encoding="utf-8") as lines:
            for line in csv.DictReader(lines):
                method = f"{line['method']} ({line['source']})"
                cells = [line["cohort"], line["target"], method, line["metric"], line["value"]]
                rows.append([*cells, "", "", "published"])
        script = nodes.raw("", f"<script>{SCRIPT}</script>", format="html")
        return [table(HEADS, rows, (4, 5, 6), ["all-results"]), script]


class Status(SphinxDirective):
    """A row a page: what its numbers are, whether this copy has it, what it needs, what makes it."""

    def run(self):
        rows = []
        for page, study in read_studies(self.env.srcdir).items():
            found = table_of(self.env, page)
            data, kinds, here = study["data"], study["kind"], "no"
            if found is not None:
                # What the rows say of themselves wins: the data may be somebody's own.
                data = ", ".join(sorted(set(found["data"])))
                kinds = ", ".join(sorted(set(found["kind"])))
                here = "yes"
            where = [link(self.env, docname(page, study), study["title"])]
            how = [nodes.paragraph("", "", nodes.literal("", command(study)))]
            rows.append([where, data, kinds, here, study.get("needs", ""), how])
        return [table(["Page", "Data", "Kind", "Here", "Needs", "Command"], rows, (), ["status"])]


class Scores(SphinxDirective):
    """``PAGE ...``, a line ``METHOD HEADING`` a column: the scores of people, a row a task."""

    required_arguments = 1
    optional_arguments = 9
    has_content = True

    def run(self):
        methods = dict(line.split(maxsplit=1) for line in self.content)
        rows = []
        for page in self.arguments:
            found = table_of(self.env, page)
            if found is None:
                continue
            found = found[
                (found["against"] == "") & found["score"].isin(["balanced_accuracy", "r"])
            ]
            found = found[found["method"].isin(methods)]
            where = docname(page, read_studies(self.env.srcdir)[page])
            for (data, task), group in found.groupby(["data", "task"], sort=False):
                if len(group) < 2:
                    continue
                text = f"n\N{NO-BREAK SPACE}{group['n'].iloc[0]}"
                cells = {row.method: self.cell(row) for row in group.itertuples()}
                first = [link(self.env, where, f"{data}, {task}"), small(text)]
                rows.append([first, *(cells.get(method, "") for method in methods)])
        heads = ["Cohort and target", *methods.values()]
        return [table(heads, rows, range(1, len(heads)), ["people"])]

    def cell(self, row):
        """A score above its interval."""
        value = ("r " if row.score == "r" else "") + write(row.value, ".3f")
        return [nodes.paragraph("", value), small(between(row))]


def small(text):
    """A second line of a cell."""
    return nodes.paragraph("", text, classes=["interval"])


class Given(SphinxDirective):
    """``PAGE ...``: the content where this copy has the tables of all of them, else a line that says so."""

    required_arguments = 1
    optional_arguments = 9
    has_content = True

    def run(self):
        lines = self.content
        absent = [page for page in self.arguments if table_of(self.env, page) is None]
        if absent:
            text = f"Not in this copy: {', '.join(absent)}; {{doc}}`status` has the commands."
            lines = StringList([text], source=self.env.docname)
        box = nodes.Element()
        self.state.nested_parse(lines, self.content_offset, box)
        return box.children


def setup(app):
    """Register the roles and directives with Sphinx."""
    app.add_role("result", Result())
    app.add_role("verdict", Verdict())
    app.add_directive("all-results", AllResults)
    app.add_directive("status", Status)
    app.add_directive("scores", Scores)
    app.add_directive("given", Given)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
