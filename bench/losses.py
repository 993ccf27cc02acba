"""The formulas that several methods share: advantages, PPO's clip, flow errors and the DPO family, as pure functions.

Shapes: P prompts, G members of a group, N or B rows. Errors e are MEANS over the D elements of a latent (`flow_error`), and
s = e_live - e_ref is minus an implicit reward: negative s = the live weights made the sample likelier. beta follows the
mean-and-half convention throughout: -(beta / 2)(s_w - s_l) for a pair, -(beta / G) sum A s for a group, one number for both.
Everything is computed in float32 or better: s is a small difference of near-equal numbers that beta multiplies by 1e2 to 1e4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .flow import precise, wide

# Advantages


def informative(reward: Tensor) -> Tensor:
    """(P, G) -> (P,) bool: two finite members or more, not all equal. Other groups teach nothing."""
    finite = reward.isfinite()
    high = reward.masked_fill(~finite, -torch.inf).amax(1)
    low = reward.masked_fill(~finite, torch.inf).amin(1)
    return high > low


def standardise(reward: Tensor, std: Literal["group", "global", "none"] = "group", eps: float = 1e-4) -> Tensor:
    """(P, G) -> (P, G): advantages A = (r - group mean) / (std + eps), population std (ddof 0).

    std: "group" = of each group (GRPO, arXiv 2402.03300), "global" = of all finite rewards of the batch (Flow-GRPO's SD3.5
    configs, DGPO), "none" = 1 (Dr. GRPO, arXiv 2503.20783). NaN members are left out of the statistics and get 0; groups
    that are not `informative` get zeros. Raises ValueError for another word.
    """
    if std not in ("group", "global", "none"):
        raise ValueError(f"unknown std {std!r}: group, global or none")
    r, finite = precise(reward), reward.isfinite()
    centred = torch.where(finite, r - _mean(r, finite), 0.0)
    if std == "group":
        spread = (centred**2).sum(1, keepdim=True).div(finite.sum(1, keepdim=True).clamp(min=1)).sqrt() + eps
    elif std == "global":
        spread = (r[finite] - r[finite].mean()).square().mean().sqrt() + eps
    else:
        spread = torch.ones_like(r[:, :1])
    return torch.where(informative(reward)[:, None], centred / spread, 0.0).to(wide(reward).dtype)


def _mean(r: Tensor, finite: Tensor) -> Tensor:
    """(P, 1): the mean of each group's finite members; 0 where there is none."""
    return r.masked_fill(~finite, 0.0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)


# Policy gradient


def clipped(ratio: Tensor, adv: Tensor, eps: float) -> Tensor:
    """(N,): PPO's pessimistic surrogate as a loss, max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) (arXiv 1707.06347, Eq. 7)."""
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


# Errors of a velocity


def flow_error(v: Tensor, target: Tensor) -> Tensor:
    """(B,): mean over elements of (v - target)^2, the flow-matching error; `flow.error_scale` gives an epsilon model's."""
    return (wide(v) - wide(target)).square().flatten(1).mean(1)


def weighted_error(error: Tensor, weight: Tensor) -> Tensor:
    """(N,): weight * error with a constant weight: 1 = SFT, f(R) = RWR, an advantage = AWM at ratio 1 (arXiv 2509.25050)."""
    return weight.detach() * error


def kl_velocity(live: Tensor, ref: Tensor) -> Tensor:
    """(B,): mean over elements of (v_live - v_ref)^2, ref a constant: the penalty that stands for a KL in forward methods."""
    return flow_error(live, ref.detach())


# Preferences


def dpo(live_w: Tensor, ref_w: Tensor, live_l: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """(P,): Diffusion-DPO, -log sigmoid(-(beta / 2) (s_w - s_l)) from the errors (P,) of winner and loser.

    arXiv 2311.12908, Eq. 14, in the mean-and-half convention of its code. Raw: its gradient grows with beta.
    """
    s_w, s_l = wide(live_w) - wide(ref_w).detach(), wide(live_l) - wide(ref_l).detach()
    return -logsigmoid(-beta / 2 * (s_w - s_l))


def gpo(
    advantage: Tensor,
    live: Tensor,
    ref: Tensor,
    beta: float,
    link: Literal["logsigmoid", "pairwise", "linear"] = "logsigmoid",
    *,
    gap_weight: bool = True,
    known: Tensor | None = None,
) -> Tensor:
    """(P,): group preference optimisation from advantages and errors, all (P, G), all with the group's one (t, eps).

        logsigmoid  -log sigmoid(-(beta / G) sum_i A_i s_i) / beta
        pairwise    2 / (G (G - 1)) sum_{A_i > A_j} W_ij (-log sigmoid(-(beta / 2) (s_i - s_j))) / beta
                    W_ij = A_i - A_j (gap_weight) or 1 (all-pairs DPO)
        linear      (1 / G) sum_i A_i s_i                                    no beta, no saturation: needs a KL penalty

    Source: after arXiv 2505.11070, whose printed loss is not known here; sum_{i<j} (A_i - A_j)(s_i - s_j) = G sum_i A_i s_i
    ties its words ("pairs", "gap", "group", "standardised") into the first form. The division by beta keeps the gradient at
    s = 0 independent of beta (half the mean of A_i grad e_i: linear is twice that), so beta only sets how soon the loss
    saturates. With G = 2 and A = +1, -1, logsigmoid and unweighted pairwise are dpo / beta. A group with A = 0 has gradient
    0 exactly (and the constant loss log 2 / beta under logsigmoid). known (P, G) bool marks the members whose reward is a number:
    pairwise leaves the others out of its pairs (their A = 0 is no rank); the other forms need no mask.
    Raises ValueError for another link or beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    a, s, g = wide(advantage).detach(), wide(live) - wide(ref).detach(), live.shape[1]
    if link == "logsigmoid":
        return -logsigmoid(-beta / g * (a * s).sum(1)) / beta
    if link == "linear":
        return (a * s).sum(1) / g
    if link != "pairwise":
        raise ValueError(f"unknown link {link!r}: logsigmoid, pairwise or linear")
    gap = (a[:, :, None] - a[:, None, :]).clamp(min=0)
    pair = gap if gap_weight else (gap > 0).to(gap)
    if known is not None:
        pair = pair * (known[:, :, None] & known[:, None, :])
    each = -logsigmoid(-beta / 2 * (s[:, :, None] - s[:, None, :])) / beta
    return 2 / (g * max(g - 1, 1)) * (pair * each).sum((1, 2))


def implicit_accuracy(reward: Tensor, live: Tensor, ref: Tensor) -> Tensor:
    """(): share of the ordered pairs (r_i > r_j, both finite) with s_i < s_j, a tie in s counting half; NaN without a pair.

    All (P, G); a DPO pair is G = 2 with reward (1, 0). 0.5 = the live weights rank no better than the reference.
    """
    s = (wide(live) - wide(ref)).detach()
    r, finite = reward, reward.isfinite()
    ordered = (r[:, :, None] > r[:, None, :]) & finite[:, :, None] & finite[:, None, :]
    margin = s[:, None, :] - s[:, :, None]
    return ((margin.sign() + 1) / 2)[ordered].mean()
