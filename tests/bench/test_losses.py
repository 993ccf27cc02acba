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
    best_of_group,
    clipped_surrogate,
    dgpo,
    diffusion_nft,
    dpo,
    flow_error,
    gpo,
    guard_log_ratio,
    implicit_accuracy,
    informative,
    kl_velocity,
    likelihood_weights,
    log_likelihood_proxy,
    optimality_probability,
    standardise,
    weighted_error,
)

LOSS_TYPES: list[Any] = ["logsigmoid", "pairwise", "linear"]
every_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)
nan = math.nan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors(p: int, g: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(p, g, seed=seed).abs().requires_grad_(), normal(p, g, seed=seed + 1).abs()


def grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]


# Advantages


def slow_standardise(reward: np.ndarray, std: str, eps: float, ddof: int = 0) -> np.ndarray:
    """One group at a time, in numpy."""
    out = np.zeros_like(reward)
    everything = reward[np.isfinite(reward)]
    for row, to in zip(reward, out, strict=True):
        ok = np.isfinite(row)
        if ok.sum() < 2 or np.ptp(row[ok]) == 0:
            continue
        scale = {"group": row[ok].std(ddof=ddof) + eps, "global": everything.std(ddof=ddof) + eps, "none": 1.0}[std]
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
    st.sampled_from(["group", "global", "none"]), st.sampled_from([(1e-4, 0), (1e-8, 1)]),
)  # fmt: skip
def test_standardise_is_the_slow_loop(rows: list[list[float]], std: Any, guard: tuple[float, int]):
    reward = torch.tensor(rows, dtype=torch.float64)
    got = standardise(reward, std, *guard)
    assert np.allclose(got.numpy(), slow_standardise(reward.numpy(), std, *guard), atol=1e-12)
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
    loss = clipped_surrogate(r, a, eps)
    assert float(loss.detach()) == pytest.approx(-min(adv * ratio, adv * min(max(ratio, 1 - eps), 1 + eps)))
    outside = (adv > 0 and ratio > 1 + eps) or (adv < 0 and ratio < 1 - eps)
    assert float(grad(loss, r)) == pytest.approx(0 if outside else -adv)


