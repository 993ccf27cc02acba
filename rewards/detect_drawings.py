"""Held-out detector for `tiny` 2: a small network finds the shapes of `drawings` and names their colours.

It was trained by `drawings_recipe.py` on shapes drawn by other code, in other sizes and proportions and mostly in colours that are near
a name without being it. So it shares neither rule nor constant with the detector that methods are trained on (`detect_outlines.py`).
It is a CenterNet as `detect_shapes.py` is, with one more group of maps: the colour of the shape whose centre is in a cell.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bench.assets.drawings import COLOURS, SHAPES
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images
from .detect_shapes import CALIBRATION, STRIDE, network, peaks
from .detectors import Detection
from .reader import HEIGHT, WIDTH, apply_in_chunks

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = len(SHAPES) + 4 + len(COLOURS)  # maps: kinds, box, colours
WEIGHTS = Path(__file__).with_name("drawings.safetensors")


class DrawingsDetector:
    """Detects shapes with the trained network; boxes only."""

    name = "drawings"
    classes: Sequence[str] = SHAPES

    def __init__(self, weights: Path = WEIGHTS) -> None:
        from safetensors.torch import load

        if not weights.exists():
            raise Missing(
                f"the detector of drawings has no weights at {weights}; make them with: gpobench pretrain drawings"
            )
        raw = weights.read_bytes()
        self.network = network(OUTPUTS).eval().requires_grad_(False)
        try:
            tensors = {key: value.float() if value.is_floating_point() else value for key, value in load(raw).items()}
            self.calibration = tensors.pop(CALIBRATION)
            self.network.load_state_dict(tensors)
        except Exception as error:
            raise UserError(
                f"{weights} does not hold the weights of the detector of drawings: {str(error).splitlines()[0]}"
            ) from error
        check_finite({CALIBRATION: self.calibration, **self.network.state_dict()}, weights)
        self.id = f"drawings-1/centres@{sha256(raw).hexdigest()[:8]}"

    def maps(self, images: Images) -> "Tensor":
        """Map (B, 32, 64, 3) uint8 to (B, OUTPUTS, 16, 32); a row depends on its own image only."""
        if images.shape[1:] != (HEIGHT, WIDTH, 3):
            raise ValueError(f"the detector of drawings looks at pictures of (32, 64, 3), got {images.shape[1:]}")
        return apply_in_chunks(self.network, images)

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Map (B, 32, 64, 3) to B lists of detections; ValueError for another shape."""
        return peaks(self.maps(images), self.calibration, SHAPES)


class DrawingsColours:
    """Names the colour that the network gives the cell of an object's centre."""

    def __init__(self, detector: DrawingsDetector) -> None:
        self.detector = detector
        self.id = f"{detector.id.partition('/')[0]}-colours"

    def __call__(self, image: np.ndarray, objects: Sequence[Detection]) -> list[str]:
        """Return the colour of each object."""
        logits = self.detector.maps(image[None])[0, len(SHAPES) + 4 :].numpy()
        high, wide = logits.shape[1:]
        names, colours = list(COLOURS), list[str]()
        for thing in objects:
            x1, y1, x2, y2 = thing.box
            x, y = int((x1 + x2) / 2 / STRIDE), int((y1 + y2) / 2 / STRIDE)
            colours.append(names[int(logits[:, min(max(y, 0), high - 1), min(max(x, 0), wide - 1)].argmax())])
        return colours
