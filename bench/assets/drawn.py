"""Finds what pictures of `drawings` show without a network: shapes by their colour and outline, and the lines of a text.

A pixel is a mixture p = paper + c (ink - paper). The paper is the picture's median colour; the ink is the one that explains the pixel
best, and c, its coverage, says how much of it there is. So the soft edge of a black shape is black ink, not grey or purple. The patches
of an ink are compared with the outlines of all shapes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np

from .drawings import COLOURS, HEIGHT, PITCH, SHAPES, shape_coverage

SMALLEST = 18  # pixels of a patch; the smallest clean shape, a star, covers 40
UNLIKE = 0.55  # correlation with the best outline below which a patch is no shape
SHIFT = 2  # px by which an outline is moved to fit


class DrawnShape(NamedTuple):
    """One shape in a picture."""

    kind: str
    colour: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels
    likeness: float  # correlation of its coverage with the outline of its kind
    mask: np.ndarray  # (H, W) bool


def paper_of(image: np.ndarray) -> np.ndarray:
    """Return the picture's median colour (3,): at most a third of a picture is ink."""
    return np.median(image.reshape(-1, 3), axis=0)


def unmix(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each pixel's ink, an index into COLOURS, and its coverage by that ink in 0..1; both (H, W)."""
    paper = paper_of(image)
    ink = np.array(list(COLOURS.values()), np.float64) - paper  # (K, 3)
    pixel = image.astype(np.float64) - paper
    coverage = np.clip(pixel @ ink.T / (ink**2).sum(1), 0, 1)  # (H, W, K)
    squared = ((pixel[..., None, :] - coverage[..., None] * ink) ** 2).sum(-1)
    best = squared.argmin(-1)
    return best, np.take_along_axis(coverage, best[..., None], -1)[..., 0]


@lru_cache(maxsize=1)
def _outlines() -> np.ndarray:
    """Return (kinds, shifts, window): every shape's coverage at every shift, centred and of length 1."""
    side = PITCH + 2 * SHIFT
    rows = np.zeros((len(SHAPES), 2 * SHIFT + 1, 2 * SHIFT + 1, side, side))
    for k, kind in enumerate(SHAPES):
        for y in range(2 * SHIFT + 1):
            for x in range(2 * SHIFT + 1):
                rows[k, y, x, y : y + PITCH, x : x + PITCH] = shape_coverage(kind)
    flat = rows.reshape(len(SHAPES), -1, side * side)
    flat = flat - flat.mean(-1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=-1, keepdims=True)


def find_shapes(image: np.ndarray) -> list[DrawnShape]:
    """Find the shapes in an image (32, 64, 3) uint8: patches of one ink, each the kind whose outline it correlates with most."""
    from scipy import ndimage

    inks, coverage = unmix(image)
    shapes: list[DrawnShape] = []
    for number, colour in enumerate(COLOURS):
        mask = (inks == number) & (coverage > 0.5)
        if mask.sum() < SMALLEST:
            continue
        # without an output array it is always the pair; an opening by 2x2 px separates touching shapes
        labels, _ = cast(tuple[np.ndarray, int], ndimage.label(ndimage.binary_opening(mask, np.ones((2, 2)))))
        areas = np.bincount(labels.ravel())[1:]
        for i, (area, box) in enumerate(zip(areas, ndimage.find_objects(labels), strict=True), 1):
            if area >= SMALLEST:
                shapes += _shape(colour, labels == i, np.where(inks == number, coverage, 0.0), box)
    return sorted(shapes, key=lambda shape: (-shape.likeness, shape.box))


def _shape(colour: str, mask: np.ndarray, coverage: np.ndarray, box: Sequence[slice]) -> list[DrawnShape]:
    """Return the shape of one patch; none where no outline is like it."""
    from scipy import ndimage

    rows, columns = box
    side = PITCH + 2 * SHIFT
    top, left = (rows.start + rows.stop - side) // 2, (columns.start + columns.stop - side) // 2
    near = ndimage.binary_dilation(mask)  # with its soft edge, but without its neighbours
    sheet = np.pad(np.where(near, coverage, 0.0), side)
    window = sheet[top + side : top + 2 * side, left + side : left + 2 * side].ravel()
    window = window - window.mean()
    likeness = (_outlines() @ (window / max(float(np.linalg.norm(window)), 1e-9))).max(1)
    best = int(likeness.argmax())
    if likeness[best] < UNLIKE:
        return []
    place = (columns.start, rows.start, columns.stop, rows.stop)
    return [DrawnShape(SHAPES[best], colour, place, float(likeness[best]), mask)]


def text_lines(image: np.ndarray) -> list[np.ndarray]:
    """Cut an image (H, W, 3) uint8 that holds at most two lines of text, each about H / 2 high, into them; none where there is no ink.

    More than a line and a quarter of ink is two lines; the cut is the row with the least ink near the middle.
    """
    height = len(image)
    line, pixel = height // 2, max(height // HEIGHT, 1)  # a line, and a pixel of a drawing
    ink = np.abs(image.astype(np.float64) - paper_of(image)).sum(-1)
    rows = np.flatnonzero((ink > 150).sum(1) >= 2 * pixel)
    if not len(rows):
        return []
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    if bottom - top <= 1.25 * line:
        start = min(max((top + bottom - line) // 2 - pixel, 0), height - line - 2 * pixel)
        return [image[start : start + line + 2 * pixel]]
    first = line - 3 * pixel
    cut = first + int(ink.sum(1)[first : line + 3 * pixel].argmin())
    return [image[: cut + pixel], image[cut:]]
