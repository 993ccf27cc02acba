"""Flow-GRPO: PPO with group-relative advantages on the steps of a stochastic sampler.

Liu et al., arXiv 2505.05470; code yifan123/flow_grpo. Coefficients-preserving sampling (CPS): arXiv 2509.05952.

Every step of the SDE sampler is a Gaussian action with a density p, so the policy has a likelihood ratio:
  rho  = exp(log p - log p_old)
  loss = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) + kl KL(policy || reference)
log p is a mean over the D elements of a latent: log rho shrinks as 1 / sqrt(D), hence the small clips.
As in the code: the last step is never trained (its noise is nearly 0), images whose advantage is 0 are left out, and the
first of the two updates is on-policy. With a window (the code's "fast" variant) only a few steps in a row, placed at random,
are stochastic.
Differs from the code: the rows of an update are single transitions drawn from the whole batch; there they are whole images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import Kernel, cps, ode, sde
from ..bench.losses import clipped_surrogate, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Transitions, Uniform, assign_advantages


@dataclass(frozen=True)
class FlowGRPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip_range": LogUniform(1e-5, 1e-2),
        "noise_level": Uniform(0.4, 1.0),
        "kl": Choice((0.0, 0.004, 0.04)),
        "std": Choice(("group", "global")),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=2, ema=0.9, ema_interval=8))
    prompts: int = 48  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    std: Literal["group", "global", "none"] = "global"  # standard deviation that divides the rewards
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max]
    clip_range: float = 1e-4  # PPO's clip of the ratio
    kl: float = 0.04  # weight of the KL to the reference; 0 saves its evaluations
    kl_form: Literal["code", "paper"] = "code"  # paper: the Gaussian KL; code: that times dt
    sde_type: Literal["sde", "cps"] = "sde"  # the stochastic step; cps: its log p is -mean (x - mean)^2
    noise_level: float = 0.7  # of the stochastic step; cps: its eta
    timestep_fraction: float = 0.99  # trained steps: the first int(steps * timestep_fraction)
    window_size: int = 0  # stochastic steps in a row, the others are ODE steps; 0: all are stochastic
    window_range: tuple[int, int] = (0, 5)  # the window lies in steps low, ..., high - 1
    detach_uncond: bool = False  # no gradient through the unconditional branch of guidance
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        low, high = self.window_range
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has nothing to be compared with"),
            ("adv_clip_max", self.adv_clip_max > 0, "above 0"),
            ("clip_range", self.clip_range > 0, "above 0"),
            ("kl", self.kl >= 0, "at least 0"),
            ("noise_level", self.noise_level > 0 and (self.sde_type == "sde" or self.noise_level <= 1), "above 0, for cps at most 1"),
            ("timestep_fraction", 0 < self.timestep_fraction < 1, "between 0 and 1: the last step is never trained"),
            ("window_size", self.window_size >= 0, "at least 0"),
            ("window_range", not self.window_size or (low >= 0 and high - low >= self.window_size), f"room for {self.window_size} steps"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"flow-grpo: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def kernel(self) -> Kernel:
        return sde(self.noise_level) if self.sde_type == "sde" else cps(self.noise_level)

    def trained_steps(self, steps: int) -> int:
        """How many steps of a rollout of `steps` steps are trained."""
        if self.window_size and self.window_range[1] > steps - 1:
            raise UserError(f"flow-grpo: window_range must end before step {steps - 1}, got {self.window_range}")
        if int(steps * self.timestep_fraction) < 1:
            raise UserError(
                f"flow-grpo: timestep_fraction {self.timestep_fraction} of steps {steps} leaves none to train"
            )
        return self.window_size or int(steps * self.timestep_fraction)

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        trained = self.trained_steps(steps) * self.optim.epochs
        cost = {"rollout": steps * passes, "policy": 3 * trained * passes, "ref": trained * passes}
        return cost if self.kl else {role: cost[role] for role in ("rollout", "policy")}

    def plan(self, rig: Rig) -> tuple[Sequence[Kernel], Sequence[int]]:
        """The kernel of each step, and the indices of the trained steps; the window's place is drawn anew each time."""
        steps = self.steps or rig.model.steps
        trained = range(self.trained_steps(steps))
        if not self.window_size:
            return [self.kernel] * steps, trained
        low, high = self.window_range
        places = high - low - self.window_size + 1
        start = low + min(int(rig.uniform(1, 0, places).item()), places - 1)  # float32 may round the draw up to the end
        rig.note("rollout/window", start)
        window = [start + i for i in trained]
        return [self.kernel if i in window else ode for i in range(steps)], window

    def collect(self, rig: Rig) -> Transitions:
        """Sample P groups stochastically, score the images, and give each trained transition its image's advantage."""
        kernels, trained = self.plan(rig)
        transitions, reward = rig.transitions(
            self.prompts, self.group, kernels, keep=trained, drop=self.sde_type == "cps", guidance=self.guidance or None
        )
        limit = self.adv_clip_max
        return assign_advantages(transitions, standardise(reward, self.std).clamp(-limit, limit))

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl KL(policy || ref), over transitions."""
        guidance, at = self.guidance or rig.model.guidance, (batch.x, batch.t, batch.s, batch.prompt_ids)
        step = rig.step(self.kernel, *at, guidance=guidance, detach=self.detach_uncond)
        ratio = (step.logp(batch.to, drop=self.sde_type == "cps") - batch.logp).exp()
        rig.note("policy/ratio", ratio.mean())
        rig.note("policy/clipped", ((ratio - 1).abs() > self.clip_range).float().mean())
        loss = clipped_surrogate(ratio, batch.advantage, self.clip_range).mean()
        if self.kl:
            ref = rig.step(self.kernel, *at, weights="ref", guidance=guidance)
            # The authors' code leaves dt out of its SDE's KL, and keeps the whole variance in that of cps.
            kl = step.kl(ref, batch.t - batch.s if self.kl_form == "code" and self.sde_type == "sde" else None).mean()
            rig.note("policy/kl", kl)
            loss = loss + self.kl * kl
        return loss
