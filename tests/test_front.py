"""The front end against the joint Gaussian written out in full, and the network behind it."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from mnemodyn.model.front import (
    Front,
    adapted_covariance,
    conditional_mean,
    covariance_modes,
    lag_covariances,
)
from mnemodyn.model.network import MnemoDyn
from mnemodyn.readout import readouts
from mnemodyn.settings import ModelConfig

P, T, LAGS = 5, 14, 3
CONFIG = ModelConfig(
    n_parcels=P,
    n_timepoints=T,
    n_levels=2,
    n_channels=8,
    input_width=8,
    front="gaussian",
    front_lags=LAGS,
)


@pytest.fixture(scope="module")
def scans():
    """SIMULATED: four smooth scans with correlated parcels, and a mean that is not zero."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(P, P))
    white = rng.normal(size=(4, 204, P)) @ mixing
    return [w[4:] + 0.8 * w[3:-1] + 0.5 * np.roll(w[2:-2], 1, axis=1) + np.arange(P) for w in white]


@pytest.fixture(scope="module")
def batch(scans):
    """Three windows; in the first a frame and a parcel hidden altogether, in the last everything."""
    x = np.stack([scan[20 : 20 + T] for scan in scans[:3]])
    hidden = np.random.default_rng(2).random(x.shape) < 0.5
    hidden[0, 4], hidden[0, :, 1], hidden[2] = True, True, True
    return x, hidden


def joint(lags):
    """Covariance over (time x parcel) of the process."""
    full = np.zeros((T, P, T, P))
    for s in range(T):
        for t in range(s, min(T, s + len(lags))):
            full[t, :, s], full[s, :, t] = lags[t - s], lags[t - s].T
    return full.reshape(T * P, -1)


def condition(x, hidden, mean, covariance):
    """E[hidden | visible] of one flat Gaussian vector, by the textbook formula."""
    filled, seen = x.copy(), ~hidden
    weights = np.linalg.solve(covariance[np.ix_(seen, seen)], (x - mean)[seen])
    filled[hidden] = mean[hidden] + covariance[np.ix_(hidden, seen)] @ weights
    return filled


def test_lag_covariances_are_those_of_the_definition(scans):
    mean, lags = lag_covariances(scans, LAGS, 0.2)
    n = sum(map(len, scans))
    np.testing.assert_allclose(mean, np.concatenate(scans).mean(0))
    for lag in range(LAGS + 1):
        plain = sum((s[lag:] - mean).T @ (s[: len(s) - lag] - mean) for s in scans) / n
        expected = (1 - lag / (LAGS + 1)) * (0.8 * plain + 0.2 * np.trace(plain) / P * np.eye(P))
        np.testing.assert_allclose(lags[lag], expected)
    assert np.linalg.eigvalsh(joint(lags)).min() > 0


