"""Figures of the book. Every function draws on a new figure and returns it; `show` puts it on the page."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.spatial import cKDTree

from mnemodyn.data.atlas import NETWORKS, Atlas, cortex_surfaces, greyordinates
from mnemodyn.data.scans import Scan
from mnemodyn.evaluate import LABELS

if TYPE_CHECKING:
    from IPython.display import HTML

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
MARKERS = "os^vDPX*"
SLOW = 0.1  # Hz, as in lib.quality
OUTLYING = 3.5  # robust z, as in lib.quality


def use_style() -> None:
    """Set fonts and colours for the figures of the book."""
    plt.rc("figure", figsize=(7, 3), dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("axes", prop_cycle=plt.cycler(color=COLOURS))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("font", size=9)
    plt.rc("legend", frameon=False)
    plt.rc("svg", hashsalt="mnemodyn", fonttype="path")  # the same drawing gives the same bytes
    # Matplotlib's own font, not another version of it that a machine may have: letters are drawn as paths.
    fonts = font_manager.fontManager
    fonts.ttflist = [entry for entry in fonts.ttflist if not entry.name.startswith("DejaVu Sans")]
    for path in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf")):
        fonts.addfont(path)


def svg(figure: Figure) -> bytes:
    """A figure as a file's content, the same for the same drawing; it is closed."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    return stream.getvalue()


class show:
    """A figure (or what `svg` made of one), its caption (what is seen, n, what an interval is), and alternative text.

    A notebook's cell ends with it. The figure is closed.
    """

    def __init__(self, figure: Figure | bytes, *, caption: str, alt: str):
        self.caption, self.alt = caption, alt
        self.source = base64.b64encode(
            figure if isinstance(figure, bytes) else svg(figure)
        ).decode()

    def _repr_html_(self) -> str:
        return (
            f'<figure style="margin:1em 0"><img alt="{html.escape(self.alt)}" style="max-width:100%;height:auto" '
            f'src="data:image/svg+xml;base64,{self.source}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )

    def __repr__(self) -> str:
        return f"[figure] {self.caption}"


def table(frame: pd.DataFrame, *, precision: int = 3) -> "HTML":
    """A data frame as a table of the page, numbers to `precision` digits, nothing of the process in it."""
    from IPython.display import HTML

    def number(value: float) -> str:
        return "" if pd.isna(value) else f"{value:.{precision}f}".replace("-", "\N{MINUS SIGN}")

    frame = frame.reset_index(drop=True)
    columns = frame.select_dtypes("floating").columns
    words = [
        name
        for name in frame.select_dtypes(["object", "str"])
        if frame[name].astype(str).str.match("[A-Za-z]").any()
    ]
    style = frame.style.format(dict.fromkeys(columns, number)).hide(axis="index")
    style = style.set_td_classes(pd.DataFrame("text", frame.index, words))
    return HTML(style.set_uuid("table").to_html())


def _seconds(n: int, t_r: float) -> np.ndarray:
    return np.arange(n) * t_r


def _row(n: int, height: float, **settings: Any) -> tuple[Figure, Any]:
    """A figure of `n` panels side by side."""
    figure, axes = plt.subplots(1, n, figsize=(7, height), squeeze=False, **settings)
    return figure, axes[0]


def _named(methods: Iterable) -> list[str]:
    return [LABELS.get(method, method) for method in methods]


def _lines(
    ax: Axes, rows: pd.DataFrame, x: str, y: str = "r2", by: str = "method", **style
) -> None:
    """A line and a marker a group, by the names of the book."""
    for (name, group), marker in zip(rows.groupby(by, sort=False), cycle(MARKERS), strict=False):
        ax.plot(
            group[x],
            group[y],
            **{"marker": marker, "ms": 4, "lw": 1.2, "label": LABELS.get(name, name)} | style,
        )


def _errors(rows: pd.DataFrame, value: str) -> np.ndarray:
    """From the value to either end of its interval, (2, row)."""
    return np.abs(rows[["low", "high"]].to_numpy().T - rows[value].to_numpy())


def _across(ax: Axes, along: str = "x", at: float = 0, **style) -> None:
    """A black line across the panel."""
    style = {"color": "black", "lw": 0.8, **style}
    (ax.axvline if along == "y" else ax.axhline)(at, **style)


def _legend(figure: Figure, ax: Axes, ncols: int = 3, loc: Any = "outside upper center") -> None:
    """That of one of the axes, above all of them."""
    figure.legend(*ax.get_legend_handles_labels(), ncols=ncols, loc=loc)


def _ticks(ax: Axes, values: Sequence[float] | pd.Series, text: str) -> None:
    """On a logarithmic axis, at these values only."""
    at = sorted(set(values))
    ax.set_xscale("log")
    ax.set_xticks(at, [text.format(value) for value in at])
    ax.minorticks_off()


def carpet(scan: Scan) -> Figure:
    """All parcels of a scan as an image, and two as lines; both in SD of the parcel, censored frames marked."""
    z = (scan.values - scan.values.mean(0)) / np.where(scan.constant, 1, scan.values.std(0))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4), sharex=True, height_ratios=[2, 1])
    t, end = _seconds(len(z), scan.t_r), scan.n_frames * scan.t_r
    style: dict = {"aspect": "auto", "cmap": "gray", "interpolation": "none"}
    image = top.imshow(z.T, vmin=-3, vmax=3, extent=(0, end, z.shape[1], 0), **style)
    top.set_ylabel("parcel")
    figure.colorbar(image, ax=top, label="SD")
    for i in range(2):
        bottom.plot(t, z[:, i], lw=0.7, label=scan.parcels[i])
    if scan.censored is not None and scan.censored.any():
        at = t[scan.censored]
        bottom.plot(
            at, np.full(len(at), bottom.get_ylim()[0]), "|", color=COLOURS[1], label="censored"
        )
    bottom.set(xlabel="time (s)", ylabel="SD", xlim=(0, end))
    bottom.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 0.97), borderpad=0)
    return figure


