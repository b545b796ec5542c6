"""Training end to end on small scans: it learns, resumes to the same weights, and refuses what it should."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mnemodyn.checkpoint import from_pretrained
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.data.store import convert
from mnemodyn.model.config import ModelConfig
from mnemodyn.pretrain.objective import Masked
from mnemodyn.pretrain.training import Machine, ResumeError, TrainingConfig, pretrain
from mnemodyn.pretrain.windows import Draws, FixedWindows, RandomWindows

PARCELS = tuple(f"parcel-{i}" for i in range(6))
MODEL = ModelConfig(
    n_parcels=6, n_timepoints=32, n_blocks=1, n_channels=8, input_width=8, n_levels=2
)
OBJECTIVE = Masked(hidden_share=0.5, mask_window=4)
TRAINING = TrainingConfig(epochs=3, windows_per_epoch=32, batch_size=4, learning_rate=1e-2)


def simulated(n: int, seed: int = 0, n_frames: int = 128) -> list[Scan]:
    """SIMULATED scans of one smooth source seen by all parcels, so that hidden entries can be filled."""
    rng = np.random.default_rng(seed)
    scans = []
    for i in range(n):
        source = np.convolve(rng.standard_normal(n_frames + 10), np.ones(10) / 3, mode="same")[5:-5]
        values = np.outer(source, rng.uniform(0.8, 1.2, 6)) + 0.1 * rng.standard_normal(
            (n_frames, 6)
        )
        scans.append(
            Scan(f"sub-{seed}{i}", values.astype(np.float32), 2.0, PARCELS, source=f"scan-{i}")
        )
    return scans


CPU = Machine(accelerator="cpu")


def run(
    folder,
    *,
    train=None,
    validation=None,
    model=MODEL,
    objective=OBJECTIVE,
    training=TRAINING,
    machine=CPU,
    **settings,
):
    return pretrain(
        train or simulated(3),
        validation or simulated(1, seed=9),
        folder,
        model=model,
        objective=objective,
        training=training,
        machine=machine,
        **settings,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint, history = run(folder)
    return folder, checkpoint, history


def test_learns_and_writes_what_it_says(finished):
    folder, checkpoint, history = finished
    assert [r["epoch"] for r in history] == [1, 2, 3]
    assert history[-1]["val_r2_hidden"] > 0.5
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    lines = (folder / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,val_r2_hidden,val_r2_visible"
    assert len(lines) == 4
    assert len(list(folder.glob("epoch=*.ckpt"))) == 2
    best = max(r["val_r2_hidden"] for r in history)
    assert checkpoint.training["val_r2_hidden"] == pytest.approx(best, rel=1e-5)
    second = from_pretrained(folder / "second")
    assert second.training["val_r2_hidden"] < checkpoint.training["val_r2_hidden"]


def test_kept_weights_are_those_validated(finished):
    """The best checkpoint, evaluated by hand on the validation windows, gives the R2 that was logged."""
    _, checkpoint, _ = finished
    windows = FixedWindows(simulated(1, seed=9), Scaling(), OBJECTIVE, 32, 0)
    x, hidden = (torch.stack([w[k] for w in windows]) for k in ("x", "hidden"))
    with torch.no_grad():
        error = (checkpoint.model(x, 2.0, hidden=hidden).reconstruction - x)[hidden]
    r2 = 1 - error.square().sum() / x[hidden].square().sum()
    assert r2.item() == pytest.approx(checkpoint.training["val_r2_hidden"], abs=1e-5)


def test_same_seed_same_weights(finished, tmp_path):
    _, checkpoint, history = finished
    again, rows = run(tmp_path)
    assert rows == history
    for a, b in zip(again.model.parameters(), checkpoint.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_is_taken_as_it_is(finished, capsys):
    folder, _, history = finished
    before = (folder / "last.ckpt").read_bytes()
    _, rows = run(folder)
    assert rows == history
    assert capsys.readouterr().out.count("epoch ") == 3
    assert (folder / "last.ckpt").read_bytes() == before


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import conftest  # the same number of threads
from test_training import run
run({folder!r})
"""


