"""The supply train before a run: the model, the prompts and every scorer's weights brought here, each file held against its hash.

What a scorer needs is learnt by making it and showing it a blank picture, while a ledger keeps what it asks for: no list of files to
go stale. What was fetched once is locked: other bytes under the same commit, or at the same address, are refused for ever after.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any

import numpy as np

from .. import registry
from ..assets import downloads, weight_store
from ..assets.weight_store import StoredRepository
from ..errors import Missing, UserError
from ..files import write_atomically
from ..model_spec import ModelSpec, find_model_spec
from ..progress import Progress
from ..scoring.scorers import close_scorers, open_scorer
from ..spec import Columns, Prompt, Split, SupportsColumns, Task

MANIFEST = "manifest.json"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
CHUNK = 8 * 2**20
SPARE = 200 * 2**20  # bytes that a disk keeps free
# Weights under their plain name: `model.fp16.safetensors` and `diffusion_pytorch_model.non_ema.safetensors` are variants.
PLAIN = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that no adapter of bench/models loads

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Need:
    """A scorer or an embedder that a run asks for."""

    kind: str  # scorer | embedder
    name: str
    needed: bool  # a run does not begin without it


def needs(task: Task | None, domain: str, scorers: Sequence[str] = ()) -> list[Need]:
    """All that a task's runs ask for, each once, and further scorers by name; what a run needs comes first."""
    found: dict[tuple[str, str], bool] = {("scorer", name): True for name in scorers}
    if task is not None:
        columns = task.columns(domain) if isinstance(task, SupportsColumns) else Columns()
        found |= {("scorer", name): True for name in (task.reward(domain), *task.held_out(domain))}
        for name in (*task.scorers(domain), *columns.quality):
            found.setdefault(("scorer", name), False)
        for name in (*columns.diversity, *columns.drift):
            found.setdefault(("embedder", name), False)
    return [Need(kind, name, needed) for (kind, name), needed in found.items()]


def blank(task: Task, domain: str) -> list[Prompt]:
    """One prompt of every stratum: some scorers open a part of theirs only when a prompt asks for it (GenEval's colours)."""
    prompts = task.prompts("validation", domain)
    return list({prompt.stratum: prompt for prompt in reversed(prompts)}.values())


def rehearse(need: Need, prompts: Sequence[Prompt], height: int = 512, width: int = 512) -> None:
    """Make it, show it a blank picture a prompt, and let it go; raises what it raises, Missing where a part of it is not here."""
    if need.kind == "embedder":
        registry.embedder(need.name)
    else:
        scorer = open_scorer(need.name)
        try:
            if prompts:
                scorer(np.full((len(prompts), height, width, 3), 255, np.uint8), prompts)
        finally:
            close_scorers([scorer])
            del scorer
    gc.collect()  # the next one may be as large


