"""DGPO: better and worse halves of a group of images are weighed against each other, with no noise in the sampler.

Direct Group Preference Optimization, Luo et al., arXiv 2510.08425; code Luo-Yihong/DGPO.

A group's images share t and eps, so that with advantages that sum to zero the unknown normaliser cancels (its Eqs. 8 to 17):
  loss = mean_i w A_i e_i + kl mean (v - v_ref)^2,   w = sigmoid((beta / G) sum_i A_i (e_i - e_ref,i)) held constant,
whose gradient is that of -log sigmoid(-(beta / G) sum_i A_i s_i) / beta: beta shapes the sigmoid and scales nothing.
From its code: `timesteps` distinct times of the sampler's own grid, drawn once an iteration from the first trunc + 1 and shared
by all groups; a member that has moved its own way by more than `clip` since the copy "old" is held constant; that copy follows
the weights with decay min(0.3, 0.001 updates) and takes the sampling over after `switch` updates.
Not as in the code: groups without spread are dropped, since only the KL would learn from them; the KL leaves out images that
could not be scored; iterations count as their updates even where every group was dropped; no prompts are emptied (5 % there);
the recipes without guidance (a guided KL, the copy as the reference) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import dpm2, mix, ode
from ..bench.losses import among, dgpo, implicit_accuracy, informative, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, select_rows


@dataclass(frozen=True)
class Timed:
    """N pairs of a group of G images and a time at which it is learnt from."""

    x0: Tensor  # (N, G, C, h, w)
    prompt_ids: Tensor  # (N,)
    t: Tensor  # (N,)
    reward: Tensor  # (N, G); NaN where the image could not be scored
    adv: Tensor  # (N, G); 0 there


@dataclass(frozen=True)
class DGPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 1000),
        "kl": LogUniform(1e-4, 1e-1),
        "clip": LogUniform(1e-3, 1e-1),
        "timesteps": Choice((1, 2, 4)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # groups an iteration
    group: int = 24  # images a prompt
    timesteps: int = 4  # at which a group is learnt from, M
    trunc: int = 6  # the times are among the first trunc + 1 of the sampler: late ones would teach few-step blur
    beta: float = 100.0  # how soon the sigmoid saturates: the strength of the trust region
    clip: float = 1e-2  # of the ratio exp(e_old - e_live); 0 is none, and saves the old copy's evaluations
    bound: float = 5.0  # advantages are clamped to [-bound, bound]
    std: Literal["group", "global", "none"] = "global"  # what rewards are divided by
    kl: float = 0.02  # weight of mean (v_live - v_ref)^2
    switch: int = 200  # updates after which the old copy samples
    solver: Literal["dpm2", "ode"] = "dpm2"
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 0.0  # of the rollout; 0 is the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"dgpo: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1 or self.timesteps < 1:
            raise UserError(f"dgpo: prompts and timesteps must be at least 1, got {self.prompts} and {self.timesteps}")
        if not (self.beta > 0 and self.bound > 0):
            raise UserError(f"dgpo: beta and bound must be above 0, got {self.beta} and {self.bound}")
        for name in ("clip", "kl", "switch", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"dgpo: {name} must not be negative, got {getattr(self, name)}")
        if self.trunc + 1 < self.timesteps:
            raise UserError(f"dgpo: {self.timesteps} timesteps cannot be drawn from trunc + 1 = {self.trunc + 1}")

    @property
    def latents(self) -> int:
        return self.group

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.timesteps * self.optim.epochs
        old = {"old": times} if self.clip else {}
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, "ref": times, **old}

    def collect(self, rig: Rig) -> Timed:
        """Sample and score P groups; the rows are every group whose rewards differ, at every time drawn."""
        grid = rig.model.times(self.steps or rig.model.steps)[:-1][: self.trunc + 1]
        if len(grid) < self.timesteps:
            raise UserError(f"dgpo: {self.timesteps} timesteps cannot be drawn from a sampler of {len(grid)} steps")
        updates = rig.iteration * self.optim.epochs * self.optim.minibatches
        rig.model.update_copy("old", min(0.3, 0.001 * updates))  # 0 at the start: equal to the live weights
        groups = rig.groups(
            self.prompts, self.group, steps=self.steps, guidance=self.guidance or None,
            weights="policy" if updates < self.switch else "old", kernel=dpm2 if self.solver == "dpm2" else ode,
        )  # fmt: skip
        chance = rig.uniform(len(grid))
        t = grid.to(chance)[chance.argsort()[: self.timesteps]]
        adv = standardise(groups.reward, self.std).clamp(-self.bound, self.bound)
        rows = informative(groups.reward).nonzero().flatten().repeat_interleave(self.timesteps)
        kept = select_rows(groups, rows)
        return Timed(kept.x0, kept.prompt_ids, t.repeat(len(rows) // self.timesteps), kept.reward, adv[rows])

    def loss(self, rig: Rig, batch: Timed) -> Tensor:
        """mean_i w A_i e_i + kl mean (v - v_ref)^2, averaged over (group, time); one eps for a group at a time."""
        t = batch.t.repeat_interleave(self.group)
        eps = rig.noise(len(batch.prompt_ids)).repeat_interleave(self.group, 0)
        prompt_ids = batch.prompt_ids.repeat_interleave(self.group)
        x, target = mix(rig.path, batch.x0.flatten(0, 1), eps, t)
        v, v_ref = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", "ref"))
        live, ref, drift = (
            rig.error(u, to, t).view_as(batch.adv) for u, to in ((v, target), (v_ref, target), (v, v_ref))
        )
        old = None
        if self.clip:
            old = rig.error(rig.velocity(x, t, prompt_ids, weights="old"), target, t).view_as(batch.adv)
            rig.note("policy/ratio", (old - live).detach().exp().mean())
        kl = among(batch.reward.isfinite(), drift).mean()
        rig.note("policy/accuracy", implicit_accuracy(batch.reward, live, ref))
        rig.note("policy/kl", kl)
        return dgpo(batch.adv, live, ref, self.beta, old=old, clip=self.clip).mean() + self.kl * kl
