"""Training end to end on small scans: it learns, resumes to the same weights, and refuses what it should."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mnemodyn.checkpoint import CheckpointError, from_pretrained
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.data.store import convert
from mnemodyn.files import locked
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain import training as training_module
from mnemodyn.pretrain.objectives import Masked
from mnemodyn.pretrain.training import (
    Fronts,
    ResumeError,
    TrainingError,
    fit,
    pretrain,
    pretrain_rival,
    pretrain_several,
)
from mnemodyn.pretrain.windows import Draws, FixedWindows, RandomWindows
from mnemodyn.settings import Machine, ModelConfig, Settings, TrainingConfig

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


def settings(model=MODEL, objective=OBJECTIVE, training=TRAINING, machine=CPU):
    return Settings(model=model, objective=objective, training=training, machine=machine)


def run(folder, *, train=None, validation=None, restart=False, **parts):
    train = train or simulated(3)
    validation = validation or simulated(1, seed=9)
    return pretrain(train, validation, folder, settings(**parts), restart=restart)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint, history = run(folder)
    return folder, checkpoint, history


def test_learns_and_writes_what_it_says(finished):
    folder, checkpoint, history = finished
    assert [r["epoch"] for r in history] == [0, 1, 2, 3]
    assert history[0]["train_loss"] is None
    assert history[-1]["val_r2_hidden"] > 0.5
    assert history[-1]["train_loss"] < history[1]["train_loss"]
    lines = (folder / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,val_r2_hidden,val_r2_visible"
    assert len(lines) == 5
    assert {path.name for path in folder.iterdir()} == {"best", "history.csv", "run.json"}
    best = max(r["val_r2_hidden"] for r in history)
    assert checkpoint.training["val_r2_hidden"] == best
    assert checkpoint.training["settings"] == settings().to_dict()


def test_the_network_before_its_first_step_is_a_candidate(tmp_path):
    """With a rate that destroys the network, what is kept is the network as it was initialised."""
    ruin = replace(TRAINING, epochs=2, windows_per_epoch=8, learning_rate=1.0)
    checkpoint, history = run(tmp_path, training=ruin)
    assert history[0]["val_r2_hidden"] > max(r["val_r2_hidden"] for r in history[1:])
    torch.manual_seed(TRAINING.seed)
    fresh = MnemoDyn(MODEL).state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in checkpoint.model.state_dict().items())


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


def test_a_finished_run_is_taken_as_it_is(finished, capsys, monkeypatch):
    folder, checkpoint, history = finished
    monkeypatch.setattr(training_module, "fit", None)
    again, rows = run(folder)
    assert rows == history
    assert capsys.readouterr().out.count("epoch ") == 4
    assert again.fingerprint() == checkpoint.fingerprint()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import conftest  # the same number of threads
from test_training import run
run({folder!r})
"""


def test_killed_run_resumes_to_the_same_weights(finished, tmp_path):
    _, checkpoint, history = finished
    tests = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(tests=tests, folder=str(tmp_path))],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    rows = tmp_path / "unfinished" / "history.csv"
    deadline = time.monotonic() + 300  # of a busy machine
    while not (
        rows.is_file()
        and len(rows.read_text().splitlines()) > 2
        and rows.with_name("last.ckpt").exists()
    ):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
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
            run(tmp_path / "run", train=scans[:1], validation=scans[1:], training=short)[1][1][
                "train_loss"
            ]
        )


def test_another_run_replaces_one_only_when_it_is_finished(tmp_path, monkeypatch):
    first, _ = run(tmp_path)
    other = replace(TRAINING, learning_rate=1e-3)

    class Killed(Exception):
        pass

    def killed(self):
        if self.rows[-1]["epoch"] == 1:
            raise Killed

    with monkeypatch.context() as m:
        m.setattr(training_module.Learner, "on_train_epoch_end", killed)
        with pytest.raises(Killed):
            run(tmp_path, training=other)
    # The finished run still stands; the unfinished one is not given up for a third by accident.
    assert run(tmp_path)[0].fingerprint() == first.fingerprint()
    third = replace(TRAINING, learning_rate=3e-3)
    with pytest.raises(
        ResumeError, match=r"settings\.training\.learning_rate is 0\.001 there, 0\.003 here"
    ):
        run(tmp_path, training=third)
    assert (tmp_path / "unfinished" / "last.ckpt").exists()
    _, history = run(tmp_path, training=third, restart=True)
    assert len(history) == 4
    assert not (tmp_path / "unfinished").exists()
    assert from_pretrained(tmp_path / "best").fingerprint() != first.fingerprint()


