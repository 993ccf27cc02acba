"""Opens the scorer behind a reference, blends several into one, and checks every result before it is used.

A scorer runs in this process, in worker processes, behind a URL or several, or in another Python; the caller need not know which.
How references and locations are written: bench/scoring/references.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from .. import registry
from ..errors import UserError, error_line
from ..images import read_only_copy
from ..rendering import RenderedImages
from ..spec import DifferentiableScorer, Embedder, Images, Prompt, Scorer, Scores, SupportsWorkers, Values
from .calls import PartEnded, call_in_time, time_limit
from .references import ScorerLocation, ScorerReference, blend_name
from .remote import RemoteScorer, connect, start
from .replicas import ReplicatedScorer, connect_replicas
from .worker_pool import WorkerScorer, WorkersFailed
from .worker_setting import WorkerSetting

IN_PROCESS = WorkerSetting()

if TYPE_CHECKING:
    from torch import Tensor


def open_scorer(
    reference: str,
    locations: Mapping[str, ScorerLocation] | None = None,
    workers: WorkerSetting = IN_PROCESS,
) -> Scorer:
    """Open the scorer behind a reference, in this process, in worker processes or at its location.

    A location is looked up by the whole reference first, then by the name before the colon; aliases are one name. Raises
    UserError where there is no such scorer, or the server at its location does not answer or serves another one; Missing where
    its engine is not installed.

    Args:
        reference: a name, a file's class, or a blend.
        locations: where scorers run that do not run here.
        workers: processes for the scorers that support them; none by default.
    """
    locations = locations or {}
    whole = ScorerReference.single(reference)
    if whole.text in {registry.canonical("scorer", name) for name in locations}:  # whatever it would be as a blend
        return _open(whole, locations, workers)
    return _open(ScorerReference.parse(reference), locations, workers)


def _open(reference: ScorerReference, locations: Mapping[str, ScorerLocation], workers: WorkerSetting) -> Scorer:
    if not reference.terms:
        location = reference.at(locations)
        return _open_at(location, reference) if location else _open_here(reference, workers)
    opened: list[tuple[Scorer, float]] = []
    try:
        for scorer, weight in reference.terms:
            opened.append((_open(scorer, locations, workers), weight))
        return Blend(opened)
    except BaseException:
        close_scorers([part for part, _ in opened])
        raise


def _open_here(reference: ScorerReference, workers: WorkerSetting) -> InProcessScorer | WorkerScorer:
    """Make a scorer in this process, and give it workers where it supports them."""
    scorer = _checked_scorer(reference)
    part: object = scorer.part
    if not isinstance(part, SupportsWorkers):
        return scorer
    count = workers.processes(part.worker_images, part.image_seconds)
    return WorkerScorer(scorer, reference.text, part.worker_images, count) if count else scorer


def _checked_scorer(reference: ScorerReference) -> InProcessScorer:
    """Make a scorer in this process. Raises UserError where what was made is none."""
    time_limit()
    made: Any = registry.scorer(reference.text)
    scorer, is_called = made, callable(made)
    for name in ("id", "name", "metrics"):
        if not getattr(scorer, name, ""):
            raise UserError(f"scorer {reference.text} has no {name}: it is not a gpobench.bench.spec.Scorer")
    if not is_called:
        raise UserError(f"scorer {reference.text} cannot be called: it is not a gpobench.bench.spec.Scorer")
    return InProcessScorer(scorer)


def _open_at(location: ScorerLocation, reference: ScorerReference) -> RemoteScorer | ReplicatedScorer:
    if location.python:
        return start(location.python, reference.text, timeout=location.timeout)
    urls = location.urls
    remote = (
        connect(urls[0], token=location.token, timeout=location.timeout)
        if len(urls) == 1
        else connect_replicas(urls, token=location.token, timeout=location.timeout)
    )
    served = registry.canonical("scorer", remote.reference)
    if served and served != reference.text and reference.base in registry.entries("scorer"):
        raise UserError(
            f"the server at {location.url} serves {served!r}, not {reference.text!r}; start it with: "
            f"gpobench serve-scorer {reference.text}"
        )
    return remote


def close_scorers(scorers: Iterable[Scorer]) -> None:
    """End the processes that were started for scorers in another Python."""
    for scorer in scorers:
        if isinstance(scorer, Blend):
            close_scorers([part for part, _ in scorer.parts])
        elif isinstance(scorer, RemoteScorer | WorkerScorer):
            scorer.close()


def calls_at_once(scorer: Scorer) -> int:
    """Calls of a scorer that are worth making at the same time: engines of this process take one."""
    if isinstance(scorer, Blend):
        return min(calls_at_once(part) for part, _ in scorer.parts)
    if isinstance(scorer, ReplicatedScorer):
        return len(scorer.replicas)
    return 2 if isinstance(scorer, WorkerScorer) else 1  # the second one's chunks follow where the first one's run out


# Scoring


class ScorerChanged(Exception):
    """A scorer or an embedder is not the one that was opened."""


class InProcessScorer:
    """A scorer of this process under the id, name and metrics it was opened with.

    Once its id is another one, it gives no more scores: numbers of two scorers do not stand in one column. A scorer behind a
    URL is treated in the same way (`RemoteScorer`).
    """

    def __init__(self, scorer: Scorer) -> None:
        self.id, self.name = scorer.id, scorer.name
        self.metrics: Sequence[str] = tuple(scorer.metrics)
        self.part = scorer

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to every metric (B,). Raises ScorerChanged, and what the scorer raises."""
        scores = self.part(images, prompts)
        if self.part.id != self.id:
            raise ScorerChanged(f"its id is {self.part.id} now, was {self.id}")
        return scores

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) in [0, 1] and B prompts to the first metric (B,) with a gradient. Raises as a call does."""
        if not isinstance(self.part, DifferentiableScorer):
            raise TypeError(f"{self.name} has no gradient")
        value = self.part.differentiable(images, prompts)
        if self.part.id != self.id:
            raise ScorerChanged(f"its id is {self.part.id} now, was {self.id}")
        return value


class InProcessEmbedder:
    """An embedder under the id, name and distance it was opened with; once its id is another one, it gives no more vectors."""

    def __init__(self, embedder: Embedder) -> None:
        self.id, self.name, self.part = embedder.id, embedder.name, embedder
        self.distance: Literal["cosine", "squared"] = embedder.distance

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Map (B, H, W, 3) to (B, D). Raises ScorerChanged, and what the embedder raises."""
        vectors = self.part(images)
        if self.part.id != self.id:
            raise ScorerChanged(f"its id is {self.part.id} now, was {self.id}")
        return vectors


