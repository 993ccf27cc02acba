"""Cheats: none passes `check`, and no run leaves one unmarked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench import registry
from gpobench.bench.conformance import run_laws
from gpobench.bench.conformance.harness import Harness, open_harness
from gpobench.bench.conformance.law import LawBroken
from gpobench.bench.conformance.source_rules import rule_violations
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model

FILE = Path(__file__).resolve().parents[2] / "cheats.py"
# By cheat: what the evidence says.
EVIDENCE = {
    "EvaluatesTheNetwork": "evaluations of the network: ",
    "CallsTheNetworksForward": "evaluations of the network: ",
    "ComputesInAThread": "evaluations of the network: ",
    "Decodes": "decoded images: ",
    "CallsTheScorer": "images scored by ",
    "OpensTheHeldOutScorer": "was loaded in training",
    "ForgetsItsSpend": "evaluations of the network: ",
    "FindsTheMeterByItsType": "decoded images: ",
    "RaisesItsBudget": "the budget of ",
    "StopsTheClock": "the clock was stopped",
    "RestartsTheClock": "the clock was stopped",
    "TrainsOnTestPrompts": "texts that are no training prompts",
    "ChangesTheFacts": "the training prompts are others",
    "StepsAnOptimiser": "updates: ",
    "WritesTheWeights": "the trained weights changed",
    "GoesBackwardTwice": "gradients of the network: ",
    "ReplacesTheScorer": "MeteredRig.scorer is another object",
    "ReplacesAFunction": "MeteredRig.prompts was replaced",
    "RemovesTheCounter": "evaluations of the network: ",
}


def cheat(name: str) -> Any:
    return registry.load("method", f"{FILE}:{name}")


def test_every_cheat_is_in_the_table() -> None:
    module = inspect.getmodule(cheat("Cheat"))
    defined = {
        name for name, kind in vars(module).items() if isinstance(kind, type) and kind.__module__ == module.__name__
    }  # type: ignore[union-attr]
    assert defined == {*EVIDENCE, "Cheat"}


@pytest.fixture(scope="module")
def harness(tiny_pipe: Path) -> Iterator[Any]:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4))

    def make(name: str) -> Harness:
        kind = cheat(name)
        with open_harness(kind, partial(kind, prompts=2), model) as opened:
            yield opened  # type: ignore[misc]

    yield lambda name: next(iter(make(name)))  # type: ignore[call-overload]


@pytest.mark.parametrize("name", EVIDENCE)
def test_a_cheat_for_real_runs_only_is_caught_by_check(harness: Any, name: str) -> None:
    opened = harness(name)
    run_laws.spends_through_rig.check(opened)  # on six prompts it behaves
    with pytest.raises(LawBroken, match=EVIDENCE[name]):
        run_laws.same_in_a_real_run.check(opened)


# One cheat of each way to find it; the others differ in what they do, not in where it is seen.
OFTEN = ("EvaluatesTheNetwork", "OpensTheHeldOutScorer", "RaisesItsBudget", "StopsTheClock", "TrainsOnTestPrompts",
         "ChangesTheFacts", "StepsAnOptimiser", "ReplacesAFunction")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that the base is evaluated once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in EVIDENCE]
)
def test_a_run_with_a_cheat_is_no_result_and_holds_the_evidence(
    name: str, tiny_pipe: Path, redness: str, runs: Path
) -> None:
    sets = ["prompts=2", "least=0", "evaluation.test_images=1", "evaluation.eval_points=1"]
    config = resolve(RunRequest(f"{FILE}:{name}", f"{redness}:Paint", str(tiny_pipe), budget="nfe=300", sets=sets))
    done = running.run(config, runs=runs)
    assert EVIDENCE[name] in done.fault, done.fault
    assert "clock" in name.lower() or any(EVIDENCE[name] in line for line in done.observed.differences)  # type: ignore[union-attr]


def test_no_cheat_passes_the_source_rules() -> None:
    found = list(rule_violations(FILE.read_text("utf-8"), "cheats"))
    for word in ("gc", "threading", "registry", "__closure__", "_roles", "torch.optim"):
        assert any(word in line for line in found), (word, found)
