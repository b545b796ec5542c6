"""Kill: commands killed at a random moment, and given again until they are done, end in the same bytes."""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import nibabel
import numpy as np
import pandas as pd
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, LabelAxis, SeriesAxis

# What a command imports late is imported once, before it is forked.
import mnemodyn.data.preprocess
import mnemodyn.data.simulate
import mnemodyn.embed
import mnemodyn.evaluate.study
import mnemodyn.pretrain.training
import mnemodyn.run  # noqa: F401
from mnemodyn.checkpoint import Checkpoint, save_checkpoint
from mnemodyn.cli import main
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import save_scan
from mnemodyn.files import write_json
from tests.campaigns.common import PARCELS, Campaign, Trial, fork, place, scan_of, small_network

# What a process does to files: it can be killed just before any of these.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Of a manifest, what the clock says.
OF_THE_CLOCK = ("started", "ended", "seconds", "processor_seconds", "peak_memory_mb")
NOTEBOOK = """\
from pathlib import Path
from mnemodyn.results import write_results
row = {"data": "X", "task": "t", "method": "fc", "score": "auc", "kind": "real", "value": alpha}
write_results(Path("out", "table.csv"), [row])
print("written")
"""


class Kill(Campaign):
    name = "kill"
    what = "killed jobs"
    count = 126
    seconds = 300.0

    def __init__(self, *names: str):
        """All commands, or those that are named."""
        self.names = list(names)

    def prepare(self, folder: Path) -> None:
        self.commands = commands(folder)
        self.names = self.names or list(self.commands)
        self.whole = {}
        self.n_changes = {}
        self.duration = {}
        for name in self.names:
            # As deep as the folders of the trials, for the relative paths in manifests.
            place_of_whole = folder.parent / f"whole-{name}"
            place_of_whole.mkdir()
            started = time.monotonic()
            status, n = perform(self.commands[name], place_of_whole)
            assert status == 0, f"{name} ends with {status}"
            self.duration[name] = time.monotonic() - started
            self.n_changes[name] = n
            self.whole[name] = found_in(place_of_whole)

    def trial(self, number: int, folder: Path) -> Trial:
        rng = np.random.default_rng([5, number])
        name = self.names[number % len(self.names)]
        killed = 0
        for _ in range(rng.integers(1, 3)):
            if rng.random() < 0.7:
                # Just before a change of a file: between them nothing can be lost.
                how = {"before_change": int(rng.integers(1, self.n_changes[name] + 1))}
            else:
                how = {"after": rng.uniform(0, self.duration[name])}
            status, _ = perform(self.commands[name], folder, **how)
            killed += status == -signal.SIGKILL
        status, _ = perform(self.commands[name], folder)
        problems = []
        if status != 0:
            said = (folder / "said").read_text(errors="replace").strip().splitlines() or [""]
            problems.append(f"{name}: given again it ends with {status} | {said[-1][:300]}")
        else:
            problems += [f"{name}: {what}" for what in differences(self.whole[name], folder)]
        return Trial(name if killed else f"{name} done before it was killed", problems)


def perform(
    arguments: list[str], folder: Path, before_change: int | None = None, after: float | None = None
) -> tuple[int, int]:
    """Do a command in a forked process; its exit status (minus the signal), and the changes of files it made.

    It is killed before the change of a number, or after some seconds.
    """
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        status = 70
        try:
            os.close(reading)
            status = _command(arguments, folder, before_change, writing)
        finally:
            os._exit(status)
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading) as stream:
        counted = stream.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(counted or 0)


def _command(arguments: list[str], folder: Path, before_change: int | None, writing: int) -> int:
    """In the forked process: what the command does, in its folder and with its own temporary files there."""
    os.chdir(folder)
    Path("tmp").mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(folder / "tmp")
    tempfile.tempdir = None
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    n_changes = 0

    def seen(event: str, details: tuple) -> None:
        nonlocal n_changes
        writes = event == "open" and isinstance(details[2], int) and bool(details[2] & WRITES)
        if not writes and event not in CHANGES:
            return
        where = str(details[0])
        if os.path.isabs(where) and not where.startswith(str(folder)):
            return
        n_changes += 1
        if n_changes == before_change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen)
    try:
        status = main(arguments)
    except Exception as error:
        print(f"no named problem: {place(error)}", file=sys.stderr)
        status = 71
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(writing, str(n_changes).encode())
    return status


