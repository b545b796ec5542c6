"""The real Brainmarks, on SIMULATED data in its own format; `BRAINMARKS_PYTHON` is an interpreter that has it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mnemodyn import Checkpoint, MnemoDyn, ModelConfig, Scaling, save_checkpoint

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("BRAINMARKS_PYTHON", sys.executable)
WRITE = """
import datasets, numpy, sys
for split, n in {"train": 48, "validation": 16, "test": 16}.items():
    with numpy.load(f"{split}.npz") as kept:
        columns = {name: list(kept[name]) for name in kept.files}
    datasets.Dataset.from_dict(columns).save_to_disk(f"adhd200.schaefer400.arrow/{split}")
"""


def command(arguments, folder, **more):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), "ADHD200_ROOT": str(folder)}
    return subprocess.run(
        [PYTHON, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_main_logistic(tmp_path):
    if command(["-c", "import brainmarks.main_logistic"], tmp_path).returncode:
        pytest.skip(
            "Brainmarks is not installed; name an interpreter that has it in BRAINMARKS_PYTHON"
        )
    torch.manual_seed(0)
    config = ModelConfig(
        n_parcels=400, n_timepoints=32, n_channels=8, input_width=8, field_rank=2, n_levels=2
    )
    parcels = tuple(f"p{i}" for i in range(400))
    save_checkpoint(
        tmp_path / "model", Checkpoint(MnemoDyn(config), parcels, 2.0, Scaling(), None, {})
    )
    # Two groups that differ in how slow their signals are.
    rng = np.random.default_rng(0)
    for split, n in {"train": 48, "validation": 16, "test": 16}.items():
        dx = np.arange(n) % 2
        x = rng.standard_normal((n, 40, 400))
        x[dx == 1, 1:] += 0.9 * x[dx == 1, :-1]
        mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True)
        x = ((x - mean) / std).astype(np.float32)
        moments = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
        np.savez(
            tmp_path / f"{split}.npz", bold=x, **moments, tr=np.full(n, 2.0, np.float32), dx=dx
        )
    written = command(["-c", WRITE], tmp_path)
    assert written.returncode == 0, written.stderr
    settings = ["device=cpu", "num_workers=1", "n_trials=0", "cv_folds=2", "Cs=3"]
    done = command(
        [
            "-m",
            "brainmarks.main_logistic",
            "mnemodyn",
            "patch",
            "adhd200_dx",
            "--overrides",
            *settings,
        ],
        tmp_path,
        MNEMODYN_CHECKPOINT=str(tmp_path / "model"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(
        tmp_path / "output/eval_logistic/adhd200_dx__mnemodyn__patch__logistic/eval_table.csv"
    )
    assert set(table["split"]) == {"train", "test"}
    assert (table["model"] == "mnemodyn").all()
    assert (table["acc"] > 0.6).all(), "two groups that differ in their spectra are told apart"