@pytest.mark.parametrize("after", [1, 2])
def test_killed_run_resumes_to_the_same_weights(finished, tmp_path, after):
    _, checkpoint, history = finished
    tests = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(tests=tests, folder=str(tmp_path))],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    rows, deadline = tmp_path / "history.csv", time.monotonic() + 300  # of a busy machine
    while not (
        rows.is_file()
        and len(rows.read_text().splitlines()) > after
        and (tmp_path / "last.ckpt").exists()
    ):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if not json.loads((tmp_path / "run.json").read_text())["finished"]:
        assert not (tmp_path / "best").exists() or after == 2
    again, resumed = run(tmp_path)
    assert resumed == history
    for a, b in zip(again.model.parameters(), checkpoint.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_front_end_is_fitted_without_censored_frames(tmp_path):
    """What stands in a censored frame (a movement, here) has no influence on the network that comes out."""
    scans, lost = simulated(2, n_frames=64), np.isin(np.arange(64), [5, 6, 30])
    moved = [np.where(lost[:, None], 50 * (i + s.values), s.values) for i, s in enumerate(scans)]
    model, short = (
        replace(MODEL, front="gaussian", front_lags=2),
        replace(TRAINING, epochs=1, windows_per_epoch=8),
    )
    weights = []
    for name, values in (("still", [s.values for s in scans]), ("moved", moved)):
        train = [replace(s, values=v, censored=lost) for s, v in zip(scans, values, strict=True)]
        weights.append(
            run(tmp_path / name, train=train, model=model, training=short)[0].model.state_dict()
        )
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("stored", [False, True])
def test_windows_that_are_censored_whole_are_neither_drawn_nor_validated(stored, tmp_path):
    scans = [replace(s, censored=np.arange(128) < 70) for s in simulated(2)]
    given = convert(scans, tmp_path / "store", dtype="float32") if stored else scans
    drawn, fixed = (
        kind(given, Scaling(), OBJECTIVE, 32, seed=0) for kind in (RandomWindows, FixedWindows)
    )
    kept = [int((~drawn[i]["censored"]).sum()) for i in range(200)]
    assert min(kept) >= 2
    assert set(kept) == set(range(2, 33))  # partly censored ones are
    assert [int((~w["censored"]).sum()) for w in (fixed[i] for i in range(len(fixed)))] == [
        26,
        32,
    ] * 2
    if not stored:
        short = replace(TRAINING, epochs=1, windows_per_epoch=16)
        assert np.isfinite(
            run(tmp_path / "run", train=scans[:1], validation=scans[1:], training=short)[1][0][
                "train_loss"
            ]
        )


def test_refuses_to_resume_under_another_configuration(tmp_path):
    run(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "finished": False}))
    other = TrainingConfig(**{**TRAINING.to_dict(), "learning_rate": 1e-3})
    with pytest.raises(ResumeError, match=r"training\.learning_rate is 0\.01 there, 0\.001 here"):
        run(tmp_path, training=other)
    assert (tmp_path / "last.ckpt").exists()
    _, history = run(tmp_path, training=other, restart=True)
    assert len(history) == 3


def test_refuses_scans_that_do_not_fit(tmp_path):
    scans = simulated(2)
    with pytest.raises(DataError, match=r"both training and validation: \['sub-00'\]"):
        run(tmp_path, train=scans, validation=scans[:1])
    with pytest.raises(
        DataError, match=r"scan-0: expected at least 32 frames of 6 parcels, got \(20, 6\)"
    ):
        run(tmp_path, train=simulated(1, n_frames=20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be positive"),
        ({"epochs": 1.5}, "epochs must be int"),
        ({"ema_decay": 1.0}, "must be below 1"),
        ({"clip": -1}, "clip must be positive"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_draws_depend_on_their_number_alone():
    windows, again = (
        RandomWindows(simulated(3), Scaling(), OBJECTIVE, 32, seed=5) for _ in range(2)
    )
    a, b = windows[7], again[7]
    assert a["scan"] == b["scan"]
    assert all(torch.equal(a[k], b[k]) for k in ("x", "hidden", "t_r"))
    assert not torch.equal(a["x"], windows[8]["x"])
    assert a["hidden"].sum() == 16 * 6
    assert list(Draws(4, 2, lambda: 4)) == [[8, 9], [10, 11]]


def test_importing_the_package_does_not_import_lightning():
    code = "import sys, mnemodyn, mnemodyn.checkpoint; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
