"""A checkpoint: a folder with the weights and everything that is needed to use them.

``model.safetensors`` holds the weights, ``config.json`` the rest: the configuration of the network,
its parcels, repetition time and scaling, and how it was trained. Nothing that is read is executed.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.files import digest, load_yaml, sha256, write_bytes, write_json
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig, Positive, checked

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "HubError",
    "from_pretrained",
    "read_tensors",
    "save_checkpoint",
]

FORMAT = 1
FILES = ("config.json", "model.safetensors")
# Networks that come with the package, a folder each.
SHIPPED = Path(__file__).parent / "networks"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that has access"

# A file of the draft's trainer is named by its validation metric: epoch=07-val_mae=0.4321.ckpt.
METRIC = re.compile(r".*(val\w*)=(-?\d+(?:\.\d+)?)")
LARGER_IS_BETTER = re.compile(r"acc|auc|r2|corr|f1")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message says what was expected."""


class HubError(RuntimeError):
    """The Hugging Face Hub refused a request or could not be reached."""


@checked
class _Config:
    """What ``config.json`` holds, each of its kind."""

    format: Literal[1]
    mnemodyn: str
    model: dict
    parcels: list[str] | None
    t_r: Positive | None
    scaling: dict | None
    data_fingerprint: str | None
    training: dict
    weights_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A network in evaluation mode, and what it was trained on.

    Parameters
    ----------
    model : MnemoDyn
        The network.
    parcels : tuple of str, optional
        Names of the parcels, in the order of the columns that the network reads.
    t_r : float, optional
        Repetition time of the training scans, in seconds.
    scaling : Scaling, optional
        How a scan is scaled before the network reads it.
    data_fingerprint : str, optional
        Digest of the training data.
    training : dict
        Settings, participants and validation result of the training.

    Notes
    -----
    A checkpoint of the published draft states no parcels, repetition time, scaling or data. They are
    None, and ``dataclasses.replace`` sets what is known from elsewhere.
    """

    model: MnemoDyn
    parcels: tuple[str, ...] | None = None
    t_r: float | None = None
    scaling: Scaling | None = None
    data_fingerprint: str | None = None
    training: dict = field(default_factory=dict)

    def check(self, scan: Scan) -> None:
        """Refuse a scan whose parcels or their order differ from those of the training.

        Warns if the checkpoint states no parcels, because only their number can be checked then.

        Raises
        ------
        CheckpointError
            If they differ; the message names the first column that does.
        """
        expected = self.model.config.n_parcels
        if len(scan.parcels) != expected:
            raise CheckpointError(
                f"{scan.source}: the checkpoint expects {expected} parcels, got {len(scan.parcels)}"
            )
        if self.parcels is None:
            warnings.warn(
                f"{scan.source}: the checkpoint does not state its parcels; "
                f"only their number, {expected}, was checked",
                stacklevel=2,
            )
            return
        for i, name in enumerate(self.parcels):
            if scan.parcels[i] != name:
                raise CheckpointError(
                    f"{scan.source}: its parcels are others, or in another order, than the checkpoint's: "
                    f"column {i} should be {name!r}, got {scan.parcels[i]!r}"
                )

    def require_scaling(self) -> Scaling:
        """The scaling; a CheckpointError if the checkpoint does not state it."""
        if self.scaling is None:
            raise CheckpointError(
                "the checkpoint does not state its scaling; "
                "name it with dataclasses.replace(checkpoint, scaling=...) or --scaling"
            )
        return self.scaling

    def fingerprint(self) -> str:
        """Digest of all that a result of this checkpoint depends on."""
        scaling = None
        if self.scaling is not None:
            scaling = self.scaling.to_dict()
        return digest(asdict(self.model.config), self.model.state_dict(), scaling, self.parcels)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into a folder, in place of one that is there, and return the folder.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    folder = Path(folder)
    weights = {}
    for name, value in checkpoint.model.state_dict().items():
        weights[name] = value.detach().cpu().contiguous()
    scaling = None
    if checkpoint.scaling is not None:
        scaling = checkpoint.scaling.to_dict()
    path = write_bytes(folder / "model.safetensors", save_tensors(weights))
    config = {
        "format": FORMAT,
        "mnemodyn": version("mnemodyn"),
        "model": asdict(checkpoint.model.config),
        "parcels": checkpoint.parcels,
        "t_r": checkpoint.t_r,
        "scaling": scaling,
        "data_fingerprint": checkpoint.data_fingerprint,
        "training": checkpoint.training,
        "weights_sha256": sha256(path),
    }
    # Last, because it vouches for the weights.
    write_json(folder / "config.json", config)
    return folder


def from_pretrained(
    name_or_path: str | Path,
    *,
    compat: Literal["none", "reference"] = "none",
    revision: str | None = None,
    subfolder: str = "",
    **download: Any,
) -> Checkpoint:
    """Load a checkpoint, its network on the CPU and in evaluation mode.

    Parameters
    ----------
    name_or_path : str or Path
        A checkpoint's folder or one of its two files; the folder of a run, whose ``best`` is loaded;
        or, where there is no such path, a network that comes with the package, such as ``"dk68"``, or
        ``NAME/MODEL`` on the Hugging Face Hub. With
        ``compat="reference"`` a Lightning ``.ckpt`` of the published draft, with its settings inside
        or in ``hparams.yaml`` beside it or one folder up; or a version folder of the draft's trainer,
        of which the file with the best validation metric in its name is loaded.
    compat : str
        ``none``, or ``reference`` for a file of the published draft.
    revision : str, optional
        Branch, tag or commit on the hub.
    subfolder : str
        Folder of the repository or path that holds the checkpoint.
    **download
        As in ``huggingface_hub.snapshot_download``: ``token``, ``cache_dir`` and so on.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or it is damaged, or its weights, configuration and parcels do not
        fit each other.
    HubError
        If the hub cannot be reached or has no such repository or revision for this token.
    """
    if compat not in ("none", "reference"):
        raise ValueError(f"compat must be none or reference, got {compat!r}")
    # A path that exists is never looked for on the hub.
    path = Path(name_or_path)
    if not path.exists() and (SHIPPED / path.name / FILES[0]).is_file() and path.name == str(path):
        path = SHIPPED / path
    if not path.exists():
        path = _download(str(name_or_path), compat, revision, subfolder, download)
    path = path / subfolder
    if compat == "reference":
        return _load_draft(_draft_file(path))
    return _load(_checkpoint_folder(path))


def _download(name: str, compat: str, revision: str | None, subfolder: str, settings: dict) -> Path:
    """Fetch the files of a checkpoint from the hub, or find them in its cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"{name}: there is no such file or folder, and it is no NAME/MODEL of the hub"
        )
    # Takes half a second to import, and is not needed for local checkpoints.
    from huggingface_hub import snapshot_download

    wanted = FILES
    if compat == "reference":
        wanted = ("*.ckpt", "hparams.yaml")
    patterns = [str(PurePosixPath(subfolder, file)) for file in wanted]
    with hub_errors(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **settings))


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into a HubError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.RepositoryNotFoundError):
            reason = f"no such repository for this token; check the name, or {LOGIN}"
        elif isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
            reason = f"the hub does not allow this; {LOGIN}"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = "the hub was not reached, and no copy is in the cache"
        raise HubError(f"{repo_id}: {reason}") from error


