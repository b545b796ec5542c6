"""Windows drawn by number: which scan and frame they are from, and what a draw costs."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.pretrain.objectives import Masked
from mnemodyn.pretrain.windows import RandomWindows

LENGTHS = (10, 64, 11, 200, 10)


class Drawn(RandomWindows):
    """What would be cut."""

    def cut(self, which: int, start: int, seed: int, *, training: bool) -> dict:
        return {"which": which, "start": start, "seed": seed}


def drawn(lengths=LENGTHS, seed=3):
    scans = [
        Scan(f"sub-{i}", np.zeros((n, 2), np.float32), 1.0, ("a", "b"))
        for i, n in enumerate(lengths)
    ]
    return Drawn(scans, Scaling("raw"), Masked(), 10, seed)


def test_a_draw_is_that_of_numpys_choice_by_length():
    windows, starts = drawn(), np.array(LENGTHS) - 9
    for draw in [*range(200), 10**9]:
        rng = np.random.default_rng([3, draw])
        which = rng.choice(len(LENGTHS), p=starts / starts.sum())
        expected = {
            "which": which,
            "start": rng.integers(starts[which]),
            "seed": rng.integers(2**62),
        }
        assert windows[draw] == expected
    assert drawn()[17] == windows[17]
    assert [drawn(seed=4)[i] for i in range(9)] != [windows[i] for i in range(9)]


def test_every_window_is_as_likely_as_any_other():
    windows = drawn((10, 12, 15))
    found = [windows[i] for i in range(20_000)]
    counts = np.unique([(d["which"], d["start"]) for d in found], axis=0, return_counts=True)[1]
    assert len(counts) == 1 + 3 + 6
    assert np.abs(counts - 2_000).max() < 5 * np.sqrt(2_000)


def test_a_draw_does_not_pass_over_all_scans():
    def seconds(n):
        many = [
            SimpleNamespace(
                participant_id="a",
                session="",
                n_frames=20,
                censored=None,
                t_r=1.0,
                parcels=("a",),
                source="",
            )
        ] * n
        windows = Drawn(many, Scaling("raw"), Masked(), 10, 0)
        best = np.inf
        for _ in range(20):
            start = time.perf_counter()
            for draw in range(50):
                windows[draw]
            best = min(best, time.perf_counter() - start)
        return best

    # About 1, and 4 on a busy machine; a pass over all scans takes some 100 times as long.
    assert seconds(100_000) < 20 * seconds(10)


@pytest.mark.parametrize("lengths", [(10,), (10, 10)])
def test_scans_of_one_window(lengths):
    windows = drawn(lengths)
    assert {windows[i]["start"] for i in range(20)} == {0}
    assert {windows[i]["which"] for i in range(20)} == set(range(len(lengths)))
