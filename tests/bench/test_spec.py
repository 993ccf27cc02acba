"""The contract: batches of any kind are cut by rows, settings that make no sense are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpobench.bench import spec
from gpobench.bench.errors import UserError
from gpobench.bench.spec import (
    EvaluationSettings,
    Groups,
    InitialNoise,
    Optim,
    Pairs,
    Prompt,
    Transitions,
    assign_advantages,
    batch_size,
    fold_text,
    select_rows,
)


def batch(kind: Any, rows: int) -> Any:
    tensors = [torch.arange(rows * 6.0).view(rows, 2, 3) + i for i in range(len(kind.__dataclass_fields__))]
    return kind(*tensors)


@pytest.mark.parametrize("kind", [Groups, Pairs, Transitions, InitialNoise])
def test_every_kind_of_batch_is_cut_by_rows(kind: Any) -> None:
    whole = batch(kind, 5)
    part = select_rows(whole, torch.tensor([3, 0]))
    assert isinstance(part, kind) and batch_size(whole) == 5 and batch_size(part) == 2
    for name in kind.__dataclass_fields__:
        assert torch.equal(getattr(part, name), getattr(whole, name)[[3, 0]])
    assert batch_size(select_rows(whole, torch.zeros(5, dtype=torch.bool))) == 0


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0}, {"lr": -1}, {"lr": float("nan")}, {"epochs": 0}, {"minibatches": 0}, {"micro": -1}, {"clip": 0},
     {"warmup": -1}, {"ema": 1.0}, {"ema": -0.1}, {"betas": (0.9, 1.0)}, {"weight_decay": -1}],
)  # fmt: skip
def test_a_fit_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"optim.*{next(iter(bad))}"):
        Optim(**bad)


@pytest.mark.parametrize("bad", [{"test_images": 0}, {"validation_images": 0}, {"curve_images": 0}])
def test_an_evaluation_without_images_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least one image"):
        EvaluationSettings(**bad)


def test_prompts_do_not_share_their_facts() -> None:
    assert Prompt("a").meta is not Prompt("b").meta


def test_rows_are_taken_by_index_and_by_mask_from_any_device() -> None:
    batch = Groups(torch.arange(12.0).view(3, 4), torch.arange(3), torch.zeros(3, 4))
    assert select_rows(batch, torch.tensor([2, 0])).prompt_ids.tolist() == [2, 0]
    assert (
        select_rows(batch, torch.tensor([True, False, True])).prompt_ids.tolist() == [0, 2] and batch_size(batch) == 3
    )
    far = Groups(
        torch.empty(3, 4, device="meta"), torch.arange(3), torch.zeros(3, 4)
    )  # latents elsewhere than the prompts
    part = select_rows(far, torch.tensor([1, 2]))
    assert part.x0.device.type == "meta" and part.x0.shape == (2, 4) and part.prompt_ids.tolist() == [1, 2]


def test_credit_gives_each_transition_its_images_advantage() -> None:
    n, image = 6, torch.tensor([0, 1, 2, 0, 1, 2])
    zeros = torch.zeros(n)
    transitions = Transitions(torch.arange(n), zeros, zeros, zeros, zeros, zeros, zeros, image, image)
    kept = assign_advantages(transitions, torch.tensor([[0.5, 0.0, -2.0]]))
    assert kept.image.tolist() == [0, 2, 0, 2] and kept.advantage.tolist() == [0.5, -2.0, 0.5, -2.0]
    assert kept.x.tolist() == [0, 2, 3, 5]
    assert batch_size(assign_advantages(transitions, torch.zeros(1, 3))) == 0


def test_credit_finds_images_that_were_sampled_in_parts() -> None:
    """Parts of a rollout come one after the other, so an image's place among the rows is not its number."""
    image = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])  # two parts of three images, two steps each
    column = torch.arange(12.0)
    transitions = Transitions(
        column[:, None], column, column, *[column[:, None]] * 2, column, torch.zeros(12), image // 3, image
    )
    given = assign_advantages(transitions, torch.tensor([[1.0, 0.0, 3.0], [4.0, 5.0, 0.0]]))
    assert given.advantage.tolist() == [image + 1 for image in given.image.tolist()] == [1, 3, 1, 3, 4, 5, 4, 5]
    assert given.t.tolist() == [0, 2, 3, 5, 6, 7, 9, 10]
    assert not transitions.advantage.any() and batch_size(assign_advantages(transitions, torch.zeros(2, 3))) == 0


def test_a_curve_without_an_eval_point_is_refused() -> None:
    with pytest.raises(UserError, match="at least one eval point"):
        EvaluationSettings(eval_points=0)


# Texts that are the same


TOLD_APART = [
    ("की", "का"), ("กา", "กี"), ("كَتَبَ", "كُتِبَ"), ("a cat 🐱", "a cat 🐶"), ("👍🏻", "👍🏿"), ("C", "C++"), ("C", "C#"), ("C++", "C#"),
    ("-5 degrees", "5 degrees"), ("x = (-5)", "x = (5)"), ("+5", "5"), ("1.5 m", "15 m"), (".5 m", "5 m"), ("1/2", "12"), ("1:5", "15"),
    ("1-5 dogs", "15 dogs"), ("5 %", "5"), ("R&B", "RB"), ("2 < 3", "2 > 3"), ("$5", "5"), ("x²", "x2"), ("café", "cafe"), ("−5", "5"),
]  # fmt: skip
SAME = [
    ("A cat!", "a  CAT"), ("a top-5 list", "a top 5 list"), ("it's 5.", "its 5"), ('a "cat", `red`', "a cat red"), ("a – b", "a-b"),
    ("cafe\u0301", "CAFÉ"), ("−5", "-5"), ("❤\ufe0f", "❤"), ("STRASSE", "straße"), ("a_b | c", "ab c"), ("I saw 5. 6 ran", "i saw 5 6 ran"),
]  # fmt: skip


@pytest.mark.parametrize("text, other", TOLD_APART)
def test_texts_that_ask_for_something_else_are_not_the_same(text: str, other: str) -> None:
    assert fold_text(text) != fold_text(other)


@pytest.mark.parametrize("text, other", SAME)
def test_case_punctuation_and_spacing_make_no_other_text(text: str, other: str) -> None:
    assert fold_text(text) == fold_text(other)


@given(st.text(st.characters(max_codepoint=127), max_size=20))
@settings(max_examples=200)
def test_the_fold_of_ascii_is_that_of_any_text(text: str) -> None:
    """The pattern of ASCII texts is a shorter way to the same result."""
    folded = text.casefold()
    by_character = "".join(c for i, c in enumerate(folded) if spec._tells_apart(folded, i))  # pyright: ignore[reportPrivateUsage]
    assert fold_text(text) == (by_character or "".join(folded.split()))


@given(st.text(max_size=20))
@settings(max_examples=100)
def test_a_folded_text_folds_to_itself_in_any_case(text: str) -> None:
    assert fold_text(text.upper().lower()) == fold_text(text.lower().upper().lower())
    assert " " not in fold_text(text)
