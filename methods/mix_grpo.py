"""MixGRPO: Flow-GRPO on a short window of stochastic steps that slides from noise to image as training goes on.

Li et al., arXiv 2507.21802; code Tencent-Hunyuan/MixGRPO, fastvideo/utils/sampling_utils.py.

  loss = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)),   rho = exp(log p - log p_old), over the window's steps
The other steps are ODE steps. All images of a group start from one noise, so that they differ only by what the window drew.
The window moves on by `window_stride` steps every `shift_interval` iterations ("progressive constant", the paper's best). After
its last place, which leaves out the last step, where there is hardly any noise to learn from, it rolls back to the first one,
as the scripts say (`roll_back`). With a compress_ratio (MixGRPO-Flash) the steps after the window become fewer steps of
DPM-Solver++ of order 2; a window_stride of 0 keeps the window where it begins (Flash*).

Differs from the code: before it rolls back, its window shrinks over the last steps until it is empty, and nothing is learnt for
`shift_interval` iterations; here it keeps its length and rolls back at once. It takes equal steps after the window in the time
before its shift; here they are equal in the index of the model's own schedule, which is the same for a uniform one and holds
for any model family. It makes int(compress_ratio (n + 1)) points of the n steps left, one step less than its ratio says, and
stops short of the image when that is 1; here it is max(1, round(compress_ratio n)) steps, which gives the paper's mean of 16
evaluations. Its solver remembers the window's last estimate, here the compressed steps begin with order 1. Of several rewards
it adds up the advantages; here a reward is one number, which may be a blend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import Kernel, cps, dpm2, ode, sde
from ..bench.losses import clipped_surrogate, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Transitions, Uniform, assign_advantages

STD_EPS = 1e-8  # added to the deviation of a group's rewards, fastvideo/train_grpo_flux.py


@dataclass(frozen=True)
class MixGRPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip_range": LogUniform(1e-5, 1e-2),
        "noise_level": Uniform(0.4, 1.0),
        "window_size": Choice((2, 3, 4)),
        "shift_interval": Choice((6, 12, 25)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=4))
    prompts: int = 32  # prompts per iteration, one group each
    group: int = 12  # images per prompt, all from one noise
    std: Literal["group", "global", "none"] = "group"  # standard deviation that divides the rewards
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max]
    clip_range: float = 1e-4  # PPO's clip of the ratio
    sde_type: Literal["sde", "cps"] = "sde"  # the stochastic step; cps: its log p is -mean (x - mean)^2
    noise_level: float = 0.7  # of the stochastic step; cps: its eta
    window_size: int = 2  # stochastic steps in a row; the paper has 4 of 10 or of 25
    window_stride: int = 1  # steps by which the window moves; 0: it never moves
    shift_interval: int = 25  # iterations between two moves
    roll_back: bool = True  # after its last place the window begins anew; False: it stays there
    compress_ratio: float = 0.0  # DPM-Solver++ steps per step after the window; 0: ODE steps, as many as before
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # sampler steps of the rollout before any compression; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has nothing to be compared with"),
            ("adv_clip_max", self.adv_clip_max > 0, "above 0"),
            ("clip_range", self.clip_range > 0, "above 0"),
            ("noise_level", self.noise_level > 0 and (self.sde_type == "sde" or self.noise_level <= 1), "above 0, for cps at most 1"),
            ("window_size", self.window_size >= 1, "at least 1"),
            ("window_stride", self.window_stride >= 0, "at least 0"),
            ("shift_interval", self.shift_interval >= 1, "at least 1"),
            ("compress_ratio", 0 <= self.compress_ratio <= 1, "between 0 and 1"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"mix-grpo: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def kernel(self) -> Kernel:
        return sde(self.noise_level) if self.sde_type == "sde" else cps(self.noise_level)

    def plan(self, iteration: int, steps: int) -> list[Kernel]:
        """The kernel of each sampler step of this iteration."""
        if self.window_size >= steps:
            raise UserError(f"mix-grpo: window_size must be shorter than the {steps} steps, got {self.window_size}")
        moves, last = iteration // self.shift_interval, steps - 1 - self.window_size
        if self.roll_back and self.window_stride:
            moves %= last // self.window_stride + 1
        start = min(moves * self.window_stride, last)
        left = steps - start - self.window_size
        after = [dpm2] * max(1, round(self.compress_ratio * left)) if self.compress_ratio else [ode] * left
        return [*[ode] * start, *[self.kernel] * self.window_size, *after]

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """With the window at its first place; with a compress_ratio the rollout grows as the window moves on."""
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        rollout, trained = len(self.plan(0, steps)), self.window_size * self.optim.epochs
        return {"rollout": rollout * passes, "policy": 3 * trained * passes}

    def collect(self, rig: Rig) -> Transitions:
        """Sample P groups, stochastically inside the window, score them, and give the window's transitions their advantages."""
        steps = self.steps or rig.model.steps
        kernels = self.plan(rig.iteration, steps)
        start = kernels.index(self.kernel)
        end = start + self.window_size
        rig.note("rollout/window", start)
        transitions, reward = rig.transitions(
            self.prompts, self.group, kernels, times=compress_grid(rig.model.times(steps), end, len(kernels) - end),
            drop=self.sde_type == "cps", shared=True, guidance=self.guidance or None,
        )  # fmt: skip
        limit = self.adv_clip_max
        advantage = standardise(reward, self.std, eps=STD_EPS, ddof=1)  # the sample deviation, as in the code
        return assign_advantages(transitions, advantage.clamp(-limit, limit))

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)), over transitions."""
        step = rig.step(
            self.kernel, batch.x, batch.t, batch.s, batch.prompt_ids,
            guidance=self.guidance or rig.model.guidance, detach=self.detach_uncond,
        )  # fmt: skip
        ratio = (step.logp(batch.to, drop=self.sde_type == "cps") - batch.logp).exp()
        rig.note("policy/ratio", ratio.mean())
        rig.note("policy/clipped", ((ratio - 1).abs() > self.clip_range).float().mean())
        return clipped_surrogate(ratio, batch.advantage, self.clip_range).mean()


def compress_grid(times: Tensor, start: int, steps: int) -> Tensor:
    """A falling grid with its steps from index `start` on replaced by `steps` steps, equal in the index of that grid."""
    at = torch.linspace(start, len(times) - 1, steps + 1, dtype=torch.float64)
    left = at.long().clamp(max=len(times) - 2)
    return torch.cat([times[:start], torch.lerp(times[left], times[left + 1], (at - left).to(times))])
