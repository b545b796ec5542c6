"""Damage to files: bytes of any file, and the parts that a file of one format is made of."""

import copy
import io
import json
import re
import struct

import numpy as np
import torch
from scipy.io import savemat

# What no reader expects: wrong kinds, numbers at the ends, names that lead elsewhere.
ODD = (
    None,
    True,
    "",
    "nan",
    "-inf",
    "../../outside",
    "/outside",
    "\x00",
    "é\u202e" * 40,
    0,
    -1,
    -(10**9),
    10**9,
    10**30,
    2**63,
    0.5,
    -0.0,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    [],
    [[]],
    {},
    {"": None},
    ["a", 1, None],
    "@long@",
    "@deep@",
)
# In place of what json.dumps would refuse to write.
LONG = b"9" * 5000
DEEP = b"[" * 20_000 + b"]" * 20_000
WORDS = (
    "",
    " ",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "1e999",
    "-1e308",
    "-1",
    "0",
    "1e-320",
    "9" * 400,
    "0x10",
    "1_000",
    "1,5",
    "n/a",
    "NA",
    "None",
    "true",
    "text",
    '"',
    '"open',
    "'",
    "=1+1",
    "é",
    "\x00",
    "\ufeff",
    "1+2j",
    "2020-01-01",
    "١٢",
    "sub-01",
    "../x",
)


def pick(rng: np.random.Generator, things):
    """One of several things, whatever they are."""
    return things[int(rng.integers(len(things)))]


def odd(rng: np.random.Generator):
    """A fresh value of ODD, so that what one trial puts into a list of it is not in the next."""
    return copy.deepcopy(pick(rng, ODD))


# Bytes


def change_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    """Flip, cut, insert, repeat, blank or move bytes, once to four times."""
    for _ in range(rng.integers(1, 5)):
        content = pick(rng, BYTES)(rng, content)
    return content


def _span(rng, content: bytes) -> tuple[int, int]:
    """Start and end of a piece, short more often than long."""
    start = int(rng.integers(len(content) + 1))
    length = int(len(content) ** rng.random())
    return start, start + length


