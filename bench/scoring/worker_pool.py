"""Worker processes that score images beside the sampler, and the scorer that hands its images to them.

A scorer of one core keeps a GPU waiting: its images are cut into chunks of a fixed size, each is scored by whichever worker is
free, and the results are put together in order. So a score does not depend on the number of workers. Images go through shared
memory; a worker makes the scorer by its name, nothing of it is pickled. The standard library's pool of processes is not used:
there a process that dies takes the whole pool with it, and one that hangs cannot be ended alone.
"""

from __future__ import annotations

import atexit
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import UserError
from ..signals import AtOnce, give_up
from ..spec import Images, Prompt, Scores, Values, check_images
from .calls import POLL, SECONDS, PartEnded, time_limit

SCORES, REFUSED, RAISED, ENDED, UNOPENED = "scores", "refused", "raised", "ended", "unopened"  # kinds of a reply
Reply = tuple[str, Any]  # the kind, and the scores or the text of what was raised
SHARED = Path("/dev/shm")  # where Linux keeps shared memory
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
OTHERWISE = "--set scorer.workers=0 scores in this process"


class WorkersFailed(UserError):
    """Worker processes cannot do their work: what asked for scores stops, and no image is counted as one without a score."""


class Opened(Protocol):
    """A scorer that was opened in this process."""

    id: str
    name: str
    metrics: Sequence[str]
    part: Any  # what its reference made

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores: ...


@dataclass(frozen=True)
class Request:
    """What a worker is asked: the scorer by reference and id, where the images lie, and their prompts."""

    reference: str
    id: str
    memory: str  # name of the shared memory
    shape: tuple[int, ...]  # (B, H, W, 3)
    prompts: Sequence[Prompt]


class _WorkerGone(Exception):
    """A worker process ended; the text says how."""


