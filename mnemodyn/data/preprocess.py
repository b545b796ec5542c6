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
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pandas as pd
from nibabel.cifti2 import BrainModelAxis, ParcelsAxis, SeriesAxis
from scipy.sparse import csr_array

from mnemodyn.data.atlas import Atlas, greyordinates, read_atlas
from mnemodyn.data.formats import DataError, entities, motion, read_cifti, refuse, sidecar_t_r, volume_t_r
from mnemodyn.data.scans import Scan, agree_on_t_r, save_scan
from mnemodyn.files import sha256, write_json
from mnemodyn.provenance import describe_derivative, generated_by

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
        Columns of the ``*_desc-confounds_timeseries.tsv`` beside a scan that are regressed out.
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

    def __post_init__(self) -> None:
        for name in ("low_pass", "high_pass"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                refuse(f"{name} must be > 0 Hz or left out, got {value}", "setting")
        if self.low_pass and self.high_pass and self.low_pass <= self.high_pass:
            refuse(f"low_pass must be above high_pass, got {self.low_pass} and {self.high_pass} Hz", "setting")
        if len(self.surfaces) not in (0, 2):
            refuse(f"surfaces must be a left and a right one, got {len(self.surfaces)}", "setting")

    @property
    def cleans(self) -> bool:
        return bool(self.confounds or self.low_pass or self.high_pass)

    @property
    def label_volume(self) -> bool:
        return self.atlas.endswith((".nii", ".nii.gz")) and not self.atlas.endswith(".dlabel.nii")


def averaging(labels: np.ndarray) -> csr_array:
    """The matrix that turns grayordinates into parcels, the mean over each: (n_parcels, grayordinate), rows sum to 1.

    Parameters
    ----------
    labels : ndarray, shape (grayordinate,), int
        0 for none, otherwise 1 to n_parcels.

    Raises
    ------
    DataError
        Where a label between 1 and the largest has no grayordinate.
    """
    sizes = np.bincount(labels)[1:]
    if not len(sizes) or not sizes.all():
        refuse(f"parcel {int(sizes.argmin()) + 1 if len(sizes) else 1} has no grayordinate", "atlas")
    columns = np.flatnonzero(labels)
    rows = labels[columns] - 1
    return csr_array((1 / sizes[rows], (rows, columns)), shape=(len(sizes), len(labels)))


def parcellate(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean series of each parcel, (time, n_parcels), float32, summed in float64.

    Parameters
    ----------
    values : array-like, shape (time, grayordinate)
        An array, or a proxy of one that is read in blocks.
    labels : ndarray, shape (grayordinate,), int
        0 for none, otherwise 1 to n_parcels.

    Raises
    ------
    DataError
        Where the shapes do not fit, or a parcel has no grayordinate.
    """
    if len(values.shape) != 2 or labels.shape != values.shape[1:]:
        found = f"values have shape {tuple(values.shape)} and labels {labels.shape}"
        refuse(f"labels must be one a grayordinate, {found}", "atlas")
    weights = averaging(labels).tocsc()
    sums = np.zeros((weights.shape[0], values.shape[0]))
    for i in range(0, len(labels), BLOCK):
        sums += weights[:, i : i + BLOCK] @ np.ascontiguousarray(values[:, i : i + BLOCK].T, dtype=float)
    return sums.T.astype(np.float32, order="C")


def align(atlas: Atlas, axis: BrainModelAxis) -> np.ndarray:
    """An atlas' labels for the grayordinates of a series, (grayordinate of `axis`,), matched by vertex and by voxel.

    The two may differ in which grayordinates they hold, as a cortical atlas with the medial wall and a series without.

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
        expected = atlas.axis.nvertices.get(name, n_vertices)
        if expected != n_vertices:
            counts = f"{n_vertices} vertices in the series and {expected} in the atlas {atlas.name}"
            refuse(f"{name} has {counts}; resample one of them", "grayordinates")
        surface = np.zeros(n_vertices, int)
        surface[atlas.axis.vertex[ours]] = atlas.labels[ours]
        labels[theirs] = surface[axis.vertex[theirs]]
    if axis.volume_mask.any() and atlas.axis.volume_mask.any():
        shapes = axis.volume_shape, atlas.axis.volume_shape
        if shapes[0] != shapes[1] or not np.allclose(axis.affine, atlas.axis.affine, atol=1e-3):
            both = f"the volume of the series, {shapes[0]}, and that of the atlas {atlas.name}, {shapes[1]}"
            refuse(f"{both}, differ in shape or affine; resample one of them", "grayordinates")
        volume = np.zeros(axis.volume_shape, int)
        volume[tuple(atlas.axis.voxel[atlas.axis.volume_mask].T)] = atlas.labels[atlas.axis.volume_mask]
        labels[axis.volume_mask] = volume[tuple(axis.voxel[axis.volume_mask].T)]
    missing = sorted(set(range(1, len(atlas.parcels) + 1)) - set(labels.tolist()))
    if missing:
        counts = f"{len(missing)} of {len(atlas.parcels)} parcels of the atlas {atlas.name}"
        among = [atlas.parcels[i - 1] for i in missing[:3]]
        refuse(f"{counts} have no grayordinate in the series, among them {among}", "grayordinates")
    return labels


def parcel_axis(labels: np.ndarray, parcels: Sequence[str], axis: BrainModelAxis) -> ParcelsAxis:
    """The axis of a ``.ptseries.nii``: which vertices and voxels each parcel is made of."""
    return ParcelsAxis.from_brain_models([(name, axis[labels == i]) for i, name in enumerate(parcels, start=1)])


class Parcellated(NamedTuple):
    """Values (time, parcel), t_r in seconds and where it is from, parcels, their axis if any, and facts to keep."""

    values: np.ndarray
    t_r: float
    origin: str
    parcels: tuple[str, ...]
    axis: ParcelsAxis | None
    facts: dict[str, Any]


def preprocess_scan(source: str | Path, settings: Preprocessing) -> tuple[Scan, ParcelsAxis | None, dict[str, Any]]:
    """One dense series (``.dtseries.nii``) or volume (``.nii.gz``) as parcels.

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
            found = _from_dense(source, source, settings)
        else:
            found = _from_labels(source, settings) if settings.label_volume else _from_volume(source, settings)
        values = _clean(source, found.values, found.t_r, settings) if settings.cleans else found.values
    except DataError as error:
        message = str(error)
        message = message if message.startswith(source.name) else f"{source.name}: {message}"
        raise DataError(message, error.problem) from error
    named = entities(source.name)
    scan = Scan(
        participant,
        np.ascontiguousarray(values, np.float32),
        found.t_r,
        found.parcels,
        found.facts["Atlas"],
        source.name,
        named.get("ses", ""),
        named.get("run", ""),
        found.origin,
        motion(source)[0],
    )
    return scan, found.axis, {"RepetitionTime": found.t_r, "RepetitionTimeFrom": found.origin, **found.facts}


def _participant(source: Path) -> str:
    for part in reversed(source.parts):
        if match := re.search(r"sub-[A-Za-z0-9]+", part):
            return match[0]
    refuse(f"{source.name}: no participant (sub-...) in the file's name or its folders", "no-participant")


@lru_cache(maxsize=2)  # of one process: many scans, one atlas
def _atlas(source: str) -> Atlas:
    return read_atlas(source)


def _from_dense(source: Path, dense: Path, settings: Preprocessing) -> Parcellated:
    """`dense` is `source` on grayordinates."""
    values, (series, axis), header = read_cifti(dense)
    if not isinstance(series, SeriesAxis) or not isinstance(axis, BrainModelAxis):
        found = f"({type(series).__name__}, {type(axis).__name__})"
        refuse(f"axes must be (series, grayordinates), got {found}", "not-dense")
    t_r, origin = agree_on_t_r(source.name, header, sidecar_t_r(source), settings.t_r)
    atlas = _atlas(settings.atlas)
    labels = align(atlas, axis)
    absent = int(np.count_nonzero(atlas.labels) - np.count_nonzero(labels))
    facts = {"Atlas": atlas.name, "AtlasGrayordinatesAbsent": absent}
    where = parcel_axis(labels, atlas.parcels, axis)
    return Parcellated(parcellate(values, labels), t_r, origin, atlas.parcels, where, facts)


def _from_volume(source: Path, settings: Preprocessing) -> Parcellated:
    t_r, origin = agree_on_t_r(source.name, _volume(source)[1], sidecar_t_r(source), settings.t_r)
    with tempfile.TemporaryDirectory() as folder:
        dense = to_grayordinates(source, t_r, settings.surfaces, Path(folder))
        return _from_dense(dense, dense, settings)._replace(t_r=t_r, origin=origin)


def _from_labels(source: Path, settings: Preprocessing) -> Parcellated:
    from nilearn.maskers import NiftiLabelsMasker  # slow to import

    image, header = _volume(source)
    t_r, origin = agree_on_t_r(source.name, header, sidecar_t_r(source), settings.t_r)
    path = Path(settings.atlas)
    masker = NiftiLabelsMasker(path, standardize=None, resampling_target="data", keep_masked_labels=False)
    values = masker.fit_transform(image)
    keys = [int(key) for place, key in masker.region_ids_.items() if place != "background"]
    table, names = Path(re.sub(r"\.nii(\.gz)?$", ".tsv", str(path))), {}
    if table.is_file():  # BIDS: index and name
        names = pd.read_csv(table, sep="\t").set_index("index")["name"].astype(str).to_dict()
    parcels = tuple(names.get(k, str(k)) for k in keys)
    return Parcellated(values, t_r, origin, parcels, None, {"Atlas": _plain_name(path)})


def _volume(source: Path) -> tuple[Any, float | None]:
    try:
        image: Any = nibabel.load(source)
    except Exception as error:
        raise DataError(f"not a readable volume ({error})", problem="truncated") from error
    if len(image.shape) != 4:
        refuse(f"a series of volumes must have 4 dimensions, got shape {image.shape}", "not-a-series")
    return image, volume_t_r(image.header)


def _plain_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", re.sub(r"\.nii(\.gz)?$", "", path.name))


def to_grayordinates(source: Path, t_r: float, surfaces: Sequence[str], folder: Path) -> Path:
    """A volume series on the 91,282 grayordinates, by Connectome Workbench.

    Cortex by trilinear interpolation at the `surfaces` (left and right midthickness, fs_LR 32k); subcortex is taken as
    it is, on the 2 mm grid of MNI152NLin6Asym. The ``.dtseries.nii`` is written into `folder`.
    """
    if not surfaces:
        needed = "surfaces to come to grayordinates, or a label volume as atlas"
        refuse(f"a volume needs {needed}; give --surfaces LEFT RIGHT (midthickness, fs_LR 32k)", "setting")
    output, command = folder / "dense.dtseries.nii", []
    left, right, structures = greyordinates()
    for side, surface, roi in zip(("left", "right"), surfaces, (left, right), strict=True):
        metric = str(folder / f"{side}.func.gii")
        workbench("-volume-to-surface-mapping", str(source), str(surface), metric, "-trilinear")
        command += [f"-{side}-metric", metric, f"-roi-{side}", str(roi)]
    series = ["-cifti-create-dense-timeseries", str(output), "-volume", str(source), str(structures)]
    workbench(*series, *command, "-timestep", str(t_r), "-timestart", "0")
    return output


def workbench(*arguments: str) -> None:
    """Run ``wb_command``, one thread; a DataError where it is missing, with the mend, or fails, with its last words."""
    if shutil.which("wb_command") is None:
        refuse(
            "Connectome Workbench (wb_command) is not installed; on Debian and Ubuntu: apt install "
            "connectome-workbench, else https://www.humanconnectome.org/software/get-connectome-workbench",
            "no-workbench",
        )
    done = subprocess.run(["wb_command", "-disable-provenance", *arguments], capture_output=True, text=True)
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())
        refuse(f"wb_command {arguments[0]}: {words[-400:]}", "workbench")


def _clean(source: Path, values: np.ndarray, t_r: float, settings: Preprocessing) -> np.ndarray:
    """Confounds regressed out and the band kept, in one projection (Lindquist et al. 2019, as nilearn does it).

    Both are linear in time, so cleaning parcels equals cleaning grayordinates first.
    """
    from nilearn.signal import clean  # slow to import

    for name in ("low_pass", "high_pass"):
        value = getattr(settings, name)
        if value is not None and value >= 0.5 / t_r:
            refuse(f"{name} must be below {0.5 / t_r:g} Hz at {t_r:g} s a frame, got {value}", "setting")
    confounds = _confounds(source, settings.confounds, len(values)) if settings.confounds else None
    with warnings.catch_warnings():
        # How confounds are scaled changes nothing: what is regressed out is the space they span.
        warnings.filterwarnings("ignore", ".*confounds will be standardized", DeprecationWarning)
        band = {"low_pass": settings.low_pass, "high_pass": settings.high_pass}
        how = {"filter": "butterworth" if any(band.values()) else False, "detrend": False, "standardize": None}
        return clean(np.asarray(values, float), confounds=confounds, t_r=t_r, **band, **how)


def _confounds(source: Path, columns: Sequence[str], n_frames: int) -> np.ndarray:
    """Columns of fMRIPrep's table, (time, column); what a derivative lacks in the first frame is 0."""
    stem = re.split(r"_(?:space|den|desc|res)-", source.name)[0]
    file = source.with_name(f"{stem}_desc-confounds_timeseries.tsv")
    if not file.is_file():
        refuse(f"no {file.name} beside it", "no-confounds")
    table = pd.read_csv(file, sep="\t", na_values=["n/a"])
    if unknown := [c for c in columns if c not in table]:
        refuse(f"{file.name} has no columns {unknown}", "no-confounds")
    values = table[list(columns)].to_numpy(float)
    if len(values) != n_frames:
        refuse(f"{file.name} has {len(values)} rows for {n_frames} frames", "no-confounds")
    values[0] = np.nan_to_num(values[0])
    if not np.isfinite(values).all():
        refuse(f"{file.name} has missing values after the first row", "no-confounds")
    return values


def find_sources(sources: Sequence[str | Path], settings: Preprocessing) -> list[Path]:
    """Files as given, and of folders the dense series, or the volumes where the settings are for volumes."""
    endings = VOLUMES if settings.label_volume or settings.surfaces else (DENSE,)
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        inside = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.name.endswith(endings))
        if not source.exists():
            refuse(f"{source}: no such file or folder", "no-scans")
        if not inside:
            refuse(f"{source}: no file ending in {' or '.join(endings)}", "no-scans")
        found |= dict.fromkeys(inside)
    return list(found)


def output_path(source: Path, folder: Path, atlas: str, table: bool) -> Path:
    """Where a scan goes: ``sub-*/[ses-*/]func/*_seg-ATLAS_stat-mean_timeseries.*``, as in XCP-D's derivatives."""
    stem = re.sub(r"(_(bold|timeseries))?\.(dtseries\.nii|nii(\.gz)?)$", "", source.name)
    participant = _participant(source)
    if participant not in stem:
        stem = f"{participant}_{stem}"
    session = entities(stem).get("ses")
    inside = folder / participant / (f"ses-{session}" if session else "") / "func"
    return inside / f"{stem}_seg-{atlas}_stat-mean_timeseries.{'tsv' if table else 'ptseries.nii'}"


def _row(source: Path, problem: str = "", message: str = "") -> dict[str, str]:
    return {"source": str(source), "output": "", "status": "failed", "problem": problem, "message": message}


def _one(source: Path, folder: Path, atlas: str, facts: dict[str, Any], settings: Preprocessing) -> dict[str, str]:
    """Write one scan, unless it is there already; its sidecar comes last and marks it as complete."""
    row = _row(source)
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
    jobs : int
        Processes, one scan each.

    Returns
    -------
    DataFrame
        A row a source: ``source``, ``output``, ``status`` (done, skipped, failed), ``problem`` and ``message``.

    Raises
    ------
    DataError
        Where there are no sources, two would be written to one file, or the atlas cannot be had.
    """
    if jobs < 1:
        refuse(f"jobs must be >= 1, got {jobs}", "setting")
    folder = Path(folder)
    found = find_sources(sources, settings)
    if settings.label_volume and not Path(settings.atlas).is_file():
        refuse(f"atlas {settings.atlas}: no such file", "atlas")
    atlas = _plain_name(Path(settings.atlas)) if settings.label_volume else _atlas(settings.atlas).name
    targets: Counter[Path] = Counter()
    for source in found:
        with suppress(DataError):  # reported as its row
            targets[output_path(source, folder, atlas, settings.table)] += 1
    if twice := [path.name for path, n in targets.items() if n > 1]:
        message = f"{len(twice)} outputs would be written twice, first {twice[0]}: sources must differ in their names"
        refuse(message, "name-collision")
    names = {"atlas": Path(settings.atlas).name, "surfaces": [Path(s).name for s in settings.surfaces]}
    facts = {
        "Settings": json.loads(json.dumps(asdict(settings) | names)),
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
        for source, future in [(job[0], pool.submit(_one, *job)) for job in work]:
            try:
                rows.append(future.result())
            except Exception as error:
                message = f"{source.name}: the process ended ({error}); often memory, try fewer jobs"
                rows.append(_row(source, problem="ended", message=message))
    return pd.DataFrame(rows)
