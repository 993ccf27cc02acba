"""Diversity and drift against closed forms and plain loops."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.stats.distances import cmmd, cmmd_ci, distances, paired, siblings, vendi

KINDS = ("cosine", "squared")
sets = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 7), st.integers(2, 5))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def one_distance(a: np.ndarray, b: np.ndarray, kind: str) -> float:
    if kind == "squared":
        return sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))
    dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))


def loop_cmmd(a: np.ndarray, b: np.ndarray, sigma: float = 10.0) -> float:
    """Three sums over all pairs, term by term; math.fsum, because the three nearly cancel."""
    u, v = ([row / math.sqrt(sum(t * t for t in row)) for row in m.tolist() and m] for m in (a, b))

    def mean(p: list[np.ndarray], q: list[np.ndarray]) -> float:
        terms = (math.expm1(-one_distance(x, y, "squared") / (2 * sigma**2)) for x in p for y in q)
        return math.fsum(terms) / (len(p) * len(q))

    return 1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v))


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_the_loop(kind):
    a, b = rng(1).normal(size=(4, 6)), rng(2).normal(size=(3, 6))
    want = [[one_distance(x, y, kind) for y in b] for x in a]
    assert np.allclose(distances(a, b, kind), want, rtol=1e-12)
    assert np.allclose(paired(a[:3], b, kind), np.diag(want), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_siblings_average_to_the_mean_pair(kind):
    x = rng().normal(size=(6, 5))
    pairs = [one_distance(x[i], x[j], kind) for i, j in itertools.combinations(range(6), 2)]
    assert siblings(x, kind).mean() == pytest.approx(np.mean(pairs), rel=1e-12)
    others = [one_distance(x[0], row, kind) for row in x[1:]]
    assert siblings(x, kind)[0] == pytest.approx(np.mean(others), rel=1e-12)
    assert np.isnan(siblings(x[:1], kind)).all() and siblings(x[:0], kind).shape == (0,)


def test_known_geometry():
    corners = np.eye(3, 4)
    assert np.allclose(distances(corners, corners, "cosine"), 1 - np.eye(3))
    assert np.allclose(distances(corners, corners, "squared"), 2 - 2 * np.eye(3))
    assert np.allclose(distances(corners, -5 * corners, "cosine"), 1 + np.eye(3))
    assert np.allclose(siblings(corners, "cosine"), 1)


@given(sets, st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_laws_of_a_distance(case, kind):
    seed, n, d = case
    x, y = rng(seed).normal(size=(n, d)), rng(seed + 1).normal(size=(n, d))
    assert (distances(x, y, kind) >= 0).all() and np.allclose(distances(x, y, kind), distances(y, x, kind).T)
    assert (paired(x, x, kind) == 0).all()
    turn = np.linalg.qr(rng(seed).normal(size=(d, d)))[0]
    assert np.allclose(distances(x @ turn, y @ turn, kind), distances(x, y, kind))
    assert np.allclose(distances(3 * x, y, "cosine"), distances(x, y, "cosine"))
    order = rng(seed).permutation(n)
    assert np.allclose(siblings(x[order], kind), siblings(x, kind)[order])


def test_float32_vectors_lose_nothing_to_their_type():
    """Two nearly equal images: 1 - <a, b> in float32 would be all rounding."""
    a = rng().normal(size=(1, 768)).astype(np.float32)
    b = a + np.float32(1e-4) * rng(1).normal(size=(1, 768)).astype(np.float32)
    u, v = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64)) for x in (a, b))
    assert paired(a, b, "cosine").item() == pytest.approx(float(np.square(u - v).sum() / 2), rel=1e-10)


def test_a_vector_without_direction_is_not_compared():
    assert np.isnan(distances(np.zeros((1, 3)), np.eye(3), "cosine")).all()
    with pytest.raises(UserError, match="images, numbers"):
        siblings(np.zeros(3), "squared")
    with pytest.raises(UserError, match="cannot be compared"):
        distances(np.eye(3), np.eye(4), "cosine")
    with pytest.raises(UserError, match="row by row"):
        paired(np.eye(3), np.eye(3)[:2], "squared")


# CMMD


def test_cmmd_is_the_triple_loop():
    a, b = rng(1).normal(size=(7, 4)), rng(2).normal(size=(5, 4)) + 0.5
    assert cmmd(a, b) == pytest.approx(loop_cmmd(a, b), rel=1e-9)
    assert cmmd(a, b, sigma=0.7) == pytest.approx(loop_cmmd(a, b, 0.7), rel=1e-9)


def test_cmmd_of_two_points_is_known():
    """k(x, x) + k(y, y) - 2 k(x, y) = 2 (1 - exp(-2 / 200)) for two orthogonal unit vectors."""
    assert cmmd([[2.0, 0]], [[0, 3.0]]) == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-12)
    assert cmmd(np.eye(3), np.eye(3)) == pytest.approx(0, abs=1e-12)
    assert math.isnan(cmmd(np.eye(3)[:0], np.eye(3)))


@given(sets)
@settings(max_examples=40, deadline=None)
def test_laws_of_cmmd(case):
    seed, n, d = case
    x, y = rng(seed).normal(size=(n, d)), rng(seed + 1).normal(size=(n + 2, d))
    assert cmmd(x, y) >= 0
    assert cmmd(x, y) == pytest.approx(cmmd(y, x), abs=1e-9)
    assert cmmd(x, x[rng(seed).permutation(n)]) == pytest.approx(0, abs=1e-9)
    assert cmmd(np.repeat(x, 2, 0), y) == pytest.approx(
        cmmd(x, y), abs=1e-9
    )  # a V-statistic sees the distribution only


def test_cmmd_is_biased_upwards_as_the_reference_code_is():
    """Two samples of one distribution: E V = (1/n + 1/m)(1 - E k), above 0 and falling with n."""
    d, repeats = 16, 60

    def mean(n: int) -> float:
        return float(
            np.mean([cmmd(rng(i).normal(size=(n, d)), rng(1000 + i).normal(size=(n, d))) for i in range(repeats)])
        )

    small, large = mean(20), mean(80)
    expected = 2 / 20 * 1000 * (1 - math.exp(-0.01))  # |x - y|^2 is about 2 for unit vectors of many numbers
    assert small == pytest.approx(expected, rel=0.05) and small / large == pytest.approx(4, rel=0.1)


def test_the_interval_resamples_prompts():
    """Every resample, written out: repeated prompts bring their rows again."""
    prompts, images, d = 6, 3, 4
    a, b = rng(1).normal(size=(prompts * images, d)), rng(2).normal(size=(prompts * images, d)) + 0.3
    clusters = [f"p{i // images}" for i in range(prompts * images)]
    found = cmmd_ci(a, b, clusters, resamples=200, seed=3)
    draws = rng(3).multinomial(prompts, np.full(prompts, 1 / prompts), 200)
    rows = [np.concatenate([np.arange(images) + images * p for p in np.repeat(np.arange(prompts), d)]) for d in draws]
    boot = np.array([cmmd(a[r], b[r]) for r in rows])
    assert found.mean == pytest.approx(cmmd(a, b), rel=1e-9) and found.n == prompts
    assert found.se == pytest.approx(boot.std(ddof=1), rel=1e-9)
    low, high = np.quantile(boot, [0.025, 0.975]) - (boot.mean() - found.mean)
    assert (found.low, found.high) == pytest.approx((max(0, low), high), rel=1e-9)


def test_prompts_may_stand_in_any_order_and_number():
    a, b = rng(1).normal(size=(20, 4)), rng(2).normal(size=(20, 4))
    clusters = rng(3).integers(0, 6, 20).tolist()
    order = np.argsort(np.array(clusters), kind="stable")
    base = cmmd_ci(a, b, clusters, resamples=100)
    moved = cmmd_ci(a[order], b[order], [clusters[i] for i in order], resamples=100)
    assert base.mean == pytest.approx(moved.mean, rel=1e-9) == pytest.approx(cmmd(a, b), rel=1e-9)
    assert base.low < base.mean < base.high
    assert base == cmmd_ci(a, b, clusters, resamples=100) != cmmd_ci(a, b, clusters, resamples=100, seed=1)


def test_no_drift_is_zero_with_no_width():
    a = rng().normal(size=(12, 4))
    same = cmmd_ci(a, a, [i // 2 for i in range(12)], resamples=50)
    assert (same.mean, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
    alone = cmmd_ci(a, -a, ["p"] * 12)
    assert alone.mean > 0 and math.isnan(alone.low) and alone.n == 1
    assert math.isnan(cmmd_ci(a[:0], a[:0], []).mean)
    with pytest.raises(UserError, match="one prompt a row"):
        cmmd_ci(a, a[:6], range(12))


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_the_interval_covers(shift: float):
    """95 % intervals for the expected CMMD over 150 worlds of 40 prompts, 2 images each; the prompt has an effect of its own."""

    def world(seed: int) -> tuple[np.ndarray, np.ndarray]:
        r = rng(seed)
        prompt = np.repeat(r.normal(size=(40, 6)), 2, 0)
        a, b = (prompt + 0.7 * r.normal(size=(80, 6)) for _ in range(2))
        return a, b + shift

    truth = np.mean([cmmd(*world(10_000 + i)) for i in range(800)])
    intervals = [cmmd_ci(*world(i), [j // 2 for j in range(80)], resamples=300) for i in range(150)]
    assert np.mean([e.low <= truth <= e.high for e in intervals]) >= 0.85


def test_two_thousand_images_take_seconds():
    a, b = (rng(i).normal(size=(2000, 768)).astype(np.float32) for i in range(2))
    start = time.perf_counter()
    cmmd_ci(a, b, [i // 4 for i in range(2000)])
    assert time.perf_counter() - start < 20


# Vendi


def test_vendi_counts_what_differs():
    assert vendi(np.eye(5)) == pytest.approx(5)
    assert vendi(np.ones((5, 3))) == pytest.approx(1)
    assert vendi(np.repeat(np.eye(3), 4, 0)) == pytest.approx(3)
    assert math.isnan(vendi(np.eye(3)[:0]))
    angle = 0.7
    c = math.cos(angle)
    p, q = (1 + c) / 2, (1 - c) / 2  # eigenvalues of [[1, c], [c, 1]] / 2
    assert vendi([[1, 0], [c, math.sin(angle)]]) == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)))


@given(sets)
@settings(max_examples=40, deadline=None)
def test_laws_of_vendi(case):
    seed, n, d = case
    x = rng(seed).normal(size=(n, d))
    value = vendi(x)
    assert 1 - 1e-9 <= value <= min(n, d) + 1e-9
    assert vendi(x[rng(seed).permutation(n)]) == pytest.approx(value)
    wide = vendi(np.pad(x, ((0, 0), (0, 10))))  # more numbers than images: the other Gram matrix
    assert wide == pytest.approx(value)
    assert vendi(np.repeat(x, 3, 0)) == pytest.approx(value)
