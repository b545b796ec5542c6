"""The ``mnemodyn`` command: a function for every sub-command, whose docstring is its page of help."""

import argparse
import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import mnemodyn
from mnemodyn.files import find_root, write_json, write_text
from mnemodyn.parameters import ParameterError, read_yaml
from mnemodyn.run import first_results
from mnemodyn.provenance import installed_version

_START = """\
start here:
  mnemodyn embed SCANS/ -o embeddings.csv --checkpoint NAME/MODEL     a vector a scan
  mnemodyn COMMAND --help                                             what a command takes, with examples

exit status: 0 done; 1 the work failed, and the message says what mends it; 2 wrong usage.
"""
_MENDS = {
    errno.ENOSPC: "make room there or name another place, and give the same command again",
    errno.EACCES: "name a place that you may read and write",
    errno.EPERM: "name a place that you may read and write",
    errno.EROFS: "name a place that you may write",
    errno.EEXIST: "name a folder in its place",
    errno.ENOTDIR: "name a folder in its place",
}

# What a command comes back with: what --json prints, what a person reads, and the exit status where it is not 0.
Done = tuple[Any, str] | tuple[Any, str, int]


class Command(NamedTuple):
    """A sub-command: its heading and line in the list of all, what it does, and what it takes."""

    group: str
    line: str
    run: Callable[..., Done]
    arguments: tuple


