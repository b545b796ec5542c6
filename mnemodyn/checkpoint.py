"""A checkpoint: a folder with ``model.safetensors`` (weights) and ``config.json`` (everything needed to use them)."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.files import sha256, write_bytes, write_json
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn

__all__ = ["Checkpoint", "CheckpointError", "describe", "load_checkpoint", "save_checkpoint"]

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Checkpoint:
    """A network and what it was trained on.

    Attributes
    ----------
    model : MnemoDyn
        In evaluation mode.
    parcels : tuple of str
        Parcel names in the order of the columns the network reads.
    t_r : float
        Repetition time of the training scans, seconds.
    scaling : Scaling
        Applied to a scan before the network.
    data_fingerprint : str
        Fingerprint of the training scans.
    training : dict
        Objective, optimiser settings, participants, validation result.
    """

    model: MnemoDyn
    parcels: tuple[str, ...]
    t_r: float
    scaling: Scaling
    data_fingerprint: str
    training: dict

    def check(self, scan: Scan) -> None:
        """Refuse a scan whose parcels or their order the network was not trained on.

        Raises
        ------
        CheckpointError
            Naming the first parcel that differs.
        """
        if len(scan.parcels) != len(self.parcels):
            raise CheckpointError(
                f"{scan.source}: the checkpoint expects {len(self.parcels)} parcels, got {len(scan.parcels)}"
            )
        for i, (expected, got) in enumerate(zip(self.parcels, scan.parcels, strict=True)):
            if expected != got:
                kind = "in another order" if set(self.parcels) == set(scan.parcels) else "others"
                raise CheckpointError(
                    f"{scan.source}: parcels are {kind} than the checkpoint's: column {i} should be {expected!r}, "
                    f"got {got!r}"
                )


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; the JSON, which holds the weights' SHA-256, is written last.

    Parameters
    ----------
    folder : str or Path
        Created where it is missing; a checkpoint already there is replaced.
    checkpoint : Checkpoint

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder)
    weights = {k: v.detach().cpu().contiguous() for k, v in checkpoint.model.state_dict().items()}
    write_bytes(folder / "model.safetensors", save_tensors(weights))
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "mnemodyn": version("mnemodyn"),
            "model": checkpoint.model.config.to_dict(),
            "parcels": list(checkpoint.parcels),
            "t_r": checkpoint.t_r,
            "scaling": checkpoint.scaling.to_dict(),
            "data_fingerprint": checkpoint.data_fingerprint,
            "training": checkpoint.training,
            "weights_sha256": sha256(folder / "model.safetensors"),
        },
    )
    return folder


def describe(folder: str | Path) -> dict:
    """The JSON of a checkpoint, checked to be one.

    Raises
    ------
    CheckpointError
        If the folder or a file of it is missing, a file is damaged, or the format is another.
    """
    folder = Path(folder)
    path = folder / "config.json"
    for file in (path, folder / "model.safetensors"):
        if not file.is_file():
            raise CheckpointError(
                f"{folder} is no checkpoint: {file.name} is missing (expected a folder with "
                "config.json and model.safetensors)"
            )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, not a checkpoint's JSON ({error})") from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: format must be {FORMAT}, got {found}; another version of mnemodyn wrote it")
    weights = folder / "model.safetensors"
    if (found := sha256(weights)) != config.get("weights_sha256"):
        raise CheckpointError(
            f"{weights}: damaged: its SHA-256 is {found[:12]}..., config.json expects "
            f"{str(config.get('weights_sha256'))[:12]}...; copy or train it again"
        )
    return config


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a checkpoint; nothing in its files is executed.

    Parameters
    ----------
    folder : str or Path
        Folder with ``config.json`` and ``model.safetensors``.

    Returns
    -------
    Checkpoint
        Its model on the CPU, in evaluation mode.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or weights and configuration or parcels do not fit each other.
    """
    folder = Path(folder)
    config = describe(folder)
    path = folder / "model.safetensors"
    try:
        model = MnemoDyn(ModelConfig.from_dict(config["model"]))
        weights = load_tensors(path.read_bytes())
        checkpoint = Checkpoint(
            model=model.eval(),
            parcels=tuple(config["parcels"]),
            t_r=float(config["t_r"]),
            scaling=Scaling(**config["scaling"]),
            data_fingerprint=config["data_fingerprint"],
            training=config["training"],
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: config.json and weights do not make a checkpoint: {error}") from error
    own = model.state_dict()
    wrong = [f"{k}: missing" for k in own.keys() - weights.keys()]
    wrong += [f"{k}: unknown" for k in weights.keys() - own.keys()]
    wrong += [
        f"{k}: expected {tuple(own[k].shape)}, got {tuple(weights[k].shape)}"
        for k in own.keys() & weights.keys()
        if own[k].shape != weights[k].shape
    ]
    if wrong:
        raise CheckpointError(f"{path}: weights do not fit the configuration: {'; '.join(sorted(wrong)[:8])}")
    model.load_state_dict(weights)
    if len(checkpoint.parcels) != model.config.n_parcels:
        raise CheckpointError(f"{folder}: {len(checkpoint.parcels)} parcel names for {model.config.n_parcels} parcels")
    return checkpoint
