"""Renders a board in the requested format."""

from __future__ import annotations

from collections.abc import Callable

from ..bench import registry
from .board import Board
from .render_data import as_csv, as_json
from .render_markup import html_page, latex, markdown
from .render_terminal import terminal


def render(board: Board, format: str = "terminal", *, width: int = 80) -> str:
    """Render the board as text, ending in a new line. width: of the terminal. Raises UserError on an unknown format."""
    formats: dict[str, Callable[[Board], str]] = {
        "terminal": lambda b: terminal(b, width),
        "md": markdown,
        "csv": as_csv,
        "json": as_json,
        "latex": latex,
        "html": html_page,
    }
    if format not in formats:
        raise registry.unknown("format", format, formats)
    return formats[format](board).rstrip("\n") + "\n"
