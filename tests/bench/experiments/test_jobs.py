"""Commands in parallel: their order, their ends, and that no process is left running."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gpobench.bench.experiments import jobs
from gpobench.bench.experiments.jobs import Job, run_jobs, spent_so_far

ACT = """
import os, signal, sys, time
from pathlib import Path
kind, place = sys.argv[1:]
mark = lambda text: Path(place).open("a").write(f"{text} {os.getpid()} {os.getpgrp()}\\n")
def hear(number, frame):
    mark("told")
    time.sleep(0.2)
    sys.exit(130)
signal.signal(signal.SIGINT, hear)
mark("begin")
if kind == "long":
    time.sleep(60)
time.sleep(0.3)
mark(os.environ["OMP_NUM_THREADS"])
if kind == "broken":
    print("much ado\\n\\ngpobench: it broke\\n", file=sys.stderr)
    sys.exit(2)
if kind == "crash":
    raise RuntimeError("the device is lost\\n\\nFor debugging consider this and that.")
if kind == "killed":
    print(" 35 % of it", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)
mark("end")
sys.exit({"mute": 4, "stopped": 130}.get(kind, 0))
"""


class Heard:
    """What `apart` said, and when."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.ended: dict[int, str] = {}
        self.most = 0

    def begins(self, k: int) -> None:
        self.began.append(k)
        self.most = max(self.most, len(self.began) - len(self.ended))

    def ends(self, k: int, why: str) -> None:
        self.ended[k] = why


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """In place of our command line a program that acts out its ends; the processes, signals and kills are real."""
    monkeypatch.setattr(jobs, "COMMAND", ACT)
    return Heard()


def made(tmp_path: Path, *kinds: str) -> list[Job]:
    return [Job([kind, str(tmp_path / f"{k}.txt")], tmp_path / f"{k}.log") for k, kind in enumerate(kinds)]


def alive(tmp_path: Path) -> list[int]:
    pids = [int(line.split()[1]) for path in tmp_path.glob("*.txt") for line in path.read_text().splitlines()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_each_end_is_reported_and_ends_no_other(tmp_path: Path, heard: Heard) -> None:
    ticks: list[float] = []
    work = made(tmp_path, "fine", "broken", "killed", "mute", "stopped", "fine", "crash")
    whole = run_jobs(work, 2, begins=heard.begins, ends=heard.ends, meanwhile=lambda: ticks.append(time.time()))
    assert whole and heard.began == list(range(7)) and heard.most == 2 and len(ticks) > 3
    killed = heard.ended.pop(2)
    assert heard.ended == {
        0: "",
        1: "it broke",
        3: "ended with code 4",
        4: "",
        5: "",
        6: "RuntimeError: the device is lost",
    }
    assert killed.startswith("killed by SIGKILL") and alive(tmp_path) == []
    assert "35 %" in work[2].log.read_text()


def test_a_stop_signals_each_once_and_begins_nothing(tmp_path: Path, heard: Heard) -> None:
    work = made(tmp_path, "long", "long", "fine")
    begun = lambda: len(list(tmp_path.glob("*.txt"))) == 2
    assert not run_jobs(work, 2, begins=heard.begins, ends=heard.ends, interrupted=begun)
    assert heard.began == [0, 1] and heard.ended == {0: "", 1: ""}
    for k in range(2):
        assert (tmp_path / f"{k}.txt").read_text().count("told") == 1
    assert (
        not run_jobs(work, 2, begins=heard.begins, ends=heard.ends, interrupted=lambda: True) and len(heard.began) == 2
    )


def test_whatever_ends_us_ends_them(tmp_path: Path, heard: Heard) -> None:
    def give_up() -> None:
        if len(list(tmp_path.glob("*.txt"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(made(tmp_path, "long", "long"), 2, begins=heard.begins, ends=heard.ends, meanwhile=give_up)
    assert alive(tmp_path) == []


def test_the_cores_are_shared_out_unless_somebody_did(
    tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_jobs(made(tmp_path, "fine"), 3, begins=heard.begins, ends=heard.ends)
    assert (tmp_path / "0.txt").read_text().splitlines()[1].startswith("7 ")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    run_jobs(made(tmp_path, "fine", "fine", "fine"), 5, begins=heard.begins, ends=heard.ends)
    assert (tmp_path / "2.txt").read_text().splitlines()[1].startswith("4 ")  # three at once, not five


def test_a_child_hears_no_key_that_was_meant_for_us(tmp_path: Path, heard: Heard) -> None:
    run_jobs(made(tmp_path, "fine"), 1, begins=heard.begins, ends=heard.ends)
    assert int((tmp_path / "0.txt").read_text().split()[2]) != os.getpgrp()  # a terminal's Ctrl-C goes to a group


def test_what_a_run_has_spent_is_its_last_whole_line(tmp_path: Path) -> None:
    assert spent_so_far(tmp_path) == {}
    log = tmp_path / "metrics.jsonl"
    log.write_text("")
    assert spent_so_far(tmp_path) == {}
    line = lambda nfe: json.dumps({"iteration": 1, "spent/nfe": nfe, "spent/images": 3, "loss": None}) + "\n"
    log.write_text("".join(line(k) for k in range(2000)) + line(77)[:20])
    found = spent_so_far(tmp_path)
    assert found["nfe"] == 1999 and found["images"] == 3 and found["updates"] == 0
    log.write_text(line(5)[:-9])
    assert spent_so_far(tmp_path) == {}
