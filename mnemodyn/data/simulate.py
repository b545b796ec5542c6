"""SIMULATED cohorts: the files and tables of a real one, from a linear process with planted effects of known size."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.cifti2 import Cifti2Image, ScalarAxis, SeriesAxis
from scipy.linalg import expm, logm, solve_continuous_lyapunov, solve_discrete_lyapunov

from mnemodyn.data import formats
from mnemodyn.data.cohorts import MONTHS, SIMULATED, Cohort, Column, load_cohort
from mnemodyn.data.formats import refuse
from mnemodyn.data.scans import load_hcp7
from mnemodyn.files import write_bytes, write_json, write_text

__all__ = ["LAYOUTS", "linear_process", "simulate_cohort"]

EDGE_SD = 0.06  # between-person standard deviation of a planted edge, in units of correlation
REACH = (
    4.0  # a score is cut off at this many of them, which keeps every covariance positive definite
)
MISSING = 0.05  # share of labels that are missing
CHUNK = 64  # participants simulated at a time


@dataclass(frozen=True)
class Layout:
    """Where a cohort's files lie and what its scans and people are like; `t_r` and `years` are plausible, not data."""

    path: str
    participant: str
    t_r: float
    n_frames: int
    years: tuple[float, float]
    sites: tuple[str, ...] = ("",)
    sessions: tuple[str, ...] = ("",)
    runs: tuple[str, ...] = ("",)


_BIDS = "sub-{participant}/{ses}func/sub-{participant}_{ses_}task-rest_space-fsLR_seg-{atlas}_stat-mean_"
_COLUMNS = "{n_parcels}_parcellated.dtseries.nii"
_HCP = (
    "{participant}_V1_MR/MNINonLinear/Results/rfMRI_{run}/rfMRI_{run}_Atlas_hp0_clean_" + _COLUMNS
)
_UKB = "{participant}/{participant}_20227_2_0_" + _COLUMNS
_AP_PA = ("REST1_AP", "REST1_PA")
_ABIDE, _ADHD = ("NYU", "UM_1", "USM", "KKI", "SDSU"), ("NYU", "Peking", "KKI", "OHSU")
LAYOUTS = {
    "abide": Layout("{site}_{participant}_rois_cc200.1D", "00{:05d}", 2.0, 176, (7, 40), _ABIDE),
    "adhd200": Layout(_BIDS + "timeseries.tsv", "{:07d}", 2.0, 176, (7, 21), _ADHD, runs=("1",)),
    "adni": Layout(
        _BIDS + "timeseries.ptseries.nii", "002S{:04d}", 3.0, 140, (55, 90), sessions=("M00", "M12")
    ),
    "hbn": Layout(
        _BIDS + "timeseries.tsv", "NDARAA{:03d}ZZ", 0.8, 375, (5, 21), ("RU", "CBIC", "CUNY")
    ),
    "hcp_aging": Layout(
        _HCP, "HCA{:07d}", 0.8, 478, (36, 90), ("WU", "MGH", "UMN", "UCLA"), runs=_AP_PA
    ),
    "nkir": Layout(_BIDS + _COLUMNS, "A{:08d}", 1.4, 404, (6, 85), sessions=("BAS1",)),
    "ukb": Layout(_UKB, "{:07d}", 0.735, 490, (45, 82), ("Cheadle", "Reading", "Newcastle")),
}


