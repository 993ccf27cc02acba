"""Runs GenEval's own detector, Mask2Former of mmdet, in the oldest version of mmdet that still installs: 3.3, not the paper's 2.27.

The checkpoint is the conversion for mmdet 3 of the training run that GenEval uses (`_20220504_001756`, box AP 49.3); the code
around it is another version, so numbers may differ from the published ones where nobody has measured, and the id says 3.3. mmdet
imports the compiled operators of mmcv (`mmcv._ext`); no wheel of them exists for current torch: build mmcv 2.1 from source, best in an
environment of its own. Images are processed one at a time, as arrays in the channel order blue, green, red that mmdet expects.
"""

import warnings
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.assets import weight_store
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images
from .detectors import RENAMED, Detection

FLOOR = 0.05  # lower scores are dropped here: no rule has a lower threshold, and masks are large
CONFIG = "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco"
CHECKPOINT = f"{CONFIG}_20220504_001756-c9d0c4f2.pth"
# The address that the wheel's own model zoo has (metafile.yml); the end of the name is the beginning of the sha256
# (mmdet's tools/model_converters/publish_model.py).
WEIGHTS = weight_store.PublishedWeights(
    "open-mmlab",
    CHECKPOINT,
    f"https://download.openmmlab.com/mmdetection/v3.0/mask2former/{CONFIG}/{CHECKPOINT}",
    begins="c9d0c4f2",
)


class MMDet:
    """Detects objects with a model of mmdet, with their masks where the model predicts masks."""

    name = "mmdet"

    def __init__(self, config: Any, weights: Path) -> None:
        """Build the model; config: mmdet's file or an mmengine Config. Raises Missing without compiled mmcv, UserError on other weights."""
        _installed()
        with warnings.catch_warnings(
            record=True
        ):  # it warns that it was given no checkpoint, which is loaded strictly below
            from mmdet.apis import inference_detector, init_detector
            from mmengine.config import Config

            settings = Config.fromfile(config) if isinstance(config, Path) else config
            self._network: Any = init_detector(settings, None, palette="random", device=weight_store.device())
        self._infer: Any = inference_detector
        checkpoint = _weights(weights)
        try:
            self._network.load_state_dict(checkpoint["state_dict"])
        except (KeyError, RuntimeError) as error:
            lines = [line.strip() for line in str(error).strip().splitlines()]
            raise UserError(f"{weights} does not hold the weights of {CONFIG}: {' '.join(lines[:2])[:200]}") from error
        check_finite(self._network.state_dict(), weights)
        dataset_meta: Any = checkpoint.get("meta", {}).get("dataset_meta") or self._network.dataset_meta
        names: list[str] = list(dataset_meta.get("classes", dataset_meta.get("CLASSES", ())))
        self.labels = [RENAMED.get(name, name) for name in names]
        self.classes: Sequence[str] = tuple(dict.fromkeys(self.labels))
        engines = "+".join(f"{name}-{metadata.version(name)}" for name in ("mmdet", "mmengine"))
        self.id = f"mmdet-1[{FLOOR}]/{engines}/{weights.stem}@{weight_store.short_digest(weights)}"

    def __call__(self, images: Images) -> list[list[Detection]]:
        """Map (B, H, W, 3) to B lists, best first; raises what the engine raises."""
        return [self._look(image) for image in images]

    def _look(self, image: np.ndarray) -> list[Detection]:
        instances: Any = self._infer(self._network, np.ascontiguousarray(image[..., ::-1])).pred_instances.cpu()
        masks = instances.masks.numpy().astype(bool) if "masks" in instances else [None] * len(instances)
        rows = zip(instances.labels.tolist(), instances.scores.tolist(), instances.bboxes.tolist(), masks, strict=True)
        detections = [Detection(self.labels[k], score, (*box,), mask) for k, score, box, mask in rows if score > FLOOR]
        return sorted(detections, key=lambda detection: -detection.score)


def _installed() -> None:
    """Raise Missing, naming what to install, where mmdet or the compiled part of mmcv is absent."""
    if util.find_spec("mmdet") is None:
        raise Missing(
            "the detector 'mmdet' needs mmdet; install with: pip install 'gpobench[mmdet]', and mmcv 2.1 built from source"
        )
    if util.find_spec("mmcv._ext") is None:
        raise Missing(
            "the detector 'mmdet' needs mmcv with its compiled operators (mmcv._ext is not there); build them with: "
            "pip uninstall mmcv-lite && MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==2.1.0"
        )


def _weights(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors, names and the arrays of its training log; nothing that could run code is unpickled.

    A training log refers to its own methods through `getattr`; they are not needed, so `_nothing` replaces that name.
    """
    import pickle

    import torch
    from mmengine.logging import HistoryBuffer

    numpy: Any = np
    multiarray = numpy._core.multiarray
    numbers = [np.ndarray, np.dtype, np.float64, type(np.dtype("float64")), type(np.dtype("int64"))]
    plain: list[Any] = [
        HistoryBuffer,
        (_nothing, "builtins.getattr"),
        *numbers,
        multiarray._reconstruct,
        multiarray.scalar,
    ]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        named = [line for line in str(error).splitlines() if "GLOBAL" in line] or [str(error).strip().splitlines()[0]]
        raise UserError(f"{path} is not a checkpoint of weights alone: {named[0].strip()[:160]}") from error


def _nothing(*of: object) -> None:
    """Replace a name in a checkpoint that is not needed."""


def config_file() -> Path:
    """Return the settings file of GenEval's model inside the installed mmdet package."""
    spec = util.find_spec("mmdet")
    if spec is None or spec.origin is None:
        raise Missing(
            "the detector 'mmdet' needs mmdet; install with: pip install 'gpobench[mmdet]', and mmcv 2.1 built from source"
        )
    return Path(spec.origin).parent / ".mim" / "configs" / "mask2former" / f"{CONFIG}.py"


def mask2former() -> MMDet:
    """Make GenEval's detector; Missing where mmcv's operators are absent or the checkpoint cannot be fetched."""
    _installed()
    return MMDet(config_file(), WEIGHTS.find())
