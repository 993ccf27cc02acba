"""Does a reported number still hold? Same, better, worse or cannot tell, by a rule whose errors are bounded.

For every number of a baseline: d = mean over prompts of (new - reported), each averaged over its training seeds, the prompts
paired, on the same noise. Its variance has two parts, se^2 = se_prompts^2 + s^2 (1/S_new + 1/S_reported), s^2 the variance between the
seeds of one side, pooled over both; the first part has n - 1 degrees of freedom, the second S_new + S_reported - 2 (Welch-Satterthwaite).

    same         |d| + t.95 se < margin: two one-sided tests at 5 % (Schuirmann 1987), so the 90 % interval lies within the margin;
                 or every new seed is one of the reported ones and repeats it to the last digit
    worse        otherwise, when d < 0 and it can be told from 0 by Student's two-sided test at 5 %, corrected (Holm) over all
                 numbers that are judged; better likewise
    cannot tell  otherwise

Where neither side has two seeds, nobody knows what another seed would change. There a number is worse, or better, only when d can be
told from anything within the margin, which then is the person's word for how far seeds may lie apart.

What may go wrong, with two seeds or more on a side: all numbers are said to be the same while one of them is off by its margin or more:
at most 5 % (each would have to pass its own test). Some number is said to be worse although none has changed: 2.5 %, and as much better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bench import registry
from ..bench.errors import Interrupted, UserError
from ..bench.evaluation import record
from ..bench.stats import intervals
from ..bench.stats.intervals import Estimate, Verdict
from .baseline import Baseline, BaselineNumber, BaselineScores, Claim, flat, literal
from .baseline import mean as average
from .board import APART, BASE, Board, BoardRow, LoadedRun, board

Array = NDArray[np.float64]
LEVEL = 0.95
FINEST = 1e-10  # of margins
GUARDED = ("training", "held-out")  # the scorers whose numbers are guarded unless others are asked for
JUDGED = ("training", "held-out", "auxiliary", "quality")  # more is better: distances have no better or worse


@dataclass(frozen=True)
class Change:
    """New minus reported: the mean, and what is known of its spread."""

    mean: float
    se: float  # NaN: too few prompts
    df: float
    n: int  # prompts
    seeds: bool  # the spread between training seeds is in se, or there is none
    repeated: bool = False  # to the last digit

    def half(self, level: float) -> float:
        """Half the width of the interval of this level."""
        from scipy.stats import t

        return float(t.ppf((1 + level) / 2, self.df)) * self.se if self.se > 0 else self.se

    def p(self, edge: float = 0.0) -> float:
        """Two-sided, against a true change of no more than `edge`."""
        from scipy.stats import t

        beyond = abs(self.mean) - edge
        if math.isnan(self.se):
            return math.nan
        return min(1.0, 2 * float(t.sf(beyond / self.se, self.df))) if self.se > 0 else float(beyond <= 0)


@dataclass(frozen=True)
class Finding:
    """A number and its verdict."""

    row: str
    key: str
    verdict: Verdict
    was: Estimate
    now: float
    change: Estimate  # its 95 % interval; p against no change (against one within the margin, where seeds are unknown)
    holm: float
    margin: float
    seeds: tuple[int, int]  # new and reported; 0 for the base
    repeated: bool
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All verdicts, what was not judged, and what the runs stand on."""

    baseline: str  # its file
    ground: str  # task, model and budget in words
    findings: tuple[Finding, ...]
    missing: tuple[tuple[str, str], ...]  # (row, key) that these runs do not have
    notes: tuple[str, ...]

    def count(self, verdict: Verdict) -> int:
        """How many numbers got this verdict."""
        return sum(f.verdict == verdict for f in self.findings)

    def code(self, allow_unsure: bool = False) -> int:
        """What the command exits with: 1 when a number is worse, 3 when some are missing, or cannot be told and that is not
        allowed, else 0. A number that nobody looked at is guarded by nobody, so a missing one is never allowed."""
        if self.count("worse"):
            return 1
        return 3 if self.missing or (self.count("cannot tell") and not allow_unsure) else 0


# The rule


