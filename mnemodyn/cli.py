"""The ``mnemodyn`` command.

A command NAME is the function ``run_NAME``, whose docstring is its help. Its arguments are added by
``add_NAME``, and are the parameters of the function.
"""

import argparse
import inspect
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mnemodyn.files import (
    begins_with,
    check_folder,
    check_output,
    load_yaml,
    read_yaml,
    write_table,
)
from mnemodyn.provenance import installed_version

__all__ = ["main"]

# Libraries that take seconds to import are imported by the commands that use them, so that --help
# is quick.

EPILOG = """\
examples:
  mnemodyn embed SCANS/ -o embeddings.csv --checkpoint NAME/MODEL
  mnemodyn COMMAND --help

exit status: 0 done; 1 the work failed, and the message says why; 2 wrong usage; 130 interrupted.
"""


class UsageError(ValueError):
    """An argument that cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        0 done; 1 the work failed; 2 an argument cannot be used; 130 interrupted.

    Raises
    ------
    SystemExit
        From argparse: 0 after ``--help`` or ``--version``, 2 on wrong usage.
    """
    if arguments is None:
        # Warnings stay Python's own where the function is called by a program or a test.
        # Libraries warn about themselves; only what this package says helps a user.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="mnemodyn")
        warnings.formatwarning = lambda message, *_: f"mnemodyn: {message}\n"
    _prepare_streams()
    # Read by huggingface_hub when it is imported, which is later.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        options = vars(make_parser().parse_args(arguments))
        run = options.pop("run")
        return run(**options)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain when it closes the streams.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except UsageError as error:
        return fail(error, 2)
    except MemoryError as error:
        remedy = "give the job more, or less to do at a time"
        return fail(f"no memory is left; {remedy}. {error}".strip(), 1)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        # An assertion is what PyTorch raises for --device cuda where it is built without GPUs.
        return fail(error, 1)


def _prepare_streams() -> None:
    """See that no message or result is lost for a stream that is closed, or cannot show every character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        # Not where a program or a test has put another in its place.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="mnemodyn",
        description="Operator learning for resting-state fMRI.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    version = installed_version("mnemodyn") or "(not installed)"
    parser.add_argument("--version", action="version", version=f"mnemodyn {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, add in COMMANDS.items():
        name = run.__name__.removeprefix("run_")
        text = inspect.getdoc(run) or ""
        line = text.partition(".\n")[0]
        command = commands.add_parser(name, help=line, description=text, formatter_class=raw)
        command.add_argument(
            "--json", action="store_true", dest="as_json", help="print JSON, for a program"
        )
        command.set_defaults(run=run)
        # For arguments without a type, most of which are paths. A shell leaves the ~ of --output=~/x as it is.
        command.register("type", None, os.path.expanduser)
        add(command)
    return parser


def show(as_json: bool, content: Any, text: str) -> int:
    """Print what was done, for a program or for a person, and return the exit status of success."""
    if as_json:
        text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python would try again when it ends, and complain.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise OSError(error.errno, error.strerror, "standard output") from error
    return 0


def show_progress(done: int, total: int) -> None:
    """Show on a terminal how far a command is."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} scans", end=end, file=sys.stderr, flush=True)


def say_left_out(scans: Any) -> None:
    """Say how much of a folder is not used, and why, with an example of each reason."""
    table = scans.excluded.reindex(columns=["problem", "message", "left_out_of"])
    # Scans without a label are used for training.
    for problem, rows in table[table["left_out_of"] != "targets"].groupby("problem"):
        example = rows["message"].iloc[0][:300]
        print(f"mnemodyn: left out {len(rows)}, {problem}: {example}", file=sys.stderr)


def fail(reason: object, status: int) -> int:
    """Say in one line why a command failed, and return its exit status."""
    print(f"mnemodyn: {reason}", file=sys.stderr)
    return status


def read_mapping(path: str | None) -> dict:
    """The mapping that a YAML or JSON file holds; an empty one where no file is named."""
    if path is None:
        return {}
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping 'name: value', got {content!r:.200}")
    return content


# Arguments that several commands share.


# How files are read, but for t_r; what is not given is left to them.
READING = ("override_t_r", "frames_first", "key", "max_constant_parcels")


def add_t_r(parser):
    text = "repetition time of files that do not state it, or state two"
    parser.add_argument("--t-r", type=float, metavar="SECONDS", help=text)
    parser.add_argument(
        "--override-t-r",
        action="store_true",
        default=argparse.SUPPRESS,
        help="--t-r replaces what the files state",
    )


