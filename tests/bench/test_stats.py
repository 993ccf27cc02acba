"""The intervals, tests and verdicts against closed forms, scipy, statsmodels and simulated nulls."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.stats import (
    Estimate,
    equivalence,
    holm,
    iqm,
    mcnemar,
    mde,
    mean_ci,
    paired,
    per_prompt,
    probability_of_improvement,
    proportion,
    two_level,
)

nan = math.nan
Draw = Callable[[np.random.Generator], np.ndarray]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# One sample


def test_the_prompt_is_the_unit():
    values = np.array([[1.0, 0.0], [nan, 0.5], [nan, nan], [1.0, 1.0]])
    assert np.allclose(per_prompt(values), [0.5, 0.5, nan, 1.0], equal_nan=True)
    e = mean_ci(values)
    assert (e.n, e.dropped) == (3, 1) and e.mean == pytest.approx(2 / 3)
    copies = np.repeat(rng().normal(size=(50, 1)), 8, axis=1)  # eight copies of an image are no eight images
    assert mean_ci(copies).se == pytest.approx(mean_ci(copies[:, 0]).se)


def test_the_standard_error_is_the_clustered_one():
    """Var = C / (C - 1) sum_c (sum_i r_ci)^2 / n^2 with clusters = prompts (arXiv 2411.00640)."""
    ols = pytest.importorskip("statsmodels.regression.linear_model").OLS
    values = rng().normal(size=(60, 4)) + rng(1).normal(size=(60, 1))
    fit = ols(values.ravel(), np.ones(240)).fit(
        cov_type="cluster",
        cov_kwds={"groups": np.repeat(np.arange(60), 4), "use_correction": False},
    )
    assert mean_ci(values).se == pytest.approx(float(fit.bse[0]) * math.sqrt(60 / 59), rel=1e-9)


def test_the_bootstrap_agrees_with_scipys_and_with_the_t_interval():
    x = rng().normal(size=400)
    e = mean_ci(x)
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=10_000, rng=rng(), method="percentile"
    ).confidence_interval
    assert (e.low, e.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert (e.low, e.high) == pytest.approx(scipy.stats.t.interval(0.95, 399, x.mean(), scipy.stats.sem(x)), abs=0.006)
    assert e.se == pytest.approx(scipy.stats.sem(x))
    assert mean_ci(x, level=0.8).high < e.high


def test_one_seed_one_answer():
    x = rng().random(30)
    assert mean_ci(x, seed=3) == mean_ci(x, seed=3) != mean_ci(x, seed=4)
    assert paired(x, x**2, seed=3) == paired(x, x**2, seed=3)
    state = np.random.get_state()[1].copy()  # type: ignore
    two_level([x, x**2])
    assert (np.random.get_state()[1] == state).all()  # type: ignore


@pytest.mark.parametrize("values", [[], [0.3], [nan, nan], [0.4, nan]])
def test_too_few_prompts_have_no_interval(values: list[float]):
    e = mean_ci(values)
    assert math.isnan(e.low) and math.isnan(e.high) and e.n == np.isfinite(values).sum()
    assert e.n == 0 or e.mean == values[0]


def test_equal_scores_have_width_zero_and_wilson_has_not():
    e = mean_ci(np.ones(20))
    assert (e.low, e.mean, e.high) == pytest.approx((1, 1, 1)) and str(e) == "1 [1, 1]"
    w = proportion(20, 20)
    assert w.low == pytest.approx(0.8389, abs=1e-4) and w.mean == 1


@pytest.mark.parametrize("k,n", [(0, 5), (3, 10), (50, 553), (10, 10)])
def test_proportion_is_wilsons(k: int, n: int):
    proportion_confint = pytest.importorskip("statsmodels.stats.proportion").proportion_confint
    e = proportion(k, n)
    assert (e.low, e.high) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-9)
    assert math.isnan(proportion(0, 0).mean)


def test_strata_weigh_the_same():
    """GenEval's overall score: the mean of the tags' means, prompts resampled within tags."""
    x = np.concatenate([rng().normal(0, 1, 40), rng(1).normal(3, 2, 80), [nan]])
    tags = ["one"] * 40 + ["two"] * 80 + ["two"]
    e = mean_ci(x, strata=tags)
    assert e.mean == pytest.approx((x[:40].mean() + x[40:120].mean()) / 2)
    se = math.sqrt(x[:40].var(ddof=1) / 40 + x[40:120].var(ddof=1) / 80) / 2
    assert e.se == pytest.approx(se) and e.high - e.low == pytest.approx(2 * 1.98 * se, rel=0.03)
    with pytest.raises(UserError, match="one stratum a prompt"):
        mean_ci(x, strata=tags[1:])


def test_ten_thousand_prompts_are_quick():
    x = rng().random((10_000, 4))
    start = time.process_time()
    mean_ci(x)
    paired(x, x[::-1])
    assert time.process_time() - start < 15  # about 3 s alone


# Coverage


NULLS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda r: r.normal(size=100), 0.0),
    "binary": (lambda r: (r.random(100) < 0.5).astype(float), 0.5),
    "four images": (lambda r: r.binomial(4, r.beta(0.7, 0.3, (100, 1)), (100, 4)).astype(float) / 4, 0.7),
    "skewed": (lambda r: r.exponential(size=100), 1.0),
}


def coverage(draw: Draw, truth: float, times: int, resamples: int) -> float:
    hits = 0
    for i in range(times):
        e = mean_ci(draw(rng(i)), resamples=resamples, seed=i)
        hits += e.low - 1e-12 <= truth <= e.high + 1e-12
    return hits / times


@pytest.mark.parametrize("name", ["normal", "four images"])
def test_the_interval_covers(name: str):
    assert 0.91 <= coverage(*NULLS[name], times=300, resamples=1000) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("name", NULLS)
def test_the_interval_covers_at_its_level(name: str):
    assert 0.93 <= coverage(*NULLS[name], times=1000, resamples=4000) <= 0.97


def test_the_paired_test_holds_its_level_and_has_its_power():
    """300 nulls reject about 5 %; 300 differences of one MDE are found about 80 % of the time."""
    found, size = 0, 0
    for i in range(300):
        a, noise = rng(i).normal(size=40), rng(i + 1000).normal(size=40)
        size += (paired(a, a + noise, resamples=400, seed=i).p or 0) <= 0.05
        found += (paired(a, a + noise + mde(1.0, 40), resamples=400, seed=i).p or 1) <= 0.05
    assert 0.02 <= size / 300 <= 0.09 and 0.72 <= found / 300 <= 0.88


# Pairs


def test_paired_uses_only_what_both_have():
    before = np.array([[0.0, 0.2], [nan, 1.0], [0.5, 0.5], [nan, 1.0]])
    after = np.array([[0.5, nan], [0.0, 1.5], [0.5, 1.0], [2.0, nan]])
    e = paired(before, after)
    assert (e.n, e.dropped) == (3, 1) and e.mean == pytest.approx(np.mean([0.5, 0.5, 0.25]))
    with pytest.raises(UserError, match="same prompts"):
        paired(before, after[:2])


def test_pairing_is_narrower_than_two_samples():
    a = rng().normal(size=200)
    b = a + rng(1).normal(0, 0.1, 200) + 0.05
    e = paired(a, b)
    assert e.se < mean_ci(a).se / 5 and e.p is not None and e.p < 0.01 and e.low > 0


@pytest.mark.parametrize("n", [4, 8, 13])
def test_sign_flips_are_exact_for_few_prompts(n: int):
    d = rng(n).normal(0.5, 1, n)
    flips = [abs(np.dot(s, d)) >= abs(d.sum()) - 1e-12 for s in itertools.product((1, -1), repeat=n)]
    assert paired(np.zeros(n), d).p == pytest.approx(np.mean(flips))


def test_sign_flips_agree_with_scipy_for_many():
    d = rng().normal(0.15, 1, 120)
    theirs = scipy.stats.permutation_test(
        (d, np.zeros(120)), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True,
        n_resamples=10_000, rng=rng(),
    ).pvalue  # fmt: skip
    assert paired(np.zeros(120), d).p == pytest.approx(theirs, abs=0.02)
    assert paired(d, d).p == 1


@pytest.mark.parametrize("n", [2, 5, 30, 553, 10_000])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_mde_is_the_t_tests(n: int, power: float):
    d = mde(1.7, n, power=power) / 1.7
    bar, df, ncp = scipy.stats.t.ppf(0.975, n - 1), n - 1, d * math.sqrt(n)
    assert scipy.stats.nct.sf(bar, df, ncp) == pytest.approx(power, abs=1e-6)
    if n > 2:
        solve = pytest.importorskip("statsmodels.stats.power").TTestPower().solve_power
        assert d == pytest.approx(float(np.squeeze(solve(nobs=n, alpha=0.05, power=power))), rel=1e-4)


def test_mde_of_nothing_is_unknown():
    assert math.isnan(mde(1.0, 1)) and math.isnan(mde(nan, 9))
    assert paired(np.zeros(9), np.arange(9.0)).mde == pytest.approx(mde(np.arange(9).std(ddof=1), 9))


def test_mcnemar_is_statsmodels():
    theirs = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    before, after = (rng().random(150) < 0.5).astype(float), (rng(1).random(150) < 0.62).astype(float)
    table = [[((before == i) & (after == j)).sum() for j in (0, 1)] for i in (0, 1)]
    e = mcnemar(before, after)
    assert e.p == pytest.approx(theirs(table, exact=True).pvalue)
    assert e.mean == pytest.approx(after.mean() - before.mean())
    assert mcnemar(before, before).p == 1
    with pytest.raises(UserError, match="yes"):
        mcnemar(before, after * 0.5)


@pytest.mark.parametrize("p", [[0.04], [0.01, 0.01, 0.5], [0.9, 0.001, 0.02, 0.02, 0.3], [0.0, 1.0, 0.0]])
def test_holm_is_statsmodels(p: list[float]):
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_order_and_never_lowers(p: list[float]):
    q = holm([*p, nan])
    assert math.isnan(q.pop()) and q == holm(p)  # a missing test is not counted
    assert all(a <= b <= 1 for a, b in zip(p, q, strict=True))
    assert sorted(q) == [q[i] for i in np.argsort(p, kind="stable")]


# Verdicts


@pytest.mark.parametrize(
    "shift,spread,n,verdict",
    [
        (0.0, 0.05, 200, "same"),
        (0.01, 0.02, 200, "same"),  # not zero, and too small to matter
        (0.1, 0.1, 200, "better"),
        (-0.1, 0.1, 200, "worse"),
        (0.0, 1.0, 20, "cannot tell"),
        (0.0, 0.0, 20, "same"),
        (0.5, 0.0, 20, "better"),
        (0.0, 0.1, 1, "cannot tell"),
    ],
)
def test_verdicts(shift: float, spread: float, n: int, verdict: str):
    before = rng().random(n)
    noise = rng(1).normal(size=n)
    noise = (noise - noise.mean()) * spread
    assert equivalence(before, before + noise + shift, margin=0.03).verdict == verdict


def test_equivalence_is_statsmodels_tost():
    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    before, after = rng().normal(size=50), rng().normal(size=50) + rng(1).normal(0.05, 0.2, 50)
    e = equivalence(before, after, margin=0.1)
    assert e.p == pytest.approx(weightstats.ttost_paired(after, before, -0.1, 0.1)[0])


def test_a_reported_number_may_stand_for_before():
    after = rng().normal(0.9, 0.1, 400)
    e = equivalence(0.6, after, margin=0.05)
    assert e.verdict == "better" and e.difference.mean == pytest.approx(after.mean() - 0.6)
    assert equivalence(0.9, after, margin=0.05).verdict == "same"
    assert equivalence(0.9, after, margin=0.05, strata=[0, 1] * 200).difference.se == pytest.approx(
        mean_ci(after, strata=[0, 1] * 200).se
    )
    with pytest.raises(UserError, match="margin"):
        equivalence(0.9, after, margin=0)


# Seeds


def test_two_level_of_one_seed_is_one_level():
    x = rng().random(40)
    assert two_level([x]) == mean_ci(x)
    with pytest.raises(UserError, match="same prompts"):
        two_level([x, x[1:]])
    with pytest.raises(UserError):
        two_level([])


def test_two_level_counts_both_spreads():
    base = rng().normal(size=100)
    still = two_level([base, base, base])
    assert still.se == pytest.approx(mean_ci(base).se) and still.seeds == 3
    assert still.high - still.low == pytest.approx(mean_ci(base).high - mean_ci(base).low, rel=0.05)
    moved = two_level([base - 0.5, base, base + 0.5])
    assert moved.se == pytest.approx(math.sqrt(mean_ci(base).se ** 2 + 0.25 / 3))
    assert moved.high - moved.low > 4 * still.se
    holed = base.copy()
    holed[7] = nan
    assert two_level([base, holed, base]).dropped == 1


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_two_level_covers(spread: float):
    hits = 0
    for i in range(200):
        r = rng(i)
        base = r.normal(size=50)
        e = two_level([r.normal(0, spread) + base + r.normal(0, 0.3, 50) for _ in range(3)], resamples=500, seed=i)
        hits += e.low <= 0 <= e.high
    assert 0.89 <= hits / 200 <= 0.99


# Across tasks


def test_iqm_is_the_trimmed_mean():
    scores = rng().random((5, 6))
    e = iqm(scores)
    flat = np.sort(scores.ravel())
    assert e.mean == pytest.approx(flat[7:-7].mean()) and e.low < e.mean < e.high and e.n == 5
    spoiled = scores.copy()
    spoiled[0, 0] = 1e6  # one outlier does not move it far
    assert iqm(spoiled).mean < 1 and math.isnan(iqm(scores[:1]).low)
    with pytest.raises(UserError):
        iqm([[nan, 1.0]])


def test_probability_of_improvement_is_mann_whitney():
    x, y = rng().normal(0.7, 1, (6, 3)), rng(1).normal(0, 1, (5, 3))
    u = np.mean([scipy.stats.mannwhitneyu(x[:, k], y[:, k]).statistic / 30 for k in range(3)])
    e = probability_of_improvement(x, y)
    assert e.mean == pytest.approx(u) and e.low < u < e.high
    assert probability_of_improvement(x, x).mean == 0.5
    assert probability_of_improvement(y, x).mean == pytest.approx(1 - u)
    # the interval is that of the plain loop
    r, boot = rng(5), []
    for _ in range(800):
        pick = [(x[r.integers(0, 6, 6), k], y[r.integers(0, 5, 5), k]) for k in range(3)]
        boot.append(np.mean([(a[:, None] > b).mean() for a, b in pick]))
    assert (e.low, e.high) == pytest.approx(tuple(np.quantile(boot, [0.025, 0.975])), abs=0.04)
    with pytest.raises(UserError, match="same tasks"):
        probability_of_improvement(x, y[:, :2])


def test_an_estimate_is_plain_numbers():
    e = paired(rng().random(9), rng(1).random(9))
    assert isinstance(e, Estimate) and all(type(v) in (float, int) for v in vars(e).values())
    for other in (two_level([rng().random(9)] * 2), iqm(rng().random((3, 2))), mcnemar([0, 1, 1.0], [1, 1, 0.0])):
        assert all(type(v) in (float, int, type(None)) for v in vars(other).values())
