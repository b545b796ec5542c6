"""Digests tell contents apart, results are kept by what they depend on, and files are whole."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from mnemodyn import files
from mnemodyn.files import Kept, digest, locked, read_yaml, remove, write_bytes, write_table


def test_a_digest_is_of_content():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [values, values.copy(), np.asfortranarray(values), torch.from_numpy(values)]
    assert len({digest(each) for each in same}) == 1
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest((1, 2)) == digest([1, 2])


def test_no_two_different_things_have_one_digest():
    values = np.arange(6, dtype=np.float32)
    different = [
        values,
        values.astype(np.float64),
        values.reshape(2, 3),
        values[::-1],
        values.tobytes(),
        "1",
        1,
        1.0,
        True,
        None,
        [1],
        [[1]],
        ["a", "b"],
        ["ab"],
        {"a": "b"},
    ]
    assert len({digest(each) for each in different}) == len(different)
    assert digest("a", "b") != digest("ab")


def test_what_has_no_content_is_refused():
    with pytest.raises(TypeError, match="no digest of a set"):
        digest({1, 2})


def test_a_result_is_kept_by_what_it_depends_on(tmp_path):
    kept = Kept(tmp_path)
    made = []

    def make():
        made.append(len(made))
        return {"n": len(made), "values": (np.arange(2, dtype=np.float32), np.float64(0.5))}

    for _ in range(2):
        found = kept("a", [1, "x"], make)
        assert found["n"] == 1
        assert found["values"][0].tolist() == [0, 1]
        assert found["values"][0].dtype == np.float32
        assert found["values"][1] == 0.5
    assert kept("a", [2, "x"], make)["n"] == 2
    assert kept("b", [1, "x"], make)["n"] == 3


def test_a_damaged_result_is_computed_again(tmp_path):
    kept = Kept(tmp_path)
    kept("a", 1, lambda: np.arange(3.0))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with np.load(path) as content:
        text, checksum, _ = (content[name] for name in content.files)
    np.savez(tmp_path / "one_number.npz", text, checksum, np.array([7.0]))
    one_number = (tmp_path / "one_number.npz").read_bytes()
    for content in (b"", b"[1, 2]", whole[:-40], one_number):
        path.write_bytes(content)
        assert kept("a", 1, lambda: np.arange(4.0)).tolist() == [0, 1, 2, 3]


def test_what_cannot_be_kept_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="objects"):
        Kept(tmp_path).keep("a", 1, np.array([{}]))
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_without_a_folder():
    assert Kept(None)("a", 1, lambda: (1, 2)) == [1, 2]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "a", 3)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_yaml_is_1_2():
    read = read_yaml("a: off\nb: 1e-3\nc: 12:30\nd: [010, true, null]\n")
    assert read["a"] == "off"
    assert read["b"] == 0.001
    assert read["c"] == "12:30"
    assert read["d"][1:] == [True, None]
    with pytest.raises(ValueError, match="line 3"):
        read_yaml("a: 1\nb: [1,\n")


HOLDS = """
import os, signal, sys
from mnemodyn.files import locked, writing
with locked(sys.argv[1], "the first"), writing(sys.argv[2]) as stream:
    if os.fork() == 0:
        signal.pause()  # a worker that outlives its parent
    stream.write(b"half")
    stream.flush()
    print(os.getpid(), flush=True)
    signal.pause()
