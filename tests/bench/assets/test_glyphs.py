"""Glyphs: every letter in its cell, every shape countable, and no held-out word is ever drawn."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from gpobench.bench.assets import glyphs
from gpobench.bench.assets.words import word_splits

WORDS = word_splits()
EXCLUDED = frozenset(WORDS["validation"] + WORDS["test"])


def test_splits_are_decided_by_spelling():
    # by hand: the sha256 of the spelling, as a whole number, modulo 100
    places = {word: int(sha256(word.encode()).hexdigest(), 16) % 100 for words in WORDS.values() for word in words}
    assert all(places[word] < 24 for word in WORDS["test"])
    assert all(24 <= places[word] < 34 for word in WORDS["validation"])
    assert all(places[word] >= 34 for word in WORDS["train"])
    total = sum(len(words) for words in WORDS.values())
    assert len(WORDS["test"]) / total == pytest.approx(0.24, abs=0.03)
    assert len(WORDS["validation"]) / total == pytest.approx(0.10, abs=0.03)
    assert not EXCLUDED & set(WORDS["train"])


def test_a_held_out_word_is_never_drawn():
    rng = np.random.default_rng(0)
    drawn = Counter(glyphs.random_word(rng, WORDS["train"], EXCLUDED) for _ in range(50_000))
    assert not EXCLUDED & drawn.keys()
    assert {len(word) for word in drawn} == {3, 4, 5}
    assert all(set(word) <= set(glyphs.ALPHABET) for word in drawn)
    assert len(set(WORDS["train"]) & drawn.keys()) == len(WORDS["train"])


def test_the_exclusion_is_what_keeps_them_out():
    rng = np.random.default_rng(0)
    drawn = {glyphs.random_word(rng, WORDS["test"], frozenset()) for _ in range(5000)}
    assert len(drawn & set(WORDS["test"])) > 100


@pytest.mark.parametrize("word", ["CAT", "TREE", "HELLO", "WWWWW", "III"])
def test_a_word_stands_whole_and_centred(word: str):
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            picture = glyphs.draw_word(word, shift=(dx, dy))
            assert picture.shape == (32, 64, 3) and picture.dtype == np.uint8
            dark = (picture < 128).all(-1)
            rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
            assert abs((columns[0] + columns[-1]) / 2 - 31.5 - dx) <= 1.5
            assert abs((rows[0] + rows[-1]) / 2 - 15.5 - dy) <= 1.5
            assert columns[0] > 0 and columns[-1] < 63, "nothing is cut off"


def test_letters_keep_to_a_grid_of_cells():
    one, other = glyphs.draw_word("AAAAA"), glyphs.draw_word("AABAA")
    changed = np.flatnonzero((one != other).any((0, 2)))
    assert changed.min() >= 2 + 2 * glyphs.CELL - 1 and changed.max() <= 2 + 3 * glyphs.CELL
    left = glyphs.draw_word("HELLO")[:, 4:60]
    right = glyphs.draw_word("HELLO", shift=(1, 0))[:, 5:61]
    assert (left == right).all(), "jitter moves and changes nothing else"


def test_any_font_any_size_and_the_colours_asked_for():
    sans = glyphs.default_font().with_name("DejaVuSans.ttf")
    plain = glyphs.draw_word("WORD", font=sans, size=15)
    assert (plain != glyphs.draw_word("WORD")).any()
    picture = glyphs.draw_word("HOT", paper=glyphs.PAPERS["cream"], ink=glyphs.INKS["red"])
    assert tuple(picture[0, 0]) == glyphs.PAPERS["cream"]
    assert any(tuple(pixel) == glyphs.INKS["red"] for pixel in picture.reshape(-1, 3))


def test_a_word_too_long_is_refused():
    with pytest.raises(ValueError, match="1 to 5"):
        glyphs.draw_word("LONGER")
    with pytest.raises(ValueError, match="no shape"):
        glyphs.draw_shapes("hexagon", 1, (0, 0, 0), (255, 255, 255), np.random.default_rng(0))


def test_prompts():
    assert glyphs.word_prompt("CAT") == 'a sign that says "CAT"'
    assert glyphs.word_prompt("CAT", surface="card", ink="blue") == 'a card that says "CAT" in blue'
    assert glyphs.shapes_prompt("circle", 1, "red") == "a photo of one red circle"
    assert glyphs.shapes_prompt("triangle", 3, "green") == "a photo of three green triangles"


def test_prompts_and_pictures_agree():
    rng = np.random.default_rng(3)
    unnamed = 0
    for _ in range(300):
        prompt, picture = glyphs.word_sample(rng, WORDS["train"], EXCLUDED)
        named = prompt.rpartition(" in ")[2] if " in " in prompt else None
        unnamed += named is None
        if named:
            ink = np.array(glyphs.INKS[named])
            assert (np.abs(picture.astype(int) - ink).sum(-1) < 60).sum() > 20
    assert 0.25 < unnamed / 300 < 0.45


@pytest.mark.parametrize("kind", glyphs.SHAPES)
def test_shapes_can_be_counted(kind: str):
    palette = pytest.importorskip("gpobench.rewards.palette")
    rng = np.random.default_rng(1)
    for colour, rgb in glyphs.SHAPE_COLOURS.items():
        for paper in glyphs.PAPERS.values():
            for count in glyphs.COUNTS:
                picture = glyphs.draw_shapes(kind, count, rgb, paper, rng)
                assert picture.shape == (32, 64, 3) and picture.dtype == np.uint8
                assert palette.count(picture, colour) == palette.count_kind(picture, kind, colour) == count
                assert sum(palette.count(picture, other) for other in glyphs.SHAPE_COLOURS) == count
