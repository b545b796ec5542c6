"""Frozen read-outs: vectors of a scan (or window) from what the network computes on it."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scans import Scan, fingerprint, load_scan
from mnemodyn.evaluate.reconstruction import scaling_of
from mnemodyn.files import writing
from mnemodyn.hub import from_pretrained
from mnemodyn.model.front import Front
from mnemodyn.model.network import MnemoDyn, Output
from mnemodyn.model.operator import OperatorBlock
from mnemodyn.model.wavelet import wavedec


def _scale_energy(output: Output, model: MnemoDyn) -> torch.Tensor:
    coefficients = wavedec(
        output.latents[0].T[None],
        cast(OperatorBlock, model.blocks[-1]).wavelet,
        model.config.n_levels,
    )
    return torch.stack(
        [c[0].square().mean(-1).clamp_min(1e-12).log() for c in coefficients]
    ).flatten()


def _correlation(series: torch.Tensor) -> torch.Tensor:
    columns = torch.triu_indices(series.shape[1], series.shape[1], 1)
    r = torch.corrcoef(series.T)[columns[0], columns[1]]
    return torch.atanh(torch.nan_to_num(r).clamp(-0.999999, 0.999999))


READOUTS: dict[str, Callable[[Output, MnemoDyn], torch.Tensor]] = {
    "latent_mean": lambda output, _: output.latents[0].mean(0),
    "latent_sd": lambda output, _: output.latents[0].std(0),
    "latent_max": lambda output, _: output.latents[0].amax(0),
    "scale_energy": _scale_energy,
    "latent_correlation": lambda output, _: _correlation(output.latents[0]),
    "response": lambda output, _: _correlation(output.reconstruction[0]),
    "last_frame": lambda output, _: output.reconstruction[0, -1],
}


def _adapted(front: Front, x: torch.Tensor, censored: torch.Tensor | None) -> torch.Tensor:
    hidden = (
        torch.zeros_like(x, dtype=torch.bool)
        if censored is None
        else censored[..., None].expand_as(x)
    )
    found = front.connectivity(torch.where(hidden, 0, x), hidden)[0].double()
    rows, columns = torch.triu_indices(len(found), len(found), 1)
    return torch.cat(
        [found[rows, columns] * 2**0.5, found.diagonal()]
    )  # distances stay those of the matrices


@torch.no_grad()
def readouts(
    model: MnemoDyn,
    x: np.ndarray,
    t_r: float,
    names: Sequence[str] = tuple(READOUTS),
    *,
    censored: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Read vectors (feature,), float64, out of a frozen network in evaluation mode, in one pass.

    `x` (time, parcel) are scaled values, of which nothing is hidden; `t_r` is in seconds; `censored` is (time,).
    `names` are among

    - ``latent_mean``, ``latent_sd``, ``latent_max``: over time, one value a channel of the last block's latents;
    - ``scale_energy``: log mean square of their wavelet coefficients, one a level and channel;
    - ``latent_correlation``: Fisher-z correlations between channels;
    - ``response``: Fisher-z correlations between parcels of what the operators make of the scan;
    - ``last_frame``: the last frame of that, which is all that the published draft's heads read;
    - ``adapted``: the scan's covariance as the front end adapts it, a step from the group's, see
      :meth:`mnemodyn.model.front.Front.connectivity`; for a network that has one.
    """
    known = (*READOUTS, *(["adapted"] if model.front is not None else []))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"read-out must be one of {known} for this network, got {unknown[0]!r}")
    parameter = next(model.parameters())
    missing = None if censored is None else torch.as_tensor(censored[None], device=parameter.device)
    output = model(torch.as_tensor(x[None]).to(parameter), t_r, censored=missing)
    output = Output(output.reconstruction.double(), output.latents.double(), None)
    found = {name: READOUTS[name](output, model) for name in names if name in READOUTS}
    if "adapted" in names and model.front is not None:
        found["adapted"] = _adapted(model.front, torch.as_tensor(x[None]).to(parameter), missing)
    return {name: found[name].cpu().numpy() for name in names}


def readout(model: MnemoDyn, x: np.ndarray, t_r: float, name: str) -> np.ndarray:
    """One vector of `readouts`, (feature,), float64."""
    return readouts(model, x, t_r, (name,))[name]


