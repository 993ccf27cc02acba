"""Comparison: runs every method on every task from every seed under one budget, with the baselines that any method must beat.

Each run is an ordinary one, with the same command line and the same directory, so a run that exists already is not made again.
A manifest beside the run directories lists the runs of the comparison, how each was made and what all of them spent.
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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import registry
from ..budget import CURRENCIES, Budget
from ..errors import Interrupted, UserError
from ..evaluation import record
from ..evaluation.ranking import MANDATORY_BASELINES, primary_key, record_key
from ..evaluation.record import Record
from ..files import make_folder, write_atomically
from ..progress import NullProgress, Progress
from ..scoring.references import ScorerReference
from ..spec import Search
from .config import EXECUTION, Config, RunRequest, resolve
from .in_process import run_in_process
from .jobs import Job, run_jobs, spent_so_far
from .run_dir import is_locked

# Settings that every method has.
COMMON = ("adapter", "evaluation", "precision", "scorer", "tuned", *EXECUTION)


@dataclass(frozen=True)
class Grid:
    """What to compare; the fields with defaults hold for every run."""

    methods: Sequence[str]
    tasks: Sequence[str]
    model: str
    seeds: int | Sequence[int] = 3  # how many, from 0 on, or a list of seeds
    budget: str | None = None
    reward: str | None = None
    sets: Sequence[str] = ()  # key=value for all, METHOD/key=value for one
    configs: Sequence[str] = ()  # FILE for all, METHOD=FILE instead of it for one
    scorer_locations: Sequence[str] = ()  # NAME=URL
    baselines: bool = True  # sft and best-of-n too

    def __post_init__(self) -> None:
        for option, values in (("--methods", self.methods), ("--task", self.tasks), ("--seeds", self.seed_list())):
            if not values:
                raise UserError(f"{option} names nothing to compare")

    def seed_list(self) -> tuple[int, ...]:
        """Return the training seeds, each once."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(dict.fromkeys(self.seeds))

    def command(self) -> str:
        """Return the command line that makes the same comparison."""
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
    """One run of the grid and its result."""

    number: int  # from 1
    config: Config
    words: Sequence[str]  # its command line behind `gpobench`
    run_dir: Path
    origin: str = ""  # found | resumed | made
    record: Record | None = None
    failure: str = ""  # why there is no record

    @property
    def state(self) -> str:
        """done, failed or waiting."""
        return "done" if self.record else "failed" if self.failure else "waiting"

    @property
    def fraction(self) -> float:
        """Share of the budget that is spent, as far as its metrics on disk tell."""
        spent = spent_so_far(self.run_dir)
        share = max((spent.get(c, 0.0) / bound for c, bound in self.config.budget.bounds().items()), default=0.0)
        return 1.0 if self.record else min(1.0, share)

    def __str__(self) -> str:
        leaf = lambda name: Path(name).name if ".py:" in name else name
        return f"{leaf(self.config.method)} on {leaf(self.config.task)}, seed {self.config.seed}"


# Parsing of options


def split(texts: Iterable[str]) -> list[str]:
    """Split `a,b` and `c` into a, b, c."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def seeds(text: str) -> int | tuple[int, ...]:
    """Parse `3`, a number of seeds from 0 on, or `0,4` and `4,`, lists of seeds. Raises UserError on anything else."""
    try:
        return tuple(int(part) for part in split([text])) if "," in text else int(text)
    except ValueError:
        raise UserError(f"--seeds is a number of seeds, or seeds with commas between, got {text!r}") from None


def _by_identity(kind: str, names: Sequence[str]) -> dict[str, str]:
    """Return identity -> name; aliases and two paths to one file are the same part."""
    names_by_identity: dict[str, str] = {}
    for name in names:
        names_by_identity.setdefault(_identity(kind, name), registry.canonical(kind, name))
    return names_by_identity


def _identity(kind: str, name: str) -> str:
    """Return the canonical name of a part, or the absolute path of its file with the name in it."""
    file, _, leaf = name.rpartition(":")
    return f"{Path(file).resolve()}:{leaf}" if file.endswith(".py") else registry.canonical(kind, name)


def _split_setting(text: str) -> tuple[str, str]:
    """Split METHOD/key=value into METHOD and key=value; without METHOD it is "". A slash behind the `=` belongs to the value."""
    key, equals, value = text.partition("=")
    method, _, key = key.rpartition("/")  # path/to/file.py:Name has slashes of its own
    return method.strip(), f"{key}{equals}{value}"


def _split_config(text: str) -> tuple[str, str]:
    """Split METHOD=FILE into METHOD and FILE; without METHOD it is ""."""
    method, equals, path = text.partition("=")
    return (method.strip(), path.strip()) if equals and not Path(text).is_file() else ("", text)


def _by_method(texts: Iterable[tuple[str, str]], methods: Mapping[str, str]) -> dict[str, list[str]]:
    """Group (method, text) pairs by the method's identity; "" holds those for all methods. methods: identity -> name."""
    texts_by_method: dict[str, list[str]] = {identity: [] for identity in ("", *methods)}
    for method, text in texts:
        identity = _identity("method", method)
        if identity not in texts_by_method:
            raise registry.unknown("method of this comparison", method, methods.values())
        texts_by_method[identity].append(text)
    return texts_by_method


