"""Embedders: map images to vectors whose distances measure how much the images differ; CLIP, DINOv2 and LPIPS.

An image is resized to a square of the network's size, not cropped, so that the ends of a wide image count too (CMMD's own
code does the same; for square images there is no difference). Images pass through the network in batches of a fixed size, the last
one padded: a vector depends on its own image only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..bench.assets import weight_store
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Embedder, Images
from . import two_towers

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["cosine", "squared"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of channels in 0..1
CLIPS = {  # variant -> repository
    "l14-336": "openai/clip-vit-large-patch14-336",  # the one of CMMD
    "l14": "openai/clip-vit-large-patch14",
}
DINO = "facebook/dinov2-base"
# torchvision's, which LPIPS was calibrated on; the end of its name is the beginning of its sha256
ALEXNET = weight_store.PublishedWeights(
    "pytorch", "alexnet.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", begins="7be5be79"
)


class Pictures:
    """Embeds images with a network that takes square images."""

    def __init__(
        self,
        name: str,
        distance: Distance,
        network: Callable[[Tensor], Tensor],
        side: int,
        normal: tuple[Sequence[float], Sequence[float]],
        revision: str,
    ) -> None:
        """Keep the network, (B, 3, side, side) standardised by `normal` (mean, deviation) -> (B, D), and its weights' revision."""
        self.name = name
        self.distance: Distance = distance
        self._network, self._normal = network, normal
        self._fit = two_towers.Stretch(side, side)
        self.id = f"{name}@{revision}/{self._fit}/float32"
        self._device = weight_store.device()
        self._rows = 1 if self._device == "cpu" else 16  # a batch gains nothing on a CPU

    def __call__(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Map (B, H, W, 3) uint8 to (B, D); ValueError for another shape or no images, and what the network raises."""
        import torch

        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
            raise ValueError(f"an embedder takes images (B, H, W, 3) of type uint8, got {images.shape} {images.dtype}")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self._normal)
        vectors: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        with torch.inference_mode():
            for start in range(0, len(images), self._rows):
                part = images[start : start + self._rows]
                full = torch.zeros(self._rows, 3, self._fit.height, self._fit.width)
                for row, image in enumerate(part):
                    full[row] = (self._fit(image) - mean) / std
                features = self._network(full.to(self._device))
                if self.distance == "cosine":
                    features = torch.nn.functional.normalize(features, dim=1)
                vectors.append(features[: len(part)].cpu().numpy())
        return np.concatenate(vectors)


def clip(variant: str | None = None) -> Embedder:
    """Make the embedder of CLIP's projected image vector: `l14-336` (default), `l14`, or `tiny`, for the glyph domain, without download."""
    if variant == "tiny":
        return two_towers.tiny_embedder()
    chosen = _variant("clip", variant, [*CLIPS, "tiny"])
    _needs("transformers", f"clip:{chosen}")
    from transformers import CLIPModel

    network, revision = _load(CLIPModel, CLIPS[chosen])
    del network.text_model  # half a gigabyte that images do not need
    return Pictures(
        f"clip-{chosen}",
        "cosine",
        lambda x: two_towers.as_tensor(network.get_image_features(pixel_values=x)),
        int(network.config.vision_config.image_size),
        (two_towers.MEAN, two_towers.STD),
        revision,
    )


def dino(variant: str | None = None) -> Embedder:
    """Make the embedder of DINOv2's class token after the last normalisation; 224 pixels, its published evaluation size."""
    _variant("dino", variant, ["v2-base"])
    _needs("transformers", "dino")
    from transformers import Dinov2Model

    network, revision = _load(Dinov2Model, DINO)
    return Pictures("dino-v2-base", "cosine", lambda x: network(pixel_values=x).pooler_output, 224, IMAGENET, revision)


def lpips(variant: str | None = None) -> Embedder:
    """Make the embedder of LPIPS 0.1 (arXiv 1801.03924) with AlexNet: |a - b|^2 equals the LPIPS of two images, at 224 pixels.

    LPIPS sums, over five layers, the mean over places of the weighted squared difference of features of length 1. So the features,
    times the root of the weights, over the root of the number of places, one behind the other, are a vector: 484,992 numbers or
    1.9 MB an image. Compute the distances prompt by prompt and free the vectors.
    """
    _variant("lpips", variant, ["alex"])
    _needs("lpips", "lpips")
    import torch

    package = find_spec("lpips")
    calibration = (
        Path(package.origin if package and package.origin else "").parent / "weights/v0.1/alex.pth"
    )  # in the wheel
    file = _alexnet()
    linear = _state(calibration)
    roots = [
        linear[f"lin{layer}.model.1.weight"].sqrt().to(weight_store.device()) for layer in range(5)
    ]  # (1, C, 1, 1), none below 0
    trunk = _alexnet_features()
    _fill(
        trunk,
        {key[len("features.") :]: value for key, value in _state(file).items() if key.startswith("features.")},
        file,
    )
    trunk.eval().requires_grad_(False).to(weight_store.device())

    def network(x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for layer in trunk:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                parts.append((unit * roots[len(parts)] / (x.shape[2] * x.shape[3]) ** 0.5).flatten(1))
        return torch.cat(parts, 1)

    # It takes -1..1 and a mean and deviation of its own: (2 v - 1 + 0.030) / 0.458 is ImageNet's (v - 0.485) / 0.229.
    revision = f"{weight_store.short_digest(file)}+{weight_store.short_digest(calibration)}"
    return Pictures("lpips-alex", "squared", network, 224, IMAGENET, revision)


def _alexnet_features() -> Any:
    """Build AlexNet (arXiv 1404.5997) up to its fifth convolution, the children numbered as in torchvision's `features`."""
    from torch.nn import Conv2d, MaxPool2d, ReLU, Sequential

    return Sequential(
        Conv2d(3, 64, 11, stride=4, padding=2), ReLU(), MaxPool2d(3, 2),
        Conv2d(64, 192, 5, padding=2), ReLU(), MaxPool2d(3, 2),
        Conv2d(192, 384, 3, padding=1), ReLU(),
        Conv2d(384, 256, 3, padding=1), ReLU(),
        Conv2d(256, 256, 3, padding=1), ReLU(),
    )  # fmt: skip


def _variant(embedder: str, variant: str | None, valid: Sequence[str]) -> str:
    if variant is not None and variant not in valid:
        raise UserError(f"the embedder '{embedder}' has no variant {variant!r}; valid: {', '.join(valid)}")
    return variant or valid[0]


def _needs(package: str, embedder: str) -> None:
    if find_spec(package) is None:
        extra = "lpips" if package == "lpips" else "clip"
        raise Missing(f"the embedder '{embedder}' needs {package}; install with: pip install 'gpobench[{extra}]'")


def _load(kind: Any, repository: str) -> tuple[Any, str]:
    """Return (network of transformers' class `kind`, digest of its weights). UserError where the file lacks one of its weights."""
    weight_store.file(repository, "config.json")
    try:
        weights = weight_store.file(repository, "model.safetensors")
    except Missing as missing:
        try:
            weights = weight_store.file(repository, "pytorch_model.bin")  # the only one of the older repositories
        except Missing:
            raise missing from None
    try:
        network, facts = kind.from_pretrained(str(weights.parent), dtype="float32", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{weights.parent} does not hold {repository}: {message}") from error
    # transformers only warns, and embeds with random weights
    lacking = sorted([*facts["missing_keys"], *(str(key) for key in facts["mismatched_keys"])])
    if lacking:
        raise UserError(f"{weights} lacks weights of {repository}: {', '.join(lacking[:3])}")
    check_finite(network.state_dict(), weights)
    return network.to(weight_store.device()).eval().requires_grad_(False), weight_store.short_digest(weights)


def _alexnet() -> Path:
    """Find AlexNet's weights: the user's, gpobench's store, torch's cache, or torchvision's download. Missing where that is forbidden."""
    import torch

    return ALEXNET.find(Path(torch.hub.get_dir(), "checkpoints", ALEXNET.url.rpartition("/")[2]))


def _state(file: Path) -> Mapping[str, Tensor]:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors have no common parent
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not a file of weights: {message}") from error


def _fill(network: Any, weights: Mapping[str, Tensor], file: Path) -> None:
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{file} does not hold the weights of AlexNet: {' '.join(str(error).split())[:200]}") from error
    check_finite(network.state_dict(), file)
