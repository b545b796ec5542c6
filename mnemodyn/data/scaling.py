"""Scaling of scans. Its state travels in the checkpoint, so that a model always sees what it was trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mnemodyn.data.scans import Scan

__all__ = ["Scaling"]

METHODS = ("zscore_per_parcel", "subtract_mean_global_sd")


@dataclass(frozen=True)
class Scaling:
    """How values become what the network reads.

    Parameters
    ----------
    method : str
        ``zscore_per_parcel``: each parcel of each scan to mean 0 and SD 1 over its own frames (nothing is
        fitted). ``subtract_mean_global_sd``: each parcel of each scan minus its own mean, over one SD fitted on
        the training scans, which keeps the differences in amplitude between parcels and between people.
    sd : float, optional
        The fitted SD of the second method, in the units of the data; see :meth:`fit`.
    """

    method: str = "zscore_per_parcel"
    sd: float | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"scaling method must be one of {METHODS}, got {self.method!r}")

    def fit(self, scans: Sequence[Scan]) -> "Scaling":
        """Fit on training scans only; returns the fitted scaling."""
        if self.method == "zscore_per_parcel":
            return self
        squares = sum(((s.values - s.values.mean(0, dtype=np.float64)) ** 2).sum() for s in scans)
        return Scaling(self.method, float(np.sqrt(squares / sum(s.values.size for s in scans))))

    def __call__(self, scan: Scan) -> np.ndarray:
        """Scaled values, shape (time, parcel), float32, every parcel with mean 0."""
        centred = scan.values - scan.values.mean(0, dtype=np.float64)
        if self.method == "zscore_per_parcel":
            return (centred / scan.values.std(0, dtype=np.float64)).astype(np.float32)
        if self.sd is None:
            raise ValueError(f"scaling {self.method!r} must be fitted on training scans before it is used")
        return (centred / self.sd).astype(np.float32)

    def to_dict(self) -> dict:
        return asdict(self)
