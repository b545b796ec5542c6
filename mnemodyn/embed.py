"""Many scans to one table of vectors, and a scan with its censored frames filled."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.formats import participant, read_cifti, stem
from mnemodyn.data.preprocess import save_derived
from mnemodyn.data.scaling import moments
from mnemodyn.data.scans import DataError, Scan, check_no_scan, find_scans, load_scan
from mnemodyn.data.store import Store, is_store
from mnemodyn.files import (
    Kept,
    OutputError,
    begins_with,
    check_output,
    digest,
    locked,
    remove_left_over,
    sha256,
    table_text,
    write_table,
    writing,
)
from mnemodyn.provenance import describe_derivative
from mnemodyn.readout import check_names, kept_readouts

__all__ = ["Embedded", "embed", "reconstruct"]

ENDINGS = (".csv", ".tsv", ".parquet")
ABOUT = ("participant_id", "session", "run", "t_r", "n_frames", "n_usable")
ROWS = 256  # rows in memory at a time


class Embedded(NamedTuple):
    """What :func:`embed` wrote: the number of scans and of features, and the scans it could not use."""

    n_scans: int
    n_features: int
    refused: list


def embed(
    sources: Sequence[str | Path],
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    names: Sequence[str] = ("latent_mean", "latent_sd"),
    pattern: str = "*",
    progress: Callable | None = None,
    **reading: Any,
) -> Embedded:
    """Write the read-outs of every scan into a table, a row a scan.

    One scan is in memory at a time. Read-outs are kept in a hidden folder beside `output` until the
    table is complete, by the content of scan and checkpoint, so that an interrupted call does not
    compute them again. A scan that cannot be used is listed in ``OUTPUT_refused.tsv``.

    Parameters
    ----------
    sources : sequence of str or Path
        Files, folders that are searched for scans, and stores.
    checkpoint : Checkpoint
    output : str or Path
        ``.csv``, ``.tsv`` or ``.parquet`` (which needs pyarrow). Its columns are file,
        participant_id, session, run, t_r (seconds), n_frames, n_usable, and ``READOUT_NUMBER`` for
        each feature (float32).
    names : sequence of str
        Read-outs, see :func:`~mnemodyn.readout.readouts`.
    pattern : str
        Which names in a folder.
    progress : callable, optional
        Called with the number of scans done and their total, before each scan.
    **reading
        As in :func:`~mnemodyn.data.scans.load_scan`.

    Raises
    ------
    DataError
        If there is no scan, none can be used, or `output` is one of them.
    ValueError
        If `output` has another ending, or needs pyarrow, which is missing.
    """
    output = Path(output).expanduser()
    # What holds for all scans is checked before the first is read.
    if output.suffix not in ENDINGS:
        raise ValueError(f"output must end in {', '.join(ENDINGS)}, got {output.name!r}")
    if output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError("a .parquet needs pyarrow: pip install 'mnemodyn[parquet]', or write .csv")
    check_names(checkpoint.model, names)
    checkpoint.require_scaling()
    refused: list = []
    jobs = dict(_jobs(sources, pattern, {"parcels": checkpoint.parcels, **reading}, refused))
    _check_output(output, sources, jobs)
    listing = refused_listing(output)
    unfinished = output.with_name(f".{output.name}.part")
    earlier = output.is_file() and output.stat().st_size and sha256(output)
    with locked(output, "mnemodyn embed"):
        if unfinished.is_symlink() or unfinished.is_file():
            unfinished.unlink()  # of an earlier version; a link is never followed
        with writing(output) as stream:
            rows = _rows(jobs, checkpoint, names, Kept(unfinished), refused, progress)
            n_scans, n_features = _write_table(stream, output.suffix, rows)
            if n_scans == 0:
                reason = f"none of {len(jobs)} scans could be used; the first: "
                raise DataError(reason + refused[0]["message"], "none")
        # A listing of an earlier call would be taken for that of this one.
        listing.unlink(missing_ok=True)
        if refused:
            write_table(listing, pd.DataFrame(refused))
        remove_kept(unfinished)
    if earlier and earlier != sha256(output):
        of_what = "another network, other scans or other read-outs"
        warnings.warn(f"{output}: the earlier table, of {of_what}, is replaced", stacklevel=1)
    return Embedded(n_scans, n_features, refused)


def _check_output(output: Path, sources: Sequence[str | Path], files: Iterable[str]) -> None:
    """Refuse an output that would replace another file, or be taken for a scan by the next call."""
    check_output(output, "table of embed", _is_table, files)
    begins = begins_with("file", "problem", "message")
    check_output(refused_listing(output), "listing of embed", begins, files)
    check_no_scan(output, sources)
    for source in sources:
        if is_store(source) and output.resolve().is_relative_to(Path(source).resolve()):
            raise OutputError(f"{output} lies in the store {source}; write it elsewhere")


def _is_table(path: Path) -> bool:
    """Whether a file is a table that `embed` wrote."""
    columns = ("file", *ABOUT)
    if path.suffix != ".parquet":
        return begins_with(*columns)(path)
    from pyarrow.parquet import read_schema

    return tuple(read_schema(path).names[: len(columns)]) == columns


def refused_listing(output: str | Path) -> Path:
    """Where :func:`embed` lists what it could not use."""
    return Path(output).with_name(f"{Path(output).stem}_refused.tsv")


def _jobs(
    sources: Sequence[str | Path], pattern: str, reading: dict, refused: list
) -> Iterator[tuple]:
    """The name of every scan, and what loads it; what a folder has besides is added to `refused`."""
    nameless: dict[str, Path] = {}
    for source in sources:
        path = Path(source)
        if is_store(path):
            store = Store(path)
            for i in range(len(store)):
                yield f"{path}[{i}]", partial(store.__getitem__, i)
            continue
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder", "no-file")
        files = [path]
        if path.is_dir():
            files, left_out = find_scans(path, pattern)
            refused.extend(left_out)
        for file in files:
            yield str(file), partial(_load, file, reading, nameless)


def _load(path: Path, reading: dict, nameless: dict[str, Path] | None = None) -> Scan:
    """A scan; the file's stem is its participant where neither name nor folder states one."""
    participant_id = participant(path)
    if not participant_id:
        participant_id = stem(path.name)
        # Of a file in each participant's folder, the name would make one person of all.
        first = {} if nameless is None else nameless
        if first.setdefault(participant_id, path) != path:
            message = f"{path}: no participant (sub-...) in its name or folder"
            other = f"{first[participant_id]} has the same name; name the folders sub-..."
            raise DataError(f"{message}, and {other}", "participant")
    try:
        return load_scan(path, participant_id=participant_id, **reading)
    except OSError as error:
        raise DataError(f"{path.name}: {error}", "unreadable") from error


