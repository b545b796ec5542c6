"""Cohorts: a YAML description of where scans, participants and targets are, and the index of a folder by it."""

import hashlib
import multiprocessing
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemodyn.data.formats import entities
from mnemodyn.data.scans import DataError, Scan, load_scan, series_digest
from mnemodyn.parameters import read_yaml

__all__ = ["Cohort", "Column", "Index", "Phenotype", "Reader", "Target", "index", "load_cohort", "shipped"]

KINDS = ("classification", "regression")
MONTHS = {"years": 1.0, "months": 12.0}  # how many make a year
MISSING_WORDS = {"", "na", "n/a", "nan", "null"}
SIMULATED = "simulated.json"


@dataclass(frozen=True)
class Reader:
    """How scans are read, see :func:`mnemodyn.data.scans.load_scan`.

    Attributes
    ----------
    t_r : float, optional
        Repetition time in seconds, for files that do not state one.
    t_r_by : dict
        ``{"site": {name: seconds}}`` where it depends on the site; a site that is not listed has none.
    override_t_r : bool
        Take these although a file states another.
    frames_first : bool, optional
        Whether rows are frames, for files that do not say.
    key : str, optional
        Which array of a ``.npz`` or ``.mat``.
    max_constant_parcels, min_frames : int
    atlas : str
        Name of the atlas, for files that do not state one.
    """

    t_r: float | None = None
    t_r_by: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    override_t_r: bool = False
    frames_first: bool | None = None
    key: str | None = None
    max_constant_parcels: int = 0
    min_frames: int = 2
    atlas: str = ""

    def __post_init__(self):
        if self.t_r_by and (set(self.t_r_by) != {"site"} or not isinstance(self.t_r_by["site"], dict)):
            raise DataError(f"reader.t_r_by must be {{site: {{name: seconds}}}}, got {self.t_r_by!r}", problem="cohort")
        times = [*([] if self.t_r is None else [self.t_r]), *self.t_r_by.get("site", {}).values()]
        bad = [t for t in times if isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t < 100]
        if bad:
            raise DataError(f"reader: t_r must be in seconds, > 0 and < 100, got {bad[0]!r}", problem="cohort")


