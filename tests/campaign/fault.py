"""What a fault is, what may come of it, and the table row that states both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Outcome = str
"""One of:

- "same": the result is that of the run without the fault, bit for bit;
- "unscored": the images concerned are NaN with a reason, the others have their values;
- "refused": one line on stderr, exit code 2, no number on stdout;
- "resumed": the command ended in one line or was killed, and the same command went on to the same bytes;
- "faulty run": the documented exit code of a faulty run, and the record states the fault;
- "own error": the method's own exception ended the command, shown with its file, and nothing is on stdout;
- "stalled": the run ended before its budget with a reason, because no group's rewards differed;
- "answered": the server answered with a refusal and still serves others;
- "told": the result differs from that without the fault, and a line on stderr names the damaged file;
- "parsed": foreign input that is valid all the same was read.
"""


class NotHeld(Exception):
    """A fault that did harm. Its text: the kind of harm (silent number, traceback, hang, lost bytes, wrong outcome) and the evidence."""


@dataclass(frozen=True)
class Row:
    """One row of the table: a fault, where it is injected, and what may come of it."""

    kind: str  # models, scorers, files, inputs, servers, disks, signals or methods
    what: str
    where: str
    expected: frozenset[Outcome]
    inject: Callable[[np.random.Generator], Outcome]  # draws what the row leaves open; raises NotHeld
    weight: float = 1.0  # how often it is drawn, relative to the other rows of its kind
    seconds: float = 120.0  # after which it hangs

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.what}, {self.where}"


def row(kind: str, what: str, where: str, expected: str | Sequence[str], inject: Any, **more: Any) -> Row:
    """A row whose expected outcomes are given as words."""
    return Row(kind, what, where, frozenset([expected] if isinstance(expected, str) else expected), inject, **more)


def one_line(text: str, *, mention: Sequence[str] = ()) -> None:
    """Check that a command's stderr ends in one readable line that mentions the given words."""
    if "Traceback (most recent call last)" in text:
        raise NotHeld(f"traceback: {text[-600:]}")
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if not last:
        raise NotHeld("wrong outcome: nothing on stderr")
    missing = [word for word in mention if word not in text]
    if missing:
        raise NotHeld(f"wrong outcome: {last!r} does not mention {missing}")
