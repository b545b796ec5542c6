"""Objectives: their views, scores and errors; every one of them killed and resumed, and trained by two processes."""

import os
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import CPU, MODEL, TRAINING, run, simulated

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError
from mnemodyn.data.store import convert
from mnemodyn.model.network import MnemoDyn, Output
from mnemodyn.pretrain import training as training_module
from mnemodyn.pretrain.objectives import (
    OBJECTIVES,
    TARGETS,
    Autoencode,
    Denoise,
    Forecast,
    Groups,
    Latent,
    Masked,
    Mixed,
    effective_rank,
    make_objective,
)
from mnemodyn.pretrain.training import Learner, TrainingError, rate_of
from mnemodyn.pretrain.windows import Draws, FixedWindows, RandomWindows, collate
from mnemodyn.settings import Settings, TrainingConfig

SETTINGS = {
    "masked": {"hidden_share": 0.5, "mask_window": 4, "share_spread": 0.2},
    "connectome": {"shortest": 8, "fit_scans": 16},
    "groups": {"pattern": r"parcel-([0-2]|[3-5])"},
    "mixed": {
        "mix": [
            {"name": "masked", "hidden_share": 0.5, "mask_window": 4},
            {"name": "latent", "weight": 0.5},
        ]
    },
}
ALL = {name: cls(**SETTINGS.get(name, {})) for name, cls in OBJECTIVES.items()}
EVERY = pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
PARCELS = tuple(f"area-{i // 2}_{'LR'[i % 2]}" for i in range(8))
WITH_CONNECTOME = replace(
    MODEL, front="gaussian", front_lags=0, connectome="operator", connectome_maps=2
)
SHORT = replace(TRAINING, epochs=2, windows_per_epoch=20)


def view(objective, time=40, seed=0, **known):
    x = torch.randn(time, len(PARCELS), generator=torch.Generator().manual_seed(1))
    return x, objective.view(x, t_r=2.0, parcels=PARCELS, seed=seed, **known)


# Views and scores


@pytest.mark.parametrize("time", [2, 3, 5, 64])
@pytest.mark.parametrize(
    "shares", [(0.5, 0.25, 0.5), (0.01, 0.01, 0.01), (0.98, 0.01, 0.99), (0.5, 0.5, 0.5)]
)
def test_blocks_are_never_empty_and_lie_where_they_should(time, shares):
    objective = Latent(
        **dict(zip(("observed_share", "target_share", "parcel_share"), shares, strict=True))
    )
    for seed in range(50):
        _, blocks = view(objective, time, seed)
        frames, parcels = ({k: b.any(axis) for k, b in blocks.items()} for axis in (1, 0))
        assert set(blocks) == {"observed", *TARGETS}
        for name, block in blocks.items():
            assert block.any()
            assert torch.equal(
                block, frames[name][:, None] & parcels[name]
            )  # a block, and nothing beside it
            assert name == "observed" or not (block & blocks["observed"]).any()
        first = int(frames["observed"].int().argmax())
        for name in ("earlier", "both"):
            assert not frames[name][first:].any()
        assert torch.equal(frames["elsewhere"], frames["observed"])
        for name in ("elsewhere", "both"):
            assert not (parcels[name] & parcels["observed"]).any()
        assert torch.equal(parcels["earlier"], parcels["observed"])


def test_blocks_reach_every_frame_and_parcel():
    blocks = [view(Latent(), seed=seed)[1] for seed in range(300)]
    for name in ("observed", *TARGETS):
        assert torch.stack([b[name] for b in blocks]).any(0).any(0).all()
    assert torch.stack([b["observed"].any(1) for b in blocks]).any(0)[10:].all()


def test_forecast_hides_seconds_and_groups_hide_groups():
    _, found = view(Forecast(horizon=10.0))
    assert torch.equal(found["hidden"].all(1), torch.arange(40) >= 35)
    assert found["hidden"].sum() == 5 * 8
    sides = {tuple(view(Groups(), seed=seed)[1]["hidden"].all(0).tolist()) for seed in range(20)}
    assert sides == {(True, False) * 4, (False, True) * 4}
    with pytest.raises(ValueError, match="at least two groups .* found none in names such as"):
        view(Groups(pattern="(nothing)"))
    with pytest.raises(ValueError, match=r"got 100\.0 s, which are 50 at t_r 2\.0 s"):
        view(Forecast(horizon=100.0))


