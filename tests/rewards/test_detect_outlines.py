"""Training detector of the second world: GenEval's rule over it finds every drawing right, and near misses wrong."""

from __future__ import annotations

import numpy as np
import pytest

from gpobench.bench.assets import drawings
from gpobench.bench.assets.drawings import ColouredShape, Counted, Pair
from gpobench.bench.spec import Prompt
from gpobench.rewards.detect_outlines import OutlineColours, Outlines
from gpobench.rewards.geneval import GenEvalScorer


@pytest.fixture(scope="module")
def scorer() -> GenEvalScorer:
    return GenEvalScorer(Outlines(), OutlineColours, colours_id=OutlineColours.id)


def strict(scorer: GenEvalScorer, content: drawings.Content, *include: dict, tag: str) -> float:
    picture = drawings.draw(content, np.random.default_rng(1))
    facts = {"tag": tag, "include": list(include)}
    if tag == "counting":
        facts["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return float(scorer(picture[None], [Prompt("a photo", facts)]).value["strict"][0])


@pytest.mark.parametrize("kind", drawings.SHAPES)
def test_counts_are_right_and_one_more_or_another_kind_is_wrong(scorer: GenEvalScorer, kind: str):
    for count in drawings.COUNTS:
        content = Counted(kind, count, "purple", "pink")
        other = drawings.SHAPES[drawings.SHAPES.index(kind) - 1]
        assert strict(scorer, content, {"class": kind, "count": count}, tag="counting") == 1
        assert strict(scorer, content, {"class": kind, "count": count + 1}, tag="counting") == 0
        assert strict(scorer, content, {"class": other, "count": count}, tag="counting") == 0


@pytest.mark.parametrize("relation", drawings.RELATIONS)
def test_places_and_colours_are_right_and_mirrored_or_exchanged_they_are_wrong(scorer: GenEvalScorer, relation: str):
    ring, star = ColouredShape("ring", "red"), ColouredShape("star", "orange")
    if relation in drawings.MIRRORED:
        content = Pair(star, ring, drawings.MIRRORED[relation], "cream")
    else:
        content = Pair(ring, star, relation, "cream")
    one = {"class": "star", "count": 1}
    placed = {"class": "ring", "count": 1, "position": [relation, 0]}
    assert strict(scorer, content, one, placed, tag="position") == 1
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    assert strict(scorer, content, one, {**placed, "position": [mirrored, 0]}, tag="position") == 0
    red, orange = {"class": "ring", "count": 1, "color": "red"}, {**one, "color": "orange"}
    assert strict(scorer, content, red, orange, tag="color_attr") == 1
    assert strict(scorer, content, {**red, "color": "orange"}, {**orange, "color": "red"}, tag="color_attr") == 0


def test_a_row_depends_on_its_own_image_and_another_size_is_refused():
    rng = np.random.default_rng(0)
    pictures = np.stack([drawings.draw(Counted(kind, 3, "blue", "grey"), rng) for kind in drawings.SHAPES])
    together = Outlines()(pictures)
    for picture, found in zip(pictures, together, strict=True):
        assert [d[:3] for d in Outlines()(picture[None])[0]] == [d[:3] for d in found]
    with pytest.raises(ValueError, match="32, 64"):
        Outlines()(np.zeros((1, 48, 64, 3), np.uint8))
