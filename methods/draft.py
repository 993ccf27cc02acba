"""DRaFT: the reward's own gradient, through the sampler into the weights. With `adjoint` the backward pass is AdjointDPM's.

Clark et al., arXiv 2309.17400. Adjoint: Pan et al., arXiv 2307.10711; code HanshuYAN/AdjointDPM at bf707af.

With x_0(theta) the image that the sampler reaches and r a differentiable reward:
  loss = -mean r(decode(x_0(theta)))
  DRaFT     gradient through all T steps                                            last_steps = 0
  DRaFT-K   through the last K steps only; what lies before is a constant           last_steps = K
  DRaFT-LV  K = 1, and the image is noised `renoise` times to the last step's start, denoised by that step and scored again:
            more gradients of lower variance for no further sampling                renoise = n
The gradient in theta of an ODE's end is a backward ODE too, a(t) = dL / dx(t) with dL / dtheta = sum of (dx_next / dtheta)^T a:
with `adjoint` that is solved step by step, so that one step's activations are held and not K of them; its cost is one more
evaluation a step. AdjointDPM solves x backwards beside it, here the latents between steps are stored, so the
gradient is autograd's up to rounding.
It needs a scorer with a gradient (`spec.DifferentiableScorer`): PickScore, HPSv2, CLIPScore, no text recognition and no detector.
It sees what no other method here sees, and fits the scorer's blind spots too: read the held-out columns.
Neither the paper's constants nor its code were found: learning rate, batch and average in draft.toml are those of a comparison in
LeapAlign (arXiv 2604.15311). That the first image counts beside the n noised ones, and that their mean is taken
(the paper speaks of a sum; AdamW does not see the difference), is a reading. Where a schedule's last step is tiny (SD3's goes from
t = .0089) K = 1 trains next to nothing: take K = 2 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix, ode
from ..bench.spec import Choice, InitialNoise, LogUniform, Optim, Range, Rig


@dataclass(frozen=True)
class DRaFT:
    """The fields are the hyper-parameters; `collect` draws noise, `loss` samples, scores and is the equation."""

    space: ClassVar[Mapping[str, Range]] = {"optim.lr": LogUniform(1e-5, 1e-3), "last_steps": Choice((1, 2, 4))}
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=1))
    prompts: int = 64  # prompts per iteration
    group: int = 1  # images per prompt
    last_steps: int = 1  # K, the steps with a gradient; 0: all
    renoise: int = 0  # n of DRaFT-LV, with last_steps 1; 0: plain DRaFT-K
    adjoint: bool = False  # the backward pass solves the adjoint ODE; one step's activations are held
    steps: int = 0  # sampler steps; 0: the protocol's
    guidance: float = 0.0  # guidance of all steps; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 1, "at least 1"),
            ("last_steps", self.last_steps >= 0, "at least 0"),
            ("last_steps", not 0 < self.steps < self.last_steps, f"at most steps {self.steps}"),
            ("renoise", self.renoise >= 0, "at least 0"),
            ("renoise", not self.renoise or self.last_steps == 1, "0 where last_steps is not 1"),
            ("steps", self.steps >= 0, "at least 0"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"draft: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def latents(self) -> int:
        """Latents whose activations one row holds."""
        return 1 + self.renoise if self.renoise or self.adjoint else max(1, self.last_steps)

    @property
    def reward_backwards(self) -> float:
        return 1.0

    def gradient_steps(self, steps: int) -> int:
        """K, of a sampler of `steps` steps."""
        if self.last_steps > steps:
            raise UserError(
                f"draft: last_steps must be at most the {steps} steps of the sampler, got {self.last_steps}"
            )
        return self.last_steps or steps

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        k, images = self.gradient_steps(steps), 1 + self.renoise  # scored images of one sampling
        again = k if self.adjoint else 0
        return {"rollout": passes * ((steps - k) / images + again), "policy": 3 * passes * k}

    def collect(self, rig: Rig) -> InitialNoise:
        """Draw prompts and noise."""
        self.gradient_steps(self.steps or rig.model.steps)
        prompt_ids = rig.prompts(self.prompts).repeat_interleave(self.group)
        return InitialNoise(rig.noise(len(prompt_ids)), prompt_ids)

    def loss(self, rig: Rig, batch: InitialNoise) -> Tensor:
        """-mean r(decode(x_0)) over images; one without a score counts as 0 and has no gradient."""
        steps, guidance = self.steps or rig.model.steps, self.guidance or rig.model.guidance
        start = steps - self.gradient_steps(steps)
        x, prompt_ids = batch.noise, batch.prompt_ids
        for *_, x_next in rig.walk(x, prompt_ids, [ode] * start, of=steps, guidance=guidance):
            x = x_next

        def finish(x: Tensor) -> Tensor:
            return rig.sample_with_gradient(
                x, prompt_ids, steps=steps, start=start, guidance=guidance, adjoint=self.adjoint
            )

        x0 = finish(x)
        rewards = [rig.score_with_gradient(x0, prompt_ids)]
        t = rig.model.times(steps)[start].to(x).expand(len(x))
        for _ in range(self.renoise):
            noised, _ = mix(rig.path, x0.detach(), rig.noise(len(x)), t)
            rewards.append(rig.score_with_gradient(finish(noised), prompt_ids))
        reward = torch.stack(rewards)
        rig.note("reward/mean", reward.detach().nanmean())
        return -torch.where(reward.isfinite(), reward, 0.0).mean()
