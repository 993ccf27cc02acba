"""LoRA adapters: attach one to a network, save them in diffusers' format, load them in diffusers' or PEFT's."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_atomically
from ..model_spec import Adapter
from .adapter_files import LORA_FILE, PEFT_CONFIG, AdapterFile, PeftConfig, check_layers, foreign_format, read_adapter
from .lora import POLICY, LoraCopies


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


def load_adapter(pipe: Any, network: Any, network_name: str, path: Path, name: str) -> list[str]:
    """Load a LoRA in diffusers' or PEFT's format into the pipeline.

    Args:
        pipe: the diffusers pipeline.
        network: its network, which gets the LoRA.
        network_name: the network's name in the pipeline, and in the file's keys: transformer or unet.
        path: a folder that holds LORA_FILE or a PEFT adapter, or a file.
        name: the model's, for messages.

    Returns:
        Notes on how it was read, such as an alpha that the file does not state.

    Raises:
        UserError: where there is no such file, or where one of its tensors is damaged or has no place in the model.
    """
    from peft import get_peft_model_state_dict

    adapter = read_adapter(path)
    misfit = f"the adapter {adapter.path} does not fit the model {name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # all that peft doubts of is checked here
            if adapter.peft_config is not None:
                wanted = _load_peft(network, network_name, adapter, adapter.peft_config, misfit)
            else:
                wanted = _load_diffusers(pipe, network, network_name, adapter, misfit)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries raise whatever comes, from KeyError to re.error
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{misfit}: {type(error).__name__}{reason and ': ' + reason}") from error
    peft_names = list(getattr(network, "peft_config", {}))
    loaded = get_peft_model_state_dict(network, adapter_name=peft_names[-1]) if peft_names and wanted else {}
    if lost := sorted(wanted.symmetric_difference(loaded)):  # diffusers only warns of tensors that it does not load
        raise UserError(f"{misfit}: its tensor {lost[0]} was not loaded, with {len(lost) - 1} others")
    if adapter.states_alpha(network_name):
        return []
    return [
        f"the adapter {adapter.path} does not state its alpha: it is read with alpha equal to the rank, as diffusers does"
    ]


def merge_for_good(network: Any) -> None:
    """Merge the loaded LoRA into the weights that it adapts: nothing will train it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.merge()


def _load_diffusers(pipe: Any, network: Any, network_name: str, adapter: AdapterFile, misfit: str) -> set[str]:
    """Load a file in diffusers' format, or in one that diffusers converts for this pipeline; returns the network's tensors."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    folder, file = str(adapter.path.parent), adapter.path.name
    foreign = foreign_format(adapter.tensors)
    refusal = UserError(f"{misfit}: it is {foreign.name}; {foreign.way_in}") if foreign else None
    # SDXL's layers are counted differently in kohya's files, and its loader gives the network's config to undo that.
    options = {"unet_config": network.config} if network_name == "unet" and hasattr(pipe, "text_encoder_2") else {}
    try:
        converted: Any = pipe.lora_state_dict(folder, weight_name=file, **options)
    except Exception as error:
        raise refusal or error from error
    tensors: dict[str, Tensor] = converted[0] if isinstance(converted, tuple) else converted
    components: Sequence[str] = pipe._lora_loadable_modules
    for key in tensors:
        if key.partition(".")[0] not in components:
            raise refusal or UserError(
                f"{misfit}: its tensor {key} has no place there, this pipeline takes a LoRA in {', '.join(components)} alone"
            )
    if foreign is None and (
        lost := [key for key in adapter.tensors if key not in tensors and not key.endswith(".alpha")]
    ):
        raise UserError(f"{misfit}: its tensor {lost[0]} is one that diffusers does not load")
    by_component = {
        component: {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] == component}
        for component in components
    }
    wanted: set[str] = set()
    for component, parts in by_component.items():
        inner = {key.removeprefix(f"{component}."): tensor for key, tensor in parts.items()}
        if component == network_name:
            layers: dict[str, Tensor] = convert_unet_state_dict_to_peft(inner) if inner else {}
            wanted = set(layers)
        else:
            layers = _text_encoder_layers(inner, getattr(pipe, component))
        check_layers(layers, getattr(pipe, component), {key: f"{component}.{key}" for key in layers}, misfit)
    pipe.load_lora_weights(folder, weight_name=file)
    return wanted


def _text_encoder_layers(tensors: dict[str, Tensor], encoder: Any) -> dict[str, Tensor]:
    """The tensors of a text encoder in peft's naming inside it, converted as diffusers' loader does."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    if not tensors:
        return {}
    layers: dict[str, Tensor] = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
    if hasattr(encoder, "text_model"):
        return layers
    return {key.removeprefix("text_model."): tensor for key, tensor in layers.items()}


# What stands around the network's own names where a PEFT adapter was saved: the PEFT model, and how it was run.
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")


def _load_peft(network: Any, network_name: str, adapter: AdapterFile, config: PeftConfig, misfit: str) -> set[str]:
    """Load a PEFT adapter with the settings of its own adapter_config.json; returns its tensors in peft's naming."""
    names = {_bare_key(key, network_name): key for key in adapter.tensors}
    layers = {key: adapter.tensors[name] for key, name in names.items()}
    check_layers(layers, network, names, misfit)
    modules = {key.rpartition(".lora_")[0] for key in layers}
    _check_targets(network, modules, config, misfit)
    _check_ranks(layers, names, config, misfit)
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "target_modules": sorted(modules),
    }
    network.load_lora_adapter(layers, prefix=None, metadata=settings)
    return set(layers)


def _bare_key(key: str, network_name: str) -> str:
    """A tensor's name inside the network, `module.lora_A.weight`."""
    while prefix := next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None):
        key = key.removeprefix(prefix)
    for wrapper in WRAPPERS[1:]:
        key = key.replace(f".{wrapper}", ".")
    key = key.removeprefix(f"{network_name}.")
    return re.sub(r"\.(lora_[AB]|lora_magnitude_vector)\.default\b", r".\1", key)


def _check_targets(network: Any, modules: set[str], config: PeftConfig, misfit: str) -> None:
    """Raise UserError where a module that the settings name has no tensors: the file is incomplete."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = config.targets.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    wanted = LoraConfig(r=config.rank, **config.targets)
    for name, module in network.named_modules():
        takes_lora = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        if takes_lora and name not in modules and check_target_module_exists(wanted, name):
            raise UserError(f"{misfit}: it lacks the tensor {name}.lora_A.weight, which its target_modules name")


def _check_ranks(layers: Mapping[str, Tensor], names: Mapping[str, str], config: PeftConfig, misfit: str) -> None:
    """Raise UserError where a tensor's rank is not the one that the settings give its module: its alpha would be wrong."""
    from peft.utils.other import get_pattern_key

    for key, tensor in layers.items():
        module, _, factor = key.rpartition(".lora_")
        if factor == "A.weight":
            rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.rank)
            if tensor.shape[0] != rank:
                raise UserError(
                    f"{misfit}: its tensor {names[key]} has the rank {tensor.shape[0]}, {PEFT_CONFIG} says {rank}"
                )


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
