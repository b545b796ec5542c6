"""The store: what goes in comes out, whatever interrupts it."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mnemodyn.data.store
from mnemodyn.data.cohorts import index as cohort_index
from mnemodyn.data.collection import Collection, open_scans
from mnemodyn.data.scaling import METHODS, Scaling
from mnemodyn.data.scans import DataError, Scan, save_scan
from mnemodyn.data.store import Store, convert
from mnemodyn.files import locked

PARCELS = tuple("abcde")


def scan(i, n_frames=None, t_r=None, parcels=PARCELS):
    rng = np.random.default_rng(i)
    n = n_frames or 40 + 7 * (i % 5)
    values = 10_000 + 50 * rng.standard_normal((n, len(parcels))).cumsum(0) * np.arange(
        1, len(parcels) + 1
    )
    return Scan(
        f"sub-{i:04d}",
        values.astype(np.float32),
        t_r or (0.72, 2.0)[i % 2],
        parcels,
        "Test",
        f"{i}.tsv",
    )


class Lazy(Sequence):
    """Scans made on demand; those of `broken` cannot be read."""

    def __init__(self, numbers, broken=()):
        self.numbers = numbers
        self.broken = broken
        self.loaded = []

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, row):
        i = self.numbers[row]
        self.loaded.append(i)
        if i in self.broken:
            raise DataError(f"{i}.tsv: truncated", problem="truncated")
        return scan(i)


def index(numbers, broken=(), excluded=None, folder=None):
    """A collection like that of a cohort's index."""
    rows = [
        {"path": f"{i}.tsv", "participant_id": f"sub-{i:04d}", "age": 20 + i, "code": f"00{i}"}
        for i in numbers
    ]
    return Collection(Lazy(numbers, broken), pd.DataFrame(rows), excluded, folder=folder)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_goes_in_comes_out(tmp_path, dtype):
    scans = [scan(i) for i in range(7)]
    store = convert(scans, tmp_path / "store", dtype=dtype)
    assert len(store) == 7
    assert (store.parcels, store.atlas, store.dtype) == (PARCELS, "Test", dtype)
    assert list(store.table["participant_id"]) == [s.participant_id for s in scans]
    worst = 0.0
    for there, here, row in zip(store, scans, store.table.itertuples(), strict=True):
        assert (there.participant_id, there.t_r, there.source) == (
            here.participant_id,
            here.t_r,
            here.source,
        )
        x = here.values.astype(float)
        off = (there.values - x) / x.std(0)
        worst = max(worst, np.abs(off).max())
        assert row.error_max == pytest.approx(np.abs(off).max(), rel=1e-6)
    # Half a unit in the last place of a float16 below 8, and nothing for float32.
    assert worst == 0 if dtype == "float32" else 1e-5 < worst < 2**-9
    assert store.verify() == 7
    assert [len(p) for p in (store[2:5], store.select(np.arange(7) > 4))] == [3, 2]
    assert store[2:5][1].participant_id == scans[3].participant_id


def test_index_is_kept_with_its_types_and_reasons(tmp_path):
    outside = pd.DataFrame([{"file": "x.tsv", "problem": "nan", "message": "x.tsv: NaN"}])
    store = convert(index([1, 2, 3], broken=(2,), excluded=outside), tmp_path / "store")
    assert list(store.table["code"]) == ["001", "003"]
    assert list(store.table["age"]) == [21, 23]
    assert store.table["site"].isna().all()
    assert list(store.excluded["problem"]) == ["nan", "truncated"]
    assert store.excluded["message"].iloc[1] == "2.tsv: truncated"
    other = convert([scan(0), scan(1, parcels=("a", "b", "c", "e", "d"))], tmp_path / "other")
    assert (len(other), *other.excluded["problem"]) == (1, "parcel-order")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_windows_are_scaled_with_the_whole_scan(tmp_path, dtype):
    scans = [scan(i) for i in range(6)]
    store = convert(scans, tmp_path / "store", dtype=dtype)
    for method in METHODS:
        scaling = Scaling(method).fit(scans)
        for i in (0, 3, 5):
            expected = scaling(scans[i])[5:25]
            # The error of a float16 z-score, in the units of the method.
            atol = 4e-3 * scans[i].values.std(0).max() / scaling.affine(store.moments(i))[1].min()
            np.testing.assert_allclose(
                store.read(i, 5, 25, scaling), expected, rtol=1e-5, atol=atol
            )


