"""Maps on the cortex: each vertex has the colour of its nearest parcel."""

from pathlib import Path

import matplotlib
import matplotlib.collections
import matplotlib.pyplot as plt
import nibabel
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nibabel.affines import apply_affine
from scipy.spatial import cKDTree

from lib.atlas import NETWORKS, cortex_surfaces, networks
from lib.figures import COLOURS
from mnemodyn.data.atlas import Atlas, greyordinates

VIEWS = [("LEFT", "lateral"), ("LEFT", "medial"), ("RIGHT", "medial"), ("RIGHT", "lateral")]


def _surfaces() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Points (vertex, 3) in mm and faces (face, 3) of either hemisphere."""
    paths = zip(("LEFT", "RIGHT"), cortex_surfaces(), strict=True)
    return {side: nibabel.load(path).agg_data(("pointset", "triangle")) for side, path in paths}


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
    image = nibabel.load(volume)
    labels = np.asarray(image.dataobj).astype(int)
    tree = cKDTree(apply_affine(image.affine, np.argwhere(labels)))
    known, parcels = np.append(labels[labels > 0], 0), {}
    for (side, (points, _)), wall in zip(_surfaces().items(), greyordinates(), strict=False):
        nearest = tree.query(points, distance_upper_bound=reach)[1]
        parcels[side] = np.where(nibabel.load(wall).darrays[0].data > 0, known[nearest], 0)
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
    found = networks(drawn)
    figure = plt.figure(figsize=(7, 4))
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 0.9])
    light = np.array(
        [matplotlib.colors.to_rgb(colours.get(n, "0.85")) for n in found] + [(0.85,) * 3]
    )
    surfaces = _surfaces()
    for side, view in VIEWS:
        mine = drawn.axis.name == f"CIFTI_STRUCTURE_CORTEX_{side}"
        labels = np.zeros(len(surfaces[side][0]), int)
        labels[drawn.axis.vertex[mine]] = drawn.labels[mine]
        ax = figure.add_subplot(grid[int(view == "medial"), int(side == "RIGHT")])
        _hemisphere(ax, surfaces[side], light[labels - 1], side, view)
    ax = figure.add_subplot(grid[:, 2])
    counts = pd.Series(found).value_counts().reindex([n for n in colours if n in found])[::-1]
    bars = ax.barh(
        [n or "other" for n in counts.index], counts, color=[colours[n] for n in counts.index]
    )
    ax.bar_label(bars, padding=2)
    ax.set(xlabel="parcels")
    ax.margins(x=0.15)
    return figure
