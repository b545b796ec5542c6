"""SIMULATED cohorts: the files and tables of a real one, with planted effects of known size."""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from nibabel.cifti2 import Cifti2Image, ScalarAxis, SeriesAxis
from scipy.linalg import expm, logm, solve_discrete_lyapunov

from mnemodyn.data import formats
from mnemodyn.data.cohorts import PER_YEAR, SIMULATED, Cohort, Column, Layout, load_cohort
from mnemodyn.data.formats import refuse
from mnemodyn.data.scans import load_hcp7
from mnemodyn.files import locked, write_bytes, write_json, write_text

__all__ = ["linear_process", "simulate_cohort"]

EDGE_SD = 0.06  # standard deviation of a planted edge between persons, in units of correlation
REACH = 4.0  # scores are cut off at +-REACH, so that every covariance is positive definite
MISSING = 0.05  # share of labels that are missing
CHUNK = 64  # participants simulated at a time
UNFINISHED = "unfinished"  # in simulated.json until everything is written
# What is wrong with the participants that are added: a word each.
FAULTS = (
    "truncated",
    "nan",
    "constant-parcels",
    "duplicate-series",
    "duplicate-series",
    "no-phenotype",
)


class Variable(NamedTuple):
    """A variable of all people: values, z-scores, and in words what one unit of z is."""

    values: Any
    z: np.ndarray
    per: str


def linear_process() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The VAR(1) that ridge regression fits to the seven HCP scans, as ``dx = -K x dt + noise``.

    Returns
    -------
    K, S : ndarray, shape (94, 94)
        K in 1/s, and the stationary covariance, which is a correlation.
    parcels : tuple of str

    Raises
    ------
    DataError
        If the package with the scans is missing.
    """
    scans = load_hcp7()
    z = [(scan.values - scan.values.mean(0)) / scan.values.std(0) for scan in scans]
    past = np.concatenate([x[:-1] for x in z]).astype(float)
    now = np.concatenate([x[1:] for x in z]).astype(float)
    n = past.shape[1]
    # Parcels are correlated, and the regression ill-conditioned without a ridge.
    a = np.linalg.solve(past.T @ past + 0.01 * len(past) * np.eye(n), past.T @ now).T
    s = solve_discrete_lyapunov(a, np.cov((now - past @ a.T).T))
    k = -np.real(logm(a)) / scans[0].t_r
    scale = np.sqrt(np.diag(s))
    return k * (scale[None] / scale[:, None]), s / np.outer(scale, scale), scans[0].parcels


def _root(matrix: np.ndarray, power: float = 0.5) -> np.ndarray:
    """A power of symmetric matrices, (..., parcel, parcel)."""
    values, vectors = np.linalg.eigh(matrix)
    powers = np.maximum(values, 1e-9)[..., None, :] ** power
    return (vectors * powers) @ np.swapaxes(vectors, -1, -2)


def _sample(
    k: np.ndarray, s: np.ndarray, t_r: float, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Series of shape (scan, time, parcel), sampled every `t_r` seconds exactly."""
    n_scans, n_frames = shape
    step = expm(-k * t_r).T
    # What keeps the covariance at `s`: the discretisation is exact, not Euler's.
    noise = rng.standard_normal((n_frames, n_scans, len(s))) @ _root(s - step.T @ s @ step)
    x = np.empty((n_frames, n_scans, len(s)))
    x[0] = rng.standard_normal((n_scans, len(s))) @ _root(s)
    for t in range(1, n_frames):
        x[t] = x[t - 1] @ step + noise[t]
    return x.swapaxes(0, 1)


def _covariances(s: np.ndarray, blocks: list[np.ndarray], strength: np.ndarray) -> np.ndarray:
    """Correlations, (person, parcel, parcel), with edges in block i raised by `strength`.

    An edge lies EDGE_SD * strength[:, i] above its base. The base is half of `s`, and within the
    blocks REACH * EDGE_SD more: what is added is never negative, so that the least eigenvalue is
    at least 0.5 - 2 * REACH * EDGE_SD.
    """
    base = 0.5 * s + 0.5 * np.eye(len(s))
    sigma = np.repeat(base[None], len(strength), axis=0)
    for block, amount in zip(blocks, EDGE_SD * (REACH + strength).T, strict=True):
        edges = np.ix_(np.arange(len(strength)), block, block)
        sigma[edges] += amount[:, None, None] * (1 - np.eye(len(block)))
    return sigma


