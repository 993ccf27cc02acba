"""Planning of a comparison: what a table of so many seeds, images and prompts would tell apart, from components of variance.

The components are those of `law`: a gain of row r under seed s on prompt i is mu_r + a_rs + b_ri + e_rsi. A design of S seeds and n
prompts is judged by drawing what its table would estimate of its own noise (variance between seeds, moderated over the rows as in
every table; variance of the mean over prompts), so that the price of few seeds is in the number. Given that noise, the power of a
test is exact. A table's number of told pairs is predicted from a pilot's gains, which are shrunk first: the largest of several
observed gains overstates the true one.

Draws depend on the seed alone, so that the same plan prints the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .intervals import per_prompt, seed_spread
from .law import MIN_PROMPTS, Noise, SeedSpread, contrast_noise, moderate
from .resampling import Array, weigh

BASE = "base"  # the row without seeds, whose gain is 0
LEVEL = 0.05  # family-wise error of a table
PRIOR_DF = 4.0  # of the Student distribution from which the rows' true gains are taken to come
DRAWS = 400  # tables drawn for one design

Pair = tuple[str, str]  # labels of two rows; one may be BASE


@dataclass(frozen=True)
class Components:
    """Components of variance of the rows of a table, in squared units of the score; the base is not among the rows.

    prompt and residual are of one prompt, a design's images averaged. Where strata weigh prompts, they are such that divided by the
    number of prompts they give the variance of the mean.
    """

    labels: tuple[str, ...]  # (rows,)
    prompt: Array  # (rows, rows): covariance of what a prompt makes of each method, b
    residual: Array  # (rows,): what is left, e
    seeds: Array  # (rows,): between seeds beyond the residual, a
    seed_draws: Array  # (draws, rows): what it may be as well, given how few seeds show it
    prompts: int
    images: int  # of a prompt
    strata: int = 1
    prompt_images: float = math.nan  # share of `prompt` that is the noise of single images; NaN where it is not known
    residual_images: float = math.nan  # share of `residual`
    seed_means: Mapping[str, Array] = field(
        default_factory=dict[str, Array]
    )  # a pilot's gain of each seed; {} without pilot

    def index(self, label: str) -> int:
        """Return the position of a row."""
        return self.labels.index(label)

    def only(self, labels: Sequence[str]) -> Components:
        """Return the components of some of the rows."""
        rows = np.array([self.index(label) for label in labels])
        return replace(
            self,
            labels=tuple(labels),
            prompt=self.prompt[np.ix_(rows, rows)],
            residual=self.residual[rows],
            seeds=self.seeds[rows],
            seed_draws=self.seed_draws[:, rows],
            seed_means={label: self.seed_means[label] for label in labels if label in self.seed_means},
        )

    def with_images(self, images: int) -> Components:
        """Return the components for another number of images of a prompt. Raises UserError where the images' part is unknown."""
        if images == self.images:
            return self
        if math.isnan(self.prompt_images) or math.isnan(self.residual_images):
            raise UserError(
                f"{images} images a prompt cannot be planned: these are scores by prompt ({self.images} images each), which do not "
                "show the images' part of the variance; give run directories as --pilot"
            )
        ratio = self.images / images
        return replace(
            self,
            images=images,
            prompt=self.prompt * (1 - self.prompt_images + self.prompt_images * ratio),
            residual=self.residual * (1 - self.residual_images + self.residual_images * ratio),
        )


@dataclass(frozen=True)
class Design:
    """A table to be made: the same for every row."""

    seeds: int
    images: int  # of a prompt
    prompts: int


@dataclass(frozen=True)
class Resolution:
    """What one design tells of pairs of rows, in units of the score; arrays (pairs,)."""

    half_width: Array  # of the 95 % interval of a difference, the mean over tables
    mde: Array  # the difference that is told with the power asked, corrected over the family
    power: Array  # for the difference asked


@dataclass(frozen=True)
class ToldPairs:
    """How many pairs of a family a table is expected to tell apart."""

    expected: float
    low: int
    high: int
    level: float  # of the band from low to high
    pairs: int  # of the family


def all_pairs(labels: Sequence[str]) -> list[Pair]:
    """Return every pair of these rows, the base among them, as the ranking of a table tests them."""
    return list(combinations([*labels, BASE], 2))


# Components from scores


