"""Payload: files that try to run something, to reach outside their folder, or to speak as markup or formula."""

import contextlib
import csv
import io
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import nbformat
import numpy as np
import pandas as pd
import torch
from markdown_it import MarkdownIt

from mnemodyn.checkpoint import Checkpoint, save_checkpoint
from mnemodyn.cli import main
from mnemodyn.data.cohorts import index
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import load_scan, save_scan
from mnemodyn.data.simulate import simulate_cohort
from mnemodyn.data.store import Store, convert
from mnemodyn.files import Kept, write_text
from mnemodyn.hub import write_folder
from mnemodyn.pretrain.training import pretrain, pretrain_rival
from mnemodyn.results import read_results, write_results
from mnemodyn.run import read_parameters, run_notebook
from tests.campaigns.common import (
    PARCELS,
    Campaign,
    Trial,
    content,
    place,
    scan_of,
    small_network,
    unfinished,
)
from tests.campaigns.fuzz import COHORT, NAMED, SETTINGS, cohort_files, write
from tests.campaigns.mutate import pick

ROOT = Path(__file__).parents[2]
# What notebooks and the book import.
sys.path += [str(ROOT / "notebooks"), str(ROOT / "book" / "_ext")]

MARK = (
    "executed"  # the file that a payload makes in the trial's folder, which is the working folder
)
COMMAND = f"touch {MARK}"
SYSTEM = f"__import__('os').system('{COMMAND}')"
MARKUP = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    '"><svg/onload=alert(1)>',
    "</td></table><script>alert(1)</script>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "![x](x){onerror=alert(1)}",
    "x\n\n<script>alert(1)</script>\n",
    "x | <iframe src=javascript:alert(1)> | y",
    "```\n<script>alert(1)</script>",
    "`<b>`</code><script>alert(1)</script>",
    "&lt;script&gt; <script>alert(1)</script>",
    "x\\<script>alert(1)</script>",
    "x\\\\<script>alert(1)</script>",
)
FORMULAS = (
    "=1+1",
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://x","y")',
    "+1+1",
    "-1+cmd|' /C calc'!A0",
    "@SUM(A1:A9)",
    " =1+1",
    "=1+1\n=2+2",
)
SHELL = (
    f"$({COMMAND})",
    f"`{COMMAND}`",
    f"; {COMMAND};",
    f"| {COMMAND}",
    f"&& {COMMAND} &&",
    f"\n{COMMAND}\n",
    f"'; {COMMAND}; '",
    f'"; {COMMAND}; "',
    f'{{__import__("os").system("{COMMAND}")}}',
    f"%{{{COMMAND}}}",
    "-rf",
    "*?[x]",
    "a b\tc",
)
TAGS = (
    f"!!python/object/apply:os.system ['{COMMAND}']",
    f"!!python/object/new:os.system ['{COMMAND}']",
    "!!python/name:os.system",
    "!!python/module:os",
    f"!!python/object/apply:subprocess.check_output [['touch', '{MARK}']]",
    f"!<tag:yaml.org,2002:python/object/apply:os.system> ['{COMMAND}']",
)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (COMMAND,)


# Name, function, and what the function is given besides the folder and the draws.
CASES: list[tuple[str, Callable, tuple]] = []


def cases(*variants: object) -> Callable:
    """Add a function as a case, or as one for each variant, which it is given.

    It is also given the trial's folder, which is the working folder, and a generator of random numbers, and yields
    what is wrong.
    """

    def add(function: Callable) -> Callable:
        name = function.__name__.replace("_", " ")
        for variant in variants or [None]:
            details = () if variant is None else (variant,)
            CASES.append((name, function, details))
        return function

    return add


