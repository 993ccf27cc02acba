"""GRPO-Guard: Flow-GRPO with ratios that are centred and of one scale on every step, so that clipping acts as intended.

Wang et al., arXiv 2510.22319; code scripts/train_sd3_GRPO_Guard.py in Flow-GRPO's repository.

With mu the mean of a step, std its standard deviation and eps its noise, Flow-GRPO's ratio is
  log rho = -mean (mu_old - mu)^2 / (2 std^2) - mean (mu_old - mu) eps / std,
below 0 in the mean, and wide where std is small. Guard drops the first term and multiplies the second by std:
  rho  = exp(-mean (mu_old - mu) eps)
  loss = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) / dt
The division by the step's length dt makes every step's gradient weigh the same, 1 + noise_level^2 / 2 (the first step's, from
pure noise, 1).
Differs from the code: the dropped term is taken from each transition (the code averages it over the whole batch, one `mean`
over an empty list of dimensions), and rows are single transitions drawn from the whole batch, there whole images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import sde
from ..bench.losses import clipped_surrogate, guard_log_ratio, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Transitions, Uniform, assign_advantages


@dataclass(frozen=True)
class GRPOGuard:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip_range": LogUniform(1e-6, 1e-3),
        "noise_level": Uniform(0.4, 1.0),
        "std": Choice(("group", "global")),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, minibatches=2, ema=0.9, ema_interval=8))
    prompts: int = 48  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    std: Literal["group", "global", "none"] = "group"  # standard deviation that divides the rewards
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max]
    clip_range: float = 2e-6  # PPO's clip of the guarded ratio
    noise_level: float = 0.7  # of the stochastic step
    timestep_fraction: float = 0.99  # trained steps: the first int(steps * timestep_fraction)
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has nothing to be compared with"),
            ("adv_clip_max", self.adv_clip_max > 0, "above 0"),
            ("clip_range", self.clip_range > 0, "above 0"),
            ("noise_level", self.noise_level > 0, "above 0"),
            (
                "timestep_fraction",
                0 < self.timestep_fraction < 1,
                "between 0 and 1: the last step is never trained",
            ),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"grpo-guard: {name} must be {rule}, got {getattr(self, name)}")

    def trained_steps(self, steps: int) -> int:
        """How many steps of a rollout of `steps` steps are trained."""
        if int(steps * self.timestep_fraction) < 1:
            raise UserError(
                f"grpo-guard: timestep_fraction {self.timestep_fraction} of steps {steps} leaves none to train"
            )
        return int(steps * self.timestep_fraction)

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        return {"rollout": steps * passes, "policy": 3 * self.trained_steps(steps) * self.optim.epochs * passes}

    def collect(self, rig: Rig) -> Transitions:
        """Sample P groups stochastically, score the images, and give each trained transition its image's advantage."""
        steps = self.steps or rig.model.steps
        kernels, trained = [sde(self.noise_level)] * steps, range(self.trained_steps(steps))
        transitions, reward = rig.transitions(
            self.prompts, self.group, kernels, keep=trained, guidance=self.guidance or None
        )
        limit = self.adv_clip_max
        return assign_advantages(transitions, standardise(reward, self.std).clamp(-limit, limit))

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) / dt over transitions, rho = exp(-mean (mu_old - mu) eps)."""
        step = rig.step(
            sde(self.noise_level), batch.x, batch.t, batch.s, batch.prompt_ids,
            guidance=self.guidance or rig.model.guidance, detach=self.detach_uncond,
        )  # fmt: skip
        ratio = guard_log_ratio(step.mean, batch.mean, batch.to, step.std).exp()
        rig.note("policy/ratio", ratio.mean())
        rig.note("policy/clipped", ((ratio - 1).abs() > self.clip_range).float().mean())
        return (clipped_surrogate(ratio, batch.advantage, self.clip_range) / (batch.t - batch.s)).mean()
