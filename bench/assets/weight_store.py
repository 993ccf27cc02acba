"""Finds weights by repository and revision: in the user's folder, in gpobench's own store, in the hub's cache, or on the hub.

Weights that are on no hub are installed by hand or come from their publisher's address; they are searched for in the same
folders, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ..errors import Missing, UserError
from ..files import delete_leftovers, digest, full, sync, temporary_name, write_atomically
from ..model_spec import ModelSpec
from . import downloads
from .downloads import DownloadRequest, log_download, offline, open_url

STORED = ".gpobench.json"  # describes the files of a repository in the store
LOCK = "fetch.lock.json"
# The files of a repository that diffusers loads: the parts' folders, not the single-file checkpoints beside them, and nothing pickled.
PIPELINE = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")


# Where weights are


def file(repository: str, name: str, *, revision: str = "main") -> Path:
    """Find a file of a hub repository, `owner/name`. GPOBENCH_WEIGHTS/owner/name/file takes precedence; HF_HUB_OFFLINE is honoured.

    Raises Missing, which says what to do, where it cannot be had.
    """
    path = _user_path(repository, name)
    stored = None if path else stored_repository(repository, revision)
    if stored is not None and name in stored.files and (store() / repository / name).is_file():
        path = store() / repository / name
    return log_download(
        DownloadRequest("file", repository, (name,), revision, path or download(repository, name, revision))
    )


def folder(repository: str, *, revision: str = "main", patterns: tuple[str, ...] = ()) -> Path:
    """Find the files of a hub repository (those matching `patterns`, all by default) as a local folder; Missing as for `file`."""
    path = _user_path(repository, "")
    stored = None if path else stored_repository(repository, revision)
    if stored is not None and stored.whole(patterns):
        path = store() / repository
    if path is None:
        from huggingface_hub import snapshot_download

        wanted = list(patterns) or None
        try:
            there = snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=offline())
        except Exception as error:  # its transport's errors have changed with its versions
            raise hub_refusal(repository, "", revision, error) from None
        path = Path(there)
    return log_download(DownloadRequest("folder", repository, patterns, revision, path))


def given_by_hand(place: str, name: str = "") -> Path | None:
    """Find a file that no hub serves: GPOBENCH_WEIGHTS/place/name, or as `fetch` stored it; without a name the folder. None if absent."""
    path = _find_local(place, name)
    return (
        log_download(DownloadRequest("file" if name else "folder", place, (name,) if name else (), "", path))
        if path
        else None
    )


def _find_local(place: str, name: str) -> Path | None:
    for root in [_user_path(place, ""), store() / place]:
        path = root / name if root else None
        if path is not None and (path.is_file() if name else path.is_dir()):
            return path
    return None


def local(source: str, revision: str | None = None) -> Path | None:
    """Find a complete local folder of a pipeline: itself, the user's, the store's, or what `fetch` put into the hub's cache."""
    if Path(source).is_dir():
        return Path(source)
    user_index = _user_path(source, "model_index.json")
    if user_index is not None:
        return log_download(DownloadRequest("folder", source, PIPELINE, revision or "main", user_index.parent))
    stored = stored_repository(source, revision or "main")
    if stored is not None and stored.whole(PIPELINE):
        return log_download(DownloadRequest("folder", source, PIPELINE, revision or "main", store() / source))
    index = cached(source, "model_index.json", revision)
    if index is None:
        return None
    fetched = locked_repository(source, index.parent.name)
    if fetched is None or not fetched.whole(PIPELINE):
        return None
    parts = [name for name in fetched.files if downloads.matches(name, PIPELINE)]
    if not all((index.parent / name).is_file() for name in parts):
        return None
    return log_download(DownloadRequest("folder", source, PIPELINE, revision or "main", index.parent))


def cached(repository: str, name: str, revision: str | None = None) -> Path | None:
    """Find a file in the hub's own cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:  # a path that is no repository's name
        return None
    return Path(path) if isinstance(path, str) else None


def download(repository: str, name: str, revision: str, bar: Any = None) -> Path:
    """Return the file in the hub's cache, fetched if need be. bar: a tqdm class updated with the bytes. Missing as for `file`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=offline(), tqdm_class=bar))
    except Exception as error:  # its transport's errors have changed with its versions
        raise hub_refusal(repository, name, revision, error) from None


def _user_path(repository: str, name: str) -> Path | None:
    root = os.environ.get("GPOBENCH_WEIGHTS", "")
    if not root:
        return None
    if not Path(root).is_dir():
        raise UserError(f"GPOBENCH_WEIGHTS names no folder: {root}")
    path = Path(root, repository, name) if name else Path(root, repository)
    return path if path.exists() else None


