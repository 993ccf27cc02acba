"""Abstract class of every pipeline class: a diffusers pipeline as a velocity field over latents, with a LoRA on its network.

A pipeline class is a final subclass of `PipelineModel` behind an entry point of the group `gpobench.pipelines`, whose name is
the class name in model_index.json. The built-in ones (sd3.py, flux.py, sdxl.py, sd15.py) come the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..flow import Path as FlowPath
from ..flow import Prediction, to_velocity
from ..model_spec import Adapter, ModelSpec
from ..spec import Cond
from . import adapters, autoencoder, compiling, loading
from .lora import LoraCopies
from .memory_saving import apply_memory_settings

CLIP_TOKENS = 77  # length of every prompt of a CLIP text encoder
# The largest t from which the step to 0 may be dropped. Whatever the kernel, that step moves a latent by t v, for the embedded
# model by about 0.012, a third of a grey level (tests/bench/models/test_empty_step.py). The float32 of a scheduler's 1 / 1000.
EMPTY_STEP = 0.001 + 1e-6


class PipelineModel(ABC):
    """Implements `spec.Model` for the pipelines of diffusers: one network is trained through a LoRA, all else is frozen.

    A subclass is final. It states the class members below where they differ, and implements the abstract methods.
    """

    pipeline: ClassVar[str]  # the class name in model_index.json
    network_name: ClassVar[Literal["transformer", "unet"]]  # the trained network's name in the pipeline
    protocol: ClassVar[Mapping[str, Any]] = {}  # fields of ModelSpec that differ from its defaults, for a local folder
    guided_cost: int = 2  # evaluations for a guided velocity; 1 where guidance is an input of the network
    float32_vae: ClassVar[Sequence[str]] = ("fp16",)  # precisions beside which the autoencoder runs in float32
    replacements: ClassVar[Mapping[str, Any]] = {}  # parts or arguments of the pipeline in place of the folder's own
    call_options: ClassVar[
        Sequence[str]
    ] = ()  # fields of ModelSpec that the pipeline's call takes beside the common ones
    scheduler_code: ClassVar[str] = ""  # Python for the protocol's scheduler where it is not the folder's own

    # Set by `configure`
    path: FlowPath
    prediction: Prediction
    shape: tuple[int, ...]

    def __init__(self, model_spec: ModelSpec, *, device: Any, precision: str, adapter: Adapter | None, seed: int = 0):
        """Load the pipeline.

        Args:
            model_spec: where the weights are, and the protocol.
            device: of the networks; anything that torch.device takes.
            precision: of the base weights: fp32, bf16 or fp16.
            adapter: the LoRA to attach; None loads the base alone.
            seed: of the LoRA's random start.
        Raises UserError on a setting that the pipeline or the device does not support, Missing without weights.
        """
        self.spec, self.name, self.device = model_spec, model_spec.name, torch.device(device)
        self.steps, self.guidance = model_spec.sampler_steps, model_spec.guidance
        self.dtype = loading.dtype_of(precision, self.device)
        if self.guided_cost == 1 and model_spec.negative_prompt is not None:
            raise UserError(f"{self.name} takes no negative prompt: its guidance is an input of the network")
        self.pipe = loading.load_pipeline(
            self.diffusers_class(),
            model_spec,
            self.dtype,
            replacements=self.replacements,
            float32_vae=self.dtype in {loading.PRECISIONS[name] for name in self.float32_vae},
        )
        self.encoders = loading.TextEncoders(self.pipe, self.device, model_spec.offload)
        loading.move_to_device(self.pipe, self.device, self.encoders)
        loading.check_weights(self.pipe, model_spec, self.dtype)
        self.network: Any = getattr(self.pipe, self.network_name)
        self.vae: Any = self.pipe.vae
        self.configure()
        self.lora: LoraCopies | None = None
        self._autocast: torch.dtype | None = self.dtype if self.dtype != torch.float32 else None
        wanted, has_bf16 = model_spec.sampling_precision, loading.has_bf16(self.device)
        self._bf16_asked = wanted == "bf16" or (wanted == "auto" and has_bf16 and self.device.type == "cuda")
        # Why images are not sampled in bf16 although the spec says so.
        self.bf16_fault = f"{self.device.type} has no bf16" if wanted == "bf16" and not has_bf16 else ""
        self._unconditional: Cond | None = None
        apply_memory_settings(self.network, self.vae, model_spec)
        if adapter is not None:
            self.lora = adapters.attach(self.network, adapter, self.name, seed)
        # Why the network is not compiled although the spec asks for it; "" where it is, or nobody asked.
        self.compiler_fault = compiling.compiler_fault(self.device) if model_spec.compile is True else ""
        self.compiled = model_spec.compile is True and not self.compiler_fault
        if self.compiled:
            compiling.compile_blocks(self.network)

    # What a subclass implements

    @abstractmethod
    def configure(self) -> None:
        """Set path, prediction and shape from the loaded pipeline. Raises UserError on a variant that is not supported."""

    @abstractmethod
    def published_times(self, steps: int) -> Tensor:
        """(steps + 1,): the time grid of the pipeline's own sampler, falling to the image."""

    @abstractmethod
    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """The text encoders' output for B prompts; every tensor leads with B."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        """The network's output (B, C, h, w) in float32 at latents x and times t (B,).

        guidance: read only where it is an input of the network (`guided_cost` 1).
        """

    @classmethod
    @abstractmethod
    def text_tokens(cls, model_spec: ModelSpec) -> int:
        """Length of the text that the network reads: what an estimate of the memory needs."""

    @staticmethod
    @abstractmethod
    def network_inputs(config: Any, height: int, width: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """The network's arguments for one latent, on the meta device: what an estimate of the memory runs it with.

        Args:
            config: of the network.
            height: of the latent, h.
            width: of the latent, w.
            tokens: of text.
            dtype: of latents and embeddings.
        """

    # What a subclass may replace

    @classmethod
    def diffusers_class(cls) -> Any:
        """The pipeline's class: diffusers' own of the name `pipeline`."""
        import diffusers

        return getattr(diffusers, cls.pipeline)

    # The same for all

    def times(self, steps: int) -> Tensor:
        """(steps + 1,): the time grid of the protocol's sampler, `published_times` with or without the scheduler's last step.

        Raises UserError where the spec drops a last step that is not empty.
        """
        if not self.spec.drop_last_step:
            return self.published_times(steps)
        grid = self.published_times(steps + 1)[:-1]
        if float(grid[-1]) > EMPTY_STEP:
            raise UserError(
                f"{self.name}: the last of {steps + 1} steps begins at t = {float(grid[-1]):.4f} and cannot be dropped: "
                f"drop_last_step is for steps from t = {EMPTY_STEP} or below"
            )
        return grid

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """The embeddings of B prompts."""
        self.encoders.load()
        return self.encoders.store(self.embed(list(prompts)))

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond,
        *,
        guidance: float = 1.0,
        weights: str = "policy",
        detach: bool = False,
        merged: bool = False,
        half: bool = False,
    ) -> Tensor:
        """The velocity (B, C, h, w) in float32, see `spec.Model.velocity`."""
        self._autocast = self.dtype if self.dtype != torch.float32 else None
        if self.lora is not None:
            merged = merged and self.merges and not torch.is_grad_enabled()
            dtype = torch.bfloat16 if merged and half and self.samples_in_bf16 else None
            self._autocast = dtype or self._autocast
            self.lora.switch(weights, merged=merged, dtype=dtype)
        if guidance == 1.0 or self.guided_cost == 1:
            output = self._evaluate(x, t, cond, guidance)
        else:
            output = self._guided(x, t, cond, guidance, detach)
        return to_velocity(self.path, x, t, output, self.prediction)

    def _guided(self, x: Tensor, t: Tensor, cond: Cond, guidance: float, detach: bool) -> Tensor:
        """Classifier-free guidance, both branches in one pass as the pipelines do (arXiv 2207.12598)."""
        empty = self.unconditional()
        both = {key: torch.cat([empty[key].expand_as(value), value]) for key, value in cond.items()}
        output = self._evaluate(torch.cat([x, x]), torch.cat([t, t]), both, guidance)
        unconditional, conditional = output.chunk(2)
        unconditional = unconditional.detach() if detach else unconditional
        return unconditional + guidance * (conditional - unconditional)

    def _evaluate(self, x: Tensor, t: Tensor, cond: Cond, guidance: float) -> Tensor:
        """`forward` under autocast where it is in half precision; text encoders leave the device before."""
        self.encoders.unload()
        with torch.autocast(self.device.type, dtype=self._autocast) if self._autocast else nullcontext():
            output = self.forward(x, t, cond, guidance)
        return output

    @property
    def merges(self) -> bool:
        """Whether a LoRA may be merged into the weights while images are sampled.

        Not into half-precision ones: on their grid most of a young LoRA's small changes would be rounded away.
        """
        return self.spec.merge and self.dtype == torch.float32

    @property
    def samples_in_bf16(self) -> bool:
        """Whether training images may be sampled in bf16: asked for, possible here, and on merged float32 weights."""
        return self.merges and self._bf16_asked and not self.bf16_fault

    @property
    def current_weights(self) -> str:
        """The name of the weights that the network computes with."""
        return self.lora.current if self.lora else "ref"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.spec.height, self.spec.width

    def unconditional(self) -> Cond:
        """The embedding (1, ...) that guidance leads away from: that of the negative prompt, encoded once.

        Without a negative prompt it is that of the empty text, or zeros where the pipeline's config says
        force_zeros_for_empty_prompt, as SDXL's does.
        """
        if self._unconditional is None:
            embedding = self.encode([self.spec.negative_prompt or ""])
            if self.spec.negative_prompt is None and self.pipe.config.get("force_zeros_for_empty_prompt", False):
                embedding = {key: torch.zeros_like(value) for key, value in embedding.items()}
            self._unconditional = embedding
        return self._unconditional

    def decode(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), 0 black and 1 white, as the pipeline decodes before it clamps."""
        self.encoders.unload()
        return autoencoder.decode(self.vae, x0)

    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w): the mode of the autoencoder's posterior."""
        self.encoders.unload()
        return autoencoder.encode(self.vae, images)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters; none without an adapter."""
        return self.lora.parameters() if self.lora else []

    @property
    def copies(self) -> Sequence[str]:
        """Names of the weight copies beside policy and ref."""
        return tuple(self.lora.copies) if self.lora else ()

    def update_copy(self, name: str, decay: float) -> None:
        """copy <- decay * copy + (1 - decay) * policy; the first call makes the copy equal to the policy."""
        self._trained().update_copy(name, decay)

    def weight_state(self) -> dict[str, Tensor]:
        """Every copy's tensors, `copy/parameter` -> tensor, on the CPU."""
        return self._trained().state()

    def restore_weights(self, state: Mapping[str, Tensor]) -> None:
        """Set the copies to a `weight_state`; copies that are missing are made."""
        self._trained().restore(state)

    def save_adapter(self, folder: Path, weights: str = "policy") -> None:
        """Write the LoRA so that plain `pipe.load_lora_weights(folder)` loads it."""
        adapters.save_adapter(self.pipe, self.network, self._trained().adapter(weights), self.network_name, folder)

    def load_adapter(self, folder: Path) -> Sequence[str]:
        """Load a LoRA from a run's `adapter` folder, or any in diffusers' or PEFT's format; returns notes on how it was read."""
        notes = adapters.load_adapter(self.pipe, self.network, self.network_name, folder, self.name)
        if self.merges and self.lora is None:  # to the bits of the run that trained it, which sampled on merged weights
            adapters.merge_for_good(self.network)
        return notes

    def _trained(self) -> LoraCopies:
        assert self.lora is not None, f"{self.name} was opened without an adapter: it has no trained weights"
        return self.lora

    def flops_a_forward(self) -> float:
        """Floating-point operations of one forward of one latent, counted by running it."""
        if self.lora is not None:
            self.lora.switch("ref")
        x, cond = torch.zeros(1, *self.shape, device=self.device), self.encode([""])
        return _count_flops(partial(self._evaluate, x, torch.full((1,), 0.5, device=self.device), cond, self.guidance))

    @classmethod
    def usage(cls, model_spec: ModelSpec) -> list[str]:
        """Lines of Python that load an adapter into plain diffusers and draw an image under the protocol."""
        source = model_spec.source if model_spec.revision else f"PATH/TO/{model_spec.name}"
        options = {name: getattr(model_spec, name) for name in cls.call_options}
        if model_spec.negative_prompt is not None:
            options["negative_prompt"] = model_spec.negative_prompt
        more = "".join(f", {name}={value!r}" for name, value in options.items())
        imports = [cls.scheduler_code.partition(".")[0], cls.pipeline] if cls.scheduler_code else [cls.pipeline]
        return [
            f"from diffusers import {', '.join(imports)}",
            f'pipe = {cls.pipeline}.from_pretrained("{source}")',
            *([f"pipe.scheduler = {cls.scheduler_code}"] if cls.scheduler_code else []),
            f'pipe.load_lora_weights("adapter", weight_name="{adapters.LORA_FILE}")',
            f"image = pipe(PROMPT, height={model_spec.height}, width={model_spec.width}, "
            f"num_inference_steps={model_spec.steps}, guidance_scale={model_spec.guidance}{more}).images[0]",
        ]


def _count_flops(evaluate: Any) -> float:
    """Floating-point operations of calling `evaluate`."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    # torch knows the attention kernels of a GPU, and not the one of a CPU
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    )
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter as count:
        evaluate()
    return float(count.get_total_flops())


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without storage, for `PipelineModel.network_inputs`."""
    return torch.empty(*shape, dtype=dtype, device="meta")
