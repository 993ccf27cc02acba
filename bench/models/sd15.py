"""Stable Diffusion 1.5 and its kin: the pipeline class StableDiffusionPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from ..model_spec import PROTOCOLS
from ..spec import Cond
from .unet import UNetModel


@final
class SD15(UNetModel):
    """A StableDiffusionPipeline: a U-Net that reads CLIP's text.

    The safety checker is left out: it would blacken images, and a reward must see what was drawn.
    """

    pipeline = "StableDiffusionPipeline"
    protocol = PROTOCOLS[pipeline]
    replacements = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }
    inputs = "a latent, a time and a text"

    def unsupported_settings(self) -> Sequence[Any]:
        """A second time input, as in guidance-distilled U-Nets."""
        return (self.network.config.time_cond_proj_dim,)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"text": (B, L, D)} of B prompts, cut to CLIP's length."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": embeds}

    def more_inputs(self, cond: Cond, rows: int) -> dict[str, Any]:
        """Nothing."""
        return {}
