"""FLUX.1, a transformer with distilled guidance: the pipeline class FluxPipeline."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import Rectified
from ..model_spec import PROTOCOLS, ModelSpec
from ..spec import Cond
from . import autoencoder
from .base import PipelineModel, meta


@final
class Flux(PipelineModel):
    """A FluxPipeline: a transformer that predicts the velocity of the rectified path under a guidance it is told.

    Guidance is an input of the network (it was distilled), not a second evaluation: 1.0 asks for the prediction as trained
    without, and every value costs the same (`guided_cost`). Classifier-free guidance with a negative prompt, the pipeline's
    `true_cfg_scale`, is not used. The transformer reads 2x2 latents as one token; outside of `forward` latents are
    (B, 16, h, w).
    """

    pipeline = "FluxPipeline"
    network_name = "transformer"
    protocol = PROTOCOLS[pipeline]
    guided_cost = 1
    call_options = ("max_sequence_length",)

    def configure(self) -> None:
        """Set shape, path, with the shift for that number of tokens, and prediction."""
        channels = int(self.network.config.in_channels) // 4
        self.shape = autoencoder.latent_shape(channels, self.spec, self.pipe.vae_scale_factor, 2)
        config: Any = self.pipe.scheduler.config
        # exp(mu) is the shift of `time_shift_type` "exponential", FLUX's; FLUX.1-schnell has a fixed one
        by = math.exp(self._mu()) if config.get("use_dynamic_shifting", False) else config.get("shift", 1.0)
        self.path, self.prediction = Rectified(float(by)), "velocity"

    def published_times(self, steps: int) -> Tensor:
        """(steps + 1,): sigma from 1 to 0, shifted by the number of image tokens as the pipeline does it."""
        scheduler = self.pipe.scheduler
        if scheduler.config.get("use_flow_sigmas", False):
            raise UserError(f"the scheduler of {self.name} wants use_flow_sigmas: not supported")
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=self._mu())
        return scheduler.sigmas.clone().float()

    def _mu(self) -> float:
        """The logarithm of the schedule's shift for this number of image tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config: Any = self.pipe.scheduler.config
        return calculate_shift(
            self.shape[1] // 2 * (self.shape[2] // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """{"text": (B, L, D), "pooled": (B, D')} of B prompts: T5's tokens, and CLIP's summary."""
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.spec.max_sequence_length,
        )
        return {"text": embeds, "pooled": pooled}

    def forward(self, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        """The transformer's velocity."""
        rows, columns, tokens = x.shape[2] // 2, x.shape[3] // 2, cond["text"].shape[1]
        has_guidance = bool(self.network.config.guidance_embeds)  # FLUX.1-schnell has no guidance at all
        output = self.network(
            hidden_states=pack(x.to(self.dtype)),
            timestep=t,
            guidance=torch.full((len(x),), guidance, device=self.device) if has_guidance else None,
            encoder_hidden_states=cond["text"].to(self.device, self.dtype),
            pooled_projections=cond["pooled"].to(self.device, self.dtype),
            txt_ids=torch.zeros(tokens, 3, device=self.device),
            img_ids=positions(rows, columns).to(self.device),
            return_dict=False,
        )
        return unpack(output[0].float(), rows, columns)

    @classmethod
    def text_tokens(cls, model_spec: ModelSpec) -> int:
        """T5's tokens."""
        return model_spec.max_sequence_length

    @staticmethod
    def network_inputs(config: Any, height: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the transformer for one latent, on the meta device; see `PipelineModel.network_inputs`."""
        image_tokens = height // 2 * (width // 2)
        return {
            "hidden_states": meta(dtype, 1, image_tokens, config.in_channels),
            "timestep": meta(torch.float32, 1),
            "guidance": meta(torch.float32, 1) if config.guidance_embeds else None,
            "encoder_hidden_states": meta(dtype, 1, tokens, config.joint_attention_dim),
            "pooled_projections": meta(dtype, 1, config.pooled_projection_dim),
            "txt_ids": meta(torch.float32, tokens, 3),
            "img_ids": meta(torch.float32, image_tokens, 3),
        }


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C): each token is a 2x2 patch, channels outermost."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows columns, 4 C) -> (B, C, 2 rows, 2 columns): undoes pack."""
    b, _, width = tokens.shape
    x = tokens.view(b, rows, columns, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, width // 4, 2 * rows, 2 * columns)


def positions(rows: int, columns: int) -> Tensor:
    """(rows columns, 3): where each image token is, (0, row, column); text tokens are all at 0."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).float()
