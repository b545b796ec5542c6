"""Scans looked at before anything is learned: what is there, what a resting brain should look like, what stands out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import welch

from mnemodyn.data.cohorts import index, load_cohort
from mnemodyn.data.formats import refuse
from mnemodyn.data.scans import Scan, load_scans
from mnemodyn.data.store import Store
from mnemodyn.files import resolve

__all__ = [
    "Collection",
    "Survey",
    "connectivity",
    "homotopic_pairs",
    "open_scans",
    "outlying",
    "spectrum",
    "survey",
]

SLOW = 0.1  # Hz: haemodynamic fluctuations lie below
OUTLYING = 3.5  # modified z-score, Iglewicz and Hoaglin (1993), How to Detect and Handle Outliers
IN_MEMORY = 2**30  # bytes of values up to which the scans of a cohort are read once and kept
KNOWN = ["participant_id", "session", "run", "site", "mean_fd", "n_frames", "t_r"]


@dataclass(frozen=True)
class Collection:
    """Scans (in memory, or read when they are asked for) with what is known of each.

    `table` has a row a scan in the same order: ``participant_id``, ``session``, ``run``, ``site``, ``mean_fd`` (mm),
    ``n_frames``, ``t_r`` (s), missing where not known; of a cohort, its targets too. `excluded` has ``problem`` and
    ``message`` of what could not be used; of a cohort also of scans without a phenotype.
    """

    scans: Sequence[Scan] = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    excluded: pd.DataFrame = field(repr=False)
    simulated: bool = False

    @property
    def mark(self) -> str:
        """What stands before every caption: ``"SIMULATED. "`` or nothing."""
        return "SIMULATED. " if self.simulated else ""

    @property
    def summary(self) -> pd.DataFrame:
        """What is there, a row a property, as text."""
        t = self.table
        frames, seconds = t["n_frames"], t["n_frames"] * t["t_r"]
        sites = t["site"][t["site"].fillna("") != ""]
        rows = {
            "scans": f"{len(t)}" + (", SIMULATED" if self.simulated else ""),
            "participants": f"{t['participant_id'].nunique()}",
            "sites": f"{sites.nunique()}" if len(sites) else "not known",
            "parcels": f"{len(self.scans[0].parcels)} ({self.scans[0].atlas or 'atlas not stated'})",
            "frames a scan": _range(frames, "{:.0f}"),
            "minutes a scan": _range(seconds / 60, "{:.1f}"),
            "repetition time (s)": ", ".join(f"{v:g}" for v in sorted(t["t_r"].round(3).unique())),
            "mean FD known": f"{t['mean_fd'].notna().sum()} of {len(t)}",
        }
        return pd.DataFrame({"": list(rows), "found": list(rows.values())})

    @property
    def problems(self) -> pd.DataFrame:
        """Files with a problem, a row a kind: ``problem``, ``files``, and the first one's message."""
        if not len(self.excluded):
            return pd.DataFrame({"problem": ["none"], "files": [0], "for example": [""]})
        groups = self.excluded.groupby("problem")["message"].agg(["size", "first"])
        groups.columns = ["files", "for example"]
        return groups.sort_values("files", ascending=False).reset_index()


def open_scans(
    data: str | Path, *, cohort: str | Path | None = None, t_r: float | None = None
) -> Collection:
    """The scans of any source, with what is known of them; a DataError where none can be used.

    `data` is ``"hcp7"``, a folder of scans, a store, or the folder of a cohort, seen from the repository's root;
    `cohort` that cohort's name or YAML file; `t_r` the repetition time in seconds of a folder's files that state none.
    """
    data = data if data == "hcp7" else resolve(data)
    if cohort is not None:
        found = index(
            load_cohort(resolve(cohort) if str(cohort).endswith((".yaml", ".yml")) else cohort),
            data,
        )
        if not len(found):
            refuse(
                f"{data}: no scan of cohort {cohort} can be used; run mnemodyn index", "no-scans"
            )
        small = 4 * int((found.table["n_frames"] * found.table["n_parcels"]).sum()) <= IN_MEMORY
        return Collection(
            list(found) if small else found, found.table, found.excluded, found.simulated
        )
    scans = load_scans(data, t_r=t_r)
    if isinstance(scans, Store):
        table = scans.table.reindex(columns=[*dict.fromkeys([*KNOWN, *scans.table])])
        return Collection(scans, table, scans.excluded, scans.simulated)
    table = pd.DataFrame([{name: getattr(s, name, None) for name in KNOWN} for s in scans])
    return Collection(
        scans, table.astype({"mean_fd": float}), pd.DataFrame(columns=["problem", "message"])
    )


