"""`gpobench pairs`: makes a set of preference pairs from a model's images and a scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import registry
from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, ModelName, TaskName, check_names, named_scorer
from .tables import finite_or_null

EPILOG = (
    "Example: `gpobench pairs --model tiny --task ocr --out pairs`, then `gpobench run --method dpo:offline "
    "--set pairs=pairs --model tiny --task ocr`"
)


def pairs(
    task: TaskName,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The folder to write pairs.parquet in.")],
    scorer: Annotated[
        str | None, typer.Option(help="The scorer that ranks the images; default: the task's reward.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many training prompts; each gets a group of images.")] = 64,
    group: Annotated[int, typer.Option(help="Images per prompt.")] = 8,
    choose: Annotated[str, typer.Option(help="Which pairs of a group: extremes | random | all.")] = "extremes",
    margin: Annotated[float, typer.Option(help="The scores of a pair must differ by more than this.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The seed of prompts, noise, random pairs and the winner's side.")] = 0,
    adapter: Annotated[
        Path | None, typer.Option(help="A LoRA folder; without it the base model makes the images.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make preference pairs from a model's images and a scorer.

    The table has the columns of Pick-a-Pic.
    """
    check_names(task=task, model=model, **named_scorer(scorer))
    if choose not in ("extremes", "random", "all"):
        raise registry.unknown("choice", choose, ("extremes", "random", "all"))
    with clean_stdout() as answer, terminal_progress() as progress:
        from ..experiments.make_pairs import PairsRequest, make_pairs

        request = PairsRequest(model, task, scorer or "", prompts, group, choose, margin, seed, adapter)
        result = make_pairs(request, out, progress)
        answer(json.dumps(finite_or_null(result), indent=1) if as_json else lambda: print_pairs(result))


def print_pairs(result: Mapping[str, Any]) -> None:
    """Print how many pairs were made, what they cost and where they are."""
    spent = " · ".join(f"{key} {value:,}" for key, value in result["spent"].items())
    open_console().print(
        f"{result['pairs']:,} pairs from {result['groups']:,} groups; {result['flat_groups']:,} groups had no spread, "
        f"{result['not_scored']:,} images were not scored\nspent: {spent}\nsee {result['path']}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for failure in result["failures"][-3:]:
        open_console().print(f"  {failure}", highlight=False, markup=False)
