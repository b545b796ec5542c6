"""Cohorts: the YAML description of a study, and the index of a folder of scans that follows it."""

import csv
import io
import json
import re
import reprlib
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mnemodyn.data.formats import LABEL, entities, participant, present, reading, refuse, walk
from mnemodyn.data.scans import (
    Collection,
    DataError,
    Scan,
    choose_files,
    data_name,
    fingerprint,
    is_no_scan,
    load_scan,
)
from mnemodyn.files import digest, load_yaml

__all__ = [
    "Cohort",
    "Column",
    "Index",
    "Layout",
    "Phenotype",
    "Reader",
    "index",
    "load_cohort",
    "shipped",
]

SHIPPED = Path(__file__).with_name("cohorts")
MATCH = Path(__file__).with_name("match.py")
PER_YEAR = {"years": 1.0, "months": 12.0}
# The last ones are what a spreadsheet leaves where it could not compute a cell.
MISSING_WORDS = (
    "",
    "na",
    "n/a",
    "nan",
    "null",
    "#n/a",
    "#ref!",
    "#value!",
    "#div/0!",
    "#name?",
    "#num!",
    "#null!",
)
CODE = "-(9|99+|88+|77+)"  # what many tables have for "not known"
# Names that no column has: a table with zero bytes is refused.
KEY = "\0key"
LINE = "\0line"
Entities = defaultdict[str, str]
Reasons = dict[int, tuple[str, str]]  # row -> problem and message
SIMULATED = "simulated.json"  # a folder with this file holds a simulated cohort

# Columns of the index's table; those of a cohort's targets follow.
TABLE = (
    "path",
    "participant_id",
    "session",
    "run",
    "site",
    "family",
    "age",
    "sex",
    "mean_fd",
    "n_frames",
    "t_r",
    "n_parcels",
    "n_constant",
    "phenotype",
)
RESERVED = set(TABLE) - {"sex", "age"}  # targets are not called so


def _label(value: str) -> str:
    """A cell as it is compared: 1, 1.0 and " 1.00" are the same label, and so are 0.5 and 0.50."""
    text = value.strip()
    if re.fullmatch(r"-?[0-9]+\.[0-9]+", text):
        text = text.rstrip("0").rstrip(".")
    return text


def _raw_value(value: Any) -> str:
    """A value of a description that cells are compared with."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be text or a number, got {value!r}; write it in quotes")
    return _label(str(value))


RawValue = Annotated[str, BeforeValidator(_raw_value)]
Seconds = Annotated[float, Field(gt=0, lt=100)]
Kind = Literal["classification", "regression"]


def _check_template(template: str) -> str:
    # Python's own templates can ask for attributes, and for a billion blanks.
    if not re.fullmatch(r"([^{}]|\{[a-z_]+\})*", template):
        raise ValueError(f"{template!r}: braces must hold the name of an entity, such as {{run}}")
    return template


Template = Annotated[str, AfterValidator(_check_template)]


def _pattern(pattern: str) -> str:
    """The regular expression of a pattern of paths, see :class:`Cohort`."""
    expression = ""
    # An entity's own expression may hold counts in braces, such as [0-9]{7}.
    special = r"(\{[a-z_]+(?::(?:[^{}]|\{[0-9,]+\})+)?\}|\*\*/|\*)"
    for piece in re.split(special, pattern):
        if piece == "**/":
            expression += "(?:.*/)?"
        elif piece == "*":
            expression += "[^/]*"
        elif re.fullmatch(special, piece):
            name, _, form = piece[1:-1].partition(":")
            if f"(?P<{name}>" in expression:
                expression += f"(?P={name})"
            else:
                usual = LABEL if name == "participant" else "[A-Za-z0-9]+"
                expression += f"(?P<{name}>{form or usual})"
        elif "{" in piece or "}" in piece:
            raise ValueError(f"{pattern!r}: an entity is {{name}} or {{name:regular expression}}")
        else:
            expression += re.escape(piece)
    return expression


def _check_pattern(pattern: str) -> str:
    expression = _pattern(pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what will soon mean something else
            re.compile(expression)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise ValueError(f"{pattern!r} is no valid pattern ({error})") from None
    return pattern


Pattern = Annotated[str, Field(max_length=1000), AfterValidator(_check_pattern)]


def _as_list(given: Any) -> Any:
    """One pattern is short for a list of it."""
    return [given] if isinstance(given, str) else given


def _column_name(given: Any) -> Any:
    """A plain name is short for the column of that name."""
    return {"column": given} if isinstance(given, str) else given


class _Description(BaseModel):
    """A part of a cohort's description. Types are not converted, and unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, given: Any) -> Any:
        # pydantic would refuse them too, but not say which keys there are.
        if isinstance(given, dict):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r} (known: {', '.join(cls.model_fields)})")
        return given


