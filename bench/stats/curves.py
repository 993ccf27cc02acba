"""Curves of a score over spend: time to a target, and the area under the curve, with intervals.

A curve is what was spent (E,) at its E evaluations, and the scores there, (prompts, E) or (E,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .intervals import Estimate, two_level
from .law import MIN_PROMPTS
from .resampling import Array, resample_within, weigh
from .small_samples import stretch, variance_of_mean

Curve = tuple[ArrayLike, ArrayLike]


def smooth(curve: ArrayLike) -> Array:
    """(..., E) -> (..., E): the running median of three evaluations; the two ends stay as they are."""
    x = np.asarray(curve, np.float64)
    if x.shape[-1] < 3:
        return x.copy()
    middle = np.median(np.stack([x[..., :-2], x[..., 1:-1], x[..., 2:]]), axis=0)
    return np.concatenate([x[..., :1], middle, x[..., -1:]], axis=-1)


def time_to_target(
    curves: Sequence[Curve],
    target: float,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> Estimate:
    """What had been spent when the mean curve crossed the target for good; inf: not within the budget. One curve a seed.

    The rule, fixed before any curve is seen: average over prompts and seeds, smooth by the running median of three evaluations
    (`smooth`), take the last evaluation below the target and the one after it, and read between them along a straight line. A curve
    that is never below needs what its first evaluation had spent. Several seeds are first read, along straight lines, at as many
    evenly spaced spends as the one with fewest evaluations has, up to where the first of them ends.
    The interval: prompts and seeds of the curve are resampled, its deviations stretched evaluation by evaluation to Student's
    quantile, and the rule applied to each.
    Prompts without a score at some evaluation are dropped.

    Args:
        curves: one curve per seed: spends (evaluations,) and scores (n, evaluations).
        target: in units of the score.
        level: the coverage of the interval.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
        strata: (n,) labels, e.g. GenEval's tags; the mean is then the mean of the strata's means, prompts are resampled within.

    Raises:
        UserError: when curves have other prompts, or spends that fall.
    """
    points_by_seed = [_curve(c) for c in curves]
    if not points_by_seed or len({scores.shape[0] for _, scores in points_by_seed}) != 1:
        raise UserError("curves must be of the same prompts, one curve a seed")
    spent = points_by_seed[0][0]
    if len(points_by_seed) > 1:
        start, end, n_points = (
            max(s[0] for s, _ in points_by_seed),
            min(s[-1] for s, _ in points_by_seed),
            min(len(s) for s, _ in points_by_seed),
        )
        spent = np.linspace(start, end, n_points)
    table = np.stack(
        [scores @ _interpolation(seed_spent, spent) for seed_spent, scores in points_by_seed]
    )  # (seeds, prompts, E)
    keep = np.isfinite(table).all((0, 2))
    sample = weigh(np.where(keep, 0.0, np.nan), strata)
    groups, dropped = sample.stratum, sample.dropped
    table, rng, s, n = table[:, keep], np.random.default_rng(seed), len(points_by_seed), len(sample.values)
    prompts, runs = table.mean(0), np.einsum("snm,n->sm", table, sample.weights)
    mean = runs.mean(0)
    at = float(_last_crossing(spent, smooth(mean)[None], target)[0]) if n else math.nan
    v_prompt, k = variance_of_mean(prompts, groups)
    if not np.isfinite(v_prompt).all() or n < MIN_PROMPTS:
        return Estimate(at, math.nan, math.nan, n, math.nan, level, dropped, s)
    off = (resample_within(prompts, groups, resamples, rng) - mean) * math.sqrt(n / (n - k) if s == 1 else 1)
    v_seed = runs.var(0, ddof=1) / s if s > 1 else np.zeros_like(mean)
    if s > 1:
        off += math.sqrt(s / (s - 1)) * (resample_within(runs, np.zeros(s, np.int64), resamples, rng) - mean)
    times = np.sort(
        _last_crossing(spent, smooth(mean + off * stretch(level, [(v_prompt, n - k), (v_seed, s - 1)])), target)
    )
    low, high = (
        times[math.floor((1 - level) / 2 * (resamples - 1))],
        times[math.ceil((1 + level) / 2 * (resamples - 1))],
    )
    se = float(times.std(ddof=1)) if np.isfinite(times).all() else math.nan
    return Estimate(at, float(low), float(high), n, se, level, dropped, s)


def area(
    curves: Sequence[Curve],
    budget: float,
    level: float = 0.95,
    strata: Sequence[object] | None = None,
) -> Estimate:
    """The mean score over the whole budget: the area under the curve by the trapezoid rule over spend, divided by the budget.

    One curve a seed; each keeps its first value before its first evaluation and its last one up to the budget, and what lies beyond
    the budget is cut off. The area is linear in the scores, so its interval is `two_level`'s on the areas of the prompts.

    Args:
        curves: one curve per seed: spends (evaluations,) and scores (n, evaluations).
        budget: in units of the spends.
        level: the coverage of the interval.
        strata: (n,) labels, e.g. GenEval's tags; the mean is then the mean of the strata's means.
    """
    if not budget > 0:
        raise UserError(f"a budget must be positive, not {budget}")
    areas: list[Array] = []
    for spent, scores in map(_curve, curves):
        inside = (spent > 0) & (spent < budget)
        grid = np.concatenate([[0.0], spent[inside], [budget]])
        heights = scores @ _interpolation(spent, grid)
        areas.append((heights[:, 1:] + heights[:, :-1]) @ np.diff(grid) / (2 * budget))
    return two_level(areas, level, strata)


def _curve(curve: Curve) -> tuple[Array, Array]:
    """Spends (E,) and scores (prompts, E)."""
    spent, scores = (np.asarray(part, np.float64) for part in curve)
    scores = scores[None] if scores.ndim == 1 else scores
    if spent.ndim != 1 or not len(spent) or scores.ndim != 2 or scores.shape[1] != len(spent):
        raise UserError(f"a curve is spends (E,) and scores (prompts, E), not {spent.shape} and {scores.shape}")
    if not np.isfinite(spent).all() or (np.diff(spent) < 0).any():
        raise UserError("the spends of a curve must not fall")
    return spent, scores


def _interpolation(spent: Array, grid: Array) -> Array:
    """(E, grid): scores @ this reads a curve at the spends of the grid, along straight lines, flat beyond its ends."""
    return np.stack([np.interp(grid, spent, unit) for unit in np.eye(len(spent))])


def _last_crossing(spent: Array, curves: Array, target: float) -> Array:
    """(rows,): where each of the curves (rows, E) is below the target for the last time; inf where that is its end."""
    below, n_points = curves < target, curves.shape[1]
    last = n_points - 1 - np.argmax(below[:, ::-1], axis=1)
    left, row = np.minimum(last, max(n_points - 2, 0)), np.arange(len(curves))
    right = np.minimum(left + 1, n_points - 1)
    rise = curves[row, right] - curves[row, left]
    share = (target - curves[row, left]) / np.where(rise > 1e-290, rise, 1)
    at = spent[left] + share * (spent[right] - spent[left])
    return np.where(~below.any(1), spent[0], np.where(last == n_points - 1, np.inf, at))
