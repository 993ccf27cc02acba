"""Three red circles, two clocks: draw exactly as many as the prompt says, no fewer and no more.

GenEval's counting prompts as a task of their own, in two prompt domains. `glyphs`: shapes for the embedded 64x32 model, 3 kinds x 5 counts
x 3 colours, 45 prompts; (kind + colour + count) mod 3 is the split, a Latin square, so that every split has each count with each kind and
each colour once, and a test prompt is a new combination of known words. As in the published tag the clause is class and number: the
colour stands in the text and, for information, in the facts, and no rule asks for it. `open`: the 80 published prompts are the test, the
240 - 80 = 160 other combinations of class and number are validation and train.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from ..bench import registry
from ..bench.assets.glyphs import COUNTS, NUMBERS, SHAPE_COLOURS, SHAPES, shapes_prompt
from ..bench.errors import UserError
from ..bench.registry import known_domain
from ..bench.spec import Columns, EvaluationSettings, Prompt, Split
from . import geneval_open as published

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COLUMNS = {
    "glyphs": Columns(quality=["pickscore:tiny"], diversity=["clip:tiny"], drift=["clip:tiny"]),
    "open": Columns(quality=["pickscore", "aesthetic", "imagereward", "hpsv2"], diversity=["clip"], drift=["clip"]),
}
# The held-out detector of real pictures is another architecture of another training run, and needs no package beyond the first one's.
REWARD = {"glyphs": "geneval:palette", "open": "geneval:mask2former"}
HELD_OUT = {"glyphs": ["geneval:shapes"], "open": ["geneval:rtdetr"]}


@dataclass(frozen=True)
class Counting:
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "counting"
    version: str = "1"
    validation: int = 24  # prompts of the domain open, of the 160 that are not published

    def __post_init__(self) -> None:
        if not 1 <= self.validation < 160:
            raise UserError(f"counting.validation must lie in 1 .. 159, got {self.validation}")

    def reward(self, domain: str) -> str:
        """The scorer methods train on."""
        return REWARD[known_domain(self.name, domain)]

    def held_out(self, domain: str) -> Sequence[str]:
        """The scorers that every run needs and no method trains on."""
        return HELD_OUT[known_domain(self.name, domain)]

    def scorers(self, domain: str) -> Sequence[str]:
        """All that judge."""
        return [self.reward(domain), *self.held_out(domain)]

    def evaluation(self, domain: str) -> EvaluationSettings:
        """Four images of a published prompt, as published; many of each of the few prompts of shapes."""
        return evaluation(known_domain(self.name, domain))

    def columns(self, domain: str) -> Columns:
        """Quality, diversity and drift beside the count."""
        return COLUMNS[known_domain(self.name, domain)]

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """The prompts of a split; UserError where the published list cannot be had."""
        if split not in SPLITS:
            raise registry.unknown("split", split, SPLITS)
        if known_domain(self.name, domain) == "open":
            return _open(self.validation, os.environ.get("GPOBENCH_DATA", ""))[split]
        return [shapes("counting", *which) for which in combinations(split)]

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """A person's own `a photo of three red circles` or `a photo of two clocks`; UserError naming the word that is none."""
        if known_domain(self.name, domain) == "glyphs":
            return shapes("counting", *parse_shapes(text), text=text)
        prompt = published.read(text, facts, lambda: published.objects(os.environ.get("GPOBENCH_DATA", "")))
        if prompt.stratum != "counting":
            raise UserError(
                f"the task counting wants a number and objects, as in 'a photo of two clocks'; this is {prompt.stratum}: {text!r}"
            )
        return prompt


def evaluation(domain: str) -> EvaluationSettings:
    """How both tasks are judged."""
    if domain == "glyphs":
        return EvaluationSettings(test_images=24, validation_images=8, curve_images=8)
    return EvaluationSettings(test_images=4, validation_images=4, curve_images=1)


@cache
def _open(validation: int, data: str) -> dict[Split, list[Prompt]]:
    test = [prompt for prompt in published.published(data) if prompt.stratum == "counting"]
    free = published.beside(test).free
    left = [p for p in published.sentences("counting", published.objects(data)) if free(p)]
    return {"validation": left[:validation], "train": left[validation:], "test": test}


# Shapes


def combinations(split: Split) -> list[tuple[str, int, str]]:
    """(kind, count, colour) of a split: 15 of 45."""
    place = SPLITS.index(split)
    every = product(enumerate(SHAPES), COUNTS, enumerate(SHAPE_COLOURS))
    return [(kind, n, colour) for (i, kind), n, (j, colour) in every if (i + j + n) % 3 == place]


def shapes(tag: str, kind: str, n: int, colour: str, *, text: str = "") -> Prompt:
    """A prompt for shapes under one of GenEval's tags: the colour is a clause's where the tag is colors, and information else."""
    facts = published.facts(tag, [{"class": kind, "count": n, **({"color": colour} if tag == "colors" else {})}])
    return Prompt(text or shapes_prompt(kind, n, colour), {**facts, "colour": colour}, stratum=tag)


def parse_shapes(text: str) -> tuple[str, int, str]:
    """`a photo of three red circles` -> (kind, count, colour); UserError naming the word that is none, with the nearest valid one."""
    words = text.lower().rstrip(". ").split()
    if words[:3] != ["a", "photo", "of"] or len(words) != 6:
        raise UserError(f"a prompt for shapes reads like 'a photo of three red circles', this one does not: {text!r}")
    number, colour, thing = words[3:]
    numbers = {NUMBERS[n]: n for n in COUNTS}
    if number not in numbers:
        raise registry.unknown(f"number in {text!r}:", number, numbers)
    if colour not in SHAPE_COLOURS:
        raise registry.unknown(f"colour in {text!r}:", colour, SHAPE_COLOURS)
    kinds = {kind if numbers[number] == 1 else f"{kind}s": kind for kind in SHAPES}
    if thing not in kinds:
        raise registry.unknown(f"shape in {text!r}:", thing, kinds)
    return kinds[thing], numbers[number], colour
