"""Sequential comparison: adds a seed to the rows of untold pairs until every asked pair is told apart, or a cap is reached.

The rule is that of `stats.sequential`: alpha spending by the number of seeds, Holm over the asked pairs. A look reads the scores of the
runs that have so many seeds, so that the same command makes the same decisions again and goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..errors import UserError
from ..evaluation import record
from ..evaluation.asked_pairs import asked_pairs
from ..evaluation.ranking import SIGNIFICANCE
from ..evaluation.run_scores import SCORES, Array, read_scores
from ..stats.intervals import Contrast, Estimate, crossed, table_spreads
from ..stats.law import SeedVariance, holm
from ..stats.planning import BASE, Pair
from ..stats.sequential import look_p
from .compare import Grid, GridLaunch, Manifest, PlannedRun, make_runs, plan, slug

RULE = "alpha spending by the number of seeds (bench/stats/sequential.py), Holm over the asked pairs"


@dataclass
class PairState:
    """What the looks so far say of one pair."""

    pair: Pair
    anytime_p: float = 1.0  # the smallest over the looks
    told_at: int | None = None  # seeds
    reason: str = ""  # why it cannot be tested

    @property
    def is_open(self) -> bool:
        """Return whether further seeds are needed."""
        return self.told_at is None and not self.reason


@dataclass(frozen=True)
class RowScores:
    """Scores of one row by the key, a (prompts, images) each seed."""

    before: Sequence[Array]
    after: Sequence[Array]

    @property
    def gains(self) -> list[Array]:
        """Return after minus before of each seed."""
        return [after - before for before, after in zip(self.before, self.after, strict=True)]


@dataclass
class SequentialTest:
    """The looks at one comparison."""

    states: list[PairState]
    first: int  # seeds of the first look
    looks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def open_rows(self) -> set[str]:
        """Return the rows that need a further seed."""
        return {row for state in self.states if state.is_open for row in state.pair if row != BASE}

    def look(self, seeds: int, rows: Mapping[str, RowScores], strata: Sequence[str] | None) -> None:
        """Test the open pairs with the seeds that their rows have now.

        Args:
            seeds: of every row of an open pair.
            rows: all rows of the table that have scores; each says something of the variance between seeds.
            strata: (prompts,), where there are several.
        """
        for state in self.states:
            lacking = [row for row in state.pair if row != BASE and row not in rows]
            if state.is_open and lacking:
                state.reason = f"{lacking[0]} has no scores to rank by"
        spreads = table_spreads({label: row.after for label, row in rows.items()}, strata)
        tested = [state for state in self.states if state.is_open]
        estimates = crossed([_contrast(state.pair, rows, spreads) for state in tested], strata=strata)
        for state, estimate in zip(tested, estimates, strict=True):
            if estimate.p is not None:
                ratio = seed_ratio(estimate, [spreads[row] for row in state.pair if row != BASE], seeds)
                now = float(look_p(estimate.p, ratio, self.first, seeds))
                state.anytime_p = min(state.anytime_p, now)
        corrected = dict(zip(map(id, self.states), holm([_p(state) for state in self.states]), strict=True))
        for state in tested:
            if corrected[id(state)] < SIGNIFICANCE:
                state.told_at = seeds
        self.looks.append(
            {
                "seeds": seeds,
                "pairs": [
                    {
                        "pair": list(state.pair), "difference": _number(e.mean), "p": e.p, "anytime_p": state.anytime_p,
                        "holm": _number(corrected[id(state)]), "told": state.told_at is not None,
                    }
                    for state, e in zip(tested, estimates, strict=True)
                ],
            }
        )  # fmt: skip

    def summary(self, cap: int, key: str) -> dict[str, Any]:
        """Return what the manifest says of the test."""
        return {
            "sequential": {
                "rule": RULE, "level": SIGNIFICANCE, "first": self.first, "cap": cap, "key": key, "looks": self.looks,
                "pairs": [
                    {"pair": list(s.pair), "told_at": s.told_at, "anytime_p": s.anytime_p, "reason": s.reason}
                    for s in self.states
                ],
            }
        }  # fmt: skip


def seed_ratio(estimate: Estimate, spreads: Sequence[SeedVariance], seeds: int) -> float:
    """Return the variance of one seed's difference over the part of the estimate's variance that is the prompts'."""
    of_seeds = float(sum(float(spread.variance) for spread in spreads))
    of_prompts = estimate.se**2 - of_seeds / seeds
    return of_seeds / of_prompts if of_prompts > 1e-12 * of_seeds else math.inf


def _p(state: PairState) -> float:
    """Return the p that enters Holm's correction. A pair that cannot be tested stays in it, untold: it was asked."""
    return 1.0 if state.reason else state.anytime_p


def _contrast(pair: Pair, rows: Mapping[str, RowScores], spreads: Mapping[str, SeedVariance]) -> Contrast:
    """Return the contrast of two rows as tables make it: against the base, each run with its own evaluation of it."""
    ours, theirs = pair
    if theirs == BASE:
        return Contrast(rows[ours].gains, test=True, spreads=[spreads[ours]])
    return Contrast(rows[ours].after, rows[theirs].after, test=True, spreads=[spreads[ours], spreads[theirs]])


# Running