def _draw(column: Column, name: str, layout: Layout, n: int, rng: np.random.Generator) -> Variable:
    """A variable of `n` people; z-scores are by the moments of the population."""
    if column.kind == "classification":
        labels = sorted(set(column.mapping.values()))
        code = rng.integers(len(labels), size=n)
        z = code / (len(labels) - 1) - 0.5
        return Variable(np.array(labels, object)[code], z, f"{labels[-1]} against {labels[0]}")
    if name == "mean_fd":
        z = rng.normal(size=n)
        return Variable(np.round(0.12 * np.exp(0.5 * z), 6), z, "1 SD of its logarithm")
    if name == "age":
        low, high = layout.years
        values = rng.uniform(low, high, n)
        mean = (low + high) / 2
        sd = (high - low) / np.sqrt(12)
        unit = "years"
    else:
        mean = 100.0
        sd = 15.0
        values = rng.normal(mean, sd, n)
        unit = column.unit
    return Variable(np.round(values, 2), (values - mean) / sd, f"{sd:.3g} {unit}".strip())


def _raw(column: Column, value: Any, rng: np.random.Generator) -> str:
    """A value as the cohort's own table spells it."""
    if column.unit == "months":
        return f"{value * PER_YEAR['months']:.0f}"
    if column.kind == "regression":
        return f"{value:g}"
    # Several codes can have one label, such as the three kinds of ADHD.
    codes = [code for code, label in column.mapping.items() if label == value]
    return str(rng.choice(codes)) if codes else str(value)


def simulate_cohort(
    cohort: str | Path,
    folder: str | Path,
    *,
    n_participants: int = 40,
    seed: int = 0,
    n_frames: int | None = None,
    effects: dict[str, float] | None = None,
    broken: bool = True,
) -> dict:
    """Write a SIMULATED cohort: scans in its real format and folders, and its phenotype table.

    Series come from a linear process that is fitted to the seven HCP scans. Every variable has a
    block of their 94 parcels of its own. A person's edges within the block are
    ``base + EDGE_SD * (d * z + noise)`` in units of correlation. ``noise`` is one standard normal
    number per person. ``z`` is -1/2 or 1/2 for two classes, which then differ by ``d`` standard
    deviations of the variation between persons, and a z-score for other variables. One more block
    varies between persons but depends on nothing. Sessions and runs of a person share the noise;
    siblings share the family's name only.

    Parameters
    ----------
    cohort : str or Path
        Name or YAML of a cohort whose description has a ``layout``.
    folder : str or Path
        Must be empty or absent, or hold what a call with the same arguments has written; a whole one is left as it is.
    n_participants, seed : int
        People with usable scans and a row of phenotypes.
    n_frames : int
        By default that of the layout.
    effects : dict
        Size ``d`` of the effect of a target, ``site`` or ``mean_fd``; 1 if it is not given.
    broken : bool
        Add participants whose file is truncated, has NaN, has too many constant parcels or is a
        copy of another's, and one without a row in the table.

    Returns
    -------
    dict
        What ``simulated.json`` beside the data holds: the effects' sizes, blocks and slopes, and
        the broken files.

    Raises
    ------
    DataError
        For an unknown cohort or effect, a folder that is not empty, too few frames, or a missing
        package (see :func:`linear_process`).
    """
    folder = Path(folder).expanduser()
    described = load_cohort(cohort)
    layout = described.layout
    if layout is None:
        refuse(f"the cohort {described.name} cannot be simulated: it has no layout", "setting")
    n_frames = n_frames or layout.n_frames
    if n_frames < described.reader.min_frames:
        expected = f"n_frames must be >= {described.reader.min_frames}"
        refuse(f"{expected} for {described.name}, got {n_frames}", "setting")
    # Sites and families are assigned, everything else is drawn.
    columns = {k: v for k, v in described.variables.items() if k not in ("site", "family")}
    sizes = _sizes([*columns, "site"] if len(layout.sites) > 1 else list(columns), effects or {})
    process = linear_process()
    rng = np.random.default_rng([seed, 1])
    # A block of parcels for each effect, and one that varies with nothing.
    blocks = np.array_split(rng.permutation(len(process[1])), len(sizes) + 1)
    faults = [""] * n_participants
    if broken:
        faults += FAULTS
    sites = rng.integers(len(layout.sites), size=len(faults))
    variables = {k: _draw(v, k, layout, len(faults), rng) for k, v in columns.items()}
    if "site" in sizes:
        # A site has an offset of its own, which everybody who was scanned there shares.
        offsets = rng.normal(size=len(layout.sites))
        z = ((offsets - offsets.mean()) / offsets.std())[sites]
        variables["site"] = Variable(None, z, "1 SD of the sites' offsets")
    strength = rng.standard_normal((len(faults), len(blocks)))
    for i, name in enumerate(sizes):
        strength[:, i] += sizes[name] * variables[name].z
    sigma = _covariances(process[1], blocks, np.clip(strength, -REACH, REACH))

    people = _people(layout, sites)
    _check_names(folder, described, layout, people)
    series = _simulate_scans(described, layout, people, process, sigma, n_frames, rng)
    truth: dict[str, Any] = {
        "simulated": True,
        "cohort": described.name,
        "seed": seed,
        "n_participants": n_participants,
        "n_frames": n_frames,
        "edge_sd": EDGE_SD,
        "effects": _described(sizes, variables, blocks),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "mnemodyn simulate"):
        unfinished = {**truth, "broken": broken, UNFINISHED: True}
        if found := _found(folder, unfinished):
            return found
        # First, so that what a killed call leaves is never taken for a real cohort.
        write_json(folder / SIMULATED, unfinished)
        scans, broken_files = _write_scans(folder, described, layout, series, process[2], faults)
        _write_phenotype(folder, described, scans, columns, variables, rng)
        truth["broken"] = broken_files
        write_json(folder / SIMULATED, truth)
    return truth