def _checkpoint_folder(path: Path) -> Path:
    """The folder of the checkpoint that a path stands for."""
    if path.name in FILES:
        path = path.parent
    # A run's folder stands for the checkpoint that validation chose.
    for folder in (path, path / "best"):
        if (folder / "config.json").is_file():
            return folder
    if (path / "run.json").is_file():
        raise CheckpointError(f"{path} is a run that has no best/ yet; let its training finish")
    hint = "a .ckpt of the published draft needs compat='reference', or --compat reference"
    if (SHIPPED / path.name).is_dir():
        hint = f"it hides the {path.name} that comes with the package; rename it, or work elsewhere"
    raise CheckpointError(
        f"{path} is no checkpoint: expected a folder with {' and '.join(FILES)} ({hint})"
    )


def _load(folder: Path) -> Checkpoint:
    """Load a checkpoint of this package's format."""
    path = folder / "config.json"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: model.safetensors is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it must hold a mapping, got {type(content).__name__}")
        config = _Config(**content)
        if sha256(weights) != config.weights_sha256:
            raise CheckpointError(
                f"{weights}: damaged: its SHA-256 is not that of config.json; copy or train it again"
            )
        model = MnemoDyn.from_weights(
            ModelConfig(**config.model), _float32(weights, load_tensors(weights.read_bytes()))
        )
        n_parcels = model.config.n_parcels
        parcels = None
        if config.parcels is not None:
            parcels = tuple(config.parcels)
            if not len(parcels) == len(set(parcels)) == n_parcels:
                raise ValueError(f"parcels must be {n_parcels} different names, as model says")
        scaling = None
        if config.scaling is not None:
            scaling = Scaling(**config.scaling)
            for values in (scaling.offset, scaling.scale):
                if values is not None and len(values) not in (1, n_parcels):
                    raise ValueError(f"scaling must be fitted to {n_parcels} parcels")
        return Checkpoint(
            model=model,
            parcels=parcels,
            t_r=config.t_r,
            scaling=scaling,
            data_fingerprint=config.data_fingerprint,
            training=config.training,
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError, SafetensorError) as error:
        # PyTorch names each weight that does not fit, with both shapes.
        # Some of its messages end in a list of its own functions.
        reason = str(error).partition("Exception raised from")[0].strip()
        raise CheckpointError(
            f"{path}: not a checkpoint of this version, copy or train it again: {reason}"
        ) from error