def spectra(measured: Sequence[tuple[np.ndarray, np.ndarray]], t_r: Sequence[float]) -> Figure:
    """Power spectra (Hz, per Hz) with white noise: up to 20 as lines, more as median and 90 % of the scans."""
    figure, ax = plt.subplots()
    nyquist = 0.5 / np.asarray(t_r)
    if len(measured) <= 20:
        for i, (frequency, power) in enumerate(measured):
            ax.plot(
                frequency,
                power,
                color=COLOURS[0],
                alpha=0.6,
                lw=1,
                label="scans" if i == 0 else None,
            )
    else:
        # The lowest frequencies differ with the length of a scan; beyond the slowest sampling scans drop out.
        grid = np.linspace(max(f[1] for f, _ in measured), nyquist.max(), 200)
        power = np.stack([np.interp(grid, f, p, right=np.nan) for f, p in measured])
        low, median, high = np.nanpercentile(power, [5, 50, 95], axis=0)
        ax.fill_between(
            grid, low, high, color=COLOURS[0], alpha=0.3, lw=0, label="90 % of the scans"
        )
        ax.plot(grid, median, color=COLOURS[0], label="median")
    for i, end in enumerate(np.unique(nyquist.round(6))):
        label = "white noise of the same variance" if i == 0 else None
        ax.plot([0, end], [1 / end, 1 / end], color=COLOURS[1], ls="--", lw=1, label=label)
    ax.axvspan(0, SLOW, color="0.92", zorder=0, label=f"below {SLOW} Hz")
    ax.set(
        xlabel="frequency (Hz)",
        ylabel="power (SD² per Hz)",
        xlim=(0, nyquist.max()),
        ylim=(0, None),
    )
    ax.legend()
    return figure


MEASURES = {
    "fc_similarity": "similarity of connectivity (r)",
    "lag1": "lag-1 autocorrelation (r)",
    "mean_fd": "mean FD (mm)",
}


