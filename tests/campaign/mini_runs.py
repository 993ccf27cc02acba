"""Runs on the miniature model through the real command line, and what they left: shared by disks, signals, methods and models."""

from __future__ import annotations

import json
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fault import NotHeld, Outcome, one_line
from forked import Commands, Ended

TESTS = Path(__file__).parents[1]
TASK = f"{TESTS / 'redness.py'}:Paint"
SETTINGS = (
    "optim.epochs=1", "optim.minibatches=2", "optim.weight_decay=0", "prompts=4", "group=6", "optim.lr=1e-2",
    "optim.warmup=5", "beta=1000",
)  # fmt: skip
LIMIT = 100.0  # seconds of a command that takes two
FAULTY_RUN = 3  # exit code of a run that ended by a fault

# What a process does to itself at the Nth call of a function.
AT = """
import errno, itertools, os, shutil, signal
from pathlib import Path
import torch
from gpobench.bench.evaluation import evaluator
from gpobench.bench.training import checkpoint
def at(home, name, n, act, once=True):
    real, calls = getattr(home, name), itertools.count(1)
    def counted(*args, **kwargs):
        k = next(calls)
        if k == n or (k > n and not once):
            act()
        return real(*args, **kwargs)
    setattr(home, name, counted)
def kill(number): return lambda: os.kill(os.getpid(), number)
def fail(number):
    def act(): raise OSError(number, os.strerror(number))
    return act
"""


@cache
def shared_model(place: Path) -> Path:
    """The miniature model of a process: every kind uses one."""
    from gpobench.bench.models.mini import write_sd3

    return write_sd3(place / "mini", seed=0)


@cache
def shared_commands(place: Path) -> Commands:
    """The forked command line of a process: its imports take seconds."""
    place.mkdir(parents=True, exist_ok=True)
    return Commands(place)


class Runs:
    """The miniature model, the forked command line, and the run without a fault; place: of one kind, beside the other kinds'."""

    def __init__(self, place: Path):
        self.place = place
        self._count = 0

    @cached_property
    def model(self) -> Path:
        return shared_model(self.place.parent / "shared")

    @cached_property
    def gpobench(self) -> Commands:
        return shared_commands(self.place.parent / "shared")

    def folder(self) -> Path:
        """A folder that does not exist yet."""
        self._count += 1
        return self.place / f"{self._count}"

    def command(
        self,
        out: Path,
        *more: str,
        method: str = "gpo",
        task: str = TASK,
        budget: str = "nfe=1200",
        sets: Any = SETTINGS,
    ) -> list[str]:
        words = [word for setting in sets for word in ("--set", setting)]
        return ["run", "--method", method, "--task", task, "--model", str(self.model), "--budget", budget, "--out", str(out),
                "--json", *words, *more]  # fmt: skip

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The result of the run without a fault."""
        out = self.folder()
        ended = self.gpobench(*self.command(out), limit=LIMIT)
        if ended.code:
            raise RuntimeError(ended.err)
        return result(out)

    def goes_on(self, out: Path, command: list[str]) -> None:
        """The same command without the fault ends at the result of the run without a fault."""
        again = self.gpobench(*command, limit=LIMIT)
        if again.timed_out:
            raise NotHeld("hang: the run that goes on does not end")
        if again.code:
            raise NotHeld(f"lost bytes: the same command ends with {again.code}: {again.err[-400:]}")
        differences = [name for name, value in result(out).items() if value != self.whole[name]]
        if differences:
            raise NotHeld(f"lost bytes: the run that went on differs in {differences}")
        left = [str(path) for path in out.rglob("*.tmp")]
        if left:
            raise NotHeld(f"wrong outcome: left behind {left}")


def result(out: Path) -> dict[str, Any]:
    """What a run leaves that must be the same bytes or numbers again."""
    (run_dir,) = (path for path in out.iterdir() if not path.name.startswith("."))
    facts = json.loads((run_dir / "record.json").read_text())
    return {
        "scores.parquet": (run_dir / "scores.parquet").read_bytes(),
        "curve.parquet": (run_dir / "curve.parquet").read_bytes(),
        "adapter": b"".join(path.read_bytes() for path in sorted((run_dir / "adapter").glob("*.safetensors"))),
        **{key: facts[key] for key in ("before", "after", "delta", "stop", "nfe_by_role", "flags")},
        "nfe": facts["spent"]["nfe"],
    }


def ended_well(ended: Ended) -> bool:
    """Did the command end with a result? Raises NotHeld on a hang and on a traceback."""
    if ended.timed_out:
        raise NotHeld(f"hang: {ended.err[-300:]}")
    if "Traceback (most recent call last)" in ended.err:
        raise NotHeld(f"traceback: {ended.err[-900:]}")
    return ended.code == 0


def finite_record(text: str) -> dict[str, Any]:
    """The record that a run printed; NotHeld where a number in it is not finite without a reason."""
    facts = json.loads(text)
    for phase in ("before", "after"):
        for key, number in facts[phase].items():
            if number["mean"] is not None and not np.isfinite(number["mean"]):
                raise NotHeld(f"silent number: {phase} {key} is {number['mean']}")
    return facts


def of_faulty_run(ended: Ended, out: Path) -> Outcome:
    """A run that ended by a fault says so by exit code, on stderr and in its record."""
    if ended.code != FAULTY_RUN:
        one_line(ended.err)
        raise NotHeld(f"wrong outcome: exit code {ended.code}: {ended.err[-300:]}")
    one_line(ended.err)
    records = list(out.glob("*/record.json"))
    facts = json.loads(records[0].read_text()) if records else {"fault": "no record"}
    if not facts.get("fault") and not facts["flags"]["invalid"]:
        raise NotHeld("silent number: the record states no fault and is not invalid")
    return "faulty run"
