"""Whole runs whose scorers work in processes of their own: the same bytes, the same counts, and a stop that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.record import Record
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import Config, RunRequest, resolve, scorer_tables
from gpobench.bench.progress import NullProgress
from gpobench.bench.scoring.worker_setting import WorkerSetting

# The scorer of a person's own file, made in a worker by the file's name; its worker is killed while a flag lies there.
MINE = """
import os, signal
from pathlib import Path
import numpy as np
from gpobench.bench.registry import load
from gpobench.bench.spec import Scores
Paint, Redness = load("task", "{redness}:Paint"), load("scorer", "{redness}:Redness")
class Helped(Redness):
    worker_images, image_seconds = 3, 1.0
    def __call__(self, images, prompts):
        if Path("{flag}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        parts = [super(Helped, self).__call__(images[i:i + 1], prompts[i:i + 1]).value["mean"] for i in range(len(images))]
        return Scores({{"mean": np.concatenate(parts)}})
class Mine(Paint):
    def reward(self, domain):
        return "{here}:Helped"
"""


@pytest.fixture
def plan(tiny_pipe: Path, redness: str, tmp_path: Path) -> Callable[..., Config]:
    here, flag = tmp_path / "mine.py", tmp_path / "dead"
    here.write_text(MINE.format(redness=redness, flag=flag, here=here))
    sets = ["optim.minibatches=2", "prompts=4", "group=6", "t_min=0", "rows=4"]
    return lambda *more: resolve(
        RunRequest("gpo", f"{here}:Mine", str(tiny_pipe), budget="nfe=1000", sets=[*sets, *more])
    )


def same_run(a: Record, b: Record) -> None:
    timeless = lambda spent: {currency: amount for currency, amount in spent.items() if currency != "seconds"}
    assert a.checksums == b.checksums and a.after == b.after and timeless(a.spent) == timeless(b.spent)
    assert a.observed and b.observed and a.observed.training == b.observed.training
    assert not a.observed.differences and not a.fault
    for name, use in a.scorers.items():
        assert (use.id, use.calls, use.errors) == (b.scorers[name].id, b.scorers[name].calls, b.scorers[name].errors)


def test_a_run_with_workers_is_the_run_without_and_one_whose_workers_are_killed_goes_on(
    plan: Any, tmp_path: Path
) -> None:
    without, workers = plan("scorer.workers=0"), plan("scorer.workers=2")
    assert without.slug() == workers.slug() and without.mapping() == workers.mapping()
    whole = running.run(without, runs=tmp_path / "whole", progress=NullProgress())
    assert whole.scorers["redness"].calls > 20
    iterations: list[int] = []

    def killed_after_two() -> bool:
        iterations.append(1)
        if len(iterations) == 2:
            (tmp_path / "dead").touch()
        return False

    with pytest.raises(
        UserError, match="redness: a worker process ended twice on the same images .killed by SIGKILL"
    ) as stop:
        running.run(workers, runs=tmp_path / "cut", progress=NullProgress(), interrupted=killed_after_two)
    assert "\n" not in str(stop.value)
    assert len((tmp_path / "cut" / workers.slug() / "metrics.jsonl").read_text().splitlines()) == 2
    (tmp_path / "dead").unlink()
    same_run(running.run(workers, runs=tmp_path / "cut", progress=NullProgress()), whole)


@pytest.mark.parametrize("value", ["1000", "-1", "many", "1.5", "true"])
def test_a_number_of_workers_that_is_none_is_one_line(plan: Any, value: str) -> None:
    with pytest.raises(
        UserError, match="^scorer.workers is 'auto' or a number of processes from 0 to [0-9]+ on this machine"
    ):
        plan(f"scorer.workers={value}")


def test_the_number_may_stand_in_a_settings_file_and_a_scorer_may_be_called_workers(
    tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    request = RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=100", config=file)
    file.write_text('[scorer]\nworkers = 1\n[scorer.reader]\nurl = "http://127.0.0.1:1"\n')
    config = resolve(request)
    assert config.scorer_workers == WorkerSetting(1) and list(config.scorer_locations) == ["reader"]
    assert list(scorer_tables(file)) == ["reader"]
    file.write_text('[scorer.workers]\nurl = "http://127.0.0.1:1"\n')
    assert list(resolve(request).scorer_locations) == ["workers"] == list(scorer_tables(file))
