"""Opening a model: the registered pipeline class loads it; a missing class or missing weights are one line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gpobench.bench.errors import Missing, UserError
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model


def test_a_folder_opens_with_and_without_adapter(tiny_pipe: Path) -> None:
    model_spec = find_model_spec(str(tiny_pipe))
    plain = open_model(model_spec, device="cpu")
    assert plain.parameters() == [] and plain.shape == (16, 4, 4)
    trained = open_model(model_spec, device="cpu", adapter=Adapter(rank=2))
    assert trained.parameters() and all(p.requires_grad for p in trained.parameters())


def test_a_class_without_adapter_is_refused(tiny_pipe: Path) -> None:
    model_spec = replace(find_model_spec(str(tiny_pipe)), pipeline="StableDiffusion2Pipeline")
    with pytest.raises(UserError, match="unknown pipeline .*did you mean 'StableDiffusionPipeline'"):
        open_model(model_spec, device="cpu")


def test_weights_that_are_not_there_are_missing(tiny_pipe: Path, tmp_path: Path) -> None:
    model_spec = find_model_spec(str(tiny_pipe))
    with pytest.raises(Missing, match="nobody/nothing"):
        open_model(replace(model_spec, source="nobody/nothing"), device="cpu")
    folder = tmp_path / "half"
    shutil.copytree(tiny_pipe, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Missing, match="cannot be loaded"):
        open_model(find_model_spec(str(folder)), device="cpu")


def test_pickled_weights_are_not_opened(tiny_pipe: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_pipe, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(Missing, match="cannot be loaded"):
        open_model(find_model_spec(str(folder)), device="cpu")


def test_a_cut_off_file_is_missing(tiny_pipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_pipe, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        open_model(find_model_spec(str(folder)), device="cpu")


def test_a_target_the_model_lacks_is_refused(tiny_pipe: Path) -> None:
    with pytest.raises(UserError, match="no module 'to_nowhere'"):
        open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(targets=("to_q", "to_nowhere")))
