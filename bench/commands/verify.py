"""`gpobench verify`: obtains the numbers of a finished run again and says whether they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..signals import asked_to_stop
from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, ScorerLocations
from .tables import cell, is_finite, p_value

if TYPE_CHECKING:
    from ..evaluation.verification import Statement

EPILOG = (
    "Examples: `gpobench verify runs/NAME` · `gpobench verify runs/NAME --level rerun` · `gpobench verify runs/NAME --level audit "
    "--prompts secret.txt`\n\nExit codes: 0 the numbers hold · 1 they do not hold · 2 one line says what to change · 3 cannot tell · "
    "130 stopped, the same command goes on"
)
EXIT_CODES: Mapping[str, int] = {"holds": 0, "does not hold": 1, "cannot tell": 3}


def verify(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    level: Annotated[
        str | None,
        typer.Option(
            help="rejudge: judge the adapter again · rerun: make the run again · audit: judge base and result on prompts and noise "
            "that the author did not know; default: rejudge, of a search rerun."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="With --level audit: your prompts; default: fresh ones, where the task can draw them."),
    ] = None,
    evaluation_seed: Annotated[
        str, typer.Option(help="With --level audit: the seed of the evaluation's noise, or random.")
    ] = "random",
    out: Annotated[
        Path | None, typer.Option(help="Where a second run and the new scores go; default: .verify beside the run.")
    ] = None,
    scorer_at: ScorerLocations = None,
    as_json: AsJson = False,
) -> None:
    """Obtain a finished run's numbers again; do they hold?

    The statement is written to verification.json beside the record, bound to it by its hash. Tables show the level of every row:
    self, rejudged, rerun or audited.
    """
    seed = _seed(evaluation_seed)
    with clean_stdout() as answer, terminal_progress() as progress, asked_to_stop() as stopped:
        from ..experiments.verify import Verification
        from ..experiments.verify import verify as obtain_again
        from ..scoring.references import scorer_locations

        request = Verification(run, level, prompts, seed, out, scorer_locations(scorer_at or (), {}))  # type: ignore[arg-type]
        statement, not_written = obtain_again(request, progress, stopped)
        answer(statement.model_dump_json(indent=1) if as_json else lambda: print_statement(statement))
    if not_written:  # after the numbers, which would be lost otherwise
        raise UserError(not_written)
    raise typer.Exit(EXIT_CODES[statement.verdict])


def _seed(text: str) -> int | None:
    """The seed of the evaluation's noise; None for random. Raises UserError on anything else."""
    if text == "random":
        return None
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise UserError(f"--evaluation-seed is a number below {2**32}, or random, got {text!r}")
    return int(text)


def print_statement(statement: Statement) -> None:
    """Print the gains that were claimed and found, the verdict and its reason."""
    from rich.table import Table

    console = open_console()
    table = Table("", "claimed", "found", "p", box=None, pad_edge=False, header_style="bold")
    for key, number in statement.gain.items():
        p = p_value(number.p) if is_finite(number.p) else ""
        table.add_row(key, cell(number.claimed, sign=True), cell(number.found, sign=True), p)
    console.print(table, markup=False)
    console.print("gains over the base with 95 % intervals; p: of their difference, where it was tested", style="dim")
    equal = [number.equal_images for number in statement.scores.values() if number.equal_images is not None]
    if equal:
        share = "all" if min(equal) == 1 else f"at least {100 * min(equal):.1f} % by each scorer"
        console.print(f"images with the record's score, to the last digit: {share}", style="dim")
    for note in statement.notes:
        console.print(note, highlight=False, markup=False)
    style = {"holds": "bold green", "does not hold": "bold red"}.get(statement.verdict, "bold yellow")
    console.print(f"{statement.level}: {statement.verdict}", style=style, highlight=False)
    console.print(statement.reason, highlight=False, markup=False)
