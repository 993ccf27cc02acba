"""Draws the embedded model's images: 64x32 pixels, short words and counted shapes, each with its prompt.

Pure numpy and PIL. Everything random comes from a `numpy.random.Generator` that the caller passes; the words that must never be
printed (the validation and test splits of a word list) are passed in too.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 64, 32

CELL = 12  # px between letters for every word length: a letter is drawn the same everywhere
LETTER_SIZE = 19  # px of the em; a capital of the default font is then 14 px high
SHORTEST, LONGEST = 3, 5
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VOWELS, CONSONANTS = "AEIOU", "BCDFGHJKLMNPQRSTVWXYZ"

COLUMNS, ROWS = 5, 2  # cells in which a shape may be drawn
PITCH_X, PITCH_Y = 12, 16  # px between the centres of neighbouring cells
RADIUS = 4.5  # px; with a jitter of 1 px two neighbours keep a gap of 1 px

PAPERS = {"white": (255, 255, 255), "cream": (250, 240, 210), "light grey": (222, 222, 226)}
INKS = {"black": (20, 20, 24), "red": (200, 30, 35), "blue": (30, 60, 190)}
SHAPE_COLOURS = {"red": (214, 40, 40), "blue": (40, 80, 210), "green": (30, 150, 70)}
SHAPES = ("circle", "square", "triangle")
COUNTS = (1, 2, 3, 4, 5)

SURFACES = ("sign", "card", "label", "page")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
# Every word a prompt can contain outside the quotes; the embedded model's tokenizer has exactly these and the capitals.
VOCABULARY = tuple(
    dict.fromkeys(
        [
            "a",
            "that",
            "says",
            "in",
            "photo",
            "of",
            *SURFACES,
            *INKS,
            *SHAPE_COLOURS,
            *NUMBERS[1:6],
            *SHAPES,
            *(f"{kind}s" for kind in SHAPES),
        ]
    )
)


def split_of(word: str) -> str:
    """Return the split a word belongs to, by its spelling alone: 24 % test, 10 % validation, 66 % train."""
    place = int(sha256(word.encode("ascii")).hexdigest(), 16) % 100
    return "test" if place < 24 else "validation" if place < 34 else "train"


# Prompts


def word_prompt(word: str, *, surface: str = "sign", ink: str | None = None) -> str:
    """Return `a sign that says "WORD"`, followed by ` in red` where an ink is named."""
    return f'a {surface} that says "{word}"' + (f" in {ink}" if ink else "")


def shapes_prompt(kind: str, count: int, colour: str) -> str:
    """Return `a photo of three red circles`; one circle in the singular."""
    return f"a photo of {NUMBERS[count]} {colour} {kind}{'' if count == 1 else 's'}"


# Images


def default_font() -> Path:
    """Find the bold monospaced typeface that matplotlib ships, without importing matplotlib."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the glyphs are printed in DejaVu Sans Mono Bold, which comes with matplotlib: install matplotlib or pass font="
        )
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"


@lru_cache(maxsize=4096)
def _letter(letter: str, font: str, size: float) -> np.ndarray:
    """Draw (HEIGHT, 2 * CELL) coverage in 0..1 of one letter, its advance centred on column CELL, a capital centred in height."""
    face = ImageFont.truetype(font, size)
    _, top, _, bottom = face.getbbox("H", anchor="ls")
    sheet = Image.new("L", (2 * CELL, HEIGHT), 0)
    baseline = HEIGHT // 2 + round((bottom - top) / 2)
    ImageDraw.Draw(sheet).text((CELL - face.getlength(letter) / 2, baseline), letter, fill=255, font=face, anchor="ls")
    return np.asarray(sheet, dtype=np.float32) / 255


@lru_cache(maxsize=16)
def _shape(kind: str) -> np.ndarray:
    """Draw (PITCH_Y, PITCH_X) coverage in 0..1 of one shape in the middle of its cell, 8 times as large and averaged down."""
    zoom = 8
    sheet = Image.new("L", (PITCH_X * zoom, PITCH_Y * zoom), 0)
    pen, x, y, r = ImageDraw.Draw(sheet), PITCH_X * zoom / 2, PITCH_Y * zoom / 2, RADIUS * zoom
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=255)
    elif kind == "square":
        side = r * 0.9  # a square looks larger than a circle of the same width
        pen.rectangle((x - side, y - side, x + side - 1, y + side - 1), fill=255)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
    else:
        raise ValueError(f"no shape called {kind!r}; there are {', '.join(SHAPES)}")
    return np.asarray(sheet, dtype=np.float32).reshape(PITCH_Y, zoom, PITCH_X, zoom).mean((1, 3)) / 255


def _press(coverage: np.ndarray, paper: tuple[int, int, int], ink: tuple[int, int, int]) -> np.ndarray:
    """Colour (HEIGHT, WIDTH, 3) uint8: ink where coverage (HEIGHT, WIDTH) is 1, paper where it is 0."""
    page, pigment = np.array(paper, np.float32), np.array(ink, np.float32)
    return np.rint(page + coverage[..., None] * (pigment - page)).astype(np.uint8)


