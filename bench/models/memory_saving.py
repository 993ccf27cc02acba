"""Settings that trade time for memory: gradient checkpointing, slices and tiles in the autoencoder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..model_spec import ModelSpec

# Pixels of an image from which on the autoencoder takes one image at a time: the same pictures, less memory.
SLICED = 512 * 512
# Pixels of a side above which the autoencoder works in tiles whose seams are blended: pictures change a little.
TILED = 1536


def apply_memory_settings(network: Any, vae: Any, model_spec: ModelSpec) -> None:
    """Switch on what the model spec and its image size ask of the trained network and of the autoencoder."""
    if model_spec.checkpointing:
        network.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    if model_spec.height * model_spec.width >= SLICED:
        vae.enable_slicing()
    if max(model_spec.height, model_spec.width) > TILED:
        vae.enable_tiling()


def checkpoint(block: Any, *args: Any) -> Any:
    """Run a block of the network so that the backward pass computes its activations again, with the same weights.

    Other weights may be active at the second time: a loss evaluates the policy, then the reference, and only then goes
    backward. So the block's adapter flags and base weights of the first time are set again; else the gradient would silently
    be that of other weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    layers: list[Any] = [m for m in block.modules() if isinstance(m, BaseTunerLayer)]

    def flags() -> list[tuple[bool, list[str], Any]]:
        return [(each._disable_adapters, each._active_adapter, each.get_base_layer().weight) for each in layers]

    def set_flags(values: list[tuple[bool, list[str], Any]]) -> None:
        for layer, (disabled, active, weight) in zip(layers, values, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
            layer.get_base_layer()._parameters["weight"] = weight

    flags_of_forward = flags()

    @contextmanager
    def recomputation() -> Generator[None]:
        flags_now = flags()
        set_flags(flags_of_forward)
        try:
            yield
        finally:
            set_flags(flags_now)

    # no dropout anywhere: there is no random state to keep
    return torch_checkpoint(
        block,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), recomputation()),
    )
