"""Options that several commands share, and the check of names that runs before heavy imports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import registry

if TYPE_CHECKING:
    from ..scoring.references import ScorerReference

MethodName = Annotated[str, typer.Option("--method", help="A method's name, or path/to/file.py:Name.")]


TaskName = Annotated[str, typer.Option("--task", help="A task's name, or path/to/file.py:Name.")]


ModelName = Annotated[str, typer.Option("--model", help="A model's name, or a local folder in diffusers format.")]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and all else on stderr.")]


Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. beta=50, optim.lr=1e-4, adapter.rank=16; repeatable.")
]


ScorerLocations = Annotated[
    list[str] | None,
    typer.Option("--scorer-at", help="NAME=URL of a scorer that `gpobench serve-scorer` serves elsewhere; repeatable."),
]


def check_names(**names: str) -> None:
    """Raise UserError, with the nearest valid name, on an unknown name of a method, task or model."""
    for kind, name in names.items():
        entries = registry.entries(kind)
        name = registry.split_variant(name)[0] if kind == "method" else name
        if name not in entries and ".py:" not in name and not (kind == "model" and Path(name).is_dir()):
            raise registry.unknown(kind, name, entries)


def check_scorer(text: str | None) -> ScorerReference | None:
    """Parse a scorer's reference and raise UserError on an unknown name; the scorers of a blend are checked when it is opened."""
    from ..scoring.references import ScorerReference

    if not text:
        return None
    reference = ScorerReference.parse(text)
    if not reference.terms:
        reference.check_registered()
    return reference
