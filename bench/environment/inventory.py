"""Inventory of the files that a run asked for: their commits and hashes, checked against the hub and the lock."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..assets import downloads, weight_store
from ..assets.weight_store import StoredRepository
from ..errors import Missing, UserError
from ..files import write_atomically
from ..progress import Progress

CHUNK_BYTES = 8 * 2**20
Advance = Callable[[float], None]


@dataclass
class InventoryFile:
    """A file, the hash it must have, and its size and hash once it was read."""

    path: Path
    expected: str = ""  # sha256, or git's sha1
    facts: dict[str, Any] = field(default_factory=dict[str, Any])  # bytes, sha256


@dataclass
class InventoryRepository:
    """The files that were asked of one repository, with its commit."""

    commit: str = ""  # empty for a folder of the user's own
    revisions: set[str] = field(default_factory=set[str])
    patterns: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    files: dict[str, InventoryFile] = field(default_factory=dict[str, InventoryFile])

    def stored(self) -> StoredRepository:
        """Return the entry of this repository in the lock and in a bundle's manifest."""
        files = {name: file.facts for name, file in sorted(self.files.items())}
        return StoredRepository(self.commit, sorted(self.revisions), sorted(map(list, self.patterns)), files)

    def summary(self, name: str) -> dict[str, Any]:
        """Return name, commit, number of files and bytes, for the command's output."""
        size = sum(int(file.facts["bytes"]) for file in self.files.values())
        return {"repository": name, "commit": revision(self.stored()), "files": len(self.files), "bytes": size}


def revision(repository: StoredRepository) -> str:
    """Return the commit; for a file at a plain address the sha256 of its bytes, as in the ids of scorers."""
    if "://" not in repository.commit:
        return repository.commit
    return next((str(facts["sha256"]) for facts in repository.files.values()), "")


@dataclass
class Inventory:
    """All files that a run asked for: those of repositories, and prompt files."""

    repositories: dict[str, InventoryRepository] = field(default_factory=dict[str, InventoryRepository])
    prompts: dict[str, InventoryFile] = field(default_factory=dict[str, InventoryFile])

    def all(self) -> Iterator[InventoryFile]:
        """Yield every file."""
        for repository in self.repositories.values():
            yield from repository.files.values()
        yield from self.prompts.values()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(int(file.facts["bytes"]) for file in self.all())


def take_inventory(requests: Sequence[downloads.DownloadRequest]) -> Inventory:
    """Return the files behind the noted requests, by repository."""
    inventory = Inventory()
    cached_pipelines: list[downloads.DownloadRequest] = []
    for request in requests:
        if request.kind == "prompts":
            inventory.prompts.setdefault(request.names[0], InventoryFile(request.path, request.revision))
            continue
        repository = inventory.repositories.setdefault(request.source, InventoryRepository())
        repository.revisions.add(request.revision)
        if request.kind == "folder" and request.revision:  # a folder of the person's own may hold any other files
            repository.patterns.add(request.names)
        if request.names == weight_store.PIPELINE and "snapshots" in request.path.parts:
            cached_pipelines.append(request)  # its files were noted one by one, or are in the lock
            continue
        for name, path in request.files().items():
            repository.files.setdefault(name, InventoryFile(path))
            repository.commit = repository.commit or _commit_of(request.source, path, name)
    for request in cached_pipelines:
        repository, commit = inventory.repositories[request.source], request.path.name
        repository.commit = repository.commit or commit
        locked = weight_store.locked(request.source, commit) if commit == repository.commit else None
        for name in locked.files if locked else ():
            if downloads.matches(name, weight_store.PIPELINE):
                repository.files.setdefault(name, InventoryFile(request.path / name))
    return inventory


def _commit_of(source: str, path: Path, name: str) -> str:
    """Return the commit of a file, from its path in the hub's cache or from the store's notes; "" elsewhere."""
    root = path.parents[len(PurePosixPath(name).parts) - 1]
    if root.parent.name == "snapshots":
        return root.name
    if root != weight_store.store() / source:
        return ""
    stored = weight_store.kept_of(root / weight_store.KEPT)
    return stored.commit if stored else ""


