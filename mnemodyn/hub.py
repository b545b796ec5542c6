"""Checkpoints given to others and taken from them: Hugging Face Hub, folders, single files, the draft's versions.

Nothing that is read is ever executed: weights are safetensors (those of the published draft are read as tensors and
plain values only), everything else is JSON, YAML or text.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

import httpx2
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    snapshot_download,
)
from huggingface_hub import errors as hub_errors

from mnemodyn.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from mnemodyn.files import write_text

__all__ = [
    "HubError",
    "Source",
    "find_checkpoint",
    "from_pretrained",
    "publish",
    "save_network",
    "write_folder",
]

PEOPLE = ("train_participants", "validation_participants")
BEST = re.compile(r"(val\w*)=(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
LARGER_IS_BETTER = re.compile(r"acc|auc|r2|corr|f1")
CHECKPOINT_FILES = ("config.json", "model.safetensors")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write to it"


class HubError(RuntimeError):
    """The hub refused or was not reached; the message says what mends it."""


class Source(NamedTuple):
    """What :func:`find_checkpoint` settles on: a checkpoint, how to read it, and its training metrics (or None)."""

    checkpoint: Path
    compat: Literal["none", "reference"]
    metrics: Path | None


def find_checkpoint(source: str | Path) -> Source:
    """The checkpoint that a path stands for; a CheckpointError where there is none, or the best is not clear.

    `source` is a checkpoint's folder or one of its two files; a run's folder, whose best checkpoint by validation is
    taken; a ``.ckpt`` of the published draft; or a version folder of its trainer, where the file with the best
    validation metric in its name is taken: the lowest, or the highest of an accuracy, correlation, AUC, F1 or R2.
    """
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}")
    if path.is_file() and path.name in CHECKPOINT_FILES:
        path = path.parent
    for folder in (path, path / "best"):
        if (folder / "config.json").is_file():
            return Source(folder, "none", _beside(folder / "config.json", "history.csv"))
    if (path / "run.json").is_file():
        raise CheckpointError(
            f"{path} is a run without best/: let its training come to its end, then try again"
        )
    if path.is_file() and path.suffix != ".ckpt":
        files = " or ".join(CHECKPOINT_FILES)
        raise CheckpointError(
            f"{path} is no checkpoint: expected its folder, its {files}, or a .ckpt"
        )
    found = (
        [path] if path.is_file() else [p for p in sorted(path.rglob("*.ckpt")) if p.stem != "last"]
    )
    if len(found) != 1:
        scored = [(match[-1], p) for p in found if (match := BEST.findall(p.stem))]
        if not found or len(scored) < len(found) or len({name for (name, _), _ in scored}) > 1:
            what = (
                f"{len(found)} .ckpt files that do not all name one validation metric"
                if found
                else "no checkpoint"
            )
            raise CheckpointError(f"{path} holds {what}; name the checkpoint itself")
        sign = -1 if LARGER_IS_BETTER.search(scored[0][0][0]) else 1
        found = [min(scored, key=lambda item: sign * float(item[0][1]))[1]]
    return Source(found[0], "reference", _beside(found[0], "metrics.csv"))


def _beside(path: Path, name: str) -> Path | None:
    return next(
        (
            folder / name
            for folder in (path.parent, path.parent.parent)
            if (folder / name).is_file()
        ),
        None,
    )


def from_pretrained(
    name_or_path: str | Path,
    *,
    compat: Literal["none", "reference"] = "none",
    revision: str | None = None,
    subfolder: str = "",
    **download: Any,
) -> Checkpoint:
    """Load a checkpoint from the hub, a folder or a file; nothing in it is executed.

    `name_or_path` is ``NAME/MODEL`` on the hub, or what :func:`find_checkpoint` takes; what is there as a path is not
    looked for on the hub. `compat` is ``reference`` for a Lightning ``.ckpt`` of the published draft, here or on the
    hub; `revision` a branch, tag or commit; `subfolder` the folder of the repository or path that holds the checkpoint;
    `download` as in ``huggingface_hub.snapshot_download``: ``token`` (by default ``HF_TOKEN`` or that of ``hf auth
    login``), ``cache_dir``, ``force_download`` and so on.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or it is damaged.
    HubError
        If the hub is not reached, or has no such repository or revision for this token.
    """
    path = Path(name_or_path)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
            raise CheckpointError(
                f"there is no file or folder {name_or_path}, and it is no NAME/MODEL of the hub"
            )
        wanted = CHECKPOINT_FILES if compat == "none" else ("*.ckpt", "hparams.yaml")
        inside = f"{subfolder}/" if subfolder else ""
        with _explained(f"{name_or_path} (no file or folder here)", revision):
            patterns = [inside + name for name in wanted]  # * matches / too
            path = Path(
                snapshot_download(
                    str(name_or_path), revision=revision, allow_patterns=patterns, **download
                )
            )
        if not (path / subfolder).is_dir():
            place = (
                f"in its folder {subfolder or '/'}{f' at revision {revision}' if revision else ''}"
            )
            mend = "give subfolder, or another revision"
            raise CheckpointError(
                f"{name_or_path} on the hub has no {' and '.join(wanted)} {place}; {mend}"
            )
    found = find_checkpoint(path / subfolder if subfolder else path)
    if found.compat != compat:
        mend = (
            "without compat"
            if found.compat == "none"
            else "with compat='reference' (--compat reference)"
        )
        raise CheckpointError(
            f"{found.checkpoint}: not a checkpoint of compat={compat!r}; load it {mend}"
        )
    return load_checkpoint(found.checkpoint, compat=compat)


def publish(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str = "",
    commit_message: str = "Publish a MnemoDyn checkpoint",
    token: str | None = None,
    **contents: Any,
) -> str:
    """Push what :func:`write_folder` writes (which takes `source` and `contents`) in one commit; returns its address.

    The repository is made where it is missing, and then `private` or not; so is `revision`, a branch. Everything goes
    into the folder `subfolder` of it. The token is by default ``HF_TOKEN`` or that of ``hf auth login``.

    Raises
    ------
    CheckpointError
        As :func:`write_folder`; nothing was sent.
    HubError
        If the hub refuses or is not reached. The commit is whole or was not made.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(source, temporary, repo_id=repo_id, subfolder=subfolder, **contents)
        api = HfApi(token=token, library_name="mnemodyn")
        with _explained(repo_id, revision):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            place: dict = {
                "repo_id": repo_id,
                "path_in_repo": subfolder or None,
                "revision": revision,
            }
            return api.upload_folder(
                **place, folder_path=folder, commit_message=commit_message
            ).commit_url


