"""Stable Diffusion 1.5 and its kin, a U-Net that says how noisy a latent is, as a velocity field over latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import Prediction, ddpm, timestep, to_velocity
from ..model_spec import Adapter, ModelSpec
from . import common
from .lora import LoraCopies

UNWANTED = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None, "image_encoder": None}


class SD15:
    """A StableDiffusionPipeline behind the contract of `spec.Model`.

    The sampler of the protocol is DDIM, whatever scheduler the folder ships (SD1.5 ships PNDM): of that one only the noise
    table and the spacing of the steps are used. Times are those of `flow.ddpm`, t = (k + 1) / N for the table's timestep k,
    so a walk starts where the spacing starts (0.982 at 50 steps of SD1.5) and ends at 0, or at 1 / N when the table's first
    entry stands for the clean image (set_alpha_to_one False, as in SD1.5). The safety checker is left out: it would
    blacken images, and a reward must see what was drawn.
    """

    guided_cost = 2  # evaluations of a guided velocity: with the prompt and without

    def __init__(self, model_spec: ModelSpec, *, device: Any, precision: str, adapter: Adapter | None, seed: int = 0):
        from diffusers import StableDiffusionPipeline

        self.spec, self.name, self.device = model_spec, model_spec.name, torch.device(device)
        self.steps, self.guidance = model_spec.steps, model_spec.guidance
        self.dtype = common.dtype_of(precision, self.device)
        pipe = self.pipe = common.pipeline(StableDiffusionPipeline, model_spec, self.dtype, UNWANTED)
        self.encoders = common.Encoders(pipe, self.device, model_spec.offload)
        common.place(pipe, self.device, self.encoders)
        self.unet, self.vae = pipe.unet, pipe.vae
        config: Any = self.unet.config
        if config.in_channels != config.out_channels or config.time_cond_proj_dim is not None:
            raise UserError(f"the U-Net of {self.name} wants more than a latent, a time and a text: not supported")
        self.scheduler = common.ddim(pipe, self.name)
        self.prediction: Prediction = self.scheduler.config.prediction_type
        self.path = ddpm(self.scheduler.alphas_cumprod)
        self.shape = common.shape(int(config.in_channels), model_spec, pipe.vae_scale_factor)
        self._uncond: Mapping[str, Tensor] | None = None
        self.lora: LoraCopies | None = None
        common.prepare(self.unet, self.vae, model_spec)
        if adapter is not None:
            self.attach(adapter, seed)

    def attach(self, adapter: Adapter, seed: int) -> None:
        """Put a fresh LoRA on the U-Net; its second factor is zero, so the model is unchanged at first."""
        self.lora = common.attach(self.unet, adapter, self.name, seed)

    def times(self, steps: int) -> Tensor:
        """(steps + 1,): DDIM's timesteps as the scheduler's spacing and offset have them, (k + 1) / N, falling."""
        return common.ddim_times(self.scheduler, steps, self.name)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """{"text": (B, L, D)} of B prompts, cut to what CLIP takes."""
        self.encoders.come()
        embeds, _ = self.pipe.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return self.encoders.keep({"text": embeds})

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Mapping[str, Tensor],
        *,
        guidance: float = 1.0,
        weights: str = "policy",
        detach: bool = False,
    ) -> Tensor:
        """(B, C, h, w), (B,) -> (B, C, h, w) float32."""
        if self.lora is not None:
            self.lora.switch(weights)
        out = common.guided(self._forward, x, t, cond, self._empty, guidance, detach)
        return to_velocity(self.path, x, t, out, self.prediction)

    def _empty(self) -> Mapping[str, Tensor]:
        """What guidance leads away from: the card's negative prompt; None is the empty text, as in the pipeline."""
        self._uncond = self._uncond or self.encode([self.spec.negative_prompt or ""])
        return self._uncond

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """What the U-Net says: the noise, or its v."""
        # below the table's first entry there is none to ask for: the U-Net never saw a timestep under 0
        k = timestep(t, int(self.scheduler.config.num_train_timesteps)).clamp(min=0)
        self.encoders.leave()
        text = cond["text"].to(self.device, self.dtype)
        with common.autocast(self.device, self.dtype):
            out = self.unet(x.to(self.dtype), k, encoder_hidden_states=text, return_dict=False)
        return out[0].float()

    def decode(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [0, 1], as the pipeline decodes."""
        self.encoders.leave()
        return common.decode(self.vae, x0)

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w): the mode of the autoencoder's posterior."""
        self.encoders.leave()
        return common.latents(self.vae, images)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return self.lora.parameters() if self.lora else []

    def update_copy(self, name: str, decay: float) -> None:
        """See spec.Model."""
        assert self.lora is not None, "a model without adapter has no copies"
        self.lora.update_copy(name, decay)

    def save_adapter(self, folder: Path, weights: str = "policy") -> None:
        """Write the LoRA so that plain `pipe.load_lora_weights(folder)` takes it."""
        assert self.lora is not None, "a model without adapter has nothing to save"
        common.save_adapter(self.pipe, self.unet, self.lora.adapter(weights), "unet", folder)

    def load_adapter(self, folder: Path) -> None:
        """Judge with a LoRA from a run's `adapter` folder, or any in diffusers format."""
        common.load_adapter(self.pipe, self.unet, "unet", folder, self.name)

    def flops_a_forward(self) -> float:
        """Floating-point operations of one forward of one latent, counted by running it."""
        if self.lora is not None:
            self.lora.switch("ref")
        return common.flops(self._forward, torch.zeros(1, *self.shape, device=self.device), self.encode([""]))
