"""Run campaigns: python -m tests.campaigns [fuzz|payload|kill|leak|family|all]."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from tests.campaigns.common import in_memory, run
from tests.campaigns.family import Family
from tests.campaigns.fuzz import Fuzz
from tests.campaigns.kill import Kill
from tests.campaigns.leak import Leak
from tests.campaigns.payload import Payload

CAMPAIGNS = {made.name: made for made in (Fuzz(), Payload(), Kill(), Leak(), Family())}


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for, and say what came of it; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("campaign", nargs="?", choices=[*CAMPAIGNS, "all"], default="all")
    parser.add_argument("--count", type=int, help="trials; by default those of a whole campaign")
    parser.add_argument("--seed", type=int, default=0, help="number of the first trial")
    text = "folder that gets the files of every trial with a finding"
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help=text)
    asked = parser.parse_args(arguments)
    # Threads would not live through the forks, and the networks are too small for them.
    torch.set_num_threads(1)
    names = list(CAMPAIGNS) if asked.campaign == "all" else [asked.campaign]
    n_findings = 0
    for name in names:
        campaign = CAMPAIGNS[name]
        count = campaign.count if asked.count is None else asked.count
        numbers = range(asked.seed, asked.seed + count)
        with tempfile.TemporaryDirectory(prefix="campaign-", dir=in_memory()) as scratch:
            outcome = run(campaign, numbers, Path(scratch), asked.keep)
        print(outcome, flush=True)
        n_findings += len(outcome.findings)
    return int(n_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
