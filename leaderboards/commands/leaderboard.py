"""gpobench leaderboard: prints or writes the table of finished runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...bench.errors import UserError
from .options import BaselineRow, Key, Runs, Task, check_place, say, write_text

FORMATS = ("terminal", "md", "csv", "json", "latex", "html")
FORMAT_BY_SUFFIX = {".md": "md", ".csv": "csv", ".json": "json", ".tex": "latex", ".html": "html"}


def leaderboard(
    runs: Runs,
    format: Annotated[
        str | None,
        typer.Option("--format", help=" | ".join(FORMATS) + "; default: by the suffix of --out, else terminal."),
    ] = None,
    baseline: BaselineRow = "base",
    out: Annotated[Path | None, typer.Option(help="Write the table there instead of printing it.")] = None,
    key: Key = None,
    task: Task = None,
    studies: Annotated[
        bool,
        typer.Option("--studies", help="One row over a method's tuning studies, whose means stand where seeds stand."),
    ] = False,
    across: Annotated[
        bool,
        typer.Option(
            "--across", help="Aggregate runs of several tasks: each one's gain, IQM, probability of improvement."
        ),
    ] = False,
) -> None:
    """Rank finished runs, with an interval on every number.

    The runs are of one task, model and budget. Rows are methods, averaged over their seeds; the base they started from is one
    of them. A rank is one more than the number of rows that are significantly better, corrected over all pairs; rows of one rank
    do not differ significantly.

    Examples: `gpobench leaderboard runs` · `gpobench leaderboard runs --baseline flow-grpo --out table.md` ·
    `gpobench leaderboard runs/gpo-* runs/sft-* --format latex` · `gpobench leaderboard runs --across`
    """
    kind = _format(format, out)
    if out is not None:
        check_place(out)
    width = max(80, shutil.get_terminal_size((80, 24)).columns) if out is None else 80
    if across:
        if task is not None or key is not None or studies:
            raise UserError(
                "--across is over all tasks, each by its own key: leave --task and --key out, and --studies"
            )
        text = _aggregate_text(runs, baseline, kind, width)
    else:
        from ..build_board import build_board
        from ..notes import sequential_notes
        from ..render import render
        from ..runs import excluded_runs, load_runs

        loaded, notes = load_runs(runs, task), [*excluded_runs(runs, task), *sequential_notes(runs)]
        if studies:
            from ..studies import by_study

            loaded, study_notes = by_study(loaded)
            notes += study_notes
        board = build_board(loaded, baseline, key, notes=notes)
        text = render(board, kind, width=width)
    if out is None:
        say(text, nl=False)
    else:
        write_text(out, text)


def _aggregate_text(runs: Sequence[Path], baseline: str, kind: str, width: int) -> str:
    from ..aggregate import aggregate
    from ..render_aggregate import render
    from ..runs import excluded_runs, load_runs

    return render(aggregate(load_runs(runs), baseline, notes=excluded_runs(runs)), kind, width=width)


def _format(format: str | None, out: Path | None) -> str:
    """The format asked for, else the one of the suffix. Raises UserError on an unknown one."""
    if format is None and out is not None and out.suffix not in {*FORMAT_BY_SUFFIX, ".txt", ""}:
        suffixes = ", ".join(f"*{suffix}" for suffix in FORMAT_BY_SUFFIX)
        raise UserError(f"{out}: name it {suffixes} or *.txt, or give --format")
    kind = format or (FORMAT_BY_SUFFIX.get(out.suffix, "terminal") if out else "terminal")
    if kind not in FORMATS:
        from ...bench.registry import unknown

        raise unknown("format", kind, FORMATS)
    return kind
