"""A grid of runs under one budget, every method on every task from every seed, and beside them the rows any method must beat.

Each run of the grid is an ordinary one: the same command line, the same directory, recognised by its hash wherever it was made.
A file beside the run directories says which belong together, how each was made and what all of them cost.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .. import registry
from ..budget import CURRENCIES, Budget
from ..errors import Interrupted, UserError
from ..evaluation import record
from ..evaluation.record import Record
from ..files import write_atomically
from ..progress import NullProgress, Progress
from ..scoring.references import ScorerReference
from ..spec import Search
from .config import EXECUTION, Config, resolve
from .in_process import run_in_process
from .jobs import Job, make_folder, run_jobs, spent_so_far
from .run_dir import is_locked

MANDATORY = ("sft", "best-of-n")  # what any method must beat; the base is in every record
COMMON = ("adapter", "evaluation", "precision", "scorer", "tuned", *EXECUTION)  # settings that every method has


@dataclass(frozen=True)
class Grid:
    """What to compare; everything that has a default holds for every run alike."""

    methods: Sequence[str]
    tasks: Sequence[str]
    model: str
    seeds: int | Sequence[int] = 3  # so many, from 0 on, or these
    budget: str | None = None
    reward: str | None = None
    sets: Sequence[str] = ()  # key=value for all, METHOD/key=value for one
    configs: Sequence[str] = ()  # FILE for all, METHOD=FILE instead of it for one
    scorer_locations: Sequence[str] = ()  # NAME=URL
    baselines: bool = True  # sft and best-of-n too

    def __post_init__(self) -> None:
        for option, given in (("--methods", self.methods), ("--task", self.tasks), ("--seeds", self.every_seed())):
            if not given:
                raise UserError(f"{option} names nothing to compare")

    def every_seed(self) -> tuple[int, ...]:
        """The training seeds, each once."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(dict.fromkeys(self.seeds))

    def command(self) -> str:
        """What a person types for the same comparison."""
        seeds = str(self.seeds) if isinstance(self.seeds, int) else ",".join(map(str, self.seeds)) + ","
        words = ["gpobench", "compare", "--methods", ",".join(self.methods), "--task", ",".join(self.tasks)]
        words += ["--model", self.model, "--seeds", seeds]
        words += ["--budget", self.budget] if self.budget else []
        words += ["--reward", self.reward] if self.reward else []
        for option, texts in (("--config", self.configs), ("--set", self.sets), ("--scorer-at", self.scorer_locations)):
            words += [word for text in texts for word in (option, text)]
        return shlex.join([*words, *([] if self.baselines else ["--no-baselines"])])


@dataclass
class PlannedRun:
    """One cell of the grid, and what came of it."""

    number: int  # from 1
    plan: Config
    words: Sequence[str]  # its command, behind `gpobench`
    run_dir: Path
    how: str = ""  # found | resumed | made
    done: Record | None = None
    failed: str = ""  # why there is no record

    @property
    def state(self) -> str:
        return "done" if self.done else "failed" if self.failed else "waiting"

    @property
    def fraction(self) -> float:
        """How much of its budget is spent, as far as the disk knows."""
        so_far = spent_so_far(self.run_dir)
        share = max((so_far.get(c, 0.0) / bound for c, bound in self.plan.budget.bounds().items()), default=0.0)
        return 1.0 if self.done else min(1.0, share)

    def __str__(self) -> str:
        leaf = lambda name: Path(name).name if ".py:" in name else name
        return f"{leaf(self.plan.method)} on {leaf(self.plan.task)}, seed {self.plan.seed}"


# What a person writes


def split(texts: Iterable[str]) -> list[str]:
    """`a,b` and `c` as a, b, c."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def seeds(text: str) -> int | tuple[int, ...]:
    """`3` is so many seeds, from 0 on; `0,4` is these two, and `4,` that one. Raises UserError on anything else."""
    try:
        return tuple(int(part) for part in split([text])) if "," in text else int(text)
    except ValueError:
        raise UserError(f"--seeds is a number of seeds, or seeds with commas between, got {text!r}") from None


def _once(kind: str, names: Sequence[str]) -> dict[str, str]:
    """What identifies a part -> how it is called: aliases and two ways to one file are one."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(_identity(kind, name), registry.canonical(kind, name))
    return found


