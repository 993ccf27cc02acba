"""Runs every part of a check, whatever became of the ones before it, and says at the end which failed.

    python .ci/parts.py "lint: ruff check ." "types: pyright"

Each argument is a name, a colon and a shell command. The parts run one after another in the order given, their output as it
comes. Exit code: 0 when all succeeded, 1 when some failed, 2 when an argument is no part. An interruption (Ctrl-C, SIGTERM,
SIGHUP) goes on to all processes of the part at work, and no further part begins.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10.0  # seconds that an interrupted part has to end by itself


@dataclass(frozen=True)
class Part:
    """A shell command and the name it has in the summary."""

    name: str
    command: str


@dataclass(frozen=True)
class Result:
    """What became of a part."""

    name: str
    word: str  # ok, FAILED, interrupted or not run
    seconds: float | None = None
    why: str = ""


class Interruption(BaseException):
    """A signal that asked to stop; no `except Exception` takes it."""

    def __init__(self, number: int) -> None:
        self.number = number


def parse(text: str) -> Part:
    """The part that `NAME: COMMAND` says. Raises ValueError where one of the two is missing."""
    name, _, command = (piece.strip() for piece in text.partition(":"))
    if not name or not command:
        raise ValueError(f"parts: {text!r} is no part: write NAME: COMMAND")
    return Part(name, command)


def run(command: str) -> int:
    """The exit code of a shell command, minus the signal's number where one ended it. Raises Interruption after it has ended.

    The command has a process group of its own, so that an interruption reaches each of its processes once, whether it came from a
    terminal or from another process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until there is a process to hand them to
    unblock = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    child = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, process_group=0, preexec_fn=unblock)
    try:
        unblock()
        return child.wait()
    except Interruption as stop:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        _end(child, stop.number)
        raise


def _end(child: subprocess.Popen[bytes], number: int) -> None:
    """Hand the signal on, and kill what is left of the group when its first process has ended or the grace period is over."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def summary(results: Sequence[Result]) -> str:
    """A line a part, then how many failed and which."""
    wide = max(len(r.name) for r in results)
    lines = [
        f"{r.name:<{wide}}  {r.word:<11}  {'' if r.seconds is None else f'{r.seconds:.0f} s':>6}  {r.why}".rstrip()
        for r in results
    ]
    bad = [r.name for r in results if r.word == "FAILED"]
    last = (
        f"{len(bad)} of {len(results)} parts failed: {', '.join(bad)}" if bad else f"{len(results)} parts, none failed"
    )
    return "\n".join(["", *lines, last])


def main(arguments: Sequence[str]) -> int:
    """Run the parts that the arguments name and return the exit code. Raises Interruption after the summary."""
    try:
        parts = [parse(text) for text in arguments]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not parts:
        print(__doc__, file=sys.stderr)
        return 2
    results: list[Result] = []
    start = time.monotonic()
    try:
        for part in parts:
            start = time.monotonic()
            print(f"\n== {part.name}: {part.command}", flush=True)
            code = run(part.command)
            why = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}" if code else ""
            results.append(Result(part.name, "FAILED" if code else "ok", time.monotonic() - start, why))
    except Interruption:
        begun = len(results)
        results.append(Result(parts[begun].name, "interrupted", time.monotonic() - start))
        results += [Result(part.name, "not run") for part in parts[begun + 1 :]]
        print(summary(results), flush=True)
        raise
    print(summary(results), flush=True)
    return int(any(r.word == "FAILED" for r in results))


def _interrupt(number: int, _frame: object) -> None:
    raise Interruption(number)


if __name__ == "__main__":
    for number in STOPS:
        signal.signal(number, _interrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except Interruption as stop:  # end as the signal would have ended it, so that make and the shell know
        signal.signal(stop.number, signal.SIG_DFL)
        os.kill(os.getpid(), stop.number)
