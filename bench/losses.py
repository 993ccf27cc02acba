"""The formulas that several methods share: advantages, PPO's clip, flow errors and the DPO family, as pure functions.

Shapes: P prompts, G members of a group, N or B rows. Errors e are MEANS over the D elements of a latent (`flow_error`), and
s = e_policy - e_ref is minus an implicit reward: negative s = training made the sample likelier. beta follows the
mean-and-half convention throughout: -(beta / 2)(s_w - s_l) for a pair, -(beta / G) sum A s for a group, one number for both.
Everything is computed in float32 or better: s is a small difference of near-equal numbers that beta multiplies by 1e2 to 1e4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from .flow import precise, wide

ROUNDING = 1e-6  # error of a difference of float32 rewards of size 1

# Advantages


def informative(reward: Tensor) -> Tensor:
    """(P, G) -> (P,) bool: groups with two finite rewards or more that are not all equal; others have no gradient."""
    finite = reward.isfinite()
    high = reward.masked_fill(~finite, -torch.inf).amax(1)
    low = reward.masked_fill(~finite, torch.inf).amin(1)
    return high > low


def standardise(
    reward: Tensor,
    std: Literal["group", "global", "none"] = "group",
    eps: float = 1e-4,
    ddof: int = 0,
    min_std: float = 0.0,
) -> Tensor:
    """(P, G) -> (P, G): advantages A = (r - group mean) / (std + eps), population std (ddof 0) or sample std (ddof 1).

    std: "group" = of each group (GRPO, arXiv 2402.03300), "global" = of all finite rewards of the batch (Flow-GRPO's SD3.5
    configs, DGPO), "none" = 1 (Dr. GRPO, arXiv 2503.20783). NaN members are left out of the statistics and get 0; groups
    that are not `informative` get zeros, and so do those whose own deviation is below min_std: without it an eps of 1e-8 makes full
    advantages of rounding errors. Raises ValueError for another word.
    """
    if std not in ("group", "global", "none"):
        raise ValueError(f"unknown std {std!r}: group, global or none")
    r, finite = precise(reward), reward.isfinite()
    centred = torch.where(finite, r - _finite_mean(r, finite), 0.0)
    deviation = (centred**2).sum(1, keepdim=True).div((finite.sum(1, keepdim=True) - ddof).clamp(min=1)).sqrt()
    if std == "group":
        spread = deviation + eps
    elif std == "global":
        spread = (r[finite] - r[finite].mean()).square().sum().div(max(1, int(finite.sum()) - ddof)).sqrt() + eps
    else:
        spread = torch.ones_like(r[:, :1])
    teaches = informative(reward)[:, None] & (deviation >= min_std)
    return torch.where(teaches, centred / spread, 0.0).to(wide(reward).dtype)


def leaf_means(reward: Tensor, first: Tensor, leaves: Tensor) -> Tensor:
    """(N, K): mean reward of the leaves below each child of N states; NaN where none of them has a score, or where there is no child.

    BranchGRPO's reward of a node (arXiv 2509.06040, Eq. 3, as its code: the plain mean). Computed in float64 and rounded to
    float32, so that means of equal rewards are equal.

    Args:
        reward: (R, L), of the L leaves of R trees; NaN where an image was not scored.
        first: (N, K), the first leaf below each child, tree * L + leaf; -1 where there is no child.
        leaves: (N,), the number of leaves below each child.
    """
    r, first = precise(reward).flatten(), first.to(reward.device)
    start = first.clamp(min=0)
    end = start + leaves.to(reward.device)[:, None]
    totals, counts = (pad(v.cumsum(0), (1, 0)) for v in (r.masked_fill(~r.isfinite(), 0.0), r.isfinite().to(r)))
    means = (totals[end] - totals[start]) / (counts[end] - counts[start])
    return means.masked_fill(first < 0, torch.nan).to(wide(reward).dtype)


def _finite_mean(r: Tensor, finite: Tensor) -> Tensor:
    """(P, 1): the mean of each group's finite members; 0 where there is none."""
    return r.masked_fill(~finite, 0.0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)


