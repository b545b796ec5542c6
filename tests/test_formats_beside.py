"""What stands beside a scan is read, or refused by name; and files that ask for more memory than a scan has."""

import io
import json
import struct
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.cifti2 import Cifti2Image, SeriesAxis
from scipy.io import savemat

from mnemodyn.data import formats
from mnemodyn.data.scans import DataError, Scan, load_scan

NAMES = ("a", "b", "c")
VALUES = np.random.default_rng(3).normal(100, 5, (30, 3)).astype("f4")
OUT = np.isin(np.arange(30), [4, 5, 20])
NAME = "sub-01_task-rest_run-1_space-fsLR_seg-X_stat-mean_timeseries"
RECORDING = "sub-01_task-rest_run-1"


def table(path, values=VALUES, names=NAMES):
    pd.DataFrame(values, columns=list(names)).to_csv(path, sep="\t", index=False)
    return path


def scan_of(folder, values=VALUES):
    return table(folder / f"{NAME}.tsv", values)


def state(path, **content):
    path.write_text(json.dumps(content))
    return path


def cifti(path, t_r):
    axes = (SeriesAxis(0, t_r, len(VALUES)), formats.parcels_axis(NAMES))
    Cifti2Image(VALUES, axes).to_filename(path)
    return path


def problem(path, match=None, **how):
    with pytest.raises(DataError, match=match) as caught:
        load_scan(path, **how)
    assert path.name in str(caught.value)
    return caught.value.problem


# Files that were not fetched

BESIDE = [
    f"{RECORDING}_outliers.tsv",
    f"{RECORDING}_desc-filtered_outliers.tsv",
    f"{RECORDING}_motion.tsv",
    f"{RECORDING}_desc-confounds_timeseries.tsv",
    f"{NAME}.json",
    "task-rest_bold.json",
    "sub-01_task-rest_bold.json",
    f"{RECORDING}_space-fsLR_den-91k_desc-denoised_bold.json",
]


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("how", ["link", "annex", "lfs"])
def test_what_was_not_fetched_is_never_none(tmp_path, name, how):
    scan = scan_of(tmp_path)
    beside = tmp_path / name
    if how == "link":
        beside.symlink_to("../.git/annex/objects/x/y/z")
    elif how == "annex":
        beside.write_text("/annex/objects/MD5E-s1--0.tsv\n")
    else:
        beside.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert problem(scan, rf"{name}.*(fetch|get)", t_r=2) == "not-fetched"
    # A time that is nearer needs nothing of what is inherited.
    if name.endswith("_bold.json"):
        state(tmp_path / f"{NAME}.json", RepetitionTime=2)
        assert load_scan(scan).t_r == 2


# Repetition times


def test_one_second_in_a_header_gives_way(tmp_path):
    path = cifti(tmp_path / f"{NAME}.ptseries.nii", 1.0)
    assert (load_scan(path).t_r, load_scan(path).t_r_source) == (1.0, "header")
    scan = load_scan(path, t_r=2)
    assert (scan.t_r, scan.t_r_source) == (2, "setting")
    image = state(tmp_path / f"{RECORDING}_desc-denoised_bold.json", RepetitionTime=2.2)
    assert (load_scan(path).t_r, load_scan(path).t_r_source) == (2.2, "sidecar")
    image.unlink()
    state(tmp_path / "task-rest_bold.json", RepetitionTime=2)
    assert load_scan(path).t_r == 2
    state(tmp_path / f"{NAME}.json", RepetitionTime=0.8)
    assert load_scan(path).t_r == 0.8
    # Two times that somebody stated differ: a setting can only say which is right.
    assert problem(path, "'sidecar': 0.8, 'setting': 2.*--override-t-r", t_r=2) == "t-r-conflict"
    cifti(path, 0.72)
    assert problem(path, "'header': 0.72.*'sidecar': 0.8.*--t-r") == "t-r-conflict"
    assert load_scan(path, t_r=0.8).t_r == 0.8
    assert load_scan(path, t_r=0.72).t_r == 0.72
    assert problem(path, t_r=2) == "t-r-conflict"