def test_links_in_the_folder_of_a_run_are_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("unfinished", "best"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    run(tmp_path / "run")
    assert not list((tmp_path / "mine").iterdir())
    assert not (tmp_path / "run" / "best").is_symlink()
    assert not (tmp_path / "run" / "unfinished").exists()
    # One to nothing, and one in what a killed run has left.
    (tmp_path / "other" / "unfinished").mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "run.json", tmp_path / "other" / "unfinished")
    (tmp_path / "other" / "unfinished" / "best").symlink_to(tmp_path / "mine")
    (tmp_path / "other" / "best").symlink_to("nowhere")
    run(tmp_path / "other")
    assert not list((tmp_path / "mine").iterdir())
    assert (tmp_path / "other" / "best" / "config.json").is_file()


def test_refuses_scans_that_do_not_fit(tmp_path):
    scans = simulated(2)
    with pytest.raises(DataError, match=r"both training and validation: \['sub-00'\]"):
        run(tmp_path, train=scans, validation=scans[:1])
    with pytest.raises(
        DataError, match=r"scan-0: expected at least 32 frames of 6 parcels, got \(20, 6\)"
    ):
        run(tmp_path, train=simulated(1, n_frames=20))


def test_draws_depend_on_their_number_alone():
    windows, again = (
        RandomWindows(simulated(3), Scaling(), OBJECTIVE, 32, seed=5) for _ in range(2)
    )
    a, b = windows[7], again[7]
    assert a["scan"] == b["scan"]
    assert all(torch.equal(a[k], b[k]) for k in ("x", "hidden", "t_r"))
    assert not torch.equal(a["x"], windows[8]["x"])
    assert a["hidden"].sum() == 16 * 6
    short = TrainingConfig(windows_per_epoch=4, batch_size=2)
    assert list(Draws(short, lambda: 2)) == [[8, 9], [10, 11]]
    first, second = Draws(replace(short, fresh_windows=False), lambda: 5)
    assert sorted(first + second) == [0, 1, 2, 3]


def test_importing_the_package_does_not_import_lightning():
    code = "import sys, mnemodyn, mnemodyn.checkpoint; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The front end


def test_training_windows_are_filled_by_front_ends_that_have_not_seen_their_people():
    scans = simulated(5, n_frames=64)
    model = replace(MODEL, front="gaussian", front_lags=2)
    network = MnemoDyn(model)
    fronts = Fronts(scans, Scaling(), TrainingConfig(cross_fit=2))
    fronts.fit(network.front)
    assert fronts.folds == [0, 1, 0, 1, 0]
    for fold in (0, 1):
        others = [Scaling()(s) for s, of in zip(scans, fronts.folds, strict=True) if of != fold]
        expected = MnemoDyn(model).fit_front(others).front
        x = torch.from_numpy(Scaling()(scans[fold]))[None, :32]
        hidden = OBJECTIVE.hide((1, 32, 6), seed=1)
        found = fronts.run(
            lambda x, t_r, filled, **_: filled,
            x,
            torch.tensor([2.0]),
            folds=torch.tensor([fold]),
            keep=False,
            hidden=hidden,
        )
        torch.testing.assert_close(found, expected(x, hidden))
        assert (found - network.front(x, hidden)).abs().max() > 1e-3
    everybody = MnemoDyn(model).fit_front([Scaling()(s) for s in scans]).front.state_dict()
    assert all(torch.equal(v, everybody[k]) for k, v in network.front.state_dict().items())


def test_fills_are_kept_only_where_windows_return(tmp_path, monkeypatch):
    calls = []
    fill = Fronts._fill

    def counted(self, fold, x, unseen, keep):
        before = len(self.kept)
        found = fill(self, fold, x, unseen, keep)
        calls.append((fold, keep, len(self.kept) - before, len(x)))
        return found

    monkeypatch.setattr(Fronts, "_fill", counted)
    model = replace(MODEL, front="gaussian", front_lags=2)
    short = replace(TRAINING, epochs=2, windows_per_epoch=8, cross_fit=3)
    run(tmp_path / "fresh", model=model, training=short)
    assert {keep for fold, keep, *_ in calls if fold != Fronts.ALL} == {False}
    assert sum(new for fold, _, new, _ in calls) == 4  # the windows of validation, once
    calls.clear()
    run(tmp_path / "kept", model=model, training=replace(short, fresh_windows=False))
    assert sum(new for fold, _, new, _ in calls) == 4 + 8
    assert sum(n for *_, n in calls) == 3 * 4 + 2 * 8


