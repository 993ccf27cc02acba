"""Methods that cheat: each spends past the meter, or changes what it is measured by, where the bench looks like a real run.

They reach what lies behind the method's view through the closures of its class, which no object of Python can hide.
"""

from __future__ import annotations

import gc
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Spent
from gpobench.bench.spec import Groups, Prompt, Rig

sys.path.insert(0, str(Path(__file__).parent))
from broken import Sound  # noqa: E402


def behind(rig: Any) -> Any:
    """The MeteredRig behind a method's view."""
    cells = [cell.cell_contents for cell in type(rig).velocity.__closure__]
    return next(content for content in cells if callable(content))()


@dataclass(frozen=True)
class Cheat(Sound):
    """Cheats from the second iteration on, and only where there are more than `least` prompts."""

    least: int = 30

    def collect(self, rig: Rig) -> Groups:
        metered = behind(rig)
        if len(metered.train_prompts) > self.least and rig.iteration >= 1:
            self.cheat(metered)
        return Sound.collect(self, rig)

    def cheat(self, metered: Any) -> None:
        """What is wrong with it."""


@dataclass(frozen=True)
class EvaluatesTheNetwork(Cheat):
    @torch.no_grad()
    def cheat(self, metered: Any) -> None:
        model = metered.model
        model.velocity(torch.ones(3, *model.shape), torch.ones(3), model.encode(["a sign"] * 3))


@dataclass(frozen=True)
class CallsTheNetworksForward(Cheat):
    """Past torch's hooks, which only a call of the module itself runs."""

    @torch.no_grad()
    def cheat(self, metered: Any) -> None:
        model, forward = metered.model, metered.model.network.forward
        model.forward(torch.ones(2, *model.shape), torch.ones(2), metered._embed(torch.tensor([0, 1])), 1.0)
        assert callable(forward)


@dataclass(frozen=True)
class Decodes(Cheat):
    @torch.no_grad()
    def cheat(self, metered: Any) -> None:
        metered.model.decode(torch.ones(2, *metered.model.shape))


@dataclass(frozen=True)
class CallsTheScorer(Cheat):
    def cheat(self, metered: Any) -> None:
        metered.scorer(np.zeros((2, 16, 16, 3), np.uint8), metered.train_prompts[:2])


@dataclass(frozen=True)
class OpensTheHeldOutScorer(Cheat):
    """Learns from the scorer that ranks."""

    held_out: str = f"{Path(__file__).with_name('redness.py')}:Warmth"

    def cheat(self, metered: Any) -> None:
        registry.scorer(self.held_out)(np.zeros((2, 16, 16, 3), np.uint8), metered.train_prompts[:2])


@dataclass(frozen=True)
class ForgetsItsSpend(Cheat):
    def cheat(self, metered: Any) -> None:
        metered.meter._roles.clear()


@dataclass(frozen=True)
class RaisesItsBudget(Cheat):
    """Catches the end of the budget, sets another one and goes on."""

    def collect(self, rig: Rig) -> Groups:
        try:
            return super().collect(rig)
        except Spent:
            metered = behind(rig)
            if len(metered.train_prompts) <= self.least:
                raise
            metered.meter._budget = Budget(nfe=1e12)
            return Sound.collect(self, rig)


@dataclass(frozen=True)
class FindsTheMeterByItsType(Cheat):
    def cheat(self, metered: Any) -> None:
        for thing in gc.get_objects():
            if type(thing).__name__ == "Meter" and thing is metered.meter:
                thing._images = 0


@dataclass(frozen=True)
class StopsTheClock(Cheat):
    def cheat(self, metered: Any) -> None:
        metered.meter.stop()


@dataclass(frozen=True)
class RestartsTheClock(Cheat):
    def cheat(self, metered: Any) -> None:
        metered.meter.stop()
        metered.meter.start()


@dataclass(frozen=True)
class TrainsOnTestPrompts(Cheat):
    def cheat(self, metered: Any) -> None:
        metered.train_prompts = [Prompt("two green squares")] * len(metered.train_prompts)


@dataclass(frozen=True)
class ChangesTheFacts(Cheat):
    """Changes what the scorer compares the images with."""

    def cheat(self, metered: Any) -> None:
        metered.train_prompts[0].meta["target"] = "X"


@dataclass(frozen=True)
class StepsAnOptimiser(Cheat):
    def cheat(self, metered: Any) -> None:
        parameters = metered.model.parameters()
        with torch.enable_grad():
            x = torch.ones(2, *metered.model.shape)
            loss = metered.view.velocity(x, torch.full((2,), 0.5), torch.tensor([0, 1])).square().mean()
            loss.backward()
        torch.optim.SGD(parameters, lr=1e-3).step()
        for parameter in parameters:
            parameter.grad = None


@dataclass(frozen=True)
class WritesTheWeights(Cheat):
    def cheat(self, metered: Any) -> None:
        for parameter in metered.model.parameters():
            parameter.data.mul_(1.01)


@dataclass(frozen=True)
class GoesBackwardTwice(Cheat):
    def cheat(self, metered: Any) -> None:
        with torch.enable_grad():
            x = torch.ones(2, *metered.model.shape)
            loss = metered.view.velocity(x, torch.full((2,), 0.5), torch.tensor([0, 1])).square().mean()
            for _ in range(2):
                torch.autograd.grad(loss, metered.model.parameters(), retain_graph=True, allow_unused=True)


@dataclass(frozen=True)
class ReplacesTheScorer(Cheat):
    def cheat(self, metered: Any) -> None:
        metered.scorer = type(metered.scorer)()


@dataclass(frozen=True)
class ReplacesAFunction(Cheat):
    """Draws the run's prompts by another rule."""

    def cheat(self, metered: Any) -> None:
        metered.prompts = lambda n: torch.zeros(n, dtype=torch.long)


@dataclass(frozen=True)
class RemovesTheCounter(Cheat):
    def cheat(self, metered: Any) -> None:
        vars(metered.model.network).pop("forward", None)


@dataclass(frozen=True)
class ComputesInAThread(Cheat):
    def cheat(self, metered: Any) -> None:
        thread = threading.Thread(target=EvaluatesTheNetwork().cheat, args=(metered,))
        thread.start()
        thread.join()
