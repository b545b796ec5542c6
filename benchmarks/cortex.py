"""ABIDE on the cortex, from a folder of scans to book/data/cortex_abide.json and a picture beside it.

    python -m benchmarks.cortex --data FOLDER --atlas CC200.nii.gz

How well each parcel's hidden entries are filled, and which parcels a diagnosis is read from: the linear head on the
read-out ``response``, whose score of a person is a sum over edges and so over parcels. People are cut into halves; a
network is trained on one half, without labels, and the other half is read, its heads in five folds. FOLDER is as in
``benchmarks.abide``, the atlas the label volume of the same release.
"""

import argparse
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from mnemodyn import figures
from mnemodyn.checkpoint import Checkpoint, from_pretrained
from mnemodyn.data.atlas import NETWORKS, schaefer400_tian3
from mnemodyn.data.quality import open_scans
from mnemodyn.data.scans import Scan
from mnemodyn.evaluate import inside
from mnemodyn.files import sha256, write_bytes, write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.pretrain.objective import Masked
from mnemodyn.pretrain.training import TrainingConfig, pretrain
from mnemodyn.pretrain.windows import cut_windows
from mnemodyn.provenance import surroundings
from mnemodyn.readout import MnemoDynEncoder
from mnemodyn.splits import repeated_folds

FRAMES, MASKS, TARGET, CASE = 64, Masked(0.55, 5, 0.3), "diagnosis", "autism"
PENALTY = 5e-4  # inverse, of 19,900 standardised edges


def halves(
    scans: list[Scan], table: pd.DataFrame
) -> list[tuple[list[Scan], pd.DataFrame, list[Scan]]]:
    """For either half of the labelled people: their scans, their rows, and everybody else's scans."""
    labelled = table[table[TARGET].notna()].reset_index(drop=True)
    folds = repeated_folds(labelled, TARGET, n_folds=2, n_repeats=1)
    by_person, parts = {scan.participant_id: scan for scan in scans}, []
    for _, _, _, rows in folds.split(labelled["participant_id"]):
        mine = labelled.loc[rows].reset_index(drop=True)
        inner = (set(mine["participant_id"]) | set(mine["family"].dropna())) - {""}
        others = table[~table["participant_id"].isin(inner) & ~table["family"].isin(inner)][
            "participant_id"
        ]
        others = np.random.default_rng(0).permutation(sorted(others))
        parts.append(
            ([by_person[p] for p in mine["participant_id"]], mine, [by_person[p] for p in others])
        )
    return parts


def trained(scans: list[Scan], folder: Path, epochs: int) -> Checkpoint:
    """A network of these scans, some of which choose the epoch; from the folder where it is there."""
    if not (folder / "best" / "config.json").is_file():
        config = ModelConfig(
            n_parcels=len(scans[0].parcels), n_timepoints=FRAMES, n_channels=24, input_width=24
        )
        training = TrainingConfig(epochs=epochs, windows_per_epoch=640, batch_size=16)
        pretrain(
            scans[25:],
            scans[:25],
            folder,
            model=config,
            objective=MASKS,
            training=training,
            restart=True,
        )
    return from_pretrained(folder / "best")


def filled(checkpoint: Checkpoint, scans: list[Scan]) -> np.ndarray:
    """Sums over hidden entries of each parcel, of squared errors and of squares: (2, parcel)."""
    sums = np.zeros((2, len(scans[0].parcels)))
    for i, scan in enumerate(scans):
        x = cut_windows(checkpoint.scaling(scan), FRAMES)
        hidden = MASKS.hide(x.shape, i)
        with torch.no_grad():
            fill = checkpoint.model(
                torch.from_numpy(x), scan.t_r, hidden=hidden
            ).reconstruction.numpy()
        sums += [np.square(np.where(hidden, a, 0).astype(float)).sum((0, 1)) for a in (fill - x, x)]
    return sums


def connectivity(scans: list[Scan]) -> np.ndarray:
    """Fisher-z correlations of the scans themselves, in the order of the read-out."""
    edges = np.triu_indices(len(scans[0].parcels), 1)
    return np.array(
        [np.arctanh(np.corrcoef(scan.values.T)[edges].clip(-0.999999, 0.999999)) for scan in scans]
    )


def shares(features: np.ndarray, table: pd.DataFrame) -> tuple[np.ndarray, list[float]]:
    """What each parcel adds to the score of a person by heads fitted on others, (scan, parcel); AUC of every fold."""
    case = (table[TARGET] == CASE).to_numpy()
    areas, parts = [], []
    for _, _, train, test in repeated_folds(table, TARGET, n_repeats=1).split(
        table["participant_id"]
    ):
        scaler = StandardScaler().fit(features[train])
        head = LogisticRegression(C=PENALTY, max_iter=1000).fit(
            scaler.transform(features[train]), case[train]
        )
        edges = scaler.transform(features[test]) * head.coef_
        parts.append((test, inside.parcel_shares(edges)))
        areas.append(roc_auc_score(case[test], edges.sum(1)))
    found = np.zeros((len(table), parts[0][1].shape[1]))
    for test, values in parts:
        found[test] = values
    return found, areas


def contrast(values: np.ndarray, case: np.ndarray) -> np.ndarray:
    """Mean of cases less mean of the others, in standard errors, (..., parcel); `case` (..., scan)."""
    n = case.sum(-1, keepdims=True)
    rest = case.shape[-1] - n
    mean, variance = [], []
    for side, m in ((case.astype(float), n), (1.0 - case, rest)):
        mean.append(side @ values / m)
        variance.append((side @ values**2 / m - mean[-1] ** 2) / m)
    return (mean[0] - mean[1]) / np.sqrt(variance[0] + variance[1])


