"""Breakdowns of a report: computes scores over parts of the prompt set, and finds the lowest scores and the largest losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..bench.stats import intervals
from ..bench.stats.intervals import Contrast, Estimate
from ..bench.stats.law import MIN_PROMPTS
from .board import BASE
from .runs import LoadedRun

MAX_RANGES = 6  # parts by length, at most
NUMBERS = {word: n for n, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)}


@dataclass(frozen=True)
class Breakdown:
    """Scores by the table's key over each part of the test set."""

    name: str
    parts: Sequence[str]
    prompts: Sequence[int]  # of each part
    cells: Mapping[str, Sequence[tuple[Estimate, Estimate | None]]]  # label -> a part's after, and after - before


@dataclass(frozen=True)
class PromptCase:
    """Scores of one prompt: means over seeds and images."""

    prompt: int
    before: float
    after: float
    images: int  # that could be scored after, of all seeds

    @property
    def gain(self) -> float:
        """Return after minus before."""
        return self.after - self.before


def breakdowns(key: str, rows: Mapping[str, Sequence[LoadedRun]], texts: Sequence[str]) -> list[Breakdown]:
    """Break scores down by stratum, length of the quoted text and number named, as far as prompts differ in them.

    key: the scorer/metric. rows: label -> the runs of that row. texts: of the prompts.
    """
    strata = next(run.strata for group in rows.values() for run in group)
    lengths = [max((len(quoted) for quoted in re.findall(r'"([^"]+)"', text)), default=None) for text in texts]
    labels_by_name = {
        "By kind of prompt": [stratum or None for stratum in strata],
        "By letters in the quoted text": _ranges(lengths),
        "By the number named": [_number_named(text) for text in texts],
    }
    candidates = [_breakdown(name, labels, key, rows) for name, labels in labels_by_name.items()]
    return [breakdown for breakdown in candidates if len(breakdown.parts) > 1]


def hardest(runs: Sequence[LoadedRun], key: str, count: int = 8) -> tuple[list[PromptCase], list[PromptCase]]:
    """Find the prompts with the lowest score after, and those that lost most; of equal ones, the larger loss first."""
    scored = [run for run in runs if run.has(key)]
    if not scored:
        return [], []
    before = np.mean([intervals.per_prompt(run.before[key]) for run in scored], axis=0)
    all_images = np.concatenate([run.after[key] for run in scored], axis=1)
    after = intervals.per_prompt(all_images)
    images = np.isfinite(all_images).sum(1)
    cases = [
        PromptCase(p, float(before[p]), float(after[p]), int(images[p]))
        for p in np.flatnonzero(np.isfinite(before) & np.isfinite(after)).tolist()
    ]
    lowest = sorted(cases, key=lambda c: (c.after, c.gain, c.prompt))[:count]
    return lowest, [c for c in sorted(cases, key=lambda c: (c.gain, c.after, c.prompt))[:count] if c.gain < 0]


def _number_named(text: str) -> str | None:
    """Return the first number word outside quotation marks."""
    outside = re.sub(r'"[^"]*"', " ", text.casefold())
    number = next((NUMBERS[word] for word in re.findall(r"[a-z]+", outside) if word in NUMBERS), None)
    return None if number is None else str(number)


def _ranges(lengths: Sequence[int | None]) -> list[str | None]:
    """Return each length itself, or, where there are many, one of a few ranges with about equally many prompts."""
    present = sorted(n for n in lengths if n is not None)
    if len(set(present)) <= MAX_RANGES:
        return [None if n is None else str(n) for n in lengths]
    count = len(present)
    ends = sorted({present[min(count - 1, (k + 1) * count // MAX_RANGES)] for k in range(MAX_RANGES)})
    starts = [present[0], *(end + 1 for end in ends[:-1])]
    names = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return [None if n is None else names[int(np.searchsorted(ends, n))] for n in lengths]


def _breakdown(name: str, labels: Sequence[str | None], key: str, rows: Mapping[str, Sequence[LoadedRun]]) -> Breakdown:
    """Compute one breakdown. labels: the part of each prompt, None for a prompt of no part."""
    count = {part: labels.count(part) for part in dict.fromkeys(labels) if part is not None}
    parts = sorted((part for part, n in count.items() if n >= MIN_PROMPTS), key=_natural)
    cells: dict[str, list[tuple[Estimate, Estimate | None]]] = {}
    with_base = [run for group in rows.values() for run in group if key in run.before]
    for part in parts if len(parts) > 1 else []:
        members = np.flatnonzero([label == part for label in labels])
        after = {
            label: [run.after[key][members] for run in group if run.has(key)]
            for label, group in rows.items()
            if any(run.has(key) for run in group)
        }
        spreads = intervals.table_spreads(after)
        contrasts: dict[str, Contrast] = {}
        for label, group in rows.items():
            scored = [run for run in group if run.has(key)]
            if label == BASE and not group:
                base = with_base[0].before[key][members]
                contrasts[f"after {label}"] = Contrast([base], share=intervals.is_share(base))
            elif scored:
                row_spreads, share = [spreads[label]], all(map(intervals.is_share, after[label]))
                contrasts[f"after {label}"] = Contrast(after[label], spreads=row_spreads, share=share)
                contrasts[f"gain {label}"] = Contrast([run.gain(key)[members] for run in scored], spreads=row_spreads)
        estimates = dict(zip(contrasts, intervals.crossed(list(contrasts.values())), strict=True))
        for label in rows:
            if f"after {label}" in estimates:
                cells.setdefault(label, []).append((estimates[f"after {label}"], estimates.get(f"gain {label}")))
    return Breakdown(name, parts, [count[part] for part in parts], cells)


def _natural(text: str) -> tuple[int, str]:
    """Return a sort key: the number that a text begins with, then the text."""
    number = re.match(r"\d+", text)
    return (int(number[0]) if number else 0, text)