def change(
    new: Sequence[Array], old: Sequence[Array], strata: Sequence[str] | None = None, trained: bool = True
) -> Change:
    """new, old: (prompts,) a seed, on the same prompts. trained: there are seeds to differ, as the base has none."""
    difference = np.mean(new, axis=0) - np.mean(old, axis=0)
    prompts = intervals.mean_ci(difference, resamples=1, strata=strata)
    parts = [(prompts.se**2, prompts.n - len(set(strata or [""])))]
    spread = _seeds(new, old, strata) if trained else None
    if spread is not None:
        parts.append((spread[0] * (1 / len(new) + 1 / len(old)), spread[1]))
    se, df = _sum(parts)
    return Change(prompts.mean, se, df, prompts.n, seeds=spread is not None or not trained)


def _sum(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The standard error of a sum of independent parts, and its degrees of freedom (Welch-Satterthwaite)."""
    variance = sum(v for v, _ in parts)
    return math.sqrt(variance), variance**2 / sum(v**2 / k for v, k in parts) if variance > 0 else math.inf


def _seeds(new: Sequence[Array], old: Sequence[Array], strata: Sequence[str] | None) -> tuple[float, int] | None:
    """The variance between seeds, pooled over both sides, and its degrees of freedom; None where no side has two."""
    whole = np.isfinite(np.stack([*new, *old])).all(0)
    total, df = 0.0, 0
    for side in (new, old):
        if len(side) > 1:
            masked = [np.where(whole, one, np.nan) for one in side]
            means = [average([one], strata) for one in masked]
            total, df = total + float(np.var(means, ddof=1)) * (len(side) - 1), df + len(side) - 1
    return (total / df, df) if df else None


def verdicts(changes: Sequence[Change], margins: Sequence[float]) -> list[tuple[Verdict, float]]:
    """The verdict on each change and its p, corrected over all of them; margins in units of each score."""
    p = [c.p(0.0 if c.seeds else margin) for c, margin in zip(changes, margins, strict=True)]
    holm = intervals.holm(p)
    return [
        (_verdict(c, margin, adjusted), adjusted) for c, margin, adjusted in zip(changes, margins, holm, strict=True)
    ]


def _verdict(c: Change, margin: float, p: float) -> Verdict:
    if c.repeated or abs(c.mean) + c.half(2 * LEVEL - 1) < margin:
        return "same"
    if p < 1 - LEVEL:
        return "better" if c.mean > 0 else "worse"
    return "cannot tell"


def repeat(seeds: Sequence[Array], strata: Sequence[str] | None = None) -> float | None:
    """Half the 90 % interval to expect of the change when as many other seeds are trained; None from one seed.

    A margin below it will hardly ever be met by a repetition that is not the same to the last digit.
    """
    if len(seeds) < 2:
        return None
    pairs = [intervals.mean_ci(a - b, resamples=1, strata=strata) for a, b in combinations(seeds, 2)]
    spread = _seeds(seeds, seeds, strata)
    assert spread is not None
    parts = [
        (float(np.mean([pair.se**2 for pair in pairs])) / len(seeds), pairs[0].n - len(set(strata or [""]))),
        (spread[0] * 2 / len(seeds), spread[1]),
    ]
    se, df = _sum(parts)
    return Change(0.0, se, df, pairs[0].n, seeds=True).half(2 * LEVEL - 1)


# Runs against a baseline


Guarded = tuple[Path, Baseline, BaselineScores]  # a baseline's file and what it holds


@dataclass(frozen=True)
class _Measured:
    """The runs held against a baseline, before the verdicts."""

    guarded: Guarded
    found: Sequence[tuple[Claim, BaselineNumber, list[Array], tuple[int, ...]]]
    changes: Sequence[Change]
    missing: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def judge(path: Path, known: Baseline, scores: BaselineScores, runs: Sequence[LoadedRun]) -> Report:
    """The verdict on every number of the baseline that these runs have; runs of other methods, tasks and models are left out.

    Raises UserError where no run is of the baseline, where their ground is another one, where more than 0.5 % of a run's
    images have no score, and where a row has runs with several settings and none of them is the reported one.
    """
    return judge_all([(path, known, scores)], runs)[0]


def judge_all(baselines: Sequence[Guarded], runs: Sequence[LoadedRun], notes: Sequence[str] = ()) -> list[Report]:
    """The same for several baselines, whose numbers are corrected together. notes: to stand in the first report.

    Of several, one that these runs have nothing of is reported as missing. Raises UserError where that is so of all.
    """
    mine = [_mine(known, runs) for _, known, _ in baselines]
    if not any(mine):
        path, known, _ = baselines[0]
        there = sorted({f"{r.record.method} on {r.record.task} with {r.record.model}" for r in runs})
        methods = sorted({claim.method for claim in known.row if claim.label != BASE})
        asked = f"{', '.join(methods) or BASE} on {known.task} with {known.model}"
        raise UserError(f"no run in common: {path} is of {asked}; these are of {', '.join(there)}")
    others = len({str(r.folder) for r in runs} - {str(r.folder) for own in mine for r in own})
    left = [*notes, *([f"{others} runs are not of this baseline and were left out."] if others else [])]
    measured = [
        _measure(guarded, own, left if k == 0 else [])
        for k, (guarded, own) in enumerate(zip(baselines, mine, strict=True))
    ]
    margins = [number.margin for m in measured for _, number, _, _ in m.found]
    rule = iter(verdicts([c for m in measured for c in m.changes], margins))
    return [_report(m, [next(rule) for _ in m.found]) for m in measured]


def _mine(known: Baseline, runs: Sequence[LoadedRun]) -> list[LoadedRun]:
    """The runs of a baseline's ground and methods. One of the base alone is judged by any run: each has judged the base."""
    methods = {claim.method for claim in known.row if claim.label != BASE}
    ground = lambda r: (r.record.task, r.record.model) == (known.task, known.model)
    return [r for r in runs if ground(r) and (r.record.method in methods or not methods)]


def _measure(guarded: Guarded, mine: Sequence[LoadedRun], left: Sequence[str]) -> _Measured:
    path, known, scores = guarded
    notes = list(left)
    rows = [row for row in known.row if row.label != BASE]
    found: list[tuple[Claim, BaselineNumber, list[Array], tuple[int, ...]]] = []
    missing: list[tuple[str, str]] = []
    if not mine:
        return _Measured(guarded, [], [], tuple((c.label, n.key) for c in known.row for n in c.number), tuple(notes))
    table = board(mine, resamples=1)  # refuses runs that do not belong together
    _same_ground(path, known, table, mine)
    notes += [note for note in table.notes if note.startswith(APART)]
    by_folder = {str(r.folder): r for r in mine}
    for claim in known.row:
        group, seeds, said = _group(claim, rows, table, by_folder, mine)
        notes += said
        for number in claim.number:
            new = vectors(group, number.key, claim.label == BASE, known.digits)
            if new:
                found.append((claim, number, new, seeds))
            else:
                missing.append((claim.label, number.key))
    if not found:
        raise UserError(f"no number in common: these runs have none of the scores that {path} reports")
    changes: list[Change] = []
    for claim, number, new, seeds in found:
        old = scores.by[claim.label, number.key]
        if {len(v) for v in new} != {len(v) for v in old}:
            raise UserError(
                f"{path} has {len(old[0])} prompts, these runs {len(new[0])}: a regression is judged on the same ones"
            )
        if _repeats(new, seeds, old, claim.seeds):
            changes.append(Change(0.0, 0.0, math.inf, number.n, seeds=True, repeated=True))
        else:
            changes.append(change(new, old, scores.strata, trained=claim.label != BASE))
    notes += [f"{r.folder.name} wears the hack flag." for r in mine if record.flagged(r.record)]
    notes += _last_digits(known, processors(mine), all(c.repeated for c in changes))
    return _Measured(guarded, found, changes, tuple(missing), tuple(notes))


def processors(runs: Sequence[LoadedRun]) -> str:
    """The kinds of processor that made these runs; "" where one of the records is older than the note of it."""
    kinds = {str(r.record.provenance.get("processor", "")) for r in runs}
    return "" if "" in kinds else " and ".join(sorted(kinds))


def _last_digits(known: Baseline, here: str, repeated: bool) -> list[str]:
    """Whether these runs were to repeat the baseline to the last digit, in a line. repeated: they do, all of them."""
    elsewhere = "numbers repeat within the margin, not to the last digit."
    if known.processor and here and known.processor != here:
        return [f"Made on {known.processor}; this is {here}: {elsewhere}"]
    if repeated:
        return []
    if known.processor and here:
        return [
            f"Made on the same kind of processor ({here}): the same code, versions and seeds repeat to the last digit."
        ]
    return [f"Made on {known.processor or known.device}: on another kind of processor {elsewhere}"]


def _report(m: _Measured, rule: Sequence[tuple[Verdict, float]]) -> Report:
    path, known, scores = m.guarded
    findings = [
        _finding(*one, c, verdict, holm, scores.strata)
        for one, c, (verdict, holm) in zip(m.found, m.changes, rule, strict=True)
    ]
    bounds = ", ".join(f"{k} {v:,.0f}" for k, v in known.budget.items())
    said = f"{known.task} (version {known.task_version}) on {known.model}, budget {bounds}"
    return Report(str(path), said, tuple(findings), m.missing, m.notes)


def only(baselines: Sequence[Guarded], rows: Sequence[str], task: str | None = None) -> list[Guarded]:
    """Baselines cut down to those of a task and to some of their rows, [] for all. Raises UserError on what none of them has."""
    tasks = dict.fromkeys(known.task for _, known, _ in baselines)
    if task is not None and task not in tasks:
        raise registry.unknown(f"task of {baselines[0][0]}", task, tasks)
    baselines = [one for one in baselines if task in (None, one[1].task)]
    if not rows:
        return list(baselines)
    labels = dict.fromkeys(claim.label for _, known, _ in baselines for claim in known.row)
    for row in rows:
        if row not in labels:
            raise registry.unknown(f"row of {baselines[0][0]}", row, labels)
    cut = [
        (path, known.model_copy(update={"row": tuple(c for c in known.row if c.label in rows)}), scores)
        for path, known, scores in baselines
    ]
    return [one for one in cut if one[1].row]


def vectors(group: Sequence[LoadedRun], key: str, base: bool, digits: int) -> list[Array]:
    """(prompts,) for each run, rounded as a baseline keeps it; [] where one of them lacks the key.

    base: one vector, the mean of those that the runs measured, where another machine's last bits made several.
    """
    looks = [run.before for run in group if key in run.before] if base else [run.after for run in group]
    if not all(key in look for look in looks):
        return []
    found = [intervals.per_prompt(look[key]) for look in looks]
    if base and found:
        different = {vector.tobytes(): vector for vector in found}
        found = [np.mean(list(different.values()), axis=0)]
    return [np.round(vector, digits) for vector in found]


def _same_ground(path: Path, known: Baseline, table: Board, runs: Sequence[LoadedRun]) -> None:
    """Raise UserError on the first thing in which the runs are not what the baseline's numbers were measured on."""
    training = next((c.key.partition("/")[0] for c in table.columns if c.role == "training"), "none")
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("task version", {"": known.task_version}, {"": table.task_version}),
        ("prompts of split", known.prompts, table.prompts),
        ("training scorer", {"": known.training}, {"": training}),
        ("scorer id of", known.scorers, {k: v for k, v in table.scorers.items() if k in known.scorers}),
        ("budget", known.budget, table.budget),
        ("weights of the model", {"": known.weights}, {"": table.weights}),
        ("evaluation", flat(known.evaluation), flat(table.evaluation)),
    ]
    for what, reported, new in pairs:
        for part in dict.fromkeys([*reported, *new]):
            if what == "scorer id of" and part not in new and part != known.training:
                continue  # a scorer that is not installed here: its numbers are missing, and that is said
            if reported.get(part) != new.get(part):
                raise UserError(
                    f"these runs are not what {path} was measured on: {f'{what} {part}'.strip()} is {new.get(part, 'none')} "
                    f"in {runs[0].folder}, {reported.get(part, 'none')} in the baseline"
                )
    _scored(runs)


