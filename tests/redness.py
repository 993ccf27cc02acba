"""A task whose reward a method can raise in seconds, its scorers, and scorers that fail in every way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gpobench.bench.errors import Missing
from gpobench.bench.spec import Columns, EvaluationSettings, Images, Prompt, Scores, Split

HERE = __file__
TEXTS: dict[Split, list[str]] = {
    "train": ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"],
    "validation": ["four red circles", "five blue triangles"],
    "test": ["two green squares", "a red triangle", "three blue circles", "four green triangles", "a sign", "a card"],
}


@dataclass(frozen=True)
class Redness:
    """How much redder the left half of an image is than the right: a random autoencoder's norms hide overall colour."""

    id: str = "redness-v1"
    name: str = "redness"
    metrics: Sequence[str] = ("mean",)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        red, half = images[..., 0], images.shape[2] // 2
        left, right = (side.mean((1, 2), dtype=np.float64) / 255 for side in (red[:, :, :half], red[:, :, half:]))
        value = left - right
        return Scores({"mean": value}, notes=[f"{v:.3f}" for v in value])


@dataclass(frozen=True)
class Warmth(Redness):
    """The held-out scorer: as Redness, with medians."""

    id: str = "warmth-v1"
    name: str = "warmth"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        red, half = images[..., 0], images.shape[2] // 2
        left, right = (np.median(side, axis=(1, 2)) / 255 for side in (red[:, :, :half], red[:, :, half:]))
        return Scores({"mean": left - right})


@dataclass(frozen=True)
class Constant(Redness):
    """Gives every image the same score."""

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores({"mean": np.ones(len(images))})


@dataclass(frozen=True)
class Raises(Redness):
    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        raise RuntimeError("the engine is on fire")


@dataclass(frozen=True)
class ReturnsNone(Redness):
    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Any:
        return None


@dataclass(frozen=True)
class WrongShape(Redness):
    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores({"mean": np.zeros((len(images), 2))})


@dataclass(frozen=True)
class WrongCount(Redness):
    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores({"mean": np.zeros(len(images) + 1)})


@dataclass(frozen=True)
class WrongMetric(Redness):
    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores({"median": np.zeros(len(images))})


@dataclass(frozen=True)
class NotANumber(Redness):
    """NaN for the first image of each batch, infinity for the second."""

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        value = np.array(super().__call__(images, prompts).value["mean"])
        value[0] = np.nan
        value[1:2] = np.inf
        return Scores({"mean": value}, {0: "it is too dark"})


@dataclass(frozen=True)
class Paint:
    name: str = "paint"
    version: str = "1"
    texts: Any = None
    scorer: str = "Redness"
    images: int = 2

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        return [Prompt(text) for text in (self.texts or TEXTS)[split]]

    def reward(self, domain: str) -> str:
        return f"{HERE}:{self.scorer}"

    def scorers(self, domain: str) -> Sequence[str]:
        return [self.reward(domain), *self.held_out(domain)]

    def held_out(self, domain: str) -> Sequence[str]:
        return [f"{HERE}:Warmth"]

    def evaluation(self, domain: str) -> EvaluationSettings:
        return EvaluationSettings(test_images=self.images, validation_images=1, seed=7)


def Long() -> Paint:
    """So many test images that evaluating them takes seconds."""
    return Paint(images=60)


def Overlapping() -> Paint:
    return Paint(texts={**TEXTS, "test": ["a sign", "A red circle!"]})


def Broken() -> Paint:
    return Paint(scorer="Raises")


def Flat() -> Paint:
    return Paint(scorer="Constant")


def Shaky() -> Paint:
    return Paint(scorer="NotANumber")


def Absent() -> Any:
    raise Missing("the engine `absent` is not installed: pip install absent")


@dataclass(frozen=True)
class Brightness(Redness):
    """Mean brightness."""

    id: str = "brightness-v1"
    name: str = "brightness"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores({"mean": images.mean((1, 2, 3)) / 255})


@dataclass(frozen=True)
class Colour:
    """Embedder: the mean colour of an image."""

    id: str = "colour-v1"
    name: str = "colour"
    distance: Literal["cosine", "squared"] = "squared"

    def __call__(self, images: Images) -> Any:
        return images.mean((1, 2)).astype(np.float32) / 255


@dataclass(frozen=True)
class Rich(Paint):
    """With strata, columns and a summary of its own."""

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        kinds = ("circle", "square", "triangle")
        return [
            Prompt(text, stratum="shapes" if any(kind in text for kind in kinds) else "other") for text in TEXTS[split]
        ]

    def columns(self, domain: str) -> Columns:
        here = f"{HERE}:Colour"
        return Columns(quality=[f"{HERE}:Brightness", f"{HERE}:Absent"], diversity=[here], drift=[here])

    def summary(self, table: Any) -> dict[str, float]:
        return {"rows": float((table.scorer == "redness").sum()), "nothing": float("nan")}


@dataclass(frozen=True)
class Patchy(Rich):
    """Its first embedder is not installed."""

    def columns(self, domain: str) -> Columns:
        return Columns(diversity=[f"{HERE}:Absent", f"{HERE}:Colour"], drift=[f"{HERE}:Absent"])


@dataclass(frozen=True)
class Twins(Paint):
    """Its held-out scorer has the name of its training scorer."""

    def held_out(self, domain: str) -> Sequence[str]:
        return [f"{HERE}:Constant"]


@dataclass(frozen=True)
class Further(Paint):
    """Names one more scorer, which is not installed."""

    def scorers(self, domain: str) -> Sequence[str]:
        return [*super().scorers(domain), f"{HERE}:Absent"]


@dataclass(frozen=True)
class Balance(Redness):
    """Higher for halves of equal redness: painting one half red lowers it."""

    id: str = "balance-v1"
    name: str = "balance"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores({"mean": -np.abs(super().__call__(images, prompts).value["mean"])})


def Many() -> Paint:
    """Enough test prompts to tell two runs apart."""
    things = [f"{count} {colour} {shape}" for count in ("six", "seven") for colour in ("red", "blue", "pink", "grey")
              for shape in ("circles", "squares", "stars", "rings", "dots")]  # fmt: skip
    return Paint(texts={**TEXTS, "test": things})


@dataclass(frozen=True)
class Bait(Paint):
    """Raising its training scorer lowers its held-out scorer."""

    texts: Any = None

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        return Many().prompts(split, domain)

    def held_out(self, domain: str) -> Sequence[str]:
        return [f"{HERE}:Balance"]


@dataclass(frozen=True)
class Blind(Warmth):
    """A held-out scorer that can read no image."""

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        raise ValueError("images of 16 x 16 are too small")


@dataclass(frozen=True)
class Unread(Paint):
    """Its held-out scorer can read no image."""

    def held_out(self, domain: str) -> Sequence[str]:
        return [f"{HERE}:Blind"]