@dataclass(eq=False, repr=False)
class MnemoDynEncoder(TransformerMixin, BaseEstimator):
    """Scans to the read-outs of a frozen network, as a transformer of scikit-learn.

    Nothing is fitted but the number of parcels, so that it may stand in a pipeline or before it.

    Parameters
    ----------
    checkpoint : str, Path or Checkpoint
        See :func:`mnemodyn.hub.from_pretrained`: ``NAME/MODEL`` of the hub, a folder or a file.
    readouts : tuple of str
        Concatenated in this order; see :func:`readouts`.
    untrained : int, optional
        Seed of random weights that replace the checkpoint's: what is left without pretraining.
    cache : str or Path, optional
        Folder where the read-outs of each scan are kept, by the digests of weights and scan.
    device : str
        Such as ``cpu`` or ``cuda``.
    t_r, parcels : float, tuple of str, optional
        Repetition time in seconds and names of the columns, for arrays.

    Examples
    --------
    >>> model = make_pipeline(MnemoDynEncoder("checkpoint"), StandardScaler(), LogisticRegression())  # doctest: +SKIP
    >>> model.fit(scans, diagnosis)  # doctest: +SKIP
    """

    checkpoint: Any = None
    readouts: Sequence[str] = ("latent_mean", "latent_sd")
    untrained: int | None = None
    cache: str | Path | None = None
    device: str = "cpu"
    t_r: float | None = None
    parcels: Sequence[str] | None = None

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        tags.requires_fit = False
        return tags

    def fit(self, X: Sequence[Scan | np.ndarray], y=None) -> "MnemoDynEncoder":
        """Load the checkpoint and check that the scans have its parcels.

        An item may be an array (time, parcel), as nilearn's maskers return it, where `t_r` and `parcels` are given.
        """
        checkpoint = self._loaded()
        for scan in self._scans(X):
            checkpoint.check(scan)
        self.n_parcels_ = checkpoint.model.config.n_parcels
        return self

    def transform(self, X: Sequence[Scan | np.ndarray]) -> np.ndarray:
        """Read-outs of every scan, (scan, feature), float64."""
        check_is_fitted(self, "n_parcels_")
        blocks = self.blocks(X)
        return np.concatenate([blocks[name] for name in self.readouts], axis=1)

    def _scans(self, X: Sequence[Scan | np.ndarray]) -> Iterator[Scan]:
        for i, item in enumerate(X):
            if isinstance(item, Scan):
                yield item
            else:  # constant parcels are as good here as in a scan
                how: dict[str, Any] = {
                    "t_r": self.t_r,
                    "parcels": self.parcels,
                    "participant_id": f"array {i}",
                }
                yield load_scan(item, max_constant_parcels=np.size(item), **how)

    def blocks(self, scans: Sequence[Scan | np.ndarray]) -> dict[str, np.ndarray]:
        """Each read-out apart, (scan, feature); scans are read one at a time."""
        checkpoint = self._loaded()
        model = checkpoint.model.to(self.device).eval()
        weights = hashlib.sha256(repr(model.config).encode())
        for name, value in sorted(model.state_dict().items()):
            weights.update(name.encode() + value.cpu().numpy().tobytes())
        digest = weights.hexdigest()
        rows = [self._one(checkpoint, model, scan, digest) for scan in self._scans(scans)]
        return {name: np.array([row[name] for row in rows]) for name in self.readouts}

    def _one(
        self, checkpoint: Checkpoint, model: MnemoDyn, scan: Scan, digest: str
    ) -> dict[str, np.ndarray]:
        checkpoint.check(scan)
        path = (
            None
            if self.cache is None
            else Path(self.cache) / digest[:16] / f"{fingerprint([scan])[:32]}.npz"
        )
        if path is not None and path.is_file():
            with np.load(path) as kept:
                if set(self.readouts) <= set(kept.files):
                    return {name: kept[name].astype(float) for name in self.readouts}
        found = readouts(
            model, scaling_of(checkpoint)(scan), scan.t_r, self.readouts, censored=scan.censored
        )
        # Rounded alike whether or not they come from the cache, so that a second run gives what the first gave.
        found = {name: value.astype(np.float32) for name, value in found.items()}
        if path is not None:
            with writing(path) as stream:
                np.savez(stream, allow_pickle=False, **found)
        return {name: value.astype(float) for name, value in found.items()}

    def _loaded(self) -> Checkpoint:
        if self.checkpoint is None:
            raise ValueError("checkpoint must be a checkpoint or its folder, got None")
        checkpoint = (
            self.checkpoint
            if isinstance(self.checkpoint, Checkpoint)
            else from_pretrained(self.checkpoint)
        )
        if self.untrained is None:
            return checkpoint
        with torch.random.fork_rng():
            torch.manual_seed(self.untrained)
            return replace(checkpoint, model=MnemoDyn(checkpoint.model.config).eval())
