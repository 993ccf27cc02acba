"""Options that several commands share, and the check of names before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import registry

if TYPE_CHECKING:
    pass


MethodName = Annotated[str, typer.Option("--method", help="A method's name, or path/to/file.py:Name.")]


TaskName = Annotated[str, typer.Option("--task", help="A task's name, or path/to/file.py:Name.")]


ModelName = Annotated[str, typer.Option("--model", help="A model's name, or a local folder in diffusers format.")]


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else goes to stderr.")]


Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. beta=50, optim.lr=1e-4, adapter.rank=16; repeatable.")
]


Places = Annotated[
    list[str] | None,
    typer.Option("--scorer", help="NAME=URL of a scorer that `gpobench serve-scorer` serves elsewhere; repeatable."),
]


def check_names(**names: str) -> None:
    """Refuse a mistyped name before anything heavy is imported."""
    for kind, name in names.items():
        known = registry.entries(kind)
        name = name.partition(":")[0] if kind in ("scorer", "method") and ".py:" not in name else name  # name:variant
        if name not in known and ".py:" not in name and not (kind == "model" and Path(name).is_dir()):
            raise registry.unknown(kind, name, known)


def named_scorer(scorer: str | None) -> dict[str, str]:
    """What `check_names` is to check of a scorer; the parts of a blend are checked where it is opened."""
    return {"scorer": scorer} if scorer and not set("*+") & set(scorer) else {}
