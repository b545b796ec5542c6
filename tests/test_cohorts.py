"""Cohorts: descriptions are checked, phenotypes matched, and every scan left out has a reason."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from mnemodyn.cli import main
from mnemodyn.data.cohorts import index, load_cohort, shipped
from mnemodyn.data.scans import DataError

PAGE = Path(__file__).parents[1] / "book" / "own_data.md"
MINIMAL = {
    "scans": ["**/sub-{participant}_ses-{session}_*timeseries.tsv"],
    "reader": {"t_r": 2.0},
    "phenotype": {"file": "people.csv", "match": {"id": "{participant}"}},
    "missing": [-9],
    "sex": {"column": "sex", "mapping": {1: "male", 2: "female"}},
    "targets": [
        "sex",
        {"name": "dx", "column": "dx", "kind": "classification", "mapping": {0: "no", 1: "yes"}},
    ],
}


def describe(folder, **changes):
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes, sort_keys=False))
    return path


def scan(path, seed, *, n_frames=20, parcels=("a", "b", "c")):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (
        np.random.default_rng(seed).standard_normal((n_frames, len(parcels))).astype(np.float32)
    )
    pd.DataFrame(values, columns=parcels).to_csv(path, sep="\t", index=False)
    return values


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for who in range(1, 6):
        scan(folder / f"sub-{who:02d}" / f"sub-{who:02d}_ses-a_x_timeseries.tsv", who)
    (folder / "people.csv").write_text(
        "id,sex,dx,age\n1,1,0,20\nsub-02,2,1.0,31\n003,1,,-9\n4,2,1,44\n5,-9,0,n/a\n"
    )
    return folder


def excluded(found):
    return sorted(
        zip(found.excluded.file, found.excluded.problem, found.excluded.left_out_of, strict=True)
    )


def test_shipped_cohorts_have_the_targets_of_the_published_work():
    targets = {name: {t.name for t in load_cohort(name).targets} for name in shipped()}
    assert targets == {
        "abide": {"diagnosis", "sex", "age"},
        "adhd200": {"diagnosis", "sex", "age"},
        "adni": {"amyloid", "nc_vs_mci", "sex", "age"},
        "bids": {"sex", "age"},
        "hbn": {"sex", "age"},
        "hcp_aging": {"age", "sex", "flanker", "neuroticism"},
        "nkir": {"sex", "age"},
        "ukb": {"age", "sex"},
    }
    groups = next(t for t in load_cohort("adni").targets if t.name == "nc_vs_mci")
    assert groups.mapping == {"CN": "control", "MCI": "mci"}
    assert groups.exclude == ["SMC", "EMCI", "LMCI", "AD", "Patient"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown key 'colour' .known: name, description, scans"),
        ({"reader": {"tr": 2}}, "cohort.yaml: reader: unknown key 'tr' .known: t_r, t_r_by_site"),
        ({"reader": {"t_r": 720}}, "reader: t_r: .* less than 100, got 720"),
        ({"reader": {"t_r_by_site": {"A": "2"}}}, "t_r_by_site: A: .* valid number, got '2'"),
        ({"scans": []}, "scans: List should have at least 1 item"),
        ({"scans": ["{participant:[}"]}, "no valid pattern"),
        ({"phenotype": {"file": "x.csv", "match": {}}}, "match: .* at least 1 item"),
        ({"age": {"column": "age", "unit": "weeks"}}, "'years' or 'months', got 'weeks'"),
        ({"sex": {"column": "sex"}}, "sex: mapping: Field required"),
        ({"sex": {"column": "sex", "mapping": {1: "m"}}}, "'male' or 'female', got 'm'"),
        ({"sex": {"column": "sex", "maping": {}}}, "unknown key 'maping'"),
        ({"targets": ["age"]}, "the column age is not described"),
        ({"targets": [{"name": "x", "column": "x"}]}, "targets: 0: kind: Field required"),
        ({"targets": [{"name": "x", "column": "x", "kind": "rank"}]}, "got 'rank'"),
        ({"targets": [{"name": "site", "column": "x", "kind": "regression"}]}, "'site' is taken"),
        ({"targets": {"name": "x"}}, "targets: Input should be a valid list"),
        ({"families": "sub-1"}, "families: Input should be a valid list"),
        ({"name": 3}, "name: Input should be a valid string, got 3"),
    ],
)
def test_descriptions_are_checked(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        load_cohort(describe(tmp_path, **changes))
    assert caught.value.problem == "cohort"


def test_unknown_cohort_names_the_shipped_ones():
    with pytest.raises(DataError, match="abide.*ukb"):
        load_cohort("abid")


def test_phenotypes_are_matched_whatever_zeros_and_prefixes(tmp_path, data):
    found = index(describe(tmp_path, age="age"), data)
    table = found.table.set_index("participant_id")
    assert list(table.index) == [f"sub-{i:02d}" for i in range(1, 6)]
    assert [None if pd.isna(v) else v for v in table.sex] == [
        "male",
        "female",
        "male",
        "female",
        None,
    ]
    assert [None if pd.isna(v) else v for v in table.dx] == ["no", "yes", None, "yes", "no"]
    assert [None if pd.isna(v) else v for v in table.age] == [20, 31, None, 44, None]
    assert set(table.session) == {"a"}
    assert set(table.t_r) == {2.0}
    assert not len(found.excluded)
    assert found.summary()["targets"]["dx"] == {"no": 2, "yes": 2}
    assert not found.simulated
    assert "SIMULATED" not in str(found)
    assert "dx: no (2), yes (2)" in str(found)


def test_a_repetition_time_can_be_given(tmp_path, data):
    found = index(describe(tmp_path, reader={"t_r_by_site": {"x": 1.0}}), data)
    assert found.summary()["problems"] == {"no-t-r": 5}
    found = index(describe(tmp_path), data, t_r=0.8)
    assert set(found.table.t_r) == {0.8}
    assert found[0].t_r == 0.8


def test_loading_a_row_gives_what_the_file_holds(tmp_path, data):
    values = scan(data / "sub-06" / "sub-06_ses-b_x_timeseries.tsv", 6)
    found = index(describe(tmp_path, reader={"t_r": 1.5, "atlas": "three"}), data)
    loaded = found[len(found) - 1]
    np.testing.assert_array_equal(loaded.values, values)
    assert (loaded.participant_id, loaded.session, loaded.t_r, loaded.atlas) == (
        "sub-06",
        "b",
        1.5,
        "three",
    )
    assert [scan.participant_id for scan in found] == list(found.table.participant_id)


def test_rows_missing_repeated_and_contradictory_are_told_apart(tmp_path, data):
    with open(data / "people.csv", "a") as table:
        table.write(
            "1,1,0,20\n2,2,0,31\n77,1,1,50\n4,2,1,45\n"
        )  # 4: another age, which nothing here reads
    scan(data / "sub-08" / "sub-08_ses-a_x_timeseries.tsv", 8)
    found = index(describe(tmp_path), data)
    assert excluded(found) == [
        ("sub-02/sub-02_ses-a_x_timeseries.tsv", "contradictory-phenotype", "targets"),
        ("sub-08/sub-08_ses-a_x_timeseries.tsv", "no-phenotype", "targets"),
    ]
    assert "differ in dx" in found.excluded.message[0]
    table = found.table.set_index("participant_id")
    assert len(table) == 6
    assert table.loc[["sub-02", "sub-08"], ["sex", "dx"]].isna().all(axis=None)
    assert list(table.index[~table.phenotype]) == ["sub-02", "sub-08"]
    assert found.table.dx.notna().sum() == 3


def test_a_participant_of_two_sexes_has_no_labels(tmp_path, data):
    scan(data / "sub-01" / "sub-01_ses-b_x_timeseries.tsv", 11)
    (data / "people.csv").write_text("id,ses,sex,dx\n1,a,1,0\n1,b,2,0\n2,a,2,1\n")
    table = {"file": "people.csv", "match": {"id": "{participant}", "ses": "{session}"}}
    found = index(describe(tmp_path, phenotype=table), data)
    assert [p for _, p, _ in excluded(found)].count("contradictory-phenotype") == 2
    assert found.table.dx.notna().sum() == 1


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            "1,1,2,20\n2,1,2,3\n3,1,x,3\n",
            {},
            r"dx of cohort.*'dx'.*one of \['0', '1'\].*'2' \(2\), 'x' \(1\)",
        ),
        ("1,3,0,20\n", {}, r"sex of cohort.*'3' \(1\)"),
        ("1,1,0,old\n", {"age": "age"}, r"age of cohort.*numbers.*'old' \(1\)"),
        ("1,1,0,inf\n", {"age": "age"}, r"'inf' \(1\)"),
        (
            "1,1,0,240\n",
            {"age": "age"},
            r"numbers of years, 0 to 120 years of age, found '240' \(1\)",
        ),
        ("1,1,0,20\n", {"age": "years"}, r"no column 'years'.*'age'"),
        (
            "1,1,0,20\n",
            {"phenotype": {"file": "people.csv", "match": {"pid": "x"}}},
            "no column 'pid'.*'sex'",
        ),
        ("1,1,0,20\n", {"scans": ["*.1D"]}, r"none of its 6 files.*people.csv.*matches .'\*.1D'"),
    ],
)
def test_tables_that_are_not_as_described_are_errors(tmp_path, data, rows, changes, message):
    (data / "people.csv").write_text("id,sex,dx,age\n" + rows)
    with pytest.raises(DataError, match=message):
        index(describe(tmp_path, **changes), data)


def test_excluded_labels_months_and_sites(tmp_path, data):
    (data / "people.csv").write_text("id,sex,dx,age,centre\n1,1,0,120,A\n2,1,9,126,B\n3,2,1,132,\n")
    target = {
        "name": "dx",
        "column": "dx",
        "kind": "classification",
        "mapping": {0: "no", 1: "yes"},
        "exclude": [9],
    }
    cohort = describe(
        tmp_path,
        targets=[target],
        age={"column": "age", "unit": "months"},
        site={"column": "centre", "mapping": {"A": "first"}},
        reader={"t_r_by_site": {"first": 1.0, "B": 2.5}},
    )
    found = index(cohort, data)
    assert list(found.table.t_r) == [1.0, 2.5]  # the others have no site, and so no t_r
    assert list(found.table.age) == [10.0, 10.5]
    assert list(found.table.site) == ["first", "B"]
    assert list(found.table.dx.notna()) == [True, False]
    assert found.summary()["problems"] == {"no-phenotype": 2, "no-t-r": 3}
    assert found.summary()["n_sites"] == 2


def test_a_series_under_two_participants_is_left_out_and_a_copy_of_ones_own_goes(tmp_path, data):
    scan(data / "sub-02" / "sub-02_ses-b_x_timeseries.tsv", 2)  # its own session a again
    scan(data / "sub-06" / "sub-06_ses-a_x_timeseries.tsv", 1)  # the same as 01
    scan(data / "sub-07" / "sub-07_ses-a_x_timeseries.tsv", 7, parcels=("b", "a", "c"))
    scan(data / "sub-08" / "sub-08_ses-a_x_timeseries.tsv", 8, parcels=("a", "b"))
    scan(data / "sub-09" / "sub-09_ses-a_x_timeseries.tsv", 9, n_frames=10)
    found = index(describe(tmp_path, reader={"t_r": 2.0, "min_frames": 15}), data)
    assert [(f.rsplit("/")[-1][:12], p) for f, p, scope in excluded(found) if scope == "all"] == [
        ("sub-01_ses-a", "duplicate-series"),
        ("sub-02_ses-b", "duplicate-series"),
        ("sub-06_ses-a", "duplicate-series"),
        ("sub-07_ses-a", "parcel-order"),
        ("sub-08_ses-a", "parcel-count"),
        ("sub-09_ses-a", "too-short"),
    ]
    assert list(found.table.participant_id) == ["sub-02", "sub-03", "sub-04", "sub-05"]
    summary = found.summary()
    assert (summary["n_scans"], summary["n_participants"], summary["n_usable"]) == (10, 9, 4)


def test_a_folder_of_several_atlases_is_said_so(tmp_path, data):
    """XCP-D writes each atlas's series beside the others."""
    for k in range(1, 6):
        (data / f"sub-0{k}" / f"sub-0{k}_ses-a_x_timeseries.tsv").unlink()
        scan(data / f"sub-0{k}" / f"sub-0{k}_ses-a_seg-Big_timeseries.tsv", k)
    scan(data / "sub-01" / "sub-01_ses-a_seg-Small_timeseries.tsv", 7, parcels=("a", "b"))
    (row,) = excluded(found := index(describe(tmp_path), data))
    assert row[1:] == ("parcel-count", "all")
    (message,) = found.excluded.message
    assert "2 parcels, not the 3 of most scans in order; of several atlases, name one" in message


