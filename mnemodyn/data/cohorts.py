"""Cohorts: a YAML description of where scans, participants and targets are, and the index of a folder by it."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias, get_args, get_origin

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mnemodyn.data.formats import entities, naming, refuse
from mnemodyn.data.scans import DataError, Scan, load_scan, series_digest
from mnemodyn.parameters import read_yaml

__all__ = ["Cohort", "Column", "Index", "Phenotype", "Reader", "index", "load_cohort", "shipped"]

KINDS = ("classification", "regression")
MONTHS = {"years": 1.0, "months": 12.0}  # how many make a year
COLUMNS = {"site": "", "family": "", "age": "years", "sex": "", "mean_fd": "mm"}  # and the unit
MISSING_WORDS = {"", "na", "n/a", "nan", "null"}
SIMULATED = "simulated.json"
Entities = defaultdict[str, str]
Progress: TypeAlias = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Reader:
    """How scans are read: the settings of :func:`mnemodyn.data.scans.load_scan`, and beside them:

    Attributes
    ----------
    t_r_by : dict
        ``{"site": {name: seconds}}`` where `t_r` depends on the site; a site that is not listed has none.
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

    def __post_init__(self) -> None:
        if self.t_r_by and (
            set(self.t_r_by) != {"site"} or not isinstance(self.t_r_by["site"], dict)
        ):
            refuse(f"reader.t_r_by must be {{site: {{name: seconds}}}}, got {self.t_r_by!r}")
        for t in (self.t_r, *self.t_r_by.get("site", {}).values()):
            if t is not None and (
                isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t < 100
            ):
                refuse(f"reader: t_r must be in seconds, > 0 and < 100, got {t!r}")

    def load(self, path: Path, participant_id: str, t_r: float | None) -> Scan:
        """Read a scan; `t_r` in seconds is of its site, or what was found before."""
        settings = asdict(self) | {
            "t_r": t_r,
            "override_t_r": self.override_t_r and t_r is not None,
        }
        atlas, _ = settings.pop("atlas"), settings.pop("t_r_by")
        scan = load_scan(path, participant_id=participant_id, **settings)
        return scan if scan.atlas else replace(scan, atlas=atlas)


