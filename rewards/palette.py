"""A child with a handful of crayons counts the dots of one colour: nearest crayon, specks wiped off, patches counted."""

from typing import NamedTuple, cast

import numpy as np

from ..bench.glyphs import PAPERS, SHAPE_COLOURS

SMALLEST = 12  # pixels; the smallest clean shape, a triangle, covers about 40


class Blob(NamedTuple):
    """One patch of a colour."""

    area: int  # pixels
    fill: float  # of its bounding box; at 9 px a square has 1, a disc .94, a triangle .62 to .67
    kind: str  # the shape with the nearest fill


def masks(images: np.ndarray, colour: str) -> np.ndarray:
    """(..., H, W, 3) uint8 to (..., H, W) bool: pixels nearer to this shape colour than to any other and to any paper."""
    if colour not in SHAPE_COLOURS:
        raise ValueError(f"no shape colour called {colour!r}; there are {', '.join(SHAPE_COLOURS)}")
    others = [rgb for name, rgb in SHAPE_COLOURS.items() if name != colour]
    palette = np.array([SHAPE_COLOURS[colour], *others, *PAPERS.values()], np.float32)
    # |x - p|^2 without |x|^2, which is the same for every p
    gaps = (palette**2).sum(-1) - 2 * images.astype(np.float32) @ palette.T
    return gaps.argmin(-1) == 0


def blobs(image: np.ndarray, colour: str) -> list[Blob]:
    """The patches of a colour in a picture (H, W, 3) uint8, after an opening by 2x2 pixels that parts shapes that touch."""
    from scipy import ndimage

    opened = ndimage.binary_opening(masks(image, colour), np.ones((2, 2), bool))
    labels, found = cast(tuple[np.ndarray, int], ndimage.label(opened))
    areas = np.bincount(labels.ravel(), minlength=found + 1)[1:]
    out = []
    for area, place in zip(areas, ndimage.find_objects(labels), strict=True):
        if area >= SMALLEST:
            rows, columns = place
            fill = float(area / ((rows.stop - rows.start) * (columns.stop - columns.start)))
            out.append(Blob(int(area), fill, "square" if fill > 0.97 else "circle" if fill > 0.8 else "triangle"))
    return out


def count(image: np.ndarray, colour: str) -> int:
    """How many patches of a colour a picture (H, W, 3) uint8 shows."""
    return len(blobs(image, colour))


def count_kind(image: np.ndarray, kind: str, colour: str) -> int:
    """How many patches of a colour have the shape asked for; `kind` is one of `glyphs.SHAPES`."""
    return sum(blob.kind == kind for blob in blobs(image, colour))
