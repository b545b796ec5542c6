"""What the figures of the book share: colours, style, a figure or a table on a page, and plots of results.

Plots that one page uses are in ``plots.py``.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from mnemodyn.results import label

if TYPE_CHECKING:
    from IPython.display import HTML

# The palette of Okabe and Ito: its colours differ with any colour vision, and in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
MARKERS = "os^vDPX*"


def use_style() -> None:
    """Set fonts and colours for the figures of the book."""
    plt.rc("figure", figsize=(7, 3), dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("axes", prop_cycle=plt.cycler(color=COLOURS))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("font", size=9)
    plt.rc("legend", frameon=False)
    # With a fixed salt, the same drawing gives the same bytes.
    plt.rc("svg", hashsalt="mnemodyn", fonttype="path")
    # Letters are drawn as paths. Only matplotlib's own copy of the font is used, because another
    # version on the machine would change the bytes.
    fonts = font_manager.fontManager
    fonts.ttflist = [entry for entry in fonts.ttflist if not entry.name.startswith("DejaVu Sans")]
    for path in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf")):
        fonts.addfont(path)


def svg(figure: Figure) -> bytes:
    """Close a figure and return it as SVG; the same drawing gives the same bytes."""
    for text in figure.findobj(Text):
        # A dollar in the name of a parcel begins no formula, as it does in matplotlib's own powers of ten.
        if "$" in text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    return stream.getvalue()


class show:
    """Put a figure, which is closed, on the page.

    Parameters
    ----------
    figure : Figure or bytes
        A figure, or what `svg` made of one.
    caption : str
        What is seen, how many participants, and what an interval is.
    alt : str
        What somebody who cannot see the figure should know.
    """

    def __init__(self, figure: Figure | bytes, *, caption: str, alt: str):
        content = svg(figure) if isinstance(figure, Figure) else figure
        self.caption = caption
        self.alt = alt
        self.source = base64.b64encode(content).decode()

    def _repr_html_(self) -> str:
        return (
            f'<figure style="margin:1em 0"><img alt="{html.escape(self.alt)}" '
            'style="max-width:100%;height:auto" '
            f'src="data:image/svg+xml;base64,{self.source}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )

    def __repr__(self) -> str:
        return f"[figure] {self.caption}"


def table(frame: pd.DataFrame, *, precision: int = 3) -> "HTML":
    """Put a data frame on the page, its numbers with `precision` decimals.

    The identifiers of the HTML are fixed, so that two equal runs give the same bytes.
    """
    from IPython.display import HTML

    def number(value: float) -> str:
        if pd.isna(value):
            return ""
        return f"{value:.{precision}f}".replace("-", "\N{MINUS SIGN}")

    frame = frame.reset_index(drop=True)
    numbers = frame.select_dtypes("floating").columns
    texts = frame.select_dtypes(["object", "str"])
    # The style sheet tells columns of words from columns of numbers by a class.
    words = [name for name in texts if frame[name].astype(str).str.match("[A-Za-z]").any()]
    style = frame.style.hide(axis="index")
    # Names of parcels, people and columns may be anything: they are text on the page too.
    style = style.format(dict.fromkeys(numbers, number), escape="html")
    style = style.format_index(escape="html", axis="columns")
    style = style.set_td_classes(pd.DataFrame("text", frame.index, words))
    style = style.set_uuid("table")
    return HTML(style.to_html())


def result_table(rows: pd.DataFrame, *, precision: int = 3) -> "HTML":
    """Put rows of a table of results on the page: what differs between them, value, interval, p and n."""
    shown = pd.DataFrame(index=rows.index)
    made_up = rows["kind"] == "SIMULATED"
    for name in ("data", "task", "score"):
        if rows[name].nunique() > 1 or (name == "data" and made_up.any()):
            shown[name] = rows[name]
    if made_up.any():
        shown["data"] = rows["data"].where(~made_up, "SIMULATED " + rows["data"])
    shown["method"] = [label(method) for method in rows["method"]]
    if (rows["against"] != "").any():
        shown["against"] = [label(method) for method in rows["against"]]
    shown["value"] = rows["value"].astype(float)
    if rows["low"].notna().any():
        shown["from"] = rows["low"].astype(float)
        shown["to"] = rows["high"].astype(float)
    if rows["p"].notna().any():
        shown["p"] = rows["p"].astype(float)
    if rows["n"].notna().any():
        shown["n"] = rows["n"].astype("Int64").astype(str).replace("<NA>", "")
    return table(shown, precision=precision)


def panels(n: int, height: float, **settings: Any) -> tuple[Figure, Any]:
    """A figure of `n` panels side by side, `height` inches high, and its axes."""
    figure, axes = plt.subplots(1, n, figsize=(7, height), squeeze=False, **settings)
    return figure, axes[0]


def labels(methods: Iterable[str]) -> list[str]:
    """What a reader sees for each method."""
    return [label(method) for method in methods]


def errors(rows: pd.DataFrame, value: str = "value") -> np.ndarray:
    """Distance from the value to either end of its interval, (2, row)."""
    ends = rows[["low", "high"]].to_numpy(float).T
    return np.abs(ends - rows[value].to_numpy(float))


def lines(
    ax: Axes, rows: pd.DataFrame, x: str, y: str = "value", by: str = "method", **style: Any
) -> None:
    """Draw a line and a marker a group, labelled by the book's name of the method."""
    for (name, group), marker in zip(rows.groupby(by, sort=False), cycle(MARKERS), strict=False):
        settings: dict[str, Any] = {"marker": marker, "ms": 4, "lw": 1.2, "label": label(name)}
        settings.update(style)
        ax.plot(group[x], group[y], **settings)


