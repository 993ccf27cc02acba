"""The published OCR rule: its conformance vectors, and what must hold for any two texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.spec import Prompt, check_images
from gpobench.rewards import rules

VECTORS = [
    ("Hello World", "hello world", 1.0),
    ("Hello World", "HELLOWORLD", 1.0),
    ("Hello World", "Helo World", 0.9),
    ("Hello World", "", 0.0),
    ("OPEN", "OPEN 24 HOURS", 1.0),
    ("OPEN", "OPENOPENOPEN", 1.0),
    ("OPEN", "OPFN", 0.75),
    ("OPEN", "completely different text", 0.0),
    ("Café", "CAFE", 0.75),
    ("Don't Stop", "DONT STOP", 8 / 9),
    ("2024", "2025", 0.75),
    ("AB", "BA", 0.0),
]
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
targets = texts.filter(lambda text: text.replace(" ", "") != "")


def plain_distance(a: str, b: str) -> int:
    """Levenshtein's distance by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@pytest.mark.parametrize(("target", "read", "reward"), VECTORS)
def test_published_vectors(target: str, read: str, reward: float) -> None:
    assert rules.ocr_reward(target, read) == pytest.approx(reward, abs=1e-12)


@given(targets, texts)
def test_reward_is_the_published_formula(target: str, read: str) -> None:
    a, b = (text.replace(" ", "").lower() for text in (target, read))
    distance = 0 if a in b else min(plain_distance(b, a), len(a))
    assert rules.ocr_reward(target, read) == 1 - distance / len(a)


@given(targets, texts)
def test_rewards_are_rates_and_exact_implies_all(target: str, read: str) -> None:
    soft, full, ned = rules.ocr_reward(target, read), rules.exact(target, read), rules.ned(target, read)
    assert 0 <= soft <= 1 and full in (0, 1) and 0 <= ned <= 1
    if full:
        assert (
            soft == 1
            and ned == 1
            and rules.extra_text_ratio(target, read) == 0
            and rules.repeat_count(target, read) == 1
        )


@given(targets, texts)
def test_case_and_spaces_say_nothing_and_other_white_space_does(target: str, read: str) -> None:
    loose = " ".join(read)
    assert rules.ocr_reward(target, loose) == rules.ocr_reward(target, read)
    assert rules.exact(target.lower(), read.lower()) == rules.exact(target, read)
    assert rules.exact("A B", "A\tB") == 0


@given(targets, texts, texts)
def test_the_loopholes_are_the_published_ones(target: str, before: str, after: str) -> None:
    framed = rules.normalised(before) + rules.normalised(target) + rules.normalised(after)
    if rules.normalised(framed) != framed:  # a few letters change again when lowered twice
        return
    assert rules.ocr_reward(target, framed) == 1
    assert rules.repeat_count(target, framed) >= 1
    assert rules.exact(target, framed) == (framed == rules.normalised(target))


def test_stricter_columns() -> None:
    assert rules.exact("OPEN", "OPEN 24") == 0 and rules.exact("o pen", "OPEN") == 1
    assert rules.ned("OPEN", "OPENOPEN") == pytest.approx(1 - 4 / (8 + 1e-5))
    assert rules.extra_text_ratio("OPEN", "OPEN 24") == 0.5 and rules.extra_text_ratio("OPEN", "O") == 0
    assert rules.repeat_count("OPEN", "open OPEN opEN") == 3 and rules.repeat_count("AA", "AAA") == 1


@given(targets.filter(lambda text: '"' not in text), texts.filter(lambda text: '"' not in text))
def test_target_is_the_first_quoted_segment(target: str, around: str) -> None:
    assert rules.target_of(f'{around}"{target}"{around} and "MORE"') == target


@pytest.mark.parametrize("prompt", ["no quotes", 'one " only', 'an empty "" one', 'a blank "  " one', ""])
def test_a_prompt_without_a_target_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="quote"):
        rules.target_of(prompt)


@pytest.mark.parametrize(
    "score", [rules.ocr_reward, rules.exact, rules.ned, rules.extra_text_ratio, rules.repeat_count]
)
def test_an_empty_target_is_refused(score: object) -> None:
    assert callable(score)
    with pytest.raises(UserError, match="target"):
        score(" ", "read")


def test_judging_a_batch() -> None:
    prompts = [Prompt('a sign that says "OPEN"'), Prompt("no quotes at all", {"target": "SHUT"}), Prompt('say "LOST"')]
    scores = rules.score_texts(prompts, ["OPFN", "SHUT", None], {2: "the engine fell over"})
    np.testing.assert_array_equal(scores.value["soft"], [0.75, 1, math.nan])
    np.testing.assert_array_equal(scores.value["exact"], [0, 1, math.nan])
    assert scores.reasons == {2: "the engine fell over"} and scores.notes == ["OPFN", "SHUT", ""]
    with pytest.raises(ValueError, match="nobody says why"):
        rules.score_texts(prompts, [None, "", ""], {})


def test_a_callers_mistake_is_raised() -> None:
    one = [Prompt('say "A"')]
    for images in (
        np.zeros((2, 32, 64, 3), np.uint8),
        np.zeros((1, 3, 32, 64), np.uint8),
        np.zeros((1, 32, 64, 3), np.float32),
    ):
        with pytest.raises(ValueError, match="images"):
            check_images(images, one)
    check_images(np.zeros((1, 32, 64, 3), np.uint8), one)
