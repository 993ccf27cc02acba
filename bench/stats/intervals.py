"""Estimates with intervals from per-prompt scores: means, paired differences, several training seeds, many contrasts.

The unit of analysis is the prompt: images of one prompt are averaged first (clustered errors, arXiv 2411.00640). Scores are
(n_prompts,) or (n_prompts, n_images); NaN = could not be scored, left out, and a prompt without any score is dropped and
counted. Every interval, p and minimal detectable effect is that of `law.Noise`; means of scores between 0 and 1 have
Wilson's interval. With fewer than `law.MIN_PROMPTS` prompts there is no interval and no test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .law import MIN_PROMPTS, Noise, SeedSpread, SeedVariance, contrast_noise, moderate, share_interval
from .resampling import Array, PromptSample, weigh
from .small_samples import variance_of_mean


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


def mean_ci(values: ArrayLike, level: float = 0.95, strata: Sequence[object] | None = None) -> Estimate:
    """The mean over prompts of one evaluation's scores, with its clustered interval; values (n,) or (n, images).

    Wilson's interval where all scores lie between 0 and 1, else Student's. strata (n,): labels, e.g. GenEval's tags; the
    mean is then the mean of the strata's means. For differences: `paired`.
    """
    return crossed([Contrast([values], share=is_share(values))], level, strata)[0]


def is_share(values: ArrayLike) -> bool:
    """Return whether all scores lie between 0 and 1, so that their mean does."""
    x = np.asarray(values, np.float64)
    return not ((x < 0) | (x > 1)).any()


def proportion(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A share with Wilson's interval; for one yes or no a prompt and no strata."""
    from scipy.stats import binomtest

    if n < 1:
        return Estimate(math.nan, math.nan, math.nan, 0, level=level)
    ci, p = binomtest(successes, n).proportion_ci(level, "wilson"), successes / n
    return Estimate(p, float(ci.low), float(ci.high), n, math.sqrt(p * (1 - p) / n), level)


# Two samples on the same prompts


def paired(
    before: ArrayLike, after: ArrayLike, level: float = 0.95, strata: Sequence[object] | None = None
) -> Estimate:
    """after - before per prompt and image (common noise): interval, p, minimal detectable effect, all of the paired t-test.

    before, after (n,) or (n, images) in one order; an image counts where both are finite. before may be one number (a
    reported mean, taken as exact). strata as in `mean_ci`. Raises UserError when the shapes differ.
    """
    b, a = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if b.shape != a.shape and b.ndim:
        raise UserError(f"paired scores must be of the same prompts and images: {b.shape} before, {a.shape} after")
    return crossed([Contrast([a - b], test=True)], level, strata)[0]


# Several training seeds


def two_level(seeds: Sequence[ArrayLike], level: float = 0.95, strata: Sequence[object] | None = None) -> Estimate:
    """The mean over training seeds and prompts, with both as random: seeds, a list of (n,) vectors on the same prompts.

    Prompts are crossed with seeds; the noise is `law.contrast_noise`, the seeds' variance that of these seeds alone. Prompts missing
    under any seed are dropped. strata as in `mean_ci`. Raises UserError when the vectors differ in length.
    """
    return crossed([Contrast(seeds)], level, strata)[0]


@dataclass(frozen=True)
class Contrast:
    """Ours minus theirs, one (n,) or (n, images) a training seed, all on the same prompts; without theirs, ours alone.

    An image counts where it is finite under every seed of both. The seeds of the two sides are independent. spreads: of each side
    the variance between its seeds, moderated over a table; NaN where it is unknown, and then nothing is tested; None where the
    side has no seeds, as the base. Without spreads the variance is that of the contrast's own seeds.
    """

    ours: Sequence[ArrayLike]
    theirs: Sequence[ArrayLike] = ()
    test: bool = False  # also p and mde, against no difference
    spreads: Sequence[SeedVariance | None] | None = None
    share: bool = False  # a mean of scores between 0 and 1


def seed_spread(rows: Sequence[Sequence[ArrayLike]], strata: Sequence[object] | None = None) -> SeedSpread:
    """Return what the seeds of each row show of their spread; a row is one (n,) or (n, images) a seed.

    An image counts where it is finite under every seed of its row. NaN where a row has one seed, or too few prompts.
    """
    parts = [_spread_of_row(row, strata) for row in rows]
    return SeedSpread(
        np.array([variance for variance, _ in parts], np.float64),
        np.array([residual for _, residual in parts], np.float64),
        np.array([len(row) if math.isfinite(observed[0]) else 1 for row, observed in zip(rows, parts, strict=True)]),
    )