# Weights at their publisher's address, on no hub


class WrongHash(UserError):
    """A file has another hash than it must have: no optional scorer is left out because of it."""


@dataclass(frozen=True)
class PublishedWeights:
    """One file of weights that its publisher serves, on no hub."""

    place: str  # its folder below GPOBENCH_WEIGHTS and in the store, which is its own: pytorch
    name: str
    url: str
    begins: str = ""  # the first digits of its sha256, at most 8, where its publisher writes them into the file's name
    pickled: bool = False  # opening it runs what is in it: no run fetches it by itself, only `gpobench fetch` does

    def find(self, *others: Path) -> Path:
        """Find the file: the user's, the store's, one of `others` (caches of other programs), or fetched into the store.

        Raises Missing, which says what to do, where it cannot be fetched; WrongHash, with nothing kept, where its hash is wrong.
        """
        sound = (other for other in others if other.is_file() and short_digest(other).startswith(self.begins))
        path = _find_local(self.place, self.name) or next(sound, None)
        return log_download(DownloadRequest("file", self.place, (self.name,), self.url, path or self._fetched()))

    def _fetched(self) -> Path:
        put = f"put them below the folder that GPOBENCH_WEIGHTS names, as {self.place}/{self.name}"
        absent = f"the weights {self.place}/{self.name} are not here"
        if self.pickled and not _pickled_allowed.get():
            raise Missing(
                f"{absent}; opening them runs what is in them, so no run fetches them: `gpobench fetch --scorer` does, or {put}"
            )
        if offline():
            raise Missing(f"{absent}, and HF_HUB_OFFLINE forbids fetching them from {self.url}; {put}")
        target = store() / self.place / self.name
        before = read_stored(target.parent / STORED) or StoredRepository()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            facts = self._download(target)
        except (OSError, HTTPException, ValueError) as error:
            why = "the disk is full" if full(error) else str(error).strip() or type(error).__name__
            raise Missing(f"{absent} and {self.url} does not give them ({why}); {put}") from None
        stored = StoredRepository(self.url, [self.url], [], {**before.files, self.name: facts})
        text = json.dumps(stored.mapping(), indent=1, sort_keys=True) + "\n"
        write_atomically(target.parent / STORED, lambda path: path.write_text(text, "utf-8"))
        return target

    def _download(self, target: Path) -> dict[str, Any]:
        """Fetch the file and move it to `target` once its hash is right; returns its size and sha256."""
        lock = locked_repository(self.place, self.url)
        expected = str(lock.files.get(self.name, {}).get("sha256", "")) if lock else ""
        delete_leftovers(target)
        temporary = temporary_name(target)  # another run may be fetching it too
        try:
            size, total = 0, hashlib.sha256()
            with open_url(self.url, timeout=60) as answer, temporary.open("wb") as out:
                while part := answer.read(2**20):
                    size += out.write(part)
                    total.update(part)
                promised = answer.headers.get("Content-Length")
            if promised is not None and size != int(promised):
                raise OSError(f"cut off after {size:,} of {int(promised):,} bytes")
            digest_found = total.hexdigest()
            if not digest_found.startswith(expected or self.begins):
                wanted = expected or f"{self.begins}..."
                raise WrongHash(
                    f"wrong hash after download: {self.url} is {digest_found}, expected {wanted}; nothing was kept"
                )
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return {"bytes": size, "sha256": digest_found}


_pickled_allowed: ContextVar[bool] = ContextVar("_bringing", default=False)


@contextmanager
def allow_pickled() -> Generator[None]:
    """Allow the download of pickled weights inside the context: only at the user's request, never by a run itself."""
    token = _pickled_allowed.set(True)
    try:
        yield
    finally:
        _pickled_allowed.reset(token)


# The store: the files that `gpobench fetch` installed, and the lock of all files ever fetched


@dataclass
class StoredRepository:
    """Files of one commit of a repository, with their sha256."""

    commit: str = ""  # the address of what stands on no hub; empty for files of a person's own
    revisions: list[str] = field(default_factory=list[str])  # the names under which it was asked for
    patterns: list[list[str]] = field(default_factory=list[list[str]])  # of which it has all files there are
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # name -> bytes, sha256

    def whole(self, patterns: tuple[str, ...]) -> bool:
        """Return whether all files that these patterns name exist."""
        return list(patterns) in self.patterns or [] in self.patterns

    def mapping(self) -> dict[str, Any]:
        return asdict(self)


