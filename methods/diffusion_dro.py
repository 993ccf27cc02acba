"""Diffusion-DRO: expert images must be denoised better than the states that the policy itself visits, by a margin.

Direct Ranking Optimization, arXiv 2510.18353, Eqs. 12 and 15; code basiclab/DiffusionDRO, train.py.

Preference learning as inverse reinforcement learning: no pairs, and no reward model in the loop.
  e(x)    = error of the policy minus that of the reference, a mean over the elements of a latent
  loss    = max(0, e(expert at t) - e(own state at t) + margin)
The expert's target is the noise it was mixed with. The policy's own state comes of its unguided sampler; its target is what the
policy predicted there while it sampled, a constant. At the start the second error is 0 and the loss is that of fine-tuning on
experts; it stops where experts are already told from own states by the margin.
Differs from paper and code: their experts are the 500 best images of Pick-a-Pic v2 by a scorer; here they are the best of the
model's own groups, sampled within the budget. Each iteration draws its own states anew, where the code keeps a buffer of four
images, by the ODE instead of DPM-Solver++. How the code perturbs the sampler's times was not found in full: here every inner
time of the grid is drawn between the midpoints to its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix, ode
from ..bench.losses import informative
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, select_rows


@dataclass(frozen=True)
class ExpertStates:
    """N experts, each with a state of the policy's own at one time, and the velocity that it had there."""

    expert: Tensor  # (N, C, h, w), clean
    state: Tensor  # (N, C, h, w) at t
    velocity: Tensor  # (N, C, h, w) of the policy that sampled, at the state
    t: Tensor  # (N,)
    prompt_ids: Tensor  # (N,)


@dataclass(frozen=True)
class DiffusionDRO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(3e-5, 1e-3),
        "margin": LogUniform(1e-4, 1e-1),
        "timesteps": Choice((1, 2, 4)),
        "group": Choice((4, 8, 16)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, minibatches=1))
    prompts: int = 8  # prompts per iteration, one expert each
    group: int = 24  # images of which the best is the expert
    timesteps: int = 4  # own states per expert, at different times
    margin: float = 1e-3  # by how much own states should be denoised worse
    states: int = 0  # steps of the unguided sampler that makes the own states; 0: as `steps`
    steps: int = 0  # sampler steps of the group's images; 0: the protocol's
    guidance: float = 0.0  # guidance of the group's images; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: the best of one image is no expert"),
            ("timesteps", self.timesteps >= 1, "at least 1"),
            ("margin", self.margin >= 0, "at least 0"),
            ("states", self.states >= 0, "at least 0"),
            ("steps", self.steps >= 0, "at least 0"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"diffusion-dro: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def latents(self) -> int:
        return 2

    def sampler_steps(self, steps: int) -> int:
        """Steps that make the own states. steps: the protocol's."""
        count = self.states or self.steps or steps
        if count < self.timesteps:
            raise UserError(f"diffusion-dro: {self.timesteps} timesteps cannot be drawn from {count} steps")
        return count

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """Of each image of a group; the expert's own states and its updates are divided by the group."""
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.timesteps * self.optim.epochs / self.group
        rollout = (self.steps or steps) * passes + self.sampler_steps(steps) / self.group
        return {"rollout": rollout, "policy": 2 * 3 * times, "ref": 2 * times}

    def collect(self, rig: Rig) -> ExpertStates:
        """Sample and score P groups, keep the best image of each; walk once more for its prompt and keep some states."""
        count = self.sampler_steps(rig.model.steps)
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        groups = select_rows(groups, informative(groups.reward))
        n = len(groups.prompt_ids)
        if not n:
            none = groups.x0[:, 0]
            return ExpertStates(none, none, none, groups.reward[:, 0], groups.prompt_ids)
        experts = groups.x0[torch.arange(n), groups.reward.nan_to_num(-torch.inf).argmax(1)]
        x, v, t = self.own_states(rig, groups.prompt_ids, count)
        kept = (
            rig.uniform(n * count).view(n, count).argsort(dim=1)[:, : self.timesteps]
        )  # of each prompt, distinct steps
        rows = (kept * n + torch.arange(n, device=kept.device)[:, None]).flatten()
        return ExpertStates(
            experts.repeat_interleave(self.timesteps, 0), x[rows], v[rows], t[rows],
            groups.prompt_ids.repeat_interleave(self.timesteps),
        )  # fmt: skip

    @torch.no_grad()
    def own_states(self, rig: Rig, prompt_ids: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The states, velocities and times of one unguided walk for each prompt, step after step: (count N, ...)."""
        x = rig.noise(len(prompt_ids))
        grid = rig.model.times(count).to(x)
        middle = (grid[:-1] + grid[1:]) / 2  # falling, as the grid
        inner = middle[1:] + (middle[:-1] - middle[1:]) * rig.uniform(count)[1:]
        grid = torch.cat([grid[:1], inner, grid[-1:]])
        states: list[Tensor] = []
        velocities: list[Tensor] = []
        for t, s in zip(grid[:-1].split(1), grid[1:].split(1), strict=True):
            t, s = t.expand(len(x)), s.expand(len(x))
            v = rig.velocity(x, t, prompt_ids, role="rollout")
            states.append(x)
            velocities.append(v)
            x = ode(rig.path, x, v, t, s).mean
        return torch.cat(states), torch.cat(velocities), grid[:-1].repeat_interleave(len(prompt_ids))

    def loss(self, rig: Rig, batch: ExpertStates) -> Tensor:
        """max(0, e(expert) - e(own state) + margin), a mean over rows."""
        n = len(batch.t)
        noisy, target = mix(rig.path, batch.expert, rig.noise(n), batch.t)
        x, targets = torch.cat([noisy, batch.state]), torch.cat([target, batch.velocity])
        t, prompt_ids = batch.t.repeat(2), batch.prompt_ids.repeat(2)
        v, v_ref = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", "ref"))
        expert, own = (rig.error(v, targets, t) - rig.error(v_ref, targets, t)).view(2, n)
        rig.note("policy/kl", rig.error(v, v_ref, t).mean())
        rig.note("policy/ranked", (expert - own < -self.margin).float().mean())  # nothing is left to learn from these
        return (expert - own + self.margin).clamp(min=0).mean()
