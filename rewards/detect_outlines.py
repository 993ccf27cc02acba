"""Detector of the training scorer for `tiny` 2: finds shapes by their colour and outline, without a network.

Its rules are those of `bench/assets/drawn.py`: a pixel is a mixture of paper and one ink, a patch is the kind whose outline it is most
like. The held-out detector (`detect_drawings.py`) is a network and shares none of them.
"""

from collections.abc import Sequence

import numpy as np

from ..bench.assets.drawings import COLOURS, HEIGHT, SHAPES, WIDTH
from ..bench.assets.drawn import find_shapes, unmix
from ..bench.spec import Images
from .detectors import Detection


class Outlines:
    """Detects shapes by their outlines. The score is 0.91 + 0.09 times the likeness: above GenEval's counting threshold of 0.9."""

    id = "outlines-1"
    name = "outlines"
    classes: Sequence[str] = SHAPES

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Map (B, 32, 64, 3) uint8 to B lists; a row depends on its own image only. ValueError for another shape."""
        if images.shape[1:] != (HEIGHT, WIDTH, 3):
            raise ValueError(f"outlines are looked for in pictures of ({HEIGHT}, {WIDTH}, 3), got {images.shape[1:]}")
        detections: list[list[Detection]] = []
        for image in images:
            detections.append([])
            for shape in find_shapes(image):
                x1, y1, x2, y2 = map(float, shape.box)
                score = 0.91 + 0.09 * min(shape.likeness, 1.0)
                detections[-1].append(Detection(shape.kind, score, (x1, y1, x2, y2), shape.mask))
        return detections


class OutlineColours:
    """Names the ink that most of an object's pixels are mixed of; the object needs a mask."""

    id = "unmixed-colours-1"

    def __call__(self, image: np.ndarray, objects: Sequence[Detection]) -> list[str]:
        """Return the colour of each object."""
        inks, _ = unmix(image)
        names = list(COLOURS)
        colours: list[str] = []
        for thing in objects:
            if thing.mask is None:
                raise ValueError(f"the colour of a {thing.label} is taken from its mask, and it has none")
            colours.append(names[int(np.bincount(inks[thing.mask], minlength=len(names)).argmax())])
        return colours
