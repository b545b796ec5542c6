"""Scans, their scaling and their participants."""
