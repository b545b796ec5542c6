"""Baselines against the joint Gaussian written out in full in float64, and against plain loops."""

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from mnemodyn.evaluate.baselines import Gaussian, Interpolation, Zero
from mnemodyn.model.front import conditional_mean

N_PARCELS, N_FRAMES, N_LAGS = 5, 12, 3
GAUSSIANS = {
    "spatial": Gaussian("spatial", shrinkage=0.05, tolerance=1e-9),
    "low_rank": Gaussian("low_rank", rank=2, tolerance=1e-9),
    "var": Gaussian("var", shrinkage=0.05, tolerance=1e-9),
    "spatiotemporal": Gaussian("spatiotemporal", n_lags=N_LAGS, tolerance=1e-9),
}


@pytest.fixture(scope="module")
def scans():
    """Four scans of a stable autoregression, with a mean that is not zero."""
    rng = np.random.default_rng(1)
    transition = rng.normal(size=(N_PARCELS, N_PARCELS))
    transition *= 0.85 / np.abs(np.linalg.eigvals(transition)).max()
    mixing = rng.normal(size=(N_PARCELS, N_PARCELS))
    series = []
    for _ in range(4):
        x = np.zeros((150, N_PARCELS))
        for t in range(1, len(x)):
            x[t] = transition @ x[t - 1] + mixing @ rng.normal(size=N_PARCELS)
        series.append(x[30:] + np.arange(N_PARCELS))
    return series


@pytest.fixture(scope="module")
def batch(scans):
    """Three windows with different masks; one frame and one parcel hidden altogether."""
    rng = np.random.default_rng(2)
    x = np.stack([scan[20 : 20 + N_FRAMES] for scan in scans[:3]])
    hidden = rng.random(x.shape) < 0.55
    hidden[0, 4:6] = True
    hidden[0, :, 1] = True
    hidden[1, 0] = hidden[1, -1] = True
    hidden[2] = False
    hidden[2, 3, 2] = True
    return x, hidden


@pytest.fixture(params=[Zero(), Interpolation(), *GAUSSIANS.values()])
def fitted(request, scans):
    return request.param.fit(scans)


def condition(x, hidden, mean, covariance):
    """E[hidden | visible] of one flat Gaussian vector, by the textbook formula."""
    filled, seen = x.copy(), ~hidden
    weights = np.linalg.solve(covariance[np.ix_(seen, seen)], (x - mean)[seen])
    filled[hidden] = mean[hidden] + covariance[np.ix_(hidden, seen)] @ weights
    return filled


def moments(scans, n_lags):
    """Raw lag covariances by their definition, over the number of all frames."""
    mean = np.concatenate(scans).mean(0)
    lags = np.zeros((n_lags + 1, N_PARCELS, N_PARCELS))
    for scan in scans:
        for lag in range(n_lags + 1):
            for t in range(lag, len(scan)):
                lags[lag] += np.outer(scan[t] - mean, scan[t - lag] - mean)
    return mean, lags / sum(map(len, scans))


def noise(covariance):
    return np.trace(covariance) / N_PARCELS * np.eye(N_PARCELS)


def lags_by_definition(name, scans):
    """The process of each baseline, written out again from its definition: (lag, parcel, parcel)."""
    mean, raw = moments(scans, N_LAGS)
    spatial = 0.95 * raw[0] + 0.05 * noise(raw[0])
    if name == "spatial":
        return mean, spatial[None]
    if name == "low_rank":
        values, vectors = np.linalg.eigh(raw[0])
        rest = values[:-2].mean()
        leading = vectors[:, -2:]
        covariance = rest * np.eye(N_PARCELS)
        covariance += leading @ np.diag(values[-2:] - rest) @ leading.T
        return mean, covariance[None]
    if name == "var":
        transition = 0.95 * raw[1] @ np.linalg.inv(spatial)
        powers = [np.linalg.matrix_power(transition, k) for k in range(N_FRAMES)]
        return mean, np.stack([power @ spatial for power in powers])
    shrunk = [0.9 * c + 0.1 * noise(c) for c in raw]
    return mean, np.stack([(1 - k / (N_LAGS + 1)) * c for k, c in enumerate(shrunk)])