def test_constant_parcels_and_lost_frames(tmp_path):
    values = scan(3).values.copy()
    values[:, 1] = 9_999.3
    censored = np.zeros(len(values), dtype=bool)
    censored[[4, 9]] = True
    values[4] = np.nan
    values[9, 0] = 1e9
    flat = replace(scan(3), values=values, censored=censored, session="2", run="1", mean_fd=0.2)
    store = convert([flat, scan(4)], tmp_path / "store")
    x = store.read(0)
    assert (x[:, 1] == 0).all()
    assert (x[4] == 0).all()
    kept = values[~censored].astype(float)
    np.testing.assert_allclose(
        x[~censored, 2], (kept[:, 2] - kept[:, 2].mean()) / kept[:, 2].std(), atol=4e-3
    )
    assert (store[0].session, store[0].run, store[0].mean_fd, store[1].mean_fd) == (
        "2",
        "1",
        0.2,
        None,
    )
    np.testing.assert_array_equal(store[0].constant, [False, True, False, False, False])
    assert store.table["n_usable"].tolist() == [len(values) - 2, 68]
    np.testing.assert_array_equal(store.censored(0), censored)
    np.testing.assert_array_equal(store.censored(0, 5, 20), censored[5:20])
    assert store.censored(1) is None
    assert store.verify() == 2
    for copy in (replace(store[0], t_r=3.0), pickle.loads(pickle.dumps(store[0]))):
        np.testing.assert_array_equal(copy.values, store[0].values)
        assert (copy.n_frames, copy.n_usable) == (len(values), len(values) - 2)


