"""Files written whole, fingerprints, and the one rule for where a relative path starts."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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
    """Write ``content`` so that a reader sees the old file or the new one, never a part; raises as `writing`."""
    with writing(path) as stream:
        stream.write(content)
    return Path(path)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write ``text`` as UTF-8, whole (see `write_bytes`)."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Write ``content`` as indented JSON in its own order of keys, whole (see `write_text`).

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
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits; an OSError where it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_root(start: str | os.PathLike = ".") -> Path:
    """Return the nearest folder at or above ``start`` (by default the current) with ``_toc.yml``, or else ``start``."""
    start = Path(start).resolve()
    return next((at for at in (start, *start.parents) if (at / "_toc.yml").is_file()), start)


def resolve(path: str | os.PathLike) -> Path:
    """Return ``path`` itself where it is absolute, else the path seen from `find_root`.

    A notebook opened by hand runs in ``notebooks/`` and one run headless in the repository's root; paths that go
    through here mean the same in both. A ValueError where ``path`` is empty, which would quietly mean the root.
    """
    if not os.fspath(path):
        raise ValueError("path must not be empty")
    path = Path(path).expanduser()
    return path if path.is_absolute() else find_root() / path
