"""Ranking: which scorer/metric ranks a table, which rows every table must have, and between which ranks a row lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..stats.intervals import Estimate
from ..stats.law import RankInterval, holm, rank_intervals
from .record import Record

# A method that does not beat these needs no reinforcement learning. The base model itself is evaluated in every run.
MANDATORY_BASELINES = ("sft", "best-of-n")
BINARY_METRICS = ("exact", "correct")  # 1 = right, 0 = wrong
VERDICTS = (*BINARY_METRICS, "strict")  # all metrics of that kind; any other is graded
SIGNIFICANCE = 0.05  # the probability that a table of equal methods tells two of them apart
RANK_RULE = (
    "Rank: an interval. At best one more than the number of rows that beat a row, at worst the number of rows less those that it "
    "beats. One row beats another where the paired difference, by prompt and image on the same noise, is significant at 5 %, corrected "
    "over all pairs of rows (Holm); who beats a winner beats the loser. In 95 % of tables all true ranks lie in their intervals. Rows are "
    "sorted by mean."
)


def binary_metric(metrics: Iterable[str]) -> str | None:
    """The metric of a scorer that is 1 for a right image and 0 for a wrong one; None if it has no such metric."""
    names = list(metrics)
    return next((metric for metric in BINARY_METRICS if metric in names), None)


def key_order(key: str) -> tuple[str, bool, str]:
    """Sort key of a `scorer/metric`: by scorer, then its graded metrics by name, then its verdicts."""
    scorer, _, metric = key.partition("/")
    return scorer, metric in VERDICTS, metric


def primary_key(
    roles: Mapping[str, str], stated: str = "", preferred: Sequence[str] = ("held-out", "training")
) -> str | None:
    """The `scorer/metric` that ranks a table: the task's, else the first graded one of the held-out scorers, the training scorer, any.

    Methods were not trained on a held-out scorer, and best-of-n did not select images by it. A graded metric tells more apart
    than a verdict of 0 or 1.

    Args:
        roles: `scorer/metric` -> the role of its scorer.
        stated: what the task or the record states; it counts where the scorer is held out.
        preferred: roles, the first one first.
    """
    if roles.get(stated) == "held-out":
        return stated
    for role in preferred:
        keys = [key for key in roles if roles[key] == role]
        if keys:
            return min(keys, key=key_order)
    return next(iter(roles), None)


def record_key(record: Record) -> str | None:
    """The `scorer/metric` by which runs like this one are ranked: what the record states; in one that states none, by the rule."""
    roles = {key: use.role for key in record.delta if (use := record.scorers.get(key.partition("/")[0]))}
    return record.key or primary_key(roles)


def verdict_beside(key: str, keys: Iterable[str]) -> str | None:
    """The verdict of 0 or 1 by the scorer of a graded key, which tables show beside it; None where there is none."""
    scorer, _, metric = key.partition("/")
    binary = binary_metric(other.partition("/")[2] for other in keys if other.partition("/")[0] == scorer)
    return None if binary is None or metric in VERDICTS else f"{scorer}/{binary}"


def order_by_mean(means: Mapping[str, float]) -> list[str]:
    """Labels by falling mean, equal means by label; a label without a finite mean is left out."""
    finite = {label: mean for label, mean in means.items() if math.isfinite(mean)}
    return sorted(finite, key=lambda label: (-finite[label], label))


def significant_pairs(differences: Mapping[tuple[str, str], Estimate]) -> set[tuple[str, str]]:
    """The pairs (above, below) of which the first is significantly better; p is Holm-corrected over all pairs."""
    corrected = holm([math.nan if e.p is None else e.p for e in differences.values()])
    return {
        pair for (pair, e), p in zip(differences.items(), corrected, strict=True) if e.mean > 0 and p < SIGNIFICANCE
    }


def ranks(order: Sequence[str], better: set[tuple[str, str]]) -> dict[str, RankInterval]:
    """Return the interval of each label's rank; better: the pairs (above, below) that differ significantly."""
    return rank_intervals(order, better)
