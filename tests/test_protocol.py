"""Each habit does to pure noise what it is said to do, and ours does nothing."""

import numpy as np
import pytest

from mnemodyn.evaluate.protocol import habits, noise_task, people_for_sd
from mnemodyn.evaluate.scores import smallest_sd


def test_habits_make_accuracy_from_noise_and_the_protocol_does_not():
    values, task = noise_task(120, 2, 60, share=0.25, seed=0)
    rows = {row["protocol"]: row for row in habits(values, task, n_splits=5, epochs=8, seed=0)}
    ours = rows["this book's protocol"]
    assert abs(ours["balanced_accuracy"] - 0.5) < 0.1
    assert ours["known"] == 0
    assert rows["split by file"]["balanced_accuracy"] > ours["balanced_accuracy"] + 0.05
    assert rows["split by file"]["known"] > 0.8
    assert rows["oversampled before the split"]["accuracy"] > 0.7
    assert rows["best epoch on the test set"]["accuracy"] > ours["accuracy"]
    assert rows["all three"]["accuracy"] >= rows["oversampled before the split"]["accuracy"] - 0.02


def test_noise_has_no_more_in_it_than_is_said():
    values, task = noise_task(400, 2, 50, share=0.3, seed=1)
    assert task.y.mean() == pytest.approx(0.7)
    assert values.var() == pytest.approx(1, abs=0.05)
    halves = [np.concatenate([values[i::2].ravel()]) for i in (0, 1)]
    assert np.corrcoef(halves)[0, 1] == pytest.approx(0.5, abs=0.03)


def test_the_smallest_sd_is_that_of_drawing_people():
    draws = np.random.default_rng(0).binomial(200, 0.8, 20000) / 200
    assert smallest_sd(0.8, 200) == pytest.approx(draws.std(), rel=0.02)
    assert people_for_sd(0.8, smallest_sd(0.8, 200)) == pytest.approx(200)
    with pytest.raises(ValueError, match="sd > 0"):
        people_for_sd(0.8, 0)
