"""Pairs as a person writes them."""

import pytest

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.asked_pairs import asked_pairs

ROWS = ["gpo", "diffusion-nft", "mine.py:Mine", "sft"]
ALIASES = {"nft": "diffusion-nft"}


def parse(text: str | None, methods: list[str] | None = None) -> list[tuple[str, str]]:
    return asked_pairs(text, methods or ["gpo", "diffusion-nft"], ROWS, lambda name: ALIASES.get(name, name))


def test_pairs_are_each_two_methods_or_those_that_are_named() -> None:
    assert parse(None) == [("gpo", "diffusion-nft")] and parse(None, ["gpo"]) == [("gpo", "base")]
    assert parse(None, ["gpo", "sft", "diffusion-nft"]) == [
        ("gpo", "sft"), ("gpo", "diffusion-nft"), ("sft", "diffusion-nft"),
    ]  # fmt: skip
    assert parse("gpo:nft, base:gpo,nft:gpo") == [("gpo", "diffusion-nft"), ("gpo", "base")]
    assert parse("mine.py:Mine:base,gpo:mine.py:Mine") == [("mine.py:Mine", "base"), ("gpo", "mine.py:Mine")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpo", "two rows with a colon between"),
        ("gpo:sftt", "did you mean 'sft'"),
        ("gpo:gpo", "does not differ from itself"),
        (",", "names no pair"),
    ],
)
def test_what_is_no_pair_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(text)
