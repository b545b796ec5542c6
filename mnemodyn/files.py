"""Files written whole, fingerprints, and the one rule for where a relative path starts."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Give a stream whose bytes become ``path`` at the end of the block, or nothing at all if the block fails.

    A reader sees the old file or the new one, never a part. Missing parent folders are made. An OSError where the
    folder cannot be made or written leaves the old file untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder, because a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename is not None:
            raise
        # Of a full disk the system does not say with which file.
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        partial.unlink(missing_ok=True)


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

    def __call__(self, name: str, depends_on: Any, make: Callable[[], Any]) -> Any:
        """The JSON-like result of ``make()``, made only if none is kept for `name` and `depends_on`.

        What is returned has been through JSON either way: tuples are lists, arrays are lists.
        """
        if self.folder is None:
            return json.loads(_as_json(make()))
        path = self.folder / f"{name}-{digest(depends_on)[:16]}.json"
        if path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))["result"]
            except (ValueError, KeyError, TypeError):
                path.unlink()  # a damaged file: computed again
        result = json.loads(_as_json(make()))
        write_json(path, {"result": result})
        return result


def _as_json(content: Any) -> str:
    return json.dumps(content, default=_plain)
