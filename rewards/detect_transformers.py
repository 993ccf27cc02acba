"""Runs detectors of the 80 COCO classes from transformers: Mask2Former predicts masks, RT-DETR and D-FINE boxes only.

Mask2Former (arXiv 2112.01527) is read as mmdet 2.x, GenEval's engine, reads it (`mask2former_head` of open-mmlab/mmdetection, as
documented for v2.27): nothing is assigned exclusively, a query may represent several classes. Its weights come from another training
run than GenEval's checkpoint, so scores differ, GenEval's thresholds were not made for it, and its id says so. RT-DETR (arXiv
2304.08069) and D-FINE (arXiv 2410.13842) are faster and have no masks. Images pass one at a time: a row depends on its own image only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bench.assets import weight_store
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images
from .detectors import RENAMED, Detection

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 0.05  # lower scores are dropped here: no rule has a lower threshold, and masks are large
TOP = 100  # pairs of a query and a class that are kept, as mmdet's max_per_image
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, RGB in 0..255
GREY = 128.0  # grey level of the padding

# Some conversions of COCO detectors carry the names of PASCAL VOC.
VOC = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True)
class ResizeRule:
    """Scales an image, keeping its proportions, to fit into `long` x `short`, and pads it to whole `multiple`s."""

    long: int = 1333  # px
    short: int = 800
    multiple: int = 32

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the image after resizing, before padding, rounded as mmcv rounds."""
        scale = min(self.long / max(height, width), self.short / min(height, width))
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def __str__(self) -> str:
        return f"{self.long}x{self.short}"