def test_mask_windows_in_seconds():
    _, found = view(Masked(hidden_share=0.1, mask_seconds=8.0))
    _, frames = view(Masked(hidden_share=0.1, mask_window=4))
    assert torch.equal(found["hidden"], frames["hidden"])


@EVERY
def test_views_follow_their_seed_alone(objective):
    if objective.name == "groups":
        objective = Groups()
    (_, a), (_, b), (_, c) = (view(objective, seed=seed, training=True) for seed in (3, 3, 7))
    assert all(torch.equal(a[key], b[key]) for key in a)
    still = objective.name in ("autoencode", "forecast")
    assert still or any(not torch.equal(a[key], c[key]) for key in a)


def batch_of(objective, n=3, **changes):
    items = []
    for i in range(n):
        x, found = view(objective, seed=i)
        items.append({"x": x, "t_r": torch.tensor(2.0), "scan": f"scan-{i}", **found})
    return {**collate(items), **changes}


def scores(objective, network, batch):
    return objective.scores(objective.sums(network, batch, torch.nn.ModuleDict()))


def test_scores_mean_what_they_say():
    def identity(x, t_r, hidden=None, **_):
        return Output(x if hidden is None else x.masked_fill(hidden, 0), x, None)

    assert scores(Autoencode(), identity, batch_of(Autoencode())) == {"r2": 1.0}
    batch = batch_of(Denoise(0.5))
    noise = batch["input"] - batch["x"]
    assert noise.std() == pytest.approx(0.5, rel=0.05)
    idle = scores(Denoise(0.5), identity, batch)
    assert idle["noise_removed"] == 0
    assert idle["r2_clean"] == pytest.approx(
        1 - float(noise.square().sum() / batch["x"].square().sum()), abs=1e-5
    )
    half = scores(Denoise(0.5), lambda x, *_, **__: Output(x - noise / 2, x, None), batch)
    assert half["noise_removed"] == pytest.approx(0.75, abs=1e-5)
    for objective in (Masked(), Forecast(), Groups()):
        found = scores(objective, identity, batch_of(objective))
        assert found == {"r2_hidden": 0.0, "r2_visible": 1.0}


def test_padding_and_censored_frames_count_for_nothing():
    objective = Denoise(0.5)
    items = []
    for i, time in enumerate((40, 30)):
        x, found = view(objective, time=time, seed=i)
        censored = torch.zeros(time, dtype=torch.bool)
        censored[5:8] = True
        items.append({"x": x, "t_r": torch.tensor(2.0), "scan": "a", "censored": censored, **found})
    batch = collate(items)
    assert batch["lengths"].tolist() == [40, 30]
    network = lambda x, *_, **__: Output(x + 1, x, None)  # noqa: E731
    total, count = objective.loss(network, batch, torch.nn.ModuleDict())["error"]
    assert count == (37 + 27) * 8
    expected = sum(
        ((it["input"] + 1 - it["x"])[~it["censored"]].square().sum() for it in items),
        torch.zeros(()),
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_effective_rank_of_known_spectra():
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0].double()
    for k in (1, 3, 6):
        values = torch.tensor([2.0] * k + [0.0] * (6 - k)).double()
        assert effective_rank(q @ values.diag() @ q.T) == pytest.approx(k, rel=1e-6)
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_latent_scores_against_numpy():
    objective, network = Latent(), MnemoDyn(replace(MODEL, n_parcels=8, n_timepoints=40))
    parts, batch = objective.parts(network), batch_of(objective)
    found = scores_with(objective, network, parts, batch)
    with torch.no_grad():
        latents = network(batch["x"], batch["t_r"]).latents.flatten(0, 1).double().numpy()
        _, guesses, targets, frames = objective._guesses(network, batch, parts)
    assert found["embedding_sd"] == pytest.approx(latents.std(0).mean(), rel=1e-5)
    shares = np.linalg.eigvalsh(np.cov(latents.T))
    shares /= shares.sum()
    assert found["rank_share"] == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()) / 8, rel=1e-5
    )
    error = power = 0.0
    for guess, target, where in zip(*(a.chunk(3) for a in (guesses, targets, frames)), strict=True):
        guess, target = guess[where].double().numpy(), target[where].double().numpy()
        error, power = (
            error + ((guess - target) ** 2).sum(),
            power + ((target - target.mean(0)) ** 2).sum(),
        )
    assert found["r2_latent"] == pytest.approx(1 - error / power, rel=1e-5)


