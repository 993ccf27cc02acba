"""The named models: each has a model spec that is read without loading a weight or torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpobench.bench import registry
from gpobench.bench.model_spec import ModelSpec, find_model_spec, registered_name
from gpobench.bench.models import catalogue
from gpobench.bench.models.architectures import PUBLISHED

SHIPPED = Path(catalogue.__file__).with_name("tiny")


@pytest.mark.skipif(not (SHIPPED / "recipe.json").is_file(), reason="the embedded model has not been made yet")
def test_both_names_have_a_card_and_an_adapter() -> None:
    tiny, large = find_model_spec("tiny"), find_model_spec("sd35m")
    assert {tiny.pipeline, large.pipeline} <= set(registry.entries("pipeline"))
    assert (tiny.name, tiny.domain, tiny.height, tiny.width) == ("tiny", "glyphs", 32, 64)
    assert Path(tiny.source) == SHIPPED and tiny.revision is None
    # Flow-GRPO's protocol, arXiv 2505.05470
    assert (large.steps, large.guidance, large.height, large.max_sequence_length) == (40, 4.5, 512, 128)
    assert large.domain == "open" and large.revision


@pytest.mark.skipif(not (SHIPPED / "recipe.json").is_file(), reason="the embedded model has not been made yet")
def test_a_card_costs_no_torch() -> None:
    code = "import sys; from gpobench.bench.model_spec import find_model_spec; find_model_spec('tiny'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


NAMED = {model_spec.name: model_spec for model_spec in vars(catalogue).values() if isinstance(model_spec, ModelSpec)}
# hub id, pixels, steps, guidance, tokens of text
PROTOCOL = {
    "sd35m": ("stabilityai/stable-diffusion-3.5-medium", 512, 40, 4.5, 128),
    "sd35l": ("stabilityai/stable-diffusion-3.5-large", 512, 40, 4.5, 128),
    "flux1-dev": ("black-forest-labs/FLUX.1-dev", 720, 28, 3.5, 512),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024, 50, 5.0, 77),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 50, 7.5, 77),
}


@pytest.mark.parametrize("name", list(PROTOCOL))
def test_a_named_model_has_its_protocol_and_a_blueprint(name: str) -> None:
    model_spec = NAMED[name]
    assert (
        model_spec.source,
        model_spec.height,
        model_spec.steps,
        model_spec.guidance,
        model_spec.max_sequence_length,
    ) == PROTOCOL[name]
    assert model_spec.width == model_spec.height and model_spec.revision == "main" and model_spec.licence != "its own"
    assert model_spec.pipeline in registry.entries("pipeline") and model_spec.negative_prompt is None
    assert (
        model_spec.checkpointing
        and model_spec.offload
        and model_spec.compile == "auto"
        and model_spec.precision == "bf16"
    )
    assert registered_name(model_spec.source) == registered_name(model_spec.source.lower()) == name
    network = "unet" if "XL" in model_spec.pipeline or name == "sd15" else "transformer"
    assert network in PUBLISHED[name]
    assert ("add_q_proj" in model_spec.adapter.targets) == (network == "transformer")


def test_the_tiny_model_saves_nothing() -> None:
    """Where memory is no question, off-loading and computing twice only take time."""
    tiny = NAMED["tiny"]
    assert not (tiny.checkpointing or tiny.offload)
