"""Fuzz: damaged files of every kind that the package reads; each is read, or refused by a named problem."""

import io
import json
import re
import resource
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, LabelAxis, ScalarAxis, SeriesAxis
from safetensors.torch import load_file
from scipy.io import savemat

from mnemodyn.checkpoint import (
    Checkpoint,
    CheckpointError,
    HubError,
    from_pretrained,
    save_checkpoint,
)
from mnemodyn.cli import UsageError, read_mapping, read_settings
from mnemodyn.data import formats
from mnemodyn.data.atlas import read_atlas
from mnemodyn.data.cohorts import index, load_cohort
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan, load_scan
from mnemodyn.data.store import Store, convert
from mnemodyn.files import Kept
from mnemodyn.pretrain.training import ResumeError, TrainingError, pretrain
from mnemodyn.readout import MnemoDynEncoder
from mnemodyn.results import read_results, write_results
from mnemodyn.run import ParameterError, read_parameters
from mnemodyn.settings import Settings, SettingsError
from tests.campaigns import mutate
from tests.campaigns.common import (
    PARCELS,
    Campaign,
    Trial,
    content,
    place,
    scan_of,
    small_network,
    unfinished,
)

SECONDS = 2.0  # of the processor, for one input
MEGABYTES = 400  # that one input may add to the largest memory so far
GOLDEN = Path(__file__).parents[1] / "golden"

NAMED = (
    DataError,
    CheckpointError,
    HubError,
    ParameterError,
    ResumeError,
    SettingsError,
    TrainingError,
    UsageError,
)


class TooLong(BaseException):
    """Raised in an input that takes too long; no reader's ``except Exception`` catches it."""


class Kind(NamedTuple):
    """Files of one kind: their whole contents, what may change them, and what reads them.

    `changes` gives for the end of a file's name the functions that damage it; files that no end fits stay whole.
    """

    share: int
    files: dict[str, bytes]
    changes: dict[str, tuple[Callable, ...]]
    read: Callable[[Path], object]


class Fuzz(Campaign):
    name = "fuzz"
    what = "inputs"
    count = 26_681
    seconds = 60.0
    memory = 3 * 2**30

    def prepare(self, folder: Path) -> None:
        self.kinds = {**scan_kinds(), **other_kinds(folder)}
        self.names = list(self.kinds)
        shares = np.array([kind.share for kind in self.kinds.values()], float)
        self.shares = shares / shares.sum()
        # What is whole must be read, or the campaign would show nothing.
        for name, kind in self.kinds.items():
            whole = folder / f"whole-{len(list(folder.iterdir()))}"
            write(whole, kind.files)
            result = kind.read(whole)
            assert result is not None, name
            if name in SCANS:
                np.testing.assert_allclose(result.values, VALUES, rtol=1e-4)

    def trial(self, number: int, folder: Path) -> Trial:
        rng = np.random.default_rng([3, number])
        name = str(rng.choice(self.names, p=self.shares))
        kind = self.kinds[name]
        damaged = [file for file in kind.files if changes_of(kind, file)]
        file = mutate.pick(rng, damaged)
        files = dict(kind.files)
        change = mutate.pick(rng, changes_of(kind, file))
        files[file] = change(rng, files[file])
        if file == "best/model.safetensors" and rng.random() < 0.7:
            files["best/config.json"] = signed(files)
        write(folder, files)
        outcome, problem = attempt(kind.read, folder, [*files, "sub-1_timeseries.tsv"])
        if problem is None:
            return Trial(outcome, [])
        return Trial(outcome, [f"{name}, {file}: {problem}, by {change.__name__}"])


def changes_of(kind: Kind, file: str) -> tuple[Callable, ...]:
    """What may damage a file."""
    for ending, changes in kind.changes.items():
        if file.endswith(ending):
            return changes
    return ()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def signed(files: dict[str, bytes]) -> bytes:
    """The configuration of a checkpoint that vouches for the weights it now has."""
    config = json.loads(files["best/config.json"])
    config["weights_sha256"] = sha256(files["best/model.safetensors"]).hexdigest()
    return json.dumps(config).encode()


def attempt(read: Callable, folder: Path, files: list[str]) -> tuple[str, str | None]:
    """Read what a folder holds: how that ended, and what is wrong with the way it ended."""

    def stop(*_):
        raise TooLong

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, stop)
    # Time of the processor, so that a busy machine does not look like a slow reader.
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
    try:
        try:
            read(folder)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        outcome = "read"
        problem = None
    except TooLong as error:
        outcome = "too long"
        problem = f"took more than {SECONDS:g} s | {place(error)}"
    except Exception as error:
        outcome = "refused"
        problem = wrong_with(error, folder, files)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if problem is None and used > MEGABYTES:
        problem = f"took more than {MEGABYTES} MB of memory"
    return outcome, problem


