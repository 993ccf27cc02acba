"""Ratio of two gains on the same prompts and seeds, such as held-out gain over training gain: its tests, and Fieller's interval.

Whether the ratio is rho is whether numerator - rho denominator has mean 0. That is a gain like any other, paired by prompt and by
seed, so it is tested by the law of bench/stats/law.py, the variance between its seeds moderated over the rows of a table. The interval
holds the ratios that the test does not reject (Fieller 1954). It is bounded where the denominator is told from zero; elsewhere any
ratio is possible in the end, and none is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .intervals import NOISE_PARTS, per_prompt, seed_spread
from .law import MIN_PROMPTS, Noise, SeedSpread, contrast_noise, moderate
from .resampling import Array, weigh
from .small_samples import variance_of_mean

LEVEL = 0.95
BISECTIONS = 26  # of the angle whose tangent is the ratio
LENT_KEEPS = 0.1  # of the residual that a lent variance is found beyond: without it the flag errs in up to 8 %


@dataclass(frozen=True)
class PairedGains:
    """Gains of one row by two scorers: one (n,) or (n, images) a seed, all on the same prompts."""

    numerator: Sequence[ArrayLike]
    denominator: Sequence[ArrayLike]


@dataclass(frozen=True)
class Quadratic:
    """A variance of numerator - rho denominator, for any rho; arrays (..., rows)."""

    numerator: Array
    denominator: Array
    covariance: Array

    def at(self, cosine: Array, sine: Array) -> Array:
        """Return the variance of cosine numerator - sine denominator."""
        value = cosine**2 * self.numerator - 2 * cosine * sine * self.covariance + sine**2 * self.denominator
        return np.maximum(value, 0.0)  # rounding


@dataclass(frozen=True)
class GainMoments:
    """What the rows of a table show of two gains; arrays (..., rows). Leading axes are tables."""

    numerator: Array  # means
    denominator: Array
    prompts: Quadratic  # of the means over prompts, seeds averaged first
    seeds: Quadratic  # between the means of seeds; NaN where a row has one
    residual: Quadratic  # the part of it that is the noise of single prompts
    seed_count: Array  # (rows,)
    prompt_df: Array  # (rows,)
    prompts_used: Array  # (rows,)

    def contrast(self, cosine: ArrayLike, sine: ArrayLike) -> tuple[Array, Noise]:
        """Return mean and noise of cosine numerator - sine denominator of each row, for the same direction in all.

        Where no row has several seeds the noise is that of the prompts alone. A variance that is lent keeps a part of
        its residual: what is left without it is zero too often where rows move far and their seeds lie close.
        """
        c, s = np.asarray(cosine, np.float64), np.asarray(sine, np.float64)
        residual = self.residual.at(c, s)
        moderated = moderate(SeedSpread(self.seeds.at(c, s), residual, self.seed_count))
        several = np.isfinite(residual)
        kept = np.where(several, residual, 0.0).sum(-1, keepdims=True) / np.maximum(several.sum(-1, keepdims=True), 1)
        moderated = replace(moderated, variance=moderated.variance + np.where(moderated.lent, LENT_KEEPS * kept, 0.0))
        mean_variance = self.prompts.at(c, s)
        parts: list[Noise] = []
        for row, count in enumerate(self.seed_count.astype(int).tolist()):
            variance = moderated.row(row)
            sides = [(variance, count)] if np.isfinite(variance.variance).all() else []
            parts.append(contrast_noise(mean_variance[..., row], self.prompt_df[row], sides))
        stacked = (np.stack([getattr(part, name) for part in parts], -1) for name in NOISE_PARTS)
        return c * self.numerator - s * self.denominator, Noise(*stacked)

    def p_below(self, ratio: float) -> Array:
        """Return the one-sided p of each row for a ratio below this one, given that the denominator is positive."""
        mean, noise = self.contrast(1.0, ratio)
        return _one_sided(mean, noise)

    def p_rises(self) -> Array:
        """Return the two-sided p of each row for a denominator other than zero."""
        mean, noise = self.contrast(0.0, -1.0)
        return noise.p(mean)


def _one_sided(mean: Array, noise: Noise) -> Array:
    p = noise.p(mean)
    return np.where(mean < 0, p / 2, 1 - p / 2)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two gains with its 95 % interval; NaN where the denominator did not rise for sure."""

    ratio: float
    low: float
    high: float
    p_rises: float  # of the denominator, two-sided, against no change; NaN with fewer than five prompts
    rises: bool  # whether the denominator is told from zero and positive
    n: int  # prompts
    seeds: int