def _people(layout: Layout, sites: np.ndarray) -> list[dict[str, str]]:
    """The entities of each person, from the number of each one's site."""
    return [
        {"participant": layout.participant.format(i), "site": layout.sites[site]}
        for i, site in enumerate(sites, 1)
    ]


def _check_names(folder: Path, cohort: Cohort, layout: Layout, people: list[dict]) -> None:
    """Raise a DataError where a description would have a file written outside the folder."""
    names = [cohort.phenotype.file]
    for person, session, run in product(people, layout.sessions, layout.runs):
        names.append(layout.path.format(**person, session=session, run=run))
    inside = folder.resolve()
    for name in names:
        if not (folder / name).resolve().is_relative_to(inside):
            what = f"{cohort.name} names {name}, which lies outside the folder of the cohort"
            refuse(f"{what}; correct layout or phenotype in its description", "setting")


def _found(folder: Path, unfinished: dict[str, Any]) -> dict[str, Any] | None:
    """What ``simulated.json`` says of a finished simulation with the same arguments; None where it is still to be made.

    A DataError unless the folder is empty, or holds this simulation.
    """
    if {path.name for path in folder.iterdir()} <= {".lock"}:
        return None
    path = folder / SIMULATED
    if path.is_file():
        with formats.reading(path, "description of a simulation"):
            found = json.loads(path.read_text(encoding="utf-8"))
        if found == unfinished:
            return None
        # When it is finished, the broken files are listed.
        if {**found, "broken": bool(found.get("broken")), UNFINISHED: True} == unfinished:
            return found
        if UNFINISHED in found:
            what = (
                "holds a simulation of other arguments that was stopped; remove it, or name another"
            )
            refuse(f"{folder} {what}", "setting")
    refuse(f"{folder} is not empty; simulated scans are never mixed with others", "setting")


def _sizes(names: list[str], effects: dict[str, float]) -> dict[str, float]:
    """The size of every effect; a DataError for one of something unknown."""
    unknown = [name for name in effects if name not in names]
    if unknown:
        refuse(f"effects can be of {names}, got {unknown}", "setting")
    return {**dict.fromkeys(names, 1.0), **effects}


def _described(
    sizes: dict[str, float], variables: dict[str, Variable], blocks: list[np.ndarray]
) -> dict[str, dict]:
    """What was planted: sizes, slopes and parcels of the effects."""
    planted = {}
    for (name, size), block in zip(sizes.items(), blocks, strict=False):
        planted[name] = {
            "d": size,
            "slope": size * EDGE_SD,
            "per": variables[name].per,
            "block": sorted(block.tolist()),
        }
    return planted


