"""The embedded model's last step, from t = .001 to 0, is not taken: no image changes by a grey level, and every count agrees."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.evaluator import noise, sample_protocol
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.experiments.cost_estimate import nfe_per_image
from gpobench.bench.flow import Kernel, cps, dpm2, ode, sde
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.base import EMPTY_STEP
from gpobench.bench.models.open import open_model
from gpobench.bench.rendering import to_uint8
from gpobench.bench.spec import Prompt, nfe_of_an_image
from gpobench.bench.training.rig import walk

GREY = 1 / 255


@pytest.fixture(scope="module")
def tiny() -> Any:
    return open_model(find_model_spec("tiny"), device="cpu")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [p for task in ("ocr", "counting") for p in registry.task(task).prompts("validation", "glyphs")[:8]]


def ends(model: Any, prompts: list[Prompt], times: Tensor, kernel: Kernel) -> Tensor:
    """The latents that the kernel reaches along a grid; stochastic steps draw the same noise whatever the grid's length."""
    x, cond = noise([(p.text, 0) for p in prompts], 1, model.shape), model.encode([p.text for p in prompts])
    velocity = lambda x, t, *_: model.velocity(x, t, cond, weights="ref", merged=True)
    steps = iter(range(len(times)))

    def draw(n: int) -> Tensor:
        step = next(steps)
        return noise([(f"step {step}", row) for row in range(n)], 1, model.shape)

    with torch.no_grad():
        for step in walk(model.path, velocity, x, times, [kernel] * (len(times) - 1), draw):
            x = step.x_next
    return x


@pytest.mark.parametrize("kernel", [ode, dpm2, sde(0.555), cps(0.8)])
def test_the_last_step_of_the_embedded_model_changes_no_image_by_a_grey_level(
    tiny: Any, prompts: list[Prompt], kernel: Kernel
) -> None:
    """Whatever the kernel: before rounding by less than a level, so that afterwards no pixel moves by more than one."""
    published = tiny.published_times(10)
    assert torch.equal(tiny.times(9), published[:-1]) and float(published[-2]) <= EMPTY_STEP
    with torch.no_grad():
        images = [tiny.decode(ends(tiny, prompts, times, kernel)) for times in (published, tiny.times(9))]
    assert float((images[0].clamp(0, 1) - images[1].clamp(0, 1)).abs().max()) < 0.6 * GREY
    levels = [to_uint8(image).astype(int) for image in images]
    assert abs(levels[0] - levels[1]).max() <= 1 and (levels[0] != levels[1]).mean() < 0.1


def test_the_published_grid_is_there_and_is_the_pipelines(prompts: list[Prompt]) -> None:
    """With drop_last_step off the sampler is plain diffusers, all ten steps, from the same noise; with it on a level apart."""
    spec = find_model_spec("tiny")
    whole, short = open_model(replace(spec, drop_last_step=False), device="cpu"), open_model(spec, device="cpu")
    assert (whole.steps, short.steps) == (10, 9) and torch.equal(whole.times(10), short.published_times(10))
    x = noise([(p.text, 0) for p in prompts], 1, whole.shape)
    whole.pipe.set_progress_bar_config(disable=True)
    theirs = whole.pipe(
        [p.text for p in prompts], height=spec.height, width=spec.width, num_inference_steps=spec.steps,
        guidance_scale=spec.guidance, max_sequence_length=spec.max_sequence_length, latents=x, output_type="pt",
    ).images  # fmt: skip
    with torch.no_grad():
        ours = [m.decode(sample_protocol(m, x, prompts)).clamp(0, 1) for m in (whole, short)]
    assert float((ours[0] - theirs).abs().max()) < 0.05 * GREY
    assert float((ours[1] - theirs).abs().max()) < 0.6 * GREY


@pytest.mark.parametrize("method", sorted(registry.entries("method")))
def test_the_plan_counts_the_steps_that_are_taken(tiny: Any, method: str) -> None:
    settings = resolve(RunRequest(method, "ocr", "tiny"))
    planned = nfe_per_image(settings)
    assert nfe_of_an_image(tiny) == tiny.steps == settings.model_spec().sampler_steps == 9
    assert planned == dict(settings.settings.cost(9, 1.0))


def test_sampling_evaluates_the_network_once_a_step(tiny: Any, prompts: list[Prompt]) -> None:
    calls: list[int] = []
    hook = tiny.network.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        sample_protocol(tiny, noise([("a", 0)], 1, tiny.shape), prompts[:1])
    finally:
        hook.remove()
    assert len(calls) == nfe_of_an_image(tiny) == 9


def test_a_step_that_is_not_empty_is_not_dropped(tiny_pipe: Path, tmp_path: Path) -> None:
    """The shift of SD3.5 puts the last time at .0089: that step is part of the image."""
    folder = tmp_path / "shifted"
    shutil.copytree(tiny_pipe, folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 3.0}))
    spec = find_model_spec(str(folder))
    assert open_model(spec, device="cpu").times(4)[-1] == 0
    with pytest.raises(UserError, match=r"the last of 5 steps begins at t = 0\.0089 and cannot be dropped"):
        open_model(replace(spec, drop_last_step=True), device="cpu").times(4)


@pytest.mark.parametrize("name", sorted(registry.entries("model")))
def test_no_other_model_drops_a_step(name: str) -> None:
    spec = find_model_spec(name)
    assert spec.drop_last_step == (name == "tiny") and spec.sampler_steps == spec.steps - (name == "tiny")
