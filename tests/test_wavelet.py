"""The transform against PyWavelets, its own inverse, and numerical gradients."""

import numpy as np
import pytest
import pywt
import torch

from mnemodyn.model.wavelet import DB2, dwt, idwt, lattice, level_lengths, wavedec


def waverec(coefficients, wavelet, length):
    """The signal of `length` samples, level by level."""
    x, details = coefficients[0], coefficients[1:]
    for j, detail in enumerate(details, 1):
        x = idwt(x, detail, wavelet, level_lengths(length, len(details) - j)[-1])
    return x


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-1}


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 61, 64, 175, 490, 1200])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4", "sym5", "coif1", "db10"])
def test_equals_pywt_and_inverts(wavelet, length, dtype):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, 3, length, generator=generator, dtype=dtype)
    for n_levels in (1, 3, 5):
        ours = wavedec(x, wavelet, n_levels)
        oracle = pywt.wavedec(
            x.double().numpy(), wavelet, mode="periodization", level=n_levels, axis=-1
        )
        assert len(ours) == len(oracle)
        for a, b in zip(ours, oracle, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a.double(), b, atol=TOLERANCE[dtype])
        back = waverec(ours, wavelet, length)
        torch.testing.assert_close(back, x, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(
    "wavelet", [w for w in pywt.wavelist(kind="discrete") if w[:2] in ("db", "sy", "co")][::4]
)
def test_inverse_equals_pywt_for_any_coefficients(wavelet):
    rng = np.random.default_rng(0)
    a, d = rng.standard_normal((2, 2, 3, 11))
    ours = idwt(torch.from_numpy(a), torch.from_numpy(d), wavelet)
    np.testing.assert_allclose(ours, pywt.idwt(a, d, wavelet, mode="periodization"), atol=1e-8)


@pytest.mark.parametrize("length", [9, 16])
def test_gradients(length):
    x = torch.randn(1, 2, length, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: tuple(wavedec(v, "db2", 2)), (x,))
    coefficients = [c.detach().requires_grad_() for c in wavedec(x, "db2", 2)]
    assert torch.autograd.gradcheck(lambda *c: waverec(list(c), "db2", length), tuple(coefficients))


def test_energy_is_kept():
    x = torch.randn(4, 3, 64, dtype=torch.float64)
    energy = sum(c.square().sum() for c in wavedec(x, "sym4", 4))
    torch.testing.assert_close(energy, x.square().sum())


def test_low_precision_stays_in_its_dtype():
    x = torch.randn(2, 2, 33, dtype=torch.bfloat16)
    back = waverec(wavedec(x, "db2", 2), "db2", 33)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back, x, atol=TOLERANCE[torch.bfloat16], rtol=0)


@pytest.mark.parametrize("length", [33, 64, 175])
def test_a_learned_wavelet_starts_as_db2(length):
    h = lattice(torch.tensor(DB2, dtype=torch.float64))
    np.testing.assert_allclose(h, [0, 0, *pywt.Wavelet("db2").dec_lo, 0, 0], atol=1e-12)
    x = torch.randn(2, 3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ours, oracle in zip(
        wavedec(x, h, 2),
        pywt.wavedec(x.numpy(), "db2", mode="periodization", level=2, axis=-1),
        strict=True,
    ):
        np.testing.assert_allclose(ours, oracle, atol=1e-12)


@pytest.mark.parametrize("n_angles", [1, 2, 3, 4])
def test_any_angles_make_an_orthogonal_wavelet(n_angles):
    generator = torch.Generator().manual_seed(n_angles)
    angles = (6 * torch.rand(n_angles, generator=generator, dtype=torch.float64)).requires_grad_()
    h = lattice(angles)
    x = torch.randn(1, 2, 33, generator=generator, dtype=torch.float64)
    back = h.detach().numpy()[::-1]
    wavelet = pywt.Wavelet("learned", [back[::-1], pywt.qmf(back)[::-1], back, pywt.qmf(back)])
    for ours, oracle in zip(
        dwt(x, h), pywt.dwt(x.numpy(), wavelet, mode="periodization"), strict=True
    ):
        np.testing.assert_allclose(ours.detach(), oracle, atol=1e-12)
    torch.testing.assert_close(waverec(wavedec(x, h, 3), h, 33), x)
    torch.testing.assert_close(
        sum(c.square().sum() for c in wavedec(x[..., :32], h, 3)), x[..., :32].square().sum()
    )
    assert torch.autograd.gradcheck(
        lambda a, x: tuple(wavedec(x, lattice(a), 2)), (angles, x.requires_grad_())
    )
    assert torch.autograd.gradcheck(
        lambda a: waverec(wavedec(x.detach(), "haar", 2), lattice(a), 33), (angles,)
    )


def test_level_lengths():
    assert level_lengths(61, 3) == [61, 31, 16, 8]


@pytest.mark.parametrize("wavelet", ["bior2.2", "dmey", "nonsense"])
def test_refuses_a_wavelet_that_is_not_orthogonal(wavelet):
    with pytest.raises(ValueError, match=f"wavelet must .*{wavelet}"):
        dwt(torch.zeros(1, 1, 8), wavelet)


def test_refuses_bad_shapes():
    with pytest.raises(ValueError, match=r"batch, channel, time"):
        dwt(torch.zeros(3, 8), "db2")
    with pytest.raises(ValueError, match="floating"):
        dwt(torch.zeros(1, 1, 8, dtype=torch.int64), "db2")
