"""What the book makes of tables of results, manifests and docstrings, and what a build schedules."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import pandas as pd
import pytest
from matplotlib import font_manager

pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import reference  # noqa: E402
import registry  # noqa: E402
import results  # noqa: E402
import runs  # noqa: E402

from lib import figures  # noqa: E402
from mnemodyn import settings  # noqa: E402
from mnemodyn.files import read_yaml  # noqa: E402
from mnemodyn.results import COLUMNS, write_results  # noqa: E402
from mnemodyn.run import check_parameters, read_parameters  # noqa: E402

STUDIES = """\
a: {notebook: n, title: The page A, data: D, kind: real}
b: {notebook: n, title: The page B, data: D, kind: real, profile: long, needs: scans}
"""
ROW = {"data": "D", "task": "diagnosis", "score": "balanced_accuracy", "kind": "real", "n": 1234}
ROWS = [
    {**ROW, "method": "model", "value": 0.65, "low": 0.6, "high": 0.7},
    {**ROW, "method": "fc", "value": 0.66, "low": 0.61, "high": 0.71},
    {**ROW, "method": "model", "against": "fc", "value": -0.01, "low": -0.02, "high": -0.005}
    | {"p": 0.0123},
    {**ROW, "method": "fc", "data": "E", "value": 0.7},
    {**ROW, "method": "fc", "data": "S", "value": 0.9, "kind": "SIMULATED"},
    {**ROW, "method": "model", "data": "F", "task": "entries", "value": 0.3},
    {**ROW, "method": "model", "data": "F", "task": "entries", "against": "front_end"}
    | {"value": 0.0, "low": -0.0, "high": 1e-16},
    {**ROW, "method": "m|*x*", "data": "<img/src=x onerror=alert(1)>\n|", "value": 0.5},
]


def write_notebook(path, *cells):
    tagged = nbformat.v4.new_code_cell("rate = 0.1\nname = 'x'", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Shared title\n\nWhy."), tagged, *cells],
        metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def code(source, output="", tags=(), **metadata):
    outputs = [nbformat.v4.new_output("stream", text=output)] if output else []
    metadata |= {"tags": list(tags)} if tags else {}
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata=metadata)


@pytest.fixture
def book(tmp_path):
    """A book of one executed page, and of one that this copy lacks."""
    (tmp_path / "studies.yaml").write_text(STUDIES)
    write_notebook(tmp_path / "n.ipynb")
    cells = [
        code("silent = 1"),
        code("long", "a long table", fold="A <table>"),
        code("said", "it is better", tags=["finding"]),
        code("end", "versions and seeds"),
    ]
    write_notebook(tmp_path / "book/runs/a.ipynb", *cells)
    write_results(tmp_path / "book/runs/a.csv", ROWS)
    run = {"notebook": "n.ipynb", "output": "book/runs/a.ipynb", "status": "done", "commit": None}
    run |= {"parameters": {"rate": 0.25, "name": "it's"}, "started": "2026-01-01T00:00:00+00:00"}
    run |= {
        "seconds": 12.3,
        "processor_seconds": 9.9,
        "peak_memory_mb": 45,
        "cpus": 2,
        "dirty": None,
        "python": "3.11",
    }
    manifest = tmp_path / "book/runs/a.manifest.json"
    manifest.write_text(json.dumps({**run, "versions": {"numpy": "2.0", "onnx": None}}))
    return tmp_path


@pytest.fixture
def env(book):
    return SimpleNamespace(srcdir=str(book), docname="book/x", note_dependency=lambda path: None)


def say(env, text):
    page, key, field, data, form = results.parse(text)
    return results.said(results.find(env, page, key, data), field, form)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:diagnosis:model:balanced_accuracy", "0.650"),
        ("a:diagnosis:model:balanced_accuracy:.1%", "65.0~%"),
        ("a:diagnosis:model:balanced_accuracy:n", "1,234"),
        ("a:diagnosis:model:balanced_accuracy:interval", "0.600 to 0.700"),
        ("a:diagnosis:model:balanced_accuracy:low:.1f", "0.6"),
        ("a:diagnosis:model:balanced_accuracy:against=fc", "m0.010"),
        ("a:diagnosis:model:balanced_accuracy:against=fc:interval", "m0.020 to m0.005"),
        ("a:diagnosis:model:balanced_accuracy:against=fc:p", "0.012"),
        ("a:diagnosis:fc:balanced_accuracy:data=E", "0.700"),
        ("a:entries:model:balanced_accuracy:against=front_end", "0"),
        ("a:entries:model:balanced_accuracy:against=front_end:interval", "0 to 0"),
        ("a:diagnosis:fc:balanced_accuracy:data=E:interval", "no interval"),
    ],
)
def test_a_role_says_a_field_of_a_row(env, text, expected):
    found = say(env, text).replace("\N{MINUS SIGN}", "m").replace("\N{NO-BREAK SPACE}", "~")
    assert found == expected


def test_a_row_that_is_missing_or_not_unique_is_an_error(env):
    with pytest.raises(LookupError, match=r"no row diagnosis:modle.*nearest.*diagnosis:model"):
        say(env, "a:diagnosis:modle:balanced_accuracy")
    with pytest.raises(LookupError, match=r"several rows .*; say data= of \['D', 'E', 'S'\]"):
        say(env, "a:diagnosis:fc:balanced_accuracy")
    with pytest.raises(LookupError, match="no page absent"):
        results.find(env, "absent", "x", None)
    assert results.find(env, "b", "x", None) is None, "the page is registered, and not in this copy"


def test_no_zero_is_negative():
    assert registry.write(-0.0001, "+.3f") == "+0.000".replace("+", "")
    assert registry.write(0.0, ".1f") == "0.0"
    assert registry.write(-0.1, ".1f") == "\N{MINUS SIGN}0.1"


def build(book, **pages):
    """Build a book with the project's extensions; the warnings, and the text of its pages."""
    extensions = ["myst_nb", "registry", "results", "runs"]
    path = str(ROOT / "book" / "_ext")
    lines = [f"import sys; sys.path.insert(0, {path!r})", f"extensions = {extensions}"]
    lines += ["nb_execution_mode = 'off'", "exclude_patterns = ['n.ipynb', 'out']"]
    (book / "conf.py").write_text("\n".join(lines))
    (book / "book/data").mkdir()
    shutil.copy(ROOT / "book/data/published.csv", book / "book/data")
    toctree = "```{toctree}\nbook/runs/a\nbook/committed/b\n" + "\n".join(pages) + "\n```\n"
    (book / "index.md").write_text(f"# Index\n\n{toctree}")
    for name, text in pages.items():
        (book / f"{name}.md").write_text(f"# Title\n\n{text}\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-b", "html", ".", "out"]
    done = subprocess.run(command, cwd=book, capture_output=True, text=True, check=False)
    pages = {}
    for page in (book / "out").rglob("*.html"):
        text = re.sub(r"<[^>]+>", "", page.read_text().partition("<body")[2])
        pages[page.stem] = " ".join(html.unescape(text).split())
    return done.stderr, pages


