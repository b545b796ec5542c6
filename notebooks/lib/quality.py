"""Scans before anything is learned: what is there, what a resting brain should look like, what stands out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.signal import welch

from mnemodyn.data.scans import Collection, Scan

SLOW = 0.1  # Hz: haemodynamic fluctuations lie below
OUTLYING = 3.5  # modified z-score, Iglewicz and Hoaglin (1993), How to Detect and Handle Outliers


def mark(found: Collection) -> str:
    """What stands before every caption: ``"SIMULATED. "`` or nothing."""
    return "SIMULATED. " if found.simulated else ""


def summary(found: Collection) -> pd.DataFrame:
    """What a collection holds, a row a property, as text."""
    table = found.table
    first = found[0]
    sites = table["site"][table["site"].fillna("") != ""]
    t_r = sorted(table["t_r"].round(3).unique())
    rows = {
        "scans": str(len(table)) + (", SIMULATED" if found.simulated else ""),
        "participants": str(table["participant_id"].nunique()),
        "sites": str(sites.nunique()) if len(sites) else "not known",
        "parcels": f"{len(first.parcels)} ({first.atlas or 'atlas not stated'})",
        "frames a scan": span(table["n_frames"], "{:.0f}"),
        "minutes a scan": span(table["n_frames"] * table["t_r"] / 60, "{:.1f}"),
        "repetition time (s)": ", ".join(f"{seconds:g}" for seconds in t_r),
        "mean FD known": f"{table['mean_fd'].notna().sum()} of {len(table)}",
    }
    return pd.DataFrame({"": list(rows), "found": list(rows.values())})


def span(values: pd.Series, form: str) -> str:
    """The smallest and the largest value as text, or one where they read alike."""
    low = form.format(values.min())
    high = form.format(values.max())
    return low if low == high else f"{low} to {high}"


def problems(found: Collection) -> pd.DataFrame:
    """Files that could not be used, a row a kind of problem: ``problem``, ``files``, and the first one's message."""
    if not len(found.excluded):
        return pd.DataFrame({"problem": ["none"], "files": [0], "for example": [""]})
    groups = found.excluded.groupby("problem")["message"].agg(["size", "first"])
    groups.columns = ["files", "for example"]
    return groups.sort_values("files", ascending=False).reset_index()


# A left parcel's mark: L, LH or lh that no other letter precedes or follows.
_LEFT = re.compile(r"(?<![A-Za-z])(LH|L|lh)(?![A-Za-z])")
_RIGHT = {"LH": "RH", "L": "R", "lh": "rh"}


def homotopic_pairs(parcels: tuple[str, ...]) -> list[tuple[int, int]]:
    """Columns (left, right) of parcels whose names differ only in L/R, LH/RH or lh/rh between other letters."""
    place = {name: i for i, name in enumerate(parcels)}
    pairs = []
    for name in parcels:
        twin = _LEFT.sub(lambda found: _RIGHT[found[0]], name)
        if twin != name and twin in place:
            pairs.append((place[name], place[twin]))
    return pairs


def _varying(scan: Scan) -> tuple[np.ndarray, tuple[str, ...]]:
    """Values and names of the parcels that are not constant; censored frames without a value get the parcel's mean."""
    keep = ~scan.constant
    values = scan.values[:, keep]
    if scan.censored is not None and np.isnan(values).any():
        values = np.where(np.isnan(values), np.nanmean(values, axis=0), values)
    return values, tuple(scan.parcels[i] for i in np.flatnonzero(keep))


