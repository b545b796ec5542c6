"""Baselines against the joint Gaussian written out in full, and against plain loops."""

import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

from mnemodyn.evaluate.baselines import VAR, Interpolation, SpatialGaussian, Zero

N_PARCELS = 5


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
    x = np.stack([scan[20:32] for scan in scans[:3]])
    hidden = rng.random(x.shape) < 0.55
    hidden[0, 4:6] = True
    hidden[0, :, 1] = True
    hidden[1, 0] = hidden[1, -1] = True
    hidden[2] = False
    hidden[2, 3, 2] = True
    return x, hidden


@pytest.fixture(params=[Zero, Interpolation, SpatialGaussian, VAR])
def fitted(request, scans):
    return request.param().fit(scans)


def condition(x, hidden, mean, covariance):
    """E[hidden | visible] of one flat Gaussian vector, by the textbook formula."""
    filled, seen = x.copy(), ~hidden
    weights = np.linalg.solve(covariance[np.ix_(seen, seen)], (x - mean)[seen])
    filled[hidden] = mean[hidden] + covariance[np.ix_(hidden, seen)] @ weights
    return filled


def stationary_joint(model, n_frames):
    """Covariance over (time x parcel) of the autoregression, from its transition and its noise."""
    stationary = solve_discrete_lyapunov(model.transition, model.noise)
    joint = np.zeros((n_frames, N_PARCELS, n_frames, N_PARCELS))
    for s in range(n_frames):
        for t in range(s, n_frames):
            lagged = np.linalg.matrix_power(model.transition, t - s) @ stationary
            joint[t, :, s], joint[s, :, t] = lagged, lagged.T
    return joint.reshape(n_frames * N_PARCELS, -1)


def test_spatial_gaussian_is_the_conditional_mean_of_every_frame(scans, batch):
    x, hidden = batch
    model = SpatialGaussian(shrinkage=0.05).fit(scans)
    frames = np.concatenate(scans)
    covariance = np.cov(frames, rowvar=False, bias=True)
    covariance = 0.95 * covariance + 0.05 * np.diag(covariance).mean() * np.eye(N_PARCELS)
    filled = model.fill(x, hidden)
    for item, frame in np.ndindex(x.shape[:2]):
        expected = condition(x[item, frame], hidden[item, frame], frames.mean(0), covariance)
        np.testing.assert_allclose(filled[item, frame], expected, atol=1e-9)


@pytest.mark.parametrize("shrinkage", [1e-6, 0.1, 0.9])
def test_var_is_the_conditional_mean_of_the_whole_window(scans, batch, shrinkage):
    x, hidden = batch
    model = VAR(shrinkage=shrinkage).fit(scans)
    joint = stationary_joint(model, x.shape[1])
    mean = np.tile(model.mean, x.shape[1])
    filled = model.fill(x, hidden)
    for item in range(len(x)):
        expected = condition(x[item].ravel(), hidden[item].ravel(), mean, joint)
        np.testing.assert_allclose(filled[item].ravel(), expected, atol=1e-7)


def test_var_of_a_single_frame_is_the_spatial_gaussian(scans, batch):
    x, hidden = batch[0][:, :1], batch[1][:, :1]
    expected = SpatialGaussian().fit(scans).fill(x, hidden)
    np.testing.assert_allclose(VAR().fit(scans).fill(x, hidden), expected, atol=1e-10)


def test_var_transition_is_least_squares_when_hardly_shrunk(scans):
    model = VAR(shrinkage=1e-9).fit(scans)
    centred = [scan - model.mean for scan in scans]
    before, after = (np.concatenate([s[cut] for s in centred]) for cut in (np.s_[:-1], np.s_[1:]))
    expected = np.linalg.lstsq(before, after, rcond=None)[0].T
    np.testing.assert_allclose(model.transition, expected, atol=0.05)


def test_var_is_stable_and_its_stationary_covariance_is_the_fitted_one():
    # A random walk a few frames long, where plain least squares is readily explosive.
    rng = np.random.default_rng(3)
    walks = [np.cumsum(rng.normal(size=(7, N_PARCELS)), 0) for _ in range(2)]
    model = VAR(shrinkage=0.01).fit(walks)
    assert np.abs(np.linalg.eigvals(model.transition)).max() < 1
    assert np.linalg.eigvalsh(model.noise).min() > 0
    stationary = solve_discrete_lyapunov(model.transition, model.noise)
    np.testing.assert_allclose(stationary, model.covariance, rtol=1e-8, atol=1e-8)


def test_var_beats_the_spatial_gaussian_on_new_data_from_an_autoregression(scans):
    x = np.stack([scan[60:120] for scan in scans[2:]])
    hidden = np.random.default_rng(4).random(x.shape) < 0.5
    errors = [
        ((model.fit(scans[:2]).fill(x, hidden) - x) ** 2).sum()
        for model in (VAR(), SpatialGaussian())
    ]
    assert errors[0] < 0.9 * errors[1]


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


def test_a_batch_too_large_for_memory_is_solved_in_parts(scans, batch, monkeypatch):
    x, hidden = batch
    models = [SpatialGaussian().fit(scans), VAR().fit(scans)]
    expected = [model.fill(x, hidden) for model in models]
    monkeypatch.setattr("mnemodyn.evaluate.baselines._HELD_ENTRIES", 1)
    for model, whole in zip(models, expected, strict=True):
        np.testing.assert_allclose(model.fill(x, hidden), whole, atol=1e-12)


def test_fill_refuses_what_it_cannot_use(fitted, batch):
    x, hidden = batch
    with pytest.raises(ValueError, match=r"\(batch, time, parcel\)"):
        fitted.fill(x[0], hidden[0])
    with pytest.raises(ValueError, match=r"hidden must be boolean .* got float64"):
        fitted.fill(x, hidden.astype(float))
    with pytest.raises(ValueError, match=r"got bool \(2, 12, 5\)"):
        fitted.fill(x, hidden[:2])
    with pytest.raises(ValueError, match="finite where visible"):
        fitted.fill(np.where(hidden, x, np.nan), hidden)


@pytest.mark.parametrize("baseline", [SpatialGaussian, VAR])
def test_gaussian_baselines_refuse_bad_training_data(baseline, scans, batch):
    with pytest.raises(RuntimeError, match="not fitted"):
        baseline().fill(*batch)
    with pytest.raises(ValueError, match="got 0 scans"):
        baseline().fit([])
    with pytest.raises(ValueError, match=r"shrinkage in \(0, 1\], got 1 scans and 0"):
        baseline(shrinkage=0).fit(scans[:1])
    with pytest.raises(
        ValueError, match=r"scans\[1\] must be .* parcel = 5\), got shape \(120, 4\)"
    ):
        baseline().fit([scans[0], scans[1][:, :4]])
    with pytest.raises(ValueError, match=r"scans\[0\] must be finite"):
        baseline().fit([np.full((9, 3), np.nan)])
    with pytest.raises(ValueError, match="vary over time"):
        baseline().fit([np.zeros((9, 3))])
    with pytest.raises(ValueError, match="5 fitted parcels, got 4"):
        baseline().fit(scans).fill(*(a[..., :4] for a in batch))