def legend_above(
    figure: Figure, ax: Axes, ncols: int = 3, loc: Any = "outside upper center"
) -> None:
    """Put the legend of one of the axes above all of them."""
    figure.legend(*ax.get_legend_handles_labels(), ncols=ncols, loc=loc)


def log_ticks(ax: Axes, values: Sequence[float] | pd.Series, text: str) -> None:
    """Make the horizontal axis logarithmic, with ticks at these values only."""
    places = sorted(set(values))
    ax.set_xscale("log")
    ax.set_xticks(places, [text.format(value) for value in places])
    ax.minorticks_off()


def forest(
    rows: pd.DataFrame, xlabel: str, *, by: str = "task", chance: float | None = None
) -> Figure:
    """Draw rows of a table of results: a point and its interval a method, a colour a value of the column `by`.

    Parameters
    ----------
    rows : DataFrame
        Columns ``method, value, low, high`` and `by`, in the order in which they are drawn.
    xlabel : str
        What the value is, with its unit.
    by : str
        The column whose values get colours and, where there are several, a legend.
    chance : float, optional
        Where a dotted line is drawn: what a guess scores, or zero for a difference.
    """
    methods = list(dict.fromkeys(rows["method"]))[::-1]
    groups = list(dict.fromkeys(rows[by]))
    figure, ax = plt.subplots(figsize=(7, 1.0 + 0.3 * len(methods)))
    for number, name in enumerate(groups):
        part = rows[rows[by] == name]
        # Groups are set a little apart, so that their intervals do not hide one another.
        shift = 0.34 * (number - (len(groups) - 1) / 2)
        places = [methods.index(method) - shift for method in part["method"]]
        ax.errorbar(
            part["value"],
            places,
            xerr=np.nan_to_num(errors(part)),
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            ms=4,
            lw=1.2,
            capsize=2,
            label=str(name),
        )
    if chance is not None:
        ax.axvline(chance, color="black", lw=0.8, ls=":")
    ax.set_yticks(range(len(methods)), labels(methods))
    ax.set(xlabel=xlabel, ylim=(-0.6, len(methods) - 0.4))
    if len(groups) > 1:
        legend_above(figure, ax, ncols=len(groups))
    return figure
