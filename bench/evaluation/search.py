"""Search without training: a method spends the budget on the evaluated images themselves, batch by batch.

Each image starts from its own evaluation noise and draws with its own keys. A search may use the training scorer, so only the
held-out scorers show what it really gains. Of a search that states its answers on the way, those after 1, 2, 4 ... candidates are
kept: with what they cost they are its frontier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..budget import Budget, Spent
from ..spec import Rig, Search, SupportsIntermediateAnswers, nfe_of_an_image
from ..training.rig import MeteredRig
from ..training.unscored import expect_scores
from . import evaluator
from .request import ImageIndex, image_indices

# Keys of rig.bookkeeping, so that a checkpoint keeps them: the latents found, the currency that ran out, the latents after so many
# candidates, and what all images cost up to then.
ANSWERS, BOUND, AFTER, COSTS = "search/answers", "search/bound", "search/after ", "search/costs"
END = "end"  # in COSTS: of the whole search


@dataclass(frozen=True)
class SearchSettings:
    """Which images a search is for, and its seeds."""

    images: int  # a prompt
    noise_seed: int  # of the evaluation noise
    seed: int  # of the method's own draws
    # What is spent counts: a batch without a single score ends the search, and answers on the way are kept.
    on_budget: bool = True


@dataclass(frozen=True)
class SearchPoint:
    """The images that a search would serve after so many candidates, and what they cost, as means over the images."""

    candidates: float  # images that were tried for one
    nfe: float
    latents: Tensor  # (N, C, h, w), on the CPU


@dataclass
class _BatchAnswers:
    """The answers of one batch so far."""

    latents: Tensor | None = None  # (B, C, h, w): the last answer
    nfe: int = 0  # of the batch up to it, and the images tried
    images: int = 0
    kept: dict[int, tuple[Tensor, int, int]] = field(default_factory=dict[int, tuple[Tensor, int, int]])
    _count: int = 0
    _pending: tuple[Tensor, int, int] | None = (
        None  # kept once another answer follows: the last one is no point on the way
    )

    def add(self, latents: Tensor, nfe: int, images: int, keep: bool) -> None:
        """Take the next answer. keep: keep those after 1, 2, 4 ... candidates, with what they cost."""
        if self._pending is not None:
            self.kept[self._count] = self._pending
        self._count += 1
        self.latents, self.nfe, self.images = latents, nfe, images
        power_of_two = self._count & (self._count - 1) == 0
        # A copy, as a method may go on writing on its own tensor.
        self._pending = (latents.to("cpu", copy=True), nfe, images) if keep and power_of_two else None


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
    _open_books(rig)
    while (start := len(answers(rig))) < len(indices):
        batch = indices[start : start + rig.rows]
        noise = evaluator.initial_noise(rig.model, rig.train_prompts, batch, settings.noise_seed)
        rig.meter.agree(rig.processes)
        found = _BatchAnswers()
        nfe, images = rig.meter.nfe, rig.meter.images
        with watched():
            rig.meter.start()
            try:
                expected = expect_scores(rig) if settings.on_budget else nullcontext()
                with expected, torch.no_grad(), rig.keyed(keys(rig, batch, settings)):
                    prompt_ids = torch.tensor([i for i, _ in batch])
                    for x0 in stated_answers(method, rig.view, noise, prompt_ids, len(indices)):
                        found.add(x0, rig.meter.nfe - nfe, rig.meter.images - images, settings.on_budget)
            except Spent as spent:
                rig.bookkeeping[BOUND] = spent.currency
            finally:
                rig.drain()
                rig.meter.stop()
        if found.latents is None:
            prompts = [rig.train_prompts[i] for i, _ in batch]
            x0 = evaluator.sample_protocol(rig.model, noise, prompts, weights="ref")
            # Off budget, and yet an image that is served costs its steps.
            found.add(x0, rig.meter.nfe - nfe + len(batch) * nfe_of_an_image(rig.model), len(batch), keep=False)
        _enter(rig, found)
        rig.iteration += 1
        after(len(answers(rig)) / len(indices), rig.notes())
        if rig.processes.any(interrupted()):
            return "interrupted"
    if BOUND in rig.bookkeeping:
        return f"budget: {rig.bookkeeping[BOUND]}"
    return f"search: {rig.meter.images / len(indices):.4g} candidates an image"


def stated_answers(method: Search, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Iterator[Tensor]:
    """Yield the latents (B, C, h, w) of a search, one answer after each candidate where it states them; arguments of `answer`."""
    if isinstance(method, SupportsIntermediateAnswers):
        yield from method.answers(rig, noise, prompt_ids, images)
    else:
        yield method.answer(rig, noise, prompt_ids, images)


def answers(rig: MeteredRig) -> Tensor:
    """(N, C, h, w): the latents found so far, on the CPU."""
    return rig.bookkeeping.get(ANSWERS, torch.empty(0, *rig.model.shape)).cpu()


def frontier(rig: MeteredRig) -> list[SearchPoint]:
    """The images after 1, 2, 4 ... candidates and at last those found; [] where a checkpoint of an earlier version holds no costs."""
    costs: dict[str, list[int]] = rig.bookkeeping.get(COSTS, {})
    served = max(len(answers(rig)), 1)
    latents = {str(count): rig.bookkeeping[f"{AFTER}{count}"].cpu() for count in _kept_counts(rig)}
    latents[END] = answers(rig)
    return [
        SearchPoint(costs[name][1] / served, costs[name][0] / served, x0)
        for name, x0 in latents.items()
        if name in costs
    ]


def _open_books(rig: MeteredRig) -> None:
    """Set the costs of a search that begins to zero; move the latents of a restored one to the CPU, where they gather."""
    if ANSWERS not in rig.bookkeeping:
        rig.bookkeeping[COSTS] = {END: [0, 0]}
    for key in (ANSWERS, *(f"{AFTER}{count}" for count in _kept_counts(rig))):
        if key in rig.bookkeeping:
            rig.bookkeeping[key] = rig.bookkeeping[key].cpu()


def _kept_counts(rig: MeteredRig) -> list[int]:
    """The numbers of candidates after which answers were kept, rising."""
    return sorted(int(key) for key in rig.bookkeeping.get(COSTS, {}) if key != END)


def _enter(rig: MeteredRig, found: _BatchAnswers) -> None:
    """Add the answers of a batch to those of the batches before; an image whose search ended earlier keeps its last answer."""
    assert found.latents is not None
    before, last = answers(rig), found.latents.cpu()
    if (costs := rig.bookkeeping.get(COSTS)) is not None:
        ended: list[int] = costs[END]
        for count in sorted({*_kept_counts(rig), *found.kept}):
            x0, nfe, images = found.kept.get(count, (last, found.nfe, found.images))
            earlier = rig.bookkeeping.get(f"{AFTER}{count}", before)
            nfe_before, images_before = costs.get(str(count), ended)
            rig.bookkeeping[f"{AFTER}{count}"] = torch.cat([earlier, x0])
            costs[str(count)] = [nfe_before + nfe, images_before + images]
        costs[END] = [ended[0] + found.nfe, ended[1] + found.images]
    rig.bookkeeping[ANSWERS] = torch.cat([before, last])


def keys(rig: MeteredRig, batch: Sequence[ImageIndex], settings: SearchSettings) -> Tensor:
    """(B,): the keys of each image's further draws; they depend on prompt, ordinal and seeds, not on the batch."""
    texts = [f"{settings.seed}\n{settings.noise_seed}\n{ordinal}\n{rig.train_prompts[i].text}" for i, ordinal in batch]
    return torch.tensor([int.from_bytes(hashlib.sha256(t.encode()).digest()[:7], "big") for t in texts])


def scaled_budget(budget: Budget, images: int, whole: int) -> Budget:
    """The budget that gives each of `images` images what this one gives each of `whole` images."""
    # The last factor: a bound that pays for a number of candidates exactly must not lose one to rounding.
    bounds = {currency: bound * images / whole * (1 + 1e-12) for currency, bound in budget.bounds().items()}
    return replace(budget, **bounds)
