"""Prompts over the pictures of `drawings`, by GenEval's tags and for texts, in three disjoint splits.

What a prompt asks for alone decides its split (`drawings.split_at`). Test lists are cut to size cell by cell, so that they stay balanced
over kinds, counts and colours; inside a cell the order is that of a digest of the text.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

from .drawings import (
    COLOURS,
    COUNTS,
    INKS,
    LONGEST,
    LONGEST_OF_TWO,
    MIRRORED,
    PAPERS,
    RELATIONS,
    SHAPES,
    SHORTEST,
    SURFACES,
    ColouredShape,
    color_attr_prompt,
    color_attr_split,
    counted_prompt,
    counted_split,
    position_prompt,
    position_split,
    text_prompt,
    two_object_prompt,
    two_object_split,
)
from .glyphs import split_of
from .words import read_word_list

LONGER_WORDS = Path(__file__).with_name("longer_words.txt")  # one word a line, 6 or 7 capitals
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
VALIDATION = 24  # prompts of a tag


@dataclass(frozen=True)
class ShapePrompt:
    """A prompt about shapes: its text, its tag, and what it asks for as clauses of GenEval's `include`."""

    text: str
    tag: str
    include: tuple[Mapping[str, Any], ...]
    cell: tuple[Hashable, ...]  # prompts of one cell differ in what no balance is asked for


@dataclass(frozen=True)
class TextPrompt:
    """A prompt about a text: one word, or two with a space between them."""

    text: str
    target: str


def digest(text: str) -> int:
    """Return a number that orders texts in a way that has to do with nothing else."""
    return int(sha256(text.encode("utf-8")).hexdigest(), 16)


# Shapes


def counting(split: str, counts: Sequence[int] = COUNTS) -> list[ShapePrompt]:
    """List the prompts for counts of shapes: a combination of kind, count and colour, on each of the papers."""
    return [
        ShapePrompt(
            counted_prompt(kind, n, colour, paper), "counting", ({"class": kind, "count": n},), (kind, n, colour)
        )
        for kind, n, colour, paper in product(SHAPES, counts, COLOURS, PAPERS)
        if counted_split(kind, n, colour) == split
    ]


def single_object(split: str) -> list[ShapePrompt]:
    """List the prompts for one shape, whose colour does not count."""
    return [ShapePrompt(p.text, "single_object", p.include, p.cell) for p in counting(split, (1,))]


def colors(split: str) -> list[ShapePrompt]:
    """List the prompts for one shape, whose colour counts; the texts are those of `single_object`."""
    return [
        ShapePrompt(p.text, "colors", ({**p.include[0], "color": p.cell[2]},), p.cell) for p in counting(split, (1,))
    ]


def two_object(split: str) -> list[ShapePrompt]:
    """List the prompts for two kinds, in both orders."""
    return [
        ShapePrompt(two_object_prompt(a, b, paper), "two_object", (_one(a), _one(b)), tuple(sorted((a, b))))
        for (a, b), paper in product(permutations(SHAPES, 2), PAPERS)
        if two_object_split(a, b, paper) == split
    ]


def position(split: str) -> list[ShapePrompt]:
    """List the prompts for one shape beside another; of two that say the same, the one that a digest chooses."""
    prompts: list[ShapePrompt] = []
    for (a, b), relation, paper in product(permutations(SHAPES, 2), RELATIONS, PAPERS):
        if position_split(a, relation, b, paper) == split:
            text = position_prompt(a, relation, b, paper)
            inverse = {**MIRRORED, **{of: named for named, of in MIRRORED.items()}}[relation]
            if digest(text) < digest(position_prompt(b, inverse, a, paper)):
                include = (_one(b), {**_one(a), "position": [relation, 0]})  # the first clause is what it is placed by
                prompts.append(ShapePrompt(text, "position", include, (relation, a)))
    return prompts


