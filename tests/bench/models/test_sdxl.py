"""SDXL against DDIM in its diffusers pipeline: two texts, six sizes, zeros that are no empty text, the same LoRA file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpobench.bench.errors import Missing, UserError
from gpobench.bench.evaluation.evaluator import noise, sample_protocol
from gpobench.bench.flow import timestep
from gpobench.bench.model_spec import UNET_ATTENTION, Adapter, find_model_spec
from gpobench.bench.models.adapters import LORA_FILE
from gpobench.bench.models.mini import write_sdxl
from gpobench.bench.models.open import open_model
from gpobench.bench.rendering import to_uint8
from gpobench.bench.spec import Prompt

PROMPTS = ["a red circle", "two blue squares", "a photo of five green triangles"]
BOOK = [Prompt(p) for p in PROMPTS]
SMALL = Adapter(rank=4, alpha=16, targets=UNET_ATTENTION)


def plain_pipe(folder: Path) -> Any:
    """The pipeline with the protocol's sampler, whatever it ships."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(
    pipe: Any, latents: torch.Tensor, guidance: float, output: str, steps: int = 4, prompts: list[str] = PROMPTS,
    negative: str | None = None,
) -> Any:  # fmt: skip
    return pipe(
        prompts, height=2 * latents.shape[2], width=2 * latents.shape[3], num_inference_steps=steps,
        guidance_scale=guidance, latents=latents, output_type=output,
        negative_prompt=None if negative is None else [negative] * len(prompts),
    ).images  # fmt: skip


def starts(shape: tuple[int, ...]) -> torch.Tensor:
    return noise([(p, 0) for p in PROMPTS], 7, shape)


def walk(model: Any, start: torch.Tensor, guidance: float, steps: int = 4) -> torch.Tensor:
    """What the judge draws."""
    model.guidance, model.steps = guidance, steps
    return sample_protocol(model, start, BOOK)


def edited(folder: Path, to: Path, file: str, **more: Any) -> Path:
    """A copy of the model with other words in one of its configs."""
    shutil.copytree(folder, to)
    (to / file).write_text(json.dumps(json.loads((to / file).read_text()) | more))
    return to


@pytest.fixture(scope="module")
def theirs(tiny_sdxl: Path) -> Any:
    return plain_pipe(tiny_sdxl)


@pytest.fixture
def trained(tiny_sdxl: Path) -> Any:
    model = open_model(find_model_spec(str(tiny_sdxl)), device="cpu", adapter=SMALL, seed=0)
    model.update_copy("ema", 0.9)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.update_copy("ema", 0.5)
    return model


@pytest.mark.parametrize("steps", [2, 4, 10])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sampling_is_the_ddim_pipelines_own(tiny_sdxl: Path, theirs: Any, guidance: float, steps: int) -> None:
    model = open_model(find_model_spec(str(tiny_sdxl)), device="cpu", adapter=SMALL)
    start = starts(model.shape)
    expected = ask(theirs, start, guidance, "latent", steps)
    got = walk(model, start, guidance, steps)
    assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    assert (got - start).abs().max() > 0.1
    assert (walk(model, start, 6.0 - guidance, steps) - expected).abs().max() > 1e-2  # guidance does something here


