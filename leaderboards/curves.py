"""Curves of a report: computes validation scores over spend, the mean gain over the budget, and the spend until a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..bench.evaluation import record
from ..bench.stats import intervals
from ..bench.stats.curves import area, time_to_target
from ..bench.stats.intervals import Contrast, Estimate
from .run_files import RESAMPLES, read_table
from .runs import Array, LoadedRun, strata_or_none

CURVE = "curve.parquet"  # every validation score of a run


@dataclass(frozen=True)
class Curve:
    """Validation scores of one row over its spend, as the mean over its seeds."""

    label: str
    spent: Mapping[str, Sequence[float]]  # currency -> (eval points,)
    scores: Mapping[str, Sequence[Estimate]]  # scorer/metric -> (eval points,)


@dataclass(frozen=True)
class Pace:
    """Speed of the rows on validation prompts: gains over the first eval point, prompt by prompt."""

    key: str
    clock: str
    target: float  # half the best gain at the end
    rows: Mapping[str, tuple[Estimate, Estimate]]  # label -> mean gain over the budget, what is spent until the target


@dataclass(frozen=True)
class _ValidationScores:
    scores: Mapping[str, Array]  # scorer/metric -> (prompts, eval points)
    strata: Sequence[str]  # (prompts,)


def curve(label: str, runs: Sequence[LoadedRun], clock: str) -> Curve | None:
    """Compute the curve of one row; None where a run has none. clock: the currency at whose spends seeds are averaged.

    One seed is shown at its own eval points. Several are interpolated linearly at as many evenly spaced spends of the clock as
    the seed with fewest eval points has, up to where the first of them ends; other currencies are the mean of what the seeds had
    spent by then. Prompts without a score at some eval point are left out.
    Raises UserError on a file that cannot be read.
    """
    validations = [v for v in map(_validation_scores, runs) if v is not None]
    if not runs or len(validations) < len(runs):
        return None
    spends = [[point.spent for point in run.record.curve] for run in runs]
    times = [np.array([spent.get(clock, float(k)) for k, spent in enumerate(points)]) for points in spends]
    at = times[0]
    if len(runs) > 1:
        at = np.linspace(max(t[0] for t in times), min(t[-1] for t in times), min(map(len, times)))
    # (eval points, at): the weights of linear interpolation
    weights = [np.stack([np.interp(at, t, unit) for unit in np.eye(len(t))]) for t in times]
    names = [c for c in spends[0][0] if all(c in spent for points in spends for spent in points)]
    spent = {
        c: np.mean([np.array([s[c] for s in points]) @ w for points, w in zip(spends, weights, strict=True)], axis=0)
        for c in names
    }
    keys = [key for key in validations[0].scores if all(key in v.scores for v in validations)]
    tables = {key: [v.scores[key] @ w for v, w in zip(validations, weights, strict=True)] for key in keys}
    contrasts = [Contrast([t[:, k] for t in tables[key]]) for key in keys for k in range(len(at))]
    strata = strata_or_none(validations[0].strata)
    estimates = iter(intervals.crossed(contrasts, strata=strata))
    return Curve(
        label,
        {c: [float(x) for x in xs] for c, xs in spent.items()},
        {key: [next(estimates) for _ in at] for key in keys},
    )


def pace(
    curves: Sequence[Curve], rows: Mapping[str, Sequence[LoadedRun]], key: str, clock: str, bound: float
) -> Pace | None:
    """Compute the area under each curve and the spend until it stays above the target.

    Args:
        curves: of the rows.
        rows: label -> the runs of that row.
        key: the scorer/metric of the gains.
        clock: the currency of the spends.
        bound: of the budget, in units of the clock.

    Returns:
        The rules are those of `curves.area` and `curves.time_to_target`; None where no row has more than two eval points.
    """
    usable = {c.label: c for c in curves if key in c.scores and clock in c.spent and len(c.scores[key]) > 2}
    if not usable or not bound > 0:
        return None
    target = max(c.scores[key][-1].mean - c.scores[key][0].mean for c in usable.values()) / 2
    if not target > 0:
        return None
    estimates: dict[str, tuple[Estimate, Estimate]] = {}
    for label in usable:
        points_by_run = [
            (_validation_scores(run), [point.spent[clock] for point in run.record.curve]) for run in rows[label]
        ]
        present = [(validation, spent) for validation, spent in points_by_run if validation is not None]
        seeds = [(spent, v.scores[key] - v.scores[key][:, :1]) for v, spent in present]
        strata = strata_or_none(present[0][0].strata)
        over = area(seeds, bound, strata=strata)
        estimates[label] = (over, time_to_target(seeds, target, resamples=RESAMPLES, strata=strata))
    return Pace(key, clock, target, estimates)


def _validation_scores(run: LoadedRun) -> _ValidationScores | None:
    """Return the scores at the evaluation points of a run; None where it has none."""
    count = len(run.record.curve)
    if not (run.folder / CURVE).is_file() or not count:
        return None
    table = read_table(record.verified(run.folder, run.record, CURVE))
    table = table[table.eval_point < count]
    prompts = int(table.prompt.max()) + 1 if len(table) else 0
    if not prompts:
        return None
    key = table.scorer.astype(str) + "/" + table.metric.astype(str)
    scores: dict[str, Array] = {}
    for name, part in table.groupby(key, sort=False):
        means = part.groupby(["prompt", "eval_point"]).value.mean().unstack("eval_point")
        scores[str(name)] = means.reindex(index=range(prompts), columns=range(count)).to_numpy(np.float64)
    strata = [""] * prompts
    if "stratum" in table:
        first = table.drop_duplicates("prompt")
        for prompt, stratum in zip(first.prompt, first.stratum, strict=True):
            strata[int(prompt)] = str(stratum)
    return _ValidationScores(scores, strata)
