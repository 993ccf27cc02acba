"""A card becomes a loaded model: the one place that knows which adapter serves which pipeline class."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .. import registry
from ..card import Adapter, Card

ADAPTERS = {"StableDiffusion3Pipeline": ".sd3:SD3"}


def open_model(
    card: Card, *, device: Any, precision: str | None = None, adapter: Adapter | None = None, seed: int = 0
) -> Any:
    """The model on its device, with a fresh LoRA when `adapter` is given (its random start comes from `seed`).

    Raises UserError on a pipeline class without adapter, Missing when the weights are not there.
    """
    if card.pipeline not in ADAPTERS:
        raise registry.unknown("pipeline class", card.pipeline, ADAPTERS)
    module, _, name = ADAPTERS[card.pipeline].partition(":")
    kind = getattr(import_module(module, __package__), name)
    return kind(card, device=device, precision=precision or card.precision, adapter=adapter, seed=seed)
