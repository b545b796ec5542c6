"""What figures show of an atlas: the network of each parcel, and surfaces to draw on."""

import re
from pathlib import Path

from mnemodyn.data.atlas import Atlas
from mnemodyn.data.formats import installed_files

# Networks of Yeo et al. 2011, as Schaefer's parcels name them.
NETWORKS = ("Vis", "SomMot", "DorsAttn", "SalVentAttn", "Limbic", "Cont", "Default")


def networks(atlas: Atlas) -> tuple[str, ...]:
    """A network per parcel: the one its name holds, ``"Subcortex"`` if it has only voxels, or ""."""
    on_surface = set(atlas.labels[atlas.axis.surface_mask].tolist())
    found = []
    for label, name in enumerate(atlas.parcels, start=1):
        named = re.search(rf"(?:^|_)({'|'.join(NETWORKS)})(?:_|$)", name)
        if named:
            found.append(named[1])
        else:
            found.append("" if label in on_surface else "Subcortex")
    return tuple(found)


def cortex_surfaces() -> list[Path]:
    """Left and right midthickness of the conte69 average (fs_LR 32k), from the package brainspace."""
    left, right = "surfaces/conte69_32k_lh.gii", "surfaces/conte69_32k_rh.gii"
    return installed_files("brainspace==0.3.0", left, right)
