"""What each run was: how it went, what it used, and the command that repeats it.

A run's page begins with what its cell tagged ``finding`` says; where training kept step 0, a line adds that
the network is its front end. Code, parameters and the command are
folded away, and so is the output of a cell whose metadata have ``fold``, a line that says what it is.
"""

import html
import json
import shlex
from pathlib import Path

import nbformat
from docutils import nodes
from registry import pages, read_studies, read_table, show
from sphinx.util.docutils import SphinxDirective

from mnemodyn.results import UNTRAINED_BLOCKS, name_network
from mnemodyn.run import read_parameters

STEP_0 = (
    "The step kept is 0: training did not improve the score of validation people. What this page calls MnemoDyn or the "
    "network is the front end alone, a closed form."
)
LONGEST_PRINTED = 14  # lines of a cell's printed output that a page shows unfolded


def manifest(root, name):
    """The manifest of the run behind a document; None where that is no run."""
    path = Path(root, f"{name}.manifest.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rerun(root, run):
    """The command that makes a run again: what differs from the notebook's defaults."""
    defaults = read_parameters(Path(root, run["notebook"]))
    words = ["mnemodyn", "run", run["notebook"], run["output"]]
    for name, value in run["parameters"].items():
        if name not in defaults or defaults[name] != value:
            words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return nodes.literal_block("", shlex.join(words), language="bash")


def folded(line, *content, classes=""):
    """Nodes in a box that opens on a click and on paper; without a script too."""
    start = f'<details class="fold {classes}"><summary>{html.escape(line)}</summary>'
    opening = nodes.raw("", start, format="html")
    return [opening, *content, nodes.raw("", "</details>", format="html")]


def dress(app, doctree):
    """Title of a run's page, what was found below it, and folds for what few readers want."""
    run = manifest(app.srcdir, app.env.docname)
    title = next(iter(doctree.findall(nodes.title)), None)
    if run is None or title is None:
        return
    app.env.note_dependency(f"{app.env.docname}.manifest.json")
    studies = read_studies(app.srcdir)
    study = studies.get(Path(app.env.docname).name)
    if study and sum(other["notebook"] == study["notebook"] for other in studies.values()) > 1:
        title.children = [nodes.Text(study["title"])]
    found = nodes.container(classes=["finding"])
    again = [rerun(app.srcdir, run)]
    for cell in list(doctree.findall(nodes.container)):
        if cell.get("nb_element") != "cell_code":
            continue
        if {"tag_parameters", "tag_injected-parameters"} & set(cell["classes"]):
            cell.parent.remove(cell)
            again.append(cell)
            continue
        dress_cell(cell, found)
    section = title.parent
    if (
        is_front_end(Path(app.srcdir, f"{app.env.docname}.csv"))
        and "step kept is 0" not in found.astext()
    ):
        found += nodes.paragraph("", STEP_0)
    section.insert(1, folded("Parameters, and the command for this page", *again, classes="rerun"))
    if found.children:
        section.insert(1, found)


def is_front_end(path):
    """Whether the network of a page's table is its front end, since training kept step 0."""
    return path.is_file() and UNTRAINED_BLOCKS in set(name_network(read_table(path))["method"])


def dress_cell(cell, found):
    """Fold a cell's code, and its output if it says so; what it found goes to the top of the page."""
    output = [child for child in cell if "cell_output" in child["classes"]]
    for child in cell:
        if "cell_input" in child["classes"]:
            child["classes"].append("toggle")
    if not output:  # nothing to show a reader
        cell.parent.remove(cell)
        return
    line = cell.get("cell_metadata", {}).get("fold")
    # The cell that writes the results shows them all, which stand on the page "All results" too.
    if line is None and "write_results(resolve(results)" in cell.astext().replace("files.", ""):
        line = "The rows that this page adds to the table of all results"
    for child in output:
        fold_printed(child)
    if "tag_finding" in cell["classes"] or line:
        for child in output:
            cell.remove(child)
    if line:
        cell += folded(line, *output)
    elif "tag_finding" in cell["classes"]:
        found += output


def fold_printed(output):
    """Fold what a cell printed where it is long: the epochs of a training, say."""
    for block in list(output.findall(nodes.literal_block)):
        n_lines = len(block.astext().splitlines())
        if n_lines > LONGEST_PRINTED:
            at = block.parent.index(block)
            block.parent.remove(block)
            block.parent[at:at] = folded(f"What was printed, {n_lines} lines", block)


class Provenance(SphinxDirective):
    """For every run of this copy: how it went, and what its last cell printed of what it used."""

    def run(self):
        rows, used = [], []
        for page, _, document, _ in pages(self.env):
            run = manifest(self.env.srcdir, document)
            if run is None:
                continue
            commit = (run["commit"] or "none")[:7] + (", changed" if run["dirty"] else "")
            numbers = [f"{run['seconds']:.0f}", f"{run['processor_seconds']:.0f}"]
            numbers += [run["peak_memory_mb"], run["cpus"]]
            rows.append(
                [f"[{page}](/{document})", run["status"], run["started"][:16], *numbers, commit]
            )
            said = nodes.literal_block("", last_words(self.env.srcdir, document), language="text")
            used += [nodes.rubric("", page), said]
        head = ["Run", "Ended", "Started (UTC)", "Seconds", "Of processor", "MB", "Cores", "Commit"]
        return [show(self, head, rows, "runs", numeric=(3, 4, 5, 6)), *used]


def last_words(root, name):
    """What the last code cell of an executed notebook printed: fingerprints, versions and seeds."""
    notebook = nbformat.read(Path(root, f"{name}.ipynb"), as_version=4)
    cell = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    return "".join(output.get("text", "") for output in cell.outputs).strip()


def setup(app):
    """Register the steps with Sphinx."""
    app.add_directive("provenance", Provenance)
    app.connect("doctree-read", dress, priority=100)  # before titles are collected
    return {"parallel_read_safe": True, "parallel_write_safe": True}