def _simulate_scans(
    cohort: Cohort,
    layout: Layout,
    people: list[dict],
    process: tuple,
    sigma: np.ndarray,
    n_frames: int,
    rng: np.random.Generator,
) -> Iterator[tuple[int, dict, np.ndarray, float]]:
    """Number of the participant, entities, series and t_r of every scan, sampled for CHUNK people at a time."""
    k, s, _ = process
    # The process's own correlations are replaced by those of each person.
    whiten = _root(s, -0.5)
    by_site = cohort.reader.t_r_by_site
    times = np.array([by_site.get(person["site"], layout.t_r) for person in people])
    for t_r in np.unique(times):
        group = np.flatnonzero(times == t_r)
        for start in range(0, len(group), CHUNK):
            members = group[start : start + CHUNK].tolist()
            mix = whiten @ _root(sigma[members])
            for session, run in product(layout.sessions, layout.runs):
                series = _sample(k, s, t_r, (len(members), n_frames), rng) @ mix
                for who, values in zip(members, series, strict=True):
                    scan = {**people[who], "session": session, "run": run}
                    yield who, scan, values.astype(np.float32), float(t_r)


def _write_scans(
    folder: Path, cohort: Cohort, layout: Layout, series: Iterator, parcels: tuple, faults: list
) -> tuple[list[tuple[int, dict]], dict[str, str]]:
    """Write all series, some of them broken; the usable scans by participant, and the others."""
    scans = []
    broken_files: dict[str, str] = {}
    copied = None
    for who, scan, values, t_r in series:
        fault = faults[who]
        first = scan["session"] == layout.sessions[0] and scan["run"] == layout.runs[0]
        # Somebody with a broken file has no other scans, so that nobody is usable in part.
        if fault and not first:
            continue
        if fault == "nan":
            values[len(values) // 2, 1] = np.nan
        elif fault == "constant-parcels":
            values[:, : cohort.reader.max_constant_parcels + 1] = 0
        elif fault == "duplicate-series":
            # Two people have this fault: the second gets the series of the first.
            copied = values if copied is None else copied
            values = copied
        name = layout.path.format(**scan)
        _write(folder / name, values, parcels, t_r)
        if fault == "truncated":
            content = (folder / name).read_bytes()
            write_bytes(folder / name, content[: len(content) * 2 // 3])
        if fault:
            broken_files[name] = fault
        if fault != "no-phenotype":
            scans.append((who, scan))
    return scans, broken_files


def _write(path: Path, values: np.ndarray, parcels: tuple[str, ...], t_r: float) -> None:
    """Write a series, (time, parcel), in the format of the path's ending."""
    if path.name.endswith(".1D"):
        table = pd.DataFrame(values, columns=[f"#{i + 1}" for i in range(len(parcels))])
        write_text(path, table.to_csv(sep="\t", index=False, na_rep="nan", float_format="%.6f"))
    elif path.name.endswith(".dtseries.nii"):
        # One column per parcel, under an axis of scalars.
        axes = SeriesAxis(0, float(t_r), len(values), unit="SECOND"), ScalarAxis(list(parcels))
        write_bytes(path, Cifti2Image(values, axes).to_bytes())
    else:
        formats.write(path, values, parcels, t_r)


def _write_phenotype(
    folder: Path,
    cohort: Cohort,
    scans: list[tuple[int, dict]],
    columns: dict[str, Column],
    variables: dict[str, Variable],
    rng: np.random.Generator,
) -> None:
    """Write the phenotype table, with missing labels, siblings and one repeated row."""
    table = cohort.phenotype
    missing = cohort.missing[0] if cohort.missing else ""
    raw: dict[int, dict] = {}
    for who, _ in scans:
        if who in raw:
            continue
        raw[who] = {}
        for name, column in columns.items():
            value = _raw(column, variables[name].values[who], rng)
            if column.exclude and rng.uniform() < MISSING:
                value = str(rng.choice(column.exclude))
            raw[who][column.column] = missing if rng.uniform() < MISSING else value
    related = list(raw)[: len(raw) // 5 * 2]  # two in five have a sibling among them
    families = {who: f"F{i // 2:04d}" for i, who in enumerate(related)}
    lines = []
    for who, scan in scans:
        line = {column: template.format_map(scan) for column, template in table.match.items()}
        line.update(raw[who])
        if cohort.site and scan["site"]:
            line[cohort.site.column] = _raw(cohort.site, scan["site"], rng)
        if cohort.family:
            line[cohort.family.column] = families.get(who, "")
        lines.append(line)
    content = pd.DataFrame(lines).drop_duplicates(list(table.match))
    content = pd.concat([content, content.iloc[:1]])  # real tables repeat rows
    separator = "," if table.file.endswith(".csv") else "\t"
    write_text(folder / table.file, content.to_csv(index=False, sep=separator))
