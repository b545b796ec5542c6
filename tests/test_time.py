"""Time in seconds, frames that are missing, scans padded to one length, and scans far longer than a window."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchcde
from torch.utils.flop_counter import FlopCounterMode

from mnemodyn.model.control import path_derivative, path_through_gaps
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig

HERTZ = 0.03


def network(**settings) -> MnemoDyn:
    """Every parameter random: fresh ones hide mistakes behind zeros and identities."""
    small = {
        "n_parcels": 4,
        "n_timepoints": 32,
        "n_channels": 3,
        "input_width": 4,
        "field_rank": 2,
        "n_levels": 3,
    }
    net = MnemoDyn(ModelConfig(**{**small, "kernel_size": 3, "n_segments": 2, **settings}))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return net.double().eval()


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sine(t_r: float, seconds: float = 96.0) -> torch.Tensor:
    """One scan of four parcels, a slow sine with a phase each."""
    t = t_r * torch.arange(round(seconds / t_r), dtype=torch.float64)
    return torch.sin(2 * math.pi * HERTZ * t[:, None] + torch.arange(4.0))[None]


# Time in seconds


@pytest.mark.parametrize("t_r", [0.5, 0.72, 2.0])
def test_control_is_the_derivative_per_second(t_r):
    t = t_r * torch.arange(sine(t_r).shape[1], dtype=torch.float64)
    omega = 2 * math.pi * HERTZ
    slope = omega * torch.cos(omega * t[:, None] + torch.arange(4.0))
    # A backward difference is off by at most half a step times the largest second derivative; the first frame repeats
    # the second, so that it is off by a whole step more.
    away = (path_derivative(sine(t_r), t_r)[0] - slope).abs().amax(1)
    assert away[1:].max() <= t_r / 2 * omega**2
    assert away[0] <= t_r * 1.5 * omega**2


def test_one_signal_at_two_repetition_times_gives_one_drive():
    field = network().blocks[0].field
    drives = {
        t_r: field(sine(t_r), path_derivative(sine(t_r), t_r)) for t_r in (0.25, 0.5, 1.0, 2.0)
    }
    shared = {t_r: v[0, :: round(2 / t_r)][1:] for t_r, v in drives.items()}
    size = shared[0.25].abs().max()
    away = {
        t_r: ((shared[t_r] - shared[0.25]).abs().max() / size).item() for t_r in (0.5, 1.0, 2.0)
    }
    # Differences shrink in proportion to the steps apart: 0.25, 0.75 and 1.75 s.
    assert away[0.5] < 0.05
    assert away[1.0] / away[0.5] == pytest.approx(3, rel=0.2)
    assert away[2.0] / away[0.5] == pytest.approx(7, rel=0.2)
    # Frames taken for seconds would change the drive by their ratio.
    wrong = field(sine(0.5), path_derivative(sine(0.5), 1.0))
    torch.testing.assert_close(2 * wrong, drives[0.5])


def test_repetition_time_must_be_given():
    with pytest.raises(ValueError, match="t_r must be given, in seconds"):
        network()(random(1, 32, 4))


# Censored frames

GAPS = [[5], [5, 6, 7, 20], list(range(1, 32, 2)), [0, 1, 9], [9, 30, 31]]


def censor(frames: list[int], n: int = 32) -> torch.Tensor:
    return torch.isin(torch.arange(n), torch.tensor(frames))


@pytest.mark.parametrize("gaps", GAPS)
def test_the_path_through_gaps_is_torchcdes_through_the_frames_left(gaps):
    x, t_r = random(1, 32, 4), 0.72
    t, censored = t_r * torch.arange(32, dtype=torch.float64), censor(gaps)
    left = ~censored
    coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(
        x[:, left], t[left]
    )
    path = torchcde.CubicSpline(coefficients, t[left])
    values, derivative = path_through_gaps(
        x.masked_fill(censored[:, None], torch.nan), t_r, censored[None]
    )
    inside = ((t >= t[left][0]) & (t <= t[left][-1])).nonzero()[:, 0].tolist()
    for i in inside:
        torch.testing.assert_close(values[:, i], path.evaluate(t[i]))
        torch.testing.assert_close(derivative[:, i], path.derivative(t[i]))
    assert torch.equal(values[:, left], x[:, left])
    # Outside the frames left the path stands still.
    for i in sorted(set(range(32)) - set(inside)):
        end = left.nonzero()[0 if i < inside[0] else -1, 0]
        torch.testing.assert_close(values[:, i], x[:, end])
        assert not derivative[:, i].any()


def test_a_path_without_gaps_is_the_closed_form():
    x, t_r = random(2, 32, 4), torch.tensor([0.72, 2.0])
    values, derivative = path_through_gaps(x, t_r, torch.zeros(2, 32, dtype=torch.bool))
    assert torch.equal(values, x)
    assert torch.equal(derivative, path_derivative(x, t_r))
    # One scan with gaps leaves the other as it was.
    values, derivative = path_through_gaps(x, t_r, torch.stack([censor([]), censor([4, 5])]))
    assert torch.equal(derivative[0], path_derivative(x, t_r)[0])
    alone = path_through_gaps(x[1:], 2.0, censor([4, 5])[None])
    torch.testing.assert_close((values[1:], derivative[1:]), alone)


def test_long_scans_keep_their_times_in_float32():
    x, censored = (
        random(1, 5000, 1).cumsum(1),
        torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)) < 0.2,
    )
    exact = path_through_gaps(x, 0.72, censored)
    for got, expected in zip(path_through_gaps(x.float(), 0.72, censored), exact, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_censored_frames_have_no_influence():
    net, x, censored = network(), random(2, 32, 4), torch.stack([censor([]), censor([7, 8, 20])])
    expected = net(x, 0.72, censored=censored)
    for fill in (torch.nan, torch.inf, 1e6):
        got = net(x.masked_fill(censored[..., None], fill), 0.72, censored=censored)
        assert torch.equal(got.reconstruction, expected.reconstruction)
    assert torch.equal(expected.reconstruction[0], net(x, 0.72).reconstruction[0])
    assert not torch.equal(expected.reconstruction[1], net(x, 0.72).reconstruction[1])
    # Frames that are NaN as a whole are censored without being named, hidden entries in them or not.
    missing = x.masked_fill(censored[..., None], torch.nan)
    assert torch.equal(net(missing, 0.72).reconstruction, expected.reconstruction)
    hidden = torch.zeros(x.shape, dtype=torch.bool)
    hidden[1, 7, :2] = True
    got = net(missing.masked_fill(hidden, 3.0), 0.72, hidden=hidden).reconstruction
    assert torch.equal(got, net(x, 0.72, hidden=hidden, censored=censored).reconstruction)


def test_the_first_block_reads_the_path_through_gaps():
    """The equations once more: the stream starts as the path, seen where frames are left."""
    net, x, censored = network(n_blocks=1), random(1, 32, 4), censor([7, 8, 20])[None]
    path, derivative = path_through_gaps(x, 0.72, censored)
    visible = (~censored[..., None]).expand_as(x).to(x.dtype)
    y, _, _ = net.blocks[0](path, 0.72, visible, derivative)
    torch.testing.assert_close(net(x, 0.72, censored=censored).reconstruction, path + y)


def test_gradients_pass_a_gap():
    net, x = network(), random(1, 32, 4).requires_grad_()
    x.data[0, 5] = torch.nan
    net(x, 0.72).reconstruction.square().sum().backward()
    assert not x.grad[0, 5].any()
    assert torch.isfinite(x.grad).all()
    assert x.grad[0, 4].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_hole_in_a_frame_is_refused(bad):
    x = random(2, 32, 4)
    x[1, 7, 2] = bad
    with pytest.raises(ValueError, match=f"got {bad} in scan 1, frame 7, parcel 2"):
        network()(x, 0.72)
    x[1, 7] = torch.inf
    with pytest.raises(ValueError, match="got inf in scan 1, frame 7, parcel 0"):
        network()(x, 0.72)


def test_censored_refuses():
    x = random(2, 32, 4)
    with pytest.raises(ValueError, match=r"censored must be bool with shape \(2, 32\)"):
        network()(x, 0.72, censored=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="scan 1 must keep at least two frames, got 1 of 32"):
        network()(x, 0.72, censored=torch.stack([censor([]), censor(list(range(31)))]))


def test_torchcde_is_imported_for_gaps_only():
    code = (
        "import sys, torch; from mnemodyn import MnemoDyn, ModelConfig;"
        "net = MnemoDyn(ModelConfig(n_parcels=2, n_timepoints=16)); x = torch.zeros(1, 16, 2);"
        "net(x, 1.0, censored=torch.zeros(1, 16, dtype=torch.bool)); assert 'torchcde' not in sys.modules;"
        "net(x, 1.0, censored=torch.arange(16)[None] == 3); assert 'torchcde' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


# Padding


def test_padding_changes_nothing():
    net, lengths, t_r = (
        network(multiresolution=True),
        [20, 48, 20, 33, 2],
        torch.tensor([0.72, 1.0, 2.0, 0.8, 3.0]),
    )
    x, hidden = random(5, 48, 4), random(5, 48, 4, seed=1) > 1
    censored = torch.zeros(5, 48, dtype=torch.bool)
    censored[0, 3] = censored[3, 30:] = True
    padded = x.clone()
    for i, n in enumerate(lengths):
        padded[i, n:] = torch.nan
    got = net(padded, t_r, hidden=hidden, censored=censored, lengths=lengths)
    assert got.reconstruction.shape == x.shape
    losses = []
    for i, n in enumerate(lengths):
        own = slice(i, i + 1)
        alone = net(x[own, :n], t_r[own], hidden=hidden[own, :n], censored=censored[own, :n])
        torch.testing.assert_close(got.reconstruction[own, :n], alone.reconstruction)
        torch.testing.assert_close(got.latents[own, :n], alone.latents)
        assert not got.reconstruction[i, n:].any()
        assert not got.latents[i, n:].any()
        losses.append(alone.multiresolution_loss)
    torch.testing.assert_close(got.multiresolution_loss, torch.stack(losses).mean())
    # One repetition time for all is no rounder for having been given with lengths.
    assert torch.equal(net(x, 0.72, lengths=[48] * 5).reconstruction, net(x, 0.72).reconstruction)


def test_gradients_do_not_reach_padding():
    net, x = network(), random(2, 40, 4).requires_grad_()
    net(x, 0.72, lengths=torch.tensor([40, 25])).reconstruction.square().sum().backward()
    assert x.grad[1, :25].any()
    assert not x.grad[1, 25:].any()


@pytest.mark.parametrize("lengths", [[10, 49], [10, 1], [10], [10.0, 20.0], [True, True]])
def test_lengths_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be 2 whole numbers from 2 to 48 frames"):
        network()(random(2, 48, 4), 0.72, lengths=lengths)


# Long scans


def test_one_set_of_weights_from_two_minutes_to_five_thousand_frames():
    net = network(n_timepoints=160)
    for n, t_r in ((2, 2.0), (60, 2.0), (167, 0.72), (490, 0.735), (5000, 0.72)):
        output = net(random(1, n, 4).cumsum(1) / n**0.5, t_r).reconstruction
        assert output.shape == (1, n, 4)
        assert torch.isfinite(output).all()
    with pytest.raises(ValueError, match="time >= 2"):
        net(random(1, 1, 4), 2.0)


def test_work_grows_linearly_with_the_scan():
    net = network(n_timepoints=160, n_channels=8)

    def operations(n):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(random(1, n, 4), 0.72)
        return counter.get_total_flops()

    once = operations(320)
    assert once > 0
    assert operations(5120) == pytest.approx(16 * once, rel=0.02)
