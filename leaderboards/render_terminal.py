"""Renders a board for a terminal: the columns that fit its width, and the notes below."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.evaluation.ranking import verdict_beside
from .board import RULES, Board
from .columns import in_shown_order
from .formatting import MARKS, cell, flags, p_value, paper_lines, plain, rank, spend, title, transfer
from .render_frontier import FrontierSection, frontier_sections

ColumnText = tuple[str, list[str]]  # head, the cell of each row


def terminal(board: Board, width: int) -> str:
    """Render the board as text of at most `width` character cells a line."""
    required, optional = _required_columns(board), _optional_columns(board)
    required = _shortened(required, width)
    left = width - sum(_size(c) + 2 for c in required if any(c[1])) + 2
    shown = [c for c in required if any(c[1])]
    for column in optional:
        if any(column[1]) and _size(column) + 2 <= left:
            shown.append(column)
            left -= _size(column) + 2
    notes = [*(plain(n) for n in board.notes), *RULES]
    letters = [mark for mark in MARKS if any(mark in flags(r) for r in board.rows)]
    if letters:
        notes.insert(0, "; ".join(f"{mark} {MARKS[mark]}" for mark in letters))
    if sum(any(c[1]) for c in (*required, *optional)) > len(shown):
        notes.append("More columns: --format md, csv, json, latex or html.")
    wrap = lambda text: "\n".join(_lines(text, width))
    parts = [
        wrap(title(board)),
        _aligned(shown, len(board.rows)),
        *(text for part in frontier_sections(board) for text in _frontier(part, width)),
        *(["\n".join(map(wrap, paper_lines(board)))] if board.reported else []),
    ]
    return "\n\n".join([*parts, "\n".join(map(wrap, notes))])


def _required_columns(board: Board) -> list[ColumnText]:
    """Return the columns rank, row, key, difference, p and marks."""
    rows = board.rows
    return [
        ("", [rank(r) for r in rows]),
        ("", [plain(r.label) for r in rows]),
        (board.key, _scores(board, board.key)),
        (f"minus {plain(board.baseline)}", [cell(r.versus, sign=True) for r in rows]),
        ("p", [p_value(r.holm) for r in rows]),
        ("", ["".join(flags(r)) for r in rows]),
    ]


def _optional_columns(board: Board) -> list[ColumnText]:
    """Return the columns verdict beside the key, training scorer, first currency of the budget, number of seeds, and the other scorers."""
    rows, currency = board.rows, board.clock
    others = [c.key for c in in_shown_order(board)[1:]]
    verdict = verdict_beside(board.key, others)
    training = [c.key for c in board.columns if c.role == "training" and c.key != board.key][:1]
    training = [*([verdict] if verdict else []), *(key for key in training if key != verdict)]
    return [
        *((key, _scores(board, key)) for key in training),
        ("transfer", [transfer(r) for r in rows]),
        (currency, [spend(currency, r.spent[currency]) if currency in r.spent else "" for r in rows]),
        ("seeds", [str(len(r.seeds) or "") for r in rows]),
        ("verified", [r.verified for r in rows]),
        *((key, _scores(board, key)) for key in others if key not in training),
    ]


def _scores(board: Board, key: str) -> list[str]:
    return [cell(r.cells[key].after) if key in r.cells else "" for r in board.rows]


def _shortened(columns: Sequence[ColumnText], width: int) -> list[ColumnText]:
    """Cut the heads of the required columns, and labels that are too long, to fit."""
    from rich.cells import cell_len

    columns = [(_cut(head, max(20, *map(cell_len, texts))), texts) for head, texts in columns]
    room = width - sum(_size(c) + 2 for c in columns if any(c[1])) + 2
    if room < 0:  # only the column of labels can be long
        limit = max(12, _size(columns[1]) + room)
        columns[1] = ("", [_cut(text, limit) for text in columns[1][1]])
    return columns


def _size(column: ColumnText) -> int:
    """Return the width of a column in character cells."""
    from rich.cells import cell_len

    return max(cell_len(text) for text in (column[0], *column[1]))


def _aligned(columns: Sequence[ColumnText], rows: int) -> str:
    from rich.cells import cell_len

    sizes = [_size(c) for c in columns]
    pad = lambda texts: "  ".join(t + " " * (s - cell_len(t)) for t, s in zip(texts, sizes, strict=True)).rstrip()
    return "\n".join([pad([c[0] for c in columns])] + [pad([c[1][i] for c in columns]) for i in range(rows)])


def _frontier(part: FrontierSection, width: int) -> list[str]:
    """Return the paragraphs of a section about a search."""
    tables: list[str] = []
    for table in part.tables:
        columns = [(head, list(texts)) for head, *texts in zip(*table, strict=True)]
        labels, *others = columns
        room = max(12, width - sum(_size(c) + 2 for c in others))
        tables.append(_aligned([(labels[0], [_cut(text, room) for text in labels[1]]), *others], len(table) - 1))
    wrap = lambda text: "\n".join(_lines(text, width))
    return [wrap(part.title), *tables, wrap(part.note)]


def _cut(text: str, limit: int) -> str:
    """Cut the text to at most `limit` character cells; some letters take two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= limit else set_cell_size(text, limit - 1).rstrip() + "…"


def _lines(text: str, width: int) -> list[str]:
    """Wrap the text to lines of at most `width` character cells, all indented like the first."""
    from rich.cells import cell_len, chop_cells

    indent = " " * (len(text) - len(text.lstrip()))
    lines: list[str] = []
    for word in (part for w in text.split() for part in chop_cells(w, width - len(indent))):
        if lines and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines
