"""Scaling of scans. Its state travels in the checkpoint, so that a model always sees what it was trained on.

Every method is affine: a scan's values become ``(x - offset) / scale`` with an offset and a scale for each parcel.

==============================  ===============================  ==================================  ===============
method                          offset                           scale                               in the draft
==============================  ===============================  ==================================  ===============
``zscore_per_parcel``           scan's mean                      scan's SD                           (none)
``raw``                         0                                1                                   ``raw``
``subtract_mean``               scan's mean                      1                                   the same
``minmax_per_scan``             smallest of the scan             range of the scan                   ``per_patient_all_voxel``
``minmax_per_scan_and_parcel``  scan's smallest of the parcel    scan's range of the parcel          ``per_patient_per_voxel``
``minmax_over_scans``           smallest of all scans            range of all scans                  ``all_patient_all_voxel``
``minmax_parcel_over_scans``    parcel's smallest of all scans   parcel's range over all scans       ``minmax``, ``per_voxel_all_patient``
``zscore_parcel_over_scans``    parcel's mean over all scans     parcel's SD over all scans          ``standard``
``robust_parcel_over_scans``    scan's mean + parcel's median    parcel's interquartile range        ``robust_scaler``
``subtract_mean_global_sd``     scan's mean                      one SD of all                       ``subtract_mean_global_std``
``subtract_mean_global_p99``    scan's mean                      one 99th percentile of all          ``subtract_mean_99th_percentile``
==============================  ===============================  ==================================  ===============

Mean and SD, smallest and range are each parcel's own unless said otherwise. What is taken over all scans is fitted on the
training scans. In the last three methods it is taken of the values after each scan's own mean is removed, which are
the values it is applied to. The published draft took medians, quartiles, percentiles (and a SD for each parcel) of
the values *before*, where a baseline of thousands swamps them, and its last two for each parcel; BrainLM, from which
the names come, had one number for all parcels, as here.

A parcel that is constant in a scan is 0 under every method but ``raw``, and so are frames without a value.
"""  # noqa: E501

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mnemodyn.data.formats import refuse
from mnemodyn.data.scans import Scan

__all__ = ["METHODS", "QuantileSketch", "Scaling", "moments"]

MEAN, SD, MIN, MAX = range(4)
ALIASES = {
    "standard": "zscore_parcel_over_scans",
    "minmax": "minmax_parcel_over_scans",
    "raw": "raw",
    "robust_scaler": "robust_parcel_over_scans",
    "all_patient_all_voxel": "minmax_over_scans",
    "per_patient_all_voxel": "minmax_per_scan",
    "per_patient_per_voxel": "minmax_per_scan_and_parcel",
    "per_voxel_all_patient": "minmax_parcel_over_scans",
    "subtract_mean": "subtract_mean",
    "subtract_mean_global_std": "subtract_mean_global_sd",
    "subtract_mean_99th_percentile": "subtract_mean_global_p99",
}
METHODS = ("zscore_per_parcel", *dict.fromkeys(ALIASES.values()))
UNFITTED = (
    "zscore_per_parcel",
    "raw",
    "subtract_mean",
    "minmax_per_scan",
    "minmax_per_scan_and_parcel",
)
CENTRED = (
    "subtract_mean",
    "subtract_mean_global_sd",
    "subtract_mean_global_p99",
    "robust_parcel_over_scans",
)


def moments(values: np.ndarray, censored: np.ndarray | None = None) -> np.ndarray:
    """Mean, SD, smallest and largest value of each parcel over the frames that are not censored, (4, parcel), float64.

    In the units of `values` (time, parcel). A constant parcel has SD 0 exactly. A DataError if all are censored.
    """
    kept = values if censored is None else values[~censored]
    if not len(kept):
        refuse(f"all {len(values)} frames are censored", "too-short")
    low, high = kept.min(0), kept.max(0)
    constant = low == high  # the SD of a constant is not always 0 in floating point
    mean = np.where(constant, low, kept.mean(0, dtype=np.float64))
    sd = np.where(constant, 0, kept.std(0, dtype=np.float64))
    return np.stack([mean, sd, low, high]).astype(np.float64)


