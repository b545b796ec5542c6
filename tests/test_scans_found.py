"""What a real folder holds beside the scans, and who they are of: the same for every command."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from nibabel.cifti2 import Cifti2Image, LabelAxis, ScalarAxis

from mnemodyn.cli import main, say_left_out
from mnemodyn.data import formats
from mnemodyn.data.cohorts import index
from mnemodyn.data.collection import open_scans
from mnemodyn.data.scans import DataError, Scan, find_scans, load_scan, save_scan

NAMES = tuple(f"{side}_{i}" for side in "LR" for i in range(1, 4))


def series(seed, n=40):
    return np.random.default_rng(seed).normal(1000, 10, (n, len(NAMES))).round(4)


def table(path, values, names=NAMES, t_r=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    separator = "," if path.suffix == ".csv" else "\t"
    pd.DataFrame(values, columns=list(names)).to_csv(path, sep=separator, index=False)
    if t_r:
        path.with_suffix(".json").write_text(json.dumps({"RepetitionTime": t_r}))
    return path


def rest(folder, who, seed, ending="_task-rest_seg-X_timeseries.tsv", **how):
    return table(folder / f"sub-{who}" / "func" / f"sub-{who}{ending}", series(seed), **how)


def problem(path, **settings):
    with pytest.raises(DataError) as caught:
        load_scan(path, **settings)
    assert path.name.split("_")[0].split(".")[0] in str(caught.value)
    return caught.value.problem


def people(found):
    return [scan.participant_id for scan in found]


# Finding


def test_links_are_followed_once_and_loops_end(tmp_path):
    real, view = tmp_path / "real", tmp_path / "view"
    view.mkdir()
    for i in range(1, 4):
        rest(real, f"0{i}", i)
    (view / "sub-01").symlink_to(real / "sub-01")
    (view / "sub-02").symlink_to("../real/sub-02")
    shutil.move(real / "sub-03", view / "sub-03")
    (view / "again").symlink_to(view / "sub-03")  # what is there itself comes first
    (view / "sub-03" / "latest").symlink_to(".")
    (view / "sub-03" / "raw").symlink_to("../..")
    (view / "a_task-rest_seg-X_timeseries.tsv").symlink_to("a_task-rest_seg-X_timeseries.tsv")
    for found in (open_scans(view), index("bids", view)):
        assert people(found) == ["sub-01", "sub-02", "sub-03"]
    assert [path.parent.name for path in find_scans(view).files] == ["func"] * 3
    assert open_scans(view).excluded["problem"].tolist() == ["not-fetched"]


def test_links_to_nothing_are_named_and_stop_nothing(tmp_path, capsys):
    for i in range(1, 4):
        rest(tmp_path, f"0{i}", i)
    broken = tmp_path / "sub-04" / "func" / "sub-04_task-rest_seg-X_timeseries.tsv"
    broken.parent.mkdir(parents=True)
    broken.symlink_to("../../.git/annex/objects/x/y/z")
    (tmp_path / "sub-05").symlink_to("elsewhere")
    pointer = rest(tmp_path, "06", 6)
    pointer.write_text("/annex/objects/MD5E-s12--0.tsv\n")
    lfs = rest(tmp_path, "07", 7)
    lfs.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    os.mkfifo(tmp_path / "sub-08_timeseries.tsv")
    (tmp_path / os.fsdecode(b"sub-09_\xff_timeseries.tsv")).touch()
    plain = open_scans(tmp_path)
    assert people(plain) == ["sub-01", "sub-02", "sub-03"]
    expected = {
        "04": "not-fetched",
        "05": "unreadable",
        "06": "not-fetched",
        "07": "not-fetched",
        "08": "no-file",
        "09": "unreadable",
    }
    for excluded in (plain.excluded, index("bids", tmp_path).excluded):
        whole = excluded[excluded["problem"] != "no-phenotype"]
        named = {
            file.split("sub-")[1][:2]: name for file, name in whole[["file", "problem"]].to_numpy()
        }
        assert named == expected
    assert main(["index", "bids", str(tmp_path)]) == 0
    assert "not-fetched (3)" in capsys.readouterr().out
    say_left_out(plain)
    assert "left out 3, not-fetched: sub-04_task-rest" in capsys.readouterr().err
    with pytest.raises(DataError, match="a link to nothing; fetch") as caught:
        load_scan(broken)
    assert caught.value.problem == "not-fetched"
    for path in (tmp_path / "sub-01", tmp_path / "sub-02", tmp_path / "sub-03"):
        shutil.rmtree(path)
    with pytest.raises(DataError, match="no file ending in.*a link to nothing"):
        open_scans(tmp_path)


CLOSED = """
import sys
from mnemodyn.data.cohorts import index
from mnemodyn.data.collection import open_scans
for found in (open_scans(sys.argv[1]), index("bids", sys.argv[1])):
    whole = found.excluded[found.excluded["problem"] != "no-phenotype"]
    print(found.table["participant_id"].tolist(), whole["problem"].tolist(), *whole["file"])
