"""Truncated and altered files of every format: a scan or a named problem, never another error, a crash or a hang."""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
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

EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True),  # where
    st.integers(0, 4),  # bytes removed there
    st.one_of(
        st.binary(max_size=4),
        st.sampled_from(
            [
                b"9999999999",
                b"-1",
                b"\xff\xff\xff\x7f",
                b"\0\0\0\x80",
                b"\0" * 8,
                b"nan",
                b"<",
                b"\t\n",
            ]
        ),
    ),  # bytes put there
)
DAMAGE = st.tuples(st.one_of(st.just(1.0), st.floats(0, 1)), st.lists(EDIT, max_size=4))


def damaged(content: bytes, keep: float, edits) -> bytes:
    for where, removed, put in edits:
        at = int(where * len(content))
        content = content[:at] + put + content[at + removed :]
    return content[: int(keep * len(content))]


def read(path, content: bytes):
    path.write_bytes(content)
    return load_scan(
        path,
        t_r=0.72,
        override_t_r=True,
        frames_first=True if path.name.endswith(NO_HEADER) else None,
    )


@pytest.mark.parametrize("ending", WHOLE)
def test_damaged_files_are_named_problems(tmp_path, ending):
    path = tmp_path / f"sub-01{ending}"
    np.testing.assert_allclose(read(path, WHOLE[ending]).values, VALUES, rtol=1e-4)

    @settings(
        max_examples=40,
        deadline=5000,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(DAMAGE)
    def examine(damage):
        try:
            assert isinstance(read(path, damaged(WHOLE[ending], *damage)), Scan)
        except DataError as error:
            if error.problem == "unusable" or path.name not in str(error):
                raise

    examine()