def networks(vertices: dict[str, np.ndarray], n: int) -> np.ndarray:
    """The network (of 7) of most of a parcel's vertices, by Schaefer's atlas; "" where fewer than ten have one."""
    atlas = schaefer400_tian3()
    names, counts = list(NETWORKS), np.zeros((n + 1, len(NETWORKS)), int)
    for side, parcels in vertices.items():
        mine = (atlas.axis.name == f"CIFTI_STRUCTURE_CORTEX_{side}") & (atlas.labels > 0)
        for vertex, label in zip(atlas.axis.vertex[mine], atlas.labels[mine], strict=True):
            counts[parcels[vertex], names.index(atlas.networks[label - 1])] += 1
    return np.where(counts[1:].max(1) >= 10, np.array(names)[counts[1:].argmax(1)], "")


def holm(p: dict[str, float]) -> dict[str, float]:
    """Adjusted for their number (Holm 1979)."""
    order, adjusted, worst = sorted(p, key=p.get), {}, 0.0
    for i, name in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = worst
    return adjusted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of ABIDE's scans")
    parser.add_argument(
        "--atlas", required=True, help="label volume of the parcels, MNI, labels in their order"
    )
    parser.add_argument("--out", default="book/data/cortex_abide.json")
    parser.add_argument("--work", default="runs/cortex", help="folder for the two networks")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    collection = open_scans(options.data, cohort="abide")
    scans = [scan for scan in collection.scans if not scan.constant.any()]
    table = collection.table
    table = table[table["participant_id"].isin([s.participant_id for s in scans])].reset_index(
        drop=True
    )
    found: dict[str, list] = {"network": [], "connectivity": []}
    areas: dict[str, list] = {name: [] for name in found}
    sums, cases, weights = np.zeros((2, len(scans[0].parcels))), [], []
    for i, (mine, rows, others) in enumerate(halves(scans, table)):
        checkpoint = trained(others, Path(options.work) / f"half-{i}", options.epochs)
        weights.append(sha256(Path(options.work) / f"half-{i}" / "best" / "model.safetensors"))
        sums += filled(checkpoint, mine)
        cases.append((rows[TARGET] == CASE).to_numpy())
        response = MnemoDynEncoder(checkpoint, ("response",)).fit(mine).transform(mine)
        for name, features in (("network", response), ("connectivity", connectivity(mine))):
            values, area = shares(features, rows)
            found[name].append(values)
            areas[name] += area
        print(
            f"{time.process_time() - begin:.0f} s: {len(mine)} people, AUC {np.mean(areas['network']):.3f}",
            flush=True,
        )
    case, r2 = np.concatenate(cases), 1 - sums[0] / sums[1]
    maps = {name: contrast(np.concatenate(parts), case) for name, parts in found.items()}
    rng = np.random.default_rng(0)
    shuffled = np.array(
        [np.concatenate([rng.permutation(part) for part in cases]) for _ in range(2000)]
    )
    null = np.abs(contrast(np.concatenate(found["network"]), shuffled)).max(1)
    p = (1 + (null[:, None] >= np.abs(maps["network"])).sum(0)) / (1 + len(null))

    vertices = figures.vertex_parcels(options.atlas)
    image = nibabel.load(options.atlas)
    labels = np.asarray(image.dataobj).astype(int)
    centres = np.array([np.argwhere(labels == i + 1).mean(0) for i in range(len(r2))])
    centres = nibabel.affines.apply_affine(image.affine, centres)
    network_of = networks(vertices, len(r2))
    first, second = (
        contrast(values, part) for values, part in zip(found["network"], cases, strict=True)
    )
    beside = {"one half of the people and the other": (first, second)}
    beside["read from the network and from the scans' connectivity"] = (
        maps["network"],
        maps["connectivity"],
    )
    beside["how well a parcel is filled (R²)"] = (maps["network"], r2)
    members = {name: (network_of == name).astype(float) for name in NETWORKS}
    tests = {name: inside.spatial_test(a, b, centres, seed=0) for name, (a, b) in beside.items()}
    by_network = {
        name: inside.spatial_test(maps["network"], member, centres, seed=0)
        for name, member in members.items()
    }
    adjusted = holm({name: test["p"] for name, test in by_network.items()})
    for name, test in by_network.items():
        where = members[name] > 0
        test |= {
            "p_holm": adjusted[name],
            "n": int(where.sum()),
            "mean": float(maps["network"][where].mean()),
        }
        test["r2"] = float(r2[where].mean())

    figures.use_style()
    drawn = {
        "R² on hidden entries": r2,
        "share in the score, autism less control (t)": maps["network"],
    }
    write_bytes(Path(options.out).with_suffix(".svg"), figures.svg(figures.cortex(drawn, vertices)))
    content = {
        "cohort": "abide",
        "command": "python -m benchmarks.cortex --data FOLDER --atlas FILE",
        "n": len(case),
        "n_cases": int(case.sum()),
        "auc": {name: float(np.mean(area)) for name, area in areas.items()},
        "r2": {"mean": float(r2.mean()), "least": float(r2.min()), "most": float(r2.max())},
        "parcels_beyond_chance": int((p < 0.05).sum()),
        "t": {"most": float(maps["network"].max()), "least": float(maps["network"].min())},
        "tests": tests,
        "networks": by_network,
        "parcels": {
            "r2": r2.round(4).tolist(),
            "t": maps["network"].round(3).tolist(),
            "p": p.round(4).tolist(),
        },
        "weights_sha256": weights,
        "cpu_seconds": round(time.process_time() - begin),
        "surroundings": surroundings(),
    }
    write_json(options.out, content)
    print(f"{options.out}: {content['auc']}, {tests}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