# Several rewards of one image as one number; R rewards, all functions are (P, G, R), weights (R,) -> (P, G)


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """sum_j w_j r_ij: the reward with the larger spread rules. NaN where one of an image's rewards is."""
    return (precise(rewards) * precise(weights)).sum(-1)


def decoupled_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """GDPO: sum_j w_j (r_ij - mean_group_j) / std_group_j, each reward in units of its own spread (arXiv 2601.05242).

    It does not change when one reward is scaled or shifted. A reward that is constant in a group, up to the rounding of float32,
    contributes 0. The paper standardises the sum over the batch; the method's own `std` does that (std = "global").
    """
    r = _complete(rewards)
    scored = r[..., :1].isfinite()
    size = r.nan_to_num(0.0).abs().amax(1, keepdim=True)
    count = scored.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(scored, r - r.nan_to_num(0.0).sum(1, keepdim=True) / count, 0.0)
    std = ((centred**2).sum(1, keepdim=True) / count).sqrt()
    units = torch.where(std > ROUNDING * size, centred / std.clamp(min=torch.finfo(r.dtype).tiny), 0.0)
    return (units * precise(weights)).sum(-1).masked_fill(~scored[..., 0], torch.nan)


def pareto_rank(rewards: Tensor, weights: Tensor) -> Tensor:
    """(dominated by i - dominating i) / (G - 1) inside the group: only the signs of the weights count, and no scale at all.

    i dominates j where no reward is lower and one is higher. The idea of MOGFN (arXiv 2210.12765) and of CaPO's frontier (arXiv
    2502.02588), which choose from the front; a graded rank for methods that standardise is a derivation of ours.
    """
    r = _complete(rewards) * precise(weights).sign()
    above = (r[:, :, None] >= r[:, None]).all(-1) & (r[:, :, None] > r[:, None]).any(-1)  # False beside NaN
    scored = r[..., 0].isfinite()
    others = (scored.sum(1, keepdim=True) - 1).clamp(min=1)
    rank = (above.sum(2) - above.sum(1)).to(r) / others
    return rank.masked_fill(~scored, torch.nan)


def _complete(rewards: Tensor) -> Tensor:
    """(P, G, R) in float64, all rewards of an image NaN where one of them is not finite."""
    r = precise(rewards)
    return r.masked_fill(~r.isfinite().all(-1, keepdim=True), torch.nan)


# Policy gradient


def guard_log_ratio(policy_mean: Tensor, old_mean: Tensor, to: Tensor, std: Tensor) -> Tensor:
    """(N,): GRPO-Guard's log-ratio, -mean (mu_old - mu_policy) eps with eps = (to - mu_old) / std, of one transition each.

    It is std (log rho + mean (mu_old - mu_policy)^2 / (2 std^2)): centred, and of one scale on every step (arXiv 2510.22319).
    A mean over elements of each transition, as verl-omni implements it; the authors' code averages over the whole batch.
    to, old_mean and std (N, 1, ..., 1) are constants.
    """
    policy, old = wide(policy_mean), wide(old_mean.detach())
    return -((old - policy) * (wide(to.detach()) - old) / std.detach()).flatten(1).mean(1)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, eps: float) -> Tensor:
    """(N,): PPO's pessimistic surrogate as a loss, max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) (arXiv 1707.06347, Eq. 7)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - eps, 1 + eps))


# Errors of a velocity


def flow_error(v: Tensor, target: Tensor) -> Tensor:
    """(B,): mean over elements of (v - target)^2, the flow-matching error; `flow.error_scale` gives an epsilon model's."""
    return (wide(v) - wide(target)).square().flatten(1).mean(1)


def weighted_error(error: Tensor, weight: Tensor) -> Tensor:
    """(N,): weight * error with a constant weight: 1 = SFT, f(R) = RWR, an advantage = AWM at ratio 1 (arXiv 2509.25050)."""
    return weight.detach() * error


