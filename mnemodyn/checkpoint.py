"""A checkpoint: a folder with ``model.safetensors`` (weights) and ``config.json`` (everything needed to use them).

The Lightning checkpoints of the published draft are read as well, with ``compat="reference"``.
"""

import json
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.files import sha256, write_bytes, write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn
from mnemodyn.model.reference import misfits, read_lightning

__all__ = ["Checkpoint", "CheckpointError", "describe", "load_checkpoint", "save_checkpoint"]

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Checkpoint:
    """A network in evaluation mode, and what it was trained on.

    That is its parcels in the order of the columns it reads; the repetition time of the training scans (s) and their
    fingerprint; the scaling that is applied to a scan before the network; and of the training the objective, optimiser
    settings, participants and validation result. A checkpoint of the published draft knows neither parcels, repetition
    time, scaling nor data: they are None, and ``dataclasses.replace`` fills in what is known from elsewhere.
    """

    model: MnemoDyn
    parcels: tuple[str, ...] | None
    t_r: float | None
    scaling: Scaling | None
    data_fingerprint: str | None
    training: dict

    def check(self, scan: Scan) -> None:
        """Refuse a scan whose parcels or their order the network was not trained on, naming the first that differs.

        Warns if the checkpoint does not know its parcels, so that no more than their number was checked.
        """
        expected = self.model.config.n_parcels
        if len(scan.parcels) != expected:
            raise CheckpointError(
                f"{scan.source}: the checkpoint expects {expected} parcels, got {len(scan.parcels)}"
            )
        if self.parcels is None:
            said = f"their number, {expected}, fits, but not their names or order were checked"
            warnings.warn(
                f"{scan.source}: the checkpoint does not know its parcels; {said}", stacklevel=2
            )
            return
        for i, (name, got) in enumerate(zip(self.parcels, scan.parcels, strict=True)):
            if name != got:
                kind = "in another order" if set(self.parcels) == set(scan.parcels) else "others"
                said = f"parcels are {kind} than the checkpoint's: column {i} should be {name!r}, got {got!r}"
                raise CheckpointError(f"{scan.source}: {said}")


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into a folder, which is made or whose checkpoint is replaced, and return the folder.

    The JSON, which holds the weights' SHA-256, is written last.
    """
    folder = Path(folder)
    weights = {k: v.detach().cpu().contiguous() for k, v in checkpoint.model.state_dict().items()}
    write_bytes(folder / "model.safetensors", save_tensors(weights))
    known = {
        name: getattr(checkpoint, name)
        for name in ("parcels", "t_r", "scaling", "data_fingerprint", "training")
    }
    known["scaling"] = None if checkpoint.scaling is None else checkpoint.scaling.to_dict()
    facts = {
        "format": FORMAT,
        "mnemodyn": version("mnemodyn"),
        "model": checkpoint.model.config.to_dict(),
        **known,
    }
    write_json(
        folder / "config.json", facts | {"weights_sha256": sha256(folder / "model.safetensors")}
    )
    return folder


def describe(folder: str | Path) -> dict:
    """The JSON of a checkpoint; a CheckpointError if a file is missing or damaged, or the format is another."""
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    if folder.is_file():
        mend = "a .ckpt of the published draft is loaded with load_checkpoint(path, compat='reference')"
        raise CheckpointError(f"{folder} is a file, not a checkpoint's folder; {mend}")
    for file in (path, weights):
        if not file.is_file():
            expected = "expected a folder with config.json and model.safetensors"
            raise CheckpointError(f"{folder} is no checkpoint: {file.name} is missing ({expected})")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, not a checkpoint's JSON ({error})") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: format must be {FORMAT}, got {found}; another version of mnemodyn wrote it"
        )
    found, expected = sha256(weights), str(config.get("weights_sha256"))
    if found != expected:
        said = f"its SHA-256 is {found[:12]}..., config.json expects {expected[:12]}...; copy or train it again"
        raise CheckpointError(f"{weights}: damaged: {said}")
    return config


def load_checkpoint(
    folder: str | Path, *, compat: Literal["none", "reference"] = "none"
) -> Checkpoint:
    """Load a checkpoint, its model on the CPU, in evaluation mode; nothing in its files is executed.

    `folder` has ``config.json`` and ``model.safetensors``; with ``compat="reference"`` it is a Lightning ``.ckpt`` of
    the published draft, its settings inside or in ``hparams.yaml`` beside it. A reference network saved in this
    package's format is loaded like any other.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or weights and configuration or parcels do not fit each other; weights
        that do not fit are named, with both shapes.
    """
    folder = Path(folder)
    if compat == "reference":
        return _load_lightning(folder)
    if compat != "none":
        raise ValueError(f"compat must be none or reference, got {compat!r}")
    config = describe(folder)
    path = folder / "model.safetensors"
    try:
        model = MnemoDyn(ModelConfig.from_dict(config["model"])).eval()
        weights = load_tensors(path.read_bytes())
        made: dict[str, Any] = {
            "parcels": tuple,
            "t_r": float,
            "scaling": lambda found: Scaling(**found),
        }
        known: dict = {
            k: None if config[k] is None else make(config[k]) for k, make in made.items()
        }
        checkpoint = Checkpoint(
            model, **known, **{k: config[k] for k in ("data_fingerprint", "training")}
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: config.json and weights do not make a checkpoint: {error}"
        ) from error
    if wrong := misfits(model.state_dict(), weights):
        raise CheckpointError(f"{path}: weights do not fit the configuration: {wrong}")
    model.load_state_dict(weights)
    if checkpoint.parcels is None and model.config.compat == "none":
        raise CheckpointError(
            f"{folder}: config.json names no parcels, which only reference networks may lack"
        )
    if checkpoint.parcels is not None and len(checkpoint.parcels) != model.config.n_parcels:
        raise CheckpointError(
            f"{folder}: {len(checkpoint.parcels)} parcel names for {model.config.n_parcels} parcels"
        )
    return checkpoint


def _load_lightning(path: Path) -> Checkpoint:
    if path.is_dir():
        ours = (path / "config.json").is_file()
        what = (
            "load_checkpoint(path), without compat, loads it"
            if ours
            else "give the .ckpt file itself"
        )
        raise CheckpointError(
            f"{path} is a folder, and compat='reference' expects a Lightning .ckpt file; {what}"
        )
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        settings, state, training = read_lightning(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        model = MnemoDyn.from_reference(settings, state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    training |= {"source": path.name, "source_sha256": sha256(path), "settings": settings}
    return Checkpoint(
        model, parcels=None, t_r=None, scaling=None, data_fingerprint=None, training=training
    )
