"""R2 on hidden entries and its bootstrap, against loops and hand-worked numbers."""

import numpy as np
import pytest

from mnemodyn.evaluate.metrics import bootstrap_r2, hidden_sums


def r2_hidden(x, prediction, hidden):
    residual, total = hidden_sums(x, prediction, hidden)
    return 1 - residual.sum() / total.sum()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 4))
    return x, x + 0.5 * rng.normal(size=x.shape), rng.random(x.shape) < 0.5


def test_sums_and_r2_follow_the_definition(data):
    residual, total = hidden_sums(*data)
    for item in range(3):
        x, prediction, hidden = (array[item] for array in data)
        entries = list(zip(*np.nonzero(hidden), strict=True))
        assert residual[item] == pytest.approx(sum((x[e] - prediction[e]) ** 2 for e in entries))
        assert total[item] == pytest.approx(sum(x[e] ** 2 for e in entries))
        assert r2_hidden(x, prediction, hidden) == pytest.approx(1 - residual[item] / total[item])
    assert r2_hidden(*data) == pytest.approx(1 - residual.sum() / total.sum())


def test_r2_reference_is_zero_and_not_the_mean_of_the_hidden_entries():
    x, hidden = np.array([[3.0], [3.0], [-6.0]]), np.array([[True], [True], [False]])
    assert r2_hidden(x, np.zeros_like(x), hidden) == 0
    assert r2_hidden(x, np.full_like(x, 3), hidden) == 1
    assert r2_hidden(x, np.full_like(x, 1), hidden) == pytest.approx(1 - 8 / 18)


def test_visible_entries_count_for_nothing(data):
    x, prediction, hidden = data
    spoilt = [np.where(hidden, array, np.nan) for array in (x, prediction)]
    assert r2_hidden(*spoilt, hidden) == r2_hidden(*data)


def test_sums_are_accumulated_in_float64():
    x = np.full((1, 2**17, 8), np.float32(0.1))
    _, total = hidden_sums(x, np.zeros_like(x), np.ones(x.shape, bool))
    assert total.dtype == np.float64
    assert total[0] == pytest.approx(x.size * float(np.float32(0.1)) ** 2, rel=1e-12)


def test_sums_refuse_what_they_cannot_score(data):
    x, prediction, hidden = data
    with pytest.raises(ValueError, match=r"x must be .* got shape \(8,\)"):
        hidden_sums(x[0, :, 0], prediction, hidden)
    with pytest.raises(ValueError, match=r"prediction must have .* \(3, 8, 4\), got \(3, 8, 1\)"):
        hidden_sums(x, prediction[..., :1], hidden)
    with pytest.raises(ValueError, match=r"hidden must have .* got \(8, 4\)"):
        hidden_sums(x, prediction, hidden[0])
    with pytest.raises(ValueError, match=r"boolean .* got int64"):
        hidden_sums(x, prediction, hidden.astype(int))
    with pytest.raises(ValueError, match="got bool with 0 hidden"):
        hidden_sums(x, prediction, np.zeros_like(hidden))
    with pytest.raises(ValueError, match="prediction must be finite where hidden"):
        hidden_sums(x, np.where(hidden, np.nan, prediction), hidden)


def test_bootstrap_agrees_with_a_plain_loop():
    rng = np.random.default_rng(1)
    total = rng.uniform(50, 150, 30)
    residual = total * rng.uniform(0.3, 0.7, 30)
    samples = [rng.integers(0, 30, 30) for _ in range(5000)]
    looped = [1 - residual[s].sum() / total[s].sum() for s in samples]
    interval = bootstrap_r2(residual, total, n_boot=5000, seed=2)
    np.testing.assert_allclose(interval, np.quantile(looped, [0.025, 0.975]), atol=0.004)
    assert interval == bootstrap_r2(residual, total, n_boot=5000, seed=2)
    assert interval[0] < 1 - residual.sum() / total.sum() < interval[1]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        total = rng.uniform(80, 120, 40)
        low, high = bootstrap_r2(total * rng.uniform(0.2, 0.8, 40), total, n_boot=300, seed=seed)
        covered += low < 0.5 < high
    assert 0.88 <= covered / 200 <= 0.99


def test_difference_is_paired():
    rng = np.random.default_rng(7)
    total = rng.uniform(50, 150, 20)
    baseline = total * rng.uniform(0.1, 0.9, 20)
    low, high = bootstrap_r2(baseline - 0.05 * total, total, baseline, seed=8)
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.05)
    swapped = bootstrap_r2(baseline, total, baseline - 0.05 * total, seed=8)
    assert swapped[1] == pytest.approx(-0.05)
    # Over a baseline that predicts zero it is R2 itself.
    assert bootstrap_r2(baseline, total, total, seed=8) == pytest.approx(
        bootstrap_r2(baseline, total, seed=8)
    )


def test_bootstrap_refuses_what_it_cannot_resample():
    one = np.ones(4)
    with pytest.raises(ValueError, match=r"one length, got shapes \[\(3,\), \(4,\)\]"):
        bootstrap_r2(one[:3], one, seed=0)
    with pytest.raises(ValueError, match=r"got shapes \[\(4,\), \(4, 1\)\]"):
        bootstrap_r2(one, one, one[:, None], seed=0)
    with pytest.raises(ValueError, match=r"residual must be finite and >= 0, got -1\.0"):
        bootstrap_r2(-one, one, seed=0)
    with pytest.raises(ValueError, match="total must be finite"):
        bootstrap_r2(one, one * np.nan, seed=0)
    with pytest.raises(ValueError, match=r">= 2 items, .* got 1, 0 of them"):
        bootstrap_r2(one[:1], one[:1], seed=0)
    with pytest.raises(ValueError, match="got 4, 1 of them with a total of 0"):
        bootstrap_r2(one, np.array([0, 1, 1, 1]), seed=0)
