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
from typing import Any

import nibabel
import numpy as np
import pandas as pd
from nibabel.cifti2 import BrainModelAxis, ParcelsAxis, SeriesAxis
from scipy.sparse import csr_array

from mnemodyn.data import formats
from mnemodyn.data.atlas import Atlas, greyordinates, read_atlas
from mnemodyn.data.formats import DataError, entities, read_cifti, refuse, stem
from mnemodyn.data.scans import Scan, agree_on_t_r, save_scan
from mnemodyn.files import sha256, write_json
from mnemodyn.provenance import describe_derivative, generated_by

__all__ = ["Preprocessing", "align", "averaging", "parcel_axis", "parcellate", "preprocess"]

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
            refuse(
                f"low_pass must be above high_pass, got {self.low_pass} and {self.high_pass} Hz",
                "setting",
            )
        if len(self.surfaces) not in (0, 2):
            refuse(f"surfaces must be a left and a right one, got {len(self.surfaces)}", "setting")

    @property
    def label_volume(self) -> bool:
        return self.atlas.endswith((".nii", ".nii.gz")) and not self.atlas.endswith(".dlabel.nii")


def averaging(labels: np.ndarray) -> csr_array:
    """The matrix that turns grayordinates into parcels, the mean over each: (n_parcels, grayordinate), rows sum to 1.

    `labels`, one a grayordinate, are 0 for none, otherwise 1 to n_parcels; a DataError where one of these has none.
    """
    sizes = np.bincount(labels)[1:]
    if not len(sizes) or not sizes.all():
        refuse(
            f"parcel {int(sizes.argmin()) + 1 if len(sizes) else 1} has no grayordinate", "atlas"
        )
    columns = np.flatnonzero(labels)
    rows = labels[columns] - 1
    return csr_array((1 / sizes[rows], (rows, columns)), shape=(len(sizes), len(labels)))


