"""What is looked at inside a network, against finite differences, direct sums and known processes."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from lib.inside import (
    association,
    banded_gain,
    coarse_mean,
    field_response,
    forecast_errors,
    generate,
    metastability,
    moran_surrogates,
    parcel_order,
    parcel_shares,
    reads_from,
    scale_shares,
    simulate_var,
    spatial_test,
    streams,
    summarise,
)
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig

SMALL = {
    "n_parcels": 4,
    "n_timepoints": 16,
    "n_channels": 3,
    "input_width": 4,
    "field_rank": 2,
    "n_levels": 2,
}


def make(**changes):
    torch.manual_seed(0)
    model = MnemoDyn(ModelConfig(**SMALL | changes)).eval()
    for p in model.parameters():  # a fresh network with a front end changes nothing
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("front", ["none", "gaussian"])
def test_the_jacobian_equals_finite_differences(front):
    model = make(front=front, front_steps=0, front_lags=2).double()
    rng = np.random.default_rng(1)
    model.fit_front(list(rng.standard_normal((2, 40, 4)) @ rng.standard_normal((4, 4))))
    x, hidden = (
        torch.from_numpy(rng.standard_normal((16, 4))),
        torch.from_numpy(rng.random((16, 4)) < 0.4),
    )
    model.float()
    x = x.float()
    strength, sign = reads_from(model, x, hidden, 0.7, seed=3, chunk=3, tolerance=1e-4)
    draws = np.random.default_rng(3)
    frames = [int(draws.choice(np.flatnonzero(hidden[:, p].numpy()))) for p in range(4)]
    numeric, step = np.zeros((4, 16, 4)), 1e-2
    for s, q in np.argwhere(~hidden.numpy()):
        moved = x.repeat(2, 1, 1)
        moved[0, s, q] += step
        moved[1, s, q] -= step
        with torch.no_grad():
            up, down = model(moved, 0.7, hidden=hidden.expand(2, -1, -1)).reconstruction.numpy()
        numeric[:, s, q] = [(up[t, p] - down[t, p]) / (2 * step) for p, t in enumerate(frames)]
    np.testing.assert_allclose(strength, np.sqrt((numeric**2).sum(1)), atol=5e-3)
    np.testing.assert_allclose(sign, numeric.sum(1), atol=1e-2)
    assert strength.max() > 0.05


def test_operators_and_field_are_what_their_names_say():
    model, x = make(n_dense_layers=2), torch.randn(16, 4)
    block = model.blocks[0]
    found = field_response(block, x)
    with torch.no_grad():
        field = block.field
        h = (
            np.stack(
                [field(x[None], torch.eye(4)[p].expand(1, 16, 4))[0].numpy() for p in range(4)], 1
            )
            / field.factor
        )
    values = np.linalg.svd(h.mean(0), compute_uv=False)
    np.testing.assert_allclose(found["values"], values / values.sum(), atol=1e-5)
    assert found["varying"] == pytest.approx(
        1 - (h.mean(0) ** 2).sum() / (h**2).mean(0).sum(), abs=1e-5
    )
    weight = block.coarse.weight.detach().numpy()
    np.testing.assert_allclose(coarse_mean(block), np.mean(weight[0] @ weight[1], 0), atol=1e-6)
    kernels = block.banded[1].weight.detach().numpy()
    np.testing.assert_allclose(
        banded_gain(block, 1), np.sqrt((kernels**2).sum(-1)).mean(0), atol=1e-6
    )
    deep = make(banded="depthwise", n_segments=2).blocks[0].banded[0]
    full = deep.mixing[:, :, :, None] * deep.kernel[:, None]
    np.testing.assert_allclose(
        banded_gain(make(banded="depthwise", n_segments=2).blocks[0], 0),
        full.detach().norm(dim=-1).mean(0),
        atol=1e-6,
    )


def test_streams_are_what_a_block_computes():
    model, x = make(n_blocks=1), torch.randn(16, 4)
    found = streams(model, x, 0.7)
    assert list(found) == ["drive of block 1", "latents of block 1"]
    block, path = model.blocks[0], x[None]
    with torch.no_grad():
        drive = block.field(path, block.derivative(path, 0.7)) + block.lift(
            torch.cat([path, torch.ones_like(path)], -1)
        )
        latents = block.pyramid(drive.mT)[0].mT
    np.testing.assert_allclose(found["drive of block 1"], drive[0], atol=1e-6)
    np.testing.assert_allclose(found["latents of block 1"], latents[0], atol=1e-6)


def test_shares_of_scales_follow_the_frequency():
    t = np.arange(256)
    slow, fast = (np.sin(2 * np.pi * f * t)[:, None].repeat(2, 1) for f in (1 / 64, 0.4))
    assert scale_shares(slow, "db4", 4)[-1] > 0.95
    assert scale_shares(fast, "db4", 4)[0] > 0.9
    assert scale_shares(slow + fast, "db4", 4).sum() == pytest.approx(1)


def test_an_association_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    b = rng.random((12, 12))
    pairs = [(i, i + 6) for i in range(6)]
    true = association(b + 0.3 * rng.random((12, 12)), b, pairs, seed=0, n_permutations=200)
    null = association(rng.random((12, 12)), b, pairs, seed=0, n_permutations=200)
    assert true["low"] > true["null_high"]
    assert true["p"] == pytest.approx(1 / 201, abs=1e-6)
    assert null["p"] > 0.05
    # What depends on the hemispheres alone is kept by every permutation: it is no evidence.
    sides = (np.arange(12) < 6)[:, None] == (np.arange(12) < 6)
    kept = association(sides + 0.0, sides + 0.0, pairs, seed=0, n_permutations=50)
    assert kept["r"] == pytest.approx(1)
    assert kept["p"] == 1


def test_rolling_forward_appends_what_the_network_fills():
    model, start = make(), torch.randn(2, 12, 4)
    windows = torch.randn(5, 16, 4)
    errors = forecast_errors(model, windows, 0.7, 4)
    hidden = torch.zeros(2, 16, 4, dtype=torch.bool)
    hidden[:, -4:] = True
    with torch.no_grad():
        x, parts = start, []
        for _ in range(3):
            given = torch.cat([x, torch.full((2, 4, 4), torch.nan)], 1)
            parts.append(model(given, 0.7, hidden=hidden).reconstruction[:, -4:])
            x = torch.cat([x, parts[-1]], 1)[:, -12:]
    expected = torch.cat(parts, 1)[:, :10].numpy()
    np.testing.assert_allclose(generate(model, start, 10, 0.7, step=4), expected, atol=1e-6)
    noisy = [generate(model, start, 10, 0.7, step=4, errors=errors, seed=s) for s in (0, 0, 1)]
    assert noisy[0].shape == (2, 10, 4)
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2])
    alone = generate(None, start, 8, 0.7, step=4, errors=errors, seed=0)
    assert all(
        any(np.allclose(part, e) for e in errors.numpy())
        for row in alone
        for part in np.split(row, 2)
    )
    drawn = noisy[0][:, :4] - expected[:, :4]
    assert all(any(np.allclose(d, e, atol=1e-5) for e in errors.numpy()) for d in drawn)


def test_a_simulated_autoregression_has_the_covariance_it_was_fitted_with():
    rng = np.random.default_rng(0)
    scan = np.zeros((4000, 3))
    for t in range(1, 4000):
        scan[t] = [[0.7, 0.2, 0], [0, 0.5, 0.1], [0, 0, 0.6]] @ scan[t - 1] + rng.standard_normal(3)
    drawn = simulate_var([scan], np.zeros((4, 3)), 4000, seed=0, shrinkage=0.01)
    assert drawn.shape == (4, 4000, 3)
    np.testing.assert_allclose(np.mean([np.cov(x.T) for x in drawn], 0), np.cov(scan.T), atol=0.15)


def test_metastability_and_summary():
    t, rng = np.arange(600), np.random.default_rng(0)
    together = np.sin(2 * np.pi * 0.04 * t)[:, None] + np.zeros(8)
    assert metastability(together, 1.0) < 0.01
    assert metastability(rng.standard_normal((600, 8)), 1.0) > 0.1
    x = rng.standard_normal((600, 8)) @ rng.standard_normal((8, 8))
    found = summarise(x, 1.0, np.corrcoef(x.T))
    assert found["fc_similarity"] == pytest.approx(1)
    assert np.trapezoid(found["power"], found["frequency"]) == pytest.approx(1, abs=0.1)


def test_left_right_and_the_rest():
    assert parcel_order(["A_L", "A_R", "Stem", "B_L", "B_R"]) == [0, 3, 1, 4, 2]


def test_moran_surrogates_keep_the_autocorrelation_of_a_map():
    rng = np.random.default_rng(0)
    centres = rng.uniform(-60, 60, (80, 3))
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    smooth = np.linalg.cholesky(np.exp(-distance / 40) + 1e-8 * np.eye(80))
    x = smooth @ rng.standard_normal(80) + 3

    def moran(maps):
        z = maps - maps.mean(-1, keepdims=True)
        w = np.divide(1, distance, where=distance > 0, out=np.zeros_like(distance))
        return np.einsum("...i,ij,...j->...", z, w, z) / w.sum() * 80 / (z**2).sum(-1)

    null = moran_surrogates(x, centres, 50, seed=1)
    np.testing.assert_allclose(moran(null), moran(x), rtol=1e-9)
    np.testing.assert_allclose(null.mean(1), x.mean(), rtol=1e-9)
    np.testing.assert_allclose(null.std(1), x.std(), rtol=1e-9)
    assert np.abs(np.corrcoef(null)[0, 1:]).max() < 0.9
    assert moran(x) > 3 * np.abs(moran(rng.permuted(np.tile(x, (20, 1)), axis=1)).mean())

    found = spatial_test(x, x + 0.3 * smooth @ rng.standard_normal(80), centres, seed=0, n=500)
    assert found["r"] > 0.8
    assert found["p"] < 0.01
    # Smooth maps that know nothing of one another: the plain test of a correlation is wrong far too often.
    pairs = smooth @ rng.standard_normal((60, 80, 2))
    p = [spatial_test(*pair.T, centres, seed=i, n=200)["p"] for i, pair in enumerate(pairs)]
    assert np.mean(np.array(p) < 0.05) < 0.15
    assert np.mean([pearsonr(*pair.T).pvalue < 0.05 for pair in pairs]) > 0.2


def test_edges_are_shared_by_the_parcels_at_their_ends():
    edges = np.array([[1.0, 2.0, 4.0]])  # 0-1, 0-2, 1-2
    np.testing.assert_allclose(parcel_shares(edges), [[1.5, 2.5, 3.0]])
