"""A run's directory: what the run stands on, who is at work on it, whether there is room."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from ..errors import UserError
from ..files import digest, full, write_atomically

SMALL = 64 * 2**20  # bytes of a file that are read each time to see whether it changed
PATIENCE = 25  # tries for a lock, in half a second
ROOM = 200 * 2**20  # bytes of free disk below which a run does not begin


def clear_run_dir(run_dir: Path) -> None:
    """Empty a run's directory, what says that it is done first and what it stands on last: a kill in between leaves no old result."""
    order = {"record.json": 0, "checkpoint": 1, "inputs.json": 3}
    for path in sorted(run_dir.iterdir(), key=lambda path: order.get(path.name, 2)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def check_inputs(run_dir: Path, now: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Keep in inputs.json what a run stands on; UserError where that was another thing when it was begun."""
    path = run_dir / "inputs.json"
    known: dict[str, str] = {}
    if path.is_file():
        try:
            known = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError):
            raise UserError(
                f"{path} is damaged, so that nobody knows what this run stands on: --fresh starts over"
            ) from None
    for key, value in now.items():
        if known.get(key, value) != value:
            raise UserError(f"{names[key]} changed since {run_dir} was begun: --fresh starts over")
    if ground := {**known, **now} if {**known, **now} != known else None:
        write_atomically(path, lambda p: p.write_text(json.dumps(ground), "utf-8"))


def fingerprint(folder: Path) -> str:
    """A hash of the names and sizes of the files below, and of what is in those below 64 MB: a data set may be large."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        content = digest(path) if size < SMALL else ""
        total.update(f"{path.relative_to(folder).as_posix()} {size} {content}\n".encode())
    return total.hexdigest()


@contextmanager
def lock_run_dir(run_dir: Path) -> Generator[None]:
    """Two processes never write one run directory."""
    with (run_dir / ".lock").open("w") as lock:
        for _ in range(PATIENCE):  # who only asks whether it is taken holds it for a moment
            if _had(lock, fcntl.LOCK_EX):
                break
            time.sleep(0.02)
        else:
            raise UserError(f"another process is at work on {run_dir}")
        yield


def _had(lock: IO[str], kind: int) -> bool:
    """Was the lock had? A file system without locks gives it to everybody."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_locked(run_dir: Path) -> bool:
    """Is another process at work on this run directory?"""
    try:
        with (run_dir / ".lock").open() as lock:
            return not _had(lock, fcntl.LOCK_SH)
    except OSError:
        return False


@contextmanager
def report_disk_errors(run_dir: Path) -> Generator[None]:
    """A full disk is said in one line; what was on it stays."""
    try:
        near = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
        free = shutil.disk_usage(near).free
        if free < ROOM and not (run_dir / "record.json").is_file():
            raise UserError(f"only {free // 2**20} MB are free at {near}; a run needs {ROOM // 2**20} MB")
        yield
    except (OSError, SafetensorError) as error:
        if _full(error):
            raise UserError(
                f"no space left at {run_dir}: the last checkpoint is whole, the same command goes on from it"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"cannot write {error.filename or run_dir}: {error.strerror}") from error
        raise


def _full(error: Exception) -> bool:
    """Does the error mean a full disk? safetensors says it in words, with the system's number."""
    return full(error) or (
        isinstance(error, SafetensorError)
        and any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    )