class Reader(_Description):
    """How scans are read: settings of :func:`mnemodyn.data.scans.load_scan`, and two more.

    Attributes
    ----------
    t_r_by_site : dict
        Site -> seconds, where the repetition time depends on the site.
    atlas : str
        Name of the atlas, for files that do not state it.
    """

    t_r: Seconds | None = None
    t_r_by_site: dict[str, Seconds] = {}
    override_t_r: bool = False
    frames_first: bool | None = None
    key: str | None = None
    max_constant_parcels: int = 0
    min_frames: int = 2
    atlas: str = ""

    def load(self, path: Path, participant_id: str, t_r: float | None) -> Scan:
        """Read a scan; `t_r` (seconds) is that of its site, or what was found before."""
        settings = self.model_dump(exclude={"t_r", "t_r_by_site", "atlas"})
        scan = load_scan(path, participant_id=participant_id, t_r=t_r, **settings)
        return replace(scan, atlas=scan.atlas or self.atlas)


class Phenotype(_Description):
    """The table of phenotypes. If the file is missing, all scans are without labels.

    Attributes
    ----------
    file : str
        Path relative to the cohort's folder, or absolute; ``.csv``, or else separated by tabs.
    match : dict
        Key column -> template of the scan's entities. A row belongs to a scan if all of them agree;
        leading zeros, ``sub-`` and punctuation are ignored.
    """

    file: str = "participants.tsv"
    match: Annotated[dict[str, Template], Field(min_length=1)] = {"participant_id": "{participant}"}


class Column(_Description):
    """A column of the phenotype table.

    Attributes
    ----------
    column : str
    kind : {"classification", "regression"}
    mapping : dict
        Raw value -> label. If it is given, any other value is an error, except for a site.
    exclude : list
        Raw values that carry no label.
    unit : str
        Unit of a regression's values. Months are converted to years.
    optional : bool
        Whether the table may lack the column.
    """

    column: str
    kind: Kind = "classification"
    mapping: dict[RawValue, RawValue] = {}
    exclude: list[RawValue] = []
    unit: str = ""
    optional: bool = False

    @field_validator("mapping", mode="before")
    @classmethod
    def _check_codes(cls, given: Any) -> Any:
        # 1 and "1" are two keys of YAML, but one label.
        if isinstance(given, dict):
            codes = [_label(str(code)) for code in given]
            for code in codes:
                if codes.count(code) > 1:
                    raise ValueError(f"{code!r} is mapped twice")
        return given


class Sex(Column):
    """The column of the participants' sex."""

    mapping: dict[RawValue, Literal["male", "female"]]  # type: ignore[assignment]


class Age(Column):
    """The column of the participants' age."""

    kind: Kind = "regression"
    unit: Literal["years", "months"] = "years"


class MeanFD(Column):
    """The column of mean framewise displacement."""

    kind: Kind = "regression"
    unit: Literal["mm"] = "mm"


