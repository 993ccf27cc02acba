"""The task counting: draw exactly as many objects as the prompt says. GenEval's counting prompts, in two prompt domains.

`glyphs`: counted shapes for the embedded 64x32 model (shapes.py). As in the published tag a clause is class and number: the colour
stands in the text and, for information, in the facts, and no rule asks for it. `open`: the 80 published prompts are the test split,
the 240 - 80 = 160 other combinations of class and number are validation and train.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

from ..bench.errors import UserError
from ..bench.registry import known_domain
from ..bench.spec import Prompt, Split
from . import geneval_open, shapes
from .base import DomainSettings, DomainTask


@final
@dataclass(frozen=True)
class Counting(DomainTask):
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "counting"
    version: str = "1"
    validation: int = 24  # prompts of the domain open, of the 160 that are not published

    def __post_init__(self) -> None:
        if not 1 <= self.validation < 160:
            raise UserError(f"counting.validation must lie in 1 .. 159, got {self.validation}")

    def domains(self) -> Mapping[str, DomainSettings]:
        """Those of GenEval's detectors."""
        return shapes.DETECTION

    def split_prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """Shapes, or the published prompts and the combinations beside them."""
        if domain == "open":
            return _open(self.validation, os.environ.get("GPOBENCH_DATA", ""))[split]
        return [shapes.compose("counting", *which) for which in shapes.combinations(split)]

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """A user's own `a photo of three red circles` or `a photo of two clocks`; UserError naming the unknown word."""
        if known_domain(self.name, domain) == "glyphs":
            return shapes.compose("counting", *shapes.parse(text), text=text)
        prompt = geneval_open.read(text, facts, lambda: geneval_open.objects(os.environ.get("GPOBENCH_DATA", "")))
        if prompt.stratum != "counting":
            raise UserError(
                f"the task counting wants a number and objects, as in 'a photo of two clocks'; this is {prompt.stratum}: {text!r}"
            )
        return prompt


@cache
def _open(validation: int, data: str) -> dict[Split, list[Prompt]]:
    test = [prompt for prompt in geneval_open.published(data) if prompt.stratum == "counting"]
    free = geneval_open.beside(test).free
    others = [p for p in geneval_open.sentences("counting", geneval_open.objects(data)) if free(p)]
    return {"validation": others[:validation], "train": others[validation:], "test": test}
