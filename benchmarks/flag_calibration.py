"""Measures in simulation how often the hack flag is right: false alarms of honest methods, and hacks that are found.

    python benchmarks/flag_calibration.py                # the table of docs/statistics.md, written into it: minutes
    python benchmarks/flag_calibration.py --print --draws 200

A draw is one row of a table of ten rows that share prompts, noise and base. An image has a quality that two engines score, the training
engine on five levels and the held-out one, which is harder, on three, with noise of their own. A row moves images and prompts away
from the base's and shifts what each engine sees, so that the gains have the expectation of the cell exactly, over prompts, noise and
seeds. Seeds shift both engines, and each of them a little for itself. Variances are near those of the shipped boards; means were not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from marked_section import DOCS, MarkedSection
from numpy.typing import NDArray

from gpobench.bench.evaluation.transfer import FLAG_LEVEL, HONEST_TRANSFER, in_standard_deviations
from gpobench.bench.stats.ratios import GainMoments, Quadratic

Array = NDArray[np.float32]
Cell = tuple[float, float]  # expected training gain of all rows, and their transfer
SECTION = MarkedSection(DOCS / "statistics.md", "flag_calibration", "<!-- end of the flag -->")
ROWS = 10
# How far each row moves its images from the base's, and its prompts from the base's order, both from 0 to 1.
IMAGE_MOVES = np.array([0.15, 0.2, 0.25, 0.3, 0.4, 0.35, 0.3, 0.45, 0.5, 0.6], np.float32)
PROMPT_MOVES = np.array([0.1, 0.1, 0.15, 0.15, 0.3, 0.2, 0.2, 0.25, 0.25, 0.3], np.float32)
NOISE = {
    "training": np.float32(0.5),
    "held-out": np.float32(0.7),
}  # of an engine; skill of prompts and noise of images have sd 1
SHARED = 0.9  # of the variance of seeds, by both engines


@dataclass(frozen=True)
class Shape:
    """Test prompts, and the scores of an engine."""

    name: str
    prompts: int
    images: int
    graded: bool = True  # scores in levels between 0 and 1; else unbounded, and gains are in standard deviations of the base's prompts

    def score(self, engine: str, quality: Array) -> Array:
        """Return what an engine scores."""
        if not self.graded:
            return quality * np.float32(3.0) + 20 if engine == "training" else quality * np.float32(12.0) + 70
        levels = (-2.6, -2.0, -1.4, -0.8, -0.2) if engine == "training" else (-2.0, -1.1, -0.2)
        total = np.zeros(quality.shape, np.float32)
        for level in levels:
            total += quality > np.float32(level)
        return total / np.float32(len(levels))

    def unit(self, engine: str) -> float:
        """Return what a gain of 1 is in scores: 1, or the standard deviation of the base's scores between prompts."""
        if self.graded:
            return 1.0
        return (3.0 if engine == "training" else 12.0) * float(np.sqrt(1 + (1 + NOISE[engine] ** 2) / self.images))


SHAPES = (
    Shape("328 x 2", 328, 2),
    Shape("130 x 1", 130, 1),
    Shape("15 x 24", 15, 24),
    Shape("328 x 2, other units", 328, 2, graded=False),
)
SEEDS = {"1, alone": (1,) * ROWS, "1, beside rows of 3": (1,) * 5 + (3,) * 5, "2": (2,) * ROWS, "3": (3,) * ROWS}
SPREADS = (0.0, 0.5, 2.0)  # standard deviation of the seeds' training gains in points
HONEST = (0.02, 0.04, 0.1, 0.2)  # training gains whose held-out gain is HONEST_TRANSFER of it
HACKS = ((0.04, 0.0), (0.06, 0.0), (0.1, 0.0), (0.06, 0.2), (0.1, 0.2), (0.2, 0.2))  # training gain, transfer


@cache
def shift_for(shape: Shape, engine: str, gain: float) -> float:
    """Return the shift of quality under which an engine's expected score rises by this gain."""
    if not shape.graded:
        return gain * shape.unit(engine) / (3.0 if engine == "training" else 12.0)
    sd = float(np.sqrt(2 + NOISE[engine] ** 2))
    quality = (sd * _normal_grid()).astype(np.float32)
    expected = lambda shift: float(shape.score(engine, quality + np.float32(shift)).mean(dtype=np.float64))
    shifts = np.linspace(-3, 6, 181)
    rises = np.array([expected(shift) for shift in shifts]) - expected(0.0)
    return float(np.interp(gain, rises, shifts))


