"""TempFlow-GRPO: each stochastic step is judged by images that differ in this step alone, and weighted by its noise.

arXiv 2508.04324; code Shredded-Pork/TempFlow-GRPO, scripts/train_sd3_pr.py at e66824e, config/dgx.py at 63e4def.

A seed is an initial noise with its ODE trunk. At every step k but the last, `branches` steps of the SDE leave the trunk; the ODE
completes each. The branches of one (seed, k) are a group, so an advantage is earned by one step's noise:
  A    = (r - mean) / (std + 1e-4),   rho = exp(log p - log p_old),   w_k = std_k / mean_j std_j
  loss = mean max(-w_k A rho, -w_k A clip(rho, 1 - clip_range, 1 + clip_range)) + kl KL(policy || reference)
The gradient of a step grows with its length, w_k A dt_k (1 + noise_level^2 / 2), and not with 1 / std_k as Flow-GRPO's. The
KL is the Gaussian one, with dt. The branches of a state share one velocity, in the rollout and in the update.

Differs from the code: its w is 2.25 std_k, the mean of ten steps of its schedule frozen into a number; its first two epochs make no
update; its group is (prompt, k) of a process, which is a seed's unless a process draws a prompt twice. Branches whose advantage is 0
are left out, as in Flow-GRPO's code, and rows are drawn from the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import ode, sde, step_widths
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


@dataclass(frozen=True)
class TempFlowGRPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip_range": LogUniform(1e-5, 1e-2),
        "noise_level": Uniform(0.4, 1.0),
        "kl": Choice((0.0, 0.001, 0.004)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=2, ema=0.9, ema_interval=8))
    prompts: int = 48  # prompts per iteration
    seeds: int = 4  # initial noises per prompt, each with a trunk of its own
    branches: int = 6  # images that leave a trunk at each step: a group
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max]
    clip_range: float = 1e-4  # PPO's clip of the ratio
    kl: float = 0.004  # weight of the Gaussian KL to the reference; 0 saves its evaluations
    noise_level: float = 0.7  # of the stochastic step
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("branches", self.branches >= 2, "at least 2: one image has nothing to be compared with"),
            ("adv_clip_max", self.adv_clip_max > 0, "above 0"),
            ("clip_range", self.clip_range > 0, "above 0"),
            ("kl", self.kl >= 0, "at least 0"),
            ("noise_level", self.noise_level > 0, "above 0"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"tempflow-grpo: {name} must be {rule}, got {getattr(self, name)}")

    def plan(self, steps: int) -> TreePlan:
        """A trunk of ODE steps with branches at every step but the last."""
        if steps < 2:
            raise UserError(f"tempflow-grpo: steps must be at least 2, got the protocol's {steps}")
        closed, trunk = Branches(sde(self.noise_level), self.branches, closed=True), Branches(ode)
        return TreePlan([*[[closed, trunk]] * (steps - 2), [closed]], steps)

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        plan, passes = self.plan(self.steps or steps), 1 if (self.guidance or guidance) == 1 else 2
        updated = plan.states(plan.stochastic_steps) * self.optim.epochs * passes / plan.images
        cost = {"rollout": plan.evaluations * passes / plan.images, "policy": 3 * updated, "ref": updated}
        return cost if self.kl else {role: cost[role] for role in ("rollout", "policy")}

    def collect(self, rig: Rig) -> Branchings:
        """Grow the trees, score the images, and give each branch its advantage among those of its state."""
        plan = self.plan(self.steps or rig.model.steps)
        branchings, reward = rig.trees(self.prompts, plan, seeds=self.seeds, guidance=self.guidance or None)
        advantage = standardise(leaf_means(reward[:, :, 0], branchings.first, branchings.leaves))
        rig.note("branches/informative", (advantage != 0).any(1).float().mean())
        return assign_branch_advantages(branchings, advantage.clamp(-self.adv_clip_max, self.adv_clip_max))

    def loss(self, rig: Rig, batch: Branchings) -> Tensor:
        """mean w_k max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl KL(policy || ref), over the branches of the states."""
        kernel, guidance = sde(self.noise_level), self.guidance or rig.model.guidance
        at = (batch.x, batch.t, batch.s, batch.prompt_ids)
        step = rig.step(kernel, *at, guidance=guidance, detach=self.detach_uncond)
        ratio = branch_ratios(rig, step, batch, self.clip_range)
        widths = step_widths(kernel, rig.path, rig.model.times(self.steps or rig.model.steps))[:-1].to(ratio)
        surrogate = (batch.weight * clipped_surrogate(ratio, batch.advantage, self.clip_range)).sum(1)
        loss = ((widths / widths.mean())[batch.step.to(ratio.device)] * surrogate).mean()
        if self.kl:
            kl = batch.weight.sum(1) * step.kl(rig.step(kernel, *at, weights="ref", guidance=guidance))
            rig.note("policy/kl", kl.mean())
            loss = loss + self.kl * kl.mean()
        return loss
