"""Identification with planted identities, with pure noise, and against plain loops."""

import numpy as np
import pytest
from scipy.stats import binom, pearsonr

from lib.identification import (
    identify,
    identify_by_length,
    pearson_fc,
    permutation_test,
)


def connectivity(window):
    return {"fc": pearson_fc(window)}


def planted(n=12, n_features=80, noise=0.5, seed=0):
    """Two noisy halves of the same random identities."""
    rng = np.random.default_rng(seed)
    identity = rng.normal(size=(n, n_features))
    return tuple(identity + noise * rng.normal(size=identity.shape) for _ in range(2))


def test_pearson_fc_agrees_with_scipy():
    x = np.random.default_rng(1).normal(size=(50, 5)) @ np.random.default_rng(2).normal(size=(5, 5))
    expected = [
        np.arctanh(pearsonr(x[:, i], x[:, j])[0]) for i in range(5) for j in range(i + 1, 5)
    ]
    np.testing.assert_allclose(pearson_fc(x), expected, rtol=1e-10)
    np.testing.assert_allclose(pearson_fc(3 * x + 7), expected, rtol=1e-10)


def test_pearson_fc_refuses_what_has_no_finite_z():
    x = np.random.default_rng(3).normal(size=(30, 4))
    with pytest.raises(ValueError, match=r"got shape \(3, 4\)"):
        pearson_fc(x[:3])
    with pytest.raises(ValueError, match="finite"):
        pearson_fc(np.where(x > 1, np.nan, x))
    with pytest.raises(ValueError, match=r"constant parcels \[2\]"):
        pearson_fc(np.where(np.arange(4) == 2, 0.1, x))


@pytest.mark.parametrize("standardise", [False, True])
def test_planted_identities_are_found(standardise):
    result = identify(*planted(), standardise=standardise)
    assert result["accuracy"] == 1
    assert result["hits_first"].all()
    assert result["hits_second"].all()
    assert result["idiff"] > 50


def test_similarities_and_hits_agree_with_plain_loops():
    first, second = planted(n=7, n_features=15, noise=2, seed=4)
    r = np.array([[pearsonr(a, b)[0] for b in second] for a in first])
    result = identify(first, second)
    np.testing.assert_array_equal(result["hits_first"], r.argmax(1) == np.arange(7))
    np.testing.assert_array_equal(result["hits_second"], r.argmax(0) == np.arange(7))
    assert 0 < result["accuracy"] < 1
    assert result["hits_first"].mean() != result["hits_second"].mean()
    within, between = np.diag(r).mean(), r[~np.eye(7, dtype=bool)].mean()
    assert result["similarity_self"] == pytest.approx(within)
    assert result["similarity_other"] == pytest.approx(between)
    assert result["idiff"] == pytest.approx(100 * (within - between))


def test_standardising_uses_the_database_half_only():
    first, second = planted(n=6, n_features=20, noise=2, seed=5)
    hits = []
    for query, database in ((first, second), (second, first)):
        scaled = [(half - database.mean(0)) / database.std(0) for half in (query, database)]
        r = np.array([[pearsonr(a, b)[0] for b in scaled[1]] for a in scaled[0]])
        hits.append(r.argmax(1) == np.arange(6))
    result = identify(first, second, standardise=True)
    np.testing.assert_array_equal(result["hits_first"], hits[0])
    np.testing.assert_array_equal(result["hits_second"], hits[1])


def test_standardising_rescues_identities_under_unequal_units():
    first, second = planted(noise=0.8, seed=6)
    wide = np.where(np.arange(80) < 5, 1e3, 1.0)
    shared = 1e4 * np.random.default_rng(7).normal(size=80)
    halves = first * wide + shared, second * wide + shared
    assert identify(*halves)["accuracy"] < identify(*halves, standardise=True)["accuracy"] == 1


def test_noise_is_identified_at_chance():
    n, n_repeats = 25, 40
    rng = np.random.default_rng(8)
    hits = sum(identify(*rng.normal(size=(2, n, 60)))["hits_first"].sum() for _ in range(n_repeats))
    low, high = binom.interval(0.999, n * n_repeats, 1 / n)
    assert low <= hits <= high