def add_reading(parser):
    """Arguments of every command that reads scans, so that it has the remedies that messages name."""
    add_t_r(parser)
    parser.add_argument(
        "--frames-first",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="whether rows are frames, for files that do not say",
    )
    text = "which array of a .npz or .mat that holds several"
    parser.add_argument("--key", metavar="NAME", default=argparse.SUPPRESS, help=text)
    text = "constant or empty parcels that a scan may have; none by default"
    parser.add_argument(
        "--max-constant-parcels", type=int, metavar="N", default=argparse.SUPPRESS, help=text
    )


def add_output(parser, text, metavar="FILE"):
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=text)


def add_checkpoint(parser, required=False):
    text = "folder or file, or NAME/MODEL on the hub"
    parser.add_argument("-c", "--checkpoint", required=required, help=text)


def add_compat(parser):
    text = "reference: a .ckpt of the published draft"
    choices = ["none", "reference"]
    parser.add_argument("--compat", choices=choices, default="none", help=text)


def add_pairs(parser, *names, metavar=("NAME", "VALUE"), **settings):
    """An option with a name and a value, which may be repeated."""
    # In YAML a ~ is None.
    kind = {"nargs": 2, "action": "append", "type": str, "default": []}
    parser.add_argument(*names, metavar=metavar, **kind, **settings)


def add_cohort(parser):
    """Arguments of the commands that read the folder of a cohort."""
    parser.add_argument("cohort", help="name of a shipped cohort, or a YAML file of another")
    parser.add_argument("folder", help="folder of the scans; nothing in it is changed")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    add_reading(parser)


def add_network(parser):
    """Arguments that name a network, and say how scans are read for it."""
    add_checkpoint(parser, required=True)
    add_compat(parser)
    add_scaling(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_reading(parser)


def add_scaling(parser):
    text = "for a checkpoint that does not state its own"
    parser.add_argument("--scaling", metavar="METHOD", help=text)


def load_network(checkpoint, compat, scaling, device="cpu"):
    """The checkpoint that `add_network` asks for."""
    from mnemodyn.checkpoint import from_pretrained
    from mnemodyn.data.scaling import Scaling

    found = from_pretrained(checkpoint, compat=compat)
    if scaling is not None:
        if found.scaling is not None:
            raise UsageError(f"{checkpoint} states its own scaling; leave --scaling out")
        found = replace(found, scaling=Scaling(scaling))
    found.model.to(device)
    return found


def find_cohort(name: str) -> Any:
    """The description of a cohort; an unknown name is wrong usage."""
    from mnemodyn.data.cohorts import load_cohort

    try:
        return load_cohort(name)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def find_scans(cohort: str, folder: str, workers: int, **reading: Any) -> Any:
    """The scans of a cohort's folder, each read once."""
    from mnemodyn.data.cohorts import index

    described = find_cohort(cohort)
    return index(described, folder, workers=workers, progress=show_progress, **reading)


# The commands.


def add_index(parser):
    add_cohort(parser)
    parser.add_argument("--table", metavar="FILE", help="write a row a usable scan: .csv or .tsv")


def run_index(cohort, folder, workers, table, as_json, **reading):
    """Say what scans a folder holds.

    They are found, matched with their phenotypes, and read once. Printed are scans, participants,
    sites, frames, repetition times, the distribution of every target, and what was left out and why.

    Cohorts of the package: abide, adhd200, adni, bids, hbn, hcp_aging, nkir, ukb.
    """
    if table is not None:
        from mnemodyn.data.scans import check_no_scan

        begins = begins_with("path", "participant_id", "session", "run")
        check_output(table, "table of index", begins)
        check_no_scan(table, [folder])
    found = find_scans(cohort, folder, workers, **reading)
    if table is not None:
        write_table(table, found.table)
    status = show(as_json, found.summary(), str(found))
    if len(found) == 0:
        return fail(f"{folder}: none of the scans can be used", 1)
    return status


def add_convert(parser):
    add_cohort(parser)
    parser.add_argument("store", help="the store's folder, new or with scans of the same parcels")
    parser.add_argument(
        "--dtype",
        choices=["float16", "float32"],
        default="float16",
        help="float16: z-scores, to 0.0002 SD (root mean square), and 0.002 SD at most below 8 SD; "
        "float32: values as they are",
    )


def run_convert(cohort, folder, workers, store, dtype, as_json, **reading):
    """Write a cohort's scans into a store.

    Training reads a store at the speed of the disk. The command given again goes on where it was
    interrupted, and makes STORE what FOLDER is now: more scans are added, those that have changed are
    converted again, and labels are those of the table as it is. What could not be used is listed in
    the store with the reason.
    """
    from mnemodyn.data.store import check_store, convert

    # Before the scans are read, which may take minutes.
    about = {"dtype": dtype, "cohort": find_cohort(cohort).name}
    check_store(Path(store), Path(folder), about)
    found = find_scans(cohort, folder, workers, **reading)
    made = convert(found, store, dtype=dtype, progress=show_progress)
    content = {"store": store, "n_scans": len(made), "n_excluded": len(made.excluded)}
    return show(as_json, content, f"{store}: {made.summary()}")


def add_preprocess(parser):
    parser.add_argument("sources", nargs="+", help="files, or folders that are searched")
    add_output(parser, "where scans go", "FOLDER")
    text = "schaefer400-tian3, a .dlabel.nii, or for volumes a .nii.gz of labels"
    parser.add_argument("--atlas", required=True, help=text)
    parser.add_argument("--low-pass", type=float, metavar="HZ", help="upper end of the band")
    parser.add_argument("--high-pass", type=float, metavar="HZ", help="lower end of the band")
    text = "what is regressed out"
    parser.add_argument("--confounds", nargs="+", default=(), metavar="COLUMN", help=text)
    add_t_r(parser)
    text = "write _timeseries.tsv and not .ptseries.nii"
    parser.add_argument("--table", action="store_true", help=text)
    text = "scans at a time, of about 1 GB each"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=text)