def _rows(
    jobs: dict,
    checkpoint: Checkpoint,
    names: Sequence[str],
    kept: Kept,
    refused: list,
    progress: Callable | None,
) -> Iterator[dict]:
    """A row of the table for each scan that can be used; the others are added to `refused`."""
    network = checkpoint.fingerprint()
    owners: dict[str, str] = {}
    for i, (file, load) in enumerate(jobs.items()):
        if progress is not None:
            progress(i, len(jobs))
        try:
            scan = load()
            owner = owners.setdefault(digest(scan.values), scan.participant_id)
            if owner != scan.participant_id:
                raise DataError(f"{file}: the same series as one of {owner}", "duplicate-series")
            vectors = kept_readouts(checkpoint, network, scan, names, kept)
            _check_finite(file, vectors)
        except (RuntimeError, ValueError) as error:
            # One bad file among thousands must not stop the others.
            problem = getattr(error, "problem", type(error).__name__)
            message = " ".join(str(error).split())
            refused.append({"file": file, "problem": problem, "message": message})
            continue
        row = {"file": file}
        for name in ABOUT:
            row[name] = getattr(scan, name)
        for name, vector in vectors.items():
            for i, value in enumerate(vector):
                row[f"{name}_{i}"] = value
        yield row


def remove_kept(folder: Path) -> None:
    """Remove what `Kept` has written into a folder, and the folder unless somebody else has put something there."""
    remove_left_over(folder)
    for file in folder.glob("*.npz"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _check_finite(file: str, vectors: dict) -> None:
    """Raise a DataError for a read-out that is no number: in the table it would be an empty cell."""
    for name, vector in vectors.items():
        if not np.isfinite(vector).all():
            advice = "look at the checkpoint's weights and scaling, and at the scan's values"
            raise DataError(f"{file}: its {name} is NaN or infinite; {advice}", "not-finite")


def _write_table(stream: Any, ending: str, rows: Iterator[dict]) -> tuple[int, int]:
    """Write rows a few at a time, and return the number of rows and of features."""
    n_rows = 0
    n_features = 0
    parquet = None
    # Until nothing is left to take; itertools.batched came with Python 3.12.
    for batch in iter(lambda: list(islice(rows, ROWS)), []):
        table = pd.DataFrame(batch)
        features = table.columns[1 + len(ABOUT) :]
        n_features = len(features)
        table = table.astype(dict.fromkeys(features, np.float32))
        if ending == ".parquet":
            import pyarrow
            from pyarrow.parquet import ParquetWriter

            # A row group for each batch; the first decides the types of the columns.
            content = pyarrow.Table.from_pandas(table, preserve_index=False)
            if parquet is None:
                parquet = ParquetWriter(stream, content.schema)
            parquet.write_table(content)
        else:
            separator = "\t" if ending == ".tsv" else ","
            header = n_rows == 0
            stream.write(table_text(table, separator, header).encode())
        n_rows += len(batch)
    if parquet is not None:
        parquet.close()
    return n_rows, n_features


def reconstruct(
    path: str | Path,
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    whole: bool = False,
    **reading: Any,
) -> dict:
    """Fill the censored frames of a scan with the network's reconstruction from the others.

    Parameters
    ----------
    path : str or Path
        A scan's file.
    checkpoint : Checkpoint
    output : str or Path
        ``.ptseries.nii``, which keeps the places of the parcels where `path` states them, or
        ``_timeseries.tsv``. Beside it go the censored frames in XCP-D's form and a JSON sidecar. A
        folder that holds ``sub-...`` becomes a BIDS derivative.
    whole : bool
        Write the reconstruction of every frame, and not of the censored ones only.
    **reading
        As in :func:`~mnemodyn.data.scans.load_scan`.

    Returns
    -------
    dict
        ``n_frames`` and ``n_filled``.

    Raises
    ------
    DataError
        If no frame is censored and `whole` is not set, or `output` would replace a file of the scan.
    CheckpointError
        If the parcels are not the checkpoint's, or it does not state its scaling.
    """
    path = Path(path)
    output = Path(output).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the file of one scan", "no-file")
    if _data_set(output) == _data_set(path):
        reason = "would be taken for another scan of the folder that is read"
        raise OutputError(f"{output} {reason}; write into another folder")
    scan = _load(path, {"parcels": checkpoint.parcels, **reading})
    checkpoint.check(scan)
    filled = np.full(scan.n_frames, whole)
    if scan.censored is not None:
        filled = filled | scan.censored
    if not filled.any():
        raise DataError(
            f"{path.name}: no frame is censored, by a table *_outliers.tsv beside the scan; "
            "whole=True (--whole) writes the reconstruction of every frame",
            "censoring",
        )
    values = np.where(filled[:, None], _reconstruction(checkpoint, scan), scan.values)
    axis = None
    if path.name.endswith(".nii") and output.name.endswith(".nii"):
        axis = _parcels_axis(path)
    filled_scan = replace(scan, values=values.astype(np.float32))
    facts = {
        "Sources": [path.name],
        "CheckpointSHA256": checkpoint.fingerprint(),
        "FilledFrames": np.flatnonzero(filled),
    }
    with locked(output, "mnemodyn reconstruct"):
        save_derived(filled_scan, output, facts, axis=axis, inputs=[path])
    # A derivative is the folder of the participants' folders.
    for folder in output.parents:
        if folder.name.startswith("sub-"):
            describe_derivative(folder.parent, "Scans with censored frames filled")
    return {"n_frames": scan.n_frames, "n_filled": int(filled.sum())}


def _data_set(path: Path) -> Path:
    """The folder of a scan, or that of the participants' folders where it is in one."""
    folder = path.resolve().parent
    while folder.name.startswith(("sub-", "ses-", "func")):
        folder = folder.parent
    return folder


@torch.no_grad()
def _reconstruction(checkpoint: Checkpoint, scan: Scan) -> np.ndarray:
    """What a network makes of a scan, (time, parcel), in the units of the scan."""
    model = checkpoint.model
    scaling = checkpoint.require_scaling()
    x = torch.as_tensor(scaling(scan)[None]).to(next(model.parameters()))
    censored = None
    if scan.censored is not None and scan.censored.any():
        censored = torch.as_tensor(scan.censored[None], device=x.device)
    y = model(x, scan.t_r, censored=censored).reconstruction[0].double().cpu().numpy()
    _check_finite(scan.source, {"reconstruction": y})
    offset, scale = scaling.affine(moments(scan.values, scan.censored))
    # A parcel that is constant has an infinite scale and stays at its offset.
    constant = ~np.isfinite(scale)
    y[:, constant] = 0
    scale = np.where(constant, 0, scale)
    return y * scale + offset


def _parcels_axis(path: Path) -> Any:
    """The places of the parcels of a CIFTI file; None where its columns are no parcels."""
    from nibabel.cifti2 import ParcelsAxis

    axis = read_cifti(path)[1][1]
    if isinstance(axis, ParcelsAxis):
        return axis
    return None
