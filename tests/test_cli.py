"""The command line: exit statuses and messages of one line, never a Python traceback."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np
import pytest

import mnemodyn.run
from mnemodyn import files
from mnemodyn.cli import main, make_parser
from mnemodyn.data.scans import Collection, Scan

ROOT = Path(__file__).parents[1]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [
        nbformat.v4.new_code_cell("mode = 'on'\ncount = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("assert count > 0, 'count must be > 0'\nprint(mode, count)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), "a.ipynb")
    return "a.ipynb"


def test_run_with_a_file_and_options(notebook, capsys):
    Path("p.yaml").write_text("mode: off\ncount: 2\n")
    assert main(["run", notebook, "out.ipynb", "-f", "p.yaml", "-p", "count", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("a.ipynb -> out.ipynb in ")
    assert printed.out.count("\n") == 1
    assert printed.err == ""
    assert "off 3\\n" in Path("out.ipynb").read_text()


def test_a_failed_notebook_is_status_1(notebook, capsys):
    assert main(["run", notebook, "out.ipynb", "-p", "count", "-1"]) == 1
    message = capsys.readouterr().err
    assert "a.ipynb failed in cell 2" in message
    assert "AssertionError: count must be > 0" in message
    assert "out.ipynb" in message
    assert "Traceback" not in message
    assert json.loads(Path("out.manifest.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "cuont", "1"], "unknown parameter cuont; did you mean count?"),
        (["-p", "count", "many"], "parameter count must be"),
        (["-f", "absent.yaml"], "absent.yaml: "),
        (["-f", "list.yaml"], "list.yaml must hold a mapping"),
        (["-f", "broken.yaml"], "broken.yaml: not valid YAML"),
    ],
)
def test_refused_parameters_are_status_2(notebook, capsys, arguments, message):
    Path("list.yaml").write_text("[1]")
    Path("broken.yaml").write_text("a: [")
    assert main(["run", notebook, "out.ipynb", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("mnemodyn: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert not list(Path().glob("out*"))


def test_an_absent_notebook_is_status_2(notebook, capsys):
    assert main(["run", "b.ipynb", "out.ipynb"]) == 2
    assert "b.ipynb" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["walk"], ["run", "a.ipynb"], ["run", "a", "b", "-p", "x"]]
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: mnemodyn" in capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments in (["--version"], ["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"mnemodyn {version('mnemodyn')}\n")
    assert "Write a vector for every scan" in printed
    for name in ("index", "convert", "preprocess", "simulate", "pretrain", "evaluate", "publish"):
        assert f"    {name}" in printed


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys; import mnemodyn.cli; mnemodyn.cli.make_parser();"
        "heavy = {'torch', 'pandas', 'pydantic', 'papermill', 'huggingface_hub', 'nibabel'};"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_reader_that_stops_is_no_error(tmp_path):
    """As `mnemodyn ... | head` does it, which leaves a pipe without a reader."""
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "from mnemodyn.cli import main; sys.exit(main())"
    )
    words = ["simulate", "abide", "s", "--participants", "4", "--frames", "60"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == ""


def test_what_a_program_reads_is_json(notebook, capsys):
    assert main(["run", notebook, "out.ipynb", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(Path("out.manifest.json").read_text())
    size = ["--participants", "12", "--frames", "60"]
    assert main(["simulate", "abide", "s", *size, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("s/simulated.json").read_text())
    assert main(["index", "abide", "s", "--table", "scans.csv", "--json"]) == 0
    capsys.readouterr()
    n_scans = len(Path("scans.csv").read_text().splitlines()) - 1
    assert main(["convert", "abide", "s", "store", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["n_scans"] == n_scans
    assert printed.err == "", "no progress where nobody looks"


def write_tables(n):
    rng = np.random.default_rng(0)
    for i in range(n):
        lines = ["\t".join("abcd")]
        lines += ["\t".join(map(str, row)) for row in rng.standard_normal((40, 4))]
        Path(f"sub-{i}_timeseries.tsv").write_text("\n".join(lines))


def test_a_repetition_time_that_the_files_do_not_state(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tables(3)
    Path("participants.tsv").write_text(
        "participant_id\tsex\tage\n" + "".join(f"sub-{i}\tF\t3{i}\n" for i in range(3))
    )
    assert main(["index", "bids", "."]) == 1
    assert "none of the scans can be used" in capsys.readouterr().err
    assert main(["index", "bids", ".", "--t-r", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_scans"] == 3
    assert main(["convert", "bids", ".", "store", "--t-r", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-s", "objective", "latnet"], "did you mean latent?"),
        (["-s", "epoch", "3"], "did you mean epochs?"),
        (["--settings", "c.yaml"], "c.yaml: training.learning_rat is not a setting; did you mean"),
        (["--settings", "number.yaml"], "number.yaml: training.1 is not a setting"),
        (["-s", "training.epochs", "many"], "training.epochs must be"),
        (["-s", "training.epochs", "["], "not valid YAML"),
        (["--settings", "absent.yaml"], "absent.yaml"),
    ],
)
def test_refused_settings_of_pretrain_are_status_2(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("training: {learning_rat: 1e-3}\n")
    Path("number.yaml").write_text("training: {1: 1e-3}\n")
    assert main(["pretrain", "absent", "out", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("mnemodyn: ")
    assert message in printed
    assert not Path("out").exists()


def test_pretrain_from_a_file_of_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tables(4)
    Path("c.yaml").write_text(
        "model: {n_timepoints: 16, n_blocks: 1, n_channels: 4, input_width: 4, n_levels: 2}\n"
        "objective: {name: denoise, sigma: 0.2}\n"
        "training: {epochs: 3, windows_per_epoch: 4}\n"
        "data: {n_test: 1}\nmachine: {accelerator: cpu}\n"
    )
    command = ["pretrain", ".", "out", "--settings", "c.yaml", "--t-r", "2"]
    assert main([*command, "-s", "sigma", "0.5", "-s", "training.epochs", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("out/best: val_r2_clean ")
    assert printed.endswith(", 1 epochs")
    training = json.loads(Path("out/best/config.json").read_text())["training"]
    assert training["objective"]["sigma"] == 0.5
    assert training["settings"]["training"]["epochs"] == 1
    assert training["train_participants"] == ["sub-0", "sub-1"]
    assert main(["pretrain", "absent", "out"]) == 1
    assert "absent" in capsys.readouterr().err


def test_an_interruption_is_no_traceback(notebook, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mnemodyn.run, "run_notebook", stop)
    assert main(["run", notebook, "out.ipynb"]) == 130
    assert capsys.readouterr().err == "mnemodyn: interrupted\n"


def test_what_would_be_published(tmp_path, capsys):
    draft = ROOT / "tests/golden/lightning-epoch=01-val_mae=0.5000.ckpt"
    words = ["publish", str(draft), "--compat", "reference", "--repo-id", "lab/draft", "--dry-run"]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["files"] == ["README.md", "config.json", "model.safetensors"]
    assert "# draft" in shown["card"]
    assert main(words) == 0
    assert "# draft" in capsys.readouterr().out


def command(*words, **settings):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    words = [sys.executable, "-m", "mnemodyn.cli", *map(str, words)]
    return subprocess.run(words, env=environment, text=True, stderr=subprocess.PIPE, **settings)


def test_what_a_terminal_cannot_show_costs_nothing(tmp_path):
    done = command("index", "bids", tmp_path / "é", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert done.stderr == f"mnemodyn: {tmp_path}/\\xe9: no such folder\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_named(tmp_path):
    words = ["simulate", "abide", tmp_path / "s", "--participants", "4", "--frames", "60"]
    with open("/dev/full", "w") as full:
        done = command(*words, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "mnemodyn: [Errno 28] No space left on device: 'standard output'\n"
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        files.write_text("/dev/full", "text")
    assert not Path("/dev/full").is_file()


def commands():
    """The options of each command."""
    found = {}
    for parsers in make_parser()._subparsers._group_actions:
        for name, parser in parsers.choices.items():
            found[name] = set(parser._option_string_actions)
    return found


@pytest.mark.parametrize(
    "name", ["index", "convert", "evaluate", "embed", "reconstruct", "pretrain"]
)
def test_every_command_that_reads_scans_has_what_messages_advise(name):
    """As `load_scan` says them, which is the same function for all of them."""
    assert commands()[name] >= advised("data/scans.py") | advised("data/formats.py")


def advised(path):
    """Options that the messages of a module name; --no-deps is pip's."""
    text = (ROOT / "mnemodyn" / path).read_text()
    return {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)} - {"--no-deps"}


