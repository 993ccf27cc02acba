"""The law of intervals, tests and ranks: components of variance, moderation over rows, contrasts, Holm, power, rank intervals.

The design: n prompts, the same ones and the same noise for every row and for the base, crossed with the S training seeds of a row.
The gain of row r under seed s on prompt i is mu_r + a_rs + b_ri + e_rsi: a has the variance between seeds, b is what the prompt
makes of the method, e is what is left. The mean over seeds and prompts then has the variance

    B / n + (V_a + V_e / n) / S,        B = V_b

and both terms are estimated without the other's noise: V = V_a + V_e / n is the variance between the seeds' means, R = V_e / n
the residual part of it, and P, the variance of the mean over prompts, estimates B / n + R / S, so that B / n is P - R / S. The residual
is counted once. The base has no seeds: of its difference to a row only the row's terms are left. Differences of two rows have P of
the differences by prompt, and the seed terms of both.

Two to five seeds say little of V. Rows of one table share what they know (`moderate`, Smyth 2004), with three guards: the prior's
spread is taken half a standard error wider, as few rows do not show how much they differ; a row whose own V is larger gets the
geometric mean of both; and none has less than .6 R, as V is R at least. Tests and intervals (`Noise`) then take normal noise of
variance B / n + V / S, where both variances are known by their own chi-square, V's with the degrees of freedom of the moderation:
Student's t where only one of the two is there, else the sum of two. The choice was made by simulation (docs/statistics.md), before
any score was read.

Arrays have any leading axes, so that a simulation runs thousands of tables through the functions that make one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MIN_PROMPTS = 5  # with fewer there is no interval, no test and no verdict
PRIOR_WIDENING = 0.5  # standard errors by which the spread of the rows' variances is taken wider
RESIDUAL_FLOOR = 0.6  # of its residual part, which the variance between a row's seeds does not fall below
LARGER_KEEPS = 0.5  # exponent of a row's own variance where it is larger than the squeezed one
UNIFORM_DF = 1e4  # degrees of freedom lent where the rows' variances do not differ


# Variance between seeds


@dataclass(frozen=True)
class SeedSpread:
    """What the seeds of rows show of their spread; arrays (..., rows) of one scorer/metric."""

    variance: Array  # between the means of a row's seeds; NaN where it has one seed
    residual: Array  # the part of it that is the noise of single prompts; NaN likewise
    seeds: Array  # (rows,)


@dataclass(frozen=True)
class SeedVariance:
    """Moderated variance between the means of seeds; arrays (..., rows). NaN: unknown."""

    variance: Array  # of one seed's mean
    residual: Array  # the part of it that is also in the variance of the mean over prompts; 0 for a lent variance
    df: Array  # degrees of freedom of `variance`
    lent: NDArray[np.bool_]  # whether it is that of other rows

    def row(self, index: int) -> SeedVariance:
        """Return the variance of one row."""
        return SeedVariance(
            self.variance[..., index], self.residual[..., index], self.df[..., index], self.lent[..., index]
        )


def moderate(spread: SeedSpread) -> SeedVariance:
    """Squeeze the rows' variances towards their common one; a row of one seed gets the common one, without its residual.

    The prior is a scaled inverse chi-square, fitted to the logarithms of the variances as by Smyth (2004, limma's fitFDist), its
    spread PRIOR_WIDENING standard errors wider. A row whose own variance is larger than the squeezed one gets the geometric mean
    of both. One row with several seeds keeps its own variance and degrees of freedom, and lends both whole.
    """
    seeds = np.asarray(spread.seeds, np.float64)
    observed_df = np.broadcast_to(seeds - 1, spread.variance.shape)
    usable = (observed_df > 0) & ((spread.variance > 0) | (spread.residual > 0))
    observed = np.where(usable, np.maximum(spread.variance, 1e-3 * np.nan_to_num(spread.residual)), 1.0)
    prior, prior_df = fit_prior(observed, np.where(usable, observed_df, 1.0), usable)
    count = usable.sum(-1, keepdims=True)
    alone = np.broadcast_to(count < 2, observed.shape)
    squeezed = np.where(alone, observed, (prior_df * prior + observed_df * observed) / (prior_df + observed_df))
    floor = RESIDUAL_FLOOR * np.nan_to_num(spread.residual)
    larger = np.where(observed > squeezed, squeezed * (observed / squeezed) ** LARGER_KEEPS, squeezed)
    variance = np.where(usable, np.maximum(larger, floor), 0.0)
    df = np.where(alone, np.maximum(observed_df, 1.0), prior_df + observed_df)
    # What a row of one seed is lent: the variance beyond the residual, which its one seed has in its prompts already.
    only = np.where(usable, observed, 0.0).sum(-1, keepdims=True)
    only_df = np.where(usable, observed_df, 0.0).sum(-1, keepdims=True)
    residual = np.where(usable, np.nan_to_num(spread.residual), 0.0).sum(-1, keepdims=True) / np.maximum(count, 1)
    lent = np.where(count == 1, only, np.maximum(prior - residual, 0.0))
    lent = np.where(count > 0, lent, np.nan)
    single = observed_df < 1
    return SeedVariance(
        np.where(single, lent, variance),
        np.where(single, 0.0, np.nan_to_num(spread.residual)),
        np.where(single, np.where(count == 1, only_df, prior_df), df),
        single,
    )


def fit_prior(
    variance: Array, df: Array, usable: NDArray[np.bool_], widening: float = PRIOR_WIDENING
) -> tuple[Array, Array]:
    """Return prior variance and degrees of freedom, (..., 1) each, from the usable variances (..., rows); widening 0 is limma's."""
    from scipy.special import digamma, polygamma

    count = np.maximum(usable.sum(-1, keepdims=True), 1)
    mean = lambda x: np.where(usable, x, 0.0).sum(-1, keepdims=True) / count
    logs = np.log(variance) - digamma(df / 2) + np.log(df / 2)
    center, noise = mean(logs), mean(polygamma(1, df / 2))
    spread = mean(np.square(logs - center)) * count / np.maximum(count - 1, 1)
    error = np.sqrt((mean(polygamma(3, df / 2)) + 2 * noise**2 * count / np.maximum(count - 1, 1)) / count)
    beyond = spread - noise + widening * error
    prior_df = np.minimum(2 * inverse_trigamma(np.maximum(beyond, 2 / UNIFORM_DF)), UNIFORM_DF)
    return np.exp(center + digamma(prior_df / 2) - np.log(prior_df / 2)), prior_df


def inverse_trigamma(x: ArrayLike) -> Array:
    """Return y with trigamma(y) = x > 0, by Newton's method on 1 / trigamma, which is convex (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    target = np.asarray(x, np.float64)
    y = 0.5 + 1 / target
    for _ in range(30):
        trigamma = polygamma(1, y)
        step = trigamma * (1 - trigamma / target) / polygamma(2, y)
        y = y + step
        if np.all(np.abs(step) <= 1e-9 * y):
            break
    return y


# Noise of one estimate


@dataclass(frozen=True)
class Noise:
    """Sampling noise of estimates: normal, its variance the sum of two parts that are known by their own chi-square.

    Arrays of one shape. Quantiles and p are means over quadrature nodes of the two chi-squares, exact to four digits.
    """

    prompts: Array  # variance due to the prompts, B / n
    prompt_df: Array
    seeds: Array  # variance due to the seeds; 0 where there are none
    seed_df: Array

    @property
    def se(self) -> Array:
        """Return the standard error."""
        return np.sqrt(self.prompts + self.seeds)

    def p(self, difference: ArrayLike) -> Array:
        """Return the two-sided p of each difference against no difference; NaN where the noise is unknown."""
        x = np.abs(np.asarray(difference, np.float64))
        still = self.se <= 1e-12 * x  # the last bits of a sum are no spread
        # Every prompt moved by the same: what the signs of n prompts say.
        alike = np.where(x > 0, 2.0 ** -np.minimum(self.prompt_df, 1000), 1.0)
        return np.where(still, alike, 2 * self._beyond(np.where(still, 1.0, x), still))

    def quantile(self, level: float = 0.95) -> Array:
        """Return half the width of the interval of this level: Newton's method on the logarithm of the tail."""
        from scipy.special import stdtrit

        total = self.prompts + self.seeds
        varies = total > 0
        df = np.where(self.seeds > self.prompts, self.seed_df, self.prompt_df)
        both = varies & self._both
        mixed = welch_df([self.prompts, self.seeds], [self.prompt_df, self.seed_df])
        half = np.where(
            varies, np.sqrt(np.where(varies, total, 1.0)) * stdtrit(np.where(both, mixed, df), (1 + level) / 2), self.se
        )
        if both.any():
            observed = Noise(
                *(
                    np.broadcast_to(x, both.shape)[both]
                    for x in (self.prompts, self.prompt_df, self.seeds, self.seed_df)
                )
            )
            x, target = half[both], math.log((1 - level) / 2)
            for _ in range(12):
                tail, density = observed._tail_of_sum(x)
                step = (np.log(tail) - target) * tail / density
                x = np.clip(x + step, x / 2, x * 2)
                if (np.abs(step) <= 1e-9 * x).all():
                    break
            half[both] = x
        return half

    def df(self, level: float = 0.95) -> Array:
        """Return the degrees of freedom of the t distribution that has the same standard error and quantile."""
        from scipy.special import stdtrit

        se = np.where(self.se > 0, self.se, 1.0)
        ratio = np.where(self.se > 0, self.quantile(level) / se, math.nan)
        low, high = np.full(ratio.shape, 0.2), np.full(ratio.shape, 1e7)
        for _ in range(45):
            middle = np.sqrt(low * high)
            wide = stdtrit(middle, (1 + level) / 2) > ratio
            low, high = np.where(wide, middle, low), np.where(wide, high, middle)
        return np.sqrt(low * high)

    def mde(self, level: float = 0.95, power: float = 0.8) -> Array:
        """Return the true difference that the test at 1 - level finds with this power: noncentral t with `df`."""
        from scipy.special import nctdtrinc, stdtrit

        df = self.df(level)
        known = np.isfinite(self.se) & (self.se > 0)
        safe = np.where(known, df, 10.0)
        shift = nctdtrinc(safe, 1 - power, stdtrit(safe, (1 + level) / 2))  # the wrong side (< 1e-4) left out
        return np.where(known, shift * self.se, np.where(self.se == 0, 0.0, math.nan))

    def power(self, difference: ArrayLike, level: float = 0.95) -> Array:
        """Return the probability with which the test at 1 - level finds a true difference."""
        from scipy.special import nctdtr, stdtrit

        df = self.df(level)
        known = np.isfinite(self.se) & (self.se > 0)
        safe = np.where(known, df, 10.0)
        shift = np.abs(np.asarray(difference, np.float64)) / np.where(known, self.se, 1.0)
        detected = 1 - nctdtr(safe, shift, stdtrit(safe, (1 + level) / 2))
        return np.where(known, detected, math.nan)

    @property
    def _both(self) -> NDArray[np.bool_]:
        """Return where neither part is nothing beside the other."""
        return (self.prompts > 1e-12 * self.seeds) & (self.seeds > 1e-12 * self.prompts)

    def _beyond(self, x: Array, still: NDArray[np.bool_]) -> Array:
        """Return P(noise > x) for x > 0; 0 where there is no noise."""
        from scipy.special import stdtr

        unknown = ~np.isfinite(self.se)
        idle = still | unknown
        prompts, seeds = np.where(idle, 1.0, self.prompts), np.where(idle, 0.0, self.seeds)
        tail = stdtr(np.where(seeds > prompts, self.seed_df, self.prompt_df), -x / np.sqrt(prompts + seeds))
        both = self._both & ~idle
        if both.any():
            dfs = (np.broadcast_to(df, x.shape)[both] for df in (self.prompt_df, self.seed_df))
            prompt_df, seed_df = dfs
            tail[both] = Noise(prompts[both], prompt_df, seeds[both], seed_df)._tail_of_sum(x[both])[0]
        return np.where(unknown, math.nan, np.where(still, 0.0, tail))

    def _tail_of_sum(self, x: Array) -> tuple[Array, Array]:
        """Return P(noise > x) and the density there, where both parts are there; arrays (n,)."""
        from scipy.special import ndtr

        tail, density = np.zeros(x.shape), np.zeros(x.shape)
        # Many prompts: their variance is as good as known.
        for few, nodes in ((self.prompt_df < KNOWN_DF, 8), (self.prompt_df >= KNOWN_DF, 0)):
            if not few.any():
                continue
            a, b, y = self.prompts[few], self.seeds[few], x[few]
            of_prompts = chi_square_nodes(self.prompt_df[few], nodes) if nodes else KNOWN
            of_seeds = chi_square_nodes(self.seed_df[few], 24)
            part, slope = np.zeros(y.shape), np.zeros(y.shape)
            weights = of_seeds.weights
            for g, weight in zip(of_prompts.values, of_prompts.weights, strict=True):
                for start in range(0, len(y), CHUNK):
                    at = slice(start, start + CHUNK)
                    of_prompt = a[at] / (g[at] if nodes else g)
                    sd = np.sqrt(of_prompt + b[at] / of_seeds.values[:, at])
                    z = y[at] / sd
                    part[at] += weight * (weights @ ndtr(-z))
                    slope[at] += weight * (weights @ (np.exp(-z * z / 2) / sd))
            tail[few], density[few] = part, slope / math.sqrt(2 * math.pi)
        return tail, density


@dataclass(frozen=True)
class ChiSquareNodes:
    """Quadrature over a chi-square divided by its degrees of freedom."""

    values: Array  # (nodes, ...)
    weights: Array  # (nodes,), with sum 1


KNOWN_DF = 100.0  # from here on the prompts' part of the variance is taken as known
CHUNK = 50_000  # estimates at a time, of 24 nodes each
KNOWN = ChiSquareNodes(np.ones((1, 1)), np.ones(1))


def chi_square_nodes(df: Array, nodes: int) -> ChiSquareNodes:
    """Return the nodes for these degrees of freedom: Gauss-Legendre in the cube root of the probability, dense where it is small.

    There the variance is small, and the tail of Student's t is made.
    """
    grid, table, weights = _node_table(nodes)
    at = np.log(np.clip(df, grid[0], grid[-1]))
    return ChiSquareNodes(np.exp(np.stack([np.interp(at, np.log(grid), row) for row in table])), weights)


@lru_cache(maxsize=4)
def _node_table(nodes: int) -> tuple[Array, Array, Array]:
    """Return degrees of freedom (G,), logarithms of the nodes (nodes, G) and their weights."""
    from scipy.special import gammaincinv

    place, weight = np.polynomial.legendre.leggauss(nodes)
    root = (place + 1) / 2
    grid = np.geomspace(0.5, 1e5, 400)
    probability = root[:, None] ** 3
    values = gammaincinv(grid / 2, probability) * 2 / grid
    return grid, np.log(np.maximum(values, 1e-290)), weight / 2 * 3 * root**2


def welch_df(variances: Sequence[Array], dfs: Sequence[Array]) -> Array:
    """Return the degrees of freedom of a sum of independent variances (Welch-Satterthwaite); 1 where nothing varies."""
    total = np.sum(variances, axis=0)
    squares = np.sum([np.square(v) / df for v, df in zip(variances, dfs, strict=True)], axis=0)
    return np.where(total > 0, np.square(total) / np.where(squares > 0, squares, 1.0), 1.0)


def contrast_noise(mean_variance: Array, prompt_df: Array, sides: Sequence[tuple[SeedVariance, int]]) -> Noise:
    """Return the noise of a row's mean, or of the difference of two rows.

    Args:
        mean_variance: P: the variance of the mean over prompts, seeds averaged first.
        prompt_df: prompts minus strata.
        sides: of each row that has seeds, the variance of one seed's mean, and how many seeds it has.
    """
    mean_variance = np.asarray(mean_variance, np.float64)
    if not sides:
        zero = np.zeros(mean_variance.shape)
        return Noise(mean_variance, np.broadcast_to(prompt_df, zero.shape), zero, zero + 1.0)
    parts = [side.variance / seeds for side, seeds in sides]
    residual = np.sum([side.residual / seeds for side, seeds in sides], axis=0)
    prompts = np.maximum(mean_variance - residual, 0.0)
    # A lent variance is no second estimate beside that of the row that lends.
    lent = np.any([side.lent for side, _ in sides], axis=0)
    dfs = [side.df for side, _ in sides]
    seed_df = np.where(lent, np.min(dfs, axis=0), welch_df(parts, dfs))
    return Noise(prompts, np.broadcast_to(prompt_df, prompts.shape), np.sum(parts, axis=0), seed_df)


# Many tests and ranks


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for being many (Holm 1979): max over smaller ones of (m - rank) p, at most 1; NaN stays, uncounted."""
    ps = np.asarray(p, np.float64)
    order = [int(i) for i in np.argsort(ps, kind="stable") if not np.isnan(ps[i])]
    out, worst = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, (len(order) - rank) * float(ps[i]))
        out[i] = min(worst, 1.0)
    return out


@dataclass(frozen=True)
class RankInterval:
    """The ranks that a row may have: `best` if it beats all rows that it ties with, `worst` if they all beat it."""

    best: int
    worst: int

    def __str__(self) -> str:
        return str(self.best) if self.best == self.worst else f"{self.best}-{self.worst}"


def rank_intervals(labels: Sequence[str], better: Iterable[tuple[str, str]]) -> dict[str, RankInterval]:
    """Return the interval of each label's rank from the pairs (above, below) that differ, all tested together.

    A row's best rank is one more than the number of rows that are better, its worst the number of rows minus those that are worse.
    Better than better is better. Where the family-wise error of the pairs is at most 5 %, all intervals hold together with 95 %
    (Mogstad, Romano, Shaikh and Wilhelm 2024).
    """
    above: Mapping[str, set[str]] = {label: set() for label in labels}
    for winner, loser in better:
        above[loser].add(winner)
    for _ in labels:  # the transitive closure
        for label in labels:
            above[label] |= {further for winner in above[label] for further in above[winner]} - {label}
    beats = {label: sum(label in winners for winners in above.values()) for label in labels}
    return {label: RankInterval(1 + len(above[label]), len(labels) - beats[label]) for label in labels}


# Shares near 0 and 1


def share_interval(mean: Array, se: Array, prompts: Array, ratio: Array) -> tuple[Array, Array]:
    """Return Wilson's interval of a mean of scores between 0 and 1, with as many trials as its standard error stands for.

    p (1 - p) / se^2 independent trials have the standard error of the clustered scores. Where all scores are 0, or all 1, the
    prompts are the trials.

    Args:
        mean: of the scores.
        se: its standard error, prompts clustered.
        prompts: how many there are.
        ratio: half the width of the interval in standard errors.
    """
    edge = np.where((mean < 1e-12) | (mean > 1 - 1e-12), 0.0, mean * (1 - mean))  # a sum's last bits are no share
    flat = (se <= 0) & (edge > 0)  # all prompts have the same share: nothing varies
    trials = np.where(se > 0, edge / np.square(np.where(se > 0, se, 1.0)), prompts)
    trials = np.where(edge > 0, trials, prompts)
    z2 = np.square(ratio) / np.maximum(trials, 1e-300)
    center = (mean + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (edge + z2 / 4)) / (1 + z2)
    low, high = np.clip(center - half, 0.0, 1.0), np.clip(center + half, 0.0, 1.0)
    return np.where(flat, mean, low), np.where(flat, mean, high)
