"""The connectivity of people from their scans, however short, by a trained network."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mnemodyn.checkpoint import Checkpoint, CheckpointError, from_pretrained
from mnemodyn.data.collection import open_scans
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.model.connectome import from_tangent, to_vector
from mnemodyn.model.network import KINDS
from mnemodyn.settings import nearest

__all__ = ["estimate_connectivity"]

# A scan has to have so many usable frames.
LEAST = 10


@torch.no_grad()
def estimate_connectivity(
    scans: str | Path | Scan | Sequence[Scan],
    checkpoint: str | Path | Checkpoint,
    kind: str = "adapted",
    *,
    as_correlation: bool = False,
) -> np.ndarray:
    """Estimate the connectivity of the person of each scan, which short scans show with much noise.

    Parameters
    ----------
    scans : Scan, sequence of Scan, str or Path
        Or what :func:`~mnemodyn.data.collection.open_scans` takes. Censored frames are left out.
    checkpoint : Checkpoint, str or Path
        Or what :func:`~mnemodyn.checkpoint.from_pretrained` takes.
    kind : str
        ``adapted``: the covariance to which the front end adapts, by which people are told apart best. ``connectome``:
        what the rest of the person's data would show, for a network that was trained with the objective of this name.
    as_correlation : bool
        Return correlations between parcels.

    Returns
    -------
    ndarray, float64
        (scan, P (P + 1) / 2): vectors in the tangent space at the training group's covariance, which itself is zero.
        The entries above the diagonal, row by row, times the root of 2, then the diagonal: distances between vectors
        are those between matrices. With `as_correlation` (scan, P, P).

    Raises
    ------
    ValueError
        If `kind` is unknown, or the network cannot estimate it.
    TypeError
        If an item is no Scan.
    CheckpointError
        If parcels are not the checkpoint's.
    DataError
        If a scan has fewer than ten usable frames.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown{nearest(kind, KINDS)}")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = from_pretrained(checkpoint)
    if isinstance(scans, str | Path):
        scans = open_scans(scans)
    if isinstance(scans, Scan):
        scans = [scans]
    model = checkpoint.model
    if model.front is None:
        raise ValueError(f"kind {kind!r} needs a network with {KINDS['adapted']}")
    scaling = checkpoint.require_scaling()
    if scaling.method != "zscore_per_parcel":
        raise CheckpointError(
            f"connectivity is estimated of scans scaled by zscore_per_parcel; the checkpoint has {scaling.method}"
        )
    found = []
    for scan in scans:
        if not isinstance(scan, Scan):
            raise TypeError(
                f"expected scans, got {type(scan).__name__}; mnemodyn.load_scan makes one of a file or an array"
            )
        checkpoint.check(scan)
        x = scaling(scan)
        if scan.censored is not None:
            x = x[~scan.censored]
        if len(x) < LEAST:
            raise DataError(
                f"{scan.source}: {len(x)} usable frames, expected at least {LEAST}", "too-short"
            )
        values = torch.as_tensor(x[None]).to(next(model.parameters()))
        estimate = model.estimate_connectivity(values, scan.t_r, kind)[0].double()
        if as_correlation:
            covariance = from_tangent(estimate, model.front.lags[0].double())
            sd = covariance.diagonal().sqrt()
            estimate = covariance / torch.outer(sd, sd)
        else:
            estimate = to_vector(estimate)
        found.append(estimate.cpu().numpy())
    return np.array(found)