def estimate_components(
    gains: Mapping[str, Sequence[ArrayLike]],
    images: int,
    strata: Sequence[object] | None = None,
    lent: Mapping[str, LentSpread] | None = None,
) -> Components:
    """Estimate the components of variance from the gains of a table's rows over the base.

    Args:
        gains: of each row, one (prompts,) or (prompts, images) a training seed; NaN: not scored.
        images: of a prompt, which (prompts,) are means over.
        strata: (prompts,) labels; the mean is then the mean of the strata's means.
        lent: what is known of the seeds of rows, where no row of the pilot has several.

    Raises:
        UserError: on too few prompts, a row without scores, scores that are all equal, and a row of one seed whose spread is unknown.
    """
    labels = tuple(gains)
    by_seed = {label: [per_prompt(seed) for seed in gains[label]] for label in labels}
    for label, vectors in by_seed.items():
        if not all(np.isfinite(vector).any() for vector in vectors):
            raise UserError(f"the pilot's row {label} has a seed without any score: leave that row out")
    tables = {label: np.stack(vectors) for label, vectors in by_seed.items()}
    whole: NDArray[np.bool_] = np.asarray(np.isfinite(np.concatenate(list(tables.values()))).all(0))
    if whole.sum() < MIN_PROMPTS:
        raise UserError(
            f"the pilot has {int(whole.sum())} prompts with a score in every row: below {MIN_PROMPTS} nothing can be planned"
        )
    tables = {label: np.where(whole, table, np.nan) for label, table in tables.items()}
    averaged = np.stack([table.mean(0) for table in tables.values()])
    covariance, strata_count = _covariance_of_means(averaged, strata)
    prompts, seeds = int(whole.sum()), np.array([len(table) for table in tables.values()])
    if not covariance.any() and all(np.ptp(table[:, whole]) == 0 for table in tables.values()):
        raise UserError("all scores of the pilot are equal to the base's: there is no spread to plan from")
    own = seed_spread([list(table) for table in tables.values()], strata)
    residual, variance_draws = _seed_parts(labels, own, lent or {}, prompts)
    shares = _image_shares({label: [np.asarray(s, np.float64) for s in gains[label]] for label in labels}, whole)
    persistent = _positive(covariance - np.diag(residual / seeds))
    return Components(
        labels, persistent * prompts, residual * prompts, np.median(variance_draws, axis=0), variance_draws, prompts, images,
        strata_count, *shares,
        seed_means={label: _seed_means(table, strata) for label, table in tables.items()},
    )  # fmt: skip


@dataclass(frozen=True)
class LentSpread:
    """What a library knows of the seeds of a row, in squared units of the score."""

    variance: float  # between seeds beyond the residual
    df: float
    residual: float = math.nan  # of one prompt; NaN: not known


def _seed_parts(
    labels: Sequence[str], own: SeedSpread, lent: Mapping[str, LentSpread], prompts: int
) -> tuple[Array, Array]:
    """Return the residual's part of the variance of one seed's mean (rows,), and draws of the variance beyond it (draws, rows)."""
    several, rng = np.asarray(own.seeds) > 1, np.random.default_rng(2)
    if several.any():
        residual = np.where(several, np.nan_to_num(own.residual), float(own.residual[several].mean()))
        return residual, draw_seed_variances(
            np.nan_to_num(own.variance), residual, (np.asarray(own.seeds) - 1).astype(np.int64), rng
        )
    if unknown := [label for label in labels if label not in lent]:
        raise UserError(
            f"the pilot has one seed of {unknown[0]}, which shows no spread between seeds, and the library of seed variances does not "
            "know it: give a pilot of two seeds"
        )
    spreads = [lent[label] for label in labels]
    # Without a residual the prompts' part, which contains it, is not divided by the seeds: on the safe side.
    residual = np.array([0.0 if math.isnan(s.residual) else s.residual / prompts for s in spreads])
    df = np.array([s.df for s in spreads])
    return residual, np.array([s.variance for s in spreads]) * df / rng.chisquare(df, (DRAWS, len(df)))


