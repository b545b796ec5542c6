"""Scaling against scikit-learn and NumPy on the pooled values."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler

from mnemodyn.data.scaling import ALIASES, METHODS, Scaling, moments
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.data.store import convert

PARCELS = tuple("abcd")


def scans():
    rng = np.random.default_rng(0)
    made = []
    for i, n in enumerate((300, 180, 250)):
        values = 10_000 * rng.uniform(0.5, 2, 4) + rng.standard_t(4, (n, 4)) * [5, 50, 20, 1] * (
            1 + i
        )
        made.append(Scan(f"sub-{i}", values.astype(np.float32), 2.0, PARCELS, source=f"{i}.tsv"))
    return made


SCANS = scans()
POOLED = np.concatenate([s.values for s in SCANS]).astype(float)
CENTRED = np.concatenate([s.values - s.values.mean(0, dtype=float) for s in SCANS])


def expected(method, scan):
    """What each of the draft's names is to mean, by scikit-learn or NumPy on everything at once."""
    x = scan.values.astype(float)
    centred = x - x.mean(0)
    return {
        "standard": lambda: StandardScaler().fit(POOLED).transform(x),
        "minmax": lambda: MinMaxScaler().fit(POOLED).transform(x),
        "per_voxel_all_patient": lambda: MinMaxScaler().fit(POOLED).transform(x),
        "raw": lambda: x,
        "robust_scaler": lambda: RobustScaler().fit(CENTRED).transform(centred),
        "all_patient_all_voxel": lambda: (x - POOLED.min()) / np.ptp(POOLED),
        "per_patient_all_voxel": lambda: (x - x.min()) / np.ptp(x),
        "per_patient_per_voxel": lambda: MinMaxScaler().fit_transform(x),
        "subtract_mean": lambda: centred,
        "subtract_mean_global_std": lambda: centred / CENTRED.std(),
        "subtract_mean_99th_percentile": lambda: centred / np.quantile(CENTRED, 0.99),
    }[method]()


@pytest.mark.parametrize("method", ALIASES)
def test_the_names_of_the_draft(method):
    fitted = Scaling(method).fit(SCANS)
    for scan in SCANS:
        np.testing.assert_allclose(fitted(scan), expected(method, scan), rtol=1e-4, atol=1e-4)


def test_default_is_the_z_score_of_the_scan():
    z = Scaling().fit(SCANS)(SCANS[1])
    np.testing.assert_allclose(
        z, StandardScaler().fit_transform(SCANS[1].values.astype(float)), atol=1e-6
    )
    assert len(ALIASES) == 11
    assert len(METHODS) == 11


@pytest.mark.parametrize("method", METHODS)
def test_state_travels(method):
    fitted = Scaling(method).fit(SCANS)
    again = Scaling(**json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted
    np.testing.assert_array_equal(again(SCANS[0]), fitted(SCANS[0]))


@pytest.mark.parametrize("method", METHODS)
def test_fitted_on_training_scans_only(method):
    fitted = Scaling(method).fit(SCANS[:2])
    others = Scaling(method).fit([*SCANS[:2], Scan("sub-9", SCANS[2].values * 9, 2.0, PARCELS)])
    depends = fitted.to_dict() != others.to_dict()
    assert depends == (
        method not in ("zscore_per_parcel", "raw", "subtract_mean") and "_per_scan" not in method
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_store_fits_the_same(tmp_path, method):
    store = convert(SCANS, tmp_path / "store", dtype="float32")
    assert Scaling(method).fit(store) == Scaling(method).fit(SCANS)
    assert Scaling(method).fit(store[:2]) == Scaling(method).fit(SCANS[:2])


@pytest.mark.parametrize("method", METHODS)
def test_constant_parcels_are_zero(method):
    values = SCANS[0].values.copy()
    values[:, 2] = 7_777.7
    flat = replace(SCANS[0], values=values)
    assert moments(values)[1, 2] == 0
    x = Scaling(method).fit([flat, *SCANS[1:]])(flat)
    assert np.isfinite(x).all()
    if method != "raw":
        assert (x[:, 2] == 0).all()
        assert x[:, 0].std() > 0


@pytest.mark.parametrize("method", ["robust_parcel_over_scans", "subtract_mean_global_p99"])
def test_quantiles_of_a_sample(monkeypatch, method):
    exact = Scaling(method).fit(SCANS)
    monkeypatch.setattr("mnemodyn.data.scaling.LARGEST_SAMPLE", POOLED.size // 2)
    sampled = Scaling(method).fit(SCANS)
    assert sampled == Scaling(method).fit(SCANS) != exact
    # Four standard errors of a quartile of 365 frames, each 1.36 / sqrt(n) SDs of a normal distribution.
    np.testing.assert_allclose(sampled.scale, exact.scale, rtol=0.28)


def test_refusals():
    for method in ("standard", "minmax", "robust_scaler", "subtract_mean_99th_percentile"):
        with pytest.raises(ValueError, match="must be fitted"):
            Scaling(method)(SCANS[0])
        with pytest.raises(ValueError, match="needs training scans"):
            Scaling(method).fit([])
    with pytest.raises(ValueError, match="fitted to 4 parcels, got a scan of 3"):
        Scaling("standard").fit(SCANS)(Scan("s", SCANS[0].values[:, :3], 2.0, PARCELS[:3]))
    with pytest.raises(ValueError, match="scaling method must be one of"):
        Scaling("robust")
    with pytest.raises(DataError, match="all 300 frames are censored"):
        moments(SCANS[0].values, np.ones(300, dtype=bool))