def wrong_with(error: Exception, folder: Path, files: list[str]) -> str | None:
    """Why an error is not a good answer to a damaged file; None if it is one."""
    message = str(error)
    shown = place(error)
    if isinstance(error, OSError) and error.filename is not None:
        return None
    if not isinstance(error, NAMED) and type(error) is not ValueError:
        return f"no named problem: {shown}"
    if getattr(error, "problem", "") == "unusable":
        return f"the problem has no name of its own: {shown}"
    if isinstance(error, SettingsError | UsageError) and folder.name not in message:
        return f"the message does not name the file: {shown}"
    # A cohort's own name will do for what its table holds.
    known = [Path(file).name for file in files] + [folder.name, " of small: "]
    if not any(name in message for name in known):
        return f"the message does not name the file: {shown}"
    if "weights_only" in message or "allow_pickle" in message:
        return f"the message advises an unsafe way to load: {shown}"
    if re.search("allocate|MemoryError", message):
        return f"asked for more memory than there was: {shown}"
    return None


# Scans

VALUES = np.random.default_rng(0).standard_normal((24, 3)).astype(np.float32) * 10


def cifti(columns) -> bytes:
    return Cifti2Image(VALUES, (SeriesAxis(0, 0.72, 24), columns)).to_bytes()


def saved(save, *args, **kwargs) -> bytes:
    stream = io.BytesIO()
    save(stream, *args, **kwargs)
    return stream.getvalue()


def text(header: str, separator: str) -> bytes:
    return saved(np.savetxt, VALUES, delimiter=separator, header=header, comments="", fmt="%.6g")


SURFACE = BrainModelAxis.from_surface([0, 1, 2], 10, "CortexLeft")
SCANS = {
    "_timeseries.ptseries.nii": cifti(formats.parcels_axis(("a", "b", "c"))),
    "_parcellated.dtseries.nii": cifti(SURFACE),
    "_scalar.dtseries.nii": cifti(ScalarAxis(["a", "b", "c"])),
    "_timeseries.tsv": text("a\tb\tc", "\t"),
    ".csv": text("a,b,c", ","),
    ".1D": text("#1\t#2\t#3", "\t"),
    ".npy": saved(np.save, VALUES),
    ".npz": saved(np.savez_compressed, bold=VALUES),
    "_v7.mat": saved(savemat, {"tc": VALUES}, do_compression=True),
    "_v5.mat": saved(savemat, {"tc": VALUES, "sc": 1.0}),
    "_v4.mat": saved(savemat, {"tc": VALUES}, format="4"),
}
TABLE = (mutate.change_table, mutate.change_table, mutate.change_encoding, mutate.change_bytes)
JSON = (mutate.change_json, mutate.change_json, mutate.change_bytes)
YAML = (mutate.change_yaml, mutate.change_yaml, mutate.change_yaml, mutate.change_encoding)
CHANGES = {
    ".nii": (mutate.change_cifti, mutate.change_bytes),
    ".tsv": TABLE,
    ".csv": TABLE,
    ".1D": TABLE,
    ".npy": (mutate.change_npy, mutate.change_bytes),
    ".npz": (mutate.change_npz, mutate.change_bytes),
    ".mat": (mutate.change_mat, mutate.change_bytes),
}


def scan_kinds() -> dict[str, Kind]:
    """Scans alone, a kind a format."""
    kinds = {}
    for ending, whole in SCANS.items():

        def read(folder: Path, name=f"sub-01{ending}") -> Scan:
            without_names = name.endswith((".npy", ".npz", ".mat"))
            frames_first = True if without_names else None
            return load_scan(folder / name, t_r=0.72, override_t_r=True, frames_first=frames_first)

        kinds[ending] = Kind(5, {f"sub-01{ending}": whole}, CHANGES, read)
    return kinds


# All other files


def other_kinds(folder: Path) -> dict[str, Kind]:
    """Everything but scans alone."""
    return {
        "beside a scan": beside(),
        "phenotypes": phenotypes(folder),
        "cohort": cohort(),
        "settings": settings_file(),
        "parameters": Kind(
            1, {"parameters.yaml": b"alpha: 0.5\nnames: [a, b]\n"}, {".yaml": YAML}, parameters
        ),
        "notebook": notebook(),
        "results": results(folder),
        "store": store(folder),
        "checkpoint": checkpoint(folder),
        "draft": draft(),
        "unfinished training": unfinished_training(folder),
        "kept result": kept(folder),
        "atlas": atlas(),
    }


