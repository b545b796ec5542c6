"""The one way to open scans: the embedded ones, a file, a folder, a store, or a cohort's folder."""

from pathlib import Path
from typing import Any

import pandas as pd

from mnemodyn.data.cohorts import SIMULATED, index
from mnemodyn.data.formats import naming, natural, refuse
from mnemodyn.data.scans import (
    Collection,
    DataError,
    Found,
    Scan,
    check_parcels,
    find_scans,
    load_hcp7,
    load_scan,
)
from mnemodyn.data.store import Store, is_store
from mnemodyn.files import digest, resolve

__all__ = ["Collection", "open_scans"]

# Bytes of values up to which the scans of a cohort are read once and kept in memory.
IN_MEMORY = 2**30


def open_scans(
    source: str | Path,
    *,
    cohort: str | Path | None = None,
    t_r: float | None = None,
    workers: int = 1,
    pattern: str = "*",
    **settings: Any,
) -> Collection:
    """Open scans, with what is known of each.

    Parameters
    ----------
    source : str or Path
        ``"hcp7"`` for the seven embedded scans; a store; a scan's file; or a folder that is searched for the formats
        of :func:`~mnemodyn.data.scans.load_scan`. The scans of a folder are in the natural order of participants and
        files (``sub-2`` before ``sub-10``), and held in memory. ``table`` has a row a scan, in the same order: join
        other tables to its ``participant_id``, and never by their order.
    cohort : str or Path
        The cohort whose folder `source` is: a name, or a YAML file. The table then has its phenotypes, and scans that
        cannot be used are in ``excluded``, while they are an error without it. Folders and links that lead to no
        content, further copies of a scan, and runs put together beside the runs, are in ``excluded`` either way.
    t_r : float
        Repetition time in seconds, for files that do not state it.
    workers : int
        Processes that read a cohort's scans.
    pattern : str
        Which names in a folder, for example ``"*seg-4S456Parcels*"`` where it holds several atlases.
    **settings
        As in :func:`~mnemodyn.data.scans.load_scan`, for files and folders; for those of a cohort, what
        :class:`~mnemodyn.data.cohorts.Reader` has.

    Raises
    ------
    DataError
        ``no-file`` or ``no-scans`` if there are none; ``setting`` if one is given to a source that knows better;
        whatever is wrong with a scan; ``parcel-count``, ``parcel-order`` or ``t-r-conflict`` if two scans differ;
        ``duplicate-series`` if two participants have the same series.
    """
    if t_r is not None:
        settings["t_r"] = t_r
    if source == "hcp7":
        _refuse_settings(source, settings)
        return Collection(load_hcp7(), name="HCP-7")
    path = _place(source)
    if is_store(path):
        _refuse_settings(source, settings)
        return Store(path)
    if cohort is not None:
        return _open_cohort(path, cohort, workers, settings)
    found = Found([path], [])
    if not path.is_file():
        found = find_scans(path, pattern)
    # Without a cohort, one scan that cannot be used stops everything: nobody has said what may be left out.
    scans = []
    for each in found.files:
        try:
            scans.append(load_scan(each, **settings))
        except DataError as error:
            if path.is_file():
                raise
            remedy = "remove it, or name a cohort (--cohort), which leaves such scans out"
            raise DataError(f"{error}; {remedy}", error.problem) from error
    scans.sort(key=lambda scan: (natural(scan.participant_id), natural(scan.source)))
    scans = _without_copies(scans, found.left_out)
    excluded = pd.DataFrame(found.left_out, columns=["file", "problem", "message"])
    simulated = (path / SIMULATED).is_file()
    return Collection(scans, excluded=excluded, name=path.name, simulated=simulated)


def _place(path: str | Path) -> Path:
    """A path seen from the working folder, or else from the repository's root: notebooks run in either."""
    return Path(path) if Path(path).exists() else resolve(path)


def _refuse_settings(source: str | Path, settings: dict[str, Any]) -> None:
    """Raise a DataError for settings of reading where the scans have been read before."""
    if settings:
        refuse(f"{source}: {', '.join(settings)} cannot be set, the scans state it", "setting")


def _open_cohort(
    folder: Path, cohort: str | Path, workers: int, settings: dict[str, Any]
) -> Collection:
    """The usable scans of a cohort's folder, in memory where they are few."""
    if str(cohort).endswith((".yaml", ".yml")):
        cohort = _place(cohort)
    found = index(cohort, folder, workers=workers, **settings)
    if not len(found):
        hint = f"mnemodyn index {cohort} {folder} says why"
        refuse(f"{folder}: no scan of cohort {cohort} can be used; {hint}", "no-scans")
    n_values = int((found.table["n_frames"] * found.table["n_parcels"]).sum())
    # The index has read every scan once. A few are read again now and kept, many are read when asked for.
    if 4 * n_values <= IN_MEMORY:
        return found.in_memory()
    return found


def _without_copies(scans: list[Scan], left_out: list[dict[str, str]]) -> list[Scan]:
    """Leave out further copies of a scan; a DataError if scans differ in form, or two people have one series."""
    first = scans[0]
    same: dict[str, Scan] = {}
    for scan in scans:
        with naming(scan.source):
            check_parcels(scan.parcels, first.parcels)
            if abs(scan.t_r - first.t_r) > 1e-3:
                found = f"t_r is {scan.t_r} s, but {first.t_r} s in {first.source}"
                refuse(found, "t-r-conflict")
        # A copy under another name would put one person on both sides of a split.
        twin = same.setdefault(digest(scan.values), scan)
        if twin.participant_id != scan.participant_id:
            one = f"{twin.source} of {twin.participant_id}"
            other = f"{scan.source} of {scan.participant_id}"
            refuse(f"the same series under two participants: {one}, {other}", "duplicate-series")
        if twin is not scan:
            message = f"{scan.source}: the same series as {twin.source}"
            left_out.append(
                {"file": scan.source, "problem": "duplicate-series", "message": message}
            )
    return list(same.values())
