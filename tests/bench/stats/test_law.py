"""The law of the tables against closed forms, limma's formulas and simulated tables of equal rows."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import polygamma

from gpobench.bench.stats import law
from gpobench.bench.stats.law import Noise, RankInterval, SeedSpread, moderate, rank_intervals

nan = math.nan
CALIBRATION = Path(__file__).resolve().parents[3] / "benchmarks" / "calibration.py"


PART = st.just(0.0) | st.floats(1e-9, 1e3)


def noise(prompts: float, prompt_df: float, seeds: float, seed_df: float) -> Noise:
    return Noise(*(np.array([x]) for x in (prompts, prompt_df, seeds, seed_df)))


# Noise


@pytest.mark.parametrize("df", [2.0, 4.0, 14.0, 327.0])
@pytest.mark.parametrize("part", ["prompts", "seeds"])
def test_one_part_alone_is_students_t(df: float, part: str) -> None:
    observed = noise(4.0, df, 0.0, 1.0) if part == "prompts" else noise(0.0, 9.0, 4.0, df)
    assert observed.p([5.0])[0] == pytest.approx(2 * scipy.stats.t.sf(2.5, df), rel=1e-6)
    assert observed.quantile()[0] == pytest.approx(2 * scipy.stats.t.ppf(0.975, df), rel=1e-6)
    assert observed.df()[0] == pytest.approx(df, rel=1e-3)
    assert observed.se[0] == 2


def test_two_parts_are_the_sum_of_two_students() -> None:
    both, rng = noise(1.0, 14.0, 2.0, 4.0), np.random.default_rng(0)
    drawn = np.abs(rng.standard_t(14, 1_000_000) + math.sqrt(2) * rng.standard_t(4, 1_000_000))
    assert both.quantile()[0] == pytest.approx(np.quantile(drawn, 0.95), rel=0.005)
    for x in (2.0, 5.0, 9.0):
        assert both.p([x])[0] == pytest.approx(float((drawn > x).mean()), rel=0.03)


@settings(max_examples=30, deadline=None)
@given(PART, st.floats(2, 500), PART, st.floats(1, 50))
def test_p_and_interval_agree_at_the_level(prompts: float, prompt_df: float, seeds: float, seed_df: float) -> None:
    observed = noise(prompts, prompt_df, seeds, seed_df)
    half = observed.quantile()[0]
    assert half >= 0 and (half == 0) == (prompts + seeds == 0)
    if half > 0:
        assert observed.p([half])[0] == pytest.approx(0.05, abs=1e-6)
        assert observed.p([1.01 * half])[0] < 0.05 < observed.p([0.99 * half])[0]


def test_the_mde_is_found_with_its_power() -> None:
    for observed in (noise(1.0, 30.0, 0.0, 1.0), noise(1.0, 30.0, 3.0, 5.0)):
        assert observed.power(observed.mde())[0] == pytest.approx(0.8, abs=1e-6)
        assert observed.power([0.0])[0] == pytest.approx(0.025, abs=1e-6)
    df = 30
    expected = scipy.stats.nct.sf(scipy.stats.t.ppf(0.975, df), df, noise(1.0, df, 0.0, 1.0).mde()[0])
    assert expected == pytest.approx(0.8, abs=1e-3)


def test_without_noise_the_signs_of_the_prompts_are_left() -> None:
    still = noise(0.0, 6.0, 0.0, 1.0)
    assert still.p([0.1])[0] == 2 / 2**7 and still.p([0.0])[0] == 1 and still.quantile()[0] == 0
    assert math.isnan(noise(nan, 6.0, 0.0, 1.0).p([0.1])[0]) and math.isnan(noise(nan, 6.0, 0.0, 1.0).mde()[0])


def test_the_residual_is_counted_once() -> None:
    """Simulated means of seeds and prompts have the variance that the components add up to."""
    rng, seeds, prompts, estimated, means = np.random.default_rng(0), 3, 40, [], []
    for _ in range(2000):
        table = rng.normal(0, 1, (1, prompts)) + rng.normal(0, 2, (seeds, prompts)) + rng.normal(0, 0.3, (seeds, 1))
        off = table - table.mean(0)
        residual = np.square(off - off.mean(1, keepdims=True)).sum() / (prompts - 1) / (seeds - 1) / prompts
        observed = law.SeedVariance(
            np.array(table.mean(1).var(ddof=1)), np.array(residual), np.array(2.0), np.array(False)
        )
        made = law.contrast_noise(table.mean(0).var(ddof=1) / prompts, np.array(prompts - 1.0), [(observed, seeds)])
        estimated.append(float(made.se) ** 2)
        means.append(table.mean())
    truth = 1 / prompts + 4 / prompts / seeds + 0.09 / seeds
    assert np.mean(estimated) == pytest.approx(truth, rel=0.05) and np.var(means) == pytest.approx(truth, rel=0.12)


# Moderation


def spread_of(*variances: float, residual: float = 0.0, seeds: int = 3) -> SeedSpread:
    observed = np.array(variances)
    missing = np.isnan(observed)
    return SeedSpread(observed, np.where(missing, nan, residual), np.where(missing, 1, seeds))


def test_the_prior_is_limmas() -> None:
    """fitFDist: the moments of log variances; checked against a prior that the variances were drawn from."""
    rng = np.random.default_rng(0)
    truth = 2.0 * 6 / rng.chisquare(6, 40_000)
    observed = truth * rng.chisquare(2, 40_000) / 2
    prior, df = law.fit_prior(observed, np.full(40_000, 2.0), np.ones(40_000, bool), widening=0.0)
    assert prior[0] == pytest.approx(2.0, rel=0.05) and df[0] == pytest.approx(6, rel=0.1)
    assert law.fit_prior(observed[:9], np.full(9, 2.0), np.ones(9, bool))[1][0] <= df[0] * 1e4


@pytest.mark.parametrize("x", [1e-3, 0.1, 1.6, 50.0])
def test_the_inverse_of_trigamma_is_one(x: float) -> None:
    assert polygamma(1, law.inverse_trigamma(x)) == pytest.approx(x, rel=1e-7)


def test_rows_share_their_spread_and_a_larger_one_keeps_part_of_its_own() -> None:
    equal = moderate(spread_of(1.0, 1.2, 0.8, 1.1, 0.9))
    assert np.ptp(equal.variance) < 0.4 and (equal.df > 100).all()
    apart = moderate(spread_of(1.0, 1.2, 0.8, 1.1, 100.0))
    assert apart.variance[4] > 30 and (apart.df < equal.df).all() and (apart.variance[:4] < 10).all()


def test_no_variance_falls_below_most_of_its_residual() -> None:
    assert (moderate(spread_of(0.01, 0.02, 0.01, residual=1.0)).variance >= 0.6).all()


def test_a_row_of_one_seed_is_lent_what_lies_beyond_the_residual() -> None:
    lent = moderate(spread_of(2.0, 2.2, 1.9, nan, residual=0.5))
    assert 1.0 < lent.variance[3] < 4.0 and lent.residual[3] == 0 and lent.df[3] > 0
    only = moderate(spread_of(2.0, nan, residual=0.5))
    assert (only.variance[1], only.df[1]) == (2.0, 2) and (only.variance[0], only.df[0]) == (2.0, 2)
    nothing = moderate(spread_of(nan, nan))
    assert np.isnan(nothing.variance).all()


def test_a_row_that_changed_nothing_says_nothing_of_the_others() -> None:
    with_dead, without = moderate(spread_of(1.0, 1.5, 0.7, 0.0)), moderate(spread_of(1.0, 1.5, 0.7))
    assert with_dead.variance[:3] == pytest.approx(without.variance) and with_dead.variance[3] == 0


def test_many_tables_at_once_are_each_by_itself() -> None:
    tables = np.random.default_rng(0).chisquare(2, (5, 4))
    together = moderate(SeedSpread(tables, tables / 3, np.full(4, 3)))
    for k in range(5):
        alone = moderate(SeedSpread(tables[k], tables[k] / 3, np.full(4, 3)))
        assert together.variance[k] == pytest.approx(alone.variance) and together.df[k] == pytest.approx(alone.df)


# Ranks


def test_a_rank_has_two_ends() -> None:
    ranks = rank_intervals("abcd", [("a", "c"), ("a", "d")])
    assert ranks == {"a": RankInterval(1, 2), "b": RankInterval(1, 4), "c": RankInterval(2, 4), "d": RankInterval(2, 4)}
    assert str(ranks["a"]) == "1-2" and str(RankInterval(3, 3)) == "3"
    assert set(rank_intervals("ab", []).values()) == {RankInterval(1, 2)}


def test_better_than_better_is_better() -> None:
    assert rank_intervals("abc", [("a", "b"), ("b", "c")])["a"] == RankInterval(1, 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=15))
def test_true_differences_never_exclude_the_true_rank(pairs: list[tuple[int, int]]) -> None:
    labels = [str(k) for k in range(6)]
    ranks = rank_intervals(labels, [(str(min(p)), str(max(p))) for p in pairs if p[0] != p[1]])
    assert all(ranks[label].best <= 1 + k <= ranks[label].worst for k, label in enumerate(labels))


# Shares


def test_the_interval_of_a_share_is_wilsons_with_the_clusters_trials() -> None:
    from statsmodels.stats.proportion import proportion_confint

    z = float(scipy.stats.norm.ppf(0.975))
    ends = law.share_interval(np.array(0.1), np.array(math.sqrt(0.09 / 50)), np.array(200), np.array(z))
    assert [float(e) for e in ends] == pytest.approx(proportion_confint(5, 50, method="wilson"))
    low, high = law.share_interval(np.array(1.0), np.array(0.0), np.array(20), np.array(z))
    assert (float(low), float(high)) == pytest.approx(proportion_confint(20, 20, method="wilson"))


# Calibration


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration", CALIBRATION)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("spread", ["0", "4", "uneven, 1 to 4"])
def test_equal_rows_are_told_apart_in_five_tables_of_a_hundred_at_most(calibration: ModuleType, spread: str) -> None:
    """A sample of `make calibration`: 150 tables; 15 is what 1 in 100 samples exceed where the error is 6 %."""
    (x,) = calibration.draw(calibration.Cell(130, spread, (3,) * 11), 150, [(3,) * 11], np.random.default_rng(5))
    by = calibration.measure(x, calibration.guarded)
    assert 0.93 <= by.coverage <= 0.985
    assert by.family_error_base <= 0.1 and by.family_error_pairs <= 0.1
    assert 0.72 <= by.power_at_mde <= 0.88


def test_the_former_law_and_welchs_fail_where_this_one_holds(calibration: ModuleType) -> None:
    (x,) = calibration.draw(calibration.Cell(130, "4", (2,) * 11), 150, [(2,) * 11], np.random.default_rng(5))
    assert calibration.measure(x, calibration.welch).family_error_base > 0.3
    assert calibration.measure(x, calibration.guarded).family_error_base <= 0.1


def test_a_row_with_gpos_gain_is_told_from_the_base(calibration: ModuleType) -> None:
    cell = calibration.Cell(328, "uneven, as shipped", (3,) * 11, gain=5.6)
    (x,) = calibration.draw(cell, 150, [(3,) * 11], np.random.default_rng(7))
    assert calibration.gpo_power(x, calibration.guarded) > 0.75 > 0.5 > calibration.gpo_power(x, calibration.former)


def test_a_share_near_zero_is_covered(calibration: ModuleType) -> None:
    for share in (0.05, 0.98):
        assert calibration.share_coverage(15, 1, share, 300, np.random.default_rng(0)) >= 0.9
