"""Atomic writes: a file is written whole or not at all, also on a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpobench.bench import files
from gpobench.bench.files import digest, write_atomically


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"words" * 100_000)
    assert digest(file) == hashlib.sha256(b"words" * 100_000).hexdigest()


def test_two_may_write_one_file(tmp_path: Path) -> None:
    """Two processes: the same file, never the same temporary one."""
    code = """
import sys
from pathlib import Path
from gpobench.bench.files import write_atomically
for i in range(300):
    write_atomically(Path(sys.argv[1]), lambda path: path.write_text(sys.argv[2] * 1000))
"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file"), name]) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "file").read_text() in ("a" * 1000, "b" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    file, old = tmp_path / "a[1].txt", time.time() - 2 * 86_400
    leftovers = [f".a[1].txt.{ended.pid}.tmp", f".a[1].txt.{files._HOST}.{ended.pid}.tmp"]  # pyright: ignore[reportPrivateUsage]
    leftovers.append(f".a[1].txt.0a0a0a0a.{os.getpid()}.tmp")  # of another machine, and old
    others = [f".a[1].txt.{files._HOST}.{os.getppid()}.tmp", f".a[1].txt.0b0b0b0b.{ended.pid}.tmp"]  # pyright: ignore[reportPrivateUsage]
    others += [
        ".a[1].txt.tmp",
        f".a[1].txt.more.{files._HOST}.{ended.pid}.tmp",
        f".b.{ended.pid}.tmp",
        "a[1].txt.1.tmp",
    ]  # pyright: ignore[reportPrivateUsage]
    for name in (*leftovers, *others):
        (tmp_path / name).touch()
    os.utime(tmp_path / leftovers[-1], (old, old))
    write_atomically(file, lambda path: path.write_text("x"))
    assert {path.name for path in tmp_path.iterdir()} == {file.name, *others}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    seen: list[str] = []

    def write(path: Path) -> None:
        path.write_text("new, half")
        seen.append(file.read_text())  # nobody sees a half-written one
        path.write_text("new")

    write_atomically(file, write)
    assert seen == ["old"] and file.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("old", ["old", None])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, old: str | None) -> None:
    file = tmp_path / "file"
    if old:
        file.write_text(old)

    def write(path: Path) -> None:
        path.write_text("new, ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, write)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])
