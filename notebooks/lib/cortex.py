"""ABIDE on the cortex: which parcels a diagnosis is read from, and whether the map is more than smoothness.

The score that a linear head gives a person is a sum over pairs of parcels. The part of each parcel in it is therefore
known exactly, half of a pair to either end.
"""

from collections.abc import Iterable, Iterator, Sequence

import nibabel
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from lib import inside
from lib.atlas import NETWORKS
from lib.atlas import networks as networks_of
from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.atlas import schaefer400_tian3
from mnemodyn.data.scans import Scan
from mnemodyn.evaluate.reconstruction import Network, fill, hide, squares
from mnemodyn.splits import repeated_folds

PENALTY = 5e-4  # inverse, of 19,900 standardised edges


def halves(table: pd.DataFrame, target: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For either half of the labelled people: their rows of the table, and the rows of everybody else.

    Members of a family of the half are not among the others. The others come in a random order.
    """
    labelled = np.flatnonzero(table[target].notna())
    people = table.loc[labelled].reset_index(drop=True)
    folds = repeated_folds(people, target, n_folds=2, n_repeats=1)
    for _, _, _, rows in folds.split(people["participant_id"]):
        mine = labelled[rows]
        inside_half = set(table.loc[mine, "participant_id"])
        families = set(table.loc[mine, "family"].dropna()) - {""}
        others = ~table["participant_id"].isin(inside_half) & ~table["family"].isin(families)
        yield mine, np.random.default_rng(0).permutation(np.flatnonzero(others))


def filled_by_parcel(
    checkpoint: Checkpoint,
    scans: Sequence[Scan],
    *,
    hidden_share: float,
    mask_window: int,
    window: int,
    seed: int,
) -> np.ndarray:
    """Squared errors and squares of the hidden entries of each parcel, summed over scans: (2, parcel).

    Scans are filled `window` frames at a time, as the network was trained.
    """
    asked = {"hidden_share": hidden_share, "mask_window": mask_window, "seed": seed}
    hidden = hide(scans, checkpoint.require_scaling(), **asked)
    filled = fill(Network(checkpoint.model), hidden, window=window)
    sums = [squares(*pair).sum(1) for pair in zip(hidden, filled, strict=True)]
    return np.sum(sums, axis=0)


def parts_of_score(
    features: np.ndarray, table: pd.DataFrame, target: str, case: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """What each parcel adds to a person's score, (scan, parcel), by heads fitted on others; AUC of every fold.

    `features` (scan, edge) are in the order of ``numpy.triu_indices``; `case` (scan,) is bool.
    """
    areas = []
    found: np.ndarray | None = None
    folds = repeated_folds(table, target, n_repeats=1)
    for _, _, train, test in folds.split(table["participant_id"]):
        scaler = StandardScaler().fit(features[train])
        head = LogisticRegression(C=PENALTY, max_iter=1000)
        head.fit(scaler.transform(features[train]), case[train])
        edges = scaler.transform(features[test]) * head.coef_
        parts = inside.parcel_shares(edges)
        if found is None:
            found = np.zeros((len(table), parts.shape[1]))
        found[test] = parts
        areas.append(float(roc_auc_score(case[test], edges.sum(1))))
    assert found is not None
    return found, areas


def connectivity(scans: Iterable[Scan]) -> np.ndarray:
    """Fisher-z correlations of the scans themselves, (scan, edge), in the order of the read-out ``response``."""
    rows = []
    for scan in scans:
        edges = np.triu_indices(len(scan.parcels), 1)
        correlation = np.corrcoef(scan.values.T)[edges]
        rows.append(np.arctanh(correlation.clip(-0.999999, 0.999999)))
    return np.array(rows)


def contrast(values: np.ndarray, case: np.ndarray) -> np.ndarray:
    """Mean of the cases less mean of the others, in standard errors.

    `values` (scan, parcel) and `case` (..., scan) give (..., parcel).
    """
    difference = 0.0
    variance = 0.0
    for sign, side in ((1, case.astype(float)), (-1, 1.0 - case)):
        n = side.sum(-1, keepdims=True)
        mean = side @ values / n
        difference = difference + sign * mean
        variance = variance + (side @ values**2 / n - mean**2) / n
    return difference / np.sqrt(variance)


def beyond_chance(
    values: list[np.ndarray], cases: list[np.ndarray], *, n_shuffles: int = 2000, seed: int = 0
) -> np.ndarray:
    """P value of every parcel: how often shuffled labels give a larger value anywhere, (parcel,).

    `values` (scan, parcel) and `cases` (scan,) are those of each half; labels stay in their half.
    """
    rng = np.random.default_rng(seed)
    stacked = np.concatenate(values)
    observed = np.abs(contrast(stacked, np.concatenate(cases)))
    shuffled = [
        np.concatenate([rng.permutation(part) for part in cases]) for _ in range(n_shuffles)
    ]
    largest = np.abs(contrast(stacked, np.array(shuffled))).max(1)
    return (1 + (largest[:, None] >= observed).sum(0)) / (1 + n_shuffles)


def centres(volume: str, n_parcels: int) -> np.ndarray:
    """Centre of every parcel of a label volume, (parcel, 3), in mm."""
    image = nibabel.load(volume)
    labels = np.asarray(image.dataobj).astype(int)
    places = np.array([np.argwhere(labels == i + 1).mean(0) for i in range(n_parcels)])
    return nibabel.affines.apply_affine(image.affine, places)


def networks(vertices: dict[str, np.ndarray], n_parcels: int) -> np.ndarray:
    """The network of seven that most of a parcel's vertices belong to; "" where fewer than ten have one.

    `vertices` has the parcel of every vertex of either hemisphere, 0 for none.
    """
    atlas = schaefer400_tian3()
    names = np.array(NETWORKS)
    network_of = networks_of(atlas)
    counts = np.zeros((n_parcels + 1, len(names)), int)
    for side, parcels in vertices.items():
        mine = (atlas.axis.name == f"CIFTI_STRUCTURE_CORTEX_{side}") & (atlas.labels > 0)
        for vertex, number in zip(atlas.axis.vertex[mine], atlas.labels[mine], strict=True):
            network = NETWORKS.index(network_of[number - 1])
            counts[parcels[vertex], network] += 1
    counts = counts[1:]
    return np.where(counts.max(1) >= 10, names[counts.argmax(1)], "")


def holm(p: dict[str, float]) -> dict[str, float]:
    """P values adjusted for their number (Holm 1979)."""
    adjusted = {}
    worst = 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        worst = max(worst, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = worst
    return adjusted
