"""A store: every usable scan of a cohort in one directory that many processes read at once.

=======================  ==============================================================================================
``parcels.json``         dtype, cohort, atlas and parcels, and whether simulated; written first and never changed
``00000.npy``            values of up to 256 scans one after the other, shape (frames, parcels)
``00000.moments.npy``    mean, SD, smallest and largest of each parcel of each scan, shape (scans, 4, parcels), float64
``00000.censored.npy``   the frames censored for motion, bool, where there are any
``00000.json``           the scans' rows of the table, with checksums, and what was left out; written after the others
``store.json``           the JSON files with their checksums, and what the index left out; written last
=======================  ==============================================================================================

A conversion that is killed leaves whole shards, which the next one keeps; a conversion with more scans adds shards
and replaces ``store.json``, so that a reader sees the old store or the new one.

With float16 the values are each parcel's z-scores, and come back through mean and SD with the error that the table
states: at BOLD's usual 10,000 +- 50 a float16 of the value itself would be off by up to 4. With float32 the values are
the source's own, and come back exactly.

The format is NumPy's, read through a memory map: ``benchmarks/store.py`` reads the same random windows from it, from
Zarr, which has to copy whole chunks for each, and from Arrow, which is as quick but a large new dependency. The index
is JSON, which keeps text and numbers apart ("0050642" stays text) and opens 40,000 scans quickly.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pandas as pd
from numpy.lib import format as npy

from mnemodyn.data.formats import naming, refuse
from mnemodyn.data.scaling import MEAN, SD, Scaling, moments
from mnemodyn.data.scans import DataError, Scan, check_parcels
from mnemodyn.files import sha256, write_json, writing

__all__ = ["Store", "convert"]

FORMAT = 1
DTYPES = ("float16", "float32")
ENTITIES = ("participant_id", "session", "run", "path")
LIMIT = np.finfo(np.float16).max  # only a censored frame can lie further out
KEEP_MAPPED = (
    1 << 27
)  # bytes read before the maps are closed, so that a pass over a large store stays small
Row: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[int, int], None] | None


def convert(
    scans: Any,
    folder: str | Path,
    *,
    dtype: str = "float16",
    scans_per_shard: int = 256,
    progress: Progress = None,
) -> "Store":
    """Write scans into a store, or add those that it does not have yet.

    May be killed at any moment and started again: it goes on from the last whole shard and ends in the same bytes. One
    scan is held in memory at a time. A scan that cannot be read, or has other parcels than the first, is listed in
    ``Store.excluded``. A DataError if the folder holds something else, a store of another dtype or cohort, or a scan
    whose file has changed since; if two scans share participant, session, run and path; if no scan is usable; if
    another conversion is at work.

    Parameters
    ----------
    scans : Index or sequence of Scan
        An index of a cohort (``table``, ``excluded``, ``load(row)``), or scans. A scan is known by its participant,
        session, run and path; one that is in the store already is not read again.
    folder : str or Path
    dtype : {"float16", "float32"}
    scans_per_shard : int
    progress : callable
        Called with the number of the scan at hand, from 1, and of all scans to do.
    """
    if dtype not in DTYPES:
        refuse(f"dtype must be one of {DTYPES}, got {dtype!r}", "dtype")
    folder = Path(folder)
    rows, load, left_out = _source(scans)
    for key, times in Counter(map(_key, rows)).items():
        if times > 1:
            refuse(f"{key[-1]}: two scans share {', '.join(ENTITIES)} = {key}", "duplicate-scan")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        cohort = getattr(getattr(scans, "cohort", None), "name", "")
        new = {
            "format": FORMAT,
            "dtype": dtype,
            "cohort": cohort,
            "simulated": getattr(scans, "simulated", False),
        }
        head, shards = _open_for_writing(folder, new), _shards(folder)
        there = [_read_json(path) for path in shards]
        kept = {_key(row): row["source_bytes"] for shard in there for row in shard["scans"]}
        left = {_key(row): row["source_bytes"] for shard in there for row in shard["excluded"]}
        todo = []
        for number, row in enumerate(rows):
            key, size = _key(row), row["source_bytes"]
            if kept.get(key, size) != size:
                changed = f"{size} bytes, but {kept[key]} when it was converted"
                refuse(f"{row['path']}: {changed}; convert into a new folder", "source-changed")
            # What was left out is tried again once its file has changed.
            if key not in kept and left.get(key, -1) != size:
                todo.append((number, row))
        # Shards are chunks of what is to do, so that those of a killed conversion are those of the next one too.
        first = 1 + max((int(p.stem) for p in shards), default=-1)
        for at in range(0, len(todo), scans_per_shard):
            stem = folder / f"{first + at // scans_per_shard:05d}"
            tick = None if progress is None else lambda i, at=at: progress(at + i, len(todo))
            head = _write_shard(stem, todo[at : at + scans_per_shard], load, head, new, tick)
        if head is None:
            refuse(f"none of the {len(rows)} scans for {folder} is usable", "no-scan")
        files = {path.name: sha256(path) for path in (folder / "parcels.json", *_shards(folder))}
        catalogue = {"files": files, "excluded": left_out}
        write_json(folder / "store.json", catalogue | {"sha256": _digest(catalogue)})
    return Store(folder)


def _source(scans: Any) -> tuple[list[Row], Callable[[int], Scan], list[Row]]:
    """Rows of the table to be, how to load the scan of a row by its number, and what was left out before."""
    if not hasattr(scans, "load"):
        rows = [
            {name: getattr(scan, name) for name in ("participant_id", "session", "run")}
            for scan in scans
        ]
        for row, scan in zip(rows, scans, strict=True):
            row |= {"path": scan.source, "source_bytes": scan.values.nbytes}
        return rows, scans.__getitem__, []
    root = Path(getattr(scans, "folder", None) or ".")
    rows = [_plain(row) for row in scans.table.to_dict("records")]
    for row in rows:
        path = root / row["path"]
        row["source_bytes"] = path.stat().st_size if path.is_file() else None
    excluded = [_plain(row) for row in pd.DataFrame(scans.excluded).to_dict("records")]
    return rows, lambda number: scans.load(scans.table.iloc[number]), excluded


def _plain(row: Row) -> Row:
    """A row as JSON has it: NumPy's scalars as Python's, whatever is missing as None."""
    row = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in row.items()
    }
    return {
        name: None if pd.api.types.is_scalar(value) and pd.isna(value) else value
        for name, value in row.items()
    }


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name) or "") for name in ENTITIES)


def _shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"\d{5,}\.json", p.name))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second conversion out. The lock ends with the process, however that ends; Windows has none."""
    at = None
    try:
        with suppress(ImportError):
            import fcntl

            at = os.open(folder, os.O_RDONLY)
            fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        refuse(f"{folder}: another conversion is writing this store", "locked")
    finally:
        if at is not None:
            os.close(at)


