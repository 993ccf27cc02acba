"""Models of a few thousand random parameters in diffusers format, 16x16 pixels: what the laws are checked on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from .tiny_recipe import TOKENS, Tiny, build_parts, build_silent_text, build_silent_tokenizer, build_tokenizer


def write_sd3(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A StableDiffusion3Pipeline with velocity prediction. Unlike a model before its training, nothing in it starts at zero."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    size: dict[str, Any] = {"layers": layers, "heads": 2, "head_width": 16, "text_widths": (16, 16)}
    recipe = Tiny(**size, pooled_width=8, autoencoder_widths=(8, 8, 8))
    with torch.random.fork_rng(devices=[]):
        parts = build_parts(recipe, seed)
        for parameter in parts.transformer.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
        for name, parameter in parts.autoencoder.decoder.named_parameters():  # nearly linear, and not pale
            scale = 0.0 if ".conv2." in name else 6.0 if name == "conv_out.weight" else 1.0
            parameter.data.mul_(scale)
        third = build_silent_text(sum(recipe.text_widths))
    tokenizer: Any = build_tokenizer()  # the pipelines ask for CLIP's own class and take any
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
    return _recipe(folder, max_sequence_length=1)


def write_sd15(
    folder: Path, *, seed: int = 0, prediction: Literal["epsilon", "v_prediction"] = "epsilon", scheduler: str = "DDIM"
) -> Path:
    """A StableDiffusionPipeline on SD1.5's noise table: a U-Net with text attention on two scales, 8x8 latents.

    scheduler: DDIM or PNDM, which SD1.5 itself ships. Nothing in the U-Net or the text encoder starts at zero.
    """
    import diffusers
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width = 16
    tokenizer: Any = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),  # pyright: ignore[reportArgumentType]
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),  # pyright: ignore[reportArgumentType]
            block_out_channels=(8, 16),  # pyright: ignore[reportArgumentType]
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            block_out_channels=(8, 8),  # pyright: ignore[reportArgumentType]
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
            mid_block_add_attention=False,
        )
        for part in (unet, text, autoencoder):
            part.eval().requires_grad_(False)
            for name, parameter in part.named_parameters():
                if not bool(parameter.any()):
                    torch.nn.init.normal_(parameter, std=0.1)
                scale = 8.0 if "attn2.to_out" in name else 3.0 if "attn2.to_k" in name else 1.0  # heed the prompt
                parameter.mul_(scale)
        for name, parameter in autoencoder.decoder.named_parameters():  # nearly linear, and not pale
            parameter.mul_(0.0 if ".conv2." in name else 3.0 if name == "conv_out.weight" else 1.0)
    table: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    more: dict[str, Any] = {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": prediction}
    more |= {"DDIM": {"clip_sample": False}, "PNDM": {"skip_prk_steps": True}}[scheduler]
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=getattr(diffusers, f"{scheduler}Scheduler")(**table, **more),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipe.save_pretrained(str(folder), safe_serialization=True)
    return _recipe(folder, max_sequence_length=TOKENS)


def _recipe(folder: Path, max_sequence_length: int) -> Path:
    protocol = {"guidance": 1.0, "steps": 4, "height": 16, "width": 16, "max_sequence_length": max_sequence_length}
    (folder / "recipe.json").write_text(json.dumps(protocol))
    return folder
