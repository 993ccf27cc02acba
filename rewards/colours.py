"""Colour classifier of GenEval: cuts an object out on grey and assigns the nearest of ten colour words.

GenEval's colour classifier (arXiv 2310.11513; evaluation/evaluate_images.py of djghosh13/geneval at af4902f): OpenAI's CLIP ViT-L/14
through open_clip, three templates a colour, the object's mask composited on #999 and cropped to its box. The network's activation is
QuickGELU; current open_clip enables it only where the architecture's name says so, and without it every number changes without an error.
For the embedded model's images, which have three shape colours, `PaletteColours` does the same without a network.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..bench.assets import weight_store
from ..bench.assets.glyphs import SHAPE_COLOURS
from ..bench.errors import Missing, UserError
from .detectors import Detection
from .geneval_rules import COLOURS
from .palette import PALETTE

CLIP_MODEL = "ViT-L-14-quickgelu"
# OpenAI's weights as open_clip's tag `openai` names them on the hub; through bench/assets/weight_store.py, so that a user's
# own folder can hold them.
REPOSITORY, FILE = "timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"
BGCOLOR = "#999"  # outside the mask
TEMPLATES = ("a photo of a {c} {cls}", "a photo of a {c}-colored {cls}", "a photo of a {c} object")


class ColourClassifier(Protocol):
    """Names the colours of the objects in one image."""

    id: str

    def __call__(self, image: np.ndarray, objects: Sequence[Detection]) -> list[str]:
        """Map (H, W, 3) uint8 RGB and its objects to one colour name each; an object's colour does not depend on the others."""
        ...


def cut_out(image: np.ndarray, thing: Detection) -> Any:
    """Return a PIL image of one object: grey outside its mask, cropped to its box; without a mask the background stays, as published.

    The edges of the box are rounded as PIL rounds; a side that rounds to 0 becomes one pixel. ValueError for a mask of another size.
    """
    from PIL import Image

    picture = Image.fromarray(image)
    if thing.mask is not None:
        if thing.mask.shape != image.shape[:2]:
            raise ValueError(f"a mask of {thing.mask.shape} does not fit a picture of {image.shape[:2]}")
        grey = Image.new("RGB", picture.size, BGCOLOR)
        picture = Image.composite(picture, grey, Image.fromarray(thing.mask))
    x1, y1, x2, y2 = (round(edge) for edge in thing.box)
    return picture.crop((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))


class ClipColours:
    """The published classifier, run on batches of `rows` objects, the last one padded: kernels depend on the number of rows."""

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Any], Any],
        tokenizer: Callable[[list[str]], Any],
        *,
        id: str,
        device: str = "cpu",
        rows: int = 1,
    ) -> None:
        """Keep what open_clip makes for one architecture: model, preprocess (of validation) and tokenizer."""
        self.id = id
        self._model = model.to(device).eval().requires_grad_(False)
        self._preprocess, self._tokenizer = preprocess, tokenizer
        self._device, self._rows = device, rows
        self._words: dict[str, Any] = {}  # class -> (10, D) unit vectors

    def words(self, name: str) -> Any:
        """Return (10, D), a unit vector for each colour: the mean of its three sentences' unit vectors, normalised again."""
        import torch

        if name not in self._words:
            sentences = [template.format(c=colour, cls=name) for colour in COLOURS for template in TEMPLATES]
            with torch.inference_mode():
                each = self._model.encode_text(self._tokenizer(sentences).to(self._device)).float()
                each = torch.nn.functional.normalize(each, dim=-1).view(len(COLOURS), len(TEMPLATES), -1)
                self._words[name] = torch.nn.functional.normalize(each.mean(1), dim=-1)
        return self._words[name]

    def likeness(self, image: np.ndarray, objects: Sequence[Detection]) -> np.ndarray:
        """Return (n, 10) float32: the cosine of every object with every colour."""
        import torch

        pictures = [self._preprocess(cut_out(image, thing)) for thing in objects]
        out: list[np.ndarray] = []
        with torch.inference_mode():
            for start in range(0, len(pictures), self._rows):
                part = torch.stack(pictures[start : start + self._rows])
                full = torch.zeros(self._rows, *part.shape[1:])
                full[: len(part)] = part
                features = self._model.encode_image(full.to(self._device)).float()[: len(part)]
                words = [self.words(thing.label) for thing in objects[start : start + self._rows]]
                features = torch.nn.functional.normalize(features, dim=-1)
                out += [(features[i] * words[i]).sum(-1).cpu().numpy() for i in range(len(part))]
        return np.array(out, np.float32).reshape(len(objects), len(COLOURS))

    def __call__(self, image: np.ndarray, objects: Sequence[Detection]) -> list[str]:
        """Return the colour with the highest cosine for each object."""
        return [COLOURS[i] for i in self.likeness(image, objects).argmax(1)]


def clip_id() -> str:
    """Return the published classifier's part of a scorer id, without loading the classifier.

    Weights from the hub are named by their tag, `openai`, of which there has been one release; a user's own file by its digest as well.
    """
    root = os.environ.get("GPOBENCH_WEIGHTS", "")
    user_file = Path(root, REPOSITORY, FILE)
    return f"clip-{CLIP_MODEL}-openai{f'@{weight_store.short_digest(user_file)}' if root and user_file.is_file() else ''}-999-crop"


def open_clip_colours(architecture: str = CLIP_MODEL, weights: Path | None = None) -> ClipColours:
    """Load the published classifier from `weights` or the hub's file; Missing where open_clip or the weights are absent."""
    try:
        import open_clip
    except ImportError:
        raise Missing(
            "GenEval's colour classifier needs open_clip; install with: pip install 'gpobench[clip]'"
        ) from None
    path = weights or weight_store.file(REPOSITORY, FILE)
    device = weight_store.device()
    try:
        model_and_transforms: Any = open_clip.create_model_and_transforms(architecture, pretrained=str(path))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} does not hold the weights of {architecture}: {message}") from error
    model, _, preprocess = model_and_transforms  # the second transform augments, the third is that of validation
    tokenizer = open_clip.get_tokenizer(architecture)
    return ClipColours(model, preprocess, tokenizer, id=clip_id(), device=device, rows=16 if device != "cpu" else 1)


class PaletteColours:
    """Assigns the palette colour nearest to most pixels of an object: exact for the embedded model's three colours."""

    id = "palette-colours-1"

    def __call__(self, image: np.ndarray, objects: Sequence[Detection]) -> list[str]:
        """Return the colour of each object, from the pixels of its mask, or of its box where it has none."""
        return [palette_colour(image, thing) for thing in objects]


def palette_colour(image: np.ndarray, thing: Detection) -> str:
    """Return the shape colour nearest to most pixels inside the mask (else the box); the first in `SHAPE_COLOURS` of a tie.

    Pixels nearest to a paper are not counted, so a box around a small shape gets the shape's colour; `paper` where there are no others.
    """
    if thing.mask is not None:
        pixels = image[thing.mask]
    else:
        x1, y1, x2, y2 = (max(0, round(edge)) for edge in thing.box)
        pixels = image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].reshape(-1, 3)
    nearest = ((pixels.astype(np.float32)[:, None] - PALETTE) ** 2).sum(-1).argmin(-1)
    votes = np.bincount(nearest, minlength=len(PALETTE))[: len(SHAPE_COLOURS)]
    return list(SHAPE_COLOURS)[int(votes.argmax())] if votes.any() else "paper"
