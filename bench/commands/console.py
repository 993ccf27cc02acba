"""Console output: progress on stderr, the answer on stdout, and what happens when a stream closes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@contextlib.contextmanager
def clean_stdout() -> Generator[Callable[[Any], None]]:
    """stdout belongs to the answer: whatever a library prints meanwhile goes to stderr."""
    answers: list[Any] = []
    with contextlib.redirect_stdout(sys.stderr):
        yield (
            answers.append if os.environ.get("RANK", "0") == "0" else lambda _: None
        )  # of several processes one speaks
    for given in answers:
        if callable(given):
            given()
        else:
            print(given)


def open_console(stderr: bool = False) -> Any:
    from rich.console import Console

    class Steady(Console):
        def on_broken_pipe(self) -> None:  # it would end the process
            discard_stderr()

    return Steady(stderr=True) if stderr else Console()


def discard_stderr() -> None:
    """What reads stderr is gone, as `| tee` at a Ctrl-C; work goes on and is saved."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


class TerminalProgress:
    """A view as one live line on stderr; plain lines where stderr is no terminal."""

    def __init__(self, progress: Any):
        self._progress, self._task, self._said = progress, None, -1
        self._live = progress.console.is_terminal

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def phase(self, name: str, total: float) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, note="")
        if not self._live:
            self.message(name)

    def advance(self, by: float) -> None:
        if self._task is not None:
            self._progress.advance(self._task, by)

    def about(self, text: str) -> None:
        """What the phase is busy with, of which nobody knows how long it takes."""
        if self._task is not None:
            self._progress.update(self._task, total=None, note=text)

    def status(self, fraction: float, numbers: Mapping[str, float]) -> None:
        reward = numbers.get("reward/mean", float("nan"))
        note = f"reward {reward:.3f} · {numbers['spent/updates']:.0f} updates · {numbers['spent/images']:,.0f} images"
        if numbers.get("reward/errors"):
            note += f" · {numbers['reward/errors']:.0f} not scored"
        self._progress.update(self._task, completed=fraction, note=note)
        if not self._live and int(fraction * 20) > self._said:
            self._said = int(fraction * 20)
            self.message(f"  {100 * fraction:3.0f} %  {note} · {numbers['spent/seconds']:.0f} s")


@contextlib.contextmanager
def terminal_progress() -> Generator[TerminalProgress]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = open_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield TerminalProgress(progress)


def log_lines(progress: TerminalProgress) -> Callable[[Mapping[str, Any]], None]:
    def log(facts: Mapping[str, Any]) -> None:
        progress.message("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))

    return log