class Payload(Campaign):
    name = "payload"
    what = "payloads"
    count = 400
    seconds = 120.0

    def trial(self, number: int, folder: Path) -> Trial:
        rng = np.random.default_rng([13, number])
        name, function, details = CASES[number % len(CASES)]
        os.chdir(folder)
        found = list(function(folder, rng, *details))
        if (folder / MARK).exists():
            found.append("it was executed")
        problems = [f"{name}: {problem} | {details}" for problem in dict.fromkeys(found)]
        return Trial("tried", problems)


def tolerant(work: Callable, *args, **kwargs) -> Iterator[str]:
    """Do work that may refuse what it is given, and yield what is wrong with the way it does."""
    try:
        work(*args, **kwargs)
    except (*NAMED, OSError):
        pass
    except Exception as error:
        if type(error) is not ValueError:
            yield f"no named problem, {place(error)}"


def command(*arguments: object) -> Iterator[str]:
    """Run a command that may fail by a message, and yield what is wrong with the way it ends."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        except Exception as error:
            yield f"mnemodyn {arguments[0]} ends in a traceback, {place(error)}"
            return
    if status not in (0, 1, 2):
        yield f"mnemodyn {arguments[0]} ends with {status}"


def untrained(folder: Path) -> Path:
    """The folder of a checkpoint."""
    return save_checkpoint(folder / "net", Checkpoint(small_network(), PARCELS, 2.0, Scaling()))


# What would run something


def pickled(kind: int) -> bytes:
    """A file of Python (0) or of PyTorch (1 to 4) that runs something when it is loaded."""
    stream = io.BytesIO()
    if kind == 0:
        return pickle.dumps(Evil())
    if kind == 1:
        torch.save(Evil(), stream)
    elif kind == 2:
        torch.save({"state_dict": {"x": Evil()}, "hyper_parameters": {}}, stream)
    elif kind == 3:
        torch.save({"state_dict": {}, "x": Evil()}, stream, _use_new_zipfile_serialization=False)
    else:
        torch.save({"record": Evil(), "callbacks": Evil()}, stream)
        return without_version(stream)
    return stream.getvalue()


def without_version(stream: io.BytesIO) -> bytes:
    """The same file of PyTorch, which no longer says by which format."""
    made = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            if not name.endswith("version"):
                new.writestr(name, old.read(name))
    return made.getvalue()


def array_file(rng: np.random.Generator, ending: str) -> bytes:
    """A file of arrays that runs something when its objects are made."""
    objects = np.full((24, 3), Evil(), object)
    stream = io.BytesIO()
    if rng.random() < 0.3:
        return pickled(0)
    if ending == ".npy":
        np.save(stream, objects, allow_pickle=True)
    elif rng.random() < 0.5:
        np.savez(stream, bold=np.ones((24, 3)), other=objects)
    else:
        with zipfile.ZipFile(stream, "w") as new:
            new.writestr("bold.npy", pickled(0))
    return stream.getvalue()


@cases(".npy", ".npz", ".mat", ".tsv", ".1D", ".ptseries.nii")
def objects_in_a_scan(folder, rng, ending):
    path = folder / f"sub-01{ending}"
    path.write_bytes(array_file(rng, ending))
    yield from tolerant(load_scan, path, t_r=2.0, frames_first=True)
    yield from command("index", "bids", folder)


@cases(0, 1, 2, 3, 4)
def draft_checkpoint(folder, rng, kind):
    (folder / "epoch=1-val_mae=0.1.ckpt").write_bytes(pickled(kind))
    scan = save_scan(scan_of(rng, "sub-1"), folder / "sub-1_timeseries.tsv")
    yield from command("embed", scan, "-o", "out.csv", "-c", folder, "--compat", "reference")
    yield from command("publish", folder, "--repo-id", "a/b", "--dry-run")


@cases(0, 1, 3)
def weights_that_are_a_pickle(folder, rng, kind):
    network = untrained(folder)
    (network / "model.safetensors").write_bytes(pickled(kind))
    scan = save_scan(scan_of(rng, "sub-1"), folder / "sub-1_timeseries.tsv")
    yield from command("embed", scan, "-o", "out.csv", "-c", network)


@cases(0, 1, 3, 4)
def unfinished_training(folder, rng, kind):
    scans = [scan_of(rng, f"sub-{i}") for i in range(3)]
    asked = (scans[:2], scans[2:], folder / "run", SETTINGS)
    unfinished(*asked)
    for path in (folder / "run").rglob("run.json"):
        path.with_name("last.ckpt").write_bytes(pickled(kind))
    yield from tolerant(pretrain, *asked)


@cases(0, 1)
def weights_of_a_rival(folder, rng, kind):
    scans = [scan_of(rng, f"sub-{i}") for i in range(3)]
    asked = (small_network, scans[:2], scans[2:], folder / "run", SETTINGS)
    yield from tolerant(pretrain_rival, *asked)
    for path in (folder / "run").rglob("*.pt"):
        path.write_bytes(pickled(kind))
    yield from tolerant(pretrain_rival, *asked)


@cases()
def kept_result(folder, rng):
    made = {"values": np.arange(4.0)}
    Kept(folder / "kept")("fold", ["seed"], lambda: made)
    for path in (folder / "kept").rglob("*.npz"):
        with np.load(path) as arrays:
            names = arrays.files
        stream = io.BytesIO()
        np.savez(stream, **{name: np.full(3, Evil(), object) for name in names})
        path.write_bytes(pick(rng, (stream.getvalue(), pickled(0))))
    found = Kept(folder / "kept")("fold", ["seed"], lambda: made)
    if list(found["values"]) != [0, 1, 2, 3]:
        yield "another result is found"


@cases(*TAGS)
def tag_in_yaml(folder, rng, tag):
    write(folder, cohort_files())
    lines = COHORT.decode().splitlines()
    i = int(rng.integers(len(lines)))
    lines[i] = f"{lines[i].partition(':')[0]}: {tag}"
    (folder / "cohort.yaml").write_text("\n".join(lines))
    yield from command("index", "cohort.yaml", folder)
    (folder / "settings.yaml").write_text(f"training: {tag}\nscaling: {tag}\n")
    yield from command("pretrain", "nowhere", "out", "--settings", "settings.yaml")
    yield from command("pretrain", "nowhere", "out", "-s", "training.epochs", tag)
    (folder / "hparams.yaml").write_text(f"x: {tag}\n")
    torch.save({"state_dict": {"x": torch.zeros(1)}}, folder / "draft.ckpt")
    scan = save_scan(scan_of(rng, "sub-1"), folder / "sub-1_timeseries.tsv")
    yield from command("embed", scan, "-o", "x.csv", "-c", "draft.ckpt", "--compat", "reference")


def notebook(folder: Path, parameters: str, *sources: str) -> Path:
    """A notebook with its parameters' cell and others."""
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebook.ipynb")
    return folder / "notebook.ipynb"


