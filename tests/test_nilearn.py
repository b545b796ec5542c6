"""What nilearn's maskers return and what is saved of it, as scans and through the encoder."""

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnemodyn import Checkpoint, MnemoDyn, ModelConfig, Scaling
from mnemodyn.checkpoint import CheckpointError
from mnemodyn.data.scans import DataError, Scan, load_scan
from mnemodyn.readout import MnemoDynEncoder

maskers = pytest.importorskip("nilearn.maskers")
PARCELS = ("a", "b", "c", "d")
LABELS = np.resize([0, 2, 5, 7, 9], 120).reshape(5, 6, 4)


def image(seed):
    """A SIMULATED series of 40 volumes."""
    x = np.random.default_rng(seed).standard_normal((5, 6, 4, 40)).cumsum(-1)
    return nibabel.Nifti1Image(x.astype(np.float32) + 100, np.eye(4))


def of_labels(output="default"):
    labels = nibabel.Nifti1Image(LABELS.astype(np.int16), np.eye(4))
    masker = maskers.NiftiLabelsMasker(labels, labels=["Background", *PARCELS], standardize=None)
    return masker.set_output(transform=output).fit()


@pytest.fixture(scope="module")
def checkpoint():
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=4, n_timepoints=32, n_blocks=1, n_channels=6, input_width=6, n_levels=2
    )
    return Checkpoint(MnemoDyn(config).eval(), PARCELS, 2.0, Scaling(), "none", {})


def test_an_array_is_a_scan():
    masker = of_labels()
    x = masker.transform(image(0))
    scan = load_scan(
        x, t_r=2.0, parcels=list(masker.region_names_.values()), participant_id="sub-1"
    )
    means = np.stack(
        [np.asarray(image(0).dataobj)[label == LABELS].mean(0) for label in (2, 5, 7, 9)], axis=1
    )
    np.testing.assert_allclose(scan.values, means, rtol=1e-6)
    assert (scan.parcels, scan.t_r, scan.t_r_source, scan.participant_id) == (
        PARCELS,
        2.0,
        "setting",
        "sub-1",
    )
    named = load_scan(of_labels("pandas").transform(image(0)), t_r=2.0, participant_id="sub-1")
    np.testing.assert_array_equal(named.values, scan.values)
    assert named.parcels == PARCELS
    maps = nibabel.Nifti1Image(
        np.eye(4)[np.resize(range(4), 120)].reshape(5, 6, 4, 4).astype(np.float32), np.eye(4)
    )
    x = maskers.NiftiMapsMasker(maps, standardize=None).fit_transform(image(0))
    assert load_scan(x, t_r=2.0, parcels=4, participant_id="sub-1").values.shape == (40, 4)


@pytest.mark.parametrize(
    "name", ["sub-1.npy", "sub-1.csv", "bare/sub-1.csv", "sub-1_timeseries.tsv", "index/sub-1.csv"]
)
def test_what_is_saved_of_it_is_read(tmp_path, name):
    masker = of_labels()
    x, path = masker.transform(image(0)), tmp_path / name
    path.parent.mkdir(exist_ok=True)
    names = list(masker.region_names_.values())
    if name.endswith("npy"):
        np.save(path, x)
    elif name.startswith("bare"):
        np.savetxt(path, x, delimiter=",", fmt="%.9g")
    else:
        separator = "," if name.endswith("csv") else "\t"
        pd.DataFrame(x, columns=names).to_csv(path, sep=separator, index=name.startswith("index"))
    silent = name.endswith("npy") or name.startswith("bare")
    scan = load_scan(path, t_r=2.0, **({"frames_first": True, "parcels": names} if silent else {}))
    np.testing.assert_array_equal(scan.values, x)
    assert scan.parcels == PARCELS


def test_arrays_go_through_the_encoder(checkpoint):
    arrays = [of_labels().transform(image(i)) for i in range(4)]
    encoder = MnemoDynEncoder(checkpoint, t_r=2.0, parcels=PARCELS)
    scans = [Scan("sub-1", x.astype(np.float32), 2.0, PARCELS) for x in arrays]
    expected = MnemoDynEncoder(checkpoint).fit(scans).transform(scans)
    for given in (arrays, np.stack(arrays), [x.astype(float) for x in arrays]):
        np.testing.assert_array_equal(encoder.fit(given).transform(given), expected)
    tables = [of_labels("pandas").transform(image(i)) for i in range(4)]
    found = make_pipeline(MnemoDynEncoder(checkpoint, t_r=2.0), StandardScaler()).fit_transform(
        tables
    )
    np.testing.assert_allclose(found, StandardScaler().fit_transform(expected))
    covered = arrays[0].copy()
    covered[:, 2] = 0  # a region outside the field of view
    assert np.isfinite(encoder.transform([covered])).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"parcels": PARCELS},
            DataError,
            "array 0: no repetition time .*; give t_r in seconds",
        ),
        ({"t_r": 2.0}, DataError, "array 0: an array does not name its columns; give parcels"),
        ({"t_r": 2000.0, "parcels": PARCELS}, DataError, "array 0: .*looks like milliseconds"),
        ({"t_r": 2.0, "parcels": PARCELS[:3]}, DataError, "array 0: expected 3 parcels, got 4"),
        ({"t_r": 2.0, "parcels": PARCELS[::-1]}, CheckpointError, "another order"),
    ],
)
def test_what_an_array_does_not_say_must_be_given(checkpoint, settings, error, message):
    x = of_labels().transform(image(0))
    with pytest.raises(error, match=message):
        MnemoDynEncoder(checkpoint, **settings).fit([x])


def test_no_array_of_a_scan():
    settings = {"t_r": 2.0, "parcels": PARCELS, "participant_id": "sub-1"}
    for x, problem in [
        (np.zeros(4), "not-a-table"),
        (np.full((40, 4), "a"), "not-a-table"),
        (np.ones((40, 4)), "constant-parcels"),
        (np.full((40, 4), np.nan), "nan"),
    ]:
        with pytest.raises(DataError, match="sub-1") as caught:
            load_scan(x, **settings)
        assert caught.value.problem == problem
    with pytest.raises(DataError, match="give participant_id"):
        load_scan(np.ones((40, 4)), t_r=2.0, parcels=PARCELS)
