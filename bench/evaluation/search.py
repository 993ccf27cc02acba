"""Search without training: a method spends the budget on the evaluated images themselves, batch by batch.

Each image starts from its own evaluation noise and draws with its own keys. A search may use the training scorer, so only the
held-out scorers show what it really gains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import Budget, Spent
from ..spec import Search
from ..training.rig import MeteredRig
from ..training.unscored import expect_scores
from . import evaluator
from .request import ImageIndex, image_indices

# Keys of rig.bookkeeping, so that a checkpoint keeps them: the latents found, and the currency that ran out.
ANSWERS, BOUND = "search/answers", "search/bound"


@dataclass(frozen=True)
class SearchSettings:
    """Which images a search is for, and its seeds."""

    images: int  # a prompt
    noise_seed: int  # of the evaluation noise
    seed: int  # of the method's own draws
    on_budget: bool = True  # what is spent counts: a batch without a single score ends the search


def search(
    method: Search,
    rig: MeteredRig,
    settings: SearchSettings,
    *,
    after: Callable[[float, dict[str, float]], None] = lambda fraction, numbers: None,
    interrupted: Callable[[], bool] = lambda: False,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> str:
    """Search the images of every prompt of rig.train_prompts, from the evaluation noise; returns why the search ended.

    Once the budget cannot pay for an image, the base's own image takes its place, off budget like every evaluated image.

    Args:
        method: finds latents for a batch of prompts.
        rig: latents gather in rig.bookkeeping[ANSWERS] (N, C, h, w), in the order of `image_indices`; those of a checkpoint stay.
        settings: images and seeds.
        after: called after each batch, the clock stopped, with the fraction of images done and the method's notes.
        interrupted: asked after each batch whether to stop.
        watched: entered around all that the budget pays for: `Observer.training`.

    Raises:
        Unscored: when the scorer gave no image of a batch a score.
    """
    indices = image_indices(rig.train_prompts, settings.images)
    while (start := len(answers(rig))) < len(indices):
        batch = indices[start : start + rig.rows]
        noise = evaluator.initial_noise(rig.model, rig.train_prompts, batch, settings.noise_seed)
        rig.meter.agree(rig.processes)
        x0: Tensor | None = None
        with watched():
            rig.meter.start()
            try:
                expected = expect_scores(rig) if settings.on_budget else nullcontext()
                with expected, torch.no_grad(), rig.keyed(keys(rig, batch, settings)):
                    x0 = method.answer(rig.view, noise, torch.tensor([i for i, _ in batch]), len(indices))
            except Spent as spent:
                rig.bookkeeping[BOUND] = spent.currency
            finally:
                rig.drain()
                rig.meter.stop()
        if x0 is None:
            prompts = [rig.train_prompts[i] for i, _ in batch]
            x0 = evaluator.sample_protocol(rig.model, noise, prompts, weights="ref")
        rig.bookkeeping[ANSWERS] = torch.cat([answers(rig), x0.cpu()])
        rig.iteration += 1
        after(len(answers(rig)) / len(indices), rig.notes())
        if rig.processes.any(interrupted()):
            return "interrupted"
    if BOUND in rig.bookkeeping:
        return f"budget: {rig.bookkeeping[BOUND]}"
    return f"search: {rig.meter.images / len(indices):.4g} candidates an image"


def answers(rig: MeteredRig) -> Tensor:
    """(N, C, h, w): the latents found so far, on the CPU."""
    return rig.bookkeeping.get(ANSWERS, torch.empty(0, *rig.model.shape)).cpu()


def keys(rig: MeteredRig, batch: Sequence[ImageIndex], settings: SearchSettings) -> Tensor:
    """(B,): the keys of each image's further draws; they depend on prompt, ordinal and seeds, not on the batch."""
    texts = [f"{settings.seed}\n{settings.noise_seed}\n{ordinal}\n{rig.train_prompts[i].text}" for i, ordinal in batch]
    return torch.tensor([int.from_bytes(hashlib.sha256(t.encode()).digest()[:7], "big") for t in texts])


def scaled_budget(budget: Budget, images: int, whole: int) -> Budget:
    """The budget that gives each of `images` images what this one gives each of `whole` images."""
    # The last factor: a bound that pays for a number of candidates exactly must not lose one to rounding.
    bounds = {currency: bound * images / whole * (1 + 1e-12) for currency, bound in budget.bounds().items()}
    return replace(budget, **bounds)