def _open_for_writing(folder: Path, new: Row) -> Row | None:
    """The store's ``parcels.json``, if it has scans; whatever a killed conversion left half done is removed."""
    ours = re.compile(r"parcels\.json|store\.json|\d{5,}(\.moments|\.censored)?\.(npy|json)|\..*")
    if strange := [p.name for p in folder.iterdir() if not ours.fullmatch(p.name)]:
        refuse(f"{folder}: not a store, it holds {strange[:3]}; name a new folder", "not-a-store")
    whole = {p.stem for p in _shards(folder)}
    for path in folder.iterdir():
        if path.name.endswith(".tmp") or (
            path.suffix == ".npy" and path.name.split(".")[0] not in whole
        ):
            path.unlink()
    if not whole or not (folder / "parcels.json").is_file():
        return None
    head = _head(folder)
    for name, value in new.items():
        if head[name] != value:
            found = f"a store with {name} {head[name]!r}, but {name} is {value!r} here"
            refuse(f"{folder}: {found}; name a new folder", name)
    return head


def _head(folder: Path) -> Row:
    head = _read_json(folder / "parcels.json")
    if (
        head.keys() != {"format", "dtype", "cohort", "simulated", "atlas", "parcels"}
        or head["format"] != FORMAT
    ):
        refuse(
            f"{folder}/parcels.json: format {head.get('format')}, this version reads {FORMAT}",
            "format",
        )
    return head | {"parcels": tuple(head["parcels"])}


def _read_json(path: Path) -> Row:
    if not path.is_file():
        refuse(f"{path}: the store lacks this file; run its conversion again", "missing")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        refuse(f"{path}: damaged ({error}); convert into a new folder", "checksum")


