"""Needs of a run: its scorers and embedders, and a rehearsal that makes each of them once."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import registry
from ..scoring.scorers import close_scorers, open_scorer
from ..spec import Columns, Prompt, Split, SupportsColumns, Task

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Need:
    """A scorer or an embedder that a run uses."""

    kind: str  # scorer | embedder
    name: str
    needed: bool  # false: a run leaves it out where it is missing


def needs_of_run(task: Task | None, domain: str, scorers: Sequence[str] = ()) -> list[Need]:
    """Return the scorers and embedders of a task's runs and further scorers by name, each once, needed ones first."""
    needed_by_part: dict[tuple[str, str], bool] = {("scorer", name): True for name in scorers}
    if task is not None:
        columns = task.columns(domain) if isinstance(task, SupportsColumns) else Columns()
        needed_by_part |= {("scorer", name): True for name in (task.reward(domain), *task.held_out(domain))}
        for name in (*task.scorers(domain), *columns.quality):
            needed_by_part.setdefault(("scorer", name), False)
        for name in (*columns.diversity, *columns.drift):
            needed_by_part.setdefault(("embedder", name), False)
    return [Need(kind, name, needed) for (kind, name), needed in needed_by_part.items()]


def one_prompt_per_stratum(task: Task, domain: str) -> list[Prompt]:
    """Return one validation prompt of every stratum: some scorers load a part only when a prompt needs it, as GenEval's colours."""
    prompts = task.prompts("validation", domain)
    return list({prompt.stratum: prompt for prompt in reversed(prompts)}.values())


def rehearse(need: Need, prompts: Sequence[Prompt], height: int = 512, width: int = 512) -> None:
    """Make a scorer, score a blank image for each prompt and close it; an embedder is only made.

    Raises what the part raises; Missing where a file of it is not here and cannot be fetched.
    """
    if need.kind == "embedder":
        registry.embedder(need.name)
    else:
        scorer = open_scorer(need.name)
        try:
            if prompts:
                scorer(np.full((len(prompts), height, width, 3), 255, np.uint8), prompts)
        finally:
            close_scorers([scorer])
            del scorer
    gc.collect()  # free the memory before the next scorer is made
