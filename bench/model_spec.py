"""Model specs: where a model's weights are, and the protocol it is trained and evaluated under."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import registry
from .errors import UserError
from .files import read_json

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION = (*UNET_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("net.0.proj", "net.2")


@dataclass(frozen=True)
class Adapter:
    """Settings of the LoRA that is trained; the base weights never change."""

    rank: int = 32
    alpha: int = 64
    targets: tuple[str, ...] = ATTENTION  # module names, or the ends of them

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise UserError(f"adapter: rank and alpha must be at least 1 and targets not empty, got {self}")


@dataclass(frozen=True)
class ModelSpec:
    """What a model's name stands for; nothing is loaded.

    The defaults are the protocol of Flow-GRPO: 512 px, 40 steps, guidance 4.5, T5 cut to 128 tokens, LoRA of rank 32 on the
    attention (arXiv 2505.05470, App. B).
    """

    name: str
    source: str  # a folder in diffusers format, or owner/name on the model hub
    revision: str | None = None  # of the hub repository; None for a folder
    pipeline: str = ""  # the class in model_index.json; read from there when it is a folder
    domain: str = "open"  # which prompts the model understands: glyphs | open
    height: int = 512  # pixels
    width: int = 512
    steps: int = 40  # of the pipeline, `num_inference_steps`
    # The scheduler's last step, from a time close to 0, is not taken: see `sampler_steps` and `models.base.EMPTY_STEP`.
    drop_last_step: bool = False
    guidance: float = 4.5  # 1 is none
    max_sequence_length: int = 128  # tokens of the T5 slot, where there is one
    # What guidance leads away from; None is the pipeline's own default, "" encodes an empty text.
    negative_prompt: str | None = None
    licence: str = "its own"
    budget: str = "sd35m"  # the bounds a run gets when it names none
    precision: str = "bf16"
    rows: int = 8  # images sampled at once
    checkpointing: bool = True  # activations are computed again in the backward pass: less memory, a third more time
    offload: bool = True  # text encoders and embeddings stay in main memory, and visit the device for encoding only
    merge: bool = True  # the LoRA is merged into float32 weights while images are sampled
    # Of training images' steps that have no density, on merged float32 weights; auto: bf16 on a GPU that has it, else fp32.
    sampling_precision: Literal["auto", "fp32", "bf16"] = "auto"
    # torch.compile on the blocks of the trained network, minutes at the start; auto: where a run is long enough to earn them.
    compile: bool | Literal["auto"] = "auto"
    preset: str = ""  # the section of methods/NAME.toml that fits it; empty is the model's own name
    adapter: Adapter = field(default_factory=Adapter)

    @property
    def sampler_steps(self) -> int:
        """The steps that are taken, each an evaluation of the network: what training, evaluation and budget count."""
        return self.steps - self.drop_last_step


# What differs from the defaults of ModelSpec by pipeline class. Steps, guidance and tokens are the defaults of diffusers' pipelines.
# FLUX: 720 px as DanceGRPO, MixGRPO and BranchGRPO train it (arXiv 2505.07818, finetune_flux_grpo.sh and its kin); no paper
# states the whole of an evaluation. SDXL: 1024 px, and SD1.5: 512 px, as Diffusion-DPO (arXiv 2311.12908). The sampler of both
# U-Nets is DDIM; their attention has no second stream to adapt. A third party's class states its own (`models.base`).
PROTOCOLS: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": {},
    "FluxPipeline": {"height": 720, "width": 720, "steps": 28, "guidance": 3.5, "max_sequence_length": 512},
    "StableDiffusionXLPipeline": {
        "height": 1024,
        "width": 1024,
        "steps": 50,
        "guidance": 5.0,
        "max_sequence_length": 77,
        "rows": 4,
        "adapter": Adapter(targets=UNET_ATTENTION),
    },
    "StableDiffusionPipeline": {
        "steps": 50,
        "guidance": 7.5,
        "max_sequence_length": 77,
        "adapter": Adapter(targets=UNET_ATTENTION),
    },
}


def registered_name(reference: str) -> str:
    """The name of the registered model that a hub id, owner/name in any case, stands for; any other reference unchanged.

    Raises UserError for a path at which there is no folder.
    """
    if reference in registry.entries("model") or ".py:" in reference or Path(reference).is_dir():
        return reference
    if reference.count("/") == 1 and reference[0] not in "./~":
        for name in registry.entries("model"):
            spec = registry.load("model", name)
            if isinstance(spec, ModelSpec) and spec.source.casefold() == reference.casefold():
                return name
    if "/" in reference:
        raise UserError(
            f"--model {reference}: no such folder, and no registered model has this source; "
            f"registered: {', '.join(sorted(registry.entries('model')))}"
        )
    return reference


def find_model_spec(reference: str) -> ModelSpec:
    """The model spec of a name, or of a local folder in diffusers format.

    A folder gets the protocol of its pipeline's class; one that `gpobench pretrain` wrote states its own in recipe.json.
    Raises UserError on an unknown name or a folder that is no pipeline.
    """
    folder = Path(reference)
    if reference in registry.entries("model") or not folder.is_dir():  # a folder that is called like a model: ./tiny
        model_spec = registry.load("model", reference)
        if not isinstance(model_spec, ModelSpec):
            raise UserError(f"model {reference!r} is not a gpobench.bench.model_spec.ModelSpec")
        return model_spec
    index, recipe = folder / "model_index.json", folder / "recipe.json"
    if not index.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    try:
        facts = read_json(recipe) if recipe.is_file() else {}
        pipeline = str(dict(read_json(index)).get("_class_name", ""))
        protocol = _protocol(pipeline, facts)
        return ModelSpec(name=folder.resolve().name, source=str(folder), pipeline=pipeline, **protocol)
    except KeyError as missing:
        raise UserError(f"{recipe} does not say {missing}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from None


def _class_protocol(pipeline: str) -> dict[str, Any]:
    """Fields of ModelSpec that the pipeline class sets; none where the class is not registered.

    Those of the built-in classes are read from PROTOCOLS, because their modules import torch.
    """
    if pipeline in PROTOCOLS or pipeline not in registry.entries("pipeline"):
        return PROTOCOLS.get(pipeline, {})
    return dict(registry.load("pipeline", pipeline).protocol)


def _protocol(pipeline: str, facts: dict[str, Any]) -> dict[str, Any]:
    protocol = _class_protocol(pipeline)
    if not facts:
        return protocol
    stated = ("height", "width", "steps", "guidance", "max_sequence_length")
    attention: Adapter = protocol.get("adapter", Adapter())
    adapter = replace(SMALL["adapter"], targets=attention.targets + FEED_FORWARD)
    stated_or_not = {"drop_last_step": bool(facts.get("drop_last_step", False))}
    return {"domain": "glyphs", **{key: facts[key] for key in stated}, **stated_or_not, **SMALL, "adapter": adapter}


# Settings for a model of a few million parameters on a CPU.
SMALL: dict[str, Any] = {
    "budget": "tiny",
    "precision": "fp32",
    "rows": 64,
    "checkpointing": False,
    "offload": False,
    "preset": "tiny",
    "adapter": Adapter(rank=32, alpha=64, targets=ATTENTION + FEED_FORWARD),
}
