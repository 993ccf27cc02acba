"""The listwise loss and its lists: golden values, float64 loops, and the identities that tie RankDPO, OP-GFN, GDRO and DPO together."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpobench.bench.losses import dpo, first_place, listwise, random_pairs, ranked_pairs, ranked_suffixes

nan = math.nan


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_by_pair(reward: Tensor) -> dict[tuple[int, int], float]:
    """(better, worse), counted from 1 -> RankDPO's weight of the pair."""
    lists, found = ranked_pairs(reward), dict[tuple[int, int], float]()
    for members, target, weight in zip(lists.members[0], lists.target[0], lists.weight[0], strict=True):
        if weight:
            win = int(target.argmax())
            lose = next(int(i) for i in members.nonzero() if int(i) != win)
            found[win + 1, lose + 1] = float(weight)
    return found


# Golden values


def test_rankdpo_weighs_four_images_as_the_paper_does() -> None:
    """Shares of wins 1, 2/3, 1/3 and 0: the weights of the six pairs, and their sum."""
    golden = {(1, 2): 0.2197, (1, 3): 0.5339, (1, 4): 0.8214, (2, 3): 0.0619, (2, 4): 0.1697, (3, 4): 0.0260}
    found = weights_by_pair(row(0.9, 0.7, 0.2, 0.1))
    assert found == {pair: pytest.approx(weight, abs=5e-5) for pair, weight in golden.items()}
    assert sum(found.values()) == pytest.approx(1.8326, abs=2e-4)


def test_op_gfn_puts_the_best_first_as_its_code_does() -> None:
    assert float(listwise(row(0.3, 0.1, 0.0), first_place(row(3, 2, 1)))) == pytest.approx(0.939831, abs=1e-6)


@pytest.mark.parametrize(
    ("score", "reward", "tau", "golden"),
    [
        (row(0.2, -0.1, 0), row(1, 0.5, 0), 0.5, 1.748758),
        (row(0.2, -0.1, 0), row(1, 0.5, 0), 0.05, 1.684237),
        (torch.zeros(1, 6, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64), 0.05, 6.579251),  # log 6!
    ],
)
def test_the_lists_of_what_remains_are_gdros(score: Tensor, reward: Tensor, tau: float, golden: float) -> None:
    assert float(listwise(score, ranked_suffixes(reward, tau))) == pytest.approx(golden, abs=1e-6)


# Identities


def test_a_pair_is_diffusion_dpo() -> None:
    """All four kinds of lists of two images, in the mean-and-half convention; RankDPO's weight of a pair is a constant."""
    e, ref, beta = normal(6, 2).abs(), normal(6, 2, seed=1).abs(), 30.0
    score, reward = -beta / 2 * (e - ref), torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(6, 2)
    pair = dpo(e[:, 0], ref[:, 0], e[:, 1], ref[:, 1], beta)
    constant = 1 * abs(1 / math.log(2) - 1 / math.log(3))  # gains 1 and 0, ranks 1 and 2
    for lists, scale in (
        (first_place(reward), 1.0),
        (random_pairs(reward, torch.full((6, 2), 0.5)), 1.0),
        (ranked_suffixes(reward, 0.0), 1.0),
        (ranked_suffixes(reward, 1e-6), 1.0),
        (ranked_pairs(reward), constant),
    ):
        assert torch.allclose(listwise(score, lists), scale * pair, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**31))
def test_op_gfns_list_is_the_first_term_of_the_ranking(g: int, seed: int) -> None:
    score, reward = normal(3, g, seed=seed), normal(3, g, seed=seed + 1)
    ranking = ranked_suffixes(reward, 0.0)
    first = type(ranking)(ranking.members[:, :1], ranking.target[:, :1], ranking.weight[:, :1])
    assert torch.allclose(listwise(score, first_place(reward)), listwise(score, first))


def test_images_that_tie_at_the_maximum_share_the_first_place() -> None:
    """As the limit of GDRO's softmax does; the gradient pulls them together."""
    score, reward = normal(1, 4).requires_grad_(), row(1, 1, 0, nan)
    first = ranked_suffixes(reward, 1e-6)
    first = type(first)(first.members[:, :1], first.target[:, :1], first.weight[:, :1])
    loss = listwise(score, first_place(reward))
    assert float(loss.detach()) == pytest.approx(float(listwise(score, first).detach()))
    (gradient,) = torch.autograd.grad(loss, score)
    share = score.detach()[0, :3].softmax(0)
    assert torch.allclose(gradient[0], torch.cat([share - torch.tensor([0.5, 0.5, 0.0]), torch.zeros(1)]))