def test_a_book_is_built_of_pages_that_are_here_and_says_which_are_not(book):
    good = "{result}`a:diagnosis:model:balanced_accuracy:.2f` is **{verdict}`a:diagnosis:model:"
    good += "balanced_accuracy:against=fc`**, {result}`b:x:y:z`"
    names = "{method}`a:entries:model:balanced_accuracy` and {method}`a:diagnosis:fc:balanced_accuracy:data=S`"
    tables = "```{all-results}\n```\n\n```{status}\n```\n\n```{provenance}\n```"
    scores = "```{scores} a b\nmodel The network\nfc FC\n```"
    warnings, pages = build(
        book, status="```{status}\n```", good=good, tables=tables, names=names, scores=scores,
        bad="{result}`a:diagnosis:modle:balanced_accuracy`",
    )  # fmt: skip
    assert "bad.md" in warnings
    assert "a has no row diagnosis:modle:balanced_accuracy; nearest" in warnings
    others = [line for line in warnings.split("\n") if "WARNING" in line and "bad.md" not in line]
    assert not others

    assert "0.65 is worse, (not in this copy)" in pages["good"]

    assert "not part of this copy" in pages["b"]
    assert "make book PROFILE=long DATA=FOLDER" in pages["status"]
    page = pages["a"]
    assert "The page A" in page
    assert page.index("it is better") < page.index("Why.") < page.index("A <table>")
    assert "mnemodyn run n.ipynb book/runs/a.ipynb -p rate 0.25" in page
    assert "silent" not in page

    assert "MnemoDyn \N{MINUS SIGN} functional connectivity (FC)" in pages["tables"]
    closed_form = "front end alone (the step kept is 0)"
    assert f"{closed_form} and functional connectivity (FC)" in pages["names"]
    # Training kept step 0: what fills entries is not listed as the network, and the page says so first.
    assert f"F entries {closed_form} balanced_accuracy 0.300" in pages["tables"]
    assert f"{closed_form} \N{MINUS SIGN} front end alone balanced_accuracy" in pages["tables"]
    assert page.index("The step kept is 0") < page.index("Why.")
    assert "published" in pages["tables"]
    # Text from data is text on the page.
    assert (
        "<img/src=x onerror=alert(1)> | diagnosis m|*x* balanced_accuracy 0.500" in pages["tables"]
    )
    assert "D, E, S, F, <img/src=x onerror=alert(1)> |" in pages["status"]
    assert "S: SIMULATED; D, E, F, <img/src=x onerror=alert(1)> |: real" in pages["status"]
    assert "SIMULATED S, diagnosisn 1234" in pages["scores"]
    assert "SIMULATED D" not in pages["scores"]
    kinds = re.findall('abbr class="(result.*?)"', (book / "out/names.html").read_text())
    assert kinds == ["result real", "result SIMULATED"]
    assert "versions and seeds" in pages["tables"]
    assert "0.600 to 0.700" in pages["scores"]


