"""Named weight copies of a LoRA: policy, ref (adapter off), old, ema; switched in place, the base is never duplicated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

POLICY = "default"  # peft's name for the adapter that is trained; diffusers' save and load expect it


class LoraCopies:
    """The LoRA adapters of one network. `ref` is the network with all adapters off: it costs no memory."""

    def __init__(self, module: Any, config: Any):
        """Attach a fresh adapter. module: a diffusers model with peft support; config: a peft LoraConfig."""
        self.module, self.config = module, config
        self.copies: list[str] = []
        module.requires_grad_(False)
        if not getattr(module, "peft_config", None):
            module.add_adapter(config, adapter_name=POLICY)
        self._collect_layers()
        self._current = "policy"

    def _collect_layers(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [m for m in self.module.modules() if isinstance(m, BaseTunerLayer)]
        self._policy = {n: p for n, p in self.module.named_parameters() if f".{POLICY}." in n}
        for parameter in self._policy.values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # the trained part is float32 whatever the base is

    @property
    def current(self) -> str:
        """The name of the weights that the module computes with."""
        return self._current

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, in a fixed order."""
        return list(self._policy.values())

    def switch(self, name: str) -> None:
        """Let the module compute with this copy from now on.

        peft's own set_adapter and enable_adapters also flip requires_grad on every parameter, which costs time at each
        call and would cut the graph of a forward that is still waiting for its backward; only the two flags that the
        forward reads are set here.
        """
        if name == self._current:
            return
        if name not in ("policy", "ref", *self.copies):
            raise KeyError(f"no weights named {name!r}: make them with update_copy first")
        for layer in self._layers:
            layer._disable_adapters = name == "ref"  # pyright: ignore[reportPrivateUsage]
            layer._active_adapter = [POLICY if name in ("policy", "ref") else name]  # pyright: ignore[reportPrivateUsage]
        self._current = name

    @torch.no_grad()
    def update_copy(self, name: str, decay: float) -> None:
        """copy <- decay * copy + (1 - decay) * policy; the first call makes the copy equal to the policy."""
        if name not in self.copies:
            self._add(name)
            decay = 0.0
        for copy, policy in zip(self._parameters_of(name), self.parameters(), strict=True):
            copy.lerp_(policy, 1 - decay) if decay else copy.copy_(policy)

    def _add(self, name: str) -> None:
        current, self._current = self._current, ""
        # The copy's own random start is overwritten: it should leave no trace in the random state.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft doubts that a second adapter is meant
            self.module.add_adapter(self.config, adapter_name=name)
        self.copies.append(name)
        for parameter in self._parameters_of(name):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()
        self._collect_layers()
        self.switch(current)

    def _parameters_of(self, name: str) -> list[Tensor]:
        named = dict(self.module.named_parameters())
        return [named[key.replace(f".{POLICY}.", f".{name}.")] for key in self._policy]

    def state(self) -> dict[str, Tensor]:
        """Every copy's tensors, `copy/parameter` -> tensor, on the CPU."""
        by_copy = {"policy": self.parameters(), **{copy: self._parameters_of(copy) for copy in self.copies}}
        return {
            f"{copy}/{key}": tensor.detach().cpu().clone()
            for copy, tensors in by_copy.items()
            for key, tensor in zip(self._policy, tensors, strict=True)
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set all copies to a `state`; copies that are missing are made."""
        for copy in dict.fromkeys(key.partition("/")[0] for key in state):
            if copy != "policy" and copy not in self.copies:
                self._add(copy)
            tensors = self.parameters() if copy == "policy" else self._parameters_of(copy)
            for key, tensor in zip(self._policy, tensors, strict=True):
                tensor.copy_(state[f"{copy}/{key}"])

    def adapter(self, name: str = "policy") -> dict[str, Tensor]:
        """One copy in peft's own naming: what diffusers saves and loads."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.module, adapter_name=POLICY if name == "policy" else name)
