"""Handling of Ctrl-C: the first one lets the current iteration end and be saved, the second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator
from typing import Any


class AtOnce(BaseException):
    """The user asked to stop, and nothing at hand has to end first. No KeyboardInterrupt: typer would end without a word."""


def raise_at_once() -> None:
    """From here on Ctrl-C raises AtOnce, outside `asked_to_stop` too; where SIGINT is ignored, as behind nohup, it stays so."""

    def receive(number: int, frame: Any) -> None:
        raise AtOnce

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, receive)


@contextlib.contextmanager
def asked_to_stop() -> Generator[Callable[[], bool]]:
    """Catch SIGINT, SIGTERM and SIGHUP (unless nohup ignores it); yields whether one came. A second one raises AtOnce."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise AtOnce
        received.append(number)
        with contextlib.suppress(OSError, ValueError):  # stderr is a pipe whose reader the same Ctrl-C ended
            print(
                "\nstopping after the step at hand, so that nothing of it is lost (Ctrl-C again: at once)",
                file=sys.stderr,
            )

    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal is gone
        handled.append(signal.SIGHUP)
    previous = {number: signal.signal(number, receive) for number in handled}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
