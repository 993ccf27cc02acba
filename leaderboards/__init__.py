"""Builds tables, curves and verdicts from the records of runs."""
