"""Group Preference Optimization (GPO): DPO from a pair to a group of the model's own images, weighted by standardised rewards.

Chen et al., arXiv 2505.11070.

From the paper's abstract: near-tie pairs hurt DPO, which sees only an order; so generalise the pair to a group and weight its
members by standardised rewards; train on the model's own images; nothing changes at inference.
Reconstruction (the printed loss, its settings and the code were not found), with one timestep and one noise per group:
  s_i  = e_i - e_ref,i
  loss = -log sigmoid(-(beta / G) sum_i A_i s_i) / beta                                     "logsigmoid", the default
       = 2 / (G (G - 1)) sum over A_i > A_j of (A_i - A_j) (-log sigmoid(-(beta / 2) (s_i - s_j))) / beta        "pairwise"
       = (1 / G) sum_i A_i s_i                                                                                    "linear"
One identity links them: sum over i<j of (A_i - A_j)(s_i - s_j) = G sum_i A_i s_i.
Every default is borrowed from methods near the paper (gpo.toml says from which), not from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix, training_times
from ..bench.losses import gpo, implicit_accuracy, informative, margin_mask, masked_mean, standardise
from ..bench.spec import LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class AdvantageGroups:
    """P groups of G images with their rewards and advantages."""

    x0: Tensor  # (P, G, C, h, w)
    prompt_ids: Tensor  # (P,)
    reward: Tensor  # (P, G); NaN where the image could not be scored
    advantage: Tensor  # (P, G); 0 where the reward is NaN


@dataclass(frozen=True)
class GPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 1000),
        "t_min": Uniform(0, 0.8),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5))
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    beta: float = 100.0  # how soon the sigmoid saturates: the strength of the trust region
    loss_type: Literal["logsigmoid", "pairwise", "linear"] = "logsigmoid"
    std: Literal["group", "global", "none"] = "group"  # standard deviation that divides the rewards
    margin_weight: bool = True  # loss_type "pairwise": weight a pair by A_i - A_j; False is plain all-pairs DPO
    margin: float = 0.0  # loss_type "pairwise": only pairs whose rewards differ by more than this
    kl: float = 0.0  # weight of mean (v - v_ref)^2, over images that could be scored
    timestep_shift: float = 0.0  # shift of the times of training; 0: the model's own, 1: none (flow.training_times)
    t_min: float = 0.0  # t is drawn from [t_min, 1]: few-step images are a little blurred, low noise would teach that
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"gpo: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1 or self.beta <= 0:
            raise UserError(f"gpo: prompts must be at least 1 and beta above 0, got {self.prompts} and {self.beta}")
        if self.steps < 0 or self.guidance < 0 or self.kl < 0 or self.margin < 0:
            raise UserError("gpo: steps, guidance, kl and margin must not be negative")
        if not self.timestep_shift >= 0:
            raise UserError(f"gpo: timestep_shift must not be negative, got {self.timestep_shift}")
        if not 0 <= self.t_min < 1:
            raise UserError(f"gpo: t_min is a time in [0, 1), got {self.t_min}")

    @property
    def latents(self) -> int:
        return self.group

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.optim.epochs
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, "ref": times}

    def collect(self, rig: Rig) -> AdvantageGroups:
        """Sample and score P groups; keep those whose images differ in reward; standardise."""
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        batch = AdvantageGroups(groups.x0, groups.prompt_ids, groups.reward, standardise(groups.reward, self.std))
        return select_rows(batch, informative(groups.reward))

    def loss(self, rig: Rig, batch: AdvantageGroups) -> Tensor:
        """-log sigmoid(-(beta / G) sum_i A_i s_i) / beta, a mean over groups; s_i from one (t, eps) per group."""
        u = rig.normal(len(batch.prompt_ids)).sigmoid()
        t = training_times(u, rig.path, self.t_min, self.timestep_shift)
        t = t.repeat_interleave(self.group)
        eps = rig.noise(len(batch.prompt_ids)).repeat_interleave(self.group, 0)
        prompt_ids = batch.prompt_ids.repeat_interleave(self.group)
        x, target = mix(rig.path, batch.x0.flatten(0, 1), eps, t)
        v, v_ref = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", "ref"))
        error, error_ref = (rig.error(u, target, t).view_as(batch.reward) for u in (v, v_ref))
        rig.note("policy/accuracy", implicit_accuracy(batch.reward, error, error_ref))
        scored = batch.reward.isfinite()
        kl = masked_mean(scored, rig.error(v, v_ref, t).view_as(batch.reward)).mean()
        rig.note("policy/kl", kl)
        preference = gpo(
            batch.advantage, error, error_ref, self.beta, self.loss_type,
            margin_weight=self.margin_weight, scored=scored, pair_mask=margin_mask(batch.reward, self.margin),
        )  # fmt: skip
        return preference.mean() + self.kl * kl