def draw_seed_variances(
    observed: Array, residual: Array, df: NDArray[np.int64], rng: np.random.Generator, draws: int = DRAWS
) -> Array:
    """Draw what the variances between seeds beyond the residual may be, given the observed ones, (draws, rows).

    The standard deviations of the rows are taken to come from one log-normal distribution, narrow or wide, of any scale. What
    a table's moderated variances are guarded by is on the safe side for a test; a prediction takes the middle.

    Args:
        observed: (rows,), between the means of a row's seeds.
        residual: (rows,), its part that is the noise of single prompts.
        df: (rows,), seeds less one; a row of one seed learns from the others alone.
        rng: random generator.
        draws: how many.
    """
    several = df > 0
    reference = math.sqrt(float(observed[several].mean())) if observed[several].any() else 1e-9
    sds = np.geomspace(0.02, 4, 120) * reference
    kinds = [(math.log(scale), width) for scale in np.linspace(0.05, 2, 40) * reference for width in (0.1, 0.6)]
    prior = np.stack([np.exp(-np.square((np.log(sds) - center) / width) / 2) for center, width in kinds])
    prior /= prior.sum(1, keepdims=True)  # (kinds, sds)
    variance = np.square(sds) + residual[:, None]  # (rows, sds)
    fit = -0.5 * df[:, None] * (np.log(variance) + observed[:, None] / variance)
    likelihood = np.exp(fit - fit.max(1, keepdims=True))
    evidence = np.log(prior @ likelihood.T).sum(1)
    weight = np.exp(evidence - evidence.max())
    kind = rng.choice(len(kinds), draws, p=weight / weight.sum())
    posterior = np.cumsum(prior[kind, None] * likelihood, axis=2)  # (draws, rows, sds)
    place = (posterior < rng.random((draws, len(df), 1)) * posterior[..., -1:]).sum(2)
    return np.square(sds[place])


def _covariance_of_means(x: Array, strata: Sequence[object] | None) -> tuple[Array, int]:
    """Return the covariance (rows, rows) of the means over prompts of x (rows, prompts), and the number of strata."""
    sample = weigh(x.mean(0), strata)
    values = x[:, np.isfinite(x).all(0)]
    count = int(sample.stratum.max()) + 1
    total = np.zeros((len(x), len(x)))
    for g in range(count):
        part = values[:, sample.stratum == g]
        if part.shape[1] < 2:
            raise UserError("a stratum of the pilot has a single prompt: its spread cannot be planned from")
        centered = part - part.mean(1, keepdims=True)
        total += centered @ centered.T / (part.shape[1] * (part.shape[1] - 1) * count**2)
    return total, count


def _seed_means(table: Array, strata: Sequence[object] | None) -> Array:
    """Return the mean over prompts of each seed, (seeds,)."""
    sample = weigh(table.mean(0), strata)
    return table[:, np.isfinite(table).all(0)] @ sample.weights


def _positive(covariance: Array) -> Array:
    """Return the nearest covariance without negative variances: what subtracting the residual may leave is cut at 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(values, 0.0)) @ vectors.T


def _image_shares(gains: Mapping[str, Sequence[Array]], whole: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the images' share of the prompts' variance and of the residual's, pooled over rows; NaN where scores are by prompt.

    The variance between the images of one prompt has a part that all seeds share and a part of each seed, as that between prompts.
    """
    if any(seed.ndim < 2 or seed.shape[1] < 2 for seeds in gains.values() for seed in seeds):
        return math.nan, math.nan
    shared, own, prompt, residual = 0.0, 0.0, 0.0, 0.0
    for seeds in gains.values():
        table = np.stack(seeds)[:, whole]  # (seeds, prompts, images)
        table = table[:, np.isfinite(table).all((0, 2))]
        if table.shape[0] < 2 or table.shape[1] < 2:
            continue
        count, images = len(table), table.shape[2]
        off = table - table.mean(0)
        between_images = float(off.var(2, ddof=1).sum(0).mean()) / (count - 1)  # of e
        between_prompts = float(off.mean(2).var(1, ddof=1).sum()) / (count - 1)
        mean = table.mean(0)
        shared += max(float(mean.var(1, ddof=1).mean()) - between_images / count, 0.0) / images
        prompt += max(float(mean.mean(1).var(ddof=1)) - between_prompts / count, 0.0)
        own, residual = own + between_images / images, residual + between_prompts
    if residual <= 0 and prompt <= 0:
        return math.nan, math.nan
    share = lambda part, total: min(part / total, 1.0) if total > 0 else 0.0
    return share(shared, prompt), share(own, residual)


# What a design tells


@dataclass(frozen=True)
class _TrueNoise:
    """Variances of a design's table, by its components."""

    prompt: Array  # (rows, rows), of the means over prompts
    residual: Array  # (rows,), part of `seed`
    seed: Array  # (rows,), of one seed's mean
    df: float  # of the prompts

    @staticmethod
    def of(components: Components, design: Design) -> _TrueNoise:
        of_images = components.with_images(design.images)
        residual = of_images.residual / design.prompts
        df = float(design.prompts - components.strata)
        return _TrueNoise(of_images.prompt / design.prompts, residual, of_images.seeds + residual, df)


