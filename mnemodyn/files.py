"""Files written whole, one writer at a time, fingerprints, and the one rule for where a relative path starts."""

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pandas as pd

# What a file or folder is called until it is whole: .NAME.PROCESS-MACHINE-RANDOM.tmp.
TEMPORARY = re.compile(r"\..+\.(\d+)-([0-9a-f]{8})-[0-9a-f]{8}\.tmp")
MACHINE = f"{zlib.crc32(socket.gethostname().encode()):08x}"
# What this process holds; the system's lock keeps other processes off only.
_held: set[Path] = set()


class OutputError(ValueError):
    """An output that would replace what is read, or what no command of this package wrote."""

    problem = "output"


@contextmanager
def locked(output: str | os.PathLike, what: str) -> Iterator[None]:
    """Hold an output while the block runs, so that no other command writes it at the same time.

    The lock goes with its owner, however it ends. What killed owners were writing is removed first.

    Parameters
    ----------
    output : path-like
        The file that will be written, whose folder is made, or a folder that is there.
    what : str
        What holds it, such as ``"mnemodyn embed"``.

    Raises
    ------
    RuntimeError
        If something else holds it; the message names what, its process and its machine.
    """
    path = Path(os.path.realpath(output))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder's is inside, because the folder above may be one that nobody may write in.
    place = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    descriptor = _hold(place, output)
    _held.add(place)
    try:
        owner = f"{what} (process {os.getpid()} on {socket.gethostname()})"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner.encode())
        remove_left_over(path)
        yield
    finally:
        # While it is still held: whoever has opened this file already sees that it is gone.
        place.unlink(missing_ok=True)
        os.close(descriptor)
        _held.discard(place)


def _hold(place: Path, output: str | os.PathLike) -> int:
    """Take the system's lock on the file `place`, and return its descriptor."""
    import fcntl

    # To open the file again would give up this process's own lock.
    while place not in _held:
        # A link is not followed: what it names is not ours.
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            reason = f"{error.strerror}; where there is something else than a file, move it away"
            raise OSError(error.errno, f"cannot lock {output}: {reason}", str(place)) from None
        try:
            # This kind of lock is not handed on to child processes, which may outlive their parent.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                break
            remedy = "do not write it with two commands at once"
            warnings.warn(
                f"{output}: its file system has no locks ({error}); {remedy}", stacklevel=1
            )
            return descriptor
        # The owner before may have removed the file since it was opened.
        if place.exists() and place.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)
    owner = "this process"
    if place not in _held:
        # It may end at this moment.
        owner = "another process"
        with suppress(OSError):
            owner = place.read_text() or owner
    remedy = "let it end, or name another output"
    raise RuntimeError(f"{output} is being written by {owner}; {remedy}")


def remove_left_over(path: Path, *, held: bool = True) -> None:
    """Remove what processes that are no more were writing into a folder, or in place of a file.

    Where the place is not `held` by a lock, what other machines have left may be in use, and stays.
    """
    if path.is_dir():
        found = path.rglob(".*.tmp")
    else:
        found = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    for unfinished in list(found):
        named = TEMPORARY.fullmatch(unfinished.name)
        if named is None or _is_alive(int(named[1])):
            continue
        if held or named[2] == MACHINE:
            remove(unfinished)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link but not what it names, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def temporary(path: str | os.PathLike) -> Path:
    """A fresh name beside ``path`` for what becomes it; `locked` removes it if this process is killed."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}-{MACHINE}-{secrets.token_hex(4)}.tmp")


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A private folder of the system's, removed at the end, with those that killed processes have left."""
    prefix = ".mnemodyn-temporary-"
    with tempfile.TemporaryDirectory(prefix=prefix) as name, locked(name, "mnemodyn"):
        yield name
    # Last: what a process killed just before this call has left is by now old enough.
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        # What is somebody else's or in use cannot be held; what is new may not be held yet.
        with suppress(OSError, RuntimeError):
            status = folder.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > 1:
                with locked(folder, "mnemodyn"):
                    shutil.rmtree(folder)


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Give a stream whose bytes become ``path`` at the end of the block, or nothing at all if the block fails.

    A reader sees the old file or the new one, never a part. Missing parent folders are made. An OSError where the
    folder cannot be made or written leaves the old file untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A device or a pipe, such as /dev/stdout, is written into; a rename would replace it.
    whole = path.is_file() or path.is_dir() or not path.exists()
    # The same folder, because a rename is atomic only within one file system.
    partial = temporary(path) if whole else path
    try:
        # "x" makes a new file, and follows no link that has its name.
        with open(partial, "xb" if whole else "wb") as stream:
            yield stream
            stream.flush()
            if whole:
                os.fsync(stream.fileno())
        if whole:
            os.replace(partial, path)
    except OSError as error:
        if error.filename not in (None, os.fspath(partial)):
            raise
        # Of a full disk the system does not say with which file.
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        if whole:
            partial.unlink(missing_ok=True)