def beside() -> Kind:
    """A scan with a sidecar and tables of motion."""
    frames = np.arange(24)
    moved = "framewise_displacement\tdvars\n" + "".join(f"{i / 100}\t1\n" for i in frames)
    outliers = "framewise_displacement\n" + "".join(f"{int(i == 3)}\n" for i in frames)
    name = "sub-01_task-rest_timeseries.tsv"
    files = {
        name: SCANS["_timeseries.tsv"],
        "sub-01_task-rest_timeseries.json": b'{"RepetitionTime": 0.72, "Sources": ["x/bold.nii"]}',
        "sub-01_task-rest_outliers.tsv": outliers.encode(),
        "sub-01_task-rest_motion.tsv": moved.encode(),
        "sub-01_task-rest_desc-confounds_timeseries.tsv": moved.encode(),
    }
    changes = {
        ".json": JSON,
        "outliers.tsv": TABLE,
        "motion.tsv": TABLE,
        "confounds_timeseries.tsv": TABLE,
    }
    return Kind(12, files, changes, lambda folder: load_scan(folder / name))


COHORT = b"""\
name: small
scans: ["scans/{participant}_*.tsv", "**/sub-{participant}_*.tsv"]
reader: {t_r: 2.0, t_r_by_site: {NYU: 2.0}, min_frames: 5}
phenotype: {file: people.tsv, match: {id: "{participant}"}}
run: "{run}"
missing: [-9999]
site: place
family: {column: family, optional: true}
age: {column: age, unit: months}
sex: {column: sex, mapping: {1: male, 2: female}, exclude: [3]}
targets:
  - sex
  - {name: iq, column: iq, kind: regression, unit: points}
families: [[sub-1, sub-2]]
"""
PEOPLE = b"""\
id\tplace\tfamily\tage\tsex\tiq
1\tNYU\tf1\t240\t1\t100
002\tUM\tf1\t250.5\t2\t-9999
3\tNYU\t\t260\t2\t98.5
"""


def cohort_files() -> dict[str, bytes]:
    """A folder of three participants."""
    files = {"people.tsv": PEOPLE}
    for i in (1, 2, 3):
        rng = np.random.default_rng(i)
        table = saved(
            np.savetxt, rng.standard_normal((8, 2)), delimiter="\t", header="a\tb", comments=""
        )
        files[f"sub-{i}_task-rest_timeseries.tsv"] = table
    return files


def phenotypes(folder: Path) -> Kind:
    """A cohort's table of people."""
    write(folder / "cohort", {"cohort.yaml": COHORT})
    described = load_cohort(folder / "cohort" / "cohort.yaml")

    def read(folder: Path):
        found = index(described, folder)
        return str(found), found.summary()

    return Kind(4, cohort_files(), {"people.tsv": TABLE}, read)


def cohort() -> Kind:
    """A cohort's description, and the folder that it describes."""

    def read(folder: Path):
        described = load_cohort(folder / "cohort.yaml")
        try:
            return index(described, folder).summary()
        except DataError as error:
            # It describes other scans than those here, or other people: the folder is to blame as well.
            if error.problem == "unusable":
                raise
            return error

    return Kind(4, {**cohort_files(), "cohort.yaml": COHORT}, {".yaml": YAML}, read)


def settings_file() -> Kind:
    """Settings of a training."""
    whole = b"""\
scaling: zscore_per_parcel
data: {n_test: 2, n_validation: 0.2, t_r: 2.0}
model:
  n_timepoints: 64
  n_blocks: 1
  wavelet: db2
objective: {name: masked, hidden_share: 0.5}
training: {epochs: 2, learning_rate: 1e-3, precision: 32-true}
machine: {accelerator: cpu, devices: 1}
"""
    files = {"settings.yaml": whole}
    changes = {".yaml": (*YAML, mutate.change_bytes)}
    return Kind(6, files, changes, lambda folder: read_settings(str(folder / "settings.yaml"), ()))


def parameters(folder: Path):
    return read_mapping(str(folder / "parameters.yaml"))


def notebook() -> Kind:
    """A notebook, of which the parameters are read before it runs."""
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n"], "id": "a"},
        {
            "cell_type": "code",
            "metadata": {"tags": ["parameters"]},
            "source": ["alpha = 0.5  # how = much\n", "names = ['a', 'b']\n", "seed = -1"],
            "id": "b",
            "execution_count": None,
            "outputs": [],
        },
    ]
    whole = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    files = {"notebook.ipynb": json.dumps(whole).encode()}
    return Kind(
        4, files, {".ipynb": JSON}, lambda folder: read_parameters(folder / "notebook.ipynb")
    )


def results(folder: Path) -> Kind:
    """A table of results."""
    path = folder / "results.csv"
    row = {"data": "X", "task": "sex", "method": "fc", "score": "auc", "kind": "real"}
    rows = [{**row, "value": 0.7, "low": 0.6, "high": 0.8, "p": 0.01, "n": 40}]
    write_results(path, [*rows, {**row, "score": "r", "value": 0.1}])
    files = {"results.csv": path.read_bytes()}
    return Kind(3, files, {".csv": TABLE}, lambda folder: read_results(folder / "results.csv"))