def test_censored_frames_do_not_count(scans):
    """Against sums over the pairs of frames that are both there, one pair at a time."""
    gone = [np.isin(np.arange(len(s)), [3, 4, 50 + i, len(s) - 1]) for i, s in enumerate(scans)]
    given = [np.where(g[:, None], np.nan, s) for g, s in zip(gone, scans, strict=True)]
    mean, lags = lag_covariances(given, LAGS, 0.2)
    n = sum((~g).sum() for g in gone)
    np.testing.assert_allclose(
        mean, np.concatenate([s[~g] for g, s in zip(gone, scans, strict=True)]).mean(0)
    )
    for lag in range(LAGS + 1):
        plain = np.zeros((P, P))
        for g, s in zip(gone, scans, strict=True):
            for t in range(lag, len(s)):
                if not g[t] and not g[t - lag]:
                    plain += np.outer(s[t] - mean, s[t - lag] - mean) / n
        expected = (1 - lag / (LAGS + 1)) * (0.8 * plain + 0.2 * np.trace(plain) / P * np.eye(P))
        np.testing.assert_allclose(lags[lag], expected)
    assert np.linalg.eigvalsh(joint(lags)).min() > 0
    whole = [s[~g] for g, s in zip(gone, scans, strict=True)]
    for a, b in zip(
        covariance_modes(given, mean, lags[0], 2),
        covariance_modes(whole, mean, lags[0], 2),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    given[1][7, 2] = np.nan
    with pytest.raises(
        ValueError, match=r"scans\[1\] must be finite .* with 1 entries that are not finite"
    ):
        lag_covariances(given, LAGS, 0.2)


@pytest.mark.parametrize("n_lags", [0, LAGS])
def test_conditional_mean_is_that_of_the_whole_window(scans, batch, n_lags):
    x, hidden = batch
    mean, lags = lag_covariances(scans, n_lags, 0.1)
    given = torch.tensor(np.where(hidden, np.nan, x - mean))
    tensors = given, torch.tensor(hidden), torch.tensor(lags)
    filled = conditional_mean(*tensors, tolerance=1e-9).numpy() + mean
    for i in range(len(x)):
        expected = condition(x[i].ravel(), hidden[i].ravel(), np.tile(mean, T), joint(lags))
        np.testing.assert_allclose(filled[i].ravel(), expected, atol=1e-6)


def plain_em(x, hidden, group, weight, steps):
    """Expectation maximisation for one scan, frame by frame."""
    covariance = group
    for _ in range(steps):
        products = np.zeros_like(group)
        for value, h in zip(x, hidden, strict=True):
            mean = condition(value, h, np.zeros(P), covariance)
            rest = np.zeros_like(group)
            gain = covariance[np.ix_(h, ~h)] @ np.linalg.inv(covariance[np.ix_(~h, ~h)])
            rest[np.ix_(h, h)] = covariance[np.ix_(h, h)] - gain @ covariance[np.ix_(~h, h)]
            products += np.outer(mean, mean) + rest
        covariance = (weight * group + products) / (weight + len(x))
    return covariance


def test_adaptation_is_em_and_fills_as_the_mixed_process(scans, batch):
    x, hidden = batch
    mean, lags = lag_covariances(scans, LAGS, 0.1)
    given = np.where(hidden, 0, x - mean)
    adapted = adapted_covariance(
        *map(torch.tensor, (given, hidden, lags[0])), weight=6.0, steps=3
    ).numpy()
    front = Front(P, lags=LAGS, shrinkage=0.1, weight=6.0, steps=3).fit(scans)
    filled = front(torch.tensor(np.where(hidden, np.nan, x)).float(), torch.tensor(hidden)).numpy()
    for i in range(len(x)):
        expected = plain_em(given[i], hidden[i], lags[0], 6.0, 3)
        np.testing.assert_allclose(adapted[i], expected, atol=1e-9)
        (a, u), (b, v) = np.linalg.eigh(expected), np.linalg.eigh(lags[0])
        mixing = (u * a**0.5) @ u.T @ (v * b**-0.5) @ v.T
        process = joint([mixing @ c @ mixing.T for c in lags])
        best = condition(x[i].ravel(), hidden[i].ravel(), np.tile(mean, T), process)
        np.testing.assert_allclose(filled[i].ravel(), best, atol=2e-2)
    assert np.array_equal(filled[~hidden], x[~hidden].astype(np.float32))


def test_em_never_lowers_the_likelihood_of_what_is_visible(scans, batch):
    x, hidden = (np.asarray(a[:1]) for a in batch)
    mean, lags = lag_covariances(scans, LAGS, 0.1)
    given, weight = np.where(hidden, 0, x - mean), 3.0

    def objective(covariance):
        total = (
            -0.5
            * weight
            * (np.linalg.slogdet(covariance)[1] + np.trace(np.linalg.solve(covariance, lags[0])))
        )
        for value, h in zip(given[0], ~hidden[0], strict=True):
            block = covariance[np.ix_(h, h)]
            total -= 0.5 * (
                np.linalg.slogdet(block)[1] + value[h] @ np.linalg.solve(block, value[h])
            )
        return total

    steps = [
        adapted_covariance(*map(torch.tensor, (given, hidden, lags[0])), weight=weight, steps=n)[
            0
        ].numpy()
        for n in range(6)
    ]
    assert np.all(np.diff([objective(c) for c in steps]) > 0)


@pytest.fixture(scope="module")
def people():
    """SIMULATED: 60 scans of white frames; along one direction of the covariance people differ."""
    rng = np.random.default_rng(3)
    direction = np.zeros((P, P))
    direction[0, 1] = direction[1, 0] = 0.5**0.5
    amount = rng.normal(scale=0.4, size=60).clip(-1.2, 1.2)
    return (
        direction,
        amount,
        [rng.multivariate_normal(np.zeros(P), np.eye(P) + a * direction, 300) for a in amount],
    )


def test_modes_are_the_directions_in_which_people_differ(people):
    direction, amount, series = people
    modes, signal, noise = covariance_modes(series, np.zeros(P), np.eye(P), 2)
    np.testing.assert_allclose(np.einsum("kpq,lpq->kl", modes, modes), np.eye(2), atol=1e-4)
    np.testing.assert_allclose(modes, modes.transpose(0, 2, 1), atol=1e-5)
    assert abs((modes[0] * direction).sum()) > 0.95
    assert signal[0] == pytest.approx(amount.var(), rel=0.35)
    # Of a covariance off the diagonal, along a direction of norm one, n frames leave a variance of 2 / n / 2 * 2.
    assert noise[0] == pytest.approx(2, rel=0.4)
    assert signal[1] < 0.2 * signal[0]
    with pytest.raises(ValueError, match="40 modes need at least 80 scans, got 60"):
        covariance_modes(series, np.zeros(P), np.eye(P), 40)


def test_along_modes_more_is_kept(people, scans, batch):
    x, hidden = batch
    mean, lags = lag_covariances(scans, LAGS, 0.1)
    given = [torch.tensor(a) for a in (np.where(hidden, 0, x - mean), hidden, lags[0])]
    direction = people[0]
    modes = [torch.tensor(a) for a in (direction[None], np.array([3.0]), np.array([1.0]))]
    plain = adapted_covariance(*given, weight=20.0, steps=1).numpy()
    more = adapted_covariance(*given, weight=20.0, steps=1, modes=modes).numpy()
    values, vectors = np.linalg.eigh(lags[0])
    root, whiten = (vectors * values**0.5) @ vectors.T, (vectors * values**-0.5) @ vectors.T
    kept, along = T / (20 + T), 3 / (3 + 1 / T)
    for before, after in zip(plain, more, strict=True):
        share = (whiten @ (before - lags[0]) @ whiten / kept * direction).sum()
        expected = before + (along - kept) * share * root @ direction @ root
        values, vectors = np.linalg.eigh(expected)
        expected = (vectors * values.clip(1e-4 * values.max())) @ vectors.T
        np.testing.assert_allclose(after, expected, atol=1e-8)
    silent = [modes[0], torch.zeros(1), modes[2]]
    np.testing.assert_allclose(
        adapted_covariance(*given, weight=20.0, steps=1, modes=silent), plain, atol=1e-9
    )


def test_a_network_with_modes_fits_fills_and_is_saved(people):
    _, _, series = people
    network = MnemoDyn(replace(CONFIG, front_modes=2)).fit_front(series).eval()
    x = torch.tensor(np.stack([s[:T] for s in series[:2]])).float()
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    out = network(x, 2.0, hidden=hidden).reconstruction
    assert out.isfinite().all()
    assert not torch.equal(
        out, MnemoDyn(CONFIG).fit_front(series)(x, 2.0, hidden=hidden).reconstruction
    )
    again = MnemoDyn(network.config)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, 2.0, hidden=hidden).reconstruction, out)


