"""Pictures from elsewhere: one opener, which turns, composites, refuses, and never says anything but its own errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from gpobench.bench import images
from gpobench.bench.images import UnsupportedPixels, fitted_pixels, read_header, upright_pixels

CORNERS = np.zeros((4, 8, 3), np.uint8)  # a picture that no turn or mirror leaves as it is
CORNERS[:2, :4], CORNERS[2:, :4], CORNERS[:2, 4:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


OPENERS: list[Callable[[bytes], Any]] = [upright_pixels, lambda content: fitted_pixels(content, 4, 8)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_openers_turn_a_picture_as_a_viewer_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    content = encoded(Image.fromarray(CORNERS), exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    height, width = shown.shape[:2]
    np.testing.assert_array_equal(upright_pixels(content), shown)
    np.testing.assert_array_equal(fitted_pixels(content, height, width), shown)
    assert read_header(content).size == (width, height)


def test_a_damaged_orientation_is_none() -> None:
    content = encoded(Image.fromarray(CORNERS), exif=b"Exif\0\0MM\0*\0\0\0\xff\0\0")
    np.testing.assert_array_equal(upright_pixels(content), CORNERS)
    assert read_header(content).size == (8, 4)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_refused_by_both_openers(mode: str) -> None:
    ramp = np.linspace(0, 60_000, 32).reshape(4, 8)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    content = encoded(Image.fromarray(ramp.astype(kind)), "TIFF")
    for opener in OPENERS:
        with pytest.raises(UnsupportedPixels, match=f"of the kind {mode}, not of 8 bits"):
            opener(content)


def see_through(mode: str) -> Image.Image:
    """Left half opaque and red, right half transparent with black behind it."""
    if mode == "P":
        image = Image.new("P", (8, 4), 1)
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 4, 4))
        return image
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_stand_on_white(mode: str) -> None:
    content = encoded(see_through(mode), **({"transparency": 1} if mode == "P" else {}))
    assert read_header(content).alpha
    for opener in OPENERS:
        pixels = opener(content)
        assert (pixels[:, 4:] == 255).all() and (pixels[:, :4] == pixels[0, 0]).all() and pixels[0, 0, 1] < 100


def test_black_text_on_nothing_is_read_as_black_on_white() -> None:
    alpha = np.zeros((4, 8), np.uint8)
    alpha[1:3, 2:6] = 255
    content = encoded(Image.fromarray(np.dstack([np.zeros((4, 8, 3), np.uint8), alpha])))
    np.testing.assert_array_equal(upright_pixels(content)[..., 0], 255 - alpha)


def test_an_alpha_channel_without_transparency_changes_no_colour() -> None:
    content = encoded(Image.fromarray(np.dstack([CORNERS, np.full((4, 8), 255, np.uint8)])))
    np.testing.assert_array_equal(upright_pixels(content), CORNERS)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF"])
def test_every_form_is_decoded_to_the_same_picture(form: str) -> None:
    options = (
        {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if form == "AVIF" else {}
    )
    pixels = upright_pixels(encoded(Image.fromarray(CORNERS.repeat(8, 0).repeat(8, 1)), form, **options))
    assert np.abs(pixels[4::8, 4::8].astype(int) - CORNERS).max() <= (3 if form == "AVIF" else 0)


def test_of_several_pictures_the_first_is_taken_and_the_header_says_so() -> None:
    first, second = (Image.new("RGB", (8, 4), colour) for colour in ("red", "blue"))
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    assert read_header(content).animated and not read_header(encoded(first, "GIF")).animated
    assert upright_pixels(content)[0, 0].tolist() == [255, 0, 0]


def test_a_format_that_starts_a_program_is_no_image() -> None:
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 4\n%%EndComments\nshowpage\n%%EOF\n"
    for opener in OPENERS:
        with pytest.raises(OSError, match="cannot identify"):
            opener(page)


def test_a_picture_that_is_too_large_says_how_large(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    upright_pixels(encoded(Image.fromarray(CORNERS)))  # 32: Pillow warns above the bound and refuses above its double
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]
    large = encoded(Image.new("RGB", (10, 5)))
    for opener in (read_header, *OPENERS):
        with pytest.raises(UnsupportedPixels, match="^its 50 pixels are more than the 40 that are read$"):
            opener(large)


SOUND = [
    encoded(Image.fromarray(CORNERS)),
    encoded(see_through("P"), transparency=1),
    encoded(Image.fromarray(CORNERS), "JPEG"),
    encoded(Image.fromarray(CORNERS), "TIFF", tiffinfo=TiffImagePlugin.ImageFileDirectory_v2()),
    encoded(Image.fromarray(CORNERS), "GIF"),
    encoded(Image.fromarray(CORNERS), "WEBP"),
    encoded(Image.fromarray(CORNERS), "BMP"),
]


@given(
    content=st.sampled_from(SOUND),
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 400),
)
@settings(max_examples=40)
def test_damaged_bytes_are_pixels_or_an_error(content: bytes, edits: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(content[: end or None])
    for place, value in edits:
        if place < len(damaged):
            damaged[place] = value
    try:
        height, width, depth = upright_pixels(bytes(damaged)).shape
        assert depth == 3 and read_header(bytes(damaged)).size == (width, height)
    except AssertionError:
        raise
    except Exception:  # what Pillow raises; the callers turn it into a reason
        return
