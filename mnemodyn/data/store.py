"""A store: every usable scan of a cohort in one directory that many processes read at once.

================  =====================================================================================================
``head.json``     format, dtype, cohort, whether simulated, atlas and parcels; written first and never changed
``values.bin``    values of the scans one after the other, (frame, parcel), float16 or float32
``moments.bin``   mean, SD, smallest and largest value of each parcel of each scan, (scan, 4, parcel), float64
``censored.bin``  1 for a frame censored for motion, else 0, (frame,), bytes
``rows.jsonl``    a line a scan: its row of the table with a checksum; or what could not be used, and why
``store.json``    how long ``rows.jsonl`` is, its checksum, and what the cohort's index left out; written last
================  =====================================================================================================

The binary files are little-endian without headers: ``numpy.memmap(path, "<f2").reshape(-1, n_parcels)`` opens one.

Files only grow, and a scan's line is written after its values. A conversion that is killed leaves whole scans, which
the next one keeps. While scans are added, a reader sees what ``store.json`` lists: the store as it was before.

With float16 the values are each parcel's z-scores, and come back through mean and SD with the error that the table
states: at BOLD's usual 10,000 +- 50 a float16 of the value itself would be off by up to 4. With float32 the values are
the source's own, and come back exactly.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from mnemodyn.data.formats import naming, refuse
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import (
    MEAN,
    SD,
    Collection,
    DataError,
    Scan,
    check_parcels,
    data_name,
    with_known_columns,
)
from mnemodyn.files import digest, write_json

__all__ = ["Store", "convert", "is_store"]

FORMAT = 2
DTYPES = {"float16": "<f2", "float32": "<f4"}
BINARY = ("values.bin", "moments.bin", "censored.bin")
# Scans between two waits for the disk; a conversion that is killed repeats as many at most.
SCANS_AT_ONCE = 16
# What a scan is known by.
ENTITIES = ("participant_id", "session", "run", "path")
# The largest float16. Only a censored frame can lie further out.
LIMIT = 65504.0
Row: TypeAlias = dict[str, Any]


def is_store(folder: str | Path) -> bool:
    """Whether a folder holds a store whose conversion has ended."""
    return (Path(folder) / "store.json").is_file()


# Writing


def convert(
    scans: Any,
    folder: str | Path,
    *,
    dtype: str = "float16",
    progress: Callable[[int, int], None] | None = None,
) -> "Store":
    """Write scans into a store, or add those that it does not have yet.

    The conversion may be killed at any moment and started again: it goes on after the last whole scan and ends in the
    same bytes. One scan is held in memory at a time. A scan that cannot be read, or has other parcels than the first,
    is listed in ``Store.excluded``, and tried again once its file has another size.

    Parameters
    ----------
    scans : Collection, Index or sequence of Scan
        A scan is known by its participant, session, run and path; one that is in the store is not read again.
    folder : str or Path
    dtype : {"float16", "float32"}
    progress : callable
        Called with the number of the scan at hand, from 1, and of all scans to do.

    Raises
    ------
    DataError
        ``dtype``, ``cohort`` or ``simulated`` if the store has another; ``not-a-store`` if the folder holds something
        else; ``source-changed`` if a scan's file has another size than when it was converted; ``duplicate-scan`` if
        two scans share participant, session, run and path; ``no-scan`` if none is usable; ``locked`` while another
        conversion is at work.
    """
    if dtype not in DTYPES:
        refuse(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}", "dtype")
    folder = Path(folder)
    if not hasattr(scans, "table"):
        scans = Collection(scans)
    rows = _rows_of(scans)
    cohort = getattr(scans.cohort, "name", scans.cohort)
    wanted = {"format": FORMAT, "dtype": dtype, "cohort": cohort, "simulated": scans.simulated}
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        head = _existing_head(folder, wanted)
        there = _resume(folder, head)
        n_scans = sum(map(_is_scan, there))
        n_frames = sum(row["n_frames"] for row in there if _is_scan(row))
        todo = _missing(rows, there)
        lines: list[str] = []
        for done, number in enumerate(todo, start=1):
            if progress is not None:
                progress(done, len(todo))
            row = rows[number]
            try:
                scan = scans[number]
                if head is None:
                    head = {**wanted, "atlas": scan.atlas, "parcels": scan.parcels}
                    write_json(folder / "head.json", head)
                with naming(scan.source):
                    check_parcels(scan.parcels, head["parcels"])
            except DataError as error:
                row["problem"] = error.problem
                row["message"] = str(error)
            else:
                row.update(_append_scan(folder, scan, dtype), place=n_scans, start=n_frames)
                n_scans += 1
                n_frames += scan.n_frames
            lines.append(json.dumps(row) + "\n")
            if len(lines) == SCANS_AT_ONCE or done == len(todo):
                _write_lines(folder, lines)
                lines.clear()
        if n_scans == 0:
            refuse(f"none of the {len(rows)} scans for {folder} is usable", "no-scan")
        _write_listing(folder, scans.excluded)
    return Store(folder)


def _rows_of(scans: Any) -> list[Row]:
    """Rows of the table to be, with the size of each scan's file in bytes, None where there is no file."""
    rows = _plain_rows(scans.table)
    seen = set()
    # The size is the cheapest sign that a file has changed since it was converted.
    for row in rows:
        row["source_bytes"] = None
        if scans.folder is not None:
            file = Path(scans.folder) / row["path"]
            row["source_bytes"] = file.stat().st_size if file.is_file() else None
        key = _key(row)
        if key in seen:
            shared = f"two scans share {', '.join(ENTITIES)} = {key}"
            refuse(f"{row['path']}: {shared}", "duplicate-scan")
        seen.add(key)
    return rows


