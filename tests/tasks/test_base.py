"""The base of the tasks: every registered task of this package is a final class directly on it."""

from __future__ import annotations

from typing import Any

import pytest

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.ranking import VERDICTS
from gpobench.bench.registry import DOMAINS
from gpobench.tasks.base import DomainTask

OURS = sorted(name for name, entry in registry.entries("task").items() if entry.value.startswith("gpobench.tasks."))


@pytest.mark.parametrize("name", OURS)
def test_a_task_is_final_and_has_settings_for_every_domain(name: str) -> None:
    task: Any = registry.load("task", name)()
    assert type(task).__bases__ == (DomainTask,) and type(task).__final__
    assert set(task.domains()) == set(DOMAINS)
    for domain in DOMAINS:
        settings = task.domains()[domain]
        assert task.reward(domain) == settings.reward and task.columns(domain) == settings.columns
        assert task.scorers(domain) == [settings.reward, *settings.held_out, *settings.optional]
        scorer, _, metric = task.key(domain).rpartition("/")
        assert scorer in settings.held_out and metric not in VERDICTS  # graded


@pytest.mark.parametrize("name", OURS)
def test_an_unknown_split_or_domain_is_named(name: str) -> None:
    task: Any = registry.load("task", name)()
    with pytest.raises(UserError, match="did you mean 'train'"):
        task.prompts("trian", "glyphs")
    with pytest.raises(UserError, match="did you mean 'glyphs'"):
        task.prompts("train", "glyph")
