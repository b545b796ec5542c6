"""The pages of ``studies.yaml``, the tables of results that they wrote, and nodes to show them.

A page's files lie in ``book/runs``, or in ``book/committed`` where it is a long study that was run
once. A page that this copy lacks gets a stub that says so.
"""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes

from mnemodyn.files import read_yaml
from mnemodyn.results import read_results

ABSENT = """# {title}

This page is not part of this copy. It is made by:

```bash
{command}
```

Needed: {needs}.
"""


def read_studies(root):
    """The registry: a dict of page to its entry."""
    return read_yaml(Path(root, "studies.yaml").read_text(encoding="utf-8"))


def docname(page, study):
    """Where a page lies, without an ending."""
    return f"book/committed/{page}" if "profile" in study else f"book/runs/{page}"


def command(study):
    """What makes a page."""
    words = "make book"
    if "profile" in study:
        words += f" PROFILE={study['profile']}"
        if "needs" in study:
            words += " DATA=FOLDER"
    if study.get("when") == "cohort":
        words += " DATA=FOLDER COHORT=NAME"
    return words


def table_of(env, page):
    """A page's table of results; None where this copy has none, a KeyError if there is no such page."""
    study = read_studies(env.srcdir)[page]
    path = f"{docname(page, study)}.csv"
    env.note_dependency(path)
    if not Path(env.srcdir, path).is_file():
        return None
    return read_results(Path(env.srcdir, path))


def write_stubs(app, config):
    """Before Sphinx looks for pages: a page for every one that this copy lacks, and no other."""
    for page, study in read_studies(app.srcdir).items():
        path = Path(app.srcdir, docname(page, study))
        stub = path.with_name(f"{page}.md")
        if path.with_name(f"{page}.ipynb").is_file():
            stub.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        needs = study.get("needs", "nothing more")
        text = ABSENT.format(title=study["title"], command=command(study), needs=needs)
        stub.write_text(text, encoding="utf-8")


def write(value, form):
    """A number with a true minus sign, a space before % that does not break, and no negative zero."""
    text = format(value, form)
    if not text.strip("+-0.%"):
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}").replace("%", "\N{NO-BREAK SPACE}%")


def between(row, form=".3f", joint=" to "):
    """The ends of a row's interval; empty where it has none."""
    if row.low != row.low:
        return ""
    return f"{write(row.low, form)}{joint}{write(row.high, form)}"


def table(head, rows, numeric=(), classes=()):
    """A table; a cell is text or a list of nodes, and columns `numeric` are set as numbers."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    for part, lines in ((nodes.thead(), [head]), (nodes.tbody(), rows)):
        for line in lines:
            cells = []
            for index, content in enumerate(line):
                parts = [nodes.paragraph("", content)] if isinstance(content, str) else content
                cells.append(nodes.entry("", *parts))
                if index in numeric:
                    cells[-1]["classes"] = ["number"]
            part += nodes.row("", *cells)
        group += part
    box = nodes.table("", group, classes=["results", *classes])
    return nodes.container("", box, classes=["scroll"])


def link(env, docname, text):
    """A paragraph with a link to a page."""
    known = {"refdomain": "std", "reftype": "doc", "refdoc": env.docname, "refwarn": True}
    reference = addnodes.pending_xref(
        "", nodes.inline("", text), reftarget=f"/{docname}", refexplicit=True, **known
    )
    return nodes.paragraph("", "", reference)


def setup(app):
    """Register the step with Sphinx, before the table of contents is read."""
    app.connect("config-inited", write_stubs, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
