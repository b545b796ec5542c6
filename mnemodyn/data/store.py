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

The format is NumPy's, read through a memory map, with an index in JSON. ``benchmarks/store.py`` reads the same random
windows from it, from Zarr and from Arrow: Zarr has to copy whole chunks for each; Arrow's memory map is as quick as
this one, but a new dependency much larger than this package. JSON keeps text and numbers apart ("0050642" stays text),
which CSV does not, and opens a store of 40,000 scans quickly enough to leave Parquet nothing to save.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.lib import format as npy

from mnemodyn.data.scaling import MEAN, SD, Scaling, moments
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.files import sha256, write_json, writing

__all__ = ["Store", "convert"]

FORMAT = 1
DTYPES = ("float16", "float32")
ENTITIES = ("participant_id", "session", "run", "path")
LIMIT = np.finfo(np.float16).max  # only a censored frame can lie further out
KEEP_MAPPED = 1 << 27  # bytes read before the maps are closed, so that a pass over a large store stays small


def convert(
    scans,
    folder: str | Path,
    *,
    dtype: str = "float16",
    scans_per_shard: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> "Store":
    """Write scans into a store, or add those that it does not have yet.

    May be killed at any moment and started again: it goes on from the last whole shard and ends in the same bytes.
    One scan is held in memory at a time.

    Parameters
    ----------
    scans : Index or sequence of Scan
        An index of a cohort (``table``, ``excluded``, ``load(row)``), or scans. A scan is known by its participant,
        session, run and path; one that is in the store already is not read again.
    folder : str or Path
    dtype : {"float16", "float32"}
    scans_per_shard : int
    progress : callable, optional
        Called with the number of the scan at hand, from 1, and of all scans to do.

    Returns
    -------
    Store

    Raises
    ------
    DataError
        If the folder holds something else, a store of another dtype or cohort, or a scan whose file has changed
        since; if two scans share participant, session, run and path; if no scan is usable; if another conversion is
        at work. A scan that cannot be read, or has other parcels than the first, is listed in ``Store.excluded``
        instead.
    """
    if dtype not in DTYPES:
        raise DataError(f"dtype must be one of {DTYPES}, got {dtype!r}", problem="dtype")
    if scans_per_shard < 1:
        raise ValueError(f"scans_per_shard must be >= 1, got {scans_per_shard}")
    folder = Path(folder)
    rows, load, left_out = _source(scans)
    keys = [_key(row) for row in rows]
    if len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise DataError(f"{twice[-1]}: two scans share {', '.join(ENTITIES)} = {twice}", problem="duplicate-scan")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        new = {
            "format": FORMAT,
            "dtype": dtype,
            "cohort": getattr(getattr(scans, "cohort", None), "name", ""),
            "simulated": bool(getattr(scans, "simulated", False)),
        }
        head = _open_for_writing(folder, new)
        kept, left = {}, {}
        for path in _shards(folder):
            shard = _read_json(path)
            kept |= {_key(row): row["source_bytes"] for row in shard["scans"]}
            left |= {_key(row): row["source_bytes"] for row in shard["excluded"]}
        todo = []
        for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
            size = row["source_bytes"]
            if kept.get(key, size) != size:
                raise DataError(
                    f"{row['path']}: {size} bytes, but {kept[key]} when it was converted; convert into a new folder",
                    problem="source-changed",
                )
            # What was left out is tried again once its file has changed.
            if key not in kept and left.get(key, -1) != size:
                todo.append((number, row))
        # Shards are chunks of what is to do, so that those of a killed conversion are those of the next one too.
        first = 1 + max((int(p.stem) for p in _shards(folder)), default=-1)
        for at in range(0, len(todo), scans_per_shard):
            tick = None if progress is None else lambda i, at=at: progress(at + i, len(todo))
            stem = folder / f"{first + at // scans_per_shard:05d}"
            head = _write_shard(stem, todo[at : at + scans_per_shard], load, head, new, tick)
        if head is None:
            raise DataError(f"none of the {len(rows)} scans for {folder} is usable", problem="no-scan")
        files = {path.name: sha256(path) for path in (folder / "parcels.json", *_shards(folder))}
        catalogue = {"files": files, "excluded": left_out}
        write_json(folder / "store.json", catalogue | {"sha256": _digest(catalogue)})
    return Store(folder)


def _source(scans) -> tuple[list[dict], Callable[[int], Scan], list[dict]]:
    """Rows of the table to be, how to load the scan of a row by its number, and what was left out before."""
    if not hasattr(scans, "load"):
        names = ("participant_id", "session", "run")
        rows = [{name: getattr(scan, name) for name in names} for scan in scans]
        for row, scan in zip(rows, scans, strict=True):
            row |= {"path": scan.source, "source_bytes": scan.values.nbytes}
        return rows, lambda number: scans[number], []
    root = Path(getattr(scans, "folder", None) or ".")
    rows = [_plain(row) for row in scans.table.to_dict("records")]
    for row in rows:
        path = root / row["path"]
        row["source_bytes"] = path.stat().st_size if path.is_file() else None
    excluded = [_plain(row) for row in pd.DataFrame(scans.excluded).to_dict("records")]
    return rows, lambda number: scans.load(scans.table.iloc[number]), excluded


def _plain(row: dict) -> dict:
    """A row as JSON has it: NumPy's scalars as Python's, whatever is missing as None, paths as text."""
    row = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
    row = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in row.items()}
    return {name: None if pd.api.types.is_scalar(value) and pd.isna(value) else value for name, value in row.items()}


