"""Find numbers of the built book whose kind is not said: SIMULATED without the word, or real with it.

A page of a run is compared with its table of results. On a written page a number says its kind by a class
(``results.py``), and a row of a table by the page that it links to. The unit that needs the word is a
sentence, a row of a table (its head counts too) or a caption.
"""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag

WORD = "SIMULATED"
BLOCKS = ("p", "li", "dt", "dd", "figcaption", "caption", "tr")
SILENT = ("pre", "script", "style", "svg")
# With a unit it is no score, such as the 0.735 s of a frame.
NUMBER = re.compile("[-\N{MINUS SIGN}]?[0-9]+\\.[0-9]{2,}(?![0-9]| (?:s|mm|Hz)\\b)")
# In a row, two decimals would too often be another number that is the same by chance.
IN_ROW = re.compile("[-\N{MINUS SIGN}]?[0-9]+\\.[0-9]{3,}")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class Block:
    """A paragraph, caption or row: its text, the kinds of numbers in it by their place, and its links."""

    def __init__(self, tag: str, table: str = "", head: str = ""):
        self.tag = tag
        self.table = table  # classes of the table of a row
        self.head = head  # text above the columns
        self.text = ""
        self.kinds: list[tuple[int, str]] = []
        self.links: set[str] = set()


class Article(HTMLParser):
    """The blocks of a page's article. A row is one block, whatever is in its cells."""

    def __init__(self, path: Path):
        super().__init__()
        self.blocks: list[Block] = []
        self.open: list[Block] = []
        self.inside = self.silent = self.in_head = 0
        self.table = self.head = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.inside += tag == "article"
        self.silent += tag in SILENT
        self.in_head += tag == "thead"
        if tag == "table":
            self.table, self.head = values.get("class") or "", ""
        in_row = any(block.tag == "tr" for block in self.open)
        if tag in BLOCKS and self.inside and not in_row:
            row = (self.table, self.head) if tag == "tr" else ()
            self.open.append(Block(tag, *row))
        if not self.open:
            return
        if tag == "a":
            self.open[-1].links.add(values.get("href") or "")
        elif tag == "abbr" and "result" in (values.get("class") or "").split():
            kind = values["class"].split()[-1]
            self.open[-1].kinds.append((len(self.open[-1].text), kind))
        elif tag in ("td", "th", "br"):
            self.open[-1].text += " "

    def handle_endtag(self, tag):
        self.inside -= tag == "article"
        self.silent -= tag in SILENT
        self.in_head -= tag == "thead"
        if self.open and self.open[-1].tag == tag:
            block = self.open.pop()
            if self.in_head:
                self.head += f" {block.text}"
            self.blocks.append(block)

    def handle_data(self, data):
        if self.open and not self.silent:
            self.open[-1].text += data


class Values(NamedTuple):
    """The numbers of a table of results as pages write them, those of one kind only, and its kinds."""

    simulated: frozenset[str]
    real: frozenset[str]
    kinds: frozenset[str]


def values_of(path: Path) -> Values:
    """The numbers of a table of results, with two and three decimals."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for row in rows:
        for value in filter(None, (row["value"], row["low"], row["high"])):
            written = {f"{float(value):.{digits}f}" for digits in (2, 3)}
            found[row["kind"] == WORD] |= written - {"0.00", "0.000"}
    both = found[True] & found[False]
    kinds = frozenset(row["kind"] for row in rows)
    return Values(frozenset(found[True] - both), frozenset(found[False] - both), kinds)


def is_label(text: str) -> bool:
    """Whether a sentence speaks of the one that follows, such as "SIMULATED people."."""
    return len(text.split()) < 4 and not re.search("[0-9]", text)


def units(block: Block):
    """The sentences of a block, or the whole of a row and a caption: text, where it begins and ends."""
    if block.tag not in ("p", "li", "dd"):
        yield block.text, 0, len(block.text)
        return
    start = 0
    for end in [*(match.start() for match in SENTENCE.finditer(block.text)), len(block.text)]:
        text = block.text[start:end]
        if is_label(text) and end < len(block.text):
            continue
        yield text, start, end
        start = end


def judge(block: Block, known: list[Values]):
    """What is wrong with a block: `known` are the tables that its numbers may be from."""
    pattern = IN_ROW if block.tag == "tr" else NUMBER
    for text, start, end in units(block):
        marked = WORD in text or WORD in block.head
        kinds = {kind for place, kind in block.kinds if start <= place < max(end, start + 1)}
        numbers = {number.replace("\N{MINUS SIGN}", "-") for number in pattern.findall(text)}
        simulated = WORD in kinds or any(numbers & values.simulated for values in known)
        real = "real" in kinds or any(numbers & values.real for values in known)
        if simulated and not marked:
            yield f"a {WORD} number without the word: {short(text)}"
        if real and marked and not simulated:
            yield f"a real number marked {WORD}: {short(text)}"


def judge_page(blocks: list[Block], values: Values | None, linked):
    """What is wrong with a page; `linked` gives the tables of the pages that a block links to."""
    for block in blocks:
        if values is not None:
            yield from judge(block, [values])
            if block.tag == "figcaption" and values.kinds == {WORD} and WORD not in block.text:
                yield f"a caption of a {WORD} page without the word: {short(block.text)}"
            continue
        known = linked(block) if block.tag == "tr" else []
        yield from judge(block, known)
        if "status" in block.table.split():
            for kinds in (values.kinds for values in known):
                if (WORD in kinds) != (WORD in block.text):
                    yield f"kinds {sorted(kinds)}, but the row says: {short(block.text)}"


def short(text: str) -> str:
    """The beginning of a text on one line."""
    return " ".join(text.split())[:100]


def mismarked(folder: Path, pages: list[Path], sources: Path):
    """Report every number of the built `pages` in `folder` whose kind is not said, or wrongly."""
    tables = {}
    for path in sorted(sources.glob("book/*/*.csv")):
        if path.with_suffix(".manifest.json").is_file():
            tables[(folder / path.relative_to(sources)).with_suffix(".html").resolve()] = values_of(
                path
            )
    for page in pages:

        def linked(block, here=page.parent):
            targets = {(here / urldefrag(link).url).resolve() for link in block.links}
            return [tables[target] for target in targets if target in tables]

        for report in judge_page(Article(page).blocks, tables.get(page.resolve()), linked):
            yield f"{page.relative_to(folder)}: {report}", "every view"