@dataclass(frozen=True)
class Phenotype:
    """A table of phenotypes.

    Attributes
    ----------
    file : str
        Path seen from the cohort's folder, absolute, or a pattern that one file matches.
    match : dict
        Key column -> template of the scan's entities, such as ``{"participant_id": "sub-{participant}"}``; a row
        belongs to a scan where all of them agree. Leading zeros, ``sub-`` and punctuation do not count.
    separator : str
        A comma for ``.csv`` and a tab for everything else, where it is empty.
    skip_rows : tuple of int
        Lines to leave out, the first being 0 (NDA's tables describe their columns in line 1).
    optional : bool
        Whether the file may be missing: all scans are then without phenotype.
    """

    file: str
    match: Mapping[str, str]
    separator: str = ""
    skip_rows: tuple[int, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Column:
    """A column of the phenotype table.

    Attributes
    ----------
    column : str
    kind : {"classification", "regression"}
    mapping : dict
        Raw value -> label. Where there is one, any value outside it is an error. For a site, other values stand.
    exclude : tuple
        Raw values that carry no label.
    unit : str
        Of a regression's values; ``years`` or ``months`` for an age, which is converted to years.
    optional : bool
        Whether the tables may be without it.
    """

    column: str
    kind: str = "classification"
    mapping: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    unit: str = ""
    optional: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise DataError(f"column {self.column}: kind must be one of {KINDS}, got {self.kind!r}", problem="cohort")
        object.__setattr__(self, "mapping", {_label(k): str(v) for k, v in self.mapping.items()})
        object.__setattr__(self, "exclude", tuple(map(_label, self.exclude)))


@dataclass(frozen=True)
class Target(Column):
    """What is to be predicted: a `Column` with a name."""

    name: str = ""


@dataclass(frozen=True)
class Cohort:
    """A study: where its scans are, its phenotype tables, and what can be predicted; see :func:`load_cohort`.

    Attributes
    ----------
    name, description : str
    scans : tuple of str
        Patterns of paths seen from the folder; the first that matches any file counts. ``{entity}`` stands for
        letters and digits, ``{entity:regex}`` for anything else, the same text wherever it is repeated; ``*`` for
        anything within a folder's or file's name and ``**/`` for any folders. The ``key-value`` pairs of a BIDS
        name are entities too (``ses`` as session).
    reader : Reader
    phenotype : tuple of Phenotype
        A column is taken from the first table that has it.
    participant, session, run : str
        Templates of entities.
    site, family, age, sex, mean_fd : Column, optional
        Age in years or months, sex to ``male`` and ``female``, mean framewise displacement in mm. Without a value
        in the table the site is the entity ``site``, and ``mean_fd`` that of the motion file beside the scan.
    targets : tuple of Target
    missing : tuple of str
        Raw values that mean "not known", beside an empty cell, NA, n/a, nan and null.
    families : tuple of tuple of str
        Participants (``sub-...``) that belong together although no column says so.
    """

    name: str
    scans: tuple[str, ...]
    description: str = ""
    reader: Reader = Reader()
    phenotype: tuple[Phenotype, ...] = ()
    participant: str = "{participant}"
    session: str = "{session}"
    run: str = "{run}"
    site: Column | None = None
    family: Column | None = None
    age: Column | None = None
    sex: Column | None = None
    mean_fd: Column | None = None
    targets: tuple[Target, ...] = ()
    missing: tuple[str, ...] = ()
    families: tuple[tuple[str, ...], ...] = ()

    @property
    def variables(self) -> dict[str, Column]:
        """What is read from the phenotype: name in the index's table -> column."""
        known = {name: getattr(self, name) for name in ("site", "family", "age", "sex", "mean_fd")}
        return {k: v for k, v in known.items() if v} | {t.name: t for t in self.targets}


def _label(value: Any) -> str:
    text = str(value).strip()
    return text.split(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def _key(value: str) -> str:
    text = re.sub(r"[^A-Za-z0-9]", "", re.sub(r"^(sub|ses)-", "", _label(value)))
    return str(int(text)) if text.isdecimal() else text


def _strict(cls: type, content: Any, where: str) -> dict:
    """`content` where its keys are fields of `cls` and none without a default is missing."""
    if not isinstance(content, dict):
        raise DataError(f"{where} must be a mapping, got {content!r}", problem="cohort")
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    unknown = [k for k in content if k not in known]
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(known)})", problem="cohort")
    absent = [k for k, required in known.items() if required and content.get(k) in (None, "", [], {})]
    if absent:
        raise DataError(f"{where}: {absent[0]} is missing", problem="cohort")
    for f in fields(cls):  # plain types only; the others are built, and so checked, by the caller
        if f.name not in content:
            continue
        value, kind = content[f.name], f.type
        if kind in (str, bool, int) and type(value) is not kind:
            raise DataError(f"{where}: {f.name} must be {kind.__name__}, got {value!r} (quote text)", problem="cohort")
        if str(kind).startswith(("tuple", "collections.abc.Mapping")):
            needs = dict if "Mapping" in str(kind) else list
            if not isinstance(value, needs):
                words = {dict: "a mapping", list: "a list"}[needs]
                raise DataError(f"{where}: {f.name} must be {words}, got {value!r}", problem="cohort")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}


def _column(content: Any, where: str, **defaults) -> Column | None:
    if content is None:
        return None
    content = {"column": content} if isinstance(content, str) else content
    return Column(**defaults | _strict(Column, content, where))


def _target(content: Any, cohort: dict, where: str) -> Target:
    if isinstance(content, str):  # "sex" and "age": as their columns say
        if cohort.get(content) is None:
            raise DataError(f"{where}: {content!r} is short for the column {content}, which is not given", "cohort")
        return Target(**asdict(cohort[content]), name=content)
    target = Target(**_strict(Target, content, where))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", target.name):
        raise DataError(f"{where}: name must be lower-case letters, digits and _, got {target.name!r}", "cohort")
    if "kind" not in content:
        raise DataError(f"{where}: kind is missing (one of {', '.join(KINDS)})", "cohort")
    return target


