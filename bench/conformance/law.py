"""Defines a law, one property that every method must have, its result, and the decorator that makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# The subject of a law: the method's source, or a harness around a method that trains or that searches.
Subject = Literal["source", "training", "search"]


@dataclass(frozen=True)
class LawResult:
    """Result of one law for one method on one family of models."""

    law: str
    family: str  # "" for a law about the source, which needs no model
    ok: bool
    seconds: float
    detail: str = ""  # how the law is broken, with numbers
    skipped: str = ""  # why the law does not apply
    hard: bool = True  # a broken soft law is a warning: other settings may mend it

    @property
    def broken(self) -> bool:
        """Return whether the method is refused."""
        return self.hard and not self.ok


class LawBroken(Exception):
    """A law is broken; the text says how, with numbers."""


class LawSkipped(Exception):
    """A law does not apply; the text says why."""


@dataclass(frozen=True)
class Law:
    """One law: its name, what it is checked on, and the function that checks it."""

    name: str
    on: Subject
    check: Callable[[Any], None]  # takes a MethodSource (on "source") or a Harness
    families: tuple[str, ...] = ()  # empty: all
    hard: bool = True


def law(
    name: str, on: Subject = "training", *, families: tuple[str, ...] = (), hard: bool = True
) -> Callable[[Any], Law]:
    """Decorator: turn a function that raises LawBroken or LawSkipped into a Law; its docstring says why it is one."""
    return lambda function: Law(name, on, function, families, hard)
