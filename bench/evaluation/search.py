"""A search spends the budget on the judged images themselves: batch by batch, each from its own noise and its own keys.

It is to a method without training what `train` is to the others. The scorer it may ask is the training scorer, so only
the held-out ones tell what it really gains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..budget import Budget, Spent
from ..spec import Search
from ..training.rig import Rig
from . import evaluator

ANSWERS, BOUND = "search/answers", "search/bound"  # in rig.state: what a checkpoint keeps of a search


def search(
    method: Search,
    rig: Rig,
    images: int,
    *,
    noise_seed: int,
    seed: int,
    after: Callable[[float, dict[str, float]], None] = lambda done, numbers: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> str:
    """Let the method answer for `images` of every prompt in rig.book, from the judge's noise; returns why it stopped.

    The answers gather in rig.state[ANSWERS] (N, C, h, w), in the order of `evaluate.asked`; those that are there already
    are not asked for again. seed: of the method's own draws. What the budget no longer affords is the base's own image,
    off budget like every judged image. after: called after each batch with the share that is done, the clock stopped.
    """
    every = evaluator.image_indices(rig.book, images)
    while (done := len(answers(rig))) < len(every):
        part = every[done : done + rig.rows]
        noise = evaluator.initial_noise(rig.model, rig.book, part, noise_seed)
        rig.meter.agree(rig.processes)
        rig.meter.start()
        try:
            with torch.no_grad(), rig.keyed(keys(rig, part, noise_seed, seed)):
                x0 = method.answer(rig, noise, torch.tensor([i for i, _ in part]), len(every))
        except Spent as spent:
            rig.meter.stop()
            rig.state[BOUND] = spent.currency
            x0 = evaluator.sample_protocol(rig.model, noise, [rig.book[i] for i, _ in part], weights="ref")
        finally:
            rig.meter.stop()
        rig.state[ANSWERS] = torch.cat([answers(rig), x0.cpu()])
        rig.iteration += 1
        after(len(answers(rig)) / len(every), rig.notes())
        if rig.processes.any(interrupted()):
            return "interrupted"
    if BOUND in rig.state:
        return f"budget: {rig.state[BOUND]}"
    return f"search: {rig.meter.images / len(every):.4g} candidates an image"


def answers(rig: Rig) -> Tensor:
    """(N, C, h, w): the latents found so far, on the CPU."""
    return rig.state.get(ANSWERS, torch.empty(0, *rig.model.shape)).cpu()


def keys(rig: Rig, part: list[evaluator.ImageIndex], noise_seed: int, seed: int) -> Tensor:
    """(B,): what each image's further draws depend on: its prompt, its ordinal and the seeds, never its company."""
    texts = [f"{seed}\n{noise_seed}\n{ordinal}\n{rig.book[i].text}" for i, ordinal in part]
    return torch.tensor([int.from_bytes(hashlib.sha256(t.encode()).digest()[:7], "big") for t in texts])


def share(budget: Budget, part: int, whole: int) -> Budget:
    """The budget that affords each of `part` images what this one affords each of `whole`."""
    # The last factor: a bound that affords a number of candidates exactly must not lose one to rounding.
    scaled = {currency: bound * part / whole * (1 + 1e-12) for currency, bound in budget.bounds().items()}
    return replace(budget, **scaled)