def resolve_pairs(
    components: Components, design: Design, pairs: Sequence[Pair], family: int, *, difference: float, power: float,
    draws: int = DRAWS,
) -> Resolution:  # fmt: skip
    """Estimate what a design tells of each pair.

    Args:
        components: of the rows of the table.
        design: of the table.
        pairs: to be told.
        family: how many pairs are tested together. Power and MDE are those at LEVEL / family, Holm's level where no other pair is told.
        difference: true one, in units of the score.
        power: at which the MDE is told.
        draws: tables that are drawn.
    """
    from scipy.special import ndtr

    rng, true = np.random.default_rng(0), _TrueNoise.of(components, design)
    noise = _table_noise(components, true, design.seeds, pairs, _seed_variances(true, design.seeds, draws, rng), rng)
    deviation = np.sqrt(np.array([_pair_variance(components, true, design.seeds, pair) for pair in pairs]))
    half, critical = noise.quantile(1 - LEVEL), noise.quantile(1 - LEVEL / family)
    safe = np.where(deviation > 0, deviation, 1.0)
    told = lambda x: (ndtr((x - critical) / safe) + ndtr((-x - critical) / safe)).mean(0)
    low, high = np.zeros(len(pairs)), critical.max(0) + 9 * safe
    for _ in range(50):
        middle = (low + high) / 2
        enough = told(middle) >= power
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return Resolution(half.mean(0), np.where(deviation > 0, high, 0.0), told(difference))


def prompt_deviation(components: Components, design: Design, pair: Pair) -> float:
    """Return the standard deviation of a pair's difference that the prompts leave however many seeds there are."""
    rows = [components.index(label) for label in pair if label != BASE]
    return math.sqrt(_prompt_variance(_TrueNoise.of(components, design), rows))


def _seed_variances(true: _TrueNoise, seeds: int, draws: int, rng: np.random.Generator) -> Array:
    """Draw the variance between the means of a row's seeds that a table would observe, (draws, rows)."""
    return true.seed * rng.chisquare(seeds - 1, (draws, len(true.seed))) / (seeds - 1)


def _table_noise(
    components: Components, true: _TrueNoise, seeds: int, pairs: Sequence[Pair], variance: Array, rng: np.random.Generator
) -> Noise:  # fmt: skip
    """Return the noise of each pair, (draws, pairs), as a table with these variances between seeds (draws, rows) estimates it."""
    draws = len(variance)
    residual = true.residual * rng.chisquare(true.df * (seeds - 1), variance.shape) / (true.df * (seeds - 1))
    moderated = moderate(SeedSpread(variance, residual, np.full(variance.shape[1], seeds)))
    parts: list[Noise] = []
    for pair in pairs:
        sides = [components.index(label) for label in pair if label != BASE]
        mean_variance = _prompt_variance(true, sides) + sum(true.residual[k] for k in sides) / seeds
        observed = mean_variance * rng.chisquare(true.df, draws) / true.df
        parts.append(contrast_noise(observed, np.array(true.df), [(moderated.row(k), seeds) for k in sides]))
    stack = lambda arrays: np.stack(arrays, axis=1)
    return Noise(
        stack([n.prompts for n in parts]),
        stack([n.prompt_df for n in parts]),
        stack([n.seeds for n in parts]),
        stack([n.seed_df for n in parts]),
    )


def _prompt_variance(true: _TrueNoise, rows: Sequence[int]) -> float:
    """Return the prompts' part of the variance of a row's gain, or of the difference of two rows."""
    signs = np.array([1.0, -1.0][: len(rows)])
    return max(float(signs @ true.prompt[np.ix_(rows, rows)] @ signs), 0.0)


def _pair_variance(components: Components, true: _TrueNoise, seeds: int, pair: Pair) -> float:
    rows = [components.index(label) for label in pair if label != BASE]
    return _prompt_variance(true, rows) + float(sum(true.seed[k] for k in rows)) / seeds


# How many pairs a table tells


