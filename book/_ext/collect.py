"""Pages made of all results: ``book/results.yaml`` says what there is, and each entry's file is read where it exists.

``all-results`` is a row a method, data set and task; ``status`` a row an entry; ``given NAME ...`` shows its content
only where this copy has every ``book/NAME.json`` or page ``book/NAME`` named, and what `otherwise` says if not.
"""

import csv
import json
from pathlib import Path

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from results import link, table, write
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
ENTRIES = "book/results.yaml"
KNOWN = {"result", "file", "page", "data", "kind", "needs", "command", "rows"}
KINDS = ("real", "SIMULATED", "timing", "published")
HEADS = ["Data", "Task", "Method", "Score", "Value", "95 % interval", "n", "Kind"]
NUMBERS = (4, 5, 6)
SCRIPT = (Path(__file__).parent / "sort.js").read_text(encoding="utf-8")


def read_entries(folder):
    """The checked content of ``book/results.yaml``: names of methods, and entries."""
    content = yaml.safe_load(Path(folder, ENTRIES).read_text(encoding="utf-8"))
    for entry in content["results"]:
        unknown = set(entry) - KNOWN
        if unknown or entry.get("kind") not in KINDS or not {"result", "command"} <= set(entry):
            raise ValueError(
                f"{ENTRIES}: an entry needs result, command and a kind of {KINDS}, and knows {sorted(KNOWN)}; "
                f"unknown: {sorted(unknown)} in {entry}"
            )
    return content["methods"], content["results"]


def kind_of(entry, content):
    """What a file's numbers are: what it says of itself wins over the entry."""
    if isinstance(content, dict) and "simulated" in content:
        return "SIMULATED" if content["simulated"] else "real"
    return entry["kind"]


def measured(value):
    """Value, low and high of a number or of a mapping that has them; None without a value."""
    if isinstance(value, dict):
        found = [value.get(key) for key in ("value", "low", "high")]
        return found if found[0] is not None else None
    return [value, None, None] if isinstance(value, int | float) else None


def read_rows(entry, content):
    """Rows of the table from one file's content: dicts of data, task, method, score, value, low, high, n and kind.

    ``rows`` of the entry says where they are: with ``values``, in a mapping from methods to numbers or to mappings with
    value, low and high, where ``intervals`` may name a mapping from methods to pairs; with ``list``, in a list of
    mappings, whose keys for method, value, low and high are given; with ``targets``, in a downstream report, of which
    ``scores`` says what is read for each kind of target. ``n`` is the key of the number of participants.
    """
    how, kind = entry["rows"], kind_of(entry, content)
    if how == "csv":
        for line in content:
            spread = f" (SD {line['sd']})" if line["sd"] else ""
            row = {
                "data": line["cohort"],
                "task": line["target"],
                "score": line["metric"] + spread,
                "kind": kind,
            }
            yield {
                **row,
                "method": f"{line['method']} ({line['source']})",
                "value": float(line["value"]),
            }
        return
    common = {
        "data": entry["data"],
        "task": how.get("task", ""),
        "score": how.get("score", ""),
        "kind": kind,
    }
    n = pick(content, how["n"]) if "n" in how else None
    if "values" in how:
        intervals = pick(content, how["intervals"]) if "intervals" in how else {}
        for method, found in pick(content, how["values"]).items():
            value = measured(found[how["field"]] if "field" in how else found)
            if value and method in intervals:
                value[1:] = intervals[method]
            if value:
                yield {
                    **common,
                    "method": method,
                    "n": n,
                    **dict(zip(("value", "low", "high"), value, strict=True)),
                }
    elif "list" in how:
        for found in pick(content, how["list"]):
            value = {end: found.get(how.get(end, end)) for end in ("value", "low", "high")}
            if isinstance(value["value"], dict):
                value = dict(
                    zip(
                        ("value", "low", "high"),
                        measured(value["value"]) or [None] * 3,
                        strict=True,
                    )
                )
            names = [how["method"]] if isinstance(how["method"], str) else how["method"]
            extra = {key: found[key] for key in ("data", "task", "score") if key in found}
            method = ", ".join(
                str(found[name]) for name in names if found.get(name) not in (None, "")
            )
            if value["value"] is not None:
                yield {**common, **extra, **value, "method": method, "n": found.get("n", n)}
    else:
        for target, plans in pick(content, how["targets"]).items():
            for plan, report in plans.items():
                if plan not in how["plans"]:
                    continue
                score = how["scores"][report["kind"]]
                for found in report["rows"]:
                    value = measured(found.get(score))
                    if value is None:
                        continue
                    task = f"{target}, {how['plans'][plan]}".replace("_", " ")
                    row = {
                        "task": task,
                        "score": score.replace("_", " "),
                        "method": found["method"],
                        "n": found["n"],
                    }
                    yield {
                        **common,
                        **row,
                        **dict(zip(("value", "low", "high"), value, strict=True)),
                    }


