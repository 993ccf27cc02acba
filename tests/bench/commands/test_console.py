"""The console door: whatever is printed, no control character of foreign text reaches the terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import ColorSystem

from gpobench.bench.commands import app
from gpobench.bench.commands.console import TerminalProgress, clean_stdout, open_console

HOSTILE = "x\x1b]52;c;ZWNobw==\x07\x1b[2J\x9b2J\u202ey"
CONTROLS = ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e")


def shown_by(print_it: Any) -> str:
    console = open_console()
    console.file = io.StringIO()
    console._force_terminal, console._color_system = True, ColorSystem.STANDARD
    print_it(console)
    return console.file.getvalue()


def table_of(text: str) -> Any:
    from rich.table import Table

    table = Table(text)
    table.add_row(text)
    return table


@pytest.mark.parametrize(
    "print_it",
    [
        lambda console: console.print(HOSTILE),
        lambda console: console.print(HOSTILE, markup=False, highlight=False),
        lambda console: console.print(table_of(HOSTILE)),
        lambda console: console.print(f"[bold]{HOSTILE}[/]"),
        lambda console: console.print(HOSTILE, style="bold red"),
    ],
)
def test_a_console_sends_no_foreign_controls(print_it: Any) -> None:
    text = re.sub("\x1b\\[[0-9;]*m", "", shown_by(print_it))  # colours are rich's own
    assert "\\u001b]52" in text.replace("\n", "") and not any(control in text for control in CONTROLS)


def test_a_console_still_has_colours() -> None:
    assert "\x1b[1m" in shown_by(lambda console: console.print("[bold]x[/]"))


def test_progress_lines_and_bars_send_none() -> None:
    from rich.progress import Progress, TextColumn

    console = open_console()
    console.file = io.StringIO()
    console._force_terminal = True
    with Progress(TextColumn("{task.description}"), TextColumn("{task.fields[note]}"), console=console) as progress:
        shown = TerminalProgress(progress)
        shown.phase(HOSTILE, 3)
        shown.message(HOSTILE)
        shown.about(HOSTILE)
    text = console.file.getvalue()
    assert "\\u001b]52" in text and "\x1b[?25l" in text  # rich's own movements stay
    assert not any(control in text for control in CONTROLS)


def test_answers_and_errors_send_none(capsys: pytest.CaptureFixture[str]) -> None:
    with clean_stdout() as answer:
        answer(f'{{"reason": "{HOSTILE}"}}')
    app._print_error(f"the server answered 403: {HOSTILE}")  # pyright: ignore[reportPrivateUsage]
    streams = capsys.readouterr()
    for text in (streams.out, streams.err):
        assert "\\u001b]52" in text and not any(control in text for control in CONTROLS)
