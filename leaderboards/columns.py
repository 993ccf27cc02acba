"""Columns of a board: finds and orders the scorer/metrics of the runs, and chooses the one that ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation.ranking import key_order, primary_key, verdict_beside
from .board import ROLES, SCORED_ROLES, Board, Column, Role
from .runs import LoadedRun


def find_columns(runs: Sequence[LoadedRun]) -> list[Column]:
    """Find the scorer/metrics that some run has for both the base and the result, by role, then by scorer."""
    keys = dict.fromkeys(key for run in runs for key in run.after if key in run.before)
    roles: dict[str, Role] = {name: use.role for run in runs for name, use in run.record.scorers.items()}
    columns: list[Column] = []
    for key in keys:
        scorer = key.partition("/")[0]
        kind = scorer.partition("-")[0]
        other: Role = "diversity" if kind == "diversity" else "drift" if kind == "drift" else "auxiliary"
        columns.append(Column(key, roles.get(scorer, other)))
    if not columns:
        raise UserError("these runs hold no scores of both the base and the result")
    return sorted(columns, key=lambda c: (ROLES.index(c.role), *key_order(c.key)))


def task_key(columns: Sequence[Column], runs: Sequence[LoadedRun]) -> str:
    """Return the scorer/metric that ranks by the task: what the records state, the same in all that a table holds.

    Raises UserError where these runs have no scores of it.
    """
    roles = {c.key: c.role for c in columns if c.role in SCORED_ROLES}
    stated = next((run.record.key for run in runs if run.record.key), "")
    key = stated if stated in roles else primary_key(roles)
    if key is None:
        raise UserError("these runs hold no scores to rank by")
    return key


def ranking_key(columns: Sequence[Column], requested: str | None, by_task: str) -> str:
    """Return the scorer/metric that ranks a table: the requested one, else the task's. Raises UserError where it is no column of scores."""
    scored = [c.key for c in columns if c.role in SCORED_ROLES]
    if requested is not None and requested not in scored:
        raise registry.unknown("scorer/metric", requested, scored)
    return requested or by_task


def in_shown_order(board: Board) -> list[Column]:
    """Return the columns of a board as tables show them: the key, the verdict of its scorer, then the others."""
    first = [board.key, verdict_beside(board.key, [c.key for c in board.columns])]
    return sorted(board.columns, key=lambda c: first.index(c.key) if c.key in first else len(first))


def training_scorer(columns: Sequence[Column]) -> str:
    """Return the name of the scorer that the methods were trained on; "none" where no column is of it."""
    return next((c.key.partition("/")[0] for c in columns if c.role == "training"), "none")
