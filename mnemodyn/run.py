"""Run a notebook headless, with checked parameters, and record what came of it.

papermill executes the notebook. This module checks the parameters before anything starts, keeps
the executed notebook free of what differs between two equal runs, and writes a manifest beside it.
"""

import ast
import json
import logging
import os
import resource
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mnemodyn.files import (
    locked,
    read_yaml,
    resolve,
    temporary,
    temporary_folder,
    write_json,
    write_text,
)
from mnemodyn.provenance import surroundings
from mnemodyn.settings import nearest

__all__ = [
    "NotebookFailed",
    "ParameterError",
    "check_parameters",
    "first_results",
    "read_parameters",
    "run_notebook",
]


class ParameterError(ValueError):
    """A notebook's parameters, or the values given for them, cannot be used."""


class NotebookFailed(RuntimeError):
    """A notebook did not run to its end; the message names the cell."""


def read_parameters(notebook: str | os.PathLike) -> dict[str, Any]:
    """Names and default values of a notebook's cell tagged ``parameters``.

    The cell is parsed as Python. `papermill.inspect_notebook` reads it line by line, and misses a
    name whose comment holds a ``=``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ParameterError
        If it is not a notebook, if not exactly one code cell is tagged ``parameters``, or if that
        cell does more than give names to literal values.
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        tagged = []
        for cell in cells:
            if "parameters" in cell["metadata"].get("tags", []):
                tagged.append("".join(cell["source"]))
    except (AttributeError, ValueError, LookupError, TypeError, RecursionError):
        raise ParameterError(f"{notebook} is not a notebook of nbformat 4") from None
    if len(tagged) != 1:
        raise ParameterError(
            f"{notebook}: exactly one cell must be tagged 'parameters', found {len(tagged)}"
        )
    defaults = {}
    try:
        for line in ast.parse(tagged[0]).body:
            defaults[line.targets[0].id] = ast.literal_eval(line.value)  # type: ignore[attr-defined]
    # Brackets in brackets end Python's parser with the last two.
    except (AttributeError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ParameterError(
            f"{notebook}: the cell tagged 'parameters' must only give names to literal values"
        ) from None
    return defaults


def check_parameters(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values, each as the type of its default.

    Text for a default that is not text is read as YAML. A whole number will do for a float. A
    default of None takes anything.

    Raises
    ------
    ParameterError
        For a value of another type, and for an unknown name, of which the nearest known is told.
    """
    checked = {}
    for name, value in given.items():
        if name not in defaults:
            raise ParameterError(f"unknown parameter {name}{nearest(name, defaults)}")
        checked[name] = _convert(name, defaults[name], value)
    return checked


def _convert(name: str, default: Any, value: Any) -> Any:
    """One value as the type of its default."""
    kind = type(default)
    found = value
    if isinstance(value, str) and kind is not str:
        # What is no YAML stays text, which a default of None takes.
        with suppress(ValueError):
            found = read_yaml(value)
    if kind is float and type(found) is int:
        found = float(found)
    if default is not None and type(found) is not kind:
        raise ParameterError(
            f"parameter {name} must be {kind.__name__} as its default {default!r}, got {value!r}"
        )
    return found


def run_notebook(
    notebook: str | os.PathLike,
    output: str | os.PathLike,
    parameters: Mapping[str, Any] | None = None,
) -> dict:
    """Run a notebook from start to end by this Python, and keep it, executed, as ``output``.

    The executed notebook holds nothing of the clock, the process or the machine: two equal runs
    are equal byte for byte. ``output`` is replaced at the end, by a notebook that is complete or
    that ends in the error it met. The notebook's folder is on the import path, so that
    ``from lib import ...`` means the same as in a notebook opened by hand.

    Parameters
    ----------
    notebook : path
        Notebook with one code cell tagged ``parameters``.
    output : path
        The executed notebook.
    parameters : mapping, optional
        Values that replace defaults; see `check_parameters`.

    Returns
    -------
    dict
        The manifest, which is also written as ``STEM.manifest.json`` beside ``output``: paths, all
        parameters, ``status`` (running, done, failed), ``error`` (None or a sentence), times (UTC,
        seconds), ``peak_memory_mb``, and what `mnemodyn.provenance.surroundings` finds.

    Raises
    ------
    FileNotFoundError, ParameterError
        If the notebook or a parameter cannot be used; nothing is written then.
    NotebookFailed
        If a cell raised or ended the kernel, it died, or the run was interrupted (Ctrl-C, SIGTERM).
    RuntimeError
        If another run writes `output`.
    """
    notebook = Path(notebook)
    output = Path(output)
    if output.suffix != ".ipynb" or notebook.resolve() == output.resolve():
        raise ParameterError(f"output must be another file NAME.ipynb, got {output}")
    defaults = read_parameters(notebook)
    given = check_parameters(defaults, parameters or {})
    with locked(output, "mnemodyn run"):
        return _run(notebook, output, defaults, given)


