"""A run that fails for any reason gives one line, and the other runs of a grid go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.errors import Interrupted, UserError
from gpobench.bench.experiments import in_process as module
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.experiments.in_process import run_in_process
from gpobench.bench.progress import NullProgress


@pytest.fixture
def plan(tiny_pipe: Path, redness: str) -> Config:
    sets = ["prompts=2", "group=4", "evaluation.test_images=1"]
    return resolve(RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="updates=2", sets=sets))


def test_a_run_gives_its_record(plan: Config, tmp_path: Path) -> None:
    log = tmp_path / "log"
    record, why = run_in_process(plan, runs=tmp_path / "runs", log=log, progress=NullProgress())
    assert record is not None and record.spent["updates"] == 2 and why == "" and not log.exists()


@pytest.mark.parametrize(
    ("fault", "said", "logged"),
    [
        (UserError("no such thing"), "no such thing", False),
        (ZeroDivisionError("by\nnothing"), "ZeroDivisionError: by", True),
        (MemoryError(), "MemoryError: ", True),
    ],
)
def test_a_failure_is_one_line_and_an_unexpected_one_is_logged(
    fault: Exception, said: str, logged: bool, plan: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise fault

    monkeypatch.setattr(module, "run_config", broken)
    log = tmp_path / "log"
    assert run_in_process(plan, runs=tmp_path, log=log, progress=NullProgress()) == (None, said)
    assert log.exists() == logged and (not logged or "Traceback" in log.read_text())


def test_a_stop_is_no_failure(plan: Config, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_in_process(plan, runs=tmp_path, log=tmp_path / "log", progress=NullProgress(), interrupted=lambda: True)
