"""Distances of images from their vectors: within a prompt (diversity) and between a model and its base (drift).

Everything is float64 and independent of networks; an embedder declares which of the two distances its vectors are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .intervals import Estimate

Array = NDArray[np.float64]
Kind = Literal["cosine", "squared"]  # 1 - <a, b> of unit vectors | |a - b|^2
ROWS = 512  # of a kernel matrix held at once: 2,000 columns of them are 8 MB


def distances(a: ArrayLike, b: ArrayLike, kind: Kind) -> Array:
    """Compute the distance of every row of a to every row of b, in [0, 2] or [0, inf): (n, D), (m, D) -> (n, m)."""
    x, y = _vectors(a, kind), _vectors(b, kind)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"vectors of {x.shape[1]} and of {y.shape[1]} numbers cannot be compared")
    return _squared(x, y) / (2 if kind == "cosine" else 1)  # |a - b|^2 / 2 = 1 - <a, b> for unit vectors


def paired(a: ArrayLike, b: ArrayLike, kind: Kind) -> Array:
    """Compute the distance row by row, exactly 0 for equal rows: base and tuned, same prompt and noise; (n, D), (n, D) -> (n,)."""
    x, y = _vectors(a, kind), _vectors(b, kind)
    if x.shape != y.shape:
        raise UserError(f"row by row needs equally many vectors of one length: {x.shape} and {y.shape}")
    return np.square(x - y).sum(1) / (2 if kind == "cosine" else 1)


def siblings(vectors: ArrayLike, kind: Kind) -> Array:
    """Compute each image's mean distance to the n - 1 others of its prompt, NaN where there is none: (n, D) -> (n,).

    Their mean is the mean pairwise distance, so an image's diversity is a score like any other.
    """
    x = _vectors(vectors, kind)
    n = len(x)
    if n < 2:
        return np.full(n, np.nan)
    apart = distances(x, x, kind)
    np.fill_diagonal(apart, 0)
    return apart.sum(1) / (n - 1)


def vendi(vectors: ArrayLike) -> float:
    """Compute the effective number of different images, in [1, n], of (n, D): exp of the entropy of the eigenvalues of K / n.

    K is the cosine similarity (Vendi score, arXiv 2210.02410, order 1). It grows with n: compare it at one n only. NaN for n = 0.
    """
    x = _vectors(vectors, "cosine")
    n = len(x)
    if not n:
        return math.nan
    gram = x @ x.T if n <= x.shape[1] else x.T @ x  # both have the same eigenvalues but for zeros
    share = np.linalg.eigvalsh(gram / n)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def cmmd(a: ArrayLike, b: ArrayLike, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Compute `scale` times the squared maximum mean discrepancy of unit vectors (n, D), (m, D) under a Gaussian kernel.

    CMMD (arXiv 2401.09603) with the estimator of its own code (google-research, cmmd/distance.py): k = exp(-|x - y|^2 / (2 sigma^2))
    and the mean over all pairs, a row with itself included. That is the biased V-statistic: never below 0, exactly 0 for equal
    sets, and above 0 by O(1/n) for two samples of one distribution, so it compares only at equal numbers of images.
    """
    x, y = _vectors(a, "cosine"), _vectors(b, "cosine")
    if not len(x) or not len(y):
        return math.nan
    x_groups, y_groups = np.zeros(len(x), np.int64), np.zeros(len(y), np.int64)
    xx, yy, xy = (
        _blocks(*pair, sigma)
        for pair in ((x, x_groups, x, x_groups), (y, y_groups, y, y_groups), (x, x_groups, y, y_groups))
    )
    value = xx.item() / len(x) ** 2 + yy.item() / len(y) ** 2 - 2 * xy.item() / (len(x) * len(y))
    return scale * max(0.0, value)