COMMANDS: dict[str, Command] = {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`arguments`, by default those of the process) and return its exit status.

    That is 0 done, 1 the work failed, 2 a refused parameter, 130 interrupted. From argparse comes SystemExit: 0 after
    ``--help`` or ``--version``, 2 on wrong usage.
    """
    options = vars(_parser().parse_args(arguments))
    if arguments is None:
        warnings.showwarning = lambda message, *_: print(f"mnemodyn: {message}", file=sys.stderr)
        warnings.filterwarnings(
            "ignore", "Detected pickle protocol|IProgress not found|.* is deprecated"
        )
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    run, as_json = COMMANDS[options.pop("command")].run, options.pop("json", False)
    try:
        if os.path.isdir(options.get("out") or ""):
            raise ParameterError(f"{options['out']} is a folder; name the file to write")
        content, text, *status = run(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        )
    except KeyboardInterrupt:
        if arguments is not None:
            raise
        return _fail("interrupted", 130)
    except ParameterError as error:
        return _fail(error, 2)
    except OSError as error:
        said = "; ".join(filter(None, (error.strerror, _MENDS.get(error.errno or 0))))
        return _fail(f"{error.filename or options.get('output')}: {said}" if said else error, 1)
    except (ImportError, RuntimeError, ValueError) as error:
        return _fail(error, 1)
    if text:
        print(_json(content) if as_json else text)
    return status[0] if status else 0


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _fail(error: object, status: int) -> int:
    print(f"mnemodyn: {error}", file=sys.stderr)
    return status


@contextmanager
def _asked(refused: Any = (OSError, ValueError), of: str = "") -> Iterator[None]:
    """What is refused in here is wrong usage."""
    try:
        yield
    except refused as error:
        raise ParameterError(f"{of}{error}") from error


class _Help(argparse.RawDescriptionHelpFormatter):
    """Text as it is written; commands are listed there, under headings."""

    def _format_action(self, action: argparse.Action) -> str:
        return (
            "" if isinstance(action, argparse._SubParsersAction) else super()._format_action(action)
        )


def _parser() -> argparse.ArgumentParser:
    groups: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        groups.setdefault(command.group, []).append(f"    {name:<12} {command.line}")
    listed = "\n".join(line for group, lines in groups.items() for line in (f"  {group}:", *lines))
    installed = installed_version("mnemodyn") or "(not installed)"
    said = f"Operator learning for resting-state fMRI: a reproducible research book.\n\ncommands:\n{listed}"
    parser = argparse.ArgumentParser(
        prog="mnemodyn", description=said, epilog=_START, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"mnemodyn {installed}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        described, *examples = cleandoc(command.run.__doc__ or "").partition("examples:\n")
        texts: Any = {"help": command.line, "description": described, "epilog": "".join(examples)}
        sub = commands.add_parser(name, **texts, formatter_class=_Help)
        for names, settings in command.arguments:
            sub.add_argument(*names, **settings)
    return parser


def _arg(usage: str, help: str | None = None, **settings: Any) -> tuple[list[str], dict[str, Any]]:
    """An argument as usage has it: ``-o --output FILE``, ``SCANS...`` for several, ``[NAME]``, no word for a switch."""
    names = [word for word in usage.split() if word.startswith("-")]
    values = tuple(word.strip(".[]") for word in usage.split() if not word.startswith("-"))
    default = settings.get("default")
    if isinstance(default, (int, str)) and default:
        settings.setdefault("type", type(default))
        help = f"{help or ''} (default: {default})".strip()
    if settings.get("action") == "append":
        settings["default"] = []
    if values:
        settings |= {"metavar": values[0] if len(values) == 1 else values}
        nargs = {".": "+", "]": "?"}.get(usage[-1], 2 if len(values) == 2 else None)
        settings |= {"nargs": nargs} if nargs else {}
    elif not {"action", "choices"} & set(settings):
        settings["action"] = "store_true"
    return names or [values[0].lower()], {"help": help, **settings}


_JSON = _arg("--json", "print what was done as JSON")


def _command(listed: str, *arguments: tuple) -> Callable:
    """Make the function below the sub-command of its name, listed as ``heading: what it does``."""
    group, line = listed.split(": ")

    def register(run: Callable[..., Done]) -> Callable:
        COMMANDS[run.__name__.strip("_")] = Command(group, line, run, arguments)
        return run

    return register


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(
            f"\r{done} of {total} scans",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )


def _file(name: str | None) -> dict:
    """The mapping in a YAML or JSON file; - is standard input, None an empty one."""
    if name is None:
        return {}
    if name != "-" and not Path(name).is_file():
        raise ParameterError(f"there is no parameters file {name}")
    with _asked(ValueError, f"{name}: "):
        content = read_yaml(
            sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        )
    if not isinstance(content, dict):
        raise ParameterError(f"{name} must hold a mapping 'name: value', got {content!r}")
    return content


def _values(given: Sequence, read: Callable[[str], Any]) -> dict:
    found = {}
    for name, value in given:
        with _asked(ValueError, f"{name}: "):
            found[name] = read(value)
    return found


_COHORT = _arg("COHORT", "a shipped cohort's name, or a YAML file that describes one")
_WORKERS = _arg("--workers N", "processes that read", default=1)


@_command(
    "scans: say what scans a folder holds",
    _COHORT,
    _arg("FOLDER", "folder of the scans; nothing in it is changed"),
    _arg("--json", "print JSON, with every excluded file"),
    _arg("--table FILE", "write a row a usable scan: .csv, or .tsv"),
    _WORKERS,
)
def _index(cohort: str, folder: str, table: str, workers: int) -> Done:
    """Find a cohort's scans in FOLDER, match them with their phenotypes, read each once, and print what is there:
    scans, participants, sites, frames, repetition times, every target's distribution, and what was left out and why.

    Cohorts of the package: abide, adhd200, adni, bids, hbn, hcp_aging, nkir, ukb.
    """
    found = _found(cohort, folder, workers)
    if table:
        write_text(
            table, found.table.to_csv(index=False, sep="," if table.endswith(".csv") else "\t")
        )
    return found.summary(), str(found)


def _found(cohort: str, folder: str, workers: int) -> Any:
    from mnemodyn.data import cohorts

    with _asked():
        described = cohorts.load_cohort(cohort)
    return cohorts.index(described, folder, progress=_progress, workers=workers)


@_command(
    "scans: turn dense series or volumes into parcels",
    _arg("SOURCES...", "files, or folders that are searched"),
    _arg("-o --output FOLDER", "where the scans go", required=True),
    _arg(
        "--atlas ATLAS",
        "schaefer400-tian3, a .dlabel.nii, or a .nii.gz of labels for volumes",
        required=True,
    ),
    _arg("--low-pass HZ", "upper end of the band that is kept (needs nilearn)", type=float),
    _arg("--high-pass HZ", "lower end of the band that is kept (needs nilearn)", type=float),
    _arg("--confounds COLUMN...", "regressed out (needs nilearn)", default=[]),
    _arg("--surfaces LEFT RIGHT", "midthickness surfaces, fs_LR 32k", default=[]),
    _arg("--t-r SECONDS", "repetition time of files that state none", type=float),
    _arg("--table", "write _timeseries.tsv in place of .ptseries.nii"),
    _arg("--jobs N", "scans at a time; a dense one of 1,200 frames needs 1 GB", default=1),
    _JSON,
)
def _preprocess(sources: Sequence[str], output: str, jobs: int, **settings: Any) -> Done:
    """Turn dense series (.dtseries.nii), or volumes, into parcels, with a JSON sidecar each:
    sub-*/func/*_seg-ATLAS_stat-mean_timeseries.ptseries.nii. What is complete already is skipped, so that an ended run
    goes on.

    Volumes need a label volume as atlas, or Connectome Workbench (wb_command) and --surfaces in the volumes' space.

    examples:
      mnemodyn preprocess derivatives/fmriprep -o parcels --atlas schaefer400-tian3 --jobs 4
      mnemodyn preprocess derivatives/fmriprep -o parcels --atlas my.dlabel.nii --high-pass 0.01 \\
          --confounds trans_x trans_y trans_z rot_x rot_y rot_z csf white_matter
      mnemodyn preprocess sub-01_task-rest_bold.nii.gz -o parcels --atlas schaefer400-tian3 \\
          --surfaces L.surf.gii R.surf.gii

    exit status: 0 done; 1 some scans failed, which are listed with the reason; 2 wrong usage.
    """
    from mnemodyn.data.preprocess import Preprocessing, preprocess

    with _asked(ValueError):
        rows = preprocess(sources, output, Preprocessing(**settings), jobs=jobs)
    failed = rows.loc[rows["status"] == "failed", ["problem", "message"]].to_dict("records")
    for row in failed:
        print(f"{row['problem']}: {row['message']}", file=sys.stderr)
    counts = {
        status: int((rows["status"] == status).sum()) for status in ("done", "skipped", "failed")
    }
    text = ", ".join(f"{n} {status}" for status, n in counts.items())
    return {**counts, "output": output, "problems": failed}, text, int(bool(failed))


@_command(
    "scans: write a cohort's scans into a store",
    _COHORT,
    _arg("FOLDER", "where its scans are"),
    _arg("STORE", "folder of the store, new or with scans of the same parcels"),
    _arg(
        "--dtype",
        "float16: z-scores, to 0.0002 SD; float32: as is",
        default="float16",
        choices=["float16", "float32"],
    ),
    _WORKERS,
    _JSON,
)
def _convert(cohort: str, folder: str, store: str, dtype: str, workers: int) -> Done:
    """Write every usable scan of a cohort into a store, a directory that training reads at the speed of the disk.

    May be killed at any moment and started again. With more scans in FOLDER it adds those to STORE.
    What could not be used is listed in the store with the reason (mnemodyn.data.store.Store(STORE).excluded).
    """
    from mnemodyn.data.store import convert

    made = convert(_found(cohort, folder, workers), store, dtype=dtype, progress=_progress)
    content = {"store": store, "n_scans": len(made), "n_excluded": len(made.excluded)}
    return content, f"{store}: {made.summary()}"


@_command(
    "scans: write a SIMULATED cohort",
    _arg("COHORT", "abide, adhd200, adni, hbn, hcp_aging, nkir or ukb"),
    _arg("FOLDER", "where it goes; must be empty or absent"),
    _arg("--participants N", "people", default=40, dest="n_participants"),
    _arg("--seed S", type=int, default=0),
    _arg("--parcels N", "even", default=40, dest="n_parcels"),
    _arg("--frames N", "as in the real cohort by default", type=int, dest="n_frames"),
    _arg(
        "--effect NAME D",
        "of a target, site or mean_fd, in SD (default: 1); may be repeated",
        action="append",
    ),
    _arg("--generator", choices=("ou", "hcp7"), default="ou"),
    _JSON,
)
def _simulate(cohort: str, folder: str, effect: Sequence, **settings: Any) -> Done:
    """Write a SIMULATED cohort: scans in the real one's formats and folders, its phenotype table, a few broken files,
    and effects of known size on connectivity. FOLDER/simulated.json says what was planted.
    """
    from mnemodyn.data.simulate import simulate_cohort

    with _asked(ValueError):
        truth = simulate_cohort(cohort, folder, effects=_values(effect, float), **settings)
    planted = ", ".join(f"{name} {e['d']:g}" for name, e in truth["effects"].items())
    return truth, f"SIMULATED {truth['cohort']} -> {folder}; effects in SD: {planted}"


@_command(
    "a model: pretrain a network on scans without labels",
    _arg("DATA", "hcp7, or a folder of scans"),
    _arg("OUTPUT", "folder of the run; an interrupted one is gone on with"),
    _arg("--objective NAME", "what is learned", default="masked"),
    _arg("--config FILE", "YAML file of settings in sections; - is standard input"),
    _arg(
        "-s --set NAME VALUE",
        "one setting, in any section; may be repeated, wins over --config",
        action="append",
    ),
    _arg("--restart", "give up an unfinished run of other settings in OUTPUT"),
    _JSON,
)
def _pretrain(
    data: str, output: str, objective: str, config: str | None, set: Sequence, restart: bool
) -> Done:
    """Pretrain a network on scans without labels.

    OUTPUT gets the two best checkpoints (best, second), history.csv, and run.json with the settings, the commit and
    the data's fingerprint. The same command goes on with a run that was interrupted. Settings stand in the sections
    model, objective, training, machine and data of a YAML file.

    examples:
      mnemodyn pretrain hcp7 runs/masked -s epochs 16
      mnemodyn pretrain SCANS runs/latent --objective latent --config my.yaml -s devices 4 -s strategy ddp

    objectives: masked, denoise, autoencode, latent, forecast, groups, mixed.
    exit status: 0 done; 1 the training failed; 2 wrong usage or a refused setting.
    """
    from mnemodyn.data.scans import split_participants
    from mnemodyn.pretrain.config import configure
    from mnemodyn.pretrain.training import pretrain

    with _asked():
        settings = _values(set, read_yaml)
        asked, model, training, machine, read = configure(objective, _file(config), settings)
    scans = mnemodyn.load_scans(data, t_r=read.t_r or None)
    held_out = {"n_test": read.n_test, "n_validation": read.n_validation}
    train, validation, _ = split_participants(scans, **held_out)
    network = mnemodyn.ModelConfig(n_parcels=len(scans[0].parcels), **model)
    how = {
        "objective": asked,
        "training": training,
        "scaling": mnemodyn.Scaling(read.scaling),
        "machine": machine,
    }
    checkpoint, history = pretrain(train, validation, output, model=network, restart=restart, **how)
    best, score = Path(output) / "best", checkpoint.training[asked.monitor]
    content = {"checkpoint": str(best), "epochs": len(history), asked.monitor: score}
    return content, f"{best}: {asked.monitor} {score:.4f}, {len(history)} epochs"


@_command(
    "a model: predict a target from a cohort's scans",
    _COHORT,
    _arg("SOURCE", "folder of the scans, or a store"),
    _arg("--target T", "one of the cohort's targets", required=True),
    _arg("--json OUT", "where the scores go", required=True, dest="out"),
    _arg("--checkpoint CHECKPOINT", "folder or file, or NAME/MODEL on the hub"),
    _arg("--method M...", "such as fc, tangent, model+fc, finetune_all", dest="methods"),
    _arg("--folds N", default=5, dest="n_folds"),
    _arg("--repeats N", default=5, dest="n_repeats"),
    _arg("--leave-one-site-out", "in place of folds", dest="by_site"),
    _arg("--control", "shuffled labels, or scans of white noise", choices=("permuted", "noise")),
    _arg("--cache DIR", "keep read-outs and folds here, so that a second run goes on"),
    _arg("--jobs N", "processes", default=1, dest="n_jobs"),
    _arg("--seed S", type=int, default=0),
)
def _evaluate(
    cohort: str,
    source: str,
    target: str,
    out: str,
    methods: Sequence,
    control: str,
    by_site: bool,
    **settings: Any,
) -> Done:
    """Predict a target from a cohort's scans by several methods on the same folds over participants, and write scores
    with 95 % intervals. Without --method: confounds and fc, and with --checkpoint model and model+fc too.

    examples:
      mnemodyn evaluate hbn FOLDER --target sex --json sex.json
      mnemodyn evaluate abide STORE --target diagnosis --checkpoint NAME/MODEL --json diagnosis.json --jobs 4
    """
    from mnemodyn import splits
    from mnemodyn.data import cohorts
    from mnemodyn.evaluate import downstream

    checkpoint, seed = settings["checkpoint"], settings["seed"]
    n_folds, n_repeats = settings.pop("n_folds"), settings.pop("n_repeats")
    methods = methods or ("confounds", "fc", *(("model", "model+fc") if checkpoint else ()))
    with _asked():
        described = cohorts.load_cohort(cohort)
        kinds = {known.name: known.kind for known in described.targets}
        if target not in kinds:
            known = f"{', '.join(kinds)} for {described.name}"
            raise ValueError(
                f"--target must be one of {known}, got {target!r}; a cohort's YAML can describe others"
            )
        if wrong := [m for m in methods if m not in downstream.METHODS]:
            raise ValueError(
                f"--method must be among {', '.join(downstream.METHODS)}, got {wrong[0]!r}"
            )
    settings["checkpoint"] = mnemodyn.from_pretrained(checkpoint) if checkpoint else None
    opened = downstream.open_scans(described, source, workers=settings["n_jobs"])
    task = downstream.Task.of(opened.table, target, kinds[target])
    scans: Sequence = downstream.Rows(opened, task.rows)
    repeated = partial(
        splits.repeated_folds, target=target, n_folds=n_folds, n_repeats=n_repeats, seed=seed
    )
    folds = (splits.leave_one_site_out if by_site else repeated)(task.table)
    if control == "permuted":
        task = downstream.permuted(task, seed)
    elif control == "noise":
        scans = downstream.noise_scans(scans, seed)
    settings |= {"say": partial(print, file=sys.stderr, flush=True)} if sys.stderr.isatty() else {}
    found = downstream.evaluate(scans, task, folds, methods, **settings)
    about = {"cohort": described.name, "simulated": opened.simulated, "control": control}
    content: dict = about | {"excluded": len(opened.excluded)} | downstream.report(found, seed=seed)
    write_json(out, content)
    folds.write(Path(out).with_suffix(".folds.csv"))
    lines = []
    for row in content["rows"]:
        value = row[task.metric]
        shown = (
            f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
            if row["failed"] == []
            else "FAILED"
        )
        lines.append(f"{row['method']}: {task.metric} {shown}, n = {row['n']}")
    return content, "\n".join(lines), int(any(row["failed"] for row in content["rows"]))


@_command(
    "a model: describe a checkpoint",
    _arg("CHECKPOINT", "folder of a run or a checkpoint, or a file of the latter"),
)
def _info(checkpoint: str) -> Done:
    """Print what a checkpoint holds (architecture, data, training) as JSON."""
    from mnemodyn.checkpoint import describe
    from mnemodyn.hub import find_checkpoint

    content = describe(find_checkpoint(checkpoint).checkpoint)
    return content, _json(content)


# What names a checkpoint, and how scans are read.
_CHECKPOINT = (
    _arg("-c --checkpoint CHECKPOINT", "folder or file, or NAME/MODEL on the hub", required=True),
    _arg("--revision NAME", "branch, tag or commit on the hub"),
    _arg("--subfolder FOLDER", "where in the repository it is", default=""),
    _arg("--compat", "reference: a draft's .ckpt", default="none", choices=["none", "reference"]),
    _arg("--scaling METHOD", "for a checkpoint that does not know its own"),
    _arg("--device DEVICE", "cpu or cuda", default="cpu"),
    _arg("--t-r SECONDS", "for files that do not state it", type=float),
    _arg(
        "--frames-first",
        "rows are frames, where a file does not say",
        action=argparse.BooleanOptionalAction,
    ),
    _arg("--max-constant-parcels N", "that a scan may have (default: 0)", type=int, default=0),
    _JSON,
)


def _checkpoint(
    checkpoint: str,
    revision: str | None,
    subfolder: str,
    compat: Any,
    scaling: str | None,
    device: str,
    **others: Any,
) -> tuple[Any, dict]:
    """The checkpoint that those options name, and the other options."""
    found = mnemodyn.from_pretrained(
        checkpoint, compat=compat, revision=revision, subfolder=subfolder
    )
    if scaling:
        if found.scaling is not None:
            raise ValueError(
                f"{checkpoint} was trained with scaling {found.scaling.method!r}; leave --scaling out"
            )
        found = replace(found, scaling=mnemodyn.Scaling(scaling))
    try:
        found.model.to(device)
    except (
        AssertionError,
        RuntimeError,
    ) as error:  # PyTorch's own, of a build without GPUs, is an assertion
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device must be cpu, or cuda where PyTorch finds one, got {device!r} ({reason})"
        ) from error
    return found, others


@_command(
    "a model: write a vector for every scan",
    _arg("SCANS...", "files, folders or stores"),
    _arg("-o --output FILE", "table to write: .csv or .parquet", required=True),
    _arg(
        "--readout NAME...",
        "(default: latent_mean latent_sd)",
        default=["latent_mean", "latent_sd"],
        dest="names",
    ),
    _arg("--pattern GLOB", "which names of a folder, such as '*4S456*'", default="*"),
    *_CHECKPOINT,
)
def _embed(scans: Sequence[str], output: str, **given: Any) -> Done:
    """Write a vector for every scan into a table: what a frozen network reads out of it.

    SCANS are files (.ptseries.nii, .tsv, .csv, .1D, .npy, .npz, .mat), folders that are searched for them, or stores.
    One scan is in memory at a time. An interrupted call, given again, goes on where it stopped. Scans that cannot be
    used are listed with the reason in OUTPUT_refused.tsv and stop nothing; the status is 1 only if none could be used.

    examples:
      mnemodyn embed derivatives/xcp_d -o embeddings.csv -c lab/mnemodyn-450
      mnemodyn embed *.1D -o embeddings.parquet -c runs/pretrain --t-r 2 --readout latent_mean latent_correlation
    """
    from mnemodyn import embed

    checkpoint, how = _checkpoint(**given)
    done = embed.embed(scans, checkpoint, output, progress=_progress, **how)
    if done.refused:
        listing = embed.refused_listing(output)
        print(f"mnemodyn: {len(done.refused)} scans refused, see {listing}", file=sys.stderr)
    resumed = f" ({done.n_resumed} of them from before)" if done.n_resumed else ""
    text = f"{output}: {done.n_scans} scans{resumed}, {done.n_features} features"
    return {"output": output, **done._asdict()}, text


@_command(
    "a model: fill a scan's censored frames",
    _arg("SCAN", "a scan's file"),
    _arg("-o --output FILE", "sub-....ptseries.nii or sub-..._timeseries.tsv", required=True),
    _arg("--whole", "write the reconstruction of every frame"),
    *_CHECKPOINT,
)
def _reconstruct(scan: str, output: str, **given: Any) -> Done:
    """Fill the censored frames of a scan (those that *_outliers.tsv beside it marks) with what the network makes of
    the frames around them. All other frames stay as they were measured.
    """
    from mnemodyn import embed

    checkpoint, how = _checkpoint(**given)
    done = embed.reconstruct(scan, checkpoint, output, **how)
    return {
        "output": output,
        **done,
    }, f"{output}: {done['n_filled']} of {done['n_frames']} frames filled"


@_command(
    "a model: write a network as a .pt2 or .onnx program",
    _arg("CHECKPOINT", "folder or file, or NAME/MODEL on the hub"),
    _arg("FILE", "program to write: .pt2 or .onnx"),
    _arg("--frames N", "of the scans it will read (default: those of a training window)", type=int),
    _JSON,
)
def _export(checkpoint: str, file: str, frames: int | None) -> Done:
    """Write a network as a program that runs without this package: FILE.pt2 for torch.export.load, FILE.onnx for an
    ONNX runtime. FILE.json beside it says what goes in: parcels in their order, repetition time, scaling.
    """
    from mnemodyn.export import export

    written = str(export(mnemodyn.from_pretrained(checkpoint), file, n_timepoints=frames))
    return {"output": written, "described": f"{written}.json"}, written


@_command(
    "a model: push a checkpoint to the Hugging Face Hub",
    _arg("SOURCE", "run, checkpoint or version folder"),
    _arg("--repo-id NAME/MODEL", "repository, made where it is missing", required=True),
    _arg("--private", "where it is made, make it private", action="store_true", default=None),
    _arg("--revision BRANCH", "made where it is missing (default: main)"),
    _arg("--subfolder FOLDER", "folder of the repository", default=""),
    _arg("--licence --license ID", "the hub's identifier", default="mit"),
    _arg("--commit-message TEXT", default="Publish a MnemoDyn checkpoint"),
    _arg("--results FILE...", "JSON of results for the card", default=[]),
    _arg("--metrics FILE", "CSV of training metrics, where it is not beside"),
    _arg("--hyper-parameters FILE", "YAML of settings, for a .ckpt without"),
    _arg("--keep-participants", "publish their identifiers too"),
    _arg("--dry-run", "send nothing, show the folder that would be pushed"),
    _JSON,
)
def _publish(
    source: str,
    dry_run: bool,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    **contents: Any,
) -> Done:
    """Push a checkpoint to the Hugging Face Hub: weights (safetensors), configuration, scaling, parcels in their order,
    training metrics, and a model card written from the run.

    SOURCE is a run's folder (its best checkpoint is taken), a checkpoint's folder, a .ckpt of the published draft, or a
    version folder of its trainer (the best validation metric in the names is taken). The token is HF_TOKEN or that of
    `hf auth login`. Participants' identifiers are replaced by their number.

    examples:
      mnemodyn publish runs/pretrain --repo-id lab/mnemodyn-450 --results book/runs/reconstruction.json --dry-run
      mnemodyn publish lightning_logs/version_3 --repo-id lab/draft --private --revision v1
    """
    from mnemodyn import hub

    if not dry_run:
        place: dict = {"private": private, "revision": revision, "commit_message": commit_message}
        address = hub.publish(source, **contents, **place)
        return {"commit": address}, address
    with TemporaryDirectory() as folder:
        hub.write_folder(source, folder, **contents)
        home = "/".join(filter(None, (contents["repo_id"], contents["subfolder"])))
        files = {
            f"{home}/{path.name}": path.stat().st_size for path in sorted(Path(folder).iterdir())
        }
        card = Path(folder, "README.md").read_text(encoding="utf-8")
    listed = "\n".join(f"{name}\t{size} bytes" for name, size in files.items())
    return {"files": files, "card": card}, f"{listed}\n\n{card}"


@_command(
    "the book: run a notebook with given parameters",
    _arg("NOTEBOOK", "notebook to run; it is not changed"),
    _arg("OUTPUT", "where the executed notebook goes"),
    _arg(
        "-p --parameter NAME VALUE",
        "may be repeated, and wins over -f. Lists as '[1, 2]'",
        action="append",
    ),
    _arg(
        "-f --parameters-file FILE", "YAML or JSON, one 'name: value' a line; - is standard input"
    ),
    _JSON,
)
def _run(notebook: str, output: str, parameter: Sequence, parameters_file: str | None) -> Done:
    """Run a notebook from start to end with the parameters you give, without opening it.

    OUTPUT is the executed notebook; OUTPUT's stem + .manifest.json, beside it, says with which parameters, versions and
    commit it ran, how long it took, and whether it came to its end. A notebook's parameters, their units and defaults
    stand in its cell tagged "parameters".

    examples:
      mnemodyn run notebooks/pretrain.ipynb runs/pretrain.ipynb
      mnemodyn run notebooks/pretrain.ipynb runs/longer.ipynb -p epochs 50 -p learning_rate 3e-4
      mnemodyn run notebooks/pretrain.ipynb runs/longer.ipynb -f my-parameters.yaml

    exit status: 0 done; 1 the notebook failed; 2 wrong usage or a refused parameter.
    """
    if not Path(notebook).is_file():
        raise ParameterError(f"there is no notebook {notebook}")
    done = mnemodyn.run_notebook(notebook, output, _file(parameters_file) | dict(parameter))
    said = f"{done['notebook']} -> {done['output']} in {done['seconds']:.1f} s"
    return done, f"{said}\n{first_results(done)}".strip()


def _in_clone(folder: str, name: str, ending: str) -> tuple[Path, Path]:
    """The repository's root and a file of it, or what there is in its place."""
    root = find_root()
    if not (root / "Snakefile").is_file():
        raise ParameterError(f"{root} holds no Snakefile; go to a clone of the repository")
    path = root / folder / f"{name.removesuffix(ending)}{ending}"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in path.parent.glob(f"*{ending}")))
        raise ParameterError(f"there is no {path.relative_to(root)}; {folder}/ has {known}")
    return root, path


def _module(root: Path, module: str, extra: str, *words: str) -> Done:
    """Run a Python program in the repository's root; its output is the command's."""
    if find_spec(module) is None:
        raise ImportError(f"this needs {module}: pip install 'mnemodyn[{extra}]'")
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=root, check=False)
    return None, "", int(done.returncode != 0)


@_command(
    "the book: open a notebook in JupyterLab",
    _arg("[NAME]", "notebooks/NAME.ipynb, such as pretrain; all of them by default"),
    _arg("--no-browser", "print the address only, as on a server"),
)
def _notebook(name: str | None, no_browser: bool) -> Done:
    """Open one of the book's notebooks in JupyterLab, in a clone of the repository. Choose Run all; the parameters are
    in the first cell of code.

    On a server:

      mnemodyn notebook pretrain --no-browser       prints an address with a token
      ssh -L 8888:localhost:8888 SERVER             brings it to your browser
    """
    root, path = _in_clone("notebooks", name or "data", ".ipynb")
    words = [f"--notebook-dir={root}", *["--no-browser"] * no_browser]
    words += [f"--LabApp.default_url=/lab/tree/notebooks/{path.name}"] * bool(name)
    words += ["--allow-root"] * (
        hasattr(os, "geteuid") and os.geteuid() == 0
    )  # in a container; the token guards it
    return _module(root, "jupyterlab", "lab", *words)


@_command(
    "the book: run the notebooks and build the pages",
    _arg("--profile NAME", "profiles/NAME.yaml", default="quick"),
    _arg("--cores N", "processor cores", default=2),
    _arg("--data FOLDER", "scans of your own in place of the profile's"),
    _arg("-n --dry-run", "say what would run"),
)
def _book(profile: str, cores: int, data: str | None, dry_run: bool) -> Done:
    """Run every notebook of a profile and build the pages, in a clone of the repository: `make book` for an environment
    that is already there.
    """
    root, path = _in_clone("profiles", profile, ".yaml")
    words = ["--configfile", str(path), "--cores", str(cores), *["-n"] * dry_run]
    return _module(
        root, "snakemake", "book", *words, *(["--config", f"data={data}"] if data else [])
    )


@_command("more: print a script for the shell's completion", _arg("SHELL", "bash, zsh or tcsh"))
def _completion(shell: str) -> Done:
    """Print a script that completes commands and options. For bash:

    mnemodyn completion bash > ~/.local/share/bash-completion/completions/mnemodyn
    """
    if find_spec("shtab") is None:
        raise ImportError("completion needs shtab: pip install 'mnemodyn[completion]'")
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ParameterError(
            f"shell must be one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}"
        )
    return None, shtab.complete(_parser(), shell=shell)


@_command(
    "more: run a grid of ablations",
    _arg("DATA", "hcp7, or a folder of scans"),
    _arg("GRID", "YAML file of the cells and sizes"),
    _arg("SIZE", "one of its sizes"),
    _arg("FOLDER", "where finished cells are kept"),
    _arg("--out FILE", "JSON of the result", required=True),
    _arg("--cohort NAME", "whose folder DATA is, for a size with a target"),
    _arg("--threads N", "CPU threads", default=1),
)
def _ablate(
    data: str, grid: str, size: str, folder: str, out: str, cohort: str | None, threads: int
) -> Done:
    """Train and score every cell of a grid of ablations, fold by fold, and write what each changes.

    FOLDER keeps every finished cell: the same command goes on where it was stopped. GRID is a YAML file such as
    notebooks/ablations.yaml, SIZE one of its sizes.
    """
    from mnemodyn.data.quality import open_scans
    from mnemodyn.evaluate import ablations

    with _asked():
        asked = ablations.read_grid(grid, size)
    import torch

    torch.set_num_threads(threads)
    found = open_scans(data, cohort=cohort)
    scans = [scan for scan in found.scans if not (cohort and scan.constant.any())]
    records = ablations.run_grid(asked, scans, folder, table=found.table)
    minutes = sum(record["cpu_seconds"] for mine in records.values() for record in mine) / 60
    words = f"{'DATA' if cohort else data} {grid} {size} FOLDER --out FILE{f' --cohort {cohort}' if cohort else ''}"
    facts = {"data": cohort or data, "size": size, "command": f"mnemodyn ablate {words}"}
    facts |= {"cpu_minutes": round(minutes, 1), "date": datetime.now(UTC).date().isoformat()}
    content = ablations.collect(asked, records, **facts)
    write_json(out, content)
    return content, f"{out}: {len(asked.cells)} cells, {asked.folds} folds"


if __name__ == "__main__":
    sys.exit(main())
