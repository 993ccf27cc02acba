"""`gpobench score`: scores a folder of images with any scorers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..signals import asked_to_stop
from .console import clean_stdout, end_without_result, open_console, terminal_progress
from .options import AsJson, ScorerLocations, check_names, check_scorer
from .tables import finite_or_null, is_finite

EPILOG = (
    "Examples: `gpobench score pictures --scorer pickscore --prompts prompts.csv` · `gpobench score geneval-images "
    "--scorer geneval:mask2former --task geneval --out scores.csv`\n\n"
    "Exit codes: 0 the numbers are a result · 2 one line says what to change · 3 too many images could not be scored"
)


def score(
    folder: Annotated[Path, typer.Argument(help="A folder of images; what layouts it may have: docs/scorers.md.")],
    scorers: Annotated[list[str], typer.Option("--scorer", help="A scorer to apply: a name, or a blend; repeatable.")],
    scorer_at: ScorerLocations = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="The prompts of the images: a table with columns file and prompt, or one line per image."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task that reads facts from the prompts (ocr, geneval ...).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The table to write: .parquet or .csv.")] = Path("scores.parquet"),
    rows: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 16,
    config: Annotated[Path | None, typer.Option(help="A TOML file whose [scorer.NAME] say where scorers run.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier start left, and start again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score a folder of images with any scorers.

    The same command goes on where it was cut off.
    """
    references = [reference for text in scorers if (reference := check_scorer(text))]
    if task:
        check_names(task=task)
    with clean_stdout() as answer, terminal_progress() as progress, asked_to_stop() as stopped:
        from ..experiments.config import scorer_tables
        from ..experiments.score_folder import FolderRequest, score_folder
        from ..scoring.references import check_locations, scorer_locations

        check_locations(references, scorer_locations(scorer_at or (), {}))
        locations = scorer_locations(scorer_at or (), scorer_tables(config))
        request = FolderRequest(folder, scorers, locations, prompts, task, out=out, rows=rows)
        result = score_folder(request, progress=progress, fresh=fresh, interrupted=stopped)
        answer(json.dumps(finite_or_null(result), indent=1) if as_json else lambda: print_scores(result))
    if result["not_written"]:  # after the numbers, which would be lost otherwise
        raise UserError(result["not_written"])
    if result["invalid"]:
        end_without_result()


def print_scores(result: Mapping[str, Any]) -> None:
    """Print the mean of each scorer's metrics, with interval and number of failures."""
    from rich.table import Table

    table = Table("scorer", "mean", "95 % interval", "images", "failed", box=None, pad_edge=False, header_style="bold")
    for key, number in result["scores"].items():
        mean = f"{number['mean']:.4g}" if is_finite(number["mean"]) else "not scored"
        ends = ", ".join(f"{end:.4g}" for end in number["ci"] if is_finite(end))
        table.add_row(key, mean, f"[{ends}]" if ends else "", f"{number['images']:,}", f"{number['failed']:,}")
    console = open_console()
    console.print(table, markup=False)
    for name, value in result["summary"].items():
        console.print(f"{name} {value:.4g}", highlight=False, markup=False)
    for line in result["notes"]:
        console.print(line, highlight=False, markup=False)
    if result["invalid"]:
        from ..evaluation.record import INVALID_RULE

        console.print(f"INVALID: {INVALID_RULE}", style="bold red")
    if not result["not_written"]:
        console.print(f"see {result['path']}", highlight=False, markup=False, soft_wrap=True)
