"""From dense series or volumes to parcels: one sparse product, and Connectome Workbench for volume to surface."""

import json
import re
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mnemodyn.data.atlas import Atlas, greyordinates, read_atlas
from mnemodyn.data.formats import entities, motion, read_cifti, sidecar_t_r, volume_t_r
from mnemodyn.data.scans import DataError, Scan, _agree_on_t_r, save_scan
from mnemodyn.files import sha256, write_json
from mnemodyn.provenance import describe_derivative, generated_by

if TYPE_CHECKING:
    from nibabel.cifti2 import BrainModelAxis, ParcelsAxis
    from scipy.sparse import csr_array

__all__ = ["Preprocessing", "align", "averaging", "parcel_axis", "parcellate", "preprocess", "preprocess_scan"]

BLOCK = 8192  # grayordinates in memory as float64 at a time; a CIFTI-2 file holds the series of each in one piece
DENSE, VOLUMES = ".dtseries.nii", ("_bold.nii.gz", "_bold.nii")


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every scan.

    Attributes
    ----------
    atlas : str
        ``"schaefer400-tian3"``, a ``.dlabel.nii``, or a label volume (``.nii.gz``) for volumes.
    low_pass, high_pass : float, optional
        Ends of the band that is kept, Hz; none by default.
    confounds : tuple of str
        Columns of the ``*_desc-confounds_timeseries.tsv`` beside a scan that are regressed out; none by default.
    surfaces : tuple of str
        Left and right midthickness (``.surf.gii``, fs_LR 32k) in the space of the volumes; only for volumes with an
        atlas of grayordinates.
    t_r : float, optional
        Repetition time in seconds, for files that state none in their header or sidecar.
    table : bool
        Write ``_timeseries.tsv`` in place of ``_timeseries.ptseries.nii``. A label volume always gives a table.
    """

    atlas: str
    low_pass: float | None = None
    high_pass: float | None = None
    confounds: tuple[str, ...] = ()
    surfaces: tuple[str, ...] = ()
    t_r: float | None = None
    table: bool = False

    def __post_init__(self):
        for name in ("low_pass", "high_pass"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise DataError(f"{name} must be > 0 Hz or left out, got {value}", problem="setting")
        if self.low_pass and self.high_pass and self.low_pass <= self.high_pass:
            raise DataError(
                f"low_pass must be above high_pass, got {self.low_pass} and {self.high_pass} Hz", problem="setting"
            )
        if len(self.surfaces) not in (0, 2):
            raise DataError(f"surfaces must be a left and a right one, got {len(self.surfaces)}", problem="setting")

    @property
    def label_volume(self) -> bool:
        return self.atlas.endswith((".nii", ".nii.gz")) and not self.atlas.endswith(".dlabel.nii")


def averaging(labels: np.ndarray) -> "csr_array":
    """The matrix that turns grayordinates into parcels, the mean over each.

    Parameters
    ----------
    labels : ndarray, shape (grayordinate,), int
        0 for none, otherwise 1 to n_parcels.

    Returns
    -------
    csr_array, shape (n_parcels, grayordinate)
        Rows sum to 1.

    Raises
    ------
    DataError
        Where a label between 1 and the largest has no grayordinate.
    """
    from scipy.sparse import csr_array

    sizes = np.bincount(labels)[1:]
    if not sizes.all() or not len(sizes):
        raise DataError(f"parcel {int(sizes.argmin()) + 1 if len(sizes) else 1} has no grayordinate", problem="atlas")
    columns = np.flatnonzero(labels)
    rows = labels[columns] - 1
    return csr_array((1 / sizes[rows], (rows, columns)), shape=(len(sizes), len(labels)))


def parcellate(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean series of each parcel.

    Parameters
    ----------
    values : array-like, shape (time, grayordinate)
        An array, or a proxy of one that is read in blocks.
    labels : ndarray, shape (grayordinate,), int
        0 for none, otherwise 1 to n_parcels.

    Returns
    -------
    ndarray, shape (time, n_parcels), float32
        Summed in float64.

    Raises
    ------
    DataError
        Where the shapes do not fit, or a parcel has no grayordinate.
    """
    if len(values.shape) != 2 or labels.shape != values.shape[1:]:
        raise DataError(
            f"labels must be one a grayordinate, values have shape {tuple(values.shape)} and labels {labels.shape}",
            problem="atlas",
        )
    weights = averaging(labels).tocsc()
    sums = np.zeros((weights.shape[0], values.shape[0]))
    for i in range(0, len(labels), BLOCK):
        sums += weights[:, i : i + BLOCK] @ np.ascontiguousarray(values[:, i : i + BLOCK].T, dtype=float)
    return sums.T.astype(np.float32, order="C")


