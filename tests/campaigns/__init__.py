"""Campaigns: many random trials of what must hold for any input, run on demand.

``python -m tests.campaigns all`` runs them as long as a release deserves; the suite runs a few trials of each. A trial
is known by its campaign and number alone: ``python -m tests.campaigns fuzz --seed 1234 --count 1`` repeats trial 1234.
"""