class Target(Column):
    """A column that can be predicted, with the name of what it measures."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    kind: Kind


class Layout(_Description):
    """What a SIMULATED cohort of this kind looks like. Times and ages are plausible, not data.

    Attributes
    ----------
    path : str
        Path of a scan; ``{participant}``, ``{session}``, ``{run}`` and ``{site}`` are replaced. Its
        ending decides the format.
    participant : str
        Format of a number, such as ``"A{:08d}"``.
    years : list of float
        Youngest and oldest age.
    """

    path: Template
    participant: Annotated[str, Field(pattern=r"^[^{}]*\{:0?[0-9]{0,2}d\}[^{}]*$")]
    t_r: Seconds
    n_frames: Annotated[int, Field(ge=2)]
    years: Annotated[list[float], Field(min_length=2, max_length=2)]
    sites: list[str] = [""]
    sessions: list[str] = [""]
    runs: list[str] = [""]


class Cohort(_Description):
    """A study: where its scans are, its phenotype table, and what can be predicted.

    Attributes
    ----------
    name, description : str
    scans : list of str
        Patterns of paths relative to the folder, or one; the first one that matches any file is used. A scan that only
        a later one matches is left out, and named.
        ``{entity}`` stands for letters and digits, ``{entity:regex}`` for text of another form; an
        entity that occurs twice must be the same text. ``*`` stands for anything within the name
        of a file or folder, ``**/`` for any folders. The ``key-value`` pairs of a BIDS name are
        entities too (``sub`` is called participant, ``ses`` session).
    reader : Reader
    phenotype : Phenotype
        By default that of BIDS.
    run : str
        Template of entities that names the run.
    missing : list
        Raw values that mean "not known", in addition to empty cells, NA, n/a, nan and null.
    site, family, age, sex, mean_fd : Column
        A plain column name will do. Age is in years (or months, with ``unit``), sex is mapped to
        ``male`` and ``female``, mean framewise displacement is in mm. Where the table has no
        value, the site is the entity ``site`` and ``mean_fd`` comes from the motion file beside
        the scan.
    targets : list of Target
        What can be predicted; ``sex`` and ``age`` are short for those columns.
    families : list of list of str
        Participants (``sub-...``) that belong together although no column says so.
    layout : Layout, optional
        For :func:`mnemodyn.data.simulate.simulate_cohort`.
    """

    name: str
    description: str = ""
    scans: Annotated[list[Pattern], Field(min_length=1), BeforeValidator(_as_list)]
    reader: Reader = Reader()
    phenotype: Phenotype = Phenotype()
    run: Template = "{run}"
    missing: list[RawValue] = []
    site: Annotated[Column | None, BeforeValidator(_column_name)] = None
    family: Annotated[Column | None, BeforeValidator(_column_name)] = None
    age: Annotated[Age | None, BeforeValidator(_column_name)] = None
    sex: Sex | None = None
    mean_fd: Annotated[MeanFD | None, BeforeValidator(_column_name)] = None
    targets: list[Target] = []
    families: list[list[str]] = []
    layout: Layout | None = None

    @field_validator("targets", mode="before")
    @classmethod
    def _short_targets(cls, given: Any, info: ValidationInfo) -> Any:
        # Columns are checked before targets, in the order of the fields.
        if not isinstance(given, list):
            return given
        targets = []
        for target in given:
            if target in ("sex", "age"):
                if info.data.get(target) is None:
                    raise ValueError(f"the column {target} is not described")
                target = {"name": target, **info.data[target].model_dump()}
            targets.append(target)
        return targets

    @field_validator("targets")
    @classmethod
    def _check_names(cls, targets: list[Target]) -> list[Target]:
        names = [target.name for target in targets]
        for name in names:
            if name in RESERVED or names.count(name) > 1:
                raise ValueError(f"the name {name!r} is taken")
        return targets

    @property
    def variables(self) -> dict[str, Column]:
        """What is read from the phenotype table: its name in the index -> column."""
        names = ("site", "family", "age", "sex", "mean_fd")
        found = {name: getattr(self, name) for name in names if getattr(self, name)}
        for target in self.targets:
            found[target.name] = target
        return found


def shipped() -> list[str]:
    """Names of the cohorts that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_cohort(source: str | Path) -> Cohort:
    """Read a cohort's description.

    Parameters
    ----------
    source : str or Path
        Name of a shipped cohort (see :func:`shipped`), or a YAML file with the fields of
        :class:`Cohort`.

    Raises
    ------
    DataError
        With the problem ``cohort``: an unknown name, an unknown or missing key, or a value of the
        wrong type. The message names the file and the key.
    """
    path = Path(source)
    if str(source) in shipped():
        path = SHIPPED / f"{source}.yaml"
    elif not path.is_file():
        known = ", ".join(shipped())
        refuse(f"{source} is neither a YAML file nor one of the shipped cohorts: {known}")
    try:
        content = load_yaml(path)
    except (OSError, ValueError) as error:
        refuse(f"{path.name}: {error}")
    if isinstance(content, dict):
        content.setdefault("name", path.stem)
    try:
        return Cohort.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
    # One thing at a time: later ones often follow from the first.
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("missing", "value_error"):
        message = f"{message}, got {reprlib.repr(first['input'])}"
    refuse(": ".join([path.name, *map(str, first["loc"]), message]))


