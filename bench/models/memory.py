"""Memory estimate: computes the bytes that weights, training and sampling take on a GPU, before anything is loaded.

The networks are built on torch's `meta` device, where a tensor has a shape and no storage: parameters are counted exactly, the
floating-point operations of a forward are counted by running it, and so are the tensors that its backward pass would keep. Two
numbers are measured instead (on one H200, docs/models.md): the memory for decoding an image, and a constant remainder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..assets import weight_store
from ..errors import Missing, UserError
from ..model_spec import Adapter, ModelSpec
from .architectures import PUBLISHED, Parts
from .base import PipelineModel
from .memory_saving import SLICED
from .network_costs import entry_name, find_entry
from .open import pipeline_class

GB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NETWORKS = ("transformer", "unet")
# Elements that decoding one image needs at its peak, by pixel and by the decoder's width at full size: on the H200 one more
# image of 512 px took 0.60 GB more in bf16 with a decoder 128 wide.
DECODING = 9.6
# The remainder of the measured peak: workspaces of the kernels and the allocator's rounding.
FIXED = 0.35 * GB
# Memory of the driver and the allocator's fragments, which a GPU must have beside torch's own.
MARGIN = 1.0 * GB
# Dense bf16 TFLOP/s from the manufacturers' data sheets (no sparsity). An estimate of hours assumes UTILISATION of it.
DEVICES = {
    "h200": 989.0,
    "h100": 989.0,
    "a100": 312.0,
    "l40s": 362.0,
    "rtx5090": 209.5,
    "rtx4090": 165.2,
    "rtx3090": 71.0,
    "a10": 125.0,
}
UTILISATION = 0.35


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device. What a run needs is the larger of `training` and `sampling`."""

    parameters: Mapping[str, int]  # by part of the pipeline
    source: str  # where the sizes come from, in words
    trained: int  # parameters of the LoRA
    flops: float  # of one forward of one latent
    weights: float  # of all parts that stay on the device
    encoders: float  # of the text encoders, on the device or not
    states: float  # the LoRA, its gradients, AdamW's two moments, and the copies of a method
    row: float  # kept for the backward pass of one latent
    training: float  # the peak of a backward pass
    sampling: float  # the peak while images are sampled and decoded
    encoding: float  # the peak while prompts are encoded

    @property
    def peak(self) -> float:
        """Return the bytes at the peak of a run."""
        return max(self.training, self.sampling, self.encoding)

    def fits(self, gigabytes: float) -> bool:
        """Return True where a GPU with this many GB (2^30 bytes) is large enough; MARGIN is taken off."""
        return self.peak + MARGIN <= gigabytes * GB

    def lines(self) -> list[str]:
        """Format the estimate as lines of text."""
        parts = ", ".join(f"{name} {_count(n)}" for name, n in self.parameters.items())
        return [
            f"parameters ({self.source}): {parts}; LoRA {_count(self.trained)}",
            f"{self.flops / 1e12:.2f} TFLOP a forward",
            f"weights {self.weights / GB:.1f} GB, LoRA with AdamW and copies {self.states / GB:.1f} GB, "
            f"activations {self.row / GB:.2f} GB a row",
            f"peak of training {self.training / GB:.1f} GB, of sampling {self.sampling / GB:.1f} GB, "
            f"of encoding {self.encoding / GB:.1f} GB (an estimate: within about a tenth where it was measured)",
        ]


