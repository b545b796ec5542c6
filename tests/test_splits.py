"""Nobody on two sides: participants, their sessions, families and sites."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mnemodyn.data.scans import DataError
from mnemodyn.splits import families_of, hold_out, inner_splits, leave_one_site_out, repeated_folds


def cohort(n=60, sessions=2, seed=0):
    """Participants with several sessions, in families of up to three, some of which span two sites."""
    rng = np.random.default_rng(seed)
    people = pd.DataFrame(
        {
            "participant_id": [f"sub-{i:03d}" for i in range(n)],
            "family": [f"family-{i}" for i in rng.integers(n // 2, size=n)],
            "site": rng.choice(["A", "B", "C"], n),
            "age": rng.normal(40, 10, n),
            "sex": rng.choice(["female", "male"], n, p=[0.3, 0.7]),
        }
    )
    table = people.loc[people.index.repeat(sessions)].sample(frac=1, random_state=seed)
    return table.reset_index(drop=True)


def test_without_a_seed_the_last_identifiers_are_held_out():
    participants = [f"sub-{i // 2}" for i in range(12)]
    rows = hold_out(participants, n_test=2, n_validation=1)
    assert rows["train"].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows["validation"].tolist() == [6, 7]
    assert rows["test"].tolist() == [8, 9, 10, 11]
    shares = hold_out(participants, n_test=1 / 3, n_validation=0.01)
    assert all((shares[side] == rows[side]).all() for side in rows)
    assert len(hold_out(participants, n_test=2, n_validation=0)["validation"]) == 0


def test_a_random_division_keeps_families_and_proportions():
    table = cohort(200)
    table["site"] = np.where(table["participant_id"] < "sub-050", "small", "large")
    people = table["participant_id"]
    families = table["family"]
    how = {"n_test": 0.25, "n_validation": 10, "families": families, "strata": table["site"]}
    rows = hold_out(people, **how, seed=1)
    sides = [set(families.iloc[rows[side]]) for side in rows]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    assert sum(map(len, rows.values())) == len(table)
    assert 50 <= people.iloc[rows["test"]].nunique() <= 52
    assert 10 <= people.iloc[rows["validation"]].nunique() <= 12
    assert (table["site"].iloc[rows["test"]] == "small").mean() == pytest.approx(0.25, abs=0.06)
    again = hold_out(people, **how, seed=1)
    other = hold_out(people, **how, seed=2)
    assert (again["test"] == rows["test"]).all()
    assert set(other["test"]) != set(rows["test"])
    # Who is held out does not depend on the order of the scans.
    turned = hold_out(people[::-1], n_test=5, n_validation=5)
    assert set(people[::-1].iloc[turned["test"]]) == {f"sub-{i}" for i in range(195, 200)}


@pytest.mark.parametrize(
    ("n_test", "n_validation", "message"),
    [
        (4, 2, "got 4 and 2 of 6 participants"),
        (0.5, 0.5, "must leave a participant"),
        (1.0, 1, "shares below 1, got 1.0"),
        (-1, 1, "got -1"),
    ],
)
def test_a_division_without_anybody_to_train_on_is_refused(n_test, n_validation, message):
    with pytest.raises(DataError, match=message):
        hold_out([f"sub-{i}" for i in range(6)], n_test=n_test, n_validation=n_validation)


@pytest.mark.parametrize("target", ["sex", "age"])
def test_sessions_and_families_never_cross_and_everybody_is_tested_once_a_repeat(target):
    table = cohort()
    folds = repeated_folds(table, target, n_repeats=3, seed=1)
    tested = np.zeros((3, len(table)), int)
    for repeat, _, train, test in folds.split(table["participant_id"]):
        for column in ("participant_id", "family"):
            assert not set(table[column].iloc[train]) & set(table[column].iloc[test])
        assert len(train) + len(test) == len(table)  # no family is in two folds, so none is dropped
        tested[repeat, test] += 1
    assert (tested == 1).all()
    assert len({tuple(f) for f in folds.test_fold}) == 3  # drawn anew


def test_classes_are_spread_over_folds():
    table = cohort(200, 1)
    shares = [
        (table["sex"].iloc[test] == "male").mean()
        for _, _, _, test in repeated_folds(table, "sex", n_repeats=1).split(
            table["participant_id"]
        )
    ]
    assert np.ptp(shares) < 0.12


def test_sites_never_cross_and_a_family_of_two_sites_trains_neither():
    table = cohort()
    spanning = table.groupby("family")["site"].nunique()
    assert (spanning > 1).any()
    seen = []
    for _, fold, train, test in leave_one_site_out(table).split(table["participant_id"]):
        sites = set(table["site"].iloc[test])
        assert len(sites) == 1
        assert not sites & set(table["site"].iloc[train])
        assert not set(table["family"].iloc[test]) & set(table["family"].iloc[train])
        seen.append((fold, *sites))
    assert seen == [(0, "A"), (1, "B"), (2, "C")]


def test_inner_splits_keep_families_together():
    table = cohort()
    y = (table["sex"] == "male").to_numpy(float)
    for a, b in inner_splits(y, table["family"].to_numpy(), 3, 0):
        assert not set(table["family"].iloc[a]) & set(table["family"].iloc[b])


def test_the_digest_follows_who_is_where():
    table = cohort()
    folds, again = (repeated_folds(table, "sex", n_repeats=2, seed=3) for _ in range(2))
    other = repeated_folds(table, "sex", n_repeats=2, seed=4)
    assert folds.digest == again.digest != other.digest
    # The order of the people is no part of the division.
    turned = replace(
        folds,
        participants=folds.participants[::-1],
        families=folds.families[::-1],
        test_fold=folds.test_fold[:, ::-1],
    )
    assert turned.digest == folds.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(sex="male"), "one value only"),
        (
            lambda t: t[t["participant_id"] < "sub-004"].assign(family=None),
            r"2 families .* are fewer than 5 folds",
        ),
        (
            lambda t: t.assign(
                sex=np.where(t["participant_id"] < "sub-003", "female", "male"), family=None
            ),
            r"3 families \(of the smaller class\) are fewer than 5",
        ),
        (lambda t: t.assign(sex=t["sex"].where(t.index > 3)), "4 scans have no value"),
        (
            lambda t: t.assign(family=[str(i) for i in range(len(t))]),
            "family: participants .* have more than one",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        repeated_folds(change(cohort()), "sex")


def test_one_site_cannot_be_left_out():
    with pytest.raises(DataError, match="two sites or more"):
        leave_one_site_out(cohort().assign(site="A"))


def test_a_participant_without_a_fold_is_named():
    table = cohort()
    folds = repeated_folds(table, "sex", n_repeats=1)
    with pytest.raises(DataError, match="without a fold: \\['sub-new'\\]"):
        list(folds.split(["sub-new"]))


def test_families_are_text_whatever_their_column_holds():
    table = pd.DataFrame(
        {"participant_id": [f"sub-{i}" for i in range(6)], "family": [1, 1.0, "1", np.nan, "", 2]}
    )
    expected = ["1", "1", "1", "sub-3", "sub-4", "2"]
    assert families_of(table).tolist() == expected
    table = table.assign(family=[1, 1, 2, np.nan, 3, 4], sex=list("fmfmfm"))
    folds = repeated_folds(table, "sex", n_folds=2, n_repeats=1)
    assert folds.test_fold[0, 0] == folds.test_fold[0, 1]


def test_a_training_set_without_people_is_named():
    with pytest.raises(DataError, match="nobody is left"):
        inner_splits(np.zeros(0), np.zeros(0, str), 3, 0)
