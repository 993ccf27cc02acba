"""Finds published files in the user's folder or the cache, or downloads them once and checks their hash; keeps a log of them."""

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

from ..errors import DownloadLimitExceeded, UserError
from ..files import write_atomically

LIMIT = 64 * 2**20  # bytes; a list of prompts is far smaller


@dataclass(frozen=True)
class DownloadRequest:
    """A file, folder or prompt list that was requested, and the path where it is."""

    kind: Literal["file", "folder", "prompts"]
    source: str  # a hub repository, owner/name, or the URL of a published file
    names: tuple[str, ...]  # the file's name | patterns of files, all if empty | the path below GPOBENCH_DATA
    revision: str  # of the repository; the sha256 a published file must have
    path: Path

    def files(self) -> dict[str, Path]:
        """Map the name within the source to the file, for all requested files that the path holds."""
        if self.kind != "folder":
            return {self.names[0]: self.path} if self.path.is_file() else {}
        files: dict[str, Path] = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not name.startswith(".") and matches(name, self.names):
                files[name] = path
        return files


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a name matches one of the patterns. As on the hub, a star also matches slashes."""
    from fnmatch import fnmatchcase

    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


class DownloadLog(list[DownloadRequest]):
    """The files that were requested while the log was open, in order."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def files(self) -> dict[Path, int]:
        """Map every file to its bytes, each once."""
        return {path: path.stat().st_size for request in self for path in request.files().values()}


_open_logs: list[DownloadLog] = []


@contextmanager
def log_downloads(limit: float = float("inf")) -> Generator[DownloadLog]:
    """Log the files that any thread requests inside. Above `limit` bytes a request raises DownloadLimitExceeded.

    A list that was read earlier in the same process and is still in memory (the tasks keep theirs) is not requested again.
    """
    log = DownloadLog(limit)
    _open_logs.append(log)
    try:
        yield log
    finally:
        _open_logs[:] = [other for other in _open_logs if other is not log]


def log_download(request: DownloadRequest) -> Path:
    """Add a request to every open log and return its path; DownloadLimitExceeded where it is too large for one of them."""
    for log in list(_open_logs):
        log.append(request)
        if log.limit < float("inf") and (total := sum(log.files().values())) > log.limit:
            raise DownloadLimitExceeded(f"{total / 2**30:.1f} GB of weights")
    return request.path


class _HttpsOnlyRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects from https to an unencrypted address."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"it leads to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, timeout: float) -> Any:
    """Open the response of an address with its headers, as a context. Raises OSError (URLError) where there is none.

    timeout: seconds without a byte.
    """
    return urllib.request.build_opener(_HttpsOnlyRedirects).open(url, timeout=timeout)


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids all downloads; the variable is read on each call."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("", "0", "NO", "OFF", "FALSE")


@dataclass(frozen=True)
class PinnedFile:
    """A published file: its path below GPOBENCH_DATA, its address, and its hash."""

    path: str  # below GPOBENCH_DATA, and below the cache: flow_grpo/dataset/ocr/test.txt
    url: str
    sha256: str = ""  # empty where its hash was never published: then `records` is all that is checked
    records: int = 0  # lines or entries it must hold, checked by the reader

    def read(self) -> bytes:
        """Return the bytes. UserError where the file cannot be fetched, or has another hash."""
        data = os.environ.get("GPOBENCH_DATA", "")
        for path in ([Path(data, self.path)] if data else []) + [cache() / self.path]:
            if path.is_file():
                raw = self._checked(path.read_bytes(), str(path))
                self._log(path)
                return raw
        if offline():
            raise UserError(f"{self._missing()} and HF_HUB_OFFLINE forbids fetching it from {self.url}")
        raw = self._checked(self._fetch(), self.url)
        cached = cache() / self.path
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, lambda p: p.write_bytes(raw))
        except OSError as error:
            raise UserError(f"the published file {self.path} cannot be kept at {cached}: {error.strerror}") from None
        self._log(cached)
        return raw

    def _log(self, path: Path) -> None:
        log_download(DownloadRequest("prompts", self.url, (self.path,), self.sha256, path))

    def _missing(self) -> str:
        data = os.environ.get("GPOBENCH_DATA", "")
        where = f"is not below GPOBENCH_DATA ({data})" if data else "is not here (GPOBENCH_DATA is not set)"
        return f"the published file {self.path} {where},"

    def _fetch(self) -> bytes:
        try:
            with open_url(self.url, timeout=30) as answer:
                raw = answer.read(LIMIT + 1)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise UserError(f"{self._missing()} and {self.url} cannot be reached: {error}") from None
        if len(raw) > LIMIT:
            raise UserError(f"{self.url} is larger than {LIMIT // 2**20} MB: that is not the published file")
        return raw

    def _checked(self, raw: bytes, where: str) -> bytes:
        digest = sha256(raw).hexdigest()
        if self.sha256 and digest != self.sha256:
            raise UserError(f"{where} is not the published file: its sha256 is {digest}, expected {self.sha256}")
        return raw


def cache() -> Path:
    """Return the folder of downloaded files: $XDG_CACHE_HOME/gpobench, ~/.cache/gpobench by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpobench"