def check_folder(folder: str | os.PathLike) -> None:
    """Raise an OSError, before any work, for a folder that cannot be made, or written in."""
    path = Path(folder).expanduser().absolute()
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "is no folder, or one that may not be written in"
        raise NotADirectoryError(f"{place} {what}; name another, or move it away")


def check_output(
    output: str | os.PathLike,
    what: str,
    is_earlier: Callable[[Path], bool],
    inputs: Iterable[str | os.PathLike] = (),
) -> None:
    """Refuse an output that would replace something else than an earlier result of its kind.

    Parameters
    ----------
    output : path-like
        A file that will be written.
    what : str
        What it will be, in the words of the message, such as ``"table of embed"``.
    is_earlier : callable
        Whether a file is such a result; asked only where the output is there and has content.
    inputs : iterable of path-like
        Files that are read. They may be results of the same kind.

    Raises
    ------
    OutputError
        If the output is one of the inputs, by whatever name, or is no earlier result.
    IsADirectoryError
        If it is a folder.
    OSError
        If its folder cannot be made, or written in.
    """
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name the file to write")
    check_folder(output.parent)
    if not os.path.lexists(output) or (output.is_file() and output.stat().st_size == 0):
        return
    for file in inputs:
        # The files and not their names: a link, or another case of letters, may stand for the same one.
        if output.exists() and os.path.exists(file) and output.samefile(file):
            raise OutputError(f"{output} is {file}, which is read; name another output")
    if not output.is_file() or not is_earlier(output):
        remedy = "name another output, or move it away"
        raise OutputError(
            f"{output} is there already, and is no {what} of an earlier call; {remedy}"
        )


def begins_with(*columns: str) -> Callable[[Path], bool]:
    """Return the test whether a file is a table, of .csv or .tsv, whose first columns these are."""

    def begins(path: Path) -> bool:
        separator = "\t" if path.suffix == ".tsv" else ","
        expected = separator.join(columns).encode()
        with open(path, "rb") as stream:
            return stream.read(len(expected)) == expected

    return begins


