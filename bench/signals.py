"""Handling of Ctrl-C: the first one lets the current iteration end and be saved, the second one stops at once."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any


class AtOnce(BaseException):
    """The user asked to stop, and nothing at hand has to end first. No KeyboardInterrupt: typer would end without a word."""


PATIENCE = 30.0  # s after the first Ctrl-C for which a scorer that does not return is waited for
_give_up_at = math.inf  # on the monotonic clock


def give_up() -> bool:
    """Return whether the user asked to stop, and what does not return is no longer waited for."""
    return time.monotonic() >= _give_up_at


def _give_up_after(seconds: float) -> None:
    global _give_up_at
    _give_up_at = time.monotonic() + seconds


def raised_by_user(error: BaseException) -> bool:
    """Return whether a signal of the user raised the error, and not the code that was running.

    Where Python's own handler is installed, as in a notebook, every KeyboardInterrupt of the main thread counts as the user's.
    """
    if isinstance(error, AtOnce):
        return True
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and default and main


def raise_at_once() -> None:
    """From here on Ctrl-C raises AtOnce, outside `asked_to_stop` too; where SIGINT is ignored, as behind nohup, it stays so."""

    def receive(number: int, frame: Any) -> None:
        _give_up_after(0)
        raise AtOnce

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, receive)


@contextlib.contextmanager
def asked_to_stop() -> Generator[Callable[[], bool]]:
    """Catch SIGINT, SIGTERM and SIGHUP (unless nohup ignores it); yields whether one came. A second one raises AtOnce."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            _give_up_after(0)
            raise AtOnce
        received.append(number)
        _give_up_after(PATIENCE)
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
        _give_up_after(math.inf)
