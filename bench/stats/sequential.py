"""Tests that are looked at after every further training seed: p values that hold at whichever look one stops.

A comparison that adds seeds until a pair is told apart has tested several times, and one of several fixed-sample tests rejects too
often. At a look of S seeds the difference of two rows has the variance B / n + V / S: the prompts' part is the same at all looks, the
seeds' part falls. As the estimate of a later look is that of an earlier one with more data, their covariance is the variance of the
later one, the canonical joint distribution of group-sequential tests (Jennison and Turnbull 2000) with the information
1 / (B / n + V / S). So the probability of crossing a boundary at some look is known exactly, shared prompts included.

Of an error alpha, alpha (1 - sqrt((F - 1) / S)) is spent up to the look at S seeds, F being the seeds of the first look (alpha spending,
Lan and DeMets 1983, by the number of seeds): little of it early, where few seeds show little of their spread. It knows no last look, so
a cap on the seeds may be raised later. The anytime-valid p of a pair at a look is the smallest alpha at which it would have been told
by then. Over several pairs Holm's correction of these p holds at any look (Maurer and Bretz 2013): the probability that two equal rows
are ever told apart is at most alpha.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from .law import Array

ALPHAS = np.concatenate(
    [np.geomspace(1e-12, 1e-3, 19)[:-1], np.geomspace(1e-3, 1.0, 25)]
)  # levels of the table of boundaries
NODES = 121  # of the quadrature over the statistic of the look before
# The square root of the share of information that a look adds, at least: closer looks are taken as less alike than they are, on the
# safe side.
STEP = 0.12
RATIO_STEP = 0.5  # in the logarithm of V / (B / n), to which the ratio is rounded
LARGEST = 500.0


def spent(seeds: int, first: int) -> float:
    """Return the share of the error that may be spent up to the look at so many seeds."""
    return 1 - math.sqrt((first - 1) / seeds)


def look_p(p: ArrayLike, ratio: ArrayLike, first: int, seeds: int) -> Array:
    """Return the anytime-valid p of each pair by one look; the smallest over the looks so far is that of the pair.

    Args:
        p: fixed-sample p of each pair at this look; NaN stays.
        ratio: of each pair, the variance of one seed's difference over that due to the prompts, V / (B / n).
        first: seeds of the first look, at least 2.
        seeds: of this look.
    """
    from scipy.special import ndtri

    fixed, rounded = np.broadcast_arrays(np.asarray(p, np.float64), _rounded(np.asarray(ratio, np.float64)))
    z = -ndtri(np.maximum(fixed, 1e-300) / 2)
    valid = np.full(fixed.shape, math.nan)
    for value in np.unique(rounded[np.isfinite(fixed)]):
        limits = boundaries(float(value), first, seeds - first + 1)[-1]
        here = (rounded == value) & np.isfinite(fixed)
        valid[here] = np.exp(np.interp(-z[here], -limits, np.log(ALPHAS)))  # the limits fall as alpha rises
    return valid


def _rounded(ratio: Array) -> Array:
    """Return the ratio on a grid, so that tables of boundaries serve again; none is beyond LARGEST, where prompts make no noise."""
    clipped = np.clip(np.where(ratio > 0, ratio, 0.0), 1 / LARGEST, LARGEST)
    return np.exp(np.round(np.log(clipped) / RATIO_STEP) * RATIO_STEP)


@lru_cache(maxsize=256)
def boundaries(ratio: float, first: int, looks: int) -> Array:
    """Return by how many standard errors a difference must exceed 0 to be told at each look, (looks, ALPHAS).

    ratio and first as in `look_p`. The density of the statistic on the paths that were not told before is carried from look to look
    by quadrature (Armitage, McPherson and Rowe 1969).
    """
    from scipy.special import ndtr, ndtri

    alphas = ALPHAS
    limits = np.empty((looks, len(alphas)))
    limits[0] = -ndtri(alphas * spent(first, first) / 2)
    place, weight = np.polynomial.legendre.leggauss(NODES)
    at = np.minimum(limits[0], 8.0)[:, None] * place  # (alphas, nodes)
    mass = np.exp(-(at**2) / 2) / math.sqrt(2 * math.pi) * weight * np.minimum(limits[0], 8.0)[:, None]
    for k in range(1, looks):
        seeds = first + k
        step = math.sqrt(max(1 - (1 + ratio / seeds) / (1 + ratio / (seeds - 1)), STEP**2))
        carried = math.sqrt(1 - step**2) * at
        budget = alphas * (spent(seeds, first) - spent(seeds - 1, first))
        low, high = np.zeros(len(alphas)), np.full(len(alphas), 12.0)
        for _ in range(45):
            middle = (low + high) / 2
            beyond = ndtr((carried - middle[:, None]) / step) + ndtr((-middle[:, None] - carried) / step)
            above = (mass * beyond).sum(1) > budget
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        limits[k] = high
        # Where alpha is near 1 nothing is left within the limits.
        edge = np.minimum(np.maximum(high, 1e-6), 8.0)[:, None]
        new = edge * place
        kernel = np.exp(-np.square((new[:, :, None] - carried[:, None, :]) / step) / 2) / (
            step * math.sqrt(2 * math.pi)
        )
        mass = np.einsum("anm,am->an", kernel, mass) * weight * edge
        at = new
    return limits