class Index(Collection):
    """The usable scans of a cohort's folder, read when asked for, and what else the folder holds.

    Attributes
    ----------
    description : Cohort
    found : DataFrame
        One row per file that matched, with what is known of it.
    table : DataFrame
        One row per usable scan: ``path`` (relative to the folder), ``participant_id``,
        ``session``, ``run``, ``site``, ``family``, ``age`` (years), ``sex``, ``mean_fd`` (mm),
        ``n_frames``, ``t_r`` (seconds), ``n_parcels``, ``n_constant`` (constant parcels),
        ``phenotype`` (whether it has a row), and one column per target.
    excluded : DataFrame
        ``file``, ``participant_id``, ``problem``, ``message`` and ``left_out_of``: ``all`` if the
        scan is not in the table, ``targets`` if it is there without labels, for pretraining only.
    notes : list of str
        What the table of phenotypes lacks, and how its identifiers differ from those of the scans.
    """

    folder: Path

    def __init__(
        self,
        description: Cohort,
        folder: Path,
        found: pd.DataFrame,
        table: pd.DataFrame,
        excluded: pd.DataFrame,
        notes: list[str],
    ):
        super().__init__(
            [],
            table,
            excluded,
            name=data_name(description.name),
            cohort=description.name,
            simulated=(folder / SIMULATED).is_file(),
            folder=folder,
        )
        self.description = description
        self.found = found
        self._content = dict(zip(found.path, found.content, strict=True))
        self.notes = notes

    def _scan(self, i: int) -> Scan:
        """Read scan `i`; a DataError if the file has changed and can no longer be used."""
        row = self.table.iloc[i]
        path = self.folder / row["path"]
        scan = self.description.reader.load(path, row["participant_id"], float(row["t_r"]))
        return replace(scan, session=row["session"], run=row["run"])

    def content(self, i: int) -> str:
        """Digest of everything that was read of scan `i` when the folder was indexed."""
        return self._content[self.table.path.iloc[i]]

    def summary(self) -> dict[str, Any]:
        """Counts and distributions, ready for JSON; participants and sites are those of all files found."""
        table = self.table
        targets = {}
        for target in self.description.targets:
            values = table[target.name].dropna()
            targets[target.name] = _counts(values)
            if target.kind == "regression":
                targets[target.name] = values.describe().dropna().round(2).to_dict()
        return {
            "cohort": self.cohort,
            "simulated": self.simulated,
            "n_scans": len(self.found),
            "n_participants": self.found.participant_id.nunique(),
            "n_sites": self.found.site[self.found.site != ""].nunique(),
            "n_usable": len(table),
            "n_with_phenotype": int(table.phenotype.sum()),
            "n_frames": _counts(table.n_frames),
            "n_parcels": _counts(table.n_parcels),
            "t_r": _counts(table.t_r.map("{:g}".format)),
            "targets": targets,
            "problems": _counts(self.excluded.problem),
            "notes": self.notes,
            "excluded": self.excluded.to_dict("records"),
        }

    def __str__(self) -> str:
        found = self.summary()
        found.pop("excluded")
        notes = found.pop("notes")
        lines = ["SIMULATED"] if found.pop("simulated") else []
        found.update(found.pop("targets"))
        found["left out"] = found.pop("problems")
        for name, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} ({number:g})" for key, number in value.items())
            lines.append(f"{name}: {value}")
        examples = self.excluded.drop_duplicates("problem").message
        return "\n".join([*lines, *notes, *examples])


def _counts(values: pd.Series) -> dict[str, int]:
    """How often each value occurs, in the order of the values."""
    return values.value_counts().sort_index().rename(index=str).to_dict()