def joint(lags):
    """Covariance over (time x parcel) of a stationary process."""
    full = np.zeros((N_FRAMES, N_PARCELS, N_FRAMES, N_PARCELS))
    for s in range(N_FRAMES):
        for t in range(s, min(N_FRAMES, s + len(lags))):
            full[t, :, s] = lags[t - s]
            full[s, :, t] = lags[t - s].T
    return full.reshape(N_FRAMES * N_PARCELS, -1)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_gaussians_are_the_conditional_mean_of_the_whole_window(name, scans, batch):
    mean, lags = lags_by_definition(name, scans)
    filled = GAUSSIANS[name].fit(scans).fill(*batch)
    for x, hidden, found in zip(*batch, filled, strict=True):
        flat = (x.ravel(), hidden.ravel(), np.tile(mean, N_FRAMES))
        expected = condition(*flat, joint(lags)).reshape(x.shape)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_default_tolerance_is_exact_enough(scans, batch):
    for name, settings in (("spatial", {}), ("var", {}), ("spatiotemporal", {"own": 0.1})):
        exact = Gaussian(name, tolerance=1e-12, **settings).fit(scans).fill(*batch)
        filled = Gaussian(name, **settings).fit(scans).fill(*batch)
        np.testing.assert_allclose(filled, exact, atol=1e-4)


def test_conditional_mean_is_the_dense_solution(scans, batch):
    """The solver that the front end shares with the baselines, mixed and not, without either."""
    rng = np.random.default_rng(5)
    mean, lags = lags_by_definition("spatiotemporal", scans)
    mixing = np.eye(N_PARCELS) + 0.3 * rng.normal(size=(3, N_PARCELS, N_PARCELS))
    x, hidden = batch
    given = torch.from_numpy(np.where(hidden, np.nan, x - mean))
    arguments = (torch.from_numpy(hidden), torch.from_numpy(lags))
    plain = conditional_mean(given, *arguments, tolerance=1e-9).numpy()
    mixed = conditional_mean(given, *arguments, torch.from_numpy(mixing), tolerance=1e-9).numpy()
    for i in range(3):
        flat = ((x[i] - mean).ravel(), hidden[i].ravel(), np.zeros(N_FRAMES * N_PARCELS))
        expected = condition(*flat, joint(lags))
        np.testing.assert_allclose(plain[i].ravel(), expected, atol=1e-6)
        expected = condition(*flat, joint(mixing[i] @ lags @ mixing[i].T))
        np.testing.assert_allclose(mixed[i].ravel(), expected, atol=1e-6)


def test_own_covariance_of_visible_pairs_is_mixed_in(scans, batch):
    x, hidden = batch
    mean, lags = lags_by_definition("spatiotemporal", scans)
    model = Gaussian(n_lags=N_LAGS, own=0.2, tolerance=1e-9).fit(scans)
    centred = np.where(hidden, 0, x - mean)[1]
    seen = (~hidden[1]).astype(float)
    pairs = seen.T @ seen
    own = np.where(pairs > 0, (centred.T @ centred) / np.maximum(pairs, 1), lags[0])
    mixed = 0.8 * lags[0] + 0.2 * own
    values = np.linalg.eigvalsh(mixed)
    assert values.min() > 1e-3 * values.max()

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ np.diag(values**0.5) @ vectors.T

    mixing = root(mixed) @ np.linalg.inv(root(lags[0]))
    flat = (x[1].ravel(), hidden[1].ravel(), np.tile(mean, N_FRAMES))
    expected = condition(*flat, joint(mixing @ lags @ mixing.T))
    np.testing.assert_allclose(model.fill(x, hidden)[1].ravel(), expected, atol=1e-5)


def test_var_is_stable_and_its_stationary_covariance_is_the_fitted_one():
    # A random walk a few frames long, where plain least squares is readily explosive.
    rng = np.random.default_rng(3)
    walks = [np.cumsum(rng.normal(size=(7, N_PARCELS)), 0) for _ in range(2)]
    covariance, lagged = Gaussian("var", shrinkage=0.01).fit(walks).lags
    transition = lagged @ np.linalg.inv(covariance)
    assert np.abs(np.linalg.eigvals(transition)).max() < 1
    innovation = covariance - transition @ covariance @ transition.T
    assert np.linalg.eigvalsh(innovation).min() > 0
    stationary = solve_discrete_lyapunov(transition, innovation)
    np.testing.assert_allclose(stationary, covariance, rtol=1e-8, atol=1e-8)