def linear_process(
    generator: str, n_parcels: int, seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """A stationary linear process with unit variances: ``dx = -K x dt + noise``.

    The `generator` is ``"ou"``, an Ornstein-Uhlenbeck process on a synthetic connectivity, exp(-distance) of random
    places that mirror each other in two hemispheres, with an edge between twins; or ``"hcp7"``, the VAR(1) that ridge
    regression fits to the seven HCP scans (94 parcels). A DataError for another generator, an odd or too small
    `n_parcels`, or a missing package (hcp7).

    Returns
    -------
    K, S : ndarray, shape (parcel, parcel)
        K per second, and the stationary covariance, which is a correlation.
    parcels : tuple of str
    """
    if generator == "hcp7":
        scans = load_hcp7()
        z = [(s.values - s.values.mean(0)) / s.values.std(0) for s in scans]
        past, now = (
            np.concatenate([x[part] for x in z]).astype(float) for part in (np.s_[:-1], np.s_[1:])
        )
        n = past.shape[1]
        a = np.linalg.solve(past.T @ past + 0.01 * len(past) * np.eye(n), past.T @ now).T
        s = solve_discrete_lyapunov(a, np.cov((now - past @ a.T).T))
        k, parcels = -np.real(logm(a)) / scans[0].t_r, scans[0].parcels
    elif generator == "ou":
        if n_parcels < 10 or n_parcels % 2:
            refuse(f"n_parcels must be even and >= 10, got {n_parcels}", "setting")
        half = n_parcels // 2
        place = np.random.default_rng([seed, 0]).uniform((0.1, -1, -1), (1, 1, 1), (half, 3))
        place = np.concatenate([place * (-1, 1, 1), place])
        distance = np.linalg.norm(place[:, None] - place[None], axis=2)
        w = np.exp(-distance / 0.5) - np.eye(n_parcels)
        twins = np.arange(half)
        w[twins, twins + half] = w[twins + half, twins] = 1.0
        w *= 0.8 / np.abs(np.linalg.eigvalsh(w)).max()
        k = (
            np.eye(n_parcels) - w
        ) / 2.0  # 2 s: slow enough for most of the power to lie below 0.1 Hz
        s = solve_continuous_lyapunov(k, np.eye(n_parcels))
        parcels = tuple(f"{side}H_{i + 1}" for side in "LR" for i in range(half))
    else:
        refuse(f"generator must be ou or hcp7, got {generator!r}", "setting")
    scale = np.sqrt(np.diag(s))
    return k * (scale[None] / scale[:, None]), s / np.outer(scale, scale), parcels


def _root(matrix: np.ndarray, power: float = 0.5) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-9)[..., None, :] ** power) @ np.swapaxes(
        vectors, -1, -2
    )