def outlying(measured: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Every scan by the measures that are known, a point each; those that stand out in one are crosses in it.

    `measured` is the table of `mnemodyn.data.quality.survey`, `found` is of `mnemodyn.data.quality.outlying`.
    """
    known = {name: label for name, label in MEASURES.items() if measured[name].notna().any()}
    figure, axes = _row(len(known), 2.4)
    height = np.random.default_rng(0).uniform(
        -1, 1, len(measured)
    )  # so that equal values do not hide one another
    for ax, (name, measure) in zip(axes, known.items(), strict=True):
        far, values = found["reasons"].str.contains(name), measured[name]
        ax.scatter(
            values[~far], height[~far], s=12, color=COLOURS[0], alpha=0.6, lw=0, label="scans"
        )
        label = f"robust z beyond {OUTLYING}"
        ax.scatter(values[far], height[far], s=24, marker="x", lw=1, color=COLOURS[1], label=label)
        ax.axvline(values.median(), color="black", lw=0.8, label="median")
        ax.set(
            xlabel=measure, yticks=[], ylim=(-2, 2), xscale="log" if name == "mean_fd" else "linear"
        )
        ax.spines["left"].set_visible(False)
        if name == "mean_fd":
            ax.xaxis.set_major_formatter("{x:g}")
    _legend(figure, axes[0])
    return figure


VIEWS = [("LEFT", "lateral"), ("LEFT", "medial"), ("RIGHT", "medial"), ("RIGHT", "lateral")]


def _image(path: str | Path) -> Any:
    import nibabel  # takes a while

    return nibabel.load(path)


def _surfaces() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Points (vertex, 3) in mm and faces (face, 3) of either hemisphere."""
    paths = zip(("LEFT", "RIGHT"), cortex_surfaces(), strict=True)
    return {side: _image(path).agg_data(("pointset", "triangle")) for side, path in paths}


def _hemisphere(
    ax: Axes, surface: tuple[np.ndarray, np.ndarray], colours: np.ndarray, side: str, view: str
) -> None:
    """One view of a hemisphere, its vertices' colours (vertex, 3) shaded."""
    points, faces = surface
    corners = points[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    towards = (-1 if side == "LEFT" else 1) * (1 if view == "lateral" else -1)
    seen = np.flatnonzero(normal[:, 0] * towards > 0)
    seen = seen[np.argsort(corners[seen, :, 0].mean(1) * towards)]
    shaded = colours[faces[seen, 0]] * (0.55 + 0.45 * normal[seen, 0] * towards)[:, None]
    style: dict = {"edgecolors": "face", "linewidths": 0.2, "rasterized": True}
    drawn = matplotlib.collections.PolyCollection(
        corners[seen][:, :, 1:] * [towards, 1], facecolors=shaded, **style
    )
    ax.add_collection(drawn)
    ax.autoscale()
    ax.set(aspect="equal", title=f"{side.lower()}, {view}")
    ax.set_axis_off()


def vertex_parcels(volume: str | Path, reach: float = 6.0) -> dict[str, np.ndarray]:
    """Parcel of every vertex of the drawn cortex: that of the nearest labelled point of a volume in MNI space.

    `volume` is a NIfTI of labels, 0 for none. A vertex farther than `reach` (mm) from any parcel has none. Gives an
    ndarray of int, shape (vertex,), for ``LEFT`` and ``RIGHT``: 0 for none, as on the medial wall.
    """
    from nibabel.affines import apply_affine

    image = _image(volume)
    labels = np.asarray(image.dataobj).astype(int)
    tree = cKDTree(apply_affine(image.affine, np.argwhere(labels)))
    known, parcels = np.append(labels[labels > 0], 0), {}
    for (side, (points, _)), wall in zip(_surfaces().items(), greyordinates(), strict=False):
        nearest = tree.query(points, distance_upper_bound=reach)[1]
        parcels[side] = np.where(_image(wall).darrays[0].data > 0, known[nearest], 0)
    return parcels


def cortex(maps: dict[str, np.ndarray], vertices: dict[str, np.ndarray]) -> Figure:
    """Values of parcels on the cortex, a row a map: those with negative entries around zero, others from least to most.

    A map has shape (parcel,); NaN is drawn in grey, as is what has no parcel. `vertices` are of `vertex_parcels`.
    """
    surfaces = _surfaces()
    figure = plt.figure(figsize=(7, 2.1 * len(maps)))
    for part, (label, values) in zip(
        figure.subfigures(len(maps), 1, squeeze=False)[:, 0], maps.items(), strict=True
    ):
        low, high = np.nanquantile(values, [0.02, 0.98])
        signed = low < 0 < high
        top = max(-low, high)
        norm = matplotlib.colors.Normalize(-top if signed else low, top if signed else high)
        shown = matplotlib.cm.ScalarMappable(norm, "RdBu_r" if signed else "cividis")
        light = np.where(
            np.isnan(values)[:, None], 0.85, shown.to_rgba(np.nan_to_num(values))[:, :3]
        )
        light = np.vstack([np.full((1, 3), 0.85), light])
        axes = part.subplots(1, 4)
        for ax, (side, view) in zip(axes, VIEWS, strict=True):
            _hemisphere(ax, surfaces[side], light[vertices[side]], side, view)
        part.colorbar(
            shown,
            ax=axes,
            label=label,
            orientation="horizontal",
            shrink=0.4,
            aspect=40,
            extend="both",
        )
    return figure


def atlas(drawn: Atlas) -> Figure:
    """Networks of an atlas on the cortex, lateral and medial, and how many parcels each has."""
    colours = dict(
        zip([*NETWORKS, "Subcortex", ""], [*COLOURS[:6], "#F0E442", "0.6", "0.85"], strict=True)
    )
    figure = plt.figure(figsize=(7, 4))
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 0.9])
    light = np.array(
        [matplotlib.colors.to_rgb(colours.get(n, "0.85")) for n in drawn.networks] + [(0.85,) * 3]
    )
    surfaces = _surfaces()
    for side, view in VIEWS:
        mine = drawn.axis.name == f"CIFTI_STRUCTURE_CORTEX_{side}"
        labels = np.zeros(len(surfaces[side][0]), int)
        labels[drawn.axis.vertex[mine]] = drawn.labels[mine]
        ax = figure.add_subplot(grid[int(view == "medial"), int(side == "RIGHT")])
        _hemisphere(ax, surfaces[side], light[labels - 1], side, view)
    ax = figure.add_subplot(grid[:, 2])
    counts = (
        pd.Series(drawn.networks)
        .value_counts()
        .reindex([n for n in colours if n in drawn.networks])[::-1]
    )
    bars = ax.barh(
        [n or "other" for n in counts.index], counts, color=[colours[n] for n in counts.index]
    )
    ax.bar_label(bars, padding=2)
    ax.set(xlabel="parcels")
    ax.margins(x=0.15)
    return figure


