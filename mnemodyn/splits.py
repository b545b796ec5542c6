"""Who is held out: participants with their families, once, in repeated folds, or one site at a time.

Whatever divides scans in this package divides participants. All scans of a participant are on the
same side, and so are the members of a family where the cohort knows its families.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from mnemodyn.data.scans import DataError
from mnemodyn.files import digest


def hold_out(
    participants: Sequence[str],
    *,
    n_test: int | float,
    n_validation: int | float,
    strata: Sequence | None = None,
    families: Sequence[str] | None = None,
    seed: int | None = None,
) -> dict[str, np.ndarray]:
    """Divide scans once, by participant, into training, validation and test.

    Parameters
    ----------
    participants : sequence of str, shape (scan,)
        The participant of every scan.
    n_test, n_validation : int or float
        How many participants: a count (int), or a share of all of them (float below 1). May be 0.
    strata : sequence, shape (scan,), optional
        Labels, such as sites, that every side should have in the same proportions.
    families : sequence of str, shape (scan,), optional
        Families stay together; a side may then have a few participants more than asked.
    seed : int, optional
        Draws at random. Without it the last of the sorted identifiers are tested and those before
        them validate, so that a division can be read off the identifiers.

    Returns
    -------
    dict of str to ndarray
        Rows of scans, ascending, for ``train``, ``validation`` and ``test``.

    Raises
    ------
    DataError
        If a number is negative, a share is 1 or more, or nobody is left to train on.
    """
    # Without families everybody is their own, and without strata all are alike.
    scans = pd.DataFrame({"person": participants, "family": participants, "stratum": 0})
    if families is not None:
        scans["family"] = families
    if strata is not None:
        scans["stratum"] = strata
    people = scans.drop_duplicates("person").sort_values("person")
    n_people = len(people)

    # A row a family, in the order in which families are taken, the last one first.
    units = people.drop_duplicates("family", keep="last")
    if seed is not None:
        units = units.sample(frac=1, random_state=seed)
    # Interleaves the strata: every stretch of the order then has them in about their proportions.
    place = units.groupby("stratum").cumcount() + 0.5
    place = place / units.groupby("stratum")["person"].transform("size")
    order = units["family"].loc[place.sort_values(kind="stable").index].to_list()

    sides = {}
    for side, asked in (("test", n_test), ("validation", n_validation)):
        n_wanted = _count(asked, n_people)
        chosen: list[str] = []
        # Whole families, until there are enough participants.
        while order and people["family"].isin(chosen).sum() < n_wanted:
            chosen.append(order.pop())
        sides[side] = np.flatnonzero(scans["family"].isin(chosen))
    if not order:
        raise DataError(
            "n_test and n_validation must leave a participant to train on; "
            f"got {n_test} and {n_validation} of {n_people} participants"
        )
    return {"train": np.flatnonzero(scans["family"].isin(order)), **sides}


def _count(asked: int | float, n_people: int) -> int:
    """The number of participants that a count or a share means; a positive share means at least one."""
    is_share = isinstance(asked, float)
    if asked < 0 or (is_share and asked >= 1):
        raise DataError(f"n_test and n_validation must be counts or shares below 1, got {asked}")
    if is_share and asked > 0:
        return max(1, round(asked * n_people))
    return int(asked)


@dataclass(frozen=True)
class Folds:
    """A division of participants, repeated.

    Attributes
    ----------
    participants, families : tuple of str
        The participants, and the family of each. A family is never on two sides of a split.
    test_fold : ndarray of int, shape (repeat, participant)
        The fold in which a participant is tested.
    names : tuple of str
        Names of the folds: numbers, or sites.
    """

    participants: tuple[str, ...]
    families: tuple[str, ...]
    test_fold: np.ndarray
    names: tuple[str, ...]

    def first_repeat(self) -> "Folds":
        """The first of the repeated divisions alone."""
        return replace(self, test_fold=self.test_fold[:1])

    def of(self, participants: Sequence[str]) -> np.ndarray:
        """Test fold of every scan, (repeat, scan), from the participant of each."""
        rows = pd.Index(self.participants).get_indexer(participants)
        missing = pd.Series(participants)[rows < 0].tolist()
        if missing:
            raise DataError(
                f"participants without a fold: {missing[:3]}; make the folds from the same table"
            )
        return self.test_fold[:, rows]

    def split(
        self, participants: Sequence[str]
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yield repeat, fold, rows of scans to train on and rows to test, for every fold.

        A family with members in two folds (at two sites, say) is left out of the training of both.
        """
        rows = pd.Index(self.participants).get_indexer(participants)
        family = np.array(self.families)[rows]
        for repeat, folds in enumerate(self.of(participants)):
            for fold in np.unique(folds):
                test = folds == fold
                train = ~np.isin(family, family[test])
                yield repeat, int(fold), np.flatnonzero(train), np.flatnonzero(test)

    @property
    def digest(self) -> str:
        """SHA-256 of who is tested in which fold: equal for equal divisions of the same people."""
        table = pd.DataFrame({"participant_id": self.participants, "family": self.families})
        for repeat, folds in enumerate(self.test_fold):
            table[f"repeat_{repeat}"] = np.array(self.names)[folds]
        # Sorted, because the order of the scans makes no other division.
        table = table.sort_values("participant_id")
        return digest(table.to_csv(index=False, lineterminator="\n"))


