"""Settings are chosen for every method by one rule: the same number of draws, judged on validation prompts, and its price kept."""

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
from ..files import write_atomically
from ..progress import Progress
from ..scoring.scorers import close_scorers, open_scorer
from ..spec import Choice, LogUniform, Range
from .config import Config, resolve
from .in_process import run_in_process
from .jobs import Job, make_folder, run_jobs, spent_so_far
from .run_dir import is_locked

CHOSEN = ("budget:", "search:")  # how a stop reason begins when nothing went wrong


@dataclass
class Trial:
    """One draw of settings, and what came of it."""

    number: int
    settings: dict[str, Any]  # what was drawn; empty for trial 0, the preset as it stands
    plan: Config | None = None  # None where the method refuses the settings
    done: Record | None = None
    failed: str = ""  # why there is no record


@dataclass(frozen=True)
class Tuning:
    """What to tune: the method's declared space, drawn `trials` times; `sets` holds for every trial and is not drawn."""

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
        """What a person types for the same tuning."""
        words = ["gpobench", "tune", "--method", self.method, "--task", self.task, "--model", self.model]
        words += ["--trials", str(self.trials), "--seed", str(self.seed)]
        words += ["--budget", self.budget] if self.budget else []
        words += ["--reward", self.reward] if self.reward else []
        return shlex.join(words + [word for text in self.sets for word in ("--set", text)])

    def resolve(self, settings: Mapping[str, Any]) -> Config:
        """The run of one trial: an ordinary one, judged on the validation prompts."""
        drawn = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return resolve(
            self.method,
            self.task,
            self.model,
            seed=self.seed,
            budget=self.budget,
            reward=self.reward,
            sets=[*self.sets, *drawn, "evaluation.split=validation"],
        )


# The draws


def draw(key: str, span: Range, seed: int, trial: int) -> Any:
    """A value of the range that depends on nothing but the key's name, the tuning's seed and the trial's number.

    So two methods with the same range for the same key try the same values, and a further key changes no other's.
    Numbers have 3 significant digits: a preset is read by people.
    """
    digest = hashlib.sha256(f"{seed}\n{trial}\n{key}".encode()).digest()
    u = int.from_bytes(digest[:6], "big") / 2**48  # uniform in [0, 1)
    if isinstance(span, Choice):
        return span.options[int(u * len(span.options))]
    exact = (
        span.low * (span.high / span.low) ** u
        if isinstance(span, LogUniform)
        else span.low + (span.high - span.low) * u
    )
    return min(max(float(f"{exact:.3g}"), span.low), span.high)


