"""Training loop of the embedded parts: applies rates and gradients, averages weights, prints progress and writes checkpoints.

A recipe describes what is trained as a `Learner` and how as `FitSettings`; `fit` does the steps. Step k must draw its batch from
the seed and k alone: then a run resumed from its checkpoint equals one that was never stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError

Log = Callable[[dict[str, Any]], object]
Weights = dict[str, Tensor]


# Settings


@dataclass(frozen=True)
class Interval:
    """Interval between events: a number of steps, or a number of seconds."""

    steps: int = 0
    seconds: float = math.inf

    def is_due(self, step: int, elapsed: float) -> bool:
        """Return whether the event is due after `step` steps, `elapsed` seconds after the last one."""
        return (self.steps > 0 and step % self.steps == 0) or elapsed > self.seconds


@dataclass(frozen=True)
class Workers:
    """Processes that share each batch: each computes some of its shards, and gradients are summed over them."""

    rank: int = 0
    world: int = 1
    shards: int = 1  # equal parts of a batch

    def own_shards(self) -> range:
        """Return the shards of this process."""
        return range(self.rank, self.shards, self.world)

    def total(self, numbers: Tensor) -> None:
        """Sum in place over the processes."""
        if self.world > 1:
            dist.all_reduce(numbers)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()


@dataclass(frozen=True)
class FitSettings:
    """Settings of the training of a learner."""

    label: Mapping[str, str]  # what every progress line begins with, e.g. {"recipe": "reader"}
    made_by: Mapping[str, Any]  # the recipe and the seed: a checkpoint of others is refused
    checkpoint: Path
    steps: int
    samples: int  # of one step, for the pace
    rate: Callable[[float, int], float]  # (an optimiser's own rate, step from 0) -> the rate of that step
    save: Interval  # checkpoints; there is one after the last step, too
    report: Interval  # progress lines; there is one after the last step, too
    evaluate: Interval = field(default_factory=Interval)  # progress lines with the learner's own numbers
    average: float = 0.0  # decay of the averaged weights; 0: the last weights are returned
    clip_norm: float = math.inf  # of the module's gradients together
    clock: Callable[[], float] = time.process_time  # seconds, of the checkpoint and the progress lines


class Learner(ABC):
    """A module in training, its optimisers, and the loss of a step."""

    module: nn.Module  # its weights are averaged and returned, its gradients clipped
    optimisers: Sequence[torch.optim.Optimizer]
    heads: nn.Module | None = None  # trained beside the module, and thrown away

    @abstractmethod
    def loss(self, step: int, shard: int) -> Tensor:
        """Compute the mean loss over a shard of the step's batch; pure in its arguments and the weights."""

    def constrain(self) -> None:  # noqa: B027  # most have no bounds
        """Clip the weights to their bounds after a step."""

    def evaluate(self, weights: Weights, step: int) -> Mapping[str, float]:
        """Return the numbers of a progress line after `step` steps. weights: those that `fit` would return now."""
        return {}


def cosine_rate(warmup: int, steps: int, floor: float) -> Callable[[float, int], float]:
    """Return rate * min(1, (k + 1) / warmup) * (1 + cos(pi k / steps)) / 2 + floor, with step k from 0."""

    def rate(base: float, step: int) -> float:
        return base * min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * (step / steps))) + floor

    return rate


def generator(*key: int) -> torch.Generator:
    """Make a separate torch random stream for every key, mixed by numpy's SeedSequence."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


@contextmanager
def threads(count: int) -> Generator[None]:
    """Set torch's number of threads inside the context: sums of other counts differ in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_half(weights: Mapping[str, Tensor]) -> Weights:
    """Convert weights to float16, as they are shipped: integers unchanged, each tensor contiguous."""
    return {key: (w.half() if w.is_floating_point() else w).contiguous() for key, w in weights.items()}


