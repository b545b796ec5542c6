"""Figures that one page of the book uses; each function draws on a new figure and returns it."""

from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.figures import (
    COLOURS,
    MARKERS,
    legend_above,
    lines,
    log_ticks,
    panels,
)
from lib.quality import OUTLYING, SLOW
from mnemodyn.data.scans import Scan
from mnemodyn.results import label

MEASURES = {
    "fc_similarity": "similarity of connectivity (r)",
    "lag1": "lag-1 autocorrelation (r)",
    "mean_fd": "mean FD (mm)",
}
SCORES = {
    "val_r2_hidden": "R², hidden entries",
    "val_r2_clean": "R², clean signal",
    "val_r2": "R², what was shown",
    "val_r2_latent": "R², embeddings",
    "val_r2_connectome": "R², connectivity",
}


def carpet(scan: Scan) -> Figure:
    """All parcels of a scan as an image, and two as lines; both in SD of the parcel, censored frames marked."""
    z = (scan.values - scan.values.mean(0)) / np.where(scan.constant, 1, scan.values.std(0))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4), sharex=True, height_ratios=[2, 1])
    t, end = np.arange(len(z)) * scan.t_r, scan.n_frames * scan.t_r
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


def outlying(measured: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Every scan by the measures that are known, a point each; those that stand out in one are crosses in it.

    `measured` is the table of `lib.quality.survey`, `found` is of `lib.quality.outlying`.
    """
    known = {name: label for name, label in MEASURES.items() if measured[name].notna().any()}
    figure, axes = panels(len(known), 2.4)
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
    legend_above(figure, axes[0])
    return figure


def connectivity(matrix: np.ndarray, title: str) -> Figure:
    """A matrix of Pearson correlations between parcels, in the order of the atlas."""
    figure, ax = plt.subplots(figsize=(4.6, 3.8))
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
    ax.set(xlabel="parcel", ylabel="parcel", title=title)
    figure.colorbar(image, ax=ax, label="Pearson r")
    return figure


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
    figure, axes = panels(len(histories), 2.3)
    for ax, (name, history) in zip(axes, histories.items(), strict=True):
        _curve(ax, history, metrics[name], SCORES.get(metrics[name], metrics[name]))
        ax.set_title(name)
    return figure


def r2_lines(rows: pd.DataFrame, by: str, xlabel: str) -> Figure:
    """R2 against a number, a line a method."""
    figure, ax = plt.subplots()
    lines(ax, rows, by)
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel=xlabel, ylabel="R², hidden entries")
    legend_above(figure, ax)
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
    t = np.arange(len(x)) * t_r
    for ax, (i, name) in zip(axes[:, 0], parcels.items(), strict=True):
        ax.fill_between(
            t, 0, 1, where=hidden[:, i], transform=ax.get_xaxis_transform(), color="0.92", lw=0
        )
        ax.plot(t, x[:, i], color="black", lw=0.9, label="scan")
        for (method, fill), colour in zip(fills.items(), COLOURS, strict=False):
            shown = np.where(hidden[:, i], fill[:, i], np.nan)
            ax.plot(t, shown, color=colour, lw=1.4, label=label(method))
        ax.set_ylabel("SD")
        ax.set_title(name, loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("time (s)")
    legend_above(figure, axes[0, 0], ncols=min(len(fills) + 1, 4))
    return figure


def identification(rows: pd.DataFrame, chance: float) -> Figure:
    """Accuracy of identification against the length of the windows, a line a set of features."""
    figure, ax = plt.subplots(figsize=(7, 3.6))
    lines(ax, rows, "seconds", "accuracy", "features", ms=5)
    ax.axhline(chance, color="black", ls=":", label="chance")
    ax.set(xlabel="length of the window (s)", ylabel="identified", ylim=(0, 1.05))
    log_ticks(ax, rows["seconds"], "{:.0f}")
    legend_above(figure, ax, loc="outside right upper", ncols=1)
    return figure


def duration(
    curves: dict[str, dict[str, np.ndarray]], minutes: Sequence[float], chance: float
) -> Figure:
    """Scores against minutes of scan, a panel a score, with bands; each curve is (length, 1 + resample)."""
    names = {"r2_edges": "R², edges", "r2_tangent": "R², tangent space", "identified": "identified"}
    figure, axes = panels(len(names), 4.2)
    for ax, (score, words) in zip(axes, names.items(), strict=True):
        for number, (method, scores) in enumerate(curves.items()):
            values = scores[score]
            low, high = np.quantile(values[:, 1:], [0.025, 0.975], axis=1)
            colour = COLOURS[number % len(COLOURS)]
            line = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "ms": 3, "lw": 1.2}
            ax.plot(minutes, values[:, 0], label=label(method), **line)
            ax.fill_between(minutes, low, high, color=colour, alpha=0.1, lw=0)
        log_ticks(ax, minutes, "{:.2g}")
        ax.set(xlabel="minutes of scan", ylabel=words)
        # A covariance of fewer frames than parcels is far below the mean; it would flatten the rest.
        best = max(scores[score][:, 0].max() for scores in curves.values())
        ax.set_ylim(-0.3, max(0.1, 1.15 * best))
        ax.axhline(0, color="black", lw=0.8, ls=":")
    axes[2].axhline(chance, color="black", lw=0.8, ls=":")
    axes[2].set_ylim(0, 1.02)
    legend_above(figure, axes[0], ncols=2)
    return figure


def minutes_needed(rows: pd.DataFrame, shortest: float, longest: float) -> Figure:
    """Minutes by method, a row a method and a panel a task; hollow where `longest` minutes are not enough."""
    tasks = list(dict.fromkeys(rows["task"]))
    methods = list(dict.fromkeys(rows["method"]))[::-1]
    figure, axes = panels(len(tasks), 1.2 + 0.3 * len(methods), sharey=True)
    for ax, task in zip(axes, tasks, strict=True):
        part = rows[rows["task"] == task]
        for _, row in part.iterrows():
            place = methods.index(row["method"])
            enough = row["method"] == "fc" or row["value"] < longest
            ax.plot([row["low"], row["high"]], [place, place], color=COLOURS[0], lw=1.5)
            inside = COLOURS[0] if enough else "white"
            ax.plot(row["value"], place, "o", ms=6, color=COLOURS[0], markerfacecolor=inside)
        for end in (shortest, longest):
            ax.axvline(end, color="black", lw=0.8, ls=":")
        ax.set(xlim=(0, longest * 1.05), xlabel="minutes of scan")
        ax.set_title(task.partition(": ")[2], fontsize=9)
        ax.grid(axis="y", lw=0.4)
    axes[0].set_yticks(range(len(methods)), [label(method) for method in methods])
    return figure


def matrices(drawn: dict[str, np.ndarray], xlabel: str, *, names: Sequence[str] = ()) -> Figure:
    """Matrices side by side, each on its own scale: those with negative entries around zero, others up from it.

    `names` are those of rows and columns, of which about twelve are written at the first matrix. Colours end at the
    99th percentile.
    """
    figure, axes = panels(len(drawn), 1.4 + 5.2 / len(drawn))
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
    figure.supxlabel(xlabel, fontsize=9)
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
        right.plot(np.arange(len(z)) * t_r, z[:, k], lw=0.9)
    right.set(xlabel="time (s)", ylabel="z of block 1")
    return figure


def scales(shares: dict[str, np.ndarray], bands: Sequence[str]) -> Figure:
    """Share of the energy in each scale of the pyramid, a line a series, the slowest band first."""
    figure, ax = plt.subplots(figsize=(7, 3))
    parts = [
        pd.DataFrame({"series": name, "i": range(len(v)), "share": v[::-1]})
        for name, v in shares.items()
    ]
    lines(ax, pd.concat(parts), "i", "share", "series")
    ax.set_xticks(range(len(bands)), list(bands)[::-1])
    ax.set(xlabel="band of the scale (Hz)", ylabel="share of the energy", ylim=(0, None))
    legend_above(figure, ax, loc="outside right upper", ncols=1)
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
    for ax, ylabel in ((middle, "similarity of FC (r)"), (right, "metastability")):
        ax.set(xticks=[], xlim=(-0.6, len(found) - 0.4), ylabel=ylabel)
    handles = dict(zip(*middle.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, ncols=len(found), loc="outside upper center")
    return figure
