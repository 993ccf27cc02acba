"""Abstract class of the U-Net pipelines (SD1.5, SDXL): sampled with DDIM on the noise table of the folder's scheduler."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import Prediction, ddim_grid, ddpm, timestep
from ..model_spec import ModelSpec
from ..spec import Cond
from . import autoencoder
from .base import CLIP_TOKENS, PipelineModel, meta

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


class UNetModel(PipelineModel):
    """A latent-diffusion U-Net behind `spec.Model`.

    The sampler of the protocol is DDIM, whatever scheduler the folder ships (SD1.5 ships PNDM, SDXL Euler): of that one only
    the noise table and the spacing of the steps are used. Times are those of `flow.ddpm`, t = (k + 1) / N for the table's
    timestep k, so a walk starts where the spacing starts (0.982 at 50 steps of SD1.5) and ends at 0, or at 1 / N when the
    table's first entry stands for the clean image (set_alpha_to_one False, as in SD1.5).
    """

    network_name = "unet"
    scheduler_code = "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
    inputs: ClassVar[str]  # what the U-Net is given, in words

    @abstractmethod
    def unsupported_settings(self) -> Sequence[Any]:
        """Settings of the pipeline's parts that must be None: others would need inputs that are not given."""

    @abstractmethod
    def more_inputs(self, cond: Cond, rows: int) -> dict[str, Any]:
        """Arguments of the U-Net beside latent, timestep and text, for this many rows."""

    def configure(self) -> None:
        """Set path, prediction and shape. Raises UserError on a U-Net with other inputs or an unknown prediction."""
        from diffusers import DDIMScheduler

        config = self.network.config
        if config.in_channels != config.out_channels or any(s is not None for s in self.unsupported_settings()):
            raise UserError(f"the U-Net of {self.name} wants more than {self.inputs}: not supported")
        # latents have no bounds to be clipped to, and clipping is the default that older folders do not state
        ddim: Any = DDIMScheduler.from_config(self.pipe.scheduler.config, clip_sample=False, thresholding=False)
        self.scheduler_config: Any = ddim.config
        if ddim.config.prediction_type not in PREDICTIONS:
            raise UserError(
                f"the scheduler of {self.name} predicts {ddim.config.prediction_type!r}: {', '.join(PREDICTIONS)} work"
            )
        self.prediction = ddim.config.prediction_type
        self.path = ddpm(ddim.alphas_cumprod)
        self.shape = autoencoder.latent_shape(int(config.in_channels), self.spec, self.pipe.vae_scale_factor)

    def published_times(self, steps: int) -> Tensor:
        """(steps + 1,): DDIM's timesteps as the scheduler's spacing and offset have them, (k + 1) / N, falling."""
        config = self.scheduler_config
        spacing = "trailing" if config.timestep_spacing == "trailing" else "leading"  # DDIM cannot walk "linspace"
        offset = int(config.steps_offset) if spacing == "leading" else 0
        try:
            return ddim_grid(
                steps, int(config.num_train_timesteps), spacing, offset, alpha_to_one=bool(config.set_alpha_to_one)
            )
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from None

    def forward(self, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        """The U-Net's prediction: the noise, the image or v."""
        # the U-Net never saw a timestep under 0, the table's first entry
        k = timestep(t, int(self.scheduler_config.num_train_timesteps)).clamp(min=0)
        text = cond["text"].to(self.device, self.dtype)
        output = self.network(
            x.to(self.dtype), k, encoder_hidden_states=text, return_dict=False, **self.more_inputs(cond, len(x))
        )
        return output[0].float()

    @classmethod
    def text_tokens(cls, model_spec: ModelSpec) -> int:
        """CLIP's length, whatever the prompt."""
        return CLIP_TOKENS

    @staticmethod
    def network_inputs(config: Any, height: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the U-Net on the meta device, with sizes and pooled text where the config asks for them."""
        inputs: dict[str, Any] = {
            "sample": meta(dtype, 1, config.in_channels, height, width),
            "timestep": meta(torch.float32, 1),
            "encoder_hidden_states": meta(dtype, 1, tokens, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": meta(dtype, 1, pooled), "time_ids": meta(dtype, 1, 6)}
        return inputs
