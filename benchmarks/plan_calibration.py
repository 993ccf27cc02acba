"""Measures in simulation what `gpobench plan` and `gpobench compare --until-told` promise, and writes it into docs/statistics.md.

    python benchmarks/plan_calibration.py                # tens of minutes
    python benchmarks/plan_calibration.py --print --draws 200 --boards 20

Boards are drawn from the model of bench/stats/law.py: rows share prompts, and differ in what a prompt makes of them, in what is left and
in how far their seeds lie apart. Standard deviations are near those of the shipped board on ocr; means were not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from marked_section import DOCS, MarkedSection
from numpy.typing import NDArray

from gpobench.bench.stats import law, planning
from gpobench.bench.stats.intervals import Contrast, crossed, table_spreads
from gpobench.bench.stats.law import SeedSpread
from gpobench.bench.stats.planning import BASE, Design
from gpobench.bench.stats.sequential import look_p
from gpobench.leaderboards.baseline import read_baseline
from gpobench.leaderboards.pilot import Question, baseline_pilot

Array = NDArray[np.float64]
ROOT = Path(__file__).resolve().parent.parent
SECTION = MarkedSection(DOCS / "statistics.md", "plan_calibration", "<!-- end of the simulation of plans -->")
ROWS, PROMPTS, CAP = 11, 328, 10
# Points: what a prompt makes of each method, and what is left.
PROMPT_SD, RESIDUAL_SD = np.linspace(8, 28, ROWS), np.linspace(12, 34, ROWS)
SHARED = 0.3  # correlation of what a prompt makes of two methods
SPREADS: dict[str, Array] = {  # standard deviation of each row's seeds in points
    "0": np.zeros(ROWS),
    "1": np.ones(ROWS),
    "4": np.full(ROWS, 4.0),
    "uneven, 1 to 4": np.array([2.5, 1.0, 4.0, 1.9, 3.4, 1.3, 2.8, 3.7, 1.6, 3.1, 2.2]),
}


# Told pairs


@dataclass(frozen=True)
class Band:
    """How the predicted band of told pairs and the number told agree over boards."""

    covered: float
    fewer: float  # boards that told fewer than the band
    more: float
    width: float  # of the band
    predicted: float
    told: float


def draw_board(spread: Array, seeds: int, prompts: int, rng: np.random.Generator) -> dict[str, list[Array]]:
    """Draw the gains of every row's seeds by prompt; true gains are Student's with 4 degrees of freedom around 2 points."""
    gains = 2 + 2 * rng.standard_t(4, ROWS)
    common = rng.standard_normal(prompts)
    board: dict[str, list[Array]] = {}
    for r in range(ROWS):
        own = PROMPT_SD[r] * (np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * rng.standard_normal(prompts))
        shifts = gains[r] + spread[r] * rng.standard_normal(seeds)
        board[f"row {r}"] = [(s + own + RESIDUAL_SD[r] * rng.standard_normal(prompts)) / 100 for s in shifts]
    return board


def told_pairs(board: Mapping[str, Sequence[Array]]) -> int:
    """Count the pairs that a table of these rows and the base tells apart."""
    spreads = table_spreads(board)
    contrasts = [
        Contrast(board[a], test=True, spreads=[spreads[a]])
        if b == BASE
        else Contrast(board[a], board[b], test=True, spreads=[spreads[a], spreads[b]])
        for a, b in planning.all_pairs(list(board))
    ]
    return int(planning.count_told(np.array([[e.p for e in crossed(contrasts)]], np.float64))[0])


def band_coverage(spread: Array, pilot: int, seeds: int, boards: int, rng: np.random.Generator) -> Band:
    """Predict the told pairs of boards from their first seeds, and count them."""
    found: list[tuple[float, ...]] = []
    for _ in range(boards):
        board = draw_board(spread, seeds, PROMPTS, rng)
        components = planning.estimate_components({label: gains[:pilot] for label, gains in board.items()}, 2)
        family = planning.all_pairs(components.labels)
        band = planning.predict_told(components, Design(seeds, 2, PROMPTS), family, draws=200)
        told = told_pairs(board)
        found.append(
            (
                band.low <= told <= band.high,
                told < band.low,
                told > band.high,
                band.high - band.low,
                band.expected,
                told,
            )
        )
    return Band(*(float(x) for x in np.mean(found, axis=0)))


def shipped_bands() -> list[list[str]]:
    """Return the shipped boards' told pairs, and those predicted from some of their seeds."""
    lines: list[list[str]] = []
    for name, key in (
        ("tiny-ocr", "reader/exact"),
        ("tiny-ocr", "reader/soft"),
        ("tiny-counting", "geneval-shapes/correct"),
    ):
        path = ROOT / "leaderboards" / f"{name}.toml"
        baseline, scores = read_baseline(path)
        labels = [claim.label for claim in baseline.row if claim.label != BASE]
        base = scores.by[BASE, key][0]
        gains = {label: [seed - base for seed in scores.by[label, key]] for label in labels}
        told = told_pairs(gains)
        lent = baseline_pilot(Question(labels, baseline.task, baseline.model, key), path).components
        for seeds in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
            library = {
                label: planning.LentSpread(float(lent.seeds[k]), 5.4, float(lent.residual[k]))
                for k, label in enumerate(lent.labels)
            }
            some = {label: [gains[label][s] for s in seeds] for label in labels}
            components = planning.estimate_components(some, 2, scores.strata, library)
            family = planning.all_pairs(components.labels)
            band = planning.predict_told(components, Design(3, 2, components.prompts), family)
            inside = "yes" if band.low <= told <= band.high else "no"
            numbers = ", ".join(map(str, seeds))
            lines.append([name, key, numbers, f"{band.expected:.0f} [{band.low}, {band.high}]", str(told), inside])
            print(" | ".join(lines[-1]), flush=True)
    return lines