class Mask2Former:
    """Detects objects with masks at the image's size, from the folder of a Mask2FormerForUniversalSegmentation.

    Images are prepared as mmdet prepares them and not as the checkpoint's own settings say, because the folder's image size may
    be another: bilinear without antialiasing (OpenCV's way), rounded to whole grey levels, padded with grey on the right and below.
    """

    def __init__(self, name: str, folder: Path, source: str, framing: ResizeRule = ResizeRule()) -> None:
        """source: what the id calls the weights. Raises Missing without transformers, UserError for a folder that does not hold them."""
        self.name, self.framing = name, framing
        self._network: Any = load(name, "Mask2FormerForUniversalSegmentation", folder)
        self.labels = labels(self._network.config.id2label)
        self.classes: Sequence[str] = tuple(dict.fromkeys(self.labels))
        self.id = f"{name}-1[mmdet-like-{framing}-top{TOP}-{FLOOR}]/{_engine()}/{source}@{revision(folder)}"

    def __call__(self, images: Images) -> list[list[Detection]]:
        """(B, H, W, 3) -> B lists, best first; raises what the network raises."""
        return [self._look(image) for image in images]

    def _look(self, image: np.ndarray) -> list[Detection]:
        import torch
        import torch.nn.functional as F

        height, width = image.shape[:2]
        size = self.framing.size(height, width)
        with torch.inference_mode():
            pixels = self.pixels(image).to(self._network.device)
            output = self._network(pixel_values=pixels)
            queries: Tensor = output.masks_queries_logits[0].float()

            def paint(query: int) -> "Tensor":
                """Resize (H, W) mask logits to the padded size, crop the padding, and resize to the image's size."""
                padded = F.interpolate(queries[query][None, None], tuple(pixels.shape[-2:]), mode="bilinear")
                inner = padded[..., : size[0], : size[1]]
                return F.interpolate(inner, (height, width), mode="bilinear")[0, 0]

            return instances(output.class_queries_logits[0].float(), paint, self.labels)

    def pixels(self, image: np.ndarray) -> "Tensor":
        """Map (H, W, 3) uint8 RGB to the network's standardised input (1, 3, h, w)."""
        import torch
        import torch.nn.functional as F

        height, width = self.framing.size(*image.shape[:2])
        planes = torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float()
        planes = F.interpolate(planes, (height, width), mode="bilinear").round()
        below, right = -height % self.framing.multiple, -width % self.framing.multiple
        planes = F.pad(planes, (0, right, 0, below), value=GREY)
        return (planes - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def instances(logits: "Tensor", paint: Callable[[int], "Tensor"], names: Sequence[str]) -> list[Detection]:
    """Convert Mask2Former's output to detections as mmdet does, best first: (Q, C + 1) class logits, null last, (H, W) mask logits a query.

    Of all pairs of a query and a class the TOP most probable are kept; the mask is where its logit is positive; the score is the
    class probability times the mean probability of the mask's pixels; the box is the tightest around it. Empty masks are dropped.
    """
    p = logits.softmax(-1)[:, :-1]
    best, pairs = p.flatten().topk(min(TOP, p.numel()))
    detections: list[Detection] = []
    painted: dict[int, tuple[float, tuple[float, float, float, float], np.ndarray] | None] = {}
    for probability, pair in zip(best.tolist(), pairs.tolist(), strict=True):
        query, label = divmod(int(pair), p.shape[1])
        if probability <= FLOOR:
            break  # the mask's mean probability is at most 1
        if query not in painted:
            painted[query] = _extent(paint(query))
        if (extent := painted[query]) and probability * extent[0] > FLOOR:
            detections.append(Detection(names[label], probability * extent[0], extent[1], extent[2]))
    return sorted(detections, key=lambda detection: -detection.score)


def _extent(mask: "Tensor") -> tuple[float, tuple[float, float, float, float], np.ndarray] | None:
    """Return mean probability inside, tight box and (H, W) bool of (H, W) mask logits; None where the mask is empty."""
    import torch

    inside = mask > 0
    if not bool(inside.any()):
        return None
    rows, columns = (torch.nonzero(inside.any(axis)).flatten().tolist() for axis in (1, 0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return float(mask[inside].sigmoid().mean()), box, inside.cpu().numpy()


class Boxes:
    """Detects objects with boxes, from the folder of an RTDetrForObjectDetection or a DFineForObjectDetection: their outputs agree.

    The image is resized to `side` x `side` by PIL's bilinear filter and scaled to 0..1, as in both trainings. Every query may
    represent several classes; as many pairs of a query and a class are kept as there are queries.
    """

    def __init__(self, name: str, folder: Path, source: str, side: int = 640) -> None:
        """source: what the id calls the weights. Raises Missing without transformers, UserError for a folder that does not hold them."""
        self.name, self.side = name, side
        self._network: Any = load(name, ARCHITECTURES[name], folder)
        self.labels = labels(self._network.config.id2label)
        self.classes: Sequence[str] = tuple(dict.fromkeys(self.labels))
        self.id = f"{name}-1[{side}-{FLOOR}]/{_engine()}/{source}@{revision(folder)}"

    def __call__(self, images: Images) -> list[list[Detection]]:
        """(B, H, W, 3) -> B lists, best first; raises what the network raises."""
        return [self._look(image) for image in images]

    def _look(self, image: np.ndarray) -> list[Detection]:
        import torch

        height, width = image.shape[:2]
        with torch.inference_mode():
            output = self._network(pixel_values=self.pixels(image).to(self._network.device))
            p = output.logits[0].float().sigmoid()
            best, pairs = p.flatten().topk(len(p))
            x, y, w, h = (output.pred_boxes[0].float().cpu() * torch.tensor([width, height] * 2)).unbind(-1)
            corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1).tolist()
        detections: list[Detection] = []
        for score, pair in zip(best.tolist(), pairs.tolist(), strict=True):
            query, label = divmod(int(pair), p.shape[1])
            if score > FLOOR:
                detections.append(Detection(self.labels[label], score, (*corners[query],)))
        return detections

    def pixels(self, image: np.ndarray) -> "Tensor":
        """Map (H, W, 3) uint8 RGB to (1, 3, side, side) in 0..1."""
        import torch
        from PIL import Image

        squeezed = Image.fromarray(np.ascontiguousarray(image)).resize(
            (self.side, self.side), Image.Resampling.BILINEAR
        )
        return torch.from_numpy(np.array(squeezed)).movedim(-1, 0)[None].float() / 255


ARCHITECTURES = {"rtdetr": "RTDetrForObjectDetection", "dfine": "DFineForObjectDetection"}
# Conversions on the hub. None has been loaded in development; each folder must hold config.json and model.safetensors.
SOURCES = {
    "mask2former": "facebook/mask2former-swin-small-coco-instance",
    "rtdetr": "PekingU/rtdetr_r18vd_coco_o365",  # hub id not verified here
    "dfine": "ustc-community/dfine-small-coco",  # hub id not verified here
}


def labels(id2label: Mapping[int, str]) -> list[str]:
    """Return a checkpoint's class names, by index, in the words that prompts use."""
    return [RENAMED.get(name, VOC.get(name, name)) for _, name in sorted(id2label.items())]


def load(name: str, architecture: str, folder: Path) -> Any:
    """Load the network in float32. UserError where the folder lacks one of its weights: transformers would only warn."""
    try:
        import transformers
    except ImportError as error:
        raise Missing(
            f"the detector {name!r} needs transformers ({error}); install with: pip install transformers"
        ) from None
    import torch
    from safetensors import SafetensorError

    if not (folder / "model.safetensors").is_file():
        raise Missing(
            f"the detector {name!r} finds no model.safetensors in {folder}; a pickled checkpoint is not opened"
        )
    try:
        network, loading_info = getattr(transformers, architecture).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold a {architecture}: {str(error).strip().splitlines()[0]}") from error
    # A criterion's buffers serve the training loss only.
    absent = sorted(key for key in loading_info["missing_keys"] if not key.startswith("criterion."))
    absent += sorted(str(key) for key in loading_info["mismatched_keys"])
    if absent:
        raise UserError(f"{folder} lacks {len(absent)} weights of a {architecture}, the first is {absent[0]}")
    check_finite(network.state_dict(), folder)
    return network.eval().requires_grad_(False).to(weight_store.device())


def revision(folder: Path) -> str:
    """Return the digests of weights and settings: both change the detections."""
    return (
        f"{weight_store.short_digest(folder / 'model.safetensors')}+{weight_store.short_digest(folder / 'config.json')}"
    )


def _engine() -> str:
    return f"transformers-{metadata.version('transformers')}"


def _folder(name: str) -> Path:
    return weight_store.folder(SOURCES[name], patterns=("config.json", "model.safetensors"))


def mask2former() -> Mask2Former:
    """Make the substitute for GenEval's detector that installs everywhere; Missing where its weights are absent."""
    return Mask2Former("mask2former", _folder("mask2former"), SOURCES["mask2former"])


def rtdetr() -> Boxes:
    """Make RT-DETR with a ResNet-18, about 20 million parameters; Missing where its weights are absent."""
    return Boxes("rtdetr", _folder("rtdetr"), SOURCES["rtdetr"])


def dfine() -> Boxes:
    """Make D-FINE, size S, about 10 million parameters; Missing where its weights are absent."""
    return Boxes("dfine", _folder("dfine"), SOURCES["dfine"])
