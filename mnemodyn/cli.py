"""The ``mnemodyn`` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_RUN = """\
Run a notebook from start to end with the parameters you give, without opening it.

OUTPUT is the executed notebook; OUTPUT's stem + .manifest.json, beside it, says with which
parameters, versions and commit it ran, how long it took, and whether it came to its end.
A notebook's parameters, their units and defaults stand in its cell tagged "parameters".
"""
_EXAMPLES = """\
examples:
  mnemodyn run notebooks/pretrain.ipynb runs/pretrain.ipynb
  mnemodyn run notebooks/pretrain.ipynb runs/longer.ipynb -p epochs 50 -p learning_rate 3e-4
  mnemodyn run notebooks/pretrain.ipynb runs/longer.ipynb -f my-parameters.yaml

exit status: 0 done; 1 the notebook failed; 2 wrong usage or a refused parameter.
"""

_PRETRAIN = """\
Pretrain a network on scans without labels.

OUTPUT gets the two best checkpoints (best, second), history.csv, and run.json with the settings,
the commit and the data's fingerprint. The same command goes on with a run that was interrupted.
Settings stand in the sections model, objective, training, machine and data of a YAML file.
"""
_PRETRAIN_EXAMPLES = """\
examples:
  mnemodyn pretrain hcp7 runs/masked -s epochs 16
  mnemodyn pretrain SCANS runs/latent --objective latent --config my.yaml -s devices 4 -s strategy ddp

objectives: masked, denoise, autoencode, latent, forecast, groups, mixed.
exit status: 0 done; 1 the training failed; 2 wrong usage or a refused setting.
"""


_START = """\
start here:
  mnemodyn embed SCANS/ -o embeddings.csv --checkpoint NAME/MODEL     a vector a scan
  mnemodyn COMMAND --help                                             what a command takes, with examples

exit status: 0 done; 1 the work failed, and the message says what mends it; 2 wrong usage.
"""
_GROUPS = {
    "scans": ("index", "preprocess", "convert", "simulate"),
    "a model": ("pretrain", "evaluate", "info", "embed", "reconstruct", "export", "publish"),
    "the book": ("run", "book"),
}


class _Grouped(argparse.RawDescriptionHelpFormatter):
    """Commands under headings, in the order of a project."""

    def _format_action(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse._SubParsersAction):
            return super()._format_action(action)
        helps = {listed.dest: listed.help for listed in action._choices_actions}
        grouped = [name for names in _GROUPS.values() for name in names]
        groups = {**_GROUPS, "more": tuple(name for name in helps if name not in grouped)}
        lines = []
        for title, names in groups.items():
            there = [name for name in names if name in helps]
            lines += [f"  {title}:", *(f"    {name:<12} {helps[name]}" for name in there)] if there else []
        return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after the program's name; those of the process by default.

    Returns
    -------
    int
        0 done, 1 the work failed, 2 wrong usage or a refused parameter.

    Raises
    ------
    SystemExit
        From argparse: 0 after ``--help`` or ``--version``, 2 on wrong usage.
    """
    options = _parser().parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mnemodyn",
        description="Operator learning for resting-state fMRI: a reproducible research book.",
        epilog=_START,
        formatter_class=_Grouped,
    )
    parser.add_argument("--version", action="version", version=f"mnemodyn {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run a notebook with given parameters",
        description=_RUN,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("notebook", metavar="NOTEBOOK", help="notebook to run; it is not changed")
    run.add_argument("output", metavar="OUTPUT", help="where the executed notebook goes")
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one parameter; may be repeated, and wins over -f. Lists as '[1, 2]'",
    )
    run.add_argument(
        "-f",
        "--parameters-file",
        metavar="FILE",
        help="YAML or JSON file of parameters, one 'name: value' a line; - is standard input",
    )
    run.set_defaults(command=_run)

    info = commands.add_parser(
        "info",
        help="describe a checkpoint",
        description="Print what a checkpoint holds (architecture, data, training) as JSON.",
    )
    info.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the checkpoint")
    info.set_defaults(command=_info)
    _add_pretrain(commands)
    _add_preprocess(commands)
    _add_convert(commands)
    _add_index(commands)
    _add_simulate(commands)
    _add_embed(commands)
    _add_reconstruct(commands)
    _add_export(commands)
    _add_publish(commands)
    _add_book(commands)
    _add_completion(commands)
    _add_evaluate(commands)
    _add_ablate(commands)
    return parser


