"""Transfer ratios and hack flags of a board's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..bench.evaluation import record
from ..bench.evaluation.transfer import FlagKeys, RunScores, Transfer, flag_keys, hack_reasons, transfers
from ..bench.stats.intervals import Estimate
from .contrasts import BoardScores, Question
from .runs import LoadedRun


def row_transfers(scores: BoardScores, task_key: str) -> dict[str, tuple[Transfer, ...]]:
    """Map label to the transfer ratios of a row, that of the task's key first. A row that is no result says nothing of others."""
    keys = _keys(scores, task_key)
    if keys is None:
        return {}
    runs = {label: [RunScores(r.before, r.after) for r in group] for label, group in scores.groups.items()}
    faulty = [label for label, group in scores.groups.items() if any(record.disqualification(r.record) for r in group)]
    parts = [[label for label in runs if label not in faulty], *([label] for label in faulty)]
    return {
        label: each
        for part in parts
        for label, each in zip(part, transfers([runs[label] for label in part], keys, scores.strata), strict=True)
    }


def flags_of_rows(
    scores: BoardScores, of_rows: Mapping[str, Sequence[Transfer]], estimates: Mapping[Question, Estimate]
) -> dict[str, tuple[str, ...]]:
    """Map label to the reasons of a row's hack flag. A row of one seed whose spread is unknown is judged as that run alone."""
    keys = _keys(scores, scores.key)  # quality does not depend on what ranks
    flags: dict[str, tuple[str, ...]] = {}
    for label, transferred in of_rows.items():
        quality: dict[str, tuple[float, float | None]] = {}
        for key in keys.quality if keys else ():
            estimate = estimates.get((label, key, "delta"))
            if estimate is not None:
                quality[key] = (estimate.mean, _p(estimate, scores.groups[label], key))
        flags[label] = hack_reasons(transferred, quality)
    return flags


def _p(estimate: Estimate, group: Sequence[LoadedRun], key: str) -> float | None:
    """Return the p of a row's gain; of one run whose seeds are unknown, that of its record."""
    delta = group[0].record.delta.get(key)
    return delta.p if estimate.p is None and len(group) == 1 and delta else estimate.p


def _keys(scores: BoardScores, task_key: str) -> FlagKeys | None:
    runs = [run for group in scores.groups.values() for run in group]
    uses = {name: use for run in runs for name, use in run.record.scorers.items()}
    return flag_keys(uses, [c.key for c in scores.columns], task_key)
