"""Counts from beside the rig what a run really computes, and compares that with what the meter charged.

The rig charges the meter and then computes. Nothing here asks rig or meter how much that was: the network, the autoencoder and the
scorers are counted where they are called, optimiser steps by torch's own hooks, seconds by another clock. So what a method
computes past the rig stands in the record beside what was charged, and a difference makes the run invalid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from time import perf_counter as _now
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import registry
from ..budget import DATA, Budget, Meter, nothing_uncharged
from ..errors import UserError
from ..process_group import ProcessGroup, dividing
from ..scoring.scorers import part_behind
from .tampering import WeightGuard

# Keys of counts, in rows, images and steps. A scorer's images are counted under SCORED + its name, and forward-equivalents of the
# network also under WEIGHTS + the name of the weights it computed with.
FORWARDS, GRADIENT_FORWARDS, BACKWARDS = "forwards", "gradient_forwards", "backwards"
DECODED, UPDATES, SCORED, WEIGHTS = "decoded", "updates", "scored ", "weights "
# Of the decoded images and of the scores, those with a gradient.
GRADIENT_DECODED, GRADIENT_SCORED = "gradient_decoded", "gradient_scored "
MISMATCH = "what was computed is not what was charged:"  # how the fault of such a run begins
# The meter's clock may show less than the one here by this share and these seconds: a busy machine may pause between the two.
CLOCK_SHARE, CLOCK_SECONDS = 0.05, 1.0
_ABSENT = object()
# Not of a thread: the parts of a blend are called in threads of their own, with a copy of the caller's context.
_INSIDE_SCORER: ContextVar[bool] = ContextVar("inside_scorer", default=False)


@dataclass(frozen=True)
class Observation:
    """What was counted in training and in evaluation, and every difference from what was charged."""

    training: Mapping[str, int] = field(default_factory=dict[str, int])
    evaluation: Mapping[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0  # of training
    differences: Sequence[str] = ()  # one line each; empty where all is as charged


def forward_equivalents(counts: Mapping[str, int]) -> int:
    """The nfe of counts: 1 for a row without a gradient, 3 for one with."""
    return counts.get(FORWARDS, 0) + 3 * counts.get(GRADIENT_FORWARDS, 0)


def by_name(counts: Mapping[str, int], prefix: str) -> dict[str, int]:
    """The counts under SCORED or WEIGHTS, by the name of the scorer or of the weights."""
    return {key.removeprefix(prefix): n for key, n in sorted(counts.items()) if key.startswith(prefix)}


@dataclass
class _Phase:
    """Counts of one phase in this process: of work that every process repeats, and of parts that they divide."""

    repeated: Counter[str] = field(default_factory=Counter[str])
    divided: Counter[str] = field(default_factory=Counter[str])

    @property
    def place(self) -> Counter[str]:
        """Where a call that is made now is counted."""
        return self.divided if dividing() else self.repeated


class Observer:
    """Counts calls of a model's networks, of scorers and of optimisers from `install` to `close`.

    Calls inside `training` count as training, all others as evaluation.
    """

    def __init__(self, model: Any, scorers: Iterable[Any], uncharged: Callable[[], float] = nothing_uncharged):
        """Make an observer that counts nothing yet.

        Args:
            model: a `spec.Model`.
            scorers: scorers and embedders of every role; calls of any object of their classes are counted.
            uncharged: as of `Meter`.
        """
        self._model, self._uncharged = model, uncharged
        self._classes = list(dict.fromkeys(type(part_behind(scorer)) for scorer in scorers))
        self._training, self._evaluation = _Phase(), _Phase()
        self._now = self._evaluation
        self._earlier = Observation()  # before a resume
        self._seconds = 0.0
        self._texts: set[str] = set()  # that were encoded or scored in training
        self._loaded: list[str] = []  # parts that were loaded in training
        self._lock = Lock()
        self._undo = ExitStack()
        self._removed: list[str] = []  # counters that were not in their places when they were to be taken away
        self._weights: WeightGuard | None = None

    # The counters and their places

    def install(self) -> None:
        """Put the counters in their places."""
        network, vae = self._model.network, self._model.vae
        compiled = getattr(network, "_compiled_call_impl", None)  # a network that has no blocks, see `models.compiling`
        if compiled is not None:  # torch traces what it compiles: the counter must lie outside
            self._replace(network, "_compiled_call_impl", partial(self._forward, compiled))
        else:
            self._replace(network, "forward", partial(self._forward, network.forward))
        self._replace(vae, "decode", partial(self._decode, vae.decode))
        self._replace(self._model, "encode", partial(self._encode, self._model.encode))
        for kind in self._classes:
            try:
                self._replace(kind, "__call__", _as_method(self._score, kind.__call__))
                if (differentiable := getattr(kind, "differentiable", None)) is not None:
                    counter = partial(self._score, with_gradient=True)
                    self._replace(kind, "differentiable", _as_method(counter, differentiable))
            except TypeError:  # a class that is written in C takes no attribute
                continue
        for name in ("load", "_load_from_file"):
            self._replace(registry, name, partial(self._load, getattr(registry, name)))
        handle = register_optimizer_step_post_hook(lambda optimizer, args, options: self._count(UPDATES, 1))
        self._undo.callback(handle.remove)

    def watch_weights(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """From now on only a step of this optimiser may change these parameters."""
        self._weights = WeightGuard(parameters, optimizer)
        self._undo.callback(self._weights.close)

    def close(self) -> None:
        """Take the counters away; what they counted stays."""
        self._undo.close()

    def _replace(self, owner: Any, name: str, counter: Any) -> None:
        """Set an attribute until `close`."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, counter)

        def put_back() -> None:
            if vars(owner).get(name) is not counter:
                self._removed.append(f"{getattr(owner, '__name__', type(owner).__name__)}.{name}")
            elif before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.callback(put_back)

    # What they count

    def _count(self, key: str, n: int, place: Counter[str] | None = None) -> None:
        place = self._now.place if place is None else place
        with self._lock:
            place[key] += n

    def _forward(self, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        # One row an image, whether the network takes images or token sequences.
        rows = next(len(value) for value in (*args, *options.values()) if isinstance(value, Tensor))
        with_gradient, place = torch.is_grad_enabled(), self._now.place
        self._count(GRADIENT_FORWARDS if with_gradient else FORWARDS, rows, place)
        self._count(WEIGHTS + self._model.current_weights, 3 * rows if with_gradient else rows, place)
        output = forward(*args, **options)
        if with_gradient:
            # Counted where its forward was, because a loss goes backward outside of its part of the batch. Blocks that
            # checkpointing computes again lie below this function and are not counted, as nowhere in the budget.
            first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(lambda gradient: self._count(BACKWARDS, rows, place))
        return output

    def _decode(self, decode: Callable[..., Any], latents: Tensor, *args: Any, **options: Any) -> Any:
        self._count(DECODED, len(latents))
        if torch.is_grad_enabled() and latents.requires_grad:
            self._count(GRADIENT_DECODED, len(latents))
        return decode(latents, *args, **options)

    def _encode(self, encode: Callable[..., Any], prompts: Sequence[str]) -> Any:
        if self._now is self._training:
            self._texts.update(prompts)
        return encode(prompts)

    def _score(
        self,
        call: Callable[..., Any],
        scorer: Any,
        images: Any,
        *more: Any,
        with_gradient: bool = False,
        **options: Any,
    ) -> Any:
        """Count the images of a call, once where scorers call each other."""
        if _INSIDE_SCORER.get():
            return call(scorer, images, *more, **options)
        outside = _INSIDE_SCORER.set(True)
        counts = True
        try:
            return call(scorer, images, *more, **options)
        except UserError:
            counts = len(images) == 1  # `scorers.ask` then scores the images of a batch one by one
            raise
        finally:
            _INSIDE_SCORER.reset(outside)
            if counts:
                name = str(getattr(scorer, "name", type(scorer).__name__))
                self._count(SCORED + name, len(images))
                if with_gradient:
                    self._count(GRADIENT_SCORED + name, len(images))
                if self._now is self._training:
                    self._texts.update(prompt.text for prompt in (more[0] if more else options.get("prompts", ())))

    def _load(self, load: Callable[..., Any], *references: str) -> Any:
        if self._now is self._training:
            self._loaded.append(references[-1])
        return load(*references)

    @contextmanager
    def training(self) -> Generator[None]:
        """Inside the block calls count as training, and the clock runs."""
        self._now, since, uncharged = self._training, _now(), self._uncharged()
        try:
            yield
        finally:
            self._seconds += _now() - since - (self._uncharged() - uncharged)
            self._now = self._evaluation

    # Results

    def observe(
        self, meter: Meter, budget: Budget, texts: Iterable[str] | None = None, processes: ProcessGroup | None = None
    ) -> Observation:
        """The counts, and every difference from what was charged. With several processes all call it together.

        Args:
            meter: what was charged.
            budget: the bounds as the settings state them.
            texts: those that training may encode and score; None: any.
            processes: that share the run.
        """
        earlier, parts = self._earlier, [(self._training.divided, self._evaluation.divided, self._removed)]
        parts = processes.gather(parts[0]) if processes else parts
        with self._lock:
            training = Counter(earlier.training) + self._training.repeated
            evaluation = Counter(earlier.evaluation) + self._evaluation.repeated
        for divided, divided_evaluation, _ in parts:
            training, evaluation = training + divided, evaluation + divided_evaluation
        seconds = earlier.seconds + self._seconds
        foreign = sorted(self._texts - set(texts)) if texts is not None else []
        differences = [
            *charge_differences(training, meter),
            *bound_differences(training, budget),
            *clock_difference(seconds, meter),
            *(self._weights.evidence() if self._weights else ()),
            *(f"{reference!r} was loaded in training" for reference in dict.fromkeys(self._loaded)),
            *(f"the counter at {place} was replaced" for *_, removed in parts for place in removed),
            *(
                [f"{len(foreign)} texts that are no training prompts were used, such as {foreign[0]!r}"]
                if foreign
                else []
            ),
        ]
        # What a checkpoint states is evidence only where a later look cannot find it again.
        lasting = [line for line in earlier.differences if line not in differences]
        return Observation(dict(training), dict(evaluation), seconds, [*differences, *lasting])

    def differences_now(self, meter: Meter, budget: Budget, processes: ProcessGroup) -> list[str]:
        """What differs from the charges so far and which bound was passed, where this process alone can tell."""
        if processes.size > 1:
            return []
        counts = Counter(self._earlier.training) + self._training.repeated
        return [*charge_differences(counts, meter), *bound_differences(counts, budget)]

    def restore(self, earlier: Observation) -> None:
        """Go on from an observation that a checkpoint holds."""
        self._earlier = earlier


def _as_method(count: Callable[..., Any], call: Any) -> Any:
    """A function that a class binds to its objects: a partial would not be bound."""

    def __call__(self: Any, *args: Any, **options: Any) -> Any:
        return count(call, self, *args, **options)

    return __call__


def charge_differences(counts: Mapping[str, int], meter: Meter) -> list[str]:
    """One line for each amount that was computed and not charged, or charged and not computed.

    A gradient that is charged need not be computed, where a loss is not finite; and a scorer need not be given images that count
    as not scored.
    """
    scored = by_name(counts, SCORED)
    uses = {name: use for name, use in meter.scorers.items() if name != DATA}
    compared = [
        ("evaluations of the network", forward_equivalents(counts), meter.nfe - meter.stated["nfe"], meter.deferred),
        ("decoded images", counts.get(DECODED, 0), meter.images - meter.stated["images"], 0),
        ("updates", counts.get(UPDATES, 0), meter.updates, 0),
        ("images decoded with a gradient", counts.get(GRADIENT_DECODED, 0), meter.reward_backwards.total(), 0),
    ]
    for name in dict.fromkeys([*scored, *uses]):
        use = uses.get(name, {"calls": 0, "errors": 0})
        compared.append((f"images scored by {name}", scored.get(name, 0), int(use["calls"]), int(use["errors"])))
    differentiated, paid_for = by_name(counts, GRADIENT_SCORED), meter.reward_backwards
    for name in sorted({*differentiated, *paid_for}):
        errors = int(uses.get(name, {"errors": 0})["errors"])
        compared.append((f"scores of {name} with a gradient", differentiated.get(name, 0), paid_for[name], errors))
    lines = [
        f"{what}: {computed:,} computed, {charged:,} charged"
        for what, computed, charged, missing in compared
        if not charged - missing <= computed <= charged
    ]
    backwards, paid = counts.get(BACKWARDS, 0), counts.get(GRADIENT_FORWARDS, 0)
    return lines + (
        [f"gradients of the network: {backwards:,} rows computed, {paid:,} charged"] if backwards > paid else []
    )


def bound_differences(counts: Mapping[str, int], budget: Budget) -> list[str]:
    """One line for each bound of a budget that was passed by what was computed."""
    amounts = {
        "nfe": forward_equivalents(counts),
        "images": counts.get(DECODED, 0),
        "updates": counts.get(UPDATES, 0),
        "reward_calls": sum(by_name(counts, SCORED).values()),
    }
    bounds = budget.bounds()
    return [
        f"the budget of {bounds[currency]:,.0f} {currency} was passed: {amount:,} computed"
        for currency, amount in amounts.items()
        if amount > bounds.get(currency, amount)
    ]


def clock_difference(seconds: float, meter: Meter) -> list[str]:
    """A line where the meter's clock stood while training went on."""
    if meter.seconds >= seconds * (1 - CLOCK_SHARE) - CLOCK_SECONDS:
        return []
    return [f"seconds of training: {seconds:,.1f} passed, {meter.seconds:,.1f} charged"]