def _version() -> str:
    try:
        return version("mnemodyn")
    except PackageNotFoundError:  # run from its folder
        return "(not installed)"


def _run(options: argparse.Namespace) -> int:
    from mnemodyn.parameters import ParameterError
    from mnemodyn.running import NotebookFailed, run_notebook

    try:
        parameters = _file(options.parameters_file) if options.parameters_file else {}
        parameters |= dict(options.parameter)
        manifest = run_notebook(options.notebook, options.output, parameters)
    except (ParameterError, FileNotFoundError) as error:
        return _fail(error, 2)
    except (NotebookFailed, OSError, ValueError, ImportError) as error:
        return _fail(error, 1)
    print(f"{manifest['notebook']} -> {manifest['output']} in {manifest['seconds']:.1f} s")
    return 0


def _file(name: str) -> dict:
    from mnemodyn.parameters import ParameterError, read_yaml

    if name != "-" and not Path(name).is_file():
        raise ParameterError(f"there is no parameters file {name}")
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        content = read_yaml(text)
    except ValueError as error:
        raise ParameterError(f"{name}: {error}") from None
    if not isinstance(content, dict):
        raise ParameterError(f"{name} must hold a mapping 'name: value', got {content!r}")
    return content


def _info(options: argparse.Namespace) -> int:
    try:
        from mnemodyn.checkpoint import describe

        print(json.dumps(describe(options.checkpoint), indent=2, ensure_ascii=False))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        return _fail(error, 1)
    return 0


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a network on scans without labels",
        description=_PRETRAIN,
        epilog=_PRETRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pretrain.add_argument("data", metavar="DATA", help="hcp7, or a folder of scans")
    pretrain.add_argument("output", metavar="OUTPUT", help="folder of the run; an interrupted one is gone on with")
    pretrain.add_argument("--objective", default="masked", metavar="NAME", help="what is learned (default: masked)")
    pretrain.add_argument("--config", metavar="FILE", help="YAML file of settings in sections; - is standard input")
    pretrain.add_argument(
        "-s",
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one setting, whatever its section; may be repeated, and wins over --config",
    )
    pretrain.add_argument(
        "--restart", action="store_true", help="give up an unfinished run of other settings in OUTPUT"
    )
    pretrain.set_defaults(command=_pretrain)


def _pretrain(options: argparse.Namespace) -> int:
    from mnemodyn.parameters import ParameterError, read_yaml
    from mnemodyn.pretrain.config import configure

    try:
        sections = _file(options.config) if options.config else {}
        settings = {name: read_yaml(value) for name, value in options.set}
        objective, model, training, machine, data = configure(options.objective, sections, settings)
    except (ParameterError, ValueError) as error:
        return _fail(error, 2)
    try:
        from mnemodyn import ModelConfig, Scaling, load_scans
        from mnemodyn.data.scans import split_participants
        from mnemodyn.pretrain.training import pretrain

        scans = load_scans(options.data, t_r=data.t_r or None)
        train, validation, _ = split_participants(scans, n_test=data.n_test, n_validation=data.n_validation)
        checkpoint, history = pretrain(
            train,
            validation,
            options.output,
            model=ModelConfig(n_parcels=len(scans[0].parcels), **model),
            objective=objective,
            training=training,
            scaling=Scaling(data.scaling),
            machine=machine,
            restart=options.restart,
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1)
    score = checkpoint.training[objective.monitor]
    print(f"{Path(options.output) / 'best'}: {objective.monitor} {score:.4f}, {len(history)} epochs")
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"mnemodyn: {error}", file=sys.stderr)
    return status


_PREPROCESS = """\
Turn dense series (.dtseries.nii), or volumes, into parcels: sub-*/func/*_seg-ATLAS_stat-mean_timeseries.ptseries.nii
with a JSON sidecar each. What is complete already is skipped, so that an ended run goes on.

Volumes need a label volume as atlas, or Connectome Workbench (wb_command) and --surfaces in the volumes' space.
"""
_PREPROCESS_EXAMPLES = """\
examples:
  mnemodyn preprocess derivatives/fmriprep -o parcels --atlas schaefer400-tian3 --jobs 4
  mnemodyn preprocess derivatives/fmriprep -o parcels --atlas my.dlabel.nii --high-pass 0.01 \\
      --confounds trans_x trans_y trans_z rot_x rot_y rot_z csf white_matter
  mnemodyn preprocess sub-01_task-rest_bold.nii.gz -o parcels --atlas schaefer400-tian3 --surfaces L.surf.gii R.surf.gii

exit status: 0 done; 1 some scans failed, which are listed with the reason; 2 wrong usage.
"""


