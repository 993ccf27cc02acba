"""Stable Diffusion XL, a U-Net with two text encoders and the image size as inputs: the class StableDiffusionXLPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from ..model_spec import PROTOCOLS
from ..spec import Cond
from .unet import UNetModel


@final
class SDXL(UNetModel):
    """A StableDiffusionXLPipeline.

    The U-Net is told the picture's original size, its crop and its target size: the protocol's size, no crop, the protocol's
    size, as in the pipeline. The autoencoder runs in float32 where the rest is in half precision: it overflows in fp16 (its
    config says force_upcast) and bf16 is coarse.
    """

    pipeline = "StableDiffusionXLPipeline"
    protocol = PROTOCOLS[pipeline]
    float32_vae = ("fp16", "bf16")
    # the watermark would be drawn over what a reward is to see
    replacements = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
    inputs = "a latent, a time, a text and sizes"

    @cached_property
    def sizes(self) -> Tensor:
        """(6,): original height and width, crop's top and left, target height and width, in pixels."""
        size = (self.spec.height, self.spec.width)
        return torch.tensor([*size, 0, 0, *size], device=self.device)

    def unsupported_settings(self) -> Sequence[Any]:
        """A second time input, as in guidance-distilled U-Nets, and an autoencoder with a mean of its own."""
        return self.network.config.time_cond_proj_dim, self.vae.config.get("latents_mean")

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"text": (B, L, D), "pooled": (B, D')} of B prompts: both encoders' tokens side by side, the second's summary."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return {"text": embeds, "pooled": pooled}

    def more_inputs(self, cond: Cond, rows: int) -> dict[str, Any]:
        """The pooled text (B, D') and the six sizes (B, 6)."""
        pooled = cond["pooled"].to(self.device, self.dtype)
        sizes = self.sizes.to(self.dtype).expand(rows, -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
