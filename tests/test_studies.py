"""The studies of reconstruction and scaling: who is divided how, what is chosen, what is remembered."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib import reconstruction as study
from lib import scaling
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Collection, Scan
from mnemodyn.evaluate.reconstruction import hide
from mnemodyn.files import Kept
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig

MASKS = {"hidden_share": 0.5, "mask_window": 4}
OPTIONS = {
    "shrinkages": [0.1, 0.9],
    "ranks": [1, 2],
    "n_lags": [1, 3],
    "own": [0.05, 0.2],
    "front_weights": [50.0, 200.0],
    "front_modes": [0],
}


@pytest.fixture(scope="module")
def scans():
    """Eight scans of one autoregression of four parcels."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4))
    found = []
    for i in range(8):
        x = np.zeros((64, 4))
        for t in range(1, 64):
            x[t] = 0.8 * x[t - 1] + mixing @ rng.normal(size=4)
        found.append(Scan(f"sub-{i}", x.astype(np.float32), 1.0, tuple("abcd"), source=f"{i}"))
    collection = Collection(found, name="test")
    collection.table["site"] = ["x", "y"] * 4
    return collection


def test_relatives_are_on_one_side(scans):
    table = scans.table.assign(family=["f", "f", "g", "g", None, None, "f", "g"])
    related = Collection([scans[i] for i in range(8)], table)
    for seed in range(5):
        sides = study.divide(related, None, [], {"n_test": 1, "n_validation": 1, "seed": seed})
        for family in ("f", "g"):
            assert sum(family in set(side.table["family"]) for side in sides.values()) == 1


def test_sides_are_divided_by_strata_or_as_a_checkpoint_knows_them(scans):
    sides = study.divide(scans, None, ["site"], {"n_test": 2, "n_validation": 2, "seed": 0})
    assert [len(side) for side in sides.values()] == [4, 2, 2]
    assert all(set(side.table["site"]) == {"x", "y"} for side in sides.values())

    training = {"train_participants": ["sub-0"], "validation_participants": ["sub-3"]}
    sides = study.divide(scans, SimpleNamespace(training=training), [], {})
    assert list(sides["train"].table["participant_id"]) == ["sub-0"]
    assert list(sides["validation"].table["participant_id"]) == ["sub-3"]
    assert len(sides["test"]) == 6


def test_settings_are_the_best_of_those_tried(scans, capsys):
    train = study.Scaled(scans[:5], Scaling())
    held = hide(scans[5:], Scaling(), **MASKS, seed=0)
    chosen = study.choose(train, held, OPTIONS)
    said = capsys.readouterr().out.splitlines()
    scores = {line.rsplit(": ", 1)[0]: float(line.rsplit(": ", 1)[1]) for line in said}
    var = {k: v for k, v in scores.items() if k.startswith("VAR")}
    assert max(var, key=var.get) == f"VAR {chosen['var']}"
    front = {k: v for k, v in scores.items() if k.startswith("front end")}
    assert max(front, key=front.get).endswith(f"weight {chosen['front_end']['weight']}")
    # With one value each there is nothing to try.
    study.choose(train, held, {name: values[:1] for name, values in OPTIONS.items()})
    assert not capsys.readouterr().out
    methods = dict(study.fitted(chosen, train))
    assert set(methods) == {*study.LINEAR, "own_covariance", "front_end"}
    residual = study.residuals(methods.items(), held, 32)
    total, people = study.totals(held, 32)
    np.testing.assert_allclose(residual["zero"], total)
    assert people.tolist() == ["sub-5"] * 2 + ["sub-6"] * 2 + ["sub-7"] * 2
    assert residual["spatiotemporal_gaussian"].sum() < total.sum()
    assert residual["front_end, windows"].shape == total.shape


def test_every_participant_is_held_out_once(scans):
    chosen = {"zero": {}, "spatial_gaussian": {"covariance": "spatial"}}
    found = study.each_held_out(scans, chosen, MASKS, 32)
    assert found["people"] == [f"sub-{i // 2}" for i in range(16)]
    assert found["zero"] == pytest.approx(found["total"])
    test = hide(scans.select([7]), Scaling(), **MASKS, seed=20_007)
    rest = study.Scaled(scans.select(range(7)), Scaling())
    alone = study.residuals(study.fitted(chosen, rest), test, 32)
    assert found["spatial_gaussian"][-2:] == pytest.approx(alone["spatial_gaussian"].tolist())


def test_all_seeds_share_what_their_front_end_fills(scans, tmp_path):
    config = ModelConfig(
        n_parcels=4, n_timepoints=16, n_channels=4, input_width=4, n_levels=2, front="gaussian"
    )
    network = MnemoDyn(config).fit_front(study.Scaled(scans[:5], Scaling())).eval()
    held = hide(scans[5:6], Scaling(), **MASKS, seed=0)
    found = study.network_residuals({"model": [network]}, held, 16, Kept(None), 0)
    assert len(network.front.kept) == 2  # the whole scan, and its windows together
    assert found["model"].shape == (1, 4)
    # A fresh network is its front end.
    np.testing.assert_allclose(found["model"][0], found["front_end"][0], rtol=1e-4)


def test_rivals_have_no_more_parameters_than_the_network():
    settings = study.settings_of(
        {"n_channels": 16, "input_width": 16}, MASKS, {}, 32, {"lags": 2, "weight": 50.0}
    )
    assert settings.model.front == "gaussian"
    assert (settings.model.front_lags, settings.objective.mask_window) == (2, 4)
    made = {name: make() for name, make in study.rival_makers(settings, 10).items()}
    sizes = {name: study.n_parameters(network) for name, network in made.items()}
    assert 0.5 * sizes["blocks_alone"] < sizes["transformer"] <= sizes["blocks_alone"]
    assert made["blocks_alone"].front is None
    x = torch.zeros(1, 32, 10)
    assert made["transformer"](x, 1.0, hidden=x > 0).shape == x.shape


def test_the_first_people_are_nested_and_all_of_them_at_zero(scans):
    some = scaling.first_people(scans, 3).table["participant_id"]
    more = scaling.first_people(scans, 5).table["participant_id"]
    assert len(some) == 3
    assert set(some) < set(more)
    assert len(scaling.first_people(scans, 0)) == 8


def test_only_the_maps_of_transferred_blocks_are_trained():
    shared = {"n_timepoints": 16, "n_channels": 4, "input_width": 4, "n_levels": 2}
    source = MnemoDyn(ModelConfig(n_parcels=4, **shared))
    config = ModelConfig(n_parcels=6, **shared)
    networks = {name: scaling._with_operators(name, source, config) for name in scaling.TRANSFER}
    weights = dict(source.named_parameters())
    for key, value in networks["transferred"].named_parameters():
        of_map = any(part in key for part in scaling.MAPS)
        assert value.requires_grad == of_map
        if not of_map:
            assert torch.equal(value, weights[key])
    random = dict(networks["random_operators"].named_parameters())
    assert any(
        not torch.equal(random[key], weights[key])
        for key in random
        if random[key].shape == weights[key].shape
    )
    assert all(value.requires_grad for value in networks["from_scratch"].parameters())
