"""The one format of results: a tidy table a run, which pages, model cards and the README read.

A row is one number with its interval. What the columns hold stands in `COLUMNS`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import pandas as pd

from mnemodyn.files import OutputError, begins_with, check_output, write_table

__all__ = [
    "COLUMNS",
    "KINDS",
    "METHODS",
    "label",
    "literal",
    "name_network",
    "read_results",
    "verdict",
    "write_results",
]

#: Columns of a table of results, and what they hold.
COLUMNS = {
    "data": "whose scans: HCP-7, ABIDE, ...",
    "task": "what was asked, such as `diagnosis` or `hidden entries`; words after a comma say under what condition",
    "method": "a name of METHODS, or a name that only this page knows",
    "against": "the method that `value` is a difference from; empty where it is none",
    "score": "name of the score: r2, balanced_accuracy, auc, r, ...",
    "value": "the number",
    "low": "lower end of its 95 % interval; missing where there is none",
    "high": "upper end",
    "p": "p value of a test of a difference, or against chance; missing where there is none",
    "n": "participants (or what `task` names) the number rests on",
    "kind": "real, SIMULATED, timing or published",
}
KINDS = ("real", "SIMULATED", "timing", "published")

# A method has one name in the whole book. A page adds names of its own by writing them out in `method`.
METHODS = {
    "model": "MnemoDyn",
    "zero": "zero (the parcel's mean)",
    "interpolation": "interpolation in time",
    "spatial_gaussian": "spatial Gaussian",
    "low_rank": "probabilistic PCA",
    "var": "VAR(1) smoother",
    "spatiotemporal_gaussian": "spatio-temporal Gaussian",
    "own_covariance": "spatio-temporal Gaussian, adapted to the scan",
    "front_end": "front end alone",
    "blocks_alone": "operator blocks without front end",
    "transformer": "patch transformer",
    "fc": "functional connectivity (FC)",
    "tangent": "tangent-space FC",
    "confounds": "confounds only",
    "site": "site only",
    "fc_unmoved": "FC, threshold not moved",
    "fc_harmonised": "FC, confounds regressed out",
    "fc_combat": "FC, ComBat between sites",
    "fc_pca": "PCA of FC",
    "fc_mlp": "perceptron on FC",
    "model+fc": "MnemoDyn and FC",
    "untrained": "MnemoDyn, random weights",
    "latent_mean": "MnemoDyn, latent mean",
    "latent_sd": "MnemoDyn, latent SD",
    "latent_max": "MnemoDyn, latent maximum",
    "scale_energy": "MnemoDyn, energy by scale",
    "last_frame": "MnemoDyn, last frame",
    "latent_correlation": "MnemoDyn, latent correlation",
    "response": "MnemoDyn, response",
    "adapted": "front end's covariance",
    "adapted+fc": "front end's covariance and FC",
    "draft_head": "draft's head, last frame",
    "finetune_last": "MnemoDyn, last block fine-tuned",
    "finetune_all": "MnemoDyn, all fine-tuned",
}


# What the network is where training kept the state before its first step.
UNTRAINED_BLOCKS = "front end alone (the step kept is 0)"


def label(method: str) -> str:
    """What a reader sees for a method: its name in METHODS, or the name itself."""
    return METHODS.get(method, method)


def literal(text: object) -> str:
    """Text from data as a line of Markdown that shows this very text: no link, no HTML, no cell of a table more."""
    line = " ".join(str(text).split())
    # An underscore within a word is text in any case, and so are other signs but at the beginning of a line.
    active = r"[\\`*{}\[\]<>&|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[-+=:%(]"
    line = re.sub(active, r"\\\g<0>", line)
    return re.sub(r"^([0-9]+)([.)])", r"\1\\\2", line)


def verdict(low: float, high: float) -> str:
    """``better``, ``worse``, ``identical`` or ``no difference shown``, by a difference's interval."""
    # Sums of equal numbers in another order differ in the sixteenth digit.
    if max(abs(low), abs(high)) < 1e-12:
        return "identical"
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "no difference shown"


