"""Opening a model: its pipeline class is looked up by entry point and loads the weights."""

from __future__ import annotations

from typing import Any

from .. import registry
from ..errors import UserError
from ..model_spec import Adapter, ModelSpec
from ..spec import Model
from .base import PipelineModel


def open_model(
    model_spec: ModelSpec, *, device: Any, precision: str | None = None, adapter: Adapter | None = None, seed: int = 0
) -> Model:
    """Load the model onto its device.

    Args:
        model_spec: where the weights are, and the protocol.
        device: anything that torch.device takes.
        precision: of the base weights; None is the spec's.
        adapter: the LoRA to attach; None loads the base alone.
        seed: of the LoRA's random start.
    Raises UserError on a pipeline class that is not registered, Missing when the weights are not there.
    """
    return pipeline_class(model_spec)(
        model_spec, device=device, precision=precision or model_spec.precision, adapter=adapter, seed=seed
    )


def pipeline_class(model_spec: ModelSpec) -> type[PipelineModel]:
    """The registered class of the model's pipeline. Raises UserError where there is none."""
    registered: Any = registry.load("pipeline", model_spec.pipeline)
    if not (isinstance(registered, type) and issubclass(registered, PipelineModel)):
        raise UserError(f"the pipeline class {model_spec.pipeline!r} is not a gpobench.bench.models.base.PipelineModel")
    return registered


def usage(model_spec: ModelSpec) -> list[str]:
    """Lines of Python that load an adapter into plain diffusers and draw an image under the protocol."""
    return pipeline_class(model_spec).usage(model_spec)