@pytest.mark.parametrize("std", [0.006, 0.7])
def test_guarded_is_the_centred_and_scaled_log_ratio(std: float):
    """arXiv 2510.22319: std (log rho + mean (mu_then - mu)^2 / (2 std^2)), one transition at a time."""
    old, policy, eps = normal(4, 2, 3), normal(4, 2, 3, seed=1).requires_grad_(), normal(4, 2, 3, seed=2)
    widths = std * torch.tensor([0.5, 1, 2, 3], dtype=torch.float64).view(4, 1, 1)
    to = (old + widths * eps).requires_grad_()
    got = guard_log_ratio(policy, old, to, widths)
    for i in range(4):
        s = float(widths[i])
        log_ratio = (((to[i] - old[i]) ** 2 - (to[i] - policy[i]) ** 2) / (2 * s**2)).mean()
        expected = s * (log_ratio + ((old[i] - policy[i]) ** 2).mean() / (2 * s**2))
        assert float(got[i].detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
        assert torch.equal(
            guard_log_ratio(policy[i : i + 1], old[i : i + 1], to[i : i + 1], widths[i : i + 1]), got[i : i + 1]
        )
    assert torch.allclose(grad(got, policy), eps / 6)  # whatever the width: the scale is gone
    assert not guard_log_ratio(policy, policy, to, widths).any()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(guard_log_ratio(policy.detach(), old, to, widths).sum(), to)  # what was drawn is a constant


def test_guarded_raises_half_precision():
    half = normal(3, 5).to(torch.bfloat16)
    assert guard_log_ratio(half, half + 1, half, torch.ones(3, 1)).dtype == torch.float32


# Errors


def test_errors_are_means_in_float32():
    v, target = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    assert torch.allclose(flow_error(v, target), ((v - target) ** 2).mean((1, 2)))
    assert flow_error(v.bfloat16(), target.bfloat16()).dtype == torch.float32
    policy, ref = v.clone().requires_grad_(), target.clone().requires_grad_()
    kl_velocity(policy, ref).sum().backward()
    assert ref.grad is None and policy.grad is not None and torch.allclose(policy.grad, 2 * (v - target) / 8)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(weighted_error(flow_error(policy, target), weight).sum(), weight, allow_unused=True)[
        0
    ]
    assert torch.allclose(weighted_error(flow_error(v, target), 2 * weight), 2 * flow_error(v, target))


# DPO


def test_dpo_is_its_formula_and_its_gradient():
    w, l = errors(1, 5, 0), errors(1, 5, 2)
    loss = dpo(w[0][0], w[1][0], l[0][0], l[1][0], 20.0)
    u = -10.0 * ((w[0] - w[1]) - (l[0] - l[1]))[0]
    assert torch.allclose(loss, (1 + (-u).exp()).log())
    assert torch.allclose(grad(loss, w[0])[0], torch.sigmoid(-u) * 10)


# GPO


@every_loss_type
@pytest.mark.parametrize("margin_weight", [True, False])
def test_gpo_is_its_formula(loss_type: Any, margin_weight: bool):
    (policy, ref), reward, beta = errors(3, 5), normal(3, 5, seed=7), 4.0
    a = standardise(reward)
    got = gpo(a, policy, ref, beta, loss_type, margin_weight=margin_weight)
    for p in range(3):
        s, adv = (policy - ref)[p].tolist(), a[p].tolist()
        if loss_type == "logsigmoid":
            u = -(beta / 5) * sum(x * y for x, y in zip(adv, s, strict=True))
            want = math.log1p(math.exp(-u)) / beta
        elif loss_type == "linear":
            want = sum(x * y for x, y in zip(adv, s, strict=True)) / 5
        else:
            want = 0.0
            for i, j in itertools.permutations(range(5), 2):
                if adv[i] > adv[j]:
                    u = -(beta / 2) * (s[i] - s[j])
                    want += (adv[i] - adv[j] if margin_weight else 1) * math.log1p(math.exp(-u)) / beta
            want *= 2 / (5 * 4)
        assert float(got[p].detach()) == pytest.approx(want)


@every_loss_type
@pytest.mark.parametrize("margin_weight", [True, False])
def test_gpo_gradients_match_finite_differences(loss_type: Any, margin_weight: bool):
    (policy, ref), a = errors(2, 4), standardise(normal(2, 4, seed=7))
    torch.autograd.gradcheck(lambda e: gpo(a, e, ref, 3.0, loss_type, margin_weight=margin_weight), (policy,))


@pytest.mark.parametrize("beta", [1.0, 100.0, 5000.0])
def test_two_members_are_diffusion_dpo(beta: float):
    (policy, ref), reward = errors(6, 2), normal(6, 2, seed=7)
    a = standardise(reward, eps=0.0)
    rows, w, l = torch.arange(6), reward.argmax(1), reward.argmin(1)
    pair = dpo(policy[rows, w], ref[rows, w], policy[rows, l], ref[rows, l], beta)
    for got in (gpo(a, policy, ref, beta), gpo(a, policy, ref, beta, "pairwise", margin_weight=False)):
        assert torch.allclose(got, pair / beta, atol=1e-6)
        assert torch.allclose(grad(got, policy), grad(pair, policy) / beta, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(0.1, 50), st.floats(-20, 20), st.sampled_from(LOSS_TYPES), st.integers(0, 2**31))
def test_affine_rewards_change_nothing(g: int, scale: float, offset: float, loss_type: Any, seed: int):
    (policy, ref), reward = errors(2, g, seed), normal(2, g, seed=seed + 7)
    one = gpo(standardise(reward, eps=0.0), policy, ref, 5.0, loss_type)
    two = gpo(standardise(scale * reward + offset, eps=0.0), policy, ref, 5.0, loss_type)
    assert torch.allclose(one, two, rtol=1e-6)


@every_loss_type
def test_the_order_of_members_changes_nothing(loss_type: Any):
    (policy, ref), a, order = errors(3, 6), standardise(normal(3, 6, seed=7)), torch.tensor([3, 1, 5, 0, 2, 4])
    one, two = gpo(a, policy, ref, 5.0, loss_type), gpo(a[:, order], policy[:, order], ref[:, order], 5.0, loss_type)
    assert torch.allclose(one, two)
    assert torch.allclose(grad(one, policy), grad(two, policy))


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
    policy, g = torch.rand(2, 5, dtype=torch.float64).requires_grad_(), 5
    a = standardise(normal(2, g, seed=7))
    at = {loss_type: grad(gpo(a, policy, policy.detach(), beta, loss_type), policy) for loss_type in LOSS_TYPES}
    assert torch.allclose(at["linear"], a / g)
    assert torch.allclose(at["linear"], 2 * at["logsigmoid"])
    assert torch.allclose(at["pairwise"], a / (2 * (g - 1)))  # sum_j (A_i - A_j) = G A_i
    assert torch.allclose(
        gpo(a, policy, policy.detach(), beta) * beta, torch.full((2,), math.log(2), dtype=torch.float64)
    )


@every_loss_type
@pytest.mark.parametrize("margin_weight", [True, False])
def test_a_group_without_spread_has_no_gradient(loss_type: Any, margin_weight: bool):
    policy, ref = errors(3, 4)
    reward = torch.tensor([[0.3] * 4, [nan, nan, nan, 1.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    got = grad(gpo(standardise(reward), policy, ref, 100.0, loss_type, margin_weight=margin_weight), policy)
    assert (got[:2] == 0).all() and (got[2] != 0).any()


def test_a_missing_reward_is_no_rank():
    policy, ref = errors(1, 3)
    reward = torch.tensor([[0.0, nan, 1.0]], dtype=torch.float64)
    got = gpo(standardise(reward), policy, ref, 5.0, "pairwise", margin_weight=False, scored=reward.isfinite())
    pair = dpo(policy[:, 2], ref[:, 2], policy[:, 0], ref[:, 0], 5.0)
    assert torch.allclose(got, pair / 5 / 3)  # one pair of three
    assert (grad(got, policy)[0, 1] == 0).all()


def test_one_sigmoid_bounds_the_pairs_from_below():
    """Jensen: -log sigmoid is convex, so the group loss of the mean margin is at most the pairs' mean loss."""
    (policy, ref), reward = errors(4, 6), normal(4, 6, seed=7)
    a = standardise(reward)
    gap = (a[:, :, None] - a[:, None, :]).clamp(min=0)
    total, s = gap.sum((1, 2)), policy - ref
    margin = (gap * (s[:, :, None] - s[:, None, :])).sum((1, 2)) / total
    pairs = gpo(a, policy, ref, 6.0, "pairwise") * 6 * 5 / 2 / total * 6.0
    assert (torch.log1p((3.0 * margin).exp()) <= pairs + 1e-12).all()


def test_large_beta_stays_finite_in_half_precision():
    policy, ref = (x.detach().bfloat16() for x in errors(2, 4))
    for loss_type in LOSS_TYPES:
        got = gpo(standardise(torch.rand(2, 4)), policy, ref, 1e4, loss_type)
        assert got.isfinite().all() and got.dtype == torch.float32


def test_wrong_words_are_refused():
    policy, ref = errors(1, 2)
    with pytest.raises(ValueError, match="unknown loss_type"):
        gpo(ref, policy, ref, 1.0, "hinge")  # type: ignore
    with pytest.raises(ValueError, match="positive"):
        gpo(ref, policy, ref, 0.0)


def test_implicit_accuracy_counts_ordered_pairs():
    reward = torch.tensor([[1.0, 0.0, nan], [0.5, 0.5, 0.0]])
    ref = torch.zeros(2, 3)
    policy = torch.tensor([[0.0, 1.0, 9.0], [0.0, 2.0, 1.0]])
    assert float(implicit_accuracy(reward, policy, ref)) == pytest.approx(2 / 3)
    assert float(implicit_accuracy(reward, ref, ref)) == 0.5
    assert implicit_accuracy(torch.ones(2, 3), policy, ref).isnan()


# Advantage weighted matching


FORMS: list[Any] = ["uniform", "t", "t2", "huber", "ghuber"]


@given(st.sampled_from(FORMS), st.floats(0.0, 50.0), st.floats(0.01, 1.0), st.sampled_from([0.1, 0.25, 0.5]))
def test_fits_are_their_formulas(form: Any, d: float, t: float, p: float):
    got = log_likelihood_proxy(torch.tensor([d], dtype=torch.float64), torch.tensor([t], dtype=torch.float64), form, p)
    want = {
        "uniform": -d,
        "t": -t * d,
        "t2": -(t**2) * d,
        "huber": -t * (math.sqrt(d + 1e-10) - 1e-5),
        "ghuber": -(t / p) * ((d + 1e-10) ** p - 1e-10**p),
    }
    assert float(got) == pytest.approx(want[form], abs=1e-12)
    assert float(got) <= 1e-12  # 0 where the error is 0, below it elsewhere


def test_ghuber_weighs_an_error_by_its_power():
    """The gradient on d is -t d^(p - 1), finite at d = 0; p = 1/2 is twice the huber form's, p = 1 the t form's."""
    d, t = torch.tensor([1e-3, 0.2, 3.0], dtype=torch.float64, requires_grad=True), torch.tensor([0.2, 0.9, 1.0])
    for p in (0.25, 0.5, 1.0):
        assert torch.allclose(
            grad(log_likelihood_proxy(d, t, "ghuber", p), d), -t.double() * d.detach() ** (p - 1), rtol=1e-5
        )
    assert torch.allclose(log_likelihood_proxy(d, t, "ghuber", 0.5), 2 * log_likelihood_proxy(d, t, "huber"))
    assert torch.allclose(log_likelihood_proxy(d, t, "ghuber", 1.0), log_likelihood_proxy(d, t, "t"))
    zero = torch.zeros(1, requires_grad=True)
    assert all(grad(log_likelihood_proxy(zero, torch.ones(1), form), zero).isfinite().all() for form in FORMS)
    assert log_likelihood_proxy(d.bfloat16(), t).dtype == torch.float32
    with pytest.raises(ValueError, match="unknown form"):
        log_likelihood_proxy(d, t, "cauchy")  # type: ignore


# DiffusionNFT


@given(st.floats(0.0, 1.0), st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 2**31))
def test_reflected_is_its_closed_form_where_nothing_is_normalised(r: float, b: float, seed: int):
    """r l(v+) + (1 - r) l(v-) = b^2 |v - [v_old + (a / b)(v* - v_old)]|^2 + const, a = 2 r - 1 (a derivation)."""
    policy, old, target = (normal(1, 12, seed=seed + i) for i in range(3))
    a, one = 2 * r - 1, torch.ones(1, dtype=torch.float64)

    def side(estimate: Tensor) -> Tensor:
        """What `diffusion_nft` makes of one side, its weight taken out again."""
        return diffusion_nft(estimate, estimate, target, one) * (estimate - target).detach().abs().mean(1)

    def two_sides(v: Tensor) -> Tensor:
        return r * side(old + b * (v - old)) + (1 - r) * side(old - b * (v - old))

    def closed(v: Tensor) -> Tensor:
        return b**2 * ((v - (old + (a / b) * (target - old))) ** 2).mean(1)

    policy.requires_grad_()
    assert torch.allclose(grad(two_sides(policy), policy), grad(closed(policy), policy), atol=1e-9)
    constants = [float((two_sides(v) - closed(v)).detach()) for v in (policy, policy + 1, old)]
    assert constants == pytest.approx([constants[0]] * 3, abs=1e-9)
    start = old.clone().requires_grad_()
    assert torch.allclose(grad(two_sides(start), start), -2 * a * b * (target - old) / 12, atol=1e-9)


def test_reflected_divides_by_a_constant_mean_gap():
    plus, minus, x0 = normal(3, 2, 5, seed=1), normal(3, 2, 5, seed=2), normal(3, 2, 5, seed=3)
    plus.requires_grad_()
    good = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)
    got = diffusion_nft(plus, minus, x0, good)
    for n in range(3):
        sides = [(side[n] - x0[n]).detach().numpy() for side in (plus, minus)]
        each = [(gap**2).mean() / np.abs(gap).mean() for gap in sides]
        assert float(got[n].detach()) == pytest.approx(float(good[n]) * each[0] + float(1 - good[n]) * each[1])
        expected = float(good[n]) * 2 * sides[0] / 10 / np.abs(sides[0]).mean()
        assert np.allclose(grad(got[n], plus)[n].numpy(), expected)
    same = x0.clone().requires_grad_()
    assert grad(diffusion_nft(same, same, x0, good), same).eq(0).all()  # no division by 0 at a perfect estimate


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=6), st.sampled_from([1.0, 5.0]))
def test_goodness_is_a_probability(advantages: list[float], bound: float):
    a = torch.tensor(advantages, dtype=torch.float64)
    r = optimality_probability(a, bound)
    assert torch.allclose(r, torch.tensor([min(1.0, max(0.0, x / (2 * bound) + 0.5)) for x in advantages]).double())
    assert torch.allclose(optimality_probability(-a, bound), 1 - r) and ((r >= 0) & (r <= 1)).all()
    assert float(optimality_probability(torch.zeros(()))) == 0.5