def predict_told(
    pilot: Components, design: Design, family: Sequence[Pair], *, level: float = 0.9, draws: int = DRAWS
) -> ToldPairs:
    """Predict how many pairs of a family a table of this design tells apart, from a pilot's gains.

    On the pilot's prompts and images the noise of the prompts repeats, and the pilot's seeds are the first ones of the new table. On other
    prompts only the shrunk gains carry over.

    Args:
        pilot: components with the gains of every row's seeds.
        design: of the new table.
        family: the pairs that are tested together (Holm).
        level: of the band.
        draws: tables that are drawn.
    """
    rng = np.random.default_rng(1)
    true = _TrueNoise.of(pilot, design)
    before = _TrueNoise.of(pilot, Design(design.seeds, pilot.images, pilot.prompts))
    seed_variance = pilot.seed_draws[rng.integers(0, len(pilot.seed_draws), draws)] + true.residual
    means = _draw_seed_means(pilot, design, _Variances(true, before, seed_variance), rng)
    noise = _table_noise(pilot, true, design.seeds, family, means.var(2, ddof=1), rng)
    gain = np.concatenate([means.mean(2), np.zeros((draws, 1))], axis=1)
    position = {label: k for k, label in enumerate((*pilot.labels, BASE))}
    difference = np.stack([gain[:, position[a]] - gain[:, position[b]] for a, b in family], axis=1)
    told = count_told(noise.p(difference))
    cut = (1 - level) / 2
    low, high = np.quantile(told, [cut, 1 - cut], method="inverted_cdf")
    return ToldPairs(float(told.mean()), int(low), int(high), level, len(family))


@dataclass(frozen=True)
class _Variances:
    """Variances of the new table, of the pilot, and drawn ones between the seeds of the new table (draws, rows)."""

    true: _TrueNoise
    pilot: _TrueNoise
    seed: Array


def _draw_seed_means(pilot: Components, design: Design, v: _Variances, rng: np.random.Generator) -> Array:
    """Draw the mean gain of every row and seed of the new table, (draws, rows, seeds)."""
    observed = [pilot.seed_means[label] for label in pilot.labels]
    gain = np.array([seeds.mean() for seeds in observed])
    count = np.array([len(seeds) for seeds in observed])
    draws, rows = v.seed.shape
    same = (design.prompts, design.images) == (pilot.prompts, pilot.images)
    error = np.diag(v.pilot.seed / count) + (0.0 if same else v.pilot.prompt)
    center, spread = shrink(gain, error)
    truth = rng.multivariate_normal(center, spread, draws, method="eigh")
    if not same:
        truth += rng.multivariate_normal(np.zeros(rows), v.true.prompt, draws, method="eigh")
    means = truth[..., None] + np.sqrt(v.seed)[..., None] * rng.standard_normal((draws, rows, design.seeds))
    if same:
        for k, seeds in enumerate(observed):
            kept = seeds[: design.seeds]
            means[:, k, : len(kept)] = kept
    return means


def count_told(p: Array) -> NDArray[np.int64]:
    """Count the pairs that Holm's procedure tells at LEVEL in each table, p (tables, pairs)."""
    ordered = np.sort(p, axis=1)
    passes = ordered * np.arange(p.shape[1], 0, -1) < LEVEL
    return np.cumprod(passes, axis=1).sum(1)


def shrink(observed: Array, error: Array) -> tuple[Array, Array]:
    """Return mean and covariance of the true gains given the observed ones (empirical Bayes).

    The true gains are taken to come from a Student distribution of PRIOR_DF degrees of freedom, whose centre and scale are fitted to
    the observed ones by maximum likelihood (ECM, weights as in Lange, Little and Taylor 1989): gains near the others are shrunk
    towards them, one far away keeps its own.

    Args:
        observed: (rows,).
        error: (rows, rows), covariance of their errors.
    """
    rows = len(observed)
    if rows < 3:  # nothing to learn a distribution from
        return observed, error
    center, scale = float(np.median(observed)), float(max(np.var(observed), 1e-300))
    weight = np.ones(rows)
    mean, covariance = observed, error
    for _ in range(300):
        prior = np.diag(scale / weight)
        keep = prior @ np.linalg.pinv(prior + error, hermitian=True)
        mean = center + keep @ (observed - center)
        covariance = prior - keep @ prior
        squares = np.square(mean - center) + np.diag(covariance)
        weight = (PRIOR_DF + 1) / (PRIOR_DF + squares / scale)
        center = float((weight * mean).sum() / weight.sum())
        scale = float(max(np.mean(weight * squares), 1e-12 * np.var(observed), 1e-300))
    return mean, (covariance + covariance.T) / 2
