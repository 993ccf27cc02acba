"""The scorers and embedders of one run, opened by the names a task gives, each with its role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .. import registry
from ..errors import Missing, UserError
from ..scoring.references import ScorerLocation, ScorerReference
from ..scoring.scorers import IN_PROCESS, close_scorers, open_embedder, open_scorer
from ..scoring.worker_setting import WorkerSetting
from ..spec import Columns, Embedder, Scorer, SupportsColumns, SupportsKey, Task
from .ranking import primary_key
from .record import Role


@dataclass
class ScorerSet:
    """A task's opened scorers: one trains, the held-out ones do not; the others are there where they are installed."""

    training: Scorer
    held_out: list[Scorer]
    auxiliary: list[Scorer] = field(default_factory=list[Scorer])
    quality: list[Scorer] = field(default_factory=list[Scorer])
    diversity: list[Embedder] = field(default_factory=list[Embedder])
    drift: list[Embedder] = field(default_factory=list[Embedder])
    key: str = ""  # the `scorer/metric` that ranks

    @property
    def all(self) -> list[Scorer]:
        """Every scorer, the training scorer first."""
        return [self.training, *self.held_out, *self.auxiliary, *self.quality]

    @property
    def curve(self) -> list[Scorer]:
        """The scorers of the curve over the budget: the training scorer and the held-out ones."""
        return [self.training, *self.held_out]

    @property
    def embedders(self) -> dict[str, str]:
        """Embedder name -> id."""
        return {embedder.name: embedder.id for embedder in (*self.diversity, *self.drift)}

    @property
    def training_key(self) -> str:
        """The `scorer/metric` that methods are trained on."""
        return f"{self.training.name}/{self.training.metrics[0]}"

    @property
    def quality_keys(self) -> list[str]:
        """The first `scorer/metric` of each quality scorer, whose fall sets the hack flag."""
        return [f"{scorer.name}/{scorer.metrics[0]}" for scorer in self.quality]

    def role(self, scorer: Scorer) -> Role:
        """The role of one of the scorers, as a record names it."""
        if scorer is self.training:
            return "training"
        if scorer in self.held_out:
            return "held-out"
        return "auxiliary" if scorer in self.auxiliary else "quality"

    def close(self) -> None:
        """Stop the processes that were started for the scorers."""
        close_scorers(self.all)


def open_scorer_set(
    task: Task,
    domain: str,
    message: Callable[[str], None],
    training: str = "",
    locations: Mapping[str, ScorerLocation] | None = None,
    workers: WorkerSetting = IN_PROCESS,
) -> ScorerSet:
    """Open the scorers and embedders that a task names.

    A training or held-out scorer that is not installed is an error; any other is left out with a message.

    Args:
        task: gives the names.
        domain: of the model's prompts, "glyphs" or "open".
        message: called with one line for each part that is left out.
        training: the scorer, or blend of scorers, to train on; "" is the task's own. With another one the task's own is held
            out. Parts of a blend are trained on, so they are not held out.
        locations: scorer name -> where it is served.
        workers: processes for the scorers that support them.

    Raises:
        UserError: when nothing is left to hold out, two scorers have one name, or the task ranks by a score that it does not have.
        Missing: when the training scorer or a held-out one is not installed.
    """
    locations = locations or {}
    held_out = _held_out_names(task, domain, training)
    trained = {scorer.text for scorer in ScorerReference.parse(training or task.reward(domain)).scorers}
    scorers = ScorerSet(
        open_scorer(training or task.reward(domain), locations, workers),
        [open_scorer(name, locations, workers) for name in held_out],
    )
    columns = task.columns(domain) if isinstance(task, SupportsColumns) else Columns()
    opened = _OptionalParts(message)
    canonical = lambda name: registry.canonical("scorer", name)
    scorer = lambda name: open_scorer(name, locations, workers)

    used = {*trained, *held_out}
    scorers.auxiliary += opened(scorer, [name for name in task.scorers(domain) if canonical(name) not in used])
    used |= {canonical(name) for name in task.scorers(domain)}
    scorers.quality += opened(scorer, [name for name in columns.quality if canonical(name) not in used])
    embedder = cache(open_embedder)  # most tasks name one embedder for both columns
    scorers.diversity += opened(embedder, columns.diversity)
    scorers.drift += opened(embedder, columns.drift)

    repeated = [name for name, count in Counter(s.name for s in scorers.all).items() if count > 1]
    if repeated:
        scorers.close()
        raise UserError(f"two scorers of this run are called {repeated[0]!r}: a table could not tell them apart")
    try:
        stated = _stated_key(task, domain, dict(zip(held_out, scorers.held_out, strict=True)))
    except UserError:
        scorers.close()
        raise
    roles = {f"{each.name}/{metric}": scorers.role(each) for each in scorers.all for metric in each.metrics}
    scorers.key = str(primary_key(roles, stated))
    return scorers


def _stated_key(task: Task, domain: str, held_out: Mapping[str, Scorer]) -> str:
    """The key that the task states, as tables name it; "" where it states none, or this run trains on its scorer.

    held_out: of this run, by the names that the task gives them.
    """
    text = task.key(domain) if isinstance(task, SupportsKey) else ""
    reference, _, metric = text.rpartition("/")
    if not text:
        return ""
    name, names = (
        registry.canonical("scorer", reference),
        [registry.canonical("scorer", n) for n in task.held_out(domain)],
    )
    if name not in names:
        raise registry.unknown(
            f"held-out scorer in the key {text!r} of the task {task.name}:", reference, task.held_out(domain)
        )
    if name not in held_out:
        return ""
    scorer = held_out[name]
    if metric not in scorer.metrics:
        raise registry.unknown(f"metric in the key {text!r} of the task {task.name}:", metric, scorer.metrics)
    return f"{scorer.name}/{metric}"


def _held_out_names(task: Task, domain: str, training: str) -> list[str]:
    """The canonical names of the scorers that the run is not trained on."""
    task_reward = task.reward(domain)
    trained = {scorer.text for scorer in ScorerReference.parse(training or task_reward).scorers}
    names = dict.fromkeys(registry.canonical("scorer", name) for name in (task_reward, *task.held_out(domain)))
    held_out = [name for name in names if name not in trained]
    if not held_out and training not in ("", task_reward):
        raise UserError(
            f"--reward {training} trains on every scorer that the task {task.name} holds out: none is left to evaluate with"
        )
    return held_out


class _OptionalParts:
    """Opens parts that may be missing, and reports each missing name once."""

    def __init__(self, message: Callable[[str], None]) -> None:
        self._message = message
        self._missing: set[str] = set()  # an embedder may be named twice

    def __call__(self, open_part: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
        opened: list[Any] = []
        for name in dict.fromkeys(names):
            try:
                opened.append(open_part(name))
            except Missing as missing:
                if name not in self._missing:
                    self._message(f"not evaluated by {name}: {missing}")
                self._missing.add(name)
        return opened
