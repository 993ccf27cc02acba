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
    verdict_beside,
)
from gpobench.bench.stats.intervals import Estimate


@pytest.mark.parametrize(
    ("roles", "key"),
    [
        ({"t/exact": "training", "b/soft": "held-out", "b/exact": "held-out", "c/soft": "held-out"}, "b/soft"),
        ({"t/soft": "training", "b/exact": "held-out", "b/strict": "held-out"}, "b/exact"),
        ({"t/soft": "training", "t/correct": "training", "q/score": "quality"}, "t/soft"),
        ({"q/score": "quality", "p/score": "quality"}, "q/score"),
        ({}, None),
    ],
)
def test_the_first_graded_metric_of_the_held_out_scorers_ranks(roles: dict[str, str], key: str | None) -> None:
    assert primary_key(roles) == key


def test_the_training_key_is_found_beside_held_out_ones() -> None:
    roles = {"t/soft": "training", "t/exact": "training", "a/exact": "held-out"}
    assert primary_key(roles, preferred=("training",)) == "t/soft"


def test_a_stated_key_ranks_where_its_scorer_is_held_out() -> None:
    roles = {"t/soft": "training", "a/soft": "held-out", "b/exact": "held-out", "b/soft": "held-out"}
    assert primary_key(roles, "b/exact") == "b/exact"
    assert primary_key(roles, "t/soft") == primary_key(roles, "gone/soft") == "a/soft"


def test_a_verdict_stands_beside_a_graded_key() -> None:
    keys = ["b/strict", "b/correct", "b/partial", "a/exact"]
    assert verdict_beside("b/partial", keys) == "b/correct"
    assert verdict_beside("b/correct", keys) is None and verdict_beside("a/soft", ["b/exact"]) is None


def test_graded_metrics_come_first() -> None:
    assert sorted(["a/soft", "a/correct", "a/alpha"], key=key_order) == ["a/alpha", "a/soft", "a/correct"]
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