def index(
    cohort: Cohort | str | Path,
    folder: str | Path,
    *,
    t_r: float | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Index:
    """Find a cohort's scans in a folder, match them with their phenotypes, and read each once.

    A scan that cannot be used is no error: it is listed in ``excluded`` with the reason.

    Parameters
    ----------
    cohort : Cohort, str or Path
        A description, or what :func:`load_cohort` takes.
    folder : str or Path
    t_r : float, optional
        Repetition time in seconds for files that state none, in place of the description's.
    workers : int
        Number of processes that read.
    progress : callable, optional
        Called with the number of scans read and their total.
    **settings
        Others of :class:`Reader`, in place of the description's.

    Raises
    ------
    DataError
        If the folder or a column of the phenotype table is missing, if no file matches, or if a
        column holds values that its description does not know; the message shows them with their
        counts.
    """
    if not isinstance(cohort, Cohort):
        cohort = load_cohort(cohort)
    # What is given to a call wins over the description.
    if t_r is not None:
        settings.update(t_r=t_r, t_r_by_site={})
    reader = cohort.reader.model_copy(update=settings)
    cohort = cohort.model_copy(update={"reader": reader})
    folder = Path(folder)
    found, named, left_out = _find(cohort, folder)
    raw = _raw_values(cohort, folder, named)
    unlabelled = raw.unlabelled
    for name, column in cohort.variables.items():
        if name != "site":
            found[name] = _values(name, column, raw, cohort)
    found["site"] = _sites(cohort.site, raw.cells, named)
    _drop_contradictory_sexes(cohort, found, unlabelled)
    found["family"] = _families(cohort, found)

    # Every scan is read once, in `workers` processes.
    jobs = []
    for path, who, site in zip(found.path, found.participant_id, found.site, strict=True):
        t_r = cohort.reader.t_r_by_site.get(site, cohort.reader.t_r)
        jobs.append(delayed(_inspect)(cohort.reader, folder / path, who, t_r))
    results = []
    for result in Parallel(max(1, workers), return_as="generator")(jobs):
        results.append(result)
        if progress:
            progress(len(results), len(jobs))
    read = pd.DataFrame(results, columns=READ)
    problems = read.problem.dropna().to_dict()
    found = found.join(read)
    _mark_other_parcels(found, problems)
    _mark_duplicates(found, problems)
    # The table's motion wins over the one that was measured beside the scan.
    measured = found.measured_fd.astype(float)
    found["mean_fd"] = found.get("mean_fd", measured).fillna(measured)
    found["phenotype"] = ~found.index.isin(list(unlabelled))

    # A target called sex or age is the column of that name.
    columns = [*TABLE, *(target.name for target in cohort.targets if target.name not in TABLE)]
    table = found.drop(index=list(problems)).reindex(columns=columns).reset_index(drop=True)
    table = table.astype({"n_frames": int, "n_parcels": int, "n_constant": int})
    excluded = _excluded(found, problems, unlabelled, left_out)
    return Index(cohort, folder, found, table, excluded, raw.notes)


def _excluded(
    found: pd.DataFrame, problems: Reasons, unlabelled: Reasons, left_out: list[dict[str, str]]
) -> pd.DataFrame:
    """What is left out of the table, and of the targets; one scan can be listed twice."""
    rows = [(row["file"], "", row["problem"], row["message"], "all") for row in left_out]
    for scope, reasons in (("all", problems), ("targets", unlabelled)):
        for i, (problem, message) in reasons.items():
            # The whole path, because many cohorts give every participant's file the same name.
            path = found.path[i]
            rows.append((path, found.participant_id[i], problem, path + message, scope))
    columns = ["file", "participant_id", "problem", "message", "left_out_of"]
    return pd.DataFrame(sorted(rows), columns=columns)


def _find(
    cohort: Cohort, folder: Path
) -> tuple[pd.DataFrame, list[Entities], list[dict[str, str]]]:
    """The scans that match, the entities of each, and a row for every file or folder that could not be used."""
    if not folder.is_dir():
        refuse(f"{folder}: no such folder", "no-folder")
    walked = walk(folder)
    files = [path for path in walked.files if not is_no_scan(path.name)]
    scans: dict[Path, Entities] = {}
    left_out = []
    # Patterns are alternatives: the same scan may be there in several formats.
    places = [path.relative_to(folder).as_posix() for path in files]
    for pattern, matches in zip(cohort.scans, _matches(cohort, places), strict=True):
        there = {_scan_key(entity) for entity in scans.values()}
        for i, groups in matches:
            path = files[i]
            if path in scans:
                continue
            try:
                entity = _entities(groups, path, pattern)
                if not there:
                    scans[path] = entity
                elif _scan_key(entity) not in there:
                    refuse(
                        f"{path.name}: only {pattern!r} matches it, and others match the first",
                        "other-pattern",
                    )
            except DataError as error:
                row = {"file": str(path), "problem": error.problem, "message": str(error)}
                left_out.append(row)
    chosen = choose_files(list(scans), walked.unread)
    left_out += chosen.left_out
    for row in left_out:
        row["file"] = Path(row["file"]).relative_to(folder).as_posix()
    if not chosen.files:
        why = "".join(f"; {row['message']}" for row in left_out[:1])
        shown = f"none of its {len(files)} files {[path.name for path in files[:1]]}"
        remedy = f"correct the scans of {cohort.name}"
        refuse(f"{folder}: {shown} matches {cohort.scans}{why}; {remedy}", "no-scans")
    rows = []
    for path in chosen.files:
        entity = scans[path]
        who = entity["participant"]
        place = path.relative_to(folder).as_posix()
        if not who:
            refuse(f"{place}: no participant in its name", "participant")
        rows.append((place, f"sub-{who}", entity["session"], cohort.run.format_map(entity)))
    found = pd.DataFrame(rows, columns=["path", "participant_id", "session", "run"])
    return found, [scans[path] for path in chosen.files], left_out


def _matches(cohort: Cohort, paths: list[str]) -> list[list[tuple[int, dict[str, str | None]]]]:
    """For every pattern the numbers of the paths that match it, and what its entities stand for."""
    expressions = [_pattern(pattern) for pattern in cohort.scans]
    # A regular expression such as (x+x+)+y can take years, and nothing within this process could stop it.
    seconds = 10 + len(paths) / 1000
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(MATCH)],
            input=json.dumps([expressions, paths]),
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds,
        )
    except subprocess.SubprocessError:
        shown = f"{cohort.scans} could not be matched within {seconds:.0f} s"
        refuse(f"scans of {cohort.name}: {shown}; write simpler regular expressions")
    return json.loads(done.stdout)


def _scan_key(entity: Entities) -> tuple[str, ...]:
    """What a scan has in common with its copies in other formats."""
    return tuple(entity[name] for name in ("participant", "session", "run", "dir", "task"))


def _entities(groups: dict[str, str | None], path: Path, pattern: str) -> Entities:
    """Entities of a path: those of its BIDS name and those of the pattern; "" for any other."""
    found = defaultdict(str, entities(path.name))
    # The pattern's own entities win, under the names that descriptions use.
    found["participant"] = found["sub"]
    found["session"] = found["ses"]
    found.update({name: text for name, text in groups.items() if text is not None})
    # So does the form that a description gives to an identifier; any other is not to be cut.
    if "{participant:" not in pattern:
        who = participant(path).removeprefix("sub-")
        if who.startswith(found["participant"]):
            found["participant"] = who
    return found