def test_every_option_that_a_message_names_is_one():
    known = set().union(*commands().values())
    # Of mnemodyn itself, and of pip, git and IPython.
    others = {"--version", "--no-deps", "--no-optional-locks", "--porcelain", "--log-level"}
    others |= {"--untracked-files"}
    for path in (ROOT / "mnemodyn").rglob("*.py"):
        found = advised(path.relative_to(ROOT / "mnemodyn"))
        assert found <= known | others, path


def test_files_that_do_not_say_are_read_as_the_options_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(3):
        values = rng.standard_normal((40, 4))
        values[:, 2] = np.nan
        np.savez(f"sub-{i}.npz", ts=values, other=values[:, :2])
    Path("c.yaml").write_text("scans: ['sub-{participant:[0-9]+}.npz']\n")
    words = ["index", "c.yaml", ".", "--t-r", "2"]
    for option, message in (
        ([], "--key"),
        (["--key", "ts"], "--frames-first"),
        (["--frames-first"], "--max-constant-parcels"),
    ):
        words += option
        assert main(words) == 1
        printed = capsys.readouterr()
        assert message in printed.out + printed.err
    assert main([*words, "--max-constant-parcels", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_usable"] == 3


def test_pretrain_keeps_relatives_on_one_side(monkeypatch):
    rng = np.random.default_rng(0)
    scans = [Scan(f"sub-{i}", rng.normal(size=(20, 2)), 1.0, ("a", "b")) for i in range(6)]
    related = Collection(scans)
    related.table["family"] = ["f", "g", "h", "f", "g", "h"]
    monkeypatch.setattr("mnemodyn.data.collection.open_scans", lambda *_, **__: related)
    sides = []

    def pretrain(train, validation, *_, **__):
        sides.extend([set(train.table["family"]), set(validation.table["family"])])
        raise RuntimeError("seen")

    monkeypatch.setattr("mnemodyn.pretrain.training.pretrain", pretrain)
    arguments = ["-s", "data.n_test", "1", "-s", "data.n_validation", "1"]
    assert main(["pretrain", "x", "out", *arguments]) == 1
    assert all(sides)
    assert not sides[0] & sides[1]