def pick(content, key):
    """What stands at a dotted key."""
    for part in key.split("."):
        content = content[part]
    return content


class Collected(SphinxDirective):
    """What the directives below share."""

    def load(self, entry):
        """Content of an entry's file, None where this copy has none."""
        if "file" not in entry:
            return None
        path = Path(self.env.srcdir, "book", entry["file"])
        self.env.note_dependency(str(path))
        if not path.is_file():
            return None
        text = path.read_text(encoding="utf-8")
        return (
            list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else json.loads(text)
        )

    def entries(self):
        self.env.note_dependency(ENTRIES)
        return read_entries(self.env.srcdir)

    def link(self, page, text):
        """A paragraph with a link to a page of the book, without one where the page is absent."""
        return nodes.paragraph("", "", link(self.env, f"book/{page}", text))


class AllResults(Collected):
    """The table of all results, with a search field and sorting that need a script, on this page only."""

    def run(self):
        methods, entries = self.entries()
        rows, links = [], []
        for entry in entries:
            content = self.load(entry)
            if content is None or "rows" not in entry:
                continue
            try:
                found = list(read_rows(entry, content))
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                logger.warning(
                    f"{ENTRIES}: cannot read {entry['file']}: {error!r}",
                    location=self.get_location(),
                )
                continue
            for row in found:
                ends = [row.get("low"), row.get("high")]
                between = (
                    "" if None in ends else " to ".join(write(float(end), ".3f") for end in ends)
                )
                name = methods.get(row["method"], row["method"].replace("_", " "))
                value, n = (
                    write(float(row["value"]), ".3f"),
                    "" if row.get("n") is None else f"{row['n']}",
                )
                rows.append(
                    [row["data"], row["task"], name, row["score"], value, between, n, row["kind"]]
                )
                links.append(entry.get("page"))
        result = table(HEADS, rows, NUMBERS, ["all-results"])
        for line, page in zip(result.findall(nodes.tbody).__next__().children, links, strict=True):
            if page:
                line[0].children = [self.link(page, line[0].astext())]
        return [
            nodes.container("", result, classes=["scroll"]),
            nodes.raw("", f"<script>{SCRIPT}</script>", format="html"),
        ]


class Status(Collected):
    """A row an entry: what it is, what its numbers are, whether this copy has it, what it needs and its command."""

    def run(self):
        rows, links = [], []
        for entry in self.entries()[1]:
            content = self.load(entry)
            found = "no" if content is None else "yes"
            kind = kind_of(entry, content) if content else entry["kind"]
            rows.append([entry["result"], entry.get("data", ""), kind, found, "", ""])
            links.append((entry.get("page"), entry.get("needs", ""), entry["command"]))
        result = table(["Result", "Data", "Kind", "Here", "Needs", "Command"], rows, (), ["status"])
        for line, (page, needs, command) in zip(
            result.findall(nodes.tbody).__next__().children, links, strict=True
        ):
            if page:
                line[0].children = [self.link(page, line[0].astext())]
            parts = enumerate(needs.split("`"))
            line[-2].children = [
                nodes.paragraph(
                    "", "", *(nodes.literal("", t) if i % 2 else nodes.Text(t) for i, t in parts)
                )
            ]
            line[-1].children = [nodes.paragraph("", "", nodes.literal("", command))]
        return [nodes.container("", result, classes=["scroll"])]


class Given(Collected):
    """``NAME ...``: the content where all of ``book/NAME.json`` or the pages ``book/NAME`` exist, else `otherwise`."""

    required_arguments, optional_arguments, has_content = 1, 9, True
    option_spec = dict.fromkeys(("otherwise",), directives.unchanged)

    def run(self):
        for name in self.arguments:
            self.env.note_dependency(f"book/{name}.json")
            if (
                not Path(self.env.srcdir, "book", f"{name}.json").is_file()
                and f"book/{name}" not in self.env.found_docs
            ):
                return self.parse(self.options.get("otherwise", "").splitlines())
        return self.parse(self.content)

    def parse(self, lines):
        box = nodes.Element()
        self.state.nested_parse(
            StringList(lines, source=self.env.docname), self.content_offset, box
        )
        return box.children


def setup(app):
    """Register the directives with Sphinx."""
    app.add_directive("all-results", AllResults)
    app.add_directive("status", Status)
    app.add_directive("given", Given)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