def _decoded(file: Path) -> str:
    """The text of a table; UTF-16 is known by its first bytes, anything but UTF-8 and UTF-16 is refused."""
    content = file.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"line {line} holds {content[error.start : error.end]!r}, which is no {encoding.upper()}"
        refuse(f"{found}; save the table as text in UTF-8", "encoding")
    if "\0" in text:
        refuse("the file holds zero bytes; save the table as text in UTF-8", "encoding")
    return text.lstrip("\ufeff")


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line of a table, the header first; a line with fewer or more cells is refused."""
    separator = "," if file.suffix.lower() == ".csv" else "\t"
    reader = csv.reader(io.StringIO(_decoded(file), newline=None), delimiter=separator, strict=True)
    header: list[str] = []
    n_cells = line = 0
    try:
        for row in reader:
            line, last = reader.line_num, line
            if not "".join(row).strip():
                continue
            # A quote without its partner makes one cell of several rows.
            if line > last + 1 and any("\n" in cell and separator in cell for cell in row):
                found = f"a quoted cell goes on over rows, up to line {line}"
                refuse(f"{found}: {_short(row)}", "quotes")
            if header:
                n_cells = n_cells or max(len(row), len(header))
                _check_row(f"line {line}", row, header, n_cells)
            else:
                while not row[-1].strip():
                    row.pop()
                header = row = [name.strip() for name in row]
            yield line, row
    except csv.Error as error:
        refuse(f"line {reader.line_num}: wrong quotes ({error})", "quotes")


def _check_row(line: str, row: list[str], header: list[str], n_cells: int) -> None:
    """Refuse a row in which a cell may stand below another's name; all may end in the same empty cells more."""
    if len(row) != n_cells or "".join(row[len(header) :]).strip():
        found = f"{line} has {len(row)} cells, the header {len(header)}: {_short(row)}"
        remedy = "a cell that holds the separator needs quotes, one without a value n/a"
        refuse(f"{found}; {remedy}", "columns")
    # The first may be without a name, as pandas leaves it above its index.
    for name, cell in zip(header[1:], row[1:], strict=False):
        if not name and cell.strip():
            refuse(f"{line} has {cell!r} in a column without a name: {_short(row)}", "columns")


def _short(cells: list[str]) -> str:
    """Some cells of a row; of a table with the wrong separator, the first cell is the whole row."""
    return str([cell[:100] for cell in cells[:10]])


def _place(name: str, header: list[str]) -> int | None:
    """Where a column stands: the one of this very name, or else the one that differs in capitals and blanks."""

    def plain(text: str) -> str:
        return re.sub(r"\s", "", text).casefold()

    places = [i for i, found in enumerate(header) if found == name]
    if not places:
        places = [i for i, found in enumerate(header) if plain(found) == plain(name)]
    if len(places) > 1:
        several = ", ".join(f"{header[i]!r} ({i + 1})" for i in places)
        refuse(f"several columns could be {name!r}: {several}; rename all but one", "columns")
    return places[0] if places else None


def _read_table(cohort: Cohort, file: Path) -> tuple[pd.DataFrame, list[str]]:
    """The described columns as text by line, "" for what is missing; and notes on optional ones that are absent."""
    required = dict.fromkeys(cohort.phenotype.match, True)
    for column in cohort.variables.values():
        required[column.column] = required.get(column.column, False) or not column.optional
    notes = []
    with reading(file, "table"):
        rows = _rows(file)
        header = next(rows, (0, []))[1]
        places = {name: _place(name, header) for name in required}
        for name, place in places.items():
            if place is None:
                cells = "commas" if file.suffix.lower() == ".csv" else "tabs"
                absent = f"no column {name!r}; it has {_short(header)}, separated by {cells}"
                if required[name]:
                    refuse(absent, "no-phenotype")
                notes.append(f"{file.name}: {absent}")
        table = {}
        for line, row in rows:
            table[line] = ["" if i is None else _label(row[i]) for i in places.values()]
    # Everything is text up to here, so that 007 is an identifier and 1.0 is the code 1.
    content = pd.DataFrame.from_dict(table, orient="index", columns=list(places), dtype=object)
    missing = content.isin(cohort.missing) | content.map(str.lower).isin(MISSING_WORDS)
    return content.mask(missing, ""), notes


def _key(value: str) -> str:
    """An identifier to match by: no ``sub-`` or ``ses-`` and no punctuation."""
    return re.sub(r"^(sub|ses)-|[^A-Za-z0-9]", "", _label(value))


def _identifier(parts: Iterable[str]) -> str:
    """What rows and scans are matched by, without ``sub-`` or ``ses-``; "" if a part is missing."""
    words = [re.sub(r"^(sub|ses)-", "", _label(part)) for part in parts]
    return "/".join(words) if all(words) else ""


def _number(identifier: str) -> str:
    """An identifier without punctuation and leading zeros, as other tables may have it: A_1 is A1, 007 is 7."""
    return re.sub(r"\b0+(?=[0-9]+\b)", "", re.sub(r"[^A-Za-z0-9/]", "", identifier))


class Raw(NamedTuple):
    """What the phenotype table has of every scan: cells ("" for none), their line, and why there are none."""

    cells: pd.DataFrame
    lines: pd.Series
    unlabelled: Reasons
    notes: list[str]


