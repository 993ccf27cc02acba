"""Weights of a scorer or embedder that are not finite are refused when they are loaded, by file and tensor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpobench.bench.errors import UserError
from gpobench.rewards import aesthetic, detect_shapes, reader, two_towers


def read_tiny_towers(file: Path) -> Any:
    return two_towers._tiny(file.stem, file.parent)  # pyright: ignore[reportPrivateUsage]


LOADERS: dict[str, tuple[Path, Callable[[Path], Any]]] = {
    "reader": (reader.WEIGHTS, reader.Reader),
    "shapes": (detect_shapes.WEIGHTS, detect_shapes.ShapesDetector),
    "pickscore:tiny": (two_towers.TINY / "pick.safetensors", read_tiny_towers),
}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("scorer", LOADERS)
def test_an_embedded_scorer_with_a_weight_that_is_not_finite_is_refused(
    scorer: str, tmp_path: Path, value: float
) -> None:
    weights, read = LOADERS[scorer]
    if scorer == "pickscore:tiny":  # its settings and its tokenizer are beside it
        shutil.copytree(weights.parent, tmp_path, dirs_exist_ok=True)
    tensors = load_file(weights)
    name = next(key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() > 1)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = value
    file = tmp_path / weights.name
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value) == f"{file} is damaged: its tensor {name} has numbers that are not finite"


def test_the_aesthetic_predictor_with_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    weights = {f"layers.{key}": value.clone() for key, value in aesthetic.network().state_dict().items()}
    weights["layers.7.bias"][0] = float("nan")
    torch.save(weights, tmp_path / aesthetic.FILE)
    with pytest.raises(
        UserError, match=rf"{re.escape(aesthetic.FILE)} is damaged: its tensor 7\.bias has numbers that are not finite"
    ):
        aesthetic.load(tmp_path / aesthetic.FILE)
