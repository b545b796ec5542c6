"""ABIDE from a folder of scans to book/data/abide.json: diagnosis, sex and age, every method on the same folds.

    python -m benchmarks.abide --data FOLDER

FOLDER holds the Preprocessed Connectomes release as ``nilearn.datasets.fetch_abide_pcp(derivatives=["rois_cc200"],
band_pass_filtering=False, global_signal_regression=False)`` downloads it: ``<FILE_ID>_rois_cc200.1D`` files and the
phenotype table. Without --checkpoint a network is pretrained first, on all usable scans and without their labels.
With --finetune, the fine-tuning of that network for the diagnosis with its controls: book/data/abide_finetune.json.
With --only, those parts of a result file are measured again by its network, which --work or --checkpoint holds; the
rest of the file stays, and ``measured_again`` says of each part when and at which commit. The files hold scores and
digests of folds, no data. What is finished stays in --work, and an interrupted run goes on.
"""

import argparse
import dataclasses
import datetime
import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count
from joblib.externals.loky import get_reusable_executor

from mnemodyn.checkpoint import Checkpoint, from_pretrained
from mnemodyn.data.cohorts import load_cohort
from mnemodyn.data.scans import Scan
from mnemodyn.evaluate import downstream, protocol
from mnemodyn.evaluate.features import connectivity
from mnemodyn.files import sha256, write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.config import Machine, TrainingConfig
from mnemodyn.pretrain.objective import Masked
from mnemodyn.provenance import surroundings

TARGETS = {"diagnosis": "classification", "sex": "classification", "age": "regression"}
METHODS = ("site", "confounds", "fc", "fc_harmonised", "fc_combat", "fc_pca", "fc_mlp", "tangent")
METHODS += (
    "model",
    "model+fc",
    "untrained",
    "latent_correlation",
    "response",
    "last_frame",
    "adapted",
    "adapted+fc",
)
CONTROL = ("fc", "model", "model+fc", "adapted+fc")
SHUFFLES = {"fc": 40, "model": 8, "model+fc": 8}
NOISES = dict.fromkeys(CONTROL, 4)
TUNED = ("fc", "finetune_last", "finetune_all")
PARTS = (
    "kfold",
    "leave_one_site_out",
    "permuted",
    "noise",
    "noise_equal",
    "permutations",
    "noises",
)
OUT = "book/data/abide.json"


def train(scans: Sequence[Scan], folder: Path, epochs: int) -> None:
    """A network for windows of 64 frames, on all scans without their labels; 60 people choose the epoch."""
    from mnemodyn.pretrain.training import pretrain

    whole = [scan for scan in scans if not scan.constant.any()]
    order = [whole[i] for i in np.random.default_rng(0).permutation(len(whole))]
    config = ModelConfig(
        n_parcels=len(whole[0].parcels),
        n_timepoints=64,
        n_channels=96,
        input_width=64,
        banded="depthwise",
    )
    pretrain(
        order[60:],
        order[:60],
        folder,
        model=config,
        objective=Masked(0.55, 5, 0.3),
        training=TrainingConfig(epochs=epochs, windows_per_epoch=1600, batch_size=16),
        machine=Machine(accelerator="cpu"),
    )


