"""Opens image files: the bytes of a picture become an array of pixels, and its size is read from the header.

One rule for everything people bring, folders of images and preference pairs alike: the picture is turned as its EXIF orientation
says, transparent parts stand on white, of several pictures in a file the first is taken, and pixels of more than 8 bits a colour
are refused.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What Pillow may decode; its other formats start programs (EPS) or hold no pixels.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
MODES = ("RGB", "RGBX", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")  # pixels of 8 bits a colour
ORIENTATION = 0x0112  # the EXIF tag
Pixels = NDArray[np.uint8]


class UnsupportedPixels(ValueError):
    """The pixels of an image cannot be taken: not of 8 bits a colour, or too many."""


def read_only_copy(pixels: Pixels) -> Pixels:
    """A copy that raises ValueError where it is written on: for code that must not change what others read."""
    copy = pixels.copy()
    copy.flags.writeable = False
    return copy


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image file says."""

    size: tuple[int, int]  # width and height in pixels, upright
    alpha: bool  # may have transparent parts
    animated: bool  # holds several pictures


def read_header(content: bytes) -> ImageHeader:
    """Read an image's header. Raises UnsupportedPixels, else what Pillow raises on foreign bytes."""
    with _opened(content, FORMATS) as image:
        width, height = image.size
        turned = 5 <= _orientation(image) <= 8
        # A telephone's JPEG holds a second picture of other exposure (MPO), which no viewer shows.
        animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        return ImageHeader((height, width) if turned else (width, height), image.has_transparency_data, animated)


def upright_pixels(content: bytes) -> Pixels:
    """(H, W, 3): the image as a viewer shows it. UnsupportedPixels, else what Pillow raises."""
    return np.asarray(_upright(content))


def fitted_pixels(content: bytes, height: int, width: int) -> Pixels:
    """(height, width, 3): the upright image cut around its centre to the wanted aspect, then resized by Lanczos; raises as above."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(_upright(content), (width, height), Image.Resampling.LANCZOS))


def png_pixels(content: bytes) -> Pixels:
    """(H, W, 3) of a PNG in 8 bit RGB; ValueError on other pixels, else what Pillow raises."""
    with _opened(content, formats=("PNG",)) as image:
        if image.mode != "RGB":
            raise ValueError(f"not RGB but {image.mode}")
        return np.asarray(image)


def _opened(content: bytes, formats: tuple[str, ...]) -> Any:
    from PIL import Image

    Image.init()
    known = [name for name in formats if name in Image.OPEN]  # AVIF is missing from older versions
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=known)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        count = f"{int(pixels[0]):,}" if pixels else "many"
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnsupportedPixels(f"its {count} pixels are more than the {most:,} that are read") from None


def _upright(content: bytes) -> Any:
    """The image in RGB as a viewer shows it, on white."""
    from PIL import Image

    turns = dict(zip(range(2, 9), (Image.Transpose(n) for n in (0, 3, 1, 5, 4, 6, 2)), strict=True))
    with _opened(content, FORMATS) as image:
        if image.mode not in MODES:
            raise UnsupportedPixels(f"its pixels are of the kind {image.mode}, not of 8 bits a colour")
        rgb = _on_white(image) if image.has_transparency_data else image.convert("RGB")
        orientation = _orientation(image)
        return rgb.transpose(turns[orientation]) if orientation in turns else rgb


def _on_white(image: Any) -> Any:
    """The image in RGB, its transparent parts on white; where it has none, its colours as they are."""
    from PIL import Image

    rgba = image.convert("RGBA")
    if rgba.getextrema()[3][0] == 255:
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 where the file states none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged EXIF
            orientation = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF block leaves the pixels sound
        return 1
    return orientation if 1 <= orientation <= 8 else 1