def _add_preprocess(commands: "argparse._SubParsersAction") -> None:
    command = commands.add_parser(
        "preprocess",
        help="turn dense series or volumes into parcels",
        description=_PREPROCESS,
        epilog=_PREPROCESS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="file, or a folder that is searched")
    add("-o", "--output", required=True, metavar="FOLDER", help="where the scans go")
    add("--atlas", required=True, help="schaefer400-tian3, a .dlabel.nii, or a label volume (.nii.gz) for volumes")
    add("--low-pass", type=float, metavar="HZ", help="upper end of the band that is kept (needs nilearn)")
    add("--high-pass", type=float, metavar="HZ", help="lower end of the band that is kept (needs nilearn)")
    add("--confounds", nargs="+", default=[], metavar="COLUMN", help="regressed out (needs nilearn)")
    add("--surfaces", nargs=2, default=[], metavar=("LEFT", "RIGHT"), help="midthickness surfaces, fs_LR 32k")
    add("--t-r", type=float, metavar="SECONDS", help="repetition time of files that state none")
    add("--table", action="store_true", help="write _timeseries.tsv in place of .ptseries.nii")
    add("--jobs", type=int, default=1, metavar="N", help="scans at a time; a dense one of 1,200 frames needs 1 GB")
    command.set_defaults(command=_preprocess)


def _preprocess(options: argparse.Namespace) -> int:
    from mnemodyn.data.preprocess import Preprocessing, preprocess
    from mnemodyn.data.scans import DataError

    try:
        settings = Preprocessing(
            options.atlas,
            options.low_pass,
            options.high_pass,
            tuple(options.confounds),
            tuple(options.surfaces),
            options.t_r,
            options.table,
        )
        rows = preprocess(options.sources, options.output, settings, jobs=options.jobs)
    except (DataError, OSError) as error:
        return _fail(error, 2)
    failed = rows[rows["status"] == "failed"]
    for row in failed.itertuples():
        print(f"{row.problem}: {row.message}", file=sys.stderr)
    counts = rows["status"].value_counts()
    print(", ".join(f"{counts.get(status, 0)} {status}" for status in ("done", "skipped", "failed")))
    return int(len(failed) > 0)


_CONVERT = """\
Write every usable scan of a cohort into a store, a directory that training reads at the speed of the disk.

May be killed at any moment and started again. With more scans in FOLDER it adds those to STORE.
What could not be used is listed in the store with the reason (mnemodyn.data.store.Store(STORE).excluded).
"""


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="write a cohort's scans into a store",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("cohort", metavar="COHORT", help="a shipped cohort's name, or a YAML file that describes one")
    convert.add_argument("folder", metavar="FOLDER", help="where its scans are")
    convert.add_argument("store", metavar="STORE", help="folder of the store, new or with scans of the same parcels")
    convert.add_argument(
        "--dtype",
        default="float16",
        choices=["float16", "float32"],
        help="float16 keeps z-scores, to about 0.0002 SD; float32 keeps the values exactly. Default: float16",
    )
    convert.add_argument("--workers", type=int, default=1, metavar="N", help="processes that index (default: 1)")
    convert.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> int:
    from mnemodyn.data.cohorts import index, load_cohort
    from mnemodyn.data.store import convert

    try:
        cohort = load_cohort(options.cohort)
    except ValueError as error:
        return _fail(error, 2)
    try:
        found = index(cohort, options.folder, progress=_progress, workers=options.workers)
        store = convert(found, options.store, dtype=options.dtype, progress=_progress)
    except (OSError, ValueError) as error:
        return _fail(error, 1)
    print(f"{options.store}: {store.summary()}")
    return 0


_INDEX = """\
Find a cohort's scans in FOLDER, match them with their phenotypes, read each once, and print what is there: scans,
participants, sites, frames, repetition times, every target's distribution, and what was left out and why.

COHORT is the name of one that comes with the package, or a YAML file of your own.
"""


