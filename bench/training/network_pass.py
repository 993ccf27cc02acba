"""How the rig has one velocity computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkPass:
    """How one velocity is computed: what `MeteredRig.velocity` takes, and whether the LoRA may be merged into the weights."""

    weights: str
    guidance: float
    detach: bool = False
    role: str = ""
    merged: bool = False
    half: bool = False  # in bf16, where a step has no density
