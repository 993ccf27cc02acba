"""Published architectures of the named models: lists their networks' settings, from which sizes are computed without weights.

Each entry holds the settings in the `config.json` of that part of the public repository that differ from the library's defaults.
The sums of parameters are tested against the published numbers (tests/bench/models/test_memory.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# part of the pipeline -> (library, class, settings)
Parts = Mapping[str, tuple[str, str, Mapping[str, Any]]]

_DOWN, _UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
_AUTOENCODER: dict[str, Any] = {
    "down_block_types": _DOWN,
    "up_block_types": _UP,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_FOUR = ("diffusers", "AutoencoderKL", {**_AUTOENCODER, "latent_channels": 4})
_SIXTEEN = (
    "diffusers",
    "AutoencoderKL",
    {**_AUTOENCODER, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
)
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_T5 = ("transformers", "T5EncoderModel", _T5_XXL)
_L = ("transformers", "CLIPTextModel", _CLIP_L)
_L_PROJECTED = ("transformers", "CLIPTextModelWithProjection", _CLIP_L)
_G_PROJECTED = ("transformers", "CLIPTextModelWithProjection", _CLIP_G)


def _sd3(**more: Any) -> Parts:
    settings: dict[str, Any] = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "qk_norm": "rms_norm",
    }
    return {
        "transformer": ("diffusers", "SD3Transformer2DModel", settings | more),
        "vae": _SIXTEEN,
        "text_encoder": _L_PROJECTED,
        "text_encoder_2": _G_PROJECTED,
        "text_encoder_3": _T5,
    }


PUBLISHED: dict[str, Parts] = {
    "sd35m": _sd3(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
    ),
    "sd35l": _sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192),
    "flux1-dev": {
        "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),  # the class is FLUX.1's size
        "vae": _SIXTEEN,
        "text_encoder": _L,
        "text_encoder_2": _T5,
    },
    "sdxl": {
        "unet": (
            "diffusers",
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (320, 640, 1280),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        "vae": _FOUR,
        "text_encoder": _L,
        "text_encoder_2": _G_PROJECTED,
    },
    "sd15": {
        "unet": ("diffusers", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
        "vae": _FOUR,
        "text_encoder": _L,
    },
}
