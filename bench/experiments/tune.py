"""Tuning: chooses a method's settings by the same number of random draws for every method, evaluated on validation prompts."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..budget import CURRENCIES
from ..errors import Interrupted, UserError
from ..evaluation import record
from ..evaluation.record import Record
from ..files import make_folder, write_atomically
from ..progress import Progress
from ..scoring.scorers import close_scorers, open_scorer
from ..spec import Choice, LogUniform, Range
from .config import Config, RunRequest, resolve
from .in_process import run_in_process
from .jobs import Job, run_jobs, spent_so_far
from .run_dir import is_locked


@dataclass
class Trial:
    """One draw of settings and the result of its run."""

    number: int
    settings: dict[str, Any]  # the drawn values; empty for trial 0, the preset itself
    config: Config | None = None  # None where the method refuses the settings
    record: Record | None = None
    failure: str = ""  # why there is no record


@dataclass(frozen=True)
class Tuning:
    """What to tune: the method's search space is drawn from `trials` times; settings in `sets` are fixed, not drawn."""

    method: str
    task: str
    model: str
    trials: int
    seed: int = 0  # of the draws and of every trial's training
    budget: str | None = None
    reward: str | None = None
    sets: Sequence[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UserError(f"--trials must be at least 1, got {self.trials}")

    def command(self) -> str:
        """Return the command line for the same tuning."""
        words = ["gpobench", "tune", "--method", self.method, "--task", self.task, "--model", self.model]
        words += ["--trials", str(self.trials), "--seed", str(self.seed)]
        words += ["--budget", self.budget] if self.budget else []
        words += ["--reward", self.reward] if self.reward else []
        return shlex.join(words + [word for text in self.sets for word in ("--set", text)])

    def request(self, settings: Mapping[str, Any]) -> RunRequest:
        """Return the run of one trial: an ordinary one, evaluated on the validation prompts."""
        drawn = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return RunRequest(
            self.method,
            self.task,
            self.model,
            seed=self.seed,
            budget=self.budget,
            reward=self.reward,
            sets=[*self.sets, *drawn, "evaluation.split=validation"],
        )


# Draws


def draw(key: str, search_range: Range, seed: int, trial: int) -> Any:
    """Draw a value from a range; it depends only on the key's name, the tuning's seed and the trial's number.

    So two methods with the same range for the same key try the same values, and another key changes none of them.
    Numbers have 3 significant digits, because people read presets.
    """
    digest = hashlib.sha256(f"{seed}\n{trial}\n{key}".encode()).digest()
    u = int.from_bytes(digest[:6], "big") / 2**48  # uniform in [0, 1)
    if isinstance(search_range, Choice):
        return search_range.options[int(u * len(search_range.options))]
    exact = (
        search_range.low * (search_range.high / search_range.low) ** u
        if isinstance(search_range, LogUniform)
        else search_range.low + (search_range.high - search_range.low) * u
    )
    return min(max(float(f"{exact:.3g}"), search_range.low), search_range.high)


def draws(space: Mapping[str, Range], trials: int, seed: int, integer_keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the settings of every trial; those of the first are empty, the preset itself. integer_keys: take integers."""
    settings_by_trial: list[dict[str, Any]] = [{}]
    for trial in range(1, trials):
        settings = {key: draw(key, search_range, seed, trial) for key, search_range in space.items()}
        settings_by_trial.append(
            {key: round(v) if key in integer_keys and isinstance(v, float) else v for key, v in settings.items()}
        )
    return settings_by_trial


def plan(tuning: Tuning) -> list[Trial]:
    """Return every trial with its resolved config.

    Raises UserError on a name or a fixed setting that is wrong, and on a method that declares nothing to draw.
    """
    preset = resolve(tuning.request({}))
    space: Mapping[str, Range] = vars(type(preset.settings)).get("space") or {}
    for key, search_range in space.items():
        _check_range(key, search_range)
    fixed = {text.partition("=")[0].strip() for text in tuning.sets}
    space = {key: search_range for key, search_range in space.items() if key not in fixed}
    if not space and tuning.trials > 1:
        raise UserError(
            f"{tuning.method} declares no search space that is left to draw from: its settings stay as they are"
        )
    integer_keys = [key for key in space if isinstance(_current(preset.settings, key), int)]
    trials = [Trial(k, drawn) for k, drawn in enumerate(draws(space, tuning.trials, tuning.seed, integer_keys))]
    trials[0].config = preset
    for trial in trials[1:]:
        try:
            trial.config = resolve(tuning.request(trial.settings))
        except UserError as error:
            trial.failure = str(error)
    return trials


def _check_range(key: str, search_range: Range) -> None:
    """Raise UserError on a range without values."""
    if isinstance(search_range, Choice):
        empty = not search_range.options
    else:
        empty = search_range.low > search_range.high or (isinstance(search_range, LogUniform) and search_range.low <= 0)
    if empty:
        raise UserError(f"the search space of {key} is empty: {search_range}")


def _current(settings: Any, key: str) -> Any:
    """Return the value of a dotted key in nested settings."""
    for part in key.split("."):
        settings = getattr(settings, part, None)
    return settings


# Trials


def tune(
    tuning: Tuning,
    *,
    out: Path,
    progress: Progress,
    jobs: int = 1,
    interrupted: Callable[[], bool] = lambda: False,
    is_study: bool = False,
) -> dict[str, Any]:
    """Run every trial that is not done, choose the best and write tuning.json and best.toml.

    Args:
        tuning: what to tune.
        out: the folder in which the tuning's own folder is made.
        progress: shows lines and the progress of runs.
        jobs: trials at once; with more than one, each runs in a process of its own.
        interrupted: returns true when the tuning must stop.
        is_study: it is one of several with other seeds, which have a folder each.

    Returns:
        What tuning.json holds.

    Raises:
        UserError: when no trial can be used.
        Interrupted: when asked to stop.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    trials = plan(tuning)
    folder = tuning_folder(tuning, trials, out, is_study=is_study)
    for part in ("runs", "logs"):
        make_folder(folder / part)
    # A draw equal to an earlier one shares its run, so that two processes never write one run directory.
    unique = {trial.config.slug(): trial for trial in reversed(trials) if trial.config is not None}
    work = [trial for trial in trials if trial.config is not None and unique[trial.config.slug()] is trial]
    if jobs > 1:
        is_free = lambda trial_dir: not (trial_dir / "record.json").is_file() and not is_locked(trial_dir)
        free_trials = [trial for trial in work if is_free(folder / "runs" / _slug(trial))]
        _run_in_processes(tuning, free_trials, folder, jobs, progress, interrupted)
    for trial in work:
        if not trial.failure:
            _run_here(trial, len(trials), folder, progress, interrupted)
    for trial in trials:
        if trial.config is not None:
            trial.record, trial.failure = unique[_slug(trial)].record, unique[_slug(trial)].failure
    return _choose_and_write(tuning, trials, folder)


def tuning_folder(tuning: Tuning, trials: Sequence[Trial], out: Path, *, is_study: bool = False) -> Path:
    """Return the folder of a tuning: METHOD-TASK-MODEL, and in it study-SEED for one of several studies."""
    folder = out / _slug(trials[0]).rsplit("-", 2)[0]
    return folder / f"study-{tuning.seed}" if is_study else folder


def _slug(trial: Trial) -> str:
    """Return the name of the trial's run directory."""
    assert trial.config is not None
    return trial.config.slug()


def _run_here(trial: Trial, of: int, folder: Path, progress: Progress, interrupted: Callable[[], bool]) -> None:
    """Run a trial in this process, or read the record it has already. of: the number of trials."""
    assert trial.config is not None
    progress.message(f"trial {trial.number} (of 0 to {of - 1}): {_settings_text(trial)}")
    trial_dir = folder / "runs" / _slug(trial)
    if is_locked(trial_dir):
        progress.message(f"trial {trial.number}: another process is making it; waiting for that to end")
    while is_locked(trial_dir):
        if interrupted():
            raise Interrupted(f"trial {trial.number}: stopped; the same command goes on from there")
        time.sleep(1)
    try:
        trial.record, trial.failure = run_in_process(
            trial.config, runs=folder / "runs", log=_log(trial, folder), progress=progress, interrupted=interrupted
        )
    except Interrupted as stop:
        raise Interrupted(f"trial {trial.number}: {stop}") from None
    if trial.failure:
        progress.message(f"trial {trial.number} failed: {trial.failure}")


def _run_in_processes(
    tuning: Tuning,
    trials: Sequence[Trial],
    folder: Path,
    at_once: int,
    progress: Progress,
    interrupted: Callable[[], bool],
) -> None:
    """Run trials as commands of their own, `at_once` at a time; their records are read afterwards."""

    def end(k: int, failure: str) -> None:
        trials[k].failure = failure
        progress.message(f"trial {trials[k].number} " + (f"failed: {failure}" if failure else "ended"))

    work = [Job(_command(tuning, trial, folder), _log(trial, folder)) for trial in trials]
    begin = lambda k: progress.message(f"trial {trials[k].number} begins: {_settings_text(trials[k])}")
    if not run_jobs(work, at_once, begins=begin, ends=end, interrupted=interrupted):
        raise Interrupted("stopped; the same command goes on with the trials that are left")


def _command(tuning: Tuning, trial: Trial, folder: Path) -> list[str]:
    """Return the command line behind `gpobench` that runs a trial."""
    return [*tuning.request(trial.settings).words(), "--json", "--out", str(folder / "runs")]


def _log(trial: Trial, folder: Path) -> Path:
    """Return the file that takes what a trial prints."""
    return folder / "logs" / f"trial-{trial.number}.log"


# Choice of the best trial


def rejection(run_record: Record, key: str) -> str:
    """Return why a run cannot be chosen, whatever its gain; "" when it can."""
    mean = run_record.delta[key].mean if key in run_record.delta else None
    if reason := record.disqualification(run_record):
        return reason
    if run_record.flags.hack:
        return f"hack flag: {'; '.join(run_record.flags.reasons) or 'no held-out scorer rose'}"
    return "not scored" if mean is None or not math.isfinite(mean) else ""


def best(trials: Sequence[Trial], key: str) -> Trial | None:
    """Return the trial whose training scorer rose most on validation prompts; of equal ones the earliest."""
    sound = [t for t in trials if t.record is not None and not rejection(t.record, key)]
    return max(sound, key=lambda t: (t.record.delta[key].mean, -t.number), default=None)  # type: ignore[union-attr]


def _choose_and_write(tuning: Tuning, trials: Sequence[Trial], folder: Path) -> dict[str, Any]:
    """Choose the best trial and write tuning.json and best.toml; returns what tuning.json holds."""
    preset = trials[0].config
    assert preset is not None
    scorer = open_scorer(preset.reward, preset.scorer_locations)
    close_scorers([scorer])  # opened for its name and metrics only
    key = f"{scorer.name}/{scorer.metrics[0]}"
    chosen = best(trials, key)
    # Keyed by run, because equal draws share one run and its cost.
    spent_by_run = {_slug(trial): _spent(trial, folder) for trial in trials if trial.config is not None}
    total = {currency: sum(spent.get(currency, 0.0) for spent in spent_by_run.values()) for currency in CURRENCIES}
    result: dict[str, Any] = {
        "method": preset.method,
        "task": tuning.task,
        "model": tuning.model,
        "reward": preset.reward,
        "seed": tuning.seed,
        "budget": {"name": preset.budget.name, **preset.budget.bounds()},
        "objective": f"{key} on validation prompts, after minus before",
        "trials": [_row(trial, key, spent_by_run) for trial in trials],
        "best": None if chosen is None else chosen.number,
        "spent": total,
        "command": tuning.command(),
        "folder": str(folder),
        "provenance": record.provenance(),
    }
    write_atomically(
        folder / "tuning.json", lambda p: p.write_text(json.dumps(_finite_or_null(result), indent=1) + "\n", "utf-8")
    )
    if chosen is None:
        (folder / "best.toml").unlink(missing_ok=True)
        why = "; ".join(f"trial {t['trial']}: {t['rejected']}" for t in result["trials"])
        raise UserError(f"no trial can be used ({why}): see {folder / 'tuning.json'}")
    text = preset_text(tuning, chosen, key, total)
    write_atomically(folder / "best.toml", lambda p: p.write_text(text, "utf-8"))
    return _finite_or_null(result)


def _row(trial: Trial, key: str, spent_by_run: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return a trial's row of tuning.json."""
    row: dict[str, Any] = {"trial": trial.number, "settings": trial.settings, "rejected": trial.failure or "not run"}
    if trial.config is not None:
        row |= {"run": trial.config.slug(), "spent": spent_by_run[trial.config.slug()]}
    run_record = trial.record
    if run_record is not None:
        row |= {
            "rejected": rejection(run_record, key),
            "stop": run_record.stop,
            "before": run_record.before[key].model_dump(),
            "after": run_record.after[key].model_dump(),
            "delta": {name: d.model_dump() for name, d in run_record.delta.items()},
            "gain": run_record.delta[key].model_dump(),
            "flags": run_record.flags.model_dump(),
            "run_dir": run_record.run_dir,
        }
    return row


def _spent(trial: Trial, folder: Path) -> dict[str, float]:
    """Return what a trial has spent; a failed one up to its last complete iteration."""
    return spent_so_far(folder / "runs" / _slug(trial)) if trial.record is None else dict(trial.record.spent)


def preset_text(tuning: Tuning, chosen: Trial, key: str, total: Mapping[str, float]) -> str:
    """Return best.toml: the settings of the chosen trial and what tuning spent, for --config or a preset's section."""
    assert chosen.record is not None
    gain = chosen.record.delta[key]
    price = {"trials": str(tuning.trials), **{c: _compact(x) for c, x in total.items() if x}}
    inner = ", ".join(f"{name} = {value}" for name, value in price.items())
    fixed = {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in tuning.sets)}
    lines = [
        f"# Trial {chosen.number} of {tuning.trials}, chosen on validation prompts: {key} {gain.mean:+.4f}, "
        f"95 % interval [{_interval_end(gain.ci[0])}, {_interval_end(gain.ci[1])}], one seed.",
        "# With --config, or in the preset under "
        f"[{_preset_section(tuning)}]: `tuned` is what tuning spent, and every record keeps it.",
        *[f"{name} = {_literal(value)}" for name, value in fixed.items()],
        *[f"{name} = {json.dumps(value)}" for name, value in chosen.settings.items()],
        f"tuned = {{ {inner}, command = {json.dumps(tuning.command())} }}",
    ]
    return "\n".join(lines) + "\n"


def _literal(value: str) -> str:
    """Return the value of a --set as TOML; a bare word becomes a string."""
    try:
        tomllib.loads(f"x = {value}")
    except tomllib.TOMLDecodeError:
        return json.dumps(value)
    return value


def _compact(x: float) -> str:
    """Return a number as an integer where it is one, else with 6 significant digits."""
    return str(int(x)) if x == int(x) and x < 1e15 else f"{x:.6g}"


def _preset_section(tuning: Tuning) -> str:
    """Return the name of the model's section in preset files."""
    from ..model_spec import find_model_spec

    model_spec = find_model_spec(tuning.model)
    return model_spec.preset or model_spec.name


def _interval_end(x: float | None) -> str:
    """Return one end of an interval as text; ? where there is none."""
    return "?" if x is None or not math.isfinite(x) else f"{x:+.4f}"


def _settings_text(trial: Trial) -> str:
    """Return the drawn settings in one line."""
    return ", ".join(f"{key} = {value}" for key, value in trial.settings.items()) or "the preset unchanged"


def _finite_or_null(value: Any) -> Any:
    """Return nested values with null for NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
