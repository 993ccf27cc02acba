"""A run that did not fit: which knob to turn, by how much, and what it would hold then, in one line.

The order is that of the price. Fewer images at once and smaller backward passes only round differently, as do activations that are
computed again and text encoders that wait in main memory; the last resort, another precision, is not offered.
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
from .cost_estimate import branches, held, latents

SAMPLING = {"sample", "decode", "evaluate", "sample_protocol"}  # functions on the stack while no gradient is kept


@contextmanager
def advise_on_oom(plan: Config) -> Generator[None]:
    """Within: an accelerator or a main memory that is full is said in one line, with what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(_told(plan, error)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator: can't allocate memory" not in str(error):  # torch has no class for it
            raise
        raise UserError(_told(plan, error)) from error


def _told(plan: Config, error: BaseException) -> str:
    stack = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    sampling = bool(stack & SAMPLING)
    room, where = _room()
    doing = "while images were sampled" if sampling else "in training"
    doing = "while the model was loaded" if "open_model" in stack else doing
    return f"out of memory on {where} {doing}: {advice(plan, room, sampling=sampling)} What was saved stays."


def _room() -> tuple[float, str]:
    """GB (2^30 bytes) that this process can have, and of what."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        mine = (free + torch.cuda.memory_reserved()) / GB
        others = total / GB - mine
        taken = f", {others:.1f} GB of it taken by others" if others > MARGIN / GB else ""
        return mine, f"{torch.cuda.get_device_name()} ({total / GB:.1f} GB{taken})"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    return total, f"this machine ({total:.1f} GB)"


def advice(plan: Config, gigabytes: float, *, sampling: bool) -> str:
    """One or two sentences: what the run is estimated to hold, and the cheapest change of settings that fits so many GB.

    sampling: it happened while images were sampled, so that is to shrink where the estimate says that all would fit.
    """
    model_spec, sampling = plan.model_spec(), sampling or isinstance(plan.settings, Search)
    try:
        now = held(plan, model_spec)
    except Missing as missing:
        knob = f"rows={max(1, model_spec.rows // 2)}" if sampling else f"optim.micro={max(1, _rows(plan) // 2)}"
        return f"try --set {knob} ({missing})."
    said = f"it was to take {now.training / GB:.1f} GB in training and {now.sampling / GB:.1f} GB in sampling."
    least = now
    for knobs, least in _turned(plan, model_spec, now, gigabytes, sampling):
        if knobs and least.fits(gigabytes):
            return f"{said} {' '.join(f'--set {k}' for k in knobs)} brings that to {least.peak / GB:.1f} GB."
    need = (least.peak + MARGIN) / GB
    return f"{said} With every knob turned down it takes {need:.1f} GB: a larger device or a smaller model is needed."


def _turned(
    plan: Config, model_spec: ModelSpec, now: MemoryEstimate, gigabytes: float, sampling: bool
) -> Generator[tuple[list[str], MemoryEstimate]]:
    """Settings, each further than the one before, and what they take."""
    wide = latents(plan) // max(1, _rows(plan))  # latents a row of the method's batch
    knobs: dict[str, str] = {}
    rows, micro = model_spec.rows, _rows(plan)
    room = gigabytes * GB - MARGIN
    # The estimate may be wrong by a tenth: what it says would fit and did not is halved once.
    tight_sampling = now.sampling > room or (sampling and now.fits(gigabytes))
    tight_training = now.training > room or (not sampling and now.fits(gigabytes))

    def tried() -> tuple[list[str], MemoryEstimate]:
        return [f"{key}={value}" for key, value in knobs.items()], held(
            plan, replace(model_spec, rows=rows), micro * wide
        )

    while tight_sampling and rows > 1:
        rows = rows // 2
        knobs["rows"] = str(rows)
        tight_sampling = tried()[1].sampling > room
    if tight_training and not model_spec.checkpointing and not model_spec.compile:
        model_spec = replace(model_spec, checkpointing=True)
        knobs["checkpointing"] = "true"
        tight_training = tried()[1].training > room
    while tight_training and micro > 1:
        micro = micro // 2
        knobs["optim.micro"] = str(micro)
        tight_training = tried()[1].training > room
    yield tried()
    if not model_spec.offload:
        model_spec = replace(model_spec, offload=True)
        knobs["offload"] = "true"
        yield tried()


def _rows(plan: Config) -> int:
    """Rows of the method's batch in one backward pass."""
    settings: Any = plan.settings
    wide = settings.latents if isinstance(settings, SupportsLatentCount) else 1
    return max(1, latents(plan) // branches(plan) // wide)