@cases("a = {}", "a = [{}]", "{}\na = 1", "a = f'{{{}}}'")
def cell_of_parameters(folder, rng, form):
    yield from tolerant(read_parameters, notebook(folder, form.format(SYSTEM)))


@cases()
def parameters_of_a_run(folder, rng):
    path = notebook(folder, "a = 'x'\nb = None\nc = ['x']", "print(repr((a, b, c)))")
    text = pick(rng, (f"'\n{SYSTEM}\n'", f'"""+{SYSTEM}+"""', f"\\'+{SYSTEM}#", f"'+{SYSTEM}+'"))
    given = {"a": text, "b": text, "c": [text]}
    yield from tolerant(run_notebook, path, folder / "out.ipynb", given)
    done = nbformat.read(folder / "out.ipynb", as_version=4)
    printed = done.cells[-1].outputs[0]["text"].strip()
    if printed != repr((text, text, [text])):
        yield "a parameter is not what was given"


@cases()
def notebook_with_a_name_for_a_shell(folder, rng):
    name = pick(rng, SHELL).replace("\n", "")
    path = notebook(folder, "a = 1", "print(a)").rename(folder / f"{name}.ipynb")
    yield from tolerant(run_notebook, path, folder / f"{name} out.ipynb")
    if not (folder / f"{name} out.ipynb").is_file():
        yield "it is not run"


