"""The command line: exit statuses and messages, never a Python traceback."""

import io
import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest

from mnemodyn import cli
from mnemodyn.cli import main


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
        (["-p", "count", "many"], "parameter count must be a whole number, got 'many'"),
        (["-f", "absent.yaml"], "there is no parameters file absent.yaml"),
        (["-f", "list.yaml"], "list.yaml must hold a mapping"),
        (["-f", "broken.yaml"], "broken.yaml: not valid YAML"),
        (["-f", "-"], "parameter mode must be text"),
    ],
)
def test_refused_parameters_are_status_2(notebook, capsys, monkeypatch, arguments, message):
    Path("list.yaml").write_text("[1]")
    Path("broken.yaml").write_text("a: [")
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"mode": false}'))
    assert main(["run", notebook, "out.ipynb", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("mnemodyn: ")
    assert message in printed
    assert "Traceback" not in printed
    assert not list(Path().glob("out*"))


def test_an_absent_notebook_is_status_2(notebook, capsys):
    assert main(["run", "b.ipynb", "out.ipynb"]) == 2
    assert capsys.readouterr().err == "mnemodyn: there is no notebook b.ipynb\n"


@pytest.mark.parametrize(
    "arguments", [[], ["walk"], ["run", "a.ipynb"], ["run", "a", "b", "-p", "x"]]
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: mnemodyn" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"]])
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    expected = (
        f"mnemodyn {version('mnemodyn')}\n" if arguments == ["--version"] else "usage: mnemodyn"
    )
    assert capsys.readouterr().out.startswith(expected)


def test_info_says_what_is_wrong(tmp_path, capsys):
    assert main(["info", str(tmp_path / "absent")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("mnemodyn: ")
    assert "absent" in message


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys; import mnemodyn.cli, mnemodyn.run;"
        "sys.exit(bool({'torch', 'papermill', 'nbclient', 'nbformat'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_notebook_opens_jupyterlab(monkeypatch, tmp_path, capsys):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root / "notebooks")
    assert main(["notebook", "pretrian"]) == 2
    assert "there is no notebooks/pretrian.ipynb; notebooks/ has " in capsys.readouterr().err
    ran = []
    monkeypatch.setattr("mnemodyn.cli.find_spec", lambda _: True)
    monkeypatch.setattr(
        subprocess, "run", lambda words, cwd, check: ran.append((words, cwd)) or Ended(3)
    )
    assert main(["notebook", "pretrain", "--no-browser"]) == 1, (
        "JupyterLab's own status is not passed for a success"
    )
    (words, cwd) = ran[0]
    assert words[:4] == [sys.executable, "-m", "jupyterlab", f"--notebook-dir={root}"]
    assert {"--LabApp.default_url=/lab/tree/notebooks/pretrain.ipynb", "--no-browser"} <= set(words)
    assert cwd == root
    monkeypatch.setattr("mnemodyn.cli.find_spec", lambda _: None)
    assert main(["notebook"]) == 1
    assert "this needs jupyterlab: pip install 'mnemodyn[lab]'" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["notebook"]) == 2


class Ended:
    def __init__(self, returncode):
        self.returncode = returncode


def test_what_a_program_reads_is_json(notebook, capsys):
    assert main(["run", notebook, "out.ipynb", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(Path("out.manifest.json").read_text())
    assert (
        main(
            [
                "simulate",
                "abide",
                "s",
                "--participants",
                "12",
                "--frames",
                "60",
                "--parcels",
                "20",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == json.loads(Path("s/simulated.json").read_text())
    assert main(["convert", "abide", "s", "store", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["n_scans"] > 0
    assert printed.err == "", "no bar where nobody looks"


def test_what_cannot_be_written_is_no_wrong_usage(tmp_path, capsys):
    for name in ("sub-1_bold.nii.gz", "labels.nii.gz", "taken"):
        (tmp_path / name).touch()
    words = [
        "preprocess",
        tmp_path / "sub-1_bold.nii.gz",
        "-o",
        tmp_path / "taken",
        "--atlas",
        tmp_path / "labels.nii.gz",
    ]
    assert main(list(map(str, words))) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "taken") in message
    assert "name a folder in its place" in message


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", cli.COMMANDS["info"]._replace(run=stop))
    monkeypatch.setattr(sys, "argv", ["mnemodyn", "info", "x"])
    with warnings.catch_warnings():
        assert main() == 130
    assert capsys.readouterr().err == "mnemodyn: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "latnet"], "unknown objective latnet; did you mean latent?"),
        (["-s", "epoch", "3"], "unknown setting epoch; did you mean epochs?"),
        (
            ["--config", "c.yaml"],
            "unknown training setting learning_rat; did you mean learning_rate?",
        ),
        (["-s", "epochs", "many"], "epochs must be int, got 'many'"),
        (["-s", "epochs", "["], "epochs: not valid YAML"),
    ],
)
def test_refused_settings_of_pretrain_are_status_2(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("training: {learning_rat: 1e-3}\n")
    assert main(["pretrain", "absent", "out", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("mnemodyn: ")
    assert message in printed
    assert not Path("out").exists()


def test_pretrain_from_a_file_of_settings(tmp_path, monkeypatch, capsys):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(3):
        table = rng.standard_normal((40, 4))
        lines = ["\t".join("abcd"), *("\t".join(map(str, row)) for row in table)]
        Path(f"sub-{i}_timeseries.tsv").write_text("\n".join(lines))
    Path("c.yaml").write_text(
        "model: {n_timepoints: 16, n_blocks: 1, n_channels: 4, input_width: 4, n_levels: 2}\n"
        "training: {epochs: 3, windows_per_epoch: 4}\ndata: {t_r: 2.0, n_test: 1}\nmachine: {accelerator: cpu}\n"
    )
    command = [
        "pretrain",
        ".",
        "out",
        "--objective",
        "denoise",
        "--config",
        "c.yaml",
        "-s",
        "sigma",
        "0.5",
    ]
    assert main([*command, "-s", "epochs", "1"]) == 0
    assert Path("out/best/config.json").is_file()
    assert "out/best: val_r2_clean " in capsys.readouterr().out
    record = json.loads(Path("out/run.json").read_text())
    assert record["identity"]["objective"] == {
        "name": "denoise",
        "multiresolution_weight": 1.0,
        "sigma": 0.5,
    }
    assert record["ran_on"]["versions"]["torch"]
    assert main(["pretrain", "absent", "out"]) == 1
    assert "data must be 'hcp7' or a folder" in capsys.readouterr().err
