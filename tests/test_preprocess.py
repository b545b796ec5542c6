"""Dense series and volumes to parcels, against plain means, nilearn and Connectome Workbench."""

import json
import os
import pathlib
import shutil
import subprocess
import time

import nibabel
import numpy as np
import pandas as pd
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, SeriesAxis

from mnemodyn.cli import main
from mnemodyn.data import preprocess as module
from mnemodyn.data.atlas import Atlas
from mnemodyn.data.preprocess import Preprocessing, align, parcellate, preprocess
from mnemodyn.data.scans import DataError, load_scan

AFFINE = np.array([[-2.0, 0, 0, 4], [0, 2, 0, -4], [0, 0, 2, -2], [0, 0, 0, 1]])
needs_workbench = pytest.mark.skipif(
    shutil.which("wb_command") is None, reason="wb_command is not installed"
)


def axis(medial_wall=False):
    left, right = (
        np.arange(12) > (-1 if medial_wall else 2),
        np.arange(12) > (-1 if medial_wall else 1),
    )
    return (
        BrainModelAxis.from_mask(left, name="CORTEX_LEFT")
        + BrainModelAxis.from_mask(right, name="CORTEX_RIGHT")
        + BrainModelAxis.from_mask(np.ones((3, 2, 2)), affine=AFFINE, name="THALAMUS_LEFT")
    )


def small_atlas(where=None):
    where = axis() if where is None else where
    labels = np.resize([0, 3, 1, 2, 2, 5, 4, 3], len(where))
    return Atlas("Small", labels, ("a", "b", "c", "d", "e"), where)


def write_atlas(path, atlas):
    table = {0: ("???", (0, 0, 0, 0))}
    table.update({i: (name, (1, 0, 0, 1)) for i, name in enumerate(atlas.parcels, start=1)})
    axes = (LabelAxis([atlas.name], [table]), atlas.axis)
    image = nibabel.Cifti2Image(atlas.labels[None].astype(np.float32), axes)
    image.nifti_header.set_intent("ConnDenseLabel")
    path = pathlib.Path(path)
    path.parent.mkdir(exist_ok=True)
    image.to_filename(path)
    return path


def series(n=20, seed=0, n_grayordinates=31):
    x = np.random.default_rng(seed).standard_normal((n, n_grayordinates)).cumsum(0)
    return x.astype(np.float32)


def write_dense(
    folder,
    name="sub-01_ses-a_task-rest_space-fsLR_den-91k_bold.dtseries.nii",
    t_r=2.0,
    unit="SECOND",
    x=None,
):
    x = series() if x is None else x
    image = nibabel.Cifti2Image(x, (SeriesAxis(0, t_r, len(x), unit=unit), axis()))
    image.nifti_header.set_intent("ConnDenseSeries")
    folder.mkdir(exist_ok=True, parents=True)
    image.to_filename(folder / name)
    return folder / name


@pytest.fixture
def atlas_file(tmp_path):
    return str(write_atlas(tmp_path / "atlas" / "Small.dlabel.nii", small_atlas()))


def plain(x, labels):
    return np.stack(
        [x[:, labels == i].astype(float).mean(1) for i in range(1, labels.max() + 1)], axis=1
    )


def test_parcellate_is_the_mean_over_each_parcel():
    labels, x = small_atlas().labels, series()
    np.testing.assert_allclose(parcellate(x, labels), plain(x, labels), atol=1e-6)


@needs_workbench
@pytest.mark.parametrize("medial_wall", [False, True])
def test_agrees_with_workbench(tmp_path, medial_wall):
    atlas = small_atlas(axis(medial_wall))
    if medial_wall:  # Workbench wants every labelled vertex in the series
        inside = {*zip(axis().name, axis().vertex, strict=True)}
        atlas.labels[
            [pair not in inside for pair in zip(atlas.axis.name, atlas.axis.vertex, strict=True)]
        ] = 0
    file = write_atlas(tmp_path / "Small.dlabel.nii", atlas)
    source = write_dense(tmp_path / "in")
    theirs = tmp_path / "theirs.ptseries.nii"
    command = ["wb_command", "-cifti-parcellate", source, file, "COLUMN", theirs]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    row = preprocess([source], tmp_path / "out", Preprocessing(str(file))).iloc[0]
    ours, theirs = nibabel.load(row["output"]), nibabel.load(theirs)
    np.testing.assert_allclose(np.asarray(ours.dataobj), np.asarray(theirs.dataobj), atol=1e-6)
    assert ours.header.get_axis(0) == theirs.header.get_axis(0)
    assert list(ours.header.get_axis(1).name) == list(theirs.header.get_axis(1).name)
    for mine, other in zip(
        ours.header.get_axis(1).vertices, theirs.header.get_axis(1).vertices, strict=True
    ):
        assert {k: sorted(v) for k, v in mine.items()} == {k: sorted(v) for k, v in other.items()}
    opened = subprocess.run(
        ["wb_command", "-file-information", row["output"]], capture_output=True, text=True
    )
    assert "Parcel Series" in opened.stdout


