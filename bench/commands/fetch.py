"""`gpobench fetch`: downloads all that a run needs and checks every file by its hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, check_names, named_scorer
from .tables import finite_or_null

if TYPE_CHECKING:
    pass


EPILOG = (
    "Examples: `gpobench fetch --task ocr --model sd35m` · `gpobench fetch --task ocr --model sd35m --to usb-stick`, "
    "then on the machine without network `gpobench fetch --from usb-stick`"
)


def fetch(
    task: Annotated[str | None, typer.Option(help="A task: its prompts, and the weights of all its scorers.")] = None,
    model: Annotated[str | None, typer.Option(help="A model: the files that diffusers loads, no others.")] = None,
    scorers: Annotated[
        list[str] | None, typer.Option("--scorer", help="A further scorer, NAME or NAME:VARIANT; repeatable.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Also copy everything into this folder, with its hashes.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Check a folder that --to wrote, and install all of it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring all that a run needs, and check every file by its hash; then HF_HUB_OFFLINE=1 is enough.

    What stands on no hub comes from its publisher: AlexNet for lpips, the checkpoint of geneval:mmdet, and, where --scorer
    geneval:yolo asks for it, YOLO's pickle. What was fetched before is only checked; other bytes under the same commit, or at the
    same address, are refused.
    """
    check_names(**{kind: name for kind, name in (("task", task), ("model", model)) if name})
    for name in scorers or ():
        check_names(**named_scorer(name))
    with clean_stdout() as answer, terminal_progress() as progress:
        from ..environment.fetch import fetch as bring

        done = bring(task, model, to=to, source=source, progress=progress, scorers=scorers or ())
        answer(json.dumps(finite_or_null(done), indent=1) if as_json else lambda: _fetched(done))


def _fetched(done: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table("repository", "commit", "files", "MB", box=None, pad_edge=False, header_style="bold")
    for one in done["repositories"]:
        size = f"{one['bytes'] / 2**20:,.1f}" if "bytes" in one else ""
        table.add_row(one["repository"], one["commit"][:8] or "your own", str(one["files"]), size)
    console = open_console()
    if done["repositories"]:
        console.print(table)
    for one in done["prompts"]:
        console.print(f"prompts {one if isinstance(one, str) else one['path']}", highlight=False, markup=False)
    for one in done.get("left_out", ()):
        console.print(f"without {one['name']}: {one['why']}", highlight=False, markup=False)
    where = (
        f"installed in {done['store']}" if "store" in done else f"also copied to {done['to']}" if done["to"] else "here"
    )
    console.print(f"{done['bytes'] / 2**20:,.1f} MB, every hash checked, {where}", highlight=False, markup=False)
