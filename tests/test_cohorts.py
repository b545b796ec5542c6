"""Cohorts: descriptions are checked, phenotypes matched, and every scan left out has a reason."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from mnemodyn.cli import main
from mnemodyn.data.cohorts import SHIPPED, index, load_cohort, shipped
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


HEADER = "id\tage\tscore\n"
ROWS = "sub-01\t24\t50\nsub-02\t23\t60\n"
TRUE = {"sub-01": (24, 50), "sub-02": (23, 60)}


def read(folder, text, name="p.tsv", people=("01", "02")):
    """Age and score of every participant of a folder with this table, and the index."""
    for who in people:
        scan(folder / "scans" / f"sub-{who}_timeseries.tsv", int(who) + 100 * len(who))
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "scans" / name).write_bytes(content)
    score = {"name": "score", "column": "score", "kind": "regression"}
    (folder / "c.yaml").write_text(
        yaml.safe_dump(
            {
                "scans": "**/sub-{participant}_*.tsv",
                "reader": {"t_r": 2.0},
                "phenotype": {"file": name, "match": {"id": "{participant}"}},
                "age": "age",
                "targets": ["age", score],
            }
        )
    )
    found = index(folder / "c.yaml", folder / "scans")
    values = zip(found.table.age, found.table.score, strict=True)
    return dict(zip(found.table.participant_id, values, strict=True)), found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (HEADER + ROWS.replace("\n", "\t\n"), "p.tsv"),
        (HEADER + ROWS.replace("\n", "\t\t\n"), "p.tsv"),
        (HEADER.replace("\n", "\t\n") + ROWS.replace("\n", "\t\n"), "p.tsv"),
        (HEADER.replace("\n", "\t\n") + ROWS, "p.tsv"),
        ((HEADER + ROWS.replace("\n", "\t\n")).replace("\t", ","), "p.csv"),
        ((HEADER + ROWS).replace("\t", ","), "p.CSV"),
        ("\ufeff" + HEADER + ROWS, "p.tsv"),
        ((HEADER + ROWS).encode("utf-16"), "p.tsv"),
        ((HEADER + ROWS).replace("\n", "\r\n"), "p.tsv"),
        ((HEADER + ROWS).replace("\n", "\r"), "p.tsv"),
        ("\n" + HEADER + "\n" + ROWS + "\t\t\n\n", "p.tsv"),
        (" ID\tAge \tSCORE\n" + ROWS, "p.tsv"),
        (HEADER.replace("\n", "\tAge\n") + ROWS.replace("\n", "\t99\n"), "p.tsv"),
        ('id,age,score,note\nsub-01,24,50,"two\nlines"\n"sub-02","23",60.0,\n', "p.csv"),
        (HEADER.replace("\n", "\tkey\tline\n") + ROWS.replace("\n", "\tk\tl\n"), "p.tsv"),
        (HEADER + ROWS.replace("sub-0", ""), "p.tsv"),
        (HEADER + ROWS.replace("sub-0", "sub-000"), "p.tsv"),
        (HEADER + ROWS + "1\t24.0\t50.00\n", "p.tsv"),  # the same row again
    ],
)
def test_everybody_keeps_their_own_numbers(tmp_path, text, name):
    assert read(tmp_path, text, name)[0] == TRUE


@pytest.mark.parametrize(
    ("text", "problem", "message"),
    [
        (HEADER + ROWS + "sub-03\t1\t2\t3\n", "columns", "line 4 has 4 cells, the header 3"),
        (HEADER + ROWS + "sub-03\t1\n", "columns", "line 4 has 2 cells"),
        (HEADER + ROWS.replace("50\n", "50\t\n"), "columns", "line 3 has 3 cells"),
        (HEADER + "\t" + ROWS, "columns", "line 2 has 4 cells"),
        ("id\tage\t\tscore\n" + ROWS.replace("\n", "\t\n"), "columns", "without a name"),
        (HEADER.replace("score", "age") + ROWS, "columns", r"'age' \(2\), 'age' \(3\)"),
        ("id\tAge\tAGE\n" + ROWS, "columns", "several columns could be 'age'"),
        (HEADER + ROWS.replace("50", '"50'), "quotes", "line 3: wrong quotes"),
        (HEADER + '"sub-01\t24\t50\nsub-02"\t23\t60\n', "quotes", "goes on over rows.* line 3"),
        (HEADER + ROWS.replace("24", '"2"4'), "quotes", "line 2: wrong quotes"),
        ((HEADER + ROWS).replace("\t", ","), "no-phenotype", "'id,age,score'.*separated by tabs"),
        (ROWS, "no-phenotype", "no column 'id'"),
        ("", "no-phenotype", "no column 'id'"),
        (
            HEADER + ROWS.replace("50", "50,5"),
            "unexpected-label",
            "'50,5'.*line 2 of p.tsv.*a point",
        ),
        (HEADER + ROWS.replace("50", "-999"), "unexpected-label", "none negative, found '-999'"),
        (HEADER + ROWS.replace("50", "2-Jan"), "unexpected-label", "found '2-Jan' .*line 2"),
        ((HEADER + ROWS + "M\xfcller\t1\t2\n").encode("latin-1"), "encoding", r"line 4.*\\xfc"),
        ((HEADER + ROWS).encode("utf-16-le"), "encoding", "zero bytes"),
        (b"PK\x03\x04\x00", "encoding", "save the table as text"),
    ],
)
def test_a_table_that_could_be_misread_is_refused(tmp_path, text, problem, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, text)
    assert caught.value.problem == problem
    assert "p.tsv" in str(caught.value)


def test_a_table_that_was_not_fetched_is_not_absent(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "c.yaml").write_text("scans: '*.tsv'\n")
    scan(tmp_path / "scans" / "sub-1_timeseries.tsv", 1)
    (tmp_path / "scans" / "participants.tsv").symlink_to("../.git/annex/x")
    with pytest.raises(DataError, match="participants.tsv"):
        index(tmp_path / "c.yaml", tmp_path / "scans")


def test_a_spreadsheets_errors_and_rows_of_nobody(tmp_path):
    text = HEADER + ROWS.replace("50", "#REF!").replace("60", "#N/A") + "\t31\t70\n"
    values, found = read(tmp_path, text)
    assert [age for age, _ in values.values()] == [24, 23]
    assert found.table.score.isna().all()
    assert found.notes == ["p.tsv: 1 rows name nobody, such as line 4"]


def test_identifiers_that_differ_in_zeros_are_matched_where_one_fits(tmp_path):
    people = ("01", "001", "7")
    values, found = read(
        tmp_path, HEADER + "01\t24\t50\n001\t23\t60\n0007\t22\t70\n", people=people
    )
    assert values == {"sub-01": (24, 50), "sub-001": (23, 60), "sub-7": (22, 70)}
    assert "1 identifiers are matched without zeros" in str(found)
    # One row cannot be that of two people, and two rows not that of one.
    values, found = read(tmp_path, HEADER + "01\t24\t50\n0007\t22\t70\n7\t9\t70\n", people=people)
    assert values["sub-01"] == (24, 50)
    assert np.isnan([values["sub-001"], values["sub-7"]]).all()
    assert excluded(found) == [
        ("sub-001_timeseries.tsv", "ambiguous-identifier", "targets"),
        ("sub-7_timeseries.tsv", "contradictory-phenotype", "targets"),
    ]
    assert "rows of '7', lines 3, 4, that differ in age" in found.excluded.message[1]


def test_columns_of_bids_in_other_letters_and_those_that_are_absent(data):
    for path in data.rglob("*.tsv"):
        path.with_suffix(".json").write_text('{"RepetitionTime": 0.8}')
    table = "participant_id\tAge\tsex \n01\t20\tF\n02\t30\tMALE\n"
    (data / "participants.tsv").write_text(table)
    found = index("bids", data)
    assert list(found.table.sex.dropna()) == ["female", "male"]
    assert list(found.table.age.dropna()) == [20, 30]
    assert "participants.tsv: no column 'site'; it has ['participant_id', 'Age', 'sex']" in str(
        found
    )
    assert found.summary()["notes"] == found.notes


def test_a_pattern_that_never_ends_is_stopped(tmp_path, data, monkeypatch):
    (data / ("x" * 60)).touch()
    stopped = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: stopped(*a, **{**k, "timeout": 0.5}))
    for pattern in ("{a:(x+x+)+y}", "{a:(x|x)+y}", "*x*x*x*x*x*x*x*x*x*x*x*x*y"):
        with pytest.raises(DataError, match="could not be matched within .* simpler"):
            index(describe(tmp_path, scans=pattern), data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "scans: x\nreader: {t_r_by_site: {site: {NYU: }}}",
            "reader: t_r_by_site: site: .* number",
        ),
        ("scans: x\nt_r_by_site: {site: {NYU: }}", "unknown key 't_r_by_site'"),
        ("scans: x\nrun: '{run'", "run: '{run': braces must hold the name of an entity"),
        ("scans: x\nrun: 'run}'", "run: .* braces"),
        ("scans: x\nrun: '{run:>9999999999}'", "run: .* braces"),
        ("scans: x\nrun: '{run.__class__}'", "run: .* braces"),
        ("scans: x\nphenotype: {match: {id: '{0}'}}", "phenotype: match: id: .* braces"),
        ("scans: 'sub-{participant_*'", "scans: 0: .* an entity is"),
        ("scans: 'sub-participant}_*'", "scans: 0: .* an entity is"),
        ("scans: '{a:x{9999999999999}}'", "no valid pattern"),
        ("scans: '{a:[[x]}'", "no valid pattern"),
        ("scans: x\nmissing: [[1]]", r"missing: 0: must be text or a number, got \[1\]"),
        ("scans: x\nsex: {column: s, mapping: {true: male}}", "text or a number, got True"),
        ("scans: x\nsex: {column: s, mapping: {1: male, '1.0': female}}", "'1' is mapped twice"),
        ("scans: x\nmissing: &a [x]\nrun: *a", r"line 3: write out what \*a stands for"),
        ("[" * 1000, "more than 50 lists or mappings"),
        ("scans: x\nmissing: [" + "1, " * 200_000 + "]", "600,020 characters of YAML"),
        ("scans: x\nreader: {t_r: " + "9" * 5000 + "}", "not valid YAML"),
        ("scans: !!int ''", "not valid YAML"),
    ],
)
def test_descriptions_that_could_hang_or_do_harm_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(DataError, match=f"c.yaml: .*{message}"):
        load_cohort(tmp_path / "c.yaml")


def test_damaged_descriptions_are_named(tmp_path):
    pieces = [
        "{",
        "}",
        "[",
        ": ",
        "- ",
        "&a ",
        "*a",
        "!!int ",
        "'",
        "~",
        "\n",
        "{a:",
        "9" * 20,
        "? ",
        "é",
    ]
    rng = np.random.default_rng(0)
    path = tmp_path / "c.yaml"
    original = (SHIPPED / "adhd200.yaml").read_text(encoding="utf-8")
    for _ in range(60):
        place = int(rng.integers(len(original)))
        path.write_text(original[:place] + rng.choice(pieces) + original[place + 1 :], "utf-8")
        with suppress(DataError):
            load_cohort(path)


def test_families_of_a_description_join_whatever_zeros(tmp_path, data):
    found = index(describe(tmp_path, families=[["sub-1", "sub-0002"]]), data)
    assert found.table.family[0] == found.table.family[1] != found.table.family[2]


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


def test_relatives_join_through_somebody_without_a_scan(tmp_path, data):
    joined = [["sub-01", "sub-99"], ["sub-02", "sub-99"]]
    found = index(describe(tmp_path, families=joined), data).table.set_index("participant_id")
    assert found.loc["sub-01", "family"] == found.loc["sub-02", "family"]
