"""A file is there whole or not there at all, also when the disk is full half-way."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from gpobench.bench.disk import digest, write_atomically


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"words" * 100_000)
    assert digest(file) == hashlib.sha256(b"words" * 100_000).hexdigest()


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
