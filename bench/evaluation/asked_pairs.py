"""Pairs of rows that a person wants told apart, as options name them: `gpo:nft,gpo:base`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from .. import registry
from ..errors import UserError
from ..stats.planning import BASE, Pair


def asked_pairs(
    text: str | None, methods: Sequence[str], rows: Sequence[str], canonical: Callable[[str], str] = lambda name: name
) -> list[Pair]:
    """Parse pairs of rows, each once.

    Args:
        text: `A:B,C:base`; None: each two of the methods, or a single method and the base.
        methods: rows that were named.
        rows: all rows of the table, without the base.
        canonical: maps a name as a person writes it to that of a row.

    Raises:
        UserError: on a row that is not in the table, and a pair of a row with itself.
    """
    if text is None:
        return list(combinations(methods, 2)) if len(methods) > 1 else [(methods[0], BASE)]
    pairs = [_parse(part.strip(), [*rows, BASE], canonical) for part in text.split(",") if part.strip()]
    if not pairs:
        raise UserError(f"--pairs names no pair, as gpo:nft or gpo:base: {text!r}")
    unique: dict[frozenset[str], Pair] = {}
    for pair in pairs:
        unique.setdefault(frozenset(pair), pair)
    return list(unique.values())


def _parse(text: str, rows: Sequence[str], canonical: Callable[[str], str]) -> Pair:
    """Split at the colon that leaves two rows; file.py:Name has one of its own. The base stands last."""
    colons = [k for k, c in enumerate(text) if c == ":"]
    if not colons:
        raise UserError(f"--pairs takes two rows with a colon between, as gpo:nft or gpo:base, got {text!r}")
    named = lambda name: name if name in rows else canonical(name) if name.strip() else name
    splits = [(named(text[:k].strip()), named(text[k + 1 :].strip())) for k in colons]
    known = [pair for pair in splits if set(pair) <= set(rows)]
    if not known:
        wrong = next(name for name in splits[0] if name not in rows)
        raise registry.unknown("row of this table", wrong, rows)
    first, second = known[0]
    if first == second:
        raise UserError(f"--pairs {text}: a row does not differ from itself")
    return (second, first) if first == BASE else (first, second)