def test_atlas_and_series_meet_by_vertex_and_voxel():
    wide, narrow = axis(medial_wall=True), axis()
    atlas = small_atlas(wide)
    found = align(atlas, narrow)
    place = {
        (n, *v, i): label
        for n, v, i, label in zip(wide.name, wide.voxel, wide.vertex, atlas.labels, strict=True)
    }
    expected = [
        place[(n, *v, i)] for n, v, i in zip(narrow.name, narrow.voxel, narrow.vertex, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(
        DataError, match="CIFTI_STRUCTURE_CORTEX_LEFT has 13 vertices in the series and 12"
    ):
        align(atlas, BrainModelAxis.from_mask(np.ones(13), name="CORTEX_LEFT"))
    moved = BrainModelAxis.from_mask(
        np.ones((3, 2, 2)), affine=AFFINE + np.eye(4, k=3), name="THALAMUS_LEFT"
    )
    with pytest.raises(DataError, match="differ in shape or affine"):
        align(atlas, moved)
    with pytest.raises(DataError, match="2 of 5 parcels of the atlas Small have no grayordinate"):
        align(atlas, BrainModelAxis.from_mask(np.arange(12) < 4, name="CORTEX_LEFT"))


@pytest.mark.parametrize("ending", ["ptseries.nii", "tsv"])
def test_writes_what_the_reader_reads(tmp_path, atlas_file, ending):
    source = write_dense(tmp_path / "in")
    row = preprocess(
        [tmp_path / "in"], tmp_path / "out", Preprocessing(atlas_file, table=ending == "tsv")
    ).iloc[0]
    stem = "sub-01_ses-a_task-rest_space-fsLR_den-91k_seg-Small_stat-mean_timeseries"
    assert row["output"] == str(tmp_path / "out" / "sub-01" / "ses-a" / "func" / f"{stem}.{ending}")
    scan = load_scan(row["output"])
    assert (scan.participant_id, scan.t_r, scan.parcels, scan.atlas) == (
        "sub-01",
        2.0,
        tuple("abcde"),
        "Small",
    )
    np.testing.assert_allclose(scan.values, plain(series(), small_atlas().labels), atol=1e-6)
    facts = json.loads((tmp_path / "out/sub-01/ses-a/func" / f"{stem}.json").read_text())
    assert facts["Sources"] == [source.name]
    assert facts["Settings"] == {
        "low_pass": None,
        "high_pass": None,
        "confounds": [],
        "t_r": None,
        "override_t_r": False,
        "atlas": "Small.dlabel.nii",
        "table": ending == "tsv",
    }
    assert (
        json.loads((tmp_path / "out/dataset_description.json").read_text())["DatasetType"]
        == "derivative"
    )


def test_complete_scans_are_skipped_and_others_are_not(tmp_path, atlas_file):
    write_dense(tmp_path / "in")
    second = write_dense(tmp_path / "in", "sub-02_bold.dtseries.nii", x=series(seed=1))
    settings = Preprocessing(atlas_file)

    def run(settings=settings):
        return preprocess([tmp_path / "in"], tmp_path / "out", settings)

    rows = run()
    assert list(rows["status"]) == ["done", "done"]
    before = [(tmp_path / "out").joinpath(o).read_bytes() for o in rows["output"]]
    assert list(run()["status"]) == ["skipped", "skipped"]
    sidecar = rows["output"][0].removesuffix(".ptseries.nii") + ".json"
    (tmp_path / sidecar).unlink()  # as a run that was killed between the two leaves it
    assert list(run()["status"]) == ["done", "skipped"]
    (tmp_path / sidecar).write_text("{")
    assert list(run()["status"]) == ["done", "skipped"]
    assert [(tmp_path / o).read_bytes() for o in rows["output"]] == before
    write_dense(tmp_path / "in", second.name, x=series(seed=2))  # as many bytes
    os.utime(second, (time.time() + 5,) * 2)
    assert list(run()["status"]) == ["skipped", "done"]
    assert list(run()["status"]) == ["skipped", "skipped"]
    write_dense(tmp_path / "in", second.name, x=series(n=21))
    assert list(run()["status"]) == ["skipped", "done"]
    write_atlas(atlas_file, Atlas("Small", np.resize([1, 2], 31), ("x", "y"), axis()))
    module._atlas.cache_clear()
    assert list(run()["status"]) == ["done", "done"]


def test_each_scan_fails_alone_and_says_why(tmp_path, atlas_file, capsys):
    folder = tmp_path / "in"
    write_dense(folder, "sub-01_bold.dtseries.nii")
    write_dense(folder, "sub-02_bold.dtseries.nii", t_r=0.0)
    write_dense(folder, "sub-03_bold.dtseries.nii", unit="HERTZ")
    write_dense(folder, "sub-04_bold.dtseries.nii").with_name("sub-04_bold.json").write_text(
        '{"RepetitionTime": 0.8}'
    )
    (folder / "sub-05_bold.dtseries.nii").write_bytes(
        (folder / "sub-01_bold.dtseries.nii").read_bytes()[:-100]
    )
    write_dense(folder, "rest_bold.dtseries.nii")
    x = series()
    x[3, 7] = np.nan
    write_dense(folder, "sub-06_bold.dtseries.nii", x=x)
    shutil.copy(atlas_file, folder / "sub-07.dtseries.nii")
    status = main(["preprocess", str(folder), "-o", str(tmp_path / "out"), "--atlas", atlas_file])
    out, err = capsys.readouterr()
    assert (status, out.strip()) == (1, "1 done, 0 skipped, 7 failed")
    for message in (
        "no-t-r: sub-02_bold.dtseries.nii: no repetition time",
        "no-t-r: sub-03_bold.dtseries.nii: no repetition time",
        "t-r-conflict: sub-04_bold.dtseries.nii: repetition times differ, in seconds: ",
        "truncated: sub-05_bold.dtseries.nii: ",
        "no-participant: rest_bold.dtseries.nii: no participant",
        "sub-06_bold.dtseries.nii: 1 values are NaN",
        "not-dense: sub-07.dtseries.nii: axes must be (series, grayordinates), got (LabelAxis",
    ):
        assert message in err
    (folder / "sub-02_bold.json").write_text(
        '{"RepetitionTime": 0.8}'
    )  # the mend that the message names
    rows = preprocess(
        [folder / "sub-02_bold.dtseries.nii"], tmp_path / "out", Preprocessing(atlas_file)
    )
    assert load_scan(rows["output"][0]).t_r == 0.8
    source = folder / "sub-03_bold.dtseries.nii"
    rows = preprocess([source], tmp_path / "out", Preprocessing(atlas_file, t_r=1.1))
    assert load_scan(rows["output"][0]).t_r == 1.1


def test_wrong_use_is_refused_before_anything_is_written(tmp_path, atlas_file, capsys):
    def refused(*arguments):
        assert main(["preprocess", "-o", str(tmp_path / "out"), *map(str, arguments)]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    source = write_dense(tmp_path / "in", "sub-01_bold.dtseries.nii")
    assert "no such file or folder" in refused(tmp_path / "none", "--atlas", atlas_file)
    assert "no file ending in .dtseries.nii" in refused(tmp_path / "atlas", "--atlas", atlas_file)
    assert "jobs must be >= 1, got 0" in refused(source, "--atlas", atlas_file, "--jobs", 0)
    band = refused(source, "--atlas", atlas_file, "--low-pass", 0.01, "--high-pass", 0.1)
    assert "0 <= high_pass < low_pass, got 0.1 to 0.01 Hz" in band
    assert "got 0.0 to -1.0 Hz" in refused(source, "--atlas", atlas_file, "--low-pass", -1)
    twin = write_dense(tmp_path / "copy", "sub-01_bold.dtseries.nii")
    assert "would be written 2 times" in refused(source, twin, "--atlas", atlas_file)


def test_processes_give_the_same_bytes(tmp_path, atlas_file):
    write_dense(tmp_path / "in")
    write_dense(tmp_path / "in", "sub-02_bold.dtseries.nii", x=series(seed=1))
    alone = preprocess([tmp_path / "in"], tmp_path / "one", Preprocessing(atlas_file))
    both = preprocess([tmp_path / "in"], tmp_path / "two", Preprocessing(atlas_file), jobs=2)
    assert list(both["status"]) == ["done", "done"]
    for a, b in zip(alone["output"], both["output"], strict=True):
        assert (tmp_path / a).read_bytes() == (tmp_path / b).read_bytes()


@pytest.mark.filterwarnings("ignore:.*confounds will be standardized:DeprecationWarning")
def test_confounds_and_band_are_nilearns_and_recorded(tmp_path, atlas_file):
    clean = pytest.importorskip("nilearn.signal").clean
    x = series(n=120) + 100
    source = write_dense(tmp_path / "in", x=x)
    confounds = pd.DataFrame(
        np.random.default_rng(2).standard_normal((120, 3)), columns=["a", "b", "c"]
    )
    confounds.loc[0, "b"] = np.nan
    confounds["motion_outlier00"] = (confounds.index == 4).astype(int)
    confounds.to_csv(
        source.with_name("sub-01_ses-a_task-rest_desc-confounds_timeseries.tsv"),
        sep="\t",
        na_rep="n/a",
        index=False,
    )
    settings = Preprocessing(atlas_file, high_pass=0.01, low_pass=0.1, confounds=("a", "b"))
    row = preprocess([source], tmp_path / "out", settings).iloc[0]
    assert row["message"] == ""
    # Grayordinates cleaned first, then averaged: the same by linearity.
    regressors = confounds[["a", "b"]].fillna(0).to_numpy()
    full = clean(
        x.astype(float),
        confounds=regressors,
        high_pass=0.01,
        low_pass=0.1,
        t_r=2.0,
        detrend=False,
        standardize=None,
    )
    np.testing.assert_array_equal(np.flatnonzero(load_scan(row["output"]).censored), [4])
    np.testing.assert_allclose(
        load_scan(row["output"]).values, plain(full, small_atlas().labels), atol=1e-5
    )
    sidecar = (tmp_path / row["output"]).with_name(
        row["output"].split("/")[-1].removesuffix(".ptseries.nii") + ".json"
    )
    said = json.loads(sidecar.read_text())["Settings"]
    assert (said["low_pass"], said["high_pass"], said["confounds"]) == (0.1, 0.01, ["a", "b"])

    row = preprocess(
        [source], tmp_path / "regressed", Preprocessing(atlas_file, confounds=("a", "b"))
    ).iloc[0]
    design = np.c_[np.ones(120), regressors]
    residual = x - (design @ np.linalg.lstsq(design, x, rcond=None)[0]) + x.mean(0)
    np.testing.assert_allclose(
        load_scan(row["output"]).values, plain(residual, small_atlas().labels), atol=1e-4
    )

    def message(**changes):
        return preprocess([source], tmp_path / "no", Preprocessing(atlas_file, **changes))[
            "message"
        ][0]

    assert "desc-confounds_timeseries.tsv is not there or has no columns ['z']" in message(
        confounds=("z",)
    )
    assert "low_pass must be below 0.25 Hz at 2 s per frame, got 0.3" in message(low_pass=0.3)
    confounds.iloc[:100].fillna(0).to_csv(
        source.with_name("sub-01_ses-a_task-rest_desc-confounds_timeseries.tsv"),
        sep="\t",
        index=False,
    )
    assert "must have 120 complete rows, got 100 rows" in message(confounds=("a",))


def write_volume(folder, values, affine, t_r=1.5, unit="sec", name="sub-03_task-rest_bold.nii.gz"):
    image = nibabel.Nifti1Image(values.astype(np.float32), affine)
    image.header.set_xyzt_units("mm", unit)
    image.header.set_zooms((*np.abs(np.diag(affine))[:3], t_r))
    folder.mkdir(exist_ok=True)
    image.to_filename(folder / name)
    return folder / name


def test_volume_with_a_label_volume(tmp_path):
    pytest.importorskip("nilearn.maskers")
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.resize([0, 2, 5, 9], 120)).reshape(5, 6, 4)
    x = rng.standard_normal((5, 6, 4, 12)) + 50
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16), AFFINE), tmp_path / "seg.nii.gz")
    (tmp_path / "seg.tsv").write_text("index\tname\n2\ttwo\n9\tnine\n")
    source = write_volume(tmp_path / "in", x, AFFINE, t_r=1500, unit="msec")
    row = preprocess(
        [tmp_path / "in"], tmp_path / "out", Preprocessing(str(tmp_path / "seg.nii.gz"))
    ).iloc[0]
    assert row["message"] == ""
    scan = load_scan(row["output"])
    assert (scan.parcels, scan.t_r, scan.atlas) == (("two", "5", "nine"), 1.5, "seg")
    np.testing.assert_allclose(
        scan.values, np.stack([x[labels == i].mean(0) for i in (2, 5, 9)], axis=1), rtol=1e-6
    )
    write_volume(tmp_path / "in", x, AFFINE, t_r=0, name=source.name)
    row = preprocess([source], tmp_path / "no", Preprocessing(str(tmp_path / "seg.nii.gz"))).iloc[0]
    assert row["problem"] == "no-t-r"
