"""Figures and tables of the pages that predict something about people."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib import figures
from mnemodyn.evaluate.scores import CHANCE, SCORES
from mnemodyn.results import COLUMNS, label, verdict

FIRST = {kind: scores[0] for kind, scores in SCORES.items()}
NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "macro_f1": "macro F1",
    "r": "r",
    "r_plain": "r, plain",
    "r_within_site": "r within sites",
    "r2": "R²",
    "mae": "MAE",
    "balanced_accuracy_fold_mean": "balanced accuracy, mean over sites",
    "r_fold_mean": "r, mean over sites",
    "fd_r": "r with FD",
    "site_share": "share of sites",
}


def as_results(rows: Iterable[dict]) -> pd.DataFrame:
    """Rows as a table with all columns of the tidy table."""
    table = pd.DataFrame(list(rows)).reindex(columns=list(COLUMNS))
    table["against"] = table["against"].astype(object).fillna("")
    return table


def spread(row: Any, sign: str = "") -> str:
    """A value and its interval in words."""
    if pd.isna(row["low"]):
        return f"{row['value']:{sign}.3f}"
    return f"{row['value']:{sign}.3f} ({row['low']:{sign}.3f} to {row['high']:{sign}.3f})"


def wide(rows: pd.DataFrame, scores: Sequence[str]) -> Any:
    """Scores side by side, a row a task and method, with their intervals where they have any."""
    rows = rows[rows["score"].isin(scores)]
    shown = pd.DataFrame({"task": rows["task"], "method": rows["method"].map(label)})
    shown["score"] = rows["score"].map(NAMES)
    shown["value"] = [spread(row) for _, row in rows.iterrows()]
    order = [NAMES[score] for score in scores if NAMES[score] in set(shown["score"])]
    index = ["task", "method"]
    shown = shown.pivot_table(
        index=index, columns="score", values="value", aggfunc="first", sort=False
    )
    return figures.table(shown[order].fillna("").reset_index())


def compared(rows: pd.DataFrame) -> Any:
    """Differences from the baseline with their verdicts."""
    shown = pd.DataFrame({"task": rows["task"], "method": rows["method"].map(label)})
    shown["score"] = rows["score"].map(NAMES)
    shown["difference"] = [spread(row, "+") for _, row in rows.iterrows()]
    shown["p"] = rows["p"].astype(float)
    shown["verdict"] = [_verdict(row) for _, row in rows.iterrows()]
    return figures.table(shown)


def _verdict(row: Any) -> str:
    """Better or worse where interval and test agree."""
    if row["low"] == row["high"] == 0:
        return "identical"
    found = verdict(row["low"], row["high"])
    if found != "no difference shown" and pd.notna(row["p"]) and row["p"] >= 0.05:
        return f"inconclusive ({found} by the interval, not by the test)"
    return found


def sentences(table: pd.DataFrame, target: str, kind: str) -> list[str]:
    """What a page says first of a target: scores, and differences of the network from FC."""
    rows = table[(table["task"] == target) & (table["score"] == FIRST[kind])]
    scores = rows[rows["against"] == ""].set_index("method")
    known = [name for name in ("model", "fc", "tangent", "confounds") if name in scores.index]
    if not known:
        return [f"- **{target}**: every method failed."]
    listed = ", ".join(f"{label(name)} {spread(scores.loc[name])}" for name in known)
    n = scores["n"].iloc[0]
    found = [f"- **{target}**, {NAMES[FIRST[kind]]} of {n} people: {listed}."]
    for _, row in rows[rows["against"] != ""].iterrows():
        if row["method"] in ("model", "model+fc", "adapted+fc"):
            p = "" if pd.isna(row["p"]) else f" (p {row['p']:.3f})"
            difference = f"{label(row['method'])} against FC alone: {spread(row, '+')}"
            found.append(f"  - {difference}, **{_verdict(row)}**{p}")
    return found


def scores(table: pd.DataFrame, target: str, kind: str) -> Figure:
    """The first score of a target by every method, in folds and with a site left out."""
    rows = table[(table["score"] == FIRST[kind]) & (table["against"] == "")]
    held_out = {target: "five folds", f"{target}, one site left out": "one site left out"}
    rows = rows[rows["task"].isin(held_out)]
    rows = rows.assign(task=rows["task"].map(held_out))
    return figures.forest(rows, NAMES[FIRST[kind]], by="task", chance=CHANCE[FIRST[kind]])


def by_cohort(table: pd.DataFrame) -> Figure:
    """The first score of every cohort's targets, a panel a kind of target, a colour a method."""
    plain = table[(table["against"] == "") & ~table["task"].str.contains(",")]
    n_places = plain.groupby("score")[["data", "task"]].apply(
        lambda rows: len(rows.drop_duplicates())
    )
    figure, axes = figures.panels(2, 1.2 + 0.36 * n_places.max())
    for ax, metric in zip(axes, FIRST.values(), strict=True):
        rows = plain[plain["score"] == metric]
        places = {
            place: -i for i, place in enumerate(dict.fromkeys(rows["data"] + ", " + rows["task"]))
        }
        methods = list(dict.fromkeys(rows["method"]))
        for number, method in enumerate(methods):
            part = rows[rows["method"] == method]
            y = np.array([places[place] for place in part["data"] + ", " + part["task"]])
            ax.errorbar(
                part["value"].astype(float),
                y + 0.2 * (1 - number),
                xerr=figures.errors(part),
                fmt=figures.MARKERS[number],
                ms=4,
                lw=1,
                color=figures.COLOURS[number],
                label=label(method),
            )
        ax.axvline(CHANCE[metric], color="black", ls=":", lw=1)
        ax.set_yticks(list(places.values()), list(places))
        ax.set_xlabel(f"SIMULATED: {NAMES[metric]}")
    figures.legend_above(figure, axes[0])
    return figure
