"""SD15 against DDIM in its diffusers pipeline: the same latents, the same pictures, the same LoRA file."""

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

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.evaluation.evaluator import evaluate, noise
from gpobench.bench.evaluation.request import EvaluationRequest
from gpobench.bench.flow import mix, split, timestep
from gpobench.bench.model_spec import ATTENTION, UNET_ATTENTION, Adapter, find_model_spec
from gpobench.bench.models.adapters import LORA_FILE
from gpobench.bench.models.mini import write_sd15
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.rendering import to_uint8
from gpobench.bench.spec import Prompt
from gpobench.bench.training.rig import MeteredRig

PROMPTS = ["a red circle", "two blue squares", "a photo of five green triangles"]
SMALL = Adapter(rank=4, alpha=16, targets=UNET_ATTENTION)


def plain_pipe(folder: Path) -> Any:
    """The pipeline with the protocol's sampler, whatever it ships."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(
    pipe: Any, latents: torch.Tensor, guidance: float, output: str, steps: int = 4, prompts: list[str] = PROMPTS
) -> Any:
    return pipe(
        prompts, height=16, width=16, num_inference_steps=steps, guidance_scale=guidance, latents=latents,
        output_type=output,
    ).images  # fmt: skip


def starts(shape: tuple[int, ...]) -> torch.Tensor:
    return noise([(p, 0) for p in PROMPTS], 7, shape)


def rig_of(model: Any, redness: str, prompts: list[str] = PROMPTS) -> MeteredRig:
    return MeteredRig(model, [Prompt(p) for p in prompts], scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e9)), rows=2)


def edited(folder: Path, to: Path, part: str, **more: Any) -> Path:
    """A copy of the model with other words in one of its configs."""
    shutil.copytree(folder, to)
    file = next((to / part).glob("*config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return to


@pytest.fixture(scope="module")
def theirs(tiny_unet: Path) -> Any:
    return plain_pipe(tiny_unet)


@pytest.fixture
def trained(tiny_unet: Path) -> Any:
    model = open_model(find_model_spec(str(tiny_unet)), device="cpu", adapter=SMALL, seed=0)
    model.update_copy("ema", 0.9)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.update_copy("ema", 0.5)
    return model


# Sampling


@pytest.mark.parametrize("steps", [2, 4, 7, 10, 50])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_sampling_is_the_ddim_pipelines_own(
    tiny_unet: Path, theirs: Any, redness: str, guidance: float, steps: int
) -> None:
    model = open_model(replace(find_model_spec(str(tiny_unet)), guidance=guidance), device="cpu", adapter=SMALL)
    start = starts(model.shape)
    expected = ask(theirs, start, guidance, "latent", steps)
    rig = rig_of(model, redness)
    got = rig.sample(start, torch.arange(3), steps=steps)
    assert (got - expected).abs().max() < 1e-4
    assert (got - start).abs().max() > 0.1
    other = rig.sample(start, torch.arange(3), steps=steps, guidance=8.5 - guidance)
    assert (other - expected).abs().max() > 1e-2  # guidance does something here
    rig.close()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [False, True])
def test_sampling_follows_the_schedulers_config(
    tiny_unet: Path, tmp_path: Path, redness: str, prediction: str, spacing: str, to_one: bool
) -> None:
    folder = edited(
        tiny_unet, tmp_path / "other", "scheduler",
        prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=to_one,
    )  # fmt: skip
    model = open_model(find_model_spec(str(folder)), device="cpu")
    assert model.prediction == prediction
    rig = rig_of(model, redness)
    got = rig.sample(starts(model.shape), torch.arange(3), steps=10)
    expected = ask(plain_pipe(folder), starts(model.shape), 1.0, "latent", 10)
    assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    rig.close()


def test_the_protocol_samples_with_ddim_whatever_scheduler_the_folder_ships(
    tiny_unet: Path, theirs: Any, tmp_path: Path, redness: str
) -> None:
    folder = write_sd15(tmp_path / "pndm", scheduler="PNDM")
    assert "PNDM" in (folder / "model_index.json").read_text()
    model, ddim = (open_model(find_model_spec(str(f)), device="cpu") for f in (folder, tiny_unet))
    assert torch.equal(model.times(10), ddim.times(10)) and model.path == ddim.path
    rig = rig_of(model, redness)
    expected = ask(theirs, starts(model.shape), 1.0, "latent")
    assert (rig.sample(starts(model.shape), torch.arange(3)) - expected).abs().max() < 1e-4
    rig.close()


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_the_judge_sees_the_pipelines_own_pictures(tiny_unet: Path, theirs: Any, redness: str, guidance: float) -> None:
    model = open_model(replace(find_model_spec(str(tiny_unet)), guidance=guidance), device="cpu")
    seen = evaluate(
        model, EvaluationRequest([Prompt(p) for p in PROMPTS], [scorer(f"{redness}:Redness")], images=1, seed=7, rows=2)
    )
    expected = np.stack([np.asarray(image) for image in ask(theirs, starts(model.shape), guidance, "pil")])
    assert expected.std() > 1
    # the sums run in another order: a value that lies on the edge between two bytes may fall to either side
    gap = np.abs(seen.images.astype(int) - expected.astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_the_times_are_ddims(theirs: Any, tiny_unet: Path, steps: int) -> None:
    model = open_model(find_model_spec(str(tiny_unet)), device="cpu")
    theirs.scheduler.set_timesteps(steps)
    times = model.times(steps)
    assert torch.equal(timestep(times[:-1]), theirs.scheduler.timesteps.float()) and len(times) == steps + 1
    assert times[-1] == pytest.approx(1e-3) and bool((times.diff() < 0).all())  # set_alpha_to_one is False
    with pytest.raises(UserError, match="steps must lie in 1..1000"):
        model.times(1001)


def test_a_spacing_that_ddim_cannot_walk_becomes_leading(tiny_unet: Path, tmp_path: Path) -> None:
    folder = edited(tiny_unet, tmp_path / "linspace", "scheduler", timestep_spacing="linspace")
    ours, plain = (open_model(find_model_spec(str(f)), device="cpu").times(10) for f in (folder, tiny_unet))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_velocity_says_what_the_network_says(tiny_unet: Path, tmp_path: Path, prediction: str) -> None:
    """The noise, or the v, that a velocity implies is the U-Net's output at the table's timestep."""
    folder = edited(tiny_unet, tmp_path / "other", "scheduler", prediction_type=prediction)
    model = open_model(find_model_spec(str(folder)), device="cpu")
    x, k = starts(model.shape), torch.tensor([999, 500, 0])
    cond = model.encode(PROMPTS)
    with torch.no_grad():
        out = model.network(x, k, cond["text"]).sample
        t = (k + 1) / 1000
        v = model.velocity(x, t, cond)
    x0, eps = split(model.path, x, v, t)
    a, s = (c.float().view(3, 1, 1, 1) for c in model.path(t)[:2])
    said = eps if prediction == "epsilon" else a * eps - s * x0
    assert torch.allclose(said, out, atol=1e-4)
    again, velocity = mix(model.path, x0, eps, t)
    assert torch.allclose(again, x, atol=1e-4) and torch.allclose(velocity, v, atol=1e-3)


def test_a_time_below_the_table_is_its_first_entry(tiny_unet: Path) -> None:
    """Training draws any t in (0, 1); the U-Net is never asked about a negative timestep."""
    model = open_model(find_model_spec(str(tiny_unet)), device="cpu")
    x, cond = starts(model.shape), model.encode(PROMPTS)
    asked: list[torch.Tensor] = []
    model.network.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    with torch.no_grad():
        v = model.velocity(x, torch.tensor([0.0, 2e-4, 0.37251]), cond)
    assert bool(v.isfinite().all()) and asked[0].tolist() == pytest.approx([0, 0, 371.51])


def test_a_detached_branch_changes_the_gradient_and_not_the_value(trained: Any) -> None:
    x, t, cond = starts(trained.shape), torch.full((3,), 0.5), trained.encode(PROMPTS)
    whole, half = (trained.velocity(x, t, cond, guidance=7.5, detach=d) for d in (False, True))
    assert torch.equal(whole, half)
    a, b = (torch.autograd.grad(v.square().mean(), trained.parameters()) for v in (whole, half))
    assert max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True)) > 1e-6
    weight = whole.detach()
    asked = 7.5 * (trained.velocity(x, t, cond) * weight).mean()
    alone = (trained.velocity(x, t, cond, guidance=7.5, detach=True) * weight).mean()
    c, d = (torch.autograd.grad(loss, trained.parameters()) for loss in (asked, alone))
    most = max(float(p.abs().max()) for p in c)
    assert all((p - q).abs().max() < 1e-4 * most for p, q in zip(c, d, strict=True))


def test_the_empty_prompt_is_encoded_once_and_a_training_prompt_once(
    tiny_unet: Path, redness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(replace(find_model_spec(str(tiny_unet)), guidance=7.5), device="cpu")
    asked: list[str] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    rig = rig_of(model, redness)
    for _ in range(2):
        rig.sample(rig.noise(4), torch.tensor([0, 1, 0, 2]))
    rig.close()
    assert sorted(asked) == sorted(["", *PROMPTS])


def test_decode_undoes_latents_as_the_autoencoder_can(tiny_unet: Path, tmp_path: Path) -> None:
    model = open_model(find_model_spec(str(tiny_unet)), device="cpu")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z, scale = model.latents(images), 0.18215  # SD1.5's
    assert model.vae.config.scaling_factor == scale
    assert z.shape == (2, *model.shape) and z.dtype == torch.float32
    mode = model.vae.encode(images * 2 - 1).latent_dist.mode()
    assert torch.allclose(z / scale, mode, atol=1e-5)
    expected = model.vae.decode(mode).sample / 2 + 0.5
    assert torch.allclose(model.decode(z), expected, atol=1e-5)


# The adapter


def draw(model: Any, weights: str, redness: str) -> np.ndarray:
    """One image at a time: in other company the last bits of a float may differ."""
    rig, start = rig_of(model, redness), starts(model.shape)
    drawn = [rig.sample(start[i : i + 1], torch.tensor([i]), weights=weights) for i in range(3)]
    rig.close()
    return to_uint8(model.decode(torch.cat(drawn)))


@pytest.mark.parametrize("weights", ["policy", "ema"])
def test_a_saved_adapter_is_the_same_lora_for_plain_diffusers(
    tiny_unet: Path, tmp_path: Path, trained: Any, redness: str, weights: str
) -> None:
    trained.save_adapter(tmp_path / "adapter", weights)
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == [LORA_FILE]
    mine, base = draw(trained, weights, redness), draw(trained, "ref", redness)
    pipe, start = plain_pipe(tiny_unet), starts(trained.shape)
    pipe.load_lora_weights(str(tmp_path / "adapter"), weight_name=LORA_FILE)
    latents = torch.cat([ask(pipe, start[i : i + 1], 1.0, "latent", prompts=[PROMPTS[i]]) for i in range(3)])
    theirs = to_uint8(trained.decode(latents)).astype(int)
    # the pipeline steps in float32 with other sums: a value on the edge between two bytes may fall to either side
    gap = np.abs(mine.astype(int) - theirs)
    assert np.abs(mine.astype(int) - base.astype(int)).max() > 1
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01

    again = open_model(find_model_spec(str(tiny_unet)), device="cpu")  # and for `gpobench eval`
    again.load_adapter(tmp_path / "adapter")
    assert np.array_equal(draw(again, "policy", redness), mine)


def test_the_copies_are_switched(trained: Any) -> None:
    x, t, cond = starts(trained.shape), torch.full((3,), 0.7), trained.encode(PROMPTS)
    with torch.no_grad():
        said = {
            weights: trained.velocity(x, t, cond, weights=weights) for weights in ("policy", "ref", "ema", "policy")
        }
        base = trained.velocity(x, t, cond, weights="ref")
        assert torch.equal(said["policy"], trained.velocity(x, t, cond))
    assert torch.equal(said["ref"], base)
    assert all(
        (said[a] - said[b]).abs().max() > 1e-4 for a, b in (("policy", "ref"), ("policy", "ema"), ("ref", "ema"))
    )
    assert trained.lora.copies == ["ema"]


def test_the_older_spelling_of_a_lora_is_taken(tiny_unet: Path, tmp_path: Path, trained: Any, redness: str) -> None:
    """The training script of diffusers writes lora.down and lora.up."""
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = convert_state_dict_to_diffusers(trained.lora.adapter("policy"))
    settings = trained.network.peft_config["default"].to_dict()
    trained.pipe.save_lora_weights(str(tmp_path), unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
    assert any(".lora.down." in key for key in load_file(tmp_path / LORA_FILE))
    again = open_model(find_model_spec(str(tiny_unet)), device="cpu")
    again.load_adapter(tmp_path)
    assert np.array_equal(draw(again, "policy", redness), draw(trained, "policy", redness))


def break_adapter(file: Path, how: str) -> None:
    tensors = load_file(file)
    if how == "text":
        file.write_text("this is no safetensors file")
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif how == "width":
        save_file({k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in tensors.items()}, file)
    elif how == "depth":
        save_file({k.replace("up_blocks.1", "up_blocks.7"): v for k, v in tensors.items()}, file)
    elif how == "other":
        save_file({k.replace("unet.", "transformer."): v for k, v in tensors.items()}, file)
    elif how == "empty":
        save_file({"nothing": torch.zeros(1)}, file)


@pytest.mark.parametrize("how", ["text", "cut", "width", "depth", "other", "empty"])
def test_an_adapter_that_does_not_fit_is_refused(tiny_unet: Path, tmp_path: Path, trained: Any, how: str) -> None:
    trained.save_adapter(tmp_path, "policy")
    break_adapter(tmp_path / LORA_FILE, how)
    model = open_model(find_model_spec(str(tiny_unet)), device="cpu")
    with pytest.raises(UserError, match="does not fit|no adapter|damaged") as caught:
        model.load_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_part_of_the_base_learns_or_drops_out(trained: Any) -> None:
    live = {id(p) for p in trained.parameters()}
    assert live
    for part in (trained.network, trained.vae, trained.pipe.text_encoder):
        assert not any(m.training for m in part.modules() if isinstance(m, torch.nn.Dropout))
        assert all(p.requires_grad == (id(p) in live) for p in part.parameters())


def test_a_forward_costs_what_its_multiplications_cost(tiny_unet: Path) -> None:
    model = open_model(find_model_spec(str(tiny_unet)), device="cpu")
    with_lora = open_model(find_model_spec(str(tiny_unet)), device="cpu", adapter=SMALL)
    assert model.flops_a_forward() == with_lora.flops_a_forward() > 1e5


# Cards and folders


def test_the_class_decides_protocol_and_targets_of_a_folder(tiny_unet: Path, tmp_path: Path) -> None:
    small = find_model_spec(str(tiny_unet))
    assert (small.steps, small.guidance, small.height, small.domain) == (4, 1.0, 16, "glyphs")
    shutil.copytree(tiny_unet, tmp_path / "plain")
    (tmp_path / "plain" / "recipe.json").unlink()
    plain, named = find_model_spec(str(tmp_path / "plain")), find_model_spec("sd15")
    for model_spec in (plain, named):
        assert (model_spec.steps, model_spec.guidance, model_spec.height, model_spec.width, model_spec.domain) == (
            50,
            7.5,
            512,
            512,
            "open",
        )
        assert (
            model_spec.adapter == Adapter(targets=UNET_ATTENTION) and model_spec.pipeline == "StableDiffusionPipeline"
        )
    assert named.source == "stable-diffusion-v1-5/stable-diffusion-v1-5" and named.licence == "CreativeML OpenRAIL-M"
    for model_spec in (small, plain):
        assert open_model(model_spec, device="cpu", adapter=model_spec.adapter).parameters()
    with pytest.raises(UserError, match="no module 'add_q_proj'"):
        open_model(small, device="cpu", adapter=Adapter(targets=ATTENTION))


def test_a_folder_of_another_class_is_one_line(tiny_pipe: Path, tiny_unet: Path) -> None:
    for folder, wanted in ((tiny_pipe, "StableDiffusionPipeline"), (tiny_unet, "StableDiffusion3Pipeline")):
        with pytest.raises(UserError, match=f"holds a StableDiffusion.*, not the {wanted}") as caught:
            open_model(replace(find_model_spec(str(folder)), pipeline=wanted), device="cpu")
        assert "\n" not in str(caught.value)


def test_a_unet_that_wants_more_than_a_latent_is_refused(tmp_path: Path, tiny_unet: Path) -> None:
    """An inpainting U-Net takes the masked picture as well."""
    folder = edited(tiny_unet, tmp_path / "inpaint", "unet", in_channels=9)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="wants more than a latent"):
        open_model(find_model_spec(str(folder)), device="cpu")


def test_a_prediction_nobody_knows_is_refused(tmp_path: Path, tiny_unet: Path) -> None:
    folder = edited(tiny_unet, tmp_path / "odd", "scheduler", prediction_type="flow_prediction")
    with pytest.raises(UserError, match="predicts 'flow_prediction'"):
        open_model(find_model_spec(str(folder)), device="cpu")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("family", ["tiny_unet", "tiny_pipe"])
def test_a_missing_tensor_is_not_filled_with_noise(
    family: str, part: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    part = "transformer" if (family, part) == ("tiny_pipe", "unet") else part
    folder = tmp_path / "gap"
    shutil.copytree(request.getfixturevalue(family), folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost = sorted(tensors)[3]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Missing, match=f"cannot be loaded: {part} lacks 1 tensors") as caught:
        open_model(find_model_spec(str(folder)), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_part_without_weights_is_missing(tiny_unet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_unet, folder)
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(Missing, match="cannot be loaded"):
        open_model(find_model_spec(str(folder)), device="cpu")


def test_half_precision_speaks_float32(tiny_unet: Path) -> None:
    model = open_model(find_model_spec(str(tiny_unet)), device="cpu", precision="bf16", adapter=SMALL)
    full = open_model(find_model_spec(str(tiny_unet)), device="cpu", adapter=SMALL)
    x, t = starts(model.shape), torch.full((3,), 0.8)
    a, b = (m.velocity(x, t, m.encode(PROMPTS), guidance=2.0) for m in (model, full))
    assert a.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    assert (a - b).abs().max() < 0.05 * b.abs().max()
    assert model.decode(x).dtype == model.latents(model.decode(x)).dtype == torch.float32
