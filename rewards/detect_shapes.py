"""Detector of the held-out shape scorer: a small network finds circles, squares and triangles of any colour in 64x32 images.

It was trained by `shapes_recipe.py` on other shapes, in random colours on random backgrounds, so it shares neither rule nor constant
with the palette counter that methods are trained on. Objects are points (CenterNet, Zhou et al. 2019, arXiv 1904.07850): one
map a class whose local maxima are centres, four more for where in its cell the centre is and how large the box around it. A score is
calibrated: 0.9, the threshold of GenEval's counting rule, is where degraded images are counted best.

On 405 images of the embedded model it counted as the palette counter did in 86 %, and within one in 98 %. On inspection, most of the others
are squares and circles with a soft corner, which the palette counter classifies as another kind.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bench.assets.finite import check_finite
from ..bench.assets.glyphs import SHAPES
from ..bench.errors import Missing, UserError
from ..bench.spec import Images
from .detectors import Detection
from .reader import HEIGHT, WIDTH, apply_in_chunks

if TYPE_CHECKING:
    from torch import Tensor, nn

STRIDE = 2  # px a cell of the maps
FLOOR = 0.05  # peaks with a lower score are dropped
WEIGHTS = Path(__file__).with_name("shapes.safetensors")
CALIBRATION = "calibration"  # the tensor (2,) in the weights file: score = sigmoid(a * logit + b)


def network(outputs: int = len(SHAPES) + 4) -> "nn.Sequential":
    """Build the network: (B, 3, 32, 64) standardised images -> (B, outputs, 16, 32), kinds' logits, dx, dy, log width, log height.

    Cells of 2 px resolve edges, cells of 4 px cover the neighbourhood; a pixel shuffle maps the latter back to cells of 2 px.
    """
    from torch import nn

    def conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *conv(3, 24, 5, stride=2),  # 16 x 32
        *conv(24, 40),
        *conv(40, 80, stride=2),  # 8 x 16
        *conv(80, 80),
        *conv(80, 80),
        *conv(80, 192, 1),
        nn.PixelShuffle(2),  # 48 channels, 16 x 32
        *conv(48, 56),
        nn.Conv2d(56, outputs, 1),
    )


def peaks(maps: "Tensor", calibration: "Tensor", kinds: Sequence[str] = SHAPES) -> list[list[Detection]]:
    """Return the local maxima of each kind's map, best first, scores above FLOOR, boxes in pixels; from (B, kinds + 4, 16, 32) and (2,)."""
    import torch
    import torch.nn.functional as F

    logits = maps[:, : len(kinds)]
    scores = torch.sigmoid(calibration[0] * logits + calibration[1])
    top = (F.max_pool2d(logits, 3, 1, 1) == logits) & (scores > FLOOR)
    detections: list[list[Detection]] = [[] for _ in range(len(maps))]
    for row, kind, y, x in torch.nonzero(top).tolist():
        dx, dy, w, h = maps[row, len(kinds) : len(kinds) + 4, y, x].tolist()
        cx, cy, w, h = (x + 0.5 + dx) * STRIDE, (y + 0.5 + dy) * STRIDE, float(np.exp(w)), float(np.exp(h))
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        detections[row].append(Detection(kinds[int(kind)], float(scores[row, kind, y, x]), box))
    for row in detections:
        row.sort(key=lambda detection: -detection.score)
    return detections


class ShapesDetector:
    """Detects shapes with the trained network; boxes only."""

    name = "shapes"
    classes: Sequence[str] = SHAPES

    def __init__(self, weights: Path = WEIGHTS) -> None:
        from safetensors.torch import load

        if not weights.exists():
            raise Missing(
                f"the held-out shape detector has no weights at {weights}; make them with: gpobench pretrain shapes"
            )
        raw = weights.read_bytes()
        self.network = network().eval().requires_grad_(False)
        try:
            tensors = {key: value.float() if value.is_floating_point() else value for key, value in load(raw).items()}
            self.calibration = tensors.pop(CALIBRATION)
            self.network.load_state_dict(tensors)
        except Exception as error:
            raise UserError(
                f"{weights} does not hold the weights of the shape detector: {str(error).splitlines()[0]}"
            ) from error
        check_finite({CALIBRATION: self.calibration, **self.network.state_dict()}, weights)
        self.id = f"shapes-1/centres@{sha256(raw).hexdigest()[:8]}"

    def maps(self, images: Images) -> "Tensor":
        """Map (B, 32, 64, 3) uint8 to (B, 7, 16, 32); a row depends on its own image only."""
        if images.shape[1:] != (HEIGHT, WIDTH, 3):
            raise ValueError(f"the shape detector looks at pictures of (32, 64, 3), got {images.shape[1:]}")
        return apply_in_chunks(self.network, images)

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Map (B, 32, 64, 3) to B lists of detections; ValueError for another shape."""
        return peaks(self.maps(images), self.calibration)


@lru_cache(maxsize=1)
def recipe_facts() -> dict[str, object]:
    """Read the recipe's record: how the shipped weights were made and how accurately they count."""
    facts: dict[str, object] = json.loads(WEIGHTS.with_suffix(".json").read_text("utf-8"))
    return facts


def detector() -> ShapesDetector:
    """Make the detector; Missing where its weights are absent."""
    return ShapesDetector()