# Sequential stopping


@dataclass(frozen=True)
class Looks:
    """What a rule did over tables; arrays (tables, pairs)."""

    told: NDArray[np.bool_]
    seeds: NDArray[np.int64]  # at which a pair was told, else CAP


Rule = Callable[[Array, Array, int, int], Array]  # fixed-sample p, ratio, seeds of the first look, seeds -> p


def fixed_sample(p: Array, ratio: Array, first: int, seeds: int) -> Array:
    """Return the p of each look as it is: no rule at all."""
    return p


def bonferroni(p: Array, ratio: Array, first: int, seeds: int) -> Array:
    """Return p times the number of looks up to the cap."""
    return np.minimum(p * (CAP - first + 1), 1.0)


def mixture(p: Array, ratio: Array, first: int, seeds: int) -> Array:
    """Return the p of a normal-mixture confidence sequence (Robbins 1970; `confseq` has the same bound)."""
    from scipy.special import ndtri

    z = ndtri(np.maximum(p, 1e-300) / 2)
    weight = 4 * (1 + ratio / first) / (1 + ratio / seeds)  # prior variance times information
    return np.minimum(np.sqrt(1 + weight) * np.exp(-z * z / 2 * weight / (1 + weight)), 1.0)


RULES: dict[str, Rule] = {
    "none, 5 % at every look": fixed_sample, "Bonferroni over looks": bonferroni, "confidence sequence": mixture,
    "alpha spending": look_p,
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """Tables whose pairs are looked at; a row of -1 is the base."""

    spread: Array
    pairs: Sequence[tuple[int, int]]
    shift: float = 0.0  # points, of the first row of the first pair
    first: int = 2


def look(scene: Scene, rule: Rule, draws: int, rng: np.random.Generator, only: int = 0) -> Looks:
    """Add seeds to the rows of untold pairs, look by look, as `compare --until-told` does; only: one look at so many seeds."""
    residual, prompt = RESIDUAL_SD**2 / PROMPTS, PROMPT_SD**2 / PROMPTS
    common = np.sqrt(SHARED) * rng.standard_normal((draws, 1))
    effect = np.sqrt(prompt) * (common + np.sqrt(1 - SHARED) * rng.standard_normal((draws, ROWS)))
    effect[:, scene.pairs[0][0]] += scene.shift
    every = np.sqrt(scene.spread**2 + residual)[:, None] * rng.standard_normal((draws, ROWS, CAP))
    known = rng.chisquare(PROMPTS - 1, (len(scene.pairs), draws)) / (PROMPTS - 1)
    told = np.zeros((draws, len(scene.pairs)), bool)
    at, best, seeds = np.full(told.shape, CAP), np.ones(told.shape), np.full((draws, ROWS), scene.first)
    for count in [only] if only else range(scene.first, CAP + 1):
        for k, pair in enumerate(scene.pairs):
            for row in (r for r in pair if r >= 0):
                seeds[:, row] = np.where(told[:, k], seeds[:, row], count)
        if only:
            seeds[:] = count
        within = np.arange(CAP) < seeds[..., None]
        mean = (every * within).sum(2) / seeds
        variance = (np.square(every - mean[..., None]) * within).sum(2) / (seeds - 1)
        moderated = law.moderate(SeedSpread(variance, np.broadcast_to(residual, variance.shape), seeds))
        p, ratio = np.empty(told.shape), np.empty(told.shape)
        for k, (i, j) in enumerate(scene.pairs):
            rows = [r for r in (i, j) if r >= 0]
            of_prompts = sum(prompt[r] for r in rows) - (len(rows) > 1) * 2 * SHARED * np.sqrt(prompt[i] * prompt[j])
            observed = (of_prompts + sum(residual[r] / seeds[:, r] for r in rows)) * known[k]
            sides = [(moderated.row(r), seeds[:, r]) for r in rows]
            noise = law.contrast_noise(observed, np.array(PROMPTS - 1.0), sides)  # type: ignore[arg-type]
            total = effect + mean
            p[:, k] = noise.p(total[:, i] - (total[:, j] if j >= 0 else 0.0))
            ratio[:, k] = noise.seeds * count / np.maximum(noise.prompts, 1e-9)
        best = np.minimum(best, np.where(told, best, rule(p, ratio, scene.first, count)))
        now = (holm_table(best) < 0.05) & ~told
        at[now], told = count, told | now
    return Looks(told, at)


def holm_table(p: Array) -> Array:
    """Return Holm's p of each table, p (tables, pairs)."""
    order = np.argsort(p, axis=1)
    adjusted = np.maximum.accumulate(np.take_along_axis(p, order, 1) * np.arange(p.shape[1], 0, -1), axis=1)
    out = np.empty_like(p)
    np.put_along_axis(out, order, np.minimum(adjusted, 1.0), 1)
    return out


FAMILIES = {
    "one pair": [(2, 6)],
    "three pairs": [(0, 5), (0, 10), (5, 10)],
    "11 rows and the base": [(r, -1) for r in range(ROWS)],
}
SHIFTS = {"0": 5.0, "1": 5.0, "4": 8.0, "uneven, 1 to 4": 6.0}  # points, of the power


def error_lines(draws: int) -> list[list[str]]:
    """Return for every spread and rule how often some equal pair is told at some look, in percent."""
    lines: list[list[str]] = []
    for name, spread in SPREADS.items():
        for label, rule in RULES.items():
            rates = [
                look(Scene(spread, pairs), rule, draws, np.random.default_rng(7)).told.any(1).mean()
                for pairs in FAMILIES.values()
            ]
            lines.append([name, label, *(f"{100 * rate:.1f}" for rate in rates)])
            print(" | ".join(lines[-1]), flush=True)
    return lines


def power_lines(draws: int) -> list[list[str]]:
    """Return for every spread and rule how often a true difference is told and the mean number of seeds, beside fixed numbers."""
    lines: list[list[str]] = []
    for name, spread in SPREADS.items():
        scene = Scene(spread, [(5, 6)], shift=SHIFTS[name])
        fixed = {
            n: float(look(scene, fixed_sample, draws, np.random.default_rng(8), n).told.mean())
            for n in range(2, CAP + 1)
        }
        for label, rule in list(RULES.items())[1:]:
            seen = look(scene, rule, draws, np.random.default_rng(8))
            power, mean = float(seen.told.mean()), float(seen.seeds.mean())
            same = next((str(n) for n, of_n in fixed.items() if of_n >= power), f"above {CAP}")
            lines.append([name, f"{scene.shift:g}", label, f"{100 * power:.0f}", f"{mean:.1f}", same])
            print(" | ".join(lines[-1]), flush=True)
    return lines


# The page


def band_lines(boards: int) -> list[list[str]]:
    """Return for every spread how the band of told pairs covers."""
    lines: list[list[str]] = []
    for name, spread in SPREADS.items():
        for pilot, seeds in ((2, 3), (3, 5)):
            b = band_coverage(spread, pilot, seeds, boards, np.random.default_rng(5))
            shares = [f"{100 * share:.0f}" for share in (b.covered, b.fewer, b.more)]
            lines.append(
                [name, str(pilot), str(seeds), *shares, f"{b.width:.1f}", f"{b.predicted:.1f}", f"{b.told:.1f}"]
            )
            print(" | ".join(lines[-1]), flush=True)
    return lines


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def page(draws: int, boards: int) -> str:
    """Return the text between the markers of docs/statistics.md."""
    of_bands = [
        "seeds' sd, points",
        "pilot's seeds",
        "seeds",
        "in the band",
        "fewer",
        "more",
        "width",
        "predicted",
        "told",
    ]
    of_errors = ["seeds' sd, points", "rule", *FAMILIES]
    of_power = ["seeds' sd, points", "difference", "rule", "told, %", "mean seeds", "fixed seeds of that power"]
    return "\n".join(
        [
            f"`python benchmarks/plan_calibration.py --draws {draws} --boards {boards}`.",
            "",
            f"**Told pairs of 66**, {boards} boards a line; band of 90 %, shares in percent:",
            "",
            *_markdown(of_bands, band_lines(boards)),
            "",
            "**The shipped boards**, three seeds, predicted from some of their seeds:",
            "",
            *_markdown(["board", "key", "pilot's seeds", "predicted", "told", "in the band"], shipped_bands()),
            "",
            f"**Some equal pair is told at some look**, 2 to {CAP} seeds, in percent of {draws:,} tables:",
            "",
            *_markdown(of_errors, error_lines(draws)),
            "",
            f"**A true difference of one pair**, 2 to {CAP} seeds, {draws:,} tables:",
            "",
            *_markdown(of_power, power_lines(draws)),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2_000, help="tables a line of the sequential rule")
    parser.add_argument("--boards", type=int, default=400, help="boards a line of the told pairs")
    parser.add_argument("--print", action="store_true", help="print the tables and write no page")
    options = parser.parse_args()
    if not options.print:
        SECTION.check()
    text = page(options.draws, options.boards)
    if options.print:
        print(text)
        return
    SECTION.write(text)


if __name__ == "__main__":
    main()
