"""Commands given again, together, or into places that hold something: nothing is lost, nothing stale is kept."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import mnemodyn.data.simulate
from mnemodyn import (
    Checkpoint,
    MnemoDyn,
    ModelConfig,
    Scaling,
    Scan,
    files,
    load_scan,
    save_checkpoint,
)
from mnemodyn.cli import main
from mnemodyn.data.preprocess import Preprocessing, preprocess, save_derived
from mnemodyn.data.scans import DataError, save_scan
from mnemodyn.data.simulate import simulate_cohort
from mnemodyn.data.store import convert
from mnemodyn.embed import embed, reconstruct
from mnemodyn.files import OutputError, begins_with, check_output, locked
from mnemodyn.results import write_results

PARCELS = tuple(f"p{i}" for i in range(6))


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=6, n_timepoints=32, n_channels=4, input_width=4, field_rank=2, n_levels=2
    )
    return Checkpoint(MnemoDyn(config).eval(), PARCELS, 0.8, Scaling())


def scan(i, n_frames=50, censored=(3, 4)):
    values = np.random.default_rng(i).standard_normal((n_frames, 6)).astype(np.float32)
    out = np.zeros(n_frames, bool)
    out[list(censored)] = True
    return Scan(f"sub-{i}", values, 0.8, PARCELS, censored=out)


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        place = tmp_path / "in" / f"sub-{i}" / "func"
        place.mkdir(parents=True)
        save_scan(scan(i), place / f"sub-{i}_task-rest_timeseries.tsv")
    return tmp_path / "in"


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The rule


def test_an_output_replaces_an_earlier_result_only(tmp_path):
    def check(name, *inputs):
        check_output(tmp_path / name, "table", begins_with("a", "b"), inputs)

    (tmp_path / "mine.csv").write_text("x,y\n1,2\n")
    (tmp_path / "ours.csv").write_text("a,b,c\n1,2,3\n")
    (tmp_path / "ours.tsv").write_text("a\tb\tc\n1\t2\t3\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "link.csv").symlink_to("mine.csv")
    (tmp_path / "gone.csv").symlink_to("nothing")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    os.link(tmp_path / "ours.csv", tmp_path / "hard.csv")
    for name in ("new.csv", "ours.csv", "ours.tsv", "empty.csv", "absent/new.csv"):
        check(name)
    for name in ("mine.csv", "link.csv", "gone.csv", "loop.csv"):
        with pytest.raises(OutputError, match=f"{name} is there already, and is no table"):
            check(name)
    # By whatever name an input is called, even where it is a table of the same kind.
    (tmp_path / "alias.csv").symlink_to("ours.csv")
    for name in ("ours.csv", "hard.csv", "alias.csv", "../" + tmp_path.name + "/ours.csv"):
        with pytest.raises(OutputError, match="which is read; name another output"):
            check(name, tmp_path / "gone", tmp_path / "ours.csv")
    with pytest.raises(IsADirectoryError, match="is a folder; name the file"):
        check(".")
    with pytest.raises(OutputError):
        check_output("/dev/null", "table", begins_with("a"))


def test_what_embed_finds_in_its_place_stays(folder, checkpoint, tmp_path):
    (tmp_path / "mine.csv").write_text("participant_id,age\nsub-1,20\n")
    (tmp_path / "e.csv").touch()
    (tmp_path / "e_refused.tsv").write_text("my list\n")
    (tmp_path / "link.csv").symlink_to(folder / "sub-0/func/sub-0_task-rest_timeseries.tsv")
    os.link(folder / "sub-1/func/sub-1_task-rest_outliers.tsv", tmp_path / "hard.tsv")
    before = contents(tmp_path)
    for name in ("mine.csv", "e.csv", "link.csv", "hard.tsv"):
        with pytest.raises(OutputError, match="name another output"):
            embed([folder], checkpoint, tmp_path / name)
    assert contents(tmp_path) == before
    (tmp_path / "e_refused.tsv").unlink()
    for _ in range(2):
        assert embed([folder], checkpoint, tmp_path / "e.csv").n_scans == 3
    assert sorted(set(os.listdir(tmp_path)) - {"in"}) == [
        "e.csv",
        "hard.tsv",
        "link.csv",
        "mine.csv",
    ]


@pytest.mark.parametrize(
    "name",
    ["sub-all.csv", "all_timeseries.tsv", "sub-9/func/sub-9.csv", "sub-0/func/sub-0_outliers.tsv"],
)
def test_no_table_becomes_a_scan_of_the_next_call(folder, checkpoint, tmp_path, name):
    (tmp_path / "alias").symlink_to(folder)
    for place in (folder, tmp_path / "alias"):
        with pytest.raises(OutputError, match="by its name a part of the data"):
            embed([folder], checkpoint, place / name)
    for _ in range(2):
        assert embed([folder], checkpoint, folder / "embeddings.csv").n_scans == 3
    store = convert([scan(0)], tmp_path / "store").folder
    with pytest.raises(OutputError, match="lies in the store"):
        embed([store], checkpoint, store / "embeddings.csv")


def test_a_link_in_place_of_what_is_unfinished_is_not_followed(folder, checkpoint, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    (tmp_path / ".e.csv.part").symlink_to(victim)
    (tmp_path / ".f.csv.part").symlink_to(victim / "precious")
    (tmp_path / ".g.csv.part").write_text("what an earlier version was writing")
    for name in ("e.csv", "f.csv", "g.csv"):
        embed([folder], checkpoint, tmp_path / name)
    assert contents(victim) == {str(victim / "precious"): b"mine"}
    assert not list(tmp_path.glob(".*"))


def test_a_read_out_that_is_no_number_is_named(folder, checkpoint, tmp_path):
    path = folder / "sub-1/func/sub-1_task-rest_timeseries.tsv"
    huge = scan(1)
    huge.values[:, 2] *= np.float32(1e38) / np.abs(huge.values[:, 2]).max()
    save_scan(huge, path)
    raw = replace(checkpoint, scaling=Scaling("raw"))
    done = embed([folder], raw, tmp_path / "e.csv")
    assert done.n_scans == 2
    assert [row["problem"] for row in done.refused] == ["not-finite"]
    assert np.isfinite(pd.read_csv(tmp_path / "e.csv").filter(like="latent").to_numpy()).all()
    with pytest.raises(DataError, match="sub-1_task.* is NaN or infinite; look at the checkpoint"):
        reconstruct(path, raw, tmp_path / "out" / path.name)
    assert not (tmp_path / "out" / path.name).exists()


# Scans that are computed


def test_reconstruct_replaces_what_it_wrote_only(folder, checkpoint, tmp_path):
    path = folder / "sub-0/func/sub-0_task-rest_timeseries.tsv"
    output = tmp_path / "out" / "sub-0/func/sub-0_task-rest_desc-filled_timeseries.tsv"
    reconstruct(path, checkpoint, output)
    first = contents(tmp_path / "out")
    reconstruct(path, checkpoint, output)
    assert contents(tmp_path / "out") == first
    save_scan(scan(0, censored=(7,)), path)
    reconstruct(path, checkpoint, output)
    np.testing.assert_array_equal(np.flatnonzero(load_scan(output).censored), [7])
    # The output of an earlier call as input of the next.
    with pytest.raises(OutputError):
        reconstruct(output, checkpoint, output)


@pytest.mark.parametrize("name", ["timeseries.tsv", "timeseries.json", "outliers.tsv"])
def test_reconstruct_leaves_other_files(folder, checkpoint, tmp_path, name):
    path = folder / "sub-0/func/sub-0_task-rest_timeseries.tsv"
    place = tmp_path / "out" / f"sub-0_task-rest_{name}"
    place.parent.mkdir()
    place.write_text('{"GeneratedBy": [{"Name": "XCP-D"}], "Note": "precious"}')
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=f"{name} is there already"):
        reconstruct(path, checkpoint, place.parent / path.name)
    assert contents(tmp_path) == before
    assert len(list(place.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "name",
    [
        "sub-0/func/sub-0_task-rest_timeseries.ptseries.nii",
        "sub-0/func/sub-0_task-rest_desc-filled_timeseries.tsv",
        "sub-0/func/sub-9_timeseries.tsv",
        "sub-0/sub-0_task-rest_timeseries.tsv",
        "sub-9/func/sub-9_timeseries.tsv",
    ],
)
def test_reconstruct_adds_no_scan_to_the_folder_it_reads(folder, checkpoint, tmp_path, name):
    path = folder / "sub-0/func/sub-0_task-rest_timeseries.tsv"
    (tmp_path / "alias").symlink_to(folder)
    before = contents(folder)
    for place in (folder, tmp_path / "alias"):
        with pytest.raises(OutputError, match="write into another folder"):
            reconstruct(path, checkpoint, place / name, whole=True)
    assert contents(folder) == before


def test_a_sidecar_of_another_version_is_ours(tmp_path):
    output = tmp_path / "sub-0_timeseries.tsv"
    save_derived(scan(0), output, {})
    said = json.loads(output.with_suffix(".json").read_text())
    said["GeneratedBy"][0]["Version"] = "0.0.1"
    output.with_suffix(".json").write_text(json.dumps(said))
    save_derived(scan(1), output, {"Note": 1})
    assert json.loads(output.with_suffix(".json").read_text())["Note"] == 1
    np.testing.assert_array_equal(load_scan(output).values, scan(1).values)
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["sub-0_outliers.tsv", output.name, "sub-0_timeseries.json"]
    )


def test_a_bidsignore_of_others_stays(folder, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.bidsignore").write_text("mine\n")
    name = "sub-0/func/sub-0_task-rest_timeseries.tsv"
    reconstruct(folder / name, checkpoint, tmp_path / "out" / name)
    assert (tmp_path / "out/.bidsignore").read_text() == "mine\n"


@pytest.fixture
def volumes(tmp_path):
    """A small series of volumes with its sidecar and confounds, and an atlas with names."""
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.resize([0, 1, 2], 60)).reshape(5, 4, 3)
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16), np.eye(4)), tmp_path / "seg.nii.gz")
    (tmp_path / "seg.tsv").write_text("index\tname\n1\tone\n2\ttwo\n")
    image = nibabel.Nifti1Image(rng.normal(50, 1, (5, 4, 3, 20)).astype(np.float32), np.eye(4))
    (tmp_path / "in").mkdir()
    source = tmp_path / "in/sub-1_task-rest_bold.nii"
    image.to_filename(source)
    (tmp_path / "in/sub-1_task-rest_bold.json").write_text('{"RepetitionTime": 2.0}')
    confounds = pd.DataFrame(rng.normal(size=(20, 2)), columns=["a", "b"])
    confounds["motion_outlier00"] = (confounds.index == 4).astype(int)
    confounds.to_csv(
        tmp_path / "in/sub-1_task-rest_desc-confounds_timeseries.tsv", sep="\t", index=False
    )
    return tmp_path


def edit(path, old, new):
    """Change a file and leave its size and its times as they are."""
    times = path.stat()
    content = path.read_bytes()
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    assert path.read_bytes() != content
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_preprocess_knows_a_change_by_content(volumes):
    settings = Preprocessing(str(volumes / "seg.nii.gz"), confounds=("a",))
    output = volumes / "out/sub-1/func/sub-1_task-rest_seg-seg_stat-mean_timeseries.tsv"

    def again():
        return preprocess([volumes / "in"], volumes / "out", settings)["status"].tolist()

    assert again() == ["done"]
    assert again() == ["skipped"]
    image = volumes / "in/sub-1_task-rest_bold.nii"
    last = image.read_bytes()[-4:]
    edit(image, last, np.float32(90).tobytes())
    assert again() == ["done"]
    edit(volumes / "in/sub-1_task-rest_bold.json", b"2.0", b"3.0")
    assert again() == ["done"]
    assert load_scan(output).t_r == 3
    edit(volumes / "seg.tsv", b"one", b"ONE")
    assert again() == ["done"]
    assert load_scan(output).parcels == ("ONE", "two")
    table = volumes / "in/sub-1_task-rest_desc-confounds_timeseries.tsv"
    confounds = pd.read_csv(table, sep="\t")
    confounds["motion_outlier00"] = (confounds.index == 5).astype(int)
    confounds.to_csv(table, sep="\t", index=False)
    assert again() == ["done"]
    np.testing.assert_array_equal(np.flatnonzero(load_scan(output).censored), [5])
    assert again() == ["skipped"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_preprocess_leaves_scans_of_others(volumes):
    output = volumes / "out/sub-1/func/sub-1_task-rest_seg-seg_stat-mean_timeseries.tsv"
    output.parent.mkdir(parents=True)
    output.write_text("one\ttwo\n1\t2\n3\t4\n")
    output.with_suffix(".json").write_text('{"RepetitionTime": 2.0, "Note": "precious"}')
    before = contents(output.parent)
    settings = Preprocessing(str(volumes / "seg.nii.gz"))
    rows = preprocess([volumes / "in"], volumes / "out", settings)
    assert rows["problem"].tolist() == ["output"]
    assert "is there already" in rows["message"][0]
    assert contents(output.parent) == before


# Tables and notebooks


def test_tables_of_index_and_evaluate_leave_other_files(tmp_path, capsys):
    simulate_cohort("abide", tmp_path / "abide", n_participants=8, n_frames=60)
    before = contents(tmp_path)

    def refused(*words):
        assert main(list(map(str, words))) == 1
        assert contents(tmp_path) == before
        return capsys.readouterr().err

    phenotypes = next(p for p in (tmp_path / "abide").rglob("*.csv"))
    index = ["index", "abide", tmp_path / "abide", "--table"]
    evaluate = ["evaluate", "abide", tmp_path / "abide", "--target", "sex", "-o"]
    scan = next((tmp_path / "abide").rglob("*.1D"))
    assert "is there already" in refused(*index, scan)
    assert "a table of results is a .csv" in refused(*evaluate, scan)
    for command in (index, evaluate):
        assert "is there already" in refused(*command, phenotypes)
        assert "by its name a part of the data" in refused(*command, tmp_path / "abide/sub-all.csv")
    for _ in range(2):
        assert (
            main(["index", "abide", str(tmp_path / "abide"), "--table", f"{tmp_path}/t.csv"]) == 0
        )
    row = {"data": "x", "task": "t", "method": "m", "score": "s", "value": 1.0, "kind": "real"}
    for _ in range(2):
        write_results(tmp_path / "results.csv", [row])
    with pytest.raises(OutputError, match="is no table of results"):
        write_results(tmp_path / "t.csv", [row])


def test_a_notebook_of_others_is_not_replaced(tmp_path, capsys):
    cell = nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]})
    for name in ("a.ipynb", "mine.ipynb"):
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / name)
    before = contents(tmp_path)
    assert main(["run", str(tmp_path / "a.ipynb"), str(tmp_path / "mine.ipynb")]) == 1
    assert "mine.ipynb is there already" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_pretrain_does_not_write_into_its_data(folder, tmp_path, capsys):
    (tmp_path / "alias").symlink_to(folder)
    before = contents(folder)
    assert main(["pretrain", str(folder), str(tmp_path / "alias")]) == 2
    assert "is the folder that is read" in capsys.readouterr().err
    assert contents(folder) == before


# The home


def test_a_tilde_is_the_home_in_every_command(folder, checkpoint, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    save_checkpoint(home / "net", checkpoint)
    simulate = ["simulate", "abide", "~/abide", "--participants", "8", "--frames", "60"]
    assert main(simulate) == 0
    assert main(["index", "abide", "~/abide", "--table=~/index.csv"]) == 0
    assert main(["convert", "abide", "~/abide", "~/store"]) == 0
    assert main(["embed", str(folder), "--output=~/e.csv", "--checkpoint=~/net"]) == 0
    path = folder / "sub-0/func/sub-0_task-rest_timeseries.tsv"
    assert main(["reconstruct", str(path), f"--output=~/{path.name}", "-c", "~/net"]) == 0
    assert {"abide", "index.csv", "store", "e.csv", path.name} <= set(os.listdir(home))
    assert sorted(os.listdir(tmp_path)) == ["home", "in"]
    embed([folder], checkpoint, "~/f.csv")
    convert([scan(0)], "~/second")
    assert {"f.csv", "second"} <= set(os.listdir(home))
    assert sorted(os.listdir(tmp_path)) == ["home", "in"]


# Together, and killed


def test_two_commands_never_write_one_output(folder, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    path = folder / "sub-0/func/sub-0_task-rest_timeseries.tsv"
    refused = pytest.raises(RuntimeError, match="is being written by this process")
    with locked(tmp_path / "out", "another one"):
        with refused:
            simulate_cohort("abide", tmp_path / "out", n_participants=8, n_frames=60)
        with refused:
            convert([scan(0)], tmp_path / "out")
    with locked(tmp_path / "e.csv", "another one"), refused:
        embed([folder], checkpoint, tmp_path / "e.csv")
    with locked(tmp_path / "out" / path.name, "another one"), refused:
        reconstruct(path, checkpoint, tmp_path / "out" / path.name)
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "e.csv").exists()


def stop_simulation(monkeypatch, after):
    real = mnemodyn.data.simulate._write
    written = []

    def write(*arguments):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(arguments[0])
        real(*arguments)

    monkeypatch.setattr(mnemodyn.data.simulate, "_write", write)


def test_a_simulation_that_was_stopped_goes_on_and_is_never_real(tmp_path, monkeypatch):
    size = {"n_participants": 8, "n_frames": 60}
    whole = simulate_cohort("abide", tmp_path / "whole", **size)
    with monkeypatch.context() as patch:
        stop_simulation(patch, after=5)
        with pytest.raises(KeyboardInterrupt):
            simulate_cohort("abide", tmp_path / "abide", **size)
    assert json.loads((tmp_path / "abide/simulated.json").read_text())["simulated"]
    with pytest.raises(DataError, match="a simulation of other arguments that was stopped"):
        simulate_cohort("abide", tmp_path / "abide", seed=1, **size)
    assert simulate_cohort("abide", tmp_path / "abide", **size) == whole

    def inside(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}

    assert inside(tmp_path / "abide") == inside(tmp_path / "whole")
    assert simulate_cohort("abide", tmp_path / "abide", **size) == whole
    with pytest.raises(DataError, match="is not empty"):
        simulate_cohort("abide", tmp_path / "abide", seed=1, **size)


KILLED = """
import os, signal, sys
import mnemodyn.embed
from mnemodyn.cli import main
write = mnemodyn.embed._write_table
def killed(stream, ending, rows):
    stream.write(b"half")
    next(rows)
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
mnemodyn.embed._write_table = killed
main(sys.argv[1:])
"""


def test_what_a_killed_embed_left_goes_with_the_next(folder, checkpoint, tmp_path):
    save_checkpoint(tmp_path / "net", checkpoint)
    output = tmp_path / "out" / "e.csv"
    words = ["embed", str(folder), "-o", str(output), "-c", str(tmp_path / "net")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert len(list(output.parent.iterdir())) == 3  # the lock, the half table, and what is kept
    dead = subprocess.Popen(["true"])
    dead.wait()
    half = f".x.npz.{dead.pid}-{files.MACHINE}-0123abcd.tmp"
    (output.parent / ".e.csv.part" / half).write_text("half")
    assert main(words) == 0
    assert os.listdir(output.parent) == ["e.csv"]


def test_what_a_killed_reconstruct_left_goes_with_the_next(folder, checkpoint, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    out = tmp_path / "out"
    out.mkdir()
    for name in (".bidsignore", "dataset_description.json"):
        (out / f".{name}.{dead.pid}-{files.MACHINE}-0123abcd.tmp").write_text("half")
    path = folder / "sub-1" / "func" / "sub-1_task-rest_timeseries.tsv"
    reconstruct(path, checkpoint, out / "sub-1" / "func" / "sub-1_timeseries.tsv")
    assert sorted(os.listdir(out)) == [".bidsignore", "dataset_description.json", "sub-1"]


def test_a_table_of_another_network_is_not_replaced_in_silence(folder, checkpoint, tmp_path):
    output = tmp_path / "e.csv"
    output.touch()
    embed([folder], checkpoint, output)
    embed([folder], checkpoint, output)  # the same again says nothing
    torch.manual_seed(1)
    other = replace(checkpoint, model=MnemoDyn(checkpoint.model.config).eval())
    for network in (other, checkpoint):
        with pytest.warns(
            UserWarning, match=r"e\.csv: the earlier table.*another network.*replaced"
        ):
            embed([folder], network, output)


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "bids", "IN", "file"],
        ["convert", "bids", "IN", "file/store"],
        ["convert", "bids", "IN", "full"],
        ["convert", "bids", "IN", "store"],
        ["convert", "bids", "IN", "IN"],
        ["evaluate", "bids", "IN", "--target", "sex", "-o", "file/x.csv"],
        ["evaluate", "bids", "IN", "--target", "sex", "-o", "x.csv", "--cache", "file"],
        ["index", "bids", "IN", "--table", "file/x.csv"],
        ["pretrain", "IN", "file"],
        ["pretrain", "IN", "file/run"],
    ],
)
def test_outputs_are_checked_before_the_scans_are_read(
    folder, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    convert([scan(0)], "store", dtype="float32")
    Path("file").write_text("precious")
    Path("full").mkdir()
    Path("full/mine").write_text("precious")
    before = contents(tmp_path)

    def read(*_, **__):
        raise AssertionError("a scan was read")

    monkeypatch.setattr("mnemodyn.data.scans.load_scan", read)
    monkeypatch.setattr("mnemodyn.data.cohorts.load_scan", read)
    monkeypatch.setattr("mnemodyn.data.collection.load_scan", read)
    assert main([str(folder) if word == "IN" else word for word in command]) in (1, 2)
    said = capsys.readouterr().err
    assert "a scan was read" not in said
    assert "name a" in said
    assert contents(tmp_path) == before
