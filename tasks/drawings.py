"""Prompts of the tasks counting, geneval and ocr for `tiny` 2, with the facts that scorers need.

The lists are those of `bench/assets/drawing_prompts.py`. No task uses them yet: a domain of prompts needs a model that understands it.
"""

from collections.abc import Sequence

from ..bench.assets.drawing_prompts import (
    ShapePrompt,
    counting_prompts,
    geneval_prompts,
    two_word_prompts,
    word_prompts,
)
from ..bench.spec import Prompt, Split
from . import geneval_open


def _prompt(shapes: ShapePrompt) -> Prompt:
    return Prompt(shapes.text, geneval_open.facts(shapes.tag, shapes.include), stratum=shapes.tag)


def counting(split: Split) -> Sequence[Prompt]:
    """The task counting: one to six shapes, whose colour no rule asks for."""
    return [_prompt(shapes) for shapes in counting_prompts(split)]


def geneval(split: Split) -> Sequence[Prompt]:
    """The task geneval: GenEval's six tags; single_object and colors share their texts."""
    return [_prompt(shapes) for shapes in geneval_prompts(split)]


def ocr(split: Split) -> Sequence[Prompt]:
    """The task ocr: words, and texts of two words as a stratum of their own."""
    strata = {"word": word_prompts(split), "two_words": two_word_prompts(split)}
    return [
        Prompt(text.text, {"target": text.target}, stratum=stratum)
        for stratum, texts in strata.items()
        for text in texts
    ]
