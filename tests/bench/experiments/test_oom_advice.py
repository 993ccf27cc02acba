"""Advice after out-of-memory errors: the settings it names make the run fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.experiments.cost_estimate import estimate_memory
from gpobench.bench.experiments.oom_advice import advice
from gpobench.bench.model_spec import ModelSpec, find_model_spec
from gpobench.bench.models.memory import GB, MARGIN, MemoryEstimate
from gpobench.bench.models.sd3 import SD3
from gpobench.bench.progress import NullProgress

METHODS = sorted(registry.entries("method"))


def plan(method: str, *sets: str, model: str = "sd35m") -> Config:
    return resolve(RunRequest(method, "ocr", model, sets=sets))


def needed(p: Config) -> MemoryEstimate:
    return estimate_memory(p)


@pytest.mark.parametrize("sampling", [True, False])
@pytest.mark.parametrize("gigabytes", [18.0, 24.0, 40.0, 80.0])
@pytest.mark.parametrize("method", ["gpo", "diffusion-nft", "awm", "best-of-n"])
def test_the_advised_settings_make_the_run_fit(method: str, gigabytes: float, sampling: bool) -> None:
    greedy = [] if method == "best-of-n" else ["optim.micro=64"]
    p = plan(method, "rows=256", "offload=false", "checkpointing=false", *greedy)
    said = advice(p, gigabytes, sampling=sampling)
    sets = re.findall(r"--set (\S+)", said)
    assert sets and f"{needed(p).training / GB:.1f} GB in training" in said
    mended = plan(method, "rows=256", "offload=false", "checkpointing=false", *greedy, *sets)
    assert needed(mended).fits(gigabytes) and needed(mended).peak < needed(p).peak
    assert f"to {needed(mended).peak / GB:.1f} GB" in said


@pytest.mark.parametrize(("sampling", "knob"), [(True, "rows=4"), (False, "optim.micro=4")])
def test_where_the_estimate_was_too_small_one_setting_is_halved(sampling: bool, knob: str) -> None:
    p = plan("diffusion-dpo", "optim.micro=8", "rows=8")
    assert needed(p).fits(80) and f"--set {knob} brings" in advice(p, 80, sampling=sampling)


def test_a_run_that_fits_with_no_setting_is_told_what_it_needs() -> None:
    said = advice(plan("gpo"), 8.0, sampling=False)
    told = re.search(r"With the smallest settings it takes ([\d.]+) GB", said)
    assert told and float(told[1]) > 8


@pytest.mark.parametrize(("value", "said"), [("rows=-1", "number of images"), ("offload=3", "true or false")])
def test_a_setting_of_the_wrong_type_is_refused(value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan("gpo", value)


def test_a_setting_equal_to_the_model_specs_makes_no_other_run() -> None:
    model_spec = find_model_spec("sd35m")
    same = plan("gpo", f"rows={model_spec.rows}", "offload=true", "checkpointing=true", "compile=auto")
    other = plan("gpo", "compile=true", "checkpointing=false")
    assert same.digest() == plan("gpo").digest() != other.digest()
    assert (
        other.model_spec() == replace(model_spec, compile=True, checkpointing=False) and same.model_spec() == model_spec
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_cost_estimate(method: str) -> None:
    from gpobench.bench.experiments.cost_estimate import estimate_cost

    lines = "\n".join(estimate_cost(plan(method), "h100")["lines"])
    assert "GB" in lines and "h100" in lines and "images" in lines


def full(shape: int) -> torch.Tensor:
    """Ask the allocator for what no machine has: its own words are what is to be understood."""
    return torch.empty(shape, 2**50)


@pytest.mark.parametrize("moment", ["sampling", "training", "accelerator"])
def test_a_run_that_does_not_fit_ends_in_one_line(
    moment: str, tiny_pipe: Path, redness: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity: Callable[..., Any] = SD3.velocity

    def greedy(self: Any, *args: Any, **more: Any) -> Any:
        if moment == "accelerator":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")
        if torch.is_grad_enabled() == (moment == "training"):
            full(64)
        return velocity(self, *args, **more)

    monkeypatch.setattr(SD3, "velocity", greedy)
    p = resolve(RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=400", sets=["prompts=2", "group=4"]))
    with pytest.raises(UserError) as said:
        running.run(p, runs=tmp_path, progress=NullProgress())
    text = str(said.value)
    assert text.startswith("out of memory on ") and "\n" not in text and "--set" in text
    assert ("in training:" in text) == (moment == "training")


def test_another_error_is_not_taken_for_out_of_memory(
    tiny_pipe: Path, redness: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any, **more: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(SD3, "velocity", broken)
    p = resolve(RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=400"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        running.run(p, runs=tmp_path, progress=NullProgress())


def test_a_model_of_unknown_size_still_gets_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = ModelSpec("strange", "nobody/strange", pipeline="StableDiffusion3Pipeline", rows=16)
    p = plan("gpo")
    monkeypatch.setattr(Config, "model_spec", lambda self: strange)
    assert "--set rows=8" in advice(p, 24, sampling=True)
    assert MARGIN > 0