def in_single(weights: Mapping[str, Tensor]) -> Weights:
    """Convert weights to float32, integers unchanged."""
    return {key: w.float() if w.is_floating_point() else w for key, w in weights.items()}


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside `path`, then move there: a process that is killed leaves the old file or the new one."""
    fresh = path.with_suffix(".part")
    torch.save(dict(content), fresh)
    os.replace(fresh, path)


# The loop


def fit(learner: Learner, settings: FitSettings, *, log: Log, workers: Workers | None = None) -> tuple[Weights, float]:
    """Train a learner, from its checkpoint if there is one.

    Returns the averaged weights (the last ones where nothing is averaged) and the seconds of all starts together. Raises UserError
    where the checkpoint was left by another recipe or seed, and where the loss is not finite.
    """
    return _Fit(learner, settings, workers or Workers(), log).run()


class _Fit:
    """State of one training: the learner, its averaged weights, and when it was last saved, reported and evaluated."""

    def __init__(self, learner: Learner, settings: FitSettings, workers: Workers, log: Log) -> None:
        self.learner, self.settings, self.workers, self.log = learner, settings, workers, log
        self.rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in learner.optimisers]
        self.mean: Weights = {name: value.detach().clone() for name, value in learner.module.state_dict().items()}
        self.seconds = 0.0  # of earlier starts
        self.losses = 0.0  # since the last progress line
        self.reported_step = 0

    def run(self) -> tuple[Weights, float]:
        """Run the remaining steps."""
        start = self._resume()
        self.workers.barrier()  # no process writes the checkpoint before all have read it
        self.began = self.settings.clock()
        self.saved_at = self.reported_at = self.evaluated_at = time.monotonic()
        self.reported_step = start
        for step in range(start, self.settings.steps):
            self._step(step)
            self._average(step)
            if self.workers.rank == 0:
                self._keep(step + 1)
        self.workers.barrier()
        for optimiser in self.learner.optimisers:
            optimiser.zero_grad(set_to_none=True)
        return self._weights(), self._spent()

    def _step(self, step: int) -> None:
        for optimiser, rates in zip(self.learner.optimisers, self.rates, strict=True):
            for group, base in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = self.settings.rate(base, step)
            optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for shard in self.workers.own_shards():
            loss = self.learner.loss(step, shard) / self.workers.shards
            total += loss.item() * self.workers.world
            if self.workers.rank == 0 and not math.isfinite(total):
                name = " ".join(self.settings.label.values())
                raise UserError(f"{name}: the loss is {total} at step {step}; a lower rate may help")
            loss.backward()
        self.losses += total
        self._sum_gradients()
        if self.settings.clip_norm < math.inf:
            nn.utils.clip_grad_norm_(self.learner.module.parameters(), self.settings.clip_norm)
        for optimiser in self.learner.optimisers:
            optimiser.step()
        with torch.no_grad():
            self.learner.constrain()

    def _sum_gradients(self) -> None:
        """Sum all gradients over the processes in one buffer: one message a step."""
        if self.workers.world == 1:
            return
        groups = (group for optimiser in self.learner.optimisers for group in optimiser.param_groups)
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.workers.total(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if not self.settings.average:
            return
        decay = min(self.settings.average, (1 + step) / (10 + step))
        for mean, value in zip(self.mean.values(), self.learner.module.state_dict().values(), strict=True):
            mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)

    def _weights(self) -> Weights:
        if self.settings.average:
            return self.mean
        return {name: value.detach().clone() for name, value in self.learner.module.state_dict().items()}

    def _spent(self) -> float:
        return self.seconds + self.settings.clock() - self.began

    def _keep(self, step: int) -> None:
        """Save, evaluate and report what is due after so many steps."""
        settings, now, last = self.settings, time.monotonic(), step == self.settings.steps
        if last or settings.save.is_due(step, now - self.saved_at):
            self._save(step)
            self.saved_at = time.monotonic()
        evaluated = settings.evaluate.is_due(step, now - self.evaluated_at) or (last and settings.evaluate.steps > 0)
        if last or evaluated or settings.report.is_due(step, now - self.reported_at):
            steps = step - self.reported_step
            pace = (now - self.reported_at) / steps  # seconds a step
            line = {
                **settings.label,
                "step": step,
                "of": settings.steps,
                "loss": self.losses / steps,
                "samples_per_second": settings.samples / pace,
                "eta": (settings.steps - step) * pace,
                "seconds": self._spent(),
            }
            self.log(line | dict(self.learner.evaluate(self._weights(), step) if evaluated else {}))
            self.losses, self.reported_step = 0.0, step
            self.reported_at = time.monotonic()  # an evaluation is no part of the pace
            self.evaluated_at = self.reported_at if evaluated else self.evaluated_at

    # The checkpoint

    def _save(self, step: int) -> None:
        learner = self.learner
        write_checkpoint(
            self.settings.checkpoint,
            {
                "made_by": json.dumps(dict(self.settings.made_by)),
                "step": step,
                "seconds": self._spent(),
                "module": learner.module.state_dict(),
                "mean": self.mean,
                "heads": learner.heads.state_dict() if learner.heads else {},
                "optimisers": [optimiser.state_dict() for optimiser in learner.optimisers],
            },
        )

    def _resume(self) -> int:
        """Load the checkpoint and return the step to resume from; 0 where there is none."""
        path, learner = self.settings.checkpoint, self.learner
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        if json.loads(saved["made_by"]) != json.loads(json.dumps(dict(self.settings.made_by))):
            raise UserError(f"{path} was left by another recipe or seed; choose another folder or remove it")
        learner.module.load_state_dict(saved["module"])
        if learner.heads:
            learner.heads.load_state_dict(saved["heads"])
        for optimiser, state in zip(learner.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.mean, self.seconds = saved["mean"], saved["seconds"]
        self.log({**self.settings.label, "continues_at": saved["step"]})
        return saved["step"]