def color_attr(split: str) -> list[ShapePrompt]:
    """List the prompts for two kinds with a colour each; which is named first, a digest chooses."""
    prompts: list[ShapePrompt] = []
    for (a, b), (c, d), paper in product(combinations(SHAPES, 2), permutations(COLOURS, 2), PAPERS):
        things = (ColouredShape(a, c), ColouredShape(b, d))
        if color_attr_split(*things, paper) == split:
            text = min((color_attr_prompt(*order, paper) for order in (things, (things[1], things[0]))), key=digest)
            include = tuple({**_one(thing.kind), "color": thing.colour} for thing in things)
            prompts.append(ShapePrompt(text, "color_attr", include, (a, b)))
    return prompts


def _one(kind: str) -> dict[str, Any]:
    return {"class": kind, "count": 1}


def _cut(prompts: Iterable[ShapePrompt], each: int) -> list[ShapePrompt]:
    """Take the first `each` of every cell in the order of their digests."""
    taken: dict[Hashable, list[ShapePrompt]] = {}
    for prompt in sorted(prompts, key=lambda p: digest(p.text)):
        cell = taken.setdefault(prompt.cell, [])
        if len(cell) < each:
            cell.append(prompt)
    return sorted((prompt for cell in taken.values() for prompt in cell), key=lambda p: digest(p.text))


# tag -> (its prompts, how many of a cell the test and the train list take)
_GENEVAL: Mapping[str, tuple[Callable[[str], list[ShapePrompt]], int, int]] = {
    "single_object": (single_object, 4, 4),
    "two_object": (two_object, 8, 8),
    "counting": (lambda split: counting(split, COUNTS[1:]), 1, 4),
    "colors": (colors, 4, 4),
    "position": (position, 3, 12),
    "color_attr": (color_attr, 3, 12),
}


def counting_prompts(split: str) -> list[ShapePrompt]:
    """Return the list of the task counting: 192 test, 48 validation and 576 train prompts, one to six shapes."""
    return _cut(counting(split), {"test": 2, "validation": 1, "train": len(PAPERS)}[split])


def geneval_prompts(split: str) -> list[ShapePrompt]:
    """Return the list of the task geneval: at least 60 test and at most 24 validation prompts of each of the six tags."""
    prompts: list[ShapePrompt] = []
    for every, test, train in _GENEVAL.values():
        listed = _cut(every(split), {"test": test, "validation": 1, "train": train}[split])
        prompts += listed[:VALIDATION] if split == "validation" else listed
    return prompts


# Texts


def words_of(split: str) -> list[str]:
    """Return the words of a split, by their spelling, in the order of their digests."""
    words = [*read_word_list(), *LONGER_WORDS.read_text("ascii").split()]
    return sorted((word for word in words if split_of(word) == split), key=digest)


def _text_prompt(target: str) -> TextPrompt:
    """Return the prompt of a text, whose spelling decides the surface and the ink, or no ink."""
    place, surface = divmod(digest(target) // 100, len(SURFACES))
    ink = (None, *INKS)[place % (1 + len(INKS))]
    return TextPrompt(text_prompt(target.split(), surface=SURFACES[surface], ink=ink), target)


def word_prompts(split: str) -> list[TextPrompt]:
    """Return the prompts of one word: 60 test and 20 validation words of each length, and every train word."""
    most = {"test": 60, "validation": 20, "train": 10_000}[split]
    words = words_of(split)
    chosen = [[word for word in words if len(word) == n][:most] for n in range(SHORTEST, LONGEST + 1)]
    return [_text_prompt(word) for word in sorted((word for row in chosen for word in row), key=digest)]


def two_word_prompts(split: str) -> list[TextPrompt]:
    """Return the prompts of two words of one split, each word once: 150 test, 50 validation and up to 400 train texts."""
    most = {"test": 150, "validation": 50, "train": 400}[split]
    words = [word for word in words_of(split) if len(word) <= LONGEST_OF_TWO]
    return [_text_prompt(f"{a} {b}") for a, b in zip(words[::2], words[1::2], strict=False)][:most]
