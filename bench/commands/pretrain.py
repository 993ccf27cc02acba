"""`gpobench pretrain`: trains an embedded model again from its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .. import registry
from ..files import make_folder
from .console import clean_stdout, log_lines, terminal_progress
from .options import AsJson, Sets
from .tables import finite_or_null

EPILOG = "Example: `gpobench pretrain tiny --out my-tiny --seed 1`, then `gpobench run ... --model my-tiny`"


def pretrain(
    recipe: Annotated[
        str, typer.Argument(help="tiny | tiny-2 | reader | tiny-clip | shapes, or path/to/file.py:Name.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="The training seed.")] = 0,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Train an embedded model again from its recipe.

    The same command goes on where it was cut off.
    """
    if ".py:" not in recipe and recipe not in registry.entries("recipe"):
        raise registry.unknown("recipe", recipe, registry.entries("recipe"))
    make_folder(out)
    with clean_stdout() as answer, terminal_progress() as progress:
        from ..experiments.config import build, parse_settings

        recipe_of_model = build(registry.load("recipe", recipe), parse_settings(sets or ()))
        result = recipe_of_model(out, seed=seed, log=log_lines(progress))
        answer(json.dumps(finite_or_null(result), indent=1, default=str))
