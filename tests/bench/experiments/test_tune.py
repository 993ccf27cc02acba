"""Tune: the same draws for every method, the choice of the best trial, and what tuning spent."""

from __future__ import annotations

import json
import math
import os
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.record import Difference, Flags, Number, Record, ScorerUse
from gpobench.bench.experiments import tune as tuning
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.experiments.tune import Trial, Tuning, best, draw, draws, rejection
from gpobench.bench.progress import NullProgress
from gpobench.bench.spec import Choice, LogUniform, Uniform

FIXED = ["prompts=2", "group=4", "optim.warmup=0", "optim.minibatches=1"]
KEY = "redness/mean"

# The draws


def test_each_range_follows_its_law() -> None:
    n = 2000
    for span, law in (
        (LogUniform(1e-5, 1e-2), lambda x: (math.log10(x) + 5) / 3),
        (Uniform(-2, 6), lambda x: (x + 2) / 8),
    ):
        values = [draw("key", span, 3, trial) for trial in range(1, n)]
        assert all(span.low <= v <= span.high and v == float(f"{v:.3g}") for v in values)
        assert stats.kstest([law(v) for v in values], "uniform").pvalue > 0.01
    picked = [draw("key", Choice(("a", 1, False)), 3, trial) for trial in range(1, n)]
    assert stats.chisquare([picked.count(option) for option in ("a", 1, False)]).pvalue > 0.01


def test_draws_of_a_key_do_not_depend_on_the_method_or_on_other_keys() -> None:
    mine = draws({"optim.lr": LogUniform(1e-4, 1e-2), "beta": Uniform(0, 1)}, 6, seed=1)
    more = draws({"kl": Uniform(0, 1), "optim.lr": LogUniform(1e-4, 1e-2)}, 9, seed=1)
    assert mine[0] == more[0] == {}
    assert [t["optim.lr"] for t in mine[1:]] == [t["optim.lr"] for t in more[1:6]]
    assert len({t["optim.lr"] for t in mine[1:]}) == 5 and mine[1]["beta"] != more[1]["kl"]
    assert draws({"beta": Uniform(0, 1)}, 6, seed=2) != draws({"beta": Uniform(0, 1)}, 6, seed=1)
    # another range for the same key is the same throw
    assert [draw("lr", Uniform(0, 10), 0, k) for k in (1, 2)] == pytest.approx(
        [10 * draw("lr", Uniform(0, 1), 0, k) for k in (1, 2)], abs=0.02
    )
    assert all(
        isinstance(t["group"], int) for t in draws({"group": Uniform(2, 9)}, 5, seed=0, integer_keys=["group"])[1:]
    )


def test_trial_zero_is_the_preset_and_the_others_differ_in_what_is_drawn() -> None:
    trials = tuning.plan(Tuning("gpo", "ocr", "tiny", 4, budget="nfe=100"))
    preset = resolve(RunRequest("gpo", "ocr", "tiny", budget="nfe=100", sets=["evaluation.split=validation"]))
    assert trials[0].settings == {} and trials[0].config is not None and trials[0].config.digest() == preset.digest()
    for trial in trials[1:]:
        assert trial.config is not None and set(trial.settings) == {"optim.lr", "beta", "t_min"}
        s = trial.config.settings
        assert (s.optim.lr, s.beta, s.t_min) == tuple(trial.settings[key] for key in ("optim.lr", "beta", "t_min"))
        assert s.group == preset.settings.group and trial.config.evaluation.split == "validation"
    fixed = tuning.plan(Tuning("gpo", "ocr", "tiny", 2, sets=["beta=7"]))
    assert fixed[1].config is not None and fixed[1].config.settings.beta == 7 and "beta" not in fixed[1].settings


