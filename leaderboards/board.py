"""Which method is better, as far as finished runs can tell: an interval on every number, a shared rank where there is doubt."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation import record
from ..bench.evaluation.record import Record
from ..bench.stats import intervals, significance
from ..bench.stats.intervals import Contrast, Estimate
from . import paper_numbers
from .paper_numbers import Reported

Array = NDArray[np.float64]
Role = Literal["training", "held-out", "further", "quality", "diversity", "drift"]
ROLES: tuple[Role, ...] = ("training", "held-out", "further", "quality", "diversity", "drift")
AGREE = 0.05  # two machines' last bits may move the mean of the same base this far, in standard deviations between its prompts
APART = "The base's scores are not the same"  # how the note on that begins
SURE = 0.05  # the chance that a table of equal methods has a second rank
BASE = "base"
MANDATORY = ("best-of-n", "sft")  # what any method must beat; the base is in every run
RULES = (
    "Intervals are 95 %: bootstrap over prompts, images of a prompt clustered, and over training seeds where a row has two or more.",
    "Rank: rows sorted by mean; one more than the number of rows that beat a row: the paired difference, by prompt and image on the "
    "same noise, is told from 0 at 5 %, corrected over all pairs of rows (Holm); never before the row above. Of tables of equal methods "
    "5 % at most have a second rank. Rows of one rank cannot be told apart; neighbours of different ranks need not be.",
    "p: against the baseline, by sign flips over prompts where both have one seed, from the interval's draws where one of them has "
    "more (as against the base), else Student's at Welch-Satterthwaite degrees of freedom; corrected over the rows (Holm). A row of one "
    "seed borrows the spread of seeds of the row it is compared with; between two such rows nobody knows it.",
)


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, read: its record and every score."""

    folder: Path
    record: Record
    before: Mapping[str, Array]  # scorer/metric -> (prompts, images); NaN = could not be scored
    after: Mapping[str, Array]
    strata: tuple[str, ...]  # (prompts,)


@dataclass(frozen=True)
class Column:
    """One scorer/metric, and what it is to these runs."""

    key: str
    role: Role


@dataclass(frozen=True)
class Cell:
    """What one row scores in one column; the base has neither a before nor a difference."""

    after: Estimate
    before: Estimate | None = None
    delta: Estimate | None = None  # after - before, paired
    images: int = 0  # a seed
    errors: int = 0  # images that could not be scored, of all seeds, before and after


@dataclass(frozen=True)
class BoardRow:
    """A method with one set of settings, over its training seeds."""

    label: str
    method: str
    kind: Literal["base", "baseline", "method"]
    seeds: tuple[int, ...]
    folders: tuple[str, ...]
    settings: Mapping[str, Any]
    cells: Mapping[str, Cell]
    cmmd: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])
    versus: Estimate | None = None  # minus the baseline, in the key; p as tested
    holm: float = math.nan  # that p, corrected
    rank: int | None = None  # None: not ranked
    spent: Mapping[str, float] = field(default_factory=dict[str, float])  # by currency, the mean over seeds
    hacked: int = 0  # seeds whose record wears the hack flag
    invalid: bool = False
    trials: int = 0  # of tuning, whose spend is not in `spent`
    revisions: tuple[str, ...] = ()  # of the code

    @property
    def single_seed(self) -> bool:
        """Its interval knows nothing of what another training seed would change."""
        return self.kind != "base" and len(self.seeds) == 1


@dataclass(frozen=True)
class Board:
    """A table of rows that may be compared: one task, model, budget, judging and set of scorers."""

    task: str
    task_version: str
    model: str
    weights: str
    dtype: str
    budget: Mapping[str, float]
    evaluation: Mapping[str, Any]
    prompts: Mapping[str, str]  # split -> hash
    scorers: Mapping[str, str]  # name -> id, embedders too
    key: str
    baseline: str
    columns: tuple[Column, ...]
    rows: tuple[BoardRow, ...]  # ranked ones first, by mean
    notes: tuple[str, ...]
    reported: tuple[Reported, ...] = ()


# Reading


