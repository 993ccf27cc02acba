"""LoRA adapters: attach one to a network, save and load them in diffusers format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..files import write_atomically
from ..model_spec import Adapter
from .lora import POLICY, LoraCopies

LORA_FILE = "pytorch_lora_weights.safetensors"


def attach(network: Any, adapter: Adapter, name: str, seed: int) -> LoraCopies:
    """Attach a fresh LoRA to the network. Its second factor is zero, so the model is unchanged at first.

    name: the model's, for messages. Raises UserError on a target module that the network does not have.
    """
    from peft import LoraConfig

    targets, module_names = list(adapter.targets), [key for key, _ in network.named_modules()]
    for target in targets:
        if not any(module == target or module.endswith("." + target) for module in module_names):
            raise UserError(f"adapter.targets: the model {name} has no module {target!r}")
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraCopies(network, config)


def save_adapter(pipe: Any, network: Any, layers: dict[str, Tensor], network_name: str, folder: Path) -> None:
    """Write a LoRA with its rank and alpha as diffusers loads it; equal weights give equal bytes.

    Args:
        pipe: the diffusers pipeline.
        network: its network with the LoRA attached.
        layers: the LoRA's tensors in peft's naming.
        network_name: the network's name in the pipeline, transformer or unet.
        folder: where LORA_FILE is written.
    """
    metadata = {f"{network_name}_lora_adapter_metadata": _peft_config(network)}
    pipe.save_lora_weights(str(folder), **{f"{network_name}_lora_layers": layers}, **metadata)
    sort_metadata(folder / LORA_FILE)


def load_adapter(pipe: Any, network: Any, network_name: str, folder: Path, name: str) -> None:
    """Load a LoRA file in diffusers format into the pipeline.

    Args:
        pipe: the diffusers pipeline.
        network: its network, which gets the LoRA.
        network_name: the network's name in the pipeline, and in the file's keys: transformer or unet.
        folder: a folder that holds LORA_FILE, or a file.
        name: the model's, for messages.
    Raises UserError where there is no such file, or where one of its tensors has no place in the network.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from peft import get_peft_model_state_dict

    file = folder / LORA_FILE if folder.is_dir() else folder
    if not file.is_file():
        raise UserError(f"no adapter at {file}")
    misfit = f"adapter {file} does not fit the model {name}"
    try:
        tensors: Any = pipe.lora_state_dict(str(file.parent), weight_name=file.name)
        tensors = tensors[0] if isinstance(tensors, tuple) else tensors  # the U-Net's mixin returns its alphas as well
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{misfit}: {str(error).splitlines()[0]}") from error
    # diffusers only warns of tensors that have no place: the base model would be evaluated in the adapter's name
    peft_names = list(getattr(network, "peft_config", {}))
    loaded = get_peft_model_state_dict(network, adapter_name=peft_names[-1]) if peft_names else {}
    keys = convert_unet_state_dict_to_peft(tensors)  # the older spelling, lora.down and lora.up, is accepted too
    wanted = {key.removeprefix(f"{network_name}.") for key in keys if not key.startswith("text_encoder")}
    if not tensors or wanted != set(loaded):
        raise UserError(f"{misfit}: {len(wanted - set(loaded))} of its {len(tensors)} tensors have no place there")


def _peft_config(network: Any) -> dict[str, Any]:
    """The LoRA's settings as they are written to its file; sets are sorted, because their order changes by process."""
    config = network.peft_config[POLICY].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file: its library writes them in the order of a hash table.

    The header is JSON behind its length, 8 bytes little-endian; the tensors' offsets count from its end.
    """
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": header.pop("__metadata__"), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, lambda p: p.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :]))
