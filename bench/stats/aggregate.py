"""Aggregates over runs and tasks: interquartile mean, probability of improvement, performance profile (arXiv 2108.13264).

Scores are (runs, tasks), on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .intervals import Estimate
from .resampling import Array
from .small_samples import expanded_tail


def iqm(
    scores: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0, drawn: ArrayLike | None = None
) -> Estimate:
    """The interquartile mean of (runs, tasks): the mean of the middle half (arXiv 2108.13264), runs resampled within tasks.

    Expanded percentile intervals. drawn (resamples, runs, tasks): the scores under resamples of the prompts, as of `resampled_means`;
    without them the interval knows of no other prompts.

    Args:
        scores: (runs, tasks).
        level: the coverage of the interval.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
        drawn: (resamples, runs, tasks): the scores under resamples of the prompts; None knows of no other prompts.
    """
    from scipy.stats import trim_mean

    x, rng = _runs(scores), np.random.default_rng(seed)
    runs, tasks = x.shape
    mean = float(trim_mean(x.ravel(), 0.25))
    if runs < 2:
        return Estimate(mean, math.nan, math.nan, runs, level=level)
    source = x[None] if drawn is None else np.asarray(drawn, np.float64)
    resamples = resamples if drawn is None else len(source)
    pick = rng.integers(0, runs, (resamples, runs, tasks))
    boot = trim_mean(np.take_along_axis(source, pick, 1).reshape(resamples, -1), 0.25, axis=1)
    return _percentile(mean, boot, expanded_tail(level, runs * tasks, tasks), level, runs)


def probability_of_improvement(
    ours: ArrayLike,
    theirs: ArrayLike,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    drawn: tuple[ArrayLike, ArrayLike] | None = None,
) -> Estimate:
    """The mean over tasks of P(a run of ours beats one of theirs), ties half: the Mann-Whitney statistic (arXiv 2108.13264).

    ours (runs, tasks), theirs (runs', tasks); runs are resampled within tasks, expanded percentile intervals. Where one side wins
    everywhere the interval has no width, which says little of few runs. drawn: both sides under the same resamples of the
    prompts, as in `iqm`.

    Args:
        ours: (runs, tasks).
        theirs: (runs', tasks).
        level: the coverage of the interval.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
        drawn: both sides under the same resamples of the prompts, as in `iqm`.

    Raises:
        UserError: when the tasks differ.
    """
    x, y, rng = _runs(ours), _runs(theirs), np.random.default_rng(seed)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"both sides need the same tasks: {x.shape[1]} and {y.shape[1]}")

    def beats(row_scores: Array, other_scores: Array) -> Array:  # (..., runs, runs', tasks)
        return (np.sign(row_scores[..., :, None, :] - other_scores[..., None, :, :]) + 1) / 2

    wins = beats(x, y)
    n, m, tasks = wins.shape
    mean = float(wins.mean())
    if min(n, m) < 2:
        return Estimate(mean, math.nan, math.nan, min(n, m), level=level)
    if drawn is not None:
        wins = beats(*(np.asarray(side, np.float64) for side in drawn))
        resamples = len(wins)
    a = rng.multinomial(n, np.full(n, 1 / n), (resamples, tasks)) / n
    b = rng.multinomial(m, np.full(m, 1 / m), (resamples, tasks)) / m
    each = "rabt" if drawn is not None else "abt"
    boot = np.einsum(f"rta,{each},rtb->r", a, wins, b, optimize=True) / tasks
    return _percentile(mean, boot, expanded_tail(level, min(n, m) * tasks, tasks), level, min(n, m))


def profile(
    scores: ArrayLike, above: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[Estimate]:
    """The performance profile of (runs, tasks): for each value, the share of runs that score above it (arXiv 2108.13264).

    Tasks weigh the same; runs are resampled within tasks. Expanded percentile intervals, point by point.

    Args:
        scores: (runs, tasks).
        above: the values, in units of the scores.
        level: the coverage of the interval.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
    """
    x, rng = _runs(scores), np.random.default_rng(seed)
    runs, tasks = x.shape
    over = (x[:, :, None] > np.asarray(above, np.float64)).astype(np.float64)  # (runs, tasks, values)
    means = [float(m) for m in over.mean((0, 1))]
    if runs < 2:
        return [Estimate(m, math.nan, math.nan, runs, level=level) for m in means]
    counts = rng.multinomial(runs, np.full(runs, 1 / runs), (resamples, tasks)) / runs
    boot = np.einsum("btr,rtv->bv", counts, over, optimize=True) / tasks
    tail = expanded_tail(level, runs * tasks, tasks)
    ends = np.quantile(boot, [tail, 1 - tail], axis=0)
    se = np.sqrt(over.var(0, ddof=1).sum(0) / runs) / tasks
    return [
        Estimate(m, float(low), float(high), runs, float(e), level)
        for m, low, high, e in zip(means, *ends, se, strict=True)
    ]


def _runs(scores: ArrayLike) -> Array:
    x = np.asarray(scores, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all() or not x.size:
        raise UserError(f"scores must be finite, (runs, tasks), not {x.shape}")
    return x


def _percentile(mean: float, boot: Array, tail: float, level: float, n: int) -> Estimate:
    low, high = np.quantile(boot, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n, float(boot.std(ddof=1)), level)
