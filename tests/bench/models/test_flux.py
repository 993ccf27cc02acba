"""Flux against its diffusers pipeline: tokens and latents, guidance as an input, the same pictures, the same LoRA file."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.evaluation.evaluator import noise, sample_protocol
from gpobench.bench.flow import path_shift, shift
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.adapters import LORA_FILE
from gpobench.bench.models.flux import pack, positions, unpack
from gpobench.bench.models.mini import write_flux
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.rendering import to_uint8
from gpobench.bench.spec import Prompt
from gpobench.bench.training.rig import MeteredRig

PROMPTS = ["a red circle", "two blue squares", "a photo of five green triangles"]


def plain_pipe(folder: Path) -> Any:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
    pipe.text_encoder_2.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(
    pipe: Any, latents: torch.Tensor, guidance: float, output: str, steps: int = 4, prompts: list[str] = PROMPTS
) -> Any:
    """The pipeline's own: tokens in, and images or tokens out."""
    b, c, h, w = latents.shape
    made = pipe(
        prompts, height=2 * h, width=2 * w, num_inference_steps=steps, guidance_scale=guidance,
        latents=pipe._pack_latents(latents, b, c, h, w), max_sequence_length=16, output_type=output,
    ).images  # fmt: skip
    return pipe._unpack_latents(made, 2 * h, 2 * w, pipe.vae_scale_factor) if output == "latent" else made


def starts(shape: tuple[int, ...]) -> torch.Tensor:
    return noise([(p, 0) for p in PROMPTS], 7, shape)


def walk(model: Any, start: torch.Tensor, guidance: float, steps: int = 4) -> torch.Tensor:
    """What the judge draws."""
    model.guidance, model.steps = guidance, steps
    return sample_protocol(model, start, [Prompt(p) for p in PROMPTS])


@pytest.fixture(scope="module")
def theirs(tiny_flux: Path) -> Any:
    return plain_pipe(tiny_flux)


@pytest.fixture
def trained(tiny_flux: Path) -> Any:
    model = open_model(find_model_spec(str(tiny_flux)), device="cpu", adapter=Adapter(rank=4, alpha=16), seed=0)
    model.update_copy("ema", 0.9)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.update_copy("ema", 0.5)
    return model


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sampling_is_the_pipelines_own(tiny_flux: Path, theirs: Any, guidance: float, steps: int) -> None:
    model = open_model(find_model_spec(str(tiny_flux)), device="cpu", adapter=Adapter(rank=4))
    start = starts(model.shape)
    expected = ask(theirs, start, guidance, "latent", steps)
    got = walk(model, start, guidance, steps)
    assert (got - expected).abs().max() < 1e-4
    assert (got - start).abs().max() > 0.1
    assert (walk(model, start, 4.5 - guidance, steps) - expected).abs().max() > 1e-3  # guidance does something here


def test_a_picture_that_is_not_square_is_the_pipelines_own(tiny_flux: Path, theirs: Any) -> None:
    model = open_model(replace(find_model_spec(str(tiny_flux)), height=24, width=16), device="cpu")
    assert model.shape == (4, 12, 8)
    start = starts(model.shape)
    assert (walk(model, start, 3.5) - ask(theirs, start, 3.5, "latent")).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_pictures_are_the_pipelines_own(tiny_flux: Path, theirs: Any, guidance: float) -> None:
    model = open_model(find_model_spec(str(tiny_flux)), device="cpu")
    start = starts(model.shape)
    mine = to_uint8(model.decode(walk(model, start, guidance)))
    expected = np.stack([np.asarray(image) for image in ask(theirs, start, guidance, "pil")])
    assert expected.std() > 1
    # the sums run in another order: a value that lies on the edge between two bytes may fall to either side
    gap = np.abs(mine.astype(int) - expected.astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("steps", [1, 6, 28])
def test_the_times_are_shifted_by_the_number_of_tokens(tiny_flux: Path, theirs: Any, size: int, steps: int) -> None:
    model = open_model(replace(find_model_spec(str(tiny_flux)), height=size, width=size), device="cpu")
    ask(theirs, starts(model.shape), 1.0, "latent", steps)  # sets the scheduler
    times = model.times(steps)
    assert torch.allclose(times, theirs.scheduler.sigmas, atol=1e-7) and len(times) == steps + 1
    assert times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())
    if steps > 1:
        small = open_model(find_model_spec(str(tiny_flux)), device="cpu").times(steps)
        assert bool((small[1:-1] < times[1:-1]).all()) == (size > 16)  # more tokens, more time at the noisy end
    # and so are the times of training: the grid is shift(1, ..., 1 / steps) by the path's own shift
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    assert torch.allclose(shift(even, path_shift(model.path)).float(), times[:-1], atol=1e-6)


def test_guidance_is_one_evaluation_and_the_same_in_every_batch(tiny_flux: Path) -> None:
    model = open_model(find_model_spec(str(tiny_flux)), device="cpu")
    assert model.guided_cost == 1
    calls: list[int] = []
    model.network.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    x, t, cond = starts(model.shape), torch.tensor([0.9, 0.5, 0.1]), model.encode(PROMPTS)
    with torch.no_grad():
        whole = model.velocity(x, t, cond, guidance=3.5)
        assert calls == [3]
        for i in range(3):
            one = {key: value[i : i + 1] for key, value in cond.items()}
            assert torch.allclose(model.velocity(x[i : i + 1], t[i : i + 1], one, guidance=3.5)[0], whole[i], atol=1e-5)