# Planning


def plan(grid: Grid, out: Path) -> list[PlannedRun]:
    """Resolve every run of the grid, seed by seed, so that an interrupted grid holds whole comparisons.

    A setting without a method holds for every method that was named; the mandatory baselines take those that they have.
    Raises UserError on a wrong name or setting in any run, before anything runs.
    """
    named = _by_identity("method", grid.methods)
    methods = {**named, **(_by_identity("method", MANDATORY_BASELINES) if grid.baselines else {})}
    sets = _by_method(map(_split_setting, grid.sets), methods)
    files = _by_method(map(_split_config, grid.configs), methods)
    if twice := next((texts for texts in files.values() if len(texts) > 1), None):
        raise UserError(f"--config {twice[1]}: {twice[0]} is given already; one file for all, one for each method")
    runs: list[PlannedRun] = []
    for seed in grid.seed_list():
        for task in _by_identity("task", grid.tasks).values():
            for identity, method in methods.items():
                common = [text for text in sets[""] if identity in named or _takes_setting(method, text)]
                config = next(iter(files[identity] or files[""]), None)
                request = RunRequest(
                    method,
                    task,
                    grid.model,
                    seed=seed,
                    budget=grid.budget,
                    reward=grid.reward,
                    config=Path(config) if config else None,
                    sets=common + sets[identity],
                    scorer_locations=grid.scorer_locations,
                )
                try:
                    resolved = resolve(request)
                except UserError as error:
                    raise UserError(f"{method}: {error}{_hint(method, sets[''], methods.values())}") from None
                _refuse_hopeless(resolved, identity in named)
                words = [*request.words(), "--out", str(out)]
                runs.append(PlannedRun(len(runs) + 1, resolved, words, out / resolved.slug()))
    return runs


def _hint(method: str, common: Sequence[str], methods: Iterable[str]) -> str:
    """Return how to give a setting that other methods have and this one lacks; "" where that is not the error."""
    lacking = [
        text
        for text in common
        if not _takes_setting(method, text) and any(_takes_setting(other, text) for other in methods)
    ]
    return f"; for those that have it: --set METHOD/{lacking[0]}" if lacking else ""


def _takes_setting(method: str, text: str) -> bool:
    """Whether a method has a setting."""
    key = text.partition("=")[0].strip().partition(".")[0]
    return key in COMMON or key in {f.name for f in fields(registry.load("method", method))}


def _refuse_hopeless(config: Config, named: bool) -> None:
    """Raise UserError where a run is sure to fail later: an unknown scorer, or a search baseline that this budget does not bound."""
    ScorerReference.parse(config.reward).check_registered()
    counted = {"nfe", "images", "reward_calls", "flops"}
    if not named and isinstance(config.settings, Search) and not counted & set(config.budget.bounds()):
        raise UserError(
            f"{config.method}, a baseline of every comparison, cannot tell how many images this budget affords: "
            "bound nfe or images too, or leave the baselines out with --no-baselines"
        )


def commands(grid: Grid, out: Path) -> list[str]:
    """Return the command line of every run, quoted for a shell, in the order of the grid."""
    return [shlex.join(["gpobench", *run.words]) for run in plan(grid, out)]


# Running


