"""DDPO: denoising as a decision process, trained by policy gradient on the steps of DDIM with noise.

Black et al., arXiv 2305.13301; code kvablack/ddpo-pytorch at 1958463.

A step of DDIM with eta = 1 is a Gaussian action with a density p. The score function estimator ("sf") is REINFORCE; with
importance sampling ("is") several updates share a rollout, and PPO's clip bounds the ratio rho = exp(log p - log p_old):
  sf    loss = mean -A log p                                     exact at the policy that sampled only: one update a rollout
  is    loss = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))
log p is a mean over the elements of a latent, as in the code. A = (r - m) / (std + 1e-6) with the statistics of the prompt's last
`buffer_size` rewards, kept over iterations; while a prompt has fewer than `min_count`, with those of the iteration. So images
of one prompt need not be drawn together: the code draws a prompt for each image (`group` 1).
Of the published models it trains SD1.5. On a flow path DDIM's step has the same form (`flow.ddim`), and the last step, which
ends at the image, has no noise and is not trained; on SD1.5's grid it has noise, and the code trains it.
Differs from the code: rows of an update are single transitions of the whole batch, there whole images; images whose advantage is 0
are left out, as are all where the rewards behind the statistics are equal; an image without a score enters no statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import ddim
from ..bench.losses import clipped_surrogate
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Transitions, assign_advantages


@dataclass(frozen=True)
class DDPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 2e-3),
        "clip_range": LogUniform(1e-5, 1e-2),
        "buffer_size": Choice((16, 32)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=4))
    prompts: int = 256  # prompts per iteration
    group: int = 1  # images per prompt; 1 in the code
    estimator: Literal["is", "sf"] = "is"  # importance sampling with PPO's clip, or the score function
    buffer_size: int = 16  # last rewards of a prompt that its statistics are of
    min_count: int = 16  # rewards of a prompt below which the statistics are the iteration's
    adv_clip_max: float = 5.0  # advantages are clamped to [-adv_clip_max, adv_clip_max]
    clip_range: float = 1e-4  # PPO's clip of the ratio
    eta: float = 1.0  # of DDIM's noise; 1 is ancestral sampling
    timestep_fraction: float = 0.99  # trained steps: the first int(steps * timestep_fraction)
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        one_update = self.optim.epochs == self.optim.minibatches == 1
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 1, "at least 1"),
            ("prompts", self.prompts * self.group >= 2, "at least 2 where group is 1: an image needs another to compare with"),
            ("estimator", self.estimator == "is" or (self.estimator == "sf" and one_update),
             "is, or sf with optim.epochs and optim.minibatches 1"),
            ("buffer_size", self.buffer_size >= 2, "at least 2"),
            ("min_count", 2 <= self.min_count <= self.buffer_size, f"2 to buffer_size {self.buffer_size}"),
            ("adv_clip_max", self.adv_clip_max > 0, "above 0"),
            ("clip_range", self.clip_range > 0, "above 0"),
            ("eta", 0 < self.eta <= 1, "above 0 and at most 1"),
            ("timestep_fraction", 0 < self.timestep_fraction <= 1, "above 0 and at most 1"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"ddpo: {name} must be {rule}, got {getattr(self, name)}")

    def trained_steps(self, steps: int) -> int:
        """How many steps of a rollout of `steps` steps are trained."""
        if int(steps * self.timestep_fraction) < 1:
            raise UserError(f"ddpo: timestep_fraction {self.timestep_fraction} of steps {steps} leaves none to train")
        return int(steps * self.timestep_fraction)

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        return {"rollout": steps * passes, "policy": 3 * self.trained_steps(steps) * self.optim.epochs * passes}

    def collect(self, rig: Rig) -> Transitions:
        """Sample images by DDIM with noise, score them, and give each trained transition its image's advantage."""
        steps = self.steps or rig.model.steps
        trained = self.trained_steps(steps)
        if trained == steps and float(rig.model.times(steps)[-1]) == 0:
            raise UserError(
                "ddpo: timestep_fraction must be below 1 on this model: its last step ends at the image and has no noise"
            )
        transitions, reward = rig.transitions(
            self.prompts, self.group, [ddim(self.eta)] * steps, keep=range(trained), guidance=self.guidance or None
        )
        prompt_of = dict(zip(transitions.image.tolist(), transitions.prompt_ids.tolist(), strict=True))
        prompt_ids = [prompt_of[image] for image in range(reward.numel())]
        buffers: dict[str, list[float]] = rig.state.get("rewards", {})
        advantage, rig.state["rewards"] = running_advantages(
            reward.flatten(), prompt_ids, buffers, self.buffer_size, self.min_count
        )
        limit = self.adv_clip_max
        return assign_advantages(transitions, advantage.clamp(-limit, limit).view_as(reward))

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        """mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) over transitions; sf: mean -A log p."""
        guidance = self.guidance or rig.model.guidance
        step = rig.step(ddim(self.eta), batch.x, batch.t, batch.s, batch.prompt_ids, guidance=guidance)
        logp = step.logp(batch.to)
        ratio = (logp - batch.logp).exp()
        rig.note("policy/ratio", ratio.mean())
        if self.estimator == "sf":
            return (-batch.advantage * logp).mean()
        rig.note("policy/clipped", ((ratio - 1).abs() > self.clip_range).float().mean())
        return clipped_surrogate(ratio, batch.advantage, self.clip_range).mean()


def running_advantages(
    reward: Tensor, prompt_ids: list[int], buffers: Mapping[str, list[float]], size: int, min_count: int
) -> tuple[Tensor, dict[str, list[float]]]:
    """(N,): (r - m) / (std + 1e-6), m and population std of each prompt's last rewards; and the buffers with the new rewards.

    Rewards that are not finite get 0 and enter nothing. Where all rewards of the statistics are equal the advantage is 0.

    Args:
        reward: (N,).
        prompt_ids: N of them.
        buffers: a prompt's id as text -> its last rewards.
        size: the longest buffer.
        min_count: rewards of a prompt below which the statistics are those of all N.
    """
    value = reward.double()
    finite, ids = value.isfinite(), torch.tensor(prompt_ids, device=value.device)
    updated, advantage = {key: list(rewards) for key, rewards in buffers.items()}, torch.zeros_like(value)
    for prompt in dict.fromkeys(prompt_ids):
        rows = finite & (ids == prompt)
        own = [*updated.get(str(prompt), []), *value[rows].tolist()][-size:]
        updated[str(prompt)] = own
        population = value.new_tensor(own) if len(own) >= min_count else value[finite]
        if bool(rows.any()) and bool(population.max() > population.min()):
            advantage[rows] = (value[rows] - population.mean()) / (population.std(correction=0) + 1e-6)
    return advantage.to(reward), updated