def store(folder: Path) -> Kind:
    """A store of three scans."""
    rng = np.random.default_rng(0)
    censored = np.arange(40) == 3
    scans = [scan_of(rng, f"sub-{i}", censored=censored if i else None) for i in range(3)]
    convert(scans, folder / "made" / "store")

    def read(folder: Path):
        found = Store(folder / "store")
        for i, scan in enumerate(found):
            assert scan.values.shape == (scan.n_frames, len(scan.parcels))
            found.read(i)
            found.moments(i)
        return found.fingerprint, found.verify()

    changes = {"store.json": JSON, ".bin": (mutate.change_bytes,)}
    return Kind(10, content(folder / "made"), changes, read)


def checkpoint(folder: Path) -> Kind:
    """A checkpoint, and what its network makes of a scan."""
    made = folder / "run" / "best"
    save_checkpoint(made, Checkpoint(small_network(), PARCELS, 2.0, Scaling(), "x", {"a": [1]}))
    scan = scan_of(np.random.default_rng(0), "sub-1")

    def read(folder: Path):
        found = from_pretrained(folder / "best")
        vectors = MnemoDynEncoder(found).transform([scan])
        if not np.isfinite(vectors).all():
            raise AssertionError("read-outs that are not finite")
        return vectors

    changes = {
        "config.json": JSON,
        ".safetensors": (mutate.change_safetensors, mutate.change_bytes, nan_weights),
    }
    return Kind(10, content(folder / "run"), changes, read)


def nan_weights(rng: np.random.Generator, data: bytes) -> bytes:
    """The last weights are NaN."""
    return data[:-4] + np.float32("nan").tobytes()


def draft() -> Kind:
    """A file of the published draft's trainer."""
    record = json.loads((GOLDEN / "linear_first.json").read_text())
    weights = load_file(GOLDEN / "linear_first.weights.safetensors")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    whole = {"state_dict": weights, "hyper_parameters": record["config"], "epoch": 3}
    files = {"draft.ckpt": saved(lambda stream: torch.save(whole, stream))}
    changes = {".ckpt": (mutate.change_tensors, mutate.change_bytes)}
    return Kind(
        4, files, changes, lambda folder: from_pretrained(folder / "draft.ckpt", compat="reference")
    )


SETTINGS = Settings.from_mapping(
    {
        "model": {
            "n_timepoints": 16,
            "n_blocks": 1,
            "n_channels": 2,
            "input_width": 2,
            "n_levels": 1,
        },
        "training": {"epochs": 1, "windows_per_epoch": 2, "batch_size": 2},
        "machine": {"accelerator": "cpu"},
    }
)


def unfinished_training(folder: Path) -> Kind:
    """A training that was killed after its last epoch: what is left of it is read again."""
    rng = np.random.default_rng(0)
    train = [scan_of(rng, f"sub-{i}") for i in range(2)]
    validation = [scan_of(rng, "sub-9")]
    made = folder / "training"
    unfinished(train, validation, made / "run", SETTINGS)

    def read(folder: Path):
        return pretrain(train, validation, folder / "run", SETTINGS)

    changes = {"run.json": JSON, "last.ckpt": (mutate.change_tensors, mutate.change_bytes)}
    return Kind(2, content(made), changes, read)


def kept(folder: Path) -> Kind:
    """A result that was kept: damaged, it is made again."""
    rng = np.random.default_rng(0)
    made = {"values": rng.standard_normal(50), "chosen": "a", "scores": [1.0, 2.0]}
    Kept(folder / "kept")("fold", ["seed", 1], lambda: made)

    def read(folder: Path):
        found = Kept(folder)("fold", ["seed", 1], lambda: made)
        np.testing.assert_array_equal(found["values"], made["values"])
        assert (found["chosen"], found["scores"]) == ("a", [1.0, 2.0])
        return found

    changes = {".npz": (mutate.change_npz, mutate.change_bytes, mutate.change_bytes)}
    return Kind(5, content(folder / "kept"), changes, read)


def atlas() -> Kind:
    """Labels of grayordinates."""
    table = {0: ("???", (0, 0, 0, 0)), 1: ("a", (1, 0, 0, 1)), 2: ("b", (0, 1, 0, 1))}
    axes = (LabelAxis(["Small"], [table]), BrainModelAxis.from_surface(range(6), 10, "CortexLeft"))
    image = nibabel.Cifti2Image(np.array([[0, 1, 1, 2, 2, 0]], np.float32), axes)
    image.nifti_header.set_intent("ConnDenseLabel")
    files = {"small.dlabel.nii": image.to_bytes()}
    return Kind(3, files, CHANGES, lambda folder: read_atlas(folder / "small.dlabel.nii"))