def test_a_table_on_a_page_shows_text_from_data_as_text():
    nasty = "<img/src=x/onerror=alert(1)>"
    shown = figures.table(pd.DataFrame({f"a{nasty}": [f"{nasty}\n&|"], "n": [-1.5]})).data
    assert "<img" not in shown
    assert shown.count("&lt;img/src=x/onerror=alert(1)&gt;") == 2
    assert "\N{MINUS SIGN}1.500" in shown


def test_a_table_of_results_marks_simulated_rows_in_the_first_column():
    rows = pd.DataFrame([ROW | {"method": "fc", "value": 0.5}]).reindex(columns=list(COLUMNS))
    rows["against"] = ""
    made_up = rows.assign(kind="SIMULATED")
    assert "SIMULATED" not in figures.result_table(rows).data
    assert ">SIMULATED D</td>" in figures.result_table(made_up).data
    both = figures.result_table(pd.concat([rows, made_up], ignore_index=True)).data
    assert both.count("SIMULATED") == 1


def test_the_front_page_begins_with_the_network_and_names_what_was_kept():
    lines = (ROOT / "book/index.md").read_text().split("\n")
    rows = [line for line in lines if line.startswith("| [")]
    keys = [re.findall(r"{verdict}`([^`]*)`", row)[0].split(":") for row in rows]
    methods = [method for _, _, method, *_ in keys]
    trained = ("network", "network with the operator's latents", "blocks_alone", "model")
    ours = [method in trained for method in methods]
    assert ours[0]
    assert ours == sorted(ours, reverse=True), "the closed form comes after the network"
    for row, (page, task, method, *_) in zip(rows, keys, strict=True):
        if page.startswith("reconstruction") and method == "model":
            assert f"{{method}}`{page}:{task}:model:r2`" in row