def table_spreads(
    rows: Mapping[str, Sequence[ArrayLike]], strata: Sequence[object] | None = None
) -> dict[str, SeedVariance]:
    """Return the variance between the seeds of each row of a table, moderated over its rows; NaN where nothing is known of it."""
    made = moderate(seed_spread(list(rows.values()), strata))
    return {label: made.row(k) for k, label in enumerate(rows)}


def crossed(
    contrasts: Sequence[Contrast], level: float = 0.95, strata: Sequence[object] | None = None
) -> list[Estimate]:
    """Estimate many contrasts on the same prompts, by the law of bench/stats/law.py.

    Args:
        contrasts: rows, or differences of rows, each with its seeds.
        level: the coverage of the interval.
        strata: (n,) labels, e.g. GenEval's tags; the mean is then the mean of the strata's means.

    Raises:
        UserError: when the shapes differ.
    """
    if not contrasts:
        return []
    parts = _all_components(contrasts, strata)
    mean, noise = _stacked(parts)
    half = noise.quantile(level)
    low, high = mean - half, mean + half
    share = np.array([contrast.share for contrast in contrasts])
    if share.any():
        # Where nothing varies, Student's quantile of the prompts.
        prompts_alone = Noise(np.ones(len(parts)), noise.prompt_df, np.zeros(len(parts)), np.ones(len(parts)))
        ratio = np.where(noise.se > 0, half / np.where(noise.se > 0, noise.se, 1.0), prompts_alone.quantile(level))
        counts = np.array([part.n for part in parts], np.float64)
        ends = share_interval(mean, noise.se, counts, ratio)
        wilson = share & np.isfinite(noise.se)
        low, high = (np.where(wilson, end, other) for end, other in zip(ends, (low, high), strict=True))
    tested = np.array([contrast.test and part.known for contrast, part in zip(contrasts, parts, strict=True)])
    p, mde = np.full(len(parts), np.nan), np.full(len(parts), np.nan)
    if tested.any():
        observed = Noise(*(getattr(noise, name)[tested] for name in NOISE_PARTS))
        p[tested], mde[tested] = observed.p(mean[tested]), observed.mde(level)
    return [
        Estimate(
            part.mean, float(low[k]), float(high[k]), part.n, float(noise.se[k]), level, part.dropped, part.seeds,
            p=float(p[k]) if tested[k] and math.isfinite(p[k]) else None,
            mde=float(mde[k]) if tested[k] and math.isfinite(p[k]) else None,
        )
        for k, part in enumerate(parts)
    ]  # fmt: skip


@dataclass(frozen=True)
class NoisyMeans:
    """Means of contrasts and their sampling noise, arrays (contrasts,)."""

    mean: Array
    noise: Noise
    prompts: NDArray[np.int64]  # that entered
    known: NDArray[np.bool_]  # whether the variance between seeds is in the noise, where there are seeds


def observe(contrasts: Sequence[Contrast], strata: Sequence[object] | None = None) -> NoisyMeans:
    """Return the mean and the noise of each contrast: what `crossed` makes its estimates of."""
    parts = _all_components(contrasts, strata)
    return NoisyMeans(
        *_stacked(parts), np.array([part.n for part in parts], np.int64), np.array([part.known for part in parts], bool)
    )


# The components of one estimate

NOISE_PARTS = ("prompts", "prompt_df", "seeds", "seed_df")


@dataclass(frozen=True)
class _Components:
    mean: float
    noise: Noise  # of numbers
    n: int  # prompts that entered
    dropped: int
    seeds: int  # of ours
    prompts: int  # all
    known: bool  # whether the variance between seeds is in the noise, where there are seeds


def _all_components(contrasts: Sequence[Contrast], strata: Sequence[object] | None) -> list[_Components]:
    parts = [_components(contrast, strata) for contrast in contrasts]
    if len({part.prompts for part in parts}) > 1:
        raise UserError("contrasts must be of the same prompts")
    return parts


