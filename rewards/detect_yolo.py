"""Runs the YOLO detector of ultralytics for the 80 classes of COCO, for users who accept its licence, AGPL-3.0.

Code and weights of ultralytics are under the AGPL-3.0: nothing of it is part of this package, it is imported only when this detector
is asked for, and that says so once in every process. A `.pt` file is a pickle and opening it runs what is in it; so no run downloads
it. The user gives the file, as `GPOBENCH_WEIGHTS/ultralytics/yolo11n.pt` or any path in GPOBENCH_YOLO, or asks for it by name with
`gpobench fetch --scorer geneval:yolo`. No masks. Images are processed one at a time: a row depends on its own image only.
"""

import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.assets import downloads, weight_store
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images
from .detectors import RENAMED, Detection

PLACE, NAME = "ultralytics", "yolo11n.pt"
# Where ultralytics 8.4.190 itself fetches it (utils/downloads.py). Its hash is published nowhere: the first fetch pins it.
WEIGHTS = weight_store.PublishedWeights(
    PLACE, NAME, f"https://github.com/ultralytics/assets/releases/download/v8.4.0/{NAME}", pickled=True
)
CONFIDENCE, OVERLAP, MOST = (
    0.05,
    0.7,
    300,
)  # a low floor, because the rule sets the threshold; NMS and limit are the engine's own
LICENCE = "ultralytics is under the AGPL-3.0, code and weights: a service or a product that builds on it must be, too"
# Read by ultralytics at import: it must not use the network, install packages or write into the home folder.
QUIET = {
    "YOLO_OFFLINE": "1",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    "YOLO_CONFIG_DIR": str(Path(tempfile.gettempdir(), "gpobench-ultralytics")),
}


class Yolo:
    """Detects objects with a YOLO model, at the image size its checkpoint was trained at."""

    name = "yolo"

    def __init__(self, weights: Path) -> None:
        """Load the model.

        Raises Missing without ultralytics, UserError for a file that is no detection model of it and one whose weights are not finite.
        """
        from PIL import Image

        for key, value in QUIET.items():
            os.environ.setdefault(key, value)
        Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
        try:
            from ultralytics import YOLO
        except ImportError as error:
            raise Missing(
                f"the detector 'yolo' needs ultralytics ({error}); install with: pip install 'gpobench[yolo]' ({LICENCE})"
            ) from None
        warnings.warn(LICENCE, stacklevel=2)
        if weights.suffix != ".pt" or not weights.is_file():
            raise Missing(f"the detector 'yolo' finds no .pt file at {weights}")
        try:
            self._engine: Any = YOLO(str(weights), task="detect")
            named: dict[int, str] = self._engine.names
        except Exception as error:  # whatever a pickle of another kind raises
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{weights} does not hold a YOLO model: {lines[0]}") from error
        check_finite(self._engine.model.state_dict(), weights)
        self._picture = Image.fromarray
        self.side = int(self._engine.overrides.get("imgsz", 640))
        self.labels = [RENAMED.get(name, name) for _, name in sorted(named.items())]
        self.classes: Sequence[str] = tuple(dict.fromkeys(self.labels))
        settings = f"{self.side}-{CONFIDENCE}-{OVERLAP}-{MOST}"
        self.id = f"yolo-1[{settings}]/ultralytics-{metadata.version('ultralytics')}/{weights.stem}@{weight_store.short_digest(weights)}"

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Map (B, H, W, 3) to B lists, best first; raises what the engine raises."""
        return [self._look(image) for image in images]

    def _look(self, image: np.ndarray) -> list[Detection]:
        (result,) = self._engine.predict(
            self._picture(np.ascontiguousarray(image)),  # arrays would be read as blue, green, red
            imgsz=self.side,
            conf=CONFIDENCE,
            iou=OVERLAP,
            max_det=MOST,
            device=weight_store.device(),
            verbose=False,
        )
        boxes = result.boxes.cpu()
        rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
        return sorted(
            (Detection(self.labels[int(k)], s, (*box,)) for k, s, box in rows), key=lambda detection: -detection.score
        )


def yolo() -> Yolo:
    """Make the detector with the weights of GPOBENCH_YOLO (a path, or a name in the folder ultralytics), else yolo11n; else Missing."""
    if chosen := os.environ.get("GPOBENCH_YOLO"):
        return Yolo(_chosen_file(Path(chosen)))
    try:
        weights = WEIGHTS.find()
    except Missing as missing:
        raise Missing(f"the detector 'yolo': {missing}, or name a .pt file in GPOBENCH_YOLO ({LICENCE})") from None
    return Yolo(weights)


def _chosen_file(path: Path) -> Path:
    """Return the file that the user chose, logged under its own name; Missing where there is none."""
    if path.is_file():
        return downloads.log_download(downloads.DownloadRequest("file", PLACE, (path.name,), "", path))
    stored = weight_store.given_by_hand(PLACE, path.name)
    if stored is None:
        raise Missing(f"GPOBENCH_YOLO names no file, and none in the folder {PLACE} of weights: {path} ({LICENCE})")
    return stored
