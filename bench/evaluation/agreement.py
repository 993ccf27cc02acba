"""Agreement of two evaluations of the same images: image by image, and in the means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stats import intervals, law
from ..stats.intervals import Contrast, Estimate
from ..stats.law import Noise, SeedVariance
from .estimates import Evaluation

Scores = NDArray[np.float64]  # (prompts, images)
ROUNDING = 0.01  # of the scores' standard deviation: a score that differs by less is the same but for rounding
CLOSE_IMAGES = 0.98  # share of images that must be the same but for rounding
CLOSE_MEAN = 0.1  # of the mean's standard error, by which a mean may differ
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class ImageAgreement:
    """How the scores of the same images by one scorer/metric agree between two evaluations."""

    claimed: Estimate
    found: Estimate
    equal: float  # share of images with the same score to the last digit
    close: float  # share of images whose scores differ by rounding at most
    p: float  # of the paired difference over prompts; NaN below five prompts

    @property
    def difference(self) -> float:
        """Found minus claimed, in the mean."""
        return self.found.mean - self.claimed.mean

    @property
    def within_rounding(self) -> bool:
        """Return whether nearly all images and the mean are the same but for rounding."""
        if self.equal == 1:
            return True
        limit = CLOSE_MEAN * self.claimed.se if math.isfinite(self.claimed.se) else 0.0
        return self.close >= CLOSE_IMAGES and abs(self.difference) <= limit


def compare_images(claimed: Scores, found: Scores, strata: Sequence[str] | None) -> ImageAgreement:
    """Compare two evaluations of the same images. Raises UserError where their shapes differ."""
    both_missing = np.isnan(claimed) & np.isnan(found)
    equal = (claimed == found) | both_missing
    spread = float(np.nanstd(claimed)) if np.isfinite(claimed).any() else 0.0
    close = equal | (np.abs(found - claimed) <= ROUNDING * spread)
    paired = intervals.paired(claimed, found, strata=strata)
    p = math.nan if paired.p is None else paired.p
    means = [intervals.mean_ci(scores, strata=strata) for scores in (claimed, found)]
    return ImageAgreement(means[0], means[1], float(equal.mean()), float(close.mean()), p)


def told_different(p: Mapping[Any, float]) -> list[Any]:
    """Return the comparisons that differ significantly, corrected for being many (Holm)."""
    return [name for name, corrected in zip(p, law.holm(list(p.values())), strict=True) if corrected < SIGNIFICANCE]


def gain_of(before: Scores, after: Scores, strata: Sequence[str] | None) -> Estimate:
    """The gain over the base on the same noise, with its interval and test, as in a record."""
    return intervals.paired(before, after, strata=strata)


def change_of_gain(
    claimed: Scores, found: Scores, strata: Sequence[str] | None, seeds: SeedVariance | None
) -> Estimate:
    """Found minus claimed of the gains of two trainings on the same prompts.

    Args:
        claimed: gains (prompts, images) of the first.
        found: of the second.
        strata: of the prompts.
        seeds: the variance between trainings; None leaves it out, so that the test is of the prompts alone.
    """
    if seeds is None:
        return intervals.paired(claimed, found, strata=strata)
    return intervals.crossed([Contrast([found], [claimed], test=True, spreads=[seeds, seeds])], strata=strata)[0]


def independent_difference(claimed: Estimate, found: Estimate) -> tuple[float, float]:
    """Standard error and two-sided p of found minus claimed, of different prompts; NaN where an interval is lacking.

    Each has its own chi-square (`law.Noise`).
    """
    if claimed.p is None or found.p is None:
        return math.nan, math.nan
    of = lambda x: np.array([float(x)])
    noise = Noise(of(claimed.se**2), of(claimed.n - 1), of(found.se**2), of(found.n - 1))
    return float(noise.se[0]), float(noise.p(of(found.mean - claimed.mean))[0])


def shared_matrices(claimed: Evaluation, found: Evaluation) -> dict[str, tuple[Scores, Scores]]:
    """Map each scorer/metric that both evaluations have to its scores in both, (prompts, images)."""
    present = set(found.keys())
    return {key: (claimed.matrix(key), found.matrix(key)) for key in claimed.keys() if key in present}
