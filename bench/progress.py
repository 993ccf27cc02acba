"""Progress display of a run: the four calls that a terminal, a log or nothing at all implements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives progress reports. An implementation never writes to stdout: stdout carries the result only."""

    def message(self, text: str) -> None:
        """Show one line of text that stays visible."""
        ...

    def phase(self, name: str, total: float) -> None:
        """Begin a new phase of work; total: its amount of work, in a unit of the phase's own."""
        ...

    def advance(self, by: float) -> None:
        """Report that this amount of the current phase is done, in the unit of `phase`'s total."""
        ...

    def status(self, fraction: float, numbers: Mapping[str, float]) -> None:
        """Report the state of training: the fraction of the budget that is spent, and metrics to show."""
        ...


class NullProgress:
    """Implements `Progress` and shows nothing."""

    def message(self, text: str) -> None: ...
    def phase(self, name: str, total: float) -> None: ...
    def advance(self, by: float) -> None: ...
    def status(self, fraction: float, numbers: Mapping[str, float]) -> None: ...