def test_what_cannot_be_tuned_is_one_line(tmp_path: Path) -> None:
    for what, said in (
        (lambda: Tuning("gpo", "ocr", "tiny", 0), "--trials must be at least 1"),
        (lambda: tuning.plan(Tuning("best-of-n", "ocr", "tiny", 2)), "best-of-n declares no search space"),
        (lambda: tuning.plan(Tuning("gpo", "ocr", "tiny", 2, sets=["gruop=3"])), "did you mean 'group'"),
        (lambda: tuning.tune(Tuning("gpo", "ocr", "tiny", 2), out=tmp_path, progress=NullProgress(), jobs=0), "--jobs"),
    ):
        with pytest.raises(UserError, match=said):
            what()
    assert list(tmp_path.iterdir()) == []


# The choice


def made(gain: float | None = 0.1, stop: str = "budget: nfe", fault: str = "", **flags: bool) -> Record:
    number = Number(mean=0.5, ci=(0.4, 0.6), n=10)
    delta = Difference(mean=gain, ci=(None, None), n=10, p=None, mde=None)
    return Record(
        method="m", task="t", model="m", seed=0, stop=stop, fault=fault, before={KEY: number}, after={KEY: number},
        delta={KEY: delta}, spent={"nfe": 10.0}, run_dir="", flags=Flags(**{"hack": False, "invalid": False, **flags}),
        scorers={"redness": ScorerUse(id="r", role="training", calls=1, seconds=0, errors=0)}, config={},
        task_version="1", prompts={}, wall={}, provenance={},
    )  # fmt: skip


def test_the_best_is_the_highest_of_the_sound_ones() -> None:
    runs = [made(0.1), made(0.3), made(0.3), made(0.9, hack=True), made(0.9, invalid=True), made(None)]
    flat, diverged = "collapsed: flat", "the loss is nan"
    runs += [made(0.9, stop=flat, fault=flat), made(0.9, stop=diverged, fault=diverged), made(math.nan)]
    trials = [Trial(k, {}, record=done) for k, done in enumerate(runs)] + [Trial(9, {}, failure="no memory")]
    chosen = best(trials, KEY)
    assert chosen is not None and chosen.number == 1  # of two equal ones the earlier
    assert [bool(rejection(done, KEY)) for done in runs] == [False] * 3 + [True] * 6
    assert best(trials[3:], KEY) is None
    assert not rejection(made(0.1, stop="search: 3 candidates an image"), KEY)
    assert not rejection(made(0.1, stop="collapsed: all are right"), KEY)  # nothing was left to learn


# The command