def found_in(folder: Path) -> dict[str, object]:
    """What a command has left in its folder: bytes by path, None for a folder; of a manifest without the clock."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in ("said", "tmp"):
            continue
        if path.is_dir():
            found[name] = None
        elif name.endswith(".manifest.json"):
            manifest = json.loads(path.read_bytes())
            found[name] = {k: v for k, v in manifest.items() if k not in OF_THE_CLOCK}
        else:
            found[name] = path.read_bytes()
    return found


def differences(whole: dict[str, object], folder: Path) -> list[str]:
    """What tells the outputs in a folder from those of a command that nothing disturbed."""
    found = found_in(folder)
    problems = []
    for name in sorted({*whole, *found}):
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in whole:
            # A leftover in a folder that is one itself.
            if str(Path(name).parent) not in found or str(Path(name).parent) in whole:
                problems.append(f"{general(name)} is left over | {name}")
        elif whole[name] != found[name]:
            problems.append(f"{general(name)} differs | {name}")
    return problems


def general(name: str) -> str:
    """A path without what differs between trials."""
    return f"{Path(name).parent}/...{Path(name).suffix}"


def commands(folder: Path) -> dict[str, list[str]]:
    """Small commands of every kind that writes, by name. Outputs go to ``out`` in the working folder."""
    scans = cohort(folder / "scans")
    network = str(folder / "network")
    save_checkpoint(network, Checkpoint(small_network(), PARCELS, 2.0, Scaling()))
    dense, atlas = dense_scans(folder)
    small = {
        "n_timepoints": 16,
        "n_blocks": 1,
        "n_channels": 2,
        "input_width": 2,
        "n_levels": 1,
        "epochs": 3,
        "windows_per_epoch": 4,
        "batch_size": 2,
        "accelerator": "cpu",
        "n_test": 2,
        "n_validation": 2,
    }
    settings = []
    for name, value in small.items():
        settings += ["-s", name, str(value)]
    first = next(Path(scans).rglob("*_timeseries.tsv"))
    notebook = folder / "notebook.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in ("alpha = 0.5", NOTEBOOK)]
    cells[0].metadata["tags"] = ["parameters"]
    for number, cell in enumerate(cells):
        cell.id = str(number)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    evaluate = ["evaluate", "bids", scans, "--target", "sex", "--repeats", "1", "-c", network]
    evaluate += ["--methods", "confounds", "fc", "latent_mean", "--cache", "out/cache"]
    # Longer commands in between, since they are taken in turn.
    return {
        "convert": ["convert", "bids", scans, "out/store"],
        "embed": ["embed", scans, "-o", "out/table.csv", "-c", network],
        "pretrain": ["pretrain", scans, "out/run", *settings],
        "evaluate": [*evaluate, "-o", "out/sex.csv"],
        "preprocess": ["preprocess", dense, "-o", "out/parcels", "--atlas", atlas],
        "reconstruct": [
            "reconstruct",
            str(first),
            *("-o", "out/sub-01/func/sub-01_desc-filled_timeseries.tsv"),
            *("-c", network),
        ],
        "index": ["index", "bids", scans, "--table", "out/index.tsv"],
        "simulate": ["simulate", "abide", "out/cohort", "--participants", "3", "--frames", "150"],
        "run": ["run", str(notebook), "out/notebook.ipynb"],
    }


def cohort(folder: Path) -> str:
    """A BIDS derivative of twenty participants."""
    rng = np.random.default_rng(0)
    people = []
    for i in range(1, 21):
        who = f"sub-{i:02d}"
        censored = np.arange(40) == i
        scan = scan_of(rng, who, censored=censored)
        path = folder / who / "func" / f"{who}_task-rest_timeseries.tsv"
        save_scan(scan, path)
        people.append(
            {"participant_id": who, "sex": "MF"[i % 2], "age": 20 + i, "site": "AB"[i > 9]}
        )
    table = pd.DataFrame(people).to_csv(sep="\t", index=False)
    (folder / "participants.tsv").write_text(table)
    write_json(folder / "dataset_description.json", {"Name": "x", "BIDSVersion": "1.10.0"})
    return str(folder)


def dense_scans(folder: Path) -> tuple[str, str]:
    """Dense series of three participants, and an atlas."""
    axis = BrainModelAxis.from_surface(range(6), 10, "CortexLeft")
    table = {0: ("???", (0, 0, 0, 0)), 1: ("a", (1, 0, 0, 1)), 2: ("b", (0, 1, 0, 1))}
    labels = np.array([[0, 1, 1, 2, 2, 0]], np.float32)
    image = Cifti2Image(labels, (LabelAxis(["Small"], [table]), axis))
    image.nifti_header.set_intent("ConnDenseLabel")
    atlas = folder / "Small.dlabel.nii"
    nibabel.save(image, atlas)
    for i in range(1, 4):
        values = np.random.default_rng(i).standard_normal((30, 6)).astype(np.float32)
        path = folder / "dense" / f"sub-{i}" / f"sub-{i}_task-rest_bold.dtseries.nii"
        path.parent.mkdir(parents=True)
        nibabel.save(Cifti2Image(values, (SeriesAxis(0, 2.0, 30), axis)), path)
    return str(folder / "dense"), str(atlas)
