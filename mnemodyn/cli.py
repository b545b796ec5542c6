"""The ``mnemodyn`` command. Each sub-command has a function that adds it and one that runs it."""

import argparse
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

from mnemodyn.files import read_yaml, write_json, write_text
from mnemodyn.provenance import installed_version

# Libraries that take seconds to import are imported by the commands that use them, so that --help is
# quick. The parameters of a function run_NAME are the arguments that add_NAME adds.

EPILOG = """\
examples:
  mnemodyn embed SCANS/ -o embeddings.csv --checkpoint NAME/MODEL
  mnemodyn COMMAND --help

exit status: 0 done; 1 the work failed, and the message says why; 2 wrong usage.
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
    options = vars(make_parser().parse_args(arguments))
    del options["command"]
    run = options.pop("run")
    if arguments is None:
        # Warnings stay Python's own where the function is called by a program or a test.
        # Libraries warn about themselves; only what this package says helps a user.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="mnemodyn")
        warnings.formatwarning = lambda message, *_: f"mnemodyn: {message}\n"
    # Read by huggingface_hub when it is imported, which is later.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = run(**options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain when it closes stdout.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except UsageError as error:
        return fail(error, 2)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        # An assertion is what PyTorch raises for --device cuda where it is built without GPUs.
        return fail(error, 1)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mnemodyn",
        description="Operator learning for resting-state fMRI.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = installed_version("mnemodyn") or "(not installed)"
    parser.add_argument("--version", action="version", version=f"mnemodyn {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_index,
        add_convert,
        add_preprocess,
        add_simulate,
        add_pretrain,
        add_evaluate,
        add_embed,
        add_reconstruct,
        add_publish,
        add_run,
    ):
        add(commands)
    return parser


def add_command(commands, name, run, line, text):
    """Add a command with its line in the list of commands and the text of its help."""
    parser = commands.add_parser(
        name, help=line, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_cohort(parser):
    """Arguments of the commands that read the folder of a cohort."""
    parser.add_argument(
        "cohort", help="name of a shipped cohort, or a YAML file that describes one"
    )
    parser.add_argument("folder", help="folder of the scans; nothing in it is changed")
    add_t_r(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read")


def add_t_r(parser):
    parser.add_argument(
        "--t-r",
        type=float,
        metavar="SECONDS",
        help="repetition time of files that do not state it",
    )


def add_json(parser):
    parser.add_argument(
        "--json", action="store_true", dest="as_json", help="print JSON, for a program"
    )


def show(as_json: bool, content: Any, text: str) -> None:
    """Print what was done, for a program or for a person."""
    if as_json:
        text = json.dumps(content, indent=2, ensure_ascii=False)
    print(text)


def show_progress(done: int, total: int) -> None:
    """Show on a terminal how far a command is."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} scans", end=end, file=sys.stderr, flush=True)


def fail(reason: object, status: int) -> int:
    """Say in one line why a command failed, and return its exit status."""
    print(f"mnemodyn: {reason}", file=sys.stderr)
    return status


def read_mapping(path: str | None) -> dict:
    """The mapping that a YAML or JSON file holds; an empty one where no file is named."""
    if path is None:
        return {}
    try:
        content = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a mapping 'name: value', got {content!r}")
    return content


def find_cohort(name: str) -> Any:
    """The description of a cohort; an unknown name is wrong usage."""
    from mnemodyn.data.cohorts import load_cohort

    try:
        return load_cohort(name)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


INDEX = """\
Find the scans of a cohort in FOLDER, match them with their phenotypes, read each once, and print what
there is: scans, participants, sites, frames, repetition times, the distribution of every target, and
what was left out and why.

Cohorts of the package: abide, adhd200, adni, bids, hbn, hcp_aging, nkir, ukb.
"""


def add_index(commands):
    parser = add_command(commands, "index", run_index, "say what scans a folder holds", INDEX)
    add_cohort(parser)
    parser.add_argument("--table", metavar="FILE", help="write a row a usable scan: .csv or .tsv")
    add_json(parser)


def run_index(cohort, folder, t_r, workers, table, as_json):
    from mnemodyn.data.cohorts import index

    described = find_cohort(cohort)
    found = index(described, folder, t_r=t_r, workers=workers, progress=show_progress)
    if table is not None:
        separator = "\t" if table.endswith(".tsv") else ","
        write_text(table, found.table.to_csv(index=False, sep=separator))
    show(as_json, found.summary(), str(found))
    if len(found) == 0:
        return fail(f"{folder}: none of the scans can be used", 1)
    return 0