def draws(space: Mapping[str, Range], trials: int, seed: int, whole: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The settings of every trial; the first is empty: the preset as it stands. whole: keys that take integers."""
    found: list[dict[str, Any]] = [{}]
    for trial in range(1, trials):
        settings = {key: draw(key, span, seed, trial) for key, span in space.items()}
        found.append({key: round(v) if key in whole and isinstance(v, float) else v for key, v in settings.items()})
    return found


def plan(tuning: Tuning) -> list[Trial]:
    """Every trial with its resolved run.

    Raises UserError on a name or a fixed setting that is wrong, and on a method that declares nothing to draw.
    """
    preset = tuning.resolve({})
    space: Mapping[str, Range] = vars(type(preset.settings)).get("space") or {}
    for key, span in space.items():
        _sound(key, span)
    fixed = {text.partition("=")[0].strip() for text in tuning.sets}
    space = {key: span for key, span in space.items() if key not in fixed}
    if not space and tuning.trials > 1:
        raise UserError(
            f"{tuning.method} declares no search space that is left to draw from: its settings stay as they are"
        )
    whole = [key for key in space if isinstance(_current(preset.settings, key), int)]
    trials = [Trial(k, drawn) for k, drawn in enumerate(draws(space, tuning.trials, tuning.seed, whole))]
    trials[0].plan = preset
    for trial in trials[1:]:
        try:
            trial.plan = tuning.resolve(trial.settings)
        except UserError as error:
            trial.failed = str(error)
    return trials


def _sound(key: str, span: Range) -> None:
    if isinstance(span, Choice):
        wrong = not span.options
    else:
        wrong = not span.low <= span.high or (isinstance(span, LogUniform) and span.low <= 0)
    if wrong:
        raise UserError(f"the search space of {key} is empty: {span}")


def _current(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = getattr(settings, part, None)
    return settings


# The trials


def tune(
    tuning: Tuning,
    *,
    out: Path,
    progress: Progress,
    jobs: int = 1,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run every trial, choose the best, write tuning.json and best.toml; returns what tuning.json holds.

    A trial that is done is not done again. jobs: trials at once; more than one run in processes of their own.
    Raises UserError when no trial can be used, Interrupted when asked to stop.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    trials = plan(tuning)
    run_dir = out / trials[0].plan.slug().rsplit("-", 2)[0]  # type: ignore[union-attr]
    for part in ("runs", "logs"):
        make_folder(run_dir / part)
    # A draw that comes out as an earlier one is that trial: two processes never write one run directory.
    unique = {trial.plan.slug(): trial for trial in reversed(trials) if trial.plan is not None}
    work = [trial for trial in trials if trial.plan is not None and unique[trial.plan.slug()] is trial]
    if jobs > 1:
        free = lambda place: not (place / "record.json").is_file() and not is_locked(place)
        left = [t for t in work if free(run_dir / "runs" / _slug(t))]
        _apart(tuning, left, run_dir, jobs, progress, interrupted)
    for trial in work:
        if not trial.failed:
            _here(trial, len(trials), run_dir, progress, interrupted)
    for trial in trials:
        if trial.plan is not None:
            trial.done, trial.failed = unique[_slug(trial)].done, unique[_slug(trial)].failed
    return _settle(tuning, trials, run_dir)


def _slug(trial: Trial) -> str:
    assert trial.plan is not None
    return trial.plan.slug()


def _here(trial: Trial, of: int, run_dir: Path, progress: Progress, interrupted: Callable[[], bool]) -> None:
    """Run a trial in this process, or read what an earlier start made of it."""
    assert trial.plan is not None
    progress.message(f"trial {trial.number} (of 0 to {of - 1}): {_words(trial)}")
    place = run_dir / "runs" / _slug(trial)
    if is_locked(place):
        progress.message(f"trial {trial.number}: another process is at work on it; waiting for that to end")
    while is_locked(place):
        if interrupted():
            raise Interrupted(f"trial {trial.number}: stopped; the same command goes on from there")
        time.sleep(1)
    try:
        trial.done, trial.failed = run_in_process(
            trial.plan, runs=run_dir / "runs", log=_log(trial, run_dir), progress=progress, interrupted=interrupted
        )
    except Interrupted as stop:
        raise Interrupted(f"trial {trial.number}: {stop}") from None
    if trial.failed:
        progress.message(f"trial {trial.number} failed: {trial.failed}")


def _apart(
    tuning: Tuning,
    trials: Sequence[Trial],
    run_dir: Path,
    at_once: int,
    progress: Progress,
    interrupted: Callable[[], bool],
) -> None:
    """Run trials as commands of their own; leaves the records to be read."""

    def ends(k: int, why: str) -> None:
        trials[k].failed = why
        progress.message(f"trial {trials[k].number} " + (f"failed: {why}" if why else "ended"))

    work = [Job(_command(tuning, trial, run_dir), _log(trial, run_dir)) for trial in trials]
    begins = lambda k: progress.message(f"trial {trials[k].number} begins: {_words(trials[k])}")
    if not run_jobs(work, at_once, begins=begins, ends=ends, interrupted=interrupted):
        raise Interrupted("stopped; the same command goes on with the trials that are left")


def _command(tuning: Tuning, trial: Trial, run_dir: Path) -> list[str]:
    words = ["run", "--method", tuning.method, "--task", tuning.task, "--model", tuning.model, "--json"]
    words += ["--seed", str(tuning.seed), "--out", str(run_dir / "runs")]
    words += ["--budget", tuning.budget] if tuning.budget else []
    words += ["--reward", tuning.reward] if tuning.reward else []
    drawn = [f"{key}={json.dumps(value)}" for key, value in trial.settings.items()]
    return words + [word for text in (*tuning.sets, *drawn, "evaluation.split=validation") for word in ("--set", text)]


def _log(trial: Trial, run_dir: Path) -> Path:
    return run_dir / "logs" / f"trial-{trial.number}.log"


# The choice


def loses(done: Record, key: str) -> str:
    """Why a run cannot be chosen however high its number; "" when it can."""
    mean = done.delta[key].mean if key in done.delta else None
    if not done.stop.startswith(CHOSEN):
        return done.stop
    if done.flags.invalid:
        return "invalid: too many images could not be scored"
    if done.flags.hack:
        return "hack flag: no held-out scorer rose"
    return "not scored" if mean is None or not math.isfinite(mean) else ""


def best(trials: Sequence[Trial], key: str) -> Trial | None:
    """The trial whose training scorer rose most on validation, of two equal ones the earlier."""
    sound = [t for t in trials if t.done is not None and not loses(t.done, key)]
    return max(sound, key=lambda t: (t.done.delta[key].mean, -t.number), default=None)  # type: ignore[union-attr]


def _settle(tuning: Tuning, trials: Sequence[Trial], run_dir: Path) -> dict[str, Any]:
    preset = trials[0].plan
    assert preset is not None
    scorer = open_scorer(preset.reward, preset.scorer_locations)
    close_scorers([scorer])  # only what it is called was asked
    key = f"{scorer.name}/{scorer.metrics[0]}"
    chosen = best(trials, key)
    spends = {_slug(t): _spent(t, run_dir) for t in trials if t.plan is not None}  # twins were paid for once
    total = {currency: sum(spend.get(currency, 0.0) for spend in spends.values()) for currency in CURRENCIES}
    found: dict[str, Any] = {
        "method": preset.method,
        "task": tuning.task,
        "model": tuning.model,
        "reward": preset.reward,
        "seed": tuning.seed,
        "budget": {"name": preset.budget.name, **preset.budget.bounds()},
        "objective": f"{key} on validation prompts, after minus before",
        "trials": [_facts(t, key, spends) for t in trials],
        "best": None if chosen is None else chosen.number,
        "spent": total,
        "command": tuning.command(),
        "home": str(run_dir),
        "provenance": record.provenance(),
    }
    write_atomically(
        run_dir / "tuning.json", lambda p: p.write_text(json.dumps(_plain(found), indent=1) + "\n", "utf-8")
    )
    if chosen is None:
        (run_dir / "best.toml").unlink(missing_ok=True)
        why = "; ".join(f"trial {t['trial']}: {t['loses']}" for t in found["trials"])
        raise UserError(f"no trial can be used ({why}): see {run_dir / 'tuning.json'}")
    text = preset_text(tuning, chosen, key, total)
    write_atomically(run_dir / "best.toml", lambda p: p.write_text(text, "utf-8"))
    return _plain(found)


def _facts(trial: Trial, key: str, spends: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"trial": trial.number, "settings": trial.settings, "loses": trial.failed or "not run"}
    if trial.plan is not None:
        facts |= {"run": trial.plan.slug(), "spent": spends[trial.plan.slug()]}
    done = trial.done
    if done is not None:
        facts |= {
            "loses": loses(done, key),
            "stop": done.stop,
            "before": done.before[key].model_dump(),
            "after": done.after[key].model_dump(),
            "delta": {name: d.model_dump() for name, d in done.delta.items()},
            "gain": done.delta[key].model_dump(),
            "flags": done.flags.model_dump(),
            "run_dir": done.run_dir,
        }
    return facts


def _spent(trial: Trial, run_dir: Path) -> dict[str, float]:
    """What a trial cost, a failed one up to its last complete iteration."""
    return spent_so_far(run_dir / "runs" / _slug(trial)) if trial.done is None else dict(trial.done.spent)


def preset_text(tuning: Tuning, chosen: Trial, key: str, total: Mapping[str, float]) -> str:
    """best.toml: the settings of the chosen trial and what finding them cost, for --config or for a preset's section."""
    assert chosen.done is not None
    gain = chosen.done.delta[key]
    marker = {"trials": str(tuning.trials), **{c: _short(x) for c, x in total.items() if x}}
    inner = ", ".join(f"{name} = {value}" for name, value in marker.items())
    fixed = {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in tuning.sets)}
    lines = [
        f"# Trial {chosen.number} of {tuning.trials}, chosen on validation prompts: {key} {gain.mean:+.4f}, "
        f"95 % interval [{_end(gain.ci[0])}, {_end(gain.ci[1])}], one seed.",
        "# With --config, or in the preset under "
        f"[{_section(tuning)}]: `tuned` is what the choice cost, and every record keeps it.",
        *[f"{name} = {_literal(value)}" for name, value in fixed.items()],
        *[f"{name} = {json.dumps(value)}" for name, value in chosen.settings.items()],
        f"tuned = {{ {inner}, command = {json.dumps(tuning.command())} }}",
    ]
    return "\n".join(lines) + "\n"


def _literal(value: str) -> str:
    """The text of a --set as TOML: a bare word is a string."""
    try:
        tomllib.loads(f"x = {value}")
    except tomllib.TOMLDecodeError:
        return json.dumps(value)
    return value


def _short(x: float) -> str:
    return str(int(x)) if x == int(x) and x < 1e15 else f"{x:.6g}"


def _section(tuning: Tuning) -> str:
    from ..model_spec import find_model_spec

    model_spec = find_model_spec(tuning.model)
    return model_spec.preset or model_spec.name


def _end(x: float | None) -> str:
    return "?" if x is None or not math.isfinite(x) else f"{x:+.4f}"


def _words(trial: Trial) -> str:
    return ", ".join(f"{key} = {value}" for key, value in trial.settings.items()) or "the preset as it stands"


def _plain(value: Any) -> Any:
    """NaN and infinity as null: JSON knows neither."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
