"""Builds a leaderboard from finished runs: an interval on every number, and on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from ..bench.errors import UserError
from ..bench.evaluation.ranking import ranks, significant_pairs
from ..bench.evaluation.transfer import Transfer
from . import paper_numbers
from .board import BASE, Board, BoardRow
from .build_frontier import build_frontiers
from .cmmd import cmmd_of_rows
from .columns import find_columns, ranking_key, task_key
from .comparable import budget_bounds, check_comparable, check_same_base, scorer_ids
from .contrasts import BoardScores, cells_of, corrected_p, estimate_all, row_order
from .notes import key_notes, notes_on
from .rows import base_row, find_row, group_runs, method_row, settings_text
from .runs import LoadedRun
from .transfer import flags_of_rows, row_transfers


def build_board(
    runs: Sequence[LoadedRun],
    baseline: str = BASE,
    key: str | None = None,
    *,
    notes: Sequence[str] = (),
) -> Board:
    """Build the leaderboard of these runs; their order does not matter.

    Args:
        runs: finished runs of one task, model, budget and evaluation protocol.
        baseline: the row that others are compared with, a method or a row's label.
        key: the scorer/metric to rank by, to look at another column; None is the task's, and any other is said in the notes.
        notes: put before the board's own notes.

    Returns:
        The board, its ranked rows first, by falling mean.

    Raises:
        UserError: when runs do not belong in one table, naming what differs, and on an unknown baseline or key.
    """
    if not runs:
        raise UserError("no runs to compare")
    runs = sorted(runs, key=lambda r: (r.record.method, settings_text(r.record), r.record.seed, str(r.folder)))
    check_comparable(runs)
    columns = find_columns(runs)
    base_notes = check_same_base(runs)
    by_task = task_key(columns, runs)
    key = ranking_key(columns, key, by_task)
    bases = {c.key: next(r for r in runs if r.has(c.key)) for c in columns}
    scores = BoardScores(columns, group_runs(runs), bases, key)
    unranked = [base_row(bases)] + [method_row(label, group) for label, group in scores.groups.items()]
    baseline = find_row(unranked, baseline).label
    rows = _ranked(unranked, scores, baseline, row_transfers(scores, by_task))
    first = runs[0].record
    return Board(
        task=first.task,
        task_version=first.task_version,
        model=first.model,
        weights=str(first.provenance.get("weights", "")),
        dtype=str(first.provenance.get("dtype", "")),
        budget=budget_bounds(first),
        evaluation=dict(first.config.get("evaluation", {})),
        prompts=dict(first.prompts),
        scorers={name: scorer_id for r in reversed(runs) for name, scorer_id in scorer_ids(r.record).items()},
        key=key,
        task_key=by_task,
        baseline=baseline,
        columns=tuple(columns),
        rows=tuple(rows),
        notes=(*notes, *base_notes, *key_notes(key, by_task), *notes_on(rows, columns, key, runs)),
        reported=tuple(paper_numbers.matching(first.task, first.model)),
        frontiers=build_frontiers(rows, scores),
    )


def _ranked(
    rows: Sequence[BoardRow], scores: BoardScores, baseline: str, transferred: Mapping[str, Sequence[Transfer]]
) -> list[BoardRow]:
    """Return the rows with cells, tests and ranks; ranked ones first, by falling mean, then the others by label."""
    order = row_order(rows, scores)
    estimates = estimate_all(scores, baseline, order)
    differences = {pair: estimates[pair[1], scores.key, f"below {pair[0]}"] for pair in combinations(order, 2)}
    rank_by_label = ranks(order, significant_pairs(differences))
    holm = corrected_p(order, scores.key, estimates)
    cmmd = cmmd_of_rows({label: [r.record for r in group] for label, group in scores.groups.items()})
    flags = flags_of_rows(scores, transferred, estimates)
    place = {label: k for k, label in enumerate(order)}
    return [
        replace(
            row,
            cmmd=cmmd.get(row.label, {}),
            cells=cells_of(row.label, scores, estimates),
            versus=estimates.get((row.label, scores.key, "versus")),
            rank=rank_by_label.get(row.label),
            holm=holm.get(row.label, math.nan),
            seed_source=scores.seed_source(row.label),
            transfer=next(iter(transferred.get(row.label, ())), None),
            hack=flags.get(row.label, ()),
        )
        for row in sorted(rows, key=lambda r: (place.get(r.label, len(rows)), r.label))
    ]
