"""A short part of every campaign; ``python -m tests.campaigns`` runs them whole."""

import tempfile
from pathlib import Path

import pytest

from tests.campaigns.common import in_memory, run
from tests.campaigns.family import Family
from tests.campaigns.fuzz import Fuzz
from tests.campaigns.kill import Kill
from tests.campaigns.leak import Leak
from tests.campaigns.payload import CASES, Payload

# One of each case that needs no kernel of a notebook, which takes seconds to start.
QUICK = {}
for number, (name, _, _) in enumerate(CASES):
    if "notebook" not in name and "of a run" not in name:
        QUICK.setdefault(name, number)


@pytest.mark.parametrize(
    ("campaign", "numbers"),
    [
        (Fuzz(), range(250)),
        (Payload(), list(QUICK.values())),
        (Kill("convert", "embed"), range(2)),
        # Evaluations by the quicker methods, and one of each other kind.
        (Leak(), [1, 3, 4, 5, 9, 10, 11, 14, 33]),
        (Family(), range(10)),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_a_short_part_finds_nothing(campaign, numbers):
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=in_memory()) as scratch:
        outcome = run(campaign, numbers, Path(scratch), None)
    assert outcome.counts.total() == len(numbers)
    assert not outcome.findings, str(outcome)