def test_a_fresh_network_is_its_front_end(scans, batch):
    x, hidden = (torch.tensor(a) for a in batch)
    x = x.float()
    network = MnemoDyn(CONFIG).fit_front(scans).eval()
    expected = network.front(x, hidden)
    seen = x.masked_fill(hidden, torch.nan)
    out = network(seen, 2.0, hidden=hidden).reconstruction
    assert torch.equal(out, expected)
    assert torch.equal(network(seen, 2.0, hidden=hidden, filled=expected).reconstruction, expected)
    assert torch.equal(network(x, 2.0).reconstruction, x)
    # Not fitted and not adapted, hidden entries start at zero.
    fresh = MnemoDyn(replace(CONFIG, front_steps=0))
    assert fresh(seen, 2.0, hidden=hidden).reconstruction[hidden].abs().max() < 1e-5


def test_blocks_behind_a_front_end_learn_and_see_what_is_visible(scans, batch):
    x, hidden = (torch.tensor(a[:2]) for a in batch)
    x = x.float()
    torch.manual_seed(0)
    network = MnemoDyn(CONFIG).fit_front(scans)
    filled = network.front(x, hidden)
    optimizer, losses = torch.optim.Adam(network.parameters(), 1e-2), []
    inputs = []
    network.blocks[1].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    for _ in range(20):
        out = network(x, 2.0, hidden=hidden, filled=filled).reconstruction
        losses.append((out - x)[hidden].square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(inputs[-1][~hidden], x[~hidden])
    assert not torch.equal(inputs[-1][hidden], filled[hidden])


def test_censored_frames_and_lengths(scans, batch):
    x, hidden = (torch.tensor(a[:2]) for a in batch)
    x = x.float()
    torch.manual_seed(0)
    network = MnemoDyn(CONFIG).fit_front(scans).eval()
    for block in network.blocks:
        torch.nn.init.normal_(block.output.weight)
    censored = torch.zeros(x.shape[:2], dtype=torch.bool)
    censored[:, 5:7] = True
    gone = x.masked_fill(censored[..., None], torch.nan)
    out = network(gone, 2.0, hidden=hidden).reconstruction
    assert torch.equal(out, network(x, 2.0, hidden=hidden | censored[..., None]).reconstruction)
    padded = torch.cat([x, torch.full_like(x, 99.0)], 1)
    more = torch.cat([hidden, torch.zeros_like(hidden)], 1)
    short = network(padded, 2.0, hidden=more, lengths=[T, 2 * T]).reconstruction
    torch.testing.assert_close(
        short[0, :T], network(x, 2.0, hidden=hidden).reconstruction[0], atol=1e-4, rtol=1e-4
    )


def test_conditional_mean_does_not_read_hidden_entries_and_needs_none(scans, batch):
    x, hidden = (torch.tensor(a) for a in batch)
    lags = torch.tensor(lag_covariances(scans, LAGS, 0.1)[1])
    filled = conditional_mean(x, hidden, lags)
    assert torch.equal(filled, conditional_mean(x.masked_fill(hidden, torch.nan), hidden, lags))
    assert not filled[2].any()  # nothing visible: the mean
    assert torch.equal(conditional_mean(x, torch.zeros_like(hidden), lags), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shrinkage": 0.0}, r"shrinkage must be in \(0, 1\], got 0\.0"),
        (
            {"n_lags": 200},
            r"scans\[0\] must be finite and have more than 200 frames, got 200 with 0",
        ),
        ({"scans": []}, "needs a scan, got none"),
        ({"scans": [np.ones((10, P))]}, "must vary over time"),
    ],
)
def test_unusable_scans_are_refused(scans, change, message):
    with pytest.raises(ValueError, match=message):
        lag_covariances(**{"scans": scans, "n_lags": LAGS, "shrinkage": 0.1} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": False}, "front needs residual=True"),
        ({"front_weight": 0.0}, "front_weight must be greater than 0"),
        ({"front": "kalman"}, "front must be 'none' or 'gaussian'"),
        (
            {"compat": "reference", "interpolation": "linear", "lift": False},
            "front must be none with compat",
        ),
    ],
)
def test_contradictory_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**CONFIG.to_dict() | change)


