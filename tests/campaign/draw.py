"""Draws faults from the table and injects them one by one, each within its time limit."""

from __future__ import annotations

import signal
import traceback
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fault import NotHeld, Row


@dataclass(frozen=True)
class Drawn:
    """A row's name and the seed of what the row leaves open."""

    name: str
    seed: int


@dataclass(frozen=True)
class Tried:
    """A fault that was injected; outcome: what came of it, or the harm that it did."""

    kind: str
    name: str
    seed: int
    held: bool
    outcome: str


def draw(rows: Sequence[Row], n: int, seed: int) -> list[Drawn]:
    """At least n faults: each row once, then at random by weight; the same for the same seed."""
    rng = np.random.default_rng(seed)
    weights = np.array([row.weight for row in rows])
    more = rng.choice(len(rows), max(n - len(rows), 0), p=weights / weights.sum())
    picked = [*range(len(rows)), *more.tolist()]
    drawn = [Drawn(rows[i].name, int(rng.integers(2**31))) for i in picked]
    return [drawn[i] for i in rng.permutation(len(drawn))]


@contextmanager
def _time_limit(seconds: float) -> Any:
    def ring(number: int, frame: Any) -> None:
        raise NotHeld(f"hang: not ended after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    outer = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest-timeout's, where a test injects
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def try_row(row: Row, seed: int) -> Tried:
    """Inject one fault."""
    rng = np.random.default_rng([seed, zlib.crc32(row.name.encode())])
    try:
        with _time_limit(row.seconds):
            outcome = row.inject(rng)
    except NotHeld as harm:
        return Tried(row.kind, row.name, seed, False, str(harm))
    except Exception:
        return Tried(row.kind, row.name, seed, False, f"traceback: {traceback.format_exc()[-1500:]}")
    if outcome not in row.expected:
        wrong = f"wrong outcome: {outcome}, expected {' or '.join(sorted(row.expected))}"
        return Tried(row.kind, row.name, seed, False, wrong)
    return Tried(row.kind, row.name, seed, True, outcome)


_ROWS: dict[str, Row] = {}  # of this worker process: what a kind prepares is prepared once


def inject(drawn: Sequence[Drawn], place: str, kinds: Sequence[str]) -> list[Tried]:
    """Inject faults in a worker process, which prepares what the kinds need at the first one that needs it."""
    import os

    from table import table

    if not _ROWS:
        _ROWS.update({row.name: row for row in table(Path(place) / str(os.getpid()), kinds)})
    return [try_row(_ROWS[each.name], each.seed) for each in drawn]
