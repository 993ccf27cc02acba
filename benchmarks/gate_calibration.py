"""Measures in simulation what the regression gate promises: false alarms with other seeds, and dead methods that it finds.

    python benchmarks/gate_calibration.py                # the gate's table of docs/statistics.md, written into it: minutes
    python benchmarks/gate_calibration.py --print --draws 200

A draw is a baseline and runs of other seeds. Scores are made as in benchmarks/calibration.py: an image is right where skill of the prompt,
noise of the image and the row's shift exceed a threshold. The four numbers of a row have much of the seeds' shifts in common, as they
are of one adapter, and are drawn independently in all else. Baselines are shaped as the shipped ones; how much of the seeds' variance
is common was set after looking at the shipped board.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from marked_section import DOCS, MarkedSection
from numpy.typing import NDArray

from gpobench.bench.stats import law
from gpobench.bench.stats.law import Noise, SeedSpread, SeedVariance
from gpobench.leaderboards.baseline import read_baseline
from gpobench.leaderboards.baseline_as_runs import runs_of_baseline
from gpobench.leaderboards.change import Changes, Gains, expected_half_widths, holm_along, pool_sides, verdicts
from gpobench.leaderboards.margins import DEFAULT_SHARE
from gpobench.leaderboards.regress import LoadedBaseline, check

Array = NDArray[np.float64]
ROOT = Path(__file__).resolve().parent.parent
SECTION = MarkedSection(DOCS / "statistics.md", "gate_calibration", "<!-- end of the gate -->")
BASE_SHARE = 0.4  # of images that the base gets right
NUMBERS = 4  # of a row
COMMON = 0.75  # of the variance between seeds that the numbers of a row share, as on the shipped board of words


@dataclass(frozen=True)
class Shape:
    """A baseline: its prompts, rows and seeds."""

    prompts: int
    images: int
    gains: tuple[float, ...]  # true gain of each row, in points, rising
    seeds: int  # of a row, new and reported alike
    uneven: tuple[float, ...]  # standard deviation of each row's seeds, in points, where they differ

    @property
    def first_gaining(self) -> int:
        """Return the first row that gains; those before it gain nothing."""
        return next(k for k, gain in enumerate(self.gains) if gain > 0)


SHAPES = {
    "tiny-ocr": Shape(
        328, 2, (0, 0, 0, 0, 1, 1, 2, 2, 5.6, 5.6, 20), 3, (2.5, 1, 4, 1.9, 3.4, 1.3, 2.8, 3.7, 1.6, 3.1, 2.2)
    ),
    "tiny-counting": Shape(
        15, 24, (0, 0, 0, 0, 0, 0, 0, 0, 2, 5, 49), 3, (2.5, 1, 4, 1.9, 3.4, 1.3, 2.8, 3.7, 1.6, 3.1, 2.2)
    ),
    "short": Shape(130, 2, (5, 10), 2, (1, 4)),
}  # fmt: skip
SPREADS = ("0", "1", "4", "uneven, 1 to 4")  # standard deviation of the rows' seeds, in points
MOVE_OF_IMAGES, MOVE_OF_PROMPTS = (0.15, 0.6), (0.1, 0.3)  # how far the least and the most moving row is from the base


@dataclass(frozen=True)
class Side:
    """What the gate sees of one side, the gains over the base of its seeds; arrays (draws, numbers, rows)."""

    mean: Array  # over prompts and seeds
    by_prompt: NDArray[np.float32]  # (..., prompts), over seeds
    spread: SeedSpread
    square: Array  # mean square of the gains of prompts


@dataclass(frozen=True)
class Measured:
    """What the gate did in one cell, in shares; NaN where nothing was told."""

    false_worse: float  # of draws with other seeds, some number is worse
    false_better: float
    told: float  # of rows that gain
    dead_rows: float  # the base's scores in the place of a row with a told gain: some number of it is worse
    dead_numbers: float  # each told number of it is
    idle_rows: float  # a method that moves images as the row does and gains nothing: some number of it is worse
    half_rows: float  # a method with half of the gain

    def cells(self) -> list[str]:
        """Return the numbers in percent."""
        values = [getattr(self, field.name) for field in fields(self)]
        return ["-" if math.isnan(x) else f"{100 * x:.1f}" for x in values]


def side(gains: NDArray[np.float32]) -> Side:
    """Reduce gains (draws, numbers, rows, seeds, prompts) to what the gate sees."""
    seeds, n = gains.shape[-2:]
    by_prompt = gains.mean(-2)
    means = gains.mean(-1, dtype=np.float64)
    off = gains - by_prompt[..., None, :]
    off -= off.mean(-1, keepdims=True)
    residual = np.square(off).sum((-1, -2), dtype=np.float64) / (n * (n - 1) * (seeds - 1))
    spread = SeedSpread(means.var(-1, ddof=1), residual, np.full(gains.shape[2], seeds))
    return Side(means.mean(-1), by_prompt, spread, np.square(gains).mean((-1, -2), dtype=np.float64))


def unmoved(like: Side) -> Side:
    """Return the side of runs that have the base's scores."""
    zero = np.zeros(like.mean.shape)
    return Side(zero, np.zeros_like(like.by_prompt), SeedSpread(zero, zero, like.spread.seeds), zero)