def check_hashes(inventory: Inventory, progress: Progress) -> None:
    """Read every file, compare its hash with those of the hub, the store and the lock, and write the lock.

    Raises UserError on a wrong hash.
    """
    lock = weight_store.read_lock()
    progress.phase("checking hashes", float(sum(file.path.stat().st_size for file in inventory.all()) or 1))
    for source, repository in inventory.repositories.items():
        hub_hashes = _hub_hashes(source, repository.commit)
        locked = StoredRepository(**lock.get(f"{source}@{repository.commit}", {}))
        store = weight_store.kept_of(weight_store.store() / source / weight_store.KEPT) or StoredRepository()
        for name, file in repository.files.items():
            blob = file.path.resolve().name  # in the hub's cache a file is named by its hash
            file.expected = hub_hashes.get(name) or (blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else "")
            _hash_file(file, f"{name} of {source}", progress.advance)
            in_store = file.path == weight_store.store() / source / name
            for facts in (locked.files.get(name), store.files.get(name) if in_store else None):
                if repository.commit and facts and facts["sha256"] != file.facts["sha256"]:
                    raise wrong_hash(
                        f"{name} of {source}@{repository.commit}", file.path, file.facts["sha256"], facts["sha256"]
                    )
        if repository.commit:
            lock[f"{source}@{repository.commit}"] = merge_repositories(locked, repository.stored()).mapping()
    prompts = lock.setdefault("prompts", {})
    for path, file in inventory.prompts.items():
        _hash_file(file, path, progress.advance)
        if path in prompts and prompts[path]["sha256"] != file.facts["sha256"]:
            raise wrong_hash(path, file.path, file.facts["sha256"], prompts[path]["sha256"])
        prompts[path] = file.facts
    if inventory.repositories or inventory.prompts:
        write_json(weight_store.store() / weight_store.LOCK, lock)


def _hub_hashes(source: str, commit: str) -> dict[str, str]:
    """Return file name -> hash as the hub lists it now; nothing offline or where the hub does not answer."""
    if not commit or "://" in commit or downloads.offline():
        return {}
    try:
        return {name: file.hash for name, file in weight_store.listing(source, commit)[1].items()}
    except Missing:
        return {}


def merge_repositories(old: StoredRepository, new: StoredRepository) -> StoredRepository:
    """Return the files of both entries of one commit; of the same file the new entry's."""
    patterns = [*old.patterns, *(p for p in new.patterns if p not in old.patterns)]
    return StoredRepository(new.commit, sorted({*old.revisions, *new.revisions}), patterns, {**old.files, **new.files})


def _hash_file(file: InventoryFile, what: str, advance: Advance) -> None:
    """Read a file and keep its size and hash. Raises UserError where it cannot be read or has the wrong hash."""
    try:
        size, sha256, git = file_hashes(file.path, advance)
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from None
    actual = git if len(file.expected) == 40 else sha256
    if file.expected and actual != file.expected:
        raise wrong_hash(what, file.path, actual, file.expected)
    file.facts = {"bytes": size, "sha256": sha256}


def wrong_hash(what: str, path: Path, actual: str, expected: str) -> UserError:
    """Return the error to raise for a file with the wrong hash."""
    return UserError(
        f"wrong hash after download: {what} is {actual}, expected {expected}; remove {path.resolve()} and fetch again"
    )


def file_hashes(path: Path, advance: Advance) -> tuple[int, str, str]:
    """Return (bytes, sha256, git's sha1 of the blob), reading the file once."""
    size = path.stat().st_size
    sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha256.update(chunk)
            git_sha1.update(chunk)
            advance(len(chunk))
    return size, sha256.hexdigest(), git_sha1.hexdigest()


def write_json(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write a mapping as sorted JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(mapping, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda p: p.write_text(text, "utf-8"))
