"""A checkpoint comes back whole, and refuses what does not fit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mnemodyn import load_checkpoint, save_checkpoint
from mnemodyn.checkpoint import Checkpoint, CheckpointError, describe
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.files import sha256
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn

PARCELS = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = MnemoDyn(
        ModelConfig(n_parcels=3, n_timepoints=16, n_blocks=1, n_channels=4, n_levels=2)
    )
    scaling = Scaling("subtract_mean_global_sd", 2.5)
    save_checkpoint(
        tmp_path / "best", Checkpoint(model, PARCELS, 0.72, scaling, "f" * 64, {"epochs": 3})
    )
    return tmp_path / "best"


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_comes_back_whole(folder):
    a = load_checkpoint(folder)
    b = load_checkpoint(save_checkpoint(folder.parent / "copy", a))
    x = torch.randn(2, 16, 3)
    assert torch.equal(a.model(x, 0.72).reconstruction, b.model(x, 0.72).reconstruction)
    assert (b.parcels, b.t_r, b.scaling.sd, b.data_fingerprint) == (PARCELS, 0.72, 2.5, "f" * 64)
    assert b.training == {"epochs": 3}
    assert not b.model.training
    assert describe(folder)["model"]["n_channels"] == 4
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_refuses_damage(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: its SHA-256"):
        load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"is no checkpoint: model\.safetensors is missing"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"is no checkpoint: config\.json is missing"):
        load_checkpoint(folder.parent)


def test_refuses_truncated_weights_even_with_their_checksum(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    rewrite(folder, weights_sha256=sha256(weights))
    with pytest.raises(CheckpointError, match="do not make a checkpoint"):
        load_checkpoint(folder)


def test_refuses_damaged_or_foreign_json(folder):
    rewrite(folder, format=99)
    with pytest.raises(CheckpointError, match="format must be 1, got 99"):
        load_checkpoint(folder)
    (folder / "config.json").write_text('{"format": ')
    with pytest.raises(CheckpointError, match="damaged, not a checkpoint's JSON"):
        load_checkpoint(folder)


def test_refuses_an_unknown_setting(folder):
    model = {**describe(folder)["model"], "n_heads": 8}
    rewrite(folder, model=model)
    with pytest.raises(CheckpointError, match=r"n_heads is not a setting"):
        load_checkpoint(folder)


def test_only_reference_networks_may_lack_parcels(folder):
    rewrite(folder, parcels=None)
    with pytest.raises(CheckpointError, match="names no parcels"):
        load_checkpoint(folder)


def test_lists_weights_that_do_not_fit(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["blocks.0.output.bias"] = torch.zeros(7)
    del weights["blocks.0.lift.bias"]
    save_file(weights, path)
    rewrite(folder, weights_sha256=sha256(path))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    assert "blocks.0.lift.bias: missing" in str(error.value)
    assert "blocks.0.output.bias: expected (3,), got (7,)" in str(error.value)


def test_refuses_other_parcels_or_another_order(folder):
    checkpoint = load_checkpoint(folder)

    def scan(parcels):
        values = np.random.default_rng(0).standard_normal((20, len(parcels))).astype(np.float32)
        return Scan("sub-1", values, 0.72, parcels, source="scan.tsv")

    checkpoint.check(scan(PARCELS))
    with pytest.raises(
        CheckpointError, match=r"scan\.tsv: the checkpoint expects 3 parcels, got 2"
    ):
        checkpoint.check(scan(("a", "b")))
    with pytest.raises(
        CheckpointError, match="in another order .* column 0 should be 'a', got 'b'"
    ):
        checkpoint.check(scan(("b", "a", "c")))
    with pytest.raises(CheckpointError, match="others .* column 2 should be 'c', got 'd'"):
        checkpoint.check(scan(("a", "b", "d")))