CONVERT = """\
Write every usable scan of a cohort into a store, a folder that training reads at the speed of the disk.

An interrupted conversion, started again, goes on where it stopped. Scans that FOLDER has more than
STORE are added. What could not be used is listed in the store with the reason.
"""


def add_convert(commands):
    parser = add_command(
        commands, "convert", run_convert, "write a cohort's scans into a store", CONVERT
    )
    add_cohort(parser)
    parser.add_argument("store", help="the store's folder, new or with scans of the same parcels")
    parser.add_argument(
        "--dtype",
        choices=["float16", "float32"],
        default="float16",
        help="float16: z-scores, to 0.0002 SD; float32: values as they are",
    )
    add_json(parser)


def run_convert(cohort, folder, t_r, workers, store, dtype, as_json):
    from mnemodyn.data.cohorts import index
    from mnemodyn.data.store import convert

    described = find_cohort(cohort)
    found = index(described, folder, t_r=t_r, workers=workers, progress=show_progress)
    made = convert(found, store, dtype=dtype, progress=show_progress)
    content = {"store": store, "n_scans": len(made), "n_excluded": len(made.excluded)}
    show(as_json, content, f"{store}: {made.summary()}")
    return 0


PREPROCESS = """\
Turn dense series (.dtseries.nii) or volumes into parcels, with a JSON sidecar each:
sub-*/func/*_seg-ATLAS_stat-mean_timeseries.ptseries.nii. What is complete already is skipped, so that
an interrupted run goes on. Volumes need a label volume as atlas.

examples:
  mnemodyn preprocess derivatives/fmriprep -o parcels --atlas schaefer400-tian3 --jobs 4
  mnemodyn preprocess derivatives/fmriprep -o parcels --atlas my.dlabel.nii --high-pass 0.01 \\
      --confounds trans_x trans_y trans_z rot_x rot_y rot_z csf white_matter
"""


def add_preprocess(commands):
    parser = add_command(
        commands,
        "preprocess",
        run_preprocess,
        "turn dense series or volumes into parcels",
        PREPROCESS,
    )
    parser.add_argument("sources", nargs="+", help="files, or folders that are searched")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where scans go")
    parser.add_argument(
        "--atlas",
        required=True,
        help="schaefer400-tian3, a .dlabel.nii, or for volumes a .nii.gz of labels",
    )
    parser.add_argument("--low-pass", type=float, metavar="HZ", help="upper end of the band")
    parser.add_argument("--high-pass", type=float, metavar="HZ", help="lower end of the band")
    parser.add_argument(
        "--confounds", nargs="+", default=(), metavar="COLUMN", help="what is regressed out"
    )
    add_t_r(parser)
    parser.add_argument(
        "--table", action="store_true", help="write _timeseries.tsv and not .ptseries.nii"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="scans at a time, of about 1 GB each"
    )
    add_json(parser)


def run_preprocess(sources, output, confounds, jobs, as_json, **settings):
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


SIMULATE = """\
Write a SIMULATED cohort: scans in the formats and folders of the real one, its phenotype table, a few
broken files, and effects of known size on connectivity. FOLDER/simulated.json says what was planted.
"""


def add_simulate(commands):
    parser = add_command(commands, "simulate", run_simulate, "write a SIMULATED cohort", SIMULATE)
    parser.add_argument("cohort", help="abide, adhd200, adni, hbn, hcp_aging, nkir or ukb")
    parser.add_argument("folder", help="where it goes; must be empty or absent")
    parser.add_argument("--participants", type=int, default=40, metavar="N", dest="n_participants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--frames", type=int, metavar="N", dest="n_frames", help="as in the real cohort by default"
    )
    parser.add_argument(
        "--effect",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "D"),
        help="of a target, site or mean_fd, in SD (1 by default); may be repeated",
    )
    add_json(parser)


