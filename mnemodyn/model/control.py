r"""The control: the derivative of the scan's own path.

At the frames of a regularly sampled scan without gaps, the derivative of the linear interpolant and that of the
Hermite cubic spline with backward differences are the same numbers, so no spline has to be fitted:

.. math:: \dot X(t_i) = (x_i - x_{i-1}) / \Delta t, \qquad \dot X(t_0) = \dot X(t_1).

Only a scan with censored frames needs the spline itself: its path goes through the frames that are left.
"""

import torch
from torch import Tensor

__all__ = ["bridge", "control"]


def control(x: Tensor, t_r: float | Tensor) -> Tensor:
    """Derivative of the path at every frame, (batch, time, parcel) in units of `x` per second.

    `x` is (batch, time >= 2, parcel), `t_r` in seconds, > 0, one number or one a scan; else ValueError.
    """
    if x.ndim != 3 or x.shape[1] < 2:
        raise ValueError(f"x must have shape (batch, time >= 2, parcel), got {tuple(x.shape)}")
    step = torch.as_tensor(t_r, dtype=x.dtype, device=x.device)
    if step.ndim and step.shape != x.shape[:1]:
        raise ValueError(
            f"t_r must be one number or one a scan ({len(x)}), got shape {tuple(step.shape)}"
        )
    if not bool((step > 0).all()):
        raise ValueError(f"t_r must be > 0 seconds, got {t_r}")
    difference = x.diff(dim=1) / step.view(-1, 1, 1)
    return torch.cat([difference[:, :1], difference], dim=1)


def bridge(x: Tensor, t_r: float | Tensor, censored: Tensor) -> tuple[Tensor, Tensor]:
    """Path and derivative of scans with censored frames, which have no influence on either.

    The path of such a scan is the Hermite cubic spline with backward differences through the frames that are left,
    at their true times. Before the first of them and after the last it stands still: a cubic must not be
    extrapolated. At frames that are left the derivative is the difference to the one left before, over the time
    between the two. Scans without censored frames go through the closed form of :func:`control`.

    Parameters
    ----------
    x : Tensor, shape (batch, time, parcel)
        Finite where it is not censored.
    t_r : float or Tensor of shape (batch,)
        Repetition time in seconds.
    censored : Tensor of bool, shape (batch, time)

    Returns
    -------
    x, derivative : Tensor, shape (batch, time, parcel)
        Censored frames replaced by the path; and its derivative, in units of `x` per second.

    Raises
    ------
    ValueError
        If a scan is left with fewer than two frames, or as :func:`control` raises.
    """
    # Here, not above: few scans have gaps, and the network must load without it.
    from torchcde import CubicSpline, hermite_cubic_coefficients_with_backward_differences

    values, derivatives = list(x), list(control(x, t_r))
    step = torch.as_tensor(t_r, dtype=x.dtype, device=x.device).expand(len(x))
    # In frames, not seconds: whole numbers stay exact in float32 however long the scan.
    time = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    for i in censored.any(1).nonzero()[:, 0].tolist():
        left = ~censored[i]
        knots = time[left]
        if len(knots) < 2:
            raise ValueError(
                f"scan {i} must keep at least two frames, got {len(knots)} of {len(time)}"
            )
        path = CubicSpline(
            hermite_cubic_coefficients_with_backward_differences(x[i, left], knots), knots
        )
        inside = time.clamp(knots[0], knots[-1])
        values[i] = torch.where(left[:, None], x[i], path.evaluate(inside))
        derivatives[i] = path.derivative(inside).masked_fill((time != inside)[:, None], 0) / step[i]
    return torch.stack(values), torch.stack(derivatives)