# SFT and reward-weighted regression


def rewards(values: list[float]) -> Any:
    group = st.lists(st.sampled_from(values), min_size=4, max_size=4)
    return st.lists(group, min_size=1, max_size=3)


@given(rewards([nan, 0.0, 0.25, 1.0, -3.0, 26.1]), st.sampled_from([0.01, 1.0, 30.0]))
def test_likelihood_weights_are_a_softmax_of_mean_one(rows: list[list[float]], temperature: float):
    got = likelihood_weights(torch.tensor(rows, dtype=torch.float64), temperature)
    for row, weight in zip(rows, got.tolist(), strict=True):
        known = [r for r in row if not math.isnan(r)]
        whole = sum(math.exp((r - max(known)) / temperature) for r in known)
        want = [0 if math.isnan(r) else len(known) * math.exp((r - max(known)) / temperature) / whole for r in row]
        assert weight == pytest.approx(want, rel=1e-9, abs=1e-12)
        assert sum(weight) == pytest.approx(len(known))


def test_likelihood_weights_at_the_ends_of_the_scale():
    reward = torch.tensor([[0.0, 1.0, nan, 1.0]])
    assert torch.allclose(likelihood_weights(reward, 1e-3), torch.tensor([[0, 1.5, 0, 1.5]]))  # the best only: SFT
    assert torch.allclose(likelihood_weights(reward, 1e6), torch.tensor([[1.0, 1, 0, 1]]), atol=1e-5)  # all alike
    assert torch.equal(likelihood_weights(torch.full((1, 3), nan), 1.0), torch.zeros(1, 3))
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="positive"):
            likelihood_weights(reward, bad)


