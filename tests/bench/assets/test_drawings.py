"""The second world of pictures: what its prompts say is what is drawn, and no test combination is ever drawn in pre-training."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.assets import drawings
from gpobench.bench.assets.drawing_prompts import (
    counting_prompts,
    geneval_prompts,
    two_word_prompts,
    word_prompts,
    words_of,
)
from gpobench.bench.assets.drawings import COLOURS, COUNTS, PAPERS, SHAPES, ColouredShape, Counted, Pair, Shares, Text
from gpobench.bench.assets.drawn import find_shapes, text_lines

SHAPES_ONLY, TEXTS_ONLY = Shares(0, 0, 0.5), Shares(0.5, 0.5, 0)


def asked(content: Counted | Pair) -> list[tuple[str, str]]:
    if isinstance(content, Counted):
        return [(content.kind, content.colour)] * content.count
    return sorted((thing.kind, thing.colour) for thing in (content.first, content.second))


def test_what_is_drawn_is_found_again():
    rng = np.random.default_rng(0)
    for _ in range(250):
        content = drawings.sample_content(rng, [], (), SHAPES_ONLY)
        assert not isinstance(content, Text)
        found = find_shapes(drawings.draw(content, rng))
        assert sorted((s.kind, s.colour) for s in found) == asked(content)
        if isinstance(content, Pair):
            by_kind = {shape.kind: shape.box for shape in found}
            first, second = by_kind[content.first.kind], by_kind[content.second.kind]
            axis = 0 if content.relation == "left of" else 1
            assert first[axis + 2] <= second[axis], "one ends before the other begins"


@pytest.mark.parametrize("kind", SHAPES)
def test_a_shape_is_itself_in_every_colour_under_noise(kind: str):
    rng = np.random.default_rng(3)
    for colour, paper in product(COLOURS, PAPERS):
        picture = drawings.draw(Counted(kind, 6, colour, paper), rng)
        noisy = np.clip(picture + rng.normal(0, 10, picture.shape), 0, 255).astype(np.uint8)
        assert [(s.kind, s.colour) for s in find_shapes(noisy)] == [(kind, colour)] * 6


def test_texts_have_as_many_lines_as_words_and_a_blank_page_has_nothing():
    rng = np.random.default_rng(1)
    for _ in range(200):
        content = drawings.sample_content(rng, [], (), TEXTS_ONLY)
        assert isinstance(content, Text)
        assert len(text_lines(drawings.draw(content, rng))) == len(content.words)
    blank = np.full((32, 64, 3), 240, np.uint8)
    assert text_lines(blank) == [] and find_shapes(blank) == []


def test_the_canvas_says_what_it_cannot_hold():
    rng = np.random.default_rng(0)
    for content in (
        Text(("ABCDEFGHI",), "red", "white"),
        Text(("A", "B", "C"), "red", "white"),
        Counted("ring", 9, "red", "white"),
    ):
        with pytest.raises(ValueError, match="fit"):
            drawings.draw(content, rng)


# Splits


def test_no_combination_of_a_test_or_validation_prompt_is_drawn_in_pre_training():
    """Over every content that pre-training can draw, not over a sample of them."""
    counted = {(c.kind, c.count, c.colour) for row in drawings.train_counted() for c in row}
    kinds, places, coloured = set(), set(), set()
    for pair in drawings.train_pairs():
        a, b, paper = pair.first, pair.second, pair.paper
        inverse = {"left of": "right of", "above": "below"}[pair.relation]
        kinds |= {(a.kind, b.kind, paper), (b.kind, a.kind, paper)}
        places |= {(a.kind, pair.relation, b.kind, paper), (b.kind, inverse, a.kind, paper)}
        coloured.add((frozenset((a, b)), paper))
    for split in ("validation", "test"):
        for prompt in counting_prompts(split) + geneval_prompts(split):
            paper = prompt.text.split(" on ")[1]
            names = [clause["class"] for clause in prompt.include]
            if prompt.tag in ("counting", "single_object", "colors"):
                assert prompt.cell not in counted, prompt.text
            elif prompt.tag == "two_object":
                assert (*names, paper) not in kinds, prompt.text
            elif prompt.tag == "position":
                relation = prompt.include[1]["position"][0]
                assert (names[1], relation, names[0], paper) not in places, prompt.text
            else:
                things = frozenset(ColouredShape(clause["class"], clause["color"]) for clause in prompt.include)
                assert (things, paper) not in coloured, prompt.text


def test_no_held_out_word_is_drawn_in_pre_training():
    excluded = frozenset(words_of("validation") + words_of("test"))
    words, rng = words_of("train"), np.random.default_rng(0)
    drawn = Counter(w for _ in range(4000) for w in drawings.sample_content(rng, words, excluded, TEXTS_ONLY).words)
    assert not excluded & set(drawn) and len(set(words) & set(drawn)) > 500
    lengths = Counter(len(word) for word in drawn.elements())
    assert set(lengths) == {3, 4, 5, 6, 7} and lengths[6] > lengths[3]


def test_the_splits_share_no_text():
    for listed in (counting_prompts, geneval_prompts, word_prompts, two_word_prompts):
        texts = [{prompt.text for prompt in listed(split)} for split in ("train", "validation", "test")]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_there_are_as_many_test_prompts_as_asked_for():
    assert len(counting_prompts("test")) == 192 and len({p.text for p in counting_prompts("test")}) == 192
    tags = Counter(p.tag for p in geneval_prompts("test"))
    assert len(tags) == 6 and min(tags.values()) >= 60, tags
    assert len(word_prompts("test")) == 300 and Counter(len(p.target) for p in word_prompts("test")) == dict.fromkeys(
        range(3, 8), 60
    )
    assert len(two_word_prompts("test")) == 150
    assert all(len(w) <= drawings.LONGEST_OF_TWO for p in two_word_prompts("test") for w in p.target.split())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_counting_is_balanced_over_kinds_counts_and_colours(split: str):
    cells = [prompt.cell for prompt in counting_prompts(split)]
    for axis, values in enumerate((SHAPES, COUNTS, COLOURS)):
        shares = Counter(cell[axis] for cell in cells)
        assert set(shares) == set(values)
        assert max(shares.values()) == min(shares.values()), (split, shares)


def test_every_tag_is_balanced_over_kinds_and_relations():
    prompts = geneval_prompts("test")
    for tag in ("two_object", "position", "color_attr"):
        kinds = Counter(clause["class"] for p in prompts if p.tag == tag for clause in p.include)
        assert set(kinds) == set(SHAPES) and max(kinds.values()) <= 3 * min(kinds.values()), (tag, kinds)
    relations = Counter(p.include[1]["position"][0] for p in prompts if p.tag == "position")
    assert set(relations) == set(drawings.RELATIONS) and max(relations.values()) <= 1.5 * min(relations.values()), (
        relations
    )


@given(
    st.sampled_from(SHAPES), st.sampled_from(drawings.RELATIONS), st.sampled_from(SHAPES), st.sampled_from(list(PAPERS))
)
def test_a_mirrored_relation_is_the_same_combination(a: str, relation: str, b: str, paper: str):
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    assert drawings.position_split(a, relation, b, paper) == drawings.position_split(b, mirrored, a, paper)
    assert drawings.two_object_split(a, b, paper) == drawings.two_object_split(b, a, paper)
