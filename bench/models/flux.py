"""FLUX.1, a transformer that was taught what guidance does, as a velocity field over latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import rectified
from ..model_spec import Adapter, ModelSpec
from . import common
from .lora import LoraCopies


class Flux:
    """A FluxPipeline behind the contract of `spec.Model`.

    Guidance is an input of the network (it was distilled), not a second evaluation: `guidance` goes to the transformer, 1.0
    asks for the prediction as trained without, and every value costs the same (`guided_cost`). Classifier-free guidance with
    a negative prompt, the pipeline's `true_cfg_scale`, is not used. The transformer sees 2x2 latents as one token; outside
    of `_forward` latents are (B, 16, h, w) as everywhere.
    """

    path = staticmethod(rectified)
    prediction = "velocity"
    guided_cost = 1  # evaluations of a guided velocity

    def __init__(self, model_spec: ModelSpec, *, device: Any, precision: str, adapter: Adapter | None, seed: int = 0):
        from diffusers import FluxPipeline

        self.spec, self.name, self.device = model_spec, model_spec.name, torch.device(device)
        self.steps, self.guidance = model_spec.steps, model_spec.guidance
        self.dtype = common.dtype_of(precision, self.device)
        if model_spec.negative_prompt is not None:
            raise UserError(f"{self.name} takes no negative prompt: its guidance is an input of the network")
        self.pipe = common.pipeline(FluxPipeline, model_spec, self.dtype)
        self.encoders = common.Encoders(self.pipe, self.device, model_spec.offload)
        common.place(self.pipe, self.device, self.encoders)
        self.transformer, self.vae, self.scheduler = self.pipe.transformer, self.pipe.vae, self.pipe.scheduler
        config: Any = self.transformer.config
        self.shape = common.shape(int(config.in_channels) // 4, model_spec, self.pipe.vae_scale_factor, 2)
        self.distilled = bool(config.guidance_embeds)  # FLUX.1-schnell has no guidance at all
        self.lora: LoraCopies | None = None
        common.prepare(self.transformer, self.vae, model_spec)
        if adapter is not None:
            self.attach(adapter, seed)

    def attach(self, adapter: Adapter, seed: int) -> None:
        """Put a fresh LoRA on the transformer; its second factor is zero, so the model is unchanged at first."""
        self.lora = common.attach(self.transformer, adapter, self.name, seed)

    def times(self, steps: int) -> Tensor:
        """(steps + 1,): sigma from 1 to 0, shifted by the number of image tokens as the pipeline does it."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config: Any = self.scheduler.config
        if config.get("use_flow_sigmas", False):
            raise UserError(f"the scheduler of {self.name} wants use_flow_sigmas: not supported")
        mu = calculate_shift(
            self.shape[1] // 2 * (self.shape[2] // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        self.scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist(), mu=mu)
        return self.scheduler.sigmas.clone().float()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """{"text": (B, L, D), "pooled": (B, D')} of B prompts: T5's tokens, and what CLIP says of the whole."""
        self.encoders.come()
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            device=self.device,
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
        """(B, C, h, w), (B,) -> (B, C, h, w) float32; there is no unconditional branch to detach."""
        if self.lora is not None:
            self.lora.switch(weights)
        return self._forward(x, t, cond, guidance)

    def _forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor], guidance: float) -> Tensor:
        self.encoders.leave()
        rows, tokens = (x.shape[2] // 2, x.shape[3] // 2), cond["text"].shape[1]
        with common.autocast(self.device, self.dtype):
            out = self.transformer(
                hidden_states=pack(x.to(self.dtype)),
                timestep=t,
                guidance=torch.full((len(x),), guidance, device=self.device) if self.distilled else None,
                encoder_hidden_states=cond["text"].to(self.device, self.dtype),
                pooled_projections=cond["pooled"].to(self.device, self.dtype),
                txt_ids=torch.zeros(tokens, 3, device=self.device),
                img_ids=places(*rows).to(self.device),
                return_dict=False,
            )[0]
        return unpack(out.float(), *rows)

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
        return common.flops(
            partial(self._forward, guidance=self.guidance),
            torch.zeros(1, *self.shape, device=self.device),
            self.encode([""]),
        )


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C): each token is a 2x2 patch, channels outermost."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows columns, 4 C) -> (B, C, 2 rows, 2 columns): undoes pack."""
    b, _, width = tokens.shape
    x = tokens.view(b, rows, columns, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, width // 4, 2 * rows, 2 * columns)


def places(rows: int, columns: int) -> Tensor:
    """(rows columns, 3): where each image token is, (0, row, column); text tokens are all at 0."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).float()
