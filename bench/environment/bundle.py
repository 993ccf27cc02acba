"""Bundle: copies what a run needs into a folder, and installs such a folder on a machine without a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any

from ..assets import downloads, weight_store
from ..assets.weight_store import StoredRepository
from ..errors import UserError
from ..files import write_atomically
from ..progress import Progress
from .disk import require_free_disk
from .inventory import (
    CHUNK_BYTES,
    Advance,
    Inventory,
    file_hashes,
    merge_repositories,
    revision,
    write_json,
    wrong_hash,
)

MANIFEST = "manifest.json"


def export_bundle(inventory: Inventory, to: Path, request: Mapping[str, Any], progress: Progress) -> None:
    """Copy every file of the inventory into a folder and write its manifest last. request: what was fetched, for the manifest."""
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to} is no folder")
    to.mkdir(parents=True, exist_ok=True)
    require_free_disk(to, inventory.bytes, str(to))
    progress.phase(f"writing {to}", float(inventory.bytes or 1))
    for source, repository in inventory.repositories.items():
        for name, file in repository.files.items():
            _copy_checked(file.path, to / "weights" / source / name, file.facts, progress.advance)
    for path, file in inventory.prompts.items():
        _copy_checked(file.path, to / "data" / path, file.facts, progress.advance)
    repositories = {source: repository.stored().mapping() for source, repository in inventory.repositories.items()}
    prompts = {path: file.facts for path, file in inventory.prompts.items()}
    manifest = {"gpobench": version("gpobench"), **request, "repositories": repositories, "prompts": prompts}
    write_json(to / MANIFEST, manifest)


def _copy_checked(source: Path, target: Path, facts: Mapping[str, Any], advance: Advance) -> None:
    """Copy a file, whole or not at all. Raises UserError where its hash is not the given one or it cannot be written."""

    def write(temporary: Path) -> None:
        sha256 = hashlib.sha256()
        with source.open("rb") as stream, temporary.open("wb") as out:
            while chunk := stream.read(CHUNK_BYTES):
                out.write(chunk)
                sha256.update(chunk)
                advance(len(chunk))
        if sha256.hexdigest() != facts["sha256"]:
            temporary.unlink()
            raise wrong_hash(str(source), source, sha256.hexdigest(), str(facts["sha256"]))

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, write)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Bundle:
    """The contents of a folder that `export_bundle` wrote, as its manifest lists them."""

    folder: Path
    repositories: Mapping[str, StoredRepository]
    prompts: Mapping[str, Mapping[str, Any]]  # path below data/ -> bytes and sha256

    def files(self) -> dict[Path, Mapping[str, Any]]:
        """Return path -> bytes and sha256 of every file."""
        weights = {
            self.folder / "weights" / name / file: facts
            for name, repository in self.repositories.items()
            for file, facts in repository.files.items()
        }
        return weights | {self.folder / "data" / path: facts for path, facts in self.prompts.items()}


def install_bundle(source: Path, progress: Progress) -> dict[str, Any]:
    """Check every file of a folder that `export_bundle` wrote, then move all of them into the store.

    Returns what was installed. Raises UserError, and installs nothing, where one file is missing or wrong.
    """
    start = time.monotonic()
    bundle = _read_bundle(source)
    files = bundle.files()
    size = float(sum(int(facts["bytes"]) for facts in files.values()))
    lock = weight_store.read_lock()
    _check_against_lock(bundle, lock)
    progress.phase(f"checking {source}", size or 1)
    for path, facts in files.items():
        _verify(path, facts, progress.advance)
    store = weight_store.store()
    store.mkdir(parents=True, exist_ok=True)
    require_free_disk(store, size, str(source))
    progress.phase("installing", size or 1)
    for name, repository in _move_into_store(bundle, store, progress.advance).items():
        if repository.commit:
            locked = StoredRepository(**lock.get(f"{name}@{repository.commit}", {}))
            lock[f"{name}@{repository.commit}"] = merge_repositories(locked, repository).mapping()
    lock.setdefault("prompts", {}).update(bundle.prompts)
    write_json(store / weight_store.LOCK, lock)
    return {
        "from": str(source),
        "store": str(store),
        "repositories": [
            {"repository": name, "commit": revision(repository), "files": len(repository.files)}
            for name, repository in bundle.repositories.items()
        ],
        "prompts": sorted(bundle.prompts),
        "bytes": int(size),
        "seconds": round(time.monotonic() - start, 1),
    }


def _check_against_lock(bundle: _Bundle, lock: Mapping[str, Any]) -> None:
    """Raise UserError where the bundle has another hash for a file than the lock."""
    for name, repository in bundle.repositories.items():
        locked = StoredRepository(**lock.get(f"{name}@{repository.commit}", {}))
        for file in locked.files.keys() & repository.files.keys() if repository.commit else ():
            actual, expected = repository.files[file]["sha256"], locked.files[file]["sha256"]
            if actual != expected:
                path = bundle.folder / "weights" / name / file
                raise wrong_hash(f"{file} of {name}@{repository.commit}", path, actual, expected)


def _move_into_store(bundle: _Bundle, store: Path, advance: Advance) -> dict[str, StoredRepository]:
    """Copy the bundle into a temporary folder of the store, then rename it into place; returns the repositories stored."""
    incoming = Path(mkdtemp(prefix=".incoming-", dir=store))
    try:
        stored = {
            name: _stage_repository(bundle.folder, incoming / "new", name, repository, advance)
            for name, repository in bundle.repositories.items()
        }
        for path, facts in bundle.prompts.items():
            _copy_checked(bundle.folder / "data" / path, incoming / "data" / path, facts, advance)
        for name in bundle.repositories:
            _replace_folder(incoming / "new" / name, store / name, incoming / "old" / name)
        for path in bundle.prompts:
            (downloads.cache() / path).parent.mkdir(parents=True, exist_ok=True)
            (incoming / "data" / path).replace(downloads.cache() / path)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return stored


def _read_bundle(folder: Path) -> _Bundle:
    """Read the manifest of a bundle. Raises UserError where it is missing, damaged or names a file outside the folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} was not written by `gpobench fetch --to`, or not to its end: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        repositories = {str(name): StoredRepository(**entry) for name, entry in manifest["repositories"].items()}
        prompts: dict[str, dict[str, Any]] = dict(manifest["prompts"])
        names = [f"{name}/{file}" for name, repository in repositories.items() for file in repository.files]
        facts = [*prompts.values()]
        facts += [fact for repository in repositories.values() for fact in repository.files.values()]
        complete = all(isinstance(fact["bytes"], int) and len(fact["sha256"]) == 64 for fact in facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for name in (*names, *prompts):
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or pure.parts[0].startswith("."):
            raise UserError(f"{path} names {name!r}, which would lie outside of the store")
    if not complete:
        raise UserError(f"{path} lacks the size or the sha256 of a file")
    return _Bundle(folder, repositories, prompts)


def _verify(path: Path, facts: Mapping[str, Any], advance: Advance) -> None:
    """Raise UserError unless the file has this size and hash."""
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the folder again; nothing was installed")
    size = path.stat().st_size
    if size != facts["bytes"]:
        kind = "truncated" if size < facts["bytes"] else "another file"
        raise UserError(f"{path} is {kind}: {size:,} bytes, expected {facts['bytes']:,}; nothing was installed")
    _, sha256, _ = file_hashes(path, advance)
    if sha256 != facts["sha256"]:
        raise UserError(f"{path} has the wrong hash: {sha256}, expected {facts['sha256']}; nothing was installed")


def _stage_repository(
    source: Path, staged: Path, name: str, repository: StoredRepository, advance: Advance
) -> StoredRepository:
    """Make the folder of a repository for the store: the bundle's files, and those of the same commit already in the store."""
    for file, facts in repository.files.items():
        _copy_checked(source / "weights" / name / file, staged / name / file, facts, advance)
    before = weight_store.kept_of(weight_store.store() / name / weight_store.KEPT)
    if before is not None and before.commit and before.commit == repository.commit:
        for file in before.files.keys() - repository.files.keys():
            (staged / name / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(weight_store.store() / name / file, staged / name / file)
        repository = merge_repositories(before, repository)
    write_json(staged / name / weight_store.KEPT, repository.mapping())
    return repository


def _replace_folder(new: Path, target: Path, old: Path) -> None:
    """Rename a new folder to the target; a folder that is there becomes `old`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old.parent.mkdir(parents=True, exist_ok=True)
        target.rename(old)
    new.rename(target)
