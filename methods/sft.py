"""Supervised fine-tuning on filtered images (SFT): flow matching on the best image of each group of the model's own.

The online baseline of Flow-GRPO, arXiv 2505.05470, Sec. 5.2 and App. C.1; code yifan123/flow_grpo.

  loss = mean over the best images of (v - v*)^2,   t logit-normal, then shifted as the schedule of the model
Images that tie at the group's maximum are all kept, as in the code.
Differs from the code: a group of equal rewards is skipped (the code would learn from all of it); samples come from the ODE, not
a stochastic sampler (loss and selection do not depend on the sampler); `kl` is not in the paper and 0 by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix, training_times
from ..bench.losses import best_of_group, informative
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class BestImages:
    """N images, the best of their groups, each repeated `timesteps` times."""

    x0: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)


@dataclass(frozen=True)
class SFT:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(3e-5, 3e-4),
        "kl": Choice((0.0, 1.0, 4.0)),
        "t_min": Uniform(0, 0.8),
        "timesteps": Choice((1, 2, 4, 8)),
        "group": Choice((4, 8, 16)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    timesteps: int = 1  # timesteps per kept image and epoch
    timestep_shift: float = 0.0  # shift of the times of training; 0: the model's own, 1: none (flow.training_times)
    t_min: float = 0.0  # t is drawn from [t_min, 1]: few-step images are a little blurred, low noise would teach that
    kl: float = 0.0  # weight of mean (v - v_ref)^2; 0 saves its evaluations
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"sft: a group needs at least two images to choose from, got group={self.group}")
        if self.prompts < 1 or self.timesteps < 1:
            raise UserError(f"sft: prompts and timesteps must be at least 1, got {self.prompts} and {self.timesteps}")
        for name in ("kl", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"sft: {name} must not be negative, got {getattr(self, name)}")
        if not self.timestep_shift >= 0:
            raise UserError(f"sft: timestep_shift must not be negative, got {self.timestep_shift}")
        if not 0 <= self.t_min < 1:
            raise UserError(f"sft: t_min is a time in [0, 1), got {self.t_min}")

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes = 1 if (self.guidance or guidance) == 1 else 2
        times = self.timesteps * self.optim.epochs / self.group  # one image of a group; ties cost more
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, **({"ref": times} if self.kl else {})}

    def collect(self, rig: Rig) -> BestImages:
        """Sample and score P groups; keep the best images of those whose rewards differ."""
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        images, prompt_ids = groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group)
        is_best = (best_of_group(groups.reward) & informative(groups.reward)[:, None]).flatten()
        rows = is_best.nonzero().flatten().repeat_interleave(self.timesteps)
        return select_rows(BestImages(images, prompt_ids), rows)

    def loss(self, rig: Rig, batch: BestImages) -> Tensor:
        """mean (v - v*)^2 + kl mean (v - v_ref)^2, a mean over the kept images and their times."""
        u = rig.normal(len(batch.prompt_ids)).sigmoid()
        t = training_times(u, rig.path, self.t_min, self.timestep_shift)
        x, target = mix(rig.path, batch.x0, rig.noise(len(batch.prompt_ids)), t)
        v = rig.velocity(x, t, batch.prompt_ids)
        loss = rig.error(v, target, t).mean()
        if self.kl:
            kl = rig.error(v, rig.velocity(x, t, batch.prompt_ids, weights="ref"), t).mean()
            rig.note("policy/kl", kl)
            loss = loss + self.kl * kl
        return loss
