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
    """Within: whether SIGINT or SIGTERM came; the second one raises AtOnce."""
    asked: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if asked:
            raise AtOnce
        asked.append(number)
        print(
            "\nstopping after the step at hand, so that nothing of it is lost (Ctrl-C again: at once)", file=sys.stderr
        )

    old = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
