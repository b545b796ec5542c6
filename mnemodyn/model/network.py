"""The stack of operator blocks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemodyn.model.config import ModelConfig
from mnemodyn.model.control import bridge
from mnemodyn.model.front import Front
from mnemodyn.model.operator import OperatorBlock
from mnemodyn.model.pretrained import Pretrained
from mnemodyn.model.reference import ReferenceBlock, prediction_head, read_settings, read_weights

__all__ = ["MnemoDyn", "Output"]


class Output(NamedTuple):
    """What a network returns.

    Attributes
    ----------
    reconstruction : Tensor, shape (batch, time, parcel)
        The scan as the network has it, hidden entries filled, in the units of its input.
    latents : Tensor, shape (batch, time, channel)
        The last block's path after its operators, before the read-out to parcels.
    multiresolution_loss : Tensor or None
        Sum over levels and blocks, where the configuration asks for it.
    prediction : Tensor, shape (batch, class), or None
        What the head of a network of the published draft says, where it has one.
    """

    reconstruction: Tensor
    latents: Tensor
    multiresolution_loss: Tensor | None
    prediction: Tensor | None = None


class MnemoDyn(nn.Module, Pretrained):
    r"""Wavelet operator driven by the scan's own path.

    The stream starts as the visible scan, zero where it is hidden. Each block reads the stream, its derivative per
    second and what was visible, and (``residual``) adds its output to the stream; the stream after the last block
    is the reconstruction. Source: Pal et al., ICLR 2026.

    With ``front="gaussian"`` the stream starts as the visible scan with hidden entries (and censored frames) at their
    conditional mean, which :meth:`fit_front` learns in closed form; visible entries are put back between blocks, and
    a fresh network is its front end alone. Where nothing is hidden, the front end does nothing.

    Notes
    -----
    **Other lengths.** A network takes any number of frames >= 2. Of its weights only the coarse operator's and the
    segments' belong to ``n_timepoints``: see :class:`~mnemodyn.model.operator.CoarseOperator` and
    :class:`~mnemodyn.model.operator.BandedOperator`. So the work grows linearly with T, and a long scan is treated as
    its windows are, but for what the transform carries across their edges.

    **Time.** The control is per second, so at shared instants the drive of one signal sampled at two repetition times
    differs only as their backward differences do, by at most half the difference of the steps times the signal's
    second derivative. Levels and kernels of the pyramid count frames: what they do is tied to the repetition time.

    **Reference.** With ``compat="reference"`` the network computes as the published draft does: ``n_timepoints``
    frames only, no repetition time (`t_r` may be left out and is not used), no censored frames.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.reference = config.compat == "reference"
        self.blocks = nn.ModuleList(
            ReferenceBlock(config, first=i == 0) if self.reference else OperatorBlock(config)
            for i in range(config.n_blocks)
        )
        front: dict = {
            "n_lags": config.front_lags,
            "shrinkage": config.front_shrinkage,
            "weight": config.front_weight,
        }
        front |= {"steps": config.front_steps, "n_modes": config.front_modes}
        self.front = None if config.front == "none" else Front(config.n_parcels, **front)
        self.head = prediction_head(config) if config.n_classes else None

    def fit_front(self, scans: Sequence[np.ndarray]) -> "MnemoDyn":
        """Fit the front end, where there is one, to scaled training scans (time, parcel), NaN in censored frames."""
        if self.front is not None:
            self.front.fit(scans)
        return self

    @classmethod
    def from_reference(cls, settings: Mapping, state_dict: Mapping[str, Tensor]) -> "MnemoDyn":
        """A network of the published draft, from its settings and weights under its own names; in evaluation mode.

        `settings` are ``D``, ``dim_k`` and so on; those that the draft stores without using are recognised. Weights are
        ``layers.0.input_projection.weight`` and so on, with or without the prefix ``model.``. ValueError if a setting
        is unknown, missing or contradictory, or weights do not fit: each with both shapes.
        """
        model = cls(read_settings(settings))
        model.load_state_dict(read_weights(model, state_dict))
        return model.eval()

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
            True where the value must not be read; whatever stands there (NaN too) has no influence.
        censored : Tensor of bool, shape (batch, time), optional
            True where a frame is missing (motion scrubbing, dropped volumes); it has no influence. The path goes
            through the other frames at their true times: see :func:`~mnemodyn.model.control.bridge`. A frame whose
            visible entries are all NaN is censored too.
        lengths : sequence of int or Tensor, shape (batch,), optional
            Frames of each scan, where scans were padded to one length. What follows them has no influence, and is
            zero in the result. Scans of one length are computed together, one pass for each distinct length. The
            multi-resolution loss is then the mean over scans.
        filled : Tensor, shape (batch, time, parcel), optional
            What the front end makes of `x`, where that is known already: training keeps it, for it does not change.

        Raises
        ------
        ValueError
            If shapes do not fit the configuration or each other, `t_r` is missing or not positive, a visible value
            is infinite, or is NaN in a frame that has others, fewer than two frames are left of a scan, or a network
            of the published draft is given another length than its own or censored frames.
        """
        if x.ndim != 3 or x.shape[-1] != self.config.n_parcels:
            raise ValueError(
                f"x must have shape (batch, time, {self.config.n_parcels} parcels), got {tuple(x.shape)}"
            )
        for name, mask, shape in (("hidden", hidden, x.shape), ("censored", censored, x.shape[:2])):
            if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
                found = f"{mask.dtype} {tuple(mask.shape)}"
                raise ValueError(
                    f"{name} must be bool with shape {tuple(shape)} as x has, got {found}"
                )
        if filled is not None and (
            self.front is None or filled.shape != x.shape or lengths is not None
        ):
            raise ValueError(
                "filled is for a network with a front end, of the shape of x and without lengths"
            )
        if lengths is not None:
            return self._by_length(x, t_r, hidden, censored, lengths)
        if t_r is None:
            if not self.reference:
                raise ValueError("t_r must be given, in seconds")
            t_r = 1.0
        if self.reference and x.shape[1] != self.config.n_timepoints:
            raise ValueError(
                f"x must have {self.config.n_timepoints} frames with compat='reference', got {x.shape[1]}: the draft's "
                "weights belong to one length"
            )
        x, unseen, censored = _seen(x, hidden, censored)
        visible = torch.ones_like(x) if unseen is None else (~unseen).to(x.dtype)
        given, derivative, put_back = x, None, unseen if self.front is not None else None
        if self.front is not None:
            if unseen is not None:
                x = self.front(x, unseen) if filled is None else filled
        elif censored is not None and bool(censored.any()):
            if self.reference:
                raise ValueError(
                    "censored frames are not known to the draft: compat='reference' takes none"
                )
            x, derivative = bridge(x, t_r, censored)
        total = x.new_zeros(()) if self.config.multiresolution else None
        latents = x
        for i, block in enumerate(self.blocks):
            if i and put_back is not None:
                x = torch.where(put_back, x, given)
            y, latents, loss = block(x, t_r, visible, derivative)
            derivative = None  # The path is whole from here on: each block's control comes from its own input.
            x = x + y if self.config.residual else y
            if total is not None:
                total = total + loss
        return Output(x, latents, total, None if self.head is None else self.head(x[:, -1]))

    def _by_length(self, x, t_r, hidden, censored, lengths) -> Output:
        lengths = torch.as_tensor(lengths, device=x.device)
        batch, time = x.shape[:2]
        whole = not (
            lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool
        )
        if (
            lengths.shape != (batch,)
            or not whole
            or not bool(((lengths >= 2) & (lengths <= time)).all())
        ):
            raise ValueError(
                f"lengths must be {batch} whole numbers from 2 to {time} frames, got {lengths.tolist()}"
            )
        step = (
            None
            if t_r is None
            else torch.as_tensor(t_r, dtype=x.dtype, device=x.device).expand(batch)
        )
        groups = [(int(n), (lengths == n).nonzero()[:, 0]) for n in lengths.unique()]
        outputs = []
        for n, rows in groups:
            masks = {
                k: None if m is None else m[rows, :n]
                for k, m in (("hidden", hidden), ("censored", censored))
            }
            outputs.append(self(x[rows, :n], None if step is None else step[rows], **masks))
        order = torch.cat([rows for _, rows in groups]).argsort()

        def padded(parts: Sequence[Tensor]) -> Tensor:
            longest = max(time, *(part.shape[1] for part in parts))
            return torch.cat([functional.pad(p, (0, 0, 0, longest - p.shape[1])) for p in parts])[
                order
            ]

        reconstructions, latents, losses, predictions = zip(*outputs, strict=True)
        loss = None
        if self.config.multiresolution:
            loss = (
                sum(one * len(rows) for one, (_, rows) in zip(losses, groups, strict=True)) / batch
            )
        prediction = None if self.head is None else torch.cat(predictions)[order]
        return Output(padded(reconstructions), padded(latents), loss, prediction)


def _seen(
    x: Tensor, hidden: Tensor | None, censored: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x with zeros where it is not seen, where that is, and the censored frames with those that are all NaN."""
    unseen = hidden
    if censored is not None:
        unseen = (
            censored[..., None].expand_as(x) if hidden is None else hidden | censored[..., None]
        )
    if unseen is not None:
        x = x.masked_fill(unseen, 0)
    if (
        torch.compiler.is_exporting()
    ):  # a program cannot branch on values: its input has to be finite
        return x, unseen, censored
    finite = x.isfinite()
    if bool(finite.all()):
        return x, unseen, censored
    nan = x.isnan()
    missing = nan.any(-1) & (nan if unseen is None else nan | unseen).all(-1)
    wrong = ~finite & ~missing[..., None]
    if bool(wrong.any()):
        scan, frame, parcel = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"x must be finite where it is not hidden or censored, got {x[scan, frame, parcel].item()} in scan {scan}, "
            f"frame {frame}, parcel {parcel}; a frame counts as censored only where all its visible entries are NaN"
        )
    unseen = missing[..., None].expand_as(x) if unseen is None else unseen | missing[..., None]
    return x.masked_fill(unseen, 0), unseen, missing if censored is None else censored | missing
