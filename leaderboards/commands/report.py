"""gpobench report: writes one HTML page about finished runs, and its figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...bench.errors import UserError
from .options import BaselineRow, Key, Runs, Task, check_place, say, write_text


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    baseline: BaselineRow = "base",
    key: Key = None,
    task: Task = None,
    plots: Annotated[
        Path | None, typer.Option(help="A folder for the curves and the trade-off as SVG and PNG files.")
    ] = None,
) -> None:
    """Write a page about finished runs for any browser, offline.

    The runs are of one task, model and budget. The page holds the leaderboard, curves over spend, a search against
    training, trade-offs, pictures on the same noise, the hardest prompts, settings and provenance.

    Examples: `gpobench report runs` · `gpobench report runs -o ocr.html --plots figures`
    """
    from ...bench.files import make_folder
    from ..build_board import build_board
    from ..figures import write_figures
    from ..notes import sequential_notes
    from ..page import page
    from ..report_data import read_report_data
    from ..runs import excluded_runs, load_runs

    check_place(out)
    if plots is not None:
        make_folder(plots)
    loaded = load_runs(runs, task)
    board = build_board(loaded, baseline, key, notes=[*excluded_runs(runs, task), *sequential_notes(runs)])
    data = read_report_data(board, loaded)
    write_text(out, page(board, data))
    if plots is not None:
        try:
            files = write_figures(board, data, plots)
        except OSError as error:
            raise UserError(f"cannot write {plots}: {error.strerror}") from None
        say(f"wrote {', '.join(map(str, files)) or 'no plots'}", err=True)