@cases(*SHELL)
def scan_with_a_name_for_a_shell(folder, rng, shell):
    network = untrained(folder)
    scans = folder / f"scans {shell}"
    scans.mkdir()
    save_scan(scan_of(rng, "sub-01"), scans / f"sub-01_task-rest_{shell}_timeseries.tsv")
    yield from command("embed", scans, "-o", f"out {shell}.csv", "-c", network)
    if not (folder / f"out {shell}.csv").is_file():
        yield "it is not embedded"
    yield from command("convert", "bids", scans, f"store {shell}")
    if not (folder / f"store {shell}" / "store.json").is_file():
        yield "it is not converted"


# What would reach outside


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[list[str]]:
    """A folder ``victim`` that must stay as it is; what became of it is added to the list at the end."""
    victim = folder / "victim"
    (victim / "below").mkdir(parents=True)
    (victim / "precious.txt").write_text("precious\n" * 10)
    (victim / "below" / "data.csv").write_text("a,b\n1,2\n")
    before = content(victim)
    problems: list[str] = []
    yield problems
    after = content(victim)
    if not before.items() <= after.items():
        problems.append("a file outside is changed or removed")
    elif before != after:
        problems.append("a file outside is made")


@cases("absolute", "relative")
def store_that_names_files_outside(folder, rng, how):
    scans = [scan_of(rng, f"sub-{i}") for i in range(2)]
    convert(scans, folder / "secret")
    convert([scan_of(rng, f"sub-{i}") for i in range(5, 7)], folder / "store")
    there = next((folder / "secret").rglob("*.bin")).with_suffix("")
    name = str(there)
    if how == "relative":
        name = os.path.relpath(there, folder / "store" / "scans")
    record = folder / "store" / "store.json"
    listed = json.loads(record.read_text())
    for row in listed["scans"]:
        row["file"] = name
    record.write_text(json.dumps(listed))
    found: list[np.ndarray] = []
    yield from tolerant(lambda: found.append(Store(folder / "store")[0].values))
    for values in found:
        if any(np.abs(values - scan.values).max() < 0.1 for scan in scans):
            yield "a scan outside the store is read"


@cases()
def links_where_a_store_is_written(folder, rng):
    scans = [scan_of(rng, f"sub-{i}") for i in range(2)]
    convert(scans, folder / "model")
    with untouched(folder) as problems:
        (folder / "store" / "scans").mkdir(parents=True)
        for path in content(folder / "model"):
            (folder / "store" / path).symlink_to(folder / "victim" / "precious.txt")
        yield from tolerant(convert, scans, folder / "store")
    yield from problems


@cases(".table.csv.part", ".table.csv.{}.tmp", ".table.csv.lock", "table_refused.tsv", "table.csv")
def link_where_a_table_is_written(folder, rng, name):
    network = untrained(folder)
    scan = save_scan(scan_of(rng, "sub-01"), folder / "scans" / "sub-01_timeseries.tsv")
    for target in ("precious.txt", "below"):
        with untouched(folder) as problems:
            link = folder / name.format(os.getpid())
            link.symlink_to(folder / "victim" / target)
            # A table that is a link may be replaced, or written where the link leads.
            if name == "table.csv" and target == "precious.txt":
                link.unlink()
            yield from command("embed", scan, "-o", "table.csv", "-c", network)
        yield from problems
        shutil.rmtree(folder / "victim")
        link.unlink(missing_ok=True)


@cases("unfinished", "best", "run.json", "history.csv")
def link_where_a_network_is_written(folder, rng, name):
    scans = [scan_of(rng, f"sub-{i}") for i in range(3)]
    with untouched(folder) as problems:
        (folder / "run").mkdir()
        target = "precious.txt" if "." in name else "below"
        (folder / "run" / name).symlink_to(folder / "victim" / target)
        yield from tolerant(pretrain, scans[:2], scans[2:], folder / "run", SETTINGS)
    yield from problems


