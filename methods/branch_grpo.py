"""BranchGRPO: the images of a group share a tree of stochastic steps, and a step is judged by the images below it.

arXiv 2509.06040; code Fredreic1849/BranchGRPO, fastvideo/train_branchgrpo_flux.py at ffc3c90, scripts/finetune at 19fbb9f.

All steps are stochastic. At each of the `split_steps` every node gets `split_factor` children, elsewhere one. With R the mean reward
of the leaves below a child, compared with all nodes of the same depth in its tree:
  A    = (R - mean) / (std + 1e-8), 0 where std < 1e-6,   rho = exp(log p - log p_old)
  loss = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)), over the edges of the tree
Siblings are drawn with the noises (xi_0 + s xi_b) / sqrt(1 + s^2) (Eq. 2), s the `split_noise_scale`: each is standard normal, so that
log p is the density they were drawn from. The children of a state share one velocity, in the rollout and in the update.

Differs from the code: it multiplies the noise at a split by s and keeps the density of the plain step. Its image is the estimate of
x0 at the last time, so that the last step's noise, which it trains, changes no image; here the last step is the ODE's and is not
trained. It divides the loss by the edges of a tree, here by those that teach. Its pruning and its mix with ODE steps are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import Kernel, dance, ode, sde
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

STD_EPS, MIN_STD = 1e-8, 1e-6  # of the rewards of a depth, compute_hierarchical_advantages_by_depth


@dataclass(frozen=True)
class BranchGRPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip_range": LogUniform(1e-5, 1e-2),
        "noise_level": Uniform(0.2, 1.0),
        "split_noise_scale": Choice((1.0, 4.0)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=1))
    prompts: int = 16  # prompts per iteration, one tree each
    split_steps: tuple[int, ...] = (0, 3, 6, 9)  # where every node gets split_factor children
    split_factor: int = 2  # children at a split
    split_noise_scale: float = 4.0  # s of the siblings' noise
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max]
    clip_range: float = 1e-3  # PPO's clip of the ratio
    sde_type: Literal["dance", "sde"] = "dance"  # the stochastic step: DanceGRPO's or Flow-GRPO's
    noise_level: float = 0.3  # of the stochastic step; dance: its eta
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        splits = list(self.split_steps)
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            (
                "split_steps",
                splits and splits[0] >= 0 and sorted(set(splits)) == splits,
                "rising numbers of at least 0",
            ),
            ("split_factor", self.split_factor >= 2, "at least 2: one image has nothing to be compared with"),
            ("split_noise_scale", self.split_noise_scale > 0, "above 0: without it siblings are equal"),
            ("adv_clip_max", self.adv_clip_max > 0, "above 0"),
            ("clip_range", self.clip_range > 0, "above 0"),
            ("noise_level", self.noise_level > 0, "above 0"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"branch-grpo: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def kernel(self) -> Kernel:
        return dance(self.noise_level) if self.sde_type == "dance" else sde(self.noise_level)

    def plan(self, steps: int) -> TreePlan:
        """Stochastic steps, several children of every node where the tree splits; the last step is the ODE's."""
        if self.split_steps[-1] > steps - 2:
            raise UserError(f"branch-grpo: split_steps must end before step {steps - 1}, got {self.split_steps}")
        child = Branches(self.kernel)
        split = Branches(self.kernel, self.split_factor, spread=self.split_noise_scale)
        return TreePlan(
            [*([split if k in self.split_steps else child] for k in range(steps - 1)), [Branches(ode)]], steps
        )

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """Of the trained states, those before the first split have no siblings and teach nothing."""
        plan, passes = self.plan(self.steps or steps), 1 if (self.guidance or guidance) == 1 else 2
        taught = plan.states(k for k in plan.stochastic_steps if k >= self.split_steps[0])
        return {
            "rollout": plan.evaluations * passes / plan.images,
            "policy": 3 * taught * self.optim.epochs * passes / plan.images,
        }

    def collect(self, rig: Rig) -> Branchings:
        """Grow the trees, score the leaves, and give each edge its child's advantage among the nodes of its depth."""
        plan = self.plan(self.steps or rig.model.steps)
        branchings, reward = rig.trees(self.prompts, plan, guidance=self.guidance or None)
        means = leaf_means(reward[:, :, 0], branchings.first, branchings.leaves)
        advantage = torch.zeros_like(means)
        for k in plan.stochastic_steps:
            edges = (branchings.step == k)[:, None] & (branchings.first >= 0)
            depth = means[edges].view(self.prompts, -1)
            advantage[edges] = standardise(depth, eps=STD_EPS, ddof=1, min_std=MIN_STD).flatten()
        rig.note("branches/informative", (advantage != 0).any(1).float().mean())
        return assign_branch_advantages(branchings, advantage.clamp(-self.adv_clip_max, self.adv_clip_max))

    def loss(self, rig: Rig, batch: Branchings) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)), over the edges of the trees."""
        step = rig.step(
            self.kernel, batch.x, batch.t, batch.s, batch.prompt_ids,
            guidance=self.guidance or rig.model.guidance, detach=self.detach_uncond,
        )  # fmt: skip
        ratio = branch_ratios(rig, step, batch, self.clip_range)
        return (batch.weight * clipped_surrogate(ratio, batch.advantage, self.clip_range)).sum(1).mean()
