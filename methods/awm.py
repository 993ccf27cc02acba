"""AWM: every image is learnt, or unlearnt, by flow matching in proportion to how much better it is than its group.

Advantage Weighted Matching, Xue et al., arXiv 2509.25050; code scxue/advantage_weighted_matching.

The flow-matching error of a finished image stands for minus its log-likelihood, so that any sampler will do (its Thms. 1 and 2):
  ell = fits(mean (v - (eps - x0))^2, t),  rho = exp(ell - ell_old) with the same (t, eps) in both,
  loss = mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) + beta mean (v - v_ref)^2 + ema_beta mean (v - v_old)^2.
On policy, the default, ell_old is ell held constant: rho = 1, and the loss is flow matching weighted by A.
From its code only: the form "ghuber", the third term, A = clamp(A, -5, 5) / 5, and times of the sampler's own grid, one
from each of `timesteps` equal strata between the second time (the first is pure noise) and the last but a tenth.
Not as in the code: its stochastic SA-Solver gives way to the deterministic solvers at hand; each image draws its own
times, not one set a micro-batch; groups without spread and images without a score are dropped, since only the two distances
would learn from them; iterations count as their updates even where every group was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import dpm2, mix, ode
from ..bench.losses import clipped, fits, informative, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class Praised:
    """N images, each with its advantage."""

    x0: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)
    adv: Tensor  # (N,) in [-1, 1]


@dataclass(frozen=True)
class AWM:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(1e-4, 1e-1),
        "ema_beta": LogUniform(1e-2, 10),
        "until": Uniform(0.6, 0.9),
        "timesteps": Choice((1, 2, 4)),
        "form": Choice(("uniform", "ghuber")),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # groups an iteration
    group: int = 24  # images a prompt
    timesteps: int = 2  # at which an image is learnt from, Kt; as many strata
    until: float = 0.9  # the part of the sampler's grid that is learnt at, from the noisy end
    init: bool = False  # also at pure noise, the grid's first time
    form: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"  # of the log-likelihood: losses.fits
    clip: float = 1.0  # of the ratio
    bound: float = 5.0  # advantages are clamped to [-bound, bound], then divided by it
    std: Literal["group", "global", "none"] = "global"  # what rewards are divided by
    beta: float = 0.001  # weight of mean (v_live - v_ref)^2
    ema_beta: float = 1.0  # weight of mean (v_live - v_old)^2: a trust region around the recent past
    off_policy: bool = False  # ell_old is the old copy's
    solver: Literal["dpm2", "ode"] = "dpm2"
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 1.0  # of the rollout, as published; 0 is the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"awm: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1 or self.timesteps < 1:
            raise UserError(f"awm: prompts and timesteps must be at least 1, got {self.prompts} and {self.timesteps}")
        if not (self.clip > 0 and self.bound > 0):
            raise UserError(f"awm: clip and bound must be above 0, got {self.clip} and {self.bound}")
        for name in ("beta", "ema_beta", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"awm: {name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.until <= 1:
            raise UserError(f"awm: until is a part of the grid in (0, 1], got {self.until}")
        if self.steps:
            self.strata(self.steps)

    def strata(self, steps: int) -> list[int]:
        """timesteps + 1 bounds [first, ..., end) of the strata of grid indices; [1, 2, 4, 6, 8, 10, 12] for 6 of 14 steps.

        Raises UserError when there are more strata than indices.
        """
        first, end = 0 if self.init else 1, int(steps * self.until)
        if end - first < self.timesteps:
            raise UserError(
                f"awm: {self.timesteps} timesteps, but a sampler of {steps} steps has {max(0, end - first)}"
            )
        return [first + (end - first) * i // self.timesteps for i in range(self.timesteps + 1)]

    @property
    def trails(self) -> bool:
        """Is the old copy needed?"""
        return self.ema_beta > 0 or self.off_policy

    @property
    def latents(self) -> int:
        return self.timesteps

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.timesteps * self.optim.epochs
        others = {"ref": times} if self.beta else {}
        others |= {"old": times} if self.trails else {}
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, **others}

    def collect(self, rig: Rig) -> Praised:
        """Sample and score P groups; keep the scored images of those whose rewards differ; standardise."""
        self.strata(self.steps or rig.model.steps)
        if self.trails:  # decay 0 at the start: equal to the live weights
            rig.model.update_copy("old", min(0.3, 0.001 * rig.iteration * self.optim.epochs * self.optim.minibatches))
        groups = rig.groups(
            self.prompts, self.group, steps=self.steps, guidance=self.guidance or None,
            kernel=dpm2 if self.solver == "dpm2" else ode,
        )  # fmt: skip
        adv = standardise(groups.reward, self.std).clamp(-self.bound, self.bound) / self.bound
        batch = Praised(groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group), adv.flatten())
        return select_rows(batch, (informative(groups.reward)[:, None] & groups.reward.isfinite()).flatten())

    def loss(self, rig: Rig, batch: Praised) -> Tensor:
        """PPO's loss of A and rho + beta mean (v - v_ref)^2 + ema_beta mean (v - v_old)^2, over images and their times."""
        t = self.times(rig, len(batch.prompt_ids)).flatten()
        x0, prompt_ids, adv = (
            part.repeat_interleave(self.timesteps, 0) for part in (batch.x0, batch.prompt_ids, batch.adv)
        )
        x, target = mix(rig.path, x0, rig.noise(len(x0)), t)
        v = rig.velocity(x, t, prompt_ids)
        ell = old = fits(rig.error(v, target, t), t, self.form)
        penalty = torch.zeros_like(ell)
        if self.beta:
            drift = rig.error(v, rig.velocity(x, t, prompt_ids, weights="ref"), t)
            rig.note("policy/kl", drift.mean())
            penalty = penalty + self.beta * drift
        if self.trails:
            v_old = rig.velocity(x, t, prompt_ids, weights="old")
            penalty = penalty + self.ema_beta * rig.error(v, v_old, t)
            old = fits(rig.error(v_old, target, t), t, self.form) if self.off_policy else ell
        ratio = (ell - old.detach()).exp()
        rig.note("policy/ratio", ratio.mean())
        return (clipped(ratio, adv, self.clip) + penalty).mean()

    def times(self, rig: Rig, rows: int) -> Tensor:
        """(rows, timesteps): for each row one time of the sampler's grid from each stratum."""
        steps = self.steps or rig.model.steps
        chance = rig.uniform(rows * self.timesteps).view(rows, self.timesteps)
        bounds = torch.tensor(self.strata(steps)).to(chance)
        low, width = bounds[:-1], bounds.diff()
        index = low + (chance * width).floor().minimum(width - 1)  # a product may round up to the width
        return rig.model.times(steps).to(chance)[index.long()]
