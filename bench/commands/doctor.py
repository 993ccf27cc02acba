"""`gpobench doctor`: examines packages, device, disk, weights, prompts and scorers before a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, check_names, registered_model

EPILOG = "Examples: `gpobench doctor` · `gpobench doctor --task ocr --model sd35m --deep`"


def doctor(
    task: Annotated[str | None, typer.Option(help="A task: its prompts and scorers are examined.")] = None,
    model: Annotated[
        str | None,
        typer.Option(callback=registered_model, help="A model: its weights, licence and memory are examined."),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also load scorers of more than 1 GB and test them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Examine packages, device, disk, weights, prompts, scorers.

    Nothing is downloaded. Without a task or a model it examines the package, the embedded model and the built-in scorers.
    Exit code 1: a run would fail.
    """
    check_names(**{kind: name for kind, name in (("task", task), ("model", model)) if name})
    with clean_stdout() as answer, terminal_progress() as progress:
        progress.message("loading the libraries")
        from dataclasses import asdict

        from ..environment.check_result import broken
        from ..environment.doctor import doctor as examine

        checks = examine(task, model, progress=progress, deep=deep)
        report = {"broken": broken(checks), "checks": [asdict(check) for check in checks]}
        answer(json.dumps(report, indent=1) if as_json else lambda: print_checks(checks))
    if broken(checks):
        raise typer.Exit(1)


def print_checks(checks: Sequence[Any]) -> None:
    """Print one line per check, then what to do about those that are not ok."""
    from rich.table import Table
    from rich.text import Text

    from ..environment.check_result import remedies, rows

    colours = {"ok": "green", "warning": "yellow", "missing": "yellow", "broken": "red"}
    table = Table("what", "verdict", "detail", box=None, pad_edge=False, header_style="bold")
    for name, verdict, detail in rows(checks):
        table.add_row(Text(name), Text(verdict, colours[verdict]), Text(detail, overflow="fold"))
    console = open_console()
    console.print(table)
    for line in remedies(checks):
        console.print(f"-> {line}", highlight=False, markup=False)
