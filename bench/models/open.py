"""A card becomes a loaded model: the one place that knows which adapter serves which pipeline class."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .. import registry
from ..model_spec import Adapter, ModelSpec

ADAPTERS = {
    "StableDiffusion3Pipeline": ".sd3:SD3",
    "FluxPipeline": ".flux:Flux",
    "StableDiffusionXLPipeline": ".sdxl:SDXL",
    "StableDiffusionPipeline": ".sd15:SD15",
}


def open_model(
    model_spec: ModelSpec, *, device: Any, precision: str | None = None, adapter: Adapter | None = None, seed: int = 0
) -> Any:
    """The model on its device, with a fresh LoRA when `adapter` is given (its random start comes from `seed`).

    Raises UserError on a pipeline class without adapter, Missing when the weights are not there.
    """
    return adapter_class(model_spec)(
        model_spec, device=device, precision=precision or model_spec.precision, adapter=adapter, seed=seed
    )


def adapter_class(model_spec: ModelSpec) -> Any:
    """The class that serves the card's pipeline; UserError where there is none."""
    if model_spec.pipeline not in ADAPTERS:
        raise registry.unknown("pipeline class", model_spec.pipeline, ADAPTERS)
    module, _, name = ADAPTERS[model_spec.pipeline].partition(":")
    return getattr(import_module(module, __package__), name)


def usage(model_spec: ModelSpec) -> list[str]:
    """Lines of Python that load an adapter into plain diffusers and draw an image under the card's protocol."""
    source = model_spec.source if model_spec.revision else f"PATH/TO/{model_spec.name}"
    transformer = model_spec.pipeline in ("StableDiffusion3Pipeline", "FluxPipeline")
    more = f", max_sequence_length={model_spec.max_sequence_length}" if transformer else ""
    if model_spec.negative_prompt is not None:
        more += f", negative_prompt={model_spec.negative_prompt!r}"
    ddim = not transformer  # the protocol's sampler, whatever the folder brings
    return [
        f"from diffusers import {'DDIMScheduler, ' if ddim else ''}{model_spec.pipeline}",
        f'pipe = {model_spec.pipeline}.from_pretrained("{source}")',
        *(["pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"] if ddim else []),
        'pipe.load_lora_weights("adapter", weight_name="pytorch_lora_weights.safetensors")',
        f"image = pipe(PROMPT, height={model_spec.height}, width={model_spec.width}, num_inference_steps={model_spec.steps}, "
        f"guidance_scale={model_spec.guidance}{more}).images[0]",
    ]
