"""A store: every usable scan of a cohort in one directory that many processes read at once.

================  =====================================================================================================
``scans/*.bin``   a file a scan: mean, SD, smallest and largest value of each parcel, (4, parcel), float64; then the
                  values, (frame, parcel), float16 or float32; little-endian without a header
``scans/*.npz``   what is known of each of these files, so that an interrupted conversion goes on
``source.json``   the folder and the cohort's description that the scans came from
``store.json``    dtype, cohort, whether simulated, atlas, parcels, and the tables of scans and of what was left out;
                  written last
================  =====================================================================================================

Every file is written whole. While scans are added, a reader sees the store as it was before.

With float16 the values are each parcel's z-scores, and come back through mean and SD with the error that the table
states: at BOLD's usual 10,000 +- 50 a float16 of the value itself would be off by up to 4. With float32 the values are
the source's own, and come back exactly.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from mnemodyn.data.cohorts import Cohort, Index, index
from mnemodyn.data.formats import naming, reading, refuse
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import (
    MEAN,
    SD,
    Collection,
    DataError,
    Scan,
    check_parcels,
    data_name,
    fingerprint,
    with_known_columns,
)
from mnemodyn.files import Kept, check_folder, digest, locked, sha256, write_bytes, write_json

__all__ = ["Store", "convert", "is_store"]

FORMAT = 3
DTYPES = {"float16": "<f2", "float32": "<f4"}
# What a scan is known by.
ENTITIES = ("participant_id", "session", "run", "path")
# Names of the scans' files: the digest of what they hold, and of what `Kept` knows of them that of the settings.
NAME = re.compile(r"[0-9a-f]{24}")
FILE = re.compile(r"([0-9a-f]{24})(\.bin|-[0-9a-f]{16}\.\w+)")
# The largest float16. Only a censored frame can lie further out.
LIMIT = 65504.0
Row: TypeAlias = dict[str, Any]


def is_store(folder: str | Path) -> bool:
    """Whether a folder holds a store whose conversion has ended."""
    return (Path(folder) / "store.json").is_file()


# Writing


def convert(
    scans: Sequence[Scan],
    folder: str | Path,
    *,
    dtype: str = "float16",
    progress: Callable[[int, int], None] | None = None,
) -> "Store":
    """Write scans into a store, or make one that is there like them.

    The conversion may be killed at any moment and started again: it goes on after the last whole scan and ends in the
    same bytes. One scan is held in memory at a time. A scan that cannot be read, or has other parcels than the first,
    is listed in ``Store.excluded``. The store has the rows of `scans`, in their order and as they are now.

    Parameters
    ----------
    scans : Collection or sequence of Scan
        A scan is known by its participant, session, run and path. It is written again only where what is read of it
        has changed; a warning says so.
    folder : str or Path
    dtype : {"float16", "float32"}
    progress : callable
        Called with the number of scans done and that of all.

    Raises
    ------
    DataError
        ``dtype``, ``cohort`` or ``simulated`` if the store has another; ``not-a-store`` if the folder holds something
        else; ``duplicate-scan`` if two scans share participant, session, run and path; ``no-scan`` if none is usable.
    RuntimeError
        If another conversion writes the store.
    """
    if dtype not in DTYPES:
        refuse(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}", "dtype")
    if not isinstance(scans, Collection):
        scans = Collection(scans)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "mnemodyn convert"):
        about: Row = {"dtype": dtype, "cohort": scans.cohort, "simulated": scans.simulated}
        before = check_store(folder, scans.folder, about)
        usable, left_out = _write_scans(scans, folder, about, progress)
        source = folder / "source.json"
        if isinstance(scans, Index):
            description = scans.description.model_dump(mode="json")
            write_json(source, {"folder": scans.folder.resolve(), "cohort": description})
        else:
            source.unlink(missing_ok=True)
        content = {"format": FORMAT, **about, "scans": usable, "excluded": left_out}
        write_json(folder / "store.json", {**content, "sha256": _checksum(content)})
        _remove_replaced(folder, before, usable)
    return Store(folder)


def check_store(folder: Path, source: Path | None, about: Row) -> list[Row]:
    """The rows of a store that is there; a DataError if the folder holds something else than a store like this one."""
    check_folder(folder)
    if source is not None and source.exists() and folder.exists() and folder.samefile(source):
        refuse(f"{folder} is the folder that is read; name another", "output")
    names = {path.name for path in folder.glob("*")} - {"scans", "store.json", "source.json"}
    names |= {path.name for path in folder.glob("scans/*") if not FILE.fullmatch(path.name)}
    others = sorted(name for name in names if not name.startswith("."))
    if others:
        refuse(f"{folder}: not a store, it holds {others[:3]}; name a new folder", "not-a-store")
    if not is_store(folder):
        return []
    there = Store(folder)
    for name, value in about.items():
        old = getattr(there, name)
        if old != value:
            found = f"a store with {name} {old!r}, but {name} is {value!r} here"
            refuse(f"{folder}: {found}; name a new folder", name)
    return there._scan_rows


def _write_scans(
    scans: Collection, folder: Path, about: Row, progress: Callable[[int, int], None] | None
) -> tuple[list[Row], list[Row]]:
    """Write every scan that is not there yet; rows of the usable ones and of the others. Completes `about`."""
    rows = _plain_rows(scans.table)
    keys = [_key(row) for row in rows]
    for key, n in Counter(keys).items():
        if n > 1:
            refuse(f"two scans share {', '.join(ENTITIES)} = {key}", "duplicate-scan")
    usable: list[Row] = []
    left_out = _plain_rows(scans.excluded)
    for i, row in enumerate(rows):
        try:
            facts = _kept_scan(scans, i, keys[i], folder, about["dtype"])
            form = {name: facts.pop(name) for name in ("atlas", "parcels")}
            if not usable:
                about.update(form)
            check_parcels(form["parcels"], about["parcels"])
        except DataError as error:
            left_out.append({**row, "problem": error.problem, "message": str(error)})
        else:
            usable.append({**row, **facts})
        if progress is not None:
            progress(i + 1, len(rows))
    if not usable:
        refuse(f"none of the {len(rows)} scans for {folder} is usable", "no-scan")
    return usable, left_out


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name) or "") for name in ENTITIES)


def _kept_scan(scans: Collection, i: int, key: tuple[str, ...], folder: Path, dtype: str) -> Row:
    """Write scan `i`, unless it is there as it is now; what the store has to say of it."""
    content = scans.content(i)
    # The content is in the name, so that the values of an earlier store stay until the new one stands.
    name = _file_name(key, content, dtype)
    path = folder / "scans" / f"{name}.bin"
    write = partial(_write_scan, partial(scans.__getitem__, i), content, path, dtype)
    facts = Kept(path.parent)(name, FORMAT, write)
    if not path.is_file() or sha256(path) != facts["sha256"]:
        facts = write()  # the file was damaged
    return {**facts, "file": name}


def _file_name(key: tuple[str, ...], content: str, dtype: str) -> str:
    return digest(key, content, dtype)[:24]


def _remove_replaced(folder: Path, before: list[Row], now: list[Row]) -> None:
    """Remove the files of scans that were converted again because they have changed, and warn of it."""
    names = {_key(row): row["file"] for row in now}
    changed = [row for row in before if names.get(_key(row), row["file"]) != row["file"]]
    for row in changed:
        for path in (folder / "scans").glob(f"{row['file']}*"):
            path.unlink()
    if changed:
        what = f"{len(changed)} scans are not as they were, and were converted again"
        named = [row["path"] for row in changed[:3]]
        warnings.warn(f"{folder}: {what}, among them {named}", stacklevel=1)


def _plain_rows(table: pd.DataFrame) -> list[Row]:
    """Rows as JSON has them: Python's numbers, and None for whatever is missing."""
    table = table.astype(object)
    return table.where(table.notna(), None).to_dict("records")


