"""Weights by repository and revision: a folder of yours first, then gpobench's own store, the hub's cache, the hub itself.

What stands on no hub is given by hand, or comes from its publisher's address; it is looked for in the same folders, in the same order.
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
from uuid import uuid4

from ..errors import Missing, UserError
from ..files import digest, full, sync, write_atomically
from ..model_spec import ModelSpec
from . import downloads
from .downloads import DownloadRequest, fetching, ledger, note, offline

__all__ = ["DownloadRequest", "ledger", "note"]  # a ledger is for both, prompts and weights

KEPT = ".gpobench.json"  # beside the files of a repository in the store: what they are
LOCK = "fetch.lock.json"
# What diffusers loads of a repository: the parts' folders, not the single-file checkpoints beside them, and nothing pickled.
PIPELINE = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")


# Where weights stand


def file(repository: str, name: str, *, revision: str = "main") -> Path:
    """A file of a hub repository, `owner/name`. GPOBENCH_WEIGHTS/owner/name/file wins; HF_HUB_OFFLINE is honoured.

    Raises Missing, which says what to do, where it cannot be had.
    """
    path = _own(repository, name)
    kept = None if path else kept_at(repository, revision)
    if kept is not None and name in kept.files and (store() / repository / name).is_file():
        path = store() / repository / name
    return note(DownloadRequest("file", repository, (name,), revision, path or download(repository, name, revision)))


def folder(repository: str, *, revision: str = "main", patterns: tuple[str, ...] = ()) -> Path:
    """The files of a hub repository (those that match `patterns`, all by default) as a local folder; Missing as for `file`."""
    path = _own(repository, "")
    kept = None if path else kept_at(repository, revision)
    if kept is not None and kept.whole(patterns):
        path = store() / repository
    if path is None:
        from huggingface_hub import snapshot_download

        wanted = list(patterns) or None
        try:
            there = snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=offline())
        except Exception as error:  # its transport's errors have changed with its versions
            raise refused(repository, "", revision, error) from None
        path = Path(there)
    return note(DownloadRequest("folder", repository, patterns, revision, path))


def given(place: str, name: str = "") -> Path | None:
    """What no hub serves: GPOBENCH_WEIGHTS/place/name, or as `fetch` left it; without a name the whole folder. None if not here."""
    path = _here(place, name)
    return (
        note(DownloadRequest("file" if name else "folder", place, (name,) if name else (), "", path)) if path else None
    )


def _here(place: str, name: str) -> Path | None:
    for root in [_own(place, ""), store() / place]:
        path = root / name if root else None
        if path is not None and (path.is_file() if name else path.is_dir()):
            return path
    return None


def local(source: str, revision: str | None = None) -> Path | None:
    """The folder of a pipeline that is whole on this disk: itself, yours, the store's, or what `fetch` brought into the hub's cache."""
    if Path(source).is_dir():
        return Path(source)
    own = _own(source, "model_index.json")
    if own is not None:
        return note(DownloadRequest("folder", source, PIPELINE, revision or "main", own.parent))
    kept = kept_at(source, revision or "main")
    if kept is not None and kept.whole(PIPELINE):
        return note(DownloadRequest("folder", source, PIPELINE, revision or "main", store() / source))
    index = cached(source, "model_index.json", revision)
    if index is None:
        return None
    fetched = locked(source, index.parent.name)
    if fetched is None or not fetched.whole(PIPELINE):
        return None
    parts = [name for name in fetched.files if downloads.matches(name, PIPELINE)]
    if not all((index.parent / name).is_file() for name in parts):
        return None
    return note(DownloadRequest("folder", source, PIPELINE, revision or "main", index.parent))


def cached(repository: str, name: str, revision: str | None = None) -> Path | None:
    """A file in the hub's own cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:  # a path that is no repository's name
        return None
    return Path(path) if isinstance(path, str) else None


