"""Reward-weighted regression (RWR): flow matching on all of the model's own images, weighted by their rewards.

The online baseline of Flow-GRPO, arXiv 2505.05470, Sec. 5.2 and App. C.1; code yifan123/flow_grpo.

  loss = mean w (v - v*)^2,   w = softmax of the group's rewards (the paper) or the reward itself (the code),
t logit-normal, then shifted as the schedule of the model. With w = exp(reward), over all groups alike, it is Flow-RWR of arXiv
2501.13918, Eq. 9 (`rwr:exp`): prompts with high rewards weigh more. That paper learns from a data set, here from own images, and
here these weights too are 1 on average, over the iteration: exp(22), of a PickScore, is no scale for a loss.
Differs from paper and code: softmax weights are multiplied by the number of the group's scored images, so that w is 1 on average
and the learning rate means what it does for plain flow matching; `temperature` is 1 in the paper's words; samples come from the
ODE instead of a stochastic sampler; groups of equal rewards, whose weights are all equal, are skipped; `kl` is not in the paper
and 0 by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix, training_times
from ..bench.losses import informative, likelihood_weights, weighted_error
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class WeightedImages:
    """N images with their weights, each repeated `timesteps` times."""

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
        "t_min": Uniform(0, 0.8),
        "timesteps": Choice((1, 2, 4)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    image_weights: Literal["softmax", "raw", "exp"] = "softmax"  # softmax of each group, the rewards, softmax of all
    temperature: float = 1.0  # of softmax and exp, in units of reward: low weights the best only
    timesteps: int = 1  # timesteps per image and epoch
    timestep_shift: float = 0.0  # shift of the times of training; 0: the model's own, 1: none (flow.training_times)
    t_min: float = 0.0  # t is drawn from [t_min, 1]: few-step images are a little blurred, low noise would teach that
    kl: float = 0.0  # weight of mean (v - v_ref)^2; 0 saves its evaluations
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

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
        if not self.timestep_shift >= 0:
            raise UserError(f"rwr: timestep_shift must not be negative, got {self.timestep_shift}")
        if not 0 <= self.t_min < 1:
            raise UserError(f"rwr: t_min is a time in [0, 1), got {self.t_min}")

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.timesteps * self.optim.epochs
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, **({"ref": times} if self.kl else {})}

    def collect(self, rig: Rig) -> WeightedImages:
        """Sample and score P groups; weight the scored images of groups whose rewards differ."""
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        reward = groups.reward
        weight = {
            "softmax": likelihood_weights(reward, self.temperature),
            "raw": reward,
            "exp": likelihood_weights(reward.view(1, -1), self.temperature).view_as(reward),
        }[self.image_weights]
        images, prompt_ids = groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group)
        usable = (informative(reward)[:, None] & reward.isfinite()).flatten()
        rows = usable.nonzero().flatten().repeat_interleave(self.timesteps)
        return select_rows(WeightedImages(images, prompt_ids, weight.flatten()), rows)

    def loss(self, rig: Rig, batch: WeightedImages) -> Tensor:
        """mean w (v - v*)^2 + kl mean (v - v_ref)^2, a mean over images and their times."""
        u = rig.normal(len(batch.prompt_ids)).sigmoid()
        t = training_times(u, rig.path, self.t_min, self.timestep_shift)
        x, target = mix(rig.path, batch.x0, rig.noise(len(batch.prompt_ids)), t)
        v = rig.velocity(x, t, batch.prompt_ids)
        loss = weighted_error(rig.error(v, target, t), batch.weight).mean()
        if self.kl:
            kl = rig.error(v, rig.velocity(x, t, batch.prompt_ids, weights="ref"), t).mean()
            rig.note("policy/kl", kl)
            loss = loss + self.kl * kl
        return loss
