"""Direct Group Preference Optimization (DGPO): a group-wise DPO loss on images of a deterministic sampler.

Luo et al., arXiv 2510.08425; code Luo-Yihong/DGPO.

The images of a group share t and eps, so that with advantages that sum to zero the unknown normaliser cancels (Eqs. 8-17):
  loss = mean_i w A_i e_i + kl mean (v - v_ref)^2,   w = sigmoid((beta / G) sum_i A_i (e_i - e_ref,i)) held constant
Its gradient is that of -log sigmoid(-(beta / G) sum_i A_i (e_i - e_ref,i)) / beta: beta shapes the sigmoid and scales nothing.

In its code and not in the paper: `timesteps` distinct times of the sampler's own grid, drawn once per iteration from the first
trunc_steps + 1 and shared by all groups; an image whose ratio to the copy "old" has moved by more than clip_range in the
direction of its advantage is held constant; that copy follows the policy after each update, with decay min(0.3, 0.001 k) for k
updates before it, and draws the images once more than `switch_ema_ref` updates are made.
Differs from its code: steps and times are those of the model's own grid (there DPM-Solver++'s, whose first seven of ten end at
.67, here at .60); where an iteration has several updates, the copy follows once, after all of them; groups of equal rewards are
dropped, since only the KL would learn from them; the KL leaves out images that could not be scored; an iteration counts as its
updates even where every group was dropped; no prompts are emptied (5 % there); the recipes without guidance (a guided KL, the
copy as the reference) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import dpm2, mix, ode
from ..bench.losses import dgpo, implicit_accuracy, informative, masked_mean, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, select_rows


@dataclass(frozen=True)
class TimedGroups:
    """N pairs of a group of G images and a time at which it is trained."""

    x0: Tensor  # (N, G, C, h, w)
    prompt_ids: Tensor  # (N,)
    t: Tensor  # (N,)
    reward: Tensor  # (N, G); NaN where the image could not be scored
    advantage: Tensor  # (N, G); 0 where the reward is NaN


@dataclass(frozen=True)
class DGPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 1000),
        "kl": LogUniform(1e-4, 1e-1),
        "clip_range": LogUniform(1e-3, 1e-1),
        "timesteps": Choice((1, 2, 4)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    timesteps: int = 4  # timesteps per group, M
    trunc_steps: int = 6  # times are of the sampler's first trunc_steps + 1: late ones would teach few-step blur
    beta: float = 100.0  # how soon the sigmoid saturates: the strength of the trust region
    clip_range: float = 1e-2  # clip of the ratio exp(e_old - e); 0: none, which saves the old copy's evaluations
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max]
    std: Literal["group", "global", "none"] = "global"  # standard deviation that divides the rewards
    kl: float = 0.02  # weight of mean (v - v_ref)^2
    switch_ema_ref: int = 200  # the copy "old" draws the images once more updates than this are made
    solver: Literal["dpm2", "ode"] = "dpm2"
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"dgpo: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1 or self.timesteps < 1:
            raise UserError(f"dgpo: prompts and timesteps must be at least 1, got {self.prompts} and {self.timesteps}")
        if not (self.beta > 0 and self.adv_clip_max > 0):
            raise UserError(f"dgpo: beta and adv_clip_max must be above 0, got {self.beta} and {self.adv_clip_max}")
        for name in ("clip_range", "kl", "switch_ema_ref", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"dgpo: {name} must not be negative, got {getattr(self, name)}")
        if self.trunc_steps + 1 < self.timesteps:
            raise UserError(
                f"dgpo: {self.timesteps} timesteps cannot be drawn from trunc_steps + 1 = {self.trunc_steps + 1}"
            )

    @property
    def latents(self) -> int:
        return self.group

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.timesteps * self.optim.epochs
        old = {"old": times} if self.clip_range else {}
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, "ref": times, **old}

    def collect(self, rig: Rig) -> TimedGroups:
        """Sample and score P groups; the rows are every group whose rewards differ, at every time drawn."""
        grid = rig.model.times(self.steps or rig.model.steps)[:-1][: self.trunc_steps + 1]
        if len(grid) < self.timesteps:
            raise UserError(f"dgpo: {self.timesteps} timesteps cannot be drawn from a sampler of {len(grid)} steps")
        updates = rig.iteration * self.optim.epochs * self.optim.minibatches
        # after the first update the decay is still 0: the copy is equal to the policy
        rig.model.update_copy("old", min(0.3, 0.001 * max(0, updates - 1)))
        groups = rig.groups(
            self.prompts, self.group, steps=self.steps, guidance=self.guidance or None,
            weights="old" if updates > self.switch_ema_ref else "policy", kernel=dpm2 if self.solver == "dpm2" else ode,
        )  # fmt: skip
        uniform = rig.uniform(len(grid))
        t = grid.to(uniform)[uniform.argsort()[: self.timesteps]]
        advantage = standardise(groups.reward, self.std).clamp(-self.adv_clip_max, self.adv_clip_max)
        rows = informative(groups.reward).nonzero().flatten().repeat_interleave(self.timesteps)
        selected = select_rows(groups, rows)
        return TimedGroups(
            selected.x0, selected.prompt_ids, t.repeat(len(rows) // self.timesteps),
            selected.reward, advantage[rows],
        )  # fmt: skip

    def loss(self, rig: Rig, batch: TimedGroups) -> Tensor:
        """mean_i w A_i e_i + kl mean (v - v_ref)^2, a mean over (group, time); one eps per group and time."""
        shape = batch.advantage
        t = batch.t.repeat_interleave(self.group)
        eps = rig.noise(len(batch.prompt_ids)).repeat_interleave(self.group, 0)
        prompt_ids = batch.prompt_ids.repeat_interleave(self.group)
        x, target = mix(rig.path, batch.x0.flatten(0, 1), eps, t)
        v, v_ref = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", "ref"))
        error, error_ref = (rig.error(u, target, t).view_as(shape) for u in (v, v_ref))
        drift = rig.error(v, v_ref, t).view_as(shape)
        error_old = None
        if self.clip_range:
            error_old = rig.error(rig.velocity(x, t, prompt_ids, weights="old"), target, t).view_as(shape)
            rig.note("policy/ratio", (error_old - error).detach().exp().mean())
        kl = masked_mean(batch.reward.isfinite(), drift).mean()
        rig.note("policy/accuracy", implicit_accuracy(batch.reward, error, error_ref))
        rig.note("policy/kl", kl)
        preference = dgpo(batch.advantage, error, error_ref, self.beta, old=error_old, clip=self.clip_range)
        return preference.mean() + self.kl * kl
