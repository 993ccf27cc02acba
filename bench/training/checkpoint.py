"""Checkpoints of a run: written whole or not at all, verified by checksum, the two latest kept, nothing pickled."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError, error_line
from ..files import digest, read_json, sync
from .rig import MeteredRig

TENSORS, FACTS = "state.safetensors", "state.json"
PAYLOAD = {
    "iteration": int,
    "meter": dict,
    "memory": dict,
    "bookkeeping": dict,
    "facts": dict,
    "iterations_without_signal": int,
    "failures": list,
    "tensors_sha256": str,
}
KEPT = 2  # checkpoints, the latest ones


def save(folder: Path, number: int, rig: MeteredRig, optimiser: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write folder/NUMBER atomically: a temporary name, fsync, rename.

    Args:
        folder: of all checkpoints.
        number: of this one; the highest is the latest.
        rig: its weights, random state, memory, meter and counters are saved.
        optimiser: its moments are saved.
        facts: JSON values of the caller's own.
    """
    tensors = _tensors(rig, optimiser)
    for unfinished in folder.glob(".*.tmp"):  # by a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary = folder / f".{number}.tmp"
    folder.mkdir(exist_ok=True)  # without parents: a run directory that was removed is not made again
    temporary.mkdir()
    try:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, temporary / TENSORS)
        payload: dict[str, Any] = {
            "iteration": rig.iteration,
            "meter": rig.meter.state(),
            "memory": _values(rig.state),
            "bookkeeping": _values(rig.bookkeeping),
            "facts": facts,
            "iterations_without_signal": rig.iterations_without_signal,
            "failures": rig.failures,
            "tensors_sha256": digest(temporary / TENSORS),
        }
        text = json.dumps(payload)
        checked = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "payload": text})
        (temporary / FACTS).write_text(checked, "utf-8")
        for name in (TENSORS, FACTS):
            sync(temporary / name)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    final = folder / f"{number:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync(folder)
    for old in numbers(folder)[:-KEPT]:
        shutil.rmtree(folder / f"{old:08d}", ignore_errors=True)


def _tensors(rig: MeteredRig, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, random state, the optimiser's moments and the tensors of the method's memory, by prefixed name."""
    tensors: dict[str, Tensor] = {f"weights/{k}": v for k, v in rig.model.weight_state().items()}
    tensors["rng"] = rig.rng.get_state()
    for i, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optim/{i}/{key}": torch.as_tensor(value).cpu() for key, value in moments.items()}
    for prefix, values in (("memory/", rig.state), ("bookkeeping/", rig.bookkeeping)):
        tensors |= {f"{prefix}{k}": v.cpu() for k, v in values.items() if isinstance(v, Tensor)}
    return tensors


def _values(memory: Mapping[str, Any]) -> dict[str, Any]:
    """What of a memory is no tensor."""
    return {key: value for key, value in memory.items() if not isinstance(value, Tensor)}


def numbers(folder: Path) -> list[int]:
    """The numbers of the checkpoints in a folder, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    # other names than those that `save` gives are somebody else's; "²" is a digit, too
    return sorted(int(p.name) for p in paths if re.fullmatch("[0-9]{8}|[1-9][0-9]{8,}", p.name))


def restore(
    folder: Path, rig: MeteredRig, optimiser: torch.optim.Optimizer, message: Callable[[str], None]
) -> dict[str, Any] | None:
    """Set rig and optimiser to the newest undamaged checkpoint; returns the caller's facts, or None without a checkpoint.

    A damaged one is passed over, with a message that says why.
    """
    for number in reversed(numbers(folder)):
        checkpoint = folder / f"{number:08d}"
        try:
            payload, tensors = _read(checkpoint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            message(f"checkpoint {checkpoint} is damaged ({error}); the one before it is used")
            continue
        try:
            _apply(payload, tensors, rig, optimiser)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            # Rig and model may be half set: an older checkpoint or none would go on from neither.
            raise UserError(
                f"checkpoint {checkpoint} cannot be restored ({error_line(error)}): --fresh starts over"
            ) from error
        return payload["facts"]
    return None


def _apply(
    payload: dict[str, Any], tensors: dict[str, Tensor], rig: MeteredRig, optimiser: torch.optim.Optimizer
) -> None:
    """Set rig and optimiser to what a checkpoint holds."""
    rig.model.restore_weights(_under("weights/", tensors))
    rig.rng.set_state(tensors["rng"])
    rig.iteration, rig.failures = payload["iteration"], payload["failures"]
    rig.iterations_without_signal = payload["iterations_without_signal"]
    rig.meter.restore(payload["meter"])
    rig.state, rig.bookkeeping = (
        {**payload[name], **{k: v.to(rig.model.device) for k, v in _under(f"{name}/", tensors).items()}}
        for name in ("memory", "bookkeeping")
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _under("optim/", tensors).items():
        i, _, name = key.partition("/")
        moments.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})


def _read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    checked = read_json(checkpoint / FACTS)
    if hashlib.sha256(checked["payload"].encode()).hexdigest() != checked["sha256"]:
        raise ValueError(f"{FACTS} does not match its checksum")
    try:
        payload: Any = json.loads(checked["payload"])
    except RecursionError:
        raise ValueError(f"{FACTS} is nested too deep") from None
    for name, kind in PAYLOAD.items():
        if type(payload[name]) is not kind:
            raise ValueError(f"{FACTS}: {name} is not of the type {kind.__name__}")
    if digest(checkpoint / TENSORS) != payload["tensors_sha256"]:
        raise ValueError(f"{TENSORS} does not match its checksum")
    return payload, load_file(checkpoint / TENSORS)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
