"""What each run was: how it went and what it used.

A run's page begins with what its cell tagged `finding` says. Code, parameters and the command that runs it again are
folded away, and so is the output of a cell whose metadata have `fold`, a line that says what it is.
"""

import html
import json
import re
import shlex
from pathlib import Path

import nbformat
from docutils import nodes
from results import RUNS, link, lookup, table, write
from sphinx.util.docutils import SphinxDirective

from mnemodyn.parameters import read_parameters


def manifest(folder, name):
    """A run's manifest."""
    return json.loads(Path(folder, RUNS, f"{name}.manifest.json").read_text(encoding="utf-8"))


def rerun(folder, run):
    """The command that makes a run again, from its manifest: what differs from the notebook's defaults."""
    notebook = Path(folder, run["notebook"])
    defaults = read_parameters(nbformat.read(notebook, as_version=4)) if notebook.is_file() else {}
    words = ["mnemodyn", "run", run["notebook"], run["output"]]
    for key, value in run["parameters"].items():
        if key not in defaults or defaults[key] != value:
            words += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def command(folder, run):
    """The command as a block of code."""
    return nodes.literal_block("", rerun(folder, run), language="bash")


def name_title(app, doctree):
    """Give each page of a notebook that has several a title of its own, from the table of contents and its results."""
    name = app.env.docname.removeprefix(f"{RUNS}/")
    path, title = (
        Path(app.srcdir, RUNS, f"{name}.manifest.json"),
        next(iter(doctree.findall(nodes.title)), None),
    )
    if (
        title is None
        or not path.is_file()
        or Path(manifest(app.srcdir, name)["notebook"]).stem == name
    ):
        return
    short = app.config.external_site_map[app.env.docname].title
    if not short or title.astext().startswith(short):
        return
    found = path.with_name(f"{name}.json")
    found = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    rest = title.astext().split(": ")[-1]
    if "targets" in found:
        *first, last = [target.replace("_", " ") for target in found["targets"]]
        rest = f"{', '.join(first)} and {last}" if first else last
        rest += " of SIMULATED people" if found["simulated"] else " of real people"
    title.children = [nodes.Text(f"{short}: {rest}")]
    title.children[0].parent = title


def folded(line, *content, classes=""):
    """Nodes in a box that opens on a click and on paper; without a script too."""
    start = f'<details class="fold {classes}"><summary>{html.escape(line)}</summary>'
    return [
        nodes.raw("", start, format="html"),
        *content,
        nodes.raw("", "</details>", format="html"),
    ]


def dress(app, doctree):
    """Put what was found below the title of a run's page, and fold what few readers want."""
    name = app.env.docname.removeprefix(f"{RUNS}/")
    path = Path(app.srcdir, RUNS, f"{name}.manifest.json")
    title = next(iter(doctree.findall(nodes.title)), None)
    if name == app.env.docname or not path.is_file() or title is None:
        return
    app.env.note_dependency(str(path))
    run = manifest(app.srcdir, name)
    cells = [c for c in doctree.findall(nodes.container) if c.get("nb_element") == "cell_code"]
    found = nodes.container(classes=["finding"])
    opened = nodes.literal("", f"make lab NOTEBOOK={Path(run['notebook']).stem}")
    said = nodes.paragraph(
        "",
        "",
        nodes.Text("An executed notebook; "),
        opened,
        nodes.Text(" opens it. This run again:"),
    )
    again = [said, command(app.srcdir, run)]
    for cell in cells:
        output = [child for child in cell if "cell_output" in child["classes"]]
        if {"tag_parameters", "tag_injected-parameters"} & set(cell["classes"]):
            again.append(cell)
            continue
        for child in cell:
            if "cell_input" in child["classes"]:
                child["classes"].append("toggle")
        if "tag_finding" in cell["classes"]:
            found += output
            output = []
        if not output:  # what this copy has nothing to show for
            cell.parent.remove(cell)
        line = cell.get("cell_metadata", {}).get(
            "fold", "What this run used" if cell is cells[-1] else ""
        )
        if line and output:
            cell.children = [child for child in cell if child not in output]
            cell += folded(line, *output)
    place = again[2].parent if len(again) > 2 else title.parent
    at = place.index(again[2]) if len(again) > 2 else 1
    for cell in again[2:]:
        cell.parent.remove(cell)
    box = nodes.container(
        "", *folded("Parameters, and the command for this page", *again, classes="rerun")
    )
    place.insert(at, box)
    if found.children:
        title.parent.insert(title.parent.index(title) + 1, found)