def test_filled_needs_a_front_end(batch):
    x, hidden = (torch.tensor(a) for a in batch)
    network = MnemoDyn(
        ModelConfig(n_parcels=P, n_timepoints=T, n_levels=2, n_channels=8, input_width=8)
    )
    with pytest.raises(ValueError, match="filled is for a network with a front end"):
        network(x.float(), 2.0, hidden=hidden, filled=x.float())


@pytest.mark.parametrize("n_modes", [0, 2])
def test_connectivity_is_the_logarithm_at_the_group(scans, n_modes):
    front = Front(P, lags=2, shrinkage=0.1, weight=50.0, steps=3, modes=n_modes).fit(scans)
    x = torch.from_numpy(scans[0]).float()[None]
    found = front.connectivity(x, torch.zeros_like(x, dtype=torch.bool))[0].double().numpy()
    group, centred = front.lags[0].double().numpy(), scans[0] - front.mean.double().numpy()
    whiten = np.linalg.inv(np.real(scipy.linalg.sqrtm(group)))
    deviation = whiten @ (centred.T @ centred / len(centred) - group) @ whiten
    kept = len(centred) / (50 + len(centred))
    adapted = np.eye(P) + kept * deviation
    for direction, signal, noise in zip(
        front.modes.numpy(), front.signal.numpy(), front.noise.numpy(), strict=True
    ):
        more = max(0, signal / (signal + noise / len(centred)) - kept)
        adapted += more * (deviation * direction).sum() * direction
    np.testing.assert_allclose(found, scipy.linalg.logm(adapted), atol=2e-4)


