"""The estimate of a person's connectivity from a short scan, against numpy, scipy and planted differences."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import expm, logm
from sklearn.covariance import oas

from mnemodyn import estimate_connectivity, open_scans
from mnemodyn.checkpoint import Checkpoint, CheckpointError, from_pretrained, save_checkpoint
from mnemodyn.cli import main
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan, save_scan
from mnemodyn.model.connectome import (
    LENGTHS,
    Connectome,
    from_tangent,
    standardised,
    to_matrix,
    to_tangent,
    to_vector,
)
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.objectives import Connectome as Objective
from mnemodyn.pretrain.objectives import Masked
from mnemodyn.pretrain.training import pretrain
from mnemodyn.pretrain.windows import FixedWindows
from mnemodyn.settings import Machine, ModelConfig, Settings, SettingsError, TrainingConfig

PARCELS = tuple(f"parcel-{i}" for i in range(6))
MODEL = ModelConfig(
    n_parcels=6,
    n_timepoints=120,
    n_blocks=1,
    n_channels=8,
    input_width=8,
    n_levels=2,
    front="gaussian",
    front_lags=0,
    connectome="covariance",
    connectome_maps=2,
)
SETTINGS = Settings(
    model=MODEL,
    objective=Objective(fit_scans=256),
    training=TrainingConfig(epochs=2, windows_per_epoch=64, batch_size=16, learning_rate=1e-3),
    machine=Machine(accelerator="cpu"),
)


def two_days(n_people, seed=0, n_frames=400):
    """SIMULATED people, each with a covariance of their own on both days, in few directions."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).standard_normal((6, 6)))[0][:, :2]
    mixing = np.random.default_rng(98).standard_normal((6, 6))
    scans = []
    for person in range(n_people):
        own = rng.standard_normal((2, 2))
        root = expm(directions @ (own + own.T) @ directions.T / 2) @ mixing
        for day in (1, 2):
            values = rng.standard_normal((n_frames, 6)) @ root.T
            scans.append(
                Scan(
                    f"sub-{seed}{person:02d}",
                    values.astype(np.float32),
                    1.0,
                    PARCELS,
                    session=str(day),
                    source=f"{person}-{day}",
                )
            )
    return scans


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connectome")
    return pretrain(two_days(24), two_days(6, seed=1), folder, SETTINGS)


def short(scans, n_frames):
    return [replace(scan, values=scan.values[:n_frames]) for scan in scans]


def test_tangent_space_is_that_of_scipy():
    rng = np.random.default_rng(0)
    a, b = (x @ x.mT for x in torch.from_numpy(rng.standard_normal((2, 6, 9))))
    root = torch.linalg.inv(torch.from_numpy(np.real(expm(logm(a.numpy()) / 2))))
    expected = logm((root @ b @ root).numpy())
    found = to_tangent(b, a)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    torch.testing.assert_close(from_tangent(found, a), b)
    assert to_tangent(a, a).abs().max() < 1e-8
    vector = to_vector(found)
    assert vector.norm() == pytest.approx(np.linalg.norm(expected))
    rows, columns = np.triu_indices(6, 1)
    np.testing.assert_allclose(vector[:15], expected[rows, columns] * 2**0.5, atol=1e-8)
    torch.testing.assert_close(to_matrix(vector), found)


def test_constant_parcels_are_zero():
    x = torch.randn(1, 20, 3)
    x[..., 1] = 5.0
    found = standardised(x)
    assert (found[..., 1] == 0).all()
    torch.testing.assert_close(found[..., 0].square().mean(), torch.tensor(1.0))


