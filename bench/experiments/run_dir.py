"""Guards of a run directory: the hashes of its inputs, its lock, and errors of the disk as one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from ..errors import UserError
from ..files import MIN_FREE_DISK, acquire_lock, digest, free_disk, full, links, open_lock, read_json, write_atomically

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
DISK_FAILURES = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
SMALL = 64 * 2**20  # bytes of a file below which `fingerprint` reads its content
LOCK_ATTEMPTS, LOCK_PAUSE = 25, 0.02  # half a second in all; the pause in seconds
INPUTS, EARLIER_INPUTS = "inputs.json", "ground.json"  # the second was written by earlier versions


def clear_run_dir(run_dir: Path) -> None:
    """Delete record.json first and inputs.json last, so that an interrupted deletion never leaves a stale result."""
    order = {"record.json": 0, "checkpoint": 1, INPUTS: 3}
    for path in sorted(run_dir.iterdir(), key=lambda path: order.get(path.name, 2)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def delete_unfinished(run_dir: Path) -> None:
    """Delete the temporary files of a process that was killed."""
    for unfinished in run_dir.rglob(".*.tmp"):
        if unfinished.is_file():
            unfinished.unlink(missing_ok=True)


def check_inputs(run_dir: Path, inputs: Mapping[str, str], descriptions: Mapping[str, str]) -> None:
    """Store the inputs of a run, name -> version or hash, in inputs.json.

    descriptions: input -> the words an error names it by. Raises UserError where an input is another one than when the run
    began, where inputs.json is damaged, or where an earlier version of gpobench wrote the directory.
    """
    path = run_dir / INPUTS
    if (run_dir / EARLIER_INPUTS).exists():
        raise UserError(
            f"{run_dir} was written by an earlier version of gpobench ({EARLIER_INPUTS}): --fresh starts over"
        )
    stored: dict[str, str] = {}
    if path.is_file():
        try:
            stored = dict(read_json(path))
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged, so the inputs of this run are unknown: --fresh starts over") from None
    for name, value in inputs.items():
        if stored.get(name, value) != value:
            raise UserError(f"{descriptions[name]} changed since {run_dir} was begun: --fresh starts over")
    merged = {**stored, **inputs}
    if merged != stored:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(merged), "utf-8"))


def fingerprint(folder: Path) -> str:
    """sha256 over the names and sizes of a folder's files, and over the content of files below 64 MB: a data set may be large."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        content = digest(path) if size < SMALL else ""
        total.update(f"{path.relative_to(folder).as_posix()} {size} {content}\n".encode())
    return total.hexdigest()


@contextmanager
def lock_run_dir(run_dir: Path) -> Generator[Callable[[], None]]:
    """Hold the lock of a run directory: two processes never write one. Raises UserError where another one holds it.

    Yields a function that raises UserError where the directory was removed or replaced since: what is written then is lost, or
    belongs to another process.
    """
    try:
        opened = open_lock(run_dir / ".lock")
    except OSError as error:
        raise UserError(f"cannot lock {run_dir}: {error.strerror}: {run_dir / '.lock'}") from error
    with opened as lock:
        for _ in range(LOCK_ATTEMPTS):  # `is_locked` holds the lock for a moment
            if acquire_lock(lock):
                break
            time.sleep(LOCK_PAUSE)
        else:
            raise UserError(f"another process is at work on {run_dir}")
        yield lambda: _check_same_dir(run_dir, lock)


def _check_same_dir(run_dir: Path, lock: IO[bytes]) -> None:
    """Raise UserError where the file of the lock that is held is not in the run directory any more."""
    try:
        same = os.path.samestat(os.fstat(lock.fileno()), os.stat(run_dir / ".lock"))
    except OSError:
        same = False
    if not same:
        raise _removed(run_dir)


def _removed(run_dir: Path) -> UserError:
    return UserError(f"{run_dir} was removed while the run was at work on it; the same command starts it anew")


def is_locked(run_dir: Path) -> bool:
    """Return whether another process holds the lock of this run directory."""
    try:
        with open_lock(run_dir / ".lock", read_only=True) as lock:
            return not acquire_lock(lock, shared=True)
    except OSError:
        return False


def refuse_links(run_dir: Path) -> None:
    """Raise UserError where a run directory holds a link: what is written in it could land anywhere, what is copied come from there."""
    for link in links(run_dir):
        raise UserError(f"{link} is a link, and a run directory holds files only: put a copy of its target there")


@contextmanager
def report_disk_errors(run_dir: Path) -> Generator[None]:
    """Raise UserError where the disk is full, before the block or in it, or cannot be written; files on it stay."""
    try:
        existing, free = free_disk(run_dir if run_dir.exists() else run_dir.absolute())
        if free < MIN_FREE_DISK and not (run_dir / "record.json").is_file():
            raise UserError(f"only {free // 2**20} MB are free at {existing}; a run needs {MIN_FREE_DISK // 2**20} MB")
        yield
    except (OSError, SafetensorError) as error:
        if _full(error):
            raise UserError(
                f"no space left at {run_dir}: the last checkpoint is whole, the same command goes on from it"
            ) from error
        if isinstance(error, FileNotFoundError) and not run_dir.exists():
            raise _removed(run_dir) from error
        place = getattr(error, "filename", None) or run_dir
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            raise UserError(f"cannot write {place}: {error.strerror}") from error
        if isinstance(error, OSError) and error.errno in DISK_FAILURES:
            raise UserError(
                f"the disk fails at {place}: {error.strerror}; the same command goes on from the last checkpoint"
            ) from error
        raise


def _full(error: Exception) -> bool:
    """Return whether the error means a full disk; safetensors states the system's error number in its message."""
    return full(error) or (
        isinstance(error, SafetensorError)
        and any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    )