README_ROWS = {
    "trained for short scans": (
        "duration_hcp80:the other day from 60 frames:{}:r2_tangent",
        "network",
        "network before training",
    ),
    "The same network": (
        "duration_hcp80:the other day from 60 frames:{}:r2_edges",
        "network",
        "network before training",
    ),
    "blocks alone": (
        "reconstruction_hcp80:hidden entries:{}:r2",
        "blocks_alone",
        "spatiotemporal_gaussian",
    ),
    "Blocks trained": ("reconstruction_abide:hidden entries:{}:r2", "model", "front_end"),
    "read-out": ("downstream_abide:diagnosis:{}:balanced_accuracy", "model", "fc"),
    "The closed form": (
        "reconstruction_abide:hidden entries:{}:r2",
        "front_end",
        "spatiotemporal_gaussian",
    ),
}


@pytest.mark.parametrize("begins", README_ROWS)
def test_the_readme_has_the_numbers_of_the_committed_results(begins):
    env = SimpleNamespace(srcdir=str(ROOT), note_dependency=lambda path: None)
    key, method, against = README_ROWS[begins]
    lines = (ROOT / "README.md").read_text().split("\n")
    (line,) = [line for line in lines if line.startswith("|") and begins in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    row, other = key.format(method), key.format(against)
    difference = f"{row}:against={against}"
    assert f", {say(env, row + ':n')} people" in cells[0]
    assert cells[1] == say(env, row)
    assert cells[2].endswith(f", {say(env, other)}")
    assert cells[3] == f"{say(env, difference)} ({say(env, difference + ':interval')})"
    page, name, _, data, _ = results.parse(difference)
    found = results.find(env, page, name, data)
    assert cells[4] == results.verdict(found.low, found.high)


def test_a_stub_goes_when_its_page_has_been_made(book):
    stub = book / "book/runs/a.md"
    stub.write_text("# old")
    registry.write_stubs(SimpleNamespace(srcdir=book), None)
    assert not stub.exists()
    assert "make book PROFILE=long" in (book / "book/committed/b.md").read_text()


def test_the_command_of_a_run_gives_back_its_parameters(book):
    run = runs.manifest(book, "book/runs/a")
    words = runs.shlex.split(runs.rerun(book, run).astext())
    assert words[:4] == ["mnemodyn", "run", "n.ipynb", "book/runs/a.ipynb"]
    typed = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
    defaults = read_parameters(book / "n.ipynb")
    assert check_parameters(defaults, typed) == run["parameters"]


CLASSES = [settings.ModelSettings, settings.TrainingConfig, settings.Machine, settings.DataConfig]


@pytest.mark.parametrize("cls", [*CLASSES, *settings.OBJECTIVE_SETTINGS.values()])
def test_every_setting_is_documented(cls):
    said = reference.meanings(cls)
    assert all(said[field.name] for field in fields(cls))


def test_the_registry_is_sound():
    known = {"notebook", "title", "data", "kind", "needs", "checkpoint", "when", "profile"}
    studies = registry.read_studies(ROOT)
    listed = (ROOT / "_toc.yml").read_text()
    for page, study in studies.items():
        assert set(study) <= known | {"parameters"}, page
        assert {"notebook", "title", "data", "kind"} <= set(study), page
        assert (ROOT / "notebooks" / f"{study['notebook']}.ipynb").is_file(), page
        assert f"file: {registry.docname(page, study)}\n" in listed, page
        assert study.get("checkpoint", page) in studies
        assert (ROOT / "profiles" / f"{study.get('profile', 'quick')}.yaml").is_file()
    assert listed.count("book/runs/") + listed.count("book/committed/") == len(studies)


def scheduled_pages(folder, *words):
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", "--nolock", "--forceall"]
    done = subprocess.run(
        [*command, "--config", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    return [line.split("page ")[1].split(" ")[0] for line in lines if ", the page " in line]


@pytest.mark.parametrize(
    ("words", "here", "absent"),
    [
        (
            ["profile=quick"],
            ["data", "cohorts"],
            ["downstream_mine", "reconstruction_abide", "pretrain_abide", "ablations_hcp7"],
        ),
        (["profile=ci", "data=F", "cohort=hbn"], ["data", "downstream_mine"], ["cohorts"]),
        (["profile=paper", "data=F"], ["pretrain"], ["cohorts", "downstream_mine"]),
        (["profile=abide", "data=F"], ["reconstruction_abide", "downstream_abide"], ["data"]),
        (["profile=hcp7"], ["reconstruction_hcp7"], ["reconstruction_abide", "data"]),
    ],
)
def test_a_build_schedules_its_pages_with_parameters_that_their_notebooks_have(words, here, absent):
    pytest.importorskip("snakemake")
    scheduled = scheduled_pages(ROOT, *words)
    assert set(here) <= set(scheduled)
    assert not set(absent) & set(scheduled)


BESIDE = ("_config.yml", "_toc.yml", "CHANGELOG.md")


def test_a_profile_that_names_a_cohort_gives_it_a_page_in_place_of_the_simulated_ones(tmp_path):
    pytest.importorskip("snakemake")
    for part in (
        "Snakefile",
        "studies.yaml",
        "notebooks",
        "mnemodyn",
        "benchmarks",
        "book",
        *BESIDE,
    ):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "profiles").mkdir()
    pages = "pages: {downstream_mine: {targets: [sex]}}\n"
    (tmp_path / "profiles/mine.yaml").write_text(f"data: scans\ncohort: hbn\n{pages}")
    scheduled = scheduled_pages(tmp_path, "profile=mine")
    assert {"downstream_mine", "pretrain", "reconstruction"} <= set(scheduled)
    assert "cohorts" not in scheduled


def test_profiles_of_long_studies_name_their_own_pages_only():
    studies = registry.read_studies(ROOT)
    for name in {study["profile"] for study in studies.values() if "profile" in study}:
        pages = read_yaml((ROOT / "profiles" / f"{name}.yaml").read_text()).get("pages", {})
        assert {studies[page].get("profile") for page in pages} <= {name}


def test_figures_have_one_font_on_every_machine(monkeypatch, tmp_path):
    """A machine's own DejaVu Sans has other outlines, and the one listed first is taken."""
    own = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    fonts = font_manager.fontManager
    monkeypatch.setattr(fonts, "ttflist", [])
    fonts.addfont(shutil.copy(own, tmp_path))
    with matplotlib.rc_context():
        figures.use_style()
        assert own.samefile(str(font_manager.findfont("DejaVu Sans")))


STUB = """
set -e
test ! -e wait || { touch waits; sleep 60; }
mkdir -p _build/new/_build/html
cp CHANGELOG.md _build/new/_build/html/index.html
"""


def start_build(folder):
    words = ["--cores", "1", "--nolock", "--keep-incomplete", "--rerun-incomplete"]
    command = [sys.executable, "-m", "snakemake", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_a_killed_build_goes_on_and_the_old_book_stands_until_then(tmp_path):
    """With a shell script in place of Jupyter Book, and a page that is there already."""
    pytest.importorskip("snakemake")
    for name in ("notebooks/lib", "book/runs", "profiles"):
        (tmp_path / name).mkdir(parents=True)
    snakefile = (ROOT / "Snakefile").read_text()
    assert snakefile.count("jupyter-book build . ") == 1
    (tmp_path / "Snakefile").write_text(
        re.sub("jupyter-book build [^\\n]*", "bash stub", snakefile)
    )
    for name in ("_config.yml", "_toc.yml", "profiles/quick.yaml"):
        (tmp_path / name).write_text("data: hcp7\n")
    (tmp_path / "studies.yaml").write_text("{}\n")
    (tmp_path / "stub").write_text(STUB)
    page = tmp_path / "_build/html/index.html"
    (tmp_path / "CHANGELOG.md").write_text("old")
    first = start_build(tmp_path)
    assert "Error" not in first.communicate(timeout=120)[0]
    assert page.read_text() == "old"
    (tmp_path / "CHANGELOG.md").write_text("new")
    (tmp_path / "wait").touch()
    killed = start_build(tmp_path)
    while not (tmp_path / "waits").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    second = start_build(tmp_path)
    assert "one build at a time" in second.communicate(timeout=120)[0]
    assert second.returncode != 0
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert page.read_text() == "old"
    (tmp_path / "wait").unlink()
    again = start_build(tmp_path)
    assert "Error" not in again.communicate(timeout=120)[0]
    assert again.returncode == 0
    assert page.read_text() == "new"
