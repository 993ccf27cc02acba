"""Training within a run: the training loop with its checkpoints and eval points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..evaluation.search import SearchPoint
from ..spec import Prompt
from ..training.observation import MISMATCH
from ..training.train import Gradients, Stop, optimiser, train
from .budgeted_stage import SAVES, BudgetedStage


@final
class Trainer(BudgetedStage):
    """Trains the adapter with a method until the budget is spent."""

    phase, timed_as, has_adapter = "training", "train", True

    @property
    def weights(self) -> str:
        """The averaged weights where a method keeps them, else the trained ones."""
        return "ema" if "ema" in self.context.model.copies else "policy"

    @property
    def latents(self) -> Tensor | None:
        """None: the weights sample the result."""
        return None

    @property
    def validation_latents(self) -> Tensor | None:
        """None: the weights sample the curve's last point."""
        return None

    @property
    def frontier(self) -> Sequence[SearchPoint]:
        """Empty: an image of the trained weights costs what one of the base costs."""
        return ()

    def _prompts(self) -> Sequence[Prompt]:
        return self.context.train_prompts

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return optimiser(self.context.config.settings, self.rig)

    def _position(self) -> str:
        return f"update {self.meter.updates}"

    def _spend(self) -> str:
        return train(
            self.context.config.settings,
            self.rig,
            self._optimizer,
            after=self._after_iteration,
            gradients=Gradients(self.context.accelerator.backward, self._scaler),
            interrupted=self.context.interrupted,
            watched=self.context.observer.training,
        )

    def _after_iteration(self, notes: dict[str, float]) -> None:
        fraction = self.meter.fraction()
        self._report(fraction, notes)
        context = self.context
        if differences := context.observer.differences_now(self.meter, context.config.budget, context.processes):
            raise Stop(f"{MISMATCH} {differences[0]}")
        if int(fraction * self.context.config.evaluation.eval_points) > self._milestone:
            self._add_eval_point()
        elif int(fraction * SAVES) > self._saved or self.context.processes.any(self.context.interrupted()):
            self._save()

    def _finish(self) -> None:
        if not self.meter.updates:
            self.context.progress.message(
                "no update was made: what follows is the base against itself (--dry-run tells what a budget affords)"
            )
        elif self.weights == "ema" and self.meter.updates + 1 < self.context.config.settings.optim.ema_interval:
            self.context.progress.message(
                f"the averaged weights are still the base's after {self.meter.updates} updates: "
                f"optim.ema_interval is {self.context.config.settings.optim.ema_interval}"
            )