def _add_index(commands: argparse._SubParsersAction) -> None:
    index = commands.add_parser(
        "index",
        help="say what scans a folder holds",
        description=_INDEX,
        epilog="cohorts of the package: abide, adhd200, adni, bids, hbn, hcp_aging, nkir, ukb",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument("cohort", metavar="COHORT", help="name or YAML file")
    index.add_argument("folder", metavar="FOLDER", help="folder of the scans; nothing in it is changed")
    index.add_argument("--json", action="store_true", help="print JSON, with every excluded file")
    index.add_argument("--table", metavar="FILE", help="write a row a usable scan: .csv, or .tsv")
    index.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read (default: 1)")
    index.set_defaults(command=_index)


def _index(options: argparse.Namespace) -> int:
    from mnemodyn.data.cohorts import index, load_cohort
    from mnemodyn.files import write_text

    try:
        cohort = load_cohort(options.cohort)
    except ValueError as error:
        return _fail(error, 2)
    try:
        found = index(cohort, options.folder, progress=_progress, workers=options.workers)
        if options.table:
            separator = "," if options.table.endswith(".csv") else "\t"
            write_text(options.table, found.table.to_csv(index=False, sep=separator))
    except (OSError, ValueError) as error:
        return _fail(error, 1)
    print(json.dumps(found.summary(), indent=2, ensure_ascii=False) if options.json else found)
    return 0


_SIMULATE = """\
Write a SIMULATED cohort: scans in the real one's formats and folders, its phenotype table, a few broken files, and
effects of known size on connectivity. FOLDER/simulated.json says what was planted.
"""


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    simulate = commands.add_parser("simulate", help="write a SIMULATED cohort", description=_SIMULATE)
    simulate.add_argument("cohort", metavar="COHORT", help="abide, adhd200, adni, hbn, hcp_aging, nkir or ukb")
    simulate.add_argument("folder", metavar="FOLDER", help="where it goes; must be empty or absent")
    simulate.add_argument("--participants", type=int, default=40, metavar="N", help="people (default: 40)")
    simulate.add_argument("--seed", type=int, default=0, metavar="S")
    simulate.add_argument("--parcels", type=int, default=40, metavar="N", help="even (default: 40)")
    simulate.add_argument("--frames", type=int, metavar="N", help="default: as in the real cohort")
    simulate.add_argument(
        "--effect",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "D"),
        help="size of a target's, site's or mean_fd's effect in standard deviations (default: 1); may be repeated",
    )
    simulate.add_argument("--generator", choices=("ou", "hcp7"), default="ou", help="default: ou")
    simulate.set_defaults(command=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    from mnemodyn.data.simulate import simulate_cohort

    try:
        truth = simulate_cohort(
            options.cohort,
            options.folder,
            n_participants=options.participants,
            seed=options.seed,
            n_parcels=options.parcels,
            n_frames=options.frames,
            effects={name: float(d) for name, d in options.effect},
            generator=options.generator,
        )
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    effects = ", ".join(f"{name} {e['d']:g}" for name, e in truth["effects"].items())
    print(f"SIMULATED {truth['cohort']} -> {options.folder}; effects in SD: {effects}")
    return 0


_ABLATE = """\
Train and score every cell of a grid of ablations, fold by fold, and write what each changes.

FOLDER keeps every finished cell: the same command goes on where it was stopped. GRID is a YAML file such as
notebooks/ablations.yaml, SIZE one of its sizes.
"""


def _add_ablate(commands: argparse._SubParsersAction) -> None:
    ablate = commands.add_parser(
        "ablate",
        help="run a grid of ablations",
        description=_ABLATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ablate.add_argument("data", metavar="DATA", help='"hcp7", or a folder of scans')
    ablate.add_argument("grid", metavar="GRID", help="YAML file of the cells and sizes")
    ablate.add_argument("size", metavar="SIZE", help="one of its sizes")
    ablate.add_argument("folder", metavar="FOLDER", help="where finished cells are kept")
    ablate.add_argument("--out", required=True, metavar="FILE", help="JSON of the result")
    ablate.add_argument("--cohort", metavar="NAME", help="whose folder DATA is, for a size with a target")
    ablate.add_argument("--folds", type=int, metavar="N", help="in place of the size's")
    ablate.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    ablate.set_defaults(command=_ablate)


def _ablate(options: argparse.Namespace) -> int:
    from dataclasses import replace
    from datetime import UTC, datetime

    from mnemodyn.evaluate.ablations import collect, read_grid, run_grid
    from mnemodyn.files import write_json

    try:
        grid = read_grid(options.grid, options.size)
        grid = replace(grid, folds=options.folds) if options.folds else grid
    except (OSError, ValueError) as error:
        return _fail(error, 2)
    try:
        import torch

        from mnemodyn.data.quality import open_scans

        torch.set_num_threads(options.threads)
        found = open_scans(options.data, cohort=options.cohort)
        scans = [scan for scan in found.scans if not (options.cohort and scan.constant.any())]
        records = run_grid(grid, scans, options.folder, table=found.table)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1)
    minutes = sum(record["cpu_seconds"] for mine in records.values() for record in mine) / 60
    facts = {
        "data": options.cohort or options.data,
        "size": options.size,
        "command": f"mnemodyn ablate {'DATA' if options.cohort else options.data} {options.grid} {options.size} FOLDER "
        f"--out FILE{f' --cohort {options.cohort}' if options.cohort else ''}",
        "cpu_minutes": round(minutes, 1),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_json(options.out, collect(grid, records, **facts))
    print(f"{options.out}: {len(grid.cells)} cells, {grid.folds} folds")
    return 0


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    """The options that name a checkpoint, and how scans are read."""
    command.add_argument(
        "-c", "--checkpoint", required=True, metavar="CHECKPOINT", help="folder or file, or NAME/MODEL on the hub"
    )
    command.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    command.add_argument("--subfolder", default="", metavar="FOLDER", help="where in the repository it is")
    command.add_argument("--compat", default="none", choices=["none", "reference"], help="reference: a draft's .ckpt")
    command.add_argument("--scaling", metavar="METHOD", help="for a checkpoint that does not know its own")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    command.add_argument("--t-r", type=float, metavar="SECONDS", help="for files that do not state it")
    command.add_argument(
        "--frames-first",
        action=argparse.BooleanOptionalAction,
        help="rows are frames (or parcels), for files that do not say",
    )
    command.add_argument(
        "--max-constant-parcels", type=int, default=0, metavar="N", help="that a scan may have (default: 0)"
    )


def _checkpoint(options: argparse.Namespace):
    from dataclasses import replace

    from mnemodyn.data.scaling import Scaling
    from mnemodyn.hub import from_pretrained

    if not sys.stderr.isatty():
        _quiet()
    checkpoint = from_pretrained(
        options.checkpoint, compat=options.compat, revision=options.revision, subfolder=options.subfolder
    )
    if options.scaling:
        if checkpoint.scaling is not None:
            raise ValueError(
                f"{options.checkpoint} was trained with scaling {checkpoint.scaling.method!r}; leave --scaling out"
            )
        checkpoint = replace(checkpoint, scaling=Scaling(options.scaling))
    checkpoint.model.to(options.device)
    return checkpoint


def _quiet() -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def _reading(options: argparse.Namespace) -> dict:
    return {name: getattr(options, name) for name in ("t_r", "frames_first", "max_constant_parcels")}


_EMBED = """\
Write a vector for every scan into a table: what a frozen network reads out of it.

SCANS are files (.ptseries.nii, .tsv, .csv, .1D, .npy, .npz, .mat), folders that are searched for them, or stores.
One scan is in memory at a time. An interrupted call, given again, goes on where it stopped. Scans that cannot be used
are listed with the reason in OUTPUT_refused.tsv and stop nothing; the status is 1 only if none could be used.
"""
_EMBED_EXAMPLES = """\
examples:
  mnemodyn embed derivatives/xcp_d -o embeddings.csv -c lab/mnemodyn-450
  mnemodyn embed *.1D -o embeddings.parquet -c runs/pretrain --t-r 2 --readout latent_mean latent_correlation
"""


def _add_embed(commands: argparse._SubParsersAction) -> None:
    embed = commands.add_parser(
        "embed",
        help="write a vector for every scan",
        description=_EMBED,
        epilog=_EMBED_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.add_argument("scans", nargs="+", metavar="SCANS", help="files, folders or stores")
    embed.add_argument("-o", "--output", required=True, metavar="FILE", help="table to write: .csv or .parquet")
    embed.add_argument(
        "--readout",
        nargs="+",
        default=["latent_mean", "latent_sd"],
        metavar="NAME",
        help="what is read out (default: latent_mean latent_sd)",
    )
    embed.add_argument("--pattern", default="*", metavar="GLOB", help="which names of a folder, such as '*4S456*'")
    _add_checkpoint(embed)
    embed.add_argument("--json", action="store_true", help="print what was done as JSON")
    embed.set_defaults(command=_embed)


def _embed(options: argparse.Namespace) -> int:
    try:
        from mnemodyn.embed import embed

        done = embed(
            options.scans,
            _checkpoint(options),
            options.output,
            names=options.readout,
            pattern=options.pattern,
            progress=_progress,
            **_reading(options),
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1)
    if options.json:
        print(json.dumps({"output": options.output, **done._asdict()}, indent=2, ensure_ascii=False))
        return 0
    resumed = f" ({done.n_resumed} of them from before)" if done.n_resumed else ""
    print(f"{options.output}: {done.n_scans} scans{resumed}, {done.n_features} features")
    if done.refused:
        listing = Path(options.output).with_name(f"{Path(options.output).stem}_refused.tsv")
        print(f"mnemodyn: {len(done.refused)} scans refused, see {listing}", file=sys.stderr)
    return 0


_RECONSTRUCT = """\
Fill the censored frames of a scan (those that *_outliers.tsv beside it marks) with what the network makes of the
frames around them. All other frames stay as they were measured.
"""


def _add_reconstruct(commands: argparse._SubParsersAction) -> None:
    reconstruct = commands.add_parser(
        "reconstruct",
        help="fill a scan's censored frames",
        description=_RECONSTRUCT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reconstruct.add_argument("scan", metavar="SCAN", help="a scan's file")
    reconstruct.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="sub-....ptseries.nii or sub-..._timeseries.tsv"
    )
    reconstruct.add_argument("--whole", action="store_true", help="write the reconstruction of every frame")
    _add_checkpoint(reconstruct)
    reconstruct.add_argument("--json", action="store_true", help="print what was done as JSON")
    reconstruct.set_defaults(command=_reconstruct)


def _reconstruct(options: argparse.Namespace) -> int:
    try:
        from mnemodyn.embed import reconstruct

        done = reconstruct(options.scan, _checkpoint(options), options.output, whole=options.whole, **_reading(options))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1)
    if options.json:
        print(json.dumps({"output": options.output, **done}, indent=2))
    else:
        print(f"{options.output}: {done['n_filled']} of {done['n_frames']} frames filled")
    return 0


_EXPORT = """\
Write a network as a program that runs without this package: FILE.pt2 for torch.export.load, FILE.onnx for an ONNX
runtime. FILE.json beside it says what goes in: parcels in their order, repetition time, scaling.
"""


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export",
        help="write a network as a .pt2 or .onnx program",
        description=_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or file, or NAME/MODEL on the hub")
    export.add_argument("output", metavar="FILE", help="program to write: .pt2 or .onnx")
    export.add_argument(
        "--frames", type=int, metavar="N", help="of the scans it will read (default: those of a training window)"
    )
    export.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    try:
        from mnemodyn.export import export
        from mnemodyn.hub import from_pretrained

        print(export(from_pretrained(options.checkpoint), options.output, n_timepoints=options.frames))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1)
    return 0


_PUBLISH = """\
Push a checkpoint to the Hugging Face Hub: weights (safetensors), configuration, scaling, parcels in their order,
training metrics, and a model card written from the run.

SOURCE is a run's folder (its best checkpoint is taken), a checkpoint's folder, a .ckpt of the published draft, or a
version folder of its trainer (the best validation metric in the names is taken). The token is HF_TOKEN or that of
`hf auth login`. Participants' identifiers are replaced by their number.
"""
_PUBLISH_EXAMPLES = """\
examples:
  mnemodyn publish runs/pretrain --repo-id lab/mnemodyn-450 --results book/runs/reconstruction.json --dry-run
  mnemodyn publish lightning_logs/version_3 --repo-id lab/draft --private --revision v1
"""


def _add_publish(commands: argparse._SubParsersAction) -> None:
    publish = commands.add_parser(
        "publish",
        help="push a checkpoint to the Hugging Face Hub",
        description=_PUBLISH,
        epilog=_PUBLISH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    publish.add_argument("source", metavar="SOURCE", help="run, checkpoint or version folder")
    publish.add_argument("--repo-id", required=True, metavar="NAME/MODEL", help="repository, made where it is missing")
    publish.add_argument("--private", action="store_true", default=None, help="where it is made, make it private")
    publish.add_argument("--revision", metavar="BRANCH", help="made where it is missing (default: main)")
    publish.add_argument("--subfolder", default="", metavar="FOLDER", help="folder of the repository")
    publish.add_argument(
        "--licence", "--license", default="mit", metavar="ID", help="the hub's identifier (default: mit)"
    )
    publish.add_argument("--commit-message", default="Publish a MnemoDyn checkpoint", metavar="TEXT")
    publish.add_argument("--results", nargs="+", default=[], metavar="FILE", help="JSON of results for the card")
    publish.add_argument("--metrics", metavar="FILE", help="CSV of training metrics, where it is not beside")
    publish.add_argument("--hyper-parameters", metavar="FILE", help="YAML of settings, for a .ckpt without")
    publish.add_argument("--keep-participants", action="store_true", help="publish their identifiers too")
    publish.add_argument("--dry-run", action="store_true", help="send nothing, show the folder that would be pushed")
    publish.set_defaults(command=_publish)


def _publish(options: argparse.Namespace) -> int:
    contents = {
        name: getattr(options, name)
        for name in ("subfolder", "licence", "results", "metrics", "hyper_parameters", "keep_participants")
    }
    try:
        from mnemodyn.hub import publish, write_folder

        if not sys.stderr.isatty():
            _quiet()
        if options.dry_run:
            return _show(options.repo_id, write_folder, options.source, contents)
        address = publish(
            options.source,
            options.repo_id,
            private=options.private,
            revision=options.revision,
            commit_message=options.commit_message,
            **contents,
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _fail(error, 1)
    print(address)
    return 0


def _show(repo_id: str, write_folder, source: str, contents: dict) -> int:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_folder(source, folder, repo_id=repo_id, **contents)
        place = "/".join(filter(None, (repo_id, contents["subfolder"])))
        for path in sorted(Path(folder).iterdir()):
            print(f"{place}/{path.name}\t{path.stat().st_size} bytes")
        print(f"\n{(Path(folder) / 'README.md').read_text(encoding='utf-8')}")
    return 0


_BOOK = """\
Run every notebook of a profile and build the pages, in a clone of the repository: `make book` for an environment that
is already there.
"""


def _add_book(commands: argparse._SubParsersAction) -> None:
    book = commands.add_parser(
        "book",
        help="run the notebooks and build the pages",
        description=_BOOK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    book.add_argument("--profile", default="quick", metavar="NAME", help="profiles/NAME.yaml (default: quick)")
    book.add_argument("--cores", type=int, default=2, metavar="N", help="processor cores (default: 2)")
    book.add_argument("--data", metavar="FOLDER", help="scans of your own in place of the profile's")
    book.add_argument("-n", "--dry-run", action="store_true", help="say what would run")
    book.set_defaults(command=_book)


def _book(options: argparse.Namespace) -> int:
    import subprocess
    from importlib.util import find_spec

    from mnemodyn.files import find_root

    root = find_root()
    profile = root / "profiles" / f"{options.profile}.yaml"
    if not (root / "Snakefile").is_file():
        return _fail(FileNotFoundError(f"{root} holds no Snakefile; go to a clone of the repository"), 2)
    if not profile.is_file():
        known = ", ".join(sorted(path.stem for path in profile.parent.glob("*.yaml")))
        return _fail(FileNotFoundError(f"there is no profile {options.profile!r}; there are {known}"), 2)
    if find_spec("snakemake") is None:
        return _fail(ImportError("the book needs snakemake: pip install 'mnemodyn[book]', or run make book"), 1)
    words = [sys.executable, "-m", "snakemake", "--configfile", str(profile), "--cores", str(options.cores)]
    words += ["-n"] * options.dry_run + (["--config", f"data={options.data}"] if options.data else [])
    return int(subprocess.run(words, cwd=root, check=False).returncode != 0)


_COMPLETION = """\
Print a script that completes commands and options. For bash:

  mnemodyn completion bash > ~/.local/share/bash-completion/completions/mnemodyn
"""


def _add_completion(commands: argparse._SubParsersAction) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script for the shell's completion",
        description=_COMPLETION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    completion.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        return _fail(ImportError("completion needs shtab: pip install 'mnemodyn[completion]'"), 1)
    print(shtab.complete(_parser(), shell=options.shell))
    return 0


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} scans", end="\n" if done == total else "", file=sys.stderr, flush=True)


_EVALUATE = """\
Predict a target from a cohort's scans by several methods on the same folds over participants, and write scores with
95 % intervals. Without --method: confounds and fc, and with --checkpoint model and model+fc too.
"""


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("evaluate", help="predict a target from a cohort's scans", description=_EVALUATE)
    evaluate.add_argument("cohort", metavar="COHORT", help="name or YAML file")
    evaluate.add_argument("source", metavar="FOLDER_OR_STORE", help="folder of the scans, or a store")
    evaluate.add_argument("--target", required=True, metavar="T", help="one of the cohort's targets")
    evaluate.add_argument("--json", required=True, metavar="OUT", help="where the scores go")
    evaluate.add_argument("--checkpoint", metavar="C", help="folder of a checkpoint")
    evaluate.add_argument("--method", nargs="+", metavar="M", help="such as fc, tangent, model+fc, finetune_all")
    evaluate.add_argument("--folds", type=int, default=5, metavar="N", help="default: 5")
    evaluate.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    evaluate.add_argument("--leave-one-site-out", action="store_true", help="in place of folds")
    evaluate.add_argument("--control", choices=("permuted", "noise"), help="shuffled labels, or scans of white noise")
    evaluate.add_argument("--cache", metavar="DIR", help="keep read-outs and folds here, so that a second run goes on")
    evaluate.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S")
    evaluate.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from mnemodyn.checkpoint import load_checkpoint
    from mnemodyn.data.cohorts import load_cohort
    from mnemodyn.evaluate import downstream, splits
    from mnemodyn.files import write_json

    methods = options.method or ["confounds", "fc", *(["model", "model+fc"] if options.checkpoint else [])]
    try:
        cohort = load_cohort(options.cohort)
        kinds = {target.name: target.kind for target in cohort.targets}
        if options.target not in kinds:
            raise ValueError(f"--target must be one of {', '.join(kinds)} for {cohort.name}, got {options.target!r}")
        if unknown := [m for m in methods if m not in downstream.METHODS]:
            raise ValueError(f"--method must be among {', '.join(downstream.METHODS)}, got {unknown[0]!r}")
    except ValueError as error:
        return _fail(error, 2)
    try:
        checkpoint = load_checkpoint(options.checkpoint) if options.checkpoint else None
        opened, origin = downstream.open_scans(cohort, options.source, workers=options.jobs)
        task = downstream.Task.of(opened.table, options.target, kinds[options.target])
        scans: Sequence = downstream.Rows(opened, task.rows)
        if options.leave_one_site_out:
            folds = splits.leave_one_site_out(task.table)
        else:
            folds = splits.repeated_folds(
                task.table, task.target, n_folds=options.folds, n_repeats=options.repeats, seed=options.seed
            )
        if options.control == "permuted":
            task = downstream.permuted(task, options.seed)
        elif options.control == "noise":
            scans = downstream.noise_scans(scans, options.seed)
        found = downstream.evaluate(
            scans,
            task,
            folds,
            methods,
            checkpoint=checkpoint,
            cache=options.cache,
            n_jobs=options.jobs,
            seed=options.seed,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        content = {"cohort": cohort.name, "simulated": getattr(origin, "simulated", None), "control": options.control}
        content |= {"excluded": len(origin.excluded)} | downstream.report(found, seed=options.seed)
        write_json(options.json, content)
        folds.write(Path(options.json).with_suffix(".folds.csv"))
    except (OSError, ValueError) as error:
        return _fail(error, 1)
    for row in content["rows"]:
        value = row[task.metric]
        shown = f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})" if row["failed"] == [] else "FAILED"
        print(f"{row['method']}: {task.metric} {shown}, n = {row['n']}")
    return int(any(row["failed"] for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
