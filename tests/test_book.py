"""What the book makes of result files, docstrings and manifests."""

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
from matplotlib import font_manager

pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import collect  # noqa: E402
import reference  # noqa: E402
import results  # noqa: E402
import runs  # noqa: E402

from mnemodyn import figures  # noqa: E402
from mnemodyn.model.config import ModelConfig  # noqa: E402
from mnemodyn.parameters import check_parameters, read_parameters  # noqa: E402
from mnemodyn.pretrain.config import DataConfig, Machine, TrainingConfig  # noqa: E402
from mnemodyn.pretrain.objective import OBJECTIVES  # noqa: E402


def read(how, content, **entry):
    entry = {"data": "D", "kind": "real", "rows": how} | entry
    return [{k: r.get(k) for k in ("task", "method", "value", "low", "high", "n", "kind")} for r in
            collect.read_rows(entry, content)]  # fmt: skip


def test_rows_of_a_mapping_take_their_intervals_from_another():
    content = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": [0.5, 1.5]}, "n_people": 3}
    found = read({"values": "a", "intervals": "b", "n": "n_people", "task": "T"}, content)
    assert found == [
        {"task": "T", "method": "x", "value": 1.0, "low": 0.5, "high": 1.5, "n": 3, "kind": "real"},
        {
            "task": "T",
            "method": "y",
            "value": 2.0,
            "low": None,
            "high": None,
            "n": 3,
            "kind": "real",
        },
    ]


def test_rows_of_a_mapping_or_list_take_intervals_that_stand_in_them():
    content = {"a": {"x": {"value": 1.0, "low": 0.0, "high": 2.0}, "none": {"value": None}}}
    assert [(r["method"], r["low"], r["high"]) for r in read({"values": "a"}, content)] == [
        ("x", 0.0, 2.0)
    ]
    content = {
        "cells": [{"label": "haar", "group": "wavelets", "r2": 0.3, "from": 0.2, "to": 0.4, "n": 5}]
    }
    how = {
        "list": "cells",
        "method": ["group", "label"],
        "value": "r2",
        "low": "from",
        "high": "to",
    }
    (row,) = read(how, content)
    assert (row["method"], row["value"], row["low"], row["high"], row["n"]) == (
        "wavelets, haar",
        0.3,
        0.2,
        0.4,
        5,
    )


def test_a_file_that_says_it_is_simulated_wins_over_the_entry():
    score = {"value": 0.6, "low": 0.5, "high": 0.7}
    report = {
        "kind": "classification",
        "rows": [{"method": "fc", "n": 9, "auc": score}, {"method": "late", "n": 9}],
    }
    content = {"simulated": True, "targets": {"sex": {"kfold": report, "other": report}}}
    how = {
        "targets": "targets",
        "plans": {"kfold": "held out"},
        "scores": {"classification": "auc"},
    }
    assert read(how, content) == [
        {"task": "sex, held out", "method": "fc", **score, "n": 9, "kind": "SIMULATED"},
    ]
    assert read(how, content | {"simulated": False}, kind="SIMULATED")[0]["kind"] == "real"


def test_published_rows_name_their_source():
    line = {
        "study": "s",
        "method": "BNT",
        "cohort": "ADNI",
        "target": "sex",
        "metric": "accuracy",
        "value": "78.9",
    }
    (row,) = collect.read_rows(
        {"kind": "published", "rows": "csv"}, [line | {"sd": "4.1", "source": "Table 2"}]
    )
    assert row["method"] == "BNT (Table 2)"
    assert row["score"] == "accuracy (SD 4.1)"
    assert row["value"] == 78.9


def test_the_entries_of_the_book_are_sound():
    methods, entries = collect.read_entries(ROOT)
    assert set(methods) >= {"model", "fc"}
    for entry in entries:
        path = ROOT / "book" / entry.get("file", "")
        if path.suffix == ".json" and path.parent.name == "data" and path.is_file():
            assert list(collect.read_rows(entry, json.loads(path.read_text()))), entry


def test_an_entry_with_a_misspelt_key_is_refused(tmp_path):
    (tmp_path / "book").mkdir()
    text = "methods: {}\nresults:\n- {result: R, kind: real, command: c, flie: x}\n"
    (tmp_path / collect.ENTRIES).write_text(text)
    with pytest.raises(ValueError, match="flie"):
        collect.read_entries(tmp_path)


