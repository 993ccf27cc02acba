"""Intervals, tests and verdicts on per-prompt scores, all seeded: no number leaves this file without its uncertainty.

The unit of analysis is the prompt: images of one prompt are averaged first, so resampling prompts is the cluster bootstrap
(arXiv 2411.00640). Scores are (n_prompts,) or (n_prompts, n_images); NaN = could not be scored, left out, and a prompt
without any score is dropped and counted. Intervals are percentiles of the bootstrap, widened for small samples
("expanded percentile", Hesterberg 2015, arXiv 1411.5279, section 4.4): of percentile, BCa and expanded, measured at n = 12
to 100 on normal, binary, beta-binomial and skewed scores, it covered best for its simplicity (95 % at n = 100).
A score that is the same for all prompts has an interval of width 0; `proportion` is the honest one for all right or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy as copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

Array = NDArray[np.float64]
Verdict = Literal["same", "better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. NaN bounds = too few prompts (or runs) to say."""

    mean: float
    low: float
    high: float
    n: int  # prompts (or runs) that entered
    se: float = math.nan
    level: float = 0.95
    dropped: int = 0  # prompts without any finite score
    seeds: int = 1  # training seeds; 1 = the interval knows nothing of their spread
    p: float | None = None  # two-sided, against no difference
    mde: float | None = None  # the smallest true difference that would be found with power 0.8

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


# One sample


def per_prompt(values: ArrayLike) -> Array:
    """(n,) or (n, images) -> (n,): the mean of each prompt's finite scores; NaN where it has none."""
    v = np.asarray(values, np.float64)
    if v.ndim not in (1, 2):
        raise UserError(f"scores must be (prompts,) or (prompts, images), not {v.shape}")
    v = v[:, None] if v.ndim == 1 else v
    finite = np.isfinite(v)
    count = finite.sum(1)
    return np.where(count > 0, np.where(finite, v, 0).sum(1) / np.maximum(count, 1), np.nan)


