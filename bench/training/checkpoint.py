"""A run's state on disk: written whole or not at all, checked by sum, the two latest kept, nothing pickled."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import digest, sync
from .rig import Rig

TENSORS, FACTS = "state.safetensors", "state.json"


def save(folder: Path, number: int, rig: Rig, optimiser: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write folder/NUMBER atomically: a temporary name, fsync, rename. facts: JSON values of the caller's own."""
    tensors: dict[str, Tensor] = {f"weights/{k}": v for k, v in rig.model.weight_state().items()}
    tensors["rng"] = rig.rng.get_state()
    for i, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optim/{i}/{key}": torch.as_tensor(value).cpu() for key, value in moments.items()}
    memory: dict[str, Any] = {}
    for key, value in rig.state.items():
        if isinstance(value, Tensor):
            tensors[f"memory/{key}"] = value.cpu()
        else:
            memory[key] = value
    for left in folder.glob(".*.tmp"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder / f".{number}.tmp"
    temporary.mkdir(parents=True)
    try:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, temporary / TENSORS)
        payload: dict[str, Any] = {
            "iteration": rig.iteration,
            "meter": rig.meter.state(),
            "memory": memory,
            "facts": facts,
        }
        payload |= {"barren": rig.barren, "failures": rig.failures}
        payload["tensors_sha256"] = digest(temporary / TENSORS)
        text = json.dumps(payload)
        whole = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "payload": text})
        (temporary / FACTS).write_text(whole, "utf-8")
        for name in (TENSORS, FACTS):
            sync(temporary / name)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    final = folder / f"{number:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(folder)
    for old in numbers(folder)[:-2]:
        shutil.rmtree(folder / f"{old:08d}", ignore_errors=True)


def numbers(folder: Path) -> list[int]:
    """The checkpoints there are, oldest first."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def restore(
    folder: Path, rig: Rig, optimiser: torch.optim.Optimizer, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Bring rig and optimiser to the newest sound checkpoint; returns the caller's facts, or None where there is none.

    A damaged one is passed over and `say` is told why.
    """
    for number in reversed(numbers(folder)):
        place = folder / f"{number:08d}"
        try:
            payload, tensors = _read(place)
        except (OSError, ValueError, KeyError) as error:
            say(f"checkpoint {place} is damaged ({error}); the one before it is used")
            continue
        rig.model.restore_weights(_under("weights/", tensors))
        rig.rng.set_state(tensors["rng"])
        rig.iteration, rig.barren, rig.failures = payload["iteration"], payload["barren"], payload["failures"]
        rig.meter.restore(payload["meter"])
        rig.state = {**payload["memory"], **{k: v.to(rig.model.device) for k, v in _under("memory/", tensors).items()}}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optim/", tensors).items():
            i, _, name = key.partition("/")
            state.setdefault(int(i), {})[name] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return payload["facts"]
    return None


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    whole = json.loads((place / FACTS).read_text("utf-8"))
    if hashlib.sha256(whole["payload"].encode()).hexdigest() != whole["sha256"]:
        raise ValueError(f"{FACTS} does not match its checksum")
    payload = json.loads(whole["payload"])
    if digest(place / TENSORS) != payload["tensors_sha256"]:
        raise ValueError(f"{TENSORS} does not match its checksum")
    return payload, load_file(place / TENSORS)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