class QuantileSketch:
    """Quantiles of each of `n_columns` streams in bounded memory: counts between floats of seven bits' mantissa.

    A quantile comes out within ``ERROR`` = 2**-8 (0.4 %) of the true one's absolute value, whatever the order and
    number of values, as in DDSketch (Masson, Rim & Lee, VLDB 2019). Absolute values below 5e-10 count as 0, those
    above 8.6e9 as 8.6e9. Memory: 131 kB a column.
    """

    ERROR = 2.0**-8
    HALF = 64 << 7  # 64 powers of two, 2**7 bins in each
    LOWEST = (127 - 31) << 7

    def __init__(self, n_columns: int):
        self.counts = np.zeros((n_columns, 2 * self.HALF + 1), dtype=np.int64)
        self._waiting: list[np.ndarray] = []

    def add(self, x: np.ndarray) -> None:
        """Count values, shape (n, n_columns), none of them NaN."""
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.int32)
        size = np.clip(((bits & 0x7FFFFFFF) >> 16) - self.LOWEST + 1, 0, self.HALF)
        place = self.HALF + np.where(bits < 0, -size, size)
        self._waiting.append((place + np.arange(len(self.counts)) * self.counts.shape[1]).ravel())
        if sum(map(len, self._waiting)) > 1 << 22:
            self._flush()

    def _flush(self) -> None:
        together = np.concatenate([*self._waiting, np.zeros(0, int)])
        self.counts += np.bincount(together, minlength=self.counts.size).reshape(self.counts.shape)
        self._waiting.clear()

    def quantile(self, q: float) -> np.ndarray:
        """Quantile `q` of each column, shape (n_columns,): that of ``numpy.quantile(method="inverted_cdf")``."""
        self._flush()
        total = self.counts.cumsum(1)
        place = (total >= np.maximum(1, np.ceil(q * total[:, -1:]))).argmax(1) - self.HALF
        edge = (np.abs(place) - 1 + self.LOWEST).astype(np.int32)
        low, high = (
            (e << 16).astype(np.int32).view(np.float32).astype(float) for e in (edge, edge + 1)
        )
        return np.where(place == 0, 0.0, np.sign(place) * (low + high) / 2)