def estimate(
    model_spec: ModelSpec,
    *,
    adapter: Adapter | None = None,
    precision: str | None = None,
    checkpointing: bool | None = None,
    offload: bool | None = None,
    micro: int = 1,
    rows: int | None = None,
    copies: int = 1,
    sliced: bool | None = None,
) -> MemoryEstimate:
    """Estimate the memory that training this model with a LoRA takes on a GPU. None takes the model spec's value.

    Args:
        model_spec: the model and its protocol.
        adapter: the LoRA.
        precision: of the base weights: fp32, bf16 or fp16.
        checkpointing: activations are computed again in the backward pass.
        offload: text encoders stay in main memory.
        micro: latents in one backward pass: rows of the method's batch times its latents a row (two of a preference pair, six
            of a method with six times).
        rows: images sampled at once.
        copies: LoRA-sized copies beside the policy (old, ema); the reference is the base with the LoRA off and costs nothing.
        sliced: the autoencoder decodes one image at a time; None decides by the image size.
    Raises UserError on an unknown precision, Missing where neither the configs nor a published architecture are at hand.
    """
    adapter, precision = adapter or model_spec.adapter, precision or model_spec.precision
    if precision not in BYTES:
        raise UserError(f"precision {precision!r} is unknown: {', '.join(BYTES)}")
    checkpointing = model_spec.checkpointing if checkpointing is None else checkpointing
    offload = model_spec.offload if offload is None else offload
    rows = rows or model_spec.rows
    sliced = model_spec.height * model_spec.width >= SLICED if sliced is None else sliced
    parts, source = blueprint(model_spec)
    sizes = {name: _parameters(part) for name, part in _frozen(parts)}
    counts = {name: n for name, (n, _) in sizes.items()}
    numbers = {name: sum(both) for name, both in sizes.items()}  # SD3.5's table of places is 0.2 billion numbers
    network = _network_name(model_spec, parts)
    model_class = pipeline_class(model_spec)
    cost = _forward(_forward_case(model_spec, parts, adapter, precision))
    size, vae_size = BYTES[precision], 4 if precision in model_class.float32_vae else BYTES[precision]
    encoders = float(sum(n for name, n in numbers.items() if name.startswith("text_encoder")) * size)
    base = numbers[network] * size + numbers["vae"] * vae_size
    weights = base + (0.0 if offload else encoders)
    states = cost.trained * 4.0 * (4 + copies)  # policy, gradient, two moments, copies; all float32
    row = _backward_row(cost, checkpointing)
    guided = model_class.guided_cost if model_spec.guidance != 1 else 1
    evaluating = cost.largest * guided * rows  # no backward: one block at a time
    decoding = _decoding(model_spec, parts, vae_size) * (1 if sliced else rows)
    merged = cost.adapted if model_spec.merge and precision == "fp32" else 0.0  # beside the originals
    return MemoryEstimate(
        parameters=counts,
        source=source,
        trained=cost.trained,
        flops=cost.flops,
        weights=weights,
        encoders=encoders,
        states=states,
        row=row,
        training=weights + states + micro * row + FIXED,
        sampling=weights + states + merged + max(evaluating, decoding),
        encoding=base + states + encoders,
    )


def _forward_case(model_spec: ModelSpec, parts: Parts, adapter: Adapter, precision: str) -> ForwardCase:
    part = _frozen({"": parts[_network_name(model_spec, parts)]})[0][1]
    size = _latent_size_and_tokens(model_spec, parts)
    return ForwardCase(part, pipeline_class(model_spec), size, adapter, precision)


def table_entries(model_spec: ModelSpec) -> dict[str, list[float]]:
    """Compute the entries of the table of costs for a model: the sizes of its networks, and a forward in each precision."""
    parts, _ = blueprint(model_spec)
    entries = {entry_name(*part): list(map(float, count_parameters(part))) for _, part in _frozen(parts)}
    for precision in BYTES:
        case = _forward_case(model_spec, parts, model_spec.adapter, precision)
        entries[case.entry] = [float(x) for x in astuple(count_forward(case))]
    return entries


def _network_name(model_spec: ModelSpec, parts: Parts) -> str:
    """Return which part is the network; Missing where the pipeline has none, or no autoencoder."""
    network = next((name for name in NETWORKS if name in parts), None)
    if network is None or "vae" not in parts:
        raise Missing(f"{model_spec.name} has no transformer or U-Net whose size could be told")
    return network


def _backward_row(cost: ForwardCost, checkpointing: bool) -> float:
    """Return the bytes kept for the backward pass of one latent.

    Without checkpointing that is all of it; else what enters each block, and the largest block once more with its gradients.
    """
    return cost.outside + (min(cost.inside, cost.inputs + 2 * cost.largest) if checkpointing else cost.inside)


def _decoding(model_spec: ModelSpec, parts: Parts, size: int) -> float:
    """Return the bytes that decoding one image takes; size: bytes a number of the autoencoder."""
    width = int(dict(parts["vae"][2]).get("block_out_channels", (128,))[0])
    return DECODING * width * model_spec.height * model_spec.width * size


