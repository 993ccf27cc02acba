"""Laws of all four pipeline classes: checkpointed gradients, precisions, text encoders in main memory, large pictures."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from gpobench.bench.errors import UserError
from gpobench.bench.model_spec import Adapter, ModelSpec, find_model_spec
from gpobench.bench.models import loading
from gpobench.bench.models.memory_saving import apply_memory_settings
from gpobench.bench.models.open import open_model, usage

FAMILIES = ["tiny_pipe", "tiny_unet", "tiny_flux", "tiny_sdxl"]
PROMPTS = ["a red circle", "two blue squares"]
every = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def model_spec(family: str, request: pytest.FixtureRequest) -> ModelSpec:
    return find_model_spec(str(request.getfixturevalue(family)))


def opened(model_spec: ModelSpec, push: float = 0.05, **more: Any) -> Any:
    """A model with a LoRA off its start, and a copy of it that is elsewhere."""
    adapter = Adapter(rank=4, targets=model_spec.adapter.targets)
    model = open_model(replace(model_spec, **more), device="cpu", adapter=adapter)
    model.update_copy("old", 0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(push * torch.randn(p.shape, generator=generator))
    return model


def inputs(model: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.9, 0.4]), model.encode(PROMPTS)


def gradients(model: Any, between: str, guidance: float = 1.0) -> list[torch.Tensor]:
    """Of the live weights, when other weights are asked between the forward and the backward pass."""
    at = inputs(model)
    v = model.velocity(*at, guidance=guidance)
    with torch.no_grad():
        target = model.velocity(*at, weights=between) if between else torch.zeros_like(v)
    return list(torch.autograd.grad((v - target).square().mean(), model.parameters()))


@every
def test_checkpointing_changes_no_gradient(model_spec: ModelSpec) -> None:
    """Above all where other weights are on when the blocks run for the second time."""
    plain, saving = opened(model_spec), opened(model_spec, checkpointing=True)
    for between, guidance in (("", 1.0), ("ref", 1.0), ("old", 2.5)):
        a, b = (gradients(model, between, guidance) for model in (plain, saving))
        assert sum(float(g.abs().sum()) for g in a) > 0
        for g, h in zip(a, b, strict=True):
            assert torch.allclose(g, h, rtol=1e-4, atol=1e-6 * float(max(x.abs().max() for x in a))), between
        for model in (plain, saving):  # and the weights that were on stay on
            assert model.lora._current == (between or "policy")


def kept(model: Any) -> int:
    """Numbers that autograd holds after a forward."""
    at, seen = inputs(model), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.numel()), t)[1], lambda t: t):
        model.velocity(*at)
    return sum(seen)


@every
def test_checkpointing_keeps_less(model_spec: ModelSpec) -> None:
    assert kept(opened(model_spec, checkpointing=True)) < 0.5 * kept(opened(model_spec))


@every
def test_a_copy_of_a_checkpointing_model_is_on_its_own(model_spec: ModelSpec) -> None:
    model = opened(model_spec, checkpointing=True)
    other = copy.deepcopy(model)
    before = gradients(other, "ref")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(other, "ref"), strict=True))


@every
def test_attention_runs_through_torchs_own_kernel(model_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = functional.scaled_dot_product_attention

    def counting(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return kernel(*args, **more)

    model = open_model(model_spec, device="cpu")
    at = inputs(model)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", counting)
    with torch.no_grad():
        model.velocity(*at)
    assert calls


@every
def test_encoders_come_for_a_prompt_and_leave_before_the_network(
    model_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without GPU the moves are watched, not made."""
    model = open_model(replace(model_spec, guidance=2.0), device="cpu")
    transitions: list[torch.device] = []
    encoders = model.encoders
    encoders.offload, encoders.device = True, torch.device("cuda")
    assert encoders.modules and all(part in model.pipe.components.values() for part in encoders.modules)
    for part in encoders.modules:
        monkeypatch.setattr(part, "to", lambda where: transitions.append(torch.device(where)))
    here, home = torch.device("cuda"), encoders.storage
    x = torch.zeros(1, *model.shape)
    with torch.no_grad():
        first, _ = model.encode([PROMPTS[0]]), model.encode([PROMPTS[1]])
        assert transitions == [here] * len(encoders.modules)  # two prompts, one move
        model.velocity(x, torch.tensor([0.5]), first)
        assert transitions[len(encoders.modules) :] == [home] * len(encoders.modules)
        model.velocity(x, torch.tensor([0.4]), first)
        model.decode(x)
        assert len(transitions) == 2 * len(encoders.modules)  # once gone they stay away
        model.encode([PROMPTS[0]])
        model.decode(x)
        assert transitions[2 * len(encoders.modules) :] == [here] * len(encoders.modules) + [home] * len(
            encoders.modules
        )


