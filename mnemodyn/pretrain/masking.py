"""What is hidden from the network: seeded masks whose hidden share is known exactly."""

import torch
from torch import Tensor

__all__ = ["hide_stretches"]


def hide_stretches(
    shape: tuple[int, int, int], *, share: float, window: int, generator: torch.Generator
) -> Tensor:
    """Hide stretches of time, in every parcel its own.

    In each parcel of each scan ``round(share * time)`` frames are hidden, no more and no fewer: whole windows of
    `window` frames and one shorter one for the rest, in random order and without overlap. Two windows may touch, and
    one may leave the scan at its end and go on at its start: every frame is as likely to be hidden as any other.

    True where hidden, of the `shape` (batch, time, parcel). ValueError if `share` hides no frame or all of them, or
    `window` is < 1.
    """
    batch, time, parcel = shape
    hidden = round(share * time)
    if not 0 < hidden < time:
        raise ValueError(
            f"share must hide between 1 and {time - 1} of {time} frames, got {share} ({hidden} frames)"
        )
    if window < 1:
        raise ValueError(f"window must be >= 1 frame, got {window}")
    n_windows = -(-hidden // window)
    # A row of tokens: the visible frames and the windows. Which tokens are windows is a random draw.
    n_tokens = time - hidden + n_windows
    rows = (batch, parcel)
    tokens = torch.rand(*rows, n_tokens, generator=generator).argsort(-1)[..., :n_windows]
    tokens = tokens.sort(-1).values
    lengths = torch.full((*rows, n_windows), window)
    lengths[..., 0] = hidden - window * (n_windows - 1)
    order = torch.rand(*rows, n_windows, generator=generator).argsort(-1)
    lengths = lengths.gather(-1, order)
    # Before the i-th window stand (its token - i) visible frames and the windows before it.
    start = tokens - torch.arange(n_windows) + lengths.cumsum(-1) - lengths
    edges = torch.zeros(*rows, time + 1, dtype=torch.int32)
    one = torch.ones_like(start, dtype=torch.int32)
    edges.scatter_add_(-1, start, one)
    edges.scatter_add_(-1, start + lengths, -one)
    mask = edges.cumsum(-1)[..., :time] > 0
    # Few placements reach the first and the last frames; turned by a random offset, all are hidden equally often.
    offset = torch.randint(time, (*rows, 1), generator=generator)
    mask = mask.gather(-1, (torch.arange(time) + offset) % time)
    return mask.transpose(1, 2).contiguous()
