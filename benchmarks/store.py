"""Random windows from a store, beside other formats and beside reading each file; a store of 40,000 scans.

    python -m benchmarks.store --out FILE.json [--abide FOLDER] [--scans 40000]

Scans are SIMULATED (independent noise of the published size, 1200 frames of 450 parcels), but for those of FOLDER:
ABIDE's `*.1D` as released. Zarr and Arrow are measured where they are installed. Everything is read from the
operating system's cache: what is compared is the work, not the disk.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch
import torchcde

from benchmarks.measure import about, interleaved
from mnemodyn import files
from mnemodyn.data.scaling import METHODS, Scaling
from mnemodyn.data.scans import Scan, load_scan
from mnemodyn.data.store import Store, convert

BATCH = 8
T_R = 0.72  # seconds
WINDOW = 490  # frames
RUN = 20  # batches in a row, as in training, where a step is quick: seconds are of one of them


class Simulated:
    """An index of simulated scans, each made when it is asked for."""

    simulated, excluded = True, ()

    def __init__(self, n: int, n_frames: int, n_parcels: int):
        self.size, self.parcels = (
            (n_frames, n_parcels),
            tuple(f"parcel-{i}" for i in range(n_parcels)),
        )
        self.table = pd.DataFrame({"participant_id": [f"sub-{i:06d}" for i in range(n)]})
        self.table["path"] = self.table["participant_id"] + "_timeseries.tsv"

    def load(self, row) -> Scan:
        rng = np.random.default_rng(int(row["participant_id"][4:]))
        values = 10_000 + 50 * rng.standard_normal(self.size, dtype=np.float32)
        return Scan(row["participant_id"], values, T_R, self.parcels, "simulated", row["path"])


def spline(batch: list[np.ndarray]) -> torch.Tensor:
    """Coefficients of the Hermite cubic through every frame: what the draft's loader ends with."""
    return torchcde.hermite_cubic_coefficients_with_backward_differences(
        torch.from_numpy(np.stack(batch))
    )


def z(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0).clip(1e-6)


def each_file(
    paths: list[Path], read: Callable[[Path], np.ndarray], n_frames: int
) -> Callable[[], None]:
    """A step that reads, scales and cuts `BATCH` files drawn at random and fits their splines."""
    rng = np.random.default_rng(0)

    def step() -> None:
        spline([z(read(p))[:n_frames] for p in rng.choice(paths, BATCH)])

    return step


def from_store(store: Store, n_frames: int) -> Callable[[], None]:
    """A step that draws `RUN` batches of `BATCH` windows at random, each window scaled with its scan's moments."""
    rng = np.random.default_rng(0)
    store = store.select(store.table["n_frames"].to_numpy() >= n_frames)
    last = store.table["n_frames"].to_numpy() - n_frames + 1

    def window() -> torch.Tensor:
        i = int(rng.integers(len(store)))
        start = int(rng.integers(last[i]))
        return torch.from_numpy(store.read(i, start, start + n_frames))

    def step() -> None:
        for _ in range(RUN):
            torch.stack([window() for _ in range(BATCH)])

    return step


def timed_steps(
    section: str, case: str, steps: dict[str, Callable[[], None]], repeats: int
) -> list[dict]:
    """A row a method; a step is `RUN` batches but for the slow way through each file, which is one."""
    found = interleaved(steps, repeats, "cpu")
    return [
        row(section, case, name, [s / (1 if name == "each file" else RUN) for s in seconds])
        for name, seconds in found.items()
    ]


def row(section: str, case: str, method: str, seconds: list[float], **facts) -> dict:
    median = statistics.median(seconds)
    print(f"{section} {case} {method}: {1e3 * median:.3f} ms", flush=True)
    return {
        "section": section,
        "case": case,
        "method": method,
        "seconds": median,
        "repeats": seconds,
        **facts,
    }


def formats(folder: Path, repeats: int) -> list[dict]:
    """The same float16 values in NumPy's, Zarr's and Arrow's files; a step copies random windows."""
    index = Simulated(64, 1200, 450)
    store = convert(index, folder / "store")
    values = np.concatenate([store._parts(i)[0] for i in range(len(store))])
    rng = np.random.default_rng(0)

    def reading(window: Callable[[int, int], np.ndarray]) -> Callable[[], None]:
        def step() -> None:
            for _ in range(RUN * BATCH):
                i, start = rng.integers(64), rng.integers(1200 - WINDOW)
                assert np.array(window(int(i), int(start))).shape == (WINDOW, 450)

        return step

    steps = {
        "numpy memory map": reading(lambda i, start: store._parts(i, start, start + WINDOW)[0])
    }
    try:
        import zarr

        for name, how in (
            ("zarr, plain chunks", {"compressors": None}),
            ("zarr, its default compression", {}),
        ):
            path = folder / f"{len(steps)}.zarr"
            array = zarr.create_array(
                path, shape=values.shape, chunks=(120, 450), dtype="float16", **how
            )
            array[:] = values
            array = zarr.open_array(path, mode="r")
            steps[name] = reading(
                lambda i, start, a=array: a[1200 * i + start : 1200 * i + start + WINDOW]
            )
    except ImportError:
        print("zarr is not installed")
    try:
        import pyarrow as pa

        kind = pa.schema([("values", pa.list_(pa.float16(), 450))])
        with (
            pa.OSFile(str(folder / "scans.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, kind) as writer,
        ):
            for scan in np.split(values, 64):
                flat = pa.FixedSizeListArray.from_arrays(pa.array(scan.ravel()), 450)
                writer.write_batch(pa.record_batch([flat], schema=kind))
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "scans.arrow")))

        def arrow(i: int, start: int) -> np.ndarray:
            part = reader.get_batch(i).column(0).slice(start, WINDOW)
            return part.flatten().to_numpy(zero_copy_only=True).reshape(WINDOW, 450)

        steps["arrow memory map"] = reading(arrow)
    except ImportError:
        print("pyarrow is not installed")
    return timed_steps("formats", "490 frames x 450", steps, repeats)