def _scored(runs: Sequence[LoadedRun]) -> None:
    """Raise UserError where too many images have no score: what is left is no fair sample."""
    for run in runs:
        for scores in (run.before, run.after):
            for key, matrix in scores.items():
                share = float(np.isnan(matrix).mean())
                if share > record.INVALID:
                    raise UserError(
                        f"{run.folder}: {100 * share:.2g} % of the images have no {key}, more than {100 * record.INVALID:g} %"
                    )
        if run.record.flags.invalid:
            raise UserError(
                f"{run.folder} is marked invalid: more than {100 * record.INVALID:g} % of its images were not scored"
            )


def _group(
    claim: Claim, claims: Sequence[Claim], table: Board, by_folder: Mapping[str, LoadedRun], runs: Sequence[LoadedRun]
) -> tuple[list[LoadedRun], tuple[int, ...], list[str]]:
    """The runs of a row, their seeds, and what is to be said of them. claims: all rows of the baseline.

    Runs with other settings stand for a row when it is the only one of its method: then it is the method that changed. Where
    a method has several rows, settings are what tells them apart.
    """
    if claim.label == BASE:
        return list(runs), (), []
    rows = [r for r in table.rows if r.method == claim.method and r.kind != "base"]
    exact = [r for r in rows if flat(r.settings) == claim.settings]
    if not exact and sum(one.method == claim.method for one in claims) > 1:
        return [], (), []
    if not exact and len(rows) > 1:
        raise UserError(
            f"{claim.label} of the baseline was run with several settings and none of them is the reported one: "
            + "; ".join(r.label for r in rows)
        )
    chosen = exact or rows
    if not chosen:
        return [], (), []
    mine = [by_folder[folder] for folder in chosen[0].folders]
    said = (
        [] if exact else [f"{claim.label} has other settings than reported: {_differences(claim.settings, chosen[0])}."]
    )
    return mine, chosen[0].seeds, said


