"""Draws the pictures of the second embedded model: 64x32 pixels, short texts, counted shapes and pairs of shapes, each with its prompt.

Everything lies on the grid of the model's 8x8 px tokens, moved by at most a pixel: a letter fills one column of tokens and two rows of
them, a shape two by two. So a letter or a shape looks the same wherever it stands, which decides how soon it is learnt.

A content (`Text`, `Counted`, `Pair`) states what a picture shows, `combinations` what of it belongs to one split of the tasks, and
`draw` draws it. Pure numpy and PIL; everything random comes from a `numpy.random.Generator` that the caller passes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import permutations, product
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .glyphs import ALPHABET, CONSONANTS, NUMBERS, SURFACES, VOWELS, default_font

WIDTH, HEIGHT = 64, 32
Colour = tuple[int, int, int]  # RGB, 0 to 255

CELL = 8  # px between letters, the width of a token of the model
LINE = 16  # px between the lines of a text, two rows of tokens
LETTER_SIZE = 13  # px of the em; a letter of the default font is then 8 px wide and a capital 9 px high
STRETCH = 1.25  # of a letter's height
SHORTEST, LONGEST = 3, 7  # letters of a word that stands alone
LONGEST_OF_TWO = 6  # letters of a word of two: with both and an ink a prompt has 23 tokens
LETTERS = (1, 3, 5, 7, 7)  # relative frequency of words of 3 to 7 letters

PITCH = 16  # px between the centres of neighbouring cells
COLUMNS, ROWS = WIDTH // PITCH, HEIGHT // PITCH
RADIUS = 5.5  # px; moved by up to 1 px, two neighbours keep a gap of 3 px

PAPERS: Mapping[str, Colour] = {
    "white": (255, 255, 255),
    "cream": (250, 240, 210),
    "grey": (222, 222, 226),
    "pink": (252, 222, 230),
}
COLOURS: Mapping[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (240, 140, 20),
    "green": (30, 150, 70),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
    "black": (20, 20, 24),
}
INKS = ("black", "red", "green", "blue")  # colours of letters
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "heart", "ring")
PLURALS = {kind: f"{kind}es" if kind == "cross" else f"{kind}s" for kind in SHAPES}
COUNTS = (1, 2, 3, 4, 5, 6)
RELATIONS = ("left of", "right of", "above", "below")
MIRRORED = {"right of": "left of", "below": "above"}  # the same relation, seen from the other object

# Every word that a prompt can contain outside the quotes.
VOCABULARY = tuple(
    dict.fromkeys(
        [
            *("a", "an", "that", "says", "in", "on", "photo", "of", "and", "left", "right", "above", "below"),
            *SURFACES,
            *PAPERS,
            *COLOURS,
            *(NUMBERS[n] for n in COUNTS),
            *SHAPES,
            *PLURALS.values(),
        ]
    )
)


# Contents


@dataclass(frozen=True)
class Text:
    """One word, or two, one above the other."""

    words: tuple[str, ...]
    ink: str
    paper: str


@dataclass(frozen=True)
class Counted:
    """One to six shapes of one kind and colour."""

    kind: str
    count: int
    colour: str
    paper: str


@dataclass(frozen=True)
class ColouredShape:
    """One shape of a pair."""

    kind: str
    colour: str


@dataclass(frozen=True)
class Pair:
    """Two shapes of different kinds: `first` is left of `second`, or above it."""

    first: ColouredShape
    second: ColouredShape
    relation: str  # "left of" or "above"
    paper: str


Content = Text | Counted | Pair


# Splits


def split_at(place: int) -> str:
    """Return the split of a place in 0 .. 5: half are train, a sixth validation, a third test."""
    return ("train", "test", "train", "test", "train", "validation")[place % 6]


def _digest(*parts: str) -> int:
    return int(sha256("|".join(parts).encode("ascii")).hexdigest(), 16)


def counted_split(kind: str, count: int, colour: str) -> str:
    """Return the split of a count of shapes, by a Latin square, so that every split has each count with each kind and colour equally often.

    The paper has no part in it: no shapes of a test combination are drawn on any paper in pre-training.
    """
    return split_at(SHAPES.index(kind) + count + list(COLOURS).index(colour))


def two_object_split(a: str, b: str, paper: str) -> str:
    """Return the split of two kinds on a paper, in whatever order."""
    return split_at(_digest("two_object", *sorted((a, b)), paper))


def position_split(first: str, relation: str, second: str, paper: str) -> str:
    """Return the split of a relation between two kinds on a paper; a square left of a ring is a ring right of a square."""
    if relation in MIRRORED:
        first, relation, second = second, MIRRORED[relation], first
    return split_at(_digest("position", first, relation, second, paper))


def color_attr_split(a: ColouredShape, b: ColouredShape, paper: str) -> str:
    """Return the split of two coloured shapes on a paper, in whatever order."""
    return split_at(_digest("color_attr", *sorted(f"{t.colour} {t.kind}" for t in (a, b)), paper))


def shape_splits(content: Counted | Pair) -> set[str]:
    """Return the splits of all combinations that a picture of shapes shows, whichever of them its prompt names."""
    if isinstance(content, Counted):
        return {counted_split(content.kind, content.count, content.colour)}
    a, b, paper = content.first, content.second, content.paper
    splits = {two_object_split(a.kind, b.kind, paper), position_split(a.kind, content.relation, b.kind, paper)}
    return splits | ({color_attr_split(a, b, paper)} if a.colour != b.colour else set())


@lru_cache(maxsize=1)
def train_counted() -> tuple[tuple[Counted, ...], ...]:
    """List the counted shapes that pre-training may draw, for each of COUNTS."""
    every = [[Counted(*c) for c in product(SHAPES, (n,), COLOURS, PAPERS)] for n in COUNTS]
    return tuple(tuple(c for c in row if shape_splits(c) == {"train"}) for row in every)


@lru_cache(maxsize=1)
def train_pairs() -> tuple[Pair, ...]:
    """List the pairs that pre-training may draw: those that show train combinations only."""
    every = (
        Pair(ColouredShape(a, colour_a), ColouredShape(b, colour_b), relation, paper)
        for (a, b), colour_a, colour_b, relation, paper in product(
            permutations(SHAPES, 2), COLOURS, COLOURS, ("left of", "above"), PAPERS
        )
    )
    return tuple(pair for pair in every if shape_splits(pair) == {"train"})


# Prompts


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _on(paper: str | None) -> str:
    return f" on {paper}" if paper else ""


def text_prompt(words: Sequence[str], *, surface: str = "sign", ink: str | None = None) -> str:
    """Return `a sign that says "TWO WORDS"`, followed by ` in red` where an ink is named."""
    return f'a {surface} that says "{" ".join(words)}"' + (f" in {ink}" if ink else "")


def counted_prompt(kind: str, count: int, colour: str, paper: str | None = None) -> str:
    """Return `a photo of three red circles on cream`; one shape has an article: `a photo of an orange ring`."""
    words = _article(f"{colour} {kind}") if count == 1 else f"{NUMBERS[count]} {colour} {PLURALS[kind]}"
    return f"a photo of {words}{_on(paper)}"


def two_object_prompt(a: str, b: str, paper: str | None = None) -> str:
    """Return `a photo of a ring and a star on grey`."""
    return f"a photo of {_article(a)} and {_article(b)}{_on(paper)}"


def position_prompt(first: str, relation: str, second: str, paper: str | None = None) -> str:
    """Return `a photo of a ring left of a star on grey`."""
    return f"a photo of {_article(first)} {relation} {_article(second)}{_on(paper)}"


def color_attr_prompt(a: ColouredShape, b: ColouredShape, paper: str | None = None) -> str:
    """Return `a photo of a red ring and an orange star on grey`."""
    one, other = (_article(f"{thing.colour} {thing.kind}") for thing in (a, b))
    return f"a photo of {one} and {other}{_on(paper)}"


# Pictures


@lru_cache(maxsize=1)
def _face() -> str:
    return str(default_font())


@lru_cache(maxsize=256)
def _letter(letter: str) -> np.ndarray:
    """Draw (LINE, 2 * CELL) coverage in 0..1 of one letter in the middle, 8 times as large and averaged down."""
    zoom = 8
    face = ImageFont.truetype(_face(), LETTER_SIZE * zoom)
    _, top, _, bottom = face.getbbox("H", anchor="ls")
    width, height = 2 * CELL * zoom, round(LINE * zoom / STRETCH)
    sheet = Image.new("L", (width, height), 0)
    x, baseline = (width - face.getlength(letter)) / 2, (height + bottom - top) / 2
    ImageDraw.Draw(sheet).text((x, baseline), letter, fill=255, font=face, anchor="ls")
    tall = sheet.resize((width, LINE * zoom), Image.Resampling.BICUBIC)
    return np.asarray(tall, np.float32).reshape(LINE, zoom, 2 * CELL, zoom).mean((1, 3)) / 255


@lru_cache(maxsize=16)
def shape_coverage(kind: str) -> np.ndarray:
    """Draw (PITCH, PITCH) coverage in 0..1 of one shape in the middle of its cell, 8 times as large and averaged down."""
    zoom = 8
    sheet = Image.new("L", (PITCH * zoom, PITCH * zoom), 0)
    pen, m, r = ImageDraw.Draw(sheet), PITCH * zoom / 2, RADIUS * zoom
    ellipse = lambda x, y, rx, fill: pen.ellipse((x - rx, y - rx, x + rx - 1, y + rx - 1), fill=fill)
    at = lambda points: [(m + x * r, m + y * r) for x, y in points]
    if kind == "circle":
        ellipse(m, m, r, 255)
    elif kind == "ring":
        ellipse(m, m, r, 255)
        ellipse(m, m, 0.5 * r, 0)
    elif kind == "square":
        side = 0.9 * r  # a square looks larger than a circle of the same width
        pen.rectangle((m - side, m - side, m + side - 1, m + side - 1), fill=255)
    elif kind == "triangle":
        pen.polygon(at([(0, -1), (1, 0.95), (-1, 0.95)]), fill=255)
    elif kind == "diamond":
        pen.polygon(at([(0, -1.1), (1, 0), (0, 1.1), (-1, 0)]), fill=255)
    elif kind == "cross":
        arm = 0.36
        pen.polygon(
            at(
                [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
                + [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
            ),
            fill=255,
        )
    elif kind == "star":
        turn = np.pi * np.arange(10) / 5
        far = np.where(np.arange(10) % 2, 0.48, 1.15)
        pen.polygon(at(zip(far * np.sin(turn), -far * np.cos(turn), strict=True)), fill=255)
    elif kind == "heart":
        ellipse(m - 0.48 * r, m - 0.4 * r, 0.54 * r, 255)
        ellipse(m + 0.48 * r, m - 0.4 * r, 0.54 * r, 255)
        pen.polygon(at([(-0.97, -0.2), (0, -0.45), (0.97, -0.2), (0, 1.05)]), fill=255)
    else:
        raise ValueError(f"no shape called {kind!r}; there are {', '.join(SHAPES)}")
    return np.asarray(sheet, np.float32).reshape(PITCH, zoom, PITCH, zoom).mean((1, 3)) / 255


MARGIN = 8  # px around the sheet that a part is pasted on, cut off at the end


def _paste(sheet: np.ndarray, part: np.ndarray, x: int, y: int) -> None:
    window = sheet[y + MARGIN : y + MARGIN + part.shape[0], x + MARGIN : x + MARGIN + part.shape[1]]
    np.maximum(window, part, out=window)


def _text_coverage(words: Sequence[str], shift: tuple[int, int]) -> np.ndarray:
    dx, dy = shift
    sheet = np.zeros((HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN), np.float32)
    top = (HEIGHT - LINE * len(words)) // 2
    for row, word in enumerate(words):
        left = CELL * ((WIDTH // CELL - len(word)) // 2)  # on the grid of tokens, centred as far as that goes
        for i, letter in enumerate(word):
            _paste(sheet, _letter(letter), left + i * CELL - CELL // 2 + dx, top + row * LINE + dy)
    return sheet[MARGIN:-MARGIN, MARGIN:-MARGIN]


def pair_cells(relation: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw (row, column) of the first and the second shape of a pair: in one row, or in one column."""
    if relation == "above":
        column = int(rng.integers(COLUMNS))
        return [(0, column), (1, column)]
    row, (left, right) = int(rng.integers(ROWS)), sorted(rng.permutation(COLUMNS)[:2].tolist())
    return [(row, left), (row, right)]