@dataclass(frozen=True)
class Phenotype:
    """A table of phenotypes.

    Attributes
    ----------
    file : str
        Path seen from the cohort's folder, absolute, or a pattern that one file matches. A comma separates the
        cells of ``.csv``, a tab those of everything else.
    match : dict
        Key column -> template of the scan's entities, such as ``{"participant_id": "sub-{participant}"}``; a row
        belongs to a scan where all of them agree. Leading zeros, ``sub-`` and punctuation do not count.
    skip_rows : tuple of int
        Lines to leave out, the first being 0 (NDA's tables describe their columns in line 1).
    optional : bool
        Whether the file may be missing: all scans are then without phenotype.
    """

    file: str
    match: Mapping[str, str]
    skip_rows: tuple[int, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Column:
    """A column of the phenotype table; of a target, with the name of what is to be predicted.

    Attributes
    ----------
    column, name : str
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
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            refuse(f"column {self.column}: kind must be one of {KINDS}, got {self.kind!r}")
        object.__setattr__(self, "mapping", {_label(k): str(v) for k, v in self.mapping.items()})
        object.__setattr__(self, "exclude", tuple(map(_label, self.exclude)))


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
    site, family, age, sex, mean_fd : Column
        Age in years or months, sex to ``male`` and ``female``, mean framewise displacement in mm. Without a value
        in the table the site is the entity ``site``, and ``mean_fd`` that of the motion file beside the scan.
    targets : tuple of Column
        What can be predicted, each with a name.
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
    targets: tuple[Column, ...] = ()
    missing: tuple[str, ...] = ()
    families: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "missing", tuple(map(_label, self.missing)))
        if self.age and self.age.unit not in MONTHS:
            refuse(f"age.unit must be years or months, got {self.age.unit!r}")
        if self.sex and {*self.sex.mapping.values()} != {"male", "female"}:
            refuse(f"sex.mapping must lead to male and female, got {self.sex.mapping}")
        for name, n in Counter(t.name for t in self.targets).items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                refuse(f"targets: name must be lower-case letters, digits and _, got {name!r}")
            if n > 1 or (name in TABLE and name not in ("sex", "age")):
                refuse(f"targets: the name {name!r} is taken")
        for pattern in self.scans:
            _pattern(pattern)

    @property
    def variables(self) -> dict[str, Column]:
        """What is read from the phenotype: name in the index's table -> column."""
        known = {name: getattr(self, name) for name in COLUMNS}
        return {k: v for k, v in known.items() if v} | {t.name: t for t in self.targets}


def _label(value: Any) -> str:
    text = str(value).strip()
    return text.split(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def _key(value: str) -> str:
    text = re.sub(r"[^A-Za-z0-9]", "", re.sub(r"^(sub|ses)-", "", _label(value)))
    return str(int(text)) if text.isdecimal() else text


def _build(kind: Any, value: Any, where: str) -> Any:
    """What a field of type `kind` holds, from YAML: a dataclass from a mapping, a tuple from a list, or as it is."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType and is_dataclass(args[0]):
        return None if value is None else _build(args[0], value, where)
    if not is_dataclass(kind):
        needs = {tuple: list, Mapping: dict}.get(origin, kind)
        if needs in (list, dict, str, bool, int) and type(value) is not needs:
            words = {list: "a list", dict: "a mapping"}.get(needs, f"{needs.__name__}")
            refuse(
                f"{where} must be {words}, got {value!r}{' (quote text)' if needs is str else ''}"
            )
        return (
            tuple(str(v) if args[0] is str else _build(args[0], v, where) for v in value)
            if origin is tuple
            else value
        )
    if type(value) is kind:
        return value
    if not isinstance(value, dict):
        refuse(f"{where} must be a mapping, got {value!r}")
    known = {f.name: f for f in fields(kind)}
    for name in value:
        if name not in known:
            refuse(f"{where}: unknown key {name!r} (known: {', '.join(known)})")
    for name, f in known.items():
        if (
            f.default is MISSING
            and f.default_factory is MISSING
            and value.get(name) in (None, "", [], {})
        ):
            refuse(f"{where}: {name} is missing")
    with naming(where):
        return kind(
            **{name: _build(known[name].type, v, f"{where}: {name}") for name, v in value.items()}
        )  # type: ignore


def shipped() -> list[str]:
    """Names of the cohorts that come with the package."""
    folder = resources.files("mnemodyn.data") / "cohorts"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_cohort(source: str | Path) -> Cohort:
    """Read a cohort's description.

    `source` is the name of a shipped cohort (:func:`shipped`), or a YAML file with the fields of :class:`Cohort`;
    ``site``, ``family``, ``age``, ``sex`` and ``mean_fd`` are the name of a column or a mapping of :class:`Column`.
    A DataError (problem ``cohort``) for an unknown name or setting, a missing one, or one of the wrong type.
    """
    path = Path(source)
    if str(source) in shipped():
        path = Path(str(resources.files("mnemodyn.data") / "cohorts" / f"{source}.yaml"))
    elif not path.is_file():
        refuse(
            f"{source} is neither a YAML file nor one of the shipped cohorts: {', '.join(shipped())}"
        )
    try:
        content: Any = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        refuse(f"{path.name}: {error}")
    if isinstance(content, dict):
        content = {"name": path.stem} | content
        for name in ("scans", "phenotype"):  # one is as good as a list of one
            if name in content and not isinstance(content[name], list):
                content[name] = [content[name]]
        for name, unit in COLUMNS.items():
            given = content.get(name)
            given = {"column": given} if isinstance(given, str) else given
            if unit and isinstance(given, dict):
                given = {"kind": "regression", "unit": unit} | given
            content[name] = _build(Column | None, given, f"{path.name}: {name}")
        if isinstance(content.get("targets"), list):
            content["targets"] = [
                _target(t, content, f"{path.name}: targets") for t in content["targets"]
            ]
    return _build(Cohort, content, path.name)


def _target(given: Any, content: dict[str, Any], where: str) -> Any:
    if isinstance(given, str):  # "sex" and "age": as their columns say
        if not isinstance(content.get(given), Column):
            refuse(f"{where}: {given!r} is short for the column {given}, which is not given")
        return replace(content[given], name=given)
    if isinstance(given, dict) and "kind" not in given:
        refuse(f"{where}: kind is missing (one of {', '.join(KINDS)})")
    return given


def _pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern of paths."""
    token = re.compile(
        r"\{(?P<name>[a-z_]+)(?::(?P<form>(?:[^{}]|\{\d+(?:,\d*)?\})+))?\}|\*\*/|\*|\?|[^{}*?]+|."
    )
    wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    expression, seen = "", set()
    for part in token.finditer(pattern):
        if name := part["name"]:
            expression += (
                f"(?P={name})" if name in seen else f"(?P<{name}>{part['form'] or '[A-Za-z0-9]+'})"
            )
            seen.add(name)
        else:
            expression += wild.get(part[0]) or re.escape(part[0])
    try:
        return re.compile(expression)
    except re.error as error:
        refuse(f"scans: {pattern!r} is no valid pattern ({error})")


def _entities(path: str, match: re.Match[str]) -> Entities:
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
class Index(Sequence[Scan]):
    """What a folder holds by a cohort's description; as a sequence, the scans of `table`, read when asked for.

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
        table, ``targets`` where it is there without labels, for pretraining only; a file can have both.
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
        """Read the scan of a row of `table`; a DataError where the file changed since and can no longer be used."""
        scan = self.cohort.reader.load(
            self.folder / row["path"], row["participant_id"], float(row["t_r"])
        )
        return replace(scan, session=row["session"], run=row["run"])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        return self.load(self.table.iloc[i])

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
            "t_r": dict(Counter(f"{t:g}" for t in table.t_r.sort_values())),
            "sites": dict(Counter(map(str, sites.sort_values()))),
            "targets": {
                t.name: _distribution(t, table[t.name].dropna()) for t in self.cohort.targets
            },
            "phenotype": dict(self.rows),
            "problems": {k: int(n) for k, n in self.excluded.problem.value_counts().items()},
            "excluded": self.excluded.to_dict("records"),
        }

    def __str__(self) -> str:
        s = self.summary()
        kept = f"{s['n_usable']} of them usable, {s['n_with_phenotype']} with phenotype"
        lines = [
            s["cohort"] + ("  SIMULATED" if self.simulated else ""),
            f"{s['n_scans']} scans of {s['n_participants']} participants found, {s['n_sites']} sites; {kept}",
            f"frames {' to '.join(map(str, s['frames']))}, parcels {', '.join(map(str, s['n_parcels']))}",
            "t_r " + ", ".join(f"{t} s ({n})" for t, n in s["t_r"].items()),
        ]
        for name, d in s["targets"].items():
            shown = ", ".join(f"{label} {n}" for label, n in d.get("classes", {}).items())
            if "mean" in d:
                shown = f"{d['mean']:.2f} (SD {d['sd']:.2f}, {d['min']:g} to {d['max']:g}) {d['unit']}".rstrip()
            lines.append(f"target {name}: {shown or 'none'}; {s['n_usable'] - d['n']} without")
        lines.append(
            "phenotype: " + ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in self.rows.items())
        )
        for (problem, scope), group in self.excluded.groupby(["problem", "left_out_of"], sort=True):
            what = "left out" if scope == "all" else "without labels"
            lines.append(f"{what}: {len(group)} {problem}, e.g. {group.message.iloc[0]}")
        return "\n".join(lines)


def _distribution(target: Column, values: pd.Series) -> dict[str, Any]:
    base = {"kind": target.kind, "n": len(values)}
    if target.kind == "classification":
        return base | {"classes": dict(Counter(map(str, values.sort_values())))}
    v = values.to_numpy(float)
    numbers = {"mean": v.mean(), "sd": v.std(), "min": v.min(), "max": v.max()} if len(v) else {}
    unit = "years" if target.unit in MONTHS else target.unit
    return base | {"unit": unit} | {name: float(number) for name, number in numbers.items()}


def _inspect(reader: Reader, path: Path, participant_id: str, t_r: float | None) -> dict[str, Any]:
    """What the index needs of one scan, or the reason why it cannot be used."""
    try:
        scan = reader.load(path, participant_id, t_r)
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


READ = (
    "problem",
    "message",
    "n_frames",
    "t_r",
    "n_parcels",
    "n_constant",
    "parcels",
    "series",
    "mean_fd",
)


def index(
    cohort: Cohort | str | Path, folder: str | Path, *, progress: Progress = None, workers: int = 1
) -> Index:
    """Find a cohort's scans in a folder, match them with their phenotypes, and read each once: can it be used?

    A DataError where the folder, a phenotype table or a column is missing, no file matches, or a column holds values
    that its description does not know; the message shows them with their counts. A scan that cannot be used is no
    error: it is in ``excluded``.

    Parameters
    ----------
    cohort : Cohort, str or Path
        A description, or what :func:`load_cohort` takes.
    folder : str or Path
    progress : callable
        Called with the number of scans read and their total.
    workers : int
        Processes that read.
    """
    cohort = cohort if isinstance(cohort, Cohort) else load_cohort(cohort)
    folder = Path(folder)
    found, named = _find(cohort, folder)
    raw, out, rows = _phenotypes(cohort, folder, named)
    values = _variables(cohort, raw, named)
    if "sex" in values:  # the only variable here that two sessions cannot differ in
        sexes = values.sex.groupby(found.participant_id).agg(
            lambda v: ", ".join(sorted(v.dropna().unique()))
        )
        sexes = found.participant_id.map(sexes)
        two = sexes.str.contains(", ")
        for i in np.flatnonzero(two).tolist():
            out[i] = (
                "contradictory-phenotype",
                f": the participant's rows name more than one sex ({sexes[i]})",
            )
        values.loc[two, [c for c in values if c not in ("site", "family")]] = None
    values["family"] = _families(cohort, found.participant_id, values.get("family"))
    found["site"] = values["site"]

    by_site = {str(k): float(v) for k, v in cohort.reader.t_r_by.get("site", {}).items()}
    jobs = [
        (cohort.reader, folder / path, who, by_site.get(site, cohort.reader.t_r))
        for path, who, site in found[["path", "participant_id", "site"]].itertuples(index=False)
    ]
    results = []
    for result in Parallel(max(1, workers), return_as="generator")(
        delayed(_inspect)(*job) for job in jobs
    ):
        results.append(result)
        if progress:
            progress(len(results), len(jobs))
    read = pd.DataFrame(results, index=found.index).reindex(columns=list(READ))
    read[["problem", "message"]] = read[["problem", "message"]].astype(object)
    _compare(read, found)
    measured = read.mean_fd.astype(float)
    values["mean_fd"] = values.get("mean_fd", measured).fillna(measured)
    broken = read.problem.notna()
    # Many cohorts give every participant's file one name: the path says which.
    why = [(i, problem, message, "targets") for i, (problem, message) in out.items()]
    why += [(i, read.problem[i], read.message[i], "all") for i in np.flatnonzero(broken).tolist()]
    excluded = sorted(
        (found.path[i], found.participant_id[i], p, found.path[i] + m, of) for i, p, m, of in why
    )

    table = pd.concat([found, read[["n_frames", "t_r", "n_parcels", "n_constant"]]], axis=1)
    table = table.assign(
        phenotype=~found.index.isin(list(out)), **{c: values[c] for c in values if c != "site"}
    )
    table = table.reindex(columns=list(dict.fromkeys([*TABLE, *(t.name for t in cohort.targets)])))
    numbers = ("t_r", "age", "mean_fd", *(t.name for t in cohort.targets if t.kind == "regression"))
    kinds = dict.fromkeys(("n_frames", "n_parcels", "n_constant"), int) | dict.fromkeys(
        numbers, float
    )
    return Index(
        cohort,
        folder,
        found[["path", "participant_id", "site"]],
        table[~broken].reset_index(drop=True).astype(kinds),
        pd.DataFrame(
            excluded, columns=["file", "participant_id", "problem", "message", "left_out_of"]
        ),
        rows,
        (folder / SIMULATED).is_file(),
    )


def _find(cohort: Cohort, folder: Path) -> tuple[pd.DataFrame, list[Entities]]:
    if not folder.is_dir():
        refuse(f"{folder}: no such folder", "no-folder")
    paths = sorted(
        (Path(root) / name).relative_to(folder).as_posix()
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
    )
    for pattern in map(_pattern, cohort.scans):
        if hits := [
            (path, _entities(path, match)) for path in paths if (match := pattern.fullmatch(path))
        ]:
            break
    else:
        example = f", for example {paths[0]}" if paths else ""
        files = f"none of its {len(paths)} files{example} matches {' or '.join(cohort.scans)}"
        refuse(f"{folder}: {files} of the cohort {cohort.name}; correct its scans", "no-scans")
    rows = []
    for path, named in hits:
        who = re.sub(r"[^A-Za-z0-9]", "", cohort.participant.format_map(named))
        if not who:
            refuse(
                f"{path}: no participant in its name; the cohort reads it as {cohort.participant}",
                "participant",
            )
        rows.append(
            (path, f"sub-{who}", cohort.session.format_map(named), cohort.run.format_map(named))
        )
    return pd.DataFrame(rows, columns=["path", "participant_id", "session", "run"]), [
        named for _, named in hits
    ]


def _read_table(cohort: Cohort, folder: Path, table: Phenotype) -> pd.DataFrame | None:
    """The cells as text, with an empty one for what is missing, or None for an optional table that is not there."""
    several = re.search(r"[*?\[]", table.file) and not Path(table.file).is_absolute()
    paths = (
        sorted(folder.glob(table.file))
        if several
        else [p for p in [folder / table.file] if p.is_file()]
    )
    if not paths and table.optional:
        return None
    if len(paths) != 1:
        found = f"one file {table.file} is needed in {folder}, found {[p.name for p in paths] or 'none'}"
        refuse(f"phenotype of {cohort.name}: {found}", "no-phenotype")
    file, separator = paths[0], "," if paths[0].suffix == ".csv" else "\t"
    how = {"sep": separator, "skiprows": list(table.skip_rows), "encoding": "utf-8-sig"}
    try:
        content = pd.read_csv(file, dtype=str, keep_default_na=False, **how)
    except (ValueError, OSError) as error:
        refuse(f"{file.name}: not a readable table ({error})", "no-phenotype")
    for column in table.match:
        if column not in content:
            has = f"it has {list(content)[:20]} (separator {separator!r})"
            refuse(f"{file.name}: no column {column!r} to match scans by; {has}", "no-phenotype")
    content = content.map(_label)
    return content.mask(
        content.isin(cohort.missing) | content.map(str.lower).isin(MISSING_WORDS), ""
    )


def _phenotypes(
    cohort: Cohort, folder: Path, named: list[Entities]
) -> tuple[pd.DataFrame, dict[int, tuple[str, str]], dict[str, int]]:
    """The raw values of every scan (a column a phenotype column), why rows of these have none, and counts."""
    tables = [
        (t, content)
        for t in cohort.phenotype
        if (content := _read_table(cohort, folder, t)) is not None
    ]
    needed = list(dict.fromkeys(v.column for v in cohort.variables.values()))
    raw = [dict.fromkeys(needed, "") for _ in named]
    absent = f"there is no {' or '.join(t.file for t in cohort.phenotype) or 'phenotype table'} in the folder"
    mend = "put it there, or give its place in a cohort's YAML: phenotype: {file: ...}"
    out = (
        {} if tables else dict.fromkeys(range(len(named)), ("no-phenotype", f": {absent}; {mend}"))
    )
    counts = {"rows": 0, "identical": 0, "contradictory": 0, "without_scan": 0}
    taken: set[str] = set()
    for number, (table, content) in enumerate(tables):
        columns = [c for c in needed if c in content and c not in taken]
        taken |= set(columns)
        rows: dict[tuple[str, ...], tuple[str, ...]] = {}
        contradictory: dict[tuple[str, ...], str] = {}
        keys = zip(*(content[c].map(_key) for c in table.match), strict=True)
        for key, row in zip(keys, content[columns].itertuples(index=False, name=None), strict=True):
            if all(key) and (first := rows.setdefault(key, row)) is not row:
                counts["identical" if first == row else "contradictory"] += 1
                if first != row:
                    which = next(c for c, a, b in zip(columns, first, row, strict=True) if a != b)
                    contradictory[key] = f": its rows of {table.file} differ in {which}"
        wanted = [tuple(_key(t.format_map(e)) for t in table.match.values()) for e in named]
        for place, template in enumerate(table.match.values()):
            if not any(key[place] for key in wanted):
                refuse(
                    f"phenotype of {cohort.name}: no scan has the entities of {template!r}",
                    "no-phenotype",
                )
        if number == 0:
            counts |= {"rows": len(content), "without_scan": len(set(rows) - set(wanted))}
        for i, key in enumerate(wanted):
            if key in contradictory:
                out[i] = "contradictory-phenotype", contradictory[key]
            elif key in rows:
                raw[i] |= dict(zip(columns, rows[key], strict=True))
            elif number == 0:
                out[i] = "no-phenotype", f": no row of {table.file} for {' '.join(key)}"
    for variable in cohort.variables.values() if tables else ():
        if variable.column not in taken and not variable.optional:
            have = sorted({c for _, content in tables for c in content})[:30]
            where = f"in {[t.file for t, _ in tables]}; there are {have}"
            refuse(
                f"phenotype of {cohort.name}: no column {variable.column!r} {where}", "no-phenotype"
            )
    for i, (problem, _) in out.items():
        if problem == "contradictory-phenotype":
            raw[i] = dict.fromkeys(needed, "")
    return pd.DataFrame(raw, index=range(len(raw)), columns=needed, dtype=object), out, counts


def _variables(cohort: Cohort, raw: pd.DataFrame, named: list[Entities]) -> pd.DataFrame:
    """Values with their labels and units; None where there is none."""
    values = pd.DataFrame(index=raw.index)
    for name, column in cohort.variables.items():
        if name == "site":
            continue
        text = raw[column.column].mask(raw[column.column].isin(column.exclude), "")
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
        where = f"{name} of {cohort.name}: column {column.column!r} must"
        if len(unknown):
            shown = ", ".join(f"{v!r} ({n})" for v, n in unknown.value_counts().items())
            mend = "map them, or list them under exclude or missing"
            refuse(f"{where} hold {allowed}, found also {shown}; {mend}", "unexpected-label")
        if name == "age" and len(wrong := values.age[(values.age < 0) | (values.age > 120)]):
            shown = f"{len(wrong)} others, for example {wrong.iloc[0]:g}; is its unit ({column.unit}) right?"
            refuse(f"{where} be 0 to 120 years, got {shown}", "unexpected-label")
    site = raw[cohort.site.column] if cohort.site else pd.Series("", index=raw.index)
    site = site.where(site != "", [e["site"] for e in named])
    labels = cohort.site.mapping if cohort.site else {}
    values["site"] = site.map(lambda s: labels.get(_label(s), s))
    return values


def _families(cohort: Cohort, people: pd.Series, family: pd.Series | None) -> list[str]:
    """A label a scan: participants joined by a family column, by the cohort's list, or through each other."""
    links = [(who, who) for who in people] + [
        (group[0], other) for group in cohort.families for other in group
    ]
    if family is not None:
        links += [
            (who, f"family-{name}")
            for who, name in zip(people, family, strict=True)
            if not pd.isna(name)
        ]
    names, codes = np.unique(np.array(links, dtype=str), return_inverse=True)
    pairs = coo_array(
        (np.ones(len(links)), tuple(codes.reshape(-1, 2).T)), shape=(len(names), len(names))
    )
    groups = connected_components(pairs, directed=False)[1]
    first = names[
        np.unique(groups, return_index=True)[1]
    ]  # "family-" sorts before "sub-" and so names the group
    return first[groups[np.searchsorted(names, people.to_numpy(str))]].tolist()


def _compare(read: pd.DataFrame, found: pd.DataFrame) -> None:
    """Mark scans with other parcels than most, and series that are there more than once."""
    usable = read[read.problem.isna()]
    if usable.empty:
        return
    usual = usable[usable.parcels == usable.parcels.value_counts().index[0]].iloc[0]
    for i, row in usable[usable.parcels != usual.parcels].iterrows():
        n, n_usual = int(row.n_parcels), int(usual.n_parcels)
        kind, what = (
            "parcel-order",
            f"other parcels, or the same {n} in another order, than most scans",
        )
        if n != n_usual:
            kind, what = "parcel-count", f"{n} parcels, and most scans have {n_usual}"
        atlases = [entities(Path(found.path[j]).name) for j in (i, usual.name)]
        if len(names := {e.get("seg", e.get("atlas", "")) for e in atlases}) > 1:
            what += f"; name one of the atlases {sorted(names)} in the cohort's pattern of scans, as in *_seg-NAME_*"
        read.loc[i, ["problem", "message"]] = kind, f": {what}"
    for _, group in usable[usable.series.duplicated(keep=False)].groupby("series", sort=False):
        people = found.participant_id[group.index].unique()
        # one participant's copy can go; whose series it is that stands under two names nobody knows
        for i in group.index if len(people) > 1 else group.index[1:]:
            other = next(found.path[j] for j in group.index if j != i)
            read.loc[i, ["problem", "message"]] = (
                "duplicate-series",
                f": the same series as {other}",
            )
