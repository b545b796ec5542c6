"""ABIDE from a folder of scans to book/data/abide.json: diagnosis, sex and age, every method on the same folds.

    python -m benchmarks.abide --data FOLDER --out book/data/abide.json

FOLDER holds the Preprocessed Connectomes release as ``nilearn.datasets.fetch_abide_pcp(derivatives=["rois_cc200"],
band_pass_filtering=False, global_signal_regression=False)`` downloads it: ``<FILE_ID>_rois_cc200.1D`` files and the
phenotype table. Without --checkpoint a network is pretrained first, on all usable scans and without their labels.
The file holds scores and digests of folds, no data.
"""

import argparse
import datetime
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mnemodyn.checkpoint import load_checkpoint
from mnemodyn.data.cohorts import load_cohort
from mnemodyn.evaluate import downstream, protocol
from mnemodyn.evaluate.features import connectivity
from mnemodyn.files import sha256, write_json
from mnemodyn.provenance import surroundings

TARGETS = {"diagnosis": "classification", "sex": "classification", "age": "regression"}
CLASSICAL = ("site", "confounds", "fc", "fc_harmonised", "fc_pca", "fc_mlp", "tangent")
NETWORK = ("model", "model+fc", "untrained", "latent_correlation", "response", "last_frame")
TORCH = ("draft_head",)
TUNED = ("finetune_last", "finetune_all")
CONTROL = ("fc", "model", "model+fc")


def pretrain(scans, folder: Path, epochs: int) -> None:
    """A network for windows of 64 frames, on all scans without their labels; some people choose the epoch."""
    from mnemodyn.model.config import ModelConfig
    from mnemodyn.pretrain.objective import Masked
    from mnemodyn.pretrain.training import TrainingConfig, pretrain

    scans = [scan for scan in scans if not scan.constant.any()]
    order = np.random.default_rng(0).permutation(len(scans))
    scans = [scans[i] for i in order]
    config = ModelConfig(
        n_parcels=len(scans[0].parcels),
        n_timepoints=64,
        n_channels=96,
        input_width=64,
        banded="depthwise",
    )
    training = TrainingConfig(epochs=epochs, windows_per_epoch=1600, batch_size=16)
    # One person under two names must not be on both sides here either, but nothing is read from these scans' scores.
    pretrain(
        scans[60:],
        scans[:60],
        folder,
        model=config,
        objective=Masked(0.55, 5, 0.3),
        training=training,
        accelerator="cpu",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the scans, or a store")
    parser.add_argument("--out", default="book/data/abide.json")
    parser.add_argument("--checkpoint", help="folder of a checkpoint; one is trained where none is named")
    parser.add_argument("--work", default="runs/abide", help="folder for the checkpoint, read-outs and folds")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=downstream.default_jobs())
    parser.add_argument("--finetune", action="store_true", help="fine-tune too: hours on a CPU")
    parser.add_argument("--restart", action="store_true", help="give up what --work holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, work = time.monotonic(), Path(options.work)

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {line}", flush=True)

    if options.restart:
        shutil.rmtree(work, ignore_errors=True)
    indexed, origin = downstream.open_scans(load_cohort("abide"), options.data, workers=options.jobs)
    scans = list(indexed)
    say(f"{len(scans)} scans")
    folder = Path(options.checkpoint or work / "pretrain" / "best")
    if not options.checkpoint and not (folder / "config.json").is_file():
        pretrain(scans, work / "pretrain", options.epochs)
        say("pretrained")
    checkpoint = load_checkpoint(folder)
    content = {
        "cohort": "abide",
        "command": "python -m benchmarks.abide --data FOLDER" + (" --checkpoint C" if options.checkpoint else ""),
        "date": datetime.date.today().isoformat(),
        "n_scans": len(scans),
        "n_excluded": len(origin.excluded),
        "checkpoint": {
            "weights_sha256": sha256(folder / "model.safetensors"),
            "val_r2_hidden": checkpoint.training.get("val_r2_hidden"),
            "n_parameters": sum(p.numel() for p in checkpoint.model.parameters()),
            "saw": "BOLD of all usable scans, those of every test fold too, without labels",
        },
    }
    content["targets"] = {}
    for target, kind in TARGETS.items():
        headline = target == "diagnosis"
        content["targets"] |= downstream.study(
            scans,
            indexed.table,
            {target: kind},
            CLASSICAL + NETWORK + (TORCH if headline else ()) + (TUNED if options.finetune else ()),
            control=CONTROL + (TORCH if headline else ()),
            by_site=("confounds", "fc", "model", "model+fc"),
            shots=("fc", "model:latent_correlation"),
            checkpoint=checkpoint,
            cache=work / "cache",
            n_jobs=options.jobs,
            say=say,
        )
        write_json(options.out, content)  # what there is, should the rest be interrupted
    task = downstream.Task.of(indexed.table, "diagnosis", "classification")
    content["protocol"] = protocol.habits(connectivity(downstream.Rows(scans, task.rows)), task)
    content |= {"seconds": round(time.monotonic() - begin), "surroundings": surroundings()}
    write_json(options.out, content)
    say(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