def test_a_rig_charges_a_guided_velocity_as_the_model_says(tiny_flux: Path, redness: str) -> None:
    meter = Meter(Budget(nfe=1e9))
    model = open_model(find_model_spec(str(tiny_flux)), device="cpu")
    rig = MeteredRig(model, [Prompt(p) for p in PROMPTS], scorer(f"{redness}:Redness"), meter, rows=3)
    seen: list[int] = []
    model.network.register_forward_pre_hook(lambda *a: seen.append(1))
    rig.sample(starts(model.shape), torch.arange(3), steps=4, guidance=3.5)
    rig.close()
    assert len(seen) == 4 and meter.nfe == 12


def test_a_model_without_distilled_guidance_runs(tmp_path: Path) -> None:
    folder = write_flux(tmp_path / "schnell", distilled=False)
    model = open_model(find_model_spec(str(folder)), device="cpu")
    start = starts(model.shape)
    assert (walk(model, start, 3.5) - ask(plain_pipe(folder), start, 0.0, "latent")).abs().max() < 1e-4


def test_pack_is_the_pipelines_and_unpack_undoes_it() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 10)) and pack(x).shape == (2, 15, 16)
    assert torch.equal(unpack(pack(x), 3, 5), x)
    assert torch.equal(positions(3, 5), FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32))


@pytest.mark.parametrize("weights", ["policy", "ema"])
def test_a_saved_adapter_is_the_same_lora_for_plain_diffusers(
    tiny_flux: Path, tmp_path: Path, trained: Any, weights: str
) -> None:
    trained.save_adapter(tmp_path / "adapter", weights)
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == [LORA_FILE]
    start = starts(trained.shape)
    book = [Prompt(p) for p in PROMPTS]

    def draw(model: Any, weights: str) -> np.ndarray[Any, Any]:
        """One image at a time: in other company the last bits of a float may differ."""
        ends = [sample_protocol(model, start[i : i + 1], book[i : i + 1], weights) for i in range(3)]
        return to_uint8(trained.decode(torch.cat(ends)))

    mine, base = draw(trained, weights), draw(trained, "ref")
    pipe = plain_pipe(tiny_flux)
    pipe.load_lora_weights(str(tmp_path / "adapter"), weight_name=LORA_FILE)
    latents = torch.cat([ask(pipe, start[i : i + 1], 1.0, "latent", prompts=[PROMPTS[i]]) for i in range(3)])
    assert np.abs(mine.astype(int) - base.astype(int)).max() > 1
    gap = np.abs(mine.astype(int) - to_uint8(trained.decode(latents)).astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01

    again = open_model(find_model_spec(str(tiny_flux)), device="cpu")  # and for `gpobench eval`
    again.load_adapter(tmp_path / "adapter")
    assert np.array_equal(draw(again, "policy"), mine)


def test_an_adapter_of_another_depth_is_refused(tiny_flux: Path, tmp_path: Path, trained: Any) -> None:
    trained.save_adapter(tmp_path, "policy")
    file = tmp_path / LORA_FILE
    save_file({k.replace("_blocks.0", "_blocks.7"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match="does not fit"):
        open_model(find_model_spec(str(tiny_flux)), device="cpu").load_adapter(tmp_path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_tensor_is_not_filled_with_noise(tiny_flux: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "gap"
    shutil.copytree(tiny_flux, folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Missing, match=f"cannot be loaded: {part} lacks 1 tensors") as caught:
        open_model(find_model_spec(str(folder)), device="cpu")
    assert "\n" not in str(caught.value)


def test_what_it_cannot_do_is_one_line(tiny_flux: Path, tiny_pipe: Path) -> None:
    model_spec = find_model_spec(str(tiny_flux))
    for bad, said in (
        (replace(model_spec, negative_prompt=""), "takes no negative prompt"),
        (replace(model_spec, height=18), "multiples of 4 pixels"),
        (
            replace(find_model_spec(str(tiny_pipe)), pipeline="FluxPipeline"),
            "holds a StableDiffusion3Pipeline, not the Flux",
        ),
    ):
        with pytest.raises(UserError, match=said) as caught:
            open_model(bad, device="cpu")
        assert "\n" not in str(caught.value)


def test_decode_undoes_latents_as_the_autoencoder_can(tiny_flux: Path) -> None:
    model = open_model(find_model_spec(str(tiny_flux)), device="cpu")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mode = model.vae.encode(images * 2 - 1).latent_dist.mode()
    z = model.latents(images)
    assert torch.allclose(z, (mode - 0.1159) * 0.3611, atol=1e-5) and z.shape == (2, *model.shape)
    assert torch.allclose(model.decode(z), model.vae.decode(mode).sample / 2 + 0.5, atol=1e-5)


def test_half_precision_speaks_float32(tiny_flux: Path) -> None:
    half = open_model(find_model_spec(str(tiny_flux)), device="cpu", precision="bf16", adapter=Adapter(rank=4))
    full = open_model(find_model_spec(str(tiny_flux)), device="cpu", adapter=Adapter(rank=4))
    x, t = starts(half.shape), torch.full((3,), 0.8)
    a, b = (m.velocity(x, t, m.encode(PROMPTS), guidance=2.0) for m in (half, full))
    assert a.dtype == torch.float32 and all(p.dtype == torch.float32 for p in half.parameters())
    assert (a - b).abs().max() < 0.05 * b.abs().max()
    assert half.decode(x).dtype == half.latents(half.decode(x)).dtype == torch.float32
