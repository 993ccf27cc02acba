"""Diffusion Negative-aware FineTuning (DiffusionNFT): flow matching with a positive and a negative policy around the old one.

Zheng et al., arXiv 2509.16117; code NVlabs/DiffusionNFT.

With r the probability that an image is optimal, b = nft_beta, and v+- = v_old +- b (v - v_old) (Eq. 5 and Theorem 3.2):
  loss = r l(v+) + (1 - r) l(v-) + kl mean (v - v_ref)^2
Derivation, with l(v) = mean (v - v*)^2 and a = 2r - 1: r l(v+) + (1 - r) l(v-) = b^2 mean (v - [v_old + (a/b)(v* - v_old)])^2 + const,
so it is a regression to the old velocity moved toward (a > 0) or away from (a < 0) the image's own target v*.

In its code and not in the paper: l is a squared error of x0 divided by its own mean absolute error held constant, and the whole
is multiplied by adv_clip_max / b; r = clamp(A / (2 adv_clip_max) + 1/2, 0, 1); each image is trained at its own random choice
of the sampler's times, with fresh noise; the copy "old" draws the images, by a second-order solver without guidance, and
follows the policy with a decay that rises (`decay_type`). kl is its train.beta and nft_beta its config.beta.
Guidance is 1 by design: the network learns what guidance gave, so its gain is partly that (the protocol's guidance is
one setting away).
Differs from its code: groups of equal rewards and images without a score are dropped, since only the two penalties would learn
from them; an iteration counts as its updates even where every group was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import dpm2, mix, split
from ..bench.losses import diffusion_nft, informative, optimality_probability, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows

# Decay of the copy "old" by decay_type: (updates at 0, rise per update, highest value).
DECAY_SCHEDULES = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}


@dataclass(frozen=True)
class OptimalityBatch:
    """N images, each with the probability that it is optimal."""

    x0: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)
    optimality: Tensor  # (N,) in [0, 1]


@dataclass(frozen=True)
class DiffusionNFT:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "nft_beta": Choice((0.1, 0.3, 1.0)),
        "kl": LogUniform(1e-5, 1e-2),
        "t_min": Uniform(0, 0.6),
        "timesteps": Choice((1, 2, 4)),
        "decay_type": Choice((0, 1, 2)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    timesteps: int = 0  # timesteps per image; 0: 99 % of the sampler's, rounded down
    t_min: float = 0.0  # t is one of the sampler's times in [t_min, 1]
    nft_beta: float = 1.0  # b, the distance of the positive and the negative policy from the old one
    adv_clip_max: float = 5.0  # an image with this advantage is optimal with probability 1
    std: Literal["group", "global", "none"] = "global"  # standard deviation that divides the rewards
    kl: float = 1e-4  # weight of mean (v - v_ref)^2; 0 saves its evaluations
    decay_type: Literal[0, 1, 2] = 1  # of the copy "old": none; slow to 0.5; none for 75 updates, then fast to 0.999
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 1.0  # guidance of the rollout, 1 as published; 0: the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"diffusion-nft: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1:
            raise UserError(f"diffusion-nft: prompts must be at least 1, got {self.prompts}")
        if not (self.nft_beta > 0 and self.adv_clip_max > 0):
            got = f"{self.nft_beta} and {self.adv_clip_max}"
            raise UserError(f"diffusion-nft: nft_beta and adv_clip_max must be above 0, got {got}")
        for name in ("timesteps", "kl", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"diffusion-nft: {name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.t_min < 1:
            raise UserError(f"diffusion-nft: t_min is a time in [0, 1), got {self.t_min}")
        if self.decay_type not in DECAY_SCHEDULES:
            raise UserError(f"diffusion-nft: decay_type must be 0, 1 or 2, got {self.decay_type}")
        if self.steps and self.timesteps > self.steps:
            raise UserError(f"diffusion-nft: {self.timesteps} timesteps, but a sampler of {self.steps} steps")

    def trained_timesteps(self, steps: int) -> int:
        """Timesteps per image; steps: the protocol's number."""
        return self.timesteps or max(1, int((self.steps or steps) * 0.99))

    def old_decay(self, updates: int) -> float:
        """Decay of the copy "old" after so many updates."""
        flat, rise, top = DECAY_SCHEDULES[self.decay_type]
        return min(rise * max(0, updates - flat), top)

    @property
    def latents(self) -> int:
        return self.timesteps

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.trained_timesteps(steps) * self.optim.epochs
        ref = {"ref": times} if self.kl else {}
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, "old": times, **ref}

    def collect(self, rig: Rig) -> OptimalityBatch:
        """Sample P groups with the copy "old" and score them; keep the scored images of groups whose rewards differ."""
        self.grid(rig)
        rig.model.update_copy("old", self.old_decay(rig.iteration * self.optim.epochs * self.optim.minibatches))
        groups = rig.groups(
            self.prompts, self.group, steps=self.steps, guidance=self.guidance or None, weights="old", kernel=dpm2
        )
        optimality = optimality_probability(standardise(groups.reward, self.std), self.adv_clip_max)
        images, prompt_ids = groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group)
        usable = (informative(groups.reward)[:, None] & groups.reward.isfinite()).flatten()
        return select_rows(OptimalityBatch(images, prompt_ids, optimality.flatten()), usable)

    def loss(self, rig: Rig, batch: OptimalityBatch) -> Tensor:
        """(r l(v+) + (1 - r) l(v-)) adv_clip_max / b + kl mean (v - v_ref)^2, a mean over images and their times."""
        times = self.times(rig, len(batch.prompt_ids))
        t, k = times.flatten(), times.shape[1]
        x0, prompt_ids, r = (part.repeat_interleave(k, 0) for part in (batch.x0, batch.prompt_ids, batch.optimality))
        x, _ = mix(rig.path, x0, rig.noise(len(x0)), t)
        v, v_old = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", "old"))
        plus, minus = (split(rig.path, x, v_old + b * (v - v_old), t)[0] for b in (self.nft_beta, -self.nft_beta))
        loss = diffusion_nft(plus, minus, x0, r).mean() * self.adv_clip_max / self.nft_beta
        if self.kl:
            kl = rig.error(v, rig.velocity(x, t, prompt_ids, weights="ref"), t).mean()
            rig.note("policy/kl", kl)
            loss = loss + self.kl * kl
        return loss

    def grid(self, rig: Rig) -> Tensor:
        """The sampler's times in [t_min, 1]; raises UserError when they are fewer than `timesteps`."""
        grid = rig.model.times(self.steps or rig.model.steps)[:-1]
        grid, needed = grid[grid >= self.t_min], self.timesteps or 1
        if len(grid) < needed:
            raise UserError(
                f"diffusion-nft: {needed} timesteps, but t_min={self.t_min} leaves {len(grid)} of the sampler's"
            )
        return grid

    def times(self, rig: Rig, rows: int) -> Tensor:
        """(rows, trained_timesteps): for each row distinct times of the grid, in random order."""
        grid = self.grid(rig)
        uniform = rig.uniform(rows * len(grid)).view(rows, len(grid))
        return grid.to(uniform)[uniform.argsort(1)[:, : self.trained_timesteps(rig.model.steps)]]
