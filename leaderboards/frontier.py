"""Frontier of a search: its gain against nfe per served image, and from how many served images training is cheaper and better.

An image of a search that gains f(c) costs c evaluations of the network, every time one is served. An image of a row that was trained
for T costs what one of the base costs, c0, and its share of the training: c0 + T / S where S images are served. With the same gain g
the cheapest search costs C, the smallest c with f(c) >= g. So training is cheaper from S = T / (C - c0) images on, and gains more at
the same cost.

f is known at the numbers of candidates that the run evaluated. Between them it is a straight line over the logarithm of the cost, of the
largest gain so far; beyond them nothing is said. The interval of S follows from that of C, which holds every c at which the paired
difference of the row and the search may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..bench.stats.intervals import Estimate

Limit = Literal["", "at most", "at least"]
SERVED = tuple(10.0**k for k in range(2, 7))  # numbers of served images at which figures show the cost of a trained row


@dataclass(frozen=True)
class CostPoint:
    """What a search gains with so many candidates, and what an image then costs: means over images and seeds."""

    candidates: float
    nfe: float
    gain: Estimate


@dataclass(frozen=True)
class ServedImages:
    """A number of served images, or a bound of it; infinite: no number is enough, NaN: unknown."""

    count: float
    limit: Limit = ""


@dataclass(frozen=True)
class TrainedRow:
    """A trained row beside a search: from how many served images on it is cheaper and better."""

    label: str
    gain: Estimate
    spent: float  # nfe of the training, the mean over seeds
    images: ServedImages
    low: ServedImages  # ends of the interval
    high: ServedImages

    def nfe(self, nfe_an_image: float, served: float) -> float:
        """Return the evaluations of the network for one of so many served images."""
        return nfe_an_image + self.spent / served


@dataclass(frozen=True)
class Frontier:
    """A search against the trained rows of its table."""

    label: str
    key: str  # the scorer/metric of the gains
    nfe_an_image: float  # of the base
    points: tuple[CostPoint, ...]  # by rising cost
    trained: tuple[TrainedRow, ...]
    is_measured: bool  # on the way; False: only the number of candidates that the budget paid for is known


def cheapest_nfe(nfe: Sequence[float], behind: Sequence[float]) -> tuple[float, Limit]:
    """The smallest cost at which a search gains as much as a row.

    Args:
        nfe: costs of a served image, rising.
        behind: by how much the search gains less than the row at each.

    Returns:
        The cost at which the smallest `behind` so far, a straight line over log nfe, reaches 0; "at most" the first cost where
        it does so there, "at least" the last where it never does.
    """
    least = np.minimum.accumulate(np.asarray(behind, np.float64))
    if np.isnan(least).any():
        return math.nan, ""
    if least[-1] > 0:
        return nfe[-1], "at least"
    k = int(np.argmax(least <= 0))
    if k == 0:
        return nfe[0], "at most"
    share = float(least[k - 1] / (least[k - 1] - least[k]))
    return math.exp((1 - share) * math.log(nfe[k - 1]) + share * math.log(nfe[k])), ""


def break_even(spent: float, nfe_an_image: float, cost: tuple[float, Limit]) -> ServedImages:
    """The number of served images at which training costs as much an image as a search of this cost."""
    nfe, limit = cost
    more = nfe - nfe_an_image
    if more <= 1e-9 * nfe_an_image:  # an image of the base gains as much
        return ServedImages(math.inf)
    turned: dict[Limit, Limit] = {"": "", "at most": "at least", "at least": "at most"}
    return ServedImages(spent / more, turned[limit])


def trained_row(
    label: str, gain: Estimate, spent: float, nfe_an_image: float, costs: Sequence[float], behind: Sequence[Estimate]
) -> TrainedRow:
    """Compare a trained row with a search.

    Args:
        label: of the row.
        gain: of the row over the base.
        spent: nfe of its training.
        nfe_an_image: of an image of the base.
        costs: of an image at each point of the search.
        behind: by how much the search gains less than the row at each.
    """

    def images(own: float, differences: Sequence[float]) -> ServedImages:
        if own <= 0:  # the base gains as much, and no search is needed
            return ServedImages(math.inf)
        return break_even(spent, nfe_an_image, cheapest_nfe(costs, differences))

    # The more a row gains, the dearer the search that gains as much, and the fewer images are enough.
    few = images(gain.high, [e.high for e in behind])
    many = images(gain.low, [e.low for e in behind])
    return TrainedRow(label, gain, spent, images(gain.mean, [e.mean for e in behind]), few, many)
