"""Contrasts of a board: estimates means and differences of all rows and columns, the spread of seeds moderated over the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from ..bench.evaluation import record, seed_library
from ..bench.evaluation.ranking import order_by_mean
from ..bench.stats import intervals
from ..bench.stats.intervals import Contrast, Estimate
from ..bench.stats.law import SeedVariance, holm
from .board import BASE, BoardRow, Cell, Column, SeedSource
from .comparable import budget_bounds
from .runs import Array, LoadedRun, strata_or_none

Question = tuple[str, str, str]  # row, column, and "before", "after", "delta", "versus" or "below LABEL"
Groups = Mapping[str, Sequence[LoadedRun]]  # label -> the runs of that row
BASE_SPREADS = (None,)  # the base is not trained: it has no seeds


class ContrastSet:
    """Collects contrasts that are estimated together; equal ones are computed once."""

    def __init__(self) -> None:
        self._contrasts: list[Contrast] = []
        self._indices: dict[Question, int] = {}
        self._index_by_bytes: dict[bytes, int] = {}

    def add(self, question: Question, contrast: Contrast) -> None:
        """Register a contrast under the question that it answers."""
        # The base's scores stand before every row.
        shared = len(contrast.ours) == 1 and not contrast.theirs and contrast.spreads == BASE_SPREADS
        content = np.ascontiguousarray(contrast.ours[0]).tobytes() if shared else None
        if content is not None and content in self._index_by_bytes:
            self._indices[question] = self._index_by_bytes[content]
            return
        self._indices[question] = len(self._contrasts)
        if content is not None:
            self._index_by_bytes[content] = len(self._contrasts)
        self._contrasts.append(contrast)

    def estimate(self, strata: Sequence[str] | None) -> dict[Question, Estimate]:
        """Return the estimate of each question."""
        estimates = intervals.crossed(self._contrasts, strata=strata)
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

    @cached_property
    def spreads(self) -> Mapping[str, Mapping[str, SeedVariance]]:
        """Map scorer/metric, then label, to the variance between the seeds of a row, moderated over the rows; NaN: unknown.

        Where no row has several seeds, the library of seed variances is asked. A row with a run that is no result says nothing of
        the others.
        """
        return {c.key: self._spreads_of_column(c.key, {}) for c in self.columns}

    def spread_in_place(self, label: str, key: str, after: Sequence[Array]) -> SeedVariance:
        """Return the variance between seeds of scores (prompts, images), one array a seed, that stand in the place of a row's own."""
        return self._spreads_of_column(key, {label: after})[label]

    def _spreads_of_column(self, key: str, replaced: Mapping[str, Sequence[Array]]) -> Mapping[str, SeedVariance]:
        scored = {label: self._scored(label, key) for label in self.groups}
        after = {label: [r.after[key] for r in group] for label, group in scored.items() if group} | dict(replaced)
        faulty = [label for label in after if any(record.disqualification(r.record) for r in scored[label])]
        spreads = intervals.table_spreads({k: v for k, v in after.items() if k not in faulty}, self.strata)
        for label in faulty:
            spreads |= intervals.table_spreads({label: after[label]}, self.strata)
        return {
            label: spread if np.isfinite(spread.variance) else self._library_variance(scored[label][0], key) or spread
            for label, spread in spreads.items()
        }

    def seed_source(self, label: str) -> SeedSource:
        """Return where the variance between the seeds of a row comes from, by the key."""
        scored = self._scored(label, self.key) if label != BASE else []
        if not scored:
            return ""
        if len(scored) > 1:
            return "own"
        if not np.isfinite(self.spreads[self.key][label].variance):
            return "unknown"
        several = any(len(self._scored(other, self.key)) > 1 for other in self.groups)
        return "table" if several else "library"

    @staticmethod
    def _library_variance(run: LoadedRun, key: str) -> SeedVariance | None:
        r = run.record
        entry = seed_library.find_entry(r.method, r.task, r.model, key, budget_bounds(r))
        return entry.variance() if entry else None

    def results(self) -> dict[str, list[Array]]:
        """Map label to the (prompts, images) scores of each seed by the key; the base has its own."""
        results = {BASE: [self.bases[self.key].before[self.key]]}
        return results | {label: [r.after[self.key] for r in self._scored(label, self.key)] for label in self.groups}

    def between(self, ours: str, theirs: str) -> Contrast:
        """Return the contrast of two rows by the key. Each run evaluated the base itself, so a row is compared with its own base."""
        spreads = self.spreads[self.key]
        if theirs == BASE:
            gains = [r.gain(self.key) for r in self._scored(ours, self.key)]
            return Contrast(gains, test=True, spreads=[spreads[ours]])
        if ours == BASE:
            losses = [-r.gain(self.key) for r in self._scored(theirs, self.key)]
            return Contrast(losses, test=True, spreads=[spreads[theirs]])
        a, b = ([r.after[self.key] for r in self._scored(label, self.key)] for label in (ours, theirs))
        return Contrast(a, b, test=True, spreads=[spreads[ours], spreads[theirs]])

    def _scored(self, label: str, key: str) -> list[LoadedRun]:
        return [r for r in self.groups[label] if r.has(key)]


def estimate_all(scores: BoardScores, baseline: str, order: Sequence[str]) -> dict[Question, Estimate]:
    """Every cell, every row against the baseline, and every pair of ranked rows.

    scores: of the board. baseline: the label that others are compared with. order: the ranked labels by falling mean.
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
    return contrasts.estimate(scores.strata)


def row_order(rows: Sequence[BoardRow], scores: BoardScores) -> list[str]:
    """Return the ranked labels by falling mean over the images that all of them have a score of, as pairs are compared."""
    results = scores.results()
    labels = [r.label for r in rows if r.is_result and results[r.label]]
    whole = np.isfinite(np.stack([x for label in labels for x in results[label]])).all(0) if labels else np.array(True)
    shared = [Contrast([np.where(whole, x, np.nan) for x in results[label]], spreads=BASE_SPREADS) for label in labels]
    means = intervals.crossed(shared, strata=scores.strata)  # only the means are used
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
    return dict(zip(p, holm(list(p.values())), strict=True))


def _add_cells(contrasts: ContrastSet, scores: BoardScores) -> None:
    """Add before, after and difference of every row in every column."""
    for c in scores.columns:
        base = scores.bases[c.key].before[c.key]
        contrasts.add((BASE, c.key, "after"), Contrast([base], spreads=BASE_SPREADS, share=intervals.is_share(base)))
        for label, group in scores.groups.items():
            scored = [r for r in group if r.has(c.key)]
            if scored:
                spreads = [scores.spreads[c.key][label]]
                before, after = scored[0].before[c.key], [r.after[c.key] for r in scored]
                share = all(map(intervals.is_share, [before, *after]))
                contrasts.add((label, c.key, "after"), Contrast(after, spreads=spreads, share=share))
                base_contrast = Contrast([before], spreads=BASE_SPREADS, share=intervals.is_share(before))
                contrasts.add((label, c.key, "before"), base_contrast)
                gains = [r.gain(c.key) for r in scored]
                contrasts.add((label, c.key, "delta"), Contrast(gains, test=True, spreads=spreads))


def _image_counts(group: Sequence[LoadedRun], key: str, base: bool) -> tuple[int, int]:
    """Count the images of one seed, and those of all seeds that could not be scored."""
    matrices = [
        by_key[key] for r in group for by_key in ((r.before,) if base else (r.before, r.after)) if key in by_key
    ]
    return matrices[0].size, int(sum(np.isnan(matrix).sum() for matrix in matrices))
