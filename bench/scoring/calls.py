"""Calls of scorers and embedders in this process, which are foreign code: each has a time limit, and none keeps the process from ending."""

from __future__ import annotations

import contextvars
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, error_line
from ..signals import AtOnce, give_up

SECONDS = "GPOBENCH_SCORER_SECONDS"  # environment variable: the time limit of one call
DEFAULT_SECONDS = 3600.0  # a call may load and compile a large model first
POLL = 0.2  # s between looks at whether the user asked to stop


class PartEnded(Exception):
    """A scorer or an embedder raised what would end the program, such as SystemExit; the text is its type and text."""


@dataclass
class _TimedCall:
    """One call, what it returned or raised, and whether it did."""

    work: Callable[[], Any]
    done: threading.Event = field(default_factory=threading.Event)
    value: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:  # raised again where the call was made
            self.error = error
        self.done.set()


class _Worker:
    """A thread that does one call after another; a daemon, so that a call that hangs does not keep Python from ending."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_TimedCall | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._calls,), daemon=True, name="scorer-call")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs: a process that was forked from this one has the object without the thread."""
        return self._thread.is_alive()

    def begin(self, work: Callable[[], Any]) -> _TimedCall:
        call = _TimedCall(work)
        self._calls.put(call)
        return call

    def __del__(self) -> None:
        self._calls.put(None)


def _work(calls: queue.SimpleQueue[_TimedCall | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        del call  # its images


_of_thread = threading.local()  # the worker of each thread that calls scorers: engines may be bound to a thread
_unfinished: dict[int, tuple[object, _TimedCall]] = {}  # id of a scorer -> the scorer, and its call that was given up


def time_limit() -> float:
    """Return the seconds that one call of a scorer in this process may take. Raises UserError on a value that is none."""
    text = os.environ.get(SECONDS, "")
    try:
        seconds = float(text or DEFAULT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UserError(f"{SECONDS} is a number of seconds above 0, got {text!r}")
    return seconds


def call_in_time(part: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a scorer or an embedder returns, or raise what it raises; PartEnded for what would end the program.

    Raises TimeoutError where it takes longer than the limit, and where an earlier call has not returned: engines take one call at
    a time. Raises AtOnce where the user asked to stop and the call does not end.
    """
    _, unfinished = _unfinished.get(id(part), (part, None))
    if unfinished is not None and not unfinished.done.is_set():
        raise TimeoutError("an earlier call has not returned")
    _unfinished.pop(id(part), None)
    seconds = time_limit()
    worker: _Worker | None = getattr(_of_thread, "worker", None)
    if worker is None or not worker.alive:
        worker = _of_thread.worker = _Worker()
    context = contextvars.copy_context()  # what the caller knows, such as that several processes divide this work
    call = worker.begin(lambda: context.run(part, *arguments))
    ends = time.monotonic() + seconds
    while not call.done.wait(min(POLL, max(ends - time.monotonic(), 0.0))):
        late = time.monotonic() >= ends
        if late or give_up():
            _unfinished[id(part)] = (part, call)
            _of_thread.worker = None  # it is busy for an unknown time
            if late:
                raise TimeoutError(f"no answer within {seconds:g} s ({SECONDS} sets the limit)")
            raise AtOnce
    if isinstance(call.error, Exception):
        raise call.error
    if call.error is not None:  # no signal is handled on that thread: the part itself raised it
        raise PartEnded(error_line(call.error)) from call.error
    return call.value
