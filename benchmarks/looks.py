"""Measures in simulation what the best of several settings without a gain shows, beside what bench/stats/selection.py expects.

    python benchmarks/looks.py                # the table of docs/statistics.md, written into it: a minute
    python benchmarks/looks.py --print --draws 200

A draw is K settings that equal the base, with S training seeds each, on the same prompts, estimated and tested by bench/stats/law.py. A
setting's gain on a prompt has a part of the prompt, one of each seed's images, and one that all settings share, since the base they
are compared with is the same. Three formulas for the expected gain of the best: the expected maximum of K normals; of K Student's t
with the degrees of freedom of the estimate; and that of normals with half of the variance shared.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np
from marked_section import DOCS, MarkedSection
from numpy.typing import NDArray

from gpobench.bench.stats import law
from gpobench.bench.stats.law import SeedSpread
from gpobench.bench.stats.selection import expected_maximum, inflation

Array = NDArray[np.float64]
SECTION = MarkedSection(DOCS / "statistics.md", "looks", "<!-- end of looks -->")


@dataclass(frozen=True)
class Cell:
    """One setting of the simulation; variances are of one prompt's gain, in units of their sum."""

    settings: int
    seeds: int
    prompts: int
    shared: float = 0.0  # of the prompts' part, which all settings have in common
    seed_sd: float = 0.0  # between training seeds, in standard errors that the prompts make


@dataclass(frozen=True)
class Measured:
    """What the best of the settings showed, in standard errors of one setting's gain, and how often one was told better."""

    best: float
    normal: float  # expected by the formula
    student: float
    half_shared: float
    told: float
    expected_told: float


def measure(cell: Cell, draws: int, rng: np.random.Generator) -> Measured:
    """Simulate tables of settings without a gain and estimate each by the law of the tables."""
    k, s, n = cell.settings, cell.seeds, cell.prompts
    shared = math.sqrt(cell.shared) * rng.standard_normal((draws, 1, 1, n))
    own = math.sqrt((1 - cell.shared) / 2) * rng.standard_normal((draws, k, 1, n))
    images = math.sqrt((1 - cell.shared) / 2) * rng.standard_normal((draws, k, s, n))
    seeds = cell.seed_sd / math.sqrt(n) * rng.standard_normal((draws, k, s, 1))
    gains = shared + own + images + seeds
    averaged = gains.mean(2)
    mean = averaged.mean(-1)
    p_variance = averaged.var(-1, ddof=1) / n
    sides: list[tuple[law.SeedVariance, int]] = []
    if s > 1:
        off = gains - averaged[:, :, None]
        off = off - off.mean(-1, keepdims=True)
        residual = np.square(off).sum((2, 3)) / (n * (n - 1) * (s - 1))
        spread = SeedSpread(gains.mean(-1).var(-1, ddof=1), residual, np.full(k, s))
        sides = [(law.moderate(spread), s)]
    noise = law.contrast_noise(p_variance, np.array(float(n - 1)), sides)
    told = ((noise.p(mean) < 0.05) & (mean > 0)).any(1)
    se = noise.se
    true_se = float(mean.std())
    df = float(np.median(noise.df()))
    return Measured(
        best=float(mean.max(1).mean()) / true_se,
        normal=float(se.mean()) / true_se * expected_maximum(k),
        student=float(se.mean()) / true_se * student_maximum(k, df),
        half_shared=float(se.mean()) / true_se * math.sqrt(0.5) * expected_maximum(k),
        told=float(told.mean()),
        expected_told=inflation(k, 1.0).told,
    )


def student_maximum(count: int, df: float) -> float:
    """Return the expected maximum of `count` numbers of Student's t, by quadrature."""
    from scipy.integrate import quad
    from scipy.stats import t

    if count < 2:
        return 0.0
    density = lambda u: t.ppf(u, df) * count * u ** (count - 1)
    return float(quad(density, 0.0, 1.0, limit=500, points=[0.5, 0.999])[0])


CELLS = [
    Cell(settings, seeds, prompts, shared, sd)
    for settings in (2, 5, 20)
    for seeds, prompts, shared, sd in (
        (1, 15, 0.0, 0.0), (1, 328, 0.0, 0.0), (1, 328, 0.5, 0.0), (3, 328, 0.0, 0.0), (3, 328, 0.0, 1.0), (3, 328, 0.5, 1.0),
        (3, 328, 0.0, 2.0), (1, 328, 0.0, 1.0),
    )
]  # fmt: skip
HEAD = [
    "settings", "seeds", "prompts", "shared", "seeds' sd", "best shows", "normal", "Student", "half shared", "told, %", "expected, %",
]  # fmt: skip


def table(draws: int) -> list[str]:
    """Return the lines of the table."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for number, cell in enumerate(CELLS):
        m = measure(cell, draws, np.random.default_rng([11, number]))
        texts = [str(cell.settings), str(cell.seeds), str(cell.prompts), f"{cell.shared:g}", f"{cell.seed_sd:g}"]
        texts += [f"{x:.2f}" for x in (m.best, m.normal, m.student, m.half_shared)]
        texts += [f"{100 * m.told:.1f}", f"{100 * m.expected_told:.1f}"]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--print", action="store_true", help="print the table and write no page")
    options = parser.parse_args()
    text = "\n".join([f"`python benchmarks/looks.py`, {options.draws:,} draws a line.", "", *table(options.draws), ""])
    if options.print:
        print(text)
        return
    SECTION.check()
    SECTION.write(text)


if __name__ == "__main__":
    main()
