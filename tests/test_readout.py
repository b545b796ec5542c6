"""Read-outs of a frozen network, and the encoder as a transformer of scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.base import clone

from mnemodyn.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.model.network import MnemoDyn
from mnemodyn.readout import READOUTS, MnemoDynEncoder, readouts
from mnemodyn.settings import ModelConfig

PARCELS = tuple(f"p{i}" for i in range(8))


def scans_of(n):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((n, 60, 8)).astype(np.float32)
    return [
        Scan(f"sub-{i:03d}", x, 2.0, PARCELS, source=f"sub-{i:03d}") for i, x in enumerate(values)
    ]


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=8, n_timepoints=32, n_blocks=1, n_channels=6, input_width=6, n_levels=2
    )
    return Checkpoint(MnemoDyn(config).eval(), PARCELS, 2.0, Scaling(), "none", {})


def test_the_encoder_is_a_transformer_of_scikit_learn(checkpoint, tmp_path):
    import pickle

    scans = scans_of(6)
    encoder = MnemoDynEncoder(checkpoint, ("latent_sd", "response"), cache=tmp_path)
    found = encoder.fit_transform(scans)
    expected = [
        np.concatenate(
            list(readouts(checkpoint.model, Scaling()(s), 2.0, ("latent_sd", "response")).values())
        )
        for s in scans
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert clone(encoder).get_params()["readouts"] == ("latent_sd", "response")
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(again.transform(scans[::-1]), found[::-1])  # now from the cache
    assert len(list(tmp_path.rglob("*.npz"))) == 12  # each read-out of each scan
    save_checkpoint(
        tmp_path / "run" / "best", checkpoint
    )  # what from_pretrained takes, the encoder takes
    of_a_run = MnemoDynEncoder(str(tmp_path / "run"), ("latent_sd", "response"))
    np.testing.assert_array_equal(of_a_run.fit_transform(scans), found)
    fresh = (
        MnemoDynEncoder(checkpoint, ("latent_sd",), untrained=5, cache=tmp_path)
        .fit(scans)
        .transform(scans)
    )
    assert not np.allclose(fresh, found[:, :6])


def test_scikit_learns_checks_that_apply_to_scans_pass(checkpoint):
    from sklearn.utils import estimator_checks

    encoder = MnemoDynEncoder(checkpoint)
    for check in (
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_do_not_raise_errors_in_init_or_set_params",
    ):
        getattr(estimator_checks, check)("MnemoDynEncoder", encoder)


def test_other_parcels_are_refused(checkpoint):
    scans = scans_of(2)
    other = [Scan(s.participant_id, s.values, 2.0, PARCELS[::-1]) for s in scans]
    with pytest.raises(CheckpointError, match="another order"):
        MnemoDynEncoder(checkpoint).fit(other)


def test_readouts_are_all_there(checkpoint):
    scans = scans_of(1)
    found = readouts(checkpoint.model, Scaling()(scans[0]), 2.0)
    assert {k: v.shape for k, v in found.items()} == {
        "latent_mean": (6,),
        "latent_sd": (6,),
        "latent_max": (6,),
        "scale_energy": (18,),
        "latent_correlation": (15,),
        "response": (28,),
        "last_frame": (8,),
    }
    assert set(found) == set(READOUTS)
