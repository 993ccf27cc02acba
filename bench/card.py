"""What a model's name stands for: where its weights are, and the protocol it is trained and judged under."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import registry
from .errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("net.0.proj", "net.2")


@dataclass(frozen=True)
class Adapter:
    """The LoRA that is trained; the base weights never change."""

    rank: int = 32
    alpha: int = 64
    targets: tuple[str, ...] = ATTENTION  # module names, or the ends of them

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise UserError(f"adapter: rank and alpha must be at least 1 and targets not empty, got {self}")


@dataclass(frozen=True)
class Card:
    """All that a name stands for, without loading it. The defaults are the protocol of Flow-GRPO and its kin:
    512 px, 40 steps, guidance 4.5, T5 cut to 128 tokens, LoRA of rank 32 on the attention (arXiv 2505.05470, App. B)."""

    name: str
    source: str  # a folder in diffusers format, or owner/name on the model hub
    revision: str | None = None  # of the hub repository; None for a folder
    pipeline: str = ""  # the class in model_index.json; read from there when it is a folder
    domain: str = "open"  # which prompts the model understands: glyphs | open
    height: int = 512  # pixels
    width: int = 512
    steps: int = 40
    guidance: float = 4.5  # 1 is none
    max_sequence_length: int = 128  # tokens of the T5 slot
    licence: str = "its own"
    budget: str = "sd35m"  # the bounds a run gets when it names none
    precision: str = "bf16"
    rows: int = 8  # images sampled at once
    preset: str = ""  # the section of methods/NAME.toml that fits it; empty is the model's own name
    adapter: Adapter = field(default_factory=Adapter)


def find(reference: str) -> Card:
    """The card behind a name, or behind a local folder in diffusers format.

    A folder that `gpobench pretrain` wrote states its own protocol in recipe.json.
    Raises UserError on an unknown name or a folder that is no pipeline.
    """
    folder = Path(reference)
    if reference in registry.entries("model") or not folder.is_dir():  # a folder that is called like a model: ./tiny
        card = registry.load("model", reference)
        if not isinstance(card, Card):
            raise UserError(f"model {reference!r} is not a gpobench.bench.card.Card")
        return card
    index, recipe = folder / "model_index.json", folder / "recipe.json"
    if not index.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    try:
        facts = json.loads(recipe.read_text("utf-8")) if recipe.is_file() else {}
        pipeline = dict(json.loads(index.read_text("utf-8"))).get("_class_name", "")
        return Card(name=folder.resolve().name, source=str(folder), pipeline=str(pipeline), **_protocol(facts))
    except KeyError as missing:
        raise UserError(f"{recipe} does not say {missing}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from None


def _protocol(facts: dict[str, Any]) -> dict[str, Any]:
    if not facts:
        return {}
    known = ("height", "width", "steps", "guidance", "max_sequence_length")
    return {"domain": "glyphs", **{key: facts[key] for key in known}, **SMALL}


# What suits a model of a few million parameters on a CPU.
SMALL: dict[str, Any] = {
    "budget": "tiny",
    "precision": "fp32",
    "rows": 64,
    "preset": "tiny",
    "adapter": Adapter(rank=32, alpha=64, targets=ATTENTION + FEED_FORWARD),
}