def connectivity(matrix: np.ndarray, title: str) -> Figure:
    """A matrix of Pearson correlations between parcels, in the order of the atlas."""
    figure, ax = plt.subplots(figsize=(4.6, 3.8))
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
    ax.set(xlabel="parcel", ylabel="parcel", title=title)
    figure.colorbar(image, ax=ax, label="Pearson r")
    return figure


SCORES = {
    "val_r2_hidden": "R², hidden entries",
    "val_r2_clean": "R², clean signal",
    "val_r2": "R², what was shown",
    "val_r2_latent": "R², embeddings",
}


def _curve(ax: Axes, history: pd.DataFrame, column: str, label: str, **style) -> None:
    ax.plot(history["epoch"], history[column], "o-", ms=3, **style)
    ax.set(xlabel="epoch", ylabel=label)
    ax.xaxis.set_major_locator(
        matplotlib.ticker.MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True)
    )


def learning_curve(history: pd.DataFrame, metric: str = "val_r2_hidden") -> Figure:
    """Training loss, and the averaged weights' score on the validation scans."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
    _curve(left, history, "train_loss", "training loss")
    _curve(right, history, metric, f"validation {SCORES.get(metric, metric)}", color=COLOURS[2])
    return figure


def objective_curves(histories: dict[str, pd.DataFrame], metrics: dict[str, str]) -> Figure:
    """Validation score over epochs, a panel an objective: each has a score of its own, so the axes differ."""
    figure, axes = _row(len(histories), 2.3)
    for ax, (name, history) in zip(axes, histories.items(), strict=True):
        _curve(ax, history, metrics[name], SCORES.get(metrics[name], metrics[name]))
        ax.set_title(name)
    return figure


def r2_lines(rows: pd.DataFrame, by: str, label: str) -> Figure:
    """R2 against a number, a line a method."""
    figure, ax = plt.subplots()
    _lines(ax, rows, by)
    _across(ax)
    ax.set(xlabel=label, ylabel="R², hidden entries")
    _legend(figure, ax)
    return figure


def r2_parcels(rows: pd.DataFrame) -> Figure:
    """R2 of every parcel: a point a parcel, the median as a line, a row a method."""
    groups = list(rows.groupby("method", sort=False))[::-1]
    figure, ax = plt.subplots(figsize=(7, 0.6 + 0.4 * len(groups)))
    for y, (_, group) in enumerate(groups):
        ax.plot(group["r2"], np.full(len(group), y), "o", ms=3, alpha=0.4, color=COLOURS[0], mew=0)
        ax.vlines(group["r2"].median(), y - 0.3, y + 0.3, color=COLOURS[1], lw=2)
    ax.set_yticks(range(len(groups)), _named(name for name, _ in groups))
    _across(ax, "y")
    ax.set_xlabel("R² of a parcel, hidden entries")
    return figure


def filled_stretches(
    x: np.ndarray,
    hidden: np.ndarray,
    fills: dict[str, np.ndarray],
    parcels: dict[int, str],
    t_r: float,
) -> Figure:
    """What methods put into the hidden stretches of a few parcels of one window, (time, parcel) each."""
    figure, axes = plt.subplots(
        len(parcels), 1, figsize=(7, 1.7 * len(parcels)), sharex=True, squeeze=False
    )
    t = _seconds(len(x), t_r)
    for ax, (i, name) in zip(axes[:, 0], parcels.items(), strict=True):
        ax.fill_between(
            t, 0, 1, where=hidden[:, i], transform=ax.get_xaxis_transform(), color="0.92", lw=0
        )
        ax.plot(t, x[:, i], color="black", lw=0.9, label="scan")
        for (method, fill), colour in zip(fills.items(), COLOURS, strict=False):
            shown = np.where(hidden[:, i], fill[:, i], np.nan)
            ax.plot(t, shown, color=colour, lw=1.4, label=LABELS.get(method, method))
        ax.set_ylabel("SD")
        ax.set_title(name, loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("time (s)")
    _legend(figure, axes[0, 0], ncols=min(len(fills) + 1, 4))
    return figure


def reconstruction(rows: pd.DataFrame) -> Figure:
    """R2 on hidden entries a method, with its interval."""
    rows = rows.sort_values("r2")
    figure, ax = plt.subplots(figsize=(7, 0.5 + 0.4 * len(rows)))
    place = np.arange(len(rows))
    colours = [COLOURS[0] if m == "model" else "0.6" for m in rows["method"]]
    ax.barh(
        place, rows["r2"], color=colours, xerr=_errors(rows, "r2"), error_kw={"lw": 1, "capsize": 2}
    )
    ax.set_yticks(place, _named(rows["method"]))
    _across(ax, "y")
    for y, value, high in zip(place, rows["r2"], rows["high"], strict=True):
        ax.text(max(high, 0) + 0.01, float(y), f"{value:.3f}", va="center")
    ax.set_xlabel("R² on hidden entries of held-out people")
    ax.margins(x=0.12)
    return figure


def differences(rows: pd.DataFrame) -> Figure:
    """R2 of the network minus that of each method (``data, method, value, low, high``), one panel a data set."""
    sets = list(rows["data"].unique())
    figure, axes = _row(len(sets), 0.9 + 0.3 * max(rows.groupby("data").size()), sharey=True)
    order = rows.groupby("method")["value"].mean().sort_values(ascending=False).index
    for ax, name in zip(axes, sets, strict=True):
        part = rows[rows["data"] == name].set_index("method").reindex(order)
        bars: dict = {
            "xerr": _errors(part, "value"),
            "fmt": "o",
            "ms": 4,
            "capsize": 2,
            "color": COLOURS[0],
        }
        ax.errorbar(part["value"], np.arange(len(part)), **bars)
        _across(ax, "y")
        ax.set_title(name)
    axes[0].set_yticks(np.arange(len(order)), _named(order))
    figure.supxlabel("R² of MnemoDyn minus the method's", fontsize=9)
    return figure


def reconstruction_grid(rows: pd.DataFrame) -> Figure:
    """R2 against the length of the hidden stretches, one panel a hidden share."""
    shares = sorted(rows["hidden_share"].unique())
    figure, axes = _row(len(shares), 2.9, sharey=True)
    for ax, share in zip(axes, shares, strict=True):
        _lines(ax, rows[rows["hidden_share"] == share], "seconds")
        ax.set(title=f"{share:.0%} hidden", xlabel="hidden stretch (s)")
        _ticks(ax, rows["seconds"], "{:.3g}")
        _across(ax)
    axes[0].set_ylabel("R², hidden entries")
    _legend(figure, axes[0])
    return figure


def identification(rows: pd.DataFrame, chance: float) -> Figure:
    """Accuracy of identification against the length of the windows, a line a set of features."""
    figure, ax = plt.subplots(figsize=(7, 3.6))
    _lines(ax, rows, "seconds", "accuracy", "features", ms=5)
    ax.axhline(chance, color="black", ls=":", label="chance")
    ax.set(xlabel="length of the window (s)", ylabel="identified", ylim=(0, 1.05))
    _ticks(ax, rows["seconds"], "{:.0f}")
    _legend(figure, ax, loc="outside right upper", ncols=1)
    return figure


SPEED = {  # method of a benchmark: how the book calls it
    "draft": "plain form",
    "eager": "field in memory",
    "lean": "this package",
    "compiled": "this package, compiled",
    "transformer": "transformer",
}


def speed(rows: pd.DataFrame, by: str, label: str) -> Figure:
    """Seconds a step and memory against one size, a line a method; both axes logarithmic.

    `rows` are one sweep of ``benchmarks.speed``, `by` is the column of the size, `label` that of its axis.
    """
    figure, axes = _row(2, 2.9)
    mebibytes = (
        rows["peak_bytes"] / 2**20
    )  # a peak under one is below what the memory of a process can tell
    rows = rows.assign(method=rows["method"].map(SPEED), mebibytes=mebibytes.where(mebibytes >= 1))
    for ax, y, title in zip(
        axes, ("seconds", "mebibytes"), ("seconds a step", "MiB a step needs"), strict=True
    ):
        _lines(ax, rows, by, y)
        ax.set(yscale="log", xlabel=label, ylabel=title)
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        _ticks(ax, rows[by], "{:,}")
    _legend(figure, axes[0], ncols=4)
    return figure


def ablations(rows: pd.DataFrame, label: str = "change of R² on hidden entries") -> Figure:
    """Forest plot: what each cell changes, with its interval; filled where the interval leaves zero out.

    `rows` has ``label, group, value, low, high`` (the last two may be missing); `label` is that of the axis.
    """
    rows = rows.sort_values("value", ascending=False).reset_index(drop=True)
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.21 * len(rows)))
    for (name, group), marker, colour in zip(
        rows.groupby("group"), cycle(MARKERS), cycle(COLOURS), strict=False
    ):
        ax.plot([], [], marker, color=colour, ms=5, label=name)
        ax.hlines(group.index, group["low"], group["high"], color=colour, lw=1.2)
        clear = (group["low"] > 0) | (group["high"] < 0)
        for kept, fill in ((clear, colour), (~clear, "white")):
            ax.plot(
                group.loc[kept, "value"],
                group.index[kept],
                marker,
                ms=5,
                mec=colour,
                mfc=fill,
                ls="none",
            )
    _across(ax, "y")
    ax.set_yticks(rows.index, rows["label"])
    ax.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6))
    # Most changes are small beside a few: linear near zero, logarithmic beyond.
    ax.set_xscale("symlog", linthresh=0.01)
    ends = max(0.01, float(rows[["value", "low", "high"]].abs().max().max()))
    ticks = [t for t in (0.01, 0.03, 0.1, 0.3, 1, 3) if t <= 1.3 * ends]
    low, high = (
        float(rows[["value", "low"]].min().min()),
        float(rows[["value", "high"]].max().max()),
    )
    ticks = [-t for t in ticks[::-1] if -t > 1.5 * low] + [0] + [t for t in ticks if t < 1.5 * high]
    ax.set_xticks(
        ticks, [f"{t:+g}".replace("-", "\N{MINUS SIGN}") if t else "0" for t in ticks], fontsize=7
    )
    ax.minorticks_off()
    ax.grid(axis="x", color="0.9", lw=0.6)
    ax.set_axisbelow(True)
    _legend(figure, ax, ncols=5)
    return figure


def matrices(drawn: dict[str, np.ndarray], label: str, *, names: Sequence[str] = ()) -> Figure:
    """Matrices side by side, each on its own scale: those with negative entries around zero, others up from it.

    `names` are those of rows and columns, of which about twelve are written at the first matrix. Colours end at the
    99th percentile.
    """
    figure, axes = _row(len(drawn), 1.4 + 5.2 / len(drawn))
    for ax, (title, matrix) in zip(axes, drawn.items(), strict=True):
        signed, top = matrix.min() < 0, np.quantile(np.abs(matrix), 0.99)
        limits = {"cmap": "RdBu_r", "vmin": -top} if signed else {"cmap": "cividis", "vmin": 0}
        image = ax.imshow(matrix, interpolation="none", vmax=top, **limits)
        ax.set_title(title, fontsize=9)
        bar = figure.colorbar(image, ax=ax, shrink=0.6, orientation="horizontal", pad=0.04)
        bar.locator = matplotlib.ticker.MaxNLocator(2)
        bar.update_ticks()
        ax.locator_params(integer=True)
        if names:
            ax.set(xticks=[], yticks=[])
    if names:
        every = max(1, len(names) // 12)
        axes[0].set_yticks(range(0, len(names), every), names[::every], fontsize=6)
    figure.supxlabel(label, fontsize=9)
    return figure


def field(responses: Sequence[dict], t_r: float) -> Figure:
    """Singular values of each block's mean field (of `mnemodyn.evaluate.inside.field_response`), and z in a window."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), width_ratios=[1, 1.6])
    for i, (found, marker) in enumerate(zip(responses, "os^vDP", strict=False), 1):
        left.plot(
            np.arange(1, len(found["values"]) + 1),
            found["values"],
            marker,
            ls="-",
            ms=3,
            label=f"block {i}",
        )
    left.set(xlabel="singular value", ylabel="share of the sum", ylim=(0, None))
    left.legend()
    z = responses[0]["z"]
    for k in range(z.shape[1]):
        right.plot(_seconds(len(z), t_r), z[:, k], lw=0.9)
    right.set(xlabel="time (s)", ylabel="z of block 1")
    return figure


