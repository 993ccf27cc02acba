"""Laws of compiled networks: equal velocities and gradients, also merged and checkpointed; seconds told apart; no compiler needed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models import compiling
from gpobench.bench.models.open import open_model
from gpobench.bench.training.observation import Observer

PROMPTS = ["a red circle", "two blue squares"]
FAMILIES = ["tiny_pipe", "tiny_unet", "tiny_flux", "tiny_sdxl"]


def opened(folder: Path, **more: Any) -> Any:
    """A miniature with a LoRA off its start."""
    model_spec = find_model_spec(str(folder))
    adapter = Adapter(rank=4, targets=model_spec.adapter.targets)
    model: Any = open_model(replace(model_spec, **more), device="cpu", adapter=adapter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def answers(model: Any) -> list[torch.Tensor]:
    """The velocity on merged weights, and the gradients of a loss that asks the reference before it goes backward."""
    at = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    at = (*at, model.encode(PROMPTS))
    with torch.no_grad():
        sampled = model.velocity(*at, merged=True)
    v = model.velocity(*at)
    with torch.no_grad():
        target = model.velocity(*at, weights="ref")
    return [sampled, *torch.autograd.grad((v - target).square().mean(), model.parameters())]


def agree(model: Any, other: Any) -> bool:
    first, second = answers(model), answers(other)
    size = max(float(g.abs().max()) for g in first[1:])  # a gradient of 0 has no digits of its own
    return torch.allclose(first[0], second[0], rtol=1e-4, atol=1e-4) and all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * size) for a, b in zip(first[1:], second[1:], strict=True)
    )


@pytest.mark.timeout(900)
def test_a_compiled_network_says_the_same_with_checkpointing_and_merged_weights(tiny_pipe: Path) -> None:
    """The first call compiles and the clock knows it; the second one does not."""
    fast = opened(tiny_pipe, compile=True, checkpointing=True)
    if fast.compiler_fault:
        pytest.skip(fast.compiler_fault)
    before = compiling.seconds_compiling()
    assert agree(opened(tiny_pipe), fast) and fast.merges
    compiled = compiling.seconds_compiling()
    assert compiled > before and agree(opened(tiny_pipe, checkpointing=True), fast)
    assert compiling.seconds_compiling() == compiled
    assert fast.flops_a_forward() == opened(tiny_pipe).flops_a_forward()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles(family: str, checkpointing: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    fast = opened(folder, compile=True, checkpointing=checkpointing)
    if fast.compiler_fault:
        pytest.skip(fast.compiler_fault)
    assert agree(opened(folder), fast)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_blocks_and_they_hold_what_is_adapted(family: str, request: pytest.FixtureRequest) -> None:
    model = opened(request.getfixturevalue(family))
    inside = {id(p) for block in compiling.blocks(model.network) for p in block.parameters()}
    assert inside and all(id(p) in inside for p in model.parameters())


def test_a_machine_without_a_compiler_computes_the_same_and_says_so(
    tiny_pipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    compiling.compiler_fault.cache_clear()
    try:
        model = opened(tiny_pipe, compile=True)
    finally:
        compiling.compiler_fault.cache_clear()
    assert not model.compiled and "\n" not in model.compiler_fault and "/nowhere/g++" in model.compiler_fault
    assert all(torch.equal(a, b) for a, b in zip(answers(model), answers(opened(tiny_pipe)), strict=True))


# Seconds


def test_seconds_of_compiling_are_no_seconds_of_training(tiny_pipe: Path) -> None:
    """Neither in the meter nor in what is observed beside it; a bound of seconds is not passed by them."""
    clock = compiling.CompileClock()
    clock.start()
    time.sleep(0.05)  # before training
    meter = Meter(Budget(seconds=1.0), uncharged=lambda: clock.seconds)
    observer = Observer(opened(tiny_pipe), [], lambda: clock.seconds)
    with observer.training():
        meter.start()
        time.sleep(0.3)
        clock.stop()
        time.sleep(0.1)
        clock.start()
        time.sleep(0.3)
        clock.stop()
        meter.stop()
    training, observed = meter.seconds, observer.observe(meter, meter.budget)
    assert 0.1 <= training < clock.seconds and clock.seconds >= 0.6
    assert 0.1 <= observed.seconds < clock.seconds and not observed.differences