def compare(
    grid: Grid, *, out: Path, progress: Progress, jobs: int = 1, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Make every run that is not done yet.

    A failed run stops no other. It is tried once more, in a process of its own, when all others have ended.

    Args:
        grid: the runs to make.
        out: where run directories are made.
        progress: shows lines and the share of all runs that is done.
        jobs: runs at once; with more than one, each runs in a process of its own.
        interrupted: returns true when the comparison must stop.

    Returns:
        What the manifest holds, and its `path`.

    Raises:
        UserError: on a grid that cannot run.
        Interrupted: when asked to stop.
    """
    launch = GridLaunch(out, progress, jobs, interrupted)
    launch.check()
    runs = plan(grid, out)
    return make_runs(runs, launch, Manifest(out / f"compare-{slug(runs)}.json", grid))


@dataclass(frozen=True)
class GridLaunch:
    """Where and how runs are made."""

    out: Path  # the folder of run directories
    progress: Progress
    jobs: int = 1  # runs at once; with more than one, each in a process of its own
    interrupted: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Raise UserError where runs cannot be started here."""
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {self.jobs}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "compare starts its runs itself: give the commands of --print to accelerate launch, one by one"
            )


@dataclass(frozen=True)
class Manifest:
    """The file beside the run directories that lists a comparison's runs."""

    path: Path
    grid: Grid
    options: Sequence[str] = ()  # of its command, beside those of the grid
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what it holds beside the runs

    def write(self, runs: Sequence[PlannedRun], provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Write what stands as the runs stand now; returns it, and its path."""
        contents = {**_manifest(self.grid, runs, provenance), **self.more}
        contents["command"] = shlex.join([*shlex.split(self.grid.command()), *self.options])
        write_atomically(self.path, lambda p: p.write_text(json.dumps(contents, indent=1) + "\n", "utf-8"))
        return {**contents, "path": str(self.path)}


def make_runs(runs: Sequence[PlannedRun], launch: GridLaunch, manifest: Manifest) -> dict[str, Any]:
    """Make the runs of a comparison that are not done yet, as `compare` does; returns what the manifest holds, and its `path`."""
    make_folder(launch.out / "logs")
    jobs = launch.jobs
    runner = _GridRunner(runs, launch, manifest)
    runner.read_finished_runs()
    _refuse_missing_scorers([run.config for run in runs if run.record is None])
    for attempt in (1, 2):
        for runs_left in runner.pending():
            if attempt == 1 and jobs == 1:
                runner.run_here(runs_left)
            else:
                runner.run_in_processes(runs_left, jobs, second_attempt=attempt == 2)
    return runner.write_manifest()


def _refuse_missing_scorers(configs: Iterable[Config]) -> None:
    """Raise Missing, which says what to install, where a training or held-out scorer cannot be made on this machine."""
    needed: dict[ScorerReference, None] = {}
    for config in {(config.task, config.reward): config for config in configs}.values():
        task, domain = registry.task(config.task), config.model_spec().domain
        of_task = [ScorerReference.single(name) for name in (task.reward(domain), *task.held_out(domain))]
        scorers = [*ScorerReference.parse(config.reward).scorers, *of_task]
        needed |= dict.fromkeys(scorer for scorer in scorers if scorer.at(config.scorer_locations) is None)
    for scorer in needed:
        registry.scorer(scorer.text)


class _GridRunner:
    """Makes the runs of a grid, shows their progress and keeps the manifest up to date."""

    def __init__(self, runs: Sequence[PlannedRun], launch: GridLaunch, manifest: Manifest):
        self._runs, self._manifest = runs, manifest
        self._out, self._progress, self._interrupted = launch.out, launch.progress, launch.interrupted
        self._provenance = record.provenance()
        self._lines_shown: set[str] = set()
        self._fractions_shown: dict[int, float] = {}  # by run number, what the bar shows of it

    def read_finished_runs(self) -> None:
        """Read the records that exist, and set up the bar, on which a run is as long as the rest of its budget."""
        for run in self._runs:
            run.origin = "resumed" if (run.run_dir / "metrics.jsonl").is_file() else "made"
            if (run.run_dir / "record.json").is_file():
                run.origin = "found"
                run.record, run.failure = run_in_process(
                    run.config, runs=self._out, log=self._log(run), progress=NullProgress()
                )
        self.write_manifest()
        self._fractions_shown = {run.number: run.fraction for run in self._runs}
        waiting = sum(run.record is None for run in self._runs)
        if waiting < len(self._runs):
            commits = {str(run.record.provenance.get("revision", "")) for run in self._runs if run.record}
            others = commits - {str(self._provenance.get("revision", ""))}
            by = f", by other code than this ({', '.join(sorted(c[:12] for c in others))})" if any(others) else ""
            self._progress.message(f"{len(self._runs) - waiting} of {len(self._runs)} runs are already done{by}")
        if waiting:
            total = sum(1 - self._fractions_shown[run.number] for run in self._runs)
            self._progress.phase(f"{waiting} run{'s' if waiting > 1 else ''}", max(total, 1e-9))

    def pending(self) -> Iterator[list[PlannedRun]]:
        """Yield the runs without a record: unlocked ones together, then those that another process has locked, one at a time."""
        waiting = [run for run in self._runs if run.record is None]
        locked = [run for run in waiting if is_locked(run.run_dir)]
        if unlocked := [run for run in waiting if run not in locked]:
            yield unlocked
        for run in locked:
            self._progress.message(f"run {run.number}: another process is making it; waiting for that to end")
            while is_locked(run.run_dir):
                if self._interrupted():
                    raise self._stopped()
                time.sleep(1)
            yield [run]

    def run_here(self, runs: Sequence[PlannedRun]) -> None:
        """Make runs one after another in this process."""
        for run in runs:
            if self._interrupted():
                raise self._stopped()
            self._show_start(run)
            progress = _RunProgress(
                self._progress, lambda fraction, run=run: self._advance_to(run, fraction), self._lines_shown
            )
            try:
                run_record, failure = run_in_process(
                    run.config, runs=self._out, log=self._log(run), progress=progress, interrupted=self._interrupted
                )
            except Interrupted as stop:
                raise self._stopped(f"run {run.number} {str(stop).partition(';')[0]}") from None
            self._record_end(run, run_record, failure, final=False)
        _free_device_memory()

    def run_in_processes(self, runs: Sequence[PlannedRun], jobs: int, second_attempt: bool) -> None:
        """Make runs in processes of their own, `jobs` at once; a fresh process holds nothing of an earlier failure."""
        if second_attempt:
            which = "one run failed and is" if len(runs) == 1 else f"{len(runs)} runs failed and are"
            self._progress.message(f"{which} tried once more")
            for run in runs:
                run.failure = ""

        def end(k: int, failure: str) -> None:
            run, run_record = runs[k], None
            if not failure:
                try:
                    run_record = record.read(run.run_dir / "record.json")
                except UserError as error:
                    failure = "" if self._interrupted() else f"stopped before its end ({error})"
            self._record_end(run, run_record, failure, final=second_attempt)

        def show_progress() -> None:
            for run in runs:
                if run.state == "waiting":
                    self._advance_to(run, run.fraction)

        work = [Job(run.words, self._log(run)) for run in runs]
        begin = lambda k: self._show_start(runs[k])
        if not run_jobs(work, jobs, begins=begin, ends=end, meanwhile=show_progress, interrupted=self._interrupted):
            raise self._stopped()

    def write_manifest(self) -> dict[str, Any]:
        """Write the manifest as the runs stand now; returns what it holds, and its path."""
        return self._manifest.write(self._runs, self._provenance)

    def _show_start(self, run: PlannedRun) -> None:
        """Show that a run begins or goes on."""
        self._progress.message(f"run {run.number} of {len(self._runs)}: {run}" + (", going on" if run.fraction else ""))

    def _record_end(self, run: PlannedRun, run_record: Record | None, failure: str, final: bool) -> None:
        """Keep the result of a run, show it and write the manifest. final: it is not tried again."""
        run.record, run.failure = run_record, failure
        if run_record:
            key = _shown_keys(run_record)[0]
            mean = run_record.delta[key].mean
            gain = "not scored" if mean is None or not math.isfinite(mean) else f"{mean:+.3f}"
            self._progress.message(f"run {run.number} done: {key} {gain}, ended by {run_record.stop}")
            if reason := record.disqualification(run_record):
                self._progress.message(f"run {run.number} is no result: {reason}")
        elif failure:
            self._progress.message(f"run {run.number} failed: {failure}")
        if run_record or final:
            self._advance_to(run, 1.0)
        self.write_manifest()

    def _advance_to(self, run: PlannedRun, fraction: float) -> None:
        """Move the bar to this share of a run; never back."""
        if fraction > self._fractions_shown[run.number]:
            self._progress.advance(fraction - self._fractions_shown[run.number])
            self._fractions_shown[run.number] = fraction

    def _log(self, run: PlannedRun) -> Path:
        return self._out / "logs" / f"{run.run_dir.name}.log"

    def _stopped(self, where: str = "stopped") -> Interrupted:
        """Write the manifest and return the exception to raise."""
        self.write_manifest()
        completed = sum(run.record is not None for run in self._runs)
        return Interrupted(f"{where}, {completed} of {len(self._runs)} runs are done; the same command goes on")


@dataclass(frozen=True)
class _RunProgress:
    """Progress of one run inside a grid: passes its lines and its share on, and no bar of its own."""

    progress: Progress
    advance_to: Callable[[float], None]
    lines_shown: set[str]  # by any run of the grid

    def message(self, text: str) -> None:
        """Show a line; that a scorer is not installed holds for the whole grid and is shown once."""
        if text not in self.lines_shown or not text.startswith("not evaluated by "):
            self.progress.message(text)
        self.lines_shown.add(text)

    def phase(self, name: str, total: float) -> None:
        """Ignored: the grid has one bar."""

    def advance(self, by: float) -> None:
        """Ignored: the grid has one bar."""

    def status(self, fraction: float, numbers: Mapping[str, float]) -> None:
        """Move the grid's bar to this share of the run."""
        self.advance_to(fraction)


def _free_device_memory() -> None:
    """Free the device memory of runs in this process: a second attempt needs it in another process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # raised by a device that a run left in an error state
            torch.cuda.empty_cache()


# The manifest


def slug(runs: Sequence[PlannedRun]) -> str:
    """Return the tasks, the model and a hash of the runs, whatever their order."""
    text = "\n".join(sorted(run.run_dir.name for run in runs))
    names = [*dict.fromkeys(Path(run.config.task).name for run in runs), Path(runs[0].config.model).name]
    clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in "-".join(names))
    return f"{clean}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _manifest(grid: Grid, runs: Sequence[PlannedRun], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the manifest holds."""
    budget: Budget = runs[0].config.budget
    spent_by_run = [_spent(run) for run in runs]
    return {
        "kind": "compare",
        "command": grid.command(),
        "model": grid.model,
        "budget": {"name": budget.name, **budget.bounds()},
        "runs": [_row(run, spent) for run, spent in zip(runs, spent_by_run, strict=True)],
        **{state: sum(run.state == state for run in runs) for state in ("done", "failed", "waiting")},
        "spent": {c: sum(spent.get(c, 0.0) for spent in spent_by_run) for c in CURRENCIES},
        "provenance": dict(provenance),
    }


def _row(run: PlannedRun, spent: Mapping[str, float]) -> dict[str, Any]:
    """Return a run's row of the manifest."""
    row: dict[str, Any] = {
        "run": run.run_dir.name,
        "method": run.config.method,
        "task": run.config.task,
        "seed": run.config.seed,
        "state": run.state,
        "how": run.origin,
        "reason": run.failure,
        "run_dir": str(run.run_dir),
        "command": shlex.join(["gpobench", *run.words]),
        "spent": dict(spent),
    }
    if run.record is not None:
        shown, trained = _shown_keys(run.record)
        row |= {
            "stop": run.record.stop,
            "fault": run.record.fault,
            "no_result": record.disqualification(run.record),
            "flags": run.record.flags.model_dump(),
            "key": shown,
            "delta": json.loads(run.record.delta[shown].model_dump_json()),
            "training_key": trained,
            "training_delta": json.loads(run.record.delta[trained].model_dump_json()),
        }
    return row


def _spent(run: PlannedRun) -> dict[str, float]:
    """Return what a run has spent; one without a record up to its last complete iteration."""
    return dict(run.record.spent) if run.record else spent_so_far(run.run_dir)


def _shown_keys(run_record: Record) -> tuple[str, str]:
    """Return the `scorer/metric` that leaderboards rank by, and the one of the training scorer."""
    roles = {name: scorer.role for name, scorer in run_record.scorers.items()}
    by_key = {key: roles.get(key.partition("/")[0], "") for key in run_record.delta}
    return str(record_key(run_record)), str(primary_key(by_key, preferred=("training",)))