def _raw_values(cohort: Cohort, folder: Path, named: list[Entities]) -> Raw:
    """The phenotype table's cells of each scan."""
    needed = list(dict.fromkeys(column.column for column in cohort.variables.values()))
    table = cohort.phenotype
    file = folder / table.file
    if not present(file):
        remedy = "put it there, or give its place in a cohort's YAML: phenotype: {file: ...}"
        reason = ("no-phenotype", f": there is no {table.file} in the folder; {remedy}")
        cells = pd.DataFrame("", index=range(len(named)), columns=needed)
        return Raw(cells, cells.index.to_series(), dict.fromkeys(cells.index, reason), [])

    content, notes = _read_table(cohort, file)
    parts = content[list(table.match)].itertuples(index=False)
    content = content[needed].assign(**{KEY: list(map(_identifier, parts))})
    nameless = content.index[content[KEY] == ""]
    if len(nameless):
        notes.append(f"{file.name}: {len(nameless)} rows name nobody, such as line {nameless[0]}")
    content = content.drop(index=nameless)
    wanted = [
        _identifier(form.format_map(entity) for form in table.match.values()) for entity in named
    ]
    keys = _same_spelling(wanted, content, notes)
    content = content.drop_duplicates()  # repeated rows do no harm
    raw = content.assign(**{LINE: content.index}).drop_duplicates(KEY, keep=False).set_index(KEY)
    unlabelled = {}
    lines = content.index.groupby(content[KEY].map(_number))
    for i in np.flatnonzero(~pd.Index(keys).isin(raw.index)).tolist():
        problem, message = "no-phenotype", f"no row of {keys[i]!r}"
        alike = lines.get(_number(keys[i]))
        if alike is not None:
            problem, message = _why_none(content.loc[alike], keys[i])
        unlabelled[i] = (problem, f": {file.name} has {message}")
    raw = raw.reindex(keys).reset_index(drop=True)
    return Raw(raw[needed].fillna(""), raw[LINE], unlabelled, notes)


def _same_spelling(wanted: list[str], content: pd.DataFrame, notes: list[str]) -> list[str]:
    """Give scans and rows (in place) one key where identifiers differ in punctuation and leading zeros only."""
    spellings = defaultdict(set)
    for name in wanted:
        spellings[_number(name)].add(name)

    def key(name: str) -> str:
        # 007 is 7, unless there are scans of both.
        number = _number(name)
        return name if len(spellings[number]) > 1 else number

    names = set(content[KEY])
    content[KEY] = content[KEY].map(key)
    keys = set(content[KEY])
    respelled = sorted({name for name in wanted if name not in names and key(name) in keys})
    if respelled:
        how = f"without zeros and punctuation, such as {respelled[0]}"
        notes.append(f"{len(respelled)} identifiers are matched {how}")
    return [key(name) for name in wanted]


def _why_none(alike: pd.DataFrame, key: str) -> tuple[str, str]:
    """Why a scan has no row, by the rows of this number: its problem and a message."""
    rows = alike[alike[KEY] == key]
    lines = ", ".join(map(str, alike.index))
    if rows.empty:
        message = f"no row of {key!r}; line {lines} differs in zeros or punctuation, and may be another person's"
        return "ambiguous-identifier", message
    differ = ", ".join(rows.columns[rows.nunique() > 1])
    return "contradictory-phenotype", f"rows of {key!r}, lines {lines}, that differ in {differ}"


def _values(name: str, column: Column, raw: Raw, cohort: Cohort) -> pd.Series:
    """Labels, or numbers with ages in years; missing where the cell is empty or excluded."""
    text = raw.cells[column.column]
    text = text.mask(text.isin(column.exclude), "")
    given = text != ""
    if column.kind == "regression":
        values, allowed = _numbers(name, column, text.where(given, None))
        remedy = "write decimals with a point"
    else:
        values = text.map(column.mapping) if column.mapping else text.mask(text.str.fullmatch(CODE))
        values = values.astype(object).where(given, None)
        allowed = f"one of {[*column.mapping, *column.exclude]}" if column.mapping else "labels"
        remedy = "map them"
    unknown = text[given & values.isna()]
    if len(unknown):
        counts = unknown.value_counts().head(10).items()
        shown = ", ".join(f"{value!r} ({n})" for value, n in counts)
        place = f"line {raw.lines[unknown.index[0]]:.0f} of {cohort.phenotype.file}"
        found = f"column {column.column!r} must hold {allowed}, found {shown}, first in {place}"
        remedy = f"{remedy}, or list them under exclude or missing"
        refuse(f"{name} of {cohort.name}: {found}; {remedy}", "unexpected-label")
    return values