def test_the_order_of_participants_does_not_matter():
    first, second = planted(noise=2.5, seed=9)
    order = np.random.default_rng(10).permutation(len(first))
    before, after = identify(first, second), identify(first[order], second[order])
    for key, value in before.items():
        expected = value[order] if key.startswith("hits") else pytest.approx(value)
        assert np.all(after[key] == expected)
    assert identify(first, second[order])["accuracy"] < before["accuracy"]


def test_a_tie_is_a_miss():
    shared = np.tile(np.random.default_rng(11).normal(size=9), (4, 1))
    assert identify(shared, shared)["accuracy"] == 0
    first, second = planted(n=4)
    second[3] = second[2]
    np.testing.assert_array_equal(identify(first, second)["hits_first"], [True, True, False, False])


def test_permutations_tell_identities_from_noise():
    found = permutation_test(*planted(), n_permutations=400, seed=12)
    assert found["accuracy"] == 1
    assert found["p"] == pytest.approx(1 / 401)
    assert found["upper"] < 0.5
    assert found["null"].mean() == pytest.approx(1 / 12, abs=0.02)
    again = permutation_test(*planted(), n_permutations=400, seed=12)
    np.testing.assert_array_equal(found["null"], again["null"])
    rng = np.random.default_rng(13)
    noise = [
        permutation_test(*rng.normal(size=(2, 12, 30)), n_permutations=99, seed=s)["p"]
        for s in range(60)
    ]
    assert binom.cdf(sum(p <= 0.05 for p in noise) - 1, 60, 0.05) < 0.999


def test_permuted_accuracy_is_that_of_permuted_rows():
    first, second = planted(n=6, n_features=15, noise=3, seed=14)
    result = permutation_test(first, second, n_permutations=20, seed=15)
    rng = np.random.default_rng(15)
    expected = [identify(first, second[rng.permutation(6)])["accuracy"] for _ in range(20)]
    np.testing.assert_allclose(result["null"], expected)
    assert result["upper"] in result["null"]


def test_longer_windows_identify_better():
    rng = np.random.default_rng(16)
    mixings = np.eye(6) + 0.06 * rng.normal(size=(10, 6, 6))
    scans = [rng.normal(size=(n, 6)) @ m for n, m in zip(range(800, 810), mixings, strict=True)]
    rows = identify_by_length(connectivity, scans, [20, 100, 400])
    assert [row["length"] for row in rows] == [20, 100, 400]
    assert [row["n_windows"] for row in rows] == [20, 4, 1]
    assert rows[0]["accuracy"] < rows[1]["accuracy"] < rows[2]["accuracy"]
    assert rows[0]["accuracy"] == rows[0]["accuracies"].mean()
    capped = identify_by_length(connectivity, scans, [20], max_windows=3)[0]
    np.testing.assert_array_equal(capped["accuracies"], rows[0]["accuracies"][:3])


def test_windows_come_from_both_halves_and_do_not_overlap():
    seen = []
    scans = [np.column_stack([np.arange(n), np.arange(n) ** 2 % 7]) for n in (21, 26)]

    def features(window):
        seen.append(window[:, 0].tolist())
        return {"a": window[:, 1] + np.arange(len(window)) * window[0, 0]}

    identify_by_length(features, scans, [4])
    firsts = [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    seconds = [[10, 11, 12, 13], [13, 14, 15, 16], [14, 15, 16, 17], [17, 18, 19, 20]]
    assert seen == firsts[:2] + seconds[:2] + firsts[2:] + seconds[2:]


def test_identification_refuses_what_it_cannot_compare():
    first, second = planted(n=4, n_features=6)
    with pytest.raises(ValueError, match=r"of one shape, got \(4, 6\) and \(3, 6\)"):
        identify(first, second[:3])
    with pytest.raises(ValueError, match=r"participant >= 2.* got \(1, 6\)"):
        identify(first[:1], second[:1])
    with pytest.raises(ValueError, match="must be finite"):
        identify(first, np.where(second > 0, np.nan, second))
    with pytest.raises(ValueError, match="one value only"):
        identify(first, np.where(np.arange(4)[:, None] == 1, 0.1, second))
    with pytest.raises(ValueError, match="one value only"):
        identify(first, np.ones_like(second), standardise=True)
    with pytest.raises(ValueError, match=r"1 to 2 .* got 3"):
        identify_by_length(connectivity, [first, second], [3])