def write_bytes(path: str | os.PathLike, content: bytes | memoryview) -> Path:
    """Write ``content`` whole, as `writing` does."""
    with writing(path) as stream:
        stream.write(content)
    return Path(path)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write ``text`` as UTF-8, whole."""
    return write_bytes(path, text.encode())


def write_table(path: str | os.PathLike, table: "pd.DataFrame") -> Path:
    """Write a table of results or people, whole: separated by tabs where the name ends in ``.tsv``, else by commas."""
    separator = "\t" if os.fspath(path).endswith(".tsv") else ","
    # The lock also removes what a killed call has left beside it.
    with locked(path, "mnemodyn"):
        return write_text(path, table_text(table, separator))


def table_text(table: "pd.DataFrame", separator: str, header: bool = True) -> str:
    """A table as text that a spreadsheet shows as it is.

    A spreadsheet would compute what begins like a formula (``=``, ``+``, ``-``, ``@``), so that an apostrophe goes
    before it. Numbers stay numbers.
    """
    shown = table.copy()
    for name in shown.select_dtypes(exclude=["number", "bool"]):
        shown[name] = shown[name].map(_no_formula)
    shown.columns = [_no_formula(name) for name in shown]
    return shown.to_csv(sep=separator, header=header, index=False, lineterminator="\n")


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Write ``content`` as indented JSON in its own order of keys, whole.

    NumPy scalars and arrays become numbers and lists, paths become text. A ValueError where ``content`` holds a NaN or
    an infinity (JSON has neither: write None, and say why), or something that has no form in JSON.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot write {path} as JSON: {error}") from None
    return write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and torch, neither of which is imported for this
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


LONGEST_YAML = 500_000  # characters, which ruamel reads in a few seconds
DEEPEST_YAML = 50


def load_yaml(path: str | os.PathLike) -> Any:
    """What a YAML file holds; a ValueError, which does not name the file, says what is wrong with it."""
    size = os.stat(path).st_size
    if size > 4 * LONGEST_YAML:
        raise ValueError(f"{size:,} bytes are no file of settings")
    return read_yaml(Path(path).read_text(encoding="utf-8-sig"))


def read_yaml(text: str) -> Any:
    """Read YAML 1.2, in which ``off`` is text and ``1e-3`` is a number.

    A ValueError if `text` is not valid YAML, is longer or deeper than any settings are, or has aliases (``*name``): a
    few lines of them stand for more than any memory holds. The message names the line where it is known.
    """
    from ruamel.yaml import YAML

    if len(text) > LONGEST_YAML:
        raise ValueError(f"{len(text):,} characters of YAML, at most {LONGEST_YAML:,} are read")
    # ruamel's parser in C reads YAML 1.1, in which `off` is false.
    reader = YAML(typ="safe", pure=True)
    try:
        _check_events(reader.parse(text))
        return reader.load(text)
    except Exception as error:
        # Broken text makes ruamel raise almost anything, from a KeyError to its own errors.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not valid YAML: {reason[:400]}") from None


def _check_events(events: Iterable[Any]) -> None:
    """Refuse what would take for ever to build: aliases, and brackets in brackets."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        line = event.start_mark.line + 1
        if kind == "AliasEvent":
            raise ValueError(f"line {line}: write out what *{event.anchor} stands for")
        depth += kind in ("SequenceStartEvent", "MappingStartEvent")
        depth -= kind in ("SequenceEndEvent", "MappingEndEvent")
        if depth > DEEPEST_YAML:
            raise ValueError(
                f"line {line}: more than {DEEPEST_YAML} lists or mappings in each other"
            )


def find_root(start: str | os.PathLike = ".") -> Path:
    """The nearest folder at or above ``start`` that has ``_toc.yml``, or else ``start``."""
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "_toc.yml").is_file():
            return folder
    return start


def resolve(path: str | os.PathLike) -> Path:
    """``path`` itself where it is absolute, else the path seen from `find_root`.

    A notebook opened by hand runs in ``notebooks/`` and one run headless in the repository's root; paths that go
    through here mean the same in both. A ValueError where ``path`` is empty, which would quietly mean the root.
    """
    if not os.fspath(path):
        raise ValueError("path must not be empty")
    # An absolute path stays itself.
    return find_root() / Path(path).expanduser()


