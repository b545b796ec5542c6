"""Scans to vectors and back to scans: any number of files, one in memory at a time, taken up again where it stopped."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
import torch

from mnemodyn.checkpoint import Checkpoint, CheckpointError
from mnemodyn.data.formats import PARTICIPANT, read_cifti, stem
from mnemodyn.data.scaling import Scaling, moments
from mnemodyn.data.scans import DataError, Scan, load_scan, save_scan, scan_files
from mnemodyn.evaluate.readout import READOUTS, readouts
from mnemodyn.files import write_json, write_text, writing
from mnemodyn.provenance import describe_derivative, generated_by

__all__ = ["Embedded", "embed", "reconstruct"]

TEXT = dict.fromkeys(("file", "participant_id", "session", "run"), "string")
ABOUT = {**TEXT, "t_r": "float64", "n_frames": "int64", "n_usable": "int64"}
ROWS = 256  # in memory at a time


class Embedded(NamedTuple):
    """What :func:`embed` did: rows written, how many of them an earlier call had, features, and what was refused."""

    n_scans: int
    n_resumed: int
    n_features: int
    refused: list[dict]


# A scan to come: its name in the table, what changes when it changes, and how it is loaded.
Job = tuple[str, list, Callable[[], Scan]]


def embed(
    sources: Sequence[str | Path],
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    names: Sequence[str] = ("latent_mean", "latent_sd"),
    pattern: str = "*",
    progress: Callable[[int, int], None] | None = None,
    **reading: Any,
) -> Embedded:
    """Write the read-outs of every scan into a table, a row a scan.

    One scan is in memory at a time. Rows go to a hidden file beside `output` as they are made, so that a call that
    was interrupted goes on from there; `output` appears whole at the end. A scan that cannot be used is listed in
    ``OUTPUT_refused.tsv`` and stops nothing.

    Parameters
    ----------
    sources : sequence of str or Path
        Files, folders that are searched for scans whose names fit `pattern`, and stores.
    output : str or Path
        ``.csv`` or ``.parquet`` (which needs pyarrow). Columns: file, participant_id, session, run, t_r (s),
        n_frames, n_usable, and ``READOUT_NUMBER`` for each feature (float32).
    names : sequence of str
        Read-outs, see :func:`~mnemodyn.evaluate.readout.readouts`.
    progress : callable, optional
        Called with the number done and their total.
    **reading
        As in :func:`~mnemodyn.data.scans.load_scan`.

    Raises
    ------
    DataError
        If there is no scan, or none of them can be used.
    CheckpointError
        If the checkpoint does not know its scaling.
    """
    output = Path(output)
    if output.suffix not in (".csv", ".parquet"):
        raise ValueError(f"output must end in .csv or .parquet, got {output.name!r}")
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name the file to write")
    if output.suffix == ".parquet":
        _parquet()
    if unknown := sorted(set(names) - set(READOUTS)):
        raise ValueError(f"read-out must be one of {tuple(READOUTS)}, got {unknown[0]!r}")
    _keep(sources, output)
    _scaling(checkpoint)
    jobs = list(_jobs(sources, pattern, {"parcels": checkpoint.parcels, **reading}))
    output.parent.mkdir(parents=True, exist_ok=True)
    identity = {"network": _digest(checkpoint), "readouts": list(names), "columns": list(ABOUT)}
    identity["reading"] = repr(sorted(reading.items()))
    kept = output.with_name(f".{output.name}.part")
    places, refused = _resume(kept, identity), []
    known = [name in places and places[name][0] == stamp for name, stamp, _ in jobs]
    with open(kept, "ab") as stream:
        if not stream.tell():
            stream.write(json.dumps(identity).encode() + b"\n")
        for i, (name, stamp, load) in enumerate(jobs):
            if not known[i]:
                places.pop(name, None)
                try:
                    row = _row(name, load(), checkpoint, names)
                except (OSError, RuntimeError, ValueError) as error:
                    problem = getattr(error, "problem", type(error).__name__)
                    refused.append({"file": name, "problem": problem, "message": str(error)})
                else:
                    places[name] = (stamp, stream.tell())
                    stream.write(json.dumps({"stamp": stamp, **row}).encode() + b"\n")
                    stream.flush()
            if progress:
                progress(i + 1, len(jobs))
    listing = refused_listing(output)
    if refused:
        lines = ("\t".join(re.sub(r"\s+", " ", str(v)) for v in r.values()) for r in refused)
        write_text(listing, "\n".join(["file\tproblem\tmessage", *lines]) + "\n")
    else:
        listing.unlink(missing_ok=True)
    done = [places[name][1] for name, _, _ in jobs if name in places]
    if not done:
        mend = (
            "; `mnemodyn info CHECKPOINT` lists what the network reads"
            if "parcel" in refused[0]["problem"]
            else ""
        )
        raise DataError(
            f"none of {len(jobs)} scans could be used, the first: {refused[0]['message']}{mend}",
            "none",
        )
    with open(kept, "rb") as stream:
        width = _write_table(output, stream, done)
    kept.unlink()
    return Embedded(len(done), sum(known), width, refused)


def _keep(sources: Sequence[str | Path], output: str | Path) -> None:
    if Path(output).resolve() in {Path(source).resolve() for source in sources}:
        raise DataError(
            f"{output} is a scan that is read, and would be replaced; name another output", "output"
        )


def refused_listing(output: str | Path) -> Path:
    """Where :func:`embed` lists what it could not use."""
    return Path(output).with_name(f"{Path(output).stem}_refused.tsv")


def _jobs(sources: Sequence[str | Path], pattern: str, reading: dict) -> Iterator[Job]:
    seen = set()
    for source in sources:
        path = Path(source)
        if (path / "store.json").is_file():
            from mnemodyn.data.store import Store

            store = Store(path)
            yield from (
                (f"{path}[{i}]", [len(store)], partial(store.__getitem__, i))
                for i in range(len(store))
            )
            continue
        if not path.exists():
            raise DataError(f"there is no file or folder {path}", problem="no-file")
        for file in scan_files(path, pattern) if path.is_dir() else [path]:
            if str(file) not in seen:
                seen.add(str(file))
                yield (
                    str(file),
                    [file.stat().st_size, file.stat().st_mtime_ns],
                    partial(_load, file, reading),
                )
    if not sources:
        raise DataError("no scan was named; give files or folders", problem="no-file")


def _load(path: Path, reading: dict) -> Scan:
    """A scan; where its name holds no participant, the name without its ending stands for one."""
    named = PARTICIPANT.search(path.name)
    return load_scan(path, participant_id=None if named else stem(path.name), **reading)


def _row(name: str, scan: Scan, checkpoint: Checkpoint, names: Sequence[str]) -> dict:
    checkpoint.check(scan)
    x, model = _scaling(checkpoint)(scan), checkpoint.model
    parts = [(x, scan.censored)]
    if model.reference:  # the draft's weights belong to one length
        n = model.config.n_timepoints
        if len(x) < n:
            raise DataError(
                f"{name}: the checkpoint reads {n} frames, got {len(x)}", problem="too-short"
            )
        parts = [(x[i : i + n], None) for i in range(0, len(x) - n + 1, n)]
    found = [readouts(model, part, scan.t_r, names, censored=censored) for part, censored in parts]
    features = {
        k: np.mean([f[k] for f in found], axis=0).astype(np.float32).tolist() for k in names
    }
    return {
        "about": {"file": name} | {k: getattr(scan, k) for k in list(ABOUT)[1:]},
        "features": features,
    }


def _scaling(checkpoint: Checkpoint) -> Scaling:
    if checkpoint.scaling is None:
        raise CheckpointError(
            "the checkpoint does not know its scaling; name it (--scaling, or dataclasses.replace)"
        )
    return checkpoint.scaling


def _digest(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256(
        repr((checkpoint.model.config, checkpoint.scaling, checkpoint.parcels)).encode()
    )
    for name, value in sorted(checkpoint.model.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _resume(path: Path, identity: dict) -> dict[str, tuple[list, int]]:
    """Stamp and place of each row that an interrupted call has left; what was cut off in the middle is dropped."""
    places: dict[str, tuple[list, int]] = {}
    if not path.is_file():
        return places
    with open(path, "r+b") as stream:
        try:
            fits = json.loads(stream.readline()) == identity
        except ValueError:
            fits = False
        end = stream.tell() if fits else 0
        while fits and (line := stream.readline()).endswith(b"\n"):
            row = json.loads(line)
            places[row["about"]["file"]] = (row["stamp"], end)
            end = stream.tell()
        stream.truncate(end)
    return places


def _write_table(output: Path, stream: BinaryIO, places: list[int]) -> int:
    """Write the rows at these places, a few at a time, and return the number of features; the file appears whole."""
    writer: Any = None
    with writing(output) as target:
        for start in range(0, len(places), ROWS):
            rows = []
            for place in places[start : start + ROWS]:
                stream.seek(place)
                row = json.loads(stream.readline())
                features = {
                    f"{k}_{i}": v
                    for k, values in row["features"].items()
                    for i, v in enumerate(values)
                }
                rows.append(row["about"] | features)
            table = pd.DataFrame(rows).astype(dict.fromkeys(features, np.float32) | ABOUT)
            if output.suffix == ".csv":
                table.to_csv(target, header=start == 0, index=False, lineterminator="\n")
                continue
            content = _parquet().Table.from_pandas(table, preserve_index=False)
            writer = writer or _parquet().parquet.ParquetWriter(target, content.schema)
            writer.write_table(content)
        if writer is not None:
            writer.close()
    return len(features)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "a .parquet needs pyarrow: pip install 'mnemodyn[parquet]', or write a .csv"
        ) from error
    return pyarrow


@torch.no_grad()
def reconstruct(
    path: str | Path,
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    whole: bool = False,
    **reading: Any,
) -> dict:
    """Fill the censored frames of a scan with what the network makes of the others.

    `output` is a ``.ptseries.nii``, which keeps the places of its parcels where `path` states them, or a ``.tsv``.
    Beside it go the censored frames in XCP-D's form and a JSON sidecar; what holds a folder ``sub-...`` becomes a BIDS
    derivative. `whole` writes the network's reconstruction of every frame, not of the censored ones only; `reading` is
    as in :func:`~mnemodyn.data.scans.load_scan`. Returns ``n_frames`` and ``n_filled``.

    Raises
    ------
    DataError
        If no frame is censored and `whole` is not set, or `output` is the scan itself.
    CheckpointError
        If the parcels are not the checkpoint's, or its scaling is not known.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file of one scan")
    _keep([path], output)
    scan = _load(path, {"parcels": checkpoint.parcels, **reading})
    checkpoint.check(scan)
    scaling = _scaling(checkpoint)
    censored = np.zeros(scan.n_frames, bool) if scan.censored is None else scan.censored
    if not whole and not censored.any():
        mend = "a table *_outliers.tsv beside the scan names such frames"
        mend += ", and whole=True (--whole) writes the reconstruction of every frame"
        raise DataError(
            f"{path.name}: no frame is censored, so there is nothing to fill; {mend}", "censoring"
        )
    from nibabel.cifti2 import ParcelsAxis

    parameter = next(checkpoint.model.parameters())
    x = torch.as_tensor(scaling(scan)[None]).to(parameter)
    missing = torch.as_tensor(censored[None], device=x.device) if censored.any() else None
    y = checkpoint.model(x, scan.t_r, censored=missing).reconstruction[0].double().cpu().numpy()
    offset, scale = scaling.affine(moments(scan.values, scan.censored))
    y = np.where(np.isfinite(scale), y, 0) * np.where(np.isfinite(scale), scale, 0) + offset
    filled = np.ones_like(censored) if whole else censored
    values = np.where(filled[:, None], y, scan.values).astype(np.float32)
    axis = (
        read_cifti(path)[1][1]
        if path.name.endswith(".nii") and str(output).endswith(".nii")
        else None
    )
    axis = axis if isinstance(axis, ParcelsAxis) else None
    output = save_scan(replace(scan, values=values), output, axis=axis)
    facts = {
        "RepetitionTime": scan.t_r,
        "Sources": [path.name],
        "NetworkSHA256": _digest(checkpoint),
    }
    facts |= {"FilledFrames": np.flatnonzero(filled), "GeneratedBy": generated_by()}
    write_json(output.with_name(f"{output.name.split('.')[0]}.json"), facts)
    root = next(
        (folder.parent for folder in output.parents if folder.name.startswith("sub-")), None
    )
    if root is not None:
        describe_derivative(root, "Scans with censored frames filled")
    return {"n_frames": scan.n_frames, "n_filled": int(filled.sum())}