def name_network(table: pd.DataFrame) -> pd.DataFrame:
    """A table of results for readers, in which the closed form does not go by the network's name.

    Where training kept step 0, network and front end are the same function, and their difference is zero.
    All rows of this network are then named UNTRAINED_BLOCKS.
    """
    compared = table[(table["method"] == "model") & (table["against"] == "front_end")]
    largest = compared[["low", "high"]].abs().max(axis=1, skipna=False)
    differs = set(compared.loc[~(largest < 1e-12), "data"])
    table = table.copy()
    rows = table["data"].isin(set(compared["data"]) - differs)
    for column in ("method", "against"):
        # "model, window by window" is the same network.
        named = table[column].str.replace(r"^model(?=,|$)", UNTRAINED_BLOCKS, regex=True)
        table[column] = named.where(rows, table[column])
    return table


def check_results(path: str | PathLike) -> None:
    """Refuse a table of results that would replace another file than one of these tables, or is no .csv."""
    if not os.fspath(path).endswith(".csv"):
        raise OutputError(f"{path}: a table of results is a .csv; name such a file")
    check_output(path, "table of results", begins_with(*list(COLUMNS)[:3]))


def write_results(path: str | PathLike, rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Check the rows, write them as CSV, and return them as a table.

    Parameters
    ----------
    path : str or Path
        The file ``NAME.csv`` beside the executed notebook ``NAME.ipynb``.
    rows : iterable of mappings
        By the names of COLUMNS. ``data, task, method, score, value`` and ``kind`` are needed;
        the others are missing where they are not given.

    Raises
    ------
    ValueError
        If a column is unknown or a needed one missing, a kind is not among KINDS, an interval has one
        end only or its ends in the wrong order, two rows say the same with different numbers, or `path`
        is there and no table of results.
    """
    check_results(path)
    table = pd.DataFrame([dict(row) for row in rows])
    unknown = sorted(set(table) - set(COLUMNS))
    if unknown:
        raise ValueError(f"{path}: unknown columns {unknown}; known are {list(COLUMNS)}")
    for name in ("data", "task", "method", "score", "value", "kind"):
        if name not in table or table[name].isna().any():
            raise ValueError(f"{path}: every row needs {name}")
    # The same columns in the same order in every table, so that tables can be put together.
    table = table.reindex(columns=list(COLUMNS))
    table["against"] = table["against"].astype(object).fillna("")
    wrong_kind = sorted(set(table["kind"]) - set(KINDS))
    if wrong_kind:
        raise ValueError(f"{path}: kind must be one of {', '.join(KINDS)}, got {wrong_kind}")
    has_low = table["low"].notna()
    has_high = table["high"].notna()
    if (has_low != has_high).any() or (table["low"] > table["high"]).any():
        raise ValueError(f"{path}: an interval needs both ends, the lower one first")
    place = ["data", "task", "method", "against", "score"]
    twice = table.duplicated(place)
    if twice.any():
        first = table.loc[twice, place].iloc[0].to_dict()
        raise ValueError(f"{path}: two rows for {first}")
    # Ten digits: where an array lies in memory decides the sixteenth.
    for name in ("value", "low", "high", "p"):
        table[name] = table[name].astype(float).round(10)
    table["n"] = table["n"].astype("Int64")
    write_table(path, table)
    return table


def read_results(path: str | PathLike) -> pd.DataFrame:
    """A table as `write_results` wrote it; a ValueError if it is not one."""
    numbers = ["value", "low", "high", "p"]
    try:
        missing = {name: [""] for name in numbers}
        table = pd.read_csv(path, keep_default_na=False, na_values=missing)
        if list(table) != list(COLUMNS):
            raise ValueError(f"expected the columns {list(COLUMNS)}, got {list(table)}")
        # pandas takes columns that the header does not name for names of the rows.
        if list(table.index) != list(range(len(table))):
            raise ValueError(f"there are more than {len(COLUMNS)} columns")
        table["n"] = pd.to_numeric(table["n"]).astype("Int64")
        return table.astype(dict.fromkeys(numbers, float))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of results, make it again: {error}") from None
