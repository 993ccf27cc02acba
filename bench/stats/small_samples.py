"""Corrections for small samples: variances of stratified means, and Student's quantiles on the normal scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .law import welch_df
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


def stretch(level: float, parts: Sequence[tuple[Any, int]]) -> Any:
    """t / z at the degrees of freedom of such a sum; 1 where nothing varies."""
    from scipy.stats import norm, t

    variances = [np.asarray(v, np.float64) for v, _ in parts]
    df = welch_df(variances, [np.asarray(float(max(df, 1))) for _, df in parts])
    varies = np.sum(variances, axis=0) > 0
    return np.where(varies, t.ppf((1 + level) / 2, df) / norm.ppf((1 + level) / 2), 1.0)