def load(paths: Sequence[Path], task: str | None = None) -> list[LoadedRun]:
    """The finished runs in these folders: each is a run directory, holds some, or is the JSON file that `compare` wrote about some.

    One that is met twice counts once. task: only the runs of this one.
    Raises UserError where there is none, where a run named itself is not finished, and on files that cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _compared(path) if path.suffix == ".json" else _inside(path):
            folders.setdefault(folder.resolve(), folder)
    runs = [_read(folder) for _, folder in sorted(folders.items())]
    tasks = dict.fromkeys(run.record.task for run in runs)
    if task is not None and task not in tasks:
        raise registry.unknown("task of these runs", task, tasks)
    return [run for run in runs if task in (None, run.record.task)]


def _inside(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is no folder of runs")
    inside = [path] if (path / "record.json").is_file() else sorted(p.parent for p in path.glob("*/record.json"))
    if not inside:
        begun = (path / "config.toml").is_file()
        raise UserError(f"the run in {path} is not finished" if begun else f"no finished run in {path}")
    return inside


def _compared(path: Path) -> list[Path]:
    """The runs that a comparison finished; they stand beside its file, wherever that was moved."""
    found = [run["run"] for run in _listed(path) if run["state"] == "done"]
    if not found:
        raise UserError(f"none of the runs of {path} is done")
    return [folder for name in found for folder in _inside(path.parent / name)]


def _listed(path: Path) -> list[dict[str, str]]:
    """What a comparison's file says of its runs."""
    words = ("method", "task", "seed", "reason")
    try:
        return [
            {"run": str(run["run"]), "state": str(run["state"])} | {word: str(run.get(word, "")) for word in words}
            for run in json.loads(path.read_text("utf-8"))["runs"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not what `gpobench compare` writes about its runs") from None


def left_out(paths: Sequence[Path], task: str | None = None) -> list[str]:
    """A note on the runs in these folders and files that no table can hold: failed ones, with the reason, and unfinished ones.

    Without it a method would be ranked by those of its seeds that survived, and nobody would know.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if path.suffix == ".json":
            for run in _listed(path):
                if run["state"] != "done" and task in (None, run["task"]):
                    why = f": {run['reason'].rstrip('.')}" if run["reason"] else ""
                    name = f"{run['method']} on {run['task']} with seed {run['seed']}"
                    found[(path.parent / run["run"]).resolve()] = f"{name} ({run['state']}{why})"
        elif not (path / "record.json").is_file():
            for file in sorted(path.glob("*/config.toml")):
                if not (file.with_name("record.json")).is_file() and task in (None, _begun(file)):
                    found.setdefault(file.parent.resolve(), f"{file.parent.name} (not finished)")
    return [f"Not in this table: {'; '.join(found.values())}."] if found else []


def _begun(file: Path) -> str | None:
    """The task of a run that has only its configuration, by the command on the first line of it."""
    try:
        words = shlex.split(file.read_text("utf-8").partition("\n")[0].lstrip("# "))
        return words[words.index("--task") + 1]
    except (OSError, ValueError, IndexError):
        return None


def _read(folder: Path) -> LoadedRun:
    known = record.read(folder / "record.json")
    if known.kind != "run":
        raise UserError(f"{folder} is no run but an {known.kind}: a table is made of runs")
    return LoadedRun(folder, known, *_scores(folder / "scores.parquet"))


def _scores(path: Path) -> tuple[dict[str, Array], dict[str, Array], tuple[str, ...]]:
    """Before and after, (prompts, images) by scorer/metric, and each prompt's stratum."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = ["stratum", "scorer", "metric", "phase"]
    try:
        there = set(pq.read_schema(path).names)
        lacking = {"prompt", "ordinal", "value", *words[1:]} - there
        if lacking:
            raise UserError(f"{path} has no column {sorted(lacking)[0]!r}")
        columns = ["prompt", "ordinal", "value", *(word for word in words if word in there)]
        table = pq.ParquetFile(path, read_dictionary=columns[3:]).read(columns=columns).combine_chunks()
        prompt, ordinal, value = (table.column(name).to_numpy() for name in columns[:3])
        coded = {name: _codes(table.column(name)) for name in columns[3:]}
        if not len(value) or min(prompt.min(), ordinal.min()) < 0:
            raise ValueError("no scores")
        shape = (int(prompt.max()) + 1, int(ordinal.max()) + 1)
        if shape[0] * shape[1] > len(value):
            raise ValueError("prompts or images are missing")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['damaged'])[0]}") from None
    (phase, phases), (scorer, scorers), (metric, metrics) = (coded[name] for name in ("phase", "scorer", "metric"))
    code = (phase * len(scorers) + scorer) * len(metrics) + metric
    found: dict[str, dict[str, Array]] = {"before": {}, "after": {}}
    for one in np.flatnonzero(np.bincount(code)):
        rows = code == one
        cells = prompt[rows].astype(np.int64) * shape[1] + ordinal[rows]
        matrix = np.full(shape, np.nan)
        matrix.flat[cells] = value[rows]
        which, rest = divmod(int(one), len(scorers) * len(metrics))
        name, kind = divmod(rest, len(metrics))
        if np.bincount(cells).max() > 1:
            raise UserError(
                f"{path} holds two scores of one image {phases[which]} training by {scorers[name]}/{metrics[kind]}"
            )
        found.setdefault(phases[which], {})[f"{scorers[name]}/{metrics[kind]}"] = matrix
    strata = [""] * shape[0]
    if "stratum" in coded:
        codes, names = coded["stratum"]
        first = np.unique(prompt, return_index=True)
        for p, row in zip(*first, strict=True):
            strata[int(p)] = names[codes[row]]
    return found["before"], found["after"], tuple(strata)