@pytest.fixture
def argv(redness: str, tiny_pipe: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(*more: str, method: str = "gpo", task: str = "Paint", trials: int = 2, out: str = "tune") -> list[str]:
        words = ["tune", "--method", method, "--task", f"{redness}:{task}", "--model", str(tiny_pipe)]
        words += ["--budget", "nfe=200", "--trials", str(trials), "--out", str(tmp_path / out)]
        return [*words, *(word for text in FIXED for word in ("--set", text)), *more]

    return make


def test_tuning_from_the_draws_to_a_run_that_records_its_cost(
    gpobench: Any, argv: Any, redness: str, tiny_pipe: Path, tmp_path: Path
) -> None:
    dry = gpobench(*argv("--dry-run", "--json"))
    assert dry.code == 0 and not (tmp_path / "tune").exists()
    drawn = json.loads(dry.out)
    assert [t["trial"] for t in drawn] == [0, 1] and drawn[0]["settings"] == {}
    assert str(drawn[1]["settings"]["beta"]) in gpobench(*argv("--dry-run")).out

    ended = gpobench(*argv("--json"))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out, parse_constant=pytest.fail)
    run_dir = Path(found["folder"])
    assert run_dir.parent == tmp_path / "tune" and json.loads((run_dir / "tuning.json").read_text()) == found
    assert [t["settings"] for t in found["trials"]] == [t["settings"] for t in drawn]
    for t in found["trials"]:
        assert t["rejected"] == "" and t["stop"] == "budget: nfe" and t["spent"]["nfe"] <= 200
        assert t["gain"] == t["delta"][KEY] and len(t["gain"]["ci"]) == 2 and t["gain"]["n"] == 2
        assert (
            json.loads((Path(t["run_dir"]) / "record.json").read_text())["config"]["evaluation"]["split"]
            == "validation"
        )
    assert found["spent"]["nfe"] == sum(t["spent"]["nfe"] for t in found["trials"])
    gains = [t["gain"]["mean"] for t in found["trials"]]
    assert found["best"] == gains.index(max(gains)) and found["provenance"]["versions"]
    assert found["command"].startswith("gpobench tune --method gpo") and "--out" not in found["command"]

    again = gpobench(*argv())  # nothing is done twice, and a person reads a table
    assert again.code == 0 and again.err.count("already done") == 2 and "training" not in again.err
    (row,) = [line for line in again.out.splitlines() if line.startswith(">")]
    assert row.split()[1] == str(found["best"])
    assert f"to use it: --config {run_dir}/best.toml" in again.out and "redness/mean on validation prompts" in again.out

    chosen = tomllib.loads((run_dir / "best.toml").read_text())
    assert chosen["prompts"] == 2 and chosen["tuned"]["trials"] == 2
    assert chosen["tuned"]["nfe"] == found["spent"]["nfe"] and chosen["tuned"]["command"] == found["command"]
    config = resolve(
        RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=200", config=run_dir / "best.toml")
    )
    assert config.tuned["trials"] == 2 and config.tuned["spent"]["images"] == found["spent"]["images"]
    best = resolve(RunRequest(
        "gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=200", config=run_dir / "best.toml",
        sets=["evaluation.split=validation"],
    ))  # fmt: skip
    assert best.slug() == found["trials"][found["best"]]["run"]  # the file says the chosen trial's settings


def test_a_blend_is_a_scorer_to_tune_on(gpobench: Any, argv: Any, redness: str) -> None:
    ended = gpobench(*argv("--reward", f"{redness}:Brightness*2+{redness}:Redness", "--json", trials=1))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    (key,) = [key for key in found["trials"][0]["delta"] if key.endswith("/blend")]
    assert found["objective"].startswith(f"{key} on validation") and found["trials"][0]["gain"]["n"] == 2


PICKY = '''"""GPO with a space in which one draw is refused, one crashes and one dies."""
import os
from dataclasses import dataclass
from typing import ClassVar
from gpobench.bench.errors import UserError
from gpobench.bench.spec import Choice
from gpobench.methods.gpo import GPO

@dataclass(frozen=True)
class Picky(GPO):
    space: ClassVar = {"mood": Choice(("fine", "refuse", "crash"))}
    mood: str = "fine"

    def __post_init__(self):
        if self.mood == "refuse":
            raise UserError("picky: not in the mood")

    def collect(self, rig):
        if self.mood == "crash" and rig.iteration == 1:
            raise OverflowError("no room for this")
        return GPO.collect(self, rig)
'''


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_trial_that_fails_stops_no_other(gpobench: Any, argv: Any, tmp_path: Path, jobs: str) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    method = f"{tmp_path}/picky.py:Picky"
    span = Choice(("fine", "refuse", "crash"))
    seed = next(s for s in range(99) if [draw("mood", span, s, k) for k in (1, 2)] == ["crash", "refuse"])
    ended = gpobench(*argv("--seed", str(seed), "--json", "--jobs", jobs, method=method, trials=3))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    good, crashed, refused = found["trials"]
    assert found["best"] == 0 and good["rejected"] == ""
    assert "no room for this" in crashed["rejected"] and "not in the mood" in refused["rejected"]
    assert 0 < crashed["spent"]["nfe"] < good["spent"]["nfe"]  # what it had spent is on the bill
    assert found["spent"]["nfe"] == crashed["spent"]["nfe"] + good["spent"]["nfe"] and "spent" not in refused
    assert "no room for this" in (Path(found["folder"]) / "logs" / "trial-1.log").read_text()


