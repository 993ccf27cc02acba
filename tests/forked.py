"""The real command line at the speed of a fork: a process imports what is heavy once, and every command is a child of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ZYGOTE = """
import json, os, sys, traceback
import diffusers, pandas, peft, pyarrow.parquet, torch
from diffusers import StableDiffusion3Pipeline
import gpobench.bench.experiments.run as running
from gpobench.bench.training import checkpoint
from gpobench.bench.commands.app import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for fd, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = ["gpobench", *job["argv"]]
        try:
            exec(job["before"])
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int  # minus the signal's number where one ended it
    out: str
    err: str
    timed_out: bool = False


class Commands:
    """The command line, forked from a process that has already imported what is heavy: real processes, real kills."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __call__(
        self,
        *argv: str | Path,
        meanwhile: Callable[[int], None] = lambda pid: None,
        before: str = "",
        limit: float | None = None,
    ) -> Ended:
        """Run `gpobench ARGV`.

        Args:
            argv: the words of the command.
            meanwhile: given the process id while it runs.
            before: Python run first, in there.
            limit: seconds after which it is killed.
        """
        out, err = self._folder / "out", self._folder / "err"
        job = {"argv": [str(a) for a in argv], "out": str(out), "err": str(err), "before": before}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid = int(self._line())
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(limit or 0, end)
        if limit is not None:
            timer.start()
        try:
            meanwhile(pid)
        except BaseException:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(pid, signal.SIGKILL)
            self._line()
            raise
        code = int(self._line())
        timer.cancel()
        return Ended(code, out.read_text("utf-8", "replace"), err.read_text("utf-8", "replace"), overdue.is_set())

    def close(self) -> None:
        self._process.communicate(timeout=30)
