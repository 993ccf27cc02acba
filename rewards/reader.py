"""Scorer `reader`, held out: recognises the capitals in a 64x32 image with a small network, without a dictionary.

It was trained by `reader_recipe.py` on random letters in typefaces the embedded model never saw, so that a method trained on another
engine cannot raise its score by exploiting that engine's errors. A convolutional stack covers windows of a few letters; connectionist
temporal classification (Graves et al., 2006) decodes 16 columns into a string: blanks and repeats are dropped, nothing is corrected.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images, Prompt, Scores, check_images
from . import rules

if TYPE_CHECKING:
    from torch import Tensor, nn

HEIGHT, WIDTH = 32, 64
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # class i + 1 is letter i; class 0 is CTC's blank
COLUMNS = 16
# Rows per forward pass, the last one padded: the kernels of a convolution depend on the number of rows, and a score must not.
CHUNK = 32
WEIGHTS = Path(__file__).with_name("reader.safetensors")


def network() -> "nn.Sequential":
    """Build the network: (B, 3, 32, 64) standardised images -> (B, 27, 16) logits."""
    from torch import nn

    def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *conv(3, 24, 5, stride=2),  # 16 x 32
        *conv(24, 48, 3),
        nn.MaxPool2d(2),  # 8 x 16
        *conv(48, 80, 3),
        *conv(80, 80, 3),
        nn.MaxPool2d((2, 1)),  # 4 x 16
        *conv(80, 112, 3),
        nn.Conv2d(112, 160, (4, 1), bias=False),  # the whole height at once: 1 x 16
        nn.BatchNorm2d(160),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Conv1d(160, 128, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv1d(128, len(ALPHABET) + 1, 1),
    )


def standardise(images: "Tensor") -> "Tensor":
    """Map (B, 32, 64, 3) in 0..255 to (B, 3, 32, 64) of mean 0 and deviation 1 in each image, so that contrast has no effect."""
    x = images.movedim(-1, 1).float()
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) / (x.std((1, 2, 3), keepdim=True) + 4.0)  # 4 of 255 grey levels: a blank page stays blank


def apply_in_chunks(network: "nn.Module", images: Images) -> "Tensor":
    """The network's output for (B, 32, 64, 3) uint8: batches of exactly CHUNK, the last one padded, so a row depends on its image only."""
    import torch

    rows: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, max(len(images), 1), CHUNK):  # of no images one batch, for the shape of no rows
            part = images[start : start + CHUNK]
            full = np.zeros((CHUNK, HEIGHT, WIDTH, 3), np.uint8)
            full[: len(part)] = part
            rows.append(network(standardise(torch.from_numpy(full)))[: len(part)])
        return torch.cat(rows)


def spell(classes: np.ndarray) -> list[str]:
    """Decode (B, 16) most likely classes to B strings: repeats merged, then blanks dropped."""
    fresh = np.ones(classes.shape, bool)
    fresh[:, 1:] = classes[:, 1:] != classes[:, :-1]
    return ["".join(ALPHABET[c - 1] for c in row[keep & (row > 0)]) for row, keep in zip(classes, fresh, strict=True)]


class Reader:
    """Reads every image with the trained network and scores the text by the published rule."""

    name = "reader"
    metrics: Sequence[str] = rules.METRICS

    def __init__(self, weights: Path = WEIGHTS) -> None:
        from safetensors.torch import load

        if not weights.exists():
            raise Missing(f"the held-out reader has no weights at {weights}; make them with: gpobench pretrain reader")
        raw = weights.read_bytes()
        self.network = network().eval().requires_grad_(False)
        try:
            self.network.load_state_dict(
                {key: value.float() if value.is_floating_point() else value for key, value in load(raw).items()}
            )
        except Exception as error:
            raise UserError(
                f"{weights} does not hold the weights of the held-out reader: {str(error).splitlines()[0]}"
            ) from error
        check_finite(self.network.state_dict(), weights)
        self.id = f"reader-1/ctc@{sha256(raw).hexdigest()[:8]}/{rules.RULE}"

    def logits(self, images: Images) -> "Tensor":
        """Map (B, 32, 64, 3) uint8 to (B, 27, 16); a row depends on its own image only."""
        return apply_in_chunks(self.network, images)

    def read(self, images: Images) -> list[str]:
        """Read (B, 32, 64, 3) uint8 as B strings of capitals."""
        return spell(self.logits(images).argmax(1).numpy())

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, 32, 64, 3) and B prompts to soft and exact; ValueError for another shape, NaN with a reason where reading failed."""
        check_images(images, prompts)
        if images.shape[1:] != (HEIGHT, WIDTH, 3):
            raise ValueError(f"the reader reads pictures of (32, 64, 3), got {images.shape[1:]}")
        try:
            return rules.score_texts(prompts, self.read(images), {})
        except RuntimeError as error:  # torch raises it for every error at run time
            reason = f"{type(error).__name__}: {error}"
            return rules.score_texts(prompts, [None] * len(images), {row: reason for row in range(len(images))})

    def self_test(self) -> None:
        """Read built-in renders; raises RuntimeError with the text read where one is wrong."""
        rules.check_known_answers(self)


@lru_cache(maxsize=1)
def recipe_facts() -> dict[str, object]:
    """Read the recipe's record: how the shipped weights were made and how accurately they read."""
    facts: dict[str, object] = json.loads(WEIGHTS.with_suffix(".json").read_text("utf-8"))
    return facts


def make(variant: str | None = None) -> Reader:
    """Make the scorer, which has no variants."""
    if variant is not None:
        raise UserError(f"the scorer 'reader' has no variant {variant!r}; write it as 'reader'")
    return Reader()
