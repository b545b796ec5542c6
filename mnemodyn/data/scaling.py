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

What is taken over all scans is fitted on the training scans. In the last three methods it is taken of the values after
each scan's own mean is removed, which are the values it is applied to. The published draft took it of the values
*before*, where a baseline of thousands swamps them, and its last two for each parcel; BrainLM, from which the names
come, had one number for all parcels, as here.

A parcel that is constant in a scan is 0 under every method but ``raw``, and so are frames without a value.
"""  # noqa: E501

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mnemodyn.data.scans import MAX, MEAN, MIN, SD, Scan, moments

__all__ = ["METHODS", "Scaling", "moments"]

# The names of the published draft.
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
# Methods that take everything from the scan itself.
UNFITTED = (
    "zscore_per_parcel",
    "raw",
    "subtract_mean",
    "minmax_per_scan",
    "minmax_per_scan_and_parcel",
)
# Methods that subtract the scan's own mean.
CENTRED = (
    "subtract_mean",
    "subtract_mean_global_sd",
    "subtract_mean_global_p99",
    "robust_parcel_over_scans",
)
QUANTILES = ("robust_parcel_over_scans", "subtract_mean_global_p99")
# Values (64 MB) up to which quantiles are exact; of more, a random sample of frames is taken.
LARGEST_SAMPLE = 2**24


@dataclass(frozen=True)
class Scaling:
    """How values become what the network reads; a ValueError for an unknown method.

    Parameters
    ----------
    method : str
        One of the module's table, or its name in the draft. The default, ``zscore_per_parcel``, brings each parcel
        of each scan to mean 0 and SD 1 over its own frames; ``subtract_mean_global_sd`` keeps the differences in
        amplitude between parcels and between people.
    sd : float
        What :meth:`fit` found for ``subtract_mean_global_sd``, in the units of the data.
    offset, scale : tuple of float
        What :meth:`fit` found for the other fitted methods, in the units of the data: one number, or one a parcel.
    """

    method: str = "zscore_per_parcel"
    sd: float | None = None
    offset: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        method = ALIASES.get(self.method, self.method)
        if method not in METHODS:
            known = (*METHODS, *ALIASES)
            raise ValueError(f"scaling method must be one of {known}, got {method!r}")
        object.__setattr__(self, "method", method)
        for name in ("sd", "offset", "scale"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(np.asarray(value, dtype=float)).all():
                raise ValueError(f"scaling {name} must be finite numbers")
            if value is not None and name != "offset" and not (np.asarray(value) > 0).all():
                raise ValueError(f"scaling {name} must be above 0")
        # From JSON they come as lists.
        if self.offset is not None:
            object.__setattr__(self, "offset", tuple(map(float, self.offset)))
        if self.scale is not None:
            object.__setattr__(self, "scale", tuple(map(float, self.scale)))

    def fit(self, scans: Sequence[Scan]) -> "Scaling":
        """Return the scaling fitted on training scans, in one pass that holds one scan at a time.

        Mean, SD, smallest and largest value are exact. Quantiles are exact up to 2**24 values; of more, they are
        those of a random sample of about as many, drawn with a fixed seed. From a store all but the quantiles come
        without reading the values.
        """
        if self.method in UNFITTED:
            return self
        if not len(scans):
            raise ValueError(f"scaling {self.method!r} needs training scans to be fitted on")
        if self.method in QUANTILES:
            return self._fit_quantiles(scans)
        return self._fit_moments(scans)

    def _fit_moments(self, scans: Sequence[Scan]) -> "Scaling":
        """Pool means and squares as in Chan, Golub and LeVeque (1979)."""
        n = 0
        within = 0.0
        mean = np.zeros(1)
        squares = np.zeros(1)
        low = np.full(1, np.inf)
        high = np.full(1, -np.inf)
        for scan in scans:
            m = scan.moments
            n_new = scan.n_usable
            difference = m[MEAN] - mean
            mean = mean + difference * (n_new / (n + n_new))
            squares = squares + n_new * m[SD] ** 2 + difference**2 * (n * n_new / (n + n_new))
            within += n_new * float(np.mean(m[SD] ** 2))
            low = np.minimum(low, m[MIN])
            high = np.maximum(high, m[MAX])
            n += n_new
        if self.method == "subtract_mean_global_sd":
            return replace(self, sd=float(np.sqrt(within / n)))
        if self.method == "zscore_parcel_over_scans":
            return replace(self, offset=tuple(mean), scale=tuple(np.sqrt(squares / n)))
        if self.method == "minmax_over_scans":
            low = low.min(keepdims=True)
            high = high.max(keepdims=True)
        return replace(self, offset=tuple(low), scale=tuple(high - low))

    def _fit_quantiles(self, scans: Sequence[Scan]) -> "Scaling":
        n_parcels = len(scans[0].parcels)
        # Whole frames are drawn, so that the sample of one parcel is that of all.
        share = LARGEST_SAMPLE / (n_parcels * sum(scan.n_usable for scan in scans))
        draw = np.random.default_rng(0)
        centre = Scaling("subtract_mean")
        parts = []
        for scan in scans:
            x = centre(scan)
            if scan.censored is not None:
                x = x[~scan.censored]
            parts.append(x[draw.random(len(x)) < share])
        sample = np.concatenate(parts)
        if self.method == "subtract_mean_global_p99":
            return replace(self, scale=(np.quantile(sample, 0.99),))
        q1, q2, q3 = np.quantile(sample, [0.25, 0.5, 0.75], axis=0)
        return replace(self, offset=tuple(q2), scale=tuple(q3 - q1))

    def affine(self, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return offset and scale for a scan.

        Parameters
        ----------
        m : ndarray, shape (4, parcel)
            The scan's :func:`~mnemodyn.data.scans.moments`.

        Returns
        -------
        offset, scale : ndarray, shape (parcel,), float64
            The scale of what becomes 0 is infinite.

        Raises
        ------
        ValueError
            If the method has to be fitted and was not, or was fitted to another number of parcels.
        """
        n_parcels = m.shape[1]
        if self.method == "raw":
            return np.zeros(n_parcels), np.ones(n_parcels)
        if self.method == "zscore_per_parcel":
            offset = m[MEAN]
            scale = m[SD]
        elif self.method == "minmax_per_scan":
            offset = m[MIN].min()
            scale = m[MAX].max() - m[MIN].min()
        elif self.method == "minmax_per_scan_and_parcel":
            offset = m[MIN]
            scale = m[MAX] - m[MIN]
        else:
            offset, scale = self._fitted(n_parcels)
            if self.method in CENTRED:
                offset = offset + m[MEAN]
        # Dividing by infinity makes a constant parcel 0 without a warning.
        constant = (m[MIN] == m[MAX]) | (scale == 0)
        return np.broadcast_to(offset, n_parcels), np.where(constant, np.inf, scale)

    def _fitted(self, n_parcels: int) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale as :meth:`fit` found them, one or one a parcel."""
        scale = self.scale
        if self.method == "subtract_mean":
            scale = (1.0,)
        elif self.sd is not None:
            scale = (self.sd,)
        if scale is None:
            raise ValueError(f"scaling {self.method!r} must be fitted on training scans first")
        if len(scale) not in (1, n_parcels):
            found = f"got a scan of {n_parcels}"
            raise ValueError(f"scaling was fitted to {len(scale)} parcels, {found}")
        offset = (0.0,) if self.offset is None else self.offset
        return np.array(offset), np.array(scale)

    def __call__(self, scan: Scan) -> np.ndarray:
        """Return scaled values, shape (time, parcel), float32; a frame without a value is 0."""
        offset, scale = self.affine(moments(scan.values, scan.censored))
        scaled = ((scan.values - offset) / scale).astype(np.float32)
        if scan.censored is None:
            return scaled  # NaN here is damage, and shows
        return np.nan_to_num(scaled, copy=False)

    def to_dict(self) -> dict:
        """Return the state, such that ``Scaling(**state)`` is the same again."""
        return asdict(self)
