"""Every format a scan comes in, what stands beside it, and what is written back."""

import io
import json
import pickle
import re
import shutil
import struct
import subprocess
import zlib
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, ScalarAxis, SeriesAxis
from scipy.io import savemat

from lib.quality import spectrum, survey
from mnemodyn.data import formats
from mnemodyn.data.collection import open_scans
from mnemodyn.data.scans import (
    DataError,
    Scan,
    fingerprint,
    load_scan,
    save_scan,
)

NAMES = ("Vis_1", "b 2", "c")
VALUES = np.random.default_rng(3).standard_normal((30, 3)).astype(np.float32) * [1, 20, 0.01] + 100
VALUES = VALUES.astype(np.float32)
XCPD = "sub-01_ses-2_task-rest_run-1"


def cifti(path, values, *axes, t_r=0.72):
    Cifti2Image(
        values, axes or (SeriesAxis(0, t_r, len(values)), formats.parcels_axis(NAMES))
    ).to_filename(path)
    return path


def table(path, header=NAMES, separator="\t", values=VALUES, fmt="%.9g"):
    np.savetxt(
        path, values, delimiter=separator, header=separator.join(header), comments="", fmt=fmt
    )
    return path


def write_mat(path, **arrays):
    savemat(path, arrays)
    return path


def write_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def write_npy(path, array):
    np.save(path, array)
    return path


