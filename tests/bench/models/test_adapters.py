"""Adapters of the field: PEFT's and diffusers' are read with their own alpha, and what cannot be read is named with its tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpobench.bench.errors import UserError
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.adapter_files import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from gpobench.bench.models.open import open_model

TARGETS = ["attn.to_q", "attn.to_k", "attn.add_v_proj", "attn.to_out.0", "proj_out"]
Settings = dict[str, Any]
PLAIN: Settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS}
LAYER = "base_model.model.transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def base(tiny_pipe: Path) -> Any:
    return open_model(replace(find_model_spec(str(tiny_pipe)), merge=False), device="cpu")


def opened(folder: Path) -> Any:
    """A model that computes a loaded LoRA beside its weights, as PEFT does: merged, the last bits would differ."""
    return open_model(replace(find_model_spec(str(folder)), merge=False), device="cpu")


def inputs(model: Any) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, *model.shape, generator=generator),
        torch.tensor([0.3, 0.8]),
        model.encode(["a cat", "two dogs"]),
    )


def spoken(model: Any) -> Tensor:
    """The model's velocity on fixed inputs."""
    with torch.no_grad():
        return model.velocity(*inputs(model))


def peft_folder(pipe: Path, folder: Path, settings: Settings) -> Tensor:
    """Save a random PEFT adapter of the pipeline's network, by PEFT itself; returns the velocity under it."""
    from peft import LoraConfig, get_peft_model

    model = opened(pipe)
    wrapped: Any = get_peft_model(model.network, LoraConfig(**settings))  # as Flow-GRPO's script makes it
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.network = wrapped.base_model.model
    velocity = spoken(model)
    wrapped.save_pretrained(str(folder))
    assert (folder / PEFT_FILE).is_file() and (folder / PEFT_CONFIG).is_file()
    return velocity


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file)


def test_a_loaded_adapter_is_merged_as_the_run_that_trained_it_sampled(tiny_pipe: Path, tmp_path: Path) -> None:
    spec = find_model_spec(str(tiny_pipe))
    trained = open_model(spec, device="cpu", adapter=Adapter(rank=4, alpha=16), seed=0)
    with torch.no_grad():
        for k, parameter in enumerate(trained.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
        sampled = trained.velocity(*inputs(trained), merged=True)
    trained.save_adapter(tmp_path)
    merged, beside = open_model(spec, device="cpu"), opened(tiny_pipe)
    for model in (merged, beside):
        model.load_adapter(tmp_path)
    assert torch.equal(spoken(merged), sampled)
    assert torch.allclose(spoken(beside), sampled, atol=1e-5) and torch.equal(spoken(beside), spoken(trained))


# PEFT folders


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        {**PLAIN, "use_rslora": True},
        {**PLAIN, "rank_pattern": {"to_q": 2}, "alpha_pattern": {r"transformer_blocks\.1\.attn\.to_k": 3}},
        {**PLAIN, "target_modules": r".*\.attn\.to_[qk]"},
        {**PLAIN, "use_dora": True},
        {**PLAIN, "lora_bias": True, "target_modules": ["proj_out"]},
        {**PLAIN, "target_modules": "all-linear", "exclude_modules": ["proj_out"]},
    ],
    ids=["plain", "rslora", "patterns", "regex", "dora", "bias", "all-linear"],
)
def test_a_peft_folder_is_the_same_network_as_for_peft(
    tiny_pipe: Path, tmp_path: Path, base: Any, settings: Settings
) -> None:
    expected = peft_folder(tiny_pipe, tmp_path, settings)
    model = opened(tiny_pipe)
    assert model.load_adapter(tmp_path) == []
    assert torch.equal(spoken(model), expected) and (expected - spoken(base)).abs().max() > 1e-3


def test_a_peft_folder_of_another_family_is_read_too(tiny_unet: Path, tmp_path: Path) -> None:
    expected = peft_folder(
        tiny_unet, tmp_path, {"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0", "conv1"]}
    )
    model = opened(tiny_unet)
    model.load_adapter(tmp_path / PEFT_FILE)
    assert torch.equal(spoken(model), expected)


