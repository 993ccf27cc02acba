"""Significance: McNemar's test and equivalence within a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError
from .intervals import Estimate, paired

Verdict = Literal["same", "better", "worse", "cannot tell"]


def mcnemar(before: ArrayLike, after: ArrayLike, level: float = 0.95) -> Estimate:
    """Yes or no, one image a prompt (n,): the difference of the shares, p by McNemar's exact test on the changed prompts."""
    from scipy.stats import binomtest

    d = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if not np.isin(d[np.isfinite(d)], (-1, 0, 1)).all() or d.ndim != 1:
        raise UserError("McNemar's test takes one yes (1) or no (0) a prompt")
    gained, lost = int((d == 1).sum()), int((d == -1).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return replace(paired(before, after, level), p=p)


@dataclass(frozen=True)
class Equivalence:
    """A verdict on a difference, and what it rests on."""

    verdict: Verdict
    difference: Estimate
    margin: float
    p: float  # two one-sided t-tests: small = inside the margin


def equivalence(
    before: ArrayLike,
    after: ArrayLike,
    margin: float,
    level: float = 0.95,
    strata: Sequence[object] | None = None,
) -> Equivalence:
    """Is after the same as before, to within margin (in units of the score)? Two one-sided tests on per-prompt differences.

        same         the mean difference lies within +-margin (p < 1 - level), even when it is not zero
        better/worse otherwise, when the interval of the difference excludes zero
        cannot tell  otherwise: too few prompts

    before may be one number. Source: Schuirmann 1987.

    Args:
        before: (n,), (n, images), or one number that is taken as exact.
        after: (n,) or (n, images), in the same order.
        margin: in units of the score, above 0.
        level: the coverage of the interval.
        strata: (n,) labels, e.g. GenEval's tags; the mean is then the mean of the strata's means.

    Raises:
        UserError: when margin <= 0 or the shapes differ.
    """
    from scipy.stats import t

    if not margin > 0:
        raise UserError(f"a margin of equivalence must be positive, not {margin}")
    d = paired(before, after, level, strata)
    if math.isnan(d.se):
        return Equivalence("cannot tell", d, margin, math.nan)
    inside = margin - abs(d.mean)
    p = float(t.sf(inside / d.se, d.n - 1)) if d.se > 0 else float(inside <= 0)
    if p < 1 - level:
        return Equivalence("same", d, margin, p)
    return Equivalence("better" if d.low > 0 else "worse" if d.high < 0 else "cannot tell", d, margin, p)
