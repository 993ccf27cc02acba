"""Options that several commands share, and the check of names that runs before heavy imports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import registry

MethodName = Annotated[str, typer.Option("--method", help="A method's name, or path/to/file.py:Name.")]


TaskName = Annotated[str, typer.Option("--task", help="A task's name, or path/to/file.py:Name.")]


ModelName = Annotated[str, typer.Option("--model", help="A model's name, or a local folder in diffusers format.")]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and all else on stderr.")]


Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. beta=50, optim.lr=1e-4, adapter.rank=16; repeatable.")
]


Places = Annotated[
    list[str] | None,
    typer.Option("--scorer", help="NAME=URL of a scorer that `gpobench serve-scorer` serves elsewhere; repeatable."),
]


def check_names(**names: str) -> None:
    """Raise UserError, with the nearest valid name, on an unknown name of a method, task, model or scorer."""
    for kind, name in names.items():
        entries = registry.entries(kind)
        name = name.partition(":")[0] if kind in ("scorer", "method") and ".py:" not in name else name  # name:variant
        if name not in entries and ".py:" not in name and not (kind == "model" and Path(name).is_dir()):
            raise registry.unknown(kind, name, entries)


def named_scorer(scorer: str | None) -> dict[str, str]:
    """Return the keyword argument that `check_names` takes for a scorer; blends are checked when they are opened."""
    return {"scorer": scorer} if scorer and not set("*+") & set(scorer) else {}
