"""Maps on the cortex: each vertex its nearest parcel, each parcel its colour."""

import nibabel
import numpy as np
import pytest

from lib import surfaces
from mnemodyn.data.atlas import greyordinates
from mnemodyn.data.formats import DataError


@pytest.fixture
def volume(tmp_path):
    """Two labels, left and right of the midplane, 4 mm voxels; nothing behind the head's middle."""
    labels = np.zeros((45, 55, 45), np.int16)
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = -90, -126, -72
    labels[:22], labels[23:] = 2, 1
    labels[:, : (126 - 40) // 4] = 0  # y below -40 mm
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "two.nii.gz")
    return tmp_path / "two.nii.gz"


def test_vertices_take_the_nearest_parcel_and_parcels_their_colour(volume):
    try:
        drawn = surfaces._surfaces()
    except DataError as error:
        pytest.skip(str(error))
    vertices = surfaces.vertex_parcels(volume)
    for side, own in (("LEFT", 2), ("RIGHT", 1)):
        points, _ = drawn[side]
        cortical = nibabel.load(greyordinates()[side == "RIGHT"]).darrays[0].data > 0
        lateral = (np.abs(points[:, 0]) > 25) & (points[:, 1] > -35)
        assert set(vertices[side][lateral & cortical]) == {own}
        assert set(vertices[side][~cortical]) == {0}
        assert set(vertices[side][points[:, 1] < -50]) == {0}
    figure = surfaces.cortex({"a": np.array([-1.0, 2.0]), "b": np.array([1.0, np.nan])}, vertices)
    faces = [ax.collections[0].get_facecolors() for part in figure.subfigs for ax in part.axes[:4]]
    for colours, own, other in (
        (faces[0], 0, 2),
        (faces[3], 2, 0),
    ):  # lateral: parcel 2 is red, parcel 1 blue
        assert (colours[:, own] > 1.3 * colours[:, other]).mean() > 0.4
        assert (colours[:, other] > 1.3 * colours[:, own]).mean() < 0.1
    assert (np.ptp(faces[4][:, :3], axis=1) < 1e-6).mean() > 0.9  # not known, hence grey
    assert (np.ptp(faces[7][:, :3], axis=1) < 1e-6).mean() < 0.6
