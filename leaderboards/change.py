"""Change against a baseline: estimates it and gives the verdict same, better, worse or cannot tell, with bounded error rates.

For every number of a baseline: d = mean over prompts of (new - reported), each averaged over its training seeds, the prompts
paired, on the same noise. Its noise is that of every table (bench/stats/law.py). The variance between seeds is pooled over the new
and the reported seeds of a row and moderated over the baseline's rows; where neither side has two seeds it is lent, as in tables.

    same         every new seed is one of the reported ones and repeats it to the last digit
    worse        otherwise, when a gain that was told is lost: the floor below
    same         otherwise, when two one-sided tests at 5 % place d within the margin (Schuirmann 1987): its 90 % interval lies there
    worse        otherwise, when d < 0 and d differs significantly from 0, corrected (Holm) over the numbers; better likewise
    cannot tell  otherwise

The floor: a reported gain over the base that was told from 0 must be told again. It is lost when the new gain is not above 0 by
a one-sided test at 5 %, and either its fall is significant at FLOOR_LEVEL, one-sided, corrected (Holm) over the told gains, or the
method hardly moves the scores any more: less than UNMOVED of the reported root mean square. That it is not told again says
nothing alone: so it is with many an unchanged method whose reported gain was lucky.

Holm's family are the numbers of trained rows; those of the base, which is not trained, are a family of their own; and numbers
that repeat to the last digit are in none. A true change of the margin or more passes as same in at most 5 %. With nothing changed,
some number of a table is called worse in at most 1 % (docs/statistics.md).

Where the variance between seeds is not known even to the library, a number is worse, or better, only when d differs
significantly from every value within the margin: the margin then states how far apart seeds may lie.

Arrays have any leading axes and numbers on the last one, so that a simulation runs thousands of reports through the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from ..bench.stats import intervals, law
from ..bench.stats.intervals import Contrast
from ..bench.stats.law import Noise, SeedSpread, SeedVariance
from ..bench.stats.significance import Verdict
from .runs import Array

Flags = NDArray[np.bool_]
Seeds = Sequence[Array]  # one (prompts,) or (prompts, images) a training seed

LEVEL = 0.95  # of intervals, and of the two one-sided tests
FAMILY_LEVEL = 0.995  # of worse or better somewhere in a report: a quarter of a percent each way
TOLD_LEVEL = 0.05  # one-sided, of a gain that must be told again
FLOOR_LEVEL = 0.0025  # one-sided, of the fall of a gain that is not told again, corrected (Holm) over the told gains
UNMOVED = 0.25  # of the reported root mean square of a row's gains: below it a method does nothing


@dataclass(frozen=True)
class Gains:
    """Gains over the base of the numbers of a report; arrays (..., numbers)."""

    told: Flags  # whether the reported gain was told from 0
    now: Array
    noise: Noise  # of `now`
    moved: Array  # root mean square of the new gains by prompt over that of the reported ones

    @property
    def told_now(self) -> Flags:
        """Return where the new gain is above 0 by a one-sided test."""
        return (self.now > 0) & (self.noise.p(self.now) / 2 <= TOLD_LEVEL)


@dataclass(frozen=True)
class Changes:
    """New minus reported, of the numbers of a report; arrays (..., numbers)."""

    mean: Array
    noise: Noise
    known: (
        Flags  # whether the noise has the spread between training seeds (True too where there are none, as of the base)
    )
    trained: Flags  # False for the base's numbers
    repeated: Flags  # to the last digit
    gains: Gains

    def p(self, margins: Array) -> Array:
        """Return the two-sided p against no change; where seeds are unknown, against a change within the margin."""
        beyond = np.abs(self.mean) - np.where(self.known, 0.0, margins)
        inside = (beyond < 0) & np.isfinite(self.noise.se)
        return np.where(inside, 1.0, self.noise.p(np.maximum(beyond, 0.0)))

    def corrected_p(self, margins: Array) -> Array:
        """Return p, corrected (Holm) over the trained rows' numbers, and over the base's; NaN where a number repeated."""
        p = np.where(self.repeated, np.nan, self.p(margins))
        families = (np.where(self.trained, p, np.nan), np.where(self.trained, np.nan, p))
        of_trained, of_base = map(holm_along, families)
        return np.where(self.trained, of_trained, of_base)

    def lost(self) -> Flags:
        """Return where a gain that was told is lost."""
        floors = self.gains.told & self.trained & ~self.repeated
        p = self.noise.p(self.mean) / 2
        of_fall = np.where(floors & self.known, np.where(self.mean < 0, p, 1 - p), np.nan)
        fell = holm_along(of_fall) <= FLOOR_LEVEL
        return floors & ~self.gains.told_now & (fell | (self.gains.moved < UNMOVED))


@dataclass(frozen=True)
class NumberScores:
    """Scores of one number of a baseline, on the same prompts."""

    new: Seeds
    reported: Seeds
    new_gains: Seeds = ()  # over the base, which each run evaluated itself
    reported_gains: Seeds = ()  # over the reported base
    trained: bool = True  # False: the number is the base's own
    told: bool = False  # whether the reported gain over the base was told from 0
    repeated: bool = False
    spread: SeedVariance | None = None  # between seeds, of `shared_spreads` or of the library; None: unknown


def verdicts(changes: Changes, margins: Array) -> NDArray[np.str_]:
    """Return the verdict on each number; margins in units of each score."""
    p = changes.corrected_p(margins)
    differs = p < 1 - FAMILY_LEVEL
    inside = margins - np.abs(changes.mean)
    within = (inside > 0) & (changes.noise.p(np.maximum(inside, 0.0)) / 2 < 1 - LEVEL)
    same: Verdict = "same"
    worse: Verdict = "worse"
    better: Verdict = "better"
    unsure: Verdict = "cannot tell"
    by_test = np.where(differs, np.where(changes.mean > 0, better, worse), unsure)
    return np.where(changes.repeated, same, np.where(changes.lost(), worse, np.where(within, same, by_test)))


def holm_along(p: Array) -> Array:
    """Return p (..., numbers), corrected (Holm) over the last axis; NaN stays, uncounted."""
    return np.apply_along_axis(lambda line: np.array(law.holm(line.tolist())), -1, p)


def estimate_changes(numbers: Sequence[NumberScores], strata: Sequence[str] | None = None) -> Changes:
    """Estimate new minus reported of the numbers of one baseline, and their gains over the base."""
    contrasts = [Contrast(n.new, n.reported, spreads=[_shared(n)] * 2) for n in numbers]
    change = intervals.observe(contrasts, strata)
    gain = intervals.observe([_gain(n) for n in numbers], strata)
    repeated = np.array([n.repeated for n in numbers], bool)
    gains = Gains(
        np.array([n.told for n in numbers], bool), gain.mean, gain.noise, np.array([_moved(n) for n in numbers])
    )
    trained = np.array([n.trained for n in numbers], bool)
    return Changes(change.mean, change.noise, change.known, trained, repeated, gains)


def join(parts: Sequence[Changes]) -> Changes:
    """Return the changes of several baselines as those of one report."""
    along = lambda arrays: np.concatenate([np.asarray(x) for x in arrays], axis=-1)
    noise = lambda of_parts: Noise(*(along([getattr(x, f.name) for x in of_parts]) for f in fields(Noise)))
    gains = [part.gains for part in parts]
    return Changes(
        mean=along([part.mean for part in parts]),
        noise=noise([part.noise for part in parts]),
        known=along([part.known for part in parts]),
        trained=along([part.trained for part in parts]),
        repeated=along([part.repeated for part in parts]),
        gains=Gains(
            told=along([g.told for g in gains]),
            now=along([g.now for g in gains]),
            noise=noise([g.noise for g in gains]),
            moved=along([g.moved for g in gains]),
        ),
    )


def shared_spreads(
    rows: Mapping[str, tuple[Seeds, Seeds]], strata: Sequence[str] | None = None
) -> dict[str, SeedVariance]:
    """Return the variance between the seeds of each row, pooled over its new and its reported ones and moderated over the rows.

    rows: label -> new and reported seeds; [] for a side that has none. A new seed that repeats a reported one says nothing of its own
    and is left out. NaN where no row has two seeds on a side.
    """
    sides: list[Seeds] = []
    for new, reported in rows.values():
        other = [x for x in new if not any(np.array_equal(x, y, equal_nan=True) for y in reported)]
        whole = np.isfinite(np.stack([*other, *reported])).all(0)
        sides += [[np.where(whole, x, np.nan) for x in side] for side in (other, reported)]
    by_side = intervals.seed_spread(sides, strata)
    pooled = pool_sides(
        SeedSpread(by_side.variance.reshape(-1, 2), by_side.residual.reshape(-1, 2), by_side.seeds.reshape(-1, 2))
    )
    moderated = law.moderate(pooled)
    return {label: moderated.row(k) for k, label in enumerate(rows)}


def pool_sides(spread: SeedSpread) -> SeedSpread:
    """Pool the variances of the sides, on the last axis, by their degrees of freedom.

    The seeds returned are one more than those degrees of freedom: as many as one side would need to have them.
    """
    df = np.asarray(spread.seeds, np.float64) - 1
    total = df.sum(-1)
    pooled = lambda x: np.where(total > 0, np.nansum(df * x, -1) / np.maximum(total, 1), np.nan)
    return SeedSpread(pooled(spread.variance), pooled(spread.residual), total + 1)


def expected_half_widths(spread: SeedVariance, seeds: Array) -> Array:
    """Return half the expected 90 % interval of each change when as many other seeds are trained; NaN where seeds are unknown.

    A repetition that is not equal to the last digit hardly ever gets the verdict same under a smaller margin. Of an unchanged
    method only seeds differ: the prompts' part of the noise is 0.
    """
    zero = np.zeros(spread.variance.shape)
    seeds_part = np.where(spread.lent, np.nan, spread.variance) * 2 / seeds
    return np.where(np.isnan(seeds_part), np.nan, Noise(zero, zero + 1, seeds_part, spread.df).quantile(2 * LEVEL - 1))


def is_repetition(new: Seeds, seeds: Sequence[int], old: Seeds, old_seeds: Sequence[int]) -> bool:
    """Return whether every new seed is one of the old ones, with the same score for every prompt."""
    reported = dict(zip(old_seeds or (0,), old, strict=True))
    return all(
        seed in reported and np.array_equal(vector, reported[seed], equal_nan=True)
        for seed, vector in zip(seeds or (0,), new, strict=True)
    )


def _shared(n: NumberScores) -> SeedVariance | None:
    """Return the variance of a side of a change. One estimate serves both sides: counted once, as a lent one."""
    if not n.trained:
        return None
    if n.spread is None:
        return UNKNOWN
    return replace(n.spread, lent=np.array(True))


UNKNOWN = SeedVariance(np.array(math.nan), np.array(0.0), np.array(1.0), np.array(True))


def _gain(n: NumberScores) -> Contrast:
    """Return the contrast of the new gain over the base; the base has none."""
    if not n.new_gains:
        return Contrast([np.full_like(n.new[0], np.nan)], spreads=[None])
    return Contrast(n.new_gains, spreads=[n.spread or UNKNOWN])


def _moved(n: NumberScores) -> float:
    """Return how far the new runs move the scores of prompts from the base's, in what the reported ones did; NaN where unknown."""
    if not n.new_gains or not n.reported_gains:
        return math.nan
    new, reported = (
        math.sqrt(float(np.nanmean([np.square(intervals.per_prompt(gain)) for gain in gains])))
        for gains in (n.new_gains, n.reported_gains)
    )
    return new / reported if reported > 0 else math.nan
