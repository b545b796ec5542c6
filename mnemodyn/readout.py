"""Read-outs: a vector a scan from what a frozen network computes on it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin

from mnemodyn.checkpoint import Checkpoint, from_pretrained
from mnemodyn.connectivity import LEAST
from mnemodyn.data.scans import DataError, Scan, load_scan
from mnemodyn.files import Kept, digest
from mnemodyn.model.connectome import to_vector
from mnemodyn.model.front import Front
from mnemodyn.model.network import MnemoDyn, Output
from mnemodyn.model.wavelet import wavedec

__all__ = ["READOUTS", "MnemoDynEncoder", "kept_readouts", "readouts"]

LARGEST_R = 0.999999  # Fisher's z of 1 is infinite
SMALLEST_ENERGY = 1e-12


def _scale_energy(output: Output, model: Any) -> torch.Tensor:
    """Log mean square of the wavelet coefficients of the latents, a value a level and channel."""
    wavelet = model.blocks[-1].wavelet
    coefficients = wavedec(output.latents[0].T[None], wavelet, model.config.n_levels)
    levels = []
    for level in coefficients:
        energy = level[0].square().mean(-1)
        levels.append(energy.clamp_min(SMALLEST_ENERGY).log())
    return torch.stack(levels).flatten()


def _correlation(series: torch.Tensor) -> torch.Tensor:
    """Fisher-z correlations between the columns of (time, column); 0 where a column is constant."""
    n_columns = series.shape[1]
    rows, columns = torch.triu_indices(n_columns, n_columns, 1)
    r = torch.corrcoef(series.T)[rows, columns]
    return torch.atanh(torch.nan_to_num(r).clamp(-LARGEST_R, LARGEST_R))


READOUTS: dict[str, Callable] = {
    "latent_mean": lambda output, _: output.latents[0].mean(0),
    "latent_sd": lambda output, _: output.latents[0].std(0),
    "latent_max": lambda output, _: output.latents[0].amax(0),
    "scale_energy": _scale_energy,
    "latent_correlation": lambda output, _: _correlation(output.latents[0]),
    "response": lambda output, _: _correlation(output.reconstruction[0]),
    "last_frame": lambda output, _: output.reconstruction[0, -1],
}


def _adapted(front: Front, x: torch.Tensor, censored: torch.Tensor | None) -> torch.Tensor:
    """The covariance of a scan as the front end adapts it, as a vector in tangent space."""
    hidden = torch.zeros_like(x, dtype=torch.bool)
    if censored is not None:
        hidden = censored[..., None].expand_as(x)
    return to_vector(front.connectivity(torch.where(hidden, 0, x), hidden)[0].double())


def _connectome(
    model: MnemoDyn, x: torch.Tensor, t_r: float, censored: torch.Tensor | None
) -> torch.Tensor:
    """The estimate of a person's connectivity, as a vector in tangent space."""
    if censored is not None:
        x = x[:, ~censored[0]]
    return to_vector(model.estimate_connectivity(x, t_r, "connectome")[0].double())


def check_names(model: MnemoDyn, names: Sequence[str]) -> None:
    """Refuse the names of read-outs that there are not for a network."""
    known = list(READOUTS)
    if model.front is not None:
        known.append("adapted")
    if model.connectome is not None:
        known.append("connectome")
    for name in names:
        if name not in known:
            raise ValueError(
                f"read-out must be one of {', '.join(known)} for this network, got {name!r}"
            )