def _identity(kind: str, name: str) -> str:
    file, _, leaf = name.rpartition(":")
    return f"{Path(file).resolve()}:{leaf}" if file.endswith(".py") else registry.canonical(kind, name)


def _setting(text: str) -> tuple[str, str]:
    """METHOD/key=value as METHOD and key=value; "" stands for all. Behind the `=` a slash means nothing."""
    key, equals, value = text.partition("=")
    method, _, key = key.rpartition("/")  # a file's method has slashes of its own
    return method.strip(), f"{key}{equals}{value}"


def _file(text: str) -> tuple[str, str]:
    """METHOD=FILE as METHOD and FILE; "" stands for all."""
    method, equals, path = text.partition("=")
    return (method.strip(), path.strip()) if equals and not Path(text).is_file() else ("", text)


def _sorted(texts: Iterable[tuple[str, str]], methods: Mapping[str, str]) -> dict[str, list[str]]:
    """Identity -> what was said for this method alone, "" -> for all. methods: identity -> name."""
    found: dict[str, list[str]] = {identity: [] for identity in ("", *methods)}
    for method, text in texts:
        identity = _identity("method", method)
        if identity not in found:
            raise registry.unknown("method of this comparison", method, methods.values())
        found[identity].append(text)
    return found


# The plan


def plan(grid: Grid, out: Path) -> list[PlannedRun]:
    """Every run, resolved: a wrong name or setting anywhere is refused here, before anything runs.

    Seed by seed, so that what is done when time is up is a whole comparison. A plain setting holds for every method that was
    named; the rows that stand there by rule take the ones they have.
    """
    named = _once("method", grid.methods)
    methods = {**named, **(_once("method", MANDATORY) if grid.baselines else {})}
    own, files = _sorted(map(_setting, grid.sets), methods), _sorted(map(_file, grid.configs), methods)
    if twice := next((texts for texts in files.values() if len(texts) > 1), None):
        raise UserError(f"--config {twice[1]}: {twice[0]} is given already; one file for all, one for each method")
    runs: list[PlannedRun] = []
    for seed in grid.every_seed():
        for task in _once("task", grid.tasks).values():
            for identity, method in methods.items():
                sets = [text for text in own[""] if identity in named or _has(method, text)] + own[identity]
                config = next(iter(files[identity] or files[""]), None)
                try:
                    resolved = _resolved(grid, method, task, seed, sets, config)
                except UserError as error:
                    raise UserError(f"{method}: {error}{_hint(method, own[''], methods.values())}") from None
                _sound(resolved, identity in named)
                words = [*_words(grid, method, task, seed, sets, config), "--out", str(out)]
                runs.append(PlannedRun(len(runs) + 1, resolved, words, out / resolved.slug()))
    return runs


def _resolved(grid: Grid, method: str, task: str, seed: int, sets: Sequence[str], config: str | None) -> Config:
    return resolve(
        method,
        task,
        grid.model,
        seed=seed,
        budget=grid.budget,
        reward=grid.reward,
        config=Path(config) if config else None,
        sets=sets,
        scorer_locations=grid.scorer_locations,
    )


def _words(grid: Grid, method: str, task: str, seed: int, sets: Sequence[str], config: str | None) -> list[str]:
    """The command line that `_resolved` answers to."""
    words = ["run", "--method", method, "--task", task, "--model", grid.model, "--seed", str(seed)]
    for option, text in (("--budget", grid.budget), ("--reward", grid.reward), ("--config", config)):
        words += [option, text] if text else []
    return words + [
        w
        for option, texts in (("--set", sets), ("--scorer-at", grid.scorer_locations))
        for t in texts
        for w in (option, t)
    ]