def hours(nfe: float, flops: float, device: str, utilisation: float = UTILISATION) -> float:
    """Estimate the hours that nfe evaluations of the network take on a named GPU, at an assumed share of its data sheet's speed.

    Decoding and scoring of images are not included. Raises UserError on a device that is not in DEVICES.
    """
    if device not in DEVICES:
        raise UserError(f"device {device!r} is unknown: {', '.join(DEVICES)}")
    return nfe * flops / (DEVICES[device] * 1e12 * utilisation) / 3600


# Networks of the model


def blueprint(model_spec: ModelSpec) -> tuple[Parts, str]:
    """Return the settings of each network of the pipeline, and a text that names their source.

    They are read from the config files of the folder or the hub's cache, else from a named model's published architecture.
    """
    parts = _configs(model_spec)
    if parts:
        return parts, "config files"
    if model_spec.name in PUBLISHED:
        return PUBLISHED[model_spec.name], "published architecture"
    raise Missing(f"the sizes of {model_spec.name} are not known: {model_spec.source} is not here")


def _configs(model_spec: ModelSpec) -> Parts:
    """Read the settings in the config files; empty where a file is missing."""
    index = _json(model_spec, "model_index.json")
    parts: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    for name, entry in index.items():
        network = name in (*NETWORKS, "vae") or name.startswith("text_encoder")
        if not network or not isinstance(entry, list) or not all(cast(list[Any], entry)):
            continue
        part_config = _json(model_spec, f"{name}/config.json")
        if not part_config:
            return {}
        library, kind = cast(list[str], entry)
        parts[name] = (library, kind, part_config)
    return parts


def _json(model_spec: ModelSpec, file: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    folder = weight_store.local(model_spec.source, model_spec.revision) or Path(model_spec.source)
    path = folder / file
    if not folder.is_dir():
        cached = try_to_load_from_cache(model_spec.source, file, revision=model_spec.revision)
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


Frozen = tuple[str, str, str]  # library, class, settings as JSON: hashable, for the cache


def _frozen(parts: Parts) -> list[tuple[str, Frozen]]:
    return [(name, (p[0], p[1], json.dumps(dict(p[2]), sort_keys=True))) for name, p in parts.items()]


def _build(part: Frozen, dtype: torch.dtype = torch.float32) -> Any:
    """Build the network on the meta device."""
    import diffusers
    import transformers

    library, kind, settings = part
    network_class: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    network_config: dict[str, Any] = json.loads(settings)
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return (
                network_class.from_config(network_config)
                if library == "diffusers"
                else network_class(network_class.config_class(**network_config))
            )
    finally:
        torch.set_default_dtype(old)


@lru_cache(maxsize=32)
def _parameters(part: Frozen) -> tuple[int, int]:
    """(Parameters, numbers in buffers) of a network, from the table where it has them."""
    known = find_entry(entry_name(*part))
    return (int(known[0]), int(known[1])) if known else count_parameters(part)


def count_parameters(part: Frozen) -> tuple[int, int]:
    """Count (parameters, numbers in buffers) exactly: tensors that two layers share count once."""
    network = _build(part)
    return sum(p.numel() for p in network.parameters()), sum(b.numel() for b in network.buffers())


# Cost of a forward


@dataclass(frozen=True)
class ForwardCost:
    """The cost of one forward of one latent; sizes in bytes."""

    flops: float
    trained: int
    adapted: float  # the weights that the LoRA adapts
    outside: float  # kept for the backward pass, outside of the blocks that checkpointing knows
    inside: float  # kept inside of them
    inputs: float  # what enters them
    largest: float  # the most that one of them keeps


def _latent_size_and_tokens(model_spec: ModelSpec, parts: Parts) -> tuple[int, int, int]:
    """Return (height of a latent, its width, tokens of text)."""
    factor = 2 ** (len(dict(parts["vae"][2]).get("block_out_channels", (1,) * 4)) - 1)
    tokens = pipeline_class(model_spec).text_tokens(model_spec)
    return model_spec.height // factor, model_spec.width // factor, tokens


@dataclass(frozen=True)
class ForwardCase:
    """One forward of one latent: all that its cost is computed from."""

    part: Frozen  # the network
    pipeline: type[PipelineModel]
    size: tuple[int, int, int]  # height of the latent, its width, tokens of text
    adapter: Adapter
    precision: str

    @property
    def entry(self) -> str:
        """Its name in the table of costs."""
        a = self.adapter
        return entry_name(
            *self.part, self.pipeline.__qualname__, *self.size, a.rank, a.alpha, tuple(a.targets), self.precision
        )


@lru_cache(maxsize=8)
def _forward(case: ForwardCase) -> ForwardCost:
    """The cost of a forward, from the table where it has it."""
    known = find_entry(case.entry)
    return ForwardCost(known[0], int(known[1]), *known[2:]) if known else count_forward(case)


def count_forward(case: ForwardCase) -> ForwardCost:
    """Run the network once to count operations, and once with the LoRA to sum what its backward pass would keep."""
    from peft import LoraConfig
    from torch.utils.flop_counter import FlopCounterMode

    adapter = case.adapter
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]
    network = _build(case.part, dtype).requires_grad_(False).eval()
    inputs = case.pipeline.network_inputs(network.config, *case.size, dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**inputs, return_dict=False)
    network.add_adapter(LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets)))
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    adapted = sum(p.nbytes for name, p in network.named_parameters() if name.endswith(".base_layer.weight"))
    saved = SavedTensors(network)
    network.enable_gradient_checkpointing(gradient_checkpointing_func=saved.block)
    with saved, _as_on_a_gpu(dtype):
        network(**inputs, return_dict=False)
    return ForwardCost(
        float(counter.get_total_flops()),
        trained,
        float(adapted),
        saved.outside,
        saved.inside,
        saved.inputs,
        saved.largest,
    )


