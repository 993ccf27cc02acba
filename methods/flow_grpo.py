"""Flow-GRPO: make the sampler a walk with noise, then reinforce each of its steps by how well the image did in its group.

Flow-GRPO, Liu et al., arXiv 2505.05470 (code: yifan123/flow_grpo); coefficients-preserving noise, arXiv 2509.05952.

Every step of the walk is a Gaussian action, so the policy has a likelihood ratio, rho = exp(log p_live - log p_then), and the
loss is PPO's on each of them. log p is a mean over the D elements of a latent: log rho shrinks as 1 / sqrt(D), hence the tiny clips.
As in the authors' code: the last step is never learnt from (its noise is nearly 0), images whose advantage is 0 are left
out, and the first of the two updates is on-policy. Here the rows of an update are single transitions drawn from the whole batch;
there they are whole images. With a window (the code's "fast" variant) only a few steps in a row, placed at random, are noisy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import Kernel, cps, ode, sde
from ..bench.losses import clipped, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Transitions, Uniform, assign_advantages


@dataclass(frozen=True)
class FlowGRPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip": LogUniform(1e-5, 1e-2),
        "noise_level": Uniform(0.4, 1.0),
        "kl": Choice((0.0, 0.004, 0.04)),
        "std": Choice(("group", "global")),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=2, ema=0.9))
    prompts: int = 48  # groups an iteration
    group: int = 24  # images a prompt
    std: Literal["group", "global", "none"] = "global"  # what rewards are divided by
    adv_clip: float = 5.0  # advantages are held within this
    clip: float = 1e-4  # of the ratio
    kl: float = 0.04  # weight of the KL to the reference; 0 asks no reference
    kl_form: Literal["code", "paper"] = "code"  # paper: the Gaussian KL; code: that times dt
    sampler: Literal["sde", "cps"] = "sde"  # the noisy step; cps: its log p is -mean (x - mean)^2
    noise_level: float = 0.7  # of the noisy step; cps: its eta
    fraction: float = 0.99  # of the steps that are learnt from, the first int(steps * fraction)
    window: int = 0  # noisy steps in a row, the others being the ODE; 0: every step is noisy
    window_range: tuple[int, int] = (0, 5)  # the window lies in steps low, ..., high - 1
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 0.0  # of rollout and training; 0 is the protocol's

    def __post_init__(self) -> None:
        low, high = self.window_range
        for name, fine, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has nothing to be compared with"),
            ("adv_clip", self.adv_clip > 0, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("kl", self.kl >= 0, "at least 0"),
            ("noise_level", self.noise_level > 0 and (self.sampler == "sde" or self.noise_level <= 1), "above 0, for cps at most 1"),
            ("fraction", 0 < self.fraction < 1, "between 0 and 1: the last step is never learnt from"),
            ("window", self.window >= 0, "at least 0"),
            ("window_range", not self.window or (low >= 0 and high - low >= self.window), f"room for {self.window} steps"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not fine:
                raise UserError(f"flow-grpo: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def kernel(self) -> Kernel:
        return sde(self.noise_level) if self.sampler == "sde" else cps(self.noise_level)

    def learnt(self, steps: int) -> int:
        """How many steps of a rollout of so many are learnt from."""
        if self.window and self.window_range[1] > steps - 1:
            raise UserError(f"flow-grpo: window_range must end before step {steps - 1}, got {self.window_range}")
        if int(steps * self.fraction) < 1:
            raise UserError(f"flow-grpo: fraction {self.fraction} of steps {steps} leaves none to learn from")
        return self.window or int(steps * self.fraction)

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        learnt = self.learnt(steps) * self.optim.epochs
        cost = {"rollout": steps * passes, "policy": 3 * learnt * passes, "ref": learnt * passes}
        return cost if self.kl else {role: cost[role] for role in ("rollout", "policy")}

    def plan(self, rig: Rig) -> tuple[Sequence[Kernel], Sequence[int]]:
        """A kernel for each step and which steps are kept; a window's place is drawn anew each time."""
        steps = self.steps or rig.model.steps
        learnt = range(self.learnt(steps))
        if not self.window:
            return [self.kernel] * steps, learnt
        low, high = self.window_range
        places = high - low - self.window + 1
        start = low + min(int(rig.uniform(1, 0, places).item()), places - 1)  # float32 may round the draw up to the end
        rig.note("rollout/window", start)
        kept = [start + i for i in learnt]
        return [self.kernel if i in kept else ode for i in range(steps)], kept

    def collect(self, rig: Rig) -> Transitions:
        """Walk P groups with noise, score the ends, and credit each transition kept with its image's advantage."""
        kernels, kept = self.plan(rig)
        transitions, reward = rig.transitions(
            self.prompts, self.group, kernels, keep=kept, drop=self.sampler == "cps", guidance=self.guidance or None
        )
        return assign_advantages(transitions, standardise(reward, self.std).clamp(-self.adv_clip, self.adv_clip))

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl KL(live || ref), over transitions."""
        guidance, at = self.guidance or rig.model.guidance, (batch.x, batch.t, batch.s, batch.prompt_ids)
        step = rig.step(self.kernel, *at, guidance=guidance, detach=self.detach_uncond)
        ratio = (step.logp(batch.to, drop=self.sampler == "cps") - batch.logp).exp()
        rig.note("policy/ratio", ratio.mean())
        rig.note("policy/clipped", ((ratio - 1).abs() > self.clip).float().mean())
        loss = clipped(ratio, batch.adv, self.clip).mean()
        if self.kl:
            ref = rig.step(self.kernel, *at, weights="ref", guidance=guidance)
            # The authors' code leaves dt out of its SDE's KL, and keeps the whole variance in that of cps.
            kl = step.kl(ref, batch.t - batch.s if self.kl_form == "code" and self.sampler == "sde" else None).mean()
            rig.note("policy/kl", kl)
            loss = loss + self.kl * kl
        return loss
