"""Measures of a report: collects every number of the rows that can be an axis of a trade-off plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..bench.stats.intervals import Estimate
from .board import Board, BoardRow


@dataclass(frozen=True)
class Measure:
    """One number of every row, and whether less of it is better."""

    name: str
    less: bool  # less is better
    values: Mapping[str, Estimate]  # label -> the number


def measures(board: Board) -> list[Measure]:
    """Return the columns, the distance to the base and the spend, each by row; the base spends nothing."""
    of_rows = [
        Measure(
            f"{c.key} ({c.role})",
            c.role == "drift",
            {r.label: r.cells[c.key].after for r in board.rows if c.key in r.cells},
        )
        for c in board.columns
    ]
    embedders = dict.fromkeys(name for r in board.rows for name in r.cmmd)
    of_rows += [
        Measure(f"CMMD to the base ({name})", True, {r.label: r.cmmd[name] for r in board.rows if name in r.cmmd})
        for name in embedders
    ]
    currencies = dict.fromkeys(c for r in board.rows for c in r.spent)
    of_rows += [Measure(f"spent: {c}", True, _spent(board.rows, c)) for c in currencies]
    return [m for m in of_rows if m.values]


def default_axes(board: Board, measures: Sequence[Measure]) -> tuple[int, int]:
    """Return the indices of the initial axes: x the drift, or the training scorer where there is none, y the key."""
    names = [m.name for m in measures]
    up = next(k for k, name in enumerate(names) if name.startswith(f"{board.key} ("))
    columns = [c for role in ("drift", "training", "auxiliary") for c in board.columns if c.role == role]
    across = [names.index(f"{c.key} ({c.role})") for c in columns if c.key != board.key]
    return next(iter(across), len(names) - 1), up


def _spent(rows: Sequence[BoardRow], currency: str) -> dict[str, Estimate]:
    # A mean over seeds, counted and not estimated: no interval.
    spent = {r.label: 0.0 if r.kind == "base" else r.spent.get(currency) for r in rows}
    return {label: Estimate(x, x, x, 0) for label, x in spent.items() if x is not None}