def test_figures_have_one_font_on_every_machine(monkeypatch, tmp_path):
    """A machine's own DejaVu Sans has other outlines, and the one listed first is taken."""
    own = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    fonts = font_manager.fontManager
    monkeypatch.setattr(fonts, "ttflist", [])
    fonts.addfont(shutil.copy(own, tmp_path))
    with matplotlib.rc_context():
        figures.use_style()
        assert own.samefile(str(font_manager.findfont("DejaVu Sans")))


@pytest.mark.parametrize(
    ("ends", "text"), [((-0.25, 0.5), "\N{MINUS SIGN}0.25 to +0.50"), ((None, None), "no interval")]
)
def test_an_interval_may_be_absent(ends, text, monkeypatch):
    monkeypatch.setattr(
        results, "lookup", lambda place, name, key: dict(zip(("low", "high"), ends, strict=True))
    )
    role = results.Interval()
    role.text = "data/a:x:+.2f"
    assert role.run()[0][0].astext() == text


def test_a_key_finds_an_element_by_what_it_says():
    rows = [{"method": "fc", "v": 1}, {"method": "model", "v": 2}]
    assert results.step(rows, "method=model")["v"] == 2
    assert results.step(rows, "0")["v"] == 1
    with pytest.raises(LookupError, match="method=none"):
        results.step(rows, "method=none")


@pytest.mark.parametrize(
    "cls", [ModelConfig, TrainingConfig, Machine, DataConfig, *OBJECTIVES.values()]
)
def test_every_setting_is_documented(cls):
    rows = {name: said for name, _, _, said in reference.settings(cls)}
    assert list(rows) == [f.name for f in fields(cls) if f.init]
    assert all(rows.values()), [name for name, said in rows.items() if not said]


def test_settings_say_their_default_and_what_is_allowed():
    rows = {row[0]: row[1:] for row in reference.settings(TrainingConfig)}
    assert rows["schedule"][:2] == ("cosine", "cosine or restarts")
    assert rows["restart_factor"] == ("2", "int", "As published 10 and 2.")
    assert {row[0]: row[1] for row in reference.settings(ModelConfig)}["n_parcels"] == "required"


def test_the_command_of_a_run_gives_back_its_parameters(tmp_path):
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell(
        "epochs = 3\nrate = 0.1\nname = 'a'\nlengths = [1, 2]\nsettings = {}\nt_r = None"
    )
    cell.metadata["tags"] = ["parameters"]
    notebook.cells = [cell]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    given = {
        "epochs": 3,
        "rate": 0.25,
        "name": "it's",
        "lengths": [4],
        "settings": {"a": {"b": True}},
        "t_r": None,
    }
    run = {"notebook": "n.ipynb", "output": "out.ipynb", "parameters": given}
    words = runs.shlex.split(runs.rerun(tmp_path, run))
    assert words[:4] == ["mnemodyn", "run", "n.ipynb", "out.ipynb"]
    assert [words[i + 1] for i, word in enumerate(words) if word == "-p"] == [
        "rate",
        "name",
        "lengths",
        "settings",
    ]
    defaults = read_parameters(notebook)
    typed = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
    assert defaults | check_parameters(defaults, typed) == given


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((0.01, 0.5), "better"),
        ((-0.5, -0.01), "worse"),
        ((-0.1, 0.1), "no difference shown"),
        ((0, 0), "no difference shown"),
    ],
)
def test_a_verdict_follows_from_the_interval(ends, text, monkeypatch):
    monkeypatch.setattr(
        results, "lookup", lambda place, name, key: dict(zip(("low", "high"), ends, strict=True))
    )
    role = results.Verdict()
    role.text = "data/a:x"
    assert role.run()[0][0].astext() == text


def test_numbers_are_set_but_not_dates_words_or_code():
    given = "from -0.25 to +0.5 (-1), 55%, on 2026-11-23, sub-01, 5 %, x-3"
    assert runs.fair(given).replace("\N{NO-BREAK SPACE}", "~").replace("\N{MINUS SIGN}", "m") == (
        "from m0.25 to +0.5 (m1), 55~%, on 2026-11-23, sub-01, 5~%, x-3"
    )


