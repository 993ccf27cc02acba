"""Runs of a baseline: derives their command lines and directories, and makes those that are not done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.errors import Interrupted, UserError
from ..bench.evaluation import record
from .baseline import Baseline, Claim

if TYPE_CHECKING:
    from ..bench.experiments.config import RunRequest


@dataclass(frozen=True)
class BaselineRun:
    """One run of a baseline: a claim with one of its seeds."""

    baseline: Baseline
    claim: Claim
    seed: int

    @property
    def name(self) -> str:
        """Return row, task and seed as text."""
        return f"{self.claim.label} on {self.baseline.task}, seed {self.seed}"

    @property
    def budget(self) -> str:
        """Return the budget as `--budget` takes it."""
        return ",".join(f"{k}={v!r}" for k, v in self.baseline.budget.items())

    def command(self, out: Path) -> list[str]:
        """Return the arguments of `gpobench` that make this run in a run directory under `out`."""
        return [*self._request().words(), "--out", str(out)]

    def run_dir(self, out: Path) -> Path:
        """Return the run directory under `out`, named by the settings as they resolve now."""
        from ..bench.experiments.config import resolve

        return out / resolve(self._request()).slug()

    def _request(self) -> RunRequest:
        from ..bench.experiments.config import RunRequest

        claim, b = self.claim, self.baseline
        return RunRequest(
            claim.method,
            b.task,
            b.model,
            seed=self.seed,
            budget=self.budget,
            reward=claim.reward or None,
            sets=claim.sets,
        )


@dataclass(frozen=True)
class RunOptions:
    """Options for making the runs of a baseline."""

    out: Path  # the folder of run directories; logs go to `logs` in it
    jobs: int = 1  # runs at once
    fresh: bool = False  # run again also those that are done


def runs_of(baselines: Sequence[Baseline]) -> list[BaselineRun]:
    """Return every run of these baselines."""
    return [BaselineRun(b, claim, seed) for b in baselines for claim in b.row for seed in claim.seeds]


def run_baselines(
    baselines: Sequence[Baseline],
    options: RunOptions,
    say: Callable[[str], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Make every run of the baselines, each in a process of its own, and return the run directories.

    Runs that are done are kept, unless options.fresh. say: receives one line of progress a run.
    Raises UserError when a run fails, Interrupted when asked to stop.
    """
    from ..bench.experiments.jobs import Job, run_jobs
    from ..bench.files import make_folder

    runs = runs_of(baselines)
    run_dirs = [run.run_dir(options.out) for run in runs]
    logs = [options.out / "logs" / f"{run_dir.name}.log" for run_dir in run_dirs]
    make_folder(options.out / "logs")
    failures: list[str] = []
    complete = [] if options.fresh else _done(runs, run_dirs, options.out, say)
    todo = [k for k in range(len(runs)) if k not in complete]

    def begin(job: int) -> None:
        say(f"run {todo[job] + 1} of {len(runs)}: {runs[todo[job]].name}")

    def end(job: int, why: str) -> None:
        if why:
            failures.append(f"the run {runs[todo[job]].name} failed: {why}")
            say(failures[-1])

    again = ["--fresh"] if options.fresh else []
    jobs = [Job([*runs[k].command(options.out), *again], logs[k]) for k in todo]
    if not run_jobs(jobs, options.jobs, begins=begin, ends=end, interrupted=interrupted):
        raise Interrupted("stopped; the same command goes on from there")
    if failures:
        raise UserError(failures[0])
    return run_dirs


def _done(runs: Sequence[BaselineRun], run_dirs: Sequence[Path], out: Path, say: Callable[[str], None]) -> list[int]:
    """Return the indices of the runs that are done. Raises UserError where one was made with other weights of its model."""
    from ..bench.assets.weight_store import weights_hash
    from ..bench.model_spec import find_model_spec

    complete = [k for k, run_dir in enumerate(run_dirs) if (run_dir / "record.json").is_file()]
    if not complete:
        return []
    records = {k: record.read(run_dirs[k] / "record.json") for k in complete}
    models = dict.fromkeys(runs[k].baseline.model for k in complete)
    hashes = {model: weights_hash(find_model_spec(model)) for model in models}
    for k, each in records.items():
        model = runs[k].baseline.model
        if each.provenance.get("weights") != hashes[model]:
            raise UserError(f"the weights of {model} changed since {run_dirs[k]} was made: --fresh makes it again")
    older = record.elsewhere(list(records.values()))
    warning = f", {older} of them perhaps by other code: --fresh makes them again" if older else ""
    say(f"{len(complete)} of {len(runs)} runs are done already in {out}{warning}")
    return complete
