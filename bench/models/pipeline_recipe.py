"""What a recipe of an embedded model states: the settings of its networks and stages, and the pictures that it learns to draw.

`tiny_parts` builds the networks of such a recipe, `tiny_stages` trains them, `tiny_folder` writes them down. A recipe of a new world of
pictures is a final subclass of `PipelineRecipe` and one of `PictureSource`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

# Fields that change a run's speed and output but not what it learns: a checkpoint may be resumed under other values.
RUNNING = ("processes", "compiled", "tell_every", "save_every", "look_every", "looks", "readings", "countings")


@dataclass(frozen=True)
class Canvas:
    """Size of the pictures in pixels, channels of their latent, and the words and the length of prompts."""

    width: int
    height: int
    tokens: int  # of a prompt, with its begin and end
    vocabulary: tuple[str, ...]  # all words outside quotes; inside there are capitals
    gap: str = ""  # token between the words of a quoted text, where texts have several
    channels: int = 16  # of the latent: a 4x4 patch has 48 numbers, which become so many


class PictureSource(ABC):
    """The pictures that a pipeline learns to draw, and how its own are measured."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, step: int) -> tuple[str, np.ndarray]:
        """Draw one prompt and its image, (H, W, 3) uint8. step: of stage 2; 0 in the other stages."""

    @abstractmethod
    def probe_prompts(self) -> Sequence[str]:
        """Return the validation prompts whose pictures `probe` measures while the model is in training."""

    @abstractmethod
    def probe(self, images: np.ndarray) -> Mapping[str, float]:
        """Return the share of right images among (N, H, W, 3) uint8, one for each of `probe_prompts`, by kind of prompt."""

    @abstractmethod
    def measure(self, folder: Path, seed: int) -> dict[str, Any]:
        """Measure a written pipeline on test prompts: name -> mean, low and high (95 %), n."""

    @abstractmethod
    def held_out(self) -> Mapping[str, Any]:
        """Return the entries of recipe.json that say what was never drawn in training."""

    @abstractmethod
    def model_card(self, record: Mapping[str, Any], folder: Path) -> str:
        """Return the text of the folder's README.md."""


@dataclass(frozen=True)
class PipelineRecipe(ABC):
    """The hyper-parameters of an embedded model. Steps are optimiser steps, rates are per step, shares are fractions."""

    canvas: ClassVar[Canvas]

    # network
    layers: int = 4
    heads: int = 6
    head_width: int = 32
    text_widths: tuple[int, int] = (64, 32)
    pooled_width: int = 32  # of each text encoder
    autoencoder_widths: tuple[int, ...] = (16, 32, 32)
    # stage 1
    autoencoder_steps: int = 250
    autoencoder_rate: float = 3e-3
    # stage 2
    steps: int = 1400
    batch: int = 128
    muon_rate: float = 2e-3
    adam_rate: float = 1.5e-3
    warm: int = 20
    decay: float = 0.3  # share of the steps, at the end, over which the rate falls in a straight line
    floor: float = 0.02  # of the rate, at the last step
    average: float = 0.995  # of the moving average of the weights
    dropped: float = 0.08  # share of the prompts that are left empty, for classifier-free guidance
    # stage 3
    decoder_steps: int = 300
    decoder_rate: float = 1e-3
    drawn: int = 2048  # latents the model draws for the decoder
    # running
    processes: int = 2
    compiled: bool = True
    tell_every: float = 10.0  # seconds
    save_every: float = 25.0  # seconds
    look_every: float = 35.0  # seconds between two readings of validation words
    looks: int = 200
    readings: int = 2  # pictures of each held-out word in the final measurement; 0 for none
    countings: int = 8  # pictures of each shapes prompt in the final measurement; 0 for none

    @abstractmethod
    def pictures(self) -> PictureSource:
        """Return the pictures that the model learns to draw."""
