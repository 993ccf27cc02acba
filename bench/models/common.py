"""The tool rack of the adapters: what the models of all pipeline classes do alike, as functions.

An adapter in here is a LoRA on the one network that is trained; `module` is that network.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..assets import weight_store
from ..errors import Missing, UserError
from ..files import write_atomically
from ..flow import Prediction, ddim_grid
from ..model_spec import Adapter, ModelSpec
from ..spec import Cond
from .lora import LIVE, LoraCopies

LORA_FILE = "pytorch_lora_weights.safetensors"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
SLICED = (
    512 * 512
)  # pixels of an image from which on the autoencoder takes one image at a time: the same pictures, less memory
TILED = (
    1536  # pixels a side above which it works in tiles, whose seams are blended: a picture that is a little different
)

# (x (B, C, h, w), t (B,), cond) -> what the model says, (B, C, h, w)
Forward = Callable[[Tensor, Tensor, Cond], Tensor]


# Loading


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the base weights; raises UserError in one line where the device cannot compute in it, or is not there."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown: {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: on a CPU take bf16 or fp32")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"there is no device {device}: torch sees no CUDA GPU")
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(f"{torch.cuda.get_device_name(device)} cannot compute in bf16: take fp16 or fp32")
    try:
        one = torch.ones(1, 1, dtype=dtype, device=device)
        torch.mm(one, one)
    except (RuntimeError, TypeError, AssertionError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"device {device} cannot compute in {precision}: {why}") from None
    return dtype


def place(pipe: Any, device: torch.device, encoders: Encoders) -> None:
    """Every network of the pipeline to its device, the text encoders where they stay."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and part not in encoders.parts:
            part.to(device)
    encoders.leave()


class Encoders:
    """The text encoders of a pipeline: with `offload` they live in main memory and visit the device while prompts are encoded.

    They come with the first prompt and leave before the networks are asked again, so that prompts encoded in a row cost
    one move. Embeddings then stay in main memory as well: those of a large book would fill the device.
    """

    def __init__(self, pipe: Any, device: torch.device, offload: bool):
        named = pipe.components.items()
        self.parts: list[Any] = [
            p for name, p in named if name.startswith("text_encoder") and isinstance(p, torch.nn.Module)
        ]
        self.device, self.offload = device, offload and device.type != "cpu"
        self.home = torch.device("cpu") if self.offload else device
        self._here: bool | None = None

    def come(self) -> None:
        """Bring them to the device, where they are asked."""
        self._move(True)

    def leave(self) -> None:
        """Send them home."""
        self._move(False)

    def _move(self, here: bool) -> None:
        if self._here is None or (self.offload and here != self._here):
            for part in self.parts:
                part.to(self.device if here else self.home)
        self._here = here

    def keep(self, cond: Cond) -> Cond:
        """Embeddings where they are kept."""
        return {key: value.to(self.home) for key, value in cond.items()}


