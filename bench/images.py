"""Opens image files: the bytes of a PNG, JPEG or WebP become an array of pixels, and its size is read from the header."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Pixels of 8 bits; of those with transparency the colours are taken as they stand, as every published script takes them.
MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
# The EXIF tag, and its values under which width and height change places.
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
Pixels = NDArray[np.uint8]


class UnsupportedPixels(ValueError):
    """The pixels of an image are not of 8 bits a colour."""


def _opened(content: bytes, formats: tuple[str, ...] | None = None) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content), formats=formats)


def upright_size(content: bytes) -> tuple[int, int]:
    """(width, height) as a viewer shows the image, from its header. Raises what Pillow raises on foreign bytes."""
    with _opened(content) as image:
        turned = image.getexif().get(ORIENTATION, 1) in SIDEWAYS
        width, height = image.size
        return (height, width) if turned else (width, height)


def upright_pixels(content: bytes) -> Pixels:
    """(H, W, 3): the image as a viewer shows it. UnsupportedPixels, else what Pillow raises."""
    from PIL import ImageOps

    with _opened(content) as image:
        if image.mode not in MODES:
            raise UnsupportedPixels(f"its pixels are of the kind {image.mode}, not of 8 bits a colour")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def fitted_pixels(content: bytes, height: int, width: int) -> Pixels:
    """(height, width, 3): the image cut around its centre to the wanted aspect, then resized by Lanczos."""
    from PIL import Image, ImageOps

    with _opened(content) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))


def png_pixels(content: bytes) -> Pixels:
    """(H, W, 3) of a PNG in 8 bit RGB; ValueError on other pixels, else what Pillow raises."""
    with _opened(content, formats=("PNG",)) as image:
        if image.mode != "RGB":
            raise ValueError(f"not RGB but {image.mode}")
        return np.asarray(image)