def test_times_as_xcpd_states_them(tmp_path):
    folder = tmp_path / "sub-01" / "func"
    folder.mkdir(parents=True)
    scan = scan_of(folder)
    state(scan.with_suffix(".json"), SamplingFrequency="TR", SoftwareFilters={})
    assert problem(scan) == "no-t-r"
    denoised = "space-fsLR_den-91k_desc-denoised_bold.json"
    state(folder / f"sub-01_task-rest_run-2_{denoised}", RepetitionTime=9)
    state(folder / f"sub-01_task-nback_run-1_{denoised}", RepetitionTime=9)
    assert problem(scan) == "no-t-r"
    state(folder / f"{RECORDING}_{denoised}", RepetitionTime=0.8)
    smoothed = denoised.replace("denoised", "denoisedSmoothed")
    state(folder / f"{RECORDING}_{smoothed}", RepetitionTime=0.8)
    assert (load_scan(scan).t_r, load_scan(scan).t_r_source) == (0.8, "sidecar")
    # Runs that were put together have no sidecar of their own.
    together = table(folder / "sub-01_task-rest_space-fsLR_seg-X_stat-mean_timeseries.tsv")
    assert problem(together, "disagree") == "t-r-conflict"
    state(folder / f"sub-01_task-rest_run-2_{denoised}", RepetitionTime=0.8)
    assert load_scan(together).t_r == 0.8


@pytest.mark.parametrize(
    "content",
    [
        '{"RepetitionTime": "2"}',
        '{"RepetitionTime": [2]}',
        '{"RepetitionTime": true}',
        '{"RepetitionTime": 1e400}',
        '{"RepetitionTime": NaN}',
        '{"RepetitionTime": 1' + "0" * 400 + "}",
        '{"RepetitionTime": 1' + "0" * 5000 + "}",
        "[" * 100_000,
        "[2]",
        "",
        "\udcff",
        '{"Sources": ["a\\u0000b", "", "..", "x/", {"a": 1}, 3, null, "' + "x" * 5000 + '"]}',
        '{"Sources": {"a": 1}}',
        '{"SamplingFrequency": -1}',
    ],
)
def test_sidecars_of_any_content(tmp_path, content):
    scan = scan_of(tmp_path)
    scan.with_suffix(".json").write_bytes(content.encode(errors="surrogateescape"))
    assert problem(scan) in ("sidecar", "no-t-r")


# Tables of outliers


def outliers(folder, text):
    (folder / f"{RECORDING}_outliers.tsv").write_text(text)


def lines(marks, header="framewise_displacement"):
    return "\n".join([header, *(str(int(mark)) for mark in marks)]) + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (lines(OUT).partition("\n")[2], "header"),
        (lines(OUT).partition("\n")[2].replace("0", "n/a", 1), "header"),
        (lines(OUT, "outlier"), "censoring"),
        (lines(OUT).replace("1", "n/a"), "censoring"),
        (lines(OUT).replace("0", "0.13"), "censoring"),
        (lines(OUT).replace("1", "2"), "censoring"),
        (lines(OUT[:-1]), "censoring"),
        (lines(np.append(OUT, 0)), "censoring"),
        ("framewise_displacement\n", "censoring"),
        ("", "truncated"),
        ("\0\0\0", "censoring"),
    ],
)
def test_outliers_that_mark_nothing_for_certain(tmp_path, text, expected):
    scan = scan_of(tmp_path)
    outliers(tmp_path, lines(OUT))
    np.testing.assert_array_equal(load_scan(scan, t_r=2).censored, OUT)
    outliers(tmp_path, text)
    assert problem(scan, f"{RECORDING}_outliers.tsv|table of outliers", t_r=2) == expected


