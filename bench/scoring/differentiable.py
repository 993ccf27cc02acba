"""Scores with a gradient in the pixels: which scorers have one, and how one is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast, get_type_hints

import torch
from torch import Tensor

from .. import registry
from ..errors import UserError, error_line
from ..rendering import IMAGE_FAULT, differentiable_pixels, finite_rows
from ..spec import DifferentiableScorer, Prompt, Scorer
from .calls import PartEnded, call_in_time
from .references import ScorerReference
from .remote import RemoteScorer
from .replicas import ReplicatedScorer
from .scorers import Blend, part_behind
from .worker_pool import WorkerScorer


@dataclass(frozen=True)
class GradientScores:
    """Scores (B,) with a gradient, NaN where an image could not be scored, with the reason by row."""

    value: Tensor
    reasons: dict[int, str] = field(default_factory=dict[int, str])


def without_gradient(scorer: Scorer) -> list[str]:
    """The scorers, of a blend its parts, that have no gradient, each with the reason."""
    if isinstance(scorer, Blend):
        return [reason for part, _ in scorer.parts for reason in without_gradient(part)]
    if isinstance(scorer, RemoteScorer | ReplicatedScorer):
        return [f"{scorer.name} runs in another process"]
    if isinstance(scorer, WorkerScorer) and not without_gradient(scorer.scorer):
        return [f"{scorer.name} runs in worker processes (--set scorer.workers=0 lets it run here)"]
    return [] if isinstance(part_behind(scorer), DifferentiableScorer) else [f"{scorer.name} has none"]


def require_gradient(scorer: Scorer, method: str, domain: str) -> None:
    """Raise UserError, naming the scorers and tasks that would do, where the training scorer has no gradient."""
    if missing := without_gradient(scorer):
        scorers = scorers_with_gradient()
        tasks = [name for name in registry.entries("task") if _trains_on(name, domain, scorers)]
        raise UserError(
            f"{method} needs the gradient of its reward: {', '.join(missing)}. Scorers with a gradient: {', '.join(scorers)} "
            f"(--reward {scorers[0] if scorers else 'NAME'}); tasks that train on one: {', '.join(tasks) or 'none'}"
        )


def scorers_with_gradient() -> list[str]:
    """Names of the registered scorers whose factory says that it returns a `DifferentiableScorer`; no weights are loaded."""
    names: list[str] = []
    for name in registry.entries("scorer"):
        with contextlib.suppress(Exception):  # what another package registers may not even import
            factory = registry.load("scorer", name)
            made = get_type_hints(factory).get("return")
            if made is not None and hasattr(made, "differentiable") and registry.canonical("scorer", name) == name:
                names.append(name)
    return names


def _trains_on(task: str, domain: str, scorers: Sequence[str]) -> bool:
    """Whether a task's reward consists of these scorers only."""
    with contextlib.suppress(Exception):
        reference = ScorerReference.parse(registry.task(task).reward(domain))
        return all(scorer.base in scorers for scorer in reference.scorers)
    return False


def ask_with_gradient(scorer: Scorer, images: Tensor, prompts: Sequence[Prompt]) -> GradientScores:
    """Score decoded images (B, 3, H, W), 0 black and 1 white, of which the scorer sees the rounded pixels.

    As in `scorers.ask`, whatever a scorer does wrong becomes NaN with a reason. A row without a score has gradient 0 behind
    `where`.
    """
    sound = finite_rows(images.detach())
    reasons = {row: f"{scorer.name}: {IMAGE_FAULT}" for row, finite in enumerate(sound) if not finite}
    rows = [row for row, finite in enumerate(sound) if finite]
    value = images.flatten(1).sum(1) * 0 + torch.nan  # a graph in every row, so that a loss of none has a gradient too
    if rows:
        pixels = differentiable_pixels(images[rows])
        found = _asked(scorer, pixels, [prompts[row] for row in rows])
        value = value.index_put((torch.tensor(rows, device=value.device),), found.value.to(value))
        reasons |= {rows[row]: reason for row, reason in found.reasons.items()}
    return GradientScores(value, reasons)


def _asked(scorer: Scorer, pixels: Tensor, prompts: Sequence[Prompt]) -> GradientScores:
    """The checked scores of pixels (B, 3, H, W) in [0, 1]."""
    try:
        value: Tensor = call_in_time(cast(DifferentiableScorer, scorer).differentiable, pixels, prompts)
        if value.shape != (len(pixels),) or not value.requires_grad:
            raise ValueError(
                f"returned {tuple(value.shape)} scores for {len(pixels)} images, or scores without a gradient"
            )
    except PartEnded as error:
        return _all_missing(scorer, pixels, str(error))
    except Exception as error:  # a scorer is foreign code: nothing it does may end or falsify a run
        return _all_missing(scorer, pixels, error_line(error))
    finite = value.detach().float().isfinite().tolist()
    return GradientScores(
        torch.where(value.isfinite(), value, torch.nan),
        {row: f"{scorer.name}: returned no number" for row, sound in enumerate(finite) if not sound},
    )


def _all_missing(scorer: Scorer, pixels: Tensor, reason: str) -> GradientScores:
    return GradientScores(
        pixels.flatten(1).sum(1) * 0 + torch.nan, dict.fromkeys(range(len(pixels)), f"{scorer.name}: {reason}")
    )
