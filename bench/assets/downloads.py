"""A file that somebody published, byte for byte: from a folder of yours, from the cache, or fetched once and checked by its hash."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..files import write_atomically

LIMIT = 64 * 2**20  # bytes; a list of prompts is far smaller


@dataclass(frozen=True)
class DownloadRequest:
    """Something that was asked for, and where it was found."""

    kind: Literal["file", "folder", "prompts"]
    source: str  # a hub repository, owner/name, or the URL of a published file
    names: tuple[str, ...]  # the file's name | patterns of files, all if empty | the path below GPOBENCH_DATA
    revision: str  # of the repository; the sha256 a published file must have
    path: Path

    def files(self) -> dict[str, Path]:
        """Name within the source -> the file, for all that the path holds of what was asked for."""
        if self.kind != "folder":
            return {self.names[0]: self.path} if self.path.is_file() else {}
        found: dict[str, Path] = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not name.startswith(".") and matches(name, self.names):
                found[name] = path
        return found


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file is among those asked for. As on the hub, a star also stands for slashes."""
    from fnmatch import fnmatchcase

    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


class Heavy(Exception):
    """More was asked for than a ledger allows."""


class Ledger(list[DownloadRequest]):
    """What was asked for, in order."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def files(self) -> dict[Path, int]:
        """Every file -> its bytes, each once."""
        return {path: path.stat().st_size for asked in self for path in asked.files().values()}


_open: list[Ledger] = []


@contextmanager
def ledger(limit: float = float("inf")) -> Generator[Ledger]:
    """Keeps what is asked for inside, by any thread. Above `limit` bytes the one who asks gets Heavy instead of an answer.

    Who keeps what it once read (the tasks keep their lists) does not ask again in the same process.
    """
    mine = Ledger(limit)
    _open.append(mine)
    try:
        yield mine
    finally:
        _open[:] = [other for other in _open if other is not mine]


def note(asked: DownloadRequest) -> Path:
    """Enter what was found into the open ledgers, and return its path; Heavy where that is too much for one of them."""
    for each in list(_open):
        each.append(asked)
        if each.limit < float("inf") and (total := sum(each.files().values())) > each.limit:
            raise Heavy(f"{total / 2**30:.1f} GB of weights")
    return asked.path


class _Careful(urllib.request.HTTPRedirectHandler):
    """Follows no redirect from https to what anyone on the way may change."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"it leads to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetching(url: str, timeout: float) -> Any:
    """The open answer of an address, headers and all; a context. Raises OSError (URLError) where there is none.

    timeout: seconds without a byte.
    """
    return urllib.request.build_opener(_Careful).open(url, timeout=timeout)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids all fetching; it is looked up each time."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("", "0", "NO", "OFF", "FALSE")


@dataclass(frozen=True)
class PinnedFile:
    """Where a file stands below GPOBENCH_DATA, where it is fetched from, and what it must be."""

    path: str  # below GPOBENCH_DATA, and below the cache: flow_grpo/dataset/ocr/test.txt
    url: str
    sha256: str = ""  # empty where its hash was never published: then `records` is all that is checked
    records: int = 0  # lines or entries it must hold, checked by the reader

    def read(self) -> bytes:
        """The bytes. UserError where the file cannot be had, or is another one."""
        data = os.environ.get("GPOBENCH_DATA", "")
        for place in ([Path(data, self.path)] if data else []) + [cache() / self.path]:
            if place.is_file():
                raw = self._checked(place.read_bytes(), str(place))
                self._note(place)
                return raw
        if offline():
            raise UserError(f"{self._wanted()} and HF_HUB_OFFLINE forbids fetching it from {self.url}")
        raw = self._checked(self._fetch(), self.url)
        cached = cache() / self.path
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, lambda p: p.write_bytes(raw))
        except OSError as error:
            raise UserError(f"the published file {self.path} cannot be kept at {cached}: {error.strerror}") from None
        self._note(cached)
        return raw

    def _note(self, place: Path) -> None:
        note(DownloadRequest("prompts", self.url, (self.path,), self.sha256, place))

    def _wanted(self) -> str:
        data = os.environ.get("GPOBENCH_DATA", "")
        where = f"is not below GPOBENCH_DATA ({data})" if data else "is not here (GPOBENCH_DATA is not set)"
        return f"the published file {self.path} {where},"

    def _fetch(self) -> bytes:
        try:
            with fetching(self.url, timeout=30) as answer:
                raw = answer.read(LIMIT + 1)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise UserError(f"{self._wanted()} and {self.url} cannot be reached: {error}") from None
        if len(raw) > LIMIT:
            raise UserError(f"{self.url} is larger than {LIMIT // 2**20} MB: that is not the published file")
        return raw

    def _checked(self, raw: bytes, where: str) -> bytes:
        found = sha256(raw).hexdigest()
        if self.sha256 and found != self.sha256:
            raise UserError(f"{where} is not the published file: its sha256 is {found}, expected {self.sha256}")
        return raw


def cache() -> Path:
    """Where fetched files are kept: $XDG_CACHE_HOME/gpobench, ~/.cache/gpobench by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpobench"
