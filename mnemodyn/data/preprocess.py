"""From dense series or volumes to parcels."""

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from filecmp import cmp
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nibabel.cifti2 import BrainModelAxis, ParcelsAxis, SeriesAxis

from mnemodyn.data import formats
from mnemodyn.data.atlas import SCHAEFER400_TIAN3, Atlas, plain_name, read_atlas
from mnemodyn.data.formats import DataError, entities, read_cifti, refuse, stem
from mnemodyn.data.scans import Scan, agree_on_t_r, save_scan
from mnemodyn.files import (
    OutputError,
    check_folder,
    check_output,
    digest,
    locked,
    sha256,
    temporary,
)
from mnemodyn.provenance import describe_derivative, generated_by

__all__ = ["Preprocessing", "align", "parcellate", "preprocess", "save_derived"]

DENSE = (".dtseries.nii",)
VOLUMES = ("_bold.nii.gz", "_bold.nii")


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every scan.

    Attributes
    ----------
    atlas : str
        ``"schaefer400-tian3"`` or a ``.dlabel.nii`` for dense series, or a label volume
        (``.nii.gz``) for volumes.
    low_pass, high_pass : float, optional
        Ends of the band that is kept, in Hz.
    confounds : tuple of str
        Columns of the ``*_desc-confounds_timeseries.tsv`` beside a scan that are regressed out.
    t_r : float, optional
        Repetition time in seconds, for files that state none in their header or sidecar.
    override_t_r : bool
        Whether `t_r` replaces what files state.
    table : bool
        Write ``_timeseries.tsv`` and not ``_timeseries.ptseries.nii``. A label volume always
        gives a table.
    """

    atlas: str
    low_pass: float | None = None
    high_pass: float | None = None
    confounds: tuple[str, ...] = ()
    t_r: float | None = None
    override_t_r: bool = False
    table: bool = False

    def __post_init__(self) -> None:
        # In nilearn's words a low-pass filter keeps what is below it.
        low = self.high_pass or 0.0
        high = np.inf if self.low_pass is None else self.low_pass
        if not 0 <= low < high:
            expected = "the band must have 0 <= high_pass < low_pass"
            refuse(f"{expected}, got {low} to {high} Hz", "setting")

    @property
    def label_volume(self) -> bool:
        """Whether the atlas is a label volume."""
        return self.atlas.endswith((".nii", ".nii.gz")) and not self.atlas.endswith(".dlabel.nii")


class Averaged(NamedTuple):
    """Means within parcels, (time, parcel), and what the file says about them."""

    values: np.ndarray
    parcels: tuple[str, ...]
    t_r: float | None  # of the header, in seconds
    axis: ParcelsAxis | None = None
    n_absent: int = 0  # labelled grayordinates of the atlas that the series lacks


def parcellate(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average a dense series (time, grayordinate) within parcels: (time, parcel), float64.

    `labels`, (grayordinate,), are 0 for none, otherwise 1 to the number of parcels.
    """
    means = [values[:, labels == i].mean(axis=1, dtype=float) for i in range(1, labels.max() + 1)]
    return np.stack(means, axis=1)


def align(atlas: Atlas, axis: BrainModelAxis) -> np.ndarray:
    """An atlas's labels for the grayordinates of a series, matched by vertex and by voxel.

    The two may hold different grayordinates: an atlas may label the medial wall, for example. A
    DataError if surfaces differ in their number of vertices or volumes in space, or if a parcel of
    the atlas has no grayordinate in the series.
    """
    if atlas.axis == axis:
        return atlas.labels
    for name, n_vertices in axis.nvertices.items():
        expected = atlas.axis.nvertices.get(name, n_vertices)
        if expected != n_vertices:
            counts = f"{n_vertices} vertices in the series and {expected} in the atlas {atlas.name}"
            refuse(f"{name} has {counts}; resample one of them", "grayordinates")
    if axis.volume_mask.any() and atlas.axis.volume_mask.any():
        same_shape = axis.volume_shape == atlas.axis.volume_shape
        if not same_shape or not np.allclose(axis.affine, atlas.axis.affine, atol=1e-3):
            both = f"the volumes of the series and of the atlas {atlas.name}"
            refuse(f"{both} differ in shape or affine; resample one of them", "grayordinates")
    # A series may lack some labelled grayordinates, but not all of a parcel's.
    labels = pd.Series(atlas.labels, _places(atlas.axis))
    labels = labels.reindex(_places(axis), fill_value=0).to_numpy()
    missing = np.setdiff1d(np.arange(len(atlas.parcels)) + 1, labels)
    if len(missing):
        counts = f"{len(missing)} of {len(atlas.parcels)} parcels of the atlas {atlas.name}"
        among = [atlas.parcels[i - 1] for i in missing[:3]]
        refuse(f"{counts} have no grayordinate in the series, among them {among}", "grayordinates")
    return labels


