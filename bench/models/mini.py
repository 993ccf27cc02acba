"""Writes miniature models: pipelines of a few thousand random parameters in diffusers format, 16x16 pixels, for tests and laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from .tiny_parts import TOKENS, build_parts, build_silent_text, build_silent_tokenizer, build_tokenizer
from .tiny_recipe import TinyRecipe

UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "mid_block_add_attention": False,
}


def write_sd3(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """Write a StableDiffusion3Pipeline with velocity prediction. Unlike a model before its training, nothing in it starts at zero."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    size: dict[str, Any] = {"layers": layers, "heads": 2, "head_width": 16, "text_widths": (16, 16)}
    recipe = TinyRecipe(**size, pooled_width=8, autoencoder_widths=(8, 8, 8))
    with torch.random.fork_rng(devices=[]):
        parts = build_parts(recipe, seed)
        for parameter in parts.transformer.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
        for name, parameter in parts.autoencoder.decoder.named_parameters():  # nearly linear, with strong contrast
            scale = 0.0 if ".conv2." in name else 6.0 if name == "conv_out.weight" else 1.0
            parameter.data.mul_(scale)
        third = build_silent_text(sum(recipe.text_widths))
    tokenizer: Any = build_tokenizer()  # the pipelines are annotated with CLIP's class and accept any
    pipe = StableDiffusion3Pipeline(
        transformer=parts.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.autoencoder,
        text_encoder=parts.text_one,
        tokenizer=tokenizer,
        text_encoder_2=parts.text_two,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=build_silent_tokenizer(),
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return _write_recipe(folder, max_sequence_length=1)


def write_sd15(
    folder: Path, *, seed: int = 0, prediction: Literal["epsilon", "v_prediction"] = "epsilon", scheduler: str = "DDIM"
) -> Path:
    """Write a StableDiffusionPipeline on SD1.5's noise table: a U-Net with text attention on two scales, 8x8 latents.

    scheduler: DDIM or PNDM, which SD1.5 itself ships. Nothing in the U-Net or the text encoder starts at zero.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width = 16
    tokenizer: Any = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(cross_attention_dim=width, **UNET)
        text = CLIPTextModel(CLIPTextConfig(**_clip(tokenizer, width)))
        autoencoder = AutoencoderKL(**AUTOENCODER)
        _strengthen_text(unet, text)
        _brighten(autoencoder)
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(scheduler, prediction),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return _write_recipe(folder, max_sequence_length=TOKENS)


def write_sdxl(
    folder: Path, *, seed: int = 0, prediction: Literal["epsilon", "v_prediction"] = "epsilon", scheduler: str = "Euler"
) -> Path:
    """Write a StableDiffusionXLPipeline on SDXL's noise table: two text encoders, a pooled text and six numbers of size.

    scheduler: DDIM or Euler, which SDXL itself ships. Nothing in the U-Net or the text encoders starts at zero.
    """
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    widths, pooled, size = (8, 16), 8, 4
    tokenizer: Any = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            cross_attention_dim=sum(widths),
            addition_embed_type="text_time",
            addition_time_embed_dim=size,
            projection_class_embeddings_input_dim=pooled + 6 * size,
            transformer_layers_per_block=1,
            use_linear_projection=True,
            **UNET,
        )
        # two layers: SDXL takes the states before the last one
        text = CLIPTextModel(CLIPTextConfig(**_clip(tokenizer, widths[0], layers=2)))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(**_clip(tokenizer, widths[1], layers=2), projection_dim=pooled)
        )
        autoencoder = AutoencoderKL(scaling_factor=0.13025, **AUTOENCODER)
        _strengthen_text(unet, text, second)
        _brighten(autoencoder)
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=text,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_scheduler(scheduler, prediction),
        add_watermarker=False,
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return _write_recipe(folder, max_sequence_length=TOKENS)


def write_flux(folder: Path, *, seed: int = 0, distilled: bool = True) -> Path:
    """Write a FluxPipeline: one double-stream and one single-stream block, 8x8 latents as 4x4 tokens, a shift that grows with them.

    distilled: guidance is an input of the transformer, as in FLUX.1-dev; not in schnell. Nothing in it starts at zero.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    width = 8
    tokenizer: Any = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * width,
            pooled_projection_dim=width,
            guidance_embeds=distilled,
            axes_dims_rope=(2, 2, 4),
        )
        text = CLIPTextModel(CLIPTextConfig(**_clip(tokenizer, width)))
        second = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=2 * width,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        autoencoder = AutoencoderKL(scaling_factor=0.3611, shift_factor=0.1159, **AUTOENCODER)
        _strengthen_text(transformer, text, second)
        _brighten(autoencoder)
        for name, parameter in transformer.named_parameters():
            if name.startswith(("context_embedder", "time_text_embed.text_embedder")):
                parameter.data.mul_(4)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4),
        vae=autoencoder,
        text_encoder=text,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return _write_recipe(folder, max_sequence_length=TOKENS)


def _clip(tokenizer: Any, width: int, layers: int = 1) -> dict[str, Any]:
    """Return the settings of a small CLIP text encoder."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _scheduler(kind: str, prediction: str) -> Any:
    """Build a scheduler that SD1.5 or SDXL ships, with their noise table and their files' settings."""
    import diffusers

    table: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    table |= {"steps_offset": 1, "prediction_type": prediction}
    if kind == "Euler":
        euler: Any = diffusers.EulerDiscreteScheduler(**table, timestep_spacing="leading")
        euler.register_to_config(set_alpha_to_one=False, clip_sample=False)  # read by DDIM only
        return euler
    more = {"DDIM": {"clip_sample": False}, "PNDM": {"skip_prk_steps": True}}[kind]
    return getattr(diffusers, f"{kind}Scheduler")(**table, **more, set_alpha_to_one=False)


@torch.no_grad()
def _strengthen_text(*parts: Any) -> None:
    """Give parameters that are zero random values, and scale up the attention to the text."""
    for part in parts:
        part.eval().requires_grad_(False)
        for name, parameter in part.named_parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
            parameter.mul_(8.0 if "attn2.to_out" in name else 3.0 if "attn2.to_k" in name else 1.0)


@torch.no_grad()
def _brighten(autoencoder: Any) -> None:
    """Make the decoder nearly linear, with strong colours."""
    _strengthen_text(autoencoder)
    for name, parameter in autoencoder.decoder.named_parameters():
        parameter.mul_(0.0 if ".conv2." in name else 3.0 if name == "conv_out.weight" else 1.0)


def _write_recipe(folder: Path, max_sequence_length: int) -> Path:
    """Write the protocol into recipe.json, as `gpobench pretrain` does; returns the folder."""
    protocol = {"guidance": 1.0, "steps": 4, "height": 16, "width": 16, "max_sequence_length": max_sequence_length}
    (folder / "recipe.json").write_text(json.dumps(protocol))
    return folder
