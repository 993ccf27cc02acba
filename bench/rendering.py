"""From latents to pixels: the only place where floats become the uint8 images that are scored, and non-finite ones are refused.

A cast to uint8 makes 0 of NaN and 126 of 1.5: an image that a damaged model left unfinished would be scored as a black one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .images import Pixels

if TYPE_CHECKING:
    from torch import Tensor

# Reasons of images without a score; they are counted by their text, so they hold no numbers.
LATENT_FAULT = "the model's latent is not finite"
IMAGE_FAULT = "the model's image has values that are not finite"


@dataclass(frozen=True)
class RenderedImages:
    """B images, and the reasons why some of them must not be scored: their latent or a value of theirs is not finite."""

    pixels: Pixels  # (B, H, W, 3); a row with a fault shows black where it has no value
    faults: Mapping[int, str] = field(default_factory=dict[int, str])  # row -> reason

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def sound_rows(self) -> list[int]:
        """The rows that may be scored."""
        return [row for row in range(len(self.pixels)) if row not in self.faults]


def render(decode: Callable[[Tensor], Tensor], x0: Tensor) -> RenderedImages:
    """Decode latents (B, C, h, w) to pixels. A row whose latent or image is not finite gets a fault.

    decode: (B, C, h, w) -> (B, 3, H, W), 0 black and 1 white, as `spec.Model.decode`.
    """
    import torch

    images = decode(x0)
    finite_latents, finite_images = torch.stack([_finite_rows(x0), _finite_rows(images)]).tolist()  # one copy
    faults = {
        row: IMAGE_FAULT if finite_latent else LATENT_FAULT
        for row, (finite_latent, finite_image) in enumerate(zip(finite_latents, finite_images, strict=True))
        if not (finite_latent and finite_image)
    }
    return RenderedImages(_rounded(images.nan_to_num(0.0, 0.0, 0.0) if faults else images), faults)


def to_uint8(images: Tensor) -> Pixels:
    """(B, 3, H, W) -> (B, H, W, 3) uint8: clamped to [0, 1], and rounded as a PNG of the pipeline would be.

    Raises ValueError on values that are not finite.
    """
    if not bool(images.isfinite().all()):
        raise ValueError(IMAGE_FAULT)
    return _rounded(images)


def _rounded(images: Tensor) -> Pixels:
    scaled = (images.clamp(0, 1).permute(0, 2, 3, 1) * 255).round()
    return np.asarray(scaled.byte().cpu().numpy(), dtype=np.uint8)


def differentiable_pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> the pixels of `to_uint8` in [0, 1], so that a score of them is that of the image file.

    Rounding passes the gradient on as it is; clamped values have none.
    """
    clamped = images.clamp(0, 1)
    return clamped + ((clamped * 255).round() / 255 - clamped).detach()


def finite_rows(values: Tensor) -> list[bool]:
    """(B, ...) -> for each row, whether all its values are finite."""
    return _finite_rows(values).tolist()


def _finite_rows(values: Tensor) -> Tensor:
    """(B, ...) -> (B,) bool: whether all values of a row are finite."""
    return values.isfinite().flatten(1).all(1)