def parcellate(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean series of each parcel, (time, n_parcels), float32, summed in float64.

    `values` (time, grayordinate) are an array, or a proxy of one that is read in blocks; `labels` as in
    :func:`averaging`. A DataError where the shapes do not fit, or a parcel has no grayordinate.
    """
    if len(values.shape) != 2 or labels.shape != values.shape[1:]:
        found = f"values have shape {tuple(values.shape)} and labels {labels.shape}"
        refuse(f"labels must be one a grayordinate, {found}", "atlas")
    weights = averaging(labels).tocsc()
    sums = np.zeros((weights.shape[0], values.shape[0]))
    for i in range(0, len(labels), BLOCK):
        sums += weights[:, i : i + BLOCK] @ np.ascontiguousarray(
            values[:, i : i + BLOCK].T, dtype=float
        )
    return sums.T.astype(np.float32, order="C")


def align(atlas: Atlas, axis: BrainModelAxis) -> np.ndarray:
    """An atlas' labels for the grayordinates of a series, (grayordinate of `axis`,), matched by vertex and by voxel.

    The two may differ in which grayordinates they hold, as a cortical atlas with the medial wall and a series without.
    A DataError where surfaces have other numbers of vertices, volumes lie otherwise in space, or a parcel of the atlas
    has no grayordinate in the series.
    """
    if atlas.axis == axis:
        return atlas.labels
    for name, n_vertices in axis.nvertices.items():
        expected = atlas.axis.nvertices.get(name, n_vertices)
        if expected != n_vertices:
            counts = f"{n_vertices} vertices in the series and {expected} in the atlas {atlas.name}"
            refuse(f"{name} has {counts}; resample one of them", "grayordinates")
    if axis.volume_mask.any() and atlas.axis.volume_mask.any():
        shapes = axis.volume_shape, atlas.axis.volume_shape
        if shapes[0] != shapes[1] or not np.allclose(axis.affine, atlas.axis.affine, atol=1e-3):
            both = f"the volume of the series, {shapes[0]}, and that of the atlas {atlas.name}, {shapes[1]}"
            refuse(f"{both}, differ in shape or affine; resample one of them", "grayordinates")
    known, wanted = (
        pd.MultiIndex.from_arrays([np.where(a.surface_mask, a.name, ""), a.vertex, *a.voxel.T])
        for a in (atlas.axis, axis)
    )
    labels = pd.Series(atlas.labels, known).reindex(wanted, fill_value=0).to_numpy()
    missing = sorted(set(range(1, len(atlas.parcels) + 1)) - set(labels.tolist()))
    if missing:
        counts = f"{len(missing)} of {len(atlas.parcels)} parcels of the atlas {atlas.name}"
        among = [atlas.parcels[i - 1] for i in missing[:3]]
        refuse(f"{counts} have no grayordinate in the series, among them {among}", "grayordinates")
    return labels


def parcel_axis(labels: np.ndarray, parcels: Sequence[str], axis: BrainModelAxis) -> ParcelsAxis:
    """The axis of a ``.ptseries.nii``: which vertices and voxels each parcel is made of."""
    return ParcelsAxis.from_brain_models(
        [(name, axis[labels == i]) for i, name in enumerate(parcels, start=1)]
    )


def _preprocess_scan(
    source: Path, settings: Preprocessing
) -> tuple[Scan, ParcelsAxis | None, dict[str, Any]]:
    """One dense series or volume as parcels; their axis, but for labels of a volume; and what its sidecar says."""
    with tempfile.TemporaryDirectory() as folder:
        image = axis = None
        if source.name.endswith(DENSE):
            values, axes, header = read_cifti(source)
            if not isinstance(axes[0], SeriesAxis) or not isinstance(axes[1], BrainModelAxis):
                found = f"({type(axes[0]).__name__}, {type(axes[1]).__name__})"
                refuse(f"axes must be (series, grayordinates), got {found}", "not-dense")
        else:
            image, header = _volume(source)
        t_r, origin = agree_on_t_r(header, formats.sidecar_t_r(source), settings.t_r)
        if image is not None and not settings.label_volume:
            values, axes, _ = read_cifti(
                to_grayordinates(source, t_r, settings.surfaces, Path(folder))
            )
    if image is not None and settings.label_volume:
        values, parcels = _within_labels(image, Path(settings.atlas))
        facts: dict[str, Any] = {"Atlas": _plain_name(settings.atlas)}
    else:
        atlas = _atlas(settings.atlas)
        labels, parcels = align(atlas, axes[1]), atlas.parcels
        values, axis = parcellate(values, labels), parcel_axis(labels, parcels, axes[1])
        absent = int(np.count_nonzero(atlas.labels) - np.count_nonzero(labels))
        facts = {"Atlas": atlas.name, "AtlasGrayordinatesAbsent": absent}
    if settings.confounds or settings.low_pass or settings.high_pass:
        values = _clean(source, values, t_r, settings)
    named = entities(source.name)
    about = (
        facts["Atlas"],
        source.name,
        named.get("ses", ""),
        named.get("run", ""),
        origin,
        formats.motion(source)[0],
    )
    scan = Scan(
        _participant(source), np.ascontiguousarray(values, np.float32), t_r, parcels, *about
    )
    return scan, axis, {"RepetitionTime": t_r, "RepetitionTimeFrom": origin, **facts}


def _participant(source: Path) -> str:
    found = [
        name for part in reversed(source.parts) for name in formats.PARTICIPANT.findall(part)[:1]
    ]
    return (
        found[0]
        if found
        else refuse("no participant (sub-...) in the file's name or its folders", "no-participant")
    )


@lru_cache(maxsize=2)  # of one process: many scans, one atlas
def _atlas(source: str) -> Atlas:
    return read_atlas(source)


def _within_labels(image: Any, atlas: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Means within the labels of a volume, and their names: those of BIDS's table beside it, else the keys."""
    from nilearn.maskers import NiftiLabelsMasker  # slow to import

    masker = NiftiLabelsMasker(
        atlas, standardize=None, resampling_target="data", keep_masked_labels=False
    )
    values = masker.fit_transform(image)
    keys = [int(key) for place, key in masker.region_ids_.items() if place != "background"]
    table, names = atlas.with_name(f"{stem(atlas.name)}.tsv"), {}
    if table.is_file():
        names = pd.read_csv(table, sep="\t").set_index("index")["name"].astype(str).to_dict()
    return values, tuple(names.get(key, str(key)) for key in keys)


def _volume(source: Path) -> tuple[Any, float | None]:
    with formats.reading(source, "volume"):
        image: Any = nibabel.load(source)
    if len(image.shape) != 4:
        refuse(
            f"a series of volumes must have 4 dimensions, got shape {image.shape}", "not-a-series"
        )
    return image, formats.volume_t_r(image.header)


def _plain_name(atlas: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", stem(Path(atlas).name))


def to_grayordinates(source: Path, t_r: float, surfaces: Sequence[str], folder: Path) -> Path:
    """A volume series on the 91,282 grayordinates, a ``.dtseries.nii`` that Connectome Workbench writes into `folder`.

    Cortex by trilinear interpolation at the `surfaces` (left and right midthickness, fs_LR 32k); subcortex is taken as
    it is, on the 2 mm grid of MNI152NLin6Asym.
    """
    if not surfaces:
        needed = "surfaces to come to grayordinates, or a label volume as atlas"
        refuse(
            f"a volume needs {needed}; give --surfaces LEFT RIGHT (midthickness, fs_LR 32k)",
            "setting",
        )
    output, command = folder / "dense.dtseries.nii", []
    left, right, structures = greyordinates()
    for side, surface, roi in zip(("left", "right"), surfaces, (left, right), strict=True):
        metric = folder / f"{side}.func.gii"
        workbench("-volume-to-surface-mapping", source, surface, metric, "-trilinear")
        command += [f"-{side}-metric", metric, f"-roi-{side}", roi]
    series = ["-cifti-create-dense-timeseries", output, "-volume", source, structures]
    workbench(*series, *command, "-timestep", t_r, "-timestart", 0)
    return output


def workbench(*arguments: Any) -> None:
    """Run ``wb_command``, one thread; a DataError where it is missing, with the mend, or fails, with its last words."""
    if shutil.which("wb_command") is None:
        mend = "apt install connectome-workbench, else https://www.humanconnectome.org/software/get-connectome-workbench"
        refuse(
            f"Connectome Workbench (wb_command) is not installed; on Debian and Ubuntu: {mend}",
            "no-workbench",
        )
    command = ["wb_command", "-disable-provenance", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        refuse(
            f"wb_command {arguments[0]}: {' '.join((done.stdout + done.stderr).split())[-400:]}",
            "workbench",
        )


def _clean(source: Path, values: np.ndarray, t_r: float, settings: Preprocessing) -> np.ndarray:
    """Confounds regressed out and the band kept, in one projection (Lindquist et al. 2019, as nilearn does it).

    Both are linear in time, so cleaning parcels equals cleaning grayordinates first.
    """
    from nilearn.signal import clean  # slow to import

    for name in ("low_pass", "high_pass"):
        value = getattr(settings, name)
        if value is not None and value >= 0.5 / t_r:
            refuse(
                f"{name} must be below {0.5 / t_r:g} Hz at {t_r:g} s a frame, got {value}",
                "setting",
            )
    confounds = _confounds(source, settings.confounds, len(values)) if settings.confounds else None
    with warnings.catch_warnings():
        # How confounds are scaled changes nothing: what is regressed out is the space they span.
        warnings.filterwarnings("ignore", ".*confounds will be standardized", DeprecationWarning)
        band = {"low_pass": settings.low_pass, "high_pass": settings.high_pass}
        how = {
            "filter": "butterworth" if any(band.values()) else False,
            "detrend": False,
            "standardize": None,
        }
        return clean(np.asarray(values, float), confounds=confounds, t_r=t_r, **band, **how)


def _confounds(source: Path, columns: Sequence[str], n_frames: int) -> np.ndarray:
    """Columns of fMRIPrep's table, (time, column); what a derivative lacks in the first frame is 0."""
    name, table = formats.beside(source, *formats.CONFOUNDS)
    if table.empty:
        refuse(f"no {name} beside it", "no-confounds")
    if unknown := [c for c in columns if c not in table]:
        refuse(f"{name} has no columns {unknown}", "no-confounds")
    values = table[list(columns)].to_numpy(float, copy=True)
    if len(values) != n_frames:
        refuse(f"{name} has {len(values)} rows for {n_frames} frames", "no-confounds")
    values[0] = np.nan_to_num(values[0])
    if not np.isfinite(values).all():
        refuse(f"{name} has missing values after the first row", "no-confounds")
    return values


def find_sources(sources: Sequence[str | Path], settings: Preprocessing) -> list[Path]:
    """Files as given, and of folders the dense series, or the volumes where the settings are for volumes."""
    endings = VOLUMES if settings.label_volume or settings.surfaces else (DENSE,)
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        inside = (
            [source]
            if source.is_file()
            else sorted(p for p in source.rglob("*") if p.name.endswith(endings))
        )
        if not source.exists():
            refuse(f"{source}: no such file or folder", "no-scans")
        if not inside:
            refuse(f"{source}: no file ending in {' or '.join(endings)}", "no-scans")
        found |= dict.fromkeys(inside)
    return list(found)


def output_path(source: Path, folder: Path, atlas: str, table: bool) -> Path:
    """Where a scan goes: ``sub-*/[ses-*/]func/*_seg-ATLAS_stat-mean_timeseries.*``, as in XCP-D's derivatives."""
    name, participant = re.sub(r"_(bold|timeseries)$", "", stem(source.name)), _participant(source)
    name = name if participant in name else f"{participant}_{name}"
    session = entities(name).get("ses")
    inside = folder / participant / (f"ses-{session}" if session else "") / "func"
    return inside / f"{name}_seg-{atlas}_stat-mean_timeseries.{'tsv' if table else 'ptseries.nii'}"


def _row(source: Path, problem: str = "", message: str = "") -> dict[str, str]:
    return {
        "source": str(source),
        "output": "",
        "status": "failed",
        "problem": problem,
        "message": message,
    }


def _one(
    source: Path, folder: Path, atlas: str, facts: dict[str, Any], settings: Preprocessing
) -> dict[str, str]:
    """Write one scan, unless it is there already; its sidecar comes last and marks it as complete."""
    row = _row(source)
    try:
        with formats.naming(source.name):
            output = output_path(source, folder, atlas, settings.table or settings.label_volume)
            row["output"] = str(output)
            sidecar = output.with_name(f"{stem(output.name)}.json")
            facts = {**facts, "Sources": [source.name], "SourceBytes": source.stat().st_size}
            with suppress(
                FileNotFoundError, ValueError, AttributeError
            ):  # what a killed run left may be no JSON
                known = json.loads(sidecar.read_text(encoding="utf-8"))
                newer = (
                    source.stat().st_mtime_ns > sidecar.stat().st_mtime_ns
                )  # other values, as many bytes
                if output.is_file() and not newer and facts.items() <= known.items():
                    return row | {"status": "skipped"}
            scan, axis, found = _preprocess_scan(source, settings)
            sidecar.unlink(missing_ok=True)
            save_scan(scan, output, axis=axis)
            write_json(sidecar, found | facts)
            return row | {"status": "done"}
    except DataError as error:
        return row | {"problem": error.problem, "message": str(error)}
    except Exception as error:  # one scan must not end the others
        return row | {
            "problem": "unreadable",
            "message": f"{source.name}: {type(error).__name__}: {error}",
        }


def preprocess(
    sources: Sequence[str | Path], folder: str | Path, settings: Preprocessing, *, jobs: int = 1
) -> pd.DataFrame:
    """Turn dense series or volumes into parcellated scans, each with a JSON sidecar.

    What is complete already, from the same file with the same settings, is left alone; a run that was ended goes on. A
    DataError where there are no sources, two would be written to one file, or the atlas cannot be had.

    Parameters
    ----------
    sources : sequence of path-like
        Files, or folders that are searched.
    folder : path-like
        Where scans go: ``sub-*/[ses-*/]func/*_seg-ATLAS_stat-mean_timeseries.*``.
    settings : Preprocessing
    jobs : int
        Processes, one scan each.

    Returns
    -------
    DataFrame
        A row a source: ``source``, ``output``, ``status`` (done, skipped, failed), ``problem`` and ``message``.
    """
    if jobs < 1:
        refuse(f"jobs must be >= 1, got {jobs}", "setting")
    folder = Path(folder)
    found = find_sources(sources, settings)
    if settings.label_volume and not Path(settings.atlas).is_file():
        refuse(f"atlas {settings.atlas}: no such file", "atlas")
    atlas = _plain_name(settings.atlas) if settings.label_volume else _atlas(settings.atlas).name
    targets: Counter[Path] = Counter()
    for source in found:
        with suppress(DataError):  # reported as its row
            targets[output_path(source, folder, atlas, settings.table)] += 1
    if twice := [path.name for path, n in targets.items() if n > 1]:
        mend = "sources must differ in their names"
        refuse(
            f"{len(twice)} outputs would be written twice, first {twice[0]}: {mend}",
            "name-collision",
        )
    names = {
        "atlas": Path(settings.atlas).name,
        "surfaces": [Path(s).name for s in settings.surfaces],
    }
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
        for source, future in zip(found, [pool.submit(_one, *job) for job in work], strict=True):
            try:
                rows.append(future.result())
            except Exception as error:
                message = (
                    f"{source.name}: the process ended ({error}); often memory, try fewer jobs"
                )
                rows.append(_row(source, "ended", message))
    return pd.DataFrame(rows)
