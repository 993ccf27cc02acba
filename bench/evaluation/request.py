"""The request of an evaluation: which images to make, and which scorers and embedders see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..spec import Embedder, Prompt, Scorer

ImageIndex = tuple[int, int]  # index of the prompt, and the ordinal of the image among those of the prompt


def image_indices(prompts: Sequence[Prompt], images: int) -> list[ImageIndex]:
    """The index of every image of an evaluation with `images` a prompt, in order."""
    return [(i, ordinal) for i in range(len(prompts)) for ordinal in range(images)]


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate: which images, from which noise and weights, by which scorers and embedders."""

    prompts: Sequence[Prompt]
    scorers: Sequence[Scorer]
    images: int  # a prompt
    seed: int  # of the evaluation noise
    rows: int = 32  # images sampled at once
    weights: str = "policy"  # which weights of the model sample
    latents: Tensor | None = None  # (N, C, h, w) in the order of `image_indices`, instead of sampling
    diversity: Sequence[Embedder] = ()  # the distances between a prompt's images become `diversity-NAME/pairwise`
    drift: Sequence[Embedder] = ()  # their vectors are kept for `estimates.add_drift`
    shown: int = 32  # images returned
