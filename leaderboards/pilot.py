"""Pilots of a plan: components of variance, gains and costs, from finished runs, a baseline's scores or the shipped library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation import seed_library
from ..bench.evaluation.ranking import MANDATORY_BASELINES, primary_key
from ..bench.evaluation.seed_library import SeedEntry
from ..bench.spec import SupportsKey
from ..bench.stats.intervals import is_share
from ..bench.stats.planning import DRAWS, Components, LentSpread, estimate_components
from .baseline import Baseline, BaselineScores, baseline_files, find_baseline, read_baseline
from .board import BASE
from .columns import find_columns, ranking_key, task_key
from .comparable import budget_bounds, check_comparable
from .rows import group_runs
from .runs import LoadedRun, load_runs, strata_or_none


@dataclass(frozen=True)
class RowCost:
    """What one run of a row took; NaN: not known."""

    train_seconds: float = math.nan
    evaluation_seconds: float = math.nan  # grows with the images of the evaluation


@dataclass(frozen=True)
class Pilot:
    """What is known before the spend."""

    components: Components
    task: str
    model: str
    key: str
    share: bool  # the score lies between 0 and 1, so that differences are said in points
    budget: Mapping[str, float]
    evaluation: Mapping[str, Any]  # settings that the runs of the plan must have; {}: the task's
    source: str  # where the components come from, in words
    costs: Mapping[str, RowCost] = field(default_factory=dict[str, RowCost])
    device: str = ""  # that the costs were measured on

    @property
    def has_gains(self) -> bool:
        """Return whether the pilot shows how far the rows lie apart."""
        return bool(self.components.seed_means)


@dataclass(frozen=True)
class Question:
    """Which rows are asked for."""

    methods: Sequence[str]  # canonical names
    task: str
    model: str
    key: str | None = None
    budget: Mapping[str, float] | None = None

    @property
    def domain(self) -> str:
        """Return the prompt domain of the model."""
        from ..bench.model_spec import find_model_spec

        return find_model_spec(self.model).domain

    @property
    def task_key(self) -> str:
        """Return the scorer/metric that the task states; "" where it states none."""
        task = registry.task(self.task)
        return task.key(self.domain) if isinstance(task, SupportsKey) else ""

    def rows_of(self, labels: Sequence[str], what: str) -> list[str]:
        """Return the rows of the table to plan: the asked ones, then the baselines of every comparison that are known."""
        for name in self.methods:
            if name not in labels:
                raise registry.unknown(what, name, labels)
        return [*self.methods, *(name for name in MANDATORY_BASELINES if name in labels and name not in self.methods)]


def find_pilot(question: Question, paths: Sequence[Path]) -> Pilot:
    """Return the pilot: a baseline file, or the name of a shipped one, or runs; without paths the shipped library.

    Raises UserError where it is of another task, model or budget, lacks a row, or cannot be planned from.
    """
    if not paths:
        return library_pilot(question)
    baseline = find_baseline(str(paths[0]))
    if len(paths) == 1 and baseline.suffix == ".toml":
        return baseline_pilot(question, baseline)
    return runs_pilot(question, paths)


# A baseline's scores


def baseline_pilot(question: Question, path: Path) -> Pilot:
    """Return the pilot of a baseline's scores; those of files before format 3 are means over the images of a prompt."""
    files = baseline_files(path)
    loaded = [(file, *read_baseline(file)) for file in files]
    file, baseline, scores = next((each for each in loaded if each[1].task == question.task), loaded[0])
    _check(question, baseline.task, baseline.model, baseline.budget)
    key = _baseline_key(question, baseline)
    labels = [claim.label for claim in baseline.row if claim.label != BASE]
    rows = question.rows_of(labels, "row of the pilot")
    base = scores.by[BASE, key][0]
    gains = {label: [seed - base for seed in scores.by[label, key]] for label in labels}
    split = baseline.evaluation.get("split", "test")
    images = max(base.shape[1], int(baseline.evaluation.get(f"{split}_images", 1)))
    lent = {label: _lent(_entry(claim.method, question, key, baseline.budget))
            for claim in baseline.row if (label := claim.label) != BASE}  # fmt: skip
    components = estimate_components(gains, images, scores.strata, {k: v for k, v in lent.items() if v})
    fewest = min(len(scores.by[label, key]) for label in rows)
    nfe = float(baseline.budget.get("nfe", math.nan))
    costs, device = _library_costs(question, rows, baseline.budget, nfe)
    return Pilot(
        components.only(rows),
        baseline.task,
        baseline.model,
        key,
        _is_share(scores, key, labels),
        dict(baseline.budget),
        dict(baseline.evaluation),
        f"{file.name}, {fewest} seed{'s' * (fewest > 1)} a row, {components.prompts} prompts x {images} images"
        + (", spread of seeds from the library" if all(len(s) == 1 for s in gains.values()) else ""),
        costs,
        device,
    )


