"""`gpobench fetch`: downloads all that a run needs and checks every file by its hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, check_names, check_scorer, registered_model
from .tables import finite_or_null

EPILOG = (
    "Examples: `gpobench fetch --task ocr --model sd35m` · `gpobench fetch --task ocr --model sd35m --to usb-stick`, "
    "then on the machine without network `gpobench fetch --from usb-stick`"
)


def fetch(
    task: Annotated[str | None, typer.Option(help="A task: its prompts, and the weights of all its scorers.")] = None,
    model: Annotated[
        str | None, typer.Option(callback=registered_model, help="A model: the files that diffusers loads, no others.")
    ] = None,
    scorers: Annotated[
        list[str] | None, typer.Option("--scorer", help="Another scorer, NAME or NAME:VARIANT; repeatable.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Also copy everything into this folder, with its hashes.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Check a folder that --to wrote, and install it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download what a run needs and check every file's hash.

    Afterwards runs work with HF_HUB_OFFLINE=1. Files that are on no hub come from their publisher: AlexNet for lpips, the
    checkpoint of geneval:mmdet, and YOLO's pickle where --scorer geneval:yolo is given. Files that are here already are only
    checked; other bytes under the same commit or at the same address are refused.
    """
    check_names(**{kind: name for kind, name in (("task", task), ("model", model)) if name})
    for name in scorers or ():
        check_scorer(name)
    with clean_stdout() as answer, terminal_progress() as progress:
        from ..environment.fetch import fetch as fetch_all

        result = fetch_all(task, model, to=to, source=source, progress=progress, scorers=scorers or ())
        answer(json.dumps(finite_or_null(result), indent=1) if as_json else lambda: print_fetched(result))


def print_fetched(result: Mapping[str, Any]) -> None:
    """Print each repository with commit, files and size, the prompt files, and what was left out."""
    from rich.table import Table

    table = Table("repository", "commit", "files", "MB", box=None, pad_edge=False, header_style="bold")
    for repository in result["repositories"]:
        size = f"{repository['bytes'] / 2**20:,.1f}" if "bytes" in repository else ""
        table.add_row(repository["repository"], repository["commit"][:8] or "your own", str(repository["files"]), size)
    console = open_console()
    if result["repositories"]:
        console.print(table)
    for file in result["prompts"]:
        console.print(f"prompts {file if isinstance(file, str) else file['path']}", highlight=False, markup=False)
    for part in result.get("left_out", ()):
        console.print(f"without {part['name']}: {part['why']}", highlight=False, markup=False)
    where = (
        f"installed in {result['store']}"
        if "store" in result
        else f"also copied to {result['to']}"
        if result["to"]
        else "here"
    )
    console.print(f"{result['bytes'] / 2**20:,.1f} MB, every hash checked, {where}", highlight=False, markup=False)
