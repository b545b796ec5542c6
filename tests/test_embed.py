"""Scans to vectors and back from the shell: any format, resumed, refusals listed, messages that name the mend."""

import csv
import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import mnemodyn.embed
from mnemodyn import (
    Checkpoint,
    MnemoDyn,
    ModelConfig,
    Scaling,
    Scan,
    load_checkpoint,
    load_scan,
    save_checkpoint,
)
from mnemodyn.cli import main
from mnemodyn.data.scans import save_scan

PARCELS = tuple(f"p{i}" for i in range(6))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=6, n_timepoints=32, n_channels=4, input_width=4, field_rank=2, n_levels=2
    )
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return save_checkpoint(folder, Checkpoint(MnemoDyn(config), PARCELS, 0.8, Scaling(), None, {}))


@pytest.fixture
def scans(tmp_path):
    """Twelve participants in three formats."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(12):
        values = rng.standard_normal((50 + i, 6)).astype(np.float32).cumsum(0) * (1 + i % 2)
        scan = Scan(f"sub-{i:02}", values, 0.8, PARCELS)
        if i % 3 == 2:
            lines = [
                "\t".join(f"#{p}" for p in PARCELS),
                *("\t".join(map(str, row)) for row in values),
            ]
            (folder / f"sub-{i:02}.1D").write_text("\n".join(lines) + "\n")
            (folder / f"sub-{i:02}.json").write_text('{"RepetitionTime": 0.8}')
        else:
            ending = ".ptseries.nii" if i % 3 else "_timeseries.tsv"
            save_scan(scan, folder / f"sub-{i:02}_task-rest{ending}")
    return folder


def embed(scans, output, checkpoint, *more):
    return main(["embed", str(scans), "-o", str(output), "-c", str(checkpoint), *more])


def test_every_format_becomes_the_row_that_the_network_reads(scans, checkpoint, tmp_path, capsys):
    output = tmp_path / "out" / "embeddings.csv"
    assert embed(scans, output, checkpoint) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{output}: 12 scans, 8 features\n"
    assert printed.err == ""
    table = pd.read_csv(output)
    assert list(table["participant_id"]) == [f"sub-{i:02}" for i in range(12)]
    trained = load_checkpoint(checkpoint)
    for row in table.itertuples():
        scan = load_scan(row.file)
        z = (scan.values - scan.values.mean(0)) / scan.values.std(0)
        with torch.no_grad():
            latents = trained.model(torch.tensor(z[None]), scan.t_r).latents[0]
        wanted = torch.cat([latents.mean(0), latents.std(0)]).numpy()
        np.testing.assert_allclose(row[8:], wanted, rtol=1e-3, atol=1e-5)
        assert (row.n_frames, row.t_r) == (scan.n_frames, 0.8)
    assert [p.name for p in output.parent.iterdir()] == ["embeddings.csv"]


def test_json_and_parquet(scans, checkpoint, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    assert embed(scans, tmp_path / "a.csv", checkpoint, "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_features"] == 8
    mnemodyn.embed.ROWS, rows = 5, mnemodyn.embed.ROWS
    assert embed(scans, tmp_path / "a.parquet", checkpoint) == 0
    mnemodyn.embed.ROWS = rows
    a, b = pd.read_csv(tmp_path / "a.csv"), pd.read_parquet(tmp_path / "a.parquet")
    assert list(a.columns) == list(b.columns)
    np.testing.assert_array_equal(a.iloc[:, 7:].astype(np.float32), b.iloc[:, 7:])


def test_an_interrupted_call_goes_on(scans, checkpoint, tmp_path, capsys, monkeypatch):
    assert embed(scans, tmp_path / "whole.csv", checkpoint) == 0
    real, loaded = mnemodyn.embed.load_scan, []

    def load(path, **settings):
        if len(loaded) == 5:
            raise KeyboardInterrupt
        loaded.append(path)
        return real(path, **settings)

    monkeypatch.setattr(mnemodyn.embed, "load_scan", load)
    output = tmp_path / "e.csv"
    with pytest.raises(KeyboardInterrupt):
        embed(scans, output, checkpoint)
    assert not output.exists()
    kept = tmp_path / ".e.csv.part"
    kept.write_bytes(kept.read_bytes()[:-20])  # killed within a row
    loaded.clear()
    loaded.append(None)
    with pytest.raises(KeyboardInterrupt):
        embed(scans, output, checkpoint)
    assert len(loaded) == 5, "the row cut off, and three more"
    monkeypatch.setattr(mnemodyn.embed, "load_scan", real)
    capsys.readouterr()
    assert embed(scans, output, checkpoint) == 0
    assert "12 scans (8 of them from before)" in capsys.readouterr().out
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not kept.exists()


def test_rows_of_other_settings_are_not_taken_up(scans, checkpoint, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mnemodyn.embed, "_write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(scans, tmp_path / "e.csv", checkpoint)
    path = next(scans.glob("*.1D"))
    path.write_text(path.read_text().replace("\n", "\n1\t2\t3\t4\t5\t6\n", 1))
    assert embed(scans, tmp_path / "e.csv", checkpoint, "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_resumed"] == 11, (
        "the scan that changed is read again"
    )
    table = pd.read_csv(tmp_path / "e.csv").set_index("file")
    assert table.loc[str(path), "n_frames"] == len(path.read_text().splitlines()) - 1
    with monkeypatch.context() as patch:
        patch.setattr(mnemodyn.embed, "_write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed(scans, tmp_path / "e.csv", checkpoint)
    assert embed(scans, tmp_path / "e.csv", checkpoint, "--readout", "latent_max", "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_resumed"] == 0


def test_a_bad_scan_is_listed_and_stops_nothing(scans, checkpoint, tmp_path, capsys):
    (scans / "sub-98_timeseries.tsv").write_text("p0\tp1\n1\t2\n")
    (scans / "sub-99.ptseries.nii").write_bytes(b"no")
    assert embed(scans, tmp_path / "e.csv", checkpoint) == 0
    assert "2 scans refused, see" in capsys.readouterr().err
    with open(tmp_path / "e_refused.tsv") as stream:
        refused = list(csv.DictReader(stream, delimiter="\t"))
    assert [r["problem"] for r in refused] == ["parcel-count", "not-cifti"]
    assert len(pd.read_csv(tmp_path / "e.csv")) == 12
    for path in scans.glob("sub-9*"):
        path.unlink()
    assert embed(scans, tmp_path / "e.csv", checkpoint) == 0
    assert not (tmp_path / "e_refused.tsv").exists()


def test_censored_frames_are_filled(checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(1)
    t = np.arange(60)[:, None]
    values = (1000 + 20 * np.sin(t / 4 + np.arange(6)) + rng.standard_normal((60, 6))).astype(
        np.float32
    )
    censored = np.zeros(60, bool)
    censored[[10, 11, 30]] = True
    damaged = values.copy()
    damaged[censored] += 500
    path = save_scan(
        Scan("sub-1", damaged, 0.8, PARCELS, censored=censored), tmp_path / "sub-1.ptseries.nii"
    )
    output = tmp_path / "out" / "sub-1" / "func" / "sub-1_timeseries.ptseries.nii"
    assert main(["reconstruct", str(path), "-o", str(output), "-c", str(checkpoint)]) == 0
    assert capsys.readouterr().out == f"{output}: 3 of 60 frames filled\n"
    filled = load_scan(output)
    assert json.loads((output.parent / "sub-1_timeseries.json").read_text())["FilledFrames"] == [
        10,
        11,
        30,
    ]
    described = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"
    assert {"Name", "BIDSVersion", "GeneratedBy"} <= set(described)
    unnamed = (tmp_path / "out" / ".bidsignore").read_text().split()
    files = [p.name for p in (tmp_path / "out").rglob("sub-1*") if p.is_file()]
    assert len(files) == 3
    assert all(any(fnmatch(name, pattern) for pattern in unnamed) for name in files), (
        "BIDS has no names for these yet"
    )
    assert np.array_equal(filled.values[~censored], values[~censored])
    assert np.array_equal(filled.censored, censored)
    trained = load_checkpoint(checkpoint)
    mean, sd = (getattr(values[~censored].astype(float), f)(0) for f in ("mean", "std"))
    z = torch.tensor((damaged - mean) / sd, dtype=torch.float32)[None]
    with torch.no_grad():
        y = trained.model(z, 0.8, censored=torch.tensor(censored)[None]).reconstruction[0].numpy()
    np.testing.assert_allclose(filled.values[censored], (y * sd + mean)[censored], rtol=1e-5)
    whole = tmp_path / "sub-1_timeseries.tsv"
    assert (
        main(
            ["reconstruct", str(path), "-o", str(whole), "-c", str(checkpoint), "--whole", "--json"]
        )
        == 0
    )
    np.testing.assert_allclose(load_scan(whole).values, y * sd + mean, rtol=1e-4)
    save_scan(Scan("sub-2", values, 0.8, PARCELS), tmp_path / "sub-2.ptseries.nii")
    assert (
        main(
            [
                "reconstruct",
                str(tmp_path / "sub-2.ptseries.nii"),
                "-o",
                str(whole),
                "-c",
                str(checkpoint),
            ]
        )
        == 1
    )
    assert "no frame is censored" in capsys.readouterr().err


def _scan(folder, parcels=PARCELS, header="0.8", name="sub-1_timeseries.tsv"):
    rng = np.random.default_rng(0)
    lines = [
        "\t".join(parcels),
        *("\t".join(f"{v:.4f}" for v in row) for row in rng.standard_normal((40, len(parcels)))),
    ]
    (folder / name).write_text("\n".join(lines) + "\n")
    (folder / name).with_suffix(".json").write_text(json.dumps({"RepetitionTime": float(header)}))
    return folder / name


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


WRONG = {
    "too few parcels": "expected 6 parcels, got 5; `mnemodyn info CHECKPOINT` lists what the network reads",
    "other parcels": "other names: column 1 is 'q0', expected 'p0'",
    "another order": "the same names in another order: column 1 is 'p5', expected 'p0'",
    "milliseconds": "t_r must be in seconds, at most 20; 800 looks like milliseconds (0.8 s)",
    "truncated checkpoint": "damaged: its SHA-256 is",
    "pickle bomb": "nothing in it was executed",
    "no token": "hf auth login",
    "full disk": "e.csv: No space left on device; make room there or name another place",
    "full disk half-way": "e.csv: No space left on device; make room there or name another place",
    "unwritable folder": "Permission denied; name a place that you may read and write",
    "no scans": "no file ending in _timeseries.tsv",
    "a folder for a file": "is a folder; name the file to write",
    "another ending": "output must end in .csv or .parquet",
    "unknown read-out": "read-out must be one of",
    "a scan that is not there": "there is no file or folder",
    "a folder for a scan": "is a folder; name the file of one scan",
    "a file for a folder": "File exists; name a folder in its place",
    "a scan as output": "sub-1_timeseries.tsv is a scan that is read, and would be replaced; name another output",
    "no such device": "--device must be cpu, or cuda where PyTorch finds one, got 'gpu'",
}


@pytest.mark.parametrize("how", WRONG)
def test_holding_it_wrong_names_the_mend(how, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scan = _scan(tmp_path)
    output, model, more = tmp_path / "e.csv", checkpoint, []
    words = None
    if how == "too few parcels":
        scan = _scan(tmp_path, PARCELS[:5])
    elif how == "other parcels":
        scan = _scan(tmp_path, [f"q{i}" for i in range(6)])
    elif how == "another order":
        scan = _scan(tmp_path, PARCELS[::-1])
    elif how == "milliseconds":
        scan = _scan(tmp_path, header="800")
    elif how == "truncated checkpoint":
        model = tmp_path / "model"
        save_checkpoint(model, load_checkpoint(checkpoint))
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])
    elif how == "pickle bomb":
        model = tmp_path / "bomb.ckpt"
        model.write_bytes(pickle.dumps(Bomb()))
        more = ["--compat", "reference", "--scaling", "zscore_per_parcel"]
    elif how == "no token":
        import huggingface_hub
        from hub_server import Hub

        hub = Hub()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        words = ["publish", str(checkpoint), "--repo-id", "lab/tiny"]
    elif how.startswith("full disk"):

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(
            *((os, "replace") if how == "full disk" else (mnemodyn.embed, "_resume")), full
        )
    elif how == "unwritable folder":
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        output = (
            folder if os.getuid() else Path("/sys")
        ) / "e.csv"  # nothing stops root but the kernel
    elif how == "no scans":
        scan = tmp_path / "none"
        scan.mkdir()
    elif how == "a folder for a file":
        output = tmp_path / "e.csv"
        output.mkdir()
    elif how == "another ending":
        output = tmp_path / "e.xlsx"
    elif how == "unknown read-out":
        more = ["--readout", "nonsense"]
    elif how == "a scan that is not there":
        scan = tmp_path / "sub-9_timeseries.tsv"
    elif how == "a folder for a scan":
        words = [
            "reconstruct",
            str(tmp_path),
            "-o",
            str(tmp_path / "sub-1_timeseries.tsv"),
            "-c",
            str(model),
        ]
    elif how == "a file for a folder":
        output = scan / "e.csv"
    elif how == "a scan as output":
        words = ["reconstruct", str(scan), "-o", str(scan), "-c", str(model), "--whole"]
    elif how == "no such device":
        more = ["--device", "gpu"]
    words = words or ["embed", str(scan), "-o", str(output), "-c", str(model), *more]
    status = main(words)
    message = capsys.readouterr().err
    assert WRONG[how] in message
    assert status == 1
    assert message.startswith("mnemodyn: ")
    assert "Traceback" not in message
    assert not (tmp_path / "exploded").exists()
    assert not output.is_file()


def test_ten_lines_from_the_hub_to_a_cross_validated_score(
    scans, checkpoint, tmp_path, monkeypatch
):
    """The lines stand in the README; here they are run against the loopback hub."""
    import huggingface_hub
    from hub_server import TOKEN, Hub

    hub = Hub()
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }
    environment |= {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("NAME/MODEL")
    from mnemodyn.hub import write_folder

    folder = write_folder(checkpoint, tmp_path / "folder", repo_id="NAME/MODEL")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with pytest.warns(DeprecationWarning, match="Use 'content="):
        api.upload_folder(repo_id="NAME/MODEL", folder_path=folder)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = readme.split("<!-- ten lines -->\n```python\n")[1].split("```")[0]
    assert len([line for line in lines.splitlines() if line]) <= 10  # the formatter sets one apart
    people = pd.DataFrame(
        {"participant_id": [f"sub-{i:02}" for i in range(12)], "diagnosis": [0, 1] * 6}
    )
    people.to_csv(scans / "participants.tsv", sep="\t", index=False)
    done = subprocess.run(
        [sys.executable, "-c", lines],
        cwd=scans,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The same from the table of `embed`.
    assert embed(scans, tmp_path / "e.csv", checkpoint) == 0
    x = pd.read_csv(tmp_path / "e.csv").filter(regex="latent").to_numpy()
    scores = cross_val_score(LogisticRegression(max_iter=1000), x, people["diagnosis"], cv=3)
    assert 0 <= float(done.stdout.split()[-1]) <= 1
    assert scores.shape == (3,)


def test_an_hour_in_seconds_and_bounded_memory(tmp_path):
    """450 parcels, 5000 frames of 0.72 s: the network of the quick profile's size."""
    config = ModelConfig(
        n_parcels=450, n_timepoints=240, n_blocks=2, n_channels=48, input_width=48, n_levels=4
    )
    parcels = tuple(f"p{i}" for i in range(450))
    save_checkpoint(
        tmp_path / "model", Checkpoint(MnemoDyn(config), parcels, 0.72, Scaling(), None, {})
    )
    values = np.random.default_rng(0).standard_normal((5000, 450)).astype(np.float32)
    path = save_scan(Scan("sub-1", values, 0.72, parcels), tmp_path / "sub-1.ptseries.nii")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert embed(path, tmp_path / "e.csv", tmp_path / "model") == 0
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024


def test_help_lists_every_command_under_a_heading(capsys):
    for words in (["--help"], ["embed", "--help"], ["publish", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    for heading in ("scans:", "a model:", "the book:"):
        assert heading in text
    assert "embed        write a vector for every scan" in text


def test_completion_and_book(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["book"]) == 2
    assert "holds no Snakefile" in capsys.readouterr().err
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    assert "--max-constant-parcels" in capsys.readouterr().out