def draw(content: Content, rng: np.random.Generator) -> np.ndarray:
    """Draw (32, 64, 3) uint8 of a content; `rng` draws the cells of shapes and shifts of up to a pixel.

    Raises:
        ValueError: for more than two words, a word of more than eight letters or more than eight shapes, which the canvas cannot hold.
    """
    picture = np.broadcast_to(np.array(PAPERS[content.paper], np.float32), (HEIGHT, WIDTH, 3))
    if isinstance(content, Text):
        if not 1 <= len(content.words) <= ROWS or any(len(word) * CELL > WIDTH for word in content.words):
            raise ValueError(f"{' '.join(content.words)!r} does not fit: two words of up to {WIDTH // CELL} letters do")
        dx, dy = rng.integers(-1, 2, 2).tolist()
        return _pressed(picture, _text_coverage(content.words, (dx, dy)), content.ink)
    if isinstance(content, Counted):
        if not 1 <= content.count <= COLUMNS * ROWS:
            raise ValueError(f"{content.count} shapes do not fit: {COLUMNS * ROWS} do")
        cells = [divmod(cell, COLUMNS) for cell in rng.permutation(COLUMNS * ROWS)[: content.count].tolist()]
        return _pressed(picture, _shapes_coverage(content.kind, cells, rng), content.colour)
    for thing, cell in zip((content.first, content.second), pair_cells(content.relation, rng), strict=True):
        picture = _pressed(picture, _shapes_coverage(thing.kind, [cell], rng), thing.colour)
    return picture