def write_folder(
    source: str | Path,
    folder: str | Path,
    *,
    repo_id: str = "NAME/MODEL",
    subfolder: str = "",
    licence: str = "mit",
    results: Sequence[str | Path] = (),
    metrics: str | Path | None = None,
    hyper_parameters: str | Path | None = None,
    keep_participants: bool = False,
) -> Path:
    """Write what :func:`publish` pushes: weights, ``config.json``, ``parcels.tsv``, ``history.csv``, ``README.md``.

    `source` is as in :func:`find_checkpoint`; `repo_id` and `subfolder` are how the card says to load it; `licence` is
    an identifier of the hub, such as ``mit`` or ``cc-by-4.0``; `results` are JSON files for the card, as the notebooks
    write them; `metrics` is a CSV of training metrics, where it is not beside the checkpoint; `hyper_parameters` a YAML
    of settings, for a ``.ckpt`` that has none inside or beside it. `keep_participants` publishes the identifiers of
    training participants too, and not their numbers only. A CheckpointError is as of :func:`find_checkpoint`, or where
    a named file is missing or cannot be read.
    """
    found, folder = find_checkpoint(source), Path(folder)
    metrics = found.metrics if metrics is None else Path(metrics)
    for path in (*results, *(p for p in (metrics, hyper_parameters) if p is not None)):
        if not Path(path).is_file():
            raise CheckpointError(f"there is no file {path}")
    with tempfile.TemporaryDirectory() as temporary:
        path = found.checkpoint
        if hyper_parameters is not None:
            if found.compat == "none":
                raise CheckpointError(
                    f"{path}: its config.json holds its hyper-parameters; leave hyper_parameters out"
                )
            path = Path(temporary, path.name)
            path.symlink_to(found.checkpoint.resolve())
            shutil.copy(hyper_parameters, Path(temporary, "hparams.yaml"))
        checkpoint = load_checkpoint(path, compat=found.compat)
    rows = []
    for path in results:
        try:
            rows += _results(Path(path).stem, json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(f"{path}: not a JSON of results ({error})") from error
    _write(checkpoint, folder, (repo_id, subfolder, licence), rows, keep_participants)
    if metrics is not None:
        shutil.copyfile(metrics, folder / "history.csv")
    return folder


def save_network(model: Any, folder: Path) -> None:
    """What ``MnemoDyn.save_pretrained`` and ``push_to_hub`` write: its weights, and what came with them.

    A CheckpointError for one that did not come from ``from_pretrained``: weights alone do not say what they are for.
    """
    if model.checkpoint is None:
        raise CheckpointError(
            "this network does not know its parcels, scaling and repetition time; save it with "
            "mnemodyn.save_checkpoint, and publish that folder with `mnemodyn publish`, or set model.checkpoint"
        )
    _write(replace(model.checkpoint, model=model), folder, ("NAME/MODEL", "", "mit"), [], False)


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    names: tuple[str, str, str],
    rows: list[dict],
    people: bool,
) -> None:
    """A checkpoint, its parcels and its card; names are the repository, the folder in it, and the licence."""
    if not people:
        counts = {k: (f"n_{k}", len(v)) for k, v in checkpoint.training.items() if k in PEOPLE}
        checkpoint = replace(
            checkpoint,
            training=dict(counts.get(item[0], item) for item in checkpoint.training.items()),
        )
    save_checkpoint(folder, checkpoint)
    if checkpoint.parcels is not None:
        lines = [f"{i}\t{name}" for i, name in enumerate(checkpoint.parcels)]
        write_text(folder / "parcels.tsv", "\n".join(["index\tname", *lines]) + "\n")
    write_text(folder / "README.md", str(_card(checkpoint, *names, rows)))