def run_simulate(cohort, folder, effect, as_json, **settings):
    from mnemodyn.data.simulate import simulate_cohort

    try:
        effects = {name: float(value) for name, value in effect}
        truth = simulate_cohort(cohort, folder, effects=effects, **settings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    planted = ", ".join(f"{name} {found['d']:g}" for name, found in truth["effects"].items())
    show(as_json, truth, f"SIMULATED {truth['cohort']} -> {folder}; effects in SD: {planted}")
    return 0


PRETRAIN = """\
Pretrain a network on scans without labels.

OUTPUT gets the network as best/, history.csv, and run.json with the settings, the commit and the
fingerprint of the data. The same command goes on with a run that was interrupted. Settings are those
of mnemodyn.settings.Settings, in the sections data, model, objective, training and machine of a YAML
file, or one by one.

examples:
  mnemodyn pretrain hcp7 runs/masked -s training.epochs 16
  mnemodyn pretrain SCANS runs/latent -s objective latent --settings my.yaml -s machine.devices 4
"""


def add_pretrain(commands):
    parser = add_command(
        commands, "pretrain", run_pretrain, "pretrain a network on scans without labels", PRETRAIN
    )
    parser.add_argument("data", help="hcp7, a folder of scans, or a store")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--cohort", help="the cohort whose folder DATA is")
    add_t_r(parser)
    parser.add_argument("--settings", metavar="FILE", help="YAML file of settings")
    parser.add_argument(
        "-s",
        "--set",
        nargs=2,
        action="append",
        default=[],
        dest="changes",
        metavar=("NAME", "VALUE"),
        help="one setting, such as training.epochs 5; may be repeated, and wins over --settings",
    )
    parser.add_argument(
        "--restart", action="store_true", help="give up an unfinished run of other settings"
    )
    add_json(parser)


def run_pretrain(data, output, cohort, t_r, settings, changes, restart, as_json):
    if t_r is not None:
        changes = [("data.t_r", str(t_r)), *changes]
    # Before torch is imported: a mistyped setting is refused at once.
    found = read_settings(settings, changes)
    from mnemodyn.data.collection import open_scans
    from mnemodyn.pretrain.training import pretrain
    from mnemodyn.splits import hold_out

    scans = open_scans(data, cohort=cohort, t_r=found.data.t_r)
    people = scans.table["participant_id"]
    sides = hold_out(people, n_test=found.data.n_test, n_validation=found.data.n_validation)
    train = scans.select(sides["train"])
    validation = scans.select(sides["validation"])
    checkpoint, history = pretrain(train, validation, output, found, restart=restart)
    training = checkpoint.training
    scores = {name: value for name, value in training.items() if name.startswith("val_")}
    listed = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    # Epoch 0 is the network before its first step.
    n_epochs = len(history) - 1
    content = {"checkpoint": f"{output}/best", "epochs": n_epochs, **scores}
    show(as_json, content, f"{output}/best: {listed}, {n_epochs} epochs")
    return 0


def read_settings(path: str | None, changes: Sequence) -> Any:
    """The settings of a training; one that is not allowed is wrong usage."""
    from mnemodyn.settings import Settings, SettingsError

    content = read_mapping(path)
    try:
        values = {name: read_yaml(value) for name, value in changes}
        return Settings.from_mapping(content).updated(values)
    except (SettingsError, ValueError) as error:
        raise UsageError(str(error)) from error


EVALUATE = """\
Predict a target from a cohort's scans by several methods on the same five folds over participants,
and write scores with 95 % intervals. By default the methods are confounds and fc, and with
--checkpoint model and model+fc too.

examples:
  mnemodyn evaluate hbn FOLDER --target sex -o sex.csv
  mnemodyn evaluate abide STORE --target diagnosis --checkpoint NAME/MODEL -o diagnosis.csv --workers 4
"""


def add_evaluate(commands):
    parser = add_command(
        commands, "evaluate", run_evaluate, "predict a target from a cohort's scans", EVALUATE
    )
    add_cohort(parser)
    parser.add_argument("--target", required=True, help="one of the cohort's targets")
    parser.add_argument("--methods", nargs="+", metavar="M", help="such as fc, tangent, model+fc")
    parser.add_argument("-c", "--checkpoint", help="folder or file, or NAME/MODEL on the hub")
    parser.add_argument(
        "-o",
        "--output",
        "--json",
        required=True,
        metavar="FILE",
        help="table of results to write: .csv, or .json",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", dest="n_repeats", help="of five folds"
    )
    parser.add_argument(
        "--leave-one-site-out", action="store_true", help="test each site on the others too"
    )
    parser.add_argument(
        "--cache", metavar="FOLDER", help="keep results here, so that an interrupted call goes on"
    )
    parser.add_argument("--seed", type=int, default=0)


def run_evaluate(
    cohort,
    folder,
    t_r,
    workers,
    target,
    methods,
    checkpoint,
    output,
    leave_one_site_out,
    **settings,
):
    if Path(output).is_dir():
        raise UsageError(f"{output} is a folder; name the file to write")
    # Before the scans are read, which may take minutes.
    targets = find_target(cohort, target)
    from mnemodyn.checkpoint import from_pretrained
    from mnemodyn.data.collection import open_scans
    from mnemodyn.evaluate.study import study
    from mnemodyn.results import write_results

    if methods is None:
        methods = ["confounds", "fc"]
        if checkpoint is not None:
            methods += ["model", "model+fc"]
    if checkpoint is not None:
        checkpoint = from_pretrained(checkpoint)
    scans = open_scans(folder, cohort=cohort, t_r=t_r, workers=workers)
    by_site = methods if leave_one_site_out else ()
    # A line a fold, also where the output goes to a file: an evaluation may take hours.
    say = partial(print, file=sys.stderr, flush=True)
    rows, failed = study(
        scans,
        targets,
        methods,
        by_site=by_site,
        say=say,
        checkpoint=checkpoint,
        n_jobs=workers,
        **settings,
    )
    if output.endswith(".json"):
        write_json(output, {"simulated": scans.simulated, "rows": rows, "failed": failed})
    else:
        write_results(output, rows)
    for row in rows:
        if "low" in row and not row.get("against"):
            interval = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            print(f"{row['task']}, {row['method']}: {row['score']} {interval}, n = {row['n']}")
    for fold in failed:
        print(f"FAILED: {fold}", file=sys.stderr)
    return int(len(failed) > 0)


def find_target(cohort: str, target: str) -> dict:
    """The target, and whether it is of a classification or a regression."""
    kinds = {known.name: known.kind for known in find_cohort(cohort).targets}
    if target not in kinds:
        raise UsageError(
            f"--target must be one of {', '.join(kinds)} for {cohort}, got {target!r}; "
            "a cohort's YAML file can describe others"
        )
    return {target: kinds[target]}


def add_checkpoint(parser):
    """Arguments that name a checkpoint, and say how scans are read for it."""
    parser.add_argument(
        "-c", "--checkpoint", required=True, help="folder or file, or NAME/MODEL on the hub"
    )
    add_compat(parser)
    parser.add_argument(
        "--scaling", metavar="METHOD", help="for a checkpoint that does not state its own"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_t_r(parser)
    parser.add_argument(
        "--frames-first",
        action=argparse.BooleanOptionalAction,
        help="whether rows are frames, for files that do not say",
    )
    parser.add_argument(
        "--max-constant-parcels", type=int, default=0, metavar="N", help="that a scan may have"
    )
    add_json(parser)


def add_compat(parser):
    parser.add_argument(
        "--compat",
        choices=["none", "reference"],
        default="none",
        help="reference: a .ckpt of the published draft",
    )


def load_checkpoint(checkpoint, compat, scaling, device):
    """The checkpoint that is named, on the device that is named."""
    from mnemodyn.checkpoint import from_pretrained
    from mnemodyn.data.scaling import Scaling

    found = from_pretrained(checkpoint, compat=compat)
    if scaling is not None:
        if found.scaling is not None:
            raise UsageError(f"{checkpoint} states its own scaling; leave --scaling out")
        found = replace(found, scaling=Scaling(scaling))
    found.model.to(device)
    return found


EMBED = """\
Write a vector for every scan into a table: what a frozen network computes on it.

SCANS are files (.ptseries.nii, .tsv, .csv, .1D, .npy, .npz, .mat), folders that are searched for
them, or stores. An interrupted call, given again, goes on. Scans that cannot be used are listed with
the reason in OUTPUT_refused.tsv; the status is 1 only if none could be used.

examples:
  mnemodyn embed derivatives/xcp_d -o embeddings.csv -c lab/mnemodyn-450
  mnemodyn embed *.1D -o embeddings.parquet -c runs/pretrain --t-r 2 --readout response
"""


def add_embed(commands):
    parser = add_command(commands, "embed", run_embed, "write a vector for every scan", EMBED)
    parser.add_argument("scans", nargs="+", help="files, folders or stores")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="table: .csv, .tsv or .parquet"
    )
    parser.add_argument(
        "--readout",
        dest="names",
        nargs="+",
        default=["latent_mean", "latent_sd"],
        metavar="NAME",
        help="latent_mean latent_sd by default; see mnemodyn.readout.readouts",
    )
    parser.add_argument(
        "--pattern", default="*", metavar="GLOB", help="which names of a folder, such as '*4S456*'"
    )
    add_checkpoint(parser)


def run_embed(
    scans, output, names, pattern, checkpoint, compat, scaling, device, as_json, **reading
):
    from mnemodyn.embed import embed, refused_listing

    network = load_checkpoint(checkpoint, compat, scaling, device)
    how = {"names": names, "pattern": pattern, "progress": show_progress}
    done = embed(scans, network, output, **how, **reading)
    if done.refused:
        listing = refused_listing(output)
        print(f"mnemodyn: {len(done.refused)} scans refused, see {listing}", file=sys.stderr)
    text = f"{output}: {done.n_scans} scans, {done.n_features} features"
    show(as_json, {"output": output, **done._asdict()}, text)
    return 0


RECONSTRUCT = """\
Fill the censored frames of a scan, those that *_outliers.tsv beside it marks, with what the network
makes of the frames around them. All other frames stay as they were measured.
"""


def add_reconstruct(commands):
    parser = add_command(
        commands, "reconstruct", run_reconstruct, "fill a scan's censored frames", RECONSTRUCT
    )
    parser.add_argument("scan", help="file of a scan")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="sub-....ptseries.nii or sub-..._timeseries.tsv, in another folder",
    )
    parser.add_argument(
        "--whole", action="store_true", help="write the reconstruction of every frame"
    )
    add_checkpoint(parser)


