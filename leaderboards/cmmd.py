"""CMMD of a board's rows over their seeds: a number of whole sets of images, which has no value by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..bench.evaluation.record import Number, Record
from ..bench.stats.intervals import Estimate
from ..bench.stats.law import MIN_PROMPTS, Noise, SeedSpread, SeedVariance, contrast_noise, moderate

NORMAL_95 = 2 * 1.96  # standard errors in a bootstrap interval of 95 %


def cmmd_of_rows(rows: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Estimate]]:
    """Map label, then embedder, to the mean over seeds of CMMD. rows: label -> the records of its seeds.

    A seed's own interval estimates the prompts' variance, which seeds share. The variance between seeds is moderated over the rows,
    relative to the square of each row's CMMD. A row of one seed keeps its own interval.
    """
    made: dict[str, dict[str, Estimate]] = {label: {} for label in rows}
    for name in dict.fromkeys(name for records in rows.values() for r in records for name in r.cmmd):
        numbers = {label: [r.cmmd[name] for r in records if name in r.cmmd] for label, records in rows.items()}
        present = {label: of_row for label, of_row in numbers.items() if of_row}
        means = {
            label: np.array([math.nan if n.mean is None else n.mean for n in of_row])
            for label, of_row in present.items()
        }
        moderated = moderate(_relative_spread(list(means.values())))
        for k, (label, of_row) in enumerate(present.items()):
            made[label][name] = _estimate(of_row, float(means[label].mean()), moderated.row(k))
    return made


def _relative_spread(rows: Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]]) -> SeedSpread:
    relative = [float(x.var(ddof=1) / x.mean() ** 2) if len(x) > 1 and x.mean() > 0 else math.nan for x in rows]
    seeds = np.array([len(x) if math.isfinite(v) else 1 for x, v in zip(rows, relative, strict=True)])
    return SeedSpread(np.array(relative), np.where(np.isfinite(relative), 0.0, np.nan), seeds)


def _estimate(numbers: Sequence[Number], mean: float, relative: SeedVariance) -> Estimate:
    ends = np.array([[math.nan if end is None else end for end in n.ci] for n in numbers])
    n, seeds = min(number.n for number in numbers), len(numbers)
    if seeds == 1:
        return Estimate(mean, float(ends[0, 0]), float(ends[0, 1]), n)
    of_prompts = np.array(float(np.square((ends[:, 1] - ends[:, 0]) / NORMAL_95).mean()))
    variance = SeedVariance(relative.variance * mean**2, relative.residual, relative.df, relative.lent)
    sides = [(variance, seeds)] if mean > 0 else []  # images that did not move have no spread
    noise: Noise = contrast_noise(of_prompts, np.array(float(max(n - 1, 1))), sides)
    half = float(noise.quantile()) if n >= MIN_PROMPTS else math.nan
    return Estimate(mean, max(0.0, mean - half), mean + half, n, float(noise.se), seeds=seeds)