def open_embedder(name: str) -> InProcessEmbedder:
    """Open the embedder of this name. Raises Missing where a package or weights of it are missing."""
    return InProcessEmbedder(registry.embedder(name))


def part_behind(part: object) -> object:
    """The object that a scorer or embedder of this process was made of; anything else is returned as it is."""
    return part.part if isinstance(part, InProcessScorer | InProcessEmbedder) else part


def parts_behind(part: object) -> list[object]:
    """The objects whose calls are calls of a scorer or embedder: with workers what hands out images, and what was opened here."""
    return [part, part_behind(part.scorer)] if isinstance(part, WorkerScorer) else [part_behind(part)]


class Blend:
    """Sums the weighted first metrics of several scorers; an image that one part cannot score has no score."""

    def __init__(self, weighted: Iterable[tuple[Scorer, float]]) -> None:
        """Keep the parts; UserError where two share a name, or a weight is 0 or not finite."""
        self.parts = sorted(weighted, key=lambda pair: pair[0].name)
        names = [part.name for part, _ in self.parts]
        twice = len(set(names)) < len(names)
        if twice or not names:
            raise UserError(f"a blend is of scorers of different names, got {', '.join(names) or 'none'}")
        for part, weight in self.parts:
            if not math.isfinite(weight) or weight == 0:
                raise UserError(f"a blend's weights are finite and not 0, got {weight} for {part.name}")
        self.name = blend_name((part.name, weight) for part, weight in self.parts)
        self.id = (
            "blend(" + ", ".join(f"{weight!r} * {id}" for id, weight in sorted((p.id, w) for p, w in self.parts)) + ")"
        )
        self.metrics: Sequence[str] = (
            "blend",
            *(f"{part.name}.{metric}" for part, _ in self.parts for metric in part.metrics),
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to blend (B,), and to every metric of every part as `name.metric`."""
        total = np.zeros(len(images))
        value: dict[str, Values] = {}
        reasons: dict[int, list[str]] = {}
        notes: list[list[str]] = [[] for _ in range(len(images))]
        for part, weight in self.parts:
            part_scores = ask(part, images, prompts)
            total += weight * part_scores.value[part.metrics[0]]
            value |= {f"{part.name}.{metric}": part_scores.value[metric] for metric in part.metrics}
            for row, why in part_scores.reasons.items():
                reasons.setdefault(row, []).append(why if part.name in why else f"{part.name}: {why}")
            for row, note in enumerate(part_scores.notes or ()):
                notes[row].append(f"{part.name}: {note}")
        joined = [" | ".join(row) for row in notes] if any(notes) else None
        return Scores({"blend": total, **value}, {row: "; ".join(whys) for row, whys in reasons.items()}, joined)

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) in [0, 1] and B prompts to blend (B,) with a gradient. Raises what a part raises."""
        parts = [(cast(DifferentiableScorer, part), weight) for part, weight in self.parts]
        values = [weight * part.differentiable(images, prompts) for part, weight in parts]
        return sum(values[1:], start=values[0])


def ask(scorer: Scorer, images: Images, prompts: Sequence[Prompt]) -> Scores:
    """Call a scorer; any failure becomes NaN with a reason. Every metric of the result is a new (B,) float64.

    Raises WorkersFailed where its worker processes end, and AtOnce.

    A prompt that a scorer refuses does not affect the others of its batch: each is then scored by itself. The scorer gets copies,
    and the images cannot be written on: nothing it does to them reaches another scorer.
    """
    try:
        # A scorer in another process has a time limit of its own, a blend's parts have theirs.
        elsewhere = isinstance(scorer, Blend | RemoteScorer | ReplicatedScorer | WorkerScorer)
        arguments = read_only_copy(images), [_private_prompt(prompt) for prompt in prompts]
        scores = scorer(*arguments) if elsewhere else call_in_time(scorer, *arguments)
        return checked_scores(scorer, scores, len(images))
    except WorkersFailed:
        raise  # which images a scorer can score does not depend on how many processes were killed
    except UserError as error:
        if len(images) == 1:
            return _all_missing(scorer, 1, error_line(error))
        return _concatenated(scorer, [ask(scorer, images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])
    except PartEnded as error:
        return _all_missing(scorer, len(images), str(error))
    except Exception as error:  # a scorer is foreign code: nothing it does may end or falsify a run
        return _all_missing(scorer, len(images), error_line(error))


def ask_rendered(scorer: Scorer, images: RenderedImages, prompts: Sequence[Prompt]) -> Scores:
    """`ask` about the images that may be scored; the others are NaN with the reason."""
    if not images.faults:
        return ask(scorer, images.pixels, prompts)
    rows = images.sound_rows
    value = {metric: np.full(len(images), np.nan) for metric in scorer.metrics}
    reasons = {row: f"{scorer.name}: {fault}" for row, fault in images.faults.items()}
    notes = [""] * len(images)
    if rows:
        scores = ask(scorer, images.pixels[rows], [prompts[row] for row in rows])
        for metric, column in value.items():
            column[rows] = scores.value[metric]
        reasons |= {rows[k]: reason for k, reason in scores.reasons.items()}
        for row, note in zip(rows, scores.notes or (), strict=False):
            notes[row] = note
    return Scores(value, reasons, notes if any(notes) else None)


def _private_prompt(prompt: Prompt) -> Prompt:
    """The prompt with a copy of its facts."""
    try:
        return replace(prompt, meta=_copied(prompt.meta))
    except Exception:  # facts that cannot be copied, such as ones that contain themselves, are the scorer's to refuse
        return prompt


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _all_missing(scorer: Scorer, n: int, reason: str) -> Scores:
    nan = {metric: np.full(n, np.nan) for metric in scorer.metrics}
    return Scores(nan, dict.fromkeys(range(n), f"{scorer.name}: {reason}"))


def _concatenated(scorer: Scorer, results: Sequence[Scores]) -> Scores:
    """Concatenate the results of single images."""
    value = {
        metric: np.concatenate([np.zeros(0), *(scores.value[metric] for scores in results)])
        for metric in scorer.metrics
    }
    reasons = {row: why for row, scores in enumerate(results) for why in scores.reasons.values()}
    notes = [scores.notes[0] if scores.notes else "" for scores in results]
    return Scores(value, reasons, notes if any(notes) else None)


def checked_scores(scorer: Scorer, scores: Any, n: int) -> Scores:
    """Check what a scorer returned, giving every NaN a reason; ValueError where it is no valid result."""
    if not isinstance(scores, Scores):
        raise ValueError(f"returned {type(scores).__name__}, not Scores")
    value: dict[str, Values] = {}
    raw_reasons: dict[Any, Any] = dict(scores.reasons)  # foreign code may say anything
    texts = {int(row): "" if why is None else _text(why) for row, why in raw_reasons.items()}
    reasons = {row: why for row, why in texts.items() if why and 0 <= row < n}
    for metric in scorer.metrics:
        if metric not in scores.value:
            raise ValueError(f"returned no {metric!r}")
        column = _numbers(scores.value[metric], metric)
        if column.shape != (n,):
            raise ValueError(f"returned {metric} of shape {column.shape} for {n} images")
        unusable = ~_finite_in_float32(column)
        for row in np.flatnonzero(unusable):
            reasons.setdefault(int(row), f"{scorer.name}: returned {column[row]} for {metric}")
        column[unusable] = np.nan
        value[metric] = column
    if scores.notes is not None and len(scores.notes) != n:
        raise ValueError(f"returned {len(scores.notes)} notes for {n} images")
    return Scores(value, reasons, None if scores.notes is None else [_text(note) for note in scores.notes])


def _finite_in_float32(column: Values) -> Any:
    """(B,) bool: the finite numbers that float32 holds too. Rewards are trained on in float32, where 1e39 is infinite."""
    with np.errstate(over="ignore"):
        return np.isfinite(column.astype(np.float32))


def _text(message: Any) -> str:
    """Convert to a string that a table can store, without unpaired surrogates."""
    return str(message).encode("utf-8", "replace").decode()


def _numbers(values: Any, metric: str) -> Values:
    """Copy to float64. numpy would convert "0.5" and drop an imaginary part: neither is a score, so both are refused."""
    column = np.asarray(values)
    if column.dtype == object and all(value is None or isinstance(value, Real) for value in column.flat):
        return column.astype(np.float64)  # None becomes NaN
    if column.dtype.kind not in "fiub":
        raise ValueError(f"returned {column.dtype} for {metric}, not numbers")
    return column.astype(np.float64)