def run_reconstruct(scan, output, whole, checkpoint, compat, scaling, device, as_json, **reading):
    from mnemodyn.embed import reconstruct

    network = load_checkpoint(checkpoint, compat, scaling, device)
    done = reconstruct(scan, network, output, whole=whole, **reading)
    text = f"{output}: {done['n_filled']} of {done['n_frames']} frames filled"
    show(as_json, {"output": output, **done}, text)
    return 0


PUBLISH = """\
Push a checkpoint to the Hugging Face Hub: weights (safetensors), configuration, scaling, parcels in
their order, the history of the training, and a model card written from the run. Participants'
identifiers are replaced by their number. The token is HF_TOKEN or that of `hf auth login`.

examples:
  mnemodyn publish runs/pretrain --repo-id lab/mnemodyn-450 --results reconstruction.csv --dry-run
  mnemodyn publish lightning_logs/version_3 --compat reference --repo-id lab/draft --private
"""


def add_publish(commands):
    parser = add_command(
        commands, "publish", run_publish, "push a checkpoint to the Hugging Face Hub", PUBLISH
    )
    parser.add_argument("source", help="folder of a run or a checkpoint")
    parser.add_argument("--repo-id", required=True, metavar="NAME/MODEL", help="made if missing")
    parser.add_argument(
        # None leaves the choice to the settings of an organisation on the hub.
        "--private",
        action="store_true",
        default=None,
        help="make a missing repository private",
    )
    add_compat(parser)
    parser.add_argument("--licence", "--license", default="mit", help="the hub's identifier")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="tables of results for the card"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="send nothing, and show what would be sent"
    )
    add_json(parser)