def test_pages_of_one_notebook_have_titles_of_their_own(tmp_path):
    folder = tmp_path / runs.RUNS
    folder.mkdir(parents=True)
    made = {
        "downstream_hbn": (
            "downstream",
            "HBN",
            {"targets": {"sex": 1, "nc_vs_mci": 1, "age": 1}, "simulated": True},
        ),
        "downstream_abide": ("downstream", "ABIDE", {"targets": {"sex": 1}, "simulated": False}),
        "pretrain_denoise": ("pretrain", "Denoising", {}),
        "data": ("data", "Data", {}),
    }
    titles = {}
    for name, (notebook, short, found) in made.items():
        (folder / f"{name}.manifest.json").write_text(
            json.dumps({"notebook": f"notebooks/{notebook}.ipynb"})
        )
        (folder / f"{name}.json").write_text(json.dumps(found))
        section = runs.nodes.section("", runs.nodes.title("", "A question: what do scans tell?"))
        env, docname = SimpleNamespace(docname=f"{runs.RUNS}/{name}"), f"{runs.RUNS}/{name}"
        places = SimpleNamespace(external_site_map={docname: SimpleNamespace(title=short)})
        runs.name_title(SimpleNamespace(env=env, srcdir=tmp_path, config=places), section)
        titles[name] = section[0].astext()
    assert titles == {
        "downstream_hbn": "HBN: sex, nc vs mci and age of SIMULATED people",
        "downstream_abide": "ABIDE: sex of real people",
        "pretrain_denoise": "Denoising: what do scans tell?",
        "data": "A question: what do scans tell?",
    }


def cell(text, output="", tags=(), **metadata):
    """A notebook's cell as the book's builder makes it."""
    parts = [runs.nodes.container("", runs.nodes.literal_block("", text), classes=["cell_input"])]
    if output:
        parts.append(
            runs.nodes.container("", runs.nodes.paragraph("", output), classes=["cell_output"])
        )
    classes = ["cell", *(f"tag_{tag}" for tag in tags)]
    return runs.nodes.container(
        "", *parts, nb_element="cell_code", cell_metadata=metadata, classes=classes
    )


def test_a_page_begins_with_what_was_found_and_folds_the_rest(tmp_path, monkeypatch):
    folder = tmp_path / runs.RUNS
    folder.mkdir(parents=True)
    run = {"notebook": "notebooks/a.ipynb", "output": "a.ipynb", "parameters": {}}
    (folder / "a.manifest.json").write_text(json.dumps(run))
    nodes = runs.nodes
    cells = [
        cell("x = 1", tags=["parameters"]),
        cell("silent"),
        cell("long", "table", fold="A <table>"),
    ]
    cells += [cell("said", "it is better", tags=["finding"]), cell("end", "versions")]
    page = nodes.section("", nodes.title("", "A"), nodes.paragraph("", "why"), *cells)
    env = SimpleNamespace(docname=f"{runs.RUNS}/a", note_dependency=lambda path: None)
    runs.dress(SimpleNamespace(env=env, srcdir=tmp_path), page)
    assert page[1]["classes"] == ["finding"]
    assert page[1].astext() == "it is better"
    assert [child.astext() for child in page[2:3]] == ["why"]
    folds = [raw.astext() for raw in page.findall(nodes.raw)]
    assert [text.split("<summary>")[1].removesuffix("</summary>") for text in folds[::2]] == [
        "Parameters, and the command for this page", "A &lt;table&gt;", "What this run used",
    ]  # fmt: skip
    assert page.astext().count("it is better") == 1
    assert "silent" not in page.astext()
    assert "x = 1" in page.astext()


def test_the_table_of_people_has_a_row_a_task_and_a_column_a_method(monkeypatch):
    score = {"value": 0.6, "low": 0.5, "high": 0.7}
    row = {"method": "fc", "balanced_accuracy": score}
    report = {
        "kind": "classification",
        "n": 9,
        "rows": [row, row | {"method": "late", "balanced_accuracy": {"value": None}}],
    }
    table = SimpleNamespace(
        config=SimpleNamespace(external_site_map={f"{results.RUNS}/d": SimpleNamespace(title="D")})
    )
    texts = results.PeopleTable.row(
        table, "d", "nc_vs_mci", "kfold", report, ["late", "fc", "none"]
    )
    assert texts == [
        "D, nc vs mci|people held out, n\N{NO-BREAK SPACE}9",
        "",
        "0.600|0.500\N{EN DASH}0.700",
        "",
    ]
    row["balanced_accuracy"] = score | {"low": -0.1}
    assert (
        results.PeopleTable.row(table, "d", "x", "a site", report, ["fc"])[-1]
        == "0.600|\N{MINUS SIGN}0.100 to 0.700"
    )