def _sample(
    k: np.ndarray, s: np.ndarray, t_r: float, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Series of shape (scan, time, parcel), sampled every `t_r` seconds exactly."""
    n_scans, n_frames = shape
    step = expm(-k * t_r).T
    noise = rng.standard_normal((n_frames, n_scans, len(s))) @ _root(s - step.T @ s @ step)
    x = np.empty((n_frames, n_scans, len(s)))
    x[0] = rng.standard_normal((n_scans, len(s))) @ _root(s)
    for t in range(1, n_frames):
        x[t] = x[t - 1] @ step + noise[t]
    return x.swapaxes(0, 1)


def _covariances(s: np.ndarray, blocks: list[np.ndarray], strength: np.ndarray) -> np.ndarray:
    """Correlations (person, parcel, parcel) whose edges in block i are EDGE_SD * strength[:, i] above their base.

    The base is half of `s`, and REACH * EDGE_SD within the blocks: what is added is never negative, so that the least
    eigenvalue is at least 0.5 - 2 * REACH * EDGE_SD.
    """
    sigma = np.repeat((0.5 * s + 0.5 * np.eye(len(s)))[None], len(strength), axis=0)
    for block, amount in zip(blocks, EDGE_SD * (REACH + strength).T, strict=True):
        edges = np.ix_(np.arange(len(strength)), block, block)
        sigma[edges] += amount[:, None, None] * (1 - np.eye(len(block)))
    return sigma


def _draw(column: Column, name: str, layout: Layout, n: int, rng: np.random.Generator):
    """Values of a variable for `n` people, their z-scores by the population's moments, and what one unit of z is."""
    if column.kind == "classification":
        labels = sorted(set(column.mapping.values()))
        code = rng.integers(len(labels), size=n)
        z = code / (len(labels) - 1) - 0.5
        return np.array(labels, dtype=object)[code], z, f"{labels[-1]} against {labels[0]}"
    if name == "age":
        low, high = layout.years
        values = rng.uniform(low, high, n)
        mean, sd = (low + high) / 2, (high - low) / np.sqrt(12)
    elif name == "mean_fd":
        log = rng.normal(size=n)
        return np.round(0.12 * np.exp(0.5 * log), 6), log, "1 SD of its logarithm"
    else:
        mean, sd = 100.0, 15.0
        values = rng.normal(mean, sd, n)
    return (
        np.round(values, 2),
        (values - mean) / sd,
        f"{sd:.3g} {'years' if name == 'age' else column.unit}".strip(),
    )


def _raw(column: Column, value, rng: np.random.Generator) -> str:
    """A value as the cohort's own table spells it."""
    if column.kind == "regression":
        return f"{value * MONTHS[column.unit]:.0f}" if column.unit == "months" else f"{value:g}"
    codes = [code for code, label in column.mapping.items() if label == value]
    return str(rng.choice(codes)) if codes else str(value)


def simulate_cohort(
    name: str,
    folder: str | Path,
    *,
    n_participants: int = 40,
    seed: int = 0,
    n_parcels: int = 40,
    n_frames: int | None = None,
    effects: dict[str, float] | None = None,
    generator: str = "ou",
    broken: bool = True,
) -> dict:
    """Write a SIMULATED cohort: scans in its real format and folders, and its phenotype table.

    Every variable has a block of parcels of its own. A person's edges within it are
    ``base + EDGE_SD * (d * z + noise)`` in units of correlation, with one standard normal ``noise`` a person and
    ``z`` the variable: +-1/2 for the two classes, so that they differ by ``d`` standard deviations of the variation
    between persons, and in standard deviations for the others. A block more varies between persons with nothing.
    Sessions and runs of a person share the noise; siblings share the family's name only. A DataError for an unknown
    cohort or effect, a folder that is not empty, or settings out of range.

    Parameters
    ----------
    name, folder : str, str or Path
        One of `LAYOUTS`, and where it goes, which must be empty or absent.
    n_participants, seed : int
        People with usable scans and a row of phenotypes.
    n_parcels, n_frames : int
        The former even, 94 where the generator is ``hcp7``; the latter that of the layout by default.
    effects : dict
        Size ``d`` of a variable's effect (the cohort's targets, ``site``, ``mean_fd``), 1 where it is not given.
    generator : {"ou", "hcp7"}
        See :func:`linear_process`.
    broken : bool
        Add participants whose file is truncated, has NaN, too many constant parcels, or is another's copy, and one
        without a row in the table.

    Returns
    -------
    dict
        What ``simulated.json`` beside the data holds: the effects' sizes, blocks and slopes, and the broken files.
    """
    if name not in LAYOUTS:
        refuse(f"cohort must be one of {', '.join(LAYOUTS)}, got {name!r}", "setting")
    cohort, layout, folder = load_cohort(name), LAYOUTS[name], Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(f"{folder} is not empty; simulated scans are never mixed with others", "setting")
    n_frames = layout.n_frames if n_frames is None else n_frames
    if n_participants < 2 or n_frames < cohort.reader.min_frames:
        least = f"n_participants must be >= 2 and n_frames >= {cohort.reader.min_frames}"
        refuse(f"{least}, got {n_participants} and {n_frames}", "setting")
    k, s, parcels = linear_process(generator, n_parcels, seed)
    rng = np.random.default_rng([seed, 1])
    variables = {n: c for n, c in cohort.variables.items() if n not in ("site", "family")}
    known = [*variables, *(["site"] if len(layout.sites) > 1 else [])]
    sizes = dict.fromkeys(known, 1.0) | (effects or {})
    if set(sizes) - set(known):
        refuse(
            f"effects of {name} can be of {known}, got {sorted(set(sizes) - set(known))}", "setting"
        )
    blocks = np.array_split(rng.permutation(len(parcels)), len(known) + 1)
    if len(blocks[-1]) < 3:
        refuse(
            f"n_parcels must be >= {3 * len(blocks)} for the {len(known)} effects of {name}",
            "setting",
        )

    faults = [
        "truncated",
        "nan",
        "constant-parcels",
        "duplicate-series",
        "duplicate-series",
        "no-phenotype",
    ]
    faults = [""] * n_participants + (faults if broken else [])
    n = len(faults)
    site = rng.integers(len(layout.sites), size=n)
    drawn = {
        variable: _draw(column, variable, layout, n, rng) for variable, column in variables.items()
    }
    if "site" in known:
        offsets = rng.normal(size=len(layout.sites))
        drawn["site"] = (
            None,
            ((offsets - offsets.mean()) / offsets.std())[site],
            "1 SD of the sites' offsets",
        )
    by_site = cohort.reader.t_r_by.get("site", {})
    times = np.array([by_site.get(layout.sites[i], layout.t_r) for i in site])
    strength = rng.standard_normal((n, len(blocks)))
    for i, variable in enumerate(known):
        strength[:, i] += sizes[variable] * drawn[variable][1]
    strength = np.clip(strength, -REACH, REACH)

    people = [layout.participant.format(i + 1) for i in range(n)]
    rows, files = [], {}
    half, copied = _root(s, -0.5), None
    for t_r in np.unique(times):
        group = np.flatnonzero(times == t_r)
        for members in (group[i : i + CHUNK] for i in range(0, len(group), CHUNK)):
            mix = half @ _root(_covariances(s, blocks, strength[members]))
            for session, run in product(layout.sessions, layout.runs):
                first = (session, run) == (layout.sessions[0], layout.runs[0])
                series = _sample(k, s, t_r, (len(members), n_frames), rng) @ mix
                for who, values in zip(members, series, strict=True):
                    fault = faults[who]
                    if fault and not first:
                        continue
                    if (
                        fault == "duplicate-series"
                    ):  # the first of the two is written, and then written again
                        values = copied = values if copied is None else copied
                    scan = {
                        "participant": people[who],
                        "session": session,
                        "run": run,
                        "site": layout.sites[site[who]],
                    }
                    path = _write(folder, cohort, layout, scan, values, parcels, t_r, fault)
                    if fault:
                        files[path] = fault
                    if fault != "no-phenotype":
                        rows.append((int(who), scan))
    _write_phenotype(folder, cohort, layout, rows, drawn, variables, rng)
    planted = {}
    for variable, block in zip(known, blocks, strict=False):
        d, per = sizes[variable], drawn[variable][2]
        planted[variable] = {
            "d": d,
            "slope": d * EDGE_SD,
            "per": per,
            "block": sorted(map(int, block)),
        }
    truth = {
        "simulated": True,
        "cohort": name,
        "generator": generator,
        "seed": seed,
        "n_participants": n_participants,
    }
    truth |= {"edge_sd": EDGE_SD, "effects": planted, "broken": files}
    write_json(folder / SIMULATED, truth)
    return truth


def _write(
    folder, cohort: Cohort, layout: Layout, scan: dict, values, parcels, t_r: float, fault: str
) -> str:
    values = values.astype(np.float32)
    if fault == "nan":
        values[len(values) // 2, 1] = np.nan
    elif fault == "constant-parcels":
        values[:, : cohort.reader.max_constant_parcels + 1] = 0
    session = f"HBNsite{scan['site']}" if cohort.name == "hbn" else scan["session"]
    folders = (
        {"ses": f"ses-{session}/", "ses_": f"ses-{session}_"}
        if session
        else {"ses": "", "ses_": ""}
    )
    name = layout.path.format(**scan, **folders, atlas="SIMULATED", n_parcels=len(parcels))
    path = folder / name
    if name.endswith(".1D"):
        table = pd.DataFrame(values, columns=[f"#{i + 1}" for i in range(len(parcels))])
        write_text(path, table.to_csv(sep="\t", index=False, na_rep="nan", float_format="%.6f"))
    elif name.endswith(".dtseries.nii"):  # one column a parcel, under an axis of scalars
        axes = SeriesAxis(0, float(t_r), len(values), unit="SECOND"), ScalarAxis(list(parcels))
        write_bytes(path, Cifti2Image(values, axes).to_bytes())
    else:
        formats.write(path, values, parcels, t_r)
    if fault == "truncated":
        write_bytes(path, path.read_bytes()[: path.stat().st_size * 2 // 3])
    return name


def _write_phenotype(
    folder, cohort: Cohort, layout: Layout, rows: list, drawn: dict, variables: dict, rng
) -> None:
    table = cohort.phenotype[0]
    missing = cohort.missing[0] if cohort.missing else ""
    raw: dict[int, dict[str, str]] = {}
    for who in dict.fromkeys(w for w, _ in rows):  # in a participant's rows all is the same
        raw[who] = {}
        for name, column in variables.items():
            if column.column not in raw[who]:
                value = _raw(column, drawn[name][0][who], rng)
                if column.exclude and rng.uniform() < MISSING:
                    value = str(rng.choice(column.exclude))
                raw[who][column.column] = missing if rng.uniform() < MISSING else value
    related = list(raw)[: len(raw) // 5 * 2]  # two in five have a sibling among them
    families = {who: f"F{i // 2:04d}" for i, who in enumerate(related)}
    lines = []
    for who, scan in rows:
        line = {
            column: template.format_map(scan) for column, template in table.match.items()
        } | raw[who]
        if cohort.site and scan["site"]:
            line[cohort.site.column] = _raw(cohort.site, scan["site"], rng)
        if cohort.family:
            line[cohort.family.column] = families.get(who, "")
        lines.append(line)
    content = pd.DataFrame(lines).drop_duplicates(list(table.match))
    content = pd.concat([content, content.iloc[:1]])  # a repeated row, as tables have
    separator = "," if table.file.endswith(".csv") else "\t"
    write_text(folder / table.file, content.to_csv(index=False, sep=separator))
