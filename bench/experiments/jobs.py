"""Commands of ours side by side in processes of their own, each failure a line and none of them the others' end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..budget import CURRENCIES
from ..errors import UserError

OURSELVES = "from gpobench.bench.commands.app import main; main()"
TAIL = 2**16  # bytes at the end of metrics.jsonl that surely hold a whole line


@dataclass(frozen=True)
class Job:
    """A command of ours, to be run in a process of its own."""

    words: Sequence[str]  # behind `gpobench`
    log: Path  # takes what it says


def make_folder(path: Path) -> None:
    """Make a folder, its parents too. Raises UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def run_jobs(
    work: Sequence[Job],
    at_once: int,
    *,
    begins: Callable[[int], None],
    ends: Callable[[int, str], None],
    meanwhile: Callable[[], None] = lambda: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> bool:
    """Run commands, so many at once, in their order; False when asked to stop, which each of them is told once.

    begins(k): work[k] was started. ends(k, why): it ended, "" in peace or stopped, else its last words.
    meanwhile: called ten times a second. Whatever is raised here or in these ends every command at once.
    """
    waiting, running, told = list(range(len(work))), dict[int, subprocess.Popen[bytes]](), False
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, min(at_once, len(work))))
    try:
        while running or (waiting and not told):
            if interrupted() and not told:
                told = True
                for process in running.values():
                    process.send_signal(signal.SIGINT)  # once: a second one would not let it save
            while waiting and len(running) < at_once and not told:
                k = waiting.pop(0)
                running[k] = _start(work[k], threads)
                begins(k)
            for k, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[k]
                    ends(k, "" if code in (0, 130) else _why(code, work[k].log))
            meanwhile()
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return not told


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    with job.log.open("wb") as log:
        return subprocess.Popen(
            # -P: a file of the folder at hand must not stand in for a module
            [sys.executable, "-P", "-c", OURSELVES, *job.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the result is on disk
            stderr=log,
            # The cores are shared out, unless a person did; a traceback stays plain, not drawn in a box.
            env={"OMP_NUM_THREADS": str(threads), **os.environ, "TYPER_STANDARD_TRACEBACK": "1"},
            start_new_session=True,  # a Ctrl-C reaches it once, through us
        )


def _why(code: int, log: Path) -> str:
    """What ended a command: the signal, or its last words."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", as a system does that runs out of memory" if name == "SIGKILL" else "")
    text = log.read_text("utf-8", errors="replace")
    _, raised, after = text.rpartition("Traceback (most recent call last):")
    lines = [line for line in after.splitlines() if line.strip()]
    # An error of many lines says in its first what it is; that is the first one behind the indented places.
    said = [line for line in lines if not line.startswith(" ")][:1] if raised else lines[-1:]
    return said[0].strip().removeprefix("gpobench: ") if said else f"ended with code {code}"


def spent_so_far(run_dir: Path) -> dict[str, float]:
    """What a run has spent up to its last complete iteration, by currency; {} before the first. home: its directory."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            numbers = json.loads(line)
        except ValueError:
            continue  # not yet written to its end, or cut off by what ended the run
        return {c: float(numbers.get(f"spent/{c}") or 0) for c in CURRENCIES}
    return {}