SERIES = SeriesAxis(0, 0.72, 30)
WRITERS = {  # name: (write, settings, names expected)
    "x.ptseries.nii": (lambda p: cifti(p, VALUES), {}, NAMES),
    "turned.ptseries.nii": (
        lambda p: cifti(p, VALUES.T, formats.parcels_axis(NAMES), SERIES),
        {},
        NAMES,
    ),
    "x_parcellated.dtseries.nii": (
        lambda p: cifti(p, VALUES, SERIES, ScalarAxis(NAMES)),
        {},
        NAMES,
    ),
    "y_3_parcellated.dtseries.nii": (
        lambda p: cifti(p, VALUES, SERIES, BrainModelAxis.from_surface([0, 1, 2], 9, "CortexLeft")),
        {},
        ("1", "2", "3"),
    ),
    "x_timeseries.tsv": (table, {"t_r": 0.72}, NAMES),
    "x.csv": (lambda p: table(p, separator=","), {"t_r": 0.72}, NAMES),
    "indexed.csv": (
        lambda p: table(p, ("", *NAMES), ",", np.column_stack([np.arange(30), VALUES])),
        {"t_r": 0.72},
        NAMES,
    ),
    "x.1D": (lambda p: table(p, [f"#{n}" for n in NAMES]), {"t_r": 0.72}, NAMES),
    "x.npy": (
        lambda p: write_npy(p, VALUES.T),
        {"t_r": 0.72, "frames_first": False},
        ("1", "2", "3"),
    ),
    "fortran.npy": (
        lambda p: write_npy(p, np.asfortranarray(VALUES)),
        {"t_r": 0.72, "frames_first": True, "parcels": NAMES},
        NAMES,
    ),
    "x.npz": (
        lambda p: write_npz(p, bold=VALUES, t_r=0.72),
        {"t_r": 0.72, "frames_first": True},
        ("1", "2", "3"),
    ),
    "x.mat": (
        lambda p: write_mat(p, sc=np.eye(3), tc=VALUES.T),
        {"t_r": 0.72, "frames_first": False, "key": "tc"},
        ("1", "2", "3"),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_one_series_in_every_format(tmp_path, name):
    write, settings, names = WRITERS[name]
    path = tmp_path / f"sub-01_{name}"
    write(path)
    scan = load_scan(path, **settings)
    np.testing.assert_array_equal(scan.values, VALUES)
    assert scan.values.dtype == np.float32
    assert (scan.parcels, scan.participant_id, scan.source) == (names, "sub-01", path.name)
    assert scan.t_r == pytest.approx(0.72)
    assert scan.t_r_source == ("setting" if "t_r" in settings else "header")


def problem(path, **settings):
    with pytest.raises(DataError) as caught:
        load_scan(path, **{"t_r": 0.72, **settings})
    assert path.name.split(".")[0] in str(caught.value)  # the file or its sidecar
    return caught.value.problem


def test_orientation_is_never_guessed(tmp_path):
    assert problem(write_npy(tmp_path / "sub-1.npy", VALUES)) == "orientation"
    assert problem(table(tmp_path / "sub-1.tsv"), frames_first=False) == "orientation"
    numbered = table(
        tmp_path / "sub-1.csv", ("", *"012"), ",", np.column_stack([np.arange(30), VALUES])
    )
    assert problem(numbered) == "orientation"
    assert problem(table(tmp_path / "sub-2.csv", "012", ",")) == "header"
    unnamed = table(tmp_path / "sub-4.csv", ("", "b", "c"), ",")
    assert problem(unnamed) == "header"
    bare = tmp_path / "sub-3.csv"
    np.savetxt(bare, VALUES, delimiter=",", fmt="%.9g")
    assert problem(bare) == "orientation"
    np.testing.assert_array_equal(load_scan(bare, t_r=1, frames_first=True).values, VALUES)


def test_arrays_are_chosen_by_key(tmp_path):
    path = write_npz(tmp_path / "sub-1.npz", a=VALUES, b=VALUES + 1)
    assert problem(path, frames_first=True) == "key"
    assert problem(path, frames_first=True, key="c") == "key"
    np.testing.assert_array_equal(
        load_scan(path, t_r=1, frames_first=True, key="b").values, VALUES + 1
    )
    beside = np.array([{"note": 1}], dtype=object)  # never unpickled
    path = write_npz(tmp_path / "sub-2.npz", bold=VALUES, about=beside)
    np.testing.assert_array_equal(load_scan(path, t_r=1, frames_first=True).values, VALUES)
    assert problem(path, frames_first=True, key="about") == "key"


@pytest.mark.parametrize("name", ["sub-1.npy", "sub-1.npz"])
@pytest.mark.parametrize("content", [b"\x93NUMPX" + bytes(200), pickle.dumps(VALUES)])
def test_no_advice_to_load_what_may_be_executed(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{name}") as caught:
        load_scan(path, t_r=1, frames_first=True)
    assert not re.search("pickle|unsafe", str(caught.value))


def test_an_archive_behind_other_bytes_is_no_pickle(tmp_path):
    path = write_npz(tmp_path / "sub-1.npz", bold=VALUES)
    path.write_bytes(b"1" + path.read_bytes())
    np.testing.assert_array_equal(load_scan(path, t_r=1, frames_first=True).values, VALUES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stored", [0, 8, 14, 19, 519])
def test_numbers_of_no_type_do_not_kill_python(tmp_path, stored, packed):
    path = write_mat(tmp_path / "sub-1.mat", tc=VALUES)
    content = bytearray(path.read_bytes())
    place = content.index(b"tc\0\0") + 4
    assert content[place] == 7  # float32
    content[place : place + 4] = stored.to_bytes(4, "little")
    if packed:
        array = zlib.compress(content[128:])
        content[128:] = struct.pack("<II", 15, len(array)) + array
    path.write_bytes(content)
    assert problem(path, frames_first=True) == "not-a-table"


@pytest.mark.parametrize("name", ["sub-1.ptseries.nii", "sub-1.nii.gz"])
def test_no_memory_is_asked_for_more_than_a_file_can_have(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bytes(1000))
    stored = np.zeros(0, np.int16)
    formats.check_whole(path, SimpleNamespace(dataobj=stored, shape=(50, 10)))
    with pytest.raises(DataError, match="states 2,000,000 bytes, the file has 1,000") as caught:
        formats.check_whole(path, SimpleNamespace(dataobj=stored, shape=(1000, 1000)))
    assert caught.value.problem == "truncated"


def test_values_whose_differences_are_beyond_float32(tmp_path):
    values = VALUES.copy()
    values[::2, 1] = 3e38
    values[1::2, 1] = -3e38
    path = write_npy(tmp_path / "sub-1.npy", values)
    np.testing.assert_array_equal(load_scan(path, t_r=1, frames_first=True).values, values)


KINDS = ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, {"do_compression": packed}) for kind in KINDS for packed in (False, True)),
        *((kind, {"format": "4"}) for kind in ("f8", "u1", "i2", "u2", "i4")),
    ],
)
def test_matlab_files_of_every_version_and_number(tmp_path, kind, how):
    values = np.random.default_rng(1).integers(0, 100, (20, 3)).astype(kind)
    other = {"n": 3.5, "word": "text", "x": np.ones((2, 2)) * 1j}
    if "format" not in how:
        other |= {"cells": np.array([[1, "a"]], dtype=object), "inside": {"a": np.eye(3)}}
    path = tmp_path / "sub-1.mat"
    savemat(path, {**other, "tc": values}, **how)
    np.testing.assert_array_equal(
        load_scan(path, t_r=1, frames_first=True, key="tc").values, values
    )