def _digest(content: Row) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_shard(
    stem: Path,
    todo: list[tuple[int, Row]],
    load: Callable[[int], Scan],
    head: Row | None,
    new: Row,
    tick: Callable[[int], None] | None,
) -> Row | None:
    """Write a shard of what can be used of `todo`; return the store's head, which the first usable scan decides."""
    rows, excluded, all_moments, all_censored, start = [], [], [], [], 0
    with writing(stem.with_name(f"{stem.name}.npy")) as stream:
        for i, (number, row) in enumerate(todo, start=1):
            if tick is not None:
                tick(i)
            try:
                scan = load(number)
                if head is None:
                    head = new | {"atlas": scan.atlas, "parcels": scan.parcels}
                    write_json(stem.parent / "parcels.json", head)
                with naming(scan.source):
                    check_parcels(scan.parcels, head["parcels"])
                m = moments(scan.values, scan.censored)
            except DataError as error:
                facts = {name: row.get(name) for name in (*ENTITIES, "source_bytes")}
                excluded.append(facts | {"problem": error.problem, "message": str(error)})
                continue
            if start == 0:
                _npy_header(stream, new["dtype"], 0, len(scan.parcels))
            stored = _stored(scan.values, m, new["dtype"])
            stream.write(stored.data)
            censored = (
                np.zeros(scan.n_frames, dtype=bool) if scan.censored is None else scan.censored
            )
            sd = np.where(m[SD] > 0, m[SD], np.inf)
            off = ((_restored(stored, m) - scan.values.astype(np.float64)) / sd)[~censored]
            known = {
                name: getattr(scan, name)
                for name in ("participant_id", "session", "run", "mean_fd")
            }
            facts = {
                name: getattr(scan, name)
                for name in ("t_r", "t_r_source", "source", "n_frames", "n_usable")
            }
            facts |= {"start": start, "error_max": float(np.abs(off).max())}
            facts |= {
                "error_rms": float(np.sqrt(np.square(off).mean())),
                "sha256": _checksum(stored, m, censored),
            }
            rows.append(row | {k: v for k, v in known.items() if row.get(k) in (None, "")} | facts)
            all_moments.append(m)
            all_censored.append(censored)
            start += scan.n_frames
        stream.seek(0)
        _npy_header(stream, new["dtype"], start, all_moments[0].shape[1] if rows else 0)
    parts = {"moments": np.array(all_moments).reshape(len(rows), 4, -1 if rows else 0)}
    if any(c.any() for c in all_censored):
        parts["censored"] = np.concatenate(all_censored)
    for name, part in parts.items():
        with writing(stem.with_name(f"{stem.name}.{name}.npy")) as stream:
            np.save(stream, part)
    write_json(stem.with_name(f"{stem.name}.json"), {"scans": rows, "excluded": excluded})
    return head


def _npy_header(stream: BinaryIO, dtype: str, n_frames: int, n_parcels: int) -> None:
    """NumPy pads the header so that the first axis can grow: the same number of bytes whatever n_frames."""
    descr = npy.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    npy.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": (n_frames, n_parcels)}
    )


