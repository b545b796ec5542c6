"""Files of every format that were cut short: a scan or a named problem, never another error."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, ScalarAxis, SeriesAxis
from scipy.io import savemat

from mnemodyn.data import formats
from mnemodyn.data.scans import DataError, Scan, load_scan

VALUES = np.random.default_rng(0).standard_normal((24, 3)).astype(np.float32) * 10


def cifti(columns) -> bytes:
    return Cifti2Image(VALUES, (SeriesAxis(0, 0.72, 24), columns)).to_bytes()


def saved(save, *args, **kwargs) -> bytes:
    stream = io.BytesIO()
    save(stream, *args, **kwargs)
    return stream.getvalue()


def text(header: str, separator: str) -> bytes:
    return saved(np.savetxt, VALUES, delimiter=separator, header=header, comments="", fmt="%.6g")


WHOLE = {
    "_timeseries.ptseries.nii": cifti(formats.parcels_axis(("a", "b", "c"))),
    "_parcellated.dtseries.nii": cifti(BrainModelAxis.from_surface([0, 1, 2], 10, "CortexLeft")),
    "_scalar.dtseries.nii": cifti(ScalarAxis(["a", "b", "c"])),
    "_timeseries.tsv": text("a\tb\tc", "\t"),
    ".csv": text("a,b,c", ","),
    ".1D": text("#1\t#2\t#3", "\t"),
    ".npy": saved(np.save, VALUES),
    ".npz": saved(np.savez_compressed, bold=VALUES),
    "_v7.mat": saved(savemat, {"tc": VALUES}, do_compression=True),
    "_v5.mat": saved(savemat, {"tc": VALUES, "sc": 1.0}),
    "_v4.mat": saved(savemat, {"tc": VALUES}, format="4"),
}
NO_HEADER = (".npy", ".npz", ".mat")


def read(path, content: bytes):
    path.write_bytes(content)
    return load_scan(
        path,
        t_r=0.72,
        override_t_r=True,
        frames_first=True if path.name.endswith(NO_HEADER) else None,
    )


@pytest.mark.parametrize("ending", WHOLE)
def test_files_cut_short_are_named_problems(tmp_path, ending):
    path = tmp_path / f"sub-01{ending}"
    np.testing.assert_allclose(read(path, WHOLE[ending]).values, VALUES, rtol=1e-4)

    @settings(max_examples=40, deadline=5000, derandomize=True, database=None)
    @given(st.floats(0, 1))
    def examine(share):
        content = WHOLE[ending]
        try:
            assert isinstance(read(path, content[: int(share * len(content))]), Scan)
        except DataError as error:
            if error.problem == "unusable" or path.name not in str(error):
                raise

    examine()