def test_a_picture_that_is_not_square_is_the_pipelines_own(tiny_sdxl: Path, theirs: Any) -> None:
    """Height and width are not confused in the six sizes."""
    model = open_model(replace(find_model_spec(str(tiny_sdxl)), height=24, width=16), device="cpu")
    start = starts(model.shape)
    expected = ask(theirs, start, 5.0, "latent")
    assert (walk(model, start, 5.0) - expected).abs().max() < 1e-4 * float(expected.abs().max())
    model.sizes = model.sizes.roll(1)
    assert (walk(model, start, 5.0) - expected).abs().max() > 1e-3  # the sizes do something here


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("negative", [None, "", "a blue circle"])
def test_the_negative_prompt_is_the_pipelines(
    tiny_sdxl: Path, tmp_path: Path, force: bool, negative: str | None
) -> None:
    """None is zeros where the folder says so; "" is an empty text; a text is a text."""
    folder = edited(tiny_sdxl, tmp_path / "f", "model_index.json", force_zeros_for_empty_prompt=force)
    model = open_model(replace(find_model_spec(str(folder)), negative_prompt=negative), device="cpu")
    start = starts(model.shape)
    expected = ask(plain_pipe(folder), start, 5.0, "latent", negative=negative)
    got = walk(model, start, 5.0)
    assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    other = open_model(
        replace(find_model_spec(str(folder)), negative_prompt=None if negative == "" else ""), device="cpu"
    )
    same = not force and not negative  # without zeros, nothing is an empty text
    assert ((walk(other, start, 5.0) - got).abs().max() < 1e-6) == same


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_pictures_are_the_pipelines_own(tiny_sdxl: Path, theirs: Any, guidance: float) -> None:
    model = open_model(find_model_spec(str(tiny_sdxl)), device="cpu")
    start = starts(model.shape)
    mine = to_uint8(model.decode(walk(model, start, guidance)))
    expected = np.stack([np.asarray(image) for image in ask(theirs, start, guidance, "pil")])
    assert expected.std() > 1
    # the sums run in another order: a value that lies on the edge between two bytes may fall to either side
    gap = np.abs(mine.astype(int) - expected.astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01


def test_ddim_walks_whatever_scheduler_the_folder_ships(tiny_sdxl: Path, theirs: Any, tmp_path: Path) -> None:
    euler = open_model(find_model_spec(str(tiny_sdxl)), device="cpu")
    assert type(euler.pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    ddim = open_model(find_model_spec(str(write_sdxl(tmp_path / "d", scheduler="DDIM"))), device="cpu")
    assert torch.equal(euler.times(10), ddim.times(10)) and euler.path == ddim.path
    theirs.scheduler.set_timesteps(10)
    assert torch.equal(timestep(euler.times(10)[:-1]), theirs.scheduler.timesteps.float())


def test_a_v_prediction_is_the_pipelines_own(tmp_path: Path) -> None:
    folder = write_sdxl(tmp_path / "v", prediction="v_prediction")
    model = open_model(find_model_spec(str(folder)), device="cpu")
    expected = ask(plain_pipe(folder), starts(model.shape), 5.0, "latent")
    got = walk(model, starts(model.shape), 5.0)
    assert model.prediction == "v_prediction"
    assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("weights", ["policy", "ema"])
def test_a_saved_adapter_is_the_same_lora_for_plain_diffusers(
    tiny_sdxl: Path, tmp_path: Path, trained: Any, weights: str
) -> None:
    trained.save_adapter(tmp_path / "adapter", weights)
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == [LORA_FILE]
    start = starts(trained.shape)

    def draw(model: Any, weights: str) -> np.ndarray[Any, Any]:
        """One image at a time: in other company the last bits of a float may differ."""
        ends = [sample_protocol(model, start[i : i + 1], BOOK[i : i + 1], weights) for i in range(3)]
        return to_uint8(trained.decode(torch.cat(ends)))

    mine, base = draw(trained, weights), draw(trained, "ref")
    pipe = plain_pipe(tiny_sdxl)
    pipe.load_lora_weights(str(tmp_path / "adapter"), weight_name=LORA_FILE)
    latents = torch.cat([ask(pipe, start[i : i + 1], 1.0, "latent", prompts=[PROMPTS[i]]) for i in range(3)])
    assert np.abs(mine.astype(int) - base.astype(int)).max() > 1
    gap = np.abs(mine.astype(int) - to_uint8(trained.decode(latents)).astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01

    again = open_model(find_model_spec(str(tiny_sdxl)), device="cpu")  # and for `gpobench eval`
    again.load_adapter(tmp_path / "adapter")
    assert np.array_equal(draw(again, "policy"), mine)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_tensor_is_not_filled_with_noise(tiny_sdxl: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "gap"
    shutil.copytree(tiny_sdxl, folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Missing, match=f"cannot be loaded: {part} lacks 1 tensors") as caught:
        open_model(find_model_spec(str(folder)), device="cpu")
    assert "\n" not in str(caught.value)


def test_what_it_cannot_do_is_one_line(tiny_sdxl: Path, tiny_unet: Path, tmp_path: Path) -> None:
    inpaint = edited(tiny_sdxl, tmp_path / "inpaint", "unet/config.json", in_channels=9)
    file = inpaint / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    flow = edited(tiny_sdxl, tmp_path / "flow", "scheduler/scheduler_config.json", prediction_type="flow_prediction")
    for model_spec, said in (
        (find_model_spec(str(inpaint)), "wants more than a latent"),
        (find_model_spec(str(flow)), "predicts 'flow_prediction'"),
        (replace(find_model_spec(str(tiny_sdxl)), height=17), "multiples of 2 pixels"),
        (
            replace(find_model_spec(str(tiny_unet)), pipeline="StableDiffusionXLPipeline"),
            "holds a StableDiffusionPipeline, not the",
        ),
    ):
        with pytest.raises(UserError, match=said) as caught:
            open_model(model_spec, device="cpu")
        assert "\n" not in str(caught.value)


def test_the_autoencoder_is_float32_beside_half_precision(tiny_sdxl: Path) -> None:
    half = open_model(find_model_spec(str(tiny_sdxl)), device="cpu", precision="bf16", adapter=SMALL)
    full = open_model(find_model_spec(str(tiny_sdxl)), device="cpu", adapter=SMALL)
    assert half.vae.dtype == torch.float32 and half.network.dtype == torch.bfloat16
    x, t = starts(half.shape), torch.full((3,), 0.8)
    a, b = (m.velocity(x, t, m.encode(PROMPTS), guidance=2.0) for m in (half, full))
    assert a.dtype == torch.float32 and all(p.dtype == torch.float32 for p in half.parameters())
    assert (a - b).abs().max() < 0.05 * b.abs().max()
    assert torch.equal(half.decode(x), full.decode(x))  # to the last bit
    assert torch.equal(half.latents(full.decode(x)), full.latents(full.decode(x)))