def until_told(grid: Grid, pairs: str | None, cap: int, launch: GridLaunch) -> dict[str, Any]:
    """Make runs seed by seed until every asked pair is told or has `cap` seeds.

    Args:
        grid: what to compare; its seeds are those of the first look.
        pairs: `A:B,C:base`; None: each two of the methods, or a single method and the base.
        cap: seeds of a row at most.
        launch: where and how runs are made.

    Returns:
        What the manifest holds, its `sequential` the looks, and its `path`.

    Raises:
        UserError: on a request that cannot be tested so.
        Interrupted: when asked to stop.
    """
    first = _check(grid, cap)
    launch.check()
    runs = plan(replace(grid, seeds=cap), launch.out)
    methods = list(dict.fromkeys(run.config.method for run in runs))
    named = list(dict.fromkeys(registry.canonical("method", name) for name in grid.methods))
    asked = asked_pairs(pairs, named, methods, lambda name: registry.canonical("method", name))
    test = SequentialTest([PairState(pair) for pair in asked], first)
    made = [run for run in runs if run.config.seed < first]
    path = launch.out / f"until-told-{slug(made)}.json"
    options = ["--until-told", "--max-seeds", str(cap), *(["--pairs", pairs] if pairs else [])]
    manifest = Manifest(path, grid, options)
    result: dict[str, Any] = {}
    for seeds in range(first, cap + 1):
        if seeds > first:
            made += [run for run in runs if run.config.seed == seeds - 1 and run.config.method in test.open_rows()]
        made = [replace(run, number=number) for number, run in enumerate(made, start=1)]
        result = make_runs(made, launch, manifest)
        key = next((str(row["key"]) for row in result["runs"] if "key" in row), "")
        _mark_failed(test, made, seeds)
        if test.open_rows():
            rows, strata = _read_rows(made, key)
            test.look(seeds, rows, strata)
            launch.progress.message(_line(test, seeds))
        manifest = replace(manifest, more=test.summary(cap, key))
        result = manifest.write(made, result["provenance"])
        if not test.open_rows():
            break
    return result


def _check(grid: Grid, cap: int) -> int:
    """Return the seeds of the first look. Raises UserError on a grid that cannot be tested look by look."""
    if not isinstance(grid.seeds, int):
        raise UserError("--until-told adds seeds from 0 on: give --seeds as a number")
    if grid.seeds < 2:
        raise UserError("--until-told needs --seeds 2 at least: one seed shows no spread between seeds")
    if cap < grid.seeds:
        raise UserError(f"--max-seeds {cap} is below --seeds {grid.seeds}, those of the first look")
    if len(grid.tasks) != 1:
        raise UserError("--until-told takes one task: pairs are told apart on one")
    return grid.seeds


def _mark_failed(test: SequentialTest, runs: Sequence[PlannedRun], seeds: int) -> None:
    """Close the pairs of rows that have fewer results than seeds: a missing seed would be a chosen one."""
    for state in test.states:
        for row in state.pair:
            of_row = [run for run in runs if run.config.method == row]
            bad = [run for run in of_row if run.record is None or record.disqualification(run.record)]
            if state.is_open and bad:
                why = bad[0].failure or (record.disqualification(bad[0].record) if bad[0].record else "not made")
                state.reason = f"{row}, seed {bad[0].config.seed}: {why}"


def _read_rows(runs: Sequence[PlannedRun], key: str) -> tuple[dict[str, RowScores], list[str] | None]:
    """Return the scores of every row whose runs are results, by the key, and the strata of the prompts where there are several."""
    rows: dict[str, RowScores] = {}
    strata: tuple[str, ...] = ()
    for method in dict.fromkeys(run.config.method for run in runs):
        of_row = [run for run in runs if run.config.method == method]
        if any(run.record is None or record.disqualification(run.record) for run in of_row):
            continue
        scores = [read_scores(_scores_path(run)) for run in of_row]
        if all(key in before and key in after for before, after, _ in scores):
            rows[method] = RowScores([before[key] for before, _, _ in scores], [after[key] for _, after, _ in scores])
            strata = scores[0][2]
    return rows, list(strata) if len(set(strata)) > 1 else None


def _scores_path(run: PlannedRun) -> Path:
    assert run.record is not None
    return record.verified(run.run_dir, run.record, SCORES)


def _line(test: SequentialTest, seeds: int) -> str:
    told = [":".join(state.pair) for state in test.states if state.told_at == seeds]
    left = [":".join(state.pair) for state in test.states if state.is_open]
    parts = [f"told {', '.join(told)}"] * bool(told) + [f"not yet told {', '.join(left)}"] * bool(left)
    return f"look {len(test.looks)}, {seeds} seeds: {'; '.join(parts)}"


def _number(x: float) -> float | None:
    return x if np.isfinite(x) else None


def summary_lines(sequential: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know of the test, a line a pair."""
    looks = sequential["looks"]
    lines = [
        f"sequential, {len(looks)} look{'s' * (len(looks) != 1)}; error {sequential['level']:g} over all looks and pairs:"
    ]
    for each in sequential["pairs"]:
        name, seeds = " : ".join(each["pair"]), each["told_at"]
        state = f"cannot be tested, {each['reason']}" if each["reason"] else "not told"
        state = (
            f"told at {seeds} seeds" if seeds else state if each["reason"] else f"{state} by {looks[-1]['seeds']} seeds"
        )
        lines.append(f"  {name}: {state}, p {each['anytime_p']:.2g} at any look")
    return lines