@torch.no_grad()
def readouts(
    model: MnemoDyn,
    x: np.ndarray,
    t_r: float,
    names: Sequence[str] = tuple(READOUTS),
    *,
    censored: np.ndarray | None = None,
) -> dict:
    """Compute read-outs of one scan in one pass of a network in evaluation mode.

    Parameters
    ----------
    model : MnemoDyn
    x : ndarray, shape (time, parcel)
        Scaled values, none of them hidden.
    t_r : float
        Repetition time, in seconds.
    names : sequence of str
        Among

        - ``latent_mean``, ``latent_sd``, ``latent_max``: over time, a value a channel of the last
          block's latents;
        - ``scale_energy``: log mean square of their wavelet coefficients, a value a level and channel;
        - ``latent_correlation``: Fisher-z correlations between channels;
        - ``response``: Fisher-z correlations between parcels of the network's reconstruction;
        - ``last_frame``: the last frame of the reconstruction, which the published draft's heads read;
        - ``adapted``: the scan's covariance as the front end adapts it, see
          :meth:`mnemodyn.model.front.Front.connectivity`; only for a network with a front end;
        - ``connectome``: what the rest of the person's data would show, see
          :func:`~mnemodyn.connectivity.estimate_connectivity`; only for a network trained for it.
    censored : ndarray of bool, shape (time,), optional
        Frames that the network must not read.

    Returns
    -------
    dict
        A vector (feature,), float64, by name.

    Raises
    ------
    ValueError
        If a name is not among them.
    """
    check_names(model, names)
    parameter = next(model.parameters())
    values = torch.as_tensor(x[None]).to(parameter)
    missing = None
    if censored is not None:
        missing = torch.as_tensor(censored[None], device=parameter.device)
    output = model(values, t_r, censored=missing)
    # Correlations and moments of long scans lose digits in float32.
    output = Output(output.reconstruction.double(), output.latents.double(), None)
    found = {name: READOUTS[name](output, model) for name in names if name in READOUTS}
    if "adapted" in names and model.front is not None:
        found["adapted"] = _adapted(model.front, values, missing)
    if "connectome" in names:
        found["connectome"] = _connectome(model, values, t_r, missing)
    return {name: found[name].cpu().numpy() for name in names}


def kept_readouts(
    checkpoint: Checkpoint, network: str, scan: Scan, names: Sequence[str], kept: Kept
) -> dict:
    """Compute the read-outs of a scan, or find those that were kept.

    Parameters
    ----------
    checkpoint : Checkpoint
    network : str
        Its fingerprint, which takes a moment to compute.
    scan : Scan
    names : sequence of str
        See :func:`readouts`.
    kept : Kept
        Where they are kept, by the content of network, scan and names.

    Returns
    -------
    dict
        A vector (feature,), float64 with the precision of float32, by name.

    Raises
    ------
    CheckpointError
        If the parcels are not the checkpoint's, or it does not state its scaling.
    DataError
        If the scan is shorter than the length that a network of the draft reads.
    """
    checkpoint.check(scan)
    # Not the participant or the file's name: a scan that was renamed is found again.
    depends_on = digest(network, scan.values, scan.t_r, scan.parcels, scan.censored)
    # Each read-out by itself, so that asking for one more computes no other again.
    found = {name: kept.find(name, depends_on) for name in names}
    missing = [name for name in names if found[name] is None]
    if missing:
        for name, vector in _read(checkpoint, scan, missing).items():
            found[name] = kept.keep(name, depends_on, vector)
    return {name: vector.astype(float) for name, vector in found.items()}


def _read(checkpoint: Checkpoint, scan: Scan, names: Sequence[str]) -> dict:
    """The read-outs of a scan as the checkpoint scales it, float32."""
    x = checkpoint.require_scaling()(scan)
    model = checkpoint.model
    length = len(x)
    censored = scan.censored
    if model.reference:
        # Weights of the draft belong to one length and know no censored frames.
        length = model.config.n_timepoints
        censored = None
    if "connectome" in names and scan.n_usable < LEAST:
        message = f"{scan.source}: {scan.n_usable} usable frames, expected at least {LEAST}"
        raise DataError(message, "too-short")
    if len(x) < length:
        raise DataError(
            f"{scan.source}: the checkpoint reads {length} frames, got {len(x)}", "too-short"
        )
    windows = []
    for start in range(0, len(x) - length + 1, length):
        window = x[start : start + length]
        windows.append(readouts(model, window, scan.t_r, names, censored=censored))
    found = {}
    for name in names:
        mean = np.mean([window[name] for window in windows], axis=0)
        found[name] = mean.astype(np.float32)
    return found


