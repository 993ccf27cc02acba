"""Scorer `aesthetic`: applies LAION's aesthetic predictor to CLIP's image embedding, 1 to 10; it does not read the prompt.

christophschuhmann/improved-aesthetic-predictor: the 768 projected features of openai/clip-vit-large-patch14, brought to length 1, go
through five linear layers. There is no activation between them, so the score is affine in the features (`collapsed`). It is the MLP
`sac+logos+ava1-l14-linearMSE.pth`, not the single layer of LAION-AI/aesthetic-predictor, whose scores are not comparable. A score
that ignores the prompt can rise while images stop showing what the prompt asks for: use it beside a reward, not in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bench.assets import weight_store
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images, Prompt, Scores, Values, check_images
from .two_towers import Crop, Sight, chunk, hub_towers

if TYPE_CHECKING:
    from torch import nn

TOWER = "openai/clip-vit-large-patch14"
REPOSITORY = "christophschuhmann/improved-aesthetic-predictor"  # of GitHub, not of the hub
FILE = "sac+logos+ava1-l14-linearMSE.pth"
WIDTHS = (768, 1024, 128, 64, 16, 1)
DROPPED = (0.2, 0.2, 0.1)  # after the first three layers, in training only; layer numbers in the file count them


def network() -> nn.Sequential:
    """Build the predictor with random weights: (B, 768) -> (B, 1), float32."""
    from torch import nn

    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        layers.append(nn.Linear(before, after))
        if i < len(DROPPED):
            layers.append(nn.Dropout(DROPPED[i]))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def collapsed(mlp: nn.Sequential) -> tuple[Values, float]:
    """Return the (768,) weights and the bias, in float64, of the affine function that the network computes at inference."""
    from torch import nn

    weights, bias = np.eye(WIDTHS[0]), np.zeros(WIDTHS[0])
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            matrix = layer.weight.detach().double().cpu().numpy()
            weights, bias = matrix @ weights, matrix @ bias + layer.bias.detach().double().cpu().numpy()
    return weights[0], float(bias[0])


def load(path: Path) -> nn.Sequential:
    """Load the published weights, whose names begin with `layers.`; UserError where the file holds anything else."""
    import torch

    mlp = network()
    try:
        weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        mlp.load_state_dict({key.removeprefix("layers."): value.float() for key, value in weights.items()})
    except Exception as error:  # pickle's errors have no common parent
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} does not hold the aesthetic predictor's weights: {message}") from error
    check_finite(mlp.state_dict(), path)
    return mlp


class Aesthetic:
    """Scores images by their CLIP embedding; prompts are not read."""

    name = "aesthetic"
    metrics: Sequence[str] = ("score",)

    def __init__(self, sight: Sight, mlp: nn.Sequential, weights: str) -> None:
        self.sight = sight
        self.mlp = mlp  # on the CPU in float32, wherever the tower is
        self.id = f"aesthetic-1/{weights}/{sight.fit}/float32"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """(B, H, W, 3) and B prompts -> score, about 1 to 10; NaN with a reason where an image could not be scored."""
        import torch

        check_images(images, prompts)
        vectors, reasons = self.sight(images)
        value = np.full(len(images), np.nan)
        with torch.inference_mode():
            for row in range(len(images)):
                if row not in reasons:  # one by one: matrix kernels differ with the number of rows
                    value[row] = float(self.mlp(torch.from_numpy(vectors[row : row + 1])))
        return Scores(value={"score": value}, reasons=reasons)

    def self_test(self) -> None:
        """Raise RuntimeError unless the network equals its `collapsed` function and scores two images between -5 and 15."""
        grey = np.full((1, 224, 224, 3), 128, np.uint8)
        noise = np.random.default_rng(0).integers(0, 256, grey.shape, dtype=np.uint8)
        images = np.concatenate([grey, noise])
        vectors, reasons = self.sight(images)
        weights, bias = collapsed(self.mlp)
        marks = self(images, [Prompt("")] * 2).value["score"]
        straight = vectors.astype(np.float64) @ weights + bias
        if reasons or not np.allclose(marks, straight, atol=1e-3) or not ((marks > -5) & (marks < 15)).all():
            raise RuntimeError(f"{self.id} marked {marks} where its layers say {straight}; {reasons}")


def make(variant: str | None = None) -> Aesthetic:
    """Make the scorer, which has no variants. Missing says where to put the predictor's file, which no hub repository holds."""
    if variant is not None:
        raise UserError(f"the scorer 'aesthetic' has no variant {variant!r}; write it as 'aesthetic'")
    try:
        path = weight_store.file(REPOSITORY, FILE)
    except Missing:
        raise Missing(
            f"the scorer 'aesthetic' needs {FILE} of https://github.com/{REPOSITORY}; put it below the folder that "
            f"GPOBENCH_WEIGHTS names, as {REPOSITORY}/{FILE}"
        ) from None
    mlp = load(path)
    towers, weights = hub_towers(TOWER)
    # The predictor's code takes the preprocessing of OpenAI's clip, which is torchvision's.
    return Aesthetic(
        Sight(towers, Crop(towers.size[0], corner="torchvision"), chunk()),
        mlp,
        f"mlp@{weight_store.short_digest(path)}/{weights}",
    )
