"""A quote before the work begins: what a run will draw and evaluate, the memory it will hold, and the hours on a named device."""

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
from ..spec import Search, SupportsLatentCount
from .config import Config


def estimate_cost(plan: Config, device: str = "") -> dict[str, Any]:
    """Images, nfe by role, bytes and hours of a run, without loading anything; lines: the same for a person.

    device: a name of `memory.DEVICES`; all of them by default. A method whose groups do not all teach spends less than its
    `cost` says and so draws more images. Judging is not in it. Raises UserError on an unknown device.
    """
    if device and device not in DEVICES:
        raise unknown("device", device, DEVICES)
    each = declared(plan)
    found: dict[str, Any] = {"nfe_an_image": {role: round(nfe, 4) for role, nfe in each.items() if nfe}}
    lines = [f"an image costs {sum(each.values()):.4g} nfe: " + ", ".join(f"{r} {n:.4g}" for r, n in each.items() if n)]
    try:
        size = held(plan)
    except Missing as missing:
        return {**found, "lines": [*lines, f"memory: {missing}"]}
    images = _images(plan, sum(each.values()), size.flops)
    if math.isfinite(images):
        nfe = images * sum(each.values())
        times = {name: hours(nfe, size.flops, name) for name in ([device] if device else DEVICES)}
        found |= {"images": int(images), "nfe": int(nfe), "hours": times}
        shown = ", ".join(f"{name} {_time(h)}" for name, h in times.items())
        lines += [
            f"the budget affords about {int(images):,} images and {nfe:,.0f} nfe",
            f"network alone, at {100 * UTILISATION:.0f} % of the data sheet: {shown}; decoding, scoring, judging beside it",
        ]
    found |= {"memory": {"peak": size.peak, "training": size.training, "sampling": size.sampling}}
    return {**found, "lines": [*lines, *size.lines()]}


def _images(plan: Config, each: float, flops: float) -> float:
    """How many images the tightest bound affords; infinite where only updates or seconds are bounded."""
    price = {"nfe": each, "images": 1.0, "reward_calls": 1.0, "flops": each * flops}
    bounds = plan.budget.bounds()
    return min((bounds[c] / price[c] for c in CURRENCIES if c in bounds and price.get(c)), default=math.inf)


def declared(plan: Config) -> dict[str, float]:
    """Evaluations of an image by role. Where guidance is an input of the network it takes no second one, whoever sets it."""
    own, model_spec = plan.settings, plan.model_spec()
    if pipeline_class(model_spec).guided_cost > 1:
        return dict(own.cost(model_spec.steps, model_spec.guidance))
    return dict((replace(own, guidance=1.0) if _guidable(own) else own).cost(model_spec.steps, 1.0))


def _guidable(own: object) -> bool:
    return "guidance" in {field.name for field in fields(own)}  # type: ignore[arg-type]


def held(plan: Config, model_spec: ModelSpec | None = None, micro: int | None = None) -> MemoryEstimate:
    """The memory of a run. card, micro: instead of the plan's own and of `latents`. Raises Missing where sizes are unknown."""
    micro = latents(plan) if micro is None else micro
    return estimate(
        model_spec or plan.model_spec(),
        adapter=plan.adapter,
        precision=plan.precision,
        micro=micro,
        copies=copies(plan),
    )


def copies(plan: Config) -> int:
    """LoRA-sized copies beside the live one: the averaged weights, and the older ones that a method's cost names."""
    if isinstance(plan.settings, Search):
        return 0
    older = "old" in declared(plan)
    return older + (plan.settings.optim.ema > 0)


def latents(plan: Config) -> int:
    """Latents of one backward pass, both branches of guidance: of `optim.micro` rows, else of a minibatch of images."""
    if isinstance(plan.settings, Search):
        return 0
    o, s = plan.settings.optim, plan.settings
    images = getattr(s, "prompts", 1) * getattr(s, "group", 1)
    rows = o.micro * (s.latents if isinstance(s, SupportsLatentCount) else 1) or max(1, images // o.minibatches)
    return rows * branches(plan)


def branches(plan: Config) -> int:
    """2 where the policy learns under classifier-free guidance: the unguided branch is in the same forward, detached or not.

    Read off the static cost: without guidance such a method's policy costs half.
    """
    own, model_spec = plan.settings, plan.model_spec()
    if isinstance(own, Search) or not _guidable(own):
        return 1
    plain = replace(own, guidance=1.0).cost(model_spec.steps, 1.0)["policy"]  # type: ignore[call-arg]
    return round(declared(plan)["policy"] / plain)


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
