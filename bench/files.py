"""Files: written whole or not at all, never through a link, their hashes, locks, and the free disk that is needed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError

DAY = 86_400  # seconds
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]  # in the names of temporary files
MIN_FREE_DISK = 200 * 2**20  # bytes below which no run or download begins


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """sha256 of a file, or of the names and contents of the files in a folder, hexadecimal; hidden ones are not part of it."""
    if not path.is_dir():
        return digest(path)
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    listed = "".join(f"{digest(file)} {utf_8_name(file.name)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def full(error: BaseException) -> bool:
    """Does the error say that the disk is full, or a quota?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_disk(path: Path) -> tuple[Path, int]:
    """The nearest folder of a path that exists, and the free bytes of its disk."""
    while not path.exists():
        path = path.parent
    return path, shutil.disk_usage(path).free


def sync(path: Path) -> None:
    """Return when the file, or the folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Where this process writes a file before it is moved to `path`; two processes may write the same file."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


def delete_leftovers(path: Path) -> None:
    """Delete the temporary files for this path that a killed process left beside it.

    A process of another machine, which may share the folder, cannot be asked whether it lives: its files go after a day.
    """
    head = f".{path.name}."
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(head) and name.endswith(".tmp")]
    except OSError:
        return
    for name in names:
        host, _, process = name.removeprefix(head).removesuffix(".tmp").rpartition(".")
        if not process.isascii() or not process.isdigit() or "." in host:
            continue  # of another file, whose name begins with this one's
        leftover = path.with_name(name)
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > DAY or (host in ("", _HOST) and not _lives(int(process))):
                leftover.unlink()


def _lives(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return process > 0


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file and move it over `path` when it is on the disk."""
    delete_leftovers(path)
    temporary = temporary_name(path)
    if temporary.is_symlink():  # in a folder of somebody else it may lead anywhere
        temporary.unlink()
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def utf_8_name(name: str) -> str:
    """A file's name as text that every table can hold: bytes that are not UTF-8 as \\xe9."""
    raw = name.encode("utf-8", "surrogateescape") if not re.search("[\ud800-\udc7f\udd00-\udfff]", name) else None
    return (
        raw.decode("utf-8", "backslashreplace")
        if raw is not None
        else name.encode("utf-8", "backslashreplace").decode()
    )


def printable_name(name: str) -> str:
    """A name in one line of a message: other characters than those that print are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in utf_8_name(name))


def links(folder: Path) -> Iterator[Path]:
    """Yield the links in a folder, which are not followed."""
    for parent, folders, names in os.walk(folder):
        yield from (path for path in (Path(parent, name) for name in sorted((*folders, *names))) if path.is_symlink())


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file. Raises OSError where the source is a link or no file."""
    with open(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a file", str(source))
        with target.open("wb") as copy:
            shutil.copyfileobj(file, copy)


def open_lock(path: Path, *, read_only: bool = False) -> IO[bytes]:
    """Open a lock file, made where there is none unless read_only; its content stays. Raises OSError where it is a link."""
    flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    return open(descriptor, "rb" if read_only else "r+b", buffering=0)


def acquire_lock(lock: IO[bytes], *, shared: bool = False, wait: bool = False) -> bool:
    """Acquire a lock, and wait for it or return False where another process holds it.

    On a file system without locks this always succeeds.
    """
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def make_folder(path: Path) -> None:
    """Make a folder that can be written, with its parents, before work begins whose result it is to hold.

    Raises UserError where that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise UserError(f"cannot write {path}: it is a file, not a folder") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def make_place(path: Path) -> None:
    """Make the folder of a file that is to be written. Raises UserError where there is or can be no such file."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder, not a file")
    make_folder(path.parent)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError, and ValueError on whatever is no JSON, however deep it is."""
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
