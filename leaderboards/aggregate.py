"""Several tasks in one table: what a method gains on each, in the middle over all of them, and how often it beats another."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len

from ..bench import registry
from ..bench.errors import UserError
from ..bench.stats import intervals, resampling
from ..bench.stats.aggregate import iqm, probability_of_improvement
from ..bench.stats.intervals import Contrast, Estimate
from .board import BASE, Board, LoadedRun, board
from .render import cell, escape_markdown, plain

Array = NDArray[np.float64]
FORMATS = ("terminal", "md", "csv", "json")
RULES = (
    "Gain: after minus before by each task's ranking scorer on the same noise, in standard deviations of the base's scores between "
    "prompts, which puts tasks on one scale. IQM: the mean of the middle half of all gains of seeds and tasks (arXiv 2108.13264). "
    "Better than: how often a seed of the row gains more than one of the baseline, ties half, the mean over tasks.",
    "Intervals are 95 %, prompts and seeds resampled within tasks; another choice of tasks is not in them. Sorted by IQM, not ranked.",
)


@dataclass(frozen=True)
class AggregateRow:
    """A method over all tasks."""

    label: str
    seeds: tuple[int, ...]
    gains: Mapping[str, Estimate]  # task -> the mean over seeds
    middle: Estimate  # IQM
    improvement: Estimate | None  # over the baseline; None for itself


@dataclass(frozen=True)
class Across:
    """The table."""

    model: str
    baseline: str
    keys: Mapping[str, str]  # task -> the scorer/metric that its gain is measured by
    lines: tuple[AggregateRow, ...]
    notes: tuple[str, ...]


def across(
    runs: Sequence[LoadedRun], baseline: str = BASE, *, resamples: int = 10_000, notes: Sequence[str] = ()
) -> Across:
    """Sum up runs of several tasks with one model; each task's runs must belong in one table.

    A row that lacks a task, or a seed on some task, is left out and named. Raises UserError where fewer than two tasks are
    there, models differ, no row has all tasks, or the baseline is no row.
    """
    tasks = sorted({run.record.task for run in runs})
    if len(tasks) < 2:
        raise UserError(f"--across sums up several tasks; these runs are of {' and '.join(tasks) or 'none'}")
    if len(models := sorted({run.record.model for run in runs})) > 1:
        raise UserError(f"these runs are of several models, {', '.join(models)}: a table never mixes them")
    parts = {task: [run for run in runs if run.record.task == task] for task in tasks}
    boards = {task: board(mine, resamples=1) for task, mine in parts.items()}
    gains = {task: _gains(boards[task], mine) for task, mine in parts.items()}
    labels = dict.fromkeys(label for by in gains.values() for label in by)
    whole = {label: [gains[task].get(label, {}) for task in tasks] for label in labels}
    kept = {label: by for label, by in whole.items() if all(set(one) == set(by[0]) for one in by)}
    said = list(notes)
    if left := [label for label in labels if label not in kept]:
        said.append(f"Not on all tasks with the same seeds, and left out: {', '.join(sorted(left))}.")
    if not kept:
        raise UserError(f"no method has runs of the same seeds on {' and '.join(tasks)}")
    said += [f"{task}: {note}" for task in tasks for note in boards[task].notes if "hack" in note or "scored" in note]
    if baseline not in {BASE, *kept}:
        raise registry.unknown("baseline", baseline, [BASE, *kept])
    strata = {task: list(s) if len(set(s := mine[0].strata)) > 1 else None for task, mine in parts.items()}
    tables, drawn, over = _numbers(kept, tasks, strata, resamples)
    # the base gains nothing, for sure
    tables[BASE], drawn[BASE] = np.zeros((2, len(tasks))), np.zeros((resamples, 2, len(tasks)))
    lines: list[AggregateRow] = []
    for label in kept:
        middle = iqm(tables[label], drawn=drawn[label])
        better = None
        if label != baseline:
            both = drawn[label], drawn[baseline]
            better = probability_of_improvement(tables[label], tables[baseline], drawn=both)
        lines.append(AggregateRow(label, tuple(sorted(kept[label][0])), over[label], middle, better))
    lines.sort(key=lambda line: (-line.middle.mean, line.label))
    return Across(models[0], baseline, {task: boards[task].key for task in tasks}, tuple(lines), tuple(said))


Gains = Mapping[str, Mapping[int, Array]]  # label -> seed -> (prompts,) in standard deviations


def _gains(table: Board, runs: Sequence[LoadedRun]) -> Gains:
    """What each run of the ranked rows gained on every prompt."""
    key, by_folder = table.key, {str(run.folder): run for run in runs}
    base = next(run.before[key] for run in runs if key in run.before)
    spread = float(np.nanstd(intervals.per_prompt(base), ddof=1))
    if not spread > 0:
        raise UserError(
            f"{table.task}: {key} gives the base the same score on every prompt, so its gains have no scale"
        )
    rows = {row.label: [by_folder[folder] for folder in row.folders] for row in table.rows if row.rank and row.folders}
    return {
        label: {run.record.seed: intervals.per_prompt(run.after[key] - run.before[key]) / spread for run in group}
        for label, group in rows.items()
    }


def _numbers(
    kept: Mapping[str, Sequence[Mapping[int, Array]]],
    tasks: Sequence[str],
    strata: Mapping[str, Sequence[str] | None],
    resamples: int,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, dict[str, Estimate]]]:
    """Of each label (runs, tasks), the same under resamples of the prompts (resamples, runs, tasks), and each task's gain."""
    tables = {label: np.empty((len(by[0]), len(tasks))) for label, by in kept.items()}
    drawn = {label: np.empty((resamples, *table.shape)) for label, table in tables.items()}
    over: dict[str, dict[str, Estimate]] = {label: {} for label in kept}
    for k, task in enumerate(tasks):
        seeds = {label: [by[k][seed] for seed in sorted(by[k])] for label, by in kept.items()}
        columns = [vector for vectors in seeds.values() for vector in vectors]
        means = iter(intervals.crossed([Contrast([one]) for one in columns], resamples=1, strata=strata[task]))
        again = iter(resampling.resampled_means(np.stack(columns, axis=1), resamples, strata=strata[task]).T)
        told = intervals.crossed(
            [Contrast(vectors) for vectors in seeds.values()], resamples=resamples, strata=strata[task]
        )
        for (label, vectors), one in zip(seeds.items(), told, strict=True):
            over[label][task] = one
            for s in range(len(vectors)):
                tables[label][s, k], drawn[label][:, s, k] = next(means).mean, next(again)
    return tables, drawn, over


