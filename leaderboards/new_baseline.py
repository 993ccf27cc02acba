"""Makes new baselines from the numbers of finished runs, their margins and the settings that reproduce them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation import record
from .baseline import Baseline, BaselineNumber, BaselineScores, Claim, flat, literal, mean_over_prompts
from .board import BASE, SCORED_ROLES, Board, BoardRow
from .build_board import build_board
from .change import expected_half_widths, shared_spreads
from .columns import training_scorer
from .margins import MarginRule, base_margins, choose_rules, told_gains
from .regress import check_scored, processors, vectors
from .runs import Array, LoadedRun, strata_or_none

MOST_DIGITS = 12  # of a stored score
GUARDED_ROLES = ("training", "held-out")  # the scorers whose numbers are guarded by default


@dataclass(frozen=True)
class BaselineRequest:
    """Options of a new baseline.

    keys: scorer/metric to guard; by default those of `old`, else the metrics of the training and the held-out scorers.
    margins: NUMBER or SHARE% of the gain, or KEY= and one of them; what is not given is taken from `old`, else half of the gain.
    """

    command: str  # written into the file
    keys: Sequence[str] = ()
    margins: Sequence[str] = ()
    old: Baseline | None = None


def make_baseline(runs: Sequence[LoadedRun], request: BaselineRequest) -> tuple[Baseline, BaselineScores]:
    """Make a baseline from the numbers of these runs.

    Raises UserError where the code is not that of a commit, and where runs do not belong together or could not be scored.
    """
    commit = _clean_commit(runs)
    check_scored(runs)
    table = build_board(runs)
    keys = _guarded_keys(table, request)
    request = replace(request, keys=keys)
    strata = strata_or_none(runs[0].strata)
    rows = sorted(table.rows, key=lambda r: (r.kind != "base", r.label))
    by_folder = {str(r.folder): r for r in runs}
    groups = {row.label: [by_folder[folder] for folder in row.folders] or list(runs) for row in rows}
    scores_of = lambda digits: {
        (row.label, key): after
        for row in rows
        for key in keys
        if key in row.cells and (after := vectors(groups[row.label], key, row.kind == "base", digits))
    }
    rules = choose_rules(request.margins, keys, list(groups), request.old.row if request.old else ())
    reported = report_numbers(table, scores_of(MOST_DIGITS), rules, strata)
    claims = [_claim(row, reported.of_row(row.label), table) for row in rows if reported.of_row(row.label)]
    digits = reported.digits
    return _baseline(runs, table, claims, digits, commit, request), BaselineScores(scores_of(digits), strata)


@dataclass(frozen=True)
class ReportedNumbers:
    """Numbers of a baseline, by row and key, and the decimals that its scores are stored with."""

    by: Mapping[tuple[str, str], BaselineNumber]
    digits: int

    def of_row(self, label: str) -> tuple[BaselineNumber, ...]:
        """Return the numbers of one row."""
        return tuple(number for (row, _), number in self.by.items() if row == label)


def report_numbers(
    table: Board,
    scores: Mapping[tuple[str, str], Sequence[Array]],
    rules: Mapping[tuple[str, str], MarginRule],
    strata: Sequence[str] | None,
    digits: int | None = None,
) -> ReportedNumbers:
    """Return the numbers of a table's rows with their gains and margins.

    Args:
        table: of the runs.
        scores: (row, key) -> (prompts, images) for each seed.
        rules: (row, key) -> how the margin is chosen.
        strata: of the prompts.
        digits: decimals of the numbers; None: as many as the margins need.

    Raises:
        UserError: where there are too few scored prompts for an interval.
    """
    numbers: dict[tuple[str, str], BaselineNumber] = {}
    rows = {row.label: row for row in table.rows}
    for key in dict.fromkeys(key for _, key in scores):
        of_key = {label: seeds for (label, other), seeds in scores.items() if other == key}
        repeats = _repeats({label: seeds for label, seeds in of_key.items() if label != BASE}, strata)
        told = told_gains(table, key)
        for label, seeds in of_key.items():
            numbers[label, key] = _number(rows[label], key, mean_over_prompts(seeds, strata), repeats.get(label), told)
    chosen = {at: rules[at].margin(number) for at, number in numbers.items()}
    smallest = base_margins(chosen, list(dict.fromkeys(key for _, key in scores)))
    for label, key in numbers:
        if label == BASE and rules[label, key].of_gain:
            chosen[label, key] = smallest.get(key, chosen[label, key])
    digits = digits or max(4, *(2 - math.floor(math.log10(m)) for m in chosen.values()))
    rounded = {at: _rounded(number, chosen[at], rules[at], digits) for at, number in numbers.items()}
    return ReportedNumbers({at: rounded[at] for at in scores}, digits)


def _repeats(rows: Mapping[str, Sequence[Array]], strata: Sequence[str] | None) -> dict[str, float]:
    """Return of each row half the 90 % interval that as many other seeds are expected to show; none where that is unknown."""
    if not rows:
        return {}
    spreads = shared_spreads({label: ([], seeds) for label, seeds in rows.items()}, strata)
    widths = {
        label: float(expected_half_widths(spread, np.array(float(len(rows[label])))))
        for label, spread in spreads.items()
    }
    return {label: width for label, width in widths.items() if math.isfinite(width)}


def _number(row: BoardRow, key: str, mean: float, repeat: float | None, told: Collection[str]) -> BaselineNumber:
    """Return a number before its margin is chosen and its digits are rounded."""
    cell = row.cells[key]
    after, delta = cell.after, cell.delta
    if not all(math.isfinite(x) for x in (mean, after.low, after.high)):
        raise UserError(f"{row.label} has too few scored prompts for an interval of {key}")
    number = BaselineNumber(key=key, mean=mean, ci=(after.low, after.high), n=after.n, margin=1.0, repeat=repeat)
    if delta is None:
        return number
    gain = {"gain": delta.mean, "gain_ci": (delta.low, delta.high), "told": row.label in told}
    return number.model_copy(update=gain)


def _rounded(number: BaselineNumber, margin: float, rule: MarginRule, digits: int) -> BaselineNumber:
    """Return a number with its margin, rounded; a margin that was computed is rounded up to two digits."""
    up = lambda x: math.ceil(x * 10 ** (k := 1 - math.floor(math.log10(x)))) / 10**k
    short = lambda ends: None if ends is None else tuple(round(x, digits) for x in ends)
    cut = lambda x: None if x is None else round(x, digits)
    return number.model_copy(
        update={
            "mean": round(number.mean, digits), "ci": short(number.ci), "repeat": cut(number.repeat),
            "gain": cut(number.gain), "gain_ci": short(number.gain_ci),
            "margin": up(margin) if rule.of_gain else margin, "rule": rule.text if rule.of_gain else None,
        }
    )  # fmt: skip


def _clean_commit(runs: Sequence[LoadedRun]) -> str:
    """Return the commit of this tree. Raises UserError where the tree, or the one that made a run, had changes outside a commit."""
    commit = record.revision()
    if not commit or commit.endswith("-dirty"):
        raise UserError("a baseline is written from a commit: this tree has uncommitted changes, or no history")
    for run in runs:
        revision = str(run.record.provenance.get("revision", ""))
        if not revision or revision.endswith("-dirty"):
            raise UserError(f"a baseline is made of runs of a commit: {run.folder} was made with uncommitted changes")
    return commit


def _guarded_keys(table: Board, request: BaselineRequest) -> list[str]:
    roles = {c.key: c.role for c in table.columns if c.role in SCORED_ROLES}
    old = request.old.row if request.old else ()
    keys = list(request.keys) or list(dict.fromkeys(n.key for claim in old for n in claim.number))
    for key in keys:
        if key not in roles:
            raise registry.unknown("scorer/metric", key, list(roles))
    return keys or [key for key, role in roles.items() if role in GUARDED_ROLES]


def _baseline(
    runs: Sequence[LoadedRun],
    table: Board,
    claims: Sequence[Claim],
    digits: int,
    commit: str,
    request: BaselineRequest,
) -> Baseline:
    first = runs[0].record
    training = training_scorer(table.columns)
    guarded = {key.partition("/")[0] for key in request.keys} | {training}
    return Baseline(
        command=request.command,
        date=datetime.now(UTC).date().isoformat(),
        commit=commit,
        runs_commits=tuple(sorted({str(r.record.provenance["revision"]) for r in runs})),
        device=str(first.provenance.get("machine", "")),
        processor=processors(runs),
        versions={str(k): str(v) for k, v in dict(first.provenance.get("versions", {})).items()},
        task=table.task,
        task_version=table.task_version,
        model=table.model,
        weights=table.weights,
        training=training,
        digits=digits,
        scores_sha256="",
        budget=dict(table.budget),
        evaluation=flat(table.evaluation),
        prompts=dict(table.prompts),
        scorers={name: scorer_id for name, scorer_id in table.scorers.items() if name in guarded},
        row=tuple(claims),
    )


def _claim(row: BoardRow, numbers: tuple[BaselineNumber, ...], table: Board) -> Claim:
    if row.kind == "base":
        return Claim(label=row.label, method=BASE, number=numbers)
    settings = flat(row.settings)
    return Claim(
        label=row.label,
        method=row.method,
        seeds=row.seeds,
        sets=_changed_settings(row.method, table, settings),
        reward=str(settings.get("reward", "")),
        settings=settings,
        number=numbers,
    )


def _changed_settings(method: str, table: Board, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the values of `gpobench run --set` that turn the method's current preset into these settings."""
    from ..bench.experiments.config import RunRequest, resolve

    bounds = ",".join(f"{k}={v!r}" for k, v in table.budget.items())
    preset = flat(resolve(RunRequest(method, table.task, table.model, budget=bounds)).mapping())
    preset = {key.removeprefix("settings."): value for key, value in preset.items()}
    wanted = {
        key.removeprefix("settings."): value
        for key, value in settings.items()
        if key != "reward" and not key.startswith("sources.")
    }
    wanted |= flat({"evaluation": table.evaluation})
    return tuple(f"{key}={literal(value)}" for key, value in wanted.items() if preset.get(key) != value)
