"""`gpobench check`: checks a method against the laws that every method must keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from .. import registry
from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, MethodName, Sets, check_names

EPILOG = "Examples: `gpobench check --method gpo` · `gpobench check --method mine.py:Mine --set group=8`"


def check(
    method: MethodName,
    sets: Sets = None,
    model: Annotated[
        str,
        typer.Option(
            help="Model families: sd3 | sd15 | flux | sdxl | both (the first two) | all, which takes nearly twice as long."
        ),
    ] = "both",
    as_json: AsJson = False,
) -> None:
    """Check a method against the laws that all methods must keep.

    It runs on two or four miniature models, offline, in seconds. Exit code 1: a law is broken.
    """
    check_names(method=method)
    valid = ("sd3", "sd15", "flux", "sdxl", "both", "all")
    if model not in valid:
        raise registry.unknown("family", model, valid)
    with clean_stdout() as answer, terminal_progress() as progress:
        from ..conformance.check import ALL_FAMILIES, DEFAULT_FAMILIES
        from ..conformance.check import check as check_laws

        progress.phase(f"the laws on {method}", 0)
        families = {"both": DEFAULT_FAMILIES, "all": ALL_FAMILIES}.get(model, (model,))
        results = check_laws(method, sets=sets or (), families=families, say=progress.about)
        plain = [{**vars(result), "broken": result.broken} for result in results]
        answer(json.dumps({"method": method, "laws": plain}, indent=1) if as_json else lambda: print_law_results(plain))
    if any(result.broken for result in results):
        raise typer.Exit(1)


def print_law_results(results: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per law and family; below it how the law is broken or why it was skipped."""
    from rich.table import Table
    from rich.text import Text

    table = Table("law", "model", "verdict", "seconds", box=None, pad_edge=False, header_style="bold")
    for v in results:
        word, style = (
            ("BROKEN", "bold red") if v["broken"] else ("warning", "yellow") if not v["ok"] else ("holds", "green")
        )
        word, style = ("skipped", "dim") if v["skipped"] else (word, style)
        table.add_row(v["law"], v["family"], Text(word, style), f"{v['seconds']:.1f}")
        for line in (v["detail"], v["skipped"]):
            if line:
                table.add_row(Text(f"  {line}", "dim"))
    console = open_console()
    console.print(table)
    broken, warned = sum(v["broken"] for v in results), sum(not v["ok"] and not v["broken"] for v in results)
    tail = f", {warned} warning{'s' if warned > 1 else ''}" if warned else ""
    console.print(
        f"\n{len(results)} verdicts, {broken} broken{tail}", highlight=False, style="bold red" if broken else "bold"
    )