def test_frames_that_were_removed_before_the_signal_was_steady(tmp_path):
    # fMRIPrep's tables have the rows of all frames, and it cuts none itself.
    confounds = pd.DataFrame({"non_steady_state_outlier00": np.eye(30)[0]})
    confounds["non_steady_state_outlier01"] = np.eye(30)[1]
    for i in np.flatnonzero(OUT):
        confounds[f"motion_outlier{i:02}"] = np.eye(30)[i]
    confounds.to_csv(tmp_path / f"{RECORDING}_desc-confounds_timeseries.tsv", sep="\t", index=False)
    expected = OUT | (np.arange(30) < 2)
    for n_cut in (0, 1, 2):
        scan = load_scan(scan_of(tmp_path, VALUES[n_cut:]), t_r=2, interpolate=False)
        np.testing.assert_array_equal(scan.censored, expected)
        np.testing.assert_array_equal(scan.values[n_cut:], VALUES[n_cut:])
        assert np.isnan(scan.values[:n_cut]).all()
    # As many frames are gone as are marked, or any other number: nobody says which.
    for n_cut in (expected.sum(), 7):
        assert problem(scan_of(tmp_path, VALUES[n_cut:]), "rows", t_r=2) == "censoring"


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_run-1_task-rest_outliers.tsv",
        "run-1_sub-01_task-rest_outliers.tsv",
        "sub-01_task-rest_run-01_outliers.tsv",
        "sub-01_task-rest_run-001_desc-filtered_outliers.tsv",
        "desc-filtered_sub-01_task-rest_run-1_outliers.tsv",
        f"{RECORDING}_space-fsLR_outliers.tsv",
        f"{RECORDING}_outliers.csv",
        f"{RECORDING}_outliers.TSV",
        f"{RECORDING}_outliers.tsv.gz",
        "sub-01_run-01_task-rest_desc-filtered_outliers.csv.gz",
        "desc-confounds_sub-01_task-rest_run-01_timeseries.tsv.gz",
    ],
)
def test_tables_are_found_by_their_entities(tmp_path, name):
    scan = scan_of(tmp_path)
    separator = "," if ".csv" in name else "\t"
    marks = pd.DataFrame({"framewise_displacement": OUT.astype(int), "motion_outlier00": OUT * 1})
    marks.to_csv(tmp_path / name, sep=separator, index=False)
    np.testing.assert_array_equal(load_scan(scan, t_r=2).censored, OUT)
    # Of another person, task or run.
    for other in ("sub-02_task-rest_run-1", "sub-01_task-nback_run-1", "sub-01_task-rest_run-2"):
        path = table(tmp_path / f"{other}_{NAME.removeprefix(RECORDING + '_')}.tsv")
        assert load_scan(path, t_r=2).censored is None
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nothing")
    assert problem(scan, "fetch", t_r=2) == "not-fetched"


@pytest.mark.parametrize(
    "names",
    [
        ["sub-01_task-rest_outliers.tsv"],
        ["sub-01_run-1_outliers.csv"],
        ["sub-01_ses-1_task-rest_run-1_outliers.tsv"],
        ["sub-01_task-rest_run-1_dir-AP_motion.tsv"],
        ["sub-01_task-rest_desc-confounds_timeseries.tsv"],
        [f"{RECORDING}_desc-mine_outliers.tsv"],
        [f"{RECORDING}_outliers.csv", f"{RECORDING}_outliers.tsv.gz"],
        ["sub-01_run-1_task-rest_outliers.tsv", "sub-01_task-rest_run-01_outliers.tsv"],
    ],
)
def test_tables_that_may_be_anothers_are_named(tmp_path, names):
    scan = scan_of(tmp_path)
    for name in names:
        (tmp_path / name).write_text(lines(OUT))
    match = rf"is {min(names)} of this scan, whose tables begin with {RECORDING}_\? Rename it"
    assert problem(scan, match, t_r=2) == "beside"
    outliers(tmp_path, lines(OUT))
    if "outliers" in names[0]:
        np.testing.assert_array_equal(load_scan(scan, t_r=2).censored, OUT)


def test_a_header_is_compared_with_every_sidecar(tmp_path):
    path = cifti(tmp_path / f"{NAME}.ptseries.nii", 3.0)
    for name in ("task-rest_bold.json", "run-01_task-rest_sub-01_bold.json"):
        state(tmp_path / name, RepetitionTime=2)
        assert problem(path, "'header': 3.0, 'sidecar': 2.*--t-r") == "t-r-conflict"
        assert load_scan(path, t_r=2).t_r == 2
        state(tmp_path / name, RepetitionTime=3.0002)
        assert load_scan(path).t_r_source == "header"
        (tmp_path / name).unlink()


