"""Measures in simulation what the law of bench/stats/law.py promises: coverage, family-wise error, and power at the printed MDE.

    python benchmarks/calibration.py                # the table of docs/statistics.md, written into it: minutes
    python benchmarks/calibration.py --print --draws 200

A draw is a table of eleven rows that equal the base. An image is right where skill of the prompt, noise of the image and the row's shift
exceed a threshold; rows share prompts, noise and base, differ in how far they move images, and have seeds that shift them. Variances
are near those of the shipped board on ocr (328 prompts, two images; variances were read for this, means were not).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from marked_section import DOCS, MarkedSection
from numpy.typing import NDArray

from gpobench.bench.stats import law
from gpobench.bench.stats.intervals import Contrast, crossed, table_spreads
from gpobench.bench.stats.law import Noise, SeedSpread, SeedVariance

Array = NDArray[np.float64]
SECTION = MarkedSection(DOCS / "statistics.md", "calibration")
BASE_SHARE = 0.375  # of images that the base gets right
ROWS = 11
# How far each row moves its images from the base's, and its prompts from the base's order, both from 0 to 1.
IMAGE_MOVES = np.array([0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.35, 0.3, 0.45, 0.5, 0.6])
PROMPT_MOVES = np.array([0.1, 0.1, 0.1, 0.15, 0.15, 0.3, 0.2, 0.2, 0.25, 0.25, 0.3])
SPREADS: dict[str, Array] = {  # standard deviation of each row's seeds in points
    "0": np.zeros(ROWS),
    "1": np.ones(ROWS),
    "4": np.full(ROWS, 4.0),
    "uneven, 1 to 4": np.array([2.5, 1.0, 4.0, 1.9, 3.4, 1.3, 2.8, 3.7, 1.6, 3.1, 2.2]),
    "uneven, as shipped": np.array([0.9, 0.0, 1.2, 0.3, 1.65, 0.83, 0.0, 1.4, 0.5, 1.0, 0.7]),
    "one row 4, the others 1": np.array([1.0] * 5 + [4.0] + [1.0] * 5),
}
IMAGES = {15: 24, 130: 2, 328: 2, 553: 1}  # of a prompt
GPO_ROW, GPO_GAIN = 5, 5.6  # points


@dataclass(frozen=True)
class Cell:
    """One setting of the simulation."""

    prompts: int
    spread: str  # of SPREADS
    seeds: tuple[int, ...]  # of each row
    strata: int = 1
    gain: float = 0.0  # of row GPO_ROW, in points

    @property
    def most_seeds(self) -> int:
        """Return the seeds of the row with most."""
        return max(self.seeds)


@dataclass(frozen=True)
class Statistics:
    """What a law sees of each draw."""

    mean: Array  # (draws, rows)
    covariance: Array  # (draws, rows, rows) of the means over prompts, seeds averaged first
    spread: SeedSpread  # (draws, rows)
    prompt_df: int

    def pair_variance(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> Array:
        """Return the variance of the difference of the rows i and j due to prompts, (draws, pairs)."""
        observed = np.einsum("drr->dr", self.covariance)
        return observed[:, i] + observed[:, j] - 2 * self.covariance[:, i, j]


@dataclass(frozen=True)
class Tests:
    """A law's tests of each draw: every row against the base, and every pair of rows."""

    p: Array  # (draws, rows)
    p_pairs: Array  # (draws, pairs)
    reject: Callable[[Array], Array]  # differences (draws, rows) -> whether the test of each row rejects, at 5 %
    mde: Array | None = None  # (rows,), the mean over draws


@dataclass(frozen=True)
class Measured:
    """What a law did in one cell, in shares of the draws."""

    coverage: float
    worst_coverage: float  # of the row that is covered least
    family_error_base: float  # some row differs from the base, Holm over the rows
    family_error_pairs: float  # some two rows or the base differ, Holm over all pairs
    power_at_mde: float
    power_gpo: float = math.nan


