"""A SIMULATED number says so where it stands, and a real one never does."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))
from check_kinds import mismarked

from mnemodyn.results import write_results

ROW = {"task": "sex", "method": "fc", "score": "auc"}
MADE_UP = {**ROW, "data": "HBN", "kind": "SIMULATED", "value": 0.7125, "low": 0.575, "high": 0.843}
REAL = {**ROW, "data": "ABIDE", "kind": "real", "value": 0.6934}
MIXED = [MADE_UP | {"data": "noise", "value": 0.912, "low": 0.9, "high": 0.95}, REAL]


@pytest.fixture
def found(tmp_path):
    """What the check says of a page with this article, `name` being its place in the book."""
    sources = tmp_path / "sources"
    for name, rows in {"made_up": [MADE_UP], "real": [REAL], "mixed": MIXED}.items():
        path = sources / "book/runs" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, rows)
        path.with_suffix(".manifest.json").write_text("{}")
    # A table that no run has written belongs to no page.
    write_results(sources / "book/runs/stray.csv", [MADE_UP])

    def check(name, article):
        page = tmp_path / "html/book" / f"{name}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"<body><p>0.712</p><article>{article}</article></body>")
        return [report for report, _ in mismarked(tmp_path / "html", [page], sources)]

    return check


def table(*rows, head="data", style=""):
    body = "".join(f"<tr><td><p>{cell}</p></td></tr>" for cell in rows)
    head = f"<thead><tr><th>{head}</th></tr></thead>"
    return f'<table class="{style}">{head}<tbody>{body}</tbody></table>'


LACKS, HAS = "without the word", "a real number marked"
LINK = '<a href="runs/{}.html">x</a> {}'
ABBR = '<abbr class="result {}" title="x">{}</abbr>'


@pytest.mark.parametrize(
    ("name", "article", "reports"),
    [
        # A page of a run: its own table says what its numbers are.
        ("runs/made_up", "<p>FC has 0.71.</p>", [LACKS]),
        ("runs/made_up", "<p>SIMULATED people. FC has 0.71.</p>", []),
        ("runs/made_up", "<p>All people are SIMULATED. FC has 0.71.</p>", [LACKS]),
        ("runs/made_up", "<p>A frame takes 0.575 s.</p><p>It moves 0.575 so.</p>", [LACKS]),
        ("runs/made_up", "<p>Another number, 0.333, and version 1.0.</p>", []),
        ("runs/made_up", table("HBN 0.713", "SIMULATED HBN 0.713"), [LACKS]),
        ("runs/made_up", table("HBN 0.713", head="SIMULATED cohorts"), []),
        ("runs/made_up", table("another table 0.71"), []),
        ("runs/made_up", "<figcaption>Scores.</figcaption>", [LACKS]),
        ("runs/made_up", "<figcaption>SIMULATED: scores.</figcaption>", []),
        ("runs/made_up", "<pre>log 0.712</pre><ul><li>from 0.575</li></ul>", [LACKS]),
        ("runs/real", "<p>FC has 0.693.</p><figcaption>Scores</figcaption>", []),
        ("runs/real", "<p>FC has 0.693 in SIMULATED people.</p>", [HAS]),
        ("runs/real", "<figcaption>SIMULATED: 0.693.</figcaption>", [HAS]),
        ("runs/mixed", "<p>SIMULATED noise gives 0.91. Real scans give 0.693.</p>", []),
        ("runs/mixed", "<p>Noise gives 0.91. SIMULATED scans give 0.693.</p>", [LACKS, HAS]),
        ("runs/stray", "<p>FC has 0.713.</p>", []),
        # A written page: a number's class, and the page that a row links to.
        ("index", f"<p>FC has {ABBR.format('SIMULATED', '0.5')}.</p>", [LACKS]),
        ("index", f"<p>SIMULATED: {ABBR.format('SIMULATED', '0.5')}.</p>", []),
        ("index", f"<p>It is {ABBR.format('real', '1')} on SIMULATED scans.</p>", [HAS]),
        ("index", f"<p>It is {ABBR.format('real', '1')}. The rest is SIMULATED.</p>", []),
        ("index", table(f"SIMULATED {ABBR.format('real', '1')}"), [HAS]),
        ("index", table(LINK.format("made_up", "0.713")), [LACKS]),
        ("index", table(LINK.format("made_up", "SIMULATED 0.713")), []),
        ("index", table(LINK.format("real", "SIMULATED 0.693")), [HAS]),
        ("index", table(LINK.format("real", "0.693"), LINK.format("made_up", "took 94 s")), []),
        ("index", table(LINK.format("real", "SIMULATED"), style="status"), ["kinds ['real']"]),
        ("index", table(LINK.format("made_up", "real"), style="status"), ["kinds ['SIMULATED']"]),
        ("index", table(LINK.format("mixed", "SIMULATED, real"), style="status"), []),
    ],
)
def test_every_number_says_what_it_is(found, name, article, reports):
    said = found(name, article)
    assert len(said) == len(reports), said
    for report, part in zip(said, reports, strict=True):
        assert part in report