def shipped() -> list[str]:
    """Names of the cohorts that come with the package."""
    folder = resources.files("mnemodyn.data") / "cohorts"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_cohort(source: str | Path) -> Cohort:
    """Read a cohort's description.

    Parameters
    ----------
    source : str or Path
        Name of a shipped cohort (:func:`shipped`), or a YAML file with the fields of :class:`Cohort`; ``site``,
        ``family``, ``age``, ``sex`` and ``mean_fd`` are the name of a column or a mapping of :class:`Column`.

    Raises
    ------
    DataError
        For an unknown name or setting, a missing one, or one of the wrong type (problem ``cohort``).
    """
    path = Path(source)
    if str(source) in shipped():
        path = Path(str(resources.files("mnemodyn.data") / "cohorts" / f"{source}.yaml"))
    elif not path.is_file():
        names = ", ".join(shipped())
        raise DataError(f"{source} is neither a YAML file nor one of the shipped cohorts: {names}", problem="cohort")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path.name}: {error}", problem="cohort") from None
    content = _strict_cohort(content, path)
    for name in ("site", "family", "sex"):
        content[name] = _column(content.get(name), f"{path.name}: {name}")
    for name, unit in (("age", "years"), ("mean_fd", "mm")):
        content[name] = _column(content.get(name), f"{path.name}: {name}", kind="regression", unit=unit)
    if content["age"] and content["age"].unit not in MONTHS:
        raise DataError(f"{path.name}: age.unit must be years or months, got {content['age'].unit!r}", problem="cohort")
    if content["sex"] and {*content["sex"].mapping.values()} != {"male", "female"}:
        raise DataError(
            f"{path.name}: sex.mapping must lead to male and female, got {content['sex'].mapping}", problem="cohort"
        )
    content["reader"] = Reader(**_strict(Reader, content.get("reader", {}), f"{path.name}: reader"))
    tables = [_strict(Phenotype, t, f"{path.name}: phenotype") for t in content.get("phenotype", ())]
    content["phenotype"] = tuple(Phenotype(**t) for t in tables)
    content["targets"] = tuple(_target(t, content, f"{path.name}: targets") for t in content.get("targets", ()))
    content["families"] = tuple(tuple(map(str, f)) for f in content.get("families", ()))
    content["missing"] = tuple(map(_label, content.get("missing", ())))
    names = [t.name for t in content["targets"]]
    taken = [n for n, k in Counter(names).items() if k > 1 or (n in TABLE and n not in ("sex", "age"))]
    if taken:
        raise DataError(f"{path.name}: targets: the name {taken[0]!r} is taken", problem="cohort")
    cohort = Cohort(**content)
    for pattern in cohort.scans:
        _pattern(pattern)
    return cohort


def _strict_cohort(content: Any, path: Path) -> dict:
    if isinstance(content, dict):
        content = {"name": path.stem} | content
        for name in ("scans", "phenotype"):  # one is as good as a list of one
            if name in content and not isinstance(content[name], list):
                content[name] = [content[name]]
    return _strict(Cohort, content, path.name)


def _pattern(pattern: str) -> re.Pattern:
    """The regular expression of a pattern of paths."""
    token = re.compile(r"\{(?P<name>[a-z_]+)(?::(?P<form>(?:[^{}]|\{\d+(?:,\d*)?\})+))?\}|\*\*/|\*|\?|[^{}*?]+|.")
    parts, seen = [], set()
    for part in token.finditer(pattern):
        text, name = part[0], part["name"]
        if name:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{part['form'] or '[A-Za-z0-9]+'})")
            seen.add(name)
        else:
            wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
            parts.append(wild.get(text) or re.escape(text))
    try:
        compiled = re.compile("".join(parts))
    except re.error as error:
        raise DataError(f"scans: {pattern!r} is no valid pattern ({error})", problem="cohort") from None
    return compiled


def _entities(path: str, match: re.Match) -> defaultdict[str, str]:
    pairs = entities(path.rsplit("/", 1)[-1])
    for short, long in (("sub", "participant"), ("ses", "session")):
        if short in pairs:
            pairs[long] = pairs.pop(short)
    return defaultdict(str, pairs | {k: v for k, v in match.groupdict().items() if v is not None})


TABLE = (
    *("path", "participant_id", "session", "run", "site", "family", "age", "sex", "mean_fd"),
    *("n_frames", "t_r", "n_parcels", "n_constant", "phenotype"),
)