def test_weights_are_least_squares_in_shared_directions():
    """Signal in one planted direction, noise everywhere: the weight there is that of regression, elsewhere about 0."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    n = 4000
    shared = np.zeros((n, 4, 4))
    shared[:, 0, 0] = 2 * rng.standard_normal(n)

    def noise():
        e = rng.standard_normal((n, 4, 4))
        return (e + e.transpose(0, 2, 1)) / 2

    x = torch.from_numpy(turn @ (shared + noise() + 3) @ turn.T).float()
    y = torch.from_numpy(turn @ (shared + noise() - 1) @ turn.T).float()
    head = Connectome(4, 1)
    head.fit(lambda length: (x, y) if length == 60 else (x[:0], y[:0]))
    strongest = head.directions[:, -1].numpy()
    assert abs(strongest @ turn[:, 0]) > 0.99
    weights = head.weights[LENGTHS.index(60)]
    assert weights[-1, -1] == pytest.approx(4 / 5, abs=0.1)
    assert weights[:-1, :-1].max() < 0.2
    # Longer scans are treated as the longest that there were.
    assert torch.equal(head.weights[-1], weights)
    found = head(x, 60)
    error = (found - y).square().sum() / (y - y.mean(0)).square().sum()
    assert (
        error
        < 0.85 * (x - x.mean(0) - y + y.mean(0)).square().sum() / (y - y.mean(0)).square().sum()
    )
    torch.testing.assert_close(found.mean(0), y.mean(0), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="no scan has 30 frames besides the rest"):
        head.fit(lambda length: (x[:0], y[:0]))


def test_an_unfitted_head_is_the_front_end():
    network = MnemoDyn(replace(MODEL, connectome="operator")).eval()
    network.fit_front([scan.values for scan in two_days(3)])
    x = torch.randn(2, 50, 6)
    adapted = network.estimate_connectivity(x, 1.0, "adapted")
    torch.testing.assert_close(network.estimate_connectivity(x, 1.0, "connectome"), adapted)
    covariance = np.corrcoef(x[0].numpy().T)
    kept = 50 / (MODEL.front_weight + 50)
    mean = network.front.lags[0].double().numpy()
    expected = to_tangent(
        torch.from_numpy(mean + kept * (covariance - mean)), torch.from_numpy(mean)
    )
    # The front end also removes the mean of the group, which is small.
    np.testing.assert_allclose(adapted[0], expected, atol=0.02)


def test_the_rest_of_a_person():
    scans = two_days(2)
    objective = Objective()
    windows = FixedWindows(scans, Scaling(), objective, 120, 0)
    other = np.cov(Scaling()(scans[1]).T, bias=True)
    np.testing.assert_allclose(windows.rest(0, 0, 120), other, atol=1e-5)
    np.testing.assert_allclose(windows[0]["rest"], other, atol=1e-5)
    # Two runs of the other day, weighed by their frames; the same day's other run does not count.
    more = [*scans[:2], replace(scans[1], values=scans[3].values[:200]), replace(scans[0])]
    windows = FixedWindows(more, Scaling(), objective, 120, 0)
    second = np.cov(Scaling()(more[2]).T, bias=True)
    np.testing.assert_allclose(windows.rest(0, 0, 120), (2 * other + second) / 3, atol=1e-5)
    # Of an only scan what is outside the window, without censored frames.
    censored = np.zeros(400, bool)
    censored[300:] = True
    alone = FixedWindows([replace(scans[0], censored=censored)], Scaling(), objective, 120, 0)
    x = Scaling()(alone.scans[0])[120:300]
    np.testing.assert_allclose(alone.rest(0, 0, 120), np.cov(x.T, bias=True), atol=1e-5)
    with pytest.raises(DataError, match=r"a window of 180 usable .* has 120 in this scan and 0 in"):
        alone.rest(0, 120, 300)


def test_the_rest_of_few_frames_is_shrunk_as_scikit_learn_does():
    """Of 21 parcels and 40 frames the covariance is nearly singular; of 42 frames and more it is left as it is."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((60, 21)) @ rng.standard_normal((21, 21))).astype(np.float32)
    parcels = tuple(f"parcel-{i}" for i in range(21))
    scan = Scan("sub-1", values, 1.0, parcels, source="a")
    for n_inside, is_shrunk in ((20, True), (18, False)):
        windows = FixedWindows([scan], Scaling(), Objective(), n_inside, 0)
        outside = Scaling()(scan)[n_inside:].astype(float)
        outside -= outside.mean(0)
        expected = outside.T @ outside / len(outside)
        if is_shrunk:
            expected = oas(outside, assume_centered=True)[0]
        np.testing.assert_allclose(windows.rest(0, 0, n_inside), expected, atol=1e-5)


