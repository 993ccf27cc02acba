"""A card becomes a loaded model: the one place that knows which adapter serves which pipeline class."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .. import registry
from ..model_spec import Adapter, Card

ADAPTERS = {
    "StableDiffusion3Pipeline": ".sd3:SD3",
    "FluxPipeline": ".flux:Flux",
    "StableDiffusionXLPipeline": ".sdxl:SDXL",
    "StableDiffusionPipeline": ".sd15:SD15",
}


def open_model(
    card: Card, *, device: Any, precision: str | None = None, adapter: Adapter | None = None, seed: int = 0
) -> Any:
    """The model on its device, with a fresh LoRA when `adapter` is given (its random start comes from `seed`).

    Raises UserError on a pipeline class without adapter, Missing when the weights are not there.
    """
    return adapter_class(card)(card, device=device, precision=precision or card.precision, adapter=adapter, seed=seed)


def adapter_class(card: Card) -> Any:
    """The class that serves the card's pipeline; UserError where there is none."""
    if card.pipeline not in ADAPTERS:
        raise registry.unknown("pipeline class", card.pipeline, ADAPTERS)
    module, _, name = ADAPTERS[card.pipeline].partition(":")
    return getattr(import_module(module, __package__), name)


def usage(card: Card) -> list[str]:
    """Lines of Python that load an adapter into plain diffusers and draw an image under the card's protocol."""
    source = card.source if card.revision else f"PATH/TO/{card.name}"
    transformer = card.pipeline in ("StableDiffusion3Pipeline", "FluxPipeline")
    more = f", max_sequence_length={card.max_sequence_length}" if transformer else ""
    if card.negative_prompt is not None:
        more += f", negative_prompt={card.negative_prompt!r}"
    ddim = not transformer  # the protocol's sampler, whatever the folder brings
    return [
        f"from diffusers import {'DDIMScheduler, ' if ddim else ''}{card.pipeline}",
        f'pipe = {card.pipeline}.from_pretrained("{source}")',
        *(["pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"] if ddim else []),
        'pipe.load_lora_weights("adapter", weight_name="pytorch_lora_weights.safetensors")',
        f"image = pipe(PROMPT, height={card.height}, width={card.width}, num_inference_steps={card.steps}, "
        f"guidance_scale={card.guidance}{more}).images[0]",
    ]
