"""Console output: progress on stderr, the answer on stdout, and closed streams that end no run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NoReturn

import typer

from ..errors import NO_RESULT
from ..text import printable


@contextlib.contextmanager
def clean_stdout() -> Generator[Callable[[Any], None]]:
    """Within the context stdout is stderr, so that libraries print there; what is passed to the function it gives is printed last."""
    answers: list[Any] = []
    with contextlib.redirect_stdout(sys.stderr):
        yield (
            # Of several processes only the first prints.
            answers.append if os.environ.get("RANK", "0") == "0" else lambda _: None
        )
    for answer in answers:
        if callable(answer):
            answer()
        else:
            print(printable(str(answer)))


def open_console(stderr: bool = False) -> Any:
    """Return a rich console to which text is text, `[/]` no markup and `:cat:` no emoji, and that sends none of its control characters."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class SafeConsole(Console):
        def on_broken_pipe(self) -> None:  # rich ends the process here; a closed pipe is no reason to
            discard_stderr()

        def render_str(self, text: str, **options: Any) -> Text:  # before widths are measured
            return super().render_str(printable(text), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):  # what rich itself sends is marked as control
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return SafeConsole(stderr=stderr, markup=False, emoji=False)


def end_without_result() -> NoReturn:
    """End with the exit code of numbers that are no result, and say so: too many images could not be scored."""
    from ..evaluation.record import INVALID_RULE

    typer.echo(f"gpobench: these numbers are no result: {INVALID_RULE}", err=True)
    raise typer.Exit(NO_RESULT)


def discard_stderr() -> None:
    """Send stderr to /dev/null: its reader is gone, as `| tee` at a Ctrl-C, and the run goes on to save its work."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


class TerminalProgress:
    """Progress as one live line on stderr; plain lines where stderr is no terminal."""

    def __init__(self, progress: Any):
        self._progress, self._task, self._steps_said = progress, None, -1
        self._live = progress.console.is_terminal

    def message(self, text: str) -> None:
        """Print a line above the live one."""
        self._progress.console.print(text, highlight=False, markup=False)

    def phase(self, name: str, total: float) -> None:
        """Begin a phase that is done when it has advanced by `total`."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, note="")
        if not self._live:
            self.message(name)

    def advance(self, by: float) -> None:
        """Move the bar of the phase."""
        if self._task is not None:
            self._progress.advance(self._task, by)

    def about(self, text: str) -> None:
        """Show what the phase is doing, without a bar."""
        if self._task is not None:
            self._progress.update(self._task, total=None, note=text)

    def status(self, fraction: float, numbers: Mapping[str, float]) -> None:
        """Show the fraction of the budget that is spent, and the latest metrics."""
        reward = numbers.get("reward/mean", float("nan"))
        note = f"reward {reward:.3f} · {numbers['spent/updates']:.0f} updates · {numbers['spent/images']:,.0f} images"
        if numbers.get("reward/errors"):
            note += f" · {numbers['reward/errors']:.0f} not scored"
        self._progress.update(self._task, completed=fraction, note=note)
        if not self._live and int(fraction * 20) > self._steps_said:
            self._steps_said = int(fraction * 20)
            self.message(f"  {100 * fraction:3.0f} %  {note} · {numbers['spent/seconds']:.0f} s")


@contextlib.contextmanager
def terminal_progress() -> Generator[TerminalProgress]:
    """Within the context: progress on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console = open_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield TerminalProgress(progress)


def log_lines(progress: TerminalProgress) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that prints a mapping of numbers in one line."""

    def log(numbers: Mapping[str, Any]) -> None:
        progress.message("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items()))

    return log
