"""The named models: their model specs, each behind an entry point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..model_spec import PROTOCOLS, ModelSpec, find_model_spec

# The embedded model: made by `gpobench pretrain tiny`, its protocol is stated in its own recipe.json.
tiny = replace(find_model_spec(str(Path(__file__).with_name("tiny"))), name="tiny", licence="Apache-2.0")

sd35m = ModelSpec(
    name="sd35m",
    source="stabilityai/stable-diffusion-3.5-medium",
    revision="main",
    pipeline="StableDiffusion3Pipeline",
    licence="Stability AI Community License (gated)",
)

sd35l = replace(
    sd35m,
    name="sd35l",
    source="stabilityai/stable-diffusion-3.5-large",
    rows=4,
    preset="sd35m",
)

flux1_dev = ModelSpec(
    name="flux1-dev",
    source="black-forest-labs/FLUX.1-dev",
    revision="main",
    pipeline="FluxPipeline",
    licence="FLUX.1 [dev] Non-Commercial License (gated)",
    budget="flux1-dev",
    **PROTOCOLS["FluxPipeline"],
)

sdxl = ModelSpec(
    name="sdxl",
    source="stabilityai/stable-diffusion-xl-base-1.0",
    revision="main",
    pipeline="StableDiffusionXLPipeline",
    licence="CreativeML Open RAIL++-M",
    **PROTOCOLS["StableDiffusionXLPipeline"],
)

sd15 = ModelSpec(
    name="sd15",
    source="stable-diffusion-v1-5/stable-diffusion-v1-5",
    revision="main",
    pipeline="StableDiffusionPipeline",
    licence="CreativeML OpenRAIL-M",
    **PROTOCOLS["StableDiffusionPipeline"],
)