def _write_scan(read: Callable[[], Scan], content: str, path: Path, dtype: str) -> Row:
    """Write a scan to its file; return what the store has to say of it."""
    scan = read()
    if fingerprint([scan]) != content:
        refuse(f"{scan.source}: has changed since it was first read; convert again", "changed")
    # Moments are kept from the values themselves, not from what comes back of them.
    m = scan.moments
    sd = np.where(m[SD] > 0, m[SD], np.inf)
    stored = scan.values
    if dtype == "float16":
        stored = ((scan.values - m[MEAN]) / sd).clip(-LIMIT, LIMIT)
    stored = np.ascontiguousarray(stored, DTYPES[dtype])
    write_bytes(path, m.astype("<f8").tobytes() + stored.tobytes())
    error = np.abs(_restored(stored, m) - scan.values.astype(np.float64)) / sd
    censored: list[int] = []
    if scan.censored is not None:
        error = error[~scan.censored]
        censored = np.flatnonzero(scan.censored).tolist()
    facts = ("atlas", "parcels", "t_r", "t_r_source", "source", "n_frames", "n_usable")
    return {
        **{name: getattr(scan, name) for name in facts},
        "censored": censored,
        "error_max": float(error.max()),
        "sha256": sha256(path),
    }


@np.errstate(all="ignore")  # of a damaged file they may be infinite, which a scan refuses
def _restored(stored: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Values in the units of their source, float32."""
    if stored.dtype == np.float32:
        return stored.copy()
    return (stored * m[SD] + m[MEAN]).astype(np.float32)


# Reading


@lru_cache(maxsize=4096)  # a process may have 65,530 maps on Linux
def _open_file(path: Path, dtype: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Moments (4, parcel) and stored values (frame, parcel) of a scan's file; frames not used are not read."""
    start = 4 * 8 * shape[1]
    expected = start + shape[0] * shape[1] * np.dtype(DTYPES[dtype]).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        sizes = f"expected {expected} bytes, found {found}"
        refuse(f"{path}: {sizes}; convert again", "truncated")
    # A plain array is sliced more quickly than a map.
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    moments = content[:start].view("<f8").reshape(4, shape[1])
    return moments, content[start:].view(DTYPES[dtype]).reshape(shape)


class _StoredScan(Scan):
    """A scan whose values are read when they are asked for; it was checked when it was converted."""

    # What `_open_file` needs; a copy with something replaced is a scan in memory, and has ().
    _file: tuple = ()

    def __init__(self, file: tuple = (), **facts: Any):
        if file:
            # A frozen dataclass is set through its dictionary.
            vars(self).update(facts, _file=file)
        else:
            super().__init__(**facts)

    @cached_property
    def values(self) -> np.ndarray:  # type: ignore[override]  # a field of Scan
        moments, stored = _open_file(*self._file)
        return _restored(stored, moments)

    @property
    def n_frames(self) -> int:
        return self._file[2][0] if self._file else super().n_frames

    @property
    def moments(self) -> np.ndarray:
        return _open_file(*self._file)[0] if self._file else super().moments


def _checksum(content: Row) -> str:
    return digest(json.dumps(content, sort_keys=True))


def _listed(path: Path) -> Row:
    """Content of ``store.json``, checked; a DataError if it is damaged, or names a file that is not the store's."""
    listed = json.loads(path.read_text(encoding="utf-8"))
    if listed.get("format") != FORMAT:
        found = f"format {listed.get('format')}, this version reads {FORMAT}"
        refuse(f"{found}; convert into a new folder", "format")
    if listed.pop("sha256", None) != _checksum(listed):
        refuse("not what was converted (checksum); remove it, and convert again", "checksum")
    if listed["dtype"] not in DTYPES:
        refuse(f"dtype {listed['dtype']!r} is none of {tuple(DTYPES)}", "dtype")
    for row in listed["scans"]:
        # The checksum tells damage. It does not tell who wrote the file.
        if not NAME.fullmatch(row["file"]):
            refuse(f"{row['file']!r} is no file of the store", "not-a-store")
        frames = [0, *row["censored"]]
        if min(frames) < 0 or max(frames) >= row["n_frames"]:
            refuse(f"frames of {row['path']} that it does not have", "not-a-store")
    return listed


class Store(Collection):
    """The scans of a store. A scan's values are read when they are asked for.

    Attributes
    ----------
    table : DataFrame
        A row a scan: the columns of the cohort's index, and ``n_frames``, ``n_usable`` (frames not censored), ``t_r``
        (s), ``sha256`` of its file, and ``error_max``, the largest error of the values that come back, in SDs of
        their parcel over the scan.
    excluded : DataFrame
        What could not be used, with ``problem`` and ``message``.
    dtype, cohort, atlas : str
    parcels : tuple of str
    simulated : bool
    """

    folder: Path

    def __init__(self, folder: str | Path):
        """Open a store; a DataError if the folder holds none, or an unfinished one."""
        folder = Path(folder)
        if not is_store(folder):
            if (folder / "scans").is_dir():
                refuse(f"{folder}: its conversion has not ended; run it again", "unfinished")
            refuse(f"{folder}: no store (there is no store.json)", "not-a-store")
        self.folder = folder
        remedy = "remove it, and convert again"
        with naming(str(folder)), reading(folder / "store.json", f"store; {remedy}"):
            listed = _listed(folder / "store.json")
            self._scan_rows = listed["scans"]
            self.dtype = listed["dtype"]
            self.atlas = listed["atlas"]
            self.parcels = tuple(listed["parcels"])
            table = pd.DataFrame(self._scan_rows).drop(columns=["file", "censored"])
            self.table = with_known_columns(table)
            self.excluded = pd.DataFrame(listed["excluded"])
            self._rows = np.arange(len(table))
            self.name = data_name(listed["cohort"]) or folder.name
            self.cohort = listed["cohort"]
            self.simulated = listed["simulated"]

    def _row(self, i: int) -> Row:
        return self._scan_rows[self._rows[i]]

    def _file(self, i: int) -> tuple:
        """What `_open_file` needs."""
        row = self._row(i)
        path = self.folder / "scans" / f"{row['file']}.bin"
        return path, self.dtype, (row["n_frames"], len(self.parcels))

    def _scan(self, i: int) -> Scan:
        row = self._row(i)
        facts = {name: row.get(name) for name in ("participant_id", "t_r", "source", "mean_fd")}
        for name in ("session", "run", "t_r_source"):
            facts[name] = row.get(name) or ""
        facts["censored"] = self.censored(i)
        return _StoredScan(self._file(i), parcels=self.parcels, atlas=self.atlas, **facts)

    def moments(self, i: int) -> np.ndarray:
        """Return mean, SD, smallest and largest value of each parcel of scan `i`, shape (4, parcel).

        They are those of the scan that was converted, exactly.
        """
        return _open_file(*self._file(i))[0]

    def censored(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """Return the censored frames among some frames of scan `i`, bool of shape (time,), or None if it has none."""
        row = self._row(i)
        if not row["censored"]:
            return None
        n_frames = len(_open_file(*self._file(i))[1])
        censored = np.zeros(n_frames, dtype=bool)
        censored[row["censored"]] = True
        return censored[start:stop]

    def read(
        self, i: int, start: int = 0, stop: int | None = None, scaling: Scaling | None = None
    ) -> np.ndarray:
        """Read some frames of scan `i`, scaled with the whole scan's moments.

        Parameters
        ----------
        i : int
        start, stop : int
            Frames; all by default. No others are read.
        scaling : Scaling
            Z-scores by default.

        Returns
        -------
        ndarray, shape (time, parcel), float32
            A frame without a value is 0.

        Raises
        ------
        IndexError
            If the scan does not have these frames.
        """
        import torch  # turns float16 into float32 ten times as fast as NumPy does

        m, stored = _open_file(*self._file(i))
        n_frames = len(stored)
        if stop is None:
            stop = n_frames
        if not 0 <= start < stop <= n_frames:
            raise IndexError(f"frames must lie in 0 ... {n_frames}, got {start} ... {stop}")
        stored = stored[start:stop]
        scaling = scaling or Scaling()
        # What is stored in float16 is a z-score already, so that any other scaling is one step from it.
        if self.dtype == "float32":
            offset, scale = scaling.affine(m)
            x = ((stored - offset) / scale).astype(np.float32)
        else:
            x = torch.from_dlpack(stored).float().numpy()  # from_numpy warns of read-only arrays
            if scaling.method != "zscore_per_parcel":
                offset, scale = scaling.affine(m)
                x *= (m[SD] / scale).astype(np.float32)
                x += ((m[MEAN] - offset) / scale).astype(np.float32)
        if not self._row(i)["censored"]:
            return x
        return np.nan_to_num(x, copy=False)

    def summary(self) -> str:
        """Say what is in it, and how many scans were left out for which reason."""
        n_people = self.table["participant_id"].nunique()
        error = self.table["error_max"].max()
        content = f"{len(self)} scans of {n_people} participants, {len(self.parcels)} parcels"
        mark = ", SIMULATED" if self.simulated else ""
        lines = [f"{content}, {self.dtype} (largest error {error:.2g} SD){mark}"]
        left_out = self.excluded.reindex(columns=["problem", "left_out_of"])
        # Scans without a phenotype are in the store.
        counts = left_out.problem[left_out.left_out_of != "targets"].value_counts()
        lines += [f"left out: {count} {problem}" for problem, count in counts.items()]
        return "\n".join(lines)

    @property
    def fingerprint(self) -> str:
        """Digest of participants, t_r, parcels and the scans' checksums."""
        told = self.table[["participant_id", "t_r", "sha256"]]
        return digest(self.dtype, self.parcels, told.to_numpy().tolist())

    def verify(self, workers: int = 1) -> int:
        """Compare everything with its checksum, and with the files that it came from where these are still there.

        Returns the number of scans; a DataError, ``checksum`` or ``stale``, names the first that differs. `workers`
        are the processes that read the files.
        """
        for i in range(len(self)):
            path = self._file(i)[0]
            if not path.is_file() or sha256(path) != self._row(i)["sha256"]:
                remedy = "not what was converted (checksum); convert again"
                refuse(f"{path} of {self._row(i)['source']}: {remedy}", "checksum")
        self._check_source(workers)
        return len(self)

    def _check_source(self, workers: int) -> None:
        """Raise a DataError if a file that was converted, or what is known of it, is no longer as it was."""
        path = self.folder / "source.json"
        if not path.is_file():
            return
        with reading(path, "source of a store"):
            source = json.loads(path.read_text(encoding="utf-8"))
            folder = Path(source["folder"])
            cohort = Cohort(**source["cohort"])
        rows = [row for row in map(self._row, range(len(self))) if (folder / row["path"]).is_file()]
        if not rows:
            return
        found = index(cohort, folder, workers=workers)
        now = {}
        for i, row in enumerate(_plain_rows(found.table)):
            now[row["path"]] = {**row, "file": _file_name(_key(row), found.content(i), self.dtype)}
        for row in rows:
            new = now.get(row["path"], {"path": None})
            changed = [name for name in new if new[name] != row.get(name)]
            if changed:
                what = f"{row['path']} in {folder} has changed since ({', '.join(changed)})"
                refuse(f"{self.folder}: {what}; convert again", "stale")
