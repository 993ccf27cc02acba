"""Runs gpobench commands side by side in processes of their own; a failure is one line and ends no other command."""

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
from ..errors import NO_RESULT, STOPPED
from ..scoring.worker_setting import CORES

COMMAND = "from gpobench.bench.commands.app import main; main()"
TAIL = 2**16  # bytes at the end of metrics.jsonl, enough for a whole line


@dataclass(frozen=True)
class Job:
    """A gpobench command for a process of its own."""

    arguments: Sequence[str]  # after `gpobench`
    log: Path  # takes its stderr


def run_jobs(
    jobs: Sequence[Job],
    parallel: int,
    *,
    begins: Callable[[int], None],
    ends: Callable[[int, str], None],
    meanwhile: Callable[[], None] = lambda: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> bool:
    """Run commands in order, some in parallel; returns False when asked to stop, after each got one SIGINT.

    Whatever is raised here or in a callback kills every command. A run that is complete but no result has succeeded as a command:
    its record says what it is worth.

    Args:
        jobs: the commands.
        parallel: commands at once; the processor's cores are divided among them.
        begins: called with k when jobs[k] was started.
        ends: called with k and the error's line, "" where the command succeeded or was stopped.
        meanwhile: called ten times a second.
        interrupted: asked whether to stop.
    """
    waiting, running, stopping = list(range(len(jobs))), dict[int, subprocess.Popen[bytes]](), False
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, min(parallel, len(jobs))))
    try:
        while running or (waiting and not stopping):
            if interrupted() and not stopping:
                stopping = True
                for process in running.values():
                    process.send_signal(signal.SIGINT)  # once: a second one would keep it from saving
            while waiting and len(running) < parallel and not stopping:
                k = waiting.pop(0)
                running[k] = _start(jobs[k], threads)
                begins(k)
            for k, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[k]
                    ends(k, "" if code in (0, NO_RESULT, STOPPED) else _failure(code, jobs[k].log))
            meanwhile()
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return not stopping


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    with job.log.open("wb") as log:
        return subprocess.Popen(
            # -P: a file of the current folder must not be imported instead of a module
            [sys.executable, "-P", "-c", COMMAND, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the result is on disk
            stderr=log,
            # The cores are divided, unless the user did; a traceback stays plain, without a box.
            env={"OMP_NUM_THREADS": str(threads), CORES: str(threads), **os.environ, "TYPER_STANDARD_TRACEBACK": "1"},
            start_new_session=True,  # a Ctrl-C reaches it once, through this process
        )


def _failure(code: int, log: Path) -> str:
    """What ended a command: the signal, or the error's line in its log."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", as a system does that runs out of memory" if name == "SIGKILL" else "")
    text = log.read_text("utf-8", errors="replace")
    _, raised, after = text.rpartition("Traceback (most recent call last):")
    lines = [line for line in after.splitlines() if line.strip()]
    # The first line of an error with several says what it is: the first one after the indented lines of the traceback.
    error = [line for line in lines if not line.startswith(" ")][:1] if raised else lines[-1:]
    return error[0].strip().removeprefix("gpobench: ") if error else f"ended with code {code}"


def spent_so_far(run_dir: Path) -> dict[str, float]:
    """The spend of a run by currency up to its last complete iteration, from its directory; {} before the first."""
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
            continue  # not yet complete, or cut short when the run ended
        return {c: float(numbers.get(f"spent/{c}") or 0) for c in CURRENCIES}
    return {}
