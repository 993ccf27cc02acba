"""Opening a model: the registered pipeline class loads it; a missing class or missing weights are one line."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

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


def damage(file: Path, name: str, value: float) -> None:
    """Set the last number of one tensor."""
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_weights_that_are_not_finite_are_refused(tiny_pipe: Path, tmp_path: Path, part: str, value: float) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_pipe, folder)
    (file,) = sorted((folder / part).glob("*.safetensors"))
    name = sorted(load_file(file))[-1]
    damage(file, name, value)
    with pytest.raises(UserError) as caught:
        open_model(find_model_spec(str(folder)), device="cpu")
    assert str(caught.value) == f"{file} is damaged: its tensor {name} has numbers that are not finite"


def test_weights_that_overflow_in_the_chosen_precision_are_refused(tiny_pipe: Path, tmp_path: Path) -> None:
    """The largest number of float32 is infinite in bfloat16: the file is whole, the loaded model is not."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_pipe, folder)
    damage(folder / "transformer" / "diffusion_pytorch_model.safetensors", "proj_out.bias", 3.4028e38)
    open_model(find_model_spec(str(folder)), device="cpu", precision="fp32")
    with pytest.raises(
        UserError, match=r"the tensor proj_out\.bias of transformer of large .* in bfloat16: .* --precision"
    ):
        open_model(find_model_spec(str(folder)), device="cpu", precision="bf16")