def _places(axis: BrainModelAxis) -> pd.MultiIndex:
    """What identifies a grayordinate: surface and vertex, or voxel whatever its structure."""
    surface = np.where(axis.surface_mask, axis.name, "")
    return pd.MultiIndex.from_arrays([surface, axis.vertex, *axis.voxel.T])


@lru_cache(maxsize=2)  # the same for many scans
def _atlas(source: str) -> Atlas:
    return read_atlas(source)


def _average_dense(source: Path, settings: Preprocessing) -> Averaged:
    """Parcels of a dense CIFTI-2 series."""
    values, axes, t_r = read_cifti(source)
    if not isinstance(axes[0], SeriesAxis) or not isinstance(axes[1], BrainModelAxis):
        found = f"({type(axes[0]).__name__}, {type(axes[1]).__name__})"
        refuse(f"axes must be (series, grayordinates), got {found}", "not-dense")
    atlas = _atlas(settings.atlas)
    labels = align(atlas, axes[1])
    members = [(name, axes[1][labels == i]) for i, name in enumerate(atlas.parcels, start=1)]
    return Averaged(
        parcellate(values, labels),
        atlas.parcels,
        t_r,
        ParcelsAxis.from_brain_models(members),
        int(np.count_nonzero(atlas.labels) - np.count_nonzero(labels)),
    )


def _average_volume(source: Path, settings: Preprocessing) -> Averaged:
    """Parcels of a series of volumes; their names are in BIDS's table beside the label volume."""
    from nilearn.maskers import NiftiLabelsMasker  # slow to import

    with formats.reading(source, "volume"):
        image: Any = nibabel.load(source)
        formats.check_whole(source, image)
    if len(image.shape) != 4:
        found = f"got shape {image.shape}"
        refuse(f"a series of volumes must have 4 dimensions, {found}", "not-a-series")
    atlas = Path(settings.atlas)
    masker = NiftiLabelsMasker(
        atlas, standardize=None, resampling_target="data", keep_masked_labels=False
    )
    values = masker.fit_transform(image)
    names = {}
    # Labels without a row in that table, or without a table, are called by their number.
    table = _label_table(atlas)
    if table.is_file():
        labels = pd.read_csv(table, sep="\t", dtype={"name": str})
        if not {"index", "name"} <= set(labels):
            found = f"got {list(labels)[:10]}"
            refuse(f"{table}: expected the columns index and name, {found}", "atlas")
        names = labels.set_index("index")["name"]
    keys = [int(key) for place, key in masker.region_ids_.items() if place != "background"]
    parcels = tuple(names.get(key, str(key)) for key in keys)
    return Averaged(values, parcels, formats.volume_t_r(image.header))


def _label_table(atlas: Path) -> Path:
    """Where the names of a label volume's parcels are."""
    return atlas.with_name(f"{stem(atlas.name)}.tsv")


def _clean(source: Path, values: np.ndarray, t_r: float, settings: Preprocessing) -> np.ndarray:
    """Regress out confounds and keep the band, in one projection (Lindquist et al. 2019).

    Both are linear in time, so that cleaning parcels equals cleaning grayordinates first.
    """
    from nilearn.signal import clean  # slow to import

    band = {"low_pass": settings.low_pass, "high_pass": settings.high_pass}
    # nilearn would filter at another frequency, and only warn.
    for name, value in band.items():
        if value is not None and value >= 0.5 / t_r:
            limit = f"{0.5 / t_r:g} Hz at {t_r:g} s per frame"
            refuse(f"{name} must be below {limit}, got {value}", "setting")
    confounds = None
    if settings.confounds:
        confounds = _confounds(source, settings.confounds, len(values))
    with warnings.catch_warnings():
        # How confounds are scaled does not matter: what is regressed out is the space they span.
        warnings.filterwarnings("ignore", ".*confounds will be standardized", DeprecationWarning)
        return clean(
            values,
            confounds=confounds,
            t_r=t_r,
            filter="butterworth" if any(band.values()) else False,
            detrend=False,
            standardize=None,
            **band,
        )