def _differences(reported: Mapping[str, Any], row: BoardRow) -> str:
    new = flat(row.settings)
    keys = [k for k in dict.fromkeys([*reported, *new]) if reported.get(k) != new.get(k)]
    return ", ".join(f"{k.removeprefix('settings.')} {reported.get(k, 'none')} -> {new.get(k, 'none')}" for k in keys)


def _repeats(new: Sequence[Array], seeds: Sequence[int], old: Sequence[Array], reported: Sequence[int]) -> bool:
    """Every new seed is one of the reported ones, with the same score for every prompt."""
    before = dict(zip(reported or (0,), old, strict=True))
    return all(
        seed in before and np.array_equal(vector, before[seed], equal_nan=True)
        for seed, vector in zip(seeds or (0,), new, strict=True)
    )


def _finding(
    claim: Claim,
    number: BaselineNumber,
    new: Sequence[Array],
    seeds: Sequence[int],
    c: Change,
    verdict: Verdict,
    holm: float,
    strata: Sequence[str] | None,
) -> Finding:
    half = c.half(LEVEL)
    notes = ["one training seed on either side: the interval knows nothing of what another would change"] * (
        not c.seeds
    )
    if number.repeat is not None and number.repeat >= number.margin and verdict == "cannot tell":
        notes.append(f"a repetition with other seeds lies within {number.repeat:.2g}: the margin asks for more seeds")
    return Finding(
        row=claim.label,
        key=number.key,
        verdict=verdict,
        was=Estimate(number.mean, *number.ci, number.n, seeds=max(1, len(claim.seeds))),
        now=average(new, strata),
        change=Estimate(
            c.mean, c.mean - half, c.mean + half, c.n, c.se, LEVEL, p=c.p(0.0 if c.seeds else number.margin)
        ),
        holm=holm,
        margin=number.margin,
        seeds=(len(seeds), len(claim.seeds)),
        repeated=c.repeated,
        note="" if c.repeated else "; ".join(notes),
    )