def cmmd_ci(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[object],
    sigma: float = 10.0,
    scale: float = 1000.0,
    level: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> Estimate:
    """Compute `cmmd` with its clustered bootstrap interval: prompts are drawn with replacement, with all their images of both sets.

    a, b (n, D): the images of the same prompts, row i of both made for the prompt clusters[i]. A resampled V-statistic lies too high
    once more by the bias that resampling shows, so the percentiles are moved down by it: the interval is for the expected CMMD at
    this number of images, the number that compares with another model's. The kernel is summed by prompt once; a resample is then a
    quadratic form in how often each prompt was drawn. NaN bounds for fewer than two prompts.

    Args:
        a: vectors (n, D) of one set of images.
        b: vectors (n, D) of the other, of the same prompts.
        clusters: (n,) the prompt of each row.
        sigma: bandwidth of the kernel, in units of the vectors.
        scale: factor of the result.
        level: the coverage of the interval.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
    """
    x, y = _vectors(a, "cosine"), _vectors(b, "cosine")
    if not len(x) == len(y) == len(clusters):
        raise UserError(f"one prompt a row of both sets: {len(x)} and {len(y)} vectors, {len(clusters)} prompts")
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    label, prompts = np.array([names[name] for name in clusters], np.int64), len(names)
    if not prompts:
        return Estimate(math.nan, math.nan, math.nan, 0, level=level)
    # Both sets have the same prompts and so the same weights: one matrix is enough, (prompts, prompts).
    cross = _blocks(x, label, y, label, sigma)
    total = _blocks(x, label, x, label, sigma) + _blocks(y, label, y, label, sigma) - cross - cross.T
    value = scale * max(0.0, float(total.sum()) / len(x) ** 2)
    if prompts < 2:
        return Estimate(value, math.nan, math.nan, prompts, level=level)
    draws = (
        np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), resamples).astype(np.float64)
    )
    drawn = draws @ np.bincount(label, minlength=prompts)  # images in each resample
    boot = scale * np.maximum(0, ((draws @ total) * draws).sum(1) / drawn**2)
    low, high = np.maximum(0, np.quantile(boot, [(1 - level) / 2, (1 + level) / 2]) - (boot.mean() - value))
    return Estimate(value, float(low), float(high), prompts, float(boot.std(ddof=1)), level)


def _blocks(x: Array, of_x: NDArray[np.int64], y: Array, of_y: NDArray[np.int64], sigma: float) -> Array:
    """Sum k - 1 over the pairs of two labels: (n, D), (n,) labels, (m, D), (m,) labels -> (labels, labels).

    k - 1 and not k: the ones cancel in a discrepancy, and beside them the rest would lose six digits at sigma 10.
    """
    labels = int(max(of_x.max(), of_y.max())) + 1
    order = np.argsort(of_y, kind="stable")
    present, starts = np.unique(of_y[order], return_index=True)
    sums = np.zeros((labels, labels))
    for i in range(0, len(x), ROWS):
        kernel = np.expm1(_squared(x[i : i + ROWS], y[order]) / (-2 * sigma**2))
        columns = np.zeros((len(kernel), labels))
        columns[:, present] = np.add.reduceat(kernel, starts, axis=1)
        np.add.at(sums, of_x[i : i + ROWS], columns)
    return sums


def _squared(x: Array, y: Array) -> Array:
    apart = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * (x @ y.T)
    return np.maximum(apart, 0, out=apart)


def _vectors(vectors: ArrayLike, kind: Kind) -> NDArray[Any]:
    """Convert to (n, D) float64, normalised for the cosine, where a vector of length 0 has no direction and becomes NaN."""
    x = np.asarray(vectors, np.float64)
    if x.ndim != 2:
        raise UserError(f"vectors must be (images, numbers), not {x.shape}")
    if kind == "squared":
        return x
    length = np.sqrt(np.square(x).sum(1, keepdims=True))
    return np.divide(x, length, out=np.full_like(x, np.nan), where=length > 0)
