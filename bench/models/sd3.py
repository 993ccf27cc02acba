"""Stable Diffusion 3 and 3.5, and the embedded tiny model of the same class: the pipeline class StableDiffusion3Pipeline."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..flow import Rectified
from ..model_spec import PROTOCOLS, ModelSpec
from ..spec import Cond
from . import autoencoder
from .base import CLIP_TOKENS, PipelineModel, meta


@final
class SD3(PipelineModel):
    """A StableDiffusion3Pipeline: a transformer that predicts the velocity of the rectified path."""

    pipeline = "StableDiffusion3Pipeline"
    network_name = "transformer"
    protocol = PROTOCOLS[pipeline]
    call_options = ("max_sequence_length",)

    def configure(self) -> None:
        """Set path, with the scheduler's shift, prediction and shape; the transformer reads latents in patches."""
        config, factor = self.network.config, self.pipe.vae_scale_factor
        self.path, self.prediction = Rectified(float(self.pipe.scheduler.config.get("shift", 1.0))), "velocity"
        self.shape = autoencoder.latent_shape(int(config.in_channels), self.spec, factor, int(config.patch_size))

    def published_times(self, steps: int) -> Tensor:
        """(steps + 1,): sigma from 1 to 0, as the pipeline's own scheduler spaces it."""
        self.pipe.scheduler.set_timesteps(steps)
        return self.pipe.scheduler.sigmas.clone().float()

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"text": (B, L, D), "pooled": (B, D')} of B prompts."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.max_sequence_length,
        )
        return {"text": embeds, "pooled": pooled}

    def forward(self, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        """The transformer's velocity."""
        output = self.network(
            hidden_states=x.to(self.dtype),
            timestep=t * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond["text"].to(self.device, self.dtype),
            pooled_projections=cond["pooled"].to(self.device, self.dtype),
            return_dict=False,
        )
        return output[0].float()

    @classmethod
    def text_tokens(cls, model_spec: ModelSpec) -> int:
        """CLIP's tokens, then T5's."""
        return CLIP_TOKENS + model_spec.max_sequence_length

    @staticmethod
    def network_inputs(config: Any, height: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the transformer for one latent, on the meta device; see `PipelineModel.network_inputs`."""
        return {
            "hidden_states": meta(dtype, 1, config.in_channels, height, width),
            "timestep": meta(torch.float32, 1),
            "encoder_hidden_states": meta(dtype, 1, tokens, config.joint_attention_dim),
            "pooled_projections": meta(dtype, 1, config.pooled_projection_dim),
        }