def test_families_join_through_each_other(tmp_path, data):
    (data / "people.csv").write_text("id,sex,dx,fam\n1,1,0,x\n2,1,0,x\n3,2,1,y\n4,1,1,\n5,1,1,\n")
    found = index(
        describe(tmp_path, family="fam", families=[["sub-02", "sub-03"], ["sub-04", "sub-99"]]),
        data,
    )
    family = dict(zip(found.table.participant_id, found.table.family, strict=True))
    assert family["sub-01"] == family["sub-02"] == family["sub-03"]
    assert len({family["sub-01"], family["sub-04"], family["sub-05"]}) == 3
    assert family["sub-05"] == "sub-05"


def test_patterns(tmp_path, data):
    scan(data / "sub-01" / "sub-02_ses-z_x_timeseries.tsv", 50)  # folder and name disagree
    both = ["sub-{participant}/sub-{participant}_ses-{session}_*.tsv", "**/*{participant}*.tsv"]
    found = index(describe(tmp_path, scans=both), data)
    assert found.summary()["n_scans"] == 5
    nested = data / "deep" / "er" / "sub-09_ses-a_dir-AP_run-2_timeseries.tsv"
    scan(nested, 51)
    found = index(
        describe(tmp_path, scans=["no-*", "**/sub-{participant}_*dir*.tsv"], run="{dir}{run}"), data
    )
    assert found.table[["path", "session", "run"]].to_numpy().tolist() == [
        ["deep/er/sub-09_ses-a_dir-AP_run-2_timeseries.tsv", "a", "AP2"]
    ]