def run_preprocess(sources, output, confounds, jobs, as_json, **settings):
    r"""Turn dense series or volumes into parcels.

    Written are sub-*/func/*_seg-ATLAS_stat-mean_timeseries.ptseries.nii with a JSON sidecar each.
    What is complete already is skipped, so that an interrupted run goes on. Volumes need a label
    volume as atlas.

    examples:
      mnemodyn preprocess derivatives/fmriprep -o parcels --atlas schaefer400-tian3 --jobs 4
      mnemodyn preprocess derivatives/fmriprep -o parcels --atlas my.dlabel.nii --high-pass 0.01 \
          --confounds trans_x trans_y trans_z rot_x rot_y rot_z csf white_matter
    """
    from mnemodyn.data.preprocess import Preprocessing, preprocess

    try:
        asked = Preprocessing(confounds=tuple(confounds), **settings)
        rows = preprocess(sources, output, asked, jobs=jobs)
    except ValueError as error:
        # What is wrong with a scan is in its row.
        raise UsageError(str(error)) from error
    failed = rows.loc[rows["status"] == "failed", ["problem", "message"]]
    for row in failed.itertuples():
        print(f"{row.problem}: {row.message}", file=sys.stderr)
    counts = {name: int((rows["status"] == name).sum()) for name in ("done", "skipped", "failed")}
    text = ", ".join(f"{n} {name}" for name, n in counts.items())
    show(as_json, {**counts, "problems": failed.to_dict("records")}, text)
    return int(len(failed) > 0)


def add_simulate(parser):
    parser.add_argument("cohort", help="abide, adhd200, adni, hbn, hcp_aging, nkir or ukb")
    parser.add_argument("folder", help="where it goes; must be empty or absent")
    parser.add_argument("--participants", type=int, default=40, metavar="N", dest="n_participants")
    parser.add_argument("--seed", type=int, default=0)
    text = "as in the real cohort by default"
    parser.add_argument("--frames", type=int, metavar="N", dest="n_frames", help=text)
    text = "of a target, site or mean_fd, in SD (1 by default); may be repeated"
    add_pairs(parser, "--effect", metavar=("NAME", "D"), help=text)


