"""DiffusionNFT: one network is reflected about its past self, and good images pull on one side, bad ones on the other.

Diffusion Negative-aware FineTuning, Zheng et al., arXiv 2509.16117; code NVlabs/DiffusionNFT.

With r the probability that an image is a good one, b = `mix`, and v+- = v_old +- b (v - v_old) (its Eq. 5 and Thm. 3.2):
  loss = r l(v+) + (1 - r) l(v-) + kl mean (v - v_ref)^2.
Derivation, with l(v) = mean (v - v*)^2 and a = 2r - 1: r l(v+) + (1 - r) l(v-) = b^2 mean (v - [v_old + (a/b)(v* - v_old)])^2 + const,
so it is a regression to the old velocity moved toward (a > 0) or away from (a < 0) the image's own target v*.
From its code: l is a squared error of x0 divided by its own mean absolute error held constant, the whole times bound / b;
r = clamp(A / (2 bound) + 1/2, 0, 1); each image is learnt at its own random choice of the sampler's times, with fresh noise;
the copy "old" samples, by a two-step solver without guidance, and follows the weights with a decay that rises (`decay`).
Guidance is 1 by design: the network learns what guidance gave, so its gain is partly that (the protocol's guidance is
one setting away). Not as in the code: groups without spread and images without a score are dropped, since only
the two distances would learn from them; iterations count as their updates even where every group was dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import dpm2, mix, split
from ..bench.losses import goodness, informative, reflected, standardise
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform, select_rows

RISES = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}  # decay: (updates at 0, rise an update, top)


@dataclass(frozen=True)
class ScoredImages:
    """N images, each with the probability that it is a good one."""

    x0: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)
    good: Tensor  # (N,) in [0, 1]


@dataclass(frozen=True)
class DiffusionNFT:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "mix": Choice((0.1, 0.3, 1.0)),
        "kl": LogUniform(1e-5, 1e-2),
        "noisy": Uniform(0, 0.6),
        "timesteps": Choice((1, 2, 4)),
        "decay": Choice((0, 1, 2)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-4, minibatches=1))
    prompts: int = 8  # groups an iteration
    group: int = 24  # images a prompt
    timesteps: int = 0  # at which an image is learnt from; 0 is 99 % of the sampler's, rounded down
    noisy: float = 0.0  # only the sampler's times from here to 1
    mix: float = 1.0  # b, how far the two policies lie from the old one; `config.beta` in the code
    bound: float = 5.0  # an advantage of this is surely good; `adv_clip_max` in the code
    std: Literal["group", "global", "none"] = "global"  # what rewards are divided by
    kl: float = 1e-4  # weight of mean (v_live - v_ref)^2; `train.beta` in the code; 0 saves the evaluations
    decay: Literal[0, 1, 2] = 1  # of the old copy: none, slow to 0.5, or none until update 75 and then fast to 0.999
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 1.0  # of the rollout, as published; 0 is the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"diffusion-nft: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1:
            raise UserError(f"diffusion-nft: prompts must be at least 1, got {self.prompts}")
        if not (self.mix > 0 and self.bound > 0):
            raise UserError(f"diffusion-nft: mix and bound must be above 0, got {self.mix} and {self.bound}")
        for name in ("timesteps", "kl", "steps", "guidance"):
            if not getattr(self, name) >= 0:
                raise UserError(f"diffusion-nft: {name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.noisy < 1:
            raise UserError(f"diffusion-nft: noisy is a time in [0, 1), got {self.noisy}")
        if self.decay not in RISES:
            raise UserError(f"diffusion-nft: decay must be 0, 1 or 2, got {self.decay}")
        if self.steps and self.timesteps > self.steps:
            raise UserError(f"diffusion-nft: {self.timesteps} timesteps, but a sampler of {self.steps} steps")

    def count(self, steps: int) -> int:
        """At how many times each image is learnt from, for a sampler of so many steps by protocol."""
        return self.timesteps or max(1, int((self.steps or steps) * 0.99))

    def lag(self, updates: int) -> float:
        """The decay of the old copy after so many updates."""
        flat, rise, top = RISES[self.decay]
        return min(rise * max(0, updates - flat), top)

    @property
    def latents(self) -> int:
        return self.timesteps

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.count(steps) * self.optim.epochs
        ref = {"ref": times} if self.kl else {}
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, "old": times, **ref}

    def collect(self, rig: Rig) -> ScoredImages:
        """Let the old copy sample P groups, score them; keep the scored images of those whose rewards differ."""
        self.grid(rig)
        rig.model.update_copy("old", self.lag(rig.iteration * self.optim.epochs * self.optim.minibatches))
        groups = rig.groups(
            self.prompts, self.group, steps=self.steps, guidance=self.guidance or None, weights="old", kernel=dpm2
        )
        good = goodness(standardise(groups.reward, self.std), self.bound)
        batch = ScoredImages(groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(self.group), good.flatten())
        return select_rows(batch, (informative(groups.reward)[:, None] & groups.reward.isfinite()).flatten())

    def loss(self, rig: Rig, batch: ScoredImages) -> Tensor:
        """(r l(v+) + (1 - r) l(v-)) bound / b + kl mean (v - v_ref)^2, over images and their times."""
        times = self.times(rig, len(batch.prompt_ids))
        t, k = times.flatten(), times.shape[1]
        x0, prompt_ids, good = (part.repeat_interleave(k, 0) for part in (batch.x0, batch.prompt_ids, batch.good))
        x, _ = mix(rig.path, x0, rig.noise(len(x0)), t)
        v, v_old = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", "old"))
        plus, minus = (split(rig.path, x, v_old + b * (v - v_old), t)[0] for b in (self.mix, -self.mix))
        loss = reflected(plus, minus, x0, good).mean() * self.bound / self.mix
        if self.kl:
            drift = rig.error(v, rig.velocity(x, t, prompt_ids, weights="ref"), t).mean()
            rig.note("policy/kl", drift)
            loss = loss + self.kl * drift
        return loss

    def grid(self, rig: Rig) -> Tensor:
        """The sampler's times at which images may be learnt; raises UserError when they are too few."""
        grid = rig.model.times(self.steps or rig.model.steps)[:-1]
        grid, wanted = grid[grid >= self.noisy], self.timesteps or 1
        if len(grid) < wanted:
            raise UserError(
                f"diffusion-nft: {wanted} timesteps, but noisy={self.noisy} leaves {len(grid)} of the sampler's"
            )
        return grid

    def times(self, rig: Rig, rows: int) -> Tensor:
        """(rows, count): for each row distinct times of the grid, in random order."""
        grid = self.grid(rig)
        chance = rig.uniform(rows * len(grid)).view(rows, len(grid))
        return grid.to(chance)[chance.argsort(1)[:, : self.count(rig.model.steps)]]
