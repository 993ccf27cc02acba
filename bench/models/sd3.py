"""Stable Diffusion 3 and 3.5, and the embedded tiny model of the same class, as a velocity field over latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flow import rectified
from ..model_spec import Adapter, ModelSpec
from . import common
from .lora import LoraCopies


class SD3:
    """A StableDiffusion3Pipeline behind the contract of `spec.Model`."""

    path = staticmethod(rectified)
    prediction = "velocity"
    guided_cost = 2  # evaluations of a guided velocity: with the prompt and without

    def __init__(self, model_spec: ModelSpec, *, device: Any, precision: str, adapter: Adapter | None, seed: int = 0):
        from diffusers import StableDiffusion3Pipeline

        self.spec, self.name, self.device = model_spec, model_spec.name, torch.device(device)
        self.steps, self.guidance = model_spec.steps, model_spec.guidance
        self.dtype = common.dtype_of(precision, self.device)
        self.pipe = common.pipeline(StableDiffusion3Pipeline, model_spec, self.dtype)
        self.encoders = common.Encoders(self.pipe, self.device, model_spec.offload)
        common.place(self.pipe, self.device, self.encoders)
        self.transformer, self.vae, self.scheduler = self.pipe.transformer, self.pipe.vae, self.pipe.scheduler
        config: Any = self.transformer.config
        self.shape = common.shape(
            int(config.in_channels), model_spec, self.pipe.vae_scale_factor, int(config.patch_size)
        )
        self._uncond: Mapping[str, Tensor] | None = None
        self.lora: LoraCopies | None = None
        common.prepare(self.transformer, self.vae, model_spec)
        if adapter is not None:
            self.attach(adapter, seed)

    def attach(self, adapter: Adapter, seed: int) -> None:
        """Put a fresh LoRA on the transformer; its second factor is zero, so the model is unchanged at first."""
        self.lora = common.attach(self.transformer, adapter, self.name, seed)

    def times(self, steps: int) -> Tensor:
        """(steps + 1,): sigma from 1 to 0, as the pipeline's own scheduler spaces it."""
        self.scheduler.set_timesteps(steps)
        return self.scheduler.sigmas.clone().float()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """{"text": (B, L, D), "pooled": (B, D')} of B prompts."""
        self.encoders.come()
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.max_sequence_length,
        )
        return self.encoders.keep({"text": embeds, "pooled": pooled})

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
        return common.guided(self._forward, x, t, cond, self._empty, guidance, detach)

    def _empty(self) -> Mapping[str, Tensor]:
        """What guidance leads away from: the card's negative prompt; None is the empty text, as in the pipeline."""
        self._uncond = self._uncond or self.encode([self.spec.negative_prompt or ""])
        return self._uncond

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.encoders.leave()
        with common.autocast(self.device, self.dtype):
            out = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=t * self.scheduler.config.num_train_timesteps,
                encoder_hidden_states=cond["text"].to(self.device, self.dtype),
                pooled_projections=cond["pooled"].to(self.device, self.dtype),
                return_dict=False,
            )[0]
        return out.float()

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
        common.save_adapter(self.pipe, self.transformer, self.lora.adapter(weights), "transformer", folder)

    def load_adapter(self, folder: Path) -> None:
        """Judge with a LoRA from a run's `adapter` folder, or any in diffusers format."""
        common.load_adapter(self.pipe, self.transformer, "transformer", folder, self.name)

    def flops_a_forward(self) -> float:
        """Floating-point operations of one forward of one latent, counted by running it."""
        if self.lora is not None:
            self.lora.switch("ref")
        return common.flops(self._forward, torch.zeros(1, *self.shape, device=self.device), self.encode([""]))
