"""Reads the data of a report that the runs of a board stored beside their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .album import Album, make_album
from .board import Board
from .breakdowns import Breakdown, PromptCase, breakdowns, hardest
from .curves import Curve, Pace, curve, pace
from .formatting import plain
from .measures import Measure, measures
from .rows import runs_by_row
from .run_files import prompt_texts
from .runs import LoadedRun


@dataclass(frozen=True)
class ReportData:
    """Data that a page shows beside the table."""

    rows: Mapping[str, Sequence[LoadedRun]]  # label -> its runs
    texts: Sequence[str]  # the test prompts
    curves: Sequence[Curve]
    pace: Pace | None
    measures: Sequence[Measure]
    parts: Sequence[Breakdown]
    hardest: Mapping[str, tuple[Sequence[PromptCase], Sequence[PromptCase]]]  # label -> lowest, largest losses
    album: Album | None
    notes: Sequence[str]  # on missing curves and images


def read_report_data(board: Board, runs: Sequence[LoadedRun]) -> ReportData:
    """Read the data of a board's runs. Raises UserError on a file that cannot be read."""
    rows = runs_by_row(board.rows, runs)
    measured = {label: group for label, group in rows.items() if group}
    curves = {label: curve(label, group, board.clock) for label, group in measured.items()}
    present = [each for each in curves.values() if each]
    texts = [plain(text) for text in prompt_texts(runs[0])]
    shown = [c.key for c in board.columns if c.role in ("training", "held-out", "auxiliary")]
    album = make_album(measured, shown)
    lacking = {
        "curve": [label for label, each in curves.items() if each is None],
        "pictures": [label for label in measured if album is None or label not in album.frames],
    }
    return ReportData(
        rows=rows,
        texts=texts,
        curves=present,
        pace=pace(present, rows, board.key, board.clock, board.budget.get(board.clock, math.nan)),
        measures=measures(board),
        parts=breakdowns(board.key, rows, texts),
        hardest={label: hardest(group, board.key) for label, group in measured.items()},
        album=album,
        notes=[f"No {what} stored by: {', '.join(labels)}." for what, labels in lacking.items() if labels],
    )
