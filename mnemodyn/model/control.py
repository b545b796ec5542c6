r"""The control: the derivative of the scan's own path.

At the frames of a regularly sampled scan without gaps, the linear interpolant and the Hermite cubic spline with
backward differences have the same derivative, so that no spline has to be fitted:

.. math:: \dot X(t_i) = (x_i - x_{i-1}) / \Delta t, \qquad \dot X(t_0) = \dot X(t_1).

Only a scan with censored frames needs the spline itself: its path goes through the frames that are left.
"""

import torch
from torch import Tensor

__all__ = ["path_derivative", "path_through_gaps"]


def path_derivative(x: Tensor, t_r: float | Tensor) -> Tensor:
    """Derivative of the path at every frame, (batch, time, parcel), in units of `x` per second.

    `x` is (batch, time >= 2, parcel); `t_r` is in seconds, > 0, one number or one a scan. ValueError otherwise.
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
    # The first frame has none before it and repeats the derivative of the second.
    difference = x.diff(dim=1) / step.view(-1, 1, 1)
    return torch.cat([difference[:, :1], difference], dim=1)


def path_through_gaps(x: Tensor, t_r: float | Tensor, censored: Tensor) -> tuple[Tensor, Tensor]:
    """Path and derivative of scans with censored frames, whose values are not read.

    The path is the Hermite cubic spline with backward differences through the frames that are left, at their true
    times. A cubic must not be extrapolated, so the path is constant before the first of them and after the last. At a
    frame that is left, the derivative is the difference from the previous one left, over the time between the two. A
    scan without censored frames has the derivative of :func:`path_derivative`.

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
        The path, and its derivative in units of `x` per second.

    Raises
    ------
    ValueError
        If a scan is left with fewer than two frames, or as :func:`path_derivative` raises.
    """
    # Imported here, because few scans have gaps and the import takes a second.
    from torchcde import CubicSpline, hermite_cubic_coefficients_with_backward_differences

    values = list(x)
    derivatives = list(path_derivative(x, t_r))
    step = torch.as_tensor(t_r, dtype=x.dtype, device=x.device).expand(len(x))
    # Times are counted in frames: whole numbers are exact in float32, seconds of a long scan are not.
    time = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    for i in censored.any(1).nonzero()[:, 0].tolist():
        left = ~censored[i]
        knots = time[left]
        if len(knots) < 2:
            raise ValueError(
                f"scan {i} must keep at least two frames, got {len(knots)} of {len(time)}"
            )
        coefficients = hermite_cubic_coefficients_with_backward_differences(x[i, left], knots)
        path = CubicSpline(coefficients, knots)
        # The path is constant outside the frames left, and its derivative zero.
        inside = time.clamp(knots[0], knots[-1])
        outside = (time != inside)[:, None]
        values[i] = torch.where(left[:, None], x[i], path.evaluate(inside))
        derivatives[i] = path.derivative(inside).masked_fill(outside, 0) / step[i]
    return torch.stack(values), torch.stack(derivatives)
