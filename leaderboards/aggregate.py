"""Aggregates gains over tasks: each method's gain on every task, the interquartile mean, and how often it beats a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..bench import registry
from ..bench.errors import UserError
from ..bench.stats import intervals, resampling
from ..bench.stats.aggregate import iqm, probability_of_improvement
from ..bench.stats.intervals import Contrast, Estimate
from .board import BASE, Board
from .build_board import build_board
from .rows import runs_by_row
from .runs import Array, LoadedRun, strata_or_none

RULES = (
    "Gain: after minus before by each task's ranking scorer on the same noise, in standard deviations of the base's scores between "
    "prompts, which puts tasks on one scale. IQM: the mean of the middle half of all gains of seeds and tasks (arXiv 2108.13264). "
    "Better than: how often a seed of the row gains more than one of the baseline, ties half, the mean over tasks.",
    "Intervals are 95 %, prompts and seeds resampled within tasks; another choice of tasks is not in them. Sorted by IQM, not ranked.",
)
Gains = Mapping[str, Mapping[int, Array]]  # label -> seed -> (prompts,) in standard deviations


@dataclass(frozen=True)
class AggregateRow:
    """Results of one method over all tasks."""

    label: str
    seeds: tuple[int, ...]
    gains: Mapping[str, Estimate]  # task -> the mean over seeds
    middle: Estimate  # IQM
    improvement: Estimate | None  # probability of improvement over the baseline; None for itself


@dataclass(frozen=True)
class AggregateTable:
    """Table of the methods that have runs of all tasks, by falling IQM."""

    model: str
    baseline: str
    keys: Mapping[str, str]  # task -> the scorer/metric that its gain is measured by
    rows: tuple[AggregateRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _TaskGains:
    """Gains of the rows that have runs of all tasks, as means over prompts."""

    runs: dict[str, Array]  # label -> (runs, tasks)
    drawn: dict[str, Array]  # label -> (resamples, runs, tasks): the same under resamples of the prompts
    by_task: dict[str, dict[str, Estimate]]  # label -> task -> the mean over seeds


def aggregate(
    runs: Sequence[LoadedRun], baseline: str = BASE, *, resamples: int = 10_000, notes: Sequence[str] = ()
) -> AggregateTable:
    """Aggregate runs of several tasks with one model; each task's runs must belong in one table.

    A row that lacks a task, or a seed on some task, is left out and named. Raises UserError where there are fewer than two
    tasks, models differ, no row has all tasks, or the baseline is no row.
    """
    tasks = sorted({run.record.task for run in runs})
    if len(tasks) < 2:
        raise UserError(f"--across aggregates several tasks; these runs are of {' and '.join(tasks) or 'none'}")
    if len(models := sorted({run.record.model for run in runs})) > 1:
        raise UserError(f"these runs are of several models, {', '.join(models)}: a table never mixes them")
    parts = {task: [run for run in runs if run.record.task == task] for task in tasks}
    boards = {task: build_board(part) for task, part in parts.items()}
    gains = {task: _gains(boards[task], part) for task, part in parts.items()}
    labels = dict.fromkeys(label for by_label in gains.values() for label in by_label)
    by_label = {label: [gains[task].get(label, {}) for task in tasks] for label in labels}
    complete = {label: by for label, by in by_label.items() if all(set(seeds) == set(by[0]) for seeds in by)}
    notes = list(notes)
    if excluded := [label for label in labels if label not in complete]:
        notes.append(f"Not on all tasks with the same seeds, and left out: {', '.join(sorted(excluded))}.")
    if not complete:
        raise UserError(f"no method has runs of the same seeds on {' and '.join(tasks)}")
    caveats = ("hack", "scored", "by a fault")
    notes += [
        f"{task}: {note}" for task in tasks for note in boards[task].notes if any(word in note for word in caveats)
    ]
    if baseline not in {BASE, *complete}:
        raise registry.unknown("baseline", baseline, [BASE, *complete])
    strata = {task: strata_or_none(part[0].strata) for task, part in parts.items()}
    rows = _rows(complete, _task_gains(complete, tasks, strata, resamples), baseline)
    return AggregateTable(models[0], baseline, {task: boards[task].key for task in tasks}, tuple(rows), tuple(notes))


def _rows(
    complete: Mapping[str, Sequence[Mapping[int, Array]]], gains: _TaskGains, baseline: str
) -> list[AggregateRow]:
    rows: list[AggregateRow] = []
    for label in complete:
        middle = iqm(gains.runs[label], drawn=gains.drawn[label])
        better = None
        if label != baseline:
            both = gains.drawn[label], gains.drawn[baseline]
            better = probability_of_improvement(gains.runs[label], gains.runs[baseline], drawn=both)
        rows.append(AggregateRow(label, tuple(sorted(complete[label][0])), gains.by_task[label], middle, better))
    return sorted(rows, key=lambda row: (-row.middle.mean, row.label))


def _gains(table: Board, runs: Sequence[LoadedRun]) -> Gains:
    """Compute the gain of each run of the ranked rows on every prompt."""
    key = table.key
    base = next(run.before[key] for run in runs if key in run.before)
    spread = float(np.nanstd(intervals.per_prompt(base), ddof=1))
    if not spread > 0:
        raise UserError(
            f"{table.task}: {key} gives the base the same score on every prompt, so its gains have no scale"
        )
    ranked = runs_by_row([row for row in table.rows if row.rank and row.folders], runs)
    return {
        label: {run.record.seed: intervals.per_prompt(run.gain(key)) / spread for run in group}
        for label, group in ranked.items()
    }


def _task_gains(
    complete: Mapping[str, Sequence[Mapping[int, Array]]],
    tasks: Sequence[str],
    strata: Mapping[str, Sequence[str] | None],
    resamples: int,
) -> _TaskGains:
    tables = {label: np.empty((len(by[0]), len(tasks))) for label, by in complete.items()}
    drawn = {label: np.empty((resamples, *table.shape)) for label, table in tables.items()}
    by_task: dict[str, dict[str, Estimate]] = {label: {} for label in complete}
    for k, task in enumerate(tasks):
        seeds = {label: [by[k][seed] for seed in sorted(by[k])] for label, by in complete.items()}
        columns = [vector for vectors in seeds.values() for vector in vectors]
        means = iter(intervals.crossed([Contrast([x], spreads=[None]) for x in columns], strata=strata[task]))
        redrawn = iter(resampling.resampled_means(np.stack(columns, axis=1), resamples, strata=strata[task]).T)
        spreads = intervals.table_spreads(seeds, strata[task])
        estimates = intervals.crossed(
            [Contrast(vectors, spreads=[spreads[label]]) for label, vectors in seeds.items()], strata=strata[task]
        )
        for (label, vectors), estimate in zip(seeds.items(), estimates, strict=True):
            by_task[label][task] = estimate
            for s in range(len(vectors)):
                tables[label][s, k], drawn[label][:, s, k] = next(means).mean, next(redrawn)
    # The base's gain is exactly 0.
    tables[BASE], drawn[BASE] = np.zeros((2, len(tasks))), np.zeros((resamples, 2, len(tasks)))
    return _TaskGains(tables, drawn, by_task)