def _shapes_coverage(kind: str, cells: Sequence[tuple[int, int]], rng: np.random.Generator) -> np.ndarray:
    sheet = np.zeros((HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN), np.float32)
    for (row, column), (dx, dy) in zip(cells, rng.integers(-1, 2, (len(cells), 2)).tolist(), strict=True):
        _paste(sheet, shape_coverage(kind), column * PITCH + dx, row * PITCH + dy)
    return sheet[MARGIN:-MARGIN, MARGIN:-MARGIN]


def _pressed(picture: np.ndarray, coverage: np.ndarray, colour: str) -> np.ndarray:
    """Colour (H, W, 3): ink where coverage (H, W) is 1; uint8."""
    return np.rint(picture + coverage[..., None] * (np.array(COLOURS[colour], np.float32) - picture)).astype(np.uint8)


# Random samples


Item = TypeVar("Item")


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def random_word(
    rng: np.random.Generator,
    words: Sequence[str],
    excluded: Collection[str],
    *,
    longest: int = LONGEST,
    listed: float = 0.35,
) -> str:
    """Draw a word of 3 to `longest` capitals, never one of `excluded`: from `words`, random letters, or vowels and consonants in turn."""
    frequency = np.cumsum(LETTERS[: longest - SHORTEST + 1])
    while True:
        kind = rng.random()
        if words and kind < listed:
            word = _pick(rng, words)
        else:
            length = SHORTEST + int(np.searchsorted(frequency, rng.random() * frequency[-1], side="right"))
            if kind < (1 + listed) / 2:
                word = "".join(ALPHABET[i] for i in rng.integers(26, size=length))
            else:
                phase = int(rng.integers(2))
                word = "".join(_pick(rng, VOWELS if (i + phase) % 2 else CONSONANTS) for i in range(length))
        if len(word) <= longest and word not in excluded:
            return word