def _hint(method: str, common: Sequence[str], methods: Iterable[str]) -> str:
    """How to say a setting that some methods have and this one has not."""
    lacking = [text for text in common if not _has(method, text) and any(_has(other, text) for other in methods)]
    return f"; for those that have it: --set METHOD/{lacking[0]}" if lacking else ""


def _has(method: str, text: str) -> bool:
    """Does a setting mean anything to a method?"""
    key = text.partition("=")[0].strip().partition(".")[0]
    return key in COMMON or key in {f.name for f in fields(registry.load("method", method))}


def _sound(config: Config, named: bool) -> None:
    """Refuse what is sure to fail hours later: an unknown scorer, a row of ours that this budget says nothing about."""
    ScorerReference.parse(config.reward).check_registered()
    counted = {"nfe", "images", "reward_calls", "flops"}
    if not named and isinstance(config.settings, Search) and not counted & set(config.budget.bounds()):
        raise UserError(
            f"{config.method}, a row of every comparison, cannot tell how many images this budget affords: "
            "bound nfe or images too, or leave it out with --no-baselines"
        )


def commands(grid: Grid, out: Path) -> list[str]:
    """Every run as a whole command of its own, in the order of the grid, quoted for a shell."""
    return [shlex.join(["gpobench", *run.words]) for run in plan(grid, out)]


# The work


