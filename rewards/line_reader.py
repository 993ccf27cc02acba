"""Held-out reader for `tiny` 2: a small convolutional network reads one or two lines of capitals.

It was trained by `line_reader_recipe.py` on random letters in other typefaces than the embedded model's pictures have. Its last layers
see the whole height, so the network itself finds the lines: it gives the letters of an upper and of a lower line by CTC, the lower
one empty where a text has one word. The training scorer cuts the picture into lines and reads each with RapidOCR; the two share nothing
but the published rule.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images, Prompt, Scores, check_images
from . import rules
from .reader import ALPHABET, HEIGHT, WIDTH, apply_in_chunks, spell

if TYPE_CHECKING:
    from torch import Tensor, nn

LINES, COLUMNS = 2, 32  # columns of 2 px: four to a letter, so that a blank fits between two equal ones
WEIGHTS = Path(__file__).with_name("line_reader.safetensors")


def network() -> "nn.Sequential":
    """Build the network: (B, 3, 32, 64) standardised images -> (B, 2, 27, 32) logits of two lines; class 0 is CTC's blank."""
    from torch import nn

    def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]

    classes = len(ALPHABET) + 1
    return nn.Sequential(
        *conv(3, 24, 5, stride=2),  # 16 x 32
        *conv(24, 48, 3),
        nn.MaxPool2d((2, 1)),  # 8 x 32
        *conv(48, 72, 3),
        *conv(72, 72, 3),
        nn.Conv2d(72, 224, (8, 1), bias=False),  # the whole height at once: 1 x 32
        nn.BatchNorm2d(224),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Conv1d(224, 160, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv1d(160, LINES * classes, 1),
        nn.Unflatten(1, (LINES, classes)),
    )


def spell_lines(classes: np.ndarray) -> list[str]:
    """Decode (B, 2, 32) most likely classes to B texts, their lines with a space between them."""
    lines = spell(classes.reshape(-1, COLUMNS))
    return [" ".join(part for part in lines[i : i + LINES] if part) for i in range(0, len(lines), LINES)]


class LineReader:
    """Reads every image with the trained network and scores the text by the published rule."""

    name = "line-reader"
    metrics: Sequence[str] = rules.METRICS

    def __init__(self, weights: Path = WEIGHTS) -> None:
        from safetensors.torch import load

        if not weights.exists():
            raise Missing(
                f"the reader of lines has no weights at {weights}; make them with: gpobench pretrain line-reader"
            )
        raw = weights.read_bytes()
        self.network = network().eval().requires_grad_(False)
        try:
            self.network.load_state_dict(
                {key: value.float() if value.is_floating_point() else value for key, value in load(raw).items()}
            )
        except Exception as error:
            raise UserError(
                f"{weights} does not hold the weights of the reader of lines: {str(error).splitlines()[0]}"
            ) from error
        check_finite(self.network.state_dict(), weights)
        self.id = f"line-reader-1/ctc@{sha256(raw).hexdigest()[:8]}/{rules.RULE}"

    def logits(self, images: Images) -> "Tensor":
        """Map (B, 32, 64, 3) uint8 to (B, 2, 27, 32); a row depends on its own image only."""
        return apply_in_chunks(self.network, images)

    def read(self, images: Images) -> list[str]:
        """Read (B, 32, 64, 3) uint8 as B texts of capitals, two lines with a space between them."""
        return spell_lines(self.logits(images).argmax(2).numpy())

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, 32, 64, 3) and B prompts to soft and exact; ValueError for another shape, NaN with a reason where reading failed."""
        check_images(images, prompts)
        if images.shape[1:] != (HEIGHT, WIDTH, 3):
            raise ValueError(f"the reader of lines reads pictures of (32, 64, 3), got {images.shape[1:]}")
        try:
            return rules.score_texts(prompts, self.read(images), {})
        except RuntimeError as error:  # torch raises it for every error at run time
            reason = f"{type(error).__name__}: {error}"
            return rules.score_texts(prompts, [None] * len(images), {row: reason for row in range(len(images))})