def with_front(checkpoint: Checkpoint, scans: Sequence[Scan]) -> Checkpoint:
    """The network behind a front end, fitted to scans without labels, in closed form.

    Shrinkage and modes are those that `make reconstruct` chooses on ABIDE, the weight is the second best of those tried
    there; nothing was chosen by a label.

    Where nothing is hidden a front end does nothing, so that what is read out of the blocks stays as it is.
    """
    config = dataclasses.replace(
        checkpoint.model.config,
        front="gaussian",
        front_shrinkage=0.03,
        front_weight=100.0,
        front_modes=200,
    )
    model = MnemoDyn(config)
    model.load_state_dict(checkpoint.model.state_dict(), strict=False)
    assert checkpoint.scaling is not None
    model.fit_front([checkpoint.scaling(scan) for scan in scans])
    return dataclasses.replace(checkpoint, model=model.eval())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the scans, or a store")
    parser.add_argument(
        "--out", help=f"default: {OUT}, or with --finetune {OUT[:-5]}_finetune.json"
    )
    parser.add_argument(
        "--checkpoint", help="folder of a checkpoint; one is trained where none is named"
    )
    parser.add_argument(
        "--work", default="runs/abide", help="folder for the checkpoint, read-outs and folds"
    )
    parser.add_argument("--epochs", type=int, default=6, help="of the training (default: 6)")
    parser.add_argument("--jobs", type=int, default=cpu_count())
    parser.add_argument("--finetune", action="store_true", help="the fine-tuning, and nothing else")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=PARTS, help="parts of --out to measure again"
    )
    parser.add_argument("--restart", action="store_true", help="give up what --work holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, work = time.monotonic(), Path(options.work)
    out = options.out or (f"{OUT[:-5]}_finetune.json" if options.finetune else OUT)

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {line}", flush=True)

    if options.restart:
        shutil.rmtree(work, ignore_errors=True)
    fresh = not work.exists()
    indexed = downstream.open_scans(load_cohort("abide"), options.data, workers=options.jobs)
    scans = list(indexed)
    say(f"{len(scans)} scans")
    folder = Path(options.checkpoint or work / "pretrain" / "best")
    before = json.loads(Path(out).read_text()) if options.only else {}
    if before and sha256(folder / "model.safetensors") != before["checkpoint"]["weights_sha256"]:
        parser.error(
            f"{folder} is not the network of {out}: name that with --checkpoint, or leave --only out"
        )
    if (
        not options.checkpoint and not (folder / "config.json").is_file()
    ):  # which is written when training ends
        train(scans, work / "pretrain", options.epochs)
        say("pretrained")
    checkpoint = with_front(from_pretrained(folder), scans)
    used = {"--checkpoint C": options.checkpoint, "--finetune": options.finetune}
    used[f"--only {' '.join(options.only)}"] = options.only
    content = {
        "cohort": "abide",
        "command": " ".join(
            ["python -m benchmarks.abide --data FOLDER", *(k for k, v in used.items() if v)]
        ),
        "date": datetime.date.today().isoformat(),
        "n_scans": len(scans),
        "n_excluded": len(indexed.excluded),
        "checkpoint": {
            "weights_sha256": sha256(folder / "model.safetensors"),
            "val_r2_hidden": checkpoint.training.get("val_r2_hidden"),
            "epochs": checkpoint.training.get("settings", {}).get("epochs"),
            "n_parameters": sum(p.numel() for p in checkpoint.model.parameters()),
            "saw": "BOLD of all usable scans, those of every test fold too, without labels",
        },
        "targets": {},
    }
    for target, kind in TARGETS.items():
        headline = target == "diagnosis"
        draft = ("draft_head",) if headline else ()
        unmoved = ("fc_unmoved",) if kind == "classification" else ()
        if options.finetune and not headline:
            continue
        plan: dict = {"methods": TUNED, "n_repeats": 1, "control": TUNED}
        if not options.finetune:
            plan = {
                "methods": METHODS + unmoved + draft,
                "control": CONTROL + draft,
                "shuffles": SHUFFLES,
                "noises": NOISES,
                "by_site": ("confounds", "fc", *unmoved, "model", "model+fc", "adapted+fc"),
                "shots": ("fc", "model:latent_correlation"),
            }
        content["targets"] |= downstream.study(
            scans,
            indexed.table,
            {target: kind},
            **plan,
            checkpoint=checkpoint,
            cache=work / "cache",
            n_jobs=options.jobs,
            only=options.only,
            say=say,
        )
    if not options.finetune and not options.only:
        task = downstream.Task.of(indexed.table, "diagnosis", "classification")
        content["protocol"] = protocol.habits(connectivity(downstream.Rows(scans, task.rows)), task)
    if options.jobs > 1:
        get_reusable_executor().shutdown(wait=True)  # so that its processes' time is counted
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    content |= {
        "seconds": round(time.monotonic() - begin),
        "cpu_seconds": round(sum(s.ru_utime + s.ru_stime for s in spent)),
        "in_one_piece": fresh,
        "surroundings": surroundings(),
    }
    if options.only:
        about = {key: content[key] for key in ("command", "date", "cpu_seconds")}
        about["commit"] = content["surroundings"]["commit"]
        before.setdefault("measured_again", {}).update(dict.fromkeys(options.only, about))
        for target, parts in content["targets"].items():
            before["targets"][target] |= parts
    write_json(out, before or content)
    say(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
