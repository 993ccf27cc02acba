"""Ranking chooses the same key for every command, and rows share a rank unless they differ significantly."""

from __future__ import annotations

import math

import pytest

from gpobench.bench import registry
from gpobench.bench.evaluation.ranking import (
    MANDATORY_BASELINES,
    binary_metric,
    key_order,
    order_by_mean,
    primary_key,
    ranks,
    significant_pairs,
)
from gpobench.bench.stats.intervals import Estimate


@pytest.mark.parametrize(
    ("roles", "key"),
    [
        ({"t/exact": "training", "b/soft": "held-out", "b/exact": "held-out", "c/exact": "held-out"}, "b/exact"),
        ({"t/soft": "training", "t/correct": "training", "q/score": "quality"}, "t/correct"),
        ({"q/score": "quality", "p/score": "quality"}, "q/score"),
        ({}, None),
    ],
)
def test_the_first_held_out_scorer_ranks(roles: dict[str, str], key: str | None) -> None:
    assert primary_key(roles) == key


def test_the_training_key_is_found_beside_held_out_ones() -> None:
    roles = {"t/soft": "training", "t/exact": "training", "a/exact": "held-out"}
    assert primary_key(roles, preferred=("training",)) == "t/exact"


def test_binary_metrics_come_first() -> None:
    assert sorted(["a/soft", "a/correct", "a/alpha"], key=key_order) == ["a/correct", "a/alpha", "a/soft"]
    assert binary_metric(["soft", "correct"]) == "correct" and binary_metric(["soft"]) is None


def test_mandatory_baselines_are_registered() -> None:
    assert set(MANDATORY_BASELINES) <= set(registry.entries("method"))


def test_rows_without_a_significant_difference_have_overlapping_ranks() -> None:
    order = order_by_mean({"c": 0.1, "a": 0.3, "b": 0.2, "d": math.nan})
    assert order == ["a", "b", "c"]
    shown = lambda better: {label: str(rank) for label, rank in ranks(order, better).items()}
    assert shown(set()) == {"a": "1-3", "b": "1-3", "c": "1-3"}
    assert shown({("a", "c")}) == {"a": "1-2", "b": "1-3", "c": "2-3"}
    assert shown({("a", "b"), ("a", "c")}) == {"a": "1", "b": "2-3", "c": "2-3"}


def test_p_is_corrected_over_all_pairs() -> None:
    tested = lambda mean, p: Estimate(mean, mean - 1, mean + 1, 9, p=p)
    pairs = {("a", "b"): tested(0.1, 0.03), ("a", "c"): tested(0.2, 0.001), ("b", "c"): tested(-0.1, 0.001)}
    assert significant_pairs(pairs) == {("a", "b"), ("a", "c")}
    assert significant_pairs({("a", "b"): tested(0.1, 0.03), ("b", "c"): tested(0.1, 0.5)}) == set()
