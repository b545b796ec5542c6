"""What the page on speed reads from the table of ``benchmarks.speed``, and its figure."""

import matplotlib.pyplot as plt
import matplotlib.ticker
import pandas as pd
from matplotlib.figure import Figure

TASK = (
    r"(?P<section>\w+), (?P<step>\w+), (?P<scans>\d+) scans, (?P<frames>\d+) frames, "
    r"(?P<parcels>\d+) parcels"
)


def sizes(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that measure a size, with the columns section, step, scans, frames and parcels from their task."""
    found = table["task"].str.extract(TASK)
    table = table.join(found)[found["section"].notna()]
    return table.astype({"scans": int, "frames": int, "parcels": int})


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a size and method, with a column a score."""
    keys = ["section", "step", "scans", "frames", "parcels", "method"]
    return rows.pivot_table(index=keys, columns="score", values="value", sort=False).reset_index()


def ratio(rows: pd.DataFrame, over: str, under: str, column: str = "method") -> pd.Series:
    """Each score of one method (or size, by `column`) divided by that of another."""
    scores = rows.pivot_table(index="score", columns=column, values="value")
    return scores[over] / scores[under]


def sweep(rows: pd.DataFrame, by: str, label: str) -> Figure:
    """Seconds and memory of a training step against one size, a line a method; axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.9))
    for ax, score in zip(axes, ("seconds", "MiB"), strict=True):
        for method, group in wide(rows).groupby("method", sort=False):
            # A peak under one MiB is below what the memory of a process can tell.
            values = group[score] if score == "seconds" else group[score].where(group[score] >= 1)
            ax.plot(group[by], values, "o-", ms=4, lw=1.2, label=method)
        places = sorted(set(rows[by]))
        ax.set(xscale="log", yscale="log", xlabel=label, ylabel=f"{score} a step")
        ax.set_xticks(places, [f"{place:,}" for place in places])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside upper center")
    return figure