def mean_ci(
    values: ArrayLike,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> Estimate:
    """The mean over prompts with its clustered bootstrap interval; values (n,) or (n, images).

    strata (n,): labels, e.g. GenEval's tags; the mean is then the mean of the strata's means, prompts are resampled within.
    """
    x, w, groups, dropped = _weigh(per_prompt(values), strata)
    return _estimate(x, w, groups, level, resamples, np.random.default_rng(seed), dropped)


def proportion(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A share with Wilson's interval; for one yes or no a prompt, and for shares near 0 or 1, where a bootstrap is too narrow."""
    from scipy.stats import binomtest

    if n < 1:
        return Estimate(math.nan, math.nan, math.nan, 0, level=level)
    ci, p = binomtest(successes, n).proportion_ci(level, "wilson"), successes / n
    return Estimate(p, float(ci.low), float(ci.high), n, math.sqrt(p * (1 - p) / n), level)


# Two samples on the same prompts


def paired(
    before: ArrayLike,
    after: ArrayLike,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> Estimate:
    """after - before per prompt and image (common noise): interval, sign-flip p, minimal detectable effect.

    before, after (n,) or (n, images) in one order; an image counts where both are finite. before may be one number (a
    reported mean, taken as exact). Raises UserError when the shapes differ.
    """
    b, a = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if b.shape != a.shape and b.ndim:
        raise UserError(f"paired scores must be of the same prompts and images: {b.shape} before, {a.shape} after")
    rng = np.random.default_rng(seed)
    x, w, groups, dropped = _weigh(per_prompt(a - b), strata)
    estimate = _estimate(x, w, groups, level, resamples, rng, dropped)
    p = _sign_flips((x * w)[:, None], np.ones((1, 1)), resamples, rng)[0] if len(x) else None
    return replace(estimate, p=p, mde=mde(estimate.se * math.sqrt(len(x)), len(x), level))


def mcnemar(
    before: ArrayLike, after: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Yes or no, one image a prompt (n,): the difference of the shares, p by McNemar's exact test on the changed prompts."""
    from scipy.stats import binomtest

    d = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if not np.isin(d[np.isfinite(d)], (-1, 0, 1)).all() or d.ndim != 1:
        raise UserError("McNemar's test takes one yes (1) or no (0) a prompt")
    gained, lost = int((d == 1).sum()), int((d == -1).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return replace(paired(before, after, level, resamples, seed), p=p)


def mde(sd: float, n: int, level: float = 0.95, power: float = 0.8) -> float:
    """The true mean difference that a two-sided paired t-test of n prompts finds with this power; sd of the differences."""
    return _mde(sd / math.sqrt(n), n - 1, level, power) if n > 1 else math.nan


def _mde(se: float, df: float, level: float = 0.95, power: float = 0.8) -> float:
    from scipy.special import nctdtrinc
    from scipy.stats import t

    if not math.isfinite(se):
        return math.nan
    # rejections on the wrong side (< 1e-4) left out
    return float(nctdtrinc(df, 1 - power, t.ppf((1 + level) / 2, df))) * se


@dataclass(frozen=True)
class Equivalence:
    """A verdict on a difference, and what it rests on."""

    verdict: Verdict
    difference: Estimate
    margin: float
    p: float  # two one-sided t-tests: small = inside the margin


def equivalence(
    before: ArrayLike,
    after: ArrayLike,
    margin: float,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> Equivalence:
    """Is after the same as before, to within margin (in units of the score)? Two one-sided tests on per-prompt differences.

        same         the mean difference lies within +-margin (p < 1 - level), even when it is not zero
        better/worse otherwise, when the interval of the difference excludes zero
        cannot tell  otherwise: too few prompts

    before may be one number. Source: Schuirmann 1987. Raises UserError when margin <= 0 or the shapes differ.
    """
    from scipy.stats import t

    if not margin > 0:
        raise UserError(f"a margin of equivalence must be positive, not {margin}")
    d = paired(before, after, level, resamples, seed, strata)
    if math.isnan(d.se):
        return Equivalence("cannot tell", d, margin, math.nan)
    inside = margin - abs(d.mean)
    p = float(t.sf(inside / d.se, d.n - 1)) if d.se > 0 else float(inside <= 0)
    if p < 1 - level:
        return Equivalence("same", d, margin, p)
    return Equivalence("better" if d.low > 0 else "worse" if d.high < 0 else "cannot tell", d, margin, p)


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for being many (Holm 1979): max over smaller ones of (m - rank) p, at most 1; NaN stays, uncounted."""
    ps = np.asarray(p, np.float64)
    order = [int(i) for i in np.argsort(ps, kind="stable") if not np.isnan(ps[i])]
    out, worst = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, (len(order) - rank) * float(ps[i]))
        out[i] = min(worst, 1.0)
    return out


# Several training seeds


def two_level(
    seeds: Sequence[ArrayLike],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> Estimate:
    """The mean over training seeds and prompts, with both as random: seeds, a list of (n,) vectors on the same prompts.

    Prompts are crossed with seeds (every seed is judged on the same ones), so a resample draws prompts once for all seeds:
    deviation = bootstrap of the prompt means + s / sqrt(S) t(S - 1), s the standard deviation of the seeds' means. Two or three
    values are too few to resample, and percentiles stretched at Welch-Satterthwaite degrees of freedom, which hold for two
    sides with seeds, covered 90 to 93 % here; this covers 95 to 97 % (1,000 simulated nulls, two to five seeds). Prompts missing
    under any seed are dropped. strata as in `mean_ci`. One seed: `mean_ci`. Raises UserError when the vectors differ in length.
    """
    rows = [per_prompt(s) for s in seeds]
    if not rows or len({len(r) for r in rows}) != 1:
        raise UserError("seeds must be judged on the same prompts: a list of vectors of one length")
    table, rng = np.stack(rows), np.random.default_rng(seed)
    x, w, groups, dropped = _weigh(table.mean(0), strata)
    runs = (table[:, np.isfinite(table).all(0)] * w).sum(1)
    boot = _resample_within(x, groups, resamples, rng)
    return _interval(x, w, groups, boot, [runs], level, rng, dropped)


@dataclass(frozen=True)
class Contrast:
    """Ours minus theirs, one (n,) or (n, images) a training seed, all on the same prompts; without theirs, ours alone.

    An image counts where it is finite under every seed of both. The seeds of the two sides are independent. lend: a side of one
    seed was trained as well, so it varies as the seeds of the other side do; without it (the base has no seeds) it is as it is.
    """

    ours: Sequence[ArrayLike]
    theirs: Sequence[ArrayLike] = ()
    test: bool = False  # also p and mde, against no difference
    lend: bool = False


def crossed(
    contrasts: Sequence[Contrast],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> list[Estimate]:
    """`two_level` of many contrasts at once: one set of resamples of the prompts serves them all.

    Equal, to rounding, to what `mean_ci`, `paired` and `two_level` say of each by itself, and no contrast's result depends
    on its company. p: by sign flips where no side has two seeds, from the interval's draws where one has, else Student's at
    Welch-Satterthwaite degrees of freedom.
    Raises UserError when the shapes differ.
    """
    made = [_levels(c) for c in contrasts]
    if len({prompts.shape for prompts, _ in made}) > 1:
        raise UserError("contrasts must be of the same prompts")
    found: list[Estimate | None] = [None] * len(made)
    # Columns that miss the same prompts share their resamples.
    alike: dict[bytes, list[int]] = {}
    for i, (prompts, _) in enumerate(made):
        alike.setdefault(np.isfinite(prompts).tobytes(), []).append(i)
    for columns in alike.values():
        rng = np.random.default_rng(seed)
        x, w, groups, dropped = _weigh(made[columns[0]][0], strata)
        table = np.stack([made[i][0] for i in columns], axis=1)
        keep = np.isfinite(table[:, 0])
        table = table[keep]
        # Thirty rows make 435 pairs: what is resampled are the rows, and pairs are differences of those.
        ends, signs = _ends([[side.mean(0)[keep] for side in made[i][1]] for i in columns])
        boot = _resample_within(ends, groups, resamples, rng) @ signs * (table != 0).any(0)
        flips = [k for k, i in enumerate(columns) if contrasts[i].test and len(x) and max(map(len, made[i][1])) < 2]
        p = dict(zip(flips, _sign_flips(ends * w[:, None], signs[:, flips], resamples, copy(rng)), strict=True))
        for k, i in enumerate(columns):
            sides = [(side * w).sum(1) for side in (s[:, np.isfinite(made[i][0])] for s in made[i][1])]
            c = contrasts[i]
            one = _interval(table[:, k], w, groups, boot[:, k], sides, level, copy(rng), dropped, c.test, c.lend)
            found[i] = replace(one, p=p[k]) if k in p else one
    return [one for one in found if one is not None]


def _ends(sides: Sequence[Sequence[Array]]) -> tuple[Array, Array]:
    """Vectors, equal ones once, as columns (n, m), and the signs (m, contrasts) with which they make up ours, or ours - theirs."""
    place: dict[bytes, int] = {}
    found: list[Array] = []
    entries: list[tuple[int, int, float]] = []
    for k, both in enumerate(sides):
        for vector, sign in zip(both, (1.0, -1.0), strict=False):
            at = place.setdefault(vector.tobytes(), len(found))
            if at == len(found):
                found.append(vector)
            entries.append((at, k, sign))
    signs = np.zeros((len(found), len(sides)))
    for at, k, sign in entries:
        signs[at, k] += sign
    return np.stack(found, axis=1), signs


def _levels(c: Contrast) -> tuple[Array, list[Array]]:
    """(n,): the difference by prompt, over all seeds; and (S, n) of each side."""
    sides = [[np.asarray(s, np.float64) for s in side] for side in (c.ours, c.theirs)]
    if not sides[0] or len({s.shape for side in sides for s in side}) != 1:
        raise UserError("seeds must be judged on the same prompts: a list of vectors of one length")
    if c.theirs:
        whole = np.isfinite(np.stack(sides[0] + sides[1])).all(0)
        sides = [[np.where(whole, s, np.nan) for s in side] for side in sides]
    tables = [np.stack([per_prompt(s) for s in side]) for side in sides if side]
    ours = tables[0].mean(0)
    if not c.theirs:
        return ours, tables
    theirs = tables[1].mean(0)
    # The mean of three equal numbers may differ from the number in its last bit, which is no difference.
    equal = np.isclose(ours, theirs, rtol=1e-12, atol=0)
    return np.where(equal, 0.0, ours - theirs), tables


# Curves over spend: what was spent (marks,), and scores (prompts, marks) or (marks,)


Curve = tuple[ArrayLike, ArrayLike]


def smooth(curve: ArrayLike) -> Array:
    """(..., marks) -> (..., marks): the running median of three marks; the two ends stay as they are."""
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

    The rule, fixed before any curve is seen: average over prompts and seeds, smooth by the running median of three marks
    (`smooth`), take the last mark below the target and the one behind it, and read between them along a straight line. A curve
    that is never below needs what its first mark had spent. Several seeds are first read, along straight lines, at as many
    evenly spaced spends as the one with fewest marks has, up to where the first of them ends.
    The interval: the curve is resampled as in `two_level`, its deviations stretched mark by mark, and the rule applied to each.
    Prompts without a score at some mark are dropped. Raises UserError when curves have other prompts or spends that fall.
    """
    made = [_curve(c) for c in curves]
    if not made or len({scores.shape[0] for _, scores in made}) != 1:
        raise UserError("curves must be of the same prompts, one curve a seed")
    spent = made[0][0]
    if len(made) > 1:
        start, end, marks = max(s[0] for s, _ in made), min(s[-1] for s, _ in made), min(len(s) for s, _ in made)
        spent = np.linspace(start, end, marks)
    table = np.stack([scores @ _between(own, spent) for own, scores in made])  # (seeds, prompts, marks)
    keep = np.isfinite(table).all((0, 2))
    one, w, groups, dropped = _weigh(np.where(keep, 0.0, np.nan), strata)
    table, rng, s, n = table[:, keep], np.random.default_rng(seed), len(made), len(one)
    prompts, runs = table.mean(0), np.einsum("snm,n->sm", table, w)
    mean = runs.mean(0)
    at = float(_crossing(spent, smooth(mean)[None], target)[0]) if n else math.nan
    v_prompt, k = _variance(prompts, groups)
    if not np.isfinite(v_prompt).all():
        return Estimate(at, math.nan, math.nan, n, math.nan, level, dropped, s)
    off = (_resample_within(prompts, groups, resamples, rng) - mean) * math.sqrt(n / (n - k) if s == 1 else 1)
    v_seed = runs.var(0, ddof=1) / s if s > 1 else np.zeros_like(mean)
    if s > 1:
        off += math.sqrt(s / (s - 1)) * (_resample_within(runs, np.zeros(s, np.int64), resamples, rng) - mean)
    times = np.sort(
        _crossing(spent, smooth(mean + off * _stretch(level, [(v_prompt, n - k), (v_seed, s - 1)])), target)
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
    resamples: int = 10_000,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> Estimate:
    """The mean score over the whole budget: the area under the curve by the trapezoid rule over spend, divided by the budget.

    One curve a seed; each keeps its first value before its first mark and its last one up to the budget, and what lies beyond
    the budget is cut off. The area is linear in the scores, so its interval is `two_level`'s on the areas of the prompts.
    """
    if not budget > 0:
        raise UserError(f"a budget must be positive, not {budget}")
    areas: list[Array] = []
    for spent, scores in map(_curve, curves):
        inside = (spent > 0) & (spent < budget)
        grid = np.concatenate([[0.0], spent[inside], [budget]])
        heights = scores @ _between(spent, grid)
        areas.append((heights[:, 1:] + heights[:, :-1]) @ np.diff(grid) / (2 * budget))
    return two_level(areas, level, resamples, seed, strata)


def _curve(curve: Curve) -> tuple[Array, Array]:
    """Spends (marks,) and scores (prompts, marks)."""
    spent, scores = (np.asarray(part, np.float64) for part in curve)
    scores = scores[None] if scores.ndim == 1 else scores
    if spent.ndim != 1 or not len(spent) or scores.ndim != 2 or scores.shape[1] != len(spent):
        raise UserError(f"a curve is spends (marks,) and scores (prompts, marks), not {spent.shape} and {scores.shape}")
    if not np.isfinite(spent).all() or (np.diff(spent) < 0).any():
        raise UserError("the spends of a curve must not fall")
    return spent, scores


def _between(spent: Array, grid: Array) -> Array:
    """(marks, grid): scores @ this reads a curve at the spends of the grid, along straight lines, flat beyond its ends."""
    return np.stack([np.interp(grid, spent, unit) for unit in np.eye(len(spent))])


def _crossing(spent: Array, curves: Array, target: float) -> Array:
    """(rows,): where each of the curves (rows, marks) is below the target for the last time; inf where that is its end."""
    below, marks = curves < target, curves.shape[1]
    last = marks - 1 - np.argmax(below[:, ::-1], axis=1)
    left, row = np.minimum(last, max(marks - 2, 0)), np.arange(len(curves))
    right = np.minimum(left + 1, marks - 1)
    rise = curves[row, right] - curves[row, left]
    share = (target - curves[row, left]) / np.where(rise > 1e-290, rise, 1)
    at = spent[left] + share * (spent[right] - spent[left])
    return np.where(~below.any(1), spent[0], np.where(last == marks - 1, np.inf, at))


# Across tasks, over runs: (runs, tasks), scores on one scale


def redrawn(
    columns: ArrayLike, resamples: int = 10_000, seed: int = 0, strata: Sequence[object] | None = None
) -> Array:
    """(prompts, columns) -> (resamples, columns): means under resamples of the prompts, the same ones for every column.

    A prompt without a score in some column is left out of all. strata as in `mean_ci`.
    """
    table = np.asarray(columns, np.float64)
    whole = np.isfinite(table).all(1)
    _, _, groups, _ = _weigh(np.where(whole, 0.0, np.nan), strata)
    return _resample_within(table[whole], groups, resamples, np.random.default_rng(seed))


def iqm(
    scores: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0, drawn: ArrayLike | None = None
) -> Estimate:
    """The interquartile mean of (runs, tasks): the mean of the middle half (arXiv 2108.13264), runs resampled within tasks.

    Expanded percentile intervals. drawn (resamples, runs, tasks): the scores under resamples of the prompts, as of `redrawn`;
    without them the interval knows of no other prompts.
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
    return _percentile(mean, boot, _tail(level, runs * tasks, tasks), level, runs)


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
    prompts, as in `iqm`. Raises UserError when the tasks differ.
    """
    x, y, rng = _runs(ours), _runs(theirs), np.random.default_rng(seed)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"both sides need the same tasks: {x.shape[1]} and {y.shape[1]}")

    def beats(one: Array, other: Array) -> Array:  # (..., runs, runs', tasks)
        return (np.sign(one[..., :, None, :] - other[..., None, :, :]) + 1) / 2

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
    return _percentile(mean, boot, _tail(level, min(n, m) * tasks, tasks), level, min(n, m))


def profile(
    scores: ArrayLike, above: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[Estimate]:
    """The performance profile of (runs, tasks): for each value, the share of runs that score above it (arXiv 2108.13264).

    Tasks weigh the same; runs are resampled within tasks. Expanded percentile intervals, point by point.
    """
    x, rng = _runs(scores), np.random.default_rng(seed)
    runs, tasks = x.shape
    over = (x[:, :, None] > np.asarray(above, np.float64)).astype(np.float64)  # (runs, tasks, values)
    means = [float(m) for m in over.mean((0, 1))]
    if runs < 2:
        return [Estimate(m, math.nan, math.nan, runs, level=level) for m in means]
    counts = rng.multinomial(runs, np.full(runs, 1 / runs), (resamples, tasks)) / runs
    boot = np.einsum("btr,rtv->bv", counts, over, optimize=True) / tasks
    tail = _tail(level, runs * tasks, tasks)
    ends = np.quantile(boot, [tail, 1 - tail], axis=0)
    se = np.sqrt(over.var(0, ddof=1).sum(0) / runs) / tasks
    return [
        Estimate(m, float(low), float(high), runs, float(e), level)
        for m, low, high, e in zip(means, *ends, se, strict=True)
    ]


# Resampling


def _weigh(x: Array, strata: Sequence[object] | None) -> tuple[Array, Array, NDArray[np.int64], int]:
    """Finite prompts, their weights (sum 1), the index of their stratum (0..K - 1), and how many were dropped."""
    keep = np.isfinite(x)
    if strata is not None and len(strata) != len(x):
        raise UserError(f"one stratum a prompt: {len(strata)} labels for {len(x)} prompts")
    labels = np.zeros(len(x), np.int64) if strata is None else np.array([str(s) for s in strata])
    _, groups, counts = np.unique(labels[keep], return_inverse=True, return_counts=True)
    return x[keep], 1 / (len(counts) * counts[groups]), groups, int((~keep).sum())


def _estimate(
    x: Array, w: Array, groups: NDArray[Any], level: float, resamples: int, rng: np.random.Generator, dropped: int
) -> Estimate:
    """The expanded percentile interval of the mean of the strata's means."""
    return _interval(x, w, groups, _resample_within(x, groups, resamples, rng), [], level, rng, dropped)


def _interval(
    x: Array,
    w: Array,
    groups: NDArray[Any],
    boot: Array,
    sides: Sequence[Array],
    level: float,
    rng: np.random.Generator,
    dropped: int,
    test: bool = False,
    lend: bool = False,
) -> Estimate:
    """The interval of the mean of prompts x (n,), from its resamples boot and the means of the seeds of each side.

    Where no side has two seeds it is the expanded percentile; where one has, `two_level`'s. Where two have, each adds a bootstrap of
    its seeds, and the percentiles are stretched by t / z at Welch-Satterthwaite degrees of freedom: Student's draws on both
    sides would cover 98 to 100 %. lend: as in `Contrast`.
    """
    from scipy.stats import t

    n, seeds = len(x), len(sides[0]) if sides else 1
    mean = float((w * x).sum()) if n else math.nan
    variance, k = _variance(x[:, None], groups)
    if not np.isfinite(variance).all():
        return Estimate(mean, math.nan, math.nan, n, math.nan, level, dropped, seeds, mde=math.nan if test else None)
    spread = [side for side in sides if len(side) > 1]
    lent = float(lend and len(sides) == 2 and len(spread) == 1)  # how many seeds' spread the other side adds
    parts = [(float(variance[0]), n - k), *((float(s.var(ddof=1)) * (1 / len(s) + lent), len(s) - 1) for s in spread)]
    se = math.sqrt(sum(v for v, _ in parts))
    if se <= 1e-12 * abs(mean):  # the last bits of a sum are no spread
        se = 0.0
    df = _welch(parts) if spread and se > 0 else n - 1
    off = boot - mean
    if not spread:
        tail = _tail(level, n, k)
        low, high = np.quantile(boot, [tail, 1 - tail])
    elif se == 0:
        low = high = mean
    else:
        stretch = 1.0
        if len(spread) == 1:
            (s,) = spread
            off = off + s.std(ddof=1) * math.sqrt(1 / len(s) + lent) * rng.standard_t(len(s) - 1, len(boot))
        else:
            stretch = _stretch(level, parts)
            for s in spread:  # a side's sign does not matter to its spread's
                off = off + math.sqrt(len(s) / (len(s) - 1)) * (_resample(s, len(boot), rng) - s.mean())
        low, high = mean + stretch * np.quantile(off, [(1 - level) / 2, (1 + level) / 2])
    estimate = Estimate(mean, float(low), float(high), n, se, level, dropped, seeds)
    if not test:
        return estimate
    if se == 0:  # every prompt changed by the same: what its sign says, as of one seed
        p = _sign_flips((x * w)[:, None], np.ones((1, 1)), len(boot), rng)[0]
    elif len(spread) == 1:  # from the draws of the interval: Student's here says .05 where 8 % of nulls lie
        p = float(1 + (np.abs(off) >= abs(mean)).sum()) / (1 + len(off))
    else:
        p = 2 * float(t.sf(abs(mean) / se, df))
    return replace(estimate, p=p, mde=_mde(se, df, level))


def _variance(x: Array, groups: NDArray[Any]) -> tuple[Array, int]:
    """Of the mean of the strata's means of x (n, columns): (columns,), NaN where a stratum is too small; how many strata."""
    k = int(groups.max()) + 1 if len(groups) else 0
    parts = [x[groups == g] for g in range(k)]
    if len(x) <= k or any(len(part) < 2 for part in parts):
        return np.full(x.shape[1], np.nan), k
    return sum((part.var(0, ddof=1) / len(part) for part in parts), np.zeros(x.shape[1])) / k**2, k


def _tail(level: float, n: int, k: int) -> float:
    """The share of resamples to cut off at each end: that of a t-interval of n prompts in k strata, on the normal scale."""
    from scipy.stats import norm, t

    return float(norm.cdf(-math.sqrt(n / (n - k)) * t.ppf((1 + level) / 2, n - k)))


def _welch(parts: Sequence[tuple[Any, int]]) -> Any:
    """Degrees of freedom of a sum of independent variances, each with its own (Welch-Satterthwaite)."""
    total = sum(v for v, _ in parts)
    return total**2 / sum(v**2 / max(df, 1) for v, df in parts)


def _stretch(level: float, parts: Sequence[tuple[Any, int]]) -> Any:
    """t / z at the degrees of freedom of such a sum; 1 where nothing varies."""
    from scipy.stats import norm, t

    total = sum(v for v, _ in parts)
    safe = [(np.where(np.asarray(total) > 0, v, 1.0), df) for v, df in parts]
    return np.where(np.asarray(total) > 0, t.ppf((1 + level) / 2, _welch(safe)) / norm.ppf((1 + level) / 2), 1.0)


def _resample_within(x: Array, groups: NDArray[Any], resamples: int, rng: np.random.Generator) -> Array:
    """(resamples,) or, of x (n, columns), (resamples, columns): the mean of the strata's means under resampling within them."""
    if not len(x):
        return np.full((resamples, *x.shape[1:]), np.nan)
    k = int(groups.max()) + 1
    return sum((_resample(x[groups == g], resamples, rng) for g in range(k)), np.zeros((resamples, *x.shape[1:]))) / k


def _resample(x: Array, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples,) or (resamples, columns): means of len(x) draws with replacement; in chunks of a few MB.

    Columns share the draws, and a vector draws as a single column would: there, how often each row was drawn times the values.
    """
    n = len(x)
    rows = max(1, 1_000_000 // n)
    draws = (rng.integers(0, n, (min(rows, resamples - i), n), np.int32) for i in range(0, resamples, rows))
    if x.ndim == 1:
        return np.concatenate([x[pick].mean(1) for pick in draws])
    with _one_thread():
        return np.concatenate([_counts(pick, n) @ x / n for pick in draws])


def _one_thread() -> Any:
    """Within: products of matrices by one thread. Beside other work a second one, late at every product, made it six times slower."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


def _counts(pick: NDArray[np.int32], n: int) -> Array:
    """(resamples, n): how often each of n rows stands in pick (resamples, draws)."""
    return np.stack([np.bincount(row, minlength=n) for row in pick]).astype(np.float64)


def _sign_flips(x: Array, parts: Array, resamples: int, rng: np.random.Generator) -> list[float]:
    """Two-sided p of the sums of the columns of x @ parts under random signs of the rows; x (n, m), parts (m, columns).

    Exact for few rows, else (1 + as extreme) / (1 + drawn).
    """
    n, total = len(x), x.sum(0) @ parts
    bar = np.abs(total) - 1e-12 * (np.abs(x).sum(0) @ np.abs(parts))  # the last bits of a sum are no difference
    if 2**n <= resamples:
        signs = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return [float(p) for p in (np.abs((2.0 * signs - 1) @ x @ parts) >= bar).mean(0)]
    rows, extreme = max(1, 1_000_000 // n), np.zeros(parts.shape[1], np.int64)
    with _one_thread():
        for i in range(0, resamples, rows):
            signs = np.unpackbits(rng.integers(0, 256, (min(rows, resamples - i), -(-n // 8)), np.uint8), axis=1)[:, :n]
            extreme += (np.abs(2 * (signs.astype(np.float64) @ x @ parts) - total) >= bar).sum(0)
    return [float(p) for p in (1 + extreme) / (1 + resamples)]


def _runs(scores: ArrayLike) -> Array:
    x = np.asarray(scores, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all() or not x.size:
        raise UserError(f"scores must be finite, (runs, tasks), not {x.shape}")
    return x


def _percentile(mean: float, boot: Array, tail: float, level: float, n: int) -> Estimate:
    low, high = np.quantile(boot, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n, float(boot.std(ddof=1)), level)