def test_the_rest_has_as_many_frames_as_the_window_and_is_no_copy():
    scans = two_days(1)
    # The other day is censored but for 50 frames: the rest is what lies outside the window.
    censored = np.ones(400, bool)
    censored[:50] = False
    people = [scans[0], replace(scans[1], censored=censored)]
    windows = FixedWindows(people, Scaling(), Objective(), 120, 0)
    outside = np.cov(Scaling()(scans[0])[120:].T, bias=True)
    np.testing.assert_allclose(windows.rest(0, 0, 120), outside, atol=1e-5)
    first = np.cov(Scaling()(scans[0]).T, bias=True)
    np.testing.assert_allclose(windows.rest(1, 0, 120), first, atol=1e-5)
    # One recording cleaned in two ways is no other run; another run is, and so are both days together.
    again = replace(scans[0], values=(scans[0].values + 1.0) @ np.diag(range(1, 7)))
    run = replace(scans[0], values=scans[1].values)
    windows = FixedWindows([scans[0], again], Scaling(), Objective(), 120, 0)
    np.testing.assert_allclose(windows.rest(0, 0, 120), outside, atol=1e-5)
    windows = FixedWindows([scans[0], again, run], Scaling(), Objective(), 120, 0)
    other = np.cov(Scaling()(scans[1]).T, bias=True)
    np.testing.assert_allclose(windows.rest(0, 0, 120), other, atol=1e-5)
    # Too little is said when windows are made, before any is drawn.
    with pytest.raises(DataError, match=r"0-1: beside a window of 240 usable .* at most half"):
        FixedWindows(scans[:1], Scaling(), Objective(), 240, 0)


def test_learns_what_days_share(trained):
    """On people whom it has not seen: better than the front end, and better than the mean."""
    checkpoint, history = trained
    assert history[0]["val_r2_connectome"] > max(0.1, history[0]["val_r2_adapted"] + 0.05)
    new = two_days(20, seed=2)
    mean = checkpoint.model.connectome.target
    correlation = np.array([np.corrcoef(scan.values.T) for scan in new[1::2]])
    group = checkpoint.model.front.lags[0].double()
    truth = to_vector(to_tangent(torch.from_numpy(correlation), group)).numpy()
    error = {}
    for kind in ("adapted", "connectome"):
        found = estimate_connectivity(short(new[::2], 60), checkpoint, kind)
        assert found.shape == (20, 21)
        error[kind] = np.square(found - truth).sum()
    nobody = np.square(to_vector(mean).numpy() - truth).sum()
    assert error["connectome"] < min(0.8 * nobody, error["adapted"])


def test_lengths_are_drawn_and_censored_frames_do_not_count(trained):
    objective = Objective()
    x = torch.randn(130, 6)
    drawn = {int(objective.view(x, t_r=1.0, parcels=PARCELS, seed=i)["n_used"]) for i in range(50)}
    assert drawn == {30, 60, 120}
    assert int(objective.view(x[:20], t_r=1.0, parcels=PARCELS, seed=0)["n_used"]) == 20
    network = trained[0].model
    censored = torch.zeros(1, 130, dtype=torch.bool)
    censored[0, 5:15] = True
    batch = {"x": x[None], "t_r": torch.ones(1), "n_used": torch.tensor([30])}
    torn = torch.where(censored[..., None], torch.nan, x)
    with torch.no_grad():
        found = objective._estimates(network, {**batch, "x": torn, "censored": censored}, "adapted")
        usable = torch.cat([x[:5], x[15:40]])[None]
        torch.testing.assert_close(found, network.estimate_connectivity(usable, 1.0, "adapted"))


def test_function_and_command_give_the_same(trained, tmp_path):
    checkpoint, _ = trained
    scans = short(two_days(3, seed=3), 60)
    for scan in scans:
        save_scan(scan, tmp_path / f"{scan.participant_id}_ses-{scan.session}_timeseries.tsv")
    folder = save_checkpoint(tmp_path / "network", checkpoint)
    for kind in ("adapted", "connectome"):
        out = tmp_path / f"{kind}.csv"
        words = ["embed", tmp_path, "--checkpoint", folder, "--readout", kind, "-o", out]
        assert main(list(map(str, words))) == 0
        table = pd.read_csv(out).filter(like=f"{kind}_").to_numpy()
        found = estimate_connectivity(tmp_path, folder, kind)
        np.testing.assert_allclose(found, table, atol=1e-4)
        in_memory = estimate_connectivity(open_scans(tmp_path), checkpoint, kind)
        np.testing.assert_allclose(in_memory, found, atol=1e-6)
    (few := tmp_path / "few").mkdir()
    for scan in (*short(scans[:1], 9), scans[1]):
        save_scan(scan, few / f"sub-1_ses-{scan.session}_timeseries.tsv")
    words[1] = few
    words[-1] = few / "table.csv"
    assert main(list(map(str, words))) == 0
    assert "9 usable frames, expected at least 10" in (few / "table_refused.tsv").read_text()
    correlation = estimate_connectivity(scans, checkpoint, "connectome", as_correlation=True)
    assert correlation.shape == (6, 6, 6)
    np.testing.assert_allclose(np.diagonal(correlation, axis1=1, axis2=2), 1, atol=1e-6)
    assert (np.linalg.eigvalsh(correlation) > 0).all()


