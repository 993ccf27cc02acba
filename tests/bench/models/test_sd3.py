"""SD3 against its diffusers pipeline: the same latents, the same pictures, the same LoRA file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.evaluator import evaluate, noise
from gpobench.bench.evaluation.request import EvaluationRequest
from gpobench.bench.flow import path_shift
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.adapters import LORA_FILE
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.rendering import to_uint8
from gpobench.bench.spec import Prompt
from gpobench.bench.training.rig import MeteredRig

PROMPTS = ["a red circle", "two blue squares", "a photo of five green triangles"]


def plain_pipe(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(pipe: Any, latents: torch.Tensor, guidance: float, output: str, prompts: list[str] = PROMPTS) -> Any:
    return pipe(
        prompts, height=16, width=16, num_inference_steps=4, guidance_scale=guidance, latents=latents,
        max_sequence_length=1, output_type=output,
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tiny_pipe: Path) -> Any:
    return plain_pipe(tiny_pipe)


def rig_of(model: Any, redness: str, prompts: list[str] = PROMPTS) -> MeteredRig:
    return MeteredRig(model, [Prompt(p) for p in prompts], scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e9)), rows=2)


@pytest.fixture
def trained(tiny_pipe: Path) -> Any:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4, alpha=16), seed=0)
    model.update_copy("ema", 0.9)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.update_copy("ema", 0.5)
    return model


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_sampling_is_the_pipelines_own(tiny_pipe: Path, theirs: Any, redness: str, guidance: float) -> None:
    model_spec = replace(find_model_spec(str(tiny_pipe)), guidance=guidance)
    model = open_model(model_spec, device="cpu", adapter=Adapter(rank=4))
    start = noise([(p, 0) for p in PROMPTS], 7, model.shape)
    expected = ask(theirs, start, guidance, "latent")
    rig = rig_of(model, redness)
    got = rig.sample(start, torch.arange(3))
    assert (got - expected).abs().max() < 1e-4
    assert (got - start).abs().max() > 0.1
    other = rig.sample(start, torch.arange(3), guidance=5.5 - guidance)
    assert (other - expected).abs().max() > 1e-3  # guidance does something here
    rig.close()


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_judge_sees_the_pipelines_own_pictures(tiny_pipe: Path, theirs: Any, redness: str, guidance: float) -> None:
    model = open_model(replace(find_model_spec(str(tiny_pipe)), guidance=guidance), device="cpu")
    seen = evaluate(
        model, EvaluationRequest([Prompt(p) for p in PROMPTS], [scorer(f"{redness}:Redness")], images=1, seed=7, rows=2)
    )
    start = noise([(p, 0) for p in PROMPTS], 7, model.shape)
    expected = np.stack([np.asarray(image) for image in ask(theirs, start, guidance, "pil")])
    assert expected.std() > 1
    # the sums run in another order: a value that lies on the edge between two bytes may fall to either side
    gap = np.abs(seen.images.astype(int) - expected.astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01


@pytest.mark.parametrize("weights", ["policy", "ema"])
def test_a_saved_adapter_is_the_same_lora_for_plain_diffusers(
    tiny_pipe: Path,
    tmp_path: Path,
    trained: Any,
    redness: str,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained.save_adapter(tmp_path / "adapter", weights)
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == [LORA_FILE]
    start = noise([(p, 0) for p in PROMPTS], 7, trained.shape)

    def draw(model: Any, weights: str) -> np.ndarray:
        """One image at a time, as the pipeline below: in other company the last bits of a float may differ."""
        rig = rig_of(model, redness)
        drawn = [rig.sample(start[i : i + 1], torch.tensor([i]), weights=weights) for i in range(3)]
        rig.close()
        return to_uint8(trained.decode(torch.cat(drawn)))

    mine, base = draw(trained, weights), draw(trained, "ref")
    pipe = plain_pipe(tiny_pipe)
    pipe.load_lora_weights(str(tmp_path / "adapter"), weight_name=LORA_FILE)
    latents = torch.cat([ask(pipe, start[i : i + 1], 1.0, "latent", [PROMPTS[i]]) for i in range(3)])
    assert np.abs(mine.astype(int) - base.astype(int)).max() > 1
    theirs = to_uint8(trained.decode(latents))
    gap = np.abs(mine.astype(int) - theirs.astype(int))  # here on merged weights, there the LoRA is beside them
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01
    with monkeypatch.context() as patch:
        patch.setattr(trained, "spec", replace(trained.spec, merge=False))
        assert np.array_equal(draw(trained, weights), theirs)

    again = open_model(find_model_spec(str(tiny_pipe)), device="cpu")  # and for `gpobench eval`
    again.load_adapter(tmp_path / "adapter")
    assert np.array_equal(draw(again, "policy"), mine)


def test_a_wrong_alpha_would_be_another_adapter(tiny_pipe: Path, tmp_path: Path, trained: Any) -> None:
    """The file carries rank and alpha: without them diffusers takes alpha = rank, here a quarter of the effect."""
    trained.save_adapter(tmp_path, "policy")
    tensors = load_file(tmp_path / LORA_FILE)
    save_file(tensors, tmp_path / LORA_FILE)
    start = noise([(p, 0) for p in PROMPTS], 7, trained.shape)
    pipe = plain_pipe(tiny_pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    with torch.no_grad():
        cond = trained.encode(PROMPTS)
        t = torch.full((3,), 0.5)
        mine = trained.velocity(start, t, cond)
        theirs = pipe.transformer(start, cond["text"], cond["pooled"], t * 1000, return_dict=False)[0]
    assert (mine - theirs).abs().max() > 1e-3


def break_adapter(file: Path, how: str) -> None:
    tensors = load_file(file)
    if how == "text":
        file.write_text("this is no safetensors file")
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif how == "width":
        save_file({k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in tensors.items()}, file)
    elif how == "depth":
        save_file({k.replace("transformer_blocks.1", "transformer_blocks.7"): v for k, v in tensors.items()}, file)
    elif how == "other":
        save_file({k.replace("transformer.", "unet."): v for k, v in tensors.items()}, file)
    elif how == "empty":
        save_file({"nothing": torch.zeros(1)}, file)


@pytest.mark.parametrize("how", ["text", "cut", "width", "depth", "other", "empty"])
def test_an_adapter_that_does_not_fit_is_refused(tiny_pipe: Path, tmp_path: Path, trained: Any, how: str) -> None:
    trained.save_adapter(tmp_path, "policy")
    break_adapter(tmp_path / LORA_FILE, how)
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu")
    with pytest.raises(UserError, match="does not fit|no adapter|damaged") as caught:
        model.load_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_not_there_is_refused(tiny_pipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter at"):
        open_model(find_model_spec(str(tiny_pipe)), device="cpu").load_adapter(tmp_path / "gone")


def test_decode_undoes_latents_as_the_autoencoder_can(tiny_pipe: Path, tmp_path: Path) -> None:
    """Scale and shift cancel: latents(x) is what the pipeline's own encoder gives, decode(z) what its decoder gives."""
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_pipe, folder)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 1.7, "shift_factor": 0.3}))
    model = open_model(find_model_spec(str(folder)), device="cpu")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    z = model.latents(images)
    assert z.shape == (2, *model.shape) and z.dtype == torch.float32
    mode = model.vae.encode(images * 2 - 1).latent_dist.mode()
    assert torch.allclose(z / 1.7 + 0.3, mode, atol=1e-5)
    expected = model.vae.decode(mode).sample / 2 + 0.5
    assert torch.allclose(model.decode(z), expected, atol=1e-5)


