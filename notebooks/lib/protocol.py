"""What a habit of evaluation is worth: the same features and labels, one habit at a time."""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.utils import compute_sample_weight

from mnemodyn.evaluate.study import Task
from mnemodyn.splits import inner_splits


@dataclass(frozen=True)
class Habit:
    """What is done otherwise than in this book.

    `oversample`: scans of the smaller class are repeated before the division until the classes are
    equal; here classes are weighted in training. `by_file`: scans are divided; here participants and
    families are. `best_epoch`: the epoch that does best on the test set is reported; here a part of
    the training set chooses it.
    """

    oversample: bool = False
    by_file: bool = False
    best_epoch: bool = False


OURS = "this book's protocol"
COLUMNS = {
    "balanced_accuracy": "balanced",
    "sd": "SD",
    "known": "known people",
    "n_test": "test scans",
}
HABITS = {
    OURS: Habit(),
    "best epoch on the test set": Habit(best_epoch=True),
    "split by file": Habit(by_file=True),
    "oversampled before the split": Habit(oversample=True, by_file=True),
    "all three": Habit(oversample=True, by_file=True, best_epoch=True),
}


def noise_task(
    n_participants: int, n_scans: int, n_features: int, share: float, seed: int
) -> tuple[np.ndarray, Task]:
    """Gaussian noise (scan, feature), `n_scans` of each participant, and labels that mean nothing.

    Half of the variance is a person's own, as scans of one person are alike; it has nothing to do
    with the label. `share` is that of the smaller class.
    """
    rng = np.random.default_rng(seed)
    person = rng.standard_normal((n_participants, n_features))
    labels = np.where(np.arange(n_participants) < round(share * n_participants), "a", "b")
    names = [f"sub-{i:04d}" for i in range(n_participants)]
    table = pd.DataFrame({"participant_id": names, "label": labels})
    table = table.loc[table.index.repeat(n_scans)].reset_index(drop=True)
    values = np.repeat(person, n_scans, axis=0) + rng.standard_normal((len(table), n_features))
    return values / np.sqrt(2), Task.of(table, "label", "classification")


def habits(
    values: np.ndarray,
    task: Task,
    *,
    n_splits: int = 10,
    epochs: int = 15,
    n_features: int = 300,
    seed: int = 0,
) -> pd.DataFrame:
    """One perceptron on values (scan, feature) of two classes, and five ways of telling how good it is.

    More features than `n_features` are projected at random. Each of `n_splits` random divisions is
    into four fifths and one fifth.

    Returns
    -------
    DataFrame
        ``protocol``; ``accuracy`` and ``balanced_accuracy`` (means over divisions); ``sd`` of the
        accuracy over divisions; ``known``, the share of test scans whose participant is trained on;
        ``n_test``.
    """
    rng = np.random.default_rng(seed)
    values = values.astype(np.float32)
    if values.shape[1] > n_features:
        values = values @ rng.standard_normal((values.shape[1], n_features), np.float32)
    values = (values - values.mean(0)) / values.std(0)
    rows = []
    for protocol, habit in HABITS.items():
        runs = [_once(values, task, habit, epochs, seed + split) for split in range(n_splits)]
        mean = np.mean(runs, axis=0)
        sd = np.std(runs, axis=0, ddof=1)
        row = {"protocol": protocol, "accuracy": mean[0], "balanced_accuracy": mean[1]}
        rows.append({**row, "sd": sd[0], "known": mean[2], "n_test": round(mean[3])})
    return pd.DataFrame(rows)


def as_shown(table: pd.DataFrame, whose: str) -> pd.DataFrame:
    """What `habits` found, as a page shows it: `whose` scans, and columns in words."""
    shown = table.rename(columns=COLUMNS)
    shown.insert(0, "data", whose)
    return shown


def _once(
    values: np.ndarray, task: Task, habit: Habit, epochs: int, seed: int
) -> tuple[float, float, float, int]:
    """Accuracy, balanced accuracy, share of test scans whose participant is trained on, test scans."""
    rng = np.random.default_rng(seed)
    y = task.y.astype(int)
    people = task.people.to_numpy()
    rows = np.arange(len(y))
    if habit.oversample:
        smaller = int(y.mean() < 0.5)
        n_more = (y != smaller).sum() - (y == smaller).sum()
        rows = np.concatenate([rows, rng.choice(rows[y == smaller], n_more)])
    train, test = _divide(rows, task, habit, seed)
    fit, choose = train, test
    if not habit.best_epoch:
        fit, choose = _divide(train, task, habit, seed)
    score = accuracy_score if habit.best_epoch else balanced_accuracy_score
    weights = compute_sample_weight("balanced", y[fit])
    model = MLPClassifier((64,), batch_size=16, learning_rate_init=2e-3, random_state=seed)
    best = -1.0
    for _ in range(epochs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.partial_fit(values[fit], y[fit], classes=[0, 1], sample_weight=weights)
        found = score(y[choose], model.predict(values[choose]))
        if found > best:
            best = found
            kept = model.predict(values[test])
    known = np.isin(people[test], people[train]).mean()
    balanced = balanced_accuracy_score(y[test], kept)
    return accuracy_score(y[test], kept), balanced, known, len(test)


def _divide(rows: np.ndarray, task: Task, habit: Habit, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Four fifths and one fifth of some scans."""
    if habit.by_file:
        return train_test_split(rows, test_size=0.2, stratify=task.y[rows], random_state=seed)
    train, test = inner_splits(task.y[rows], task.families[rows], 5, seed)[0]
    return rows[train], rows[test]


def smallest_sd(accuracy: float, n: int) -> float:
    r"""SD that the draw of `n` test people alone gives an accuracy in [0, 1]: :math:`\sqrt{a (1 - a) / n}`."""
    return float(np.sqrt(accuracy * (1 - accuracy) / n))


def people_for_sd(accuracy: float, sd: float) -> float:
    r"""Test people at which their draw alone gives an accuracy this SD: :math:`n = a (1 - a) / s^2`."""
    return accuracy * (1 - accuracy) / sd**2
