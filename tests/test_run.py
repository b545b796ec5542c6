"""Running a notebook: parameters, the executed notebook, its manifest, and every way to fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest

from mnemodyn import files
from mnemodyn.files import read_yaml
from mnemodyn.results import write_results
from mnemodyn.run import (
    NotebookFailed,
    ParameterError,
    check_parameters,
    first_results,
    read_parameters,
    run_notebook,
)

PARAMETERS = """\
objective = "masked"  # masked, denoise or off
epochs = 2
rate = 1e-3  # peak; with decay = 0 it stays
shuffle = True
widths = [8,
          16]  # over two lines
extra = {}
limit = None
results = "results.json"
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a notebook of a parameters cell and the given cells into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(*sources, parameters=PARAMETERS, name="notebook.ipynb"):
        cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells = [nbformat.v4.new_markdown_cell("# Question"), cell]
        cells += [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), name)
        return Path(name)

    return write


def text_of(path, kind="stream"):
    """Join the text of a notebook's outputs and check that it is a valid notebook."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(
        out.text if kind == "stream" else "\n".join(out.traceback)
        for out in outputs
        if out.output_type == kind
    )


def manifest_of(output):
    return json.loads(Path(output).with_suffix(".manifest.json").read_text())


@pytest.fixture
def known(write):
    return read_parameters(write())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("1e-3", 1e-3),
        ("[1, 2.5]", [1, 2.5]),
        ("12:30", "12:30"),
        ("-3", -3),
        ("null", None),
        ('{"a": [false]}', {"a": [False]}),
    ],
)
def test_yaml_scalars_mean_what_they_look_like(text, value):
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("objective", "off", "off"),
        ("objective", "3", "3"),
        ("epochs", "10", 10),
        ("rate", "1e-4", 1e-4),
        ("rate", 1, 1.0),
        ("shuffle", "false", False),
        ("widths", "[1, 2]", [1, 2]),
        ("widths", [], []),
        ("extra", "{a: 1}", {"a": 1}),
        ("limit", "5", 5),
        ("limit", "hcp: [", "hcp: ["),
        ("limit", None, None),
    ],
)
def test_values_take_the_type_of_the_default(name, given, expected, known):
    value = check_parameters(known, {name: given})[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("objective", False, "must be str"),
        ("epochs", 1.5, "must be int"),
        ("epochs", "many", "must be int as its default 2, got 'many'"),
        ("epochs", True, "must be int"),
        ("rate", "fast", "must be float"),
        ("shuffle", "off", "must be bool"),
        ("shuffle", 1, "must be bool"),
        ("widths", "8", "must be list"),
        ("extra", [1], "must be dict"),
        ("epochs", None, "must be int"),
    ],
)
def test_a_value_of_another_type_is_refused(name, given, expected, known):
    with pytest.raises(ParameterError, match=expected):
        check_parameters(known, {name: given})


def test_an_unknown_parameter_is_refused_with_the_nearest(write):
    with pytest.raises(ParameterError, match=r"unknown parameter epoch; did you mean epochs"):
        run_notebook(write("1"), "out.ipynb", {"epoch": 3})
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize(
    "source", ["a = b", "import os", "a = 1 + 1", "a =", "a = {[]: 1}", f"a = {'(' * 300}"]
)
def test_parameters_are_literals(source, write):
    with pytest.raises(ParameterError, match="literal values"):
        read_parameters(write(parameters=source))


@pytest.mark.parametrize(
    "cell",
    [
        '"text"',
        '{"metadata": []}',
        '{"metadata": {"tags": 1}}',
        '{"metadata": {"tags": ["parameters"]}}',
        '{"metadata": {"tags": ["parameters"]}, "source": [1]}',
        "[" * 20_000 + "]" * 20_000,
    ],
)
def test_a_damaged_notebook_is_named(tmp_path, cell):
    path = tmp_path / "notebook.ipynb"
    path.write_text(f'{{"cells": [{cell}]}}')
    with pytest.raises(ParameterError, match=r"notebook\.ipynb is not a notebook"):
        read_parameters(path)


def test_no_parameter_is_missed(known):
    # papermill.inspect_notebook misses `rate`, whose comment holds a "=".
    names = ["objective", "epochs", "rate", "shuffle", "widths", "extra", "limit", "results"]
    assert list(known) == names
    assert known["widths"] == [8, 16]


def test_what_is_no_notebook_with_parameters_is_refused(write):
    with pytest.raises(FileNotFoundError, match=r"absent\.ipynb"):
        run_notebook("absent.ipynb", "out.ipynb")
    Path("text.ipynb").write_text("hello")
    with pytest.raises(ParameterError, match="not a notebook"):
        run_notebook("text.ipynb", "out.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), "bare.ipynb")
    with pytest.raises(ParameterError, match=r"bare\.ipynb: exactly one cell .* found 0"):
        run_notebook("bare.ipynb", "out.ipynb")
    path = write("1")
    with pytest.raises(ParameterError, match="another file"):
        run_notebook(path, path)
    Path("runs").mkdir()
    with pytest.raises(ParameterError, match="another file"):
        run_notebook(path, "runs")
    assert not list(Path().glob("*.manifest.json")), "refused before it runs, not at the end of it"


def test_a_run_keeps_results_and_equal_runs_are_equal_bytes(write, monkeypatch):
    # A registered kernel of that name which cannot run, a matplotlib without windows, a past run.
    spec = Path("jupyter/kernels/python3/kernel.json")
    files.write_json(spec, {"argv": ["false"], "display_name": "x", "language": "python"})
    monkeypatch.setenv("JUPYTER_PATH", str(Path("jupyter").resolve()))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    path = write(
        "import os, sys, time, warnings\n"
        "print(sys.executable, os.path.basename(os.getcwd()))\n"
        "for i in range(3):\n"
        "    print(i, flush=True); print('e', i, file=sys.stderr, flush=True); time.sleep(0.05)\n"
        "warnings.warn('careful')\n"
        "print(os.environ['SOURCE_DATE_EPOCH'], hash('a'))",
        "from pathlib import Path\nPath(results).write_text(repr((objective, rate, widths)))",
        "from lib import answer\nprint(os.environ['MPLBACKEND'], answer)\n{'b', 'a'}",
    )
    Path("lib.py").write_text("answer = 42")  # beside the notebook
    before = dict(os.environ)
    given = {"objective": 'a "{b}"\n\\c é', "rate": "1e-4", "widths": [1]}

    first = run_notebook(path, "first {1}/out.ipynb", given)
    kept = Path("results.json").read_text()
    run_notebook(path, "second/out.ipynb", given)

    assert kept == repr((given["objective"], 1e-4, [1]))
    one, two = Path("first {1}/out.ipynb"), Path("second/out.ipynb")
    assert one.read_bytes() == two.read_bytes()
    text = text_of(one)
    assert text.startswith(f"{sys.executable} {Path.cwd().name}\n0\n1\n2\n0 ")
    assert "matplotlib_inline.backend_inline 42" in text
    assert "e 0\ne 1\ne 2\n<cell>:5: UserWarning: careful" in text
    assert str(Path.cwd()) not in one.read_text().replace(sys.executable, "")
    assert dict(os.environ) == before
    assert {found.name for found in one.parent.iterdir()} == {"out.ipynb", "out.manifest.json"}

    assert first == manifest_of(one)
    assert (first["status"], first["error"]) == ("done", None)
    assert first["notebook"] == "notebook.ipynb"
    assert first["output"] == "first {1}/out.ipynb"
    assert first["parameters"] == {
        **{"objective": given["objective"], "epochs": 2, "rate": 1e-4, "shuffle": True},
        **{"widths": [1], "extra": {}, "limit": None, "results": "results.json"},
    }
    assert first["seconds"] > 0
    assert first["versions"]["numpy"] == np.__version__


def test_runs_side_by_side_do_not_meet(write):
    # Neither may put its sockets where the other could find them: the folder they share.
    write("import os\nprint(objective, [name for name in os.listdir() if 'kernel' in name])")
    code = "from mnemodyn.run import *; import sys; run_notebook('notebook.ipynb', *sys.argv[1:2]"
    code += ", {'objective': sys.argv[1]})"
    runs = [start(code, f"{name}.ipynb") for name in "ab"]
    try:
        assert [run.wait(60) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
    assert [text_of(f"{name}.ipynb") for name in "ab"] == ["a.ipynb []\n", "b.ipynb []\n"]


def test_a_cell_that_raises_leaves_its_traceback(write):
    path = write("print('before')", "raise ValueError('no scans')", "print('after')")
    with pytest.raises(NotebookFailed, match=r"(?s)cell 3, .*ValueError: no scans.*out\.ipynb"):
        run_notebook(path, "out.ipynb")
    manifest = manifest_of("out.ipynb")
    assert manifest["status"] == "failed"
    assert manifest["error"] == "ValueError: no scans"
    assert text_of("out.ipynb") == "before\n"
    traceback = text_of("out.ipynb", "error")
    assert "ValueError: no scans" in traceback
    assert "\x1b" not in traceback
    assert "papermill" not in Path("out.ipynb").read_text()


def test_a_killed_kernel_is_no_success(write):
    path = write("print('before')", "import os\nos.kill(os.getpid(), 9)", "print('after')")
    with pytest.raises(NotebookFailed, match=r"(?s)cell 3, .*kernel died.*memory"):
        run_notebook(path, "out.ipynb")
    manifest = manifest_of("out.ipynb")
    assert manifest["status"] == "failed"
    assert text_of("out.ipynb") == "before\n"


def start(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_does_not_pass_for_a_finished_one(write, number):
    path = write(
        "from pathlib import Path\nimport os, time\nprint('before')",
        "Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)",
    )
    Path("out.ipynb").write_text("an earlier run")
    code = f"from mnemodyn.run import *; run_notebook({str(path)!r}, 'out.ipynb')"
    process = start(code)
    try:
        wait_until(lambda: Path("pid").is_file() and Path("pid").read_text())
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        process.kill()
    kernel = int(Path("pid").read_text())
    wait_until(lambda: not running(kernel))
    manifest = manifest_of("out.ipynb")
    if number == signal.SIGKILL:  # nobody was left to say more
        assert (manifest["status"], manifest["error"]) == ("running", None)
        assert Path("out.ipynb").read_text() == "an earlier run"
    else:
        assert manifest["status"] == "failed"
        assert manifest["error"] == "interrupted before its end"
        assert text_of("out.ipynb") == "before\n"


def wait_until(met, seconds=30):
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # in a container nobody may collect the dead
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_the_first_results_are_shown(tmp_path):
    row = {"data": "D", "task": "hidden entries", "score": "r2", "value": 0.5, "kind": "real"}
    rows = [{**row, "method": name} for name in ("a", "b", "c")]
    rows[0].update(low=0.25, high=0.75, n=7)
    write_results(tmp_path / "r.csv", rows)
    text = first_results({"parameters": {"results": str(tmp_path / "r.csv")}}, rows=2).split("\n")
    assert len(text) == 4
    assert text[1].split()[-5:] == ["r2", "0.500", "0.250", "0.750", "7"]
    assert text[3].startswith("3 rows in ")
    assert not first_results({"parameters": {"results": str(tmp_path / "absent.csv")}})


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    content = {"b": np.float32(0.5), "a": np.arange(2), "c": Path("x"), "d": True}
    files.write_json(path, content)
    assert path.read_text() == (
        '{\n  "b": 0.5,\n  "a": [\n    0,\n    1\n  ],\n  "c": "x",\n  "d": true\n}\n'
    )
    for bad in ({"b": float("nan")}, {"b": np.float32("nan")}, {"b": object()}):
        with pytest.raises(ValueError, match=r"cannot write .*a\.json as JSON"):
            files.write_json(path, bad)
    assert json.loads(path.read_text())["b"] == 0.5
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]
    files.write_text(path, "abc")
    assert files.sha256(path).startswith("ba7816bf8f01cfea")


def test_relative_paths_start_at_the_root(tmp_path, monkeypatch):
    below = tmp_path / "notebooks"
    below.mkdir()
    monkeypatch.chdir(below)
    assert files.resolve("x") == below / "x"
    (tmp_path / "_toc.yml").touch()
    assert files.find_root() == files.find_root(below / "deeper") == tmp_path
    assert files.resolve("runs/x") == tmp_path / "runs/x"
    assert files.resolve("/a/b") == Path("/a/b")
    with pytest.raises(ValueError, match="path must not be empty"):
        files.resolve("")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("import sys\nsys.exit(0)", "the cell stopped before its end"),
        ("raise SystemExit", "the cell stopped before its end"),
        ("exit()", "exit"),
        ("quit(0)", "quit"),
        ("import os\nos._exit(0)", "the kernel died"),
    ],
)
def test_a_cell_that_ends_the_notebook_is_no_success(write, cell, message):
    path = write("print('before')", cell, "print('after')")
    with pytest.raises(NotebookFailed, match=rf"(?s)cell 3, .*{message}"):
        run_notebook(path, "out.ipynb")
    assert manifest_of("out.ipynb")["status"] == "failed"
    assert text_of("out.ipynb").startswith("before\n")
    assert "after" not in text_of("out.ipynb")


def test_no_link_is_written_through(write):
    Path("mine").write_text("precious")
    Path(".out.running.ipynb").symlink_to("mine")
    run_notebook(write("1"), "out.ipynb")
    assert Path("mine").read_text() == "precious"


def test_two_runs_never_write_one_output(write):
    path = write("1")
    message = r"out\.ipynb is being written by this process"
    with files.locked("out.ipynb", "the first"), pytest.raises(RuntimeError, match=message):
        run_notebook(path, "out.ipynb")
    assert not Path("out.manifest.json").exists()


def test_folders_of_killed_processes_go_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old = time.time() - 100
    with files.temporary_folder() as held:
        os.utime(held, (old, old))
        with files.temporary_folder() as other:
            # Also of one that was killed just before.
            for name in (".mnemodyn-temporary-dead", "mnemodyn-mine"):
                (tmp_path / name / "kernel").mkdir(parents=True)
                os.utime(tmp_path / name, (old, old))
        assert Path(held).is_dir()
        assert not Path(other).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mnemodyn-mine"]


def test_progress_goes_to_the_terminal_and_not_to_the_page(write, capfd, monkeypatch):
    # In tests ipykernel never captures the descriptors, as it does elsewhere.
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    notebook = write("import sys\nprint('fold 1 of 2', file=sys.__stderr__, flush=True)")
    run_notebook(notebook, "out.ipynb", {})
    assert "fold 1 of 2" not in text_of("out.ipynb")
    assert "fold 1 of 2" in capfd.readouterr().err