def repeated_folds(
    table: pd.DataFrame, target: str, *, n_folds: int = 5, n_repeats: int = 5, seed: int = 0
) -> Folds:
    """Stratified folds over participants, families together, drawn anew in every repeat.

    Parameters
    ----------
    table : DataFrame
        A row a scan: ``participant_id``, ``family`` where known, and the target. Of several scans of
        a participant the first counts.
    target : str
        The column to stratify by: classes, or a number, which is stratified by its fifths.

    Raises
    ------
    DataError
        If a target is missing or has one value only, a class has fewer families than there are
        folds, or a participant has two families.
    """
    people = _people(table)
    n_missing = int(table[target].isna().sum())
    if n_missing:
        raise DataError(f"{target}: {n_missing} scans have no value; leave them out first")
    values = table.drop_duplicates("participant_id")[target]
    strata = _strata(values, n_folds)
    # Every fold needs both classes; of a number's fifths it may lack one.
    group = strata if values.nunique() == 2 else np.zeros(len(people))
    n_families = people.groupby(group)["family"].nunique().min()
    if n_families < n_folds:
        raise DataError(
            f"{target}: {n_families} families (of the smaller class) are fewer than {n_folds} folds"
        )
    test_fold = np.zeros((n_repeats, len(people)), dtype=int)
    for repeat in range(n_repeats):
        # A seed a repeat: more repeats leave those before them as they are.
        draw = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed + repeat)
        for fold, (_, test) in enumerate(draw.split(people, strata, people["family"])):
            test_fold[repeat, test] = fold
    names = tuple(map(str, range(n_folds)))
    return Folds(tuple(people["participant_id"]), tuple(people["family"]), test_fold, names)


def leave_one_site_out(table: pd.DataFrame) -> Folds:
    """Folds in which every site is tested once, by what was learned at the others.

    A DataError if there are fewer than two sites, or a participant has none or two.
    """
    people = _people(table)
    if "site" not in people or people["site"].isna().any() or people["site"].nunique() < 2:
        raise DataError(
            "leave-one-site-out needs two sites or more, and the site of every participant"
        )
    codes, sites = pd.factorize(people["site"], sort=True)
    names = tuple(map(str, sites))
    return Folds(tuple(people["participant_id"]), tuple(people["family"]), codes[None], names)


def inner_splits(
    target: np.ndarray, families: np.ndarray, n_splits: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits of a training set for choosing within it; fewer where the smaller class has fewer families.

    A DataError if a class has fewer than two families.
    """
    strata = _strata(target, n_splits)
    n_families = [len(np.unique(families[strata == stratum])) for stratum in np.unique(strata)]
    if min(n_families) < 2:
        raise DataError(
            "a training fold has a class with one family only: nothing can be chosen within it"
        )
    n_splits = min(n_splits, *n_families)
    draw = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed)
    return list(draw.split(np.zeros(len(target)), strata, families))


def families_of(table: pd.DataFrame) -> np.ndarray:
    """Family of every row as text, 1.0 and "1" being the same; the participant where none is known."""
    people = table["participant_id"].astype(str)
    if "family" not in table:
        return people.to_numpy(str)
    families = table["family"].astype(str).str.replace(r"\.0+$", "", regex=True)
    known = table["family"].notna() & (families != "")
    return families.where(known, people).to_numpy(str)


def _people(table: pd.DataFrame) -> pd.DataFrame:
    """A row a participant, with one family and one site; without a known family, each is their own."""
    table = table.filter(["participant_id", "site"]).assign(family=families_of(table))
    # Somebody with two families or sites could not be kept on one side of a split.
    for column in table.columns.drop("participant_id"):
        n_labels = table.groupby("participant_id")[column].nunique()
        several = list(n_labels.index[n_labels > 1])
        if several:
            raise DataError(f"{column}: participants {several[:3]} have more than one")
    return table.drop_duplicates("participant_id").reset_index(drop=True)


def _strata(target: Sequence | np.ndarray, n_folds: int) -> np.ndarray:
    """Codes of classes, or of a number's fifths; of fewer parts where a part would not fill the folds."""
    values = pd.Series(np.asarray(target))
    if not len(values):
        raise DataError("nobody is left to train on")
    if values.nunique() < 2:
        raise DataError(
            f"the target has one value only ({values.iloc[0]!r}): nothing can be told apart"
        )
    if values.nunique() > 2 and pd.api.types.is_numeric_dtype(values):
        n_parts = min(5, max(1, len(values) // n_folds))
        values = pd.qcut(values, n_parts, labels=False, duplicates="drop")
    return pd.factorize(values, sort=True)[0]
