"""Evaluation: the evaluator, its cache, search at inference, records and plots."""