def run_simulate(cohort, folder, effect, as_json, **settings):
    """Write a SIMULATED cohort.

    It has scans in the formats and folders of the real one, its phenotype table, a few broken files,
    and effects of known size on connectivity. FOLDER/simulated.json says what was planted.
    """
    from mnemodyn.data.simulate import simulate_cohort

    try:
        effects = {name: float(value) for name, value in effect}
        truth = simulate_cohort(cohort, folder, effects=effects, **settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    planted = ", ".join(f"{name} {found['d']:g}" for name, found in truth["effects"].items())
    text = f"SIMULATED {truth['cohort']} -> {folder}; effects in SD: {planted}"
    return show(as_json, truth, text)


def add_pretrain(parser):
    parser.add_argument("data", help="hcp7, a folder of scans, or a store")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--cohort", help="the cohort whose folder DATA is")
    add_reading(parser)
    parser.add_argument("--settings", metavar="FILE", help="YAML file of settings")
    text = "one setting, such as training.epochs 5; may be repeated, and wins over --settings"
    add_pairs(parser, "-s", "--set", dest="changes", help=text)
    text = "give up an unfinished run of other settings"
    parser.add_argument("--restart", action="store_true", help=text)


def run_pretrain(data, output, cohort, t_r, settings, changes, restart, as_json, **reading):
    """Pretrain a network on scans without labels.

    OUTPUT gets the network as best/, history.csv, and run.json with the settings, the commit and the
    fingerprint of the data. The same command goes on with a run that was interrupted. Settings are
    those of mnemodyn.settings.Settings, in the sections data, model, objective, training and machine
    of a YAML file, or one by one.

    examples:
      mnemodyn pretrain hcp7 runs/masked -s training.epochs 16
      mnemodyn pretrain SCANS runs/latent -s objective latent --settings my.yaml -s machine.devices 4
    """
    if Path(output).is_dir() and Path(data).exists() and Path(output).samefile(data):
        raise UsageError(f"{output} is the folder that is read; name another output")
    check_folder(output)
    if t_r is not None:
        changes = [("data.t_r", str(t_r)), *changes]
    # Before torch is imported: a mistyped setting is refused at once.
    found = read_settings(settings, changes)
    from mnemodyn.data.collection import open_scans
    from mnemodyn.pretrain.training import pretrain
    from mnemodyn.splits import families_of, hold_out

    scans = open_scans(data, cohort=cohort, t_r=found.data.t_r, **reading)
    say_left_out(scans)
    sides = hold_out(
        scans.table["participant_id"],
        n_test=found.data.n_test,
        n_validation=found.data.n_validation,
        families=families_of(scans.table),
    )
    train = scans.select(sides["train"])
    validation = scans.select(sides["validation"])
    checkpoint, history = pretrain(train, validation, output, found, restart=restart)
    training = checkpoint.training
    scores = {name: value for name, value in training.items() if name.startswith("val_")}
    listed = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    # Epoch 0 is the network before its first step.
    n_epochs = len(history) - 1
    content = {"checkpoint": f"{output}/best", "epochs": n_epochs, **scores}
    return show(as_json, content, f"{output}/best: {listed}, {n_epochs} epochs")


def read_settings(path: str | None, changes: Sequence) -> Any:
    """The settings of a training; one that is not allowed is wrong usage."""
    from mnemodyn.settings import Settings

    content = read_mapping(path)
    try:
        settings = Settings.from_mapping(content)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    try:
        values = {name: read_yaml(value) for name, value in changes}
        return settings.updated(values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def add_evaluate(parser):
    add_cohort(parser)
    parser.add_argument("--target", required=True, help="one of the cohort's targets")
    parser.add_argument("--methods", nargs="+", metavar="M", help="such as fc, tangent, model+fc")
    add_checkpoint(parser)
    add_compat(parser)
    add_scaling(parser)
    add_output(parser, "table of results to write, .csv")
    text = "of five folds"
    parser.add_argument("--repeats", type=int, default=5, metavar="N", dest="n_repeats", help=text)
    text = "test each site on the others too"
    parser.add_argument("--leave-one-site-out", action="store_true", help=text)
    text = "keep results here, so that an interrupted call goes on"
    parser.add_argument("--cache", metavar="FOLDER", help=text)
    parser.add_argument("--seed", type=int, default=0)


def run_evaluate(
    cohort,
    folder,
    t_r,
    workers,
    target,
    methods,
    checkpoint,
    compat,
    scaling,
    output,
    leave_one_site_out,
    as_json,
    **settings,
):
    """Predict a target from a cohort's scans.

    Every method is tested on the same five folds over participants; scores have 95 % intervals. By
    default the methods are confounds and fc, and with --checkpoint model and model+fc too.

    examples:
      mnemodyn evaluate hbn FOLDER --target sex -o sex.csv
      mnemodyn evaluate abide STORE --target diagnosis -c NAME/MODEL -o diagnosis.csv --workers 4
    """
    from mnemodyn.data.scans import check_no_scan
    from mnemodyn.results import check_results, write_results

    if Path(output).is_dir():
        raise UsageError(f"{output} is a folder; name the file to write")
    # Before the scans are read, which may take minutes.
    check_results(output)
    check_no_scan(output, [folder])
    if settings["cache"] is not None:
        check_folder(settings["cache"])
    kinds = {known.name: known.kind for known in find_cohort(cohort).targets}
    if target not in kinds:
        raise UsageError(
            f"--target must be one of {', '.join(kinds)} for {cohort}, got {target!r}; "
            "a cohort's YAML file can describe others"
        )
    from mnemodyn.data.collection import open_scans
    from mnemodyn.evaluate.study import study

    if methods is None:
        methods = ["confounds", "fc"]
        if checkpoint is not None:
            methods += ["model", "model+fc"]
    if checkpoint is not None:
        checkpoint = load_network(checkpoint, compat, scaling)
    reading = {name: settings.pop(name) for name in READING if name in settings}
    scans = open_scans(folder, cohort=cohort, t_r=t_r, workers=workers, **reading)
    say_left_out(scans)
    rows, failed = study(
        scans,
        {target: kinds[target]},
        methods,
        by_site=methods if leave_one_site_out else (),
        # A line a fold, also where the output goes to a file: an evaluation may take hours.
        say=partial(print, file=sys.stderr, flush=True),
        checkpoint=checkpoint,
        n_jobs=workers,
        **settings,
    )
    write_results(output, rows)
    show(as_json, {"rows": rows, "failed": failed}, scores_listed(rows))
    say_failed(failed)
    return int(len(failed) > 0)


def scores_listed(rows: list[dict]) -> str:
    """A line for every score that has an interval and is no difference."""
    lines = []
    for row in rows:
        if "low" in row and not row.get("against"):
            interval = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            where = f"{row['task']}, {row['method']}"
            lines.append(f"{where}: {row['score']} {interval}, n = {row['n']}")
    return "\n".join(lines)


def say_failed(failed: list[dict]) -> None:
    """Say how many folds of each method failed, and why the first one did: the others mostly fail alike."""
    first: dict[tuple, dict] = {}
    for fold in failed:
        first.setdefault((fold["task"], fold["method"]), fold)
    for (task, method), fold in first.items():
        n_failed = sum((one["task"], one["method"]) == (task, method) for one in failed)
        where = f"fold {fold['fold']} of repeat {fold['repeat']}"
        counted = f"{task}, {method}: FAILED in {n_failed} folds"
        print(f"mnemodyn: {counted}, first in {where}: {fold['error']}", file=sys.stderr)


def add_embed(parser):
    parser.add_argument("scans", nargs="+", help="files, folders or stores")
    add_output(parser, "table: .csv, .tsv or .parquet")
    parser.add_argument(
        "--readout",
        dest="names",
        nargs="+",
        default=["latent_mean", "latent_sd"],
        metavar="NAME",
        help="latent_mean latent_sd by default; see mnemodyn.readout.readouts",
    )
    text = "which names of a folder, such as '*4S456*'"
    parser.add_argument("--pattern", default="*", metavar="GLOB", help=text)
    add_network(parser)


def run_embed(
    scans, output, names, pattern, checkpoint, compat, scaling, device, as_json, **reading
):
    """Write a vector for every scan.

    It is what a frozen network computes on the scan. SCANS are files (.ptseries.nii, .tsv, .csv,
    .1D, .npy, .npz, .mat), folders that are searched for them, or stores. An interrupted call, given
    again, goes on. Scans that cannot be used are listed with the reason in OUTPUT_refused.tsv; the
    status is 1 only if none could be used.

    examples:
      mnemodyn embed derivatives/xcp_d -o embeddings.csv -c lab/mnemodyn-450
      mnemodyn embed *.1D -o embeddings.parquet -c runs/pretrain --t-r 2 --readout response
    """
    from mnemodyn.embed import embed, refused_listing

    network = load_network(checkpoint, compat, scaling, device)
    how = {"names": names, "pattern": pattern, "progress": show_progress}
    done = embed(scans, network, output, **how, **reading)
    if done.refused:
        listing = refused_listing(output)
        print(f"mnemodyn: {len(done.refused)} scans refused, see {listing}", file=sys.stderr)
    text = f"{output}: {done.n_scans} scans, {done.n_features} features"
    return show(as_json, {"output": output, **done._asdict()}, text)


def add_reconstruct(parser):
    parser.add_argument("scan", help="file of a scan")
    add_output(parser, "sub-....ptseries.nii or sub-..._timeseries.tsv, in another folder")
    text = "write the reconstruction of every frame"
    parser.add_argument("--whole", action="store_true", help=text)
    add_network(parser)


def run_reconstruct(scan, output, whole, checkpoint, compat, scaling, device, as_json, **reading):
    """Fill a scan's censored frames.

    Frames that *_outliers.tsv beside the scan marks are filled with what the network makes of the
    frames around them. All others stay as they were measured.
    """
    from mnemodyn.embed import reconstruct

    network = load_network(checkpoint, compat, scaling, device)
    done = reconstruct(scan, network, output, whole=whole, **reading)
    text = f"{output}: {done['n_filled']} of {done['n_frames']} frames filled"
    return show(as_json, {"output": output, **done}, text)


def add_publish(parser):
    parser.add_argument("source", help="folder of a run or a checkpoint")
    parser.add_argument("--repo-id", required=True, metavar="NAME/MODEL", help="made if missing")
    # None leaves the choice to the settings of an organisation on the hub.
    text = "make a missing repository private"
    parser.add_argument("--private", action="store_true", default=None, help=text)
    add_compat(parser)
    parser.add_argument("--licence", "--license", default="mit", help="the hub's identifier")
    text = "tables of results for the card"
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE", help=text)
    text = "send nothing, and show what would be sent"
    parser.add_argument("--dry-run", action="store_true", help=text)


def run_publish(source, dry_run, private, as_json, **contents):
    """Push a checkpoint to the Hugging Face Hub.

    Sent are the weights (safetensors), configuration, scaling, parcels in their order, the history of
    the training, and a model card written from the run. Participants' identifiers are replaced by
    their number. The token is HF_TOKEN or that of `hf auth login`.

    examples:
      mnemodyn publish runs/pretrain --repo-id lab/mnemodyn-450 --results results.csv --dry-run
      mnemodyn publish lightning_logs/version_3 --compat reference --repo-id lab/draft --private
    """
    from mnemodyn.hub import publish, write_folder

    if not dry_run:
        address = publish(source, private=private, **contents)
        return show(as_json, {"commit": address}, address)
    # The same function as for a real publication, so that what is shown is what would be sent.
    with TemporaryDirectory() as temporary:
        folder = write_folder(source, temporary, **contents)
        files = sorted(path.name for path in folder.iterdir())
        card = (folder / "README.md").read_text(encoding="utf-8")
    return show(as_json, {"files": files, "card": card}, f"{', '.join(files)}\n\n{card}")


def add_run(parser):
    parser.add_argument("notebook", help="notebook to run; it is not changed")
    parser.add_argument("output", help="the executed notebook")
    text = "may be repeated, and wins over -f; lists as '[1, 2]'"
    add_pairs(parser, "-p", "--parameter", help=text)
    parser.add_argument("-f", "--parameters-file", metavar="FILE", help="YAML or JSON")


def run_run(notebook, output, parameter, parameters_file, as_json):
    """Run a notebook with given parameters.

    It runs from start to end, without being opened. OUTPUT is the executed notebook. OUTPUT's stem +
    .manifest.json beside it says with which parameters, versions and commit it ran, how long it took,
    and whether it came to its end. A notebook's parameters, with their units and defaults, are in its
    cell tagged "parameters".

    examples:
      mnemodyn run notebooks/pretrain.ipynb runs/pretrain.ipynb
      mnemodyn run notebooks/pretrain.ipynb runs/longer.ipynb -p seed 3 -f my-parameters.yaml
    """
    from mnemodyn.run import ParameterError, first_results, run_notebook

    parameters = {**read_mapping(parameters_file), **dict(parameter)}
    manifest = Path(output).with_suffix(".manifest.json")
    check_output(output, "executed notebook", lambda _: manifest.is_file(), [notebook])
    try:
        done = run_notebook(notebook, output, parameters)
    except (FileNotFoundError, ParameterError) as error:
        raise UsageError(str(error)) from error
    text = f"{done['notebook']} -> {done['output']} in {done['seconds']:.1f} s"
    return show(as_json, done, f"{text}\n{first_results(done)}".rstrip())


COMMANDS = {
    run_index: add_index,
    run_convert: add_convert,
    run_preprocess: add_preprocess,
    run_simulate: add_simulate,
    run_pretrain: add_pretrain,
    run_evaluate: add_evaluate,
    run_embed: add_embed,
    run_reconstruct: add_reconstruct,
    run_publish: add_publish,
    run_run: add_run,
}


if __name__ == "__main__":
    sys.exit(main())