def moments(rows: Sequence[PairedGains], strata: Sequence[object] | None = None) -> GainMoments:
    """Reduce the gains of a table's rows. An image counts where it is finite under every seed of its row by both scorers.

    Raises UserError where the gains of a row differ in shape.
    """
    parts = [_row_moments(row, strata) for row in rows]
    column = lambda k: np.array([part[k] for part in parts], np.float64)
    form = lambda k: _polarised(*np.moveaxis(np.array([part[k] for part in parts], np.float64), 1, 0))
    return GainMoments(column(0), column(1), form(2), form(3), form(4), column(5), column(6), column(7))


def ratios(table: GainMoments, level: float = LEVEL) -> list[Ratio]:
    """Return the ratio of each row of a table (rows,), with its interval."""
    count = len(table.seed_count)
    if not count:
        return []
    p = table.p_rises()
    rises = (table.denominator > 0) & (p < 1 - level)
    angle = np.arctan2(table.numerator, np.where(rises, table.denominator, 1.0))
    ends = np.where(rises, np.tan([angle, *_ends(table, angle, level)]), math.nan)
    return [
        Ratio(
            _one_nan(ends[0, k]), _one_nan(ends[1, k]), _one_nan(ends[2, k]), _one_nan(p[k]), bool(rises[k]),
            int(table.prompts_used[k]), int(table.seed_count[k]),
        )
        for k in range(count)
    ]  # fmt: skip


def _one_nan(x: float) -> float:
    """Return the number, NaN as the one of `math`, so that two equal ratios are equal."""
    return math.nan if math.isnan(x) else float(x)


def _ends(table: GainMoments, inside: Array, level: float) -> Array:
    """Return the two angles of each row, (2, rows), at which the test begins to reject, by bisection from one that it does not reject."""
    rows = len(inside)
    repeated = _repeated(
        table, 2 * rows
    )  # row r asks for its own ratio, at which the variance of seeds is moderated over all rows
    own = (np.arange(2 * rows), np.tile(np.arange(rows), 2))
    low, high = np.tile(inside, 2), np.repeat([-math.pi / 2, math.pi / 2], rows)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean, noise = repeated.contrast(np.cos(middle)[:, None], np.sin(middle)[:, None])
        noise = Noise(*(getattr(noise, name)[own] for name in NOISE_PARTS))
        rejected = noise.p(mean[own]) < 1 - level
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return low.reshape(2, rows)


def _repeated(table: GainMoments, times: int) -> GainMoments:
    """Return the table several times, along a leading axis."""
    wide = lambda x: np.broadcast_to(x, (times, *x.shape))
    form = lambda q: Quadratic(wide(q.numerator), wide(q.denominator), wide(q.covariance))
    forms = (form(table.prompts), form(table.seeds), form(table.residual))
    return GainMoments(
        wide(table.numerator), wide(table.denominator), *forms, table.seed_count, table.prompt_df, table.prompts_used
    )


def _polarised(numerator: Array, denominator: Array, difference: Array) -> Quadratic:
    """Return the form of the variances of numerator, denominator and numerator - denominator."""
    return Quadratic(numerator, denominator, (numerator + denominator - difference) / 2)


def _gains_by_prompt(row: PairedGains) -> tuple[list[Array], list[Array]]:
    """Return (n,) a seed of both gains, NaN where a prompt has no image that all of them have a score of."""
    both = [[np.asarray(x, np.float64) for x in side] for side in (row.numerator, row.denominator)]
    if not both[0] or len(both[0]) != len(both[1]) or len({x.shape for side in both for x in side}) != 1:
        raise UserError("a ratio of gains needs the same prompts and seeds by both scorers")
    whole = np.isfinite(np.stack(both[0] + both[1])).all(0)
    ours, theirs = ([per_prompt(np.where(whole, x, np.nan)) for x in side] for side in both)
    return ours, theirs


def _row_moments(
    row: PairedGains, strata: Sequence[object] | None
) -> tuple[float, float, Array, Array, Array, int, int, int]:
    ours, theirs = _gains_by_prompt(row)
    kinds = [ours, theirs, [a - b for a, b in zip(ours, theirs, strict=True)]]
    averaged = np.stack([np.mean(kind, axis=0) for kind in kinds], axis=1)  # (n, 3)
    sample = weigh(averaged[:, 0], strata)
    values = averaged[np.isfinite(averaged[:, 0])]
    variance, k = variance_of_mean(values, sample.stratum)
    if len(values) < MIN_PROMPTS:
        variance = np.full(3, math.nan)
    spread = seed_spread(kinds, strata)
    means = sample.weights @ values if len(values) else np.full(3, math.nan)
    seeds = int(spread.seeds.min())
    return (
        float(means[0]),
        float(means[1]),
        variance,
        spread.variance,
        spread.residual,
        seeds,
        max(len(values) - k, 1),
        len(values),
    )
