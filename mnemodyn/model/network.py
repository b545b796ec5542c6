"""The stack of operator blocks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.model.connectome import Connectome, standardised
from mnemodyn.model.control import path_through_gaps
from mnemodyn.model.front import Front
from mnemodyn.model.operator import OperatorBlock
from mnemodyn.model.reference import ReferenceBlock, prediction_head, read_settings, read_weights
from mnemodyn.model.wavelet import wavedec
from mnemodyn.settings import ModelConfig

__all__ = ["KINDS", "MnemoDyn", "Output"]

# Kinds of connectivity that a network estimates, and the setting that each needs.
KINDS = {"adapted": "a front end (model.front)", "connectome": "model.connectome"}


class Output(NamedTuple):
    """What a network returns.

    Attributes
    ----------
    reconstruction : Tensor, shape (batch, time, parcel)
        The reconstructed scan, hidden entries filled, in the units of the input.
    latents : Tensor, shape (batch, time, channel)
        The last block's path after its operators, before the read-out to parcels.
    multiresolution_loss : Tensor or None
        Sum over levels and blocks, where the configuration asks for it.
    prediction : Tensor, shape (batch, class), or None
        Output of the head of a network of the published draft, where it has one.
    """

    reconstruction: Tensor
    latents: Tensor
    multiresolution_loss: Tensor | None
    prediction: Tensor | None = None


class MnemoDyn(nn.Module):
    r"""Wavelet operator driven by the scan's own path.

    The stream starts as the visible scan, zero where it is hidden. Each block reads the stream, its derivative per
    second and what was visible, and (``residual``) adds its output to the stream; the stream after the last block
    is the reconstruction. Source: Pal et al., ICLR 2026.

    With ``front="gaussian"``, hidden entries and censored frames start at their conditional mean, which
    :meth:`fit_front` learns in closed form. Visible entries are put back between blocks. A fresh network equals its
    front end. Where nothing is hidden, the front end does nothing.

    Notes
    -----
    **Other lengths.** A network takes any number of frames >= 2. Of its weights only those of the coarse operator and
    of the segments belong to ``n_timepoints``: see :class:`~mnemodyn.model.operator.CoarseOperator` and
    :class:`~mnemodyn.model.operator.BandedOperator`. The work grows linearly with T. A long scan is treated as its
    windows are, except for what the transform carries across their edges.

    **Time.** The control is per second. At shared instants, the drives of one signal sampled at two repetition times
    differ only as their backward differences do: by at most half the difference of the steps times the signal's
    second derivative. Levels and kernels of the pyramid count frames, so they are tied to the repetition time.

    **Reference.** With ``compat="reference"`` the network computes as the published draft does: ``n_timepoints``
    frames only, no repetition time (`t_r` may be left out and is not used), no censored frames.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.reference = config.compat == "reference"
        self.blocks = nn.ModuleList()
        for i in range(config.n_blocks):
            if self.reference:
                self.blocks.append(ReferenceBlock(config, first=i == 0))
            else:
                self.blocks.append(OperatorBlock(config))
        self.front = None
        if config.front == "gaussian":
            self.front = Front(
                config.n_parcels,
                lags=config.front_lags,
                shrinkage=config.front_shrinkage,
                weight=config.front_weight,
                steps=config.front_steps,
                modes=config.front_modes,
            )
        self.connectome = None
        if config.connectome != "none":
            latents = config.connectome == "operator"
            self.connectome = Connectome(
                config.n_parcels,
                config.connectome_maps,
                config.n_channels if latents else 0,
                config.n_levels + 1,
            )
        self.head = prediction_head(config) if config.n_classes else None

    def fit_front(self, scans: Sequence[np.ndarray]) -> "MnemoDyn":
        """Fit the front end, where there is one, to scaled training scans (time, parcel), NaN in censored frames."""
        if self.front is not None:
            self.front.fit(scans)
        return self

    @classmethod
    def from_reference(cls, settings: Mapping, state_dict: Mapping[str, Tensor]) -> "MnemoDyn":
        """A network of the published draft, from its settings and weights under its own names; in evaluation mode.

        `settings` are ``D``, ``dim_k`` and so on, those included that the draft stores without using. Weights are
        ``layers.0.input_projection.weight`` and so on, with or without the prefix ``model.``. ValueError if a setting
        is unknown, missing or contradictory, or weights do not fit: each with both shapes.
        """
        config = read_settings(settings)
        model = cls._without_memory(config, len(state_dict))
        return cls.from_weights(config, read_weights(model, state_dict))

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> "MnemoDyn":
        """A network with given weights, in evaluation mode. RuntimeError naming each weight that does not fit.

        Its memory is that of `weights`, whatever `config` asks for.
        """
        model = cls._without_memory(config, len(weights))
        model.load_state_dict(weights, assign=True)
        return model.eval()

    @classmethod
    def _without_memory(cls, config: ModelConfig, n_weights: int) -> "MnemoDyn":
        """A network whose tensors have shapes alone; ValueError where it would have more than `n_weights` of them."""
        n_layers = config.n_levels + 1
        if config.compat == "reference":
            n_layers += config.n_dense_layers
        if config.n_blocks * n_layers > n_weights:
            raise ValueError(
                f"{config.n_blocks} blocks of {n_layers} operators need more than the {n_weights} weights given"
            )
        with torch.device("meta"):
            return cls(config)

    def forward(
        self,
        x: Tensor,
        t_r: float | Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        censored: Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        filled: Tensor | None = None,
    ) -> Output:
        """Reconstruct scans.

        Parameters
        ----------
        x : Tensor, shape (batch, time, parcel)
            Scaled scans.
        t_r : float or Tensor of shape (batch,)
            Repetition time in seconds.
        hidden : Tensor of bool, shape (batch, time, parcel), optional
            True where the value must not be read. Whatever stands there, NaN included, has no influence.
        censored : Tensor of bool, shape (batch, time), optional
            True where a frame is missing (motion scrubbing, dropped volumes); it has no influence. The path goes
            through the other frames at their true times: see
            :func:`~mnemodyn.model.control.path_through_gaps`. A frame whose visible entries are all NaN is censored
            too.
        lengths : sequence of int or Tensor, shape (batch,), optional
            Frames of each scan, where scans were padded to one length. What follows them has no influence, and is
            zero in the result. Scans of one length are computed together, one pass for each distinct length. The
            multi-resolution loss is then the mean over scans.
        filled : Tensor, shape (batch, time, parcel), optional
            Output of the front end for `x`, where it is known already.

        Raises
        ------
        ValueError
            If shapes do not fit the configuration or each other, `t_r` is missing or not positive, a visible value
            is infinite, or is NaN in a frame that has others, fewer than two frames are left of a scan, or a network
            of the published draft is given another length than its own, `lengths` or censored frames.
        """
        self._check(x, hidden, censored, filled)
        if lengths is not None:
            if self.reference:
                raise ValueError("lengths cannot be given with compat='reference'")
            return self._by_length(x, t_r, hidden, censored, filled, torch.as_tensor(lengths))
        if t_r is None:
            if not self.reference:
                raise ValueError("t_r must be given, in seconds")
            t_r = 1.0  # the draft has no repetition time
        x, unseen, censored = _seen(x, hidden, censored)
        visible = torch.ones_like(x) if unseen is None else (~unseen).to(x.dtype)
        given = x
        derivative = None
        if self.front is not None:
            if filled is not None:
                x = filled
            elif unseen is not None:
                x = self.front(x, unseen)
        elif censored is not None and bool(censored.any()):
            # The front end would fill missing frames; without it the path goes around them.
            if self.reference:
                raise ValueError(
                    "censored frames are not known to the draft: compat='reference' takes none"
                )
            x, derivative = path_through_gaps(x, t_r, censored)
        total = x.new_zeros(()) if self.config.multiresolution else None
        latents = x
        for i, block in enumerate(self.blocks):
            if i > 0 and self.front is not None and unseen is not None:
                # Blocks after the first see the visible entries as they are.
                x = torch.where(unseen, x, given)
            y, latents, loss = block(x, t_r, visible, derivative)
            derivative = None  # later blocks take it from their own input, which has no gaps
            x = x + y if self.config.residual else y
            if total is not None:
                total = total + loss
        prediction = self.head(x[:, -1]) if self.head is not None else None
        return Output(x, latents, total, prediction)

    def estimate_connectivity(self, x: Tensor, t_r: float | Tensor, kind: str) -> Tensor:
        """The connectivity of people, estimated from complete scans of one length.

        Parameters
        ----------
        x : Tensor, shape (batch, time, parcel)
            In any units.
        t_r : float or Tensor of shape (batch,)
            Repetition time in seconds.
        kind : str
            ``adapted``: the covariance to which the front end adapts; ``connectome``: what the rest of the person's
            data would show.

        Returns
        -------
        Tensor, shape (batch, parcel, parcel)
            In the tangent space at the group's covariance, ``front.lags[0]``.

        Raises
        ------
        ValueError
            If the network has not what it needs.
        """
        if self.front is None or (kind == "connectome" and self.connectome is None):
            raise ValueError(
                f"a network without {KINDS[kind]} cannot estimate connectivity of kind {kind!r}"
            )
        x = standardised(x)
        adapted = self.front.connectivity(x, torch.zeros_like(x, dtype=torch.bool))
        if kind == "adapted" or self.connectome is None:
            return adapted
        products = []
        if self.connectome.of_latents:
            latents = standardised(self(x, t_r).latents.float())
            last = cast(OperatorBlock, self.blocks[-1])
            for level in wavedec(latents.mT, last.wavelet, self.config.n_levels):
                products.append(level @ level.mT / level.shape[-1])
        return self.connectome(adapted, x.shape[1], products)

    def _check(
        self, x: Tensor, hidden: Tensor | None, censored: Tensor | None, filled: Tensor | None
    ) -> None:
        """Raise a ValueError if shapes do not fit the configuration or each other."""
        if x.ndim != 3 or x.shape[-1] != self.config.n_parcels:
            raise ValueError(
                f"x must have shape (batch, time, {self.config.n_parcels} parcels), got {tuple(x.shape)}"
            )
        if self.reference and x.shape[1] != self.config.n_timepoints:
            raise ValueError(
                f"x must have {self.config.n_timepoints} frames with compat='reference', got {x.shape[1]}: the draft's "
                "weights belong to one length"
            )
        for name, mask, shape in (("hidden", hidden, x.shape), ("censored", censored, x.shape[:2])):
            if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
                raise ValueError(
                    f"{name} must be bool with shape {tuple(shape)} as x has, got {mask.dtype} {tuple(mask.shape)}"
                )
        if filled is not None and (self.front is None or filled.shape != x.shape):
            raise ValueError("filled is for a network with a front end, and has the shape of x")

    def _by_length(
        self,
        x: Tensor,
        t_r: float | Tensor | None,
        hidden: Tensor | None,
        censored: Tensor | None,
        filled: Tensor | None,
        lengths: Tensor,
    ) -> Output:
        """Scans padded to one length, one pass for each distinct length."""
        batch, time = x.shape[:2]
        whole = lengths.dtype in (torch.int32, torch.int64)
        if lengths.shape != (batch,) or not whole or lengths.min() < 2 or lengths.max() > time:
            raise ValueError(
                f"lengths must be {batch} whole numbers from 2 to {time} frames, got {lengths.tolist()}"
            )
        if t_r is not None:
            t_r = torch.as_tensor(t_r, dtype=x.dtype, device=x.device).expand(batch)
        # Padding would enter the transform, so each scan is computed at its own length.
        places: list[Tensor] = []
        outputs: list[Output] = []
        total = x.new_zeros(())
        for n in lengths.unique().tolist():
            rows = (lengths == n).nonzero()[:, 0].to(x.device)
            output = self(
                x[rows, :n],
                t_r[rows] if isinstance(t_r, Tensor) else None,
                hidden=None if hidden is None else hidden[rows, :n],
                censored=None if censored is None else censored[rows, :n],
                filled=None if filled is None else filled[rows, :n],
            )
            places.append(rows)
            outputs.append(output)
            if output.multiresolution_loss is not None:
                total = total + output.multiresolution_loss * len(rows)
        order = torch.cat(places).argsort()

        def joined(parts: list[Tensor]) -> Tensor:
            padded = [functional.pad(part, (0, 0, 0, time - part.shape[1])) for part in parts]
            return torch.cat(padded)[order]

        loss = total / batch if self.config.multiresolution else None
        reconstruction = joined([output.reconstruction for output in outputs])
        return Output(reconstruction, joined([output.latents for output in outputs]), loss)


def _seen(
    x: Tensor, hidden: Tensor | None, censored: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x with zeros where it is not seen, where that is, and the censored frames with those that are all NaN."""
    unseen = hidden
    if censored is not None:
        frames = censored[..., None].expand_as(x)
        unseen = frames if unseen is None else unseen | frames
    if unseen is not None:
        x = x.masked_fill(unseen, 0)
    # Nearly all scans end here.
    finite = x.isfinite()
    if bool(finite.all()):
        return x, unseen, censored
    # A frame is missing where all entries that should be visible are NaN.
    nan = x.isnan()
    ignored = nan if unseen is None else nan | unseen
    missing = nan.any(-1) & ignored.all(-1)
    frames = missing[..., None].expand_as(x)
    wrong = ~finite & ~frames
    if bool(wrong.any()):
        scan, frame, parcel = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"x must be finite where it is not hidden or censored, got {x[scan, frame, parcel].item()} in scan {scan}, "
            f"frame {frame}, parcel {parcel}; a frame counts as censored only where all its visible entries are NaN"
        )
    unseen = frames if unseen is None else unseen | frames
    censored = missing if censored is None else censored | missing
    return x.masked_fill(unseen, 0), unseen, censored
