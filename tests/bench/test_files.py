"""Atomic writes: a file is written whole or not at all, also on a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench import files
from gpobench.bench.errors import UserError
from gpobench.bench.files import (
    acquire_lock,
    copy_file,
    digest,
    links,
    make_folder,
    make_place,
    open_lock,
    read_json,
    write_atomically,
)


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


def test_a_lock_is_no_link_and_loses_no_content(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / ".lock").symlink_to(target)
    for read_only in (True, False):
        with pytest.raises(OSError, match="symbolic link"):
            open_lock(tmp_path / ".lock", read_only=read_only)
    with open_lock(target) as lock:
        assert acquire_lock(lock) and acquire_lock(lock, wait=True)
    assert target.read_text() == "kept"


def test_links_are_listed_and_never_copied(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text("x")
    (folder / "inner" / "link").symlink_to("/etc/hostname")
    (folder / "far").symlink_to("/etc")
    assert sorted(p.name for p in links(folder)) == ["far", "link"]
    with pytest.raises(OSError):
        copy_file(folder / "inner" / "link", tmp_path / "copy")
    with pytest.raises(OSError):
        copy_file(folder / "inner", tmp_path / "copy")
    copy_file(folder / "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "x"


def test_a_temporary_file_is_no_link(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    files.temporary_name(tmp_path / "out").symlink_to(target)
    write_atomically(tmp_path / "out", lambda path: path.write_text("new"))
    assert target.read_text() == "kept" and (tmp_path / "out").read_text() == "new"


def test_places_are_made_before_work(tmp_path: Path) -> None:
    file = tmp_path / "afile"
    file.write_text("hi")
    for place in (file, file / "inner"):
        with pytest.raises(UserError, match="cannot write"):
            make_folder(place)
        with pytest.raises(UserError, match="cannot write"):
            make_place(place / "out.csv")
    with pytest.raises(UserError, match="it is a folder"):
        make_place(tmp_path)
    make_place(tmp_path / "a" / "b.csv")
    assert (tmp_path / "a").is_dir() and not list((tmp_path / "a").iterdir()) and file.read_text() == "hi"


@given(st.binary(max_size=30) | st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"[]", b"null"]))
def test_any_bytes_are_json_or_a_value_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.json")
        path.write_bytes(content)
        with suppress(ValueError):
            read_json(path)