def test_times_that_print_alike_are_counted_together(data, tmp_path):
    for path, t_r in zip(
        sorted(data.rglob("*.tsv")), (0.72, 0.7200000286, 0.72, 2.0, 0.8), strict=True
    ):
        path.with_suffix(".json").write_text(f'{{"RepetitionTime": {t_r}}}')
    found = index(describe(tmp_path, reader={}), data)
    assert list(found.summary()["t_r"].items()) == [("0.72", 3), ("0.8", 1), ("2", 1)]


def test_processes_read_the_same_and_progress_is_told(tmp_path, data):
    told = []
    one = index(describe(tmp_path), data, progress=lambda *at: told.append(at))
    two = index(describe(tmp_path), data, workers=2)
    pd.testing.assert_frame_equal(one.table, two.table)
    assert told == [(i, 5) for i in range(1, 6)]


def test_bids_needs_no_table(data):
    (data / "people.csv").unlink()
    for path in data.rglob("*.tsv"):
        path.with_suffix(".json").write_text('{"RepetitionTime": 0.8}')
    found = index("bids", data)
    assert found.summary()["problems"] == {"no-phenotype": 5}
    (data / "participants.tsv").write_text(
        "participant_id\tsex\tage\nsub-01\tF\t20\nsub-02\tM\t30\n"
    )
    found = index("bids", data)
    assert list(found.table.sex.dropna()) == ["female", "male"]
    assert found.summary()["t_r"] == {"0.8": 5}


