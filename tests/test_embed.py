"""Scans to vectors and back from the shell: any format, resumed, refusals listed, plain messages."""

import csv
import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mnemodyn.embed
import mnemodyn.readout
from mnemodyn import (
    Checkpoint,
    MnemoDyn,
    ModelConfig,
    Scaling,
    Scan,
    from_pretrained,
    load_scan,
    save_checkpoint,
)
from mnemodyn.cli import main
from mnemodyn.data.scans import save_scan

PARCELS = tuple(f"p{i}" for i in range(6))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=6, n_timepoints=32, n_channels=4, input_width=4, field_rank=2, n_levels=2
    )
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return save_checkpoint(folder, Checkpoint(MnemoDyn(config), PARCELS, 0.8, Scaling()))


@pytest.fixture
def scans(tmp_path):
    """Twelve participants in three formats."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(12):
        values = rng.standard_normal((50 + i, 6)).astype(np.float32).cumsum(0) * (1 + i % 2)
        if i % 3 == 2:
            lines = ["\t".join(f"#{p}" for p in PARCELS)]
            lines += ["\t".join(map(str, row)) for row in values]
            (folder / f"sub-{i:02}.1D").write_text("\n".join(lines) + "\n")
            (folder / f"sub-{i:02}.json").write_text('{"RepetitionTime": 0.8}')
        else:
            ending = ".ptseries.nii" if i % 3 else "_timeseries.tsv"
            scan = Scan(f"sub-{i:02}", values, 0.8, PARCELS)
            save_scan(scan, folder / f"sub-{i:02}_task-rest{ending}")
    return folder


def embed(scans, output, checkpoint, *more):
    return main(["embed", str(scans), "-o", str(output), "-c", str(checkpoint), *more])


def reconstruct(scan, output, checkpoint, *more):
    return main(["reconstruct", str(scan), "-o", str(output), "-c", str(checkpoint), *more])


def test_every_format_becomes_the_row_that_the_network_reads(scans, checkpoint, tmp_path, capsys):
    output = tmp_path / "out" / "embeddings.csv"
    assert embed(scans, output, checkpoint) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{output}: 12 scans, 8 features\n"
    assert printed.err == ""
    table = pd.read_csv(output)
    assert list(table["participant_id"]) == [f"sub-{i:02}" for i in range(12)]
    trained = from_pretrained(checkpoint)
    for row in table.itertuples():
        scan = load_scan(row.file)
        z = (scan.values - scan.values.mean(0)) / scan.values.std(0)
        with torch.no_grad():
            latents = trained.model(torch.tensor(z[None]), scan.t_r).latents[0]
        wanted = torch.cat([latents.mean(0), latents.std(0)]).numpy()
        np.testing.assert_allclose(row[8:], wanted, rtol=1e-3, atol=1e-5)
        assert (row.n_frames, row.t_r) == (scan.n_frames, 0.8)
    assert [p.name for p in output.parent.iterdir()] == ["embeddings.csv"]


def test_tables_of_all_kinds_hold_the_same(scans, checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyarrow")
    assert embed(scans, tmp_path / "a.csv", checkpoint, "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_features"] == 8
    monkeypatch.setattr(mnemodyn.embed, "ROWS", 5)
    assert embed(scans, tmp_path / "a.parquet", checkpoint) == 0
    assert embed(scans, tmp_path / "a.tsv", checkpoint) == 0
    a = pd.read_csv(tmp_path / "a.csv")
    others = [pd.read_csv(tmp_path / "a.tsv", sep="\t"), pd.read_parquet(tmp_path / "a.parquet")]
    for b in others:
        assert list(a.columns) == list(b.columns)
        wanted = a.iloc[:, 7:].astype(np.float32)
        np.testing.assert_array_equal(wanted, b.iloc[:, 7:].astype(np.float32))
    assert set(others[1].dtypes.iloc[7:].astype(str)) == {"float32"}


@pytest.fixture
def passes(monkeypatch):
    """The names of scans that went through the network."""
    real = mnemodyn.readout._read
    seen = []

    def count(checkpoint, scan, names):
        seen.append(scan.participant_id)
        return real(checkpoint, scan, names)

    monkeypatch.setattr(mnemodyn.readout, "_read", count)
    return seen


def interrupt(monkeypatch, after):
    """Let the call after so many scans be interrupted."""
    real = mnemodyn.embed.load_scan
    loaded = []

    def load(path, **settings):
        if len(loaded) == after:
            raise KeyboardInterrupt
        loaded.append(path)
        return real(path, **settings)

    monkeypatch.setattr(mnemodyn.embed, "load_scan", load)


def test_an_interrupted_call_goes_on(scans, checkpoint, tmp_path, monkeypatch, passes):
    assert embed(scans, tmp_path / "whole.csv", checkpoint) == 0
    output = tmp_path / "e.csv"
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        assert embed(scans, output, checkpoint) == 130
    assert not output.exists()
    passes.clear()
    assert embed(scans, output, checkpoint) == 0
    assert len(passes) == 7
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / ".e.csv.part").exists()


def test_what_was_kept_serves_only_the_same(scans, checkpoint, tmp_path, monkeypatch, passes):
    output = tmp_path / "e.csv"
    for more in ([], ["--readout", "latent_max"]):
        passes.clear()
        with monkeypatch.context() as patch:
            interrupt(patch, after=11)
            assert embed(scans, output, checkpoint, *more) == 130
        assert len(passes) == 11, "other read-outs are computed anew"
    passes.clear()
    path = scans / "sub-02.1D"
    path.write_text(path.read_text().replace("\n", "\n1\t2\t3\t4\t5\t6\n", 1))
    sidecar = scans / "sub-05.json"
    sidecar.write_text('{"RepetitionTime": 0.9}')
    assert embed(scans, output, checkpoint) == 0
    assert passes == ["sub-02", "sub-05", "sub-11"], "what changed, and what was not reached"
    table = pd.read_csv(output).set_index("participant_id")
    assert table.loc["sub-02", "n_frames"] == 53
    assert table.loc["sub-05", "t_r"] == 0.9


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
    noise = rng.standard_normal((60, 6))
    values = (1000 + 20 * np.sin(t / 4 + np.arange(6)) + noise).astype(np.float32)
    censored = np.zeros(60, bool)
    censored[[10, 11, 30]] = True
    damaged = values.copy()
    damaged[censored] += 500
    scan = Scan("sub-1", damaged, 0.8, PARCELS, censored=censored)
    path = save_scan(scan, tmp_path / "sub-1.ptseries.nii")
    output = tmp_path / "out" / "sub-1" / "func" / "sub-1_timeseries.ptseries.nii"
    assert reconstruct(path, output, checkpoint) == 0
    assert capsys.readouterr().out == f"{output}: 3 of 60 frames filled\n"
    filled = load_scan(output)
    sidecar = json.loads((output.parent / "sub-1_timeseries.json").read_text())
    assert sidecar["FilledFrames"] == [10, 11, 30]
    described = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"
    assert {"Name", "BIDSVersion", "GeneratedBy"} <= set(described)
    unnamed = (tmp_path / "out" / ".bidsignore").read_text().split()
    files = [p.name for p in (tmp_path / "out").rglob("sub-1*") if p.is_file()]
    assert len(files) == 3
    for name in files:
        assert any(fnmatch(name, pattern) for pattern in unnamed), "BIDS has no name for it yet"
    assert np.array_equal(filled.values[~censored], values[~censored])
    assert np.array_equal(filled.censored, censored)
    kept = values[~censored].astype(float)
    mean = kept.mean(0)
    sd = kept.std(0)
    z = torch.tensor((damaged - mean) / sd, dtype=torch.float32)[None]
    model = from_pretrained(checkpoint).model
    with torch.no_grad():
        y = model(z, 0.8, censored=torch.tensor(censored)[None]).reconstruction[0].numpy()
    np.testing.assert_allclose(filled.values[censored], (y * sd + mean)[censored], rtol=1e-5)
    whole = tmp_path / "out" / "sub-1_timeseries.tsv"
    assert reconstruct(path, whole, checkpoint, "--whole", "--json") == 0
    np.testing.assert_allclose(load_scan(whole).values, y * sd + mean, rtol=1e-4)


def test_what_cannot_be_filled(checkpoint, tmp_path, capsys):
    values = np.random.default_rng(0).standard_normal((60, 6)).astype(np.float32)
    path = save_scan(Scan("sub-2", values, 0.8, PARCELS), tmp_path / "sub-2.ptseries.nii")
    assert reconstruct(path, tmp_path / "out" / "sub-2_timeseries.tsv", checkpoint) == 1
    assert "no frame is censored" in capsys.readouterr().err
    assert reconstruct(path, tmp_path / "sub-2_timeseries.tsv", checkpoint, "--whole") == 1
    assert "would be taken for another scan" in capsys.readouterr().err
    assert reconstruct(tmp_path, tmp_path / "out" / "sub-2.tsv", checkpoint) == 1
    assert "is a folder; name the file of one scan" in capsys.readouterr().err


def write_scan(folder, parcels=PARCELS, t_r=0.8):
    rows = np.random.default_rng(0).standard_normal((40, len(parcels)))
    lines = ["\t".join(parcels), *("\t".join(f"{v:.4f}" for v in row) for row in rows)]
    path = folder / "sub-1_timeseries.tsv"
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".json").write_text(json.dumps({"RepetitionTime": t_r}))
    return path


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ({"parcels": PARCELS[:5]}, "expected 6 parcels, got 5"),
        ({"parcels": [f"q{i}" for i in range(6)]}, "column 1 is 'q0', expected 'p0'"),
        ({"parcels": PARCELS[::-1]}, "column 1 is 'p5', expected 'p0'"),
        ({"t_r": 800}, "looks like milliseconds (0.8 s)"),
    ],
)
def test_a_scan_that_does_not_fit(scan, message, checkpoint, tmp_path, capsys):
    path = write_scan(tmp_path, **scan)
    assert embed(path, tmp_path / "e.csv", checkpoint) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e.csv").exists()


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("e.xlsx", [], "output must end in .csv, .tsv, .parquet"),
        ("folder.csv", [], "is a folder; name the file to write"),
        ("sub-1_timeseries.tsv", [], "which is read; name another output"),
        ("sub-1_timeseries.tsv/e.csv", [], "sub-1_timeseries.tsv"),
        ("e.csv", ["--readout", "nonsense"], "read-out must be one of"),
        ("e.csv", ["--device", "nonsense"], "nonsense"),
        ("e.csv", ["absent.tsv"], "absent.tsv: there is no such file or folder"),
        ("e.csv", ["empty"], "empty: no file ending in _timeseries.tsv"),
    ],
)
def test_an_argument_that_does_not_fit(
    output, more, message, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    scan = write_scan(tmp_path)
    Path("folder.csv").mkdir()
    Path("empty").mkdir()
    before = scan.read_bytes()
    words = [*more, "-o", output] if more and not more[0].startswith("-") else ["-o", output, *more]
    assert main(["embed", str(scan), *words, "-c", str(checkpoint)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("mnemodyn: ")
    assert printed.count("\n") == 1
    assert message in printed
    assert scan.read_bytes() == before


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_that_cannot_be_used(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan = write_scan(tmp_path)
    save_checkpoint("model", from_pretrained(checkpoint))
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    assert embed(scan, "e.csv", "model") == 1
    assert "damaged: its SHA-256 is" in capsys.readouterr().err
    Path("bomb.ckpt").write_bytes(pickle.dumps(Bomb()))
    assert embed(scan, "e.csv", "bomb.ckpt", "--compat", "reference") == 1
    assert "nothing in it was executed" in capsys.readouterr().err
    assert not Path("exploded").exists()
    draft = ROOT / "tests/golden/lightning-epoch=01-val_mae=0.5000.ckpt"
    assert embed(scan, "e.csv", draft, "--compat", "reference") == 1
    assert "does not state its scaling" in capsys.readouterr().err
    assert embed(scan, "e.csv", checkpoint, "--scaling", "raw") == 2
    assert "states its own scaling" in capsys.readouterr().err


def test_a_draft_reads_windows_of_its_own_length(tmp_path):
    draft = ROOT / "tests/golden/lightning-epoch=01-val_mae=0.5000.ckpt"
    model = from_pretrained(draft, compat="reference").model
    config = model.config
    names = tuple(f"p{i}" for i in range(config.n_parcels))
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2 * config.n_timepoints + 3, len(names))).astype(np.float32)
    path = save_scan(Scan("sub-1", values, 2.0, names), tmp_path / "sub-1.ptseries.nii")
    output = tmp_path / "e.csv"
    more = ["--compat", "reference", "--scaling", "raw", "--readout", "last_frame"]
    with pytest.warns(UserWarning, match="does not state its parcels"):
        assert embed(path, output, draft, *more) == 0
    windows = torch.tensor(values[:-3]).view(2, config.n_timepoints, len(names))
    with torch.no_grad():
        wanted = model(windows).reconstruction[:, -1].mean(0).numpy()
    found = pd.read_csv(output).filter(regex="last_frame").to_numpy()[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_full_disk_is_no_refused_scan(scans, checkpoint, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert embed(scans, tmp_path / "e.csv", checkpoint) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "e.csv").exists()


def test_ten_lines_from_the_hub_to_a_cross_validated_score(
    scans, checkpoint, tmp_path, monkeypatch
):
    """The lines of the book, run against the loopback hub."""
    import huggingface_hub
    from hub_server import TOKEN, Hub

    from mnemodyn.hub import write_folder

    hub = Hub()
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    api = huggingface_hub.HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("NAME/MODEL")
    folder = write_folder(checkpoint, tmp_path / "folder", repo_id="NAME/MODEL")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with pytest.warns(DeprecationWarning, match="Use 'content="):
        api.upload_folder(repo_id="NAME/MODEL", folder_path=folder)
    page = (ROOT / "book" / "own_data.md").read_text(encoding="utf-8")
    lines = page.split("% ten lines\n```python\n")[1].split("```")[0]
    ids = [f"sub-{i:02}" for i in range(12)]
    people = pd.DataFrame({"participant_id": ids, "diagnosis": [0, 1] * 6})
    people.sample(frac=1, random_state=0).to_csv(scans / "participants.tsv", sep="\t", index=False)
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
    assert 0 <= float(done.stdout.split()[-1]) <= 1


def test_an_hour_in_seconds_and_bounded_memory(tmp_path):
    """450 parcels, 5000 frames of 0.72 s: the network of the quick profile's size."""
    config = ModelConfig(
        n_parcels=450, n_timepoints=240, n_blocks=2, n_channels=48, input_width=48, n_levels=4
    )
    parcels = tuple(f"p{i}" for i in range(450))
    model = save_checkpoint(
        tmp_path / "model", Checkpoint(MnemoDyn(config), parcels, 0.72, Scaling())
    )
    values = np.random.default_rng(0).standard_normal((5000, 450)).astype(np.float32)
    path = save_scan(Scan("sub-1", values, 0.72, parcels), tmp_path / "sub-1.ptseries.nii")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    assert embed(path, tmp_path / "e.csv", model) == 0
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024


def test_one_series_under_two_people_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = write_scan(folder)
    shutil.copy(path, folder / "sub-2_timeseries.tsv")
    shutil.copy(path.with_suffix(".json"), folder / "sub-2_timeseries.json")
    assert embed(folder, tmp_path / "e.csv", checkpoint) == 0
    assert len(pd.read_csv(tmp_path / "e.csv")) == 1
    refused = pd.read_csv(tmp_path / "e_refused.tsv", sep="\t")
    assert list(refused["problem"]) == ["duplicate-series"]
