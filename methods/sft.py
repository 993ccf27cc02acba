"""SFT: of each group of its own images the model learns the best one, again and again.

Filtered fine-tuning, the online baseline of Flow-GRPO, arXiv 2505.05470, Sec. 5.2 and App. C.1; code yifan123/flow_grpo.

  loss = mean over the best images of (v - v*)^2,   t logit-normal: plain flow matching on what is kept.
Images that tie at the group's maximum are all kept, as in the code; a group without spread has no best one and is skipped (the
code would learn from all of it). Derivation: the code's samples come from a stochastic sampler, here from the ODE (loss and
selection know nothing of the sampler); `kl` is not in the paper and 0 by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix
from ..bench.losses import best, informative
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class Chosen:
    """N images to learn, each as often as it is learnt in a pass."""

    x0: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)


@dataclass(frozen=True)
class SFT:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(3e-5, 3e-4),
        "kl": Choice((0.0, 1.0, 4.0)),
        "noisy": Uniform(0, 0.8),
        "timesteps": Choice((1, 2, 4, 8)),
        "group": Choice((4, 8, 16)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # groups an iteration
    group: int = 24  # images a prompt
    timesteps: int = 1  # at which a kept image is learnt in a pass
    noisy: float = 0.0  # t is drawn from [noisy, 1]: few-step images are a little blurred, low noise would teach that
    kl: float = 0.0  # weight of mean (v_live - v_ref)^2; 0 saves the evaluations
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 0.0  # of the rollout; 0 is the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"sft: a group needs at least two images to choose from, got group={self.group}")
        if self.prompts < 1 or self.timesteps < 1:
            raise UserError(f"sft: prompts and timesteps must be at least 1, got {self.prompts} and {self.timesteps}")
        for name in ("kl", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"sft: {name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.noisy < 1:
            raise UserError(f"sft: noisy is a time in [0, 1), got {self.noisy}")

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes = 1 if (self.guidance or guidance) == 1 else 2
        times = self.timesteps * self.optim.epochs / self.group  # one image of a group; ties cost more
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, **({"ref": times} if self.kl else {})}

    def collect(self, rig: Rig) -> Chosen:
        """Sample and score P groups; keep the best images of those whose rewards differ."""
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        kept = (best(groups.reward) & informative(groups.reward)[:, None]).flatten()
        rows = kept.nonzero().flatten().repeat_interleave(self.timesteps)
        return select_rows(Chosen(groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group)), rows)

    def loss(self, rig: Rig, batch: Chosen) -> Tensor:
        """mean (v - v*)^2 + kl mean (v - v_ref)^2, averaged over the kept images and their times."""
        t = self.noisy + (1 - self.noisy) * rig.normal(len(batch.prompt_ids)).sigmoid()
        x, target = mix(rig.path, batch.x0, rig.noise(len(batch.prompt_ids)), t)
        v = rig.velocity(x, t, batch.prompt_ids)
        loss = rig.error(v, target, t).mean()
        if self.kl:
            drift = rig.error(v, rig.velocity(x, t, batch.prompt_ids, weights="ref"), t).mean()
            rig.note("policy/kl", drift)
            loss = loss + self.kl * drift
        return loss