def test_scans_alone_are_a_cohort(tmp_path, data):
    (tmp_path / "c.yaml").write_text('scans: ["**/sub-{participant}_*.tsv"]\nreader: {t_r: 2}\n')
    found = index(tmp_path / "c.yaml", data)
    assert found.cohort == "c"
    assert len(found.table) == 5
    assert found.summary()["problems"] == {"no-phenotype": 5}
    assert "in the folder; put it there, or give its place" in found.excluded.message[0]


def test_the_pages_example_runs(tmp_path):
    text = re.search(r"```yaml\n(# mine.yaml.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    (tmp_path / "mine.yaml").write_text(text)
    folder = tmp_path / "data"
    for who in (1, 2, 3):
        scan(
            folder / f"sub-{who}" / "func" / f"sub-{who}_ses-1_atlas-x_timeseries.tsv",
            who,
            n_frames=40,
        )
    rows = ["id,visit,centre,family,age_months,sex,fd,dx,recall", "001,1,A,f,120,1,0.1,0,7"]
    rows += ["002,1,B,f,132,2,0.2,2,-9999", "003,1,B,,144,1,,9,5"]
    (folder / "participants.csv").write_text("\n".join(rows) + "\n")
    found = index(tmp_path / "mine.yaml", folder)
    assert list(found.table.diagnosis.dropna()) == ["control", "case"]
    assert list(found.table.memory.dropna()) == [7, 5]
    assert list(found.table.age) == [10, 11, 12]
    assert found.table.family[0] == found.table.family[1] != found.table.family[2]
    assert not len(found.excluded)


def test_command(tmp_path, data, capsys):
    cohort = str(describe(tmp_path))
    assert main(["index", cohort, str(data), "--json", "--table", str(tmp_path / "t.csv")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {
        "n_scans": 5,
        "n_participants": 5,
        "n_sites": 0,
        "excluded": [],
    }.items() <= content.items()
    assert content["targets"]["sex"] == {"female": 2, "male": 2}
    assert len(pd.read_csv(tmp_path / "t.csv")) == 5
    assert main(["index", cohort, str(data)]) == 0
    assert "n_scans: 5" in capsys.readouterr().out
    assert main(["index", "nowhere", str(data)]) == 2
    assert main(["index", cohort, str(tmp_path / "gone")]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.skipif(
    not (Path(os.environ.get("MNEMODYN_DATA", "/nonexistent")) / "abide" / "expand.py").is_file(),
    reason="MNEMODYN_DATA names no folder with the packed ABIDE scans (abide/expand.py)",
)
def test_abide(tmp_path):
    expand = Path(os.environ["MNEMODYN_DATA"]) / "abide" / "expand.py"
    subprocess.run([sys.executable, expand, tmp_path], check=True, capture_output=True)
    found = index("abide", tmp_path)
    summary = found.summary()
    assert (summary["n_scans"], summary["n_participants"], summary["n_sites"]) == (891, 891, 20)
    assert summary["problems"] == {"no-phenotype": 67, "constant-parcels": 8}
    assert (summary["n_usable"], summary["n_with_phenotype"]) == (883, 816)
    assert summary["targets"]["diagnosis"] == {"autism": 397, "control": 419}
    assert found.table.family.value_counts().head(3).tolist() == [2, 2, 1]
