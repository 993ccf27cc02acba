"""Best of n: no training; the budget pays for several images of each prompt, and the best one is the answer.

Used as a baseline by e.g. Stiennon et al., arXiv 2009.01325 (best-of-n against RL), and Ma et al., arXiv 2501.09732
(search over noises for diffusion models).

  answer = argmax over i < n of reward(x0_i),   x0_i sampled from noise_i by the base model
The baseline for every method that trains: where drawing more images and keeping the best is as good, the weights need not
change. Candidate 0 starts from the evaluation's own noise, so with n = 1 the answer is the base's image, and differences
stay paired with it. The training scorer makes the choice: its number rises by construction, as the largest of n draws of
anything does, and only the held-out scorers tell what was gained. The best of the first candidates is stated after each one:
so a single run shows the gain of every smaller n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ..bench.budget import Spent
from ..bench.errors import UserError
from ..bench.flow import ode
from ..bench.spec import Range, Rig, counted_guidance

CANDIDATES = "candidates"  # key of rig.state; set once, before anything is spent, so that every image gets the same n


@dataclass(frozen=True)
class BestOfN:
    """The field is the only hyper-parameter; `answers` is the algorithm."""

    space: ClassVar[Mapping[str, Range]] = {}
    n: int = 0  # candidates per image; 0: as many as the budget affords, the same for every image

    def __post_init__(self) -> None:
        if self.n < 0:
            raise UserError(f"best-of-n: n must not be negative, got {self.n}")

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """Of one answered image; of one candidate where n is left to the budget."""
        return {"inference": max(1, self.n) * steps * (1 if guidance == 1 else 2)}

    def answer(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Tensor:
        """The candidate of each row with the highest training reward; on a tie, or without a score, the earlier one."""
        *_, best = self.answers(rig, noise, prompt_ids, images)
        return best

    def answers(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Iterator[Tensor]:
        """The best of the first, of the first two ... candidates of each row."""
        if CANDIDATES not in rig.state:
            nfe = int(self.cost(rig.model.steps, counted_guidance(rig.model))["inference"])
            affordable = self.n or rig.affords(nfe=nfe, images=1, reward_calls=1) // images
            rig.state[CANDIDATES] = max(1, affordable)
        best, best_reward = self._candidate(rig, noise, prompt_ids)
        yield best
        for _ in range(1, rig.state[CANDIDATES]):
            try:
                x0, reward = self._candidate(rig, rig.noise(len(prompt_ids)), prompt_ids)
            except Spent:  # a given n may exceed the budget: the best candidate so far is the answer
                break
            better = reward > best_reward  # best_reward is -inf where nothing was scored yet
            best = x0.where(better.view(-1, *[1] * (x0.dim() - 1)), best)
            best_reward = reward.where(better, best_reward)
            yield best
        scored = best_reward.isfinite()
        rig.note("search/best", best_reward[scored].mean() if scored.any() else float("nan"))

    def _candidate(self, rig: Rig, x: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The base's image from noise x by the protocol, and its reward; -inf where it could not be scored."""
        for t, s in pairwise(rig.model.times(rig.model.steps).to(x.device)):
            at, to = t.expand(len(x)), s.expand(len(x))
            step = rig.step(ode, x, at, to, prompt_ids, weights="ref", guidance=rig.model.guidance, role="inference")
            x = step.mean
        reward = rig.score(x, prompt_ids)
        rig.note("reward/mean", reward.nanmean())
        return x, reward.nan_to_num(nan=float("-inf"))