# A new baseline


def compose(
    runs: Sequence[LoadedRun],
    *,
    keys: Sequence[str] = (),
    margins: Sequence[str] = (),
    old: Baseline | None = None,
    command: str,
) -> tuple[Baseline, BaselineScores]:
    """The numbers of these runs as a baseline. keys: what to guard; by default what `old` does, else the metrics of the
    training and the held-out scorers. margins: NUMBER, or KEY=NUMBER for one metric; what is not given is taken from `old`.

    Raises UserError where the code is not that of a commit, where runs do not belong together or could not be scored, and
    where no margin was stated.
    """
    commit = record.revision()
    if not commit or commit.endswith("-dirty"):
        raise UserError("a baseline is written from a commit: this tree has changes that are in none, or no history")
    for run in runs:
        made = str(run.record.provenance.get("revision", ""))
        if not made or made.endswith("-dirty"):
            raise UserError(
                f"a baseline is made of runs of a commit: {run.folder} was made with changes that are in none"
            )
    _scored(runs)
    table = board(runs)
    roles = {c.key: c.role for c in table.columns}
    known = [key for key, role in roles.items() if role in JUDGED]
    chosen = list(keys) or (list(dict.fromkeys(n.key for claim in old.row for n in claim.number)) if old else [])
    for key in chosen:
        if key not in known:
            raise registry.unknown("scorer/metric", key, known)
    chosen = chosen or [key for key in known if roles[key] in GUARDED]
    labels = [row.label for row in table.rows]
    margin = _margins(margins, chosen, labels, old)
    digits = max(4, *(2 - math.floor(math.log10(m)) for m in margin.values()))
    by: dict[tuple[str, str], Sequence[Array]] = {}
    claims: list[Claim] = []
    by_folder = {str(r.folder): r for r in runs}
    strata = list(runs[0].strata) if len(set(runs[0].strata)) > 1 else None
    for row in sorted(table.rows, key=lambda r: (r.kind != "base", r.label)):
        group = [by_folder[folder] for folder in row.folders] or runs
        base, numbers = row.kind == "base", list[BaselineNumber]()
        for key in chosen:
            new = vectors(group, key, base, digits)
            if new and key in row.cells:
                by[row.label, key] = new
                e = row.cells[key].after
                said = [round(x, digits) for x in (average(new, strata), e.low, e.high)]
                if not all(math.isfinite(x) for x in said):
                    raise UserError(f"{row.label} has too few scored prompts for an interval of {key}")
                again = None if base else repeat(new, strata)
                numbers.append(
                    BaselineNumber(
                        key=key,
                        mean=said[0],
                        ci=(said[1], said[2]),
                        n=e.n,
                        margin=margin[row.label, key],
                        repeat=None if again is None else round(again, digits),
                    )
                )
        if numbers:
            claims.append(_claim(row, tuple(numbers), table))
    first = runs[0].record
    training = next((c.key.partition("/")[0] for c in table.columns if c.role == "training"), "none")
    guarded = {key.partition("/")[0] for key in chosen} | {training}
    baseline = Baseline(
        command=command,
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
        scorers={name: text for name, text in table.scorers.items() if name in guarded},
        row=tuple(claims),
    )
    return baseline, BaselineScores(by, strata)


