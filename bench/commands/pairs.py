"""`gpobench pairs`: makes a set of preference pairs from a model's images and a scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import registry
from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, ModelName, TaskName, check_names, named_scorer
from .tables import finite_or_null

if TYPE_CHECKING:
    pass


EPILOG = (
    "Example: `gpobench pairs --model tiny --task ocr --out pairs`, then `gpobench run --method dpo:offline "
    "--set pairs=pairs --model tiny --task ocr`"
)


def pairs(
    task: TaskName,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The folder to write pairs.parquet in.")],
    scorer: Annotated[str | None, typer.Option(help="Whose scores decide; default: the task's reward.")] = None,
    prompts: Annotated[int, typer.Option(help="Training prompts, a group of images for each.")] = 64,
    group: Annotated[int, typer.Option(help="Images a prompt.")] = 8,
    choose: Annotated[str, typer.Option(help="extremes | random | all: which pairs of a group.")] = "extremes",
    margin: Annotated[float, typer.Option(help="Scores of a pair differ by more than this.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, noise, random pairs and the winner's side.")] = 0,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA folder; without it the base makes the images.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a set of preference pairs from a model's images and a scorer, in the columns of Pick-a-Pic."""
    check_names(task=task, model=model, **named_scorer(scorer))
    if choose not in ("extremes", "random", "all"):
        raise registry.unknown("choice", choose, ("extremes", "random", "all"))
    with clean_stdout() as answer, terminal_progress() as progress:
        from ..experiments.make_pairs import PairsRequest, make_pairs

        request = PairsRequest(model, task, scorer or "", prompts, group, choose, margin, seed, adapter)
        done = make_pairs(request, out, progress)
        answer(json.dumps(finite_or_null(done), indent=1) if as_json else lambda: _pairs(done))


def _pairs(done: Mapping[str, Any]) -> None:
    spent = " · ".join(f"{key} {value:,}" for key, value in done["spent"].items())
    open_console().print(
        f"{done['pairs']:,} pairs from {done['groups']:,} groups; {done['flat_groups']:,} groups had no spread, "
        f"{done['not_scored']:,} images were not scored\nspent: {spent}\nsee {done['path']}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for failure in done["failures"][-3:]:
        open_console().print(f"  {failure}", highlight=False, markup=False)