def store() -> Path:
    """Return the folder of repositories that `gpobench fetch --from` installed, as owner/name, and of weights on no hub."""
    return downloads.cache() / "weights"


def stored_repository(repository: str, revision: str) -> StoredRepository | None:
    """Return the files of a repository at this revision in the store; UserError where their record cannot be read."""
    stored = read_stored(store() / repository / STORED)
    return stored if stored is not None and revision in (stored.commit, *stored.revisions) else None


def read_stored(path: Path) -> StoredRepository | None:
    """Read the record in a file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        return StoredRepository(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {path.parent} and fetch again") from None


def read_lock() -> dict[str, dict[str, Any]]:
    """Read the lock: `owner/name@commit` -> StoredRepository as a mapping, and `prompts` -> path -> bytes, sha256."""
    path = store() / LOCK
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and fetch again") from None


def locked_repository(repository: str, commit: str) -> StoredRepository | None:
    """Return the files of a commit as recorded in the lock; None where it was never fetched."""
    entry = read_lock().get(f"{repository}@{commit}")
    return StoredRepository(**entry) if entry else None


# Queries to the hub


@dataclass(frozen=True)
class HubFile:
    """Size and hash of a file, as the hub lists them."""

    bytes: int
    hash: str  # sha256 of a large file, git's sha1 of a small one


def listing(repository: str, revision: str, name: str = "") -> tuple[str, dict[str, HubFile]]:
    """Return the commit of a revision and its files; Missing where the hub does not answer. name: of the request, for the message."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # its transport's errors have changed with its versions
        raise hub_refusal(repository, name, revision, error) from None
    files = {
        sibling.rfilename: HubFile(
            int(sibling.size or 0), sibling.lfs.sha256 if sibling.lfs else str(sibling.blob_id or "")
        )
        for sibling in info.siblings or ()
    }
    return str(info.sha), files


def hub_refusal(repository: str, name: str, revision: str, error: BaseException) -> Missing:
    """Return a one-line message for an exception of the hub's library."""
    what = f"{repository}/{name}" if name else repository
    return Missing(
        f"the weights {what} are not here and the hub does not give them ({_why(repository, revision, error)}); put them "
        f"below the folder that GPOBENCH_WEIGHTS names, as {what}"
    )


def _why(repository: str, revision: str, error: BaseException) -> str:
    from huggingface_hub import errors

    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    kinds = {type(cause).__name__ for cause in chain}
    login = f"accept the licence at https://huggingface.co/{repository} and log in with: hf auth login"
    if any(isinstance(cause, errors.GatedRepoError) for cause in chain):
        return f"{repository} is gated: {login}"
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in chain):
        return f"it shows you no repository {repository}: check the name, or {login}"
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in chain):
        return f"{repository} has no revision {revision!r}"
    if any(isinstance(cause, errors.RemoteEntryNotFoundError) for cause in chain):
        return f"{repository} holds no such file at revision {revision!r}"
    if any(full(cause) for cause in chain):
        return "the disk is full: make room, or move the hub's cache with HF_HOME"
    if offline() or "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE forbids asking it"
    if kinds & {"ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "ProxyError", "Timeout"}:
        return "it cannot be reached: check the connection and HF_ENDPOINT, or fetch on another machine with --to"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# For scorers


@cache
def short_digest(path: Path) -> str:
    """Return the first 8 digits of a file's sha256: the weights revision in a scorer's id."""
    return digest(path)[:8]


def device() -> str:
    """Return the device of scorers' networks: the GPU if there is one, unless GPOBENCH_SCORER_DEVICE names another."""
    if chosen := os.environ.get("GPOBENCH_SCORER_DEVICE"):
        return chosen
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_hash(model_spec: ModelSpec) -> str:
    """Return the sha256 over the weight files of a local model, by name; the pinned revision of one from the hub."""
    return _hash(Path(model_spec.source), (".safetensors",)) or str(model_spec.revision)


def settings_hash(model_spec: ModelSpec) -> str:
    """Return the same over the files that decide how the weights are used: configs, recipe, tokenizers."""
    return _hash(Path(model_spec.source), (".json", ".txt", ".model")) or str(model_spec.revision)


def _hash(folder: Path, suffixes: tuple[str, ...]) -> str:
    """Return the sha256 over the files below with these endings; "" where there is no folder. Follows links: models share parts."""
    if not folder.is_dir():
        return ""
    digests: dict[Path, str] = {}
    visited = set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        digests |= {Path(place, name): digest(Path(place, name)) for name in files if name.endswith(suffixes)}
    total = hashlib.sha256()
    for path in sorted(digests):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(digests[path].encode())
    return total.hexdigest()
