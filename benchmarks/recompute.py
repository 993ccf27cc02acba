"""Recomputes a table of the project's own board from the shipped scores, by docs/statistics.md: numpy alone, nothing of gpobench.

    python benchmarks/recompute.py                                       # leaderboards/tiny-ocr.toml
    python benchmarks/recompute.py leaderboards/tiny-counting.toml geneval-shapes/correct

It prints the base's mean, and of each row the mean, the gain over the base and the standard errors of both.
"""

from __future__ import annotations

import csv
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEADERBOARDS = Path(__file__).resolve().parent.parent / "leaderboards"
WIDENING, FLOOR, LARGER_KEEPS, UNIFORM_DF = 0.5, 0.6, 0.5, 1e4  # the guards of docs/statistics.md


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    label: str
    mean: float
    mean_se: float
    gain: float
    gain_se: float


def read(path: Path) -> tuple[dict[tuple[str, str], list[Array]], NDArray[Any]]:
    """Return (row, key) -> (prompts, images) for each seed, and the stratum of each prompt."""
    scores: dict[tuple[str, str], list[Array]] = {}
    with path.with_name(f"{path.stem}.scores.csv").open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    strata = np.zeros(len(head) - 3, int)
    for row, key, _, *cells in lines:
        if (row, key) == ("", "stratum"):
            strata = np.array(cells)
            continue
        images = max(len(cell.split()) for cell in cells)
        words = [cell.split() or ["-"] * images for cell in cells]
        scores.setdefault((row, key), []).append(
            np.array([[np.nan if word == "-" else float(word) for word in of_prompt] for of_prompt in words])
        )
    return scores, strata


def by_prompt(tables: list[Array]) -> Array:
    """Return (seeds, prompts): means over images that are scored under every seed; prompts without one are left out."""
    stacked = np.stack(tables)
    scored = np.isfinite(stacked).all(0)
    count = scored.sum(-1)
    means = np.where(scored, stacked, 0.0).sum(-1) / np.maximum(count, 1)
    return np.where(count > 0, means, np.nan)


def mean_and_variance(x: Array, strata: NDArray[Any]) -> tuple[float, float]:
    """Return the mean of the strata's means of x (prompts,), and its variance due to the prompts."""
    parts = [x[(strata == s) & np.isfinite(x)] for s in np.unique(strata[np.isfinite(x)])]
    mean = float(np.mean([part.mean() for part in parts]))
    return mean, float(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts) ** 2


def seed_parts(seeds: Array, strata: NDArray[Any]) -> tuple[float, float]:
    """Return V, the variance between the seeds' means, and R, the part of it that single prompts' residuals make."""
    means = np.array([mean_and_variance(x, strata)[0] for x in seeds])
    residual = sum(mean_and_variance(x - seeds.mean(0), strata)[1] for x in seeds) / (len(seeds) - 1)
    return float(means.var(ddof=1)), float(residual)


def moderate(variance: Array, residual: Array, df: float) -> Array:
    """Squeeze the rows' variances towards their common one, with the guards; all rows have df degrees of freedom."""
    observed = np.maximum(variance, 1e-3 * residual)
    usable = observed > 0
    logs = np.log(observed[usable]) - digamma(df / 2) + np.log(df / 2)
    rows, noise = len(logs), polygamma(1, df / 2)
    if rows < 2:
        return np.where(usable, np.maximum(observed, FLOOR * residual), 0.0)
    error = np.sqrt((polygamma(3, df / 2) + 2 * noise**2 * rows / (rows - 1)) / rows)
    prior_df = min(2 * inverse_trigamma(max(logs.var(ddof=1) - noise + WIDENING * error, 2 / UNIFORM_DF)), UNIFORM_DF)
    prior = np.exp(logs.mean() + digamma(prior_df / 2) - np.log(prior_df / 2))
    squeezed = (prior_df * prior + df * observed) / (prior_df + df)
    larger = observed > squeezed
    squeezed = np.where(larger, squeezed * (observed / squeezed) ** LARGER_KEEPS, squeezed)
    return np.where(usable, np.maximum(squeezed, FLOOR * residual), 0.0)


def digamma(x: float) -> float:
    """Return the logarithmic derivative of the gamma function, by its recurrence and Stirling's series."""
    far = x + 1000
    return float(np.log(far) - 1 / (2 * far) - 1 / (12 * far**2) - (1 / (x + np.arange(1000))).sum())


def polygamma(k: int, x: float) -> float:
    """Return its k-th derivative for k = 1 or 3, where it is k! sum of (x + j)^-(k + 1)."""
    far = x + 1000
    total = ((x + np.arange(1000)) ** -(k + 1.0)).sum() + far**-k / k + far ** -(k + 1.0) / 2
    return float(total) * (1 if k == 1 else 6)


def inverse_trigamma(target: float) -> float:
    """Return the x > 0 whose trigamma is the target, by bisection of its logarithm."""
    low, high = 1e-8, 1e8
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if polygamma(1, middle) > target else (low, middle)
    return float(np.sqrt(low * high))


def table(path: Path, key: str) -> tuple[float, float, list[Row]]:
    """Return the base's mean and its standard error, and the rows; those of one seed have no standard error."""
    scores, strata = read(path)
    base = scores["base", key][0]
    base_mean, base_variance = mean_and_variance(by_prompt([base])[0], strata)
    seeds = {label: tables for (label, other), tables in scores.items() if other == key and label != "base"}
    several = {label: by_prompt(tables) for label, tables in seeds.items() if len(tables) > 1}
    if len({len(x) for x in several.values()}) > 1:
        raise SystemExit("recompute: rows have different numbers of seeds; this script takes one number")
    parts = {label: seed_parts(x, strata) for label, x in several.items()}
    variance, residual = (np.array([part[k] for part in parts.values()]) for k in (0, 1))
    squeezed = dict(zip(parts, moderate(variance, residual, len(next(iter(several.values()))) - 1.0), strict=True))

    def estimate(label: str, tables: list[Array]) -> tuple[float, float]:
        mean, total = mean_and_variance(by_prompt(tables).mean(0), strata)
        if label not in squeezed:
            return mean, float("nan")
        count = len(tables)
        return mean, float(np.sqrt(max(total - parts[label][1] / count, 0.0) + squeezed[label] / count))

    rows = [
        Row(label, *estimate(label, tables), *estimate(label, [x - base for x in tables]))
        for label, tables in seeds.items()
    ]
    return base_mean, float(np.sqrt(base_variance)), sorted(rows, key=lambda row: -row.mean)


def main(arguments: list[str]) -> None:
    path = Path(arguments[0]) if arguments else LEADERBOARDS / "tiny-ocr.toml"
    stated = tomllib.loads(path.read_text("utf-8"))
    keys = [number["key"] for number in stated["row"][0]["number"]]
    for key in arguments[1:] or keys:
        if key not in keys:
            raise SystemExit(f"recompute: {path} has no {key!r}; it has {', '.join(keys)}")
        base, se, rows = table(path, key)
        print(f"\n{stated['task']}, {key}: base {base:.4f}, standard error {se:.4f}\n")
        print(f"{'method':16} {'mean':>8} {'se':>8} {'gain':>8} {'se':>8}")
        for row in rows:
            print(f"{row.label:16} {row.mean:8.4f} {row.mean_se:8.4f} {row.gain:+8.4f} {row.gain_se:8.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
