"""R2 on hidden entries and its bootstrap, against loops and hand-worked numbers."""

import numpy as np
import pytest

from mnemodyn.evaluate.metrics import bootstrap_difference, bootstrap_r2, hidden_sums, r2_hidden


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
        r2_hidden(x, prediction, np.zeros_like(hidden))
    with pytest.raises(ValueError, match="prediction must be finite where hidden"):
        r2_hidden(x, np.where(hidden, np.nan, prediction), hidden)
    with pytest.raises(ValueError, match="only zeros"):
        r2_hidden(np.zeros_like(x), prediction, hidden)


def test_bootstrap_agrees_with_a_plain_loop():
    rng = np.random.default_rng(1)
    total = rng.uniform(50, 150, 30)
    residual = total * rng.uniform(0.3, 0.7, 30)
    samples = [rng.integers(0, 30, 30) for _ in range(5000)]
    looped = [1 - residual[s].sum() / total[s].sum() for s in samples]
    interval = bootstrap_r2(residual, total, n_boot=5000, seed=2)
    np.testing.assert_allclose(interval, np.quantile(looped, [0.025, 0.975]), atol=0.004)
    assert interval == bootstrap_r2(residual, total, n_boot=5000, seed=2)
    narrow = bootstrap_r2(residual, total, seed=2, level=0.5)
    assert interval[0] < narrow[0] < 1 - residual.sum() / total.sum() < narrow[1] < interval[1]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        total = rng.uniform(80, 120, 40)
        low, high = bootstrap_r2(total * rng.uniform(0.2, 0.8, 40), total, n_boot=300, seed=seed)
        covered += low < 0.5 < high
    assert 0.88 <= covered / 200 <= 0.99


def test_groups_are_resampled_whole():
    # Ten copies of each participant's window carry no more information than one.
    rng = np.random.default_rng(4)
    total = rng.uniform(80, 120, 12)
    residual = total * rng.uniform(0.2, 0.8, 12)
    groups = np.repeat([f"sub-{n}" for n in range(12)], 10)
    many = np.repeat(residual, 10), np.repeat(total, 10)
    grouped = bootstrap_r2(*many, groups=groups, n_boot=4000, seed=5)
    single = bootstrap_r2(residual, total, n_boot=4000, seed=6)
    np.testing.assert_allclose(grouped, single, atol=0.015)
    assert np.ptp(bootstrap_r2(*many, seed=5)) < 0.5 * np.ptp(grouped)


def test_difference_is_paired():
    rng = np.random.default_rng(7)
    total = rng.uniform(50, 150, 20)
    baseline = total * rng.uniform(0.1, 0.9, 20)
    low, high = bootstrap_difference(baseline - 0.05 * total, baseline, total, seed=8)
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.05)
    swapped = bootstrap_difference(baseline, baseline - 0.05 * total, total, seed=8)
    assert swapped[1] == pytest.approx(-0.05)
    grouped = bootstrap_difference(baseline, total, total, groups=np.arange(20) // 2, seed=8)
    halves = [a.reshape(10, 2).sum(1) for a in (baseline, total)]
    assert grouped == pytest.approx(bootstrap_r2(*halves, seed=8))


def test_bootstrap_refuses_what_it_cannot_resample():
    one = np.ones(4)
    with pytest.raises(ValueError, match=r"one length, got \(3,\) and \(4,\)"):
        bootstrap_r2(one[:3], one, seed=0)
    with pytest.raises(ValueError, match=r"got \(4, 1\) and \(4,\)"):
        bootstrap_difference(one, one[:, None], one, seed=0)
    with pytest.raises(ValueError, match=r"residual must be finite and >= 0, got -1\.0"):
        bootstrap_r2(-one, one, seed=0)
    with pytest.raises(ValueError, match="total must be finite"):
        bootstrap_r2(one, one * np.nan, seed=0)
    with pytest.raises(ValueError, match=r"got 0 and 0\.95"):
        bootstrap_r2(one, one, n_boot=0, seed=0)
    with pytest.raises(ValueError, match="got 2000 and 1"):
        bootstrap_r2(one, one, level=1, seed=0)
    with pytest.raises(ValueError, match="4 items, got 3 labels"):
        bootstrap_r2(one, one, groups=[1, 2, 3], seed=0)
    with pytest.raises(ValueError, match=r">= 2 items .* got 1, 0 of them"):
        bootstrap_r2(one, one, groups=["sub-1"] * 4, seed=0)
    with pytest.raises(ValueError, match="got 4, 1 of them with a total of 0"):
        bootstrap_r2(one, np.array([0, 1, 1, 1]), seed=0)
