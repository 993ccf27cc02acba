"""Checks of a model: its files by their headers, its licence and the memory a run takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..assets import weight_store
from ..errors import Missing, UserError
from ..model_spec import ModelSpec
from .check_result import BINDING_LICENCE_WORDS, Check, CheckVerdict, first_line, format_gb
from .disk import format_size
from .machine_checks import main_memory
from .pipeline import PLAIN_WEIGHTS, UNUSED_PARTS

_WIDTHS = {64: "F64 I64 U64", 32: "F32 I32 U32", 16: "F16 BF16 I16 U16", 8: "I8 U8 BOOL F8_E4M3 F8_E5M2"}
# Bits of an element by the type's name in safetensors.
DTYPE_BITS = {name: bits for bits, names in _WIDTHS.items() for name in names.split()}


def check_weights(model_spec: ModelSpec, offline: bool) -> Iterator[Check]:
    """Check by file headers that a model's files are here and complete, and tell its licence."""
    local = weight_store.local(model_spec.source, model_spec.revision)
    index = weight_store.cached(model_spec.source, "model_index.json", model_spec.revision) if local is None else None
    folder = index.parent if index else local  # files that another program left in the hub's cache count too
    faults = folder_faults(folder) if folder else [f"{model_spec.source} is not here"]
    if folder and not faults:
        faults = _missing_numbers(model_spec, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder else 0
    detail = "; ".join(faults[:3]) or f"{format_size(size)} of weights in {folder}, headers and indexes agree"
    # Online, a run fetches missing files itself.
    verdict: CheckVerdict = "ok" if not faults else "missing" if local is None and not offline else "broken"
    remedy = f"restore {folder}" if Path(model_spec.source).is_dir() else f"gpobench fetch --model {model_spec.name}"
    yield Check(f"model {model_spec.name}", verdict, detail, remedy if faults else "")
    binding = any(word in model_spec.licence.lower() for word in BINDING_LICENCE_WORDS)
    yield Check(
        f"licence of {model_spec.name}", "warning" if binding else "ok", model_spec.licence,
        f"read it before use: https://huggingface.co/{model_spec.source}" if binding else "",
    )  # fmt: skip


def folder_faults(folder: Path) -> list[str]:
    """Return what is wrong with a folder in diffusers format: files missing, truncated or not as an index says. Loads nothing."""
    try:
        index = dict(json.loads((folder / "model_index.json").read_text("utf-8")))
    except (OSError, ValueError) as error:
        return [f"{folder / 'model_index.json'} cannot be read: {first_line(error)}"]
    faults: list[str] = []
    for name, entry in index.items():
        if not isinstance(entry, list) or not all(entry) or name in UNUSED_PARTS:
            continue
        part = folder / name
        if not part.is_dir():
            faults.append(f"{part} is missing")
            continue
        for path in sorted(part.glob("*.json")):
            try:
                json.loads(path.read_text("utf-8"))
            except (OSError, ValueError) as error:
                faults.append(f"{path} cannot be read: {first_line(error)}")
        if name.startswith(("text_encoder", "transformer", "unet", "vae")):
            faults += _tensor_faults(part)
    return faults


def _tensor_faults(part: Path) -> list[str]:
    """Return what is wrong with the weights in one part's folder, against its indexes."""
    faults: list[str] = []
    files = [path for path in sorted(part.glob("*.safetensors")) if PLAIN_WEIGHTS.fullmatch(path.name)]
    keys_by_shard: dict[str, set[str]] = {}
    for path in sorted(part.glob("*.safetensors.index.json")):
        if PLAIN_WEIGHTS.fullmatch(path.name):
            try:
                for key, shard in dict(json.loads(path.read_text("utf-8"))["weight_map"]).items():
                    keys_by_shard.setdefault(str(shard), set()).add(str(key))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                faults.append(f"{path} is no index: {first_line(error)}")
    absent = [shard for shard in sorted(keys_by_shard) if not (part / shard).is_file()]
    faults += [f"{part / shard} is missing, the index names it" for shard in absent]
    if not files and not faults:
        faults.append(f"{part} holds no weights (*.safetensors)")
    for path in files:
        try:
            keys = set(read_safetensors_header(path))
        except UserError as error:
            faults.append(str(error))
            continue
        lacking = sorted(keys_by_shard.get(path.name, set()) - keys)
        if lacking:
            faults.append(f"{path} lacks {len(lacking)} tensors that the index places there, {lacking[0]} first")
    return faults


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Return tensor name -> dtype, shape and data_offsets of a safetensors file, from its header alone.

    The header is JSON behind its length, 8 bytes little-endian; offsets count from its end. Raises UserError where the file is
    truncated or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100 * 2**20):
                raise UserError(f"{path} is cut off or no safetensors file: {size:,} bytes")
            header = dict(json.loads(file.read(length)))
        header.pop("__metadata__", None)
        end = 0
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            bits = DTYPE_BITS.get(tensor["dtype"], 0) * math.prod(tensor["shape"])
            if tensor["dtype"] in DTYPE_BITS and bits != 8 * (stop - start):
                raise UserError(f"{path} is damaged: {name} of shape {tensor['shape']} has {stop - start:,} bytes")
            end = max(end, stop)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its head cannot be read ({first_line(error)})") from None
    if size != 8 + length + end:
        what = "cut off" if size < 8 + length + end else "too long"
        raise UserError(f"{path} is {what}: {size:,} bytes, its head promises {8 + length + end:,}")
    return header


def _missing_numbers(model_spec: ModelSpec, folder: Path) -> list[str]:
    """Return a fault for each network whose files hold fewer numbers than its config has parameters."""
    from ..models.memory import estimate

    try:
        parameters = estimate(replace(model_spec, source=str(folder))).parameters
    except Missing:
        return []
    faults: list[str] = []
    for name, expected in parameters.items():
        files = [path for path in (folder / name).glob("*.safetensors") if PLAIN_WEIGHTS.fullmatch(path.name)]
        try:
            headers = [read_safetensors_header(path) for path in files]
        except UserError:  # `folder_faults` reports it
            continue
        numbers = sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())
        if files and numbers < expected:
            faults.append(f"{folder / name} holds {numbers:,} numbers, its config asks for {expected:,}")
    return faults


def check_memory(model_spec: ModelSpec) -> Iterator[Check]:
    """Compare the estimated memory of a run with the device's; the estimate is made for GPUs and used for CPUs as it is."""
    import torch

    from ..models.memory import GB, MARGIN, estimate

    folder = weight_store.local(model_spec.source, model_spec.revision)
    try:
        needed = estimate(replace(model_spec, source=str(folder or model_spec.source)))
    except Missing as error:
        yield Check("memory", "missing", str(error), f"gpobench fetch --model {model_spec.name}")
        return
    gpu = torch.cuda.is_available()
    total = float(torch.cuda.get_device_properties(0).total_memory) if gpu else main_memory()
    peak = needed.peak + (0 if gpu else needed.encoders)
    fits = not total or peak + (MARGIN if gpu else 0) <= total
    where = "the GPU" if gpu else "main memory"
    detail = f"about {peak / GB:.1f} GB with one row a backward pass; {where} has {format_gb(total)}"
    remedy = "" if fits else "a GPU with more memory, or less of it: precision bf16, fewer rows, a smaller image"
    yield Check("memory", "ok" if fits else "broken" if gpu else "warning", detail, remedy)
