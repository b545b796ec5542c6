"""What all campaigns share: trials in a process of their own, and findings that can be repeated."""

import contextlib
import io
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from mnemodyn.data.scans import Scan
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.training import Learner, pretrain
from mnemodyn.settings import ModelConfig, Settings

PACKAGE = Path(sys.modules["mnemodyn"].__file__).parent
PARCELS = ("a", "b", "c", "d")


class Trial(NamedTuple):
    """What a trial was and came to, for the counts, and what it found wrong."""

    kind: str
    problems: list[str]


class Campaign:
    """One promise, and random trials of it.

    Attributes
    ----------
    name : str
    what : str
        What a trial is called in the report.
    count : int
        Trials of a whole campaign.
    seconds : float
        After which a trial counts as hanging.
    memory : int or None
        Bytes that a trial may ask for.
    """

    name: str
    what: str
    count: int
    seconds: float = 60.0
    memory: int | None = None

    def prepare(self, folder: Path) -> None:
        """Make in a folder what all trials share."""

    def trial(self, number: int, folder: Path) -> Trial:
        """Do one trial in an empty folder of its own. All that is random in it follows from its number."""
        raise NotImplementedError


@dataclass
class Outcome:
    """What a campaign came to: trials by kind, and findings by trial."""

    campaign: Campaign
    counts: Counter = field(default_factory=Counter)
    findings: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, number: int, kind: str, problems: list[str]) -> None:
        self.counts[kind] += 1
        for problem in problems:
            # What follows the bar differs from trial to trial.
            key = problem.partition(" | ")[0]
            self.findings.setdefault(key, []).append((number, problem))

    def __str__(self) -> str:
        n = self.counts.total()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        name = self.campaign.name
        head = (
            f"{name}: {n} {self.campaign.what}, {len(self.findings)} findings, {self.seconds:.0f} s"
        )
        lines = [f"{head} ({kinds})"]
        for found in sorted(self.findings.values()):
            number, problem = found[0]
            lines.append(f"  {len(found)} x {problem}")
            again = f"python -m tests.campaigns {name} --count 1 --seed {number}"
            lines.append(f"      again: {again}")
        return "\n".join(lines)


def run(campaign: Campaign, numbers: Sequence[int], scratch: Path, keep: Path | None) -> Outcome:
    """Run trials by their numbers, and go on after one that kills or blocks its process.

    `scratch` is a folder for all files; `keep` is one that gets the files of trials with findings.
    """
    started = time.monotonic()
    outcome = Outcome(campaign)
    shared = scratch / "shared"
    shared.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        campaign.prepare(shared)
    left = list(numbers)
    while left:
        for report in Worker(campaign, left, scratch, keep).reports():
            outcome.add(*report)
            left.pop(0)
    outcome.seconds = time.monotonic() - started
    return outcome


class Worker:
    """A process that does trials one after another and reports each."""

    def __init__(self, campaign: Campaign, numbers: list[int], scratch: Path, keep: Path | None):
        self.campaign = campaign
        self.numbers = list(numbers)
        self.scratch = scratch
        self.keep = keep
        self.reading, writing = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            os.close(self.reading)
            self._work(writing)
        os.close(writing)

    def _work(self, writing: int) -> None:
        """In the process: do the trials, and end without what Python does at its end."""
        status = 1
        try:
            silence()
            if self.campaign.memory is not None:
                limit_memory(self.campaign.memory)
            with os.fdopen(writing, "w") as stream:
                for number in self.numbers:
                    report = self._one(number)
                    stream.write(json.dumps(report) + "\n")
                    stream.flush()
            status = 0
        finally:
            os._exit(status)

    def _one(self, number: int) -> list:
        folder = self.scratch / str(number)
        folder.mkdir()
        try:
            trial = self.campaign.trial(number, folder)
        except BaseException as error:
            trial = Trial("broken trial", [f"the trial itself failed: {place(error)}"])
        if trial.problems and self.keep is not None:
            move(folder, self.keep / f"{self.campaign.name}-{number}")
        shutil.rmtree(folder, ignore_errors=True)
        return [number, *trial]

    def reports(self) -> Iterator[tuple[int, str, list[str]]]:
        """Yield the report of each trial; of one that never comes, that its process died or hung, and end."""
        left = list(self.numbers)
        hung = False
        with os.fdopen(self.reading, "rb", buffering=0) as stream:
            selector = selectors.DefaultSelector()
            selector.register(stream, selectors.EVENT_READ)
            rest = b""
            while left:
                if not selector.select(self.campaign.seconds):
                    hung = True
                    os.kill(self.pid, signal.SIGKILL)
                    break
                content = stream.read(2**16)
                if not content:
                    break
                *lines, rest = (rest + content).split(b"\n")
                for line in lines:
                    left.pop(0)
                    yield tuple(json.loads(line))
        _, status = os.waitpid(self.pid, 0)
        if left:
            folder = self.scratch / str(left[0])
            if self.keep is not None and folder.is_dir():
                move(folder, self.keep / f"{self.campaign.name}-{left[0]}")
            shutil.rmtree(folder, ignore_errors=True)
            problem = f"its process ended with {os.waitstatus_to_exitcode(status)}"
            if hung:
                problem = f"it hung for {self.campaign.seconds:g} s"
            yield left[0], "ended", [problem]


def fork() -> int:
    """As os.fork, which warns where there are other threads: none of them is needed in the child."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_memory() -> str | None:
    """A folder in memory, where files need no disk to be safe on; None where the system has none."""
    place = "/dev/shm"
    return place if os.access(place, os.W_OK) else None


def move(folder: Path, to: Path) -> None:
    """Keep the folder of a trial in place of what an earlier call has kept of it."""
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, to)


def silence() -> None:
    """Send what the trials print nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def limit_memory(size: int) -> None:
    """Let this process have `size` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def place(error: BaseException) -> str:
    """An error in a line: its kind and the line of the package that it comes through, a bar, and its message."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).is_relative_to(PACKAGE):
            where = f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno}"
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__} at {where or 'no line of it'} | {message}"


# Small inputs


def values_of(rng: np.random.Generator, n_frames: int = 40, n_parcels: int = len(PARCELS)):
    """A series, (time, parcel), in which parcels are alike and each is smooth."""
    noise = rng.standard_normal((n_frames, n_parcels)) + rng.standard_normal((n_frames, 1))
    return noise.cumsum(0).astype(np.float32)


def scan_of(rng: np.random.Generator, participant: str, n_frames: int = 40, **facts) -> Scan:
    """A scan of a participant."""
    values = values_of(rng, n_frames)
    return Scan(participant, values, 2.0, PARCELS, source=f"{participant}_timeseries.tsv", **facts)


def small_network(**settings) -> MnemoDyn:
    """An untrained network for scans of PARCELS."""
    torch.manual_seed(0)
    small = {
        "n_timepoints": 16,
        "n_channels": 4,
        "input_width": 4,
        "field_rank": 2,
        "n_levels": 2,
        "n_blocks": 1,
    }
    return MnemoDyn(ModelConfig(n_parcels=len(PARCELS), **{**small, **settings})).eval()


class Stopped(BaseException):
    """Raised where a training is stopped."""


def unfinished(train: list[Scan], validation: list[Scan], folder: Path, settings: Settings) -> None:
    """Train for an epoch, and stop when its state is written: the folder is that of a run that was killed."""
    stop = patch.object(Learner, "on_train_epoch_end", side_effect=Stopped)
    with stop, contextlib.suppress(Stopped):
        pretrain(train, validation, folder, settings)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too, by their paths in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found