def read_tensors(path: Path) -> dict:
    """What ``torch.save`` wrote into a file: tensors and plain values only, on the CPU.

    A CheckpointError without PyTorch's own words, which advise to load what may be executed.
    """
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch does not compress, so that a small file with much in it is none of its own.
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise ValueError("it holds more than its size")
        # With weights_only PyTorch refuses everything but tensors and plain values.
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:  # a damaged or hostile file may raise anything
        raise CheckpointError(
            f"{path}: not a Lightning checkpoint of tensors and plain values: it is damaged, or it holds what is "
            f"never loaded; nothing in it was executed ({type(error).__name__})"
        ) from None


def _float32(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as a network computes with them; a CheckpointError where one is no number, or is NaN or infinite."""
    found = {}
    for name, value in weights.items():
        if not value.is_floating_point() or value.layout != torch.strided:
            found_kind = f"{value.dtype}, {value.layout}"
            raise CheckpointError(f"{path}: {name} must be dense floating-point, got {found_kind}")
        found[name] = value.float()
        if not found[name].isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinite weights, so that its results would be empty; "
                "train it again with a smaller learning_rate, or take another checkpoint"
            )
    others = {str(value.dtype) for value in weights.values()} - {"torch.float32"}
    if others:
        kinds = ", ".join(sorted(others))
        warnings.warn(f"{path}: weights of {kinds} are converted to float32", stacklevel=2)
    return found


def _draft_file(path: Path) -> Path:
    """The .ckpt that a path stands for: itself, or the best of a version folder."""
    if path.is_file():
        return path
    found = [file for file in sorted(path.rglob("*.ckpt")) if file.stem != "last"]
    if len(found) == 1:
        return found[0]
    scores = {}
    names = set()
    for file in found:
        metric = METRIC.match(file.stem)
        if metric:
            names.add(metric[1])
            scores[file] = float(metric[2])
    if len(names) != 1 or len(scores) < len(found):
        raise CheckpointError(
            f"{path}: expected one .ckpt of the published draft, or several with one validation "
            f"metric in their names, found {len(found)}; name the file itself"
        )
    if LARGER_IS_BETTER.search(names.pop()):
        return max(scores, key=scores.__getitem__)
    return min(scores, key=scores.__getitem__)


def _load_draft(path: Path) -> Checkpoint:
    """Load a Lightning checkpoint of the published draft."""
    content = read_tensors(path)
    try:
        state = content["state_dict"]
        # A tensor of one stored number may claim any shape.
        if sum(value.numel() * value.itemsize for value in state.values()) > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        settings = content.get("hyper_parameters") or _settings_beside(path)
        model = MnemoDyn.from_reference(settings, _float32(path, state))
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    training = {"source": path.name, "source_sha256": sha256(path), "settings": dict(settings)}
    for name in ("epoch", "global_step"):
        if name in content:
            training[name] = content[name]
    return Checkpoint(model=model, training=training)


def _settings_beside(path: Path) -> dict:
    """The settings that Lightning's logger writes beside a checkpoint or one folder up."""
    for folder in (path.parent, path.parent.parent):
        file = folder / "hparams.yaml"
        if file.is_file():
            return load_yaml(file)
    raise ValueError("holds no hyper_parameters, and there is no hparams.yaml beside it")
