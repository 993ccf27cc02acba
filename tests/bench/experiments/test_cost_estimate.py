"""A quote that holds: what a dry run promises, the meter shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.experiments.cost_estimate import branches, copies, declared, estimate_cost, held
from gpobench.bench.models.memory import GB
from gpobench.bench.progress import NullProgress
from gpobench.bench.spec import Search


@pytest.mark.parametrize("method", ["gpo", "diffusion-dpo", "flow-grpo"])
def test_the_meter_shows_what_was_quoted(method: str, tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    sets = ["prompts=2", "group=4", "optim.micro=0"]
    plan = resolve(RunRequest(method, f"{redness}:Paint", str(tiny_pipe), budget="nfe=900", sets=sets))
    told = estimate_cost(plan)
    done = running.run(plan, runs=tmp_path, progress=NullProgress())
    # groups without spread teach nothing, so the policy may cost less than declared, never more
    for role, each in told["nfe_an_image"].items():
        assert done.nfe_by_role[role] / done.spent["images"] <= each + 1e-9, role
    assert done.nfe_by_role["rollout"] / done.spent["images"] == told["nfe_an_image"]["rollout"]
    assert told["images"] - 8 <= done.spent["images"] and told["nfe"] <= 900
    assert told["memory"]["peak"] > 0 and any("peak of training" in line for line in told["lines"])


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({registry.canonical("method", n) for n in registry.entries("method")}))
def test_the_preset_of_sd35m_fits_a_card_of_24_gb(method: str) -> None:
    plan = resolve(RunRequest(method, "ocr", "sd35m", budget="nfe=1000"))
    if not isinstance(plan.settings, Search):
        assert estimate_cost(plan, "rtx4090")["memory"]["peak"] + GB <= 24 * GB


def test_gpo_on_sd35m_fits_a_card_of_24_gb() -> None:
    told = estimate_cost(resolve(RunRequest("gpo", "ocr", "sd35m", budget="nfe=1000000")), "rtx4090")
    assert told["memory"]["peak"] + GB <= 24 * GB and list(told["hours"]) == ["rtx4090"]
    assert told["hours"]["rtx4090"] > 1


def test_guidance_that_is_an_input_costs_nothing(redness: str) -> None:
    def rollout(model: str, steps: int) -> Any:
        return estimate_cost(resolve(RunRequest("rwr", f"{redness}:Paint", model, sets=[f"steps={steps}"])))[
            "nfe_an_image"
        ]["rollout"]

    assert rollout("flux1-dev", 7) == 7 and rollout("sdxl", 7) == 14


@pytest.mark.parametrize("method", ["gpo", "flow-grpo", "mix-grpo", "grpo-guard", "awm"])
def test_guidance_that_a_person_sets_costs_nothing_either_where_it_is_an_input(method: str) -> None:
    plain, asked = (resolve(RunRequest(method, "ocr", "flux1-dev", sets=[f"guidance={g}"])) for g in (1.0, 3.5))
    assert declared(plain) == declared(asked) and branches(asked) == 1
    assert (
        declared(resolve(RunRequest(method, "ocr", "sdxl", sets=["guidance=3.5"])))["rollout"]
        > declared(plain)["rollout"]
    )


def test_a_device_nobody_knows_is_one_line(tiny_pipe: Path, redness: str) -> None:
    with pytest.raises(UserError, match="unknown device 'h2000'; did you mean 'h200'"):
        estimate_cost(resolve(RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe))), "h2000")


def test_a_second_copy_of_the_adapter_is_counted() -> None:
    plans = {method: resolve(RunRequest(method, "ocr", "sd15")) for method in ("best-of-n", "gpo", "dgpo")}
    assert [copies(plan) for plan in plans.values()] == [0, 1, 2]
    one = held(plans["gpo"]).states / 5  # live, gradient, two moments, ema
    assert held(plans["dgpo"]).states == pytest.approx(6 * one)
