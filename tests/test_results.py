"""The one format of results: what is refused, and that a table comes back as it was written."""

import html
import re

import pandas as pd
import pytest

from mnemodyn.files import OutputError, table_text
from mnemodyn.results import (
    COLUMNS,
    UNTRAINED_BLOCKS,
    label,
    literal,
    name_network,
    read_results,
    verdict,
    write_results,
)

ROW = {"data": "HCP-7", "task": "hidden entries", "method": "model", "score": "r2"}
ROW.update(value=0.5, kind="real")


def test_comes_back_as_written(tmp_path):
    rows = [
        ROW | {"low": 0.4, "high": 0.6, "n": 2},
        ROW | {"against": "zero", "p": 1 / 3},
    ]
    written = write_results(tmp_path / "a.csv", rows)
    found = read_results(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(found, written, check_dtype=False)
    assert list(written) == list(COLUMNS)
    assert written["against"].tolist() == ["", "zero"]
    assert written["n"].isna().tolist() == [False, True]
    assert written["p"].iloc[1] == 0.3333333333


def test_a_table_without_differences_has_empty_text(tmp_path):
    write_results(tmp_path / "a.csv", [ROW])
    assert read_results(tmp_path / "a.csv")["against"].tolist() == [""]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW | {"r2": 1}], r"unknown columns \['r2'\]"),
        ([{k: v for k, v in ROW.items() if k != "kind"}], "every row needs kind"),
        ([ROW | {"value": None}], "every row needs value"),
        (
            [ROW | {"kind": "simulated"}],
            r"kind must be one of real, SIMULATED.* got \['simulated'\]",
        ),
        ([ROW | {"low": 0.1}], "both ends"),
        ([ROW | {"low": 0.6, "high": 0.4}], "the lower one first"),
        ([ROW, ROW | {"value": 0.6}], "two rows for .*'method': 'model'"),
    ],
)
def test_what_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        write_results(tmp_path / "a.csv", rows)
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"X", b"\xcc"),
        (b"0.7", b"0.7,1,1"),
        (b",40,", b",n4,"),
        (b",40,", b",0.5,"),
        (b"0.7", b"x"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, old, new):
    path = tmp_path / "a.csv"
    write_results(path, [ROW | {"data": "X", "value": 0.7, "n": 40}])
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match="a.csv: not a table of results, make it again: "):
        read_results(path)


def test_another_table_is_named(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv: not .*: expected the columns"):
        read_results(tmp_path / "other.csv")


@pytest.mark.parametrize(
    "text",
    [
        "<img/src=x/onerror=alert(1)>",
        "</td><script>alert(1)</script>",
        "a|b \\|c \\",
        "two\nlines\r\n\n# and more",
        "*x* _y_ `z` ~~w~~ ``` [l](javascript:alert(1)) ![i](x) <http://x> &lt;b&gt; &amp;",
        "# h",
        "- l",
        "+ l",
        "> q",
        "1. x",
        "12) x",
        "---",
        "===",
        "snake_case_name",
        "{math}`x` $y$ %",
    ],
)
def test_text_from_data_is_shown_as_it_is(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    expected = " ".join(text.split())
    alone = markdown.render(literal(text))
    cell = markdown.render(f"| a | b |\n| --- | --- |\n| {literal(text)} | end |\n")
    assert html.unescape(alone.removeprefix("<p>").removesuffix("</p>\n")) == expected
    assert html.unescape(re.findall("<td>(.*?)</td>", cell)[0]) == expected


def test_a_formula_stays_text_in_a_spreadsheet(tmp_path):
    rows = [
        ROW | {"data": text, "value": -0.5} for text in ("=1+1", "+a", "-b", "@c", " =d", "-0.5")
    ]
    write_results(tmp_path / "a.csv", rows)
    assert read_results(tmp_path / "a.csv")["data"].astype(str).tolist() == [
        "'=1+1",
        "'+a",
        "'-b",
        "'@c",
        "' =d",
        "-0.5",
    ]
    assert (read_results(tmp_path / "a.csv")["value"] == -0.5).all()
    assert table_text(pd.DataFrame({"=x": ["=y"]}), "\t") == "'=x\n'=y\n"


def test_words():
    assert label("fc") == "functional connectivity (FC)"
    assert label("1 level") == "1 level"
    assert [verdict(0.1, 0.2), verdict(-0.2, -0.1)] == ["better", "worse"]
    assert verdict(-0.1, 0.1) == "no difference shown"
    assert verdict(-1e-17, 1e-17) == "identical"


def test_a_table_of_results_is_a_csv(tmp_path):
    with pytest.raises(OutputError, match=r"x.tsv: a table of results is a .csv"):
        write_results(tmp_path / "x.tsv", [])


@pytest.mark.parametrize(
    ("low", "high", "renamed"),
    [(-0.0, 0.0, True), (-1e-17, 1e-16, True), (-1e-5, 1e-5, False), (None, None, False)],
)
def test_a_network_that_training_left_alone_is_named_its_front_end(tmp_path, low, high, renamed):
    difference = {"against": "front_end", "value": 0.0, "low": low, "high": high}
    rows = [
        ROW,
        ROW | difference,
        ROW | {"task": "diagnosis", "method": "model+fc", "against": "model"},
        ROW | {"method": "model, window by window"},
        ROW | {"method": "untrained"},
        ROW | {"data": "ABIDE"},
    ]
    written = write_results(tmp_path / "a.csv", rows)
    named = name_network(written)
    name = UNTRAINED_BLOCKS if renamed else "model"
    window = f"{name}, window by window"
    expected = [name, name, "model+fc", window, "untrained", "model"]
    assert named["method"].tolist() == expected
    assert named["against"].tolist() == ["", "front_end", name, "", "", ""]
    assert written["method"].iloc[0] == "model", "the table itself keeps its names"


def test_a_network_that_moved_once_is_no_front_end(tmp_path):
    same = {"against": "front_end", "low": 0.0, "high": 0.0}
    moved = {**same, "task": "window by window", "low": 0.001, "high": 0.002}
    named = name_network(write_results(tmp_path / "a.csv", [ROW | same, ROW | moved]))
    assert set(named["method"]) == {"model"}
