"""A whole grid from one command: nothing twice, nothing lost, nothing wrong begun, and one failure is nobody else's."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.errors import Interrupted, Missing, UserError
from gpobench.bench.experiments import compare as comparing
from gpobench.bench.experiments import jobs
from gpobench.bench.experiments.compare import Grid, commands, compare, plan, seeds, split
from gpobench.bench.files import digest
from gpobench.bench.progress import NullProgress

FIXED = ["prompts=2", "group=4", "optim.warmup=0", "optim.minibatches=1"]
CRANKY = '''"""GPO that fails in its second iteration: always, or as often as a counter says."""
from dataclasses import dataclass
from pathlib import Path
from gpobench.methods.gpo import GPO

@dataclass(frozen=True)
class Cranky(GPO):
    def collect(self, rig):
        if rig.iteration == 1:
            raise RuntimeError("not today")
        return GPO.collect(self, rig)
'''


class Bar(NullProgress):
    """A view that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.total, self.steps = 0.0, list[float]()

    def message(self, text: str) -> None:
        self.said.append(text)

    def phase(self, name: str, total: float) -> None:
        assert not self.total, "one bar for the whole grid"
        self.total = total

    def advance(self, by: float) -> None:
        assert by > 0
        self.steps.append(by)


@pytest.fixture
def grid(tiny_pipe: Path, redness: str) -> Callable[..., Grid]:
    def make(*methods: str, task: str = "Paint", **more: Any) -> Grid:
        given = {"seeds": 1, "budget": "nfe=200", "sets": FIXED, "baselines": False, **more}
        return Grid(methods or ("gpo",), [f"{redness}:{task}"], str(tiny_pipe), **given)

    return make


def contents(out: Path) -> dict[str, str]:
    """What a run leaves that its settings alone decide."""
    kept = [*out.glob("*/scores.parquet"), *out.glob("*/adapter/*.safetensors"), *out.glob("*/curve.parquet")]
    return {str(path.relative_to(out)): digest(path) for path in kept}


# What is planned


def test_the_grid_is_every_method_task_and_seed_and_what_any_method_must_beat(
    grid: Any, redness: str, tmp_path: Path
) -> None:
    runs = plan(grid("gpo", "dpo", seeds=2, baselines=True), tmp_path)
    four = ["gpo", "diffusion-dpo", "sft", "best-of-n"]
    assert [run.config.method for run in runs] == four * 2 and [run.config.seed for run in runs] == [0] * 4 + [1] * 4
    assert [run.number for run in runs] == list(range(1, 9)) and len({run.run_dir for run in runs}) == 8
    assert {str(run.config.budget.bounds()) for run in runs} == {"{'nfe': 200.0}"}
    assert runs[2].config.settings.group == 4  # ours take the common settings they have
    assert len(plan(grid("gpo", "dpo", seeds=(4, 0, 4)), tmp_path)) == 4
    both = plan(replace(grid("gpo", seeds=2), tasks=[f"{redness}:Paint", f"{redness}:Rich"]), tmp_path)
    assert [(run.config.seed, run.config.task[-4:]) for run in both] == [
        (0, "aint"),
        (0, "Rich"),
        (1, "aint"),
        (1, "Rich"),
    ]
    named = plan(grid("best-of-n", "gpo", baselines=True, sets=[]), tmp_path)
    assert [run.config.method for run in named] == ["best-of-n", "gpo", "sft"]
    assert str(runs[0]).startswith("gpo on redness.py:Paint, seed 0")
    assert not list(tmp_path.iterdir())