def test_windows_of_unequal_length_are_filled_one_length_at_a_time(tmp_path):
    slow = simulated(2, n_frames=64)
    fast = [replace(s, t_r=1.0, participant_id=f"fast-{s.participant_id}") for s in slow]
    model = replace(MODEL, front="gaussian", front_lags=2)
    seconds = replace(TRAINING, epochs=1, windows_per_epoch=16, window_seconds=40.0)
    _, history = run(tmp_path, train=slow + fast, model=model, training=seconds)
    assert history[1]["val_r2_hidden"] > 0.3


# Other networks


class Smooth(torch.nn.Module):
    """Learns one number: how much of the neighbouring frames a hidden entry has."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t_r, *, hidden=None):
        x = x.masked_fill(hidden, 0)
        return torch.where(hidden, self.weight * (x.roll(1, 1) + x.roll(-1, 1)), x)


def test_a_rival_is_trained_by_the_same_loop(tmp_path):
    fast = replace(TRAINING, learning_rate=0.1)
    people = simulated(3), simulated(1, seed=9)
    network, history = pretrain_rival(Smooth, *people, tmp_path, settings(training=fast))
    assert history[0]["val_r2_hidden"] == 0.0
    assert history[-1]["val_r2_hidden"] > 0.1
    again, rows = pretrain_rival(Smooth, *people, tmp_path, settings(training=fast))
    assert rows == history
    assert again.weight == network.weight > 0.1


def test_fit_trains_anything_with_a_loss():
    """A label is found through an objective of one's own and a data set of dictionaries."""

    class Label:
        monitor = "val_r2"

        def parts(self, network):
            return torch.nn.ModuleDict()

        def after_step(self, network, parts):
            pass

        def loss(self, network, batch, parts):
            error = (network(batch["x"].mean((1, 2), keepdim=True))[:, 0, 0] - batch["y"]).square()
            return {"error": (error.sum(), torch.tensor(len(error)))}

        def sums(self, network, batch, parts):
            return {"error": self.loss(network, batch, parts)["error"][0]}

        def scores(self, sums):
            return {"r2": float(1 - sums["error"] / 10)}

        def warning(self, scores):
            return ""

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            y = torch.randn((), generator=torch.Generator().manual_seed(i))
            return {"x": y.expand(4, 3), "y": 2 * y, "scan": str(i)}

    network = torch.nn.Linear(1, 1)
    fast = replace(TRAINING, learning_rate=0.1, epochs=8)
    history = fit(network, Label(), Data(), Data(), fast, CPU)
    assert history[-1]["val_r2"] > 0.9
    assert not network.training


def test_the_rate_is_chosen_over_all_seeds(tmp_path):
    short = replace(TRAINING, epochs=1, windows_per_epoch=8)
    people = simulated(3), simulated(1, seed=9)
    networks, table = pretrain_several(
        *people, tmp_path, settings(training=short), seeds=(0, 1), rates=(1e-6, 1e-2)
    )
    assert len(networks) == 2
    assert table["kept"].tolist() == [False, False, True, True]
    assert table.groupby("rate")["score"].mean().idxmax() == 1e-2
    assert networks[1].training["settings"]["training"]["seed"] == 1
    alone, _ = run(tmp_path / "alone", training=replace(short, seed=1, learning_rate=1e-2))
    assert alone.fingerprint() == networks[1].fingerprint()


# Damaged files, divergence, interruption, and two trainings at once

SHORT = replace(TRAINING, epochs=2, windows_per_epoch=8)
OTHER = replace(SHORT, learning_rate=1e-3)