def test_adapted_readout_is_one_of_a_front_end_only():
    x = (
        np.random.default_rng(0)
        .standard_normal((CONFIG.n_timepoints, CONFIG.n_parcels))
        .astype(np.float32)
    )
    model = MnemoDyn(CONFIG).eval()
    vector = readouts(model, x, 2.0, ("adapted",))["adapted"]
    matrix = model.front.connectivity(
        torch.from_numpy(x)[None], torch.zeros(1, *x.shape, dtype=torch.bool)
    )
    assert vector.shape == (CONFIG.n_parcels * (CONFIG.n_parcels + 1) // 2,)
    assert np.linalg.norm(vector) == pytest.approx(float(matrix.norm()), rel=1e-5)
    with pytest.raises(
        ValueError, match="read-out must be one of .* for this network, got 'adapted'"
    ):
        readouts(MnemoDyn(replace(CONFIG, front="none")).eval(), x, 2.0, ("adapted",))


def test_no_more_scans_are_held_for_modes_than_are_said_to_be(monkeypatch):
    import mnemodyn.model.front as front

    rng = np.random.default_rng(0)
    scans = [rng.normal(size=(30, 4)) @ rng.normal(size=(4, 4)) for _ in range(9)]
    mean, lags = front.lag_covariances(scans, 1, 0.1)
    monkeypatch.setattr(front, "MODE_SCANS", 5)
    found = front.covariance_modes(scans, mean, lags[0], 2)
    monkeypatch.undo()
    for array, expected in zip(
        found, front.covariance_modes(scans[::2], mean, lags[0], 2), strict=True
    ):
        np.testing.assert_array_equal(array, expected)


def test_scans_are_read_one_at_a_time():
    class Counted(list):
        held = 0

        def __getitem__(self, i):
            Counted.held += 1
            return super().__getitem__(i)

        def __iter__(self):
            return (self[i] for i in range(len(self)))

    rng = np.random.default_rng(0)
    lag_covariances(Counted(rng.normal(size=(30, 4)) for _ in range(5)), 1, 0.1)
    assert Counted.held == 2 * 5