def _stacked(parts: Sequence[_Components]) -> tuple[Array, Noise]:
    """Return means and noise of all parts, arrays (parts,)."""
    noise = Noise(*(np.array([getattr(part.noise, name) for part in parts], np.float64) for name in NOISE_PARTS))
    return np.array([part.mean for part in parts], np.float64), noise


def _components(c: Contrast, strata: Sequence[object] | None) -> _Components:
    difference, sides = _sides_by_prompt(c)
    sample = weigh(difference, strata)
    n, whole = len(sample.values), np.isfinite(difference)
    mean = float((sample.weights * sample.values).sum()) if n else math.nan
    variance, k = variance_of_mean(sample.values[:, None], sample.stratum)
    p_variance = float(variance[0]) if n >= MIN_PROMPTS else math.nan
    if math.sqrt(p_variance) <= 1e-12 * abs(mean):  # the last bits of a sum are no spread
        p_variance = 0.0
    spreads = _own_spreads([side[:, whole] for side in sides], sample) if c.spreads is None else c.spreads
    with_seeds = [
        (spread, len(side))
        for spread, side in zip(spreads, sides, strict=True)
        if spread is not None and np.isfinite(spread.variance)
    ]
    known = all(spread is None or bool(np.isfinite(spread.variance)) for spread in spreads)
    noise = contrast_noise(np.array(p_variance), np.array(float(max(n - k, 1))), with_seeds)
    return _Components(mean, noise, n, sample.dropped, len(sides[0]), len(difference), known)


def _own_spreads(sides: Sequence[Array], sample: PromptSample) -> list[SeedVariance | None]:
    """Return the variance between the seeds of each side, moderated over the sides; None for a side of one seed."""
    parts = [_spread(side, sample) for side in sides]
    made = moderate(
        SeedSpread(
            np.array([variance for variance, _ in parts], np.float64),
            np.array([residual for _, residual in parts], np.float64),
            np.array(
                [len(side) if math.isfinite(observed[0]) else 1 for side, observed in zip(sides, parts, strict=True)]
            ),
        )
    )
    return [made.row(k) if len(side) > 1 else None for k, side in enumerate(sides)]


def _spread_of_row(seeds: Sequence[ArrayLike], strata: Sequence[object] | None) -> tuple[float, float]:
    tables = [np.asarray(seed, np.float64) for seed in seeds]
    if len(tables) < 2:
        return math.nan, math.nan
    whole = np.isfinite(np.stack(tables)).all(0)
    by_prompt = np.stack([per_prompt(np.where(whole, table, np.nan)) for table in tables])
    sample = weigh(by_prompt.mean(0), strata)
    return _spread(by_prompt[:, np.isfinite(by_prompt).all(0)], sample)


def _spread(seeds: Array, sample: PromptSample) -> tuple[float, float]:
    """Return the variance between the means of seeds (S, n), and the part of it that the prompts' residuals make."""
    if len(seeds) < 2 or seeds.shape[1] < MIN_PROMPTS:
        return math.nan, math.nan
    means = seeds @ sample.weights
    residual, _ = variance_of_mean((seeds - seeds.mean(0)).T, sample.stratum)
    variance = float(means.var(ddof=1))
    if math.sqrt(variance) <= 1e-12 * float(np.abs(means).max()):
        variance = 0.0
    total = float(residual.sum()) / (len(seeds) - 1)
    return (variance, total) if math.isfinite(total) else (math.nan, math.nan)


def _sides_by_prompt(c: Contrast) -> tuple[Array, list[Array]]:
    """(n,): the difference by prompt, over all seeds; and (S, n) of each side."""
    sides = [[np.asarray(s, np.float64) for s in side] for side in (c.ours, c.theirs)]
    if not sides[0] or len({s.shape for side in sides for s in side}) != 1:
        raise UserError("seeds must be evaluated on the same prompts: a list of vectors of one length")
    whole = np.isfinite(np.stack(sides[0] + sides[1])).all(0)
    tables = [np.stack([per_prompt(np.where(whole, s, np.nan)) for s in side]) for side in sides if side]
    ours = tables[0].mean(0)
    if not c.theirs:
        return ours, tables
    theirs = tables[1].mean(0)
    # The mean of three equal numbers may differ from the number in its last bit, which is no difference.
    equal = np.isclose(ours, theirs, rtol=1e-12, atol=0)
    return np.where(equal, 0.0, ours - theirs), tables
