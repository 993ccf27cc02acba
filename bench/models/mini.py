"""Models of a few thousand random parameters in diffusers format, 16x16 pixels: what the laws are checked on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .tiny_recipe import Tiny, build_parts, build_silent_text, build_silent_tokenizer, build_tokenizer


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
    tokenizer = build_tokenizer()
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
    protocol = {"max_sequence_length": 1, "guidance": 1.0, "steps": 4, "height": 16, "width": 16}
    (folder / "recipe.json").write_text(json.dumps(protocol))
    return folder
