"""Selection by test scores: what the best of several settings would show, and how often one would be told, if none had a gain.

K settings without any gain, each evaluated with the standard error se on the same prompts, have the noise of K normal numbers. The
largest is expected at se times the expected maximum of K standard normals, and one of K tests at 5 % finds a rise with probability
1 - .975^K. Both take the settings' noises as independent, which is the worst case: what they share, as the base's own noise, moves all
of them together. The formula was chosen by the simulation of benchmarks/looks.py (docs/statistics.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Inflation:
    """What selection among settings without a gain does to the best of them."""

    gain: float  # expected, in units of the score
    told: float  # the probability that some setting is told better than the base, of single tests


@lru_cache(maxsize=1024)
def expected_maximum(count: int) -> float:
    """Return the expected maximum of `count` independent standard normal numbers, by quadrature over the order statistic."""
    from scipy.integrate import quad
    from scipy.stats import norm

    if count < 2:
        return 0.0
    density = lambda x: count * x * np.exp(norm.logpdf(x) + (count - 1) * norm.logcdf(x))
    return float(quad(density, -10.0, 40.0, limit=200)[0])


def inflation(settings: int, se: float, level: float = 0.95) -> Inflation:
    """Return what the best of several settings without a gain is expected to show.

    Args:
        settings: how many were evaluated on the test prompts; training seeds of one setting do not count.
        se: the standard error of one setting's gain, its training seeds included; NaN gives a NaN gain.
        level: that of the interval to which the tests belong; a rise is found by the upper half of the rest.
    """
    return Inflation(expected_maximum(settings) * se if settings > 1 else 0.0, 1 - ((1 + level) / 2) ** settings)