def _margins(
    said: Sequence[str], keys: Sequence[str], labels: Sequence[str], old: Baseline | None
) -> dict[tuple[str, str], float]:
    """By row and key: what was said of the key, else what was said of all, else that of the old row, else the old one of all rows."""
    before = {(claim.label, n.key): n.margin for claim in (old.row if old else ()) for n in claim.number}
    every: float | None = None
    own: dict[str, float] = {}
    for text in said:
        key, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--margin wants a positive number or scorer/metric=number, got {text!r}")
        if value < FINEST:
            raise UserError(f"--margin {text}: scores are kept to twelve decimals, so {FINEST:g} is the finest margin")
        if key and key not in keys:
            raise registry.unknown("scorer/metric", key, keys)
        if key:
            own[key] = value
        else:
            every = value
    found: dict[tuple[str, str], float] = {}
    for key in keys:
        stated = own.get(key, every)
        everywhere = {margin for (_, other), margin in before.items() if other == key}
        for label in labels:
            margin = stated if stated is not None else before.get((label, key))
            if margin is None and not everywhere:
                raise UserError(f"state how far from its number {key} is still the same: --margin {key}=NUMBER")
            if margin is None and len(everywhere) > 1:
                raise UserError(
                    f"the old rows have several margins for {key} and {label} is new: --margin {key}=NUMBER"
                )
            found[label, key] = min(everywhere) if margin is None else margin
    return found


def _claim(row: BoardRow, numbers: tuple[BaselineNumber, ...], table: Board) -> Claim:
    if row.kind == "base":
        return Claim(label=row.label, method=BASE, number=numbers)
    settings = flat(row.settings)
    return Claim(
        label=row.label,
        method=row.method,
        seeds=row.seeds,
        sets=_sets(row.method, table, settings),
        reward=str(settings.get("reward", "")),
        settings=settings,
        number=numbers,
    )