class SavedTensors:
    """Adds up the sizes of tensors that a forward saves for its backward pass, each storage once and no parameter."""

    def __init__(self, network: Any):
        self.outside = self.inside = self.inputs = self.largest = 0.0
        self._known = {_identity(p) for p in network.parameters()}
        self._held: list[Tensor] = []  # a freed storage's address could be reused by a new one
        self._within: float | None = None  # of the block that runs

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _identity(tensor) not in self._known:
            self._known.add(_identity(tensor))
            self._held.append(tensor)
            size = float(tensor.untyped_storage().nbytes())
            if self._within is None:
                self.outside += size
            else:
                self._within += size
        return tensor

    def block(self, block: Any, *args: Any) -> Any:
        """Run a block in place of checkpointing, and count its inputs and what it saves."""
        outer = self._within
        self._within = 0.0
        output = block(*args)
        saved, self._within = self._within, outer
        self.inputs += sum(float(a.numel() * a.element_size()) for a in args if isinstance(a, Tensor))
        self.inside += saved
        self.largest = max(self.largest, saved)
        return output


def _identity(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage: views of one storage share it."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


class _FusedAttention(torch.autograd.Function):
    """Computes attention and saves what the fused kernels save: q, k, v and the result, and no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("counted, never run backward")


@contextmanager
def _as_on_a_gpu(dtype: torch.dtype) -> Generator[None]:
    """Make torch's functions cast as autocast does on a GPU, and attention save what the fused kernels save.

    There is no autocast on the meta device. Matrix products and convolutions run in `dtype`, each on a copy of its own,
    normalisations in float32: that is a fifth of what a transformer's backward pass keeps.
    """
    functional: Any = torch.nn.functional
    names = ("linear", "conv2d", "layer_norm", "group_norm", "scaled_dot_product_attention")
    originals = {name: getattr(functional, name) for name in names}

    def cast(name: str, to: torch.dtype) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            def raised(value: Any) -> Any:
                return value.to(to) if isinstance(value, Tensor) else value

            return originals[name](*map(raised, args), **{key: raised(value) for key, value in more.items()})

        return call

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
        return _FusedAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype))

    try:
        for name in ("linear", "conv2d"):
            setattr(functional, name, cast(name, dtype))
        for name in ("layer_norm", "group_norm"):
            setattr(functional, name, cast(name, torch.float32))
        functional.scaled_dot_product_attention = attention
        yield
    finally:
        for name in names:
            setattr(functional, name, originals[name])


def _count(n: float) -> str:
    """Format a count as 1.2 B, 23.9 M or 4 k."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.{0 if n / unit >= 100 else 1 if n / unit >= 10 else 2}f} {name}"
    return str(math.floor(n))
