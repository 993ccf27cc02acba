"""Evaluation: the same prompts, the same noise and the same scorers for every method and for the base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import error_line
from ..flow import ode
from ..images import read_only_copy
from ..model_spec import ModelSpec
from ..process_group import ProcessGroup
from ..progress import Progress
from ..random_draws import normal, random_words
from ..rendering import RenderedImages, render
from ..scoring.calls import PartEnded, call_in_time
from ..scoring.scorers import calls_at_once
from ..spec import Embedder, EvaluationSettings, Images, Model, Prompt, Scores, Split, Task
from ..stats.distances import siblings
from ..training.embeddings import EmbeddingCache
from ..training.rig import BATCHES_AHEAD, SINGLE_PROCESS, timed_scores, walk
from .estimates import COLUMNS, Evaluation, Vectors
from .evaluation_cache import RunConditions, cache_key, cached_evaluation
from .request import EvaluationRequest, ImageIndex, image_indices
from .scorer_set import ScorerSet

if TYPE_CHECKING:
    import pandas as pd

Embedded = tuple[Vectors, dict[int, str]]  # (images, D), and row -> reason for the rows that could not be embedded


def _no_progress(images: int) -> None:
    """Report nothing."""


def noise_key(prompt: str, ordinal: int, seed: int) -> int:
    """The key of an image's noise, a signed number of 64 bits."""
    digest = hashlib.sha256(f"{seed}\n{ordinal}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def noise(images: Sequence[tuple[str, int]], seed: int, shape: tuple[int, ...], device: Any = "cpu") -> Tensor:
    """(B, C, h, w) standard normal for B images (prompt, ordinal); a row depends on them and the evaluation seed alone."""
    keys = torch.tensor([noise_key(prompt, ordinal, seed) for prompt, ordinal in images], dtype=torch.long)
    return normal(random_words(keys.to(device), math.prod(shape))).view(len(images), *shape)


def initial_noise(model: Model, prompts: Sequence[Prompt], indices: Sequence[ImageIndex], seed: int) -> Tensor:
    """(B, C, h, w): the noise of these images, on the model's device."""
    return noise([(prompts[i].text, ordinal) for i, ordinal in indices], seed, model.shape, model.device)


@torch.no_grad()
def sample_protocol(
    model: Model,
    x: Tensor,
    prompts: Sequence[Prompt],
    weights: str = "policy",
    embeddings: EmbeddingCache | None = None,
) -> Tensor:
    """(B, C, h, w): the clean latent that the protocol's ODE reaches from noise x, one prompt a row; nothing is charged.

    embeddings: of the model; None encodes the prompts for this call alone.
    """
    cond = (embeddings or EmbeddingCache(model.encode))([p.text for p in prompts])
    velocity = lambda x, t, _: model.velocity(x, t, cond, guidance=model.guidance, weights=weights, merged=True)
    for step in walk(model.path, velocity, x, model.times(model.steps), [ode] * model.steps):
        x = step.x_next
    return x


@dataclass(frozen=True)
class _Scored:
    """One batch: the images to return, and scores and vectors of all images, by the scorer's or embedder's name."""

    shown: Images
    scores: dict[str, Scores]
    vectors: dict[str, Embedded]


@dataclass(frozen=True)
class _Pending:
    """One batch while its scorers and embedders still compute."""

    shown: Images
    scores: dict[str, Future[tuple[Scores, float]]]
    vectors: dict[str, Future[Embedded]]

    def wait(self) -> None:
        """Wait until every scorer and embedder is done."""
        wait(self.scores.values())
        wait(self.vectors.values())

    def result(self) -> _Scored:
        scores = {name: future.result()[0] for name, future in self.scores.items()}
        return _Scored(self.shown, scores, {name: future.result() for name, future in self.vectors.items()})


def evaluate(
    model: Model,
    request: EvaluationRequest,
    *,
    processes: ProcessGroup = SINGLE_PROCESS,
    advance: Callable[[int], None] = _no_progress,
    embeddings: EmbeddingCache | None = None,
) -> Evaluation:
    """Sample the requested images and score them, every scorer and embedder in a thread of its own.

    Args:
        model: with the weights to evaluate.
        request: which images, and who scores them.
        processes: they divide the batches, and each returns the whole.
        advance: called with the number of images sampled.
        embeddings: of the model's prompts, kept from evaluation to evaluation; None encodes them for this one.
    """
    request = replace(request, diversity=request.diversity if request.images > 1 else ())  # one image has no distances
    prompts, indices = request.prompts, image_indices(request.prompts, request.images)
    batches = [indices[start : start + request.rows] for start in range(0, len(indices), request.rows)]
    embedders = {embedder.name: embedder for embedder in (*request.diversity, *request.drift)}
    sampler = _Sampler(model, request, embeddings or EmbeddingCache(model.encode))
    scored = _score_batches(sampler, batches, list(embedders.values()), processes, advance)

    embedded = {name: _joined([batch.vectors[name] for batch in scored]) for name in embedders}
    scores = [
        (batch, scorer.name, result.scores[scorer.name])
        for batch, result in zip(batches, scored, strict=True)
        for scorer in request.scorers
    ]
    scores += [
        (indices, f"diversity-{e.name}", _diversity(*embedded[e.name], request.images, e.distance))
        for e in request.diversity
    ]
    vectors = {e.name: embedded[e.name][0] for e in request.drift}
    return Evaluation(_table(prompts, scores), np.concatenate([result.shown for result in scored]), vectors)


@dataclass(frozen=True)
class _Sampler:
    """Makes the images of a request."""

    model: Model
    request: EvaluationRequest
    embeddings: EmbeddingCache

    def images(self, batch: Sequence[ImageIndex], start: int) -> RenderedImages:
        """The images of a batch whose first image has number `start`: of the request's latents, or sampled by the protocol."""
        request, model = self.request, self.model
        if request.latents is not None:
            x0 = request.latents[start : start + len(batch)].to(model.device)
        else:
            x = initial_noise(model, request.prompts, batch, request.seed)
            prompts = [request.prompts[i] for i, _ in batch]
            x0 = sample_protocol(model, x, prompts, request.weights, self.embeddings)
        return render(model.decode, x0)


@torch.no_grad()
def _score_batches(
    sampler: _Sampler,
    batches: Sequence[Sequence[ImageIndex]],
    embedders: Sequence[Embedder],
    processes: ProcessGroup,
    advance: Callable[[int], None],
) -> list[_Scored]:
    """Sample batch after batch while scorers and embedders work on the batches before."""
    request = sampler.request
    by_ordinal = sorted((index for batch in batches for index in batch), key=lambda index: index[::-1])
    shown = set(by_ordinal[: request.shown])
    calls = {**{scorer.name: calls_at_once(scorer) for scorer in request.scorers}, **{e.name: 1 for e in embedders}}
    threads = {name: ThreadPoolExecutor(count, thread_name_prefix=name) for name, count in calls.items()}
    pending: list[_Pending | None] = []  # None: another process computes the batch
    try:
        for k, batch in enumerate(batches):
            if len(pending) >= BATCHES_AHEAD and (earlier := pending[-BATCHES_AHEAD]) is not None:
                earlier.wait()
            if processes.owns(k):
                prompts = [request.prompts[i] for i, _ in batch]
                images = sampler.images(batch, k * request.rows)
                pending.append(
                    _Pending(
                        images.pixels[[index in shown for index in batch]],
                        {s.name: threads[s.name].submit(timed_scores, s, images, prompts) for s in request.scorers},
                        {e.name: threads[e.name].submit(embed_rendered, e, images) for e in embedders},
                    )
                )
            else:
                pending.append(None)
            advance(len(batch))
        return processes.exchange_objects([batch.result() if batch else None for batch in pending])
    finally:
        for thread in threads.values():
            thread.shutdown(wait=True, cancel_futures=True)


def embed(embedder: Embedder, images: Images) -> Embedded:
    """(B, D) float32, and row -> reason; an embedder that raises or returns nonsense gives rows of NaN."""
    try:
        vectors = np.asarray(call_in_time(embedder, read_only_copy(images)), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(images):
            raise ValueError(f"returned {vectors.shape} for {len(images)} images")
        infinite = np.flatnonzero(~np.isfinite(vectors).all(1))
        vectors[infinite] = np.nan
        return vectors, {int(row): f"{embedder.name}: returned numbers that are not finite" for row in infinite}
    except Exception as error:  # third-party code, as a scorer is
        if len(images) > 1:
            return _joined([embed(embedder, images[row : row + 1]) for row in range(len(images))])
        return np.full((1, 1), np.nan, np.float32), {
            0: f"{embedder.name}: {str(error) if isinstance(error, PartEnded) else error_line(error)}"
        }


def embed_rendered(embedder: Embedder, images: RenderedImages) -> Embedded:
    """`embed` the images that are finite; the others are rows of NaN with the reason."""
    if not images.faults:
        return embed(embedder, images.pixels)
    rows = images.sound_rows
    sound, failures = embed(embedder, images.pixels[rows]) if rows else (np.zeros((0, 1), np.float32), {})
    vectors = np.full((len(images), sound.shape[1]), np.nan, np.float32)
    vectors[rows] = sound
    reasons = {row: f"{embedder.name}: {fault}" for row, fault in images.faults.items()}
    return vectors, reasons | {rows[k]: reason for k, reason in failures.items()}


def _joined(parts: Sequence[Embedded]) -> Embedded:
    """The parts one below the other; a part that failed as a whole, one column of NaN, gets the width of the others."""
    width = max((vectors.shape[1] for vectors, _ in parts), default=1)
    rows = [np.broadcast_to(v, (len(v), width)) if v.shape[1] == 1 else v for v, _ in parts]
    starts = np.cumsum([0, *(len(v) for v in rows)])
    reasons = {
        int(start) + row: reason
        for start, (_, part) in zip(starts, parts, strict=False)
        for row, reason in part.items()
    }
    return np.concatenate(rows), reasons


def _diversity(vectors: Vectors, failures: Mapping[int, str], images: int, distance: Any) -> Scores:
    """Distance of each image from the others of its prompt; the mean over a prompt is its mean pairwise distance."""
    value = np.full(len(vectors), np.nan)
    reasons = dict(failures)
    for start in range(0, len(value), images):
        rows = np.arange(start, start + images)
        embedded = rows[[row not in failures for row in rows]]
        value[embedded] = siblings(vectors[embedded], distance)
        if len(embedded) < 2:
            reasons |= {int(row): "the prompt's other images could not be embedded" for row in embedded}
    return Scores({"pairwise": value}, reasons)


def _table(prompts: Sequence[Prompt], scores: Iterable[tuple[Sequence[ImageIndex], str, Scores]]) -> pd.DataFrame:
    """COLUMNS, sorted by scorer in order of appearance, then metric, prompt and ordinal."""
    import pandas as pd

    rows = [
        (
            i,
            ordinal,
            prompts[i].text,
            prompts[i].stratum,
            scorer,
            metric,
            float(values[row]),
            batch_scores.reasons.get(row, ""),
            batch_scores.notes[row] if batch_scores.notes else "",
        )
        for batch, scorer, batch_scores in scores
        for metric, values in batch_scores.value.items()
        for row, (i, ordinal) in enumerate(batch)
    ]
    order = {name: k for k, name in enumerate(dict.fromkeys(row[4] for row in rows))}
    rows.sort(key=lambda row: (order[row[4]], row[5], row[0], row[1]))
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


@dataclass(frozen=True)
class EvaluationPlan:
    """The prompts a run is evaluated on: validation prompts for the curve, and those of the result."""

    settings: EvaluationSettings
    validation: Sequence[Prompt]
    result: Sequence[Prompt]

    @classmethod
    def of_task(cls, task: Task, domain: str, settings: EvaluationSettings) -> EvaluationPlan:
        """The plan of a task. Settings are chosen on the validation split: then no test prompt is read."""
        validation = task.prompts("validation", domain)
        on_validation = settings.split == "validation"
        return cls(settings, validation, validation if on_validation else task.prompts("test", domain))

    @property
    def on_validation(self) -> bool:
        """Whether the result is evaluated on the validation prompts."""
        return self.settings.split == "validation"

    @property
    def images(self) -> int:
        """Images per prompt of the result."""
        return images_per_prompt(self.settings, self.settings.split)


def images_per_prompt(settings: EvaluationSettings, split: Split) -> int:
    """Images per prompt in an evaluation on a split."""
    return settings.test_images if split == "test" else settings.validation_images


@dataclass(frozen=True)
class Evaluator:
    """Evaluates base and result of one run; evaluations of the base come from caches where they are there.

    base_folder: the cache that all runs of a folder share. conditions: what a base evaluation depends on beside the request.
    """

    model: Model
    scorers: ScorerSet
    plan: EvaluationPlan
    base_folder: Path
    conditions: RunConditions
    processes: ProcessGroup
    progress: Progress

    @cached_property
    def _embeddings(self) -> EmbeddingCache:
        """Of the evaluated prompts: the curve asks for the same ones at every point."""
        return EmbeddingCache(lambda texts: self.model.encode(texts))

    @property
    def model_spec(self) -> ModelSpec:
        """The model's protocol."""
        return self.conditions.model_spec

    def base(self, path: Path) -> Evaluation:
        """The base on the prompts of the result, kept in this run's own cache at `path` too."""
        request = self._result_request(weights="ref")
        return cached_evaluation(
            path, lambda: self._cached_base(request), request.drift, self.processes, self.progress.message
        )

    def result(self, weights: str, latents: Tensor | None) -> Evaluation:
        """The trained weights on the prompts of the result, or the images of these latents (N, C, h, w)."""
        return self._watched("evaluating the result", self._result_request(weights, latents))

    def base_point(self) -> Evaluation:
        """The base on the validation prompts: the first point of the curve."""
        return self._cached_base(self._point_request(weights="ref"))

    def point(self, weights: str, latents: Tensor | None = None) -> Evaluation:
        """The weights, or the images of these latents (N, C, h, w), on the validation prompts: a point of the curve."""
        request = self._point_request(weights, latents)
        return evaluate(self.model, request, processes=self.processes, embeddings=self._embeddings)

    def served(self, latents: Tensor, candidates: float) -> Evaluation:
        """The images that a search would serve after so many candidates, on the prompts of the result, by the scorers of the curve."""
        request = replace(self._result_request("ref", latents), scorers=self.scorers.curve, diversity=(), drift=())
        return self._watched(f"evaluating {candidates:.4g} candidates an image", request)

    def last_point(self, result: Evaluation, weights: str, latents: Tensor | None) -> Evaluation:
        """The last point of the curve: a part of the result where that is on validation prompts, else an evaluation."""
        if not self.plan.on_validation:
            return self.point(weights, latents)
        table = result.table
        return Evaluation(table.loc[table.ordinal < self.plan.settings.curve_images], result.images)

    def _result_request(self, weights: str, latents: Tensor | None = None) -> EvaluationRequest:
        return EvaluationRequest(
            prompts=self.plan.result,
            scorers=self.scorers.all,
            images=self.plan.images,
            seed=self.plan.settings.seed,
            rows=self.model_spec.rows,
            weights=weights,
            latents=latents,
            diversity=self.scorers.diversity,
            drift=self.scorers.drift,
        )

    def _point_request(self, weights: str, latents: Tensor | None = None) -> EvaluationRequest:
        return EvaluationRequest(
            prompts=self.plan.validation,
            scorers=self.scorers.curve,
            images=self.plan.settings.curve_images,
            seed=self.plan.settings.seed,
            rows=self.model_spec.rows,
            weights=weights,
            latents=latents,
        )

    def _cached_base(self, request: EvaluationRequest) -> Evaluation:
        """An evaluation of the base, which the runs of one folder share."""
        return cached_evaluation(
            self.base_folder / cache_key(request, self.conditions),
            lambda: self._watched("evaluating the base", request),
            request.drift,
            self.processes,
            self.progress.message,
        )

    def _watched(self, phase: str, request: EvaluationRequest) -> Evaluation:
        self.progress.phase(phase, len(request.prompts) * request.images)
        return evaluate(
            self.model,
            request,
            processes=self.processes,
            advance=self.progress.advance,
            embeddings=self._embeddings,
        )