def run_publish(source, dry_run, private, as_json, **contents):
    from mnemodyn.hub import publish, write_folder

    if not dry_run:
        address = publish(source, private=private, **contents)
        show(as_json, {"commit": address}, address)
        return 0
    # The same function as for a real publication, so that what is shown is what would be sent.
    with TemporaryDirectory() as temporary:
        folder = write_folder(source, temporary, **contents)
        files = sorted(path.name for path in folder.iterdir())
        card = (folder / "README.md").read_text(encoding="utf-8")
    show(as_json, {"files": files, "card": card}, f"{', '.join(files)}\n\n{card}")
    return 0


RUN = """\
Run a notebook from start to end with the parameters that are given, without opening it.

OUTPUT is the executed notebook. OUTPUT's stem + .manifest.json beside it says with which parameters,
versions and commit it ran, how long it took, and whether it came to its end. A notebook's parameters,
with their units and defaults, are in its cell tagged "parameters".

examples:
  mnemodyn run notebooks/pretrain.ipynb runs/pretrain.ipynb
  mnemodyn run notebooks/pretrain.ipynb runs/longer.ipynb -p seed 3 -f my-parameters.yaml
"""


def add_run(commands):
    parser = add_command(commands, "run", run_run, "run a notebook with given parameters", RUN)
    parser.add_argument("notebook", help="notebook to run; it is not changed")
    parser.add_argument("output", help="the executed notebook")
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="may be repeated, and wins over -f; lists as '[1, 2]'",
    )
    parser.add_argument("-f", "--parameters-file", metavar="FILE", help="YAML or JSON")
    add_json(parser)


def run_run(notebook, output, parameter, parameters_file, as_json):
    from mnemodyn.run import ParameterError, first_results, run_notebook

    parameters = {**read_mapping(parameters_file), **dict(parameter)}
    try:
        done = run_notebook(notebook, output, parameters)
    except (FileNotFoundError, ParameterError) as error:
        raise UsageError(str(error)) from error
    text = f"{done['notebook']} -> {done['output']} in {done['seconds']:.1f} s"
    show(as_json, done, f"{text}\n{first_results(done)}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
