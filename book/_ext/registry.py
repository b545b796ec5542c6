"""The pages of ``studies.yaml``, the tables of results that they wrote, and nodes to show them.

A page's files lie in ``book/runs``, or in ``book/committed`` where it is a long study that was run
once. A page that this copy lacks gets a stub that says so.
"""

import re
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList

from mnemodyn.files import load_yaml
from mnemodyn.results import read_results

ABSENT = """# {title}

This page is not part of this copy. It is made by:

```bash
{command}
```

Needed: {needs}.
"""


# A build reads a file once.
read_table = cache(read_results)


@cache
def read_studies(root):
    """The registry: a dict of page to its entry."""
    return load_yaml(Path(root, "studies.yaml"))


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


def pages(env):
    """Of every page: its name, entry, document, and table of results (None where this copy has none)."""
    for page, study in read_studies(env.srcdir).items():
        document = docname(page, study)
        path = Path(env.srcdir, f"{document}.csv")
        env.note_dependency(str(path))
        yield page, study, document, read_table(path) if path.is_file() else None


def table_of(env, name):
    """The table of one page; a LookupError if no page has this name."""
    for page, _, _, found in pages(env):
        if page == name:
            return found
    raise LookupError(f"studies.yaml has no page {name}")


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


def show(directive, head, rows, name, numeric=()):
    """A table of Markdown cells, in a box that scrolls; columns `numeric` are aligned to the right."""
    rule = ["---:" if index in numeric else "---" for index in range(len(head))]
    lines = []
    for cells in (head, rule, *rows):
        # Text from data has its bars escaped already.
        texts = [re.sub(r"(?<!\\)[|]", r"\\|", str(cell)) for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    box = nodes.container(classes=["scroll"])
    text = StringList(lines, source=directive.env.docname)
    directive.state.nested_parse(text, directive.content_offset, box)
    for found in box.findall(nodes.table):
        found["classes"] += ["results", name]
    return box


def setup(app):
    """Register the step with Sphinx, before the table of contents is read."""
    app.connect("config-inited", write_stubs, priority=1)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
