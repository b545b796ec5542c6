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

from mnemodyn.evaluate.downstream import Task
from mnemodyn.splits import inner_splits


@dataclass(frozen=True)
class Habit:
    """What is done otherwise than here.

    `oversample`: scans of the smaller class are repeated until the classes are equal, before the division; here classes
    are weighted in training. `by_file`: scans are divided, not participants and families. `best_epoch`: the epoch that
    does best on the test set is reported; here a part of the training set chooses it.
    """

    oversample: bool = False
    by_file: bool = False
    best_epoch: bool = False


HABITS = {
    "this book's protocol": Habit(),
    "best epoch on the test set": Habit(best_epoch=True),
    "split by file": Habit(by_file=True),
    "oversampled before the split": Habit(oversample=True, by_file=True),
    "all three": Habit(True, True, True),
}


def noise_task(
    n_participants: int, n_scans: int, n_features: int, share: float, seed: int
) -> tuple[np.ndarray, Task]:
    """Gaussian noise (scan, feature), `n_scans` of each participant, and labels that mean nothing.

    Half of the variance is a person's own, as scans of one person are alike; none of it has to do with the label.
    `share` is that of the smaller class.
    """
    rng = np.random.default_rng(seed)
    person = rng.standard_normal((n_participants, n_features))
    labels = np.where(np.arange(n_participants) < round(share * n_participants), "a", "b")
    table = pd.DataFrame(
        {"participant_id": [f"sub-{i:04d}" for i in range(n_participants)], "label": labels}
    )
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
) -> list[dict]:
    """One perceptron on values (scan, feature) of a task of two classes, and five ways of telling how good it is.

    More features than `n_features` are projected at random, which knows no labels. `n_splits` random divisions are into
    four fifths and one fifth.

    Returns
    -------
    list of dict
        ``protocol``; ``accuracy`` and ``balanced_accuracy`` (means over divisions), ``sd`` (of the accuracy over
        them); ``known``, the share of test scans whose participant is trained on; ``n_test``.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(values, np.float32)
    if values.shape[1] > n_features:
        values = values @ rng.standard_normal((values.shape[1], n_features), np.float32)
    values = (values - values.mean(0)) / values.std(0).clip(1e-6)
    rows = []
    for name, habit in HABITS.items():
        found = np.array(
            [_once(values, task, habit, epochs, seed + split) for split in range(n_splits)]
        )
        accuracy, balanced, known, n_test = found.mean(0)
        numbers = {
            "accuracy": accuracy,
            "balanced_accuracy": balanced,
            "sd": found[:, 0].std(ddof=1),
            "known": known,
        }
        rows.append(
            {"protocol": name, **{k: float(v) for k, v in numbers.items()}, "n_test": round(n_test)}
        )
    return rows


def _once(values: np.ndarray, task: Task, habit: Habit, epochs: int, seed: int) -> tuple:
    """Accuracy, balanced accuracy, share of test scans whose participant is known, and number of test scans."""
    rng = np.random.default_rng(seed)
    y, people = task.y.astype(int), task.table["participant_id"].to_numpy()

    def divide(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if habit.by_file:
            return train_test_split(rows, test_size=0.2, stratify=y[rows], random_state=seed)
        train, test = inner_splits(task.y[rows], task.families[rows], 5, seed)[0]
        return rows[train], rows[test]

    rows = np.arange(len(y))
    if habit.oversample:
        small = int(y.mean() < 0.5)
        rows = np.concatenate(
            [rows, rng.choice(rows[y == small], (y != small).sum() - (y == small).sum())]
        )
    train, test = divide(rows)
    fit, choose = (train, test) if habit.best_epoch else divide(train)
    weights = compute_sample_weight("balanced", y[fit])
    model = MLPClassifier((64,), batch_size=16, learning_rate_init=2e-3, random_state=seed)
    score = accuracy_score if habit.best_epoch else balanced_accuracy_score
    best, kept = -1.0, np.zeros(len(test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for _ in range(epochs):
            model.partial_fit(values[fit], y[fit], classes=[0, 1], sample_weight=weights)
            found = score(y[choose], model.predict(values[choose]))
            if found > best:
                best, kept = found, model.predict(values[test])
    known = np.isin(people[test], people[train]).mean()
    return accuracy_score(y[test], kept), balanced_accuracy_score(y[test], kept), known, len(test)


def people_for_sd(accuracy: float, sd: float) -> float:
    """Test people that are needed before the draw of them alone gives an accuracy in [0, 1] no more than this SD.

    .. math:: n = a (1 - a) / s^2
    """
    if not 0 <= accuracy <= 1 or not sd > 0:
        raise ValueError(f"accuracy must be in [0, 1] and sd > 0, got {accuracy} and {sd}")
    return accuracy * (1 - accuracy) / sd**2
