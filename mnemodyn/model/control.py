r"""The control: the derivative of the scan's own path.

At the frames of a regularly sampled scan without gaps, the derivative of the linear interpolant and that of the
Hermite cubic spline with backward differences are the same numbers, so no spline has to be fitted:

.. math:: \dot X(t_i) = (x_i - x_{i-1}) / \Delta t, \qquad \dot X(t_0) = \dot X(t_1).
"""

import torch
from torch import Tensor

__all__ = ["control"]


def control(x: Tensor, t_r: float | Tensor) -> Tensor:
    """Derivative of the path at every frame, in closed form.

    Parameters
    ----------
    x : Tensor, shape (batch, time, parcel)
    t_r : float or Tensor of shape (batch,)
        Repetition time in seconds.

    Returns
    -------
    Tensor, shape (batch, time, parcel)
        In units of `x` per second; the first frame repeats the second.

    Raises
    ------
    ValueError
        If a scan has fewer than two frames or `t_r` is not positive.
    """
    if x.ndim != 3 or x.shape[1] < 2:
        raise ValueError(f"x must have shape (batch, time >= 2, parcel), got {tuple(x.shape)}")
    step = torch.as_tensor(t_r, dtype=x.dtype, device=x.device)
    if step.ndim > 1 or (step.ndim == 1 and len(step) != len(x)):
        raise ValueError(f"t_r must be one number or one a scan ({len(x)}), got shape {tuple(step.shape)}")
    if not bool((step > 0).all()):
        raise ValueError(f"t_r must be > 0 seconds, got {t_r}")
    difference = x.diff(dim=1) / step.view(-1, 1, 1)
    return torch.cat([difference[:, :1], difference], dim=1)