def pipeline(
    kind: Any,
    model_spec: ModelSpec,
    dtype: torch.dtype,
    given: Mapping[str, Any] = MappingProxyType({}),
    wide: Sequence[torch.dtype] = (torch.float16,),
) -> Any:
    """The pipeline of this class from a folder or the hub's cache, nothing in it trainable, no dropout.

    Safetensors only, and every tensor must be there: the libraries would fill a gap with random numbers. given: parts that
    stand in for the folder's own. wide: dtypes beside which the autoencoder is float32: in fp16 its activations may
    overflow (that is what force_upcast in its config says). Raises UserError on a folder of another class, Missing when the
    weights are not there.
    """
    import diffusers.utils.logging as theirs
    import transformers.utils.logging as text

    theirs.disable_progress_bar()
    text.disable_progress_bar()
    source = str(weight_store.local(model_spec.source, model_spec.revision) or model_spec.source)
    local = Path(source).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    where: dict[str, Any] = {"revision": model_spec.revision, "local_files_only": local}
    misfit = f"the weights of {model_spec.name} ({model_spec.source}) cannot be loaded"
    loud = theirs.get_verbosity()
    theirs.set_verbosity(theirs.CRITICAL)  # what is wrong is said once, below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype has a new name that older ones do not know
            index = kind.load_config(source, **where)
            found = index.get("_class_name")
            if found != kind.__name__:
                raise UserError(
                    f"{model_spec.source} holds a {found}, not the {kind.__name__} that {model_spec.name} stands for"
                )
            parts = dict(given)
            for name, entry in index.items():
                if isinstance(entry, (list, tuple)) and entry[0] == "transformers" and name not in parts:
                    part = _text_model(entry[1], source, name, where, dtype)
                    parts |= {} if part is None else {name: part}
            dtypes = {"vae": torch.float32, "default": dtype} if dtype in wide else dtype
            pipe = kind.from_pretrained(source, **parts, torch_dtype=dtypes, use_safetensors=True, **where)
    except torch.OutOfMemoryError:  # a RuntimeError too, and nobody's misfit
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise Missing(f"{misfit}: {str(error).strip().splitlines()[0]}") from error
    finally:
        theirs.set_verbosity(loud)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            gaps = [key for key, tensor in part.named_parameters() if tensor.is_meta]
            if gaps:  # diffusers leaves what it did not find without storage
                raise Missing(f"{misfit}: {name} lacks {len(gaps)} tensors, {gaps[0]} first")
            part.requires_grad_(False).eval()  # T5 comes with dropout on: a reloaded model would differ
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_model(kind: str, source: str, name: str, where: dict[str, Any], dtype: torch.dtype) -> Any:
    """A part of the pipeline that transformers makes, or None where it is no network.

    Loaded apart, because only so does transformers say which tensors it did not find; to the pipeline it only warns.
    """
    import transformers

    found: Any = getattr(transformers, kind, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return None
    answer: Any = found.from_pretrained(
        source, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
    )
    part, told = answer
    gaps = sorted(told["missing_keys"])
    if gaps:
        raise ValueError(f"{name} lacks {len(gaps)} tensors, {gaps[0]} first")
    return part


# The trained part


def attach(module: Any, adapter: Adapter, name: str, seed: int) -> LoraCopies:
    """Put a fresh LoRA on the network; its second factor is zero, so the model is unchanged at first."""
    from peft import LoraConfig

    targets, names = list(adapter.targets), [n for n, _ in module.named_modules()]
    for target in targets:
        if not any(n == target or n.endswith("." + target) for n in names):
            raise UserError(f"adapter.targets: the model {name} has no module {target!r}")
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraCopies(module, config)


def checkpoint(block: Any, *args: Any) -> Any:
    """Run a block of the network so that the backward pass computes its activations again.

    The second time other weights may be on: a loss asks the live ones, then the reference, and only then goes back. So the
    block runs with those of the first time again; else the gradient would silently be another's.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.utils.checkpoint import checkpoint as again

    layers: list[Any] = [m for m in block.modules() if isinstance(m, BaseTunerLayer)]

    def flags() -> list[tuple[bool, list[str]]]:
        return [(m._disable_adapters, m._active_adapter) for m in layers]

    def set_flags(to: list[tuple[bool, list[str]]]) -> None:
        for m, (off, active) in zip(layers, to, strict=True):
            m._disable_adapters, m._active_adapter = off, active

    first = flags()

    @contextmanager
    def back() -> Generator[None]:
        now = flags()
        set_flags(first)
        try:
            yield
        finally:
            set_flags(now)

    # no dropout anywhere: there is no random state to keep
    return again(
        block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), back())
    )


def prepare(module: Any, vae: Any, model_spec: ModelSpec) -> None:
    """What the card asks of the trained network and of the autoencoder, beside their weights.

    Raises UserError where it asks for compiling and checkpointing: torch cannot trace a checkpoint that remembers its weights.
    """
    if model_spec.compile and model_spec.checkpointing:
        raise UserError(f"{model_spec.name}: compile needs checkpointing off, torch cannot compile the two together")
    if model_spec.checkpointing:
        module.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    if model_spec.compile:
        module.compile()
    if model_spec.height * model_spec.width >= SLICED:
        vae.enable_slicing()
    if max(model_spec.height, model_spec.width) > TILED:
        vae.enable_tiling()


def save_adapter(pipe: Any, module: Any, layers: dict[str, Tensor], part: str, folder: Path) -> None:
    """Write a LoRA of the pipeline's `part` with its rank and alpha, as diffusers loads it; the same bytes each time."""
    metadata = {f"{part}_lora_adapter_metadata": settings(module)}
    pipe.save_lora_weights(str(folder), **{f"{part}_lora_layers": layers}, **metadata)
    order(folder / LORA_FILE)


def load_adapter(pipe: Any, module: Any, part: str, folder: Path, name: str) -> None:
    """A LoRA file in diffusers format into the pipeline; part: what its keys call the network, transformer or unet."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from peft import get_peft_model_state_dict

    file = folder / LORA_FILE if folder.is_dir() else folder
    if not file.is_file():
        raise UserError(f"no adapter at {file}")
    misfit = f"adapter {file} does not fit the model {name}"
    try:
        asked: Any = pipe.lora_state_dict(str(file.parent), weight_name=file.name)
        asked = asked[0] if isinstance(asked, tuple) else asked  # the U-Net's mixin returns its alphas as well
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{misfit}: {str(error).splitlines()[0]}") from error
    # diffusers only warns of tensors that have no place, and would let the bare base be judged in their name
    names = list(getattr(module, "peft_config", {}))
    taken = get_peft_model_state_dict(module, adapter_name=names[-1]) if names else {}
    keys = convert_unet_state_dict_to_peft(asked)  # the older spelling, lora.down and lora.up, is taken too
    wanted = {key.removeprefix(f"{part}.") for key in keys if not key.startswith("text_encoder")}
    if not asked or wanted != set(taken):
        raise UserError(f"{misfit}: {len(wanted - set(taken))} of its {len(asked)} tensors have no place there")


# Sampling


def guided(
    forward: Forward, x: Tensor, t: Tensor, cond: Cond, empty: Callable[[], Cond], guidance: float, detach: bool
) -> Tensor:
    """(B, C, h, w): the forward under classifier-free guidance, both branches in one pass, as the pipelines do.

    empty: the unconditional prompt's embedding, one row. detach: no gradient through that branch.
    """
    if guidance == 1.0:
        return forward(x, t, cond)
    none = empty()
    both = {key: torch.cat([none[key].expand_as(value), value]) for key, value in cond.items()}
    plain, asked = forward(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    plain = plain.detach() if detach else plain
    return plain + guidance * (asked - plain)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Half precision where the weights are in it."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


# U-Nets, sampled with DDIM


def ddim(pipe: Any, name: str) -> Any:
    """DDIM on the noise table of whatever scheduler the folder ships; raises UserError on a prediction nobody knows."""
    from diffusers import DDIMScheduler

    # latents have no bounds to be clipped to, and clipping is the default that older folders do not state
    scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)
    if scheduler.config.prediction_type not in PREDICTIONS:
        said = scheduler.config.prediction_type
        raise UserError(f"the scheduler of {name} predicts {said!r}: {', '.join(PREDICTIONS)} work")
    return scheduler


def ddim_times(scheduler: Any, steps: int, name: str) -> Tensor:
    """(steps + 1,): DDIM's timesteps as the scheduler's spacing and offset have them, (k + 1) / N, falling."""
    config = scheduler.config
    spacing = "trailing" if config.timestep_spacing == "trailing" else "leading"  # DDIM cannot walk "linspace"
    offset = int(config.steps_offset) if spacing == "leading" else 0
    try:
        return ddim_grid(
            steps, int(config.num_train_timesteps), spacing, offset, alpha_to_one=bool(config.set_alpha_to_one)
        )
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


# The autoencoder: latents are (mode - shift) * scale


def shape(channels: int, model_spec: ModelSpec, factor: int, patch: int = 1) -> tuple[int, int, int]:
    """(C, h, w) of one latent of the card's protocol; factor: pixels a latent's side, patch: latents a token's side."""
    whole = factor * patch
    if model_spec.height % whole or model_spec.width % whole:
        raise UserError(
            f"{model_spec.name} draws in multiples of {whole} pixels, not {model_spec.height}x{model_spec.width}"
        )
    return channels, model_spec.height // factor, model_spec.width // factor


def _scaling(vae: Any) -> tuple[float, float]:
    return float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)