def align(atlas: Atlas, axis: "BrainModelAxis") -> np.ndarray:
    """An atlas' labels for the grayordinates of a series, matched by vertex and by voxel.

    The two may differ in which grayordinates they hold, as a cortical atlas with the medial wall and a series without.

    Returns
    -------
    ndarray, shape (grayordinate of `axis`,), int

    Raises
    ------
    DataError
        Where surfaces have other numbers of vertices, volumes lie otherwise in space, or a parcel of the atlas has no
        grayordinate in the series.
    """
    if atlas.axis == axis:
        return atlas.labels
    labels = np.zeros(len(axis), int)
    for name, n_vertices in axis.nvertices.items():
        ours, theirs = atlas.axis.name == name, axis.name == name
        if atlas.axis.nvertices.get(name, n_vertices) != n_vertices:
            raise DataError(
                f"{name} has {n_vertices} vertices in the series and {atlas.axis.nvertices[name]} in the atlas "
                f"{atlas.name}; resample one of them",
                problem="grayordinates",
            )
        surface = np.zeros(n_vertices, int)
        surface[atlas.axis.vertex[ours]] = atlas.labels[ours]
        labels[theirs] = surface[axis.vertex[theirs]]
    if axis.volume_mask.any() and atlas.axis.volume_mask.any():
        if axis.volume_shape != atlas.axis.volume_shape or not np.allclose(axis.affine, atlas.axis.affine, atol=1e-3):
            raise DataError(
                f"the volume of the series, {axis.volume_shape}, and that of the atlas {atlas.name}, "
                f"{atlas.axis.volume_shape}, differ in shape or affine; resample one of them",
                problem="grayordinates",
            )
        volume = np.zeros(axis.volume_shape, int)
        volume[tuple(atlas.axis.voxel[atlas.axis.volume_mask].T)] = atlas.labels[atlas.axis.volume_mask]
        labels[axis.volume_mask] = volume[tuple(axis.voxel[axis.volume_mask].T)]
    missing = sorted(set(range(1, len(atlas.parcels) + 1)) - set(labels.tolist()))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(atlas.parcels)} parcels of the atlas {atlas.name} have no grayordinate in the "
            f"series, among them {[atlas.parcels[i - 1] for i in missing[:3]]}",
            problem="grayordinates",
        )
    return labels


def parcel_axis(labels: np.ndarray, parcels: Sequence[str], axis: "BrainModelAxis") -> "ParcelsAxis":
    """The axis of a ``.ptseries.nii``: which vertices and voxels each parcel is made of."""
    from nibabel.cifti2 import ParcelsAxis

    return ParcelsAxis.from_brain_models([(name, axis[labels == i]) for i, name in enumerate(parcels, start=1)])


def preprocess_scan(source: str | Path, settings: Preprocessing) -> tuple[Scan, "ParcelsAxis | None", dict]:
    """One dense series or volume as parcels.

    Parameters
    ----------
    source : str or Path
        ``.dtseries.nii``, or a volume ``.nii.gz``.
    settings : Preprocessing

    Returns
    -------
    scan : Scan
    axis : ParcelsAxis or None
        None where the atlas is a label volume.
    facts : dict
        What the sidecar says of it.

    Raises
    ------
    DataError
        Where the file cannot be used, or a program or package is missing; the message says how to get it.
    """
    source = Path(source)
    participant = _participant(source)
    try:
        if source.name.endswith(DENSE):
            values, t_r, origin, parcels, axis, facts = _from_dense(source, source, settings)
        elif settings.label_volume:
            values, t_r, origin, parcels, axis, facts = _from_labels(source, settings)
        else:
            values, t_r, origin, parcels, axis, facts = _from_volume(source, settings)
        if settings.confounds or settings.low_pass or settings.high_pass:
            values = _clean(source, values, t_r, settings)
    except DataError as error:
        message = str(error)
        named = message if message.startswith(source.name) else f"{source.name}: {message}"
        raise DataError(named, problem=error.problem) from error
    named = entities(source.name)
    censored, _ = motion(source)
    scan = Scan(
        participant,
        np.ascontiguousarray(values, np.float32),
        t_r,
        parcels,
        facts["Atlas"],
        source.name,
        named.get("ses", ""),
        named.get("run", ""),
        origin,
        censored,
    )
    return scan, axis, {"RepetitionTime": t_r, "RepetitionTimeFrom": origin, **facts}


