"""Cohorts: the YAML description of a study, and the index of a folder of scans that follows it."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

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

from mnemodyn.data.formats import entities, files_below, reading, refuse
from mnemodyn.data.scans import (
    Collection,
    DataError,
    Scan,
    data_name,
    fingerprint,
    load_scan,
)
from mnemodyn.files import digest, read_yaml

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
PER_YEAR = {"years": 1.0, "months": 12.0}
MISSING_WORDS = ("", "na", "n/a", "nan", "null")
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


def _label(value: Any) -> str:
    """A raw value as text, whole numbers without decimals: 1, "1" and 1.0 are the same label."""
    text = str(value).strip()
    if re.fullmatch(r"-?\d+\.0+", text):
        text = text.split(".")[0]
    return text


RawValue = Annotated[str, BeforeValidator(_label)]
Seconds = Annotated[float, Field(gt=0, lt=100)]
Kind = Literal["classification", "regression"]


def _pattern(pattern: str) -> re.Pattern[str]:
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
                expression += f"(?P<{name}>{form or '[A-Za-z0-9]+'})"
        else:
            expression += re.escape(piece)
    return re.compile(expression)


def _check_pattern(pattern: str) -> str:
    try:
        _pattern(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no valid pattern ({error})") from None
    return pattern


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
    match: Annotated[dict[str, str], Field(min_length=1)] = {"participant_id": "{participant}"}


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

    path: str
    participant: str
    t_r: Seconds
    n_frames: int
    years: list[float]
    sites: list[str] = [""]
    sessions: list[str] = [""]
    runs: list[str] = [""]


class Cohort(_Description):
    """A study: where its scans are, its phenotype table, and what can be predicted.

    Attributes
    ----------
    name, description : str
    scans : list of str
        Patterns of paths relative to the folder; the first one that matches any file is used.
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
    scans: Annotated[list[Annotated[str, AfterValidator(_check_pattern)]], Field(min_length=1)]
    reader: Reader = Reader()
    phenotype: Phenotype = Phenotype()
    run: str = "{run}"
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
        content = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
        message = f"{message}, got {first['input']!r}"
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
    """

    folder: Path

    def __init__(
        self,
        description: Cohort,
        folder: Path,
        found: pd.DataFrame,
        table: pd.DataFrame,
        excluded: pd.DataFrame,
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
            "excluded": self.excluded.to_dict("records"),
        }

    def __str__(self) -> str:
        found = self.summary()
        found.pop("excluded")
        lines = ["SIMULATED"] if found.pop("simulated") else []
        found.update(found.pop("targets"))
        found["left out"] = found.pop("problems")
        for name, value in found.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} ({number:g})" for key, number in value.items())
            lines.append(f"{name}: {value}")
        examples = self.excluded.drop_duplicates("problem").message
        return "\n".join([*lines, *examples])


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
    found, named = _find(cohort, folder)
    raw, unlabelled = _raw_values(cohort, folder, named)
    for name, column in cohort.variables.items():
        if name != "site":
            found[name] = _values(name, column, raw[column.column], cohort.name)
    found["site"] = _sites(cohort.site, raw, named)
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
    excluded = _excluded(found, problems, unlabelled)
    return Index(cohort, folder, found, table, excluded)


def _excluded(found: pd.DataFrame, problems: Reasons, unlabelled: Reasons) -> pd.DataFrame:
    """What is left out of the table, and of the targets; one scan can be listed twice."""
    rows = []
    for scope, reasons in (("all", problems), ("targets", unlabelled)):
        for i, (problem, message) in reasons.items():
            # The whole path, because many cohorts give every participant's file the same name.
            path = found.path[i]
            rows.append((path, found.participant_id[i], problem, path + message, scope))
    columns = ["file", "participant_id", "problem", "message", "left_out_of"]
    return pd.DataFrame(sorted(rows), columns=columns)


def _find(cohort: Cohort, folder: Path) -> tuple[pd.DataFrame, list[Entities]]:
    """The files that match the first pattern with a match, and the entities of each."""
    if not folder.is_dir():
        refuse(f"{folder}: no such folder", "no-folder")
    paths = sorted(path.relative_to(folder).as_posix() for path in files_below(folder))
    matches: list[re.Match[str]] = []
    # Patterns are alternatives: the same scan may be there in several formats.
    for pattern in cohort.scans:
        if not matches:
            found = map(_pattern(pattern).fullmatch, paths)
            matches = [match for match in found if match]
    if not matches:
        files = f"none of its {len(paths)} files {paths[:1]} matches {cohort.scans}"
        refuse(f"{folder}: {files}; correct the scans of {cohort.name}", "no-scans")
    named = [_entities(match) for match in matches]
    rows = []
    for match, entity in zip(matches, named, strict=True):
        who = re.sub(r"[^A-Za-z0-9]", "", entity["participant"])
        if not who:
            refuse(f"{match[0]}: no participant in its name", "participant")
        rows.append((match[0], f"sub-{who}", entity["session"], cohort.run.format_map(entity)))
    return pd.DataFrame(rows, columns=["path", "participant_id", "session", "run"]), named


def _entities(match: re.Match[str]) -> Entities:
    """Entities of a path: those of its BIDS name and those of the pattern; "" for any other."""
    found = defaultdict(str, entities(match[0].rsplit("/", 1)[-1]))
    # The pattern's own entities win, under the names that descriptions use.
    found["participant"] = found["sub"]
    found["session"] = found["ses"]
    found.update(match.groupdict())
    return found


def _read_table(cohort: Cohort, file: Path) -> pd.DataFrame:
    """The cells of a phenotype table as text, "" for what is missing."""
    separator = "," if file.suffix == ".csv" else "\t"
    with reading(file, "table"):
        content = pd.read_csv(
            file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    columns = [column.column for column in cohort.variables.values() if not column.optional]
    for name in [*cohort.phenotype.match, *columns]:
        if name not in content:
            has = f"it has {list(content)[:30]} (separator {separator!r})"
            refuse(f"{file.name}: no column {name!r}; {has}", "no-phenotype")
    # Everything is text up to here, so that 007 is an identifier and 1.0 is the code 1.
    content = content.map(_label)
    missing = content.isin(cohort.missing) | content.map(str.lower).isin(MISSING_WORDS)
    return content.mask(missing, "")


def _key(value: str) -> str:
    """An identifier to match by: no ``sub-`` or ``ses-``, no punctuation, no leading zeros."""
    text = re.sub(r"^(sub|ses)-|[^A-Za-z0-9]", "", _label(value))
    return str(int(text)) if text.isdecimal() else text


def _raw_values(
    cohort: Cohort, folder: Path, named: list[Entities]
) -> tuple[pd.DataFrame, Reasons]:
    """The phenotype table's cells of each scan, "" where it has none, and why."""
    needed = list(dict.fromkeys(column.column for column in cohort.variables.values()))
    table = cohort.phenotype
    if not (folder / table.file).is_file():
        remedy = "put it there, or give its place in a cohort's YAML: phenotype: {file: ...}"
        reason = ("no-phenotype", f": there is no {table.file} in the folder; {remedy}")
        raw = pd.DataFrame("", index=range(len(named)), columns=needed)
        return raw, dict.fromkeys(raw.index, reason)

    content = _read_table(cohort, folder / table.file)
    # A row and a scan belong together if they have the same key.
    keys = content[list(table.match)].map(_key)
    content = content.reindex(columns=needed, fill_value="")
    content["key"] = keys.agg(" ".join, axis=1)
    content = content[keys.ne("").all(axis=1)].drop_duplicates()  # repeated rows do no harm
    raw = content.drop_duplicates("key", keep=False).set_index("key")
    wanted = []
    for entity in named:
        wanted.append(" ".join(_key(form.format_map(entity)) for form in table.match.values()))
    unlabelled = {}
    for i in np.flatnonzero(~pd.Index(wanted).isin(raw.index)).tolist():
        rows = content[content.key == wanted[i]]
        if len(rows):
            differ = ", ".join(rows.columns[rows.nunique() > 1])
            message = f": its rows of {table.file} differ in {differ}"
            unlabelled[i] = ("contradictory-phenotype", message)
        else:
            unlabelled[i] = ("no-phenotype", f": no row of {table.file} for {wanted[i]}")
    return raw.reindex(wanted, fill_value="").reset_index(drop=True), unlabelled


def _values(name: str, column: Column, text: pd.Series, cohort: str) -> pd.Series:
    """Labels, or numbers with ages in years; missing where the cell is empty or excluded."""
    text = text.mask(text.isin(column.exclude), "")
    given = text != ""
    if column.kind == "regression":
        numbers = pd.to_numeric(text.where(given, None), errors="coerce")
        values = numbers.where(np.isfinite(numbers)) / PER_YEAR.get(column.unit, 1.0)
        allowed = "numbers"
        if name == "age":
            # Months that are taken for years would otherwise go unnoticed.
            values = values.where((values >= 0) & (values <= 120))
            allowed = f"numbers of {column.unit}, 0 to 120 years of age"
    else:
        values = text.map(column.mapping) if column.mapping else text
        values = values.astype(object).where(given, None)
        allowed = f"one of {[*column.mapping, *column.exclude]}"
    unknown = text[given & values.isna()]
    if len(unknown):
        shown = ", ".join(f"{value!r} ({n})" for value, n in unknown.value_counts().items())
        message = f"{name} of {cohort}: column {column.column!r} must hold {allowed}, found {shown}"
        refuse(f"{message}; map them, or list them under exclude or missing", "unexpected-label")
    return values


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
    links = [list(group) for group in cohort.families]
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
