"""When a run compiles by itself: where the predicted saving is twice the cost, and never on the presets of the embedded model."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.experiments.compile_choice import MARGIN, choose_compiling
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.experiments.context import PhaseTimer

METHODS = sorted(registry.entries("method"))


def plan(method: str = "gpo", model: str = "tiny", budget: str | None = None, *sets: str) -> Config:
    return resolve(RunRequest(method, "ocr", model, budget=budget, sets=sets))


@pytest.mark.parametrize("method", METHODS)
def test_no_run_of_the_embedded_model_compiles_by_itself(method: str) -> None:
    choice = choose_compiling(plan(method), "cpu")
    assert not choice.earned and 0 < choice.saving < choice.network and "not compiled" in choice.line()


@pytest.mark.parametrize("method", METHODS)
def test_a_long_run_earns_it_and_a_short_one_does_not(method: str) -> None:
    """What is saved grows with the budget and the cost does not: there is one length from which on it is earned."""
    choices = [choose_compiling(plan(method, budget=f"nfe={10**k}"), "cpu") for k in range(4, 9)]
    earned = [choice.earned for choice in choices]
    assert earned == sorted(earned) and not earned[0] and earned[-1]
    assert [c.earned for c in choices] == [c.saving >= MARGIN * c.cost for c in choices]


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "a GPU of next year"])
def test_the_default_run_of_a_large_model_earns_it_on_any_gpu(name: str) -> None:
    assert choose_compiling(plan(model="sd35m"), "cuda", name).earned


def test_a_budget_that_says_nothing_of_the_length_compiles_nothing() -> None:
    choice = choose_compiling(plan(budget="updates=1000000"), "cpu")
    assert not choice.earned and math.isinf(choice.network) and "budget" in choice.line()
    assert not choose_compiling(plan(budget="nfe=1e9"), "mps").earned
    assert not choose_compiling(plan(budget="nfe=1e9,seconds=60"), "cpu").earned


@pytest.mark.parametrize("value", ["true", "false", "auto"])
def test_the_setting_takes_three_values(value: str) -> None:
    spec = plan("gpo", "tiny", None, f"compile={value}").model_spec()
    assert spec.compile == {"true": True, "false": False}.get(value, value)


def test_another_value_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"compile is true, auto or false .*got 'fast'"):
        plan("gpo", "tiny", None, "compile=fast")
    with pytest.raises(UserError, match="merge is true or false"):
        plan("gpo", "tiny", None, "merge=auto")


def test_a_phase_is_told_without_the_seconds_of_compiling() -> None:
    compiled = [0.0]
    timer = PhaseTimer(lambda: compiled[0])
    with timer("train"):
        time.sleep(0.05)
        with timer("evaluate"):
            compiled[0] += 0.04
            time.sleep(0.05)
        compiled[0] += 0.03
    assert timer.seconds["compile"] == pytest.approx(0.07)
    assert 0 < timer.seconds["evaluate"] < 0.05 + 0.04 and timer.seconds["train"] > 0
    assert sum(timer.seconds.values()) == pytest.approx(0.1, abs=0.08)


def test_a_run_that_compiles_nothing_has_no_such_phase(tmp_path: Path) -> None:
    timer = PhaseTimer(lambda: 0.0)
    with timer("train"):
        pass
    assert list(timer.seconds) == ["train"]
