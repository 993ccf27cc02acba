"""Corrections for small samples: variances, Student's quantiles on the normal scale, Welch-Satterthwaite degrees of freedom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .resampling import Array


def variance_of_mean(x: Array, groups: NDArray[Any]) -> tuple[Array, int]:
    """Of the mean of the strata's means of x (n, columns): (columns,), NaN where a stratum is too small; how many strata."""
    k = int(groups.max()) + 1 if len(groups) else 0
    parts = [x[groups == g] for g in range(k)]
    if len(x) <= k or any(len(part) < 2 for part in parts):
        return np.full(x.shape[1], np.nan), k
    return sum((part.var(0, ddof=1) / len(part) for part in parts), np.zeros(x.shape[1])) / k**2, k


def expanded_tail(level: float, n: int, k: int) -> float:
    """The share of resamples to cut off at each end: that of a t-interval of n prompts in k strata, on the normal scale."""
    from scipy.stats import norm, t

    return float(norm.cdf(-math.sqrt(n / (n - k)) * t.ppf((1 + level) / 2, n - k)))


def welch_df(parts: Sequence[tuple[Any, int]]) -> Any:
    """Degrees of freedom of a sum of independent variances, each with its own (Welch-Satterthwaite)."""
    total = sum(v for v, _ in parts)
    return total**2 / sum(v**2 / max(df, 1) for v, df in parts)


def stretch(level: float, parts: Sequence[tuple[Any, int]]) -> Any:
    """t / z at the degrees of freedom of such a sum; 1 where nothing varies."""
    from scipy.stats import norm, t

    total = sum(v for v, _ in parts)
    safe = [(np.where(np.asarray(total) > 0, v, 1.0), df) for v, df in parts]
    return np.where(np.asarray(total) > 0, t.ppf((1 + level) / 2, welch_df(safe)) / norm.ppf((1 + level) / 2), 1.0)


def mde(sd: float, n: int, level: float = 0.95, power: float = 0.8) -> float:
    """The true mean difference that a two-sided paired t-test of n prompts finds with this power; sd of the differences."""
    return mde_of_se(sd / math.sqrt(n), n - 1, level, power) if n > 1 else math.nan


def mde_of_se(se: float, df: float, level: float = 0.95, power: float = 0.8) -> float:
    from scipy.special import nctdtrinc
    from scipy.stats import t

    if not math.isfinite(se):
        return math.nan
    # rejections on the wrong side (< 1e-4) left out
    return float(nctdtrinc(df, 1 - power, t.ppf((1 + level) / 2, df))) * se
