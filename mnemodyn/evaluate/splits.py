"""Who is tested when: participants, with their families, in repeated folds or one site at a time."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from mnemodyn.data.scans import DataError
from mnemodyn.files import write_text


@dataclass(frozen=True)
class Folds:
    """A division of participants, repeated.

    `families` are a label a participant; members of one family are never on two sides of a split. `test_fold` (repeat,
    participant) is the fold in which the participant is tested, `names` are those of the folds, such as sites.
    """

    participants: tuple[str, ...]
    families: tuple[str, ...]
    test_fold: np.ndarray
    names: tuple[str, ...]

    @property
    def n_repeats(self) -> int:
        return len(self.test_fold)

    def of(self, participants: Sequence[str]) -> np.ndarray:
        """Test fold of every scan, (repeat, scan), from the participant of each."""
        place = {p: i for i, p in enumerate(self.participants)}
        missing = [p for p in participants if p not in place]
        if missing:
            raise DataError(
                f"participants without a fold: {missing[:3]}; make the folds from the same table"
            )
        return self.test_fold[:, [place[p] for p in participants]]

    def split(
        self, participants: Sequence[str]
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Repeat, fold, and rows of scans to train and to test on, from the participant of every scan.

        A family that reaches into two folds (of sites, say) is left out of the training of both.
        """
        family_of = dict(zip(self.participants, self.families, strict=True))
        family = np.array([family_of.get(p, p) for p in participants])
        for repeat, folds in enumerate(self.of(participants)):
            for fold in np.unique(folds):
                test = folds == fold
                train = ~np.isin(family, family[test])
                yield repeat, int(fold), np.flatnonzero(train), np.flatnonzero(test)

    def csv(self) -> str:
        """A row a participant: ``participant_id``, ``family`` and the name of its fold in every repeat."""
        names = np.array(self.names)
        columns = {f"repeat_{r}": names[folds] for r, folds in enumerate(self.test_fold)}
        table = pd.DataFrame(
            {"participant_id": self.participants, "family": self.families, **columns}
        )
        return table.sort_values("participant_id").to_csv(index=False, lineterminator="\n")

    @property
    def digest(self) -> str:
        """SHA-256 of the fold table as CSV: equal for equal divisions of the same people."""
        return hashlib.sha256(self.csv().encode()).hexdigest()

    def write(self, path: str | Path) -> Path:
        """Write the fold table as CSV."""
        return write_text(path, self.csv())


def _people(table: pd.DataFrame) -> pd.DataFrame:
    """A row a participant: family and site, each one label."""
    table = table[[c for c in ("participant_id", "family", "site") if c in table]].copy()
    known = table["family"].notna() & (table["family"] != "") if "family" in table else False
    table["family"] = np.where(known, table.get("family"), table["participant_id"])
    for column in table.columns.drop("participant_id"):
        n = table.groupby("participant_id")[column].nunique()
        if (n > 1).any():
            raise DataError(f"{column}: participants {list(n.index[n > 1])[:3]} have more than one")
    return table.drop_duplicates("participant_id").reset_index(drop=True)


def _strata(target: Sequence | np.ndarray, n: int) -> np.ndarray:
    """Classes, or for numbers of more than two values their fifths (fewer where `n` is small)."""
    values = pd.Series(np.asarray(target))
    if values.nunique() < 2:
        raise DataError(
            f"the target has one value only ({values.iloc[0]!r}): nothing can be told apart"
        )
    if values.nunique() > 2 and pd.api.types.is_numeric_dtype(values):
        values = pd.qcut(values, min(5, max(1, len(values) // n)), labels=False, duplicates="drop")
    return pd.factorize(values, sort=True)[0]


def repeated_folds(
    table: pd.DataFrame, target: str, *, n_folds: int = 5, n_repeats: int = 5, seed: int = 0
) -> Folds:
    """Stratified folds over participants, families together, drawn anew in every repeat.

    `table` has a row a scan: ``participant_id``, ``family`` where known, and the target: classes, or a number, which is
    stratified by its fifths. Of several scans of a participant the first counts.

    Raises
    ------
    DataError
        If a target is missing, has one value only, a class has fewer families than there are folds, or a
        participant has two families.
    """
    people = _people(table)
    if table[target].isna().any():
        raise DataError(
            f"{target}: {int(table[target].isna().sum())} scans have no value; leave them out first"
        )
    if n_folds < 2 or n_repeats < 1:
        raise DataError(f"n_folds must be >= 2 and n_repeats >= 1, got {n_folds} and {n_repeats}")
    if people["family"].nunique() < n_folds:
        raise DataError(f"{people['family'].nunique()} families are fewer than {n_folds} folds")
    first = table.drop_duplicates("participant_id")[target]
    strata = _strata(first, n_folds)
    if first.nunique() == 2:
        n = people.groupby(strata)["family"].nunique().min()
        if n < n_folds:
            raise DataError(
                f"{target}: the smaller class has {n} families, fewer than {n_folds} folds"
            )
    test_fold = np.zeros((n_repeats, len(people)), dtype=int)
    for repeat in range(n_repeats):
        draw = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed + repeat)
        for fold, (_, test) in enumerate(draw.split(people, strata, people["family"])):
            test_fold[repeat, test] = fold
    names = tuple(str(i) for i in range(n_folds))
    return Folds(tuple(people["participant_id"]), tuple(people["family"]), test_fold, names)


def leave_one_site_out(table: pd.DataFrame) -> Folds:
    """Every site is tested once, by what was learned at the others.

    DataError if there are fewer than two sites, or a participant has none or two.
    """
    people = _people(table)
    if "site" not in people or people["site"].isna().any() or people["site"].nunique() < 2:
        raise DataError(
            "leave-one-site-out needs two sites or more, and the site of every participant"
        )
    codes, names = pd.factorize(people["site"], sort=True)
    return Folds(
        tuple(people["participant_id"]),
        tuple(people["family"]),
        codes[None],
        tuple(map(str, names)),
    )


def inner_splits(
    target: np.ndarray, families: np.ndarray, n_splits: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits of a training set for choosing within it: fewer where the smaller class has fewer families.

    DataError if a class has fewer than two families.
    """
    strata = _strata(target, n_splits)
    n = min(len(np.unique(families[strata == s])) for s in np.unique(strata))
    if n < 2:
        raise DataError(
            "a training fold has a class with one family only: nothing can be chosen within it"
        )
    draw = StratifiedGroupKFold(min(n_splits, n), shuffle=True, random_state=seed)
    return list(draw.split(np.zeros(len(target)), strata, families))
