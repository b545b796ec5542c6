"""The ``mnemodyn`` command: run a notebook headless, or describe a checkpoint."""

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after the program's name; those of the process by default.

    Returns
    -------
    int
        0 done, 1 the notebook or the checkpoint failed, 2 wrong usage or a refused parameter.

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
        epilog="To build the whole book: make book",
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
    _add_index(commands)
    _add_simulate(commands)
    _add_evaluate(commands)
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


def _fail(error: Exception, status: int) -> int:
    print(f"mnemodyn: {error}", file=sys.stderr)
    return status


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
        scans, origin = downstream.open_scans(cohort, options.source, workers=options.jobs)
        task = downstream.Task.of(scans.table, options.target, kinds[options.target])
        scans = downstream.Rows(scans, task.rows)
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
