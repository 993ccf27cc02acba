"""Laws of every scorer that runs without a download: a score depends on its image and prompt alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpobench.bench import registry
from gpobench.bench.assets.glyphs import PAPERS, SHAPE_COLOURS, draw_shapes, draw_word, shapes_prompt, word_prompt
from gpobench.bench.errors import Missing
from gpobench.bench.rendering import RenderedImages
from gpobench.bench.scoring.scorers import open_scorer, part_behind
from gpobench.bench.spec import Prompt, Scores
from gpobench.bench.training.rig import timed_scores

# Every name of the registry with the variant that needs nothing, or None where the weights must be fetched.
OFFLINE: dict[str, list[str]] = {
    "rapidocr": ["rapidocr", "rapidocr:page"],
    "reader": ["reader"],
    "tesseract": ["tesseract"],
    "paddleocr": ["paddleocr:rapid"],
    "geneval": ["geneval:palette", "geneval:shapes"],
    "pickscore": ["pickscore:tiny"],
    "hpsv2": ["hpsv2:tiny", "hpsv2:tiny*0.5+pickscore:tiny"],
    "clipscore": [],
    "aesthetic": [],
    "imagereward": [],
}
REFERENCES = [reference for references in OFFLINE.values() for reference in references]


def test_every_scorer_is_named_here() -> None:
    assert set(OFFLINE) == {registry.canonical("scorer", name) for name in registry.entries("scorer")}


def pictures() -> tuple[Any, list[Prompt]]:
    """(9, 32, 64, 3) words, shapes, blank paper and noise, each with a prompt that every scorer understands."""
    rng = np.random.default_rng(0)
    red = SHAPE_COLOURS["red"]
    drawn = [draw_word(word) for word in ("CAT", "HOUSE", "TREE", "SUN")]
    drawn += [draw_shapes(kind, n, red, PAPERS["cream"], rng) for kind, n in (("circle", 3), ("square", 1))]
    drawn += [np.full((32, 64, 3), 255, np.uint8), rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)]
    drawn.append(draw_word("DOG", ink=(200, 30, 35)))
    prompts: list[Prompt] = []
    for i in range(len(drawn)):
        meta = {"target": "CAT", "tag": "counting", "include": [{"class": "circle", "count": 3}]}
        meta["exclude"] = [{"class": "circle", "count": 4}]
        text = shapes_prompt("circle", 3, "red") if i % 2 else word_prompt("CAT", ink="red")
        prompts.append(Prompt(text, meta))
    images = np.stack(drawn)
    images.flags.writeable = False  # as every scorer gets them
    return images, prompts


@pytest.fixture(scope="module", params=REFERENCES)
def scorer(request: pytest.FixtureRequest) -> Any:
    try:
        return open_scorer(request.param)
    except Missing as missing:
        if request.param == "tesseract":  # a program of the system
            pytest.skip(str(missing))
        raise


def same(a: Scores, b: Scores, rows: list[int]) -> None:
    """b's rows are those of a at `rows`."""
    for metric, column in a.value.items():
        assert np.array_equal(column[rows], b.value[metric], equal_nan=True), metric


def test_a_score_belongs_to_its_picture(scorer: Any) -> None:
    images, prompts = pictures()
    whole = scorer(images, prompts)
    assert set(whole.value) == set(scorer.metrics)
    assert all(np.isfinite(column).all() for column in whole.value.values()), whole.reasons
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    same(whole, scorer(images[order], [prompts[i] for i in order]), order)
    for i in range(len(images)):
        same(whole, scorer(images[i : i + 1], [prompts[i]]), [i])
    same(whole, scorer(images[2:7], prompts[2:7]), list(range(2, 7)))
    assert not any(len(column) for column in scorer(images[:0], []).value.values())
    assert np.array_equal(images, pictures()[0])  # nobody writes into what it was given


def test_images_and_prompts_that_do_not_match_are_the_callers_mistake(scorer: Any) -> None:
    images, prompts = pictures()
    answer, _ = timed_scores(scorer, RenderedImages(images[:3]), prompts[:2])
    assert all(np.isnan(column).all() for column in answer.value.values())
    assert len(answer.reasons) == 3 and all("3 images" in why and "2 prompts" in why for why in answer.reasons.values())


def test_it_knows_its_own_name_and_its_known_answers(scorer: Any) -> None:
    assert scorer.id and scorer.name and " " not in scorer.name and len(set(scorer.metrics)) == len(scorer.metrics)
    if not scorer.id.startswith("blend("):  # whose parts are tried by themselves
        part_behind(scorer).self_test()
