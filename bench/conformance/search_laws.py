"""Laws about searches: test methods that search at inference and train nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..budget import Budget, Meter, Spent
from ..evaluation.search import stated_answers
from ..spec import SupportsIntermediateAnswers
from .harness import AMPLE_NFE, PROMPTS, Harness, observed, require_as_charged
from .law import LawBroken, LawSkipped, law


def _search_answers(
    harness: Harness, *, seed: int = 0, global_seed: int = 0, parts: int = 2, real: bool = False, whole: bool = False
) -> tuple[Any, list[str], Tensor, Tensor, Tensor]:
    """Ask a search for one image of every prompt, in `parts` calls. whole: for its answer alone, also where it states others before.

    Returns:
        The rig, what was not as charged, the initial noise (B, C, h, w), prompt_ids (B,) and the latents (B, C, h, w).
    """
    prompt_ids = torch.arange(len(PROMPTS))
    rig = harness.rig(seed=seed, real=real, nfe=float(len(prompt_ids) * 8 * harness.model.steps))
    differences: list[str] = []
    noise = torch.randn(len(prompt_ids), *harness.model.shape, generator=torch.Generator().manual_seed(7))
    latents: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad(), observed(rig, None, differences) as watched:
        torch.manual_seed(global_seed)
        method = harness.make()
        rig.meter.start()
        for rows in torch.arange(len(prompt_ids)).chunk(parts):
            start = noise[rows]
            try:
                with watched(), rig.keyed(rows + 1000 * seed):
                    question = (rig.view, start, prompt_ids[rows], len(prompt_ids))
                    found = [method.answer(*question)] if whole else list(stated_answers(method, *question))
                    if not found:
                        raise LawBroken("`answers` yields no latents")
                    latents.append(found[-1])
            except Spent as spent:  # an evaluation then takes the base model's own images
                raise LawSkipped(
                    f"with these settings the budget of 8 plain images an image ends it: {spent}"
                ) from None
            if not torch.equal(start, noise[rows]):
                raise LawBroken("the noise it was given is no longer what it was: others are compared on the same")
    return rig, differences, noise, prompt_ids, torch.cat(latents)


@law("its answers are latents, and the seed decides them", "search")
def answers_are_latents(harness: Harness) -> None:
    """A search returns one finite latent for each noise, and the same latents for the same seed."""
    *_, noise, _, latents = _search_answers(harness)
    if latents.shape != noise.shape or not bool(latents.isfinite().all()):
        raise LawBroken(
            f"{tuple(latents.shape)} came back for noise {tuple(noise.shape)}, finite: {bool(latents.isfinite().all())}"
        )
    if not torch.equal(latents, _search_answers(harness, global_seed=1)[-1]):
        raise LawBroken("the same seed twice gives other images")


@law("the last answer that a search states is its answer", "search")
def last_answer_is_the_answer(harness: Harness) -> None:
    """A search that states answers on the way, for which alone a run asks, ends in the latents of `answer`, at the same cost."""
    if not isinstance(harness.make(), SupportsIntermediateAnswers):
        return
    (stated, *_, last), (alone, *_, answer) = _search_answers(harness), _search_answers(harness, whole=True)
    if not torch.equal(last, answer):
        raise LawBroken("the last latents of `answers` are not those of `answer`, with the same seed")
    if stated.meter.nfe != alone.meter.nfe:
        raise LawBroken(f"`answers` costs {stated.meter.nfe} nfe, and `answer` {alone.meter.nfe}")


@law("a search spends nothing outside the rig", "search")
def search_spends_through_rig(harness: Harness) -> None:
    """The meter shows every call of the network, the decoder and the scorer, counted beside the rig, in a small bench and a real one."""
    for real in (False, True):
        _, differences, *_ = _search_answers(harness, real=real)
        require_as_charged(differences)


@law("a search shares its budget out over all images", "search")
def shares_budget(harness: Harness) -> None:
    """A search never exceeds its budget, and the last image gets its share."""
    rig, *_ = _search_answers(harness)
    bound = rig.meter.budget.nfe
    if rig.meter.nfe > bound:
        raise LawBroken(f"{rig.meter.nfe} nfe were spent of {bound:g}")


@law("a search finds better images than a plain draw", "search", hard=False)
def finds_better_images(harness: Harness) -> None:
    """The images of a search must have a higher reward than plain samples, or its budget buys nothing."""
    rig, _, noise, prompt_ids, latents = _search_answers(harness)
    rig.meter = Meter(Budget(nfe=AMPLE_NFE))
    with torch.no_grad():
        difference = rig.score(latents, prompt_ids) - rig.score(rig.sample(noise, prompt_ids), prompt_ids)
    if not float(difference.mean()) > 0:
        raise LawBroken(f"the reward of its images is {float(difference.mean()):+.4f} above that of plain samples")