def test_aliases_and_order_make_no_other_runs(grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cranky.py").write_text(CRANKY)
    monkeypatch.chdir(tmp_path)
    names = lambda *methods: [run.run_dir.name for run in plan(grid(*methods), tmp_path)]
    one = names("dpo", "gpo", "grpo", "diffusion-dpo", "flow-grpo", "gpo")
    assert len(one) == 3 and sorted(one) == sorted(names("flow-grpo", "gpo", "dpo"))
    assert len(names("cranky.py:Cranky", f"{tmp_path}/cranky.py:Cranky")) == 1
    assert len(names("dpo", "dpo:offline")) == 2


def test_settings_for_one_method_are_its_own(grid: Any, tmp_path: Path) -> None:
    runs = plan(
        grid(
            "gpo",
            "dpo",
            "dpo:offline",
            sets=[*FIXED, "diffusion-dpo/beta=7", "gpo/group=8", "sft/kl=1"],
            baselines=True,
        ),
        tmp_path,
    )
    gpo, dpo, offline, sft, _ = (run.config.settings for run in runs)
    assert (gpo.group, dpo.group, sft.group) == (8, 4, 4) and dpo.beta == 7 and sft.kl == 1
    assert gpo.beta != 7 and offline.beta != 7 and gpo.kl != 1
    (tmp_path / "own.toml").write_text("beta = 9\n")
    (tmp_path / "all.toml").write_text("adapter.rank = 2\n")
    configs = [str(tmp_path / "all.toml"), f"gpo={tmp_path}/own.toml"]
    gpo, dpo = (run.config for run in plan(grid("gpo", "dpo", configs=configs), tmp_path))
    assert gpo.settings.beta == 9 and dpo.settings.beta != 9
    assert dpo.adapter.rank == 2 and gpo.adapter.rank != 2  # its own file stands instead
    (tmp_path / "cranky.py").write_text(CRANKY)
    method = f"{tmp_path}/cranky.py:Cranky"
    (run,) = plan(grid(method, sets=[f"{method}/beta=3"]), tmp_path)  # slashes before the last are the path's
    assert run.config.settings.beta == 3


def test_what_is_wrong_anywhere_is_refused_before_anything_runs(
    grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what, said in (
        (dict(methods=("gpo", "gppo")), "unknown method 'gppo'; did you mean 'gpo'"),
        (dict(sets=["gruop=3"]), "did you mean 'group'"),
        (dict(methods=("gpo", "best-of-n"), sets=["group=3"]), r"best-of-n: .*--set METHOD/group=3"),
        (dict(sets=["gpo/group=many"]), "gpo: setting group"),
        (dict(sets=["dpo/beta=3"]), "unknown method of this comparison 'dpo'"),
        (dict(sets=["gpo/beta"]), "--set needs key=value"),
        (dict(configs=["a.toml", "b.toml"]), "one file for all"),
        (dict(configs=["nothing.toml"]), "cannot read config nothing.toml"),
        (dict(reward="pickscor"), "did you mean 'pickscore'"),
        (dict(budget="updates=3", baselines=True), "best-of-n.*--no-baselines"),
        (dict(seeds=0), "--seeds names nothing"),
        (dict(seeds=(1, -1)), "--seed must not be negative"),
    ):
        with pytest.raises(UserError, match=said):
            compare(grid(*what.pop("methods", ()), **what), out=tmp_path / "out", progress=NullProgress())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--jobs"):
        compare(grid(), out=tmp_path / "out", progress=NullProgress(), jobs=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--print to accelerate launch"):
        compare(grid(), out=tmp_path / "out", progress=NullProgress())
    assert not list(tmp_path.iterdir())


def test_names_and_seeds_as_a_person_writes_them() -> None:
    assert split(["a, b", "c,"]) == ["a", "b", "c"]
    assert (seeds("3"), seeds("0,4"), seeds("4,")) == (3, (0, 4), (4,))
    with pytest.raises(UserError, match="--seeds"):
        seeds("three")


# What is done


def test_a_grid_is_done_once_and_its_bar_is_full(grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cranky.py").write_text(CRANKY)
    bar, g = Bar(), grid("gpo", baselines=True)
    found = compare(g, out=tmp_path / "runs", progress=bar)
    assert [row["method"] for row in found["runs"]] == ["gpo", "sft", "best-of-n"]
    assert (found["done"], found["failed"], found["waiting"]) == (3, 0, 0)
    assert bar.total == 3 and sum(bar.steps) == pytest.approx(3) and len(bar.steps) > 6  # it moves inside runs too
    assert [line for line in bar.said if line.startswith("run 2")][0].startswith("run 2 of 3: sft on redness.py:Paint")
    for row in found["runs"]:
        assert (row["state"], row["how"], row["reason"], row["key"]) == ("done", "made", "", "warmth/mean")
        known = json.loads((Path(row["run_dir"]) / "record.json").read_text())
        assert row["delta"] == known["delta"]["warmth/mean"] and row["training_delta"] == known["delta"]["redness/mean"]
        assert row["spent"] == known["spent"] and 0 < row["spent"]["nfe"] <= 200
    assert found["spent"]["nfe"] == sum(row["spent"]["nfe"] for row in found["runs"])
    path = Path(found.pop("path"))
    assert path.parent == tmp_path / "runs" and json.loads(path.read_text(), parse_constant=pytest.fail) == found

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*") if p.name != ".lock"}
    began: list[Any] = []
    monkeypatch.setattr(comparing.PlannedRun, "__str__", lambda run: began.append(run) or "again")
    again = compare(g, out=tmp_path / "runs", progress=Bar())
    assert not began and [row["how"] for row in again["runs"]] == ["found"] * 3 and again["spent"] == found["spent"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*") if p.name != ".lock"}
    other = compare(grid("best-of-n", "gpo", baselines=True, sets=[f"gpo/{s}" for s in FIXED]
                         + [f"sft/{s}" for s in FIXED]), out=tmp_path / "runs", progress=Bar())  # fmt: skip
    assert other["path"] == str(path) and not began  # the same runs, asked for in another way


def test_a_stop_in_the_middle_changes_no_byte(grid: Any, tmp_path: Path) -> None:
    g = grid("gpo", "dpo")
    compare(g, out=tmp_path / "straight", progress=NullProgress())
    bar = Bar()
    with pytest.raises(Interrupted, match=r"run 2 stopped after .*, 1 of 2 runs are done; the same command goes on"):
        compare(g, out=tmp_path / "cut", progress=bar, interrupted=lambda: any("run 2 of" in line for line in bar.said))
    (path,) = (tmp_path / "cut").glob("compare-*.json")
    halfway = json.loads(path.read_text())
    assert [row["state"] for row in halfway["runs"]] == ["done", "waiting"] and halfway["runs"][1]["spent"]["nfe"] > 0
    bar = Bar()
    found = compare(g, out=tmp_path / "cut", progress=bar)
    assert [row["how"] for row in found["runs"]] == ["found", "resumed"] and found["path"] == str(path)
    assert 0 < bar.total < 1 and sum(bar.steps) == pytest.approx(bar.total)  # what was spent before is not ahead of us
    assert contents(tmp_path / "cut") == contents(tmp_path / "straight") != {}
    with pytest.raises(Interrupted, match="stopped, 0 of 2"):
        compare(g, out=tmp_path / "none", progress=NullProgress(), interrupted=lambda: True)


@pytest.mark.slow
def test_one_that_always_fails_is_shown_and_stops_no_other(grid: Any, tmp_path: Path) -> None:
    (tmp_path / "cranky.py").write_text(CRANKY)
    bar, g = Bar(), grid(f"{tmp_path}/cranky.py:Cranky", "gpo")
    found = compare(g, out=tmp_path / "runs", progress=bar)
    bad, good = found["runs"]
    assert (bad["state"], good["state"], found["failed"]) == ("failed", "done", 1)
    assert "not today" in bad["reason"] and "delta" not in bad and 0 < bad["spent"]["nfe"] < good["spent"]["nfe"]
    assert found["spent"]["nfe"] == bad["spent"]["nfe"] + good["spent"]["nfe"]  # what it had spent is on the bill
    assert sum("run 1 of 2" in line for line in bar.said) == 2 and sum(bar.steps) == pytest.approx(bar.total)
    assert "not today" in (tmp_path / "runs" / "logs" / f"{bad['run']}.log").read_text()
    (tmp_path / "cranky.py").write_text(CRANKY.replace("== 1", "== -1"))  # mended, and asked for again
    assert compare(g, out=tmp_path / "runs", progress=Bar())["done"] == 2


def test_an_edited_method_is_run_again(grid: Any, tmp_path: Path) -> None:
    (tmp_path / "calm.py").write_text(CRANKY.replace("== 1", "== -1"))
    g = grid(f"{tmp_path}/calm.py:Cranky")
    first = compare(g, out=tmp_path / "runs", progress=Bar())["runs"][0]
    (tmp_path / "calm.py").write_text(CRANKY.replace("== 1", "== -2"))
    second = compare(g, out=tmp_path / "runs", progress=Bar())["runs"][0]
    assert (first["how"], second["how"]) == ("made", "made") and first["run"] != second["run"]


def test_what_another_process_is_at_work_on_is_waited_for(grid: Any, tmp_path: Path) -> None:
    """Nothing fails by it, and all else is done first."""
    g, out, bar = grid("gpo", "rwr"), tmp_path / "runs", Bar()
    run_dir = plan(g, out)[0].run_dir
    run_dir.mkdir(parents=True)
    lock = (run_dir / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    let_go = threading.Timer(0, lambda: None)

    def say(text: str) -> None:
        bar.said.append(text)
        if "waiting for that to end" in text:
            let_go.function = lock.close
            let_go.start()

    bar.message = say
    found = compare(g, out=out, progress=bar)
    assert found["done"] == 2 and not any("failed" in line for line in bar.said)
    order = [
        line.partition(":")[0]
        for line in bar.said
        if "another process" in line or line.startswith("run ") and " of 2" in line
    ]
    assert order == ["run 2 of 2", "run 1", "run 1 of 2"]


def test_a_scorer_that_is_not_installed_is_said_before_anything_runs(
    grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(reference: str) -> Any:
        raise Missing(f"{reference} needs open_clip")

    monkeypatch.setattr(comparing.registry, "scorer", absent)
    with pytest.raises(UserError, match="needs open_clip"):
        compare(grid("gpo"), out=tmp_path / "runs", progress=Bar())
    assert not list((tmp_path / "runs").glob("*/config.toml"))


@pytest.mark.slow
def test_side_by_side_is_one_by_one_even_with_a_kill_between(grid: Any, gpobench: Any, tmp_path: Path) -> None:
    g = grid("gpo", "rwr", baselines=True, budget="nfe=400")
    here = compare(g, out=tmp_path / "here", progress=NullProgress())
    victim, killed = tmp_path / "apart" / here["runs"][1]["run"], list[int]()

    def kill() -> None:
        for _ in range(3000):  # when the second has begun to train
            if (victim / "metrics.jsonl").is_file():
                for place in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        words = place.read_bytes().split(b"\0")
                    except OSError:
                        continue
                    if b"rwr" in words and str(victim.parent).encode() in words:
                        killed.append(int(place.parent.name))
                        return os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.05)

    thread, bar = threading.Thread(target=kill), Bar()
    thread.start()
    apart = compare(g, out=tmp_path / "apart", progress=bar, jobs=2)
    thread.join()
    assert killed and any("run 2 failed: killed by SIGKILL" in line for line in bar.said) and apart["done"] == 4
    assert contents(tmp_path / "apart") == contents(tmp_path / "here") != {}
    assert [row["delta"] for row in apart["runs"]] == [row["delta"] for row in here["runs"]]
    assert Path(apart["path"]).name == Path(here["path"]).name and sum(bar.steps) == pytest.approx(4)

    for line, row in zip(commands(g, tmp_path / "here"), here["runs"], strict=True):  # any scheduler's: each is whole
        assert line == row["command"]
    ended = gpobench(*shlex.split(commands(g, tmp_path / "other")[0])[1:], "--json")
    assert ended.code == 0, ended.err
    assert [path.parent.name for path in (tmp_path / "other").glob("*/record.json")] == [here["runs"][0]["run"]]


def test_a_second_attempt_is_a_process_of_its_own(grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's part is acted out: only that it is asked, and what is made of its silence, is looked at."""
    monkeypatch.setattr(jobs, "COMMAND", "import sys; print('gpobench: ' + sys.argv[1], file=sys.stderr); sys.exit(2)")
    monkeypatch.setattr(comparing, "run_in_process", lambda *args, **more: (None, "no room"))
    bar = Bar()
    found = compare(grid("gpo", "rwr"), out=tmp_path, progress=bar)
    assert [line for line in bar.said if "failed" in line] == [
        "run 1 failed: no room", "run 2 failed: no room", "2 runs failed and are tried once more", "run 1 failed: run",
        "run 2 failed: run",
    ]  # fmt: skip
    assert [row["reason"] for row in found["runs"]] == ["run"] * 2 and found["failed"] == 2
    assert found["spent"] == dict.fromkeys(found["spent"], 0.0)
    monkeypatch.setattr(jobs, "COMMAND", "pass")  # ends in peace and leaves nothing
    found = compare(grid("gpo"), out=tmp_path, progress=Bar(), jobs=2)
    assert "stopped before its end" in found["runs"][0]["reason"]
