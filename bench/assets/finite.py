"""Check of loaded weights: a file with a number that is not finite is refused, named with the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise UserError that names the first tensor with a number that is not finite.

    where: the file or folder they come from, for the message.
    """
    if (name := first_infinite(tensors)) is not None:
        raise UserError(f"{where} is damaged: its tensor {name} has numbers that are not finite")


def first_infinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a number that is not finite; None where there is none."""
    for name, tensor in tensors.items():
        # Floating-point types of 8 bits have no isfinite of their own.
        values = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if values.is_floating_point() and not bool(values.isfinite().all()):
            return name
    return None


def damaged_file(folder: Path) -> tuple[Path, str] | None:
    """The first safetensors file of a folder that holds a number which is not finite, and the tensor's name in it."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if first_infinite({name: file.get_tensor(name)}) is not None:
                    return path, name
    return None
