"""Best of n: no training at all; the same spend buys many images of each prompt, and the best one is shown.

The baseline every method that trains must stand beside: when drawing more images and keeping the best is as good, the
weights need not change. Candidate 0 starts from the judge's own noise, so with n = 1 it is the base, and differences stay
paired with it. The choice is made BY the training scorer: its number rises by construction, as the largest of n draws of
anything does, and only the held-out scorers tell what was gained.
Used as a baseline by e.g. Stiennon et al., arXiv 2009.01325 (best-of-n against RL), and Ma et al., arXiv 2501.09732
(search over noises for diffusion models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ..bench.budget import Spent
from ..bench.errors import UserError
from ..bench.flow import ode
from ..bench.spec import Range, Rig, counted_guidance

SHARE = "candidates"  # in rig.state: decided once, when nothing is spent, so that every image gets the same


@dataclass(frozen=True)
class BestOfN:
    """The field is the only hyper-parameter; `answer` is the algorithm."""

    space: ClassVar[Mapping[str, Range]] = {}
    n: int = 0  # candidates an image; 0 is as many as the budget affords, the same for every image

    def __post_init__(self) -> None:
        if self.n < 0:
            raise UserError(f"best-of-n: n must not be negative, got {self.n}")

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """Of one answered image; of one candidate where n is left to the budget."""
        return {"inference": max(1, self.n) * steps * (1 if guidance == 1 else 2)}

    def answer(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Tensor:
        """Of n candidates a row, the one the training scorer likes best; ties and unscored ones leave the earlier one."""
        if SHARE not in rig.state:
            each = int(self.cost(rig.model.steps, counted_guidance(rig.model))["inference"])
            afforded = self.n or rig.affords(nfe=each, images=1, reward_calls=1) // images
            rig.state[SHARE] = max(1, afforded)
        best, top = self._candidate(rig, noise, prompt_ids)
        for _ in range(1, rig.state[SHARE]):
            try:
                x0, reward = self._candidate(rig, rig.noise(len(prompt_ids)), prompt_ids)
            except Spent:  # a given n may pass the budget: what was found until then counts
                break
            better = reward > top  # top is -inf where nothing was scored yet
            best = x0.where(better.view(-1, *[1] * (x0.dim() - 1)), best)
            top = reward.where(better, top)
        rig.note("search/best", top[top.isfinite()].mean() if top.isfinite().any() else float("nan"))
        return best

    def _candidate(self, rig: Rig, x: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The base's image from noise x by the protocol, and its reward; -inf where it could not be scored."""
        for t, s in pairwise(rig.model.times(rig.model.steps).to(x.device)):
            at, to = t.expand(len(x)), s.expand(len(x))
            step = rig.step(ode, x, at, to, prompt_ids, weights="ref", guidance=rig.model.guidance, role="inference")
            x = step.mean
        reward = rig.score(x, prompt_ids)
        rig.note("reward/mean", reward.nanmean())
        return x, reward.nan_to_num(nan=float("-inf"))