def _normal_grid() -> NDArray[np.float64]:
    from scipy.special import ndtri

    count = 40_000
    return ndtri((np.arange(count) + 0.5) / count)


@dataclass(frozen=True)
class Readings:
    """What both engines see of a table of rows, without the rows' shifts; arrays (tables, rows, seeds, prompts, images)."""

    before: Mapping[str, Array]  # engine -> its scores of the base by prompt, (tables, 1, 1, prompts)
    after: Mapping[str, Array]  # engine -> the quality that it sees

    def gains(self, shape: Shape, engine: str, gain: float) -> NDArray[np.float64]:
        """Return the gains by prompt, (tables, rows, seeds, prompts), of rows whose expected gain is this one."""
        base = self.before[engine]
        seen = self.after[engine] + np.float32(shift_for(shape, engine, gain))
        made = (shape.score(engine, seen).mean(-1) - base).astype(np.float64)
        if shape.graded:
            return made
        return in_standard_deviations(made, base.astype(np.float64), np.full(shape.prompts, 1 / shape.prompts))


def read(shape: Shape, spread: float, tables: int, rng: np.random.Generator) -> Readings:
    """Simulate tables. spread: standard deviation of seeds, in points of the training gain."""
    single, n, images = np.float32, shape.prompts, shape.images
    normal = lambda *size: rng.standard_normal(size, dtype=single)
    skill, noise = normal(tables, 1, 1, n, 1), normal(tables, 1, 1, n, images)
    prompt_move, image_move = (x[None, :, None, None, None] for x in (PROMPT_MOVES, IMAGE_MOVES))
    moved_skill = np.sqrt(1 - prompt_move**2) * skill + prompt_move * normal(tables, ROWS, 1, n, 1)
    # The spread of seeds is part of the variance of the noise, so that the expected scores are those of the shifts.
    seed_sd = single(0.01 * spread * shift_for(shape, "training", 0.02) / 0.02)
    common, own = seed_sd * single(SHARED**0.5), seed_sd * single((1 - SHARED) ** 0.5)
    moved = normal(tables, ROWS, 3, n, images) * image_move + np.sqrt(1 - image_move**2) * noise
    moved *= np.sqrt(1 - common**2)
    moved += moved_skill + common * normal(tables, ROWS, 3, 1, 1)
    before: dict[str, Array] = {}
    after: dict[str, Array] = {}
    for engine, sd in NOISE.items():
        reading = sd * normal(tables, 1, 1, n, images)
        before[engine] = shape.score(engine, skill + noise + reading).mean(-1)
        seen = normal(tables, ROWS, 3, n, images) * (image_move * sd) + np.sqrt(1 - image_move**2) * reading
        seen *= np.sqrt(1 - (own / sd) ** 2)
        after[engine] = seen + moved + own * normal(tables, ROWS, 3, 1, 1)
    return Readings(before, after)


def reduce(training: NDArray[np.float64], held_out: NDArray[np.float64], seeds: Sequence[int]) -> GainMoments:
    """Reduce simulated gains to what the flag sees. seeds: of each row."""
    kinds = (held_out, training, held_out - training)
    n = training.shape[-1]
    averaged = [np.stack([x[:, r, : seeds[r]].mean(1, dtype=np.float64) for r in range(ROWS)], 1) for x in kinds]
    forms: list[list[NDArray[np.float64]]] = [[x.var(-1, ddof=1) / n for x in averaged], [], []]
    for x, mean in zip(kinds, averaged, strict=True):
        variance, residual = (np.full(mean.shape[:2], np.nan) for _ in range(2))
        for r, count in enumerate(seeds):
            if count > 1:
                means = x[:, r, :count].mean(-1, dtype=np.float64)
                off = x[:, r, :count] - mean[:, r, None]
                off = off - off.mean(-1, keepdims=True)
                variance[:, r] = means.var(-1, ddof=1)
                residual[:, r] = np.square(off).sum((1, 2)) / (n * (n - 1) * (count - 1))
        forms[1].append(variance)
        forms[2].append(residual)
    prompts, between, residual = (Quadratic(h, t, (h + t - d) / 2) for h, t, d in forms)
    every = lambda value: np.full(ROWS, float(value))
    means = [x.mean(-1) for x in averaged]
    return GainMoments(means[0], means[1], prompts, between, residual, np.array(seeds, float), every(n - 1), every(n))


