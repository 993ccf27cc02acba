"""The ratio of two gains: its interval holds the ratios that the test does not reject, and there is none over a gain that is not told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from gpobench.bench.errors import UserError
from gpobench.bench.stats.ratios import PairedGains, moments, ratios


def gains(
    held_out: float, training: float, *, correlation: float = 0.5, seeds: int = 1, prompts: int = 200, seed: int = 0
) -> PairedGains:
    """Gains whose noise by prompt has sd 1 and is shared in part."""
    rng = np.random.default_rng(seed)
    covariance = [[1.0, correlation], [correlation, 1.0]]
    made = rng.multivariate_normal([held_out, training], covariance, (seeds, prompts))
    return PairedGains(list(made[..., 0]), list(made[..., 1]))


def test_one_seed_has_fiellers_interval() -> None:
    row = gains(0.5, 1.0, seed=3)
    (ratio,) = ratios(moments([row]))
    (h,), (t,) = row.numerator, row.denominator
    h, t = np.asarray(h), np.asarray(t)
    q2 = student.ppf(0.975, len(h) - 1) ** 2
    covariance = np.cov(h, t) / len(h)
    # Roots of (mean h - rho mean t)^2 = q^2 variance(h - rho t).
    a = t.mean() ** 2 - q2 * covariance[1, 1]
    b = -2 * (h.mean() * t.mean() - q2 * covariance[0, 1])
    c = h.mean() ** 2 - q2 * covariance[0, 0]
    low, high = sorted(np.roots([a, b, c]))
    assert (ratio.low, ratio.high) == pytest.approx((low, high), rel=1e-4)
    assert ratio.ratio == pytest.approx(h.mean() / t.mean()) and ratio.rises and (ratio.n, ratio.seeds) == (200, 1)


def test_the_ends_of_the_interval_are_rejected_at_five_percent() -> None:
    rows = [gains(0.3 * k, 1.0, seeds=3, seed=k) for k in range(4)]
    table = moments(rows)
    for k, ratio in enumerate(ratios(table)):
        assert ratio.low < ratio.ratio < ratio.high
        assert 2 * float(table.p_below(ratio.high)[k]) == pytest.approx(0.05, abs=1e-4)
        assert 2 * (1 - float(table.p_below(ratio.low)[k])) == pytest.approx(0.05, abs=1e-4)


def test_a_ratio_does_not_depend_on_the_unit_that_both_share() -> None:
    row = gains(0.5, 1.0, seeds=2)
    scaled = PairedGains([0.01 * np.asarray(x) for x in row.numerator], [0.01 * np.asarray(x) for x in row.denominator])
    (a,), (b,) = ratios(moments([row])), ratios(moments([scaled]))
    assert (a.ratio, a.low, a.high) == pytest.approx((b.ratio, b.low, b.high), rel=1e-5)


def test_gains_that_move_together_say_more_of_their_ratio() -> None:
    width = lambda r: r.high - r.low
    (apart,), (together,) = (ratios(moments([gains(1.0, 1.0, correlation=c)])) for c in (0.0, 0.9))
    assert width(together) < 0.5 * width(apart)


@pytest.mark.parametrize("training", [0.0, 0.01, -1.0])
def test_there_is_no_ratio_over_a_gain_that_is_not_told_or_a_loss(training: float) -> None:
    (ratio,) = ratios(moments([gains(0.5, training)]))
    assert not ratio.rises and all(map(math.isnan, (ratio.ratio, ratio.low, ratio.high)))


def test_below_five_prompts_nothing_is_told() -> None:
    (ratio,) = ratios(moments([gains(5.0, 10.0, prompts=4)]))
    assert not ratio.rises and math.isnan(ratio.p_rises) and ratio.n == 4


def test_images_without_a_score_by_either_scorer_are_left_out() -> None:
    rng = np.random.default_rng(0)
    h, t = rng.normal(0.5, 0.1, (50, 2)), rng.normal(1.0, 0.1, (50, 2))
    h[0], t[1, 0] = np.nan, np.nan
    (ratio,) = ratios(moments([PairedGains([h], [t])]))
    whole = np.isfinite(h) & np.isfinite(t)
    by_prompt = [np.nanmean(np.where(whole, x, np.nan)[1:], axis=1).mean() for x in (h, t)]
    assert ratio.n == 49 and ratio.ratio == pytest.approx(by_prompt[0] / by_prompt[1])


def test_gains_of_other_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="the same prompts and seeds by both scorers"):
        moments([PairedGains([np.zeros(5)], [np.zeros(6)])])


def test_the_interval_covers() -> None:
    """Three seeds that lie apart, alike by both scorers: 400 rows in tables of ten."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(40):
        rows: list[PairedGains] = []
        for _ in range(10):
            shift = 0.1 * rng.normal(size=(3, 1)) + 1.0
            noise = rng.multivariate_normal([0, 0], [[1, 0.4], [0.4, 1]], (3, 100))
            shared = rng.multivariate_normal([0, 0], [[1, 0.4], [0.4, 1]], 100)
            rows.append(
                PairedGains(
                    list(0.6 * shift + noise[..., 0] + shared[:, 0]), list(shift + noise[..., 1] + shared[:, 1])
                )
            )
        covered += sum(r.low <= 0.6 <= r.high for r in ratios(moments(rows)))
    assert 0.93 <= covered / 400 <= 0.99