"""


def holder(output, writes):
    code = [sys.executable, "-c", HOLDS, str(output), str(writes)]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True, process_group=0)
    assert int(process.stdout.readline()) == process.pid
    return process


@pytest.mark.parametrize("folder", [False, True])
def test_an_output_has_one_writer_until_it_dies(tmp_path, folder):
    output = tmp_path / "o"
    writes = output
    if folder:
        output.mkdir()
        writes = output / "part" / "file"
    (tmp_path / "link").symlink_to(output)
    process = holder(output, writes)
    try:
        for name in (output, tmp_path / "link", tmp_path / "x" / ".." / "o"):
            message = rf"is being written by the first \(process {process.pid} on .+\); let it end"
            with pytest.raises(RuntimeError, match=message), locked(name, "the second"):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(writes.parent.glob(".*.tmp"))) == 1
        with locked(output, "the second"):
            left = {path.name for path in tmp_path.rglob("*")} - {"o", "link", "part"}
            assert left == {".lock" if folder else ".o.lock"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    assert not list(tmp_path.rglob(".*"))


def test_a_process_does_not_hold_an_output_twice(tmp_path):
    with locked(tmp_path / "o", "this"):
        for _ in range(2):
            refused = pytest.raises(RuntimeError, match="written by this process; let it end")
            with refused, locked(tmp_path / "o", "that"):
                pass
        with locked(tmp_path / "other", "that"):
            pass
    with locked(tmp_path / "o", "that"):
        pass


def test_only_what_the_dead_have_left_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [
        f".o.{dead.pid}-0123abcd-0123abcd.tmp",
        f".o.{os.getpid()}-0123abcd-0123abcd.tmp",
        ".o.tmp",
        ".mine",
    ]
    for name in [*names, f".p.{dead.pid}-0123abcd-0123abcd.tmp"]:
        (tmp_path / name).write_text("x")
    (tmp_path / f".o.{dead.pid}-dddddddd-dddddddd.tmp").mkdir()
    (tmp_path / f".o.{dead.pid}-eeeeeeee-eeeeeeee.tmp").symlink_to(tmp_path)
    with locked(tmp_path / "o", "this"):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[1:], f".p.{dead.pid}-0123abcd-0123abcd.tmp", ".o.lock"}
    # So does the next table that is written there.
    write_table(tmp_path / "p", pd.DataFrame({"a": [1]}))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[1:], "p"}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".o.lock").symlink_to("mine")
    with pytest.raises(OSError, match="o.lock"), locked(tmp_path / "o", "this"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="no locks"), locked(tmp_path / "o", "this"):
        (tmp_path / "o").write_text("x")


def test_what_is_removed_is_never_what_a_link_names(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").symlink_to(tmp_path / "mine")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "lost").symlink_to("nowhere")
    for name in ("folder", "link", "lost", "absent"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_kept_results_exchanged_are_computed_again(tmp_path):
    kept = Kept(tmp_path)
    for i in (1, 2):
        kept("a", i, lambda i=i: np.full(3, float(i)))
    first, second = sorted(tmp_path.glob("*.npz"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    for i in (1, 2):
        assert kept("a", i, lambda: np.zeros(3)).tolist() == [0, 0, 0]


def test_what_is_no_file_or_folder_is_named(tmp_path):
    (tmp_path / ".o.lock").mkdir()
    with pytest.raises(OSError, match=r"cannot lock .*move it away.*o\.lock"):
        write_table(tmp_path / "o", pd.DataFrame({"a": [1]}))
    (tmp_path / "file").write_text("precious")
    for place in ("file", "file/below", "file/further/below"):
        with pytest.raises(NotADirectoryError, match=r"file is no folder, .*name another"):
            Kept(tmp_path / place)
    Kept(tmp_path / "new" / "folder")
    Kept(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".o.lock", "file"]


def test_what_other_machines_write_into_a_shared_folder_stays(tmp_path, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    monkeypatch.setattr(files.os, "getpid", lambda: dead.pid)
    mine = files.temporary(tmp_path / "a.npz")
    monkeypatch.setattr(files, "MACHINE", "0123abcd")
    others = files.temporary(tmp_path / "a.npz")
    monkeypatch.undo()
    for path in (mine, others):
        path.write_text("half")
    files.remove_left_over(tmp_path, held=False)
    assert list(tmp_path.iterdir()) == [others]
    # Under a lock the folder is this process's alone.
    with locked(tmp_path, "this"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