def _results(name: str, content: Any) -> list[dict]:
    """Rows for the card: every number of a results' JSON under `r2_hidden`, with its interval, else its top level."""
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping, got {type(content).__name__}")
    values, label, intervals = content, "", {k: content.get(f"{k}_interval") for k in content}
    if isinstance(content.get("r2_hidden"), dict):
        values, label, intervals = (
            content["r2_hidden"],
            "R² of hidden entries, ",
            content.get("r2_hidden_interval", {}),
        )
        n = content.get("n_participants")
        name = f"{n} held-out participants" if n else "held-out participants"
    rows = []
    for k, v in values.items():
        v, ends = (
            (v.get("value"), [v.get("low"), v.get("high")])
            if isinstance(v, dict)
            else (v, intervals.get(k))
        )
        if isinstance(v, (int, float)) and not isinstance(v, bool):
            ends = ends if isinstance(ends, list) and len(ends) == 2 and None not in ends else None
            ours = not label or k == "model"
            rows.append(
                {"name": f"{label}{k}", "value": v, "interval": ends, "ours": ours, "on": name}
            )
    return rows


def _card(
    checkpoint: Checkpoint, repo_id: str, subfolder: str, licence: str, rows: list[dict]
) -> ModelCard:
    """The model card: metadata that the hub reads, and what a person should know before use."""
    config, training = checkpoint.model.config, checkpoint.training
    scores = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="resting-state-fmri",
            dataset_name=row["on"],
            metric_type="r_squared" if "R²" in row["name"] else "score",
            metric_name=row["name"],
            metric_value=row["value"],
        )
        for row in rows
        if row["ours"]  # a baseline's score is no result of this network
    ]
    data = ModelCardData(
        license=licence,
        library_name="mnemodyn",
        pipeline_tag="feature-extraction",
        tags=["fmri", "neuroimaging", "neural-operator", "wavelet"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=scores or None,
    )
    unknown = "not recorded in the checkpoint"
    people = [len(training[k]) if k in training else training.get(f"n_{k}") for k in PEOPLE]
    fingerprint = checkpoint.data_fingerprint
    trained = (
        f"{people[0]} participants, {people[1]} to choose it; fingerprint of the data {fingerprint}"
    )
    results = ["No results on held-out participants were published with these weights."]
    if rows:
        results = ["| measure | value | 95 % interval | on |", "| --- | --- | --- | --- |"]
    for row in rows:
        ends = "{:.3f} to {:.3f}".format(*row["interval"]) if row["interval"] else "not given"
        results.append(f"| {row['name']} | {row['value']:.3f} | {ends} | {row['on']} |")
    if chosen := {
        k: v for k, v in training.items() if k.startswith("val_") and isinstance(v, float)
    }:
        said = f"On the validation participants, which chose this checkpoint: {_words(chosen)}. Expect less elsewhere."
        results.append(f"\n{said}")
    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    text = template.substitute(
        config.to_dict(),
        metadata=data.to_yaml(),
        name=data.model_name,
        n_parameters=f"{sum(p.numel() for p in checkpoint.model.parameters()):,}",
        order="in the order of parcels.tsv"
        if checkpoint.parcels
        else f"(names and order {unknown})",
        t_r=f"{checkpoint.t_r:g} s" if checkpoint.t_r else unknown,
        scaling=checkpoint.scaling.method if checkpoint.scaling else unknown,
        trained=unknown if people[0] is None else trained,
        objective=_words(training.get("objective")) or unknown,
        settings=_words(training.get("settings")) or unknown,
        repo_id=repo_id,
        subfolder=f', subfolder="{subfolder}"' if subfolder else "",
        option=f" --subfolder {subfolder}" if subfolder else "",
        results="\n".join(results),
        licence=licence,
    )
    return ModelCard(text)


def _words(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "" if settings is None else str(settings)
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items()
    )


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Whatever the hub's library raises becomes one sentence that says what to do."""
    try:
        yield
    except hub_errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no NAME/MODEL of the hub: {_first_line(error)}") from error
    except (
        hub_errors.HfHubHTTPError,
        httpx2.TransportError,
        RuntimeError,
        OSError,
        ValueError,
    ) as error:
        raise HubError(f"{repo_id}: {_mend(error, revision)}") from error


def _mend(error: Exception, revision: str | None) -> str:
    said, status = (
        _first_line(error),
        getattr(getattr(error, "response", None), "status_code", None),
    )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; look at its branches and tags"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"no such repository for this token. Check the name; if it is private, {LOGIN}"
    if isinstance(error, hub_errors.LocalTokenNotFoundError):
        return f"no token; {LOGIN}"
    if status in (401, 403):
        return f"the hub refused the token (status {status}); {LOGIN}"
    if isinstance(
        error,
        (
            hub_errors.OfflineModeIsEnabled,
            hub_errors.LocalEntryNotFoundError,
            httpx2.TransportError,
        ),
    ):
        mend = "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and try again"
        return f"{constants.ENDPOINT} was not reached and no copy is here ({said}); {mend}"
    if isinstance(error, hub_errors.HfHubHTTPError):
        return f"the hub answered with an error (status {status}): {said}"
    if isinstance(error, ValueError):
        return f"the hub refused the model card: {' '.join(str(error).split())}"
    said = _first_line(error.__cause__ or error)
    return f"the transfer broke off ({said}); nothing was changed there, run the same command again"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :200
    ]
