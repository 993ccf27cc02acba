"""Random draws by a counter: the numbers of a row depend on its key and their place, on nothing that was drawn before.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, doi 10.1145/2063384.2063405) maps a key of
64 bits and a counter of 128 bits to four words of 32 bits. So all rows are drawn at once, on any device, in any order and in
batches of any size. torch has the same generator with one key a row (torch.func._random), as a private part of its newest releases.

The same bits on every device: words are integer operations, and every float operation here is one of +, -, x, / and the square
root, which IEEE 754 rounds correctly, each a call of its own, so that no compiler fuses two. That is why normal numbers come
from the inverse of their distribution function as a rational function (Wichura, algorithm AS 241, Applied Statistics 37, 1988)
and not by Box and Muller, whose logarithm, sine and cosine differ in their last bits from library to library; the one
logarithm of AS 241 is computed here by the same five operations. A test compares a CUDA GPU with the CPU, where there is one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF  # 32 bits
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four words of every counter and key; all are int64 tensors of 32-bit numbers that broadcast.

    A product of two words wraps round in int64 as it would in uint64, so its upper half is the shifted product without the sign.
    """
    (a, b, c, d), (k0, k1) = counter, key
    for i in range(ROUNDS):
        p0, p1 = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, c = ((p1 >> 32) ^ b ^ (k0 + i * KEY_STEPS[0])) & MASK, ((p0 >> 32) ^ d ^ (k1 + i * KEY_STEPS[1])) & MASK
        b, d = p1, p0  # their lower halves; what lies above meets no product and is masked with it
    return a, b & MASK, c, d & MASK


def random_words(keys: Tensor, count: int, draw: int = 0, places: Tensor | None = None) -> Tensor:
    """(B, count) int64: uniform 32-bit words of B rows, on the keys' device.

    Args:
        keys: (B,) int64, all their 64 bits count.
        count: words of a row.
        draw: which draw of these keys; each gives other words.
        places: (B,) in 0, ..., 2^32 - 1, tells rows apart that share a key; None is 0.
    """
    key = keys.view(-1, 1)
    block = torch.arange(-(-count // 4), device=keys.device).view(1, -1)
    place = torch.zeros_like(key) if places is None else places.view(-1, 1)
    counter = block, torch.full_like(block, draw & MASK), place, torch.full_like(block, draw >> 32)
    return torch.stack(philox(counter, (key & MASK, key >> 32 & MASK)), -1).flatten(1)[:, :count]


def uniform(words: Tensor) -> Tensor:
    """float32 of the words' shape, uniform in [0, 1): the multiples of 2^-24."""
    return (words >> 8).float() * 2.0**-24


# Coefficients of AS 241 (PPND7): numerator and denominator by rising powers, of the centre and of a tail.
CENTRE = (
    (3.3871327179e0, 5.0434271938e1, 1.5929113202e2, 5.9109374720e1),
    (1.0, 1.7895169469e1, 7.8757757664e1, 6.7187563600e1),
)
TAIL = (1.4234372777e0, 2.7568153900e0, 1.3067284816e0, 1.7023821103e-1), (1.0, 7.3700164250e-1, 1.2021132975e-1)
ARTANH = tuple(1 / k for k in range(1, 11, 2))  # of z = f^2; for f < 0.172 what is left out is below 1e-9


def normal(words: Tensor) -> Tensor:
    """float32 of the words' shape, standard normal: the quantile at (word + 1/2) / 2^32, to float32's precision.

    The outermost quantiles, 6.34 on either side, stand for what lies beyond them, a share of 2^-32 each.
    """
    device, words = words.device, words.cpu() if words.device.type == "mps" else words  # Metal rounds in its own way
    q = (2 * words - MASK).float() * 2.0**-33  # p - 1/2
    # Both formulas for all: choosing the numbers of the tails would make the host wait for a GPU.
    centre = _ratio(CENTRE, 0.180625 - q * q) * q
    return torch.where(q.abs() > 0.425, torch.copysign(_tail(words), q), centre).to(device)


def _tail(words: Tensor) -> Tensor:
    """Sizes of the quantiles of words, right for those whose p is below 0.075 or above 0.925.

    With n / 2^33 the smaller of p and 1 - p, AS 241 asks for r = sqrt(-log(n / 2^33)), which is below 5. n = m 2^e, and
    log m = log(h) + 2 artanh((m - h) / (m + h)) with h^2 = 1/2.
    """
    m, e = torch.frexp((2 * torch.minimum(words, MASK - words) + 1).float())
    f = (m - math.sqrt(0.5)) / (m + math.sqrt(0.5))
    r = ((33.5 - e.float()) * math.log(2) - 2 * f * _polynomial(ARTANH, f * f)).sqrt()
    return _ratio(TAIL, r - 1.6)


def _ratio(coefficients: tuple[Sequence[float], Sequence[float]], x: Tensor) -> Tensor:
    return _polynomial(coefficients[0], x) / _polynomial(coefficients[1], x)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule; coefficients by rising powers."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value.mul_(x).add_(coefficient)
    return value


def permuted(count: int, rng: random.Random) -> Iterator[int]:
    """0, ..., count - 1 in random order, every order equally likely; each number is drawn when it is asked for.

    Fisher and Yates' shuffle whose array holds only what has moved: k numbers cost time and memory for k, whatever the count.
    """
    moved: dict[int, int] = {}
    for i in range(count):
        k = rng.randrange(i, count)
        yield moved.get(k, k)
        moved[k] = moved.pop(i, i)