@dataclass(frozen=True)
class Index:
    """What a folder holds, as a cohort's description reads it.

    Attributes
    ----------
    cohort : Cohort
    folder : Path
    found : DataFrame
        A row a file that matched: ``path``, ``participant_id``, ``site``.
    table : DataFrame
        A row a scan that can be read: ``path`` (seen from the folder), ``participant_id``, ``session``, ``run``,
        ``site``, ``family``, ``age`` (years), ``sex``, ``mean_fd`` (mm), ``n_frames``, ``t_r`` (seconds),
        ``n_parcels``, ``n_constant`` (constant parcels), ``phenotype`` (whether it has a row) and a column a target.
        What is not known is missing.
    excluded : DataFrame
        ``file``, ``participant_id``, ``problem``, ``message``, ``left_out_of``: ``all`` where the scan is not in the
        table, ``targets`` where it is there without phenotype and serves pretraining only. A file with two problems
        has two rows.
    rows : dict
        Of the phenotype tables: ``rows``, ``identical`` (repeated), ``contradictory`` and ``without_scan``.
    simulated : bool
    """

    cohort: Cohort
    folder: Path
    found: pd.DataFrame = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    excluded: pd.DataFrame = field(repr=False)
    rows: Mapping[str, int]
    simulated: bool = False

    def load(self, row: Mapping[str, Any]) -> Scan:
        """Read the scan of a row of `table`.

        Raises
        ------
        DataError
            Where the file changed since and can no longer be used.
        """
        scan = _load(self.folder / row["path"], row["participant_id"], float(row["t_r"]), self.cohort.reader)
        return replace(scan, session=row["session"], run=row["run"])

    def labelled(self, target: str) -> pd.DataFrame:
        """The rows of `table` that have a value of a target.

        Raises
        ------
        DataError
            For a name that is no target, or one with fewer than two different values (problem ``one-class``).
        """
        names = [t.name for t in self.cohort.targets]
        if target not in names:
            raise DataError(f"{self.cohort.name}: target must be one of {names}, got {target!r}")
        table = self.table[self.table[target].notna()]
        if table[target].nunique() < 2:
            raise DataError(
                f"{self.cohort.name}: target {target} needs two different values among the usable scans, got "
                f"{dict(Counter(table[target])) or 'none'}",
                problem="one-class",
            )
        return table

    def summary(self) -> dict[str, Any]:
        """Counts and distributions, ready for JSON.

        ``n_scans``, ``n_participants`` and ``n_sites`` are of the files found, ``n_usable`` of the scans in `table` and
        ``n_with_phenotype`` of those among them that have a row of the phenotype table.
        """
        table = self.table
        sites = self.found.site[self.found.site != ""]
        return {
            "cohort": self.cohort.name,
            "simulated": self.simulated,
            "n_scans": len(self.found),
            "n_participants": int(self.found.participant_id.nunique()),
            "n_sites": int(sites.nunique()),
            "n_usable": len(table),
            "n_usable_participants": int(table.participant_id.nunique()),
            "n_with_phenotype": int(table.phenotype.sum()),
            "n_parcels": sorted(map(int, table.n_parcels.unique())),
            "frames": [int(table.n_frames.min()), int(table.n_frames.max())] if len(table) else [],
            "t_r": {f"{t:g}": int(n) for t, n in table.t_r.value_counts().sort_index().items()},
            "sites": {str(k): int(n) for k, n in sites.value_counts().sort_index().items()},
            "targets": {t.name: _distribution(t, table[t.name].dropna()) for t in self.cohort.targets},
            "phenotype": dict(self.rows),
            "problems": {k: int(n) for k, n in self.excluded.problem.value_counts().items()},
            "excluded": self.excluded.to_dict("records"),
        }

    def __str__(self) -> str:
        s = self.summary()
        lines = [
            f"{s['cohort']}{'  SIMULATED' if self.simulated else ''}",
            f"{s['n_scans']} scans of {s['n_participants']} participants found, {s['n_sites']} sites",
            f"{s['n_usable']} of them usable, {s['n_with_phenotype']} with phenotype",
        ]
        if s["n_usable"]:
            parcels = ", ".join(map(str, s["n_parcels"]))
            lines.append(f"frames {s['frames'][0]} to {s['frames'][1]}, parcels {parcels}")
            lines.append("t_r " + ", ".join(f"{t} s ({n})" for t, n in s["t_r"].items()))
        for name, d in s["targets"].items():
            if "classes" in d:
                shown = ", ".join(f"{label} {n}" for label, n in d["classes"].items()) or "none"
            else:
                unit = f" {d['unit']}" if d["unit"] else ""
                shown = f"{d['mean']:.2f} (SD {d['sd']:.2f}, {d['min']:g} to {d['max']:g}){unit}" if d["n"] else "none"
            lines.append(f"target {name}: {shown}; {s['n_usable'] - d['n']} without")
        if self.rows["rows"]:
            words = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in self.rows.items() if k != "rows" and n)
            lines.append(f"phenotype: {self.rows['rows']} rows{', of them ' + words if words else ''}")
        for (problem, scope), group in self.excluded.groupby(["problem", "left_out_of"], sort=True):
            what = "left out" if scope == "all" else "without labels"
            lines.append(f"{what}: {len(group)} {problem}, e.g. {group.message.iloc[0]}")
        return "\n".join(lines)