def published(folder: Path, repeats: int) -> list[dict]:
    """Windows of the published size: the store beside parcellated CIFTI files, read, scaled and fitted each."""
    folder.mkdir()
    index = Simulated(32, 1200, 450)
    axes = nibabel.cifti2.SeriesAxis(0, T_R, 1200), nibabel.cifti2.ScalarAxis(index.parcels)
    paths = []
    for i in range(32):
        scan = index.load(index.table.iloc[i])
        paths.append(folder / f"{scan.participant_id}_450_parcellated.dtseries.nii")
        nibabel.Cifti2Image(scan.values, axes).to_filename(paths[-1])

    def read(path: Path) -> np.ndarray:
        return nibabel.load(path).get_fdata().astype(np.float32)

    steps = {"each file": each_file(paths, read, WINDOW)}
    for dtype in ("float16", "float32"):
        store = convert(index, folder / dtype, dtype=dtype)
        steps[f"store, {dtype}"] = from_store(store, WINDOW)
    return timed_steps("windows", "CIFTI, 490 frames x 450", steps, repeats)


def abide(source: Path, folder: Path, repeats: int) -> tuple[list[dict], dict]:
    """ABIDE's files as released: the conversion, and windows of 50 frames."""
    paths = sorted(source.glob("*.1D"))
    index = Simulated(1, 1, 1)  # a plain index: every file, no phenotype
    index.simulated = False
    index.table = pd.DataFrame(
        {"path": [str(p) for p in paths], "participant_id": [f"sub-{p.stem}" for p in paths]}
    )
    index.load = lambda row: load_scan(
        row["path"],
        t_r=2.0,
        frames_first=True,
        max_constant_parcels=10,
        participant_id=row["participant_id"],
    )
    start = time.perf_counter()
    store = convert(index, folder / "abide")
    seconds = time.perf_counter() - start
    size = sum(p.stat().st_size for p in (folder / "abide").iterdir())
    conversion = {
        "n_files": len(paths),
        "n_scans": len(store),
        "n_excluded": len(store.excluded),
        "seconds": seconds,
        "bytes": size,
        "error_max_sd": store.table["error_max"].max(),
        "error_rms_sd": float(np.sqrt((store.table["error_rms"] ** 2).mean())),
    }
    print(f"conversion of {len(store)} scans: {seconds:.1f} s", flush=True)
    usable = [Path(p) for p in store.table.loc[store.table["n_frames"] >= 50, "path"]]
    steps = {
        "each file": each_file(usable, lambda p: pd.read_csv(p, sep="\t").to_numpy(np.float32), 50),
        "store, float16": from_store(store, 50),
    }
    return timed_steps("windows", "ABIDE .1D, 50 frames x 200", steps, repeats), conversion


def large(folder: Path, n: int) -> dict:
    """Convert, open, scale and read `n` scans of 200 frames of 100 parcels; the peak is of a process of its own."""
    found: dict = {"n_scans": n, "n_frames": 200, "n_parcels": 100}

    def timed(name: str, step: Callable):
        start = time.perf_counter()
        result = step()
        found[f"{name}_seconds"] = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found["peak_bytes"] = peak
        print(
            f"{n} scans, {name}: {found[f'{name}_seconds']:.1f} s, {peak / 2**20:.0f} MiB so far",
            flush=True,
        )
        return result

    index = Simulated(n, 200, 100)
    timed("convert", lambda: convert(index, folder / "large"))
    found["bytes"] = sum(p.stat().st_size for p in (folder / "large").iterdir())
    store = timed("open", lambda: Store(folder / "large"))
    timed("verify", store.verify)
    train = store.select(np.arange(n) % 5 > 0)
    for method in METHODS:
        timed(f"fit_{method}", lambda method=method: Scaling(method).fit(train))
    timed("read_all", lambda: [store.read(i).sum() for i in range(n)])
    step = from_store(store, 100)
    timed("thousand_batches", lambda: [step() for _ in range(1000 // RUN)])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--abide", type=Path, help="folder of ABIDE's .1D files")
    parser.add_argument(
        "--scans", type=int, default=40_000, help="scans of the large store; 0 for none"
    )
    parser.add_argument("--repeats", type=int, default=7, help="steps timed of each method")
    parser.add_argument("--large", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.large:
        files.write_json(arguments.out, large(Path(arguments.large), arguments.scans))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = formats(folder / "formats", arguments.repeats) + published(
            folder / "published", arguments.repeats
        )
        conversion = many = None
        if arguments.abide:
            new, conversion = abide(arguments.abide, folder, arguments.repeats)
            rows += new
        if arguments.scans:
            out = folder / "large.json"
            options = ["--large", name, "--scans", str(arguments.scans), "--out", str(out)]
            subprocess.run([sys.executable, "-m", "benchmarks.store", *options], check=True)
            many = json.loads(out.read_text())
    slow = {r["case"]: r["seconds"] for r in rows if r["method"] == "each file"}
    result = {
        **about("benchmarks.store"),
        "note": "SIMULATED scans but for ABIDE; files in the system's cache; other work ran on the machine",
        "batch": BATCH,
        "times_faster": {
            f"{r['case']}: {r['method']}": slow[r["case"]] / r["seconds"]
            for r in rows
            if r["section"] == "windows" and r["method"] != "each file"
        },
        "rows": rows,
        "conversion": conversion,
        "large": many,
    }
    files.write_json(arguments.out, result)


if __name__ == "__main__":
    main()