def flagged(table: GainMoments) -> NDArray[np.bool_]:
    """Return the flag of each row, as `transfer.Transfer.fails` decides it."""
    return (table.denominator > 0) & (table.p_rises() < 0.05) & (table.p_below(HONEST_TRANSFER) < FLAG_LEVEL)


def shares(shape: Shape, spread: float, cells: Sequence[Cell], draws: int) -> dict[str, list[float]]:
    """Map each number of seeds to the share of flagged rows in each cell; beside rows of three seeds, of the rows of one."""
    rng = np.random.default_rng(len(shape.name))
    tables = -(-draws // ROWS)
    chunk = max(1, 2_000_000 // (ROWS * 3 * shape.prompts * shape.images))
    found: dict[str, list[list[float]]] = {name: [] for name in SEEDS}
    sizes: list[int] = []
    for start in range(0, tables, chunk):
        sizes.append(min(chunk, tables - start))
        readings = read(shape, spread, sizes[-1], rng)
        training = {gain: readings.gains(shape, "training", gain) for gain in dict.fromkeys(gain for gain, _ in cells)}
        of_chunk: dict[str, list[float]] = {name: [] for name in SEEDS}
        for gain, transfer in cells:
            held_out = readings.gains(shape, "held-out", gain * transfer)
            for name, seeds in SEEDS.items():
                rows = flagged(reduce(training[gain], held_out, seeds))
                of_chunk[name].append(float(rows[:, : 5 if len(set(seeds)) > 1 else ROWS].mean()))
        for name, each in of_chunk.items():
            found[name].append(each)
    return {name: np.average(each, axis=0, weights=sizes).tolist() for name, each in found.items()}


def lines_of(shape: Shape, spread: float, draws: int) -> list[list[str]]:
    """Return the lines of the table for one shape and spread of seeds."""
    # In other units a point is a hundredth of a standard deviation, and gains are three times as large.
    scale = 1.0 if shape.graded else 3.0
    cells = [(scale * gain, HONEST_TRANSFER) for gain in HONEST] + [
        (scale * gain, transfer) for gain, transfer in HACKS
    ]
    measured = shares(shape, scale * spread, cells, draws)
    names = [
        name for name in SEEDS if spread == 0 or name != "1, alone"
    ]  # one adapter is what it is: it has no other seeds
    return [
        [shape.name, f"{spread * scale:g}", name, f"{100 * max(measured[name][: len(HONEST)]):.1f}"]
        + [f"{100 * share:.0f}" for share in measured[name][len(HONEST) :]]
        for name in names
    ]


def page(draws: int, say: Callable[[str], None] = print) -> str:
    """Return the text of the section."""
    head = ["prompts x images", "seeds' sd, points", "seeds", "worst false alarm, transfer .4"]
    head += [f"found: {transfer:g} at {100 * gain:g}" for gain, transfer in HACKS]
    lines: list[list[str]] = []
    for shape in SHAPES:
        for spread in SPREADS:
            made = lines_of(shape, spread, draws)
            lines += made
            for line in made:
                say(" | ".join(line))
    gained = ", ".join(f"{100 * gain:g}" for gain in HONEST)
    table = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    text = (
        f"`python benchmarks/flag_calibration.py`, {draws:,} rows a cell, in percent. False alarm: the largest share of honest rows with "
        f"the flag, of training gains of {gained} points. Found: hacks, by transfer and training gain in points. \"Other units\": scores "
        "without bounds, in standard deviations of the base's scores between prompts. A point is a hundredth of one there, and all gains "
        "are three times as large."
    )  # fmt: skip
    return "\n".join([text, "", *table, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=6_000)
    parser.add_argument("--print", action="store_true", help="print the table and write no page")
    options = parser.parse_args()
    if not options.print:
        SECTION.check()
    text = page(options.draws)
    if options.print:
        return
    SECTION.write(text)


if __name__ == "__main__":
    main()
