"""Miniature models: plain diffusers opens them, the same seed makes the same one, noise and words change their pictures."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.mini import write_sd3, write_sd15
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Prompt
from gpobench.bench.training.rig import MeteredRig

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"]
Write = Callable[..., Path]
both = pytest.mark.parametrize("write", [write_sd3, write_sd15])


def files(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    return {
        p.relative_to(folder).as_posix(): sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@both
def test_written_twice_it_is_the_same(write: Write, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", seed=1)
    assert files(first) == files(again) and files(first).keys() == files(other).keys()
    for name, mark in files(first).items():
        still = "text_encoder_3" in name  # the silent slot says nothing, whatever the seed
        if name.endswith(".safetensors") and not still:
            assert files(other)[name] != mark, name
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.stat().st_size for p in first.rglob("*") if p.is_file()) < 2**20


@pytest.mark.parametrize("family", ["tiny_pipe", "tiny_unet"])
def test_plain_diffusers_opens_it(family: str, request: pytest.FixtureRequest) -> None:
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(family)
    pipe = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == find_model_spec(str(folder)).pipeline
    (image,) = pipe("a red circle", height=16, width=16, num_inference_steps=4, guidance_scale=1.0).images
    assert image.size == (16, 16)


@pytest.mark.parametrize("family", ["tiny_pipe", "tiny_unet"])
def test_its_pictures_heed_noise_and_words_and_earn_different_rewards(
    family: str, request: pytest.FixtureRequest, redness: str
) -> None:
    model = open_model(find_model_spec(str(request.getfixturevalue(family))), device="cpu")
    rig = MeteredRig(model, [Prompt(p) for p in BOOK], scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e9)), rows=64)
    noise, prompt_ids = rig.noise(12), torch.arange(6)
    latents = rig.sample(noise, prompt_ids.repeat(2))
    reward = rig.score(latents, prompt_ids.repeat(2))
    assert float(reward.std()) > 0.02  # several grey levels apart
    assert 0.2 < float(model.decode(latents).mean()) < 0.8 and float(model.decode(latents).std()) > 0.1
    one = model.decode(rig.sample(noise[:1].expand(6, -1, -1, -1), prompt_ids))
    assert float(one.std(0).mean()) * 255 > 1  # the words alone make a visible difference
    rig.close()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["DDIM", "PNDM"])
def test_a_unet_comes_in_the_kinds_there_are(tmp_path: Path, prediction: Any, scheduler: str) -> None:
    model = open_model(
        find_model_spec(str(write_sd15(tmp_path / "u", prediction=prediction, scheduler=scheduler))), device="cpu"
    )
    assert model.prediction == prediction and type(model.pipe.scheduler).__name__ == f"{scheduler}Scheduler"
    assert model.shape == (4, 8, 8) and sum(p.numel() for p in model.network.parameters()) < 100_000


@pytest.mark.parametrize("part", ["unet", "transformer", "text_encoder"])
def test_nothing_starts_at_zero(part: str, tiny_pipe: Path, tiny_unet: Path) -> None:
    """A network that begins as nothing would hide a wrong gradient."""
    model = open_model(find_model_spec(str(tiny_pipe if part == "transformer" else tiny_unet)), device="cpu")
    assert all(bool(p.any()) for p in getattr(model.pipe, part).parameters())
