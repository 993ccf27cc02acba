"""RWR: the model learns all of its own images, those its scorer liked more with more weight.

Reward-weighted regression, the online baseline of Flow-GRPO, arXiv 2505.05470, Sec. 5.2 and App. C.1; code yifan123/flow_grpo.

  loss = mean w (v - v*)^2,   t logit-normal,   w = softmax of the group's rewards (the paper) or the reward itself (the code).
Derivation: softmax weights are times the number of the group's scored images, so that w is 1 on average and the learning rate
means what it does for plain flow matching; `temperature` is 1 in the paper's words; samples come from the ODE instead of a
stochastic sampler; groups without spread, whose weights are all equal, are skipped; `kl` is not in the paper and 0 by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix
from ..bench.losses import informative, likelihood_weights, weighted_error
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class Weighted:
    """N images with what each weighs, each as often as it is learnt in a pass."""

    x0: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)
    weight: Tensor  # (N,)


@dataclass(frozen=True)
class RWR:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(3e-5, 3e-4),
        "kl": Choice((0.0, 1.0, 4.0)),
        "temperature": LogUniform(0.02, 1),
        "noisy": Uniform(0, 0.8),
        "timesteps": Choice((1, 2, 4)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # groups an iteration
    group: int = 24  # images a prompt
    weights: Literal["softmax", "raw"] = "softmax"
    temperature: float = 1.0  # of the softmax, in units of reward: low learns the best only, high learns all alike
    timesteps: int = 1  # at which an image is learnt in a pass
    noisy: float = 0.0  # t is drawn from [noisy, 1]: few-step images are a little blurred, low noise would teach that
    kl: float = 0.0  # weight of mean (v_live - v_ref)^2; 0 saves the evaluations
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 0.0  # of the rollout; 0 is the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"rwr: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1 or self.timesteps < 1:
            raise UserError(f"rwr: prompts and timesteps must be at least 1, got {self.prompts} and {self.timesteps}")
        if not self.temperature > 0:
            raise UserError(f"rwr: temperature must be above 0, got {self.temperature}")
        for name in ("kl", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"rwr: {name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.noisy < 1:
            raise UserError(f"rwr: noisy is a time in [0, 1), got {self.noisy}")

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.timesteps * self.optim.epochs
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, **({"ref": times} if self.kl else {})}

    def collect(self, rig: Rig) -> Weighted:
        """Sample and score P groups; weigh the scored images of those whose rewards differ."""
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        reward = groups.reward
        weight = likelihood_weights(reward, self.temperature) if self.weights == "softmax" else reward
        batch = Weighted(groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group), weight.flatten())
        kept = (informative(reward)[:, None] & reward.isfinite()).flatten()
        return select_rows(batch, kept.nonzero().flatten().repeat_interleave(self.timesteps))

    def loss(self, rig: Rig, batch: Weighted) -> Tensor:
        """mean w (v - v*)^2 + kl mean (v - v_ref)^2, averaged over images and their times."""
        t = self.noisy + (1 - self.noisy) * rig.normal(len(batch.prompt_ids)).sigmoid()
        x, target = mix(rig.path, batch.x0, rig.noise(len(batch.prompt_ids)), t)
        v = rig.velocity(x, t, batch.prompt_ids)
        loss = weighted_error(rig.error(v, target, t), batch.weight).mean()
        if self.kl:
            drift = rig.error(v, rig.velocity(x, t, batch.prompt_ids, weights="ref"), t).mean()
            rig.note("policy/kl", drift)
            loss = loss + self.kl * drift
        return loss