def spectrum(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the power spectrum by Welch's method, mean over the parcels that vary, scaled to unit variance.

    Returns
    -------
    frequency : ndarray, shape (n,)
        Hz.
    power : ndarray, shape (n,)
        Per Hz, over windows of 256 frames, or of all frames of a shorter scan.
    """
    values, _ = _varying(scan)
    z = (values - values.mean(0)) / values.std(0)
    frequency, power = welch(z, fs=1 / scan.t_r, nperseg=min(256, scan.n_frames), axis=0)
    return frequency, power.mean(1)


def connectivity(scan: Scan) -> np.ndarray:
    """Pearson correlation of parcels over frames that are not censored, shape (parcel, parcel).

    It is 0 with a constant parcel.
    """
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

    Attributes
    ----------
    table : DataFrame
        A row a scan.
    spectra : list of (frequency, power)
        Of each scan, by :func:`spectrum`.
    connectivity : ndarray, shape (parcel, parcel)
        Mean correlation over scans, averaged as Fisher z.
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

    Parameters
    ----------
    scans : sequence of Scan
        With the same parcels.
    mean_fd : sequence of float
        Of each scan in mm, NaN where not known; by default what the scans say.

    Returns
    -------
    Survey
        Its table has ``participant``, ``t_r`` (s), ``frames``, ``minutes``, ``constant`` (parcels), ``censored`` (share
        of frames), ``lag1`` (mean lag-1 autocorrelation over parcels), ``slow`` (share of power below 0.1 Hz),
        ``slow_white`` (the same for white noise at this t_r), ``homotopic`` (mean correlation of left and right twins;
        NaN where the names tell of none), ``fc_similarity`` (correlation of the scan's functional connectivity with the
        mean of all others, both as Fisher z; NaN of a single scan) and ``mean_fd`` (mm).
    """
    n_parcels = len(scans[0].parcels)
    pairs = np.triu_indices(n_parcels, k=1)
    total = np.zeros(len(pairs[0]))
    spectra = []
    rows = []
    for i, scan in enumerate(scans):
        spectra.append(spectrum(scan))
        total += _fisher(scan, pairs)
        fd = scan.mean_fd if mean_fd is None else mean_fd[i]
        rows.append({**_measures(scan, *spectra[-1]), "mean_fd": np.nan if fd is None else fd})
    table = pd.DataFrame(rows)
    if len(table) > 1:
        similarity = []
        for scan in scans:
            z = _fisher(scan, pairs)
            others = (total - z) / (len(table) - 1)
            similarity.append(np.corrcoef(z, others)[0, 1])
        table["fc_similarity"] = similarity
    mean = np.zeros((n_parcels, n_parcels))
    mean[pairs] = np.tanh(total / len(table))
    return Survey(table, spectra, mean + mean.T + np.eye(n_parcels))


def _measures(scan: Scan, frequency: np.ndarray, power: np.ndarray) -> dict[str, object]:
    """One scan's row of the survey, but for what needs the other scans."""
    values, parcels = _varying(scan)
    z = (values - values.mean(0, dtype=float)) / values.std(0, dtype=float)
    twins = [(z[:, left] * z[:, right]).mean() for left, right in homotopic_pairs(parcels)]
    return {
        "participant": scan.participant_id,
        "t_r": scan.t_r,
        "frames": scan.n_frames,
        "minutes": scan.n_frames * scan.t_r / 60,
        "constant": int(scan.constant.sum()),
        "censored": 1 - scan.n_usable / scan.n_frames,
        "lag1": float((z[1:] * z[:-1]).mean()),
        "slow": float(power[frequency < SLOW].sum() / power.sum()),
        "slow_white": float(np.mean(frequency < SLOW)),
        "homotopic": float(np.mean(twins)) if twins else np.nan,
        "fc_similarity": np.nan,
    }


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
    similarity = np.arctanh(table["fc_similarity"].clip(upper=0.999999))
    found = pd.DataFrame(
        {
            "participant": table["participant"],
            "fc_similarity": _robust(similarity),
            "lag1": table.groupby(table["t_r"].round(3))["lag1"].transform(_robust),
            "mean_fd": _robust(np.log(table["mean_fd"].clip(lower=1e-3))),
        }
    )
    far = found[["fc_similarity", "lag1", "mean_fd"]].copy()
    far["fc_similarity"] *= -1
    far["lag1"] = far["lag1"].abs()
    reasons = []
    for row in far.to_dict("records"):
        reasons.append(", ".join(name for name, z in row.items() if z > limit))
    found["worst"] = far.fillna(-np.inf).max(axis=1)
    found["reasons"] = reasons
    return found


def _robust(values: pd.Series) -> pd.Series:
    """Robust z-scores, NaN where all values are equal."""
    spread = 1.4826 * (values - values.median()).abs().median()
    return (values - values.median()) / (spread if spread > 0 else np.nan)


def n_unusable(found: Collection) -> int:
    """Number of files that could not be used; a scan without a label can be."""
    where = found.excluded.reindex(columns=["left_out_of"])["left_out_of"]
    return int((where != "targets").sum())


def rows(found: Collection, measured: pd.DataFrame, apart: pd.DataFrame) -> list[dict]:
    """What the page measured, as rows of its table of results: means over scans, and counts."""
    values = {
        "lag-1 autocorrelation": measured["lag1"].mean(),
        "power below 0.1 Hz": measured["slow"].mean(),
        "power below 0.1 Hz, white noise": measured["slow_white"].mean(),
        "correlation of homotopic parcels": measured["homotopic"].mean(),
        "similarity of connectivity to the others": measured["fc_similarity"].mean(),
        "mean framewise displacement (mm)": measured["mean_fd"].mean(),
        "scans that stand out": (apart["reasons"] != "").sum(),
        "files that could not be used": n_unusable(found),
    }
    scores = {"scans that stand out": "count", "files that could not be used": "count"}
    about = {
        "data": found.name,
        "task": "scan quality",
        "n": found.table["participant_id"].nunique(),
        "kind": "SIMULATED" if found.simulated else "real",
    }
    made = []
    for method, value in values.items():
        if not np.isnan(value):
            score = scores.get(method, "mean over scans")
            made.append({**about, "method": method, "score": score, "value": float(value)})
    return made