def scales(shares: dict[str, np.ndarray], bands: Sequence[str]) -> Figure:
    """Share of the energy in each scale of the pyramid, a line a series, the slowest band first."""
    figure, ax = plt.subplots(figsize=(7, 3))
    parts = [
        pd.DataFrame({"series": name, "i": range(len(v)), "share": v[::-1]})
        for name, v in shares.items()
    ]
    _lines(ax, pd.concat(parts), "i", "share", "series")
    ax.set_xticks(range(len(bands)), list(bands)[::-1])
    ax.set(xlabel="band of the scale (Hz)", ylabel="share of the energy", ylim=(0, None))
    _legend(figure, ax, loc="outside right upper", ncols=1)
    return figure


def generated(found: dict[str, list[dict]]) -> Figure:
    """Spectra, similarity of FC and metastability of `mnemodyn.evaluate.inside.summarise`, a group a colour."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(7, 2.9), width_ratios=[1.6, 1, 1])
    for i, ((name, series), marker) in enumerate(zip(found.items(), "os^vDP", strict=False)):
        colour = COLOURS[i]
        left.plot(
            series[0]["frequency"], np.mean([s["power"] for s in series], 0), color=colour, lw=1.3
        )
        for ax, measure in ((middle, "fc_similarity"), (right, "metastability")):
            ax.plot(
                [i] * len(series),
                [s[measure] for s in series],
                marker,
                color=colour,
                ms=5,
                mfc="none",
                label=name,
            )
    left.set(xlabel="frequency (Hz)", ylabel="power (per Hz)", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    for ax, label in ((middle, "similarity of FC (r)"), (right, "metastability")):
        ax.set(xticks=[], xlim=(-0.6, len(found) - 0.4), ylabel=label)
    handles = dict(zip(*middle.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, ncols=len(found), loc="outside upper center")
    return figure


METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "auc": "ROC AUC",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "r": "Pearson r",
    "r_within_site": "r within sites",
    "r2": "R²",
    "mae": "mean absolute error",
    "mse_z": "MSE, z-scored target",
}


def downstream(
    reports: dict[str, dict], metric: str, chance: float | None, title: str = ""
) -> Figure:
    """A score a method with its interval, a colour a report of `mnemodyn.evaluate.downstream.report`.

    `reports` has them by their name in the legend. Chance is a dotted line.
    """
    names = list(
        dict.fromkeys(row["method"] for report in reports.values() for row in report["rows"])
    )[::-1]
    figure, ax = plt.subplots(figsize=(7, 1.2 + 0.3 * len(names)))
    for number, (label, report) in enumerate(reports.items()):
        rows = [row for row in report["rows"] if row[metric]["value"] is not None]
        place = [
            names.index(row["method"]) - 0.34 * (number - (len(reports) - 1) / 2) for row in rows
        ]
        value = np.array([row[metric]["value"] for row in rows])
        error = np.abs(
            [[row[metric][side] - row[metric]["value"] for row in rows] for side in ("low", "high")]
        )
        ax.errorbar(
            value, place, xerr=error, fmt="os^v"[number % 4], ms=4, lw=1.2, capsize=2, label=label
        )
    if chance is not None:
        _across(ax, "y", chance, ls=":")
    ax.set_yticks(range(len(names)), _named(names))
    ax.set(xlabel=METRICS[metric], title=title, ylim=(-0.6, len(names) - 0.4))
    if len(reports) > 1:
        _legend(figure, ax, ncols=len(reports))
    return figure


def scores(report: dict, metrics: Sequence[str]) -> pd.DataFrame:
    """A report as a table of texts: a row a method, value and interval a metric, n, folds and p."""

    def text(score: dict | None) -> str:
        if not score or score["value"] is None:
            return "failed"
        shown = f"{score['value']:.3f}"
        shown += f" ({score['low']:.3f} to {score['high']:.3f})" if score["low"] is not None else ""
        return shown.replace("-", "\N{MINUS SIGN}")

    rows = []
    for row in report["rows"]:
        line = {
            "method": LABELS.get(row["method"], row["method"]),
            "n": row["n"],
            "folds": row["n_folds"],
        }
        line |= {METRICS[metric]: text(row.get(metric)) for metric in metrics}
        p = row.get("p")
        rows.append(line | {"p": "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"})
    return pd.DataFrame(rows)


def scaling(panels: dict[str, pd.DataFrame], bar: float) -> Figure:
    """R2 with its interval against the size of something, a panel each, logarithmic; a line a method.

    `panels` has, by the label of the axis, rows with the size in the first column, and ``method, value, low, high``.
    The R2 `bar` is drawn across all of them.
    """
    figure, axes = _row(len(panels), 3.2, sharey=True)
    for ax, (label, rows) in zip(axes, panels.items(), strict=True):
        x = rows.columns[0]
        rows = rows.sort_values(
            [x, "method"]
        )  # one colour a method in every panel: the blocks come first
        _lines(ax, rows, x, "value")
        for line, (_, mine) in zip(ax.get_lines(), rows.groupby("method", sort=False), strict=True):
            ax.fill_between(
                mine[x], mine["low"], mine["high"], color=line.get_color(), alpha=0.15, lw=0
            )
        _across(ax, at=bar, ls=":")
        ax.set(xlabel=label, xscale="log")
    axes[0].set_ylabel("R², hidden entries")
    _legend(figure, axes[0], ncols=2)
    return figure
