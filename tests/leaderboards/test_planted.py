"""Real training with planted faults: no learning, a tenth of its rate or a flipped loss is worse, other seeds are not."""

from __future__ import annotations

import shutil
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
from gpobench.leaderboards.baseline import read_baseline
from gpobench.leaderboards.commands.regress import regress
from gpobench.leaderboards.regress import LoadedBaseline, RegressionReport, check
from gpobench.leaderboards.runs import load_runs
from gpobench.methods.gpo import GPO

Train = Callable[..., Record]
SETS = """optim.epochs=1 optim.minibatches=1 optim.weight_decay=0 optim.ema=0 optim.warmup=0 optim.lr=3e-3 prompts=6 group=12
beta=30 t_min=0 evaluation.eval_points=1""".split()
KEYS = {"redness/mean", "warmth/mean"}
app = typer.Typer()
app.command()(regress)


@pytest.fixture(scope="module")
def train(tiny_pipe: Path, redness: str) -> Train:
    def run_once(out: Path, seed: int, *sets: str, task: str = "Many", nfe: int = 16000) -> Record:
        plan = resolve(
            RunRequest("gpo", f"{redness}:{task}", str(tiny_pipe), seed=seed, budget=f"nfe={nfe}", sets=[*SETS, *sets])
        )
        return running.run(plan, runs=out, progress=NullProgress())

    return run_once


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
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


def check_runs(path: Path, runs: Path) -> RegressionReport:
    return check(LoadedBaseline(path, *read_baseline(path)), load_runs([runs]))


def verdicts(report: RegressionReport, row: str = "gpo") -> dict[str, str]:
    return {f.key: f.verdict for f in report.findings if f.row == row}


def trained(train: Train, out: Path, seeds: Iterable[int], *sets: str) -> Path:
    for seed in seeds:
        train(out, seed, *sets)
    return out


def test_the_method_learns_at_all(reported: Path) -> None:
    baseline, _ = read_baseline(reported)
    base, gpo = ({n.key: n.mean for n in claim.number} for claim in baseline.row)
    assert set(gpo) == KEYS and all(gpo[key] > base[key] + 0.02 for key in KEYS)


def test_the_same_seeds_repeat_to_the_last_digit(train: Train, reported: Path, tmp_path: Path) -> None:
    """One of the three is trained again."""
    runs = shutil.copytree(reported.parent / "runs", tmp_path / "runs")
    (known,) = (run.folder for run in load_runs([runs]) if run.record.seed == 1)
    shutil.rmtree(known)
    trained(train, runs, [1])
    assert known.is_dir()
    assert all(f.repeated for f in check_runs(reported, runs).findings) and exit_code(runs, "--against", reported) == 0


def test_runs_that_are_done_are_read_and_not_begun(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("a process was started for a run that is done")

    monkeypatch.setattr(jobs, "_start", begun)
    assert exit_code("--run", reported, "--out", reported.parent / "runs") == 0


def test_other_seeds_are_not_worse(train: Train, reported: Path, tmp_path: Path) -> None:
    runs = trained(train, tmp_path, [3, 4, 5])
    assert set(verdicts(check_runs(reported, runs)).values()) <= {"same", "cannot tell"}
    assert exit_code(runs, "--against", reported) in (0, 3)


def test_a_tenth_of_the_learning_rate_is_worse(train: Train, reported: Path, tmp_path: Path) -> None:
    runs = trained(train, tmp_path, [0, 1, 2], "optim.lr=3e-4")
    report = check_runs(reported, runs)
    assert verdicts(report)["redness/mean"] == "worse" and exit_code(runs, "--against", reported) == 1
    assert set(verdicts(report).values()) <= {"worse", "cannot tell"}
    assert set(verdicts(report, "base").values()) == {"same"}
    assert any("optim.lr 0.003 -> 0.0003" in note for note in report.notes)


def test_a_method_that_learns_nothing_is_worse_within_any_margin(train: Train, reported: Path, tmp_path: Path) -> None:
    runs = trained(train, tmp_path, [0, 1, 2], "optim.lr=1e-12")
    baseline, scores = read_baseline(reported)
    wide = lambda claim: tuple(number.model_copy(update={"margin": 100.0}) for number in claim.number)
    rows = tuple(claim.model_copy(update={"number": wide(claim)}) for claim in baseline.row)
    report = check(LoadedBaseline(reported, baseline.model_copy(update={"row": rows}), scores), load_runs([runs]))
    assert verdicts(report) == dict.fromkeys(KEYS, "worse") and report.code(allow_unsure=True) == 1
    assert all("is not told any more" in f.note for f in report.findings if f.row == "gpo")
    assert exit_code(runs, "--against", reported, "--allow-unsure") == 1


def test_a_flipped_sign_is_worse(train: Train, reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = GPO.loss

    def flipped(self: GPO, rig: Any, batch: Any) -> Tensor:
        return -loss(self, rig, batch)

    monkeypatch.setattr(GPO, "loss", flipped)  # a fault in the code: the settings are the reported ones
    runs = trained(train, tmp_path, [0, 1, 2])
    assert (
        verdicts(check_runs(reported, runs)) == dict.fromkeys(KEYS, "worse")
        and exit_code(runs, "--against", reported) == 1
    )


def test_a_hack_of_the_training_scorer_is_flagged(train: Train, reported: Path, tmp_path: Path) -> None:
    (honest,) = (run.record for run in load_runs([reported.parent / "runs"]) if run.record.seed == 0)
    bait = train(tmp_path, 0, task="Bait", nfe=48000)  # far beyond where both halves are equally red
    assert bait.delta["redness/mean"].ci[0] > 0 and bait.delta["balance/mean"].ci[1] < 0  # type: ignore[operator]
    assert bait.flags.hack and not honest.flags.hack
