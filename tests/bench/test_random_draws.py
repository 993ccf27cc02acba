"""Draws by a counter: published words, the law of the numbers, one row the same in every company, and shuffles read in part."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import islice, pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtri
from torch import Tensor

from gpobench.bench.random_draws import normal, permuted, philox, random_words, uniform

KEYS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6, unique=True)
# counter, key, words: Random123's kat_vectors for philox4x32 with 10 rounds
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


# Words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_words_are_philoxs(counter: str, key: str, words: str) -> None:
    a, b, c, d = numbers(counter)
    k0, k1 = numbers(key)
    assert [f"{int(word):08x}" for word in philox((a, b, c, d), (k0, k1))] == words.split()


def written_out(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, which do not overflow."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (p1 >> 32) ^ b ^ k0, p1 % 2**32, (p0 >> 32) ^ d ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@given(keys=KEYS, count=st.integers(1, 9), draw=st.integers(0, 2**40), place=st.integers(0, 2**32 - 1))
def test_a_rows_words_follow_from_its_key_its_draw_and_its_place(
    keys: list[int], count: int, draw: int, place: int
) -> None:
    words = random_words(torch.tensor(keys), count, draw, torch.full((len(keys),), place))
    for key, row in zip(keys, words.tolist(), strict=True):
        blocks = [
            written_out([block, draw % 2**32, place, draw >> 32], [key % 2**32, key % 2**64 >> 32])
            for block in range(-(-count // 4))
        ]
        assert row == sum(blocks, [])[:count]


@given(keys=KEYS, order=st.randoms(use_true_random=False), count=st.integers(1, 9))
def test_a_row_is_the_same_in_every_batch_and_order(keys: list[int], order: random.Random, count: int) -> None:
    whole = random_words(torch.tensor(keys), count + 3)
    rows = list(range(len(keys)))
    order.shuffle(rows)
    assert torch.equal(random_words(torch.tensor(keys)[rows], count), whole[rows, :count])
    assert torch.equal(random_words(torch.tensor(keys[-1:]), count), whole[-1:, :count])


def test_keys_draws_places_and_words_give_independent_numbers() -> None:
    """Every word differs; numbers of neighbouring keys, draws, places and words are uncorrelated.

    20,000 pairs have a correlation below 5 / sqrt(20,000) = .036 but for one time in two million.
    """
    keys, n = torch.arange(100), 200
    tables = [random_words(keys, n), random_words(keys, n, 1), random_words(keys, n, 0, torch.ones_like(keys))]
    assert len(torch.stack(tables).unique()) > 3 * 100 * n - 10  # of 2^32 words a handful meets another by chance
    u = [uniform(table).numpy() for table in tables]
    neighbours = [(u[0], u[1]), (u[0], u[2]), (u[0][:-1], u[0][1:]), (u[0][:, :-1], u[0][:, 1:])]
    assert all(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.036 for a, b in neighbours)


def test_every_bit_of_a_word_is_fair() -> None:
    words = random_words(torch.tensor([3]), 40_000)[0].numpy()
    ones = (words[:, None] >> np.arange(32)) & 1
    assert (abs(ones.mean(0) - 0.5) < 5 * 0.5 / 200).all()  # five standard errors


# Numbers


def test_uniform_numbers_are_exact_multiples_below_one() -> None:
    words = torch.tensor([0, 255, 256, 2**32 - 1])
    assert uniform(words).tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


# Words in the middle, at the borders of AS 241's ranges, at the ends.
BORDERS = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, round(0.075 * 2**32), round(0.925 * 2**32)]


@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(BORDERS) | st.integers(0, 2**12), min_size=1, max_size=50))
def test_a_normal_number_is_the_quantile_to_float32s_precision(words: list[int]) -> None:
    drawn = normal(torch.tensor(words)).double().numpy()
    # The quantile of the nearer tail: p near 1 would lose its digits.
    tail = np.array([min(word, 2**32 - 1 - word) + 0.5 for word in words]) / 2**32
    exact = np.abs(ndtri(tail)) * np.sign(np.array(words) - 2**31 + 0.5)
    assert np.allclose(drawn, exact, rtol=1e-6, atol=0)


def test_normal_numbers_are_symmetric_and_rise_with_the_word() -> None:
    words = torch.cat([torch.arange(0, 2**32, 2**20), torch.tensor(BORDERS)]).sort().values
    drawn = normal(words)
    assert torch.equal(normal(2**32 - 1 - words), -drawn) and bool((drawn.diff() >= 0).all())
    assert bool(drawn.isfinite().all()) and math.isclose(float(drawn.max()), 6.338, abs_tol=1e-3)


def test_normal_numbers_come_from_operations_that_ieee_754_rounds() -> None:
    """The steps of AS 241 in exact rational arithmetic, rounded to float32 after each operation, give the same bits."""
    rounded = lambda x: Fraction(float(np.float32(float(x))))  # a float64 in between: exact enough for these words
    words = random_words(torch.tensor([5]), 40)[0]
    q = [rounded(Fraction(2 * int(word) - (2**32 - 1), 2**33)) for word in words]
    r = [rounded(rounded(0.180625) - rounded(x * x)) for x in q]

    def horner(coefficients: list[float], x: Fraction) -> Fraction:
        value = rounded(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = rounded(rounded(value * x) + rounded(coefficient))
        return value

    over = [3.3871327179e0, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1]
    under = [1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1]
    exact = [float(rounded(rounded(horner(over, b) / horner(under, b)) * a)) for a, b in zip(q, r, strict=True)]
    central = [abs(x) < Fraction(425, 1000) for x in q]
    assert sum(central) > 25
    drawn = normal(words).tolist()
    assert [x for x, keep in zip(drawn, central, strict=True) if keep] == [
        x for x, keep in zip(exact, central, strict=True) if keep
    ]


@pytest.mark.parametrize("rows", [1, 1000])
def test_numbers_have_their_law_within_a_row_and_between_rows(rows: int) -> None:
    """Kolmogorov and Smirnov's test of 20,000 numbers at fixed keys; four moments within five standard errors."""
    words = random_words(torch.arange(rows) + 17, 20_000 // rows)
    u, z = uniform(words).flatten().double().numpy(), normal(words).flatten().double().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3 and stats.kstest(z, "norm").pvalue > 1e-3
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        assert abs((z**power).mean() - moment) < 5 * (variance / len(z)) ** 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_bits() -> None:
    keys = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))
    here, there = random_words(keys, 4096, 3), random_words(keys.cuda(), 4096, 3)
    assert torch.equal(here, there.cpu()) and torch.equal(normal(here), normal(there).cpu())
    assert torch.equal(uniform(here), uniform(there).cpu())


