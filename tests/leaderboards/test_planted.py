"""Trained for real, spoiled on purpose: too slow or backwards is worse, other seeds are not, a hack is flagged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from torch import Tensor
from typer.testing import CliRunner

from gpobench.bench.evaluation.record import Record
from gpobench.bench.experiments import jobs
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.progress import NullProgress
from gpobench.leaderboards.baseline import read
from gpobench.leaderboards.board import load
from gpobench.leaderboards.commands import regress
from gpobench.leaderboards.regress import Report, judge
from gpobench.methods.gpo import GPO

Train = Callable[..., Record]
SETS = """optim.epochs=1 optim.minibatches=1 optim.weight_decay=0 optim.ema=0 optim.warmup=0 optim.lr=3e-3 prompts=6 group=12
beta=30 t_min=0 evaluation.eval_points=1""".split()
KEYS = {"redness/mean", "warmth/mean"}
app = typer.Typer()
app.command()(regress)


@pytest.fixture(scope="module")
def train(tiny_pipe: Path, redness: str) -> Train:
    def one(out: Path, seed: int, *sets: str, task: str = "Many") -> Record:
        plan = resolve(
            RunRequest("gpo", f"{redness}:{task}", str(tiny_pipe), seed=seed, budget="nfe=16000", sets=[*SETS, *sets])
        )
        return running.run(plan, runs=out, progress=NullProgress())

    return one


@pytest.fixture(scope="module")
def reported(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A baseline of three seeds, written from a commit."""
    folder = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPOBENCH_REVISION", "0123abc")
        patch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        for seed in range(3):
            train(folder / "runs", seed)
        path = folder / "gpo.toml"
        assert exit_code(folder / "runs", "--against", path, "--update", "--margin", "0.01") == 0
        yield path


def exit_code(*arguments: object) -> int:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code


def judged(path: Path, runs: Path) -> Report:
    return judge(path, *read(path), load([runs]))


def verdicts(report: Report, row: str = "gpo") -> dict[str, str]:
    return {f.key: f.verdict for f in report.findings if f.row == row}


def trained(train: Train, out: Path, seeds: Iterable[int], *sets: str) -> Path:
    for seed in seeds:
        train(out, seed, *sets)
    return out


def test_the_method_learns_at_all(reported: Path) -> None:
    known, _ = read(reported)
    base, gpo = ({n.key: n.mean for n in claim.number} for claim in known.row)
    assert set(gpo) == KEYS and all(gpo[key] > base[key] + 0.02 for key in KEYS)


def test_the_same_seeds_repeat_to_the_last_digit(train: Train, reported: Path, tmp_path: Path) -> None:
    runs = trained(train, tmp_path, [0, 1, 2])
    assert all(f.repeated for f in judged(reported, runs).findings) and exit_code(runs, "--against", reported) == 0


def test_runs_that_are_done_are_read_and_not_begun(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("a process was started for a run that is done")

    monkeypatch.setattr(jobs, "_start", begun)
    assert exit_code("--run", reported, "--out", reported.parent / "runs") == 0


def test_other_seeds_are_not_worse(train: Train, reported: Path, tmp_path: Path) -> None:
    runs = trained(train, tmp_path, [3, 4, 5])
    assert set(verdicts(judged(reported, runs)).values()) <= {"same", "cannot tell"}
    assert exit_code(runs, "--against", reported) in (0, 3)


def test_a_tenth_of_the_learning_rate_is_worse(train: Train, reported: Path, tmp_path: Path) -> None:
    runs = trained(train, tmp_path, [0, 1, 2], "optim.lr=3e-4")
    report = judged(reported, runs)
    assert verdicts(report)["redness/mean"] == "worse" and exit_code(runs, "--against", reported) == 1
    assert set(verdicts(report).values()) <= {"worse", "cannot tell"}
    assert set(verdicts(report, "base").values()) == {"same"}
    assert any("optim.lr 0.003 -> 0.0003" in note for note in report.notes)


def test_a_flipped_sign_is_worse(train: Train, reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = GPO.loss

    def flipped(self: GPO, rig: Any, batch: Any) -> Tensor:
        return -loss(self, rig, batch)

    monkeypatch.setattr(GPO, "loss", flipped)  # a fault in the code: the settings are the reported ones
    runs = trained(train, tmp_path, [0, 1, 2])
    assert (
        verdicts(judged(reported, runs)) == dict.fromkeys(KEYS, "worse") and exit_code(runs, "--against", reported) == 1
    )


def test_who_paints_what_only_the_training_scorer_likes_is_flagged(train: Train, tmp_path: Path) -> None:
    bait, honest = train(tmp_path, 0, task="Bait"), train(tmp_path, 0)
    assert bait.delta["redness/mean"].ci[0] > 0 and bait.delta["balance/mean"].ci[1] < 0  # type: ignore[operator]
    assert bait.flags.hack and not honest.flags.hack
