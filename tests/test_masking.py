"""Masks hide exactly what they say, where they say, and nothing else enters the loss."""

import pytest
import torch

from mnemodyn.model.network import Output
from mnemodyn.pretrain.objectives import Masked, hide_stretches


def make(shape=(3, 240, 20), share=0.55, window=15, seed=0):
    return hide_stretches(
        shape, share=share, window=window, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.9])
@pytest.mark.parametrize(("time", "window"), [(240, 15), (61, 7), (112, 5), (20, 50), (240, 1)])
def test_hidden_share_is_exact_in_every_parcel(time, window, share):
    mask = make((2, time, 9), share, window)
    assert mask.shape == (2, time, 9)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == round(share * time)).all()


def test_windows_have_their_length():
    # 3 windows of 10 in 1000 frames rarely touch; every run is then 10 frames long.
    mask = make((1, 1000, 50), 0.03, 10)[0].T.int()
    for row in mask:
        row = row.roll(-int(row.argmin()))  # begin where nothing is hidden
        edges = torch.diff(row, prepend=torch.zeros(1), append=torch.zeros(1))
        runs = (edges == -1).nonzero() - (edges == 1).nonzero()
        assert runs.sum() == 30
        assert (runs % 10 == 0).all()


def test_every_frame_is_as_likely():
    share = make((400, 60, 50), 0.5, 6).float().mean((0, 2))
    assert (share - 0.5).abs().max() < 0.02  # SE 0.0035


def test_seeded_and_different_by_parcel_and_scan():
    assert torch.equal(make(seed=1), make(seed=1))
    mask = make(seed=1)
    assert not torch.equal(mask, make(seed=2))
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask[..., 0], mask[..., 1])


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1, 0.001])
def test_refuses_a_share_that_hides_nothing_or_all(share):
    with pytest.raises(ValueError, match="share must hide between 1 and 239 of 240 frames"):
        make(share=share)


def test_loss_counts_hidden_entries_only():
    objective = Masked(hidden_share=0.5, mask_window=4)
    x = torch.randn(2, 40, 3)
    hidden = objective.hide(tuple(x.shape), seed=3)

    def loss(reconstruction, levels=None):
        batch = {"x": x, "hidden": hidden, "t_r": torch.ones(2)}
        output = Output(reconstruction, x, levels)
        terms = objective.loss(lambda *_, **__: output, batch, torch.nn.ModuleDict())
        return sum(total / count for total, count in terms.values())

    good = torch.where(hidden, x, x + 1e6)
    assert loss(good) == 0
    off = torch.where(hidden, x + 2.0, x)
    assert loss(off).item() == pytest.approx(4.0, rel=1e-5)
    assert loss(good, torch.tensor(3.0)).item() == 3.0


def test_training_shares_spread_and_validation_does_not():
    objective = Masked(hidden_share=0.5, mask_window=4, share_spread=0.3)
    shares = {int(objective.hide((1, 40, 1), seed, training=True).sum()) for seed in range(200)}
    assert min(shares) == 8
    assert max(shares) == 32
    assert {int(objective.hide((1, 40, 1), seed).sum()) for seed in range(9)} == {20}
    with pytest.raises(ValueError, match=r"got 0\.5 and 0\.5"):
        Masked(hidden_share=0.5, share_spread=0.5)