def log_likelihood_proxy(
    error: Tensor, t: Tensor, form: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber", p: float = 0.25
) -> Tensor:
    """(N,): AWM's proxy for a log-likelihood, from flow errors d (N,) at times t (N,) (arXiv 2509.25050 and its code):

    uniform -d        t -t d        t2 -t^2 d        huber -t (sqrt(d + 1e-10) - 1e-5)        ghuber -(t / p) ((d + 1e-10)^p - 1e-10^p)

    The paper finds uniform best, the code's default is ghuber. Raises ValueError for another word.
    """
    d, t = wide(error), t.to(wide(error))
    if form == "uniform":
        return -d
    if form in ("t", "t2"):
        return -(t if form == "t" else t**2) * d
    if form == "huber":
        return -t * ((d + 1e-10).sqrt() - 1e-5)
    if form != "ghuber":
        raise ValueError(f"unknown form {form!r}: uniform, t, t2, huber or ghuber")
    return -(t / p) * ((d + 1e-10) ** p - 1e-10**p)


def diffusion_nft(positive: Tensor, negative: Tensor, x0: Tensor, optimality: Tensor) -> Tensor:
    """(N,): DiffusionNFT's r l+ + (1 - r) l-, l = mean (x0_hat - x0)^2 / w with w = mean |x0_hat - x0| held constant.

    positive, negative (N, ...): the estimates of x0 under v_old + b (v_policy - v_old) and under v_old - b (v_policy - v_old);
    optimality (N,): r, the optimality probability of the image (arXiv 2509.16117, Eq. 5; the weight w is its code's).
    """
    return optimality * _self_normalised(positive, x0) + (1 - optimality) * _self_normalised(negative, x0)


def _self_normalised(estimate: Tensor, x0: Tensor) -> Tensor:
    gap = (wide(estimate) - wide(x0.detach())).flatten(1)
    weight = precise(gap.detach()).abs().mean(1).clamp(min=1e-5).to(gap)
    return gap.square().mean(1) / weight


def optimality_probability(advantage: Tensor, bound: float = 5.0) -> Tensor:
    """Advantages of any shape -> DiffusionNFT's r in [0, 1]: clamp(A / (2 bound) + 1/2, 0, 1) (its code, bound 5)."""
    return (wide(advantage).detach().clamp(-bound, bound) / (2 * bound) + 0.5).clamp(0, 1)


def likelihood_weights(reward: Tensor, temperature: float) -> Tensor:
    """(P, G): softmax of reward / temperature inside the group, times its number of scored members: mean 1. NaN members get 0.

    Reward-weighted regression as Flow-GRPO's paper defines its baseline (arXiv 2505.05470, App. C.1); its code weighs by the raw
    reward instead. Raises ValueError when temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    scored = reward.isfinite()
    logits = (wide(reward) / temperature).masked_fill(~scored, -torch.inf)
    weight = (logits - logits.amax(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)).exp()
    return weight * scored.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-30)


def best_of_group(reward: Tensor) -> Tensor:
    """(P, G) bool: the members at the group's maximum, all of them where several tie; NaN members never."""
    filled = reward.masked_fill(~reward.isfinite(), -torch.inf)
    return reward.isfinite() & (filled == filled.amax(1, keepdim=True))


def kl_velocity(policy: Tensor, ref: Tensor) -> Tensor:
    """(B,): mean over elements of (v_policy - v_ref)^2, ref a constant: the penalty that stands for a KL in forward methods."""
    return flow_error(policy, ref.detach())


# Preferences


