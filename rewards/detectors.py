"""Detector interface: maps an image to labelled boxes with scores and masks, whichever network finds them."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol

import numpy as np

from ..bench import registry
from ..bench.spec import Images


class Detection(NamedTuple):
    """One detected object."""

    label: str  # in the prompts' words: `computer mouse`, not COCO's `mouse`
    score: float
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    mask: np.ndarray | None = None  # (H, W) bool; None where the engine draws boxes only


class Detector(Protocol):
    """Finds objects. It raises when it fails; it never returns fewer lists than images."""

    id: str  # engine, version, weights revision, settings
    name: str  # the variant: mask2former, rtdetr ...
    classes: Sequence[str]  # what it can find

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Map (B, H, W, 3) to B lists, every class, before any threshold of a rule."""
        ...


# Each is `module:function` of a function without arguments. Imported on use: most need an optional package.
DETECTORS: Mapping[str, str] = {
    "mask2former": ".detect_transformers:mask2former",
    "rtdetr": ".detect_transformers:rtdetr",
    "dfine": ".detect_transformers:dfine",
    "mmdet": ".detect_mmdet:mask2former",
    "yolo": ".detect_yolo:yolo",
    "palette": ".palette:detector",
    "shapes": ".detect_shapes:detector",
}


def open_detector(name: str) -> Detector:
    """Open the detector of that name; Missing where its package or its weights are absent, UserError for an unknown name."""
    if name not in DETECTORS:
        raise registry.unknown("detector", name, DETECTORS)
    module, _, function = DETECTORS[name].partition(":")
    make: Callable[[], Detector] = getattr(import_module(module, __package__), function)
    return make()


# COCO's 80 names in the order of the classes of a detector trained on it, with the three that GenEval renames.
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