@given(rewards([nan, 0.0, 1.0, -3.0]))
def test_best_marks_the_maximum_and_its_ties(rows: list[list[float]]):
    got = best_of_group(torch.tensor(rows, dtype=torch.float64)).tolist()
    for row, marks in zip(rows, got, strict=True):
        known = [r for r in row if not math.isnan(r)]
        assert marks == [bool(known) and r == max(known) for r in row]


# DGPO


@pytest.mark.parametrize("beta", [0.5, 100.0, 5000.0])
def test_without_a_clip_dgpo_has_the_gradient_of_gpo(beta: float):
    (policy, ref), a, g = errors(3, 5), standardise(normal(3, 5, seed=7)), 5
    loss = dgpo(a, policy, ref, beta)
    assert torch.allclose(grad(loss, policy), grad(gpo(a, policy, ref, beta), policy))
    u = beta / g * (a * (policy - ref)).sum(1)
    assert torch.allclose(loss, (torch.sigmoid(u)[:, None] * a * policy).mean(1))  # its code's value is another
    same = dgpo(a, policy, ref, beta, old=ref, clip=0.0), dgpo(a, policy, ref, beta, old=policy.detach(), clip=1e-3)
    assert all(torch.equal(grad(one, policy), grad(loss, policy)) for one in same)  # no clip, or no move