def _confounds(source: Path, columns: Sequence[str], n_frames: int) -> np.ndarray:
    """Columns of fMRIPrep's table, (time, column)."""
    name, table = formats.beside(source, *formats.CONFOUNDS)
    unknown = [column for column in columns if column not in table]
    if unknown:
        refuse(f"{name} is not there or has no columns {unknown}", "no-confounds")
    values = table[list(columns)].to_numpy(float, copy=True)
    values[0] = np.nan_to_num(values[0])  # a derivative has no value in the first frame
    if len(values) != n_frames or not np.isfinite(values).all():
        found = f"got {len(values)} rows, {np.isnan(values).sum()} cells without a number"
        refuse(f"{name} must have {n_frames} complete rows, {found}", "no-confounds")
    return values


def find_sources(sources: Sequence[str | Path], settings: Preprocessing) -> list[Path]:
    """Files as given, and the dense series or volumes in folders, as the atlas needs them."""
    endings = VOLUMES if settings.label_volume else DENSE
    found: list[Path] = []
    for source in map(Path, sources):
        if not source.exists():
            refuse(f"{source}: no such file or folder", "no-scans")
        inside = [source]
        if source.is_dir():
            walked = formats.walk(source)
            inside = [path for path in walked.files if path.name.endswith(endings)]
            # A folder that cannot be read fails as a scan does.
            inside += walked.unread
        if not inside:
            refuse(f"{source}: no file ending in {' or '.join(endings)}", "no-scans")
        found += inside
    return list(dict.fromkeys(found))


def output_path(source: Path, folder: Path, atlas: str, table: bool) -> Path:
    """Where a scan goes: ``sub-*/[ses-*/]func/*_seg-ATLAS_stat-mean_timeseries.*``, as in XCP-D."""
    try:
        participant = formats.participant(source)
    except DataError:
        participant = ""  # the scan is refused for it when its turn comes
    name = re.sub(r"_(bold|timeseries)$", "", stem(source.name))
    if participant not in name:
        name = f"{participant}_{name}"
    inside = folder / participant
    session = entities(name).get("ses")
    if session:
        inside = inside / f"ses-{session}"
    ending = "tsv" if table else "ptseries.nii"
    return inside / "func" / f"{name}_seg-{atlas}_stat-mean_timeseries.{ending}"