@torch.no_grad()
def decode(vae: Any, x0: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 3, H, W) in [0, 1], as the pipelines decode."""
    scale, shift = _scaling(vae)
    out = vae.decode((x0 / scale + shift).to(vae.dtype), return_dict=False)[0]
    return (out.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def latents(vae: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, C, h, w): the mode of the autoencoder's posterior."""
    scale, shift = _scaling(vae)
    mode = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
    return (mode.float() - shift) * scale


# The price


def flops(forward: Forward, x: Tensor, cond: Cond) -> float:
    """Floating-point operations of one forward of one latent x (1, C, h, w), counted by running it."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    # torch knows the attention kernels of a GPU, and not the one of a CPU
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    )
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter as count:
        forward(x, torch.full((1,), 0.5, device=x.device), cond)
    return float(count.get_total_flops())


def settings(module: Any) -> dict[str, Any]:
    """A LoRA's own settings as they go into its file; sets sorted: their order changes from process to process."""
    own = module.peft_config[LIVE].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in own.items()}


def order(path: Path) -> None:
    """Put the entries of a safetensors file's metadata in order: its library writes them as its hash table has them.

    The header is JSON behind its length, 8 bytes little-endian; the tensors' places count from its end.
    """
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": header.pop("__metadata__"), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, lambda p: p.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :]))