def _distribution(target: Target, values: pd.Series) -> dict[str, Any]:
    base = {"kind": target.kind, "n": len(values)}
    if target.kind == "classification":
        return base | {"classes": {str(k): int(n) for k, n in values.value_counts().sort_index().items()}}
    unit = "years" if target.unit in MONTHS else target.unit
    v = values.to_numpy(float)
    numbers = {"mean": v.mean(), "sd": v.std(), "min": v.min(), "max": v.max()} if len(v) else {}
    return base | {"unit": unit} | {k: float(x) for k, x in numbers.items()}


def _load(path: Path, participant_id: str, t_r: float | None, reader: Reader) -> Scan:
    scan = load_scan(
        path,
        t_r=t_r,
        override_t_r=reader.override_t_r and t_r is not None,
        participant_id=participant_id,
        key=reader.key,
        frames_first=reader.frames_first,
        max_constant_parcels=reader.max_constant_parcels,
        min_frames=reader.min_frames,
    )
    return replace(scan, atlas=reader.atlas) if reader.atlas and not scan.atlas else scan


def _inspect(job: tuple) -> dict[str, Any]:
    """What the index needs of one scan, or the reason why it cannot be used."""
    path, participant_id, t_r, reader = job
    try:
        scan = _load(path, participant_id, t_r, reader)
    except DataError as error:
        return {"problem": error.problem, "message": str(error).removeprefix(path.name)}
    except OSError as error:
        return {"problem": "unreadable", "message": f": {error.strerror}"}
    return {
        "n_frames": scan.n_frames,
        "t_r": scan.t_r,
        "n_parcels": len(scan.parcels),
        "n_constant": int(scan.constant.sum()),
        "parcels": hashlib.sha256("\n".join(scan.parcels).encode()).hexdigest(),
        "series": series_digest(scan),
        "mean_fd": scan.mean_fd,
    }