def _numbers(name: str, column: Column, text: pd.Series) -> tuple[pd.Series, str]:
    """The numbers of a column, missing where there is none that can be right; and what is right, in words."""
    numbers = pd.to_numeric(text, errors="coerce")
    values = numbers.where(np.isfinite(numbers)) / PER_YEAR.get(column.unit, 1.0)
    if name == "age":
        # Months that are taken for years would otherwise go unnoticed.
        allowed = f"numbers of {column.unit}, 0 to 120 years of age"
        return values.where((values >= 0) & (values <= 120)), allowed
    # The same number is a score where others are negative as well.
    code = text.astype(str).str.fullmatch(CODE)
    if name == "mean_fd" or (values[~code].dropna() >= 0).all():
        return values.where(values >= 0), "numbers, none negative"
    return values, "numbers"


def _sites(column: Column | None, raw: pd.DataFrame, named: list[Entities]) -> pd.Series:
    """Site of each scan: that of the table, else the entity ``site``; "" where not known."""
    in_name = pd.Series([entity["site"] for entity in named], index=raw.index)
    if not column:
        return in_name
    site = raw[column.column]
    return site.where(site != "", in_name).map(lambda name: column.mapping.get(name, name))


def _drop_contradictory_sexes(cohort: Cohort, found: pd.DataFrame, unlabelled: Reasons) -> None:
    """Remove all labels of a participant who has two sexes.

    Age and other variables may differ between sessions; sex shows that rows were mixed up.
    """
    if not cohort.sex:
        return
    contradictory = found.groupby("participant_id").sex.transform("nunique") > 1
    labels = [name for name in cohort.variables if name not in ("site", "family")]
    found.loc[contradictory, labels] = None
    reason = ("contradictory-phenotype", ": the participant's rows name more than one sex")
    unlabelled.update(dict.fromkeys(found.index[contradictory], reason))


def _families(cohort: Cohort, found: pd.DataFrame) -> list[str]:
    """A label per scan, equal for participants who are joined directly or through others."""
    # Zeros are spelled as freely here as in tables, and a family too many does no harm.
    spelled = defaultdict(list)
    for who in found.participant_id.unique():
        spelled[_number(_identifier([who]))].append(who)
    links = []
    for group in cohort.families:
        # Somebody without a scan joins relatives too.
        numbers = [_number(_identifier([name])) for name in group]
        links.append([who for n in numbers for who in spelled.get(n, [f"sub-{n}"])])
    if cohort.family:
        for name, members in found.groupby("family"):
            links.append([f"family-{name}", *members.participant_id])
    # A link joins the groups of all its members, which then share one set.
    group_of = {who: {who} for who in found.participant_id}
    for link in links:
        joined = set().union(*(group_of.get(member, {member}) for member in link))
        for member in joined:
            group_of[member] = joined
    # "family-" sorts before "sub-", so that a family with a name is called by it.
    return [min(group_of[who]) for who in found.participant_id]


# What is read of each scan: either its problem or the rest.
READ = (
    "problem",
    "n_frames",
    "t_r",
    "n_parcels",
    "n_constant",
    "parcels",
    "series",
    "measured_fd",
    "content",
)


def _inspect(reader: Reader, path: Path, participant_id: str, t_r: float | None) -> dict[str, Any]:
    """What the index needs of one scan, or the reason why it cannot be used."""
    try:
        scan = reader.load(path, participant_id, t_r)
    except DataError as error:
        return {"problem": (error.problem, str(error).removeprefix(path.name))}
    except OSError as error:
        return {"problem": ("unreadable", f": {error.strerror}")}
    return {
        "n_frames": scan.n_frames,
        "t_r": scan.t_r,
        "n_parcels": len(scan.parcels),
        "n_constant": int(scan.constant.sum()),
        "parcels": digest(scan.parcels),
        "series": digest(scan.values),
        "measured_fd": scan.mean_fd,
        "content": fingerprint([scan]),
    }


def _mark_other_parcels(found: pd.DataFrame, problems: Reasons) -> None:
    """Give a problem to scans whose parcels are not those of most scans."""
    usable = found.drop(index=list(problems))
    if usable.empty:
        return
    # The most frequent parcels are right: a cohort has one atlas.
    usual = usable[usable.parcels == usable.parcels.mode()[0]].iloc[0]
    for i, row in usable[usable.parcels != usual.parcels].iterrows():
        problem = "parcel-order" if row.n_parcels == usual.n_parcels else "parcel-count"
        message = f": {row.n_parcels:g} parcels, not the {usual.n_parcels:g} of most scans in order"
        remedy = "of several atlases, name one in the cohort's scans, as in *_seg-NAME_*"
        problems[i] = (problem, f"{message}; {remedy}")


def _mark_duplicates(found: pd.DataFrame, problems: Reasons) -> None:
    """Give a problem to series that are there more than once."""
    for _, copies in found.drop(index=list(problems)).groupby("series"):
        # One participant's first copy can stay. If two people have it, nobody knows whose it is.
        kept = 1 if copies.participant_id.nunique() == 1 else 0
        for i in copies.index[kept:]:
            other = copies.path.drop(i).iloc[0]
            problems[i] = ("duplicate-series", f": the same series as {other}")
