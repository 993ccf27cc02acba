"""The autoencoder: images to latents and back. A latent is (mode - shift) * scale of the autoencoder's posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..model_spec import ModelSpec


def latent_shape(channels: int, model_spec: ModelSpec, factor: int, patch: int = 1) -> tuple[int, int, int]:
    """(C, h, w) of one latent under the protocol's image size.

    factor: pixels of a latent's side; patch: latents of a token's side. Raises UserError on a size that is no multiple.
    """
    multiple = factor * patch
    if model_spec.height % multiple or model_spec.width % multiple:
        raise UserError(
            f"{model_spec.name} draws in multiples of {multiple} pixels, not {model_spec.height}x{model_spec.width}"
        )
    return channels, model_spec.height // factor, model_spec.width // factor


def _scale_and_shift(vae: Any) -> tuple[float, float]:
    return float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)


def decode(vae: Any, x0: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 3, H, W), 0 black and 1 white, as the pipelines decode; `rendering` clamps it.

    With a gradient where the latents have one.
    """
    scale, shift = _scale_and_shift(vae)
    with torch.set_grad_enabled(torch.is_grad_enabled() and x0.requires_grad):
        images = vae.decode((x0 / scale + shift).to(vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5  # not clamped: an infinite value would look like a white one


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, C, h, w): the mode of the autoencoder's posterior."""
    scale, shift = _scale_and_shift(vae)
    mode = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
    return (mode.float() - shift) * scale
