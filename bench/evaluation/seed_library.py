"""Library of variances: how far training seeds, prompts and what is left of a method lay apart on a task, from the project's own boards.

`seed_library.json` is made by `python benchmarks/seed_library.py`. A table lends from it where none of its rows has several seeds; the
result of a single run names it; `gpobench plan` plans from it where there is no pilot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..stats.law import SeedVariance
from .ranking import record_key, verdict_beside
from .record import Record

PATH = Path(__file__).with_name("seed_library.json")


@dataclass(frozen=True)
class SeedEntry:
    """Spread of the seeds of one method, with its preset, on one task under one budget, by one scorer/metric."""

    method: str
    task: str
    model: str
    key: str
    budget: Mapping[str, float]
    sd: float  # between seeds, beyond what the prompts' noise makes; in units of the score
    df: float  # degrees of freedom of its square
    seeds: int
    source: str  # the file that it was computed from
    # What a board's scores also show; NaN, 0 and "" where the source has no scores by prompt. Of one prompt, its images averaged:
    prompt_sd: float = math.nan  # of what a prompt makes of the method, the same under all seeds
    residual_sd: float = math.nan  # of what is left
    correlation: float = math.nan  # of the prompts' part with that of the board's other rows, the mean
    prompts: int = 0
    images: int = 0  # of a prompt
    share: bool = False  # the score lies between 0 and 1
    seconds_per_nfe: float = math.nan  # of training
    device: str = ""

    def variance(self) -> SeedVariance:
        """Return the variance that a row of one seed is lent."""
        return SeedVariance(np.array(self.sd**2), np.array(0.0), np.array(self.df), np.array(True))


@lru_cache(maxsize=1)
def entries() -> tuple[SeedEntry, ...]:
    """Read the shipped library."""
    return tuple(SeedEntry(**entry) for entry in json.loads(PATH.read_text("utf-8")))


def find_entry(method: str, task: str, model: str, key: str, budget: Mapping[str, float]) -> SeedEntry | None:
    """Find the entry of this method, task, model and scorer/metric under this budget; None where there is none.

    budget: the bounds by currency.
    """
    return next((e for e in _of_method(method, task, model, key) if dict(e.budget) == dict(budget)), None)


def nearest_entry(record: Record, key: str) -> SeedEntry | None:
    """Find the entry of a run's method, task, model and scorer/metric whose budget is nearest; None where there is none."""
    known = _of_method(record.method, record.task, record.model, key)
    return min(known, key=lambda entry: _distance(record, entry), default=None)


def _distance(record: Record, entry: SeedEntry) -> float:
    """Return how far an entry's budget is from that of a run, in logarithms."""
    nfe = float(record.config.get("budget", {}).get("nfe", math.nan))
    return abs(math.log(entry.budget.get("nfe", math.inf) / nfe)) if nfe > 0 else 0.0


def known_entries(task: str, model: str) -> list[SeedEntry]:
    """Return the entries of a task and model that have all components of variance."""
    return [e for e in entries() if (e.task, e.model) == (task, model) and math.isfinite(e.prompt_sd)]


def seed_note(record: Record) -> str:
    """Say what the interval of a single run does not contain, with the spread of seeds where the library knows it."""
    lacking = "One training seed: the intervals do not contain what another seed would change."
    key = record_key(record)
    keys = [key, verdict_beside(key, record.delta)] if key else []
    known = [entry for each in keys if each and (entry := nearest_entry(record, each))]
    if not known:
        return f"{lacking} How far seeds lie apart here is not known: train two more."
    entry = min(known, key=lambda entry: _distance(record, entry))  # another metric says more than another budget
    bounds = ", ".join(f"{bound:,.0f} {currency}" for currency, bound in entry.budget.items())
    spread = f"{entry.sd:.3f}".removeprefix("0")
    return f"{lacking} In {entry.key}, {entry.seeds} seeds at {bounds} had a standard deviation of {spread} ({entry.source})."


def _of_method(method: str, task: str, model: str, key: str) -> list[SeedEntry]:
    wanted = (method, task, model, key)
    return [e for e in entries() if (e.method, e.task, e.model, e.key) == wanted]
