"""The shared formulas against float64 references, the identities of group preference optimisation and finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpobench.bench.losses import (
    clipped,
    dpo,
    flow_error,
    gpo,
    implicit_accuracy,
    informative,
    kl_velocity,
    standardise,
    weighted_error,
)

LINKS: list[Any] = ["logsigmoid", "pairwise", "linear"]
every_link = pytest.mark.parametrize("link", LINKS)
nan = math.nan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors(p: int, g: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(p, g, seed=seed).abs().requires_grad_(), normal(p, g, seed=seed + 1).abs()


def grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]


# Advantages


def slow_standardise(reward: np.ndarray, std: str, eps: float) -> np.ndarray:
    """One group at a time, in numpy."""
    out = np.zeros_like(reward)
    everything = reward[np.isfinite(reward)]
    for row, to in zip(reward, out, strict=True):
        ok = np.isfinite(row)
        if ok.sum() < 2 or np.ptp(row[ok]) == 0:
            continue
        scale = {"group": row[ok].std() + eps, "global": everything.std() + eps, "none": 1.0}[std]
        to[ok] = (row[ok] - row[ok].mean()) / scale
    return out


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda p: st.integers(1, 5).flatmap(
            lambda g: st.lists(
                st.lists(st.sampled_from([nan, 0.0, 0.25, 1.0, -3.0, 26.1]), min_size=g, max_size=g),
                min_size=p, max_size=p,
            )
        )
    ),
    st.sampled_from(["group", "global", "none"]),
)  # fmt: skip
def test_standardise_is_the_slow_loop(rows: list[list[float]], std: Any):
    reward = torch.tensor(rows, dtype=torch.float64)
    got = standardise(reward, std)
    assert np.allclose(got.numpy(), slow_standardise(reward.numpy(), std, 1e-4), atol=1e-12)
    assert torch.allclose(got.sum(1), torch.zeros(len(rows), dtype=torch.float64), atol=1e-9)
    assert (got[~informative(reward)] == 0).all() and (got[reward.isnan()] == 0).all()


def test_informative():
    reward = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, nan], [nan, nan, 2.0], [nan] * 3, [0.3, 0.3, 0.30001]])
    assert informative(reward).tolist() == [False, True, False, False, True]
    assert standardise(torch.full((1, 7), 26.1)).eq(0).all()  # no rounding residue divided by the epsilon


def test_standardise_keeps_float32_and_raises_half():
    assert standardise(torch.rand(2, 3)).dtype == torch.float32
    assert standardise(torch.rand(2, 3).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="unknown std"):
        standardise(torch.rand(2, 3), "prompt")  # type: ignore


def test_binary_rewards_have_the_known_advantages():
    reward = torch.zeros(1, 16, dtype=torch.float64)
    reward[0, 0] = 1
    a = standardise(reward, eps=0.0)[0]
    assert float(a[0]) == pytest.approx(math.sqrt(15)) and float(a[1]) == pytest.approx(-1 / math.sqrt(15))


# PPO


@settings(max_examples=50, deadline=None)
@given(st.floats(0.5, 2), st.floats(-5, 5), st.sampled_from([1e-4, 0.1, 0.2]))
def test_clipped_is_the_four_cases(ratio: float, adv: float, eps: float):
    r, a = torch.tensor([ratio], dtype=torch.float64, requires_grad=True), torch.tensor([adv], dtype=torch.float64)
    loss = clipped(r, a, eps)
    assert float(loss.detach()) == pytest.approx(-min(adv * ratio, adv * min(max(ratio, 1 - eps), 1 + eps)))
    outside = (adv > 0 and ratio > 1 + eps) or (adv < 0 and ratio < 1 - eps)
    assert float(grad(loss, r)) == pytest.approx(0 if outside else -adv)


# Errors


def test_errors_are_means_in_float32():
    v, target = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    assert torch.allclose(flow_error(v, target), ((v - target) ** 2).mean((1, 2)))
    assert flow_error(v.bfloat16(), target.bfloat16()).dtype == torch.float32
    live, ref = v.clone().requires_grad_(), target.clone().requires_grad_()
    kl_velocity(live, ref).sum().backward()
    assert ref.grad is None and live.grad is not None and torch.allclose(live.grad, 2 * (v - target) / 8)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(weighted_error(flow_error(live, target), weight).sum(), weight, allow_unused=True)[0]
    assert torch.allclose(weighted_error(flow_error(v, target), 2 * weight), 2 * flow_error(v, target))


# DPO


def test_dpo_is_its_formula_and_its_gradient():
    w, l = errors(1, 5, 0), errors(1, 5, 2)
    loss = dpo(w[0][0], w[1][0], l[0][0], l[1][0], 20.0)
    u = -10.0 * ((w[0] - w[1]) - (l[0] - l[1]))[0]
    assert torch.allclose(loss, (1 + (-u).exp()).log())
    assert torch.allclose(grad(loss, w[0])[0], torch.sigmoid(-u) * 10)


# GPO


@every_link
@pytest.mark.parametrize("gap_weight", [True, False])
def test_gpo_is_its_formula(link: Any, gap_weight: bool):
    (live, ref), reward, beta = errors(3, 5), normal(3, 5, seed=7), 4.0
    a = standardise(reward)
    got = gpo(a, live, ref, beta, link, gap_weight=gap_weight)
    for p in range(3):
        s, adv = (live - ref)[p].tolist(), a[p].tolist()
        if link == "logsigmoid":
            u = -(beta / 5) * sum(x * y for x, y in zip(adv, s, strict=True))
            want = math.log1p(math.exp(-u)) / beta
        elif link == "linear":
            want = sum(x * y for x, y in zip(adv, s, strict=True)) / 5
        else:
            want = 0.0
            for i, j in itertools.permutations(range(5), 2):
                if adv[i] > adv[j]:
                    u = -(beta / 2) * (s[i] - s[j])
                    want += (adv[i] - adv[j] if gap_weight else 1) * math.log1p(math.exp(-u)) / beta
            want *= 2 / (5 * 4)
        assert float(got[p].detach()) == pytest.approx(want)


@every_link
@pytest.mark.parametrize("gap_weight", [True, False])
def test_gpo_gradients_match_finite_differences(link: Any, gap_weight: bool):
    (live, ref), a = errors(2, 4), standardise(normal(2, 4, seed=7))
    torch.autograd.gradcheck(lambda e: gpo(a, e, ref, 3.0, link, gap_weight=gap_weight), (live,))


@pytest.mark.parametrize("beta", [1.0, 100.0, 5000.0])
def test_two_members_are_diffusion_dpo(beta: float):
    (live, ref), reward = errors(6, 2), normal(6, 2, seed=7)
    a = standardise(reward, eps=0.0)
    rows, w, l = torch.arange(6), reward.argmax(1), reward.argmin(1)
    pair = dpo(live[rows, w], ref[rows, w], live[rows, l], ref[rows, l], beta)
    for got in (gpo(a, live, ref, beta), gpo(a, live, ref, beta, "pairwise", gap_weight=False)):
        assert torch.allclose(got, pair / beta, atol=1e-6)
        assert torch.allclose(grad(got, live), grad(pair, live) / beta, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(0.1, 50), st.floats(-20, 20), st.sampled_from(LINKS), st.integers(0, 2**31))
def test_affine_rewards_change_nothing(g: int, scale: float, offset: float, link: Any, seed: int):
    (live, ref), reward = errors(2, g, seed), normal(2, g, seed=seed + 7)
    one = gpo(standardise(reward, eps=0.0), live, ref, 5.0, link)
    two = gpo(standardise(scale * reward + offset, eps=0.0), live, ref, 5.0, link)
    assert torch.allclose(one, two, rtol=1e-6)


@every_link
def test_the_order_of_members_changes_nothing(link: Any):
    (live, ref), a, order = errors(3, 6), standardise(normal(3, 6, seed=7)), torch.tensor([3, 1, 5, 0, 2, 4])
    one, two = gpo(a, live, ref, 5.0, link), gpo(a[:, order], live[:, order], ref[:, order], 5.0, link)
    assert torch.allclose(one, two)
    assert torch.allclose(grad(one, live), grad(two, live))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_all_pairs_are_one_weighted_sum(g: int, seed: int):
    """sum_{i<j} (A_i - A_j)(s_i - s_j) = G sum_i A_i s_i for standardised A."""
    a, s = standardise(normal(1, g, seed=seed))[0], normal(g, seed=seed + 1)
    pairs = sum((a[i] - a[j]) * (s[i] - s[j]) for i in range(g) for j in range(i + 1, g))
    assert float(pairs) == pytest.approx(float(g * (a * s).sum()), abs=1e-9)


@pytest.mark.parametrize("beta", [0.5, 10.0, 1000.0])
def test_at_the_start_linear_is_twice_logsigmoid_and_pairwise_agrees(beta: float):
    """At s = 0 the gradients are A / G, A / (2 G) and A / (2 (G - 1)), whatever beta."""
    live, g = torch.rand(2, 5, dtype=torch.float64).requires_grad_(), 5
    a = standardise(normal(2, g, seed=7))
    at = {link: grad(gpo(a, live, live.detach(), beta, link), live) for link in LINKS}
    assert torch.allclose(at["linear"], a / g)
    assert torch.allclose(at["linear"], 2 * at["logsigmoid"])
    assert torch.allclose(at["pairwise"], a / (2 * (g - 1)))  # sum_j (A_i - A_j) = G A_i
    assert torch.allclose(gpo(a, live, live.detach(), beta) * beta, torch.full((2,), math.log(2), dtype=torch.float64))


@every_link
@pytest.mark.parametrize("gap_weight", [True, False])
def test_a_group_without_spread_has_no_gradient(link: Any, gap_weight: bool):
    live, ref = errors(3, 4)
    reward = torch.tensor([[0.3] * 4, [nan, nan, nan, 1.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    got = grad(gpo(standardise(reward), live, ref, 100.0, link, gap_weight=gap_weight), live)
    assert (got[:2] == 0).all() and (got[2] != 0).any()


def test_a_missing_reward_is_no_rank():
    live, ref = errors(1, 3)
    reward = torch.tensor([[0.0, nan, 1.0]], dtype=torch.float64)
    got = gpo(standardise(reward), live, ref, 5.0, "pairwise", gap_weight=False, known=reward.isfinite())
    pair = dpo(live[:, 2], ref[:, 2], live[:, 0], ref[:, 0], 5.0)
    assert torch.allclose(got, pair / 5 / 3)  # one pair of three
    assert (grad(got, live)[0, 1] == 0).all()


def test_one_sigmoid_bounds_the_pairs_from_below():
    """Jensen: -log sigmoid is convex, so the group loss of the mean margin is at most the pairs' mean loss."""
    (live, ref), reward = errors(4, 6), normal(4, 6, seed=7)
    a = standardise(reward)
    gap = (a[:, :, None] - a[:, None, :]).clamp(min=0)
    total, s = gap.sum((1, 2)), live - ref
    margin = (gap * (s[:, :, None] - s[:, None, :])).sum((1, 2)) / total
    pairs = gpo(a, live, ref, 6.0, "pairwise") * 6 * 5 / 2 / total * 6.0
    assert (torch.log1p((3.0 * margin).exp()) <= pairs + 1e-12).all()


def test_large_beta_stays_finite_in_half_precision():
    live, ref = (x.detach().bfloat16() for x in errors(2, 4))
    for link in LINKS:
        got = gpo(standardise(torch.rand(2, 4)), live, ref, 1e4, link)
        assert got.isfinite().all() and got.dtype == torch.float32


def test_wrong_words_are_refused():
    live, ref = errors(1, 2)
    with pytest.raises(ValueError, match="unknown link"):
        gpo(ref, live, ref, 1.0, "hinge")  # type: ignore
    with pytest.raises(ValueError, match="positive"):
        gpo(ref, live, ref, 0.0)


def test_implicit_accuracy_counts_ordered_pairs():
    reward = torch.tensor([[1.0, 0.0, nan], [0.5, 0.5, 0.0]])
    ref = torch.zeros(2, 3)
    live = torch.tensor([[0.0, 1.0, 9.0], [0.0, 2.0, 1.0]])
    assert float(implicit_accuracy(reward, live, ref)) == pytest.approx(2 / 3)
    assert float(implicit_accuracy(reward, ref, ref)) == 0.5
    assert implicit_accuracy(torch.ones(2, 3), live, ref).isnan()
