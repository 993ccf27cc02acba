"""Loading a diffusers pipeline: device and precision are checked, weights must be complete, text encoders may be off-loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..assets import weight_store
from ..assets.finite import damaged_file, first_infinite
from ..errors import Missing, UserError
from ..model_spec import ModelSpec
from ..spec import Cond

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16: every processor, and the GPUs that say so."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the base weights. Raises UserError where the device is not there or cannot compute in it."""
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
        probe = torch.ones(1, 1, dtype=dtype, device=device)
        torch.mm(probe, probe)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {device} cannot compute in {precision}: {reason}") from None
    return dtype


class TextEncoders:
    """The text encoders of a pipeline. With `offload` they stay in main memory and visit the device to encode prompts.

    They move to the device with the first prompt and back before the network is evaluated, so that prompts encoded in
    a row cost one move. Embeddings then stay in main memory too: those of many prompts would fill the device.
    """

    def __init__(self, pipe: Any, device: torch.device, offload: bool):
        """Find the text encoders of the pipeline; nothing is moved yet."""
        named = pipe.components.items()
        self.modules: list[Any] = [
            module for name, module in named if name.startswith("text_encoder") and isinstance(module, torch.nn.Module)
        ]
        self.device, self.offload = device, offload and device.type != "cpu"
        self.storage = torch.device("cpu") if self.offload else device
        self._on_device: bool | None = None

    def load(self) -> None:
        """Move them to the device, where they compute."""
        self._move(True)

    def unload(self) -> None:
        """Move them to where they are stored."""
        self._move(False)

    def _move(self, on_device: bool) -> None:
        if self._on_device is None or (self.offload and on_device != self._on_device):
            for module in self.modules:
                module.to(self.device if on_device else self.storage)
        self._on_device = on_device

    def store(self, cond: Cond) -> Cond:
        """The embeddings, moved to where they are kept."""
        return {key: value.to(self.storage) for key, value in cond.items()}


def move_to_device(pipe: Any, device: torch.device, encoders: TextEncoders) -> None:
    """Move every network of the pipeline to the device, and the text encoders to where they are stored."""
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module) and module not in encoders.modules:
            module.to(device)
    encoders.unload()


def check_weights(pipe: Any, model_spec: ModelSpec, dtype: torch.dtype) -> None:
    """Raise UserError where a network of the pipeline has a number that is not finite, naming file and tensor.

    It is called with the networks on their device, where the check is quickest.
    """
    folder = weight_store.local(model_spec.source, model_spec.revision)
    for part, module in pipe.components.items():
        name = first_infinite(module.state_dict()) if isinstance(module, torch.nn.Module) else None
        if name is None:
            continue
        in_file = damaged_file(folder / part) if folder is not None else None
        if in_file is not None:
            raise UserError(f"{in_file[0]} is damaged: its tensor {in_file[1]} has numbers that are not finite")
        raise UserError(
            f"the tensor {name} of {part} of {model_spec.name} has numbers that are not finite in {str(dtype).partition('.')[2]}: "
            "it is damaged, or needs another --precision"
        )


def load_pipeline(
    pipeline_class: Any,
    model_spec: ModelSpec,
    dtype: torch.dtype,
    *,
    replacements: Mapping[str, Any],
    float32_vae: bool,
) -> Any:
    """Load the pipeline from a folder or the hub's cache, with nothing trainable in it and no dropout.

    Safetensors only, and every tensor must be there: the libraries would fill a gap with random numbers.

    Args:
        pipeline_class: the class, as the folder's model_index.json names it.
        model_spec: says where the weights are.
        dtype: of the weights.
        replacements: parts, or arguments of the class, in place of the folder's own.
        float32_vae: load the autoencoder in float32, whatever the dtype.
    Raises UserError on a folder of another class, Missing when weights are not there or not complete.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    source = str(weight_store.local(model_spec.source, model_spec.revision) or model_spec.source)
    local = Path(source).is_dir() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    options: dict[str, Any] = {"revision": model_spec.revision, "local_files_only": local}
    misfit = f"the weights of {model_spec.name} ({model_spec.source}) cannot be loaded"
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # every fault is reported once, below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype has a new name that older versions do not know
            index = pipeline_class.load_config(source, **options)
            class_name = index.get("_class_name")
            if class_name != pipeline_class.__name__:
                raise UserError(
                    f"{model_spec.source} holds a {class_name}, not the {pipeline_class.__name__} "
                    f"that {model_spec.name} stands for"
                )
            parts = dict(replacements)
            for name, entry in index.items():
                if isinstance(entry, (list, tuple)) and entry[0] == "transformers" and name not in parts:
                    text_model = _load_text_model(entry[1], source, name, options, dtype)
                    parts |= {} if text_model is None else {name: text_model}
            dtypes = {"vae": torch.float32, "default": dtype} if float32_vae else dtype
            pipe = pipeline_class.from_pretrained(source, **parts, torch_dtype=dtypes, use_safetensors=True, **options)
    except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of the weights
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise Missing(f"{misfit}: {str(error).strip().splitlines()[0]}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            gaps = [key for key, tensor in module.named_parameters() if tensor.is_meta]
            if gaps:  # diffusers leaves tensors that it did not find without storage
                raise Missing(f"{misfit}: {name} lacks {len(gaps)} tensors, {gaps[0]} first")
            module.requires_grad_(False).eval()  # T5 comes with dropout on: a reloaded model would differ
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _load_text_model(
    class_name: str, source: str, name: str, options: dict[str, Any], dtype: torch.dtype
) -> Any | None:
    """Load a part of the pipeline that is a network of transformers; None where it is not one.

    Loaded separately, because transformers reports missing tensors to its direct caller only; to the pipeline it warns.

    Args:
        class_name: of transformers.
        source: the pipeline's folder or hub repository.
        name: the part's name and subfolder.
        options: of from_pretrained: revision, local_files_only.
        dtype: of the weights.
    Raises ValueError where tensors are missing.
    """
    import transformers

    model_class: Any = getattr(transformers, class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        return None
    loaded: Any = model_class.from_pretrained(
        source, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    model, report = loaded
    gaps = sorted(report["missing_keys"])
    if gaps:
        raise ValueError(f"{name} lacks {len(gaps)} tensors, {gaps[0]} first")
    return model