def test_the_shipped_network_loads_by_name(tmp_path, monkeypatch):
    """Offline, and its parcels are those of FreeSurfer; a path of the same name goes first."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    checkpoint = from_pretrained("dk68")
    assert checkpoint.parcels[0] == "ctx-lh-bankssts"
    assert len(checkpoint.parcels) == 68
    group = checkpoint.model.front.lags[0].double().numpy()
    noise = np.random.default_rng(0).standard_normal((60, 68))
    values = (noise @ np.linalg.cholesky(group).T).astype(np.float32)
    scan = Scan("sub-1", values, 0.72, checkpoint.parcels, source="a")
    found = estimate_connectivity(scan, "dk68", "connectome", as_correlation=True)[0]
    rows, columns = np.triu_indices(68, 1)
    # A short draw of the group's own process: the estimate is nearer to the group than the draw is.
    error = np.square(found - group)[rows, columns].mean()
    assert error < 0.3 * np.square(np.corrcoef(values.T) - group)[rows, columns].mean()
    (tmp_path / "dk68").mkdir()
    with pytest.raises(
        CheckpointError, match="dk68 is no checkpoint.*it hides the dk68 that comes"
    ):
        from_pretrained("dk68")
    with pytest.raises(CheckpointError, match="no NAME/MODEL of the hub"):
        from_pretrained("dk69")


def test_errors_say_what_is_missing(trained):
    checkpoint, _ = trained
    scans = two_days(1)
    with pytest.raises(ValueError, match="kind 'adaptd' is unknown; did you mean adapted"):
        estimate_connectivity(scans, checkpoint, "adaptd")
    with pytest.raises(TypeError, match=r"expected scans, got ndarray; mnemodyn\.load_scan makes"):
        estimate_connectivity([scans[0].values], checkpoint)
    with pytest.raises(DataError, match="6 usable frames, expected at least 10"):
        estimate_connectivity(short(scans, 6), checkpoint)
    plain = Checkpoint(
        MnemoDyn(replace(MODEL, connectome="none")), PARCELS, 1.0, checkpoint.scaling
    )
    with pytest.raises(ValueError, match="without model.connectome cannot estimate"):
        estimate_connectivity(scans, plain, "connectome")
    raw = replace(checkpoint, scaling=Scaling("raw"))
    with pytest.raises(CheckpointError, match="zscore_per_parcel; the checkpoint has raw"):
        estimate_connectivity(scans, raw)
    with pytest.raises(SettingsError, match="connectome needs front='gaussian'"):
        replace(MODEL, front="none")
    with pytest.raises(SettingsError, match="mix cannot hold connectome"):
        Settings.from_mapping(
            {"objective": {"name": "mixed", "mix": [{"name": "connectome"}, {"name": "masked"}]}}
        )


def test_the_objective_says_what_it_needs(tmp_path):
    people = (two_days(3), two_days(1, seed=1))
    with pytest.raises(ValueError, match=r"needs model\.connectome covariance or operator"):
        pretrain(*people, tmp_path / "a", SETTINGS.updated({"model.connectome": "none"}))
    with pytest.raises(ValueError, match="needs scaling zscore_per_parcel, got raw"):
        pretrain(*people, tmp_path / "b", SETTINGS.updated({"scaling": "raw"}))
    # The network of another objective may carry the head; it stays as it was made.
    masked = replace(SETTINGS, objective=Masked(mask_window=4))
    checkpoint, _ = pretrain(*people, tmp_path / "c", masked)
    assert not checkpoint.model.connectome.write.any()
