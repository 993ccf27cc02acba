"""Palette counter: assigns each pixel to the nearest known colour, removes specks, and counts the patches of one colour."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from ..bench.assets.glyphs import PAPERS, SHAPE_COLOURS, SHAPES
from ..bench.spec import Images
from .detectors import Detection

SMALLEST = 12  # pixels; the smallest clean shape, a triangle, covers about 40
PALETTE = np.array([*SHAPE_COLOURS.values(), *PAPERS.values()], np.float32)  # shape colours first, then papers
# Neighbours are the four pixels beside one, in the same plane of a stack (planes, H, W).
BESIDE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))], bool)


class Blob(NamedTuple):
    """One connected patch of a colour."""

    area: int  # pixels
    fill: float  # of its bounding box; at 9 px a square has 1, a disc .94, a triangle .62 to .67
    kind: str  # the shape with the nearest fill


class Patch(NamedTuple):
    """A blob and its position."""

    plane: int  # of the stack it was found in
    blob: Blob
    place: tuple[slice, slice]  # rows and columns of its bounding box
    inside: np.ndarray  # bool, within the bounding box


def _gaps(images: np.ndarray) -> np.ndarray:
    """Return (..., H, W, colours): squared distance to each colour minus |x|^2, which is the same for all; exact integers."""
    return (PALETTE**2).sum(-1) - 2 * (images.astype(np.float32) @ PALETTE.T)


def masks(images: np.ndarray, colour: str) -> np.ndarray:
    """Return (..., H, W) bool: pixels at least as near to this shape colour as to any other and to any paper."""
    if colour not in SHAPE_COLOURS:
        raise ValueError(f"no shape colour called {colour!r}; there are {', '.join(SHAPE_COLOURS)}")
    gaps = _gaps(images)
    return gaps[..., list(SHAPE_COLOURS).index(colour)] == gaps.min(-1)


def patches(stack: np.ndarray) -> list[Patch]:
    """Find the patches in planes (N, H, W) bool, plane by plane, after an opening by 2x2 pixels that separates touching shapes."""
    from scipy import ndimage

    # A pixel stays where it lies in some 2x2 square of pixels that are all set.
    corner = stack[:, :-1, :-1] & stack[:, 1:, :-1] & stack[:, :-1, 1:] & stack[:, 1:, 1:]
    opened = np.zeros_like(stack)
    for y in (slice(None, -1), slice(1, None)):
        for x in (slice(None, -1), slice(1, None)):
            opened[:, y, x] |= corner
    labels, n_labels = cast(tuple[np.ndarray, int], ndimage.label(opened, BESIDE))
    areas = np.bincount(labels.ravel(), minlength=n_labels + 1)[1:]
    out: list[Patch] = []
    for i, (area, (planes, rows, columns)) in enumerate(zip(areas, ndimage.find_objects(labels), strict=True), 1):
        if area >= SMALLEST:
            fill = float(area / ((rows.stop - rows.start) * (columns.stop - columns.start)))
            kind = "square" if fill > 0.97 else "circle" if fill > 0.8 else "triangle"
            inside = labels[planes.start, rows, columns] == i
            out.append(Patch(planes.start, Blob(int(area), fill, kind), (rows, columns), inside))
    return out


def blobs(image: np.ndarray, colour: str) -> list[Blob]:
    """Find the patches of a colour in an image (H, W, 3) uint8."""
    return [patch.blob for patch in patches(masks(image, colour)[None])]


def count(image: np.ndarray, colour: str) -> int:
    """Count the patches of a colour in an image (H, W, 3) uint8."""
    return len(blobs(image, colour))


def count_kind(image: np.ndarray, kind: str, colour: str) -> int:
    """Count the patches of a colour that have the shape `kind`, one of `glyphs.SHAPES`."""
    return sum(blob.kind == kind for blob in blobs(image, colour))


class Palette:
    """Returns the same patches as a detector: every colour's blobs, each a circle, a square or a triangle.

    The score is the certainty of the colour: 0.91 + 0.09 m, where m in [0, 1] is the mean over the blob's pixels of 1 - (distance to its
    colour) / (distance to the next). It always exceeds GenEval's counting threshold of 0.9, so that a rule over these
    detections counts what `count_kind` counts, and ranks the cleanest first.
    """

    id = "palette-1"
    name = "palette"
    classes: Sequence[str] = SHAPES

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Map (B, H, W, 3) uint8 to B lists; a row depends on its own image only."""
        detections: list[list[Detection]] = [[] for _ in images]
        if not images.size:
            return detections
        gaps = _gaps(images)
        stack = (gaps[..., : len(SHAPE_COLOURS)] == gaps.min(-1, keepdims=True)).transpose(0, 3, 1, 2)
        size = images.shape[1:3]
        for patch in patches(np.ascontiguousarray(stack).reshape(-1, *size)):
            row, colour = divmod(patch.plane, len(SHAPE_COLOURS))
            (rows, columns), mask = patch.place, np.zeros(size, bool)
            mask[patch.place] = patch.inside
            score = 0.91 + 0.09 * confidence(images[row][mask], colour)
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            detections[row].append(Detection(patch.blob.kind, score, box, mask))
        return detections


def confidence(pixels: np.ndarray, colour: int) -> float:
    """Return m in [0, 1] for pixels (n, 3) uint8 nearest to a colour: 1 where they have its colour, 0 where another is as near."""
    gaps = np.linalg.norm(pixels.astype(np.float32)[:, None] - PALETTE, axis=-1)
    rest = np.delete(gaps, colour, axis=1).min(1)
    return float(np.clip(1 - gaps[:, colour] / rest, 0, 1).mean())


def detector() -> Palette:
    """Make the detector of the glyph domain: no weights, no packages."""
    return Palette()
