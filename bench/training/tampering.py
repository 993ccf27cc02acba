"""Finds what changed in a run that nothing may change: weights between updates, the package's code, prompts, objects of the rig."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ..spec import Prompt

ROOT = __name__.partition(".")[0]


class WeightGuard:
    """Watches that parameters change in the steps of one optimiser only."""

    def __init__(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer):
        self._parameters = list(parameters)
        self._sums = self._bit_sums()
        self._changes = 0
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._compare()),
            optimizer.register_step_post_hook(lambda *_: self._remember()),
        ]

    def _bit_sums(self) -> Tensor:
        """One integer for each parameter: the sum of its values' bit patterns, exact in whatever order it is made."""
        bits = [p.detach().view(torch.int32) for p in self._parameters if p.dtype == torch.float32]
        return torch.stack([b.sum() for b in bits]) if bits else torch.zeros(0)

    def _compare(self) -> None:
        self._changes += not torch.equal(self._sums, self._bit_sums())

    def _remember(self) -> None:
        self._sums = self._bit_sums()

    def evidence(self) -> list[str]:
        """One line where the parameters changed between two steps, or since the last one."""
        changes = self._changes + (not torch.equal(self._sums, self._bit_sums()))
        return [f"the trained weights changed {changes} times outside of the optimiser's steps"] if changes else []

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class Seal:
    """Remembers code, prompts and objects at the start of a run, and says which of them are others at its end."""

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]], kinds: Iterable[type] = ()):
        """Remember the functions of the package and of these classes, and the prompts of each split."""
        self._kinds = list(kinds)
        self._prompts = {split: (list(of_split), facts_hash(of_split)) for split, of_split in prompts.items()}
        self._code = code_state(self._kinds)
        self._objects: list[tuple[Any, dict[str, Any]]] = []

    def add(self, owner: Any, *names: str) -> None:
        """Remember the objects under these names of an owner: at the end they must be the same ones."""
        self._objects.append((owner, {name: getattr(owner, name) for name in names}))

    def evidence(self) -> list[str]:
        """One line for each kind of change."""
        code = code_state(self._kinds)
        changed = [name for name, parts in self._code.items() if not _same(parts, code.get(name))]
        lines = [f"code was replaced while the run was under way: {', '.join(changed[:4])}"] if changed else []
        for split, (prompts, before) in self._prompts.items():
            if facts_hash(prompts) != before:
                lines.append(f"the {split} prompts are others than at the start")
        for owner, members in self._objects:
            kind = type(owner)
            lines += [
                f"{kind.__name__}.{name} is another object"
                for name, it in members.items()
                if getattr(owner, name) is not it
            ]
            hidden = [
                name for name in getattr(owner, "__dict__", {}) if isinstance(_of_class(kind, name), FunctionType)
            ]
            lines += [f"{kind.__name__}.{name} was replaced" for name in hidden]
        return lines


def _of_class(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def facts_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of texts, facts and strata in order: what a model is shown and what a scorer judges by."""
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(repr((prompt.text, sorted(prompt.meta.items()), prompt.stratum)).encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def code_state(kinds: Iterable[type] = ()) -> dict[str, tuple[Any, ...]]:
    """By qualified name: the functions of the package's loaded modules and of these classes, with their code and defaults."""
    parts: dict[str, tuple[Any, ...]] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == ROOT or name.startswith(ROOT + ".")):
            for key, value in list(vars(module).items()):
                if getattr(value, "__module__", None) == name:
                    _add_parts(parts, f"{name.removeprefix(ROOT + '.')}.{key}", value)
    for kind in kinds:
        _add_parts(parts, f"{kind.__module__}.{kind.__qualname__}", kind)
    return parts


def _add_parts(parts: dict[str, tuple[Any, ...]], name: str, value: Any) -> None:
    if isinstance(value, FunctionType):
        parts[name] = (value, value.__code__, value.__defaults__)
    elif isinstance(value, type):
        parts[name] = (value,)
        for key, member in list(vars(value).items()):
            for function in (member, getattr(member, "__func__", None), getattr(member, "fget", None)):
                if isinstance(function, FunctionType):
                    parts[f"{name}.{key}"] = (function, function.__code__, function.__defaults__)


def _same(before: tuple[Any, ...], after: tuple[Any, ...] | None) -> bool:
    return after is not None and all(a is b for a, b in zip(before, after, strict=True))