def _sets(method: str, table: Board, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What `gpobench run --set` needs to get from the method's preset, as it is now, to these settings."""
    from ..bench.experiments.config import RunRequest, resolve

    bounds = ",".join(f"{k}={v!r}" for k, v in table.budget.items())
    now = resolve(RunRequest(method, table.task, table.model, budget=bounds)).mapping()
    there = {key.removeprefix("settings."): value for key, value in flat(now).items()}
    own = {
        key.removeprefix("settings."): value
        for key, value in settings.items()
        if key != "reward" and not key.startswith("sources.")
    }
    own |= flat({"evaluation": table.evaluation})
    return tuple(f"{key}={literal(value)}" for key, value in own.items() if there.get(key) != value)


# The runs that a baseline needs


def train(
    baselines: Sequence[Baseline],
    out: Path,
    say: Callable[[str], None],
    *,
    jobs: int = 1,
    fresh: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Do every run of the baselines, each in a process of its own; those that are done are read and not repeated.

    out: the folder of run directories; what a run says goes to `logs` in it. jobs: runs at once. fresh: those that are done too.
    Returns the directories.
    Raises UserError when a run fails, Interrupted when asked to stop.
    """
    from ..bench.assets.weight_store import weights_hash
    from ..bench.experiments.jobs import Job, make_folder, run_jobs
    from ..bench.model_spec import find_model_spec

    work = [(known, claim, seed) for known in baselines for claim in known.row for seed in claim.seeds]
    homes = [out / _slug(*one) for one in work]
    names = [f"{claim.label} on {known.task}, seed {seed}" for known, claim, seed in work]
    logs = [out / "logs" / f"{run_dir.name}.log" for run_dir in homes]
    make_folder(out / "logs")
    failed: list[str] = []

    def ends(k: int, why: str) -> None:
        if why:
            failed.append(f"the run {names[k]} failed: {why}")
            say(failed[-1])

    left = list(range(len(work)))
    if not fresh and (there := [k for k in left if (homes[k] / "record.json").is_file()]):
        left = [k for k in left if k not in there]
        done = {k: record.read(homes[k] / "record.json") for k in there}
        now = {model: weights_hash(find_model_spec(model)) for model in dict.fromkeys(work[k][0].model for k in there)}
        for k, one in done.items():
            if one.provenance.get("weights") != now[work[k][0].model]:
                raise UserError(
                    f"the weights of {work[k][0].model} changed since {homes[k]} was made: --fresh makes it again"
                )
        older = record.elsewhere(list(done.values()))
        warned = f", {older} of them not surely by this code: --fresh makes them again" if older else ""
        say(f"{len(there)} of {len(work)} runs are done already in {out}{warned}")

    again = ["--fresh"] if fresh else []
    todo = [Job([*words(*work[k], out), *again], logs[k]) for k in left]
    begins = lambda j: say(f"run {left[j] + 1} of {len(work)}: {names[left[j]]}")
    if not run_jobs(todo, jobs, begins=begins, ends=lambda j, why: ends(left[j], why), interrupted=interrupted):
        raise Interrupted("stopped; the same command goes on from there")
    if failed:
        raise UserError(failed[0])
    return homes


def _slug(known: Baseline, claim: Claim, seed: int) -> str:
    """The name of a run's directory: that of its settings as they are resolved today."""
    from ..bench.experiments.config import RunRequest, resolve

    return resolve(
        RunRequest(
            claim.method,
            known.task,
            known.model,
            seed=seed,
            budget=_bounds(known),
            reward=claim.reward or None,
            sets=claim.sets,
        )
    ).slug()


def _bounds(known: Baseline) -> str:
    return ",".join(f"{k}={v!r}" for k, v in known.budget.items())


def words(known: Baseline, claim: Claim, seed: int, out: Path) -> list[str]:
    """What a person would type behind `gpobench` for one run of a row."""
    sets = [word for text in claim.sets for word in ("--set", text)]
    reward = ["--reward", claim.reward] if claim.reward else []
    return [
        "run", "--method", claim.method, "--task", known.task, "--model", known.model, "--seed", str(seed),
        "--budget", _bounds(known), *reward, *sets, "--out", str(out),
    ]  # fmt: skip