def _participant(source: Path) -> str:
    found = [match[0] for part in reversed(source.parts) if (match := re.search(r"sub-[A-Za-z0-9]+", part))]
    if not found:
        raise DataError(
            f"{source.name}: no participant (sub-...) in the file's name or its folders", problem="no-participant"
        )
    return found[0]


@lru_cache(maxsize=2)  # of one process: many scans, one atlas
def _atlas(source: str) -> Atlas:
    return read_atlas(source)


def _from_dense(source: Path, dense: Path, settings: Preprocessing):
    """Values, t_r and its origin, parcels, their axis, and facts; `dense` is `source` on grayordinates."""
    from nibabel.cifti2 import BrainModelAxis, SeriesAxis

    values, (series, axis), header = read_cifti(dense)
    if not isinstance(series, SeriesAxis) or not isinstance(axis, BrainModelAxis):
        raise DataError(
            f"axes must be (series, grayordinates), got ({type(series).__name__}, {type(axis).__name__})", "not-dense"
        )
    t_r, origin = _agree_on_t_r(source.name, header, sidecar_t_r(source), settings.t_r, False)
    atlas = _atlas(settings.atlas)
    labels = align(atlas, axis)
    absent = int(np.count_nonzero(atlas.labels) - np.count_nonzero(labels))
    facts = {"Atlas": atlas.name, "AtlasGrayordinatesAbsent": absent}
    return parcellate(values, labels), t_r, origin, atlas.parcels, parcel_axis(labels, atlas.parcels, axis), facts


def _from_volume(source: Path, settings: Preprocessing):
    _, header = _volume(source)
    t_r, origin = _agree_on_t_r(source.name, header, sidecar_t_r(source), settings.t_r, False)
    with tempfile.TemporaryDirectory() as folder:
        dense = to_grayordinates(source, t_r, settings.surfaces, Path(folder))
        values, _, _, parcels, axis, facts = _from_dense(dense, dense, settings)
    return values, t_r, origin, parcels, axis, facts


def _from_labels(source: Path, settings: Preprocessing):
    image, header = _volume(source)
    t_r, origin = _agree_on_t_r(source.name, header, sidecar_t_r(source), settings.t_r, False)
    path = Path(settings.atlas)
    masker = _nilearn("maskers").NiftiLabelsMasker(
        path, standardize=None, resampling_target="data", keep_masked_labels=False
    )
    values = masker.fit_transform(image)
    keys = [int(key) for place, key in masker.region_ids_.items() if place != "background"]
    table = Path(re.sub(r"\.nii(\.gz)?$", ".tsv", str(path)))
    names = {}
    if table.is_file():  # BIDS: index and name
        names = pd.read_csv(table, sep="\t").set_index("index")["name"].astype(str).to_dict()
    return values, t_r, origin, tuple(names.get(k, str(k)) for k in keys), None, {"Atlas": _plain_name(path)}


def _volume(source: Path):
    import nibabel

    try:
        image = nibabel.load(source)
    except Exception as error:
        raise DataError(f"not a readable volume ({error})", problem="truncated") from error
    if len(image.shape) != 4:
        raise DataError(f"a series of volumes must have 4 dimensions, got shape {image.shape}", problem="not-a-series")
    return image, volume_t_r(image.header)


def _plain_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", re.sub(r"\.nii(\.gz)?$", "", path.name))


def to_grayordinates(source: Path, t_r: float, surfaces: Sequence[str], folder: Path) -> Path:
    """A volume series on the 91,282 grayordinates, by Connectome Workbench.

    Cortex by trilinear interpolation at the midthickness; subcortex is taken as it is, on the 2 mm grid of
    MNI152NLin6Asym.

    Parameters
    ----------
    source : Path
        Volume series, on that grid.
    t_r : float
        Repetition time in seconds.
    surfaces : sequence of str
        Left and right midthickness, fs_LR 32k.
    folder : Path
        Where the series and what it is made from are written.

    Returns
    -------
    Path
        The ``.dtseries.nii``.

    Raises
    ------
    DataError
        Where Workbench is missing or fails, or no surfaces are given.
    """
    if not surfaces:
        raise DataError(
            "a volume needs surfaces to come to grayordinates, or a label volume as atlas; give --surfaces LEFT RIGHT "
            "(midthickness, fs_LR 32k)",
            problem="setting",
        )
    output, command = folder / "dense.dtseries.nii", []
    for side, surface, roi in zip(("left", "right"), surfaces, greyordinates(), strict=False):
        metric = str(folder / f"{side}.func.gii")
        workbench("-volume-to-surface-mapping", str(source), str(surface), metric, "-trilinear")
        command += [f"-{side}-metric", metric, f"-roi-{side}", str(roi)]
    structures = greyordinates()[2]
    workbench(
        "-cifti-create-dense-timeseries", str(output), "-volume", str(source), str(structures), *command,
        "-timestep", str(t_r), "-timestart", "0",
    )  # fmt: skip
    return output


