"""Search within a run: a method without training finds the evaluated images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..budget import Meter
from ..errors import Interrupted
from ..evaluation.search import SearchPoint, SearchSettings, answers, frontier, scaled_budget, search
from ..spec import Prompt
from ..training.rig import MeteredRig
from .budgeted_stage import SAVES, BudgetedStage


@final
class Searcher(BudgetedStage):
    """Spends the budget on the images of the result; its checkpoints hold the latents found so far."""

    phase, timed_as, has_adapter = "searching", "search", False

    _validation_latents: Tensor | None = None

    @property
    def weights(self) -> str:
        """The trained weights, which a search leaves as they are."""
        return "policy"

    @property
    def latents(self) -> Tensor | None:
        """The images found."""
        return answers(self.rig)

    @property
    def validation_latents(self) -> Tensor | None:
        """The images found for the validation prompts, where the result is not on these."""
        return self._validation_latents

    @property
    def frontier(self) -> Sequence[SearchPoint]:
        """The images after 1, 2, 4 ... candidates, and those found."""
        return frontier(self.rig)

    def _prompts(self) -> Sequence[Prompt]:
        return self.context.plan.result

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.context.model.parameters())  # never steps

    def _position(self) -> str:
        return f"image {len(answers(self.rig))}"

    def _spend(self) -> str:
        context = self.context
        return search(
            context.config.settings,
            self.rig,
            SearchSettings(context.plan.images, context.plan.settings.seed, context.config.seed),
            after=self._after_batch,
            interrupted=context.interrupted,
            watched=context.observer.training,
        )

    def _after_batch(self, fraction: float, notes: dict[str, float]) -> None:
        self._report(fraction, notes)
        if int(fraction * SAVES) > self._milestone or self.context.processes.any(self.context.interrupted()):
            self._milestone = int(fraction * SAVES)
            self._save()

    def _finish(self) -> None:
        if not self.context.plan.on_validation:
            self._validation_latents = self._search_validation()

    def _search_validation(self) -> Tensor:
        """(N, C, h, w): the same search for the validation prompts, off budget, with as much to spend on an image."""
        context, plan = self.context, self.context.plan
        count = len(plan.validation) * plan.settings.curve_images
        budget = scaled_budget(self.meter.budget, count, len(plan.result) * plan.images)
        meter = Meter(budget, flops_a_forward=self.meter.flops_a_forward, uncharged=context.uncharged)
        rig = MeteredRig(
            self.rig.model, plan.validation, self.rig.scorer, meter, seed=context.config.seed, rows=self.rig.rows
        )
        rig.half_precision = False
        context.progress.phase("searching for validation prompts, off budget", count)
        try:
            stop = search(
                context.config.settings,
                rig,
                SearchSettings(plan.settings.curve_images, plan.settings.seed, context.config.seed, on_budget=False),
                after=lambda fraction, notes: context.progress.advance(rig.rows),
                interrupted=context.interrupted,
            )
        finally:
            rig.close()
        if stop == "interrupted":
            raise Interrupted("stopped after the search; the same command goes on from there")
        return answers(rig)