def test_names_that_are_there_twice(tmp_path):
    scan = table(tmp_path / f"{NAME}.tsv", names=("a", "b", "a"))
    assert problem(scan, "'a' is there 2 times", t_r=2) == "header"
    frame = pd.DataFrame(VALUES, columns=["a", "b", "a"])
    with pytest.raises(DataError, match="'a' is there 2 times"):
        load_scan(frame, t_r=2, participant_id="sub-01")
    with pytest.raises(DataError, match="'a' is there 2 times"):
        formats.write(tmp_path / "x.tsv", VALUES, ("a", "b", "a"), 2.0)
    scan_of(tmp_path)
    scan.with_suffix(".json").write_text('{"RepetitionTime": 2, "RepetitionTime": 3}')
    assert problem(scan, "'RepetitionTime' is there 2 times") == "sidecar"


# Files that ask for more memory than a scan has


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def test_files_that_grow_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.check_size, "__defaults__", (2**20,))
    huge = b"{'descr':'<f4','fortran_order':False,'shape':(1000000000,100000)}".ljust(117) + b"\n"
    huge = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(huge)) + huge + b"\0" * 100
    many = tmp_path / "sub-01.npz"
    with zipfile.ZipFile(many, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(40):
            archive.writestr(f"a{i}.npy", npy(np.zeros((100, 90))))
    assert many.stat().st_size < 2**16
    assert problem(many, r"key.*a0 \(100, 90\), a1", t_r=2, frames_first=True) == "key"
    values = load_scan(
        many, t_r=2, frames_first=True, key="a7", max_constant_parcels=100, interpolate=False
    ).values
    assert values.shape == (100, 90)
    for content in (huge, b"\0" * 2**22):
        with zipfile.ZipFile(tmp_path / "sub-02.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.npy", content)
        expected = ("too-large", "truncated", "key")
        assert problem(tmp_path / "sub-02.npz", t_r=2, frames_first=True) in expected
    (tmp_path / "sub-03.npy").write_bytes(huge)
    assert problem(tmp_path / "sub-03.npy", t_r=2, frames_first=True) == "truncated"
    np.save(tmp_path / "sub-04.npy", np.zeros((2**10, 2**9)))
    assert problem(tmp_path / "sub-04.npy", t_r=2, frames_first=True) == "too-large"
    savemat(tmp_path / "sub-05.mat", {"a": np.zeros((2**10, 2**9))}, do_compression=True)
    assert (tmp_path / "sub-05.mat").stat().st_size < 2**16
    assert problem(tmp_path / "sub-05.mat", t_r=2, frames_first=True) == "too-large"
    text = tmp_path / "sub-06_timeseries.tsv"
    with open(text, "wb") as stream:
        stream.truncate(2**40)
    assert problem(text, t_r=2) == "too-large"
    text.unlink()
    text.symlink_to("/dev/zero")
    assert problem(text, t_r=2) == "no-file"


def damaged(draw_bytes, whole):
    """Any bytes in the place of some of a file."""
    at, new = draw_bytes
    start = int(at * len(whole))
    return whole[:start] + new + whole[start + len(new) :]


WHOLE = {
    ".npz": None,
    ".mat": None,
    ".npy": None,
    "_timeseries.tsv": None,
    "_timeseries.ptseries.nii": None,
}


@pytest.mark.parametrize("ending", WHOLE)
def test_files_of_changed_bytes_are_scans_or_named_problems(tmp_path, ending):
    path = tmp_path / f"sub-01{ending}"
    if ending == ".npz":
        np.savez_compressed(path, a=VALUES, note="text")
    elif ending == ".mat":
        savemat(path, {"a": VALUES, "note": "text"}, do_compression=True)
    elif ending == ".npy":
        np.save(path, VALUES)
    elif ending.endswith(".tsv"):
        table(path)
    else:
        cifti(path, 0.72)
    whole = path.read_bytes()
    change = st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12))

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(change)
    def examine(draw_bytes):
        path.write_bytes(damaged(draw_bytes, whole))
        try:
            found = load_scan(
                path, t_r=0.72, frames_first=None if "time" in ending else True, override_t_r=True
            )
            assert isinstance(found, Scan)
        except DataError as error:
            if error.problem == "unusable" or path.name not in str(error):
                raise

    examine()
