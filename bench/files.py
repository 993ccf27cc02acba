"""Files: written whole or not at all, their hashes, and the free disk that is needed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file and move it over `path` when it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
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


def printable(name: str) -> str:
    """A name in one line of a message: other characters than those that print are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in utf_8_name(name))