def stop(learner):
    """In place of a hook: the training ends after its first epoch, as if it were killed."""
    if learner.rows[-1]["epoch"] == 1:
        raise MemoryError


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with a finished run, and an unfinished one of other settings."""
    folder = tmp_path_factory.mktemp("both")
    run(folder, training=SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_module.Learner, "on_train_epoch_end", stop)
        with pytest.raises(MemoryError):
            run(folder, training=OTHER)
    return folder


def damaged(tmp_path, both, name, content):
    folder = Path(shutil.copytree(both, tmp_path / "run"))
    path = folder / name
    path.write_bytes(
        path.read_bytes()[: len(path.read_bytes()) // 2] if content is None else content
    )
    return folder


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("run.json", b"{}", "run.json"),
        ("run.json", b"[]", "run.json"),
        ("run.json", b"", "run.json"),
        ("run.json", None, "run.json"),
        ("best/model.safetensors", None, "run.json"),
        ("best/config.json", b"{}", "run.json"),
        ("unfinished/run.json", b"{}", "unfinished"),
        ("unfinished/last.ckpt", b"", "unfinished"),
        ("unfinished/last.ckpt", None, "unfinished"),
        ("unfinished/last.ckpt", pickle.dumps({"record": Path("a")}), "unfinished"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, both, name, content, remedy):
    folder = damaged(tmp_path, both, name, content)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    training = OTHER if name.startswith("unfinished") else SHORT
    with pytest.raises((ResumeError, CheckpointError)) as error:
        run(folder, training=training)
    message = str(error.value)
    assert message.startswith(str(folder / name))
    assert f"delete {folder / remedy}," in message
    assert "weights_only" not in message
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # And that helps.
    if remedy == "run.json":
        (folder / "run.json").unlink()
        shutil.rmtree(folder / "unfinished")
    else:
        shutil.rmtree(folder / "unfinished")
    assert len(run(folder, training=training)[1]) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["record"]["best"]["weights"].popitem(),
        lambda content: content["record"]["best"].pop("epoch"),
        lambda content: content["record"]["rows"].clear(),
        lambda content: content["record"].update(best=None),
        lambda content: content.pop("optimizer_states"),
        lambda content: content["optimizer_states"].clear(),
        lambda content: content["optimizer_states"][0]["param_groups"].pop(),
        lambda content: content.pop("lr_schedulers"),
        lambda content: content.pop("loops"),
        lambda content: content.pop("global_step"),
        lambda content: content.pop("pytorch-lightning_version"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(tmp_path, both, change):
    folder = Path(shutil.copytree(both, tmp_path / "run"))
    last = folder / "unfinished" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    change(content)
    torch.save(content, last)
    with pytest.raises(ResumeError, match=r"last\.ckpt is not of this training.*delete"):
        run(folder, training=OTHER)


def test_half_a_history_is_written_again(tmp_path, both):
    folder = damaged(tmp_path, both, "history.csv", None)
    with pytest.warns(UserWarning, match=r"history\.csv was damaged; it is written again"):
        run(folder, training=SHORT)
    assert (folder / "history.csv").read_bytes() == (both / "history.csv").read_bytes()
    # That of an unfinished run is made of its checkpoint.
    (folder / "unfinished" / "history.csv").write_text("epoch,tr")
    run(folder, training=OTHER)
    assert len((folder / "history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("windows", [4, 8])  # one step an epoch, and two
def test_divergence_says_what_to_do_and_costs_nothing(tmp_path, both, windows):
    folder = Path(shutil.copytree(both, tmp_path / "run"))
    shutil.rmtree(folder / "unfinished")
    wild = replace(SHORT, learning_rate=1e30, windows_per_epoch=windows)
    with pytest.raises(TrainingError, match=r"is nan .*smaller learning_rate than 1e\+30"):
        run(folder, training=wild)
    assert len(run(folder, training=SHORT)[1]) == 3
    assert (folder / "best/config.json").read_bytes() == (both / "best/config.json").read_bytes()


def test_two_trainings_never_write_one_folder(tmp_path):
    message = r"is being written by this process.*another output"
    with locked(tmp_path, "the first"), pytest.raises(RuntimeError, match=message):
        run(tmp_path, training=SHORT)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_training_was_writing_goes(tmp_path):
    left = tmp_path / "unfinished" / "best" / ".model.safetensors.999999999-0123abcd-0123abcd.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    run(tmp_path, training=SHORT)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_an_interrupted_training_is_an_interruption(tmp_path, monkeypatch):
    def interrupt(learner):
        signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training_module.Learner, "on_train_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, training=SHORT)
    assert signal.getsignal(signal.SIGINT) is handler