@pytest.mark.parametrize("kind", ["first", "pairs", "suffixes", "ranked"])
def test_a_constant_added_to_scores_or_rewards_changes_nothing(kind: str) -> None:
    score, reward, u = normal(3, 5), normal(3, 5, seed=1), torch.rand(3, 5, generator=torch.Generator().manual_seed(2))
    make: Any = {
        "first": first_place,
        "pairs": lambda r: random_pairs(r, u),
        "suffixes": lambda r: ranked_suffixes(r, 0.3),
        "ranked": ranked_pairs,
    }[kind]
    loss = listwise(score, make(reward))
    assert torch.allclose(loss, listwise(score + 3, make(reward))) and torch.allclose(
        loss, listwise(score, make(reward - 2))
    )
    order = torch.tensor([3, 1, 4, 0, 2])
    if kind != "pairs":  # whose partners are drawn by place
        assert torch.allclose(loss, listwise(score[:, order], make(reward[:, order])))


# Against loops


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([nan, 0.0, 0.25, 1.0, -3.0]), min_size=2, max_size=6), st.integers(0, 2**31))
def test_the_loss_is_the_loop_over_pairs_and_lists(values: list[float], seed: int) -> None:
    g, score, reward = len(values), normal(1, len(values), seed=seed), row(*values)
    scored = [i for i in range(g) if not math.isnan(values[i])]
    s = score[0].tolist()
    # RankDPO
    better = lambda i: sum(values[j] > values[i] for j in scored)
    share = lambda i: sum(values[i] > values[j] for j in scored) / (len(scored) - 1)
    want = 0.0
    for i, j in itertools.permutations(scored, 2):
        if values[i] > values[j]:
            gain = 2 ** share(i) - 2 ** share(j)
            want += (
                gain * (1 / math.log(2 + better(i)) - 1 / math.log(2 + better(j))) * math.log1p(math.exp(s[j] - s[i]))
            )
    assert float(listwise(score, ranked_pairs(reward))) == pytest.approx(want, abs=1e-9)
    # OP-GFN
    top = [i for i in scored if values[i] == max(values[j] for j in scored)]
    whole = math.log(sum(math.exp(s[i]) for i in scored)) if scored else 0.0
    want = sum(whole - s[i] for i in top) / max(len(top), 1)
    assert float(listwise(score, first_place(reward))) == pytest.approx(want, abs=1e-9)
    # GDRO at tau = 1
    order, want = sorted(scored, key=lambda i: -values[i]), 0.0
    for k in range(len(order) - 1):
        rest = order[k:]
        target = [math.exp(values[i]) / sum(math.exp(values[j]) for j in rest) for i in rest]
        want += math.log(sum(math.exp(s[i]) for i in rest)) - sum(q * s[i] for q, i in zip(target, rest, strict=True))
    assert float(listwise(score, ranked_suffixes(reward, 1.0))) == pytest.approx(want, abs=1e-9)


def test_every_random_partner_is_drawn_equally_often_and_never_oneself() -> None:
    reward = torch.tensor([[0.0, 1.0, nan, 1.0]]).expand(3000, 4)
    lists = random_pairs(reward, torch.rand(3000, 4, generator=torch.Generator().manual_seed(0)))
    assert (lists.weight[:, 2] == 0).all() and torch.allclose(lists.weight.sum(1), torch.ones(3000).double())
    assert not lists.members[..., 2][lists.weight > 0].any()
    partner = lists.members[:, 0].float().mean(0)  # of the first image
    assert partner[0] == 1 and partner[2] == 0 and abs(float(partner[1]) - 0.5) < 5 * math.sqrt(0.25 / 3000)
    tied = lists.members[:, 1, 3]  # the second image with the fourth: equal rewards
    assert torch.equal(lists.target[:, 1][tied], torch.tensor([[0, 0.5, 0, 0.5]]).double().expand(int(tied.sum()), 4))


@pytest.mark.parametrize("reward", [row(nan, nan, nan), row(nan, 1.0, nan), row(1, 1, 1)])
def test_lists_without_an_order_give_no_number_that_is_not_finite(reward: Tensor) -> None:
    score = normal(1, 3).requires_grad_()
    u = torch.zeros(1, 3)
    for lists in (first_place(reward), ranked_pairs(reward), random_pairs(reward, u), ranked_suffixes(reward, 0.1)):
        loss = listwise(score, lists)
        (gradient,) = torch.autograd.grad(loss.sum(), score)
        assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
        if not bool(reward.isfinite().sum() > 1):
            assert not gradient.any()


def test_the_gradient_is_that_of_finite_differences() -> None:
    score, reward = normal(2, 4).requires_grad_(), normal(2, 4, seed=1)
    for lists in (first_place(reward), ranked_pairs(reward), ranked_suffixes(reward, 0.2)):
        torch.autograd.gradcheck(lambda s, lists=lists: listwise(s, lists), (score,))
