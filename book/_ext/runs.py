"""What each run was: how it went and what it used; on its page the command that runs it again, and code folded away."""

import json
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
    """Begin the title of a page whose notebook has several with its name in the table of contents."""
    name = app.env.docname.removeprefix(f"{RUNS}/")
    path, title = Path(app.srcdir, RUNS, f"{name}.manifest.json"), next(iter(doctree.findall(nodes.title)), None)
    if title is None or not path.is_file() or Path(manifest(app.srcdir, name)["notebook"]).stem == name:
        return
    short = app.config.external_site_map[app.env.docname].title
    if short and not title.astext().startswith(short):
        title.insert(0, nodes.Text(f"{short}: "))


def dress(app, doctree):
    """Put the command below the title of a run's page, and fold code but the parameters; without a script all shows."""
    name = app.env.docname.removeprefix(f"{RUNS}/")
    path = Path(app.srcdir, RUNS, f"{name}.manifest.json")
    if name == app.env.docname or not path.is_file():
        return
    app.env.note_dependency(str(path))
    run = manifest(app.srcdir, name)
    stem = Path(run["notebook"]).stem
    box = nodes.container(classes=["rerun"])
    opened = nodes.literal("", f"make lab NOTEBOOK={stem}")
    box += nodes.paragraph(
        "", "", nodes.Text("An executed notebook; "), opened, nodes.Text(" opens it. This run again:")
    )
    box += command(app.srcdir, run)
    for cell in doctree.findall(nodes.container):
        if "cell_input" in cell["classes"] and not {"tag_parameters", "tag_injected-parameters"} & set(
            cell.parent["classes"]
        ):
            cell["classes"].append("toggle")
    title = next(iter(doctree.findall(nodes.title)), None)
    if title is not None:
        title.parent.insert(title.parent.index(title) + 1, box)


class Provenance(SphinxDirective):
    """For every run that is a page of this copy: how it went, the versions, and a section of its own."""

    def run(self):
        order = [document.docname for document in self.env.app.config.external_site_map.values()]
        names = [doc.removeprefix(f"{RUNS}/") for doc in order if doc.startswith(f"{RUNS}/")]
        rows, used, sections = [], {}, []
        for name in names:
            facts = {k: lookup(self, f"{name}.manifest", k) for k in ("status", "started", "seconds", "cpus")}
            run = manifest(self.env.srcdir, name)
            commit = (run["commit"] or "none")[:7] + (", changed" if run["dirty"] else "")
            start = write(facts["started"])[:16].replace("T", " ")
            memory = run.get("peak_memory_mb")
            cells = [write(facts["status"]), start, write(facts["seconds"], ".0f"), write(memory or 0)]
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
        section = nodes.section("", nodes.title("", name), ids=[f"run-{nodes.make_id(name)}"], names=[])
        section += nodes.paragraph("", f"{run['notebook']}, as the page ", link(self.env, f"{RUNS}/{name}", name))
        section += nodes.container("", command(self.env.srcdir, run), classes=["rerun"])
        printed = last_words(Path(self.env.srcdir, RUNS, f"{name}.ipynb"))
        if printed:
            section += nodes.literal_block("", printed, language="text")
        rows = [[key, json.dumps(value, ensure_ascii=False)] for key, value in run["parameters"].items()]
        section += nodes.container("", table(["Parameter", "Value"], rows, (), ["parameters"]), classes=["scroll"])
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
    return {"parallel_read_safe": True, "parallel_write_safe": True}