def _codes(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    """A column of words as numbers and the words."""
    whole = column.combine_chunks()
    return whole.indices.to_numpy(zero_copy_only=False).astype(np.int64), [str(w) for w in whole.dictionary.to_pylist()]


# Making the table


def board(
    runs: Sequence[LoadedRun],
    baseline: str = BASE,
    key: str | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Board:
    """The table of these runs; their order does not matter.

    baseline: the row that others are compared with, a method or a row's label. key: the scorer/metric that ranks, by default
    the first held-out scorer's: methods were not trained on it, and best-of-n was not chosen by it. notes: to stand first.
    Raises UserError when runs do not belong in one table, naming what differs, and on an unknown baseline or key.
    """
    if not runs:
        raise UserError("no runs to compare")
    runs = sorted(runs, key=lambda r: (r.record.method, _settings_text(r.record), r.record.seed, str(r.folder)))
    _one_ground(runs)
    columns = _columns(runs)
    said = [*notes, *_one_base(runs)]
    key = _key(columns, key)
    first, groups = runs[0].record, _groups(runs)
    bases = {c.key: next(r for r in runs if c.key in r.before and c.key in r.after) for c in columns}
    rows = [_base_row(bases)] + [_row(label, group) for label, group in groups.items()]
    chosen = _baseline(rows, baseline)

    scored = {label: [r for r in group if key in r.before and key in r.after] for label, group in groups.items()}
    ends = {BASE: [bases[key].before[key]]} | {label: [r.after[key] for r in group] for label, group in scored.items()}
    gains = {label: [r.after[key] - r.before[key] for r in group] for label, group in scored.items()}
    strata = list(bases[key].strata) if len(set(bases[key].strata)) > 1 else None
    order = _order(rows, ends, strata)

    def between(ours: str, theirs: str) -> Contrast:
        if theirs == BASE:  # each run has judged the base itself, on its own machine
            return Contrast(gains[ours], test=True)
        if ours == BASE:
            return Contrast([-gain for gain in gains[theirs]], test=True)
        return Contrast(ends[ours], ends[theirs], test=True, lend=True)

    asked = _Asked()
    _ask_cells(asked, columns, bases, groups)
    for label, end in ends.items():
        if label != chosen.label and end and ends[chosen.label]:
            asked.add((label, key, "versus"), between(label, chosen.label))
    pairs = list(combinations(order, 2))
    for above, label in pairs:
        asked.add((label, key, f"below {above}"), between(above, label))
    # Drawn signs know no p below 1 / resamples, which the correction over many pairs must be able to reach.
    answers = asked.answers(max(resamples, math.ceil(2 * len(pairs) / SURE)) if resamples > 1 else 1, seed, strata)

    ranks = _ranks(order, _told({pair: answers[pair[1], key, f"below {pair[0]}"] for pair in pairs}))
    holm = _holm({label: answers[label, key, "versus"] for label in order if (label, key, "versus") in answers})
    place = {label: k for k, label in enumerate(order)}
    done = [
        replace(
            row,
            cells=_cells(row.label, columns, bases, groups, answers),
            versus=answers.get((row.label, key, "versus")),
            rank=ranks.get(row.label),
            holm=holm.get(row.label, math.nan),
        )
        for row in sorted(rows, key=lambda r: (place.get(r.label, len(rows)), r.label))
    ]
    return Board(
        task=first.task,
        task_version=first.task_version,
        model=first.model,
        weights=str(first.provenance.get("weights", "")),
        dtype=str(first.provenance.get("dtype", "")),
        budget=_budget(first),
        evaluation=dict(first.config.get("evaluation", {})),
        prompts=dict(first.prompts),
        scorers={name: text for r in reversed(runs) for name, text in _ids(r.record).items()},
        key=key,
        baseline=chosen.label,
        columns=tuple(columns),
        rows=tuple(done),
        notes=tuple(said + _notes(done, columns, key, runs)),
        reported=tuple(paper_numbers.beside(first.task, first.model)),
    )


Question = tuple[str, str, str]  # row, column, what of it


class _Asked:
    """Contrasts to be answered all at once, equal ones only once."""

    def __init__(self) -> None:
        self._contrasts: list[Contrast] = []
        self._where: dict[Question, int] = {}
        self._seen: dict[bytes, int] = {}

    def add(self, question: Question, contrast: Contrast) -> None:
        one = len(contrast.ours) == 1 and not contrast.theirs and not contrast.test
        print_ = np.ascontiguousarray(contrast.ours[0]).tobytes() if one else None
        if print_ is not None and print_ in self._seen:
            self._where[question] = self._seen[print_]
            return
        self._where[question] = len(self._contrasts)
        if print_ is not None:
            self._seen[print_] = len(self._contrasts)
        self._contrasts.append(contrast)

    def answers(self, resamples: int, seed: int, strata: Sequence[str] | None) -> dict[Question, Estimate]:
        found = intervals.crossed(self._contrasts, resamples=resamples, seed=seed, strata=strata)
        return {question: found[i] for question, i in self._where.items()}


def _ask_cells(
    asked: _Asked, columns: Sequence[Column], bases: Mapping[str, LoadedRun], groups: Mapping[str, Sequence[LoadedRun]]
) -> None:
    """Before, after and difference of every row in every column."""
    for c in columns:
        asked.add((BASE, c.key, "after"), Contrast([bases[c.key].before[c.key]]))
        for label, group in groups.items():
            mine = [r for r in group if c.key in r.before and c.key in r.after]
            if mine:
                gains = [r.after[c.key] - r.before[c.key] for r in mine]
                asked.add((label, c.key, "after"), Contrast([r.after[c.key] for r in mine]))
                asked.add((label, c.key, "before"), Contrast([mine[0].before[c.key]]))
                asked.add((label, c.key, "delta"), Contrast(gains, test=True))


def _cells(
    label: str,
    columns: Sequence[Column],
    bases: Mapping[str, LoadedRun],
    groups: Mapping[str, Sequence[LoadedRun]],
    answers: Mapping[Question, Estimate],
) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for key in (c.key for c in columns if (label, c.key, "after") in answers):
        before, delta = (answers.get((label, key, what)) for what in ("before", "delta"))
        counts = _counts(groups.get(label, [bases[key]]), key, base=label == BASE)
        found[key] = Cell(answers[label, key, "after"], before, delta, *counts)
    return found


def _order(rows: Sequence[BoardRow], ends: Mapping[str, Sequence[Array]], strata: Sequence[str] | None) -> list[str]:
    """The rows that are ranked, by falling mean over the images that all of them have a score of, as pairs are compared."""
    labels = [r.label for r in rows if not r.invalid and ends[r.label]]
    whole = np.isfinite(np.stack([end for label in labels for end in ends[label]])).all(0) if labels else np.array(True)
    shared = {label: [np.where(whole, end, np.nan) for end in ends[label]] for label in labels}
    # for the means alone
    means = intervals.crossed([Contrast(shared[label]) for label in labels], resamples=1, strata=strata)
    mean = {label: e.mean for label, e in zip(labels, means, strict=True) if math.isfinite(e.mean)}
    return sorted(mean, key=lambda label: (-mean[label], label))


def _holm(versus: Mapping[str, Estimate]) -> dict[str, float]:
    tested = {label: e.p for label, e in versus.items() if e.p is not None}
    return dict(zip(tested, significance.holm(list(tested.values())), strict=True))


def _told(differences: Mapping[tuple[str, str], Estimate]) -> set[tuple[str, str]]:
    """The pairs (above, below) of which the first beats the second, by p corrected over all pairs."""
    corrected = significance.holm([math.nan if e.p is None else e.p for e in differences.values()])
    return {pair for (pair, e), p in zip(differences.items(), corrected, strict=True) if e.mean > 0 and p < SURE}


def _ranks(order: Sequence[str], told: set[tuple[str, str]]) -> dict[str, int]:
    """One more than the rows that beat a row, behind each of them, and never before the row above.

    Not row by row: in a long table every neighbour may be in doubt while the first and the last are not.
    """
    ranks: dict[str, int] = {}
    for place, label in enumerate(order):
        better = [above for above in order[:place] if (above, label) in told]
        least = ranks[order[place - 1]] if place else 1
        ranks[label] = max(least, 1 + len(better), *(1 + ranks[above] for above in better))
    return ranks


def _counts(group: Sequence[LoadedRun], key: str, base: bool) -> tuple[int, int]:
    """Images a seed, and how many of all seeds could not be scored."""
    looks = [look[key] for r in group for look in ((r.before,) if base else (r.before, r.after)) if key in look]
    return looks[0].size, int(sum(np.isnan(look).sum() for look in looks))


def _missing(looks: Sequence[Mapping[str, Array]]) -> float:
    """The largest share of images without a score, over scorers and metrics."""
    return max((float(np.isnan(scores).mean()) for look in looks for scores in look.values()), default=1.0)


def _base_row(bases: Mapping[str, LoadedRun]) -> BoardRow:
    invalid = _missing([{key: run.before[key]} for key, run in bases.items()]) > record.INVALID
    return BoardRow(BASE, BASE, "base", (), (), {}, {}, invalid=invalid)


def _row(label: str, group: Sequence[LoadedRun]) -> BoardRow:
    records = [r.record for r in group]
    currencies = dict.fromkeys(c for r in records for c in r.spent)
    method = records[0].method
    return BoardRow(
        label=label,
        method=method,
        kind="baseline" if method.partition(":")[0] in MANDATORY else "method",
        seeds=tuple(r.seed for r in records),
        folders=tuple(str(r.folder) for r in group),
        settings=_settings(records[0]),
        cells={},
        cmmd=_cmmd(records),
        spent={c: float(np.mean([r.spent[c] for r in records if c in r.spent])) for c in currencies},
        hacked=sum(map(record.flagged, records)),
        invalid=any(r.flags.invalid for r in records)
        or _missing([s for r in group for s in (r.before, r.after)]) > record.INVALID,
        trials=max(int(r.tuning.get("trials", 0)) for r in records),
        revisions=tuple(dict.fromkeys(str(r.provenance.get("revision", "")) for r in records)),
    )


def _cmmd(records: Sequence[Record]) -> dict[str, Estimate]:
    """Embedder -> the mean over seeds of CMMD, which has no value by prompt: a seed's own interval stands for the prompts'
    spread, which seeds share, and the seeds' spread is added; normal, stretched for few seeds."""
    from scipy.stats import t

    found: dict[str, Estimate] = {}
    for name in dict.fromkeys(name for r in records for name in r.cmmd):
        numbers = [r.cmmd[name] for r in records if name in r.cmmd]
        means = np.array([math.nan if n.mean is None else n.mean for n in numbers])
        ends = np.array([[math.nan if end is None else end for end in n.ci] for n in numbers])
        mean, s = float(means.mean()), len(numbers)
        if s == 1:
            found[name] = Estimate(mean, float(ends[0, 0]), float(ends[0, 1]), numbers[0].n)
            continue
        v_prompt = float((((ends[:, 1] - ends[:, 0]) / (2 * 1.96)) ** 2).mean())
        v_seed = float(means.var(ddof=1)) / s
        n, total = min(number.n for number in numbers), v_prompt + v_seed
        df = total**2 / (v_prompt**2 / max(n - 1, 1) + v_seed**2 / (s - 1)) if total > 0 else 1.0
        half = float(t.ppf(0.975, df)) * math.sqrt(total)
        found[name] = Estimate(mean, mean - half, mean + half, n, math.sqrt(total), seeds=s)
    return found


# What belongs in one table


def _one_ground(runs: Sequence[LoadedRun]) -> None:
    """Raise UserError, naming both values, where two runs differ in what a table must not mix, or are the same."""
    first, seen = runs[0], dict[tuple[str, int], LoadedRun]()
    ids: dict[str, tuple[str, LoadedRun]] = {}
    for run in runs:
        for (what, a), (_, b) in zip(_ground(first), _ground(run), strict=True):
            for part in dict.fromkeys([*a, *b]):
                if a.get(part) != b.get(part):
                    raise _differ(f"{what} {part}".strip(), first, a.get(part, "none"), run, b.get(part, "none"))
        for name, text in _ids(run.record).items():
            other, where = ids.setdefault(name, (text, run))
            if other != text:
                raise _differ(f"scorer id of {name}", where, other, run, text)
        twin = seen.setdefault((_settings_text(run.record), run.record.seed), run)
        if twin is not run:
            raise UserError(
                f"the same run twice, {run.record.method} with seed {run.record.seed}: {twin.folder} and {run.folder}"
            )


def _ground(run: LoadedRun) -> Iterator[tuple[str, dict[str, Any]]]:
    """What runs of one table share."""
    r = run.record
    yield "task", {"": r.task}
    yield "task version", {"": r.task_version}
    yield "model", {"": r.model}
    yield "weights of the model", {"": r.provenance.get("weights", "")}
    yield "budget", _budget(r)
    yield "evaluation", dict(r.config.get("evaluation", {}))
    yield "prompts of split", dict(r.prompts)
    yield "training scorer", {"": next((n for n, s in r.scorers.items() if s.role == "training"), "none")}
    yield "number of prompts and images", {"": next(iter(run.after.values())).shape if run.after else "none"}
    yield "strata of the prompts", {"": sorted(set(run.strata))}


def _differ(what: str, a: LoadedRun, mine: Any, b: LoadedRun, other: Any) -> UserError:
    hint = (
        " (--task takes one, --across sums them up)"
        if what == "task"
        else " (name the runs, or the JSON file that `compare` wrote about them)"
        if what.startswith(("budget", "evaluation"))
        else ""
    )
    return UserError(
        f"these runs differ in {what}: {mine} in {a.folder} and {other} in {b.folder}; a table never mixes them{hint}"
    )


def _budget(r: Record) -> dict[str, float]:
    """The bounds; what they are called does not matter."""
    return {k: v for k, v in r.config.get("budget", {}).items() if k != "name"}


def _ids(r: Record) -> dict[str, str]:
    return {name: s.id for name, s in r.scorers.items()} | {f"embedder {n}": i for n, i in r.embedders.items()}


def _one_base(runs: Sequence[LoadedRun]) -> list[str]:
    """Notes on where the base's scores are not the same in all runs. Raises UserError where they are of another base."""
    notes: list[str] = []
    apart: dict[str, float] = {}
    known: dict[str, LoadedRun] = {}
    for run in runs:
        for key, scores in run.before.items():
            first = known.setdefault(key, run)
            a, b = first.before[key], scores
            if np.allclose(a, b, rtol=0, atol=1e-6, equal_nan=True):
                continue
            both = np.isfinite(a) & np.isfinite(b)
            means = (float(a[both].mean()), float(b[both].mean())) if both.any() else (0.0, 0.0)
            spread = float(np.nanstd(intervals.per_prompt(a))) if both.any() else 0.0
            if abs(means[0] - means[1]) > AGREE * spread:
                raise _differ(f"the base's {key} on the same prompts and noise", first, means[0], run, means[1])
            apart[key] = max(apart.get(key, 0.0), abs(means[0] - means[1]))
    if apart:
        said = ", ".join(f"{key} by {gap:.2g}" for key, gap in apart.items())
        notes.append(f"{APART} in all runs, as another machine's last bits make them: {said} in the mean.")
    return notes


def _columns(runs: Sequence[LoadedRun]) -> list[Column]:
    keys = dict.fromkeys(key for run in runs for key in run.after if key in run.before)
    roles: dict[str, Role] = {name: use.role for run in runs for name, use in run.record.scorers.items()}
    found: list[Column] = []
    for key in keys:
        scorer = key.partition("/")[0]
        kind = scorer.partition("-")[0]
        other: Role = "diversity" if kind == "diversity" else "drift" if kind == "drift" else "further"
        found.append(Column(key, roles.get(scorer, other)))
    if not found:
        raise UserError("these runs hold no scores of both the base and the result")
    return sorted(found, key=lambda c: (ROLES.index(c.role), *_place(c.key)))


def _place(key: str) -> tuple[str, int, str]:
    """Scorers by name; of each, what is right or wrong first."""
    scorer, _, metric = key.partition("/")
    return scorer, metric not in ("exact", "correct"), metric


def _key(columns: Sequence[Column], key: str | None) -> str:
    scored = [c for c in columns if c.role not in ("diversity", "drift")]
    if key is not None:
        if key not in {c.key for c in scored}:
            raise registry.unknown("scorer/metric", key, [c.key for c in scored])
        return key
    best = next((c for c in scored if c.role == "held-out"), None) or next(iter(scored), None)
    if best is None:
        raise UserError("these runs hold no scores to rank by")
    return best.key


def _groups(runs: Sequence[LoadedRun]) -> dict[str, list[LoadedRun]]:
    """Label -> the seeds of one method with one set of settings; settings are named where a method comes with several."""
    by: dict[str, dict[str, list[LoadedRun]]] = {}
    for run in runs:
        by.setdefault(run.record.method, {}).setdefault(_settings_text(run.record), []).append(run)
    found: dict[str, list[LoadedRun]] = {}
    for method, sets in by.items():
        flat = [dict(_flat(_settings(group[0].record))) for group in sets.values()]
        differ = [k for k in dict.fromkeys(k for f in flat for k in f) if len({str(f.get(k)) for f in flat}) > 1]
        for f, group in zip(flat, sets.values(), strict=True):
            said = ", ".join(f"{k.removeprefix('settings.')}={f.get(k, 'none')}" for k in differ)
            # A method may be called as the row of the base is.
            found[f"{method} ({said})" if said else f"{BASE} (method)" if method == BASE else method] = group
    return found


def _settings(r: Record) -> dict[str, Any]:
    """What makes a row: all of the configuration that is neither the seed nor shared by the table."""
    return {k: v for k, v in r.config.items() if k in ("settings", "adapter", "precision", "reward", "sources")}


def _settings_text(r: Record) -> str:
    return json.dumps([r.method, _settings(r)], sort_keys=True)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{key}", value


def _baseline(rows: Sequence[BoardRow], name: str) -> BoardRow:
    exact = [r for r in rows if r.label == name]
    mine = exact or [r for r in rows if r.method == name]
    if not mine:
        raise registry.unknown("baseline", name, [r.label for r in rows])
    if len(mine) > 1:
        raise UserError(f"the baseline {name!r} has several rows, name one: {'; '.join(r.label for r in mine)}")
    return mine[0]


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _notes(rows: Sequence[BoardRow], columns: Sequence[Column], key: str, runs: Sequence[LoadedRun]) -> list[str]:
    notes: list[str] = []
    methods = {r.method.partition(":")[0] for r in rows}
    missing = [name for name in MANDATORY if name not in methods]
    if missing:
        notes.append(f"Rows that every table should have and this one lacks: {', '.join(missing)}.")
    seeds = Counter(row.seeds for row in rows if row.kind != "base")
    if len(seeds) > 1:
        usual = seeds.most_common(1)[0][0]
        others = "; ".join(f"{r.label} {_list(r.seeds)}" for r in rows if r.kind != "base" and r.seeds != usual)
        notes.append(f"Not all rows have the seeds {_list(usual)}: {others}.")
    by_folder = {str(r.folder): r for r in runs}
    for row in rows:
        mine = [by_folder[folder] for folder in row.folders]
        if mine and all(
            np.array_equal(r.before[k], r.after[k], equal_nan=True) for r in mine for k in r.after if k in r.before
        ):
            updates = row.spent.get("updates", 0)
            notes.append(
                f"{row.label} changed no score of any image; it made {updates:,.0f} updates within the budget."
            )
        if row.invalid:
            notes.append(
                f"{row.label}: more than {100 * record.INVALID:g} % of the images could not be scored, so it is not ranked."
            )
    for scorer in dict.fromkeys(c.key.partition("/")[0] for c in columns):
        judged = [r for r in rows if any(key.partition("/")[0] == scorer for key in r.cells)]
        if len(judged) < len(rows):
            notes.append(f"{scorer} judged {len(judged)} of {len(rows)} rows: {', '.join(r.label for r in judged)}.")
    role = next(c.role for c in columns if c.key == key)
    if role == "training" and "best-of-n" in methods:
        notes.append(f"best-of-n was chosen by {key.partition('/')[0]} itself: in this ranking its place says nothing.")
    machines = {str(r.record.provenance.get("machine", "")) for r in runs}
    if len(machines) > 1:
        notes.append(f"Seconds were measured on {len(machines)} machines and do not compare.")
    return notes