"""


@pytest.mark.parametrize("mode", [0, 0o400])
def test_folders_that_cannot_be_read_are_named(tmp_path, mode):
    drop = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("everything can be read")
        rights = "-dac_override,-dac_read_search"
        drop = ["setpriv", "--bounding-set", rights, "--inh-caps", rights]
    for i in range(1, 4):
        rest(tmp_path, f"0{i}", i)
    rest(tmp_path, "04", 4).chmod(0)
    (tmp_path / "sub-02").chmod(mode)
    command = [*drop, sys.executable, "-c", CLOSED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (tmp_path / "sub-02").chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith("['sub-01', 'sub-03'] ['unreadable', 'unreadable'] ")
        assert re.search(r"sub-02 \S*sub-04_task-rest_seg-X_timeseries\.tsv$", line)


def test_what_is_hidden_is_left_out(tmp_path):
    folder = tmp_path / ".cache" / "study"  # the folder that is named may lie anywhere
    for i in (1, 2):
        table(folder / f"sub-0{i}.csv", series(i))
    for place in (
        ".ipynb_checkpoints/sub-01-checkpoint.csv",
        "sub-02-checkpoint.csv",
        ".snapshot/daily.0/sub-01.csv",
        ".Trash-1000/files/sub-02.csv",
        "$RECYCLE.BIN/sub-03.csv",
        "@eaDir/sub-03.csv",
        "__MACOSX/sub-03.csv",
        "._sub-01.csv",
    ):
        table(folder / place, series(9))
    assert people(open_scans(folder)) == ["sub-01", "sub-02"]


NO_SCANS = [
    "sub-01_task-rest_desc-confounds_timeseries.tsv",
    "sub-01_task-rest_desc-confoundsXcpd_timeseries.tsv",
    "sub-01_task-rest_desc-confounds_regressors.tsv",
    "sub-01_confounds.csv",
    "sub-01_task-rest_motion_parameters.1D",
    "sub-01_movement_regressors.csv",
    "sub-01_task-rest_outliers.csv",
    "sub-01_fc.csv",
    "sub-01_FC.npy",
    "sub-01_task-rest_seg-X_stat-pearsoncorrelation_relmat.csv",
    "sub-01_task-rest_measure-pearsoncorrelation_conmat.csv",
    "sub-01_task-rest_meas-PearsonCorrelation_timeseries.tsv",
    "sub-01_correlation_matrix.npy",
    "sub-01_connectivity.mat",
    "sub-01_atlas-X_dseg.csv",
    "sub-01_labels.csv",
    "sub-01_task-rest_stat-coverage_timeseries.tsv",
    "sub-01_design.csv",
    "sub-01_X.xmat.1D",
    "dfile_rall.1D",
    "ROICorrelation_FisherZ_sub-01.mat",
    "outcount_rall.1D",
    "participants_sub-01_phenotypes.csv",
]


def test_names_of_what_is_no_scan(tmp_path):
    for name in NO_SCANS:
        (tmp_path / name).write_text("a\tb\n")
    with pytest.raises(DataError, match="no file ending in"):
        find_scans(tmp_path)
    kept = [
        "NYU_0050952_rois_cc200.1D",
        "ROISignals_sub-01.mat",
        "rfMRI_REST1_LR_Atlas_MSMAll_hp2000_clean.ptseries.nii",
        "sub-01_censored_timeseries.tsv",
        "sub-01_motion_corrected_stat-mean.csv",
        "sub-01_task-motor_stat-median_timeseries.tsv",
        "sub-01_ts.csv",
        "sub-02_task-rest_space-fsLR_atlas-4S456Parcels_stat-mean_timeseries.tsv",
    ]
    for name in kept:
        (tmp_path / name).touch()
    assert [path.name for path in find_scans(tmp_path).files] == kept


def test_confounds_do_not_hide_the_scans_of_a_cohort(tmp_path):
    for i in (1, 2):
        folder = tmp_path / f"sub-0{i}" / "func"
        scan = Scan(f"sub-0{i}", series(i).astype("f4"), 2.0, NAMES)
        save_scan(scan, folder / f"sub-0{i}_task-rest_seg-X_timeseries.ptseries.nii")
        names = ["csf", "white_matter", "trans_x", "rot_x"]
        confounds = folder / f"sub-0{i}_task-rest_desc-confounds_timeseries.tsv"
        table(confounds, np.random.default_rng(i).normal(size=(40, 4)), names, t_r=None)
    rest(tmp_path, "03", 3)  # in the other format only
    found = index("bids", tmp_path)
    assert found.table["path"].str.endswith("seg-X_timeseries.tsv").tolist() == [True]
    left_out = found.excluded[found.excluded["problem"] == "other-pattern"]
    assert left_out["file"].str.contains("ptseries").tolist() == [True, True]
    assert people(open_scans(tmp_path)) == ["sub-01", "sub-02", "sub-03"]


def test_runs_are_not_counted_twice(tmp_path):
    for who in ("01", "02"):
        runs = [series(int(who) * 10 + i) for i in range(2)]
        stem = tmp_path / f"sub-{who}" / "func" / f"sub-{who}_task-rest"
        for i, values in enumerate(runs, 1):
            table(stem.with_name(f"{stem.name}_dir-AP_run-{i}_seg-X_timeseries.tsv"), values)
        table(stem.with_name(f"{stem.name}_seg-X_timeseries.tsv"), np.vstack(runs))
    for run in ("_run-1", "_run-2", ""):
        name = f"_task-nback_dir-AP{run}_seg-X_timeseries.tsv"
        rest(tmp_path, "04", 50 + len(run) + int(run[-1:] or 0), name)
    # One run with a number and one without are two runs.
    rest(tmp_path, "03", 3)
    rest(tmp_path, "03", 4, "_task-rest_run-2_seg-X_timeseries.tsv")
    for found in (open_scans(tmp_path), index("bids", tmp_path)):
        assert [scan.n_frames for scan in found] == [40] * 8
        assert (found.excluded["problem"] == "concatenation").sum() == 3
    hcp = tmp_path / "hcp" / "100307" / "MNINonLinear" / "Results"
    for i, run in enumerate(("REST1_LR", "REST1_RL", "REST")):
        scan = Scan("sub-100307", series(i).astype("f4"), 0.72, NAMES)
        save_scan(scan, hcp / f"rfMRI_{run}" / f"rfMRI_{run}_Atlas_clean.ptseries.nii")
    found = open_scans(tmp_path / "hcp")
    assert people(found) == ["sub-100307"] * 2
    assert found.excluded["problem"].tolist() == ["concatenation"]


@pytest.mark.parametrize(
    ("whole", "runs"),
    [
        # Without a number, beside runs in sessions.
        (
            "sub-01_task-rest",
            ["ses-1/sub-01_ses-1_task-rest_run-1", "ses-1/sub-01_ses-1_task-rest_run-2"],
        ),
        (
            "func/sub-01_task-rest",
            ["ses-1/func/sub-01_ses-1_task-rest_run-1", "ses-2/func/sub-01_ses-2_task-rest_run-1"],
        ),
        (
            "sub-01_task-rest",
            ["ses-1/func/sub-01_ses-1_task-rest", "ses-2/func/sub-01_ses-2_task-rest"],
        ),
        (
            "sub-01_task-rest",
            ["sub-01_ses-1_task-rest_dir-AP_run-1", "sub-01_ses-2_task-rest_dir-PA_run-1"],
        ),
        (
            "ses-1/func/sub-01_ses-1_task-rest",
            ["ses-1/func/sub-01_ses-1_task-rest_run-1", "ses-1/func/sub-01_ses-1_task-rest_run-2"],
        ),
        ("sub-01_task-rest", ["sub-01_task-rest1_dir-AP", "sub-01_task-rest2_dir-AP"]),
        # A name that says so.
        ("sub-01_task-rest_desc-concat", ["sub-01_task-rest_run-1", "sub-01_task-rest_run-2"]),
        ("sub-01_task-rest_desc-concatenated", ["sub-01_task-rest_run-1_desc-denoised"]),
        ("sub-01_task-rest_run-all", ["sub-01_task-rest_run-1", "sub-01_task-rest_run-2"]),
        ("sub-01_task-rest_run-concat_desc-denoised", ["sub-01_task-rest_run-1_desc-denoised"]),
        ("sub-01_task-rest_run-1to2", ["sub-01_task-rest_run-1", "sub-01_task-rest_run-2"]),
        (
            "sub-01_task-rest_concat",
            ["sub-01_task-rest_dir-AP_run-1", "sub-01_task-rest_dir-PA_run-1"],
        ),
        (
            "ses-all/func/sub-01_ses-all_task-rest",
            ["ses-1/func/sub-01_ses-1_task-rest", "ses-2/func/sub-01_ses-2_task-rest"],
        ),
    ],
)
def test_whatever_was_put_together_is_left_out(tmp_path, whole, runs):
    for i, name in enumerate([whole, *runs]):
        table(tmp_path / "all_runs" / "sub-01" / f"{name}_seg-X_timeseries.tsv", series(i))
    found = open_scans(tmp_path)
    assert len(found) == len(runs)
    assert found.excluded["problem"].tolist() == ["concatenation"]
    assert Path(found.excluded["file"][0]).name == f"{Path(whole).name}_seg-X_timeseries.tsv"


def test_what_only_looks_like_put_together_is_read(tmp_path):
    names = [
        "sub-01_task-rest_run-all_seg-X",  # no runs beside it
        "sub-02_task-rest_seg-X",
        "sub-02_task-rest_run-2_seg-X",
        "sub-03_ses-1_task-rest_run-1_seg-X",
        "sub-03_task-rest_seg-X",
        "sub-04_task-all_seg-X",
        "sub-04_task-rest_run-1_seg-X",
        "sub-05_task-rest_desc-concat_seg-X",
        "sub-05_task-rest_run-1_seg-Y",
    ]
    for i, name in enumerate(names):
        table(tmp_path / f"{name}_timeseries.tsv", series(i))
    assert len(open_scans(tmp_path)) == len(names)


def test_a_link_to_a_hidden_folder_is_not_followed(tmp_path):
    folder = tmp_path / "study"
    rest(folder, "01", 1)
    for place in (folder / ".old", folder / ".snapshot" / "daily", tmp_path / ".trash"):
        rest(place, "02", 2)
        (folder / f"link_{place.name.strip('.')}").symlink_to(place)
    rest(tmp_path / "elsewhere", "03", 3)
    (folder / "sub-03").symlink_to(tmp_path / "elsewhere" / "sub-03")
    (folder / "again").symlink_to(folder)
    found = open_scans(folder)
    assert people(found) == ["sub-01", "sub-03"]
    assert (
        found.excluded["message"].str.endswith("a link to a hidden folder").tolist() == [True] * 3
    )
    # The folder that is named may be hidden, or such a link.
    assert people(open_scans(folder / ".old")) == ["sub-02"]
    assert people(open_scans(folder / "link_daily")) == ["sub-02"]


def test_copies_of_ones_own_scan_are_left_out(tmp_path):
    table(tmp_path / "sub-01_task-rest_timeseries.tsv", series(1))
    table(tmp_path / "old" / "sub-01_task-rest_timeseries.tsv", series(1))
    table(tmp_path / "sub-02_task-rest_timeseries.tsv", series(2))
    found = open_scans(tmp_path)
    assert people(found) == ["sub-01", "sub-02"]
    assert found.excluded["problem"].tolist() == ["duplicate-series"]


# What a table holds


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("Unnamed: 0", np.arange(40)),
        ("Unnamed: 0.1", np.arange(1, 41)),
        ("", np.arange(40)),
        ("", np.arange(1, 41)),
        ("index", np.arange(40) * 2),
        ("frame", np.delete(np.arange(41), 7)),
        ("Time", np.arange(40) * 0.72),
        ("time (s)", 12.5 + np.arange(40) * 2),
        ("time_index", np.arange(40)),
        ("volume", np.arange(40)),
        ("TR", np.arange(40)),
        ("scan number", np.arange(1, 41)),
    ],
)
@pytest.mark.parametrize("ending", [".csv", "_timeseries.tsv"])
def test_columns_that_count_frames_are_no_parcels(tmp_path, name, column, ending):
    values = np.column_stack([column, series(1)])
    scan = load_scan(table(tmp_path / f"sub-01{ending}", values, (name, *NAMES)))
    assert scan.parcels == NAMES
    np.testing.assert_array_equal(scan.values, series(1).astype("f4"))
    in_memory = pd.DataFrame(values, columns=[name, *NAMES])
    assert load_scan(in_memory, t_r=2, participant_id="sub-1").parcels == NAMES


def test_index_columns_anywhere_and_of_no_order(tmp_path):
    values = np.column_stack([np.arange(40), series(1), np.arange(40) * 2.0])
    path = table(tmp_path / "sub-01.csv", values, ("", *NAMES, "time"))
    assert load_scan(path).parcels == NAMES
    np.savetxt(path, values[:, :-1], delimiter=",")
    assert load_scan(path, frames_first=True).values.shape == (40, 6)
    np.save(tmp_path / "sub-02.npy", values[:, :-1].T)
    assert load_scan(tmp_path / "sub-02.npy", t_r=2, frames_first=False).values.shape == (40, 6)
    values[3, -1] = 0
    assert problem(table(path, values, ("", *NAMES, "time"))) == "header"
    values[:, -1] = 7
    names = ("", *NAMES, "subject")
    assert problem(table(path, values, names), max_constant_parcels=9) == "header"
    names = ("framewise_displacement", "csf", "x", "y", "z", "rot_x")
    assert problem(table(path, series(1), names)) == "not-a-series"
    assert problem(table(path, series(1)[:, :2], ("csf", "white_matter"))) == "not-a-series"
    assert load_scan(table(path, series(1), ("CSF", *NAMES[1:]))).parcels[0] == "CSF"


def test_a_first_frame_is_not_eaten_as_a_header(tmp_path):
    path = tmp_path / "sub-01_timeseries.tsv"
    whole = series(9).astype(int)
    np.savetxt(path, whole, delimiter="\t", fmt="%d")
    assert problem(path, t_r=2) == "header"
    whole[0] = 0
    np.savetxt(path, np.vstack([whole[:1], series(1)]), delimiter="\t", fmt="%.7g")
    assert problem(path, t_r=2) == "header"
    path.write_text("n/a\t1.5\t2.5\n" + "1.5\t2.5\t3.5\n" * 9)
    assert problem(path, t_r=2) == "orientation"
    for names in (range(1, 7), range(6), (1001, 1002, 1035, 2001, 2002, 2035)):
        assert load_scan(table(path, series(1), tuple(map(str, names)))).n_frames == 40


def test_matrices_are_no_series(tmp_path):
    values = series(1)
    correlations = np.corrcoef(values.T)
    z = np.arctanh(correlations - np.eye(6)) + np.diag([np.inf] * 6)
    for matrix in (
        correlations,
        z,
        np.where(np.isinf(z), 0, z),
        np.where(np.isinf(z), np.nan, z),
        np.triu(correlations),
        np.cov(values.T).round(5),
        np.linalg.inv(np.cov(values.T)),
    ):
        assert problem(table(tmp_path / "sub-01.csv", matrix)) == "not-a-series"
        rows = np.column_stack([np.arange(6), matrix])
        assert problem(table(tmp_path / "sub-01.csv", rows, ("", *NAMES))) == "not-a-series"
        np.save(tmp_path / "sub-01.npy", matrix)
        assert problem(tmp_path / "sub-01.npy", t_r=2, frames_first=True) == "not-a-series"
        stacked = np.vstack([matrix, matrix * 0.9, np.roll(matrix, 1, (0, 1))])
        assert problem(table(tmp_path / "sub-01.csv", stacked)) == "not-a-series"
        for stack in (stacked, stacked.T):
            np.save(tmp_path / "sub-01.npy", stack)
            assert problem(tmp_path / "sub-01.npy", t_r=2, frames_first=True) == "not-a-series"
    noise = np.random.default_rng(5).normal(size=(6, 6))
    for almost in (
        correlations + 1e-3 * noise,
        correlations.astype(np.float16) * (1 + 1e-3 * noise),
        np.where(noise > 0, np.cov(values.T).round(1), np.cov(values.T)),
    ):
        for matrix in (almost, np.vstack([almost, correlations])):
            assert problem(table(tmp_path / "sub-01.csv", matrix)) == "not-a-series"
    for n in (6, 12, 36):  # square, and a multiple
        assert load_scan(table(tmp_path / "sub-01.csv", series(1, n))).n_frames == n
    mixed = np.vstack([correlations, series(1, 6)])
    assert load_scan(table(tmp_path / "sub-01.csv", mixed)).n_frames == 12
    for shape in ((0, 3), (3, 0), (1, 3)):
        np.save(tmp_path / "sub-01.npy", np.ones(shape))
        assert problem(tmp_path / "sub-01.npy", t_r=2, frames_first=True)


def test_maps_are_no_series(tmp_path):
    parcels = formats.parcels_axis(NAMES)
    values = series(1, 3).astype("f4")
    labels = LabelAxis(["a", "b", "c"], [{0: ("?", (0, 0, 0, 0))}] * 3)
    for name, rows in (
        ("sub-01.pscalar.nii", ScalarAxis(["a", "b", "c"])),
        ("sub-01.plabel.nii", labels),
        ("sub-01_timeseries.ptseries.nii", ScalarAxis(["a", "b", "c"])),
    ):
        Cifti2Image(values, (rows, parcels)).to_filename(tmp_path / name)
        assert problem(tmp_path / name, t_r=2) == "not-a-series"


# Who a scan is of


@pytest.mark.parametrize(
    ("path", "who"),
    [
        ("sub-01_task-rest_timeseries.tsv", "sub-01"),
        ("sub-01.csv", "sub-01"),
        ("sub-01/ses-2/rest.ptseries.nii", "sub-01"),
        ("sub-01_ses-2/rest.ptseries.nii", "sub-01"),
        ("100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.ptseries.nii", "sub-100307"),
        ("HCA6002236_V1_MR/MNINonLinear/Results/x/y.ptseries.nii", "sub-HCA6002236"),
        ("sub-NYU_00501_timeseries.tsv", "sub-NYU_00501"),
        ("sub-NYU_00501_ses-1_task-rest_timeseries.tsv", "sub-NYU_00501"),
        ("sub-NDAR_INV00BD7VDC_task-rest_timeseries.tsv", "sub-NDAR_INV00BD7VDC"),
        ("sub-002_S_0413_ses-M00_timeseries.tsv", "sub-002_S_0413"),
        ("sub-A-01_task-rest_timeseries.tsv", "sub-A-01"),
        ("sub-A-01/rest.ptseries.nii", "sub-A-01"),
        ("sub-01_hp2000_clean_timeseries.tsv", "sub-01"),
        ("sub-01_rest_timeseries.tsv", "sub-01"),
        ("sub-projects/study/rest.ptseries.nii", ""),
        ("study/rest.ptseries.nii", ""),
        ("sub-anna/sub-anna.csv", "sub-anna"),
    ],
)
def test_who_a_scan_is_of(tmp_path, monkeypatch, path, who):
    monkeypatch.chdir(tmp_path)
    path = tmp_path.__class__(path)
    assert formats.participant(path) == who
    if path.name.startswith("sub-"):
        assert formats.recording(path.name).startswith(who)


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_02_timeseries.tsv",
        "sub-01-1_timeseries.tsv",
        "sub-A-B-1_timeseries.tsv",
        "sub-01.1_timeseries.tsv",
        "sub-José_timeseries.tsv",
        "sub-01 (1).csv",
        "sub-con_s01_timeseries.tsv",
        "sub-Smith_John_timeseries.tsv",
        "sub-UM_1_0050272_timeseries.tsv",
    ],
)
def test_identifiers_are_refused_and_never_cut(tmp_path, name):
    path = table(tmp_path / name, series(1))
    with pytest.raises(DataError, match=r"not clear where the participant.*rename it") as caught:
        load_scan(path)
    assert caught.value.problem == "participant"
    assert load_scan(path, participant_id="sub-1").participant_id == "sub-1"
    table(tmp_path / "sub-9_timeseries.tsv", series(2))
    found = index("bids", tmp_path)
    assert people(found) == ["sub-9"]
    if name.endswith("_timeseries.tsv") and name[4:].isascii() and "." not in name[:-4]:
        pattern = f"sub-{{participant:{name[4:-15]}}}_timeseries.tsv"
        described = tmp_path / "mine.yaml"
        described.write_text(json.dumps({"scans": [pattern]}))
        assert people(index(described, tmp_path)) == [f"sub-{name[4:-15]}"]


def test_every_command_names_people_alike(tmp_path):
    names = ["sub-A-1", "sub-A-11", "sub-NYU_00501", "sub-NYU_00502", "sub-1"]
    for i, name in enumerate(names):
        table(tmp_path / f"{name}_task-rest_timeseries.tsv", series(i))
    for found in (open_scans(tmp_path), index("bids", tmp_path)):
        assert sorted(people(found)) == sorted(names)


def test_scans_come_in_natural_order(tmp_path):
    ids = [f"sub-{i}" for i in range(1, 13)]
    for i, who in enumerate(ids):
        table(tmp_path / f"{who}_timeseries.tsv", series(i))
    for found in (open_scans(tmp_path), index("bids", tmp_path)):
        assert people(found) == ids == found.table["participant_id"].tolist()
        for scan, i in zip(found, range(12), strict=True):
            np.testing.assert_array_equal(scan.values, series(i).astype("f4"))


def test_a_session_in_the_folder(tmp_path):
    for session in "12":
        place = tmp_path / "sub-01" / f"ses-{session}" / "rest.ptseries.nii"
        save_scan(Scan("sub-01", series(int(session)).astype("f4"), 2.0, NAMES), place)
    assert [scan.session for scan in open_scans(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("name", ["t (s)", "acq_time", "volume#", "scan", "X"])
def test_a_clock_under_any_name_is_no_parcel(tmp_path, name):
    values = np.random.default_rng(0).normal(size=(20, 3))
    table = pd.DataFrame(values, columns=["a", "b", "c"])
    table.insert(0, name, 2.0 * np.arange(20))
    table.to_csv(tmp_path / "sub-1_timeseries.tsv", sep="\t", index=False)
    scan = load_scan(tmp_path / "sub-1_timeseries.tsv", t_r=2.0)
    assert scan.parcels == ("a", "b", "c")


@pytest.mark.parametrize("t_r", [5e-324, 0.00072])
def test_no_scanner_is_that_fast(t_r):
    values = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(DataError, match="at least 0.01 seconds"):
        load_scan(values, t_r=t_r, participant_id="sub-1", parcels=("a", "b", "c"))


@pytest.mark.parametrize("name", ["sub-control_john_timeseries", "sub-002_S_04135678_timeseries"])
def test_an_identifier_is_not_cut(tmp_path, name):
    with pytest.raises(DataError, match="not clear where"):
        formats.participant(tmp_path / f"{name}.tsv")