def draw(shape: Shape, spread: str, draws: int, rng: np.random.Generator) -> dict[str, Side]:
    """Simulate the gains that were reported, those of other seeds, and those of methods with none and with half of the gain."""
    from scipy.stats import norm

    single = np.float32
    rows, n, images = len(shape.gains), shape.prompts, shape.images
    threshold = single(-norm.ppf(BASE_SHARE) * math.sqrt(2))
    slope = 100 * float(norm.pdf(norm.ppf(BASE_SHARE))) / math.sqrt(2)  # points for a shift of 1
    sd = shape.uneven if spread.startswith("uneven") else (float(spread),) * rows
    seed_sd = (np.array(sd) / slope).astype(single)[:, None]
    shifts = np.array(
        [(norm.ppf(BASE_SHARE + gain / 100) - norm.ppf(BASE_SHARE)) * math.sqrt(2) for gain in shape.gains]
    ).astype(single)[:, None, None, None]
    normal = lambda *size: rng.standard_normal(size, dtype=single)
    skill, noise = normal(draws, NUMBERS, 1, n), normal(draws, NUMBERS, 1, 1, n, images)
    before = (skill[:, :, 0, :, None] + noise[:, :, 0, 0] > threshold).mean(-1, dtype=single)
    steps = lambda ends: np.linspace(*ends, rows, dtype=single)
    prompt_move, image_move = steps(MOVE_OF_PROMPTS)[:, None], steps(MOVE_OF_IMAGES)[:, None, None, None]
    moved_skill = np.sqrt(1 - prompt_move**2) * skill + prompt_move * normal(draws, NUMBERS, rows, n)

    def train(share: float, first: int = 0) -> Side:
        """Return the gains of rows from this one on."""
        latent = normal(draws, NUMBERS, rows - first, shape.seeds, n, images)
        latent *= image_move[first:]
        latent += np.sqrt(1 - image_move[first:] ** 2) * noise
        latent *= np.sqrt(np.maximum(1 - seed_sd[first:] ** 2, 0))[..., None, None]
        latent += moved_skill[:, :, first:, None, :, None]
        common = normal(draws, 1, rows - first, shape.seeds)
        own = normal(draws, NUMBERS, rows - first, shape.seeds)
        seed_shift = seed_sd[first:] * (math.sqrt(COMMON) * common + math.sqrt(1 - COMMON) * own)
        latent += seed_shift[..., None, None] + share * shifts[first:]
        return side((latent > threshold).mean(-1, dtype=single) - before[:, :, None, None, :])

    first = shape.first_gaining
    return {"reported": train(1.0), "other seeds": train(1.0), "none": train(0.0, first), "half": train(0.5, first)}