@dataclass(frozen=True)
class Scaling:
    """How values become what the network reads; a ValueError for an unknown method.

    Parameters
    ----------
    method : str
        One of the module's table, or its name in the draft. The default, ``zscore_per_parcel``, brings each parcel
        of each scan to mean 0 and SD 1 over its own frames; ``subtract_mean_global_sd`` keeps the differences in
        amplitude between parcels and between people.
    sd, offset, scale : float, tuple of float, tuple of float
        What :meth:`fit` found, in the units of the data: the SD of ``subtract_mean_global_sd``; for the other fitted
        methods one number, or one a parcel.
    """

    method: str = "zscore_per_parcel"
    sd: float | None = None
    offset: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", ALIASES.get(self.method, self.method))
        if self.method not in METHODS:
            raise ValueError(
                f"scaling method must be one of {(*METHODS, *ALIASES)}, got {self.method!r}"
            )
        for name in ("offset", "scale"):  # lists, where they come from JSON
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(float, value)))

    def fit(self, scans: Sequence[Scan]) -> "Scaling":
        """Fit on training scans only, in one pass that holds one scan at a time; returns the fitted scaling.

        Mean, SD, smallest and largest are exact, quantiles are those of :class:`QuantileSketch`. From a store
        all but the quantiles come without reading the values.
        """
        if self.method in UNFITTED:
            return self
        if not len(scans):
            raise ValueError(
                f"scaling {self.method!r} needs training scans to be fitted on, got none"
            )
        if self.method in ("robust_parcel_over_scans", "subtract_mean_global_p99"):
            return self._fit_quantiles(scans)
        n, within = 0, 0.0
        mean, squares, low, high = np.zeros(1), np.zeros(1), np.full(1, np.inf), np.full(1, -np.inf)
        for m, n_usable in _moments(scans):
            difference = m[MEAN] - mean  # pooled as in Chan, Golub & LeVeque 1979
            mean = mean + difference * (n_usable / (n + n_usable))
            squares = (
                squares + n_usable * m[SD] ** 2 + difference**2 * (n * n_usable / (n + n_usable))
            )
            within += n_usable * float(np.mean(m[SD] ** 2))
            low, high = np.minimum(low, m[MIN]), np.maximum(high, m[MAX])
            n += n_usable
        if self.method == "subtract_mean_global_sd":
            return replace(self, sd=float(np.sqrt(within / n)))
        if self.method == "zscore_parcel_over_scans":
            return replace(self, offset=tuple(mean), scale=tuple(np.sqrt(squares / n)))
        if self.method == "minmax_over_scans":
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        return replace(self, offset=tuple(low), scale=tuple(high - low))

    def _fit_quantiles(self, scans: Sequence[Scan]) -> "Scaling":
        robust = self.method == "robust_parcel_over_scans"
        sketch = QuantileSketch(len(scans[0].parcels) if robust else 1)
        for x in _centred(scans):
            sketch.add(x if robust else x.reshape(-1, 1))
        if not robust:
            return replace(self, scale=tuple(sketch.quantile(0.99)))
        q1, q2, q3 = (sketch.quantile(q) for q in (0.25, 0.5, 0.75))
        return replace(self, offset=tuple(q2), scale=tuple(q3 - q1))

    def affine(self, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale of a scan, (parcel,) float64, from its :func:`moments`; infinite scale of what becomes 0.

        A ValueError if the method is to be fitted and was not, or was fitted to another number of parcels.
        """
        n_parcels = m.shape[1]
        if self.method == "raw":
            return np.zeros(n_parcels), np.ones(n_parcels)
        if self.method not in UNFITTED and self.sd is None and self.scale is None:
            raise ValueError(
                f"scaling {self.method!r} must be fitted on training scans before it is used"
            )
        if self.scale is not None and len(self.scale) not in (1, n_parcels):
            raise ValueError(
                f"scaling was fitted to {len(self.scale)} parcels, got a scan of {n_parcels}"
            )
        offset = np.zeros(1) if self.offset is None else np.array(self.offset)
        scale = np.array(
            self.scale if self.scale is not None else [1.0 if self.sd is None else self.sd]
        )
        if self.method in CENTRED:
            offset = offset + m[MEAN]
        elif self.method == "zscore_per_parcel":
            offset, scale = m[MEAN], m[SD]
        elif self.method == "minmax_per_scan":
            offset, scale = m[MIN].min(), m[MAX].max() - m[MIN].min()
        elif self.method == "minmax_per_scan_and_parcel":
            offset, scale = m[MIN], m[MAX] - m[MIN]
        constant = (m[MIN] == m[MAX]) | (scale == 0)
        return np.broadcast_to(offset, n_parcels), np.where(constant, np.inf, scale)

    def __call__(self, scan: Scan) -> np.ndarray:
        """Scaled values, shape (time, parcel), float32; a frame without a value is 0."""
        offset, scale = self.affine(moments(scan.values, scan.censored))
        scaled = ((scan.values - offset) / scale).astype(np.float32)
        return scaled if scan.censored is None else np.nan_to_num(scaled, copy=False)

    def to_dict(self) -> dict:
        """The state, such that ``Scaling(**state)`` is the same again."""
        return asdict(self)


def _centred(scans: Any) -> Iterator[np.ndarray]:
    """Values of every scan without its means, frames that are not censored; a store needs not compute the means."""
    centre = Scaling("subtract_mean")
    for i, scan in enumerate(scans):
        x = scans.read(i, scaling=centre) if hasattr(scans, "read") else centre(scan)
        yield x if scan.censored is None else x[~scan.censored]


def _moments(scans: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Moments and number of frames that are not censored, of every scan; those a store keeps are not computed."""
    for i, scan in enumerate(scans):
        kept = (
            scans.moments(i) if hasattr(scans, "moments") else moments(scan.values, scan.censored)
        )
        yield kept, scan.n_usable