def _baseline_key(question: Question, baseline: Baseline) -> str:
    keys = dict.fromkeys(number.key for claim in baseline.row for number in claim.number)
    roles = {key: "training" if key.partition("/")[0] == baseline.training else "held-out" for key in keys}
    if question.key is not None and question.key not in roles:
        raise registry.unknown("scorer/metric", question.key, list(roles))
    return question.key or str(primary_key(roles, question.task_key))


def _is_share(scores: BaselineScores, key: str, labels: Sequence[str]) -> bool:
    return all(is_share(seed) for label in (BASE, *labels) for seed in scores.by[label, key])


# Finished runs


def runs_pilot(question: Question, paths: Sequence[Path]) -> Pilot:
    """Return the pilot of finished runs, whose scores are of single images."""
    runs = load_runs(paths)
    if question.task not in {run.record.task for run in runs}:
        raise UserError(
            f"the pilot is of the task {runs[0].record.task}, the plan of {question.task}: no run of it there"
        )
    runs = [run for run in runs if run.record.task == question.task]
    check_comparable(runs)
    first = runs[0].record
    _check(question, first.task, first.model, budget_bounds(first))
    columns = find_columns(runs)
    key = ranking_key(columns, question.key, task_key(columns, runs))
    groups = {label: [run for run in group if run.has(key)] for label, group in group_runs(runs).items()}
    groups = {label: group for label, group in groups.items() if group}
    rows = question.rows_of(list(groups), "row of the pilot")
    gains = {label: [run.gain(key) for run in group] for label, group in groups.items()}
    lent = {
        label: _lent(_entry(group[0].record.method, question, key, budget_bounds(first)))
        for label, group in groups.items()
    }
    images = next(iter(gains.values()))[0].shape[1]
    components = estimate_components(
        gains, images, strata_or_none(runs[0].strata), {k: v for k, v in lent.items() if v}
    )
    fewest = min(len(groups[label]) for label in rows)
    machines = {str(run.record.provenance.get("machine", "")) for run in runs}
    return Pilot(
        components.only(rows),
        first.task,
        first.model,
        key,
        all(
            is_share(scores)
            for group in groups.values()
            for run in group
            for scores in (run.before[key], run.after[key])
        ),
        budget_bounds(first),
        dict(first.config.get("evaluation", {})),
        f"{len(runs)} runs, {fewest} seed{'s' * (fewest > 1)} a row at least, {components.prompts} prompts x {images} images",
        {label: _cost(groups[label]) for label in rows} if len(machines) == 1 else {},
        machines.pop() if len(machines) == 1 else "",
    )


def _cost(group: Sequence[LoadedRun]) -> RowCost:
    """Return the mean seconds of a row's runs."""
    mean = lambda values: float(np.mean(values)) if values else math.nan
    return RowCost(
        mean([run.record.spent["seconds"] for run in group if "seconds" in run.record.spent]),
        mean([run.record.wall["evaluate"] for run in group if "evaluate" in run.record.wall]),
    )


# The library


