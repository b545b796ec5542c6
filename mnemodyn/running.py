"""Run a notebook with checked parameters, and record what came of it."""

import json
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mnemodyn.files import write_json, write_text
from mnemodyn.parameters import ParameterError, check_parameters, read_parameters
from mnemodyn.provenance import surroundings

__all__ = ["NotebookFailed", "run_notebook"]

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CELL_FILE = re.compile(r"\S*ipykernel_\d+/\d+\.py")  # a warning in a cell names its process
_DIED = """\
the kernel died in this cell. Most often the system had no memory left and ended it: take a smaller batch or shorter \
windows, or give the job more memory. If memory was free, compiled code crashed."""


class NotebookFailed(RuntimeError):
    """A notebook did not run to its end; ``manifest`` is the record of it."""

    def __init__(self, message: str, manifest: dict):
        super().__init__(message)
        self.manifest = manifest


def run_notebook(
    notebook: str | os.PathLike,
    output: str | os.PathLike,
    parameters: Mapping[str, Any] | None = None,
) -> dict:
    """Run ``notebook`` from start to end, by the caller's interpreter, and keep it, executed, as ``output``.

    The executed notebook holds nothing of the clock, the process or the machine: two runs with equal results are equal
    byte for byte. Those facts go to ``<output stem>.manifest.json`` beside it. ``output`` is replaced only at the end,
    by a notebook that is complete or that ends in the error it met.

    Parameters
    ----------
    notebook : path-like
        Notebook (nbformat 4) with one code cell tagged ``parameters``.
    output : path-like
    parameters : mapping, optional
        Values that replace defaults, see `check_parameters`.

    Returns
    -------
    dict
        The manifest: ``notebook``, ``output``, ``parameters`` (all, with defaults), ``status`` (``"running"``,
        ``"done"`` or ``"failed"``), ``error`` (None or ``type``, ``message`` and ``cell``, an index into ``output``),
        ``seconds``, ``started``, ``ended`` (UTC), ``peak_memory_mb``, and what
        :func:`~mnemodyn.provenance.surroundings` finds.

    Raises
    ------
    FileNotFoundError
        Where ``notebook`` does not exist.
    ParameterError
        Where it is not a notebook, or its parameters are refused; nothing is written then.
    NotebookFailed
        Where a cell raised, the kernel died, or the run was interrupted (Ctrl-C, SIGTERM). The notebook up to there is
        kept as ``output``.
    """
    import nbformat

    notebook, output = Path(notebook), Path(output)
    if notebook.resolve() == output.resolve():
        raise ParameterError(f"output must not be the notebook itself, got {output}")
    if output.is_dir():
        raise ParameterError(
            f"output must be the file of the executed notebook, and {output} is a folder"
        )
    source = _read(notebook)
    try:
        known = read_parameters(source)
        given = check_parameters(known, parameters or {})
    except ParameterError as error:
        raise ParameterError(f"{notebook}: {error}") from None
    record = output.with_suffix(".manifest.json")
    partial = output.with_name(f".{output.stem}.running.ipynb")
    clock = time.monotonic()
    manifest = {
        "notebook": _shown(notebook),
        "output": _shown(output),
        "parameters": {**known, **given},
        "status": "running",
        "error": None,
        "seconds": None,
        "started": _now(),
        **surroundings(),
    }
    write_json(record, manifest)
    failure: dict | None = None
    try:
        _execute(source, partial, given)
    except KeyboardInterrupt:
        failure = {"type": "Interrupted", "message": "interrupted before its end", "cell": None}
    except Exception as error:
        failure = _describe(error)
    executed, running = _tidy(partial)
    if failure and executed and failure["cell"] is None and running is not None:
        failure["cell"], name, message = running, failure["type"], failure["message"]
        said = nbformat.v4.new_output(
            "error", ename=name, evalue=message, traceback=[f"{name}: {message}"]
        )
        executed.cells[running].outputs.append(said)  # the cell itself does not say why it stopped
    if executed:
        write_text(output, nbformat.writes(executed) + "\n")
    partial.unlink(missing_ok=True)
    manifest |= {
        "status": "failed" if failure else "done",
        "error": failure,
        "seconds": round(time.monotonic() - clock, 3),
        "ended": _now(),
        "peak_memory_mb": _peak_memory(),
    }
    write_json(record, manifest)
    if failure:
        raise NotebookFailed(_message(manifest, executed), manifest)
    return manifest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path) -> Any:
    """Read a notebook, its missing cell ids filled in order rather than at random."""
    import nbformat

    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for index, cell in enumerate(content["cells"]):
            cell.setdefault("id", f"cell-{index}")
        content["nbformat_minor"] = max(5, content["nbformat_minor"])
        notebook = nbformat.reads(json.dumps(content), as_version=4)
        nbformat.validate(notebook)
    except (KeyError, TypeError, ValueError, AttributeError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ParameterError(f"{path} is not a notebook of nbformat 4: {reason}") from None
    return notebook


def _execute(source: Any, partial: Path, parameters: dict) -> None:
    import logging

    with (
        warnings.catch_warnings(),
        _terminating(),
        tempfile.TemporaryDirectory(prefix="mnemodyn-") as folder,
    ):
        warnings.simplefilter("ignore")  # of papermill and its dependencies; not the notebook's
        import papermill
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager

        class Manager(AsyncKernelManager):
            """Talks over sockets in a private folder and finds this interpreter's kernel."""

            def _transport_default(self) -> str:
                # No open port on a shared machine, and none for two kernels to race for. But the
                # system takes no socket's path of much over 100 characters.
                return "ipc" if len(folder) < 80 else "tcp"

            def _ip_default(self) -> str:
                # By jupyter_client's own default all kernels started in a folder share a socket.
                return f"{folder}/kernel" if self.transport == "ipc" else "127.0.0.1"

            def _kernel_spec_manager_default(self) -> KernelSpecManager:
                # With no folder to look in, "python3" is the kernel of sys.executable.
                return KernelSpecManager(parent=self, kernel_dirs=[])

        for library in ("papermill", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        inherited = {  # so that a kernel does the same on every machine
            "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "0"),  # no dates in figures
            "MNEMODYN_HEADLESS": "1",
            "PYTHONHASHSEED": "0",
            # MPLBACKEND=agg, common on clusters, would leave the notebook without its figures.
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            # Neither a person's start-up files nor a history database in their home folder.
            "IPYTHONDIR": folder,
            "JUPYTER_RUNTIME_DIR": folder,
        }
        with patch.dict(os.environ, inherited):
            papermill.execute_notebook(
                source,
                # papermill formats its paths, so that a brace in a folder's name would fail.
                str(partial.absolute()).replace("{", "{{").replace("}", "}}"),
                parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=180,  # a busy node may take more than the usual 60 seconds
                iopub_timeout=120,
                kernel_manager_class=Manager,
                extra_arguments=["--log-level=CRITICAL"],
            )


@contextmanager
def _terminating() -> Iterator[None]:
    """Treat SIGTERM, which schedulers send, as Ctrl-C: the kernel is shut down in order."""
    main = threading.current_thread() is threading.main_thread()  # no other takes signals
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(error: Exception) -> dict:
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    kind, message, cell = type(error).__name__, str(error), None
    if isinstance(error, PapermillExecutionError):
        kind, message, cell = error.ename, error.evalue, error.cell_index
    elif isinstance(error, DeadKernelError):
        kind, message = "KernelDied", _DIED
    return {"type": kind, "message": _clean(message), "cell": cell}


def _clean(text: str) -> str:
    """Remove colour codes, process numbers and the current folder's absolute path."""
    return _CELL_FILE.sub("<cell>", _ANSI.sub("", text)).replace(f"{os.getcwd()}{os.sep}", "")


def _tidy(path: Path) -> tuple[Any, int | None]:
    """Papermill's notebook, if it wrote one, without what differs from run to run, and the cell begun last."""
    import nbformat
    from papermill.execute import remove_error_markers

    try:
        notebook = remove_error_markers(nbformat.read(path, as_version=4))
    except (OSError, ValueError, nbformat.reader.NotJSONError):
        return None, None
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    running = None
    for index, cell in enumerate(notebook.cells):
        timing = cell.metadata.pop("papermill", {})
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill adds empty ones
        if cell.cell_type == "code":
            cell.outputs = _merge(cell.outputs)
            running = index if timing.get("start_time") else running
    return notebook, running


def _merge(outputs: list) -> list:
    """Join neighbouring streams, standard output first: how the kernel cuts and mixes them depends on the moment."""
    merged: list = []
    for is_stream, group in groupby(outputs, key=lambda output: output.output_type == "stream"):
        found = list(group)
        if is_stream:
            for name in ("stdout", "stderr"):
                if parts := [output for output in found if output.name == name]:
                    parts[0].text = _clean("".join(part.text for part in parts))
                    merged.append(parts[0])
            continue
        for output in found:
            if output.output_type == "error":
                output.evalue = _clean(output.evalue)
                output.traceback = [_clean(line) for line in output.traceback]
        merged += found
    return merged


def _message(manifest: dict, executed: Any) -> str:
    error = manifest["error"]
    lines = [f"{manifest['notebook']} failed", f"{error['type']}: {error['message']}"]
    if executed and error["cell"] is not None:
        cell = executed.cells[error["cell"]]
        first = cell.source.strip().split("\n")[0][:80]
        lines[0] += f" in cell {error['cell']}, which begins: {first}"
    if executed:
        lines.append(f"The notebook up to there, with the traceback: {manifest['output']}")
    return "\n".join(lines)


def _shown(path: Path) -> str:
    """Name a path from the current folder, so that a manifest holds no path of one machine."""
    path = path.absolute()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _peak_memory() -> int:
    """Return the largest resident memory of a finished child (the kernel) in MiB."""
    import resource
    import sys

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit
