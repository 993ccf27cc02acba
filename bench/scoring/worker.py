"""The program of a worker process: opens scorers by their references and scores the images that its parent puts in shared memory.

It is started by `worker_pool.Worker`, one for each process of a pool. The two exchange pickles over a socket pair that nobody
else can reach. A worker ends when the socket closes or when its parent is another process, so that none outlives its run.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from ..errors import UserError, error_line
from ..spec import Images, Scorer
from .scorers import checked_scores, open_scorer
from .worker_pool import ENDED, RAISED, REFUSED, SCORES, UNOPENED, Reply, Request

PARENT_POLL = 1.0  # s between looks at whether the parent still lives


@dataclass
class _OpenScorers:
    """What a worker process keeps between requests: scorers by reference, and the parent's memory."""

    scorers: dict[str, Scorer] = field(default_factory=dict[str, Scorer])
    memory: SharedMemory | None = None

    def answer(self, request: Request) -> Reply:
        """Score one request; whatever the scorer raises is part of the reply."""
        images = self._images(request)
        try:
            scorer = self._scorer(request)
        except BaseException as error:  # foreign code is imported
            return UNOPENED, str(error) if isinstance(error, UserError) else error_line(error)
        try:
            return SCORES, checked_scores(scorer, scorer(images, request.prompts), len(images))
        except UserError as error:
            return REFUSED, str(error)
        except Exception as error:
            return RAISED, error_line(error)
        except BaseException as error:  # SystemExit: what would end the program
            return ENDED, error_line(error)

    def _images(self, request: Request) -> Images:
        """A copy of the images, (B, H, W, 3), that cannot be written on."""
        if self.memory is None or self.memory.name != request.memory:
            if self.memory is not None:
                self.memory.close()
            self.memory = _attached(request.memory)
        shared: Images = np.ndarray(request.shape, np.uint8, self.memory.buf)
        images = shared.copy()
        images.flags.writeable = False
        return images

    def _scorer(self, request: Request) -> Scorer:
        if request.reference not in self.scorers:
            scorer = open_scorer(request.reference)
            if scorer.id != request.id:
                raise UserError(f"in a worker its id is {scorer.id}, not {request.id}")
            self.scorers[request.reference] = scorer
        return self.scorers[request.reference]


def _attached(name: str) -> SharedMemory:
    """The parent's memory. Before Python 3.13 attaching registers it for removal when this process ends (bpo-38119)."""
    register, resource_tracker.register = resource_tracker.register, lambda *_: None  # type: ignore[assignment]
    try:
        return SharedMemory(name)
    finally:
        resource_tracker.register = register


def _end_with_parent(parent: int) -> None:
    """End this process when its parent has ended, also inside a call that does not return."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Answer requests on the socket with the given number until it is closed. Returns the exit code."""
    handle, parent = int(arguments[0]), int(arguments[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent handles them, and ends this process
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent(parent)
    opened, connection = _OpenScorers(), Connection(handle)
    try:
        sys.path[:] = connection.recv()
        while True:
            connection.send(_received_answer(opened, connection))
    except (EOFError, OSError):
        return 0


def _received_answer(opened: _OpenScorers, connection: Connection[Any, Any]) -> Reply:
    """Receive a request and answer it; facts of a prompt that this process cannot read are a reason, as for a scorer."""
    message = connection.recv_bytes()
    try:
        request = _unpickled(message)
    except Exception as error:
        return RAISED, f"a worker cannot read the prompts: {error_line(error)}"
    return opened.answer(request)


def _unpickled(message: bytes) -> Request:
    return pickle.loads(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
