"""The read-outs, recomputed entry by entry."""

import numpy as np
import pytest
import pywt
import torch

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.model.network import MnemoDyn
from mnemodyn.readout import READOUTS, readouts
from mnemodyn.settings import ModelConfig

T_R = 2.0


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=5, n_timepoints=32, n_channels=6, input_width=4, field_rank=2, n_levels=2
    )
    return MnemoDyn(config).eval()


@pytest.fixture
def scans():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 100, 5)).cumsum(1).astype(np.float32)
    return [
        Scan(f"sub-{i}", v, T_R, tuple("abcde"), source=f"{i}.tsv") for i, v in enumerate(values)
    ]


def test_readouts_are_what_their_names_say(model, scans):
    x = Scaling()(scans[0])
    with torch.no_grad():
        output = model(torch.from_numpy(x[None]), T_R)
    z, y = (o[0].double().numpy() for o in (output.latents, output.reconstruction))
    levels = pywt.wavedec(z.T, "db2", mode="periodization", level=2)
    i, j = np.triu_indices(6, 1)
    expected = {
        "latent_mean": z.mean(0),
        "latent_sd": z.std(0, ddof=1),
        "latent_max": z.max(0),
        "scale_energy": np.concatenate([np.log((c**2).mean(-1)) for c in levels]),
        "latent_correlation": np.arctanh(np.corrcoef(z.T)[i, j]),
        "response": np.arctanh(np.corrcoef(y.T)[np.triu_indices(y.shape[1], 1)]),
        "last_frame": y[-1],
    }
    assert set(expected) == set(READOUTS)
    for name, value in expected.items():
        found = readouts(model, x, T_R, (name,))[name]
        np.testing.assert_allclose(found, value, atol=1e-6, err_msg=name)


def test_an_unknown_readout_is_refused(model, scans):
    with pytest.raises(ValueError, match=r"read-out must be one of .*latent_mean.*got 'last'"):
        readouts(model, scans[0].values, T_R, ("last",))