def download(repository: str, name: str, revision: str, bar: Any = None) -> Path:
    """The file in the hub's cache, fetched if need be. bar: a tqdm class that is told of the bytes. Missing as for `file`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=offline(), tqdm_class=bar))
    except Exception as error:  # its transport's errors have changed with its versions
        raise refused(repository, name, revision, error) from None


def _own(repository: str, name: str) -> Path | None:
    root = os.environ.get("GPOBENCH_WEIGHTS", "")
    if not root:
        return None
    if not Path(root).is_dir():
        raise UserError(f"GPOBENCH_WEIGHTS names no folder: {root}")
    path = Path(root, repository, name) if name else Path(root, repository)
    return path if path.exists() else None


# Weights that stand at an address of their publisher's, on no hub


class Wrong(UserError):
    """Other bytes than they must be: never a reason to do without."""


@dataclass(frozen=True)
class Linked:
    """One file of weights and the address it is published at."""

    place: str  # its folder below GPOBENCH_WEIGHTS and in the store, which is its own: pytorch
    name: str
    url: str
    begins: str = ""  # the first digits of its sha256, at most 8, where its publisher writes them into the file's name
    pickled: bool = False  # opening it runs what is in it: no run fetches it by itself, only `gpobench fetch` does

    def find(self, *others: Path) -> Path:
        """The file: yours, the store's, one of `others` (caches of other programs), or fetched into the store.

        Raises Missing, which says what to do, where it cannot be had; Wrong, with nothing kept, where other bytes came.
        """
        sound = (other for other in others if other.is_file() and short_digest(other).startswith(self.begins))
        path = _here(self.place, self.name) or next(sound, None)
        return note(DownloadRequest("file", self.place, (self.name,), self.url, path or self._brought()))

    def _brought(self) -> Path:
        put = f"put them below the folder that GPOBENCH_WEIGHTS names, as {self.place}/{self.name}"
        absent = f"the weights {self.place}/{self.name} are not here"
        if self.pickled and not _bringing.get():
            raise Missing(
                f"{absent}; opening them runs what is in them, so no run fetches them: `gpobench fetch --scorer` does, or {put}"
            )
        if offline():
            raise Missing(f"{absent}, and HF_HUB_OFFLINE forbids fetching them from {self.url}; {put}")
        target = store() / self.place / self.name
        before = kept_of(target.parent / KEPT) or StoredRepository()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            facts = self._download(target)
        except (OSError, HTTPException, ValueError) as error:
            why = "the disk is full" if full(error) else str(error).strip() or type(error).__name__
            raise Missing(f"{absent} and {self.url} does not give them ({why}); {put}") from None
        kept = StoredRepository(self.url, [self.url], [], {**before.files, self.name: facts})
        text = json.dumps(kept.mapping(), indent=1, sort_keys=True) + "\n"
        write_atomically(target.parent / KEPT, lambda path: path.write_text(text, "utf-8"))
        return target

    def _download(self, target: Path) -> dict[str, Any]:
        """The file at its address moved to `target` once its hash is right; its size and sha256."""
        known = locked(self.place, self.url)
        expected = str(known.files.get(self.name, {}).get("sha256", "")) if known else ""
        temporary = target.with_name(f".{uuid4().hex}.tmp")  # another run may be fetching it too
        try:
            size, total = 0, hashlib.sha256()
            with fetching(self.url, timeout=60) as answer, temporary.open("wb") as out:
                while part := answer.read(2**20):
                    size += out.write(part)
                    total.update(part)
                promised = answer.headers.get("Content-Length")
            if promised is not None and size != int(promised):
                raise OSError(f"cut off after {size:,} of {int(promised):,} bytes")
            found = total.hexdigest()
            if not found.startswith(expected or self.begins):
                said = expected or f"{self.begins}..."
                raise Wrong(f"wrong hash after download: {self.url} is {found}, expected {said}; nothing was kept")
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return {"bytes": size, "sha256": found}


_bringing: ContextVar[bool] = ContextVar("_bringing", default=False)


@contextmanager
def bringing() -> Generator[None]:
    """Inside, weights may be fetched that no run fetches by itself: a person asked for it."""
    token = _bringing.set(True)
    try:
        yield
    finally:
        _bringing.reset(token)


# The store: what `gpobench fetch` installed, and the lock of all that was ever fetched


@dataclass
class StoredRepository:
    """Files of one commit of a repository, with their sha256."""

    commit: str = ""  # the address of what stands on no hub; empty for files of a person's own
    revisions: list[str] = field(default_factory=list[str])  # the names under which it was asked for
    patterns: list[list[str]] = field(default_factory=list[list[str]])  # of which it has all files there are
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])  # name -> bytes, sha256

    def whole(self, patterns: tuple[str, ...]) -> bool:
        """Whether nothing is missing of what these patterns ask for."""
        return list(patterns) in self.patterns or [] in self.patterns

    def mapping(self) -> dict[str, Any]:
        return asdict(self)


def store() -> Path:
    """Where `gpobench fetch --from` puts repositories, as owner/name, and where what stands on no hub is kept."""
    return downloads.cache() / "weights"


def kept_at(repository: str, revision: str) -> StoredRepository | None:
    """What the store holds of a repository at this revision; UserError where its own notes cannot be read."""
    found = kept_of(store() / repository / KEPT)
    return found if found is not None and revision in (found.commit, *found.revisions) else None


def kept_of(path: Path) -> StoredRepository | None:
    """The notes in a file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return StoredRepository(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {path.parent} and fetch again") from None


def read_lock() -> dict[str, dict[str, Any]]:
    """`owner/name@commit` -> Kept as a mapping, and `prompts` -> path -> bytes, sha256."""
    path = store() / LOCK
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it and fetch again") from None


def locked(repository: str, commit: str) -> StoredRepository | None:
    """What the lock says of a commit."""
    found = read_lock().get(f"{repository}@{commit}")
    return StoredRepository(**found) if found else None


# What the hub says


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it."""

    bytes: int
    hash: str  # sha256 of a large file, git's sha1 of a small one


def listing(repository: str, revision: str, name: str = "") -> tuple[str, dict[str, Listed]]:
    """The commit behind a revision, and its files; Missing where the hub does not answer. name: what is wanted, for the message."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # its transport's errors have changed with its versions
        raise refused(repository, name, revision, error) from None
    files = {
        one.rfilename: Listed(int(one.size or 0), one.lfs.sha256 if one.lfs else str(one.blob_id or ""))
        for one in info.siblings or ()
    }
    return str(info.sha), files


def refused(repository: str, name: str, revision: str, error: BaseException) -> Missing:
    """The one line for whatever the hub's library raised."""
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
    kinds = {type(one).__name__ for one in chain}
    login = f"accept the licence at https://huggingface.co/{repository} and log in with: hf auth login"
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        return f"{repository} is gated: {login}"
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        return f"it shows you no repository {repository}: check the name, or {login}"
    if any(isinstance(one, errors.RevisionNotFoundError) for one in chain):
        return f"{repository} has no revision {revision!r}"
    if any(isinstance(one, errors.RemoteEntryNotFoundError) for one in chain):
        return f"{repository} holds no such file at revision {revision!r}"
    if any(full(one) for one in chain):
        return "the disk is full: make room, or move the hub's cache with HF_HOME"
    if offline() or "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE forbids asking it"
    if kinds & {"ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "ProxyError", "Timeout"}:
        return "it cannot be reached: check the connection and HF_ENDPOINT, or fetch on another machine with --to"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# For scorers


@cache
def short_digest(path: Path) -> str:
    """The first 8 digits of a file's sha256: the weights revision in a scorer's id."""
    return digest(path)[:8]


def device() -> str:
    """Where a scorer with a network computes: the GPU if there is one, unless GPOBENCH_SCORER_DEVICE says otherwise."""
    if said := os.environ.get("GPOBENCH_SCORER_DEVICE"):
        return said
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_hash(model_spec: ModelSpec) -> str:
    """sha256 over the weight files of a local model, by name; the pinned revision of one from the hub."""
    return _hash(Path(model_spec.source), (".safetensors",)) or str(model_spec.revision)


def settings_hash(model_spec: ModelSpec) -> str:
    """The same over what stands beside the weights and decides how they are used: configs, recipe, tokenizers."""
    return _hash(Path(model_spec.source), (".json", ".txt", ".model")) or str(model_spec.revision)


def _hash(folder: Path, suffixes: tuple[str, ...]) -> str:
    """sha256 over the files below that end so; "" where there is no folder. Linked folders are followed: models share parts."""
    if not folder.is_dir():
        return ""
    found: dict[Path, str] = {}
    seen = set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        found |= {Path(place, name): digest(Path(place, name)) for name in files if name.endswith(suffixes)}
    total = hashlib.sha256()
    for path in sorted(found):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(found[path].encode())
    return total.hexdigest()