def compare(
    grid: Grid, *, out: Path, progress: Progress, jobs: int = 1, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Do every run that is not done yet; returns what the manifest holds, and where it is (`path`).

    A run that fails is tried once more, in a process of its own, when all others are through; it stops none of them. jobs:
    runs at once; more than one run in processes of their own. out: where run directories are made.
    Raises UserError on a grid that cannot be as it stands, Interrupted when asked to stop.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare starts its runs itself: give the commands of --print to accelerate launch, one by one")
    runs = plan(grid, out)
    make_folder(out / "logs")
    work = _Work(grid, runs, out, progress, interrupted)
    work.find()
    _installed([run.plan for run in runs if run.done is None])
    for attempt in (1, 2):
        for left in work.left():
            if attempt == 1 and jobs == 1:
                work.here(left)
            else:
                work.apart(left, jobs, again=attempt == 2)
    return work.keep()


def _installed(plans: Iterable[Config]) -> None:
    """Refuse a grid whose training or held-out scorers cannot be made here: every one of its runs would fail by it, twice."""
    wanted: dict[ScorerReference, None] = {}
    for plan in {(plan.task, plan.reward): plan for plan in plans}.values():
        exam, domain = registry.load("task", plan.task)(), plan.model_spec().domain
        own = [ScorerReference.single(name) for name in (exam.reward(domain), *exam.held_out(domain))]
        scorers = [*ScorerReference.parse(plan.reward).scorers, *own]
        wanted |= dict.fromkeys(scorer for scorer in scorers if scorer.at(plan.scorer_locations) is None)
    for scorer in wanted:
        registry.scorer(scorer.text)  # raises Missing, which says what to install


class _Work:
    """The runs of a grid on their way, the bar they move and the manifest that is kept meanwhile."""

    def __init__(
        self, grid: Grid, runs: Sequence[PlannedRun], out: Path, progress: Progress, interrupted: Callable[[], bool]
    ):
        self._grid, self._runs, self._out, self._view, self._interrupted = grid, runs, out, progress, interrupted
        self._path = out / f"compare-{_slug(runs)}.json"
        self._from = record.provenance()
        self._said: set[str] = set()
        self._at: dict[int, float] = {}  # run -> the share of it that the bar has been told of

    def find(self) -> None:
        """Read what is done, and set up the bar: a run is as long as what is left of its budget."""
        for run in self._runs:
            run.how = "resumed" if (run.run_dir / "metrics.jsonl").is_file() else "made"
            if (run.run_dir / "record.json").is_file():
                run.how = "found"
                run.done, run.failed = run_in_process(
                    run.plan, runs=self._out, log=self._log(run), progress=NullProgress()
                )
        self.keep()
        self._at = {run.number: run.fraction for run in self._runs}
        left = sum(run.done is None for run in self._runs)
        if left < len(self._runs):
            commits = {str(run.done.provenance.get("revision", "")) for run in self._runs if run.done}
            other = commits - {str(self._from.get("revision", ""))}
            by = f", by other code than this ({', '.join(sorted(c[:12] for c in other))})" if any(other) else ""
            self._view.say(f"{len(self._runs) - left} of {len(self._runs)} runs are already done{by}")
        if left:
            total = sum(1 - self._at[run.number] for run in self._runs)
            self._view.phase(f"{left} run{'s' if left > 1 else ''}", max(total, 1e-9))

    def left(self) -> Iterator[list[PlannedRun]]:
        """What is not done: first all that nobody is at work on, then, one by one, what another process had begun."""
        todo = [run for run in self._runs if run.done is None]
        others = [run for run in todo if is_locked(run.run_dir)]
        if free := [run for run in todo if run not in others]:
            yield free
        for run in others:
            self._view.say(f"run {run.number}: another process is at work on it; waiting for that to end")
            while is_locked(run.run_dir):
                if self._interrupted():
                    raise self._stop()
                time.sleep(1)
            yield [run]

    def here(self, left: Sequence[PlannedRun]) -> None:
        """One after another in this process."""
        for run in left:
            if self._interrupted():
                raise self._stop()
            self._begins(run)
            inside = _Inside(self._view, lambda fraction, run=run: self._reach(run, fraction), self._said)
            try:
                done, why = run_in_process(
                    run.plan, runs=self._out, log=self._log(run), progress=inside, interrupted=self._interrupted
                )
            except Interrupted as stop:
                raise self._stop(f"run {run.number} {str(stop).partition(';')[0]}") from None
            self._ends(run, done, why, last=False)
        _let_go()

    def apart(self, left: Sequence[PlannedRun], jobs: int, again: bool) -> None:
        """So many at once in processes of their own, where nothing of an earlier failure is left."""
        if again:
            them = "one run failed and is" if len(left) == 1 else f"{len(left)} runs failed and are"
            self._view.say(f"{them} tried once more")
            for run in left:
                run.failed = ""

        def ends(k: int, why: str) -> None:
            run, done = left[k], None
            if not why:
                try:
                    done = record.read(run.run_dir / "record.json")
                except UserError as error:
                    why = "" if self._interrupted() else f"stopped before its end ({error})"
            self._ends(run, done, why, last=again)

        def look() -> None:
            for run in left:
                if run.state == "waiting":
                    self._reach(run, run.fraction)

        work = [Job(run.words, self._log(run)) for run in left]
        begins = lambda k: self._begins(left[k])
        if not run_jobs(work, jobs, begins=begins, ends=ends, meanwhile=look, interrupted=self._interrupted):
            raise self._stop()

    def keep(self) -> dict[str, Any]:
        """Write down how things stand, whole or not at all; returns it."""
        found = _manifest(self._grid, self._runs, self._from)
        write_atomically(self._path, lambda p: p.write_text(json.dumps(found, indent=1) + "\n", "utf-8"))
        return {**found, "path": str(self._path)}

    def _begins(self, run: PlannedRun) -> None:
        self._view.say(f"run {run.number} of {len(self._runs)}: {run}" + (", going on" if run.fraction else ""))

    def _ends(self, run: PlannedRun, done: Record | None, why: str, last: bool) -> None:
        run.done, run.failed = done, why
        if done:
            key = _keys(done)[0]
            mean = done.delta[key].mean
            gain = "not scored" if mean is None or not math.isfinite(mean) else f"{mean:+.3f}"
            self._view.say(f"run {run.number} done: {key} {gain}, ended by {done.stop}")
        elif why:
            self._view.say(f"run {run.number} failed: {why}")
        if done or last:
            self._reach(run, 1.0)
        self.keep()

    def _reach(self, run: PlannedRun, fraction: float) -> None:
        if fraction > self._at[run.number]:
            self._view.advance(fraction - self._at[run.number])
            self._at[run.number] = fraction

    def _log(self, run: PlannedRun) -> Path:
        return self._out / "logs" / f"{run.run_dir.name}.log"

    def _stop(self, where: str = "stopped") -> Interrupted:
        self.keep()
        done = sum(run.done is not None for run in self._runs)
        return Interrupted(f"{where}, {done} of {len(self._runs)} runs are done; the same command goes on")


@dataclass(frozen=True)
class _Inside:
    """What a run shows, seen from the grid: its lines, and how far it is."""

    progress: Progress
    reach: Callable[[float], None]
    said: set[str]  # by any run of the grid

    def say(self, text: str) -> None:
        # That a scorer is not installed holds for the whole grid.
        if text not in self.said or not text.startswith("not judged by "):
            self.progress.say(text)
        self.said.add(text)

    def phase(self, name: str, total: float) -> None: ...
    def advance(self, by: float) -> None: ...

    def status(self, fraction: float, numbers: Mapping[str, float]) -> None:
        self.reach(fraction)


def _let_go() -> None:
    """Give back the memory of the device that runs in this process took: a second attempt needs it elsewhere."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a device that a run has broken
            torch.cuda.empty_cache()


# The manifest


def _slug(runs: Sequence[PlannedRun]) -> str:
    """The tasks, the model, and a hash of which runs these are: their order does not matter."""
    text = "\n".join(sorted(run.run_dir.name for run in runs))
    names = [*dict.fromkeys(Path(run.plan.task).name for run in runs), Path(runs[0].plan.model).name]
    clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in "-".join(names))
    return f"{clean}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _manifest(grid: Grid, runs: Sequence[PlannedRun], provenance: Mapping[str, Any]) -> dict[str, Any]:
    budget: Budget = runs[0].plan.budget
    spends = [_spent(run) for run in runs]
    return {
        "kind": "compare",
        "command": grid.command(),
        "model": grid.model,
        "budget": {"name": budget.name, **budget.bounds()},
        "runs": [_facts(run, paid) for run, paid in zip(runs, spends, strict=True)],
        **{state: sum(run.state == state for run in runs) for state in ("done", "failed", "waiting")},
        "spent": {c: sum(paid.get(c, 0.0) for paid in spends) for c in CURRENCIES},
        "provenance": dict(provenance),
    }


def _facts(run: PlannedRun, paid: Mapping[str, float]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "run": run.run_dir.name,
        "method": run.plan.method,
        "task": run.plan.task,
        "seed": run.plan.seed,
        "state": run.state,
        "how": run.how,
        "reason": run.failed,
        "run_dir": str(run.run_dir),
        "command": shlex.join(["gpobench", *run.words]),
        "spent": dict(paid),
    }
    if run.done is not None:
        shown, trained = _keys(run.done)
        facts |= {
            "stop": run.done.stop,
            "flags": run.done.flags.model_dump(),
            "key": shown,
            "delta": json.loads(run.done.delta[shown].model_dump_json()),
            "training_key": trained,
            "training_delta": json.loads(run.done.delta[trained].model_dump_json()),
        }
    return facts


def _spent(run: PlannedRun) -> dict[str, float]:
    """What a run has cost, one that is not done up to its last complete iteration."""
    return dict(run.done.spent) if run.done else spent_so_far(run.run_dir)


def _keys(done: Record) -> tuple[str, str]:
    """The `scorer/metric` that leaderboards rank by, of a held-out scorer, and the training scorer's.

    Of several scorers the first by name, of its metrics what is right or wrong.
    """

    def first(role: str) -> str | None:
        names = {name for name, scorer in done.scorers.items() if scorer.role == role}
        keys = [key.partition("/") for key in done.delta if key.partition("/")[0] in names]
        best = min(keys, key=lambda k: (k[0], k[2] not in ("exact", "correct"), k[2]), default=None)
        return "".join(best) if best else None

    trained = first("training") or next(iter(done.delta))
    return first("held-out") or trained, trained