def fetch(
    task: str | None = None,
    model: str | None = None,
    *,
    to: Path | None = None,
    source: Path | None = None,
    progress: Progress,
    scorers: Sequence[str] = (),
) -> dict[str, Any]:
    """Bring what runs of this task and model need, and say what came; with HF_HUB_OFFLINE, check what is here.

    to: also copy it all into a folder for a machine without network; source: install such a folder, and nothing else.
    A task that keeps its lists in memory is asked in a fresh process: lists it has read before leave no trace (bench/assets/downloads.py).
    Raises UserError with the whole list where something that a run needs cannot be had, and on a wrong hash.
    """
    if source is not None:
        if task or model or scorers or to:
            raise UserError("--from installs all that its folder holds: give it alone")
        return install(source, progress)
    if not (task or model or scorers):
        raise UserError("say what to fetch: --task, --model, --scorer, or --from FOLDER")
    start = time.monotonic()
    model_spec = find_model_spec(model) if model else None
    domain = model_spec.domain if model_spec else "open"
    size = (model_spec.height, model_spec.width) if model_spec else (512, 512)
    made: Any = registry.load("task", task)() if task else None
    failed: list[str] = []
    left_out: list[dict[str, str]] = []
    with downloads.log_downloads() as asked, weight_store.allow_pickled():
        if model_spec is not None and not Path(model_spec.source).is_dir():
            try:
                _pipeline(model_spec, progress)
            except Missing as missing:
                failed.append(f"model {model_spec.name}: {missing}")
        prompts: list[Prompt] = []
        try:
            if made is not None:
                for split in SPLITS:
                    made.prompts(split, domain)
                prompts = blank(made, domain)
        except UserError as error:
            failed.append(f"prompts of {task}: {error}")
        for need in needs(made, domain, scorers):
            progress.phase(f"{need.kind} {need.name}", 1.0)
            try:
                rehearse(need, prompts, *size)
            except weight_store.WrongHash:
                raise
            except UserError as error:
                if need.needed:
                    failed.append(f"{need.kind} {need.name}: {error}")
                else:
                    left_out.append({"kind": need.kind, "name": need.name, "why": str(error)})
                    progress.say(f"left out, runs do without it: {need.name}: {error}")
            except Exception as error:  # foreign code; its weights may be here all the same
                why = f"{type(error).__name__}: {error}"
                if need.needed:
                    failed.append(f"{need.kind} {need.name}: {why}")
                else:
                    left_out.append({"kind": need.kind, "name": need.name, "why": why})
            progress.advance(1.0)
    goods = _gather(asked)
    _check(goods, progress)
    if failed:
        raise UserError(f"{len(failed)} of the things that a run needs cannot be had, or fail: {'; '.join(failed)}")
    if to is not None:
        _export(goods, to, {"task": task, "model": model, "domain": domain, "scorers": list(scorers)}, progress)
    return {
        "task": task, "model": model, "domain": domain,
        "repositories": [repository.told(name) for name, repository in sorted(goods.repositories.items())],
        "prompts": [{"path": path, **one.facts} for path, one in sorted(goods.prompts.items())],
        "left_out": left_out,
        "bytes": goods.bytes,
        "lock": str(weight_store.store() / weight_store.LOCK),
        "to": str(to) if to else None,
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


# The model


def wanted(index: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Of a repository's files those that diffusers loads: the parts that model_index.json names, under their plain names."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    parts = {name for name, entry in entries.items() if all(entry) and name not in UNUSED}
    found = ["model_index.json"]
    for name in sorted(names):
        part, _, rest = name.partition("/")
        leaf = rest.rpartition("/")[2]
        weights = ".safetensors" in leaf
        if part in parts and downloads.matches(name, weight_store.PIPELINE) and (PLAIN.fullmatch(leaf) or not weights):
            found.append(name)
    return found


def _pipeline(model_spec: ModelSpec, progress: Progress) -> None:
    """The files of a model into the hub's cache; Missing where they cannot be had."""
    revision = model_spec.revision or "main"
    if downloads.offline():
        if weight_store.local(model_spec.source, revision) is None:
            raise weight_store.hub_refusal(model_spec.source, "", revision, OSError("it is not here"))
        return
    own = weight_store.local(model_spec.source, revision)
    if own is not None and "snapshots" not in own.parts:  # yours or the store's, which wins over the hub
        return
    try:
        commit, files = weight_store.listing(model_spec.source, revision, "model_index.json")
    except Missing as missing:
        if own is None:
            raise
        progress.say(f"what was fetched before is checked, and no more: {missing}")
        return
    index = weight_store.download(model_spec.source, "model_index.json", revision)
    names = wanted(json.loads(index.read_text("utf-8")), files)
    absent = [name for name in names if weight_store.cached(model_spec.source, name, commit) is None]
    need = sum(files[name].bytes for name in absent)
    _room(Path(_hub_cache()), need, model_spec.source)
    progress.phase(f"fetching {model_spec.name}", float(need or 1))
    for name in absent:
        weight_store.download(model_spec.source, name, commit, _bar(progress.advance))
    place = weight_store.cached(model_spec.source, "model_index.json", commit)
    if place is None:
        raise UserError(f"{model_spec.source} changed while it was fetched: run the same command again")
    for name in names:
        downloads.log_download(
            downloads.DownloadRequest("file", model_spec.source, (name,), revision, place.parent / name)
        )
    # The mark that hub.local looks for: no file of these patterns is left to be fetched.
    downloads.log_download(
        downloads.DownloadRequest("folder", model_spec.source, weight_store.PIPELINE, revision, place.parent)
    )


def _bar(advance: Advance) -> type:
    """A progress bar as the hub's library takes it, that only passes the bytes on."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]  # the library asks for a subclass of its own
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            advance(float(n or 0))
            return None

    return Bar


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _room(place: Path, need: float, what: str) -> None:
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need and free < need + SPARE:
        raise UserError(f"{what} takes {_gb(need)}, and the disk at {place} has {_gb(free)} free")


def _gb(n: float) -> str:
    return f"{n / 2**30:.1f} GB" if n >= 2**30 / 10 else f"{n / 2**20:.1f} MB"


# What came, and whether it is what it must be


@dataclass
class _File:
    """A file, its size and hash once it was read, and the hash it must have."""

    path: Path
    expected: str = ""  # sha256, or git's sha1
    facts: dict[str, Any] = field(default_factory=dict[str, Any])  # bytes, sha256


@dataclass
class _Repository:
    """What was asked of one repository."""

    commit: str = ""  # empty for a folder of the user's own
    revisions: set[str] = field(default_factory=set[str])
    patterns: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]])
    files: dict[str, _File] = field(default_factory=dict[str, _File])

    def kept(self) -> StoredRepository:
        files = {name: file.facts for name, file in sorted(self.files.items())}
        return StoredRepository(self.commit, sorted(self.revisions), sorted(map(list, self.patterns)), files)

    def told(self, name: str) -> dict[str, Any]:
        size = sum(int(file.facts["bytes"]) for file in self.files.values())
        return {"repository": name, "commit": _revision(self.kept()), "files": len(self.files), "bytes": size}


def _revision(kept: StoredRepository) -> str:
    """A commit; for what stands at an address, on no hub, the sha256 of its bytes, as the ids of scorers have it."""
    if "://" not in kept.commit:
        return kept.commit
    return next((str(fact["sha256"]) for fact in kept.files.values()), "")


@dataclass
class _Goods:
    """All that was asked for."""

    repositories: dict[str, _Repository] = field(default_factory=dict[str, _Repository])
    prompts: dict[str, _File] = field(default_factory=dict[str, _File])

    def all(self) -> Iterator[_File]:
        for repository in self.repositories.values():
            yield from repository.files.values()
        yield from self.prompts.values()

    @property
    def bytes(self) -> int:
        return sum(int(file.facts["bytes"]) for file in self.all())


def _gather(asked: Sequence[downloads.DownloadRequest]) -> _Goods:
    goods = _Goods()
    for one in asked:
        if one.kind == "prompts":
            goods.prompts.setdefault(one.names[0], _File(one.path, one.revision))
            continue
        repository = goods.repositories.setdefault(one.source, _Repository())
        repository.revisions.add(one.revision)
        if one.kind == "folder" and one.revision:  # of a folder that was given nobody knows what else belongs to it
            repository.patterns.add(one.names)
        if one.names == weight_store.PIPELINE and "snapshots" in one.path.parts:
            continue  # its files stand in the ledger one by one, or in the lock
        for name, path in one.files().items():
            repository.files.setdefault(name, _File(path))
            repository.commit = repository.commit or _commit(one.source, path, name)
    for one in asked:  # a pipeline that was here already
        if one.names == weight_store.PIPELINE and "snapshots" in one.path.parts:
            repository, commit = goods.repositories[one.source], one.path.name
            repository.commit = repository.commit or commit
            known = weight_store.locked_repository(one.source, commit) if commit == repository.commit else None
            for name in known.files if known else ():
                if downloads.matches(name, weight_store.PIPELINE):
                    repository.files.setdefault(name, _File(one.path / name))
    return goods


def _commit(source: str, path: Path, name: str) -> str:
    """Which commit a file is of: the hub's cache says so in its path, the store in its notes."""
    root = path.parents[len(PurePosixPath(name).parts) - 1]
    if root.parent.name == "snapshots":
        return root.name
    kept = (
        weight_store.read_stored(weight_store.store() / source / weight_store.STORED)
        if root == weight_store.store() / source
        else None
    )
    return kept.commit if kept else ""


def _check(goods: _Goods, progress: Progress) -> None:
    """Read every file, hold it against what the hub, the store or the lock say, and write the lock."""
    lock = weight_store.read_lock()
    progress.phase("checking hashes", float(sum(file.path.stat().st_size for file in goods.all()) or 1))
    for source, repository in goods.repositories.items():
        listed = _listed(source, repository.commit)
        known = StoredRepository(**lock.get(f"{source}@{repository.commit}", {}))
        store = weight_store.read_stored(weight_store.store() / source / weight_store.STORED) or StoredRepository()
        for name, file in repository.files.items():
            blob = file.path.resolve().name  # the hub's cache calls a file by the hash the hub gave
            file.expected = listed.get(name) or (blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else "")
            _read(file, f"{name} of {source}", progress.advance)
            before = [known.files.get(name)] + (
                [store.files.get(name)] if file.path == weight_store.store() / source / name else []
            )
            for fact in before:
                if repository.commit and fact and fact["sha256"] != file.facts["sha256"]:
                    raise _wrong(
                        f"{name} of {source}@{repository.commit}", file.path, file.facts["sha256"], fact["sha256"]
                    )
        if repository.commit:
            lock[f"{source}@{repository.commit}"] = _merged(known, repository.kept()).mapping()
    prompts = lock.setdefault("prompts", {})
    for path, file in goods.prompts.items():
        _read(file, path, progress.advance)
        if path in prompts and prompts[path]["sha256"] != file.facts["sha256"]:
            raise _wrong(path, file.path, file.facts["sha256"], prompts[path]["sha256"])
        prompts[path] = file.facts
    if goods.repositories or goods.prompts:
        _write_json(weight_store.store() / weight_store.LOCK, lock)


def _listed(source: str, commit: str) -> dict[str, str]:
    """Name -> hash as the hub says now; empty where it is not asked or does not answer."""
    if not commit or "://" in commit or downloads.offline():
        return {}
    try:
        return {name: file.hash for name, file in weight_store.listing(source, commit)[1].items()}
    except Missing:
        return {}


def _merged(old: StoredRepository, new: StoredRepository) -> StoredRepository:
    patterns = [*old.patterns, *(p for p in new.patterns if p not in old.patterns)]
    return StoredRepository(new.commit, sorted({*old.revisions, *new.revisions}), patterns, {**old.files, **new.files})


def _read(file: _File, what: str, advance: Advance) -> None:
    try:
        size, sha256, git = _hashes(file.path, advance)
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from None
    found = git if len(file.expected) == 40 else sha256
    if file.expected and found != file.expected:
        raise _wrong(what, file.path, found, file.expected)
    file.facts = {"bytes": size, "sha256": sha256}


def _wrong(what: str, path: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"wrong hash after download: {what} is {found}, expected {expected}; remove {path.resolve()} and fetch again"
    )


def _hashes(path: Path, advance: Advance) -> tuple[int, str, str]:
    """(bytes, sha256, git's sha1 of the blob); a file is read once."""
    size = path.stat().st_size
    one, two = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while part := stream.read(CHUNK):
            one.update(part)
            two.update(part)
            advance(len(part))
    return size, one.hexdigest(), two.hexdigest()


def _write_json(path: Path, mapping: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(mapping, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda p: p.write_text(text, "utf-8"))


# A folder for a machine without network


def _export(goods: _Goods, to: Path, what: Mapping[str, Any], progress: Progress) -> None:
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to} is no folder")
    to.mkdir(parents=True, exist_ok=True)
    _room(to, goods.bytes, str(to))
    progress.phase(f"writing {to}", float(goods.bytes or 1))
    for source, repository in goods.repositories.items():
        for name, file in repository.files.items():
            _copy(file.path, to / "weights" / source / name, file.facts, progress.advance)
    for path, file in goods.prompts.items():
        _copy(file.path, to / "data" / path, file.facts, progress.advance)
    from importlib.metadata import version

    kept = {source: repository.kept().mapping() for source, repository in goods.repositories.items()}
    prompts = {path: file.facts for path, file in goods.prompts.items()}
    _write_json(to / MANIFEST, {"gpobench": version("gpobench"), **what, "repositories": kept, "prompts": prompts})


def _copy(source: Path, target: Path, facts: Mapping[str, Any], advance: Advance) -> None:
    """The file, whole or not at all; UserError where other bytes are read than a moment ago, or the disk is full."""

    def write(temporary: Path) -> None:
        total = hashlib.sha256()
        with source.open("rb") as stream, temporary.open("wb") as out:
            while part := stream.read(CHUNK):
                out.write(part)
                total.update(part)
                advance(len(part))
        if total.hexdigest() != facts["sha256"]:
            temporary.unlink()
            raise _wrong(str(source), source, total.hexdigest(), str(facts["sha256"]))

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, write)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None


def install(source: Path, progress: Progress) -> dict[str, Any]:
    """Check every file of a folder that --to wrote, then move all of it into the store; UserError, and nothing moved, on one bad file."""
    start = time.monotonic()
    repositories, prompts = _manifest(source)
    files = {
        source / "weights" / name / file: facts
        for name, kept in repositories.items()
        for file, facts in kept.files.items()
    }
    files |= {source / "data" / path: facts for path, facts in prompts.items()}
    size = float(sum(int(facts["bytes"]) for facts in files.values()))
    lock = weight_store.read_lock()
    for name, kept in repositories.items():
        known = StoredRepository(**lock.get(f"{name}@{kept.commit}", {}))
        for file in known.files.keys() & kept.files.keys() if kept.commit else ():
            if known.files[file]["sha256"] != kept.files[file]["sha256"]:
                found, expected = kept.files[file]["sha256"], known.files[file]["sha256"]
                raise _wrong(f"{file} of {name}@{kept.commit}", source / "weights" / name / file, found, expected)
    progress.phase(f"checking {source}", size or 1)
    for path, facts in files.items():
        _verify(path, facts, progress.advance)
    store = weight_store.store()
    store.mkdir(parents=True, exist_ok=True)
    _room(store, size, str(source))
    progress.phase("installing", size or 1)
    incoming = Path(mkdtemp(prefix=".incoming-", dir=store))
    try:
        merged = {
            name: _stage(source, incoming / "new", name, kept, progress.advance) for name, kept in repositories.items()
        }
        for path, facts in prompts.items():
            _copy(source / "data" / path, incoming / "data" / path, facts, progress.advance)
        for name in repositories:
            _swap(incoming / "new" / name, store / name, incoming / "old" / name)
        for path in prompts:
            (downloads.cache() / path).parent.mkdir(parents=True, exist_ok=True)
            (incoming / "data" / path).replace(downloads.cache() / path)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    for name, kept in merged.items():
        if kept.commit:
            known = StoredRepository(**lock.get(f"{name}@{kept.commit}", {}))
            lock[f"{name}@{kept.commit}"] = _merged(known, kept).mapping()
    lock.setdefault("prompts", {}).update(prompts)
    _write_json(store / weight_store.LOCK, lock)
    return {
        "from": str(source),
        "store": str(store),
        "repositories": [
            {"repository": name, "commit": _revision(kept), "files": len(kept.files)}
            for name, kept in repositories.items()
        ],
        "prompts": sorted(prompts),
        "bytes": int(size),
        "seconds": round(time.monotonic() - start, 1),
    }


def _manifest(source: Path) -> tuple[dict[str, StoredRepository], dict[str, dict[str, Any]]]:
    path = source / MANIFEST
    if not path.is_file():
        raise UserError(f"{source} was not written by `gpobench fetch --to`, or not to its end: it has no {MANIFEST}")
    try:
        said = json.loads(path.read_text("utf-8"))
        repositories = {str(name): StoredRepository(**kept) for name, kept in said["repositories"].items()}
        prompts: dict[str, dict[str, Any]] = dict(said["prompts"])
        names = [f"{name}/{file}" for name, kept in repositories.items() for file in kept.files]
        facts = [*prompts.values(), *(fact for kept in repositories.values() for fact in kept.files.values())]
        sound = all(isinstance(fact["bytes"], int) and len(fact["sha256"]) == 64 for fact in facts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for name in (*names, *prompts):
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or pure.parts[0].startswith("."):
            raise UserError(f"{path} names {name!r}, which would lie outside of the store")
    if not sound:
        raise UserError(f"{path} lacks the size or the sha256 of a file")
    return repositories, prompts


def _verify(path: Path, facts: Mapping[str, Any], advance: Advance) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the folder again; nothing was installed")
    size = path.stat().st_size
    if size != facts["bytes"]:
        kind = "truncated" if size < facts["bytes"] else "another file"
        raise UserError(f"{path} is {kind}: {size:,} bytes, expected {facts['bytes']:,}; nothing was installed")
    _, found, _ = _hashes(path, advance)
    if found != facts["sha256"]:
        raise UserError(f"{path} has the wrong hash: {found}, expected {facts['sha256']}; nothing was installed")


def _stage(source: Path, staged: Path, name: str, kept: StoredRepository, advance: Advance) -> StoredRepository:
    """A repository as it will stand in the store: these files, and those of the same commit that stand there already."""
    for file, facts in kept.files.items():
        _copy(source / "weights" / name / file, staged / name / file, facts, advance)
    before = weight_store.read_stored(weight_store.store() / name / weight_store.STORED)
    if before is not None and before.commit and before.commit == kept.commit:
        for file in before.files.keys() - kept.files.keys():
            (staged / name / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(weight_store.store() / name / file, staged / name / file)
        kept = _merged(before, kept)
    _write_json(staged / name / weight_store.STORED, kept.mapping())
    return kept


def _swap(new: Path, target: Path, old: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old.parent.mkdir(parents=True, exist_ok=True)
        target.rename(old)
    new.rename(target)