def _run(notebook: Path, output: Path, defaults: dict, given: dict) -> dict:
    """Run a notebook whose parameters are checked, and return the manifest."""
    import nbformat

    record = output.with_suffix(".manifest.json")
    manifest = {
        "notebook": os.path.relpath(notebook),
        "output": os.path.relpath(output),
        "parameters": {**defaults, **given},
        "status": "running",
        "error": None,
        "started": _now(),
        **surroundings(),
    }
    write_json(record, manifest)
    clock = time.monotonic()
    partial = temporary(output)
    error = _execute(notebook, partial, given)
    message = f"{manifest['notebook']} failed"
    if partial.is_file():
        executed = nbformat.read(partial, as_version=4)
        cell, complete = _tidy(executed)
        if not error and not complete:
            error = "the cell stopped before its end, and those after it did not run"
        # Warnings name files of this machine.
        text = nbformat.writes(executed).replace(f"{os.getcwd()}{os.sep}", "")
        write_text(output, text + "\n")
        partial.unlink()
        if error and cell is not None:
            begins = executed.cells[cell].source.strip().split("\n")[0][:80]
            message += f" in cell {cell}, which begins: {begins}"
    # The kernel is the largest child, whose memory is in KiB on Linux.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    manifest.update(
        status="failed" if error else "done",
        error=error,
        ended=_now(),
        seconds=round(time.monotonic() - clock, 3),
        processor_seconds=round(used.ru_utime + used.ru_stime, 1),
        peak_memory_mb=used.ru_maxrss // 1024,
    )
    write_json(record, manifest)
    if error:
        raise NotebookFailed(f"{message}\n{error}\nThe notebook up to there: {manifest['output']}")
    return manifest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _execute(notebook: Path, partial: Path, parameters: dict) -> str | None:
    """Let papermill execute the notebook cell by cell into ``partial``; what went wrong, or None."""
    with warnings.catch_warnings(), temporary_folder() as folder:
        warnings.simplefilter("ignore")  # of papermill's dependencies; not the notebook's own
        import nbformat
        import papermill
        from nbclient.exceptions import DeadKernelError
        from traitlets.config import Config

        for library in ("papermill", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        # Schedulers send SIGTERM. As Ctrl-C it lets the kernel be shut down in order. Ctrl-C itself
        # is ignored in what a script starts in the background. Only the main thread gets signals.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        config = Config()
        # Sockets in a private folder: two kernels that start together cannot race for a port. The
        # system takes no path of a socket of much over 100 characters.
        if len(folder) < 80:
            config.KernelManager.transport = "ipc"
            config.KernelManager.ip = f"{folder}/kernel"
        try:
            # Jupyter's temporary files go with the folder, even where this process is killed.
            private = patch.object(tempfile, "tempdir", folder)
            with private, patch.dict(os.environ, _environment(notebook, folder)):
                papermill.execute_notebook(
                    nbformat.read(notebook, as_version=4),
                    # papermill formats its paths, so that braces must be doubled.
                    str(partial.absolute()).replace("{", "{{").replace("}", "}}"),
                    parameters,
                    kernel_name="python3",
                    language="python",
                    progress_bar=False,
                    start_timeout=180,  # a busy machine may take more than the usual 60 seconds
                    coalesce_streams=True,  # how a cell's output is cut into pieces is chance
                    config=config,
                    extra_arguments=[
                        "--log-level=CRITICAL",
                        "--InteractiveShell.colors=NoColor",
                        # IPython's own would end the kernel some cells later, and by chance.
                        "--IPKernelApp.exec_lines=del exit, quit",
                        # What a cell writes to sys.__stderr__ is progress, for the terminal.
                        "--IPKernelApp.capture_fd_output=False",
                    ],
                )
        except KeyboardInterrupt:
            return "interrupted before its end"
        except DeadKernelError:
            return (
                "the kernel died. Where the cell does not end it itself (os._exit), most often no memory was left: "
                "take smaller batches or shorter windows, or give the job more memory"
            )
        except papermill.PapermillExecutionError as error:
            return f"{error.ename}: {error.evalue}"
        except Exception as error:  # whatever else: no kernel, a full disk
            return f"{type(error).__name__}: {error}"
    return None


def _environment(notebook: Path, folder: str) -> dict[str, str]:
    """What a kernel needs to do the same on every machine, and to import from beside the notebook."""
    return {
        "PYTHONPATH": f"{notebook.absolute().parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "SOURCE_DATE_EPOCH": "0",  # no dates in figures
        "PYTHONHASHSEED": "0",
        # MPLBACKEND=agg, common on clusters, would leave the notebook without its figures.
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYKERNEL_CELL_NAME": "<cell>",  # in warnings, instead of a file named by the process
        # Neither a person's start-up files, nor a history database, nor a kernel registered
        # elsewhere: "python3" is then the kernel of this interpreter.
        "IPYTHONDIR": folder,
        "JUPYTER_RUNTIME_DIR": folder,
        "JUPYTER_PATH": "",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }


def _tidy(notebook: Any) -> tuple[int | None, bool]:
    """Remove what differs between equal runs; the index of the cell begun last, and whether all came to their end."""
    from papermill.execute import remove_error_markers

    remove_error_markers(notebook)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    begun = None
    complete = True
    for index, cell in enumerate(notebook.cells):
        told = cell.metadata.pop("papermill", {})
        if told.get("start_time"):
            begun = index
        # To papermill a cell that ends in sys.exit(0) is a way to stop; a notebook's results are then not there.
        if cell.cell_type == "code" and told.get("status") != "completed":
            complete = False
        cell.metadata.pop("execution", None)
        tags = cell.metadata.get("tags")
        if not tags:
            cell.metadata.pop("tags", None)  # papermill adds empty ones
        elif "injected-parameters" in tags:
            cell.id = "injected-parameters"  # papermill makes a random one
    return begun, complete


def first_results(manifest: Mapping[str, Any], rows: int = 12) -> str:
    """The first rows of a run's table of results as text for a terminal; empty if it has none."""
    from mnemodyn.results import read_results  # pandas, which nothing else here needs

    path = manifest["parameters"].get("results") or ""
    if not path.endswith(".csv") or not resolve(path).is_file():
        return ""
    table = read_results(resolve(path))
    shown = table[["data", "task", "method", "score", "value", "low", "high", "n"]].head(rows)
    shown = shown.astype({"n": object})  # without a number it is then empty
    text = shown.to_string(index=False, na_rep="", float_format="{:.3f}".format, max_colwidth=40)
    return f"{text}\n{len(table)} rows in {path}"