@dataclass(eq=False, repr=False)
class MnemoDynEncoder(TransformerMixin, BaseEstimator):
    """Transform scans to the read-outs of a frozen network, as a transformer of scikit-learn.

    Nothing is fitted, so that it can stand in a pipeline or before it.

    Parameters
    ----------
    checkpoint : str, Path or Checkpoint
        What :func:`~mnemodyn.checkpoint.from_pretrained` takes, or what it returns.
    readouts : sequence of str
        Concatenated in this order; see :func:`readouts`.
    untrained : int, optional
        Seed of random weights that replace the checkpoint's, as a control of the pretraining.
    cache : str or Path, optional
        Folder where read-outs are kept. They are found again only for the same network, scaling,
        scan and read-outs, all by content.
    device : str
        Such as ``cpu`` or ``cuda``.
    t_r : float, optional
        Repetition time in seconds of scans that are given as arrays.
    parcels : sequence of str, optional
        Names of the columns of scans that are given as arrays.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> model = make_pipeline(MnemoDynEncoder("NAME/MODEL"), LogisticRegression())
    >>> model.fit(scans, diagnosis)  # doctest: +SKIP
    """

    checkpoint: Any
    readouts: Sequence[str] = ("latent_mean", "latent_sd")
    untrained: int | None = None
    cache: str | Path | None = None
    device: str = "cpu"
    t_r: float | None = None
    parcels: Sequence[str] | None = None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        # `transform` needs no more than the checkpoint, which does not depend on the scans.
        tags.requires_fit = False
        return tags

    def fit(self, X: Sequence[Scan | np.ndarray], y: Any = None) -> "MnemoDynEncoder":
        """Load the checkpoint and check the first scan; `transform` checks every scan.

        An item of `X` is a Scan or an array (time, parcel), as nilearn's maskers return it, for which
        `t_r` and `parcels` must be given.
        """
        self._load().check(next(self._scans(X)))
        return self

    def transform(self, X: Sequence[Scan | np.ndarray]) -> np.ndarray:
        """Compute the read-outs of every scan, (scan, feature), float64."""
        blocks = self.blocks(X)
        return np.concatenate([blocks[name] for name in self.readouts], axis=1)

    def blocks(self, scans: Sequence[Scan | np.ndarray]) -> dict:
        """Compute each read-out apart, (scan, feature); scans are read one at a time."""
        checkpoint = self._load()
        checkpoint.model.to(self.device).eval()
        network = checkpoint.fingerprint()
        kept = Kept(self.cache)
        rows = []
        for scan in self._scans(scans):
            rows.append(kept_readouts(checkpoint, network, scan, self.readouts, kept))
        return {name: np.array([row[name] for row in rows]) for name in self.readouts}

    def _scans(self, X: Sequence[Scan | np.ndarray]) -> Iterator[Scan]:
        """Every item as a scan."""
        for i, item in enumerate(X):
            if isinstance(item, Scan):
                yield item
                continue
            yield load_scan(
                item,
                t_r=self.t_r,
                parcels=self.parcels,
                participant_id=f"array {i}",
                # A masker leaves a parcel constant that its images do not cover.
                max_constant_parcels=np.size(item),
            )

    def _load(self) -> Checkpoint:
        """The checkpoint, with random weights if they are asked for."""
        checkpoint = self.checkpoint
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = from_pretrained(checkpoint)
        if self.untrained is None:
            return checkpoint
        # The random weights must not change the draws of whatever runs next.
        with torch.random.fork_rng():
            torch.manual_seed(self.untrained)
            model = MnemoDyn(checkpoint.model.config).eval()
        return replace(checkpoint, model=model)