def test_the_settings_of_published_adapters_may_be_malformed(tiny_pipe: Path, tmp_path: Path) -> None:
    """Flow-GRPO's hold no text as base_model_name_or_path and task_type; keys of other versions of PEFT are not looked at."""
    expected = peft_folder(tiny_pipe, tmp_path, PLAIN)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    config |= {"base_model_name_or_path": None, "task_type": ["x"], "auto_mapping": 3, "of_a_later_version": {"a": 1}}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    model = opened(tiny_pipe)
    model.load_adapter(tmp_path)
    assert torch.equal(spoken(model), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "module.base_model.model."),
        (".weight", ".default.weight"),
        ("base_model.model.", "base_model.model.transformer."),
        ("transformer_blocks.0.", "transformer_blocks.0._fsdp_wrapped_module."),
    ],
)
def test_wrappers_around_the_network_are_no_part_of_its_names(
    tiny_pipe: Path, tmp_path: Path, old: str, new: str
) -> None:
    expected = peft_folder(tiny_pipe, tmp_path, PLAIN)
    rewrite(tmp_path / PEFT_FILE, lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()})
    model = opened(tiny_pipe)
    model.load_adapter(tmp_path)
    assert torch.equal(spoken(model), expected)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', not a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a finite number"),
        ({"r": 0}, "r is 0, not a whole number of at least 1"),
        ({"r": 8}, f".lora_A.weight has the rank 4, {PEFT_CONFIG} says 8"),
        ({"rank_pattern": {"attn.to_q": 2}}, f"its tensor {LAYER}.lora_A.weight has the rank 4, {PEFT_CONFIG} says 2"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], not an object"),
        ({"use_rslora": "no"}, "use_rslora is 'no', not true or false"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA is read"),
        ({"init_lora_weights": "pissa_niter_16"}, "which changes the base as well"),
        ({"modules_to_save": ["norm_out"]}, "modules_to_save is ['norm_out']; only a plain LoRA is read"),
        (
            {"target_modules": [*TARGETS, "attn.to_v"]},
            "it lacks the tensor transformer_blocks.0.attn.to_v.lora_A.weight",
        ),
        ({"target_modules": "(("}, "does not fit"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    tiny_pipe: Path, tmp_path: Path, change: Settings, why: str
) -> None:
    peft_folder(tiny_pipe, tmp_path, PLAIN)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | change))
    check_refusal(opened(tiny_pipe), tmp_path, why)


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, "\xff"])
def test_settings_that_are_no_settings_are_refused(tiny_pipe: Path, tmp_path: Path, base: Any, text: str) -> None:
    save_file({f"{LAYER}.lora_A.weight": torch.zeros(4, 4)}, tmp_path / PEFT_FILE)
    (tmp_path / PEFT_CONFIG).write_bytes(text.encode("latin1"))
    check_refusal(base, tmp_path, PEFT_CONFIG)


def check_refusal(model: Any, path: Path, why: str) -> None:
    with pytest.raises(UserError) as caught:
        model.load_adapter(path)
    assert why in str(caught.value) and "\n" not in str(caught.value), caught.value


# Damaged files


@pytest.fixture(params=["diffusers", "peft"])
def saved(request: pytest.FixtureRequest, tiny_pipe: Path, tmp_path: Path) -> Path:
    """The file of an adapter in one of the two formats."""
    if request.param == "peft":
        peft_folder(tiny_pipe, tmp_path, PLAIN)
        return tmp_path / PEFT_FILE
    open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4, alpha=16), seed=0).save_adapter(
        tmp_path
    )
    return tmp_path / LORA_FILE


def first(tensors: dict[str, Tensor], factor: str) -> str:
    return sorted(key for key in tensors if f"lora_{factor}" in key)[0]