def gains(cell: Cell, draws: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Simulate gains over the base, (draws, rows, seeds, prompts), a prompt's images averaged."""
    before, after = right_images(cell, draws, rng)
    return after.mean(-1, dtype=np.float32) - before.mean(-1, dtype=np.float32)[:, :, None, :]


def right_images(cell: Cell, draws: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Simulate which images are right: of the base (draws, 1, prompts, images), of the rows (draws, rows, seeds, prompts, images)."""
    from scipy.stats import norm

    single = np.float32
    n, images, seeds = cell.prompts, IMAGES.get(cell.prompts, 2), cell.most_seeds
    # Skill and noise have variance 1 each.
    threshold = single(-norm.ppf(BASE_SHARE) * math.sqrt(2))
    slope = 100 * float(norm.pdf(norm.ppf(BASE_SHARE))) / math.sqrt(2)  # points for a shift of 1
    seed_sd = (SPREADS[cell.spread] / slope).astype(single)[None, :, None]
    shift = np.zeros((1, ROWS, 1), single)
    shift[0, GPO_ROW] = cell.gain / slope
    normal = lambda *shape: rng.standard_normal(shape, dtype=single)
    skill, noise = normal(draws, 1, n), normal(draws, 1, 1, n, images)
    prompt_move = PROMPT_MOVES.astype(single)[None, :, None]
    moved_skill = np.sqrt(1 - prompt_move**2) * skill + prompt_move * normal(draws, ROWS, n)
    image_move = IMAGE_MOVES.astype(single)[None, :, None, None, None]
    latent = normal(draws, ROWS, seeds, n, images)
    latent *= image_move
    latent += np.sqrt(1 - image_move**2) * noise
    # The spread of seeds is part of the noise's variance, so that equal rows have the base's share of right images.
    latent *= np.sqrt(1 - seed_sd**2)[..., None, None]
    latent += moved_skill[:, :, None, :, None]
    latent += (seed_sd * normal(draws, ROWS, seeds) + shift)[..., None, None]
    return skill[..., None] + noise[:, 0] > threshold, latent > threshold


def statistics(made: NDArray[np.float32], seeds: Sequence[int], strata: int) -> Statistics:
    """Reduce simulated gains to what the law sees. strata: equal parts of the prompts."""
    draws, rows, _, n = made.shape
    by_row = [made[:, r, : seeds[r]] for r in range(rows)]
    averaged = np.stack([x.mean(1) for x in by_row], axis=1)  # (draws, rows, prompts)
    covariance = np.zeros((draws, rows, rows))
    residual = np.full((draws, rows), np.nan)
    for r in range(rows):
        residual[:, r] = 0.0 if seeds[r] > 1 else np.nan
    for part in np.array_split(np.arange(n), strata):
        centered = averaged[..., part] - averaged[..., part].mean(-1, keepdims=True)
        scale = len(part) * (len(part) - 1) * strata**2
        covariance += np.matmul(centered, centered.transpose(0, 2, 1)) / scale
        for r, x in enumerate(by_row):
            if seeds[r] > 1:
                off = x[..., part] - averaged[:, r, None][..., part]
                off = off - off.mean(-1, keepdims=True)
                residual[:, r] += np.square(off).sum((1, 2)) / scale / (seeds[r] - 1)
    parts = np.array_split(np.arange(n), strata)
    seed_means = [np.mean([x[..., part].mean(-1) for part in parts], axis=0) for x in by_row]  # (draws, seeds)
    variance = np.stack([m.var(-1, ddof=1) if m.shape[1] > 1 else np.full(draws, np.nan) for m in seed_means], axis=1)
    mean = np.stack([m.mean(-1) for m in seed_means], axis=1)
    spread = SeedSpread(variance.astype(np.float64), residual, np.array(seeds))
    return Statistics(mean.astype(np.float64), covariance, spread, n - strata)


def draw(cell: Cell, draws: int, seeds: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Statistics]:
    """Simulate tables of a cell, in chunks of memory, and reduce them for each of several numbers of seeds of the rows."""
    size = ROWS * cell.most_seeds * cell.prompts * IMAGES.get(cell.prompts, 2)
    chunk = max(1, 8_000_000 // size)
    parts: list[list[Statistics]] = []
    for start in range(0, draws, chunk):
        made = gains(cell, min(chunk, draws - start), rng)
        parts.append([statistics(made, s, cell.strata) for s in seeds])
    joined: list[Statistics] = []
    for k, s in enumerate(seeds):
        observed = [part[k] for part in parts]
        together = lambda pick, observed=observed: np.concatenate([pick(x) for x in observed])
        spread = SeedSpread(together(lambda x: x.spread.variance), together(lambda x: x.spread.residual), np.array(s))
        joined.append(
            Statistics(together(lambda x: x.mean), together(lambda x: x.covariance), spread, observed[0].prompt_df)
        )
    return joined


# Laws


def guarded(x: Statistics) -> Tests:
    """The law of the tables."""
    return _tests(x, law.moderate(x.spread), lambda noise: noise, once=True)


def moderated(x: Statistics) -> Tests:
    """limma: the same without the guards, by Student's t at Welch-Satterthwaite degrees of freedom."""
    shown, observed_df = x.spread, x.spread.seeds - 1.0
    observed = np.maximum(shown.variance, 1e-3 * shown.residual)
    prior, prior_df = law.fit_prior(
        observed, np.broadcast_to(observed_df, observed.shape), np.ones(observed.shape, bool), widening=0.0
    )
    df = np.broadcast_to(prior_df + observed_df, observed.shape)
    squeezed = (prior_df * prior + observed_df * observed) / (prior_df + observed_df)
    return _tests(x, SeedVariance(squeezed, shown.residual, df, np.zeros(observed.shape, bool)), _student, once=True)


def welch(x: Statistics) -> Tests:
    """Each row's own variance, by Student's t at Welch-Satterthwaite degrees of freedom; the residual once."""
    return _tests(x, _own(x), _student, once=True)


def former(x: Statistics) -> Tests:
    """What tables did before: the residual twice; against the base Student's draws added, between rows Welch-Satterthwaite."""
    return _tests(x, _own(x), lambda noise: noise, once=False, between=_student)


def _own(x: Statistics) -> SeedVariance:
    df = np.broadcast_to(x.spread.seeds - 1.0, x.spread.variance.shape)
    return SeedVariance(x.spread.variance, x.spread.residual, df, np.zeros(df.shape, bool))


def _student(noise: Noise) -> Noise:
    """Return the noise of a single chi-square with the same variance, at Welch-Satterthwaite degrees of freedom."""
    df = law.welch_df([noise.prompts, noise.seeds], [noise.prompt_df, noise.seed_df])
    return Noise(noise.prompts + noise.seeds, df, np.zeros(df.shape), np.ones(df.shape))


def _tests(
    x: Statistics,
    variance: SeedVariance,
    form: Callable[[Noise], Noise],
    once: bool,
    between: Callable[[Noise], Noise] | None = None,
) -> Tests:
    """Return the tests of a law.

    Args:
        x: of the draws.
        variance: between seeds, by the law.
        form: how the two parts of the noise are put together.
        once: whether the residual is counted once.
        between: as form, of pairs of rows; None for the same.
    """
    if not once:
        variance = replace(variance, residual=np.zeros(variance.residual.shape))
    seeds = x.spread.seeds
    df = np.array(float(x.prompt_df))
    each = [law.contrast_noise(x.covariance[:, r, r], df, [(variance.row(r), int(seeds[r]))]) for r in range(ROWS)]
    stacked = Noise(*(np.stack([getattr(n, part) for n in each], axis=1) for part in PARTS))
    noise = form(stacked)
    i, j = np.triu_indices(ROWS, 1)
    shared = x.pair_variance(i, j)
    both = [
        law.contrast_noise(shared[:, k], df, [(variance.row(a), int(seeds[a])), (variance.row(b), int(seeds[b]))])
        for k, (a, b) in enumerate(zip(i, j, strict=True))
    ]
    pairs = (between or form)(Noise(*(np.stack([getattr(n, part) for n in both], axis=1) for part in PARTS)))
    few = form(Noise(*(getattr(stacked, part)[:300] for part in PARTS)))
    return Tests(
        noise.p(x.mean),
        pairs.p(x.mean[:, i] - x.mean[:, j]),
        lambda difference: noise.p(difference) < 0.05,
        np.nanmean(few.mde(), axis=0),
    )


PARTS = ("prompts", "prompt_df", "seeds", "seed_df")
LAWS: dict[str, Callable[[Statistics], Tests]] = {
    "former": former, "Welch-Satterthwaite": welch, "moderated": moderated, "guarded": guarded,
}  # fmt: skip


def measure(x: Statistics, by: Callable[[Statistics], Tests]) -> Measured:
    """Measure a law on draws of equal rows."""
    tests = by(x)
    coverage = 1 - (tests.p < 0.05).mean(0)
    power = float(tests.reject(x.mean + tests.mde).mean()) if tests.mde is not None else math.nan
    return Measured(
        coverage=float(coverage.mean()),
        worst_coverage=float(coverage.min()),
        family_error_base=_family_error(tests.p),
        family_error_pairs=_family_error(np.concatenate([tests.p, tests.p_pairs], axis=1)),
        power_at_mde=power,
    )


def gpo_power(x: Statistics, by: Callable[[Statistics], Tests]) -> float:
    """Measure how often a row with GPO's gain is told from the base after Holm over the rows, the other rows being equal to it."""
    p = by(x).p
    return float(np.mean([law.holm(line)[GPO_ROW] < 0.05 for line in p.tolist()]))


def _family_error(p: Array) -> float:
    """Holm rejects some hypothesis exactly where the smallest p passes Bonferroni's bound."""
    return float((p.min(-1) * p.shape[-1] < 0.05).mean())


# Shares near 0 and 1


def share_coverage(prompts: int, images: int, share: float, draws: int, rng: np.random.Generator) -> float:
    """Measure the coverage of one evaluation's interval: prompts' shares are Beta with that mean, images of a prompt alike."""
    concentration = 2.0
    chance = rng.beta(concentration * share, concentration * (1 - share), (draws, prompts, 1))
    right = (rng.random((draws, prompts, images)) < chance).astype(float)
    estimates = crossed([Contrast([table], share=True) for table in right])  # `mean_ci` of each
    return float(np.mean([e.low <= share <= e.high for e in estimates]))


# Missing scores


def coverage_with_gaps(cell: Cell, draws: int, rng: np.random.Generator, gaps: float = 0.02) -> tuple[float, float]:
    """Measure the law where scores are missing: coverage of the rows' gains, and how often some row is told from the base (Holm).

    A share of the images of every evaluation has no score, and one whole prompt under every seed of every row. These tables go
    through the functions that make one, which leave out an image that any seed of a row lacks.
    """
    covered: list[bool] = []
    told = 0
    for _ in range(draws):
        before, after = (x[0].astype(float) for x in right_images(cell, 1, rng))
        for scores in (before, after):
            scores[rng.random(scores.shape) < gaps] = math.nan
        after[..., int(rng.integers(cell.prompts)), :] = math.nan
        rows = {str(r): list(after[r, : cell.seeds[r]] - before[0]) for r in range(ROWS)}
        spreads = table_spreads(rows)
        estimates = crossed([Contrast(row, test=True, spreads=[spreads[r]]) for r, row in rows.items()])
        covered += [e.low <= 0 <= e.high for e in estimates]
        told += min(law.holm([math.nan if e.p is None else e.p for e in estimates])) < 0.05
    return float(np.mean(covered)), told / draws


# The page


SEEDS = {"1, beside rows of 3": (3,) * 5 + (1,) * 6, "2": (2,) * ROWS, "3": (3,) * ROWS, "5": (5,) * ROWS}
HEAD = ["prompts", "seeds' sd, points", "seeds", "covered", "worst row", "error, base", "error, pairs", "power at MDE"]


def grid(
    draws: int, prompts: Sequence[int] = tuple(IMAGES), spreads: Sequence[str] = tuple(SPREADS)
) -> list[list[str]]:
    """Return the lines of the table: every cell by the law of the tables."""
    lines: list[list[str]] = []
    for n in prompts:
        for spread in spreads:
            cell = Cell(n, spread, (5,) * ROWS, strata=5 if n == 553 else 1)
            tables = draw(cell, draws, list(SEEDS.values()), np.random.default_rng([n, len(spread)]))
            for name, x in zip(SEEDS, tables, strict=True):
                lines.append([str(n), spread, name, *_percent(measure(x, guarded))])
                print(" | ".join(lines[-1]), flush=True)
    return lines


def comparison(draws: int) -> list[list[str]]:
    """Return the lines of the table of laws: 328 prompts, with the power for a row with GPO's gain."""
    lines: list[list[str]] = []
    for spread in SPREADS:
        shifted = Cell(328, spread, (3,) * ROWS, gain=GPO_GAIN)
        kinds = [SEEDS["2"], SEEDS["3"]]
        equal = draw(replace(shifted, gain=0.0), draws, kinds, np.random.default_rng(1))
        (gpo,) = draw(shifted, draws, kinds[1:], np.random.default_rng(2))
        for label, by in LAWS.items():
            two, three = (_percent(measure(x, by)) for x in equal)
            lines.append([spread, label, two[0], *two[2:], three[0], *three[2:], f"{100 * gpo_power(gpo, by):.0f}"])
            print(" | ".join(lines[-1]), flush=True)
    return lines


def _percent(m: Measured) -> list[str]:
    return [
        f"{100 * m.coverage:.1f}", f"{100 * m.worst_coverage:.1f}", f"{100 * m.family_error_base:.1f}",
        f"{100 * m.family_error_pairs:.1f}", f"{100 * m.power_at_mde:.0f}",
    ]  # fmt: skip


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


GAPS = "**Missing scores**: 2 % of the images of every evaluation and one whole prompt, seeds' sd 1 point, three seeds:"


def with_gaps(draws: int) -> list[str]:
    """Return the part of the page about missing scores."""
    lines: list[list[str]] = []
    for n in (15, 130, 328):
        coverage, error = coverage_with_gaps(Cell(n, "1", (3,) * ROWS), draws, np.random.default_rng([n, 4]))
        lines.append([str(n), f"{100 * coverage:.1f}", f"{100 * error:.1f}"])
        print(" | ".join(lines[-1]), flush=True)
    return [GAPS, "", *_markdown(["prompts", "covered", "error, base"], lines), ""]


def page(draws: int) -> str:
    """Return the text between the markers of docs/statistics.md."""
    laws, cells = comparison(draws), grid(draws)
    shares = [
        [str(n), str(images), f"{share:g}", f"{100 * share_coverage(n, images, share, draws, np.random.default_rng(3)):.1f}"]
        for n, images in ((5, 1), (15, 1), (15, 24), (130, 1), (328, 2))
        for share in (0.02, 0.05, 0.5, 0.98)
    ]  # fmt: skip
    of_laws = ["seeds' sd, points", "law"]
    of_laws += [
        f"{what}, {n} seeds" for n in (2, 3) for what in ("covered", "error, base", "error, pairs", "power at MDE")
    ]
    return "\n".join(
        [
            f"`python benchmarks/calibration.py`, {draws:,} tables of eleven equal rows a cell, in percent.",
            "",
            "**Four laws**, 328 prompts x 2 images:",
            "",
            *_markdown([*of_laws, "power, GPO's row"], laws),
            "",
            "**The law of the tables**:",
            "",
            *_markdown(HEAD, cells),
            "",
            *with_gaps(draws),
            "**One evaluation of 0 and 1**, its 95 % interval; prompts' shares are Beta with sum of parameters 2:",
            "",
            *_markdown(["prompts", "images", "true share", "covered"], shares),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2_000)
    parser.add_argument("--print", action="store_true", help="print the tables and write no page")
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
