"""Cost estimate of a run before it starts: images, network evaluations, memory, and hours on a named device."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from ..budget import CURRENCIES
from ..errors import Missing
from ..model_spec import ModelSpec
from ..models.memory import DEVICES, UTILISATION, MemoryEstimate, estimate, hours
from ..models.open import pipeline_class
from ..registry import unknown
from ..spec import Search, SupportsLatentCount, SupportsRewardGradient
from .config import Config


def estimate_cost(config: Config, device: str = "") -> dict[str, Any]:
    """Estimate images, nfe by role, bytes and hours of a run without loading anything; `lines` holds the same as text.

    Evaluations are not included. A method that skips groups spends less than its `cost` says and so draws more images.
    device: a name of `memory.DEVICES`; "" means all of them. Raises UserError on an unknown device.
    """
    if device and device not in DEVICES:
        raise unknown("device", device, DEVICES)
    nfe_by_role = nfe_per_image(config)
    total = sum(nfe_by_role.values())
    result: dict[str, Any] = {"nfe_an_image": {role: round(nfe, 4) for role, nfe in nfe_by_role.items() if nfe}}
    lines = [f"an image costs {total:.4g} nfe: " + ", ".join(f"{r} {n:.4g}" for r, n in nfe_by_role.items() if n)]
    if isinstance(config.settings, SupportsRewardGradient):
        each = config.settings.reward_backwards
        lines.append(
            f"and {each:.4g} backward passes of decoder and scorer, which neither nfe nor the memory below counts"
        )
        result["reward_backwards_an_image"] = each
    try:
        memory = estimate_memory(config)
    except Missing as missing:
        return {**result, "lines": [*lines, f"memory: {missing}"]}
    images = affordable_images(config, total, memory.flops)
    if math.isfinite(images):
        nfe = images * total
        hours_by_device = {name: hours(nfe, memory.flops, name) for name in ([device] if device else DEVICES)}
        result |= {"images": int(images), "nfe": int(nfe), "hours": hours_by_device}
        times = ", ".join(f"{name} {format_duration(h)}" for name, h in hours_by_device.items())
        lines += [
            f"the budget affords about {int(images):,} images and {nfe:,.0f} nfe",
            f"network at {100 * UTILISATION:.0f} % of the data sheet: {times}; without decoding, scoring, evaluations",
        ]
    result |= {"memory": {"peak": memory.peak, "training": memory.training, "sampling": memory.sampling}}
    return {**result, "lines": [*lines, *memory.lines()]}


def affordable_images(config: Config, nfe_an_image: float, flops: float) -> float:
    """Return how many images the tightest bound affords; infinite where only updates or seconds are bounded.

    flops: of one network evaluation.
    """
    price = {"nfe": nfe_an_image, "images": 1.0, "reward_calls": 1.0, "flops": nfe_an_image * flops}
    bounds = config.budget.bounds()
    return min((bounds[c] / price[c] for c in CURRENCIES if c in bounds and price.get(c)), default=math.inf)


def nfe_per_image(config: Config) -> dict[str, float]:
    """Return the network evaluations of an image by role. A model that takes guidance as an input needs no second one for it."""
    method, model_spec = config.settings, config.model_spec()
    if pipeline_class(model_spec).guided_cost > 1:
        return dict(method.cost(model_spec.sampler_steps, model_spec.guidance))
    unguided = replace(method, guidance=1.0) if _has_guidance(method) else method
    return dict(unguided.cost(model_spec.sampler_steps, 1.0))


def _has_guidance(method: object) -> bool:
    """Whether a method has a guidance setting of its own."""
    return "guidance" in {field.name for field in fields(method)}  # type: ignore[arg-type]


def estimate_memory(config: Config, model_spec: ModelSpec | None = None, micro: int | None = None) -> MemoryEstimate:
    """Estimate the memory of a run. Raises Missing where the model's sizes are unknown.

    model_spec: instead of the config's own. micro: latents of one backward pass, instead of those of the config.
    """
    micro = latents_per_backward(config) if micro is None else micro
    return estimate(
        model_spec or config.model_spec(),
        adapter=config.adapter,
        precision=config.precision,
        micro=micro,
        copies=adapter_copies(config),
    )


def adapter_copies(config: Config) -> int:
    """Return the number of LoRA copies beside the policy: averaged weights, and old ones where the method's cost names them."""
    if isinstance(config.settings, Search):
        return 0
    old = "old" in nfe_per_image(config)
    return old + (config.settings.optim.ema > 0)


def latents_per_backward(config: Config) -> int:
    """Return the latents of one backward pass with both branches of guidance: of `optim.micro` rows, else of a minibatch."""
    if isinstance(config.settings, Search):
        return 0
    optim, method = config.settings.optim, config.settings
    images = getattr(method, "prompts", 1) * getattr(method, "group", 1)
    latents_a_row = method.latents if isinstance(method, SupportsLatentCount) else 1
    rows = optim.micro * latents_a_row or max(1, images // optim.minibatches)
    return rows * guidance_branches(config)


def guidance_branches(config: Config) -> int:
    """Return 2 where the policy is trained under classifier-free guidance, whose two branches share one forward pass; else 1.

    It follows from the declared cost: without guidance such a method's policy costs half.
    """
    method, model_spec = config.settings, config.model_spec()
    if isinstance(method, Search) or not _has_guidance(method):
        return 1
    unguided = replace(method, guidance=1.0).cost(model_spec.sampler_steps, 1.0)["policy"]  # type: ignore[call-arg]
    return round(nfe_per_image(config)["policy"] / unguided)


def format_duration(hours: float) -> str:
    """Return a time in hours, minutes or seconds."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