def workbench(*arguments: str) -> None:
    """Run ``wb_command``, one thread.

    Raises
    ------
    DataError
        Where it is missing, with the command that mends it, or fails, with its last line.
    """
    if shutil.which("wb_command") is None:
        raise DataError(
            "Connectome Workbench (wb_command) is not installed; on Debian and Ubuntu: apt install "
            "connectome-workbench, else https://www.humanconnectome.org/software/get-connectome-workbench",
            problem="no-workbench",
        )
    done = subprocess.run(["wb_command", "-disable-provenance", *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise DataError(f"wb_command {arguments[0]}: {' '.join(lines)[-400:]}", problem="workbench")


def _nilearn(module: str):
    from importlib import import_module

    try:
        return import_module(f"nilearn.{module}")
    except ImportError:
        raise DataError(
            "nilearn is not installed; install it with: pip install 'mnemodyn[preprocess]'", problem="no-package"
        ) from None


def _clean(source: Path, values: np.ndarray, t_r: float, settings: Preprocessing) -> np.ndarray:
    """Confounds regressed out and the band kept, in one projection (Lindquist et al. 2019, as nilearn does it).

    Both are linear in time, so cleaning parcels equals cleaning grayordinates first.
    """
    clean = _nilearn("signal").clean
    for name in ("low_pass", "high_pass"):
        value = getattr(settings, name)
        if value is not None and value >= 0.5 / t_r:
            raise DataError(
                f"{name} must be below {0.5 / t_r:g} Hz at {t_r:g} s a frame, got {value}", problem="setting"
            )
    confounds = _confounds(source, settings.confounds, len(values)) if settings.confounds else None
    band = settings.low_pass or settings.high_pass
    with warnings.catch_warnings():
        # How confounds are scaled changes nothing: what is regressed out is the space they span.
        warnings.filterwarnings("ignore", ".*confounds will be standardized", DeprecationWarning)
        return clean(
            np.asarray(values, float),
            confounds=confounds,
            t_r=t_r,
            low_pass=settings.low_pass,
            high_pass=settings.high_pass,
            filter="butterworth" if band else False,
            detrend=False,
            standardize=None,
        )


def _confounds(source: Path, columns: Sequence[str], n_frames: int) -> np.ndarray:
    """Columns of fMRIPrep's table, (time, column); what a derivative lacks in the first frame is 0."""
    stem = re.split(r"_(?:space|den|desc|res)-", source.name)[0]
    found = sorted(source.parent.glob(f"{stem}_desc-confounds_timeseries.tsv"))
    if not found:
        raise DataError(f"no {stem}_desc-confounds_timeseries.tsv beside it", problem="no-confounds")
    table = pd.read_csv(found[0], sep="\t", na_values=["n/a"])
    unknown = [c for c in columns if c not in table]
    if unknown:
        raise DataError(f"{found[0].name} has no columns {unknown}", problem="no-confounds")
    values = table[list(columns)].to_numpy(float)
    if len(values) != n_frames:
        raise DataError(f"{found[0].name} has {len(values)} rows for {n_frames} frames", problem="no-confounds")
    values[0] = np.nan_to_num(values[0])
    if not np.isfinite(values).all():
        raise DataError(f"{found[0].name} has missing values after the first row", problem="no-confounds")
    return values


def find_sources(sources: Sequence[str | Path], settings: Preprocessing) -> list[Path]:
    """Files as given, and of folders the dense series, or the volumes where the settings are for volumes.

    Raises
    ------
    DataError
        Where a source is missing or a folder holds nothing of the kind.
    """
    endings = VOLUMES if settings.label_volume or settings.surfaces else (DENSE,)
    found = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(p for p in source.rglob("*") if p.name.endswith(endings))
            if not inside:
                raise DataError(f"{source}: no file ending in {' or '.join(endings)}", problem="no-scans")
            found += inside
        elif source.is_file():
            found.append(source)
        else:
            raise DataError(f"{source}: no such file or folder", problem="no-scans")
    return list(dict.fromkeys(found))


def output_path(source: Path, folder: Path, atlas: str, table: bool) -> Path:
    """Where a scan goes: ``sub-*/[ses-*/]func/*_seg-ATLAS_stat-mean_timeseries.*``, as in XCP-D's derivatives."""
    stem = re.sub(r"\.(dtseries\.nii|nii(\.gz)?)$", "", source.name)
    stem = re.sub(r"_(bold|timeseries)$", "", stem)
    participant = _participant(source)
    if participant not in stem:
        stem = f"{participant}_{stem}"
    session = entities(stem).get("ses")
    ending = "tsv" if table else "ptseries.nii"
    return (
        folder
        / participant
        / (f"ses-{session}" if session else "")
        / "func"
        / f"{stem}_seg-{atlas}_stat-mean_timeseries.{ending}"
    )


def _one(source: Path, folder: Path, atlas: str, facts: dict, settings: Preprocessing) -> dict:
    """Write one scan, unless it is there already; its sidecar comes last and marks it as complete."""
    row = {"source": str(source), "output": "", "status": "failed", "problem": "", "message": ""}
    try:
        output = output_path(source, folder, atlas, settings.table or settings.label_volume)
        row["output"] = str(output)
        sidecar = output.with_name(output.name.removesuffix(".tsv").removesuffix(".ptseries.nii") + ".json")
        facts = {**facts, "Sources": [source.name], "SourceBytes": source.stat().st_size}
        if output.is_file() and sidecar.is_file():
            try:
                known = json.loads(sidecar.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                known = {}
            if all(known.get(k) == v for k, v in facts.items()):
                return row | {"status": "skipped"}
        scan, axis, found = preprocess_scan(source, settings)
        sidecar.unlink(missing_ok=True)
        save_scan(scan, output, axis=axis)
        write_json(sidecar, found | facts)
        return row | {"status": "done"}
    except DataError as error:
        return row | {"problem": error.problem, "message": str(error)}
    except Exception as error:  # one scan must not end the others
        return row | {"problem": "unreadable", "message": f"{source.name}: {type(error).__name__}: {error}"}


def preprocess(
    sources: Sequence[str | Path], folder: str | Path, settings: Preprocessing, *, jobs: int = 1
) -> pd.DataFrame:
    """Turn dense series or volumes into parcellated scans, each with a JSON sidecar.

    What is complete already, from the same file with the same settings, is left alone; a run that was ended goes on.

    Parameters
    ----------
    sources : sequence of path-like
        Files, or folders that are searched.
    folder : path-like
        Where scans go, see `output_path`.
    settings : Preprocessing
    jobs : int, default 1
        Processes, one scan each.

    Returns
    -------
    DataFrame
        A row a source: ``source``, ``output``, ``status`` (``"done"``, ``"skipped"`` or ``"failed"``), ``problem``
        and ``message`` of what failed.

    Raises
    ------
    DataError
        Where there are no sources, two would be written to one file, or the atlas cannot be had.
    """
    if jobs < 1:
        raise DataError(f"jobs must be >= 1, got {jobs}", problem="setting")
    folder = Path(folder)
    found = find_sources(sources, settings)
    if settings.label_volume and not Path(settings.atlas).is_file():
        raise DataError(f"atlas {settings.atlas}: no such file", problem="atlas")
    atlas = _plain_name(Path(settings.atlas)) if settings.label_volume else _atlas(settings.atlas).name
    if settings.confounds or settings.low_pass or settings.high_pass or settings.label_volume:
        _nilearn("signal")
    targets = Counter()
    for source in found:
        try:
            targets[output_path(source, folder, atlas, settings.table)] += 1
        except DataError:
            continue  # reported as its row
    twice = [path.name for path, n in targets.items() if n > 1]
    if twice:
        raise DataError(
            f"{len(twice)} outputs would be written twice, first {twice[0]}: sources must differ in their names",
            problem="name-collision",
        )
    given = asdict(settings) | {
        "atlas": Path(settings.atlas).name,
        "surfaces": [Path(s).name for s in settings.surfaces],
    }
    facts = {
        "Settings": json.loads(json.dumps(given)),
        "AtlasSHA256": sha256(settings.atlas) if Path(settings.atlas).is_file() else None,
        "GeneratedBy": generated_by(),
    }
    describe_derivative(folder, f"Scans in parcels ({atlas})")
    work = [(source, folder, atlas, facts, settings) for source in found]
    if jobs == 1:
        return pd.DataFrame([_one(*job) for job in work])
    rows = []
    # A fresh process each: forking one that holds threads can hang.
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=get_context("spawn")) as pool:
        for job, future in [(job, pool.submit(_one, *job)) for job in work]:
            try:
                rows.append(future.result())
            except Exception as error:
                message = f"{job[0].name}: the process ended ({error}); often memory, try fewer jobs"
                rows.append(
                    {"source": str(job[0]), "output": "", "status": "failed", "problem": "ended", "message": message}
                )
    return pd.DataFrame(rows)
