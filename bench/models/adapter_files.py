"""Adapter files: which file of a folder is the adapter, in which of the field's formats it is, and whether its tensors are sound.

Two formats are read: diffusers' (pytorch_lora_weights.safetensors, what `save_lora_weights` writes) and PEFT's
(adapter_model.safetensors beside adapter_config.json, what `PeftModel.save_pretrained` writes). Others are recognised by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..assets.finite import check_finite
from ..errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADER = "lora_adapter_metadata"  # key of a safetensors header under which diffusers stores the settings of a LoRA
# Ways to initialise a LoRA that change the base as well: without that other base the adapter is another model.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its file holds it."""

    path: Path
    tensors: dict[str, Tensor]
    header: Mapping[str, Any]  # diffusers' settings, `network.lora_alpha` and so on; {} where the file states none
    peft_config: PeftConfig | None = None  # of PEFT's format

    def states_alpha(self, network_name: str) -> bool:
        """Whether the file says how strong its LoRA on the network is."""
        return (
            self.peft_config is not None
            or f"{network_name}.lora_alpha" in self.header
            or any(key.endswith(".alpha") for key in self.tensors)
        )


@dataclass(frozen=True)
class PeftConfig:
    """The part of adapter_config.json that decides what the network computes."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]  # name of a module, or a pattern of names -> its own rank
    alpha_pattern: Mapping[str, float]
    use_rslora: bool  # scale alpha / sqrt(rank) in place of alpha / rank
    use_dora: bool
    lora_bias: bool
    targets: Mapping[str, Any]  # target_modules, exclude_modules, layers_to_transform, layers_pattern


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter from a folder or a file. Raises UserError where there is none, or one that cannot be read."""
    file = _find(path)
    try:
        with safe_open(file, "pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"the adapter {file} is damaged: {str(error).splitlines()[0]}") from None
    if not tensors:
        raise UserError(f"the adapter {file} holds nothing")
    check_finite(tensors, f"the adapter {file}")
    config_file = file.with_name(PEFT_CONFIG)
    config = _read_peft_config(config_file) if _is_peft(file, tensors) else None
    return AdapterFile(file, tensors, _parse_header(file, metadata), config)


def _is_peft(file: Path, tensors: Iterable[str]) -> bool:
    """Whether a file is in PEFT's format. Raises UserError where it is, without its settings."""
    if file.name != PEFT_FILE and not any(key.startswith("base_model.model.") for key in tensors):
        return False
    if not file.with_name(PEFT_CONFIG).is_file():
        raise UserError(
            f"the adapter {file} is in PEFT's format and needs {PEFT_CONFIG}, which states its alpha, beside it"
        )
    return True


def _find(path: Path) -> Path:
    """The adapter's file. Raises UserError, which says what there is instead."""
    if path.is_dir():
        for name in (LORA_FILE, PEFT_FILE):
            if (path / name).is_file():
                return path / name
        raise UserError(f"no adapter at {path}: {_what_else(path)}")
    if path.suffix in PICKLES:
        raise UserError(f"the adapter {path} is a pickle, and nothing is unpickled: {_as_safetensors(path)}")
    if not path.is_file():
        raise UserError(f"no adapter at {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"the adapter {path} is no .safetensors file")
    return path


def _what_else(folder: Path) -> str:
    """What a folder holds in place of an adapter, and the way in."""
    names = sorted(entry.name for entry in folder.iterdir())
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    inner = [name for name in names for file in (LORA_FILE, PEFT_FILE) if (folder / name / file).is_file()]
    if "model_index.json" in names:
        return f"it is a whole pipeline, to be named as --model {folder}"
    if inner:
        return f"there is one in {folder / inner[0]}"
    if "config.json" in names:
        return (
            "it is a whole network; put it into a copy of the pipeline's folder, in place of the network there, and name that "
            "folder as --model"
        )
    if pickles:
        return f"{pickles[0]} is a pickle, and nothing is unpickled: {_as_safetensors(folder / pickles[0])}"
    if tensors:
        return f"name one of its files: {', '.join(tensors[:3])}"
    return f"it holds neither {LORA_FILE} nor {PEFT_FILE}"


def _as_safetensors(path: Path) -> str:
    return (
        "write it as safetensors where you trust it: python -c 'import sys, torch, safetensors.torch as s; "
        f"s.save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])' {path} {path.with_suffix('.safetensors')}"
    )


def _parse_header(file: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        header: Any = json.loads(metadata.get(HEADER, "{}"))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"the adapter {file} is damaged: {HEADER} in its header is no JSON object")
    return header


def _read_peft_config(path: Path) -> PeftConfig:
    """Read what matters of adapter_config.json. Other keys are not looked at: those of published adapters hold anything."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the adapter's {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"the adapter's {path} is no JSON object")
    return _PeftSettings(path, content).config()


@dataclass(frozen=True)
class _PeftSettings:
    """The content of an adapter_config.json, whose values are checked as they are taken."""

    path: Path
    content: Mapping[str, Any]

    def config(self) -> PeftConfig:
        kind = self.content.get("peft_type", "LORA")
        if str(kind).upper() != "LORA":
            raise self._error(f"peft_type is {kind!r}; only LORA is read")
        initial = self.content.get("init_lora_weights", True)
        if str(initial).lower().startswith(BASE_CHANGING):
            raise self._error(
                f"init_lora_weights is {initial!r}, which changes the base as well; save it as a plain LoRA"
            )
        for key in ("layer_replication", "trainable_token_indices", "modules_to_save"):
            if self.content.get(key):
                raise self._error(f"{key} is {self.content[key]!r}; only a plain LoRA is read")
        keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        return PeftConfig(
            rank=int(self._number("r", self.content.get("r"), whole=True)),
            alpha=self._number("lora_alpha", self.content.get("lora_alpha")),
            rank_pattern={name: int(rank) for name, rank in self._pattern("rank_pattern", whole=True).items()},
            alpha_pattern=self._pattern("alpha_pattern"),
            use_rslora=self._switch("use_rslora"),
            use_dora=self._switch("use_dora"),
            lora_bias=self._switch("lora_bias"),
            targets={key: self.content[key] for key in keys if self.content.get(key) is not None},
        )

    def _error(self, text: str) -> UserError:
        return UserError(f"the adapter's {self.path}: {text}")

    def _number(self, key: str, value: Any, *, whole: bool = False) -> float:
        """A finite number, not a boolean; a whole one of at least 1."""
        if value is None:
            raise self._error(f"{key} is missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (whole and (value < 1 or value != int(value))):
            raise self._error(f"{key} is {value!r}, not a {'whole number of at least 1' if whole else 'finite number'}")
        return value

    def _pattern(self, key: str, *, whole: bool = False) -> dict[str, float]:
        pattern = self.content.get(key) or {}
        if not isinstance(pattern, dict):
            raise self._error(f"{key} is {pattern!r}, not an object")
        return {str(name): self._number(f"{key}.{name}", value, whole=whole) for name, value in pattern.items()}

    def _switch(self, key: str) -> bool:
        value = self.content.get(key, False)
        if not isinstance(value, bool):
            raise self._error(f"{key} is {value!r}, not true or false")
        return value


# Formats


@dataclass(frozen=True)
class ForeignFormat:
    """A format that is not read as it stands: its name, and the way in."""

    name: str
    way_in: str


def foreign_format(keys: Iterable[str]) -> ForeignFormat | None:
    """Recognise the format of a file by the names of its tensors; None for diffusers' own."""
    names = list(keys)
    if any(part in name for name in names for part in ("hada_w", "lokr_w", "oft_blocks", "oft_diag", ".on_input")):
        return ForeignFormat("LyCORIS's format", "merge it into the weights of its base, and name those as --model")
    if any(name.startswith(("lora_unet_", "lora_te", "lora_transformer_")) for name in names):
        return ForeignFormat(
            "kohya's format (sd-scripts)",
            "diffusers reads it for SD1.5, SDXL and FLUX only; rename its layers as diffusers names them, or merge it into the "
            "weights with sd-scripts and name those as --model",
        )
    if any(name.startswith("diffusion_model.") for name in names):
        return ForeignFormat(
            "ComfyUI's format",
            "rename its layers as diffusers names them (diffusers converts FLUX's when it loads them)",
        )
    if any(".processor." in name and "lora" in name for name in names):
        return ForeignFormat(
            "the format of attention processors (XLabs, diffusers before 0.17)", "save it anew with diffusers"
        )
    if not any("lora" in name.lower() for name in names):
        return ForeignFormat("no LoRA", "a whole network is named as --model, in its pipeline's folder")
    return None


# Places in a network


def check_layers(layers: Mapping[str, Tensor], network: torch.nn.Module, names: Mapping[str, str], misfit: str) -> None:
    """Check that every tensor of a LoRA has a place in the network, its partner, and the right shape.

    Args:
        layers: PEFT's naming inside the network, `module.lora_A.weight` -> tensor.
        network: which gets the LoRA.
        names: key of `layers` -> the tensor's name in its file, for messages.
        misfit: what messages begin with.
    Raises UserError that names the first tensor which does not fit.
    """
    modules = dict(network.named_modules())
    for key, tensor in layers.items():
        module_name, _, factor = key.rpartition(".lora_")
        name, expected = names.get(key, key), {"A.weight": "B.weight", "B.weight": "A.weight", "B.bias": "B.weight"}
        if not module_name or not (factor in expected or factor.startswith("magnitude_vector")):
            raise UserError(f"{misfit}: its tensor {name} is no part of a LoRA")
        module = modules.get(module_name)
        if module is None:
            raise UserError(f"{misfit}: its tensor {name} has no place there, no module is called {module_name}")
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 4):
            raise UserError(f"{misfit}: its tensor {name} has no place there, {module_name} takes no LoRA")
        partner = f"{module_name}.lora_{expected.get(factor, 'A.weight')}"
        if partner not in layers:
            missing = name.removesuffix(factor) + expected.get(factor, "A.weight") if name.endswith(factor) else partner
            raise UserError(f"{misfit}: its tensor {name} is there without {missing}")
        rank = layers[f"{module_name}.lora_A.weight"].shape[0]
        shape = _shape(factor, rank, weight)
        if shape is not None and tuple(tensor.shape) != shape:
            raise UserError(f"{misfit}: its tensor {name} has the shape {tuple(tensor.shape)}, needed is {shape}")


def _shape(factor: str, rank: int, weight: Tensor) -> tuple[int, ...] | None:
    """The shape of one factor of a LoRA of this rank on a weight (out, in) or (out, in, kh, kw); None: not checked."""
    out, *rest = weight.shape
    if factor == "A.weight":
        return (rank, *rest)
    if factor == "B.weight":
        return (out, rank, 1, 1) if weight.dim() == 4 else (out, rank)
    return (out,) if factor == "B.bias" else None
