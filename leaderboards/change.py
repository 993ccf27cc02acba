"""Change against a baseline: estimates it and gives the verdict same, better, worse or cannot tell, with bounded error rates.

For every number of a baseline: d = mean over prompts of (new - reported), each averaged over its training seeds, the prompts
paired, on the same noise. Its variance has two parts, se^2 = se_prompts^2 + s^2 (1/S_new + 1/S_reported), s^2 the variance between the
seeds of one side, pooled over both; the first part has n - 1 degrees of freedom, the second S_new + S_reported - 2 (Welch-Satterthwaite).

    same         |d| + t.95 se < margin: two one-sided tests at 5 % (Schuirmann 1987), so the 90 % interval lies within the margin;
                 or every new seed is one of the reported ones and repeats it to the last digit
    worse        otherwise, when d < 0 and d differs significantly from 0 by Student's two-sided test at 5 %, corrected (Holm) over
                 all numbers of the report; better likewise
    cannot tell  otherwise

Where neither side has two seeds, the variance between seeds is unknown. There a number is worse, or better, only when d differs
significantly from every value within the margin: the margin then states how far apart seeds may lie.

Error rates, with two seeds or more on a side. All numbers get the verdict same while one of them is off by its margin or more: at most
5 % (each would have to pass its own test). Some number gets the verdict worse although none has changed: 2.5 %, and as much for better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..bench.stats import intervals, law
from ..bench.stats.significance import Verdict
from .baseline import mean_over_prompts
from .runs import Array

LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """New minus reported: the mean, its standard error and its degrees of freedom."""

    mean: float
    se: float  # NaN: too few prompts
    df: float
    n: int  # prompts
    seeds: bool  # whether se contains the spread between training seeds (True too where there are none, as of the base)
    repeated: bool = False  # to the last digit

    def half(self, level: float) -> float:
        """Return half the width of the interval of this level."""
        from scipy.stats import t

        return float(t.ppf((1 + level) / 2, self.df)) * self.se if self.se > 0 else self.se

    def p(self, edge: float = 0.0) -> float:
        """Return the two-sided p against a true change of at most `edge`."""
        from scipy.stats import t

        beyond = abs(self.mean) - edge
        if math.isnan(self.se):
            return math.nan
        return min(1.0, 2 * float(t.sf(beyond / self.se, self.df))) if self.se > 0 else float(beyond <= 0)


def change(
    new: Sequence[Array], old: Sequence[Array], strata: Sequence[str] | None = None, trained: bool = True
) -> Change:
    """Estimate new minus old; each is one (prompts,) vector a seed, on the same prompts.

    trained: whether seeds can differ; False for the base, which is not trained.
    """
    difference = np.mean(new, axis=0) - np.mean(old, axis=0)
    prompts = intervals.mean_ci(difference, strata=strata)
    parts = [(prompts.se**2, prompts.n - len(set(strata or [""])))]
    spread = _seed_variance(new, old, strata) if trained else None
    if spread is not None:
        parts.append((spread[0] * (1 / len(new) + 1 / len(old)), spread[1]))
    se, df = _welch_satterthwaite(parts)
    return Change(prompts.mean, se, df, prompts.n, seeds=spread is not None or not trained)


def verdicts(changes: Sequence[Change], margins: Sequence[float]) -> list[tuple[Verdict, float]]:
    """Return the verdict on each change and its p, Holm-corrected over all of them; margins in units of each score."""
    p = [c.p(0.0 if c.seeds else margin) for c, margin in zip(changes, margins, strict=True)]
    holm = law.holm(p)
    return [
        (_verdict(c, margin, adjusted), adjusted) for c, margin, adjusted in zip(changes, margins, holm, strict=True)
    ]


def expected_half_width(seeds: Sequence[Array], strata: Sequence[str] | None = None) -> float | None:
    """Return half the expected 90 % interval of the change when as many other seeds are trained; None from one seed.

    A repetition that is not equal to the last digit hardly ever gets the verdict same under a smaller margin.
    """
    if len(seeds) < 2:
        return None
    pairs = [intervals.mean_ci(a - b, strata=strata) for a, b in combinations(seeds, 2)]
    spread = _seed_variance(seeds, seeds, strata)
    assert spread is not None
    parts = [
        (float(np.mean([pair.se**2 for pair in pairs])) / len(seeds), pairs[0].n - len(set(strata or [""]))),
        (spread[0] * 2 / len(seeds), spread[1]),
    ]
    se, df = _welch_satterthwaite(parts)
    return Change(0.0, se, df, pairs[0].n, seeds=True).half(2 * LEVEL - 1)


def is_repetition(new: Sequence[Array], seeds: Sequence[int], old: Sequence[Array], old_seeds: Sequence[int]) -> bool:
    """Return whether every new seed is one of the old ones, with the same score for every prompt."""
    reported = dict(zip(old_seeds or (0,), old, strict=True))
    return all(
        seed in reported and np.array_equal(vector, reported[seed], equal_nan=True)
        for seed, vector in zip(seeds or (0,), new, strict=True)
    )


def _verdict(c: Change, margin: float, p: float) -> Verdict:
    if c.repeated or abs(c.mean) + c.half(2 * LEVEL - 1) < margin:
        return "same"
    if p < 1 - LEVEL:
        return "better" if c.mean > 0 else "worse"
    return "cannot tell"


def _welch_satterthwaite(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return standard error and degrees of freedom of a sum of independent parts, each (variance, degrees of freedom)."""
    variance = sum(v for v, _ in parts)
    return math.sqrt(variance), variance**2 / sum(v**2 / k for v, k in parts) if variance > 0 else math.inf


def _seed_variance(
    new: Sequence[Array], old: Sequence[Array], strata: Sequence[str] | None
) -> tuple[float, int] | None:
    """Return the variance between seeds, pooled over both sides, and its degrees of freedom; None where no side has two."""
    whole = np.isfinite(np.stack([*new, *old])).all(0)
    total, df = 0.0, 0
    for side in (new, old):
        if len(side) > 1:
            masked = [np.where(whole, vector, np.nan) for vector in side]
            means = [mean_over_prompts([vector], strata) for vector in masked]
            total, df = total + float(np.var(means, ddof=1)) * (len(side) - 1), df + len(side) - 1
    return (total / df, df) if df else None