def _stored(values: np.ndarray, m: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return np.ascontiguousarray(values, dtype="<f4")
    z = (values - m[MEAN]) / np.where(m[SD] > 0, m[SD], np.inf)
    return np.ascontiguousarray(z.clip(-LIMIT, LIMIT), dtype="<f2")


def _restored(stored: np.ndarray, m: np.ndarray) -> np.ndarray:
    return stored if stored.dtype == np.float32 else (stored * m[SD] + m[MEAN]).astype(np.float32)


def _checksum(stored: np.ndarray, m: np.ndarray, censored: np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in (stored, m, censored):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


class _StoredScan(Scan):
    """A scan whose values are read when they are asked for; it was checked when it was converted."""

    _from: "tuple[Store, int]"

    def __getstate__(self) -> Row:
        """Goes to another process with its values, not with its store."""
        return {name: value for name, value in vars(self).items() if name != "_from"} | {
            "values": self.values
        }

    @cached_property
    def values(self) -> np.ndarray:  # type: ignore[override]  # a field of Scan
        store, i = self._from
        return _restored(*store._parts(i)[:2])

    @property
    def n_frames(self) -> int:
        if "_from" not in vars(self):  # a copy with something replaced
            return self.values.shape[0]
        store, i = self._from
        return store._where[i][3]


class Store(Sequence[Scan]):
    """The scans of a store. A scan's values are read when they are asked for.

    Goes to other processes as its folder and rows: each opens its own maps. A DataError if the folder holds no store,
    one whose conversion has not ended, or one whose index was altered.

    Attributes
    ----------
    table : DataFrame
        A row a scan: the columns of the cohort's index, and ``n_frames``, ``n_usable`` (frames not censored), ``t_r``
        (s), ``sha256``, and ``error_max`` and ``error_rms``, the error of the values that come back, in SDs of their
        parcel over the scan.
    excluded : DataFrame
        What could not be used: ``participant_id``, ``path`` or ``file``, ``problem``, ``message``.
    dtype, cohort, atlas, parcels, simulated : str, str, str, tuple of str, bool
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "store.json").is_file():
            if (self.folder / "parcels.json").is_file():
                refuse(f"{self.folder}: its conversion has not ended; run it again", "unfinished")
            refuse(f"{self.folder}: no store (there is no store.json)", "not-a-store")
        catalogue = _read_json(self.folder / "store.json")
        if catalogue.pop("sha256", None) != _digest(catalogue):
            refuse(f"{self.folder}/store.json: altered since the conversion (checksum)", "checksum")
        rows, excluded = [], catalogue["excluded"]
        for name, checksum in catalogue["files"].items():
            part = _read_json(self.folder / name)
            if sha256(self.folder / name) != checksum:
                refuse(f"{self.folder / name}: altered since the conversion (checksum)", "checksum")
            if name != "parcels.json":
                rows += [
                    row | {"shard": Path(name).stem, "place": i}
                    for i, row in enumerate(part["scans"])
                ]
                excluded = excluded + part["excluded"]
        head = _head(self.folder)
        self.dtype, self.atlas, self.parcels = head["dtype"], head["atlas"], head["parcels"]
        self.cohort, self.simulated = head["cohort"], head["simulated"]
        self.table = pd.DataFrame(rows)
        there = {_key(row) for row in rows}
        self.excluded = pd.DataFrame([row for row in excluded if _key(row) not in there])
        self._maps: dict[str, np.ndarray] = {}
        self._read = 0
        self._index()

    def _index(self) -> None:
        columns = ("shard", "place", "start", "n_frames")
        self._where = list(zip(*(self.table[c].tolist() for c in columns), strict=True))
        self._censored = (self.table["n_usable"] < self.table["n_frames"]).tolist()
        self._facts = {
            name: self.table[name].tolist() for name in ("participant_id", "t_r", "source")
        }
        for name in ("session", "run", "t_r_source", "mean_fd"):
            missing = None if name == "mean_fd" else ""
            self._facts[name] = [missing if pd.isna(value) else value for value in self.table[name]]

    def __getstate__(self) -> Row:
        return self.__dict__ | {"_maps": {}}

    def __len__(self) -> int:
        return len(self._where)

    def select(self, rows: Any) -> "Store":
        """The same store with only the rows given, a mask or numbers: those of the training participants, say."""
        chosen = object.__new__(Store)
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        chosen.__dict__ |= self.__getstate__() | {
            "table": self.table.iloc[rows].reset_index(drop=True)
        }
        chosen._index()
        return chosen

    def __getitem__(self, i: Any) -> Any:
        """Scan `i`, or the store of a slice. A float32 scan's values are the map; writing to them reaches no file."""
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        i = range(len(self))[i]
        scan = object.__new__(_StoredScan)
        scan.__dict__ |= {name: column[i] for name, column in self._facts.items()}
        scan.__dict__ |= {"parcels": self.parcels, "atlas": self.atlas, "_from": (self, i)}
        scan.__dict__["censored"] = self._parts(i)[2]
        return scan

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            path = self.folder / name
            try:
                # "c", because torch takes no array that is read-only; what is written to it reaches no file.
                found = np.load(path, mmap_mode="c")
                kind = {1: "bool", 2: self.dtype, 3: "float64"}.get(found.ndim)
                if found.dtype != kind or (found.ndim > 1 and found.shape[-1] != len(self.parcels)):
                    raise ValueError(f"{found.dtype} of shape {found.shape}")
                self._maps[name] = found
            except FileNotFoundError:
                refuse(f"{path}: the store lacks this file", "missing")
            except Exception as error:  # NumPy reads the header as Python, which fails in many ways
                refuse(f"{path}: truncated or damaged ({error})", "truncated")
        return self._maps[name]

    def _parts(
        self, i: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Stored values, moments and censored frames (or None) of some frames of scan `i`, none of them copied."""
        shard, place, first, n_frames = self._where[i]
        stop = n_frames if stop is None else stop
        if not 0 <= start < stop <= n_frames:
            raise IndexError(f"frames must lie in 0 ... {n_frames}, got {start} ... {stop}")
        if self._read > KEEP_MAPPED:
            self._maps, self._read = {}, 0
        values, m = self._map(f"{shard}.npy"), self._map(f"{shard}.moments.npy")
        if len(values) < first + n_frames or place >= len(m):
            refuse(f"{self.folder / shard}.npy: truncated, {len(values)} frames", "truncated")
        stored, censored = values[first + start : first + stop], None
        if self._censored[i]:
            censored = self._map(f"{shard}.censored.npy")[first + start : first + stop]
        self._read += stored.nbytes + m[place].nbytes
        return stored, m[place], censored

    def moments(self, i: int) -> np.ndarray:
        """Mean, SD, smallest and largest of each parcel of scan `i`, shape (4, parcel), as at the conversion."""
        return self._parts(i, 0, 1)[1]

    def censored(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The censored frames among some frames of scan `i`, bool of shape (time,), or None if the scan has none."""
        return self._parts(i, start, stop)[2]

    def read(
        self, i: int, start: int = 0, stop: int | None = None, scaling: Scaling | None = None
    ) -> np.ndarray:
        """Some frames of scan `i` (all by default), (time, parcel) float32, scaled with the whole scan's moments.

        Only those frames are read, into a copy; a frame without a value is 0. Scaled to z-scores by default.
        """
        import torch  # which turns float16 into float32 ten times as fast as NumPy does

        stored, m, censored = self._parts(i, start, stop)
        scaling = scaling or Scaling()
        if self.dtype == "float32":
            offset, scale = scaling.affine(m)
            x = ((stored - offset) / scale).astype(np.float32)
        else:
            x = torch.from_numpy(np.asarray(stored)).float().numpy()
            if scaling.method != "zscore_per_parcel":
                offset, scale = scaling.affine(m)
                x *= (m[SD] / scale).astype(np.float32)
                x += ((m[MEAN] - offset) / scale).astype(np.float32)
        return x if censored is None else np.nan_to_num(x, copy=False)

    def summary(self) -> str:
        """What is in it, and how many scans were left out for which reason."""
        people, error = self.table["participant_id"].nunique(), self.table["error_max"].max()
        what = (
            f"{len(self)} scans of {people} participants, {len(self.parcels)} parcels, {self.dtype}"
        )
        lines = [
            f"{what} (largest error {error:.2g} SD)" + (", SIMULATED" if self.simulated else "")
        ]
        out = self.excluded.reindex(columns=["problem", "left_out_of"])
        counts = out["problem"][out["left_out_of"] != "targets"].value_counts()
        return "\n".join(
            [*lines, *(f"left out: {count} {problem}" for problem, count in counts.items())]
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over participants, t_r, parcels and the scans' checksums."""
        digest = hashlib.sha256(repr((self.dtype, self.parcels)).encode())
        for row in self.table[["participant_id", "t_r", "sha256"]].itertuples(index=False):
            digest.update(repr(tuple(row)).encode())
        return digest.hexdigest()

    def verify(self) -> int:
        """Compare every scan with its checksum and return their number; a DataError for the first that differs."""
        for i, (shard, _, first, n_frames) in enumerate(self._where):
            stored, m, censored = self._parts(i)
            censored = np.zeros(n_frames, dtype=bool) if censored is None else censored
            if _checksum(stored, m, censored) != self.table["sha256"].iat[i]:
                frames = f"frames {first} to {first + n_frames} ({self.table['source'].iat[i]})"
                changed = f"{frames} are not what was converted; convert into a new folder"
                refuse(f"{self.folder / shard}.npy: {changed}", "checksum")
        return len(self)
