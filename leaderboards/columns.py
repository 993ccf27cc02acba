"""Columns of a board: finds and orders the scorer/metrics of the runs, and chooses the one that ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation.ranking import key_order, primary_key
from .board import ROLES, SCORED_ROLES, Column, Role
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


def ranking_key(columns: Sequence[Column], key: str | None) -> str:
    """Return the scorer/metric that ranks: the requested one, else that of `ranking.primary_key`.

    Raises UserError where it is no column of scores, or where there is none.
    """
    roles = {c.key: c.role for c in columns if c.role in SCORED_ROLES}
    if key is not None and key not in roles:
        raise registry.unknown("scorer/metric", key, list(roles))
    key = key or primary_key(roles)
    if key is None:
        raise UserError("these runs hold no scores to rank by")
    return key


def training_scorer(columns: Sequence[Column]) -> str:
    """Return the name of the scorer that the methods were trained on; "none" where no column is of it."""
    return next((c.key.partition("/")[0] for c in columns if c.role == "training"), "none")
