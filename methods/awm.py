"""Advantage Weighted Matching (AWM): flow matching on the model's own images, each weighted by its advantage.

Xue et al., arXiv 2509.25050; code scxue/advantage_weighted_matching.

The flow-matching error of a finished image replaces minus its log-likelihood, so any sampler will do (Theorems 1 and 2):
  ell  = -weighting(mean (v - (eps - x0))^2, t)
  rho  = exp(ell - ell_old), both at the same (t, eps)
  loss = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) + kl mean (v - v_ref)^2 + ema_kl mean (v - v_old)^2
On policy, the default, ell_old is ell held constant: rho = 1, and the loss is flow matching weighted by A. Off policy the
lagged copy "old" draws the images and gives ell_old.

In its code and not in the paper: the weighting "ghuber", the third term (kl and ema_kl are the code's beta and ema_beta),
A = clamp(A, -5, 5) / 5, and times taken from the sampler's own grid: one time from each of `timesteps` equal strata
between the second time (the first is pure noise) and the end of the first 90 %.
Differs from its code: deterministic solvers instead of the stochastic SA-Solver; each image draws its own times, not one
set per micro-batch; groups of equal rewards and images without a score are dropped, since only the two penalties would
learn from them; an iteration counts as its updates even where every group was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import dpm2, mix, ode
from ..bench.losses import clipped_surrogate, informative, log_likelihood_proxy, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class AdvantageBatch:
    """N images with their advantages."""

    x0: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)
    advantage: Tensor  # (N,) in [-1, 1]


@dataclass(frozen=True)
class AWM:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "kl": LogUniform(1e-4, 1e-1),
        "ema_kl": LogUniform(1e-2, 10),
        "timestep_fraction": Uniform(0.6, 0.9),
        "timesteps": Choice((1, 2, 4)),
        "weighting": Choice(("uniform", "ghuber")),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    timesteps: int = 2  # timesteps per image, Kt: one from each of as many strata
    timestep_fraction: float = 0.9  # trained timesteps: the first int(steps * timestep_fraction) of the sampler's
    with_init: bool = False  # also pure noise, the sampler's first time
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"  # of the error (losses.log_likelihood_proxy)
    clip_range: float = 1.0  # PPO's clip of the ratio
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max], then divided by it
    std: Literal["group", "global", "none"] = "global"  # standard deviation that divides the rewards
    kl: float = 0.001  # weight of mean (v - v_ref)^2; 0 saves its evaluations
    ema_kl: float = 1.0  # weight of mean (v - v_old)^2: a trust region around the slowly moving copy "old"
    off_policy: bool = False  # the lagged copy "old" draws the images, and ell_old is its
    solver: Literal["dpm2", "ode"] = "dpm2"
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 1.0  # guidance of the rollout, 1 as published; 0: the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"awm: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1 or self.timesteps < 1:
            raise UserError(f"awm: prompts and timesteps must be at least 1, got {self.prompts} and {self.timesteps}")
        if not (self.clip_range > 0 and self.adv_clip_max > 0):
            raise UserError(
                f"awm: clip_range and adv_clip_max must be above 0, got {self.clip_range} and {self.adv_clip_max}"
            )
        for name in ("kl", "ema_kl", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"awm: {name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.timestep_fraction <= 1:
            raise UserError(f"awm: timestep_fraction must lie in (0, 1], got {self.timestep_fraction}")
        if self.steps:
            self.strata(self.steps)

    def strata(self, steps: int) -> list[int]:
        """timesteps + 1 bounds [first, ..., end) of the strata of grid indices; [1, 2, 4, 6, 8, 10, 12] for 6 of 14 steps.

        Raises UserError when there are more strata than indices.
        """
        first, end = 0 if self.with_init else 1, int(steps * self.timestep_fraction)
        if end - first < self.timesteps:
            raise UserError(
                f"awm: {self.timesteps} timesteps, but a sampler of {steps} steps has {max(0, end - first)}"
            )
        return [first + (end - first) * i // self.timesteps for i in range(self.timesteps + 1)]

    @property
    def needs_old(self) -> bool:
        """True where the loss evaluates the copy "old"."""
        return self.ema_kl > 0 or self.off_policy

    @property
    def latents(self) -> int:
        return self.timesteps

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.timesteps * self.optim.epochs
        others = {"ref": times} if self.kl else {}
        others |= {"old": times} if self.needs_old else {}
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, **others}

    def collect(self, rig: Rig) -> AdvantageBatch:
        """Sample and score P groups; keep the scored images of groups whose rewards differ; standardise."""
        self.strata(self.steps or rig.model.steps)
        if self.needs_old:  # a decay of 0 at the start: equal to the policy
            rig.model.update_copy("old", min(0.3, 0.001 * rig.iteration * self.optim.epochs * self.optim.minibatches))
        groups = rig.groups(
            self.prompts, self.group, steps=self.steps, guidance=self.guidance or None,
            weights="old" if self.off_policy else "policy", kernel=dpm2 if self.solver == "dpm2" else ode,
        )  # fmt: skip
        limit = self.adv_clip_max
        advantage = standardise(groups.reward, self.std).clamp(-limit, limit) / limit
        images, prompt_ids = groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group)
        usable = (informative(groups.reward)[:, None] & groups.reward.isfinite()).flatten()
        return select_rows(AdvantageBatch(images, prompt_ids, advantage.flatten()), usable)

    def loss(self, rig: Rig, batch: AdvantageBatch) -> Tensor:
        """PPO's loss of A and rho + kl mean (v - v_ref)^2 + ema_kl mean (v - v_old)^2, a mean over images and their times."""
        t = self.times(rig, len(batch.prompt_ids)).flatten()
        x0, prompt_ids, advantage = (
            part.repeat_interleave(self.timesteps, 0) for part in (batch.x0, batch.prompt_ids, batch.advantage)
        )
        x, target = mix(rig.path, x0, rig.noise(len(x0)), t)
        v = rig.velocity(x, t, prompt_ids)
        ell = ell_old = log_likelihood_proxy(rig.error(v, target, t), t, self.weighting)
        penalty = torch.zeros_like(ell)
        if self.kl:
            drift = rig.error(v, rig.velocity(x, t, prompt_ids, weights="ref"), t)
            rig.note("policy/kl", drift.mean())
            penalty = penalty + self.kl * drift
        if self.needs_old:
            v_old = rig.velocity(x, t, prompt_ids, weights="old")
            penalty = penalty + self.ema_kl * rig.error(v, v_old, t)
            ell_old = log_likelihood_proxy(rig.error(v_old, target, t), t, self.weighting) if self.off_policy else ell
        ratio = (ell - ell_old.detach()).exp()
        rig.note("policy/ratio", ratio.mean())
        return (clipped_surrogate(ratio, advantage, self.clip_range) + penalty).mean()

    def times(self, rig: Rig, rows: int) -> Tensor:
        """(rows, timesteps): for each row one time of the sampler's grid from each stratum."""
        steps = self.steps or rig.model.steps
        uniform = rig.uniform(rows * self.timesteps).view(rows, self.timesteps)
        bounds = torch.tensor(self.strata(steps)).to(uniform)
        low, width = bounds[:-1], bounds.diff()
        index = low + (uniform * width).floor().minimum(width - 1)  # a product may round up to the width
        return rig.model.times(steps).to(uniform)[index.long()]
