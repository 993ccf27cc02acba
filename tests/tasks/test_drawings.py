"""Prompts of the second world: facts that GenEval's rule takes, and answers that the rule finds right in drawings of them."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest

from gpobench.bench.assets import drawings as world
from gpobench.bench.spec import Split
from gpobench.rewards.detect_outlines import OutlineColours, Outlines
from gpobench.rewards.geneval import GenEvalScorer
from gpobench.rewards.geneval_rules import target_of
from gpobench.tasks import drawings


@pytest.mark.parametrize("split", get_args(Split))
def test_every_prompt_of_shapes_has_facts_that_the_rule_takes(split: Split):
    for prompt in (*drawings.counting(split), *drawings.geneval(split)):
        target = target_of(prompt)
        assert target.tag == prompt.stratum and {clause.name for clause in target.include} <= set(world.SHAPES)


def test_texts_have_two_strata_and_their_target_stands_in_quotes():
    prompts = drawings.ocr("test")
    assert Counter(prompt.stratum for prompt in prompts) == {"word": 300, "two_words": 150}
    assert all(f'"{prompt.meta["target"]}"' in prompt.text for prompt in prompts)


def test_a_position_prompt_names_the_placed_object_first_and_the_rule_agrees_with_its_drawing():
    prompts = [prompt for prompt in drawings.geneval("test") if prompt.stratum == "position"][:40]
    pictures = []
    for prompt in prompts:
        words = prompt.text.removeprefix("a photo of ").split(" on ")[0].split()
        placed, relation, by = words[1], " ".join(words[2:-2]), words[-1]
        one, other = world.ColouredShape(placed, "red"), world.ColouredShape(by, "blue")
        if relation in world.MIRRORED:
            one, other, relation = other, one, world.MIRRORED[relation]
        pictures.append(world.draw(world.Pair(one, other, relation, "white"), np.random.default_rng(0)))
    scorer = GenEvalScorer(Outlines(), OutlineColours, colours_id=OutlineColours.id)
    scores = scorer(np.stack(pictures), prompts)
    assert scores.value["correct"].tolist() == [1.0] * len(prompts)