def test_the_empty_prompt_is_encoded_once_and_a_training_prompt_once(
    tiny_pipe: Path, redness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(replace(find_model_spec(str(tiny_pipe)), guidance=4.5), device="cpu")
    asked: list[str] = []
    encode = model.encode

    def counting(prompts: Any) -> Any:
        asked.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(model, "encode", counting)
    rig = rig_of(model, redness)
    for _ in range(2):
        rig.sample(rig.noise(4), torch.tensor([0, 1, 0, 2]))
    rig.close()
    assert sorted(asked) == sorted(["", *PROMPTS])


def test_no_part_of_the_base_learns_or_drops_out(trained: Any) -> None:
    live = {id(p) for p in trained.parameters()}
    for part in (trained.network, trained.vae, trained.pipe.text_encoder, trained.pipe.text_encoder_3):
        assert not any(m.training for m in part.modules() if isinstance(m, torch.nn.Dropout))
        assert all(p.requires_grad == (id(p) in live) for p in part.parameters())


def test_a_forward_costs_what_its_multiplications_cost(tiny_pipe: Path) -> None:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu")
    with_lora = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4))
    assert model.flops_a_forward() == with_lora.flops_a_forward() > 1e5


def test_the_times_are_the_schedulers(theirs: Any, tiny_pipe: Path) -> None:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu")
    theirs.scheduler.set_timesteps(6)
    times = model.times(6)
    assert torch.equal(times, theirs.scheduler.sigmas) and len(times) == 7
    assert times[0] == 1 and times[-1] == 0 and bool((times.diff() < 0).all())


def test_the_path_has_the_schedulers_shift(theirs: Any, tiny_pipe: Path) -> None:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu")
    assert path_shift(model.path) == theirs.scheduler.config.shift == 3
    assert path_shift(open_model(find_model_spec("tiny"), device="cpu").path) == 1  # the embedded model has none


@pytest.fixture(autouse=True)
def fresh_noise() -> Iterator[None]:
    """No test here may depend on torch's own random numbers."""
    with torch.random.fork_rng(devices=[]):
        yield


def test_a_saved_adapter_is_the_same_bytes_in_every_process(tiny_pipe: Path, tmp_path: Path) -> None:
    """Python orders a set anew in each process, and peft keeps the targets in one."""
    code = (
        "import sys; from pathlib import Path; from gpobench.bench.model_spec import find_model_spec; "
        "from gpobench.bench.models.open import open_model; spec = find_model_spec(sys.argv[1]); "
        "open_model(spec, device='cpu', adapter=spec.adapter).save_adapter(Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tiny_pipe), str(tmp_path / "other")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True)
    model_spec = find_model_spec(str(tiny_pipe))
    open_model(model_spec, device="cpu", adapter=model_spec.adapter).save_adapter(tmp_path / "here")
    first, second = ((tmp_path / process / LORA_FILE).read_bytes() for process in ("other", "here"))
    assert first == second