def dpo(policy_w: Tensor, ref_w: Tensor, policy_l: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """(P,): Diffusion-DPO, -log sigmoid(-(beta / 2) (s_w - s_l)) from the errors (P,) of winner and loser.

    arXiv 2311.12908, Eq. 14, in the mean-and-half convention of its code. Raw: its gradient grows with beta.

    Args:
        policy_w: error (P,) of the winner under the policy.
        ref_w: error (P,) of the winner under the reference.
        policy_l: error (P,) of the loser under the policy.
        ref_l: error (P,) of the loser under the reference.
        beta: inverse temperature.
    """
    s_w, s_l = wide(policy_w) - wide(ref_w).detach(), wide(policy_l) - wide(ref_l).detach()
    return -logsigmoid(-beta / 2 * (s_w - s_l))


def step_dpo(policy_w: Tensor, ref_w: Tensor, policy_l: Tensor, ref_l: Tensor, beta: float, clip: float) -> Tensor:
    """(N,): -log sigmoid(beta (log clip(rho_w) - log clip(rho_l))), rho = p / p_ref in [1 - clip, 1 + clip]: D3PO and SPO.

    arXiv 2311.13231, Eq. 14, and arXiv 2406.04314, Eq. 5; the clip is their codes'. It has no gradient outside, on either side.

    Args:
        policy_w: log-probability (N,) of the winner's step under the policy, a mean over elements.
        ref_w: that under the reference.
        policy_l: of the loser's step under the policy.
        ref_l: under the reference.
        beta: inverse temperature.
        clip: how far a ratio may lie from 1, below 1.
    """
    low, high = math.log1p(-clip), math.log1p(clip)
    win, lose = ((wide(p) - wide(r).detach()).clamp(low, high) for p, r in ((policy_w, ref_w), (policy_l, ref_l)))
    return -logsigmoid(beta * (win - lose))


def ddo(real: Tensor, fake: Tensor, beta: float, alpha: float) -> Tensor:
    """(N,): DDO, -log sigmoid(-(beta / 2) s_real) - alpha log sigmoid((beta / 2) s_fake), s = e - e_ref (arXiv 2503.01103, Eq. 13)."""
    return -logsigmoid(-beta / 2 * wide(real)) - alpha * logsigmoid(beta / 2 * wide(fake))


def gpo(
    advantage: Tensor,
    policy: Tensor,
    ref: Tensor,
    beta: float,
    loss_type: Literal["logsigmoid", "pairwise", "linear"] = "logsigmoid",
    *,
    margin_weight: bool = True,
    scored: Tensor | None = None,
    pair_mask: Tensor | None = None,
) -> Tensor:
    """(P,): group preference optimisation from the advantages and errors of a group whose members share one (t, eps).

        logsigmoid  -log sigmoid(-(beta / G) sum_i A_i s_i) / beta
        pairwise    2 / (G (G - 1)) sum_{A_i > A_j} W_ij (-log sigmoid(-(beta / 2) (s_i - s_j))) / beta
                    W_ij = A_i - A_j (margin_weight) or 1 (all-pairs DPO)
        linear      (1 / G) sum_i A_i s_i                                    no beta, no saturation: needs a KL penalty

    Source: after arXiv 2505.11070, whose printed loss is not known here; sum_{i<j} (A_i - A_j)(s_i - s_j) = G sum_i A_i s_i
    ties its words ("pairs", "gap", "group", "standardised") into the first form. The division by beta keeps the gradient at
    s = 0 independent of beta (half the mean of A_i grad e_i: linear is twice that), so beta only sets how soon the loss
    saturates. With G = 2 and A = +1, -1, logsigmoid and unweighted pairwise are dpo / beta. A group with A = 0 has gradient
    0 exactly (and the constant loss log 2 / beta under logsigmoid).

    Args:
        advantage: A (P, G).
        policy: errors (P, G) under the trained weights.
        ref: errors (P, G) under the reference.
        beta: how soon the sigmoid saturates, above 0.
        loss_type: one of the three forms above.
        margin_weight: weigh a pair by the difference of its advantages; pairwise only.
        scored: (P, G) bool, the members whose reward is a number. pairwise leaves the others out of its pairs (their A = 0 is
            no rank); the other forms need no mask.
        pair_mask: (P, G, G) bool, the pairs that pairwise may use, such as those of `margin_mask`.
    Raises ValueError for another loss_type or beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    a, s, g = wide(advantage).detach(), wide(policy) - wide(ref).detach(), policy.shape[1]
    if loss_type == "logsigmoid":
        return -logsigmoid(-beta / g * (a * s).sum(1)) / beta
    if loss_type == "linear":
        return (a * s).sum(1) / g
    if loss_type != "pairwise":
        raise ValueError(f"unknown loss_type {loss_type!r}: logsigmoid, pairwise or linear")
    margin = (a[:, :, None] - a[:, None, :]).clamp(min=0)
    weight = margin if margin_weight else (margin > 0).to(margin)
    if scored is not None:
        weight = weight * (scored[:, :, None] & scored[:, None, :])
    if pair_mask is not None:
        weight = weight * pair_mask
    pair_loss = -logsigmoid(-beta / 2 * (s[:, :, None] - s[:, None, :])) / beta
    return 2 / (g * max(g - 1, 1)) * (weight * pair_loss).sum((1, 2))


def dgpo(
    advantage: Tensor, policy: Tensor, ref: Tensor, beta: float, *, old: Tensor | None = None, clip: float = 0.0
) -> Tensor:
    """(P,): DGPO, mean_i w A_i e_i with w = sigmoid((beta / G) sum_i A_i s_i) held constant (arXiv 2510.08425, its code).

    All (P, G), one (t, eps) a group. Its gradient is that of `gpo(loss_type="logsigmoid")`; the value is not. With old (P, G) and
    clip > 0, a member whose ratio exp(e_old - e_policy) has already moved its own way by more than clip is held constant.

    Args:
        advantage: (P, G); 0 where an image was not scored.
        policy: errors (P, G) under the policy.
        ref: errors (P, G) under the reference.
        beta: inverse temperature, above 0.
        old: errors (P, G) under the lagged copy; None clips nothing.
        clip: how far a ratio may move before its image is held constant; 0 clips nothing.

    Raises:
        ValueError: when beta is not above 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    a, policy, g = wide(advantage).detach(), wide(policy), policy.shape[1]
    weight = torch.sigmoid(beta / g * (a * (policy - wide(ref)).detach()).sum(1, keepdim=True))
    if old is not None and clip > 0:
        ratio = (wide(old) - policy).detach().exp()
        moved = ((a > 0) & (ratio > 1 + clip)) | ((a <= 0) & (ratio < 1 - clip))
        policy = torch.where(moved, policy.detach(), policy)
    return (weight * a * policy).mean(1)


@dataclass(frozen=True)
class Lists:
    """L lists a group: who stands in each, the share of the first place that each member should get, the list's weight."""

    members: Tensor  # (P, L, G) bool
    target: Tensor  # (P, L, G); sums to 1 over the members
    weight: Tensor  # (P, L); 0 leaves a list out


def listwise(score: Tensor, lists: Lists) -> Tensor:
    """(P,): sum_l w_l CE(target_l, softmax of score over the members of list l), from scores (P, G), lists as constants.

    One form, three losses. Two members a list and DCG's weights are RankDPO (`ranked_pairs`), one list of the whole group is
    OP-GFN (`first_place`; its pair form `random_pairs`), and what remains at each rank is GDRO's Plackett-Luce
    (`ranked_suffixes`). With score = -(beta / 2) s and one pair it is `dpo`.
    """
    members = lists.members | (lists.weight == 0)[..., None]  # a softmax over nobody is not a number
    log_share = wide(score)[:, None].masked_fill(~members, -torch.inf).log_softmax(-1).masked_fill(~members, 0.0)
    return -(lists.weight.to(log_share) * (lists.target.to(log_share) * log_share).sum(-1)).sum(-1)


def ranked_pairs(reward: Tensor) -> Lists:
    """RankDPO's lists: all pairs of (P, G) rewards, the better first, weighted as in DCG (arXiv 2410.18013, Eqs. 6 and 7).

    Delta_ij = |2^phi_i - 2^phi_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|, phi_i the share of the scored others that i beats.
    A tie has no difference of gains and drops out; of equal rewards each has the best rank (the paper leaves that open).
    """
    r, scored = precise(reward), reward.isfinite()
    better = (r[:, :, None] > r[:, None, :]) & scored[:, :, None] & scored[:, None, :]
    wins, losses = better.sum(2).to(r), better.sum(1).to(r)
    gain = 2 ** (wins / (scored.sum(1, keepdim=True) - 1).clamp(min=1))
    discount = 1 / (2 + losses).log()  # rank = 1 + the number of better ones
    i, j = torch.triu_indices(r.shape[1], r.shape[1], 1, device=r.device).unbind()
    weight = (gain[:, i] - gain[:, j]).abs() * (discount[:, i] - discount[:, j]).abs()
    ordered = better[:, i, j] | better[:, j, i]
    return _pair_lists(i.expand_as(weight), j.expand_as(weight), better[:, i, j].to(r), weight * ordered, r.shape[1])


def random_pairs(reward: Tensor, u: Tensor) -> Lists:
    """OP-GFN's pairs: each scored member of (P, G) with a random other one; equal rewards share the first place.

    Targets (1, 0), (0, 1), and (.5, .5) where the rewards differ by less than 1e-6; the weights make it a mean over pairs
    (arXiv 2310.00386, its code's basegfn.py). u: uniform in [0, 1), (P, G), draws the partners.
    """
    r, scored, g = precise(reward), reward.isfinite(), reward.shape[1]
    others = scored[:, None, :] & ~torch.eye(g, dtype=torch.bool, device=r.device)
    nth = (precise(u) * others.sum(2)).floor()
    partner = (others.cumsum(2) > nth[..., None]).int().argmax(2)
    member = torch.arange(g, device=r.device).expand_as(partner)
    margin = r - r.gather(1, partner)
    share = torch.where(margin.abs() < 1e-6, 0.5, (margin > 0).to(r))
    usable = (scored & others.any(2)).to(r)
    return _pair_lists(member, partner, share, usable / usable.sum(1, keepdim=True).clamp(min=1), g)


def _pair_lists(i: Tensor, j: Tensor, share: Tensor, weight: Tensor, g: int) -> Lists:
    """Lists of two members i and j (P, L) of G: i should get `share` (P, L) of the first place, j the rest; L weights."""
    one, two = (torch.nn.functional.one_hot(k, g) for k in (i, j))
    target = one * share[..., None] + two * (1 - share[..., None])
    return Lists((one + two).bool(), target * (weight > 0)[..., None], weight)


def first_place(reward: Tensor) -> Lists:
    """OP-GFN's one list: all scored members of (P, G); those at the maximum share the first place equally."""
    best = best_of_group(reward).to(precise(reward))
    target = best / best.sum(1, keepdim=True).clamp(min=1)
    return Lists(reward.isfinite()[:, None], target[:, None], best.any(1, keepdim=True).to(best))


def ranked_suffixes(reward: Tensor, tau: float) -> Lists:
    """GDRO's lists: at each rank of (P, G) rewards the members that remain, with target softmax(r / tau) over them.

    tau = 0 gives the best of them the whole first place, Plackett-Luce's ranking (arXiv 2601.02036). NaN members stand in none.
    """
    r, scored = precise(reward).masked_fill(~reward.isfinite(), -torch.inf), reward.isfinite()
    rank = r.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    members = (rank[:, None] >= torch.arange(r.shape[1] - 1, device=r.device)[:, None]) & scored[:, None]
    weight = (members.sum(2) > 1).to(r)
    if tau:
        logits = (r / tau)[:, None].masked_fill(~(members | (weight == 0)[..., None]), -torch.inf)
        target = logits.softmax(2)
    else:
        target = (rank[:, None] == torch.arange(r.shape[1] - 1, device=r.device)[:, None]).to(r)
    return Lists(members, target.masked_fill(~members | (weight == 0)[..., None], 0.0), weight)


def margin_mask(reward: Tensor, margin: float) -> Tensor:
    """(P, G) -> (P, G, G) bool: reward i exceeds reward j by more than the margin. False where one of them is NaN.

    Rewards are float32 and often fractions such as 1 - 1/5, so a difference must exceed the margin by more than rounding does.
    """
    r = reward.double()
    return r[:, :, None] - r[:, None, :] > (margin + ROUNDING if margin else 0.0)


def masked_mean(mask: Tensor, values: Tensor) -> Tensor:
    """(P,): mean of the values (P, G) where the mask (P, G) is set, at least once a group. The others get no gradient."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1)


def implicit_accuracy(reward: Tensor, policy: Tensor, ref: Tensor) -> Tensor:
    """(): share of the ordered pairs (r_i > r_j, both finite) with s_i < s_j, a tie in s counting half; NaN without a pair.

    All (P, G); a DPO pair is G = 2 with reward (1, 0). 0.5 = the policy ranks no better than the reference.
    """
    s = (wide(policy) - wide(ref)).detach()
    r, finite = reward, reward.isfinite()
    ordered = (r[:, :, None] > r[:, None, :]) & finite[:, :, None] & finite[:, None, :]
    margin = s[:, None, :] - s[:, :, None]
    return torch.where(ordered, (margin.sign() + 1) / 2, 0.0).sum() / ordered.sum()
