"""Comparability of runs: refuses runs that must not stand in one table, and compares the base's scores between runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..bench.errors import UserError
from ..bench.evaluation.record import Record
from ..bench.stats import intervals
from .rows import settings_text
from .runs import LoadedRun

# The mean of the same base may differ by this much between machines, in standard deviations between its prompts.
BASE_TOLERANCE = 0.05
BASE_DIFFERS = "The base's scores are not the same"  # the first words of the note about it


def check_comparable(runs: Sequence[LoadedRun]) -> None:
    """Raise UserError, naming both values, where two runs differ in what a table must not mix, or are the same run."""
    first, run_by_settings = runs[0], dict[tuple[str, int], LoadedRun]()
    ids: dict[str, tuple[str, LoadedRun]] = {}
    keys: dict[str, tuple[str, LoadedRun]] = {}
    for run in runs:
        for (what, a), (_, b) in zip(_shared_inputs(first), _shared_inputs(run), strict=True):
            for part in dict.fromkeys([*a, *b]):
                if a.get(part) != b.get(part):
                    raise _difference(f"{what} {part}".strip(), first, a.get(part, "none"), run, b.get(part, "none"))
        for name, scorer_id in scorer_ids(run.record).items():
            other, where = ids.setdefault(name, (scorer_id, run))
            if other != scorer_id:
                raise _difference(f"scorer id of {name}", where, other, run, scorer_id)
        if run.record.key:  # a record from before keys were stated has none
            other, where = keys.setdefault(run.record.task, (run.record.key, run))
            if other != run.record.key:
                raise _difference("key that ranks", where, other, run, run.record.key)
        twin = run_by_settings.setdefault((settings_text(run.record), run.record.seed), run)
        if twin is not run:
            raise UserError(
                f"the same run twice, {run.record.method} with seed {run.record.seed}: {twin.folder} and {run.folder}"
            )


def check_same_base(runs: Sequence[LoadedRun]) -> list[str]:
    """Return a note where the base's scores differ slightly between runs. Raises UserError where they are of another base."""
    gaps: dict[str, float] = {}
    first_runs: dict[str, LoadedRun] = {}
    for run in runs:
        for key, scores in run.before.items():
            first = first_runs.setdefault(key, run)
            a, b = first.before[key], scores
            if np.allclose(a, b, rtol=0, atol=1e-6, equal_nan=True):
                continue
            both = np.isfinite(a) & np.isfinite(b)
            means = (float(a[both].mean()), float(b[both].mean())) if both.any() else (0.0, 0.0)
            spread = float(np.nanstd(intervals.per_prompt(a))) if both.any() else 0.0
            if abs(means[0] - means[1]) > BASE_TOLERANCE * spread:
                raise _difference(f"the base's {key} on the same prompts and noise", first, means[0], run, means[1])
            gaps[key] = max(gaps.get(key, 0.0), abs(means[0] - means[1]))
    if not gaps:
        return []
    sizes = ", ".join(f"{key} by {gap:.2g}" for key, gap in gaps.items())
    return [f"{BASE_DIFFERS} in all runs, as rounding on another machine makes them: {sizes} in the mean."]


def budget_bounds(r: Record) -> dict[str, float]:
    """Return the bounds of a run's budget, without the budget's name."""
    return {k: v for k, v in r.config.get("budget", {}).items() if k != "name"}


def scorer_ids(r: Record) -> dict[str, str]:
    """Map name to id for every scorer and embedder of a run."""
    return {name: s.id for name, s in r.scorers.items()} | {f"embedder {n}": i for n, i in r.embedders.items()}


def _shared_inputs(run: LoadedRun) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the inputs that all runs of one table share: (name, part -> value)."""
    r = run.record
    yield "task", {"": r.task}
    yield "task version", {"": r.task_version}
    yield "model", {"": r.model}
    yield "weights of the model", {"": r.provenance.get("weights", "")}
    yield "budget", budget_bounds(r)
    yield "evaluation", dict(r.config.get("evaluation", {}))
    yield "precision of the evaluation", {"": r.config.get("precision", "none")}
    yield "prompts of split", dict(r.prompts)
    yield "training scorer", {"": next((n for n, s in r.scorers.items() if s.role == "training"), "none")}
    yield "number of prompts and images", {"": next(iter(run.after.values())).shape if run.after else "none"}
    yield "strata of the prompts", {"": sorted(set(run.strata))}


def _difference(what: str, a: LoadedRun, value_a: Any, b: LoadedRun, value_b: Any) -> UserError:
    hint = (
        " (--task selects one, --across aggregates them)"
        if what == "task"
        else " (name the runs, or the JSON file that `compare` wrote about them)"
        if what.startswith(("budget", "evaluation"))
        else ""
    )
    return UserError(
        f"these runs differ in {what}: {value_a} in {a.folder} and {value_b} in {b.folder}; a table never mixes them{hint}"
    )
