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
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UserError

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
    p = _sign_flip(x * w, resamples, rng) if len(x) else None
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
    from scipy.special import nctdtrinc
    from scipy.stats import t

    if n < 2 or not math.isfinite(sd):
        return math.nan
    ncp = nctdtrinc(n - 1, 1 - power, t.ppf((1 + level) / 2, n - 1))  # rejections on the wrong side (< 1e-4) left out
    return float(ncp) * sd / math.sqrt(n)


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


def two_level(seeds: Sequence[ArrayLike], level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """The mean over training seeds and prompts, with both as random: seeds, a list of (n,) vectors on the same prompts.

    Prompts are crossed with seeds (every seed is judged on the same ones), so a resample draws prompts once for all seeds,
    and seeds: deviation = bootstrap of the prompt means + sqrt(S / (S - 1)) bootstrap of the seed means (the root undoes
    the shrinkage of resampling S values). Percentiles are stretched by t / z at Welch-Satterthwaite degrees of freedom,
    since three seeds say little (two say less: 87 % measured where seeds dominate, 94 % with three). Prompts missing
    under any seed are dropped. One seed: `mean_ci`. Raises UserError when the vectors differ in length.
    """
    from scipy.stats import norm, t

    rows = [per_prompt(s) for s in seeds]
    if not rows or len({len(r) for r in rows}) != 1:
        raise UserError("seeds must be judged on the same prompts: a list of vectors of one length")
    if len(rows) == 1:
        return mean_ci(rows[0], level, resamples, seed)
    table = np.stack(rows)
    table = table[:, np.isfinite(table).all(0)]
    (s, n), dropped = table.shape, len(rows[0]) - table.shape[1]
    if n < 2:
        return Estimate(float(table.mean()) if n else math.nan, math.nan, math.nan, n, math.nan, level, dropped, s)
    prompts, runs, mean, rng = table.mean(0), table.mean(1), float(table.mean()), np.random.default_rng(seed)
    v_prompt, v_seed = prompts.var(ddof=1) / n, runs.var(ddof=1) / s
    se = math.sqrt(v_prompt + v_seed)
    if se == 0:
        return Estimate(mean, mean, mean, n, 0.0, level, dropped, s)
    df = (v_prompt + v_seed) ** 2 / (v_prompt**2 / (n - 1) + v_seed**2 / (s - 1))
    stretch = t.ppf((1 + level) / 2, df) / norm.ppf((1 + level) / 2)
    off = _resample(prompts, resamples, rng) - mean + math.sqrt(s / (s - 1)) * (_resample(runs, resamples, rng) - mean)
    low, high = mean + stretch * np.quantile(off, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), n, se, level, dropped, s)


# Across tasks, over runs: (runs, tasks), scores on one scale


def iqm(scores: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """The interquartile mean of (runs, tasks): the mean of the middle half (arXiv 2108.13264), runs resampled within tasks."""
    from scipy.stats import trim_mean

    x, rng = _runs(scores), np.random.default_rng(seed)
    runs, tasks = x.shape
    mean = float(trim_mean(x.ravel(), 0.25))
    if runs < 2:
        return Estimate(mean, math.nan, math.nan, runs, level=level)
    pick = rng.integers(0, runs, (resamples, runs, tasks))
    boot = trim_mean(np.take_along_axis(x[None], pick, 1).reshape(resamples, -1), 0.25, axis=1)
    return _percentile(mean, boot, level, runs)


def probability_of_improvement(
    ours: ArrayLike, theirs: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """The mean over tasks of P(a run of ours beats one of theirs), ties half: the Mann-Whitney statistic (arXiv 2108.13264).

    ours (runs, tasks), theirs (runs', tasks); runs are resampled within tasks. Raises UserError when the tasks differ.
    """
    x, y, rng = _runs(ours), _runs(theirs), np.random.default_rng(seed)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"both sides need the same tasks: {x.shape[1]} and {y.shape[1]}")
    wins = (np.sign(x[:, None] - y[None]) + 1) / 2  # (runs, runs', tasks)
    n, m, tasks = wins.shape
    mean = float(wins.mean())
    if min(n, m) < 2:
        return Estimate(mean, math.nan, math.nan, min(n, m), level=level)
    a = rng.multinomial(n, np.full(n, 1 / n), (resamples, tasks)) / n
    b = rng.multinomial(m, np.full(m, 1 / m), (resamples, tasks)) / m
    return _percentile(mean, np.einsum("rta,abt,rtb->r", a, wins, b, optimize=True) / tasks, level, min(n, m))


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
    from scipy.stats import norm, t

    n, k = len(x), int(groups.max()) + 1 if len(x) else 0
    mean = float((w * x).sum()) if n else math.nan
    parts = [x[groups == g] for g in range(k)]
    if n <= k or any(len(part) < 2 for part in parts):
        return Estimate(mean, math.nan, math.nan, n, math.nan, level, dropped)
    se = math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / k
    boot = sum((_resample(part, resamples, rng) for part in parts), np.zeros(resamples)) / k
    tail = norm.cdf(-math.sqrt(n / (n - k)) * t.ppf((1 + level) / 2, n - k))
    low, high = np.quantile(boot, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n, float(se), level, dropped)


def _resample(x: Array, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples,): means of len(x) draws with replacement; in chunks of a few MB."""
    n = len(x)
    rows = max(1, 1_000_000 // n)
    parts = [x[rng.integers(0, n, (min(rows, resamples - i), n), np.int32)].mean(1) for i in range(0, resamples, rows)]
    return np.concatenate(parts)


def _sign_flip(x: Array, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p of sum x under random signs: exact for few prompts, else (1 + as extreme) / (1 + drawn)."""
    n = len(x)
    bar = abs(x.sum()) - 1e-12 * np.abs(x).sum()
    if 2**n <= resamples:
        signs = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2.0 * signs - 1) @ x) >= bar).mean())
    rows, extreme = max(1, 1_000_000 // n), 0
    for i in range(0, resamples, rows):
        signs = np.unpackbits(rng.integers(0, 256, (min(rows, resamples - i), -(-n // 8)), np.uint8), axis=1)[:, :n]
        extreme += int((np.abs(2 * (signs @ x) - x.sum()) >= bar).sum())
    return (1 + extreme) / (1 + resamples)


def _runs(scores: ArrayLike) -> Array:
    x = np.asarray(scores, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all() or not x.size:
        raise UserError(f"scores must be finite, (runs, tasks), not {x.shape}")
    return x


def _percentile(mean: float, boot: Array, level: float, n: int) -> Estimate:
    low, high = np.quantile(boot, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), n, float(boot.std(ddof=1)), level)