def scores_with(objective, network, parts, batch):
    with torch.no_grad():
        return objective.scores(objective.sums(network, batch, parts))


def test_teacher_gets_no_gradient_and_follows():
    objective, network = (
        Latent(teacher_decay=0.9),
        MnemoDyn(replace(MODEL, n_parcels=8, n_timepoints=40)),
    )
    parts = objective.parts(network)
    total = sum(
        total / count
        for total, count in objective.loss(network, batch_of(objective), parts).values()
    )
    total.backward()
    assert all(p.grad is not None for p in network.parameters())
    assert all(p.grad is None for p in parts["teacher"].parameters())
    before = [p.clone() for p in parts["teacher"].parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p += 1
    objective.after_step(network, parts)
    for a, b in zip(before, parts["teacher"].parameters(), strict=True):
        torch.testing.assert_close(b - a, torch.full_like(a, 0.1), atol=1e-5, rtol=0)


def test_an_objective_is_what_its_settings_say():
    for name, objective in ALL.items():
        settings = Settings.from_mapping({"objective": objective.to_dict()}).objective
        assert make_objective(settings) == objective
        assert type(objective) is OBJECTIVES[name]
    assert [weight for _, weight in ALL["mixed"].members.values()] == [1.0, 0.5]
    assert ALL["mixed"].monitor == "val_masked_r2_hidden"
    assert Mixed(mix=ALL["mixed"].mix) == ALL["mixed"]


# Schedules, draws


def test_warm_restarts_are_those_of_torch():
    config = TrainingConfig(
        epochs=8,
        windows_per_epoch=1,
        batch_size=1,
        schedule="restarts",
        restart_epochs=2,
        warmup_share=0.0,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2, eta_min=0.0)
    rate = rate_of(config)
    for step in range(1, 14):
        optimizer.step()
        oracle.step()
        assert rate(step + 1) == pytest.approx(
            max(0.01, oracle.get_last_lr()[0]), abs=1e-9
        )  # one step of warm-up


@pytest.mark.parametrize(
    ("n", "batch", "world", "parts"), [(20, 8, 2, 1), (24, 6, 3, 2), (10, 4, 1, 2)]
)
def test_processes_share_what_one_would_draw(n, batch, world, parts):
    one = TrainingConfig(windows_per_epoch=n, batch_size=batch)
    several = replace(one, accumulate=parts)
    whole = list(Draws(one, lambda: 0))
    ranks = [list(Draws(several, lambda: 0, rank=r, world=world)) for r in range(world)]
    for step, draws in enumerate(whole):
        joined = [
            d for rank in ranks for part in rank[step * parts : (step + 1) * parts] for d in part
        ]
        assert sorted(joined) == draws
    later = list(Draws(several, lambda: 1, world=world))
    assert later[0][0] == n
    assert len(later) == len(whole) * parts
    with pytest.raises(ValueError, match="every step needs a window for each process and part"):
        Draws(TrainingConfig(windows_per_epoch=9, batch_size=8), lambda: 0, world=2)


def test_windows_in_seconds_mix_lengths_and_repetition_times():
    scans = [
        *simulated(1),
        *(replace(s, t_r=1.0, participant_id="b") for s in simulated(1, seed=4)),
    ]
    windows = RandomWindows(scans, Scaling(), ALL["masked"], 32, 0, seconds=40.0)
    batch = collate([windows[i] for i in range(6)])
    assert {(float(t), int(n)) for t, n in zip(batch["t_r"], batch["lengths"], strict=True)} == {
        (2.0, 20),
        (1.0, 40),
    }
    short = [replace(scans[0], values=scans[0].values[:15])]
    assert len(FixedWindows(short, Scaling(), ALL["masked"], 32, 0, seconds=40.0)[0]["x"]) == 15
    with pytest.raises(DataError, match=r"expected at least 10 frames of 6 parcels, got \(9, 6\)"):
        FixedWindows(
            [replace(short[0], values=short[0].values[:9])],
            Scaling(),
            ALL["masked"],
            32,
            0,
            seconds=40.0,
        )


def test_a_store_gives_the_windows_of_its_scans(tmp_path):
    scans = simulated(3)
    lost = np.zeros(128, dtype=bool)
    lost[40:50] = True
    scans[1] = replace(scans[1], censored=lost)
    store = convert(scans, tmp_path / "store", dtype="float32")
    ours, theirs = (RandomWindows(s, Scaling(), ALL["masked"], 32, seed=5) for s in (scans, store))
    for draw in range(20):
        a, b = ours[draw], theirs[draw]
        assert a["scan"] == b["scan"]
        assert torch.equal(a["hidden"], b["hidden"])
        torch.testing.assert_close(a["x"], b["x"], atol=1e-5, rtol=1e-5)
        assert torch.equal(a["censored"], b["censored"])
        assert not a["x"][a["censored"]].any()
    known = store.select([0])
    chosen = store.select([1])
    _, history = train(tmp_path / "run", ALL["masked"], train=known, validation=chosen)
    assert history[-1]["val_r2_hidden"] > 0


# Training: in a process of its own, so that it can be killed


def in_a_child(call) -> int:
    """Run `call` in a forked process and return its wait status."""
    pid = os.fork()
    if pid == 0:
        torch.cuda._is_in_bad_fork = lambda: False  # a build for GPUs that only counted them
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            call()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def train(folder, objective, config=SHORT, machine=CPU, **scans):
    scans = scans or {
        "train": simulated(3, n_frames=64),
        "validation": simulated(1, seed=9, n_frames=64),
    }
    model = WITH_CONNECTOME if objective.name == "connectome" else MODEL
    return run(folder, model=model, objective=objective, training=config, machine=machine, **scans)


def weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


@EVERY
def test_killed_anywhere_resumes_to_the_same_weights(objective, tmp_path, monkeypatch):
    """Killed in a step of the second epoch, and then while the checkpoint at its end is written."""
    config = replace(SHORT, ema_decay=0.0) if objective.name == "denoise" else SHORT
    config = replace(config, accumulate=2) if objective.name == "forecast" else config
    _, history = train(tmp_path / "whole", objective, config)
    step = Learner.training_step

    def dies_in_step_7(self, batch, i):
        if self.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, i)

    def dies_in_writing(path, content):
        path.with_name(".torn.tmp").write_bytes(bytes(content)[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

    for name, place, value in (
        ("training_step", Learner, dies_in_step_7),
        ("write_bytes", training_module, dies_in_writing),
    ):
        with monkeypatch.context() as m:
            m.setattr(place, name, value)
            status = in_a_child(lambda: train(tmp_path / "cut", objective, config))
            assert status == signal.SIGKILL
    assert weights(tmp_path / "cut" / "unfinished")["global_step"] == 5
    _, resumed = train(tmp_path / "cut", objective, config)
    assert resumed == history
    assert [path.name for path in sorted((tmp_path / "cut").iterdir())] == [
        "best",
        "history.csv",
        "run.json",
    ]
    a, b = (
        (tmp_path / kind / "best" / "model.safetensors").read_bytes() for kind in ("whole", "cut")
    )
    assert a == b


@EVERY
def test_two_processes_have_the_gradients_of_one(objective, tmp_path, monkeypatch):
    def keep(self, _):
        if self.global_rank == 0:
            torch.save({k: p.grad for k, p in self.named_parameters() if p.requires_grad}, place)

    monkeypatch.setattr(Learner, "on_before_optimizer_step", keep)
    config = replace(SHORT, epochs=1, windows_per_epoch=6, batch_size=6)
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    place = one
    _, alone = train(tmp_path / "alone", objective, config)
    place = two
    machine = replace(CPU, devices=2, strategy="ddp_fork")

    def both():
        _, history = train(tmp_path / "both", objective, config, machine)
        for key, value in alone[1].items():
            assert history[1][key] == pytest.approx(value, abs=1e-4), key

    assert in_a_child(both) == 0
    one, two = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
    assert one.keys() == two.keys()
    assert max(float(g.abs().max()) for g in one.values()) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5, msg=name)


def test_recomputed_blocks_and_parts_of_a_step_change_no_result(tmp_path):
    config = replace(SHORT, epochs=1, windows_per_epoch=8)
    objective = Denoise()  # every window counts the same number of entries
    plain, again, parts = (
        train(tmp_path / name, objective, c, m)[1]
        for name, c, m in (
            ("a", config, CPU),
            ("b", config, replace(CPU, recompute=True, workers=1)),
            ("c", replace(config, accumulate=2), CPU),
        )
    )
    assert again == plain
    assert parts[1]["val_r2_clean"] == pytest.approx(plain[1]["val_r2_clean"], abs=1e-4)


def test_mixed_precision_trains(tmp_path):
    _, history = train(tmp_path, ALL["masked"], replace(SHORT, precision="bf16-mixed"))
    assert history[-1]["val_r2_hidden"] > 0


def test_latents_keep_their_rank(tmp_path):
    """SIMULATED scans of six independent sources: nothing but the objective itself could take the rank away."""
    rng = np.random.default_rng(0)
    scans = [
        replace(s, values=rng.standard_normal(s.values.shape, dtype=np.float32))
        for s in simulated(4)
    ]
    scans = [replace(s, participant_id=f"sub-{i}") for i, s in enumerate(scans)]
    config = replace(TRAINING, epochs=3, windows_per_epoch=64)
    _, history = train(tmp_path, Latent(), config, train=scans[:3], validation=scans[3:])
    assert history[-1]["val_rank_share"] > 0.5
    assert history[-1]["val_embedding_sd"] > 0.3


def test_collapse_is_said(capsys, tmp_path):
    objective = Latent(variance_weight=0.0, covariance_weight=0.0)
    assert objective.warning({"rank_share": 0.3, "embedding_sd": 1.0})
    assert not objective.warning({"rank_share": 0.6, "embedding_sd": 1.0})
    train(tmp_path, objective, replace(SHORT, epochs=1))
    assert "warning: the embeddings collapse" in capsys.readouterr().out


def test_a_nan_in_the_loss_stops_with_the_scans_named(tmp_path, monkeypatch):
    train(tmp_path / "b", ALL["masked"], replace(SHORT, epochs=1))
    step = type(ALL["masked"]).loss
    seen = []

    def nan_at_last(self, network, batch, parts):
        seen.append(1)
        return {
            "error": (
                step(self, network, batch, parts)["error"][0] * (np.nan if len(seen) > 7 else 1),
                torch.tensor(1),
            )
        }

    monkeypatch.setattr(Masked, "loss", nan_at_last)
    with pytest.raises(
        TrainingError,
        match=r"loss is nan at step 7, in a batch of scan-\d.*smaller learning_rate",
    ):
        train(tmp_path / "c", ALL["masked"])
    kept = weights(tmp_path / "c" / "unfinished")
    assert kept["global_step"] == 5
    assert all(p.isfinite().all() for p in kept["state_dict"].values())


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    writer = training_module.WholeFiles()
    last = tmp_path / "last.ckpt"
    writer.save_checkpoint({"weights": torch.zeros(1000)}, last)
    whole = last.read_bytes()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(OSError, match=r"File too large: .*last\.ckpt"):
            writer.save_checkpoint({"weights": torch.ones(1000)}, last)

    assert in_a_child(full) == 0
    assert last.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [last]


def test_biases_and_scales_do_not_decay():
    model = MnemoDyn(replace(MODEL, parcel_scale=True))
    groups = (
        Learner(model, Masked(), TrainingConfig()).configure_optimizers()["optimizer"].param_groups
    )
    kept = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in kept) == name.endswith(("bias", "parcel_scale")), name