def _key(row: dict) -> tuple[str, ...]:
    return tuple(str(row.get(name) or "") for name in ENTITIES)


def _shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"\d{5,}\.json", p.name))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second conversion out. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    at = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(f"{folder}: another conversion is writing this store", problem="locked") from None
    finally:
        os.close(at)


def _open_for_writing(folder: Path, new: dict) -> dict | None:
    """The store's ``parcels.json``, if it has scans; whatever a killed conversion left half done is removed."""
    ours = re.compile(r"parcels\.json|store\.json|\d{5,}(\.moments|\.censored)?\.(npy|json)|\..*")
    strange = [p.name for p in folder.iterdir() if not ours.fullmatch(p.name)]
    if strange:
        raise DataError(f"{folder}: not a store, it holds {strange[:3]}; name a new folder", problem="not-a-store")
    whole = {p.stem for p in _shards(folder)}
    for path in folder.iterdir():
        if path.name.endswith(".tmp") or (path.suffix == ".npy" and path.name.split(".")[0] not in whole):
            path.unlink()
    if not whole or not (folder / "parcels.json").is_file():
        return None
    head = _head(folder)
    for name, value in new.items():
        if head[name] != value:
            raise DataError(
                f"{folder}: a store with {name} {head[name]!r}, but {name} is {value!r} here; name a new folder",
                problem=name,
            )
    return head


def _head(folder: Path) -> dict:
    head = _read_json(folder / "parcels.json")
    if head.keys() != {"format", "dtype", "cohort", "simulated", "atlas", "parcels"} or head["format"] != FORMAT:
        found = head.get("format")
        raise DataError(f"{folder}/parcels.json: format {found}, this version reads {FORMAT}", problem="format")
    return head | {"parcels": tuple(head["parcels"])}


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        raise DataError(f"{path}: the store lacks this file; run its conversion again", problem="missing") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); convert into a new folder", problem="checksum") from None


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_shard(
    stem: Path, todo: list[tuple[int, dict]], load: Callable, head: dict | None, new: dict, tick: Callable | None
) -> dict | None:
    """Write a shard of what can be used of `todo`; return the store's head, which the first usable scan decides."""
    dtype = new["dtype"]
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
                if scan.parcels != head["parcels"]:
                    count = len(scan.parcels), len(head["parcels"])
                    raise DataError(
                        f"{scan.source}: {count[0]} parcels, the store has {count[1]} of other names or order",
                        problem="parcel-count" if count[0] != count[1] else "parcel-order",
                    )
                m = moments(scan.values, scan.censored)
            except DataError as error:
                facts = {name: row.get(name) for name in (*ENTITIES, "source_bytes")}
                excluded.append(facts | {"problem": error.problem, "message": str(error)})
                continue
            if start == 0:
                _npy_header(stream, dtype, 0, len(scan.parcels))
            stored = _stored(scan.values, m, dtype)
            stream.write(stored.data)
            censored = np.zeros(scan.n_frames, dtype=bool) if scan.censored is None else scan.censored
            sd = np.where(m[SD] > 0, m[SD], np.inf)
            off = ((_restored(stored, m) - scan.values.astype(np.float64)) / sd)[~censored]
            known = {name: getattr(scan, name) for name in ("participant_id", "session", "run", "mean_fd")}
            rows.append(
                row
                | {name: value for name, value in known.items() if row.get(name) in (None, "")}
                | {name: getattr(scan, name) for name in ("t_r", "t_r_source", "source")}
                | {
                    "n_frames": scan.n_frames,
                    "n_usable": scan.n_usable,
                    "start": start,
                    "error_max": float(np.abs(off).max()),
                    "error_rms": float(np.sqrt(np.square(off).mean())),
                    "sha256": _checksum(stored, m, censored),
                }
            )
            all_moments.append(m)
            all_censored.append(censored)
            start += scan.n_frames
        if rows:
            stream.seek(0)
            _npy_header(stream, dtype, start, len(head["parcels"]))
        else:
            np.save(stream, np.zeros((0, 0), dtype))
    parts = {"moments": np.array(all_moments).reshape(len(rows), 4, -1 if rows else 0)}
    if any(c.any() for c in all_censored):
        parts["censored"] = np.concatenate(all_censored)
    for name, part in parts.items():
        with writing(stem.with_name(f"{stem.name}.{name}.npy")) as stream:
            np.save(stream, part)
    write_json(stem.with_name(f"{stem.name}.json"), {"scans": rows, "excluded": excluded})
    return head