def save_derived(
    scan: Scan,
    output: Path,
    about: Mapping[str, Any],
    *,
    axis: ParcelsAxis | None = None,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Write a scan that was made of others, with `about` in its JSON sidecar.

    Parameters
    ----------
    scan, output, axis
        As in :func:`~mnemodyn.data.scans.save_scan`.
    about : mapping
        What the sidecar says besides ``RepetitionTime`` and ``GeneratedBy``.
    inputs : iterable of path-like
        What is read.

    Raises
    ------
    OutputError
        If the scan, its sidecar or its table of outliers would replace a file that this function did not write.
    """
    said = {"RepetitionTime": scan.t_r, **about, "GeneratedBy": generated_by()}
    made = temporary(output)
    try:
        save_scan(scan, made / output.name, axis=axis, about=said)
        same = output.is_file() and cmp(made / output.name, output, shallow=False)
        # The sidecar is last, because it says that the others are whole.
        files = sorted(made.iterdir(), key=lambda file: file.suffix == ".json")
        for file in files:
            place = output.with_name(file.name)
            check_output(place, "scan of this command", lambda at: same or _is_derived(at), inputs)
        for file in files:
            file.replace(output.with_name(file.name))
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _is_derived(file: Path) -> bool:
    """Whether `save_derived` wrote a file: its sidecar says so, or of a table of outliers one of its recording's."""
    sidecars: Iterable[Path] = [file.with_name(f"{stem(file.name)}.json")]
    if file.name.endswith("_outliers.tsv"):
        sidecars = file.parent.glob(f"{formats.recording(file.name)}_*.json")
    ours = f'"Name": "{generated_by()[0]["Name"]}"'
    return any(ours in _text(sidecar) for sidecar in sidecars)


def _text(sidecar: Path) -> str:
    if not sidecar.is_file():
        return ""
    return sidecar.read_text(encoding="utf-8", errors="replace")


def _made_from(source: Path, facts: dict[str, Any], settings: Preprocessing) -> str:
    """Digest of all that a preprocessed scan depends on, by content."""
    parts: list[Any] = [facts, generated_by(), source.name, sha256(source)]
    parts += [formats.sidecar_t_r(source), formats.motion(source)[0]]
    if settings.confounds:
        table = formats.beside(source, *formats.CONFOUNDS)[1]
        parts += [list(table), table.to_numpy()]
    return digest(parts)


def _preprocess_scan(
    source: Path, output: Path, atlas: str, facts: dict[str, Any], settings: Preprocessing
) -> str:
    """Write one scan, unless it is complete; ``done`` or ``skipped``."""
    formats.present(source)
    participant = formats.participant(source)
    if not participant:
        refuse("no participant (sub-...) in the file's name or its folders", "no-participant")
    made_from = _made_from(source, facts, settings)
    if output.is_file() and made_from in _text(output.with_name(f"{stem(output.name)}.json")):
        return "skipped"
    average = _average_volume if settings.label_volume else _average_dense
    found = average(source, settings)
    stated = formats.sidecar_t_r(source)
    t_r, origin = agree_on_t_r(found.t_r, stated, settings.t_r, settings.override_t_r)
    values = found.values
    if settings.confounds or settings.low_pass or settings.high_pass:
        values = _clean(source, values, t_r, settings)
    scan = Scan(
        participant,
        np.ascontiguousarray(values, np.float32),
        t_r,
        found.parcels,
        atlas=atlas,
        source=source.name,
        t_r_source=origin,
        censored=formats.motion(source)[0],
    )
    about = {
        "RepetitionTimeFrom": origin,
        "Atlas": atlas,
        "AtlasGrayordinatesAbsent": found.n_absent,
        "Sources": [source.name],
        "MadeFrom": made_from,
        **facts,
    }
    save_derived(scan, output, about, axis=found.axis, inputs=[source])
    return "done"


def _row(source: Path, output: Path, *work: Any) -> dict[str, str]:
    """Preprocess one scan; what came of it."""
    row = {"source": str(source), "output": str(output), "status": "failed"}
    row.update(problem="", message="")
    try:
        with formats.naming(source.name):
            row["status"] = _preprocess_scan(source, output, *work)
    except (DataError, OutputError) as error:
        row.update(problem=error.problem, message=f"{error}")
    except Exception as error:  # one scan must not end the others
        message = f"{source.name}: {type(error).__name__}: {error}"
        row.update(problem="unreadable", message=message)
    return row


def preprocess(
    sources: Sequence[str | Path], folder: str | Path, settings: Preprocessing, *, jobs: int = 1
) -> pd.DataFrame:
    """Turn dense series or volumes into parcellated scans, each with a JSON sidecar.

    A scan that is complete already, from the same content with the same settings, is left alone, so
    that an interrupted run can be repeated. Content is that of the file, its sidecars and its tables
    of motion, and of the atlas.

    Parameters
    ----------
    sources : sequence of path-like
        Files, or folders that are searched.
    folder : path-like
        Where scans go: ``sub-*/[ses-*/]func/*_seg-ATLAS_stat-mean_timeseries.*``.
    settings : Preprocessing
    jobs : int
        Number of processes, each with one scan at a time.

    Returns
    -------
    DataFrame
        One row per source: ``source``, ``output``, ``status`` (done, skipped or failed),
        ``problem`` and ``message``.

    Raises
    ------
    DataError
        If there are no sources, two would be written to one file, or the atlas cannot be read.
    RuntimeError
        If another call writes into `folder`.
    """
    if jobs < 1:
        refuse(f"jobs must be >= 1, got {jobs}", "setting")
    folder = Path(folder).expanduser()
    found = find_sources(sources, settings)
    atlas = plain_name(Path(settings.atlas))
    if not settings.label_volume:
        atlas = _atlas(settings.atlas).name
    table = settings.table or settings.label_volume
    outputs = [output_path(source, folder, atlas, table) for source in found]
    # Two processes would otherwise write one file at a time.
    output, n = Counter(outputs).most_common(1)[0]
    if n > 1:
        message = f"{output.name} would be written {n} times; sources must differ in their names"
        refuse(message, "name-collision")
    facts = {
        "Settings": {
            **asdict(settings),
            "atlas": Path(settings.atlas).name,
            "confounds": list(settings.confounds),
        },
        "AtlasSHA256": None if settings.atlas == SCHAEFER400_TIAN3 else sha256(settings.atlas),
        "AtlasTableSHA256": None,
    }
    names = _label_table(Path(settings.atlas))
    if settings.label_volume and names.is_file():
        facts["AtlasTableSHA256"] = sha256(names)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "mnemodyn preprocess"):
        describe_derivative(folder, f"Scans in parcels ({atlas})")
        rows = Parallel(jobs)(
            delayed(_row)(source, output, atlas, facts, settings)
            for source, output in zip(found, outputs, strict=True)
        )
    return pd.DataFrame(rows)