def index(
    cohort: Cohort | str | Path,
    folder: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> Index:
    """Find a cohort's scans in a folder, match them with their phenotypes, and read each once to see whether it can
    be used.

    Parameters
    ----------
    cohort : Cohort, str or Path
        A description, or what :func:`load_cohort` takes.
    folder : str or Path
    progress : callable, optional
        Called with the number of scans read and their total.
    workers : int
        Processes that read.

    Raises
    ------
    DataError
        Where the folder, a phenotype table or a column is missing, no file matches, or a column holds values that
        its description does not know; the message shows them with their counts. A scan that cannot be used is no
        error: it is in ``excluded``.
    """
    cohort = cohort if isinstance(cohort, Cohort) else load_cohort(cohort)
    folder = Path(folder)
    found, named = _find(cohort, folder)
    raw, status, rows = _phenotypes(cohort, folder, named)
    out = [
        (path, participant, problem, f"{path}: {message}", "targets")
        for path, participant, (problem, message) in zip(found.path, found.participant_id, status, strict=True)
        if problem
    ]
    values = _variables(cohort, raw, named)
    if "sex" in values:  # the only variable here that two sessions cannot differ in
        n_sexes = values.sex.groupby(found.participant_id).transform("nunique")
        for i in np.flatnonzero(n_sexes > 1):
            seen = sorted(values.sex[found.participant_id == found.participant_id[i]].dropna().unique())
            message = f"{found.path[i]}: the participant's rows name more than one sex ({', '.join(seen)})"
            out.append((found.path[i], found.participant_id[i], "contradictory-phenotype", message, "targets"))
        values.loc[n_sexes > 1, [c for c in values if c not in ("site", "family")]] = None
    labelled = ~found.path.isin([o[0] for o in out])
    values["family"] = _families(cohort, found.participant_id, values.get("family"))
    found["site"] = values["site"]

    by_site = {str(k): float(v) for k, v in cohort.reader.t_r_by.get("site", {}).items()}
    times = [by_site.get(site, cohort.reader.t_r) for site in found.site]
    jobs = [
        (folder / path, participant, t_r, cohort.reader)
        for path, participant, t_r in zip(found.path, found.participant_id, times, strict=True)
    ]
    read = pd.DataFrame(_run(jobs, progress, workers), index=found.index)
    for name in ("problem", "message", "n_frames", "t_r", "n_parcels", "n_constant", "parcels", "series", "mean_fd"):
        if name not in read:
            read[name] = None
    _compare(read, found)
    measured = read.mean_fd.astype(float)
    values["mean_fd"] = values.get("mean_fd", measured).fillna(measured)
    broken = read.problem.notna()
    out += [  # many cohorts give every participant's file one name: the path says which
        (path, participant, problem, path + message, "all")
        for path, participant, problem, message in zip(
            found.path[broken],
            found.participant_id[broken],
            read.problem[broken],
            read.message[broken],
            strict=True,
        )
    ]
    table = pd.concat([found, read[["n_frames", "t_r", "n_parcels", "n_constant"]]], axis=1)
    table = table.assign(phenotype=labelled, **{c: values[c] for c in values if c != "site"})
    table = table.reindex(columns=list(dict.fromkeys([*TABLE, *(t.name for t in cohort.targets)])))
    table = table[~broken].reset_index(drop=True)
    counts = dict.fromkeys(("n_frames", "n_parcels", "n_constant"), int) | {"phenotype": bool}
    numbers = ("t_r", "age", "mean_fd", *(t.name for t in cohort.targets if t.kind == "regression"))
    table = table.astype(counts | dict.fromkeys(numbers, float))
    excluded = pd.DataFrame(sorted(out), columns=["file", "participant_id", "problem", "message", "left_out_of"])
    return Index(
        cohort,
        folder,
        found[["path", "participant_id", "site"]],
        table,
        excluded,
        rows,
        (folder / SIMULATED).is_file(),
    )


def _find(cohort: Cohort, folder: Path) -> tuple[pd.DataFrame, list[defaultdict[str, str]]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = sorted(
        (Path(root) / name).relative_to(folder).as_posix()
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
    )
    for pattern in cohort.scans:
        expression = _pattern(pattern)
        hits = [(path, match) for path in paths if (match := expression.fullmatch(path))]
        if hits:
            break
    else:
        example = f", for example {paths[0]}" if paths else ""
        raise DataError(
            f"{folder}: none of its {len(paths)} files{example} matches {' or '.join(cohort.scans)} of the cohort "
            f"{cohort.name}; correct its scans"
        )
    named = [_entities(path, match) for path, match in hits]
    people = [re.sub(r"[^A-Za-z0-9]", "", cohort.participant.format_map(e)) for e in named]
    unnamed = [path for (path, _), who in zip(hits, people, strict=True) if not who]
    if unnamed:
        raise DataError(f"{unnamed[0]}: no participant in its name; the cohort reads it as {cohort.participant}")
    found = pd.DataFrame(
        {
            "path": [path for path, _ in hits],
            "participant_id": [f"sub-{who}" for who in people],
            "session": [cohort.session.format_map(e) for e in named],
            "run": [cohort.run.format_map(e) for e in named],
        }
    )
    return found, named


def _read_table(cohort: Cohort, folder: Path, table: Phenotype) -> pd.DataFrame | None:
    """The cells as text, with an empty one for what is missing, or None for an optional table that is not there."""
    pattern = Path(table.file)
    if pattern.is_absolute() or not re.search(r"[*?\[]", table.file):
        paths = [p for p in [folder / pattern] if p.is_file()]
    else:
        paths = sorted(folder.glob(table.file))
    if not paths and table.optional:
        return None
    if len(paths) != 1:
        raise DataError(
            f"phenotype of {cohort.name}: one file {table.file} is needed in {folder}, found "
            f"{[p.name for p in paths] or 'none'}",
            problem="no-phenotype",
        )
    separator = table.separator or ("," if paths[0].suffix == ".csv" else "\t")
    try:
        content = pd.read_csv(
            paths[0],
            sep=separator,
            dtype=str,
            keep_default_na=False,
            skiprows=list(table.skip_rows),
            encoding="utf-8-sig",
        )
    except (ValueError, OSError) as error:
        raise DataError(f"{paths[0].name}: not a readable table ({error})", problem="no-phenotype") from None
    absent = [c for c in table.match if c not in content]
    if absent:
        raise DataError(
            f"{paths[0].name}: no column {absent[0]!r} to match scans by; it has {list(content)[:20]} (separator "
            f"{separator!r})",
            problem="no-phenotype",
        )
    content = content.apply(lambda column: column.map(_label))
    missing = content.isin(cohort.missing) | content.apply(lambda column: column.str.lower().isin(MISSING_WORDS))
    return content.mask(missing, "")


def _phenotypes(cohort: Cohort, folder: Path, named: list) -> tuple[pd.DataFrame, list[tuple[str, str]], dict]:
    """The raw values of every scan (a row a scan, a column a phenotype column), whether it has any, and counts."""
    tables = [(t, content) for t in cohort.phenotype if (content := _read_table(cohort, folder, t)) is not None]
    needed = list(dict.fromkeys(v.column for v in cohort.variables.values()))
    raw = [dict.fromkeys(needed, "") for _ in named]
    status = [("", "")] * len(named) if tables else [("no-phenotype", "there is no phenotype table")] * len(named)
    counts = {"rows": 0, "identical": 0, "contradictory": 0, "without_scan": 0}
    taken: set[str] = set()
    for number, (table, content) in enumerate(tables):
        columns = [c for c in needed if c in content and c not in taken]
        taken |= set(columns)
        keys = list(zip(*(content[c].map(_key) for c in table.match), strict=True))
        rows: dict[tuple, tuple] = {}
        contradictory: dict[tuple, str] = {}
        for key, row in zip(keys, content[columns].itertuples(index=False, name=None), strict=True):
            if not all(key):
                continue
            if key in rows:
                counts["identical" if rows[key] == row else "contradictory"] += 1
                if rows[key] != row:
                    which = next(c for c, a, b in zip(columns, rows[key], row, strict=True) if a != b)
                    contradictory[key] = f"its rows of {table.file} differ in {which}"
            rows.setdefault(key, row)
        wanted = [tuple(_key(t.format_map(e)) for t in table.match.values()) for e in named]
        for place, template in enumerate(table.match.values()):
            if not any(key[place] for key in wanted):
                raise DataError(f"phenotype of {cohort.name}: no scan has the entities of {template!r}", "no-phenotype")
        if number == 0:
            counts["rows"] = len(content)
            counts["without_scan"] = len(set(rows) - set(wanted))
        for i, key in enumerate(wanted):
            if key in contradictory:
                status[i] = ("contradictory-phenotype", contradictory[key])
            elif key in rows:
                raw[i] |= dict(zip(columns, rows[key], strict=True))
            elif number == 0:
                status[i] = ("no-phenotype", f"no row of {table.file} for {' '.join(key)}")
    absent = [v.column for v in cohort.variables.values() if v.column not in taken and not v.optional and tables]
    if absent:
        have = sorted({c for _, content in tables for c in content})
        raise DataError(
            f"phenotype of {cohort.name}: no column {absent[0]!r} in {[t.file for t, _ in tables]}; there are "
            f"{have[:30]}",
            problem="no-phenotype",
        )
    raw = [
        dict.fromkeys(needed, "") if p == "contradictory-phenotype" else r
        for r, (p, _) in zip(raw, status, strict=True)
    ]
    return pd.DataFrame(raw, index=range(len(raw)), columns=needed, dtype=object), status, counts


def _variables(cohort: Cohort, raw: pd.DataFrame, named: list) -> pd.DataFrame:
    """Values with their labels and units; None where there is none."""
    values = pd.DataFrame(index=raw.index)
    for name, column in cohort.variables.items():
        text = raw[column.column]
        if name == "site":
            continue
        text = text.mask(text.isin(column.exclude), "")
        if column.kind == "regression":
            numbers = pd.to_numeric(text.mask(text == "", None), errors="coerce")
            unknown = text[(text != "") & ~np.isfinite(numbers)]
            values[name] = numbers / MONTHS.get(column.unit, 1.0)
            allowed = "numbers"
        else:
            labels = text.map(column.mapping) if column.mapping else text
            unknown = text[(text != "") & labels.isna()]
            values[name] = labels.astype(object).where(text != "", None)
            allowed = f"one of {[*column.mapping, *column.exclude]}"
        if len(unknown):
            shown = ", ".join(f"{v!r} ({n})" for v, n in unknown.value_counts().items())
            raise DataError(
                f"{name} of {cohort.name}: column {column.column!r} must hold {allowed}, found also {shown}; map "
                "them, or list them under exclude or missing",
                problem="unexpected-label",
            )
    if "age" in values:
        wrong = values.age[(values.age < 0) | (values.age > 120)]
        if len(wrong):
            raise DataError(
                f"age of {cohort.name}: column {cohort.age.column!r} must be 0 to 120 years, got {len(wrong)} others, "
                f"for example {wrong.iloc[0]:g}; is its unit ({cohort.age.unit}) right?",
                problem="unexpected-label",
            )
    site = raw[cohort.site.column] if cohort.site else pd.Series("", index=raw.index)
    site = site.where(site != "", [e["site"] for e in named])
    values["site"] = site.map(lambda s: cohort.site.mapping.get(_label(s), s)) if cohort.site else site
    return values


def _families(cohort: Cohort, people: pd.Series, family: pd.Series | None) -> list[str]:
    """A label a scan: participants joined by a family column, by the cohort's list, or through each other."""
    joined: dict[str, str] = {}

    def first(of: str) -> str:
        while (up := joined.get(of, of)) != of:
            of = up
        return of

    names = [None] * len(people) if family is None else family
    links = [(who, f"family-{name}") for who, name in zip(people, names, strict=True) if not pd.isna(name)]
    links += [(group[0], other) for group in cohort.families for other in group[1:]]
    for one, other in links:
        low, high = sorted((first(one), first(other)))  # "family-" sorts before "sub-" and so names the group
        joined[high] = low
    return [first(who) for who in people]


def _run(jobs: list, progress: Callable[[int, int], None] | None, workers: int) -> list[dict]:
    done = []
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads can hang
    with ProcessPoolExecutor(workers, spawn) if workers > 1 else nullcontext() as pool:
        for result in pool.map(_inspect, jobs, chunksize=8) if pool else map(_inspect, jobs):
            done.append(result)
            if progress:
                progress(len(done), len(jobs))
    return done


def _compare(read: pd.DataFrame, found: pd.DataFrame) -> None:
    """Mark scans with other parcels than most, and series that are there more than once."""
    usable = read[read.problem.isna()]
    if usable.empty:
        return
    usual = usable.parcels.value_counts(sort=True).index[0]
    n_usual = int(usable.n_parcels[usable.parcels == usual].iloc[0])
    for i in usable.index[usable.parcels != usual]:
        n = int(read.n_parcels[i])
        kind = "parcel-count" if n != n_usual else "parcel-order"
        what = f"{n} parcels" if n != n_usual else f"other parcels, or the same {n} in another order,"
        read.loc[i, ["problem", "message"]] = kind, f": {what} than the {n_usual} of most scans"
    for _, group in usable[usable.series.duplicated(keep=False)].groupby("series", sort=False):
        people = found.participant_id[group.index].unique()
        # one participant's copy can go; whose series it is that stands under two names nobody knows
        for i in group.index if len(people) > 1 else group.index[1:]:
            other = next(found.path[j] for j in group.index if j != i)
            message = f": the same series as {other}"
            read.loc[i, ["problem", "message"]] = "duplicate-series", message
