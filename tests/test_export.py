"""A network as a program: the same numbers without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from mnemodyn import Checkpoint, MnemoDyn, ModelConfig, Scaling, load_checkpoint, save_checkpoint
from mnemodyn.cli import main

ALONE = """
import sys, torch
x = torch.load("x.pt")
program = torch.export.load("network.pt2").module()
torch.save(program(x), "y.pt")
assert "mnemodyn" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=5,
        n_timepoints=17,
        n_channels=3,
        input_width=3,
        field_rank=2,
        n_levels=1,
        n_blocks=1,
    )
    parcels = tuple("abcde")
    checkpoint = Checkpoint(MnemoDyn(config).eval(), parcels, 0.8, Scaling(), None, {})
    return save_checkpoint(tmp_path_factory.mktemp("model"), checkpoint)


def outputs(folder, x):
    with torch.no_grad():
        output = load_checkpoint(folder).model(x, 0.8)
    return output.reconstruction, output.latents


def test_torch_export_runs_without_the_package(folder, tmp_path):
    assert main(["export", str(folder), str(tmp_path / "network.pt2")]) == 0
    x = torch.randn(3, 17, 5)
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True, timeout=120)
    for got, wanted in zip(torch.load(tmp_path / "y.pt"), outputs(folder, x), strict=True):
        assert (got - wanted).abs().max() < 1e-5
    beside = json.loads((tmp_path / "network.pt2.json").read_text())
    assert beside["parcels"] == list("abcde")
    assert beside["output"]["latents"] == ["batch", 17, outputs(folder, x)[1].shape[-1]]


def test_onnx(folder, tmp_path):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    assert main(["export", str(folder), str(tmp_path / "network.onnx"), "--frames", "20"]) == 0
    x = torch.randn(3, 20, 5)
    found = ReferenceEvaluator(str(tmp_path / "network.onnx")).run(None, {"x": x.numpy()})
    for got, wanted in zip(found, outputs(folder, x), strict=True):
        assert np.abs(got - wanted.numpy()).max() < 1e-5


def test_another_ending_is_refused(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "network.pth")]) == 1
    assert "path must end in .pt2 or .onnx, got 'network.pth'" in capsys.readouterr().err
