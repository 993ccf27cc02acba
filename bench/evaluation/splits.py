"""Checks and hashes of a task's splits: no prompt in two splits, and one hash for each list of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..errors import UserError
from ..spec import Prompt, Task, fold_text


def fold(prompt: Prompt) -> str:
    """The text that two prompts share when they count as the same: without case, punctuation and spacing."""
    return fold_text(str(prompt.meta.get("target") or prompt.text))


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """sha256 over the texts in order: numbers on different prompts never share a column."""
    return hashlib.sha256("\n".join(p.text for p in prompts).encode()).hexdigest()


def refuse_overlap(task: Task, domain: str) -> None:
    """Raise UserError when a test or validation prompt is also a training prompt, or a validation prompt a test prompt."""
    train, test, validation = (
        {fold(p): p.text for p in task.prompts(split, domain)} for split in ("train", "test", "validation")
    )
    for message, inner, outer in (
        ("test prompt stands in the train split", test, train),
        ("validation prompt stands in the train split", validation, train),
        ("validation prompt stands in the test split", validation, test),
    ):
        shared = sorted(inner.keys() & outer.keys())
        if shared:
            examples = "; ".join(repr(inner[key]) for key in shared[:3])
            raise UserError(f"task {task.name}: a {message} ({len(shared)} in all): {examples}")