# Shuffles


@given(count=st.integers(0, 300), seed=st.integers(), first=st.integers(0, 300))
def test_a_shuffle_has_every_number_once_and_begins_the_same_however_much_is_read(
    count: int, seed: int, first: int
) -> None:
    whole = list(permuted(count, random.Random(seed)))
    assert sorted(whole) == list(range(count))
    assert list(islice(permuted(count, random.Random(seed)), first)) == whole[:first]


@given(count=st.integers(10, 10**30), seed=st.integers())
def test_a_part_of_a_shuffle_costs_what_it_draws(count: int, seed: int) -> None:
    """A list of 10^30 numbers would not fit anywhere."""
    part = list(islice(permuted(count, random.Random(seed)), 10))
    assert len(set(part)) == 10 and min(part) >= 0 and max(part) < count


def test_every_order_is_equally_likely() -> None:
    rng = random.Random(0)
    seen = Counter(tuple(permuted(4, rng)) for _ in range(24_000))
    assert set(seen) == set(permutations(range(4)))
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3


def test_neighbours_of_a_large_shuffle_are_unrelated() -> None:
    drawn = list(islice(permuted(10**6, random.Random(1)), 5000))
    before, after = np.array(list(pairwise(drawn)), dtype=float).T
    assert abs(np.corrcoef(before, after)[0, 1]) < 5 / 5000**0.5
    assert stats.kstest(np.array(drawn) / 10**6, "uniform").pvalue > 1e-3
