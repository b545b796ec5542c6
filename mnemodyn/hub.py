"""Publish a checkpoint on the Hugging Face Hub, with a model card written from its run."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from string import Template
from typing import Any, Literal

import pandas as pd

from mnemodyn.checkpoint import Checkpoint, from_pretrained, hub_errors, save_checkpoint
from mnemodyn.files import write_table, write_text
from mnemodyn.results import UNTRAINED_BLOCKS, label, literal, name_network, read_results

__all__ = ["publish", "write_folder"]

UNKNOWN = "not stated in the checkpoint"


def publish(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | None = None,
    **contents: Any,
) -> str:
    """Push what :func:`write_folder` writes in one commit and return the commit's address.

    Parameters
    ----------
    source : str or Path
        What :func:`~mnemodyn.checkpoint.from_pretrained` takes as a path.
    repo_id : str
        ``NAME/MODEL``; the repository is made where it is missing.
    private : bool, optional
        Whether a repository that is made is private.
    revision : str, optional
        Branch, which is made where it is missing; by default ``main``.
    subfolder : str
        Folder of the repository that everything goes into.
    token : str, optional
        By default ``HF_TOKEN`` or that of ``hf auth login``.
    **contents
        ``compat``, ``licence`` and ``results`` of :func:`write_folder`.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or it is damaged. Nothing was sent then.
    HubError
        If the hub refuses or cannot be reached. The commit is whole or was not made.
    """
    from huggingface_hub import HfApi

    # Everything is read and checked before the hub is asked for anything.
    with tempfile.TemporaryDirectory() as folder:
        write_folder(source, folder, repo_id=repo_id, subfolder=subfolder, **contents)
        api = HfApi(token=token, library_name="mnemodyn")
        with hub_errors(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            # One commit: the repository holds the old checkpoint or the new one, never a mixture.
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder or None,
                revision=revision,
                commit_message="Publish a MnemoDyn checkpoint",
            )
            return commit.commit_url


def write_folder(
    source: str | Path,
    folder: str | Path,
    *,
    compat: Literal["none", "reference"] = "none",
    repo_id: str = "NAME/MODEL",
    subfolder: str = "",
    licence: str = "mit",
    results: Sequence[str | Path] = (),
) -> Path:
    """Write what :func:`publish` pushes.

    These are the weights, ``config.json``, ``parcels.tsv``, the training's ``history.csv`` and the
    model card ``README.md``. Participants' identifiers are replaced by their number.

    Parameters
    ----------
    source, compat
        As in :func:`~mnemodyn.checkpoint.from_pretrained`; `source` is a path.
    folder : str or Path
        Where the files go.
    repo_id, subfolder : str
        How the card says to load it.
    licence : str
        An identifier of the hub, such as ``mit`` or ``cc-by-4.0``.
    results : sequence of str or Path
        Tables of results for the card, as :func:`mnemodyn.results.write_results` writes them; by
        default ``results.csv`` in the run's folder, where there is one.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or it is damaged.
    FileNotFoundError, ValueError
        If a table of results is missing, or is not one.
    """
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(repo_id):
        validate_repo_id(repo_id)
    source = Path(source)
    folder = Path(folder)
    checkpoint = _without_participants(from_pretrained(source, compat=compat))
    if not results:
        results = _beside(source, "results.csv")
    rows = [row for path in results for row in name_network(read_results(path)).itertuples()]
    save_checkpoint(folder, checkpoint)
    if checkpoint.parcels is not None:
        parcels = pd.DataFrame({"name": checkpoint.parcels})
        write_table(folder / "parcels.tsv", parcels.reset_index(names="index"))
    # metrics.csv is what the draft's trainer calls it.
    for path in _beside(source, "history.csv", "metrics.csv"):
        shutil.copyfile(path, folder / "history.csv")
    write_text(folder / "README.md", _card(checkpoint, repo_id, subfolder, licence, rows))
    return folder


def _beside(source: Path, *names: str) -> list[Path]:
    """The first file of one of these names in the folder of a checkpoint or one folder up."""
    if source.is_file():
        source = source.parent
    for folder in (source, source.parent):
        for name in names:
            if (folder / name).is_file():
                return [folder / name]
    return []


def _without_participants(checkpoint: Checkpoint) -> Checkpoint:
    """Replace the lists of participants by their lengths, because identifiers stay at home."""
    training = {}
    for name, value in checkpoint.training.items():
        if name.endswith("participants") and isinstance(value, list):
            name = f"n_{name}"
            value = len(value)
        training[name] = value
    return replace(checkpoint, training=training)


def _card(checkpoint: Checkpoint, repo_id: str, subfolder: str, licence: str, rows: list) -> str:
    """The model card: metadata that the hub reads, and what a person should know before use."""
    from huggingface_hub import ModelCardData

    training = checkpoint.training
    name = repo_id.rpartition("/")[2]
    metadata = ModelCardData(
        license=licence,
        library_name="mnemodyn",
        pipeline_tag="feature-extraction",
        tags=["fmri", "neuroimaging", "neural-operator", "wavelet"],
        model_name=name,
        eval_results=_eval_results(rows),
    )
    order = f"(names and order {UNKNOWN})"
    if checkpoint.parcels is not None:
        order = "in the order of parcels.tsv"
    t_r = UNKNOWN
    if checkpoint.t_r is not None:
        t_r = f"{checkpoint.t_r:g} s"
    scaling = UNKNOWN
    if checkpoint.scaling is not None:
        scaling = literal(checkpoint.scaling.method)
    trained_on = UNKNOWN
    if "n_train_participants" in training:
        trained_on = literal(
            f"{training['n_train_participants']} participants, and "
            f"{training['n_validation_participants']} to choose the checkpoint; "
            f"fingerprint of the data {checkpoint.data_fingerprint}"
        )
    argument = f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    settings = training.get("settings")
    if settings is not None:
        # Of the sections of a run's settings the others are said elsewhere on the card.
        settings = settings.get("training", settings)
    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    return template.substitute(
        asdict(checkpoint.model.config),
        metadata=metadata.to_yaml(),
        name=literal(name),
        repo_id=repo_id,
        argument=argument,
        n_parameters=f"{sum(p.numel() for p in checkpoint.model.parameters()):,}",
        order=order,
        t_r=t_r,
        scaling=scaling,
        trained_on=trained_on,
        objective=literal(_words(training.get("objective"))),
        settings=literal(_words(settings)),
        results=_results(rows, training),
        licence=literal(licence),
    )


def _eval_results(rows: list) -> list | None:
    """The results of this network itself, as the hub lists them; baselines are left to the text."""
    from huggingface_hub import EvalResult

    found = []
    for row in rows:
        # A difference from a baseline is no score that the hub could rank.
        if row.method in ("model", UNTRAINED_BLOCKS) and not row.against:
            found.append(
                EvalResult(
                    task_type="feature-extraction",
                    dataset_type="resting-state-fmri",
                    dataset_name=f"{row.data} ({row.kind})",
                    metric_type=row.score,
                    metric_name=f"{row.task}, {row.score}",
                    metric_value=row.value,
                )
            )
    return found or None


def _results(rows: list, training: dict) -> str:
    """The card's table of results, and what the validation participants gave."""
    lines = ["No results on held-out participants were published with these weights."]
    if rows:
        lines = [
            "| data | task | method | score | value | 95 % interval | n |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
    for row in rows:
        method = label(row.method)
        if row.against:
            method = f"{method} - {label(row.against)}"
        interval = "not given"
        if pd.notna(row.low):
            interval = f"{row.low:.3f} to {row.high:.3f}"
        n = "" if pd.isna(row.n) else row.n
        # SIMULATED results must not be mistaken for real ones.
        data = f"{row.data} ({row.kind})"
        said = [literal(text) for text in (data, row.task, method, row.score)]
        lines.append(f"| {' | '.join(said)} | {row.value:.3f} | {interval} | {n} |")
    validation = {name: value for name, value in training.items() if name.startswith("val_")}
    if validation:
        lines.append(
            f"\nOn the validation participants, who chose this checkpoint: {literal(_words(validation))}. "
            "Expect less elsewhere."
        )
    return "\n".join(lines)


def _words(settings: Any) -> str:
    """Settings as a line of text; those in a section follow the section's name."""
    if settings is None:
        return UNKNOWN
    if not isinstance(settings, dict):
        return str(settings)
    words = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = f"({_words(value)})"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        words.append(f"{name} {value}")
    return ", ".join(words)