def test_without_a_trial_to_choose_there_is_no_best(gpobench: Any, argv: Any, tmp_path: Path) -> None:
    ended = gpobench(*argv(task="Broken", trials=1))
    assert ended.code == 2 and "no trial can be used" in ended.err.splitlines()[-1] and ended.out == ""
    (run_dir,) = (tmp_path / "tune").iterdir()
    assert json.loads((run_dir / "tuning.json").read_text())["best"] is None and not (run_dir / "best.toml").exists()


def test_parallel_trials_equal_serial_ones_and_an_interrupted_tuning_resumes(
    gpobench: Any, argv: Any, tmp_path: Path
) -> None:
    def stop(pid: int) -> None:
        for _ in range(600):  # until one trial has begun to train
            if list((tmp_path / "apart").glob("*/runs/*/metrics.jsonl")):
                break
            time.sleep(0.05)
        os.kill(pid, signal.SIGINT)

    words = argv("--jobs", "2", "--json", out="apart")
    ended = gpobench(*words, meanwhile=stop)
    assert ended.code == 130 and "the same command goes on" in ended.err and ended.out == ""
    assert not list((tmp_path / "apart").glob("*/best.toml"))
    ended = gpobench(*words)
    assert ended.code == 0, ended.err
    apart, here = json.loads(ended.out), json.loads(gpobench(*argv("--json")).out)
    for one, other in zip(apart["trials"], here["trials"], strict=True):
        assert (
            one["gain"] == other["gain"] and one["run"] == other["run"] and one["spent"]["nfe"] == other["spent"]["nfe"]
        )
    assert apart["best"] == here["best"]


# Studies


def test_studies_have_a_folder_each_and_their_spread_is_said(
    gpobench: Any, argv: Any, redness: str, tiny_pipe: Path
) -> None:
    ended = gpobench(*argv("--studies", "2", "--seed", "3", "--json"))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out, parse_constant=pytest.fail)
    folder = Path(found["folder"])
    assert json.loads((folder / "studies.json").read_text()) == found
    assert [study["seed"] for study in found["studies"]] == [3, 4] and found["command"].endswith("--studies 2")
    gains = [study["gain"]["mean"] for study in found["studies"]]
    assert found["gain"]["mean"] == pytest.approx(sum(gains) / 2)
    assert found["gain"]["sd_between_studies"] == pytest.approx(abs(gains[0] - gains[1]) / math.sqrt(2))
    commands: list[str] = []
    for study in found["studies"]:
        own = json.loads((folder / f"study-{study['seed']}" / "tuning.json").read_text())
        assert own["seed"] == study["seed"] and own["best"] == study["best"] and "--studies" not in own["command"]
        file = folder / f"study-{study['seed']}" / "best.toml"
        config = resolve(RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=200", config=file))
        commands.append(config.tuned["command"])
    assert commands[0].replace("--seed 3", "") == commands[1].replace("--seed 4", "") and commands[0] != commands[1]
    again = gpobench(*argv("--studies", "2", "--seed", "3"))
    assert (
        again.code == 0 and again.err.count("already done") == 4 and "standard deviation between studies" in again.out
    )


def test_studies_that_cannot_be_are_one_line(gpobench: Any, argv: Any, tmp_path: Path) -> None:
    for words, said in (
        (argv("--studies", "0"), "--studies must be at least 1"),
        (argv("--studies", "2", task="Broken", trials=1), "no study found settings that can be used"),
    ):
        ended = gpobench(*words)
        assert ended.code == 2 and said in ended.err.splitlines()[-1] and ended.out == ""
    assert len(json.loads(gpobench(*argv("--studies", "3", "--dry-run", "--json")).out)) == 6
