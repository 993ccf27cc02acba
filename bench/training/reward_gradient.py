"""What the rig offers to methods that differentiate the reward: scores and samples with a gradient, each charged."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..budget import Meter
from ..flow import ode
from ..process_group import ProcessGroup
from ..scoring.differentiable import ask_with_gradient
from ..spec import Cond, Model, Prompt, Scorer
from .network_pass import NetworkPass


@dataclass
class RewardGradients:
    """What scoring with a gradient came to, until all processes settle it together."""

    used: bool = False  # since the last `settle`; the same in every process
    seconds: float = 0.0
    sent: int = 0
    reasons: list[str] = field(default_factory=list[str])  # of images without a reward


class RewardGradientRig(ABC):
    """The part of `MeteredRig` that differentiates rewards and samples."""

    model: Model
    scorer: Scorer
    meter: Meter
    processes: ProcessGroup
    reward_gradients: RewardGradients
    _computed_elsewhere: bool  # another process computes the current part
    images_sent: int
    images_scored: int
    failures: list[str]

    @abstractmethod
    def texts(self, prompt_ids: Tensor) -> list[Prompt]: ...

    @abstractmethod
    def _embed(self, prompt_ids: Tensor) -> Cond: ...

    @abstractmethod
    def charged_velocity(self, x: Tensor, t: Tensor, prompt_ids: Tensor, how: NetworkPass) -> Tensor: ...

    def score_with_gradient(self, x0: Tensor, prompt_ids: Tensor) -> Tensor:
        """(B,): rewards of the images that x0 decodes to, with a gradient; NaN where an image could not be scored."""
        self.meter.charge_scorer(self.scorer.name, len(x0), images=len(x0), backwards=len(x0))
        kept = self.reward_gradients
        kept.used = True
        if self._computed_elsewhere:
            return torch.zeros(len(x0), device=x0.device)
        images = self.model.decode(x0)
        began = time.perf_counter()
        scores = ask_with_gradient(self.scorer, images, self.texts(prompt_ids))
        kept.seconds += time.perf_counter() - began
        kept.sent += len(x0)
        kept.reasons += scores.reasons.values()
        return scores.value.to(device=x0.device, dtype=torch.float32)

    def settle_reward_gradients(self) -> None:
        """Meter and count, in every process, what `score_with_gradient` came to in all of them."""
        kept = self.reward_gradients
        if not kept.used:
            return
        parts = self.processes.gather((kept.seconds, kept.sent, kept.reasons))
        sent, reasons = sum(sent for _, sent, _ in parts), [reason for *_, of_part in parts for reason in of_part]
        self.meter.note_scorer(self.scorer.name, sum(seconds for seconds, *_ in parts), len(reasons))
        self.images_sent += sent
        self.images_scored += sent - len(reasons)
        self.failures = [*self.failures, *reasons][-20:]
        self.reward_gradients = RewardGradients()

    def sample_with_gradient(
        self,
        x: Tensor,
        prompt_ids: Tensor,
        *,
        steps: int = 0,
        start: int = 0,
        guidance: float | None = None,
        adjoint: bool = False,
    ) -> Tensor:
        """(B, C, h, w): the clean latents that the policy's ODE reaches from x, with a gradient through its steps.

        Args:
            x: latents (B, C, h, w) at the time of step `start`.
            prompt_ids: (B,).
            steps: of the whole grid; 0 is the protocol's number.
            start: number of the first step in the grid.
            guidance: None is the protocol's.
            adjoint: compute the gradient by the adjoint ODE.
        """
        steps = steps or self.model.steps
        grid = self.model.times(steps).to(x.device)[start:]
        how = NetworkPass("policy", self.model.guidance if guidance is None else guidance)
        if not adjoint:
            return GradientWalk(self.model, partial(self._charged, prompt_ids, how), grid)(x, adjoint=False)
        each = len(x) * (steps - start) * (1 if how.guidance == 1.0 else self.model.guided_cost)
        self.meter.charge_deferred(3 * each, "policy")  # of the backward pass, which computes every step again
        self.meter.charge(nfe=each, role="rollout")
        if self._computed_elsewhere:
            return torch.zeros_like(x)
        cond = self._embed(prompt_ids)
        velocity = lambda x, t: self.model.velocity(x, t, cond, guidance=how.guidance)
        return GradientWalk(self.model, velocity, grid)(x, adjoint=True)

    def _charged(self, prompt_ids: Tensor, how: NetworkPass, x: Tensor, t: Tensor) -> Tensor:
        return self.charged_velocity(x, t, prompt_ids, how)


@dataclass(frozen=True)
class GradientWalk:
    """The steps of the policy's ODE from one index of a time grid to its end, as a function with a gradient."""

    model: Model
    velocity: Callable[[Tensor, Tensor], Tensor]  # (x (B, C, h, w), t (B,)) -> the velocity, charged elsewhere
    grid: Tensor  # (steps + 1,), from the walk's first time on

    def step(self, x: Tensor, i: int) -> Tensor:
        """The latents after step i."""
        t, s = self.grid[i].expand(len(x)), self.grid[i + 1].expand(len(x))
        return ode(self.model.path, x, self.velocity(x, t), t, s).mean

    def __call__(self, x: Tensor, adjoint: bool) -> Tensor:
        """The latents at the grid's end, differentiable in x and in the trained weights."""
        if adjoint:
            result: Tensor = _Adjoint.apply(self, x, *self.model.parameters())  # type: ignore[no-untyped-call]
            return result
        for i in range(len(self.grid) - 1):
            x = self.step(x, i)
        return x


class _Adjoint(torch.autograd.Function):
    """Solves the adjoint ODE backwards: a(t) = dL / dx(t), one vector-Jacobian product of a step at a time.

    With x' = f(x), a = f_x(x)^T a' and dL/dw = sum f_w(x)^T a': the discrete adjoint of the sampler's own steps, so the gradient
    is autograd's up to rounding. AdjointDPM (arXiv 2307.10711) solves x backwards too; here the states are stored, T + 1
    latents, and each step's activations are computed again.
    """

    @staticmethod
    def forward(ctx: Any, walk: GradientWalk, x: Tensor, *parameters: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        states = [x]
        for i in range(len(walk.grid) - 1):
            states.append(walk.step(states[-1], i))
        ctx.walk, ctx.states, ctx.parameters = walk, states, parameters
        ctx.context = copy_context()  # whether this is a part that processes divide; backward may run in another thread
        return states[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (adjoint,) = gradients
        totals = [torch.zeros_like(parameter) for parameter in ctx.parameters]
        for i in reversed(range(len(ctx.states) - 1)):
            with torch.enable_grad():
                x = ctx.states[i].detach().requires_grad_()
                after = ctx.context.run(ctx.walk.step, x, i)
            found: Any = torch.autograd.grad(after, [x, *ctx.parameters], adjoint, allow_unused=True)
            adjoint, parts = found[0], found[1:]
            for total, part in zip(totals, parts, strict=True):
                if part is not None:
                    total += part
        return None, adjoint, *totals