def _plain_rows(table: pd.DataFrame) -> list[Row]:
    """Rows as JSON has them: Python's numbers, and None for whatever is missing."""
    table = table.astype(object)
    return table.where(table.notna(), None).to_dict("records")


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name) or "") for name in ENTITIES)


def _is_scan(row: Row) -> bool:
    """Whether a line of ``rows.jsonl`` is a scan's; else it says why a scan was left out."""
    return "sha256" in row


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second conversion out. The lock ends with the process, however that ends; Windows has none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    # The folder itself is locked, so that no file is left behind.
    at = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        refuse(f"{folder}: another conversion is writing this store", "locked")
    finally:
        os.close(at)


def _existing_head(folder: Path, wanted: Row) -> Row | None:
    """The head of the store that is there, or None; a DataError if the folder holds something else."""
    for left_over in folder.glob(".*.tmp"):
        left_over.unlink()
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return None
    if "rows.jsonl" not in names:
        refuse(f"{folder}: not a store, it holds {names[:3]}; name a new folder", "not-a-store")
    # Until now no scan was usable.
    if "head.json" not in names:
        return None
    head = _read_head(folder)
    for name, value in wanted.items():
        if head[name] != value:
            found = f"a store with {name} {head[name]!r}, but {name} is {value!r} here"
            refuse(f"{folder}: {found}; name a new folder", name)
    return head


def _resume(folder: Path, head: Row | None) -> list[Row]:
    """The rows that an earlier conversion wrote; what it was killed in the middle of is cut off."""
    path = folder / "rows.jsonl"
    path.touch()
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = [json.loads(line) for line in lines]
    os.truncate(path, sum(map(len, lines)))
    if head is not None:
        n_scans = sum(map(_is_scan, rows))
        n_frames = sum(row["n_frames"] for row in rows if _is_scan(row))
        n_values = n_frames * len(head["parcels"])
        itemsize = np.dtype(head["dtype"]).itemsize
        _truncate(folder / "values.bin", n_values * itemsize)
        _truncate(folder / "moments.bin", n_scans * len(head["parcels"]) * 4 * 8)
        _truncate(folder / "censored.bin", n_frames)
    return rows