def render(table: Across, format: str = "terminal", *, width: int = 80) -> str:
    """The table as text. width: of a terminal. Raises UserError on a format that it has not."""
    if format not in FORMATS:
        raise registry.unknown("format of --across", format, FORMATS)
    if format == "json":
        return _json(table)
    if format == "csv":
        return _csv(table)
    title = (
        f"{len(table.keys)} tasks on {plain(table.model)}: {', '.join(f'{t} by {k}' for t, k in table.keys.items())}"
    )
    columns = [
        ("method", [plain(line.label) for line in table.lines]),
        ("IQM", [cell(line.middle, sign=True) for line in table.lines]),
        (f"better than {plain(table.baseline)}", [cell(line.improvement) for line in table.lines]),
        *((plain(task), [cell(line.gains[task], sign=True) for line in table.lines]) for task in table.keys),
        ("seeds", [", ".join(map(str, line.seeds)) for line in table.lines]),
    ]
    notes = [plain(note) for note in (*table.notes, *RULES)]
    if format == "md":
        cells = [
            [escape_markdown(text) for text in line]
            for line in zip(*((head, *texts) for head, texts in columns), strict=True)
        ]
        cells.insert(1, ["---"] * len(columns))
        lines = [f"**{escape_markdown(title)}**", "", *(f"| {' | '.join(line)} |" for line in cells)]
        return "\n".join([*lines, *(f"\n{escape_markdown(note)}" for note in notes)]) + "\n"
    wide = [max(map(cell_len, (head, *texts))) for head, texts in columns]
    shown, left = list[int](), width + 2
    for k, size in enumerate(wide):
        if k < 3 or size + 2 <= left:  # what sums up is always there
            shown.append(k)
            left -= size + 2
    if len(shown) < len(columns):
        notes.append("More columns: --format md, csv or json.")
    pad = lambda k, text: text + " " * (wide[k] - cell_len(text))
    rows = [[columns[k][0] for k in shown], *([columns[k][1][i] for k in shown] for i in range(len(table.lines)))]
    told = ["  ".join(map(pad, shown, row)).rstrip() for row in rows]
    wrap = lambda text: "\n".join(textwrap.wrap(text, width))
    return "\n".join([wrap(title), "", *told, "", *map(wrap, notes)]) + "\n"


def _csv(table: Across) -> str:
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    names = ["IQM", *table.keys, f"better than {table.baseline}"]
    write.writerow(["method", "seeds", *(plain(f"{name}{end}") for name in names for end in ("", " low", " high"))])
    for line in table.lines:
        numbers = [line.middle, *(line.gains[task] for task in table.keys), line.improvement]
        ends = [x for e in numbers for x in ((e.mean, e.low, e.high) if e else (math.nan,) * 3)]
        texts = [f"{x:.6g}" if math.isfinite(x) else "" for x in ends]
        write.writerow([plain(line.label), " ".join(map(str, line.seeds)), *texts])
    return out.getvalue()


def _json(table: Across) -> str:
    finite = lambda x: x if math.isfinite(x) else None
    said = lambda e: e and {"value": finite(e.mean), "ci_low": finite(e.low), "ci_high": finite(e.high)}
    whole = {
        "schema_version": 1,
        "model": table.model,
        "baseline": table.baseline,
        "keys": dict(table.keys),
        "rules": list(RULES),
        "notes": list(table.notes),
        "rows": [
            {"label": line.label, "train_seeds": list(line.seeds), "iqm": said(line.middle),
             "gains": {task: said(e) for task, e in line.gains.items()}, "improvement": said(line.improvement)}
            for line in table.lines
        ],
    }  # fmt: skip
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"
