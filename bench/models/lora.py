"""Named weight copies of a LoRA: policy, ref (adapter off), old, ema; switched in place, the base is never duplicated.

While images are sampled a copy may be merged into the weights that it adapts, W + scale B A: a third fewer operations, the same
function up to rounding. Only the adapted weights exist twice meanwhile; the originals are put back as the objects that they were.
"""

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
        self._originals: list[torch.nn.Parameter] = []  # of the adapted layers, while a copy is merged into them
        self._merged_as: torch.dtype | None = None  # the precision of the merged weights

    def _collect_layers(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers: list[Any] = [m for m in self.module.modules() if isinstance(m, BaseTunerLayer)]
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

    @property
    def merged(self) -> bool:
        """Whether the current copy is merged into the weights."""
        return bool(self._originals)

    def switch(self, name: str, merged: bool = False, dtype: torch.dtype | None = None) -> None:
        """Let the module compute with this copy from now on, merged into the weights or beside them.

        Args:
            name: of the copy.
            merged: for passes without a gradient; `ref` is the base itself, so in its own precision there is nothing to merge.
            dtype: to which the merged weights are cast; None is that of the weights.

        peft's own set_adapter and enable_adapters also flip requires_grad on every parameter, which costs time at each
        call and would cut the graph of a forward that is still waiting for its backward; only the two flags that the
        forward reads are set here.
        """
        dtype = dtype if merged else None
        merged = merged and (name != "ref" or dtype is not None)
        if (name, merged, dtype) == (self._current, self.merged, self._merged_as):
            return
        if name not in ("policy", "ref", *self.copies):
            raise KeyError(f"no weights named {name!r}: make them with update_copy first")
        self._unmerge()
        adapter = POLICY if name in ("policy", "ref") else name
        for layer in self._layers:
            layer._disable_adapters = merged or name == "ref"
            layer._active_adapter = [adapter]
        self._current = name
        if merged:
            self._merge("" if name == "ref" else adapter, dtype)

    @torch.no_grad()
    def _merge(self, adapter: str, dtype: torch.dtype | None) -> None:
        """Put W + scale B A in the place of each adapted weight W. W itself stays what a graph or a checkpoint refers to.

        Args:
            adapter: "" leaves scale B A out.
            dtype: to which the sum is cast; None does not cast.
        """
        bases: list[Any] = [layer.get_base_layer() for layer in self._layers]
        self._originals, self._merged_as = [base.weight for base in bases], dtype
        for layer, base in zip(self._layers, bases, strict=True):
            weight = base.weight
            if adapter:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            weight = weight if dtype is None else weight.to(dtype)
            base._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)

    def _unmerge(self) -> None:
        """Put the adapted weights back."""
        for layer, original in zip(self._layers, self._originals, strict=bool(self._originals)):
            base: Any = layer.get_base_layer()
            base._parameters["weight"] = original
        self._originals, self._merged_as = [], None

    @torch.no_grad()
    def update_copy(self, name: str, decay: float) -> None:
        """copy <- decay * copy + (1 - decay) * policy; the first call makes the copy equal to the policy."""
        self._end_merge()
        if name not in self.copies:
            self._add(name)
            decay = 0.0
        for copy, policy in zip(self._parameters_of(name), self.parameters(), strict=True):
            copy.lerp_(policy, 1 - decay) if decay else copy.copy_(policy)

    def _end_merge(self) -> None:
        """End a merge: what was merged is about to change."""
        self.switch(self._current)

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
        self._end_merge()
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