def test_dgpo_holds_constant_whoever_has_moved_far_enough():
    """Ratios exp(old - policy) of 1 +- 0.02 against a clip of 0.01: liked and likelier, or disliked and less likely."""
    policy = torch.full((1, 6), 1.0, dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([[1.02, 1.005, 0.98, 0.98, 0.995, 1.02]], dtype=torch.float64)
    a = torch.tensor([[1.0, 1, 1, -1, -1, -1]], dtype=torch.float64)
    loss = dgpo(a, policy, policy.detach(), 10.0, old=policy.detach() + ratio.log(), clip=0.01)
    assert (grad(loss, policy) != 0).tolist() == [[False, True, True, False, True, True]]
    assert float(loss.detach()) == pytest.approx(
        float(dgpo(a, policy, policy.detach(), 10.0).detach())
    )  # the value stays


def test_dgpo_ignores_groups_without_spread_and_refuses_no_beta():
    policy, ref = errors(2, 4)
    reward = torch.tensor([[0.3] * 4, [nan, 0.0, 1.0, 0.5]], dtype=torch.float64)
    got = grad(dgpo(standardise(reward), policy, ref, 10.0), policy)
    assert (got[0] == 0).all() and got[1, 0] == 0 and (got[1, 1:3] != 0).all()
    half = dgpo(standardise(torch.rand(2, 4)), policy.detach().bfloat16(), ref.bfloat16(), 1e4)
    assert half.isfinite().all() and half.dtype == torch.float32
    with pytest.raises(ValueError, match="positive"):
        dgpo(ref, policy, ref, 0.0)