def told(reported: Side) -> NDArray[np.bool_]:
    """Return where a reported gain is above 0 by the test of the tables, Holm over the rows."""
    variance = law.moderate(reported.spread)
    noise = _noise(reported.by_prompt, variance, int(reported.spread.seeds[0]))
    p = holm_along(noise.p(reported.mean))
    return (p < 0.05) & (reported.mean > 0)


def margins(reported: Side) -> Array:
    """Return the default margins."""
    variance = law.moderate(reported.spread)
    repeat = expected_half_widths(variance, reported.spread.seeds.astype(float))
    return np.maximum(DEFAULT_SHARE * np.abs(reported.mean), np.maximum(repeat, 1e-4))


def compare(reported: Side, new: Side, told_gains: NDArray[np.bool_]) -> Changes:
    """Return the changes that the gate sees, arrays (draws, numbers of all rows)."""
    both = lambda pick: np.stack([pick(new), pick(reported)], axis=-1)
    seeds = reported.spread.seeds
    pooled = pool_sides(
        SeedSpread(both(lambda s: s.spread.variance), both(lambda s: s.spread.residual), np.stack([seeds] * 2, -1))
    )
    variance, count = law.moderate(pooled), int(seeds[0])
    shared = replace(variance, lent=np.ones(variance.lent.shape, bool))
    change = _noise(new.by_prompt - reported.by_prompt, shared, count, count)
    gain = _noise(new.by_prompt, variance, count)
    moved = np.sqrt(new.square / np.maximum(reported.square, 1e-12))
    flat = lambda x: np.asarray(x).reshape(len(x), -1)
    flat_noise = lambda noise: Noise(*(flat(getattr(noise, part.name)) for part in fields(Noise)))
    every = np.ones(flat(new.mean).shape, bool)
    gains = Gains(flat(told_gains), flat(new.mean), flat_noise(gain), flat(moved))
    return Changes(flat(new.mean - reported.mean), flat_noise(change), every, every, ~every, gains)


def _noise(by_prompt: NDArray[np.float32], variance: SeedVariance, *seeds: int) -> Noise:
    n = by_prompt.shape[-1]
    mean_variance = by_prompt.var(-1, ddof=1, dtype=np.float64) / n
    return law.contrast_noise(mean_variance, np.array(float(n - 1)), [(variance, count) for count in seeds])


