"""How good the model is: reconstruction of hidden entries, and targets predicted from scans."""

from mnemodyn.results import METHODS as LABELS  # noqa: F401  until the pages use mnemodyn.results
