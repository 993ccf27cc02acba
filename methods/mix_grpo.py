"""MixGRPO: noise and learning in a short window of the sampler's steps that slides from noise to image as training goes on.

MixGRPO, Li et al., arXiv 2507.21802 (code: Tencent-Hunyuan/MixGRPO, fastvideo/utils/sampling_utils.py).

Flow-GRPO's loss on the steps of the window; the others are the ODE. All images of a group start from one noise, so that
they differ only by what the window drew. The window moves on by `stride` steps every `every` iterations ("progressive constant",
the paper's best) and stays at the last place before the last step, where there is hardly any noise to learn from; the authors'
code lets it run out and learns from nothing. With a tail (MixGRPO-Flash) the steps after the window become fewer
steps of DPM-Solver++ of order 2; a stride of 0 keeps the window where it begins (Flash*).

The tail's grid is derived. The code takes equal steps in the time before its shift; here they are equal in the index of the model's
own schedule, which is the same for a uniform one and holds for any family. The code makes int(tail (n + 1)) points of the n steps
left, one step less than its ratio says, and stops short of the image when that is 1; here it is max(1, round(tail n))
steps, which gives the paper's mean of 16 evaluations. Its solver remembers the window's last estimate, here the tail begins with order 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import Kernel, cps, dpm2, ode, sde
from ..bench.losses import clipped, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Transitions, Uniform, assign_advantages


@dataclass(frozen=True)
class MixGRPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip": LogUniform(1e-5, 1e-2),
        "noise_level": Uniform(0.4, 1.0),
        "window": Choice((2, 3, 4)),
        "every": Choice((6, 12, 25)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=4))
    prompts: int = 32  # groups an iteration
    group: int = 12  # images a prompt, all from one noise
    std: Literal["group", "global", "none"] = "group"  # what rewards are divided by
    adv_clip: float = 5.0  # advantages are held within this
    clip: float = 1e-4  # of the ratio
    sampler: Literal["sde", "cps"] = "sde"  # the noisy step; cps: its log p is -mean (x - mean)^2
    noise_level: float = 0.7  # of the noisy step; cps: its eta
    window: int = 2  # noisy steps in a row; the paper has 4 of 10 or of 25
    stride: int = 1  # steps the window moves at a time; 0: it never moves
    every: int = 25  # iterations between two moves
    tail: float = 0.0  # steps of the two-step solver for each step after the window; 0: the ODE
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # of the rollout before any compression; 0 is the protocol's number
    guidance: float = 0.0  # of rollout and training; 0 is the protocol's

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has nothing to be compared with"),
            ("adv_clip", self.adv_clip > 0, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("noise_level", self.noise_level > 0 and (self.sampler == "sde" or self.noise_level <= 1), "above 0, for cps at most 1"),
            ("window", self.window >= 1, "at least 1"),
            ("stride", self.stride >= 0, "at least 0"),
            ("every", self.every >= 1, "at least 1"),
            ("tail", 0 <= self.tail <= 1, "between 0 and 1"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not fine:
                raise UserError(f"mix-grpo: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def kernel(self) -> Kernel:
        return sde(self.noise_level) if self.sampler == "sde" else cps(self.noise_level)

    def plan(self, iteration: int, steps: int) -> list[Kernel]:
        """A kernel for each step that is walked in this iteration."""
        if self.window >= steps:
            raise UserError(f"mix-grpo: window must be shorter than the {steps} steps, got {self.window}")
        start = min(iteration // self.every * self.stride, steps - 1 - self.window)
        left = steps - start - self.window
        tail = [dpm2] * max(1, round(self.tail * left)) if self.tail else [ode] * left
        return [*[ode] * start, *[self.kernel] * self.window, *tail]

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """With the window at its first place; under a tail the rollout grows as the window moves on."""
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        rollout, learnt = len(self.plan(0, steps)), self.window * self.optim.epochs
        return {"rollout": rollout * passes, "policy": 3 * learnt * passes}

    def collect(self, rig: Rig) -> Transitions:
        """Walk P groups with noise inside the window, score the ends, and credit the window's transitions."""
        steps = self.steps or rig.model.steps
        kernels = self.plan(rig.iteration, steps)
        start = kernels.index(self.kernel)
        after = start + self.window
        rig.note("rollout/window", start)
        transitions, reward = rig.transitions(
            self.prompts, self.group, kernels, times=coarser(rig.model.times(steps), after, len(kernels) - after),
            drop=self.sampler == "cps", shared=True, guidance=self.guidance or None,
        )  # fmt: skip
        return assign_advantages(transitions, standardise(reward, self.std).clamp(-self.adv_clip, self.adv_clip))

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)), over transitions."""
        step = rig.step(
            self.kernel, batch.x, batch.t, batch.s, batch.prompt_ids,
            guidance=self.guidance or rig.model.guidance, detach=self.detach_uncond,
        )  # fmt: skip
        ratio = (step.logp(batch.to, drop=self.sampler == "cps") - batch.logp).exp()
        rig.note("policy/ratio", ratio.mean())
        rig.note("policy/clipped", ((ratio - 1).abs() > self.clip).float().mean())
        return clipped(ratio, batch.adv, self.clip).mean()


def coarser(times: Tensor, start: int, tail: int) -> Tensor:
    """A falling grid whose steps from index `start` on are replaced by `tail` steps, equal in the index of that grid."""
    at = torch.linspace(start, len(times) - 1, tail + 1, dtype=torch.float64)
    left = at.long().clamp(max=len(times) - 2)
    return torch.cat([times[:start], torch.lerp(times[left], times[left + 1], (at - left).to(times))])
