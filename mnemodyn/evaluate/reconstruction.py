"""How well hidden entries of held-out people are filled: every method on the same windows and masks."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.evaluate.baselines import VAR, Interpolation, SpatialGaussian, Zero
from mnemodyn.evaluate.metrics import bootstrap_r2, hidden_sums
from mnemodyn.pretrain.objectives import Masked
from mnemodyn.pretrain.windows import cut_windows

MODEL = "model"
# Where an array lies in memory decides how its sums are grouped: two equal runs differ in the sixteenth digit.
DIGITS = 10


def scaling_of(checkpoint: Checkpoint) -> Scaling:
    """How a checkpoint's scans are scaled; ValueError where it does not say, as one of the published draft."""
    if checkpoint.scaling is None:
        raise ValueError(
            "the checkpoint does not say how scans are scaled: dataclasses.replace(checkpoint, scaling=...)"
        )
    return checkpoint.scaling


class Network:
    """A checkpoint as a method that fills hidden entries of scans with one frame every `t_r` seconds."""

    def __init__(self, checkpoint: Checkpoint, t_r: float):
        self.checkpoint, self.t_r = checkpoint, t_r

    @torch.no_grad()
    def fill(self, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """(batch, time, parcel) with hidden entries as the network has them, visible ones as given."""
        device = next(self.checkpoint.model.parameters()).device
        out = []
        for values, mask in zip(x, hidden, strict=True):
            given = torch.as_tensor(values[None], dtype=torch.float32, device=device)
            where = torch.as_tensor(mask[None], device=device)
            filled = self.checkpoint.model(given, self.t_r, hidden=where).reconstruction
            out.append(torch.where(where, filled, given)[0].cpu().numpy())
        return np.stack(out)


def methods(checkpoint: Checkpoint, train: Sequence[Scan]) -> dict:
    """The network and the baselines, these fitted to all of `train` (training and validation scans)."""
    scaled = [scaling_of(checkpoint)(scan) for scan in train]
    return {
        MODEL: Network(checkpoint, train[0].t_r),
        "zero": Zero(),
        "interpolation": Interpolation(),
        "spatial_gaussian": SpatialGaussian().fit(scaled),
        "var": VAR().fit(scaled),
    }


def held_out(checkpoint: Checkpoint, scans: Sequence[Scan]) -> tuple[list[Scan], list[Scan]]:
    """Scans of the participants that a checkpoint was trained and validated on, and those of all others.

    Raises
    ------
    DataError
        If there are none of either: nothing to fit baselines to, or nobody to test on.
    CheckpointError
        If a scan's parcels are not the checkpoint's.
    """
    for scan in scans:
        checkpoint.check(scan)
    people = {
        *checkpoint.training["train_participants"],
        *checkpoint.training["validation_participants"],
    }
    known = [s for s in scans if s.participant_id in people]
    test = [s for s in scans if s.participant_id not in people]
    if not known or not test:
        raise DataError(
            f"expected scans of the checkpoint's {len(people)} participants and of others, "
            f"got {len(known)} and {len(test)}"
        )
    return known, test


def scaled_windows(
    checkpoint: Checkpoint, scans: Sequence[Scan], n_timepoints: int
) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive windows of scaled scans, (window, time, parcel), and the participant of each, (window,)."""
    cut = [cut_windows(scaling_of(checkpoint)(scan), n_timepoints) for scan in scans]
    people = [
        scan.participant_id for scan, windows in zip(scans, cut, strict=True) for _ in windows
    ]
    return np.concatenate(cut), np.array(people)


def windows_and_whole(
    checkpoint: Checkpoint,
    scans: Sequence[Scan],
    objective: Masked,
    n_timepoints: int,
    *,
    seed: int,
) -> dict:
    """Fill the same hidden entries window by window, and in one pass over each scan.

    Returns
    -------
    dict
        ``windows`` and ``whole`` (R2), and ``difference`` (whole minus windows) with its ``low`` and ``high``, the
        95 % paired bootstrap over windows.
    """
    network, sums = Network(checkpoint, scans[0].t_r), []
    for i, scan in enumerate(scans):
        x = cut_windows(scaling_of(checkpoint)(scan), n_timepoints)
        hidden = objective.hide(x.shape, seed + i).numpy()
        one = (1, -1, x.shape[-1])
        whole = network.fill(x.reshape(one), hidden.reshape(one)).reshape(x.shape)
        pieces, total = hidden_sums(x, network.fill(x, hidden), hidden)
        sums.append((hidden_sums(x, whole, hidden)[0], pieces, total))
    whole, pieces, total = (np.concatenate(part) for part in zip(*sums, strict=True))
    low, high = bootstrap_r2(whole, total, pieces, seed=seed)
    found = {
        "windows": 1 - pieces.sum() / total.sum(),
        "whole": 1 - whole.sum() / total.sum(),
        "difference": (pieces.sum() - whole.sum()) / total.sum(),
        "low": low,
        "high": high,
    }
    return {name: round(float(value), DIGITS) for name, value in found.items()}


def compare(
    methods: dict, windows: np.ndarray, participants: np.ndarray, objective: Masked, *, seed: int
) -> pd.DataFrame:
    """Score methods, objects with ``fill(x, hidden)``, on scaled windows (window, time, parcel) under the same masks.

    Returns
    -------
    DataFrame
        A row a method: ``method, r2, low, high`` (95 % bootstrap over windows), ``difference`` (``"model"`` minus this
        method) with ``difference_low`` and ``difference_high`` (paired over the same windows), ``by_participant``
        (dict of R2), ``n_windows``, ``n_hidden``.
    """
    hidden = objective.hide(windows.shape, seed).numpy()
    sums = {
        name: hidden_sums(windows, method.fill(windows, hidden), hidden)
        for name, method in methods.items()
    }
    rows = []
    for name, (residual, total) in sums.items():
        low, high = bootstrap_r2(residual, total, seed=seed)
        row = {
            "method": name,
            "r2": float(1 - residual.sum() / total.sum()),
            "low": low,
            "high": high,
        }
        if name != MODEL and MODEL in sums:
            row["difference"] = float((residual.sum() - sums[MODEL][0].sum()) / total.sum())
            row["difference_low"], row["difference_high"] = bootstrap_r2(
                sums[MODEL][0], total, residual, seed=seed
            )
        row["by_participant"] = {
            str(p): round(
                float(1 - residual[participants == p].sum() / total[participants == p].sum()),
                DIGITS,
            )
            for p in np.unique(participants)
        }
        rows.append({**row, "n_windows": len(windows), "n_hidden": int(hidden.sum())})
    return pd.DataFrame(rows).round(DIGITS)
