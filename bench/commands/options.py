"""Options that several commands share, and the check of names that runs before heavy imports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import registry
from ..model_spec import registered_name

if TYPE_CHECKING:
    from ..scoring.references import ScorerReference


def _names(kind: str) -> Callable[[], list[str]]:
    """Complete an option with the registered names of a kind."""
    return lambda: sorted(registry.entries(kind))


def registered_model(reference: str | None) -> str | None:
    """Replace the hub id of a registered model by its name."""
    return None if reference is None else registered_name(reference)


MethodName = Annotated[
    str,
    typer.Option("--method", help="A method's name, or path/to/file.py:Name.", autocompletion=_names("method")),
]


TaskName = Annotated[
    str, typer.Option("--task", help="A task's name, or path/to/file.py:Name.", autocompletion=_names("task"))
]


ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="A model's name or hub id, or a local folder in diffusers format.",
        callback=registered_model,
        autocompletion=_names("model"),
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and all else on stderr.")]


Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. beta=50, optim.lr=1e-4, adapter.rank=16; repeatable.")
]


ScorerLocations = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer-at",
        help="NAME=URL of a scorer that `gpobench serve-scorer` serves elsewhere, URL,URL of several servers; repeatable.",
    ),
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