@cases("", ".tmp", ".part")
def link_where_a_file_is_made(folder, rng, ending):
    with untouched(folder) as problems:
        link = folder / f".out.txt.{os.getpid()}{ending}"
        link.symlink_to(folder / "victim" / "precious.txt")
        write_text(folder / "out.txt", "new")
    yield from problems


LAYOUT = """\
name: small
scans: ["**/sub-{participant}_*.tsv"]
phenotype: {file: people.tsv, match: {id: "{participant}"}}
sex: {column: sex, mapping: {1: male, 2: female}}
targets: [sex]
layout:
  path: "sub-{participant}_timeseries.tsv"
  participant: "{:03d}"
  t_r: 2.0
  n_frames: 120
  years: [20, 40]
  sites: [""]
"""


@cases(
    ("sub-{participant}_timeseries.tsv", "../../x/sub-{participant}_timeseries.tsv"),
    ("sub-{participant}_timeseries.tsv", "HERE/x/sub-{participant}_timeseries.tsv"),
    ("{:03d}", "../../../x{:03d}"),
    ('sites: [""]', 'sites: ["../../x"]'),
    ("people.tsv", "../../x.tsv"),
    ("people.tsv", "HERE/x.tsv"),
)
def simulated_cohort_outside(folder, rng, change):
    old, new = change
    described = LAYOUT.replace(old, new.replace("HERE", str(folder)))
    (folder / "cohort.yaml").write_text(described)
    before = set(content(folder))
    settings = {"n_participants": 2, "broken": False, "n_frames": 120}
    inside = folder / "inside" / "cohort"
    yield from tolerant(simulate_cohort, folder / "cohort.yaml", inside, **settings)
    made = set(content(folder)) - before
    if not all(name.startswith("inside/cohort/") for name in made):
        yield "a file outside is made"


@cases("../outside/", "**/../outside/", "HERE/outside/")
def pattern_that_leads_outside(folder, rng, start):
    write(folder / "inside", cohort_files())
    write(folder / "outside", cohort_files())
    start = start.replace("HERE", str(folder))
    described = COHORT.decode().replace("**/sub-", f"{start}sub-")
    (folder / "cohort.yaml").write_text(described)
    found: list[str] = []
    yield from tolerant(
        lambda: found.extend(index(folder / "cohort.yaml", folder / "inside").table["path"])
    )
    if any(path.startswith(("..", "/")) for path in found):
        yield "scans outside the folder are read"


@cases("{participant.__class__}", "{run.__class__.__mro__}", "{run!r:>9999999}")
def template_that_looks_into_python(folder, rng, form):
    described = COHORT.decode().replace('run: "{run}"', f'run: "{form}"')
    write(folder, {**cohort_files(), "cohort.yaml": described.encode()})
    found: list[str] = []
    yield from tolerant(lambda: found.extend(index(folder / "cohort.yaml", folder).table["run"]))
    if any("class" in run or len(run) > 1000 for run in found):
        yield "it is followed"


# What would speak as markup