def measure(shape: Shape, spread: str, draws: int, rng: np.random.Generator) -> Measured:
    """Measure the gate in one cell, in chunks of memory."""
    size = NUMBERS * len(shape.gains) * shape.seeds * shape.prompts * shape.images
    chunk = max(1, 6_000_000 // size)
    counts = np.zeros((7, 2))
    for start in range(0, draws, chunk):
        counts += _measure_chunk(shape, draw(shape, spread, min(chunk, draws - start), rng))
    return Measured(*(counted / total if total else math.nan for counted, total in counts.tolist()))


def _measure_chunk(shape: Shape, sides: dict[str, Side]) -> Array:
    """Return how often each thing of `Measured` happened, and of how many, (7, 2)."""
    reported, rows = sides["reported"], len(shape.gains)
    told_gains, chosen = told(reported), margins(reported)
    flat_margins = chosen.reshape(len(chosen), -1)
    still = verdicts(compare(reported, sides["other seeds"], told_gains), flat_margins)
    counts = [[(still == word).any(-1).sum(), len(still)] for word in ("worse", "better")]
    told_rows = told_gains.any(1)  # (draws, rows)
    first = shape.first_gaining
    counts.append([told_rows[:, first:].sum(), told_rows[:, first:].size])
    by_kind = {"dead": np.zeros((2, 2)), "none": np.zeros((2, 2)), "half": np.zeros((2, 2))}
    replaced = {"dead": unmoved(sides["none"]), "none": sides["none"], "half": sides["half"]}
    for row in range(first, rows):
        draws = told_rows[:, row]
        if not draws.any():
            continue
        told_numbers = told_gains[draws, :, row]
        for kind, other in replaced.items():
            mixed = _with_row(sides["other seeds"], row, other, row - first)
            changes = compare(_select(reported, draws), _select(mixed, draws), told_gains[draws])
            worse = (verdicts(changes, flat_margins[draws]) == "worse").reshape(-1, NUMBERS, rows)[:, :, row]
            by_kind[kind] += [
                [worse.any(-1).sum(), len(worse)],
                [(worse & told_numbers).sum(), told_numbers.sum()],
            ]
    return np.array([*counts, *by_kind["dead"], by_kind["none"][0], by_kind["half"][0]], np.float64)


def _with_row(side: Side, row: int, other: Side, place: int) -> Side:
    """Return a side with one row of another side, which has it at that place."""

    def mix(ours: NDArray[np.floating], theirs: NDArray[np.floating], axis: int = -1) -> NDArray[np.floating]:
        mixed = np.moveaxis(ours.copy(), axis, 0)
        mixed[row] = np.moveaxis(theirs, axis, 0)[place]
        return np.moveaxis(mixed, 0, axis)

    spread = SeedSpread(
        mix(side.spread.variance, other.spread.variance),
        mix(side.spread.residual, other.spread.residual),
        side.spread.seeds,
    )
    by_prompt = mix(side.by_prompt, other.by_prompt, -2)
    return Side(mix(side.mean, other.mean), by_prompt, spread, mix(side.square, other.square))


def _select(side: Side, draws: NDArray[np.bool_]) -> Side:
    spread = SeedSpread(side.spread.variance[draws], side.spread.residual[draws], side.spread.seeds)
    return Side(side.mean[draws], side.by_prompt[draws], spread, side.square[draws])


# The shipped baselines


def dead_rows(path: Path) -> dict[str, bool]:
    """Return of each row with a told gain whether the gate calls it worse with the base's scores in its place."""
    against = LoadedBaseline(path, *read_baseline(path))
    runs = runs_of_baseline(against)
    found: dict[str, bool] = {}
    for claim in against.baseline.row:
        if not any(number.told for number in claim.number):
            continue
        dead = [replace(run, after=run.before) if run.record.method == claim.method else run for run in runs]
        told = {number.key for number in claim.number if number.told}
        worse = {f.key for f in check(against, dead).findings if f.row == claim.label and f.verdict == "worse"}
        found[claim.label] = told <= worse
    return found


def shipped() -> list[str]:
    """Return a line for each shipped baseline: how many dead rows the gate finds."""
    lines = ["baseline", "rows", "rows with a told gain", "of them worse in every told number with the base's scores"]
    table = [lines, ["---"] * len(lines)]
    for name in SHAPES:
        path = ROOT / "leaderboards" / f"{name}.toml"
        found, rows = dead_rows(path), len(read_baseline(path)[0].row) - 1
        table.append([name, str(rows), str(len(found)), str(sum(found.values()))])
    return [f"| {' | '.join(line)} |" for line in table]


# The page

HEAD = [
    "baseline", "seeds' sd, points", "worse, nothing changed", "better, nothing changed", "gaining rows told",
    "dead rows worse", "their told numbers worse", "idle rows worse", "half-dead rows worse",
]  # fmt: skip


def page(draws: int) -> str:
    """Return the text between the markers of docs/statistics.md."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for name, shape in SHAPES.items():
        for spread in SPREADS:
            measured = measure(shape, spread, draws, np.random.default_rng([len(name), len(spread)]))
            lines.append([name, spread, *measured.cells()])
            print(" | ".join(lines[-1]), flush=True)
    table = [f"| {' | '.join(line)} |" for line in lines]
    first = f"`python benchmarks/gate_calibration.py`, {draws:,} draws a cell, in percent."
    return "\n".join([first, "", *table, "", "The shipped baselines:", "", *shipped(), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--print", action="store_true", help="print the table and write no page")
    options = parser.parse_args()
    if not options.print:
        SECTION.check()
    text = page(options.draws)
    if options.print:
        print(text)
        return
    SECTION.write(text)


if __name__ == "__main__":
    main()
