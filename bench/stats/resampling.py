"""Resampling: bootstrap means of prompts within strata; seeded, in chunks of a few MB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PromptSample:
    """Scores of the prompts that could be scored, as a sample of a stratified mean."""

    values: Array  # (n,)
    weights: Array  # (n,), with sum 1: the mean of the strata's means is their product with values
    stratum: NDArray[np.int64]  # (n,), 0..K - 1
    dropped: int  # prompts without a finite score


def weigh(x: Array, strata: Sequence[object] | None) -> PromptSample:
    """The finite ones of per-prompt scores x (n,), weighted so that every stratum counts the same."""
    keep = np.isfinite(x)
    if strata is not None and len(strata) != len(x):
        raise UserError(f"one stratum a prompt: {len(strata)} labels for {len(x)} prompts")
    labels = np.zeros(len(x), np.int64) if strata is None else np.array([str(s) for s in strata])
    _, groups, counts = np.unique(labels[keep], return_inverse=True, return_counts=True)
    return PromptSample(x[keep], 1 / (len(counts) * counts[groups]), groups, int((~keep).sum()))


def resampled_means(
    columns: ArrayLike, resamples: int = 10_000, seed: int = 0, strata: Sequence[object] | None = None
) -> Array:
    """(prompts, columns) -> (resamples, columns): means under resamples of the prompts, the same ones for every column.

    A prompt without a score in some column is left out of all. strata as in `mean_ci`.
    """
    table = np.asarray(columns, np.float64)
    whole = np.isfinite(table).all(1)
    sample = weigh(np.where(whole, 0.0, np.nan), strata)
    return resample_within(table[whole], sample.stratum, resamples, np.random.default_rng(seed))


def resample_within(x: Array, groups: NDArray[Any], resamples: int, rng: np.random.Generator) -> Array:
    """(resamples,) or, of x (n, columns), (resamples, columns): the mean of the strata's means under resampling within them."""
    if not len(x):
        return np.full((resamples, *x.shape[1:]), np.nan)
    k = int(groups.max()) + 1
    return sum((resample(x[groups == g], resamples, rng) for g in range(k)), np.zeros((resamples, *x.shape[1:]))) / k


def resample(x: Array, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples,) or (resamples, columns): means of len(x) draws with replacement; in chunks of a few MB.

    Columns share the draws, and a vector draws as a single column would: there, how often each row was drawn times the values.
    """
    n = len(x)
    rows = max(1, 1_000_000 // n)
    draws = (rng.integers(0, n, (min(rows, resamples - i), n), np.int32) for i in range(0, resamples, rows))
    if x.ndim == 1:
        return np.concatenate([x[pick].mean(1) for pick in draws])
    with single_blas_thread():
        return np.concatenate([draw_counts(pick, n) @ x / n for pick in draws])


def single_blas_thread() -> Any:
    """Within: products of matrices by one thread. Beside other work a second one, late at every product, made it six times slower."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


def draw_counts(pick: NDArray[np.int32], n: int) -> Array:
    """(resamples, n): how often each of n rows stands in pick (resamples, draws)."""
    return np.stack([np.bincount(row, minlength=n) for row in pick]).astype(np.float64)
