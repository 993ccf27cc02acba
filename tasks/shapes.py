"""Prompts for counted shapes of the embedded 64x32 model under GenEval's tags, and the settings of the tasks that detect objects.

3 kinds x 5 counts x 3 colours make 45 prompts; (kind + colour + count) mod 3 is the split, a Latin square, so that every split has
each count with each kind and each colour once, and a test prompt is a new combination of known words.
"""

from collections.abc import Mapping
from itertools import product

from ..bench import registry
from ..bench.assets.glyphs import COUNTS, NUMBERS, SHAPE_COLOURS, SHAPES, shapes_prompt
from ..bench.errors import UserError
from ..bench.spec import Columns, EvaluationSettings, Prompt, Split
from . import geneval_open
from .base import SPLITS, DomainSettings

DETECTION: Mapping[str, DomainSettings] = {
    # Many images of each of the few prompts.
    "glyphs": DomainSettings(
        reward="geneval:palette",
        held_out=["geneval:shapes"],
        key="geneval:shapes/partial",
        columns=Columns(quality=["pickscore:tiny"], diversity=["clip:tiny"], drift=["clip:tiny"]),
        evaluation=EvaluationSettings(test_images=24, validation_images=8, curve_images=8),
    ),
    # Four images per test prompt, as published. The held-out detector is another architecture of another training run, and needs
    # no package beyond the first one's.
    "open": DomainSettings(
        reward="geneval:mask2former",
        held_out=["geneval:rtdetr"],
        key="geneval:rtdetr/partial",
        columns=Columns(quality=["pickscore", "aesthetic", "imagereward", "hpsv2"], diversity=["clip"], drift=["clip"]),
        evaluation=EvaluationSettings(test_images=4, validation_images=4, curve_images=1),
    ),
}


def combinations(split: Split) -> list[tuple[str, int, str]]:
    """(kind, count, colour) of a split: 15 of 45."""
    remainder = SPLITS.index(split)
    choices = product(enumerate(SHAPES), COUNTS, enumerate(SHAPE_COLOURS))
    return [(kind, n, colour) for (i, kind), n, (j, colour) in choices if (i + j + n) % 3 == remainder]


def compose(tag: str, kind: str, n: int, colour: str, *, text: str = "") -> Prompt:
    """A prompt for shapes under one of GenEval's tags; the colour is part of the clause under the tag `colors`, elsewhere a fact only.

    Args:
        tag: GenEval's tag.
        kind: the shape.
        n: how many.
        colour: of the shapes.
        text: the prompt's own words; "" writes them.
    """
    clause = {"class": kind, "count": n, **({"color": colour} if tag == "colors" else {})}
    facts = geneval_open.facts(tag, [clause])
    return Prompt(text or shapes_prompt(kind, n, colour), {**facts, "colour": colour}, stratum=tag)


def parse(text: str) -> tuple[str, int, str]:
    """`a photo of three red circles` -> (kind, count, colour); UserError naming the unknown word, with the nearest valid one."""
    words = text.lower().rstrip(". ").split()
    if words[:3] != ["a", "photo", "of"] or len(words) != 6:
        raise UserError(f"a prompt for shapes reads like 'a photo of three red circles', this one does not: {text!r}")
    number, colour, shape = words[3:]
    numbers = {NUMBERS[n]: n for n in COUNTS}
    if number not in numbers:
        raise registry.unknown(f"number in {text!r}:", number, numbers)
    if colour not in SHAPE_COLOURS:
        raise registry.unknown(f"colour in {text!r}:", colour, SHAPE_COLOURS)
    kinds = {kind if numbers[number] == 1 else f"{kind}s": kind for kind in SHAPES}
    if shape not in kinds:
        raise registry.unknown(f"shape in {text!r}:", shape, kinds)
    return kinds[shape], numbers[number], colour