def test_var_transition_is_least_squares_when_hardly_shrunk(scans):
    model = Gaussian("var", shrinkage=1e-9).fit(scans)
    centred = [scan - model.mean for scan in scans]
    before, after = (np.concatenate([s[cut] for s in centred]) for cut in (np.s_[:-1], np.s_[1:]))
    expected = np.linalg.lstsq(before, after, rcond=None)[0].T
    transition = model.lags[1] @ np.linalg.inv(model.lags[0])
    np.testing.assert_allclose(transition, expected, atol=0.05)


def test_low_rank_with_every_factor_but_one_is_the_full_covariance(scans):
    full = Gaussian("spatial", shrinkage=1e-6).fit(scans).lags
    np.testing.assert_allclose(Gaussian("low_rank", rank=N_PARCELS - 1).fit(scans).lags, full)


def test_interpolation_joins_visible_neighbours_and_holds_the_ends():
    x = np.array([[9.0, 1, 9, 9, 4, 9], [9, 9, 9, 9, 9, 9]]).T[None]
    hidden = np.array([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]], dtype=bool).T[None]
    filled = Interpolation().fit([]).fill(x, hidden)
    np.testing.assert_allclose(filled[0, :, 0], [1, 1, 2, 3, 4, 4])
    np.testing.assert_array_equal(filled[0, :, 1], 0)


def test_zero_replaces_hidden_entries_only(batch):
    x, hidden = batch
    np.testing.assert_array_equal(Zero().fit([]).fill(x, hidden), x * ~hidden)


@pytest.mark.parametrize("secret", [np.nan, np.inf, 1e300])
def test_hidden_entries_are_never_read(fitted, batch, secret):
    x, hidden = batch
    expected = fitted.fill(x, hidden)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(fitted.fill(np.where(hidden, secret, x), hidden), expected)


def test_visible_entries_inputs_and_other_items_are_left_alone(fitted, batch):
    x, hidden = batch
    given = x.copy()
    filled = fitted.fill(given, hidden)
    np.testing.assert_array_equal(given, x)
    np.testing.assert_array_equal(filled[~hidden], x[~hidden])
    np.testing.assert_allclose(fitted.fill(x[1:2], hidden[1:2])[0], filled[1], atol=1e-12)


def test_all_hidden_gives_the_mean_and_none_hidden_the_scan(fitted, batch):
    x, hidden = batch
    mean = getattr(fitted, "mean", np.zeros(N_PARCELS))
    everything = fitted.fill(x, np.ones_like(hidden))
    np.testing.assert_allclose(everything, np.broadcast_to(mean, x.shape), atol=1e-10)
    np.testing.assert_array_equal(fitted.fill(x, np.zeros_like(hidden)), x)


def test_fill_refuses_what_it_cannot_use(fitted, batch):
    x, hidden = batch
    with pytest.raises(ValueError, match=r"\(batch, time, parcel\)"):
        fitted.fill(x[0], hidden[0])
    with pytest.raises(ValueError, match=r"hidden must be boolean .* got float64"):
        fitted.fill(x, hidden.astype(float))
    with pytest.raises(ValueError, match=r"got bool \(2, 12, 5\)"):
        fitted.fill(x, hidden[:2])
    with pytest.raises(ValueError, match="finite where it is visible"):
        fitted.fill(np.where(hidden, x, np.nan), hidden)


def test_gaussians_refuse_bad_settings_and_training_data(scans, batch):
    with pytest.raises(RuntimeError, match="not fitted"):
        Gaussian().fill(*batch)
    with pytest.raises(ValueError, match="covariance must be one of spatial, .* got 'temporal'"):
        Gaussian("temporal")
    with pytest.raises(ValueError, match="rank must be between 1 and 4, got 5"):
        Gaussian("low_rank", rank=5).fit(scans)
    with pytest.raises(ValueError, match="needs a scan, got none"):
        Gaussian().fit([])
