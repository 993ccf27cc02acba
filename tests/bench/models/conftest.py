"""Fixtures: random miniatures of FLUX and SDXL on disk."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FluxPipeline of a few thousand parameters on disk, 16x16 pixels, that states its protocol."""
    from gpobench.bench.models.mini import write_flux

    return write_flux(tmp_path_factory.mktemp("models") / "mini-flux", seed=0)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a StableDiffusionXLPipeline, with SDXL's own Euler scheduler."""
    from gpobench.bench.models.mini import write_sdxl

    return write_sdxl(tmp_path_factory.mktemp("models") / "mini-sdxl", seed=0)
