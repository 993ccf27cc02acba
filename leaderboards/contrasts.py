"""Contrasts of a board: estimates means and differences of all rows and columns from one set of resampled prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..bench.evaluation.ranking import SIGNIFICANCE, order_by_mean
from ..bench.stats import intervals, significance
from ..bench.stats.intervals import Contrast, Estimate
from .board import BASE, BoardRow, Cell, Column
from .runs import Array, LoadedRun, strata_or_none

Question = tuple[str, str, str]  # row, column, and "before", "after", "delta", "versus" or "below LABEL"
Groups = Mapping[str, Sequence[LoadedRun]]  # label -> the runs of that row


class ContrastSet:
    """Collects contrasts that are estimated together; equal ones are computed once."""

    def __init__(self) -> None:
        self._contrasts: list[Contrast] = []
        self._indices: dict[Question, int] = {}
        self._index_by_bytes: dict[bytes, int] = {}

    def add(self, question: Question, contrast: Contrast) -> None:
        """Register a contrast under the question that it answers."""
        single = len(contrast.ours) == 1 and not contrast.theirs and not contrast.test
        content = np.ascontiguousarray(contrast.ours[0]).tobytes() if single else None
        if content is not None and content in self._index_by_bytes:
            self._indices[question] = self._index_by_bytes[content]
            return
        self._indices[question] = len(self._contrasts)
        if content is not None:
            self._index_by_bytes[content] = len(self._contrasts)
        self._contrasts.append(contrast)

    def estimate(self, resamples: int, seed: int, strata: Sequence[str] | None) -> dict[Question, Estimate]:
        """Return the estimate of each question."""
        estimates = intervals.crossed(self._contrasts, resamples=resamples, seed=seed, strata=strata)
        return {question: estimates[i] for question, i in self._indices.items()}


@dataclass(frozen=True)
class BoardScores:
    """Scores of a board: the runs of each row, and for each column the run whose base is shown."""

    columns: Sequence[Column]
    groups: Groups
    bases: Mapping[str, LoadedRun]  # scorer/metric -> a run that has it
    key: str  # the scorer/metric that ranks

    @property
    def strata(self) -> list[str] | None:
        """Return the stratum of each prompt, (prompts,), where there are several."""
        return strata_or_none(self.bases[self.key].strata)

    def results(self) -> dict[str, list[Array]]:
        """Map label to the (prompts, images) scores of each seed by the key; the base has its own."""
        results = {BASE: [self.bases[self.key].before[self.key]]}
        return results | {label: [r.after[self.key] for r in self._scored(label)] for label in self.groups}

    def between(self, ours: str, theirs: str) -> Contrast:
        """Return the contrast of two rows by the key. Each run evaluated the base itself, so a row is compared with its own base."""
        if theirs == BASE:
            return Contrast([r.gain(self.key) for r in self._scored(ours)], test=True)
        if ours == BASE:
            return Contrast([-r.gain(self.key) for r in self._scored(theirs)], test=True)
        a, b = ([r.after[self.key] for r in self._scored(label)] for label in (ours, theirs))
        return Contrast(a, b, test=True, lend=True)

    def _scored(self, label: str) -> list[LoadedRun]:
        return [r for r in self.groups[label] if r.has(self.key)]


def estimate_all(
    scores: BoardScores, baseline: str, order: Sequence[str], resamples: int, seed: int
) -> dict[Question, Estimate]:
    """Every cell, every row against the baseline, and every pair of ranked rows.

    scores: of the board. baseline: the label that others are compared with. order: the ranked labels by falling mean.
    resamples: of prompts and seeds; 1 for the means alone. seed: of the resampling.

    Args:
        scores: of the board.
        baseline: the label of the row that others are compared with.
        order: the ranked labels by falling mean.
        resamples: of prompts and seeds; 1 for the means alone.
        seed: of the resampling.
    """
    contrasts = ContrastSet()
    _add_cells(contrasts, scores)
    results = scores.results()
    for label, result in results.items():
        if label != baseline and result and results[baseline]:
            contrasts.add((label, scores.key, "versus"), scores.between(label, baseline))
    pairs = list(combinations(order, 2))
    for above, label in pairs:
        contrasts.add((label, scores.key, f"below {above}"), scores.between(above, label))
    # Sign flips give no p below 1 / resamples, and the correction over many pairs must be able to reach significance.
    if resamples > 1:
        resamples = max(resamples, math.ceil(2 * len(pairs) / SIGNIFICANCE))
    return contrasts.estimate(resamples if resamples > 1 else 1, seed, scores.strata)


def row_order(rows: Sequence[BoardRow], scores: BoardScores) -> list[str]:
    """Return the ranked labels by falling mean over the images that all of them have a score of, as pairs are compared."""
    results = scores.results()
    labels = [r.label for r in rows if r.is_result and results[r.label]]
    whole = np.isfinite(np.stack([x for label in labels for x in results[label]])).all(0) if labels else np.array(True)
    shared = [Contrast([np.where(whole, x, np.nan) for x in results[label]]) for label in labels]
    means = intervals.crossed(shared, resamples=1, strata=scores.strata)  # one resample: only the means are used
    return order_by_mean({label: e.mean for label, e in zip(labels, means, strict=True)})


def cells_of(label: str, scores: BoardScores, estimates: Mapping[Question, Estimate]) -> dict[str, Cell]:
    """Map scorer/metric to the cell of one row."""
    cells: dict[str, Cell] = {}
    for key in (c.key for c in scores.columns if (label, c.key, "after") in estimates):
        before, delta = (estimates.get((label, key, what)) for what in ("before", "delta"))
        counts = _image_counts(scores.groups.get(label, [scores.bases[key]]), key, base=label == BASE)
        cells[key] = Cell(estimates[label, key, "after"], before, delta, *counts)
    return cells


def corrected_p(order: Sequence[str], key: str, estimates: Mapping[Question, Estimate]) -> dict[str, float]:
    """Map label to p against the baseline, Holm-corrected over the ranked rows."""
    versus = {label: estimates[label, key, "versus"] for label in order if (label, key, "versus") in estimates}
    p = {label: e.p for label, e in versus.items() if e.p is not None}
    return dict(zip(p, significance.holm(list(p.values())), strict=True))


def _add_cells(contrasts: ContrastSet, scores: BoardScores) -> None:
    """Add before, after and difference of every row in every column."""
    for c in scores.columns:
        contrasts.add((BASE, c.key, "after"), Contrast([scores.bases[c.key].before[c.key]]))
        for label, group in scores.groups.items():
            scored = [r for r in group if r.has(c.key)]
            if scored:
                contrasts.add((label, c.key, "after"), Contrast([r.after[c.key] for r in scored]))
                contrasts.add((label, c.key, "before"), Contrast([scored[0].before[c.key]]))
                contrasts.add((label, c.key, "delta"), Contrast([r.gain(c.key) for r in scored], test=True))


def _image_counts(group: Sequence[LoadedRun], key: str, base: bool) -> tuple[int, int]:
    """Count the images of one seed, and those of all seeds that could not be scored."""
    matrices = [
        by_key[key] for r in group for by_key in ((r.before,) if base else (r.before, r.after)) if key in by_key
    ]
    return matrices[0].size, int(sum(np.isnan(matrix).sum() for matrix in matrices))
