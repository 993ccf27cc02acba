"""Advice after an out-of-memory error: which setting to change and the memory the run would then need, in one line.

Cheap changes come first. Fewer images at once, smaller backward passes, gradient checkpointing and offloaded text encoders change
results only by rounding; another precision changes more and is not offered.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..errors import Missing, UserError
from ..model_spec import ModelSpec
from ..models.memory import GB, MARGIN, MemoryEstimate
from ..spec import Search, SupportsLatentCount
from .config import Config
from .cost_estimate import estimate_memory, guidance_branches, latents_per_backward

SAMPLING = {"sample", "decode", "evaluate", "sample_protocol"}  # functions on the stack while no gradient is kept


@contextmanager
def advise_on_oom(config: Config) -> Generator[None]:
    """Within the context: turn an out-of-memory error into a UserError of one line that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(_message(config, error)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator: can't allocate memory" not in str(error):  # torch has no class for it
            raise
        raise UserError(_message(config, error)) from error


def _message(config: Config, error: BaseException) -> str:
    """Return where memory ran out, during what, and the advice."""
    stack = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    sampling = bool(stack & SAMPLING)
    available, device = _available_memory()
    phase = "while images were sampled" if sampling else "in training"
    phase = "while the model was loaded" if "open_model" in stack else phase
    return f"out of memory on {device} {phase}: {advice(config, available, sampling=sampling)} What was saved stays."


def _available_memory() -> tuple[float, str]:
    """Return the GB (2^30 bytes) that this process can use, and the name of the device."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        available = (free + torch.cuda.memory_reserved()) / GB
        others = total / GB - available
        used_by_others = f", {others:.1f} GB of it taken by others" if others > MARGIN / GB else ""
        return available, f"{torch.cuda.get_device_name()} ({total / GB:.1f} GB{used_by_others})"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    return total, f"this machine ({total:.1f} GB)"


def advice(config: Config, gigabytes: float, *, sampling: bool) -> str:
    """Return the run's estimated memory and the cheapest change of settings that fits into so many GB, in one or two sentences.

    sampling: memory ran out while images were sampled; where the estimate says that all fits, sampling is made smaller.
    """
    model_spec, sampling = config.model_spec(), sampling or isinstance(config.settings, Search)
    try:
        now = estimate_memory(config, model_spec)
    except Missing as missing:
        setting = f"rows={max(1, model_spec.rows // 2)}" if sampling else f"optim.micro={max(1, _rows(config) // 2)}"
        return f"try --set {setting} ({missing})."
    expected = f"it was to take {now.training / GB:.1f} GB in training and {now.sampling / GB:.1f} GB in sampling."
    least = now
    for settings, least in _smaller_settings(config, model_spec, now, gigabytes, sampling):
        if settings and least.fits(gigabytes):
            options = " ".join(f"--set {setting}" for setting in settings)
            return f"{expected} {options} brings that to {least.peak / GB:.1f} GB."
    needed = (least.peak + MARGIN) / GB
    return (
        f"{expected} With the smallest settings it takes {needed:.1f} GB: a larger device or a smaller model is needed."
    )


def _smaller_settings(
    config: Config, model_spec: ModelSpec, now: MemoryEstimate, gigabytes: float, sampling: bool
) -> Generator[tuple[list[str], MemoryEstimate]]:
    """Yield settings that need less and less memory, each with its estimate."""
    latents_a_row = latents_per_backward(config) // max(1, _rows(config))
    settings: dict[str, str] = {}
    rows, micro = model_spec.rows, _rows(config)
    available = gigabytes * GB - MARGIN
    # The estimate may be wrong by a tenth: what should have fitted and did not is halved once.
    sampling_too_large = now.sampling > available or (sampling and now.fits(gigabytes))
    training_too_large = now.training > available or (not sampling and now.fits(gigabytes))

    def current() -> tuple[list[str], MemoryEstimate]:
        memory = estimate_memory(config, replace(model_spec, rows=rows), micro * latents_a_row)
        return [f"{key}={value}" for key, value in settings.items()], memory

    while sampling_too_large and rows > 1:
        rows = rows // 2
        settings["rows"] = str(rows)
        sampling_too_large = current()[1].sampling > available
    if training_too_large and not model_spec.checkpointing:
        model_spec = replace(model_spec, checkpointing=True)
        settings["checkpointing"] = "true"
        training_too_large = current()[1].training > available
    while training_too_large and micro > 1:
        micro = micro // 2
        settings["optim.micro"] = str(micro)
        training_too_large = current()[1].training > available
    yield current()
    if not model_spec.offload:
        model_spec = replace(model_spec, offload=True)
        settings["offload"] = "true"
        yield current()


def _rows(config: Config) -> int:
    """Return the rows of the method's batch in one backward pass."""
    method: Any = config.settings
    latents_a_row = method.latents if isinstance(method, SupportsLatentCount) else 1
    return max(1, latents_per_backward(config) // guidance_branches(config) // latents_a_row)