def fair(text):
    """The text with true minus signs, and a space that does not break before per cents."""
    text = re.sub(r"(?<![\w.\-])-(?=\d)", "\N{MINUS SIGN}", text)
    return re.sub(r"(?<=\d) ?%", "\N{NO-BREAK SPACE}%", text)


def set_numbers(app, doctree):
    """Set the numbers that a run's page says, in its text and tables and below its figures."""
    if not app.env.docname.startswith(f"{RUNS}/"):
        return
    for text in list(doctree.findall(nodes.Text)):
        if isinstance(text.parent, nodes.raw):
            new = re.sub(
                r"(?<=>)[^<>]+(?=</(?:figcaption|td)>)", lambda found: fair(found[0]), text.astext()
            )
        elif isinstance(
            text.parent, nodes.literal | nodes.literal_block | nodes.math | nodes.math_block
        ):
            continue
        else:
            new = fair(text.astext())
        if new != text.astext():
            text.parent.replace(text, nodes.Text(new))


class Provenance(SphinxDirective):
    """For every run that is a page of this copy: how it went, the versions, and a section of its own."""

    def run(self):
        order = [document.docname for document in self.env.app.config.external_site_map.values()]
        names = [doc.removeprefix(f"{RUNS}/") for doc in order if doc.startswith(f"{RUNS}/")]
        rows, used, sections = [], {}, []
        for name in names:
            facts = {
                k: lookup(self, f"{name}.manifest", k)
                for k in ("status", "started", "seconds", "cpus")
            }
            run = manifest(self.env.srcdir, name)
            commit = (run["commit"] or "none")[:7] + (", changed" if run["dirty"] else "")
            start = write(facts["started"])[:16].replace("T", " ")
            memory = run.get("peak_memory_mb")
            cells = [
                write(facts["status"]),
                start,
                write(facts["seconds"], ".0f"),
                write(memory or 0),
            ]
            rows.append([name, *cells, write(facts["cpus"]), commit])
            for package, version in {**run["versions"], "python": run["python"]}.items():
                used.setdefault(package, {})[version or "not installed"] = True
            sections.append(self.section(name, run))
        versions = [[package, ", ".join(versions)] for package, versions in used.items()]
        heads = ["Run", "Ended", "Started", "Seconds", "MB", "Cores", "Commit"]
        runs = nodes.container("", table(heads, rows, (3, 4, 5), ["runs"]), classes=["scroll"])
        return [runs, table(["Package", "Version"], versions), *sections]

    def section(self, name, run):
        """Parameters and what the notebook printed about itself."""
        section = nodes.section(
            "", nodes.title("", name), ids=[f"run-{nodes.make_id(name)}"], names=[]
        )
        section += nodes.paragraph(
            "", f"{run['notebook']}, as the page ", link(self.env, f"{RUNS}/{name}", name)
        )
        section += nodes.container("", command(self.env.srcdir, run), classes=["rerun"])
        printed = last_words(Path(self.env.srcdir, RUNS, f"{name}.ipynb"))
        if printed:
            section += nodes.literal_block("", printed, language="text")
        rows = [
            [key, json.dumps(value, ensure_ascii=False)] for key, value in run["parameters"].items()
        ]
        section += nodes.container(
            "", table(["Parameter", "Value"], rows, (), ["parameters"]), classes=["scroll"]
        )
        return section


def last_words(path):
    """What the last code cell of an executed notebook printed: its fingerprints, versions and seeds."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for output in cells[-1].outputs).strip() if cells else ""


def setup(app):
    """Register the steps with Sphinx."""
    app.add_directive("provenance", Provenance)
    app.connect("doctree-read", name_title, priority=100)  # before titles are collected
    app.connect("doctree-read", dress)
    app.connect("doctree-read", set_numbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
