"""GRPO-Guard: Flow-GRPO whose ratios are centred and of one scale on every step, so that clipping binds where it should.

GRPO-Guard, Wang et al., arXiv 2510.22319 (code: scripts/train_sd3_GRPO_Guard.py in Flow-GRPO's repository).

With mu the mean of a step, std its width and eps its noise, Flow-GRPO's log rho = -mean (mu_then - mu)^2 / (2 std^2) -
mean (mu_then - mu) eps / std: below 0 in the mean, and wide where std is small. Guard drops the first term and multiplies the second by
std; its loss is divided by the step's length dt, which makes every step's gradient weigh the same, 1 + noise_level^2 / 2
(the first step's, from pure noise, 1).
Two deviations from the authors' code: the dropped term is taken from each transition (the code averages it over the whole batch,
one `mean` over an empty list of dimensions), and rows are single transitions drawn from the whole batch, there whole images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import sde
from ..bench.losses import clipped, guarded, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Transitions, Uniform, assign_advantages


@dataclass(frozen=True)
class GRPOGuard:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip": LogUniform(1e-6, 1e-3),
        "noise_level": Uniform(0.4, 1.0),
        "std": Choice(("group", "global")),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, minibatches=2, ema=0.9))
    prompts: int = 48  # groups an iteration
    group: int = 24  # images a prompt
    std: Literal["group", "global", "none"] = "group"  # what rewards are divided by
    adv_clip: float = 5.0  # advantages are held within this
    clip: float = 2e-6  # of the guarded ratio
    noise_level: float = 0.7  # of the walk
    fraction: float = 0.99  # of the steps that are learnt from, the first int(steps * fraction)
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 0.0  # of rollout and training; 0 is the protocol's

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has nothing to be compared with"),
            ("adv_clip", self.adv_clip > 0, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("noise_level", self.noise_level > 0, "above 0"),
            ("fraction", 0 < self.fraction < 1, "between 0 and 1: the last step is never learnt from"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not fine:
                raise UserError(f"grpo-guard: {name} must be {rule}, got {getattr(self, name)}")

    def learnt(self, steps: int) -> int:
        """How many steps of a rollout of so many are learnt from."""
        if int(steps * self.fraction) < 1:
            raise UserError(f"grpo-guard: fraction {self.fraction} of steps {steps} leaves none to learn from")
        return int(steps * self.fraction)

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        return {"rollout": steps * passes, "policy": 3 * self.learnt(steps) * self.optim.epochs * passes}

    def collect(self, rig: Rig) -> Transitions:
        """Walk P groups with noise, score the ends, and credit each transition kept with its image's advantage."""
        steps = self.steps or rig.model.steps
        kernels, kept = [sde(self.noise_level)] * steps, range(self.learnt(steps))
        transitions, reward = rig.transitions(
            self.prompts, self.group, kernels, keep=kept, guidance=self.guidance or None
        )
        return assign_advantages(transitions, standardise(reward, self.std).clamp(-self.adv_clip, self.adv_clip))

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) / dt over transitions, rho = exp(-mean (mu_then - mu) eps)."""
        step = rig.step(
            sde(self.noise_level), batch.x, batch.t, batch.s, batch.prompt_ids,
            guidance=self.guidance or rig.model.guidance, detach=self.detach_uncond,
        )  # fmt: skip
        ratio = guarded(step.mean, batch.mean, batch.to, step.std).exp()
        rig.note("policy/ratio", ratio.mean())
        rig.note("policy/clipped", ((ratio - 1).abs() > self.clip).float().mean())
        return (clipped(ratio, batch.adv, self.clip) / (batch.t - batch.s)).mean()
