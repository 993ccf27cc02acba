"""Disks that fail, and signals, at any file-system call or update: one line or a death, and the same command goes on to the same bytes."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Any

import numpy as np
from fault import NotHeld, Row, one_line, row
from mini_runs import AT, LIMIT, Runs, ended_well, result

ERRORS = {"no space": errno.ENOSPC, "quota": errno.EDQUOT, "input/output error": errno.EIO, "read-only": errno.EROFS}
CALLS = {  # where a run reaches the disk, and about how often
    "sync": ("os, 'fsync'", 24),
    "rename of a folder": ("Path, 'rename'", 4),
    "replacement of a file": ("Path, 'replace'", 12),
    "new folder": ("Path, 'mkdir'", 8),
    "removal of a checkpoint": ("os, 'rmdir'", 3),
}
MOMENTS = {
    **{what: place for what, place in CALLS.items()},
    "update": ("torch.optim.AdamW, 'step'", 10),
    "evaluation": ("evaluator, 'to_uint8'", 4),
}
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "hang-up": signal.SIGHUP}


def failing_call(runs: Runs, where: str, times: int, number: int, once: bool) -> Any:
    def inject(rng: np.random.Generator) -> str:
        out, n = runs.folder(), int(rng.integers(1, times + 1))
        command = runs.command(out)
        ended = runs.gpobench(*command, before=f"{AT}\nat({where}, {n}, fail({number}), once={once})", limit=LIMIT)
        if ended_well(ended):
            same(runs, out)
            return "same"
        one_line(ended.err)
        if ended.out:
            raise NotHeld(f"wrong outcome: exit code {ended.code} beside a result on stdout")
        if ended.code != 2:
            raise NotHeld(f"wrong outcome: exit code {ended.code}: {ended.err[-300:]}")
        runs.goes_on(out, command)
        return "resumed"

    return inject


def signalled(runs: Runs, where: str, times: int, number: int) -> Any:
    def inject(rng: np.random.Generator) -> str:
        out, n = runs.folder(), int(rng.integers(1, times + 1))
        command = runs.command(out)
        ended = runs.gpobench(*command, before=f"{AT}\nat({where}, {n}, kill({int(number)}))", limit=LIMIT)
        if ended.code != -signal.SIGKILL and ended_well(ended):  # it ended before that call, or it was too late to stop
            same(runs, out)
            return "same"
        if ended.code not in (130, -int(number)):
            raise NotHeld(f"wrong outcome: exit code {ended.code}: {ended.err[-300:]}")
        runs.goes_on(out, command)
        return "resumed"

    return inject


def same(runs: Runs, out: Path) -> None:
    differences = [name for name, value in result(out).items() if value != runs.whole[name]]
    if differences:
        raise NotHeld(f"silent number: exit code 0, and {differences} differ")


def rows(place: Path) -> list[Row]:
    runs = Runs(place)
    made: list[Row] = []
    for what, number in ERRORS.items():
        for call, (where, times) in CALLS.items():
            for once in (True, False):
                to_whom = f"{call}, {'once' if once else 'from then on'}"
                made.append(
                    row("disks", what, to_whom, ["resumed", "same"], failing_call(runs, where, times, number, once))
                )
    for what, number in SIGNALS.items():
        for moment, (where, times) in MOMENTS.items():
            made.append(row("signals", what, moment, ["resumed", "same"], signalled(runs, where, times, number)))
    return made
