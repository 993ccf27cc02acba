"""G2RPO: each stochastic step is judged by images of several step sizes, all of which differ in this step alone.

arXiv 2510.01982; code bcmi/Granular-GRPO, fastvideo/train_g2rpo_hps_clip.py at 0e69799, scripts/finetune at 04ee954.

All trajectories of a prompt begin at one noise. At each step k of the first half, `branches` steps of the SDE leave the ODE trunk;
the ODE completes each once for each of the `strides` (the paper's granularities): on the next time, then on every stride-th one.
  A    = clip(sum over strides of (r - mean) / (std + 1e-8), -adv_clip_max, adv_clip_max),   rho = exp(log p - log p_old)
  loss = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))
Means and sample deviations are those of the branches of one (k, stride). There is no KL. The advantages are summed, not averaged,
before they are clamped: more strides make larger steps. The branches of a state share one velocity, in the rollout and in the
update, and so do the completions of a branch on their first time.

Differs from the code: it computes an SDE step's velocity anew for each branch and each completion, and walks the trunk to its end, from
which nothing branches; the image is the estimate of x0 at the last time, here the ODE's last step, which is the same where a grid ends
at 0. Of several rewards it adds up the advantages; here a reward is one number, which may be a blend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import ode, sde
from ..bench.losses import clipped_surrogate, leaf_means, standardise
from ..bench.spec import (
    Branchings,
    Choice,
    LogUniform,
    Optim,
    Range,
    Rig,
    Uniform,
    assign_branch_advantages,
    branch_ratios,
)
from ..bench.trees import Branches, TreePlan

STD_EPS = 1e-8  # added to the deviation of a group's rewards, fastvideo/train_g2rpo_hps_clip.py


@dataclass(frozen=True)
class G2RPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip_range": LogUniform(1e-5, 1e-2),
        "noise_level": Uniform(0.4, 1.0),
        "strides": Choice(((1,), (1, 2), (1, 2, 3))),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-6, minibatches=1))
    prompts: int = 16  # prompts per iteration, one trunk each
    branches: int = 12  # steps that leave a trunk at each branching step: a group
    strides: tuple[int, ...] = (1, 2)  # each branch is completed once for each
    timestep_fraction: float = 0.5  # branching steps: the first int(steps * timestep_fraction)
    adv_clip_max: float = 5.0  # advantages, summed over the strides, are clamped to [-adv_clip_max, adv_clip_max]
    clip_range: float = 1e-4  # PPO's clip of the ratio
    noise_level: float = 0.7  # of the stochastic step
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("branches", self.branches >= 2, "at least 2: one image has nothing to be compared with"),
            ("strides", self.strides and min(self.strides) >= 1 and len({*self.strides}) == len(self.strides), "different and at least 1"),
            ("timestep_fraction", 0 < self.timestep_fraction < 1, "between 0 and 1: the last step has nothing to complete"),
            ("adv_clip_max", self.adv_clip_max > 0, "above 0"),
            ("clip_range", self.clip_range > 0, "above 0"),
            ("noise_level", self.noise_level > 0, "above 0"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"g2rpo: {name} must be {rule}, got {getattr(self, name)}")

    def plan(self, steps: int) -> TreePlan:
        """A trunk of ODE steps as far as something branches from it, and branches that are completed with every stride."""
        branching = int(steps * self.timestep_fraction)
        if branching < 1:
            raise UserError(f"g2rpo: timestep_fraction {self.timestep_fraction} of steps {steps} leaves none to branch")
        closed, trunk = Branches(sde(self.noise_level), self.branches, closed=True), Branches(ode)
        return TreePlan([*[[closed, trunk]] * (branching - 1), [closed]], steps, tuple(self.strides))

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        plan, passes = self.plan(self.steps or steps), 1 if (self.guidance or guidance) == 1 else 2
        updated = plan.states(plan.stochastic_steps) * self.optim.epochs * passes / plan.images
        return {"rollout": plan.evaluations * passes / plan.images, "policy": 3 * updated}

    def collect(self, rig: Rig) -> Branchings:
        """Grow the trees, score the images, and give each branch the sum of its advantages on every stride's grid."""
        plan = self.plan(self.steps or rig.model.steps)
        branchings, reward = rig.trees(self.prompts, plan, guidance=self.guidance or None)
        by_stride = [leaf_means(r, branchings.first, branchings.leaves) for r in reward.unbind(2)]
        advantage = torch.stack([standardise(r, eps=STD_EPS, ddof=1) for r in by_stride]).sum(0)
        rig.note("branches/informative", (advantage != 0).any(1).float().mean())
        return assign_branch_advantages(branchings, advantage.clamp(-self.adv_clip_max, self.adv_clip_max))

    def loss(self, rig: Rig, batch: Branchings) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)), over the branches of the states."""
        step = rig.step(
            sde(self.noise_level), batch.x, batch.t, batch.s, batch.prompt_ids,
            guidance=self.guidance or rig.model.guidance, detach=self.detach_uncond,
        )  # fmt: skip
        ratio = branch_ratios(rig, step, batch, self.clip_range)
        return (batch.weight * clipped_surrogate(ratio, batch.advantage, self.clip_range)).sum(1).mean()