def _npy_header(stream, dtype: str, n_frames: int, n_parcels: int) -> None:
    """NumPy pads the header so that the first axis can grow: the same number of bytes whatever n_frames."""
    descr = npy.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": (n_frames, n_parcels)})


def _stored(values: np.ndarray, m: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return np.ascontiguousarray(values, dtype="<f4")
    z = (values - m[MEAN]) / np.where(m[SD] > 0, m[SD], np.inf)
    return np.ascontiguousarray(z.clip(-LIMIT, LIMIT), dtype="<f2")


def _restored(stored: np.ndarray, m: np.ndarray) -> np.ndarray:
    return stored if stored.dtype == np.float32 else (stored * m[SD] + m[MEAN]).astype(np.float32)


def _checksum(stored: np.ndarray, m: np.ndarray, censored: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(stored).data)
    digest.update(np.ascontiguousarray(m).data)
    digest.update(np.ascontiguousarray(censored).data)
    return digest.hexdigest()


class _StoredScan(Scan):
    """A scan whose values are read when they are asked for; it was checked when it was converted."""

    def __getstate__(self) -> dict:
        """Goes to another process with its values, not with its store."""
        return {name: value for name, value in vars(self).items() if name != "_from"} | {"values": self.values}

    @cached_property
    def values(self) -> np.ndarray:
        store, i = self._from
        return _restored(*store._parts(i)[:2])

    @property
    def n_frames(self) -> int:
        if "_from" not in vars(self):  # a copy with something replaced
            return self.values.shape[0]
        store, i = self._from
        return store._where[i][3]


class Store(Sequence):
    """The scans of a store. A scan's values are read when they are asked for.

    Goes to other processes as its folder and rows: each opens its own maps.

    Parameters
    ----------
    folder : str or Path

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

    Raises
    ------
    DataError
        If the folder holds no store, one whose conversion has not ended, or one whose index was altered.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "store.json").is_file():
            begun = (self.folder / "parcels.json").is_file()
            raise DataError(
                f"{self.folder}: "
                + ("its conversion has not ended; run it again" if begun else "no store (there is no store.json)"),
                problem="unfinished" if begun else "not-a-store",
            )
        catalogue = _read_json(self.folder / "store.json")
        if catalogue.pop("sha256", None) != _digest(catalogue):
            raise DataError(f"{self.folder}/store.json: altered since the conversion (checksum)", problem="checksum")
        rows, excluded = [], catalogue["excluded"]
        for name, checksum in catalogue["files"].items():
            part = _read_json(self.folder / name)
            if sha256(self.folder / name) != checksum:
                raise DataError(f"{self.folder / name}: altered since the conversion (checksum)", problem="checksum")
            if name != "parcels.json":
                rows += [row | {"shard": Path(name).stem, "place": i} for i, row in enumerate(part["scans"])]
                excluded = excluded + part["excluded"]
        head = _head(self.folder)
        self.dtype, self.atlas, self.parcels = head["dtype"], head["atlas"], head["parcels"]
        self.cohort, self.simulated = head["cohort"], head["simulated"]
        self.table = pd.DataFrame(rows)
        there = {_key(row) for row in rows}
        self.excluded = pd.DataFrame([row for row in excluded if _key(row) not in there])
        self._maps: dict[str, np.ndarray | None] = {}
        self._read = 0
        self._index()

    def _index(self) -> None:
        columns = ("shard", "place", "start", "n_frames")
        self._where = list(zip(*(self.table[c].tolist() for c in columns), strict=True))
        self._facts = {name: self.table[name].tolist() for name in ("participant_id", "t_r", "source")}
        for name in ("session", "run", "t_r_source", "mean_fd"):
            missing = None if name == "mean_fd" else ""
            self._facts[name] = [missing if pd.isna(value) else value for value in self.table[name]]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r}, {len(self)} scans, {len(self.parcels)} parcels, {self.dtype})"

    def __len__(self) -> int:
        return len(self._where)

    def select(self, rows) -> "Store":
        """The same store with only the rows given, a mask or numbers: those of the training participants, say."""
        chosen = object.__new__(Store)
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        chosen.__dict__ |= self.__getstate__() | {"table": self.table.iloc[rows].reset_index(drop=True)}
        chosen._index()
        return chosen

    def at_least(self, seconds: float) -> "Store":
        """The same store with only the scans that last `seconds` or longer."""
        return self.select((self.table["n_frames"] >= (seconds / self.table["t_r"]).round()).to_numpy())

    def __getitem__(self, i):
        """Scan `i`, or the store of a slice. A float32 scan's values are the map; writing to them reaches no file."""
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        i = range(len(self))[i]
        scan = object.__new__(_StoredScan)
        scan.__dict__ |= {name: column[i] for name, column in self._facts.items()}
        scan.__dict__ |= {"parcels": self.parcels, "atlas": self.atlas, "_from": (self, i)}
        scan.__dict__["censored"] = self._parts(i)[2]
        return scan

    def _map(self, name: str) -> np.ndarray | None:
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
                if not name.endswith(".censored.npy"):
                    raise DataError(f"{path}: the store lacks this file", problem="missing") from None
                self._maps[name] = None
            except Exception as error:  # NumPy reads the header as Python, which fails in many ways
                raise DataError(f"{path}: truncated or damaged ({error})", problem="truncated") from None
        return self._maps[name]

    def _parts(self, i: int, start: int = 0, stop: int | None = None) -> tuple:
        """Stored values, moments and censored frames of some frames of scan `i`, none of them copied."""
        shard, place, first, n_frames = self._where[i]
        stop = n_frames if stop is None else stop
        if not 0 <= start < stop <= n_frames:
            raise IndexError(f"frames must lie in 0 ... {n_frames}, got {start} ... {stop}")
        if self._read > KEEP_MAPPED:
            self._maps, self._read = {}, 0
        values, m = self._map(f"{shard}.npy"), self._map(f"{shard}.moments.npy")
        censored = self._map(f"{shard}.censored.npy")
        frames = slice(first + start, first + stop)
        if len(values) < first + n_frames or place >= len(m):
            raise DataError(f"{self.folder / shard}.npy: truncated, {len(values)} frames", problem="truncated")
        censored = None if censored is None or not censored[first : first + n_frames].any() else censored[frames]
        stored = values[frames]
        self._read += stored.nbytes + m[place].nbytes
        return stored, m[place], censored

    def moments(self, i: int) -> np.ndarray:
        """Mean, SD, smallest and largest of each parcel of scan `i`, shape (4, parcel), as at the conversion."""
        return self._parts(i, 0, 1)[1]

    def censored(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The censored frames among some frames of scan `i`, bool of shape (time,), or None if the scan has none."""
        return self._parts(i, start, stop)[2]

    def read(self, i: int, start: int = 0, stop: int | None = None, scaling: Scaling | None = None) -> np.ndarray:
        """Some frames of scan `i`, scaled with the whole scan's moments; only those frames are read.

        Parameters
        ----------
        i : int
        start, stop : int
            Frames; the whole scan by default.
        scaling : Scaling, optional
            The z-score of each parcel by default.

        Returns
        -------
        ndarray, shape (time, parcel), float32
            A copy. A frame without a value is 0.
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
        lines = [
            f"{len(self)} scans of {people} participants, {len(self.parcels)} parcels, {self.dtype} (largest error "
            f"{error:.2g} SD)" + (", SIMULATED" if self.simulated else "")
        ]
        out = self.excluded
        out = out[out["left_out_of"] != "targets"] if "left_out_of" in out else out
        counts = out["problem"].value_counts() if len(out) else {}
        return "\n".join([*lines, *(f"left out: {count} {problem}" for problem, count in counts.items())])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over participants, t_r, parcels and the scans' checksums."""
        digest = hashlib.sha256(repr((self.dtype, self.parcels)).encode())
        for row in self.table[["participant_id", "t_r", "sha256"]].itertuples(index=False):
            digest.update(repr(tuple(row)).encode())
        return digest.hexdigest()

    def verify(self) -> int:
        """Compare every scan with its checksum; returns the number of scans.

        Raises
        ------
        DataError
            Whose ``problem`` is "missing", "truncated" or "checksum", for the first scan that is not what was
            converted.
        """
        for i, (shard, _, first, n_frames) in enumerate(self._where):
            stored, m, censored = self._parts(i)
            censored = np.zeros(n_frames, dtype=bool) if censored is None else censored
            if _checksum(stored, m, censored) != self.table["sha256"].iat[i]:
                raise DataError(
                    f"{self.folder / shard}.npy: frames {first} to {first + n_frames} "
                    f"({self.table['source'].iat[i]}) are not what was converted; convert into a new folder",
                    problem="checksum",
                )
        return len(self)
