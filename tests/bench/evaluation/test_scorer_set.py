"""The scorers of a run: the key that ranks is the task's, by the name that tables use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.scorer_set import ScorerSet, open_scorer_set
from gpobench.bench.spec import EvaluationSettings, Prompt, Split


@dataclass(frozen=True)
class Shapes:
    """A third party's task, which trains on one detector of shapes and holds out another."""

    name: str = "shapes"
    version: str = "1"

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        return [Prompt(f"{split} prompt")]

    def reward(self, domain: str) -> str:
        return "geneval:palette"

    def held_out(self, domain: str) -> Sequence[str]:
        return ["geneval:shapes"]

    def scorers(self, domain: str) -> Sequence[str]:
        return [self.reward(domain), *self.held_out(domain)]

    def evaluation(self, domain: str) -> EvaluationSettings:
        return EvaluationSettings()


@dataclass(frozen=True)
class Keyed(Shapes):
    """The same with a key."""

    stated: str = ""

    def key(self, domain: str) -> str:
        return self.stated


@pytest.fixture
def opened() -> Iterator[Any]:
    made: list[ScorerSet] = []

    def open_for(task: Any, **more: Any) -> ScorerSet:
        made.append(open_scorer_set(task, "glyphs", lambda _: None, **more))
        return made[-1]

    yield open_for
    for scorers in made:
        scorers.close()


def test_a_key_is_named_as_tables_name_it(opened: Any) -> None:
    assert opened(registry.task("counting")).key == "geneval-shapes/partial"
    assert opened(Keyed(stated="geneval:shapes/correct")).key == "geneval-shapes/correct"


def test_a_task_without_a_key_is_ranked_by_a_graded_metric(opened: Any) -> None:
    assert opened(Shapes()).key == opened(Keyed()).key == "geneval-shapes/partial"


def test_a_run_that_trains_on_the_keys_scorer_is_ranked_by_another(opened: Any) -> None:
    """What is trained on ranks nothing: the task's own reward is held out then."""
    made = opened(Keyed(stated="geneval:shapes/correct"), training="geneval:shapes")
    assert made.key == "geneval-palette/partial"


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("geneval:shapes/parshal", "metric in the key 'geneval:shapes/parshal' of the task shapes: 'parshal'; did you mean 'partial'"),
        ("geneval:palette/partial", "held-out scorer in the key .* 'geneval:palette'; did you mean 'geneval:shapes'"),
    ],
)  # fmt: skip
def test_a_key_that_the_task_does_not_have_is_one_line(opened: Any, stated: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        opened(Keyed(stated=stated))
