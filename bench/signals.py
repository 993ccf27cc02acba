"""Ctrl-C: the first lets the iteration at hand end and be saved, the second does not wait."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Generator
from typing import Any


class AtOnce(BaseException):
    """Asked to stop a second time; typer would swallow a KeyboardInterrupt and what we have to say."""


@contextlib.contextmanager
def asked_to_stop() -> Generator[Callable[[], bool]]:
    """Within: whether SIGINT, SIGTERM or, unless nohup set it aside, SIGHUP came; the second one raises AtOnce."""
    asked: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if asked:
            raise AtOnce
        asked.append(number)
        with contextlib.suppress(OSError, ValueError):  # a pipe whose reader the same Ctrl-C ended
            print(
                "\nstopping after the step at hand, so that nothing of it is lost (Ctrl-C again: at once)",
                file=sys.stderr,
            )

    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal is gone
        heard.append(signal.SIGHUP)
    old = {number: signal.signal(number, hear) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