@every
def test_offload_on_a_cpu_is_nothing(model_spec: ModelSpec) -> None:
    a, b = open_model(model_spec, device="cpu"), open_model(replace(model_spec, offload=True), device="cpu")
    assert not b.encoders.offload
    with torch.no_grad():
        assert torch.equal(a.velocity(*inputs(a), guidance=2.0), b.velocity(*inputs(b), guidance=2.0))


@pytest.mark.parametrize("family", ["tiny_pipe", "tiny_unet"])
@pytest.mark.parametrize("negative", ["", "a blue circle"])
def test_the_negative_prompt_is_the_pipelines(model_spec: ModelSpec, negative: str) -> None:
    """SD3 and SD1.5: no negative prompt is an empty one; SDXL has its own test."""
    told, none = (open_model(replace(model_spec, negative_prompt=n), device="cpu") for n in (negative, None))
    with torch.no_grad():
        a, b = (m.velocity(*inputs(m), guidance=4.0) for m in (told, none))
    assert torch.equal(a, b) == (negative == "")
    kind = type(told.pipe)
    more = {"max_sequence_length": 1} if model_spec.pipeline == "StableDiffusion3Pipeline" else {}
    here = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    asked = {"prompt_2": None, "prompt_3": None} if more else {}
    said = kind.encode_prompt(told.pipe, PROMPTS[:1], negative_prompt=[negative], **here, **asked, **more)
    assert torch.allclose(told.unconditional()["text"], said[1], atol=1e-6)


# Precision


@pytest.mark.parametrize(
    ("precision", "device", "said"),
    [
        ("fp16", "cpu", "fp16 needs a GPU"),
        ("fp8", "cpu", "'fp8' is unknown: fp32, bf16, fp16"),
        ("bf16", "cuda", "no device cuda"),
        ("fp32", "mps", "device mps cannot compute in fp32"),
    ],
)
def test_a_precision_that_cannot_be_is_one_line(
    tiny_pipe: Path, precision: str, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said) as caught:
        open_model(find_model_spec(str(tiny_pipe)), device=device, precision=precision)
    assert "\n" not in str(caught.value)


def test_a_gpu_without_bf16_is_named(tiny_pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 cannot compute in bf16: take fp16 or fp32"):
        open_model(find_model_spec(str(tiny_pipe)), device="cuda", precision="bf16")


@every
def test_the_autoencoder_is_float32_beside_fp16(
    model_spec: ModelSpec, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And beside bf16 in SDXL. On a CPU: loaded, not run."""
    monkeypatch.setattr(loading, "dtype_of", lambda precision, device: loading.PRECISIONS[precision])
    for precision, then in (("fp16", torch.float32), ("bf16", torch.float32 if "sdxl" in family else torch.bfloat16)):
        model = open_model(model_spec, device="cpu", precision=precision)
        network = model.pipe.components.get("unet") or model.pipe.components["transformer"]
        assert (model.vae.dtype, network.dtype) == (then, loading.PRECISIONS[precision])
        assert model.pipe.text_encoder.dtype == loading.PRECISIONS[precision]


# Large pictures


class Vae:
    """Notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def enable_slicing(self) -> None:
        self.asked.append("slices")

    def enable_tiling(self) -> None:
        self.asked.append("tiles")


@pytest.mark.parametrize(
    ("size", "asked"), [(256, []), (512, ["slices"]), (1024, ["slices"]), (2048, ["slices", "tiles"])]
)
def test_a_large_picture_is_decoded_in_parts(size: int, asked: list[str]) -> None:
    vae = Vae()
    apply_memory_settings(None, vae, ModelSpec(name="x", source="y", height=size, width=size, checkpointing=False))
    assert vae.asked == asked


def test_slices_are_the_whole(tiny_pipe: Path) -> None:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu")
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(0))
    whole = model.decode(x)
    model.vae.enable_slicing()
    assert torch.allclose(model.decode(x), whole, atol=1e-5)


@every
def test_the_lines_for_plain_diffusers_are_python(model_spec: ModelSpec) -> None:
    for line in usage(replace(model_spec, negative_prompt=None if "flux" in model_spec.name else "grey")):
        compile(line, "usage", "exec")
    text = "\n".join(usage(model_spec))
    assert (
        ("DDIMScheduler" in text)
        == ("max_sequence_length" not in text)
        == ("unet" in model_spec.name or "sdxl" in model_spec.name)
    )
