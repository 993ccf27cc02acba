"""Builds the frontiers of a board: each search at the numbers of candidates that its runs evaluated, against the trained rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..bench.evaluation import record
from ..bench.evaluation.record import Record
from ..bench.stats import intervals
from ..bench.stats.intervals import Contrast
from ..bench.stats.law import SeedVariance
from .board import BoardRow
from .contrasts import BoardScores
from .frontier import CostPoint, Frontier, trained_row
from .run_files import read_table
from .runs import Array, LoadedRun

FRONTIER = "frontier.parquet"  # of a search: every score of its points
BEST_OF_N = "best-of-n"  # the one search of the package: records of an earlier version do not say what they are


@dataclass(frozen=True)
class _PointOfRun:
    """One point of one run."""

    candidates: float
    nfe: float  # of a served image
    after: Array  # (prompts, images), by the key


@dataclass(frozen=True)
class _Point:
    """One point of a search under each of its seeds."""

    candidates: float
    nfe: float
    after: list[Array]
    spread: SeedVariance | None  # of the seeds; None: these are the base's scores


def build_frontiers(rows: Sequence[BoardRow], scores: BoardScores) -> tuple[Frontier, ...]:
    """Compare each search of a board with its trained rows, by the key that ranks.

    rows: with their cells; those that are no result are left out. Raises UserError on a file that cannot be read.
    """
    results = {row.label for row in rows if row.is_result}
    groups = {
        label: [run for run in group if run.has(scores.key)]
        for label, group in scores.groups.items()
        if label in results
    }
    searches = {label: group for label, group in groups.items() if group and is_search(group[0].record)}
    nfe_an_image = _nfe_an_image([run.record for group in groups.values() for run in group])
    if nfe_an_image is None:
        return ()
    trained = [row for row in rows if groups.get(row.label) and row.label not in searches]
    return tuple(_frontier(label, nfe_an_image, trained, scores) for label in searches)


def is_search(r: Record) -> bool:
    """Return whether a run trained nothing and searched."""
    return bool(r.frontier) or r.method.partition(":")[0] == BEST_OF_N


def _nfe_an_image(records: Sequence[Record]) -> float | None:
    """Return the cost of an image of the base; of records of an earlier version that of a candidate of best-of-n."""
    if stated := [r.nfe_an_image for r in records if r.nfe_an_image is not None]:
        return float(stated[0])
    tried = [(r.spent.get("nfe", 0.0), r.spent.get("images", 0.0)) for r in records if is_search(r)]
    return next((nfe / images for nfe, images in tried if nfe and images), None)


def _frontier(label: str, nfe_an_image: float, trained: Sequence[BoardRow], scores: BoardScores) -> Frontier:
    key, runs = scores.key, [run for run in scores.groups[label] if run.has(scores.key)]
    points = _points(label, runs, scores)
    gains = [
        Contrast([after - run.before[key] for after, run in zip(p.after, runs, strict=True)], spreads=[p.spread])
        for p in points
    ]
    behind = [
        Contrast(
            [run.after[key] for run in scores.groups[row.label] if run.has(key)],
            p.after,
            spreads=[scores.spreads[key][row.label], p.spread],
        )
        for row in trained
        for p in points
    ]
    estimates = iter(intervals.crossed([*gains, *behind], strata=scores.strata))
    shown = tuple(CostPoint(p.candidates, p.nfe, next(estimates)) for p in points)
    costs = [p.nfe for p in points]
    lines = [(row, row.cells[key].delta, [next(estimates) for _ in points]) for row in trained]
    return Frontier(
        label,
        key,
        nfe_an_image,
        shown,
        tuple(
            trained_row(row.label, gain, row.spent.get("nfe", math.nan), nfe_an_image, costs, differences)
            for row, gain, differences in lines
            if gain is not None
        ),
        is_measured=all(_has_points(run, key) for run in runs),
    )


def _has_points(run: LoadedRun, key: str) -> bool:
    """Return whether a run was evaluated by the key on the way."""
    return all(key in point.delta for point in run.record.frontier) and bool(run.record.frontier)


def _points(label: str, runs: Sequence[LoadedRun], scores: BoardScores) -> list[_Point]:
    """Return the points that all runs have, and at last the results; costs are means over the runs."""
    key = scores.key
    by_run = [_points_of_run(run, key) for run in runs]
    shared = min(map(len, by_run)) - 1
    columns = [[points[k] for points in by_run] for k in (*range(shared), -1)]
    points: list[_Point] = []
    for column in columns:
        after = [p.after for p in column]
        is_base = all(np.array_equal(a, run.before[key], equal_nan=True) for a, run in zip(after, runs, strict=True))
        spread = None if is_base else scores.spread_in_place(label, key, after)
        candidates, nfe = (float(np.mean([getattr(p, name) for p in column])) for name in ("candidates", "nfe"))
        points.append(_Point(candidates, nfe, after, spread))
    return points


def _points_of_run(run: LoadedRun, key: str) -> list[_PointOfRun]:
    """Return the points of one run, the result last; of a record without a frontier the result alone."""
    result, frontier = run.after[key], run.record.frontier
    if not frontier:
        images, nfe = (run.record.spent.get(name, math.nan) / result.size for name in ("images", "nfe"))
        return [_PointOfRun(images, nfe, result)]
    last = _PointOfRun(frontier[-1].candidates, frontier[-1].nfe, result)
    if not _has_points(run, key):
        return [last]
    table = read_table(record.verified(run.folder, run.record, FRONTIER))
    scorer, _, metric = key.partition("/")
    table = table[(table.scorer == scorer) & (table.metric == metric)]
    after = np.full((len(frontier), *result.shape), np.nan)
    after[table.point, table.prompt, table.ordinal] = table.value
    return [*(_PointOfRun(p.candidates, p.nfe, x) for p, x in zip(frontier[:-1], after, strict=False)), last]