def _truncate(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def _missing(rows: list[Row], there: list[Row]) -> list[int]:
    """Numbers of the rows to convert: those that are not there, or were left out and have changed since."""
    known = {_key(row): row for row in there}
    todo = []
    for number, row in enumerate(rows):
        old = known.get(_key(row))
        if old is None:
            todo.append(number)
        elif old["source_bytes"] != row["source_bytes"]:
            if _is_scan(old):
                changed = f"{row['source_bytes']} bytes, but {old['source_bytes']} when converted"
                refuse(f"{row['path']}: {changed}; convert into a new folder", "source-changed")
            todo.append(number)
    return todo


def _append_scan(folder: Path, scan: Scan, dtype: str) -> Row:
    """Append a scan to the binary files; return what its row has to say of it."""
    # Moments are kept from the values themselves, not from what comes back of them.
    m = scan.moments
    stored = _stored(scan.values, m, dtype)
    censored = np.zeros(scan.n_frames, dtype=bool)
    if scan.censored is not None:
        censored = scan.censored
    _append(folder / "values.bin", stored.tobytes())
    _append(folder / "moments.bin", m.tobytes())
    _append(folder / "censored.bin", censored.tobytes())
    about = {name: getattr(scan, name) for name in ("t_r", "t_r_source", "source", "n_frames")}
    about["n_usable"] = scan.n_usable
    # The error of the values that come back, in SDs.
    sd = np.where(m[SD] > 0, m[SD], np.inf)
    error = ((_restored(stored, m) - scan.values.astype(np.float64)) / sd)[~censored]
    about["error_max"] = float(np.abs(error).max())
    about["error_rms"] = float(np.sqrt(np.square(error).mean()))
    about["sha256"] = digest(stored, m, censored)
    return about


def _append(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


def _write_lines(folder: Path, lines: list[str]) -> None:
    """Append lines once the disk has their scans: a line must not outlive its values in a crash of the system."""
    for name in BINARY:
        with open(folder / name, "ab") as file:
            os.fsync(file.fileno())
    with open(folder / "rows.jsonl", "ab") as file:
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _write_listing(folder: Path, excluded: Any) -> None:
    """Say that the conversion has ended."""
    lines = (folder / "rows.jsonl").read_bytes()
    listed = {"bytes": len(lines), "sha256": _listing_sha256(folder, lines)}
    listed["excluded"] = _plain_rows(pd.DataFrame(excluded))
    write_json(folder / "store.json", listed)


def _stored(values: np.ndarray, m: np.ndarray, dtype: str) -> np.ndarray:
    """Values as they are stored: z-scores in float16, or themselves in float32."""
    if dtype == "float32":
        return np.ascontiguousarray(values, dtype="<f4")
    z = (values - m[MEAN]) / np.where(m[SD] > 0, m[SD], np.inf)
    return np.ascontiguousarray(z.clip(-LIMIT, LIMIT), dtype="<f2")


def _restored(stored: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Values in the units of their source, float32."""
    if stored.dtype == np.float32:
        return stored.copy()
    return (stored * m[SD] + m[MEAN]).astype(np.float32)


# Reading


def _listing_sha256(folder: Path, lines: bytes) -> str:
    return hashlib.sha256((folder / "head.json").read_bytes() + lines).hexdigest()


def _read_json(path: Path) -> Row:
    if not path.is_file():
        refuse(f"{path}: the store lacks this file; run its conversion again", "missing")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        refuse(f"{path}: damaged ({error}); convert into a new folder", "checksum")


def _read_head(folder: Path) -> Row:
    head = _read_json(folder / "head.json")
    if head.get("format") != FORMAT:
        found = f"format {head.get('format')}, this version reads {FORMAT}"
        refuse(f"{folder}/head.json: {found}; convert into a new folder", "format")
    head["parcels"] = tuple(head["parcels"])
    return head


class _StoredScan(Scan):
    """A scan whose values are read when they are asked for; it was checked when it was converted."""

    _store: "Store"
    _i: int

    def __init__(self, store: "Store | None" = None, i: int = 0, **facts: Any):
        if store is None:  # a copy with something replaced is a scan in memory
            super().__init__(**facts)
            return
        # A frozen dataclass is set through its dictionary.
        vars(self).update(facts, _store=store, _i=i)

    def __getstate__(self) -> Row:
        """Goes to another process with its values, not with its store."""
        values = self.values
        state = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return {**state, "values": values}

    @cached_property
    def values(self) -> np.ndarray:  # type: ignore[override]  # a field of Scan
        return self._store.values(self._i)

    @property
    def n_frames(self) -> int:
        if "_store" in vars(self):
            return self._store._row(self._i)["n_frames"]
        return self.values.shape[0]

    @property
    def moments(self) -> np.ndarray:
        if "_store" in vars(self):
            return self._store.moments(self._i)
        return super().moments


class Store(Collection):
    """The scans of a store. A scan's values are read when they are asked for.

    Any number of processes can read; a store goes to another one as its folder and rows.

    Attributes
    ----------
    table : DataFrame
        A row a scan: the columns of the cohort's index, and ``n_frames``, ``n_usable`` (frames not censored), ``t_r``
        (s), ``sha256``, and ``error_max`` and ``error_rms``, the error of the values that come back, in SDs of their
        parcel over the scan.
    excluded : DataFrame
        What could not be used: ``participant_id``, ``path`` or ``file``, ``problem``, ``message``.
    dtype, cohort, atlas : str
    parcels : tuple of str
    simulated : bool
    """

    folder: Path

    def __init__(self, folder: str | Path):
        """Open a store; a DataError if the folder holds none, an unfinished or an altered one."""
        folder = Path(folder)
        if not is_store(folder):
            if (folder / "head.json").is_file():
                refuse(f"{folder}: its conversion has not ended; run it again", "unfinished")
            refuse(f"{folder}: no store (there is no store.json)", "not-a-store")
        listed = _read_json(folder / "store.json")
        head = _read_head(folder)
        # More lines may be there: scans that are being added.
        lines = (folder / "rows.jsonl").read_bytes()[: listed["bytes"]]
        if listed["sha256"] != _listing_sha256(folder, lines):
            refuse(f"{folder}/rows.jsonl: altered since the conversion (checksum)", "checksum")
        rows = [json.loads(line) for line in lines.splitlines()]
        scans = [row for row in rows if _is_scan(row)]
        # A scan that was left out may have been added later.
        left_out = {_key(row): row for row in rows if not _is_scan(row)}
        for row in scans:
            left_out.pop(_key(row), None)
        self.folder = folder
        self.table = with_known_columns(pd.DataFrame(scans))
        self.excluded = pd.DataFrame([*listed["excluded"], *left_out.values()])
        self._scan_rows = scans
        self._rows = np.arange(len(scans))
        self.dtype = head["dtype"]
        self.atlas = head["atlas"]
        self.parcels = tuple(head["parcels"])
        self.cohort = head["cohort"]
        self.name = data_name(head["cohort"]) or folder.name
        self.simulated = head["simulated"]
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> Row:
        """Goes to another process without its maps, which would take all values along."""
        return {**vars(self), "_maps": {}}

    def _row(self, i: int) -> Row:
        return self._scan_rows[self._rows[i]]

    def _scan(self, i: int) -> Scan:
        row = self._row(i)
        facts = {name: row.get(name) for name in ("participant_id", "t_r", "source", "mean_fd")}
        for name in ("session", "run", "t_r_source"):
            facts[name] = row.get(name) or ""
        facts["censored"] = self.censored(i)
        return _StoredScan(self, i, parcels=self.parcels, atlas=self.atlas, **facts)

    def _span(self, i: int, start: int, stop: int | None) -> tuple[int, int]:
        """First frame in the file and number of frames; an IndexError if the scan does not have them."""
        row = self._row(i)
        n_frames = row["n_frames"]
        if stop is None:
            stop = n_frames
        if not 0 <= start < stop <= n_frames:
            raise IndexError(f"frames must lie in 0 ... {n_frames}, got {start} ... {stop}")
        return row["start"] + start, stop - start

    def _read(self, name: str, dtype: str, width: int, start: int, n: int) -> np.ndarray:
        """Rows of a binary file as a read-only array (n, width); the file's other rows are not read."""
        path = self.folder / name
        if name not in self._maps:
            if not path.is_file() or path.stat().st_size == 0:
                refuse(f"{path}: the store lacks this file, or it is empty", "missing")
            n_rows = path.stat().st_size // (width * np.dtype(dtype).itemsize)
            # Read-only: Linux refuses a writable map that is larger than its memory.
            mapped = np.memmap(path, dtype, mode="r", shape=(n_rows, width))
            self._maps[name] = np.asarray(mapped)  # a plain array is sliced more quickly
        found = self._maps[name][start : start + n]
        if len(found) < n:
            refuse(f"{path}: truncated, it ends before row {start + n}", "truncated")
        return found

    def _stored(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values as they are stored, shape (time, parcel)."""
        span = self._span(i, start, stop)
        return self._read("values.bin", DTYPES[self.dtype], len(self.parcels), *span)

    def values(self, i: int) -> np.ndarray:
        """Return the values of scan `i` in the units of its source, shape (time, parcel), float32."""
        return _restored(self._stored(i), self.moments(i))

    def moments(self, i: int) -> np.ndarray:
        """Return mean, SD, smallest and largest value of each parcel of scan `i`, shape (4, parcel).

        They are those of the scan that was converted, exactly.
        """
        place = 4 * self._row(i)["place"]
        return self._read("moments.bin", "<f8", len(self.parcels), place, 4)

    def censored(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """Return the censored frames among some frames of scan `i`, bool of shape (time,), or None if it has none."""
        row = self._row(i)
        if row["n_usable"] == row["n_frames"]:
            return None
        return self._read("censored.bin", "?", 1, *self._span(i, start, stop))[:, 0].copy()

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
        """
        import torch  # turns float16 into float32 ten times as fast as NumPy does

        stored = self._stored(i, start, stop)
        scaling = scaling or Scaling()
        # What is stored in float16 is a z-score already, so that any other scaling is one step from it.
        if self.dtype == "float32":
            offset, scale = scaling.affine(self.moments(i))
            x = ((stored - offset) / scale).astype(np.float32)
        else:
            x = torch.from_dlpack(stored).float().numpy()  # from_numpy warns of read-only arrays
            if scaling.method != "zscore_per_parcel":
                m = self.moments(i)
                offset, scale = scaling.affine(m)
                x *= (m[SD] / scale).astype(np.float32)
                x += ((m[MEAN] - offset) / scale).astype(np.float32)
        if self.censored(i) is None:
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
        counts = left_out.query("left_out_of != 'targets'")["problem"].value_counts()
        lines += [f"left out: {count} {problem}" for problem, count in counts.items()]
        return "\n".join(lines)

    @property
    def fingerprint(self) -> str:
        """Digest of participants, t_r, parcels and the scans' checksums."""
        told = self.table[["participant_id", "t_r", "sha256"]]
        return digest(self.dtype, self.parcels, told.to_numpy().tolist())

    def verify(self) -> int:
        """Compare every scan with its checksum and return their number; a DataError for the first that differs."""
        for i in range(len(self)):
            row = self._row(i)
            censored = self.censored(i)
            if censored is None:
                censored = np.zeros(row["n_frames"], dtype=bool)
            if digest(self._stored(i), self.moments(i), censored) != row["sha256"]:
                changed = f"{row['source']} is not what was converted; convert into a new folder"
                refuse(f"{self.folder}: {changed}", "checksum")
        return len(self)