def library_pilot(question: Question) -> Pilot:
    """Return the pilot of the shipped components of variance; it has no gains."""
    entries = seed_library.known_entries(question.task, question.model)
    if not entries:
        known = sorted({f"{e.task} on {e.model}" for e in seed_library.entries() if math.isfinite(e.prompt_sd)})
        raise UserError(
            f"the shipped library has no components of variance for {question.task} on {question.model} (it has {', '.join(known)}): "
            "give --pilot, finished runs of two seeds"
        )
    key = _library_key(question, entries)
    budgets = list({str(dict(e.budget)): dict(e.budget) for e in entries if e.key == key}.values())
    budget = dict(question.budget) if question.budget else budgets[0]
    if budget not in budgets:
        stated = "; ".join(_bounds(b) for b in budgets)
        raise UserError(f"the shipped library knows no spread at {_bounds(budget)}, only at {stated}: give --pilot")
    by_method = {e.method: e for e in entries if e.key == key and dict(e.budget) == budget}
    rows = question.rows_of(list(by_method), "method of the library of variances")
    known = [by_method[row] for row in rows]
    seconds = {
        row: RowCost(e.seconds_per_nfe * budget.get("nfe", math.nan)) for row, e in zip(rows, known, strict=True)
    }
    devices = {e.device for e in known}
    return Pilot(
        _library_components(rows, known),
        question.task,
        question.model,
        key,
        all(e.share for e in known),
        budget,
        {},
        f"the shipped library ({known[0].source}, {known[0].seeds} seeds a row)",
        seconds,
        devices.pop() if len(devices) == 1 else "",
    )


def _library_key(question: Question, entries: Sequence[SeedEntry]) -> str:
    """Return the key: the asked one, else the first of the scorers that a task's domain holds out."""
    keys = list(dict.fromkeys(e.key for e in entries))
    if question.key is not None:
        if question.key not in keys:
            raise registry.unknown("scorer/metric", question.key, keys)
        return question.key
    held_out = registry.task(question.task).held_out(question.domain)
    names = {name.partition(":")[0] for name in held_out} | {name.replace(":", "-") for name in held_out}
    roles = {key: "held-out" if key.partition("/")[0] in names else "training" for key in keys}
    return str(primary_key(roles, question.task_key))


def _library_components(rows: Sequence[str], known: Sequence[SeedEntry]) -> Components:
    sd = np.array([e.prompt_sd for e in known])
    like = np.array([e.correlation for e in known])
    correlation = (like[:, None] + like) / 2
    np.fill_diagonal(correlation, 1.0)
    values, vectors = np.linalg.eigh(correlation * np.outer(sd, sd))
    variance = np.array([e.sd**2 for e in known])
    df = np.array([e.df for e in known])
    return Components(
        tuple(rows),
        (vectors * np.maximum(values, 0.0)) @ vectors.T,
        np.array([e.residual_sd**2 for e in known]),
        variance,
        variance * df / np.random.default_rng(2).chisquare(df, (DRAWS, len(df))),
        known[0].prompts,
        known[0].images,
    )


def _entry(method: str, question: Question, key: str, budget: Mapping[str, float]) -> SeedEntry | None:
    return seed_library.find_entry(method, question.task, question.model, key, budget)


def _lent(entry: SeedEntry | None) -> LentSpread | None:
    return LentSpread(entry.sd**2, entry.df, entry.residual_sd**2) if entry else None


def _library_costs(
    question: Question, rows: Sequence[str], budget: Mapping[str, float], nfe: float
) -> tuple[dict[str, RowCost], str]:
    """Return what a run of each row takes, by the library's seconds for a method at this budget, and on which device."""
    entries = {
        e.method: e for e in seed_library.known_entries(question.task, question.model) if dict(e.budget) == dict(budget)
    }
    devices = {entries[row].device for row in rows if row in entries}
    if len(devices) != 1:
        return {}, ""
    costs = {row: RowCost(entries[row].seconds_per_nfe * nfe) for row in rows if row in entries}
    return costs, devices.pop()


# Checks


def _check(question: Question, task: str, model: str, budget: Mapping[str, float]) -> None:
    """Raise UserError where a pilot is of another task, model or budget than the plan."""
    for what, asked, found in (("task", question.task, task), ("model", question.model, model)):
        if asked != found:
            raise UserError(
                f"the pilot is of the {what} {found}, the plan of {asked}: a pilot says nothing of another {what}"
            )
    if question.budget and dict(question.budget) != dict(budget):
        raise UserError(
            f"the pilot's runs have the budget {_bounds(budget)}, the plan {_bounds(question.budget)}: a pilot says nothing of another "
            "budget; leave --budget out to plan at the pilot's"
        )


def _bounds(budget: Mapping[str, float]) -> str:
    return ",".join(f"{currency}={bound:.12g}" for currency, bound in budget.items())
