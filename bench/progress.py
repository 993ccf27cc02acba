"""What a run shows while it works: four calls that a terminal, a log or nothing at all may answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Where progress goes; never stdout, which belongs to the result."""

    def say(self, text: str) -> None:
        """A line that should stay."""
        ...

    def phase(self, name: str, total: float) -> None:
        """A new stretch of work begins; total in its own unit."""
        ...

    def advance(self, by: float) -> None:
        """So much of the stretch is done."""
        ...

    def status(self, fraction: float, numbers: Mapping[str, float]) -> None:
        """Training: how much of the budget is spent, and the numbers worth showing."""
        ...


class NullProgress:
    """Shows nothing."""

    def say(self, text: str) -> None: ...
    def phase(self, name: str, total: float) -> None: ...
    def advance(self, by: float) -> None: ...
    def status(self, fraction: float, numbers: Mapping[str, float]) -> None: ...
