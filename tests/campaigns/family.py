"""Family: relatives are never on both sides of a split, however their kinship is written down."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from mnemodyn.data.cohorts import index, load_cohort
from mnemodyn.data.collection import open_scans
from mnemodyn.data.scans import save_scan
from mnemodyn.evaluate.study import Task
from mnemodyn.splits import (
    DataError,
    Folds,
    hold_out,
    inner_splits,
    leave_one_site_out,
    repeated_folds,
)
from tests.campaigns.common import Campaign, Trial, scan_of
from tests.campaigns.mutate import pick

COHORT = """\
name: small
scans: ["**/sub-{participant}_*timeseries.tsv"]
phenotype: {file: people.tsv, match: {participant_id: "{participant}"}}
family: {column: family, optional: true}
site: {column: site, optional: true}
sex: {column: sex, mapping: {1: male, 2: female}}
targets: [sex]
"""


class Family(Campaign):
    name = "family"
    what = "pedigrees"
    count = 400
    seconds = 60.0

    def trial(self, number: int, folder: Path) -> Trial:
        rng = np.random.default_rng([11, number])
        # Every fourth pedigree is that of a folder with a table and a description.
        if number % 4 == 0:
            return from_folder(rng, number, folder)
        table, relatives = pedigree(rng)
        with warnings.catch_warnings():
            # scikit-learn says where one of a number's fifths is smaller than there are folds, which is allowed.
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            problems = divisions(table, relatives, rng, number)
        return Trial("tables", problems)


def pedigree(rng: np.random.Generator) -> tuple[pd.DataFrame, list[set[str]]]:
    """A table, a row a scan, whose families are written in one of many ways, and the groups of relatives."""
    n = int(rng.integers(12, 60))
    who = np.array([f"sub-{i:03d}" for i in rng.choice(900, n, replace=False)])
    n_families = int(rng.integers(max(4, n // 5), n + 1))
    number = rng.integers(0, n_families, n)
    names = pick(rng, NAMES)(number)
    unknown = rng.random(n) < pick(rng, (0.0, 0.2, 0.9))
    empty = pick(rng, ("", None, np.nan, pd.NA))
    family = pd.Series(list(names), dtype=object).mask(pd.Series(unknown), empty)
    table = pd.DataFrame({"participant_id": who, "family": family})
    table["target"] = pick(
        rng, (rng.integers(0, 2, n), rng.standard_normal(n), rng.integers(0, 9, n))
    )
    table["site"] = [f"site {i}" for i in pick(rng, (number % 3, rng.integers(0, 3, n)))]
    relatives: dict[object, set[str]] = {}
    for person, group, alone in zip(who, number, unknown, strict=True):
        relatives.setdefault(person if alone else int(group), set()).add(person)
    # Several scans of some, in any order; what the table says of a person is the same in each row.
    rows = np.concatenate([np.arange(n), rng.integers(0, n, int(rng.integers(0, n)))])
    table = table.iloc[rng.permutation(rows)].reset_index(drop=True)
    if rng.random() < 0.1:
        table = table.drop(columns="family")
        relatives = {person: {person} for person in who}
    return table, list(relatives.values())


# The ways in which tables write the name of a family.
NAMES = (
    lambda number: [f"family-{i}" for i in number],
    lambda number: number.astype(int),
    lambda number: number.astype(float),
    lambda number: [str(i) for i in number],
    # Numbers and words in one column.
    lambda number: [int(i) if i % 2 else f"f{i}" for i in number],
    lambda number: [f"Müller {i}" for i in number],
)


def divisions(
    table: pd.DataFrame, relatives: list[set[str]], rng: np.random.Generator, seed: int
) -> list[str]:
    """Divide people in every way there is, and say what is wrong."""
    problems = []
    seed = seed % 1000
    settings = {"n_folds": int(rng.integers(2, 6)), "n_repeats": int(rng.integers(1, 4))}
    makers = {
        "repeated_folds": lambda: repeated_folds(table, "target", seed=seed, **settings),
        "leave_one_site_out": lambda: leave_one_site_out(table),
    }
    for name, make in makers.items():
        try:
            folds = make()
        except DataError as error:
            # Too few families, or a person at two sites: said, and not divided.
            if not str(error):
                problems.append(f"{name}: a refusal without words")
            continue
        problems += [f"{name}: {what}" for what in of_folds(folds, table, relatives)]
        if folds.digest != make().digest:
            problems.append(f"{name}: the same seed gives other folds")
        problems += inside(table, folds, relatives)
        if name == "repeated_folds":
            problems += shuffled(table, folds, settings, seed, rng)
    return problems + held_out(table, relatives, rng, seed)


def groups_on_both_sides(first: set[str], second: set[str], relatives: list[set[str]]) -> bool:
    """Whether a person, or a family, is on two sides."""
    return any(group & first and group & second for group in relatives)


def of_folds(folds: Folds, table: pd.DataFrame, relatives: list[set[str]]) -> list[str]:
    """What is wrong with folds."""
    problems = []
    people = table["participant_id"].to_numpy()
    tested: dict[int, list[str]] = {}
    by_number = folds.names[0] == "0"
    for repeat, fold, train, test in folds.split(people):
        if groups_on_both_sides(set(people[train]), set(people[test]), relatives):
            problems.append("a family is on both sides")
        # Where every family has members at several sites, nobody is left to learn from.
        somebody_to_learn_from = len(train) or not by_number
        if not len(test) or not somebody_to_learn_from:
            problems.append(f"a fold has nobody on one side | fold {fold}")
        tested.setdefault(repeat, []).extend(set(people[test]))
    for names in tested.values():
        if sorted(names) != sorted(set(people)):
            problems.append("somebody is not tested once")
    return problems


def shuffled(table, folds, settings, seed, rng) -> list[str]:
    """Fewer repeats leave those before as they are; every person has a fold."""
    fewer = repeated_folds(table, "target", seed=seed, **{**settings, "n_repeats": 1})
    if not np.array_equal(fewer.test_fold[0], folds.test_fold[0]):
        return ["repeated_folds: more repeats change those before"]
    if len(folds.participants) != table["participant_id"].nunique():
        return ["repeated_folds: a person is there twice"]
    return []


def inside(table: pd.DataFrame, folds: Folds, relatives: list[set[str]]) -> list[str]:
    """Inner folds of every training set, as an evaluation makes them."""
    problems = []
    task = Task.of(table, "target", "regression")
    people = task.people.to_numpy()
    for _, _, train, _ in folds.split(people):
        try:
            inner = inner_splits(task.y[train], task.families[train], 3, seed=0)
        except DataError:
            continue
        rows = people[train]
        tested = np.zeros(len(rows), int)
        for fit, rest in inner:
            tested[rest] += 1
            if groups_on_both_sides(set(rows[fit]), set(rows[rest]), relatives):
                problems.append("inner_splits: a family is on both sides")
        if (tested != 1).any():
            problems.append("inner_splits: somebody is not tested once")
    return problems


def held_out(
    table: pd.DataFrame, relatives: list[set[str]], rng: np.random.Generator, seed: int
) -> list[str]:
    """Three sides that are drawn once, by counts or shares, with strata or without."""
    problems = []
    people = table["participant_id"].to_numpy()
    n = len(set(people))
    settings = {
        "n_test": pick(rng, (0, 1, n // 4, 0.1, 0.3)),
        "n_validation": pick(rng, (1, n // 5, 0.2, 0.01)),
        "seed": pick(rng, (None, seed)),
        "strata": pick(rng, (None, table["site"].to_list(), table["target"].to_list())),
        "families": Task.of(table, "target", "regression").families,
    }
    try:
        sides = hold_out(people, **settings)
    except DataError:
        return []
    again = hold_out(people, **settings)
    names = {side: set(people[rows]) for side, rows in sides.items()}
    for side, rows in sides.items():
        if not np.array_equal(rows, again[side]):
            problems.append("hold_out: the same seed gives other sides")
    for first, second in (("train", "test"), ("train", "validation"), ("test", "validation")):
        if groups_on_both_sides(names[first], names[second], relatives):
            problems.append(f"hold_out: a family is in {first} and in {second}")
    if sorted(np.concatenate(list(sides.values()))) != list(range(len(people))):
        problems.append("hold_out: a scan is on no side, or on two")
    for side in ("test", "validation"):
        asked = settings[f"n_{side}"]
        least = max(1, round(asked * n)) if isinstance(asked, float) else asked
        if len(names[side]) < least:
            problems.append(f"hold_out: fewer people in {side} than asked")
    return problems


def from_folder(rng: np.random.Generator, number: int, folder: Path) -> Trial:
    """Families of a cohort: a column of the table, joined by lists in the description, with sessions."""
    n = int(rng.integers(8, 16))
    who = [f"sub-{i:02d}" for i in range(1, n + 1)]
    column = [pick(rng, ("", "n/a", "f1", "f2", "3", "3.0", "F 4")) for _ in who]
    lists = []
    for _ in range(int(rng.integers(0, 4))):
        size = int(rng.integers(2, 4))
        lists.append([str(name) for name in rng.choice([*who, "sub-99"], size, replace=False)])
    rows = ["participant_id\tfamily\tsite\tsex"]
    for i, person in enumerate(who):
        rows.append(f"{person}\t{column[i]}\t{'AB'[i % 2]}\t{1 + i % 2}")
    (folder / "people.tsv").write_text("\n".join(rows) + "\n")
    for person in who:
        for session in ("1", "2")[: int(rng.integers(1, 3))]:
            path = folder / person / f"{person}_ses-{session}_task-rest_timeseries.tsv"
            save_scan(scan_of(rng, person, 8), path)
    described = COHORT + (f"families: {lists}\n" if lists else "")
    (folder / "cohort.yaml").write_text(described.replace("'", '"'))
    relatives = joined(who, column, lists)
    cohort = load_cohort(folder / "cohort.yaml")
    if rng.random() < 0.5:
        table = index(cohort, folder).table
    else:
        table = open_scans(folder, cohort=folder / "cohort.yaml").table
    problems = []
    if sorted(table["participant_id"].unique()) != who:
        problems.append("index: a person is missing")
    for group in relatives:
        rows_of_group = table["participant_id"].isin(group)
        if table.loc[rows_of_group, "family"].nunique() != 1:
            problems.append("index: relatives have several families")
        if table.loc[~rows_of_group, "family"].isin(table.loc[rows_of_group, "family"]).any():
            problems.append("index: strangers have one family")
    table = table.assign(target=table["sex"].eq("male").astype(int))
    problems += divisions(table, relatives, rng, number)
    return Trial("folders", problems)


def joined(who: list[str], column: list[str], lists: list[list[str]]) -> list[set[str]]:
    """Groups of people who are related directly or through others, written apart from the package."""
    links = [set(names) for names in lists]
    known: dict[str, set[str]] = {}
    for person, name in zip(who, column, strict=True):
        if name not in ("", "n/a"):
            # 3.0 is the 3 that a spreadsheet has made a number.
            known.setdefault(name.removesuffix(".0"), set()).add(person)
    links += list(known.values())
    groups = [{person} for person in who]
    for link in links:
        touched = [group for group in groups if group & link]
        together = set(link).union(*touched)
        groups = [group for group in groups if not group & link] + [together]
    return [group & set(who) for group in groups if group & set(who)]