def draw_word(
    word: str,
    *,
    font: str | Path | None = None,
    size: float = LETTER_SIZE,
    paper: tuple[int, int, int] = PAPERS["white"],
    ink: tuple[int, int, int] = INKS["black"],
    shift: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Draw (32, 64, 3) uint8: the word on a grid of 12 px cells, centred, moved by `shift`.

    `font` is any TrueType or OpenType file (or a name PIL can find), `size` its em in px; each letter is drawn in the middle of its
    cell, so that a proportional face keeps the grid.

    Args:
        word: at most five letters.
        font: a TrueType or OpenType file, or a name that PIL finds; None is the default face.
        size: the em, in pixels.
        paper: RGB of the background, 0 to 255.
        ink: RGB of the letters, 0 to 255.
        shift: (dx, dy) to the right and down, in pixels.

    Raises:
        ValueError: for a word of more than five letters.
    """
    if not 1 <= len(word) <= LONGEST:
        raise ValueError(f"{word!r}: the canvas holds words of 1 to {LONGEST} letters")
    dx, dy = shift
    face = str(font) if font is not None else _default_face()
    sheet = np.zeros((HEIGHT, WIDTH + 4 * CELL), np.float32)  # margins of two cells, cut off below
    left = (WIDTH - CELL * len(word)) // 2 - CELL // 2 + dx
    for i, letter in enumerate(word):
        start = 2 * CELL + left + i * CELL
        window = sheet[:, start : start + 2 * CELL]
        np.maximum(window, _letter(letter, face, size), out=window)
    if dy:
        moved = np.zeros_like(sheet)
        moved[max(dy, 0) : HEIGHT + min(dy, 0)] = sheet[max(-dy, 0) : HEIGHT + min(-dy, 0)]
        sheet = moved
    return _press(sheet[:, 2 * CELL : 2 * CELL + WIDTH], paper, ink)


@lru_cache(maxsize=1)
def _default_face() -> str:
    return str(default_font())


def draw_shapes(
    kind: str, count: int, colour: tuple[int, int, int], paper: tuple[int, int, int], rng: np.random.Generator
) -> np.ndarray:
    """Draw (32, 64, 3) uint8: `count` shapes in distinct cells of a 5x2 grid, each moved by up to 1 px.

    Args:
        kind: one of SHAPES.
        count: how many, at most ten.
        colour: RGB of the shapes, 0 to 255.
        paper: RGB of the background, 0 to 255.
        rng: draws the cells and the shifts.
    """
    coverage = np.zeros((HEIGHT + 2, WIDTH + 2), np.float32)
    left = (WIDTH - COLUMNS * PITCH_X) // 2
    for cell in rng.permutation(COLUMNS * ROWS)[:count]:
        row, column = divmod(int(cell), COLUMNS)
        dx, dy = rng.integers(-1, 2, 2)
        y, x = 1 + row * PITCH_Y + int(dy), 1 + left + column * PITCH_X + int(dx)
        window = coverage[y : y + PITCH_Y, x : x + PITCH_X]
        np.maximum(window, _shape(kind), out=window)
    return _press(coverage[1:-1, 1:-1], paper, colour)


# Random samples

Item = TypeVar("Item")


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def random_word(
    rng: np.random.Generator, words: Sequence[str], excluded: Collection[str], *, listed: float = 0.35
) -> str:
    """Draw a word of 3 to 5 capitals: from `words`, or random letters, or vowels and consonants in turn; never one of `excluded`."""
    while True:
        kind = rng.random()
        if words and kind < listed:
            word = _pick(rng, words)
        else:
            length = int(rng.integers(SHORTEST, LONGEST + 1))
            if kind < (1 + listed) / 2:
                word = "".join(ALPHABET[i] for i in rng.integers(26, size=length))
            else:
                phase = int(rng.integers(2))
                word = "".join(_pick(rng, VOWELS if (i + phase) % 2 else CONSONANTS) for i in range(length))
        if word not in excluded:
            return word


def word_sample(rng: np.random.Generator, words: Sequence[str], excluded: Collection[str]) -> tuple[str, np.ndarray]:
    """Draw a prompt for a word and an image of it; in 35 % of the prompts no ink is named and the image has any."""
    word, ink = random_word(rng, words, excluded), _pick(rng, tuple(INKS))
    named = ink if rng.random() >= 0.35 else None
    dx, dy = rng.integers(-1, 2, 2)
    picture = draw_word(word, paper=PAPERS[_pick(rng, tuple(PAPERS))], ink=INKS[ink], shift=(int(dx), int(dy)))
    return word_prompt(word, surface=_pick(rng, SURFACES), ink=named), picture


def shapes_sample(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Draw a prompt for counted shapes and an image of them."""
    kind, count, colour = _pick(rng, SHAPES), _pick(rng, COUNTS), _pick(rng, tuple(SHAPE_COLOURS))
    picture = draw_shapes(kind, count, SHAPE_COLOURS[colour], PAPERS[_pick(rng, tuple(PAPERS))], rng)
    return shapes_prompt(kind, count, colour), picture