def test_more_scans_leave_old_bytes_alone(tmp_path):
    first = convert(index([0, 1, 2, 3, 4], broken=(3,)), tmp_path / "store")
    before = content(tmp_path / "store")
    store = convert(index([9, 0, 1, 2, 3, 4, 5], broken=(3,)), tmp_path / "store")
    after = content(tmp_path / "store")
    assert {name for name in before if after[name] != before[name]} == {"store.json"}
    assert [s.source for s in store] == ["9.tsv", "0.tsv", "1.tsv", "2.tsv", "4.tsv", "5.tsv"]
    assert first.fingerprint != store.fingerprint
    assert first.fingerprint == store[1:5].fingerprint
    assert len(store.excluded) == 1


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_store import index, convert
scans = index(list(range(60)), broken=(7, 41))
print("ready", flush=True)
convert(scans, {folder!r}, progress=lambda *_: time.sleep(0.003))
"""


def test_killed_at_random_moments_ends_in_the_same_bytes(tmp_path):
    whole = convert(index(list(range(60)), broken=(7, 41)), tmp_path / "whole")
    folder = tmp_path / "killed"
    code = KILLED.format(tests=str(__file__).rpartition("/")[0], folder=str(folder))
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(rng.uniform(0.02, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        seen.append(len(list(folder.glob("scans/*.bin"))))
        if not (folder / "store.json").exists():
            with pytest.raises(DataError, match="has not ended; run it again"):
                Store(folder)
    assert seen[0] < 60  # it was killed before its end
    assert seen == sorted(seen)  # and lost nothing of what was there
    again = convert(index(list(range(60)), broken=(7, 41)), folder)
    assert content(folder) == content(tmp_path / "whole")
    assert again.fingerprint == whole.fingerprint


def test_what_a_conversion_was_killed_in_the_middle_of_goes(tmp_path):
    folder = tmp_path / "store"
    convert([scan(i) for i in range(4)], tmp_path / "whole")
    convert([scan(i) for i in range(3)], folder)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (folder / "scans" / f".x.bin.{dead.pid}-0123abcd-0123abcd.tmp").write_bytes(b"half a")
    assert Store(folder).verify() == 3
    assert convert([scan(i) for i in range(4)], folder).verify() == 4
    assert content(folder) == content(tmp_path / "whole")


def test_damage_is_a_named_problem(tmp_path):
    def problem(name, change, look=Store.verify):
        folder = tmp_path / name
        store = convert([scan(i) for i in range(4)], folder)
        change(folder, store._file(2)[0])
        with pytest.raises(DataError) as caught:
            look(Store(folder))
        return caught.value.problem

    def flip(path, at):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    def age(folder, _):
        path = folder / "store.json"
        path.write_text(path.read_text().replace('"t_r": 2.0', '"t_r": 3.0'))

    def cut(_, path):
        path.write_bytes(path.read_bytes()[:-10])

    assert problem("moments", lambda _, path: flip(path, 5)) == "checksum"
    assert problem("values", lambda _, path: flip(path, -5)) == "checksum"
    assert problem("rows", age) == "checksum"
    assert problem("cut", cut, lambda store: store.read(2)) == "truncated"
    assert (
        problem("gone", lambda _, path: path.unlink(), lambda store: store.read(2)) == "truncated"
    )
    assert problem("gone too", lambda _, path: path.unlink()) == "checksum"
    assert problem("half", lambda folder, _: (folder / "store.json").write_text("{")) == "truncated"
    assert problem("none", lambda folder, _: (folder / "store.json").unlink()) == "unfinished"
    old = lambda folder, _: (folder / "store.json").write_text("{}")  # noqa: E731
    assert problem("old", old) == "format"


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="dtype must be one of"):
        convert([scan(0)], tmp_path / "a", dtype="int8")
    with pytest.raises(DataError, match="two scans share"):
        convert([scan(0), scan(0)], tmp_path / "a")
    for _ in range(2):
        with pytest.raises(DataError, match="none of the 1 scans"):
            convert(index([1], broken=(1,)), tmp_path / "b")
    with pytest.raises(DataError, match="no store"):
        Store(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not a store"):
        convert([scan(0)], tmp_path / "c")
    convert([scan(0)], tmp_path / "d")
    with pytest.raises(DataError, match="dtype 'float16', but dtype is 'float32' here"):
        convert([scan(0)], tmp_path / "d", dtype="float32")


@pytest.fixture
def cohort(tmp_path):
    """A folder of four scans of the cohort `bids`, and what converts it."""
    folder = tmp_path / "in"
    for i in range(4):
        write_source(folder, i)
    write_people(folder, "FMFM")

    def again(to="store", **settings):
        return convert(cohort_index("bids", folder), tmp_path / to, **settings)

    return folder, again


def write_source(folder, i, seed=0, t_r=2.0):
    one = replace(scan(i, 40, t_r), values=scan(i + seed, 40).values)
    save_scan(one, folder / f"sub-000{i}" / f"sub-000{i}_task-rest_timeseries.tsv")


def write_people(folder, sexes):
    rows = [f"sub-000{i}\t{20 + i}\t{sex}" for i, sex in enumerate(sexes)]
    (folder / "participants.tsv").write_text("participant_id\tage\tsex\n" + "\n".join(rows))


def change_values(folder):
    before = (folder / "sub-0001/sub-0001_task-rest_timeseries.tsv").stat()
    text = (folder / "sub-0001/sub-0001_task-rest_timeseries.tsv").read_text()
    # Neither the size nor the time of the file tells.
    at = text.index("\n") + 3
    text = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    (folder / "sub-0001/sub-0001_task-rest_timeseries.tsv").write_text(text)
    os.utime(folder / "sub-0001/sub-0001_task-rest_timeseries.tsv", ns=(before.st_mtime_ns,) * 2)


def change_sidecar(folder):
    (folder / "sub-0001/sub-0001_task-rest_timeseries.json").write_text('{"RepetitionTime": 3}')


def change_outliers(folder):
    rows = ["framewise_displacement", *("1" * 5), *("0" * 35)]
    (folder / "sub-0001/sub-0001_task-rest_outliers.tsv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("change", [change_values, change_sidecar, change_outliers])
def test_a_scan_that_has_changed_is_converted_again(tmp_path, cohort, change, dtype):
    folder, again = cohort
    first = again(dtype=dtype)
    assert again(dtype=dtype).verify() == 4
    before = content(tmp_path / "store")
    change(folder)
    with pytest.raises(DataError, match=r"sub-0001_task.* has changed since \(.*convert again"):
        first.verify()
    with pytest.warns(UserWarning, match="1 scans are not as they were.*sub-0001"):
        store = again(dtype=dtype)
    assert store.verify() == 4
    fresh = again("fresh", dtype=dtype)
    assert content(tmp_path / "store") == content(tmp_path / "fresh")
    assert store.fingerprint == fresh.fingerprint != first.fingerprint
    # The other scans were left alone.
    assert len(set(before.items()) & set(content(tmp_path / "store").items())) == 3 * 2 + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again(dtype=dtype).verify() == 4


def test_labels_are_those_of_the_last_call(cohort):
    folder, again = cohort
    first = again()
    write_people(folder, "MFMF")
    with pytest.raises(DataError, match=r"has changed since \(sex\); convert again") as caught:
        first.verify()
    assert caught.value.problem == "stale"
    assert again().table["sex"].tolist() == ["male", "female", "male", "female"]
    assert Store(first.folder).verify() == 4


def test_sources_that_are_gone_are_not_missed(tmp_path, cohort):
    folder, again = cohort
    store = again()
    write_source(folder, 9)  # nor is what was never converted
    (folder / "sub-0002/sub-0002_task-rest_timeseries.tsv").unlink()
    assert store.verify() == 4
    shutil.rmtree(folder)
    assert store.verify() == 4


def test_a_scan_that_changes_while_it_is_converted_is_left_out(tmp_path, cohort):
    folder, _ = cohort
    found = cohort_index("bids", folder)
    change_values(folder)
    store = convert(found, tmp_path / "store")
    assert len(store) == 3
    assert store.excluded["problem"].tolist() == ["changed"]


def test_a_damaged_file_of_a_store_is_written_again(tmp_path, cohort):
    _, again = cohort
    store = again()
    good = content(tmp_path / "store")
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"?"), Path.unlink):
        damage(store._file(1)[0])
        with pytest.raises(DataError, match="checksum.*convert again"):
            Store(store.folder).verify()
        again()
        assert content(tmp_path / "store") == good


def test_a_store_has_one_writer_and_is_not_its_own_source(tmp_path):
    store = convert([scan(i) for i in range(3)], tmp_path / "store")
    before = content(tmp_path / "store")
    with locked(tmp_path / "store", "another"), pytest.raises(RuntimeError, match="let it end"):
        convert([scan(1)], tmp_path / "store")
    (tmp_path / "link").symlink_to("store")
    with pytest.raises(DataError, match="is the folder that is read"):
        convert(store, tmp_path / "link")
    assert content(tmp_path / "store") == before


def test_a_folder_of_scans_is_no_store(tmp_path):
    (tmp_path / "a" / "scans").mkdir(parents=True)
    (tmp_path / "a" / "scans" / "sub-01.tsv").write_text("mine")
    with pytest.raises(DataError, match="not a store, it holds"):
        convert([scan(0)], tmp_path / "a")
    assert content(tmp_path / "a") == {"sub-01.tsv": b"mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row, _: row.update(file="../../other/scans/" + row["file"]),
            "no file of the store",
        ),
        (lambda row, folder: row.update(file=f"{folder}/other/x"), "no file of the store"),
        (lambda row, _: row.update(file=7), "remove it, and convert again"),
        (lambda row, _: row.update(n_frames=10**12), "expected .* bytes, found"),
        (lambda row, _: row.update(n_frames=10**12, censored=[10**11]), "expected .* bytes, found"),
        (lambda row, _: row.update(censored=[4, 10**9]), "that it does not have"),
        (lambda row, _: row.update(censored=[-(10**9)]), "that it does not have"),
        (lambda row, _: row.update(n_frames="many"), "remove it, and convert again"),
        (lambda row, _: row.pop("n_frames"), "remove it, and convert again"),
    ],
)
def test_a_store_names_only_what_it_has(tmp_path, change, message):
    """The one who changes it knows how its checksum is made."""
    convert([scan(i) for i in range(3)], tmp_path / "other")
    folder = convert([scan(i) for i in range(3)], tmp_path / "store").folder
    listed = json.loads((folder / "store.json").read_text())
    listed.pop("sha256")
    change(listed["scans"][1], tmp_path)
    listed["sha256"] = mnemodyn.data.store._checksum(listed)
    (folder / "store.json").write_text(json.dumps(listed))
    with pytest.raises(DataError, match=message):
        np.asarray(Store(folder)[1].values)


def test_who_is_in_a_store_is_known_without_its_values(tmp_path):
    convert([scan(i) for i in range(4)], tmp_path / "store")
    store = Store(tmp_path / "store")
    for there, here in zip(store, map(scan, range(4)), strict=True):
        assert (there.participant_id, there.n_frames, there.t_r) == (
            here.participant_id,
            here.n_frames,
            here.t_r,
        )
        assert "values" not in vars(there)
    with pytest.raises(IndexError):
        store[4]
    assert store[-1].participant_id == "sub-0003"


def test_the_command(tmp_path, capsys):
    from mnemodyn.cli import main

    folder, to = str(tmp_path / "abide"), str(tmp_path / "store")
    assert main(["simulate", "abide", folder, "--participants", "12", "--frames", "60"]) == 0
    assert main(["convert", "abide", folder, to]) == 0
    printed = capsys.readouterr().out
    store = open_scans(to)
    assert f"{len(store)} scans of" in printed
    assert "SIMULATED" in printed
    assert "left out: " in printed
    assert {"site", "age", "sex"} <= set(store.table)
    assert store.verify() == len(store) > 5
    assert main(["convert", "abide", folder, to, "--dtype", "float32"]) == 1


def test_a_store_is_opened_and_pickled(tmp_path):
    convert([scan(i) for i in range(3)], tmp_path / "store")
    store = open_scans(tmp_path / "store")
    assert isinstance(store, Store)
    store.read(0)
    data = pickle.dumps(store)
    assert len(data) < 20_000  # no values travel
    np.testing.assert_array_equal(pickle.loads(data).read(1), store.read(1))


def test_frames_that_are_not_there(tmp_path):
    store = convert([scan(0, 40)], tmp_path / "store")
    for start, stop in ((0, 41), (-1, 5), (5, 5)):
        with pytest.raises(IndexError, match="frames must lie in 0 ... 40"):
            store.read(0, start, stop)
