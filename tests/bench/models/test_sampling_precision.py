"""Sampling in bf16 on merged weights: near the exact velocities, on every copy, and without a trace in what follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.evaluator import sample_protocol
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models import loading
from gpobench.bench.models.open import open_model
from gpobench.bench.spec import Prompt

# Relative error of a velocity: each of some tens of products on its way is rounded by 2^-9, as a random walk adds up, and twice that.
HALF = 2 * 8 * 2**-9


def opened(folder: Path, precision: str = "bf16", **more: Any) -> Any:
    model_spec = replace(find_model_spec(str(folder)), sampling_precision=precision, **more)
    model: Any = open_model(
        model_spec, device="cpu", adapter=Adapter(rank=4, targets=model_spec.adapter.targets), seed=0
    )
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    return model


def draw(model: Any, weights: str = "policy", merged: bool = True, half: bool = True) -> torch.Tensor:
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cond = model.encode(["a", "b", "c"])
        return model.velocity(x, torch.tensor([0.9, 0.5, 0.1]), cond, weights=weights, merged=merged, half=half)


@pytest.mark.parametrize("family", ["tiny_pipe", "tiny_unet", "tiny_flux", "tiny_sdxl"])
def test_bf16_is_near_and_leaves_no_trace(family: str, request: pytest.FixtureRequest) -> None:
    """Every copy, the reference too; afterwards each weight is the object that it was."""
    model = opened(request.getfixturevalue(family))
    model.update_copy("old", 0.0)
    weights = {name: parameter for name, parameter in model.network.named_parameters()}
    for name in ("policy", "ref", "old"):
        exact, half = draw(model, name, half=False), draw(model, name)
        assert half.dtype == torch.float32 and not torch.equal(exact, half)
        assert float((exact - half).norm()) < HALF * float(exact.norm())
        assert torch.equal(draw(model, name, half=False), exact) and torch.equal(draw(model, name), half)
    separate = draw(model, merged=False)
    assert torch.allclose(separate, draw(model, half=False), atol=1e-4 * float(separate.abs().max()))
    draw(model, merged=False)
    assert all(weights[name] is parameter for name, parameter in model.network.named_parameters())


def test_evaluations_and_passes_with_a_gradient_are_never_in_bf16(tiny_pipe: Path) -> None:
    exact, fast = opened(tiny_pipe, "fp32"), opened(tiny_pipe)
    x = torch.randn(2, *exact.shape, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt("a red circle"), Prompt("two blue squares")]
    assert torch.equal(sample_protocol(exact, x, prompts), sample_protocol(fast, x, prompts))
    at = x, torch.tensor([0.9, 0.4]), exact.encode(["a", "b"])
    assert torch.equal(exact.velocity(*at, merged=True, half=True), fast.velocity(*at, merged=True, half=True))


def test_a_processor_samples_in_float32_unless_it_is_told(tiny_pipe: Path) -> None:
    """Its speed in bf16 differs from kind to kind, and a table made on two kinds must not differ by it."""
    assert not opened(tiny_pipe, "auto").samples_in_bf16
    assert not opened(tiny_pipe, merge=False).samples_in_bf16  # nothing is cast where nothing is merged
    assert torch.equal(draw(opened(tiny_pipe, "auto")), draw(opened(tiny_pipe, "fp32")))


def test_a_device_without_bf16_says_so_and_samples_in_float32(tiny_pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "has_bf16", lambda device: False)
    model = opened(tiny_pipe)
    assert "no bf16" in model.bf16_fault and not model.samples_in_bf16 and not opened(tiny_pipe, "auto").bf16_fault
    assert torch.equal(draw(model), draw(opened(tiny_pipe, "fp32")))


def test_the_setting_makes_another_run_and_other_words_are_refused() -> None:
    def plan(*sets: str) -> Any:
        return resolve(RunRequest("gpo", "ocr", "tiny", sets=sets))

    assert plan("sampling_precision=bf16").digest() != plan().digest() == plan("sampling_precision=auto").digest()
    with pytest.raises(UserError, match="sampling_precision is auto, fp32 or bf16 .*got 'fp16'"):
        plan("sampling_precision=fp16")
