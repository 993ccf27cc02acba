"""The sequential rule: its error over all looks in simulation, its boundaries, and what more looks cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from gpobench.bench.stats import sequential
from gpobench.bench.stats.sequential import ALPHAS, boundaries, look_p, spent


def test_the_error_is_spent_once_and_never_more() -> None:
    shares = [spent(seeds, 2) for seeds in range(2, 2000)]
    assert shares[0] == pytest.approx(1 - 0.5**0.5) and all(np.diff(shares) > 0) and shares[-1] < 1


def test_the_first_look_is_a_test_at_its_share() -> None:
    limits = boundaries(1.0, 2, 1)
    assert limits[0] == pytest.approx(scipy.stats.norm.isf(ALPHAS * spent(2, 2) / 2))
    assert look_p([0.01], 1.0, 2, 2)[0] == pytest.approx(0.01 / spent(2, 2), rel=0.02)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0, 500.0])
def test_equal_rows_cross_as_often_as_the_error_that_is_spent(ratio: float) -> None:
    """Known variances; prompts shared by all looks. Where looks are nearly the same, fewer."""
    rng, draws = np.random.default_rng(0), 40_000
    k = int(np.argmin(np.abs(ALPHAS - 0.05)))
    limits = boundaries(float(sequential._rounded(np.array(ratio))), 2, 9)[:, k]
    prompts, seeds = rng.standard_normal(draws), math.sqrt(ratio) * rng.standard_normal((10, draws))
    crossed = np.zeros(draws, bool)
    for look in range(9):
        n = look + 2
        crossed |= np.abs(prompts + seeds[:n].mean(0)) / math.sqrt(1 + ratio / n) > limits[look]
    target = ALPHAS[k] * spent(10, 2)
    assert crossed.mean() < target * 1.06
    assert crossed.mean() > target * (0.6 if ratio < 1 else 0.9)


def test_p_is_never_smaller_than_that_of_one_look_and_grows_with_it() -> None:
    p = np.geomspace(1e-8, 1, 30)
    for ratio in (0.01, 1.0, math.inf):
        for seeds in (2, 5, 9):
            now = look_p(p, ratio, 2, seeds)
            assert (np.diff(now) >= 0).all() and (now >= p * 0.99).all() and (now <= 1).all()


def test_looks_that_share_their_noise_cost_less_than_bonferroni() -> None:
    """Nine looks: where the prompts make the noise, and also where the seeds do."""
    assert look_p([0.03], 0.0, 2, 9)[0] < 0.09
    assert look_p([0.004], math.inf, 2, 10)[0] < 9 * 0.004 * 2
    assert look_p([0.004], 1.0, 2, 10)[0] < 0.02 < 9 * 0.004


def test_a_p_that_is_unknown_stays_unknown() -> None:
    now = look_p([math.nan, 0.01, 0.0], [1.0, math.nan, 1.0], 2, 3)
    assert math.isnan(now[0]) and 0.01 < now[1] < 0.1 and now[2] == pytest.approx(ALPHAS[0])
