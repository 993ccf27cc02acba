"""Makes new baselines from the numbers of finished runs, their margins and the settings that reproduce them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation import record
from .baseline import Baseline, BaselineNumber, BaselineScores, Claim, flat, literal, mean_over_prompts
from .board import BASE, SCORED_ROLES, Board, BoardRow
from .build_board import build_board
from .change import expected_half_width
from .columns import training_scorer
from .regress import check_scored, processors, vectors
from .runs import Array, LoadedRun, strata_or_none

FINEST_MARGIN = 1e-10
GUARDED_ROLES = ("training", "held-out")  # the scorers whose numbers are guarded by default


@dataclass(frozen=True)
class BaselineRequest:
    """Options of a new baseline.

    keys: scorer/metric to guard; by default those of `old`, else the metrics of the training and the held-out scorers.
    margins: NUMBER, or KEY=NUMBER for one metric; a margin that is not given is taken from `old`.
    """

    command: str  # written into the file
    keys: Sequence[str] = ()
    margins: Sequence[str] = ()
    old: Baseline | None = None


def make_baseline(runs: Sequence[LoadedRun], request: BaselineRequest) -> tuple[Baseline, BaselineScores]:
    """Make a baseline from the numbers of these runs.

    Raises UserError where the code is not that of a commit, where runs do not belong together or could not be scored, and
    where no margin was given.
    """
    commit = _clean_commit(runs)
    check_scored(runs)
    table = build_board(runs)
    keys = _guarded_keys(table, request)
    request = replace(request, keys=keys)
    margins = _margins(request, keys, [row.label for row in table.rows])
    digits = max(4, *(2 - math.floor(math.log10(m)) for m in margins.values()))
    scores: dict[tuple[str, str], Sequence[Array]] = {}
    claims: list[Claim] = []
    by_folder = {str(r.folder): r for r in runs}
    strata = strata_or_none(runs[0].strata)
    for row in sorted(table.rows, key=lambda r: (r.kind != "base", r.label)):
        group = [by_folder[folder] for folder in row.folders] or runs
        numbers: list[BaselineNumber] = []
        for key in keys:
            new = vectors(group, key, row.kind == "base", digits)
            if new and key in row.cells:
                scores[row.label, key] = new
                numbers.append(_number(row, key, new, strata, digits, margins[row.label, key]))
        if numbers:
            claims.append(_claim(row, tuple(numbers), table))
    return _baseline(runs, table, claims, digits, commit, request), BaselineScores(scores, strata)


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


def _number(
    row: BoardRow, key: str, new: Sequence[Array], strata: Sequence[str] | None, digits: int, margin: float
) -> BaselineNumber:
    after = row.cells[key].after
    mean, low, high = (round(x, digits) for x in (mean_over_prompts(new, strata), after.low, after.high))
    if not all(math.isfinite(x) for x in (mean, low, high)):
        raise UserError(f"{row.label} has too few scored prompts for an interval of {key}")
    half = None if row.kind == "base" else expected_half_width(new, strata)
    repeat = None if half is None else round(half, digits)
    return BaselineNumber(key=key, mean=mean, ci=(low, high), n=after.n, margin=margin, repeat=repeat)


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


def _margins(request: BaselineRequest, keys: Sequence[str], labels: Sequence[str]) -> dict[tuple[str, str], float]:
    """Choose the margin per (row, key), first match wins: --margin KEY=x, --margin x, the old row's, that of all old rows."""
    old = request.old.row if request.old else ()
    old_margins = {(claim.label, n.key): n.margin for claim in old for n in claim.number}
    by_key, default = _parse_margins(request.margins, keys)
    margins: dict[tuple[str, str], float] = {}
    for key in keys:
        stated = by_key.get(key, default)
        of_old_rows = {margin for (_, other), margin in old_margins.items() if other == key}
        for label in labels:
            margin = stated if stated is not None else old_margins.get((label, key))
            if margin is None and not of_old_rows:
                raise UserError(f"state how far from its number {key} is still the same: --margin {key}=NUMBER")
            if margin is None and len(of_old_rows) > 1:
                raise UserError(
                    f"the old rows have several margins for {key} and {label} is new: --margin {key}=NUMBER"
                )
            margins[label, key] = min(of_old_rows) if margin is None else margin
    return margins


def _parse_margins(texts: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, float], float | None]:
    """Parse the margins of single keys, and the one of all keys. texts: NUMBER or KEY=NUMBER."""
    default: float | None = None
    by_key: dict[str, float] = {}
    for text in texts:
        key, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--margin wants a positive number or scorer/metric=number, got {text!r}")
        if value < FINEST_MARGIN:
            raise UserError(
                f"--margin {text}: scores are stored with twelve decimals, so {FINEST_MARGIN:g} is the finest margin"
            )
        if key and key not in keys:
            raise registry.unknown("scorer/metric", key, keys)
        if key:
            by_key[key] = value
        else:
            default = value
    return by_key, default


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