def _flip(rng, content):
    changed = bytearray(content)
    # The beginning of a file, where its header is, is hit as often as all the rest.
    reach = len(changed) if rng.random() < 0.5 else min(len(changed), 200)
    for _ in range(rng.integers(1, 9) if reach else 0):
        changed[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(rng, content):
    return content[: int(rng.integers(len(content) + 1))]


def _remove(rng, content):
    start, end = _span(rng, content)
    return content[:start] + content[end:]


def _insert(rng, content):
    start = int(rng.integers(len(content) + 1))
    return content[:start] + rng.bytes(int(rng.integers(1, 40))) + content[start:]


def _repeat(rng, content):
    start, end = _span(rng, content)
    return content[:end] + content[start:end] * int(rng.integers(1, 4)) + content[end:]


def _blank(rng, content):
    start, end = _span(rng, content)
    filler = pick(rng, (b"\x00", b"\xff", b" ", b"0"))
    return content[:start] + filler * len(content[start:end]) + content[end:]


def _move(rng, content):
    start, end = _span(rng, content)
    return content[end:] + content[start:end] + content[:start]


BYTES = (_flip, _flip, _cut, _cut, _remove, _insert, _repeat, _blank, _move)


# JSON


def change_json(rng: np.random.Generator, content: bytes) -> bytes:
    """Replace, remove, rename or add values anywhere in a JSON file."""
    holder = [json.loads(content)]
    for _ in range(rng.integers(1, 4)):
        places = list(_places(holder))
        where, key = pick(rng, places)
        if where is holder and rng.random() < 0.9:
            continue
        how = rng.random()
        if how < 0.7 or where is holder:
            where[key] = odd(rng)
        elif how < 0.85:
            where.pop(key)
        elif isinstance(where, dict):
            where[f"{key}{pick(rng, ('s', ' ', 'é', '.x'))}"] = where.pop(key)
        else:
            where.insert(key, odd(rng))
    text = json.dumps(holder[0]).encode()
    return text.replace(b'"@long@"', LONG).replace(b'"@deep@"', DEEP)


def _places(value):
    """Every container of a JSON value with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


# Text


def change_encoding(rng: np.random.Generator, content: bytes) -> bytes:
    """Write a text with another encoding, mark or line end."""
    text = content.decode("utf-8", "replace")
    how = int(rng.integers(8))
    if how == 0:
        return text.encode("utf-16")
    if how == 1:
        return b"\xef\xbb\xbf" + content
    if how == 2:
        return b"\xef\xbb\xbf\xef\xbb\xbf" + content
    if how == 3:
        return text.replace("a", "é").encode("latin-1", "replace")
    if how == 4:
        return content.replace(b"\n", b"\r\n")
    if how == 5:
        return content.replace(b"\n", b"\r")
    if how == 6:
        return content.replace(b"\n", pick(rng, (b"\n\n", b" \n", b"\n\x0c", b"\x00\n")))
    return text.encode("utf-32")


def change_table(rng: np.random.Generator, content: bytes) -> bytes:
    """Change cells, rows, columns, the header, quotes or the delimiter of a table."""
    text = content.decode()
    delimiter = "\t" if "\t" in text else ","
    rows = [line.split(delimiter) for line in text.rstrip("\n").split("\n")]
    for _ in range(rng.integers(1, 4)):
        row = pick(rng, rows)
        column = int(rng.integers(len(row) or 1))
        how = int(rng.integers(12))
        if how < 3 and row:
            row[column] = pick(rng, WORDS)
        elif how == 3 and row:
            row.pop(column)
        elif how == 4:
            row.insert(column, pick(rng, WORDS))
        elif how == 5:
            rows = [[*cells[:column], *cells[column + 1 :]] for cells in rows]
        elif how == 6:
            rows = [[*cells, *cells[column : column + 1]] for cells in rows]
        elif how == 7:
            rows[0] = [pick(rng, (*rows[0], *WORDS)) for _ in rows[0]]
        elif how == 8:
            rows.insert(int(rng.integers(len(rows) + 1)), list(pick(rng, (rows[0], [""], row))))
        elif how == 9:
            rows = rows[1:] or [[""]]
        elif how == 10:
            rows = [[*cells, ""] for cells in (rows if rng.random() < 0.5 else rows[1:])]
            rows = rows or [[""]]
        else:
            rows = [[f'"{cell}"' for cell in cells] for cells in rows]
    if rng.random() < 0.15:
        delimiter = pick(rng, ("\t", ",", ";", " ", "|", "\t\t"))
    return ("\n".join(delimiter.join(row) for row in rows) + "\n").encode()


YAML_VALUES = (
    *WORDS,
    "{",
    "}",
    "[",
    "[[[[]]]]",
    "{a: {b: }}",
    "{NYU: }",
    ": :",
    "- -",
    "*none",
    "&a [*a]",
    "&a {x: *a}",
    "<<: *a",
    "!!python/object/apply:os.system ['true']",
    "!!binary aGk=",
    "!!float x",
    "!!set {a, b}",
    "!!timestamp 2001-99-99",
    "!odd x",
    "%YAML 9.9",
    "---",
    "...",
    "|",
    ">-",
    ".nan",
    ".inf",
    "1e999",
    "0o17",
    "~",
    "2001-01-01",
    '"\\ud800"',
    '"\\x00"',
    "'{participant}'",
    '"**/{participant}{"',
    '"{participant:(a+)+}b"',
    '"{participant:[}"',
    '"{participant!r}{a.b}{0}{}"',
    '"{participant:' + "(" * 200 + ')"',
    '"' + "**/" * 12 + '{participant}x"',
    "[" * 300,
    "{a: " * 300,
)


def change_yaml(rng: np.random.Generator, content: bytes) -> bytes:
    """Change values, lines, keys or the indentation of a YAML file, or put a growing alias in it."""
    lines = content.decode().splitlines()
    for _ in range(rng.integers(1, 4)):
        i = int(rng.integers(len(lines)))
        how = rng.random()
        key, colon, _ = lines[i].partition(": ")
        if how < 0.5 and colon:
            lines[i] = f"{key}: {pick(rng, YAML_VALUES)}"
        elif how < 0.6:
            lines.pop(i)
            lines = lines or [""]
        elif how < 0.7:
            lines.insert(i, pick(rng, (lines[i], *YAML_VALUES)))
        elif how < 0.8:
            lines[i] = pick(rng, (" ", "    ", "\t", "- ", "? ")) + lines[i]
        elif how < 0.85:
            lines = _growing(rng, key.strip() or "a") + lines
        else:
            place = int(rng.integers(len(lines[i]) + 1))
            lines[i] = (
                lines[i][:place] + pick(rng, "{}[]:,&*!|>'\"%@`#-?\\\x00é") + lines[i][place:]
            )
    return ("\n".join(lines) + "\n").encode()


def _growing(rng, key: str) -> list[str]:
    """Aliases of aliases: a few hundred bytes that stand for thousands of millions of values."""
    lines = [f"{key}: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, int(rng.integers(2, 12))):
        lines.append(f"{key}{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    return lines


# Arrays


def odd_array(rng: np.random.Generator) -> np.ndarray:
    """An array of some kind and shape, seldom those of a scan."""
    shape = pick(rng, ((), (0,), (5,), (0, 4), (4, 0), (1, 1), (24, 3), (3, 24), (2, 3, 4)))
    kind = pick(rng, ("f2", ">f8", "i1", "u8", "c8", "S3", "U3", "?", "M8[D]", "O", "V4", "f4,i2"))
    values = rng.standard_normal(shape) * 10.0 ** int(rng.integers(-5, 40))
    if kind in ("c8", ">f8", "f2", "O"):
        with np.errstate(all="ignore"):
            return np.asarray(values).astype(kind)
    return np.zeros(shape, kind)


def change_npy(rng: np.random.Generator, content: bytes) -> bytes:
    """Another array, or a header that says more than there is."""
    stream = io.BytesIO()
    if rng.random() < 0.5:
        np.save(stream, odd_array(rng), allow_pickle=True)
        return stream.getvalue()
    shape = pick(rng, ("()", "(3,)", "(10000000, 100000)", "(-1, 3)", "(3.5, 2)", "(2**99,)", "x"))
    kind = pick(
        rng, ("'<f4'", "'|O'", "'>i8'", "'<U100000000'", "'nonsense'", "None", "[('a','<f4')]")
    )
    header = f"{{'descr': {kind}, 'fortran_order': {pick(rng, ('False', 'True', '7'))}, 'shape': {shape}}}"
    version = pick(rng, (b"\x01\x00", b"\x02\x00", b"\x09\x00"))
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode() + content[80:]


def change_npz(rng: np.random.Generator, content: bytes) -> bytes:
    """Other arrays, under other names."""
    stream = io.BytesIO()
    names = rng.permutation(["bold", "tc", "arr_0", "", "../x", "a b", "é"])[: rng.integers(0, 4)]
    save = pick(rng, (np.savez, np.savez_compressed))
    save(stream, **{str(name): odd_array(rng) for name in names})
    return stream.getvalue()


def change_mat(rng: np.random.Generator, content: bytes) -> bytes:
    """Cells, structures, text and odd arrays."""
    values = {}
    for name in ("tc", "sc", "x")[: int(rng.integers(0, 4))]:
        value = pick(rng, ("text", {"a": np.eye(2)}, [1, "a"], None, 3, np.eye(3) * 1j, np.eye(4)))
        if value is None:
            value = np.array([[np.eye(2), "x"]], object)
        values[name] = value
    stream = io.BytesIO()
    savemat(stream, values, do_compression=rng.random() < 0.5)
    return stream.getvalue()


def change_cifti(rng: np.random.Generator, content: bytes) -> bytes:
    """Text of the same length in the XML of the header, or fields of the binary one."""
    start = content.find(b"<CIFTI")
    end = content.find(b"</CIFTI>")
    found = list(re.finditer(rb'"([^"<>]*)"|>([^<>]+)<', content[start:end]))
    match = pick(rng, found)
    if rng.random() < 0.3:
        place = int(rng.integers(540))
        changed = pick(rng, (b"\x00", b"\xff", b"\x7f", b"\x01"))
        return content[:place] + changed * int(rng.integers(1, 5)) + content[place + 4 :]
    group = 1 if match[1] is not None else 2
    length = len(match[group])
    words = ("0", "-1", "1e9", "nan", "inf", "99999999", "SECOND", "HERTZ", "", "<a>", "&x;", "é")
    other = pick(rng, words).encode()[:length]
    other += pick(rng, (b" ", b"0")) * (length - len(other))
    return content[: start + match.start(group)] + other + content[start + match.end(group) :]


def change_safetensors(rng: np.random.Generator, content: bytes) -> bytes:
    """Another description of the tensors."""
    (n,) = struct.unpack("<Q", content[:8])
    header = change_json(rng, content[8 : 8 + n])
    if rng.random() < 0.2:
        n = int(pick(rng, (0, 2**63, 10**9, len(content))))
        return struct.pack("<Q", n) + content[8:]
    return struct.pack("<Q", len(header)) + header + content[8 + n :]


def change_tensors(rng: np.random.Generator, content: bytes) -> bytes:
    """Values of a file of torch.save replaced, removed or renamed."""
    holder = [torch.load(io.BytesIO(content), weights_only=True)]
    for _ in range(rng.integers(1, 3)):
        where, key = pick(rng, list(_places(holder)))
        if rng.random() < 0.2 and where is not holder:
            where.pop(key)
        elif isinstance(where[key], torch.Tensor) and rng.random() < 0.8:
            where[key] = pick(rng, _tensors(where[key]))
        else:
            where[key] = odd(rng)
    stream = io.BytesIO()
    torch.save(holder[0], stream)
    return stream.getvalue()


def _tensors(tensor: torch.Tensor) -> list:
    """Tensors in place of another."""
    floating = tensor.float()
    return [
        floating * float("nan"),
        floating.half(),
        floating.bfloat16(),
        floating.long(),
        floating[None],
        floating.flatten()[:1],
        torch.zeros(0),
        floating.to(torch.complex64),
        floating.to_sparse(),
        floating.reshape(-1)[:1].expand(3),
    ]