def digest(*parts: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of what a result depends on: the one digest of this package.

    A part is bytes, text, a number, None, an array or a tensor, or lists and mappings of these; a
    mapping's order of keys does not matter, shape and dtype of an array do.
    """
    found = hashlib.sha256()
    for part in parts:
        _feed(found, part)
    return found.hexdigest()


def _feed(found: Any, part: Any) -> None:
    """Give a part to the digest: its kind and size first, so that no two different parts read alike."""
    if isinstance(part, dict):
        found.update(f"dict {len(part)}:".encode())
        for key in sorted(part, key=str):
            _feed(found, str(key))
            _feed(found, part[key])
    elif isinstance(part, (list, tuple)):
        found.update(f"list {len(part)}:".encode())
        for item in part:
            _feed(found, item)
    elif isinstance(part, (bytes, memoryview)):
        found.update(f"bytes {len(part)}:".encode())
        found.update(part)
    elif hasattr(part, "detach"):  # a tensor, without an import of torch
        _feed(found, part.detach().cpu().numpy())
    elif hasattr(part, "dtype") and hasattr(part, "shape"):
        # The bytes in the order of the indices, however the array lies in memory.
        values = part if part.flags.c_contiguous else part.copy()
        found.update(f"array {values.dtype.str} {values.shape}:".encode())
        found.update(values.tobytes())
    elif isinstance(part, (str, int, float, type(None), os.PathLike)):
        content = f"{type(part).__name__} {part!r}".encode()
        found.update(f"{len(content)}:".encode() + content)
    else:
        raise TypeError(f"no digest of a {type(part).__name__}")


class Kept:
    """Results kept in a folder, so that what was interrupted goes on: the one way to resume a computation.

    A result is found again only if everything that it depends on is the same, by content.
    """

    def __init__(self, folder: str | os.PathLike | None):
        """`folder` is made when something is kept; nothing is kept where it is None."""
        self.folder = None if folder is None else Path(folder)
        if folder is not None:
            check_folder(folder)

    def __call__(self, name: str, depends_on: Any, make: Callable[[], Any]) -> Any:
        """The result of ``make()``, made only if none is kept for `name` and `depends_on`.

        A result is JSON-like, with arrays. It is the same whether it was found or made: tuples are lists, NumPy's
        numbers are Python's.
        """
        found = self.find(name, depends_on)
        if found is None:
            found = self.keep(name, depends_on, make())
        return found

    def find(self, name: str, depends_on: Any) -> Any:
        """The result that is kept for `name` and `depends_on`, or None. A damaged file is removed."""
        path = self._path(name, depends_on)
        if path is None or not path.is_file():
            return None
        try:
            return _read_kept(path)
        # zipfile, NumPy and JSON each have errors of their own for a damaged file.
        except Exception:
            path.unlink()
            return None

    def keep(self, name: str, depends_on: Any, result: Any) -> Any:
        """Keep a result, and return it as it will be found. A TypeError if it is not JSON-like, with arrays."""
        text, arrays = _packed(result)
        path = self._path(name, depends_on)
        if path is not None:
            _write_kept(path, text, arrays)
        return _unpacked(text, arrays)

    def _path(self, name: str, depends_on: Any) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{name}-{digest(depends_on)[:16]}.npz"


ARRAY = "array number"  # what stands in the text of a result for an array


def _packed(result: Any) -> tuple[str, list]:
    """A result as JSON text, and the arrays that the text names by number."""
    import numpy as np

    arrays: list = []

    def without_array(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return _plain(value)
        if value.dtype.hasobject:
            raise TypeError("an array of objects cannot be kept")
        arrays.append(value)
        return {ARRAY: len(arrays) - 1}

    return json.dumps(result, default=without_array), arrays


def _unpacked(text: str, arrays: Sequence[Any]) -> Any:
    def with_array(found: dict) -> Any:
        return arrays[found[ARRAY]] if ARRAY in found else found

    return json.loads(text, object_hook=with_array)


def _write_kept(path: Path, text: str, arrays: list) -> None:
    import numpy as np

    with writing(path) as stream:
        np.savez(stream, np.array(text), np.array(digest(path.name, text, arrays)), *arrays)


def _read_kept(path: Path) -> Any:
    """The result in a file; a ValueError if it is not what was written."""
    import numpy as np

    # NumPy leaves a damaged file open where it is given the path.
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as content:
        text, expected, *arrays = (content[name] for name in content.files)
    # With the name, which says what the result depends on: two files exchanged are damaged too.
    if digest(path.name, str(text), arrays) != str(expected):
        raise ValueError(f"{path} has been changed")
    return _unpacked(str(text), arrays)