def test_what_is_no_parcellated_series(tmp_path):
    dense = BrainModelAxis.from_surface([0, 1, 2], 9, "CortexLeft")
    path = cifti(tmp_path / "sub-1_bold.dtseries.nii", VALUES, SERIES, dense)
    with pytest.raises(DataError, match="mnemodyn preprocess") as caught:
        load_scan(path)
    assert caught.value.problem == "dense"
    values, axes, t_r = formats.read_cifti(path)
    np.testing.assert_array_equal(values, VALUES)
    assert (axes[1], t_r) == (dense, pytest.approx(0.72))
    volume = tmp_path / "sub-1_bold.nii"
    for image in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        image(np.ones((4, 4, 4, 5), np.float32), np.eye(4)).to_filename(volume)
        assert problem(volume) == "not-cifti"
        image(np.ones((4, 4, 4, 5), np.float32), np.eye(4)).to_filename(f"{volume}.gz")
        assert problem(tmp_path / "sub-1_bold.nii.gz") == "not-cifti"
    matrix = formats.parcels_axis(NAMES)
    assert (
        problem(cifti(tmp_path / "sub-1.pconn.nii", np.eye(3, dtype=np.float32), matrix, matrix))
        == "not-a-series"
    )
    (tmp_path / "sub-1.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64" + b" " * 500)
    assert problem(tmp_path / "sub-1.mat", frames_first=True) == "mat-7.3"
    assert problem(tmp_path / "sub-1.xlsx") == "format"


def altered(values, at, to):
    values = values.copy()
    values[at] = to
    return values


@pytest.mark.parametrize(
    ("values", "settings", "name"),
    [
        (altered(VALUES, (3, 1), np.nan), {}, "nan"),
        (altered(VALUES, (slice(None), 1), np.nan), {}, "nan"),
        (altered(VALUES, (3, 1), np.inf), {}, "infinite"),
        (altered(VALUES, (slice(None), 2), 5), {}, "constant-parcels"),
        (VALUES[:9], {"min_frames": 10}, "too-short"),
        (VALUES, {"parcels": 4}, "parcel-count"),
        (VALUES, {"parcels": NAMES[:2]}, "parcel-count"),
        (VALUES, {"parcels": NAMES[::-1]}, "parcel-order"),
    ],
)
def test_problems_have_names(tmp_path, values, settings, name):
    path = cifti(tmp_path / "sub-1.ptseries.nii", values)
    with pytest.raises(DataError, match=path.name) as caught:
        load_scan(path, **settings)
    assert caught.value.problem == name


def test_constant_parcels_are_allowed_by_number(tmp_path):
    values = altered(
        altered(VALUES, (slice(None), 2), 5), (slice(None), 0), np.nan
    )  # NaN: not covered
    path = cifti(tmp_path / "sub-1.ptseries.nii", values)
    scan = load_scan(path, max_constant_parcels=2)
    np.testing.assert_array_equal(scan.constant, [True, False, True])
    np.testing.assert_array_equal(scan.values[:, 0], 0)
    full = Scan("sub-1", VALUES[:, 1:2], 0.72, ("b 2",))
    for with_constant, without in (
        (spectrum(scan)[1], spectrum(full)[1]),
        (survey([scan]).table.lag1, survey([full]).table.lag1),
    ):
        np.testing.assert_allclose(with_constant, without, rtol=1e-5)
    wide = Scan(
        "sub-1", np.array([[-128], [127]], np.int8), 1.0, ("a",)
    )  # the difference is -1 in int8
    assert not wide.constant.any()


def test_files_cut_short(tmp_path):
    path = table(tmp_path / "sub-1_timeseries.tsv")
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\t")])
    assert problem(path) == "truncated"
    for name, (write, settings, _) in WRITERS.items():
        path = tmp_path / f"sub-2_{name}"
        write(path)
        whole = path.read_bytes()
        for part in (0.98, 0.5, 0.01, 0):
            path.write_bytes(whole[: int(part * len(whole))])
            if name.endswith(("tsv", "csv", "1D")) and part in (0.98, 0.5):
                continue  # a text may end at a line's end and be whole
            assert problem(path, **settings) in {"truncated", "not-cifti"}, (name, part)


def test_an_array_that_is_longer_than_its_file(tmp_path):
    header = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(header, about)
    path = tmp_path / "sub-1.npy"
    path.write_bytes(header.getvalue() + b"\0" * 64)
    assert problem(path, frames_first=True) == "truncated"


# t_r


def test_units_of_the_header(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_shape((2, 2, 2, 5))
    for zoom, unit, t_r in (
        (720, "msec", 0.72),
        (2e6, "usec", 2),
        (0.8, "sec", 0.8),
        (0, "sec", None),
        (2, "hz", None),
    ):
        header.set_zooms((1, 1, 1, zoom))
        header.set_xyzt_units("mm", unit)
        assert formats.volume_t_r(header) == (None if t_r is None else pytest.approx(t_r))
    path = cifti(tmp_path / "sub-1.ptseries.nii", VALUES, t_r=720.0)
    with pytest.raises(DataError, match=r"720 looks like milliseconds \(0.72 s\)") as caught:
        load_scan(path)
    assert caught.value.problem == "t-r-unit"
    path.write_bytes(path.read_bytes().replace(b'SeriesExponent="0"', b'SeriesExponent="-3"'))
    path.write_bytes(path.read_bytes())
    assert load_scan(path).t_r == pytest.approx(0.72)
    assert problem(cifti(path, VALUES, t_r=0.0), t_r=None) == "no-t-r"
    scan = load_scan(path, t_r=2)
    assert (scan.t_r, scan.t_r_source) == (2, "setting")


def test_t_r_that_is_stated_twice(tmp_path):
    path = cifti(tmp_path / "sub-1_bold.ptseries.nii", VALUES, t_r=1.1)
    (tmp_path / "sub-1_bold.json").write_text('{"RepetitionTime": 0.8}')
    with pytest.raises(DataError, match="'header': 1.1, 'sidecar': 0.8") as caught:
        load_scan(path)
    assert caught.value.problem == "t-r-conflict"
    scan = load_scan(path, t_r=0.8, override_t_r=True)
    assert (scan.t_r, scan.t_r_source) == (0.8, "setting")


def test_time_from_the_series_it_was_made_of(tmp_path):
    """XCP-D's tables say ``SamplingFrequency: TR`` and name the dense series, whose sidecar has the time."""
    path = table(tmp_path / f"{XCPD}_space-fsLR_seg-Tian_stat-mean_timeseries.tsv")
    dense = f"{XCPD}_space-fsLR_den-91k_desc-denoised_bold"
    sources = [
        "bids:atlas:atlas-Tian/atlas-Tian_dseg.dlabel.nii",
        f"bids::sub-01/ses-2/func/{dense}.dtseries.nii",
    ]
    path.with_suffix(".json").write_text(
        json.dumps({"SamplingFrequency": "TR", "Sources": sources})
    )
    assert problem(path, t_r=None) == "no-t-r"
    (tmp_path / f"{dense}.json").write_text(
        json.dumps({"RepetitionTime": 0.8, "Sources": [path.name]})
    )  # a circle
    assert (load_scan(path).t_r, load_scan(path).t_r_source) == (0.8, "sidecar")
    path.with_suffix(".json").write_text(json.dumps({"Sources": [*sources, "other_bold.nii.gz"]}))
    (tmp_path / "other_bold.json").write_text(json.dumps({"RepetitionTime": 2}))
    assert problem(path, t_r=None) == "t-r-conflict"


def test_sidecars_are_inherited(tmp_path):
    folder = tmp_path / "sub-01" / "ses-2" / "func"
    folder.mkdir(parents=True)
    path = table(folder / f"{XCPD}_space-fsLR_atlas-4S456Parcels_den-91k_stat-mean_timeseries.tsv")

    def state(where, name, t_r):
        (where / name).write_text(json.dumps({"RepetitionTime": t_r}))

    state(tmp_path, "task-motor_bold.json", 9)  # another task
    state(folder, "sub-01_ses-2_task-rest_run-2_bold.json", 9)  # another run
    assert problem(path, t_r=None) == "no-t-r"
    for where, name, t_r in [
        (tmp_path, "task-rest_bold.json", 1.1),
        (tmp_path / "sub-01", "sub-01_task-rest_bold.json", 1.2),
        (folder, "sub-01_ses-2_task-rest_bold.json", 1.3),
        (folder, f"{XCPD}_bold.json", 1.4),
        (folder, f"{XCPD}_space-fsLR_den-91k_stat-mean_timeseries.json", 1.5),
        (folder, path.with_suffix(".json").name, 1.6),
    ]:
        state(where, name, t_r)
        scan = load_scan(path)
        assert (scan.t_r, scan.t_r_source) == (t_r, "sidecar")
    assert (scan.session, scan.run, scan.atlas) == ("2", "1", "4S456Parcels")
    path.with_suffix(".json").unlink()
    state(folder, f"{XCPD}_atlas-4S456Parcels_den-91k_stat-mean_timeseries.json", 1.7)
    assert problem(path, t_r=None) == "t-r-conflict"
    path.with_suffix(".json").write_text("[1]")
    assert problem(path) == "sidecar"
    state(folder, path.with_suffix(".json").name, "2 s")
    assert problem(path) == "sidecar"


# Censored frames

OUT = np.isin(np.arange(30), [0, 4, 5, 29])


def xcpd(folder, values):
    path = table(folder / f"{XCPD}_space-fsLR_atlas-Test_stat-mean_timeseries.tsv", values=values)
    lines = ["framewise_displacement", *(str(float(o)) for o in OUT)]
    (folder / f"{XCPD}_outliers.tsv").write_text("\n".join(lines))
    fd = np.where(OUT, 0.9, 0.1)
    table(
        folder / f"{XCPD}_motion.tsv",
        ("rot_x", "framewise_displacement"),
        values=np.column_stack([fd, fd]),
    )
    return path, fd.mean()


def test_censored_frames_of_xcpd(tmp_path):
    path, fd = xcpd(tmp_path, VALUES)  # its interpolated output
    scan = load_scan(path, t_r=2)
    np.testing.assert_array_equal(scan.censored, OUT)
    np.testing.assert_array_equal(scan.values, VALUES)
    assert scan.mean_fd == pytest.approx(fd)
    assert scan.n_usable == 26
    path, _ = xcpd(
        tmp_path, VALUES[~OUT]
    )  # its censored output: the frames are back in their places
    scan = load_scan(path, t_r=2, interpolate=False)
    np.testing.assert_array_equal(np.isnan(scan.values), np.repeat(OUT[:, None], 3, axis=1))
    np.testing.assert_array_equal(scan.values[~OUT], VALUES[~OUT])
    filled = load_scan(path, t_r=2)
    np.testing.assert_array_equal(filled.values[~OUT], VALUES[~OUT])
    line = VALUES[3] + (VALUES[6] - VALUES[3]) * np.array([[1], [2]]) / 3
    np.testing.assert_allclose(filled.values[4:6], line, rtol=1e-6)
    np.testing.assert_array_equal(filled.values[[0, 29]], VALUES[[1, 28]])
    assert fingerprint([filled]) != fingerprint([Scan("sub-01", filled.values, 2.0, NAMES)])
    assert np.isfinite(survey([scan]).table.lag1[0])
    path, _ = xcpd(tmp_path, VALUES[:20])
    assert problem(path) == "censoring"
    path, _ = xcpd(tmp_path, altered(VALUES, (1, 1), np.nan))
    assert problem(path) == "nan"
    assert problem(path, min_frames=27) == "too-short"


def test_censored_frames_of_fmriprep(tmp_path):
    path = table(tmp_path / "sub-1_task-rest_space-fsLR_timeseries.tsv")
    rows = np.zeros((30, 3))
    rows[:, 0] = 0.2
    rows[7, 1] = rows[0, 2] = 1
    names = ("framewise_displacement", "motion_outlier00", "non_steady_state_outlier00")
    confounds = table(
        tmp_path / "sub-1_task-rest_desc-confounds_timeseries.tsv", names, values=rows
    )
    confounds.write_text(confounds.read_text().replace("0.2", "n/a", 1))
    scan = load_scan(path, t_r=2)
    np.testing.assert_array_equal(np.flatnonzero(scan.censored), [0, 7])
    assert scan.mean_fd == pytest.approx(0.2)
    assert [s.source for s in open_scans(tmp_path, t_r=2)] == [
        path.name
    ]  # the confounds are no scan
    confounds.write_text("framewise_displacement\nword\n")
    with pytest.raises(DataError, match="not a readable table of confounds"):
        load_scan(path, t_r=2)


# Sets of scans, and writing


def test_one_series_under_two_names(tmp_path):
    table(tmp_path / "sub-1_timeseries.tsv")
    cifti(tmp_path / "sub-1_timeseries.ptseries.nii", VALUES)
    assert [s.source for s in open_scans(tmp_path)] == ["sub-1_timeseries.ptseries.nii"]
    cifti(
        tmp_path / "sub-1_den-91k_timeseries.ptseries.nii", VALUES
    )  # as XCP-D names it beside sub-1_timeseries.tsv
    (tmp_path / "sub-1_timeseries.ptseries.nii").unlink()
    assert [s.source for s in open_scans(tmp_path)] == ["sub-1_den-91k_timeseries.ptseries.nii"]
    (tmp_path / "sub-1_den-91k_timeseries.ptseries.nii").rename(
        tmp_path / "sub-1_timeseries.ptseries.nii"
    )
    cifti(tmp_path / "sub-2_timeseries.ptseries.nii", VALUES)
    with pytest.raises(DataError, match=r"sub-1_time.*sub-2_time") as caught:
        open_scans(tmp_path)
    assert caught.value.problem == "duplicate-series"
    assert len(open_scans(tmp_path, pattern="sub-2*")) == 1


def test_a_dot_within_a_name_ends_nothing(tmp_path):
    for hertz in ("0.01", "0.1"):
        values = VALUES * float(hertz)
        save_scan(
            Scan("sub-01", values, 2.0, NAMES),
            tmp_path / f"sub-01_run-{hertz[-1]}_hp{hertz}_timeseries.tsv",
        )
    assert [s.t_r for s in open_scans(tmp_path)] == [
        2.0,
        2.0,
    ]  # two scans, each with its own sidecar


def test_confounds_of_a_name_without_a_space(tmp_path):
    (tmp_path / "sub-1_task-rest_desc-confounds_timeseries.tsv").write_text("csf\nn/a\n2\n")
    name, found = formats.beside(tmp_path / "sub-1_task-rest_bold.nii.gz", *formats.CONFOUNDS)
    assert (name, found["csf"].iloc[1]) == ("sub-1_task-rest_desc-confounds_timeseries.tsv", 2)


@pytest.mark.parametrize("ending", ["_stat-mean_timeseries.tsv", "_timeseries.ptseries.nii"])
@pytest.mark.parametrize("gaps", [False, True])
def test_what_is_written_is_read_back(tmp_path, ending, gaps):
    values = altered(VALUES, OUT, np.nan) if gaps else VALUES
    scan = Scan("sub-01", values, 0.1 + 0.2, NAMES, "Test", censored=OUT if gaps else None)
    path = save_scan(scan, tmp_path / f"sub-01_atlas-Test{ending}")
    back = load_scan(path, interpolate=False)
    np.testing.assert_array_equal(back.values, values)
    assert (back.t_r, back.parcels, back.atlas) == (scan.t_r, NAMES, "Test")
    assert fingerprint([back]) == fingerprint([scan])
    np.testing.assert_equal(back.censored, scan.censored)
    with pytest.raises(DataError, match="must end in"):
        save_scan(Scan("sub-01", VALUES, 1.0, NAMES), tmp_path / "sub-01.nii")


@pytest.mark.skipif(
    shutil.which("wb_command") is None, reason="Connectome Workbench is not installed"
)
def test_workbench_opens_what_is_written(tmp_path):
    path = save_scan(Scan("sub-01", VALUES, 0.72, NAMES), tmp_path / "sub-01.ptseries.nii")
    shown = subprocess.run(
        ["wb_command", "-file-information", path], check=True, capture_output=True, text=True
    ).stdout
    assert "CIFTI - Parcel Series" in shown
    assert "Step:                 0.720" in shown
    assert all(name in shown for name in NAMES)
    text = tmp_path / "values.txt"
    subprocess.run(["wb_command", "-cifti-convert", "-to-text", path, text], check=True)
    np.testing.assert_allclose(np.loadtxt(text).T, VALUES, rtol=1e-5)