def rendered(text: str) -> str:
    """The HTML that a reader of Markdown, such as the hub or the book, makes of a text."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def markup_in(page: str) -> Iterator[str]:
    """Whether an HTML page has something of MARKUP that a browser would obey."""
    obeyed = "<(script|img src=x|svg|iframe|a [^>]*javascript)"
    if re.search(obeyed, page, re.IGNORECASE):
        yield "text from data is obeyed as markup"


def results_with(text: str, folder: Path) -> Path:
    """A table of results with a text in its columns of words."""
    row = {"data": text, "task": text, "method": text, "score": text, "kind": "real", "value": 0.5}
    rows = [{**row, "low": 0.1, "high": 0.9}, {**row, "method": "model"}]
    write_results(folder / "results.csv", rows)
    return folder / "results.csv"


@cases(*MARKUP)
def markup_on_a_page(folder, rng, text):
    from lib import figures  # of the notebooks

    # As a cell, and as the name of a column.
    frame = pd.DataFrame({"name": [text, "x"], "number": [1.0, 2.0], text: [text, 3]})
    yield from markup_in(figures.table(frame).data)
    table = read_results(results_with(text, folder))
    yield from markup_in(figures.result_table(table).data)
    drawn = figures.show(b"<svg/>", caption=text, alt=text)._repr_html_()
    # The drawing itself is not part of what is written about it.
    yield from markup_in(re.sub(r'src="data:[^"]*"', "", drawn))


@cases(*MARKUP)
def markup_on_a_model_card(folder, rng, text):
    training = {"objective": {"name": text, text: 1}, "settings": {text: text, "a": {"b": text}}}
    network = Checkpoint(small_network(), (*PARCELS[:3], text), 2.0, Scaling(), text, training)
    save_checkpoint(folder / "net", network)
    made = write_folder(folder / "net", folder / "card", results=[results_with(text, folder)])
    card = (made / "README.md").read_text().split("\n---\n", 1)[1]
    yield from markup_in(rendered(card))
    # Two lines and seven rows of facts, and two lines and two rows of results.
    if sum(line.startswith("| ") for line in card.splitlines()) != 13:
        yield "text from data changes the rows of a table"
    parcels = pd.read_csv(made / "parcels.tsv", sep="\t")
    if len(parcels) != len(PARCELS):
        yield "a parcel's name changes the rows of parcels.tsv"


@cases(*MARKUP)
def markup_in_the_book(folder, rng, text):
    import results as book  # of the book's extensions

    table = read_results(results_with(text, folder))
    shown: list[list] = []
    with (
        patch.object(book, "pages", lambda _: [("x", {}, "x", table)]),
        patch.object(book, "show", lambda _, head, rows, *__, **___: shown.extend(rows)),
        patch.object(book.AllResults, "env", SimpleNamespace(srcdir=ROOT), create=True),
    ):
        book.AllResults.run(book.AllResults.__new__(book.AllResults))
    if not shown:
        yield "the page of all results is empty"
    for row in shown:
        for cell in row:
            yield from markup_in(rendered(str(cell)))


# What a spreadsheet would compute


def computed(path: Path) -> Iterator[str]:
    """Whether a table has cells that a spreadsheet would compute."""
    if not path.is_file():
        return
    with open(path, newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    for cell in (cell for row in rows for cell in row):
        if cell.lstrip().startswith(("=", "+", "-", "@")):
            try:
                float(cell)
            except ValueError:
                yield f"a cell of {path.name} is computed by a spreadsheet"


@cases(*FORMULAS)
def formula(folder, rng, text):
    yield from computed(results_with(text, folder))
    network = untrained(folder)
    name = text.replace("/", "").replace("\n", "")
    save_scan(scan_of(rng, "sub-01"), Path(f"{name}_sub-01_ses-{name}_timeseries.tsv"))
    Path(f"{name}_sub-02_timeseries.tsv").write_text("a\tb\n1\t2\n")
    found = [path.name for path in folder.glob("*_timeseries.tsv")]
    yield from command("embed", "-o", "table.csv", "-c", network, "--", *found)
    yield from computed(folder / "table.csv")
    yield from computed(folder / "table_refused.tsv")
    cell = '"' + text.replace('"', '""') + '"'
    people = cohort_files()["people.tsv"].replace(b"NYU", cell.encode())
    people = people.replace(b"f1", cell.encode())
    write(folder / "cohort", {**cohort_files(), "people.tsv": people, "cohort.yaml": COHORT})
    yield from command("index", "cohort/cohort.yaml", "cohort", "--table", "people.csv")
    yield from computed(folder / "people.csv")
