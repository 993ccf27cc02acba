"""`gpobench eval`: evaluates a base model, or a base with an adapter, on a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import registry
from ..errors import UserError
from .console import clean_stdout, end_without_result, open_console, terminal_progress
from .options import AsJson, ModelName, ScorerLocations, TaskName, check_names
from .tables import finite_or_null, is_finite

EPILOG = (
    "Example: `gpobench eval --task ocr --model tiny --adapter runs/NAME/adapter --split test`\n\n"
    "Exit codes: 0 the numbers are a result · 2 one line says what to change · 3 too many images could not be scored"
)


def eval(
    task: TaskName,
    model: ModelName,
    adapter: Annotated[
        Path | None, typer.Option(help="A LoRA of diffusers or PEFT; without it the base is evaluated.")
    ] = None,
    split: Annotated[str, typer.Option(help="test | validation | train")] = "test",
    images: Annotated[int | None, typer.Option(min=1, help="Images per prompt; default: the task's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write scores.parquet and samples.png there.")] = None,
    scorer_at: ScorerLocations = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Your prompts (txt, json, csv, parquet ...) instead of the split's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a base model, with or without an adapter, on a task.

    An adapter's evaluation on test prompts is counted in the ledger of its run's folder, else of the folder runs where there is one.
    """
    check_names(task=task, model=model)
    if split not in ("test", "validation", "train"):
        raise registry.unknown("split", split, ("test", "validation", "train"))
    if adapter is not None and not adapter.exists():
        raise UserError(f"--adapter {adapter}: no such file or folder")
    with clean_stdout() as answer, terminal_progress() as progress:
        from ..experiments.evaluate_model import ModelEvaluation, evaluate_model
        from ..scoring.references import scorer_locations

        locations = scorer_locations(scorer_at or (), {})
        request = ModelEvaluation(task, model, adapter, split, images, prompts, locations, runs=Path("runs"))  # type: ignore[arg-type]
        result = evaluate_model(request, progress, out)
        answer(json.dumps(finite_or_null(result), indent=1) if as_json else lambda: print_evaluation(result))
    if result["not_written"]:  # after the numbers, which would be lost otherwise
        raise UserError(result["not_written"])
    if result["invalid"]:
        end_without_result()


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print the mean of each scorer's metrics, with interval and role."""
    from rich.table import Table

    table = Table("scorer", "mean", "95 % interval", "prompts", "role", box=None, pad_edge=False, header_style="bold")
    for key, number in result["scores"].items():
        scorer = key.partition("/")[0]  # or the embedder whose distances they are
        role = result["scorers"].get(scorer, {"role": scorer.partition("-")[0]})["role"]
        mean = f"{number['mean']:.3f}" if is_finite(number["mean"]) else "not scored"
        ends = ", ".join(f"{end:.3f}" for end in number["ci"] if is_finite(end))
        table.add_row(key, mean, f"[{ends}]" if ends else "", str(number["n"]), role)
    open_console().print(table, markup=False)
    if (look := result["look"]) and not look["not_recorded"]:
        looks, settings = look["looks"], look["settings"]
        open_console().print(
            f"looks at these test prompts with this method: {looks} ({settings} settings)", style="dim"
        )
