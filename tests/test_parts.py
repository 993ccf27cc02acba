"""The check of many parts: all of them run, the summary names what failed, and an interruption ends it at once."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "parts.py"
WAIT = 30.0  # seconds; a busy machine starts a process late


def parts(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=cwd, capture_output=True, text=True, timeout=WAIT
    )
    assert not [path for path in cwd.iterdir() if path.suffix != ".txt"]  # it leaves no files of its own
    return done


def summary(out: str) -> dict[str, list[str]]:
    """The lines of the summary by their first word."""
    return {line.split()[0]: line.split()[1:] for line in out.rsplit("\n\n", 1)[1].splitlines()}


def test_all_parts_run_and_the_failed_ones_are_named(tmp_path: Path) -> None:
    done = parts(
        "first: echo said by the first; exit 3", "second: echo said by the second; echo 2 > second.txt",
        "third: kill -9 $$", "fourth: echo 4 > fourth.txt", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert {path.name for path in tmp_path.iterdir()} == {"second.txt", "fourth.txt"}
    assert done.stdout.index("\nsaid by the first\n") < done.stdout.index("\nsaid by the second\n")
    said = summary(done.stdout)
    assert said["first"][0] == said["third"][0] == "FAILED" and said["second"][0] == said["fourth"][0] == "ok"
    assert said["first"][-3:] == ["exit", "code", "3"] and said["third"][-1] == "SIGKILL"
    assert done.stdout.endswith("2 of 4 parts failed: first, third\n")


def test_when_none_failed_it_says_so(tmp_path: Path) -> None:
    done = parts("one: true", "two: test a: = a:", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("2 parts, none failed\n")


def test_a_part_reads_no_terminal(tmp_path: Path) -> None:
    assert parts("one: ! read line", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("arguments", [(), ("true",), ("one:",), (": true",), ("one: touch one.txt", "two")])
def test_what_is_no_part_is_refused_before_any_runs(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = parts(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and done.stderr and not list(tmp_path.iterdir())


def alive(pid: int) -> bool:
    """It runs, and is no zombie that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); open('child.txt', 'w').write('1'); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True], ids=["the process", "its group, as a terminal does"])
def test_an_interruption_ends_the_part_at_work_and_begins_no_other(number: int, group: bool, tmp_path: Path) -> None:
    """Also the processes that the part started and that heed no signal."""
    child = shlex.join([sys.executable, "-c", STUBBORN])
    work = f"{child} & echo $! > pid.txt; wait"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "before: false", f"long: {work}", "after: touch after.txt"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        until = time.monotonic() + WAIT
        while not (tmp_path / "child.txt").exists() and time.monotonic() < until:
            time.sleep(0.02)
        pid = int((tmp_path / "pid.txt").read_text())
        assert alive(pid)
        start = time.monotonic()
        (os.killpg if group else os.kill)(process.pid, number)
        out, _ = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == -number and time.monotonic() - start < 5
    said = summary(out)
    assert [said[name][0] for name in ("before", "long", "after")] == ["FAILED", "interrupted", "not"]
    assert not (tmp_path / "after.txt").exists()
    until = time.monotonic() + WAIT  # what is killed is gone a moment later
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(pid)