@dataclass(frozen=True)
class Shares:
    """What share of the samples each kind of content has; the rest are pairs of shapes."""

    word: float
    two_words: float
    counted: float


def sample(
    rng: np.random.Generator, words: Sequence[str], excluded: Collection[str], shares: Shares
) -> tuple[str, np.ndarray]:
    """Draw one prompt of pre-training and its picture (32, 64, 3) uint8; no combination of another split is shown."""
    content = sample_content(rng, words, excluded, shares)
    return prompt_of(content, rng), draw(content, rng)


def sample_content(
    rng: np.random.Generator, words: Sequence[str], excluded: Collection[str], shares: Shares
) -> Content:
    """Draw a content of pre-training; of counts the larger ones are drawn more often, as they take longer to learn."""
    kind = rng.random()
    if kind < shares.word + shares.two_words:
        many, longest = (1, LONGEST) if kind < shares.word else (2, LONGEST_OF_TWO)
        text = tuple(random_word(rng, words, excluded, longest=longest) for _ in range(many))
        return Text(text, _pick(rng, INKS), _pick(rng, tuple(PAPERS)))
    if kind < shares.word + shares.two_words + shares.counted:
        return _pick(rng, train_counted()[int(rng.integers(len(COUNTS)))])
    return _pick(rng, train_pairs())


def prompt_of(content: Content, rng: np.random.Generator) -> str:
    """Draw a prompt that a picture of this content fulfils: in some an ink or a paper is not named."""
    if isinstance(content, Text):
        return text_prompt(
            content.words, surface=_pick(rng, SURFACES), ink=content.ink if rng.random() < 0.65 else None
        )
    paper = content.paper if rng.random() < 0.75 else None
    if isinstance(content, Counted):
        return counted_prompt(content.kind, content.count, content.colour, paper)
    one, other = content.first, content.second
    if rng.random() < 0.5:
        mirrored = {of: named for named, of in MIRRORED.items()}
        one, other, relation = other, one, mirrored[content.relation]
    else:
        relation = content.relation
    tag = int(rng.integers(3 if one.colour != other.colour else 2))
    if tag == 0:
        return position_prompt(one.kind, relation, other.kind, paper)
    return (two_object_prompt(one.kind, other.kind, paper), color_attr_prompt(one, other, paper))[tag - 1]
