"""Options and output that several commands of the leaderboards share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...bench.errors import UserError
from ...bench.text import printable

# Nothing heavy above this line: `gpobench --help` loads every command.

RUNS_HELP = "Run directories, folders of run directories, or the JSON file of a comparison."
Runs = Annotated[list[Path], typer.Argument(help=RUNS_HELP)]
Task = Annotated[str | None, typer.Option(help="Only the runs of this task, where there are several.")]
BaselineRow = Annotated[str, typer.Option(help="The row that the others are compared with: a method or a label.")]
Key = Annotated[
    str | None,
    typer.Option(help="Look at another scorer/metric than the task's key: the table is ranked by it and says so."),
]


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text without what would steer a terminal: names in it may be foreign."""
    typer.echo(printable(text), err=err, nl=nl)


def check_place(path: Path) -> None:
    """Raise UserError where a file cannot be written: before the work whose result it is to hold."""
    from ...bench.files import make_place

    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    make_place(path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all and say so on stderr. Raises UserError where it cannot be written."""
    from ...bench.files import write_atomically

    try:
        write_atomically(path, lambda p: p.write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    say(f"wrote {path}", err=True)