def _range(values: pd.Series, form: str) -> str:
    ends = [form.format(values.min()), form.format(values.max())]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def homotopic_pairs(parcels: tuple[str, ...]) -> list[tuple[int, int]]:
    """Columns (left, right) of parcels whose names differ only in L/R, LH/RH or lh/rh between other letters."""
    place = {name: i for i, name in enumerate(parcels)}
    left = re.compile(r"(?<![A-Za-z])(?:L(H?)|l(?=h))(?![A-Za-gi-z])")
    twins = {name: left.sub(lambda m: "r" if m[0] == "l" else f"R{m[1]}", name) for name in parcels}
    return [
        (place[name], place[twin]) for name, twin in twins.items() if twin != name and twin in place
    ]


def _varying(scan: Scan) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values and names of the parcels that are not constant; censored frames without a value get the parcel's mean."""
    keep = ~scan.constant
    values = scan.values[:, keep]
    if scan.censored is not None and np.isnan(values).any():
        values = np.where(np.isnan(values), np.nanmean(values, axis=0), values)
    return values, tuple(p for p, k in zip(scan.parcels, keep, strict=True) if k)


def spectrum(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Welch's estimate of the power spectrum, mean over the parcels that vary, scaled to unit variance.

    Frequency (n,) in Hz and power (n,) per Hz, over windows of 256 frames or a shorter scan's all.
    """
    values, _ = _varying(scan)
    z = (values - values.mean(0)) / values.std(0)
    frequency, power = welch(z, fs=1 / scan.t_r, nperseg=min(256, scan.n_frames), axis=0)
    return frequency, power.mean(1)


def connectivity(scan: Scan) -> np.ndarray:
    """Pearson correlation of parcels over frames that are not censored, (parcel, parcel); 0 with a constant parcel."""
    values = scan.values if scan.censored is None else scan.values[~scan.censored]
    z = values - values.mean(axis=0, dtype=float)
    length = np.linalg.norm(z, axis=0)
    z = np.divide(z, length, out=np.zeros_like(z), where=(length > 0) & ~scan.constant)
    return z.T @ z


def _fisher(scan: Scan, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.arctanh(np.clip(connectivity(scan)[pairs], -0.999999, 0.999999))


@dataclass(frozen=True)
class Survey:
    """What :func:`survey` measured.

    A table with a row a scan, frequency (Hz) and power (per Hz) of each by :func:`spectrum`, and the mean connectivity
    (parcel, parcel) over scans, averaged as Fisher z, as r.
    """

    table: pd.DataFrame = field(repr=False)
    spectra: list[tuple[np.ndarray, np.ndarray]] = field(repr=False)
    connectivity: np.ndarray = field(repr=False)

    def digest(self, rows: int = 20) -> pd.DataFrame:
        """The table where it has at most `rows`, else the median and the ends of 90 % of the scans, a row a measure."""
        known = self.table.dropna(axis=1, how="all")
        if len(known) <= rows:
            return known
        quantiles = known.select_dtypes("number").quantile([0.05, 0.5, 0.95]).T
        quantiles.columns = ["5 %", "median", "95 %"]
        return quantiles.rename_axis("measure").reset_index()


def survey(scans: Sequence[Scan], mean_fd: Sequence[float] | None = None) -> Survey:
    """Measure every scan, in two passes that hold one scan at a time.

    `scans` have the same parcels. `mean_fd` of each is in mm, NaN where not known; by default what the scans say.

    Returns
    -------
    Survey
        Its table has ``participant``, ``t_r`` (s), ``frames``, ``minutes``, ``constant`` (parcels), ``censored`` (share
        of frames), ``lag1`` (mean lag-1 autocorrelation over parcels), ``slow`` (share of power below 0.1 Hz),
        ``slow_white`` (the same for white noise at this t_r), ``homotopic`` (mean correlation of left and right twins;
        NaN where the names tell of none), ``fc_similarity`` (correlation of the scan's functional connectivity with the
        mean of all others, both as Fisher z; NaN of a single scan) and ``mean_fd`` (mm).
    """
    pairs = np.triu_indices(len(scans[0].parcels), k=1)
    total, rows, spectra = np.zeros(len(pairs[0])), [], []
    for i, scan in enumerate(scans):
        values, parcels = _varying(scan)
        z = (values - values.mean(0, dtype=float)) / values.std(0, dtype=float)
        frequency, power = spectrum(scan)
        spectra.append((frequency, power))
        total += _fisher(scan, pairs)
        twins = homotopic_pairs(parcels)
        fd = scan.mean_fd if mean_fd is None else mean_fd[i]
        rows.append(
            {
                "participant": scan.participant_id,
                "t_r": scan.t_r,
                "frames": scan.n_frames,
                "minutes": scan.n_frames * scan.t_r / 60,
                "constant": int(scan.constant.sum()),
                "censored": 1 - scan.n_usable / scan.n_frames,
                "lag1": float((z[1:] * z[:-1]).mean()),
                "slow": float(power[frequency < SLOW].sum() / power.sum()),
                "slow_white": float(np.mean(frequency < SLOW)),
                "homotopic": float(np.mean([(z[:, i] * z[:, j]).mean() for i, j in twins]))
                if twins
                else np.nan,
                "fc_similarity": np.nan,
                "mean_fd": np.nan if fd is None or pd.isna(fd) else float(fd),
            }
        )
    table = pd.DataFrame(rows)
    if len(table) > 1:
        ours = (_fisher(scan, pairs) for scan in scans)
        table["fc_similarity"] = [
            float(np.corrcoef(z, (total - z) / (len(table) - 1))[0, 1]) for z in ours
        ]
    mean = np.zeros([len(scans[0].parcels)] * 2)
    mean[pairs] = np.tanh(total / len(table))
    return Survey(table, spectra, mean + mean.T + np.eye(len(mean)))


def outlying(table: pd.DataFrame, limit: float = OUTLYING) -> pd.DataFrame:
    """Which scans of a :func:`survey` stand out, by robust z-scores: (value - median) / (1.4826 MAD).

    A low similarity of connectivity (as Fisher z), a high mean FD (its logarithm: both are skewed as they are), and a
    lag-1 autocorrelation that is either, among the scans with the same repetition time, on which it depends.

    Returns
    -------
    DataFrame
        In the order of `table`: ``participant``, ``fc_similarity``, ``lag1`` and ``mean_fd`` as z-scores (NaN where not
        known or all equal), ``worst`` (the largest in its direction) and ``reasons`` (above `limit`, "" for none).
    """

    def robust(values: pd.Series) -> pd.Series:
        spread = 1.4826 * (values - values.median()).abs().median()
        return (values - values.median()) / (spread if spread > 0 else np.nan)

    z = {
        "fc_similarity": robust(np.arctanh(table["fc_similarity"].clip(upper=0.999999))),
        "lag1": table.groupby(table["t_r"].round(3))["lag1"].transform(robust),
        "mean_fd": robust(np.log(table["mean_fd"].clip(lower=1e-3))),
    }
    far = pd.DataFrame(z | {"fc_similarity": -z["fc_similarity"], "lag1": z["lag1"].abs()})
    reasons = [
        ", ".join(name for name in far if row[name] > limit) for row in far.to_dict("records")
    ]
    found = pd.DataFrame({"participant": table["participant"], **z})
    return found.assign(worst=far.fillna(-np.inf).max(axis=1), reasons=reasons)
