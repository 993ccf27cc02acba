"""Regression check: compares runs with a baseline and gives every number of the baseline a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation import record, seed_library
from ..bench.stats import intervals
from ..bench.stats.intervals import Estimate
from ..bench.stats.law import SeedVariance
from ..bench.stats.significance import Verdict
from .baseline import Baseline, BaselineNumber, BaselineScores, Claim, flat, mean_over_prompts
from .board import BASE, Board, BoardRow
from .build_board import build_board
from .change import LEVEL, Changes, NumberScores, estimate_changes, is_repetition, join, shared_spreads, verdicts
from .columns import training_scorer
from .comparable import BASE_DIFFERS, budget_bounds
from .formatting import cell
from .formatting import number as number_text
from .runs import Array, LoadedRun


@dataclass(frozen=True)
class Finding:
    """Result for one number of a baseline: its new value and the verdict."""

    row: str
    key: str
    verdict: Verdict
    reported: Estimate
    now: float
    change: Estimate  # its 95 % interval; p against no change (against one within the margin, where seeds are unknown)
    holm: float  # that p, corrected
    margin: float
    seeds: tuple[int, int]  # how many new and reported ones; 0 for the base
    repeated: bool
    note: str = ""
    floor: Estimate | None = None  # the reported gain over the base, where it was told: it must be told again
    gain: Estimate | None = None  # the new one


@dataclass(frozen=True)
class RegressionReport:
    """All findings about one baseline, the numbers that the runs lack, and what the runs were made with."""

    baseline: str  # its file
    protocol: str  # task, model and budget in words
    findings: tuple[Finding, ...]
    missing: tuple[tuple[str, str], ...]  # (row, key) that these runs do not have
    notes: tuple[str, ...]

    def count(self, verdict: Verdict) -> int:
        """Count the numbers with this verdict."""
        return sum(f.verdict == verdict for f in self.findings)

    def code(self, allow_unsure: bool = False) -> int:
        """Return the exit code: 1 when a number is worse, 3 when a number is missing, or cannot be told and that is not allowed, else 0.

        A missing number was not checked at all, so it is never allowed.
        """
        if self.count("worse"):
            return 1
        return 3 if self.missing or (self.count("cannot tell") and not allow_unsure) else 0


@dataclass(frozen=True)
class LoadedBaseline:
    """A baseline, the scores beside it and the file that it was read from."""

    path: Path
    baseline: Baseline
    scores: BaselineScores

    def with_rows(self, labels: Sequence[str]) -> LoadedBaseline:
        """Return the same baseline with these rows only."""
        rows = tuple(claim for claim in self.baseline.row if claim.label in labels)
        return LoadedBaseline(self.path, self.baseline.model_copy(update={"row": rows}), self.scores)

    def runs_of(self, runs: Sequence[LoadedRun]) -> list[LoadedRun]:
        """Return the runs of its task, model and methods. A baseline of the base alone takes any run: each has evaluated the base."""
        b = self.baseline
        methods = {claim.method for claim in b.row if claim.label != BASE}
        same = [r for r in runs if (r.record.task, r.record.model) == (b.task, b.model)]
        return [r for r in same if r.record.method in methods or not methods]


@dataclass(frozen=True)
class _Match:
    """A number of a baseline and the runs that have it."""

    claim: Claim
    number: BaselineNumber
    runs: Sequence[LoadedRun]
    new: Sequence[Array]  # (prompts, images), one a seed
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Comparison:
    """The changes against one baseline, before the verdicts."""

    against: LoadedBaseline
    matches: Sequence[_Match] = ()
    scores: Sequence[NumberScores] = ()
    changes: Changes | None = None  # None: no runs
    missing: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=list[str])


def check(against: LoadedBaseline, runs: Sequence[LoadedRun]) -> RegressionReport:
    """Give a verdict on every number of the baseline that these runs have; runs of other methods, tasks and models are left out.

    Raises UserError where no run belongs to the baseline, where the runs had other inputs, where more than 0.5 % of a run's
    images have no score, and where a row has runs with several settings and none of them is the reported one.
    """
    return check_all([against], runs)[0]


def check_all(
    baselines: Sequence[LoadedBaseline], runs: Sequence[LoadedRun], notes: Sequence[str] = ()
) -> list[RegressionReport]:
    """Check several baselines, whose p are corrected together. notes: put into the first report.

    A baseline of which there are no runs is reported as missing. Raises UserError where that is so of all.
    """
    runs_by_baseline = [against.runs_of(runs) for against in baselines]
    if not any(runs_by_baseline):
        raise _nothing_in_common(baselines[0], runs)
    used = {str(r.folder) for baseline_runs in runs_by_baseline for r in baseline_runs}
    others = len({str(r.folder) for r in runs} - used)
    notes = [*notes, *([f"{others} runs are not of this baseline and were left out."] if others else [])]
    comparisons = [
        _compare(against, baseline_runs, notes if k == 0 else [])
        for k, (against, baseline_runs) in enumerate(zip(baselines, runs_by_baseline, strict=True))
    ]
    changes = join([c.changes for c in comparisons if c.changes is not None])
    margins = np.array([match.number.margin for c in comparisons for match in c.matches])
    decided = iter(_decide(changes, margins))
    return [_report(c, [next(decided) for _ in c.matches]) for c in comparisons]


def select(baselines: Sequence[LoadedBaseline], rows: Sequence[str], task: str | None = None) -> list[LoadedBaseline]:
    """Select the baselines of one task, None for all, and of them some rows, [] for all. Raises UserError on what none of them has."""
    first = baselines[0].path
    tasks = dict.fromkeys(each.baseline.task for each in baselines)
    if task is not None and task not in tasks:
        raise registry.unknown(f"task of {first}", task, tasks)
    baselines = [each for each in baselines if task in (None, each.baseline.task)]
    if not rows:
        return list(baselines)
    labels = dict.fromkeys(claim.label for each in baselines for claim in each.baseline.row)
    for row in rows:
        if row not in labels:
            raise registry.unknown(f"row of {baselines[0].path}", row, labels)
    return [narrowed for each in baselines if (narrowed := each.with_rows(rows)).baseline.row]


def vectors(group: Sequence[LoadedRun], key: str, base: bool, digits: int) -> list[Array]:
    """Return (prompts, images) scores of each run, rounded as a baseline stores them; [] where one of the runs lacks the key.

    base: one table, the mean of the different ones that the runs measured, as rounding differs between machines.
    """
    evaluations = [run.before for run in group if key in run.before] if base else [run.after for run in group]
    if not all(key in by_key for by_key in evaluations):
        return []
    tables = [by_key[key] for by_key in evaluations]
    if base and tables:
        different = {table.tobytes(): table for table in tables}
        tables = [np.mean(list(different.values()), axis=0)]
    return [np.round(table, digits) for table in tables]


def processors(runs: Sequence[LoadedRun]) -> str:
    """Return the kinds of processor that made these runs; "" where a record does not name one."""
    kinds = {str(r.record.provenance.get("processor", "")) for r in runs}
    return "" if "" in kinds else " and ".join(sorted(kinds))


def check_scored(runs: Sequence[LoadedRun]) -> None:
    """Raise UserError where a run ended by a fault, or too many images have no score: the others may be a biased sample."""
    for run in runs:
        for scores in (run.before, run.after):
            for key, matrix in scores.items():
                share = float(np.isnan(matrix).mean())
                if share > record.INVALID:
                    raise UserError(
                        f"{run.folder}: {100 * share:.2g} % of the images have no {key}, more than {100 * record.INVALID:g} %"
                    )
        if reason := record.disqualification(run.record):
            raise UserError(f"{run.folder} {reason}")


def _nothing_in_common(against: LoadedBaseline, runs: Sequence[LoadedRun]) -> UserError:
    b = against.baseline
    present = sorted({f"{r.record.method} on {r.record.task} with {r.record.model}" for r in runs})
    methods = sorted({claim.method for claim in b.row if claim.label != BASE})
    needed = f"{', '.join(methods) or BASE} on {b.task} with {b.model}"
    return UserError(f"no run in common: {against.path} is of {needed}; these are of {', '.join(present)}")


def _compare(against: LoadedBaseline, runs: Sequence[LoadedRun], notes: Sequence[str]) -> _Comparison:
    b = against.baseline
    if not runs:
        return _Comparison(against, missing=[(c.label, n.key) for c in b.row for n in c.number], notes=notes)
    table = build_board(runs)  # refuses runs that do not belong together
    _check_same_inputs(against, table, runs)
    notes = [*notes, *(note for note in table.notes if note.startswith(BASE_DIFFERS))]
    matches: list[_Match] = []
    missing: list[tuple[str, str]] = []
    for claim in b.row:
        group, seeds, group_notes = _runs_of_claim(claim, b, table, runs)
        notes += group_notes
        for number in claim.number:
            new = _new_scores(against, claim, number.key, group)
            if new:
                matches.append(_Match(claim, number, group, new, seeds))
            else:
                missing.append((claim.label, number.key))
    if not matches:
        raise UserError(f"no number in common: these runs have none of the scores that {against.path} reports")
    scores = _number_scores(against, matches)
    changes = estimate_changes(scores, against.scores.strata)
    notes += [f"{r.folder.name} has the hack flag." for r in runs if r.record.flags.hack]
    notes += _last_digits(b, processors(runs), bool(changes.repeated.all()))
    return _Comparison(against, matches, scores, changes, missing, notes)


def _new_scores(against: LoadedBaseline, claim: Claim, key: str, group: Sequence[LoadedRun]) -> list[Array]:
    """Return the scores of the new runs by image, or by prompt where the baseline has them so. Raises UserError on other prompts."""
    digits, old = against.baseline.digits, against.scores.by[claim.label, key]
    new = vectors(group, key, claim.label == BASE, digits)
    if not new:
        return []
    if {len(table) for table in new} != {len(old[0])}:
        raise UserError(
            f"{against.path} has {len(old[0])} prompts, these runs {len(new[0])}: a regression is measured on the same ones"
        )
    return [_as_reported(table, old[0], digits) for table in new]


def _as_reported(table: Array, old: Array, digits: int) -> Array:
    """Return scores by prompt where the baseline has one column and the run several images."""
    if old.shape[1] == 1 < table.shape[1]:
        return np.round(intervals.per_prompt(table), digits)[:, None]
    return table


def _number_scores(against: LoadedBaseline, matches: Sequence[_Match]) -> list[NumberScores]:
    """Return the scores of all numbers, with the variance between seeds moderated over the rows of the baseline."""
    old, strata = against.scores.by, against.scores.strata
    new = {(match.claim.label, match.number.key): match.new for match in matches}
    spreads: dict[tuple[str, str], SeedVariance] = {}
    for key in dict.fromkeys(key for _, key in new):
        rows = {
            label: (new.get((label, key), []), seeds)
            for (label, other), seeds in old.items()
            if other == key and label != BASE
        }
        if rows:
            spreads |= {(label, key): spread for label, spread in shared_spreads(rows, strata).items()}
    return [_scores_of(match, against, spreads.get((match.claim.label, match.number.key))) for match in matches]


def _scores_of(match: _Match, against: LoadedBaseline, spread: SeedVariance | None) -> NumberScores:
    claim, key = match.claim, match.number.key
    reported, trained = against.scores.by[claim.label, key], claim.label != BASE
    base = against.scores.by.get((BASE, key), [])
    if spread is not None and not np.isfinite(spread.variance):
        r = match.runs[0].record
        entry = seed_library.find_entry(r.method, r.task, r.model, key, budget_bounds(r))
        spread = entry.variance() if entry else None
    gains = [run.gain(key) for run in match.runs if run.has(key)] if trained else []
    return NumberScores(
        match.new,
        reported,
        [_as_reported(gain, reported[0], against.baseline.digits) for gain in gains],
        [table - base[0] for table in reported] if trained and base else [],
        trained,
        told=bool(match.number.told),
        repeated=is_repetition(match.new, match.seeds, reported, claim.seeds),
        spread=spread,
    )


def _last_digits(b: Baseline, processor: str, repeated: bool) -> list[str]:
    """Return a note on whether these runs should repeat the baseline to the last digit. repeated: all of them do."""
    elsewhere = "numbers repeat within the margin, not to the last digit."
    if b.processor and processor and b.processor != processor:
        return [f"Made on {b.processor}; this is {processor}: {elsewhere}"]
    if repeated:
        return []
    if b.processor and processor:
        return [
            f"Made on the same kind of processor ({processor}): the same code, versions and seeds repeat to the last digit."
        ]
    return [f"Made on {b.processor or b.device}: on another kind of processor {elsewhere}"]


def _check_same_inputs(against: LoadedBaseline, table: Board, runs: Sequence[LoadedRun]) -> None:
    """Raise UserError on the first input in which the runs differ from those that the baseline was measured with."""
    b = against.baseline
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("task version", {"": b.task_version}, {"": table.task_version}),
        ("prompts of split", b.prompts, table.prompts),
        ("training scorer", {"": b.training}, {"": training_scorer(table.columns)}),
        ("scorer id of", b.scorers, {k: v for k, v in table.scorers.items() if k in b.scorers}),
        ("budget", b.budget, table.budget),
        ("weights of the model", {"": b.weights}, {"": table.weights}),
        ("evaluation", flat(b.evaluation), flat(table.evaluation)),
    ]
    for what, reported, new in pairs:
        for part in dict.fromkeys([*reported, *new]):
            if what == "scorer id of" and part not in new and part != b.training:
                continue  # a scorer that is not installed here: its numbers are reported as missing
            if reported.get(part) != new.get(part):
                raise UserError(
                    f"these runs are not what {against.path} was measured on: {f'{what} {part}'.strip()} is "
                    f"{new.get(part, 'none')} in {runs[0].folder}, {reported.get(part, 'none')} in the baseline"
                )
    check_scored(runs)


def _runs_of_claim(
    claim: Claim, b: Baseline, table: Board, runs: Sequence[LoadedRun]
) -> tuple[list[LoadedRun], tuple[int, ...], list[str]]:
    """Return the runs of a claim, their seeds, and notes on them.

    Runs with other settings count for a claim when it is the only one of its method: then it is the method that changed. Where
    a method has several claims, they are distinguished by their settings.
    """
    if claim.label == BASE:
        return list(runs), (), []
    rows = [r for r in table.rows if r.method == claim.method and r.kind != "base"]
    exact = [r for r in rows if flat(r.settings) == claim.settings]
    if not exact and sum(other.method == claim.method for other in b.row if other.label != BASE) > 1:
        return [], (), []
    if not exact and len(rows) > 1:
        raise UserError(
            f"{claim.label} of the baseline was run with several settings and none of them is the reported one: "
            + "; ".join(r.label for r in rows)
        )
    if not rows:
        return [], (), []
    chosen = (exact or rows)[0]
    by_folder = {str(r.folder): r for r in runs}
    differences = f"{claim.label} has other settings than reported: {_setting_differences(claim.settings, chosen)}."
    return [by_folder[folder] for folder in chosen.folders], chosen.seeds, [] if exact else [differences]


def _setting_differences(reported: Mapping[str, Any], row: BoardRow) -> str:
    new = flat(row.settings)
    keys = [k for k in dict.fromkeys([*reported, *new]) if reported.get(k) != new.get(k)]
    return ", ".join(f"{k.removeprefix('settings.')} {reported.get(k, 'none')} -> {new.get(k, 'none')}" for k in keys)


@dataclass(frozen=True)
class _Decision:
    """What was found of one number."""

    verdict: Verdict
    p: float
    holm: float
    mean: float
    half: float  # of the 95 % interval
    se: float
    known: bool
    lost: bool
    gain: float
    gain_half: float


def _decide(changes: Changes, margins: Array) -> list[_Decision]:
    """Return what was found of each number of all baselines."""
    columns = (
        verdicts(changes, margins), changes.p(margins), changes.corrected_p(margins), changes.mean,
        changes.noise.quantile(LEVEL), changes.noise.se, changes.known, changes.lost(), changes.gains.now,
        changes.gains.noise.quantile(LEVEL),
    )  # fmt: skip
    return [_Decision(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _report(c: _Comparison, decided: Sequence[_Decision]) -> RegressionReport:
    b = c.against.baseline
    findings = [
        _finding(match, scores, decision, c.against.scores.strata)
        for match, scores, decision in zip(c.matches, c.scores, decided, strict=True)
    ]
    bounds = ", ".join(f"{k} {v:,.0f}" for k, v in b.budget.items())
    protocol = f"{b.task} (version {b.task_version}) on {b.model}, budget {bounds}"
    return RegressionReport(str(c.against.path), protocol, tuple(findings), tuple(c.missing), tuple(c.notes))


def _finding(match: _Match, scores: NumberScores, d: _Decision, strata: Sequence[str] | None) -> Finding:
    claim, number = match.claim, match.number
    change = Estimate(d.mean, d.mean - d.half, d.mean + d.half, number.n, d.se, LEVEL, p=d.p)
    gain = (
        Estimate(d.gain, d.gain - d.gain_half, d.gain + d.gain_half, number.n, level=LEVEL)
        if scores.new_gains
        else None
    )
    if scores.repeated:
        change = Estimate(0.0, 0.0, 0.0, number.n, 0.0, LEVEL)
    floor = (
        Estimate(number.gain, *number.gain_ci, number.n)
        if number.told and number.gain is not None and number.gain_ci is not None
        else None
    )
    return Finding(
        row=claim.label,
        key=number.key,
        verdict=d.verdict,
        reported=Estimate(number.mean, *number.ci, number.n, seeds=max(1, len(claim.seeds))),
        now=mean_over_prompts(match.new, strata),
        change=change,
        holm=d.holm,
        margin=number.margin,
        seeds=(len(match.seeds), len(claim.seeds)),
        repeated=scores.repeated,
        note="" if scores.repeated else "; ".join(_reasons(number, scores, d, gain)),
        floor=floor,
        gain=gain,
    )


def _reasons(number: BaselineNumber, scores: NumberScores, d: _Decision, gain: Estimate | None) -> list[str]:
    """Return what a verdict rests on, where that is not the change alone."""
    reasons: list[str] = []
    if d.lost and gain is not None:
        reasons.append(
            f"the gain of {number_text(number.gain or 0.0, sign=True)} is not told any more: {cell(gain, sign=True)}"
        )
    if scores.trained and not d.known:
        reasons.append("one training seed on either side: the interval does not contain the spread between seeds")
    elif scores.trained and scores.spread is not None and scores.spread.lent:
        reasons.append(
            "one training seed on either side: the spread between seeds is that of other rows, or of the library"
        )
    if number.repeat is not None and number.repeat >= number.margin and d.verdict == "cannot tell":
        reasons.append(f"a repetition with other seeds lies within {number.repeat:.2g}: the margin needs more seeds")
    return reasons
