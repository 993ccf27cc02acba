"""The stage of a run that spends the budget, training or search: its rig, checkpoints, metrics and curve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Meter
from ..errors import Interrupted, UserError
from ..evaluation.estimates import Evaluation, estimates
from ..evaluation.evaluator import Evaluator
from ..evaluation.search import SearchPoint
from ..spec import Prompt, fold_text
from ..training import checkpoint
from ..training.observation import Observation
from ..training.rig import MeteredRig
from ..training.unscored import Unscored
from .context import RunContext

SAVES = 10  # checkpoints in the course of a budget, beside those at the eval points


class BudgetedStage(ABC):
    """Spends the budget, from the newest checkpoint on where there is one. Training and search are its two kinds."""

    phase: ClassVar[str]  # shown while it runs
    timed_as: ClassVar[str]  # its key in the record's seconds by phase
    has_adapter: ClassVar[bool]  # whether it trains weights

    def __init__(self, context: RunContext, evaluator: Evaluator) -> None:
        self.context, self.evaluator = context, evaluator
        self.meter = Meter(
            context.config.budget, flops_a_forward=context.model.flops_a_forward(), uncharged=context.uncharged
        )
        self.rig = MeteredRig(
            context.model,
            self._prompts(),
            context.scorers.training,
            self.meter,
            seed=context.config.seed,
            rows=context.model_spec.rows,
            processes=context.processes,
        )
        self.rig.aggregation = context.config.reward_aggregation
        self.rig.half_precision = self.has_adapter  # the images of a search are evaluated
        self.rig.evaluation_texts = frozenset(
            fold_text(prompt.text)
            for split in ("validation", "test")
            for prompt in context.task.prompts(split, context.model_spec.domain)
        )
        self._optimizer = self._make_optimizer()
        # The gradient of a mean over a latent's elements is below what fp16 can hold; bf16 has the range of float32.
        self._scaler = torch.amp.GradScaler(context.model.device.type, enabled=context.config.precision == "fp16")
        restored = checkpoint.restore(context.files.checkpoint, self.rig, self._optimizer, context.progress.message)
        facts: dict[str, Any] = restored or {"curve": [], "curve_hash": "", "milestone": -1}
        self._watch(facts.get("observed"))
        self.curve: list[dict[str, Any]] = facts["curve"]  # points {spent, scores}; the base is the first
        self.curve_hash: str = facts.get("curve_hash", "")  # of every score behind the curve, in curve.parquet
        if self.curve:
            context.files.read_curve(len(self.curve), self.curve_hash)
        # Eval points passed in training, tenths saved in a search; -1 before the base is evaluated.
        self._milestone: int = facts["milestone"]
        if "scaler" in facts:
            self._scaler.load_state_dict(facts["scaler"])
        if restored:
            spent = f"{100 * self.meter.fraction():.0f} % of the budget spent"
            context.progress.message(f"going on from {self._position()}, {spent}")
        self._log = context.files.open_metrics(self.rig.iteration)
        self._saved = int(self.meter.fraction() * SAVES)

    def run(self) -> str:
        """Spend the budget; returns why it stopped. Raises Interrupted, a checkpoint written, when asked to stop."""
        context = self.context
        try:
            if self._milestone < 0:
                self._add_eval_point()
            context.progress.phase(self.phase, 1.0)
            with context.timer(self.timed_as):
                stop = self._spend_or_pause()
            if stop != "interrupted":
                self._finish()
        finally:
            self.rig.close()
            self._log.close()
        if stop == "interrupted":
            raise Interrupted(f"stopped after {self._position()}; the same command goes on from there")
        return stop

    def _watch(self, observed: dict[str, Any] | None) -> None:
        """Go on from what a checkpoint says was observed, and remember what nothing may change from now on."""
        observer, seal = self.context.observer, self.context.seal
        if observed is not None:
            observer.restore(Observation(**observed))
        observer.watch_weights(self.context.model.parameters(), self._optimizer)
        seal.add(self.rig, "model", "train_prompts", "scorer", "meter", "rng", "processes", "evaluation_texts")
        seal.add(self.context.model, "network", "vae")

    def observe(self) -> Observation:
        """What was computed so far, counted from beside the rig, and how it differs from what was charged."""
        context = self.context
        texts = {"", context.model_spec.negative_prompt or "", *self.rig.captions}
        texts.update(prompt.text for prompt in self._prompts())
        return context.observer.observe(self.meter, context.config.budget, texts, context.processes)

    def _spend_or_pause(self) -> str:
        """Spend the budget. Raises UserError where the training scorer stopped giving scores."""
        try:
            return self._spend()
        except Unscored as error:
            scorer = self.context.scorers.training.name
            raise UserError(
                f"{scorer} gave no image of one iteration a score ({error}): the run is stopped and nothing of it is charged; "
                "once it does, the same command goes on from the last checkpoint"
            ) from None

    # What the evaluation of the result samples

    @property
    @abstractmethod
    def weights(self) -> str:
        """The name of the weights to evaluate."""

    @property
    @abstractmethod
    def latents(self) -> Tensor | None:
        """(N, C, h, w): the images of the result, where they are found and not sampled."""

    @property
    @abstractmethod
    def validation_latents(self) -> Tensor | None:
        """(N, C, h, w): the images of the last point of the curve, where they are found and not sampled."""

    @property
    @abstractmethod
    def frontier(self) -> Sequence[SearchPoint]:
        """The images that are found with less to spend, and at last those of the result; empty where they are not found."""

    # What the two kinds do differently

    @abstractmethod
    def _prompts(self) -> Sequence[Prompt]:
        """The prompts that the rig draws from."""

    @abstractmethod
    def _make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose state the checkpoints hold."""

    @abstractmethod
    def _position(self) -> str:
        """How far the stage has come, for messages."""

    @abstractmethod
    def _spend(self) -> str:
        """Work until the budget is spent; returns why it stopped."""

    @abstractmethod
    def _finish(self) -> None:
        """Do what follows the spending, unless it was interrupted."""

    # What they share

    def _add_eval_point(self) -> None:
        """Evaluate on the validation prompts, the base before anything is spent, and save."""
        with self.context.timer("evaluate"):
            point: Evaluation = (
                self.evaluator.base_point() if self._milestone < 0 else self.evaluator.point(self.weights)
            )
        self.context.launch.check_run_dir()
        self.curve_hash = self.context.files.write_curve_point(len(self.curve), point, self.curve_hash)
        self.curve.append({"spent": self.meter.spent(), "scores": estimates(point)})
        self._milestone = int(self.meter.fraction() * self.context.config.evaluation.eval_points)
        self._save()

    def _save(self) -> None:
        """Write a checkpoint."""
        self.context.launch.check_run_dir()
        self._saved = int(self.meter.fraction() * SAVES)
        facts: dict[str, Any] = {
            "milestone": self._milestone,
            "curve": self.curve,
            "curve_hash": self.curve_hash,
            "observed": asdict(self.observe()),
        }
        if self._scaler.is_enabled():
            facts["scaler"] = self._scaler.state_dict()
        with self.context.timer("checkpoint"):
            checkpoint.save(self.context.files.checkpoint, self.rig.iteration, self.rig, self._optimizer, facts)

    def _report(self, fraction: float, notes: dict[str, float]) -> None:
        """Log and show the numbers of an iteration."""
        numbers = {
            "iteration": self.rig.iteration,
            **notes,
            **{f"spent/{currency}": amount for currency, amount in self.meter.spent().items()},
            "reward/errors": self.meter.errors,
        }
        self._log(numbers)
        self.context.accelerator.log(numbers, step=self.rig.iteration)
        self.context.progress.status(fraction, numbers)
