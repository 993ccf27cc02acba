"""Stable Diffusion 3 and 3.5, and the embedded tiny model of the same class, as a velocity field over latents."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..card import Adapter, Card
from ..errors import Missing, UserError
from ..flow import rectified
from ..weights import LIVE, Weights

LORA_FILE = "pytorch_lora_weights.safetensors"


class SD3:
    """A StableDiffusion3Pipeline behind the contract of `spec.Model`."""

    path = staticmethod(rectified)
    prediction = "velocity"

    def __init__(self, card: Card, *, device: Any, precision: str, adapter: Adapter | None, seed: int = 0):
        self.card, self.name, self.device = card, card.name, torch.device(device)
        self.steps, self.guidance = card.steps, card.guidance
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.pipe = _pipeline(card, self.dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer, self.vae, self.scheduler = self.pipe.transformer, self.pipe.vae, self.pipe.scheduler
        for part in (
            self.transformer,
            self.vae,
            self.pipe.text_encoder,
            self.pipe.text_encoder_2,
            self.pipe.text_encoder_3,
        ):
            if part is not None:
                part.requires_grad_(False).eval()  # T5 comes with dropout on: a reloaded model would differ
        self.shape = (
            int(self.transformer.config.in_channels),
            card.height // self.pipe.vae_scale_factor,
            card.width // self.pipe.vae_scale_factor,
        )
        self._scale, self._shift = float(self.vae.config.scaling_factor), float(self.vae.config.shift_factor or 0.0)
        self._uncond: Mapping[str, Tensor] | None = None
        self.weights: Weights | None = None
        if adapter is not None:
            self.attach(adapter, seed)

    def attach(self, adapter: Adapter, seed: int) -> None:
        """Put a fresh LoRA on the transformer; its second factor is zero, so the model is unchanged at first."""
        from peft import LoraConfig

        targets = list(adapter.targets)
        names = [name for name, _ in self.transformer.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith("." + target) for name in names):
                raise UserError(f"adapter.targets: the model {self.name} has no module {target!r}")
        config = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=targets
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.weights = Weights(self.transformer, config)

    def times(self, steps: int) -> Tensor:
        """(steps + 1,): sigma from 1 to 0, as the pipeline's own scheduler spaces it."""
        self.scheduler.set_timesteps(steps)
        return self.scheduler.sigmas.clone().float()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """{"text": (B, L, D), "pooled": (B, D')} of B prompts; an empty prompt is the unconditional one."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.card.max_sequence_length,
        )
        return {"text": embeds, "pooled": pooled}

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Mapping[str, Tensor],
        *,
        guidance: float = 1.0,
        by: str = "live",
        detach: bool = False,
    ) -> Tensor:
        """(B, C, h, w), (B,) -> (B, C, h, w) float32."""
        if self.weights is not None:
            self.weights.switch(by)
        if guidance == 1.0:
            return self._forward(x, t, cond["text"], cond["pooled"])
        empty = self._uncond = self._uncond or self.encode([""])
        both = [
            torch.cat([empty[key].expand_as(cond[key]), cond[key]]) for key in ("text", "pooled")
        ]  # one pass for both branches, as the pipeline does
        plain, asked = self._forward(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        plain = plain.detach() if detach else plain
        return plain + guidance * (asked - plain)

    def _forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        with self._autocast():
            out = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=t * self.scheduler.config.num_train_timesteps,
                encoder_hidden_states=text.to(self.dtype),
                pooled_projections=pooled.to(self.dtype),
                return_dict=False,
            )[0]
        return out.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [0, 1], as the pipeline decodes."""
        out = self.vae.decode((x0 / self._scale + self._shift).to(self.vae.dtype), return_dict=False)[0]
        return (out.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w): the mode of the autoencoder's posterior."""
        mode = self.vae.encode((images * 2 - 1).to(self.device, self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self._shift) * self._scale

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return self.weights.parameters() if self.weights else []

    def blend(self, name: str, decay: float) -> None:
        """See spec.Model."""
        assert self.weights is not None, "a model without adapter has no copies"
        self.weights.blend(name, decay)

    def save_adapter(self, folder: Path, by: str = "live") -> None:
        """Write the LoRA so that plain `pipe.load_lora_weights(folder)` takes it."""
        assert self.weights is not None, "a model without adapter has nothing to save"
        settings = self.transformer.peft_config[LIVE].to_dict()  # rank and alpha, for the loader
        self.pipe.save_lora_weights(
            str(folder),
            transformer_lora_layers=self.weights.adapter(by),
            transformer_lora_adapter_metadata=settings,
        )

    def load_adapter(self, folder: Path) -> None:
        """Judge with a LoRA from a run's `adapter` folder, or any in diffusers format."""
        from peft import get_peft_model_state_dict

        file = folder / LORA_FILE if folder.is_dir() else folder
        if not file.is_file():
            raise UserError(f"no adapter at {file}")
        misfit = f"adapter {file} does not fit the model {self.name}"
        try:
            asked: Any = self.pipe.lora_state_dict(str(file.parent), weight_name=file.name)
            self.pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"{misfit}: {str(error).splitlines()[0]}") from error
        # diffusers only warns of tensors that have no place, and would let the bare base be judged in their name
        names = list(getattr(self.transformer, "peft_config", {}))
        taken = get_peft_model_state_dict(self.transformer, adapter_name=names[-1]) if names else {}
        wanted = {key.removeprefix("transformer.") for key in asked if not key.startswith("text_encoder")}
        if not asked or wanted != set(taken):
            raise UserError(f"{misfit}: {len(wanted - set(taken))} of its {len(asked)} tensors have no place there")

    def flops_a_forward(self) -> float:
        """Floating-point operations of one forward of one latent, counted by running it."""
        from torch.utils.flop_counter import FlopCounterMode

        cond = self.encode([""])
        x, t = torch.zeros(1, *self.shape, device=self.device), torch.full((1,), 0.5, device=self.device)
        with torch.no_grad(), FlopCounterMode(display=False) as count:
            self.velocity(x, t, cond, by="live" if self.weights is None else "ref")
        return float(count.get_total_flops())


def _pipeline(card: Card, dtype: torch.dtype) -> Any:
    """The pipeline from a folder or the hub's cache; safetensors only, and every tensor must be there."""
    import diffusers.utils.logging as theirs
    import transformers.utils.logging as text
    from diffusers import StableDiffusion3Pipeline

    theirs.disable_progress_bar()
    text.disable_progress_bar()
    local = Path(card.source).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # diffusers renames torch_dtype; older ones know only this name
            return StableDiffusion3Pipeline.from_pretrained(
                card.source, revision=card.revision, torch_dtype=dtype, use_safetensors=True, local_files_only=local
            )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise Missing(f"the weights of {card.name} ({card.source}) cannot be loaded: {first}") from error