@pytest.mark.parametrize("how", ["A alone", "one missing", "width", "depth", "rank", "NaN", "Inf", "extra"])
def test_a_damaged_adapter_is_refused_by_the_name_of_its_tensor(saved: Path, base: Any, how: str) -> None:
    tensors = load_file(saved)
    a, b = first(tensors, "A"), first(tensors, "B")
    broken = tensors[b].clone()
    broken.view(-1)[-1] = float(how) if how in ("NaN", "Inf") else 0
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "A alone": ({k: v for k, v in tensors.items() if "lora_A" in k}, ".lora_A.weight is there without "),
        "one missing": ({k: v for k, v in tensors.items() if k != b}, f"its tensor {a} is there without "),
        "width": (tensors | {a: torch.cat([tensors[a]] * 2, -1)}, f"its tensor {a} has the shape (4, "),
        "depth": ({k.replace("blocks.1", "blocks.7"): v for k, v in tensors.items()}, "transformer_blocks.7"),
        "rank": (tensors | {b: torch.cat([tensors[b]] * 2, -1)}, f"its tensor {b} has the shape "),
        "NaN": (tensors | {b: broken}, f"its tensor {b} has numbers that are not finite"),
        "Inf": (tensors | {b: broken}, f"its tensor {b} has numbers that are not finite"),
        "extra": (tensors | {a.replace("lora_A.weight", "bias"): torch.zeros(4)}, "bias"),
    }
    changed, why = cases[how]
    rewrite(saved, lambda _: changed)
    check_refusal(base, saved, why)
    check_refusal(base, saved.parent, str(saved))


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        (
            "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
            "this pipeline takes a LoRA in transformer, text_encoder",
        ),
        ("text_encoder.text_model.encoder.layers.77.self_attn.q_proj", "layers.77.self_attn.q_proj"),
        ("nothing.to_q", "has no place there"),
    ],
)
def test_no_tensor_of_an_adapter_is_dropped_in_silence(
    tiny_pipe: Path, tmp_path: Path, base: Any, prefix: str, why: str
) -> None:
    open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0).save_adapter(tmp_path)
    more = {f"{prefix}.lora_A.weight": torch.zeros(4, 32), f"{prefix}.lora_B.weight": torch.zeros(32, 4)}
    rewrite(tmp_path / LORA_FILE, lambda tensors: tensors | more)
    check_refusal(base, tmp_path, why)


def test_an_adapter_of_a_text_encoder_is_read(tiny_pipe: Path, tmp_path: Path) -> None:
    model = opened(tiny_pipe)
    layer, weight = next(
        (name, module.weight) for name, module in model.pipe.text_encoder.named_modules() if name.endswith("q_proj")
    )
    out, into = weight.shape
    generator = torch.Generator().manual_seed(0)
    key = f"text_encoder.{layer}"
    factors = {
        "lora_A.weight": torch.randn(2, into, generator=generator),
        "lora_B.weight": torch.randn(out, 2, generator=generator),
    }
    save_file({f"{key}.{factor}": tensor for factor, tensor in factors.items()}, tmp_path / LORA_FILE)
    before = model.encode(["a cat"])["pooled"]
    (note,) = model.load_adapter(tmp_path)
    assert "does not state its alpha" in note
    assert (model.encode(["a cat"])["pooled"] - before).abs().max() > 1e-4


def test_an_alpha_that_a_file_does_not_state_is_noted(tiny_pipe: Path, tmp_path: Path) -> None:
    trained = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4, alpha=16), seed=0)
    trained.save_adapter(tmp_path)
    assert opened(tiny_pipe).load_adapter(tmp_path) == []
    rewrite(tmp_path / LORA_FILE, dict)  # its header is gone
    (note,) = opened(tiny_pipe).load_adapter(tmp_path)
    assert f"{tmp_path / LORA_FILE} does not state its alpha: it is read with alpha equal to the rank" in note


# Other formats


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight", "it is kohya's format (sd-scripts)"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "it is kohya's format (sd-scripts)"),
        ("lora_unet_joint_blocks_0.lokr_w1", "it is LyCORIS's format"),
        ("diffusion_model.joint_blocks.0.lora_A.weight", "it is ComfyUI's format"),
        ("base_model.model.proj_out.lora_A.weight", f"needs {PEFT_CONFIG}"),
        ("transformer_blocks.0.attn.to_q.weight", "a whole network is named as --model"),
    ],
)
def test_other_formats_are_refused_by_their_name(base: Any, tmp_path: Path, key: str, why: str) -> None:
    save_file({key: torch.zeros(4, 4)}, tmp_path / LORA_FILE)
    check_refusal(base, tmp_path, why)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("adapter_model.bin", "adapter_model.bin is a pickle, and nothing is unpickled: write it as safetensors"),
        ("model_index.json", "it is a whole pipeline, to be named as --model"),
        ("config.json", "it is a whole network"),
        ("mine.safetensors", "name one of its files: mine.safetensors"),
        (f"lora/{PEFT_FILE}", "there is one in "),
        ("notes.txt", f"it holds neither {LORA_FILE} nor {PEFT_FILE}"),
    ],
)
def test_a_folder_without_an_adapter_says_what_it_is(base: Any, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    check_refusal(base, tmp_path, why)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "a.onnx"])
def test_nothing_is_unpickled(base: Any, tmp_path: Path, name: str) -> None:
    torch.save({"transformer.proj_out.lora_A.weight": torch.zeros(4, 4)}, tmp_path / name)
    check_refusal(base, tmp_path / name, "no .safetensors file" if name.endswith("onnx") else "nothing is unpickled")