class Worker:
    """One worker process with its shared memory; started when it is first needed, and again after it ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # in which relative references are found
        self._process: subprocess.Popen[str] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._memory: SharedMemory | None = None
        self._last_lines: deque[str] = deque(maxlen=1)
        self._closed = False

    @property
    def pid(self) -> int:
        """The id of its process; 0 where none runs."""
        return self._process.pid if self._process else 0

    def score(self, scorer: Opened, reference: str, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score images (B, H, W, 3) in the process. Raises what the scorer raised there, TimeoutError, AtOnce, or _WorkerGone."""
        connection = self._connection or self._start()
        request = Request(reference, scorer.id, self._share(images), images.shape, prompts)
        try:
            connection.send(request)
            kind, value = self._reply(connection)
        except TimeoutError:
            raise
        except (EOFError, OSError):
            raise _WorkerGone(self._end()) from None
        if kind == SCORES:
            return value
        if kind == UNOPENED:
            raise WorkersFailed(f"the scorer {reference!r} does not open in a worker process: {value}; {OTHERWISE}")
        raise UserError(value) if kind == REFUSED else PartEnded(value)

    def _reply(self, connection: Connection[Any, Any]) -> Reply:
        """Wait for the reply; a process that does not answer in time, or that nobody waits for any more, is ended."""
        seconds = time_limit()
        ends = time.monotonic() + seconds
        while not connection.poll(min(POLL, max(ends - time.monotonic(), 0.0))):
            if time.monotonic() >= ends:
                self._end()
                raise TimeoutError(f"no answer within {seconds:g} s ({SECONDS} sets the limit)")
            if give_up():
                self._end()
                raise AtOnce
        return connection.recv()

    def _start(self) -> Connection[Any, Any]:
        if self._closed:
            raise _WorkerGone("closed")
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", f"{__package__}.worker", str(theirs.fileno()), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd=self._folder,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C goes to this process alone: the current iteration still needs its scores
            )
        except OSError as error:
            ours.close()
            raise WorkersFailed(f"a worker process cannot be started: {error.strerror or error}; {OTHERWISE}") from None
        finally:
            theirs.close()
        threading.Thread(target=_drain, args=(self._process.stderr, self._last_lines), daemon=True).start()
        self._connection = Connection(ours.detach())
        with suppress(OSError):  # it ended at once: seen at the first reply
            self._connection.send(list(sys.path))
        return self._connection

    def _share(self, images: Images) -> str:
        """Copy images into the shared memory, which grows where it is too small; returns its name."""
        if self._memory is None or self._memory.size < images.nbytes:
            self._forget_memory()
            _check_room(images.nbytes)
            try:
                self._memory = SharedMemory(create=True, size=max(images.nbytes, 1))
            except OSError as error:
                raise WorkersFailed(f"no shared memory for images: {error.strerror or error}; {OTHERWISE}") from None
        shared: Images = np.ndarray(images.shape, np.uint8, self._memory.buf)
        shared[...] = images
        return self._memory.name

    def _forget_memory(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory.unlink()
            self._memory = None

    def _end(self) -> str:
        """End the process; returns how it ended."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            with suppress(OSError):
                connection.close()  # an idle worker ends by itself
        if process is None:
            return "it did not run"
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()
        return _how_it_ended(process.wait(), self._last_lines)

    def kill(self) -> None:
        """End the process for good, also in the middle of a request: the thread that waits for its reply sees the end."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """Take the process and the memory away; no thread may be at work with it."""
        self._end()
        self._forget_memory()


def _drain(stream: Any, last_lines: deque[str]) -> None:
    """Read a stream to its end, so that its writer never blocks; keeps the last lines."""
    with suppress(ValueError, OSError), stream:
        for line in stream:
            if line.strip():
                last_lines.append(line.strip()[:300])


def _how_it_ended(code: int, last_lines: Sequence[str]) -> str:
    if code >= 0:
        return f"it ended with code {code}" + (f": {last_lines[-1]}" if last_lines else "")
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", as a system does that runs out of memory" if name == "SIGKILL" else "")


def _check_room(size: int) -> None:
    """Raise WorkersFailed where shared memory has no room: writing to it would end this process by a signal."""
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else size
    if free < size:
        raise WorkersFailed(
            f"{SHARED} has {free / 2**20:.0f} MB free, and a worker's images take {size / 2**20:.0f} MB; "
            f"give a container more (--shm-size), or {OTHERWISE}"
        )


class WorkerPool:
    """The worker processes of a run, which its scorers share."""

    def __init__(self, count: int) -> None:
        self.workers = [Worker(Path.cwd()) for _ in range(count)]
        self._idle: queue.LifoQueue[Worker] = (
            queue.LifoQueue()
        )  # the last one used first: few start where few are needed
        for worker in reversed(self.workers):
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="scorer-worker")
        self._closed = False
        atexit.register(self.close)

    def submit(self, scorer: Opened, reference: str, images: Images, prompts: Sequence[Prompt]) -> Future[Scores]:
        """Score one chunk as soon as a worker is free."""
        return self._threads.submit(self._score, scorer, reference, images, prompts)

    def _score(self, scorer: Opened, reference: str, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score one chunk; one whose worker ended is scored once more by a new process."""
        worker = self._idle.get()
        try:
            try:
                return worker.score(scorer, reference, images, prompts)
            except _WorkerGone:
                return worker.score(scorer, reference, images, prompts)
        except _WorkerGone as gone:
            if self._closed:
                raise AtOnce from None
            raise WorkersFailed(
                f"{scorer.name}: a worker process ended twice on the same images ({gone}); the same command goes on "
                f"from what is saved, and {OTHERWISE}"
            ) from None
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all workers, also in the middle of a request."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.kill()
        self._threads.shutdown(wait=True)
        for worker in self.workers:
            worker.close()
        atexit.unregister(self.close)


_shared: dict[int, tuple[WorkerPool, list[int]]] = {}  # number of workers -> the pool, and how many scorers use it


def _share_pool(count: int) -> WorkerPool:
    """The pool of this process with so many workers."""
    pool, users = _shared.setdefault(count, (WorkerPool(count), [0])) if count not in _shared else _shared[count]
    users[0] += 1
    return pool


def _release_pool(count: int) -> None:
    """End the pool where no other scorer uses it."""
    pool, users = _shared[count]
    users[0] -= 1
    if not users[0]:
        del _shared[count]
        pool.close()


class WorkerScorer:
    """A scorer whose images are scored in worker processes; safe to call from several threads."""

    def __init__(self, scorer: Opened, reference: str, worker_images: int, count: int) -> None:
        """Use a pool of `count` processes, shared by the scorers of this process.

        Args:
            scorer: opened here, for its id, name and metrics.
            reference: by which a worker opens it.
            worker_images: rows of a chunk.
            count: worker processes.
        """
        self.id, self.name, self.metrics = scorer.id, scorer.name, scorer.metrics
        self.scorer, self.reference, self._worker_images, self._count = scorer, reference, worker_images, count
        self.pool: WorkerPool | None = _share_pool(count)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to every metric (B,). Raises what the scorer raises on the first chunk that fails."""
        check_images(images, prompts)
        if not len(images):
            return self.scorer(images, prompts)
        if self.pool is None:
            raise UserError(f"the scorer {self.reference!r} was closed")
        starts = range(0, len(images), self._worker_images)
        rows = [slice(start, start + self._worker_images) for start in starts]
        chunks = [self.pool.submit(self.scorer, self.reference, images[part], prompts[part]) for part in rows]
        try:
            return _joined(self.metrics, starts, [chunk.result() for chunk in chunks])
        finally:
            for chunk in chunks:
                chunk.cancel()

    def close(self) -> None:
        """Leave the pool, which ends with the last scorer that uses it."""
        if self.pool is not None:
            self.pool = None
            _release_pool(self._count)


def _joined(metrics: Sequence[str], starts: Sequence[int], chunks: Sequence[Scores]) -> Scores:
    """The scores of consecutive chunks, in order."""
    value: dict[str, Values] = {metric: np.concatenate([chunk.value[metric] for chunk in chunks]) for metric in metrics}
    reasons = {start + row: why for start, chunk in zip(starts, chunks) for row, why in chunk.reasons.items()}
    if all(chunk.notes is None for chunk in chunks):
        return Scores(value, reasons)
    notes = [note for chunk in chunks for note in chunk.notes or [""] * len(chunk.value[metrics[0]])]
    return Scores(value, reasons, notes)
